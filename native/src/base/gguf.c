/* Reading a GGUF container from bytes. */
#include "gguf.h"

#include <string.h>

/* A place in the file; once `broken`, it stays where it is and every read gives zeros. */
struct reader {
    const uint8_t *bytes;
    size_t nbytes, at;
    bool broken;
};

static const uint8_t *take(struct reader *reader, uint64_t count)
{
    if (reader->broken || count > reader->nbytes - reader->at) {
        reader->broken = true;
        return NULL;
    }
    const uint8_t *bytes = reader->bytes + reader->at;
    reader->at += (size_t)count;
    return bytes;
}

static uint64_t little(const uint8_t *bytes, size_t count)
{
    uint64_t value = 0;
    while (bytes != NULL && count-- > 0)
        value = value << 8 | bytes[count];
    return value;
}

static uint64_t number(struct reader *reader, size_t count)
{
    return little(take(reader, count), count);
}

static size_t scalar_bytes(uint32_t type)
{
    switch (type) {
    case GGUF_UINT8: case GGUF_INT8: case GGUF_BOOL:
        return 1;
    case GGUF_UINT16: case GGUF_INT16:
        return 2;
    case GGUF_UINT32: case GGUF_INT32: case GGUF_FLOAT32:
        return 4;
    case GGUF_UINT64: case GGUF_INT64: case GGUF_FLOAT64:
        return 8;
    default:
        return 0;
    }
}

static void skip_array(struct reader *reader)
{
    uint32_t type = (uint32_t)number(reader, 4);
    uint64_t count = number(reader, 8);
    size_t each = scalar_bytes(type);
    if (each > 0 && count <= reader->nbytes / each)
        take(reader, count * each);
    else if (type == GGUF_STRING)
        while (count-- > 0 && !reader->broken) /* ends: each string takes eight bytes at least */
            take(reader, number(reader, 8));
    else
        reader->broken = true; /* arrays of arrays are in no model file */
}

static struct gguf_value read_value(struct reader *reader, uint32_t type)
{
    struct gguf_value value = {.type = type};
    uint64_t count = type == GGUF_STRING ? number(reader, 8) : scalar_bytes(type);
    const size_t start = reader->at;
    if (type == GGUF_ARRAY) {
        skip_array(reader);
        value.bytes = reader->bytes + start;
        value.nbytes = reader->at - start;
    } else if (count == 0 && type != GGUF_STRING) {
        reader->broken = true;
    } else {
        value.bytes = take(reader, count);
        value.nbytes = (size_t)count;
    }
    return value;
}

static struct gguf_tensor read_tensor(struct reader *reader, uint64_t *offset)
{
    struct gguf_tensor tensor = {.dimensions = (uint32_t)number(reader, 4), .shape = {1, 1, 1, 1}};
    if (tensor.dimensions < 1 || tensor.dimensions > GGUF_DIMENSIONS)
        reader->broken = true;
    for (uint32_t i = 0; i < tensor.dimensions && !reader->broken; i++)
        tensor.shape[i] = number(reader, 8);
    tensor.type = (uint32_t)number(reader, 4);
    *offset = number(reader, 8);
    return tensor;
}

static bool same(const uint8_t *bytes, uint64_t nbytes, const char *text)
{
    return bytes != NULL && nbytes == strlen(text) && memcmp(bytes, text, (size_t)nbytes) == 0;
}

/* Walks over both lists, so that later look-ups cannot meet anything broken. */
static bool walk(struct gguf *gguf, struct reader *reader)
{
    gguf->keys_at = reader->at;
    for (uint32_t i = 0; i < gguf->keys && !reader->broken; i++) {
        take(reader, number(reader, 8));
        read_value(reader, (uint32_t)number(reader, 4));
    }
    gguf->tensors_at = reader->at;
    for (uint32_t i = 0; i < gguf->tensors && !reader->broken; i++) {
        uint64_t offset;
        take(reader, number(reader, 8));
        read_tensor(reader, &offset);
    }
    return !reader->broken;
}

