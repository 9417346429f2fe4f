/* Failing with a sentence. */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>

ternary_status ternary_fail(ternary_error *error, ternary_status status, const char *format, ...)
{
    if (error != NULL) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(error->text, sizeof error->text, format, arguments);
        va_end(arguments);
    }
    return status;
}
