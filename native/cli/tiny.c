/* cordee-tiny: a language model on a machine that has nothing but an operating system.
 *
 *     cordee-tiny MODEL "Once upon a time"
 *
 * One thread, one sequence; everything else is the library's (native/include). The text goes to standard output, all
 * that is said about it to standard error.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "platform.h"
#include "sampler.h"
#include "selftest.h"
#include "stream.h"
#include "vocabulary.h"

#define TOKENS_DEFAULT 256
#define CONTEXT_MAX 4096u /* positions: more would be hours of talk on the machines that this is for */
#define CONTEXT_MIN 32u
#define TURN_TOKENS 64u    /* that a template adds to what is said, and some */
#define MEMORY_SHARE 4u    /* of the free memory, one such part may be the session's; the rest is for weights */
#define PIECE_BYTES 1024u /* of text that a token stands for: TOKENIZER_PIECE_BYTES_MAX */

enum exit_code { EXIT_DONE = 0, EXIT_FAILED = 1, EXIT_USAGE = 2 };

static const char usage[] =
    "usage: cordee-tiny MODEL [\"text to go on from\"] [-n TOKENS] [--greedy] [--seed N]\n"
    "       cordee-tiny --selftest\n"
    "\n"
    "Goes on from a text, with a language model of ternary weights. Without a text it asks\n"
    "for one, again and again, until an empty line.\n"
    "(Continue un texte ; sans texte, pose la question et attend.)\n"
    "\n"
    "  -n TOKENS   how many tokens at most (256)\n"
    "  --greedy    always the likeliest token, instead of chance\n"
    "  --seed N    another chance: the same number gives the same text (1)\n"
    "  --selftest  compute on known numbers, and say whether this machine gets them right\n"
    "\n"
    "MODEL is a file that `cordee convert --target pentium2` wrote.\n";

struct options {
    const char *model, *text;
    long tokens;
    unsigned long seed;
    bool greedy, selftest;
};

struct talk {
    ternary_file file;
    ternary_model *model;
    ternary_shape shape;
    ternary_session *session;
    void *model_memory, *session_memory;
    struct vocabulary vocabulary;
    struct sampler sampler;
    struct stream stream;
    bool streams;
    float *logits; /* [n_vocab] */
    size_t session_bytes;
    uint32_t context;
    uint32_t position;
};

/* ---- Arguments ---- */

static bool read_number(const char *text, long *number)
{
    char *end;
    *number = strtol(text, &end, 10);
    return *text != 0 && *end == 0 && *number >= 0;
}

/* False: what was typed makes no sense. */
static bool read_options(int count, char **words, struct options *options)
{
    long seed = 1;
    *options = (struct options){.tokens = TOKENS_DEFAULT};
    for (int i = 1; i < count; i++) {
        const char *word = words[i];
        if (strcmp(word, "--greedy") == 0)
            options->greedy = true;
        else if (strcmp(word, "--selftest") == 0)
            options->selftest = true;
        else if (strcmp(word, "-n") == 0 || strcmp(word, "--seed") == 0) {
            if (i + 1 == count || !read_number(words[i + 1], word[1] == 'n' ? &options->tokens : &seed))
                return false;
            i++;
        } else if (word[0] == '-' && word[1] != 0)
            return false;
        else if (options->model == NULL)
            options->model = word;
        else if (options->text == NULL)
            options->text = word;
        else
            return false;
    }
    options->seed = (unsigned long)seed;
    return options->selftest || options->model != NULL;
}

/* ---- Opening ---- */

/* Memory aligned as the library wants it; *allocated is what free takes. */
static void *aligned(size_t nbytes, void **allocated)
{
    *allocated = nbytes > 0 ? malloc(nbytes + TERNARY_ALIGNMENT) : NULL;
    if (*allocated == NULL)
        return NULL;
    return (void *)(((uintptr_t)*allocated + TERNARY_ALIGNMENT - 1) / TERNARY_ALIGNMENT * TERNARY_ALIGNMENT);
}

