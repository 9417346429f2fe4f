/* Tokens by their first bytes, a byte at a time: a trie whose edges lie in one hash table. */
#include "parts.h"

/* The edge, or where it would go; NULL after PROBES_MAX. */
static struct trie_edge *edge_of(const struct trie *trie, uint32_t node, uint8_t byte)
{
    uint32_t key = (node << 8 | byte) + 1, at = lookup_hash(node, byte);
    for (uint32_t probes = 0; probes < PROBES_MAX; probes++, at++) {
        struct trie_edge *edge = &trie->edges[at & trie->mask];
        if (edge->key == 0 || edge->key == key)
            return edge;
    }
    return NULL;
}

bool trie_add(struct trie *trie, const uint8_t *bytes, size_t nbytes, uint32_t token)
{
    uint32_t node = 0;
    struct trie_edge *edge = NULL;
    for (size_t i = 0; i < nbytes; i++) {
        if (!(edge = edge_of(trie, node, bytes[i])))
            return false;
        if (edge->key == 0)
            *edge = (struct trie_edge){(node << 8 | bytes[i]) + 1, TOKENIZER_NONE};
        node = (uint32_t)(edge - trie->edges) + 1;
    }
    if (edge)
        edge->token = (int32_t)token;
    return true;
}

bool trie_step(const struct trie *trie, uint32_t *node, uint8_t byte, int32_t *token)
{
    const struct trie_edge *edge = edge_of(trie, *node, byte);
    if (!edge || edge->key == 0)
        return false;
    *node = (uint32_t)(edge - trie->edges) + 1;
    *token = edge->token;
    return true;
}
