/* Inside the library: the backends that this build has. */
#pragma once
#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Fill ctx->be, stream, impl, n_threads. CUDA answers SRF_UNSUPPORTED where the build has no CUDA
 * or the machine no card. */
srf_status srf__cpu_open(struct srf_ctx *ctx, int threads);
srf_status srf__cuda_open(struct srf_ctx *ctx);

/* Whether an SRF attention op can take a shape: the backends refuse in the same words. */
srf_status srf__attn_check(const struct srf_attn_shape *s, int64_t ld, int64_t ld_o);

/* Softmax attention's window and sinks, and a trained map's shape: the same. */
srf_status srf__window_check(bool causal, int64_t window, int64_t sinks);
srf_status srf__map_attn_check(const struct srf_attn_shape *s, enum srf_map_kind map, int64_t ld,
                               int64_t ld_o);

/* The op prototypes of each backend, from THE list. */
#define X(name)                                                                                    \
    srf_status cpu_f32_##name(struct srf_ctx *ctx, const struct srf_##name##_args *args);          \
    size_t cpu_f32_##name##_workspace(const struct srf_ctx *ctx,                                   \
                                      const struct srf_##name##_args *args);                       \
    srf_status cpu_f64_##name(struct srf_ctx *ctx, const struct srf_##name##_args *args);          \
    size_t cpu_f64_##name##_workspace(const struct srf_ctx *ctx,                                   \
                                      const struct srf_##name##_args *args);
#include "kernels/ops.def"
#undef X

#ifdef __cplusplus
}
#endif
