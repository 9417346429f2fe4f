/* The merges of byte-level BPE: which two tokens become one, and how early. */
#include <string.h>

#include "parts.h"

static uint32_t *slot_of(const struct merges *merges, uint32_t left, uint32_t right)
{
    uint32_t at = lookup_hash(left, right);
    for (uint32_t probes = 0; probes < PROBES_MAX; probes++, at++) {
        uint32_t *slot = &merges->slots[at & merges->mask];
        if (*slot == EMPTY || (merges->all[*slot].left == left && merges->all[*slot].right == right))
            return slot;
    }
    return NULL;
}

/* A merge's two strings, together in `pair` and with one space between in the file. */
struct written {
    uint8_t pair[TOKENIZER_PIECE_BYTES_MAX];
    size_t left, both; /* bytes of the first, of both */
};

static bool read_merge(const uint8_t *string, size_t nbytes, struct written *merge)
{
    const uint8_t *space = nbytes > 0 ? memchr(string + 1, ' ', nbytes - 1) : NULL;
    if (!space || nbytes > TOKENIZER_PIECE_BYTES_MAX + 1)
        return false;
    merge->left = (size_t)(space - string);
    merge->both = nbytes - 1;
    memcpy(merge->pair, string, merge->left);
    memcpy(merge->pair + merge->left, space + 1, merge->both - merge->left);
    return true;
}

/* The plain token that a merge's string stands for. */
static int32_t token_of(const tokenizer *it, const uint8_t *string, size_t nbytes)
{
    uint8_t bytes[TOKENIZER_PIECE_BYTES_MAX];
    size_t length = from_byte_alphabet(string, nbytes, bytes);
    return length == SIZE_MAX ? TOKENIZER_NONE : lookup_find(it, bytes, length);
}

/* False if a string is no plain token. */
static bool resolve_merge(const tokenizer *it, const struct written *from, struct merge *merge)
{
    int32_t left = token_of(it, from->pair, from->left);
    int32_t right = token_of(it, from->pair + from->left, from->both - from->left);
    int32_t result = token_of(it, from->pair, from->both);
    *merge = (struct merge){(uint32_t)left, (uint32_t)right, (uint32_t)result};
    return left >= 0 && right >= 0 && result >= 0;
}

/* Such a merge is left out: a user-defined token is found before any merging, a control token must not be merged. */
static bool names_special(const tokenizer *it, const struct written *merge)
{
    return tokenizer_named(it, merge->pair, merge->left) >= 0 || tokenizer_named(it, merge->pair, merge->both) >= 0 ||
           tokenizer_named(it, merge->pair + merge->left, merge->both - merge->left) >= 0;
}

tokenizer_status bpe_ranks_make(tokenizer *it, const tokenizer_strings *strings, tokenizer_error *error)
{
    const uint8_t *string;
    struct written written;
    size_t offset = 0, nbytes;
    for (uint32_t rank = 0; rank < strings->count; rank++) {
        struct merge *merge = &it->merges.all[rank];
        if (!piece_next(strings, &offset, &string, &nbytes))
            return tokenizer_fail_at(error, "the array of merges ends within merge", rank);
        if (!read_merge(string, nbytes, &written))
            return tokenizer_fail_at(error, "no two strings are merge", rank);
        if (!resolve_merge(it, &written, merge)) {
            if (names_special(it, &written))
                continue;
            return tokenizer_fail_at(error, "what is not in the vocabulary is named by merge", rank);
        }
        uint32_t *slot = slot_of(&it->merges, merge->left, merge->right);
        if (!slot)
            return tokenizer_fail_at(error, "merges were chosen to collide: merge", rank);
        *slot = rank;
    }
    return TOKENIZER_OK;
}

uint32_t bpe_rank(const struct merges *merges, uint32_t left, uint32_t right)
{
    uint32_t *slot = slot_of(merges, left, right);
    return slot ? *slot : EMPTY;
}
