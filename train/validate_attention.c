/* SRF attention against softmax attention, head by head, on a model's own q, k, v; and the forms of
 * SRF attention against each other. Everything runs through the ops, on whatever device; only
 * outputs come to the host. */
#include "train/validate.h"
#include "train/validate_weights.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The most tokens whose attention weights are compared: there are their square. */
enum { WEIGHTS_T = 256 };

struct run {
    struct srf_ctx *ctx;
    const struct srf_validate_config *config;
    const struct srf_checkpoint *ck;
    struct srf_arena *arena;
    struct srf_model *model; /* softmax */
    int64_t n_heads, d, c, n_sets, state_count;
    int slot_w, slot_bias, slot_exact, slot_o, slot_state, slot_pos;
    float *qkv, *exact, *o; /* host (n, 3c), (layers, n, c), (n, c) */
    int64_t weights_t;      /* tokens of the first window whose attention weights are compared */
    float *w, *bias;        /* host, of one layer with the most features */
    float *scratch;         /* (heads, srf_weights_scratch) */
};

static void free_run(struct run *r)
{
    srf_model_free(r->model);
    srf_arena_free(r->arena);
    srf__free(r->qkv);
    srf__free(r->exact);
    srf__free(r->o);
    srf__free(r->w);
    srf__free(r->bias);
    srf__free(r->scratch);
}

/* The element at `offset` of a T array on the device; NULL stays NULL while planning. */
static char *at(const struct run *r, const void *base, int64_t offset)
{
    if (!base) return NULL;
    return (char *)base + (size_t)offset * srf_dtype_bytes(r->ctx->dtype);
}

static char *slot_at(const struct run *r, int slot, int64_t offset)
{
    return at(r, srf_arena_ptr(r->arena, slot), offset);
}

/* In place of a number of features for all layers: each layer's own. */
enum { OWN = 0 };

static int64_t m_of(const struct run *r, int64_t m, int64_t layer)
{
    return m == OWN ? srf_attention_m(&r->config->attention, layer) : m;
}

/* Features of all sets in the layers before that one. */
static int64_t rows_before(const struct run *r, int64_t m, int64_t layer)
{
    const struct srf_attention_config *a = &r->config->attention;
    return r->n_sets * (m == OWN ? srf_attention_m_before(a, layer) : m * layer);
}

/* What the model itself has: the draw that is its own, the forms of its recurrent state. */
static int64_t main_m(const struct run *r)
{
    return r->config->attention.n_layer_m ? OWN : r->config->main_m;
}

/* The bias, A, of features `first` on. */
static char *bias_at(const struct run *r, int64_t first)
{
    return (char *)srf_arena_ptr(r->arena, r->slot_bias) +
           (size_t)first * srf_dtype_bytes(srf_ctx_acc(r->ctx));
}

/* ---- the ops, as planned and as run ---------------------------------------------------------- */

static srf_status upload_features(struct run *r, const float *w, const float *bias, int64_t rows)
{
    SRF_TRY(srf_upload_f32(r->ctx, slot_at(r, r->slot_w, 0), r->ctx->dtype, w, rows * r->d));
    return srf_upload_f32(r->ctx, bias_at(r, 0), srf_ctx_acc(r->ctx), bias, rows);
}

/* What the op does not know: numbers of features by layer, and features that weigh nothing. */
static srf_status draw_on_host(struct run *r, const struct srf_attention_config *a,
                               const double *oprf, int64_t rows)
{
    float *w, *bias = NULL;
    if (r->ctx->plan) return SRF_OK;
    SRF_TRY(SRF_ALLOC(w, rows * r->d));
    srf_status st = SRF_ALLOC(bias, rows);
    if (st == SRF_OK)
        st = srf_attention_draw(a, r->model->config.n_layers, r->n_sets, r->d, oprf, w, bias);
    if (st == SRF_OK) st = upload_features(r, w, bias, rows);
    srf__free(w);
    srf__free(bias);
    return st;
}

