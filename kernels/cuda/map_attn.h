/* Attention with trained feature maps on CUDA: what its files share. */
#pragma once
#include "kernels/cuda/cuda.h"

#define MAP_ROW_PAD 128
#define MAP_EPS     1e-6f /* of a denominator without exact weights */

/* Everything a kernel is told; forward and backward leave NULL what they do not use. Features and
 * their gradients are in the workspace, (heads, t, m); features of T. */
struct map_attn {
    const void *q, *k, *v, *o, *d_o, *w;
    void *out, *dq, *dk, *dv;
    void *fq, *fk;    /* T */
    float *dfq, *dfk; /* gradients of features, then of what they are made of: map_attn.cu */
    float *stat;      /* (heads, t) */
    float2 *rows;     /* (heads, row_stride): (stat, d_o.o) of each query */
    int64_t ld, ld_o;
    int t, h, d, m, heads; /* heads: b h */
    int window, row_stride;
    bool t2r;
    float scale; /* 1 / sqrt(d) */
};

/* Element offset of row 0 of a head in an array of leading dimension ld. */
__host__ __device__ __forceinline__ int64_t map_head_at(const struct map_attn *a, int head,
                                                        int64_t ld)
{
    return (int64_t)(head / a->h) * a->t * ld + (int64_t)(head % a->h) * a->d;
}
/* First key that query t attends to exactly. */
__device__ __forceinline__ int map_near(const struct map_attn *a, int t)
{
    return a->window ? max(t / a->window - 1, 0) * a->window : t + 1;
}
/* 1 / denominator; one below e^-80 counts as that. */
__device__ __forceinline__ float map_over(float stat)
{
    return expf(stat < -80.0f ? 80.0f : -stat);
}

/* bf16 on tensor cores: whether there are kernels for these heads, features, windows. */
bool srf__map_mma_takes(const struct srf_ctx *ctx, const struct map_attn *a);
srf_status srf__map_mma_fwd(struct srf_ctx *ctx, const struct map_attn *a);
srf_status srf__map_mma_bwd(struct srf_ctx *ctx, const struct map_attn *a);
/* Plain fp32 arithmetic, either dtype; d <= 128, m <= 256. */
srf_status srf__map_any_fwd(struct srf_ctx *ctx, const struct map_attn *a);
srf_status srf__map_any_bwd(struct srf_ctx *ctx, const struct map_attn *a);
