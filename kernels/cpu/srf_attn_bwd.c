/* SRF attention, backward.
 *
 * With g_t = d_o_t / den_t and delta_t = -(d_o_t.o_t) / den_t, a weight P_ts has the gradient
 * dP_ts = g_t.v_s + delta_t, and so
 *     dphi(x_t) = sum_{s<=t} dP_ts phi(y_s) = S_t g_t + z_t delta_t
 *     dphi(y_s) = sum_{t>=s} dP_ts phi(x_t) = R_s v_s + u_s,     dv_s = R_s^T phi(y_s)
 *     R_s = sum_{t>=s} phi(x_t) g_t^T (m, d),     u_s = sum_{t>=s} phi(x_t) delta_t (m)
 *     da = phi dphi,   dx = W^T da - (sum_i da_i) x,   dW_i += sum da_i x   (y likewise)
 * Stabilisers cancel, so they are constants; for pure queries sum_i da_i = 0.
 *
 * A forward sweep keeps the state before every chunk (or hybrid block); then chunks are taken last
 * to first, features recomputed. R and u are kept in the scale that makes phi(y) 2^-M right for the
 * M at the point reached. M never falls with time, so walking back multiplies by 2^(M' - M) <= 1:
 * nothing overflows, and what underflows is negligible. Chunks that the forward would halve are
 * halved here too.
 */
#include "kernels/cpu/srf_attn.h"

#define MAX_HALVINGS 6 /* of a chunk of 64 */

/* One head's tokens, or a piece of them from some token on. */
struct rows {
    const real *q, *k, *v, *o, *d_o;
    real *dq, *dk, *dv;
    int64_t ld, ld_o;
};

struct bwd_scratch {
    struct attn_chunk ch;
    struct attn_state mid[MAX_HALVINGS];
    real *states;                  /* (n_states, m (d + 2)): the state before chunk or block i */
    real *r, *u;                   /* (m, d), (m): R and u */
    real *x, *y, *half, *aq, *ak;  /* a batch of rows; da overwrites a */
    real *sum;                     /* (a batch): sum_i da_i of keys */
    real *g, *delta, *dp, *dphi;   /* (n, d), (n), (n, n), (n, m) of a chunk */
    real *p, *dscore;              /* hybrid: (ATTN_CHUNK, 2 window) */
    real *y_block[2], *half_block; /* hybrid: (window, d), (window) */
    real *dw;                      /* (m, d) of this head, or NULL */
};

static int64_t n_states(const struct srf_attn_shape *s)
{
    if (!s->causal) return 1;
    int64_t len = s->window ? s->window : ATTN_CHUNK;
    return (s->t + len - 1) / len;
}

static struct bwd_scratch carve(struct attn_bump *b, const struct srf_attn_shape *s)
{
    int64_t m = s->m, d = s->d, rows = attn_batch_rows(m), w = s->window;
    struct bwd_scratch f = {.ch = srf__attn_carve_chunk(b, m)};
    for (int i = 0; i < MAX_HALVINGS; i++)
        f.mid[i] = attn_state_at(attn_reals(b, m * (d + 2)), m, d);
    f.states = attn_reals(b, n_states(s) * m * (d + 2));
    f.r = attn_reals(b, m * d);
    f.u = attn_reals(b, m);
    f.x = attn_reals(b, rows * d);
    f.y = attn_reals(b, rows * d);
    f.half = attn_reals(b, rows);
    f.aq = attn_reals(b, rows * m);
    f.ak = attn_reals(b, rows * m);
    f.sum = attn_reals(b, rows);
    f.g = attn_reals(b, ATTN_CHUNK * d);
    f.delta = attn_reals(b, ATTN_CHUNK);
    f.dp = attn_reals(b, ATTN_CHUNK * ATTN_CHUNK);
    f.dphi = attn_reals(b, ATTN_CHUNK * m);
    if (w == 0) return f;
    f.p = attn_reals(b, ATTN_CHUNK * 2 * w);
    f.dscore = attn_reals(b, ATTN_CHUNK * 2 * w);
    f.y_block[0] = attn_reals(b, w * d);
    f.y_block[1] = attn_reals(b, w * d);
    f.half_block = attn_reals(b, w);
    return f;
}

