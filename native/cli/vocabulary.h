/* The tokenizer that a model file holds. */
#ifndef CORDEE_VOCABULARY_H
#define CORDEE_VOCABULARY_H

#include "ternary.h"
#include "tokenizer.h"

/* Bytes of text between two looks of the tokenizer: a longest word. Of a prompt, too. */
#define TEXT_BYTES_MAX 8192u

struct vocabulary {
    const tokenizer *tokenizer;
    void *memory, *scratch;
    size_t scratch_bytes;
    int32_t end;                  /* of a text; TOKENIZER_NONE, here and below: the file has none */
    int32_t turn_start, turn_end; /* in ChatML; without that, whatever ends a turn */
};

/* Make the tokenizer of a file, which must stay mapped; false: *error says why. */
bool vocabulary_open(struct vocabulary *vocabulary, const ternary_file *file, tokenizer_error *error);
void vocabulary_close(struct vocabulary *vocabulary);

#endif
