#include "train/plan_windows.h"
#include "train/validate.h"

#include <math.h>

enum { CHOICES = 3, DRAWS = 2 };

/* What a choice takes, in halves of the window. */
static const int64_t halves[CHOICES] = {1, 2, 4};

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
                          int64_t *room)
{
    int64_t n = ck->config.n_layers, most = n * halves[CHOICES - 1];
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

/* Sum over the heads of each layer of the squared error with this window. */
static srf_status measure(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                          const int32_t *tokens, const struct srf_plan_windows_config *config,
                          int64_t window, double *error)
{
    struct srf_validate_result r;
    struct srf_validate_config c = {.attention = ck->attention,
                                    .m = &ck->attention.m,
                                    .n_m = 1,
                                    .main_m = ck->attention.m,
                                    .windows = config->windows,
                                    .seq_len = config->seq_len,
                                    .n_draws = DRAWS,
                                    .errors_only = true};
    c.attention.window = window;
    SRF_TRY(srf_validate_attention(ctx, ck, tokens, &c, &r));
    for (int64_t l = 0; l < r.n_layers; l++) {
        error[l] = 0;
        for (int64_t h = 0; h < r.n_heads; h++)
            error[l] += r.error[l * r.n_heads + h] * r.error[l * r.n_heads + h];
    }
    srf_validate_result_free(&r);
    return SRF_OK;
}

srf_status srf_plan_windows(struct srf_ctx *ctx, struct srf_checkpoint *ck, const int32_t *tokens,
                            const struct srf_plan_windows_config *config,
                            struct srf_plan_windows_result *out)
{
    struct srf_attention_config *a = &ck->attention;
    int64_t n = ck->config.n_layers, one = a->window, room, sum = 0;
    SRF_FAIL_IF(a->kind != SRF_ATTN_SRF, SRF_INVALID, "softmax attention has no window to plan");
    SRF_FAIL_IF(a->n_windows || one < 2 || one > 65536 / 2 || n > SRF_WINDOWS_MAX, SRF_INVALID,
                "a plan of windows starts from one of 2 to %d for all, at most %d layers",
                65536 / 2, SRF_WINDOWS_MAX);
    SRF_TRY(room_of(ck, one, config->state_budget, &room));
    double *error = NULL, heads = (double)(n * ck->config.n_heads);
    int *choice = NULL;
    srf_status st = SRF_OK;
    *out = (struct srf_plan_windows_result){0};
    SRF_TRY_GO(SRF_ALLOC(error, CHOICES * n));
    SRF_TRY_GO(SRF_CALLOC(choice, n));
    for (int c = 0; c < CHOICES; c++)
        SRF_TRY_GO(measure(ctx, ck, tokens, config, halves[c] * one / 2, error + c * n));
    for (int64_t i = 0; i < CHOICES * n; i++)
        SRF_FAIL_GO_IF(!isfinite(error[i]), SRF_NONFINITE, "attention's error is not finite");
    SRF_TRY_GO(srf_plan_windows_choose(error, halves, CHOICES, n, room, choice));
    bool same = true;
    a->window = 0;
    for (int64_t l = 0; l < n; l++) {
        a->windows[l] = (int32_t)(halves[choice[l]] * one / 2);
        if (a->windows[l] > a->window) a->window = a->windows[l];
        same = same && choice[l] == choice[0];
        sum += a->windows[l];
        out->before += error[n + l] / heads;
        out->after += error[choice[l] * n + l] / heads;
    }
    a->n_windows = same ? 0 : n;
    out->state_bytes = state_bytes(ck, sum);
cleanup:
    srf__free(error);
    srf__free(choice);
    return st;
}
