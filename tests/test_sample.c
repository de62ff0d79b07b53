/* sample and slots_next on the CPU. */
#include "infer/sampler.h"
#include "tests/ref/dense.h"
#include "tests/ref/sample_case.h"

static const int64_t vocabularies[] = {1, 2, 7, 64, 1000, 5003};
#define N_VOCABULARIES ((int)(sizeof vocabularies / sizeof *vocabularies))
static int compared, skipped;

static void check(enum srf_dtype dtype, int threads, const struct sample_case *c)
{
    struct twins s = twins_new(dtype, threads);
    int32_t got[64], want[64], pos[64];
    bool close[64] = {0};
    double *x = sample_logits(c);
    uint64_t *streams = sample_streams(c->n);
    for (int64_t i = 0; i < c->n; i++) pos[i] = i % 7 == 6 ? -1 : (int32_t)i, want[i] = -7;
    struct twin logits = twin_of(&s, x, c->n * (c->ld ? c->ld : c->v));
    struct twin_raw stream = twin_raw_of(&s, streams, (size_t)c->n * 24);
    struct twin_raw at = twin_raw_of(&s, pos, (size_t)c->n * 4);
    struct twin_raw tokens = twin_raw_of(&s, want, (size_t)c->n * 4);
#define ARGS(side)                                                                                 \
    .n = c->n, .v = c->v, .ld = c->ld, .logits = logits.side, .temperature = c->temperature,       \
    .top_k = c->top_k, .top_p = c->top_p, .streams = stream.side, .pos = at.side,                  \
    .tokens = tokens.side
    twin_run(&s, sample, ARGS(dev));
    ref_sample(&(struct srf_sample_args){ARGS(ref)}, close);
#undef ARGS
    twin_raw_values(&s, tokens, got);
    for (int64_t i = 0; i < c->n; i++) {
        int32_t expected = ((int32_t *)tokens.ref)[i];
        if (got[i] != expected && !close[i])
            print_error("%s v=%d logits %d temperature %g top_k %d top_p %g row %d: %d, not %d\n",
                        srf_dtype_name(dtype), (int)c->v, c->logits, c->temperature, (int)c->top_k,
                        c->top_p, (int)i, got[i], expected);
        assert_true(got[i] == expected || close[i]);
        compared++;
        skipped += close[i];
    }
    srf__free(x);
    srf__free(streams);
    twins_free(&s);
}

static void body(enum srf_dtype dtype, int threads)
{
    for (int v = 0; v < N_VOCABULARIES; v++)
        for (int logits = SAMPLE_NORMAL; logits <= SAMPLE_BAD; logits++)
            for (int i = 0; i < SAMPLE_N_SETTINGS; i++) {
                struct sample_case c = {.n = 20,
                                        .v = vocabularies[v],
                                        .ld = v % 2 ? vocabularies[v] + 3 : 0,
                                        .logits = (enum sample_logits)logits};
                sample_setting(&c, i);
                check(dtype, threads, &c);
            }
}

static void test_reference(void **state)
{
    (void)state;
    twin_each(body);
    assert_true(skipped < compared / 20);
}

/* All but one: the last of those alike is left out, the others are not. */
static void test_all_but_one(void **state)
{
    (void)state;
    const float logits[3] = {0};
    const struct srf_sampler_config c = {.temperature = 1, .top_k = 2, .top_p = 1};
    int n[3] = {0};
    for (int64_t i = 0; i < 200; i++) {
        int32_t token;
        test_ok(srf_sample(&c, 1, 2, i, logits, 3, &token));
        n[token]++;
    }
    assert_true(n[0] > 60 && n[1] > 60 && n[2] == 0);
}

static void test_refusals(void **state)
{
    (void)state;
    struct twins s = twins_new(SRF_F32, 1);
    assert_int_equal(SRF_RUN(s.ctx, sample, .v = 3, .temperature = -1, .top_p = 1), SRF_INVALID);
    assert_int_equal(SRF_RUN(s.ctx, sample, .v = 3, .temperature = 1, .top_p = 0), SRF_INVALID);
    assert_int_equal(SRF_RUN(s.ctx, sample, .v = 3, .temperature = 101, .top_p = 1), SRF_INVALID);
    assert_int_equal(SRF_RUN(s.ctx, sample, .v = 3, .temperature = NAN, .top_p = 1), SRF_INVALID);
    assert_int_equal(SRF_RUN(s.ctx, sample, .v = 0, .temperature = 1, .top_p = 1), SRF_INVALID);
    twins_free(&s);
}

/* Slot 0 goes on, 1 has its last token, 2 meets the stop token, 3 is idle, 4 was not finite. */
static void test_slots(void **state)
{
    (void)state;
    enum { N = 5, STEPS = 2 };
    struct twins s = twins_new(SRF_F32, 1);
    int32_t next[N] = {11, 12, 99, 14, -1}, left[N] = {3, 1, 5, 0, 4}, at[N] = {7, 8, 9, 10, 11};
    int32_t out[STEPS * N] = {0}, step = 0, feed[N], pos[N];
    uint64_t streams[3 * N] = {0};
    for (int i = 0; i < 4; i++)
        test_ok(SRF_RUN(s.ctx, slots_next, .n = N, .stop = 99, .next = next, .left = left, .at = at,
                        .streams = streams, .feed = feed, .pos = pos, .step = &step,
                        .n_steps = STEPS, .out = out));
    const int32_t want[STEPS * N] = {11, 12, 99, -1, -2, 11, -1, -1, -1, -1};
    assert_memory_equal(out, want, sizeof want);
    assert_int_equal(step, 4);
    for (int i = 0; i < N; i++) {
        assert_int_equal(left[i], 0);
        assert_int_equal(at[i], 7 + i + (i == 0 ? 2 : 0));
        assert_int_equal(streams[3 * i + 2], i == 0 ? 2 : 0);
        assert_int_equal(pos[i], -1);
        assert_int_equal(feed[i], 0);
    }
    twins_free(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference),
        cmocka_unit_test(test_all_but_one),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_slots),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
