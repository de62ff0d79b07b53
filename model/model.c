#include "model/arch.h"

#include <math.h>
#include <string.h>

#define PTR(slot) srf_arena_ptr(m->arena, (slot))

static int64_t head_size(const struct srf_model *m)
{
    return m->config.c / m->config.n_heads;
}

/* Rows of W before a layer; in all layers, and the elements there. */
static int64_t rows_before(const struct srf_model *m, int64_t layer)
{
    return m->n_sets * srf_attention_m_before(&m->attention, layer);
}

static int64_t bias_count(const struct srf_model *m)
{
    return rows_before(m, m->config.n_layers);
}

static int64_t features_count(const struct srf_model *m)
{
    return bias_count(m) * srf_attention_columns(&m->attention, head_size(m));
}

srf_status srf_model_create(struct srf_ctx *ctx, const struct srf_model_config *config,
                            const struct srf_attention_config *attention, struct srf_model **out)
{
    *out = NULL;
    SRF_TRY(srf_attention_check(attention, config->c / config->n_heads));
    SRF_TRY(srf_attention_check_layers(attention, config->n_layers));
    struct srf_model *m;
    SRF_TRY(SRF_CALLOC(m, 1));
    m->ctx = ctx;
    m->config = *config;
    m->attention = *attention;
    m->n_sets = attention->per_head ? config->n_heads : 1;
    srf_status st = srf_tensor_table_create(config, &m->table);
    if (st != SRF_OK) {
        srf_model_free(m);
        return st;
    }
    *out = m;
    return SRF_OK;
}

void srf_model_free(struct srf_model *m)
{
    if (!m) return;
    srf_tensor_table_free(&m->table);
    srf__free(m->trained_at);
    srf__free(m->uploaded);
    srf__free(m->acts);
    srf__free(m);
}

/* ---- plan ---------------------------------------------------------------------------------- */

int64_t srf_batch_sequence_rows(const struct srf_batch *batch, int64_t i)
{
    return batch->lens ? batch->lens[i] : batch->t;
}

int64_t srf_batch_rows(const struct srf_batch *batch)
{
    if (!batch->lens) return batch->b * batch->t;
    int64_t n = 0;
    for (int64_t i = 0; i < batch->b; i++) n += batch->lens[i];
    return n;
}

int64_t srf_batch_hidden_rows(const struct srf_batch *batch)
{
    bool last = batch->last_only && batch->mode == SRF_MODE_PREFILL;
    return last ? batch->b : srf_batch_rows(batch);
}

/* The calls of a training step or an evaluation on such a batch, planned: nothing is behind the
 * pointers. */
static srf_status plan_batch(struct srf_model *m, const struct srf_batch *batch)
{
    bool train = m->plan.train && batch->mode == SRF_MODE_PARALLEL;
    /* the model itself stands for a teacher: the same sizes */
    struct srf_loss_args loss = {
        .n = srf_batch_rows(batch), .teacher = m->plan.teacher ? m : NULL, .backward = train};
    SRF_TRY(m->config.arch->forward(m, batch));
    SRF_TRY(srf_model_loss(m, &loss));
    if (batch->mode != SRF_MODE_PARALLEL) {
        const struct srf_sample_args sample = {.temperature = 1, .top_p = 1};
        SRF_TRY(srf_model_sample(m, batch, &sample));
    }
    return train ? m->config.arch->backward(m, batch) : SRF_OK;
}

