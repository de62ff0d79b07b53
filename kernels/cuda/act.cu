/* The activation alone: y = gelu(x), for what backward makes again.
 *
 * Eight elements a thread and turn (16-byte loads of bf16), then the rest one by one.
 * Floor: memory; x is read and y written once. */
#include "kernels/cuda/gelu.h"

#define THREADS 256
#define VECTOR  8 /* elements a thread takes at once */

template <typename T> struct alignas(sizeof(T) * VECTOR) piece {
    T v[VECTOR];
};

template <typename T>
static __global__ __launch_bounds__(THREADS) void act_fwd_kernel(int64_t n, const T *__restrict__ x,
                                                                 T *__restrict__ y)
{
    int64_t start = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    int64_t step = (int64_t)gridDim.x * THREADS, pieces = n / VECTOR;
    for (int64_t i = start; i < pieces; i += step) {
        piece<T> p = reinterpret_cast<const piece<T> *>(x)[i];
#pragma unroll
        for (int j = 0; j < VECTOR; j++) p.v[j] = from_float<T>(gelu(to_float(p.v[j])));
        reinterpret_cast<piece<T> *>(y)[i] = p;
    }
    for (int64_t i = pieces * VECTOR + start; i < n; i += step)
        y[i] = from_float<T>(gelu(to_float(x[i])));
}

extern "C" srf_status cuda_act_fwd(struct srf_ctx *ctx, const struct srf_act_fwd_args *a)
{
    if (a->n == 0) return SRF_OK;
    size_t size = srf_dtype_bytes(ctx->dtype);
    if (a->act == SRF_ACT_NONE) return ctx->be->copy(ctx, a->y, a->x, (size_t)a->n * size);
    SRF_FAIL_IF(((uintptr_t)a->x | (uintptr_t)a->y) % (VECTOR * size) != 0, SRF_INVALID,
                "act_fwd: x and y must be aligned to %d elements", VECTOR);
    unsigned grid = grid_for(ctx, div_up(a->n, VECTOR), THREADS, 8);
    if (ctx->dtype == SRF_BF16)
        act_fwd_kernel<bf16>
            <<<grid, THREADS, 0, stream_of(ctx)>>>(a->n, (const bf16 *)a->x, (bf16 *)a->y);
    else
        act_fwd_kernel<float>
            <<<grid, THREADS, 0, stream_of(ctx)>>>(a->n, (const float *)a->x, (float *)a->y);
    return srf__cuda_launched("act_fwd");
}

extern "C" size_t cuda_act_fwd_workspace(const struct srf_ctx *, const struct srf_act_fwd_args *)
{
    return 0;
}
