/* A training run's checkpoint: the model as in model/checkpoint.h, and
 *     /trainer    attributes layout, settings (JSON), step, first_draw, dtype, threads, data
 *     /optimizer  m, v (flat, of what is trained, in the order of the tensor table; then those of
 *                 the features)
 *     /lora       base, factors (flat): of a run that trains low-rank factors; the model itself has
 *                 what they come to
 *     /teacher    params (flat), attention settings; w, bias (its features, flat)
 *     /exact      params, w, bias of an f64 run: the model itself is stored in f32
 * Flat arrays have the run's own precision; of a bf16 run the f32 masters are what is stored. */
#include "train/trainer_internal.h"

#include <string.h>

/* How the tensors lie in flat arrays. 2: the output head's rows are padded. */
#define LAYOUT 2

/* A checkpoint on the host with the model's present values; caller frees. */
static srf_status download(struct srf_trainer *t, enum srf_checkpoint_kind kind,
                           struct srf_checkpoint **out)
{
    *out = NULL;
    const struct srf_model *m = t->model;
    struct srf_checkpoint *ck;
    srf_status st = SRF_OK;
    SRF_TRY(SRF_CALLOC(ck, 1));
    ck->kind = kind;
    ck->config = m->config;
    SRF_TRY_GO(srf_tensor_table_create(&m->config, &ck->table));
    SRF_TRY_GO(SRF_CALLOC(ck->params, ck->table.total));
    SRF_TRY_GO(srf_model_download(m, ck));
    SRF_TRY_GO(srf__lora_merge(t, ck->params));
    if (t->tokenizer_json) {
        ck->tokenizer_json = srf__strdup(t->tokenizer_json);
        SRF_FAIL_GO_IF(!ck->tokenizer_json, SRF_NOMEM, "out of memory: tokenizer");
    }
    *out = ck;
cleanup:
    if (st != SRF_OK) srf_checkpoint_free(ck);
    return st;
}

srf_status srf_trainer_save_model(struct srf_trainer *t, const char *path)
{
    struct srf_checkpoint *ck;
    SRF_TRY(download(t, SRF_CKPT_WEIGHTS, &ck));
    srf_status st = srf_checkpoint_save(ck, path);
    srf_checkpoint_free(ck);
    return st;
}

/* What an array of `type` is stored as: without loss. */
static enum srf_dtype stored_as(enum srf_dtype type)
{
    return type == SRF_F64 ? SRF_F64 : SRF_F32;
}

static srf_status put_flat(struct srf_trainer *t, struct srf_h5 *f, const char *path,
                           const void *values, enum srf_dtype type, int64_t n)
{
    enum srf_dtype stored = stored_as(type);
    size_t size = srf_dtype_bytes(stored);
    void *host = srf__alloc((size_t)n, size);
    SRF_FAIL_IF(!host, SRF_NOMEM, "out of memory: %lld elements of %s", (long long)n, path);
    srf_status st = stored == type ? t->ctx->be->download(t->ctx, host, values, (size_t)n * size)
                                   : srf_download_f32(t->ctx, host, values, type, n);
    if (st == SRF_OK) st = srf_h5_put(f, path, stored, 1, &n, host);
    srf__free(host);
    return st;
}

static srf_status get_flat(struct srf_trainer *t, struct srf_h5 *f, const char *path, void *values,
                           enum srf_dtype type, int64_t n)
{
    enum srf_dtype stored = stored_as(type);
    size_t size = srf_dtype_bytes(stored);
    void *host = srf__alloc((size_t)n, size);
    SRF_FAIL_IF(!host, SRF_NOMEM, "out of memory: %lld elements of %s", (long long)n, path);
    srf_status st = srf_h5_get(f, path, stored, 1, &n, host);
    if (st == SRF_OK)
        st = stored == type ? t->ctx->be->upload(t->ctx, values, host, (size_t)n * size)
                            : srf_upload_f32(t->ctx, values, type, host, n);
    srf__free(host);
    return st;
}

/* The features in force, for a model that has any. */
static srf_status put_features(struct srf_trainer *t, struct srf_h5 *f, const struct srf_model *m,
                               const char *w_path, const char *bias_path)
{
    if (!srf_attention_has_features(&m->attention)) return SRF_OK;
    int64_t n, d = srf_attention_columns(&m->attention, m->config.c / m->config.n_heads);
    const void *w = srf_model_features(m, &n), *bias = srf_arena_ptr(m->arena, m->slot_bias);
    SRF_TRY(put_flat(t, f, w_path, w, t->ctx->dtype, n));
    return put_flat(t, f, bias_path, bias, srf_ctx_acc(t->ctx), n / d);
}

static srf_status get_features(struct srf_trainer *t, struct srf_h5 *f, const struct srf_model *m,
                               const char *w_path, const char *bias_path)
{
    if (!srf_attention_has_features(&m->attention)) return SRF_OK;
    int64_t n, d = srf_attention_columns(&m->attention, m->config.c / m->config.n_heads);
    void *w = srf_model_features(m, &n), *bias = srf_arena_ptr(m->arena, m->slot_bias);
    SRF_TRY(get_flat(t, f, w_path, w, t->ctx->dtype, n));
    return get_flat(t, f, bias_path, bias, srf_ctx_acc(t->ctx), n / d);
}

