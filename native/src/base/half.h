/* IEEE half precision, and bfloat16, by integer arithmetic: the same on every machine. */
#ifndef CORDEE_HALF_H
#define CORDEE_HALF_H

#include <stdint.h>
#include <string.h>

static inline float half_to_float(uint16_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = (uint32_t)(bits & 0x7fff) << 13;
    float value;
    memcpy(&value, &magnitude, 4);
    value *= 0x1p112f; /* moves the exponent's bias, and makes subnormals right */
    memcpy(&magnitude, &value, 4);
    if ((bits & 0x7c00) == 0x7c00) /* infinities and NaN */
        magnitude |= 0x7f800000u;
    magnitude |= sign;
    memcpy(&value, &magnitude, 4);
    return value;
}

/* The upper half of a float. */
static inline float bfloat_to_float(uint16_t bits)
{
    const uint32_t whole = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &whole, 4);
    return value;
}

/* Nearest, ties to even; what is too large becomes infinite. */
static inline uint16_t half_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u)
        return sign | 0x7e00;
    if (bits >= 0x477ff000u) /* rounds to 65536 or more */
        return sign | 0x7c00;
    if (bits < 0x38800000u) { /* subnormal: adding 0.5 leaves the rounded fraction in the lowest bits */
        float shifted;
        memcpy(&shifted, &bits, 4);
        shifted += 0.5f;
        memcpy(&bits, &shifted, 4);
        return sign | (uint16_t)(bits - 0x3f000000u);
    }
    return sign | (uint16_t)((bits - 0x38000000u + 0xfff + (bits >> 13 & 1)) >> 13);
}

#endif
