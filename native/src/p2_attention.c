/* Attention in integers. */
#include "p2_attention.h"

#include <math.h>
#include <string.h>

#include "model.h"
#include "p2_floats.h"

/* Largest integer of a key, value or query. A score sums head_dim products: 4095 * 4095 * 128 < 2^31, and
 * 2047 * 2047 * HEAD_DIM_LIMIT < 2^31. */
#define CODE_MAX 4095
#define WIDE_HEAD 128u
#define WIDE_HEAD_CODE_MAX 2047
/* What the shares of all positions add up to before they are rounded: after that, to at most 32000 +
 * P2_CONTEXT_LIMIT / 2, and times CODE_MAX to less than 2^28. One alone is at most 32000. */
#define SHARE_SUM 32000.0f
/* Sums lose so many bits before they become floats, which hold 24. */
#define SCORE_SHIFT 7
#define VALUE_SHIFT 4

static size_t head_of(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t head)
{
    return ((size_t)layer * cache->sequences + sequence) * cache->kv_heads + head;
}

/* Dimension 0 of a position's key; dimension d is d / 2 * 16 + d % 2 further. */
static int16_t *key_at(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t head, uint32_t position)
{
    int16_t *keys = (int16_t *)cache_keys(cache, layer, sequence, head);
    return keys + (size_t)(position / LOOKUP_COLUMNS) * LOOKUP_COLUMNS * cache->head_dim +
           position % LOOKUP_COLUMNS * 2;
}

static size_t key_step(uint32_t dimension)
{
    return dimension / 2 * (2 * LOOKUP_COLUMNS) + dimension % 2;
}

/* Dimension 0 of a position's value; dimension d is 2 * d further. */
static int16_t *value_at(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t head,
                         uint32_t position)
{
    int16_t *values = (int16_t *)cache_values(cache, layer, sequence, head);
    return values + (size_t)(position / 2) * 2 * cache->value_stride + position % 2;
}

static float code_max(uint32_t head_dim)
{
    return head_dim <= WIDE_HEAD ? CODE_MAX : WIDE_HEAD_CODE_MAX;
}

/* Integers of at most `most` for x, and what one of them stands for. */
static float round_head(int16_t *codes, const float *x, uint32_t n, float most)
{
    const float absmax = p2_absmax(x, n), safe = absmax > 1e-20f ? absmax : 1e-20f, factor = most / safe;
    for (uint32_t i = 0; i < n; i++)
        codes[i] = (int16_t)(uint16_t)p2_nearest(x[i] * factor);
    return safe / most;
}

void p2_cache_store(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t position, const float *key,
                    const float *value)
{
    const uint32_t dims = cache->head_dim;
    int16_t codes[HEAD_DIM_LIMIT];
    for (uint32_t head = 0; head < cache->kv_heads; head++, key += dims, value += dims) {
        const size_t scale = head_of(cache, layer, sequence, head) * cache->context + position;
        int16_t *to_key = key_at(cache, layer, sequence, head, position);
        int16_t *to_value = value_at(cache, layer, sequence, head, position);
        cache->key_scales[scale] = round_head(codes, key, dims, code_max(dims));
        for (uint32_t d = 0; d < dims; d++)
            to_key[key_step(d)] = codes[d];
        cache->value_scales[scale] = round_head(codes, value, dims, CODE_MAX);
        for (uint32_t d = 0; d < dims; d++)
            to_value[2 * d] = codes[d];
        if (position % 2 == 0) /* the pair's other half meets a share of 0, but must be a number */
            for (uint32_t d = 0; d < cache->value_stride; d++)
                to_value[2 * d + 1] = 0;
    }
}

size_t p2_scratch_floats(const struct cache *cache)
{
    const size_t positions = (cache->context + LOOKUP_COLUMNS - 1) / LOOKUP_COLUMNS * LOOKUP_COLUMNS;
    return positions * 3 + HEAD_DIM_LIMIT * 2; /* sums, scores, shares in 16 bits; a query, and sums of values */
}

/* Scores become weights e^(score - most) * scale of the value; gives their sum, and the sum of the exponentials. */
static float soften(float *scores, const float *value_scales, uint32_t positions, float *exponentials)
{
    float most = scores[0], sum = 0, weights = 0;
    for (uint32_t p = 1; p < positions; p++)
        most = scores[p] > most ? scores[p] : most;
    for (uint32_t p = 0; p < positions; p++) {
        const float e = p2_exponential(scores[p] - most);
        sum += e;
        scores[p] = e * value_scales[p];
        weights += scores[p];
    }
    *exponentials = sum;
    return weights;
}

