/* What the two kernels of the wide backward share. Names and forms are explained in
 * srf_attn_wide_bwd.cu. */
#pragma once
#include "kernels/cuda/srf_attn_wide_walk.h"

#define NW WIDE_GROUPS

struct wide_bwd {
    const bf16 *q, *k, *v, *o, *d_o, *w;
    const float *bias, *stat;
    bf16 *dq, *dk, *dv;
    float *delta;   /* (b h, t) */
    float *tops;    /* (b h, chunks, 64 NW): M after each chunk */
    uint64_t *cuts; /* (b h, chunks): bit i: a piece of the chunk starts at its token i */
    uint8_t *sizes; /* (b h, chunks): of pieces */
    float *sum[3];  /* (b h, t, d) of dq, dk, dv over the features before these; or NULL */
    int64_t ld, ld_o;
    int t, h, m, n_sets;
    int first, count; /* features [first, first + count) */
    float scale;
    uint32_t limit;
};

/* dk, dv, when the queries are done with. */
srf_status srf__wide_keys(struct srf_ctx *ctx, const struct wide_bwd *p, unsigned heads);

#if HAVE_WGMMA
/* own and what the other warpgroups sent, in the order of merge_columns. */
__device__ __forceinline__ void sum_columns(float (&own)[8], uint32_t from, uint32_t stride, int wg)
{
    const float once[2] = {1.0f, 1.0f};
#pragma unroll
    for (int d = 1; d < NW; d++) merge_columns(own, from, stride, wg, d, once);
}
/* bias of this thread's features to its row of shared memory. */
__device__ __forceinline__ void put_bias(const struct wide_bwd &p, const struct wide_thread &at,
                                         uint32_t bias_row)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int64_t set = p.n_sets == 1 ? 0 : blockIdx.x % p.h;
        const int f = 64 * at.wg + at.row + 8 * i;
        const float *bias = p.bias + set * p.m + p.first + f;
        if (at.pair == 0)
            store_f32(bias_row + 4 * (at.row + 8 * i),
                      f < p.count ? SRF__LOG2E * *bias : -INFINITY);
    }
}
/* First elements of the head in inputs and outputs, its first token: to shared memory. */
__device__ __forceinline__ void put_place(const struct wide_bwd &p, uint32_t place)
{
    const int64_t seq = blockIdx.x / p.h, head = blockIdx.x % p.h;
    store_i64(place, seq * p.t * p.ld + head * D);
    store_i64(place + 8, seq * p.t * p.ld_o + head * D);
    store_i64(place + 16, (int64_t)blockIdx.x * p.t);
}
/* 16 columns of a gradient, of this chunk: with the sums over features before these, out as bf16
 * or, if more features follow, as sums again. */
__device__ __forceinline__ void finish_columns(const struct wide_bwd &p, uint32_t place,
                                               float (&c)[8], float *sums, bf16 *dst, int chunk,
                                               int lo, int hi)
{
    const struct wide_thread at = wide_here();
    const bool in0 = at.row >= lo && at.row < hi, in1 = at.row + 8 >= lo && at.row + 8 < hi;
    const int token = chunk * CHUNK + at.row;
    const float once[2] = {1.0f, 1.0f};
    float *sum = sums + (load_i64(place + 16) + token) * D + 16 * at.wg + 2 * at.pair;
    if (p.first > 0) merge_before(c, sum, once, in0, in1);
    if (p.first + p.count < p.m)
        store_sums(sum, c, in0, in1);
    else
        store_columns(dst + load_i64(place) + (int64_t)token * p.ld + 16 * at.wg, p.ld, c, in0, in1,
                      at.pair);
}
/* The same of all 64 columns, of a warpgroup that has them. */
__device__ __forceinline__ void finish_rows(const struct wide_bwd &p, uint32_t place,
                                            float (&c)[32], float *sums, bf16 *dst, int chunk,
                                            int lo, int hi)
{
    const struct wide_thread at = wide_here();
    const bool in0 = at.row >= lo && at.row < hi, in1 = at.row + 8 >= lo && at.row + 8 < hi;
    const int token = chunk * CHUNK + at.row;
    const float once[2] = {1.0f, 1.0f};
#pragma unroll
    for (int k = 0; k < 4; k++) {
        float(&part)[8] = *(float(*)[8]) & c[8 * k];
        float *sum = sums + (load_i64(place + 16) + token) * D + 16 * k + 2 * at.pair;
        if (p.first > 0) merge_before(part, sum, once, in0, in1);
        if (p.first + p.count < p.m)
            store_sums(sum, part, in0, in1);
        else
            store_columns(dst + load_i64(place) + (int64_t)token * p.ld + 16 * k, p.ld, part, in0,
                          in1, at.pair);
    }
}
#endif
