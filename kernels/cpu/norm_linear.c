/* Layer norm and the linear layer behind it, of the ops that they are. */
#include "kernels/norm_linear.h"
#include "kernels/cpu/cpu.h"

srf_status SRF_CPU(norm_linear_fwd)(struct srf_ctx *ctx, const struct srf_norm_linear_fwd_args *a)
{
    return srf__norm_linear_one_by_one(ctx, a);
}

size_t SRF_CPU(norm_linear_fwd_workspace)(const struct srf_ctx *ctx,
                                          const struct srf_norm_linear_fwd_args *a)
{
    return srf__norm_linear_one_by_one_workspace(ctx, a);
}
