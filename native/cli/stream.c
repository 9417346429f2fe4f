/* Models larger than memory.
 *
 * A token wants every layer once, in order. Whatever a system does by itself, dropping what was not used for the longest
 * time, is the worst order for that: the layer dropped is the next one wanted. So the first layers stay, as many as
 * memory holds, and of the others there are two at a time: the one being computed and the one being read.
 */
#include "stream.h"

#include "platform.h"

/* Of the free memory, what is taken: the system's own buffers want some, too. */
#define SHARE_TAKEN 0.85
/* Bytes that tell how fast the disk is: more than its own cache, a second or two of the slowest. */
#define PROBE_BYTES (8u << 20)
#define PAGE_BYTES 4096u

static uint64_t layer_bytes(const ternary_model *model, uint32_t layer)
{
    return ternary_model_layer(model, layer).nbytes;
}

static double measure(const ternary_file *part)
{
    const size_t nbytes = part->nbytes < PROBE_BYTES ? part->nbytes : PROBE_BYTES;
    const double start = platform_seconds();
    platform_read_ahead(part->bytes, nbytes);
    for (size_t at = 0; at < nbytes; at += PAGE_BYTES)
        (void)*(const volatile uint8_t *)(part->bytes + at);
    const double seconds = platform_seconds() - start;
    return (double)nbytes / (seconds > 1e-6 ? seconds : 1e-6);
}

bool stream_plan(struct stream *stream, const ternary_model *model, uint64_t free_bytes)
{
    ternary_shape shape;
    ternary_model_shape(model, &shape);
    *stream = (struct stream){.model = model, .layers = shape.layers};
    const double room = (double)free_bytes * SHARE_TAKEN;
    if ((double)shape.weights_bytes <= room)
        return false;
    uint64_t largest = 0, kept = 0;
    for (uint32_t layer = 0; layer <= shape.layers; layer++)
        largest = layer_bytes(model, layer) > largest ? layer_bytes(model, layer) : largest;
    while (stream->kept < shape.layers &&
           (double)(kept + layer_bytes(model, stream->kept) + 2 * largest) <= room)
        kept += layer_bytes(model, stream->kept++);
    stream->streamed_bytes = shape.weights_bytes - kept;
    const ternary_file last = ternary_model_layer(model, shape.layers);
    stream->bytes_per_second = measure(&last);
    return true;
}

void stream_watch(void *argument, uint32_t layer)
{
    const struct stream *stream = argument;
    const uint32_t count = stream->layers + 1, next = (layer + 1) % count, before = (layer + count - 1) % count;
    if (before >= stream->kept) {
        const ternary_file done = ternary_model_layer(stream->model, before);
        platform_let_go(done.bytes, done.nbytes);
    }
    if (next >= stream->kept) {
        const ternary_file wanted = ternary_model_layer(stream->model, next);
        platform_read_ahead(wanted.bytes, wanted.nbytes);
    }
}
