#include "cli/bench_cases.h"

#include <string.h>

static srf_status run_op(struct srf_ctx *ctx, enum srf_op_id op, const union op_args *args)
{
    switch (op) {
#define X(name)                                                                                    \
    case SRF_OP_##name:                                                                            \
        return srf_run_##name(ctx, &args->name);
#include "kernels/ops.def"
#undef X
    case SRF_OP_COUNT:
        break;
    }
    return SRF_OK;
}

srf_status bench_call(struct srf_ctx *ctx, const struct op_call *c)
{
    if (c->forward_too) SRF_TRY(run_op(ctx, c->forward_op, &c->forward));
    return run_op(ctx, c->op, &c->args);
}

srf_status bench_plan(struct srf_ctx *ctx, const struct op_call *c, struct srf_cost *cost)
{
    ctx->plan = true;
    ctx->plan_workspace = 0;
    ctx->plan_cost = (struct srf_cost){0};
    srf_status st = bench_call(ctx, c);
    ctx->plan = false;
    *cost = ctx->plan_cost;
    SRF_TRY(st);
    return srf_ctx_reserve_workspace(ctx, ctx->plan_workspace);
}

/* ---- cases: p holds the shape ---------------------------------------------------------------- */

/* n, in, out, then what else */
/* SLOPE: GELU's derivative is kept, as in a training step, not what it is taken of; and backward
 * adds up dx's columns. */
enum { TRANSPOSED = 1, GELU = 2, RESIDUAL = 4, BIAS = 8, SLOPE = 16, MOMENTS = 32 };

static srf_status linear_fwd(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    int64_t n = p[0], in = p[1], out = p[2], what = p[3];
    void *x, *w, *bias, *pre, *y, *moments;
    SRF_TRY(bench_accs(b, srf_moments_count(b->ctx, n, out), 0, &moments));
    SRF_TRY(bench_reals(b, n * in, 1, &x));
    SRF_TRY(bench_reals(b, in * out, 0.02, &w));
    SRF_TRY(bench_reals(b, out, 0.02, &bias));
    SRF_TRY(bench_reals(b, n * out, 0, &pre));
    SRF_TRY(bench_reals(b, n * out, 0, &y));
    c->op = SRF_OP_linear_fwd;
    c->args.linear_fwd =
        (struct srf_linear_fwd_args){.n = n,
                                     .in = in,
                                     .out = out,
                                     .x = x,
                                     .w = w,
                                     .w_transposed = what & TRANSPOSED,
                                     .b = what & BIAS ? bias : NULL,
                                     .residual = what & RESIDUAL ? y : NULL,
                                     .act = what & GELU ? SRF_ACT_GELU_TANH : SRF_ACT_NONE,
                                     .pre = what & GELU && !(what & SLOPE) ? pre : NULL,
                                     .slope = what & SLOPE ? pre : NULL,
                                     .y = y,
                                     .moments = what & MOMENTS ? moments : NULL};
    return SRF_OK;
}

/* With moments that say nothing: eps makes up for it. */
static srf_status norm_linear(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    int64_t n = p[0], in = p[1], out = p[2], count = srf_moments_count(b->ctx, n, in);
    void *x, *gamma, *beta, *moments, *w, *bias, *y;
    SRF_TRY(bench_reals(b, n * in, 1, &x));
    SRF_TRY(bench_reals(b, in, 1, &gamma));
    SRF_TRY(bench_reals(b, in, 1, &beta));
    SRF_TRY(bench_accs(b, count, 0, &moments));
    SRF_TRY(bench_reals(b, in * out, 0.02, &w));
    SRF_TRY(bench_reals(b, out, 0.02, &bias));
    SRF_TRY(bench_reals(b, n * out, 0, &y));
    c->op = SRF_OP_norm_linear_fwd;
    c->args.norm_linear_fwd =
        (struct srf_norm_linear_fwd_args){.n = n,
                                          .in = in,
                                          .out = out,
                                          .eps = 1,
                                          .x = x,
                                          .gamma = gamma,
                                          .beta = beta,
                                          .moments = count ? moments : NULL,
                                          .w = w,
                                          .b = bias,
                                          .act = p[3] & GELU ? SRF_ACT_GELU_TANH : SRF_ACT_NONE,
                                          .y = y};
    return SRF_OK;
}

