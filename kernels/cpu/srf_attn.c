/* SRF attention, forward: the parallel form and prefill, which is the same from a given state.
 *
 * Pure, causal: chunks of ATTN_CHUNK tokens. With the state (S, z) before the chunk and
 * P_ts = phi(x_t).phi(y_s) inside it, o_t = (phi_t S + sum_{s<=t} P_ts v_s) / (phi_t z + sum P_ts);
 * then the chunk's keys go into the state. Keys share one stabiliser a feature and chunk, so the
 * denominator of an early token can vanish beside a much larger key later in its chunk: such a
 * chunk is halved until it does not (a single token's denominator is at least 2^-1).
 * Pure, not causal: all keys into the state, then all queries.
 * Hybrid: blocks of `window` tokens; a block's queries see their own block and the one before
 * exactly, and the state, which takes block j - 1 when block j is complete.
 *
 * Parallel over sequences and heads; per-thread scratch does not depend on the length.
 */
#include "kernels/cpu/srf_attn.h"

/* Where a piece of a head's tokens is. */
struct rows {
    const real *q, *k, *v;
    real *o;
    int64_t ld, ld_o;
};

struct fwd_scratch {
    struct attn_chunk ch;
    struct attn_state state;      /* of the parallel form, which starts from nothing */
    real *x, *half, *aq, *ak, *y; /* a batch of rows */
    /* hybrid */
    real *y_block[2], *v_block[2], *half_block[2]; /* (window, d), (window): even and odd blocks */
    real *p;                                       /* (ATTN_CHUNK, 2 window) */
};

static struct fwd_scratch carve(struct attn_bump *b, const struct srf_attn_shape *s)
{
    int64_t m = s->m, d = s->d, rows = attn_batch_rows(m), w = s->window;
    struct fwd_scratch f = {.ch = srf__attn_carve_chunk(b, m)};
    f.state = attn_state_at(attn_reals(b, m * (d + 2)), m, d);
    f.x = attn_reals(b, rows * d);
    f.y = attn_reals(b, rows * d);
    f.half = attn_reals(b, rows);
    f.aq = attn_reals(b, rows * m);
    f.ak = attn_reals(b, rows * m);
    if (w == 0) return f;
    for (int i = 0; i < 2; i++) {
        f.y_block[i] = attn_reals(b, w * d);
        f.v_block[i] = attn_reals(b, w * d);
        f.half_block[i] = attn_reals(b, w);
    }
    f.p = attn_reals(b, ATTN_CHUNK * 2 * w);
    return f;
}

static struct rows rows_at(const struct rows *r, int64_t t)
{
    return (struct rows){
        r->q + t * r->ld, r->k + t * r->ld, r->v + t * r->ld, r->o + t * r->ld_o, r->ld, r->ld_o};
}

static void count_chunk(struct srf_ctx *ctx, bool slow)
{
    if (!ctx->profile) return;
    int64_t *n = slow ? &ctx->profile->srf_slow_chunks : &ctx->profile->srf_chunks;
#pragma omp atomic
    *n += 1;
}

/* o_t = num_t / den_t over n rows. */
static void divide(real *o, int64_t ld, const real *den, int64_t n, int64_t d)
{
    for (int64_t t = 0; t < n; t++) {
        real by = 1 / den[t];
#pragma omp simd
        for (int64_t j = 0; j < d; j++) o[t * ld + j] *= by;
    }
}

static void pure_chunk(const struct attn_head *h, struct attn_state *st,
                       const struct attn_chunk *ch, const real *aq, const real *ak,
                       const struct rows *r, int64_t n, bool whole)
{
    int64_t m = h->m, d = h->d;
    if (!srf__attn_chunk(h, st, aq, ak, n, ch)) {
        int64_t half = n / 2;
        struct rows second = rows_at(r, half);
        if (whole) count_chunk(h->ctx, true);
        pure_chunk(h, st, ch, aq, ak, r, half, false);
        pure_chunk(h, st, ch, aq + half * m, ak + half * m, &second, n - half, false);
        return;
    }
    srf__gemm(h->ctx, false, false, n, d, n, 1, ch->p, n, r->v, r->ld, 0, r->o, r->ld_o);
    for (int64_t i = 0; i < m; i++) {
        if (ch->step[i] == 1) continue;
#pragma omp simd
        for (int64_t j = 0; j < d; j++) st->s[i * d + j] *= ch->step[i];
        st->z[i] = ch->zs[i];
        ch->step[i] = 1;
    }
    srf__gemm(h->ctx, false, false, n, d, m, 1, ch->qf, m, st->s, d, 1, r->o, r->ld_o);
    divide(r->o, r->ld_o, ch->den, n, d);
    srf__attn_add_keys(h, st, ch->kf, r->v, r->ld, n, ch->top, ch->step);
}

