/* Models larger than memory: layers come from the disk while they are computed. */
#ifndef CORDEE_STREAM_H
#define CORDEE_STREAM_H

#include <stdbool.h>

#include "ternary.h"

struct stream {
    const ternary_model *model;
    uint32_t layers;
    uint32_t kept;         /* layers from the first on that stay in memory */
    uint64_t streamed_bytes; /* read again for each token */
    double bytes_per_second; /* of the disk, measured */
};

/* Plan how to run a model in `free_bytes` of memory; false if all of it fits. Reads some of the file to see how fast that
 * goes. */
bool stream_plan(struct stream *stream, const ternary_model *model, uint64_t free_bytes);

/* A ternary_watcher: reads the next layer ahead, and lets go of the one before. `argument` is a struct stream. */
void stream_watch(void *argument, uint32_t layer);

#endif
