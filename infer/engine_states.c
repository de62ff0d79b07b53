/* The states of an engine's slots as values: cleared, read, set, forked. In each layer those of all
 * slots lie together. */
#include "infer/engine_internal.h"
#include "kernels/numeric.h"

/* Bytes of a slot's state in a layer, which lie together: on the device, and on the host. */
static size_t layer_bytes(const struct srf_engine *e, int64_t layer)
{
    return (size_t)srf_model_layer_state_bytes(e->model, layer, e->config.state_bf16);
}

static size_t host_layer_bytes(const struct srf_engine *e, int64_t layer)
{
    return (size_t)srf_model_layer_state_bytes(e->model, layer, false);
}

/* A layer's state between the host's values and `stored`, as the device has it, if in bf16. */
static void convert_layer(const struct srf_engine *e, int64_t layer, void *stored, void *values,
                          bool to_host)
{
    const struct srf_model_config *cfg = &e->model->config;
    const struct srf_attention_config *a = &e->model->attention;
    int64_t d = cfg->c / cfg->n_heads, window = srf_attention_window(a, layer);
    int64_t m = srf_attention_m(a, layer), count = srf_attn_state_count(m, d, window);
    int64_t bytes = srf_attn_state_bf16_bytes(m, d, window);
    for (int64_t h = 0; h < cfg->n_heads; h++) {
        char *s = (char *)stored + h * bytes;
        float *v = (float *)values + h * count;
        if (to_host)
            srf_attn_state_from_bf16(m, d, window, s, v);
        else
            srf_attn_state_to_bf16(m, d, window, v, s);
    }
}

static char *state_at(const struct srf_engine *e, int64_t layer, int64_t slot)
{
    return (char *)srf_arena_ptr(e->arena, e->slot_state) +
           srf_model_state_place(e->model, layer, slot, e->config.slots, e->config.state_bf16);
}

srf_status srf__engine_check_slot(const struct srf_engine *e, int64_t slot, bool idle)
{
    SRF_FAIL_IF(slot < 0 || slot >= e->config.slots, SRF_INVALID, "slot %lld: expected 0 to %lld",
                (long long)slot, (long long)e->config.slots - 1);
    SRF_FAIL_IF(idle && e->slots[slot].phase == RUNNING, SRF_INVALID, "slot %lld is running",
                (long long)slot);
    return SRF_OK;
}

/* Neighbouring slots at once. */
srf_status srf__engine_clear(struct srf_engine *e, int64_t n,
                             const struct srf_engine_prompt *prompts)
{
    for (int64_t i = 0, count; i < n; i += count) {
        int64_t first = prompts[i].slot;
        count = 1;
        if (prompts[i].resume) continue;
        while (i + count < n && !prompts[i + count].resume &&
               prompts[i + count].slot == first + count)
            count++;
        for (int64_t k = 0; k < count; k++) e->slots[first + k].at = 0;
        for (int64_t l = 0; l < e->model->config.n_layers; l++)
            SRF_TRY(
                e->ctx->be->zero(e->ctx, state_at(e, l, first), (size_t)count * layer_bytes(e, l)));
    }
    return SRF_OK;
}

srf_status srf_engine_state_get(const struct srf_engine *e, int64_t slot, void *values)
{
    bool convert = e->config.state_bf16;
    char *stored = NULL, *host = values;
    srf_status st = SRF_OK;
    SRF_TRY(srf__engine_check_slot(e, slot, false));
    if (convert) SRF_TRY(SRF_ALLOC(stored, srf_engine_state_bytes(e)));
    for (int64_t l = 0; l < e->model->config.n_layers; host += host_layer_bytes(e, l++)) {
        SRF_TRY_GO(e->ctx->be->download(e->ctx, convert ? stored : host, state_at(e, l, slot),
                                        layer_bytes(e, l)));
        if (convert) convert_layer(e, l, stored, host, true);
    }
cleanup:
    srf__free(stored);
    return st;
}

srf_status srf_engine_state_set(struct srf_engine *e, int64_t slot, const void *values,
                                int64_t position)
{
    bool convert = e->config.state_bf16;
    char *stored = NULL, *host = (char *)values; /* which convert_layer only reads */
    srf_status st = SRF_OK;
    SRF_TRY(srf__engine_check_slot(e, slot, true));
    SRF_FAIL_IF(position < 0 || position > INT32_MAX, SRF_INVALID, "position %lld of a state",
                (long long)position);
    if (convert) SRF_TRY(SRF_ALLOC(stored, srf_engine_state_bytes(e)));
    e->slots[slot] = (struct slot){.phase = IDLE, .at = position};
    for (int64_t l = 0; l < e->model->config.n_layers; host += host_layer_bytes(e, l++)) {
        if (convert) convert_layer(e, l, stored, host, false);
        SRF_TRY_GO(e->ctx->be->upload(e->ctx, state_at(e, l, slot), convert ? stored : host,
                                      layer_bytes(e, l)));
    }
cleanup:
    srf__free(stored);
    return st;
}

srf_status srf_engine_move(struct srf_engine *e, int64_t from, int64_t to)
{
    SRF_TRY(srf__engine_check_slot(e, from, false));
    if (from == to) return SRF_OK;
    struct slot moved = e->slots[from];
    SRF_TRY(srf_engine_fork(e, from, to, 1));
    e->slots[to] = moved;
    e->slots[from] = (struct slot){.phase = IDLE};
    return SRF_OK;
}

srf_status srf_engine_fork(struct srf_engine *e, int64_t from, int64_t to, int64_t n)
{
    SRF_TRY(srf__engine_check_slot(e, from, false));
    for (int64_t i = 0; i < n; i++) SRF_TRY(srf__engine_check_slot(e, to + i, true));
    SRF_FAIL_IF(from >= to && from < to + n, SRF_INVALID, "slot %lld forked into itself",
                (long long)from);
    for (int64_t i = 0; i < n; i++)
        e->slots[to + i] = (struct slot){.phase = IDLE, .at = e->slots[from].at};
    for (int64_t l = 0; l < e->model->config.n_layers && n > 0; l++) {
        char *first = state_at(e, l, to);
        size_t bytes = layer_bytes(e, l);
        SRF_TRY(e->ctx->be->copy(e->ctx, first, state_at(e, l, from), bytes));
        for (int64_t done = 1, count; done < n; done += count) { /* twice as many each time */
            count = n - done < done ? n - done : done;
            SRF_TRY(e->ctx->be->copy(e->ctx, first + (size_t)done * bytes, first,
                                     (size_t)count * bytes));
        }
    }
    return SRF_OK;
}
