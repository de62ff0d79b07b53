/* States stored in bf16, for prefills, which work on fp32. */
#pragma once
#include "kernels/cuda/cuda.h"

/* Bytes of the fp32 states of the shape's sequences. */
size_t srf__state_bytes(const struct srf_attn_shape *s);
/* state F32 (b, h, state_count) from a->state, which is bf16 and has its slots; or back. */
srf_status srf__state_convert(struct srf_ctx *ctx, const struct srf_srf_attn_prefill_args *a,
                              float *state, bool expand);
