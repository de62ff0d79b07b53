/* Shapes for which prefill of SRF attention on CUDA goes by chunks, on tensor cores (in bf16, on
 * Hopper); it goes token by token for others, which takes tens of times as long. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

static inline bool srf_attn_prefill_fast(int64_t d, int64_t m, int64_t window)
{
    return d == 64 && m >= 2 && m <= 512 && m % 2 == 0 && window >= 0 && window <= 256 &&
           window % 32 == 0;
}
