/* A packed matrix: codes in one of the layouts of native/FORMAT.md, and scales. */
#ifndef CORDEE_MATRIX_H
#define CORDEE_MATRIX_H

#include <stddef.h>
#include <stdint.h>

enum layout { LAYOUT_TRIT2, LAYOUT_TRIT5, LAYOUT_INT8, LAYOUT_INT6, LAYOUT_INT4, LAYOUTS };

/* Beside those: multiplied by look-up, with no groups or quads (pentium2/lookup.h). */
#define LAYOUT_PENTIUM2 ((enum layout)(LAYOUTS + 1))

/* Columns are padded so that kernels may take four quads at a time. */
#define COLUMN_PADDING 16u
#define BLOCK_ROWS 16u
#define LARGEST_GROUP_ROWS 80u

struct layout_facts {
    const char *name;
    uint32_t group_rows; /* a multiple of BLOCK_ROWS */
    uint32_t quad_bytes; /* bytes of a group's quad: group_rows x 4 weights */
    int32_t zero;        /* the code of weight 0 */
};

extern const struct layout_facts layout_facts[LAYOUTS];

/* The layout of that name, or LAYOUTS. */
enum layout layout_named(const char *name);

struct matrix {
    enum layout layout;
    uint32_t count; /* so many of this size lie one behind the other: those of all experts; else 1 */
    uint32_t rows, cols;
    uint32_t groups, quads;
    /* The matrix is the sum of so many planes of codes; each has its own quads, one plane behind the other in a group. */
    uint32_t planes;
    const uint8_t *data;    /* [count][groups][planes][quads][quad_bytes], borrowed from the file */
    const float *scales;    /* [count][rows / scale_rows], borrowed; NULL: they are of spans */
    uint32_t scale_rows;    /* rows that share a scale */
    /* A span is neighbouring columns that share a scale within each row; the last may be shorter. */
    const uint16_t *span_scales; /* [count][groups][planes][spans][group_rows], f16, borrowed; NULL: scales are of rows */
    uint32_t spans, span_quads;
};

static inline uint32_t quads_of(uint32_t cols)
{
    return (cols + COLUMN_PADDING - 1) / COLUMN_PADDING * (COLUMN_PADDING / 4);
}

/* From one group of rows to the next. */
static inline size_t group_bytes_of(const struct matrix *matrix)
{
    return (size_t)matrix->planes * matrix->quads * layout_facts[matrix->layout].quad_bytes;
}

/* Scales of spans, in one of the `count`. */
static inline size_t span_scales_of(const struct matrix *matrix)
{
    return (size_t)matrix->groups * matrix->planes * matrix->spans * layout_facts[matrix->layout].group_rows;
}

/* One of the `count`, by itself. */
struct matrix matrix_at(const struct matrix *all, uint32_t number);

static inline uint32_t spans_of(uint32_t cols, uint32_t scale_columns)
{
    return (cols + scale_columns - 1) / scale_columns;
}

static inline uint32_t groups_of(enum layout layout, uint32_t rows)
{
    return (rows + layout_facts[layout].group_rows - 1) / layout_facts[layout].group_rows;
}

#endif
