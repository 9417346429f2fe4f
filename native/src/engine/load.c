/* Making a model of a file: the name, type and size of every tensor is checked here, once. */
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/limits.h"
#include "pentium2/lookup.h"
#include "settings.h"

/* [rows][cols] floats; a vector is one row. With `optional` a missing one is NULL. */
static ternary_status read_floats(struct loading *loading, const char *name, uint32_t rows, uint32_t cols, bool optional,
                                  const float **vector)
{
    struct gguf_tensor tensor;
    *vector = NULL;
    if (!gguf_find_tensor(&loading->gguf, name, &tensor))
        return optional ? TERNARY_OK : ternary_fail(loading->error, TERNARY_BAD_FILE,
                                                    "the file has no tensor %s", name);
    if (tensor.type != GGUF_TENSOR_F32 || tensor.dimensions > 2 || tensor.shape[0] != cols || tensor.shape[1] != rows ||
        tensor.room / sizeof **vector / cols < rows || (uintptr_t)tensor.data % sizeof **vector != 0)
        return ternary_fail(loading->error, TERNARY_BAD_FILE, "%s is not %u x %u floats", name, rows, cols);
    *vector = (const float *)(const void *)tensor.data;
    return TERNARY_OK;
}

static ternary_status read_vector(struct loading *loading, const char *name, uint32_t count, bool optional,
                                  const float **vector)
{
    return read_floats(loading, name, 1, count, optional, vector);
}

/* The vectors of signs of what is turned. The key is a list of names with a comma behind each. */
static ternary_status read_rotation(struct loading *loading)
{
    static const char *const names[TURNED] = {"attn", "attn_output", "ffn", "ffn_down", "head", "embedding"};
    ternary_model *model = loading->model;
    const uint32_t n_embd = model->shape.n_embd;
    const uint32_t widths[TURNED] = {n_embd, model->q_dim, n_embd, model->shape.n_ff, n_embd, n_embd};
    char list[128] = "", name[64];
    if (model->rotation_block == 0)
        return TERNARY_OK;
    gguf_text(&loading->gguf, "cordee.ternary.rotated", list, sizeof list);
    for (const char *at = list, *end; *at != 0; at = end + 1) {
        uint32_t turned = 0;
        end = strchr(at, ',');
        while (turned < TURNED && (end == NULL || strlen(names[turned]) != (size_t)(end - at) ||
                                   memcmp(names[turned], at, (size_t)(end - at)) != 0))
            turned++;
        if (turned == TURNED)
            return ternary_fail(loading->error, TERNARY_UNSUPPORTED, "the file rotates something unknown: %.64s", at);
        if (widths[turned] % model->rotation_block != 0)
            return ternary_fail(loading->error, TERNARY_BAD_FILE, "%u columns are no blocks of %u, which the file rotates",
                                widths[turned], model->rotation_block);
        snprintf(name, sizeof name, "rotation_%s.signs", names[turned]);
        const ternary_status status = read_vector(loading, name, widths[turned], false, &model->signs[turned]);
        if (status != TERNARY_OK)
            return status;
    }
    return TERNARY_OK;
}

/* Whether activations have so few digits that 32 bits hold a span's dot with weights of 8 bits, too. */
static bool few_digits(const ternary_model *model)
{
    _Static_assert(ACTIVATION_LIMIT(2) * 128ull * SPAN_COLUMNS_LIMIT <= INT32_MAX, "two digits are few");
    return model->planes <= 2 && model->head_planes <= 2;
}

static uint64_t all_groups(const struct matrix *matrix)
{
    return (uint64_t)matrix->count * matrix->groups;
}

