/* A word into tokens by merging neighbours: byte-level BPE by rank, SentencePiece by score.
 *
 * The word's symbols are a linked list. A queue holds every pair of neighbours that could merge, best first, of
 * equals the leftmost. Symbols only grow, to the right, so a queued pair is still the pair at its place exactly
 * if its left symbol lives and both together have as many bytes as they had.
 */
#include "parts.h"

struct symbol {
    uint32_t start, nbytes; /* in the word; nbytes 0: merged into its left neighbour */
    int32_t token;          /* or TOKENIZER_NONE: a character that is no piece */
    int32_t before, after;  /* neighbours, or -1 */
};

struct candidate {
    uint32_t order; /* the lowest merges first */
    uint32_t left;  /* symbol */
    uint32_t nbytes;
};

struct merger {
    const tokenizer *it;
    const uint8_t *word;
    struct symbol *symbols;
    struct candidate *queue; /* a heap */
    uint32_t symbols_count, queued;
};

/* A word of n bytes has at most n symbols. At most n - 1 pairs are queued at first; each of at most n - 1 merges
 * takes one off and adds two. */
size_t bpe_scratch(size_t nbytes)
{
    return nbytes * (sizeof(struct symbol) + 2 * sizeof(struct candidate)) + TOKENIZER_ALIGNMENT;
}

static bool goes_before(struct candidate a, struct candidate b)
{
    return a.order != b.order ? a.order < b.order : a.left < b.left;
}

static void queue_push(struct merger *merger, struct candidate candidate)
{
    struct candidate *queue = merger->queue;
    uint32_t at = merger->queued++;
    for (; at > 0 && goes_before(candidate, queue[(at - 1) / 2]); at = (at - 1) / 2)
        queue[at] = queue[(at - 1) / 2];
    queue[at] = candidate;
}

static struct candidate queue_pop(struct merger *merger)
{
    struct candidate *queue = merger->queue, first = queue[0], last = queue[--merger->queued];
    uint32_t at = 0;
    for (uint32_t child = 1; child < merger->queued; child = 2 * at + 1) {
        if (child + 1 < merger->queued && goes_before(queue[child + 1], queue[child]))
            child++;
        if (!goes_before(queue[child], last))
            break;
        queue[at] = queue[child];
        at = child;
    }
    queue[at] = last;
    return first;
}

/* Floats in their order as integers in theirs, the highest first. */
static uint32_t order_of_score(float score)
{
    union {
        float value;
        uint32_t bits;
    } as = {.value = score + 0.0f}; /* no minus zero */
    return as.bits >> 31 ? as.bits : ~as.bits & 0x7FFFFFFFu;
}

/* What a symbol and its right neighbour become, and when; TOKENIZER_NONE if they do not. */
static int32_t merged(const struct merger *merger, uint32_t left, uint32_t *order)
{
    const tokenizer *it = merger->it;
    const struct symbol *a = &merger->symbols[left], *b = &merger->symbols[a->after];
    if (it->family == FAMILY_BYTES) {
        *order = bpe_rank(&it->merges, (uint32_t)a->token, (uint32_t)b->token);
        return *order == EMPTY ? TOKENIZER_NONE : (int32_t)it->merges.all[*order].result;
    }
    if (a->nbytes + b->nbytes > TOKENIZER_PIECE_BYTES_MAX)
        return TOKENIZER_NONE;
    int32_t token = lookup_find(it, merger->word + a->start, a->nbytes + b->nbytes);
    if (token != TOKENIZER_NONE)
        *order = order_of_score(piece_score(it, (uint32_t)token));
    return token;
}

static void consider(struct merger *merger, int32_t left)
{
    uint32_t order;
    if (left < 0 || merger->symbols[left].after < 0 || merged(merger, (uint32_t)left, &order) == TOKENIZER_NONE)
        return;
    const struct symbol *a = &merger->symbols[left];
    queue_push(merger, (struct candidate){order, (uint32_t)left, a->nbytes + merger->symbols[a->after].nbytes});
}

static void merge(struct merger *merger, struct candidate candidate)
{
    uint32_t order;
    struct symbol *a = &merger->symbols[candidate.left];
    if (a->nbytes == 0 || a->after < 0 || a->nbytes + merger->symbols[a->after].nbytes != candidate.nbytes)
        return;
    struct symbol *b = &merger->symbols[a->after];
    a->token = merged(merger, candidate.left, &order);
    a->nbytes = candidate.nbytes;
    a->after = b->after;
    b->nbytes = 0;
    if (a->after >= 0)
        merger->symbols[a->after].before = (int32_t)candidate.left;
    consider(merger, a->before);
    consider(merger, (int32_t)candidate.left);
}

/* Bytes or characters. A byte that the vocabulary cannot spell is left out, and its neighbours become neighbours. */
static void split(struct merger *merger, size_t nbytes)
{
    const tokenizer *it = merger->it;
    const uint8_t *end = merger->word + nbytes;
    uint32_t count = 0, width = 1;
    for (const uint8_t *at = merger->word; at < end; at += width) {
        int32_t token = it->byte_tokens[*at];
        if (it->family == FAMILY_BYTES) {
            if (token == TOKENIZER_NONE)
                continue;
        } else {
            character_at(at, end, &width);
            token = lookup_find(it, at, width);
        }
        merger->symbols[count] =
            (struct symbol){(uint32_t)(at - merger->word), width, token, (int32_t)count - 1, (int32_t)count + 1};
        count++;
    }
    if (count > 0)
        merger->symbols[count - 1].after = -1;
    merger->symbols_count = count;
}

void bpe_word(const tokenizer *it, const uint8_t *word, size_t nbytes, void *scratch, struct output *output)
{
    int32_t token = it->whole_words && nbytes <= TOKENIZER_PIECE_BYTES_MAX ? lookup_find(it, word, nbytes)
                                                                           : TOKENIZER_NONE;
    if (token != TOKENIZER_NONE) {
        output_put(output, token);
        return;
    }
    struct symbol *symbols = scratch;
    struct merger merger = {it, word, symbols, (struct candidate *)(symbols + nbytes), 0, 0};
    split(&merger, nbytes);
    for (uint32_t i = 0; i < merger.symbols_count; i++)
        consider(&merger, (int32_t)i);
    while (merger.queued > 0)
        merge(&merger, queue_pop(&merger));
    for (int32_t i = merger.symbols_count > 0 ? 0 : -1; i >= 0; i = symbols[i].after) {
        if (symbols[i].token != TOKENIZER_NONE)
            output_put(output, symbols[i].token);
        else
            output_put_unknown(output, it, word + symbols[i].start, symbols[i].nbytes);
    }
}
