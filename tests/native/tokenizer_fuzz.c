/* Throws damaged texts and damaged vocabularies at the tokenizer: tokenizer_fuzz CASE ROUNDS SEED.
 *
 * CASE holds what a caller takes from a GGUF file and a text: for each of model, pre, tokens, scores, types, merges,
 * text a 32-bit little-endian length and the bytes, with the counts of tokens and merges in front. Every buffer has
 * exactly the size it claims, so that an address sanitizer sees the first byte beyond. Ends with a sentence and
 * status 1 when a property does not hold.
 */
#include <string.h>

#include "../../native/include/tokenizer.h"
#include "fuzz.h"

enum { MODEL, PRE, TOKENS, SCORES, TYPES, MERGES, TEXT, PARTS };

struct part {
    uint8_t *bytes;
    size_t nbytes;
};

struct fuzz_case {
    uint32_t tokens, merges;
    struct part parts[PARTS];
};

static uint32_t read_number(FILE *file)
{
    uint8_t four[4];
    expect(fread(four, 1, 4, file) == 4, "the case is whole");
    return (uint32_t)four[0] | (uint32_t)four[1] << 8 | (uint32_t)four[2] << 16 | (uint32_t)four[3] << 24;
}

static void read_case(const char *path, struct fuzz_case *from)
{
    FILE *file = fopen(path, "rb");
    expect(file != NULL, "the case can be opened");
    from->tokens = read_number(file);
    from->merges = read_number(file);
    for (int i = 0; i < PARTS; i++) {
        struct part *part = &from->parts[i];
        part->nbytes = read_number(file);
        part->bytes = get(part->nbytes);
        expect(fread(part->bytes, 1, part->nbytes, file) == part->nbytes, "the case is whole");
    }
    fclose(file);
}

/* A copy with some bytes changed, or cut short, or none of it. */
static struct part damaged(struct part from, int how_much)
{
    static const uint8_t telling[] = {0x00, 0x20, 0x27, 0x0A, 0x7F, 0x80, 0xBF, 0xC3, 0xE2, 0x96, 0x81, 0xED, 0xF4, 0xFF};
    struct part copy = {NULL, from.nbytes};
    if (how_much > 0 && from.nbytes > 0 && draw(8) == 0)
        copy.nbytes = draw((uint32_t)from.nbytes);
    copy.bytes = get(copy.nbytes);
    memcpy(copy.bytes, from.bytes, copy.nbytes);
    for (int i = 0; copy.nbytes > 0 && i < how_much; i++)
        copy.bytes[draw((uint32_t)copy.nbytes)] = draw(2) ? telling[draw(sizeof telling)] : (uint8_t)draw(256);
    return copy;
}

static void decode_and_compare(const tokenizer *it, const int32_t *tokens, size_t count, struct part text, int lossless)
{
    size_t nbytes = 0;
    bool at_start = true;
    tokenizer_status status = tokenizer_decode(it, tokens, count, TOKENIZER_CONTROL, &at_start, NULL, 0, &nbytes);
    uint8_t *bytes = get(nbytes);
    at_start = true;
    if (status == TOKENIZER_NO_ROOM)
        status = tokenizer_decode(it, tokens, count, TOKENIZER_CONTROL, &at_start, bytes, nbytes, &nbytes);
    expect(status == TOKENIZER_OK, "tokens that were encoded are decoded");
    if (lossless)
        expect(nbytes == text.nbytes && memcmp(bytes, text.bytes, nbytes) == 0, "decoding gives the text back");
    free(bytes);
}

