/* The feed-forward block of layers with experts. Of each row x:
 *
 *     n = norm(x);  scores = Wrouter n, in float32
 *     those experts are chosen whose scores are the largest; their shares are the softmax of these scores
 *     x = x + sum over the chosen, the best first, of share * Wdown (activation(Wgate n) * Wup n)
 *
 * A *visit* is a row with one of its experts. Visits are sorted by expert, so that the weights of each are read once for
 * all rows that chose it, and those of the others not at all. A row's sum has the order of its own scores: its bits do
 * not depend on what else is in the batch.
 */
#include "mixture.h"

#include <string.h>

/* Experts whose scores are one piece of work. */
#define SCORED 4u

static work_function normalise_row, score_experts, choose, gather, enter_expert_down, combine;
static void sort_visits(const struct step *step);
static void add_products_of_experts(struct step *step, const struct matrix *matrix, float *out);

void mixture_block(struct step *step)
{
    ternary_session *session = step->session;
    const ternary_model *model = session->model;
    const struct layer *layer = step_layer(step);
    struct mixture *mixture = &session->mixture;
    const uint32_t visits = step->rows * model->experts_used;
    shape_inputs(&session->inputs, &layer->gate, model->planes);
    pool_run(&session->pool, normalise_row, step, step->rows);
    pool_run(&session->pool, score_experts, step, (model->experts + SCORED - 1) / SCORED);
    pool_run(&session->pool, choose, step, step->rows);
    sort_visits(step);
    shape_inputs(&mixture->inputs, &layer->gate, model->planes);
    pool_run(&session->pool, gather, step, visits);
    add_products_of_experts(step, &layer->gate, session->gates);
    add_products_of_experts(step, &layer->up, session->ups);
    multiply_products(step);
    shape_inputs(&mixture->inputs, &layer->down, model->planes);
    pool_run(&session->pool, enter_expert_down, step, visits);
    add_products_of_experts(step, &layer->down, mixture->results);
    multiply_products(step);
    pool_run(&session->pool, combine, step, step->rows);
}

/* ---- Choosing ---- */

/* The router takes the row as floats, the experts' matrices as integers. `added` is free until the block's end. */
static void normalise_row(void *argument, uint32_t row, uint32_t thread)
{
    const struct step *step = argument;
    const ternary_session *session = step->session;
    const uint32_t n_embd = session->model->shape.n_embd;
    float *normal = session->added + (size_t)row * n_embd;
    session->kernels.normalise(normal, session->hidden + (size_t)row * n_embd, step_layer(step)->ffn_norm, n_embd,
                               session->model->epsilon);
    set_input(session, &session->inputs, thread, row, normal, NULL, TURNED_FEED_FORWARD, n_embd);
}

/* The scores of some experts for all rows: their part of the router stays in the cache. */
static void score_experts(void *argument, uint32_t piece, uint32_t thread)
{
    const struct step *step = argument;
    const ternary_session *session = step->session;
    const uint32_t n_embd = session->model->shape.n_embd, experts = session->model->experts, first = piece * SCORED;
    const uint32_t count = experts - first < SCORED ? experts - first : SCORED;
    const float *weights = step_layer(step)->router + (size_t)first * n_embd;
    (void)thread;
    for (uint32_t row = 0; row < step->rows; row++)
        session->kernels.multiply_floats(session->mixture.scores + (size_t)row * experts + first,
                                         session->added + (size_t)row * n_embd, weights, n_embd, count);
}

/* The experts of a row, the best first, and of equally good ones the first; then their shares. */
static void choose(void *argument, uint32_t row, uint32_t thread)
{
    const struct step *step = argument;
    const struct mixture *mixture = &step->session->mixture;
    const uint32_t experts = step->session->model->experts, used = step->session->model->experts_used;
    const float *scores = mixture->scores + (size_t)row * experts;
    uint32_t *chosen = mixture->chosen + (size_t)row * used;
    float *shares = mixture->shares + (size_t)row * mixture->share_stride;
    bool taken[EXPERTS_LIMIT] = {false};
    (void)thread;
    for (uint32_t i = 0; i < used; i++) {
        uint32_t best = experts;
        for (uint32_t expert = 0; expert < experts; expert++)
            if (!taken[expert] && (best == experts || scores[expert] > scores[best]))
                best = expert;
        taken[best] = true;
        chosen[i] = best;
        shares[i] = scores[best];
    }
    step->session->kernels.softmax(shares, used);
}