static srf_status linear_bwd(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    int64_t n = p[0], in = p[1], out = p[2], what = p[3];
    bool derive = what & GELU && !(what & SLOPE);
    void *x, *w, *pre, *dy, *dx, *dw, *db, *dx_sum;
    SRF_TRY(bench_reals(b, n * in, 1, &x));
    SRF_TRY(bench_reals(b, in * out, 0.02, &w));
    SRF_TRY(bench_reals(b, n * in, 1, &pre));
    SRF_TRY(bench_reals(b, n * out, 1e-3, &dy));
    SRF_TRY(bench_reals(b, n * in, 0, &dx));
    SRF_TRY(bench_accs(b, in * out, 0, &dw));
    SRF_TRY(bench_accs(b, out, 0, &db));
    SRF_TRY(bench_accs(b, in, 0, &dx_sum));
    c->op = SRF_OP_linear_bwd;
    c->args.linear_bwd =
        (struct srf_linear_bwd_args){.n = n,
                                     .in = in,
                                     .out = out,
                                     .x = x,
                                     .w = w,
                                     .dy = dy,
                                     .w_transposed = what & TRANSPOSED,
                                     .x_pre = derive ? pre : NULL,
                                     .x_act = derive ? SRF_ACT_GELU_TANH : SRF_ACT_NONE,
                                     .x_slope = what & SLOPE ? pre : NULL,
                                     .dx = dx,
                                     .dx_sum = what & SLOPE ? dx_sum : NULL,
                                     .dw = dw,
                                     .db = what & BIAS ? db : NULL};
    return SRF_OK;
}

static srf_status act_fwd(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    int64_t n = p[0] * p[1];
    void *x, *y;
    SRF_TRY(bench_reals(b, n, 1, &x));
    SRF_TRY(bench_reals(b, n, 0, &y));
    c->op = SRF_OP_act_fwd;
    c->args.act_fwd = (struct srf_act_fwd_args){.n = n, .act = SRF_ACT_GELU_TANH, .x = x, .y = y};
    return SRF_OK;
}

static srf_status embed_fwd(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    int64_t n = p[0], width = p[1], v = p[2], t = p[3];
    void *tokens, *wte, *wpe, *y;
    SRF_TRY(bench_ids(b, n, v, &tokens));
    SRF_TRY(bench_reals(b, v * width, 1, &wte));
    SRF_TRY(bench_reals(b, t * width, 1, &wpe));
    SRF_TRY(bench_reals(b, n * width, 0, &y));
    c->op = SRF_OP_embed_fwd;
    c->args.embed_fwd = (struct srf_embed_fwd_args){.n = n,
                                                    .c = width,
                                                    .v = v,
                                                    .t = t,
                                                    .n_pos = t,
                                                    .tokens = tokens,
                                                    .wte = wte,
                                                    .wpe = wpe,
                                                    .y = y};
    return SRF_OK;
}

static srf_status embed_bwd(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    int64_t n = p[0], width = p[1], v = p[2], t = p[3];
    void *tokens, *dwte, *dwpe, *dy;
    SRF_TRY(bench_ids(b, n, v, &tokens));
    SRF_TRY(bench_accs(b, v * width, 0, &dwte));
    SRF_TRY(bench_accs(b, t * width, 0, &dwpe));
    SRF_TRY(bench_reals(b, n * width, 1e-3, &dy));
    c->op = SRF_OP_embed_bwd;
    c->args.embed_bwd = (struct srf_embed_bwd_args){.n = n,
                                                    .c = width,
                                                    .v = v,
                                                    .t = t,
                                                    .n_pos = t,
                                                    .tokens = tokens,
                                                    .dy = dy,
                                                    .dwte = dwte,
                                                    .dwpe = dwpe};
    return SRF_OK;
}

