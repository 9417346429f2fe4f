/* The tokens' strings, as a GGUF file holds them, and the bytes that they stand for. */
#include <string.h>

#include "parts.h"

uint32_t piece_u32(const uint8_t *at)
{
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

float piece_float(const uint8_t *at)
{
    uint32_t bits = piece_u32(at);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

bool piece_next(const tokenizer_strings *strings, size_t *offset, const uint8_t **string, size_t *nbytes)
{
    size_t left = strings->nbytes - *offset;
    if (left < 8)
        return false;
    const uint8_t *at = strings->bytes + *offset;
    *nbytes = piece_u32(at);
    if (piece_u32(at + 4) != 0 || *nbytes > left - 8)
        return false;
    *string = at + 8;
    *offset += 8 + *nbytes;
    return true;
}

/* GPT-2's alphabet for bytes: printable ones stand for themselves, the others for U+0100 and up, in their order. */
static int byte_of_character(uint32_t character)
{
    if ((character > 0x20 && character < 0x7F) || (character > 0xA0 && character < 0x100 && character != 0xAD))
        return (int)character;
    if (character >= 0x100 && character <= 0x120)
        return (int)character - 0x100;
    if (character >= 0x121 && character <= 0x142)
        return (int)character - 0x121 + 0x7F;
    return character == 0x143 ? 0xAD : -1;
}

size_t from_byte_alphabet(const uint8_t *string, size_t nbytes, uint8_t *bytes)
{
    size_t length = 0;
    for (const uint8_t *at = string, *end = string + nbytes; at < end;) {
        uint32_t width;
        int byte = byte_of_character(character_at(at, end, &width));
        if (byte < 0)
            return SIZE_MAX;
        bytes[length++] = (uint8_t)byte;
        at += width;
    }
    return length;
}

const uint8_t *piece_string(const tokenizer *it, uint32_t token, size_t *nbytes)
{
    const uint8_t *string = it->strings + it->offsets[token];
    *nbytes = piece_u32(string - 8);
    return string;
}

int byte_of_piece(const tokenizer *it, uint32_t token)
{
    static const char digits[] = "0123456789ABCDEF";
    size_t nbytes;
    const uint8_t *string = piece_string(it, token, &nbytes);
    if (nbytes != 6 || memcmp(string, "<0x", 3) != 0 || string[5] != '>')
        return -1;
    const char *high = memchr(digits, string[3], 16), *low = memchr(digits, string[4], 16);
    return high && low ? (int)((high - digits) << 4 | (low - digits)) : -1;
}

enum piece_type piece_type(const tokenizer *it, uint32_t token)
{
    if (it->types)
        return (enum piece_type)piece_u32(it->types + 4 * (size_t)token);
    return it->family != FAMILY_BYTES && byte_of_piece(it, token) >= 0 ? PIECE_BYTE : PIECE_NORMAL;
}

float piece_score(const tokenizer *it, uint32_t token)
{
    return it->scores ? piece_float(it->scores + 4 * (size_t)token) : 0.0f;
}

static size_t unescaped(const uint8_t *string, size_t nbytes, uint8_t *bytes)
{
    size_t length = 0;
    for (const uint8_t *at = string, *end = string + nbytes; at < end;) {
        bool space = is_escaped_space(at, end);
        bytes[length++] = space ? ' ' : *at;
        at += space ? ESCAPED_SPACE_BYTES : 1;
    }
    return length;
}

size_t piece_bytes(const tokenizer *it, uint32_t token, uint8_t *bytes)
{
    size_t nbytes, length;
    const uint8_t *string = piece_string(it, token, &nbytes);
    enum piece_type type = piece_type(it, token);
    if (type == PIECE_BYTE && byte_of_piece(it, token) >= 0) {
        bytes[0] = (uint8_t)byte_of_piece(it, token);
        return 1;
    }
    bool spelt = type == PIECE_NORMAL || type == PIECE_UNDEFINED || type == PIECE_UNUSED;
    if (spelt && it->family != FAMILY_BYTES)
        return unescaped(string, nbytes, bytes);
    if (spelt && (length = from_byte_alphabet(string, nbytes, bytes)) != SIZE_MAX)
        return length;
    memcpy(bytes, string, nbytes);
    return nbytes;
}

bool piece_is_plain(const tokenizer *it, uint32_t token, uint8_t *bytes, size_t *nbytes)
{
    size_t length;
    const uint8_t *string = piece_string(it, token, &length);
    enum piece_type type = piece_type(it, token);
    if ((type != PIECE_NORMAL && type != PIECE_UNDEFINED) || length == 0)
        return false;
    *nbytes = it->family == FAMILY_BYTES ? from_byte_alphabet(string, length, bytes) : unescaped(string, length, bytes);
    return *nbytes != SIZE_MAX;
}
