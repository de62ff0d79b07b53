/* Continuous batching: ten thousand requests of random lengths, none lost, none repeated, each with
 * what it gets alone, bit for bit. */
#include "tests/support.h"
#include "infer/serve.h"

#include <stdlib.h>
#include <string.h>

enum { N = 10000, V = 29, N_POS = 64, MOST = 16, STOP = 5, CALLER_STOP = 7, MAX_SLOTS = 64 };

static const char config_json[] =
    "{\"model_type\": \"gpt2\", \"n_layer\": 1, \"n_head\": 2, \"n_embd\": 16, \"n_positions\": 64,"
    " \"vocab_size\": 29, \"activation_function\": \"gelu_new\"}";

struct work {
    int32_t prompt[N_POS], text[MOST], alone[MOST];
    int64_t n_prompt, max_new, n, n_alone;
    int times_done;
    enum srf_finish how;
};

struct queue {
    struct work *work;
    int64_t n, next, running, most;
    int64_t withhold; /* every so many calls there is nothing for now */
    int64_t calls, rounds, stop_at;
};

static srf_status next(void *user, struct srf_request *r, bool *got)
{
    struct queue *q = user;
    q->calls++;
    *got = q->next < q->n && !(q->withhold && q->running > 0 && q->calls % q->withhold == 0);
    if (!*got) return SRF_OK;
    struct work *w = &q->work[q->next];
    w->n = 0;
    w->times_done = 0;
    *r = (struct srf_request){.tokens = w->prompt,
                              .n_tokens = w->n_prompt,
                              .max_new = w->max_new,
                              .seed = 3,
                              .sequence = (uint64_t)q->next++,
                              .user = w};
    q->running++;
    if (q->running > q->most) q->most = q->running;
    return SRF_OK;
}

static srf_status token(void *user, const struct srf_request *r, int32_t token, bool *stop)
{
    struct work *w = r->user;
    (void)user;
    assert_int_equal(w->times_done, 0);
    assert_true(w->n < w->max_new && token >= 0 && token < V && token != STOP);
    w->text[w->n++] = token;
    *stop = token == CALLER_STOP;
    return SRF_OK;
}

static srf_status done(void *user, const struct srf_request *r, enum srf_finish how)
{
    struct queue *q = user;
    struct work *w = r->user;
    w->times_done++;
    w->how = how;
    q->running--;
    return SRF_OK;
}

static srf_status each_round(void *user, bool *stop)
{
    struct queue *q = user;
    *stop = ++q->rounds == q->stop_at;
    return SRF_OK;
}

static struct srf_engine *engine(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                                 int64_t slots)
{
    struct srf_engine *e;
    struct srf_engine_config config = {.slots = slots,
                                       .prefill_rows = 32,
                                       .sampler = {.temperature = 0.9, .top_p = 0.95},
                                       .stop = STOP};
    test_ok(srf_engine_create(ctx, ck, &config, &e));
    return e;
}

static void make_work(struct work *work)
{
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 60, 0, 0);
    for (int64_t i = 0; i < N; i++) {
        work[i].n_prompt = 1 + (int64_t)srf_rng_below(&r, N_POS - MOST);
        work[i].max_new = 1 + (int64_t)srf_rng_below(&r, MOST);
        for (int64_t k = 0; k < work[i].n_prompt; k++)
            work[i].prompt[k] = (int32_t)srf_rng_below(&r, V);
    }
}

/* One after the other, without the server. */
static void run_alone(struct srf_engine *e, struct work *work)
{
    for (int64_t i = 0; i < N; i++) {
        struct work *w = &work[i];
        struct srf_engine_prompt p = {.tokens = w->prompt,
                                      .n_tokens = w->n_prompt,
                                      .max_new = w->max_new,
                                      .seed = 3,
                                      .sequence = (uint64_t)i};
        test_ok(srf_engine_admit(e, 1, &p));
        for (bool end = false; srf_engine_running(e, 0) && !end;) {
            int32_t id;
            test_ok(srf_engine_decode(e, 1, &id));
            if (id == STOP) break;
            w->alone[w->n_alone++] = id;
            end = id == CALLER_STOP;
        }
        srf_engine_release(e, 0);
    }
}

static struct srf_checkpoint *checkpoint(void)
{
    struct srf_checkpoint *ck;
    test_ok(srf_checkpoint_init(config_json, 11, &ck));
    for (int64_t i = 0; i < ck->table.total; i++) ck->params[i] *= 6;
    ck->attention.kind = SRF_ATTN_SRF;
    ck->attention.m = 4;
    ck->attention.window = 4;
    return ck;
}

