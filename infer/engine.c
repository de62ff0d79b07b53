#include "infer/engine.h"

#include <string.h>

enum phase { IDLE, RUNNING, ENDED };

struct slot {
    enum phase phase;
    int32_t next; /* running: the token made last, neither given out nor fed yet */
    int64_t at;   /* tokens fed */
    int64_t left; /* running: tokens to give out, next among them */
    int64_t sample;
    uint64_t seed, sequence;
};

struct srf_engine {
    struct srf_ctx *ctx; /* not owned */
    struct srf_arena *arena;
    struct srf_model *model;
    struct srf_engine_config config;
    struct slot *slots;
    int slot_state;
    /* Host, of a launch: (rows) tokens; (slots) lengths, slots, positions, who wants a sample. */
    int32_t *piece, *lens, *where, *pos;
    bool *wanted;
    float *logits; /* (slots, vocab) */
};

/* The arena of an engine, planned. */
static srf_status plan(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                       const struct srf_engine_config *c, struct srf_arena *arena,
                       struct srf_model **model, int *slot_state)
{
    SRF_TRY(srf_model_create(ctx, &ck->config, &ck->attention, model));
    int64_t rows = c->prefill_rows > c->slots ? c->prefill_rows : c->slots;
    struct srf_model_plan p = {.b = c->slots, .t = (rows + c->slots - 1) / c->slots};
    SRF_TRY(srf_model_plan(*model, arena, &p));
    return srf_arena_add(arena, "state", "recurrent state",
                         c->slots * srf_model_state_count(*model), srf_ctx_acc(ctx), slot_state);
}

static srf_status check(const struct srf_checkpoint *ck, const struct srf_engine_config *c)
{
    SRF_FAIL_IF(ck->attention.kind != SRF_ATTN_SRF, SRF_INVALID,
                "the model has softmax attention, which has no recurrent form: run srf retrofit "
                "first");
    SRF_FAIL_IF(c->slots < 1 || c->prefill_rows < 1, SRF_INVALID,
                "%lld slots, %lld rows of prefill: expected >= 1", (long long)c->slots,
                (long long)c->prefill_rows);
    SRF_FAIL_IF(c->state_bf16, SRF_UNSUPPORTED, "states in bf16 are not supported here");
    return srf_sampler_check(&c->sampler);
}

srf_status srf_engine_create(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                             const struct srf_engine_config *config, struct srf_engine **out)
{
    *out = NULL;
    SRF_TRY(check(ck, config));
    struct srf_engine *e;
    srf_status st = SRF_OK;
    int64_t slots = config->slots;
    SRF_TRY(SRF_CALLOC(e, 1));
    e->ctx = ctx;
    e->config = *config;
    SRF_TRY_GO(srf_arena_create(ctx, &e->arena));
    SRF_TRY_GO(plan(ctx, ck, config, e->arena, &e->model, &e->slot_state));
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
    SRF_TRY_GO(SRF_ALLOC(e->logits, slots * ck->config.vocab));
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
    srf__free(e->slots);
    srf__free(e->piece);
    srf__free(e->lens);
    srf__free(e->where);
    srf__free(e->pos);
    srf__free(e->wanted);
    srf__free(e->logits);
    srf__free(e);
}

/* ---- states --------------------------------------------------------------------------------- */

/* Bytes of a slot's state in one layer, which lie together. */
static size_t layer_bytes(const struct srf_engine *e)
{
    return (size_t)(srf_engine_state_bytes(e) / e->model->config.n_layers);
}

static char *state_at(const struct srf_engine *e, int64_t layer, int64_t slot)
{
    size_t place = (size_t)(layer * e->config.slots + slot);
    return (char *)srf_arena_ptr(e->arena, e->slot_state) + place * layer_bytes(e);
}

static srf_status check_slot(const struct srf_engine *e, int64_t slot, bool idle)
{
    SRF_FAIL_IF(slot < 0 || slot >= e->config.slots, SRF_INVALID, "slot %lld: expected 0 to %lld",
                (long long)slot, (long long)e->config.slots - 1);
    SRF_FAIL_IF(idle && e->slots[slot].phase == RUNNING, SRF_INVALID, "slot %lld is running",
                (long long)slot);
    return SRF_OK;
}

