/* Multiplying by look-up on a Pentium II: MMX for what is parallel, scalar registers for looking up.
 *
 * The compiler keeps x87 values away from none of this by itself: MMX registers are x87's. So every function here is
 * called, never inlined, holds no floating-point value, and leaves with `emms`.
 */
#include "lookup.h"

#if defined(__i386__)
#define NOINLINE __attribute__((noinline))
#define MMX_REGISTERS "st", "st(1)", "st(2)", "st(3)", "st(4)", "st(5)", "st(6)", "st(7)"

/* Weights of the first three places, by code: what tabulate multiplies activations with. */
#define LOW(f)                                                                                                       \
    {                                                                                                                \
        f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15), f(16),  \
            f(17), f(18), f(19), f(20), f(21), f(22), f(23), f(24), f(25), f(26), f(27)                                 \
    }
#define FIRST(i) (i) % 3 - 1
#define SECOND(i) (i) / 3 % 3 - 1
#define THIRD(i) (i) / 9 % 3 - 1
static const int16_t low[3][28] __attribute__((aligned(8), used)) = {LOW(FIRST), LOW(SECOND), LOW(THIRD)};

/* Four codes of the low digits, and their nine shifts by the fourth and fifth activation. mm5 to mm7: activations 0 to 2;
 * mm4: -x3 - x4, mm2: x3, mm3: x4 - 2 x3. Byte `o` of a row of 56. */
#define SHIFT(by, to) "paddw " by ", %%mm0\n\tmovq %%mm0, " #to "(%[table])\n\t"
#define FOUR_CODES(o)                                                                                                 \
    "movq %%mm5, %%mm0\n\tpmullw " #o "(%[low]), %%mm0\n\t"                                                          \
    "movq %%mm6, %%mm1\n\tpmullw 56+" #o "(%[low]), %%mm1\n\tpaddw %%mm1, %%mm0\n\t"                                 \
    "movq %%mm7, %%mm1\n\tpmullw 112+" #o "(%[low]), %%mm1\n\tpaddw %%mm1, %%mm0\n\t"                                \
    SHIFT("%%mm4", o) SHIFT("%%mm2", 56 + o) SHIFT("%%mm2", 112 + o)                                                 \
    SHIFT("%%mm3", 168 + o) SHIFT("%%mm2", 224 + o) SHIFT("%%mm2", 280 + o)                                          \
    SHIFT("%%mm3", 336 + o) SHIFT("%%mm2", 392 + o) SHIFT("%%mm2", 448 + o)
#define BROADCAST(at, to) "movd " #at "(%[x]), " to "\n\tpunpcklwd " to ", " to "\n\tpunpckldq " to ", " to "\n\t"

static NOINLINE void tabulate(int16_t *table, const int8_t *activations)
{
    const int32_t x[5] = {activations[0], activations[1], activations[2], activations[3], activations[4]};
    __asm__ volatile(BROADCAST(0, "%%mm5") BROADCAST(4, "%%mm6") BROADCAST(8, "%%mm7")
                     BROADCAST(12, "%%mm2") BROADCAST(16, "%%mm3")
                     "pxor %%mm4, %%mm4\n\tpsubw %%mm2, %%mm4\n\tpsubw %%mm3, %%mm4\n\t"
                     "psubw %%mm2, %%mm3\n\tpsubw %%mm2, %%mm3\n\t"
                     FOUR_CODES(0) FOUR_CODES(8) FOUR_CODES(16) FOUR_CODES(24) FOUR_CODES(32) FOUR_CODES(40)
                     FOUR_CODES(48) "emms"
                     :
                     : [table] "r"(table), [x] "r"(x), [low] "r"(low)
                     : "memory", MMX_REGISTERS);
}

/* Four bytes of a row at `o`, looked up in tables from `t` on and added to %dx; eax, ebx and ecx hold their codes already,
 * and get those of the next four. One operation on memory between two on registers is what this CPU decodes at once. */
#define FOUR_GROUPS(o, t)                                                                                            \
    "addw " #t "(%[tables], %%ebx, 2), %%dx\n\tshrl $16, %%eax\n\tmovzbl %%al, %%ebx\n\t"                           \
    "addw " #t "+512(%[tables], %%ecx, 2), %%dx\n\tmovzbl %%ah, %%ecx\n\tmovl " #o "+4(%[codes]), %%eax\n\t"       \
    "addw " #t "+1024(%[tables], %%ebx, 2), %%dx\n\tmovzbl %%al, %%ebx\n\t"                                         \
    "addw " #t "+1536(%[tables], %%ecx, 2), %%dx\n\tmovzbl %%ah, %%ecx\n\t"
#define GROUPS_4(o) FOUR_GROUPS(o, 0)
#define GROUPS_8(o) GROUPS_4(o) FOUR_GROUPS(o + 4, 2048)
#define GROUPS_12(o) GROUPS_8(o) FOUR_GROUPS(o + 8, 4096)
#define GROUPS_16(o) GROUPS_12(o) FOUR_GROUPS(o + 12, 6144)
#define GROUPS_20(o) GROUPS_16(o) FOUR_GROUPS(o + 16, 8192)
#define ADD_SUM(o) "movswl %%dx, %%edx\n\taddl %%edx, " #o "(%%ebp)\n\t"

/* Rows done between two looks ahead: their codes are the cache lines that are asked for at once. */
#define BLOCK 16u
#define LINE_BYTES 32u

/* Rows of `bytes` codes, an even number of them. Reads four bytes behind the last one.
 *
 * The lines of the next rows are asked for by reading a byte of each: this CPU has no prefetch. Reads wait for one
 * another's data, but their ways to memory overlap; many at once wait for little more than the memory itself. */
