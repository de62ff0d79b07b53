/* What a window of a layer is worth: the KL divergence of the model's predictions from those of
 * softmax attention when this layer alone has it. That is measured with the smallest window; for
 * the others it goes as the squared error of the layer's attention outputs, which is cheap: all
 * layers at once. Features as they are drawn would be judged too badly, most of all where attention
 * is spread wide, which is what they learn first: a calibrated and fitted copy (calibrate.h) of the
 * model stands for the trained one. */
#include "train/plan_windows.h"
#include "train/calibrate.h"
#include "train/validate.h"

#include <math.h>
#include <string.h>

enum { CHOICES = 4 };

/* What a choice takes, in halves of the window. */
static const int64_t halves[CHOICES] = {1, 2, 4, 6};

/* Most logits of a measurement: all tokens' are there at once. */
#define MOST_LOGITS (1ll << 26)

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

/* Bytes of a sequence's state in fp32 with windows that sum to `tokens`. */
static int64_t state_bytes(const struct srf_checkpoint *ck, int64_t tokens)
{
    const struct srf_model_config *c = &ck->config;
    int64_t d = c->c / c->n_heads, m = ck->attention.m, none = srf_attn_state_count(m, d, 0);
    int64_t token = srf_attn_state_count(m, d, 1) - none;
    return c->n_heads * (c->n_layers * none + tokens * token) * 4;
}

/* Halves of the window `one` that all layers may have together. */
static srf_status room_of(const struct srf_checkpoint *ck, int64_t one, int64_t budget,
                          int64_t n_choices, int64_t *room)
{
    int64_t n = ck->config.n_layers, most = n * halves[n_choices - 1];
    *room = 2 * n;
    if (budget == 0) return SRF_OK;
    int64_t fixed = state_bytes(ck, 0), least = state_bytes(ck, n * (one / 2));
    SRF_FAIL_IF(budget < least, SRF_INVALID,
                "a state of %lld bytes: %lld layers with %lld features and windows of %lld take "
                "%lld at least",
                (long long)budget, (long long)n, (long long)ck->attention.m, (long long)one / 2,
                (long long)least);
    int64_t tokens = (budget - fixed) / (state_bytes(ck, 1) - fixed);
    *room = tokens / one * 2 + (tokens % one * 2) / one;
    if (*room < n) *room = n; /* an odd window's halves are rounded down */
    if (*room > most) *room = most;
    return SRF_OK;
}

/* What stands for the trained model: weights and features of its own, the rest is ck's. */
static srf_status make_trial(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                             const int32_t *tokens, const struct srf_plan_windows_config *config,
                             struct srf_checkpoint *trial)
{
    struct srf_calibrate_config c = {.windows = config->windows,
                                     .seq_len = config->seq_len,
                                     .balance = true,
                                     .fit = true,
                                     .best_of = 1};
    struct srf_calibrate_result result;
    float *params;
    SRF_TRY(SRF_ALLOC(params, ck->table.total));
    memcpy(params, ck->params, (size_t)ck->table.total * sizeof *params);
    *trial = *ck;
    trial->params = params;
    trial->features_w = trial->features_bias = NULL;
    if (!ck->attention.per_head || ck->attention.far_none) return SRF_OK;
    return srf_calibrate(ctx, trial, tokens, &c, &result);
}

static void free_trial(struct srf_checkpoint *trial)
{
    srf__free(trial->params);
    srf__free(trial->features_w);
    srf__free(trial->features_bias);
}

/* Sum over the heads of each layer of the squared error with this window in all layers. */
static srf_status measure_errors(struct srf_ctx *ctx, const struct srf_checkpoint *trial,
                                 const int32_t *tokens,
                                 const struct srf_plan_windows_config *config, int64_t window,
                                 double *error)
{
    struct srf_validate_result r;
    struct srf_validate_config c = {.attention = trial->attention,
                                    .m = &trial->attention.m,
                                    .n_m = 1,
                                    .main_m = trial->attention.m,
                                    .windows = config->windows,
                                    .seq_len = config->seq_len,
                                    .n_draws = 1,
                                    .errors_only = true};
    c.attention.window = window;
    SRF_TRY(srf_validate_attention(ctx, trial, tokens, &c, &r));
    for (int64_t l = 0; l < r.n_layers; l++) {
        error[l] = 0;
        for (int64_t h = 0; h < r.n_heads; h++)
            error[l] += r.error_own[l * r.n_heads + h] * r.error_own[l * r.n_heads + h];
    }
    srf_validate_result_free(&r);
    return SRF_OK;
}

/* KL of the predictions with this window in one layer (-1: in none) and all else exact: in a window
 * as long as the text, a multiple of 64, which kernels like. */
