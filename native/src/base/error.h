/* Failing with a sentence. */
#ifndef CORDEE_ERROR_H
#define CORDEE_ERROR_H

#include "ternary.h"

/* Writes the sentence where somebody listens, and gives the status back. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
ternary_status ternary_fail(ternary_error *error, ternary_status status, const char *format, ...);

#endif
