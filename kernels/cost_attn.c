/* What the attention ops must do at least: the rows of cost.c that are worth a file. */
#include "kernels/ops.h"

static double b_t(const struct srf_ctx *ctx)
{
    return (double)srf_dtype_bytes(ctx->dtype);
}

static double b_a(const struct srf_ctx *ctx)
{
    return (double)srf_dtype_bytes(srf_ctx_acc(ctx));
}

/* Query-key pairs of one head, exponentials of them included. Token t sees the sinks and its
 * window, which overlap at first. */
static double pairs(int64_t t, bool causal, int64_t window, int64_t sinks)
{
    double n = (double)t;
    if (!causal) return n * n;
    double all = n * (n + 1) / 2, w = (double)window, beyond = n - w;
    if (window == 0 || beyond <= 0) return all;
    double few = beyond < (double)sinks ? beyond : (double)sinks;
    /* of those beyond the window, all but the sinks are not seen */
    return all - beyond * (beyond + 1) / 2 + few * (few + 1) / 2 + (beyond - few) * few;
}

struct srf_cost srf_softmax_attn_fwd_cost(const struct srf_ctx *ctx,
                                          const struct srf_softmax_attn_fwd_args *a)
{
    double heads = (double)a->b * (double)a->h, rows = heads * (double)a->t, d = (double)a->d;
    return (struct srf_cost){.bytes = b_t(ctx) * 4 * rows * d + (a->lse ? b_a(ctx) * rows : 0),
                             .flops =
                                 heads * pairs(a->t, a->causal, a->window, a->sinks) * (4 * d + 1)};
}

struct srf_cost srf_softmax_attn_bwd_cost(const struct srf_ctx *ctx,
                                          const struct srf_softmax_attn_bwd_args *a)
{
    double heads = (double)a->b * (double)a->h, rows = heads * (double)a->t, d = (double)a->d;
    return (struct srf_cost){.bytes = b_t(ctx) * 8 * rows * d + b_a(ctx) * rows,
                             .flops = heads * pairs(a->t, a->causal, a->window, a->sinks) *
                                      (10 * d + 1)};
}

/* Exact pairs of the hybrid: row r of a block sees r + 1 keys of it and a whole block before. */
static double window_pairs(const struct srf_attn_shape *s)
{
    if (s->window == 0) return 0;
    double w = (double)s->window, t = (double)s->t, blocks = (double)(s->t / s->window);
    double rest = t - blocks * w;
    double own = blocks * w * (w + 1) / 2 + rest * (rest + 1) / 2;
    return own + (t > w ? (t - w) * w : 0);
}

/* Per token and head: W x and W y (2 m d flops each, and an exponential a feature), the key into
 * the state (2 m d) and the query's sum (2 m d): the recurrent form, which is the least. */
static double far_flops(const struct srf_attn_shape *s)
{
    double m = (double)s->m, d = (double)s->d;
    return (double)s->b * (double)s->h * (double)s->t * (8 * m * d + 4 * m);
}

static double row_values(const struct srf_attn_shape *s)
{
    return (double)s->b * (double)s->h * (double)s->t * (double)s->d;
}

static double weight_values(const struct srf_attn_shape *s)
{
    return (double)s->n_sets * (double)s->m * (double)s->d;
}

/* q, k, v, o; W and its bias. */
static double fwd_bytes(const struct srf_ctx *ctx, const struct srf_attn_shape *s)
{
    return b_t(ctx) * (4 * row_values(s) + weight_values(s)) +
           b_a(ctx) * (double)s->n_sets * (double)s->m;
}

static struct srf_cost fwd_cost(const struct srf_ctx *ctx, const struct srf_attn_shape *s)
{
    double heads = (double)s->b * (double)s->h;
    return (struct srf_cost){.bytes = fwd_bytes(ctx, s),
                             .flops =
                                 far_flops(s) + heads * window_pairs(s) * (4 * (double)s->d + 1)};
}

struct srf_cost srf_srf_attn_fwd_cost(const struct srf_ctx *ctx,
                                      const struct srf_srf_attn_fwd_args *a)
{
    struct srf_cost c = fwd_cost(ctx, &a->s);
    if (a->stat) c.bytes += b_a(ctx) * (double)a->s.b * (double)a->s.h * (double)a->s.t;
    return c;
}