static srf_status clear_slot(struct srf_engine *e, int64_t slot)
{
    e->slots[slot] = (struct slot){.phase = IDLE};
    for (int64_t l = 0; l < e->model->config.n_layers; l++)
        SRF_TRY(e->ctx->be->zero(e->ctx, state_at(e, l, slot), layer_bytes(e)));
    return SRF_OK;
}

srf_status srf_engine_state_get(const struct srf_engine *e, int64_t slot, void *values)
{
    size_t n = layer_bytes(e);
    SRF_TRY(check_slot(e, slot, false));
    for (int64_t l = 0; l < e->model->config.n_layers; l++)
        SRF_TRY(
            e->ctx->be->download(e->ctx, (char *)values + (size_t)l * n, state_at(e, l, slot), n));
    return SRF_OK;
}

srf_status srf_engine_state_set(struct srf_engine *e, int64_t slot, const void *values,
                                int64_t position)
{
    size_t n = layer_bytes(e);
    SRF_TRY(check_slot(e, slot, true));
    SRF_FAIL_IF(position < 0 || position > INT32_MAX, SRF_INVALID, "position %lld of a state",
                (long long)position);
    e->slots[slot] = (struct slot){.phase = IDLE, .at = position};
    for (int64_t l = 0; l < e->model->config.n_layers; l++)
        SRF_TRY(e->ctx->be->upload(e->ctx, state_at(e, l, slot),
                                   (const char *)values + (size_t)l * n, n));
    return SRF_OK;
}

srf_status srf_engine_fork(struct srf_engine *e, int64_t from, int64_t to)
{
    SRF_TRY(check_slot(e, from, false));
    SRF_TRY(check_slot(e, to, true));
    if (from == to) return SRF_OK;
    e->slots[to] = (struct slot){.phase = IDLE, .at = e->slots[from].at};
    for (int64_t l = 0; l < e->model->config.n_layers; l++)
        SRF_TRY(e->ctx->be->copy(e->ctx, state_at(e, l, to), state_at(e, l, from), layer_bytes(e)));
    return SRF_OK;
}

/* ---- launches ------------------------------------------------------------------------------- */

/* The model on a batch; logits of the last tokens if wanted. Rows must not notice each other. */
static srf_status launch(struct srf_engine *e, const struct srf_batch *batch, float *logits)
{
    struct srf_ctx *ctx = e->ctx;
    bool before = ctx->exact_rows;
    ctx->exact_rows = true;
    srf_status st = srf_model_forward(e->model, batch);
    if (st == SRF_OK && logits) st = srf_model_last_logits(e->model, batch, logits);
    ctx->exact_rows = before;
    if (st != SRF_OK) srf__trace(__FILE__, __LINE__);
    return st;
}

/* The next token of each slot where[i] that wants one, i < n, from row i of the logits. */
static srf_status sample(struct srf_engine *e, int64_t n)
{
    int64_t vocab = e->model->config.vocab;
    srf_status st = SRF_OK;
    for (int64_t i = 0; i < n && st == SRF_OK; i++) {
        struct slot *s = &e->slots[e->where[i]];
        if (!e->wanted[i]) continue;
        st = srf_sample(&e->config.sampler, s->seed, s->sequence, s->sample++,
                        e->logits + i * vocab, vocab, &s->next);
    }
    return st;
}

/* ---- prompts -------------------------------------------------------------------------------- */

