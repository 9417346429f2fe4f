/* One decode step: a batch of rows through all layers of the file. Of each row x, with W the layer's matrices:
 *
 *     x = embedding of the token
 *     of each layer:
 *         n = norm(x);  x = x + Wo attention(rotated Wq n, over all rotated Wk n and Wv n up to here)
 *         n = norm(x);  x = x + Wdown (activation(Wgate n) * Wup n)
 *     logits = Whead norm(x)
 *
 * Some models have a norm in front of Wo and of Wdown, or of each head's queries and keys, too. Others were made in a
 * rotated basis: what enters their matrices is turned into it. Others have layers that see a window of positions, or have
 * experts in place of the three matrices of the second line (mixture.c). Which of these a model has is data of its file.
 * In front of each matrix the row becomes integers.
 *
 * The caller's thread walks through the layers. What divides into pieces (rows, a row's heads, a few groups of a matrix)
 * goes to the pool; a piece's result does not depend on who does it.
 */
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "mixture.h"
#include "pentium2/attention.h"
#include "pentium2/floats.h"
#include "pentium2/precision.h"
#include "step.h"

/* The parts of a step, in the order in which they follow one another. */
static ternary_status check(const ternary_session *session, const ternary_batch *batch, ternary_error *error);
static void run(ternary_session *session, const ternary_batch *batch, float *out);
static void enter(struct step *step);
static void announce(const struct step *step);
static void attention_block(struct step *step);
static void feed_forward_block(struct step *step);
static void head_block(struct step *step, float *out);

/* The parts of a block, beside those of step.h. set_inputs makes integers of what its work finds, for each row. */
static void set_inputs(struct step *step, work_function *work, const struct matrix *matrix, uint32_t planes);
static void add_residual(struct step *step);
static void keep_marked(struct step *step);

/* What the pool does: one row each, attend_piece a run of rows with one key/value head. */
static work_function enter_row;
static work_function enter_attention, rotate_and_store, attend_piece, enter_output;
static work_function enter_feed_forward, enter_down, add_row;
static work_function enter_head;

ternary_status ternary_decode(ternary_session *session, const ternary_batch *batch, float *out, ternary_error *error)
{
    /* Not inlined: the compiler might move arithmetic across the change of precision. */
    static void (*const volatile run_apart)(ternary_session *, const ternary_batch *, float *) = run;
    const ternary_status status = check(session, batch, error);
    if (status != TERNARY_OK)
        return status;
    const uint16_t before = session->model->by_lookup ? precision_set(PRECISION_SINGLE) : 0;
    run_apart(session, batch, out);
    if (session->model->by_lookup)
        precision_restore(before);
    return TERNARY_OK;
}

/* ---- The formula ---- */

static void run(ternary_session *session, const ternary_batch *batch, float *out)
{
    struct step step = {.session = session, .batch = batch, .rows = batch->rows};
    enter(&step);
    for (step.layer = 0; step.layer < session->model->shape.layers; step.layer++) {
        announce(&step);
        attention_block(&step);
        add_residual(&step);
        (session->model->experts > 0 ? mixture_block : feed_forward_block)(&step);
        add_residual(&step);
    }
    memcpy(session->cache.lengths, session->ends, session->config.sequences * sizeof *session->ends);
    if (!session->config.logits) {
        memcpy(out, session->hidden, (size_t)batch->rows * session->model->shape.n_embd * sizeof *out);
    } else if (step.marked > 0) {
        announce(&step);
        head_block(&step, out);
    }
}

static void attention_block(struct step *step)
{
    ternary_session *session = step->session;
    const ternary_model *model = session->model;
    const struct layer *layer = step_layer(step);
    set_inputs(step, enter_attention, &layer->q, model->planes);
    add_product(step, &layer->q, session->queries);
    add_product(step, &layer->k, session->keys);
    add_product(step, &layer->v, session->values);
    multiply_products(step);
    pool_run(&session->pool, rotate_and_store, step, step->rows);
    pool_run(&session->pool, attend_piece, step, step->runs * model->shape.kv_heads);
    if (session->config.logits && step->layer + 1 == model->shape.layers)
        keep_marked(step);
    set_inputs(step, enter_output, &layer->o, model->planes);
    add_product(step, &layer->o, session->added);
    multiply_products(step);
}

