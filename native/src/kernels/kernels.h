/* What differs from machine to machine: the inner loops, chosen once at run time.
 *
 * Integer dots are exact, so kernels may sum in any order. Floating-point kernels are compiled from one source
 * (floats.inc) for each instruction set: the same operations in the same order, hence the same bits.
 */
#ifndef CORDEE_KERNELS_H
#define CORDEE_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/cache.h"
#include "engine/matrix.h"

/* Activation rows that any dot takes at most in one call. */
#define DOT_ROWS_LIMIT 128u
/* Groups that a dot takes at most in one call. */
#define DOT_GROUPS 4u
/* Queries that attend together over one head's keys and values. */
#define ATTENTION_QUERIES 8u

/* Activations of a batch as integers: `planes` signed digits in base 128, highest first, for each row. Each span of a row's
 * columns has a scale of its own; in front of matrices whose scales are of rows, a row is one span. */
struct activations {
    int8_t *digits; /* [rows * planes][stride]; zero behind the columns */
    int32_t *sums;  /* [spans][sums_stride]: of a span, those of [rows * planes] */
    float *scales;  /* [rows][spans]: what an integer stands for */
    size_t stride, sums_stride;
    uint32_t planes, spans;
    uint32_t span_columns; /* at least the columns of a row that is one span */
};

/* The dots of one row of activations with some groups of a matrix over one span. */
struct span_dots {
    const int32_t *dots; /* [planes][stride] */
    size_t stride;
    uint32_t planes, rows, group_rows;
    const uint16_t *scales; /* f16: of the first group [group_rows]; those of the next are scales_stride further */
    size_t scales_stride;
    float scale;   /* of the activations */
    bool is_first; /* nothing was summed yet */
};

/* Queries of `heads` heads that share a key/value head, in `rows` rows that follow one another in a sequence: rows *
 * heads is 1 to ATTENTION_QUERIES. The results take their place. */
struct attention {
    float *queries; /* row r's begin at r * row_stride: [heads][head_dim] */
    size_t row_stride;
    uint32_t rows, heads, head_dim;
    uint32_t positions; /* of the cache that the first row has before it, its own included; each further one has one more */
    uint32_t window;    /* that a row sees of them, the last so many; 0: all */
    struct cache_head cache;
    size_t value_stride;
    float *scratch; /* attention_scratch() floats */
};

/* Floats of scratch for any number of queries over so many positions. */
static inline size_t attention_scratch(uint32_t positions, uint32_t head_dim, size_t value_stride)
{
    return ATTENTION_QUERIES * (value_stride + head_dim + (positions + (size_t)LANES - 1) / LANES * LANES);
}

struct kernels;

/* out[i][row] = sum over columns of weight * x, exact; out is [n][groups * group_rows], x [n][stride] with 4 * quads
 * used, sums [n] those of x's rows, n <= DOT_ROWS_LIMIT, groups <= DOT_GROUPS, which begin group_bytes apart. x is at most
 * DIGIT_LIMIT in magnitude: then no kernel's narrow sums can wrap. `kernels` are those that the function is one of. */
typedef void dot_function(const struct kernels *kernels, const uint8_t *data, uint32_t groups, size_t group_bytes,
                          uint32_t quads, const int8_t *x, size_t stride, const int32_t *sums, uint32_t n,
                          int32_t *out);

struct kernels {
    const char *name;
    uint32_t rows; /* that a dot is best given in one call; as many as PLANES_LIMIT at least, DOT_ROWS_LIMIT at most */
    /* What suits the memory of this CPU (select.c). */
    size_t prefetch_bytes; /* how far ahead of a stream of weights to ask for them */
    bool is_one_stream;    /* to read group after group, not several at once */
    dot_function *dot[LAYOUTS];

    /* out[i] = x[i] / sqrt(mean(x^2) + epsilon) * weight[i]; out may be x. */
    void (*normalise)(float *out, const float *x, const float *weight, uint32_t n, float epsilon);
    /* Row `row` of activations from x[n]; zeroes the digits behind n. */
    void (*quantise)(const struct activations *to, uint32_t row, const float *x, uint32_t n);
    /* x[i] += y[i], and x[i] += y[i] * factor. */
    void (*add)(float *x, const float *y, uint32_t n);
    void (*add_scaled)(float *x, const float *y, float factor, uint32_t n);
    /* gate[i] = silu(gate[i]) * up[i], or relu(gate[i])^2 * up[i]. */
    void (*gate_silu)(float *gate, const float *up, uint32_t n);
    void (*gate_relu2)(float *gate, const float *up, uint32_t n);
    /* gate[i] at most `limit`, up[i] from -limit to limit. */
    void (*limit_gate)(float *gate, float *up, float limit, uint32_t n);
    /* out[row] = sum of x[i] * weights[row][i], for `count` rows [n]. */
    void (*multiply_floats)(float *out, const float *x, const float *weights, uint32_t n, uint32_t count);
    /* x[i] = e^x[i] / sum of all; there is room for the next multiple of LANES. */
    void (*softmax)(float *x, uint32_t n);
    /* out[i] = (integer of the digits' dots) * scale, for `planes` rows of dots [planes][stride]. */
    void (*rescale)(float *out, const int32_t *dots, size_t stride, uint32_t planes, uint32_t n, float scale);
    /* The same with out[i] = integer * (scales[i] * scale). */
    void (*rescale_each)(float *out, const int32_t *dots, size_t stride, uint32_t planes, uint32_t n,
                         const float *scales, float scale);
    /* out[row] += (integer of the digits' dots) * (the row's scale * the activations'), one span after the other. */
    void (*add_span)(float *out, const struct span_dots *span);
    /* Blocks of x, so many floats each (a power of two), times the normalised Walsh-Hadamard matrix: `turn` multiplies x
     * by the signs [n] before, `turn_back`, which undoes it, behind. n is a multiple of the block. */
    void (*turn)(float *x, const float *signs, uint32_t n, uint32_t block);
    void (*turn_back)(float *x, const float *signs, uint32_t n, uint32_t block);
    /* Rotate `heads` heads of x by angles with these cosines and sines [head_dim / 2]. */
    void (*rotate_halves)(float *x, uint32_t heads, uint32_t head_dim, const float *cosines, const float *sines);
    void (*rotate_pairs)(float *x, uint32_t heads, uint32_t head_dim, const float *cosines, const float *sines);
    void (*attend[CACHE_KINDS])(const struct attention *attention);
};

/* The name of the kernels at that place of the list of those this CPU runs, best first; NULL past the last. */
const char *kernels_name(uint32_t index);
/* The kernels of that name, for NULL the best, and what suits this CPU; false if it runs no such kernels. */
bool kernels_named(const char *name, struct kernels *kernels);

extern const struct kernels kernels_scalar;
#if defined(__x86_64__)
#define CORDEE_X86_KERNELS 1
extern const struct kernels kernels_avx2;
extern const struct kernels kernels_avxvnni;
extern const struct kernels kernels_avx512vnni;
extern const struct kernels kernels_amx;
#endif
#if defined(__aarch64__) && defined(__linux__)
#define CORDEE_ARM_KERNELS 1
extern const struct kernels kernels_neon;
#endif

#endif
