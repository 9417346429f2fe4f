/* A text into tokens: special tokens first, then the sections between them, word by word. */
#include <string.h>

#include "parts.h"

static const uint8_t one_space[] = {' '};

static size_t word_scratch(const tokenizer *it, size_t nbytes)
{
    size_t copied = it->family == FAMILY_BYTES ? 0 : nbytes + TOKENIZER_ALIGNMENT;
    return copied + (it->family == FAMILY_UNIGRAM ? unigram_scratch(nbytes) : bpe_scratch(nbytes));
}

size_t tokenizer_scratch_bytes(const tokenizer *it, size_t text_bytes)
{
    size_t bounded = text_bytes < TOKENIZER_TEXT_BYTES_MAX ? text_bytes : TOKENIZER_TEXT_BYTES_MAX;
    return word_scratch(it, bounded + sizeof one_space);
}

size_t tokenizer_tokens_max(const tokenizer *it, size_t text_bytes)
{
    size_t bounded = text_bytes < TOKENIZER_TEXT_BYTES_MAX ? text_bytes : TOKENIZER_TEXT_BYTES_MAX;
    /* A special token of one byte gives itself and a space behind, which may take the three bytes of its mark. */
    size_t each = it->family == FAMILY_BYTES ? 1 : 1 + ESCAPED_SPACE_BYTES;
    return (bounded + 1) * each + 2;
}

/* A job: what one call of tokenizer_encode carries along. */
struct job {
    const tokenizer *it;
    unsigned flags;
    uint8_t *scratch;
    size_t scratch_bytes;
    struct output output;
};

/* The longest special token at `at` that may be read, or TOKENIZER_NONE. */
static int32_t special_at(const struct job *job, const uint8_t *at, const uint8_t *end, size_t *nbytes)
{
    const tokenizer *it = job->it;
    uint32_t node = 0;
    int32_t longest = TOKENIZER_NONE, token;
    for (const uint8_t *next = at; next < end && trie_step(&it->specials, &node, *next, &token); next++) {
        if (token == TOKENIZER_NONE)
            continue;
        if ((job->flags & TOKENIZER_CONTROL) || piece_type(it, (uint32_t)token) == PIECE_USER_DEFINED) {
            longest = token;
            *nbytes = (size_t)(next + 1 - at);
        }
    }
    return longest;
}

/* Copy a word for SentencePiece: perhaps a space in front, U+2581 as a space. */
static size_t copy_word(const uint8_t *word, const uint8_t *end, bool prefixed, uint8_t *copy)
{
    size_t nbytes = 0;
    if (prefixed)
        copy[nbytes++] = ' ';
    while (word < end) {
        bool escaped = is_escaped_space(word, end);
        copy[nbytes++] = escaped ? ' ' : *word;
        word += escaped ? ESCAPED_SPACE_BYTES : 1;
    }
    return nbytes;
}

static tokenizer_status encode_word(struct job *job, const uint8_t *word, const uint8_t *end, bool prefixed)
{
    const tokenizer *it = job->it;
    uint8_t *scratch = job->scratch;
    size_t nbytes = (size_t)(end - word) + (prefixed ? 1 : 0);
    if (word_scratch(it, nbytes) > job->scratch_bytes)
        return TOKENIZER_NO_ROOM;
    if (it->family != FAMILY_BYTES) {
        size_t copied = nbytes;
        nbytes = copy_word(word, end, prefixed, scratch);
        word = scratch;
        scratch += (copied + TOKENIZER_ALIGNMENT - 1) / TOKENIZER_ALIGNMENT * TOKENIZER_ALIGNMENT;
    }
    if (it->family == FAMILY_UNIGRAM)
        unigram_word(it, word, nbytes, scratch, &job->output);
    else
        bpe_word(it, word, nbytes, scratch, &job->output);
    return TOKENIZER_OK;
}

/* A text without special tokens. An empty one gives nothing, not even the space in front. */
static tokenizer_status encode_section(struct job *job, const uint8_t *at, const uint8_t *end)
{
    bool prefixed = job->it->add_space_prefix;
    job->output.after_unknown = false;
    while (at < end) {
        const uint8_t *stop = job->it->word(at, end);
        tokenizer_status status = encode_word(job, at, stop, prefixed);
        if (status != TOKENIZER_OK)
            return status;
        prefixed = false;
        at = stop;
    }
    return TOKENIZER_OK;
}

static tokenizer_status encode_text(struct job *job, const uint8_t *text, const uint8_t *end)
{
    const tokenizer *it = job->it;
    bool read_specials = (job->flags & TOKENIZER_CONTROL) || it->has_user_defined;
    const uint8_t *section = text;
    for (const uint8_t *at = text; read_specials && at < end;) {
        size_t nbytes = 1;
        int32_t token = it->special_starts[*at] ? special_at(job, at, end, &nbytes) : TOKENIZER_NONE;
        if (token != TOKENIZER_NONE) {
            tokenizer_status status = encode_section(job, section, at);
            if (status != TOKENIZER_OK)
                return status;
            output_put(&job->output, token);
            section = at + nbytes;
        }
        at += nbytes;
    }
    return encode_section(job, section, end);
}

tokenizer_status tokenizer_encode(const tokenizer *it, const void *text, size_t text_bytes, unsigned flags,
                                  void *scratch, size_t scratch_bytes, int32_t *tokens, size_t capacity,
                                  size_t *count)
{
    struct job job = {it, flags, scratch, scratch_bytes, {tokens, capacity, 0, false}};
    bool ends = flags & TOKENIZER_ENDS;
    tokenizer_status status = TOKENIZER_OK;
    *count = 0;
    if (text_bytes > TOKENIZER_TEXT_BYTES_MAX)
        return TOKENIZER_REFUSED;
    if (ends && it->add_bos && it->bos != TOKENIZER_NONE)
        output_put(&job.output, it->bos);
    if (text_bytes > 0)
        status = encode_text(&job, text, (const uint8_t *)text + text_bytes);
    if (status != TOKENIZER_OK)
        return status;
    if (ends && it->add_eos && it->eos != TOKENIZER_NONE)
        output_put(&job.output, it->eos);
    *count = job.output.count;
    return *count > capacity ? TOKENIZER_NO_ROOM : TOKENIZER_OK;
}
