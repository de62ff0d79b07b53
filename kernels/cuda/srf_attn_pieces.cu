/* The look-back over pieces of sequences: its memory. */
#include "kernels/cuda/srf_attn_pieces.h"

static __global__ void reset_kernel(int *ready, int64_t n)
{
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    chain_next();
    if (i < n) ready[i] = 0;
}

void srf__pieces_carve(struct cuda_bump *bump, int64_t heads, int64_t n, int64_t d,
                       struct pieces *p)
{
    p->heads = (int)heads;
    p->n = (int)n;
    p->group = PIECE_GROUP;
    p->ready = (int *)bump_bytes(bump, (size_t)(heads * n * 4 + 1) * sizeof(int));
    p->sums = (float4 *)bump_bytes(bump, (size_t)(heads * n * (d / 8 + 1) * 128) * sizeof(float4));
}

srf_status srf__pieces_reset(struct srf_ctx *ctx, const struct pieces *p)
{
    const int64_t n = (int64_t)p->heads * p->n * 4 + 1;
    reset_kernel<<<(unsigned)div_up(n, 256), 256, 0, stream_of(ctx)>>>(p->ready, n);
    return srf__cuda_launched("srf_attn_fwd");
}
