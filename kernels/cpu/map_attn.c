/* Linear attention with trained feature maps (kernels/ops.h), quadratic as softmax attention is:
 * what it is compared with has a recurrent form, this only has to say how good it gets.
 *
 * Far keys have weights f(q).g(k), near ones exp(q.k / sqrt(d)); a row takes its far part first and
 * goes on from there as online softmax does. Backward with D the row's denominator, P = weight / D:
 *     dv_s = sum_t P_ts d_o_t                e_ts = d_o_t.v_s - d_o_t.o_t
 *     far     df_t = sum_s e_ts g_s / D_t    dg_s = sum_t e_ts f_t / D_t
 *     near    dq_t = sum_s P_ts e_ts k_s / sqrt(d), dk_s alike
 * then through the maps. Parallel over heads: those of all sequences add to one dw.
 */
#include "kernels/cpu/cpu.h"

#define TILE_Q 64
#define TILE_K 512          /* as in softmax_attn.c */
#define EPS    ((real)1e-6) /* of a denominator without exact weights */

static int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* One head of one sequence, and what its thread has. */
struct head {
    struct srf_ctx *ctx;
    const struct srf_attn_shape *s;
    enum srf_map_kind map;
    const real *q, *k, *v, *w; /* w: (m, d + 1) */
    int64_t ld;
    real *fq, *fk;   /* (t, m) */
    real *dfq, *dfk; /* (t, m) */
    real *p, *ds;    /* (TILE_Q, TILE_K), and more: tile_reals */
    real *u;         /* (TILE_Q, m) */
    real *most, *sum;
};

/* Reals of a tile of weights; features of a row at least fit in. */
static int64_t tile_reals(const struct srf_attn_shape *s)
{
    return TILE_Q * TILE_K + s->m;
}

static size_t scratch_reals(const struct srf_attn_shape *s)
{
    return (size_t)(4 * s->t * s->m + 2 * tile_reals(s) + TILE_Q * (s->m + 2));
}

static struct head head_at(struct srf_ctx *ctx, const struct srf_attn_shape *s,
                           enum srf_map_kind map, const void *q, const void *k, const void *v,
                           int64_t ld, const void *w, int64_t b, int64_t i)
{
    int64_t at = b * s->t * ld + i * s->d, values = s->t * s->m;
    struct head h = {.ctx = ctx, .s = s, .map = map, .ld = ld};
    h.q = (const real *)q + at;
    h.k = (const real *)k + at;
    h.v = (const real *)v + at;
    h.w = (const real *)w + i * s->m * (s->d + 1);
    h.fq = (real *)ctx->workspace + (size_t)omp_get_thread_num() * scratch_reals(s);
    h.fk = h.fq + values;
    h.dfq = h.fk + values;
    h.dfk = h.dfq + values;
    h.p = h.dfk + values;
    h.ds = h.p + tile_reals(s);
    h.u = h.ds + tile_reals(s);
    h.most = h.u + TILE_Q * s->m;
    h.sum = h.most + TILE_Q;
    return h;
}

/* Rows of w that a query's features, or a key's, are made of: the first and how many. */
static int64_t rows_of(const struct head *h, bool key, const real **w)
{
    int64_t r = h->map == SRF_MAP_T2R ? h->s->m : h->s->m / 2;
    *w = h->w + (h->map == SRF_MAP_HEDGEHOG && key ? r * (h->s->d + 1) : 0);
    return r;
}

/* p (r) = softmax(sign u) */
static void softmax(const real *u, real sign, int64_t r, real *p)
{
    real most = sign * u[0], sum = 0;
    for (int64_t i = 1; i < r; i++) most = sign * u[i] > most ? sign * u[i] : most;
    for (int64_t i = 0; i < r; i++) {
        p[i] = srf__exp_neg(sign * u[i] - most);
        sum += p[i];
    }
    for (int64_t i = 0; i < r; i++) p[i] /= sum;
}

/* Features f (n, m) of n <= TILE_Q rows of x; h->u keeps w_i.x. Softmaxes are left without their
 * weights e^c if `bare`. */
