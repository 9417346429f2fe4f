/* Attention in integers. */
#include "attention.h"

#include <math.h>
#include <string.h>

#include "base/limits.h"
#include "floats.h"

/* Largest integer of a key or value. */
#define CODE_MAX 127.0f
/* Queries are rounded finer, to integers of at most QUERY_MAX, and of at most QUERY_SUM / head_dim: a score is then at
 * most QUERY_SUM * 127 * 256 < 2^31. */
#define QUERY_MAX 4095u
#define QUERY_SUM 66000u
/* What the shares of all positions add up to before they are rounded: after that to at most 32000 +
 * PENTIUM2_CONTEXT_LIMIT / 2, and times 127 * 256 to less than 2^31. One alone is at most 32000. */
#define SHARE_SUM 32000.0f
/* Sums lose so many bits before they become floats, which hold 24. They are 256 times what they are sums of. */
#define SHIFT 7
#define SHIFTED (1.0f / 2)
_Static_assert((uint64_t)QUERY_SUM * (int)CODE_MAX * 256 <= INT32_MAX, "a score fits 32 bits");
_Static_assert(((int)SHARE_SUM + PENTIUM2_CONTEXT_LIMIT / 2ull) * (int)CODE_MAX * 256 <= INT32_MAX,
               "a weighed sum of values fits 32 bits");
_Static_assert(QUERY_MAX <= INT16_MAX && (int)SHARE_SUM <= INT16_MAX, "what sums are made of fits 16 bits");
_Static_assert((1ull << 31) >> SHIFT <= 1u << 24, "what is left of a sum becomes a float as it is");
_Static_assert(1u << SHIFT == 256 / 2, "SHIFTED is what a shifted sum of products times 256 is to be divided by");
#define LOG2_E 1.44269504f
#define OCTAVE 512 /* steps of a score that double its share */

/* Dimension 0 of a position's key; dimension d is key_step(d) further. */
static int8_t *key_at(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t head, uint32_t position)
{
    int8_t *keys = (int8_t *)cache_head_at(cache, layer, sequence, head).keys;
    return keys + (size_t)(position / LOOKUP_COLUMNS) * LOOKUP_COLUMNS * cache->head_dim +
           position % LOOKUP_COLUMNS * 2;
}

static size_t key_step(uint32_t dimension)
{
    return dimension / 2 * (2 * LOOKUP_COLUMNS) + dimension % 2;
}

/* Dimension 0 of a position's value; dimension d is value_step(d) further. */
static int8_t *value_at(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t head, uint32_t position)
{
    int8_t *values = (int8_t *)cache_head_at(cache, layer, sequence, head).values;
    return values + (size_t)(position / 2) * (2 * LOOKUP_COLUMNS) + position % 2;
}

/* Bytes of the values of LOOKUP_COLUMNS dimensions. */
static size_t value_block(const struct cache *cache)
{
    return (size_t)cache->context * LOOKUP_COLUMNS;
}

static size_t value_step(const struct cache *cache, uint32_t dimension)
{
    return dimension / LOOKUP_COLUMNS * value_block(cache) + dimension % LOOKUP_COLUMNS * 2;
}

static float query_max(uint32_t head_dim)
{
    const uint32_t most = QUERY_SUM / head_dim;
    return (float)(int32_t)(most < QUERY_MAX ? most : QUERY_MAX);
}

/* Integers of at most `most` for x, and what one of them stands for. */
static float round_head(int16_t *codes, const float *x, uint32_t n, float most)
{
    const float absmax = pentium2_absmax(x, n), safe = absmax > 1e-20f ? absmax : 1e-20f, factor = most / safe;
    for (uint32_t i = 0; i < n; i++)
        codes[i] = (int16_t)(uint16_t)pentium2_nearest(x[i] * factor);
    return safe / most;
}