/* In place of a draw's number: the features that the checkpoint holds, trained, fitted or chosen
 * ones, which are no draw of the key; the first draw where it holds none. */
enum { HELD = -1 };

static srf_status draw_features(struct run *r, int64_t m, int64_t draw)
{
    struct srf_attention_config a = r->config->attention;
    int64_t layers = r->model->config.n_layers, n = layers * r->n_sets;
    int64_t rows = rows_before(r, m, layers);
    a.kind = SRF_ATTN_SRF;
    if (draw != HELD) a.draw += (uint64_t)draw;
    if (m != OWN) a.m = m, a.n_layer_m = 0;
    /* Kinds of draws are compared by draws alone. */
    bool held = draw == HELD && r->ck->features_w && !r->config->oprf_a &&
                !r->config->errors_only && !a.far_none &&
                srf_attention_same_features(&r->ck->attention, &a);
    if (held && !r->ctx->plan)
        return upload_features(r, r->ck->features_w, r->ck->features_bias, rows);
    double *oprf;
    SRF_TRY(SRF_ALLOC(oprf, n));
    for (int64_t i = 0; i < n; i++) oprf[i] = r->config->oprf_a ? r->config->oprf_a[i] : a.oprf_a;
    srf_status st =
        m == OWN || a.far_none
            ? draw_on_host(r, &a, oprf, rows)
            : SRF_RUN(r->ctx, features_draw, .kind = a.features, .rotation = a.rotation,
                      .normalize_rows = a.normalize_rows, .seed = a.seed, .draw = a.draw,
                      .n_layers = layers, .n_sets = r->n_sets, .m = m, .d = r->d, .oprf_a = oprf,
                      .w = slot_at(r, r->slot_w, 0), .bias = bias_at(r, 0));
    srf__free(oprf);
    return st;
}

static srf_status softmax_outputs(struct run *r, const void *qkv)
{
    const struct srf_validate_config *c = r->config;
    return SRF_RUN(r->ctx, softmax_attn_fwd, .b = c->windows, .t = c->seq_len, .h = r->n_heads,
                   .d = r->d, .causal = true, .q = qkv, .k = at(r, qkv, r->c),
                   .v = at(r, qkv, 2 * r->c), .ld = 3 * r->c, .o = slot_at(r, r->slot_exact, 0),
                   .ld_o = r->c);
}

enum form { CHUNKED, PREFILL, STEP };

/* Outputs of tokens first .. first + t - 1 of the first b windows, in one of the forms, into the
 * same rows of slot_o. */
static srf_status srf_outputs(struct run *r, enum form form, int64_t layer, const void *qkv,
                              int64_t m, int64_t b, int64_t first, int64_t t)
{
    struct srf_attn_shape s = {.b = b,
                               .t = t,
                               .h = r->n_heads,
                               .d = r->d,
                               .m = m_of(r, m, layer),
                               .n_sets = r->n_sets,
                               .window = srf_attention_window(&r->config->attention, layer),
                               .causal = true};
    const void *w = slot_at(r, r->slot_w, rows_before(r, m, layer) * r->d);
    const void *bias = bias_at(r, rows_before(r, m, layer));
    const void *q = at(r, qkv, first * 3 * r->c);
    const void *k = at(r, q, r->c), *v = at(r, q, 2 * r->c);
    int64_t ld = 3 * r->c;
    void *o = slot_at(r, r->slot_o, first * r->c);
    if (form == CHUNKED)
        return SRF_RUN(r->ctx, srf_attn_fwd, .s = s, .q = q, .k = k, .v = v, .ld = ld, .w = w,
                       .bias = bias, .o = o, .ld_o = r->c);
    void *state = srf_arena_ptr(r->arena, r->slot_state);
    void *pos = srf_arena_ptr(r->arena, r->slot_pos);
    int32_t seen = (int32_t)first;
    if (!r->ctx->plan) SRF_TRY(r->ctx->be->upload(r->ctx, pos, &seen, sizeof seen));
    if (form == PREFILL)
        return SRF_RUN(r->ctx, srf_attn_prefill, .s = s, .q = q, .k = k, .v = v, .ld = ld, .w = w,
                       .bias = bias, .o = o, .ld_o = r->c, .state = state, .pos = pos);
    return SRF_RUN(r->ctx, srf_attn_step, .s = s, .q = q, .k = k, .v = v, .ld = ld, .w = w,
                   .bias = bias, .o = o, .ld_o = r->c, .state = state, .pos = pos);
}

