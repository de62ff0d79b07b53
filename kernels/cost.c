/* What each op must do at least: bytes with every operand moved once, and floating point
 * operations. The attention ops are in cost_attn.c. */
#include "kernels/ops.h"

#include <math.h>

/* Bytes of T, A and i32 elements. */
static double t_bytes(const struct srf_ctx *ctx, double count)
{
    return count * (double)srf_dtype_bytes(ctx->dtype);
}

static double a_bytes(const struct srf_ctx *ctx, double count)
{
    return count * (double)srf_dtype_bytes(srf_ctx_acc(ctx));
}

/* A normal is a logarithm, a root, a sine and a product. The rotation of a block of d rows is a QR
 * factorisation with Q formed, 8/3 d^3, or three rounds of signs and butterflies a row. */
struct srf_cost srf_features_draw_cost(const struct srf_ctx *ctx,
                                       const struct srf_features_draw_args *a)
{
    double sets = (double)a->n_layers * (double)a->n_sets, d = (double)a->d, m = (double)a->m;
    double blocks = ceil(m / d), flops = 4 * m * d;
    if (a->kind != SRF_IID && a->rotation == SRF_ROT_HAAR)
        flops = blocks * (4 * d * d + 8.0 / 3 * d * d * d);
    else if (a->kind != SRF_IID)
        flops = blocks * 3 * d * d * (1 + log2(d));
    if (a->kind == SRF_SIMPLEX || a->kind == SRF_SIMPLEX_PLUS) flops += 4 * m * d;
    return (struct srf_cost){t_bytes(ctx, sets * m * d) + a_bytes(ctx, sets * m), sets * flops};
}

/* Rows of the tables count as often as they are used: they are gathered. */
struct srf_cost srf_embed_fwd_cost(const struct srf_ctx *ctx, const struct srf_embed_fwd_args *a)
{
    double count = (double)a->n * (double)a->c;
    return (struct srf_cost){t_bytes(ctx, 3 * count) + 4 * (double)a->n * (a->pos ? 2 : 1), count};
}

struct srf_cost srf_embed_bwd_cost(const struct srf_ctx *ctx, const struct srf_embed_bwd_args *a)
{
    double count = (double)a->n * (double)a->c;
    return (struct srf_cost){t_bytes(ctx, count) + a_bytes(ctx, 4 * count) + 4 * (double)a->n,
                             2 * count};
}

struct srf_cost srf_layernorm_fwd_cost(const struct srf_ctx *ctx,
                                       const struct srf_layernorm_fwd_args *a)
{
    double n = (double)a->n, c = (double)a->c;
    return (struct srf_cost){t_bytes(ctx, 2 * n * c + 2 * c) + a_bytes(ctx, 2 * n), 8 * n * c};
}

struct srf_cost srf_layernorm_bwd_cost(const struct srf_ctx *ctx,
                                       const struct srf_layernorm_bwd_args *a)
{
    double n = (double)a->n, c = (double)a->c, count = 4 * n * c + c, sums = 4 * c, flops = 17;
    if (a->dx_sum) sums += 2 * c, flops += 1;
    if (a->y) count += n * c + c, flops += 2;
    return (struct srf_cost){t_bytes(ctx, count) + a_bytes(ctx, 2 * n + sums), flops * n * c};
}

/* As slope.h has them, without what fills the last tiles. */
static double slope_bytes(const struct srf_ctx *ctx, double count)
{
    return ctx->dtype == SRF_BF16 ? count : t_bytes(ctx, count);
}

/* GELU: 9 with its exponential; the derivative 16. */
struct srf_cost srf_linear_fwd_cost(const struct srf_ctx *ctx, const struct srf_linear_fwd_args *a)
{
    double n = (double)a->n, in = (double)a->in, out = (double)a->out;
    double count = n * in + in * out + n * out, flops = 2 * n * in * out, slopes = 0;
    if (a->b) count += out, flops += n * out;
    if (a->residual) count += n * out, flops += n * out;
    if (a->act != SRF_ACT_NONE) {
        if (a->pre) count += n * out;
        if (a->slope) slopes = slope_bytes(ctx, n * out), flops += 7 * n * out;
        flops += 9 * n * out;
    }
    return (struct srf_cost){t_bytes(ctx, count) + slopes, flops};
}

