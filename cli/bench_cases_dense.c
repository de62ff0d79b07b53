/* Cases of the ops beside attention: layers, norms, embeddings, losses, the optimizer, draws. */
#include "cli/bench_cases_internal.h"

/* A linear layer's shape is n, in, out, then what else of these. SLOPE: GELU's derivative is kept,
 * as in a training step, not what it is taken of; and backward adds up dx's columns. */
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

srf_status bench_features_draw(struct bench_buffers *b, const int64_t *p, struct op_call *c)
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

const struct bench_case bench_dense[] = {
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
    {"features_draw haar", bench_features_draw, {LAYERS, HEADS, 64, 64, SRF_ROT_HAAR}},
    {"features_draw hd", bench_features_draw, {LAYERS, HEADS, 64, 64, SRF_ROT_HD}},
};
const size_t bench_n_dense = sizeof bench_dense / sizeof *bench_dense;
