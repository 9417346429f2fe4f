/* Making a session: one piece of the caller's memory is cut into all that a decode step needs. */
#include "session.h"

#include <string.h>

#include "base/error.h"
#include "cache_state.h"
#include "pentium2/floats.h"

/* Cuts aligned arrays off a piece of memory; without memory it only counts. */
struct cutter {
    uint8_t *memory;
    uint64_t used;
};

static void *cut(struct cutter *cutter, uint64_t count, size_t each)
{
    void *piece = cutter->memory != NULL ? cutter->memory + cutter->used : NULL;
    cutter->used += (count * each + TERNARY_ALIGNMENT - 1) / TERNARY_ALIGNMENT * TERNARY_ALIGNMENT;
    return piece;
}

static uint32_t larger(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

static enum cache_kind cache_kind(const ternary_model *model, const ternary_config *config)
{
    const enum cache_kind named = cache_named(config->cache);
    return model->by_lookup && named == CACHE_F16 ? CACHE_PENTIUM2 : named;
}

static void set_cache_shape(struct cache *cache, const ternary_model *model, const ternary_config *config)
{
    const uint32_t multiple = model->by_lookup ? PENTIUM2_MULTIPLE : 1;
    *cache = (struct cache){
        .kind = cache_kind(model, config),
        .layers = model->shape.layers,
        .sequences = config->sequences,
        .kv_heads = model->shape.kv_heads,
        .head_dim = model->shape.head_dim,
        .context = (config->context + multiple - 1) / multiple * multiple,
        .value_stride = (model->shape.head_dim + LANES - 1) / LANES * LANES,
    };
}

/* The bound on the products below: every factor is limited, and their product is tried in floating point first. */
static bool cache_fits(const struct cache *cache)
{
    double elements = (double)cache->layers * cache->sequences * cache->kv_heads;
    elements *= ((double)cache->context + LANES) * 2 * cache->value_stride;
    return elements * sizeof(float) < (double)(SIZE_MAX / 2);
}

/* Digits, sums and scales of so many rows of `widest` columns. */
static void cut_inputs(struct cutter *cutter, struct activations *inputs, const ternary_model *model, uint64_t rows,
                       uint32_t widest)
{
    const uint64_t planes = larger(model->planes, model->head_planes);
    const uint64_t spans = model->scale_columns > 0 ? spans_of(widest, model->scale_columns) : 1;
    inputs->digits = cut(cutter, rows * planes * quads_of(widest) * 4, sizeof(int8_t));
    inputs->sums_stride = (size_t)(rows * planes);
    inputs->sums = cut(cutter, spans * rows * planes, sizeof(int32_t));
    inputs->scales = cut(cutter, rows * spans, sizeof(float));
}

static void cut_mixture(struct cutter *cutter, struct mixture *mixture, const ternary_model *model, uint64_t rows)
{
    const uint64_t visits = rows * model->experts_used;
    const uint32_t n_embd = model->shape.n_embd;
    mixture->share_stride = (model->experts_used + LANES - 1) / LANES * LANES;
    mixture->scores = cut(cutter, rows * model->experts, sizeof(float));
    mixture->chosen = cut(cutter, visits, sizeof(uint32_t));
    mixture->shares = cut(cutter, rows * mixture->share_stride, sizeof(float));
    mixture->places = cut(cutter, visits, sizeof(uint32_t));
    mixture->begins = cut(cutter, model->experts + (uint64_t)1, sizeof(uint32_t));
    mixture->sources = cut(cutter, visits, sizeof(uint32_t));
    cut_inputs(cutter, &mixture->inputs, model, visits, larger(model->shape.n_ff, n_embd));
    mixture->results = cut(cutter, visits * n_embd, sizeof(float));
}

static void cut_batch(struct cutter *cutter, ternary_session *session, const ternary_model *model, uint32_t rows)
{
    const ternary_shape *shape = &model->shape;
    const uint32_t widest = larger(shape->n_ff, larger(model->q_dim, shape->n_embd));
    const uint64_t gated = rows * (uint64_t)larger(model->experts_used, 1);
    session->hidden = cut(cutter, rows * (uint64_t)shape->n_embd, sizeof(float));
    session->queries = cut(cutter, rows * (uint64_t)model->q_dim, sizeof(float));
    session->keys = cut(cutter, rows * (uint64_t)model->kv_dim, sizeof(float));
    session->values = cut(cutter, rows * (uint64_t)model->kv_dim, sizeof(float));
    session->gates = cut(cutter, gated * shape->n_ff, sizeof(float));
    session->ups = cut(cutter, gated * shape->n_ff, sizeof(float));
    session->added = cut(cutter, rows * (uint64_t)shape->n_embd, sizeof(float));
    session->cosines = cut(cutter, rows * (uint64_t)(model->rope_dims / 2), sizeof(float));
    session->sines = cut(cutter, rows * (uint64_t)(model->rope_dims / 2), sizeof(float));
    session->marked = cut(cutter, rows, sizeof(uint32_t));
    session->runs = cut(cutter, rows + (uint64_t)1, sizeof(uint32_t));
    cut_inputs(cutter, &session->inputs, model, rows, widest);
    session->products = cut(cutter, larger(PRODUCTS, 2 * model->experts), sizeof *session->products);
    if (model->experts > 0)
        cut_mixture(cutter, &session->mixture, model, rows);
    session->normal_elements = (widest + LANES - 1) / LANES * LANES;
}

/* What files of the layout `pentium2` want besides. */
static void cut_lookup(struct cutter *cutter, ternary_session *session, uint32_t threads)
{
    session->tables = cut(cutter, threads * (uint64_t)(LOOKUP_TILE * LOOKUP_ENTRIES), sizeof(int16_t));
}

/* Lays everything out; the session itself stands first. */
static uint64_t lay_out(void *memory, ternary_session *session, const ternary_model *model,
                        const ternary_config *config, uint64_t *kv_bytes)
{
    struct cutter cutter = {.memory = memory};
    struct cache *cache = &session->cache;
    cut(&cutter, 1, sizeof *session);
    set_cache_shape(cache, model, config);
    cache->lengths = cut(&cutter, config->sequences, sizeof(uint32_t));
    session->ends = cut(&cutter, config->sequences, sizeof(uint32_t));
    cut_batch(&cutter, session, model, config->batch_rows);
    if (model->by_lookup)
        cut_lookup(&cutter, session, config->threads);
    session->scratch_elements = model->by_lookup
                                    ? pentium2_scratch_floats(cache)
                                    : attention_scratch(cache->context, cache->head_dim, cache->value_stride);
    session->dots = cut(&cutter, config->threads * (uint64_t)dots_elements(&session->kernels), sizeof(int32_t));
    session->scratch = cut(&cutter, config->threads * (uint64_t)session->scratch_elements, sizeof(float));
    session->normal = cut(&cutter, config->threads * (uint64_t)session->normal_elements, sizeof(float));
    const uint64_t before = cutter.used;
    cache->keys = cut(&cutter, cache_key_bytes(cache), 1);
    cache->values = cut(&cutter, cache_value_bytes(cache), 1);
    cache->key_scales = cut(&cutter, cache_scale_bytes(cache), 1);
    cache->value_scales = cut(&cutter, cache_scale_bytes(cache), 1);
    *kv_bytes = cutter.used - before;
    return cutter.used;
}

/* False if this CPU has no such kernels. */
static bool find_kernels(const ternary_model *model, const ternary_config *config, struct kernels *kernels)
{
    const bool found = kernels_named(config->kernels, kernels);
    if (found && model->by_lookup)
        *kernels = kernels_pentium2;
    return found;
}

static bool is_possible(const ternary_model *model, const ternary_config *config)
{
    struct cache cache;
    if (config->context - 1 >= CONTEXT_LIMIT || config->sequences - 1 >= SEQUENCES_LIMIT ||
        config->batch_rows - 1 >= BATCH_ROWS_LIMIT || config->threads - 1 >= THREADS_LIMIT)
        return false;
    if (model->by_lookup && config->context > PENTIUM2_CONTEXT_LIMIT)
        return false;
    if (cache_kind(model, config) == CACHE_KINDS || (cache_kind(model, config) == CACHE_PENTIUM2) != model->by_lookup)
        return false;
    set_cache_shape(&cache, model, config);
    return cache_fits(&cache);
}

size_t ternary_session_bytes(const ternary_model *model, const ternary_config *config, size_t *kv_bytes)
{
    ternary_session session = {0};
    uint64_t kv = 0, nbytes;
    if (!find_kernels(model, config, &session.kernels) || !is_possible(model, config))
        return 0;
    nbytes = lay_out(NULL, &session, model, config, &kv);
    if (kv_bytes != NULL)
        *kv_bytes = (size_t)kv;
    return nbytes <= SIZE_MAX / 2 ? (size_t)nbytes : 0;
}

ternary_status ternary_session_make(void *memory, const ternary_model *model, const ternary_config *config,
                                    ternary_session **made, ternary_error *error)
{
    ternary_session *session = memory;
    uint64_t kv_bytes;
    *made = NULL;
    if (ternary_session_bytes(model, config, NULL) == 0)
        return ternary_fail(error, TERNARY_REFUSED,
                            "the session's numbers or its cache are impossible, or this CPU has no such kernels");
    if (config->logits && !model->shape.has_head)
        return ternary_fail(error, TERNARY_REFUSED, "the file has no head: only hidden rows can come out of it");
    memset(session, 0, sizeof *session);
    session->model = model;
    session->config = *config;
    find_kernels(model, config, &session->kernels);
    session->lookup = lookup_kernels_named(config->kernels);
    lay_out(memory, session, model, config, &kv_bytes);
    memset(session->cache.lengths, 0, config->sequences * sizeof *session->cache.lengths);
    if (!pool_start(&session->pool, config->threads))
        return ternary_fail(error, TERNARY_SYSTEM, "the machine gives no %u threads", config->threads);
    *made = session;
    return TERNARY_OK;
}

void ternary_session_watch(ternary_session *session, ternary_watcher *watcher, void *argument)
{
    session->watcher = watcher;
    session->watcher_argument = argument;
}

void ternary_session_end(ternary_session *session)
{
    pool_end(&session->pool);
}

uint32_t ternary_sequence_length(const ternary_session *session, uint32_t sequence)
{
    return sequence < session->config.sequences ? session->cache.lengths[sequence] : 0;
}

static ternary_status check_sequence(const ternary_session *session, uint32_t sequence, ternary_error *error)
{
    if (sequence < session->config.sequences)
        return TERNARY_OK;
    return ternary_fail(error, TERNARY_REFUSED,
                        "there is no sequence %u among %u", sequence, session->config.sequences);
}

ternary_status ternary_sequence_trim(ternary_session *session, uint32_t sequence, uint32_t length, ternary_error *error)
{
    ternary_status status = check_sequence(session, sequence, error);
    if (status == TERNARY_OK && length < session->cache.lengths[sequence])
        session->cache.lengths[sequence] = length;
    return status;
}

ternary_status ternary_sequence_copy(ternary_session *session, uint32_t source, uint32_t target, uint32_t length,
                                     ternary_error *error)
{
    ternary_status status = check_sequence(session, source, error);
    if (status == TERNARY_OK)
        status = check_sequence(session, target, error);
    if (status != TERNARY_OK)
        return status;
    if (source == target || length > session->cache.lengths[source])
        return ternary_fail(error, TERNARY_REFUSED, "sequence %u has no %u positions that %u could get",
                            source, length, target);
    cache_copy(&session->cache, source, target, length);
    return TERNARY_OK;
}

size_t ternary_sequence_bytes(const ternary_session *session, uint32_t sequence)
{
    return sequence < session->config.sequences ? cache_state_bytes(&session->cache, sequence) : 0;
}

ternary_status ternary_sequence_export(const ternary_session *session, uint32_t sequence, uint8_t *state,
                                       ternary_error *error)
{
    ternary_status status = check_sequence(session, sequence, error);
    if (status == TERNARY_OK)
        cache_export(&session->cache, sequence, state);
    return status;
}

ternary_status ternary_sequence_import(ternary_session *session, uint32_t sequence, const uint8_t *state,
                                       size_t nbytes, ternary_error *error)
{
    ternary_status status = check_sequence(session, sequence, error);
    if (status == TERNARY_OK && !cache_import(&session->cache, sequence, state, nbytes))
        return ternary_fail(error, TERNARY_REFUSED,
                            "the state is of another slice or kind of cache, or longer than the context of %u tokens",
                    session->config.context);
    return status;
}