static void pure_fwd(const struct attn_head *h, const struct fwd_scratch *f, struct attn_state *st,
                     const struct rows *all, int64_t n_tokens)
{
    int64_t m = h->m, rows = attn_batch_rows(m);
    for (int64_t t0 = 0; t0 < n_tokens; t0 += rows) {
        int64_t n = attn_min(rows, n_tokens - t0);
        struct rows r = rows_at(all, t0);
        srf__attn_load(h, r.q, r.ld, n, f->x, f->half);
        srf__attn_features(h, f->x, NULL, 0, n, f->aq); /* |x|^2 / 2 cancels in o */
        srf__attn_load(h, r.k, r.ld, n, f->y, f->half);
        srf__attn_features(h, f->y, f->half, 0, n, f->ak);
        for (int64_t c = 0; c < n; c += ATTN_CHUNK) {
            struct rows chunk = rows_at(&r, c);
            count_chunk(h->ctx, false);
            pure_chunk(h, st, &f->ch, f->aq + c * m, f->ak + c * m, &chunk,
                       attn_min(ATTN_CHUNK, n - c), true);
        }
    }
}

static void noncausal_fwd(const struct attn_head *h, const struct fwd_scratch *f,
                          struct attn_state *st, const struct rows *all, int64_t n_tokens)
{
    int64_t m = h->m, d = h->d;
    for (int64_t t0 = 0; t0 < n_tokens; t0 += ATTN_CHUNK) {
        int64_t n = attn_min(ATTN_CHUNK, n_tokens - t0);
        struct rows r = rows_at(all, t0);
        srf__attn_load(h, r.k, r.ld, n, f->y, f->half);
        srf__attn_features(h, f->y, f->half, 0, n, f->ak);
        srf__attn_absorb(h, st, f->ak, r.v, r.ld, n, &f->ch);
    }
    for (int64_t t0 = 0; t0 < n_tokens; t0 += ATTN_CHUNK) {
        int64_t n = attn_min(ATTN_CHUNK, n_tokens - t0);
        struct rows r = rows_at(all, t0);
        real *den = f->ch.den;
        srf__attn_load(h, r.q, r.ld, n, f->x, f->half);
        srf__attn_features(h, f->x, NULL, 0, n, f->aq);
        for (int64_t t = 0; t < n; t++) den[t] = ATTN_UNSET;
        srf__attn_queries(h, f->aq, st->top, n, den, f->ch.qf);
        for (int64_t t = 0; t < n; t++) den[t] = srf__dot(f->ch.qf + t * m, st->z, m);
        srf__gemm(h->ctx, false, false, n, d, m, 1, f->ch.qf, m, st->s, d, 0, r.o, r.ld_o);
        divide(r.o, r.ld_o, den, n, d);
    }
}

/* Block `block` of keys, as far as token `end`: tokens before pos from the ring, others from r,
 * whose row 0 is token pos. Returns the number of its rows. */
static int64_t load_block(const struct attn_head *h, const struct fwd_scratch *f,
                          const struct rows *r, int64_t window, const real *ring, int64_t pos,
                          int64_t block, int64_t end)
{
    int64_t d = h->d, first = block * window, n = attn_min(window, end - first);
    int64_t old = attn_max(0, attn_min(n, pos - first));
    real *y = f->y_block[block & 1], *v = f->v_block[block & 1], *half = f->half_block[block & 1];
    if (old) {
        const real *ring_k = ring + (block & 1) * window * d, *ring_v = ring_k + 2 * window * d;
        srf__attn_load(h, ring_k, d, old, y, half);
        memcpy(v, ring_v, (size_t)(old * d) * sizeof(real));
    }
    for (int64_t s = old; s < n; s++)
        memcpy(v + s * d, r->v + (first + s - pos) * r->ld, (size_t)d * sizeof(real));
    if (n > old)
        srf__attn_load(h, r->k + (first + old - pos) * r->ld, r->ld, n - old, y + old * d,
                       half + old);
    return n;
}