static srf_status plan_ops(struct run *r)
{
    const struct srf_validate_config *c = r->config;
    srf_status st = SRF_OK;
    srf_arena_plan_begin(r->arena);
    SRF_TRY_GO(softmax_outputs(r, NULL));
    for (int64_t i = 0; i < c->n_m; i++) SRF_TRY_GO(draw_features(r, c->m[i], 0));
    for (int64_t l = 0; l < r->model->config.n_layers; l++) {
        for (int64_t i = 0; i < c->n_m; i++)
            SRF_TRY_GO(srf_outputs(r, CHUNKED, l, NULL, c->m[i], c->windows, 0, c->seq_len));
        int64_t m = main_m(r);
        SRF_TRY_GO(srf_outputs(r, CHUNKED, l, NULL, m, c->windows, 0, c->seq_len));
        SRF_TRY_GO(srf_outputs(r, CHUNKED, l, NULL, m, 1, 0, c->seq_len));
        SRF_TRY_GO(srf_outputs(r, PREFILL, l, NULL, m, 1, 0, c->seq_len));
        SRF_TRY_GO(srf_outputs(r, STEP, l, NULL, m, 1, 0, 1));
    }
cleanup:
    srf_arena_plan_end(r->arena);
    return st;
}

/* The softmax model, its activations, and ours in one arena; then the forward pass. */
static srf_status open_run(struct run *r, const struct srf_checkpoint *ck, const int32_t *tokens)
{
    const struct srf_validate_config *c = r->config;
    struct srf_ctx *ctx = r->ctx;
    struct srf_attention_config softmax = srf_attention_default();
    softmax.m = 1; /* the model's own features are not used */
    SRF_TRY(srf_model_create(ctx, &ck->config, &softmax, &r->model));
    SRF_TRY(srf_arena_create(ctx, &r->arena));
    struct srf_model_plan plan = {.b = c->windows, .t = c->seq_len, .keep_qkv = true};
    SRF_TRY(srf_model_plan(r->model, r->arena, &plan));
    int64_t n = c->windows * c->seq_len, rows = ck->config.n_layers * r->n_sets * c->m[c->n_m - 1];
    enum srf_dtype type = ctx->dtype, acc = srf_ctx_acc(ctx);
    const struct srf_arena_row slots[] = {
        {"validation", "w to try", rows * r->d, type, &r->slot_w},
        {"validation", "bias to try", rows, acc, &r->slot_bias},
        {"validation", "softmax outputs", n * r->c, type, &r->slot_exact},
        {"validation", "srf outputs", n * r->c, type, &r->slot_o},
        {"validation", "recurrent state", r->n_heads * r->state_count, acc, &r->slot_state},
        {"validation", "position", 1, SRF_I32, &r->slot_pos},
    };
    SRF_TRY(srf_arena_add_rows(r->arena, slots, sizeof slots / sizeof *slots));
    SRF_TRY(plan_ops(r));
    SRF_TRY(srf_arena_commit(r->arena));
    SRF_TRY(srf_model_upload(r->model, ck));
    SRF_TRY(SRF_ALLOC(r->qkv, n * 3 * r->c));
    SRF_TRY(SRF_ALLOC(r->exact, ck->config.n_layers * n * r->c));
    SRF_TRY(SRF_ALLOC(r->o, n * r->c));
    int64_t m = c->m[c->n_m - 1];
    SRF_TRY(SRF_ALLOC(r->w, r->n_sets * m * r->d));
    SRF_TRY(SRF_ALLOC(r->bias, r->n_sets * m));
    SRF_TRY(SRF_ALLOC(r->scratch, r->n_heads * srf_weights_scratch(r->weights_t, m)));
    struct srf_batch batch = {.b = c->windows, .t = c->seq_len, .tokens = tokens};
    return srf_model_forward(r->model, &batch);
}