void pentium2_cache_store(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t position,
                          const float *key, const float *value)
{
    const uint32_t dims = cache->head_dim;
    int16_t codes[HEAD_DIM_LIMIT];
    for (uint32_t head = 0; head < cache->kv_heads; head++, key += dims, value += dims) {
        const struct cache_head at = cache_head_at(cache, layer, sequence, head);
        int8_t *to_key = key_at(cache, layer, sequence, head, position);
        int8_t *to_value = value_at(cache, layer, sequence, head, position);
        at.key_scales[position] = round_head(codes, key, dims, CODE_MAX);
        for (uint32_t d = 0; d < dims; d++)
            to_key[key_step(d)] = (int8_t)codes[d];
        at.value_scales[position] = round_head(codes, value, dims, CODE_MAX);
        for (uint32_t d = 0; d < dims; d++)
            to_value[value_step(cache, d)] = (int8_t)codes[d];
    }
}

size_t pentium2_scratch_floats(const struct cache *cache)
{
    const size_t positions = (cache->context + LOOKUP_COLUMNS - 1) / LOOKUP_COLUMNS * LOOKUP_COLUMNS;
    /* Sums, weights and shares of positions; or a query, and sums of dimensions. */
    return positions * 3 + HEAD_DIM_LIMIT * 2;
}

/* 2^(i / 512), and 2^-i: what powers of 2 are made of, beside pentium2_powers. */
static const float fine[16] = {
    0x1.000000p+0f, 0x1.0058c8p+0f, 0x1.00b1b0p+0f, 0x1.010ab6p+0f, 0x1.0163dap+0f, 0x1.01bd1ep+0f, 0x1.021682p+0f,
    0x1.027004p+0f, 0x1.02c9a4p+0f, 0x1.032364p+0f, 0x1.037d42p+0f, 0x1.03d742p+0f, 0x1.04315ep+0f, 0x1.048b9cp+0f,
    0x1.04e5f8p+0f, 0x1.054072p+0f,
};
static const float halves[32] = {
    0x1p-0f,  0x1p-1f,  0x1p-2f,  0x1p-3f,  0x1p-4f,  0x1p-5f,  0x1p-6f,  0x1p-7f,  0x1p-8f,  0x1p-9f,  0x1p-10f,
    0x1p-11f, 0x1p-12f, 0x1p-13f, 0x1p-14f, 0x1p-15f, 0x1p-16f, 0x1p-17f, 0x1p-18f, 0x1p-19f, 0x1p-20f, 0x1p-21f,
    0x1p-22f, 0x1p-23f, 0x1p-24f, 0x1p-25f, 0x1p-26f, 0x1p-27f, 0x1p-28f, 0x1p-29f, 0x1p-30f, 0x1p-31f,
};

/* 2^(-steps / OCTAVE), 0 from 2^-31 on: a share of attention has steps of 1 / 32000. */
static inline float power_of(uint32_t steps)
{
    const uint32_t rest = -steps % OCTAVE, octaves = (steps + OCTAVE - 1) / OCTAVE;
    return steps < 31 * OCTAVE ? pentium2_powers[rest / 16] * fine[rest % 16] * halves[octaves] : 0;
}

/* Sums of products become scores in steps of 1 / OCTAVE of a power of 2, beyond any of sense at 2^22 steps. Gives the
 * largest. */
static int32_t score(int32_t *sums, const float *key_scales, float scale, uint32_t positions)
{
    int32_t most = INT32_MIN;
    for (uint32_t p = 0; p < positions; p++) {
        sums[p] = pentium2_nearest((float)(sums[p] >> SHIFT) * (scale * key_scales[p]));
        most = sums[p] > most ? sums[p] : most;
    }
    return most;
}

/* Scores become weights: 2^(score - most), times the scale of the value. Gives their sum, and that of the powers. */
static float soften(float *weights, const int32_t *scores, int32_t most, const float *value_scales, uint32_t positions,
                    float *powers)
{
    float sum = 0, all = 0;
    for (uint32_t p = 0; p < positions; p++) {
        const float power = power_of((uint32_t)most - (uint32_t)scores[p]);
        sum += power;
        weights[p] = power * value_scales[p];
        all += weights[p];
    }
    *powers = sum;
    return all;
}

