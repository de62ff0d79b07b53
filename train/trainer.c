#include "train/trainer.h"
#include "infer/evaluate.h"
#include "train/trainer_internal.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* Steps in a row without an update after which a run is beyond saving. */
#define MAX_SKIPPED 10
/* Rows of logits that a teacher's own evaluation holds at once: enough for the matrix product, few
 * beside what training holds. */
#define TEACHER_ROWS 256

/* ---- memory: one plan ------------------------------------------------------------------------ */

/* AdamW's map of what does not decay: a byte for every 64 elements. */
static srf_status upload_no_decay(struct srf_trainer *t)
{
    const struct srf_tensor_table *table = &t->model->table;
    int64_t n = t->n_params / 64;
    uint8_t *map;
    SRF_TRY(SRF_CALLOC(map, n));
    for (int64_t i = 0; i < table->n && !t->lora.rank; i++) {
        const struct srf_tensor *row = &table->rows[i];
        int64_t at = t->model->trained_at[i];
        if (at >= 0 && !row->decay) memset(map + at / 64, 1, (size_t)(row->count + 63) / 64);
    }
    srf_status st =
        t->ctx->be->upload(t->ctx, srf_arena_ptr(t->arena, t->slot_no_decay), map, (size_t)n);
    srf__free(map);
    return st;
}

static srf_status update(struct srf_trainer *t);

/* The optimizer's workspace and cost. */
static srf_status plan_update(struct srf_trainer *t)
{
    t->model->features_trained = t->config.train_features;
    srf_arena_plan_begin(t->arena);
    srf_status st = update(t);
    srf_arena_plan_end(t->arena);
    t->model->features_trained = false;
    t->update_cost = t->ctx->plan_cost;
    return st;
}

static srf_status plan(struct srf_trainer *t, const struct srf_checkpoint *ck,
                       const struct srf_checkpoint *teacher)
{
    struct srf_ctx *ctx = t->ctx;
    const struct srf_train_config *c = &t->config;
    enum srf_dtype acc = srf_ctx_acc(ctx);
    SRF_TRY(srf_arena_create(ctx, &t->arena));
    SRF_TRY(srf_model_create(ctx, &ck->config, &ck->attention, &t->model));
    struct srf_model_plan p = {.b = c->micro_batch,
                               .t = c->seq_len,
                               .train = true,
                               .trained = srf_policy_trained(c),
                               .train_features = c->train_features,
                               .teacher = teacher,
                               .loss_rows = srf__loss_row(c) + c->batch * c->seq_len,
                               .recompute = (enum srf_recompute)c->recompute};
    SRF_TRY(srf_model_plan(t->model, t->arena, &p));
    if (teacher) {
        SRF_TRY(srf_model_create(ctx, &teacher->config, &teacher->attention, &t->teacher));
        /* In training its logits are made in the student's loss. */
        p = (struct srf_model_plan){.b = c->micro_batch,
                                    .t = c->seq_len,
                                    .keep_attention = c->mse_weight > 0,
                                    .logit_rows = t->val ? TEACHER_ROWS : 1};
        SRF_TRY(srf_model_plan(t->teacher, t->arena, &p));
    }
    SRF_TRY(srf__lora_plan(t));
    t->n_params = t->lora.rank ? t->lora.n : t->model->n_trained;
    if (c->train_features) srf_model_features(t->model, &t->n_features);
    int64_t n = t->n_params + t->n_features, words = (t->n_params / 64 + 3) / 4;
    const struct srf_arena_row slots[] = {
        {"optimizer", "first moments", n, acc, &t->slot_m},
        {"optimizer", "second moments", n, acc, &t->slot_v},
        {"optimizer", "gradient norm", 1, acc, &t->slot_sumsq},
        {"optimizer", "no decay", words, SRF_I32, &t->slot_no_decay},
        {"optimizer", "skips", 2, SRF_I32, &t->slot_skips},
    };
    SRF_TRY(srf_arena_add_rows(t->arena, slots, sizeof slots / sizeof *slots));
    SRF_TRY(plan_update(t));
    SRF_TRY(srf_arena_commit(t->arena));
    SRF_TRY(srf_model_upload(t->model, ck));
    SRF_TRY(srf__lora_begin(t, ck->params));
    if (teacher) SRF_TRY(srf_model_upload(t->teacher, teacher));
    SRF_TRY(upload_no_decay(t));
    int64_t rows = c->micro_batch * (c->seq_len + 1);
    SRF_TRY(SRF_ALLOC(t->window, c->seq_len + 1));
    SRF_TRY(SRF_ALLOC(t->tokens, rows));
    return SRF_ALLOC(t->targets, rows);
}

