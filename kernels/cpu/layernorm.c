/* Layer norm over the last dimension.
 *
 *     forward    xhat = (x - mean) rstd,  y = xhat gamma + beta,  rstd = 1 / sqrt(var + eps)
 *     backward   g = dy gamma;  dx += rstd (g - mean(g) - xhat mean(g xhat))
 *                dgamma += sum_n dy xhat,  dbeta += sum_n dy,  dx_sum += sum_n dx
 *
 * The variance is the mean of (x - mean)^2, in a second pass over the row (in cache), so a large
 * mean costs no precision. The sums over rows are partial sums of ctx->n_threads ranges of rows,
 * in the workspace, added in order.
 * Floor: memory; forward reads x and writes y, backward reads x and dy and updates dx, and writes y
 * where that is wanted. */
#include "kernels/cpu/split.h"

srf_status SRF_CPU(layernorm_fwd)(struct srf_ctx *ctx, const struct srf_layernorm_fwd_args *a)
{
    if (a->n == 0 || a->c == 0) return SRF_OK;
    const real *gamma = a->gamma, *beta = a->beta;
    int64_t c = a->c;
#pragma omp parallel for schedule(static) num_threads(ctx->n_threads) if (a->n * c > MIN_PARALLEL)
    for (int64_t i = 0; i < a->n; i++) {
        const real *x = (const real *)a->x + i * c;
        real *y = (real *)a->y + i * c;
        real sum = 0, sq = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < c; j++) sum += x[j];
        real mean = sum / (real)c;
#pragma omp simd reduction(+ : sq)
        for (int64_t j = 0; j < c; j++) sq += (x[j] - mean) * (x[j] - mean);
        real rstd = (real)(1 / sqrt((double)sq / (double)c + a->eps));
        for (int64_t j = 0; j < c; j++) y[j] = (x[j] - mean) * rstd * gamma[j] + beta[j];
        ((real *)a->mean)[i] = mean;
        ((real *)a->rstd)[i] = rstd;
    }
    return SRF_OK;
}

size_t SRF_CPU(layernorm_fwd_workspace)(const struct srf_ctx *ctx,
                                        const struct srf_layernorm_fwd_args *a)
{
    (void)ctx;
    (void)a;
    return 0;
}

/* Row i of backward. sums: of this part, for dgamma, dbeta and, if wanted, dx_sum. */
static void bwd_row(const struct srf_layernorm_bwd_args *a, int64_t i, real *sums)
{
    int64_t c = a->c;
    const real *x = (const real *)a->x + i * c, *dy = (const real *)a->dy + i * c;
    const real *gamma = a->gamma, *beta = a->beta;
    real mean = ((const real *)a->mean)[i], rstd = ((const real *)a->rstd)[i];
    real *dx = (real *)a->dx + i * c, *y = a->y ? (real *)a->y + i * c : NULL;
    real *dgamma = sums, *dbeta = sums + c, *dx_sum = sums + 2 * c;
    real sum_g = 0, sum_gx = 0;
#pragma omp simd reduction(+ : sum_g, sum_gx)
    for (int64_t j = 0; j < c; j++) {
        real xhat = (x[j] - mean) * rstd, g = dy[j] * gamma[j];
        sum_g += g;
        sum_gx += g * xhat;
        dgamma[j] += dy[j] * xhat;
        dbeta[j] += dy[j];
    }
    real mean_g = sum_g / (real)c, mean_gx = sum_gx / (real)c;
#pragma omp simd
    for (int64_t j = 0; j < c; j++) {
        real xhat = (x[j] - mean) * rstd;
        dx[j] += rstd * (dy[j] * gamma[j] - mean_g - xhat * mean_gx);
    }
    for (int64_t j = 0; j < c && a->dx_sum; j++) dx_sum[j] += dx[j];
    for (int64_t j = 0; j < c && y; j++) y[j] = (x[j] - mean) * rstd * gamma[j] + beta[j];
}

/* Elements of a part's sums. */
static int64_t sums_count(const struct srf_layernorm_bwd_args *a)
{
    return (a->dx_sum ? 3 : 2) * a->c;
}

srf_status SRF_CPU(layernorm_bwd)(struct srf_ctx *ctx, const struct srf_layernorm_bwd_args *a)
{
    if (a->n == 0 || a->c == 0) return SRF_OK;
    int64_t c = a->c, parts = ctx->n_threads, stride = srf__part_stride(sums_count(a));
    real *sums = ctx->workspace;
#pragma omp parallel for schedule(static) num_threads(ctx->n_threads) if (a->n * c > MIN_PARALLEL)
    for (int64_t part = 0; part < parts; part++) {
        real *own = sums + part * stride;
        memset(own, 0, (size_t)sums_count(a) * sizeof *own);
        int64_t end = srf__split(a->n, parts, part + 1);
        for (int64_t i = srf__split(a->n, parts, part); i < end; i++) bwd_row(a, i, own);
    }
    for (int64_t part = 0; part < parts; part++) {
        const real *dgamma = sums + part * stride, *dbeta = dgamma + c, *dx_sum = dbeta + c;
        for (int64_t j = 0; j < c; j++) ((real *)a->dgamma)[j] += dgamma[j];
        for (int64_t j = 0; j < c; j++) ((real *)a->dbeta)[j] += dbeta[j];
        for (int64_t j = 0; j < c && a->dx_sum; j++) ((real *)a->dx_sum)[j] += dx_sum[j];
    }
    return SRF_OK;
}

size_t SRF_CPU(layernorm_bwd_workspace)(const struct srf_ctx *ctx,
                                        const struct srf_layernorm_bwd_args *a)
{
    return (size_t)ctx->n_threads * (size_t)srf__part_stride(sums_count(a)) * sizeof(real);
}