static srf_status check_prompt(const struct srf_engine *e, const struct srf_engine_prompt *p)
{
    int64_t at = p->resume && p->slot >= 0 && p->slot < e->config.slots ? e->slots[p->slot].at : 0;
    int64_t n_pos = e->config.positions == SRF_POS_ERROR ? e->model->config.n_pos : INT32_MAX;
    SRF_TRY(check_slot(e, p->slot, true));
    SRF_FAIL_IF(p->n_tokens < 1 || p->max_new < 0, SRF_INVALID,
                "a prompt of %lld tokens, %lld new ones: expected 1 and 0 at least",
                (long long)p->n_tokens, (long long)p->max_new);
    /* The last new token is never fed. */
    int64_t fed = p->max_new > 0 ? p->max_new - 1 : 0;
    SRF_FAIL_IF(p->n_tokens > n_pos - at || fed > n_pos - at - p->n_tokens, SRF_INVALID,
                "a prompt of %lld tokens at position %lld and %lld more: the model's learned "
                "positions end at %lld",
                (long long)p->n_tokens, (long long)at, (long long)p->max_new, (long long)n_pos);
    for (int64_t i = 0; i < p->n_tokens; i++)
        SRF_FAIL_IF(p->tokens[i] < 0 || p->tokens[i] >= e->model->config.vocab, SRF_MISMATCH,
                    "token id %d: the model's vocabulary has %lld", p->tokens[i],
                    (long long)e->model->config.vocab);
    return SRF_OK;
}

/* n pieces of prompts, collected in the engine's arrays. */
static srf_status prefill_launch(struct srf_engine *e, int64_t n)
{
    int64_t longest = 0;
    bool any = false;
    for (int64_t i = 0; i < n; i++) {
        longest = e->lens[i] > longest ? e->lens[i] : longest;
        any |= e->wanted[i];
    }
    struct srf_batch batch = {.b = n,
                              .t = longest,
                              .tokens = e->piece,
                              .mode = SRF_MODE_PREFILL,
                              .state = srf_arena_ptr(e->arena, e->slot_state),
                              .pos = e->pos,
                              .n_slots = e->config.slots,
                              .lens = e->lens,
                              .slots = e->where,
                              .last_only = true};
    SRF_TRY(launch(e, &batch, any ? e->logits : NULL));
    for (int64_t i = 0; i < n; i++) e->slots[e->where[i]].at += e->lens[i];
    return any ? sample(e, n) : SRF_OK;
}

/* Long prompts are cut at multiples of prefill_rows, whatever goes beside them; whole pieces are
 * packed into a launch while they fit. */
static srf_status prefill(struct srf_engine *e, int64_t n, const struct srf_engine_prompt *prompts)
{
    int64_t count = 0, rows = 0, most = e->config.prefill_rows;
    for (int64_t i = 0; i < n; i++) {
        const struct srf_engine_prompt *p = &prompts[i];
        for (int64_t done = 0; done < p->n_tokens;) {
            int64_t rest = p->n_tokens - done, len = rest < most ? rest : most;
            if (rows + len > most) {
                SRF_TRY(prefill_launch(e, count));
                count = rows = 0;
            }
            memcpy(e->piece + rows, p->tokens + done, (size_t)len * sizeof *e->piece);
            e->lens[count] = (int32_t)len;
            e->where[count] = (int32_t)p->slot;
            e->pos[count] = (int32_t)e->slots[p->slot].at;
            e->wanted[count++] = len == rest && p->max_new > 0;
            rows += len;
            done += len;
        }
    }
    return count ? prefill_launch(e, count) : SRF_OK;
}

srf_status srf_engine_admit(struct srf_engine *e, int64_t n,
                            const struct srf_engine_prompt *prompts)
{
    for (int64_t i = 0; i < n; i++) SRF_TRY(check_prompt(e, &prompts[i]));
    memset(e->wanted, 0, (size_t)e->config.slots);
    for (int64_t i = 0; i < n; i++) {
        SRF_FAIL_IF(e->wanted[prompts[i].slot], SRF_INVALID, "two prompts for slot %lld",
                    (long long)prompts[i].slot);
        e->wanted[prompts[i].slot] = true;
    }
    for (int64_t i = 0; i < n; i++) {
        const struct srf_engine_prompt *p = &prompts[i];
        struct slot *s = &e->slots[p->slot];
        if (!p->resume) SRF_TRY(clear_slot(e, p->slot));
        *s = (struct slot){.phase = IDLE,
                           .at = s->at,
                           .left = p->max_new,
                           .sample = p->first,
                           .seed = p->seed,
                           .sequence = p->sequence};
    }
    SRF_TRY(prefill(e, n, prompts));
    for (int64_t i = 0; i < n; i++)
        e->slots[prompts[i].slot].phase = prompts[i].max_new > 0 ? RUNNING : ENDED;
    return SRF_OK;
}