static void features(const struct head *h, bool key, const real *x, int64_t n, bool bare, real *f)
{
    int64_t d = h->s->d, m = h->s->m, r;
    const real *w;
    r = rows_of(h, key, &w);
    srf__gemm(h->ctx, false, true, n, r, d, 1, x, h->ld, w, d + 1, 0, h->u, r);
    for (int64_t t = 0; t < n; t++) {
        const real *u = h->u + t * r;
        real *own = f + t * m;
        for (int64_t i = 0; i < r && h->map == SRF_MAP_T2R; i++) {
            real y = u[i] + w[i * (d + 1) + d];
            own[i] = y > 0 || y != y ? y : 0;
        }
        if (h->map == SRF_MAP_T2R) continue;
        softmax(u, 1, r, own);
        softmax(u, -1, r, own + r);
        for (int64_t i = 0; i < m && !bare; i++)
            own[i] *= srf__exp2(w[i % r * (d + 1) + d] * REAL_LOG2E);
    }
}

static void all_features(const struct head *h)
{
    const struct srf_attn_shape *s = h->s;
    for (int64_t t0 = 0; t0 < s->t; t0 += TILE_Q) {
        int64_t n = min64(TILE_Q, s->t - t0);
        features(h, false, h->q + t0 * h->ld, n, false, h->fq + t0 * s->m);
        features(h, true, h->k + t0 * h->ld, n, false, h->fk + t0 * s->m);
    }
}

/* First key that token t attends to exactly; all before it are far. */
static int64_t near_of(const struct srf_attn_shape *s, int64_t t)
{
    if (s->window == 0) return t + 1;
    int64_t block = t / s->window;
    return block > 0 ? (block - 1) * s->window : 0;
}

static void fwd_far(const struct head *h, int64_t t0, int64_t n, real *o, int64_t ld_o)
{
    const struct srf_attn_shape *s = h->s;
    int64_t keys = near_of(s, t0 + n - 1), m = s->m, d = s->d;
    for (int64_t t = 0; t < n; t++) {
        h->sum[t] = 0;
        memset(o + t * ld_o, 0, (size_t)d * sizeof(real));
    }
    for (int64_t s0 = 0; s0 < keys; s0 += TILE_K) {
        int64_t c = min64(TILE_K, keys - s0);
        srf__gemm(h->ctx, false, true, n, c, m, 1, h->fq + t0 * m, m, h->fk + s0 * m, m, 0, h->p,
                  c);
        for (int64_t t = 0; t < n; t++) {
            int64_t end = near_of(s, t0 + t) - s0;
            for (int64_t i = end > 0 ? end : 0; i < c; i++) h->p[t * c + i] = 0;
            h->sum[t] += srf__sum(h->p + t * c, c);
        }
        srf__gemm(h->ctx, false, false, n, d, c, 1, h->p, c, h->v + s0 * h->ld, h->ld, 1, o, ld_o);
    }
}

