/* The window hybrid with warpgroup products (wgmma.h): window 64, heads of 64, at most 64 features.
 * srf_attn_hybrid_wgmma.cu tells what is different. */
#pragma once
#include "kernels/cuda/srf_attn_hybrid.h"

srf_status srf__hybrid_wgmma_fwd(struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a,
                                 const struct hybrid *p);
/* dq, delta, M after each block. */
srf_status srf__hybrid_wgmma_dq(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a,
                                const struct hybrid *p);
/* dk, dv, after dq. */
srf_status srf__hybrid_wgmma_keys(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a,
                                  const struct hybrid *p);
