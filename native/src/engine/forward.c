/* One decode step: a batch of rows through all layers of the file. Of each row x, with W the layer's matrices:
 *
 *     x = embedding of the token
 *     of each layer:
 *         n = norm(x);  x = x + Wo attention(rotated Wq n, over all rotated Wk n and Wv n up to here)
 *         n = norm(x);  x = x + Wdown (activation(Wgate n) * Wup n)
 *     logits = Whead norm(x)
 *
 * Some models have a norm in front of Wo and of Wdown, or of each head's queries and keys, too. Others were made in a
 * rotated basis: what enters their matrices is turned into it. In front of each matrix the row becomes integers.
 *
 * The caller's thread walks through the layers. What divides into pieces (rows, a row's heads, a few groups of a matrix)
 * goes to the pool; a piece's result does not depend on who does it.
 */
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "pentium2/attention.h"
#include "pentium2/floats.h"
#include "pentium2/precision.h"
#include "session.h"

/* One matrix and where its results go: out [rows][stride]. */
struct product {
    const struct matrix *matrix;
    float *out;
    size_t stride;
};

#define PRODUCTS LOOKUP_MATRICES

struct step {
    ternary_session *session;
    const ternary_batch *batch;
    uint32_t layer;   /* the one being computed */
    uint32_t rows;    /* still to be computed: the batch's, and behind the last attention those that have logits */
    uint32_t marked;  /* rows that have logits */
    uint32_t runs;    /* of rows that attend together */
    uint32_t count;   /* of the products */
    uint32_t stretch; /* slabs that each thread multiplies first */
    struct product products[PRODUCTS];
};

/* The parts of a step, in the order in which they follow one another. */
static ternary_status check(const ternary_session *session, const ternary_batch *batch, ternary_error *error);
static void run(ternary_session *session, const ternary_batch *batch, float *out);
static void enter(struct step *step);
static void announce(const struct step *step);
static void attention_block(struct step *step);
static void feed_forward_block(struct step *step);
static void head_block(struct step *step, float *out);

/* The parts of a block. set_inputs makes integers of what its work finds, for each row; multiply takes those times the
 * step's first products. */
static void set_inputs(struct step *step, work_function *work, const struct matrix *matrix, uint32_t planes);
static void multiply(struct step *step, uint32_t count);
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
        feed_forward_block(&step);
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
    const struct layer *layer = &model->layers[step->layer];
    set_inputs(step, enter_attention, &layer->q, model->planes);
    step->products[0] = (struct product){&layer->q, session->queries, model->q_dim};
    step->products[1] = (struct product){&layer->k, session->keys, model->kv_dim};
    step->products[2] = (struct product){&layer->v, session->values, model->kv_dim};
    multiply(step, 3);
    pool_run(&session->pool, rotate_and_store, step, step->rows);
    pool_run(&session->pool, attend_piece, step, step->runs * model->shape.kv_heads);
    if (session->config.logits && step->layer + 1 == model->shape.layers)
        keep_marked(step);
    set_inputs(step, enter_output, &layer->o, model->planes);
    step->products[0] = (struct product){&layer->o, session->added, model->shape.n_embd};
    multiply(step, 1);
}

