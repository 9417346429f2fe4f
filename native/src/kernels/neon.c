/* Kernels for 64-bit ARM with the dot product of bytes (ARMv8.2: Cortex-A55, A75 and later).
 *
 * vdotq_laneq_s32 multiplies four rows of a quad by four activations, which are a lane of sixteen. It is signed by
 * signed, so the fields of a byte are unpacked first. A 64-byte vector is four parts of four rows.
 */
#if defined(__aarch64__)
#pragma GCC target("arch=armv8.2-a+dotprod")
#include <arm_neon.h>
#include <string.h>

#include "kernels.h"

static inline __attribute__((always_inline)) float32x4_t four_bytes(const int8_t *p)
{
    int32_t four;
    memcpy(&four, p, 4);
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}

#define ISA(name) name##_neon
#define VECTOR_FLOATS 4
#define WIDEN_HALVES(p) ((ISA(vec))vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))))
#define WIDEN_BYTES(p) ((ISA(vec))four_bytes(p))
#include "floats.inc"

#define UNROLLED _Pragma("GCC unroll 8")
/* Activation rows that share unpacked fields. */
#define SHARED_ROWS 4u
#define FIELDS_LIMIT 5u

/* What each byte of a part stands for, field by field: weights, or codes whose zero is taken off the sums. `quad` is the
 * quad's first byte behind the parts before. */
typedef void unpack_function(const uint8_t *quad, int8x16_t fields[FIELDS_LIMIT]);

INLINE void unpack_trit2(const uint8_t *quad, int8x16_t fields[FIELDS_LIMIT])
{
    const uint8x16_t v = vld1q_u8(quad), three = vdupq_n_u8(3);
    fields[0] = vreinterpretq_s8_u8(vandq_u8(v, three));
    fields[1] = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(v, 2), three));
    fields[2] = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(v, 4), three));
    fields[3] = vreinterpretq_s8_u8(vshrq_n_u8(v, 6));
}

/* The highest digit is 0 up to 85 and 2 from 171 on: two comparisons give -1, 0 or 1. Times 3 lifts the next one up. */
INLINE void unpack_trit5(const uint8_t *quad, int8x16_t fields[FIELDS_LIMIT])
{
    uint8x16_t v = vld1q_u8(quad);
    UNROLLED for (uint32_t digit = 0; digit < 5; digit++) {
        const uint8x16_t low = vcleq_u8(v, vdupq_n_u8(85)), high = vcgtq_u8(v, vdupq_n_u8(170));
        fields[digit] = vreinterpretq_s8_u8(vsubq_u8(low, high));
        v = vaddq_u8(v, vaddq_u8(v, v));
    }
}

INLINE void unpack_int8(const uint8_t *quad, int8x16_t fields[FIELDS_LIMIT])
{
    fields[0] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(quad), vdupq_n_u8(128)));
}

INLINE void unpack_int6(const uint8_t *quad, int8x16_t fields[FIELDS_LIMIT])
{
    const uint8x16_t a = vld1q_u8(quad), b = vld1q_u8(quad + 64), high = vld1q_u8(quad + 128);
    const uint8x16_t low = vdupq_n_u8(15), top = vdupq_n_u8(48);
    fields[0] = vreinterpretq_s8_u8(vorrq_u8(vandq_u8(a, low), vandq_u8(vshlq_n_u8(high, 4), top)));
    fields[1] = vreinterpretq_s8_u8(vorrq_u8(vshrq_n_u8(a, 4), vandq_u8(vshlq_n_u8(high, 2), top)));
    fields[2] = vreinterpretq_s8_u8(vorrq_u8(vandq_u8(b, low), vandq_u8(high, top)));
    fields[3] = vreinterpretq_s8_u8(vorrq_u8(vshrq_n_u8(b, 4), vandq_u8(vshrq_n_u8(high, 2), top)));
}

INLINE void unpack_int4(const uint8_t *quad, int8x16_t fields[FIELDS_LIMIT])
{
    const uint8x16_t v = vld1q_u8(quad);
    fields[0] = vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(15)));
    fields[1] = vreinterpretq_s8_u8(vshrq_n_u8(v, 4));
}