/* Scales of spans, if the tensor has the form of such. */
static bool read_span_scales(const struct loading *loading, const struct gguf_tensor *tensor, struct matrix *matrix)
{
    const uint32_t columns = loading->model->scale_columns;
    const bool is_kept = matrix->layout == LAYOUT_INT8 && few_digits(loading->model);
    if (columns == 0 || (matrix->layout != LAYOUT_TRIT2 && matrix->layout != LAYOUT_TRIT5 && !is_kept))
        return false;
    const uint32_t group_rows = layout_facts[matrix->layout].group_rows, spans = spans_of(matrix->cols, columns);
    if (tensor->type != GGUF_TENSOR_F16 || tensor->dimensions != 3 || tensor->shape[0] != group_rows ||
        tensor->shape[1] != (uint64_t)matrix->planes * spans || tensor->shape[2] != all_groups(matrix) ||
        (uintptr_t)tensor->data % 2 != 0 ||
        tensor->room / (group_rows * sizeof(uint16_t)) / spans / matrix->planes < all_groups(matrix))
        return false;
    matrix->span_scales = (const uint16_t *)(const void *)tensor->data;
    matrix->spans = spans;
    matrix->span_quads = columns / 4;
    return true;
}

static ternary_status read_scales(struct loading *loading, const char *name, struct matrix *matrix)
{
    struct gguf_tensor tensor;
    if (!gguf_find_tensor(&loading->gguf, name, &tensor))
        return ternary_fail(loading->error, TERNARY_BAD_FILE, "the file has no tensor %s", name);
    if (read_span_scales(loading, &tensor, matrix))
        return TERNARY_OK;
    const uint64_t each = tensor.shape[0] / matrix->count; /* of one of the `count` */
    if (each == 0 || each > matrix->rows || matrix->rows % each != 0)
        return ternary_fail(loading->error, TERNARY_BAD_FILE, "%s does not divide %u rows", name, matrix->rows);
    matrix->scale_rows = matrix->rows / (uint32_t)each;
    return read_vector(loading, name, matrix->count * (uint32_t)each, false, &matrix->scales);
}

static const char *layout_name(enum layout layout)
{
    return layout == LAYOUT_PENTIUM2 ? "pentium2" : layout_facts[layout].name;
}

/* A matrix of that layout and size, without its data. */
static struct matrix empty_matrix(enum layout layout, uint32_t rows, uint32_t cols)
{
    struct matrix matrix = {.layout = layout, .count = 1, .rows = rows, .cols = cols, .planes = 1};
    if (layout < LAYOUTS) {
        matrix.quads = quads_of(cols);
        matrix.groups = groups_of(layout, rows);
    }
    return matrix;
}

static uint64_t payload_bytes(const struct matrix *matrix)
{
    if (matrix->layout == LAYOUT_PENTIUM2)
        return (uint64_t)lookup_row_bytes(matrix->cols) * matrix->rows;
    return all_groups(matrix) * group_bytes_of(matrix);
}

/* What a row reads of it: of experts, those that it passes. */
static uint64_t read_bytes(const ternary_model *model, const struct matrix *matrix)
{
    const uint64_t scales = matrix->span_scales != NULL ? span_scales_of(matrix) * sizeof(uint16_t) : 0;
    const uint64_t all = payload_bytes(matrix) + matrix->count * scales;
    return matrix->count == 1 ? all : all / matrix->count * model->experts_used;
}

/* Whether a tensor is the packed payload of such a matrix. */
static bool is_payload(const struct gguf_tensor *tensor, const struct matrix *matrix)
{
    if (matrix->layout == LAYOUT_PENTIUM2)
        return tensor->type == GGUF_TENSOR_I8 && tensor->dimensions == 2 &&
               tensor->shape[0] == lookup_row_bytes(matrix->cols) && tensor->shape[1] == matrix->rows &&
               tensor->room >= payload_bytes(matrix);
    const uint64_t quad_bytes = layout_facts[matrix->layout].quad_bytes, quads = (uint64_t)matrix->planes * matrix->quads;
    return tensor->type == GGUF_TENSOR_I8 && tensor->dimensions == 3 && tensor->shape[0] == quad_bytes &&
           tensor->shape[1] == quads && tensor->shape[2] == all_groups(matrix) &&
           tensor->room / quad_bytes / quads >= all_groups(matrix);
}

