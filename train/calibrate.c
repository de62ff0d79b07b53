#include "train/calibrate.h"
#include "model/arch.h"

#include <math.h>
#include <string.h>

/* Added to the covariances' diagonals, of their mean: directions that the text does not use keep a
 * bounded scale. */
#define RIDGE 1e-3

struct run {
    struct srf_ctx *ctx;
    struct srf_checkpoint *ck;
    const struct srf_calibrate_config *config;
    const int32_t *tokens;
    struct srf_arena *arena;
    struct srf_model *model; /* softmax */
    int64_t h, d, c, n;      /* heads, their size, width, tokens */
    int slot_w, slot_bias, slot_o;
    float *qkv, *exact, *o; /* host (n, 3c), (n, c), (n, c) */
    double *power;          /* (layers, h, d): E (q + k)_j^2 / sqrt(d) */
};

static void free_run(struct run *r)
{
    srf_model_free(r->model);
    srf_arena_free(r->arena);
    srf__free(r->qkv);
    srf__free(r->exact);
    srf__free(r->o);
    srf__free(r->power);
}

/* ---- small dense matrices, (d, d) ------------------------------------------------------------ */

/* Symmetric a = v diag(e) v^T by cyclic Jacobi rotations; a is destroyed. */
static void eigen(double *a, int64_t d, double *v, double *e)
{
    memset(v, 0, (size_t)(d * d) * sizeof *v);
    for (int64_t i = 0; i < d; i++) v[i * d + i] = 1;
    for (int sweep = 0; sweep < 30; sweep++) {
        double off = 0, diagonal = 0;
        for (int64_t p = 0; p < d; p++) {
            diagonal += a[p * d + p] * a[p * d + p];
            for (int64_t q = p + 1; q < d; q++) off += a[p * d + q] * a[p * d + q];
        }
        if (off <= 1e-26 * diagonal) break;
        for (int64_t p = 0; p < d; p++)
            for (int64_t q = p + 1; q < d; q++) {
                if (a[p * d + q] == 0) continue;
                double theta = (a[q * d + q] - a[p * d + p]) / (2 * a[p * d + q]);
                double t = copysign(1, theta) / (fabs(theta) + sqrt(theta * theta + 1));
                double c = 1 / sqrt(t * t + 1), s = t * c;
                for (int64_t k = 0; k < d; k++) {
                    double x = a[k * d + p], y = a[k * d + q];
                    a[k * d + p] = c * x - s * y;
                    a[k * d + q] = s * x + c * y;
                }
                for (int64_t k = 0; k < d; k++) {
                    double x = a[p * d + k], y = a[q * d + k];
                    a[p * d + k] = c * x - s * y;
                    a[q * d + k] = s * x + c * y;
                    x = v[k * d + p];
                    y = v[k * d + q];
                    v[k * d + p] = c * x - s * y;
                    v[k * d + q] = s * x + c * y;
                }
            }
    }
    for (int64_t i = 0; i < d; i++) e[i] = a[i * d + i];
}

/* out = x y, or x^T y. */
static void product(const double *x, bool transposed, const double *y, int64_t d, double *out)
{
    for (int64_t i = 0; i < d; i++)
        for (int64_t j = 0; j < d; j++) {
            double sum = 0;
            for (int64_t k = 0; k < d; k++)
                sum += (transposed ? x[k * d + i] : x[i * d + k]) * y[k * d + j];
            out[i * d + j] = sum;
        }
}

/* out = v diag(e^power) v^T */
static void spectral(const double *v, const double *e, double power, int64_t d, double *out)
{
    for (int64_t i = 0; i < d; i++)
        for (int64_t j = 0; j < d; j++) {
            double sum = 0;
            for (int64_t k = 0; k < d; k++) sum += v[i * d + k] * pow(e[k], power) * v[j * d + k];
            out[i * d + j] = sum;
        }
}

/* ---- one head -------------------------------------------------------------------------------- */

/* Scratch of a head: eight matrices and five vectors. */
struct head {
    double *cov_q, *cov_k, *s, *s_inv, *v, *m, *a, *a_inv; /* (d, d) */
    double *mean_q, *mean_k, *e, *shift, *scaled;          /* (d) */
};