/* ---- what goes in ---------------------------------------------------------------------------- */

/* What an evaluation at the end would fail for, now. */
static srf_status check_val(const struct srf_train_config *c, const struct srf_tokenset *val)
{
    SRF_FAIL_IF(srf_tokenset_count(val) < 2, SRF_INVALID,
                "the validation set has %lld tokens: a prediction needs 2",
                (long long)srf_tokenset_count(val));
    SRF_FAIL_IF(c->eval_tokens == 1, SRF_INVALID, "an evaluation of 1 token: a prediction needs 2");
    SRF_FAIL_IF(c->seq_len < 2, SRF_INVALID,
                "sequences of %lld token: an evaluation needs at least 2", (long long)c->seq_len);
    return SRF_OK;
}

static srf_status tokenizer_hash(const char *json, char hex[17])
{
    struct srf_bpe *bpe;
    SRF_TRY(srf_bpe_from_json(json, strlen(json), &bpe));
    srf_bpe_hash(bpe, hex);
    srf_bpe_free(bpe);
    return SRF_OK;
}

/* A teacher's logits and attention outputs are compared with the student's one by one. */
static srf_status check_teacher(const struct srf_checkpoint *student,
                                const struct srf_checkpoint *teacher)
{
    const struct srf_model_config *a = &student->config, *b = &teacher->config;
    const struct {
        const char *name;
        double student, teacher;
    } sizes[] = {
        {"layers", (double)a->n_layers, (double)b->n_layers},
        {"heads", (double)a->n_heads, (double)b->n_heads},
        {"width", (double)a->c, (double)b->c},
        {"MLP width", (double)a->d_ff, (double)b->d_ff},
        {"positions", (double)a->n_pos, (double)b->n_pos},
        {"vocabulary", (double)a->vocab, (double)b->vocab},
        {"layer norm epsilon", a->ln_eps, b->ln_eps},
    };
    SRF_FAIL_IF(a->arch != b->arch, SRF_MISMATCH, "the teacher has another architecture");
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        SRF_FAIL_IF(sizes[i].student != sizes[i].teacher, SRF_MISMATCH,
                    "teacher: expected the model's %s %g, found %g", sizes[i].name,
                    sizes[i].student, sizes[i].teacher);
    if (!student->tokenizer_json || !teacher->tokenizer_json) return SRF_OK;
    char want[17], found[17];
    SRF_TRY(tokenizer_hash(student->tokenizer_json, want));
    SRF_TRY(tokenizer_hash(teacher->tokenizer_json, found));
    SRF_FAIL_IF(strcmp(want, found) != 0, SRF_MISMATCH,
                "teacher: expected the model's tokenizer %s, found %s", want, found);
    return SRF_OK;
}

/* FNV-1a of n ids. */
static uint64_t hash_ids(uint64_t h, const int32_t *ids, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        for (int shift = 0; shift < 32; shift += 8) {
            h ^= (uint32_t)ids[i] >> shift & 255;
            h *= 0x100000001b3u;
        }
    return h;
}

/* A name for what the set holds. Whole sets are too long to read: both ends, so that one that was
 * cut, or had something added, is another. */
static srf_status identify(struct srf_tokenset *data, char *id, size_t size)
{
    enum { END = 4096 };
    int64_t count = srf_tokenset_count(data), n = count < END ? count : END;
    const char *tokenizer = srf_tokenset_tokenizer_hash(data);
    int32_t *ids;
    uint64_t h = 0xcbf29ce484222325u;
    SRF_TRY(SRF_ALLOC(ids, n));
    srf_status st = SRF_OK;
    SRF_TRY_GO(srf_tokenset_read(data, 0, n, ids));
    h = hash_ids(h, ids, n);
    SRF_TRY_GO(srf_tokenset_read(data, count - n, n, ids));
    h = hash_ids(h, ids, n);
    snprintf(id, size, "%lld tokens %016llx, tokenizer %s", (long long)count, (unsigned long long)h,
             tokenizer[0] ? tokenizer : "unknown");
cleanup:
    srf__free(ids);
    return st;
}

