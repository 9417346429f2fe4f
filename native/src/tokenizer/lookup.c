/* Which token spells these bytes. */
#include <string.h>

#include "parts.h"

uint32_t lookup_slots(uint32_t entries)
{
    uint32_t slots = 16;
    while (slots < 2 * entries)
        slots *= 2;
    return slots;
}

static uint32_t stirred(uint32_t hash)
{
    hash = (hash ^ hash >> 16) * 0x7FEB352Du;
    hash = (hash ^ hash >> 15) * 0x846CA68Bu;
    return hash ^ hash >> 16;
}

uint32_t lookup_hash(uint32_t left, uint32_t right)
{
    return stirred(left * 0x9E3779B1u ^ stirred(right));
}

static uint32_t hash_bytes(const uint8_t *bytes, size_t nbytes)
{
    uint32_t hash = 0x811C9DC5u; /* FNV-1a */
    for (size_t i = 0; i < nbytes; i++)
        hash = (hash ^ bytes[i]) * 0x01000193u;
    return stirred(hash);
}

static bool spells(const tokenizer *it, uint32_t token, const uint8_t *bytes, size_t nbytes)
{
    uint8_t spelling[TOKENIZER_PIECE_BYTES_MAX];
    size_t length;
    piece_string(it, token, &length);
    if (length < nbytes) /* no piece is spelt longer than its string */
        return false;
    return piece_bytes(it, token, spelling) == nbytes && memcmp(spelling, bytes, nbytes) == 0;
}

/* The slot of these bytes, or where they would go; NULL after PROBES_MAX. */
static uint32_t *slot_of(const tokenizer *it, const uint8_t *bytes, size_t nbytes)
{
    uint32_t at = hash_bytes(bytes, nbytes);
    for (uint32_t probes = 0; probes < PROBES_MAX; probes++, at++) {
        uint32_t *slot = &it->lookup.slots[at & it->lookup.mask];
        if (*slot == EMPTY || spells(it, *slot, bytes, nbytes))
            return slot;
    }
    return NULL;
}

bool lookup_add(tokenizer *it, uint32_t token, const uint8_t *bytes, size_t nbytes)
{
    uint32_t *slot = slot_of(it, bytes, nbytes);
    if (slot)
        *slot = token; /* of two with one spelling the later one, as in a dictionary */
    return slot != NULL;
}

int32_t lookup_find(const tokenizer *it, const uint8_t *bytes, size_t nbytes)
{
    uint32_t *slot = slot_of(it, bytes, nbytes);
    return slot && *slot != EMPTY ? (int32_t)*slot : TOKENIZER_NONE;
}
