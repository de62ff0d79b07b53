/* Linear layers on CUDA: what their files share. */
#pragma once
#include "kernels/cuda/dense.h"
#include "kernels/cuda/gelu.h"

#define LINEAR_FEW_ROWS 4

/* linear_fwd of up to LINEAR_FEW_ROWS rows (linear_few.cu): decoding. False: not for this shape or
 * these addresses, and nothing has happened. The caller looks for launch errors. */
bool srf__linear_few_fwd(struct srf_ctx *ctx, const struct srf_linear_fwd_args *a);
/* linear_fwd in fp32, each row with the bits that it gets alone (linear_exact.cu). */
srf_status srf__linear_exact_fwd(struct srf_ctx *ctx, const struct srf_linear_fwd_args *a);

/* moments of x (n, c), bf16: norm_linear.cu. */
srf_status srf__moments(struct srf_ctx *ctx, int64_t n, int64_t c, const void *x, void *moments);

#ifdef __CUDACC__
/* What the kernels of our own get. */
template <typename T> struct linear_rows {
    int64_t n, in, out;
    const T *x, *w, *b, *residual;
    bool act;
    T *pre, *y;
};

template <typename T>
static struct linear_rows<T> linear_rows_of(const struct srf_linear_fwd_args *a) {
    struct linear_rows<T> r = {
    };
    r.n = a->n, r.in = a->in, r.out = a->out;
    r.x = (const T *)a->x, r.w = (const T *)a->w, r.b = (const T *)a->b;
    r.residual = (const T *)a->residual;
    r.act = a->act != SRF_ACT_NONE;
    r.pre = r.act ? (T *)a->pre : NULL, r.y = (T *)a->y;
    return r;
}

/* The product's element (row, column) is u. */
template <typename T>
static __device__ __forceinline__ void linear_finish(const struct linear_rows<T> *a, int64_t row,
                                                     int64_t column, float u)
{
    int64_t at = row * a->out + column;
    if (a->b) u += to_float(a->b[column]);
    if (a->residual) u += to_float(a->residual[at]);
    if (a->pre) a->pre[at] = from_float<T>(u);
    a->y[at] = from_float<T>(a->act ? gelu(u) : u);
}
#endif
