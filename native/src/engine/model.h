/* A loaded model: numbers and pointers into the mapped file. */
#ifndef CORDEE_MODEL_H
#define CORDEE_MODEL_H

#include <stdbool.h>

#include "matrix.h"
#include "ternary.h"

enum gate { GATE_SILU, GATE_RELU2 };
enum rope { ROPE_HALVES, ROPE_PAIRS };
/* What may be multiplied by signs and the Walsh-Hadamard matrix: what enters the matrices of a layer and the head, and,
 * the other way round, a row of the embedding. */
enum turned { TURNED_ATTENTION, TURNED_OUTPUT, TURNED_FEED_FORWARD, TURNED_DOWN, TURNED_HEAD, TURNED_EMBEDDING, TURNED };

struct layer {
    const float *attn_norm, *ffn_norm;         /* [n_embd] */
    const float *attn_sub_norm, *ffn_sub_norm; /* [q_dim], [n_ff]; NULL: none */
    const float *q_norm, *k_norm;              /* [head_dim], of each head before its rotation; NULL: none */
    const float *router;                       /* [experts][n_embd]; NULL: gate, up and down are one feed-forward block */
    struct matrix q, k, v, o, gate, up, down;  /* the last three of each expert, if there are such */
    bool is_windowed; /* a row sees the model's window, not all before it */
    bool is_rotated;  /* queries and keys are, by their positions */
};

struct ternary_model {
    ternary_shape shape;
    uint32_t q_dim, kv_dim; /* heads * head_dim, kv_heads * head_dim: the widths of queries, and of keys or values */
    float epsilon, rope_base;
    uint32_t rope_dims;     /* of a head's, the first so many are rotated */
    uint32_t window;        /* positions that a row of a windowed layer sees, its own included */
    uint32_t experts, experts_used; /* of each layer, and for a row; 0: no layer has experts */
    float gate_limit;       /* the gate is at most this, and what it is multiplied by within +-; 0: no limit */
    float embedding_scale, residual_scale; /* by which embedded rows, and what a block adds, are multiplied */
    uint32_t planes, head_planes; /* digits of an activation */
    uint32_t weight_planes;       /* of each matrix of the layers; more than one only with scales of spans */
    uint32_t scale_columns; /* of the layers' matrices: columns that share a scale; 0: scales are of rows */
    uint32_t rotation_block;
    const float *signs[TURNED]; /* [width of what is turned]; NULL: it is not */
    bool by_lookup; /* all matrices have the layout `pentium2`, and attention is in integers */
    enum gate gate;
    enum rope rope;
    const float *rope_divisors; /* [rope_dims / 2], or NULL */
    const float *output_norm;   /* [n_embd]; NULL without a head */
    struct matrix head;         /* [n_vocab][n_embd] */
    struct matrix codes;        /* an embedding in a layout of trits; data NULL: none */
    const uint8_t *embedding;   /* [n_vocab] rows of that type, or NULL: none, or in codes */
    uint32_t embedding_type;
    size_t embedding_row_bytes;
    struct layer layers[]; /* [shape.layers] */
};

/* Row `token` of the embedding, as n_embd floats. */
void model_embed(const ternary_model *model, uint32_t token, float *row);

#endif