/* ---- |q + k|^2 / sqrt(d) --------------------------------------------------------------------- */

static int compare_floats(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Bins of an octave, and octaves below 1. */
enum { PER_OCTAVE = 4, BELOW_ONE = 4 };

double srf_validate_bin(int64_t i)
{
    return exp2((double)i / PER_OCTAVE - BELOW_ONE);
}

static int bin_of(double v)
{
    double i = v > 0 ? floor((log2(v) + BELOW_ONE) * PER_OCTAVE) : 0;
    return (int)fmin(fmax(i, 0), SRF_VALIDATE_BINS - 1);
}

/* Mean, histogram and part past the limit over all pairs s <= t, quantiles over every stride-th of
 * them. */
static void pair_norms(const struct run *r, int64_t head, int64_t stride, float *sample,
                       double *mean, double *quantile, double *part, double *past)
{
    int64_t d = r->d, ld = 3 * r->c, t_len = r->config->seq_len, pairs = 0, n = 0, n_past = 0;
    double total = 0, scale = 1 / sqrt((double)d), limit = log1p((double)r->config->main_m);
    for (int64_t b = 0; b < r->config->windows; b++)
        for (int64_t t = 0; t < t_len; t++) {
            const float *q = r->qkv + (b * t_len + t) * ld + head * d;
            const float *k = r->qkv + b * t_len * ld + r->c + head * d;
            for (int64_t s = 0; s <= t; s++, k += ld) {
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t j = 0; j < d; j++) sum += (q[j] + k[j]) * (q[j] + k[j]);
                double v_sq = scale * (double)sum;
                total += v_sq;
                part[bin_of(v_sq)]++;
                n_past += v_sq > limit;
                if (pairs++ % stride == 0) sample[n++] = (float)v_sq;
            }
        }
    *mean = total / (double)pairs;
    *past = (double)n_past / (double)pairs;
    for (int i = 0; i < SRF_VALIDATE_BINS; i++) part[i] /= (double)pairs;
    qsort(sample, (size_t)n, sizeof *sample, compare_floats);
    for (int i = 0; i < SRF_VALIDATE_QUANTILES; i++)
        quantile[i] = (double)sample[(int64_t)(srf_validate_quantile[i] * (double)(n - 1))];
}

static srf_status all_pair_norms(struct run *r, struct srf_validate_result *out)
{
    enum { SAMPLES = 100000 };
    int64_t t = r->config->seq_len, n = r->config->windows * t;
    int64_t pairs = r->config->windows * (t * (t + 1) / 2);
    /* Odd, so that a sample does not keep to the even tokens of windows. */
    int64_t stride = pairs / SAMPLES | 1, n_samples = pairs / stride + 1;
    float *samples;
    SRF_TRY(SRF_ALLOC(samples, r->n_heads * n_samples));
    srf_status st = SRF_OK;
    for (int64_t layer = 0; layer < out->n_layers; layer++) {
        SRF_TRY_GO(srf_download_f32(r->ctx, r->qkv, srf_model_qkv(r->model, layer), r->ctx->dtype,
                                    n * 3 * r->c));
#pragma omp parallel for schedule(dynamic)
        for (int64_t h = 0; h < r->n_heads; h++) {
            int64_t at = layer * r->n_heads + h;
            pair_norms(r, h, stride, samples + h * n_samples, &out->v_mean[at],
                       &out->v_quantile[at * SRF_VALIDATE_QUANTILES],
                       &out->v_part[at * SRF_VALIDATE_BINS], &out->v_past[at]);
        }
    }
cleanup:
    srf__free(samples);
    return st;
}

