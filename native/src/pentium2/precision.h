/* The same floating-point bits on an x87 as everywhere: its results are rounded to what is asked for here.
 *
 * In single precision each addition, multiplication, division and root gives the bits that it gives elsewhere, as long as
 * it neither overflows nor underflows; what is computed in double needs double precision for the same. Integers are
 * loaded exactly: only those below 2^24 may become floats. */
#ifndef CORDEE_PENTIUM2_PRECISION_H
#define CORDEE_PENTIUM2_PRECISION_H

#include <stdint.h>

enum precision { PRECISION_SINGLE = 0x000, PRECISION_DOUBLE = 0x200 };

#if defined(__i386__) && !defined(__SSE2_MATH__)
#define PRECISION_BITS 0x300u

/* Gives what was set before, for precision_restore. */
static inline uint16_t precision_set(enum precision precision)
{
    uint16_t before, word;
    __asm__ volatile("fnstcw %0" : "=m"(before));
    word = (uint16_t)((before & ~PRECISION_BITS) | precision);
    __asm__ volatile("fldcw %0" : : "m"(word) : "memory");
    return before;
}

static inline void precision_restore(uint16_t before)
{
    __asm__ volatile("fldcw %0" : : "m"(before) : "memory");
}
#else
static inline uint16_t precision_set(enum precision precision)
{
    (void)precision;
    return 0;
}

static inline void precision_restore(uint16_t before)
{
    (void)before;
}
#endif

#endif
