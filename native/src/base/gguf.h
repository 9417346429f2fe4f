/* Reading a GGUF container from bytes: finds keys and tensors, believes nothing.
 * https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian. */
#ifndef CORDEE_GGUF_H
#define CORDEE_GGUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Numbers of the format. */
enum gguf_type {
    GGUF_UINT8, GGUF_INT8, GGUF_UINT16, GGUF_INT16, GGUF_UINT32, GGUF_INT32, GGUF_FLOAT32, GGUF_BOOL, GGUF_STRING,
    GGUF_ARRAY, GGUF_UINT64, GGUF_INT64, GGUF_FLOAT64
};
enum gguf_tensor_type {
    GGUF_TENSOR_F32 = 0, GGUF_TENSOR_F16 = 1, GGUF_TENSOR_Q8_0 = 8, GGUF_TENSOR_I8 = 24, GGUF_TENSOR_BF16 = 30
};

#define GGUF_DIMENSIONS 4
/* Real files have up to 80 keys and a few thousand tensors; looking one up is a walk over all of them. */
#define GGUF_KEYS_LIMIT 4096u
#define GGUF_TENSORS_LIMIT 65536u

/* A container whose whole structure was walked once and lies within its bytes. */
struct gguf {
    const uint8_t *bytes;
    size_t nbytes;
    uint32_t keys, tensors;
    size_t keys_at, tensors_at; /* where the lists start */
    size_t data_at;             /* where tensor offsets count from */
};

struct gguf_value {
    uint32_t type;
    const uint8_t *bytes; /* of a string: its characters, without a zero; of an array: type, count, items */
    size_t nbytes;
};

struct gguf_tensor {
    uint32_t type;
    uint32_t dimensions;
    uint64_t shape[GGUF_DIMENSIONS]; /* fastest first; 1 behind the last */
    const uint8_t *data;
    size_t room; /* bytes from `data` to the end of the file */
};

/* Check the container; on failure *fault is what is wrong with it. */
bool gguf_open(struct gguf *gguf, const uint8_t *bytes, size_t nbytes, const char **fault);

bool gguf_find_key(const struct gguf *gguf, const char *key, struct gguf_value *value);

bool gguf_find_tensor(const struct gguf *gguf, const char *name, struct gguf_tensor *tensor);

/* Plain values: false where there is no such key or it has another type. Any integer type that fits will do. */
bool gguf_number(const struct gguf *gguf, const char *key, uint32_t *number);
bool gguf_float(const struct gguf *gguf, const char *key, float *number);
/* Copies at most room - 1 characters and a zero; false where it is longer. */
bool gguf_text(const struct gguf *gguf, const char *key, char *text, size_t room);
/* Copies a list of exactly `count` truth values, as 0 and 1; false where it is another list. */
bool gguf_flags(const struct gguf *gguf, const char *key, uint8_t *flags, uint32_t count);

#endif
