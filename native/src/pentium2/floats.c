/* Floating point for files of the layout `pentium2`. On an x87 in single precision: see precision.h. */
#include "floats.h"

#include <math.h>

#include "precision.h"

#define SMALLEST_ABSMAX 1e-5f /* of b1.58's definition */
#define LARGEST 127.0f

const float pentium2_powers[32] = {
    0x1.000000p+0f, 0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f, 0x1.2387a6p+0f,
    0x1.29e9e0p+0f, 0x1.306fe0p+0f, 0x1.371a74p+0f, 0x1.3dea64p+0f, 0x1.44e086p+0f, 0x1.4bfdaep+0f, 0x1.5342b6p+0f,
    0x1.5ab07ep+0f, 0x1.6247ecp+0f, 0x1.6a09e6p+0f, 0x1.71f75ep+0f, 0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace54p+0f,
    0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f, 0x1.ae89fap+0f, 0x1.b7f770p+0f, 0x1.c199bep+0f, 0x1.cb720ep+0f,
    0x1.d5818ep+0f, 0x1.dfc974p+0f, 0x1.ea4afap+0f, 0x1.f50766p+0f,
};

/* 2^(n / 32) * e^r with |r| <= ln 2 / 64: two terms of the series leave 2e-7. */
float pentium2_exponential(float x)
{
    x = x > -80.0f ? x : -80.0f; /* and where it is no number */
    x = x < 80.0f ? x : 80.0f;
    const int32_t n = pentium2_nearest(x * 0x1.715476p+5f);
    const float r = x - (float)n * 0x1.62e430p-6f;
    float value = pentium2_powers[n & 31] * (1.0f + r * (1.0f + r * 0.5f));
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits += (n >> 5) * (1 << 23);
    memcpy(&value, &bits, sizeof bits);
    return value;
}

static void normalise(float *out, const float *x, const float *weight, uint32_t n, float epsilon)
{
    float squares = 0;
    for (uint32_t i = 0; i < n; i++)
        squares += x[i] * x[i];
    const float scale = 1.0f / sqrtf(squares / (float)n + epsilon);
    for (uint32_t i = 0; i < n; i++)
        out[i] = x[i] * scale * weight[i];
}

/* One plane: |x| * factor is at most 127 and a rounding, so the digits need no clamp; of what is no number they are
 * bytes all the same. */
static void quantise(const struct activations *to, uint32_t row, const float *x, uint32_t n)
{
    float absmax = pentium2_absmax(x, n);
    absmax = absmax > SMALLEST_ABSMAX ? absmax : SMALLEST_ABSMAX;
    const float factor = LARGEST / absmax;
    int8_t *digits = to->digits + row * to->stride;
    for (uint32_t i = 0; i < n; i++)
        digits[i] = (int8_t)(uint8_t)pentium2_nearest(x[i] * factor);
    to->scales[row] = absmax / LARGEST;
}

static void add(float *x, const float *y, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        x[i] += y[i];
}

static void gate_silu(float *gate, const float *up, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        gate[i] = gate[i] / (pentium2_exponential(-gate[i]) + 1.0f) * up[i];
}

static void gate_relu2(float *gate, const float *up, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        const float g = gate[i] > 0 ? gate[i] : 0;
        gate[i] = g * g * up[i];
    }
}

static void rotate(float *a, float *b, float cosine, float sine)
{
    const float x = *a, y = *b;
    *a = x * cosine - y * sine;
    *b = y * cosine + x * sine;
}

static void rotate_halves(float *x, uint32_t heads, uint32_t head_dim, const float *cosines, const float *sines)
{
    for (uint32_t head = 0; head < heads; head++, x += head_dim)
        for (uint32_t i = 0; i < head_dim / 2; i++)
            rotate(x + i, x + i + head_dim / 2, cosines[i], sines[i]);
}

static void rotate_pairs(float *x, uint32_t heads, uint32_t head_dim, const float *cosines, const float *sines)
{
    for (uint32_t head = 0; head < heads; head++, x += head_dim)
        for (uint32_t i = 0; i < head_dim / 2; i++)
            rotate(x + 2 * i, x + 2 * i + 1, cosines[i], sines[i]);
}

const struct kernels kernels_pentium2 = {
    .name = "pentium2",
    .normalise = normalise,
    .quantise = quantise,
    .add = add,
    .gate_silu = gate_silu,
    .gate_relu2 = gate_relu2,
    .rotate_halves = rotate_halves,
    .rotate_pairs = rotate_pairs,
};
