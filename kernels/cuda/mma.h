/* Tensor-core products of 16 x 8 tiles (mma.sync, sm_80 and later) and the loads that feed them.
 *
 * mma_bf16(c, a, b): C (16, 8) += A (16, 16) B (16, 8), bf16 operands, fp32 sums. With
 * g = lane / 4, p = lane % 4 a thread holds
 *     C  c[0], c[1] = (g, 2p), (g, 2p + 1);      c[2], c[3] = (g + 8, 2p), (g + 8, 2p + 1)
 *     A  a[0] = (g, 2p..2p+1)   a[1] = (g + 8, 2p..)
 *        a[2] = (g, 2p + 8..)   a[3] = (g + 8, 2p + 8..)
 *     B  b[0] = (2p..2p+1, g)   b[1] = (2p + 8.., g)
 * each register two neighbours along k, the lower one in the lower half. So the C of two products
 * that lie side by side is, packed to bf16, the A of the next product: no shuffle.
 *
 * ldmatrix_x4 loads four 8 x 8 tiles; lane l gives the address of row l % 8 of tile l / 8. From a
 * row-major (row, k) array it gives A (tiles: rows 0-7 k 0-7, rows 8-15 k 0-7, rows 0-7 k 8-15,
 * rows 8-15 k 8-15) and, from (n, k), B; with .trans the same from (k, row) and (k, n) arrays.
 */
#pragma once
#include "kernels/cuda/cuda.h"

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t smem_addr(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void store_shared(uint32_t addr, uint32_t x)
{
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(addr), "r"(x) : "memory");
}
__device__ __forceinline__ uint32_t load_shared(uint32_t addr)
{
    uint32_t x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(addr) : "memory");
    return x;
}
/* 16 bytes at once. */
__device__ __forceinline__ uint4 load_shared_16(uint32_t addr)
{
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(addr)
                 : "memory");
    return x;
}
__device__ __forceinline__ void store_shared_16(uint32_t addr, uint4 x)
{
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(addr), "r"(x.x), "r"(x.y), "r"(x.z),
                 "r"(x.w)
                 : "memory");
}
__device__ __forceinline__ void load_shared_words(uint32_t x[4], uint32_t addr)
{
    const uint4 y = load_shared_16(addr);
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
}
/* In one store: of an assignment the compiler makes four at times. */
__device__ __forceinline__ void store_global_16(void *to, uint4 x)
{
    asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z),
                 "r"(x.w)
                 : "memory");
}
__device__ __forceinline__ void mma_bf16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void ldmatrix_x4(uint32_t r[4], uint32_t addr)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t r[4], uint32_t addr)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr)
                 : "memory");
}
/* 16 bytes, global to shared, asynchronously; zeros where !valid (then src is not read). */
__device__ __forceinline__ void cp_async_16(uint32_t dst, const void *src, bool valid)
{
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}
/* All but the newest n groups have arrived (for this thread: a barrier makes it so for the block).
 */
template <int n> __device__ __forceinline__ void cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}
/* Two floats as bf16, x in the lower half. */
__device__ __forceinline__ uint32_t pack_bf16(float x, float y)
{
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(y), "f"(x));
    return r;
}
__device__ __forceinline__ float2 unpack_bf16(uint32_t r)
{
    return make_float2(__uint_as_float(r << 16), __uint_as_float(r & 0xffff0000u));
}
/* 2^x; results below 2^-126 are 0. */
__device__ __forceinline__ float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif
