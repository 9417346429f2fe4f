/* Kernels for AVX2 with F16C (Haswell, Zen and later).
 *
 * There is no dot of bytes that sums to 32 bits: maddubs adds two products in 16 bits, which wrap unless the codes are
 * small. Ternary fields stay where they are in the byte (codes 0..2, or 0, 4, 8: at most 2032 for two products), and
 * sixteen such sums fit 16 bits (32,512) before they are widened. A 64-byte vector is two halves of 8 rows.
 */
#if defined(__x86_64__)
#pragma GCC target("avx2,f16c")
#include <immintrin.h>
#include <string.h>

#include "kernels.h"

#define ISA(name) name##_avx2
#include "halves.inc"

/* Quads whose 16-bit sums cannot wrap. */
#define NARROW_QUADS 16u
_Static_assert(NARROW_QUADS * 2 * 8 * DIGIT_LIMIT <= INT16_MAX, "sums of fields, codes up to 8, fit 16 bits");

/* a += pairs of 16-bit sums, widened. */
INLINE __m256i widened(__m256i a, __m256i narrow)
{
    return _mm256_add_epi32(a, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
}

INLINE void put(int32_t *out, __m256i sum, int shift, int32_t zero)
{
    sum = _mm256_sub_epi32(_mm256_sra_epi32(sum, _mm_cvtsi32_si128(shift)), _mm256_set1_epi32(zero));
    _mm256_storeu_si256((__m256i *)out, sum);
}

/* sum += the products' pairs. In assembly, because GCC 12 copies every accumulator of the intrinsic around the loop. */
INLINE __m256i add_pairs(__m256i sum, __m256i codes, __m256i x)
{
    __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(_mm256_maddubs_epi16(codes, x)));
    return sum;
}

/* `halves` halves from `first` on of a group's rows over at most NARROW_QUADS quads, for n rows of activations:
 * halves * n <= 2. */
INLINE void trit2_strip(size_t prefetch_bytes, const uint8_t *p, uint32_t quads, const int8_t *x, size_t stride,
                        const uint32_t n, __m256i (*sums)[2][4], const uint32_t first, const uint32_t halves)
{
    __m256i s[2][4];
    UNROLLED for (uint32_t at = 0; at < halves * n; at++)
        s[at][0] = s[at][1] = s[at][2] = s[at][3] = _mm256_setzero_si256();
    for (uint32_t q = 0; q < quads; q++) {
        if (first == 0)
            _mm_prefetch((const char *)p + q * 64 + prefetch_bytes, _MM_HINT_T0);
        UNROLLED for (uint32_t half = 0; half < halves; half++) {
            __m256i v = half_at(p + q * 64 + (first + half) * 32), w = _mm256_srli_epi16(v, 4);
            __m256i v0 = low_bits(v, 3), v1 = low_bits(v, 12), v2 = low_bits(w, 3), v3 = low_bits(w, 12);
            UNROLLED for (uint32_t i = 0; i < n; i++) {
                __m256i four = quad_of(x + i * stride + q * 4), *t = s[half * n + i];
                t[0] = add_pairs(t[0], v0, four);
                t[1] = add_pairs(t[1], v1, four);
                t[2] = add_pairs(t[2], v2, four);
                t[3] = add_pairs(t[3], v3, four);
            }
        }
    }
    UNROLLED for (uint32_t half = 0; half < halves; half++)
        UNROLLED for (uint32_t i = 0; i < n; i++)
            UNROLLED for (uint32_t field = 0; field < 4; field++)
                sums[i][first + half][field] = widened(sums[i][first + half][field], s[half * n + i][field]);
}

/* Not inlined: all sums of both halves then stay in registers. */
static __attribute__((noinline)) void trit2_whole_strip(size_t prefetch_bytes, const uint8_t *p, uint32_t quads,
                                                        const int8_t *x, __m256i (*sums)[2][4])
{
    trit2_strip(prefetch_bytes, p, quads, x, 0, 1, sums, 0, 2);
}

INLINE void trit2_group(size_t prefetch_bytes, const uint8_t *data, uint32_t quads, const int8_t *x, size_t stride,
                        const int32_t *sums, const uint32_t n, int32_t *out, size_t out_stride)
{
    __m256i wide[2][2][4];
    memset(wide, 0, sizeof wide);
    for (uint32_t q = 0; q < quads; q += NARROW_QUADS) {
        uint32_t strip = quads - q < NARROW_QUADS ? quads - q : NARROW_QUADS;
        const uint8_t *p = data + (size_t)q * 64;
        if (n == 1)
            trit2_whole_strip(prefetch_bytes, p, strip, x + q * 4, wide);
        else
            for (uint32_t half = 0; half < 2; half++)
                trit2_strip(prefetch_bytes, p, strip, x + q * 4, stride, n, wide, half, 1);
    }
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t half = 0; half < 2; half++)
            for (uint32_t field = 0; field < 4; field++)
                put(out + i * out_stride + field * 16 + half * 8, wide[i][half][field], field % 2 * 2, sums[i]);
}