static bool complain(const char *name, const char *what)
{
    fprintf(stderr, "cordee-tiny: %s: %s.\n", name, what);
    return false;
}

static bool open_model(struct talk *talk, const char *path)
{
    ternary_error error;
    if (ternary_file_map(path, &talk->file, &error) != TERNARY_OK) {
        fprintf(stderr, "cordee-tiny: %s.\n", error.text);
        return false;
    }
    const size_t nbytes = ternary_model_bytes(&talk->file);
    void *memory = aligned(nbytes > 0 ? nbytes : 1, &talk->model_memory);
    if (memory == NULL)
        return complain(path, "the machine has no memory for it");
    if (ternary_model_make(memory, &talk->file, &talk->model, &error) != TERNARY_OK)
        return complain(path, error.text);
    ternary_model_shape(talk->model, &talk->shape);
    if (!talk->shape.has_embedding || !talk->shape.has_head)
        return complain(path, "it is a slice of a model; only a whole one can talk");
    tokenizer_error fault;
    if (!vocabulary_open(&talk->vocabulary, &talk->file, &fault))
        return complain(path, fault.text);
    if (tokenizer_count(talk->vocabulary.tokenizer) > talk->shape.n_vocab)
        return complain(path, "its tokenizer has more tokens than its embedding");
    platform_let_go(talk->file.bytes, talk->file.nbytes); /* what only the reading of the header wanted */
    return true;
}

/* Positions for one text, or for any if none is known yet, in a part of the free memory. */
static ternary_config configure(const struct talk *talk, const struct options *options)
{
    const uint64_t most_bytes = platform_free_bytes() / MEMORY_SHARE;
    const uint32_t trained = talk->shape.trained_context;
    ternary_config config = {.sequences = 1, .batch_rows = 1, .threads = 1, .logits = 1};
    config.context = trained > 0 && trained < CONTEXT_MAX ? trained : CONTEXT_MAX;
    if (options->text != NULL && options->tokens < (long)CONTEXT_MAX) {
        const size_t wanted = strlen(options->text) + (size_t)options->tokens + TURN_TOKENS;
        config.context = wanted < config.context ? (uint32_t)wanted : config.context;
    }
    while (config.context / 2 >= CONTEXT_MIN && ternary_session_bytes(talk->model, &config, NULL) > most_bytes)
        config.context /= 2;
    return config;
}

static bool open_session(struct talk *talk, const struct options *options)
{
    const char *path = options->model;
    const ternary_config config = configure(talk, options);
    ternary_error error;
    talk->context = config.context;
    talk->session_bytes = ternary_session_bytes(talk->model, &config, NULL);
    void *memory = aligned(talk->session_bytes, &talk->session_memory);
    talk->logits = malloc(talk->shape.n_vocab * sizeof *talk->logits);
    if (memory == NULL || talk->logits == NULL)
        return complain(path, "the machine has no memory to run it");
    if (ternary_session_make(memory, talk->model, &config, &talk->session, &error) != TERNARY_OK)
        return complain(path, error.text);
    return true;
}

/* Says beforehand how slow a model will be that does not fit beside the session, which is given memory as it is used. */
static void plan(struct talk *talk)
{
    const uint64_t had = platform_free_bytes(), free_bytes = had > talk->session_bytes ? had - talk->session_bytes : 0;
    talk->streams = stream_plan(&talk->stream, talk->model, free_bytes);
    if (!talk->streams)
        return;
    const double seconds = (double)talk->stream.streamed_bytes / talk->stream.bytes_per_second;
    fprintf(stderr,
            "This model is larger than the free memory (%.0f MB for %.0f MB): of each token, %.0f MB come from\n"
            "the disk, which gives %.1f MB/s. Expect %.3g seconds a token at best.\n",
            (double)free_bytes / 1e6, (double)talk->shape.weights_bytes / 1e6,
            (double)talk->stream.streamed_bytes / 1e6, talk->stream.bytes_per_second / 1e6, seconds);
    ternary_session_watch(talk->session, stream_watch, &talk->stream);
}