static srf_status measure_kl(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                             const struct srf_checkpoint *trial, const int32_t *tokens,
                             const struct srf_plan_windows_config *config, int64_t layer,
                             int64_t window, double *kl)
{
    struct srf_attention_config a = trial->attention;
    struct srf_validate_place places[SRF_VALIDATE_PLACES];
    int64_t len = config->seq_len, most = MOST_LOGITS / (len * ck->config.vocab), n = 0;
    most = most < 1 ? 1 : most;
    a.window = (len + 63) / 64 * 64;
    a.n_windows = ck->config.n_layers;
    for (int64_t l = 0; l < a.n_windows; l++)
        a.windows[l] = (int32_t)(l == layer ? window : a.window);
    struct srf_validate_pair pair = {.teacher = ck,
                                     .student = trial,
                                     .attention = &a,
                                     .tokens = tokens,
                                     .windows = most < config->windows ? most : config->windows,
                                     .seq_len = len};
    SRF_TRY(srf_validate_positions(ctx, &pair, places));
    *kl = 0;
    for (int i = 0; i < SRF_VALIDATE_PLACES; i++) {
        *kl += places[i].kl * (double)places[i].n;
        n += places[i].n;
    }
    *kl /= (double)n;
    return SRF_OK;
}

static void report(const struct srf_plan_windows_config *config, int64_t done, int64_t total)
{
    if (config->progress) config->progress(config->user, done, total);
}

/* loss (n_choices, layers): what each layer's window costs. */
static srf_status measure(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                          const int32_t *tokens, const struct srf_plan_windows_config *config,
                          int64_t n_choices, double *loss)
{
    int64_t n = ck->config.n_layers, one = ck->attention.window, total = n_choices + 1 + n;
    struct srf_checkpoint trial = {0};
    double rounding;
    srf_status st = SRF_OK;
    SRF_TRY_GO(make_trial(ctx, ck, tokens, config, &trial));
    for (int64_t c = 0; c < n_choices; c++) {
        report(config, c, total);
        SRF_TRY_GO(measure_errors(ctx, &trial, tokens, config, halves[c] * one / 2, loss + c * n));
    }
    report(config, n_choices, total);
    /* What rounding alone makes of it, in bf16 more than some layers' windows, is no layer's. */
    SRF_TRY_GO(measure_kl(ctx, ck, &trial, tokens, config, -1, one / 2, &rounding));
    for (int64_t l = 0; l < n; l++) {
        double kl;
        report(config, n_choices + 1 + l, total);
        SRF_TRY_GO(measure_kl(ctx, ck, &trial, tokens, config, l, one / 2, &kl));
        double weight = loss[l] > 0 && !(kl < rounding) ? (kl - rounding) / loss[l] : 0;
        for (int64_t c = 0; c < n_choices; c++) {
            loss[c * n + l] *= weight;
            SRF_FAIL_GO_IF(!isfinite(loss[c * n + l]), SRF_NONFINITE,
                           "windows by layer: attention's error is not finite");
        }
    }
cleanup:
    free_trial(&trial);
    return st;
}

srf_status srf_plan_windows(struct srf_ctx *ctx, struct srf_checkpoint *ck, const int32_t *tokens,
                            const struct srf_plan_windows_config *config,
                            struct srf_plan_windows_result *out)
{
    struct srf_attention_config *a = &ck->attention;
    int64_t n = ck->config.n_layers, one = a->window, n_choices = 2, room, sum = 0;
    SRF_FAIL_IF(a->kind != SRF_ATTN_SRF, SRF_INVALID, "softmax attention has no window to plan");
    SRF_FAIL_IF(a->n_windows || a->n_layer_m || one < 2 || one > 65536 / 3 || n > SRF_LAYERS_MAX,
                SRF_INVALID,
                "a plan of windows starts from one of 2 to %d for all, at most %d layers",
                65536 / 3, SRF_LAYERS_MAX);
    /* A window that leaves nothing to the features would leave them untrained. */
    while (n_choices < CHOICES && halves[n_choices] * one < config->seq_len) n_choices++;
    SRF_TRY(room_of(ck, one, config->state_budget, n_choices, &room));
    double *loss = NULL;
    int *choice = NULL;
    srf_status st = SRF_OK;
    *out = (struct srf_plan_windows_result){0};
    SRF_TRY_GO(SRF_ALLOC(loss, n_choices * n));
    SRF_TRY_GO(SRF_CALLOC(choice, n));
    out->measured = room < n * halves[n_choices - 1];
    for (int64_t l = 0; l < n; l++) choice[l] = (int)n_choices - 1;
    if (out->measured) {
        SRF_TRY_GO(measure(ctx, ck, tokens, config, n_choices, loss));
        SRF_TRY_GO(srf_plan_windows_choose(loss, halves, n_choices, n, room, choice));
    }
    bool same = true;
    a->window = 0;
    for (int64_t l = 0; l < n; l++) {
        a->windows[l] = (int32_t)(halves[choice[l]] * one / 2);
        if (a->windows[l] > a->window) a->window = a->windows[l];
        same = same && choice[l] == choice[0];
        sum += a->windows[l];
        if (!out->measured) continue;
        out->before += loss[n + l];
        out->after += loss[choice[l] * n + l];
    }
    a->n_windows = same ? 0 : n;
    out->state_bytes = state_bytes(ck, sum);
cleanup:
    srf__free(loss);
    srf__free(choice);
    return st;
}
