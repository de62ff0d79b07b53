/* What the forward of pure SRF attention (srf_attn_pure_wgmma.cu) and its prefill
 * (srf_attn_prefill.cu) do with queries: weights relative to one number for all tokens of a chunk,
 * the level, and what is done where that would not do. */
#pragma once
#include "kernels/cuda/srf_attn_pure_wgmma.h"

#if HAVE_WGMMA
static __device__ __forceinline__ float quad_max_nan(float x)
{
    x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return max_nan(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
static __device__ __forceinline__ void query_shifts(float2 shift[8], const float *top, int pair)
{
#pragma unroll
    for (int j = 0; j < 8; j++) shift[j] = *(const float2 *)(top + 8 * j + 2 * pair);
}
/* a = exponents of this warp's queries, products with features before; r, their maxima. */
static __device__ __forceinline__ void query_tops(float r[2], float (&a)[8][4],
                                                  const float2 shift[8], float to_log2)
{
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            a[j][e] = fmaf(a[j][e], to_log2, e & 1 ? shift[j].y : shift[j].x);
            r[e >> 1] = j == 0 && e % 2 == 0 ? a[j][e] : max_nan(r[e >> 1], a[j][e]);
        }
    r[0] = quad_max_nan(r[0]);
    r[1] = quad_max_nan(r[1]);
}
/* What queries' exponents are taken relative to: M of some feature a chunk before, and some more,
 * since weights had better be small than large beside huge values. */
static __device__ __forceinline__ float level_of(float top)
{
    return fabsf(top) < 1024 ? top + 24 : 0;
}
/* The largest weights of this warp's queries are neither small nor large: they need not be 1, and
 * to find their exponents first would take as many instructions as the weights. No NaN. */
static __device__ __forceinline__ bool on_level(const uint32_t x[4][4])
{
    const uint32_t least = (127 - 40) << 7, most = (127 + 4) << 7; /* bf16, positive */
    uint32_t high[2], seen = 0x11111111;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        high[i] = x[0][i];
#pragma unroll
        for (int j = 1; j < 8; j++) high[i] = larger_of_halves(high[i], x[j >> 1][(j & 1) * 2 + i]);
        high[i] = max(high[i] & 0xffff, high[i] >> 16);
        uint32_t good = __ballot_sync(0xffffffffu, high[i] >= least);
        good |= good >> 1;
        seen &= good | good >> 2;
    }
    return seen == 0x11111111 && !__any_sync(0xffffffffu, max(high[0], high[1]) > most);
}
/* Their weights, relative to r. a: exponents. */
static __device__ __forceinline__ void query_weights(uint32_t x[4][4], const float (&a)[8][4],
                                                     const float r[2])
{
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            x[j >> 1][(j & 1) * 2 + i] =
                pack_bf16(exp2_fast(a[j][2 * i] - r[i]), exp2_fast(a[j][2 * i + 1] - r[i]));
}
/* The same relative to the level; a: products with features. */
static __device__ __forceinline__ void level_weights(uint32_t x[4][4], const float (&a)[8][4],
                                                     const float2 shift[8], float to_log2)
{
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            x[j >> 1][(j & 1) * 2 + i] =
                pack_bf16(exp2_fast(fmaf(a[j][2 * i], to_log2, shift[j].x)),
                          exp2_fast(fmaf(a[j][2 * i + 1], to_log2, shift[j].y)));
}
/* What warp `warp` keeps of the weights that its 16 tokens give a chunk's keys: those not behind
 * them. */
template <int warp>
static __device__ __forceinline__ void causal(uint32_t x[4][4], const float (&a)[8][4],
                                              uint32_t diagonal)
{
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int at = 2 * warp + i;
            const uint32_t y = j <= at ? pack_bf16(a[j][2 * i], a[j][2 * i + 1]) : 0;
            x[j >> 1][(j & 1) * 2 + i] = j == at ? y & diagonal : y;
        }
}
#endif