static void feed_forward_block(struct step *step)
{
    ternary_session *session = step->session;
    const struct layer *layer = step_layer(step);
    set_inputs(step, enter_feed_forward, &layer->gate, session->model->planes);
    add_product(step, &layer->gate, session->gates);
    add_product(step, &layer->up, session->ups);
    multiply_products(step);
    set_inputs(step, enter_down, &layer->down, session->model->planes);
    add_product(step, &layer->down, session->added);
    multiply_products(step);
}

/* What the last block added to the hidden rows. */
static void add_residual(struct step *step)
{
    pool_run(&step->session->pool, add_row, step, step->rows);
}

static void head_block(struct step *step, float *out)
{
    const ternary_model *model = step->session->model;
    set_inputs(step, enter_head, &model->head, model->head_planes);
    add_product(step, &model->head, out);
    multiply_products(step);
}

/* ---- The way in ---- */

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

static void announce(const struct step *step)
{
    if (step->session->watcher != NULL)
        step->session->watcher(step->session->watcher_argument, step->layer);
}

/* Rows that follow one another in a sequence attend together, as many as fit; gives the number of such runs. */
static uint32_t find_runs(const ternary_session *session, const ternary_batch *batch)
{
    const uint32_t shared = session->model->shape.heads / session->model->shape.kv_heads;
    const bool alone = session->model->by_lookup || shared > ATTENTION_QUERIES;
    const uint32_t most = alone ? 1 : ATTENTION_QUERIES / shared;
    uint32_t runs = 0, first = 0;
    for (uint32_t row = 0; row < batch->rows; row++)
        if (row == 0 || row - first == most || batch->sequences[row] != batch->sequences[first])
            session->runs[runs++] = first = row;
    session->runs[runs] = batch->rows;
    return runs;
}

/* Hidden rows of the batch, and what its rows have to do with one another. */
static void enter(struct step *step)
{
    ternary_session *session = step->session;
    step->runs = find_runs(session, step->batch);
    for (uint32_t row = 0; session->config.logits && row < step->batch->rows; row++)
        if (step->batch->outputs[row])
            session->marked[step->marked++] = row;
    pool_run(&session->pool, enter_row, step, step->batch->rows);
}

/* Cosines and sines of a position's angles, in double: floats would drift at large positions. */
static void set_angles(const ternary_session *session, uint32_t row, uint32_t position)
{
    const ternary_model *model = session->model;
    const uint32_t half = model->rope_dims / 2;
    float *cosines = session->cosines + (size_t)row * half, *sines = session->sines + (size_t)row * half;
    if (model->by_lookup) {
        pentium2_angles(cosines, sines, half, model->rope_base, model->rope_divisors, position);
        return;
    }
    for (uint32_t i = 0; i < half; i++) {
        double frequency = pow(model->rope_base, -(double)i / half);
        if (model->rope_divisors != NULL)
            frequency /= model->rope_divisors[i];
        cosines[i] = (float)cos(position * frequency);
        sines[i] = (float)sin(position * frequency);
    }
}

static void enter_row(void *argument, uint32_t row, uint32_t thread)
{
    const struct step *step = argument;
    const ternary_session *session = step->session;
    const ternary_batch *batch = step->batch;
    const uint32_t n_embd = session->model->shape.n_embd;
    float *hidden = session->hidden + (size_t)row * n_embd;
    (void)thread;
    if (batch->tokens != NULL) {
        const float scale = session->model->embedding_scale;
        const float *signs = session->model->signs[TURNED_EMBEDDING];
        model_embed(session->model, (uint32_t)batch->tokens[row], hidden);
        if (signs != NULL)
            session->kernels.turn_back(hidden, signs, n_embd, session->model->rotation_block);
        for (uint32_t i = 0; scale != 1 && i < n_embd; i++)
            hidden[i] *= scale;
    } else {
        memcpy(hidden, batch->embeddings + (size_t)row * n_embd, n_embd * sizeof *hidden);
    }
    set_angles(session, row, (uint32_t)batch->positions[row]);
}

