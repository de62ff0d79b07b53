/* The next token from logits: greedy, temperature, top-k, top-p (nucleus, arXiv 1904.09751). */
#pragma once
#include "kernels/features.h"

struct srf_sampler_config {
    double temperature; /* 0 = the most likely token */
    int64_t top_k;      /* only the k most likely; 0 = all */
    double top_p;       /* only the smallest set whose probability reaches p; 1 = all */
};

/* SRF_INVALID naming the setting. */
srf_status srf_sampler_check(const struct srf_sampler_config *c);
/* Token `n` of sequence `sequence` under seed: a function of these and the logits alone, whatever
 * else runs beside it. Filters apply in the order temperature, top_k, top_p; ties go to the lower
 * id. SRF_NONFINITE for a NaN or +inf, or where all logits are -inf. */
srf_status srf_sample(const struct srf_sampler_config *c, uint64_t seed, uint64_t sequence,
                      int64_t n, const float *logits, int64_t vocab, int32_t *out);
