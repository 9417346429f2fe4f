/* Kernels for AVX-512 with VNNI (Ice Lake, Zen 4 and later).
 *
 * The fields of a byte are never unpacked. With v = a + 4b + 16c + 64d a dot with each of v & 3, v & 15, v & 63 and v
 * gives A, A + 4B, A + 4B + 16C, ...; the four sums are told apart by subtraction, once for each row. In base 3 a byte
 * q stands for digits t0..t4: with q_0 = q and q_(i+1) = 3 q_i mod 256 each digit is t_i = (3 q_i - q_(i+1)) / 256,
 * so a dot with each q_i is enough. All sums are exact modulo 2^32, and the results fit.
 */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#include <immintrin.h>
#include <stdbool.h>
#include <string.h>

#include "kernels.h"

#define ISA(name) name##_avx512vnni
#include "wholes.inc"

#include "digits.h"

INLINE __m512i quad_of(const int8_t *x)
{
    int32_t four;
    memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}

INLINE __m512i low_bits(__m512i v, int mask)
{
    return _mm512_and_si512(v, _mm512_set1_epi8((char)mask));
}

INLINE __m512i ahead(size_t prefetch_bytes, const uint8_t *p)
{
    _mm_prefetch((const char *)p + prefetch_bytes, _MM_HINT_T0);
    return _mm512_loadu_si512(p);
}

INLINE __m512i thrice(__m512i v)
{
    return _mm512_add_epi8(v, _mm512_add_epi8(v, v));
}

INLINE __m512i thrice_words(__m512i v)
{
    return _mm512_add_epi32(v, _mm512_add_epi32(v, v));
}

/* In assembly, because GCC 12 copies every accumulator of the intrinsic around the loop. */
INLINE __m512i DOT(__m512i sum, __m512i codes, __m512i x)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
    return sum;
}

#define UNROLLED _Pragma("GCC unroll 8")

/* Four bit fields: from nested sums to those of the fields, less the zero's share; 16 rows each. */
INLINE void put_fields(const __m512i nested[4], __m512i zero, int32_t *out)
{
    _mm512_storeu_si512(out, _mm512_sub_epi32(nested[0], zero));
    _mm512_storeu_si512(out + 16, _mm512_sub_epi32(_mm512_srai_epi32(_mm512_sub_epi32(nested[1], nested[0]), 2), zero));
    _mm512_storeu_si512(out + 32, _mm512_sub_epi32(_mm512_srai_epi32(_mm512_sub_epi32(nested[2], nested[1]), 4), zero));
    _mm512_storeu_si512(out + 48, _mm512_sub_epi32(_mm512_srai_epi32(_mm512_sub_epi32(nested[3], nested[2]), 6), zero));
}

/* `groups` groups by `n` activation rows; groups * n <= 6 sets of four sums stay in registers. */
INLINE void trit2_tile(size_t prefetch_bytes, const uint8_t *data, const uint32_t groups, size_t group_bytes,
                       uint32_t quads, const int8_t *x, size_t stride, const int32_t *sums, const uint32_t n,
                       int32_t *out, size_t out_stride)
{
    __m512i s[6][4];
    UNROLLED for (uint32_t i = 0; i < groups * n; i++)
        s[i][0] = s[i][1] = s[i][2] = s[i][3] = _mm512_setzero_si512();
    for (uint32_t q = 0; q < quads; q++) {
        UNROLLED for (uint32_t g = 0; g < groups; g++) {
            __m512i v = ahead(prefetch_bytes, data + g * group_bytes + (size_t)q * 64);
            __m512i v0 = low_bits(v, 3), v1 = low_bits(v, 15), v2 = low_bits(v, 63);
            UNROLLED for (uint32_t i = 0; i < n; i++) {
                __m512i four = quad_of(x + i * stride + q * 4);
                __m512i *t = s[g * n + i];
                t[0] = DOT(t[0], v0, four);
                t[1] = DOT(t[1], v1, four);
                t[2] = DOT(t[2], v2, four);
                t[3] = DOT(t[3], v, four);
            }
        }
    }
    UNROLLED for (uint32_t g = 0; g < groups; g++)
        UNROLLED for (uint32_t i = 0; i < n; i++)
            put_fields(s[g * n + i], _mm512_set1_epi32(sums[i]), out + i * out_stride + g * 64);
}