/* ---- errors ---------------------------------------------------------------------------------- */

/* |a - b| / |b| over `width` columns from `first` of n rows of c; 0 where both are zero. */
static double relative_error(const float *a, const float *b, int64_t n, int64_t c, int64_t first,
                             int64_t width)
{
    double diff = 0, norm = 0;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = first; j < first + width; j++) {
            double x = (double)a[i * c + j], y = (double)b[i * c + j];
            diff += (x - y) * (x - y);
            norm += y * y;
        }
    return diff == 0 ? 0 : sqrt(diff / norm);
}

static srf_status download_outputs(struct run *r, int slot, int64_t n, float *to)
{
    return srf_download_f32(r->ctx, to, srf_arena_ptr(r->arena, slot), r->ctx->dtype, n * r->c);
}

/* One draw of m features, all layers: e and e^2 of each head are added to sum and squares
 * (layers, heads), and e is put into own, where these are not NULL. */
static srf_status errors_of_draw(struct run *r, int64_t m, int64_t draw, double *sum,
                                 double *squares, double *own)
{
    const struct srf_validate_config *c = r->config;
    int64_t n = c->windows * c->seq_len;
    SRF_TRY(draw_features(r, m, draw));
    for (int64_t layer = 0; layer < r->model->config.n_layers; layer++) {
        const void *qkv = srf_model_qkv(r->model, layer);
        SRF_TRY(srf_outputs(r, CHUNKED, layer, qkv, m, c->windows, 0, c->seq_len));
        SRF_TRY(download_outputs(r, r->slot_o, n, r->o));
        const float *exact = r->exact + layer * n * r->c;
#pragma omp parallel for
        for (int64_t h = 0; h < r->n_heads; h++) {
            double e = relative_error(r->o, exact, n, r->c, h * r->d, r->d);
            if (sum) sum[layer * r->n_heads + h] += e;
            if (squares) squares[layer * r->n_heads + h] += e * e;
            if (own) own[layer * r->n_heads + h] = e;
        }
    }
    return SRF_OK;
}

/* KL of each head's attention weights, (layers, heads), with the m features drawn last. */
static srf_status weights_of_draw(struct run *r, int64_t m, double *kl)
{
    int64_t ld = 3 * r->c, t = r->weights_t, count = r->n_sets * m;
    enum srf_dtype acc = srf_ctx_acc(r->ctx);
    for (int64_t layer = 0; layer < r->model->config.n_layers; layer++) {
        SRF_TRY(srf_download_f32(r->ctx, r->qkv, srf_model_qkv(r->model, layer), r->ctx->dtype,
                                 t * ld));
        SRF_TRY(srf_download_f32(r->ctx, r->w, slot_at(r, r->slot_w, layer * count * r->d),
                                 r->ctx->dtype, count * r->d));
        SRF_TRY(srf_download_f32(r->ctx, r->bias, bias_at(r, layer * count), acc, count));
#pragma omp parallel for schedule(dynamic)
        for (int64_t h = 0; h < r->n_heads; h++) {
            int64_t set = r->n_sets > 1 ? h : 0;
            struct srf_weights_args a = {.t = t,
                                         .d = r->d,
                                         .m = m,
                                         .window =
                                             srf_attention_window(&r->config->attention, layer),
                                         .q = r->qkv + h * r->d,
                                         .k = r->qkv + r->c + h * r->d,
                                         .ld = ld,
                                         .w = r->w + set * m * r->d,
                                         .bias = r->bias + set * m,
                                         .scratch = r->scratch + h * srf_weights_scratch(t, m)};
            kl[layer * r->n_heads + h] = srf_weights_kl(&a);
        }
    }
    return SRF_OK;
}

/* Progress of this part, 0 to 1; it is most of the time. */
static void report(const struct run *r, double done)
{
    if (r->config->progress) r->config->progress(r->config->user, done);
}

