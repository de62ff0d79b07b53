/* norm_linear_fwd as the ops that it is made of: for the backends. C and C++. */
#pragma once
#include "kernels/ops.h"

#include <string.h>

#define SRF__NORM_LINEAR_ROWS 4096 /* of the norm's output, held at once */

/* The ops for `rows` rows from `begin` on. What the norm writes is behind what the ops want of a
 * workspace. */
struct srf__norm_linear {
    struct srf_layernorm_fwd_args norm;
    struct srf_linear_fwd_args linear;
    size_t bytes; /* of the workspace */
};

static inline size_t srf__norm_linear_align(size_t bytes)
{
    return (bytes + 255) & ~(size_t)255;
}

static inline struct srf__norm_linear srf__norm_linear_of(const struct srf_ctx *ctx,
                                                          const struct srf_norm_linear_fwd_args *a,
                                                          int64_t begin, int64_t rows)
{
    struct srf__norm_linear o;
    size_t size = srf_dtype_bytes(ctx->dtype), row = (size_t)begin * size;
    memset(&o, 0, sizeof o);
    o.norm.n = rows, o.norm.c = a->in, o.norm.eps = a->eps;
    o.norm.x = (const char *)a->x + row * (size_t)a->in;
    o.norm.gamma = a->gamma, o.norm.beta = a->beta;
    o.linear.n = rows, o.linear.in = a->in, o.linear.out = a->out;
    o.linear.w = a->w, o.linear.b = a->b, o.linear.act = a->act;
    o.linear.y = (char *)a->y + row * (size_t)a->out;
    size_t of_norm = ctx->be->layernorm_fwd_workspace(ctx, &o.norm);
    size_t of_linear = ctx->be->linear_fwd_workspace(ctx, &o.linear);
    size_t own = srf__norm_linear_align(of_norm > of_linear ? of_norm : of_linear);
    size_t column = srf__norm_linear_align((size_t)rows * srf_dtype_bytes(srf_ctx_acc(ctx)));
    o.norm.mean = (char *)ctx->workspace + own;
    o.norm.rstd = (char *)ctx->workspace + own + column;
    o.norm.y = (char *)ctx->workspace + own + 2 * column;
    o.linear.x = o.norm.y;
    o.bytes = own + 2 * column + (size_t)(rows * a->in) * size;
    return o;
}

static inline srf_status srf__norm_linear_one_by_one(struct srf_ctx *ctx,
                                                     const struct srf_norm_linear_fwd_args *a)
{
    const int64_t most = SRF__NORM_LINEAR_ROWS;
    SRF_FAIL_IF(a->ld && a->ld != a->out, SRF_UNSUPPORTED,
                "norm_linear_fwd: %lld columns of %lld: only as one product", (long long)a->out,
                (long long)a->ld);
    for (int64_t begin = 0; begin < a->n; begin += most) {
        int64_t rows = a->n - begin < most ? a->n - begin : most;
        struct srf__norm_linear o = srf__norm_linear_of(ctx, a, begin, rows);
        SRF_TRY(ctx->be->layernorm_fwd(ctx, &o.norm));
        SRF_TRY(ctx->be->linear_fwd(ctx, &o.linear));
    }
    return SRF_OK;
}

static inline size_t srf__norm_linear_one_by_one_workspace(const struct srf_ctx *ctx,
                                                           const struct srf_norm_linear_fwd_args *a)
{
    const int64_t most = SRF__NORM_LINEAR_ROWS;
    return srf__norm_linear_of(ctx, a, 0, a->n < most ? a->n : most).bytes;
}