static srf_status layernorm(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    int64_t n = p[0], width = p[1];
    bool backward = p[2];
    void *x, *gamma, *beta, *y, *mean, *rstd, *dx, *dgamma, *dbeta;
    SRF_TRY(bench_reals(b, n * width, 1, &x));
    SRF_TRY(bench_reals(b, width, 1, &gamma));
    SRF_TRY(bench_reals(b, width, 1, &beta));
    SRF_TRY(bench_reals(b, n * width, 1, &y)); /* dy in backward */
    SRF_TRY(bench_accs(b, n, 0.1, &mean));
    SRF_TRY(bench_accs(b, n, 1, &rstd));
    SRF_TRY(bench_reals(b, n * width, 0, &dx));
    SRF_TRY(bench_accs(b, width, 0, &dgamma));
    SRF_TRY(bench_accs(b, width, 0, &dbeta));
    c->op = backward ? SRF_OP_layernorm_bwd : SRF_OP_layernorm_fwd;
    if (backward)
        c->args.layernorm_bwd = (struct srf_layernorm_bwd_args){.n = n,
                                                                .c = width,
                                                                .x = x,
                                                                .gamma = gamma,
                                                                .dy = y,
                                                                .mean = mean,
                                                                .rstd = rstd,
                                                                .dx = dx,
                                                                .dgamma = dgamma,
                                                                .dbeta = dbeta};
    else
        c->args.layernorm_fwd = (struct srf_layernorm_fwd_args){.n = n,
                                                                .c = width,
                                                                .eps = 1e-5,
                                                                .x = x,
                                                                .gamma = gamma,
                                                                .beta = beta,
                                                                .y = y,
                                                                .mean = mean,
                                                                .rstd = rstd};
    return SRF_OK;
}

static srf_status xent(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    int64_t n = p[0], v = p[1], ld = (v + 127) / 128 * 128;
    void *logits, *targets, *teacher = NULL, *nll, *kl, *dlogits = NULL;
    SRF_TRY(bench_reals(b, n * ld, 3, &logits));
    SRF_TRY(bench_ids(b, n, v, &targets));
    SRF_TRY(bench_accs(b, n, 0, &nll));
    SRF_TRY(bench_accs(b, n, 0, &kl));
    if (p[2]) SRF_TRY(bench_reals(b, n * ld, 0, &dlogits));
    if (p[3]) SRF_TRY(bench_reals(b, n * ld, 3, &teacher));
    c->op = SRF_OP_xent;
    c->args.xent = (struct srf_xent_args){.n = n,
                                          .v = v,
                                          .ld = ld,
                                          .logits = logits,
                                          .targets = targets,
                                          .teacher = teacher,
                                          .scale = 1.0 / (double)n,
                                          .ce_weight = 1,
                                          .kl_weight = teacher ? 1 : 0,
                                          .nll = nll,
                                          .kl = teacher ? kl : NULL,
                                          .dlogits = dlogits};
    return SRF_OK;
}

static srf_status head_loss(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    int64_t n = p[0], width = p[1], v = p[2], ld = (v + 127) / 128 * 128;
    void *x, *w, *targets, *logits, *nll, *dx, *dw;
    SRF_TRY(bench_reals(b, n * width, 1, &x));
    SRF_TRY(bench_reals(b, ld * width, 0.02, &w));
    SRF_TRY(bench_ids(b, n, v, &targets));
    SRF_TRY(bench_reals(b, n * ld, 0, &logits));
    SRF_TRY(bench_accs(b, n, 0, &nll));
    SRF_TRY(bench_reals(b, n * width, 0, &dx));
    SRF_TRY(bench_accs(b, ld * width, 0, &dw));
    c->op = SRF_OP_head_loss;
    c->args.head_loss = (struct srf_head_loss_args){.n = n,
                                                    .c = width,
                                                    .v = v,
                                                    .ld = ld,
                                                    .x = x,
                                                    .w = w,
                                                    .targets = targets,
                                                    .scale = 1.0 / (double)n,
                                                    .ce_weight = 1,
                                                    .logits = logits,
                                                    .nll = nll,
                                                    .dx = dx,
                                                    .dw = dw};
    return SRF_OK;
}

static srf_status mse(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    int64_t n = p[0] * p[1];
    void *x, *y, *dx, *sum;
    SRF_TRY(bench_reals(b, n, 1, &x));
    SRF_TRY(bench_reals(b, n, 1, &y));
    SRF_TRY(bench_reals(b, n, 0, &dx));
    SRF_TRY(bench_accs(b, 1, 0, &sum));
    c->op = SRF_OP_mse;
    c->args.mse =
        (struct srf_mse_args){.n = n, .x = x, .y = y, .scale = 1e-3, .dx = dx, .sum = sum};
    return SRF_OK;
}

static srf_status sumsq(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    void *x, *sum;
    SRF_TRY(bench_accs(b, p[0], 1, &x));
    SRF_TRY(bench_accs(b, 1, 0, &sum));
    c->op = SRF_OP_sumsq;
    c->args.sumsq = (struct srf_sumsq_args){.n = p[0], .x = x, .sum = sum};
    return SRF_OK;
}

