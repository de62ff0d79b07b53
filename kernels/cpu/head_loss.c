/* The output head and its loss, of the ops that it is made of: rows of logits stay near the cache
 * where few are given at a time. */
#include "kernels/cpu/cpu.h"
#include "kernels/head_loss.h"

srf_status SRF_CPU(head_loss)(struct srf_ctx *ctx, const struct srf_head_loss_args *a)
{
    return srf__head_one_by_one(ctx, a);
}

size_t SRF_CPU(head_loss_workspace)(const struct srf_ctx *ctx, const struct srf_head_loss_args *a)
{
    return srf__head_one_by_one_workspace(ctx, a);
}
