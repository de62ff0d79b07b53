/* N neighbouring elements that move in one access: N sizeof(T) is 2 to 16 bytes, and so is their
 * alignment. */
#pragma once
#include "kernels/cuda/cuda.h"

#include <string.h>

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

/* The bits of a pack. A pack that is loaded some time before its use is kept so: the compiler
 * splits a pack into elements where it is loaded, and thereby waits for it. For the same reason
 * such loads should have no condition: better a clamped address. */
template <int bytes> struct bits_of;
template <> struct bits_of<2> {
    typedef uint16_t type;
};
template <> struct bits_of<4> {
    typedef uint32_t type;
};
template <> struct bits_of<8> {
    typedef uint2 type;
};
template <> struct bits_of<16> {
    typedef uint4 type;
};
template <typename T, int N> using bits = typename bits_of<N * sizeof(T)>::type;

template <int N, typename T> __device__ __forceinline__ bits<T, N> load_bits(const T *p)
{
    return *(const bits<T, N> *)p;
}
template <typename T, int N> __device__ __forceinline__ pack<T, N> unpack(const bits<T, N> &b)
{
    pack<T, N> p;
    memcpy(&p, &b, sizeof p);
    return p;
}

/* For what is not read again soon: it leaves L2 first. */
template <typename T, int N>
__device__ __forceinline__ void store_pack_streaming(T *p, const pack<T, N> &x)
{
    bits<T, N> b;
    memcpy(&b, &x, sizeof b);
    __stcs((bits<T, N> *)p, b);
}
#endif

static inline bool aligned_to(const void *p, size_t bytes)
{
    return (uintptr_t)p % bytes == 0;
}