srf_status srf_trainer_check(const struct srf_checkpoint *ck, const struct srf_checkpoint *teacher,
                             const struct srf_train_config *config, const struct srf_tokenset *data,
                             const struct srf_tokenset *val)
{
    SRF_TRY(srf_train_config_check(config));
    SRF_FAIL_IF(config->seq_len > ck->config.n_pos, SRF_INVALID,
                "sequences of %lld tokens: the model's learned positions end at %lld",
                (long long)config->seq_len, (long long)ck->config.n_pos);
    SRF_FAIL_IF(srf_tokenset_count(data) < config->seq_len + 1, SRF_INVALID,
                "the training set has %lld tokens: one sequence needs %lld",
                (long long)srf_tokenset_count(data), (long long)config->seq_len + 1);
    if (val) SRF_TRY(check_val(config, val));
    SRF_FAIL_IF(srf_policy_needs_teacher(config) && !teacher, SRF_INVALID,
                "distillation needs a teacher");
    const struct srf_attention_config *a = &ck->attention;
    SRF_FAIL_IF(config->train_features && !srf_attention_has_features(a), SRF_INVALID,
                "%s attention has no features to train", srf_attention_kind_name(a->kind));
    SRF_FAIL_IF(srf_attention_has_map(a) && (!config->train_features || config->redraw_every),
                SRF_INVALID, "%s attention trains its features and never draws them anew",
                srf_attention_kind_name(a->kind));
    SRF_TRY(srf__lora_check(config, &ck->table));
    return srf_policy_needs_teacher(config) ? check_teacher(ck, teacher) : SRF_OK;
}

srf_status srf_trainer_create(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                              const struct srf_checkpoint *teacher,
                              const struct srf_train_config *config, struct srf_tokenset *data,
                              struct srf_tokenset *val, struct srf_trainer **out)
{
    *out = NULL;
    SRF_TRY(srf_trainer_check(ck, teacher, config, data, val));
    bool teach = srf_policy_needs_teacher(config);
    struct srf_trainer *t;
    SRF_TRY(SRF_CALLOC(t, 1));
    t->ctx = ctx;
    t->config = *config;
    t->data = data;
    t->val = val;
    t->first_draw = ck->attention.draw;
    t->loaded_step = -1;
    srf_status st = SRF_OK;
    if (ck->tokenizer_json) {
        t->tokenizer_json = srf__strdup(ck->tokenizer_json);
        SRF_FAIL_GO_IF(!t->tokenizer_json, SRF_NOMEM, "out of memory: tokenizer");
    }
    SRF_TRY_GO(identify(data, t->data_id, sizeof t->data_id));
    SRF_TRY_GO(plan(t, ck, teach ? teacher : NULL));
    *out = t;
cleanup:
    if (st != SRF_OK) srf_trainer_free(t);
    return st;
}

void srf_trainer_free(struct srf_trainer *t)
{
    if (!t) return;
    srf__micro_batch_free(t);
    srf__lora_free(t);
    srf_model_free(t->model);
    srf_model_free(t->teacher);
    srf_arena_free(t->arena);
    srf__free(t->window);
    srf__free(t->tokens);
    srf__free(t->targets);
    srf__free(t->tokenizer_json);
    srf__free(t);
}

/* ---- one step -------------------------------------------------------------------------------- */

/* Redraw, or keep the draw, as the policy says for this step. */
static srf_status set_features(struct srf_trainer *t)
{
    struct srf_model *m = t->model;
    if (srf_attention_has_map(&m->attention)) return srf_model_train_features(m, true);
    if (m->attention.kind != SRF_ATTN_SRF) return SRF_OK;
    uint64_t draw = t->first_draw + srf_policy_draw(&t->config, t->step);
    if (draw != m->attention.draw) {
        m->attention.draw = draw;
        SRF_TRY(srf_model_draw(m));
    }
    return srf_model_train_features(m, t->config.train_features &&
                                           srf_policy_frozen(&t->config, t->step));
}

/* One flat piece of parameters, or of features. at: its place in the moments; skips: counts the
 * steps skipped, or NULL. */
static srf_status adamw(struct srf_trainer *t, void *param, void *master, const void *grad,
                        int64_t at, int64_t n, double lr, void *skips)
{
    const struct srf_train_config *c = &t->config;
    size_t size = srf_dtype_bytes(srf_ctx_acc(t->ctx));
    bool parameters = at < t->n_params;
    uint8_t *no_decay = srf_arena_ptr(t->arena, t->slot_no_decay);
    return SRF_RUN(
        t->ctx, adamw, .n = n, .step = t->step + 1, .lr = lr, .beta1 = c->beta1, .beta2 = c->beta2,
        .eps = c->eps, .weight_decay = parameters ? c->weight_decay : 0, .grad_scale = 1,
        .max_norm = c->clip > 0 ? c->clip : INFINITY,
        .clip_sumsq = srf_arena_ptr(t->arena, t->slot_sumsq), .skips = skips,
        .no_decay = parameters ? no_decay + at / 64 : NULL, .grad = grad, .param = param,
        .master = master, .m = (char *)srf_arena_ptr(t->arena, t->slot_m) + (size_t)at * size,
        .v = (char *)srf_arena_ptr(t->arena, t->slot_v) + (size_t)at * size);
}

