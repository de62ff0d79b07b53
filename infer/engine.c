/* The batch engine: life, launches, sizes. Prompts go in by engine_prompts.c, text comes out by
 * engine_decode.c, states are values in engine_states.c. */
#include "infer/engine_internal.h"

#include <string.h>

/* The arena of an engine, planned. */
static srf_status plan(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                       const struct srf_engine_config *c, struct srf_arena *arena,
                       struct srf_model **model, int *slot_state, int *slot_book)
{
    SRF_TRY(srf_model_create(ctx, &ck->config, &ck->attention, model));
    int64_t rows = c->prefill_rows > c->slots ? c->prefill_rows : c->slots;
    struct srf_model_plan p = {.b = c->slots, .t = (rows + c->slots - 1) / c->slots};
    SRF_TRY(srf_model_plan(*model, arena, &p));
    enum srf_dtype type = c->state_bf16 ? SRF_BF16 : srf_ctx_acc(ctx);
    int64_t bytes = srf_model_state_bytes(*model, c->state_bf16);
    SRF_TRY(srf_arena_add(arena, "state", "recurrent state",
                          c->slots * (bytes / (int64_t)srf_dtype_bytes(type)), type, slot_state));
    return srf_arena_add(arena, "activations", "slots", srf__engine_book_words(c->slots), SRF_I32,
                         slot_book);
}

static srf_status check(const struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                        const struct srf_engine_config *c)
{
    SRF_FAIL_IF(ck->attention.kind != SRF_ATTN_SRF, SRF_INVALID,
                "the model has %s attention, which has no recurrent form: run srf retrofit first",
                srf_attention_kind_name(ck->attention.kind));
    SRF_FAIL_IF(c->slots < 1 || c->prefill_rows < 1, SRF_INVALID,
                "%lld slots, %lld rows of prefill: expected >= 1", (long long)c->slots,
                (long long)c->prefill_rows);
    SRF_FAIL_IF(c->state_bf16 && ctx->dtype != SRF_BF16, SRF_UNSUPPORTED,
                "states in bf16 go with a model in bf16, not %s", srf_dtype_name(ctx->dtype));
    return srf_sampler_check(&c->sampler);
}

srf_status srf_engine_create(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                             const struct srf_engine_config *config, struct srf_engine **out)
{
    *out = NULL;
    SRF_TRY(check(ctx, ck, config));
    struct srf_engine *e;
    srf_status st = SRF_OK;
    int64_t slots = config->slots;
    SRF_TRY(SRF_CALLOC(e, 1));
    e->ctx = ctx;
    e->config = *config;
    SRF_TRY_GO(srf_arena_create(ctx, &e->arena));
    SRF_TRY_GO(plan(ctx, ck, config, e->arena, &e->model, &e->slot_state, &e->slot_book));
    SRF_TRY_GO(srf_arena_commit(e->arena));
    SRF_TRY_GO(srf_model_upload(e->model, ck));
    e->model->positions = config->positions;
    int64_t rows = e->model->plan.b * e->model->plan.t;
    SRF_TRY_GO(SRF_CALLOC(e->slots, slots));
    SRF_TRY_GO(SRF_ALLOC(e->piece, rows));
    SRF_TRY_GO(SRF_ALLOC(e->lens, slots));
    SRF_TRY_GO(SRF_ALLOC(e->where, slots));
    SRF_TRY_GO(SRF_ALLOC(e->pos, slots));
    SRF_TRY_GO(SRF_ALLOC(e->wanted, slots));
    SRF_TRY_GO(SRF_ALLOC(e->book, (srf__engine_book_words(slots) + 1) / 2));
    *out = e;
cleanup:
    if (st != SRF_OK) srf_engine_free(e);
    return st;
}

