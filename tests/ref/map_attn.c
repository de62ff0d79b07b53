#include "tests/ref/attn.h"

#include <math.h>

/* The features of x (d), f (m), with a head's w (m, d + 1): a query's, or a key's. */
static void features(const struct srf_attn_shape *s, enum srf_map_kind map, bool key,
                     const double *w, const double *x, double *f)
{
    int64_t d = s->d, r = map == SRF_MAP_T2R ? s->m : s->m / 2, ld = d + 1;
    double plus = 0, minus = 0;
    if (map == SRF_MAP_HEDGEHOG && key) w += r * ld;
    for (int64_t i = 0; i < r; i++) {
        double u = 0;
        for (int64_t j = 0; j < d; j++) u += w[i * ld + j] * x[j];
        if (map == SRF_MAP_T2R) {
            f[i] = fmax(u + w[i * ld + d], 0);
            continue;
        }
        f[i] = exp(u);
        f[r + i] = exp(-u);
        plus += f[i];
        minus += f[r + i];
    }
    for (int64_t i = 0; i < r && map == SRF_MAP_HEDGEHOG; i++) {
        f[i] *= exp(w[i * ld + d]) / plus;
        f[r + i] *= exp(w[i * ld + d]) / minus;
    }
}

/* df (m) -> dx (d) +=, dw +=. */
static void features_bwd(const struct srf_attn_shape *s, enum srf_map_kind map, bool key,
                         const double *w, const double *x, const double *f, const double *df,
                         double *dx, double *dw)
{
    int64_t d = s->d, r = map == SRF_MAP_T2R ? s->m : s->m / 2, ld = d + 1;
    double plus = 0, minus = 0;
    if (map == SRF_MAP_HEDGEHOG && key) {
        w += r * ld;
        dw += r * ld;
    }
    for (int64_t i = 0; i < r && map == SRF_MAP_HEDGEHOG; i++) {
        plus += f[i] * df[i];
        minus += f[r + i] * df[r + i];
    }
    for (int64_t i = 0; i < r; i++) {
        double du, dc, c = w[i * ld + d];
        if (map == SRF_MAP_T2R) {
            du = dc = f[i] > 0 ? df[i] : 0;
        } else {
            du = f[i] * df[i] - f[i] / exp(c) * plus;
            du -= f[r + i] * df[r + i] - f[r + i] / exp(c) * minus;
            dc = f[i] * df[i] + f[r + i] * df[r + i];
        }
        for (int64_t j = 0; j < d; j++) {
            dx[j] += du * w[i * ld + j];
            dw[i * ld + j] += du * x[j];
        }
        dw[i * ld + d] += dc;
    }
}

/* What both passes walk over: one head of one sequence. */
struct head {
    const struct srf_attn_shape *s;
    const double *q, *k, *v;
    int64_t ld;
    double *fq, *fk; /* (t, m) */
    double *p;       /* (t): a row's weights */
};

/* First key that row t attends to exactly. */
static int64_t near_of(const struct srf_attn_shape *s, int64_t t)
{
    if (s->window == 0) return t + 1;
    int64_t block = t / s->window;
    return block > 0 ? (block - 1) * s->window : 0;
}

/* Weights of row t over its denominator, of which the log is returned. Logarithms of exact ones go
 * up to any size: the largest is taken out. */
static double weights(const struct head *h, int64_t t)
{
    const struct srf_attn_shape *s = h->s;
    int64_t near = near_of(s, t);
    double most = -INFINITY, sum = 0;
    for (int64_t i = 0; i <= t; i++) {
        double x = 0;
        if (i < near) {
            for (int64_t j = 0; j < s->m; j++) x += h->fq[t * s->m + j] * h->fk[i * s->m + j];
            x = log(x);
        } else {
            for (int64_t j = 0; j < s->d; j++) x += h->q[t * h->ld + j] * h->k[i * h->ld + j];
            x /= sqrt((double)s->d);
        }
        h->p[i] = x;
        most = fmax(most, x);
    }
    if (s->window == 0) most = 0;
    for (int64_t i = 0; i <= t; i++) sum += exp(h->p[i] - most);
    if (s->window == 0) sum += 1e-6;
    for (int64_t i = 0; i <= t; i++) h->p[i] = exp(h->p[i] - most) / sum;
    return most + log(sum);
}

