/* Attention of a layer as the model is set (the swap), and the recurrent state of its layers. */
#include "model/model_internal.h"

int64_t srf__model_head_size(const struct srf_model *m)
{
    return m->config.c / m->config.n_heads;
}

static struct srf_attn_shape attn_shape(const struct srf_model *m, int64_t layer,
                                        const struct srf_batch *batch)
{
    return (struct srf_attn_shape){.b = batch->b,
                                   .t = batch->t,
                                   .h = m->config.n_heads,
                                   .d = srf__model_head_size(m),
                                   .m = srf_attention_m(&m->attention, layer),
                                   .n_sets = m->n_sets,
                                   .window = srf_attention_window(&m->attention, layer),
                                   .causal = true};
}

int64_t srf_model_carry_count(const struct srf_model *m)
{
    const struct srf_batch most = {.b = m->plan.b, .t = m->plan.t};
    size_t bytes = 0;
    for (int64_t l = 0; l < m->config.n_layers && m->plan.train; l++) {
        const struct srf_attn_shape s = attn_shape(m, l, &most);
        const size_t own = srf_attn_carry_bytes(m->ctx, &s);
        bytes = own > bytes ? own : bytes;
    }
    return (int64_t)(bytes + 3) / 4;
}

/* Whether a batch of this shape has room for it: a smaller one may want more, being cut finer. */
static bool carries(const struct srf_model *m, const struct srf_attn_shape *s)
{
    const size_t bytes = srf_attn_carry_bytes(m->ctx, s);
    return bytes > 0 && bytes <= 4 * (size_t)srf_model_carry_count(m);
}

/* Where layer l's features are in W. */
static int64_t features_place(const struct srf_model *m, int64_t layer)
{
    return srf__model_rows_before(m, layer) *
           srf_attention_columns(&m->attention, srf__model_head_size(m));
}

static const void *features(const struct srf_model *m, int64_t layer)
{
    return srf__model_at(m, m->slot_w, features_place(m, layer));
}

static const void *features_bias(const struct srf_model *m, int64_t layer)
{
    return srf__model_acc_at(m, m->slot_bias, srf__model_rows_before(m, layer));
}

static int64_t layer_state_count(const struct srf_model *m, int64_t layer)
{
    const struct srf_attention_config *a = &m->attention;
    return m->config.n_heads * srf_attn_state_count(srf_attention_m(a, layer),
                                                    srf__model_head_size(m),
                                                    srf_attention_window(a, layer));
}

int64_t srf_model_layer_state_bytes(const struct srf_model *m, int64_t layer, bool bf16)
{
    int64_t size = (int64_t)srf_dtype_bytes(srf_ctx_acc(m->ctx));
    if (!bf16) return layer_state_count(m, layer) * size;
    const struct srf_attention_config *a = &m->attention;
    return m->config.n_heads * srf_attn_state_bf16_bytes(srf_attention_m(a, layer),
                                                         srf__model_head_size(m),
                                                         srf_attention_window(a, layer));
}

int64_t srf_model_state_place(const struct srf_model *m, int64_t layer, int64_t slot,
                              int64_t n_slots, bool bf16)
{
    int64_t at = slot * srf_model_layer_state_bytes(m, layer, bf16);
    for (int64_t l = 0; l < layer; l++) at += n_slots * srf_model_layer_state_bytes(m, l, bf16);
    return at;
}

/* Layer l's piece of a batch's recurrent state. */
static void *layer_state(const struct srf_model *m, int64_t layer, const struct srf_batch *batch)
{
    if (!batch->state) return NULL;
    int64_t slots = batch->n_slots ? batch->n_slots : batch->b;
    return (char *)batch->state + srf_model_state_place(m, layer, 0, slots, batch->state_bf16);
}

/* Of softmax attention; whatever SRF attention's window is, softmax itself has none. */
static int64_t softmax_window(const struct srf_attention_config *a)
{
    return a->kind == SRF_ATTN_WINDOW ? a->window : 0;
}

static int64_t softmax_sinks(const struct srf_attention_config *a)
{
    return a->kind == SRF_ATTN_WINDOW ? a->sinks : 0;
}

static enum srf_map_kind map_kind(const struct srf_attention_config *a)
{
    return a->kind == SRF_ATTN_T2R ? SRF_MAP_T2R : SRF_MAP_HEDGEHOG;
}