static struct rows rows_at(const struct rows *r, int64_t t)
{
    int64_t in = t * r->ld, out = t * r->ld_o;
    return (struct rows){r->q + in,  r->k + in,  r->v + in,  r->o + out, r->d_o + out,
                         r->dq + in, r->dk + in, r->dv + in, r->ld,      r->ld_o};
}

static struct attn_state state_i(const struct attn_head *h, const struct bwd_scratch *f, int64_t i)
{
    return attn_state_at(f->states + i * h->m * (h->d + 2), h->m, h->d);
}

static void copy_state(const struct attn_head *h, struct attn_state *to,
                       const struct attn_state *from)
{
    memcpy(to->s, from->s, (size_t)(h->m * (h->d + 2)) * sizeof(real));
}

/* g = d_o / den, delta = -(d_o.o) / den */
static void upstream(const struct attn_head *h, const struct bwd_scratch *f, const struct rows *r,
                     int64_t n)
{
    int64_t d = h->d;
    for (int64_t t = 0; t < n; t++) {
        const real *o = r->o + t * r->ld_o, *d_o = r->d_o + t * r->ld_o;
        real by = 1 / f->ch.den[t], *g = f->g + t * d;
        if (t + ATTN_AHEAD < n) {
            attn_prefetch(o + ATTN_AHEAD * r->ld_o, d);
            attn_prefetch(d_o + ATTN_AHEAD * r->ld_o, d);
        }
#pragma omp simd
        for (int64_t j = 0; j < d; j++) g[j] = d_o[j] * by;
        f->delta[t] = -srf__dot(d_o, o, d) * by;
    }
}

/* R += qf^T g, u += qf^T delta */
static void add_queries(const struct attn_head *h, const struct bwd_scratch *f, int64_t n)
{
    int64_t m = h->m;
    srf__gemm(h->ctx, true, false, m, h->d, n, 1, f->ch.qf, m, f->g, h->d, 1, f->r, h->d);
    for (int64_t t = 0; t < n; t++)
#pragma omp simd
        for (int64_t i = 0; i < m; i++) f->u[i] += f->ch.qf[t * m + i] * f->delta[t];
}

/* R, u *= step: to the stabiliser before. */
static void step_back(const struct attn_head *h, const struct bwd_scratch *f, const real *step)
{
    for (int64_t i = 0; i < h->m; i++) {
        if (step[i] == 1) continue;
        f->u[i] *= step[i];
        for (int64_t j = 0; j < h->d; j++) f->r[i * h->d + j] *= step[i];
    }
}

/* da (n, m) = weight (dphi + a_t b_i), sum_t = sum_i da_ti; a is 1 where it is NULL. */
static void to_exponents(const struct attn_head *h, const real *weight, const real *dphi,
                         const real *a, const real *b, int64_t n, real *da, real *sum)
{
    int64_t m = h->m;
    for (int64_t t = 0; t < n; t++) {
        const real *w = weight + t * m, *p = dphi + t * m;
        real *out = da + t * m, by = a ? a[t] : 1;
#pragma omp simd
        for (int64_t i = 0; i < m; i++) out[i] = w[i] * (p[i] + by * b[i]);
        if (sum) sum[t] = srf__sum(out, m);
    }
}

/* dx (n, ld) += or = scale (da W - sum x); sum NULL is 0. dW += da^T x. */
static void to_inputs(const struct attn_head *h, const struct bwd_scratch *f, const real *da,
                      const real *sum, const real *x, int64_t n, real beta, real *dx, int64_t ld)
{
    int64_t m = h->m, d = h->d;
    srf__gemm(h->ctx, false, false, n, d, m, h->scale, da, m, h->w, d, beta, dx, ld);
    for (int64_t t = 0; sum && t < n; t++) {
        real by = h->scale * sum[t];
#pragma omp simd
        for (int64_t j = 0; j < d; j++) dx[t * ld + j] -= by * x[t * d + j];
    }
    if (f->dw) srf__gemm(h->ctx, true, false, m, d, n, 1, da, m, x, d, 1, f->dw, d);
}

/* ---- pure, causal ---------------------------------------------------------------------------- */

/* One chunk with the state before it. da overwrites aq, ak (n, m); dv is written; R, u are moved
 * from the end of the chunk to its start. */
