/* The merges of byte-level BPE: which two tokens become one, and how early. */
#include <string.h>

#include "tokenizer_parts.h"

static uint32_t *slot_of(const struct merges *merges, uint32_t left, uint32_t right)
{
    uint32_t at = hash_pair(left, right);
    for (uint32_t probes = 0; probes < PROBES_MAX; probes++, at++) {
        uint32_t *slot = &merges->slots[at & merges->mask];
        if (*slot == EMPTY || (merges->all[*slot].left == left && merges->all[*slot].right == right))
            return slot;
    }
    return NULL;
}

/* Read a merge, two strings with one space between. False if it names what is no plain token. */
static bool read_merge(const tokenizer *it, const uint8_t *string, size_t nbytes, struct merge *merge)
{
    uint8_t bytes[TOKENIZER_PIECE_BYTES_MAX];
    const uint8_t *space = nbytes > 0 ? memchr(string + 1, ' ', nbytes - 1) : NULL;
    if (!space || nbytes > TOKENIZER_PIECE_BYTES_MAX + 1)
        return false;
    size_t before = (size_t)(space - string);
    size_t left = from_byte_alphabet(string, before, bytes);
    if (left == SIZE_MAX)
        return false;
    size_t right = from_byte_alphabet(space + 1, nbytes - before - 1, bytes + left);
    if (right == SIZE_MAX)
        return false;
    int32_t tokens[3] = {lookup_find(it, bytes, left), lookup_find(it, bytes + left, right),
                         lookup_find(it, bytes, left + right)};
    *merge = (struct merge){(uint32_t)tokens[0], (uint32_t)tokens[1], (uint32_t)tokens[2]};
    return tokens[0] >= 0 && tokens[1] >= 0 && tokens[2] >= 0;
}

tokenizer_status merges_make(tokenizer *it, const tokenizer_strings *strings, tokenizer_error *error)
{
    const uint8_t *string;
    size_t offset = 0, nbytes;
    for (uint32_t rank = 0; rank < strings->count; rank++) {
        struct merge *merge = &it->merges.all[rank];
        if (!next_string(strings, &offset, &string, &nbytes))
            return fail(error, TOKENIZER_BAD_FILE, "the array of merges ends within merge", rank);
        if (!read_merge(it, string, nbytes, merge))
            return fail(error, TOKENIZER_BAD_FILE, "what is not in the vocabulary is named by merge", rank);
        uint32_t *slot = slot_of(&it->merges, merge->left, merge->right);
        if (!slot)
            return fail(error, TOKENIZER_BAD_FILE, "merges were chosen to collide: merge", rank);
        *slot = rank;
    }
    return TOKENIZER_OK;
}

uint32_t merges_rank(const struct merges *merges, uint32_t left, uint32_t right)
{
    uint32_t *slot = slot_of(merges, left, right);
    return slot ? *slot : EMPTY;
}
