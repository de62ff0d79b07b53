/* The output head and its loss, of the ops that it is made of: rows of logits stay near the cache
 * where few are given at a time. */
#include "kernels/cpu/cpu.h"
#include "kernels/head_loss.h"

srf_status SRF_CPU(head_loss)(struct srf_ctx *ctx, const struct srf_head_loss_args *a)
{
    struct srf_linear_fwd_args logits = srf__head_logits(a);
    struct srf_xent_args xent = srf__head_xent(a);
    struct srf_linear_bwd_args gradients = srf__head_gradients(a);
    SRF_TRY(SRF_CPU(linear_fwd)(ctx, &logits));
    SRF_TRY(SRF_CPU(xent)(ctx, &xent));
    return SRF_CPU(linear_bwd)(ctx, &gradients);
}

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

size_t SRF_CPU(head_loss_workspace)(const struct srf_ctx *ctx, const struct srf_head_loss_args *a)
{
    struct srf_linear_fwd_args logits = srf__head_logits(a);
    struct srf_xent_args xent = srf__head_xent(a);
    struct srf_linear_bwd_args gradients = srf__head_gradients(a);
    return larger(SRF_CPU(linear_fwd_workspace)(ctx, &logits),
                  larger(SRF_CPU(xent_workspace)(ctx, &xent),
                         SRF_CPU(linear_bwd_workspace)(ctx, &gradients)));
}
