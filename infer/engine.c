/* Decoding: what the slots are up to lies in one piece of the device's memory, the book. It goes
 * there before some steps and comes back after them; the steps themselves (bookkeeping, the model,
 * sampling) need no host. Where the backend records graphs of ops, a step is one launch. */
#include "infer/engine_internal.h"

#include <stdint.h>
#include <string.h>

#define STEPS 64 /* decoded at once, where the device goes on alone */

/* Arrays of n slots, or of n sequences of a prefill, as in the ops sample and slots_next. All but
 * `out` goes to the device, `left` and what follows comes back. */
struct book {
    uint64_t *streams;         /* (n, 3) */
    int32_t *left, *next, *at; /* (n) */
    int32_t *step;             /* (2): one, and what keeps a row of `out` from lying askew */
    int32_t *out;              /* (STEPS, n) */
};

/* Numbers of 32 bits in a book, and where its arrays are. */
static int64_t book_words(int64_t n)
{
    return (9 + STEPS) * n + 2;
}

static struct book book_at(void *p, int64_t n)
{
    struct book b = {.streams = p, .left = (int32_t *)p + 6 * n};
    b.next = b.left + n;
    b.at = b.next + n;
    b.step = b.at + n;
    b.out = b.step + 2;
    return b;
}

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
    return srf_arena_add(arena, "activations", "slots", book_words(c->slots), SRF_I32, slot_book);
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
    SRF_TRY_GO(SRF_ALLOC(e->book, (book_words(slots) + 1) / 2));
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

/* ---- launches ------------------------------------------------------------------------------- */

/* The model on a batch: of each sequence the next token into `next` of the device's book, where
 * pos, on the device, is not negative; or logits to the host; or neither. Rows must not notice each
 * other. */
