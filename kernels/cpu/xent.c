/* Softmax cross entropy, KL to a teacher, and their gradient.
 *
 * Two passes over a row. The first finds max and sum of exp(l - max) together: a block's maximum,
 * then its exponentials; the sum so far is rescaled when a block raises the maximum. The second
 * writes p = exp(l - max) / sum into the gradient and adds up
 *     kl = sum p_t ((t - max_t - log sum_t) - (l - max - log sum))
 * whose terms keep their precision when both rows carry a common offset. A block is in L1 for its
 * two loops, a row in L2 for its two passes.
 * Floor: memory; logits and teacher are read once, dlogits written once. */
#include "kernels/cpu/split.h"

#define BLOCK 512

/* A row's normaliser: exp(l - max) * scale is its softmax, l - max - log_sum the logarithm. */
struct norm {
    real max, scale;
    double log_sum;
};

static struct norm row_norm(const real *x, int64_t v)
{
    real max = -INFINITY, sum = 0;
    for (int64_t begin = 0; begin < v; begin += BLOCK) {
        const real *p = x + begin;
        int64_t n = v - begin < BLOCK ? v - begin : BLOCK;
        real top = max, part = 0;
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < n; j++) top = p[j] > top ? p[j] : top;
        if (top > max) {
            sum *= srf__exp(max - top);
            max = top;
        }
#pragma omp simd reduction(+ : part)
        for (int64_t j = 0; j < n; j++) part += srf__exp(p[j] - max);
        sum += part; /* NaN or +inf logits make it NaN, and all that follows */
    }
    return (struct norm){.max = max, .scale = 1 / sum, .log_sum = log((double)sum)};
}

/* sum p_t (log p_t - log p) */
static double row_kl(const real *x, struct norm nx, const real *t, struct norm nt, int64_t v)
{
    real mt = nt.max, mx = nx.max, scale = nt.scale, shift = (real)(nt.log_sum - nx.log_sum);
    double kl = 0;
    for (int64_t begin = 0; begin < v; begin += BLOCK) {
        int64_t end = v - begin < BLOCK ? v : begin + BLOCK;
        real part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t j = begin; j < end; j++) {
            real p = srf__exp(t[j] - mt) * scale;
            /* p = 0 adds nothing, however far apart the logits; NaN is not 0 */
            part += p == 0 ? 0 : p * (((t[j] - mt) - (x[j] - mx)) - shift);
        }
        kl += (double)part;
    }
    return kl;
}

static void row_gradient(const struct srf_xent_args *a, const real *x, struct norm nx,
                         const real *t, struct norm nt, int32_t target, real *dx)
{
    double kl_weight = t ? a->kl_weight : 0;
    real mx = nx.max, px = (real)(a->scale * (a->ce_weight + kl_weight)) * nx.scale;
    if (kl_weight != 0) {
        real mt = nt.max, pt = (real)(a->scale * kl_weight) * nt.scale;
#pragma omp simd
        for (int64_t j = 0; j < a->v; j++)
            dx[j] = px * srf__exp(x[j] - mx) - pt * srf__exp(t[j] - mt);
    } else {
#pragma omp simd
        for (int64_t j = 0; j < a->v; j++) dx[j] = px * srf__exp(x[j] - mx);
    }
    dx[target] -= (real)(a->scale * a->ce_weight);
}

static void xent_row(const struct srf_xent_args *a, int64_t i)
{
    const real *x = (const real *)a->logits + i * a->v;
    const real *t = a->teacher ? (const real *)a->teacher + i * a->v : NULL;
    real *dx = a->dlogits ? (real *)a->dlogits + i * a->v : NULL;
    real *kl = t && a->kl ? (real *)a->kl + i : NULL, *nll = (real *)a->nll + i;
    int32_t target = ((const int32_t *)a->targets)[i];
    if (target < 0) {
        *nll = 0;
        if (kl) *kl = 0;
        if (dx) memset(dx, 0, (size_t)a->v * sizeof *dx);
        return;
    }
    struct norm nx = row_norm(x, a->v), nt = {0};
    *nll = (real)(nx.log_sum + ((double)nx.max - (double)x[target]));
    if (t) nt = row_norm(t, a->v);
    if (kl) *kl = (real)row_kl(x, nx, t, nt, a->v);
    if (dx) row_gradient(a, x, nx, t, nt, target, dx);
}

srf_status SRF_CPU(xent)(struct srf_ctx *ctx, const struct srf_xent_args *a)
{
    SRF_FAIL_IF(a->n > 0 && a->v < 1, SRF_INVALID, "xent: vocabulary of %lld, expected >= 1",
                (long long)a->v);
#pragma omp parallel for schedule(static)                                                          \
    num_threads(ctx->n_threads) if (a->n * a->v > MIN_PARALLEL)
    for (int64_t i = 0; i < a->n; i++) xent_row(a, i);
    return SRF_OK;
}

size_t SRF_CPU(xent_workspace)(const struct srf_ctx *ctx, const struct srf_xent_args *a)
{
    (void)ctx;
    (void)a;
    return 0;
}
