#include "infer/engine.h"

#include <string.h>

struct srf_engine {
    struct srf_ctx *ctx; /* not owned */
    struct srf_arena *arena;
    struct srf_model *model;
    int64_t batch, chunk, at; /* at: tokens every sequence has seen */
    int slot_state;
    int32_t *piece, *pos; /* host (batch, chunk), (batch) */
};

srf_status srf_engine_create(struct srf_ctx *ctx, const struct srf_checkpoint *ck, int64_t batch,
                             int64_t chunk, struct srf_engine **out)
{
    *out = NULL;
    SRF_FAIL_IF(ck->attention.kind != SRF_ATTN_SRF, SRF_INVALID,
                "the model has softmax attention, which has no recurrent form: run srf retrofit "
                "first");
    SRF_FAIL_IF(batch < 1 || chunk < 1, SRF_INVALID, "batch %lld, chunk %lld: expected >= 1",
                (long long)batch, (long long)chunk);
    struct srf_engine *e;
    srf_status st = SRF_OK;
    SRF_TRY(SRF_CALLOC(e, 1));
    e->ctx = ctx;
    e->batch = batch;
    e->chunk = chunk;
    SRF_TRY_GO(srf_arena_create(ctx, &e->arena));
    SRF_TRY_GO(srf_model_create(ctx, &ck->config, &ck->attention, &e->model));
    struct srf_model_plan plan = {.b = batch, .t = chunk};
    SRF_TRY_GO(srf_model_plan(e->model, e->arena, &plan));
    SRF_TRY_GO(srf_arena_add(e->arena, "state", "recurrent state",
                             batch * srf_model_state_count(e->model), srf_ctx_acc(ctx),
                             &e->slot_state));
    SRF_TRY_GO(srf_arena_commit(e->arena));
    SRF_TRY_GO(srf_model_upload(e->model, ck));
    SRF_TRY_GO(SRF_ALLOC(e->piece, batch * chunk));
    SRF_TRY_GO(SRF_ALLOC(e->pos, batch));
    *out = e;
cleanup:
    if (st != SRF_OK) srf_engine_free(e);
    return st;
}

void srf_engine_free(struct srf_engine *e)
{
    if (!e) return;
    srf_model_free(e->model);
    srf_arena_free(e->arena);
    srf__free(e->piece);
    srf__free(e->pos);
    srf__free(e);
}

srf_status srf_engine_reset(struct srf_engine *e)
{
    e->at = 0;
    return e->ctx->be->zero(e->ctx, srf_arena_ptr(e->arena, e->slot_state),
                            (size_t)(e->batch * srf_engine_state_bytes(e)));
}

srf_status srf_engine_feed(struct srf_engine *e, const int32_t *tokens, int64_t t, float *logits)
{
    for (int64_t done = 0; done < t;) {
        int64_t n = t - done < e->chunk ? t - done : e->chunk;
        for (int64_t i = 0; i < e->batch; i++) {
            memcpy(e->piece + i * n, tokens + i * t + done, (size_t)n * sizeof *tokens);
            e->pos[i] = (int32_t)e->at;
        }
        struct srf_batch batch = {.b = e->batch,
                                  .t = n,
                                  .tokens = e->piece,
                                  .mode = n == 1 ? SRF_MODE_STEP : SRF_MODE_PREFILL,
                                  .state = srf_arena_ptr(e->arena, e->slot_state),
                                  .pos = e->pos};
        SRF_TRY(srf_model_forward(e->model, &batch));
        done += n;
        e->at += n;
        if (done == t && logits) SRF_TRY(srf_model_last_logits(e->model, &batch, logits));
    }
    return SRF_OK;
}

int64_t srf_engine_position(const struct srf_engine *e)
{
    return e->at;
}

const struct srf_model *srf_engine_model(const struct srf_engine *e)
{
    return e->model;
}

int64_t srf_engine_state_bytes(const struct srf_engine *e)
{
    return srf_model_state_count(e->model) * (int64_t)srf_dtype_bytes(srf_ctx_acc(e->ctx));
}

int64_t srf_engine_kv_bytes(const struct srf_engine *e, int64_t t)
{
    const struct srf_model_config *cfg = &e->model->config;
    return 2 * t * cfg->n_layers * cfg->c * (int64_t)srf_dtype_bytes(e->ctx->dtype);
}