/* Code 0, 1 or 2 of the highest digit of bytes whose top bit is flipped: two comparisons count the thirds. The flip
 * survives multiplication by 3, which lifts the next digit up: 3 (q + 128) = 3 q + 128 modulo 256. */
INLINE __m256i top_trit(__m256i flipped)
{
    __m256i one = _mm256_cmpgt_epi8(flipped, _mm256_set1_epi8(85 - 128));
    __m256i two = _mm256_cmpgt_epi8(flipped, _mm256_set1_epi8(170 - 128));
    return _mm256_abs_epi8(_mm256_add_epi8(one, two));
}

INLINE void trit5_strip(size_t prefetch_bytes, const uint8_t *p, uint32_t quads, const int8_t *x, size_t stride,
                        const uint32_t n, __m256i (*sums)[2][5], uint32_t half)
{
    __m256i s[2][5];
    UNROLLED for (uint32_t i = 0; i < n; i++)
        UNROLLED for (uint32_t digit = 0; digit < 5; digit++)
            s[i][digit] = _mm256_setzero_si256();
    for (uint32_t q = 0; q < quads; q++) {
        if (half == 0)
            _mm_prefetch((const char *)p + q * 64 + prefetch_bytes, _MM_HINT_T0);
        __m256i v = _mm256_xor_si256(half_at(p + q * 64), _mm256_set1_epi8((char)128));
        UNROLLED for (uint32_t digit = 0; digit < 5; digit++) {
            const __m256i trits = top_trit(v);
            UNROLLED for (uint32_t i = 0; i < n; i++)
                s[i][digit] = _mm256_add_epi16(
                    s[i][digit], _mm256_maddubs_epi16(trits, quad_of(x + i * stride + q * 4)));
            v = _mm256_add_epi8(v, _mm256_add_epi8(v, v));
        }
    }
    UNROLLED for (uint32_t i = 0; i < n; i++)
        UNROLLED for (uint32_t digit = 0; digit < 5; digit++)
            sums[i][half][digit] = widened(sums[i][half][digit], s[i][digit]);
}

INLINE void trit5_group(size_t prefetch_bytes, const uint8_t *data, uint32_t quads, const int8_t *x, size_t stride,
                        const int32_t *sums, const uint32_t n, int32_t *out, size_t out_stride)
{
    __m256i wide[2][2][5];
    memset(wide, 0, sizeof wide);
    for (uint32_t q = 0; q < quads; q += NARROW_QUADS) {
        uint32_t strip = quads - q < NARROW_QUADS ? quads - q : NARROW_QUADS;
        for (uint32_t half = 0; half < 2; half++)
            trit5_strip(prefetch_bytes, data + (size_t)q * 64 + half * 32, strip, x + q * 4, stride, n, wide, half);
    }
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t half = 0; half < 2; half++)
            for (uint32_t digit = 0; digit < 5; digit++)
                put(out + i * out_stride + digit * 16 + half * 8, wide[i][half][digit], 0, sums[i]);
}

/* Two activation rows at a time share the fields of the weights. */
#define PAIRS(name, group_rows)                                                                                      \
    static void dot_##name(const struct kernels *kernels, const uint8_t *data, uint32_t groups, size_t group_bytes,  \
                           uint32_t quads, const int8_t *x, size_t stride, const int32_t *sums, uint32_t n,          \
                           int32_t *out)                                                                             \
    {                                                                                                                \
        const size_t out_stride = (size_t)groups * group_rows, prefetch_bytes = kernels->prefetch_bytes;             \
        for (uint32_t g = 0; g < groups; g++, data += group_bytes, out += group_rows) {                              \
            uint32_t i = 0;                                                                                          \
            for (; i + 2 <= n; i += 2)                                                                               \
                name##_group(prefetch_bytes, data, quads, x + i * stride, stride, sums + i, 2, out + i * out_stride, \
                             out_stride);                                                                            \
            if (i < n)                                                                                               \
                name##_group(prefetch_bytes, data, quads, x + i * stride, stride, sums + i, 1, out + i * out_stride, \
                             out_stride);                                                                            \
        }                                                                                                            \
    }
PAIRS(trit2, 64)
PAIRS(trit5, 80)

/* Signed bytes by signed bytes: |w| with the sign moved to x; two products are at most 32,512. */
_Static_assert(2 * 128 * DIGIT_LIMIT <= INT16_MAX, "two products fit 16 bits");

