/* What slots give out and feed, before a step of decoding: see ops.h. Floor: latency. */
#include "kernels/cpu/cpu.h"

size_t SRF_CPU(slots_next_workspace)(const struct srf_ctx *ctx, const struct srf_slots_next_args *a)
{
    (void)ctx;
    (void)a;
    return 0;
}

srf_status SRF_CPU(slots_next)(struct srf_ctx *ctx, const struct srf_slots_next_args *a)
{
    (void)ctx;
    const int32_t *next = a->next;
    int32_t *left = a->left, *at = a->at, *feed = a->feed, *pos = a->pos, *step = a->step;
    uint64_t *streams = a->streams;
    int32_t *out = *step >= 0 && *step < a->n_steps ? (int32_t *)a->out + *step * a->n : NULL;
    for (int64_t i = 0; i < a->n; i++) {
        bool gives = left[i] > 0, finite = next[i] >= 0;
        if (out) out[i] = !gives ? -1 : finite ? next[i] : -2;
        if (gives) left[i] = next[i] == a->stop || !finite ? 0 : left[i] - 1;
        bool feeds = left[i] > 0;
        feed[i] = feeds ? next[i] : 0;
        pos[i] = feeds ? at[i] : -1;
        at[i] += feeds;
        streams[3 * i + 2] += feeds;
    }
    ++*step;
    return SRF_OK;
}
