/* What the parts of a decode step share: the batch on its way through a layer, rows that become integers, and matrices. */
#ifndef CORDEE_STEP_H
#define CORDEE_STEP_H

#include "session.h"

struct step {
    ternary_session *session;
    const ternary_batch *batch;
    uint32_t layer;   /* the one being computed */
    uint32_t rows;    /* still to be computed: the batch's, and behind the last attention those that have logits */
    uint32_t marked;  /* rows that have logits */
    uint32_t runs;    /* of rows that attend together */
    uint32_t count;   /* of the session's products */
    uint32_t stretch; /* slabs that each thread multiplies first */
};

static inline const struct layer *step_layer(const struct step *step)
{
    return &step->session->model->layers[step->layer];
}

/* What enters that matrix next: so many digits, in its spans. */
void shape_inputs(struct activations *inputs, const struct matrix *matrix, uint32_t planes);

/* One row becomes integers, as row `row` of `to`; normalised before if there is a norm, and turned if its matrix was. */
void set_input(const ternary_session *session, const struct activations *to, uint32_t thread, uint32_t row,
               const float *x, const float *norm, enum turned turned, uint32_t n);

/* gate [n_ff] becomes activation(gate) * up, within the model's limits. */
void apply_gate(const ternary_session *session, float *gate, float *up);

/* A matrix to multiply all rows of the session's inputs with, next to others: out [rows][rows of the matrix]. */
void add_product(struct step *step, const struct matrix *matrix, float *out);

/* Multiplies what was added since the last time. */
void multiply_products(struct step *step);

#endif