static srf_status adamw(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    void *grad, *param, *master = NULL, *m, *v;
    SRF_TRY(bench_accs(b, p[0], 1e-3, &grad));
    SRF_TRY(bench_reals(b, p[0], 0.02, &param));
    if (b->ctx->dtype == SRF_BF16) SRF_TRY(bench_accs(b, p[0], 0.02, &master));
    SRF_TRY(bench_accs(b, p[0], 0, &m));
    SRF_TRY(bench_accs(b, p[0], 0, &v));
    c->op = SRF_OP_adamw;
    c->args.adamw = (struct srf_adamw_args){.n = p[0],
                                            .step = 10,
                                            .lr = 1e-5,
                                            .beta1 = 0.9,
                                            .beta2 = 0.95,
                                            .eps = 1e-8,
                                            .weight_decay = 0.1,
                                            .grad_scale = 1,
                                            .grad = grad,
                                            .param = param,
                                            .master = master,
                                            .m = m,
                                            .v = v};
    return SRF_OK;
}

/* layers, sets, m, d, rotation */
static srf_status features_draw(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    void *w, *bias;
    SRF_TRY(bench_reals(b, p[0] * p[1] * p[2] * p[3], 0, &w));
    SRF_TRY(bench_accs(b, p[0] * p[1] * p[2], 0, &bias));
    c->op = SRF_OP_features_draw;
    c->args.features_draw = (struct srf_features_draw_args){.kind = SRF_SIMPLEX,
                                                            .rotation = (enum srf_rotation)p[4],
                                                            .seed = 1,
                                                            .n_layers = p[0],
                                                            .n_sets = p[1],
                                                            .m = p[2],
                                                            .d = p[3],
                                                            .w = w,
                                                            .bias = bias};
    return SRF_OK;
}

enum { HEAD = 64 };

/* One packed activation (b, t, 3c) each for q, k, v and their gradients, and o, d_o. */
struct attn {
    void *qkv, *o, *d_o, *dqkv, *lse;
};

/* Head slices of the packed activation: which = 0 q, 1 k, 2 v. */
static void *part(const struct bench_buffers *b, int64_t heads, void *qkv, int which)
{
    return (char *)qkv + (size_t)(which * heads * HEAD) * srf_dtype_bytes(b->ctx->dtype);
}

static srf_status attn_buffers(struct bench_buffers *b, int64_t n, int64_t heads, struct attn *a)
{
    int64_t width = heads * HEAD;
    SRF_TRY(bench_reals(b, n * 3 * width, 1, &a->qkv));
    SRF_TRY(bench_reals(b, n * width, 0.1, &a->o));
    SRF_TRY(bench_reals(b, n * width, 1e-3, &a->d_o));
    SRF_TRY(bench_reals(b, n * 3 * width, 0, &a->dqkv));
    return bench_accs(b, n * heads, 0, &a->lse);
}

/* Run the op now: what a case needs before it is timed. */
static srf_status run_now(struct srf_ctx *ctx, const struct op_call *c)
{
    struct srf_cost cost;
    SRF_TRY(bench_plan(ctx, c, &cost));
    return bench_call(ctx, c);
}

/* c holds a forward pass, which is run; the backward pass is to take its place. */
static srf_status then_backward(struct srf_ctx *ctx, struct op_call *c, enum bench_pass pass)
{
    c->forward_op = c->op;
    c->forward = c->args;
    c->forward_too = pass == BENCH_BOTH;
    return run_now(ctx, &(struct op_call){.op = c->op, .args = c->args});
}

/* The attention cases: b, t, heads, pass, window, m */
static srf_status softmax_attn(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    struct attn a;
    int64_t heads = p[2], ld_o = heads * HEAD, ld = 3 * ld_o;
    SRF_TRY(attn_buffers(b, p[0] * p[1], heads, &a));
    void *k = part(b, heads, a.qkv, 1), *v = part(b, heads, a.qkv, 2);
    c->tokens = p[0] * p[1];
    c->op = SRF_OP_softmax_attn_fwd;
    c->args.softmax_attn_fwd = (struct srf_softmax_attn_fwd_args){.b = p[0],
                                                                  .t = p[1],
                                                                  .h = heads,
                                                                  .d = HEAD,
                                                                  .causal = true,
                                                                  .q = a.qkv,
                                                                  .k = k,
                                                                  .v = v,
                                                                  .ld = ld,
                                                                  .o = a.o,
                                                                  .ld_o = ld_o,
                                                                  .lse = a.lse};
    if (p[3] == BENCH_FORWARD) return SRF_OK;
    SRF_TRY(then_backward(b->ctx, c, (enum bench_pass)p[3]));
    c->op = SRF_OP_softmax_attn_bwd;
    c->args.softmax_attn_bwd = (struct srf_softmax_attn_bwd_args){.b = p[0],
                                                                  .t = p[1],
                                                                  .h = heads,
                                                                  .d = HEAD,
                                                                  .causal = true,
                                                                  .q = a.qkv,
                                                                  .k = k,
                                                                  .v = v,
                                                                  .ld = ld,
                                                                  .o = a.o,
                                                                  .d_o = a.d_o,
                                                                  .ld_o = ld_o,
                                                                  .lse = a.lse,
                                                                  .dq = a.dqkv,
                                                                  .dk = part(b, heads, a.dqkv, 1),
                                                                  .dv = part(b, heads, a.dqkv, 2)};
    return SRF_OK;
}

