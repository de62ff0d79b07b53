/* What linear_fwd keeps of an activation's slope for linear_bwd: how much, and in which order. C
 * and C++.
 *
 * T (n, c); but with T = BF16 a byte each: between -0.13 and 1.13, where GELU's slopes are, steps
 * of a 200th are as fine as bf16 is about 1, and 0 and 1 are among them. Bytes lie in whole tiles,
 * as the threads of a Hopper product have them: kernels/cuda/slope.h. */
#pragma once
#include "kernels/types.h"
#include <stdint.h>

#define SRF__SLOPE_ROWS 128 /* of a tile; tiles come in pairs, one below the other */
#define SRF__SLOPE_COLS 192

static inline int64_t srf_slope_bytes(enum srf_dtype dtype, int64_t n, int64_t c)
{
    int64_t pairs = (n + 2 * SRF__SLOPE_ROWS - 1) / (2 * SRF__SLOPE_ROWS);
    int64_t columns = (c + SRF__SLOPE_COLS - 1) / SRF__SLOPE_COLS;
    if (dtype != SRF_BF16) return n * c * (int64_t)srf_dtype_bytes(dtype);
    return pairs * 2 * columns * SRF__SLOPE_ROWS * SRF__SLOPE_COLS;
}
