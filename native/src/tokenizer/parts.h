/* The tokenizer's inner parts, one file each; include/tokenizer.h is what others see. */
#ifndef CORDEE_TOKENIZER_PARTS_H
#define CORDEE_TOKENIZER_PARTS_H

#include "tokenizer.h"

/* An open-addressing table longer than this in one run was filled by somebody who knows the hash: refused. */
#define PROBES_MAX 1024u
#define EMPTY UINT32_MAX

/* tokenizer.ggml.token_type */
enum piece_type {
    PIECE_UNDEFINED = 0,
    PIECE_NORMAL = 1,
    PIECE_UNKNOWN = 2,
    PIECE_CONTROL = 3,
    PIECE_USER_DEFINED = 4,
    PIECE_UNUSED = 5,
    PIECE_BYTE = 6
};

enum family { FAMILY_BYTES, FAMILY_SCORES, FAMILY_UNIGRAM };

/* ---- error.c: failing with a sentence ---- */

/* Fill an error, if there is one to fill, with a text of less than ERROR_TEXT_MAX characters; hand the status on. */
#define ERROR_TEXT_MAX 200u
tokenizer_status tokenizer_fail(tokenizer_error *error, tokenizer_status status, const char *text);
/* The same for TOKENIZER_BAD_FILE, with the number of the token or merge behind the text. */
tokenizer_status tokenizer_fail_at(tokenizer_error *error, const char *text, uint32_t number);

/* ---- characters.c, unicode.c: characters and what they are ---- */

enum character_class { CLASS_OTHER = 0, CLASS_LETTER = 1, CLASS_NUMBER = 2, CLASS_SPACE = 3 };

#define NO_CHARACTER UINT32_MAX /* a byte that is no UTF-8 */

/* The character at `at`, and its size in bytes; `at` < `end`. */
uint32_t character_at(const uint8_t *at, const uint8_t *end, uint32_t *nbytes);
enum character_class character_class_of(uint32_t character);
#define ESCAPED_SPACE_BYTES 3u /* of U+2581, SentencePiece's mark for a space */
bool is_escaped_space(const uint8_t *at, const uint8_t *end);

#define UNICODE_BLOCK 128u /* characters that share a block of classes */
extern const uint32_t unicode_end; /* no letter, number or white space from here on */
extern const uint8_t unicode_block_of[];
extern const uint8_t unicode_classes[][UNICODE_BLOCK / 4]; /* two bits each, the first lowest */

/* ---- pre_tokenize.c: pre-tokenizers ---- */

/* The end of the first word of a text, which is not empty. Every byte belongs to one word. */
typedef const uint8_t *word_end(const uint8_t *at, const uint8_t *end);
word_end word_of_llama3, word_of_gpt2, word_of_smollm, word_of_sentencepiece, word_is_all;

/* ---- pieces.c: the bytes of tokens ---- */

uint32_t piece_u32(const uint8_t *at);
float piece_float(const uint8_t *at);
/* Move past the next string of an array. False if it does not lie within the array. */
bool piece_next(const tokenizer_strings *strings, size_t *offset, const uint8_t **string, size_t *nbytes);
/* The bytes that a string of byte-level BPE's alphabet stands for, or SIZE_MAX if it has any other character. */
size_t from_byte_alphabet(const uint8_t *string, size_t nbytes, uint8_t *bytes);

const uint8_t *piece_string(const tokenizer *it, uint32_t token, size_t *nbytes);
enum piece_type piece_type(const tokenizer *it, uint32_t token);
float piece_score(const tokenizer *it, uint32_t token);
/* What a token spells, at most TOKENIZER_PIECE_BYTES_MAX; SentencePiece's mark as a space. */
size_t piece_bytes(const tokenizer *it, uint32_t token, uint8_t *bytes);
/* Whether plain text may give this token by its spelling. Then `bytes` is that spelling. */
bool piece_is_plain(const tokenizer *it, uint32_t token, uint8_t *bytes, size_t *nbytes);
int byte_of_piece(const tokenizer *it, uint32_t token); /* 0 to 255 for <0x00> to <0xFF>, else -1 */

