/* What the kernels of the window hybrid with warpgroup products share. What they do is told in
 * srf_attn_hybrid_wgmma.cu. */
#pragma once
#include "kernels/cuda/srf_attn_hybrid_wgmma.h"
#include "kernels/cuda/srf_attn_pure_wgmma_bwd.h"

struct hybrid_maps {
    CUtensorMap q, k, v, d_o;
    struct key_scales by;
};

#if HAVE_WGMMA
/* A block's keys go into the state: a = W K^T on entry. S is in flight then: warpgroup_wait, then
 * wgmma_hold; x holds what it reads. */
__device__ __forceinline__ void take_keys(struct pure_state<64> *st, uint32_t (&x)[4][4],
                                          float (&a)[8][4], const float *half, uint32_t v_tile,
                                          const float bias[2], float to_log2, int lane)
{
    struct chunk_keys keys;
    float sum[4];
    key_exponents(a, half, to_log2, lane & 3);
    key_tops(&keys, st->top, a, bias);
    chunk_weights(x, &keys, a);
    if (keys_rise(&keys)) scale_state(st, &keys);
    begin_mix(st->s, x, v_tile, true);
    add_ones(sum, x, false, lane);
    st->z[0] += sum[0];
    st->z[1] += sum[2];
}
/* A place in shared memory by its address. */
__device__ __forceinline__ float *floats_at(uint32_t addr)
{
    return (float *)__cvta_shared_to_generic(addr);
}
__device__ __forceinline__ float bias_of(const struct hybrid &p, int64_t set, int f)
{
    return f < p.m ? SRF__LOG2E * p.bias[set * p.bias_step + f] : -INFINITY;
}
#endif

typedef void walk(const struct hybrid, const struct hybrid_maps);

/* chained: srf__state_sums has begun a chain. */
static inline srf_status launch_walk(struct srf_ctx *ctx, walk *kernel, int64_t heads, int bytes,
                                     const struct hybrid *p, const struct hybrid_maps *m,
                                     bool chained)
{
    struct chain_shape shape = {dim3((unsigned)(heads * p->n_seg)), 128, (size_t)(1024 + bytes), 1};
    CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  (int)shape.bytes));
    if (chained)
        chain_launch(ctx, shape, kernel, *p, *m);
    else
        kernel<<<shape.grid, shape.threads, shape.bytes, stream_of(ctx)>>>(*p, *m);
    return srf__cuda_launched("srf_attn");
}

static inline srf_status maps_of(struct hybrid_maps *m, const struct srf_attn_shape *s,
                                 const void *q, const void *k, const void *v, int64_t ld,
                                 const struct hybrid *p)
{
    const uint32_t limit = __bfloat16_as_ushort(__float2bfloat16_rn(p->limit));
    m->by = key_scales_of(p->scale, limit << 16 | limit);
    SRF_TRY(srf__tile_map(&m->q, q, s->b, s->t, s->h, ld, CHUNK));
    SRF_TRY(srf__tile_map(&m->k, k, s->b, s->t, s->h, ld, CHUNK));
    return srf__tile_map(&m->v, v, s->b, s->t, s->h, ld, CHUNK);
}
