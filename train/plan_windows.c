/* The worth of a window and a number of features in a layer: the KL divergence from the predictions
 * of softmax attention when only this layer uses them. It is measured with the smallest window, for
 * each number of features, and scaled to the other windows by the squared error of the layer's
 * attention outputs, which is cheap: one forward serves all layers. Features as drawn would be
 * judged too badly, the fewer they are and the wider attention is spread, which is what training
 * improves first. So a calibrated and fitted copy of the model (calibrate.h) stands in for the
 * retrofitted one, with features trained for some steps on the outputs of their own layer. */
#include "train/plan_internal.h"
#include "model/arch.h"
#include "train/calibrate.h"

#include <math.h>
#include <string.h>

/* Most logits of a measurement of KL, which is what bounds its time; twice as many in bf16, whose
 * rounding is subtracted and leaves noise. */
#define MOST_LOGITS (1ll << 25)

/* Tokens that features are trained on; their peak learning rate, that of recipes. */
enum { TRAIN_TOKENS = 4096 };
#define TRAIN_LR 0.03

/* ---- what they cost -------------------------------------------------------------------------- */

/* Two models of the trial's weights: softmax, which keeps q, k, v and its outputs of all text, and
 * SRF attention, on the first windows of it. */
struct run {
    struct srf_ctx *ctx;
    const struct srf_plan_windows_config *config;
    const struct srf__plan_choices *choices;
    struct srf_checkpoint trial; /* weights and features of its own, the rest is ck's */
    struct srf_arena *arena;
    struct srf_model *exact, *student;
    struct srf_batch batch; /* the student's */
    int32_t *targets;
    float *bias;    /* of one layer */
    float *trained; /* (layers, n_m, n_sets * most m * d): the features of each choice of m */
    int64_t train_windows; /* of text, the first ones, that features are trained on */
    int slot_w, slot_bias, slot_o, slot_sum;
    int slot_master, slot_dw, slot_moments, slot_stat, slot_d_o, slot_d_qkv;
};

static void free_run(struct run *r)
{
    srf_model_free(r->exact);
    srf_model_free(r->student);
    srf_arena_free(r->arena);
    srf__free(r->trial.params);
    srf__free(r->trial.features_w);
    srf__free(r->trial.features_bias);
    srf__free(r->targets);
    srf__free(r->bias);
    srf__free(r->trained);
}

static int64_t n_sets(const struct run *r)
{
    return r->trial.attention.per_head ? r->trial.config.n_heads : 1;
}

static int64_t head_size(const struct run *r)
{
    return r->trial.config.c / r->trial.config.n_heads;
}

/* What stands for the trained model. */
static srf_status make_trial(struct run *r, const struct srf_checkpoint *ck, const int32_t *tokens)
{
    struct srf_calibrate_config c = {.windows = r->config->windows,
                                     .seq_len = r->config->seq_len,
                                     .balance = true,
                                     .fit = true,
                                     .best_of = 1};
    struct srf_calibrate_result result;
    struct srf_checkpoint *t = &r->trial;
    float *params;
    SRF_TRY(SRF_ALLOC(params, ck->table.total));
    memcpy(params, ck->params, (size_t)ck->table.total * sizeof *params);
    *t = *ck;
    t->params = params;
    t->features_w = t->features_bias = NULL;
    if (t->attention.per_head && !t->attention.far_none)
        return srf_calibrate(r->ctx, t, tokens, &c, &result);
    SRF_TRY(SRF_ALLOC(t->features_w, srf_checkpoint_features_count(t)));
    SRF_TRY(SRF_ALLOC(t->features_bias, srf_checkpoint_bias_count(t)));
    return srf_attention_draw(&t->attention, t->config.n_layers, n_sets(r), head_size(r), NULL,
                              t->features_w, t->features_bias);
}

/* The features of a layer with the i-th number of them, on the host. */
static float *trained_features(const struct run *r, int64_t layer, int64_t i)
{
    int64_t count = n_sets(r) * r->trial.attention.m * head_size(r);
    return r->trained + (layer * r->choices->n_m + i) * count;
}

/* They begin as the first m features of each set. */
static void begin_features(struct run *r, int64_t layer, int64_t i)
{
    int64_t m = r->choices->m[i], most = r->trial.attention.m, d = head_size(r), sets = n_sets(r);
    float *w = trained_features(r, layer, i);
    for (int64_t set = 0; set < sets; set++)
        memcpy(w + set * m * d, r->trial.features_w + (layer * sets + set) * most * d,
               (size_t)(m * d) * sizeof *w);
}