static void encode_and_decode(const tokenizer *it, struct part text, unsigned flags, int lossless)
{
    size_t scratch_bytes = tokenizer_scratch_bytes(it, text.nbytes);
    size_t capacity = tokenizer_tokens_max(it, text.nbytes), count = 0, counted = 0;
    uint8_t *scratch = get(scratch_bytes);
    int32_t *tokens = get(capacity * sizeof *tokens);
    tokenizer_status status =
        tokenizer_encode(it, text.bytes, text.nbytes, flags, scratch, scratch_bytes, tokens, capacity, &count);
    expect(status == TOKENIZER_OK, "scratch and output of the stated sizes suffice");
    status = tokenizer_encode(it, text.bytes, text.nbytes, flags, scratch, scratch_bytes, NULL, 0, &counted);
    expect(counted == count && status == (count ? TOKENIZER_NO_ROOM : TOKENIZER_OK), "counting is encoding");
    status = tokenizer_encode(it, text.bytes, text.nbytes, flags, scratch, draw(200), tokens, capacity, &counted);
    expect(status == TOKENIZER_OK ? counted == count : status == TOKENIZER_NO_ROOM, "little scratch is said to be so");
    for (size_t i = 0; i < count; i++)
        expect(tokens[i] >= 0 && (uint32_t)tokens[i] < tokenizer_count(it), "tokens are of the vocabulary");
    decode_and_compare(it, tokens, count, text, lossless);
    free(tokens);
    free(scratch);
}

/* Often only a few bytes of a text: one word that needs all the scratch there is. */
static struct part some_of(struct part text)
{
    uint32_t length = draw(30);
    if (draw(2) || text.nbytes <= length)
        return text;
    return (struct part){text.bytes + draw((uint32_t)(text.nbytes - length)), length};
}

/* One round: damage the text, and with `harm` the vocabulary. */
static void one_round(const struct fuzz_case *from, int harm, int lossless)
{
    struct part parts[PARTS];
    for (int i = 0; i < PARTS; i++) {
        int texts = i == MODEL || i == PRE;
        int how_much = texts ? 0 : i == TEXT ? (int)draw(40) : harm && draw(2) ? (int)draw(6) : 0;
        parts[i] = damaged(i == TEXT ? some_of(from->parts[i]) : from->parts[i], how_much);
    }
    uint32_t tokens = from->tokens - (harm && draw(4) == 0 ? draw(from->tokens) : 0);
    bool whole = parts[SCORES].nbytes == from->parts[SCORES].nbytes && parts[TYPES].nbytes == from->parts[TYPES].nbytes;
    bool has_pre = parts[PRE].nbytes > 1;
    tokenizer_source source = {
        (const char *)parts[MODEL].bytes, has_pre ? (const char *)parts[PRE].bytes : NULL,
        {parts[TOKENS].bytes, parts[TOKENS].nbytes, tokens},
        parts[SCORES].nbytes && whole ? parts[SCORES].bytes : NULL,
        parts[TYPES].nbytes && whole ? parts[TYPES].bytes : NULL,
        {parts[MERGES].bytes, parts[MERGES].nbytes, from->merges},
        (int32_t)draw(300) - 1, (int32_t)draw(300) - 1, 0, (int32_t)draw(3) - 1, (int32_t)draw(3) - 1, -1, false};
    size_t nbytes = tokenizer_bytes(&source);
    void *memory = get(nbytes);
    const tokenizer *it = NULL;
    tokenizer_error error;
    tokenizer_status status = tokenizer_make(memory, nbytes, &source, &it, &error);
    expect(harm || status == TOKENIZER_OK, "a sound vocabulary is accepted");
    if (status == TOKENIZER_OK) {
        unsigned flags = draw(4);
        encode_and_decode(it, parts[TEXT], flags, lossless && !harm && !(flags & TOKENIZER_ENDS));
    } else {
        expect(strlen(error.text) > 10, "a refusal says why");
    }
    free(memory);
    for (int i = 0; i < PARTS; i++)
        free(parts[i].bytes);
}

int main(int argc, char **argv)
{
    struct fuzz_case from;
    expect(argc == 4, "there are a case, a number of rounds and a seed");
    read_case(argv[1], &from);
    state = (uint32_t)atol(argv[3]) * 2654435761u + 1;
    int lossless = strcmp((const char *)from.parts[MODEL].bytes, "gpt2") == 0;
    for (long round = 0; round < atol(argv[2]); round++)
        one_round(&from, (int)(round % 2), lossless);
    for (int i = 0; i < PARTS; i++)
        free(from.parts[i].bytes);
    return 0;
}
