/* A model's parameters and features: where they are, host <-> device, draws. */
#include "model/model_internal.h"

#include <math.h>
#include <string.h>

#define PTR(slot) srf_arena_ptr(m->arena, (slot))

int64_t srf__model_rows_before(const struct srf_model *m, int64_t layer)
{
    return m->n_sets * srf_attention_m_before(&m->attention, layer);
}

int64_t srf__model_bias_count(const struct srf_model *m)
{
    return srf__model_rows_before(m, m->config.n_layers);
}

int64_t srf__model_features_count(const struct srf_model *m)
{
    return srf__model_bias_count(m) * srf_attention_columns(&m->attention, srf__model_head_size(m));
}

/* ---- which are trained ----------------------------------------------------------------------- */

static bool row_is_trained(const struct srf_model *m, const struct srf_tensor *row)
{
    if (!m->plan.train) return false;
    switch (m->plan.trained) {
    case SRF_TRAINED_ATTENTION:
        return row->attention;
    case SRF_TRAINED_PROJECTIONS:
        return row->attention && row->ndim == 2;
    case SRF_TRAINED_ALL:
        break;
    }
    return true;
}

srf_status srf__model_place_trained(struct srf_model *m)
{
    SRF_TRY(SRF_ALLOC(m->trained_at, m->table.n));
    m->n_trained = 0;
    for (int64_t i = 0; i < m->table.n; i++) {
        bool trained = row_is_trained(m, &m->table.rows[i]);
        m->trained_at[i] = trained ? m->n_trained : -1;
        if (trained) m->n_trained += srf_model_rows_count(m, i, i + 1);
    }
    return SRF_OK;
}

int64_t srf__model_unread_count(const struct srf_model *m)
{
    return (m->config.c + 63) / 64 * 64;
}

bool srf__model_has_masters(const struct srf_model *m)
{
    return m->plan.train && m->ctx->dtype == SRF_BF16 && m->plan.trained != SRF_TRAINED_PROJECTIONS;
}

/* ---- where they are -------------------------------------------------------------------------- */

void *srf__model_at(const struct srf_model *m, int slot, int64_t offset)
{
    return (char *)PTR(slot) + (size_t)offset * srf_dtype_bytes(m->ctx->dtype);
}

void *srf__model_acc_at(const struct srf_model *m, int slot, int64_t offset)
{
    return (char *)PTR(slot) + (size_t)offset * srf_dtype_bytes(srf_ctx_acc(m->ctx));
}

void *srf_model_param(const struct srf_model *m, int64_t row)
{
    return srf__model_at(m, m->slot_params, m->table.rows[row].offset);
}

void *srf_model_grad(const struct srf_model *m, int64_t row)
{
    int64_t at = m->trained_at[row];
    return at < 0 ? NULL : srf__model_acc_at(m, m->slot_grads, at);
}

void *srf__model_norm_grad(const struct srf_model *m, int64_t weight_row, bool bias)
{
    void *grad = srf_model_grad(m, weight_row + bias);
    if (grad) return grad;
    return srf__model_acc_at(m, m->slot_grads,
                             m->n_trained + (bias ? srf__model_unread_count(m) : 0));
}

void *srf_model_master(const struct srf_model *m, int64_t row)
{
    int64_t at = m->trained_at[row];
    return srf__model_has_masters(m) && at >= 0 ? srf__model_acc_at(m, m->slot_master, at) : NULL;
}

bool srf_model_trained_rows(const struct srf_model *m, int64_t *first, int64_t *end)
{
    while (*first < m->table.n && m->trained_at[*first] < 0) ++*first;
    for (*end = *first; *end < m->table.n && m->trained_at[*end] >= 0;) ++*end;
    return *first < m->table.n;
}

int64_t srf_model_rows_count(const struct srf_model *m, int64_t first, int64_t end)
{
    const struct srf_tensor_table *t = &m->table;
    return (end < t->n ? t->rows[end].offset : t->total) - t->rows[first].offset;
}

void *srf_model_features_master(const struct srf_model *m)
{
    bool has = m->plan.train && m->ctx->dtype == SRF_BF16 && m->plan.train_features;
    return has ? PTR(m->slot_w_master) : NULL;
}

/* What a download cannot have from the device unrounded. */
static srf_status keep_uploaded(struct srf_model *m, const float *params)
{
    if (!m->plan.train || m->ctx->dtype != SRF_BF16 || m->plan.trained == SRF_TRAINED_ALL)
        return SRF_OK;
    if (!m->uploaded) SRF_TRY(SRF_ALLOC(m->uploaded, m->table.total));
    memcpy(m->uploaded, params, (size_t)m->table.total * sizeof *params);
    return SRF_OK;
}

