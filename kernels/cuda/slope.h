/* GELU's slopes as bytes (kernels/slope.h): their order and their code. */
#pragma once
#include "kernels/cuda/cuda.h"
#include "kernels/slope.h"

#define SLOPE_STEPS   200.0f /* a slope of 1 */
#define SLOPE_ZERO    27.0f
#define SLOPE_VECTORS 12 /* of a thread, 16 bytes each */
#define SLOPE_TILE    (SRF__SLOPE_ROWS * SRF__SLOPE_COLS)

#ifdef __CUDACC__
/* Tiles by row and column; a tile by warps, a warp's share by vectors of each lane. */
static __device__ __forceinline__ int64_t slope_place(int64_t row, int64_t col, int64_t n)
{
    int64_t columns = (n + SRF__SLOPE_COLS - 1) / SRF__SLOPE_COLS;
    int64_t tile = row / SRF__SLOPE_ROWS * columns + col / SRF__SLOPE_COLS;
    int r = (int)(row % SRF__SLOPE_ROWS), c = (int)(col % SRF__SLOPE_COLS);
    int warp = r % 64 / 16, lane = r % 8 * 4 + c % 8 / 2;
    int vector = c / 64 * 4 + r / 64 * 2 + c % 64 / 32;
    int byte = c % 32 / 8 * 4 + r % 16 / 8 * 2 + c % 2;
    return tile * SLOPE_TILE + ((warp * SLOPE_VECTORS + vector) * 32 + lane) * 16 + byte;
}
/* The byte is the lowest of these bits. NaN gives 255, which slope_of takes for 1.14: the
 * activation itself is NaN then, and whatever follows from it. */
static __device__ __forceinline__ uint32_t slope_code(float slope)
{
    return __float_as_uint(fmaf(slope, SLOPE_STEPS, SLOPE_ZERO + 8388608.0f));
}
/* Byte i of a word. */
static __device__ __forceinline__ float slope_of(uint32_t word, int i)
{
    float x =
        __uint_as_float(__byte_perm(word, 0x3f800000u, 0x7604 | i << 4)); /* 1 + byte / 2^15 */
    constexpr float by = 32768.0f / SLOPE_STEPS;
    return fmaf(x, by, -by * (1.0f + SLOPE_ZERO / 32768.0f));
}
#endif
