/* What the dense ops share: elements in packs, and sums over rows or arrays in two steps. The first
 * step is the op's own kernel: its blocks leave partial sums in the workspace. The second adds them
 * in the order of the blocks, whose number depends on the shape and the card only: so results do
 * not depend on timing.
 */
#pragma once
#include "kernels/cuda/mma.h"

/* a[j] += sum_p parts[p][j];  b[j] += sum_p parts[p][c + j];  d[j] += sum_p parts[p][2c + j].
 * parts (n_parts, c), (n_parts, 2c) with b, (n_parts, 3c) with b and d; b and d may be NULL. */
void srf__cuda_add_parts(struct srf_ctx *ctx, const float *parts, int64_t n_parts, int64_t c,
                         float *a, float *b, float *d = NULL);
/* sum[0] += sum_p parts[p] */
void srf__cuda_add_sum(struct srf_ctx *ctx, const double *parts, int64_t n_parts, float *sum);

static inline bool is_aligned(const void *p, size_t bytes)
{
    return (uintptr_t)p % bytes == 0;
}

#ifdef __CUDACC__
/* N elements, moved at once: one 16-byte access where N is PACK(T). bf16 stay in pairs, as they
 * come: taken apart they would need a register each. */
template <typename T, int N> struct alignas(sizeof(T) * N) pack {
    T v[N];
};
template <int N> struct alignas(2 * N) pack<bf16, N> {
    uint32_t pairs[N / 2];
};
template <> struct pack<bf16, 1> {
    bf16 v[1];
};
#define PACK(T) ((int)(16 / sizeof(T)))

template <typename T, int N> __device__ __forceinline__ pack<T, N> load_pack(const T *p)
{
    return *reinterpret_cast<const pack<T, N> *>(p);
}
template <typename T, int N> __device__ __forceinline__ void store_pack(T *p, const pack<T, N> &x)
{
    *reinterpret_cast<pack<T, N> *>(p) = x;
}
/* Element j, which is to be a constant after unrolling. */
template <int N> __device__ __forceinline__ float element(const pack<float, N> &p, int j)
{
    return p.v[j];
}
template <int N> __device__ __forceinline__ float element(const pack<bf16, N> &p, int j)
{
    return __uint_as_float(j % 2 ? p.pairs[j / 2] & 0xffff0000u : p.pairs[j / 2] << 16);
}
__device__ __forceinline__ float element(const pack<bf16, 1> &p, int)
{
    return to_float(p.v[0]);
}
template <int N> __device__ __forceinline__ void round_to(pack<float, N> *p, const float x[N])
{
#pragma unroll
    for (int j = 0; j < N; j++) p->v[j] = x[j];
}
template <int N> __device__ __forceinline__ void round_to(pack<bf16, N> *p, const float x[N])
{
#pragma unroll
    for (int j = 0; j < N; j += 2) p->pairs[j / 2] = pack_bf16(x[j], x[j + 1]);
}
__device__ __forceinline__ void round_to(pack<bf16, 1> *p, const float x[1])
{
    p->v[0] = from_float<bf16>(x[0]);
}
template <typename T, int N> __device__ __forceinline__ pack<T, N> zero_pack()
{
    pack<T, N> p;
    float zeros[N] = {};
    round_to(&p, zeros);
    return p;
}

/* Over all threads of a block of at most 1024, a multiple of 32; thread 0 gets the result. Called
 * once in a kernel. */
__device__ __forceinline__ double block_sum_double(double x)
{
    __shared__ double warps[32];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = blockDim.x >> 5;
#pragma unroll
    for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
    if (lane == 0) warps[warp] = x;
    __syncthreads();
    if (warp > 0) return 0;
    x = lane < n_warps ? warps[lane] : 0;
#pragma unroll
    for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}
#endif
