/* Bounds of what is believed of a model: beyond any published one, and within what sums hold. */
#ifndef CORDEE_LIMITS_H
#define CORDEE_LIMITS_H

#include <stdint.h>

#define LAYERS_LIMIT 512u
#define COLUMNS_LIMIT 32768u
#define VOCABULARY_LIMIT (1u << 22)
#define HEADS_LIMIT 1024u
#define HEAD_DIM_LIMIT 512u
#define PLANES_LIMIT 3u
#define EXPERTS_LIMIT 1024u /* of a layer, and of those that a row passes */
/* Columns that share a scale, and floats that the rotation mixes: within these, a power of two. */
#define SPAN_COLUMNS_LEAST 64u
#define SPAN_COLUMNS_LIMIT 256u
#define ROTATION_LEAST 16u
#define ROTATION_LIMIT 32768u

/* Magnitude of an activation's first digit of base 128, and of the integer that 1 to 3 digits are: the others are at
 * most 63. */
#define DIGIT_LIMIT 127
#define ACTIVATION_LIMIT(planes)                                                                                     \
    ((planes) == 1 ? DIGIT_LIMIT : (planes) == 2 ? DIGIT_LIMIT * 128 + 63 : (DIGIT_LIMIT * 128 + 63) * 128 + 63)

_Static_assert(2ull * DIGIT_LIMIT * 256 * COLUMNS_LIMIT <= INT32_MAX, "256 times a sum of trits fits 32 bits");
_Static_assert(255ull * DIGIT_LIMIT * COLUMNS_LIMIT <= INT32_MAX, "a sum of bytes' products fits 32 bits");
_Static_assert((uint64_t)HEADS_LIMIT * HEAD_DIM_LIMIT <= UINT32_MAX, "the width of all heads fits 32 bits");

#endif