static srf_status output_errors(struct run *r, struct srf_validate_result *out)
{
    const struct srf_validate_config *c = r->config;
    int64_t n = c->windows * c->seq_len, heads = out->n_layers * out->n_heads, total = 0, done = 0;
    for (int64_t layer = 0; layer < out->n_layers; layer++) {
        SRF_TRY(softmax_outputs(r, srf_model_qkv(r->model, layer)));
        SRF_TRY(download_outputs(r, r->slot_exact, n, r->exact + layer * n * r->c));
    }
    for (int64_t i = 0; i < c->n_m; i++) total += c->m[i] * c->n_draws;
    for (int64_t draw = 0; draw < c->n_draws; draw++)
        for (int64_t i = 0; i < c->n_m; i++) {
            bool own = draw == 0 && c->m[i] == main_m(r);
            SRF_TRY(errors_of_draw(r, c->m[i], draw, out->error + i * heads,
                                   out->error_sd + i * heads, NULL));
            if (own) SRF_TRY(errors_of_draw(r, c->m[i], HELD, NULL, NULL, out->error_own));
            if (draw == 0) SRF_TRY(weights_of_draw(r, c->m[i], out->weights_kl + i * heads));
            done += c->m[i];
            report(r, (double)done / (double)total);
        }
    if (main_m(r) == OWN) SRF_TRY(errors_of_draw(r, OWN, HELD, NULL, NULL, out->error_own));
    double draws = (double)c->n_draws;
    for (int64_t i = 0; i < c->n_m * heads; i++) {
        double mean = out->error[i] / draws, rest = out->error_sd[i] / draws - mean * mean;
        out->error[i] = mean;
        out->error_sd[i] = draws > 1 ? sqrt(fmax(rest, 0) * draws / (draws - 1)) : 0;
    }
    return SRF_OK;
}

/* The first window token by token, after a prefill of `prefill` tokens, against the chunked form
 * in `chunked`. */
static srf_status recurrent_error(struct run *r, int64_t layer, int64_t prefill,
                                  const float *chunked, double *error)
{
    int64_t m = main_m(r), t_len = r->config->seq_len;
    const void *qkv = srf_model_qkv(r->model, layer);
    SRF_TRY(r->ctx->be->zero(r->ctx, srf_arena_ptr(r->arena, r->slot_state),
                             (size_t)(r->n_heads * r->state_count) *
                                 srf_dtype_bytes(srf_ctx_acc(r->ctx))));
    if (prefill) SRF_TRY(srf_outputs(r, PREFILL, layer, qkv, m, 1, 0, prefill));
    for (int64_t t = prefill; t < t_len; t++) SRF_TRY(srf_outputs(r, STEP, layer, qkv, m, 1, t, 1));
    SRF_TRY(download_outputs(r, r->slot_o, t_len, r->o));
    *error = relative_error(r->o, chunked, t_len, r->c, 0, r->c);
    return SRF_OK;
}

static srf_status form_errors(struct run *r, struct srf_validate_result *out)
{
    int64_t m = main_m(r), t_len = r->config->seq_len;
    float *chunked = r->exact; /* not needed any more */
    SRF_TRY(draw_features(r, m, HELD));
    for (int64_t layer = 0; layer < out->n_layers; layer++) {
        const void *qkv = srf_model_qkv(r->model, layer);
        SRF_TRY(srf_outputs(r, CHUNKED, layer, qkv, m, 1, 0, t_len));
        SRF_TRY(download_outputs(r, r->slot_o, t_len, chunked));
        SRF_TRY(recurrent_error(r, layer, 0, chunked, &out->step[layer]));
        SRF_TRY(recurrent_error(r, layer, t_len / 3, chunked, &out->prefill[layer]));
    }
    return SRF_OK;
}

/* ---- the whole ------------------------------------------------------------------------------- */

