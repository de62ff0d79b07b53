#include "infer/sampler.h"
#include "kernels/sample.h"

static struct srf_sample_args args_of(const struct srf_sampler_config *c, int64_t vocab)
{
    return (struct srf_sample_args){
        .n = 1, .v = vocab, .temperature = c->temperature, .top_k = c->top_k, .top_p = c->top_p};
}

srf_status srf_sampler_check(const struct srf_sampler_config *c)
{
    struct srf_sample_args a = args_of(c, 1);
    return srf__sample_check(&a);
}

srf_status srf_sample(const struct srf_sampler_config *c, uint64_t seed, uint64_t sequence,
                      int64_t n, const float *logits, int64_t vocab, int32_t *out)
{
    const uint64_t stream[3] = {seed, sequence, (uint64_t)n};
    struct srf_sample_args a = args_of(c, vocab);
    *out = srf__sample_row(&a, logits, stream);
    for (int64_t i = 0; i < vocab && *out < 0; i++)
        SRF_FAIL_IF(!(logits[i] < INFINITY) || i == vocab - 1, SRF_NONFINITE,
                    "logit of token %lld is %g", (long long)i, (double)logits[i]);
    return SRF_OK;
}