/* Head i of b h, with its features; scratch holds (2 m + 2) t. */
static struct head head_of(const struct srf_attn_shape *s, enum srf_map_kind map, int64_t i,
                           const void *q, const void *k, const void *v, int64_t ld, const void *w,
                           double *scratch)
{
    int64_t at = i / s->h * s->t * ld + i % s->h * s->d;
    struct head h = {.s = s, .ld = ld, .fq = scratch};
    h.q = (const double *)q + at;
    h.k = (const double *)k + at;
    h.v = (const double *)v + at;
    h.fk = h.fq + s->t * s->m;
    h.p = h.fk + s->t * s->m;
    const double *own = (const double *)w + i % s->h * s->m * (s->d + 1);
    for (int64_t t = 0; t < s->t; t++) {
        features(s, map, false, own, h.q + t * ld, h.fq + t * s->m);
        features(s, map, true, own, h.k + t * ld, h.fk + t * s->m);
    }
    return h;
}

void ref_map_attn_fwd(const struct srf_map_attn_fwd_args *a)
{
    const struct srf_attn_shape *s = &a->s;
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < s->b * s->h; i++) {
        double *scratch = srf__calloc((size_t)(s->t * (2 * s->m + 2) + 1), sizeof *scratch);
        struct head h = head_of(s, a->map, i, a->q, a->k, a->v, a->ld, a->w, scratch);
        double *o = (double *)a->o + i / s->h * s->t * a->ld_o + i % s->h * s->d;
        for (int64_t t = 0; t < s->t; t++) {
            double lse = weights(&h, t);
            if (a->stat) ((double *)a->stat)[i * s->t + t] = lse;
            double *row = o + t * a->ld_o;
            for (int64_t j = 0; j < s->d; j++) row[j] = 0;
            for (int64_t n = 0; n <= t; n++)
                for (int64_t j = 0; j < s->d; j++) row[j] += h.p[n] * h.v[n * a->ld + j];
        }
        srf__free(scratch);
    }
}

void ref_map_attn_bwd(const struct srf_map_attn_bwd_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    int64_t m = s->m, d = s->d, t_len = s->t;
    double scale = 1 / sqrt((double)d);
    double *scratch = srf__calloc((size_t)(t_len * (2 * m + 2) + 1), sizeof *scratch);
    double *df = srf__alloc((size_t)(2 * t_len * m + 1), sizeof *df), *dp = scratch;
    dp += t_len * (2 * m + 1);
    for (int64_t i = 0; i < s->b * s->h; i++) {
        struct head h = head_of(s, a->map, i, a->q, a->k, a->v, a->ld, a->w, scratch);
        int64_t in = i / s->h * t_len * a->ld + i % s->h * d;
        const double *d_o = (const double *)a->d_o + i / s->h * t_len * a->ld_o + i % s->h * d;
        const double *w = (const double *)a->w + i % s->h * m * (d + 1);
        double *dq = (double *)a->dq + in, *dk = (double *)a->dk + in, *dv = (double *)a->dv + in;
        double *dw = (double *)a->dw + i % s->h * m * (d + 1), *dfq = df, *dfk = df + t_len * m;
        for (int64_t n = 0; n < 2 * t_len * m; n++) df[n] = 0;
        for (int64_t t = 0; t < t_len; t++)
            for (int64_t j = 0; j < d; j++)
                dq[t * a->ld + j] = dk[t * a->ld + j] = dv[t * a->ld + j] = 0;
        for (int64_t t = 0; t < t_len; t++) {
            double part = exp(-weights(&h, t)), mean = 0;
            for (int64_t n = 0; n <= t; n++) {
                dp[n] = 0;
                for (int64_t j = 0; j < d; j++) dp[n] += d_o[t * a->ld_o + j] * h.v[n * a->ld + j];
                mean += h.p[n] * dp[n];
            }
            for (int64_t n = 0; n <= t; n++) {
                for (int64_t j = 0; j < d; j++) dv[n * a->ld + j] += h.p[n] * d_o[t * a->ld_o + j];
                double ds = dp[n] - mean;
                for (int64_t j = 0; j < m && n < near_of(s, t); j++) {
                    dfq[t * m + j] += ds * part * h.fk[n * m + j];
                    dfk[n * m + j] += ds * part * h.fq[t * m + j];
                }
                for (int64_t j = 0; j < d && n >= near_of(s, t); j++) {
                    dq[t * a->ld + j] += h.p[n] * ds * scale * h.k[n * a->ld + j];
                    dk[n * a->ld + j] += h.p[n] * ds * scale * h.q[t * a->ld + j];
                }
            }
        }
        for (int64_t t = 0; t < t_len; t++) {
            features_bwd(s, a->map, false, w, h.q + t * a->ld, h.fq + t * m, dfq + t * m,
                         dq + t * a->ld, dw);
            features_bwd(s, a->map, true, w, h.k + t * a->ld, h.fk + t * m, dfk + t * m,
                         dk + t * a->ld, dw);
        }
    }
    srf__free(scratch);
    srf__free(df);
}
