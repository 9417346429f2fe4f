/* The key/value cache. */
#include "cache.h"

#include <string.h>

#include "base/half.h"
#include "pentium2/attention.h"

/* "CTKV", version (of the kind), layers, kv_heads, head_dim, positions: little endian 32-bit words. */
#define STATE_WORDS 6
#define STATE_MAGIC 0x564b5443u

static const struct {
    const char *name;
    size_t cell_bytes, scale_bytes;
    uint32_t state_version;
} kinds[CACHE_KINDS] = {
    [CACHE_F16] = {"f16", 2, 0, 1},
    [CACHE_PENTIUM2] = {"pentium2", 1, sizeof(float), 2},
    [CACHE_INT8] = {"int8", 1, sizeof(float), 3},
};

enum cache_kind cache_named(const char *name)
{
    enum cache_kind kind = CACHE_F16;
    while (name != NULL && kind < CACHE_KINDS && strcmp(kinds[kind].name, name) != 0)
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
    return padded_context(cache) * cache->head_dim * kinds[cache->kind].cell_bytes;
}

static size_t head_value_bytes(const struct cache *cache)
{
    return (size_t)cache->context * cache->value_stride * kinds[cache->kind].cell_bytes;
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
    return head_index(cache, cache->layers, 0, 0) * padded_context(cache) * kinds[cache->kind].scale_bytes;
}

struct cache_head cache_head_at(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t head)
{
    const size_t index = head_index(cache, layer, sequence, head), scales = index * padded_context(cache);
    return (struct cache_head){
        .keys = cache->keys + index * head_key_bytes(cache),
        .values = cache->values + index * head_value_bytes(cache),
        .key_scales = kinds[cache->kind].scale_bytes > 0 ? cache->key_scales + scales : NULL,
        .value_scales = kinds[cache->kind].scale_bytes > 0 ? cache->value_scales + scales : NULL,
    };
}

/* One position's key and value of one head: where they lie. */
struct place {
    uint8_t *key;   /* element 0; the next dimension is LANES elements further */
    uint8_t *value; /* [value_stride] */
    float *scales[2];
};

static struct place place_of(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t head,
                             uint32_t position)
{
    const struct cache_head at = cache_head_at(cache, layer, sequence, head);
    const size_t cell_bytes = kinds[cache->kind].cell_bytes, block = position / LANES * LANES;
    struct place place = {
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
    const size_t cell_bytes = kinds[cache->kind].cell_bytes;
    for (uint32_t head = 0; head < cache->kv_heads; head++, key += dims, value += dims) {
        const struct place place = place_of(cache, layer, sequence, head, position);
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
    const size_t each = cache->head_dim * kinds[cache->kind].cell_bytes + kinds[cache->kind].scale_bytes;
    return STATE_WORDS * 4 + (size_t)cache->layers * positions * cache->kv_heads * each * 2;
}

size_t cache_state_bytes(const struct cache *cache, uint32_t sequence)
{
    return state_bytes(cache, cache->lengths[sequence]);
}

/* Copies one position of one head out to `state`, or in from it; gives what comes behind. */
static uint8_t *copy_out(const struct cache *cache, const struct place *place, uint8_t *state)
{
    const size_t cell_bytes = kinds[cache->kind].cell_bytes, scale_bytes = kinds[cache->kind].scale_bytes;
    for (int i = 0; i < 2 && scale_bytes > 0; i++, state += scale_bytes)
        memcpy(state, place->scales[i], scale_bytes);
    for (uint32_t d = 0; d < cache->head_dim; d++, state += cell_bytes)
        memcpy(state, place->key + (size_t)d * LANES * cell_bytes, cell_bytes);
    memcpy(state, place->value, cache->head_dim * cell_bytes);
    return state + cache->head_dim * cell_bytes;
}

static const uint8_t *copy_in(const struct cache *cache, const struct place *place, const uint8_t *state)
{
    const size_t cell_bytes = kinds[cache->kind].cell_bytes, scale_bytes = kinds[cache->kind].scale_bytes;
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
    words[1] = kinds[cache->kind].state_version;
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
                const struct place place = place_of(cache, layer, sequence, head, p);
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
                const struct place place = place_of(cache, layer, sequence, head, p);
                state = copy_in(cache, &place, state);
            }
    return true;
}
