/* Making a model of a file: every name, type and size is checked here, once. */
#include "model.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/gguf.h"
#include "base/limits.h"
#include "pentium2/attention.h"

/* The file being read, and where to complain. */
struct loading {
    struct gguf gguf;
    ternary_model *model;
    ternary_error *error;
    enum layout layout, head_layout;
};

/* The newest version of the layout: 2 has scales of spans, tied codes and the rotation. */
#define VERSION 2u

static bool key_of(char *key, size_t room, const char *architecture, const char *name)
{
    int length = snprintf(key, room, "%s.%s", architecture, name);
    return length > 0 && (size_t)length < room;
}

/* A number under the architecture's prefix; *number keeps its value where the key is missing. */
static void read_number(const struct loading *loading, const char *name, uint32_t *number)
{
    char key[128];
    if (key_of(key, sizeof key, loading->model->shape.architecture, name))
        gguf_number(&loading->gguf, key, number);
}

static void read_float(const struct loading *loading, const char *name, float *number)
{
    char key[128];
    if (key_of(key, sizeof key, loading->model->shape.architecture, name))
        gguf_float(&loading->gguf, key, number);
}

/* Which of the `count` names a text key has; `count` if none. */
static uint32_t choice(const struct gguf *gguf, const char *key, const char *const *names, uint32_t count)
{
    char text[32];
    uint32_t at = 0;
    if (!gguf_text(gguf, key, text, sizeof text))
        return count;
    while (at < count && strcmp(text, names[at]) != 0)
        at++;
    return at;
}

/* The layout that a key names, or LAYOUTS. */
static enum layout read_layout(const struct gguf *gguf, const char *key)
{
    char name[32] = "";
    gguf_text(gguf, key, name, sizeof name);
    return strcmp(name, "pentium2") == 0 ? LAYOUT_PENTIUM2 : layout_named(name);
}

/* Which columns share scales, and whether what enters matrices is turned: neither is needed. */
static ternary_status read_spans(struct loading *loading)
{
    ternary_model *model = loading->model;
    const struct gguf *gguf = &loading->gguf;
    gguf_number(gguf, "cordee.ternary.scale_columns", &model->scale_columns);
    gguf_number(gguf, "cordee.ternary.rotation_block", &model->rotation_block);
    model->weight_planes = 1;
    gguf_number(gguf, "cordee.ternary.weight_planes", &model->weight_planes);
    const uint32_t columns = model->scale_columns, block = model->rotation_block;
    if (model->weight_planes - 1 >= PLANES_LIMIT || (model->weight_planes > 1 && columns == 0))
        return ternary_fail(loading->error, TERNARY_UNSUPPORTED,
                            "matrices are of %u planes, not of 1, or of up to %u with scales of spans",
                            model->weight_planes, PLANES_LIMIT);
    if (columns != 0 && (model->by_lookup || columns < SPAN_COLUMNS_LEAST || columns > SPAN_COLUMNS_LIMIT ||
                         (columns & (columns - 1)) != 0))
        return ternary_fail(loading->error, TERNARY_UNSUPPORTED,
                            "scales are of %u columns, not of %u, 128 or %u in a layout other than pentium2", columns,
                            SPAN_COLUMNS_LEAST, SPAN_COLUMNS_LIMIT);
    if (block != 0 && (model->by_lookup || block < ROTATION_LEAST || block > ROTATION_LIMIT || (block & (block - 1)) != 0))
        return ternary_fail(loading->error, TERNARY_UNSUPPORTED, "the rotation has blocks of %u, not a power of two", block);
    return TERNARY_OK;
}

static ternary_status read_rules(struct loading *loading)
{
    static const char *const gates[] = {"silu", "relu2"}, *const ropes[] = {"neox", "interleaved"};
    ternary_model *model = loading->model;
    const struct gguf *gguf = &loading->gguf;
    uint32_t version = 0;
    if (!gguf_number(gguf, "cordee.ternary.version", &version))
        return ternary_fail(loading->error, TERNARY_UNSUPPORTED, "the file is not laid out for the ternary engine");
    if (version - 1 >= VERSION)
        return ternary_fail(loading->error, TERNARY_UNSUPPORTED,
                            "the file's ternary layout has version %u, not 1 to %u", version, VERSION);
    loading->layout = read_layout(gguf, "cordee.ternary.layout");
    loading->head_layout = read_layout(gguf, "cordee.ternary.head");
    model->by_lookup = loading->layout == LAYOUT_PENTIUM2;
    if (loading->head_layout == LAYOUTS || model->by_lookup != (loading->head_layout == LAYOUT_PENTIUM2))
        return ternary_fail(loading->error, TERNARY_UNSUPPORTED, "the head's layout is unknown, or not that of the layers");
    const uint32_t gate = choice(gguf, "cordee.ternary.activation", gates, 2);
    const uint32_t rope = choice(gguf, "cordee.ternary.rope", ropes, 2);
    model->planes = model->head_planes = 0;
    gguf_number(gguf, "cordee.ternary.planes", &model->planes);
    gguf_number(gguf, "cordee.ternary.head_planes", &model->head_planes);
    if (loading->layout == LAYOUTS || gate == 2 || rope == 2 || model->planes - 1 >= PLANES_LIMIT ||
        model->head_planes - 1 >= PLANES_LIMIT ||
        (model->by_lookup && (model->planes != 1 || model->head_planes != 1)))
        return ternary_fail(loading->error, TERNARY_UNSUPPORTED,
                            "a cordee.ternary key is missing or has an unknown value");
    model->gate = gate == 0 ? GATE_SILU : GATE_RELU2;
    model->rope = rope == 0 ? ROPE_HALVES : ROPE_PAIRS;
    return read_spans(loading);
}