/* Log scale: what is so far has the weight 2^most sum. */
static void fwd_near(const struct head *h, int64_t t0, int64_t n, real *o, int64_t ld_o)
{
    const struct srf_attn_shape *s = h->s;
    int64_t first = near_of(s, t0), d = s->d;
    real scale = REAL_LOG2E / (real)sqrt((double)d);
    for (int64_t t = 0; t < n; t++) {
        h->most[t] = h->sum[t] > 0 ? (real)log2((double)h->sum[t]) : (real)-INFINITY;
        real by = h->sum[t] > 0 ? 1 / h->sum[t] : 0;
        h->sum[t] = h->sum[t] > 0 ? 1 : h->sum[t]; /* 0, or not a number */
        for (int64_t j = 0; j < d; j++) o[t * ld_o + j] *= by;
    }
    for (int64_t s0 = first; s0 < t0 + n; s0 += TILE_K) {
        int64_t c = min64(TILE_K, t0 + n - s0);
        srf__gemm(h->ctx, false, true, n, c, d, scale, h->q + t0 * h->ld, h->ld, h->k + s0 * h->ld,
                  h->ld, 0, h->p, c);
        for (int64_t t = 0; t < n; t++) {
            real *p = h->p + t * c, top = h->most[t], total = 0;
            int64_t from = near_of(s, t0 + t) - s0, end = min64(c, t0 + t + 1 - s0);
            from = from > 0 ? from : 0;
            for (int64_t i = from; i < end; i++) top = p[i] > top ? p[i] : top;
            for (int64_t i = 0; i < c; i++) {
                p[i] = i >= from && i < end ? srf__exp2(p[i] - top) : 0;
                total += p[i];
            }
            if (from >= end) continue;
            real by = srf__exp2(h->most[t] - top);
            h->most[t] = top;
            h->sum[t] = h->sum[t] * by + total;
            for (int64_t j = 0; j < d; j++) o[t * ld_o + j] *= by;
        }
        srf__gemm(h->ctx, false, false, n, d, c, 1, h->p, c, h->v + s0 * h->ld, h->ld, 1, o, ld_o);
    }
}

static void head_fwd(const struct head *h, real *o, int64_t ld_o, real *stat)
{
    const struct srf_attn_shape *s = h->s;
    all_features(h);
    for (int64_t t0 = 0; t0 < s->t; t0 += TILE_Q) {
        int64_t n = min64(TILE_Q, s->t - t0);
        fwd_far(h, t0, n, o + t0 * ld_o, ld_o);
        if (s->window) fwd_near(h, t0, n, o + t0 * ld_o, ld_o);
        for (int64_t t = 0; t < n; t++) {
            real sum = h->sum[t] + (s->window ? 0 : EPS);
            for (int64_t j = 0; j < s->d; j++) o[(t0 + t) * ld_o + j] /= sum;
            if (stat)
                stat[t0 + t] =
                    (real)log((double)sum) + (s->window ? h->most[t] * REAL_LN2 : (real)0);
        }
    }
}

size_t SRF_CPU(map_attn_fwd_workspace)(const struct srf_ctx *ctx,
                                       const struct srf_map_attn_fwd_args *a)
{
    return (size_t)ctx->n_threads * scratch_reals(&a->s) * sizeof(real);
}

srf_status SRF_CPU(map_attn_fwd)(struct srf_ctx *ctx, const struct srf_map_attn_fwd_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    SRF_TRY(srf__map_attn_check(s, a->map, a->ld, a->ld_o));
    srf__blas_serial_begin(ctx);
#pragma omp parallel for schedule(static) num_threads(ctx->n_threads)
    for (int64_t i = 0; i < s->b * s->h; i++) {
        int64_t b = i / s->h, head = i % s->h;
        struct head h = head_at(ctx, s, a->map, a->q, a->k, a->v, a->ld, a->w, b, head);
        head_fwd(&h, (real *)a->o + b * s->t * a->ld_o + head * s->d, a->ld_o,
                 a->stat ? (real *)a->stat + i * s->t : NULL);
    }
    srf__blas_serial_end(ctx);
    return SRF_OK;
}

/* ---- backward -------------------------------------------------------------------------------- */

/* Where one head's outputs and their gradients are. */
struct grads {
    const real *o, *d_o, *stat;
    int64_t ld_o;
    real *dq, *dk, *dv, *dw;
};

/* e^-stat: a denominator below e^-80 counts as that. */
static real over(real stat)
{
    return srf__exp2((stat > -80 || stat != stat ? -stat : 80) * REAL_LOG2E);
}

