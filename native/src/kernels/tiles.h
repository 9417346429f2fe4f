/* The AMX instructions that amx.c uses, or with CORDEE_TILE_MODEL what they do in C: eight tiles of 16 rows of 64 bytes.
 * In assembly, since GCC 12's intrinsics let the stores of the configuration be optimised away.
 * Each thread configures its tiles before it uses them; source: Intel's architecture manual, volume 2, "AMX".
 */
#ifndef CORDEE_TILES_H
#define CORDEE_TILES_H

#include <stdint.h>
#include <string.h>

#define TILES 8
#define TILE_ROWS 16u
#define TILE_ROW_BYTES 64u
#define TILE_BYTES (TILE_ROWS * TILE_ROW_BYTES)

/* Palette 1, all tiles at their largest. */
struct tile_configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

static inline struct tile_configuration whole_tiles(void)
{
    struct tile_configuration configuration = {.palette = 1};
    for (int tile = 0; tile < TILES; tile++) {
        configuration.row_bytes[tile] = TILE_ROW_BYTES;
        configuration.rows[tile] = TILE_ROWS;
    }
    return configuration;
}

#if CORDEE_TILE_MODEL
static _Thread_local struct {
    struct tile_configuration configuration;
    uint8_t bytes[TILES][TILE_ROWS][TILE_ROW_BYTES];
} tiles;

/* As the CPU does: without a configuration it faults. */
static inline uint8_t *tile_row(int tile, uint32_t row)
{
    if (row >= tiles.configuration.rows[tile] || tiles.configuration.row_bytes[tile] != TILE_ROW_BYTES)
        __builtin_trap();
    return tiles.bytes[tile][row];
}

static inline void model_dot(int sum, int a, int b)
{
    for (uint32_t m = 0; m < TILE_ROWS; m++)
        for (uint32_t n = 0; n < TILE_ROWS; n++) {
            uint32_t total;
            memcpy(&total, tile_row(sum, m) + n * 4, 4);
            for (uint32_t k = 0; k < TILE_ROW_BYTES; k++)
                total += (uint32_t)((int8_t)tile_row(a, m)[k] * (int8_t)tile_row(b, k / 4)[n * 4 + k % 4]);
            memcpy(tile_row(sum, m) + n * 4, &total, 4);
        }
}

static inline void tiles_configure(const struct tile_configuration *configuration)
{
    tiles.configuration = *configuration;
}

static inline void tiles_release(void)
{
    memset(&tiles, 0, sizeof tiles);
}

#define TILE_ZERO(tile)                                                                                              \
    for (uint32_t row = 0; row < TILE_ROWS; row++)                                                                   \
    memset(tile_row(tile, row), 0, TILE_ROW_BYTES)
#define TILE_LOAD(tile, from, stride)                                                                                \
    for (uint32_t row = 0; row < TILE_ROWS; row++)                                                                   \
    memcpy(tile_row(tile, row), (const uint8_t *)(from) + row * (stride), TILE_ROW_BYTES)
#define TILE_STORE(tile, to, stride)                                                                                 \
    for (uint32_t row = 0; row < TILE_ROWS; row++)                                                                   \
    memcpy((uint8_t *)(to) + row * (stride), tile_row(tile, row), TILE_ROW_BYTES)
#define TILE_DOT(sum, a, b) model_dot(sum, a, b)
#else
static inline void tiles_configure(const struct tile_configuration *configuration)
{
    __asm__ volatile("ldtilecfg %0" : : "m"(*configuration));
}

static inline void tiles_release(void)
{
    __asm__ volatile("tilerelease");
}

#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile : :)
#define TILE_LOAD(tile, from, stride)                                                                                \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((size_t)(stride)) : "memory")
#define TILE_STORE(tile, to, stride)                                                                                 \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"((size_t)(stride)) : "memory")
/* Signed bytes of `a` by those of `b`. */
#define TILE_DOT(sum, a, b) __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #sum : :)
#endif

#endif
