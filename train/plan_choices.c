/* Windows and features by layer: what there is to choose, and the best choice once the loss of each
 * is known. */
#include "train/plan_internal.h"

#include <math.h>

static const int64_t quarters[SRF__PLAN_M] = {1, 2, 4};

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

struct srf__plan_choices srf__plan_all_choices(const struct srf_checkpoint *ck,
                                               const struct srf_plan_windows_config *config)
{
    const struct srf_attention_config *a = &ck->attention;
    int64_t one = a->window, seq_len = config->seq_len, d = ck->config.c / ck->config.n_heads;
    bool features = config->features && !a->far_none && one < seq_len; /* that see anything */
    struct srf__plan_choices s = {0};
    /* A window that leaves nothing to the features would leave them untrained. */
    for (int64_t halves = 1; halves <= SRF__PLAN_WINDOWS; halves++)
        if (halves <= 2 || halves * one < seq_len) s.window[s.n_windows++] = halves * one / 2;
    /* Kernels on CUDA are fast with multiples of 16. */
    for (int i = 0; i < SRF__PLAN_M; i++)
        if (quarters[i] == 4 || (features && quarters[i] * a->m % 64 == 0))
            s.m[s.n_m++] = quarters[i] * a->m / 4;
    s.given = 2 * s.n_m - 1; /* the second window, the last m */
    s.n = s.n_windows * s.n_m;
    for (int64_t c = 0; c < s.n; c++)
        s.values[c] = srf_attn_state_count(s.m[c % s.n_m], d, s.window[c / s.n_m]);
    return s;
}

int64_t srf__plan_state_bytes(const struct srf_checkpoint *ck, int64_t values)
{
    return ck->config.n_heads * values * 4;
}

srf_status srf__plan_room(const struct srf_checkpoint *ck, const struct srf__plan_choices *s,
                          int64_t budget, int64_t *cost, int64_t *room)
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
    values = budget ? budget / srf__plan_state_bytes(ck, 1) : n * s->values[s->given];
    SRF_FAIL_IF(values < n * least, SRF_INVALID,
                "a state of %lld bytes: %lld layers with %lld features and windows of %lld take "
                "%lld at least",
                (long long)budget, (long long)n, (long long)s->m[0], (long long)s->window[0],
                (long long)srf__plan_state_bytes(ck, n * least));
    values = values < n * most ? values : n * most;
    while (values / unit > MOST_ROOM) unit *= 2;
    for (int64_t c = 0; c < s->n; c++) cost[c] = (s->values[c] + unit - 1) / unit;
    *room = values / unit;
    for (int64_t c = 0; c < s->n; c++) /* rounding must not take the least away */
        if (s->values[c] == least && *room < n * cost[c]) *room = n * cost[c];
    return SRF_OK;
}

void srf__plan_apply(struct srf_attention_config *a, const struct srf__plan_choices *s,
                     const int *choice, int64_t n)
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