/* The same calls as a real run: finds the workspace. */
static srf_status dry_run(struct srf_model *m)
{
    struct srf_ctx *ctx = m->ctx;
    const struct srf_model_plan *p = &m->plan;
    srf_status st = SRF_OK;
    struct srf_attention_config attention = m->attention;
    m->features_trained = p->train_features;
    m->attention_teacher = p->train && p->teacher ? m : NULL;
    ctx->plan = true;
    ctx->plan_workspace = 0;
    SRF_TRY_GO(srf_model_draw(m));
    /* Softmax as well as SRF, since either may be switched on later. */
    for (int kind = SRF_ATTN_SOFTMAX; kind < SRF_ATTN_KINDS; kind++) {
        if (kind > SRF_ATTN_SRF && kind != (int)attention.kind) continue;
        m->attention.kind = (enum srf_attention_kind)kind;
        for (int mode = SRF_MODE_PARALLEL; mode <= SRF_MODE_STEP; mode++) {
            if (mode != SRF_MODE_PARALLEL && (kind != SRF_ATTN_SRF || p->train)) continue;
            struct srf_batch batch = {
                .b = p->b, .t = mode == SRF_MODE_STEP ? 1 : p->t, .mode = (enum srf_attn_mode)mode};
            ctx->plan_cost = (struct srf_cost){0};
            SRF_TRY_GO(plan_batch(m, &batch));
            if (mode == SRF_MODE_PARALLEL) m->cost[kind] = ctx->plan_cost;
        }
    }
    srf_arena_workspace(m->arena, ctx->plan_workspace);
cleanup:
    ctx->plan = false;
    m->attention = attention;
    m->attention_teacher = NULL;
    m->features_trained = false;
    return st;
}

/* A smaller batch than the largest may take kernels that want more of a workspace. */
static srf_status plan_shape(struct srf_model *m, const struct srf_batch *batch)
{
    struct srf_ctx *ctx = m->ctx;
    struct srf_model_shape shape = {
        batch->b,    batch->t,         srf_batch_rows(batch), srf_batch_hidden_rows(batch),
        batch->mode, m->attention.kind};
    if (memcmp(&shape, &m->shape, sizeof shape) == 0) return SRF_OK;
    ctx->plan = true;
    ctx->plan_workspace = 0;
    srf_status st = plan_batch(m, batch);
    ctx->plan = false;
    SRF_TRY(st);
    SRF_TRY(srf_ctx_reserve_workspace(ctx, ctx->plan_workspace));
    m->shape = shape;
    return SRF_OK;
}

/* Rows of logits held at once. On the CPU about 16 MB of fp32: enough rows for the matrix product,
 * few enough to stay near the cache. Elsewhere about 550 MB, in pieces of one size: 32768 rows of
 * GPT-2's vocabulary are then 6 pieces, whose gradient makes as many tiles as an H100 works on at
 * once (kernels/lab/step_cuda.md). */
static int64_t choose_logit_rows(const struct srf_model *m, int64_t n)
{
    const struct srf_model_config *cfg = &m->config;
    int64_t rows = m->plan.logit_rows;
    if (!rows && strcmp(m->ctx->be->name, "cpu") == 0) {
        rows = (4 << 20) / cfg->vocab;
    } else if (!rows) {
        rows = (544 << 20) / (srf_padded_vocab(cfg) * (int64_t)srf_dtype_bytes(m->ctx->dtype));
        int64_t pieces = rows > 0 ? (n + rows - 1) / rows : n;
        rows = ((n + pieces - 1) / pieces + 127) / 128 * 128;
    }
    rows = rows < 16 ? 16 : rows;
    return rows < n ? rows : n;
}

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

/* trained_at and n_trained */
static srf_status place_trained(struct srf_model *m)
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

/* Of the gradients that srf__model_norm_grad has no other place for: a weight's or a bias's. */
static int64_t unread_count(const struct srf_model *m)
{
    return (m->config.c + 63) / 64 * 64;
}

static bool has_masters(const struct srf_model *m)
{
    return m->plan.train && m->ctx->dtype == SRF_BF16 && m->plan.trained != SRF_TRAINED_PROJECTIONS;
}

