/* What the product of product_wgmma.cu is made of: products of operands in shared memory,
 * clusters of two blocks, and two-dimensional bulk copies.
 *
 * Operands lie in shared memory in tiles of 64 columns, as the copy engine writes them with the
 * 128-byte swizzle: see wgmma.h. */
#pragma once
#include "kernels/cuda/wgmma.h"

#if HAVE_WGMMA
/* Where an operand lies, as wgmma.h's wgmma_tile says it, by halves: the upper one is a constant,
 * to the lower one 1 may be added for each 16 bytes further on, as the last address is below 2^18.
 * cols: k runs along the tile's rows, `step` bytes between tiles of 64 columns each. */
#define TILE_HIGH 0x40000040u
__device__ __forceinline__ uint32_t tile_low(uint32_t addr)
{
    return (addr >> 4 & 0x3fff) | 64u << 16; /* above it is the block's number in its cluster */
}
__device__ __forceinline__ uint32_t tile_cols_low(uint32_t addr, int step)
{
    return (addr >> 4 & 0x3fff) | (uint32_t)(step >> 4) << 16;
}
__device__ __forceinline__ uint64_t tile_of(uint32_t low)
{
    uint64_t tile;
    asm("mov.b64 %0, {%1, %2};" : "=l"(tile) : "r"(low), "r"(TILE_HIGH));
    return tile;
}
/* c (64, 192) = A B (!add) or c += A B, of 16 columns of A; B_COLS: k runs along B's tile rows. */
template <bool B_COLS>
__device__ __forceinline__ void wgmma_192(float c[96], uint64_t a, uint64_t b, bool add)
{
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %98, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
        "%96, %97, p, 1, 1, 0, %99;\n"
        "}\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]),
          "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]),
          "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]),
          "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]),
          "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]), "+f"(c[32]), "+f"(c[33]), "+f"(c[34]),
          "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]),
          "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), "+f"(c[48]),
          "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),
          "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]),
          "+f"(c[63]), "+f"(c[64]), "+f"(c[65]), "+f"(c[66]), "+f"(c[67]), "+f"(c[68]), "+f"(c[69]),
          "+f"(c[70]), "+f"(c[71]), "+f"(c[72]), "+f"(c[73]), "+f"(c[74]), "+f"(c[75]), "+f"(c[76]),
          "+f"(c[77]), "+f"(c[78]), "+f"(c[79]), "+f"(c[80]), "+f"(c[81]), "+f"(c[82]), "+f"(c[83]),
          "+f"(c[84]), "+f"(c[85]), "+f"(c[86]), "+f"(c[87]), "+f"(c[88]), "+f"(c[89]), "+f"(c[90]),
          "+f"(c[91]), "+f"(c[92]), "+f"(c[93]), "+f"(c[94]), "+f"(c[95])
        : "l"(a), "l"(b), "r"((int)add), "n"(B_COLS));
}

/* Registers of every thread of a warpgroup from here on. */
template <int n> __device__ __forceinline__ void registers_down()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
}
template <int n> __device__ __forceinline__ void registers_up()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
}

/* Barrier `id` (1 to 15) of `threads` threads of the block. */
__device__ __forceinline__ void group_sync(int id, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* ---- clusters -------------------------------------------------------------------------------- */

__device__ __forceinline__ int cluster_rank()
{
    uint32_t r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return (int)r;
}
/* All threads of the cluster's blocks. */
__device__ __forceinline__ void cluster_sync()
{
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
/* Arrive at the barrier that block `rank` has where this one has `bar`. Without a scope of its own:
 * release.cluster would be a memory fence, about a microsecond for each stage. What is released has
 * been read by products that are done. */
__device__ __forceinline__ void barrier_arrive_at(uint32_t bar, int rank)
{
    asm volatile("{\n"
                 ".reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
                 "}\n" ::"r"(bar),
                 "r"(rank)
                 : "memory");
}

/* ---- bulk copies of boxes at columns x, rows y; by one thread -------------------------------- */

__device__ __forceinline__ void bulk_load(uint32_t dst, const CUtensorMap *map, int x, int y,
                                          uint32_t bar)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" ::"r"(dst),
                 "l"(map), "r"(x), "r"(y), "r"(bar)
                 : "memory");
}
/* To the same place in the blocks of `mask`, whose barriers there each count the bytes. */
__device__ __forceinline__ void bulk_load_to(uint32_t dst, const CUtensorMap *map, int x, int y,
                                             uint32_t bar, int mask)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(dst),
                 "l"(map), "r"(x), "r"(y), "r"(bar), "h"((uint16_t)mask)
                 : "memory");
}
/* A group of its own. */
__device__ __forceinline__ void bulk_store(const CUtensorMap *map, int x, int y, uint32_t src)
{
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];\n"
        "cp.async.bulk.commit_group;" ::"l"(map),
        "r"(x), "r"(y), "r"(src)
        : "memory");
}
/* All but the newest n of this thread's stores have been read from shared memory. */
template <int n> __device__ __forceinline__ void bulk_store_wait()
{
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(n) : "memory");
}
/* Writes to shared memory before this are seen by bulk copies after it. */
__device__ __forceinline__ void bulk_fence()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
#endif
