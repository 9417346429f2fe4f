/* Multiplying by look-up: the loops over tiles and matrices, and the plain kernels, which are the truth. */
#include "lookup.h"

#include <string.h>

/* A code is d0 + 3 d1 + 9 d2 + 28 (d3 + 3 d4) with digits weight + 1: the 27 sums of the first three, and one place that
 * is never used, are seven vectors of four, which other digits shift as a whole. */
#define LOW_CODES 28u
_Static_assert(LOW_CODES * 3 * 3 <= LOOKUP_ENTRIES, "all codes have a place in a table");

/* Rows whose sums stay in a second-level cache of 512 kB while all tiles are added to them; making the tables again for
 * each strip is less than fetching the sums of a large head from memory again and again. */
#define STRIP_ROWS 8192u

static int32_t weight_of(uint32_t code, uint32_t place)
{
    static const uint8_t divisors[LOOKUP_WEIGHTS] = {1, 3, 9, 1, 3};
    return (int32_t)((place < 3 ? code % LOW_CODES : code / LOW_CODES) / divisors[place] % 3) - 1;
}

static void tabulate(int16_t *table, const int8_t *x)
{
    int16_t low[LOW_CODES];
    for (uint32_t i = 0; i < LOW_CODES; i++)
        low[i] = (int16_t)(((int)(i % 3) - 1) * x[0] + ((int)(i / 3 % 3) - 1) * x[1] + ((int)(i / 9 % 3) - 1) * x[2]);
    for (int fifth = -1; fifth <= 1; fifth++)
        for (int fourth = -1; fourth <= 1; fourth++)
            for (uint32_t i = 0; i < LOW_CODES; i++)
                *table++ = (int16_t)(low[i] + fourth * x[3] + fifth * x[4]);
}

static void add_rows(int32_t *out, const uint8_t *codes, uint32_t rows, uint32_t groups, const int16_t *tables)
{
    for (uint32_t row = 0; row < rows; row++, codes += groups) {
        int32_t sum = 0;
        for (uint32_t group = 0; group < groups; group++)
            sum += tables[group * LOOKUP_ENTRIES + codes[group]];
        out[row] += sum;
    }
}

static void sum_columns(int32_t *out, const int8_t *matrix, uint32_t blocks, size_t block_stride, uint32_t pairs,
                        const int16_t *x)
{
    for (uint32_t block = 0; block < blocks; block++, out += LOOKUP_COLUMNS, matrix += block_stride) {
        const int8_t *m = matrix;
        uint32_t sums[LOOKUP_COLUMNS] = {0}; /* without a sign: of what is no number they may wrap */
        for (uint32_t i = 0; i < pairs; i++, m += 2 * LOOKUP_COLUMNS)
            for (uint32_t c = 0; c < LOOKUP_COLUMNS; c++)
                sums[c] += (uint32_t)(x[2 * i] * m[2 * c] + x[2 * i + 1] * m[2 * c + 1]) * 256;
        memcpy(out, sums, sizeof sums);
    }
}

const struct lookup_kernels lookup_plain = {"scalar", tabulate, add_rows, sum_columns};

/* The code of five weights 0, which rows are padded with. */
#define PADDING (1 + 3 + 9 + LOW_CODES * (1 + 3))

/* The tables of `groups` groups from `first` on; behind the last column activations are 0. */
static void tabulate_tile(const struct lookup_kernels *kernels, int16_t *tables, const int8_t *x, uint32_t cols,
                          uint32_t first, uint32_t groups)
{
    for (uint32_t group = 0; group < groups; group++, tables += LOOKUP_ENTRIES) {
        const uint32_t at = (first + group) * LOOKUP_WEIGHTS;
        int8_t last[LOOKUP_WEIGHTS] = {0};
        if (at + LOOKUP_WEIGHTS <= cols) {
            kernels->tabulate(tables, x + at);
        } else if (at >= cols) {
            tables[PADDING] = 0;
        } else {
            memcpy(last, x + at, cols - at);
            kernels->tabulate(tables, last);
        }
    }
}

