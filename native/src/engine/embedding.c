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

void model_embed(const ternary_model *model, uint32_t token, float *row)
{
    const uint8_t *bytes = model->embedding + token * model->embedding_row_bytes;
    const uint32_t n = model->shape.n_embd;
    if (model->codes.data != NULL) {
        lookup_row(&model->codes, token, row);
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
