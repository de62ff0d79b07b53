/* Pure SRF attention with warpgroup products, backward. The method is told in srf_attn_pure_bwd.cu,
 * what is different here in srf_attn_pure_wgmma.h.
 *
 * Tiles are asked for again as soon as the block has read them. Those that feed the first products
 * of a chunk (K and Q, or Q and V) have one place, the others two. What a segment's queries add to
 * R (psi^T dO, which the keys of the segments before it need) is summed by the kernel of dq, in
 * shared memory and in the scale of M before the segment: q and dO are not read once more for it.
 *
 * Floor: as there.
 */
#include "kernels/cuda/srf_attn_pure_wgmma_bwd.h"

/* What each segment's queries add to R, u becomes R, u after the segment: of all later queries, in
 * the scale of M at its end. Their own is that of M before theirs, as `states` has it. One thread a
 * feature and column of R or u. */
static __global__ void suffix_kernel(float *r, const float *states, const float *tops, int64_t n,
                                     int n_seg, int seg_chunks, int n_chunks)
{
    constexpr int ahead = 8; /* segments whose loads are on their way at once */
    constexpr int count = 64 * 65, state_count = 64 * (64 + 3);
    chain_next();
    chain_wait();
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int j = (int)(i % count), f = j < 64 * 64 ? j / 64 : j - 64 * 64;
    const float *top = tops + i / count * n_chunks * 64 + f;
    const float *start = states + i / count * n_seg * state_count + 64 * (64 + 2) + f;
    float *at = r + i / count * n_seg * count + j;
    float sum = 0, after = SRF__UNSET; /* the scale of sum */
    for (int seg = n_seg - 1; seg >= 0; seg -= ahead) {
        float own[ahead], before[ahead], end[ahead];
#pragma unroll
        for (int k = 0; k < ahead; k++) {
            const int g = seg - k > 0 ? seg - k : 0;
            own[k] = g > 0 ? at[(int64_t)g * count] : 0.0f;
            before[k] = start[(int64_t)g * state_count];
            end[k] = top[(min((g + 1) * seg_chunks, n_chunks) - 1) * 64];
        }
#pragma unroll
        for (int k = 0; k < ahead; k++) {
            if (seg - k < 0) break;
            if (seg - k == n_seg - 1) after = end[k];
            at[(int64_t)(seg - k) * count] = sum * exp2_fast(end[k] - after);
            sum = own[k] + sum * exp2_fast(before[k] - after);
            after = before[k];
        }
    }
}

srf_status srf__pure_wgmma_bwd(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a,
                               const struct pure_plan *plan, const struct bwd_params *p)
{
    const struct srf_attn_shape *s = &a->s;
    const int64_t heads = s->b * s->h, n = heads * 64 * 65;
    struct bwd_maps m;
    SRF_TRY(srf__tile_map(&m.q, a->q, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.k, a->k, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.v, a->v, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.d_o, a->d_o, s->b, s->t, s->h, a->ld_o, CHUNK));
    if (p->n_seg > 1 && !p->carried) SRF_TRY(srf__pure_wgmma_states(ctx, a, plan, p->states));
    SRF_TRY(srf__pure_wgmma_queries(ctx, p, &m, heads));
    if (p->n_seg > 1) {
        struct chain_shape shape = {dim3((unsigned)div_up(n, 128)), 128, 0, 1};
        chain_launch(ctx, shape, suffix_kernel, p->r, p->states, p->tops, n, p->n_seg,
                     p->seg_chunks, (p->t + CHUNK - 1) / CHUNK);
        SRF_TRY(srf__cuda_launched("srf_attn_bwd"));
    }
    return srf__pure_wgmma_keys(ctx, p, &m, heads);
}
