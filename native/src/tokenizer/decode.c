/* Tokens into bytes, and what a vocabulary says of its tokens. */
#include <string.h>

#include "parts.h"

static bool is_token(const tokenizer *it, int32_t token)
{
    return token >= 0 && (uint32_t)token < it->count;
}

bool tokenizer_is_control(const tokenizer *it, int32_t token)
{
    if (!is_token(it, token))
        return false;
    enum piece_type type = piece_type(it, (uint32_t)token);
    return type == PIECE_CONTROL || type == PIECE_UNKNOWN;
}

tokenizer_status tokenizer_decode(const tokenizer *it, const int32_t *tokens, size_t count, unsigned flags,
                                  bool *at_start, void *bytes, size_t capacity, size_t *nbytes)
{
    uint8_t piece[TOKENIZER_PIECE_BYTES_MAX];
    bool start = at_start && *at_start;
    *nbytes = 0;
    for (size_t i = 0; i < count; i++) {
        if (!is_token(it, tokens[i]))
            return TOKENIZER_REFUSED;
        if (tokenizer_is_control(it, tokens[i]) && !(flags & TOKENIZER_CONTROL))
            continue;
        size_t length = piece_bytes(it, (uint32_t)tokens[i], piece);
        size_t skipped = start && it->add_space_prefix && length > 0 && piece[0] == ' ' ? 1 : 0;
        start = start && length == 0;
        length -= skipped;
        if (length > 0 && *nbytes <= capacity && length <= capacity - *nbytes)
            memcpy((uint8_t *)bytes + *nbytes, piece + skipped, length);
        *nbytes += length;
    }
    if (*nbytes > capacity)
        return TOKENIZER_NO_ROOM;
    if (at_start)
        *at_start = start;
    return TOKENIZER_OK;
}

uint32_t tokenizer_count(const tokenizer *it)
{
    return it->count;
}

int32_t tokenizer_bos(const tokenizer *it)
{
    return it->bos;
}

int32_t tokenizer_eos(const tokenizer *it)
{
    return it->eos;
}

int32_t tokenizer_named(const tokenizer *it, const void *text, size_t text_bytes)
{
    uint32_t node = 0;
    int32_t token = TOKENIZER_NONE;
    for (size_t i = 0; i < text_bytes; i++)
        if (!trie_step(&it->specials, &node, ((const uint8_t *)text)[i], &token))
            return TOKENIZER_NONE;
    return token;
}
