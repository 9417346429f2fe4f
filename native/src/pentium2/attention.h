/* Attention in integers, for files of the layout `pentium2`: a key/value cache of bytes with a scale for each position
 * and head, in struct cache's memory. Bytes, since from some hundred positions on reading the cache takes a third of a
 * token's time: half the memory is worth more than the instruction that each four of them cost.
 *
 * Of each layer, sequence and head: keys [position / 8][dimension / 2][position % 8][dimension % 2] and values
 * [dimension / 8][position / 2][dimension % 8][position % 2], so that both of attention's sums are
 * lookup_kernels.sum_columns. So contexts and heads are multiples of PENTIUM2_MULTIPLE.
 *
 * No sum wraps: see QUERY_SUM and SHARE_SUM in the .c file. */
#ifndef CORDEE_PENTIUM2_ATTENTION_H
#define CORDEE_PENTIUM2_ATTENTION_H

#include <stdbool.h>

#include "engine/cache.h"
#include "lookup.h"

#define PENTIUM2_MULTIPLE 4u
/* Positions beyond which rounding shares of a head's attention could add up to more than 16 bits. */
#define PENTIUM2_CONTEXT_LIMIT 32768u

/* Store a position: key and value are [kv_heads][head_dim]. */
void pentium2_cache_store(const struct cache *cache, uint32_t layer, uint32_t sequence, uint32_t position,
                          const float *key, const float *value);

/* Floats of scratch that pentium2_attend wants for a cache. */
size_t pentium2_scratch_floats(const struct cache *cache);

/* Attention of `heads` queries [heads][head_dim] over the first `positions` of a head's cache; the results take the
 * queries' place. */
void pentium2_attend(const struct lookup_kernels *kernels, const struct cache *cache, uint32_t layer, uint32_t sequence,
                     uint32_t kv_head, uint32_t heads, float *queries, uint32_t positions, float *scratch);

/* As cache_export and cache_import: for each layer, position and head the key, the value and their scales. */
void pentium2_export(const struct cache *cache, uint32_t sequence, uint8_t *state);
void pentium2_import(const struct cache *cache, uint32_t sequence, uint32_t positions, const uint8_t *state);

#endif