/* Tokens [pos, pos + n_tokens), which are the rows of `all`, after those that the state and the
 * ring hold. A block's last token puts the block before it into the state. */
static void hybrid_fwd(const struct attn_head *h, const struct fwd_scratch *f, int64_t window,
                       struct attn_state *st, const real *ring, int64_t pos, const struct rows *all,
                       int64_t n_tokens)
{
    int64_t m = h->m, d = h->d, end = pos + n_tokens;
    real log2_m = (real)log2((double)m);
    struct attn_block_pair pair = {.n = {0, 0}};
    if (n_tokens == 0) return;
    if (pos >= window) pair.n[1] = load_block(h, f, all, window, ring, pos, pos / window - 1, pos);
    for (int64_t block = pos / window; block * window < end; block++) {
        int64_t first = block * window, prev = (block & 1) ^ 1;
        pair.n[0] = pair.n[1];
        pair.n[1] = load_block(h, f, all, window, ring, pos, block, end);
        pair.y[0] = f->y_block[prev];
        pair.y[1] = f->y_block[block & 1];
        for (int64_t t0 = attn_max(first, pos); t0 < first + pair.n[1]; t0 += ATTN_CHUNK) {
            int64_t row = t0 - first, n = attn_min(ATTN_CHUNK, pair.n[1] - row);
            int64_t cols = pair.n[0] + row + n;
            struct rows r = rows_at(all, t0 - pos);
            count_chunk(h->ctx, false);
            srf__attn_load(h, r.q, r.ld, n, f->x, f->half);
            if (!attn_is_empty(st)) srf__attn_features(h, f->x, f->half, log2_m, n, f->aq);
            srf__attn_window(h, &pair, st, f->x, f->aq, row, n, f->p, f->ch.qf, f->ch.den);
            srf__gemm(h->ctx, false, false, n, d, row + n, 1, f->p + pair.n[0], cols,
                      f->v_block[block & 1], d, 0, r.o, r.ld_o);
            if (pair.n[0])
                srf__gemm(h->ctx, false, false, n, d, pair.n[0], 1, f->p, cols, f->v_block[prev], d,
                          1, r.o, r.ld_o);
            if (!attn_is_empty(st))
                srf__gemm(h->ctx, false, false, n, d, m, 1, f->ch.qf, m, st->s, d, 1, r.o, r.ld_o);
            divide(r.o, r.ld_o, f->ch.den, n, d);
        }
        if (pair.n[1] < window || block == 0) continue;
        for (int64_t s = 0; s < window; s += ATTN_CHUNK) {
            int64_t n = attn_min(ATTN_CHUNK, window - s);
            srf__attn_features(h, pair.y[0] + s * d, f->half_block[prev] + s, 0, n, f->ak);
            srf__attn_absorb(h, st, f->ak, f->v_block[prev] + s * d, d, n, &f->ch);
        }
    }
}

/* The last tokens' raw k, v into the ring. */
static void fill_ring(real *ring, int64_t window, int64_t d, int64_t pos, const struct rows *r,
                      int64_t n_tokens)
{
    for (int64_t t = attn_max(0, n_tokens - 2 * window); t < n_tokens; t++) {
        real *k = ring + (pos + t) % (2 * window) * d;
        memcpy(k, r->k + t * r->ld, (size_t)d * sizeof(real));
        memcpy(k + 2 * window * d, r->v + t * r->ld, (size_t)d * sizeof(real));
    }
}

static size_t thread_bytes(const struct srf_attn_shape *s)
{
    struct attn_bump b = {0};
    carve(&b, s);
    return b.used;
}

