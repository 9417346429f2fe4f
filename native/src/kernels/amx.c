/* Kernels for AMX (Sapphire Rapids and later): dots of many activation rows in tiles, for prompts. What fills no 16
 * rows, and what is no layout of trits, is left to the dots of avx512vnni.c.
 *
 * A tile of weights is 16 quads as they lie in the file, once their fields are unpacked: row k is quad k, 16 rows of the
 * matrix by 4 columns. Activations are read in tiles of 16 rows by 64 columns. The sums of two tiles of each, by one
 * another, stay in four tiles over a slice of columns whose weights, unpacked, stay in the first-level cache.
 */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#include <immintrin.h>
#include <stdbool.h>
#include <string.h>

#include "kernels.h"

#define ISA(name) name##_amx
#include "wholes.inc"

#include "digits.h"
#include "tiles.h"

/* Rows that share a group's unpacked weights: so many that unpacking them is little beside multiplying. */
#define AMX_ROWS 128u
_Static_assert(AMX_ROWS <= DOT_ROWS_LIMIT && AMX_ROWS % TILE_ROWS == 0, "they are whole tiles, and a dot takes them");

#define SLICE_TILES 10u
#define FIELDS_LIMIT 5u

/* Unpacked weights of a slice: tiles of each field. */
struct panel {
    _Alignas(64) uint8_t tiles[FIELDS_LIMIT][SLICE_TILES][TILE_BYTES];
};

/* Activation rows: `columns` of each lie at `at`; behind them in whole tiles only what `last` holds, padded. */
struct activation_tiles {
    const int8_t *at;
    size_t stride;
    uint32_t whole; /* tiles of columns that are full */
    _Alignas(64) int8_t last[AMX_ROWS][TILE_ROW_BYTES];
};

/* One quad's weights, each field's to its tile's row. */
typedef void unpack_function(struct panel *panel, uint32_t tile, uint32_t row, __m512i v);

INLINE void unpack_trit2(struct panel *panel, uint32_t tile, uint32_t row, __m512i v)
{
    const __m512i three = _mm512_set1_epi8(3), one = _mm512_set1_epi8(1);
    for (uint32_t field = 0; field < 4; field++, v = _mm512_srli_epi16(v, 2))
        _mm512_store_si512(panel->tiles[field][tile] + row * 64, _mm512_sub_epi8(_mm512_and_si512(v, three), one));
}

INLINE void unpack_trit5(struct panel *panel, uint32_t tile, uint32_t row, __m512i v)
{
    const __m512i one = _mm512_set1_epi8(1);
    unpack_digits(panel->tiles[0][tile] + row * 64, sizeof panel->tiles[0], v);
    for (uint32_t digit = 0; digit < DIGITS; digit++) {
        uint8_t *at = panel->tiles[digit][tile] + row * 64;
        _mm512_store_si512(at, _mm512_sub_epi8(_mm512_load_si512(at), one));
    }
}

INLINE void unpack_slice(unpack_function *unpack, struct panel *panel, const uint32_t fields, const uint8_t *data,
                         uint32_t quads)
{
    uint32_t quad = 0;
    for (; quad < quads; quad++)
        unpack(panel, quad / TILE_ROWS, quad % TILE_ROWS, _mm512_loadu_si512(data + (size_t)quad * 64));
    for (; quad % TILE_ROWS != 0; quad++)
        for (uint32_t field = 0; field < fields; field++)
            memset(panel->tiles[field][quad / TILE_ROWS] + quad % TILE_ROWS * 64, 0, 64);
}

/* Sums of 16 or 32 activation rows from `row` on with one or two fields, over the slice's tiles. */
INLINE void multiply_slice(const struct activation_tiles *x, const struct panel *panel, uint32_t first, uint32_t tiles,
                           uint32_t row, const bool both_rows, uint32_t field, const bool both_fields, int32_t *out,
                           size_t out_stride)
{
    const size_t bytes = out_stride * sizeof *out, sixteen = TILE_ROWS * out_stride;
    if (first == 0) {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
    } else {
        TILE_LOAD(0, out, bytes);
        if (both_fields)
            TILE_LOAD(1, out + 16, bytes);
        if (both_rows)
            TILE_LOAD(2, out + sixteen, bytes);
        if (both_rows && both_fields)
            TILE_LOAD(3, out + sixteen + 16, bytes);
    }
    for (uint32_t tile = 0; tile < tiles; tile++) {
        const bool whole = first + tile < x->whole;
        const size_t stride = whole ? x->stride : TILE_ROW_BYTES;
        const int8_t *rows = whole ? x->at + row * stride + (size_t)(first + tile) * 64 : x->last[row];
        TILE_LOAD(4, rows, stride);
        TILE_LOAD(6, panel->tiles[field][tile], 64);
        TILE_DOT(0, 4, 6);
        if (both_fields) {
            TILE_LOAD(7, panel->tiles[field + 1][tile], 64);
            TILE_DOT(1, 4, 7);
        }
        if (both_rows) {
            TILE_LOAD(5, rows + TILE_ROWS * stride, stride);
            TILE_DOT(2, 5, 6);
            if (both_fields)
                TILE_DOT(3, 5, 7);
        }
    }
    TILE_STORE(0, out, bytes);
    if (both_fields)
        TILE_STORE(1, out + 16, bytes);
    if (both_rows)
        TILE_STORE(2, out + sixteen, bytes);
    if (both_rows && both_fields)
        TILE_STORE(3, out + sixteen + 16, bytes);
}

