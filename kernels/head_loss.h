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
