/* Reading the keys of a model file. */
#ifndef CORDEE_SETTINGS_H
#define CORDEE_SETTINGS_H

#include "base/gguf.h"
#include "model.h"

/* The file being read, and where to complain. */
struct loading {
    struct gguf gguf;
    ternary_model *model;
    ternary_error *error;
    enum layout layout, head_layout;
};

/* The whole name of a key under the architecture's prefix; false if it has no room. */
bool settings_key(char *key, size_t room, const char *architecture, const char *name);

/* All but the layers' number and the architecture, which the model has already. */
ternary_status read_settings(struct loading *loading);

#endif
