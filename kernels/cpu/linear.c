/* Linear layers: y = act(x W + b), by BLAS; and act_fwd, the activation alone.
 *
 *     forward    u = x W + b,  y = act(u)
 *     backward   dx = (dy W^T) act'(x_pre),  dw += x^T dy,  db += sum_n dy,  dx_sum += sum_n dx
 *
 * The bias is written into y before the product, which then runs with beta = 1: BLAS would clear y
 * in that pass anyway. GELU is a pass over u after the product; its derivative a pass over dx.
 *     gelu(u) = u s,  gelu'(u) = s + u s (1 - s) r',  r = 2 sqrt(2/pi) (u + 0.044715 u^3),
 *     s = 1 / (1 + e^-r):  the tanh form, since (1 + tanh z) / 2 = 1 / (1 + e^-2z)
 * With e = e^-|r|, s is 1 / (1 + e) for u > 0 and e / (1 + e) for u < 0, and s (1 - s) is
 * e / (1 + e)^2: nothing overflows and small s keep their relative precision.
 * Floor: BLAS's rate; 2 n in out flops forward, twice that backward. */
#include "kernels/cpu/split.h"

#define GELU_SCALE ((real)1.5957691216057308) /* 2 sqrt(2/pi) */
#define GELU_CUBIC ((real)0.044715)

/* Rows of dx that go through the workspace at a time. */
#define DX_ROWS 512

static inline real gelu(real u)
{
    real r = GELU_SCALE * (real)fabs(u) * (1 + GELU_CUBIC * u * u), e = srf__exp_neg(-r);
    return u * (u > 0 ? 1 : e) / (1 + e);
}

static inline real gelu_derivative(real u)
{
    /* beyond 100, e is 0 in both precisions; r' must not be infinite then. NaN passes through. */
    real x = u < -100 ? -100 : u;
    x = x > 100 ? 100 : x;
    real x2 = x * x, e = srf__exp_neg(-GELU_SCALE * (real)fabs(x) * (1 + GELU_CUBIC * x2));
    real q = 1 / (1 + e);
    return q * ((x > 0 ? 1 : e) + x * e * q * GELU_SCALE * (1 + 3 * GELU_CUBIC * x2));
}

static srf_status check_shape(const char *op, int64_t n, int64_t in, int64_t out)
{
    SRF_FAIL_IF(n > INT32_MAX || in > INT32_MAX || out > INT32_MAX, SRF_INVALID,
                "%s: shape (%lld, %lld, %lld): BLAS takes at most %d in each dimension", op,
                (long long)n, (long long)in, (long long)out, INT32_MAX);
    return SRF_OK;
}

/* y = residual + b; either may be missing, and residual may be y. */
static void put_start(struct srf_ctx *ctx, int64_t n, int64_t out, const real *b,
                      const real *residual, real *y)
{
#pragma omp parallel for schedule(static) num_threads(ctx->n_threads) if (n * out > MIN_PARALLEL)
    for (int64_t i = 0; i < n; i++) {
        real *row = y + i * out;
        const real *from = residual ? residual + i * out : b;
        if (residual && b)
            for (int64_t j = 0; j < out; j++) row[j] = from[j] + b[j];
        else if (row != from)
            memcpy(row, from, (size_t)out * sizeof *b);
    }
}

/* y = gelu(u); y may be u: each element is read before it is written. */
static void activate(struct srf_ctx *ctx, int64_t n, const real *u, real *y)
{
#pragma omp parallel for simd schedule(static) num_threads(ctx->n_threads) if (n > MIN_PARALLEL)
    for (int64_t i = 0; i < n; i++) y[i] = gelu(u[i]);
}

/* s = gelu'(u); before y = gelu(u), which may be u. */
static void slopes(struct srf_ctx *ctx, int64_t n, const real *u, real *s)
{
#pragma omp parallel for simd schedule(static) num_threads(ctx->n_threads) if (n > MIN_PARALLEL)
    for (int64_t i = 0; i < n; i++) s[i] = gelu_derivative(u[i]);
}

srf_status SRF_CPU(linear_fwd)(struct srf_ctx *ctx, const struct srf_linear_fwd_args *a)
{
    if (a->n == 0 || a->in == 0 || a->out == 0) return SRF_OK;
    SRF_TRY(check_shape("linear_fwd", a->n, a->in, a->out));
    SRF_FAIL_IF(a->residual && a->act != SRF_ACT_NONE, SRF_INVALID,
                "linear_fwd: a residual goes with no activation");
    real *u = a->act != SRF_ACT_NONE && a->pre ? a->pre : a->y;
    if (a->b || a->residual) put_start(ctx, a->n, a->out, a->b, a->residual, u);
    srf__gemm(ctx, false, a->w_transposed, a->n, a->out, a->in, 1, a->x, a->in, a->w,
              a->w_transposed ? a->in : a->out, a->b || a->residual, u, a->out);
    if (a->act != SRF_ACT_NONE && a->slope) slopes(ctx, a->n * a->out, u, a->slope);
    if (a->act != SRF_ACT_NONE) activate(ctx, a->n * a->out, u, a->y);
    return SRF_OK;
}

size_t SRF_CPU(linear_fwd_workspace)(const struct srf_ctx *ctx, const struct srf_linear_fwd_args *a)
{
    (void)ctx;
    (void)a;
    return 0;
}

static void input_gradient(struct srf_ctx *ctx, const struct srf_linear_bwd_args *a, int64_t begin,
                           int64_t rows, real beta, real *dx)
{
    srf__gemm(ctx, false, !a->w_transposed, rows, a->in, a->out, 1,
              (const real *)a->dy + begin * a->out, a->out, a->w, a->w_transposed ? a->in : a->out,
              beta, dx, a->in);
}