static void feed_forward_block(struct step *step)
{
    ternary_session *session = step->session;
    const ternary_model *model = session->model;
    const struct layer *layer = &model->layers[step->layer];
    const uint32_t n_embd = model->shape.n_embd, n_ff = model->shape.n_ff;
    set_inputs(step, enter_feed_forward, &layer->gate, model->planes);
    step->products[0] = (struct product){&layer->gate, session->gates, n_ff};
    step->products[1] = (struct product){&layer->up, session->ups, n_ff};
    multiply(step, 2);
    set_inputs(step, enter_down, &layer->down, model->planes);
    step->products[0] = (struct product){&layer->down, session->added, n_embd};
    multiply(step, 1);
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
    step->products[0] = (struct product){&model->head, out, model->shape.n_vocab};
    multiply(step, 1);
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
    const uint32_t half = model->shape.head_dim / 2;
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
        const float *signs = session->model->signs[TURNED_EMBEDDING];
        model_embed(session->model, (uint32_t)batch->tokens[row], hidden);
        if (signs != NULL)
            session->kernels.turn_back(hidden, signs, n_embd, session->model->rotation_block);
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

static void rotate_and_store(void *argument, uint32_t row, uint32_t thread)
{
    const struct step *step = argument;
    const ternary_session *session = step->session;
    const ternary_batch *batch = step->batch;
    const ternary_shape *shape = &session->model->shape;
    const uint32_t half = shape->head_dim / 2;
    const float *cosines = session->cosines + (size_t)row * half, *sines = session->sines + (size_t)row * half;
    float *query = session->queries + (size_t)row * session->model->q_dim;
    float *key = session->keys + (size_t)row * session->model->kv_dim;
    void (*rotate)(float *, uint32_t, uint32_t, const float *, const float *) =
        session->model->rope == ROPE_HALVES ? session->kernels.rotate_halves : session->kernels.rotate_pairs;
    (void)thread;
    normalise_heads(session, query, shape->heads, session->model->layers[step->layer].q_norm);
    normalise_heads(session, key, shape->kv_heads, session->model->layers[step->layer].k_norm);
    rotate(query, shape->heads, shape->head_dim, cosines, sines);
    rotate(key, shape->kv_heads, shape->head_dim, cosines, sines);
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
        .cache = cache_head_at(&session->cache, step->layer, sequence, kv_head),
        .value_stride = session->cache.value_stride,
        .scratch = session->scratch + thread * session->scratch_elements,
    };
    if (session->model->by_lookup) {
        pentium2_attend(session->lookup, &session->cache, step->layer, sequence, kv_head, shared, queries,
                        attention.positions, attention.scratch);
        return;
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
    struct activations *inputs = &step->session->inputs;
    const bool has_spans = matrix->span_scales != NULL;
    inputs->stride = (size_t)quads_of(matrix->cols) * 4;
    inputs->planes = planes;
    inputs->spans = has_spans ? matrix->spans : 1;
    inputs->span_columns = has_spans ? matrix->span_quads * 4 : matrix->cols;
    pool_run(&step->session->pool, work, step, step->rows);
}

/* One row becomes integers; normalised before if there is a norm, and turned if its matrix was. */
static void set_input(const ternary_session *session, uint32_t thread, uint32_t row, const float *x, const float *norm,
                      enum turned turned, uint32_t n)
{
    const float *signs = session->model->signs[turned];
    float *normal = session->normal + thread * session->normal_elements;
    if (norm != NULL)
        session->kernels.normalise(normal, x, norm, n, session->model->epsilon);
    else if (signs != NULL)
        memcpy(normal, x, n * sizeof *x);
    if (signs != NULL)
        session->kernels.turn(normal, signs, n, session->model->rotation_block);
    session->kernels.quantise(&session->inputs, row, norm != NULL || signs != NULL ? normal : x, n);
}

static void set_input_from_hidden(const struct step *step, uint32_t thread, uint32_t row, const float *norm,
                                  enum turned turned)
{
    const uint32_t n_embd = step->session->model->shape.n_embd;
    set_input(step->session, thread, row, step->session->hidden + (size_t)row * n_embd, norm, turned, n_embd);
}

static void enter_attention(void *argument, uint32_t row, uint32_t thread)
{
    const struct step *step = argument;
    set_input_from_hidden(step, thread, row, step->session->model->layers[step->layer].attn_norm, TURNED_ATTENTION);
}

static void enter_output(void *argument, uint32_t row, uint32_t thread)
{
    const struct step *step = argument;
    const ternary_session *session = step->session;
    const uint32_t q_dim = session->model->q_dim;
    set_input(session, thread, row, session->queries + (size_t)row * q_dim,
              session->model->layers[step->layer].attn_sub_norm, TURNED_OUTPUT, q_dim);
}

static void enter_feed_forward(void *argument, uint32_t row, uint32_t thread)
{
    const struct step *step = argument;
    set_input_from_hidden(step, thread, row, step->session->model->layers[step->layer].ffn_norm, TURNED_FEED_FORWARD);
}

static void enter_down(void *argument, uint32_t row, uint32_t thread)
{
    const struct step *step = argument;
    const ternary_session *session = step->session;
    const uint32_t n_ff = session->model->shape.n_ff;
    float *gate = session->gates + (size_t)row * n_ff, *up = session->ups + (size_t)row * n_ff;
    const bool is_silu = session->model->gate == GATE_SILU;
    (is_silu ? session->kernels.gate_silu : session->kernels.gate_relu2)(gate, up, n_ff);
    set_input(session, thread, row, gate, session->model->layers[step->layer].ffn_sub_norm, TURNED_DOWN, n_ff);
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
    (void)thread;
    session->kernels.add(session->hidden + (size_t)row * n_embd, session->added + (size_t)row * n_embd, n_embd);
}

/* ---- Matrices ---- */

/* Turns dots of `groups` groups from `first` on into floats; rows behind the matrix's last are dropped. */
static void put_rows(const struct kernels *kernels, const struct product *product, const struct activations *inputs,
                     uint32_t row, uint32_t first, uint32_t groups, const int32_t *dots)
{
    const struct matrix *matrix = product->matrix;
    const uint32_t group_rows = layout_facts[matrix->layout].group_rows, start = first * group_rows;
    const uint32_t width = groups * group_rows;
    const uint32_t end = start + width < matrix->rows ? start + width : matrix->rows;
    float *out = product->out + row * product->stride;
    if (matrix->scale_rows == 1) {
        kernels->rescale_each(out + start, dots, width, inputs->planes, end - start, matrix->scales + start,
                              inputs->scales[row]);
        return;
    }
    for (uint32_t at = start; at < end;) {
        const uint32_t scale = at / matrix->scale_rows;
        const uint32_t until = (scale + 1) * matrix->scale_rows < end ? (scale + 1) * matrix->scale_rows : end;
        kernels->rescale(out + at, dots + (at - start), width, inputs->planes, until - at,
                         matrix->scales[scale] * inputs->scales[row]);
        at = until;
    }
}

/* Those groups of a matrix with scales of spans, from `first` on, times `count` rows from `row` on: one plane after the
 * other, and in it one span after the other, in the order of columns. */
static void multiply_spans(const struct kernels *kernels, const struct product *product,
                           const struct activations *inputs, uint32_t row, uint32_t count, uint32_t first,
                           uint32_t groups, int32_t *dots)
{
    const struct matrix *matrix = product->matrix;
    const struct layout_facts *facts = &layout_facts[matrix->layout];
    const size_t group_bytes = group_bytes_of(matrix), digit_row = (size_t)row * inputs->planes;
    const uint32_t all = matrix->planes * matrix->spans, start = first * facts->group_rows, left = matrix->rows - start;
    struct span_dots of = {
        .stride = (size_t)groups * facts->group_rows,
        .planes = inputs->planes,
        .group_rows = facts->group_rows,
        .scales_stride = (size_t)all * facts->group_rows,
    };
    of.rows = left < of.stride ? left : (uint32_t)of.stride;
    for (uint32_t i_span = 0; i_span < all; i_span++) {
        const uint32_t plane = i_span / matrix->spans, span = i_span % matrix->spans;
        const uint32_t quad = span * matrix->span_quads, rest = matrix->quads - quad;
        const size_t place = ((size_t)plane * matrix->quads + quad) * facts->quad_bytes;
        kernels->dot[matrix->layout](
            kernels, matrix->data + first * group_bytes + place, groups, group_bytes,
            rest < matrix->span_quads ? rest : matrix->span_quads, inputs->digits + digit_row * inputs->stride + quad * 4,
            inputs->stride, inputs->sums + span * inputs->sums_stride + digit_row, count * inputs->planes, dots);
        of.is_first = i_span == 0;
        of.scales = matrix->span_scales + ((size_t)first * all + i_span) * facts->group_rows;
        for (uint32_t i = 0; i < count; i++) {
            of.dots = dots + i * inputs->planes * of.stride;
            of.scale = inputs->scales[(size_t)(row + i) * inputs->spans + span];
            kernels->add_span(product->out + (row + i) * product->stride + start, &of);
        }
    }
}

/* A few groups of a matrix, from `first` on, times all rows. */
static void multiply_groups(const struct step *step, const struct product *product, uint32_t first, uint32_t thread)
{
    const ternary_session *session = step->session;
    const struct kernels *kernels = &session->kernels;
    const struct matrix *matrix = product->matrix;
    const struct layout_facts *facts = &layout_facts[matrix->layout];
    const struct activations *inputs = &session->inputs;
    const uint32_t groups = matrix->groups - first < DOT_GROUPS ? matrix->groups - first : DOT_GROUPS;
    const size_t group_bytes = group_bytes_of(matrix);
    const uint32_t at_once = kernels->rows / inputs->planes;
    int32_t *dots = session->dots + thread * dots_elements(kernels);
    for (uint32_t row = 0; row < step->rows; row += at_once) {
        const uint32_t count = step->rows - row < at_once ? step->rows - row : at_once;
        const size_t digit_row = (size_t)row * inputs->planes;
        if (matrix->span_scales != NULL) {
            multiply_spans(kernels, product, inputs, row, count, first, groups, dots);
            continue;
        }
        kernels->dot[matrix->layout](kernels, matrix->data + first * group_bytes, groups, group_bytes, matrix->quads,
                                     inputs->digits + digit_row * inputs->stride, inputs->stride,
                                     inputs->sums + digit_row, count * inputs->planes, dots);
        for (uint32_t i = 0; i < count; i++)
            put_rows(kernels, product, inputs, row + i, first, groups,
                     dots + (size_t)i * inputs->planes * groups * facts->group_rows);
    }
}

/* A slab is a few groups. */
static uint32_t slabs_of(const struct matrix *matrix)
{
    return (matrix->groups + DOT_GROUPS - 1) / DOT_GROUPS;
}

/* The first pieces of a job, one for each thread, are stretches of slabs, since weights are read up to a fifth faster when
 * they follow one another; what is left goes slab by slab to whoever is done. */
static void multiply_piece(void *argument, uint32_t piece, uint32_t thread)
{
    const struct step *step = argument;
    const struct product *product = step->products;
    const uint32_t threads = step->session->config.threads;
    uint32_t slab = piece < threads ? piece * step->stretch : threads * step->stretch + (piece - threads);
    uint32_t left = piece < threads ? step->stretch : 1;
    while (slab >= slabs_of(product->matrix))
        slab -= slabs_of(product++->matrix);
    for (; left > 0; left--) {
        multiply_groups(step, product, slab * DOT_GROUPS, thread);
        if (++slab == slabs_of(product->matrix) && left > 1)
            product++, slab = 0;
    }
}

/* One row times the step's products in the layout `pentium2`, which share tables. */
static void look_up_row(void *argument, uint32_t row, uint32_t thread)
{
    const struct step *step = argument;
    const ternary_session *session = step->session;
    const struct matrix *matrices[PRODUCTS];
    float *outs[PRODUCTS];
    for (uint32_t i = 0; i < step->count; i++) {
        matrices[i] = step->products[i].matrix;
        outs[i] = step->products[i].out + row * step->products[i].stride;
    }
    lookup_multiply(session->lookup, matrices, outs, step->count, session->inputs.digits + row * session->inputs.stride,
                    session->inputs.scales[row], session->tables + thread * (LOOKUP_TILE * LOOKUP_ENTRIES));
}

static void multiply(struct step *step, uint32_t count)
{
    const uint32_t threads = step->session->config.threads;
    uint32_t slabs = 0, share;
    if (step->session->model->by_lookup) {
        step->count = count;
        pool_run(&step->session->pool, look_up_row, step, step->rows);
        return;
    }
    for (uint32_t i = 0; i < count; i++)
        slabs += slabs_of(step->products[i].matrix);
    share = slabs / 4 * 3 / threads; /* three quarters are shared out at once */
    step->stretch = share > 1 ? share : 1;
    pool_run(&step->session->pool, multiply_piece, step,
             slabs > threads ? threads + (slabs - threads * step->stretch) : slabs);
}
