/* The second step of sums: see dense.h. A block takes 32 columns; its warps take turns at the
 * parts, and their sums are added in order. Floor: the parts, a few hundred rows, are read once
 * from the L2 cache. */
#include "kernels/cuda/dense.h"

#define WARPS       16
#define SUM_THREADS 256

static __global__ __launch_bounds__(32 * WARPS) void add_parts_kernel(
    const float *__restrict__ parts, int64_t n_parts, int64_t c, float *a, float *b, float *d)
{
    __shared__ float sums[WARPS][32];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int64_t j = (int64_t)blockIdx.x * 32 + lane, stride = (d ? 3 : b ? 2 : 1) * c;
    float sum = 0.0f;
    if (j < stride) {
#pragma unroll 8
        for (int64_t p = warp; p < n_parts; p += WARPS) sum += parts[p * stride + j];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || j >= stride) return;
    for (int w = 1; w < WARPS; w++) sum += sums[w][lane];
    float *to = j < c ? a + j : j < 2 * c ? b + (j - c) : d + (j - 2 * c);
    *to += sum;
}

void srf__cuda_add_parts(struct srf_ctx *ctx, const float *parts, int64_t n_parts, int64_t c,
                         float *a, float *b, float *d)
{
    unsigned grid = (unsigned)div_up((d ? 3 : b ? 2 : 1) * c, 32);
    add_parts_kernel<<<grid, 32 * WARPS, 0, stream_of(ctx)>>>(parts, n_parts, c, a, b, d);
}

static __global__
__launch_bounds__(SUM_THREADS) void add_sum_kernel(const double *__restrict__ parts,
                                                   int64_t n_parts, float *sum)
{
    double x = 0;
    for (int64_t p = threadIdx.x; p < n_parts; p += SUM_THREADS) x += parts[p];
    x = block_sum_double(x);
    if (threadIdx.x == 0) *sum = (float)((double)*sum + x);
}

void srf__cuda_add_sum(struct srf_ctx *ctx, const double *parts, int64_t n_parts, float *sum)
{
    add_sum_kernel<<<1, SUM_THREADS, 0, stream_of(ctx)>>>(parts, n_parts, sum);
}
