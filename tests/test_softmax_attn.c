/* softmax_attn_fwd, softmax_attn_bwd: the reference against central differences, the op against the
 * reference, causality to the bit. */
#include "tests/ref/attn_case.h"

/* m, n_sets are those of SRF attention and mean nothing here. */
#define SHAPE(b_, t_, h_, d_)                                                                      \
    {                                                                                              \
        .b = b_, .t = t_, .h = h_, .d = d_, .m = 1, .n_sets = 1                                    \
    }
static const struct srf_attn_shape shapes[] = {
    SHAPE(1, 1, 1, 2),   SHAPE(2, 5, 3, 7),    SHAPE(1, 63, 2, 16),  SHAPE(2, 64, 1, 64),
    SHAPE(1, 65, 2, 80), SHAPE(1, 512, 1, 64), SHAPE(1, 577, 2, 32), SHAPE(1, 1100, 1, 8),
    SHAPE(0, 10, 2, 16), SHAPE(2, 0, 2, 16),   SHAPE(3, 2, 1, 1),
};
#define N_SHAPES ((int)(sizeof shapes / sizeof *shapes))
/* Window and sinks: apart, overlapping, longer than a tile of keys, one token. */
static const int64_t windows[][2] = {{1, 0},   {3, 2},   {64, 0},  {65, 4},   {100, 70},
                                     {190, 4}, {512, 1}, {7, 600}, {2000, 3}, {600, 300}};
#define N_WINDOWS ((int)(sizeof windows / sizeof *windows))

static void test_reference_gradient(void **state)
{
    (void)state;
    for (int i = 0; i < 5; i++) { /* not causal, causal; windows with 0 to 2 sinks */
        struct srf_attn_shape shape = SHAPE(2, 7, 2, 3);
        shape.causal = i > 0;
        shape.window = i > 1 ? 2 : 0;
        struct attn_case c = attn_case_new(SRF_F64, 1, shape, 1);
        c.sinks = i > 1 ? i - 2 : 0;
        attn_case_check_gradient(&c, &attn_softmax, 1e-8);
        attn_case_free(&c);
    }
}

static void check(enum srf_dtype dtype, int threads, struct srf_attn_shape shape, int64_t sinks,
                  double scale)
{
    struct attn_case c = attn_case_new(dtype, threads, shape, scale);
    c.sinks = sinks;
    /* Scores grow as scale^2, and so does what rounding makes of them. */
    double eps = dtype == SRF_F64 ? 0x1p-53 : 0x1p-24, tol = 16 * eps * (1 + scale * scale);
    attn_case_check(&c, &attn_softmax, (struct attn_tol){tol, tol, 2 * tol, 0, false});
    attn_case_free(&c);
}

static void check_all(enum srf_dtype dtype, int threads)
{
    for (int i = 0; i < 2 * N_SHAPES; i++) {
        struct srf_attn_shape s = shapes[i / 2];
        s.causal = i & 1;
        check(dtype, threads, s, 0, 1);
        check(dtype, threads, s, 0, 6);
    }
    for (int i = 0; i < N_WINDOWS * N_SHAPES; i++) {
        struct srf_attn_shape s = shapes[i % N_SHAPES];
        s.causal = true;
        s.window = windows[i / N_SHAPES][0];
        check(dtype, threads, s, windows[i / N_SHAPES][1], 3);
    }
}

static void test_reference(void **state)
{
    (void)state;
    check_all(SRF_F32, 1);
    check_all(SRF_F64, 2);
}

static void check_causal(int64_t window, int64_t sinks)
{
    struct srf_attn_shape shape = SHAPE(1, 600, 1, 16);
    shape.causal = true;
    shape.window = window;
    struct attn_case c = attn_case_new(SRF_F32, 1, shape, 1);
    c.sinks = sinks;
    attn_case_check_causal(&c, &attn_softmax, 30);
    attn_case_free(&c);
}

static void test_causal(void **state)
{
    (void)state;
    check_causal(0, 0);
    check_causal(50, 4);
}

/* What a token does not see, however large, leaves its output as it was. */
static void test_window(void **state)
{
    (void)state;
    enum { T = 700, WINDOW = 90, SINKS = 5, FROM = SINKS, TO = 300 };
    struct srf_attn_shape shape = SHAPE(1, T, 1, 16);
    shape.causal = true;
    shape.window = WINDOW;
    struct attn_case c = attn_case_new(SRF_F32, 1, shape, 1);
    c.sinks = SINKS;
    attn_softmax.fwd(&c);
    double *before = twin_values(&c.s, c.o);
    for (int64_t i = FROM * c.ld; i < TO * c.ld; i++) attn_case_set(&c, i, 30 * c.qkv.ref[i]);
    attn_softmax.fwd(&c);
    double *after = twin_values(&c.s, c.o);
    int64_t clear = TO + WINDOW - 1; /* the first that sees none of these */
    assert_memory_equal(before, after, (size_t)(FROM * c.ld_o) * sizeof *after);
    assert_memory_equal(before + clear * c.ld_o, after + clear * c.ld_o,
                        (size_t)((T - clear) * c.ld_o) * sizeof *after);
    assert_true(before[(clear - 1) * c.ld_o] != after[(clear - 1) * c.ld_o]);
    srf__free(before);
    srf__free(after);
    attn_case_free(&c);
}

static void test_deterministic(void **state)
{
    (void)state;
    struct srf_attn_shape shape = SHAPE(2, 200, 3, 16);
    shape.causal = true;
    struct attn_case c = attn_case_new(SRF_F32, 2, shape, 1);
    attn_softmax.fwd(&c);
    attn_softmax.bwd(&c);
    double *first = twin_values(&c.s, c.dqkv);
    attn_softmax.fwd(&c);
    attn_softmax.bwd(&c);
    double *second = twin_values(&c.s, c.dqkv);
    assert_memory_equal(first, second, (size_t)c.dqkv.n * sizeof *first);
    srf__free(first);
    srf__free(second);
    attn_case_free(&c);
}

static void test_arguments(void **state)
{
    (void)state;
    struct twins s = twins_new(SRF_F32, 1);
    test_ok(srf_ctx_reserve_workspace(s.ctx, 1 << 22));
    assert_int_equal(
        SRF_RUN(s.ctx, softmax_attn_fwd, .b = 1, .t = -1, .h = 1, .d = 4, .ld = 4, .ld_o = 4),
        SRF_INVALID);
    assert_int_equal(
        SRF_RUN(s.ctx, softmax_attn_fwd, .b = 1, .t = 1, .h = 2, .d = 4, .ld = 7, .ld_o = 8),
        SRF_INVALID);
    assert_int_equal(
        SRF_RUN(s.ctx, softmax_attn_bwd, .b = 1, .t = 1, .h = 2, .d = 4, .ld = 8, .ld_o = 7),
        SRF_INVALID);
    const struct {
        bool causal;
        int64_t window, sinks;
    } bad[] = {{false, 2, 0}, {true, -1, 0}, {true, 2, -1}, {true, 0, 1}};
    for (int i = 0; i < 4; i++)
        assert_int_equal(SRF_RUN(s.ctx, softmax_attn_fwd, .b = 1, .t = 1, .h = 1, .d = 4, .ld = 4,
                                 .ld_o = 4, .causal = bad[i].causal, .window = bad[i].window,
                                 .sinks = bad[i].sinks),
                         SRF_INVALID);
    twins_free(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference_gradient),
        cmocka_unit_test(test_reference),
        cmocka_unit_test(test_causal),
        cmocka_unit_test(test_window),
        cmocka_unit_test(test_deterministic),
        cmocka_unit_test(test_arguments),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
