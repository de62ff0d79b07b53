/* AdamW (arXiv 1711.05101) with clipping by the global norm, as ops.h has it.
 *
 * The bias corrections are folded into two factors of the step:
 *     p -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps) + lr weight_decay p
 * Floor: memory; param, m and v are updated, grad is read. */
#include "kernels/cpu/split.h"

srf_status SRF_CPU(adamw)(struct srf_ctx *ctx, const struct srf_adamw_args *a)
{
    if (a->n == 0) return SRF_OK;
    SRF_FAIL_IF(a->step < 1, SRF_INVALID, "adamw: step %lld, expected >= 1", (long long)a->step);
    SRF_FAIL_IF(a->master, SRF_INVALID, "adamw: a master copy goes with bf16 parameters only");
    double factor = a->grad_scale;
    if (a->clip_sumsq) {
        double sumsq = (double)*(const real *)a->clip_sumsq;
        bool skip = !isfinite(sumsq);
        if (a->skips) {
            int32_t *skips = a->skips;
            skips[0] += skip;
            skips[1] = skip ? skips[1] + 1 : 0;
        }
        if (skip) return SRF_OK;
        double norm = sqrt(sumsq) * fabs(a->grad_scale);
        if (norm > a->max_norm) factor *= a->max_norm / norm;
    }
    real scale = (real)factor, b1 = (real)a->beta1, b2 = (real)a->beta2;
    real c1 = (real)(1 - a->beta1), c2 = (real)(1 - a->beta2), eps = (real)a->eps;
    real rate = (real)(a->lr / (1 - pow(a->beta1, (double)a->step)));
    real root = (real)(1 / sqrt(1 - pow(a->beta2, (double)a->step)));
    real keep = (real)(1 - a->lr * a->weight_decay);
    const uint8_t *no_decay = a->no_decay;
    const real *grad = a->grad;
    real *param = a->param, *m = a->m, *v = a->v;
#pragma omp parallel for simd schedule(static) num_threads(ctx->n_threads) if (a->n > MIN_PARALLEL)
    for (int64_t i = 0; i < a->n; i++) {
        real g = grad[i] * scale;
        real mi = b1 * m[i] + c1 * g, vi = b2 * v[i] + c2 * g * g;
        m[i] = mi;
        v[i] = vi;
        real kept = no_decay && no_decay[i / 64] ? 1 : keep;
        param[i] = kept * param[i] - rate * mi / (sqrt(vi) * root + eps);
    }
    return SRF_OK;
}

size_t SRF_CPU(adamw_workspace)(const struct srf_ctx *ctx, const struct srf_adamw_args *a)
{
    (void)ctx;
    (void)a;
    return 0;
}