INLINE __m256i add_signed(__m256i sum, __m256i w, __m256i x)
{
    return widened(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)));
}

static void dot_int8(const struct kernels *kernels, const uint8_t *data, uint32_t groups, size_t group_bytes,
                     uint32_t quads, const int8_t *x, size_t stride, const int32_t *sums, uint32_t n,
                     int32_t *out)
{
    (void)sums; /* the zero is taken off the codes, not off the sums */
    const __m256i flip = _mm256_set1_epi8((char)128);
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t g = 0; g < groups; g++, out += 16) {
            const uint8_t *p = data + g * group_bytes;
            __m256i a = _mm256_setzero_si256(), b = a;
            for (uint32_t q = 0; q < quads; q++) {
                __m256i four = quad_of(x + i * stride + q * 4);
                _mm_prefetch((const char *)p + q * 64 + kernels->prefetch_bytes, _MM_HINT_T0);
                a = add_signed(a, _mm256_xor_si256(half_at(p + q * 64), flip), four);
                b = add_signed(b, _mm256_xor_si256(half_at(p + q * 64 + 32), flip), four);
            }
            put(out, a, 0, 0);
            put(out + 8, b, 0, 0);
        }
    }
}

/* Codes of at most 6 bits: two products are at most 16,002. */
INLINE __m256i add_unsigned(__m256i sum, __m256i code, __m256i x)
{
    return widened(sum, _mm256_maddubs_epi16(code, x));
}

static void dot_int6(const struct kernels *kernels, const uint8_t *data, uint32_t groups, size_t group_bytes,
                     uint32_t quads, const int8_t *x, size_t stride, const int32_t *sums, uint32_t n,
                     int32_t *out)
{
    (void)kernels; /* nothing is asked for ahead */
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t g = 0; g < groups; g++, out += 64) {
            __m256i s[4][2];
            memset(s, 0, sizeof s);
            for (uint32_t q = 0; q < quads; q++) {
                const uint8_t *p = data + g * group_bytes + (size_t)q * 192;
                const __m256i four = quad_of(x + i * stride + q * 4);
                UNROLLED for (uint32_t half = 0; half < 2; half++) {
                    __m256i low = half_at(p + half * 32), next = half_at(p + 64 + half * 32);
                    __m256i high = half_at(p + 128 + half * 32);
                    __m256i codes[4] = {
                        _mm256_or_si256(low_bits(low, 15), low_bits(_mm256_slli_epi16(high, 4), 48)),
                        _mm256_or_si256(low_bits(_mm256_srli_epi16(low, 4), 15),
                                        low_bits(_mm256_slli_epi16(high, 2), 48)),
                        _mm256_or_si256(low_bits(next, 15), low_bits(high, 48)),
                        _mm256_or_si256(low_bits(_mm256_srli_epi16(next, 4), 15),
                                        low_bits(_mm256_srli_epi16(high, 2), 48)),
                    };
                    UNROLLED for (uint32_t block = 0; block < 4; block++)
                        s[block][half] = add_unsigned(s[block][half], codes[block], four);
                }
            }
            for (uint32_t block = 0; block < 4; block++)
                for (uint32_t half = 0; half < 2; half++)
                    put(out + block * 16 + half * 8, s[block][half], 0, 32 * sums[i]);
        }
    }
}

static void dot_int4(const struct kernels *kernels, const uint8_t *data, uint32_t groups, size_t group_bytes,
                     uint32_t quads, const int8_t *x, size_t stride, const int32_t *sums, uint32_t n,
                     int32_t *out)
{
    (void)kernels; /* nothing is asked for ahead */
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t g = 0; g < groups; g++, out += 32) {
            __m256i s[2][2];
            memset(s, 0, sizeof s);
            for (uint32_t q = 0; q < quads; q++) {
                const uint8_t *p = data + g * group_bytes + (size_t)q * 64;
                const __m256i four = quad_of(x + i * stride + q * 4);
                UNROLLED for (uint32_t half = 0; half < 2; half++) {
                    __m256i v = half_at(p + half * 32);
                    s[0][half] = add_unsigned(s[0][half], low_bits(v, 15), four);
                    s[1][half] = add_unsigned(s[1][half], low_bits(_mm256_srli_epi16(v, 4), 15), four);
                }
            }
            for (uint32_t block = 0; block < 2; block++)
                for (uint32_t half = 0; half < 2; half++)
                    put(out + block * 16 + half * 8, s[block][half], 0, 8 * sums[i]);
        }
    }
}

const struct kernels kernels_avx2 = {
    .name = "avx2",
    .rows = 6,
    .dot = {dot_trit2, dot_trit5, dot_int8, dot_int6, dot_int4},
    FLOAT_KERNELS,
};
#endif
