/* Inside the library: the arithmetic of op `sample`, to the same bits on the host and the device.
 *
 * A token's weight is e^((l - max) / temperature) as a whole number of 2^-40ths. Sums of whole
 * numbers are exact in any order, so the token that is drawn depends neither on how the work was
 * shared out nor on the device. A weight is right to a few 1e-6 of itself or to 2^-40, which is
 * less than what is known of the logits. Sums of 2^23 weights fit. */
#pragma once
#include "kernels/ops.h"
#include "kernels/philox.h"

#include <math.h>

/* Whole numbers in the order of the logits; -0 is 0. And back. */
SRF__BOTH uint32_t srf__sample_key(float x)
{
    union {
        float f;
        uint32_t i;
    } u;
    u.f = x == 0.0f ? 0.0f : x;
    return u.i & 0x80000000u ? ~u.i : u.i | 0x80000000u;
}

SRF__BOTH float srf__sample_logit(uint32_t key)
{
    union {
        uint32_t i;
        float f;
    } u;
    u.i = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    return u.f;
}

/* log2(e) / temperature: finite, so that the weight of the largest logit is one. */
SRF__BOTH float srf__sample_factor(double temperature)
{
    double by = 1.4426950408889634 / temperature;
    return (float)(by < 1e30 ? by : 1e30);
}

/* l <= max; l may be -infinity. Every operation is rounded once, by an explicit fma where compilers
 * could fuse or not. */
SRF__BOTH uint64_t srf__sample_weight(float l, float max, float factor)
{
    float x = fmaf(l - max, factor, 0.0f);
    if (!(x > -40.0f)) return 0;
    float n = rintf(x), f = x - n, p = 1.535336188319500e-4f; /* 2^f, |f| <= 1/2 */
    p = fmaf(p, f, 1.339887440266574e-3f);
    p = fmaf(p, f, 9.618437357674640e-3f);
    p = fmaf(p, f, 5.550332471162809e-2f);
    p = fmaf(p, f, 2.402264791363012e-1f);
    p = fmaf(p, f, 6.931472028550421e-1f);
    p = fmaf(p, f, 1.0f);
    uint64_t whole = (uint32_t)(p * 16777216.0f); /* exact: p has 24 bits, from 1/2 up */
    return whole << 16 >> (int)-n;                /* n <= 0 */
}

/* The place in [0, sum) that a uniform number of (0, 1) stands for; sum > 0. */
SRF__BOTH uint64_t srf__sample_place(double u, uint64_t sum)
{
    uint64_t place = (uint64_t)(u * (double)sum);
    return place < sum ? place : sum - 1;
}

/* The sum that top-p asks for, of 1 at least. */
SRF__BOTH uint64_t srf__sample_reach(double top_p, uint64_t sum)
{
    uint64_t reach = (uint64_t)ceil(top_p * (double)sum);
    reach = reach < sum ? reach : sum;
    return reach > 0 ? reach : 1;
}

/* Keys are sorted into so many bins at a time to find one among them. */
#define SRF__SAMPLE_BINS 2048
/* Keys lo .. hi in bins of 2^shift. */
SRF__BOTH int srf__sample_shift(uint32_t lo, uint32_t hi)
{
    int shift = 0;
    while ((hi - lo) >> shift >= SRF__SAMPLE_BINS) shift++;
    return shift;
}

#ifdef __cplusplus
extern "C" {
#endif
/* SRF_INVALID for what the op does not take. */
srf_status srf__sample_check(const struct srf_sample_args *a);
/* On the host: the op's token for one row of logits (a->v of them) and stream. */
int32_t srf__sample_row(const struct srf_sample_args *a, const float *logits,
                        const uint64_t stream[3]);
#ifdef __cplusplus
}
#endif
