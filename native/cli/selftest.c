/* Whether this machine computes what every other one does.
 *
 * Integers: the CPU's kernels beside the plain ones, on random numbers and on the extremes, in every shape of a tile.
 * Floating point: the bits of a walk through every function, hashed, beside what they are everywhere.
 */
#include "selftest.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pentium2/floats.h"
#include "pentium2/lookup.h"
#include "pentium2/precision.h"

#define ROWS 37u /* two blocks of a kernel's and some */
#define BLOCKS 3u
#define PAIRS 12u
#define VALUES 96u
#define EXPECTED 0x22e45c88u /* the hash on every machine so far */

struct room {
    int16_t tables[LOOKUP_TILE * LOOKUP_ENTRIES] __attribute__((aligned(64)));
    int16_t plain_tables[LOOKUP_TILE * LOOKUP_ENTRIES];
    int8_t columns[BLOCKS * PAIRS * 2 * LOOKUP_COLUMNS] __attribute__((aligned(64)));
    int32_t sums[ROWS], plain_sums[ROWS];
    uint8_t codes[ROWS * LOOKUP_TILE];
    int8_t x[LOOKUP_TILE * LOOKUP_WEIGHTS];
};

static uint32_t random_bits(uint32_t *state)
{
    return *state = *state * 1664525u + 1013904223u;
}

/* Bytes of random numbers, or all at one extreme. */
static void fill(int8_t *x, size_t n, int round, uint32_t *state)
{
    for (size_t i = 0; i < n; i++)
        x[i] = round == 0 ? 127 : round == 1 ? -128 : (int8_t)(random_bits(state) >> 24);
}

static bool rows_agree(const struct lookup_kernels *kernels, struct room *room, uint32_t groups, int round,
                       uint32_t *state)
{
    fill(room->x, sizeof room->x, round, state);
    for (uint32_t i = 0; i < ROWS * groups; i++) /* all weights 1, all -1, or any */
        room->codes[i] = (uint8_t)(round == 0 ? 250 : round == 1 ? 0 : (random_bits(state) >> 8) % 252);
    for (uint32_t group = 0; group < groups; group++) {
        kernels->tabulate(room->tables + group * LOOKUP_ENTRIES, room->x + group * LOOKUP_WEIGHTS);
        lookup_plain.tabulate(room->plain_tables + group * LOOKUP_ENTRIES, room->x + group * LOOKUP_WEIGHTS);
    }
    memset(room->sums, 0, sizeof room->sums);
    memset(room->plain_sums, 0, sizeof room->plain_sums);
    kernels->add_rows(room->sums, room->codes, ROWS, groups, room->tables);
    lookup_plain.add_rows(room->plain_sums, room->codes, ROWS, groups, room->plain_tables);
    return memcmp(room->sums, room->plain_sums, sizeof room->sums) == 0;
}

static bool columns_agree(const struct lookup_kernels *kernels, struct room *room, uint32_t *state)
{
    int16_t x[2 * PAIRS];
    for (uint32_t i = 0; i < BLOCKS * PAIRS * 2 * LOOKUP_COLUMNS; i++)
        room->columns[i] = (int8_t)(random_bits(state) >> 24);
    for (uint32_t i = 0; i < 2 * PAIRS; i++)
        x[i] = (int16_t)((int32_t)(random_bits(state) >> 18) - 8192);
    kernels->sum_columns(room->sums, room->columns, BLOCKS, PAIRS * 2 * LOOKUP_COLUMNS, PAIRS, x);
    lookup_plain.sum_columns(room->plain_sums, room->columns, BLOCKS, PAIRS * 2 * LOOKUP_COLUMNS, PAIRS, x);
    return memcmp(room->sums, room->plain_sums, BLOCKS * LOOKUP_COLUMNS * sizeof *room->sums) == 0;
}

static bool integers_agree(const struct lookup_kernels *kernels)
{
    static struct room room;
    uint32_t state = 1;
    bool agree = true;
    for (uint32_t groups = 4; groups <= LOOKUP_TILE; groups += 4)
        for (int round = 0; round < 8; round++)
            agree = agree && rows_agree(kernels, &room, groups, round, &state) &&
                    columns_agree(kernels, &room, &state);
    return agree;
}

/* FNV-1a of the bits of some floats. */
static void mix(uint32_t *hash, const float *x, uint32_t n)
{
    uint8_t bytes[sizeof *x];
    for (uint32_t i = 0; i < n; i++) {
        memcpy(bytes, x + i, sizeof bytes);
        for (size_t b = 0; b < sizeof bytes; b++)
            *hash = (*hash ^ bytes[b]) * 16777619u;
    }
}

/* A call of its own: the compiler might move arithmetic across the change of precision. */
static __attribute__((noinline)) uint32_t hash_of_floats(void)
{
    static float x[VALUES], y[VALUES], weight[VALUES], cosines[VALUES / 2], sines[VALUES / 2];
    static int8_t digits[VALUES];
    int32_t sums[1];
    float scales[1];
    const struct activations to = {
        .digits = digits, .sums = sums, .scales = scales, .stride = VALUES, .planes = 1, .spans = 1};
    uint32_t hash = 2166136261u, state = 7;
    for (int round = 0; round < 50; round++) {
        for (uint32_t i = 0; i < VALUES; i++) {
            x[i] = (float)((int32_t)(random_bits(&state) >> 8) - (1 << 23)) * 0x1p-20f;
            y[i] = (float)((int32_t)(random_bits(&state) >> 8) - (1 << 23)) * 0x1p-20f;
            weight[i] = (float)(int32_t)(random_bits(&state) >> 8) * 0x1p-23f;
        }
        kernels_pentium2.normalise(y, y, weight, VALUES, 1e-5f);
        (round % 2 == 0 ? kernels_pentium2.gate_silu : kernels_pentium2.gate_relu2)(x, y, VALUES);
        pentium2_angles(cosines, sines, VALUES / 2, 10000.0f, NULL, (uint32_t)round * 1000);
        (round % 2 == 0 ? kernels_pentium2.rotate_halves : kernels_pentium2.rotate_pairs)(y, 1, VALUES, cosines, sines);
        kernels_pentium2.add(x, y, VALUES);
        kernels_pentium2.quantise(&to, 0, x, VALUES);
        for (uint32_t i = 0; i < VALUES; i++)
            y[i] = pentium2_exponential(y[i]) + (float)digits[i] * scales[0];
        mix(&hash, x, VALUES);
        mix(&hash, y, VALUES);
        mix(&hash, cosines, VALUES / 2);
        mix(&hash, sines, VALUES / 2);
    }
    return hash;
}

bool selftest(void)
{
    const struct lookup_kernels *best = lookup_kernels_named(NULL);
    const bool integers = integers_agree(best);
    printf("integers, by %s: %s\n", best->name, integers ? "right" : "WRONG");
    const uint16_t before = precision_set(PRECISION_SINGLE);
    const uint32_t hash = hash_of_floats();
    precision_restore(before);
    printf("floating point: %s (%08x)\n", hash == EXPECTED ? "right" : "WRONG", (unsigned)hash);
    return integers && hash == EXPECTED;
}
