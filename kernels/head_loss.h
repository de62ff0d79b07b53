/* head_loss as the ops that it is made of: for the backends. C and C++. */
#pragma once
#include "kernels/ops.h"

#include <string.h>

static inline struct srf_linear_fwd_args srf__head_logits(const struct srf_head_loss_args *a)
{
    struct srf_linear_fwd_args f;
    memset(&f, 0, sizeof f);
    f.n = a->n, f.in = a->c, f.out = a->ld;
    f.x = a->x, f.w = a->w, f.w_transposed = true;
    f.y = a->logits;
    return f;
}

/* The gradient takes the place of the logits. */
static inline struct srf_xent_args srf__head_xent(const struct srf_head_loss_args *a)
{
    struct srf_xent_args x;
    memset(&x, 0, sizeof x);
    x.n = a->n, x.v = a->v, x.ld = a->ld;
    x.logits = a->logits, x.targets = a->targets;
    x.scale = a->scale, x.ce_weight = a->ce_weight;
    x.nll = a->nll, x.dlogits = a->logits;
    return x;
}

static inline struct srf_linear_bwd_args srf__head_gradients(const struct srf_head_loss_args *a)
{
    struct srf_linear_bwd_args b;
    memset(&b, 0, sizeof b);
    b.n = a->n, b.in = a->c, b.out = a->ld;
    b.x = a->x, b.w = a->w, b.w_transposed = true;
    b.dy = a->logits, b.dx = a->dx, b.dw = a->dw;
    return b;
}

/* The op by these, on the context's own backend; and the workspace that they take. */
static inline srf_status srf__head_one_by_one(struct srf_ctx *ctx,
                                              const struct srf_head_loss_args *a)
{
    struct srf_linear_fwd_args logits = srf__head_logits(a);
    struct srf_xent_args xent = srf__head_xent(a);
    struct srf_linear_bwd_args gradients = srf__head_gradients(a);
    SRF_TRY(ctx->be->linear_fwd(ctx, &logits));
    SRF_TRY(ctx->be->xent(ctx, &xent));
    return ctx->be->linear_bwd(ctx, &gradients);
}

static inline size_t srf__head_one_by_one_workspace(const struct srf_ctx *ctx,
                                                    const struct srf_head_loss_args *a)
{
    struct srf_linear_fwd_args logits = srf__head_logits(a);
    struct srf_xent_args xent = srf__head_xent(a);
    struct srf_linear_bwd_args gradients = srf__head_gradients(a);
    size_t most = ctx->be->linear_fwd_workspace(ctx, &logits);
    size_t of_xent = ctx->be->xent_workspace(ctx, &xent);
    size_t of_gradients = ctx->be->linear_bwd_workspace(ctx, &gradients);
    most = of_xent > most ? of_xent : most;
    return of_gradients > most ? of_gradients : most;
}
