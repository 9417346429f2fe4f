/* The peer: a Llama-shaped model in single precision, every product a plain loop, as programs for small story
 * models have it. Written from the published architecture (RMS norm, rotary positions, grouped-query attention,
 * SwiGLU); the classifier shares the embedding. Weights are seeded noise: this measures speed and says nothing.
 *
 *     floats DIM HIDDEN LAYERS HEADS KV_HEADS VOCABULARY CONTEXT FIRST COUNT
 *
 * runs COUNT tokens from position FIRST on, over a cache of noise, and prints the last token. bench/pentium2_model
 * finds the tokens by the function `forward`.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct {
    int dim, hidden, layers, heads, kv_heads, vocabulary, context;
    int kv_dim, head_dim;
} shape;

typedef struct {
    float *embedding;                       /* [vocabulary][dim] */
    float *attention_norm, *ffn_norm;       /* [layers][dim] */
    float *query, *output;                  /* [layers][dim][dim] */
    float *key, *value;                     /* [layers][kv_dim][dim] */
    float *gate, *up;                       /* [layers][hidden][dim] */
    float *down;                            /* [layers][dim][hidden] */
    float *final_norm;                      /* [dim] */
    float *keys, *values;                   /* [layers][context][kv_dim] */
    float *x, *normed, *mixed, *projected;  /* [dim] */
    float *gated, *upped;                   /* [hidden] */
    float *q;                               /* [dim] */
    float *scores;                          /* [context] */
    float *logits;                          /* [vocabulary] */
} state;

static float *noise(size_t count, float scale)
{
    static uint32_t seed = 1;
    float *values = malloc(count * sizeof(float));
    if (values == NULL) {
        fprintf(stderr, "floats: no memory for %zu numbers\n", count);
        exit(1);
    }
    for (size_t i = 0; i < count; i++) {
        seed = seed * 1664525u + 1013904223u;
        values[i] = scale * (float)((int32_t)seed >> 8) / 8388608.0f;
    }
    return values;
}

static state make(const shape *s)
{
    size_t layers = s->layers, dim = s->dim, hidden = s->hidden, cache = (size_t)s->context * s->kv_dim;
    float small = 1.0f / sqrtf((float)s->dim);
    return (state){
        .embedding = noise((size_t)s->vocabulary * dim, 1.0f),
        .attention_norm = noise(layers * dim, 1.0f),
        .ffn_norm = noise(layers * dim, 1.0f),
        .query = noise(layers * dim * dim, small),
        .output = noise(layers * dim * dim, small),
        .key = noise(layers * s->kv_dim * dim, small),
        .value = noise(layers * s->kv_dim * dim, small),
        .gate = noise(layers * hidden * dim, small),
        .up = noise(layers * hidden * dim, small),
        .down = noise(layers * dim * hidden, small),
        .final_norm = noise(dim, 1.0f),
        .keys = noise(layers * cache, 1.0f),
        .values = noise(layers * cache, 1.0f),
        .x = noise(dim, 0.0f),
        .normed = noise(dim, 0.0f),
        .mixed = noise(dim, 0.0f),
        .projected = noise(dim, 0.0f),
        .gated = noise(hidden, 0.0f),
        .upped = noise(hidden, 0.0f),
        .q = noise(dim, 0.0f),
        .scores = noise(s->context, 0.0f),
        .logits = noise(s->vocabulary, 0.0f),
    };
}

static void rms_norm(float *out, const float *x, const float *weight, int n)
{
    float sum = 0.0f;
    for (int i = 0; i < n; i++)
        sum += x[i] * x[i];
    float scale = 1.0f / sqrtf(sum / n + 1e-5f);
    for (int i = 0; i < n; i++)
        out[i] = weight[i] * (scale * x[i]);
}

/* out [rows] = weight [rows][cols] times x [cols] */
static void multiply(float *out, const float *x, const float *weight, int cols, int rows)
{
    for (int row = 0; row < rows; row++) {
        float sum = 0.0f;
        for (int col = 0; col < cols; col++)
            sum += weight[row * cols + col] * x[col];
        out[row] = sum;
    }
}

static void rotate(float *x, int n, int head_dim, int position)
{
    for (int i = 0; i < n; i += 2) {
        float angle = position * powf(10000.0f, -(float)(i % head_dim) / head_dim);
        float cosine = cosf(angle), sine = sinf(angle), a = x[i], b = x[i + 1];
        x[i] = a * cosine - b * sine;
        x[i + 1] = a * sine + b * cosine;
    }
}

