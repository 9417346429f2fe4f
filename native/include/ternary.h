/* The ternary engine: language models whose weights are -1, 0, +1, on a CPU.
 *
 * A *model* is a loaded file: immutable, shared by any number of sessions. A *session* is a mutable timeline: the
 * key/value cache of several sequences, over the layers of its file, with the threads that compute. A file may hold
 * all layers of a model or a slice of them; rows go in, rows or logits come out.
 *
 * The caller owns all memory: every object says how many bytes it wants and is made inside them. The library
 * allocates nothing, prints nothing, never exits, and touches no file but the one it is told to map.
 * A model file is untrusted input: every size is checked before it is used.
 *
 * A row's result never depends on what else is in its batch, on how a prompt was cut into batches, or on the
 * number of threads: each row has its own activation scale, integer dots are exact, and every floating-point sum
 * has one order. All kernels of one build give the same bits.
 */
#ifndef CORDEE_TERNARY_H
#define CORDEE_TERNARY_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define TERNARY_API __declspec(dllexport)
#else
#define TERNARY_API __attribute__((visibility("default")))
#endif

/* Memory handed to ..._make must be aligned to this many bytes (a cache line and the widest vector). */
#define TERNARY_ALIGNMENT 64

typedef enum {
    TERNARY_OK = 0,
    TERNARY_BAD_FILE = 1,    /* damaged, no GGUF, or it lies about its sizes */
    TERNARY_UNSUPPORTED = 2, /* a sound file that this engine does not run */
    TERNARY_REFUSED = 3,     /* the caller asks for what cannot be; nothing has changed */
    TERNARY_SYSTEM = 4       /* the machine has no memory, file or thread to give */
} ternary_status;

/* What went wrong, in a sentence without a full stop. Filled only when a status is not TERNARY_OK. */
typedef struct {
    char text[256];
} ternary_error;

typedef struct ternary_model ternary_model;
typedef struct ternary_session ternary_session;

/* ---- The file ---- */

/* The bytes of a model file. They must outlive every model made of them. */
typedef struct {
    const uint8_t *bytes;
    size_t nbytes;
} ternary_file;

/* Map a file into memory, read-only. Close with ternary_file_unmap. */
TERNARY_API ternary_status ternary_file_map(const char *path, ternary_file *file, ternary_error *error);

/* Give a mapping back. Harmless on one that failed. */
TERNARY_API void ternary_file_unmap(ternary_file *file);

/* ---- The model ---- */

/* What a loaded file is. `layers` counts those in the file; text fields end with a zero. */
typedef struct {
    char architecture[64];
    uint32_t layers;
    uint32_t n_embd;
    uint32_t n_ff;
    uint32_t n_vocab; /* 0: the file has neither embedding nor head (a slice from the middle) */
    uint32_t heads;
    uint32_t kv_heads;
    uint32_t head_dim;
    uint32_t trained_context;
    uint32_t has_embedding; /* 1: token ids may go in */
    uint32_t has_head;      /* 1: logits may come out */
    uint64_t weights_bytes; /* read for each token: all layers and the head */
} ternary_shape;

/* Bytes that ternary_model_make wants for this file, at most a few hundred kB; 0 if it is no model (make says why). */
TERNARY_API size_t ternary_model_bytes(const ternary_file *file);

/* Make a model in `memory` (ternary_model_bytes of them). Borrows `file`. Nothing has to be given back. */
TERNARY_API ternary_status ternary_model_make(void *memory, const ternary_file *file, ternary_model **model,
                                              ternary_error *error);

TERNARY_API void ternary_model_shape(const ternary_model *model, ternary_shape *shape);

/* The bytes of the file that hold a layer's matrices; layer `layers` is the head. */
TERNARY_API ternary_file ternary_model_layer(const ternary_model *model, uint32_t layer);

/* ---- The session ---- */

typedef struct {
    uint32_t context;    /* positions of each sequence's cache */
    uint32_t sequences;  /* numbered from 0 */
    uint32_t batch_rows; /* most rows in one ternary_decode */
    uint32_t threads;    /* the caller's own included */
    uint32_t logits;     /* 1: logits come out, 0: hidden rows */
    const char *kernels; /* a name that ternary_kernels_name gives; NULL: the best that this CPU has */
    const char *cache;   /* what keys and values are kept as: "f16" (NULL too), or "int8" in half the memory */
} ternary_config;

/* Bytes that ternary_session_make wants, and how many of them are the key/value cache; 0 if the configuration is
 * impossible. `kv_bytes` may be NULL. */
TERNARY_API size_t ternary_session_bytes(const ternary_model *model, const ternary_config *config,
                                         size_t *kv_bytes);

