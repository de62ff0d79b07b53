#include "tests/ref/dense.h"

#include <math.h>

static double largest(const double *x, int64_t v)
{
    double max = -INFINITY;
    for (int64_t j = 0; j < v; j++) max = fmax(max, x[j]);
    return max;
}

/* log sum exp(x - max) */
static double log_sum(const double *x, double max, int64_t v)
{
    double sum = 0;
    for (int64_t j = 0; j < v; j++) sum += exp(x[j] - max);
    return log(sum);
}

/* dlogits may be logits: each element is read before it is written, its row's sums before that. */
void ref_xent(const struct srf_xent_args *a)
{
    int64_t ld = a->ld ? a->ld : a->v;
    for (int64_t i = 0; i < a->n; i++) {
        const double *x = (const double *)a->logits + i * ld;
        const double *t = a->teacher ? (const double *)a->teacher + i * ld : NULL;
        double *dx = a->dlogits ? (double *)a->dlogits + i * ld : NULL;
        int32_t target = ((const int32_t *)a->targets)[i];
        bool counts = target >= 0;
        double max = largest(x, a->v), log_z = log_sum(x, max, a->v), kl = 0;
        double max_t = t ? largest(t, a->v) : 0, log_zt = t ? log_sum(t, max_t, a->v) : 0;
        ((double *)a->nll)[i] = counts ? log_z - (x[target] - max) : 0;
        for (int64_t j = 0; j < a->v; j++) {
            double log_p = x[j] - max - log_z, p = exp(log_p);
            double d = a->ce_weight * (p - (j == target));
            if (t) {
                double log_pt = t[j] - max_t - log_zt, pt = exp(log_pt);
                d += a->kl_weight * (p - pt);
                if (pt > 0) kl += pt * (log_pt - log_p);
            }
            if (dx) dx[j] = counts ? a->scale * d : 0;
        }
        for (int64_t j = a->v; j < ld && dx; j++) dx[j] = 0;
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

void ref_head_loss(const struct srf_head_loss_args *a)
{
    for (int64_t i = 0; i < a->n; i++) {
        const double *x = (const double *)a->x + i * a->c, *w = a->w;
        double *logits = (double *)a->logits + i * a->ld, *nll = (double *)a->nll + i;
        double *dx = (double *)a->dx + i * a->c, *dw = a->dw;
        int32_t target = ((const int32_t *)a->targets)[i];
        for (int64_t k = 0; k < a->c; k++) dx[k] = 0;
        *nll = 0;
        if (target < 0) continue;
        for (int64_t j = 0; j < a->v; j++) {
            logits[j] = 0;
            for (int64_t k = 0; k < a->c; k++) logits[j] += x[k] * w[j * a->c + k];
        }
        double max = largest(logits, a->v), log_z = log_sum(logits, max, a->v);
        *nll = log_z - (logits[target] - max);
        for (int64_t j = 0; j < a->v; j++) {
            double d = a->scale * a->ce_weight * (exp(logits[j] - max - log_z) - (j == target));
            for (int64_t k = 0; k < a->c; k++) {
                dx[k] += d * w[j * a->c + k];
                dw[j * a->c + k] += d * x[k];
            }
        }
    }
}
