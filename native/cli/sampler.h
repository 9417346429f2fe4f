/* Which token comes next. */
#ifndef CORDEE_SAMPLER_H
#define CORDEE_SAMPLER_H

#include <stdbool.h>
#include <stdint.h>

struct sampler {
    bool greedy;
    uint64_t state; /* of the random numbers */
};

/* The token of the largest logit, the first of equals; or one of the likeliest few by chance. The same seed, logits
 * and number of draws give the same tokens on every machine. */
int32_t sampler_draw(struct sampler *sampler, const float *logits, uint32_t n);

#endif