/* Whether a matrix is left at 8 bits in a file of spans; it becomes one of that layout. */
static bool is_kept(const struct loading *loading, const struct gguf_tensor *tensor, struct matrix *matrix)
{
    struct matrix kept = empty_matrix(LAYOUT_INT8, matrix->rows, matrix->cols);
    kept.count = matrix->count;
    if (loading->model->scale_columns == 0 || !few_digits(loading->model) || !is_payload(tensor, &kept))
        return false;
    *matrix = kept;
    return true;
}

/* A matrix of a layer, or that of each of `count` experts. */
static ternary_status read_matrix(struct loading *loading, uint32_t layer, const char *name, uint32_t count,
                                  uint32_t rows, uint32_t cols, struct matrix *matrix)
{
    char full[64];
    struct gguf_tensor tensor;
    *matrix = empty_matrix(loading->layout, rows, cols);
    matrix->planes = loading->model->weight_planes;
    matrix->count = count;
    snprintf(full, sizeof full, "blk.%u.%s.weight", layer, name);
    if (!gguf_find_tensor(&loading->gguf, full, &tensor))
        return ternary_fail(loading->error, TERNARY_BAD_FILE, "the file has no tensor %s", full);
    if (!is_payload(&tensor, matrix) && !is_kept(loading, &tensor, matrix))
        return ternary_fail(loading->error, TERNARY_BAD_FILE,
                            "%s is not %u x %u in layout %s, or lies beyond the file's end",
                    full, rows, cols, layout_name(matrix->layout));
    matrix->data = tensor.data;
    snprintf(full, sizeof full, "blk.%u.%s.scale", layer, name);
    const ternary_status status = read_scales(loading, full, matrix);
    if (status == TERNARY_OK && (matrix->span_scales != NULL) != (loading->model->scale_columns != 0))
        return ternary_fail(loading->error, TERNARY_BAD_FILE, "%s are not of %u columns each, as the file says", full,
                            loading->model->scale_columns);
    loading->model->shape.weights_bytes += read_bytes(loading->model, matrix);
    return status;
}

static ternary_status read_feed_forward(struct loading *loading, uint32_t index)
{
    static const char *const names[2][3] = {{"ffn_gate", "ffn_up", "ffn_down"},
                                            {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}};
    const uint32_t experts = loading->model->experts, count = experts > 0 ? experts : 1;
    const uint32_t n_embd = loading->model->shape.n_embd, n_ff = loading->model->shape.n_ff;
    struct layer *layer = &loading->model->layers[index];
    const char *const *const own = names[experts > 0];
    layer->router = NULL;
    ternary_status status = read_matrix(loading, index, own[0], count, n_ff, n_embd, &layer->gate);
    if (status == TERNARY_OK)
        status = read_matrix(loading, index, own[1], count, n_ff, n_embd, &layer->up);
    if (status == TERNARY_OK)
        status = read_matrix(loading, index, own[2], count, n_embd, n_ff, &layer->down);
    if (status != TERNARY_OK || experts == 0)
        return status;
    char name[64];
    snprintf(name, sizeof name, "blk.%u.ffn_gate_inp.weight", index);
    loading->model->shape.weights_bytes += (uint64_t)experts * n_embd * sizeof(float);
    return read_floats(loading, name, experts, n_embd, false, &layer->router);
}

