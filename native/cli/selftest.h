/* Whether this machine computes what every other one does. */
#ifndef CORDEE_SELFTEST_H
#define CORDEE_SELFTEST_H

#include <stdbool.h>

/* Runs the kernels that this CPU has beside the plain ones, and known numbers through the arithmetic; says on standard
 * output what was right. */
bool selftest(void);

#endif
