/* On the CPU, shapes of a small GPT-2: width 384, 6 heads of 64, vocabulary 8192, 4096 tokens.
 * Elsewhere those of GPT-2 124M: width 768, 12 heads of 64, vocabulary 50257, 32768 tokens. */
#include "cli/bench_cases.h"

srf_status bench_call(struct srf_ctx *ctx, const struct op_call *c)
{
    switch (c->op) {
#define X(name)                                                                                    \
    case SRF_OP_##name:                                                                            \
        return srf_run_##name(ctx, &c->args.name);
#include "kernels/ops.def"
#undef X
    case SRF_OP_COUNT:
        break;
    }
    return SRF_OK;
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
enum { TRANSPOSED = 1, GELU = 2, RESIDUAL = 4, BIAS = 8 };

static srf_status linear_fwd(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    int64_t n = p[0], in = p[1], out = p[2], what = p[3];
    void *x, *w, *bias, *pre, *y;
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
                                     .pre = what & GELU ? pre : NULL,
                                     .y = y};
    return SRF_OK;
}

static srf_status linear_bwd(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    int64_t n = p[0], in = p[1], out = p[2], what = p[3];
    void *x, *w, *pre, *dy, *dx, *dw, *db;
    SRF_TRY(bench_reals(b, n * in, 1, &x));
    SRF_TRY(bench_reals(b, in * out, 0.02, &w));
    SRF_TRY(bench_reals(b, n * in, 1, &pre));
    SRF_TRY(bench_reals(b, n * out, 1e-3, &dy));
    SRF_TRY(bench_reals(b, n * in, 0, &dx));
    SRF_TRY(bench_accs(b, in * out, 0, &dw));
    SRF_TRY(bench_accs(b, out, 0, &db));
    c->op = SRF_OP_linear_bwd;
    c->args.linear_bwd =
        (struct srf_linear_bwd_args){.n = n,
                                     .in = in,
                                     .out = out,
                                     .x = x,
                                     .w = w,
                                     .dy = dy,
                                     .w_transposed = what & TRANSPOSED,
                                     .x_pre = what & GELU ? pre : NULL,
                                     .x_act = what & GELU ? SRF_ACT_GELU_TANH : SRF_ACT_NONE,
                                     .dx = dx,
                                     .dw = dw,
                                     .db = what & BIAS ? db : NULL};
    return SRF_OK;
}