static bool open_talk(struct talk *talk, const struct options *options)
{
    talk->sampler = (struct sampler){options->greedy, options->seed};
    if (!open_model(talk, options->model) || !open_session(talk, options))
        return false;
    plan(talk);
    return true;
}

static void close_talk(struct talk *talk)
{
    if (talk->session != NULL)
        ternary_session_end(talk->session);
    if (talk->streams)
        platform_read_ahead(NULL, 0); /* nobody reads from the mapping any more */
    vocabulary_close(&talk->vocabulary);
    free(talk->logits);
    free(talk->session_memory);
    free(talk->model_memory);
    ternary_file_unmap(&talk->file);
}

/* ---- Talking ---- */

/* One token through the model; `wanted` says whether its logits are. The measuring tools look for this name. */
void forward(struct talk *talk, int32_t token, uint8_t wanted);

__attribute__((noinline)) void forward(struct talk *talk, int32_t token, uint8_t wanted)
{
    const int32_t position = (int32_t)talk->position++, sequence = 0;
    const ternary_batch batch = {
        .rows = 1, .tokens = &token, .positions = &position, .sequences = &sequence, .outputs = &wanted};
    ternary_error error;
    if (ternary_decode(talk->session, &batch, talk->logits, &error) != TERNARY_OK) {
        fprintf(stderr, "cordee-tiny: %s.\n", error.text);
        exit(EXIT_FAILED);
    }
}

static void print_token(const struct talk *talk, int32_t token, bool *at_start)
{
    char bytes[PIECE_BYTES];
    size_t nbytes;
    if (tokenizer_decode(talk->vocabulary.tokenizer, &token, 1, 0, at_start, bytes, sizeof bytes, &nbytes) !=
        TOKENIZER_OK)
        return; /* an id behind the vocabulary, where embeddings are padded */
    fwrite(bytes, 1, nbytes, stdout);
    fflush(stdout);
}

static bool is_short(size_t nbytes)
{
    if (nbytes > TEXT_BYTES_MAX)
        fprintf(stderr, "cordee-tiny: the text is longer than %u bytes.\n", TEXT_BYTES_MAX);
    return nbytes <= TEXT_BYTES_MAX;
}

/* The ids of a text; NULL, and said why, if there are none. */
static int32_t *tokens_of(struct talk *talk, const char *text, unsigned flags, size_t *count)
{
    const tokenizer *tokenizer = talk->vocabulary.tokenizer;
    const size_t nbytes = strlen(text), room = tokenizer_tokens_max(tokenizer, nbytes);
    if (!is_short(nbytes))
        return NULL;
    int32_t *tokens = malloc((room + 1) * sizeof *tokens);
    if (tokens == NULL ||
        tokenizer_encode(tokenizer, text, nbytes, flags, talk->vocabulary.scratch, talk->vocabulary.scratch_bytes,
                         tokens, room, count) != TOKENIZER_OK) {
        fprintf(stderr, "cordee-tiny: the machine has no memory to read the text in.\n");
        free(tokens);
        return NULL;
    }
    if (*count == 0 && talk->vocabulary.end != TOKENIZER_NONE)
        tokens[(*count)++] = talk->vocabulary.end; /* what stands between texts stands before one */
    return tokens;
}

static bool ends(const struct talk *talk, int32_t token)
{
    return token == talk->vocabulary.end || token == talk->vocabulary.turn_end;
}

/* The last token that is written is not run through the model any more. */
static void report(size_t heard, double hearing_seconds, long made, double making_seconds)
{
    const double a_bit = 1e-6; /* no clock's tick is shorter */
    fprintf(stderr, "\n[%lu tokens read, %.2f tokens/s; %ld written, %.2f tokens/s", (unsigned long)heard,
            (double)heard / (hearing_seconds + a_bit), made,
            made > 1 ? (double)(made - 1) / (making_seconds + a_bit) : 0);
    if (platform_peak_bytes() > 0)
        fprintf(stderr, "; memory %.1f MB", (double)platform_peak_bytes() / 1e6);
    fprintf(stderr, "]\n");
}