static srf_status upload_features(struct run *r, int64_t layer, int64_t i, void *w, void *bias)
{
    int64_t m = r->choices->m[i], most = r->trial.attention.m, sets = n_sets(r);
    for (int64_t set = 0; set < sets; set++)
        memcpy(r->bias + set * m, r->trial.features_bias + (layer * sets + set) * most,
               (size_t)m * sizeof *r->bias);
    SRF_TRY(srf_upload_f32(r->ctx, w, r->ctx->dtype, trained_features(r, layer, i),
                           sets * m * head_size(r)));
    return srf_upload_f32(r->ctx, bias, srf_ctx_acc(r->ctx), r->bias, sets * m);
}

static struct srf_attn_shape shape_of(const struct run *r, int64_t windows, int64_t c)
{
    const struct srf__plan_choices *s = r->choices;
    return (struct srf_attn_shape){.b = windows,
                                   .t = r->config->seq_len,
                                   .h = r->trial.config.n_heads,
                                   .d = head_size(r),
                                   .m = s->m[c % s->n_m],
                                   .n_sets = n_sets(r),
                                   .window = s->window[c / s->n_m],
                                   .causal = true};
}

/* Attention outputs of the first `windows` of the text with choice c, and the sum of their squared
 * errors into slot_sum; d_o: += its gradient, or NULL. */
static srf_status layer_error(struct run *r, int64_t layer, int64_t windows, int64_t c, void *stat,
                              void *d_o)
{
    int64_t width = r->trial.config.c, n = windows * r->config->seq_len;
    size_t step = (size_t)width * srf_dtype_bytes(r->ctx->dtype);
    const char *q = r->ctx->plan ? NULL : srf_model_qkv(r->exact, layer);
    const void *k = q ? q + step : NULL, *v = q ? q + 2 * step : NULL;
    const void *exact = r->ctx->plan ? NULL : srf_model_attention_out(r->exact, layer);
    void *o = srf_arena_ptr(r->arena, r->slot_o);
    SRF_TRY(SRF_RUN(r->ctx, srf_attn_fwd, .s = shape_of(r, windows, c), .q = q, .k = k, .v = v,
                    .ld = 3 * width, .w = srf_arena_ptr(r->arena, r->slot_w),
                    .bias = srf_arena_ptr(r->arena, r->slot_bias), .o = o, .ld_o = width,
                    .stat = stat));
    return SRF_RUN(r->ctx, mse, .n = n * width, .x = o, .y = exact, .scale = 1, .dx = d_o,
                   .sum = srf_arena_ptr(r->arena, r->slot_sum));
}

/* One step of the optimizer for the features of a layer, with the smallest window. */
static srf_status train_step(struct run *r, int64_t layer, int64_t i, int64_t step, double lr)
{
    struct srf_ctx *ctx = r->ctx;
    int64_t width = r->trial.config.c, n = r->train_windows * r->config->seq_len * width;
    int64_t count = n_sets(r) * r->choices->m[i] * head_size(r);
    size_t size = srf_dtype_bytes(ctx->dtype), acc = srf_dtype_bytes(srf_ctx_acc(ctx));
    char *q = ctx->plan ? NULL : (char *)srf_model_qkv(r->exact, layer);
    char *dq = srf_arena_ptr(r->arena, r->slot_d_qkv);
    char *moments = srf_arena_ptr(r->arena, r->slot_moments);
    void *stat = srf_arena_ptr(r->arena, r->slot_stat), *dw = srf_arena_ptr(r->arena, r->slot_dw);
    void *d_o = srf_arena_ptr(r->arena, r->slot_d_o), *w = srf_arena_ptr(r->arena, r->slot_w);
    bool master = ctx->dtype == SRF_BF16;
    if (!ctx->plan) {
        SRF_TRY(ctx->be->zero(ctx, dw, (size_t)count * acc));
        SRF_TRY(ctx->be->zero(ctx, d_o, (size_t)n * size));
    }
    SRF_TRY(layer_error(r, layer, r->train_windows, i, stat, d_o));
    SRF_TRY(SRF_RUN(ctx, srf_attn_bwd, .s = shape_of(r, r->train_windows, i), .q = q,
                    .k = q ? q + (size_t)width * size : NULL,
                    .v = q ? q + (size_t)(2 * width) * size : NULL, .ld = 3 * width, .w = w,
                    .bias = srf_arena_ptr(r->arena, r->slot_bias),
                    .o = srf_arena_ptr(r->arena, r->slot_o), .d_o = d_o, .ld_o = width,
                    .stat = stat, .dq = dq, .dk = dq ? dq + (size_t)width * size : NULL,
                    .dv = dq ? dq + (size_t)(2 * width) * size : NULL, .dw = dw));
    return SRF_RUN(ctx, adamw, .n = count, .step = step, .lr = lr, .beta1 = 0.9, .beta2 = 0.95,
                   .eps = 1e-12, .grad_scale = 1, .max_norm = INFINITY, .grad = dw, .param = w,
                   .master = master ? srf_arena_ptr(r->arena, r->slot_master) : NULL, .m = moments,
                   .v = moments ? moments + (size_t)count * acc : NULL);
}