static ternary_status read_shape(struct loading *loading)
{
    ternary_model *model = loading->model;
    ternary_shape *shape = &model->shape;
    model->epsilon = 0;
    model->rope_base = 10000.0f;
    read_number(loading, "embedding_length", &shape->n_embd);
    read_number(loading, "feed_forward_length", &shape->n_ff);
    read_number(loading, "attention.head_count", &shape->heads);
    read_number(loading, "context_length", &shape->trained_context);
    read_number(loading, "vocab_size", &shape->n_vocab);
    shape->kv_heads = shape->heads;
    read_number(loading, "attention.head_count_kv", &shape->kv_heads);
    shape->head_dim = shape->heads > 0 ? shape->n_embd / shape->heads : 0;
    read_number(loading, "attention.key_length", &shape->head_dim);
    read_float(loading, "attention.layer_norm_rms_epsilon", &model->epsilon);
    read_float(loading, "rope.freq_base", &model->rope_base);
    if (shape->n_embd - 1 >= COLUMNS_LIMIT || shape->n_ff - 1 >= COLUMNS_LIMIT || shape->heads - 1 >= HEADS_LIMIT ||
        shape->kv_heads - 1 >= HEADS_LIMIT || shape->head_dim - 1 >= HEAD_DIM_LIMIT || shape->head_dim % 2 != 0 ||
        shape->heads * shape->head_dim > COLUMNS_LIMIT || shape->heads % shape->kv_heads != 0 ||
        shape->n_vocab > VOCABULARY_LIMIT)
        return ternary_fail(loading->error, TERNARY_BAD_FILE, "the model's dimensions are missing or impossible");
    model->q_dim = shape->heads * shape->head_dim;
    model->kv_dim = shape->kv_heads * shape->head_dim;
    if (model->by_lookup && shape->head_dim % PENTIUM2_MULTIPLE != 0)
        return ternary_fail(loading->error, TERNARY_UNSUPPORTED, "heads of %u in layout pentium2: it wants multiples of %u",
                            shape->head_dim, PENTIUM2_MULTIPLE);
    if (!(model->epsilon > 0 && model->epsilon < 1) || !(model->rope_base > 1 && model->rope_base < 1e12f))
        return ternary_fail(loading->error, TERNARY_BAD_FILE,
                            "the norm's epsilon or the base of the rotary angles is impossible");
    return TERNARY_OK;
}

