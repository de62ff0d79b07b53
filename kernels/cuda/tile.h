/* Tiles of bf16 rows in shared memory, and what attention does with them on tensor cores.
 *
 * A tile is ROWS x D, row-major, in 16-byte chunks; the chunks of a row are permuted by xor with
 * some bits of the row number, so that eight rows at the same column lie in eight different groups
 * of banks, for every D that is a multiple of 16. Tiles start at multiples of 16 bytes.
 *
 * A warp multiplies MT x 16 rows by n columns. Its accumulators are c[MT][n / 8][4] with the layout
 * of mma.h: row (lane / 4) + 8 half + 16 mt, columns 8 nt + 2 (lane % 4) + {0, 1}, element
 * c[mt][nt][2 half + {0, 1}].
 */
#pragma once
#include "kernels/cuda/mma.h"

#ifdef __CUDACC__
#define LOG2E 1.4426950408889634f
#define LN2   0.6931471805599453f

/* What row r's chunk numbers are xored with. */
template <int D> __device__ __forceinline__ int tile_xor(int r)
{
    constexpr int n = D / 8, g = n % 8 == 0 ? 8 : n % 4 == 0 ? 4 : 2;
    static_assert(D % 16 == 0, "chunks go in pairs");
    return r / (8 / g) & (g - 1);
}
/* Byte offset of chunk c (columns 8 c .. 8 c + 7) of row r. */
template <int D> __device__ __forceinline__ uint32_t tile_at(int r, int c)
{
    return (uint32_t)(r * (D * 2) + (c ^ tile_xor<D>(r)) * 16);
}
/* ROWS rows from src, ld apart, the first `valid` of them there and the rest zeros, by a block of
 * THREADS. Asynchronous: commit, wait, barrier. */
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void tile_load(uint32_t tile, const bf16 *src, int64_t ld, int valid)
{
    constexpr int n = ROWS * (D / 8);
#pragma unroll
    for (int i0 = 0; i0 < n; i0 += THREADS) {
        int i = i0 + (int)threadIdx.x, r = i / (D / 8), c = i % (D / 8);
        if (n % THREADS && i >= n) break;
        cp_async_16(tile + tile_at<D>(r, c), r < valid ? src + r * ld + c * 8 : src, r < valid);
    }
}
/* `valid` of a warp's or block's rows back to global memory, 16 bytes a thread: threads i0, i0 +
 * step, ... share the work. */
template <int D>
__device__ __forceinline__ void tile_store(const char *tile, int r0, int rows, bf16 *dst,
                                           int64_t ld, int valid, int i0, int step)
{
    for (int i = i0; i < rows * (D / 8); i += step) {
        int r = i / (D / 8), c = i % (D / 8);
        if (r < valid)
            *(uint4 *)(dst + r * ld + c * 8) = *(const uint4 *)(tile + tile_at<D>(r0 + r, c));
    }
}

/* 8 bytes, global to shared, asynchronously; zeros where !valid. */
__device__ __forceinline__ void cp_async_8(uint32_t dst, const void *src, bool valid)
{
    int bytes = valid ? 8 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(dst), "l"(src), "r"(bytes)
                 : "memory");
}

/* The A operand: rows r0 .. r0 + 15, columns 16 kk .. 16 kk + 15. r0 is a multiple of 16. */
template <int D>
__device__ __forceinline__ void tile_a(uint32_t a[4], uint32_t tile, int r0, int kk)
{
    int lane = threadIdx.x & 31, r = lane & 15;
    ldmatrix_x4(a, tile + (uint32_t)((r0 + r) * (D * 2) +
                                     (((2 * kk) ^ ((lane >> 4) ^ tile_xor<D>(r))) * 16)));
}
/* The B operand of two column groups, for products with the tile's rows: columns of the result are
 * rows r0 .. r0 + 7 (b[0], b[1]) and r0 + 8 .. r0 + 15 (b[2], b[3]), k is columns 16 kk .. */
template <int D>
__device__ __forceinline__ void tile_b_rows(uint32_t b[4], uint32_t tile, int r0, int kk)
{
    int lane = threadIdx.x & 31, r = (lane >> 4) * 8 + (lane & 7);
    ldmatrix_x4(b, tile + (uint32_t)((r0 + r) * (D * 2) +
                                     (((2 * kk) ^ ((lane >> 3 & 1) ^ tile_xor<D>(r))) * 16)));
}
/* The same for sums over the tile's rows: k is rows r0 .. r0 + 15, columns of the result are
 * columns 16 cc .. 16 cc + 7 (b[0], b[1]) and 16 cc + 8 .. (b[2], b[3]). */
template <int D>
__device__ __forceinline__ void tile_b_cols(uint32_t b[4], uint32_t tile, int r0, int cc)
{
    int lane = threadIdx.x & 31, r = lane & 15;
    ldmatrix_x4_trans(b, tile + (uint32_t)((r0 + r) * (D * 2) +
                                           (((2 * cc) ^ ((lane >> 4) ^ tile_xor<D>(r))) * 16)));
}

/* c (16 MT, N) = A B^T: A the warp's rows from a_tile row a0 on, B rows b0 .. b0 + N - 1 of b_tile;
 * both of D columns. */