/* As pentium2_attend, of one query. */
static void attend(const struct lookup_kernels *kernels, const struct cache *cache, const struct cache_head *at,
                   float *query, uint32_t positions, float *scratch)
{
    const uint32_t dims = cache->head_dim, blocks = (positions + LOOKUP_COLUMNS - 1) / LOOKUP_COLUMNS;
    const uint32_t padded = (positions + PENTIUM2_MULTIPLE - 1) / PENTIUM2_MULTIPLE * PENTIUM2_MULTIPLE;
    int32_t *sums = (int32_t *)(void *)scratch; /* of positions, and then of dimensions */
    float *weights = scratch + (blocks * LOOKUP_COLUMNS > HEAD_DIM_LIMIT ? blocks * LOOKUP_COLUMNS : HEAD_DIM_LIMIT);
    int16_t *codes = (int16_t *)(void *)(weights + positions); /* of the query, and then shares */
    const float one = round_head(codes, query, dims, query_max(dims));
    kernels->sum_columns(sums, (const int8_t *)at->keys, blocks, LOOKUP_COLUMNS * dims, dims / 2, codes);
    const float scale = one / sqrtf((float)(int32_t)dims) * (SHIFTED * OCTAVE * LOG2_E);
    const int32_t most = score(sums, at->key_scales, scale, positions);
    float powers;
    const float all = soften(weights, sums, most, at->value_scales, positions, &powers), factor = SHARE_SUM / all;
    for (uint32_t p = 0; p < positions; p++)
        codes[p] = (int16_t)(uint16_t)pentium2_nearest(weights[p] * factor);
    /* Behind the last position there may be anything: bytes, which times a share of 0 are 0. */
    memset(codes + positions, 0, (padded - positions) * sizeof *codes);
    kernels->sum_columns(sums, (const int8_t *)at->values, (dims + LOOKUP_COLUMNS - 1) / LOOKUP_COLUMNS,
                         value_block(cache), padded / 2, codes);
    const float back = all / (SHARE_SUM * powers) * SHIFTED;
    for (uint32_t d = 0; d < dims; d++)
        query[d] = (float)(sums[d] >> SHIFT) * back;
}

void pentium2_attend(const struct lookup_kernels *kernels, const struct cache *cache, uint32_t layer, uint32_t sequence,
                     uint32_t kv_head, uint32_t heads, float *queries, uint32_t positions, float *scratch)
{
    const struct cache_head at = cache_head_at(cache, layer, sequence, kv_head);
    for (uint32_t head = 0; head < heads; head++)
        attend(kernels, cache, &at, queries + (size_t)head * cache->head_dim, positions, scratch);
}

void pentium2_export(const struct cache *cache, uint32_t sequence, uint8_t *state)
{
    for (uint32_t layer = 0; layer < cache->layers; layer++)
        for (uint32_t p = 0; p < cache->lengths[sequence]; p++)
            for (uint32_t head = 0; head < cache->kv_heads; head++) {
                const int8_t *key = key_at(cache, layer, sequence, head, p);
                const int8_t *value = value_at(cache, layer, sequence, head, p);
                const struct cache_head at = cache_head_at(cache, layer, sequence, head);
                for (uint32_t d = 0; d < cache->head_dim; d++) {
                    *state++ = (uint8_t)key[key_step(d)];
                    *state++ = (uint8_t)value[value_step(cache, d)];
                }
                memcpy(state, at.key_scales + p, sizeof(float));
                memcpy(state + sizeof(float), at.value_scales + p, sizeof(float));
                state += 2 * sizeof(float);
            }
}

void pentium2_import(const struct cache *cache, uint32_t sequence, uint32_t positions, const uint8_t *state)
{
    for (uint32_t layer = 0; layer < cache->layers; layer++)
        for (uint32_t p = 0; p < positions; p++)
            for (uint32_t head = 0; head < cache->kv_heads; head++) {
                int8_t *key = key_at(cache, layer, sequence, head, p);
                int8_t *value = value_at(cache, layer, sequence, head, p);
                const struct cache_head at = cache_head_at(cache, layer, sequence, head);
                for (uint32_t d = 0; d < cache->head_dim; d++) {
                    key[key_step(d)] = (int8_t)*state++;
                    value[value_step(cache, d)] = (int8_t)*state++;
                }
                memcpy(at.key_scales + p, state, sizeof(float));
                memcpy(at.value_scales + p, state + sizeof(float), sizeof(float));
                state += 2 * sizeof(float);
            }
}
