/* Matrices for machines without vector instructions to speak of: five ternary weights in a byte, multiplied by looking
 * their sum up. native/FORMAT.md, layout `pentium2`.
 *
 * Five activations give 243 possible sums. They are tabulated once, for all rows of all matrices that share them; then a
 * byte of weights costs one load and one addition. Tables of LOOKUP_TILE groups are in use at a time.
 *
 * No sum wraps: activations are bytes, -128 to 127, so a sum over a tile is at most 5 * LOOKUP_TILE * 128 = 12800
 * in magnitude, less than 2^15. Tiles are added in 32 bits: at most 128 * COLUMNS_LIMIT = 2^22, which floats
 * hold exactly.
 */
#ifndef CORDEE_PENTIUM2_LOOKUP_H
#define CORDEE_PENTIUM2_LOOKUP_H

#include <stddef.h>
#include <stdint.h>

#include "base/limits.h"
#include "engine/matrix.h"

#define LOOKUP_WEIGHTS 5u   /* a group: the weights of a byte */
#define LOOKUP_TILE 20u     /* groups: their tables are 10 kB of a first-level cache of 16 */
#define LOOKUP_ENTRIES 256u /* of a group's table; no weights have the last four codes */
#define LOOKUP_MATRICES 3u  /* that share tables, at most: those of queries, keys and values */
#define LOOKUP_COLUMNS 8u   /* sums that sum_columns makes at once */

_Static_assert(LOOKUP_WEIGHTS * LOOKUP_TILE * 128 <= INT16_MAX, "a sum over a tile fits 16 bits");
_Static_assert(128 * COLUMNS_LIMIT <= 1u << 24, "a sum over all tiles becomes a float as it is");

/* The inner loops. All of them are exact integers: every implementation gives the same. */
struct lookup_kernels {
    const char *name;
    /* table[code] = sum of x[i] * weight i of that code, over LOOKUP_WEIGHTS values of x. */
    void (*tabulate)(int16_t *table, const int8_t *x);
    /* out[row] += sum over groups of tables[group][codes[row][group]]; groups is a multiple of 4, at most LOOKUP_TILE. */
    void (*add_rows)(int32_t *out, const uint8_t *codes, uint32_t rows, uint32_t groups, const int16_t *tables);
    /* For each block b and column c < LOOKUP_COLUMNS: out[b * LOOKUP_COLUMNS + c] = 256 * sum over i < pairs of
     * x[2i] * m[i][c][0] + x[2i + 1] * m[i][c][1], with m [pairs][LOOKUP_COLUMNS][2] at b * block_stride; modulo 2^32.
     * The number of pairs is even. */
    void (*sum_columns)(int32_t *out, const int8_t *matrix, uint32_t blocks, size_t block_stride, uint32_t pairs,
                        const int16_t *x);
};

/* The best that this CPU runs, or the plain ones for the name "scalar". */
const struct lookup_kernels *lookup_kernels_named(const char *name);

extern const struct lookup_kernels lookup_plain;
#if defined(__i386__)
extern const struct lookup_kernels lookup_mmx;
#endif

/* Bytes of a row: groups of `cols` weights, padded so that a row is read in words. */
static inline uint32_t lookup_row_bytes(uint32_t cols)
{
    return (cols + 4 * LOOKUP_WEIGHTS - 1) / (4 * LOOKUP_WEIGHTS) * 4;
}

/* outs[m][row] = dot of a row of matrices[m] with x [cols], as floats times the row's scale and `scale`. All `count`
 * matrices have the columns of x. `tables` is scratch of LOOKUP_TILE * LOOKUP_ENTRIES, aligned to a cache line. */
void lookup_multiply(const struct lookup_kernels *kernels, const struct matrix *const *matrices, float *const *outs,
                     uint32_t count, const int8_t *x, float scale, int16_t *tables);

/* A row of the matrix as floats [cols], scale included: of an embedding. */
void lookup_row(const struct matrix *matrix, uint32_t row, float *out);

#endif