/* ---- Attention ---- */

static void normalise_heads(const ternary_session *session, float *heads, uint32_t count, const float *norm)
{
    const uint32_t head_dim = session->model->shape.head_dim;
    for (uint32_t head = 0; norm != NULL && head < count; head++, heads += head_dim)
        session->kernels.normalise(heads, heads, norm, head_dim, session->model->epsilon);
}

/* The first dimensions of each head, by the row's angles. */
static void rotate_heads(const ternary_session *session, float *heads, uint32_t count, uint32_t row)
{
    const ternary_model *model = session->model;
    const uint32_t head_dim = model->shape.head_dim, dims = model->rope_dims;
    const size_t angles = (size_t)row * (dims / 2);
    void (*rotate)(float *, uint32_t, uint32_t, const float *, const float *) =
        model->rope == ROPE_HALVES ? session->kernels.rotate_halves : session->kernels.rotate_pairs;
    if (dims == head_dim) {
        rotate(heads, count, dims, session->cosines + angles, session->sines + angles);
        return;
    }
    for (uint32_t head = 0; head < count; head++, heads += head_dim)
        rotate(heads, 1, dims, session->cosines + angles, session->sines + angles);
}

static void rotate_and_store(void *argument, uint32_t row, uint32_t thread)
{
    const struct step *step = argument;
    const ternary_session *session = step->session;
    const ternary_batch *batch = step->batch;
    const ternary_shape *shape = &session->model->shape;
    const struct layer *layer = step_layer(step);
    float *query = session->queries + (size_t)row * session->model->q_dim;
    float *key = session->keys + (size_t)row * session->model->kv_dim;
    (void)thread;
    normalise_heads(session, query, shape->heads, layer->q_norm);
    normalise_heads(session, key, shape->kv_heads, layer->k_norm);
    if (layer->is_rotated) {
        rotate_heads(session, query, shape->heads, row);
        rotate_heads(session, key, shape->kv_heads, row);
    }
    (session->model->by_lookup ? pentium2_cache_store : cache_store)(
        &session->cache, step->layer, (uint32_t)batch->sequences[row], (uint32_t)batch->positions[row], key,
        session->values + (size_t)row * session->model->kv_dim);
}

/* All query heads that share a key/value head, of a run of rows. The results take the queries' place. */
static void attend_piece(void *argument, uint32_t piece, uint32_t thread)
{
    const struct step *step = argument;
    const ternary_session *session = step->session;
    const ternary_shape *shape = &session->model->shape;
    const uint32_t run = piece / shape->kv_heads, kv_head = piece % shape->kv_heads, row = session->runs[run];
    const uint32_t shared = shape->heads / shape->kv_heads, sequence = (uint32_t)step->batch->sequences[row];
    const size_t q_dim = session->model->q_dim;
    float *queries = session->queries + row * q_dim + (size_t)kv_head * shared * shape->head_dim;
    struct attention attention = {
        .row_stride = q_dim,
        .rows = session->runs[run + 1] - row,
        .head_dim = shape->head_dim,
        .positions = (uint32_t)step->batch->positions[row] + 1,
        .window = step_layer(step)->is_windowed ? session->model->window : 0,
        .cache = cache_head_at(&session->cache, step->layer, sequence, kv_head),
        .value_stride = session->cache.value_stride,
        .scratch = session->scratch + thread * session->scratch_elements,
    };
    if (session->model->by_lookup) {
        pentium2_attend(session->lookup, &session->cache, step->layer, sequence, kv_head, shared, queries,
                        attention.positions, attention.scratch);
        return;
    }
    if (attention.window > 0 && attention.positions > attention.window) { /* what no row of the run sees is not read */
        const uint32_t skipped = (attention.positions - attention.window) / LANES * LANES;
        attention.cache = cache_head_from(&session->cache, attention.cache, skipped);
        attention.positions -= skipped;
    }
    for (uint32_t done = 0; done < shared; done += attention.heads) {
        attention.heads = shared - done < ATTENTION_QUERIES ? shared - done : ATTENTION_QUERIES;
        attention.queries = queries + (size_t)done * shape->head_dim;
        session->kernels.attend[session->cache.kind](&attention);
    }
}

