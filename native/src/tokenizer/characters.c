/* UTF-8, and what a character is to a pre-tokenizer. */
#include "parts.h"

static bool continues(uint8_t byte)
{
    return (byte & 0xC0) == 0x80;
}

uint32_t character_at(const uint8_t *at, const uint8_t *end, uint32_t *nbytes)
{
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000}; /* a longer form of fewer is no UTF-8 */
    *nbytes = 1;
    if (at[0] < 0x80)
        return at[0];
    uint32_t length = at[0] >= 0xF0 ? 4 : at[0] >= 0xE0 ? 3 : 2;
    if (at[0] < 0xC2 || at[0] > 0xF4 || (size_t)(end - at) < length)
        return NO_CHARACTER;
    uint32_t character = at[0] & (0x7Fu >> length);
    for (uint32_t i = 1; i < length; i++) {
        if (!continues(at[i]))
            return NO_CHARACTER;
        character = character << 6 | (at[i] & 0x3Fu);
    }
    if (character < least[length] || character > 0x10FFFF || (character >= 0xD800 && character <= 0xDFFF))
        return NO_CHARACTER;
    *nbytes = length;
    return character;
}

enum character_class character_class_of(uint32_t character)
{
    if (character >= unicode_end)
        return CLASS_OTHER;
    uint32_t inside = character % UNICODE_BLOCK;
    uint8_t four = unicode_classes[unicode_block_of[character / UNICODE_BLOCK]][inside / 4];
    return (enum character_class)(four >> (inside % 4 * 2) & 3);
}

bool is_escaped_space(const uint8_t *at, const uint8_t *end)
{
    return (size_t)(end - at) >= ESCAPED_SPACE_BYTES && at[0] == 0xE2 && at[1] == 0x96 && at[2] == 0x81;
}
