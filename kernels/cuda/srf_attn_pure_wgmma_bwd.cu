/* Pure SRF attention with warpgroup products, backward. The method is told in srf_attn_pure_bwd.cu,
 * what is different here in srf_attn_pure_wgmma.h.
 *
 * The forward, or a first kernel that walks over the keys, keeps S (bf16, as the products want it),
 * z and M of each chunk; the last walks backward with R, u and makes dq, dk, dv of a chunk at once:
 * psi, kf and dP are made once for all three, and q, k, v, do are read once.
 *
 * With segments, what the queries of each add to R, u is summed before that, in a scale of its own,
 * as the states of segments are from keys. In the last kernel segments are cut into units, that
 * all blocks end together: units are taken last first, each gets R from the one after it.
 *
 * Floor: q, k, v, o, do, S read, dq, dk, dv written: 18 b t h d bytes; k, v read and S written, 6,
 * where the forward has not left them; q, o, do read once more, 6, with segments.
 */
#include "kernels/cuda/srf_attn_pure_wgmma_bwd.h"

srf_status srf__pure_wgmma_bwd(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a,
                               const struct pure_plan *plan, const struct bwd_params *p)
{
    const struct srf_attn_shape *s = &a->s;
    const int64_t heads = s->b * s->h;
    struct bwd_maps m;
    SRF_TRY(srf__tile_map(&m.q, a->q, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.k, a->k, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.v, a->v, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.d_o, a->d_o, s->b, s->t, s->h, a->ld_o, CHUNK));
    if (p->carried)
        CUDA_TRY(cudaMemsetAsync(p->tickets, 0, (size_t)p->n_tickets * sizeof *p->tickets,
                                 stream_of(ctx)));
    else if (p->n_seg > 1)
        SRF_TRY(srf__pure_wgmma_states(ctx, a, plan, p->states));
    if (p->n_seg > 1) SRF_TRY(srf__pure_wgmma_adds(ctx, p, &m, heads));
    if (!p->carried) SRF_TRY(srf__pure_wgmma_entries(ctx, p, &m, heads));
    if (p->n_seg > 1) SRF_TRY(srf__pure_wgmma_suffix(ctx, p, heads));
    return srf__pure_wgmma_grads(ctx, p, &m, heads);
}

/* Units of equal length, such that the last blocks end together. */
void srf__pure_wgmma_units(const struct srf_ctx *ctx, const struct srf_attn_shape *s,
                           const struct pure_plan *plan, struct bwd_params *p)
{
    const int64_t segments = s->b * s->h * plan->n_seg, chunks = plan->seg_chunks;
    const int64_t last = div_up(s->t, CHUNK) - (plan->n_seg - 1) * chunks; /* segment's chunks */
    const int64_t slots = 2 * (int64_t)cuda_of(ctx)->n_sm; /* blocks that run at once */
    double least = INFINITY;
    for (int n = 1; n <= 8 && n <= chunks; n++) {
        const int64_t each = div_up(chunks, n), units = div_up(chunks, each);
        if (n > 1 && last <= (units - 1) * each) break; /* none is empty */
        /* A block begins in about a third of the time of a chunk. */
        const double time = (double)div_up(segments * units, slots) * ((double)each + 0.3);
        if (!(time < least)) continue;
        least = time;
        p->unit_chunks = (int)each;
    }
    p->n_unit = (int)div_up(chunks, p->unit_chunks);
    p->n_tickets = (int)(1 + segments * p->n_unit);
}
