/* Rows that become integers, and matrices times those. */
#include "step.h"

#include <string.h>

#include "pentium2/lookup.h"

void shape_inputs(struct activations *inputs, const struct matrix *matrix, uint32_t planes)
{
    const bool has_spans = matrix->span_scales != NULL;
    inputs->stride = (size_t)quads_of(matrix->cols) * 4;
    inputs->planes = planes;
    inputs->spans = has_spans ? matrix->spans : 1;
    inputs->span_columns = has_spans ? matrix->span_quads * 4 : matrix->cols;
}

void set_input(const ternary_session *session, const struct activations *to, uint32_t thread, uint32_t row,
               const float *x, const float *norm, enum turned turned, uint32_t n)
{
    const float *signs = session->model->signs[turned];
    float *normal = session->normal + thread * session->normal_elements;
    if (norm != NULL)
        session->kernels.normalise(normal, x, norm, n, session->model->epsilon);
    else if (signs != NULL)
        memcpy(normal, x, n * sizeof *x);
    if (signs != NULL)
        session->kernels.turn(normal, signs, n, session->model->rotation_block);
    session->kernels.quantise(to, row, norm != NULL || signs != NULL ? normal : x, n);
}

void apply_gate(const ternary_session *session, float *gate, float *up)
{
    const ternary_model *model = session->model;
    const uint32_t n_ff = model->shape.n_ff;
    if (model->gate_limit > 0)
        session->kernels.limit_gate(gate, up, model->gate_limit, n_ff);
    (model->gate == GATE_SILU ? session->kernels.gate_silu : session->kernels.gate_relu2)(gate, up, n_ff);
}

/* Turns dots of `groups` groups from `first` on into floats; rows behind the matrix's last are dropped. */
static void put_rows(const struct kernels *kernels, const struct product *product, uint32_t row, uint32_t first,
                     uint32_t groups, const int32_t *dots)
{
    const struct activations *inputs = product->inputs;
    const struct matrix *matrix = &product->matrix;
    const uint32_t group_rows = layout_facts[matrix->layout].group_rows, start = first * group_rows;
    const uint32_t width = groups * group_rows;
    const uint32_t end = start + width < matrix->rows ? start + width : matrix->rows;
    float *out = product->out + (size_t)row * matrix->rows;
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
static void multiply_spans(const struct kernels *kernels, const struct product *product, uint32_t row, uint32_t count,
                           uint32_t first, uint32_t groups, int32_t *dots)
{
    const struct matrix *matrix = &product->matrix;
    const struct activations *inputs = product->inputs;
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
            kernels->add_span(product->out + (size_t)(row + i) * matrix->rows + start, &of);
        }
    }
}

/* A few groups of a product's matrix, from `first` on, times all its rows. */
static void multiply_groups(const ternary_session *session, const struct product *product, uint32_t first,
                            uint32_t thread)
{
    const struct kernels *kernels = &session->kernels;
    const struct matrix *matrix = &product->matrix;
    const struct layout_facts *facts = &layout_facts[matrix->layout];
    const struct activations *inputs = product->inputs;
    const uint32_t groups = matrix->groups - first < DOT_GROUPS ? matrix->groups - first : DOT_GROUPS;
    const size_t group_bytes = group_bytes_of(matrix);
    const uint32_t at_once = kernels->rows / inputs->planes, end = product->first + product->rows;
    int32_t *dots = session->dots + thread * dots_elements(kernels);
    for (uint32_t row = product->first; row < end; row += at_once) {
        const uint32_t count = end - row < at_once ? end - row : at_once;
        const size_t digit_row = (size_t)row * inputs->planes;
        if (matrix->span_scales != NULL) {
            multiply_spans(kernels, product, row, count, first, groups, dots);
            continue;
        }
        kernels->dot[matrix->layout](kernels, matrix->data + first * group_bytes, groups, group_bytes, matrix->quads,
                                     inputs->digits + digit_row * inputs->stride, inputs->stride,
                                     inputs->sums + digit_row, count * inputs->planes, dots);
        for (uint32_t i = 0; i < count; i++)
            put_rows(kernels, product, row + i, first, groups,
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
    const struct product *product = step->session->products;
    const uint32_t threads = step->session->config.threads;
    uint32_t slab = piece < threads ? piece * step->stretch : threads * step->stretch + (piece - threads);
    uint32_t left = piece < threads ? step->stretch : 1;
    while (slab >= slabs_of(&product->matrix))
        slab -= slabs_of(&product++->matrix);
    for (; left > 0; left--) {
        multiply_groups(step->session, product, slab * DOT_GROUPS, thread);
        if (++slab == slabs_of(&product->matrix) && left > 1)
            product++, slab = 0;
    }
}

/* One row times the step's products in the layout `pentium2`, which share tables. */
static void look_up_row(void *argument, uint32_t row, uint32_t thread)
{
    const struct step *step = argument;
    const ternary_session *session = step->session;
    const struct matrix *matrices[LOOKUP_MATRICES];
    float *outs[LOOKUP_MATRICES];
    for (uint32_t i = 0; i < step->count; i++) {
        matrices[i] = &session->products[i].matrix;
        outs[i] = session->products[i].out + (size_t)row * matrices[i]->rows;
    }
    lookup_multiply(session->lookup, matrices, outs, step->count, session->inputs.digits + row * session->inputs.stride,
                    session->inputs.scales[row], session->tables + thread * (LOOKUP_TILE * LOOKUP_ENTRIES));
}

void add_product(struct step *step, const struct matrix *matrix, float *out)
{
    step->session->products[step->count++] = (struct product){*matrix, out, &step->session->inputs, 0, step->rows};
}

void multiply_products(struct step *step)
{
    const uint32_t threads = step->session->config.threads;
    uint32_t slabs = 0, share;
    if (step->session->model->by_lookup) {
        pool_run(&step->session->pool, look_up_row, step, step->rows);
        step->count = 0;
        return;
    }
    for (uint32_t i = 0; i < step->count; i++)
        slabs += slabs_of(&step->session->products[i].matrix);
    share = slabs / 4 * 3 / threads; /* three quarters are shared out at once */
    step->stretch = share > 1 ? share : 1;
    pool_run(&step->session->pool, multiply_piece, step,
             slabs > threads ? threads + (slabs - threads * step->stretch) : slabs);
    step->count = 0;
}
