/* Decoding. The bookkeeping of the slots is kept in one piece of device memory, the book. It is
 * uploaded before a number of steps and downloaded after them; the steps themselves (bookkeeping,
 * the model, sampling) need no host. If the backend records graphs of ops, a step is one launch. */
#include "infer/engine_internal.h"

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
    struct book b = srf__engine_book_at(srf_arena_ptr(e->arena, e->slot_book), n);
    void *feed, *pos;
    srf_model_inputs(e->model, &feed, &pos);
    return SRF_RUN(e->ctx, slots_next, .n = n, .stop = e->config.stop, .next = b.next,
                   .left = b.left, .at = b.at, .streams = b.streams, .feed = feed, .pos = pos,
                   .step = b.step, .n_steps = SRF__ENGINE_STEPS, .out = b.out);
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
    return srf__engine_launch(e, &batch, pos, NULL);
}

/* Slots that a recorded step of width i is made of. */
static int64_t width_of(const struct srf_engine *e, int i)
{
    return (e->config.slots + ((int64_t)1 << i) - 1) >> i;
}

static srf_status record_step(struct srf_engine *e, int width)
{
    SRF_TRY(e->ctx->be->graph_begin(e->ctx));
    srf_status st = step(e, width_of(e, width));
    SRF_TRY(srf_ctx_graph_end(e->ctx, st, &e->steps[width].graph));
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

/* Up to `steps`, SRF__ENGINE_STEPS at most, rows of tokens of slots 0 to n - 1; those of width i if
 * steps are recorded. */
static srf_status decode_some(struct srf_engine *e, int64_t n, int width, int64_t steps,
                              int32_t *tokens)
{
    struct book b = srf__engine_book_at(e->book, n);
    int64_t feeds = 0; /* steps after which all have ended, at the latest */
    for (int64_t i = 0; i < n; i++) {
        const struct slot *s = &e->slots[i];
        bool runs = s->phase == RUNNING;
        b.left[i] = runs ? (int32_t)s->left : 0;
        b.next[i] = runs ? s->next : 0;
        b.at[i] = runs ? (int32_t)s->at : 0;
        srf__engine_note_stream(s, s->sample - 1, b.streams + 3 * i);
        if (runs && s->next != e->config.stop && s->left - 1 > feeds) feeds = s->left - 1;
    }
    b.step[0] = b.step[1] = 0;
    SRF_TRY(srf__engine_book_upload(e, n));
    int64_t fed = steps < feeds ? steps : feeds, rows = fed < steps ? fed + 1 : fed;
    if (records(e)) {
        SRF_TRY(run_recorded(e, width, fed));
    } else {
        for (int64_t t = 0; t < fed; t++) SRF_TRY(step(e, n));
    }
    if (rows > fed) SRF_TRY(give_out(e, n));
    SRF_TRY(srf__engine_book_download(e, n, rows));
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
    for (int64_t k = 0; k < rows * n; k++)
        SRF_TRY(srf__engine_check_token(k % n, b.out[k] == -2 ? -1 : 0));
    return SRF_OK;
}

srf_status srf_engine_decode(struct srf_engine *e, int64_t steps, int32_t *tokens)
{
    int64_t slots = e->config.slots;
    for (int64_t t = 0; t < steps;) {
        /* Slots up to the last one that runs. Where steps can be recorded all, or as narrow says,
         * so that what a sequence gets does not depend on who runs behind it. */
        int64_t n = slots, most = records(e) ? SRF__ENGINE_STEPS : 1;
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
