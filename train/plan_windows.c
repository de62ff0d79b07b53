/* What a window and a number of features of a layer are worth: the KL divergence of the model's
 * predictions from those of softmax attention when this layer alone has them. That is measured with
 * the smallest window, for each number of features; for the other windows it goes as the squared
 * error of the layer's attention outputs, which is cheap: all layers from one forward. Features as
 * they are drawn would be judged too badly, most of all where attention is spread wide, which is
 * what they learn first, and the fewer they are the more: so a calibrated and fitted copy
 * (calibrate.h) of the model stands for the retrofitted one, and its features are trained for some
 * steps on the outputs of their own layer alone. */
#include "train/plan_windows.h"
#include "model/arch.h"
#include "train/calibrate.h"

#include <math.h>
#include <string.h>

/* Windows in halves of the given one; numbers of features in quarters. */
enum { MOST_WINDOWS = 7, MOST_M = 3, MOST_CHOICES = MOST_WINDOWS * MOST_M };
static const int64_t quarters[MOST_M] = {1, 2, 4};

/* Most logits of a measurement of KL, which is what bounds its time. */
#define MOST_LOGITS (1ll << 26)

/* Tokens that features are trained on; their peak learning rate, that of recipes. */
enum { TRAIN_TOKENS = 4096 };
#define TRAIN_LR 0.03

/* Finest grain of a budget. */
enum { MOST_ROOM = 1 << 16 };

/* least[l][u]: of the first l layers with u of the room taken; by dynamic programming. */
srf_status srf_plan_windows_choose(const double *error, const int64_t *cost, int64_t n_choices,
                                   int64_t n, int64_t room, int *choice)
{
    int64_t row = room + 1;
    double *least;
    SRF_TRY(SRF_ALLOC(least, (n + 1) * row));
    for (int64_t u = 0; u <= room; u++) least[u] = u == 0 ? 0 : INFINITY;
    for (int64_t l = 0; l < n; l++)
        for (int64_t u = 0; u <= room; u++) {
            double *to = &least[(l + 1) * row + u];
            *to = INFINITY;
            for (int64_t c = 0; c < n_choices; c++) {
                if (u < cost[c]) continue;
                double sum = least[l * row + u - cost[c]] + error[c * n + l];
                if (sum < *to) *to = sum;
            }
        }
    int64_t used = 0;
    for (int64_t u = 0; u <= room; u++)
        if (least[n * row + u] < least[n * row + used]) used = u;
    bool found = isfinite(least[n * row + used]);
    for (int64_t l = n - 1; found && l >= 0; l--)
        for (int64_t c = 0; c < n_choices; c++) {
            if (used < cost[c] ||
                least[l * row + used - cost[c]] + error[c * n + l] > least[(l + 1) * row + used])
                continue;
            choice[l] = (int)c;
            used -= cost[c];
            break;
        }
    srf__free(least);
    SRF_FAIL_IF(!found, SRF_INVALID, "windows by layer: no choice has room");
    return SRF_OK;
}

/* ---- what there is to choose ----------------------------------------------------------------- */

/* Choice c of a layer is window c / n_m with m c % n_m. */
struct choices {
    int64_t n_windows, n_m, n;
    int64_t window[MOST_WINDOWS], m[MOST_M];
    int64_t values[MOST_CHOICES]; /* of a head's state in a layer */
    int64_t given;                /* the choice that the model came with */
};

static struct choices all_choices(const struct srf_checkpoint *ck,
                                  const struct srf_plan_windows_config *config)
{
    const struct srf_attention_config *a = &ck->attention;
    int64_t one = a->window, seq_len = config->seq_len, d = ck->config.c / ck->config.n_heads;
    bool features = config->features && !a->far_none && one < seq_len; /* that see anything */
    struct choices s = {0};
    /* A window that leaves nothing to the features would leave them untrained. */
    for (int64_t halves = 1; halves <= MOST_WINDOWS; halves++)
        if (halves <= 2 || halves * one < seq_len) s.window[s.n_windows++] = halves * one / 2;
    /* Kernels on CUDA are fast with multiples of 16. */
    for (int i = 0; i < MOST_M; i++)
        if (quarters[i] == 4 || (features && quarters[i] * a->m % 64 == 0))
            s.m[s.n_m++] = quarters[i] * a->m / 4;
    s.given = 2 * s.n_m - 1; /* the second window, the last m */
    s.n = s.n_windows * s.n_m;
    for (int64_t c = 0; c < s.n; c++)
        s.values[c] = srf_attn_state_count(s.m[c % s.n_m], d, s.window[c / s.n_m]);
    return s;
}

static int64_t state_bytes(const struct srf_checkpoint *ck, int64_t values)
{
    return ck->config.n_heads * values * 4;
}

