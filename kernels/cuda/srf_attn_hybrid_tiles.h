/* What the kernels of the window hybrid share, second part: tiles of bf16 in shared memory and a
 * warp's products with them. Forms and names are explained in srf_attn_hybrid.cu.
 */
#pragma once
#include "kernels/cuda/srf_attn_hybrid.h"

#define WALK_THREADS 128
#define WALK_STAGES  3
#define COLUMNS      32 /* of a tile taken at once in backward: registers */

#ifdef __CUDACC__
/* ---- tiles in shared memory: rows of D + 8 elements, so that eight rows' pieces of 16 bytes lie
 * in different banks -------------------------------------------------------------------------- */

__device__ __forceinline__ void cp_async_4(float *dst, const float *src)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem_addr(dst)), "l"(src)
                 : "memory");
}

/* Threads that share a row: neighbours take neighbouring pieces. */
template <int D> __device__ constexpr int row_threads()
{
    return D % 64 == 0 ? 8 : D % 32 == 0 ? 4 : 2;
}

/* The larger magnitude, of both halves; NaN is the largest. */
__device__ __forceinline__ uint32_t max_abs_bf16(uint32_t most, uint32_t x)
{
    asm("{ .reg .b32 t; abs.bf16x2 t, %1; max.NaN.bf16x2 %0, %0, t; }" : "+r"(most) : "r"(x));
    return most;
}

/* C rows of D; those from n on are 0, and their addresses are not read. */
template <int D, int C, int THREADS>
__device__ __forceinline__ void load_rows(bf16 *to, const bf16 *from, int64_t ld, int n)
{
    constexpr int T = row_threads<D>();
    int row = threadIdx.x / T, piece = threadIdx.x % T;
    const bf16 *src = from + row * ld + piece * 8;
    uint32_t dst = smem_addr(to + row * (D + 8) + piece * 8);
#pragma unroll
    for (int r = 0; r < C; r += THREADS / T) {
        if (THREADS / T > C && row >= C) break;
#pragma unroll
        for (int i = 0; i < D / 8; i += T)
            cp_async_16(dst + (r * (D + 8) + i * 8) * 2, src + i * 8, row + r < n);
        src += ld * (THREADS / T);
    }
}

/* C floats, of which n (a multiple of 4) are there, at a multiple of 16 bytes; the others are 0. */
template <int C> __device__ __forceinline__ void load_features(float *to, const float *from, int n)
{
    int i = threadIdx.x * 4;
    if (i < C) cp_async_16(smem_addr(to + i), from + (i < n ? i : 0), i < n);
}

/* stat and delta of C queries, of which n are there: the others get no weight (2^-inf). */
template <int C>
__device__ __forceinline__ void load_stats(float *stat, float *delta, const struct hybrid *p,
                                           int64_t from, int n)
{
    int i = threadIdx.x;
    if (i < n && i < C) {
        cp_async_4(stat + i, p->stat + from + i);
        cp_async_4(delta + i, p->delta + from + i);
    } else if (i < C) {
        stat[i] = INFINITY;
        delta[i] = 0;
    }
}

/* Clamps the pieces that this thread loaded (NaN stays), which have arrived. That is rarely needed:
 * a look at the largest first. half, with NORM, is half_scale |row|^2. */
template <int D, int C, int THREADS, bool NORM>
__device__ __forceinline__ void clean_rows(bf16 *rows, const struct hybrid *p, float *half)
{
    constexpr int T = row_threads<D>();
    int row = threadIdx.x / T, piece = threadIdx.x % T;
    if (THREADS / T > C && row >= C) return;
    bf16 *mine = rows + row * (D + 8) + piece * 8;
    uint32_t limit = pack_bf16(p->limit, p->limit), most = 0;
#pragma unroll
    for (int r = 0; r < C; r += THREADS / T) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < D / 8; i += T) {
            uint4 all = *(const uint4 *)(mine + r * (D + 8) + i * 8);
            uint32_t x[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                most = max_abs_bf16(most, x[j]);
                if (NORM) {
                    float2 f = unpack_bf16(x[j]);
                    sum = fmaf(f.x, f.x, sum);
                    sum = fmaf(f.y, f.y, sum);
                }
            }
        }
        if (NORM) {
#pragma unroll
            for (int o = T / 2; o; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
            sum *= p->half_scale;
            /* Not fminf: NaN stays. */
            if (piece == 0) half[row + r] = sum > SRF__HALF_LIMIT ? SRF__HALF_LIMIT : sum;
        }
    }
    if ((most & 0xffffu) <= (limit & 0xffffu) && most >> 16 <= limit >> 16) return;
    for (int r = 0; r < C; r += THREADS / T)
        for (int i = 0; i < D / 8; i += T) {
            uint32_t *x = (uint32_t *)(mine + r * (D + 8) + i * 8);
            for (int j = 0; j < 4; j++) x[j] = clamp_bf16(x[j], limit);
        }
}