/* One query, as p2_attend; `sums` has room for positions or value_stride rounded up to LOOKUP_COLUMNS. */
static void attend(const struct lookup_kernels *kernels, const struct cache *cache, const int16_t *keys,
                   const int16_t *values, const float *key_scales, const float *value_scales, float *query,
                   uint32_t positions, float *scratch)
{
    const uint32_t dims = cache->head_dim;
    const uint32_t blocks = (positions + LOOKUP_COLUMNS - 1) / LOOKUP_COLUMNS;
    int32_t *sums = (int32_t *)(void *)scratch;
    float *scores = scratch + (blocks * LOOKUP_COLUMNS > HEAD_DIM_LIMIT ? blocks * LOOKUP_COLUMNS : HEAD_DIM_LIMIT);
    int16_t *codes = (int16_t *)(void *)(scores + positions);
    const float scale = round_head(codes, query, dims, code_max(dims)) / sqrtf((float)dims) * (1 << SCORE_SHIFT);
    kernels->sum_columns(sums, keys, blocks, LOOKUP_COLUMNS * dims, dims / 2, 2 * LOOKUP_COLUMNS, codes);
    for (uint32_t p = 0; p < positions; p++)
        scores[p] = (float)(sums[p] >> SCORE_SHIFT) * (scale * key_scales[p]);
    float exponentials;
    const float weights = soften(scores, value_scales, positions, &exponentials);
    const float factor = SHARE_SUM / weights;
    for (uint32_t p = 0; p < positions; p++)
        codes[p] = (int16_t)(uint16_t)p2_nearest(scores[p] * factor);
    codes[positions] = 0; /* of a last pair that is half full */
    kernels->sum_columns(sums, values, (dims + LOOKUP_COLUMNS - 1) / LOOKUP_COLUMNS, 2 * LOOKUP_COLUMNS,
                         (positions + 1) / 2, 2 * cache->value_stride, codes);
    const float back = weights / (SHARE_SUM * exponentials) * (1 << VALUE_SHIFT);
    for (uint32_t d = 0; d < dims; d++)
        query[d] = (float)(sums[d] >> VALUE_SHIFT) * back;
}

void p2_attend(const struct lookup_kernels *kernels, const struct cache *cache, uint32_t layer, uint32_t sequence,
               uint32_t kv_head, uint32_t heads, float *queries, uint32_t positions, float *scratch)
{
    const size_t scales = head_of(cache, layer, sequence, kv_head) * cache->context;
    for (uint32_t head = 0; head < heads; head++)
        attend(kernels, cache, key_at(cache, layer, sequence, kv_head, 0),
               value_at(cache, layer, sequence, kv_head, 0), cache->key_scales + scales, cache->value_scales + scales,
               queries + (size_t)head * cache->head_dim, positions, scratch);
}

size_t p2_state_bytes(const struct cache *cache, uint32_t positions)
{
    const size_t each = 2 * (cache->head_dim * sizeof(int16_t) + sizeof(float));
    return (size_t)cache->layers * cache->kv_heads * positions * each;
}

void p2_export(const struct cache *cache, uint32_t sequence, uint8_t *state)
{
    for (uint32_t layer = 0; layer < cache->layers; layer++)
        for (uint32_t p = 0; p < cache->lengths[sequence]; p++)
            for (uint32_t head = 0; head < cache->kv_heads; head++) {
                const int16_t *key = key_at(cache, layer, sequence, head, p);
                const int16_t *value = value_at(cache, layer, sequence, head, p);
                const size_t scale = head_of(cache, layer, sequence, head) * cache->context + p;
                for (uint32_t d = 0; d < cache->head_dim; d++, state += 2 * sizeof *key) {
                    memcpy(state, key + key_step(d), sizeof *key);
                    memcpy(state + sizeof *key, value + 2 * d, sizeof *value);
                }
                memcpy(state, cache->key_scales + scale, sizeof(float));
                memcpy(state + sizeof(float), cache->value_scales + scale, sizeof(float));
                state += 2 * sizeof(float);
            }
}

void p2_import(const struct cache *cache, uint32_t sequence, uint32_t positions, const uint8_t *state)
{
    for (uint32_t layer = 0; layer < cache->layers; layer++)
        for (uint32_t p = 0; p < positions; p++)
            for (uint32_t head = 0; head < cache->kv_heads; head++) {
                int16_t *key = key_at(cache, layer, sequence, head, p);
                int16_t *value = value_at(cache, layer, sequence, head, p);
                const size_t scale = head_of(cache, layer, sequence, head) * cache->context + p;
                for (uint32_t d = 0; d < cache->head_dim; d++, state += 2 * sizeof *key) {
                    memcpy(key + key_step(d), state, sizeof *key);
                    memcpy(value + 2 * d, state + sizeof *key, sizeof *value);
                    if (p % 2 == 0)
                        value[2 * d + 1] = 0;
                }
                memcpy(cache->key_scales + scale, state, sizeof(float));
                memcpy(cache->value_scales + scale, state + sizeof(float), sizeof(float));
                state += 2 * sizeof(float);
            }
}
