/* Holds every kernel of a build against the scalar one, where Python cannot go: under an emulator, with sanitizers.
 *
 *     kernels_check dots SEED  integer dots of random and extreme rows, all layouts
 *     kernels_check logits FILE CACHE  a prompt and some tokens through a model; prints the logits' checksum
 *     kernels_check states FILE CACHE SEED  damaged states of a sequence: taken or refused, and decoding goes on
 *
 * Prints the names of the kernels it ran, and ends with a sentence and status 1 where any bit differs. Every buffer has
 * exactly the size that the library is told, so that an address sanitizer sees the first byte beyond.
 */
#define _DEFAULT_SOURCE /* posix_memalign */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../native/include/ternary.h"

#define PROMPT 50u
#define STEPS 16u
#define ROUNDS 300u

static const struct {
    const char *name;
    uint32_t group_rows, quad_bytes;
} layouts[] = {{"trit2", 64, 64}, {"trit5", 80, 64}, {"int8", 16, 64}, {"int6", 64, 192}, {"int4", 32, 64}};

static uint32_t state;

static uint32_t draw(uint32_t below)
{
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state % below;
}

static void expect(int holds, const char *what, const char *where)
{
    if (holds)
        return;
    fprintf(stderr, "it does not hold that %s (%s)\n", what, where);
    exit(1);
}

static void *get(size_t nbytes)
{
    void *memory = NULL;
    expect(posix_memalign(&memory, TERNARY_ALIGNMENT, nbytes) == 0, "there is memory", "");
    return memory;
}

/* Codes that the layout has: base 3 and 2 bits leave some bytes out. */
static uint8_t weights_byte(uint32_t layout, int extreme)
{
    const uint32_t digits = layout == 0 ? 4 : 5;
    uint32_t value = 0;
    if (layout > 1)
        return (uint8_t)(extreme == 0 ? draw(256) : extreme == 1 ? 255 : 0);
    for (uint32_t i = 0; i < digits; i++)
        value = value * (layout == 0 ? 4 : 3) + (extreme == 0 ? draw(3) : extreme == 1 ? 2 : 0);
    return (uint8_t)(layout == 0 ? value : (value * 256 + 242) / 243);
}

static int8_t activation(int extreme)
{
    if (extreme == 0)
        return (int8_t)((int)draw(255) - 127);
    return extreme == 1 ? 127 : extreme == 2 ? -127 : draw(2) ? 127 : -127;
}

static void check_dots(uint32_t layout, uint32_t groups, uint32_t quads, uint32_t n, int weights, int activations)
{
    const size_t nbytes = (size_t)groups * quads * layouts[layout].quad_bytes, cols = (size_t)quads * 4;
    const size_t count = (size_t)n * groups * layouts[layout].group_rows;
    uint8_t *data = get(nbytes);
    int8_t *x = get(n * cols);
    int32_t *truth = get(count * sizeof *truth), *found = get(count * sizeof *found);
    size_t different = 0;
    for (size_t i = 0; i < nbytes; i++)
        data[i] = weights_byte(layout, weights);
    for (size_t i = 0; i < n * cols; i++)
        x[i] = activation(activations);
    ternary_kernels_dot("scalar", layouts[layout].name, data, groups, quads, x, n, truth, NULL);
    for (size_t i = 1; i < count; i++)
        different += truth[i] != truth[0];
    expect(different > 0 || weights || activations, "random rows differ", layouts[layout].name);
    for (uint32_t at = 0; ternary_kernels_name(at) != NULL; at++) {
        memset(found, 0x55, count * sizeof *found);
        const ternary_status status = ternary_kernels_dot(ternary_kernels_name(at), layouts[layout].name, data, groups,
                                                          quads, x, n, found, NULL);
        expect(status == TERNARY_OK && memcmp(found, truth, count * sizeof *found) == 0,
               "kernels give the scalar one's integers", ternary_kernels_name(at));
    }
    free(data), free(x), free(truth), free(found);
}

static void dots(void)
{
    static const uint32_t rows[] = {1, 2, 3, 4, 5, 6, 7, 13, 16, 17, 32, 47, 150};
    for (uint32_t layout = 0; layout < sizeof layouts / sizeof *layouts; layout++) {
        for (uint32_t i = 0; i < sizeof rows / sizeof *rows; i++)
            check_dots(layout, 1 + draw(6), 4 * (1 + draw(60)), rows[i], 0, 0);
        for (int weights = 1; weights < 3; weights++)
            for (int activations = 1; activations < 4; activations++)
                for (uint32_t several = 0; several < 2; several++) /* one row has loops of its own */
                    check_dots(layout, 1, 8192, several ? 3 + 14 * (layout == 0) : 1, weights, activations);
    }
}

/* A model and a session on it, with all that they borrow. */
struct running {
    ternary_file file;
    ternary_model *model;
    ternary_session *session;
    void *model_memory, *session_memory;
    float *logits; /* [n_vocab] */
    uint32_t n_vocab;
};

