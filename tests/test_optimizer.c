/* sumsq and adamw. */
#include "tests/ref/dense.h"
#include "tests/ref/twin.h"

#include <string.h>

static void sumsq_body(enum srf_dtype dtype, int threads)
{
    const int64_t lengths[] = {1, 5, 1023, 32768, 32769, 200003, 0};
    for (size_t k = 0; k < sizeof lengths / sizeof *lengths; k++) {
        struct twins s = twins_new(dtype, threads);
        struct twin x = twin_normal(&s, lengths[k], 3), sum = twin_fill(&s, 1, 1.25);
        twin_run(&s, sumsq, .n = lengths[k], .x = x.dev, .sum = sum.dev);
        ref_sumsq(&(struct srf_sumsq_args){.n = lengths[k], .x = x.ref, .sum = sum.ref});
        twin_close(&s, "sum", sum, twin_tol(&s, dtype == SRF_F64 ? lengths[k] : 1), 0);
        twins_free(&s);
    }
}

static void test_sumsq(void **state)
{
    (void)state;
    twin_each(sumsq_body);
}

/* Bit-equal from run to run and for any number of threads. */
static void test_sumsq_deterministic(void **state)
{
    (void)state;
    enum { N = 300001 };
    double first = NAN;
    for (int run = 0; run < 6; run++) {
        struct twins s = twins_new(SRF_F32, 1 + run % 3);
        struct twin x = twin_normal(&s, N, 1), sum = twin_fill(&s, 1, 0);
        twin_run(&s, sumsq, .n = N, .x = x.dev, .sum = sum.dev);
        double *got = twin_values(&s, sum);
        if (run == 0) first = *got;
        assert_true(*got == first);
        srf__free(got);
        twins_free(&s);
    }
}

/* Non-finite elements must show in the sum, wherever they are. */
static void test_sumsq_nonfinite(void **state)
{
    (void)state;
    enum { N = 70000 };
    const double values[] = {NAN, INFINITY};
    for (int k = 0; k < 6; k++) {
        struct twins s = twins_new(SRF_F32, 2);
        struct twin x = twin_fill(&s, N, 1), sum = twin_fill(&s, 1, 0);
        x.ref[(k / 2) * (N - 1) / 2] = values[k % 2];
        twin_send(&s, x);
        twin_run(&s, sumsq, .n = N, .x = x.dev, .sum = sum.dev);
        double *got = twin_values(&s, sum);
        assert_false(isfinite(*got));
        srf__free(got);
        twins_free(&s);
    }
}

/* Many steps beside the reference, with gradients below and above the clipping norm, and a step
 * whose norm is not finite, which must change nothing. */
static void adamw_body(enum srf_dtype dtype, int threads)
{
    enum { N = 20011, STEPS = 25 };
    struct twins s = twins_new(dtype, threads);
    struct twin p = twin_normal(&s, N, 0.1), g = twin_normal(&s, N, 1), m = twin_fill(&s, N, 0);
    struct twin v = twin_fill(&s, N, 0), sum = twin_fill(&s, 1, 0);
    uint8_t flags[(N + 63) / 64];
    for (size_t i = 0; i < sizeof flags; i++) flags[i] = i % 3 == 1 ? (uint8_t)(1 + i % 200) : 0;
    struct twin_raw no_decay = twin_raw_of(&s, flags, sizeof flags);
    struct twin_raw skips = twin_raw_of(&s, (int32_t[2]){5, 2}, 2 * sizeof(int32_t));
    double *noise = srf__alloc(N, sizeof *noise);
    assert_non_null(noise);
    for (int step = 1; step <= STEPS; step++) {
        test_normal(noise, N, step % 3 == 0 ? 30 : 0.02, 100 + (uint32_t)step);
        twin_set(&s, &g, noise);
        double sumsq = step == 13 ? NAN : step == 17 ? INFINITY : test_dot(g.ref, g.ref, N);
        twin_set(&s, &sum, &sumsq);
#define ARGS(side)                                                                                 \
    .n = N, .step = step, .lr = 0.01 / step, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,             \
    .weight_decay = 0.1, .grad_scale = 0.25, .max_norm = 1.5,                                      \
    .clip_sumsq = step % 4 == 1 && step != 13 && step != 17 ? NULL : sum.side,                     \
    .skips = skips.side, .no_decay = step % 5 ? no_decay.side : NULL, .grad = g.side,              \
    .param = p.side, .m = m.side, .v = v.side
        twin_run(&s, adamw, ARGS(dev));
        ref_adamw(&(struct srf_adamw_args){ARGS(ref)});
#undef ARGS
        assert_memory_equal(skips.dev, skips.ref, skips.bytes);
        twin_close(&s, "m", m, twin_tol(&s, step), 0);
        twin_close(&s, "v", v, twin_tol(&s, step), 0);
        twin_close(&s, "param", p, 4 * twin_tol(&s, step), 0);
    }
    srf__free(noise);
    twins_free(&s);
}