static srf_status alloc_head(int64_t d, struct head *k)
{
    double *all;
    SRF_TRY(SRF_ALLOC(all, 8 * d * d + 5 * d));
    double **matrices[] = {&k->cov_q, &k->cov_k, &k->s, &k->s_inv, &k->v, &k->m, &k->a, &k->a_inv};
    double **vectors[] = {&k->mean_q, &k->mean_k, &k->e, &k->shift, &k->scaled};
    for (int i = 0; i < 8; i++) *matrices[i] = all + i * d * d;
    for (int i = 0; i < 5; i++) *vectors[i] = all + 8 * d * d + i * d;
    return SRF_OK;
}

/* Mean and covariance, ridge included, of n rows x of d. */
static void moments(const float *x, int64_t ld, int64_t n, int64_t d, double *mean, double *cov)
{
    memset(mean, 0, (size_t)d * sizeof *mean);
    memset(cov, 0, (size_t)(d * d) * sizeof *cov);
    for (int64_t t = 0; t < n; t++)
        for (int64_t i = 0; i < d; i++) mean[i] += (double)x[t * ld + i] / (double)n;
    for (int64_t t = 0; t < n; t++)
        for (int64_t i = 0; i < d; i++) {
            double xi = ((double)x[t * ld + i] - mean[i]) / (double)n;
            for (int64_t j = 0; j <= i; j++)
                cov[i * d + j] += xi * ((double)x[t * ld + j] - mean[j]);
        }
    double trace = 0;
    for (int64_t i = 0; i < d; i++) {
        trace += cov[i * d + i];
        for (int64_t j = 0; j < i; j++) cov[j * d + i] = cov[i * d + j];
    }
    for (int64_t i = 0; i < d; i++)
        cov[i * d + i] += RIDGE * trace / (double)d + 1e-12; /* a head may be constant */
}

/* A, A^-1 and c. */
static void balance_head(struct head *k, int64_t d)
{
    memcpy(k->m, k->cov_q, (size_t)(d * d) * sizeof *k->m);
    eigen(k->m, d, k->v, k->e);
    spectral(k->v, k->e, 0.5, d, k->s);
    spectral(k->v, k->e, -0.5, d, k->s_inv);
    product(k->s, false, k->cov_k, d, k->a);
    product(k->a, false, k->s, d, k->m);
    eigen(k->m, d, k->v, k->e);
    product(k->v, true, k->s_inv, d, k->a); /* V^T S^-1 */
    product(k->s, false, k->v, d, k->a_inv);
    for (int64_t i = 0; i < d; i++) {
        double by = pow(k->e[i], 0.25);
        for (int64_t j = 0; j < d; j++) {
            k->a[i * d + j] *= by;
            k->a_inv[j * d + i] /= by;
        }
    }
    for (int64_t i = 0; i < d; i++) {
        k->scaled[i] = 0;
        for (int64_t j = 0; j < d; j++) k->scaled[i] += k->a[i * d + j] * k->mean_q[j];
    }
    for (int64_t j = 0; j < d; j++) {
        k->shift[j] = k->mean_k[j];
        for (int64_t i = 0; i < d; i++) k->shift[j] += k->a[i * d + j] * k->scaled[i];
    }
}

/* row (d) <- (row - shift) B, or B^T; shift may be NULL. */
static void fold_row(float *row, const double *shift, const double *b, bool transposed, int64_t d,
                     double *scratch)
{
    for (int64_t i = 0; i < d; i++) scratch[i] = (double)row[i] - (shift ? shift[i] : 0);
    for (int64_t j = 0; j < d; j++) {
        double sum = 0;
        for (int64_t i = 0; i < d; i++)
            sum += scratch[i] * (transposed ? b[j * d + i] : b[i * d + j]);
        row[j] = (float)sum;
    }
}

/* Into the columns of one head of the weight (c, 3c) and bias (3c) that make q, k, v. */
static void fold(struct run *r, int64_t layer, int64_t head, const struct head *k)
{
    int64_t row = r->ck->config.arch->qkv_row(&r->ck->config, layer), c = r->c, d = r->d;
    float *w = r->ck->params + r->ck->table.rows[row].offset;
    float *b = r->ck->params + r->ck->table.rows[row + 1].offset;
    for (int64_t i = 0; i <= c; i++) {
        float *to = i < c ? w + i * 3 * c : b;
        fold_row(to + head * d, NULL, k->a, true, d, k->scaled);
        fold_row(to + c + head * d, i < c ? NULL : k->shift, k->a_inv, false, d, k->scaled);
    }
}

