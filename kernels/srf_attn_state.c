/* Size of the recurrent state of SRF attention, and its two stored forms, on every backend. */
#include "kernels/numeric.h"
#include "kernels/ops.h"

#include <string.h>

int64_t srf_attn_state_count(int64_t m, int64_t d, int64_t window)
{
    return m * (d + 2) + 4 * window * d;
}

int64_t srf_attn_state_bf16_bytes(int64_t m, int64_t d, int64_t window)
{
    return 2 * m * d + 8 * m + 8 * window * d;
}

void srf_attn_state_from_bf16(int64_t m, int64_t d, int64_t window, const void *bf16, float *values)
{
    const char *z = (const char *)bf16 + 2 * m * d;
    srf_convert_to_f32(values, bf16, SRF_BF16, m * d);
    memcpy(values + m * d, z, (size_t)(2 * m) * sizeof *values);
    srf_convert_to_f32(values + m * (d + 2), z + 8 * m, SRF_BF16, 4 * window * d);
}

void srf_attn_state_to_bf16(int64_t m, int64_t d, int64_t window, const float *values, void *bf16)
{
    char *z = (char *)bf16 + 2 * m * d;
    srf_convert_from_f32(bf16, SRF_BF16, values, m * d);
    memcpy(z, values + m * d, (size_t)(2 * m) * sizeof *values);
    srf_convert_from_f32(z + 8 * m, SRF_BF16, values + m * (d + 2), 4 * window * d);
}
