/* See memory.h. Both caches are 4-way, write-back, write-allocate, least recently used, with lines of 32 bytes. */
#include <stdio.h>
#include <stdlib.h>

#include "memory.h"

enum {
    LINE_BITS = 5,
    WAYS = 4,
    L1_BYTES = 16 << 10,
    L2_BYTES = 512 << 10,
    L1_CLOCKS = 3,
    L2_CLOCKS = 16,
    L2_BUSY_CLOCKS = 8 /* that a line keeps the L2, which runs at half clock */
};

typedef struct {
    int hit;
    int evicted; /* 1: a dirty line had to go, namely `line` */
    uint32_t line;
    cache_entry *entry;
} outcome;

static cache cache_make(uint32_t bytes)
{
    cache c = {(bytes >> LINE_BITS) / WAYS, WAYS, 0, NULL};
    c.entries = calloc((size_t)c.sets * c.ways, sizeof *c.entries);
    if (c.entries == NULL) {
        fprintf(stderr, "pentium2_model: no memory\n");
        exit(1);
    }
    return c;
}

memory memory_make(uint32_t dram_clocks, uint32_t bus_clocks)
{
    return (memory){
        .dram_clocks = dram_clocks,
        .bus_clocks = bus_clocks,
        .l1 = cache_make(L1_BYTES),
        .l2 = cache_make(L2_BYTES),
    };
}

/* Look a line up, and take it in if it is not there. */
static outcome cache_take(cache *c, uint32_t line, int store)
{
    cache_entry *set = c->entries + (size_t)(line % c->sets) * c->ways, *oldest = set;
    c->accesses++;
    for (uint32_t way = 0; way < c->ways; way++) {
        if (set[way].full && set[way].line == line) {
            set[way].used = c->accesses;
            set[way].dirty |= store;
            return (outcome){.hit = 1, .entry = set + way};
        }
        if (set[way].used < oldest->used)
            oldest = set + way;
    }
    outcome found = {.evicted = oldest->full && oldest->dirty, .line = oldest->line, .entry = oldest};
    *oldest = (cache_entry){.line = line, .used = c->accesses, .full = 1, .dirty = store};
    return found;
}

static uint64_t later(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

static void bus_write(memory *m, uint64_t when)
{
    m->bus_free = later(m->bus_free, when) + m->bus_clocks;
}

/* Fetch a line that L1 does not have: the clock when it arrives. */
static uint64_t fetch(memory *m, uint32_t line, uint64_t when)
{
    uint64_t *buffer = m->buffer_free;
    for (int i = 1; i < MISSES_AT_ONCE; i++)
        if (m->buffer_free[i] < *buffer)
            buffer = m->buffer_free + i;
    uint64_t begin = later(later(when, *buffer), m->l2_free);
    outcome found = cache_take(&m->l2, line, 0);
    if (found.hit) {
        m->l2_free = begin + L2_BUSY_CLOCKS;
        return *buffer = begin + L2_CLOCKS;
    }
    m->l2_misses++;
    if (found.evicted)
        bus_write(m, begin);
    uint64_t transfer = later(m->bus_free, begin + m->dram_clocks - m->bus_clocks);
    m->bus_free = transfer + m->bus_clocks;
    m->l2_free = later(m->l2_free, begin);
    return *buffer = m->bus_free;
}

uint64_t memory_access(memory *m, uint32_t address, uint64_t when, int store)
{
    uint32_t line = address >> LINE_BITS;
    outcome found = cache_take(&m->l1, line, store);
    if (found.hit)
        return found.entry->ready > when ? found.entry->ready : when + L1_CLOCKS;
    m->l1_misses++;
    if (found.evicted) {
        m->l2_free = later(m->l2_free, when) + L2_BUSY_CLOCKS;
        if (cache_take(&m->l2, found.line, 1).evicted)
            bus_write(m, when);
    }
    return found.entry->ready = fetch(m, line, when);
}
