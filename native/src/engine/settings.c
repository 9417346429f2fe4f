/* What a file's keys say of its model; every number is checked here, once. */
#include "settings.h"

#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/limits.h"
#include "pentium2/attention.h"

/* The newest version of the layout: 2 has scales of spans, tied codes and the rotation, 3 mixtures and what came with them. */
#define VERSION 3u

bool settings_key(char *key, size_t room, const char *architecture, const char *name)
{
    int length = snprintf(key, room, "%s.%s", architecture, name);
    return length > 0 && (size_t)length < room;
}

/* A number under the architecture's prefix; *number keeps its value where the key is missing. */
static void read_number(const struct loading *loading, const char *name, uint32_t *number)
{
    char key[128];
    if (settings_key(key, sizeof key, loading->model->shape.architecture, name))
        gguf_number(&loading->gguf, key, number);
}

static void read_float(const struct loading *loading, const char *name, float *number)
{
    char key[128];
    if (settings_key(key, sizeof key, loading->model->shape.architecture, name))
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

/* Experts, if there are any: n_ff is then an expert's. */
static ternary_status read_mixture(struct loading *loading)
{
    static const char *const routers[] = {"softmax"};
    ternary_model *model = loading->model;
    read_number(loading, "expert_count", &model->experts);
    if (model->experts == 0)
        return TERNARY_OK;
    read_number(loading, "expert_used_count", &model->experts_used);
    read_number(loading, "expert_feed_forward_length", &model->shape.n_ff);
    if (model->experts > EXPERTS_LIMIT || model->experts_used - 1 >= model->experts)
        return ternary_fail(loading->error, TERNARY_BAD_FILE, "a row cannot pass %u of %u experts", model->experts_used,
                            model->experts);
    if (model->by_lookup || choice(&loading->gguf, "cordee.ternary.router", routers, 1) == 1)
        return ternary_fail(loading->error, TERNARY_UNSUPPORTED, "its experts are chosen in a way that is unknown here");
    return TERNARY_OK;
}

/* Which layers have a window, and which rotate queries and keys; by default all do without the one and do the other. */
static ternary_status read_kinds_of_layers(struct loading *loading)
{
    static const char *const rotated[] = {"all", "windowed"};
    ternary_model *model = loading->model;
    const uint32_t layers = model->shape.layers;
    struct gguf_value value;
    uint8_t windowed[LAYERS_LIMIT] = {0};
    char key[128] = "";
    uint32_t kind = 0;
    read_number(loading, "attention.sliding_window", &model->window);
    settings_key(key, sizeof key, model->shape.architecture, "attention.sliding_window_pattern");
    if (model->window != 0 && (model->by_lookup || !gguf_flags(&loading->gguf, key, windowed, layers)))
        return ternary_fail(loading->error, TERNARY_BAD_FILE, "the file has a sliding window, but not for each layer whether");
    if (gguf_find_key(&loading->gguf, "cordee.ternary.rope_layers", &value))
        kind = choice(&loading->gguf, "cordee.ternary.rope_layers", rotated, 2);
    if (kind == 2)
        return ternary_fail(loading->error, TERNARY_UNSUPPORTED, "the file rotates layers in a way that is unknown here");
    for (uint32_t i = 0; i < layers; i++) {
        model->layers[i].is_windowed = windowed[i] != 0;
        model->layers[i].is_rotated = kind == 0 || windowed[i] != 0;
    }
    return TERNARY_OK;
}

/* Numbers that rows are multiplied by or kept within, and how much of a head is rotated. */
static ternary_status read_scalars(struct loading *loading)
{
    ternary_model *model = loading->model;
    const float most = 1e6f;
    model->rope_dims = model->shape.head_dim;
    read_number(loading, "rope.dimension_count", &model->rope_dims);
    gguf_float(&loading->gguf, "cordee.ternary.gate_limit", &model->gate_limit);
    read_float(loading, "embedding_scale", &model->embedding_scale);
    read_float(loading, "residual_scale", &model->residual_scale);
    if (model->embedding_scale == 0) /* none, as in slices that rows enter */
        model->embedding_scale = 1;
    if (model->residual_scale == 0)
        model->residual_scale = 1;
    if (!(model->gate_limit >= 0 && model->gate_limit < most && model->embedding_scale > 0 &&
          model->embedding_scale < most && model->residual_scale > 0 && model->residual_scale < most))
        return ternary_fail(loading->error, TERNARY_BAD_FILE, "a scale, or the limit of the gate, is impossible");
    if (model->rope_dims - 1 >= model->shape.head_dim || model->rope_dims % 2 != 0)
        return ternary_fail(loading->error, TERNARY_BAD_FILE, "%u of a head's %u dimensions cannot be rotated",
                            model->rope_dims, model->shape.head_dim);
    if (model->by_lookup && (model->rope_dims != model->shape.head_dim || model->gate_limit != 0 ||
                             model->embedding_scale != 1 || model->residual_scale != 1))
        return ternary_fail(loading->error, TERNARY_UNSUPPORTED, "its scales or its rotation are not for layout pentium2");
    return TERNARY_OK;
}

static ternary_status read_shape(struct loading *loading)
{
    ternary_model *model = loading->model;
    ternary_shape *shape = &model->shape;
    model->epsilon = 0;
    model->rope_base = 10000.0f;
    const ternary_status status = read_mixture(loading);
    if (status != TERNARY_OK)
        return status;
    read_number(loading, "embedding_length", &shape->n_embd);
    if (model->experts == 0)
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

ternary_status read_settings(struct loading *loading)
{
    ternary_status status = read_rules(loading);
    if (status == TERNARY_OK)
        status = read_shape(loading);
    if (status == TERNARY_OK)
        status = read_scalars(loading);
    return status == TERNARY_OK ? read_kinds_of_layers(loading) : status;
}
