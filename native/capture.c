/* Takes the hidden rows out of libllama's graph: the evaluation callback of a stage before the last.
 *
 * libllama asks it about every node of the graph, some 30 a layer. In C that costs nothing; as a Python
 * callback it took a tenth of a decode step (0.25 ms of 2.3 ms for eleven layers of the starter model).
 *
 * No header of ggml is needed: its functions come as pointers, from whoever loaded the library.
 */
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* Mirrored by cordee.engine.capture.Capture. The owner keeps it, and `rows`, alive as long as the context. */
typedef struct {
    const char *(*tensor_name)(const void *tensor);
    size_t (*tensor_nbytes)(const void *tensor);
    void (*tensor_get)(const void *tensor, void *data, size_t offset, size_t nbytes);
    const char *wanted;   /* the tensor's name */
    void *rows;           /* where it is copied to; room for capacity_bytes */
    size_t capacity_bytes;
    size_t nbytes;        /* out: size of the last tensor that came */
    size_t count;         /* out: how many came since the owner set it to 0 */
} cordee_capture;

/* ggml_backend_sched_eval_callback. Asked (`ask`), it wants the tensor by that name only; given it, it copies
 * it and answers false, which ends the graph there: no final norm, no head. A tensor that is too large is
 * counted and not copied. */
EXPORT bool cordee_capture_tensor(void *tensor, bool ask, void *user_data)
{
    cordee_capture *capture = user_data;
    if (ask)
        return strcmp(capture->tensor_name(tensor), capture->wanted) == 0;
    capture->nbytes = capture->tensor_nbytes(tensor);
    capture->count += 1;
    if (capture->nbytes <= capture->capacity_bytes)
        capture->tensor_get(tensor, capture->rows, 0, capture->nbytes);
    return false;
}

/* Windows' linker wants the entry point that every Python extension has; ctypes loads this library without. */
EXPORT void *PyInit__capture(void)
{
    return NULL;
}
