/* Double references of the attention ops, quadratic, written from the formulas of kernels/ops.h.
 * They take the ops' own argument structs, whose T and A pointers point at doubles. Weights are
 * formed as logarithms and normalised by exact log-sum-exp, so they are right for any finite input.
 * Backward uses nothing that forward left (o and lse in the arguments are not read). */
#pragma once
#include "kernels/ops.h"

void ref_softmax_attn_fwd(const struct srf_softmax_attn_fwd_args *a);
void ref_softmax_attn_bwd(const struct srf_softmax_attn_bwd_args *a);
void ref_srf_attn_fwd(const struct srf_srf_attn_fwd_args *a);
void ref_srf_attn_bwd(const struct srf_srf_attn_bwd_args *a);
/* dw is accumulated, and must be there. */
void ref_map_attn_fwd(const struct srf_map_attn_fwd_args *a);
void ref_map_attn_bwd(const struct srf_map_attn_bwd_args *a);