/* The features of a layer with the i-th number of them, as training will have them. */
static srf_status train_features(struct run *r, int64_t layer, int64_t i)
{
    struct srf_ctx *ctx = r->ctx;
    enum srf_dtype acc = srf_ctx_acc(ctx);
    int64_t steps = r->config->train_steps, count = n_sets(r) * r->choices->m[i] * head_size(r);
    bool master = ctx->dtype == SRF_BF16;
    float *host = trained_features(r, layer, i);
    void *w = srf_arena_ptr(r->arena, master ? r->slot_master : r->slot_w);
    begin_features(r, layer, i);
    SRF_TRY(upload_features(r, layer, i, srf_arena_ptr(r->arena, r->slot_w),
                            srf_arena_ptr(r->arena, r->slot_bias)));
    if (steps == 0 || r->trial.attention.far_none) return SRF_OK;
    if (master) SRF_TRY(srf_upload_f32(ctx, w, acc, host, count));
    SRF_TRY(ctx->be->zero(ctx, srf_arena_ptr(r->arena, r->slot_moments),
                          (size_t)(2 * count) * srf_dtype_bytes(acc)));
    for (int64_t k = 0; k < steps; k++)
        SRF_TRY(train_step(r, layer, i, k + 1, TRAIN_LR * (double)(steps - k) / (double)steps));
    return srf_download_f32(ctx, host, w, master ? acc : ctx->dtype, count);
}

/* The ops beside the models' own, planned. */
static srf_status plan_ops(struct run *r)
{
    srf_status st = SRF_OK;
    srf_arena_plan_begin(r->arena);
    for (int64_t c = 0; c < r->choices->n && st == SRF_OK; c++)
        st = layer_error(r, 0, r->config->windows, c, NULL, NULL);
    for (int64_t i = 0; i < r->choices->n_m && st == SRF_OK; i++) st = train_step(r, 0, i, 1, 0);
    srf_arena_plan_end(r->arena);
    return st;
}

static srf_status plan_models(struct run *r)
{
    const struct srf_plan_windows_config *c = r->config;
    const struct srf_model_config *cfg = &r->trial.config;
    struct srf_attention_config softmax = srf_attention_default();
    struct srf_model_plan exact = {
        .b = c->windows, .t = c->seq_len, .keep_qkv = true, .keep_attention = true};
    struct srf_model_plan student = {.b = r->batch.b, .t = c->seq_len, .teacher = true};
    softmax.m = 1; /* not used */
    SRF_TRY(srf_arena_create(r->ctx, &r->arena));
    SRF_TRY(srf_model_create(r->ctx, cfg, &softmax, &r->exact));
    SRF_TRY(srf_model_plan(r->exact, r->arena, &exact));
    SRF_TRY(srf_model_create(r->ctx, cfg, &r->trial.attention, &r->student));
    return srf_model_plan(r->student, r->arena, &student);
}