INLINE void add_fields(__m512i s[4], size_t prefetch_bytes, const uint8_t *p, const int8_t *x)
{
    const __m512i v = ahead(prefetch_bytes, p), four = quad_of(x);
    s[0] = DOT(s[0], low_bits(v, 3), four);
    s[1] = DOT(s[1], low_bits(v, 15), four);
    s[2] = DOT(s[2], low_bits(v, 63), four);
    s[3] = DOT(s[3], v, four);
}

/* One group and one activation row. Even and odd quads have sums of their own: with one set of four the next quad's dots
 * would wait for those of the one before. */
static void trit2_stream(size_t prefetch_bytes, const uint8_t *data, uint32_t quads, const int8_t *x, int32_t sum,
                         int32_t *out)
{
    __m512i s[2][4];
    UNROLLED for (uint32_t field = 0; field < 4; field++)
        s[0][field] = s[1][field] = _mm512_setzero_si512();
    for (uint32_t q = 0; q + 1 < quads; q += 2) {
        add_fields(s[0], prefetch_bytes, data + (size_t)q * 64, x + q * 4);
        add_fields(s[1], prefetch_bytes, data + (size_t)q * 64 + 64, x + q * 4 + 4);
    }
    if (quads % 2)
        add_fields(s[0], prefetch_bytes, data + (size_t)(quads - 1) * 64, x + (quads - 1) * 4);
    UNROLLED for (uint32_t field = 0; field < 4; field++)
        s[0][field] = _mm512_add_epi32(s[0][field], s[1][field]);
    put_fields(s[0], _mm512_set1_epi32(sum), out);
}

INLINE void trit5_tile(size_t prefetch_bytes, const uint8_t *data, const uint32_t groups, size_t group_bytes,
                       uint32_t quads, const int8_t *x, size_t stride, const int32_t *sums, const uint32_t n,
                       int32_t *out, size_t out_stride)
{
    __m512i s[4][6];
    UNROLLED for (uint32_t i = 0; i < groups * n; i++)
        s[i][0] = s[i][1] = s[i][2] = s[i][3] = s[i][4] = s[i][5] = _mm512_setzero_si512();
    for (uint32_t q = 0; q < quads; q++) {
        UNROLLED for (uint32_t g = 0; g < groups; g++) {
            __m512i v = ahead(prefetch_bytes, data + g * group_bytes + (size_t)q * 64);
            UNROLLED for (uint32_t digit = 0; digit < 6; digit++) {
                UNROLLED for (uint32_t i = 0; i < n; i++)
                    s[g * n + i][digit] = DOT(s[g * n + i][digit], v, quad_of(x + i * stride + q * 4));
                v = thrice(v);
            }
        }
    }
    UNROLLED for (uint32_t g = 0; g < groups; g++)
        UNROLLED for (uint32_t i = 0; i < n; i++)
            UNROLLED for (uint32_t digit = 0; digit < 5; digit++) {
                __m512i t = _mm512_sub_epi32(thrice_words(s[g * n + i][digit]), s[g * n + i][digit + 1]);
                _mm512_storeu_si512(out + i * out_stride + g * 80 + digit * 16,
                                    _mm512_sub_epi32(_mm512_srai_epi32(t, 8), _mm512_set1_epi32(sums[i])));
            }
}

