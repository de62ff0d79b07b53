/* Softmax cross entropy, KL to a teacher, and their gradient.
 *
 * With l' = l - max l and Z = sum exp(l'), and the same with subscript t for the teacher,
 *     nll = log Z - l'[target]
 *     kl  = sum exp(t') (t' - l') / Z_t - (log Z_t - log Z)
 *     dl  = a exp(l') - b exp(t') - c onehot,  a = scale (ce + kl) / Z,  b = scale kl / Z_t
 * so each exponential is computed once: exp(l') goes into the gradient's place, exp(t') into a row
 * of the workspace, and a last loop combines them. Differences of shifted logits keep their
 * precision when a common offset is large. Sums are in T within a block, in double over blocks.
 * Floor: memory; logits and teacher are read once, dlogits written once: a row's loops find it in
 * L2. */
#include "kernels/cpu/split.h"

#define BLOCK 2048 /* of logits, in L1 */

static real row_max(const real *x, int64_t v)
{
    real max = -INFINITY;
#pragma omp simd reduction(max : max)
    for (int64_t j = 0; j < v; j++) max = x[j] > max ? x[j] : max;
    return max; /* NaN is passed over here, and shows in the sum */
}

/* sum exp(x - max); e, if not NULL, gets the terms and may be x. */
static double exp_sum(const real *x, real max, int64_t v, real *e)
{
    double sum = 0;
    for (int64_t begin = 0; begin < v; begin += BLOCK) {
        int64_t end = v - begin < BLOCK ? v : begin + BLOCK;
        real part = 0;
        if (e) {
#pragma omp simd reduction(+ : part)
            for (int64_t j = begin; j < end; j++) {
                real p = srf__exp_neg(x[j] - max);
                e[j] = p;
                part += p;
            }
        } else {
#pragma omp simd reduction(+ : part)
            for (int64_t j = begin; j < end; j++) part += srf__exp_neg(x[j] - max);
        }
        sum += (double)part;
    }
    return sum;
}

/* The teacher's: sum exp(t - max_t), terms into e, and *excess = sum exp(t') (t' - x'). */
static double teacher_sum(const real *t, real max_t, const real *x, real max, int64_t v, real *e,
                          double *excess)
{
    double sum = 0;
    *excess = 0;
    for (int64_t begin = 0; begin < v; begin += BLOCK) {
        int64_t end = v - begin < BLOCK ? v : begin + BLOCK;
        real part = 0, more = 0;
#pragma omp simd reduction(+ : part, more)
        for (int64_t j = begin; j < end; j++) {
            real p = srf__exp_neg(t[j] - max_t);
            e[j] = p;
            part += p;
            /* p = 0 adds nothing, however far apart the logits; NaN is not 0 */
            more += p == 0 ? 0 : p * ((t[j] - max_t) - (x[j] - max));
        }
        sum += (double)part;
        *excess += (double)more;
    }
    return sum;
}

/* scratch: (v) */
static void xent_row(const struct srf_xent_args *a, int64_t i, real *scratch)
{
    int64_t v = a->v;
    int64_t ld = a->ld ? a->ld : v;
    const real *x = (const real *)a->logits + i * ld;
    const real *t = a->teacher ? (const real *)a->teacher + i * ld : NULL;
    real *dx = a->dlogits ? (real *)a->dlogits + i * ld : NULL, *nll = (real *)a->nll + i;
    real *kl = t && a->kl ? (real *)a->kl + i : NULL;
    int32_t target = ((const int32_t *)a->targets)[i];
    if (target < 0) {
        *nll = 0;
        if (kl) *kl = 0;
        if (dx) memset(dx, 0, (size_t)ld * sizeof *dx);
        return;
    }
    real max = row_max(x, v), max_t = t ? row_max(t, v) : 0;
    double excess = 0, z_t = t ? teacher_sum(t, max_t, x, max, v, scratch, &excess) : 1;
    double behind =
        (double)max - (double)x[target]; /* read before dx, which may be x, is written */
    double z = exp_sum(x, max, v, dx);
    *nll = (real)(log(z) + behind);
    if (kl) *kl = (real)(excess / z_t - (log(z_t) - log(z)));
    if (!dx) return;
    memset(dx + v, 0, (size_t)(ld - v) * sizeof *dx);
    double kl_weight = t ? a->kl_weight : 0;
    real px = (real)(a->scale * (a->ce_weight + kl_weight) / z);
    real pt = (real)(a->scale * kl_weight / z_t);
    if (kl_weight != 0) {
#pragma omp simd
        for (int64_t j = 0; j < v; j++) dx[j] = px * dx[j] - pt * scratch[j];
    } else {
#pragma omp simd
        for (int64_t j = 0; j < v; j++) dx[j] *= px;
    }
    dx[target] -= (real)(a->scale * a->ce_weight);
}

srf_status SRF_CPU(xent)(struct srf_ctx *ctx, const struct srf_xent_args *a)
{
    SRF_FAIL_IF(a->n > 0 && a->v < 1, SRF_INVALID, "xent: vocabulary of %lld, expected >= 1",
                (long long)a->v);
    SRF_FAIL_IF(a->ld && a->ld < a->v, SRF_INVALID, "xent: ld %lld, expected >= %lld",
                (long long)a->ld, (long long)a->v);
    int64_t parts = ctx->n_threads, stride = srf__part_stride(a->v);
    real *scratch = ctx->workspace;
#pragma omp parallel for schedule(static)                                                          \
    num_threads(ctx->n_threads) if (a->n * a->v > MIN_PARALLEL)
    for (int64_t part = 0; part < parts; part++) {
        int64_t end = srf__split(a->n, parts, part + 1);
        for (int64_t i = srf__split(a->n, parts, part); i < end; i++)
            xent_row(a, i, a->teacher ? scratch + part * stride : NULL);
    }
    return SRF_OK;
}

size_t SRF_CPU(xent_workspace)(const struct srf_ctx *ctx, const struct srf_xent_args *a)
{
    if (!a->teacher) return 0;
    return (size_t)ctx->n_threads * (size_t)srf__part_stride(a->v) * sizeof(real);
}
