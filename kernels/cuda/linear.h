/* Linear layers on CUDA: what their files share. */
#pragma once
#include "kernels/cuda/dense.h"

#define LINEAR_FEW_ROWS 4

/* linear_fwd of up to LINEAR_FEW_ROWS rows (linear_few.cu): decoding. False: not for this shape or
 * these addresses, and nothing has happened. The caller looks for launch errors. */
bool srf__linear_few_fwd(struct srf_ctx *ctx, const struct srf_linear_fwd_args *a);