static void pure_chunk(const struct attn_head *h, const struct bwd_scratch *f,
                       const struct attn_state *st, real *aq, real *ak, real *sum,
                       const struct rows *r, int64_t n, int depth)
{
    const struct attn_chunk *ch = &f->ch;
    int64_t m = h->m, d = h->d;
    if (!srf__attn_chunk(h, st, aq, ak, n, ch)) {
        int64_t half = n / 2;
        struct rows second = rows_at(r, half);
        struct attn_state mid = f->mid[depth];
        copy_state(h, &mid, st);
        srf__attn_absorb(h, &mid, ak, r->v, r->ld, half, ch);
        pure_chunk(h, f, &mid, aq + half * m, ak + half * m, sum + half, &second, n - half,
                   depth + 1);
        pure_chunk(h, f, st, aq, ak, sum, r, half, depth + 1);
        return;
    }
    upstream(h, f, r, n);
    srf__gemm(h->ctx, false, true, n, n, d, 1, f->g, d, r->v, r->ld, 0, f->dp, n);
    for (int64_t t = 0; t < n; t++) {
        real *dp = f->dp + t * n;
#pragma omp simd
        for (int64_t s = 0; s <= t; s++) dp[s] += f->delta[t];
        for (int64_t s = t + 1; s < n; s++) dp[s] = 0;
    }
    bool empty = attn_is_empty(st);
    if (!empty) {
        srf__gemm(h->ctx, false, true, n, m, d, 1, f->g, d, st->s, d, 0, f->dphi, m);
        for (int64_t t = 0; t < n; t++)
#pragma omp simd
            for (int64_t i = 0; i < m; i++) f->dphi[t * m + i] *= ch->step[i];
    }
    srf__gemm(h->ctx, false, false, n, m, n, 1, f->dp, n, ch->kf, m, empty ? 0 : 1, f->dphi, m);
    to_exponents(h, ch->qf, f->dphi, f->delta, ch->zs, n, aq, NULL);

    srf__gemm(h->ctx, false, true, n, m, d, 1, r->v, r->ld, f->r, d, 0, f->dphi, m);
    srf__gemm(h->ctx, true, false, n, m, n, 1, f->dp, n, ch->qf, m, 1, f->dphi, m);
    to_exponents(h, ch->kf, f->dphi, NULL, f->u, n, ak, sum);

    srf__gemm(h->ctx, false, false, n, d, m, 1, ch->kf, m, f->r, d, 0, r->dv, r->ld);
    srf__gemm(h->ctx, true, false, n, d, n, 1, ch->p, n, f->g, d, 1, r->dv, r->ld);
    add_queries(h, f, n);
    step_back(h, f, ch->step);
}

static void pure_bwd(const struct attn_head *h, const struct bwd_scratch *f, const struct rows *all,
                     int64_t n_tokens)
{
    int64_t m = h->m, rows = attn_batch_rows(m), batches = (n_tokens + rows - 1) / rows;
    for (int64_t t0 = 0; t0 < n_tokens; t0 += rows) {
        int64_t n = attn_min(rows, n_tokens - t0);
        struct rows r = rows_at(all, t0);
        srf__attn_load(h, r.k, r.ld, n, f->y, f->half);
        srf__attn_features(h, f->y, f->half, 0, n, f->ak);
        for (int64_t c = 0; c < n && t0 + c + ATTN_CHUNK < n_tokens; c += ATTN_CHUNK) {
            struct attn_state st = state_i(h, f, (t0 + c) / ATTN_CHUNK);
            struct attn_state next = state_i(h, f, (t0 + c) / ATTN_CHUNK + 1);
            copy_state(h, &next, &st);
            srf__attn_absorb(h, &next, f->ak + c * m, r.v + c * r.ld, r.ld, ATTN_CHUNK, &f->ch);
        }
    }
    for (int64_t batch = batches - 1; batch >= 0; batch--) {
        int64_t t0 = batch * rows, n = attn_min(rows, n_tokens - t0);
        struct rows r = rows_at(all, t0);
        srf__attn_load(h, r.q, r.ld, n, f->x, f->half);
        srf__attn_features(h, f->x, NULL, 0, n, f->aq);
        srf__attn_load(h, r.k, r.ld, n, f->y, f->half);
        srf__attn_features(h, f->y, f->half, 0, n, f->ak);
        for (int64_t c = (n - 1) / ATTN_CHUNK * ATTN_CHUNK; c >= 0; c -= ATTN_CHUNK) {
            struct rows chunk = rows_at(&r, c);
            struct attn_state st = state_i(h, f, (t0 + c) / ATTN_CHUNK);
            pure_chunk(h, f, &st, f->aq + c * m, f->ak + c * m, f->sum + c, &chunk,
                       attn_min(ATTN_CHUNK, n - c), 0);
        }
        to_inputs(h, f, f->aq, NULL, f->x, n, 0, r.dq, r.ld);
        to_inputs(h, f, f->ak, f->sum, f->y, n, 0, r.dk, r.ld);
    }
}

