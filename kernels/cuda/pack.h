/* N neighbouring elements that move in one access: N sizeof(T) is 2 to 16 bytes, and so is their
 * alignment. */
#pragma once
#include "kernels/cuda/cuda.h"

#ifdef __CUDACC__
template <typename T, int N> struct alignas(N * sizeof(T)) pack {
    T x[N];
};
template <int N, typename T> __device__ __forceinline__ pack<T, N> load_pack(const T *p)
{
    return *(const pack<T, N> *)p;
}
template <typename T, int N> __device__ __forceinline__ void store_pack(T *p, const pack<T, N> &x)
{
    *(pack<T, N> *)p = x;
}
#endif

static inline bool aligned_to(const void *p, size_t bytes)
{
    return (uintptr_t)p % bytes == 0;
}