static srf_status put_teacher(struct srf_trainer *t, struct srf_h5 *f)
{
    char *text;
    SRF_TRY(put_flat(t, f, "/teacher/params", srf_model_param(t->teacher, 0), t->ctx->dtype,
                     t->teacher->table.total));
    SRF_TRY(srf_attention_to_json(&t->teacher->attention, &text));
    srf_status st = srf_h5_put_str(f, "/teacher", "attention", text);
    srf__free(text);
    SRF_TRY(st);
    return put_features(t, f, t->teacher, "/teacher/w", "/teacher/bias");
}

/* W0 is what a bf16 run's device has only rounded. */
static srf_status put_lora(struct srf_trainer *t, struct srf_h5 *f)
{
    const struct srf__lora *r = &t->lora;
    if (r->rank == 0) return SRF_OK;
    SRF_TRY(srf_h5_put(f, "/lora/base", SRF_F32, 1, &r->n_base, r->base));
    return put_flat(t, f, "/lora/factors", srf__lora_factors(t), srf_ctx_acc(t->ctx), r->n);
}

static srf_status get_lora(struct srf_trainer *t, struct srf_h5 *f)
{
    const struct srf__lora *r = &t->lora;
    if (r->rank == 0) return SRF_OK;
    SRF_TRY(srf_h5_get(f, "/lora/base", SRF_F32, 1, &r->n_base, r->base));
    SRF_TRY(get_flat(t, f, "/lora/factors", srf__lora_factors(t), srf_ctx_acc(t->ctx), r->n));
    return srf__lora_resume(t);
}

static srf_status put_trainer(struct srf_trainer *t, struct srf_h5 *f)
{
    int64_t n = t->n_params + t->n_features;
    enum srf_dtype acc = srf_ctx_acc(t->ctx);
    char *settings;
    SRF_TRY(put_flat(t, f, "/optimizer/m", srf_arena_ptr(t->arena, t->slot_m), acc, n));
    SRF_TRY(put_flat(t, f, "/optimizer/v", srf_arena_ptr(t->arena, t->slot_v), acc, n));
    SRF_TRY(srf_train_config_to_json(&t->config, &settings));
    srf_status st = srf_h5_put_str(f, "/trainer", "settings", settings);
    srf__free(settings);
    SRF_TRY(st);
    SRF_TRY(srf_h5_put_i64(f, "/trainer", "layout", LAYOUT));
    SRF_TRY(srf_h5_put_i64(f, "/trainer", "step", t->step));
    SRF_TRY(srf_h5_put_i64(f, "/trainer", "first_draw", (int64_t)t->first_draw));
    SRF_TRY(srf_h5_put_str(f, "/trainer", "dtype", srf_dtype_name(t->ctx->dtype)));
    SRF_TRY(srf_h5_put_i64(f, "/trainer", "threads", t->ctx->n_threads));
    SRF_TRY(srf_h5_put_str(f, "/trainer", "data", t->data_id));
    if (t->ctx->dtype == SRF_F64) {
        SRF_TRY(put_flat(t, f, "/exact/params", srf_model_param(t->model, 0), SRF_F64,
                         t->model->table.total));
        SRF_TRY(put_features(t, f, t->model, "/exact/w", "/exact/bias"));
    }
    SRF_TRY(put_lora(t, f));
    return t->teacher ? put_teacher(t, f) : SRF_OK;
}

srf_status srf_trainer_save(struct srf_trainer *t, const char *path)
{
    struct srf_checkpoint *ck;
    struct srf_h5 *f = NULL;
    SRF_TRY(download(t, SRF_CKPT_TRAINING, &ck));
    srf_status st = SRF_OK;
    SRF_TRY_GO(srf_h5_create(path, &f));
    SRF_TRY_GO(srf_checkpoint_put(ck, f));
    SRF_TRY_GO(put_trainer(t, f));
    st = srf_h5_commit(f);
    f = NULL;
cleanup:
    srf_h5_close(f);
    srf_checkpoint_free(ck);
    return st;
}

/* The teacher shares the student's config; its own weights and attention. */
static srf_status get_teacher(struct srf_h5 *f, const struct srf_checkpoint *student,
                              struct srf_checkpoint **out)
{
    *out = NULL;
    struct srf_checkpoint *ck;
    char *text = NULL;
    srf_status st = SRF_OK;
    SRF_TRY(SRF_CALLOC(ck, 1));
    ck->config = student->config;
    SRF_TRY_GO(srf_tensor_table_create(&ck->config, &ck->table));
    SRF_TRY_GO(SRF_ALLOC(ck->params, ck->table.total));
    SRF_TRY_GO(srf_h5_get(f, "/teacher/params", SRF_F32, 1, &ck->table.total, ck->params));
    SRF_TRY_GO(srf_h5_get_str(f, "/teacher", "attention", &text));
    SRF_TRY_GO(srf_attention_from_json(text, &ck->attention));
    *out = ck;
cleanup:
    srf__free(text);
    if (st != SRF_OK) srf_checkpoint_free(ck);
    return st;
}