/* ---- queries against a state, keys against R, u: not causal, and the hybrid's far part ------- */

/* Far gradient of n queries: da overwrites aq, then dq = beta dq + scale (...); R, u take the
 * queries. */
static void far_queries(const struct attn_head *h, const struct bwd_scratch *f,
                        const struct attn_state *st, real *aq, const real *sum_or_null,
                        const real *x, const struct rows *r, int64_t n, real beta)
{
    int64_t m = h->m, d = h->d;
    srf__gemm(h->ctx, false, true, n, m, d, 1, f->g, d, st->s, d, 0, f->dphi, m);
    to_exponents(h, f->ch.qf, f->dphi, f->delta, st->z, n, aq, f->sum);
    to_inputs(h, f, aq, sum_or_null, x, n, beta, r->dq, r->ld);
    add_queries(h, f, n);
}

/* Far gradient of n keys whose exponents are ak (overwritten), in the scale of `top`; dk and dv are
 * written, not added to. */
static void far_keys(const struct attn_head *h, const struct bwd_scratch *f, const real *top,
                     real *ak, const real *y, const struct rows *r, int64_t n)
{
    int64_t m = h->m, d = h->d;
    srf__attn_keys(h, ak, top, n, f->ch.kf);
    srf__gemm(h->ctx, false, true, n, m, d, 1, r->v, r->ld, f->r, d, 0, f->dphi, m);
    to_exponents(h, f->ch.kf, f->dphi, NULL, f->u, n, ak, f->sum);
    to_inputs(h, f, ak, f->sum, y, n, 0, r->dk, r->ld);
    srf__gemm(h->ctx, false, false, n, d, m, 1, f->ch.kf, m, f->r, d, 0, r->dv, r->ld);
}

static void noncausal_bwd(const struct attn_head *h, const struct bwd_scratch *f,
                          const struct rows *all, int64_t n_tokens)
{
    int64_t m = h->m;
    struct attn_state st = state_i(h, f, 0);
    for (int64_t t0 = 0; t0 < n_tokens; t0 += ATTN_CHUNK) {
        int64_t n = attn_min(ATTN_CHUNK, n_tokens - t0);
        struct rows r = rows_at(all, t0);
        srf__attn_load(h, r.k, r.ld, n, f->y, f->half);
        srf__attn_features(h, f->y, f->half, 0, n, f->ak);
        srf__attn_absorb(h, &st, f->ak, r.v, r.ld, n, &f->ch);
    }
    for (int64_t t0 = 0; t0 < n_tokens; t0 += ATTN_CHUNK) {
        int64_t n = attn_min(ATTN_CHUNK, n_tokens - t0);
        struct rows r = rows_at(all, t0);
        real *den = f->ch.den;
        srf__attn_load(h, r.q, r.ld, n, f->x, f->half);
        srf__attn_features(h, f->x, NULL, 0, n, f->aq);
        for (int64_t t = 0; t < n; t++) den[t] = ATTN_UNSET;
        srf__attn_queries(h, f->aq, st.top, n, den, f->ch.qf);
        for (int64_t t = 0; t < n; t++) den[t] = srf__dot(f->ch.qf + t * m, st.z, m);
        upstream(h, f, &r, n);
        far_queries(h, f, &st, f->aq, NULL, f->x, &r, n, 0);
    }
    for (int64_t t0 = 0; t0 < n_tokens; t0 += ATTN_CHUNK) {
        int64_t n = attn_min(ATTN_CHUNK, n_tokens - t0);
        struct rows r = rows_at(all, t0);
        srf__attn_load(h, r.k, r.ld, n, f->y, f->half);
        srf__attn_features(h, f->y, f->half, 0, n, f->ak);
        far_keys(h, f, st.top, f->ak, f->y, &r, n);
    }
}

/* ---- hybrid ---------------------------------------------------------------------------------- */