/* E |q + k|^2 / sqrt(d) as it is. */
static double pair_norm(const struct head *k, int64_t d)
{
    double sum = 0;
    for (int64_t i = 0; i < d; i++) {
        double mean = k->mean_q[i] + k->mean_k[i];
        sum += k->cov_q[i * d + i] + k->cov_k[i * d + i] + mean * mean;
    }
    return sum / sqrt((double)d);
}

/* ---- the model ------------------------------------------------------------------------------- */

static srf_status download_qkv(struct run *r, int64_t layer)
{
    return srf_download_f32(r->ctx, r->qkv, srf_model_qkv(r->model, layer), r->ctx->dtype,
                            r->n * 3 * r->c);
}

static srf_status forward(struct run *r)
{
    struct srf_batch batch = {
        .b = r->config->windows, .t = r->config->seq_len, .tokens = r->tokens};
    SRF_TRY(srf_model_upload(r->model, r->ck));
    return srf_model_forward(r->model, &batch);
}

static srf_status balance(struct run *r, struct srf_calibrate_result *out)
{
    int64_t d = r->d, layers = r->ck->config.n_layers;
    struct head k;
    SRF_TRY(alloc_head(d, &k));
    srf_status st = SRF_OK;
    for (int64_t i = 0; i < layers * r->h; i++) {
        int64_t layer = i / r->h, head = i % r->h;
        if (head == 0) SRF_TRY_GO(download_qkv(r, layer));
        moments(r->qkv + head * d, 3 * r->c, r->n, d, k.mean_q, k.cov_q);
        moments(r->qkv + r->c + head * d, 3 * r->c, r->n, d, k.mean_k, k.cov_k);
        out->v_before += pair_norm(&k, d) / (double)(layers * r->h);
        balance_head(&k, d);
        fold(r, layer, head, &k);
        for (int64_t j = 0; j < d; j++) {
            double power = 2 * sqrt(k.e[j]) / sqrt((double)d);
            r->power[i * d + j] = power;
            out->v_after += power / (double)(layers * r->h);
        }
    }
cleanup:
    srf__free(k.cov_q);
    return st;
}

/* ---- features -------------------------------------------------------------------------------- */

/* Candidate `draw` of one head: w (m, d), bias (m). */
static srf_status candidate(const struct run *r, int64_t layer, int64_t head, int64_t draw,
                            double *w, double *bias)
{
    const struct srf_attention_config *a = &r->ck->attention;
    const struct srf_features_draw_args args = {.kind = a->features,
                                                .rotation = a->rotation,
                                                .normalize_rows = a->normalize_rows,
                                                .seed = a->seed,
                                                .draw = a->draw + (uint64_t)draw,
                                                .m = srf_attention_m(a, layer),
                                                .d = r->d};
    SRF_TRY(srf_features_draw_one(&args, layer, head, a->oprf_a, w, bias));
    for (int64_t j = 0; r->config->fit && j < r->d; j++) {
        double oprf = srf_oprf_a(r->power[(layer * r->h + head) * r->d + j], 1);
        for (int64_t i = 0; i < args.m; i++) {
            double *x = &w[i * r->d + j];
            bias[i] += oprf * *x * *x + 0.25 * log1p(-4 * oprf);
            *x *= sqrt(1 - 4 * oprf);
        }
    }
    return SRF_OK;
}

static srf_status softmax_outputs(struct run *r, const void *q, const void *k, const void *v)
{
    return SRF_RUN(r->ctx, softmax_attn_fwd, .b = r->config->windows, .t = r->config->seq_len,
                   .h = r->h, .d = r->d, .causal = true, .q = q, .k = k, .v = v, .ld = 3 * r->c,
                   .o = srf_arena_ptr(r->arena, r->slot_o), .ld_o = r->c);
}

static srf_status srf_outputs(struct run *r, int64_t layer, const void *q, const void *k,
                              const void *v)
{
    struct srf_attn_shape s = {.b = r->config->windows,
                               .t = r->config->seq_len,
                               .h = r->h,
                               .d = r->d,
                               .m = srf_attention_m(&r->ck->attention, layer),
                               .n_sets = r->h,
                               .window = srf_attention_window(&r->ck->attention, layer),
                               .causal = true};
    return SRF_RUN(r->ctx, srf_attn_fwd, .s = s, .q = q, .k = k, .v = v, .ld = 3 * r->c,
                   .w = srf_arena_ptr(r->arena, r->slot_w),
                   .bias = srf_arena_ptr(r->arena, r->slot_bias),
                   .o = srf_arena_ptr(r->arena, r->slot_o), .ld_o = r->c);
}

