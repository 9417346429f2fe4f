/* Floating point for files of the layout `pentium2`: few operations, none of a library, each of one rounding. */
#ifndef CORDEE_PENTIUM2_FLOATS_H
#define CORDEE_PENTIUM2_FLOATS_H

#include <stdint.h>
#include <string.h>

#include "kernels/kernels.h"

/* What stands for the kernels of other layouts; without `dot` and `attend`. */
extern const struct kernels kernels_pentium2;

/* Nearest integer, ties to even, for |x| < 2^22 (some integer for others): adding 1.5 * 2^23 pushes the fraction out of
 * the mantissa. */
static inline int32_t pentium2_nearest(float x)
{
    const float shifted = x + 12582912.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return (int32_t)(bits - 0x4b400000u);
}

/* Largest magnitude: bits of floats without their sign are ordered like the numbers. */
static inline float pentium2_absmax(const float *x, uint32_t n)
{
    int32_t most = 0;
    float value;
    for (uint32_t i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    memcpy(&value, &most, sizeof value);
    return value;
}

/* e^x to 3e-7, clamped at -80 and 80. */
float pentium2_exponential(float x);

/* 2^(i / 32), to the nearest float. */
extern const float pentium2_powers[32];

/* Cosines and sines [half] of a position's rotary angles. `divisors` [half] or NULL. */
void pentium2_angles(float *cosines, float *sines, uint32_t half, float base, const float *divisors, uint32_t position);

#endif
