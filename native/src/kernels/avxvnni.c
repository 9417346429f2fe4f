/* Kernels for AVX-VNNI (Alder Lake, Zen 5 and later without AVX-512): the dots of avx512vnni.c in vectors of half the
 * width. A 64-byte vector is two halves of 8 rows. The floating-point kernels are compiled for AVX2.
 *
 * Tests build this file with the same instruction as AVX-512VL encodes it (CORDEE_EVEX_FOR_VEX), which more CPUs have.
 */
#if defined(__x86_64__)
#pragma GCC target("avx2,f16c")
#include <immintrin.h>
#include <string.h>

#include "kernels.h"

#define ISA(name) name##_avxvnni
#include "halves.inc"

#if CORDEE_EVEX_FOR_VEX
#define ENCODING "%{evex%} "
#else
#define ENCODING "%{vex%} "
#endif
#define SUMS_LIMIT 6u

/* In assembly, since GCC 12 has no intrinsic that forces the encoding. */
INLINE __m256i dot_bytes(__m256i sum, __m256i codes, __m256i x)
{
    __asm__(ENCODING "vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(x));
    return sum;
}

/* How a layout's bytes become the codes that are summed, and those sums the dots of its blocks: 8 rows of each block,
 * a block's 16 results apart, less the share of the codes' zero. */
typedef void codes_function(const uint8_t *half, __m256i codes[SUMS_LIMIT]);
typedef void put_function(const __m256i sums[SUMS_LIMIT], int32_t zero, int32_t *out);

INLINE void put(int32_t *out, __m256i sum, int32_t zero)
{
    _mm256_storeu_si256((__m256i *)out, _mm256_sub_epi32(sum, _mm256_set1_epi32(zero)));
}

INLINE void codes_trit2(const uint8_t *half, __m256i codes[SUMS_LIMIT])
{
    codes[3] = half_at(half);
    codes[0] = low_bits(codes[3], 3);
    codes[1] = low_bits(codes[3], 15);
    codes[2] = low_bits(codes[3], 63);
}

INLINE void put_trit2(const __m256i sums[SUMS_LIMIT], int32_t zero, int32_t *out)
{
    put(out, sums[0], zero);
    put(out + 16, _mm256_srai_epi32(_mm256_sub_epi32(sums[1], sums[0]), 2), zero);
    put(out + 32, _mm256_srai_epi32(_mm256_sub_epi32(sums[2], sums[1]), 4), zero);
    put(out + 48, _mm256_srai_epi32(_mm256_sub_epi32(sums[3], sums[2]), 6), zero);
}

INLINE void codes_trit5(const uint8_t *half, __m256i codes[SUMS_LIMIT])
{
    codes[0] = half_at(half);
    UNROLLED for (uint32_t digit = 0; digit < 5; digit++)
        codes[digit + 1] = _mm256_add_epi8(codes[digit], _mm256_add_epi8(codes[digit], codes[digit]));
}

INLINE void put_trit5(const __m256i sums[SUMS_LIMIT], int32_t zero, int32_t *out)
{
    UNROLLED for (uint32_t digit = 0; digit < 5; digit++) {
        __m256i thrice = _mm256_add_epi32(sums[digit], _mm256_add_epi32(sums[digit], sums[digit]));
        put(out + digit * 16, _mm256_srai_epi32(_mm256_sub_epi32(thrice, sums[digit + 1]), 8), zero);
    }
}

INLINE void codes_int8(const uint8_t *half, __m256i codes[SUMS_LIMIT])
{
    codes[0] = half_at(half);
}

INLINE void put_int8(const __m256i sums[SUMS_LIMIT], int32_t zero, int32_t *out)
{
    put(out, sums[0], zero);
}

INLINE void codes_int6(const uint8_t *half, __m256i codes[SUMS_LIMIT])
{
    __m256i low = half_at(half), next = half_at(half + 64), high = half_at(half + 128);
    codes[0] = _mm256_or_si256(low_bits(low, 15), low_bits(_mm256_slli_epi16(high, 4), 48));
    codes[1] = _mm256_or_si256(low_bits(_mm256_srli_epi16(low, 4), 15), low_bits(_mm256_slli_epi16(high, 2), 48));
    codes[2] = _mm256_or_si256(low_bits(next, 15), low_bits(high, 48));
    codes[3] = _mm256_or_si256(low_bits(_mm256_srli_epi16(next, 4), 15), low_bits(_mm256_srli_epi16(high, 2), 48));
}

INLINE void put_int6(const __m256i sums[SUMS_LIMIT], int32_t zero, int32_t *out)
{
    UNROLLED for (uint32_t block = 0; block < 4; block++)
        put(out + block * 16, sums[block], zero);
}

INLINE void codes_int4(const uint8_t *half, __m256i codes[SUMS_LIMIT])
{
    codes[0] = low_bits(half_at(half), 15);
    codes[1] = low_bits(_mm256_srli_epi16(half_at(half), 4), 15);
}

INLINE void put_int4(const __m256i sums[SUMS_LIMIT], int32_t zero, int32_t *out)
{
    put(out, sums[0], zero);
    put(out + 16, sums[1], zero);
}

/* `halves` halves from `first` on of a group's rows, times n activation rows: halves * n <= 2. */
INLINE void multiply_halves(codes_function *codes_of, put_function *put_sums, const uint32_t count,
                            const uint32_t quad_bytes, const uint32_t first, const uint32_t halves,
                            size_t prefetch_bytes, const uint8_t *data, size_t quads, const int8_t *x, size_t stride,
                            const int32_t *zeros, const uint32_t n, int32_t *out, size_t out_stride)
{
    __m256i sums[2][SUMS_LIMIT], codes[SUMS_LIMIT];
    UNROLLED for (uint32_t at = 0; at < halves * n; at++)
        UNROLLED for (uint32_t s = 0; s < count; s++)
            sums[at][s] = _mm256_setzero_si256();
    for (size_t q = 0; q < quads; q++) {
        const uint8_t *p = data + q * quad_bytes;
        if (first == 0)
            UNROLLED for (uint32_t line = 0; line < quad_bytes; line += 64)
                _mm_prefetch((const char *)p + line + prefetch_bytes, _MM_HINT_T0);
        UNROLLED for (uint32_t half = 0; half < halves; half++) {
            codes_of(p + (first + half) * 32, codes);
            UNROLLED for (uint32_t i = 0; i < n; i++)
                UNROLLED for (uint32_t s = 0; s < count; s++)
                    sums[half * n + i][s] = dot_bytes(sums[half * n + i][s], codes[s], quad_of(x + i * stride + q * 4));
        }
    }
    UNROLLED for (uint32_t half = 0; half < halves; half++)
        UNROLLED for (uint32_t i = 0; i < n; i++)
            put_sums(sums[half * n + i], zeros[i], out + i * out_stride + (first + half) * 8);
}

#define HALVES(name, count, quad_bytes, first, halves, n)                                                            \
    multiply_halves(codes_##name, put_##name, count, quad_bytes, first, halves, kernels->prefetch_bytes, data, quads,\
                    x + i * stride, stride, zeros, n, out + i * out_stride, out_stride)

#define DOT_FUNCTION(name, group_rows, quad_bytes, count, zero)                                                      \
    static void dot_##name(const struct kernels *kernels, const uint8_t *data, uint32_t groups, size_t group_bytes,  \
                           uint32_t quads, const int8_t *x, size_t stride, const int32_t *sums, uint32_t n,          \
                           int32_t *out)                                                                             \
    {                                                                                                                \
        const size_t out_stride = (size_t)groups * group_rows;                                                       \
        for (uint32_t g = 0; g < groups; g++, data += group_bytes, out += group_rows) {                              \
            uint32_t i = 0;                                                                                          \
            for (; i + 2 <= n; i += 2) {                                                                             \
                const int32_t zeros[2] = {zero * sums[i], zero * sums[i + 1]};                                       \
                HALVES(name, count, quad_bytes, 0, 1, 2);                                                            \
                HALVES(name, count, quad_bytes, 1, 1, 2);                                                            \
            }                                                                                                        \
            if (i < n) {                                                                                             \
                const int32_t zeros[1] = {zero * sums[i]};                                                           \
                HALVES(name, count, quad_bytes, 0, 2, 1);                                                            \
            }                                                                                                        \
        }                                                                                                            \
    }
DOT_FUNCTION(trit2, 64, 64, 4, 1)
DOT_FUNCTION(trit5, 80, 64, 6, 1)
DOT_FUNCTION(int8, 16, 64, 1, 128)
DOT_FUNCTION(int6, 64, 192, 4, 32)
DOT_FUNCTION(int4, 32, 64, 2, 8)

const struct kernels kernels_avxvnni = {
    .name = "avxvnni",
    .rows = 6,
    .dot = {dot_trit2, dot_trit5, dot_int8, dot_int6, dot_int4},
    FLOAT_KERNELS,
};
#endif