/* Where the visits of each expert begin, which row each visit is of, and where the visits of each row are. */
static void sort_visits(const struct step *step)
{
    const struct mixture *mixture = &step->session->mixture;
    const uint32_t experts = step->session->model->experts, used = step->session->model->experts_used;
    const uint32_t visits = step->rows * used;
    uint32_t *begins = mixture->begins, next = 0;
    memset(begins, 0, (experts + 1) * sizeof *begins);
    for (uint32_t visit = 0; visit < visits; visit++)
        begins[mixture->chosen[visit]]++;
    for (uint32_t expert = 0; expert <= experts; expert++) {
        const uint32_t count = begins[expert];
        begins[expert] = next;
        next += count;
    }
    for (uint32_t visit = 0; visit < visits; visit++) { /* each begin walks to the next one's */
        const uint32_t place = begins[mixture->chosen[visit]]++;
        mixture->places[visit] = place;
        mixture->sources[place] = visit / used;
    }
    memmove(begins + 1, begins, experts * sizeof *begins);
    begins[0] = 0;
}

/* ---- The experts ---- */

/* A visit gets the integers of its row. */
static void gather(void *argument, uint32_t visit, uint32_t thread)
{
    const struct step *step = argument;
    const struct activations *from = &step->session->inputs, *to = &step->session->mixture.inputs;
    const size_t row = step->session->mixture.sources[visit], planes = from->planes;
    (void)thread;
    memcpy(to->digits + visit * planes * to->stride, from->digits + row * planes * from->stride, planes * from->stride);
    memcpy(to->scales + (size_t)visit * to->spans, from->scales + row * from->spans, from->spans * sizeof *to->scales);
    for (size_t span = 0; span < from->spans; span++)
        memcpy(to->sums + span * to->sums_stride + visit * planes, from->sums + span * from->sums_stride + row * planes,
               planes * sizeof *to->sums);
}

/* The matrix of each expert that has visits, for these. */
static void add_products_of_experts(struct step *step, const struct matrix *matrix, float *out)
{
    ternary_session *session = step->session;
    const uint32_t *begins = session->mixture.begins;
    for (uint32_t expert = 0; expert < session->model->experts; expert++)
        if (begins[expert + 1] > begins[expert])
            session->products[step->count++] = (struct product){
                .matrix = matrix_at(matrix, expert),
                .out = out,
                .inputs = &session->mixture.inputs,
                .first = begins[expert],
                .rows = begins[expert + 1] - begins[expert],
            };
}

static void enter_expert_down(void *argument, uint32_t visit, uint32_t thread)
{
    const struct step *step = argument;
    const ternary_session *session = step->session;
    const uint32_t n_ff = session->model->shape.n_ff;
    float *gate = session->gates + (size_t)visit * n_ff;
    apply_gate(session, gate, session->ups + (size_t)visit * n_ff);
    set_input(session, &session->mixture.inputs, thread, visit, gate, step_layer(step)->ffn_sub_norm, TURNED_DOWN, n_ff);
}

static void combine(void *argument, uint32_t row, uint32_t thread)
{
    const struct step *step = argument;
    const ternary_session *session = step->session;
    const struct mixture *mixture = &session->mixture;
    const uint32_t n_embd = session->model->shape.n_embd, used = session->model->experts_used;
    float *added = session->added + (size_t)row * n_embd;
    (void)thread;
    memset(added, 0, n_embd * sizeof *added);
    for (uint32_t i = 0; i < used; i++)
        session->kernels.add_scaled(added, mixture->results + (size_t)mixture->places[(size_t)row * used + i] * n_embd,
                                    mixture->shares[(size_t)row * mixture->share_stride + i], n_embd);
}
