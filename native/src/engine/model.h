/* A loaded model: numbers and pointers into the mapped file. */
#ifndef CORDEE_MODEL_H
#define CORDEE_MODEL_H

#include <stdbool.h>

#include "matrix.h"
#include "ternary.h"

enum gate { GATE_SILU, GATE_RELU2 };
enum rope { ROPE_HALVES, ROPE_PAIRS };

struct layer {
    const float *attn_norm, *ffn_norm;         /* [n_embd] */
    const float *attn_sub_norm, *ffn_sub_norm; /* [q_dim], [n_ff]; NULL: none */
    struct matrix q, k, v, o, gate, up, down;
};

struct ternary_model {
    ternary_shape shape;
    uint32_t q_dim, kv_dim; /* heads * head_dim, kv_heads * head_dim: the widths of queries, and of keys or values */
    float epsilon, rope_base;
    uint32_t planes, head_planes;
    bool by_lookup; /* all matrices have the layout `pentium2`, and attention is in integers */
    enum gate gate;
    enum rope rope;
    const float *rope_divisors; /* [head_dim / 2], or NULL */
    const float *output_norm;   /* [n_embd]; NULL without a head */
    struct matrix head;         /* [n_vocab][n_embd] */
    struct matrix codes;        /* an embedding in the layout `pentium2`; data NULL: none */
    const uint8_t *embedding;   /* [n_vocab] rows of that type, or NULL: none, or in codes */
    uint32_t embedding_type;
    size_t embedding_row_bytes;
    struct layer layers[]; /* [shape.layers] */
};

/* Row `token` of the embedding, as n_embd floats. */
void model_embed(const ternary_model *model, uint32_t token, float *row);

#endif
