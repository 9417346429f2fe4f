/* The key/value cache: f16, laid out as attention reads it.
 *
 * Of each layer, sequence and key/value head: keys in blocks of LANES positions, [block][head_dim][LANES], so that a
 * vector holds one dimension of LANES positions and no score is summed across lanes; values [position][value_stride].
 */
#ifndef CORDEE_CACHE_H
#define CORDEE_CACHE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct cache {
    uint32_t layers, sequences, kv_heads, head_dim;
    uint32_t context;      /* positions of a sequence */
    uint32_t value_stride; /* head_dim, padded to LANES */
    uint16_t *keys, *values;
    float *key_scales, *value_scales; /* of integers instead of f16 (p2_attention.h), or NULL */
    uint32_t *lengths; /* [sequences]: positions in use */
};

/* Elements of all keys and of all values of such a cache; the other fields must be set. */
size_t cache_key_elements(const struct cache *cache);
size_t cache_value_elements(const struct cache *cache);

/* Where the keys and values of one head start. */
uint16_t *cache_keys(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t head);
uint16_t *cache_values(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t head);

/* Store a position: key and value are [kv_heads][head_dim]. */
void cache_store(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t position, const float *key,
                 const float *value);

/* A sequence's state: a small header, then for each layer and position its key and its value, as f16. */
size_t cache_state_bytes(const struct cache *cache, uint32_t sequence);
void cache_export(const struct cache *cache, uint32_t sequence, uint8_t *state);
/* False, and nothing changed, if the state is not of such a cache, or longer than the context. */
bool cache_import(const struct cache *cache, uint32_t sequence, const uint8_t *state, size_t nbytes);

#endif
