/* Makes a tokenizer: checks the arrays once, then lays its tables out in the caller's memory. */
#include <math.h>
#include <string.h>

#include "parts.h"

/* What the first pass over a source finds out. */
struct survey {
    enum family family;
    word_end *word;
    bool whole_words;
    uint32_t specials_bytes, pieces_bytes; /* of all special tokens; of all strings, where a trie holds them */
    bool spans_words;                      /* a piece goes on after a space within it */
};

struct pre_tokenizer {
    const char *name;
    word_end *word;
    bool whole_words;
};

static const struct pre_tokenizer pre_tokenizers[] = {
    {"llama-bpe", word_of_llama3, true}, {"llama3", word_of_llama3, true},    {"llama-v3", word_of_llama3, true},
    {"falcon3", word_of_llama3, true},   {"falcon-h1", word_of_llama3, true}, {"falcon_e", word_of_llama3, true},
    {"gpt-2", word_of_gpt2, false},      {"olmo", word_of_gpt2, false},       {"smollm", word_of_smollm, false},
};

static tokenizer_status find_family(const tokenizer_source *source, struct survey *survey, tokenizer_error *error)
{
    if (!source->model)
        return tokenizer_fail(error, TOKENIZER_BAD_FILE, "the file names no tokenizer model");
    if (source->normalises)
        return tokenizer_fail(error, TOKENIZER_UNSUPPORTED, "tokenizers with a normaliser are not supported");
    if (strcmp(source->model, "llama") == 0 || strcmp(source->model, "t5") == 0) {
        survey->family = source->model[0] == 'l' ? FAMILY_SCORES : FAMILY_UNIGRAM;
        if (!source->scores)
            return tokenizer_fail(error, TOKENIZER_BAD_FILE, "the tokens have no scores");
        return TOKENIZER_OK;
    }
    if (strcmp(source->model, "gpt2") != 0)
        return tokenizer_fail(error, TOKENIZER_UNSUPPORTED, "this tokenizer model is not supported");
    survey->family = FAMILY_BYTES;
    for (size_t i = 0; i < sizeof pre_tokenizers / sizeof pre_tokenizers[0]; i++)
        if (source->pre && strcmp(source->pre, pre_tokenizers[i].name) == 0) {
            survey->word = pre_tokenizers[i].word;
            survey->whole_words = pre_tokenizers[i].whole_words;
            return TOKENIZER_OK;
        }
    return tokenizer_fail(error, TOKENIZER_UNSUPPORTED, "this pre-tokenizer is not supported, or none is named");
}

static bool is_special(int type)
{
    return type == PIECE_CONTROL || type == PIECE_UNKNOWN || type == PIECE_USER_DEFINED;
}

/* Whether a space follows another character in a piece, so that no text may be cut in front of every space. */
static bool goes_on_after_space(const uint8_t *string, size_t nbytes)
{
    return word_of_sentencepiece(string, string + nbytes) != string + nbytes;
}

static tokenizer_status survey_token(const tokenizer_source *source, uint32_t token, const uint8_t *string,
                                     size_t nbytes, struct survey *survey, tokenizer_error *error)
{
    int type = source->types ? (int)piece_u32(source->types + 4 * (size_t)token) : PIECE_NORMAL;
    if (nbytes > TOKENIZER_PIECE_BYTES_MAX)
        return tokenizer_fail_at(error, "absurdly long is token", token);
    if (source->scores && !isfinite(piece_float(source->scores + 4 * (size_t)token)))
        return tokenizer_fail_at(error, "no finite score has token", token);
    if (is_special(type))
        survey->specials_bytes += (uint32_t)nbytes;
    else if (survey->family == FAMILY_UNIGRAM)
        survey->pieces_bytes += (uint32_t)nbytes;
    if (survey->family != FAMILY_BYTES && !is_special(type) && goes_on_after_space(string, nbytes))
        survey->spans_words = true;
    return TOKENIZER_OK;
}