/* Rows [row, row + n) of a block against the block before it and their own, then the state. */
static void window_bwd(const struct attn_head *h, const struct bwd_scratch *f,
                       const struct attn_block_pair *pair, const struct attn_state *far,
                       const struct rows *prev, const struct rows *cur, int64_t row, int64_t n)
{
    int64_t d = h->d, before = pair->n[0], cols = before + row + n;
    struct rows r = rows_at(cur, row);
    srf__attn_load(h, r.q, r.ld, n, f->x, f->half);
    if (!attn_is_empty(far))
        srf__attn_features(h, f->x, f->half, (real)log2((double)h->m), n, f->aq);
    srf__attn_window(h, pair, far, f->x, f->aq, row, n, f->p, f->ch.qf, f->ch.den);
    upstream(h, f, &r, n);
    if (before)
        srf__gemm(h->ctx, false, true, n, before, d, 1, f->g, d, prev->v, r.ld, 0, f->dscore, cols);
    srf__gemm(h->ctx, false, true, n, row + n, d, 1, f->g, d, cur->v, r.ld, 0, f->dscore + before,
              cols);
    for (int64_t t = 0; t < n; t++) {
        const real *p = f->p + t * cols;
        real *ds = f->dscore + t * cols, delta = f->delta[t];
        int64_t seen = before + row + t + 1;
#pragma omp simd
        for (int64_t s = 0; s < seen; s++) ds[s] = p[s] * (ds[s] + delta);
        for (int64_t s = seen; s < cols; s++) ds[s] = 0;
    }
    real beta = 0;
    for (int i = before ? 0 : 1; i < 2; i++) {
        const struct rows *to = i ? cur : prev;
        const real *ds = f->dscore + (i ? before : 0), *p = f->p + (i ? before : 0);
        int64_t keys = i ? row + n : before;
        srf__gemm(h->ctx, false, false, n, d, keys, h->scale, ds, cols, pair->y[i], d, beta, r.dq,
                  r.ld);
        srf__gemm(h->ctx, true, false, keys, d, n, h->scale, ds, cols, f->x, d, 1, to->dk, r.ld);
        srf__gemm(h->ctx, true, false, keys, d, n, 1, p, cols, f->g, d, 1, to->dv, r.ld);
        beta = 1;
    }
    if (!attn_is_empty(far)) far_queries(h, f, far, f->aq, f->sum, f->x, &r, n, 1);
}

static void hybrid_bwd(const struct attn_head *h, const struct bwd_scratch *f, int64_t window,
                       const struct rows *all, int64_t n_tokens)
{
    int64_t m = h->m, blocks = (n_tokens + window - 1) / window;
    /* The state that block j's queries read: blocks up to j - 2. */
    for (int64_t block = 0; block + 2 < blocks; block++) {
        struct attn_state st = state_i(h, f, block + 1), next = state_i(h, f, block + 2);
        copy_state(h, &next, &st);
        for (int64_t s = 0; s < window; s += ATTN_CHUNK) {
            int64_t n = attn_min(ATTN_CHUNK, window - s);
            struct rows r = rows_at(all, block * window + s);
            srf__attn_load(h, r.k, r.ld, n, f->y, f->half);
            srf__attn_features(h, f->y, f->half, 0, n, f->ak);
            srf__attn_absorb(h, &next, f->ak, r.v, r.ld, n, &f->ch);
        }
    }
    /* dk, dv of the last two blocks; others begin with what is read through the state. */
    for (int64_t t = attn_max(blocks - 2, 0) * window; t < n_tokens; t++) {
        memset(all->dk + t * all->ld, 0, (size_t)h->d * sizeof(real));
        memset(all->dv + t * all->ld, 0, (size_t)h->d * sizeof(real));
    }
    for (int64_t block = blocks - 1; block >= 0; block--) {
        int64_t first = block * window, len = attn_min(window, n_tokens - first);
        struct attn_block_pair pair = {{f->y_block[0], f->y_block[1]}, {block ? window : 0, len}};
        struct attn_state far = state_i(h, f, block);
        struct rows cur = rows_at(all, first), prev = rows_at(all, first - pair.n[0]);
        srf__attn_load(h, cur.k, cur.ld, len, f->y_block[1], f->half_block);
        if (block) srf__attn_load(h, prev.k, prev.ld, window, f->y_block[0], f->half_block);
        for (int64_t row = 0; row < len; row += ATTN_CHUNK)
            window_bwd(h, f, &pair, &far, &prev, &cur, row, attn_min(ATTN_CHUNK, len - row));
        if (block < 2) continue;
        /* R, u hold the queries that see block - 2 through the state. */
        struct attn_state before = state_i(h, f, block - 1);
        for (int64_t s = 0; s < window; s += ATTN_CHUNK) {
            int64_t n = attn_min(ATTN_CHUNK, window - s);
            struct rows r = rows_at(all, first - 2 * window + s);
            srf__attn_load(h, r.k, r.ld, n, f->y, f->half);
            srf__attn_features(h, f->y, f->half, 0, n, f->ak);
            far_keys(h, f, far.top, f->ak, f->y, &r, n);
        }
        if (attn_is_empty(&before)) continue;
        for (int64_t i = 0; i < m; i++) f->ch.step[i] = srf__pow2(before.top[i] - far.top[i]);
        step_back(h, f, f->ch.step);
    }
}