/* Behind the last layer's keys and values nobody asks for the rows without logits: the others move to the front. */
static void keep_marked(struct step *step)
{
    const ternary_session *session = step->session;
    const size_t n_embd = session->model->shape.n_embd, q_dim = session->model->q_dim;
    for (uint32_t i = 0; i < step->marked; i++) {
        const uint32_t row = session->marked[i];
        memmove(session->hidden + i * n_embd, session->hidden + row * n_embd, n_embd * sizeof(float));
        memmove(session->queries + i * q_dim, session->queries + row * q_dim, q_dim * sizeof(float));
    }
    step->rows = step->marked;
}

/* ---- Rows in front of a matrix, and behind a block ---- */

static void set_inputs(struct step *step, work_function *work, const struct matrix *matrix, uint32_t planes)
{
    shape_inputs(&step->session->inputs, matrix, planes);
    pool_run(&step->session->pool, work, step, step->rows);
}

static void set_input_from_hidden(const struct step *step, uint32_t thread, uint32_t row, const float *norm,
                                  enum turned turned)
{
    const uint32_t n_embd = step->session->model->shape.n_embd;
    set_input(step->session, &step->session->inputs, thread, row, step->session->hidden + (size_t)row * n_embd, norm, turned, n_embd);
}

static void enter_attention(void *argument, uint32_t row, uint32_t thread)
{
    const struct step *step = argument;
    set_input_from_hidden(step, thread, row, step_layer(step)->attn_norm, TURNED_ATTENTION);
}

static void enter_output(void *argument, uint32_t row, uint32_t thread)
{
    const struct step *step = argument;
    const ternary_session *session = step->session;
    const uint32_t q_dim = session->model->q_dim;
    set_input(session, &session->inputs, thread, row, session->queries + (size_t)row * q_dim,
              step_layer(step)->attn_sub_norm, TURNED_OUTPUT, q_dim);
}

static void enter_feed_forward(void *argument, uint32_t row, uint32_t thread)
{
    const struct step *step = argument;
    set_input_from_hidden(step, thread, row, step_layer(step)->ffn_norm, TURNED_FEED_FORWARD);
}

static void enter_down(void *argument, uint32_t row, uint32_t thread)
{
    const struct step *step = argument;
    const ternary_session *session = step->session;
    const uint32_t n_ff = session->model->shape.n_ff;
    float *gate = session->gates + (size_t)row * n_ff;
    apply_gate(session, gate, session->ups + (size_t)row * n_ff);
    set_input(session, &session->inputs, thread, row, gate, step_layer(step)->ffn_sub_norm, TURNED_DOWN, n_ff);
}

static void enter_head(void *argument, uint32_t row, uint32_t thread)
{
    const struct step *step = argument;
    set_input_from_hidden(step, thread, row, step->session->model->output_norm, TURNED_HEAD);
}

static void add_row(void *argument, uint32_t row, uint32_t thread)
{
    const struct step *step = argument;
    const ternary_session *session = step->session;
    const uint32_t n_embd = session->model->shape.n_embd;
    const float scale = session->model->residual_scale;
    float *hidden = session->hidden + (size_t)row * n_embd, *added = session->added + (size_t)row * n_embd;
    (void)thread;
    if (scale == 1)
        session->kernels.add(hidden, added, n_embd);
    else
        session->kernels.add_scaled(hidden, added, scale, n_embd);
}
