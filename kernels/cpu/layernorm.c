/* Layer norm over the last dimension.
 *
 *     forward    xhat = (x - mean) rstd,  y = xhat gamma + beta,  rstd = 1 / sqrt(var + eps)
 *     backward   g = dy gamma;  dx += rstd (g - mean(g) - xhat mean(g xhat))
 *                dgamma += sum_n dy xhat,  dbeta += sum_n dy
 *
 * The variance is the mean of (x - mean)^2, in a second pass over the row (in cache), so a large
 * mean costs no precision. The sums over rows are partial sums of ctx->n_threads ranges of rows,
 * in the workspace, added in order.
 * Floor: memory; forward reads x and writes y, backward reads x and dy and updates dx. */
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

/* One row of backward; dgamma and dbeta are this part's sums. */
static void bwd_row(int64_t c, const real *x, const real *gamma, const real *dy, real mean,
                    real rstd, real *dx, real *dgamma, real *dbeta)
{
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
}

srf_status SRF_CPU(layernorm_bwd)(struct srf_ctx *ctx, const struct srf_layernorm_bwd_args *a)
{
    if (a->n == 0 || a->c == 0) return SRF_OK;
    const real *mean = a->mean, *rstd = a->rstd;
    int64_t c = a->c, parts = ctx->n_threads, stride = srf__part_stride(2 * c);
    real *sums = ctx->workspace;
#pragma omp parallel for schedule(static) num_threads(ctx->n_threads) if (a->n * c > MIN_PARALLEL)
    for (int64_t part = 0; part < parts; part++) {
        real *dgamma = sums + part * stride, *dbeta = dgamma + c;
        memset(dgamma, 0, (size_t)(2 * c) * sizeof *dgamma);
        int64_t end = srf__split(a->n, parts, part + 1);
        for (int64_t i = srf__split(a->n, parts, part); i < end; i++)
            bwd_row(c, (const real *)a->x + i * c, a->gamma, (const real *)a->dy + i * c, mean[i],
                    rstd[i], (real *)a->dx + i * c, dgamma, dbeta);
    }
    for (int64_t part = 0; part < parts; part++) {
        const real *dgamma = sums + part * stride, *dbeta = dgamma + c;
        for (int64_t j = 0; j < c; j++) ((real *)a->dgamma)[j] += dgamma[j];
        for (int64_t j = 0; j < c; j++) ((real *)a->dbeta)[j] += dbeta[j];
    }
    return SRF_OK;
}

size_t SRF_CPU(layernorm_bwd_workspace)(const struct srf_ctx *ctx,
                                        const struct srf_layernorm_bwd_args *a)
{
    return (size_t)ctx->n_threads * (size_t)srf__part_stride(2 * a->c) * sizeof(real);
}