srf_status srf_model_attend(struct srf_model *m, int64_t layer, const struct srf_batch *batch,
                            const void *q, const void *k, const void *v, int64_t ld, void *o,
                            int64_t ld_o, void *stat, void *carry)
{
    struct srf_attn_shape s = attn_shape(m, layer, batch);
    const void *w = features(m, layer), *bias = features_bias(m, layer);
    const struct srf_attention_config *a = &m->attention;
    SRF_FAIL_IF(a->kind != SRF_ATTN_SRF && batch->mode != SRF_MODE_PARALLEL, SRF_UNSUPPORTED,
                "%s attention has no recurrent form: retrofit the model with srf first",
                srf_attention_kind_name(a->kind));
    if (srf_attention_has_map(a))
        return SRF_RUN(m->ctx, map_attn_fwd, .s = s, .map = map_kind(a), .q = q, .k = k, .v = v,
                       .ld = ld, .w = w, .o = o, .ld_o = ld_o, .stat = stat);
    if (a->kind != SRF_ATTN_SRF)
        return SRF_RUN(m->ctx, softmax_attn_fwd, .b = s.b, .t = s.t, .h = s.h, .d = s.d,
                       .causal = true, .window = softmax_window(a), .sinks = softmax_sinks(a),
                       .q = q, .k = k, .v = v, .ld = ld, .o = o, .ld_o = ld_o, .lse = stat);
    void *state = layer_state(m, layer, batch);
    const int32_t *pos = srf_arena_ptr(m->arena, m->slot_seq), *slots = pos + batch->b,
                  *offsets = slots + batch->b;
    switch (batch->mode) {
    case SRF_MODE_PREFILL:
        return SRF_RUN(m->ctx, srf_attn_prefill, .s = s, .q = q, .k = k, .v = v, .ld = ld, .w = w,
                       .bias = bias, .o = o, .ld_o = ld_o, .state = state, .pos = pos,
                       .slots = batch->slots ? slots : NULL,
                       .offsets = batch->lens ? offsets : NULL, .rows = srf_batch_rows(batch),
                       .state_bf16 = batch->state_bf16);
    case SRF_MODE_STEP:
        return SRF_RUN(m->ctx, srf_attn_step, .s = s, .q = q, .k = k, .v = v, .ld = ld, .w = w,
                       .bias = bias, .o = o, .ld_o = ld_o, .state = state,
                       .pos = srf_arena_ptr(m->arena, m->slot_pos),
                       .state_bf16 = batch->state_bf16);
    case SRF_MODE_PARALLEL:
        break;
    }
    return SRF_RUN(m->ctx, srf_attn_fwd, .s = s, .q = q, .k = k, .v = v, .ld = ld, .w = w,
                   .bias = bias, .o = o, .ld_o = ld_o, .stat = stat,
                   .carry = carries(m, &s) ? carry : NULL);
}

srf_status srf_model_attend_bwd(struct srf_model *m, int64_t layer, const struct srf_batch *batch,
                                const void *q, const void *k, const void *v, int64_t ld,
                                const void *o, const void *d_o, int64_t ld_o, const void *stat,
                                const void *carry, void *dq, void *dk, void *dv)
{
    struct srf_attn_shape s = attn_shape(m, layer, batch);
    const struct srf_attention_config *a = &m->attention;
    if (!srf_attention_has_features(a))
        return SRF_RUN(m->ctx, softmax_attn_bwd, .b = s.b, .t = s.t, .h = s.h, .d = s.d,
                       .causal = true, .window = softmax_window(a), .sinks = softmax_sinks(a),
                       .q = q, .k = k, .v = v, .ld = ld, .o = o, .d_o = d_o, .ld_o = ld_o,
                       .lse = stat, .dq = dq, .dk = dk, .dv = dv);
    void *dw =
        m->features_trained ? srf__model_acc_at(m, m->slot_dw, features_place(m, layer)) : NULL;
    if (srf_attention_has_map(a))
        return SRF_RUN(m->ctx, map_attn_bwd, .s = s, .map = map_kind(a), .q = q, .k = k, .v = v,
                       .ld = ld, .w = features(m, layer), .o = o, .d_o = d_o, .ld_o = ld_o,
                       .stat = stat, .dq = dq, .dk = dk, .dv = dv, .dw = dw);
    return SRF_RUN(m->ctx, srf_attn_bwd, .s = s, .q = q, .k = k, .v = v, .ld = ld,
                   .w = features(m, layer), .bias = features_bias(m, layer), .o = o, .d_o = d_o,
                   .ld_o = ld_o, .stat = stat, .dq = dq, .dk = dk, .dv = dv, .dw = dw,
                   .carry = carries(m, &s) ? carry : NULL);
}

int64_t srf_model_state_count(const struct srf_model *m)
{
    int64_t n = 0;
    for (int64_t l = 0; l < m->config.n_layers; l++) n += layer_state_count(m, l);
    return n;
}

int64_t srf_model_state_bytes(const struct srf_model *m, bool bf16)
{
    int64_t n = 0;
    for (int64_t l = 0; l < m->config.n_layers; l++) n += srf_model_layer_state_bytes(m, l, bf16);
    return n;
}

const void *srf_model_qkv(const struct srf_model *m, int64_t layer)
{
    return m->config.arch->qkv(m, layer);
}

const void *srf_model_attention_out(const struct srf_model *m, int64_t layer)
{
    return m->config.arch->attention_out(m, layer);
}
