/* Ops not written yet. */
#include "kernels/cuda/cuda.h"

#define TODO(name)                                                                                 \
    extern "C" srf_status cuda_##name(struct srf_ctx *, const struct srf_##name##_args *)          \
    {                                                                                              \
        SRF_FAIL(SRF_UNSUPPORTED, #name ": not on CUDA yet");                                      \
    }                                                                                              \
    extern "C" size_t cuda_##name##_workspace(const struct srf_ctx *,                              \
                                              const struct srf_##name##_args *)                    \
    {                                                                                              \
        return 0;                                                                                  \
    }
TODO(layernorm_fwd)
TODO(layernorm_bwd)
TODO(linear_fwd)
TODO(linear_bwd)
TODO(srf_attn_bwd)
TODO(srf_attn_step)
TODO(mse)
TODO(sumsq)
TODO(adamw)

void srf__cuda_free_plans(struct srf__cuda *cuda)
{
    (void)cuda;
}