static void bwd_far(const struct head *h, const struct grads *g, int64_t t0, int64_t n,
                    const real *delta)
{
    const struct srf_attn_shape *s = h->s;
    int64_t keys = near_of(s, t0 + n - 1), m = s->m, d = s->d, ld = h->ld;
    const real *d_o = g->d_o + t0 * g->ld_o, *fq = h->fq + t0 * m;
    for (int64_t s0 = 0; s0 < keys; s0 += TILE_K) {
        int64_t c = min64(TILE_K, keys - s0);
        const real *fk = h->fk + s0 * m;
        srf__gemm(h->ctx, false, true, n, c, m, 1, fq, m, fk, m, 0, h->p, c);
        srf__gemm(h->ctx, false, true, n, c, d, 1, d_o, g->ld_o, h->v + s0 * ld, ld, 0, h->ds, c);
        for (int64_t t = 0; t < n; t++) {
            real *p = h->p + t * c, *ds = h->ds + t * c, by = over(g->stat[t0 + t]);
            int64_t end = near_of(s, t0 + t) - s0;
            for (int64_t i = 0; i < c; i++) {
                p[i] = i < end ? p[i] * by : 0;
                ds[i] = i < end ? (ds[i] - delta[t]) * by : 0;
            }
        }
        srf__gemm(h->ctx, false, false, n, m, c, 1, h->ds, c, fk, m, 1, h->dfq + t0 * m, m);
        srf__gemm(h->ctx, true, false, c, m, n, 1, h->ds, c, fq, m, 1, h->dfk + s0 * m, m);
        srf__gemm(h->ctx, true, false, c, d, n, 1, h->p, c, d_o, g->ld_o, 1, g->dv + s0 * ld, ld);
    }
}

static void bwd_near(const struct head *h, const struct grads *g, int64_t t0, int64_t n,
                     const real *delta)
{
    const struct srf_attn_shape *s = h->s;
    int64_t d = s->d, ld = h->ld;
    const real *d_o = g->d_o + t0 * g->ld_o, *q = h->q + t0 * ld;
    real scale = 1 / (real)sqrt((double)d);
    for (int64_t s0 = near_of(s, t0); s0 < t0 + n; s0 += TILE_K) {
        int64_t c = min64(TILE_K, t0 + n - s0);
        const real *k = h->k + s0 * ld;
        srf__gemm(h->ctx, false, true, n, c, d, scale * REAL_LOG2E, q, ld, k, ld, 0, h->p, c);
        srf__gemm(h->ctx, false, true, n, c, d, 1, d_o, g->ld_o, h->v + s0 * ld, ld, 0, h->ds, c);
        for (int64_t t = 0; t < n; t++) {
            real *p = h->p + t * c, *ds = h->ds + t * c, shift = g->stat[t0 + t] * REAL_LOG2E;
            int64_t from = near_of(s, t0 + t) - s0, end = t0 + t + 1 - s0;
            for (int64_t i = 0; i < c; i++) {
                p[i] = i >= from && i < end ? srf__exp2(p[i] - shift) : 0;
                ds[i] = i >= from && i < end ? scale * p[i] * (ds[i] - delta[t]) : 0;
            }
        }
        srf__gemm(h->ctx, false, false, n, d, c, 1, h->ds, c, k, ld, 1, g->dq + t0 * ld, ld);
        srf__gemm(h->ctx, true, false, c, d, n, 1, h->ds, c, q, ld, 1, g->dk + s0 * ld, ld);
        srf__gemm(h->ctx, true, false, c, d, n, 1, h->p, c, d_o, g->ld_o, 1, g->dv + s0 * ld, ld);
    }
}