/* ---- products of a warp: 16 rows in fragments ------------------------------------------------ */

/* A fragment of k columns 16 kk .. of 16 rows in shared memory. */
template <int D> __device__ __forceinline__ void load_a(uint32_t a[4], const bf16 *rows, int kk)
{
    int lane = threadIdx.x & 31;
    ldmatrix_x4(a, smem_addr(rows + (lane & 15) * (D + 8) + kk * 16 + (lane >> 4) * 8));
}
/* The same from 16 rows of D elements in global memory. */
template <int D>
__device__ __forceinline__ void load_a_global(uint32_t (&a)[D / 16][4], const bf16 *rows)
{
    int lane = threadIdx.x & 31;
    const bf16 *at = rows + (lane >> 2) * D + (lane & 3) * 2;
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) {
        a[kk][0] = *(const uint32_t *)(at + kk * 16);
        a[kk][1] = *(const uint32_t *)(at + kk * 16 + 8 * D);
        a[kk][2] = *(const uint32_t *)(at + kk * 16 + 8);
        a[kk][3] = *(const uint32_t *)(at + kk * 16 + 8 * D + 8);
    }
}

/* A warp's 16 rows as A operand: in registers where there are enough, else read again each time. */
template <int D> struct a_rows {
    static constexpr bool KEEP = D <= 64;
    uint32_t a[KEEP ? D / 16 : 1][4];
    const bf16 *rows;

    __device__ __forceinline__ void init(const bf16 *from)
    {
        rows = from;
        if (KEEP)
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++) load_a<D>(a[KEEP ? kk : 0], from, kk);
    }
    __device__ __forceinline__ const uint32_t *get(int kk)
    {
        if (!KEEP) load_a<D>(a[0], rows, kk);
        return a[KEEP ? kk : 0];
    }
};

/* c (16, 8 N) += a (16, 16) tile^T: tile (8 N, D) rows, its k columns 16 kk .. */
template <int D, int N>
__device__ __forceinline__ void mma_rows(float (&c)[N][4], const uint32_t a[4], const bf16 *tile,
                                         int kk)
{
    int lane = threadIdx.x & 31;
    const bf16 *at =
        tile + ((lane & 7) + ((lane >> 4) << 3)) * (D + 8) + kk * 16 + ((lane >> 3) & 1) * 8;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, smem_addr(at + n * 8 * (D + 8)));
        mma_bf16(c[n], a, b[0], b[1]);
        mma_bf16(c[n + 1], a, b[2], b[3]);
    }
}

/* c (16, D) += a (16, 16) tile: 16 rows (16, D) of a tile. */
template <int D>
__device__ __forceinline__ void mma_cols(float (&c)[D / 8][4], const uint32_t a[4],
                                         const bf16 *tile)
{
    int lane = threadIdx.x & 31;
    const bf16 *at = tile + ((lane & 7) + ((lane >> 3) & 1) * 8) * (D + 8) + (lane >> 4) * 8;
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, smem_addr(at + n * 8));
        mma_bf16(c[n], a, b[0], b[1]);
        mma_bf16(c[n + 1], a, b[2], b[3]);
    }
}

/* Columns 16 k .. 16 k + 15 of a product, as the A of the next. */
__device__ __forceinline__ void pack_a(uint32_t a[4], const float left[4], const float right[4])
{
    a[0] = pack_bf16(left[0], left[1]);
    a[1] = pack_bf16(left[2], left[3]);
    a[2] = pack_bf16(right[0], right[1]);
    a[3] = pack_bf16(right[2], right[3]);
}

template <int N> __device__ __forceinline__ void zero(float (&c)[N][4])
{
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) c[n][j] = 0;
}

template <int N>
__device__ __forceinline__ void scale_rows(float (&c)[N][4], float upper, float lower)
{
#pragma unroll
    for (int n = 0; n < N; n++) {
        c[n][0] *= upper;
        c[n][1] *= upper;
        c[n][2] *= lower;
        c[n][3] *= lower;
    }
}

#endif
