/* The digits of bytes in base 3, one by one, for kernels with AVX-512: where many activation rows share them. */
#ifndef CORDEE_DIGITS_H
#define CORDEE_DIGITS_H

#include <immintrin.h>

#define DIGITS 5u

/* Five vectors, `stride` bytes apart, of codes 0, 1, 2. The highest digit of a byte is 0 up to 85 and 2 from 171 on; times
 * 3 lifts the next one up. */
static inline __attribute__((always_inline)) void unpack_digits(uint8_t *to, size_t stride, __m512i v)
{
    const __m512i one = _mm512_set1_epi8(1);
    for (uint32_t digit = 0; digit < DIGITS; digit++, to += stride) {
        const __mmask64 some = _mm512_cmpgt_epu8_mask(v, _mm512_set1_epi8(85));
        const __mmask64 two = _mm512_cmpgt_epu8_mask(v, _mm512_set1_epi8((char)170));
        const __m512i trits = _mm512_maskz_mov_epi8(some, one);
        _mm512_store_si512(to, _mm512_mask_add_epi8(trits, two, trits, one));
        v = _mm512_add_epi8(v, _mm512_add_epi8(v, v));
    }
}

#endif