static srf_status drawn_features(struct bench_buffers *b, int64_t heads, int64_t m, void **w,
                                 void **bias)
{
    struct op_call draw = {0};
    SRF_TRY(features_draw(b, (const int64_t[]){1, heads, m, HEAD, SRF_ROT_HAAR}, &draw));
    *w = draw.args.features_draw.w;
    *bias = draw.args.features_draw.bias;
    return run_now(b->ctx, &draw);
}

static srf_status srf_attn(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    struct attn a;
    void *w, *bias, *carry = NULL;
    int64_t heads = p[2], ld_o = heads * HEAD, ld = 3 * ld_o;
    SRF_TRY(attn_buffers(b, p[0] * p[1], heads, &a));
    SRF_TRY(drawn_features(b, heads, p[5], &w, &bias));
    void *k = part(b, heads, a.qkv, 1), *v = part(b, heads, a.qkv, 2);
    struct srf_attn_shape s = {.b = p[0],
                               .t = p[1],
                               .h = heads,
                               .d = HEAD,
                               .m = p[5],
                               .n_sets = heads,
                               .window = p[4],
                               .causal = true};
    if (p[3] != BENCH_FORWARD)
        SRF_TRY(bench_accs(b, (int64_t)srf_attn_carry_bytes(b->ctx, &s) / 4, 0, &carry));
    c->tokens = p[0] * p[1];
    c->op = SRF_OP_srf_attn_fwd;
    c->args.srf_attn_fwd = (struct srf_srf_attn_fwd_args){.s = s,
                                                          .q = a.qkv,
                                                          .k = k,
                                                          .v = v,
                                                          .ld = ld,
                                                          .w = w,
                                                          .bias = bias,
                                                          .o = a.o,
                                                          .ld_o = ld_o,
                                                          .stat = a.lse,
                                                          .carry = carry};
    if (p[3] == BENCH_FORWARD) return SRF_OK;
    SRF_TRY(then_backward(b->ctx, c, (enum bench_pass)p[3]));
    c->op = SRF_OP_srf_attn_bwd;
    c->args.srf_attn_bwd = (struct srf_srf_attn_bwd_args){.s = s,
                                                          .q = a.qkv,
                                                          .k = k,
                                                          .v = v,
                                                          .ld = ld,
                                                          .w = w,
                                                          .bias = bias,
                                                          .o = a.o,
                                                          .d_o = a.d_o,
                                                          .ld_o = ld_o,
                                                          .stat = a.lse,
                                                          .carry = carry,
                                                          .dq = a.dqkv,
                                                          .dk = part(b, heads, a.dqkv, 1),
                                                          .dv = part(b, heads, a.dqkv, 2)};
    return SRF_OK;
}

