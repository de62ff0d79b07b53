/* Continuous batching: any number of requests through the slots of an engine. A slot that becomes
 * free takes the next request at once; the text of a request does not depend on the others (see
 * engine.h).
 *
 *     struct srf_server s = {.engine = e, .slots = n, .shared = -1, .steps = 1, .next = next,
 *                            .token = token, .done = done, .user = me};
 *     SRF_TRY(srf_serve(&s));
 */
#pragma once
#include "infer/engine.h"

struct srf_request {
    const int32_t *tokens; /* the caller's, until done */
    int64_t n_tokens;      /* >= 1 */
    int64_t max_new;       /* >= 1 */
    uint64_t seed, sequence;
    int64_t first; /* as in srf_engine_prompt */
    void *user;
};

enum srf_finish {
    SRF_FINISH_LENGTH, /* max_new tokens */
    SRF_FINISH_STOP,   /* the engine's stop token, not given to `token` */
    SRF_FINISH_CALLER  /* `token` asked for it */
};

struct srf_server {
    struct srf_engine *engine;
    int64_t slots;  /* slots 0 .. slots - 1 are used, idle at the start */
    int64_t shared; /* a slot behind those, whose state every request continues; -1: none */
    int64_t steps;  /* tokens between checks for free slots: 1 wastes least, more launch less */
    /* The next request; *got = false: there is none now. Called again after the next tokens, while
     * anything runs. */
    srf_status (*next)(void *user, struct srf_request *request, bool *got);
    /* One more token of a request; *stop = true ends it. */
    srf_status (*token)(void *user, const struct srf_request *request, int32_t token, bool *stop);
    srf_status (*done)(void *user, const struct srf_request *request, enum srf_finish how);
    /* After each round of tokens; *stop = true ends all, running requests are dropped. May be
     * NULL. */
    srf_status (*round)(void *user, bool *stop);
    void *user;
};

/* Runs until nothing runs and next has no request. A request that the engine refuses (see
 * srf_engine_admit) is an error here: check it in next. An error, of a function above, too, ends
 * all as `round` may: the slots are idle then. */
srf_status srf_serve(const struct srf_server *server);