INLINE void int8_tile(size_t prefetch_bytes, const uint8_t *data, const uint32_t groups, size_t group_bytes,
                      uint32_t quads, const int8_t *x, size_t stride, const int32_t *sums, const uint32_t n,
                      int32_t *out, size_t out_stride)
{
    __m512i s[4][6];
    UNROLLED for (uint32_t g = 0; g < groups; g++)
        UNROLLED for (uint32_t i = 0; i < n; i++)
            s[g][i] = _mm512_setzero_si512();
    for (uint32_t q = 0; q < quads; q++) {
        UNROLLED for (uint32_t g = 0; g < groups; g++) {
            __m512i v = ahead(prefetch_bytes, data + g * group_bytes + (size_t)q * 64);
            UNROLLED for (uint32_t i = 0; i < n; i++)
                s[g][i] = DOT(s[g][i], v, quad_of(x + i * stride + q * 4));
        }
    }
    UNROLLED for (uint32_t g = 0; g < groups; g++)
        UNROLLED for (uint32_t i = 0; i < n; i++)
            _mm512_storeu_si512(out + i * out_stride + g * 16,
                                _mm512_sub_epi32(s[g][i], _mm512_set1_epi32(128 * sums[i])));
}

/* Low nibbles of blocks 0 | 1 and 2 | 3 in two vectors, the high two bits of all four in a third. */
INLINE void int6_tile(size_t prefetch_bytes, const uint8_t *data, const uint32_t groups, size_t group_bytes,
                      uint32_t quads, const int8_t *x, size_t stride, const int32_t *sums, const uint32_t n,
                      int32_t *out, size_t out_stride)
{
    __m512i low[3][4], high[3][4];
    (void)groups, (void)group_bytes; /* always one: a group is three streams already */
    UNROLLED for (uint32_t i = 0; i < n; i++)
        UNROLLED for (uint32_t block = 0; block < 4; block++)
            low[i][block] = high[i][block] = _mm512_setzero_si512();
    for (uint32_t q = 0; q < quads; q++) {
        const uint8_t *p = data + (size_t)q * 192;
        __m512i a = ahead(prefetch_bytes, p), b = ahead(prefetch_bytes, p + 64), h = ahead(prefetch_bytes, p + 128);
        UNROLLED for (uint32_t i = 0; i < n; i++) {
            __m512i four = quad_of(x + i * stride + q * 4);
            low[i][0] = DOT(low[i][0], low_bits(a, 15), four);
            low[i][1] = DOT(low[i][1], a, four);
            low[i][2] = DOT(low[i][2], low_bits(b, 15), four);
            low[i][3] = DOT(low[i][3], b, four);
            high[i][0] = DOT(high[i][0], low_bits(h, 3), four);
            high[i][1] = DOT(high[i][1], low_bits(h, 15), four);
            high[i][2] = DOT(high[i][2], low_bits(h, 63), four);
            high[i][3] = DOT(high[i][3], h, four);
        }
    }
    UNROLLED for (uint32_t i = 0; i < n; i++) {
        int32_t top[64];
        put_fields(high[i], _mm512_set1_epi32(2 * sums[i]), top);
        UNROLLED for (uint32_t block = 0; block < 4; block++) {
            __m512i l = low[i][block];
            if (block % 2)
                l = _mm512_srai_epi32(_mm512_sub_epi32(l, low[i][block - 1]), 4);
            __m512i t = _mm512_slli_epi32(_mm512_loadu_si512(top + block * 16), 4);
            _mm512_storeu_si512(out + i * out_stride + block * 16, _mm512_add_epi32(l, t));
        }
    }
}

INLINE void int4_tile(size_t prefetch_bytes, const uint8_t *data, const uint32_t groups, size_t group_bytes,
                      uint32_t quads, const int8_t *x, size_t stride, const int32_t *sums, const uint32_t n,
                      int32_t *out, size_t out_stride)
{
    __m512i s[12][2];
    UNROLLED for (uint32_t i = 0; i < groups * n; i++)
        s[i][0] = s[i][1] = _mm512_setzero_si512();
    for (uint32_t q = 0; q < quads; q++) {
        UNROLLED for (uint32_t g = 0; g < groups; g++) {
            __m512i v = ahead(prefetch_bytes, data + g * group_bytes + (size_t)q * 64);
            UNROLLED for (uint32_t i = 0; i < n; i++) {
                __m512i four = quad_of(x + i * stride + q * 4);
                s[g * n + i][0] = DOT(s[g * n + i][0], low_bits(v, 15), four);
                s[g * n + i][1] = DOT(s[g * n + i][1], v, four);
            }
        }
    }
    UNROLLED for (uint32_t g = 0; g < groups; g++)
        UNROLLED for (uint32_t i = 0; i < n; i++) {
            __m512i zero = _mm512_set1_epi32(8 * sums[i]), l = s[g * n + i][0];
            __m512i h = _mm512_srai_epi32(_mm512_sub_epi32(s[g * n + i][1], l), 4);
            _mm512_storeu_si512(out + i * out_stride + g * 32, _mm512_sub_epi32(l, zero));
            _mm512_storeu_si512(out + i * out_stride + g * 32 + 16, _mm512_sub_epi32(h, zero));
        }
}

