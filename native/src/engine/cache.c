/* The key/value cache. */
#include "cache.h"

#include <string.h>

#include "base/half.h"

const struct cache_facts cache_facts[CACHE_KINDS] = {
    [CACHE_F16] = {"f16", 2, 0},
    [CACHE_PENTIUM2] = {"pentium2", 1, sizeof(float)},
    [CACHE_INT8] = {"int8", 1, sizeof(float)},
};

enum cache_kind cache_named(const char *name)
{
    enum cache_kind kind = CACHE_F16;
    while (name != NULL && kind < CACHE_KINDS && strcmp(cache_facts[kind].name, name) != 0)
        kind++;
    return kind;
}

static size_t padded_context(const struct cache *cache)
{
    return (cache->context + (size_t)LANES - 1) / LANES * LANES;
}

static size_t head_index(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t head)
{
    return ((size_t)layer * cache->sequences + sequence) * cache->kv_heads + head;
}

static size_t head_key_bytes(const struct cache *cache)
{
    return padded_context(cache) * cache->head_dim * cache_facts[cache->kind].cell_bytes;
}

static size_t head_value_bytes(const struct cache *cache)
{
    return (size_t)cache->context * cache->value_stride * cache_facts[cache->kind].cell_bytes;
}

size_t cache_key_bytes(const struct cache *cache)
{
    return head_index(cache, cache->layers, 0, 0) * head_key_bytes(cache);
}

size_t cache_value_bytes(const struct cache *cache)
{
    return head_index(cache, cache->layers, 0, 0) * head_value_bytes(cache);
}

size_t cache_scale_bytes(const struct cache *cache)
{
    return head_index(cache, cache->layers, 0, 0) * padded_context(cache) * cache_facts[cache->kind].scale_bytes;
}

struct cache_head cache_head_at(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t head)
{
    const size_t index = head_index(cache, layer, sequence, head), scales = index * padded_context(cache);
    const bool has_scales = cache_facts[cache->kind].scale_bytes > 0;
    return (struct cache_head){
        .keys = cache->keys + index * head_key_bytes(cache),
        .values = cache->values + index * head_value_bytes(cache),
        .key_scales = has_scales ? cache->key_scales + scales : NULL,
        .value_scales = has_scales ? cache->value_scales + scales : NULL,
    };
}

struct cache_head cache_head_from(const struct cache *cache, struct cache_head head, uint32_t skipped)
{
    const size_t cell_bytes = cache_facts[cache->kind].cell_bytes;
    head.keys += (size_t)skipped * cache->head_dim * cell_bytes;
    head.values += (size_t)skipped * cache->value_stride * cell_bytes;
    if (head.key_scales != NULL) {
        head.key_scales += skipped;
        head.value_scales += skipped;
    }
    return head;
}

struct cache_place cache_place_at(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t head,
                                  uint32_t position)
{
    const struct cache_head at = cache_head_at(cache, layer, sequence, head);
    const size_t cell_bytes = cache_facts[cache->kind].cell_bytes, block = position / LANES * LANES;
    struct cache_place place = {
        .key = at.keys + (block * cache->head_dim + position % LANES) * cell_bytes,
        .value = at.values + (size_t)position * cache->value_stride * cell_bytes,
    };
    if (cache->kind == CACHE_INT8) {
        place.scales[0] = at.key_scales + position;
        place.scales[1] = at.value_scales + position;
    }
    return place;
}

static void store_halves(uint8_t *to, size_t stride, const float *x, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++, to += stride * 2) {
        const uint16_t half = half_of(x[i]);
        memcpy(to, &half, sizeof half);
    }
}

/* The largest magnitude becomes 127. What is no number becomes -127 or 127 times its scale, as in the kernels. */
static void store_bytes(uint8_t *to, size_t stride, const float *x, uint32_t n, float *scale)
{
    float largest = 0;
    for (uint32_t i = 0; i < n; i++) {
        const float magnitude = x[i] < 0 ? -x[i] : x[i];
        largest = magnitude > largest ? magnitude : largest;
    }
    const float factor = largest > 0 ? 127.0f / largest : 0;
    for (uint32_t i = 0; i < n; i++, to += stride) {
        float v = (x[i] * factor + 12582912.0f) - 12582912.0f; /* nearest, ties to even */
        v = v < 127.0f ? v : 127.0f;
        v = v > -127.0f ? v : -127.0f;
        *to = (uint8_t)(int8_t)v;
    }
    *scale = largest / 127.0f;
}

void cache_store(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t position, const float *key,
                 const float *value)
{
    const uint32_t dims = cache->head_dim;
    const size_t cell_bytes = cache_facts[cache->kind].cell_bytes;
    for (uint32_t head = 0; head < cache->kv_heads; head++, key += dims, value += dims) {
        const struct cache_place place = cache_place_at(cache, layer, sequence, head, position);
        if (cache->kind == CACHE_INT8) {
            store_bytes(place.key, LANES, key, dims, place.scales[0]);
            store_bytes(place.value, 1, value, dims, place.scales[1]);
        } else {
            store_halves(place.key, LANES, key, dims);
            store_halves(place.value, 1, value, dims);
        }
        memset(place.value + dims * cell_bytes, 0, (cache->value_stride - dims) * cell_bytes);
    }
}

void cache_copy(const struct cache *cache, uint32_t source, uint32_t target, uint32_t length)
{
    const size_t cell_bytes = cache_facts[cache->kind].cell_bytes, scale_bytes = cache_facts[cache->kind].scale_bytes;
    const size_t blocks = ((size_t)length + LANES - 1) / LANES * LANES;
    /* The values of the kind `pentium2` are not laid out by position first. */
    const size_t value_bytes = cache->kind == CACHE_PENTIUM2 ? head_value_bytes(cache)
                                                             : (size_t)length * cache->value_stride * cell_bytes;
    for (uint32_t layer = 0; layer < cache->layers; layer++)
        for (uint32_t head = 0; head < cache->kv_heads; head++) {
            const struct cache_head from = cache_head_at(cache, layer, source, head);
            const struct cache_head to = cache_head_at(cache, layer, target, head);
            memcpy(to.keys, from.keys, blocks * cache->head_dim * cell_bytes);
            memcpy(to.values, from.values, value_bytes);
            if (scale_bytes > 0) {
                memcpy(to.key_scales, from.key_scales, length * scale_bytes);
                memcpy(to.value_scales, from.value_scales, length * scale_bytes);
            }
        }
    cache->lengths[target] = length;
}
