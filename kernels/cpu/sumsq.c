/* Sum of squares, for the norm of the gradient.
 *
 * Blocks of a fixed length are summed in double, one partial sum each in the workspace, and those
 * are added in order: the result depends neither on the threads nor on their number.
 * Floor: memory; x is read once. */
#include "kernels/cpu/split.h"

#define BLOCK 32768 /* enough for threads to share, few enough partial sums */

srf_status SRF_CPU(sumsq)(struct srf_ctx *ctx, const struct srf_sumsq_args *a)
{
    int64_t n_blocks = (a->n + BLOCK - 1) / BLOCK;
    double *parts = ctx->workspace;
#pragma omp parallel for schedule(static) num_threads(ctx->n_threads) if (n_blocks > 1)
    for (int64_t block = 0; block < n_blocks; block++) {
        const real *x = (const real *)a->x + block * BLOCK;
        int64_t n = block + 1 < n_blocks ? BLOCK : a->n - block * BLOCK;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
        parts[block] = sum;
    }
    double sum = 0;
    for (int64_t block = 0; block < n_blocks; block++) sum += parts[block];
    if (a->n) *(real *)a->sum = (real)((double)*(real *)a->sum + sum);
    return SRF_OK;
}

size_t SRF_CPU(sumsq_workspace)(const struct srf_ctx *ctx, const struct srf_sumsq_args *a)
{
    (void)ctx;
    return (size_t)((a->n + BLOCK - 1) / BLOCK) * sizeof(double);
}
