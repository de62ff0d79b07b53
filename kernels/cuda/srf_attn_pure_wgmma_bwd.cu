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

/* Units of equal length, such that the last blocks end together. */
static void plan_units(const struct srf_ctx *ctx, const struct srf_attn_shape *s,
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

size_t srf__pure_wgmma_plan_bwd(const struct srf_ctx *ctx, const struct srf_attn_shape *s, bool dw,
                                const struct pure_plan *plan, struct bwd_params *p)
{
    struct cuda_bump bump = {(char *)ctx->workspace, 0};
    const size_t heads = (size_t)(s->b * s->h), chunks = heads * (size_t)div_up(s->t, CHUNK);
    const size_t segments = heads * (size_t)plan->n_seg;
    plan_units(ctx, s, plan, p);
    const size_t units = segments * (size_t)p->n_unit;
    p->tickets = (unsigned *)bump_bytes(&bump, (size_t)p->n_tickets * sizeof(unsigned));
    p->entry = (bf16 *)bump_bytes(&bump, chunks * CHUNK * 64 * sizeof(bf16));
    p->marks = (float *)bump_bytes(&bump, chunks * MARKS * sizeof(float));
    p->r = (float *)bump_bytes(&bump, units * 64 * 65 * sizeof(float));
    if (plan->n_seg > 1) {
        p->states =
            (float *)bump_bytes(&bump, segments * (size_t)pure_state_count(64, 1) * sizeof(float));
        p->adds = (float *)bump_bytes(&bump, segments * 64 * 66 * sizeof(float));
        p->seg_r = (float *)bump_bytes(&bump, segments * 64 * 65 * sizeof(float));
    }
    if (dw) p->dw = (float *)bump_bytes(&bump, 2 * units * 64 * 64 * sizeof(float));
    return bump.used;
}

srf_status srf__pure_wgmma_bwd(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a,
                               const struct pure_plan *plan, struct bwd_params *p)
{
    const struct srf_attn_shape *s = &a->s;
    const int64_t heads = s->b * s->h;
    struct bwd_maps m;
    SRF_TRY(srf__tile_map(&m.q, a->q, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.k, a->k, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.v, a->v, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.d_o, a->d_o, s->b, s->t, s->h, a->ld_o, CHUNK));
    if (a->carry && srf__pure_carry_bytes(ctx, s) > 0) {
        p->entry = (bf16 *)a->carry;
        p->marks = (float *)(p->entry + heads * div_up(s->t, CHUNK) * CHUNK * 64);
        p->carried = true;
    }
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