static ternary_status read_layer(struct loading *loading, uint32_t index)
{
    const ternary_shape *shape = &loading->model->shape;
    struct layer *layer = &loading->model->layers[index];
    const uint32_t q_dim = loading->model->q_dim, kv_dim = loading->model->kv_dim;
    const struct {
        const char *name;
        uint32_t count;
        bool optional;
        const float **vector;
    } vectors[] = {
        {"attn_norm", shape->n_embd, false, &layer->attn_norm},
        {"ffn_norm", shape->n_embd, false, &layer->ffn_norm},
        {"attn_sub_norm", q_dim, true, &layer->attn_sub_norm},
        {"ffn_sub_norm", shape->n_ff, true, &layer->ffn_sub_norm},
        {"attn_q_norm", shape->head_dim, true, &layer->q_norm},
        {"attn_k_norm", shape->head_dim, true, &layer->k_norm},
    };
    const struct {
        const char *name;
        uint32_t rows, cols;
        struct matrix *matrix;
    } matrices[] = {
        {"attn_q", q_dim, shape->n_embd, &layer->q},
        {"attn_k", kv_dim, shape->n_embd, &layer->k},
        {"attn_v", kv_dim, shape->n_embd, &layer->v},
        {"attn_output", shape->n_embd, q_dim, &layer->o},
    };
    ternary_status status = TERNARY_OK;
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors && status == TERNARY_OK; i++) {
        char name[64];
        snprintf(name, sizeof name, "blk.%u.%s.weight", index, vectors[i].name);
        status = read_vector(loading, name, vectors[i].count, vectors[i].optional, vectors[i].vector);
    }
    for (size_t i = 0; i < sizeof matrices / sizeof *matrices && status == TERNARY_OK; i++)
        status = read_matrix(loading, index, matrices[i].name, 1, matrices[i].rows, matrices[i].cols, matrices[i].matrix);
    return status == TERNARY_OK ? read_feed_forward(loading, index) : status;
}

/* Slices hold stand-ins under these names: what is no embedding of n_vocab rows is none. */
static ternary_status read_embedding(struct loading *loading)
{
    ternary_model *model = loading->model;
    const uint64_t n_embd = model->shape.n_embd;
    struct gguf_tensor tensor;
    if (model->shape.n_vocab == 0 || !gguf_find_tensor(&loading->gguf, "token_embd.weight", &tensor))
        return TERNARY_OK;
    model->codes = empty_matrix(loading->head_layout, model->shape.n_vocab, model->shape.n_embd);
    if (model->codes.layout != LAYOUT_INT8 && model->codes.layout != LAYOUT_INT6 &&
        model->codes.layout != LAYOUT_INT4 && is_payload(&tensor, &model->codes)) {
        model->codes.data = tensor.data;
        model->shape.has_embedding = 1;
        return read_scales(loading, "token_embd.scale", &model->codes);
    }
    uint64_t row_bytes = 0;
    if (tensor.type == GGUF_TENSOR_F32)
        row_bytes = n_embd * 4;
    else if (tensor.type == GGUF_TENSOR_F16 || tensor.type == GGUF_TENSOR_BF16)
        row_bytes = n_embd * 2;
    else if (tensor.type == GGUF_TENSOR_Q8_0 && n_embd % 32 == 0)
        row_bytes = n_embd / 32 * 34;
    if (row_bytes == 0 || tensor.dimensions != 2 || tensor.shape[0] != n_embd ||
        tensor.shape[1] != model->shape.n_vocab || tensor.room / row_bytes < model->shape.n_vocab)
        return TERNARY_OK;
    if (model->signs[TURNED_EMBEDDING] != NULL)
        return ternary_fail(loading->error, TERNARY_UNSUPPORTED, "the file rotates an embedding that is not in codes");
    model->embedding = tensor.data;
    model->embedding_type = tensor.type;
    model->embedding_row_bytes = (size_t)row_bytes;
    model->shape.has_embedding = 1;
    return TERNARY_OK;
}

/* A head that is not there is the embedding, if that is in codes. */
static ternary_status tie_head(struct loading *loading)
{
    ternary_model *model = loading->model;
    if (model->codes.data == NULL)
        return TERNARY_OK;
    model->head = model->codes;
    model->shape.has_head = 1;
    model->shape.weights_bytes += read_bytes(model, &model->head);
    return read_vector(loading, "output_norm.weight", model->head.cols, false, &model->output_norm);
}