/* Backward: features and state again (6 m d), then S g, R v, R phi, R += phi g, W^T da twice
 * (12 m d); trained features 4 m d more. */
struct srf_cost srf_srf_attn_bwd_cost(const struct srf_ctx *ctx,
                                      const struct srf_srf_attn_bwd_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    double heads = (double)s->b * (double)s->h, m = (double)s->m, d = (double)s->d;
    double rows = heads * (double)s->t, dw = a->dw ? 1 : 0;
    double accumulated = rows + (double)s->n_sets * m + 2 * dw * weight_values(s);
    return (struct srf_cost){
        .bytes = b_t(ctx) * (8 * row_values(s) + weight_values(s)) + b_a(ctx) * accumulated,
        .flops =
            rows * (18 * m * d + 8 * m + dw * 4 * m * d) + heads * window_pairs(s) * (10 * d + 1)};
}

/* States read and written once. */
static double state_bytes(const struct srf_ctx *ctx, const struct srf_attn_shape *s, bool bf16)
{
    int64_t bytes = bf16 ? srf_attn_state_bf16_bytes(s->m, s->d, s->window)
                         : srf_attn_state_count(s->m, s->d, s->window) *
                               (int64_t)srf_dtype_bytes(srf_ctx_acc(ctx));
    return 2 * (double)s->b * (double)s->h * (double)bytes;
}

struct srf_cost srf_srf_attn_prefill_cost(const struct srf_ctx *ctx,
                                          const struct srf_srf_attn_prefill_args *a)
{
    struct srf_attn_shape rows = a->s;
    if (a->offsets) rows.b = 1, rows.t = a->rows;
    struct srf_cost c = fwd_cost(ctx, &rows);
    c.bytes += state_bytes(ctx, &a->s, a->state_bf16);
    return c;
}

/* The position is on the device: a full window is assumed, and that its state is only read, as in
 * all steps of a block but the last. */
struct srf_cost srf_srf_attn_step_cost(const struct srf_ctx *ctx,
                                       const struct srf_srf_attn_step_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    double heads = (double)s->b * (double)s->h;
    double passes = s->window ? 0.5 : 1; /* read only */
    return (struct srf_cost){
        .bytes = fwd_bytes(ctx, s) + passes * state_bytes(ctx, s, a->state_bf16),
        .flops = far_flops(s) + heads * 1.5 * (double)s->window * (4 * (double)s->d + 1)};
}

/* The maps take W x alone (2 m d flops for both together, or 4 m d); the rest is what SRF attention
 * does in its recurrent form. */
static double map_weights(const struct srf_attn_shape *s)
{
    return (double)s->h * (double)s->m * (double)(s->d + 1);
}

static double map_features(const struct srf_attn_shape *s, enum srf_map_kind map)
{
    return (map == SRF_MAP_T2R ? 4 : 2) * (double)s->m * (double)s->d + 2 * (double)s->m;
}

struct srf_cost srf_map_attn_fwd_cost(const struct srf_ctx *ctx,
                                      const struct srf_map_attn_fwd_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    double heads = (double)s->b * (double)s->h, rows = heads * (double)s->t, d = (double)s->d;
    double far = map_features(s, a->map) + 4 * (double)s->m * d;
    return (struct srf_cost){.bytes = b_t(ctx) * (4 * row_values(s) + map_weights(s)) +
                                      (a->stat ? b_a(ctx) * rows : 0),
                             .flops = rows * far + heads * window_pairs(s) * (4 * d + 1)};
}

struct srf_cost srf_map_attn_bwd_cost(const struct srf_ctx *ctx,
                                      const struct srf_map_attn_bwd_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    double heads = (double)s->b * (double)s->h, rows = heads * (double)s->t, d = (double)s->d;
    double far = (a->dw ? 3 : 2) * map_features(s, a->map) + 10 * (double)s->m * d;
    return (struct srf_cost){.bytes = b_t(ctx) * (8 * row_values(s) + map_weights(s)) +
                                      b_a(ctx) * (rows + (a->dw ? 2 * map_weights(s) : 0)),
                             .flops = rows * far + heads * window_pairs(s) * (10 * d + 1)};
}
