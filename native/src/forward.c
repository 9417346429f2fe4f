/* One decode step: a batch of rows through all layers of the file.
 *
 * All threads walk through `forward` together. Between two barriers they take pieces of work (a row, a row's head, a
 * few groups of a matrix) as they come; a piece's result does not depend on who does it.
 */
#include <math.h>
#include <string.h>

#include "error.h"
#include "session.h"

struct step {
    ternary_session *session;
    const ternary_batch *batch;
    uint32_t marked; /* how many rows have logits */
    float *out;
};

/* One matrix and where its results go: out [rows][stride]. */
struct product {
    const struct matrix *matrix;
    float *out;
    size_t stride;
};

#define PRODUCTS 3

/* ---- Pieces of work ---- */

static uint32_t pieces_of(const struct matrix *matrix)
{
    return (matrix->groups + DOT_GROUPS - 1) / DOT_GROUPS;
}

/* Turns dots of `groups` groups from `first` on into floats; rows behind the matrix's last are dropped. */
static void put_rows(const struct kernels *kernels, const struct product *product, const struct activations *inputs,
                     uint32_t row, uint32_t first, uint32_t groups, const int32_t *dots)
{
    const struct matrix *matrix = product->matrix;
    const uint32_t group_rows = layout_facts[matrix->layout].group_rows, start = first * group_rows;
    const uint32_t width = groups * group_rows;
    const uint32_t end = start + width < matrix->rows ? start + width : matrix->rows;
    for (uint32_t at = start; at < end;) {
        const uint32_t scale = at / matrix->scale_rows;
        const uint32_t until = (scale + 1) * matrix->scale_rows < end ? (scale + 1) * matrix->scale_rows : end;
        kernels->rescale(product->out + row * product->stride + at, dots + (at - start), width, inputs->planes,
                         until - at, matrix->scales[scale] * inputs->scales[row]);
        at = until;
    }
}

/* A few groups of a matrix times all rows. */
static void multiply_piece(const ternary_session *session, const struct product *product, uint32_t piece,
                           uint32_t rows, int32_t *dots)
{
    const struct matrix *matrix = product->matrix;
    const struct layout_facts *facts = &layout_facts[matrix->layout];
    const struct activations *inputs = &session->inputs;
    const uint32_t first = piece * DOT_GROUPS;
    const uint32_t groups = matrix->groups - first < DOT_GROUPS ? matrix->groups - first : DOT_GROUPS;
    const uint8_t *data = matrix->data + (size_t)first * matrix->quads * facts->quad_bytes;
    const uint32_t at_once = DOT_ROWS / inputs->planes;
    for (uint32_t row = 0; row < rows; row += at_once) {
        const uint32_t count = rows - row < at_once ? rows - row : at_once;
        const size_t digit_row = (size_t)row * inputs->planes;
        session->kernels->dot[matrix->layout](data, groups, matrix->quads, inputs->digits + digit_row * inputs->stride,
                                              inputs->stride, inputs->sums + digit_row, count * inputs->planes, dots);
        for (uint32_t i = 0; i < count; i++)
            put_rows(session->kernels, product, inputs, row + i, first, groups,
                     dots + (size_t)i * inputs->planes * groups * facts->group_rows);
    }
}

/* Matrices that share their inputs, together. */
static void multiply(struct step *step, uint32_t thread, const struct product *products, uint32_t count, uint32_t rows)
{
    ternary_session *session = step->session;
    int32_t *dots = session->dots + thread * DOTS_ELEMENTS;
    uint32_t all = 0, piece;
    for (uint32_t i = 0; i < count; i++)
        all += pieces_of(products[i].matrix);
    while ((piece = pool_next(&session->pool)) < all) {
        const struct product *product = products;
        while (piece >= pieces_of(product->matrix))
            piece -= pieces_of(product++->matrix);
        multiply_piece(session, product, piece, rows, dots);
    }
    pool_barrier(&session->pool);
}

