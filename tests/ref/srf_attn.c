#include "tests/ref/attn.h"

#include <math.h>

/* One head of one sequence, with everything of its queries and keys that weights are made of. */
struct head {
    const struct srf_attn_shape *s;
    const double *w;   /* (m, d) */
    double *x, *y;     /* (t, d): scaled */
    double *a_q, *a_k; /* (t, m): w_i.x + bias_i - |x|^2/2 */
    double *log_w;     /* (t): of one query, log P_ts by key, then P_ts / sum P_ts */
};

static double *reals(int64_t n)
{
    return srf__alloc((size_t)n, sizeof(double));
}

static double dot(const double *a, const double *b, int64_t n)
{
    double sum = 0;
    for (int64_t j = 0; j < n; j++) sum += a[j] * b[j];
    return sum;
}

static void scaled(const double *in, int64_t ld, const struct srf_attn_shape *s, double *out)
{
    for (int64_t t = 0; t < s->t; t++)
        for (int64_t j = 0; j < s->d; j++) out[t * s->d + j] = in[t * ld + j] * pow(s->d, -0.25);
}

static void exponents(const struct head *h, const double *x, const double *bias, double *a)
{
    int64_t m = h->s->m, d = h->s->d;
    for (int64_t t = 0; t < h->s->t; t++)
        for (int64_t i = 0; i < m; i++)
            a[t * m + i] =
                dot(h->w + i * d, x + t * d, d) + bias[i] - dot(x + t * d, x + t * d, d) / 2;
}

/* q, k: row 0 of this head. */
static struct head head_new(const struct srf_attn_shape *s, const double *q, const double *k,
                            int64_t ld, const double *w, const double *bias)
{
    struct head h = {.s = s, .w = w};
    h.x = reals(s->t * s->d);
    h.y = reals(s->t * s->d);
    h.a_q = reals(s->t * s->m);
    h.a_k = reals(s->t * s->m);
    h.log_w = reals(s->t);
    scaled(q, ld, s, h.x);
    scaled(k, ld, s, h.y);
    exponents(&h, h.x, bias, h.a_q);
    exponents(&h, h.y, bias, h.a_k);
    return h;
}

static void head_free(struct head *h)
{
    srf__free(h->x);
    srf__free(h->y);
    srf__free(h->a_q);
    srf__free(h->a_k);
    srf__free(h->log_w);
}

static bool is_exact(const struct head *h, int64_t t, int64_t s)
{
    return h->s->window && s / h->s->window + 1 >= t / h->s->window;
}

/* log of 1/m sum_i exp(a_i(x_t) + a_i(y_s)), or x_t.y_s */
static double log_weight(const struct head *h, int64_t t, int64_t s)
{
    int64_t m = h->s->m, d = h->s->d;
    const double *q = h->a_q + t * m, *k = h->a_k + s * m;
    if (is_exact(h, t, s)) return dot(h->x + t * d, h->y + s * d, d);
    double most = -INFINITY, sum = 0;
    for (int64_t i = 0; i < m; i++) most = q[i] + k[i] > most ? q[i] + k[i] : most;
    for (int64_t i = 0; i < m; i++) sum += exp(q[i] + k[i] - most);
    return most + log(sum) - log((double)m);
}

/* Normalised weights of query t into h->log_w; returns the number of its keys and, in lse, the log
 * of the normaliser. */
static int64_t weights(const struct head *h, int64_t t, double *lse)
{
    int64_t n = h->s->causal ? t + 1 : h->s->t;
    double most = -INFINITY, sum = 0;
    for (int64_t s = 0; s < n; s++) {
        h->log_w[s] = log_weight(h, t, s);
        most = fmax(most, h->log_w[s]);
    }
    for (int64_t s = 0; s < n; s++) sum += exp(h->log_w[s] - most);
    *lse = most + log(sum);
    for (int64_t s = 0; s < n; s++) h->log_w[s] = exp(h->log_w[s] - most) / sum;
    return n;
}

void ref_srf_attn_fwd(const struct srf_srf_attn_fwd_args *a)
{
    const struct srf_attn_shape *s = &a->s;
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < s->b * s->h; i++) {
        int64_t set = s->n_sets == 1 ? 0 : i % s->h;
        int64_t in = i / s->h * s->t * a->ld + i % s->h * s->d;
        double *o = (double *)a->o + i / s->h * s->t * a->ld_o + i % s->h * s->d, lse;
        const double *v = (const double *)a->v + in;
        struct head h = head_new(s, (const double *)a->q + in, (const double *)a->k + in, a->ld,
                                 (const double *)a->w + set * s->m * s->d,
                                 (const double *)a->bias + set * s->m);
        for (int64_t t = 0; t < s->t; t++) {
            int64_t n = weights(&h, t, &lse);
            double *row = o + t * a->ld_o;
            for (int64_t j = 0; j < s->d; j++) row[j] = 0;
            for (int64_t k = 0; k < n; k++)
                for (int64_t j = 0; j < s->d; j++) row[j] += h.log_w[k] * v[k * a->ld + j];
        }
        head_free(&h);
    }
}