static srf_status open_run(struct run *r, const struct srf_checkpoint *ck, const int32_t *tokens)
{
    const struct srf_plan_windows_config *c = r->config;
    int64_t len = c->seq_len, n = c->windows * len, width = ck->config.c;
    int64_t most = r->ctx->dtype == SRF_BF16 ? 2 * MOST_LOGITS : MOST_LOGITS;
    int64_t of_kl = most / (len * ck->config.vocab), of_training = TRAIN_TOKENS / len;
    of_kl = of_kl < 1 ? 1 : of_kl;
    of_training = of_training < 1 ? 1 : of_training;
    r->train_windows = of_training < c->windows ? of_training : c->windows;
    r->batch = (struct srf_batch){
        .b = of_kl < c->windows ? of_kl : c->windows, .t = len, .tokens = tokens};
    SRF_TRY(make_trial(r, ck, tokens));
    SRF_TRY(plan_models(r));
    int64_t sum = n_sets(r) * r->trial.attention.m, count = sum * head_size(r);
    int64_t trained = r->train_windows * len;
    enum srf_dtype type = r->ctx->dtype, acc = srf_ctx_acc(r->ctx);
    const struct srf_arena_row slots[] = {
        {"plan", "w", count, type, &r->slot_w},
        {"plan", "w's masters", count, acc, &r->slot_master},
        {"plan", "w's gradient", count, acc, &r->slot_dw},
        {"plan", "w's moments", 2 * count, acc, &r->slot_moments},
        {"plan", "bias", sum, acc, &r->slot_bias},
        {"plan", "outputs", n * width, type, &r->slot_o},
        {"plan", "their gradient", trained * width, type, &r->slot_d_o},
        {"plan", "gradients of q, k, v", 3 * trained * width, type, &r->slot_d_qkv},
        {"plan", "statistics", trained * ck->config.n_heads, acc, &r->slot_stat},
        {"plan", "error", 1, acc, &r->slot_sum},
    };
    SRF_TRY(srf_arena_add_rows(r->arena, slots, sizeof slots / sizeof *slots));
    SRF_TRY(plan_ops(r));
    SRF_TRY(srf_arena_commit(r->arena));
    SRF_TRY(srf_model_upload(r->exact, &r->trial));
    SRF_TRY(srf_model_upload(r->student, &r->trial));
    SRF_TRY(SRF_ALLOC(r->trained, ck->config.n_layers * r->choices->n_m * count));
    SRF_TRY(SRF_ALLOC(r->bias, sum));
    SRF_TRY(SRF_ALLOC(r->targets, n));
    for (int64_t i = 0; i < n; i++) r->targets[i] = (i + 1) % len ? tokens[i + 1] : -1;
    struct srf_batch all = {.b = c->windows, .t = len, .tokens = tokens};
    return srf_model_forward(r->exact, &all);
}

/* Done: so many measurements of the error, with the training before each, and so many of KL. In
 * tokens through one layer's attention: the ops of backward are worth two forward, a token through
 * the whole model and two output heads about 80 (gpt2-14m on a CPU). */
static void report(const struct run *r, int64_t errors, int64_t kls)
{
    const struct srf_plan_windows_config *c = r->config;
    const struct srf__plan_choices *s = r->choices;
    int64_t trained = 3 * c->train_steps * r->train_windows;
    int64_t error = (trained + s->n / s->n_m * c->windows) * c->seq_len;
    int64_t kl = 80 * r->batch.b * c->seq_len, n = r->trial.config.n_layers * s->n_m;
    if (c->progress) c->progress(c->user, errors * error + kls * kl, n * error + (n + 1) * kl);
}

/* error (n_choices, layers): squared, of the attention outputs on all text. */
static srf_status measure_errors(struct run *r, double *error)
{
    const struct srf__plan_choices *s = r->choices;
    int64_t layers = r->trial.config.n_layers;
    void *sum = srf_arena_ptr(r->arena, r->slot_sum);
    for (int64_t l = 0; l < layers; l++) {
        for (int64_t i = 0; i < s->n_m; i++) {
            report(r, l * s->n_m + i, 0);
            SRF_TRY(train_features(r, l, i));
            for (int64_t c = i; c < s->n; c += s->n_m) {
                float value;
                SRF_TRY(r->ctx->be->zero(r->ctx, sum, srf_dtype_bytes(srf_ctx_acc(r->ctx))));
                SRF_TRY(layer_error(r, l, r->config->windows, c, NULL, NULL));
                SRF_TRY(srf_download_f32(r->ctx, &value, sum, srf_ctx_acc(r->ctx), 1));
                error[c * layers + l] = (double)value;
            }
        }
    }
    return SRF_OK;
}

/* KL of the predictions with choice c in one layer (-1: in none) and all else exact: in a window as
 * long as the text, a multiple of 64, which kernels like. */
