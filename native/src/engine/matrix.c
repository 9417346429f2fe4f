/* The table of layouts. */
#include "matrix.h"

#include <string.h>

const struct layout_facts layout_facts[LAYOUTS] = {
    [LAYOUT_TRIT2] = {"trit2", 64, 64, 1},
    [LAYOUT_TRIT5] = {"trit5", 80, 64, 1},
    [LAYOUT_INT8] = {"int8", 16, 64, 128},
    [LAYOUT_INT6] = {"int6", 64, 192, 32},
    [LAYOUT_INT4] = {"int4", 32, 64, 8},
};

enum layout layout_named(const char *name)
{
    enum layout layout = 0;
    while (layout < LAYOUTS && strcmp(layout_facts[layout].name, name) != 0)
        layout++;
    return layout;
}

struct matrix matrix_at(const struct matrix *all, uint32_t number)
{
    struct matrix one = *all;
    one.count = 1;
    one.data += (size_t)number * all->groups * group_bytes_of(all);
    if (all->span_scales != NULL)
        one.span_scales += number * span_scales_of(all);
    else
        one.scales += (size_t)number * (all->rows / all->scale_rows);
    return one;
}