/* Make a session in `memory`; starts threads - 1 threads. Borrows `model`. The memory need not be zeroed. */
TERNARY_API ternary_status ternary_session_make(void *memory, const ternary_model *model,
                                                const ternary_config *config, ternary_session **session,
                                                ternary_error *error);

/* Told that the weights of a layer are read next: layer `layers` is the head. */
typedef void ternary_watcher(void *argument, uint32_t layer);

/* Call `watcher`, on the caller's thread, before each layer of each ternary_decode; NULL: nobody. For a program whose
 * model is larger than its memory. */
TERNARY_API void ternary_session_watch(ternary_session *session, ternary_watcher *watcher, void *argument);

/* End the session's threads. The memory is the caller's again. */
TERNARY_API void ternary_session_end(ternary_session *session);

/* Rows for one call. Rows of one sequence stand in order and continue it: the first has the position that is the
 * sequence's length. Exactly one of `tokens` and `embeddings` is not NULL. All arrays are borrowed for the call. */
typedef struct {
    uint32_t rows;
    const int32_t *tokens;     /* [rows] */
    const float *embeddings;   /* [rows][n_embd]: embedded tokens, or hidden rows of the stage before */
    const int32_t *positions;  /* [rows] */
    const int32_t *sequences;  /* [rows] */
    const uint8_t *outputs;    /* [rows], 1 where logits are wanted; not read by sessions without */
} ternary_batch;

/* Run the rows. `out` is [rows][n_embd] hidden rows, or with logits [marked rows][n_vocab] in the order of rows.
 * Not thread-safe: one call at a time for each session. When refused, the cache is as before. */
TERNARY_API ternary_status ternary_decode(ternary_session *session, const ternary_batch *batch, float *out,
                                          ternary_error *error);

/* How many positions of a sequence are in the cache; 0 for a number that is no sequence. */
TERNARY_API uint32_t ternary_sequence_length(const ternary_session *session, uint32_t sequence);

/* Keep only the first `length` positions of a sequence; 0 forgets it. */
TERNARY_API ternary_status ternary_sequence_trim(ternary_session *session, uint32_t sequence, uint32_t length,
                                                 ternary_error *error);

/* Replace a sequence by the first `length` positions of another one. Refused if that is shorter, or the same one. */
TERNARY_API ternary_status ternary_sequence_copy(ternary_session *session, uint32_t source, uint32_t target,
                                                 uint32_t length, ternary_error *error);

/* Bytes of a sequence's state as ternary_sequence_export writes it; 0 for a number that is no sequence. */
TERNARY_API size_t ternary_sequence_bytes(const ternary_session *session, uint32_t sequence);

/* Write a sequence's state to `state` (ternary_sequence_bytes of them). */
TERNARY_API ternary_status ternary_sequence_export(const ternary_session *session, uint32_t sequence,
                                                   uint8_t *state, ternary_error *error);

/* Replace a sequence by an exported one, of a session on the same layers; contexts may differ. When refused, the
 * sequence is as before. `state` may come from anywhere. */
TERNARY_API ternary_status ternary_sequence_import(ternary_session *session, uint32_t sequence,
                                                   const uint8_t *state, size_t nbytes, ternary_error *error);

/* ---- Kernels, for tests and measurements ---- */

/* The kernels that this CPU can run, best first; NULL past the last. The last is always "scalar", the truth. */
TERNARY_API const char *ternary_kernels_name(uint32_t index);

/* Integer dots of rows of a packed matrix with activation rows, with the kernels of that name.
 * `layout` is a name from native/FORMAT.md; data [groups][quads][...]; x [n][4 * quads] with values -127 to 127;
 * out [n][groups * rows of a group]. */
TERNARY_API ternary_status ternary_kernels_dot(const char *kernels, const char *layout, const uint8_t *data,
                                               uint32_t groups, uint32_t quads, const int8_t *x, uint32_t n,
                                               int32_t *out, ternary_error *error);

/* Take `rows` rows of `width` floats into a rotated basis, in place: H (signs * x), with H the Walsh-Hadamard matrix in
 * Sylvester's order, divided by the root of `block`, for each block of so many floats; or with `back` out of it,
 * signs * (H x). `block` is a power of two from 16 on that divides the width; `signs` [width] are 1 or -1. */
TERNARY_API ternary_status ternary_turn(float *x, uint32_t rows, uint32_t width, uint32_t block, const float *signs,
                                        uint32_t back, ternary_error *error);

/* Read `nbytes` bytes (a multiple of 256) from four places at once and do next to nothing with them: what memory gives
 * at best. The result only keeps the reading from being optimised away. */
TERNARY_API uint64_t ternary_memory_read(const uint8_t *bytes, size_t nbytes);

#ifdef __cplusplus
}
#endif
#endif