srf_status srf_model_upload(struct srf_model *m, const struct srf_checkpoint *ck)
{
    struct srf_ctx *ctx = m->ctx;
    SRF_FAIL_IF(ck->table.total != m->table.total, SRF_MISMATCH,
                "checkpoint of %lld parameters for a model of %lld", (long long)ck->table.total,
                (long long)m->table.total);
    enum srf_dtype acc = srf_ctx_acc(ctx);
    void *w_master = srf_model_features_master(m);
    SRF_TRY(srf_upload_f32(ctx, PTR(m->slot_params), ctx->dtype, ck->params, m->table.total));
    for (int64_t row = 0, end; srf__model_has_masters(m) && srf_model_trained_rows(m, &row, &end);
         row = end)
        SRF_TRY(srf_upload_f32(ctx, srf_model_master(m, row), acc,
                               ck->params + m->table.rows[row].offset,
                               srf_model_rows_count(m, row, end)));
    SRF_TRY(keep_uploaded(m, ck->params));
    bool same = ck->features_w && srf_attention_same_features(&ck->attention, &m->attention);
    if (!same) return srf_model_draw(m);
    int64_t count = srf__model_features_count(m);
    SRF_TRY(srf_upload_f32(ctx, PTR(m->slot_w), ctx->dtype, ck->features_w, count));
    if (w_master) SRF_TRY(srf_upload_f32(ctx, w_master, acc, ck->features_w, count));
    m->w_stale = false;
    return srf_upload_f32(ctx, PTR(m->slot_bias), acc, ck->features_bias, srf__model_bias_count(m));
}

/* As they are trained, or as they were uploaded; what has neither is as exact as the device. */
static srf_status download_params(const struct srf_model *m, float *out)
{
    struct srf_ctx *ctx = m->ctx;
    bool masters = srf__model_has_masters(m);
    if (!m->uploaded && !masters)
        return srf_download_f32(ctx, out, PTR(m->slot_params), ctx->dtype, m->table.total);
    if (m->uploaded) memcpy(out, m->uploaded, (size_t)m->table.total * sizeof *out);
    for (int64_t row = 0, end; srf_model_trained_rows(m, &row, &end); row = end)
        SRF_TRY(srf_download_f32(ctx, out + m->table.rows[row].offset,
                                 masters ? srf_model_master(m, row) : srf_model_param(m, row),
                                 masters ? srf_ctx_acc(ctx) : ctx->dtype,
                                 srf_model_rows_count(m, row, end)));
    return SRF_OK;
}

srf_status srf_model_download(const struct srf_model *m, struct srf_checkpoint *ck)
{
    struct srf_ctx *ctx = m->ctx;
    enum srf_dtype acc = srf_ctx_acc(ctx);
    void *w_master = m->w_stale ? NULL : srf_model_features_master(m);
    ck->attention = m->attention;
    SRF_TRY(download_params(m, ck->params));
    srf__free(ck->features_w);
    srf__free(ck->features_bias);
    ck->features_w = ck->features_bias = NULL;
    if (!srf_attention_has_features(&m->attention)) return SRF_OK;
    int64_t count = srf__model_features_count(m);
    SRF_TRY(SRF_ALLOC(ck->features_w, count));
    SRF_TRY(SRF_ALLOC(ck->features_bias, srf__model_bias_count(m)));
    SRF_TRY(srf_download_f32(ctx, ck->features_w, w_master ? w_master : PTR(m->slot_w),
                             w_master ? acc : ctx->dtype, count));
    return srf_download_f32(ctx, ck->features_bias, PTR(m->slot_bias), acc,
                            srf__model_bias_count(m));
}

/* Where a trained map begins. Hedgehog: rows of the identity, queries' and keys' alike, as its
 * authors do; T2R: normal rows of unit length on average, no bias. */
static srf_status begin_map(struct srf_model *m)
{
    const struct srf_attention_config *a = &m->attention;
    int64_t d = srf__model_head_size(m), n = srf__model_features_count(m),
            rows = srf__model_bias_count(m);
    float *w, *bias = NULL;
    SRF_TRY(SRF_CALLOC(w, n));
    srf_status st = SRF_OK;
    SRF_TRY_GO(SRF_CALLOC(bias, rows));
    for (int64_t i = 0; i < rows; i++) {
        int64_t set = i / a->m, row = i % a->m;
        float *own = w + i * (d + 1);
        if (a->kind == SRF_ATTN_HEDGEHOG) {
            own[row % (a->m / 2) % d] = 1;
            continue;
        }
        struct srf_rng rng = srf_rng_at(a->seed, SRF_RNG_INIT, (uint64_t)set, (uint32_t)row, 0);
        for (int64_t j = 0; j < d; j++) own[j] = (float)(srf_rng_normal(&rng) / sqrt((double)d));
    }
    SRF_TRY_GO(srf_upload_f32(m->ctx, PTR(m->slot_w), m->ctx->dtype, w, n));
    SRF_TRY_GO(srf_upload_f32(m->ctx, PTR(m->slot_bias), srf_ctx_acc(m->ctx), bias, rows));
cleanup:
    srf__free(w);
    srf__free(bias);
    return st;
}

