/* Which kernels this CPU runs. A CPU nobody thought of gets the scalar ones. */
#if defined(__linux__)
#define _DEFAULT_SOURCE /* syscall */
#endif
#include <string.h>

#include "kernels.h"

#if CORDEE_X86_KERNELS
#include <cpuid.h>

/* The compiler's run-time check also asks the operating system whether it saves the wide registers. */
static int has_avx2(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
}

static int has_avx512vnni(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

static int has_avxvnni(void)
{
#if CORDEE_EVEX_FOR_VEX
    return has_avx512vnni();
#else
    unsigned a, b, c, d;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1) != 0;
#endif
}

#if CORDEE_TILE_MODEL
static int has_amx(void)
{
    return has_avx512vnni();
}
#elif defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023 /* asks Linux for a register file, for all threads of the process */
#define XFEATURE_TILE_DATA 18
#define XCR0_TILES (3ull << 17)

static int has_amx(void)
{
    unsigned a, b, c, d, low, high;
    if (!has_avx512vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 3) != 3) /* AMX-TILE, AMX-INT8 */
        return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & XCR0_TILES) != XCR0_TILES)
        return 0;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_TILE_DATA) == 0;
}
#else
static int has_amx(void)
{
    return 0;
}
#endif
#endif

#if CORDEE_ARM_KERNELS
#include <sys/auxv.h>

#define HWCAP_DOT_PRODUCT (1ul << 20) /* HWCAP_ASIMDDP of Linux */

static int has_dot_product(void)
{
    return (getauxval(AT_HWCAP) & HWCAP_DOT_PRODUCT) != 0;
}
#endif

#if !defined(CORDEE_IS_AMD) /* tests run the choices of both makers */
#define CORDEE_IS_AMD __builtin_cpu_is("amd")
#endif

static bool is_amd(void)
{
#if CORDEE_X86_KERNELS
    __builtin_cpu_init();
    return CORDEE_IS_AMD;
#else
    return false;
#endif
}

/* Measured, weights of 520 MB: on a Xeon (Sapphire Rapids) four streams and 2048 bytes were best by 10 to 75 %; on an EPYC
 * (Zen 4) more than 512 cost 10 to 25 %, 256 gain 2 %, and one stream is 12 % faster than four. */
static void tune(struct kernels *kernels)
{
    const bool amd = is_amd();
    kernels->prefetch_bytes = amd ? 256 : 2048;
    kernels->is_one_stream = amd;
}

static int always(void)
{
    return 1;
}

static const struct {
    const struct kernels *kernels;
    int (*runs)(void);
} known[] = {
#if CORDEE_X86_KERNELS
    {&kernels_amx, has_amx},
    {&kernels_avx512vnni, has_avx512vnni},
    {&kernels_avxvnni, has_avxvnni},
    {&kernels_avx2, has_avx2},
#endif
#if CORDEE_ARM_KERNELS
    {&kernels_neon, has_dot_product},
#endif
    {&kernels_scalar, always},
};

/* Asked once: in a virtual machine each question to the CPU leaves it for some microseconds. Threads that ask at the same
 * time find the same answer. */
static bool runs(size_t i)
{
    static _Atomic signed char answers[sizeof known / sizeof *known]; /* 0: nobody has asked */
    if (answers[i] == 0)
        answers[i] = known[i].runs() ? 1 : -1;
    return answers[i] > 0;
}

const char *kernels_name(uint32_t index)
{
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (runs(i) && index-- == 0)
            return known[i].kernels->name;
    return NULL;
}

bool kernels_named(const char *name, struct kernels *kernels)
{
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (runs(i) && (name == NULL || strcmp(known[i].kernels->name, name) == 0)) {
            *kernels = *known[i].kernels;
            tune(kernels);
            return true;
        }
    return false;
}
