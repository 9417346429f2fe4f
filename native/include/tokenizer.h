/* Text to token ids and back, from the tokenizer arrays of a GGUF file.
 *
 * A *tokenizer* is immutable once made and may be shared by any number of threads; each of them brings its own
 * scratch memory. The caller owns all memory. The library allocates nothing, prints nothing, never exits, and takes
 * every array as untrusted input. Nothing here knows files: the arrays are borrowed as they stand in one.
 *
 * Families (tokenizer.ggml.model):
 *   "llama"  SentencePiece BPE: the pair whose piece has the best score is merged first, of equals the leftmost.
 *   "t5"     SentencePiece unigram: the best path by Viterbi. Only without a normaliser of its own.
 *   "gpt2"   byte-level BPE with merges, and one of these pre-tokenizers (tokenizer.ggml.pre):
 *              llama-bpe, llama3, llama-v3, falcon3, falcon-h1, falcon_e   the regex of Llama 3; words that are
 *                                                                          tokens are taken whole, without merging
 *              gpt-2, olmo                                                 the regex of GPT-2
 *              smollm                                                      digits one by one, then that of GPT-2
 * Letters, numbers and white space are those of Unicode 16.0.0. A file that names no pre-tokenizer is refused: only
 * its caller can know better (those of BitNet b1.58 2B-4T mean llama-bpe).
 *
 * Bytes that are no UTF-8 are text, too: each of them stands for a character that is neither letter nor number nor
 * white space (as U+FFFD is). Byte-level BPE keeps the byte, SentencePiece falls back to its byte token or to the
 * unknown token. So text is never changed on its way in, except for what a vocabulary cannot spell.
 */
#ifndef CORDEE_TOKENIZER_H
#define CORDEE_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define TOKENIZER_API __declspec(dllexport)
#else
#define TOKENIZER_API __attribute__((visibility("default")))
#endif

#define TOKENIZER_ALIGNMENT 8           /* of the memory for a tokenizer and of scratch memory */
#define TOKENIZER_TOKENS_MAX (1u << 20) /* five times the largest vocabulary in use */
#define TOKENIZER_MERGES_MAX (1u << 21)
#define TOKENIZER_PIECE_BYTES_MAX 1024u /* bytes of one token; runs of 256 spaces are the longest in use */
#define TOKENIZER_TEXT_BYTES_MAX (16u << 20) /* of one call: four times a prompt of a million tokens */

#define TOKENIZER_NONE (-1)  /* no such token */
#define TOKENIZER_UNSET (-1) /* the file does not say: the family's default holds */

typedef enum {
    TOKENIZER_OK = 0,
    TOKENIZER_BAD_FILE = 1,    /* arrays that contradict themselves or one another */
    TOKENIZER_UNSUPPORTED = 2, /* a sound vocabulary of a family that is not listed above */
    TOKENIZER_REFUSED = 3,     /* the caller asks for what cannot be: text too long, a token id that does not exist */
    TOKENIZER_NO_ROOM = 4      /* memory, scratch or output are too small */
} tokenizer_status;

/* What went wrong, in a sentence without a full stop. Filled only when a status is not TOKENIZER_OK. */
typedef struct {
    char text[256];
} tokenizer_error;

/* An array of strings as it stands in a GGUF file: each a 64-bit little-endian length and that many bytes. */
typedef struct {
    const uint8_t *bytes; /* need not be aligned */
    size_t nbytes;
    uint32_t count;
} tokenizer_strings;

/* What a GGUF file says of its tokenizer; the field names are those of tokenizer.ggml.*. Numbers are TOKENIZER_UNSET
 * and pointers NULL where the key is absent. `tokens`, `scores` and `types` must outlive the tokenizer; the rest is
 * read while it is made. */
typedef struct {
    const char *model; /* ends with a zero, as `pre` does */
    const char *pre;
    tokenizer_strings tokens;
    const uint8_t *scores;    /* tokens.count little-endian 32-bit floats; need not be aligned */
    const uint8_t *types;     /* token_type: tokens.count little-endian 32-bit integers; need not be aligned */
    tokenizer_strings merges; /* count 0 where the family has none */
    int32_t bos_token_id, eos_token_id, unknown_token_id;
    int32_t add_bos_token, add_eos_token, add_space_prefix; /* 0, 1 or TOKENIZER_UNSET */
    bool normalises; /* precompiled_charsmap is there or remove_extra_whitespaces is true: not supported */
} tokenizer_source;

