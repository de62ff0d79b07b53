/* Continuous batching: ten thousand requests of random lengths, none lost, none repeated, each with
 * what it gets alone, bit for bit. */
#include "tests/ref/serving.h"
#include "tests/support.h"

#include <stdlib.h>
#include <string.h>

/* Under the sanitizers a part of them: what is wrong with memory shows in the first thousands. */
#ifdef SRF_GUARD_BANDS
enum { N = 2000, MAX_SLOTS = 64 };
#else
enum { N = 10000, MAX_SLOTS = 64 };
#endif

static void ten_thousand(void **state)
{
    (void)state;
    struct serving_work *work = serving_new(N);
    struct srf_checkpoint *ck = serving_model(1, 2, 8, 4, 4);
    struct srf_ctx *ctx;
    test_ok(srf_ctx_create("cpu", SRF_F32, 1, &ctx));
    struct srf_engine *e = serving_engine(ctx, ck, 1);
    serving_alone(e, work, N);
    srf_engine_free(e);
    const struct {
        int64_t slots, steps, withhold;
    } cases[] = {{2, 1, 0}, {17, 3, 5}, {MAX_SLOTS, 4, 0}};
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        e = serving_engine(ctx, ck, cases[k].slots);
        assert_int_equal(serving_all(e, cases[k].slots, cases[k].steps, cases[k].withhold, work, N),
                         0);
        srf_engine_free(e);
    }
    srf_ctx_free(ctx);
    srf_checkpoint_free(ck);
    free(work);
}

static srf_status no_token(void *user, const struct srf_request *r, int32_t token, bool *stop)
{
    (void)user, (void)r, (void)token, (void)stop;
    SRF_FAIL(SRF_IO, "a disk that is full");
}

/* Given up in the middle, and served again; from a shared state; what it refuses. */
static void edges(void **state)
{
    (void)state;
    enum { SOME = 40, SLOTS = 6 };
    struct serving_work *work = serving_new(SOME);
    struct srf_checkpoint *ck = serving_model(1, 2, 8, 4, 4);
    struct srf_ctx *ctx;
    test_ok(srf_ctx_create("cpu", SRF_F32, 1, &ctx));
    struct srf_engine *e = serving_engine(ctx, ck, SLOTS + 1), *one = serving_engine(ctx, ck, 1);
    struct serving_queue q = {.work = work, .n = SOME, .stop_at = 5};
    struct srf_server s = serving_server(e, SLOTS, &q);
    test_ok(srf_serve(&s));
    assert_int_equal(q.rounds, 5);
    assert_true(q.next < SOME && q.running > 0);
    for (int64_t i = 0; i < SLOTS; i++) assert_false(srf_engine_running(e, i));

    /* So does an error, and what the engine refuses: it may serve again. */
    s.token = no_token;
    assert_int_equal(srf_serve(&s), SRF_IO);
    for (int64_t i = 0; i < SLOTS; i++) assert_false(srf_engine_running(e, i));
    q = (struct serving_queue){.work = work, .n = SOME};
    work[SOME / 2].prompt[0] = SERVING_V;
    s = serving_server(e, SLOTS, &q);
    assert_int_equal(srf_serve(&s), SRF_MISMATCH);
    work[SOME / 2].prompt[0] = 0;
    q = (struct serving_queue){.work = work, .n = SOME};
    test_ok(srf_serve(&s));
    for (int64_t i = 0; i < SOME; i++) assert_int_equal(work[i].times_done, 1);

    /* Each goes on from the prefix; alone it is fed the prefix itself. */
    const int32_t prefix[] = {1, 2, 3, 4, 9};
    struct srf_engine_prompt p = {.slot = SLOTS, .tokens = prefix, .n_tokens = 5};
    test_ok(srf_engine_admit(e, 1, &p));
    for (int64_t i = 0; i < SOME; i++)
        if (work[i].n_prompt > 20) work[i].n_prompt = 20;
    q = (struct serving_queue){.work = work, .n = SOME};
    s.shared = SLOTS;
    test_ok(srf_serve(&s));
    assert_int_equal(srf_engine_position(e, SLOTS), 5);
    for (int64_t i = 0; i < SOME; i++) {
        struct serving_work *w = &work[i];
        int32_t out[SERVING_MOST];
        p.slot = 0;
        test_ok(srf_engine_admit(one, 1, &p));
        struct srf_engine_prompt rest = {.tokens = w->prompt,
                                         .n_tokens = w->n_prompt,
                                         .resume = true,
                                         .max_new = w->max_new,
                                         .seed = 3,
                                         .sequence = (uint64_t)i};
        test_ok(srf_engine_admit(one, 1, &rest));
        test_ok(srf_engine_decode(one, SERVING_MOST, out));
        srf_engine_release(one, 0);
        assert_int_equal(w->times_done, 1);
        assert_memory_equal(w->text, out, (size_t)w->n * 4);
        assert_true(w->how != SRF_FINISH_STOP || out[w->n] == SERVING_STOP);
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
