/* What the fuzzers share: numbers from a seed, properties that must hold, memory of exactly the size asked for. */
#ifndef CORDEE_FUZZ_H
#define CORDEE_FUZZ_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static uint32_t state; /* not 0 */

/* A number from 0 to below - 1. */
static uint32_t draw(uint32_t below)
{
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state % below;
}

/* Ends with a sentence and status 1 unless it holds. */
static void expect(int holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "it does not hold that %s\n", what);
    exit(1);
}

static void *get(size_t nbytes)
{
    void *memory = malloc(nbytes ? nbytes : 1);
    expect(memory != NULL, "there is memory");
    return memory;
}

#endif