static srf_status launch(struct srf_engine *e, const struct srf_batch *batch, const void *pos,
                         float *logits)
{
    struct srf_ctx *ctx = e->ctx;
    const struct srf_sampler_config *c = &e->config.sampler;
    const struct book b = book_at(srf_arena_ptr(e->arena, e->slot_book), batch->b);
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

/* The book of n slots or sequences to the device, and back with so many rows of `out`. */
static srf_status book_upload(struct srf_engine *e, int64_t n)
{
    return e->ctx->be->upload(e->ctx, srf_arena_ptr(e->arena, e->slot_book), e->book,
                              (size_t)(9 * n + 2) * sizeof(int32_t));
}

static srf_status book_download(struct srf_engine *e, int64_t n, int64_t steps)
{
    struct book device = book_at(srf_arena_ptr(e->arena, e->slot_book), n);
    return e->ctx->be->download(e->ctx, book_at(e->book, n).left, device.left,
                                (size_t)((3 + steps) * n + 2) * sizeof(int32_t));
}

/* `sample`: the number that the book has of a slot; a step adds 1 before it samples. */
static void note_stream(const struct slot *s, int64_t sample, uint64_t stream[3])
{
    stream[0] = s->seed;
    stream[1] = s->sequence;
    stream[2] = (uint64_t)sample;
}

static srf_status check_token(int64_t slot, int32_t token)
{
    SRF_FAIL_IF(token < 0, SRF_NONFINITE, "slot %lld: the logits of its next token are not finite",
                (long long)slot);
    return SRF_OK;
}

/* ---- prompts -------------------------------------------------------------------------------- */

static srf_status check_prompt(const struct srf_engine *e, const struct srf_engine_prompt *p)
{
    int64_t at = p->resume && p->slot >= 0 && p->slot < e->config.slots ? e->slots[p->slot].at : 0;
    int64_t n_pos = e->config.positions == SRF_POS_ERROR ? e->model->config.n_pos : INT32_MAX;
    SRF_TRY(srf__engine_check_slot(e, p->slot, true));
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

/* The prefill of a batch, some of whose sequences want their first token. */
static srf_status prefill_sample(struct srf_engine *e, const struct srf_batch *batch)
{
    int64_t n = batch->b;
    struct book b = book_at(e->book, n);
    memset(b.streams, 0, (size_t)(9 * n + 2) * sizeof(int32_t));
    for (int64_t i = 0; i < n; i++) {
        const struct slot *s = &e->slots[e->where[i]];
        b.at[i] = e->wanted[i] ? 0 : -1;
        note_stream(s, s->sample, b.streams + 3 * i);
    }
    SRF_TRY(book_upload(e, n));
    SRF_TRY(launch(e, batch, book_at(srf_arena_ptr(e->arena, e->slot_book), n).at, NULL));
    SRF_TRY(book_download(e, n, 0));
    for (int64_t i = 0; i < n; i++) {
        if (!e->wanted[i]) continue;
        struct slot *s = &e->slots[e->where[i]];
        SRF_TRY(check_token(e->where[i], b.next[i]));
        s->next = b.next[i];
        s->sample++;
    }
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
                              .state_bf16 = e->config.state_bf16,
                              .pos = e->pos,
                              .n_slots = e->config.slots,
                              .lens = e->lens,
                              .slots = e->where,
                              .last_only = true};
    SRF_TRY(any ? prefill_sample(e, &batch) : launch(e, &batch, NULL, NULL));
    for (int64_t i = 0; i < n; i++) e->slots[e->where[i]].at += e->lens[i];
    return SRF_OK;
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
    SRF_TRY(srf__engine_clear(e, n, prompts));
    for (int64_t i = 0; i < n; i++) {
        const struct srf_engine_prompt *p = &prompts[i];
        struct slot *s = &e->slots[p->slot];
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

/* Whether steps are recorded. Not while ops are timed one by one. */
static bool records(const struct srf_engine *e)
{
#ifdef SRF_SYNC_CHECK
    (void)e; /* every op waits for the device */
    return false;
#else
    return e->ctx->be->graph_begin && !e->ctx->profile;
#endif
}

/* A step of slots 0 to n - 1, which only the device knows about: each gives out what it has, and
 * what does not end it is fed. */
static srf_status give_out(struct srf_engine *e, int64_t n)
{
    struct book b = book_at(srf_arena_ptr(e->arena, e->slot_book), n);
    void *feed, *pos;
    srf_model_inputs(e->model, &feed, &pos);
    return SRF_RUN(e->ctx, slots_next, .n = n, .stop = e->config.stop, .next = b.next,
                   .left = b.left, .at = b.at, .streams = b.streams, .feed = feed, .pos = pos,
                   .step = b.step, .n_steps = STEPS, .out = b.out);
}

static srf_status step(struct srf_engine *e, int64_t n)
{
    void *feed, *pos;
    srf_model_inputs(e->model, &feed, &pos);
    struct srf_batch batch = {.b = n,
                              .t = 1,
                              .mode = SRF_MODE_STEP,
                              .state = srf_arena_ptr(e->arena, e->slot_state),
                              .state_bf16 = e->config.state_bf16,
                              .n_slots = e->config.slots,
                              .on_device = true};
    SRF_TRY(give_out(e, n));
    return launch(e, &batch, pos, NULL);
}

/* Slots that a recorded step of width i is made of. */
static int64_t width_of(const struct srf_engine *e, int i)
{
    return (e->config.slots + ((int64_t)1 << i) - 1) >> i;
}

static srf_status record_step(struct srf_engine *e, int width)
{
    const struct srf_backend *be = e->ctx->be;
    SRF_TRY(be->graph_begin(e->ctx));
    srf_status st = step(e, width_of(e, width));
    srf_status end = be->graph_end(e->ctx, &e->steps[width].graph);
    SRF_TRY(st);
    SRF_TRY(end);
    e->steps[width].workspace = e->ctx->workspace;
    return SRF_OK;
}

/* Before a step is recorded it runs once, so that all it needs (workspace, algorithms, code on the
 * device) is there. */
static srf_status run_recorded(struct srf_engine *e, int width, int64_t steps)
{
    const struct srf_backend *be = e->ctx->be;
    void **graph = &e->steps[width].graph;
    if (*graph && e->steps[width].workspace != e->ctx->workspace) {
        be->graph_free(e->ctx, *graph);
        *graph = NULL;
    }
    if (!*graph && steps > 0) {
        SRF_TRY(step(e, width_of(e, width)));
        SRF_TRY(record_step(e, width));
        steps--;
    }
    for (int64_t t = 0; t < steps; t++) SRF_TRY(be->graph_launch(e->ctx, *graph));
    return SRF_OK;
}

/* Up to `steps` <= STEPS rows of tokens of slots 0 to n - 1, those of width i if steps are
 * recorded. */
static srf_status decode_some(struct srf_engine *e, int64_t n, int width, int64_t steps,
                              int32_t *tokens)
{
    struct book b = book_at(e->book, n);
    int64_t feeds = 0; /* steps after which all have ended, at the latest */
    for (int64_t i = 0; i < n; i++) {
        const struct slot *s = &e->slots[i];
        bool runs = s->phase == RUNNING;
        b.left[i] = runs ? (int32_t)s->left : 0;
        b.next[i] = runs ? s->next : 0;
        b.at[i] = runs ? (int32_t)s->at : 0;
        note_stream(s, s->sample - 1, b.streams + 3 * i);
        if (runs && s->next != e->config.stop && s->left - 1 > feeds) feeds = s->left - 1;
    }
    b.step[0] = b.step[1] = 0;
    SRF_TRY(book_upload(e, n));
    int64_t fed = steps < feeds ? steps : feeds, rows = fed < steps ? fed + 1 : fed;
    if (records(e)) {
        SRF_TRY(run_recorded(e, width, fed));
    } else {
        for (int64_t t = 0; t < fed; t++) SRF_TRY(step(e, n));
    }
    if (rows > fed) SRF_TRY(give_out(e, n));
    SRF_TRY(book_download(e, n, rows));
    for (int64_t t = 0; t < steps; t++)
        for (int64_t i = 0; i < e->config.slots; i++)
            tokens[t * e->config.slots + i] = t < rows && i < n ? b.out[t * n + i] : -1;
    for (int64_t i = 0; i < n; i++) {
        struct slot *s = &e->slots[i];
        if (s->phase != RUNNING) continue;
        s->sample += b.at[i] - s->at;
        s->at = b.at[i];
        s->left = b.left[i];
        s->next = b.next[i];
        if (s->left == 0) s->phase = ENDED;
    }
    for (int64_t k = 0; k < rows * n; k++) SRF_TRY(check_token(k % n, b.out[k] == -2 ? -1 : 0));
    return SRF_OK;
}

srf_status srf_engine_decode(struct srf_engine *e, int64_t steps, int32_t *tokens)
{
    int64_t slots = e->config.slots;
    for (int64_t t = 0; t < steps;) {
        /* Slots up to the last one that runs. Where steps can be recorded all, or as narrow says,
         * so that what a sequence gets does not depend on who runs behind it. */
        int64_t n = slots, most = records(e) ? STEPS : 1;
        int width = 0;
        while (n > 0 && e->slots[n - 1].phase != RUNNING) n--;
        int64_t some = steps - t < most ? steps - t : most;
        if (n == 0) {
            for (int64_t i = t * slots; i < steps * slots; i++) tokens[i] = -1;
            return SRF_OK;
        }
        if (e->ctx->be->graph_begin) {
            while (e->narrow && width + 1 < SRF__ENGINE_WIDTHS && width_of(e, width + 1) >= n)
                width++;
            n = width_of(e, width);
        }
        SRF_TRY(decode_some(e, n, width, some, tokens + t * slots));
        t += some;
    }
    return SRF_OK;
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
        SRF_TRY(launch(e, &batch, NULL, done == t ? logits : NULL));
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
