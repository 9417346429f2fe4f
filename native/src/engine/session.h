/* A session's memory: the cache, the buffers of one batch, the threads. */
#ifndef CORDEE_SESSION_H
#define CORDEE_SESSION_H

#include "cache.h"
#include "kernels/kernels.h"
#include "model.h"
#include "pentium2/attention.h"
#include "base/pool.h"

/* Sequences are numbers in a queue of people; more would be a mistake. */
#define SEQUENCES_LIMIT 4096u
#define BATCH_ROWS_LIMIT 8192u
#define CONTEXT_LIMIT (1u << 20)

/* Matrices of a layer without experts that are multiplied with the same rows, at most. */
#define PRODUCTS LOOKUP_MATRICES

/* One matrix, what it is multiplied with and where the results go. */
struct product {
    struct matrix matrix;
    float *out; /* [rows of `inputs`][rows of the matrix] */
    const struct activations *inputs;
    uint32_t first, rows; /* of `inputs` */
};

/* Of layers with experts. A visit is a row with one of its experts; visits are sorted by expert. */
struct mixture {
    float *scores;             /* [rows][experts] */
    uint32_t *chosen;          /* [rows][experts_used], the best first */
    float *shares;             /* [rows][share_stride]: of those in the row's sum */
    size_t share_stride;       /* experts_used, padded to LANES */
    uint32_t *places;          /* [rows][experts_used]: their visits */
    uint32_t *begins;          /* [experts + 1]: where an expert's visits begin */
    uint32_t *sources;         /* [visits]: their rows */
    struct activations inputs; /* of visits */
    float *results;            /* [visits][n_embd] */
};

struct ternary_session {
    const ternary_model *model;
    struct kernels kernels;
    const struct lookup_kernels *lookup; /* for files of the layout `pentium2` */
    ternary_config config;
    struct cache cache;
    ternary_watcher *watcher; /* told before a layer is computed, or NULL */
    void *watcher_argument;
    struct pool pool;
    uint32_t *ends; /* [sequences]: lengths after the batch being checked */

    /* Of one batch; every row belongs to one row of the batch. */
    float *hidden;                                      /* [rows][n_embd] */
    float *queries;                                     /* [rows][q_dim]; becomes attention's result */
    float *keys, *values;                               /* [rows][kv_dim] */
    float *gates, *ups;                                 /* [rows, or visits][n_ff] */
    float *added;                                       /* [rows][n_embd]: what a block adds to the hidden rows */
    float *cosines, *sines;                             /* [rows][rope_dims / 2] */
    uint32_t *marked;                                   /* rows whose logits are wanted */
    uint32_t *runs;                                     /* [rows + 1]: where rows that attend together begin */
    struct activations inputs;                          /* of the matrix that comes next */
    struct product *products;                           /* that are multiplied next */
    struct mixture mixture;
    /* Of each thread. */
    int32_t *dots;                                      /* [threads][dots_elements] */
    float *scratch;                                     /* [threads][scratch_elements]: of attention */
    float *normal;                                      /* [threads][widest row] */
    int16_t *tables;                                    /* [threads][LOOKUP_TILE * LOOKUP_ENTRIES], for look-up */
    size_t scratch_elements, normal_elements;
};

/* Of one call of a dot. */
static inline size_t dots_elements(const struct kernels *kernels)
{
    return (size_t)kernels->rows * DOT_GROUPS * LARGEST_GROUP_ROWS;
}

#endif
