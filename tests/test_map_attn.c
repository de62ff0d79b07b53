/* map_attn_fwd, map_attn_bwd: the reference against central differences, the op against the
 * reference, causality to the bit. */
#include "tests/ref/attn_case.h"

#define SHAPE(b_, t_, h_, d_, m_, window_)                                                         \
    {                                                                                              \
        .b = b_, .t = t_, .h = h_, .d = d_, .m = m_, .n_sets = h_, .window = window_,              \
        .causal = true                                                                             \
    }
static const struct srf_attn_shape shapes[] = {
    SHAPE(1, 1, 1, 2, 2, 0),     SHAPE(2, 5, 3, 7, 4, 0),     SHAPE(2, 5, 3, 7, 4, 1),
    SHAPE(1, 64, 2, 16, 16, 16), SHAPE(2, 130, 1, 64, 64, 0), SHAPE(2, 130, 1, 64, 64, 32),
    SHAPE(1, 577, 2, 8, 6, 0),   SHAPE(1, 577, 2, 8, 6, 7),   SHAPE(1, 1300, 1, 8, 130, 600),
    SHAPE(1, 90, 2, 5, 34, 100), SHAPE(1, 70, 1, 3, 600, 0),  SHAPE(0, 10, 2, 16, 8, 0),
    SHAPE(2, 0, 2, 16, 8, 4),
};
#define N_SHAPES ((int)(sizeof shapes / sizeof *shapes))

static void test_reference_gradient(void **state)
{
    (void)state;
    for (int i = 0; i < 6; i++) {
        struct srf_attn_shape shape = SHAPE(2, 7, 2, 3, 4, i / 2);
        struct attn_case c = attn_case_new(SRF_F64, 1, shape, 1);
        c.map = (enum srf_map_kind)(i % 2);
        attn_case_check_gradient(&c, &attn_map, 1e-7);
        attn_case_free(&c);
    }
}

static void check(enum srf_dtype dtype, int threads, struct srf_attn_shape shape,
                  enum srf_map_kind map, double scale)
{
    struct attn_case c = attn_case_new(dtype, threads, shape, scale);
    c.map = map;
    /* Scores grow as scale^2, and so does what rounding makes of them. */
    double eps = dtype == SRF_F64 ? 0x1p-53 : 0x1p-24, tol = 32 * eps * (1 + scale * scale);
    attn_case_check(&c, &attn_map, (struct attn_tol){tol, tol, 4 * tol, 8 * tol, false});
    attn_case_free(&c);
}

static void check_all(enum srf_dtype dtype, int threads)
{
    for (int i = 0; i < 2 * N_SHAPES; i++) {
        check(dtype, threads, shapes[i / 2], (enum srf_map_kind)(i % 2), 1);
        check(dtype, threads, shapes[i / 2], (enum srf_map_kind)(i % 2), 4);
    }
}

static void test_reference(void **state)
{
    (void)state;
    check_all(SRF_F32, 1);
    check_all(SRF_F64, 2);
}

static void test_causal(void **state)
{
    (void)state;
    for (int i = 0; i < 4; i++) {
        struct srf_attn_shape shape = SHAPE(1, 300, 1, 16, 8, i / 2 * 20);
        struct attn_case c = attn_case_new(SRF_F32, 1, shape, 1);
        c.map = (enum srf_map_kind)(i % 2);
        attn_case_check_causal(&c, &attn_map, 30);
        attn_case_free(&c);
    }
}

static void test_range(void **state)
{
    (void)state;
    for (int i = 0; i < 6; i++) {
        struct srf_attn_shape shape = SHAPE(1, 100, 2, 16, 8, i / 2 * 8);
        struct attn_case c = attn_case_new(SRF_F32, 1, shape, 30);
        c.map = (enum srf_map_kind)(i % 2);
        attn_case_check_map_range(&c);
        attn_case_free(&c);
    }
}

static void test_arguments(void **state)
{
    (void)state;
    struct twins s = twins_new(SRF_F32, 1);
    test_ok(srf_ctx_reserve_workspace(s.ctx, 1 << 22));
    struct srf_attn_shape good = SHAPE(1, 1, 2, 4, 2, 0);
    for (int i = 0; i < 4; i++) {
        struct srf_attn_shape bad = good;
        if (i == 0) bad.m = 3;
        if (i == 1) bad.causal = false;
        if (i == 2) bad.n_sets = 1;
        if (i == 3) bad.t = -1;
        assert_int_equal(
            SRF_RUN(s.ctx, map_attn_fwd, .s = bad, .map = SRF_MAP_HEDGEHOG, .ld = 8, .ld_o = 8),
            SRF_INVALID);
        assert_int_equal(
            SRF_RUN(s.ctx, map_attn_bwd, .s = bad, .map = SRF_MAP_HEDGEHOG, .ld = 8, .ld_o = 8),
            SRF_INVALID);
    }
    twins_free(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference_gradient),
        cmocka_unit_test(test_reference),
        cmocka_unit_test(test_causal),
        cmocka_unit_test(test_range),
        cmocka_unit_test(test_arguments),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