/* *end is cut to where the rows from `row` on have its learning rate. */
static double same_rate(const struct srf_trainer *t, int64_t row, int64_t *end)
{
    const struct srf_tensor_table *table = &t->model->table;
    double rest = t->config.rest_lr, lr = table->rows[row].attention ? 1 : rest;
    for (int64_t next = row + 1; next < *end; next++)
        if (lr != (table->rows[next].attention ? 1 : rest)) *end = next;
    return lr;
}

static srf_status update_parameters(struct srf_trainer *t)
{
    const struct srf_model *m = t->model;
    const struct srf__lora *r = &t->lora;
    void *skips = srf_arena_ptr(t->arena, t->slot_skips);
    double peak = srf_policy_lr(&t->config, t->step);
    if (peak == 0 && !t->ctx->plan) return SRF_OK; /* no weight decay either */
    if (r->rank) {
        void *master = srf__lora_has_masters(t) ? srf__lora_factors(t) : NULL;
        return adamw(t, srf_arena_ptr(t->arena, r->slot_ab), master,
                     srf_arena_ptr(t->arena, r->slot_grads), 0, r->n, peak, skips);
    }
    for (int64_t row = 0, end; srf_model_trained_rows(m, &row, &end); row = end) {
        double lr = same_rate(t, row, &end) * peak;
        SRF_TRY(adamw(t, srf_model_param(m, row), srf_model_master(m, row), srf_model_grad(m, row),
                      m->trained_at[row], srf_model_rows_count(m, row, end), lr, skips));
        skips = NULL;
    }
    return SRF_OK;
}

/* The gradient's norm, and the optimizer; a gradient that is not finite changes nothing. */
static srf_status update(struct srf_trainer *t)
{
    struct srf_ctx *ctx = t->ctx;
    const struct srf_model *m = t->model;
    void *sum = srf_arena_ptr(t->arena, t->slot_sumsq);
    if (!ctx->plan) SRF_TRY(ctx->be->zero(ctx, sum, srf_dtype_bytes(srf_ctx_acc(ctx))));
    SRF_TRY(srf__lora_gradients(t));
    int slot = t->lora.rank ? t->lora.slot_grads : m->slot_grads;
    SRF_TRY(SRF_RUN(ctx, sumsq, .n = t->n_params, .x = srf_arena_ptr(t->arena, slot), .sum = sum));
    if (m->features_trained)
        SRF_TRY(
            SRF_RUN(ctx, sumsq, .n = t->n_features, .x = srf_model_features_grad(m), .sum = sum));
    SRF_TRY(update_parameters(t));
    SRF_TRY(srf__lora_apply(t));
    if (!m->features_trained) return SRF_OK;
    int64_t n;
    void *w = srf_model_features(m, &n);
    return adamw(t, w, srf_model_features_master(m), srf_model_features_grad(m), t->n_params, n,
                 srf_policy_features_lr(&t->config, t->step), NULL);
}

bool srf__due(int64_t step, int64_t every, int64_t last)
{
    return step == last || (every > 0 && step % every == 0);
}

/* What the device knows of the last step: waits for it. */
static srf_status read_metrics(struct srf_trainer *t, struct srf_train_metrics *out)
{
    const struct srf_train_config *c = &t->config;
    struct srf_ctx *ctx = t->ctx;
    const struct srf_model *m = t->model;
    int64_t rows = c->batch * c->seq_len, before = t->step - 1;
    bool kl = srf_policy_kl(c, before) > 0;
    float sumsq;
    int32_t skips[2];
    out->known = true;
    SRF_TRY(srf_model_losses(m, srf__loss_row(c), rows, NULL, &out->loss, kl ? &out->kl : NULL));
    out->loss *= srf__mean_scale(c);
    out->kl *= srf__mean_scale(c);
    if (srf_policy_mse(c, before) > 0) {
        SRF_TRY(srf_model_attention_mse(m, &out->mse));
        out->mse *= srf__mean_scale(c) / (double)(m->config.n_layers * m->config.c);
    }
    SRF_TRY(
        srf_download_f32(ctx, &sumsq, srf_arena_ptr(t->arena, t->slot_sumsq), srf_ctx_acc(ctx), 1));
    out->grad_norm = sqrt((double)sumsq);
    SRF_TRY(ctx->be->download(ctx, skips, srf_arena_ptr(t->arena, t->slot_skips), sizeof skips));
    out->skipped = skips[1] > 0;
    out->n_skipped = skips[0] - t->skips;
    t->skips = skips[0];
    out->tokens_per_s = (double)((t->step - t->clock_step) * rows) / (srf__now() - t->clock);
    t->clock = 0;
    SRF_FAIL_IF(skips[1] >= MAX_SKIPPED, SRF_NONFINITE,
                "step %lld: loss or gradient not finite %d times in a row: lower --lr; the weights "
                "are those of step %lld",
                (long long)t->step, skips[1], (long long)t->step - skips[1]);
    return SRF_OK;
}

