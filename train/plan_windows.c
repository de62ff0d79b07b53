#include "train/plan_windows.h"
#include "train/validate.h"

#include <math.h>
#include <stdio.h>

enum { CHOICES = 3, DRAWS = 2 };

/* What a choice takes, in halves of the window. */
static const int64_t halves[CHOICES] = {1, 2, 4};

/* least[l][u]: of the first l layers with u halves in all; by dynamic programming. */
srf_status srf_plan_windows_choose(const double *error, int64_t n, int *choice)
{
    int64_t room = 2 * n, row = room + 1;
    double *least;
    SRF_TRY(SRF_ALLOC(least, (n + 1) * row));
    for (int64_t u = 0; u <= room; u++) least[u] = u == 0 ? 0 : INFINITY;
    for (int64_t l = 0; l < n; l++)
        for (int64_t u = 0; u <= room; u++) {
            double *to = &least[(l + 1) * row + u];
            *to = INFINITY;
            for (int c = 0; c < CHOICES; c++) {
                if (u < halves[c]) continue;
                double sum = least[l * row + u - halves[c]] + error[c * n + l];
                if (sum < *to) *to = sum;
            }
        }
    int64_t used = 0;
    for (int64_t u = 0; u <= room; u++)
        if (least[n * row + u] < least[n * row + used]) used = u;
    for (int64_t l = n - 1; l >= 0; l--)
        for (int c = 0; c < CHOICES; c++) {
            if (used < halves[c] ||
                least[l * row + used - halves[c]] + error[c * n + l] > least[(l + 1) * row + used])
                continue;
            choice[l] = c;
            used -= halves[c];
            break;
        }
    srf__free(least);
    return SRF_OK;
}

/* Sum over the heads of each layer of the squared error with this window. */
static srf_status measure(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                          const int32_t *tokens, int64_t windows, int64_t seq_len, int64_t window,
                          double *error)
{
    struct srf_validate_result r;
    struct srf_validate_config c = {.attention = ck->attention,
                                    .m = &ck->attention.m,
                                    .n_m = 1,
                                    .main_m = ck->attention.m,
                                    .windows = windows,
                                    .seq_len = seq_len,
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
                            int64_t windows, int64_t seq_len, struct srf_plan_windows_result *out)
{
    struct srf_attention_config *a = &ck->attention;
    int64_t n = ck->config.n_layers, one = a->window;
    SRF_FAIL_IF(a->kind != SRF_ATTN_SRF, SRF_INVALID, "softmax attention has no window to plan");
    SRF_FAIL_IF(a->n_windows || one < 2 || one > 65536 / 2 || n > SRF_WINDOWS_MAX, SRF_INVALID,
                "a plan of windows starts from one of 2 to %d for all, at most %d layers",
                65536 / 2, SRF_WINDOWS_MAX);
    double *error = NULL, heads = (double)(n * ck->config.n_heads);
    int *choice = NULL;
    srf_status st = SRF_OK;
    *out = (struct srf_plan_windows_result){0};
    SRF_TRY_GO(SRF_ALLOC(error, CHOICES * n));
    SRF_TRY_GO(SRF_CALLOC(choice, n));
    for (int c = 0; c < CHOICES; c++)
        SRF_TRY_GO(measure(ctx, ck, tokens, windows, seq_len, halves[c] * one / 2, error + c * n));
    for (int64_t i = 0; i < CHOICES * n; i++)
        SRF_FAIL_GO_IF(!isfinite(error[i]), SRF_NONFINITE, "attention's error is not finite");
    SRF_TRY_GO(srf_plan_windows_choose(error, n, choice));
    bool same = true;
    for (int64_t l = 0; l < n; l++) {
        a->windows[l] = (int32_t)(halves[choice[l]] * one / 2);
        if (a->windows[l] > a->window) a->window = a->windows[l];
        same = same && choice[l] == 1;
        out->before += error[n + l] / heads;
        out->after += error[choice[l] * n + l] / heads;
    }
    a->n_windows = same ? 0 : n;
cleanup:
    srf__free(error);
    srf__free(choice);
    return st;
}
