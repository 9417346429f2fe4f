/* The key/value cache, laid out as attention reads it.
 *
 * Of each layer, sequence and key/value head: keys in blocks of LANES positions, [block][head_dim][LANES], so that a
 * vector holds one dimension of LANES positions and no score is summed across lanes; values [position][value_stride].
 * An element is f16, or int8 with one float scale for each position's key and one for its value. Files of the layout
 * `pentium2` have a kind of their own (pentium2/attention.h).
 */
#ifndef CORDEE_CACHE_H
#define CORDEE_CACHE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Positions of keys that lie side by side, and floats of the widest vector. */
#define LANES 16u

enum cache_kind { CACHE_F16, CACHE_INT8, CACHE_PENTIUM2, CACHE_KINDS };

struct cache {
    enum cache_kind kind;
    uint32_t layers, sequences, kv_heads, head_dim;
    uint32_t context;      /* positions of a sequence */
    uint32_t value_stride; /* head_dim, padded to LANES */
    uint8_t *keys, *values;
    float *key_scales, *value_scales; /* of integers only */
    uint32_t *lengths;                /* [sequences]: positions in use */
};

/* Where the keys and values of one head start. */
struct cache_head {
    uint8_t *keys, *values;
    float *key_scales, *value_scales; /* [positions], of integers only */
};

/* The kind of that name, f16 for NULL, or CACHE_KINDS. */
enum cache_kind cache_named(const char *name);

/* Bytes of all keys, of all values, and of the scales of either; all fields but the pointers must be set. */
size_t cache_key_bytes(const struct cache *cache);
size_t cache_value_bytes(const struct cache *cache);
size_t cache_scale_bytes(const struct cache *cache);

struct cache_head cache_head_at(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t head);

/* Store a position: key and value are [kv_heads][head_dim]. */
void cache_store(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t position, const float *key,
                 const float *value);

/* A sequence's state: a small header, then for each layer and position its key and its value as they are kept. */
size_t cache_state_bytes(const struct cache *cache, uint32_t sequence);
void cache_export(const struct cache *cache, uint32_t sequence, uint8_t *state);
/* False, and nothing changed, if the state is not of such a cache, or longer than the context. */
bool cache_import(const struct cache *cache, uint32_t sequence, const uint8_t *state, size_t nbytes);

#endif