template <int D, int MT, int N>
__device__ __forceinline__ void tile_scores(float c[MT][N / 8][4], uint32_t a_tile, int a0,
                                            uint32_t b_tile, int b0)
{
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int nt = 0; nt < N / 8; nt++)
#pragma unroll
            for (int e = 0; e < 4; e++) c[mt][nt][e] = 0.0f;
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) {
        uint32_t a[MT][4];
#pragma unroll
        for (int mt = 0; mt < MT; mt++) tile_a<D>(a[mt], a_tile, a0 + 16 * mt, kk);
#pragma unroll
        for (int n2 = 0; n2 < N / 16; n2++) {
            uint32_t b[4];
            tile_b_rows<D>(b, b_tile, b0 + 16 * n2, kk);
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
                mma_bf16(c[mt][2 * n2], a[mt], b[0], b[1]);
                mma_bf16(c[mt][2 * n2 + 1], a[mt], b[2], b[3]);
            }
        }
    }
}
/* The accumulators p (16 MT, N) as A operands. */
template <int MT, int N>
__device__ __forceinline__ void tile_pack(uint32_t a[MT][N / 16][4], const float p[MT][N / 8][4])
{
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int kk = 0; kk < N / 16; kk++) {
            a[mt][kk][0] = pack_bf16(p[mt][2 * kk][0], p[mt][2 * kk][1]);
            a[mt][kk][1] = pack_bf16(p[mt][2 * kk][2], p[mt][2 * kk][3]);
            a[mt][kk][2] = pack_bf16(p[mt][2 * kk + 1][0], p[mt][2 * kk + 1][1]);
            a[mt][kk][3] = pack_bf16(p[mt][2 * kk + 1][2], p[mt][2 * kk + 1][3]);
        }
}
/* c (16 MT, D) += P B: P (16 MT, N) packed, B rows b0 .. b0 + N - 1 of b_tile. */
template <int D, int MT, int N>
__device__ __forceinline__ void tile_mix(float c[MT][D / 8][4], const uint32_t p[MT][N / 16][4],
                                         uint32_t b_tile, int b0)
{
#pragma unroll
    for (int kk = 0; kk < N / 16; kk++)
#pragma unroll
        for (int cc = 0; cc < D / 16; cc++) {
            uint32_t b[4];
            tile_b_cols<D>(b, b_tile, b0 + 16 * kk, cc);
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
                mma_bf16(c[mt][2 * cc], p[mt][kk], b[0], b[1]);
                mma_bf16(c[mt][2 * cc + 1], p[mt][kk], b[2], b[3]);
            }
        }
}
/* The accumulators c (16 MT, D), row (mt, half) times by[mt][half], as bf16 into rows r0 on of a
 * tile. Only the warp's own rows are touched: __syncwarp before it reads them. */
template <int D, int MT>
__device__ __forceinline__ void tile_put(char *tile, int r0, const float c[MT][D / 8][4],
                                         const float by[MT][2])
{
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int nt = 0; nt < D / 8; nt++) {
                int r = r0 + 16 * mt + 8 * half + (lane >> 2);
                float x = c[mt][nt][2 * half] * by[mt][half];
                float y = c[mt][nt][2 * half + 1] * by[mt][half];
                *(uint32_t *)(tile + tile_at<D>(r, nt) + (lane & 3) * 4) = pack_bf16(x, y);
            }
}
/* Minimum that keeps a NaN. */
__device__ __forceinline__ float min_nan(float x, float y)
{
    float r;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
    return r;
}
/* P of a score, given the row's lse; all in log2 units. Never above 1, whatever rounding does to
 * huge scores. */
__device__ __forceinline__ float tile_prob(float score, float scale, float lse)
{
    return exp2_fast(min_nan(fmaf(score, scale, -lse), 0.0f));
}
__device__ __forceinline__ float quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x)
{
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
/* One step of the online softmax over N more columns: scores s, -inf where masked, become
 * p = 2^((s - top) scale), with top the rows' maxima so far; sum (this thread's columns only:
 * quad_sum it at the end) is brought to the new maxima, and by is what does the same to the output
 * so far. scale > 0. Finite for all finite scores: the difference is taken first, so the largest p
 * is exactly 1. The first step has top = -inf, sum = 0, output 0; each row must have seen a column
 * by its end. */
template <int MT, int N>
__device__ __forceinline__ void tile_softmax(float s[MT][N / 8][4], float top[MT][2],
                                             float sum[MT][2], float by[MT][2], float scale)
{
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float m = top[mt][half];
#pragma unroll
            for (int nt = 0; nt < N / 8; nt++)
                m = fmaxf(m, fmaxf(s[mt][nt][2 * half], s[mt][nt][2 * half + 1]));
            m = quad_max(m);
            float total = 0.0f;
            by[mt][half] = exp2_fast((top[mt][half] - m) * scale);
            top[mt][half] = m;
#pragma unroll
            for (int nt = 0; nt < N / 8; nt++)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    s[mt][nt][e] = exp2_fast((s[mt][nt][e] - m) * scale);
                    total += s[mt][nt][e];
                }
            sum[mt][half] = sum[mt][half] * by[mt][half] + total;
        }
}
/* c (16 MT, D), row (mt, half) times by[mt][half] */
template <int D, int MT>
__device__ __forceinline__ void tile_scale(float c[MT][D / 8][4], const float by[MT][2])
{
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int nt = 0; nt < D / 8; nt++)
#pragma unroll
            for (int e = 0; e < 4; e++) c[mt][nt][e] *= by[mt][e >> 1];
}
#endif