/* dx = W^T da - (sum_i da_i) x; dw += da^T x */
static void exponents_bwd(const struct head *h, const double *x, const double *da, double *dx,
                          double *dw)
{
    int64_t m = h->s->m, d = h->s->d;
    for (int64_t t = 0; t < h->s->t; t++)
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < d; j++) {
                double da_ti = da[t * m + i];
                dx[t * d + j] += da_ti * (h->w[i * d + j] - x[t * d + j]);
                if (dw) dw[i * d + j] += da_ti * x[t * d + j];
            }
}

static void head_bwd(const struct srf_srf_attn_bwd_args *a, const struct head *h, int64_t in,
                     int64_t out, double *dw)
{
    int64_t m = h->s->m, d = h->s->d, t_len = h->s->t;
    const double *v = (const double *)a->v + in, *d_o_all = (const double *)a->d_o + out;
    double *dv = (double *)a->dv + in, log_m = log((double)m), lse;
    double *dx = srf__calloc((size_t)(t_len * d), sizeof *dx);
    double *dy = srf__calloc((size_t)(t_len * d), sizeof *dy);
    double *da_q = srf__calloc((size_t)(t_len * m), sizeof *da_q);
    double *da_k = srf__calloc((size_t)(t_len * m), sizeof *da_k);
    for (int64_t t = 0; t < t_len; t++)
        for (int64_t j = 0; j < d; j++) dv[t * a->ld + j] = 0;
    for (int64_t t = 0; t < t_len; t++) {
        const double *d_o = d_o_all + t * a->ld_o;
        int64_t n = weights(h, t, &lse);
        double mean = 0; /* d_o.o */
        for (int64_t s = 0; s < n; s++) mean += h->log_w[s] * dot(d_o, v + s * a->ld, d);
        for (int64_t s = 0; s < n; s++) {
            double by = dot(d_o, v + s * a->ld, d) - mean;
            for (int64_t j = 0; j < d; j++) dv[s * a->ld + j] += h->log_w[s] * d_o[j];
            if (is_exact(h, t, s)) {
                for (int64_t j = 0; j < d; j++) {
                    dx[t * d + j] += h->log_w[s] * by * h->y[s * d + j];
                    dy[s * d + j] += h->log_w[s] * by * h->x[t * d + j];
                }
                continue;
            }
            for (int64_t i = 0; i < m; i++) {
                double e = h->a_q[t * m + i] + h->a_k[s * m + i] - log_m - lse, p = exp(e);
                da_q[t * m + i] += p * by;
                da_k[s * m + i] += p * by;
            }
        }
    }
    exponents_bwd(h, h->x, da_q, dx, dw);
    exponents_bwd(h, h->y, da_k, dy, dw);
    scaled(dx, d, h->s, dx);
    scaled(dy, d, h->s, dy);
    for (int64_t t = 0; t < t_len; t++)
        for (int64_t j = 0; j < d; j++) {
            ((double *)a->dq)[in + t * a->ld + j] = dx[t * d + j];
            ((double *)a->dk)[in + t * a->ld + j] = dy[t * d + j];
        }
    srf__free(dx);
    srf__free(dy);
    srf__free(da_q);
    srf__free(da_k);
}

void ref_srf_attn_bwd(const struct srf_srf_attn_bwd_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    bool apart = s->n_sets > 1 || !a->dw; /* heads do not add to the same dw */
#pragma omp parallel for schedule(dynamic) if (apart)
    for (int64_t i = 0; i < s->h; i++)
        for (int64_t b = 0; b < s->b; b++) {
            int64_t set = s->n_sets == 1 ? 0 : i;
            int64_t in = b * s->t * a->ld + i * s->d, out = b * s->t * a->ld_o + i * s->d;
            struct head h = head_new(s, (const double *)a->q + in, (const double *)a->k + in, a->ld,
                                     (const double *)a->w + set * s->m * s->d,
                                     (const double *)a->bias + set * s->m);
            head_bwd(a, &h, in, out, a->dw ? (double *)a->dw + set * s->m * s->d : NULL);
            head_free(&h);
        }
}