/* ---- decoding ------------------------------------------------------------------------------- */

/* Gives out what every running slot has, and feeds what does not end it. */
static srf_status decode_step(struct srf_engine *e, int32_t *tokens)
{
    int64_t n = 0; /* slots up to the last one that still runs */
    for (int64_t i = 0; i < e->config.slots; i++) {
        struct slot *s = &e->slots[i];
        tokens[i] = s->phase == RUNNING ? s->next : -1;
        if (s->phase == RUNNING && (--s->left == 0 || s->next == e->config.stop)) s->phase = ENDED;
        if (s->phase == RUNNING) n = i + 1;
    }
    if (n == 0) return SRF_OK;
    for (int64_t i = 0; i < n; i++) {
        const struct slot *s = &e->slots[i];
        e->wanted[i] = s->phase == RUNNING;
        e->where[i] = (int32_t)i;
        e->piece[i] = e->wanted[i] ? s->next : 0;
        e->pos[i] = e->wanted[i] ? (int32_t)s->at : -1;
    }
    struct srf_batch batch = {.b = n,
                              .t = 1,
                              .tokens = e->piece,
                              .mode = SRF_MODE_STEP,
                              .state = srf_arena_ptr(e->arena, e->slot_state),
                              .pos = e->pos,
                              .n_slots = e->config.slots};
    SRF_TRY(launch(e, &batch, e->logits));
    for (int64_t i = 0; i < n; i++) e->slots[i].at += e->wanted[i];
    return sample(e, n);
}

srf_status srf_engine_decode(struct srf_engine *e, int64_t steps, int32_t *tokens)
{
    for (int64_t t = 0; t < steps; t++) SRF_TRY(decode_step(e, tokens + t * e->config.slots));
    return SRF_OK;
}

void srf_engine_release(struct srf_engine *e, int64_t slot)
{
    e->slots[slot].phase = IDLE;
}

bool srf_engine_running(const struct srf_engine *e, int64_t slot)
{
    return e->slots[slot].phase == RUNNING;
}

int64_t srf_engine_position(const struct srf_engine *e, int64_t slot)
{
    return e->slots[slot].at;
}

/* ---- all slots in step ---------------------------------------------------------------------- */

srf_status srf_engine_reset(struct srf_engine *e)
{
    for (int64_t i = 0; i < e->config.slots; i++) e->slots[i] = (struct slot){.phase = IDLE};
    return e->ctx->be->zero(e->ctx, srf_arena_ptr(e->arena, e->slot_state),
                            (size_t)(e->config.slots * srf_engine_state_bytes(e)));
}

srf_status srf_engine_feed(struct srf_engine *e, const int32_t *tokens, int64_t t, float *logits)
{
    int64_t b = e->config.slots;
    for (int64_t i = 0; i < b; i++) SRF_TRY(check_slot(e, i, true));
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
                                  .pos = e->pos,
                                  .last_only = true};
        done += n;
        SRF_TRY(launch(e, &batch, done == t ? logits : NULL));
        for (int64_t i = 0; i < b; i++) e->slots[i].at += n;
    }
    return SRF_OK;
}

/* ---- sizes ---------------------------------------------------------------------------------- */

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
    return srf_model_state_count(e->model) * (int64_t)srf_dtype_bytes(srf_ctx_acc(e->ctx));
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
    int slot_state;
    config.slots = slots;
    SRF_TRY_GO(srf_arena_create(ctx, &arena));
    SRF_TRY_GO(plan(ctx, ck, &config, arena, &model, &slot_state));
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
    SRF_TRY(check(ck, &c));
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
