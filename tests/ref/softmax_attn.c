#include "tests/ref/attn.h"

#include <math.h>

/* Element offsets of row t of sequence b, head h. */
static int64_t at(int64_t b, int64_t t, int64_t h, int64_t t_len, int64_t d, int64_t ld)
{
    return (b * t_len + t) * ld + h * d;
}

static double score(const double *q, const double *k, int64_t d)
{
    double sum = 0;
    for (int64_t j = 0; j < d; j++) sum += q[j] * k[j];
    return sum / sqrt((double)d);
}

/* p (n) = softmax of row t's scores over those of its n keys that it sees; returns their
 * log-sum-exp. The latest `window` are seen and the first `sinks`; window 0: all. */
static double weights(const double *q, const double *k, int64_t ld, int64_t n, int64_t d,
                      int64_t window, int64_t sinks, double *p)
{
    double most = -INFINITY, sum = 0;
    for (int64_t s = 0; s < n; s++) {
        bool seen = window == 0 || s < sinks || s >= n - window;
        p[s] = seen ? score(q, k + s * ld, d) : -INFINITY;
        most = fmax(most, p[s]);
    }
    for (int64_t s = 0; s < n; s++) sum += exp(p[s] - most);
    for (int64_t s = 0; s < n; s++) p[s] = exp(p[s] - most) / sum;
    return most + log(sum);
}

void ref_softmax_attn_fwd(const struct srf_softmax_attn_fwd_args *a)
{
    const double *q = a->q, *k = a->k, *v = a->v;
#pragma omp parallel for schedule(dynamic, 16)
    for (int64_t i = 0; i < a->b * a->h * a->t; i++) {
        double *p = srf__alloc((size_t)a->t, sizeof *p);
        int64_t b = i / (a->h * a->t), h = i / a->t % a->h, t = i % a->t;
        int64_t first = at(b, 0, h, a->t, a->d, a->ld), n = a->causal ? t + 1 : a->t;
        double lse =
            weights(q + first + t * a->ld, k + first, a->ld, n, a->d, a->window, a->sinks, p);
        double *o = (double *)a->o + at(b, t, h, a->t, a->d, a->ld_o);
        if (a->lse) ((double *)a->lse)[i] = lse;
        for (int64_t j = 0; j < a->d; j++) o[j] = 0;
        for (int64_t s = 0; s < n; s++)
            for (int64_t j = 0; j < a->d; j++) o[j] += p[s] * v[first + s * a->ld + j];
        srf__free(p);
    }
}

/* Head h of sequence b. */
static void head_bwd(const struct srf_softmax_attn_bwd_args *a, int64_t b, int64_t h)
{
    const double *q = a->q, *k = a->k, *v = a->v;
    double *dq = a->dq, *dk = a->dk, *dv = a->dv, scale = 1 / sqrt((double)a->d);
    double *p = srf__alloc((size_t)a->t, sizeof *p), *dp = srf__alloc((size_t)a->t, sizeof *dp);
    int64_t first = at(b, 0, h, a->t, a->d, a->ld);
    for (int64_t t = 0; t < a->t; t++)
        for (int64_t j = first + t * a->ld; j < first + t * a->ld + a->d; j++)
            dq[j] = dk[j] = dv[j] = 0;
    for (int64_t t = 0; t < a->t; t++) {
        int64_t n = a->causal ? t + 1 : a->t;
        int64_t row = first + t * a->ld;
        const double *d_o = (const double *)a->d_o + at(b, t, h, a->t, a->d, a->ld_o);
        double mean = 0;
        weights(q + row, k + first, a->ld, n, a->d, a->window, a->sinks, p);
        for (int64_t s = 0; s < n; s++) {
            dp[s] = 0;
            for (int64_t j = 0; j < a->d; j++) dp[s] += d_o[j] * v[first + s * a->ld + j];
            mean += p[s] * dp[s];
        }
        for (int64_t s = 0; s < n; s++) {
            double ds = p[s] * (dp[s] - mean) * scale;
            int64_t key = first + s * a->ld;
            for (int64_t j = 0; j < a->d; j++) {
                dq[row + j] += ds * k[key + j];
                dk[key + j] += ds * q[row + j];
                dv[key + j] += p[s] * d_o[j];
            }
        }
    }
    srf__free(p);
    srf__free(dp);
}

void ref_softmax_attn_bwd(const struct srf_softmax_attn_bwd_args *a)
{
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < a->b * a->h; i++) head_bwd(a, i / a->h, i % a->h);
}
