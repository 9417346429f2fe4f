/* The tokens of a text, one after the other, and what stands for a character that is no piece. */
#include "parts.h"

static const uint8_t escaped_space[ESCAPED_SPACE_BYTES] = {0xE2, 0x96, 0x81};

void output_put(struct output *output, int32_t token)
{
    if (output->count < output->capacity)
        output->tokens[output->count] = token;
    output->count++;
    output->after_unknown = false;
}

void output_put_unknown(struct output *output, const tokenizer *it, const uint8_t *bytes, uint32_t nbytes)
{
    if (nbytes == 1 && bytes[0] == ' ') { /* what is missing is the mark that stands for it */
        bytes = escaped_space;
        nbytes = sizeof escaped_space;
    }
    bool have_bytes = true;
    for (uint32_t i = 0; i < nbytes; i++)
        have_bytes = have_bytes && it->byte_tokens[bytes[i]] != TOKENIZER_NONE;
    for (uint32_t i = 0; have_bytes && i < nbytes; i++)
        output_put(output, it->byte_tokens[bytes[i]]);
    if (have_bytes || it->unknown == TOKENIZER_NONE || output->after_unknown)
        return;
    output_put(output, it->unknown);
    output->after_unknown = true;
}
