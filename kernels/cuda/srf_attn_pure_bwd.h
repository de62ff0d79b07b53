/* What the kernels of the backward of pure SRF attention share. Names and forms are explained in
 * srf_attn_pure_bwd.cu.
 */
#pragma once
#include "kernels/cuda/srf_attn_pure.h"

struct bwd_params {
    const bf16 *q, *k, *v, *o, *d_o, *w;
    const float *bias, *stat;
    bf16 *dq, *dk, *dv;
    float *delta;      /* (b h, t) */
    float *tops;       /* (b h, chunks, 64 NF): M after each chunk */
    uint64_t *cuts;    /* (b h, chunks): bit i: a piece of the chunk starts at its token i */
    float *states, *r; /* segments' states, S and R; NULL: one segment */
    bool carried;      /* records are of the forward */
    float *dw; /* (b h, n_seg, 64 NF, d): each block's sum of da x, d^(1/4) too large; or NULL */
    float *sum[3]; /* (b h, t, d) of dq, dk, dv over the features before these; or NULL */
    int64_t ld, ld_o;
    int t, h, m, n_sets;
    int first, count;
    int n_seg, seg_chunks;
    float scale;
    uint32_t limit;
    /* Of srf_attn_pure_wgmma_grads.cu alone. */
    char *records; /* (b h, chunks, RECORD): S, z, M before each chunk */
    float *adds;   /* (b h, n_piece, 64 66): what a piece's queries add to R, u; in which scale */
    float *deltas; /* (b h, chunks, 64): delta; or NULL */
    float *seg_r;  /* (b h, n_seg, 64 65): R, u after it */
    unsigned *tickets; /* blocks that have begun; then (b h, head_units): R, u are there */
    int head_units, unit_chunks, n_tickets; /* of a head; of the last segment; flags and one more */
    int walk_chunks;                        /* M goes on within as many */
    /* Pieces, even ones of each segment: of a head from its second segment on; of a segment, of
     * the last one, of the first. */
    int n_piece, seg_pieces, last_pieces, lead_pieces;
};

/* For heads of d: dq, delta, M and where chunks are cut; with them known, dk, dv. */
srf_status srf__pure_bwd_queries(struct srf_ctx *ctx, const struct bwd_params *p, int64_t heads,
                                 int64_t d);
srf_status srf__pure_bwd_keys(struct srf_ctx *ctx, const struct bwd_params *p, int64_t heads,
                              int64_t d);

#ifdef __CUDACC__
/* Where a block is: sequence, head, feature set, first elements of its inputs and outputs. */
struct place {
    int64_t head_i, in, out, set;
    int seg;
};
__device__ __forceinline__ struct place place_of(const struct bwd_params &p, int64_t head_i,
                                                 int seg, int d)
{
    const int64_t seq = head_i / p.h, head = head_i % p.h;
    struct place at;
    at.head_i = head_i;
    at.in = seq * p.t * p.ld + head * d;
    at.out = seq * p.t * p.ld_o + head * d;
    at.set = p.n_sets == 1 ? 0 : head;
    at.seg = seg;
    return at;
}

/* The gradient of this warp's rows in [lo, hi): with the sums over features before these, out as
 * bf16 or, if more features follow, as sums again. x: first element of the chunk's row 0. */
template <int D>
__device__ __forceinline__ void finish_rows(const struct bwd_params &p, float (&c)[D / 8][4],
                                            float *sums, int64_t token, bf16 *dst, uint32_t tile,
                                            int rg, int lo, int hi, int lane)
{
    const int row = 16 * rg + (lane >> 2);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int at = row + 8 * i;
        if (at < lo || at >= hi) continue;
        float2 *sum = (float2 *)(sums + (token + at) * D) + (lane & 3);
        if (p.first > 0) {
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                float2 before = sum[4 * j];
                c[j][2 * i] += before.x;
                c[j][2 * i + 1] += before.y;
            }
        }
        if (p.first + p.count < p.m) {
#pragma unroll
            for (int j = 0; j < D / 8; j++) sum[4 * j] = make_float2(c[j][2 * i], c[j][2 * i + 1]);
        }
    }
    if (p.first + p.count == p.m) store_rows<D>(dst, p.ld, c, tile, rg, lo, hi, lane);
}

