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
TODO(srf_attn_bwd)
TODO(srf_attn_step)
