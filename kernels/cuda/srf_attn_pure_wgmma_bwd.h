/* What the kernels of the backward with warpgroup products share (srf_attn_pure_wgmma_bwd.cu). */
#pragma once
#include "kernels/cuda/srf_attn_pure_wgmma.h"

struct bwd_maps {
    CUtensorMap q, k, v, d_o, o;
    CUtensorMap dq, dk, dv; /* a warp's rows at once */
};

/* 128 aligned bytes of the workspace that are written again before anybody reads them: what L2 has
 * of them need not go to memory. Whoever has read them has met with this thread since. */
__device__ __forceinline__ void discard_line(const void *p)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("discard.global.L2 [%0], 128;" ::"l"(p) : "memory");
#endif
}

#if HAVE_WGMMA
/* W and the bias of a head to shared memory; a barrier follows. */
__device__ __forceinline__ void load_features(const struct bwd_params &p, int64_t set, uint32_t w,
                                              float *bias, int tid)
{
    load_tile<64, 128>(w, p.w + set * p.m * 64, 64, 64, p.m, tid);
    cp_async_commit();
    if (tid < 64) bias[tid] = tid < p.m ? SRF__LOG2E * p.bias[set * p.m + tid] : -INFINITY;
    cp_async_wait<0>();
    async_fence();
}
__device__ __forceinline__ void init_barriers(uint32_t bar, int n)
{
    for (int i = 0; i < n; i++) barrier_init(bar + 8 * i, 1);
    barrier_init_done();
}
/* Values of a tile that are too large are clamped in place. */
__device__ __forceinline__ void clamp_large(uint32_t tile, uint32_t limit, int tid)
{
    uint32_t x[4][4], most = 0;
    const uint32_t at = tile + tid * 16;
#pragma unroll
    for (int i = 0; i < 4; i++) load_shared_words(x[i], at + 2048 * i);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) most = larger_of_halves(most, x[i][j] & 0x7fff7fffu);
    /* Magnitudes of bf16 are ordered as their bits; NaN is above all. */
    if ((most & 0xffffu) <= (limit & 0xffffu) && most >> 16 <= limit >> 16) return;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) store_shared(at + 2048 * i + 4 * j, clamp_bf16(x[i][j], limit));
}
/* -dO.o of this thread's two rows; o is what it has of them. */
__device__ __forceinline__ void row_deltas(float delta[2], const uint4 (&o)[2][2], uint32_t do_tile,
                                           int row, int pair)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        delta[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const uint32_t with[4] = {o[i][j].x, o[i][j].y, o[i][j].z, o[i][j].w};
            uint32_t y[4];
            load_shared_words(y, do_tile + tile_at<64>(row + 8 * i, pair + 4 * j));
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float2 f = unpack_bf16(y[e]), h = unpack_bf16(with[e]);
                delta[i] -= f.x * h.x + f.y * h.y;
            }
        }
        delta[i] = quad_sum(delta[i]);
    }
}
/* This thread's pieces pair, pair + 4 of o's rows `row`, row + 8 from a chunk's row 0; 0 if out. */
__device__ __forceinline__ void load_o(uint4 (&o)[2][2], const bf16 *from, int64_t ld, int row,
                                       int pair, bool in0, bool in1)
{
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            o[i][j] = make_uint4(0, 0, 0, 0);
            if (i ? in1 : in0)
                o[i][j] = __ldcs((const uint4 *)(from + (row + 8 * i) * ld + 8 * pair + 32 * j));
        }
}
#endif

/* S, z, M before each chunk; tickets become 0. */
srf_status srf__pure_wgmma_entries(struct srf_ctx *ctx, const struct bwd_params *p,
                                   const struct bwd_maps *m, int64_t heads);
/* With segments: what the queries of each add to R, u; with M then known, R, u after each. */
srf_status srf__pure_wgmma_adds(struct srf_ctx *ctx, const struct bwd_params *p,
                                const struct bwd_maps *m, int64_t heads);
srf_status srf__pure_wgmma_suffix(struct srf_ctx *ctx, const struct bwd_params *p, int64_t heads);
/* dq, dk, dv. */
srf_status srf__pure_wgmma_grads(struct srf_ctx *ctx, const struct bwd_params *p,
                                 const struct bwd_maps *m, int64_t heads);

/* A chain (chain.h). Of the op's kernels the first lets no other begin before all that came before
 * the op is complete, so that the others may read inputs before they wait. */
typedef void kernel(const struct bwd_params, const struct bwd_maps);

static inline srf_status launch(struct srf_ctx *ctx, kernel *f, int64_t blocks, int threads,
                                int bytes, const struct bwd_params *p, const struct bwd_maps *m)
{
    CUDA_TRY(cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, 1024 + bytes));
    struct chain_shape shape = {dim3((unsigned)blocks), threads, (size_t)(1024 + bytes), 1};
    chain_launch(ctx, shape, f, *p, *m);
    return srf__cuda_launched("srf_attn_bwd");
}