/* A case of the rows' number: as many groups at once as registers hold, the rest, or all, one by one. */
#define TILES(name, group_rows, n, width)                                                                            \
    case n:                                                                                                          \
        for (; !kernels->is_one_stream && g + width <= groups; g += width)                                           \
            name##_tile(prefetch_bytes, data + g * group_bytes, width, group_bytes, quads, x, stride, sums, n,       \
                        out + g * group_rows, out_stride);                                                           \
        for (; g < groups; g++)                                                                                      \
            name##_tile(prefetch_bytes, data + g * group_bytes, 1, group_bytes, quads, x, stride, sums, n,           \
                        out + g * group_rows, out_stride);                                                           \
        break;

#define DOT_FUNCTION(name, group_rows, most_rows, CASES)                                                             \
    static void dot_##name(const struct kernels *kernels, const uint8_t *data, uint32_t groups, size_t group_bytes,  \
                           uint32_t quads, const int8_t *x, size_t stride, const int32_t *sums, uint32_t n,          \
                           int32_t *out)                                                                             \
    {                                                                                                                \
        const size_t out_stride = (size_t)groups * group_rows;                                                       \
        const size_t prefetch_bytes = kernels->prefetch_bytes;                                                       \
        while (n > 0) {                                                                                              \
            const uint32_t rows = n <= most_rows ? n : n < 2 * most_rows ? (n + 1) / 2 : most_rows;                  \
            uint32_t g = 0;                                                                                          \
            switch (rows) {                                                                                          \
                CASES                                                                                                \
            }                                                                                                        \
            x += rows * stride, sums += rows, out += rows * out_stride, n -= rows;                                   \
        }                                                                                                            \
    }

#define TRIT2(n, width) TILES(trit2, 64, n, width)
DOT_FUNCTION(trit2_streams, 64, 6, TRIT2(1, 4) TRIT2(2, 2) TRIT2(3, 2) TRIT2(4, 1) TRIT2(5, 1) TRIT2(6, 1))
#define TRIT5(n, width) TILES(trit5, 80, n, width)
DOT_FUNCTION(trit5_few, 80, 4, TRIT5(1, 4) TRIT5(2, 2) TRIT5(3, 1) TRIT5(4, 1))
#define INT8(n, width) TILES(int8, 16, n, width)
DOT_FUNCTION(int8, 16, 6, INT8(1, 4) INT8(2, 4) INT8(3, 4) INT8(4, 4) INT8(5, 4) INT8(6, 4))
#define INT6(n, width) TILES(int6, 64, n, width)
DOT_FUNCTION(int6, 64, 3, INT6(1, 1) INT6(2, 1) INT6(3, 1))
#define INT4(n, width) TILES(int4, 32, n, width)
DOT_FUNCTION(int4, 32, 6, INT4(1, 4) INT4(2, 4) INT4(3, 4) INT4(4, 2) INT4(5, 2) INT4(6, 2))

/* One group and one activation row; apart, because the compiler then keeps the loop as it stands. */
static __attribute__((noinline)) void trit5_stream(size_t prefetch_bytes, const uint8_t *data, uint32_t quads,
                                                   const int8_t *x, const int32_t *sum, int32_t *out)
{
    trit5_tile(prefetch_bytes, data, 1, 0, quads, x, 0, sum, 1, out, 0);
}

