/* Size of the recurrent state of SRF attention, the same on every backend. */
#include "kernels/ops.h"

int64_t srf_attn_state_count(int64_t m, int64_t d, int64_t window)
{
    return m * (d + 2) + 4 * window * d;
}

int64_t srf_attn_state_bf16_bytes(int64_t m, int64_t d, int64_t window)
{
    return 2 * m * d + 8 * m + 8 * window * d;
}
