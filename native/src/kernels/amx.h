/* The dots of amx.c; kernels_amx is made in avx512vnni.c, whose other functions it shares. */
#ifndef CORDEE_AMX_H
#define CORDEE_AMX_H

#include "kernels.h"

/* Rows that share a group's unpacked weights: so many that unpacking them is little beside multiplying. */
#define AMX_ROWS 128u

dot_function amx_trit2, amx_trit5;

#endif