static tokenizer_status survey_source(const tokenizer_source *source, struct survey *survey, tokenizer_error *error)
{
    *survey = (struct survey){0};
    tokenizer_status status = find_family(source, survey, error);
    if (status != TOKENIZER_OK)
        return status;
    const tokenizer_strings *tokens = &source->tokens;
    if (tokens->count == 0 || tokens->count > TOKENIZER_TOKENS_MAX || source->merges.count > TOKENIZER_MERGES_MAX)
        return tokenizer_fail(error, TOKENIZER_BAD_FILE, "the file has no tokens, or too many tokens or merges");
    const uint8_t *string;
    size_t offset = 0, nbytes;
    for (uint32_t token = 0; token < tokens->count; token++) {
        if (!piece_next(tokens, &offset, &string, &nbytes) || offset > UINT32_MAX)
            return tokenizer_fail_at(error, "the array of tokens ends within token", token);
        status = survey_token(source, token, string, nbytes, survey, error);
        if (status != TOKENIZER_OK)
            return status;
        if (survey->specials_bytes > TRIE_BYTES_MAX || survey->pieces_bytes > TRIE_BYTES_MAX)
            return tokenizer_fail_at(error, "the tokens are too long, up to token", token);
    }
    if (survey->family != FAMILY_BYTES)
        survey->word = survey->spans_words ? word_is_all : word_of_sentencepiece;
    return TOKENIZER_OK;
}

/* Memory is handed out in order, in units of TOKENIZER_ALIGNMENT. With a NULL base it is only counted. */
struct arena {
    uint8_t *base;
    size_t used;
};

static void *take(struct arena *arena, size_t count, size_t each_nbytes)
{
    void *start = arena->base ? arena->base + arena->used : NULL;
    size_t nbytes = count * each_nbytes;
    arena->used += (nbytes + TOKENIZER_ALIGNMENT - 1) / TOKENIZER_ALIGNMENT * TOKENIZER_ALIGNMENT;
    return start;
}

/* `it` is a place to lay out: in the arena if it has a base, elsewhere if the bytes are only counted. */
static void lay_out(tokenizer *it, struct arena *arena, const tokenizer_source *source, const struct survey *survey)
{
    uint32_t slots = lookup_slots(source->tokens.count), merges = lookup_slots(source->merges.count);
    uint32_t specials = lookup_slots(survey->specials_bytes), pieces = lookup_slots(survey->pieces_bytes);
    it->offsets = take(arena, source->tokens.count, sizeof *it->offsets);
    it->lookup.slots = take(arena, slots, sizeof *it->lookup.slots);
    it->specials.edges = take(arena, specials, sizeof *it->specials.edges);
    it->lookup.mask = slots - 1;
    it->specials.mask = specials - 1;
    if (survey->family == FAMILY_BYTES) {
        it->merges.all = take(arena, source->merges.count, sizeof *it->merges.all);
        it->merges.slots = take(arena, merges, sizeof *it->merges.slots);
        it->merges.mask = merges - 1;
    }
    if (survey->family == FAMILY_UNIGRAM) {
        it->pieces.edges = take(arena, pieces, sizeof *it->pieces.edges);
        it->pieces.mask = pieces - 1;
    }
}

static size_t bytes_of(const tokenizer_source *source, const struct survey *survey)
{
    tokenizer it;
    struct arena counting = {NULL, 0};
    take(&counting, 1, sizeof it);
    lay_out(&it, &counting, source, survey);
    return counting.used;
}

size_t tokenizer_bytes(const tokenizer_source *source)
{
    struct survey survey;
    return survey_source(source, &survey, NULL) == TOKENIZER_OK ? bytes_of(source, &survey) : 0;
}

static int32_t within(int32_t token, uint32_t count)
{
    return token >= 0 && (uint32_t)token < count ? token : TOKENIZER_NONE;
}

static void settle(tokenizer *it, const tokenizer_source *source, const struct survey *survey)
{
    bool sentencepiece = survey->family != FAMILY_BYTES;
    it->family = survey->family;
    it->word = survey->word;
    it->whole_words = survey->whole_words;
    it->count = source->tokens.count;
    it->strings = source->tokens.bytes;
    it->scores = source->scores;
    it->types = source->types;
    it->bos = within(source->bos_token_id, it->count);
    it->eos = within(source->eos_token_id, it->count);
    it->unknown = sentencepiece ? within(source->unknown_token_id, it->count) : TOKENIZER_NONE;
    /* As libllama: Llama's vocabularies want BOS although older files do not say so. */
    bool wants_bos = survey->family == FAMILY_SCORES || survey->whole_words;
    it->add_bos = source->add_bos_token == TOKENIZER_UNSET ? wants_bos : source->add_bos_token != 0;
    it->add_eos = source->add_eos_token == TOKENIZER_UNSET ? false : source->add_eos_token != 0;
    it->add_space_prefix = sentencepiece && source->add_space_prefix != 0;
    for (int byte = 0; byte < 256; byte++)
        it->byte_tokens[byte] = TOKENIZER_NONE;
}

