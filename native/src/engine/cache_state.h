/* A sequence's state as bytes: a small header, then for each layer and position its key and its value as they are
 * kept. */
#ifndef CORDEE_CACHE_STATE_H
#define CORDEE_CACHE_STATE_H

#include "cache.h"

/* Bytes of the sequence's state. */
size_t cache_state_bytes(const struct cache *cache, uint32_t sequence);
/* Write it to `state`, which has room for them. */
void cache_export(const struct cache *cache, uint32_t sequence, uint8_t *state);
/* Replace the sequence by a state. False, and nothing changed, if that is not of such a cache, or longer than the
 * context. */
bool cache_import(const struct cache *cache, uint32_t sequence, const uint8_t *state, size_t nbytes);

#endif