static void start(struct running *it, const char *path, const char *kernels, const char *cache)
{
    const ternary_config config = {80, 1, PROMPT, 1, 1, kernels, cache};
    ternary_error error;
    ternary_shape shape;
    expect(ternary_file_map(path, &it->file, &error) == TERNARY_OK, "the file is mapped", path);
    it->model_memory = get(ternary_model_bytes(&it->file));
    expect(ternary_model_make(it->model_memory, &it->file, &it->model, &error) == TERNARY_OK, "it is a model", path);
    it->session_memory = get(ternary_session_bytes(it->model, &config, NULL));
    expect(ternary_session_make(it->session_memory, it->model, &config, &it->session, &error) == TERNARY_OK,
           "a session is made", kernels);
    ternary_model_shape(it->model, &shape);
    it->n_vocab = shape.n_vocab;
    it->logits = get(it->n_vocab * sizeof *it->logits);
}

static void end(struct running *it)
{
    ternary_session_end(it->session);
    free(it->logits), free(it->session_memory), free(it->model_memory);
    ternary_file_unmap(&it->file);
}

/* Rows behind those that the sequence has, with the last one's logits. */
static void decode(struct running *it, uint32_t rows)
{
    int32_t tokens[PROMPT], positions[PROMPT], sequences[PROMPT] = {0};
    uint8_t outputs[PROMPT] = {[PROMPT - 1] = 1};
    ternary_error error;
    for (uint32_t i = 0; i < rows; i++) {
        positions[i] = (int32_t)(ternary_sequence_length(it->session, 0) + i);
        tokens[i] = 3 + positions[i];
    }
    const ternary_batch batch = {rows, tokens, NULL, positions, sequences, outputs + PROMPT - rows};
    expect(ternary_decode(it->session, &batch, it->logits, &error) == TERNARY_OK, "rows are decoded", "");
}

/* Logits of a prompt's last token and of some more tokens: one checksum of all their bits. */
static uint64_t checksum(const char *path, const char *kernels, const char *cache)
{
    struct running it;
    uint64_t sum = 14695981039346656037u;
    start(&it, path, kernels, cache);
    for (uint32_t step = 0; step <= STEPS; step++) {
        decode(&it, step == 0 ? PROMPT : 1);
        for (size_t i = 0; i < it.n_vocab * sizeof *it.logits; i++)
            sum = (sum ^ ((const uint8_t *)it.logits)[i]) * 1099511628211u;
    }
    end(&it);
    return sum;
}

static void logits(const char *path, const char *cache)
{
    const uint64_t truth = checksum(path, "scalar", cache);
    for (uint32_t at = 0; ternary_kernels_name(at) != NULL; at++)
        expect(checksum(path, ternary_kernels_name(at), cache) == truth, "kernels give the scalar one's logits",
               ternary_kernels_name(at));
    printf("%016llx ", (unsigned long long)truth);
}

static void states(const char *path, const char *cache)
{
    struct running it;
    uint32_t taken = 0;
    start(&it, path, NULL, cache);
    decode(&it, PROMPT);
    for (uint32_t round = 0; round < ROUNDS; round++) {
        const size_t nbytes = ternary_sequence_bytes(it.session, 0);
        uint8_t *state = get(nbytes);
        ternary_error error;
        expect(ternary_sequence_export(it.session, 0, state, &error) == TERNARY_OK, "a state is written", path);
        for (uint32_t i = draw(4); i > 0; i--)
            state[draw(2) ? draw(24) : draw((uint32_t)nbytes)] = (uint8_t)draw(256);
        const size_t some = draw(4) ? nbytes : draw((uint32_t)nbytes);
        uint8_t *exact = get(some);
        memcpy(exact, state, some);
        const ternary_status status = ternary_sequence_import(it.session, 0, exact, some, &error);
        expect(status == TERNARY_OK || status == TERNARY_REFUSED, "a state is taken or refused", path);
        taken += status == TERNARY_OK;
        decode(&it, 1);
        ternary_sequence_trim(it.session, 0, PROMPT, &error);
        free(state), free(exact);
    }
    expect(taken > 0 && taken < ROUNDS, "some states are taken and some are not", path);
    end(&it);
}

int main(int count, char **arguments)
{
    if (count == 3 && strcmp(arguments[1], "dots") == 0) {
        state = (uint32_t)strtoul(arguments[2], NULL, 10) + 1;
        dots();
    } else if (count == 4 && strcmp(arguments[1], "logits") == 0) {
        logits(arguments[2], arguments[3]);
    } else if (count == 5 && strcmp(arguments[1], "states") == 0) {
        state = (uint32_t)strtoul(arguments[4], NULL, 10) + 1;
        states(arguments[2], arguments[3]);
    } else {
        fprintf(stderr, "usage: kernels_check dots SEED | logits FILE CACHE | states FILE CACHE SEED\n");
        return 2;
    }
    for (uint32_t at = 0; ternary_kernels_name(at) != NULL; at++)
        printf("%s%s", at > 0 ? " " : "", ternary_kernels_name(at));
    printf("\n");
    return 0;
}
