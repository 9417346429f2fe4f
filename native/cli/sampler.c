/* Which token comes next: of the 40 likeliest those that are a tenth as likely as the first at least, by their
 * probabilities at a temperature of 0.7 (the tenth counts before it). Small models lose the thread with anything
 * less strict. */
#include "sampler.h"

#include <string.h>

#include "pentium2/floats.h"
#include "pentium2/precision.h"

#define LIKELIEST 40u
#define TEMPERATURE 0.7f
#define LOG_LEAST_SHARE -2.302585f /* the logarithm of a tenth */

struct candidate {
    float logit;
    int32_t token;
};

/* As integers, bits of floats are ordered like the numbers unless both are negative: so floats are compared only while
 * nothing positive was found, and where the bits are larger. */
static int32_t likeliest(const float *logits, uint32_t n)
{
    uint32_t best = 0;
    int32_t most = INT32_MIN, bits;
    for (uint32_t i = 1; i < n; i++) {
        memcpy(&bits, logits + i, sizeof bits);
        if (bits > most && logits[i] > logits[best]) {
            best = i;
            most = bits > 0 ? bits : INT32_MIN;
        }
    }
    return (int32_t)best;
}

/* The largest few, in order; of equals the first comes first. */
static uint32_t select(struct candidate *kept, const float *logits, uint32_t n)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (count == LIKELIEST && !(logits[i] > kept[count - 1].logit))
            continue;
        uint32_t at = count < LIKELIEST ? count++ : count - 1;
        for (; at > 0 && logits[i] > kept[at - 1].logit; at--)
            kept[at] = kept[at - 1];
        kept[at] = (struct candidate){logits[i], (int32_t)i};
    }
    return count;
}

/* 0 to 1, in steps of 2^-24. splitmix64: https://prng.di.unimi.it/splitmix64.c */
static float uniform(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (float)(int32_t)((z ^ z >> 31) >> 40) * 0x1p-24f;
}

/* A call of its own: the compiler might move arithmetic across the change of precision. */
static __attribute__((noinline)) int32_t draw(struct sampler *sampler, const float *logits, uint32_t n)
{
    struct candidate kept[LIKELIEST];
    float weights[LIKELIEST], sum = 0;
    const uint32_t most = select(kept, logits, n);
    uint32_t count = 0;
    for (; count < most && kept[count].logit - kept[0].logit >= LOG_LEAST_SHARE; count++)
        sum += weights[count] = pentium2_exponential((kept[count].logit - kept[0].logit) * (1 / TEMPERATURE));
    float left = uniform(&sampler->state) * sum;
    for (uint32_t i = 0; i < count; i++)
        if ((left -= weights[i]) < 0)
            return kept[i].token;
    return kept[0].token;
}

int32_t sampler_draw(struct sampler *sampler, const float *logits, uint32_t n)
{
    if (sampler->greedy)
        return likeliest(logits, n);
    const uint16_t before = precision_set(PRECISION_SINGLE);
    const int32_t token = draw(sampler, logits, n);
    precision_restore(before);
    return token;
}