/* The rows of a head that begin with row `first`. */
static struct rows rows_of(const struct srf_attn_shape *s, const void *q, const void *k,
                           const void *v, int64_t ld, void *o, int64_t ld_o, int64_t first,
                           int64_t head)
{
    int64_t in = first * ld + head * s->d, out = first * ld_o + head * s->d;
    return (struct rows){(const real *)q + in,
                         (const real *)k + in,
                         (const real *)v + in,
                         (real *)o + out,
                         ld,
                         ld_o};
}

size_t SRF_CPU(srf_attn_fwd_workspace)(const struct srf_ctx *ctx,
                                       const struct srf_srf_attn_fwd_args *a)
{
    return (size_t)ctx->n_threads * thread_bytes(&a->s);
}

srf_status SRF_CPU(srf_attn_fwd)(struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    SRF_TRY(srf__attn_check(s, a->ld, a->ld_o));
    size_t bytes = thread_bytes(s);
    srf__blas_serial_begin(ctx);
#pragma omp parallel for schedule(static) num_threads(ctx->n_threads)
    for (int64_t i = 0; i < s->b * s->h; i++) {
        struct attn_bump bump = {(char *)ctx->workspace + (size_t)omp_get_thread_num() * bytes, 0};
        struct fwd_scratch f = carve(&bump, s);
        struct attn_head h = attn_head_of(ctx, s, a->w, a->bias, i % s->h);
        struct rows r =
            rows_of(s, a->q, a->k, a->v, a->ld, a->o, a->ld_o, i / s->h * s->t, i % s->h);
        memset(f.state.s, 0, (size_t)(s->m * (s->d + 2)) * sizeof(real));
        if (s->window)
            hybrid_fwd(&h, &f, s->window, &f.state, NULL, 0, &r, s->t);
        else if (s->causal)
            pure_fwd(&h, &f, &f.state, &r, s->t);
        else
            noncausal_fwd(&h, &f, &f.state, &r, s->t);
    }
    srf__blas_serial_end(ctx);
    return SRF_OK;
}

size_t SRF_CPU(srf_attn_prefill_workspace)(const struct srf_ctx *ctx,
                                           const struct srf_srf_attn_prefill_args *a)
{
    return (size_t)ctx->n_threads * thread_bytes(&a->s);
}

srf_status SRF_CPU(srf_attn_prefill)(struct srf_ctx *ctx, const struct srf_srf_attn_prefill_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    SRF_TRY(srf__attn_check(s, a->ld, a->ld_o));
    SRF_FAIL_IF(!s->causal, SRF_INVALID, "prefill of srf attention that is not causal");
    SRF_FAIL_IF(a->state_bf16, SRF_UNSUPPORTED, "the CPU keeps no states in bf16");
    size_t bytes = thread_bytes(s);
    int64_t count = srf_attn_state_count(s->m, s->d, s->window);
    const int32_t *offsets = a->offsets, *slots = a->slots;
    srf__blas_serial_begin(ctx);
    /* Lengths may differ: whoever is free takes the next head. */
#pragma omp parallel for schedule(dynamic) num_threads(ctx->n_threads)
    for (int64_t i = 0; i < s->b * s->h; i++) {
        struct attn_bump bump = {(char *)ctx->workspace + (size_t)omp_get_thread_num() * bytes, 0};
        struct fwd_scratch f = carve(&bump, s);
        int64_t seq = i / s->h, head = i % s->h, slot = slots ? slots[seq] : seq;
        int64_t first = offsets ? offsets[seq] : seq * s->t;
        int64_t n = offsets ? offsets[seq + 1] - first : s->t;
        struct attn_head h = attn_head_of(ctx, s, a->w, a->bias, head);
        struct rows r = rows_of(s, a->q, a->k, a->v, a->ld, a->o, a->ld_o, first, head);
        struct attn_state st =
            attn_state_at((real *)a->state + (slot * s->h + head) * count, s->m, s->d);
        real *ring = st.top + s->m;
        int64_t pos = ((const int32_t *)a->pos)[seq];
        if (s->window) {
            hybrid_fwd(&h, &f, s->window, &st, ring, pos, &r, n);
            fill_ring(ring, s->window, s->d, pos, &r, n);
        } else {
            pure_fwd(&h, &f, &st, &r, n);
        }
    }
    srf__blas_serial_end(ctx);
    return SRF_OK;
}
