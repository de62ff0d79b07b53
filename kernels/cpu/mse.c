/* Squared error and its gradient: sum += sum (x - y)^2, dx += 2 scale (x - y).
 *
 * Summed like sumsq: blocks of a fixed length, in double, in order.
 * Floor: memory; x and y are read once, dx updated. */
#include "kernels/cpu/split.h"

#define BLOCK 32768 /* as in sumsq.c */

srf_status SRF_CPU(mse)(struct srf_ctx *ctx, const struct srf_mse_args *a)
{
    int64_t n_blocks = (a->n + BLOCK - 1) / BLOCK;
    double *parts = ctx->workspace;
    real scale = (real)(2 * a->scale);
#pragma omp parallel for schedule(static) num_threads(ctx->n_threads) if (n_blocks > 1)
    for (int64_t block = 0; block < n_blocks; block++) {
        const real *x = (const real *)a->x + block * BLOCK, *y = (const real *)a->y + block * BLOCK;
        real *dx = a->dx ? (real *)a->dx + block * BLOCK : NULL;
        int64_t n = block + 1 < n_blocks ? BLOCK : a->n - block * BLOCK;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++) {
            double d = (double)(x[i] - y[i]);
            sum += d * d;
        }
        parts[block] = sum;
        if (!dx) continue;
        for (int64_t i = 0; i < n; i++) dx[i] += scale * (x[i] - y[i]);
    }
    double sum = 0;
    for (int64_t block = 0; block < n_blocks; block++) sum += parts[block];
    if (a->n) *(real *)a->sum = (real)((double)*(real *)a->sum + sum);
    return SRF_OK;
}

size_t SRF_CPU(mse_workspace)(const struct srf_ctx *ctx, const struct srf_mse_args *a)
{
    (void)ctx;
    return (size_t)((a->n + BLOCK - 1) / BLOCK) * sizeof(double);
}