srf_status srf_model_plan(struct srf_model *m, struct srf_arena *arena,
                          const struct srf_model_plan *plan)
{
    const struct srf_model_config *cfg = &m->config;
    enum srf_dtype type = m->ctx->dtype, acc = srf_ctx_acc(m->ctx);
    SRF_FAIL_IF(plan->b < 1 || plan->t < 1 || plan->b > INT32_MAX / plan->t, SRF_INVALID,
                "batch of %lld sequences of %lld tokens: expected 1 to 2^31 tokens",
                (long long)plan->b, (long long)plan->t);
    m->arena = arena;
    m->plan = *plan;
    int64_t n = plan->b * plan->t, c = cfg->c;
    m->logit_rows = choose_logit_rows(m, n);
    m->loss_rows = plan->loss_rows > n ? plan->loss_rows : n;
    int64_t count_w = features_count(m);
    int64_t count_logits = m->logit_rows * srf_padded_vocab(cfg);
    int64_t scratch = plan->train ? cfg->arch->backward_scratch(m) : 0;
    bool w_masters = plan->train_features && plan->train && type == SRF_BF16;
    SRF_TRY(place_trained(m));
    int64_t unread = plan->trained == SRF_TRAINED_ALL ? 0 : 2 * unread_count(m);
    const struct {
        const char *cls, *name;
        bool wanted;
        int64_t count;
        enum srf_dtype type;
        int *slot;
    } slots[] = {
        {"weights", "parameters", true, m->table.total, type, &m->slot_params},
        {"masters", "parameters", has_masters(m), m->n_trained, acc, &m->slot_master},
        {"gradients", "parameters", plan->train, m->n_trained + unread, acc, &m->slot_grads},
        {"features", "w", true, count_w, type, &m->slot_w},
        {"masters", "features", w_masters, count_w, acc, &m->slot_w_master},
        {"features", "bias", true, bias_count(m), acc, &m->slot_bias},
        {"gradients", "features", plan->train_features, count_w, acc, &m->slot_dw},
        {"activations", "hidden", true, n * c, type, &m->slot_hidden},
        {"activations", "d hidden", plan->train, n * c, type, &m->slot_d_hidden},
        {"activations", "tokens", true, n, SRF_I32, &m->slot_tokens},
        {"activations", "positions", true, n, SRF_I32, &m->slot_pos},
        {"activations", "sequences", true, 3 * n + 1, SRF_I32, &m->slot_seq},
        {"activations", "targets", true, n, SRF_I32, &m->slot_targets},
        {"logits", "logits", true, count_logits > scratch ? count_logits : scratch, type,
         &m->slot_logits},
        {"logits", "teacher logits", plan->teacher, count_logits, type, &m->slot_teacher_logits},
        {"activations", "nll", true, m->loss_rows, acc, &m->slot_nll},
        {"activations", "kl", plan->teacher, m->loss_rows, acc, &m->slot_kl},
        {"activations", "mse", true, 1, acc, &m->slot_mse},
    };
    for (size_t i = 0; i < sizeof slots / sizeof *slots; i++)
        if (slots[i].wanted)
            SRF_TRY(srf_arena_add(arena, slots[i].cls, slots[i].name, slots[i].count, slots[i].type,
                                  slots[i].slot));
    SRF_TRY(cfg->arch->plan(m));
    return dry_run(m);
}

/* ---- parameters ---------------------------------------------------------------------------- */

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
    return srf__model_acc_at(m, m->slot_grads, m->n_trained + (bias ? unread_count(m) : 0));
}

void *srf_model_master(const struct srf_model *m, int64_t row)
{
    int64_t at = m->trained_at[row];
    return has_masters(m) && at >= 0 ? srf__model_acc_at(m, m->slot_master, at) : NULL;
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
    for (int64_t row = 0, end; has_masters(m) && srf_model_trained_rows(m, &row, &end); row = end)
        SRF_TRY(srf_upload_f32(ctx, srf_model_master(m, row), acc,
                               ck->params + m->table.rows[row].offset,
                               srf_model_rows_count(m, row, end)));
    SRF_TRY(keep_uploaded(m, ck->params));
    bool same = ck->features_w && srf_attention_same_features(&ck->attention, &m->attention);
    if (!same) return srf_model_draw(m);
    int64_t count = features_count(m);
    SRF_TRY(srf_upload_f32(ctx, PTR(m->slot_w), ctx->dtype, ck->features_w, count));
    if (w_master) SRF_TRY(srf_upload_f32(ctx, w_master, acc, ck->features_w, count));
    m->w_stale = false;
    return srf_upload_f32(ctx, PTR(m->slot_bias), acc, ck->features_bias, bias_count(m));
}