static srf_status download_outputs(struct run *r, float *to)
{
    return srf_download_f32(r->ctx, to, srf_arena_ptr(r->arena, r->slot_o), r->ctx->dtype,
                            r->n * r->c);
}

/* |o - exact| / |exact| of one head. */
static double head_error(const struct run *r, int64_t head)
{
    double diff = 0, norm = 0;
    for (int64_t t = 0; t < r->n; t++)
        for (int64_t j = head * r->d; j < (head + 1) * r->d; j++) {
            double y = (double)r->exact[t * r->c + j], x = (double)r->o[t * r->c + j] - y;
            diff += x * x;
            norm += y * y;
        }
    return diff == 0 ? 0 : sqrt(diff / norm);
}

/* The features of one layer: candidates (h, m, d) and (h, m) are tried, the best ones kept. */
static srf_status choose_layer(struct run *r, int64_t layer, float *w, float *bias, double *one,
                               struct srf_calibrate_result *out)
{
    const struct srf_attention_config *a = &r->ck->attention;
    int64_t m = srf_attention_m(a, layer), count = m * r->d;
    float *best_bias = r->ck->features_bias + r->h * srf_attention_m_before(a, layer);
    float *best_w = r->ck->features_w + r->h * srf_attention_m_before(a, layer) * r->d;
    double *error = one + count + m; /* (h): the least so far */
    const char *q = srf_model_qkv(r->model, layer);
    size_t step = (size_t)r->c * srf_dtype_bytes(r->ctx->dtype);
    bool choice = r->config->best_of > 1;
    if (choice) SRF_TRY(softmax_outputs(r, q, q + step, q + 2 * step));
    if (choice) SRF_TRY(download_outputs(r, r->exact));
    for (int64_t draw = 0; draw < r->config->best_of; draw++) {
        for (int64_t head = 0; head < r->h; head++) {
            SRF_TRY(candidate(r, layer, head, draw, one, one + count));
            for (int64_t i = 0; i < count; i++) w[head * count + i] = (float)one[i];
            for (int64_t i = 0; i < m; i++) bias[head * m + i] = (float)one[count + i];
        }
        if (choice) {
            SRF_TRY(srf_upload_f32(r->ctx, srf_arena_ptr(r->arena, r->slot_w), r->ctx->dtype, w,
                                   r->h * count));
            SRF_TRY(srf_upload_f32(r->ctx, srf_arena_ptr(r->arena, r->slot_bias),
                                   srf_ctx_acc(r->ctx), bias, r->h * m));
            SRF_TRY(srf_outputs(r, layer, q, q + step, q + 2 * step));
            SRF_TRY(download_outputs(r, r->o));
        }
        for (int64_t head = 0; head < r->h; head++) {
            double e = choice ? head_error(r, head) : 0;
            if (draw == 0) out->error_first += e / (double)(r->ck->config.n_layers * r->h);
            if (draw > 0 && !(e < error[head])) continue;
            error[head] = e;
            memcpy(best_w + head * count, w + head * count, (size_t)count * sizeof *w);
            memcpy(best_bias + head * m, bias + head * m, (size_t)m * sizeof *bias);
        }
    }
    for (int64_t head = 0; head < r->h; head++)
        out->error_chosen += error[head] / (double)(r->ck->config.n_layers * r->h);
    return SRF_OK;
}

static srf_status choose(struct run *r, struct srf_calibrate_result *out)
{
    struct srf_checkpoint *ck = r->ck;
    int64_t m = ck->attention.m;
    float *w = NULL, *bias = NULL;
    double *one = NULL;
    srf_status st = SRF_OK;
    srf__free(ck->features_w);
    srf__free(ck->features_bias);
    ck->features_w = ck->features_bias = NULL;
    SRF_TRY_GO(SRF_ALLOC(ck->features_w, srf_checkpoint_features_count(ck)));
    SRF_TRY_GO(SRF_ALLOC(ck->features_bias, srf_checkpoint_bias_count(ck)));
    SRF_TRY_GO(SRF_ALLOC(w, r->h * m * r->d));
    SRF_TRY_GO(SRF_ALLOC(bias, r->h * m));
    SRF_TRY_GO(SRF_ALLOC(one, m * r->d + m + r->h));
    for (int64_t layer = 0, n = ck->config.n_layers; layer < n; layer++) {
        if (r->config->progress) r->config->progress(r->config->user, layer, n);
        SRF_TRY_GO(choose_layer(r, layer, w, bias, one, out));
    }
cleanup:
    srf__free(w);
    srf__free(bias);
    srf__free(one);
    return st;
}