void srf_engine_free(struct srf_engine *e)
{
    if (!e) return;
    for (int i = 0; i < SRF__ENGINE_WIDTHS; i++)
        if (e->steps[i].graph) e->ctx->be->graph_free(e->ctx, e->steps[i].graph);
    srf_model_free(e->model);
    srf_arena_free(e->arena);
    srf__free(e->slots);
    srf__free(e->piece);
    srf__free(e->lens);
    srf__free(e->where);
    srf__free(e->pos);
    srf__free(e->wanted);
    srf__free(e->book);
    srf__free(e);
}

/* ---- launches -------------------------------------------------------------------------------- */

srf_status srf__engine_launch(struct srf_engine *e, const struct srf_batch *batch, const void *pos,
                              float *logits)
{
    struct srf_ctx *ctx = e->ctx;
    const struct srf_sampler_config *c = &e->config.sampler;
    const struct book b = srf__engine_book_at(srf_arena_ptr(e->arena, e->slot_book), batch->b);
    const struct srf_sample_args args = {.temperature = c->temperature,
                                         .top_k = c->top_k,
                                         .top_p = c->top_p,
                                         .streams = b.streams,
                                         .pos = pos,
                                         .tokens = b.next};
    bool before = ctx->exact_rows;
    ctx->exact_rows = true;
    srf_status st = srf_model_forward(e->model, batch);
    if (st == SRF_OK && pos) st = srf_model_sample(e->model, batch, &args);
    if (st == SRF_OK && logits) st = srf_model_last_logits(e->model, batch, logits);
    ctx->exact_rows = before;
    if (st != SRF_OK) srf__trace(__FILE__, __LINE__);
    return st;
}

srf_status srf__engine_book_upload(struct srf_engine *e, int64_t n)
{
    return e->ctx->be->upload(e->ctx, srf_arena_ptr(e->arena, e->slot_book), e->book,
                              (size_t)(9 * n + 2) * sizeof(int32_t));
}

srf_status srf__engine_book_download(struct srf_engine *e, int64_t n, int64_t steps)
{
    struct book device = srf__engine_book_at(srf_arena_ptr(e->arena, e->slot_book), n);
    return e->ctx->be->download(e->ctx, srf__engine_book_at(e->book, n).left, device.left,
                                (size_t)((3 + steps) * n + 2) * sizeof(int32_t));
}

void srf__engine_note_stream(const struct slot *s, int64_t sample, uint64_t stream[3])
{
    stream[0] = s->seed;
    stream[1] = s->sequence;
    stream[2] = (uint64_t)sample;
}

srf_status srf__engine_check_token(int64_t slot, int32_t token)
{
    SRF_FAIL_IF(token < 0, SRF_NONFINITE, "slot %lld: the logits of its next token are not finite",
                (long long)slot);
    return SRF_OK;
}

int64_t srf__engine_book_words(int64_t n)
{
    return (9 + SRF__ENGINE_STEPS) * n + 2;
}

struct book srf__engine_book_at(void *p, int64_t n)
{
    struct book b = {.streams = p, .left = (int32_t *)p + 6 * n};
    b.next = b.left + n;
    b.at = b.next + n;
    b.step = b.at + n;
    b.out = b.step + 2;
    return b;
}

void srf_engine_release(struct srf_engine *e, int64_t slot)
{
    e->slots[slot].phase = IDLE;
}

void srf_engine_narrow(struct srf_engine *e, bool narrow)
{
    e->narrow = narrow;
}

bool srf_engine_running(const struct srf_engine *e, int64_t slot)
{
    return e->slots[slot].phase == RUNNING;
}

int64_t srf_engine_position(const struct srf_engine *e, int64_t slot)
{
    return e->slots[slot].at;
}

/* ---- all slots in step ----------------------------------------------------------------------- */

srf_status srf_engine_reset(struct srf_engine *e)
{
    for (int64_t i = 0; i < e->config.slots; i++) e->slots[i] = (struct slot){.phase = IDLE};
    return e->ctx->be->zero(e->ctx, srf_arena_ptr(e->arena, e->slot_state),
                            (size_t)(e->config.slots * srf_engine_state_bytes(e)));
}

