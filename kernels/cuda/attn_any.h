/* What attention in plain fp32 arithmetic is made of, for either dtype and any head size. A block
 * has WARPS warps of R rows each; rows, and COLS columns at a time, lie in shared memory as fp32. A
 * lane makes the scores of one column, then holds d / 32 elements of each row's result while the
 * columns' weights go round by shuffles. */
#pragma once
#include "kernels/cuda/cuda.h"

#define WARPS   8
#define THREADS (32 * WARPS)
#define COLS    32

/* Floats from one row in shared memory to the next: an odd multiple of 4, so that 8 lanes that read
 * 16 bytes of 8 rows meet no bank twice. */
__host__ __device__ __forceinline__ int row_floats(int d)
{
    int n = (d + 3) / 4 * 4;
    return n % 8 ? n : n + 4;
}

/* Rows of src as floats: `valid` of them, then zeros; zeros after column d as well. */
template <typename T>
static __device__ void load_rows(float *to, const T *src, int64_t ld, int rows, int valid, int d)
{
    int n = row_floats(d);
    for (int i = threadIdx.x; i < rows * n; i += THREADS) {
        int r = i / n, j = i % n;
        to[i] = r < valid && j < d ? to_float(src[r * ld + j]) : 0.0f;
    }
}
/* s[r] = row r of the warp . this lane's column */
template <int R>
static __device__ __forceinline__ void scores(float s[R], const float *rows, const float *cols,
                                              int d)
{
    int n = row_floats(d);
    const float *col = cols + (threadIdx.x & 31) * n;
#pragma unroll
    for (int r = 0; r < R; r++) s[r] = 0.0f;
    for (int j = 0; j < d; j += 4) {
        float4 c = *(const float4 *)(col + j);
#pragma unroll
        for (int r = 0; r < R; r++) {
            float4 x = *(const float4 *)(rows + r * n + j);
            s[r] = fmaf(x.x, c.x, fmaf(x.y, c.y, fmaf(x.z, c.z, fmaf(x.w, c.w, s[r]))));
        }
    }
}
/* acc[r][i] += sum over columns of p[r] (each lane its column's) times element lane + 32 i of it */
template <int NJ, int R>
static __device__ __forceinline__ void mix(float acc[R][NJ], const float p[R], const float *cols,
                                           int d)
{
    int n = row_floats(d), lane = threadIdx.x & 31;
    for (int c = 0; c < COLS; c++) {
        float w[R];
#pragma unroll
        for (int r = 0; r < R; r++) w[r] = __shfl_sync(0xffffffffu, p[r], c);
#pragma unroll
        for (int i = 0; i < NJ; i++) {
            int j = lane + 32 * i;
            float x = j < d ? cols[c * n + j] : 0.0f;
#pragma unroll
            for (int r = 0; r < R; r++) acc[r][i] = fmaf(w[r], x, acc[r][i]);
        }
    }
}
template <typename T, int NJ, int R>
static __device__ __forceinline__ void store_rows(T *to, int64_t ld, const float acc[R][NJ],
                                                  const float by[R], int valid, int d)
{
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int i = 0; i < NJ; i++) {
            int j = lane + 32 * i;
            if (r < valid && j < d) to[r * ld + j] = from_float<T>(acc[r][i] * by[r]);
        }
}
