/* The caches and the memory of a Pentium II PC: 16 KB of L1 data, 512 KB of L2 at half clock, DRAM behind a bus. */
#ifndef P6_MEMORY_H
#define P6_MEMORY_H

#include <stdint.h>

typedef struct {
    uint32_t line;
    uint32_t used;   /* when, in accesses of the cache */
    uint64_t ready;  /* clock when the line has arrived */
    uint8_t full, dirty;
} cache_entry;

typedef struct {
    uint32_t sets, ways, accesses;
    cache_entry *entries; /* [sets][ways] */
} cache;

enum { MISSES_AT_ONCE = 4 };

typedef struct {
    uint32_t dram_clocks; /* from a miss in L2 to the line, on an idle bus */
    uint32_t bus_clocks;  /* that a line keeps the bus */
    cache l1, l2;
    uint64_t l2_free, bus_free, buffer_free[MISSES_AT_ONCE];
    uint64_t l1_misses, l2_misses;
} memory;

/* An empty memory; ends the program if there is no room. */
memory memory_make(uint32_t dram_clocks, uint32_t bus_clocks);

/* Access an address at clock `when`: the clock at which a load has its value. A store takes the line into L1. */
uint64_t memory_access(memory *m, uint32_t address, uint64_t when, int store);

#endif