/* ---- the whole ------------------------------------------------------------------------------- */

static srf_status open_run(struct run *r)
{
    struct srf_ctx *ctx = r->ctx;
    struct srf_attention_config softmax = srf_attention_default();
    int64_t m = r->ck->attention.m;
    softmax.m = 1; /* the model's own features are not used */
    SRF_TRY(srf_model_create(ctx, &r->ck->config, &softmax, &r->model));
    SRF_TRY(srf_arena_create(ctx, &r->arena));
    struct srf_model_plan plan = {
        .b = r->config->windows, .t = r->config->seq_len, .keep_qkv = true};
    SRF_TRY(srf_model_plan(r->model, r->arena, &plan));
    const struct srf_arena_row slots[] = {
        {"calibration", "w", r->h * m * r->d, ctx->dtype, &r->slot_w},
        {"calibration", "bias", r->h * m, srf_ctx_acc(ctx), &r->slot_bias},
        {"calibration", "outputs", r->n * r->c, ctx->dtype, &r->slot_o},
    };
    SRF_TRY(srf_arena_add_rows(r->arena, slots, sizeof slots / sizeof *slots));
    srf_arena_plan_begin(r->arena);
    srf_status st = softmax_outputs(r, NULL, NULL, NULL);
    for (int64_t l = 0; l < r->ck->config.n_layers && st == SRF_OK; l++)
        st = srf_outputs(r, l, NULL, NULL, NULL);
    srf_arena_plan_end(r->arena);
    SRF_TRY(st);
    SRF_TRY(srf_arena_commit(r->arena));
    SRF_TRY(SRF_ALLOC(r->qkv, r->n * 3 * r->c));
    SRF_TRY(SRF_ALLOC(r->exact, r->n * r->c));
    SRF_TRY(SRF_ALLOC(r->o, r->n * r->c));
    return SRF_CALLOC(r->power, r->ck->config.n_layers * r->c);
}

static srf_status check(const struct srf_checkpoint *ck, const struct srf_calibrate_config *c)
{
    SRF_FAIL_IF(ck->attention.kind != SRF_ATTN_SRF, SRF_INVALID,
                "calibration is for SRF attention");
    SRF_FAIL_IF(c->windows < 1 || c->seq_len < 2 || c->seq_len > ck->config.n_pos, SRF_INVALID,
                "calibration on %lld windows of %lld tokens: expected at least 1 of 2 to %lld",
                (long long)c->windows, (long long)c->seq_len, (long long)ck->config.n_pos);
    SRF_FAIL_IF(c->best_of < 1, SRF_INVALID, "the best of %lld draws: expected at least 1",
                (long long)c->best_of);
    SRF_FAIL_IF(c->fit && !c->balance, SRF_INVALID, "fitted features need a balanced model");
    SRF_FAIL_IF((c->fit || c->best_of > 1) && !ck->attention.per_head, SRF_INVALID,
                "features that are fitted or chosen need one draw per head");
    return SRF_OK;
}

srf_status srf_calibrate(struct srf_ctx *ctx, struct srf_checkpoint *ck, const int32_t *tokens,
                         const struct srf_calibrate_config *config,
                         struct srf_calibrate_result *out)
{
    *out = (struct srf_calibrate_result){0};
    SRF_TRY(check(ck, config));
    struct run r = {.ctx = ctx,
                    .ck = ck,
                    .config = config,
                    .tokens = tokens,
                    .h = ck->config.n_heads,
                    .d = ck->config.c / ck->config.n_heads,
                    .c = ck->config.c,
                    .n = config->windows * config->seq_len};
    srf_status st = SRF_OK;
    SRF_TRY_GO(open_run(&r));
    SRF_TRY_GO(forward(&r));
    if (config->balance) {
        SRF_TRY_GO(balance(&r, out));
        SRF_TRY_GO(forward(&r));
    }
    if (config->fit || config->best_of > 1) SRF_TRY_GO(choose(&r, out));
cleanup:
    free_run(&r);
    return st;
}
