/* Forward and backward of the sequences that fit at once, and what they read.
 *
 * Where the backend records graphs, the ops of a micro-batch are one launch: they are the same in
 * every step. What differs, tokens and targets, is uploaded before them; losses are moved to their
 * place behind them, since a graph always leaves them in the first rows. Drawing and the optimizer,
 * whose arguments change from step to step, stay outside. */
#include "train/trainer_internal.h"

#include <string.h>

double srf__mean_scale(const struct srf_train_config *c)
{
    return 1.0 / (double)(c->batch * c->seq_len);
}

/* Behind those that a micro-batch leaves. */
int64_t srf__loss_row(const struct srf_train_config *c)
{
    return c->micro_batch * c->seq_len;
}

/* Sequences from `first` on: each starts anywhere, by (seed, step, sequence) alone. */
static srf_status load(struct srf_trainer *t, int64_t first)
{
    int64_t len = t->config.seq_len;
    uint64_t starts = (uint64_t)(srf_tokenset_count(t->data) - len);
    if (t->loaded_step == t->step && t->loaded_first == first) return SRF_OK;
    t->loaded_step = -1;
    for (int64_t i = 0; i < t->config.micro_batch; i++) {
        struct srf_rng rng =
            srf_rng_at(t->config.seed, SRF_RNG_DATA, (uint64_t)t->step, (uint32_t)(first + i), 0);
        int64_t start = (int64_t)srf_rng_below(&rng, starts);
        SRF_TRY(srf_tokenset_read(t->data, start, len + 1, t->window));
        memcpy(t->tokens + i * len, t->window, (size_t)len * sizeof *t->tokens);
        memcpy(t->targets + i * len, t->window + 1, (size_t)len * sizeof *t->targets);
    }
    t->loaded_step = t->step;
    t->loaded_first = first;
    return SRF_OK;
}

void srf__micro_batch_ahead(struct srf_trainer *t)
{
    /* What cannot be read is the next step's error, if there is one. */
    if (t->step < t->config.steps && load(t, 0) != SRF_OK) t->loaded_step = -1;
}

/* What the ops of a micro-batch depend on, but for what is uploaded. */
static struct srf__micro_batch_key key_of(const struct srf_trainer *t)
{
    return (struct srf__micro_batch_key){.kl_weight = srf_policy_kl(&t->config, t->step),
                                         .mse_weight = srf_policy_mse(&t->config, t->step),
                                         .attention = t->model->attention.kind,
                                         .features_trained = t->model->features_trained,
                                         .workspace = t->ctx->workspace};
}

static bool same_key(const struct srf__micro_batch_key *a, const struct srf__micro_batch_key *b)
{
    return a->kl_weight == b->kl_weight && a->mse_weight == b->mse_weight &&
           a->attention == b->attention && a->features_trained == b->features_trained &&
           a->workspace == b->workspace;
}

static srf_status queue_ops(struct srf_trainer *t, const struct srf__micro_batch_key *key)
{
    const struct srf_train_config *c = &t->config;
    struct srf_model *m = t->model;
    struct srf_batch batch = {.b = c->micro_batch, .t = c->seq_len, .on_device = true};
    bool teach = key->kl_weight > 0 || key->mse_weight > 0;
    if (teach) SRF_TRY(srf_model_forward(t->teacher, &batch));
    SRF_TRY(srf_model_forward(m, &batch));
    struct srf_loss_args loss = {.n = batch.b * batch.t,
                                 .scale = srf__mean_scale(c),
                                 .ce_weight = c->ce_weight,
                                 .kl_weight = key->kl_weight,
                                 .teacher = key->kl_weight > 0 ? t->teacher : NULL,
                                 .backward = true,
                                 .queue = true};
    SRF_TRY(srf_model_loss(m, &loss));
    /* Mean over layers, rows and channels, as the loss is a mean over rows. */
    m->attention_teacher = key->mse_weight > 0 ? t->teacher : NULL;
    m->attention_scale =
        key->mse_weight * srf__mean_scale(c) / (double)(m->config.n_layers * m->config.c);
    return srf_model_backward(m, &batch);
}

/* Not while ops are timed one by one. */
static bool records(const struct srf_trainer *t)
{
#ifdef SRF_SYNC_CHECK
    (void)t; /* every op waits for the device */
    return false;
#else
    return t->ctx->be->graph_begin && !t->ctx->profile;
#endif
}

/* A micro-batch runs once before it is recorded, so that all it needs (workspace, algorithms, code
 * on the device) is there. */
static srf_status run(struct srf_trainer *t)
{
    const struct srf_backend *be = t->ctx->be;
    struct srf__micro_batch_key key = key_of(t);
    if (!records(t)) return queue_ops(t, &key);
    if (!same_key(&key, &t->graph_key)) {
        be->graph_free(t->ctx, t->graph);
        t->graph = NULL;
        t->graph_key = key;
        return queue_ops(t, &key);
    }
    if (!t->graph) {
        SRF_TRY(be->graph_begin(t->ctx));
        SRF_TRY(srf_ctx_graph_end(t->ctx, queue_ops(t, &key), &t->graph));
    }
    return be->graph_launch(t->ctx, t->graph);
}

srf_status srf__micro_batch(struct srf_trainer *t, int64_t first)
{
    const struct srf_train_config *c = &t->config;
    struct srf__micro_batch_key key = key_of(t);
    struct srf_batch batch = {.b = c->micro_batch, .t = c->seq_len, .tokens = t->tokens};
    SRF_TRY(load(t, first));
    if (key.kl_weight > 0 || key.mse_weight > 0) SRF_TRY(srf_model_load(t->teacher, &batch, NULL));
    SRF_TRY(srf_model_load(t->model, &batch, t->targets));
    SRF_TRY(run(t));
    return srf_model_keep_losses(t->model, batch.b * batch.t,
                                 srf__loss_row(c) + first * c->seq_len);
}

void srf__micro_batch_free(struct srf_trainer *t)
{
    if (t->graph) t->ctx->be->graph_free(t->ctx, t->graph);
}