bool gguf_open(struct gguf *gguf, const uint8_t *bytes, size_t nbytes, const char **fault)
{
    struct reader reader = {.bytes = bytes, .nbytes = nbytes};
    const uint8_t *magic = take(&reader, 4);
    uint64_t version = number(&reader, 4), tensors = number(&reader, 8), keys = number(&reader, 8);
    *fault = "is no GGUF file of version 2 or 3";
    if (!same(magic, 4, "GGUF") || version < 2 || version > 3)
        return false;
    *fault = "claims more keys or tensors than any model has";
    if (keys > GGUF_KEYS_LIMIT || tensors > GGUF_TENSORS_LIMIT)
        return false;
    *gguf = (struct gguf){.bytes = bytes, .nbytes = nbytes, .keys = (uint32_t)keys, .tensors = (uint32_t)tensors};
    *fault = "ends within its header, or the header is damaged";
    if (!walk(gguf, &reader))
        return false;
    uint32_t alignment = 32; /* the format's default */
    gguf_number(gguf, "general.alignment", &alignment);
    *fault = "has an alignment that is no power of two";
    if (alignment == 0 || (alignment & (alignment - 1)) != 0 || alignment > 1u << 21)
        return false;
    gguf->data_at = (reader.at + alignment - 1) & ~(size_t)(alignment - 1);
    *fault = "ends before its weights";
    return gguf->data_at <= nbytes;
}

bool gguf_find_key(const struct gguf *gguf, const char *key, struct gguf_value *value)
{
    struct reader reader = {.bytes = gguf->bytes, .nbytes = gguf->nbytes, .at = gguf->keys_at};
    for (uint32_t i = 0; i < gguf->keys; i++) {
        uint64_t nbytes = number(&reader, 8);
        const uint8_t *name = take(&reader, nbytes);
        *value = read_value(&reader, (uint32_t)number(&reader, 4));
        if (same(name, nbytes, key))
            return true;
    }
    return false;
}

bool gguf_find_tensor(const struct gguf *gguf, const char *name, struct gguf_tensor *tensor)
{
    struct reader reader = {.bytes = gguf->bytes, .nbytes = gguf->nbytes, .at = gguf->tensors_at};
    for (uint32_t i = 0; i < gguf->tensors; i++) {
        uint64_t nbytes = number(&reader, 8), offset;
        const uint8_t *found = take(&reader, nbytes);
        *tensor = read_tensor(&reader, &offset);
        if (!same(found, nbytes, name))
            continue;
        if (offset > gguf->nbytes - gguf->data_at)
            return false;
        tensor->data = gguf->bytes + gguf->data_at + offset;
        tensor->room = gguf->nbytes - gguf->data_at - (size_t)offset;
        return true;
    }
    return false;
}

bool gguf_number(const struct gguf *gguf, const char *key, uint32_t *number)
{
    struct gguf_value value;
    if (!gguf_find_key(gguf, key, &value) || value.nbytes > 8)
        return false;
    if (value.type == GGUF_STRING || value.type == GGUF_ARRAY || value.type == GGUF_FLOAT32 ||
        value.type == GGUF_FLOAT64)
        return false;
    uint64_t whole = little(value.bytes, value.nbytes);
    const bool is_signed = value.type == GGUF_INT8 || value.type == GGUF_INT16 || value.type == GGUF_INT32 ||
                           value.type == GGUF_INT64;
    if (whole > UINT32_MAX || (is_signed && whole >> (value.nbytes * 8 - 1) != 0))
        return false;
    *number = (uint32_t)whole;
    return true;
}

bool gguf_float(const struct gguf *gguf, const char *key, float *number)
{
    struct gguf_value value;
    if (!gguf_find_key(gguf, key, &value) || value.type != GGUF_FLOAT32)
        return false;
    uint32_t bits = (uint32_t)little(value.bytes, 4);
    memcpy(number, &bits, 4);
    return true;
}

bool gguf_text(const struct gguf *gguf, const char *key, char *text, size_t room)
{
    struct gguf_value value;
    if (!gguf_find_key(gguf, key, &value) || value.type != GGUF_STRING || value.nbytes >= room)
        return false;
    memcpy(text, value.bytes, value.nbytes);
    text[value.nbytes] = 0;
    return true;
}

bool gguf_flags(const struct gguf *gguf, const char *key, uint8_t *flags, uint32_t count)
{
    struct gguf_value value;
    if (!gguf_find_key(gguf, key, &value) || value.type != GGUF_ARRAY)
        return false;
    if (little(value.bytes, 4) != GGUF_BOOL || little(value.bytes + 4, 8) != count)
        return false;
    for (uint32_t i = 0; i < count; i++)
        flags[i] = value.bytes[4 + 8 + i] != 0; /* behind type and count */
    return true;
}