/* The norm's output need not be moved. */
struct srf_cost srf_norm_linear_fwd_cost(const struct srf_ctx *ctx,
                                         const struct srf_norm_linear_fwd_args *a)
{
    double n = (double)a->n, in = (double)a->in, out = (double)a->out;
    double count = n * in + 2 * in + in * out + n * out, flops = 2 * n * in * out + 8 * n * in;
    if (a->b) count += out, flops += n * out;
    if (a->act != SRF_ACT_NONE) flops += 9 * n * out;
    return (struct srf_cost){t_bytes(ctx, count), flops};
}

struct srf_cost srf_linear_bwd_cost(const struct srf_ctx *ctx, const struct srf_linear_bwd_args *a)
{
    double n = (double)a->n, in = (double)a->in, out = (double)a->out;
    double count = n * out, sums = 0, slopes = 0, flops = 0; /* elements of T, of A; bytes */
    if (a->dx) {
        count += in * out + n * in * (a->dx_accumulate ? 2 : 1);
        flops += 2 * n * in * out;
        if (a->x_act != SRF_ACT_NONE) count += n * in, flops += 17 * n * in;
        if (a->x_slope) slopes = slope_bytes(ctx, n * in), flops += n * in;
        if (a->dx_sum) sums += 2 * in, flops += n * in;
    }
    if (a->dw) count += n * in, sums += 2 * in * out, flops += 2 * n * in * out;
    if (a->db) sums += 2 * out, flops += n * out;
    return (struct srf_cost){t_bytes(ctx, count) + a_bytes(ctx, sums) + slopes, flops};
}

struct srf_cost srf_act_fwd_cost(const struct srf_ctx *ctx, const struct srf_act_fwd_args *a)
{
    return (struct srf_cost){t_bytes(ctx, 2 * (double)a->n),
                             a->act == SRF_ACT_NONE ? 0 : 9 * (double)a->n};
}

/* A row costs its maximum, difference, exponential and sum; the gradient a product more; a teacher
 * the same again. */
struct srf_cost srf_xent_cost(const struct srf_ctx *ctx, const struct srf_xent_args *a)
{
    double n = (double)a->n, count = n * (double)a->v;
    double rows = a->teacher ? 2 : 1, moved = rows + (a->dlogits ? 1 : 0);
    double flops = rows * (4 + (a->dlogits ? 1 : 0));
    bool kl = a->teacher && a->kl;
    if (kl) flops += 5;
    return (struct srf_cost){t_bytes(ctx, moved * count) + a_bytes(ctx, n * (kl ? 2 : 1)) + 4 * n,
                             flops * count};
}

/* Three products, and a row's sums and gradient; logits need not be moved. */
struct srf_cost srf_head_loss_cost(const struct srf_ctx *ctx, const struct srf_head_loss_args *a)
{
    double n = (double)a->n, c = (double)a->c, ld = (double)a->ld;
    double count = 2 * n * c + ld * c, sums = n + 2 * ld * c;
    return (struct srf_cost){t_bytes(ctx, count) + a_bytes(ctx, sums) + 4 * n,
                             6 * n * ld * c + 5 * n * (double)a->v};
}

struct srf_cost srf_mse_cost(const struct srf_ctx *ctx, const struct srf_mse_args *a)
{
    double n = (double)a->n;
    return (struct srf_cost){t_bytes(ctx, (a->dx ? 4 : 2) * n) + a_bytes(ctx, 2),
                             (a->dx ? 5 : 3) * n};
}

struct srf_cost srf_sumsq_cost(const struct srf_ctx *ctx, const struct srf_sumsq_args *a)
{
    return (struct srf_cost){a_bytes(ctx, (double)a->n + 2), 2 * (double)a->n};
}

struct srf_cost srf_adamw_cost(const struct srf_ctx *ctx, const struct srf_adamw_args *a)
{
    double n = (double)a->n;
    double bytes = t_bytes(ctx, n) + a_bytes(ctx, 5 * n); /* param written, grad, m, v */
    /* a bf16 parameter is written only, its master copy updated */
    bytes += a->master ? a_bytes(ctx, 2 * n) : t_bytes(ctx, n);
    return (struct srf_cost){bytes, 14 * n};
}

/* Greedy reads a row once; what draws reads it again, from a cache. */
struct srf_cost srf_sample_cost(const struct srf_ctx *ctx, const struct srf_sample_args *a)
{
    double count = (double)a->n * (double)a->v, draws = a->temperature > 0 && a->top_k != 1;
    return (struct srf_cost){t_bytes(ctx, count) + 28 * (double)a->n, (1 + 14 * draws) * count};
}

struct srf_cost srf_slots_next_cost(const struct srf_ctx *ctx, const struct srf_slots_next_args *a)
{
    (void)ctx;
    return (struct srf_cost){48 * (double)a->n, 0};
}
