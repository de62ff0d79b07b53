/* Softmax attention on CUDA: what its files share. */
#pragma once
#include "kernels/cuda/cuda.h"

#define ROW_PAD 128

/* Everything a kernel is told; forward and backward leave NULL what they do not use. */
struct attn {
    const void *q, *k, *v, *o, *d_o;
    void *out, *dq, *dk, *dv;
    float *lse;   /* (heads, t) */
    float2 *rows; /* (heads, row_stride): what backward's kernels want of each query, see there */
    int64_t ld, ld_o;
    int t, h, d, heads; /* heads: b h */
    int row_stride;     /* t to the next multiple of ROW_PAD */
    float scale;        /* 1 / sqrt(d) */
    /* Query t sees keys after t - window and before `sinks`; without a window all, if causal up to
     * its own: window is INT32_MAX, sinks 0. */
    int window, sinks;
};

/* Whether causal query t sees key s <= t. */
__device__ __forceinline__ bool in_window(const struct attn *a, int t, int s)
{
    return t - s < a->window || s < a->sinks;
}
/* Tiles of n columns that queries from t0 on want: those of the sinks, and from the returned
 * column, a multiple of n, on. 0: all. */
__device__ __forceinline__ int window_from(const struct attn *a, int t0, int n)
{
    int from = t0 - a->window + 1;
    return from > a->sinks ? from / n * n : 0;
}
/* The tile of keys after that at s0, of n. */
__device__ __forceinline__ int next_tile(const struct attn *a, int from, int s0, int n)
{
    s0 += n;
    return s0 >= a->sinks && s0 < from ? from : s0;
}
/* End of the queries that see any of `rows` keys from s0 on. */
__device__ __forceinline__ int window_end(const struct attn *a, int s0, int rows)
{
    if (s0 < a->sinks || a->window > a->t - s0 - rows) return a->t;
    return s0 + rows + a->window - 1;
}
/* Masked scores of a window: -inf would make NaN of a row that has seen nothing yet. Its weights of
 * such a tile are wiped when it sees its first key, and each sees itself. */
#define UNSEEN -3e38f

/* Element offset of row 0 of a head in an array of leading dimension ld. */
__host__ __device__ __forceinline__ int64_t head_at(const struct attn *a, int head, int64_t ld)
{
    return (int64_t)(head / a->h) * a->t * ld + (int64_t)(head % a->h) * a->d;
}
/* Which tile of which head a block takes. Heads go in groups, so that what the blocks of a head
 * share stays in the L2 cache; in a group tiles come in the order of their number, or backwards:
 * the most work first. */
#define HEAD_GROUP 32
__device__ __forceinline__ void block_of(const struct attn *a, int tiles, bool backwards, int *tile,
                                         int *head)
{
    int group = (int)blockIdx.x / (HEAD_GROUP * tiles), first = group * HEAD_GROUP;
    int rest = (int)blockIdx.x - first * tiles;
    int n = a->heads - first < HEAD_GROUP ? a->heads - first : HEAD_GROUP;
    *tile = backwards ? tiles - 1 - rest / n : rest / n;
    *head = first + rest % n;
}

/* bf16 on tensor cores: whether there is a kernel for this head size. */
static inline bool attn_mma_takes(int64_t d)
{
    return d == 32 || d == 64 || d == 80 || d == 96 || d == 128;
}
srf_status srf__attn_mma_fwd(struct srf_ctx *ctx, const struct attn *a, bool causal);
srf_status srf__attn_mma_bwd(struct srf_ctx *ctx, const struct attn *a, bool causal);
/* bf16, head size 64, on Hopper: whether the device and this build have it. */
bool srf__attn_wgmma_takes(const struct srf_ctx *ctx, int64_t d);
srf_status srf__attn_wgmma_fwd(struct srf_ctx *ctx, const struct attn *a, bool causal);
srf_status srf__attn_wgmma_bwd(struct srf_ctx *ctx, const struct attn *a, bool causal);
/* Any head size up to 512, either dtype, fp32 arithmetic. */
srf_status srf__attn_any_fwd(struct srf_ctx *ctx, const struct attn *a, bool causal);
srf_status srf__attn_any_bwd(struct srf_ctx *ctx, const struct attn *a, bool causal);
