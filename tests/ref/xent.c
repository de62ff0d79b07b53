#include "tests/ref/dense.h"

#include <math.h>

static double logsumexp(const double *x, int64_t v)
{
    double max = -INFINITY, sum = 0;
    for (int64_t j = 0; j < v; j++) max = fmax(max, x[j]);
    for (int64_t j = 0; j < v; j++) sum += exp(x[j] - max);
    return max + log(sum);
}

/* dlogits may be logits: each element is read before it is written, its row's sums before that. */
void ref_xent(const struct srf_xent_args *a)
{
    for (int64_t i = 0; i < a->n; i++) {
        const double *x = (const double *)a->logits + i * a->v;
        const double *t = a->teacher ? (const double *)a->teacher + i * a->v : NULL;
        double *dx = a->dlogits ? (double *)a->dlogits + i * a->v : NULL;
        int32_t target = ((const int32_t *)a->targets)[i];
        bool counts = target >= 0;
        double lse = logsumexp(x, a->v), lse_t = t ? logsumexp(t, a->v) : 0, kl = 0;
        ((double *)a->nll)[i] = counts ? lse - x[target] : 0;
        for (int64_t j = 0; j < a->v; j++) {
            double p = exp(x[j] - lse), d = a->ce_weight * (p - (j == target));
            if (t) {
                double pt = exp(t[j] - lse_t);
                d += a->kl_weight * (p - pt);
                if (pt > 0) kl += pt * ((t[j] - lse_t) - (x[j] - lse));
            }
            if (dx) dx[j] = counts ? a->scale * d : 0;
        }
        if (t && a->kl) ((double *)a->kl)[i] = counts ? kl : 0;
    }
}

void ref_mse(const struct srf_mse_args *a)
{
    const double *x = a->x, *y = a->y;
    for (int64_t i = 0; i < a->n; i++) {
        *(double *)a->sum += (x[i] - y[i]) * (x[i] - y[i]);
        if (a->dx) ((double *)a->dx)[i] += a->scale * 2 * (x[i] - y[i]);
    }
}