/* From the gradient of the features of all rows of x to dx, dw. h->p becomes features again. */
static void bwd_features(const struct head *h, bool key, const real *x, const real *df, real *dx,
                         real *dw)
{
    int64_t m = h->s->m, d = h->s->d, r;
    const real *w;
    r = rows_of(h, key, &w);
    if (dw) dw += w - h->w;
    for (int64_t t0 = 0, n; t0 < h->s->t; t0 += n) {
        /* As many rows as h->p has room for. */
        n = min64(min64(TILE_Q, tile_reals(h->s) / m), h->s->t - t0);
        features(h, key, x + t0 * h->ld, n, true, h->p);
        for (int64_t t = 0; t < n; t++) {
            const real *f = h->p + t * m, *own = df + (t0 + t) * m;
            real *u = h->u + t * r, plus = 0, minus = 0;
            for (int64_t i = 0; i < r && h->map == SRF_MAP_T2R; i++) {
                u[i] = f[i] > 0 ? own[i] : 0;
                if (dw) dw[i * (d + 1) + d] += u[i];
            }
            if (h->map == SRF_MAP_T2R) continue;
            real *weighted = h->ds;
            for (int64_t i = 0; i < m; i++) {
                weighted[i] = own[i] * srf__exp2(w[i % r * (d + 1) + d] * REAL_LOG2E) * f[i];
                if (i < r)
                    plus += weighted[i];
                else
                    minus += weighted[i];
            }
            for (int64_t i = 0; i < r; i++) {
                u[i] = weighted[i] - f[i] * plus - (weighted[r + i] - f[r + i] * minus);
                if (dw) dw[i * (d + 1) + d] += weighted[i] + weighted[r + i];
            }
        }
        srf__gemm(h->ctx, false, false, n, d, r, 1, h->u, r, w, d + 1, 1, dx + t0 * h->ld, h->ld);
        if (dw)
            srf__gemm(h->ctx, true, false, r, d, n, 1, h->u, r, x + t0 * h->ld, h->ld, 1, dw,
                      d + 1);
    }
}

static void head_bwd(const struct head *h, const struct grads *g)
{
    const struct srf_attn_shape *s = h->s;
    int64_t ld = h->ld, d = s->d;
    real *delta = h->sum;
    all_features(h);
    memset(h->dfq, 0, (size_t)(2 * s->t * s->m) * sizeof(real));
    for (int64_t t = 0; t < s->t; t++) {
        memset(g->dq + t * ld, 0, (size_t)d * sizeof(real));
        memset(g->dk + t * ld, 0, (size_t)d * sizeof(real));
        memset(g->dv + t * ld, 0, (size_t)d * sizeof(real));
    }
    for (int64_t t0 = 0; t0 < s->t; t0 += TILE_Q) {
        int64_t n = min64(TILE_Q, s->t - t0);
        for (int64_t t = 0; t < n; t++)
            delta[t] = srf__dot(g->o + (t0 + t) * g->ld_o, g->d_o + (t0 + t) * g->ld_o, d);
        bwd_far(h, g, t0, n, delta);
        if (s->window) bwd_near(h, g, t0, n, delta);
    }
    bwd_features(h, false, h->q, h->dfq, g->dq, g->dw);
    bwd_features(h, true, h->k, h->dfk, g->dk, g->dw);
}

size_t SRF_CPU(map_attn_bwd_workspace)(const struct srf_ctx *ctx,
                                       const struct srf_map_attn_bwd_args *a)
{
    return (size_t)ctx->n_threads * scratch_reals(&a->s) * sizeof(real);
}

srf_status SRF_CPU(map_attn_bwd)(struct srf_ctx *ctx, const struct srf_map_attn_bwd_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    SRF_TRY(srf__map_attn_check(s, a->map, a->ld, a->ld_o));
    srf__blas_serial_begin(ctx);
#pragma omp parallel for schedule(static) num_threads(ctx->n_threads)
    for (int64_t i = 0; i < s->h; i++)
        for (int64_t b = 0; b < s->b; b++) {
            struct head h = head_at(ctx, s, a->map, a->q, a->k, a->v, a->ld, a->w, b, i);
            int64_t in = b * s->t * a->ld + i * s->d, at = b * s->t * a->ld_o + i * s->d;
            struct grads g = {.ld_o = a->ld_o, .stat = (const real *)a->stat};
            g.o = (const real *)a->o + at;
            g.d_o = (const real *)a->d_o + at;
            g.stat += (b * s->h + i) * s->t;
            g.dq = (real *)a->dq + in;
            g.dk = (real *)a->dk + in;
            g.dv = (real *)a->dv + in;
            g.dw = a->dw ? (real *)a->dw + i * s->m * (s->d + 1) : NULL;
            head_bwd(&h, &g);
        }
    srf__blas_serial_end(ctx);
    return SRF_OK;
}
