/* The tokenizer that a model file holds. */
#include "vocabulary.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/gguf.h"

#define NAME_BYTES 64 /* of a family or of a pre-tokenizer; the longest known has 14 */

static uint64_t little(const uint8_t *bytes, size_t count)
{
    uint64_t value = 0;
    while (count-- > 0)
        value = value << 8 | bytes[count];
    return value;
}

/* The items of an array of that type; NULL if there is none. */
static const uint8_t *array(const struct gguf *gguf, const char *key, uint32_t type, uint32_t *count, size_t *nbytes)
{
    struct gguf_value value;
    *count = 0;
    *nbytes = 0;
    if (!gguf_find_key(gguf, key, &value) || value.type != GGUF_ARRAY || value.nbytes < 12 ||
        little(value.bytes, 4) != type || little(value.bytes + 4, 8) > UINT32_MAX)
        return NULL;
    *count = (uint32_t)little(value.bytes + 4, 8);
    *nbytes = value.nbytes - 12;
    return value.bytes + 12;
}

static tokenizer_strings string_array(const struct gguf *gguf, const char *key)
{
    tokenizer_strings strings = {0};
    strings.bytes = array(gguf, key, GGUF_STRING, &strings.count, &strings.nbytes);
    return strings;
}

/* Numbers beside the tokens: as many as there are, or none. */
static const uint8_t *number_array(const struct gguf *gguf, const char *key, uint32_t type, uint32_t count)
{
    uint32_t found;
    size_t nbytes;
    const uint8_t *items = array(gguf, key, type, &found, &nbytes);
    return found == count ? items : NULL;
}

static int32_t number(const struct gguf *gguf, const char *key)
{
    uint32_t value;
    return gguf_number(gguf, key, &value) && value <= INT32_MAX ? (int32_t)value : TOKENIZER_UNSET;
}

static void read_source(const struct gguf *gguf, tokenizer_source *source)
{
    struct gguf_value charsmap;
    source->tokens = string_array(gguf, "tokenizer.ggml.tokens");
    source->merges = string_array(gguf, "tokenizer.ggml.merges");
    source->scores = number_array(gguf, "tokenizer.ggml.scores", GGUF_FLOAT32, source->tokens.count);
    source->types = number_array(gguf, "tokenizer.ggml.token_type", GGUF_INT32, source->tokens.count);
    source->bos_token_id = number(gguf, "tokenizer.ggml.bos_token_id");
    source->eos_token_id = number(gguf, "tokenizer.ggml.eos_token_id");
    source->unknown_token_id = number(gguf, "tokenizer.ggml.unknown_token_id");
    source->add_bos_token = number(gguf, "tokenizer.ggml.add_bos_token");
    source->add_eos_token = 0; /* the text is to go on */
    source->add_space_prefix = number(gguf, "tokenizer.ggml.add_space_prefix");
    source->normalises = gguf_find_key(gguf, "tokenizer.ggml.precompiled_charsmap", &charsmap) ||
                         number(gguf, "tokenizer.ggml.remove_extra_whitespaces") == 1;
}

static bool make(struct vocabulary *vocabulary, const tokenizer_source *source, tokenizer_error *error)
{
    const size_t nbytes = tokenizer_bytes(source);
    vocabulary->memory = malloc(nbytes > 0 ? nbytes : 1);
    if (vocabulary->memory == NULL) {
        snprintf(error->text, sizeof error->text, "the machine has no memory for its vocabulary");
        return false;
    }
    if (tokenizer_make(vocabulary->memory, nbytes, source, &vocabulary->tokenizer, error) != TOKENIZER_OK)
        return false;
    vocabulary->scratch_bytes = tokenizer_scratch_bytes(vocabulary->tokenizer, TEXT_BYTES_MAX);
    vocabulary->scratch = malloc(vocabulary->scratch_bytes);
    if (vocabulary->scratch == NULL)
        snprintf(error->text, sizeof error->text, "the machine has no memory to read text in");
    return vocabulary->scratch != NULL;
}

bool vocabulary_open(struct vocabulary *vocabulary, const ternary_file *file, tokenizer_error *error)
{
    struct gguf gguf;
    const char *fault;
    char model[NAME_BYTES], pre[NAME_BYTES];
    tokenizer_source source = {.model = model};
    *vocabulary = (struct vocabulary){0};
    if (!gguf_open(&gguf, file->bytes, file->nbytes, &fault)) {
        snprintf(error->text, sizeof error->text, "it %s", fault);
        return false;
    }
    if (!gguf_text(&gguf, "tokenizer.ggml.model", model, sizeof model)) {
        snprintf(error->text, sizeof error->text, "it holds no tokenizer, so there is no text for its tokens");
        return false;
    }
    if (gguf_text(&gguf, "tokenizer.ggml.pre", pre, sizeof pre))
        source.pre = pre;
    read_source(&gguf, &source);
    if (!make(vocabulary, &source, error)) {
        vocabulary_close(vocabulary);
        return false;
    }
    vocabulary->end = tokenizer_eos(vocabulary->tokenizer);
    vocabulary->turn_start = tokenizer_named(vocabulary->tokenizer, "<|im_start|>", 12);
    vocabulary->turn_end = tokenizer_named(vocabulary->tokenizer, "<|im_end|>", 10);
    if (vocabulary->turn_end == TOKENIZER_NONE)
        vocabulary->turn_end = number(&gguf, "tokenizer.ggml.eot_token_id");
    return true;
}

void vocabulary_close(struct vocabulary *vocabulary)
{
    free(vocabulary->memory);
    free(vocabulary->scratch);
    *vocabulary = (struct vocabulary){0};
}