static srf_status check(const struct srf_validate_config *c, const struct srf_checkpoint *ck)
{
    bool has_main = false;
    for (int64_t i = 0; i < c->n_m; i++) {
        SRF_FAIL_IF(c->m[i] < 1 || (i && c->m[i] <= c->m[i - 1]), SRF_INVALID,
                    "numbers of features must ascend, from 1: found %lld", (long long)c->m[i]);
        has_main |= c->m[i] == c->main_m;
    }
    SRF_FAIL_IF(c->attention.n_layer_m && c->attention.m != c->main_m, SRF_INVALID,
                "%lld features in the layer with most of them, not %lld", (long long)c->attention.m,
                (long long)c->main_m);
    SRF_FAIL_IF(!has_main, SRF_INVALID, "%lld features are not among those to try",
                (long long)c->main_m);
    SRF_FAIL_IF(c->windows < 1 || c->seq_len < 2 || c->seq_len > ck->config.n_pos, SRF_INVALID,
                "%lld windows of %lld tokens: expected at least 1 of 2 to %lld",
                (long long)c->windows, (long long)c->seq_len, (long long)ck->config.n_pos);
    SRF_FAIL_IF(c->n_draws < (c->errors_only ? 1 : 2), SRF_INVALID,
                "%lld draws: their spread needs at least 2", (long long)c->n_draws);
    return SRF_OK;
}

static srf_status alloc_result(struct srf_validate_result *out)
{
    int64_t heads = out->n_layers * out->n_heads;
    SRF_TRY(SRF_CALLOC(out->v_mean, heads));
    SRF_TRY(SRF_CALLOC(out->v_quantile, heads * SRF_VALIDATE_QUANTILES));
    SRF_TRY(SRF_CALLOC(out->v_part, heads * SRF_VALIDATE_BINS));
    SRF_TRY(SRF_CALLOC(out->v_past, heads));
    SRF_TRY(SRF_CALLOC(out->error_own, heads));
    SRF_TRY(SRF_CALLOC(out->weights_kl, out->n_m * heads));
    SRF_TRY(SRF_CALLOC(out->error, out->n_m * heads));
    SRF_TRY(SRF_CALLOC(out->error_sd, out->n_m * heads));
    SRF_TRY(SRF_CALLOC(out->step, out->n_layers));
    return SRF_CALLOC(out->prefill, out->n_layers);
}

srf_status srf_validate_attention(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                                  const int32_t *tokens, const struct srf_validate_config *config,
                                  struct srf_validate_result *out)
{
    const struct srf_model_config *cfg = &ck->config;
    *out = (struct srf_validate_result){
        .n_layers = cfg->n_layers, .n_heads = cfg->n_heads, .n_m = config->n_m};
    SRF_TRY(check(config, ck));
    SRF_TRY(srf_attention_check_layers(&config->attention, cfg->n_layers));
    int64_t d = cfg->c / cfg->n_heads;
    struct run r = {.ctx = ctx,
                    .config = config,
                    .ck = ck,
                    .weights_t = config->seq_len < WEIGHTS_T ? config->seq_len : WEIGHTS_T,
                    .n_heads = cfg->n_heads,
                    .d = d,
                    .c = cfg->c,
                    .n_sets = config->attention.per_head ? cfg->n_heads : 1,
                    .state_count =
                        srf_attn_state_count(config->main_m, d, config->attention.window)};
    srf_status st = SRF_OK;
    SRF_TRY_GO(alloc_result(out));
    SRF_TRY_GO(open_run(&r, ck, tokens));
    if (!config->errors_only) SRF_TRY_GO(all_pair_norms(&r, out));
    SRF_TRY_GO(output_errors(&r, out));
    if (!config->errors_only) SRF_TRY_GO(form_errors(&r, out));
cleanup:
    free_run(&r);
    if (st != SRF_OK) srf_validate_result_free(out);
    return st;
}

void srf_validate_result_free(struct srf_validate_result *r)
{
    double *all[] = {r->v_mean,    r->v_quantile, r->v_part,   r->v_past, r->error,
                     r->error_own, r->weights_kl, r->error_sd, r->step,   r->prefill};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) srf__free(all[i]);
    *r = (struct srf_validate_result){0};
}
