/* What the CUDA ops share: errors, the backend's own data, element types, reductions.
 *
 * An op is `srf_status cuda_<name>(struct srf_ctx *, const struct srf_<name>_args *)` with C
 * linkage and serves both dtypes: BF16 (A = F32), and F32, the mode for checks, without TF32.
 * Kernels are C-like: templates only over element types, tile sizes and switches. A launch goes to
 * stream_of(ctx), never waits, and ends with `return srf__cuda_launched("<name>");`. Results do not
 * depend on timing: no floating-point atomics.
 */
#pragma once
#include "kernels/backends.h"

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <math.h>

typedef __nv_bfloat16 bf16;

/* Device prototypes, from THE list. */
extern "C" {
#define X(name)                                                                                    \
    srf_status cuda_##name(struct srf_ctx *ctx, const struct srf_##name##_args *args);             \
    size_t cuda_##name##_workspace(const struct srf_ctx *ctx, const struct srf_##name##_args *args);
#include "kernels/ops.def"
#undef X
}

/* srf_attn.cu */
size_t srf__attn_carry_bytes(const struct srf_ctx *ctx, const struct srf_attn_shape *s);
/* norm_linear.cu */
int64_t srf__moments_count(const struct srf_ctx *ctx, int64_t n, int64_t c);

/* A CUDA call that must succeed; inside functions that return srf_status. Its error is not left for
 * the next launch to find. */
#define CUDA_TRY(call)                                                                             \
    do {                                                                                           \
        cudaError_t err_ = (call);                                                                 \
        if (err_ != cudaSuccess) cudaGetLastError();                                               \
        SRF_FAIL_IF(err_ != cudaSuccess, SRF_DEVICE, "CUDA: %s: %s", #call,                        \
                    cudaGetErrorString(err_));                                                     \
    } while (0)

#define SRF__CUDA_STAGES      4 /* uploads that may be on their way at once */
#define SRF__CUDA_STAGE_BYTES ((size_t)1 << 20)

/* ctx->impl */
struct srf__cuda {
    int device, n_sm;
    int cc;          /* 10 * major + minor, 90 for an H100; 80 where its code is older */
    size_t smem_max; /* dynamic shared memory a block may ask for */
    cublasLtHandle_t lt;
    /* Small uploads: host memory is copied here first, so that the caller may go on at once. */
    void *stage[SRF__CUDA_STAGES];
    cudaEvent_t staged[SRF__CUDA_STAGES];
    int next_stage;
    void *plans; /* linear.cu: cuBLASLt algorithms found so far */
};

static inline struct srf__cuda *cuda_of(const struct srf_ctx *ctx)
{
    return (struct srf__cuda *)ctx->impl;
}
static inline cudaStream_t stream_of(const struct srf_ctx *ctx)
{
    return (cudaStream_t)ctx->stream;
}
/* After a launch: SRF_DEVICE if it could not be made. */
srf_status srf__cuda_launched(const char *op);
/* Frees ctx->impl->plans. */
void srf__cuda_free_plans(struct srf__cuda *cuda);

static inline int64_t div_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}
/* Blocks of a grid-stride loop over n items: enough to fill the card, not more. */
static inline unsigned grid_for(const struct srf_ctx *ctx, int64_t n, int threads, int per_sm)
{
    int64_t blocks = div_up(n, threads), most = (int64_t)cuda_of(ctx)->n_sm * per_sm;
    blocks = blocks < most ? blocks : most;
    return (unsigned)(blocks > 0 ? blocks : 1);
}

/* Bump allocation over a workspace; a NULL base only counts. 256-byte aligned pieces. */
struct cuda_bump {
    char *base;
    size_t used;
};
static inline void *bump_bytes(struct cuda_bump *b, size_t bytes)
{
    void *p = b->base ? b->base + b->used : NULL;
    b->used += (bytes + 255) / 256 * 256;
    return p;
}

#ifdef __CUDACC__
/* ---- elements ------------------------------------------------------------------------------ */
__device__ __forceinline__ float to_float(float x)
{
    return x;
}
__device__ __forceinline__ float to_float(bf16 x)
{
    return __bfloat162float(x);
}
template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x)
{
    return x;
}
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x)
{
    return __float2bfloat16_rn(x);
}

/* ---- reductions in a fixed order ------------------------------------------------------------ */
__device__ __forceinline__ float warp_sum(float x)
{
#pragma unroll
    for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}
__device__ __forceinline__ float warp_max(float x)
{
#pragma unroll
    for (int o = 16; o; o >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
    return x;
}
/* Over all threads of a block (a multiple of 32, at most 1024); every thread gets the result.
 * scratch: 33 floats of shared memory, free again after the call. */
__device__ __forceinline__ float block_sum(float x, float *scratch)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = (blockDim.x + 31) >> 5;
    x = warp_sum(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    if (warp == 0) {
        float v = warp_sum(lane < n_warps ? scratch[lane] : 0.0f);
        if (lane == 0) scratch[32] = v;
    }
    __syncthreads();
    float all = scratch[32];
    __syncthreads();
    return all;
}
#endif
