/* Hopper's warpgroup products (wgmma, sm_90a only), the barriers and bulk copies that feed them.
 *
 * A warpgroup, 4 warps, multiplies 64 rows: c (64, 64) += A (64, 16) B (16, 64). Warp w holds rows
 * 16 w .. 16 w + 15 of A and c in the layout of mma.h, c[4 nt + e] being its c[nt][e]; B is read
 * from a tile of 64-column rows in shared memory, tile.h's layout with D = 64, at a multiple of
 * 1024 bytes: what the copy engine writes with the 128-byte swizzle.
 *
 * Products run on their own until warpgroup_wait: between warpgroup_fence (before the first, after
 * registers were written) and warpgroup_commit nothing may touch c.
 */
#pragma once
#include "kernels/cuda/mma.h"

#include <cuda.h>

/* The heads of an activation T (b, t, h, 64), leading dimension ld, as the copy engine sees them:
 * columns, tokens, sequences; boxes of `rows` tokens of one head. Tokens past the end of a sequence
 * read as zeros. p is a multiple of 16 bytes, ld of 8. */
srf_status srf__tile_map(CUtensorMap *map, const void *p, int64_t b, int64_t t, int64_t h,
                         int64_t ld, int rows);

/* Code for a device that has all this is being compiled. */
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAVE_WGMMA 1
#else
#define HAVE_WGMMA 0
#endif

#if HAVE_WGMMA
/* Where B lies: 16-byte units, 1024 bytes between groups of eight rows, 128-byte swizzle. */
__device__ __forceinline__ uint64_t wgmma_tile(uint32_t addr)
{
    return (uint64_t)(addr >> 4 & 0x3fff) | (uint64_t)64 << 16 | (uint64_t)64 << 32 |
           (uint64_t)1 << 62;
}
__device__ __forceinline__ void warpgroup_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void warpgroup_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/* All but the newest n groups are done. */
template <int n> __device__ __forceinline__ void warpgroup_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
}
/* Keeps the compiler from reading c before the wait above it. */
__device__ __forceinline__ void wgmma_hold(float c[32])
{
#pragma unroll
    for (int i = 0; i < 32; i++) asm volatile("" : "+f"(c[i])::"memory");
}
/* c = A B (!add) or c += A B, A from registers. COLS: k runs along the tile's rows (a sum over
 * rows), else along its columns (products with rows). */
template <bool COLS>
__device__ __forceinline__ void wgmma_64(float c[32], const uint32_t a[4], uint64_t b, bool add)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, "
                 "%8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n"
                 "}\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]),
                   "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]),
                   "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]),
                   "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
                   "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]),
                   "+f"(c[30]), "+f"(c[31])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"(COLS));
}
/* The same with A from a tile: its 64 rows, 16 columns (!A_COLS), or the transpose of 16 rows. */
template <bool A_COLS, bool COLS>
__device__ __forceinline__ void wgmma_64_tiles(float c[32], uint64_t a, uint64_t b, bool add)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, "
                 "%8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31}, "
                 "%32, %33, p, 1, 1, %35, %36;\n"
                 "}\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]),
                   "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]),
                   "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]),
                   "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
                   "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]),
                   "+f"(c[30]), "+f"(c[31])
                 : "l"(a), "l"(b), "r"((int)add), "n"(A_COLS), "n"(COLS));
}
/* c (64, 64) = A B^T (!add) or c += A B^T: B the tile's 64 rows. */
__device__ __forceinline__ void wgmma_scores(float c[32], const uint32_t a[4][4], uint32_t tile,
                                             bool add = false)
{
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
        wgmma_64<false>(c, a[kk], wgmma_tile(tile + 32 * kk), add || kk > 0);
}
/* c (64, 64) = X Y^T: tiles of 64 rows. */
__device__ __forceinline__ void wgmma_tile_scores(float c[32], uint32_t x, uint32_t y)
{
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
        wgmma_64_tiles<false, false>(c, wgmma_tile(x + 32 * kk), wgmma_tile(y + 32 * kk), kk > 0);
}
/* c (64, 64) = P B (!add) or c += P B: P (64, 64) packed, B the tile's 64 rows. */
__device__ __forceinline__ void wgmma_mix(float c[32], const uint32_t p[4][4], uint32_t tile,
                                          bool add)
{
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
        wgmma_64<true>(c, p[kk], wgmma_tile(tile + 2048 * kk), add || kk > 0);
}