/* t tokens of seqs sequences into states that have seen `first` tokens. */
static srf_status prefill_call(struct bench_buffers *b, int64_t seqs, int64_t t, int64_t first,
                               const int64_t *p, struct op_call *c)
{
    int64_t heads = p[2], window = p[3], m = p[4], ld_o = heads * HEAD, size = 4;
    int64_t count = srf_attn_state_count(m, HEAD, window);
    struct attn a;
    void *w, *bias, *state, *pos;
    SRF_TRY(attn_buffers(b, seqs * t, heads, &a));
    SRF_TRY(drawn_features(b, heads, m, &w, &bias));
    SRF_TRY(bench_accs(b, seqs * heads * count, 0, &state));
    SRF_TRY(bench_ids(b, seqs, 1, &pos));
    for (int64_t i = 0; i < seqs; i++) {
        int32_t at = (int32_t)first;
        SRF_TRY(b->ctx->be->upload(b->ctx, (char *)pos + i * size, &at, (size_t)size));
    }
    struct srf_attn_shape s = {.b = seqs,
                               .t = t,
                               .h = heads,
                               .d = HEAD,
                               .m = m,
                               .n_sets = heads,
                               .window = window,
                               .causal = true};
    c->tokens = seqs * t;
    c->op = SRF_OP_srf_attn_prefill;
    c->args.srf_attn_prefill = (struct srf_srf_attn_prefill_args){.s = s,
                                                                  .q = a.qkv,
                                                                  .k = part(b, heads, a.qkv, 1),
                                                                  .v = part(b, heads, a.qkv, 2),
                                                                  .ld = 3 * ld_o,
                                                                  .w = w,
                                                                  .bias = bias,
                                                                  .o = a.o,
                                                                  .ld_o = ld_o,
                                                                  .state = state,
                                                                  .pos = pos,
                                                                  .state_bf16 = p[5]};
    return SRF_OK;
}

/* b, t, heads, window, m, whether the state is stored in bf16 */
static srf_status srf_attn_prefill(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    return prefill_call(b, p[0], p[1], 0, p, c);
}

/* b, position, heads, window, m, whether the state is stored in bf16. It holds the tokens before
 * (their last 4 windows, where it does not matter how many more there were). */
static srf_status srf_attn_step(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    int64_t seqs = p[0], position = p[1], window = p[3], size = 4;
    int64_t before = position < 256 ? position : 256, first = position - before;
    struct op_call prefill = {.tokens = 0};
    SRF_TRY(prefill_call(b, seqs, before, first - (window ? first % window : 0), p, &prefill));
    SRF_TRY(run_now(b->ctx, &prefill));
    const struct srf_srf_attn_prefill_args *a = &prefill.args.srf_attn_prefill;
    for (int64_t i = 0; i < seqs; i++) {
        int32_t at = (int32_t)position;
        SRF_TRY(b->ctx->be->upload(b->ctx, (char *)a->pos + i * size, &at, (size_t)size));
    }
    c->tokens = seqs;
    c->op = SRF_OP_srf_attn_step;
    c->args.srf_attn_step = (struct srf_srf_attn_step_args){.s = a->s,
                                                            .q = a->q,
                                                            .k = a->k,
                                                            .v = a->v,
                                                            .ld = a->ld,
                                                            .w = a->w,
                                                            .bias = a->bias,
                                                            .o = a->o,
                                                            .ld_o = a->ld_o,
                                                            .state = a->state,
                                                            .pos = a->pos,
                                                            .state_bf16 = a->state_bf16};
    c->args.srf_attn_step.s.t = 1;
    return SRF_OK;
}

/* ---- the list ------------------------------------------------------------------------------- */

/* Sizes that the cases name: on the CPU a small GPT-2's, elsewhere GPT-2 124M's. */
enum size { ROWS = -11, WIDTH, QKV, FF, VOCAB, PADDED, HEAD_ROWS, FEW, HEADS, LAYERS, PARAMS };
static const int64_t sizes[2][11] = {
    {32768, 768, 2304, 3072, 50257, 50304, 4736, 64, 12, 12, 124475904},
    {4096, 384, 1152, 1536, 8192, 8192, 2048, 8, 6, 6, 1 << 24},
};

