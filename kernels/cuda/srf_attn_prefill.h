/* Prefill of SRF attention on tensor cores: bf16, heads of 64. States of either type are
 * read and written in place. */
#pragma once
#include "kernels/attn_fast.h"
#include "kernels/cuda/srf_attn.h"

/* srf_attn_prefill.cu: whether these kernels take the shape, these leading dimensions and pointers
 * (NULL: not known yet). */
bool srf__prefill_takes(const struct srf_ctx *ctx, const struct srf_srf_attn_prefill_args *a);
size_t srf__prefill_workspace(const struct srf_ctx *ctx, const struct srf_srf_attn_prefill_args *a);
srf_status srf__prefill(struct srf_ctx *ctx, const struct srf_srf_attn_prefill_args *a);
