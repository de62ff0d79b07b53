#include "infer/sampler.h"

#include <math.h>
#include <stdlib.h>

srf_status srf_sampler_check(const struct srf_sampler_config *c)
{
    SRF_FAIL_IF(!(c->temperature >= 0 && c->temperature <= 100), SRF_INVALID,
                "temperature %g: expected 0 to 100", c->temperature);
    SRF_FAIL_IF(c->top_k < 0, SRF_INVALID, "top-k %lld: expected >= 0", (long long)c->top_k);
    SRF_FAIL_IF(!(c->top_p > 0 && c->top_p <= 1), SRF_INVALID, "top-p %g: expected 0 to 1",
                c->top_p);
    return SRF_OK;
}

/* More likely first; ties by id. */
static int by_logit(const void *a, const void *b, void *logits)
{
    const float *l = logits;
    int32_t i = *(const int32_t *)a, j = *(const int32_t *)b;
    if (l[i] != l[j]) return l[i] > l[j] ? -1 : 1;
    return i < j ? -1 : i > j;
}

srf_status srf_sample(const struct srf_sampler_config *c, uint64_t seed, uint64_t sequence,
                      int64_t n, const float *logits, int64_t vocab, int32_t *scratch, int32_t *out)
{
    int32_t best = 0;
    for (int64_t i = 0; i < vocab; i++) {
        SRF_FAIL_IF(!isfinite(logits[i]), SRF_NONFINITE, "logit of token %lld is %g", (long long)i,
                    (double)logits[i]);
        if (logits[i] > logits[best]) best = (int32_t)i;
    }
    *out = best;
    if (c->temperature == 0 || c->top_k == 1) return SRF_OK;
    int64_t kept = vocab;
    for (int64_t i = 0; i < vocab; i++) scratch[i] = (int32_t)i;
    /* Sorted only where an order is needed. */
    if (c->top_k > 0 || c->top_p < 1)
        qsort_r(scratch, (size_t)vocab, sizeof *scratch, by_logit, (void *)logits);
    if (c->top_k > 0 && c->top_k < kept) kept = c->top_k;
    double max = (double)logits[best], sum = 0;
    for (int64_t i = 0; i < kept; i++)
        sum += exp(((double)logits[scratch[i]] - max) / c->temperature);
    if (c->top_p < 1) {
        double reach = c->top_p * sum, part = 0;
        for (int64_t i = 0; i < kept; i++) {
            part += exp(((double)logits[scratch[i]] - max) / c->temperature);
            if (part < reach) continue;
            kept = i + 1;
            sum = part;
        }
    }
    struct srf_rng rng = srf_rng_at(seed, SRF_RNG_SAMPLE, (uint64_t)n, (uint32_t)sequence,
                                    (uint32_t)(sequence >> 32));
    double u = srf_rng_uniform(&rng) * sum, part = 0;
    for (int64_t i = 0; i < kept; i++) {
        part += exp(((double)logits[scratch[i]] - max) / c->temperature);
        *out = scratch[i];
        if (part >= u) break;
    }
    return SRF_OK;
}