static srf_status measure_kl(struct run *r, int64_t layer, int64_t c, double *kl)
{
    const struct srf__plan_choices *s = r->choices;
    struct srf_model *m = r->student;
    int64_t len = r->config->seq_len, n = r->batch.b * len, d = head_size(r), first = 0;
    struct srf_attention_config *a = &m->attention;
    a->n_windows = a->n_layer_m = m->config.n_layers;
    a->window = (len + 63) / 64 * 64;
    for (int64_t l = 0; l < a->n_windows; l++) {
        a->windows[l] = (int32_t)(l == layer ? s->window[c / s->n_m] : a->window);
        int64_t i = l == layer ? c % s->n_m : 0;
        a->layer_m[l] = (int32_t)s->m[i];
        SRF_TRY(upload_features(r, l, i, srf__model_at(m, m->slot_w, first * d),
                                srf__model_acc_at(m, m->slot_bias, first)));
        first += n_sets(r) * a->layer_m[l];
    }
    m->shape = (struct srf_model_shape){0}; /* another workspace, perhaps */
    struct srf_loss_args loss = {.n = n, .targets = r->targets, .teacher = r->exact};
    SRF_TRY(srf_model_forward(m, &r->batch));
    SRF_TRY(srf_model_loss(m, &loss));
    *kl = loss.kl_sum / (double)(r->batch.b * (len - 1));
    return SRF_OK;
}

/* loss (n_choices, layers): what each choice costs in a layer. */
static srf_status measure(struct run *r, double *loss)
{
    const struct srf__plan_choices *s = r->choices;
    int64_t layers = r->trial.config.n_layers, n = layers * s->n_m;
    double rounding, kl;
    SRF_TRY(measure_errors(r, loss));
    report(r, n, 0);
    /* What rounding alone makes of it, in bf16 more than some layers' windows, is no layer's. */
    SRF_TRY(measure_kl(r, -1, 0, &rounding));
    for (int64_t l = 0; l < layers; l++)
        for (int64_t i = 0; i < s->n_m; i++) { /* choice i: the smallest window */
            double error = loss[i * layers + l];
            report(r, n, 1 + l * s->n_m + i);
            SRF_TRY(measure_kl(r, l, i, &kl));
            kl = kl < rounding ? 0 : kl - rounding;
            for (int64_t c = i; c < s->n; c += s->n_m) {
                double *own = &loss[c * layers + l];
                *own = error > 0 ? kl * (*own / error) : 0;
                SRF_FAIL_IF(!isfinite(*own), SRF_NONFINITE,
                            "windows by layer: attention's error is not finite");
            }
        }
    return SRF_OK;
}

/* ---- the plan -------------------------------------------------------------------------------- */

srf_status srf_plan_windows(struct srf_ctx *ctx, struct srf_checkpoint *ck, const int32_t *tokens,
                            const struct srf_plan_windows_config *config,
                            struct srf_plan_windows_result *out)
{
    struct srf_attention_config *a = &ck->attention;
    int64_t n = ck->config.n_layers, room = 0, cost[SRF__PLAN_CHOICES], most = 0, values = 0;
    SRF_FAIL_IF(a->kind != SRF_ATTN_SRF, SRF_INVALID, "softmax attention has no window to plan");
    SRF_FAIL_IF(a->n_windows || a->n_layer_m || a->window < 2 || a->window > 16384 ||
                    n > SRF_LAYERS_MAX,
                SRF_INVALID,
                "a plan of windows starts from one of 2 to 16384 and one number of features for "
                "all, at most %d layers",
                SRF_LAYERS_MAX);
    const struct srf__plan_choices s = srf__plan_all_choices(ck, config);
    SRF_TRY(srf__plan_room(ck, &s, config->state_budget, cost, &room));
    struct run r = {.ctx = ctx, .config = config, .choices = &s};
    double *loss = NULL;
    int *choice = NULL;
    srf_status st = SRF_OK;
    *out = (struct srf_plan_windows_result){0};
    SRF_TRY_GO(SRF_ALLOC(loss, s.n * n));
    SRF_TRY_GO(SRF_CALLOC(choice, n));
    for (int64_t c = 0; c < s.n; c++)
        if (cost[c] > cost[most]) most = c;
    out->measured = room < n * cost[most];
    for (int64_t l = 0; l < n; l++) choice[l] = (int)most;
    if (out->measured) {
        SRF_TRY_GO(open_run(&r, ck, tokens));
        SRF_TRY_GO(measure(&r, loss));
        SRF_TRY_GO(srf_plan_windows_choose(loss, cost, s.n, n, room, choice));
    }
    srf__plan_apply(a, &s, choice, n);
    for (int64_t l = 0; l < n; l++) {
        values += s.values[choice[l]];
        if (!out->measured) continue;
        out->before += loss[s.given * n + l];
        out->after += loss[choice[l] * n + l];
    }
    out->state_bytes = srf__plan_state_bytes(ck, values);
cleanup:
    free_run(&r);
    srf__free(loss);
    srf__free(choice);
    return st;
}