/* The room that a budget of so many values has for all layers, and what each choice takes of it. */
static srf_status room_of(const struct srf_checkpoint *ck, const struct choices *s, int64_t budget,
                          int64_t *cost, int64_t *room)
{
    int64_t n = ck->config.n_layers, most = 0, least = s->values[0], unit = 0, values;
    for (int64_t c = 0; c < s->n; c++) {
        most = s->values[c] > most ? s->values[c] : most;
        least = s->values[c] < least ? s->values[c] : least;
        for (int64_t x = s->values[c], rest; x; x = rest) { /* the greatest common divisor */
            rest = unit % x;
            unit = x;
        }
    }
    values = budget ? budget / state_bytes(ck, 1) : n * s->values[s->given];
    SRF_FAIL_IF(values < n * least, SRF_INVALID,
                "a state of %lld bytes: %lld layers with %lld features and windows of %lld take "
                "%lld at least",
                (long long)budget, (long long)n, (long long)s->m[0], (long long)s->window[0],
                (long long)state_bytes(ck, n * least));
    values = values < n * most ? values : n * most;
    while (values / unit > MOST_ROOM) unit *= 2;
    for (int64_t c = 0; c < s->n; c++) cost[c] = (s->values[c] + unit - 1) / unit;
    *room = values / unit;
    for (int64_t c = 0; c < s->n; c++) /* rounding must not take the least away */
        if (s->values[c] == least && *room < n * cost[c]) *room = n * cost[c];
    return SRF_OK;
}

/* ---- what they cost -------------------------------------------------------------------------- */

/* Two models of the trial's weights: softmax, which keeps q, k, v and its outputs of all text, and
 * SRF attention, on the first windows of it. */
struct run {
    struct srf_ctx *ctx;
    const struct srf_plan_windows_config *config;
    const struct choices *choices;
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
    const struct choices *s = r->choices;
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
    int64_t of_kl = MOST_LOGITS / (len * ck->config.vocab), of_training = TRAIN_TOKENS / len;
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
 * the whole model and two output heads about 64 (gpt2-14m on a CPU). */
static void report(const struct run *r, int64_t errors, int64_t kls)
{
    const struct srf_plan_windows_config *c = r->config;
    const struct choices *s = r->choices;
    int64_t trained = 3 * c->train_steps * r->train_windows;
    int64_t error = (trained + s->n / s->n_m * c->windows) * c->seq_len;
    int64_t kl = 64 * r->batch.b * c->seq_len, n = r->trial.config.n_layers * s->n_m;
    if (c->progress) c->progress(c->user, errors * error + kls * kl, n * error + (n + 1) * kl);
}

/* error (n_choices, layers): squared, of the attention outputs on all text. */
static srf_status measure_errors(struct run *r, double *error)
{
    const struct choices *s = r->choices;
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
    const struct choices *s = r->choices;
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
    const struct choices *s = r->choices;
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

static void apply(struct srf_attention_config *a, const struct choices *s, const int *choice,
                  int64_t n)
{
    bool one_window = true, one_m = true;
    a->window = a->m = 0;
    for (int64_t l = 0; l < n; l++) {
        a->windows[l] = (int32_t)s->window[choice[l] / s->n_m];
        a->layer_m[l] = (int32_t)s->m[choice[l] % s->n_m];
        one_window = one_window && a->windows[l] == a->windows[0];
        one_m = one_m && a->layer_m[l] == a->layer_m[0];
        if (a->windows[l] > a->window) a->window = a->windows[l];
        if (a->layer_m[l] > a->m) a->m = a->layer_m[l];
    }
    a->n_windows = one_window ? 0 : n;
    a->n_layer_m = one_m ? 0 : n;
}

srf_status srf_plan_windows(struct srf_ctx *ctx, struct srf_checkpoint *ck, const int32_t *tokens,
                            const struct srf_plan_windows_config *config,
                            struct srf_plan_windows_result *out)
{
    struct srf_attention_config *a = &ck->attention;
    int64_t n = ck->config.n_layers, room = 0, cost[MOST_CHOICES], most = 0, values = 0;
    SRF_FAIL_IF(a->kind != SRF_ATTN_SRF, SRF_INVALID, "softmax attention has no window to plan");
    SRF_FAIL_IF(a->n_windows || a->n_layer_m || a->window < 2 || a->window > 16384 ||
                    n > SRF_LAYERS_MAX,
                SRF_INVALID,
                "a plan of windows starts from one of 2 to 16384 and one number of features for "
                "all, at most %d layers",
                SRF_LAYERS_MAX);
    const struct choices s = all_choices(ck, config);
    SRF_TRY(room_of(ck, &s, config->state_budget, cost, &room));
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
    apply(a, &s, choice, n);
    for (int64_t l = 0; l < n; l++) {
        values += s.values[choice[l]];
        if (!out->measured) continue;
        out->before += loss[s.given * n + l];
        out->after += loss[choice[l] * n + l];
    }
    out->state_bytes = state_bytes(ck, values);
cleanup:
    free_run(&r);
    srf__free(loss);
    srf__free(choice);
    return st;
}