/* One row of what comes next becomes integers, normalised before if there is a norm. */
static void enter(const ternary_session *session, uint32_t thread, uint32_t row, const float *x, const float *norm,
                  uint32_t n)
{
    if (norm != NULL) {
        float *normal = session->normal + thread * session->normal_elements;
        session->kernels->normalise(normal, x, norm, n, session->model->epsilon);
        x = normal;
    }
    session->kernels->quantise(&session->inputs, row, x, n);
}

/* Inputs of width `n` come next. Every thread says so, and all say the same: one of them is enough. */
static void set_inputs(ternary_session *session, uint32_t thread, uint32_t n, uint32_t planes)
{
    if (thread == 0) {
        session->inputs.stride = (size_t)quads_of(n) * 4;
        session->inputs.planes = planes;
    }
    pool_barrier(&session->pool);
}

/* ---- The blocks of a layer ---- */

static void rotate_and_store(const ternary_session *session, const ternary_batch *batch, uint32_t layer, uint32_t row)
{
    const ternary_shape *shape = &session->model->shape;
    const uint32_t half = shape->head_dim / 2;
    const float *cosines = session->cosines + (size_t)row * half, *sines = session->sines + (size_t)row * half;
    float *query = session->queries + (size_t)row * shape->heads * shape->head_dim;
    float *key = session->keys + (size_t)row * shape->kv_heads * shape->head_dim;
    void (*rotate)(float *, uint32_t, uint32_t, const float *, const float *) =
        session->model->rope == ROPE_HALVES ? session->kernels->rotate_halves : session->kernels->rotate_pairs;
    rotate(query, shape->heads, shape->head_dim, cosines, sines);
    rotate(key, shape->kv_heads, shape->head_dim, cosines, sines);
    cache_store(&session->cache, layer, (uint32_t)batch->sequences[row], (uint32_t)batch->positions[row], key,
                session->values + (size_t)row * shape->kv_heads * shape->head_dim);
}

/* All query heads that share a key/value head, of one row. The results take the queries' place. */
static void attend_row(const ternary_session *session, const ternary_batch *batch, uint32_t thread, uint32_t layer,
                       uint32_t row, uint32_t kv_head)
{
    const ternary_shape *shape = &session->model->shape;
    const uint32_t sequence = (uint32_t)batch->sequences[row], shared = shape->heads / shape->kv_heads;
    const uint16_t *keys = cache_keys(&session->cache, layer, sequence, kv_head);
    const uint16_t *values = cache_values(&session->cache, layer, sequence, kv_head);
    float *scores = session->scores + thread * session->scores_elements;
    float *queries = session->queries + ((size_t)row * shape->heads + (size_t)kv_head * shared) * shape->head_dim;
    for (uint32_t done = 0; done < shared; done += ATTENTION_HEADS) {
        const uint32_t heads = shared - done < ATTENTION_HEADS ? shared - done : ATTENTION_HEADS;
        float *some = queries + (size_t)done * shape->head_dim;
        session->kernels->attend(some, some, heads, shape->head_dim, keys, values, session->cache.value_stride,
                                 (uint32_t)batch->positions[row] + 1, scores);
    }
}

