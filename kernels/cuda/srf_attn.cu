/* SRF attention: which kernels serve which shape. The scan (srf_attn_scan.h) takes every shape in
 * both dtypes; the tensor-core paths, bf16 only, say themselves what they take. */
#include "kernels/cuda/srf_attn.h"
#include "kernels/cuda/srf_attn_prefill.h"
#include "kernels/cuda/srf_attn_scan.h"
#include "kernels/cuda/srf_attn_state.h"

/* Pointers are not known while planning, and decide which path runs: room for either. */
static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

extern "C" size_t cuda_srf_attn_fwd_workspace(const struct srf_ctx *ctx,
                                              const struct srf_srf_attn_fwd_args *a)
{
    size_t scan = srf__scan_fwd_workspace(ctx, &a->s, true);
    if (srf__hybrid_takes_fwd(ctx, a)) return larger(scan, srf__hybrid_fwd_workspace(ctx, a));
    return srf__pure_takes_fwd(ctx, a) ? larger(scan, srf__pure_fwd_workspace(ctx, a)) : scan;
}

extern "C" srf_status cuda_srf_attn_fwd(struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a)
{
    SRF_TRY(srf__attn_check(&a->s, a->ld, a->ld_o));
    if (a->s.b * a->s.t == 0) return SRF_OK;
    if (srf__pure_takes_fwd(ctx, a)) return srf__pure_fwd(ctx, a);
    if (srf__hybrid_takes_fwd(ctx, a)) return srf__hybrid_fwd(ctx, a);
    return srf__scan_fwd(ctx, a);
}

size_t srf__attn_carry_bytes(const struct srf_ctx *ctx, const struct srf_attn_shape *s)
{
    return s->window > 0 ? srf__hybrid_carry_bytes(ctx, s) : srf__pure_carry_bytes(ctx, s);
}

extern "C" size_t cuda_srf_attn_bwd_workspace(const struct srf_ctx *ctx,
                                              const struct srf_srf_attn_bwd_args *a)
{
    size_t scan = srf__scan_bwd_workspace(ctx, a);
    if (srf__hybrid_takes_bwd(ctx, a)) return larger(scan, srf__hybrid_bwd_workspace(ctx, a));
    return srf__pure_takes_bwd(ctx, a) ? larger(scan, srf__pure_bwd_workspace(ctx, a)) : scan;
}

extern "C" srf_status cuda_srf_attn_bwd(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a)
{
    SRF_TRY(srf__attn_check(&a->s, a->ld, a->ld_o));
    if (a->s.b * a->s.t == 0) return SRF_OK;
    if (srf__pure_takes_bwd(ctx, a)) return srf__pure_bwd(ctx, a);
    if (srf__hybrid_takes_bwd(ctx, a)) return srf__hybrid_bwd(ctx, a);
    return srf__scan_bwd(ctx, a);
}

/* The same prefill, of fp32 copies of the states behind the workspace that it wants itself. */
static struct srf_srf_attn_prefill_args on_copies(const struct srf_srf_attn_prefill_args *a)
{
    struct srf_srf_attn_prefill_args copy = *a;
    copy.state_bf16 = false;
    copy.slots = NULL;
    return copy;
}

static size_t bf16_prefill_workspace(const struct srf_ctx *ctx,
                                     const struct srf_srf_attn_prefill_args *a)
{
    struct srf_srf_attn_prefill_args copy = on_copies(a);
    return (cuda_srf_attn_prefill_workspace(ctx, &copy) + 255) / 256 * 256;
}

static srf_status bf16_prefill(struct srf_ctx *ctx, const struct srf_srf_attn_prefill_args *a)
{
    struct srf_srf_attn_prefill_args copy = on_copies(a);
    float *state = (float *)((char *)ctx->workspace + bf16_prefill_workspace(ctx, a));
    copy.state = state;
    SRF_TRY(srf__state_convert(ctx, a, state, true));
    SRF_TRY(cuda_srf_attn_prefill(ctx, &copy));
    return srf__state_convert(ctx, a, state, false);
}

extern "C" size_t cuda_srf_attn_prefill_workspace(const struct srf_ctx *ctx,
                                                  const struct srf_srf_attn_prefill_args *a)
{
    size_t fast = srf__prefill_takes(ctx, a) ? srf__prefill_workspace(ctx, a) : 0;
    size_t any = a->state_bf16 ? bf16_prefill_workspace(ctx, a) + srf__state_bytes(&a->s)
                               : srf__scan_fwd_workspace(ctx, &a->s, false);
    return larger(fast, any);
}

extern "C" srf_status cuda_srf_attn_prefill(struct srf_ctx *ctx,
                                            const struct srf_srf_attn_prefill_args *a)
{
    SRF_TRY(srf__attn_check(&a->s, a->ld, a->ld_o));
    SRF_FAIL_IF(!a->s.causal, SRF_INVALID, "prefill of srf attention that is not causal");
    SRF_FAIL_IF(a->state_bf16 && a->s.m * a->s.d % 2, SRF_UNSUPPORTED,
                "states in bf16: for an even number of features times head size, not %lld x %lld",
                (long long)a->s.m, (long long)a->s.d);
    if (a->s.b * a->s.t == 0 || (a->offsets && a->rows == 0)) return SRF_OK;
    if (srf__prefill_takes(ctx, a)) return srf__prefill(ctx, a);
    if (a->state_bf16) return bf16_prefill(ctx, a);
    return srf__scan_prefill(ctx, a);
}

extern "C" size_t cuda_srf_attn_step_workspace(const struct srf_ctx *ctx,
                                               const struct srf_srf_attn_step_args *a)
{
    (void)ctx;
    (void)a;
    return 0;
}

extern "C" srf_status cuda_srf_attn_step(struct srf_ctx *ctx,
                                         const struct srf_srf_attn_step_args *a)
{
    SRF_TRY(srf__attn_check(&a->s, a->ld, a->ld_o));
    SRF_FAIL_IF(!a->s.causal || a->s.t != 1, SRF_INVALID,
                "a step of srf attention: expected causal and 1 token, found %s and %lld",
                a->s.causal ? "causal" : "not causal", (long long)a->s.t);
    if (a->s.b == 0) return SRF_OK;
    return srf__scan_step(ctx, a);
}
