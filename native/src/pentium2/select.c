/* Which kernels of multiplying by look-up this CPU runs. */
#include <stddef.h>
#include <string.h>

#include "lookup.h"

#if defined(__i386__)
/* Whether the CPU can say what it can (an 80386 cannot: bit 21 of its flags stays as it is), and says MMX. */
static int has_mmx(void)
{
    uint32_t before, after, a, b, c, d;
    __asm__ volatile("pushfl\n\tpopl %0\n\tmovl %0, %1\n\txorl $0x200000, %1\n\tpushl %1\n\tpopfl\n\t"
                     "pushfl\n\tpopl %1\n\tpushl %0\n\tpopfl"
                     : "=&r"(before), "=&r"(after)
                     :
                     : "cc");
    if (((before ^ after) & 0x200000) == 0)
        return 0;
    __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(1));
    return (d >> 23 & 1) != 0;
}
#endif

const struct lookup_kernels *lookup_kernels_named(const char *name)
{
#if defined(__i386__)
    if ((name == NULL || strcmp(name, lookup_plain.name) != 0) && has_mmx())
        return &lookup_mmx;
#endif
    (void)name;
    return &lookup_plain;
}
