/* The kernels one by one, for tests, measurements and those who make files. */
#include <string.h>

#include "base/error.h"
#include "base/limits.h"
#include "kernels/kernels.h"

uint64_t ternary_memory_read(const uint8_t *bytes, size_t nbytes)
{
    typedef uint64_t vector __attribute__((vector_size(64)));
    const size_t quarter = nbytes / 4;
    vector sums[4] = {{0}}, sum;
    for (size_t i = 0; i < quarter; i += sizeof sum) {
        for (int stream = 0; stream < 4; stream++) {
            vector v;
            memcpy(&v, bytes + (size_t)stream * quarter + i, sizeof v);
            sums[stream] ^= v;
        }
    }
    sum = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    for (int lane = 1; lane < 8; lane++)
        sum[0] ^= sum[lane];
    return sum[0];
}

ternary_status ternary_turn(float *x, uint32_t rows, uint32_t width, uint32_t block, const float *signs, uint32_t back,
                            ternary_error *error)
{
    struct kernels kernels;
    if (block < ROTATION_LEAST || block > ROTATION_LIMIT || (block & (block - 1)) != 0 || width % block != 0)
        return ternary_fail(error, TERNARY_REFUSED, "a width of %u is no blocks of %u, a power of two from %u to %u", width,
                            block, ROTATION_LEAST, ROTATION_LIMIT);
    kernels_named(NULL, &kernels);
    for (uint32_t row = 0; row < rows; row++, x += width)
        (back ? kernels.turn_back : kernels.turn)(x, signs, width, block);
    return TERNARY_OK;
}

const char *ternary_kernels_name(uint32_t index)
{
    return kernels_name(index);
}

ternary_status ternary_kernels_dot(const char *name, const char *layout_name, const uint8_t *data, uint32_t groups,
                                   uint32_t quads, const int8_t *x, uint32_t n, int32_t *out, ternary_error *error)
{
    struct kernels kernels;
    const enum layout layout = layout_named(layout_name);
    if (!kernels_named(name, &kernels) || layout == LAYOUTS)
        return ternary_fail(error, TERNARY_REFUSED, "no kernels %.32s or no layout %.32s here", name, layout_name);
    const struct layout_facts *facts = &layout_facts[layout];
    const size_t group_bytes = (size_t)quads * facts->quad_bytes;
    const size_t stride = (size_t)quads * 4, width = (size_t)groups * facts->group_rows;
    for (uint32_t row = 0; row < n; row += kernels.rows) {
        const uint32_t count = n - row < kernels.rows ? n - row : kernels.rows;
        int32_t sums[DOT_ROWS_LIMIT] = {0}, dots[DOT_ROWS_LIMIT * DOT_GROUPS * LARGEST_GROUP_ROWS];
        for (uint32_t i = 0; i < count; i++)
            for (size_t c = 0; c < stride; c++)
                sums[i] += x[(row + i) * stride + c];
        for (uint32_t group = 0; group < groups; group += DOT_GROUPS) {
            const uint32_t some = groups - group < DOT_GROUPS ? groups - group : DOT_GROUPS;
            const uint32_t some_rows = some * facts->group_rows;
            kernels.dot[layout](&kernels, data + group * group_bytes, some, group_bytes, quads, x + row * stride,
                                stride, sums, count, dots);
            for (uint32_t i = 0; i < count; i++)
                memcpy(out + (row + i) * width + (size_t)group * facts->group_rows, dots + (size_t)i * some_rows,
                       some_rows * sizeof *out);
        }
    }
    return TERNARY_OK;
}
