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
        if (!isfinite(norm)) return;
        clip = fmin(1, a->max_norm / norm);
    }
    for (int64_t i = 0; i < a->n; i++) {
        double g = ((const double *)a->grad)[i] * a->grad_scale * clip;
        m[i] = a->beta1 * m[i] + (1 - a->beta1) * g;
        v[i] = a->beta2 * v[i] + (1 - a->beta2) * g * g;
        double mh = m[i] / (1 - pow(a->beta1, (double)a->step));
        double vh = v[i] / (1 - pow(a->beta2, (double)a->step));
        p[i] -= a->lr * (mh / (sqrt(vh) + a->eps) + a->weight_decay * p[i]);
    }
}