/* `parts` parts from `first` on of a group's rows, times n activation rows: parts * n <= 4. */
INLINE void multiply_parts(unpack_function *unpack, const uint32_t fields, const uint32_t quad_bytes,
                           const uint32_t first, const uint32_t parts, const uint8_t *data, uint32_t quads,
                           const int8_t *x, size_t stride, const int32_t *zeros, const uint32_t n, int32_t *out,
                           size_t out_stride)
{
    int32x4_t sums[4][FIELDS_LIMIT];
    UNROLLED for (uint32_t at = 0; at < parts * n; at++)
        UNROLLED for (uint32_t field = 0; field < fields; field++)
            sums[at][field] = vdupq_n_s32(0);
    for (size_t q = 0; q < quads; q += 4) { /* columns are padded to four quads */
        int8x16_t some[SHARED_ROWS];
        UNROLLED for (uint32_t i = 0; i < n; i++)
            some[i] = vld1q_s8(x + i * stride + q * 4);
        UNROLLED for (uint32_t part = 0; part < parts; part++) {
            const uint8_t *p = data + q * quad_bytes + (first + part) * 16;
            int8x16_t w[FIELDS_LIMIT];
#define LANE(lane)                                                                                                   \
    unpack(p + lane * quad_bytes, w);                                                                                \
    UNROLLED for (uint32_t i = 0; i < n; i++)                                                                        \
        UNROLLED for (uint32_t field = 0; field < fields; field++)                                                   \
            sums[part * n + i][field] = vdotq_laneq_s32(sums[part * n + i][field], w[field], some[i], lane);
            LANE(0) LANE(1) LANE(2) LANE(3)
#undef LANE
        }
    }
    UNROLLED for (uint32_t part = 0; part < parts; part++)
        UNROLLED for (uint32_t i = 0; i < n; i++)
            UNROLLED for (uint32_t field = 0; field < fields; field++)
                vst1q_s32(out + i * out_stride + field * 16 + (first + part) * 4,
                          vsubq_s32(sums[part * n + i][field], vdupq_n_s32(zeros[i])));
}

#define PARTS_OF(first, parts, n)                                                                                    \
    multiply_parts(unpack, fields, quad_bytes, first, parts, data, quads, x, stride, zeros, n, out, out_stride)

INLINE void multiply_rows(unpack_function *unpack, const uint32_t fields, const uint32_t quad_bytes,
                          const uint8_t *data, uint32_t quads, const int8_t *x, size_t stride, const int32_t *zeros,
                          uint32_t n, int32_t *out, size_t out_stride)
{
    switch (n) {
    case 1:
        PARTS_OF(0, 4, 1);
        break;
    case 2:
        PARTS_OF(0, 2, 2);
        PARTS_OF(2, 2, 2);
        break;
    case 3:
        for (uint32_t part = 0; part < 4; part++)
            PARTS_OF(part, 1, 3);
        break;
    default:
        for (uint32_t part = 0; part < 4; part++)
            PARTS_OF(part, 1, 4);
    }
}

#define DOT_FUNCTION(name, fields, quad_bytes, zero)                                                                 \
    static void dot_##name(const struct kernels *kernels, const uint8_t *data, uint32_t groups, size_t group_bytes,  \
                           uint32_t quads, const int8_t *x, size_t stride, const int32_t *sums, uint32_t n,          \
                           int32_t *out)                                                                             \
    {                                                                                                                \
        (void)kernels;                                                                                               \
        const size_t out_stride = (size_t)groups * fields * 16;                                                      \
        for (uint32_t g = 0; g < groups; g++, data += group_bytes) {                                                 \
            for (uint32_t i = 0; i < n; i += SHARED_ROWS) {                                                          \
                const uint32_t some = n - i < SHARED_ROWS ? n - i : SHARED_ROWS;                                     \
                int32_t zeros[SHARED_ROWS];                                                                          \
                for (uint32_t j = 0; j < some; j++)                                                                  \
                    zeros[j] = zero * sums[i + j];                                                                   \
                multiply_rows(unpack_##name, fields, quad_bytes, data, quads, x + i * stride, stride, zeros, some,   \
                              out + i * out_stride + (size_t)g * fields * 16, out_stride);                           \
            }                                                                                                        \
        }                                                                                                            \
    }
DOT_FUNCTION(trit2, 4, 64, 1)
DOT_FUNCTION(trit5, 5, 64, 0)
DOT_FUNCTION(int8, 1, 64, 0)
DOT_FUNCTION(int6, 4, 192, 32)
DOT_FUNCTION(int4, 2, 64, 8)

const struct kernels kernels_neon = {
    .name = "neon",
    .rows = 6,
    .dot = {dot_trit2, dot_trit5, dot_int8, dot_int6, dot_int4},
    FLOAT_KERNELS,
};
#endif
