/* Rotary angles without a library: logarithm, exponential, sine and cosine that give the same bits on every machine. In
 * double, since angles reach a million; each to about 1e-15 of what it is, which is more than floats can show. */
#include "floats.h"
#include "precision.h"

#define LN2 0x1.62e42fefa39efp-1
/* pi / 2 in two parts: the first has 33 bits, so its product with an integer of 20 is exact. */
#define HALF_PI_HIGH 0x1.921fb544p+0
#define HALF_PI_LOW 0x1.0b4611a626331p-34

/* ln x, x >= 1: x = m * 2^k with m near 1, and ln m = 2 artanh((m - 1) / (m + 1)). */
static double logarithm(double x)
{
    double powers = 0;
    for (; x > 1.4142135623730951; x *= 0.5)
        powers++;
    const double t = (x - 1) / (x + 1), square = t * t;
    double sum = 0;
    for (int term = 23; term > 0; term -= 2)
        sum = sum * square + 1.0 / term;
    return 2 * t * sum + powers * LN2;
}

/* e^-x, 0 <= x < 30. */
static double decay(double x)
{
    int halves = (int)(x / LN2 + 0.5);
    const double r = halves * LN2 - x;
    double sum = 1;
    for (int term = 14; term > 0; term--)
        sum = sum * r / term + 1;
    for (; halves > 0; halves--)
        sum *= 0.5;
    return sum;
}

/* Of an angle of 0 to 2^20: reduced to |r| <= pi / 4 beside a multiple of pi / 2. */
static void turn(double angle, float *cosine, float *sine)
{
    const int quarter = (int)(angle * (1 / (HALF_PI_HIGH + HALF_PI_LOW)) + 0.5);
    const double r = angle - quarter * HALF_PI_HIGH - quarter * HALF_PI_LOW, square = r * r;
    double c = 1, s = 1;
    for (int term = 17; term > 1; term -= 2) {
        c = 1 - square / ((term - 1) * (term - 2)) * c;
        s = 1 - square / (term * (term - 1)) * s;
    }
    s *= r;
    *cosine = (float)(quarter % 4 == 0 ? c : quarter % 4 == 1 ? -s : quarter % 4 == 2 ? -c : s);
    *sine = (float)(quarter % 4 == 0 ? s : quarter % 4 == 1 ? c : quarter % 4 == 2 ? -s : -c);
}

/* A call of its own: the compiler might move arithmetic across the change of precision. */
static __attribute__((noinline)) void angles(float *cosines, float *sines, uint32_t half, double base,
                                             const float *divisors, double position)
{
    const double ratio = decay(logarithm(base) / half);
    double frequency = 1;
    for (uint32_t i = 0; i < half; i++, frequency *= ratio)
        turn(position * (divisors != NULL ? frequency / divisors[i] : frequency), cosines + i, sines + i);
}

void pentium2_angles(float *cosines, float *sines, uint32_t half, float base, const float *divisors, uint32_t position)
{
    const uint16_t before = precision_set(PRECISION_DOUBLE);
    angles(cosines, sines, half, base, divisors, position);
    precision_restore(before);
}
