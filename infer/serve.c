#include "infer/serve.h"

struct serving {
    const struct srf_server *s;
    int64_t width;                     /* slots of the engine */
    struct srf_request *requests;      /* (slots) */
    bool *busy;                        /* (slots) */
    struct srf_engine_prompt *prompts; /* (slots) of an admission */
    int32_t *tokens;                   /* (steps, width) */
};

/* The shared state into the slots of n prompts, neighbours at once. */
static srf_status fork_shared(struct serving *v, int64_t n)
{
    const struct srf_server *s = v->s;
    for (int64_t i = 0, count; i < n; i += count) {
        int64_t first = v->prompts[i].slot;
        for (count = 1; i + count < n && v->prompts[i + count].slot == first + count;) count++;
        SRF_TRY(srf_engine_fork(s->engine, s->shared, first, count));
    }
    return SRF_OK;
}

/* Where less than half of the slots up to the last busy one are, those that are move to the first:
 * a step costs what it goes over. */
static srf_status draw_together(struct serving *v)
{
    const struct srf_server *s = v->s;
    int64_t busy = 0, end = 0;
    for (int64_t i = 0; i < s->slots; i++)
        if (v->busy[i]) busy++, end = i + 1;
    if (2 * busy > end) return SRF_OK;
    for (int64_t from = end - 1, to = 0; to < busy; to++) {
        if (v->busy[to]) continue;
        while (!v->busy[from]) from--;
        SRF_TRY(srf_engine_move(s->engine, from, to));
        v->requests[to] = v->requests[from];
        v->busy[to] = true;
        v->busy[from] = false;
    }
    return SRF_OK;
}

/* Requests into all free slots, the lowest first: steps run up to the last busy slot. *more: there
 * may be others. */
static srf_status fill(struct serving *v, bool *any, bool *more)
{
    const struct srf_server *s = v->s;
    int64_t n = 0;
    *more = true;
    for (int64_t i = 0; i < s->slots && *more; i++) {
        if (v->busy[i]) continue;
        struct srf_request *r = &v->requests[i];
        *r = (struct srf_request){0};
        SRF_TRY(s->next(s->user, r, more));
        if (!*more) break;
        v->busy[i] = true;
        v->prompts[n++] = (struct srf_engine_prompt){.slot = i,
                                                     .tokens = r->tokens,
                                                     .n_tokens = r->n_tokens,
                                                     .resume = s->shared >= 0,
                                                     .max_new = r->max_new,
                                                     .seed = r->seed,
                                                     .sequence = r->sequence,
                                                     .first = r->first};
    }
    if (s->shared >= 0) SRF_TRY(fork_shared(v, n));
    if (n) SRF_TRY(srf_engine_admit(s->engine, n, v->prompts));
    *any = false;
    for (int64_t i = 0; i < s->slots; i++) *any |= v->busy[i];
    return SRF_OK;
}

/* What the last steps made in a slot. */
static srf_status collect(struct serving *v, int64_t slot, int32_t stop_token)
{
    const struct srf_server *s = v->s;
    const struct srf_request *r = &v->requests[slot];
    enum srf_finish how = SRF_FINISH_LENGTH;
    bool ended = false;
    for (int64_t t = 0; t < s->steps && !ended; t++) {
        int32_t token = v->tokens[t * v->width + slot];
        if (token < 0) break;
        if (token == stop_token) {
            how = SRF_FINISH_STOP;
            break;
        }
        SRF_TRY(s->token(s->user, r, token, &ended));
        if (ended) how = SRF_FINISH_CALLER;
    }
    if (!ended && srf_engine_running(s->engine, slot)) return SRF_OK;
    srf_engine_release(s->engine, slot);
    v->busy[slot] = false;
    return s->done(s->user, r, how);
}

static srf_status serve(struct serving *v)
{
    const struct srf_server *s = v->s;
    int32_t stop_token = srf_engine_config(s->engine)->stop;
    bool stop = false;
    for (;;) {
        bool any, more;
        SRF_TRY(fill(v, &any, &more));
        if (!any) return SRF_OK;
        srf_engine_narrow(s->engine, !more);
        if (!more) SRF_TRY(draw_together(v));
        SRF_TRY(srf_engine_decode(s->engine, s->steps, v->tokens));
        for (int64_t i = 0; i < s->slots; i++)
            if (v->busy[i]) SRF_TRY(collect(v, i, stop_token));
        if (s->round) SRF_TRY(s->round(s->user, &stop));
        if (stop) return SRF_OK;
    }
}

srf_status srf_serve(const struct srf_server *s)
{
    struct serving v = {.s = s, .width = srf_engine_config(s->engine)->slots};
    srf_status st = SRF_OK;
    SRF_FAIL_IF(s->slots < 1 || s->slots > v.width || s->steps < 1 || s->shared >= v.width ||
                    (s->shared >= 0 && s->shared < s->slots),
                SRF_INVALID, "%lld slots of %lld, shared %lld, %lld steps", (long long)s->slots,
                (long long)v.width, (long long)s->shared, (long long)s->steps);
    SRF_TRY_GO(SRF_CALLOC(v.requests, s->slots));
    SRF_TRY_GO(SRF_CALLOC(v.busy, s->slots));
    SRF_TRY_GO(SRF_CALLOC(v.prompts, s->slots));
    SRF_TRY_GO(SRF_ALLOC(v.tokens, s->steps * v.width));
    st = serve(&v);
    for (int64_t i = 0; i < s->slots; i++) srf_engine_release(s->engine, i);
    srf_engine_narrow(s->engine, false);
cleanup:
    srf__free(v.requests);
    srf__free(v.busy);
    srf__free(v.prompts);
    srf__free(v.tokens);
    return st;
}
