/* A sequence's state: what leaves a session and comes into another. */
#include "cache_state.h"

#include <string.h>

#include "pentium2/attention.h"

/* "CTKV", version (of the kind), layers, kv_heads, head_dim, positions: little endian 32-bit words. */
#define STATE_WORDS 6
#define STATE_MAGIC 0x564b5443u

static const uint32_t versions[CACHE_KINDS] = {[CACHE_F16] = 1, [CACHE_PENTIUM2] = 2, [CACHE_INT8] = 3};

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
    const size_t each = cache->head_dim * cache_facts[cache->kind].cell_bytes + cache_facts[cache->kind].scale_bytes;
    return STATE_WORDS * 4 + (size_t)cache->layers * positions * cache->kv_heads * each * 2;
}

size_t cache_state_bytes(const struct cache *cache, uint32_t sequence)
{
    return state_bytes(cache, cache->lengths[sequence]);
}

/* Copies one position of one head out to `state`, or in from it; gives what comes behind. */
static uint8_t *copy_out(const struct cache *cache, const struct cache_place *place, uint8_t *state)
{
    const size_t cell_bytes = cache_facts[cache->kind].cell_bytes, scale_bytes = cache_facts[cache->kind].scale_bytes;
    for (int i = 0; i < 2 && scale_bytes > 0; i++, state += scale_bytes)
        memcpy(state, place->scales[i], scale_bytes);
    for (uint32_t d = 0; d < cache->head_dim; d++, state += cell_bytes)
        memcpy(state, place->key + (size_t)d * LANES * cell_bytes, cell_bytes);
    memcpy(state, place->value, cache->head_dim * cell_bytes);
    return state + cache->head_dim * cell_bytes;
}

static const uint8_t *copy_in(const struct cache *cache, const struct cache_place *place, const uint8_t *state)
{
    const size_t cell_bytes = cache_facts[cache->kind].cell_bytes, scale_bytes = cache_facts[cache->kind].scale_bytes;
    const size_t value_bytes = cache->head_dim * cell_bytes;
    for (int i = 0; i < 2 && scale_bytes > 0; i++, state += scale_bytes)
        memcpy(place->scales[i], state, scale_bytes);
    for (uint32_t d = 0; d < cache->head_dim; d++, state += cell_bytes)
        memcpy(place->key + (size_t)d * LANES * cell_bytes, state, cell_bytes);
    memcpy(place->value, state, value_bytes);
    memset(place->value + value_bytes, 0, cache->value_stride * cell_bytes - value_bytes);
    return state + value_bytes;
}

/* What a state begins with, up to the number of positions. */
static void set_words(const struct cache *cache, uint32_t words[STATE_WORDS - 1])
{
    words[0] = STATE_MAGIC;
    words[1] = versions[cache->kind];
    words[2] = cache->layers;
    words[3] = cache->kv_heads;
    words[4] = cache->head_dim;
}

void cache_export(const struct cache *cache, uint32_t sequence, uint8_t *state)
{
    const uint32_t positions = cache->lengths[sequence];
    uint32_t words[STATE_WORDS] = {[STATE_WORDS - 1] = positions};
    set_words(cache, words);
    for (int i = 0; i < STATE_WORDS; i++, state += 4)
        put_word(state, words[i]);
    if (cache->kind == CACHE_PENTIUM2) {
        pentium2_export(cache, sequence, state);
        return;
    }
    for (uint32_t layer = 0; layer < cache->layers; layer++)
        for (uint32_t p = 0; p < positions; p++)
            for (uint32_t head = 0; head < cache->kv_heads; head++) {
                const struct cache_place place = cache_place_at(cache, layer, sequence, head, p);
                state = copy_out(cache, &place, state);
            }
}

bool cache_import(const struct cache *cache, uint32_t sequence, const uint8_t *state, size_t nbytes)
{
    uint32_t words[STATE_WORDS - 1];
    if (nbytes < STATE_WORDS * 4)
        return false;
    set_words(cache, words);
    for (int i = 0; i < STATE_WORDS - 1; i++)
        if (word_at(state + i * 4) != words[i])
            return false;
    const uint32_t positions = word_at(state + (STATE_WORDS - 1) * 4);
    if (positions > cache->context || nbytes != state_bytes(cache, positions))
        return false;
    state += STATE_WORDS * 4;
    cache->lengths[sequence] = positions;
    if (cache->kind == CACHE_PENTIUM2) {
        pentium2_import(cache, sequence, positions, state);
        return true;
    }
    for (uint32_t layer = 0; layer < cache->layers; layer++)
        for (uint32_t p = 0; p < positions; p++)
            for (uint32_t head = 0; head < cache->kv_heads; head++) {
                const struct cache_place place = cache_place_at(cache, layer, sequence, head, p);
                state = copy_in(cache, &place, state);
            }
    return true;
}
