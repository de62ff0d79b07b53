/* Pure SRF attention with warpgroup products, backward. The method is told in srf_attn_pure_bwd.cu,
 * what is different here in srf_attn_pure_wgmma.h.
 *
 * The forward, or a first kernel that walks over the keys, keeps S (bf16, as the products want it),
 * z and M of each chunk; the last walks backward with R, u and makes dq, dk, dv of a chunk at once:
 * psi, kf and dP are made once for all three, and q, k, v, do are read once.
 *
 * With segments, what the queries of each but the first add to R, u is summed before that, in a
 * scale of its own, as the states of segments are from keys; delta of all tokens is left by that
 * (else the last kernel makes it, of what it has). The last kernel's segments are its own, as long
 * as all of them run at once, which makes for few of them; the last of a head is shorter and goes
 * where others leave room. A head that is one segment, or the last of several, is cut into units,
 * that all blocks end together: units are taken last first, each gets R from the one after it.
 *
 * Floor: q, k, v, do, S read, dq, dk, dv written: 16 b t h d bytes; k, v read and S written, 6,
 * where the forward has not left them; q, o, do read, 6, with segments.
 */
#include "kernels/cuda/srf_attn_pure_wgmma_bwd.h"

/* A head's chunks of 64 tokens as the last kernel takes them: in segments, each a block's, but for
 * the last and shortest, which is cut into units. */
struct cut {
    int64_t heads, chunks, slots; /* slots: blocks that run at once */
    int64_t seg_chunks, units;
};

/* In chunks that a block takes one after another: what the sums of queries of all segments but the
 * first take, then the segments. Units begin where segments leave them room. Those of one head
 * follow each other. */
static double time_of(const struct cut *c)
{
    const double begin = 0.3; /* of a block */
    const double hand = 0.3;  /* R, u from unit to unit, that few places take in turn */
    const double adds = 0.23; /* of a chunk, all blocks at work */
    const int64_t segments = c->heads * (div_up(c->chunks, c->seg_chunks) - 1);
    const int64_t last = c->chunks - segments / c->heads * c->seg_chunks;
    const int64_t waves = div_up(segments, c->slots), room = waves * c->slots - segments;
    const double each = (double)c->seg_chunks + begin;
    const bool handed = segments > 0 && c->units > 1;
    const double unit = (double)div_up(last, c->units) + begin + (handed ? hand : 0);
    const double sums = adds * (double)(c->heads * (c->chunks - c->seg_chunks)) / (double)c->slots;
    /* No unit waits for one that has begun with it. */
    if (c->units > 1 && c->heads < room) return INFINITY;
    int64_t left = c->heads * c->units, fit = (int64_t)(1.05 * each / unit);
    double time = (double)waves * each;
    if (room > 0) {
        if (fit > div_up(left, room)) fit = div_up(left, room);
        if (fit < 1) fit = 1;
        time = fmax(time, time - each + (double)fit * unit);
        left -= room * fit;
    }
    if (left > 0) time += (double)div_up(left, c->slots) * unit;
    return sums + fmax(time, (double)c->units * unit);
}

/* Pieces of segments, for the sums of their queries: all run at once (what early ones have summed
 * would be gone from L2 before it is wanted); shorter ones where the longest becomes shorter by it.
 * The first segment, of which delta alone is wanted, has its own, or goes to the last piece. */
static void plan_pieces(const struct cut *c, int64_t places, bool dw, struct bwd_params *p)
{
    const int64_t size = p->seg_chunks, last = c->chunks - (p->n_seg - 1) * size;
    const double lead = dw ? 0 : (double)(2 * size) / 3; /* in chunks of sums */
    double least = INFINITY;
    for (int64_t n = 1; n <= 4 && (n == 1 || 4 * n <= size); n++)
        for (int64_t of_lead = 0; of_lead <= (dw ? 0 : n); of_lead++) {
            const int64_t of_last = last * n < size ? 1 : last * n / size;
            const int64_t rest = (p->n_seg - 2) * n + of_last;
            if ((n > 1 || of_lead > 1) && c->heads * (rest + of_lead) > places) continue;
            double most = (double)div_up(last, of_last) + (of_lead > 0 ? 0 : lead);
            if (p->n_seg > 2) most = fmax(most, (double)div_up(size, n));
            if (of_lead > 0) most = fmax(most, lead / (double)of_lead);
            if (!(most < least)) continue;
            least = most;
            p->n_piece = (int)rest;
            p->seg_pieces = (int)n;
            p->last_pieces = (int)of_last;
            p->lead_pieces = (int)of_lead;
        }
}