srf_status srf_engine_feed(struct srf_engine *e, const int32_t *tokens, int64_t t, float *logits)
{
    int64_t b = e->config.slots;
    for (int64_t i = 0; i < b; i++) SRF_TRY(srf__engine_check_slot(e, i, true));
    for (int64_t done = 0; done < t;) {
        int64_t n = t - done < e->model->plan.t ? t - done : e->model->plan.t;
        for (int64_t i = 0; i < b; i++) {
            memcpy(e->piece + i * n, tokens + i * t + done, (size_t)n * sizeof *tokens);
            e->pos[i] = (int32_t)e->slots[i].at;
        }
        struct srf_batch batch = {.b = b,
                                  .t = n,
                                  .tokens = e->piece,
                                  .mode = n == 1 ? SRF_MODE_STEP : SRF_MODE_PREFILL,
                                  .state = srf_arena_ptr(e->arena, e->slot_state),
                                  .state_bf16 = e->config.state_bf16,
                                  .pos = e->pos,
                                  .last_only = true};
        done += n;
        SRF_TRY(srf__engine_launch(e, &batch, NULL, done == t ? logits : NULL));
        for (int64_t i = 0; i < b; i++) e->slots[i].at += n;
    }
    return SRF_OK;
}

/* ---- sizes ----------------------------------------------------------------------------------- */

const struct srf_model *srf_engine_model(const struct srf_engine *e)
{
    return e->model;
}

const struct srf_engine_config *srf_engine_config(const struct srf_engine *e)
{
    return &e->config;
}

int64_t srf_engine_state_bytes(const struct srf_engine *e)
{
    return srf_model_state_bytes(e->model, e->config.state_bf16);
}

int64_t srf_engine_state_values(const struct srf_engine *e)
{
    return srf_model_state_count(e->model);
}

int64_t srf_engine_value_bytes(const struct srf_engine *e)
{
    return srf_engine_state_values(e) * (int64_t)srf_dtype_bytes(srf_ctx_acc(e->ctx));
}

enum srf_dtype srf_engine_state_dtype(const struct srf_engine *e)
{
    return e->config.state_bf16 ? SRF_BF16 : srf_ctx_acc(e->ctx);
}

int64_t srf_engine_kv_bytes(const struct srf_engine *e, int64_t t)
{
    const struct srf_model_config *cfg = &e->model->config;
    return 2 * t * cfg->n_layers * cfg->c * (int64_t)srf_dtype_bytes(e->ctx->dtype);
}

/* Bytes of an engine of so many slots on the device. */
static srf_status engine_bytes(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                               struct srf_engine_config config, int64_t slots, int64_t *bytes)
{
    struct srf_arena *arena = NULL;
    struct srf_model *model = NULL;
    srf_status st = SRF_OK;
    int slot_state, slot_book;
    config.slots = slots;
    SRF_TRY_GO(srf_arena_create(ctx, &arena));
    SRF_TRY_GO(plan(ctx, ck, &config, arena, &model, &slot_state, &slot_book));
    *bytes = (int64_t)srf_arena_bytes(arena, NULL);
cleanup:
    srf_model_free(model);
    srf_arena_free(arena);
    return st;
}

srf_status srf_engine_fits(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                           const struct srf_engine_config *config, int64_t bytes, int64_t limit,
                           int64_t *slots, int64_t *taken)
{
    struct srf_engine_config c = *config;
    c.slots = 1;
    SRF_TRY(check(ctx, ck, &c));
    *slots = *taken = 0;
    /* Bisection: what is larger than `low` and at most `high` is not known yet. */
    for (int64_t low = 0, high = limit, need; low < high;) {
        int64_t middle = low + (high - low + 1) / 2;
        SRF_TRY(engine_bytes(ctx, ck, c, middle, &need));
        if (need <= bytes) {
            *slots = low = middle;
            *taken = need;
        } else {
            high = middle - 1;
        }
    }
    return SRF_OK;
}
