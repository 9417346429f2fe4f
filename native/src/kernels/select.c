/* Which kernels this CPU runs. A CPU nobody thought of gets the scalar ones. */
#include <string.h>

#include "kernels.h"

#if CORDEE_X86_KERNELS
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
#endif

/* Measured, weights of 520 MB: on a Xeon (Sapphire Rapids) 2048 was best by 10 to 75 %; on an EPYC (Zen 4) every
 * distance cost 15 to 25 %. Set before any thread computes; always to the same value. */
size_t prefetch_bytes = 2048;

static void tune(void)
{
#if CORDEE_X86_KERNELS
    __builtin_cpu_init();
    if (__builtin_cpu_is("amd"))
        prefetch_bytes = 0;
#endif
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
    {&kernels_avx512vnni, has_avx512vnni},
    {&kernels_avx2, has_avx2},
#endif
    {&kernels_scalar, always},
};

const struct kernels *kernels_at(uint32_t index)
{
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].runs() && index-- == 0)
            return known[i].kernels;
    return NULL;
}

const struct kernels *kernels_named(const char *name)
{
    const struct kernels *kernels;
    tune();
    for (uint32_t i = 0; (kernels = kernels_at(i)) != NULL; i++)
        if (name == NULL || strcmp(kernels->name, name) == 0)
            return kernels;
    return NULL;
}