static void attention_block(struct step *step, uint32_t thread, uint32_t index)
{
    ternary_session *session = step->session;
    const ternary_model *model = session->model;
    const struct layer *layer = &model->layers[index];
    const ternary_shape *shape = &model->shape;
    const uint32_t rows = step->batch->rows, wide = shape->heads * shape->head_dim;
    const uint32_t narrow = shape->kv_heads * shape->head_dim;
    const struct product in[PRODUCTS] = {
        {&layer->q, session->queries, wide}, {&layer->k, session->keys, narrow}, {&layer->v, session->values, narrow}};
    const struct product out = {&layer->o, session->added, shape->n_embd};
    uint32_t piece;
    set_inputs(session, thread, shape->n_embd, model->planes);
    while ((piece = pool_next(&session->pool)) < rows)
        enter(session, thread, piece, session->hidden + (size_t)piece * shape->n_embd, layer->attn_norm, shape->n_embd);
    pool_barrier(&session->pool);
    multiply(step, thread, in, 3, rows);
    while ((piece = pool_next(&session->pool)) < rows)
        rotate_and_store(session, step->batch, index, piece);
    set_inputs(session, thread, wide, model->planes);
    while ((piece = pool_next(&session->pool)) < rows * shape->kv_heads)
        attend_row(session, step->batch, thread, index, piece / shape->kv_heads, piece % shape->kv_heads);
    pool_barrier(&session->pool);
    while ((piece = pool_next(&session->pool)) < rows)
        enter(session, thread, piece, session->queries + (size_t)piece * wide, layer->attn_sub_norm, wide);
    pool_barrier(&session->pool);
    multiply(step, thread, &out, 1, rows);
}

static void feed_forward_block(struct step *step, uint32_t thread, uint32_t index)
{
    ternary_session *session = step->session;
    const ternary_model *model = session->model;
    const struct layer *layer = &model->layers[index];
    const struct kernels *kernels = session->kernels;
    const uint32_t rows = step->batch->rows, n_embd = model->shape.n_embd, n_ff = model->shape.n_ff;
    const struct product in[PRODUCTS] = {{&layer->gate, session->gates, n_ff}, {&layer->up, session->ups, n_ff}};
    const struct product out = {&layer->down, session->added, n_embd};
    uint32_t row;
    set_inputs(session, thread, n_embd, model->planes);
    while ((row = pool_next(&session->pool)) < rows) {
        float *hidden = session->hidden + (size_t)row * n_embd;
        kernels->add(hidden, session->added + (size_t)row * n_embd, n_embd);
        enter(session, thread, row, hidden, layer->ffn_norm, n_embd);
    }
    pool_barrier(&session->pool);
    multiply(step, thread, in, 2, rows);
    set_inputs(session, thread, n_ff, model->planes);
    while ((row = pool_next(&session->pool)) < rows) {
        float *gate = session->gates + (size_t)row * n_ff, *up = session->ups + (size_t)row * n_ff;
        (model->gate == GATE_SILU ? kernels->gate_silu : kernels->gate_relu2)(gate, up, n_ff);
        enter(session, thread, row, gate, layer->ffn_sub_norm, n_ff);
    }
    pool_barrier(&session->pool);
    multiply(step, thread, &out, 1, rows);
    while ((row = pool_next(&session->pool)) < rows)
        kernels->add(session->hidden + (size_t)row * n_embd, session->added + (size_t)row * n_embd, n_embd);
    pool_barrier(&session->pool);
}

static void head_block(struct step *step, uint32_t thread)
{
    ternary_session *session = step->session;
    const ternary_model *model = session->model;
    const uint32_t n_embd = model->shape.n_embd;
    const struct product out = {&model->head, step->out, model->shape.n_vocab};
    uint32_t piece;
    set_inputs(session, thread, n_embd, model->head_planes);
    while ((piece = pool_next(&session->pool)) < step->marked)
        enter(session, thread, piece, session->hidden + (size_t)session->marked[piece] * n_embd, model->output_norm,
              n_embd);
    pool_barrier(&session->pool);
    multiply(step, thread, &out, 1, step->marked);
}

/* ---- The way in and out ---- */

/* Cosines and sines of a position's angles, in double: floats would drift at large positions. */
static void set_angles(const ternary_session *session, uint32_t row, uint32_t position)
{
    const ternary_model *model = session->model;
    const uint32_t half = model->shape.head_dim / 2;
    for (uint32_t i = 0; i < half; i++) {
        double frequency = pow(model->rope_base, -(double)i / half);
        if (model->rope_divisors != NULL)
            frequency /= model->rope_divisors[i];
        session->cosines[(size_t)row * half + i] = (float)cos(position * frequency);
        session->sines[(size_t)row * half + i] = (float)sin(position * frequency);
    }
}