static srf_status act_fwd(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    void *x, *y;
    SRF_TRY(bench_reals(b, p[0], 1, &x));
    SRF_TRY(bench_reals(b, p[0], 0, &y));
    c->op = SRF_OP_act_fwd;
    c->args.act_fwd =
        (struct srf_act_fwd_args){.n = p[0], .act = SRF_ACT_GELU_TANH, .x = x, .y = y};
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

static srf_status mse(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    void *x, *y, *dx, *sum;
    SRF_TRY(bench_reals(b, p[0], 1, &x));
    SRF_TRY(bench_reals(b, p[0], 1, &y));
    SRF_TRY(bench_reals(b, p[0], 0, &dx));
    SRF_TRY(bench_accs(b, 1, 0, &sum));
    c->op = SRF_OP_mse;
    c->args.mse =
        (struct srf_mse_args){.n = p[0], .x = x, .y = y, .scale = 1e-3, .dx = dx, .sum = sum};
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

/* p[4] of the attention cases: heads */
enum { HEAD = 64, FEATURES = 64 };

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

/* b, t, backward */
static srf_status softmax_attn(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    struct attn a;
    SRF_TRY(attn_buffers(b, p[0] * p[1], p[4], &a));
    int64_t ld_o = p[4] * HEAD, ld = 3 * ld_o;
    c->tokens = p[0] * p[1];
    c->op = SRF_OP_softmax_attn_fwd;
    c->args.softmax_attn_fwd = (struct srf_softmax_attn_fwd_args){.b = p[0],
                                                                  .t = p[1],
                                                                  .h = p[4],
                                                                  .d = HEAD,
                                                                  .causal = true,
                                                                  .q = a.qkv,
                                                                  .k = part(b, p[4], a.qkv, 1),
                                                                  .v = part(b, p[4], a.qkv, 2),
                                                                  .ld = ld,
                                                                  .o = a.o,
                                                                  .ld_o = ld_o,
                                                                  .lse = a.lse};
    if (!p[2]) return SRF_OK;
    SRF_TRY(run_now(b->ctx, c));
    c->op = SRF_OP_softmax_attn_bwd;
    c->args.softmax_attn_bwd = (struct srf_softmax_attn_bwd_args){.b = p[0],
                                                                  .t = p[1],
                                                                  .h = p[4],
                                                                  .d = HEAD,
                                                                  .causal = true,
                                                                  .q = a.qkv,
                                                                  .k = part(b, p[4], a.qkv, 1),
                                                                  .v = part(b, p[4], a.qkv, 2),
                                                                  .ld = ld,
                                                                  .o = a.o,
                                                                  .d_o = a.d_o,
                                                                  .ld_o = ld_o,
                                                                  .lse = a.lse,
                                                                  .dq = a.dqkv,
                                                                  .dk = part(b, p[4], a.dqkv, 1),
                                                                  .dv = part(b, p[4], a.dqkv, 2)};
    return SRF_OK;
}

static srf_status drawn_features(struct bench_buffers *b, int64_t heads, void **w, void **bias)
{
    struct op_call draw = {0};
    SRF_TRY(features_draw(b, (const int64_t[]){1, heads, FEATURES, HEAD, SRF_ROT_HAAR}, &draw));
    *w = draw.args.features_draw.w;
    *bias = draw.args.features_draw.bias;
    return run_now(b->ctx, &draw);
}

/* b, t, window, backward */
static srf_status srf_attn(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    struct attn a;
    void *w, *bias;
    SRF_TRY(attn_buffers(b, p[0] * p[1], p[4], &a));
    SRF_TRY(drawn_features(b, p[4], &w, &bias));
    int64_t ld_o = p[4] * HEAD, ld = 3 * ld_o;
    struct srf_attn_shape s = {.b = p[0],
                               .t = p[1],
                               .h = p[4],
                               .d = HEAD,
                               .m = FEATURES,
                               .n_sets = p[4],
                               .window = p[2],
                               .causal = true};
    c->tokens = p[0] * p[1];
    c->op = SRF_OP_srf_attn_fwd;
    c->args.srf_attn_fwd = (struct srf_srf_attn_fwd_args){.s = s,
                                                          .q = a.qkv,
                                                          .k = part(b, p[4], a.qkv, 1),
                                                          .v = part(b, p[4], a.qkv, 2),
                                                          .ld = ld,
                                                          .w = w,
                                                          .bias = bias,
                                                          .o = a.o,
                                                          .ld_o = ld_o,
                                                          .stat = a.lse};
    if (!p[3]) return SRF_OK;
    SRF_TRY(run_now(b->ctx, c));
    c->op = SRF_OP_srf_attn_bwd;
    c->args.srf_attn_bwd = (struct srf_srf_attn_bwd_args){.s = s,
                                                          .q = a.qkv,
                                                          .k = part(b, p[4], a.qkv, 1),
                                                          .v = part(b, p[4], a.qkv, 2),
                                                          .ld = ld,
                                                          .w = w,
                                                          .bias = bias,
                                                          .o = a.o,
                                                          .d_o = a.d_o,
                                                          .ld_o = ld_o,
                                                          .stat = a.lse,
                                                          .dq = a.dqkv,
                                                          .dk = part(b, p[4], a.dqkv, 1),
                                                          .dv = part(b, p[4], a.dqkv, 2)};
    return SRF_OK;
}

/* t tokens of seqs sequences into states that have seen `first` tokens. */
static srf_status prefill_call(struct bench_buffers *b, int64_t seqs, int64_t t, int64_t first,
                               int64_t window, int64_t heads, struct op_call *c)
{
    int64_t ld_o = heads * HEAD, ld = 3 * ld_o;
    int64_t count = srf_attn_state_count(FEATURES, HEAD, window), size = 4;
    struct attn a;
    void *w, *bias, *state, *pos;
    SRF_TRY(attn_buffers(b, seqs * t, heads, &a));
    SRF_TRY(drawn_features(b, heads, &w, &bias));
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
                               .m = FEATURES,
                               .n_sets = heads,
                               .window = window,
                               .causal = true};
    c->tokens = seqs * t;
    c->op = SRF_OP_srf_attn_prefill;
    c->args.srf_attn_prefill = (struct srf_srf_attn_prefill_args){.s = s,
                                                                  .q = a.qkv,
                                                                  .k = part(b, heads, a.qkv, 1),
                                                                  .v = part(b, heads, a.qkv, 2),
                                                                  .ld = ld,
                                                                  .w = w,
                                                                  .bias = bias,
                                                                  .o = a.o,
                                                                  .ld_o = ld_o,
                                                                  .state = state,
                                                                  .pos = pos};
    return SRF_OK;
}

/* b, t, window */
static srf_status srf_attn_prefill(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    return prefill_call(b, p[0], p[1], 0, p[2], p[4], c);
}

/* b, position, window: the state holds the tokens before (their last 4 windows, where it does not
 * matter how many more there were). */
static srf_status srf_attn_step(struct bench_buffers *b, const int64_t *p, struct op_call *c)
{
    int64_t seqs = p[0], position = p[1], window = p[2], size = 4;
    int64_t before = position < 256 ? position : 256, first = position - before;
    struct op_call prefill;
    SRF_TRY(prefill_call(b, seqs, before, first - (window ? first % window : 0), window, p[4],
                         &prefill));
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
                                                            .pos = a->pos};
    c->args.srf_attn_step.s.t = 1;
    return SRF_OK;
}