static ternary_status read_head(struct loading *loading)
{
    ternary_model *model = loading->model;
    struct matrix *head = &model->head;
    struct gguf_tensor tensor;
    *head = empty_matrix(loading->head_layout, model->shape.n_vocab, model->shape.n_embd);
    if (!gguf_find_tensor(&loading->gguf, "output.weight", &tensor))
        return tie_head(loading);
    if (head->rows == 0 || !gguf_find_tensor(&loading->gguf, "output.weight", &tensor) || !is_payload(&tensor, head))
        return TERNARY_OK;
    head->data = tensor.data;
    model->shape.has_head = 1;
    ternary_status status = read_scales(loading, "output.scale", head);
    model->shape.weights_bytes += read_bytes(model, head);
    return status == TERNARY_OK
               ? read_vector(loading, "output_norm.weight", head->cols, false, &model->output_norm)
               : status;
}

/* Opens the container and finds architecture and number of layers, which decide the model's own size. */
static ternary_status open_file(const ternary_file *file, struct gguf *gguf, char *architecture, size_t room,
                                uint32_t *layers, ternary_error *error)
{
    const char *fault;
    char key[128];
    *layers = 0;
    if (!gguf_open(gguf, file->bytes, file->nbytes, &fault))
        return ternary_fail(error, TERNARY_BAD_FILE, "the file %s", fault);
    if (!gguf_text(gguf, "general.architecture", architecture, room))
        return ternary_fail(error, TERNARY_BAD_FILE, "the file does not say its architecture");
    if (!settings_key(key, sizeof key, architecture, "block_count") || !gguf_number(gguf, key, layers) ||
        *layers - 1 >= LAYERS_LIMIT)
        return ternary_fail(error, TERNARY_BAD_FILE, "the file does not hold 1 to %u layers", LAYERS_LIMIT);
    return TERNARY_OK;
}

size_t ternary_model_bytes(const ternary_file *file)
{
    struct gguf gguf;
    char architecture[64];
    uint32_t layers;
    if (open_file(file, &gguf, architecture, sizeof architecture, &layers, NULL) != TERNARY_OK)
        return 0;
    return sizeof(ternary_model) + layers * sizeof(struct layer);
}

ternary_status ternary_model_make(void *memory, const ternary_file *file, ternary_model **made, ternary_error *error)
{
    struct loading loading = {.error = error};
    char architecture[64];
    uint32_t layers;
    ternary_status status = open_file(file, &loading.gguf, architecture, sizeof architecture, &layers, error);
    if (status != TERNARY_OK)
        return status;
    ternary_model *model = loading.model = memory;
    memset(model, 0, sizeof *model);
    memcpy(model->shape.architecture, architecture, sizeof architecture);
    model->shape.layers = layers;
    status = read_settings(&loading);
    if (status == TERNARY_OK)
        status = read_vector(&loading, "rope_freqs.weight", model->rope_dims / 2, true, &model->rope_divisors);
    if (status == TERNARY_OK)
        status = read_rotation(&loading);
    for (uint32_t i = 0; i < layers && status == TERNARY_OK; i++)
        status = read_layer(&loading, i);
    if (status == TERNARY_OK) {
        status = read_embedding(&loading);
        if (status == TERNARY_OK)
            status = read_head(&loading);
    }
    *made = status == TERNARY_OK ? model : NULL;
    return status;
}

ternary_file ternary_model_layer(const ternary_model *model, uint32_t layer)
{
    if (layer >= model->shape.layers)
        return (ternary_file){model->head.data, (size_t)payload_bytes(&model->head)};
    const struct layer *at = &model->layers[layer];
    const struct matrix *const matrices[] = {&at->q, &at->k, &at->v, &at->o, &at->gate, &at->up, &at->down};
    const uint8_t *first = at->q.data, *end = first;
    for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++) {
        const uint8_t *stop = matrices[i]->data + payload_bytes(matrices[i]);
        first = matrices[i]->data < first ? matrices[i]->data : first;
        end = stop > end ? stop : end;
    }
    return (ternary_file){first, (size_t)(end - first)};
}

void ternary_model_shape(const ternary_model *model, ternary_shape *shape)
{
    *shape = model->shape;
}