/* One group times n activation rows, a multiple of TILE_ROWS. */
INLINE void multiply_group(unpack_function *unpack, const uint32_t fields, const uint8_t *data, uint32_t quads,
                           const struct activation_tiles *x, uint32_t n, int32_t *out, size_t out_stride)
{
    struct panel panel;
    for (uint32_t first = 0; first * TILE_ROWS < quads; first += SLICE_TILES) {
        const uint32_t left = quads - first * TILE_ROWS;
        const uint32_t some = left < SLICE_TILES * TILE_ROWS ? left : SLICE_TILES * TILE_ROWS;
        const uint32_t tiles = (some + TILE_ROWS - 1) / TILE_ROWS;
        unpack_slice(unpack, &panel, fields, data + (size_t)first * TILE_BYTES, some);
        for (uint32_t row = 0; row < n; row += 2 * TILE_ROWS) {
            const bool both = row + 2 * TILE_ROWS <= n;
            for (uint32_t field = 0; field < fields; field += 2) {
                int32_t *to = out + row * out_stride + field * 16;
                const bool two = field + 2 <= fields;
                if (both && two)
                    multiply_slice(x, &panel, first, tiles, row, true, field, true, to, out_stride);
                else if (both)
                    multiply_slice(x, &panel, first, tiles, row, true, field, false, to, out_stride);
                else if (two)
                    multiply_slice(x, &panel, first, tiles, row, false, field, true, to, out_stride);
                else
                    multiply_slice(x, &panel, first, tiles, row, false, field, false, to, out_stride);
            }
        }
    }
}

INLINE void multiply(unpack_function *unpack, enum layout layout, const uint32_t fields, const struct kernels *kernels,
                     const uint8_t *data, uint32_t groups, size_t group_bytes, uint32_t quads, const int8_t *x,
                     size_t stride, const int32_t *sums, uint32_t n, int32_t *out)
{
    const uint32_t rows = n / TILE_ROWS * TILE_ROWS, group_rows = fields * 16;
    const size_t out_stride = (size_t)groups * group_rows;
    struct activation_tiles tiles = {.at = x, .stride = stride, .whole = quads / TILE_ROWS};
    const size_t columns = (size_t)tiles.whole * TILE_ROW_BYTES, rest = (size_t)quads * 4 - columns;
    if (rows > 0) {
        const struct tile_configuration configuration = whole_tiles();
        for (uint32_t row = 0; rest > 0 && row < rows; row++) {
            memset(tiles.last[row], 0, sizeof tiles.last[row]);
            memcpy(tiles.last[row], x + row * stride + columns, rest);
        }
        tiles_configure(&configuration);
        for (uint32_t g = 0; g < groups; g++)
            multiply_group(unpack, fields, data + g * group_bytes, quads, &tiles, rows,
                           out + (size_t)g * group_rows, out_stride);
        tiles_release();
    }
    if (rows < n)
        kernels_avx512vnni.dot[layout](kernels, data, groups, group_bytes, quads, x + rows * stride, stride,
                                       sums + rows, n - rows, out + rows * out_stride);
}

static void dot_trit2(const struct kernels *kernels, const uint8_t *data, uint32_t groups, size_t group_bytes,
                      uint32_t quads, const int8_t *x, size_t stride, const int32_t *sums, uint32_t n,
                      int32_t *out)
{
    multiply(unpack_trit2, LAYOUT_TRIT2, 4, kernels, data, groups, group_bytes, quads, x, stride, sums, n, out);
}

static void dot_trit5(const struct kernels *kernels, const uint8_t *data, uint32_t groups, size_t group_bytes,
                      uint32_t quads, const int8_t *x, size_t stride, const int32_t *sums, uint32_t n,
                      int32_t *out)
{
    multiply(unpack_trit5, LAYOUT_TRIT5, 5, kernels, data, groups, group_bytes, quads, x, stride, sums, n, out);
}

#define DOT_OF_AVX512VNNI(name, layout)                                                                              \
    static void dot_##name(const struct kernels *kernels, const uint8_t *data, uint32_t groups, size_t group_bytes,  \
                           uint32_t quads, const int8_t *x, size_t stride, const int32_t *sums, uint32_t n,          \
                           int32_t *out)                                                                             \
    {                                                                                                                \
        kernels_avx512vnni.dot[layout](kernels, data, groups, group_bytes, quads, x, stride, sums, n, out);          \
    }
DOT_OF_AVX512VNNI(int8, LAYOUT_INT8)
DOT_OF_AVX512VNNI(int6, LAYOUT_INT6)
DOT_OF_AVX512VNNI(int4, LAYOUT_INT4)

const struct kernels kernels_amx = {
    .name = "amx",
    .rows = AMX_ROWS,
    .dot = {dot_trit2, dot_trit5, dot_int8, dot_int6, dot_int4},
    FLOAT_KERNELS,
};
#endif