/* dx = or += act'(x_pre), or x_slope, times the product, which goes through the workspace where dx
 * is kept. */
static void input_gradient_act(struct srf_ctx *ctx, const struct srf_linear_bwd_args *a)
{
    int64_t step = a->dx_accumulate ? DX_ROWS : a->n;
    for (int64_t begin = 0; begin < a->n; begin += step) {
        int64_t rows = a->n - begin < step ? a->n - begin : step, count = rows * a->in;
        const real *pre = a->x_pre ? (const real *)a->x_pre + begin * a->in : NULL;
        const real *slope = a->x_slope ? (const real *)a->x_slope + begin * a->in : NULL;
        real *dx = (real *)a->dx + begin * a->in, *d = a->dx_accumulate ? ctx->workspace : dx;
        input_gradient(ctx, a, begin, rows, 0, d);
        if (slope && a->dx_accumulate) {
#pragma omp parallel for simd schedule(static) num_threads(ctx->n_threads) if (count > MIN_PARALLEL)
            for (int64_t i = 0; i < count; i++) dx[i] += d[i] * slope[i];
        } else if (slope) {
#pragma omp parallel for simd schedule(static) num_threads(ctx->n_threads) if (count > MIN_PARALLEL)
            for (int64_t i = 0; i < count; i++) dx[i] *= slope[i];
        } else if (a->dx_accumulate) {
#pragma omp parallel for simd schedule(static) num_threads(ctx->n_threads) if (count > MIN_PARALLEL)
            for (int64_t i = 0; i < count; i++) dx[i] += d[i] * gelu_derivative(pre[i]);
        } else {
#pragma omp parallel for simd schedule(static) num_threads(ctx->n_threads) if (count > MIN_PARALLEL)
            for (int64_t i = 0; i < count; i++) dx[i] *= gelu_derivative(pre[i]);
        }
    }
}

/* db += column sums of dy (n, out), by partial sums of ranges of rows in the workspace. */
static void column_sums(struct srf_ctx *ctx, int64_t n, int64_t out, const real *dy, real *db)
{
    int64_t parts = ctx->n_threads, stride = srf__part_stride(out);
    real *sums = ctx->workspace;
#pragma omp parallel for schedule(static) num_threads(ctx->n_threads) if (n * out > MIN_PARALLEL)
    for (int64_t part = 0; part < parts; part++) {
        real *sum = sums + part * stride;
        memset(sum, 0, (size_t)out * sizeof *sum);
        int64_t end = srf__split(n, parts, part + 1);
        for (int64_t i = srf__split(n, parts, part); i < end; i++) {
            const real *row = dy + i * out;
            for (int64_t j = 0; j < out; j++) sum[j] += row[j];
        }
    }
    for (int64_t part = 0; part < parts; part++)
        for (int64_t j = 0; j < out; j++) db[j] += sums[part * stride + j];
}

srf_status SRF_CPU(linear_bwd)(struct srf_ctx *ctx, const struct srf_linear_bwd_args *a)
{
    if (a->n == 0 || a->in == 0 || a->out == 0) return SRF_OK;
    SRF_TRY(check_shape("linear_bwd", a->n, a->in, a->out));
    SRF_FAIL_IF((a->x_act != SRF_ACT_NONE) != (a->x_pre != NULL), SRF_INVALID,
                "linear_bwd: x_act and x_pre go together");
    SRF_FAIL_IF(a->x_pre && a->x_slope, SRF_INVALID, "linear_bwd: x_pre or x_slope, not both");
    if (a->dx && (a->x_act != SRF_ACT_NONE || a->x_slope))
        input_gradient_act(ctx, a);
    else if (a->dx)
        input_gradient(ctx, a, 0, a->n, a->dx_accumulate, a->dx);
    if (a->dx && a->dx_sum) column_sums(ctx, a->n, a->in, a->dx, a->dx_sum);
    if (a->dw && a->w_transposed)
        srf__gemm(ctx, true, false, a->out, a->in, a->n, 1, a->dy, a->out, a->x, a->in, 1, a->dw,
                  a->in);
    else if (a->dw)
        srf__gemm(ctx, true, false, a->in, a->out, a->n, 1, a->x, a->in, a->dy, a->out, 1, a->dw,
                  a->out);
    if (a->db) column_sums(ctx, a->n, a->out, a->dy, a->db);
    return SRF_OK;
}

size_t SRF_CPU(linear_bwd_workspace)(const struct srf_ctx *ctx, const struct srf_linear_bwd_args *a)
{
    int64_t rows = a->n < DX_ROWS ? a->n : DX_ROWS;
    bool through = a->dx && a->dx_accumulate && (a->x_act != SRF_ACT_NONE || a->x_slope);
    int64_t dx = through ? rows * a->in : 0;
    int64_t widest = a->db ? a->out : 0;
    if (a->dx && a->dx_sum && a->in > widest) widest = a->in;
    int64_t sums = widest ? ctx->n_threads * srf__part_stride(widest) : 0;
    return (size_t)(dx > sums ? dx : sums) * sizeof(real);
}

srf_status SRF_CPU(act_fwd)(struct srf_ctx *ctx, const struct srf_act_fwd_args *a)
{
    if (a->act != SRF_ACT_NONE)
        activate(ctx, a->n, a->x, a->y);
    else if (a->n)
        memcpy(a->y, a->x, (size_t)a->n * sizeof(real));
    return SRF_OK;
}

size_t SRF_CPU(act_fwd_workspace)(const struct srf_ctx *ctx, const struct srf_act_fwd_args *a)
{
    (void)ctx;
    (void)a;
    return 0;
}