/* The run's own text attribute must be what it is now. */
static srf_status same_text(struct srf_h5 *f, const char *name, const char *what, const char *now)
{
    char *text;
    SRF_TRY(srf_h5_get_str(f, "/trainer", name, &text));
    srf_status st = SRF_OK;
    SRF_FAIL_GO_IF(strcmp(text, now) != 0, SRF_MISMATCH, "%s: the run's is %s, found %s", what,
                   text, now);
cleanup:
    srf__free(text);
    return st;
}

static srf_status get_trainer(struct srf_trainer *t, struct srf_h5 *f)
{
    SRF_TRY(same_text(f, "dtype", "--dtype", srf_dtype_name(t->ctx->dtype)));
    SRF_TRY(same_text(f, "data", "training data", t->data_id));
    SRF_TRY(srf_h5_get_i64(f, "/trainer", "threads", &t->resumed_threads));
    int64_t n = t->n_params + t->n_features, first_draw;
    enum srf_dtype acc = srf_ctx_acc(t->ctx);
    SRF_TRY(get_flat(t, f, "/optimizer/m", srf_arena_ptr(t->arena, t->slot_m), acc, n));
    SRF_TRY(get_flat(t, f, "/optimizer/v", srf_arena_ptr(t->arena, t->slot_v), acc, n));
    SRF_TRY(srf_h5_get_i64(f, "/trainer", "step", &t->step));
    SRF_TRY(srf_h5_get_i64(f, "/trainer", "first_draw", &first_draw));
    t->first_draw = (uint64_t)first_draw;
    if (t->ctx->dtype == SRF_F64) {
        SRF_TRY(get_flat(t, f, "/exact/params", srf_model_param(t->model, 0), SRF_F64,
                         t->model->table.total));
        SRF_TRY(get_features(t, f, t->model, "/exact/w", "/exact/bias"));
    }
    SRF_TRY(get_lora(t, f));
    if (t->teacher) SRF_TRY(get_features(t, f, t->teacher, "/teacher/w", "/teacher/bias"));
    SRF_FAIL_IF(t->step < 0 || t->step > t->config.steps, SRF_FORMAT,
                "/trainer: step %lld of %lld steps", (long long)t->step,
                (long long)t->config.steps);
    return SRF_OK;
}

srf_status srf_trainer_file_dtype(const char *path, char **dtype)
{
    struct srf_h5 *f;
    *dtype = NULL;
    SRF_TRY(srf_h5_open(path, &f));
    srf_status st = srf_h5_get_str(f, "/trainer", "dtype", dtype);
    srf_h5_close(f);
    return st;
}

static srf_status check_layout(struct srf_h5 *f, const char *path)
{
    int64_t layout = 0;
    srf_status st = srf_h5_get_i64(f, "/trainer", "layout", &layout);
    SRF_FAIL_IF(st != SRF_OK || layout != LAYOUT, SRF_UNSUPPORTED,
                "%s is of a run by another version of srf, which cannot be continued: start a new "
                "one from it (--model)",
                path);
    return SRF_OK;
}

srf_status srf_trainer_resume(struct srf_ctx *ctx, const char *path, struct srf_tokenset *data,
                              struct srf_tokenset *val, struct srf_trainer **out)
{
    *out = NULL;
    struct srf_checkpoint *ck = NULL, *teacher = NULL;
    struct srf_h5 *f = NULL;
    struct srf_trainer *t = NULL;
    struct srf_train_config config;
    char *settings = NULL;
    srf_status st = SRF_OK;
    SRF_TRY_GO(srf_checkpoint_load(path, NULL, &ck));
    SRF_FAIL_GO_IF(ck->kind != SRF_CKPT_TRAINING, SRF_INVALID,
                   "%s: not a training checkpoint: a run's is called last.h5", path);
    SRF_TRY_GO(srf_h5_open(path, &f));
    SRF_TRY_GO(check_layout(f, path));
    SRF_TRY_GO(srf_h5_get_str(f, "/trainer", "settings", &settings));
    SRF_TRY_GO(srf_train_config_from_json(settings, &config));
    if (srf_h5_has(f, "/teacher")) SRF_TRY_GO(get_teacher(f, ck, &teacher));
    SRF_TRY_GO(srf_trainer_create(ctx, ck, teacher, &config, data, val, &t));
    SRF_TRY_GO(get_trainer(t, f));
    t->resumed = true;
    *out = t;
    t = NULL;
cleanup:
    srf_trainer_free(t);
    srf__free(settings);
    srf_h5_close(f);
    srf_checkpoint_free(teacher);
    srf_checkpoint_free(ck);
    return st;
}