static void plan_units(const struct srf_ctx *ctx, const struct srf_attn_shape *s, bool dw,
                       const struct pure_plan *plan, struct bwd_params *p)
{
    struct cut c = {s->b * s->h, div_up(s->t, CHUNK), 2 * (int64_t)cuda_of(ctx)->n_sm, 0, 1};
    if (c.heads < 1) c.heads = 1;
    if (c.chunks < 1) c.chunks = 1;
    int64_t from = c.chunks, to = c.chunks;
    double least = INFINITY;
    /* Where the forward has segments, or leaves the states that they would begin with. */
    if (plan->n_seg > 1 || srf__pure_carry_bytes(ctx, s) > 0) {
        from = div_up(c.heads * c.chunks, c.slots);
        if (from < 4) from = 4;
        to = from + from / 3 + 2;
        if (to >= c.chunks) to = c.chunks - 1;
    }
    for (c.seg_chunks = from; c.seg_chunks <= to; c.seg_chunks++) {
        const int64_t n_seg = div_up(c.chunks, c.seg_chunks);
        const int64_t last = c.chunks - (n_seg - 1) * c.seg_chunks;
        for (c.units = 1; c.units <= 8; c.units++) {
            const int64_t each = div_up(last, c.units);
            if (div_up(last, each) != c.units) continue; /* one is empty */
            const double time = time_of(&c);
            if (!(time < least)) continue;
            least = time;
            p->n_seg = (int)n_seg;
            p->seg_chunks = (int)c.seg_chunks;
            p->head_units = (int)(n_seg - 1 + c.units);
            p->unit_chunks = (int)each;
        }
    }
    p->n_tickets = (int)(1 + c.heads * p->head_units);
    if (p->n_seg == 1) return;
    plan_pieces(&c, 3 * (int64_t)cuda_of(ctx)->n_sm, dw, p);
}

size_t srf__pure_wgmma_plan_bwd(const struct srf_ctx *ctx, const struct srf_attn_shape *s, bool dw,
                                const struct pure_plan *plan, struct bwd_params *p)
{
    struct cuda_bump bump = {(char *)ctx->workspace, 0};
    const size_t heads = (size_t)(s->b * s->h), chunks = heads * (size_t)div_up(s->t, CHUNK);
    plan_units(ctx, s, dw, plan, p);
    const size_t segments = heads * (size_t)p->n_seg, units = heads * (size_t)p->head_units;
    p->tickets = (unsigned *)bump_bytes(&bump, (size_t)p->n_tickets * sizeof(unsigned));
    p->records = (char *)bump_bytes(&bump, chunks * RECORD);
    p->r = (float *)bump_bytes(&bump, units * 64 * 65 * sizeof(float));
    if (p->n_seg > 1) {
        p->states =
            (float *)bump_bytes(&bump, segments * (size_t)pure_state_count(64, 1) * sizeof(float));
        p->adds = (float *)bump_bytes(&bump, heads * (size_t)p->n_piece * 64 * 66 * sizeof(float));
        p->seg_r = (float *)bump_bytes(&bump, segments * 64 * 65 * sizeof(float));
        p->deltas = (float *)bump_bytes(&bump, chunks * CHUNK * sizeof(float));
        if (dw) p->deltas = NULL;
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
    SRF_TRY(srf__tile_map(&m.o, a->o, s->b, s->t, s->h, a->ld_o, CHUNK));
    SRF_TRY(srf__tile_map(&m.dq, a->dq, s->b, s->t, s->h, a->ld, 16));
    SRF_TRY(srf__tile_map(&m.dk, a->dk, s->b, s->t, s->h, a->ld, 16));
    SRF_TRY(srf__tile_map(&m.dv, a->dv, s->b, s->t, s->h, a->ld, 16));
    if (a->carry && srf__pure_carry_bytes(ctx, s) > 0) {
        p->records = (char *)a->carry;
        p->carried = true;
    }
    p->walk_chunks = p->carried ? plan->seg_chunks : p->seg_chunks;
    if (!p->carried && p->n_seg > 1) {
        struct pure_plan own = *plan;
        own.n_seg = p->n_seg;
        own.seg_chunks = p->seg_chunks;
        SRF_TRY(srf__pure_wgmma_states(ctx, a, &own, p->states));
    }
    if (p->n_seg > 1) SRF_TRY(srf__pure_wgmma_adds(ctx, p, &m, heads));
    if (!p->carried) SRF_TRY(srf__pure_wgmma_entries(ctx, p, &m, heads));
    if (p->n_seg > 1) SRF_TRY(srf__pure_wgmma_suffix(ctx, p, heads));
    return srf__pure_wgmma_grads(ctx, p, &m, heads);
}