static void ten_thousand(void **state)
{
    (void)state;
    struct work *work = calloc(N, sizeof *work);
    struct srf_checkpoint *ck = checkpoint();
    struct srf_ctx *ctx;
    test_ok(srf_ctx_create("cpu", SRF_F32, 1, &ctx));
    struct srf_engine *e = engine(ctx, ck, 1);
    make_work(work);
    run_alone(e, work);
    srf_engine_free(e);
    const struct {
        int64_t slots, steps, withhold;
    } cases[] = {{2, 1, 0}, {17, 3, 5}, {MAX_SLOTS, 4, 0}};
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        struct queue q = {.work = work, .n = N, .withhold = cases[k].withhold};
        e = engine(ctx, ck, cases[k].slots);
        struct srf_server s = {.engine = e,
                               .slots = cases[k].slots,
                               .shared = -1,
                               .steps = cases[k].steps,
                               .next = next,
                               .token = token,
                               .done = done,
                               .user = &q};
        test_ok(srf_serve(&s));
        assert_int_equal(q.next, N);
        assert_int_equal(q.running, 0);
        assert_true(q.most == cases[k].slots || q.withhold);
        int64_t how[3] = {0};
        for (int64_t i = 0; i < N; i++) {
            assert_int_equal(work[i].times_done, 1);
            assert_int_equal(work[i].n, work[i].n_alone);
            assert_memory_equal(work[i].text, work[i].alone, (size_t)work[i].n * 4);
            how[work[i].how]++;
        }
        assert_true(how[SRF_FINISH_LENGTH] > 100 && how[SRF_FINISH_STOP] > 100 &&
                    how[SRF_FINISH_CALLER] > 100);
        for (int64_t i = 0; i < cases[k].slots; i++) assert_false(srf_engine_running(e, i));
        srf_engine_free(e);
    }
    srf_ctx_free(ctx);
    srf_checkpoint_free(ck);
    free(work);
}

/* Given up in the middle, and served again; from a shared state; what it refuses. */
static void edges(void **state)
{
    (void)state;
    enum { SOME = 40, SLOTS = 6 };
    struct work *work = calloc(N, sizeof *work);
    struct srf_checkpoint *ck = checkpoint();
    struct srf_ctx *ctx;
    test_ok(srf_ctx_create("cpu", SRF_F32, 1, &ctx));
    struct srf_engine *e = engine(ctx, ck, SLOTS + 1), *one = engine(ctx, ck, 1);
    make_work(work);
    struct queue q = {.work = work, .n = SOME, .stop_at = 5};
    struct srf_server s = {.engine = e,
                           .slots = SLOTS,
                           .shared = -1,
                           .steps = 1,
                           .next = next,
                           .token = token,
                           .done = done,
                           .round = each_round,
                           .user = &q};
    test_ok(srf_serve(&s));
    assert_int_equal(q.rounds, 5);
    assert_true(q.next < SOME && q.running > 0);
    for (int64_t i = 0; i < SLOTS; i++) assert_false(srf_engine_running(e, i));

    /* Each goes on from the prefix; alone it is fed the prefix itself. */
    const int32_t prefix[] = {1, 2, 3, 4, 9};
    struct srf_engine_prompt p = {.slot = SLOTS, .tokens = prefix, .n_tokens = 5};
    test_ok(srf_engine_admit(e, 1, &p));
    for (int64_t i = 0; i < SOME; i++)
        if (work[i].n_prompt > 20) work[i].n_prompt = 20;
    q = (struct queue){.work = work, .n = SOME};
    s.shared = SLOTS;
    test_ok(srf_serve(&s));
    assert_int_equal(srf_engine_position(e, SLOTS), 5);
    for (int64_t i = 0; i < SOME; i++) {
        struct work *w = &work[i];
        int32_t out[MOST];
        p.slot = 0;
        test_ok(srf_engine_admit(one, 1, &p));
        struct srf_engine_prompt rest = {.tokens = w->prompt,
                                         .n_tokens = w->n_prompt,
                                         .resume = true,
                                         .max_new = w->max_new,
                                         .seed = 3,
                                         .sequence = (uint64_t)i};
        test_ok(srf_engine_admit(one, 1, &rest));
        test_ok(srf_engine_decode(one, MOST, out));
        srf_engine_release(one, 0);
        assert_int_equal(w->times_done, 1);
        assert_memory_equal(w->text, out, (size_t)w->n * 4);
        assert_true(w->how != SRF_FINISH_STOP || out[w->n] == STOP);
        assert_true(w->how != SRF_FINISH_LENGTH || w->n == w->max_new);
    }

    s.shared = 2; /* one of those in use */
    assert_int_equal(srf_serve(&s), SRF_INVALID);
    s.shared = -1;
    s.slots = SLOTS + 2;
    assert_int_equal(srf_serve(&s), SRF_INVALID);
    s.slots = SLOTS;
    s.steps = 0;
    assert_int_equal(srf_serve(&s), SRF_INVALID);
    srf_engine_free(e);
    srf_engine_free(one);
    srf_ctx_free(ctx);
    srf_checkpoint_free(ck);
    free(work);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(ten_thousand), cmocka_unit_test(edges)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