/* What this thread wrote to shared memory (or read there) comes before what products and the copy
 * engine do with it after the next block barrier. */
__device__ __forceinline__ void async_fence()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* ---- barriers in shared memory: 8 bytes each ------------------------------------------------- */

__device__ __forceinline__ void barrier_init(uint32_t bar, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
/* After the inits, by who made them; then a block barrier. */
__device__ __forceinline__ void barrier_init_done()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t bar)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
/* Arrive, and `bytes` more are to come by bulk copies before the phase ends. */
__device__ __forceinline__ void barrier_expect(uint32_t bar, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
                 : "memory");
}
/* Until the phase of this parity has ended. */
__device__ __forceinline__ void barrier_wait(uint32_t bar, int parity)
{
    uint32_t done;
    do {
        asm volatile("{\n"
                     ".reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n"
                     "}\n"
                     : "=r"(done)
                     : "r"(bar), "r"(parity)
                     : "memory");
    } while (!done);
}
/* Box of a tensor at columns x, rows y of z, to a tile; by one thread. */
__device__ __forceinline__ void bulk_tile(uint32_t tile, const CUtensorMap *map, int x, int y,
                                          int z, uint32_t bar)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(tile),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(bar)
                 : "memory");
}
/* `bytes` (a multiple of 16, as the addresses) from src; by one thread. */
__device__ __forceinline__ void bulk_bytes(uint32_t dst, const void *src, int bytes, uint32_t bar)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(dst),
                 "l"(src), "r"(bytes), "r"(bar)
                 : "memory");
}
/* The other way, by one thread, which commits: what was written to src before an async_fence and a
 * barrier. */
__device__ __forceinline__ void bulk_send(void *dst, uint32_t src, int bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(src),
                 "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void bulk_commit()
{
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/* All that this thread has sent was read from shared memory. */
__device__ __forceinline__ void bulk_sent()
{
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
/* It has arrived. */
/* By address in shared memory: one register, where the compiler keeps others for pointers. */
__device__ __forceinline__ float load_float(uint32_t addr)
{
    return __uint_as_float(load_shared(addr));
}
__device__ __forceinline__ void store_float(uint32_t addr, float x)
{
    store_shared(addr, __float_as_uint(x));
}
__device__ __forceinline__ float2 load_float2(uint32_t addr)
{
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(addr) : "memory");
    return x;
}
__device__ __forceinline__ void store_float2(uint32_t addr, float x, float y)
{
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(addr), "f"(x), "f"(y) : "memory");
}
/* Four 8 x 8 tiles of bf16, whose rows lie where lanes say. */
__device__ __forceinline__ void stmatrix_x4(uint32_t addr, const uint32_t r[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}
/* 1 / x of an ordinary x, to the last bit but one. */
__device__ __forceinline__ float reciprocal(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ void bulk_done()
{
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

/* ---- barriers of some warps: n threads, all together or, id by id, those that only arrive -- */

__device__ __forceinline__ void meet(int id, int n)
{
    asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(n) : "memory");
}
__device__ __forceinline__ void meet_arrive(int id, int n)
{
    asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(n) : "memory");
}
__device__ __forceinline__ bool meet_or(int id, int n, bool x)
{
    int any;
    asm volatile("{\n"
                 ".reg .pred p, q;\n"
                 "setp.ne.b32 p, %1, 0;\n"
                 "barrier.cta.red.or.pred q, %2, %3, p;\n"
                 "selp.b32 %0, 1, 0, q;\n"
                 "}\n"
                 : "=r"(any)
                 : "r"((int)x), "r"(id), "r"(n)
                 : "memory");
    return any;
}
#endif