srf_status srf_trainer_step(struct srf_trainer *t, struct srf_train_metrics *out)
{
    const struct srf_train_config *c = &t->config;
    *out = (struct srf_train_metrics){0};
    SRF_FAIL_IF(t->step >= c->steps, SRF_INVALID, "all %lld steps are done", (long long)c->steps);
    if (t->clock == 0) {
        t->clock = srf__now();
        t->clock_step = t->step;
    }
    SRF_TRY(set_features(t));
    SRF_TRY(srf_model_zero_grads(t->model));
    for (int64_t first = 0; first < c->batch; first += c->micro_batch)
        SRF_TRY(srf__micro_batch(t, first));
    SRF_TRY(update(t));
    out->lr = srf_policy_lr(c, t->step);
    out->draw = t->model->attention.draw;
    t->step++;
    srf__micro_batch_ahead(t);
    out->step = t->step;
    out->tokens = t->step * c->batch * c->seq_len;
    bool read = srf__due(t->step, c->log_every, c->steps) ||
                (t->val && srf__due(t->step, c->eval_every, c->steps)) ||
                srf__due(t->step, c->save_every, c->steps);
    return read ? read_metrics(t, out) : SRF_OK;
}

static srf_status evaluate(struct srf_trainer *t, struct srf_model *m,
                           const struct srf_run_hooks *hooks, double *ppl)
{
    SRF_FAIL_IF(!t->val, SRF_INVALID, "there is no validation set");
    struct srf_eval_config c = {.seq_len = t->config.seq_len,
                                .batch = t->config.micro_batch,
                                .max_tokens = t->config.eval_tokens};
    struct srf_eval_result r;
    if (hooks && hooks->evaluating) {
        c.progress = hooks->evaluating;
        c.user = hooks->user;
        c.progress(c.user, 0, 0);
    }
    SRF_TRY(srf_evaluate(m, t->val, &c, &r));
    *ppl = r.ppl;
    return SRF_OK;
}

srf_status srf_trainer_evaluate(struct srf_trainer *t, const struct srf_run_hooks *hooks,
                                double *ppl)
{
    return evaluate(t, t->model, hooks, ppl);
}

srf_status srf_trainer_evaluate_teacher(struct srf_trainer *t, const struct srf_run_hooks *hooks)
{
    SRF_FAIL_IF(!t->teacher, SRF_INVALID, "there is no teacher");
    return evaluate(t, t->teacher, hooks, &t->teacher_ppl);
}

double srf_trainer_teacher_ppl(const struct srf_trainer *t)
{
    return t->teacher_ppl;
}

int64_t srf_trainer_steps_done(const struct srf_trainer *t)
{
    return t->step;
}

int64_t srf_trainer_trained(const struct srf_trainer *t)
{
    return t->n_params + t->n_features;
}

int64_t srf_trainer_resumed_threads(const struct srf_trainer *t)
{
    return t->resumed_threads;
}

const struct srf_train_config *srf_trainer_config(const struct srf_trainer *t)
{
    return &t->config;
}

struct srf_model *srf_trainer_model(struct srf_trainer *t)
{
    return t->model;
}

void srf_trainer_describe_memory(const struct srf_trainer *t, char *buf, size_t size)
{
    srf_arena_describe(t->arena, buf, size);
}

size_t srf_trainer_memory(const struct srf_trainer *t)
{
    return srf_arena_bytes(t->arena, NULL);
}

struct srf_cost srf_trainer_step_cost(const struct srf_trainer *t)
{
    const struct srf_cost *batch = &t->model->cost[t->model->attention.kind];
    double n = (double)(t->config.batch / t->config.micro_batch);
    return (struct srf_cost){.bytes = n * batch->bytes + t->update_cost.bytes,
                             .flops = n * batch->flops + t->update_cost.flops};
}
