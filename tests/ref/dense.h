/* Double references of the dense ops, written from the formulas of kernels/ops.h as plain loops.
 *
 * They take the ops' own argument structs; every T and A pointer in them points at doubles, and
 * targets, tokens and positions at int32_t. Same conventions: parameters' gradients +=. */
#pragma once
#include "kernels/ops.h"

void ref_embed_fwd(const struct srf_embed_fwd_args *a);
void ref_embed_bwd(const struct srf_embed_bwd_args *a);
void ref_layernorm_fwd(const struct srf_layernorm_fwd_args *a);
void ref_layernorm_bwd(const struct srf_layernorm_bwd_args *a);
void ref_linear_fwd(const struct srf_linear_fwd_args *a);
void ref_norm_linear_fwd(const struct srf_norm_linear_fwd_args *a);
void ref_linear_bwd(const struct srf_linear_bwd_args *a);
void ref_xent(const struct srf_xent_args *a);
void ref_head_loss(const struct srf_head_loss_args *a);
void ref_mse(const struct srf_mse_args *a);
void ref_sumsq(const struct srf_sumsq_args *a);
void ref_adamw(const struct srf_adamw_args *a);
/* close[i] says that rounding could give row i another token. */
void ref_sample(const struct srf_sample_args *a, bool *close);

double ref_gelu(double u);