static void enter_row(const struct step *step, uint32_t row)
{
    const ternary_session *session = step->session;
    const ternary_batch *batch = step->batch;
    const uint32_t n_embd = session->model->shape.n_embd;
    float *hidden = session->hidden + (size_t)row * n_embd;
    if (batch->tokens != NULL)
        model_embed(session->model, (uint32_t)batch->tokens[row], hidden);
    else
        memcpy(hidden, batch->embeddings + (size_t)row * n_embd, n_embd * sizeof *hidden);
    set_angles(session, row, (uint32_t)batch->positions[row]);
}

static void forward(void *argument, uint32_t thread)
{
    struct step *step = argument;
    ternary_session *session = step->session;
    uint32_t row;
    while ((row = pool_next(&session->pool)) < step->batch->rows)
        enter_row(step, row);
    pool_barrier(&session->pool);
    for (uint32_t layer = 0; layer < session->model->shape.layers; layer++) {
        attention_block(step, thread, layer);
        feed_forward_block(step, thread, layer);
    }
    if (session->config.logits)
        head_block(step, thread);
}

/* Refuses what the forward pass could not run; finds the sequences' new lengths. */
static ternary_status check(const ternary_session *session, const ternary_batch *batch, ternary_error *error)
{
    const ternary_model *model = session->model;
    if (batch->rows == 0 || batch->rows > session->config.batch_rows)
        return ternary_fail(error, TERNARY_REFUSED,
                            "a batch has 1 to %u rows, not %u", session->config.batch_rows, batch->rows);
    if ((batch->tokens == NULL) == (batch->embeddings == NULL))
        return ternary_fail(error, TERNARY_REFUSED, "a batch has either tokens or rows");
    if (batch->tokens != NULL && !model->shape.has_embedding)
        return ternary_fail(error, TERNARY_REFUSED, "the file has no embedding: only rows can go in");
    memcpy(session->ends, session->cache.lengths, session->config.sequences * sizeof *session->ends);
    for (uint32_t row = 0; row < batch->rows; row++) {
        const int32_t sequence = batch->sequences[row], position = batch->positions[row];
        if (sequence < 0 || (uint32_t)sequence >= session->config.sequences)
            return ternary_fail(error, TERNARY_REFUSED,
                                "there is no sequence %d among %u", sequence, session->config.sequences);
        uint32_t *end = &session->ends[sequence];
        if (position < 0 || (uint32_t)position != *end)
            return ternary_fail(error, TERNARY_REFUSED,
                                "sequence %d continues at position %u, not %d", sequence, *end, position);
        if (++*end > session->config.context)
            return ternary_fail(error, TERNARY_REFUSED, "a sequence is longer than the context of %u tokens",
                        session->config.context);
        if (batch->tokens != NULL && (uint32_t)batch->tokens[row] >= model->shape.n_vocab)
            return ternary_fail(error, TERNARY_REFUSED, "token %d is outside the vocabulary of %u", batch->tokens[row],
                        model->shape.n_vocab);
    }
    return TERNARY_OK;
}

ternary_status ternary_decode(ternary_session *session, const ternary_batch *batch, float *out, ternary_error *error)
{
    struct step step = {.session = session, .batch = batch, .out = out};
    ternary_status status = check(session, batch, error);
    if (status != TERNARY_OK)
        return status;
    for (uint32_t row = 0; row < batch->rows && session->config.logits; row++)
        if (batch->outputs[row])
            session->marked[step.marked++] = row;
    pool_run(&session->pool, forward, &step);
    memcpy(session->cache.lengths, session->ends, session->config.sequences * sizeof *session->ends);
    if (!session->config.logits)
        memcpy(out, session->hidden, (size_t)batch->rows * session->model->shape.n_embd * sizeof *out);
    return TERNARY_OK;
}