/* ---- lookup.c: spelling -> token ---- */

struct lookup {
    uint32_t *slots; /* token, or EMPTY */
    uint32_t mask;
};
uint32_t lookup_slots(uint32_t entries); /* a power of two, at least twice `entries` */
uint32_t lookup_hash(uint32_t left, uint32_t right);
bool lookup_add(tokenizer *it, uint32_t token, const uint8_t *bytes, size_t nbytes); /* false: PROBES_MAX */
int32_t lookup_find(const tokenizer *it, const uint8_t *bytes, size_t nbytes);

/* ---- bpe_ranks.c: (token, token) -> rank ---- */

struct merge {
    uint32_t left, right, result;
};
struct merges {
    struct merge *all; /* by rank */
    uint32_t *slots;   /* rank, or EMPTY */
    uint32_t mask;
};
tokenizer_status bpe_ranks_make(tokenizer *it, const tokenizer_strings *merges, tokenizer_error *error);
uint32_t bpe_rank(const struct merges *merges, uint32_t left, uint32_t right); /* or EMPTY */

/* ---- trie.c: the tokens that a text begins with ---- */

struct trie_edge {
    uint32_t key; /* parent node and byte; 0 if empty */
    int32_t token;
};
struct trie {
    struct trie_edge *edges; /* an edge's place + 1 is the node it leads to; 0 is the root */
    uint32_t mask;
};
#define TRIE_BYTES_MAX (1u << 22) /* of all its strings */
_Static_assert(((2ull * TRIE_BYTES_MAX) << 8 | 255) + 1 <= UINT32_MAX, "a node, of twice as many, and a byte fit");
bool trie_add(struct trie *trie, const uint8_t *bytes, size_t nbytes, uint32_t token); /* false: PROBES_MAX */
/* Go from `*node` along a byte; its token (or TOKENIZER_NONE) goes to `*token`. False: no token goes on that way. */
bool trie_step(const struct trie *trie, uint32_t *node, uint8_t byte, int32_t *token);

/* ---- make.c: all of them together ---- */

struct tokenizer {
    enum family family;
    word_end *word;
    bool whole_words; /* a word that is a token is not merged */
    bool add_bos, add_eos, add_space_prefix;
    int32_t bos, eos, unknown;
    uint32_t count;
    const uint8_t *strings; /* borrowed, as are scores and types */
    const uint8_t *scores, *types;
    uint32_t *offsets; /* [count] of a string's first byte in `strings`; its length stands in the 8 bytes before */
    int32_t byte_tokens[256];
    struct lookup lookup;
    struct merges merges; /* FAMILY_BYTES */
    struct trie pieces;   /* FAMILY_UNIGRAM */
    struct trie specials; /* control and user-defined tokens */
    bool special_starts[256];
    bool has_user_defined;
    double unknown_score; /* FAMILY_UNIGRAM */
};

/* ---- output.c: where tokens go ---- */

/* Counts on when `tokens` is full. */
struct output {
    int32_t *tokens;
    size_t capacity, count;
    bool after_unknown; /* the last piece was unknown: the next unknown one joins it */
};
void output_put(struct output *output, int32_t token);
/* A character that is no piece: its byte tokens, or the unknown token. */
void output_put_unknown(struct output *output, const tokenizer *it, const uint8_t *bytes, uint32_t nbytes);

/* ---- bpe.c, unigram.c: one word into tokens ---- */

/* Scratch bytes for a word of `nbytes`. */
size_t bpe_scratch(size_t nbytes);
size_t unigram_scratch(size_t nbytes);
/* Encode a word, which is not empty. `scratch` suffices. */
void bpe_word(const tokenizer *it, const uint8_t *word, size_t nbytes, void *scratch, struct output *output);
void unigram_word(const tokenizer *it, const uint8_t *word, size_t nbytes, void *scratch, struct output *output);

#endif