static const struct bench_case small[] = {
    {"linear_fwd qkv", linear_fwd, {4096, 384, 1152, BIAS}},
    {"linear_fwd out, residual", linear_fwd, {4096, 384, 384, BIAS | RESIDUAL}},
    {"linear_fwd fc, gelu", linear_fwd, {4096, 384, 1536, BIAS | GELU}},
    {"linear_fwd proj, residual", linear_fwd, {4096, 1536, 384, BIAS | RESIDUAL}},
    {"linear_fwd head", linear_fwd, {4096, 384, 8192, TRANSPOSED}},
    {"linear_fwd fc, 1 row", linear_fwd, {1, 384, 1536, BIAS | GELU}},
    {"linear_fwd head, 1 row", linear_fwd, {1, 384, 8192, TRANSPOSED}},
    {"linear_fwd fc, 8 rows", linear_fwd, {8, 384, 1536, BIAS | GELU}},
    {"linear_bwd qkv", linear_bwd, {4096, 384, 1152, BIAS}},
    {"linear_bwd out", linear_bwd, {4096, 384, 384, BIAS}},
    {"linear_bwd fc", linear_bwd, {4096, 384, 1536, BIAS}},
    {"linear_bwd proj, gelu", linear_bwd, {4096, 1536, 384, BIAS | GELU}},
    {"linear_bwd head", linear_bwd, {4096, 384, 8192, TRANSPOSED}},
    {"act_fwd", act_fwd, {4096 * 1536}},
    {"layernorm_fwd", layernorm, {4096, 384, 0}},
    {"layernorm_bwd", layernorm, {4096, 384, 1}},
    {"embed_fwd", embed_fwd, {4096, 384, 8192, 512}},
    {"embed_bwd", embed_bwd, {4096, 384, 8192, 512}},
    {"xent", xent, {2048, 8192, 0, 0}},
    {"xent, gradient", xent, {2048, 8192, 1, 0}},
    {"xent, gradient, teacher", xent, {2048, 8192, 1, 1}},
    {"mse", mse, {4096 * 384}},
    {"sumsq", sumsq, {1 << 24}},
    {"adamw", adamw, {1 << 24}},
    {"features_draw haar", features_draw, {6, 6, 64, 64, SRF_ROT_HAAR}},
    {"features_draw hd", features_draw, {6, 6, 64, 64, SRF_ROT_HD}},
    {"softmax_attn_fwd T=512", softmax_attn, {8, 512, 0, 0, 6}},
    {"softmax_attn_bwd T=512", softmax_attn, {8, 512, 1, 0, 6}},
    {"softmax_attn_fwd T=2048", softmax_attn, {2, 2048, 0, 0, 6}},
    {"srf_attn_fwd T=512", srf_attn, {16, 512, 0, 0, 6}},
    {"srf_attn_fwd T=1024", srf_attn, {8, 1024, 0, 0, 6}},
    {"srf_attn_fwd T=2048", srf_attn, {4, 2048, 0, 0, 6}},
    {"srf_attn_fwd T=4096", srf_attn, {2, 4096, 0, 0, 6}},
    {"srf_attn_fwd T=8192", srf_attn, {1, 8192, 0, 0, 6}},
    {"srf_attn_bwd T=512", srf_attn, {16, 512, 0, 1, 6}},
    {"srf_attn_bwd T=8192", srf_attn, {1, 8192, 0, 1, 6}},
    {"srf_attn_fwd W=64 T=512", srf_attn, {16, 512, 64, 0, 6}},
    {"srf_attn_fwd W=64 T=8192", srf_attn, {1, 8192, 64, 0, 6}},
    {"srf_attn_bwd W=64 T=512", srf_attn, {16, 512, 64, 1, 6}},
    {"srf_attn_bwd W=64 T=8192", srf_attn, {1, 8192, 64, 1, 6}},
    {"srf_attn_prefill T=1024", srf_attn_prefill, {4, 1024, 0, 0, 6}},
    {"srf_attn_prefill W=64 T=1024", srf_attn_prefill, {4, 1024, 64, 0, 6}},
    {"srf_attn_step at 10", srf_attn_step, {8, 10, 0, 0, 6}},
    {"srf_attn_step at 100000", srf_attn_step, {8, 100000, 0, 0, 6}},
    {"srf_attn_step W=64 at 200", srf_attn_step, {8, 200, 64, 0, 6}},
    {"srf_attn_step W=64 at 100000", srf_attn_step, {8, 100040, 64, 0, 6}},
};
static const struct bench_case large[] = {
    {"linear_fwd qkv", linear_fwd, {32768, 768, 2304, BIAS}},
    {"linear_fwd out, residual", linear_fwd, {32768, 768, 768, BIAS | RESIDUAL}},
    {"linear_fwd fc, gelu", linear_fwd, {32768, 768, 3072, BIAS | GELU}},
    {"linear_fwd proj, residual", linear_fwd, {32768, 3072, 768, BIAS | RESIDUAL}},
    {"linear_fwd head", linear_fwd, {4736, 768, 50304, TRANSPOSED}},
    {"linear_fwd fc, 1 row", linear_fwd, {1, 768, 3072, BIAS | GELU}},
    {"linear_fwd head, 1 row", linear_fwd, {1, 768, 50304, TRANSPOSED}},
    {"linear_fwd fc, 64 rows", linear_fwd, {64, 768, 3072, BIAS | GELU}},
    {"linear_bwd qkv", linear_bwd, {32768, 768, 2304, BIAS}},
    {"linear_bwd out", linear_bwd, {32768, 768, 768, BIAS}},
    {"linear_bwd fc", linear_bwd, {32768, 768, 3072, BIAS}},
    {"linear_bwd proj, gelu", linear_bwd, {32768, 3072, 768, BIAS | GELU}},
    {"linear_bwd head", linear_bwd, {4736, 768, 50304, TRANSPOSED}},
    {"act_fwd", act_fwd, {32768 * 3072}},
    {"layernorm_fwd", layernorm, {32768, 768, 0}},
    {"layernorm_bwd", layernorm, {32768, 768, 1}},
    {"embed_fwd", embed_fwd, {32768, 768, 50257, 1024}},
    {"embed_bwd", embed_bwd, {32768, 768, 50257, 1024}},
    {"xent", xent, {4736, 50257, 0, 0}},
    {"xent, gradient", xent, {4736, 50257, 1, 0}},
    {"xent, gradient, teacher", xent, {4736, 50257, 1, 1}},
    {"mse", mse, {32768 * 768}},
    {"sumsq", sumsq, {124475904}},
    {"adamw", adamw, {124475904}},
    {"features_draw haar", features_draw, {12, 12, 64, 64, SRF_ROT_HAAR}},
    {"features_draw hd", features_draw, {12, 12, 64, 64, SRF_ROT_HD}},
    {"softmax_attn_fwd T=1024", softmax_attn, {32, 1024, 0, 0, 12}},
    {"softmax_attn_bwd T=1024", softmax_attn, {32, 1024, 1, 0, 12}},
    {"softmax_attn_fwd T=8192", softmax_attn, {4, 8192, 0, 0, 12}},
    {"srf_attn_fwd T=512", srf_attn, {64, 512, 0, 0, 12}},
    {"srf_attn_fwd T=1024", srf_attn, {32, 1024, 0, 0, 12}},
    {"srf_attn_fwd T=8192", srf_attn, {4, 8192, 0, 0, 12}},
    {"srf_attn_bwd T=512", srf_attn, {64, 512, 0, 1, 12}},
    {"srf_attn_bwd T=1024", srf_attn, {32, 1024, 0, 1, 12}},
    {"srf_attn_bwd T=8192", srf_attn, {4, 8192, 0, 1, 12}},
    {"srf_attn_fwd W=64 T=512", srf_attn, {64, 512, 64, 0, 12}},
    {"srf_attn_fwd W=64 T=1024", srf_attn, {32, 1024, 64, 0, 12}},
    {"srf_attn_fwd W=64 T=8192", srf_attn, {4, 8192, 64, 0, 12}},
    {"srf_attn_bwd W=64 T=512", srf_attn, {64, 512, 64, 1, 12}},
    {"srf_attn_bwd W=64 T=1024", srf_attn, {32, 1024, 64, 1, 12}},
    {"srf_attn_bwd W=64 T=8192", srf_attn, {4, 8192, 64, 1, 12}},
    {"srf_attn_prefill T=1024", srf_attn_prefill, {16, 1024, 0, 0, 12}},
    {"srf_attn_prefill T=8192", srf_attn_prefill, {16, 8192, 0, 0, 12}},
    {"srf_attn_prefill B=1 T=65536", srf_attn_prefill, {1, 65536, 0, 0, 12}},
    {"srf_attn_prefill W=64 T=1024", srf_attn_prefill, {16, 1024, 64, 0, 12}},
    {"srf_attn_prefill W=64 T=8192", srf_attn_prefill, {16, 8192, 64, 0, 12}},
    {"srf_attn_step at 10", srf_attn_step, {256, 10, 0, 0, 12}},
    {"srf_attn_step at 100000", srf_attn_step, {256, 100000, 0, 0, 12}},
    {"srf_attn_step W=64 at 200", srf_attn_step, {256, 200, 64, 0, 12}},
    {"srf_attn_step W=64 at 100000", srf_attn_step, {256, 100040, 64, 0, 12}},
};

const struct bench_case *bench_cases(const struct srf_ctx *ctx, int *n)
{
    bool cpu = bench_on_cpu(ctx);
    *n = (int)(cpu ? sizeof small / sizeof *small : sizeof large / sizeof *large);
    return cpu ? small : large;
}
