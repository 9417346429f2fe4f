/* The truth: kernels in plain C, for any machine. Every other kernel must give the same bits. */
#include <string.h>

#include "kernels.h"

#define ISA(name) name##_scalar
#define VECTOR_FLOATS 4
#include "floats.inc"

/* The codes of a quad's row r (of the group) at column c. `vector` is the group's quad. */
static int code_trit2(const uint8_t *quad, uint32_t row, uint32_t c)
{
    return quad[row % 16 * 4 + c] >> (row / 16 * 2) & 3;
}

static int code_trit5(const uint8_t *quad, uint32_t row, uint32_t c)
{
    /* Multiplying by 3 lifts one digit after the other over the byte's top. */
    uint32_t q = quad[row % 16 * 4 + c];
    for (uint32_t digit = 0; digit < row / 16; digit++)
        q = q * 3 & 255;
    return (int)(q * 3 >> 8);
}

static int code_int8(const uint8_t *quad, uint32_t row, uint32_t c)
{
    return quad[row * 4 + c];
}

static int code_int6(const uint8_t *quad, uint32_t row, uint32_t c)
{
    uint32_t block = row / 16, at = row % 16 * 4 + c;
    int low = quad[block / 2 * 64 + at] >> (block % 2 * 4) & 15;
    int high = quad[128 + at] >> (block * 2) & 3;
    return low | high << 4;
}

static int code_int4(const uint8_t *quad, uint32_t row, uint32_t c)
{
    return quad[row % 16 * 4 + c] >> (row / 16 * 4) & 15;
}

/* The dot for one layout; `code` is known at compile time and disappears into the loop. */
static inline void dot(enum layout layout, int (*code)(const uint8_t *, uint32_t, uint32_t), const uint8_t *data,
                       uint32_t groups, size_t group_bytes, uint32_t quads, const int8_t *x, size_t stride,
                       const int32_t *sums, uint32_t n, int32_t *out)
{
    const struct layout_facts *facts = &layout_facts[layout];
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t row = 0; row < groups * facts->group_rows; row++) {
            const uint8_t *group = data + row / facts->group_rows * group_bytes;
            int32_t sum = 0;
            for (uint32_t quad = 0; quad < quads; quad++)
                for (uint32_t c = 0; c < 4; c++)
                    sum += code(group + (size_t)quad * facts->quad_bytes, row % facts->group_rows, c) *
                           x[i * stride + quad * 4 + c];
            out[(size_t)i * groups * facts->group_rows + row] = sum - facts->zero * sums[i];
        }
    }
}

#define DOT(name, layout)                                                                                            \
    static void dot_##name(const struct kernels *kernels, const uint8_t *data, uint32_t groups, size_t group_bytes,  \
                           uint32_t quads, const int8_t *x, size_t stride, const int32_t *sums, uint32_t n,          \
                           int32_t *out)                                                                             \
    {                                                                                                                \
        (void)kernels;                                                                                               \
        dot(layout, code_##name, data, groups, group_bytes, quads, x, stride, sums, n, out);                         \
    }
DOT(trit2, LAYOUT_TRIT2)
DOT(trit5, LAYOUT_TRIT5)
DOT(int8, LAYOUT_INT8)
DOT(int6, LAYOUT_INT6)
DOT(int4, LAYOUT_INT4)

const struct kernels kernels_scalar = {
    .name = "scalar",
    .rows = 6,
    .dot = {dot_trit2, dot_trit5, dot_int8, dot_int6, dot_int4},
    FLOAT_KERNELS,
};