static bool add_special(tokenizer *it, uint32_t token, enum piece_type type)
{
    size_t nbytes;
    const uint8_t *string = piece_string(it, token, &nbytes);
    if (nbytes == 0)
        return true;
    it->special_starts[string[0]] = true;
    it->has_user_defined = it->has_user_defined || type == PIECE_USER_DEFINED;
    return trie_add(&it->specials, string, nbytes, token);
}

static bool add_plain(tokenizer *it, uint32_t token, double *lowest_score)
{
    uint8_t bytes[TOKENIZER_PIECE_BYTES_MAX];
    size_t nbytes;
    if (!piece_is_plain(it, token, bytes, &nbytes))
        return true;
    if (it->family == FAMILY_BYTES && nbytes == 1)
        it->byte_tokens[bytes[0]] = (int32_t)token;
    if (it->family == FAMILY_UNIGRAM) {
        double score = (double)piece_score(it, token);
        *lowest_score = score < *lowest_score ? score : *lowest_score;
        return trie_add(&it->pieces, bytes, nbytes, token);
    }
    return lookup_add(it, token, bytes, nbytes);
}

static bool add_token(tokenizer *it, uint32_t token, double *lowest_score)
{
    enum piece_type type = piece_type(it, token);
    if (is_special((int)type))
        return add_special(it, token, type);
    if (type == PIECE_BYTE && it->family != FAMILY_BYTES) {
        int byte = byte_of_piece(it, token);
        if (byte >= 0)
            it->byte_tokens[byte] = (int32_t)token;
        return true;
    }
    return add_plain(it, token, lowest_score);
}

static tokenizer_status fill_tables(tokenizer *it, const tokenizer_source *source, tokenizer_error *error)
{
    const double unknown_penalty = 10.0; /* SentencePiece's kUnkPenalty, below the lowest score */
    double lowest_score = INFINITY;
    const uint8_t *string;
    size_t offset = 0, nbytes;
    for (uint32_t token = 0; token < it->count; token++) {
        piece_next(&source->tokens, &offset, &string, &nbytes);
        it->offsets[token] = (uint32_t)(string - it->strings);
        if (!add_token(it, token, &lowest_score))
            return tokenizer_fail_at(error, "tokens were chosen to collide: token", token);
    }
    it->unknown_score = (isfinite(lowest_score) ? lowest_score : 0.0) - unknown_penalty;
    return it->family == FAMILY_BYTES ? bpe_ranks_make(it, &source->merges, error) : TOKENIZER_OK;
}

tokenizer_status tokenizer_make(void *memory, size_t nbytes, const tokenizer_source *source, const tokenizer **made,
                                tokenizer_error *error)
{
    struct survey survey;
    tokenizer_status status = survey_source(source, &survey, error);
    if (status != TOKENIZER_OK)
        return status;
    size_t wanted = bytes_of(source, &survey);
    if (nbytes < wanted)
        return tokenizer_fail(error, TOKENIZER_NO_ROOM, "too little memory for the tokenizer");
    memset(memory, 0, wanted);
    struct arena arena = {memory, 0};
    tokenizer *it = take(&arena, 1, sizeof *it);
    lay_out(it, &arena, source, &survey);
    memset(it->lookup.slots, 0xFF, (it->lookup.mask + (size_t)1) * sizeof *it->lookup.slots);
    if (survey.family == FAMILY_BYTES)
        memset(it->merges.slots, 0xFF, (it->merges.mask + (size_t)1) * sizeof *it->merges.slots);
    settle(it, source, &survey);
    status = fill_tables(it, source, error);
    if (status == TOKENIZER_OK)
        *made = it;
    return status;
}
