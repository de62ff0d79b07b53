/* Squared error and its gradient: sum += sum (x - y)^2, dx += 2 scale (x - y).
 *
 * Differences in fp32; a thread adds the squares of a pack in fp32 and the packs in double. Blocks
 * leave one partial sum each in the workspace, and those are added in order.
 * Floor: memory; x and y are read once, dx updated. */
#include "kernels/cuda/dense.h"

#define THREADS       256
#define BLOCKS_PER_SM 4

template <typename T, int N>
static __global__
__launch_bounds__(THREADS, BLOCKS_PER_SM) void mse_kernel(int64_t n, const T *__restrict__ x,
                                                          const T *__restrict__ y, float scale,
                                                          T *__restrict__ dx, double *parts)
{
    int64_t start = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    int64_t step = (int64_t)gridDim.x * THREADS, packs = n / N;
    double sum = 0;
    for (int64_t i = start; i < packs; i += step) {
        pack<T, N> p = load_pack<T, N>(x + i * N), q = load_pack<T, N>(y + i * N);
        pack<T, N> g = dx ? load_pack<T, N>(dx + i * N) : zero_pack<T, N>();
        float s = 0.0f, to[N];
#pragma unroll
        for (int j = 0; j < N; j++) {
            float d = element(p, j) - element(q, j);
            s = fmaf(d, d, s);
            to[j] = fmaf(scale, d, element(g, j));
        }
        round_to(&g, to);
        if (dx) store_pack<T, N>(dx + i * N, g);
        sum += (double)s;
    }
    for (int64_t i = packs * N + start; i < n; i += step) {
        float d = to_float(x[i]) - to_float(y[i]);
        if (dx) dx[i] = from_float<T>(fmaf(scale, d, to_float(dx[i])));
        sum += (double)(d * d);
    }
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

static unsigned blocks(const struct srf_ctx *ctx, int64_t n)
{
    int64_t packs = div_up(n, (int64_t)(16 / srf_dtype_bytes(ctx->dtype)));
    return grid_for(ctx, packs, THREADS, BLOCKS_PER_SM);
}

template <typename T> static void launch(struct srf_ctx *ctx, const struct srf_mse_args *a)
{
    const T *x = (const T *)a->x, *y = (const T *)a->y;
    T *dx = (T *)a->dx;
    double *parts = (double *)ctx->workspace;
    float scale = (float)(2 * a->scale);
    unsigned grid = blocks(ctx, a->n);
    if (is_aligned(x, 16) && is_aligned(y, 16) && is_aligned(dx, 16))
        mse_kernel<T, PACK(T)><<<grid, THREADS, 0, stream_of(ctx)>>>(a->n, x, y, scale, dx, parts);
    else
        mse_kernel<T, 1><<<grid, THREADS, 0, stream_of(ctx)>>>(a->n, x, y, scale, dx, parts);
    srf__cuda_add_sum(ctx, parts, grid, (float *)a->sum);
}

extern "C" srf_status cuda_mse(struct srf_ctx *ctx, const struct srf_mse_args *a)
{
    if (a->n == 0) return SRF_OK;
    if (ctx->dtype == SRF_BF16)
        launch<bf16>(ctx, a);
    else
        launch<float>(ctx, a);
    return srf__cuda_launched("mse");
}

extern "C" size_t cuda_mse_workspace(const struct srf_ctx *ctx, const struct srf_mse_args *a)
{
    return blocks(ctx, a->n) * sizeof(double);
}