/* As they are trained, or as they were uploaded; what has neither is as exact as the device. */
static srf_status download_params(const struct srf_model *m, float *out)
{
    struct srf_ctx *ctx = m->ctx;
    bool masters = has_masters(m);
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
    int64_t count = features_count(m);
    SRF_TRY(SRF_ALLOC(ck->features_w, count));
    SRF_TRY(SRF_ALLOC(ck->features_bias, bias_count(m)));
    SRF_TRY(srf_download_f32(ctx, ck->features_w, w_master ? w_master : PTR(m->slot_w),
                             w_master ? acc : ctx->dtype, count));
    return srf_download_f32(ctx, ck->features_bias, PTR(m->slot_bias), acc, bias_count(m));
}

/* Without a far part: features as they are, of a weight that is 0 beside any exact one. */
static srf_status silence_features(struct srf_model *m)
{
    int64_t n = bias_count(m);
    float *bias;
    SRF_TRY(SRF_ALLOC(bias, n));
    for (int64_t i = 0; i < n; i++) bias[i] = -1e4f;
    srf_status st = srf_upload_f32(m->ctx, PTR(m->slot_bias), srf_ctx_acc(m->ctx), bias, n);
    srf__free(bias);
    return st;
}

/* Where a trained map begins. Hedgehog: rows of the identity, queries' and keys' alike, as its
 * authors do; T2R: normal rows of unit length on average, no bias. */
