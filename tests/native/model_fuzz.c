/* Throws damaged model files at the file reader: model_fuzz FILE ROUNDS SEED.
 *
 * Each round changes some bytes of the file's header, or cuts the file short, and makes a model of what is left, in a
 * buffer of exactly that size. Whatever the reader then believes is read to its last byte: an address sanitizer sees the
 * first one beyond. Ends with a sentence and status 1 when nothing was ever believed, or nothing refused.
 */
#include <string.h>

#include "base/gguf.h"
#include "engine/model.h"
#include "fuzz.h"

/* Overwrites one to eight bytes somewhere: by anything, or by what is small, large or negative in its place. */
static void change(uint8_t *bytes, size_t nbytes)
{
    static const uint8_t telling[] = {0x00, 0x01, 0x02, 0x03, 0x04, 0x08, 0x10, 0x7F, 0x80, 0xFE, 0xFF};
    const size_t at = draw((uint32_t)nbytes), most = nbytes - at;
    const size_t count = (size_t)1 << draw(4);
    const uint8_t fill = telling[draw(sizeof telling)];
    const int same = draw(2) == 0;
    for (size_t i = 0; i < count && i < most; i++)
        bytes[at + i] = same ? fill : (uint8_t)draw(256);
}

static uint64_t sum_of(const void *bytes, size_t nbytes)
{
    uint64_t sum = 0;
    for (size_t i = 0; bytes != NULL && i < nbytes; i++)
        sum += ((const uint8_t *)bytes)[i];
    return sum;
}

static uint64_t sum_of_layer(const ternary_model *model, uint32_t layer)
{
    const ternary_file matrices = ternary_model_layer(model, layer);
    return sum_of(matrices.bytes, matrices.nbytes);
}

static uint64_t sum_of_scales(const struct matrix *matrix)
{
    if (matrix->span_scales != NULL)
        return sum_of(matrix->span_scales, matrix->count * span_scales_of(matrix) * sizeof(uint16_t));
    return matrix->scales == NULL
               ? 0
               : sum_of(matrix->scales, (size_t)matrix->count * (matrix->rows / matrix->scale_rows) * sizeof(float));
}

/* Every byte that a decode step could reach. */
static uint64_t sum_of_model(const ternary_model *model)
{
    const ternary_shape *shape = &model->shape;
    const size_t n_embd = shape->n_embd * sizeof(float), q_dim = model->q_dim * sizeof(float);
    uint64_t sum = sum_of(model->rope_divisors, model->rope_dims / 2 * sizeof(float));
    float *row = get(n_embd);
    for (enum turned turned = 0; turned < TURNED; turned++) {
        const size_t width = turned == TURNED_DOWN ? shape->n_ff * sizeof(float) : n_embd;
        sum += sum_of(model->signs[turned], turned == TURNED_OUTPUT ? q_dim : width);
    }
    for (uint32_t i = 0; i < shape->layers; i++) {
        const struct layer *layer = &model->layers[i];
        const struct matrix *matrices[] = {&layer->q,    &layer->k,  &layer->v,   &layer->o,
                                           &layer->gate, &layer->up, &layer->down};
        for (size_t m = 0; m < sizeof matrices / sizeof *matrices; m++)
            sum += sum_of_scales(matrices[m]);
        sum += sum_of_layer(model, i) + sum_of(layer->router, model->experts * n_embd);
        sum += layer->is_windowed + 2 * layer->is_rotated;
        for (uint32_t expert = 0; expert < model->experts; expert++) {
            const struct matrix down = matrix_at(&layer->down, expert);
            sum += sum_of_scales(&down) + sum_of(down.data, down.groups * group_bytes_of(&down));
        }
        sum += sum_of(layer->attn_norm, n_embd) + sum_of(layer->ffn_norm, n_embd);
        sum += sum_of(layer->attn_sub_norm, q_dim) + sum_of(layer->ffn_sub_norm, shape->n_ff * sizeof(float));
        sum += sum_of(layer->q_norm, shape->head_dim * sizeof(float));
        sum += sum_of(layer->k_norm, shape->head_dim * sizeof(float));
    }
    if (shape->has_head)
        sum += sum_of_layer(model, shape->layers) + sum_of_scales(&model->head) + sum_of(model->output_norm, n_embd);
    for (uint32_t token = 0; shape->has_embedding && token < shape->n_vocab; token++) {
        model_embed(model, token, row);
        sum += sum_of(row, n_embd);
    }
    free(row);
    return sum;
}

static int is_believed(const uint8_t *bytes, size_t nbytes)
{
    const ternary_file file = {bytes, nbytes};
    const size_t wanted = ternary_model_bytes(&file);
    uint8_t *memory = get(wanted);
    ternary_model *model = NULL;
    ternary_error error = {""};
    const ternary_status status = wanted > 0 ? ternary_model_make(memory, &file, &model, &error) : TERNARY_BAD_FILE;
    expect(status == TERNARY_OK || status == TERNARY_BAD_FILE || status == TERNARY_UNSUPPORTED,
           "a file is refused as damaged or as another engine's");
    expect(status != TERNARY_OK || sum_of_model(model) != 0, "a model has weights");
    expect(wanted == 0 || (status == TERNARY_OK) == (error.text[0] == 0), "what is refused is refused with a sentence");
    free(memory);
    return status == TERNARY_OK;
}

int main(int count, char **arguments)
{
    expect(count == 4, "the arguments are FILE ROUNDS SEED");
    FILE *file = fopen(arguments[1], "rb");
    expect(file != NULL && fseek(file, 0, SEEK_END) == 0, "the file can be read");
    const size_t nbytes = (size_t)ftell(file);
    uint8_t *whole = get(nbytes);
    rewind(file);
    expect(fread(whole, 1, nbytes, file) == nbytes, "the file is read");
    fclose(file);
    const unsigned long rounds = strtoul(arguments[2], NULL, 10);
    state = (uint32_t)strtoul(arguments[3], NULL, 10) + 1;
    struct gguf gguf;
    const char *fault;
    expect(gguf_open(&gguf, whole, nbytes, &fault) && is_believed(whole, nbytes), "the file is sound");
    unsigned long believed = 0;
    for (unsigned long round = 0; round < rounds; round++) {
        const size_t some = draw(8) == 0 ? 1 + draw((uint32_t)nbytes - 1) : nbytes;
        const size_t header = some < gguf.data_at ? some : gguf.data_at;
        uint8_t *bytes = get(some);
        memcpy(bytes, whole, some);
        for (uint32_t i = draw(4); i > 0; i--)
            change(bytes, header);
        believed += (unsigned long)is_believed(bytes, some);
        free(bytes);
    }
    expect(believed > 0 && believed < rounds, "some files are believed and some are not");
    free(whole);
    return 0;
}