#define ROWS(bytes)                                                                                                  \
    static NOINLINE void rows_##bytes(int32_t *out, const uint8_t *codes, const uint8_t *end, const int16_t *tables)  \
    {                                                                                                                \
        __asm__ volatile("pushl %%edx\n\tpushl %%ebp\n\tmovl %%eax, %%ebp\n\t"                                       \
                         "movl (%[codes]), %%eax\n\tmovzbl %%al, %%ebx\n\tmovzbl %%ah, %%ecx\n"                      \
                         "1:\n\txorl %%edx, %%edx\n\t" GROUPS_##bytes(0) ADD_SUM(0)                                 \
                         "xorl %%edx, %%edx\n\t" GROUPS_##bytes(bytes) ADD_SUM(4)                                    \
                         "addl $2*" #bytes ", %[codes]\n\taddl $8, %%ebp\n\tcmpl 4(%%esp), %[codes]\n\tjb 1b\n\t"   \
                         "popl %%ebp\n\taddl $4, %%esp"                                                              \
                         : [codes] "+S"(codes), "+a"(out), "+d"(end)                                                 \
                         : [tables] "D"(tables)                                                                      \
                         : "ebx", "ecx", "memory", "cc");                                                            \
    }                                                                                                                \
                                                                                                                     \
    static void blocks_##bytes(int32_t *out, const uint8_t *codes, uint32_t rows, const int16_t *tables)               \
    {                                                                                                                \
        const uint32_t whole = rows / BLOCK * BLOCK;                                                                 \
        for (uint32_t row = 0; row < whole; row += BLOCK, codes += BLOCK * bytes) {                                  \
            if (row + BLOCK < whole) {                                                                               \
                _Pragma("GCC unroll 10") for (uint32_t o = 0; o < BLOCK * bytes; o += LINE_BYTES)                    \
                    (void)*(const volatile uint8_t *)(codes + BLOCK * bytes + o);                                    \
            }                                                                                                        \
            rows_##bytes(out + row, codes, codes + BLOCK * bytes, tables);                                           \
        }                                                                                                            \
        if (rows > whole)                                                                                            \
            rows_##bytes(out + whole, codes, codes + (rows - whole) * bytes, tables);                                \
    }
ROWS(4)
ROWS(8)
ROWS(12)
ROWS(16)
ROWS(20)

static void add_rows(int32_t *out, const uint8_t *codes, uint32_t rows, uint32_t groups, const int16_t *tables)
{
    static void (*const blocks[])(int32_t *, const uint8_t *, uint32_t, const int16_t *) = {
        blocks_4, blocks_8, blocks_12, blocks_16, blocks_20};
    const uint32_t even = (rows - 1) / 2 * 2; /* the last one or two are done apart: nothing reads behind the matrix */
    blocks[groups / 4 - 1](out, codes, even, tables);
    lookup_plain.add_rows(out + even, codes + (size_t)even * groups, rows - even, groups, tables);
}

/* Two columns of a pair at `o`: bytes become the high halves of words, and the instruction itself adds both products. */
#define TWO_COLUMNS(half, o, with, to)                                                                               \
    "pxor " with ", " with "\n\tpunpck" half "bw " #o "(%[m]), " with "\n\tpmaddwd %%mm0, " with "\n\tpaddd " with ", " to "\n\t"

/* All columns of the pair at `o`, with the pair of x at `at`. */
#define PAIR(at, o)                                                                                                  \
    "movd " #at "(%[x]), %%mm0\n\tpunpckldq %%mm0, %%mm0\n\t"                                                        \
    TWO_COLUMNS("l", o, "%%mm1", "%%mm4") TWO_COLUMNS("h", o, "%%mm2", "%%mm5")                                       \
    TWO_COLUMNS("l", o + 8, "%%mm1", "%%mm6") TWO_COLUMNS("h", o + 8, "%%mm2", "%%mm7")

static NOINLINE void sum_columns(int32_t *out, const int8_t *matrix, uint32_t blocks, size_t block_stride,
                                 uint32_t pairs, const int16_t *x)
{
    for (uint32_t block = 0; block < blocks; block++, out += LOOKUP_COLUMNS, matrix += block_stride) {
        const int8_t *m = matrix;
        const int16_t *at = x, *const end = x + 2 * pairs;
        for (uint32_t o = 0; o < pairs * 2 * LOOKUP_COLUMNS; o += LINE_BYTES)
            (void)*(const volatile int8_t *)(m + o);
        __asm__ volatile("pxor %%mm4, %%mm4\n\tpxor %%mm5, %%mm5\n\tpxor %%mm6, %%mm6\n\tpxor %%mm7, %%mm7\n"
                         "1:\n\t" PAIR(0, 0) PAIR(4, 16)
                         "addl $8, %[x]\n\taddl $32, %[m]\n\tcmpl %[end], %[x]\n\tjb 1b\n\t"
                         "movq %%mm4, (%[out])\n\tmovq %%mm5, 8(%[out])\n\tmovq %%mm6, 16(%[out])\n\t"
                         "movq %%mm7, 24(%[out])"
                         : [m] "+r"(m), [x] "+r"(at)
                         : [out] "r"(out), [end] "g"(end)
                         : "memory", "cc", MMX_REGISTERS);
    }
    __asm__ volatile("emms" : : : "memory", MMX_REGISTERS);
}

const struct lookup_kernels lookup_mmx = {"mmx", tabulate, add_rows, sum_columns};
#else
typedef int pentium2_mmx_is_empty_here; /* ISO C wants something in every file */
#endif
