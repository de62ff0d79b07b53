/* Softmax attention: o_t = sum_s P_ts v_s, P_ts = exp(q_t.k_s / sqrt(d) - lse_t), s <= t if causal.
 * This file checks arguments and chooses: tensor cores (softmax_attn_mma.cu) for bf16 with the
 * usual head sizes and 16-byte aligned rows, plain fp32 arithmetic (softmax_attn_any.cu) for the
 * rest. Head size 64 has Hopper's own instructions (softmax_attn_wgmma.cu) where there are any.
 *
 * Workspace of backward: two floats for each query and head, queries rounded up to ROW_PAD.
 */
#include "kernels/cuda/softmax_attn.h"

static srf_status check(int64_t b, int64_t t, int64_t h, int64_t d, int64_t ld, int64_t ld_o)
{
    SRF_FAIL_IF(
        b < 0 || t < 0 || h < 1 || d < 1, SRF_INVALID,
        "softmax attention of b=%lld t=%lld h=%lld d=%lld: expected b, t >= 0 and h, d >= 1",
        (long long)b, (long long)t, (long long)h, (long long)d);
    SRF_FAIL_IF(ld < h * d || ld_o < h * d, SRF_INVALID,
                "softmax attention with leading dimensions %lld and %lld: expected at least %lld",
                (long long)ld, (long long)ld_o, (long long)(h * d));
    SRF_FAIL_IF(d > 512, SRF_UNSUPPORTED,
                "softmax attention on CUDA takes head sizes up to 512, not %lld", (long long)d);
    /* A block has at least 8 rows of one head. */
    SRF_FAIL_IF(t > INT32_MAX - 1024 || b * h > INT32_MAX / div_up(t ? t : 1, 8), SRF_UNSUPPORTED,
                "softmax attention on CUDA: b=%lld t=%lld h=%lld is too large", (long long)b,
                (long long)t, (long long)h);
    return SRF_OK;
}

static void set_window(struct attn *p, int64_t window, int64_t sinks)
{
    p->window = window == 0 || window > p->t ? INT32_MAX : (int)window;
    p->sinks = (int)(sinks < p->t ? sinks : p->t);
}

/* Whether rows of 16-byte pieces can be read and written at p. */
static bool aligned(const void *p, int64_t ld)
{
    return (uintptr_t)p % 16 == 0 && ld % 8 == 0;
}

extern "C" size_t cuda_softmax_attn_fwd_workspace(const struct srf_ctx *,
                                                  const struct srf_softmax_attn_fwd_args *)
{
    return 0;
}

extern "C" srf_status cuda_softmax_attn_fwd(struct srf_ctx *ctx,
                                            const struct srf_softmax_attn_fwd_args *a)
{
    SRF_TRY(check(a->b, a->t, a->h, a->d, a->ld, a->ld_o));
    SRF_TRY(srf__window_check(a->causal, a->window, a->sinks));
    if (a->b * a->t == 0) return SRF_OK;
    struct attn p = {};
    p.q = a->q, p.k = a->k, p.v = a->v, p.out = a->o, p.lse = (float *)a->lse;
    p.ld = a->ld, p.ld_o = a->ld_o;
    p.t = (int)a->t, p.h = (int)a->h, p.d = (int)a->d, p.heads = (int)(a->b * a->h);
    p.scale = (float)(1 / sqrt((double)a->d));
    set_window(&p, a->window, a->sinks);
    if (ctx->dtype == SRF_BF16 && attn_mma_takes(a->d) && aligned(a->q, a->ld) &&
        aligned(a->k, a->ld) && aligned(a->v, a->ld) && aligned(a->o, a->ld_o))
        return srf__attn_wgmma_takes(ctx, a->d) ? srf__attn_wgmma_fwd(ctx, &p, a->causal)
                                                : srf__attn_mma_fwd(ctx, &p, a->causal);
    return srf__attn_any_fwd(ctx, &p, a->causal);
}

extern "C" size_t cuda_softmax_attn_bwd_workspace(const struct srf_ctx *,
                                                  const struct srf_softmax_attn_bwd_args *a)
{
    return (size_t)(a->b * a->h * div_up(a->t, ROW_PAD) * ROW_PAD) * sizeof(float2);
}

extern "C" srf_status cuda_softmax_attn_bwd(struct srf_ctx *ctx,
                                            const struct srf_softmax_attn_bwd_args *a)
{
    SRF_TRY(check(a->b, a->t, a->h, a->d, a->ld, a->ld_o));
    SRF_TRY(srf__window_check(a->causal, a->window, a->sinks));
    if (a->b * a->t == 0) return SRF_OK;
    struct attn p = {};
    p.q = a->q, p.k = a->k, p.v = a->v, p.o = a->o, p.d_o = a->d_o, p.lse = (float *)a->lse;
    p.row_stride = (int)(div_up(a->t, ROW_PAD) * ROW_PAD);
    p.dq = a->dq, p.dk = a->dk, p.dv = a->dv, p.rows = (float2 *)ctx->workspace;
    p.ld = a->ld, p.ld_o = a->ld_o;
    p.t = (int)a->t, p.h = (int)a->h, p.d = (int)a->d, p.heads = (int)(a->b * a->h);
    p.scale = (float)(1 / sqrt((double)a->d));
    set_window(&p, a->window, a->sinks);
    if (ctx->dtype == SRF_BF16 && attn_mma_takes(a->d) && aligned(a->q, a->ld) &&
        aligned(a->k, a->ld) && aligned(a->v, a->ld) && aligned(a->o, a->ld_o) &&
        aligned(a->d_o, a->ld_o) && aligned(a->dq, a->ld) && aligned(a->dk, a->ld) &&
        aligned(a->dv, a->ld))
        return srf__attn_wgmma_takes(ctx, a->d) ? srf__attn_wgmma_bwd(ctx, &p, a->causal)
                                                : srf__attn_mma_bwd(ctx, &p, a->causal);
    return srf__attn_any_bwd(ctx, &p, a->causal);
}