typedef struct tokenizer tokenizer;

/* Bytes that tokenizer_make wants; 0 if the source is refused (tokenizer_make says why). Bytes a token: 40
 * to 75 for byte-level BPE, 12 to 20 for "llama", some 120 for "t5". */
TOKENIZER_API size_t tokenizer_bytes(const tokenizer_source *source);

/* Make a tokenizer in `memory`: `nbytes` of them, aligned to TOKENIZER_ALIGNMENT, owned by the caller for as long as
 * `*made` is used. Nothing has to be given back. `error` may be NULL. */
TOKENIZER_API tokenizer_status tokenizer_make(void *memory, size_t nbytes, const tokenizer_source *source,
                                              const tokenizer **made, tokenizer_error *error);

/* What tokenizer_encode may do beyond plain text. */
#define TOKENIZER_CONTROL 1u /* control tokens are read where their text stands; otherwise that text is only text */
#define TOKENIZER_ENDS 2u    /* BOS in front and EOS behind, where the file asks for them */

/* Scratch bytes that suffice to encode any text of `text_bytes`. With less, tokenizer_encode still manages all texts
 * whose longest word fits: sizes are linear, so a program with little memory asks for that of its longest word. */
TOKENIZER_API size_t tokenizer_scratch_bytes(const tokenizer *it, size_t text_bytes);

/* Tokens that any text of `text_bytes` gives at most. */
TOKENIZER_API size_t tokenizer_tokens_max(const tokenizer *it, size_t text_bytes);

/* Encode `text`, which needs no zero at its end. Writes at most `capacity` ids to `tokens` (NULL if 0) and the number
 * of ids of the whole text to `*count`: with a larger number than capacity the status is TOKENIZER_NO_ROOM.
 * User-defined tokens are always read where their text stands, the longest first. A "llama" or "t5" vocabulary puts a
 * space in front of the text and after each such token, unless the file says no. `scratch` is free afterwards. */
TOKENIZER_API tokenizer_status tokenizer_encode(const tokenizer *it, const void *text, size_t text_bytes,
                                                unsigned flags, void *scratch, size_t scratch_bytes, int32_t *tokens,
                                                size_t capacity, size_t *count);

/* Turn `count` ids into bytes, which may end within a character: what a stream of calls writes, joined, is the text.
 * Control tokens give nothing, or their text with TOKENIZER_CONTROL. `*at_start` (NULL: no) says that the text begins
 * here; the space that encoding put in front is then left out, and `*at_start` is false once text was written. Writes
 * at most `capacity` bytes and to `*nbytes` how many the ids have; if they do not fit, TOKENIZER_NO_ROOM, and
 * `*at_start` is as it was. An id outside the vocabulary is refused. */
TOKENIZER_API tokenizer_status tokenizer_decode(const tokenizer *it, const int32_t *tokens, size_t count,
                                                unsigned flags, bool *at_start, void *bytes, size_t capacity,
                                                size_t *nbytes);

TOKENIZER_API uint32_t tokenizer_count(const tokenizer *it); /* ids are 0 to this - 1 */
TOKENIZER_API int32_t tokenizer_bos(const tokenizer *it);    /* or TOKENIZER_NONE */
TOKENIZER_API int32_t tokenizer_eos(const tokenizer *it);    /* or TOKENIZER_NONE */

/* Whether this is a control token or the unknown token: neither is given for its own text, and neither decodes to
 * any, unless TOKENIZER_CONTROL is asked for. False outside the vocabulary. */
TOKENIZER_API bool tokenizer_is_control(const tokenizer *it, int32_t token);

/* The control or user-defined token of exactly this text, such as "<|im_end|>", or TOKENIZER_NONE. */
TOKENIZER_API int32_t tokenizer_named(const tokenizer *it, const void *text, size_t text_bytes);

#ifdef __cplusplus
}
#endif

#endif
