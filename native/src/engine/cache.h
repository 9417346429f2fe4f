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

struct cache_facts {
    const char *name;
    size_t cell_bytes;  /* of an element */
    size_t scale_bytes; /* of a key's or a value's scale; 0: it has none */
};

extern const struct cache_facts cache_facts[CACHE_KINDS];

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

/* Where the key and the value of one position of a head lie; not of the kind `pentium2`. */
struct cache_place {
    uint8_t *key;     /* element 0; the next dimension is LANES elements further */
    uint8_t *value;   /* [value_stride] */
    float *scales[2]; /* of the key, of the value; of integers only */
};

/* The kind of that name, f16 for NULL, or CACHE_KINDS. */
enum cache_kind cache_named(const char *name);

/* Bytes of all keys, of all values, and of the scales of either; all fields but the pointers must be set. */
size_t cache_key_bytes(const struct cache *cache);
size_t cache_value_bytes(const struct cache *cache);
size_t cache_scale_bytes(const struct cache *cache);

struct cache_head cache_head_at(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t head);
/* The same head without its first positions, so many: a multiple of LANES. Not of the kind `pentium2`. */
struct cache_head cache_head_from(const struct cache *cache, struct cache_head head, uint32_t skipped);
struct cache_place cache_place_at(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t head,
                                  uint32_t position);

/* Store a position: key and value are [kv_heads][head_dim]. */
void cache_store(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t position, const float *key,
                 const float *value);

/* Make `target` hold what the first `length` positions of another sequence hold. */
void cache_copy(const struct cache *cache, uint32_t source, uint32_t target, uint32_t length);

#endif