/* A vector of `count` floats. With `optional` a missing one is NULL. */
static ternary_status read_vector(struct loading *loading, const char *name, uint32_t count, bool optional,
                                  const float **vector)
{
    struct gguf_tensor tensor;
    *vector = NULL;
    if (!gguf_find_tensor(&loading->gguf, name, &tensor))
        return optional ? TERNARY_OK : ternary_fail(loading->error, TERNARY_BAD_FILE,
                                                    "the file has no tensor %s", name);
    if (tensor.type != GGUF_TENSOR_F32 || tensor.dimensions != 1 || tensor.shape[0] != count ||
        tensor.room < (size_t)count * sizeof **vector || (uintptr_t)tensor.data % sizeof **vector != 0)
        return ternary_fail(loading->error, TERNARY_BAD_FILE, "%s is not %u floats", name, count);
    *vector = (const float *)(const void *)tensor.data;
    return TERNARY_OK;
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

/* Scales of spans, if the tensor has the form of such. */
static bool read_span_scales(const struct loading *loading, const struct gguf_tensor *tensor, struct matrix *matrix)
{
    const uint32_t columns = loading->model->scale_columns;
    const bool is_kept = matrix->layout == LAYOUT_INT8 && few_digits(loading->model);
    if (columns == 0 || (matrix->layout != LAYOUT_TRIT2 && matrix->layout != LAYOUT_TRIT5 && !is_kept))
        return false;
    const uint32_t group_rows = layout_facts[matrix->layout].group_rows, spans = spans_of(matrix->cols, columns);
    if (tensor->type != GGUF_TENSOR_F16 || tensor->dimensions != 3 || tensor->shape[0] != group_rows ||
        tensor->shape[1] != (uint64_t)matrix->planes * spans || tensor->shape[2] != matrix->groups ||
        (uintptr_t)tensor->data % 2 != 0 ||
        tensor->room / (group_rows * sizeof(uint16_t)) / spans / matrix->planes < matrix->groups)
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
    const uint64_t count = tensor.shape[0];
    if (count == 0 || count > matrix->rows || matrix->rows % count != 0)
        return ternary_fail(loading->error, TERNARY_BAD_FILE, "%s does not divide %u rows", name, matrix->rows);
    matrix->scale_rows = matrix->rows / (uint32_t)count;
    return read_vector(loading, name, (uint32_t)count, false, &matrix->scales);
}

static const char *layout_name(enum layout layout)
{
    return layout == LAYOUT_PENTIUM2 ? "pentium2" : layout_facts[layout].name;
}

/* A matrix of that layout and size, without its data. */
static struct matrix empty_matrix(enum layout layout, uint32_t rows, uint32_t cols)
{
    struct matrix matrix = {.layout = layout, .rows = rows, .cols = cols, .planes = 1};
    if (layout < LAYOUTS) {
        matrix.quads = quads_of(cols);
        matrix.groups = groups_of(layout, rows);
    }
    return matrix;
}

static uint64_t span_scale_bytes(const struct matrix *matrix)
{
    return (uint64_t)matrix->groups * matrix->planes * matrix->spans * layout_facts[matrix->layout].group_rows * sizeof(uint16_t);
}

static uint64_t payload_bytes(const struct matrix *matrix)
{
    if (matrix->layout == LAYOUT_PENTIUM2)
        return (uint64_t)lookup_row_bytes(matrix->cols) * matrix->rows;
    return (uint64_t)matrix->groups * group_bytes_of(matrix);
}

/* What a decode step reads of it. */
static uint64_t read_bytes(const struct matrix *matrix)
{
    return payload_bytes(matrix) + (matrix->span_scales != NULL ? span_scale_bytes(matrix) : 0);
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
           tensor->shape[1] == quads && tensor->shape[2] == matrix->groups &&
           tensor->room / quad_bytes / quads >= matrix->groups;
}

/* Whether a matrix is left at 8 bits in a file of spans; it becomes one of that layout. */
static bool is_kept(const struct loading *loading, const struct gguf_tensor *tensor, struct matrix *matrix)
{
    const struct matrix kept = empty_matrix(LAYOUT_INT8, matrix->rows, matrix->cols);
    if (loading->model->scale_columns == 0 || !few_digits(loading->model) || !is_payload(tensor, &kept))
        return false;
    *matrix = kept;
    return true;
}

static ternary_status read_matrix(struct loading *loading, uint32_t layer, const char *name, uint32_t rows,
                                  uint32_t cols, struct matrix *matrix)
{
    char full[64];
    struct gguf_tensor tensor;
    *matrix = empty_matrix(loading->layout, rows, cols);
    matrix->planes = loading->model->weight_planes;
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
    loading->model->shape.weights_bytes += read_bytes(matrix);
    return status;
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
        {"attn_q", q_dim, shape->n_embd, &layer->q},            {"attn_k", kv_dim, shape->n_embd, &layer->k},
        {"attn_v", kv_dim, shape->n_embd, &layer->v},           {"attn_output", shape->n_embd, q_dim, &layer->o},
        {"ffn_gate", shape->n_ff, shape->n_embd, &layer->gate}, {"ffn_up", shape->n_ff, shape->n_embd, &layer->up},
        {"ffn_down", shape->n_embd, shape->n_ff, &layer->down},
    };
    ternary_status status = TERNARY_OK;
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors && status == TERNARY_OK; i++) {
        char name[64];
        snprintf(name, sizeof name, "blk.%u.%s.weight", index, vectors[i].name);
        status = read_vector(loading, name, vectors[i].count, vectors[i].optional, vectors[i].vector);
    }
    for (size_t i = 0; i < sizeof matrices / sizeof *matrices && status == TERNARY_OK; i++)
        status = read_matrix(loading, index, matrices[i].name, matrices[i].rows, matrices[i].cols, matrices[i].matrix);
    return status;
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
    model->shape.weights_bytes += read_bytes(&model->head);
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
    model->shape.weights_bytes += read_bytes(head);
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
    if (!key_of(key, sizeof key, architecture, "block_count") || !gguf_number(gguf, key, layers) ||
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
    status = read_rules(&loading);
    if (status == TERNARY_OK)
        status = read_shape(&loading);
    if (status == TERNARY_OK)
        status = read_vector(&loading, "rope_freqs.weight", model->shape.head_dim / 2, true, &model->rope_divisors);
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