/* Partial sums of 64 tokens to shared memory and back into the same lanes of another four warps. */
template <int D> __device__ __forceinline__ void send_rows(float2 *to, const float (&c)[D / 8][4])
{
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
        to[2 * j * 128] = make_float2(c[j][0], c[j][1]);
        to[(2 * j + 1) * 128] = make_float2(c[j][2], c[j][3]);
    }
}
template <int D> __device__ __forceinline__ void add_sent(float (&c)[D / 8][4], const float2 *from)
{
#pragma unroll
    for (int j = 0; j < D / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float2 x = from[(2 * j + i) * 128];
            c[j][2 * i] += x.x;
            c[j][2 * i + 1] += x.y;
        }
}

/* This warp's 16 features of dW += da^T x over the chunk, in global memory between chunks: frozen
 * features, which need no registers for it, are the rule. da (tokens, 64 features) and x are tiles;
 * all warps have met. */
template <int D>
__device__ __forceinline__ void add_dw(float *dw, uint32_t da_tile, uint32_t x_tile, uint32_t limit,
                                       int rg, int lane, bool first)
{
    float c[D / 8][4];
    float2 *to = (float2 *)(dw + (16 * rg + (lane >> 2)) * D) + (lane & 3);
#pragma unroll
    for (int j = 0; j < D / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float2 x = first ? make_float2(0.0f, 0.0f) : to[4 * j + 4 * i * D];
            c[j][2 * i] = x.x;
            c[j][2 * i + 1] = x.y;
        }
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
        uint32_t a[4];
        const int token = 16 * kk + (lane & 7) + ((lane >> 4) << 3);
        ldmatrix_x4_trans(a, da_tile + tile_at<64>(token, 2 * rg + ((lane >> 3) & 1)));
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            uint32_t b[4];
            load_bt<D>(b, x_tile, kk, 16 * j, lane);
#pragma unroll
            for (int i = 0; i < 4; i++) b[i] = clamp_bf16(b[i], limit);
            mma_bf16(c[2 * j], a, b[0], b[1]);
            mma_bf16(c[2 * j + 1], a, b[2], b[3]);
        }
    }
#pragma unroll
    for (int j = 0; j < D / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            to[4 * j + 4 * i * D] = make_float2(c[j][2 * i], c[j][2 * i + 1]);
}
/* da of this warp's tokens, packed as A, to a (tokens, 64 features) tile. */
__device__ __forceinline__ void store_da(uint32_t tile, const uint32_t (&da)[4][4], int rg,
                                         int lane)
{
    const uint32_t to = tile + tile_at<64>(16 * rg + (lane >> 2), 0) + 4 * (lane & 3);
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            store_shared(tile_on<64>(to, j) + i * 16 * 64, da[j >> 1][(j & 1) * 2 + i]);
}

/* Blocks of a multiprocessor that shared memory and registers allow. */
template <int D, int NF> constexpr int bwd_blocks_per_sm()
{
    return NF == 1 && D <= 64 ? 3 : NF == 1 && D <= 96 ? 2 : 1;
}
#define FOR_HEAD_SIZE(d, op, ...)                                                                  \
    switch (d) {                                                                                   \
    case 32:                                                                                       \
        return op<32>(__VA_ARGS__);                                                                \
    case 64:                                                                                       \
        return op<64>(__VA_ARGS__);                                                                \
    case 80:                                                                                       \
        return op<80>(__VA_ARGS__);                                                                \
    case 96:                                                                                       \
        return op<96>(__VA_ARGS__);                                                                \
    default:                                                                                       \
        return op<128>(__VA_ARGS__);                                                               \
    }
#endif