static const struct bench_case dense[] = {
    {"linear_fwd qkv", linear_fwd, {ROWS, WIDTH, QKV, BIAS}},
    {"linear_fwd out, residual", linear_fwd, {ROWS, WIDTH, WIDTH, BIAS | RESIDUAL}},
    {"linear_fwd fc, gelu", linear_fwd, {ROWS, WIDTH, FF, BIAS | GELU | SLOPE}},
    {"linear_fwd proj, residual", linear_fwd, {ROWS, FF, WIDTH, BIAS | RESIDUAL}},
    {"linear_fwd out, moments", linear_fwd, {ROWS, WIDTH, WIDTH, BIAS | RESIDUAL | MOMENTS}},
    {"linear_fwd proj, moments", linear_fwd, {ROWS, FF, WIDTH, BIAS | RESIDUAL | MOMENTS}},
    {"norm_linear_fwd qkv", norm_linear, {ROWS, WIDTH, QKV, 0}},
    {"norm_linear_fwd fc, gelu", norm_linear, {ROWS, WIDTH, FF, GELU}},
    {"linear_fwd head", linear_fwd, {HEAD_ROWS, WIDTH, PADDED, TRANSPOSED}},
    {"linear_fwd fc, 1 row", linear_fwd, {1, WIDTH, FF, BIAS | GELU}},
    {"linear_fwd head, 1 row", linear_fwd, {1, WIDTH, PADDED, TRANSPOSED}},
    {"linear_fwd fc, few rows", linear_fwd, {FEW, WIDTH, FF, BIAS | GELU}},
    {"linear_bwd qkv", linear_bwd, {ROWS, WIDTH, QKV, BIAS}},
    {"linear_bwd out", linear_bwd, {ROWS, WIDTH, WIDTH, BIAS}},
    {"linear_bwd fc", linear_bwd, {ROWS, WIDTH, FF, 0}},
    {"linear_bwd proj, gelu", linear_bwd, {ROWS, FF, WIDTH, SLOPE}},
    {"linear_bwd head", linear_bwd, {HEAD_ROWS, WIDTH, PADDED, TRANSPOSED}},
    {"act_fwd", act_fwd, {ROWS, FF}},
    {"layernorm_fwd", layernorm, {ROWS, WIDTH, 0}},
    {"layernorm_bwd", layernorm, {ROWS, WIDTH, 1}},
    {"embed_fwd", embed_fwd, {ROWS, WIDTH, VOCAB, 512}},
    {"embed_bwd", embed_bwd, {ROWS, WIDTH, VOCAB, 512}},
    {"xent", xent, {HEAD_ROWS, VOCAB, 0, 0}},
    {"xent, gradient", xent, {HEAD_ROWS, VOCAB, 1, 0}},
    {"xent, gradient, teacher", xent, {HEAD_ROWS, VOCAB, 1, 1}},
    {"head_loss", head_loss, {HEAD_ROWS, WIDTH, VOCAB}},
    {"mse", mse, {ROWS, WIDTH}},
    {"sumsq", sumsq, {PARAMS}},
    {"adamw", adamw, {PARAMS}},
    {"features_draw haar", features_draw, {LAYERS, HEADS, 64, 64, SRF_ROT_HAAR}},
    {"features_draw hd", features_draw, {LAYERS, HEADS, 64, 64, SRF_ROT_HD}},
};

/* 8192 tokens on the CPU, 32768 elsewhere; m 0: softmax */
static const struct {
    bool cpu, gpu;
    int64_t t, window, m;
} attention[] = {
    {true, false, 512, 0, 0},     {true, true, 1024, 0, 0},     {true, false, 2048, 0, 0},
    {false, true, 4096, 0, 0},    {false, true, 16384, 0, 0},   {true, true, 512, 0, 64},
    {true, true, 1024, 0, 64},    {true, false, 2048, 0, 64},   {true, true, 4096, 0, 64},
    {true, true, 8192, 0, 64},    {false, true, 16384, 0, 64},  {false, true, 1024, 0, 256},
    {false, true, 16384, 0, 256}, {true, true, 512, 64, 64},    {false, true, 1024, 64, 64},
    {true, true, 8192, 64, 64},   {false, true, 16384, 64, 64}, {false, true, 1024, 96, 64},
    {false, true, 1024, 128, 64},
};

/* b 0: 8 sequences on the CPU, 256 elsewhere */
static const struct {
    bool cpu, gpu;
    int64_t b, position, window, m;
    bool bf16;
} steps[] = {
    {true, true, 0, 10, 0, 64, false},     {true, true, 0, 100000, 0, 64, false},
    {true, true, 0, 200, 64, 64, false},   {true, true, 0, 100040, 64, 64, false},
    {false, true, 64, 100, 0, 64, false},  {false, true, 0, 100, 0, 256, false},
    {false, true, 0, 100, 0, 64, true},    {false, true, 0, 264, 32, 64, false},
    {false, true, 0, 264, 128, 64, false},
};

static const struct {
    bool cpu, gpu;
    int64_t b, t, window;
} prefills[] = {
    {true, false, 4, 1024, 0},   {true, false, 4, 1024, 64},  {false, true, 16, 1024, 0},
    {false, true, 16, 8192, 0},  {false, true, 1, 65536, 0},  {false, true, 16, 1024, 64},
    {false, true, 16, 8192, 64}, {false, true, 8, 4096, 64},  {false, true, 8, 4096, 32},
    {false, true, 8, 4096, 128}, {false, true, 8, 4096, 192}, {false, true, 8, 4096, 96},
    {false, true, 8, 4096, 160}, {false, true, 8, 4096, 224}, {false, true, 8, 4096, 256},
};