/* What the op does not know: numbers of features by layer, and features that weigh nothing. */
static srf_status draw_on_host(struct srf_model *m)
{
    float *w, *bias = NULL;
    SRF_TRY(SRF_ALLOC(w, srf__model_features_count(m)));
    srf_status st = SRF_OK;
    SRF_TRY_GO(SRF_ALLOC(bias, srf__model_bias_count(m)));
    SRF_TRY_GO(srf_attention_draw(&m->attention, m->config.n_layers, m->n_sets,
                                  srf__model_head_size(m), NULL, w, bias));
    SRF_TRY_GO(
        srf_upload_f32(m->ctx, PTR(m->slot_w), m->ctx->dtype, w, srf__model_features_count(m)));
    SRF_TRY_GO(srf_upload_f32(m->ctx, PTR(m->slot_bias), srf_ctx_acc(m->ctx), bias,
                              srf__model_bias_count(m)));
cleanup:
    srf__free(w);
    srf__free(bias);
    return st;
}

static srf_status draw_on_device(struct srf_model *m)
{
    const struct srf_attention_config *a = &m->attention;
    int64_t n = m->config.n_layers * m->n_sets;
    double *oprf = NULL;
    if (a->oprf_a != 0) {
        SRF_TRY(SRF_ALLOC(oprf, n));
        for (int64_t i = 0; i < n; i++) oprf[i] = a->oprf_a;
    }
    srf_status st = SRF_RUN(m->ctx, features_draw, .kind = a->features, .rotation = a->rotation,
                            .normalize_rows = a->normalize_rows, .seed = a->seed, .draw = a->draw,
                            .n_layers = m->config.n_layers, .n_sets = m->n_sets, .m = a->m,
                            .d = srf__model_head_size(m), .oprf_a = oprf, .w = PTR(m->slot_w),
                            .bias = PTR(m->slot_bias));
    srf__free(oprf);
    return st;
}

srf_status srf_model_draw(struct srf_model *m)
{
    const struct srf_attention_config *a = &m->attention;
    m->w_stale = true;
    if (srf_attention_has_map(a)) return m->ctx->plan ? SRF_OK : begin_map(m);
    if (!a->n_layer_m && !a->far_none) return draw_on_device(m);
    return m->ctx->plan ? SRF_OK : draw_on_host(m);
}

srf_status srf_model_train_features(struct srf_model *m, bool on)
{
    void *master = srf_model_features_master(m);
    SRF_FAIL_IF(on && !m->plan.train_features, SRF_INVALID,
                "trained features were not planned for");
    m->features_trained = on;
    if (!on || !master || !m->w_stale) return SRF_OK;
    /* Once after a draw: the masters begin as what was drawn. */
    int64_t count;
    const void *w = srf_model_features(m, &count);
    float *host;
    SRF_TRY(SRF_ALLOC(host, count));
    srf_status st = srf_download_f32(m->ctx, host, w, m->ctx->dtype, count);
    if (st == SRF_OK) st = srf_upload_f32(m->ctx, master, srf_ctx_acc(m->ctx), host, count);
    srf__free(host);
    if (st == SRF_OK) m->w_stale = false;
    return st;
}

void *srf_model_features(const struct srf_model *m, int64_t *count)
{
    *count = srf__model_features_count(m);
    return PTR(m->slot_w);
}

void *srf_model_features_grad(const struct srf_model *m)
{
    return PTR(m->slot_dw);
}

srf_status srf_model_zero_grads(struct srf_model *m)
{
    struct srf_ctx *ctx = m->ctx;
    size_t size = srf_dtype_bytes(srf_ctx_acc(ctx));
    SRF_TRY(ctx->be->zero(ctx, PTR(m->slot_grads), (size_t)m->n_trained * size));
    SRF_TRY(ctx->be->zero(ctx, PTR(m->slot_mse), size));
    if (!m->plan.train_features) return SRF_OK;
    return ctx->be->zero(ctx, PTR(m->slot_dw), (size_t)srf__model_features_count(m) * size);
}
