/* The key/value cache. */
#include "cache.h"

#include <string.h>

#include "half.h"
#include "kernels/kernels.h"
#include "p2_attention.h"

/* "CTKV", version, layers, kv_heads, head_dim, positions: little endian 32-bit words. */
#define STATE_WORDS 6
#define STATE_MAGIC 0x564b5443u
#define STATE_VERSION(cache) ((cache)->key_scales != NULL ? 2u : 1u) /* 2: p2_export */

static size_t blocks_of(const struct cache *cache)
{
    return (cache->context + LANES - 1) / LANES;
}

static size_t head_index(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t head)
{
    return ((size_t)layer * cache->sequences + sequence) * cache->kv_heads + head;
}

size_t cache_key_elements(const struct cache *cache)
{
    return head_index(cache, cache->layers, 0, 0) * blocks_of(cache) * LANES * cache->head_dim;
}

size_t cache_value_elements(const struct cache *cache)
{
    return head_index(cache, cache->layers, 0, 0) * cache->context * cache->value_stride;
}

uint16_t *cache_keys(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t head)
{
    return cache->keys + head_index(cache, layer, sequence, head) * blocks_of(cache) * LANES * cache->head_dim;
}

uint16_t *cache_values(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t head)
{
    return cache->values + head_index(cache, layer, sequence, head) * cache->context * cache->value_stride;
}

/* Element 0 of a position's key; the next dimension is LANES further. */
static uint16_t *key_at(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t head, uint32_t position)
{
    uint16_t *keys = cache_keys(cache, layer, sequence, head);
    return keys + (size_t)(position / LANES) * LANES * cache->head_dim + position % LANES;
}

static uint16_t *value_at(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t head,
                          uint32_t position)
{
    return cache_values(cache, layer, sequence, head) + (size_t)position * cache->value_stride;
}

void cache_store(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t position, const float *key,
                 const float *value)
{
    for (uint32_t head = 0; head < cache->kv_heads; head++, key += cache->head_dim, value += cache->head_dim) {
        uint16_t *to_key = key_at(cache, layer, sequence, head, position);
        uint16_t *to_value = value_at(cache, layer, sequence, head, position);
        for (uint32_t d = 0; d < cache->head_dim; d++) {
            to_key[(size_t)d * LANES] = half_of(key[d]);
            to_value[d] = half_of(value[d]);
        }
        memset(to_value + cache->head_dim, 0, (cache->value_stride - cache->head_dim) * sizeof *to_value);
    }
}

static void put_word(uint8_t *bytes, uint32_t word)
{
    for (int i = 0; i < 4; i++)
        bytes[i] = (uint8_t)(word >> (8 * i));
}

static uint32_t word_at(const uint8_t *bytes)
{
    return (uint32_t)bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

static size_t state_bytes(const struct cache *cache, uint32_t positions)
{
    if (cache->key_scales != NULL)
        return STATE_WORDS * 4 + p2_state_bytes(cache, positions);
    const size_t elements = (size_t)cache->layers * positions * cache->kv_heads * cache->head_dim * 2;
    return STATE_WORDS * 4 + elements * sizeof(uint16_t);
}

size_t cache_state_bytes(const struct cache *cache, uint32_t sequence)
{
    return state_bytes(cache, cache->lengths[sequence]);
}

void cache_export(const struct cache *cache, uint32_t sequence, uint8_t *state)
{
    const uint32_t positions = cache->lengths[sequence], dims = cache->head_dim;
    const uint32_t words[STATE_WORDS] = {STATE_MAGIC, STATE_VERSION(cache), cache->layers, cache->kv_heads, dims,
                                        positions};
    for (int i = 0; i < STATE_WORDS; i++, state += 4)
        put_word(state, words[i]);
    if (cache->key_scales != NULL) {
        p2_export(cache, sequence, state);
        return;
    }
    for (uint32_t layer = 0; layer < cache->layers; layer++)
        for (uint32_t p = 0; p < positions; p++)
            for (uint32_t head = 0; head < cache->kv_heads; head++) {
                const uint16_t *key = key_at(cache, layer, sequence, head, p);
                for (uint32_t d = 0; d < dims; d++, state += sizeof *key)
                    memcpy(state, key + (size_t)d * LANES, sizeof *key);
                memcpy(state, value_at(cache, layer, sequence, head, p), dims * sizeof *key);
                state += dims * sizeof *key;
            }
}

bool cache_import(const struct cache *cache, uint32_t sequence, const uint8_t *state, size_t nbytes)
{
    const uint32_t dims = cache->head_dim;
    const uint32_t words[STATE_WORDS - 1] = {STATE_MAGIC, STATE_VERSION(cache), cache->layers, cache->kv_heads, dims};
    if (nbytes < STATE_WORDS * 4)
        return false;
    for (int i = 0; i < STATE_WORDS - 1; i++)
        if (word_at(state + i * 4) != words[i])
            return false;
    const uint32_t positions = word_at(state + (STATE_WORDS - 1) * 4);
    if (positions > cache->context || nbytes != state_bytes(cache, positions))
        return false;
    state += STATE_WORDS * 4;
    cache->lengths[sequence] = positions;
    if (cache->key_scales != NULL) {
        p2_import(cache, sequence, positions, state);
        return true;
    }
    for (uint32_t layer = 0; layer < cache->layers; layer++)
        for (uint32_t p = 0; p < positions; p++)
            for (uint32_t head = 0; head < cache->kv_heads; head++) {
                uint16_t *key = key_at(cache, layer, sequence, head, p);
                uint16_t *value = value_at(cache, layer, sequence, head, p);
                for (uint32_t d = 0; d < dims; d++, state += sizeof *key)
                    memcpy(key + (size_t)d * LANES, state, sizeof *key);
                memcpy(value, state, dims * sizeof *key);
                memset(value + dims, 0, (cache->value_stride - dims) * sizeof *value);
                state += dims * sizeof *key;
            }
    return true;
}