static int64_t size_of(const struct srf_ctx *ctx, int64_t p)
{
    return p < 0 ? sizes[bench_on_cpu(ctx)][p - ROWS] : p;
}

struct bench_case bench_attention(const struct srf_ctx *ctx, int64_t b, int64_t t, int64_t window,
                                  int64_t m, enum bench_pass pass)
{
    static const char *const passes[] = {"fwd", "bwd", "fwd_bwd"};
    struct bench_case c = {.prepare = m ? srf_attn : softmax_attn,
                           .p = {b, t, size_of(ctx, HEADS), pass, window, m}};
    char w[16] = "", features[16] = "";
    if (window) snprintf(w, sizeof w, " W=%d", (int)window);
    if (m && m != 64) snprintf(features, sizeof features, " m=%d", (int)m);
    snprintf(c.name, sizeof c.name, "%s_attn_%s%s%s T=%lld", m ? "srf" : "softmax", passes[pass], w,
             features, (long long)t);
    return c;
}

static struct bench_case prefill_case(const struct srf_ctx *ctx, size_t i)
{
    int64_t b = prefills[i].b, t = prefills[i].t, window = prefills[i].window;
    struct bench_case c = {.prepare = srf_attn_prefill,
                           .p = {b, t, size_of(ctx, HEADS), window, 64, 0}};
    char w[16] = "";
    if (window) snprintf(w, sizeof w, " W=%d", (int)window);
    snprintf(c.name, sizeof c.name, "srf_attn_prefill%s B=%d T=%lld", w, (int)b, (long long)t);
    return c;
}

static struct bench_case step_case(const struct srf_ctx *ctx, size_t i)
{
    int64_t b = steps[i].b, window = steps[i].window, m = steps[i].m;
    struct bench_case c = {.prepare = srf_attn_step,
                           .p = {b                   ? b
                                 : bench_on_cpu(ctx) ? 8
                                                     : 256,
                                 steps[i].position, size_of(ctx, HEADS), window, m, steps[i].bf16}};
    char sequences[16] = "", w[16] = "", features[16] = "";
    if (b) snprintf(sequences, sizeof sequences, " B=%d", (int)b);
    if (window) snprintf(w, sizeof w, " W=%d", (int)window);
    if (m != 64) snprintf(features, sizeof features, " m=%d", (int)m);
    /* the hybrid's position is one where its oldest block is as full as at 200 */
    snprintf(c.name, sizeof c.name, "srf_attn_step%s%s%s%s at %lld", sequences, w, features,
             steps[i].bf16 ? " bf16" : "",
             (long long)(steps[i].position / 100000 ? 100000 : steps[i].position));
    return c;
}

srf_status bench_cases(const struct srf_ctx *ctx, struct bench_case **out, int *n)
{
    size_t n_dense = sizeof dense / sizeof *dense, n_steps = sizeof steps / sizeof *steps;
    size_t n_prefills = sizeof prefills / sizeof *prefills;
    size_t n_attention = sizeof attention / sizeof *attention;
    bool cpu = bench_on_cpu(ctx);
    struct bench_case *c;
    SRF_TRY(SRF_ALLOC(c, n_dense + 3 * n_attention + n_prefills + n_steps));
    *out = c;
    for (size_t i = 0; i < n_dense; i++, c++) {
        *c = dense[i];
        for (int k = 0; k < BENCH_SIZES; k++) c->p[k] = size_of(ctx, c->p[k]);
    }
    for (size_t i = 0; i < n_attention; i++)
        for (int pass = 0; pass < 3 && (cpu ? attention[i].cpu : attention[i].gpu); pass++)
            *c++ = bench_attention(ctx, (cpu ? 8192 : 32768) / attention[i].t, attention[i].t,
                                   attention[i].window, attention[i].m, (enum bench_pass)pass);
    for (size_t i = 0; i < n_prefills; i++)
        if (cpu ? prefills[i].cpu : prefills[i].gpu) *c++ = prefill_case(ctx, i);
    for (size_t i = 0; i < n_steps; i++)
        if (cpu ? steps[i].cpu : steps[i].gpu) *c++ = step_case(ctx, i);
    *n = (int)(c - *out);
    return SRF_OK;
}
