/* Token ids to rows: the types of GGUF that embeddings are stored in. */
#include <string.h>

#include "base/gguf.h"
#include "base/half.h"
#include "model.h"
#include "pentium2/lookup.h"

/* Blocks of 32 int8 behind an f16 scale. */
static void from_q8_0(const uint8_t *blocks, uint32_t n, float *row)
{
    for (uint32_t i = 0; i < n; i += 32, blocks += 34) {
        uint16_t bits;
        memcpy(&bits, blocks, sizeof bits);
        const float scale = half_to_float(bits);
        for (uint32_t j = 0; j < 32; j++)
            row[i + j] = (float)(int8_t)blocks[2 + j] * scale;
    }
}

/* A row of a matrix in a layout of trits. Byte 4 r + c of a vector has row r of each block and column c of the quad. */
static void from_codes(const struct matrix *codes, uint32_t token, float *row)
{
    static const uint8_t lifts[] = {1, 3, 9, 27, 81}; /* a digit of base 3 over the byte's top */
    const uint32_t group_rows = layout_facts[codes->layout].group_rows, group = token / group_rows;
    const uint32_t within = token % group_rows, block = within / BLOCK_ROWS;
    const uint8_t *quads = codes->data + (size_t)group * codes->quads * 64 + within % BLOCK_ROWS * 4;
    const uint16_t *scales = NULL;
    float scale = codes->scales != NULL ? codes->scales[token / codes->scale_rows] : 0;
    if (codes->span_scales != NULL)
        scales = codes->span_scales + (size_t)group * codes->spans * group_rows + within;
    for (uint32_t i = 0; i < codes->cols; i++) {
        const uint32_t byte = quads[(size_t)(i / 4) * 64 + i % 4];
        const uint32_t code =
            codes->layout == LAYOUT_TRIT2 ? byte >> 2 * block & 3 : (byte * lifts[block] & 255) * 3 >> 8;
        if (scales != NULL && i % (codes->span_quads * 4) == 0)
            scale = half_to_float(scales[(size_t)(i / (codes->span_quads * 4)) * group_rows]);
        row[i] = (float)((int)code - 1) * scale;
    }
}

void model_embed(const ternary_model *model, uint32_t token, float *row)
{
    const uint8_t *bytes = model->embedding + token * model->embedding_row_bytes;
    const uint32_t n = model->shape.n_embd;
    if (model->codes.data != NULL) {
        (model->codes.layout == LAYOUT_PENTIUM2 ? lookup_row : from_codes)(&model->codes, token, row);
        return;
    }
    if (model->embedding_type == GGUF_TENSOR_F32) {
        memcpy(row, bytes, n * sizeof *row);
    } else if (model->embedding_type == GGUF_TENSOR_Q8_0) {
        from_q8_0(bytes, n, row);
    } else {
        const int is_half = model->embedding_type == GGUF_TENSOR_F16;
        for (uint32_t i = 0; i < n; i++) {
            uint16_t bits;
            memcpy(&bits, bytes + i * sizeof bits, sizeof bits);
            row[i] = is_half ? half_to_float(bits) : bfloat_to_float(bits);
        }
    }
}
