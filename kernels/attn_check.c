/* What the attention ops of every backend refuse, in the same words. */
#include "kernels/backends.h"

srf_status srf__window_check(bool causal, int64_t window, int64_t sinks)
{
    SRF_FAIL_IF(window < 0 || sinks < 0, SRF_INVALID,
                "softmax attention with window %lld and %lld sinks: expected 0 or more",
                (long long)window, (long long)sinks);
    SRF_FAIL_IF(window && !causal, SRF_INVALID, "a window of softmax attention needs causal");
    SRF_FAIL_IF(sinks && !window, SRF_INVALID, "sinks of softmax attention need a window");
    return SRF_OK;
}

srf_status srf__map_attn_check(const struct srf_attn_shape *s, enum srf_map_kind map, int64_t ld,
                               int64_t ld_o)
{
    SRF_TRY(srf__attn_check(s, ld, ld_o));
    SRF_FAIL_IF(!s->causal || s->n_sets != s->h, SRF_INVALID,
                "attention with trained maps is causal and has a map for each head");
    SRF_FAIL_IF(map != SRF_MAP_HEDGEHOG && map != SRF_MAP_T2R, SRF_INVALID,
                "unknown trained map %d", (int)map);
    SRF_FAIL_IF(map == SRF_MAP_HEDGEHOG && s->m % 2, SRF_INVALID,
                "Hedgehog features come in pairs: m = %lld is odd", (long long)s->m);
    return SRF_OK;
}