/* Feeds a text and prints what follows, up to `limit` tokens. False: the text does not fit, which is only said where
 * nothing stands before it. */
static bool answer(struct talk *talk, const char *text, unsigned flags, long limit, bool at_start)
{
    size_t count;
    long made = 0;
    int32_t *tokens = tokens_of(talk, text, flags, &count);
    if (tokens == NULL)
        return false;
    if (count == 0 || count > talk->context - talk->position) {
        if (talk->position == 0)
            fprintf(stderr, "cordee-tiny: a text of %lu tokens does not fit: 1 to %lu would.\n", (unsigned long)count,
                    (unsigned long)talk->context);
        free(tokens);
        return false;
    }
    const double start = platform_seconds();
    for (size_t i = 0; i < count; i++)
        forward(talk, tokens[i], i + 1 == count);
    free(tokens);
    const double heard = platform_seconds();
    while (made < limit && talk->position < talk->context) {
        const int32_t token = sampler_draw(&talk->sampler, talk->logits, talk->shape.n_vocab);
        if (ends(talk, token))
            break;
        print_token(talk, token, &at_start);
        if (++made < limit && talk->position < talk->context)
            forward(talk, token, 1);
    }
    report(count, heard - start, made, platform_seconds() - heard);
    return true;
}

static void forget(struct talk *talk)
{
    talk->position = 0;
    ternary_sequence_trim(talk->session, 0, 0, NULL);
}

/* A turn in ChatML, after those before: without them where there is no room for both. */
static bool answer_turn(struct talk *talk, const char *line, long limit)
{
    char turn[TEXT_BYTES_MAX + 1];
    const char *before = talk->position > 0 ? "<|im_end|>\n" : "";
    const int nbytes = snprintf(turn, sizeof turn, "%s<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n",
                                before, line);
    if (!is_short((size_t)nbytes))
        return false;
    const bool is_first = talk->position == 0, fits = answer(talk, turn, TOKENIZER_CONTROL, limit, true);
    if (fits || is_first)
        return fits;
    fprintf(stderr, "What was said before is forgotten: there is no room for more.\n");
    forget(talk);
    return answer_turn(talk, line, limit);
}

static bool is_chat(const struct talk *talk)
{
    return talk->vocabulary.turn_start != TOKENIZER_NONE && talk->vocabulary.turn_end != TOKENIZER_NONE;
}

static void converse(struct talk *talk, const struct options *options)
{
    char line[TEXT_BYTES_MAX / 2];
    fprintf(stderr, is_chat(talk) ? "Say something; an empty line ends.\n"
                                  : "Begin a story, and the model goes on; an empty line ends.\n");
    for (;;) {
        fprintf(stderr, "> ");
        if (fgets(line, sizeof line, stdin) == NULL)
            return;
        line[strcspn(line, "\r\n")] = 0;
        if (line[0] == 0)
            return;
        if (is_chat(talk)) {
            answer_turn(talk, line, options->tokens);
            continue;
        }
        forget(talk);
        fputs(line, stdout);
        answer(talk, line, TOKENIZER_ENDS, options->tokens, false);
    }
}

int main(int count, char **words)
{
    static struct talk talk;
    struct options options;
    if (count == 2 && (strcmp(words[1], "--help") == 0 || strcmp(words[1], "-h") == 0)) {
        fputs(usage, stdout);
        return EXIT_DONE;
    }
    if (!read_options(count, words, &options)) {
        fputs(usage, stderr);
        return EXIT_USAGE;
    }
    if (options.selftest)
        return selftest() ? EXIT_DONE : EXIT_FAILED;
    platform_prepare_console();
    bool done = open_talk(&talk, &options);
    if (done && options.text == NULL)
        converse(&talk, &options);
    else if (done && is_chat(&talk))
        done = answer_turn(&talk, options.text, options.tokens);
    else if (done) {
        fputs(options.text, stdout);
        done = answer(&talk, options.text, TOKENIZER_ENDS, options.tokens, options.text[0] == 0);
    }
    close_talk(&talk);
    return done ? EXIT_DONE : EXIT_FAILED;
}
