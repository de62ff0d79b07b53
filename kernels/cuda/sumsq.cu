/* Sum of squares, for the norm of the gradient.
 *
 * A thread squares four elements in fp32 and adds them in double, blocks leave one partial sum each
 * in the workspace, and those are added in order. A square that overflows in fp32 overflows in the
 * sum, of type A, as well.
 * Floor: memory; x is read once. */
#include "kernels/cuda/dense.h"

#define THREADS       256
#define BLOCKS_PER_SM 8

template <int N> static __device__ __forceinline__ double squares(const pack<float, N> &p)
{
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < N; j++) sum = fmaf(p.v[j], p.v[j], sum);
    return (double)sum;
}

template <int N>
static __global__
__launch_bounds__(THREADS) void sumsq_kernel(int64_t n, const float *__restrict__ x, double *parts)
{
    int64_t start = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    int64_t step = (int64_t)gridDim.x * THREADS, packs = n / N;
    double sum = 0;
    int64_t i = start;
    for (; i + 3 * step < packs; i += 4 * step) {
        pack<float, N> p[4]; /* under way at once */
#pragma unroll
        for (int r = 0; r < 4; r++) p[r] = load_pack<float, N>(x + (i + r * step) * N);
#pragma unroll
        for (int r = 0; r < 4; r++) sum += squares(p[r]);
    }
    for (; i < packs; i += step) sum += squares(load_pack<float, N>(x + i * N));
    for (i = packs * N + start; i < n; i += step) sum += squares(load_pack<float, 1>(x + i));
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

extern "C" srf_status cuda_sumsq(struct srf_ctx *ctx, const struct srf_sumsq_args *a)
{
    if (a->n == 0) return SRF_OK;
    const float *x = (const float *)a->x;
    double *parts = (double *)ctx->workspace;
    unsigned grid = grid_for(ctx, div_up(a->n, 4), THREADS, BLOCKS_PER_SM);
    if (is_aligned(x, 16))
        sumsq_kernel<4><<<grid, THREADS, 0, stream_of(ctx)>>>(a->n, x, parts);
    else
        sumsq_kernel<1><<<grid, THREADS, 0, stream_of(ctx)>>>(a->n, x, parts);
    srf__cuda_add_sum(ctx, parts, grid, (float *)a->sum);
    return srf__cuda_launched("sumsq");
}

extern "C" size_t cuda_sumsq_workspace(const struct srf_ctx *ctx, const struct srf_sumsq_args *a)
{
    return grid_for(ctx, div_up(a->n, 4), THREADS, BLOCKS_PER_SM) * sizeof(double);
}