/* ---- the op ---------------------------------------------------------------------------------- */

static size_t thread_bytes(const struct srf_attn_shape *s)
{
    struct attn_bump b = {0};
    carve(&b, s);
    return b.used;
}

size_t SRF_CPU(srf_attn_bwd_workspace)(const struct srf_ctx *ctx,
                                       const struct srf_srf_attn_bwd_args *a)
{
    size_t dw = a->dw ? (size_t)(a->s.n_sets * a->s.m * a->s.d) * sizeof(real) : 0;
    return (size_t)ctx->n_threads * (thread_bytes(&a->s) + dw);
}

static void head_bwd(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a, int64_t i,
                     void *scratch, real *dw)
{
    const struct srf_attn_shape *s = &a->s;
    struct attn_bump bump = {scratch, 0};
    struct bwd_scratch f = carve(&bump, s);
    struct attn_head h = attn_head_of(ctx, s, a->w, a->bias, i % s->h);
    f.dw = dw && s->n_sets > 1 ? dw + i % s->h * s->m * s->d : dw;
    int64_t in = i / s->h * s->t * a->ld + i % s->h * s->d;
    int64_t out = i / s->h * s->t * a->ld_o + i % s->h * s->d;
    struct rows r = {(const real *)a->q + in,
                     (const real *)a->k + in,
                     (const real *)a->v + in,
                     (const real *)a->o + out,
                     (const real *)a->d_o + out,
                     (real *)a->dq + in,
                     (real *)a->dk + in,
                     (real *)a->dv + in,
                     a->ld,
                     a->ld_o};
    /* The state before a sequence, and in the hybrid those of its first two blocks: empty. */
    memset(f.states, 0, (size_t)(attn_min(n_states(s), 2) * s->m * (s->d + 2)) * sizeof(real));
    memset(f.r, 0, (size_t)(s->m * s->d) * sizeof(real));
    memset(f.u, 0, (size_t)s->m * sizeof(real));
    if (s->causal && s->window == 0) {
        pure_bwd(&h, &f, &r, s->t);
        return;
    }
    if (s->window)
        hybrid_bwd(&h, &f, s->window, &r, s->t);
    else
        noncausal_bwd(&h, &f, &r, s->t);
}

srf_status SRF_CPU(srf_attn_bwd)(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    SRF_TRY(srf__attn_check(s, a->ld, a->ld_o));
    if (s->b * s->t == 0) return SRF_OK;
    size_t bytes = thread_bytes(s);
    int64_t n_dw = a->dw ? s->n_sets * s->m * s->d : 0;
    real *dws = (real *)((char *)ctx->workspace + (size_t)ctx->n_threads * bytes);
    memset(dws, 0, (size_t)(n_dw * ctx->n_threads) * sizeof(real));
    srf__blas_serial_begin(ctx);
#pragma omp parallel for schedule(static) num_threads(ctx->n_threads)
    for (int64_t i = 0; i < s->b * s->h; i++) {
        int thread = omp_get_thread_num();
        head_bwd(ctx, a, i, (char *)ctx->workspace + (size_t)thread * bytes,
                 a->dw ? dws + thread * n_dw : NULL);
    }
    srf__blas_serial_end(ctx);
    for (int thread = 0; thread < ctx->n_threads; thread++)
        for (int64_t i = 0; i < n_dw; i++) ((real *)a->dw)[i] += dws[thread * n_dw + i];
    return SRF_OK;
}