static void test_adamw(void **state)
{
    (void)state;
    twin_each(adamw_body);
}

/* By hand: the first step moves each parameter by lr sign(g) (eps aside) and decays it. */
static void test_adamw_first_step(void **state)
{
    (void)state;
    struct twins s = twins_new(SRF_F64, 1);
    const double p0[] = {1, -2, 3}, g0[] = {5, -1e-3, 40};
    struct twin p = twin_of(&s, p0, 3), g = twin_of(&s, g0, 3), m = twin_fill(&s, 3, 0);
    struct twin v = twin_fill(&s, 3, 0);
    twin_run(&s, adamw, .n = 3, .step = 1, .lr = 0.1, .beta1 = 0.9, .beta2 = 0.999, .eps = 0,
             .weight_decay = 0.5, .grad_scale = 1, .grad = g.dev, .param = p.dev, .m = m.dev,
             .v = v.dev);
    const double want[] = {1 - 0.1 - 0.05, -2 + 0.1 + 0.1, 3 - 0.1 - 0.15};
    memcpy(p.ref, want, sizeof want);
    twin_close(&s, "param", p, 1e-14, 0);
    twins_free(&s);
}

/* Clipping scales the gradient to max_norm exactly: m = (1 - b1) max_norm g / |g|. */
static void test_adamw_clip(void **state)
{
    (void)state;
    struct twins s = twins_new(SRF_F64, 1);
    const double g0[] = {3, 4}, sumsq = 25;
    struct twin p = twin_fill(&s, 2, 0), g = twin_of(&s, g0, 2), m = twin_fill(&s, 2, 0);
    struct twin v = twin_fill(&s, 2, 0), sum = twin_of(&s, &sumsq, 1);
    twin_run(&s, adamw, .n = 2, .step = 1, .lr = 0.1, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8,
             .grad_scale = 2, .max_norm = 5, .clip_sumsq = sum.dev, .grad = g.dev, .param = p.dev,
             .m = m.dev, .v = v.dev);
    m.ref[0] = 0.1 * 3, m.ref[1] = 0.1 * 4; /* |2 g| = 10 -> 5: each component halves again */
    twin_close(&s, "m", m, 1e-14, 0);
    twins_free(&s);
}

static void test_adamw_refusals(void **state)
{
    (void)state;
    struct twins s = twins_new(SRF_F32, 1);
    struct twin x = twin_fill(&s, 1, 1);
    srf_status st = SRF_RUN(s.ctx, adamw, .n = 1, .step = 0, .grad = x.dev, .param = x.dev,
                            .m = x.dev, .v = x.dev);
    assert_int_equal(st, SRF_INVALID);
    st = SRF_RUN(s.ctx, adamw, .n = 1, .step = 1, .grad = x.dev, .param = x.dev, .m = x.dev,
                 .v = x.dev, .master = x.dev);
    assert_int_equal(st, SRF_INVALID);
    twins_free(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sumsq),
        cmocka_unit_test(test_sumsq_deterministic),
        cmocka_unit_test(test_sumsq_nonfinite),
        cmocka_unit_test(test_adamw),
        cmocka_unit_test(test_adamw_first_step),
        cmocka_unit_test(test_adamw_clip),
        cmocka_unit_test(test_adamw_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