/* Sums, in the room of the floats that they become. */
typedef int32_t __attribute__((may_alias)) sum_in_place;

static void rescale(float *out, uint32_t rows, float scale)
{
    const sum_in_place *sums = (const sum_in_place *)(const void *)out;
    _Pragma("GCC unroll 4") for (uint32_t row = 0; row < rows; row++)
        out[row] = (float)sums[row] * scale;
}

/* Rows `first` to `end` of a matrix's sums. */
static void rescale_rows(float *out, const struct matrix *matrix, uint32_t first, uint32_t end, float scale)
{
    const uint32_t each = matrix->scale_rows;
    if (each == 1) {
        const sum_in_place *sums = (const sum_in_place *)(const void *)out;
        for (uint32_t row = first; row < end; row++)
            out[row] = (float)sums[row] * (matrix->scales[row] * scale);
        return;
    }
    while (first < end) {
        const uint32_t group = first / each, until = (group + 1) * each < end ? (group + 1) * each : end;
        rescale(out + first, until - first, matrix->scales[group] * scale);
        first = until;
    }
}

/* Of each matrix the rows `first` to `first + STRIP_ROWS`. */
static void multiply_strip(const struct lookup_kernels *kernels, const struct matrix *const *matrices,
                           float *const *outs, uint32_t count, uint32_t first, const int8_t *x, float scale,
                           int16_t *tables)
{
    const uint32_t groups = lookup_row_bytes(matrices[0]->cols);
    uint32_t ends[LOOKUP_MATRICES];
    for (uint32_t m = 0; m < count; m++) {
        const uint32_t rows = matrices[m]->rows;
        ends[m] = rows < first ? first : rows - first < STRIP_ROWS ? rows : first + STRIP_ROWS;
        memset(outs[m] + first, 0, (ends[m] - first) * sizeof *outs[m]);
    }
    for (uint32_t group = 0; group < groups; group += LOOKUP_TILE) {
        const uint32_t some = groups - group < LOOKUP_TILE ? groups - group : LOOKUP_TILE;
        tabulate_tile(kernels, tables, x, matrices[0]->cols, group, some);
        for (uint32_t m = 0; m < count; m++)
            if (ends[m] > first)
                kernels->add_rows((int32_t *)(void *)(outs[m] + first),
                                  matrices[m]->data + (size_t)group * matrices[m]->rows + (size_t)first * some,
                                  ends[m] - first, some, tables);
    }
    for (uint32_t m = 0; m < count; m++)
        rescale_rows(outs[m], matrices[m], first, ends[m], scale);
}

void lookup_multiply(const struct lookup_kernels *kernels, const struct matrix *const *matrices, float *const *outs,
                     uint32_t count, const int8_t *x, float scale, int16_t *tables)
{
    uint32_t most = 0;
    for (uint32_t m = 0; m < count; m++)
        most = matrices[m]->rows > most ? matrices[m]->rows : most;
    for (uint32_t first = 0; first < most; first += STRIP_ROWS)
        multiply_strip(kernels, matrices, outs, count, first, x, scale, tables);
}

void lookup_row(const struct matrix *matrix, uint32_t row, float *out)
{
    const uint32_t groups = lookup_row_bytes(matrix->cols);
    const float scale = matrix->scales[row / matrix->scale_rows];
    for (uint32_t i = 0; i < matrix->cols; i++) {
        const uint32_t group = i / LOOKUP_WEIGHTS, first = group / LOOKUP_TILE * LOOKUP_TILE;
        const uint32_t some = groups - first < LOOKUP_TILE ? groups - first : LOOKUP_TILE;
        const uint8_t *tile = matrix->data + (size_t)first * matrix->rows;
        const uint8_t code = tile[(size_t)row * some + (group - first)];
        out[i] = (float)weight_of(code, i % LOOKUP_WEIGHTS) * scale;
    }
}