static srf_status begin_map(struct srf_model *m)
{
    const struct srf_attention_config *a = &m->attention;
    int64_t d = head_size(m), n = features_count(m), rows = bias_count(m);
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

/* Where layers have numbers of features of their own: the op knows one number for all. */
static srf_status draw_on_host(struct srf_model *m)
{
    float *w, *bias = NULL;
    SRF_TRY(SRF_ALLOC(w, features_count(m)));
    srf_status st = SRF_OK;
    SRF_TRY_GO(SRF_ALLOC(bias, bias_count(m)));
    SRF_TRY_GO(srf_attention_draw(&m->attention, m->config.n_layers, m->n_sets, head_size(m), NULL,
                                  w, bias));
    SRF_TRY_GO(srf_upload_f32(m->ctx, PTR(m->slot_w), m->ctx->dtype, w, features_count(m)));
    SRF_TRY_GO(srf_upload_f32(m->ctx, PTR(m->slot_bias), srf_ctx_acc(m->ctx), bias, bias_count(m)));
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
    srf_status st =
        SRF_RUN(m->ctx, features_draw, .kind = a->features, .rotation = a->rotation,
                .normalize_rows = a->normalize_rows, .seed = a->seed, .draw = a->draw,
                .n_layers = m->config.n_layers, .n_sets = m->n_sets, .m = a->m, .d = head_size(m),
                .oprf_a = oprf, .w = PTR(m->slot_w), .bias = PTR(m->slot_bias));
    srf__free(oprf);
    return st;
}

srf_status srf_model_draw(struct srf_model *m)
{
    const struct srf_attention_config *a = &m->attention;
    m->w_stale = true;
    if (srf_attention_has_map(a)) return m->ctx->plan ? SRF_OK : begin_map(m);
    if (!a->n_layer_m)
        SRF_TRY(draw_on_device(m));
    else if (!m->ctx->plan)
        SRF_TRY(draw_on_host(m));
    return a->far_none && !m->ctx->plan ? silence_features(m) : SRF_OK;
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
    *count = features_count(m);
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
    return ctx->be->zero(ctx, PTR(m->slot_dw), (size_t)features_count(m) * size);
}

/* ---- attention: the swap ------------------------------------------------------------------- */

static struct srf_attn_shape attn_shape(const struct srf_model *m, int64_t layer,
                                        const struct srf_batch *batch)
{
    return (struct srf_attn_shape){.b = batch->b,
                                   .t = batch->t,
                                   .h = m->config.n_heads,
                                   .d = head_size(m),
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
    return rows_before(m, layer) * srf_attention_columns(&m->attention, head_size(m));
}

static const void *features(const struct srf_model *m, int64_t layer)
{
    return srf__model_at(m, m->slot_w, features_place(m, layer));
}

static const void *features_bias(const struct srf_model *m, int64_t layer)
{
    return srf__model_acc_at(m, m->slot_bias, rows_before(m, layer));
}

int64_t srf_model_layer_state_count(const struct srf_model *m, int64_t layer)
{
    const struct srf_attention_config *a = &m->attention;
    return m->config.n_heads * srf_attn_state_count(srf_attention_m(a, layer), head_size(m),
                                                    srf_attention_window(a, layer));
}

int64_t srf_model_layer_state_bytes(const struct srf_model *m, int64_t layer, bool bf16)
{
    int64_t size = (int64_t)srf_dtype_bytes(srf_ctx_acc(m->ctx));
    if (!bf16) return srf_model_layer_state_count(m, layer) * size;
    const struct srf_attention_config *a = &m->attention;
    return m->config.n_heads * srf_attn_state_bf16_bytes(srf_attention_m(a, layer), head_size(m),
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
    const int32_t *pos = PTR(m->slot_seq), *slots = pos + batch->b, *offsets = slots + batch->b;
    switch (batch->mode) {
    case SRF_MODE_PREFILL:
        return SRF_RUN(m->ctx, srf_attn_prefill, .s = s, .q = q, .k = k, .v = v, .ld = ld, .w = w,
                       .bias = bias, .o = o, .ld_o = ld_o, .state = state, .pos = pos,
                       .slots = batch->slots ? slots : NULL,
                       .offsets = batch->lens ? offsets : NULL, .rows = srf_batch_rows(batch),
                       .state_bf16 = batch->state_bf16);
    case SRF_MODE_STEP:
        return SRF_RUN(m->ctx, srf_attn_step, .s = s, .q = q, .k = k, .v = v, .ld = ld, .w = w,
                       .bias = bias, .o = o, .ld_o = ld_o, .state = state, .pos = PTR(m->slot_pos),
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
    for (int64_t l = 0; l < m->config.n_layers; l++) n += srf_model_layer_state_count(m, l);
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

/* ---- running ------------------------------------------------------------------------------- */

static srf_status check_batch(const struct srf_model *m, const struct srf_batch *batch)
{
    const struct srf_model_config *cfg = &m->config;
    bool parallel = batch->mode == SRF_MODE_PARALLEL, prefill = batch->mode == SRF_MODE_PREFILL;
    int64_t slots = batch->n_slots ? batch->n_slots : batch->b;
    SRF_FAIL_IF((batch->lens || batch->slots) && !prefill, SRF_INVALID,
                "only a prefill takes lengths and slots");
    SRF_FAIL_IF(batch->on_device && prefill, SRF_INVALID,
                "a prefill does not find its tokens on the device");
    for (int64_t i = 0; i < batch->b && batch->lens; i++)
        SRF_FAIL_IF(batch->lens[i] < 1 || batch->lens[i] > batch->t, SRF_INVALID,
                    "sequence %lld has %d tokens: expected 1 to %lld", (long long)i, batch->lens[i],
                    (long long)batch->t);
    for (int64_t i = 0; i < batch->b && batch->slots; i++)
        SRF_FAIL_IF(batch->slots[i] < 0 || batch->slots[i] >= slots, SRF_INVALID,
                    "sequence %lld has slot %d: expected 0 to %lld", (long long)i, batch->slots[i],
                    (long long)slots - 1);
    int64_t n = srf_batch_rows(batch);
    SRF_FAIL_IF(n > m->plan.b * m->plan.t || batch->b > m->plan.b * m->plan.t, SRF_INVALID,
                "batch of %lld sequences, %lld tokens in all: %lld x %lld were planned",
                (long long)batch->b, (long long)n, (long long)m->plan.b, (long long)m->plan.t);
    if (batch->on_device) return SRF_OK;
    bool outside = false; /* of many: looked for in vectors, named afterwards */
    for (int64_t i = 0; i < n; i++) outside |= (uint32_t)batch->tokens[i] >= (uint32_t)cfg->vocab;
    for (int64_t i = 0; i < n && outside; i++)
        SRF_FAIL_IF(batch->tokens[i] < 0 || batch->tokens[i] >= cfg->vocab, SRF_MISMATCH,
                    "token id %d: the model's vocabulary has %lld", batch->tokens[i],
                    (long long)cfg->vocab);
    int64_t most = m->positions == SRF_POS_ERROR ? cfg->n_pos : INT32_MAX;
    for (int64_t i = 0; i < (parallel ? 1 : batch->b); i++) {
        int64_t end = (parallel ? 0 : batch->pos[i]) + srf_batch_sequence_rows(batch, i);
        SRF_FAIL_IF(end > most, SRF_INVALID,
                    "position %lld: the model's learned positions end at %lld", (long long)end,
                    (long long)most);
    }
    return SRF_OK;
}

/* What a recurrent batch's rows and sequences are, in one upload each: embedding and a step want a
 * position for each token; a prefill's attention (b) positions, (b) slots, (b + 1) first rows. */
static srf_status upload_sequences(struct srf_model *m, const struct srf_batch *batch)
{
    struct srf_ctx *ctx = m->ctx;
    int64_t n = srf_batch_rows(batch), b = batch->b, row = 0;
    int32_t *pos;
    SRF_TRY(SRF_ALLOC(pos, n + 3 * b + 1));
    int32_t *seq = pos + n;
    seq[2 * b] = 0;
    for (int64_t i = 0; i < b; i++) {
        int32_t first = batch->pos[i], *own = pos + row;
        int32_t rows = (int32_t)srf_batch_sequence_rows(batch, i);
        seq[i] = first;
        seq[b + i] = batch->slots ? batch->slots[i] : (int32_t)i;
        for (int32_t j = 0; j < rows; j++) own[j] = first + j;
        row += rows;
        seq[2 * b + i + 1] = (int32_t)row;
    }
    srf_status st = ctx->be->upload(ctx, PTR(m->slot_pos), pos, (size_t)n * sizeof *pos);
    if (st == SRF_OK && batch->mode == SRF_MODE_PREFILL)
        st = ctx->be->upload(ctx, PTR(m->slot_seq), seq, (size_t)(3 * b + 1) * sizeof *seq);
    srf__free(pos);
    return st;
}

srf_status srf_model_load(struct srf_model *m, const struct srf_batch *batch,
                          const int32_t *targets)
{
    const struct srf_backend *be = m->ctx->be;
    size_t size = (size_t)srf_batch_rows(batch) * sizeof *batch->tokens;
    SRF_TRY(check_batch(m, batch));
    SRF_TRY(be->upload(m->ctx, PTR(m->slot_tokens), batch->tokens, size));
    return targets ? be->upload(m->ctx, PTR(m->slot_targets), targets, size) : SRF_OK;
}

srf_status srf_model_forward(struct srf_model *m, const struct srf_batch *batch)
{
    struct srf_ctx *ctx = m->ctx;
    SRF_TRY(check_batch(m, batch));
    SRF_TRY(plan_shape(m, batch));
    if (batch->on_device) return m->config.arch->forward(m, batch);
    SRF_TRY(ctx->be->upload(ctx, PTR(m->slot_tokens), batch->tokens,
                            (size_t)srf_batch_rows(batch) * sizeof *batch->tokens));
    if (batch->mode != SRF_MODE_PARALLEL) SRF_TRY(upload_sequences(m, batch));
    return m->config.arch->forward(m, batch);
}

srf_status srf_model_backward(struct srf_model *m, const struct srf_batch *batch)
{
    SRF_FAIL_IF(!m->plan.train || batch->mode != SRF_MODE_PARALLEL, SRF_INVALID,
                "backward needs a model planned for training and a parallel batch");
    return m->config.arch->backward(m, batch);
}
