#include "tests/ref/dense.h"

#include <math.h>

void ref_sumsq(const struct srf_sumsq_args *a)
{
    for (int64_t i = 0; i < a->n; i++)
        *(double *)a->sum += ((const double *)a->x)[i] * ((const double *)a->x)[i];
}

void ref_adamw(const struct srf_adamw_args *a)
{
    double *p = a->param, *m = a->m, *v = a->v, clip = 1;
    if (a->clip_sumsq) {
        double norm = sqrt(*(const double *)a->clip_sumsq) * a->grad_scale;
        int32_t *skips = a->skips;
        if (skips) {
            skips[0] += !isfinite(norm);
            skips[1] = isfinite(norm) ? 0 : skips[1] + 1;
        }
        if (!isfinite(norm)) return;
        clip = fmin(1, a->max_norm / norm);
    }
    for (int64_t i = 0; i < a->n; i++) {
        double g = ((const double *)a->grad)[i] * a->grad_scale * clip;
        m[i] = a->beta1 * m[i] + (1 - a->beta1) * g;
        v[i] = a->beta2 * v[i] + (1 - a->beta2) * g * g;
        double mh = m[i] / (1 - pow(a->beta1, (double)a->step));
        double vh = v[i] / (1 - pow(a->beta2, (double)a->step));
        bool decays = !a->no_decay || !((const uint8_t *)a->no_decay)[i / 64];
        p[i] -= a->lr * (mh / (sqrt(vh) + a->eps) + (decays ? a->weight_decay * p[i] : 0));
    }
}