/* Sums of a strip's digits with n <= 4 activation rows, added to those of the strips before. */
INLINE void digits_tile(const uint8_t *strip, uint32_t quads, bool is_first, const int8_t *x, size_t stride,
                        const int32_t *sums, const uint32_t n, int32_t *out, size_t out_stride)
{
    __m512i s[4][DIGITS];
    UNROLLED for (uint32_t i = 0; i < n; i++)
        UNROLLED for (uint32_t digit = 0; digit < DIGITS; digit++)
            s[i][digit] = is_first ? _mm512_set1_epi32(-sums[i])
                                   : _mm512_loadu_si512(out + i * out_stride + digit * 16);
    for (uint32_t q = 0; q < quads; q++)
        UNROLLED for (uint32_t i = 0; i < n; i++) {
            const __m512i four = quad_of(x + i * stride + q * 4);
            UNROLLED for (uint32_t digit = 0; digit < DIGITS; digit++)
                s[i][digit] = DOT(s[i][digit], _mm512_load_si512(strip + (q * DIGITS + digit) * 64), four);
        }
    UNROLLED for (uint32_t i = 0; i < n; i++)
        UNROLLED for (uint32_t digit = 0; digit < DIGITS; digit++)
            _mm512_storeu_si512(out + i * out_stride + digit * 16, s[i][digit]);
}

static void dot_trit2(const struct kernels *kernels, const uint8_t *data, uint32_t groups, size_t group_bytes,
                      uint32_t quads, const int8_t *x, size_t stride, const int32_t *sums, uint32_t n,
                      int32_t *out)
{
    if (n > 1 || !kernels->is_one_stream) {
        dot_trit2_streams(kernels, data, groups, group_bytes, quads, x, stride, sums, n, out);
        return;
    }
    for (uint32_t g = 0; g < groups; g++)
        trit2_stream(kernels->prefetch_bytes, data + g * group_bytes, quads, x, sums[0], out + g * 64);
}

/* Quads whose digits, unpacked, stay in the first-level cache. */
#define STRIP_QUADS 64u
/* Activation rows from which on it pays to unpack digits: then a weight costs one dot and not 6 / 5, nor additions. */
#define UNPACK_ROWS 16u

static void dot_trit5(const struct kernels *kernels, const uint8_t *data, uint32_t groups, size_t group_bytes,
                      uint32_t quads, const int8_t *x, size_t stride, const int32_t *sums, uint32_t n,
                      int32_t *out)
{
    _Alignas(64) uint8_t strip[STRIP_QUADS * DIGITS * 64];
    const size_t out_stride = (size_t)groups * 80;
    if (n == 1 && kernels->is_one_stream) {
        for (uint32_t g = 0; g < groups; g++)
            trit5_stream(kernels->prefetch_bytes, data + g * group_bytes, quads, x, sums, out + g * 80);
        return;
    }
    if (n < UNPACK_ROWS) {
        dot_trit5_few(kernels, data, groups, group_bytes, quads, x, stride, sums, n, out);
        return;
    }
    for (uint32_t g = 0; g < groups; g++, data += group_bytes)
        for (uint32_t first = 0; first < quads; first += STRIP_QUADS) {
            const uint32_t some = quads - first < STRIP_QUADS ? quads - first : STRIP_QUADS;
            for (uint32_t q = 0; q < some; q++)
                unpack_digits(strip + q * DIGITS * 64, 64, _mm512_loadu_si512(data + (size_t)(first + q) * 64));
            for (uint32_t row = 0; row < n; row += 4) {
                const int8_t *rows = x + row * stride + first * 4;
                int32_t *to = out + row * out_stride + g * 80;
                if (n - row >= 4)
                    digits_tile(strip, some, first == 0, rows, stride, sums + row, 4, to, out_stride);
                else
                    for (uint32_t i = 0; i < n - row; i++)
                        digits_tile(strip, some, first == 0, rows + i * stride, stride, sums + row + i, 1,
                                    to + i * out_stride, out_stride);
            }
        }
}

const struct kernels kernels_avx512vnni = {
    .name = "avx512vnni",
    .rows = DOT_ROWS_LIMIT,
    .dot = {dot_trit2, dot_trit5, dot_int8, dot_int6, dot_int4},
    FLOAT_KERNELS,
};
#endif
