/* A word into tokens by Viterbi: the pieces whose scores add up to the most. */
#include "parts.h"

struct node {
    double score;  /* of the best path that ends here */
    int32_t token; /* its last piece, or TOKENIZER_NONE: a character that is no piece */
    uint32_t from; /* where that piece begins; UNREACHED if no path ends here */
};

#define UNREACHED UINT32_MAX

size_t unigram_scratch(size_t nbytes)
{
    return (nbytes + 1) * sizeof(struct node);
}

static void offer(struct node *node, double score, int32_t token, uint32_t from)
{
    if (node->from == UNREACHED || score > node->score)
        *node = (struct node){score, token, from};
}

/* All pieces that begin at `at`; if the first character alone is none, it may be unknown. */
static void extend(const tokenizer *it, struct node *nodes, const uint8_t *word, uint32_t at, uint32_t nbytes)
{
    uint32_t width, trie_node = 0;
    bool alone = false;
    int32_t token;
    double score = nodes[at].score;
    character_at(word + at, word + nbytes, &width);
    for (uint32_t end = at; end < nbytes && trie_step(&it->pieces, &trie_node, word[end], &token); end++) {
        if (token == TOKENIZER_NONE)
            continue;
        offer(&nodes[end + 1], score + (double)piece_score(it, (uint32_t)token), token, at);
        alone = alone || end + 1 - at == width;
    }
    if (!alone)
        offer(&nodes[at + width], score + it->unknown_score, TOKENIZER_NONE, at);
}

/* The path to `end`, its links turned around: each node's `from` is where its next piece ends. */
static void turn(struct node *nodes, uint32_t end)
{
    int32_t token = TOKENIZER_NONE;
    for (uint32_t at = end, next = UNREACHED, before; next != 0; at = before) {
        int32_t last = nodes[at].token;
        before = at == 0 ? 0 : nodes[at].from;
        nodes[at].from = next;
        nodes[at].token = token;
        token = last;
        next = at;
    }
}

void unigram_word(const tokenizer *it, const uint8_t *word, size_t nbytes, void *scratch, struct output *output)
{
    struct node *nodes = scratch;
    uint32_t end = (uint32_t)nbytes;
    for (uint32_t i = 1; i <= end; i++)
        nodes[i].from = UNREACHED;
    nodes[0] = (struct node){0.0, TOKENIZER_NONE, 0};
    for (uint32_t at = 0; at < end; at++)
        if (at == 0 || nodes[at].from != UNREACHED)
            extend(it, nodes, word, at, end);
    turn(nodes, end);
    for (uint32_t at = 0; at < end; at = nodes[at].from) {
        if (nodes[at].token != TOKENIZER_NONE)
            output_put(output, nodes[at].token);
        else
            output_put_unknown(output, it, word + at, nodes[at].from - at);
    }
}