static void softmax(float *x, int n)
{
    float largest = x[0], sum = 0.0f;
    for (int i = 1; i < n; i++)
        if (x[i] > largest)
            largest = x[i];
    for (int i = 0; i < n; i++) {
        x[i] = expf(x[i] - largest);
        sum += x[i];
    }
    for (int i = 0; i < n; i++)
        x[i] /= sum;
}

static void attend(const shape *s, state *m, int layer, int position)
{
    const float *keys = m->keys + (size_t)layer * s->context * s->kv_dim;
    const float *values = m->values + (size_t)layer * s->context * s->kv_dim;
    float scale = 1.0f / sqrtf((float)s->head_dim);
    for (int head = 0; head < s->heads; head++) {
        const float *q = m->q + head * s->head_dim;
        float *mixed = m->mixed + head * s->head_dim;
        int shared = head / (s->heads / s->kv_heads) * s->head_dim;
        for (int t = 0; t <= position; t++) {
            float score = 0.0f;
            for (int i = 0; i < s->head_dim; i++)
                score += q[i] * keys[t * s->kv_dim + shared + i];
            m->scores[t] = score * scale;
        }
        softmax(m->scores, position + 1);
        for (int i = 0; i < s->head_dim; i++)
            mixed[i] = 0.0f;
        for (int t = 0; t <= position; t++)
            for (int i = 0; i < s->head_dim; i++)
                mixed[i] += m->scores[t] * values[t * s->kv_dim + shared + i];
    }
}

static void feed_forward(const shape *s, state *m, int layer)
{
    size_t matrix = (size_t)layer * s->dim * s->hidden;
    rms_norm(m->normed, m->x, m->ffn_norm + layer * s->dim, s->dim);
    multiply(m->gated, m->normed, m->gate + matrix, s->dim, s->hidden);
    multiply(m->upped, m->normed, m->up + matrix, s->dim, s->hidden);
    for (int i = 0; i < s->hidden; i++)
        m->gated[i] *= m->upped[i] / (1.0f + expf(-m->gated[i]));
    multiply(m->projected, m->gated, m->down + matrix, s->hidden, s->dim);
    for (int i = 0; i < s->dim; i++)
        m->x[i] += m->projected[i];
}

__attribute__((noinline)) void forward(const shape *s, state *m, int token, int position)
{
    for (int i = 0; i < s->dim; i++)
        m->x[i] = m->embedding[(size_t)token * s->dim + i];
    for (int layer = 0; layer < s->layers; layer++) {
        size_t square = (size_t)layer * s->dim * s->dim, narrow = (size_t)layer * s->kv_dim * s->dim;
        size_t cell = ((size_t)layer * s->context + position) * s->kv_dim;
        rms_norm(m->normed, m->x, m->attention_norm + layer * s->dim, s->dim);
        multiply(m->q, m->normed, m->query + square, s->dim, s->dim);
        multiply(m->keys + cell, m->normed, m->key + narrow, s->dim, s->kv_dim);
        multiply(m->values + cell, m->normed, m->value + narrow, s->dim, s->kv_dim);
        rotate(m->q, s->dim, s->head_dim, position);
        rotate(m->keys + cell, s->kv_dim, s->head_dim, position);
        attend(s, m, layer, position);
        multiply(m->projected, m->mixed, m->output + square, s->dim, s->dim);
        for (int i = 0; i < s->dim; i++)
            m->x[i] += m->projected[i];
        feed_forward(s, m, layer);
    }
    rms_norm(m->x, m->x, m->final_norm, s->dim);
    multiply(m->logits, m->x, m->embedding, s->dim, s->vocabulary);
}

static int largest(const float *x, int n)
{
    int best = 0;
    for (int i = 1; i < n; i++)
        if (x[i] > x[best])
            best = i;
    return best;
}

int main(int argc, char **argv)
{
    if (argc != 10) {
        fprintf(stderr, "floats: DIM HIDDEN LAYERS HEADS KV_HEADS VOCABULARY CONTEXT FIRST COUNT\n");
        return 2;
    }
    int given[9];
    for (int i = 0; i < 9; i++)
        given[i] = atoi(argv[1 + i]);
    shape s = {given[0], given[1], given[2], given[3], given[4], given[5], given[6], 0, 0};
    s.head_dim = s.dim / s.heads;
    s.kv_dim = s.head_dim * s.kv_heads;
    state m = make(&s);
    int token = 1;
    for (int position = given[7]; position < given[7] + given[8]; position++) {
        forward(&s, &m, token, position);
        token = largest(m.logits, s.vocabulary);
    }
    printf("%d\n", token);
    return 0;
}
