/* srf_attn_fwd, srf_attn_bwd against the quadratic double reference, and the reference's own
 * gradient against central differences. */
#include "tests/ref/attn_case.h"

/* --- the reference against central differences ------------------------------------------------ */

static double loss(void *p)
{
    struct attn_case *c = p;
    attn_case_ref_fwd(c);
    double sum = 0;
    for (int64_t i = 0; i < c->shape.b * c->shape.t; i++)
        sum += test_dot(c->o.ref + i * c->ld_o, c->d_o.ref + i * c->ld_o, c->shape.h * c->shape.d);
    return sum;
}

static void check_reference_gradient(struct srf_attn_shape shape)
{
    struct attn_case c = attn_case_new(SRF_F64, 1, shape, 1);
    /* Padding has no gradient. */
    for (int64_t i = 0; i < c.dqkv.n; i++) c.dqkv.ref[i] = 0;
    for (int64_t i = 0; i < c.dw.n; i++) c.dw.ref[i] = 0;
    attn_case_ref_bwd(&c);
    test_gradient("ref dq, dk, dv", loss, &c, c.qkv.ref, c.dqkv.ref, c.qkv.n, 1e-8);
    test_gradient("ref dw", loss, &c, c.w.ref, c.dw.ref, c.w.n, 1e-8);
    attn_case_free(&c);
}

static void test_reference_gradient(void **state)
{
    (void)state;
    for (int sets = 1; sets <= 2; sets++) {
        struct srf_attn_shape s = {
            .b = 2, .t = 5, .h = 2, .d = 3, .m = 4, .n_sets = sets, .causal = true};
        check_reference_gradient(s);
        s.causal = false;
        check_reference_gradient(s);
        s.causal = true;
        s.window = 1;
        check_reference_gradient(s);
        s.window = 2;
        check_reference_gradient(s);
    }
}

/* --- the op against the reference ------------------------------------------------------------- */

static const struct srf_attn_shape shapes[] = {
    {.b = 1, .t = 1, .h = 1, .d = 2, .m = 1, .n_sets = 1},
    {.b = 2, .t = 63, .h = 1, .d = 16, .m = 20, .n_sets = 1},
    {.b = 1, .t = 64, .h = 2, .d = 64, .m = 64, .n_sets = 2},
    {.b = 2, .t = 65, .h = 3, .d = 16, .m = 63, .n_sets = 3},
    {.b = 1, .t = 200, .h = 2, .d = 64, .m = 64, .n_sets = 1},
    {.b = 1, .t = 200, .h = 1, .d = 80, .m = 100, .n_sets = 1},
    {.b = 1, .t = 130, .h = 1, .d = 64, .m = 256, .n_sets = 1},
    {.b = 1, .t = 300, .h = 1, .d = 2, .m = 1, .n_sets = 1},
    {.b = 1, .t = 577, .h = 1, .d = 8, .m = 16, .n_sets = 1},
};
#define N_SHAPES ((int)(sizeof shapes / sizeof *shapes))
static const int64_t windows[] = {1, 3, 16, 64, 100};
#define N_WINDOWS ((int)(sizeof windows / sizeof *windows))

static void check(enum srf_dtype dtype, int threads, struct srf_attn_shape shape)
{
    struct attn_case c = attn_case_new(dtype, threads, shape, 1);
    double tol = dtype == SRF_F64 ? 1e-13 : 1e-5;
    attn_case_fwd(&c);
    attn_case_ref_fwd(&c);
    twin_close(&c.s, "o", c.o, tol, 0);
    attn_case_bwd(&c);
    attn_case_ref_bwd(&c);
    twin_close(&c.s, "dq, dk, dv", c.dqkv, tol, 0);
    twin_close(&c.s, "dw", c.dw, tol, 1);
    attn_case_free(&c);
}

static void check_all(enum srf_dtype dtype, int threads)
{
    for (int i = 0; i < N_SHAPES; i++) {
        struct srf_attn_shape s = shapes[i];
        check(dtype, threads, s);
        s.causal = true;
        check(dtype, threads, s);
        for (int w = 0; w < N_WINDOWS; w++) {
            s.window = windows[w];
            if (s.t * s.m < 20000 || (w & 1)) check(dtype, threads, s);
        }
    }
}

static void test_reference_f64(void **state)
{
    (void)state;
    check_all(SRF_F64, 2);
}

static void test_reference_f32(void **state)
{
    (void)state;
    check_all(SRF_F32, 1);
}

/* Shapes nobody chose. */
static void test_random_shapes(void **state)
{
    (void)state;
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 0, 500, 0);
    for (int i = 0; i < 40; i++) {
        struct srf_attn_shape s = {.b = 1 + (int64_t)srf_rng_below(&r, 2),
                                   .t = (int64_t)srf_rng_below(&r, 150),
                                   .h = 1 + (int64_t)srf_rng_below(&r, 3),
                                   .d = 2 + (int64_t)srf_rng_below(&r, 40),
                                   .m = 1 + (int64_t)srf_rng_below(&r, 80),
                                   .causal = i % 4 != 0};
        s.n_sets = srf_rng_below(&r, 2) ? 1 : s.h;
        if (i % 4 > 1) s.window = 1 + (int64_t)srf_rng_below(&r, 70);
        print_message("b=%d t=%d h=%d d=%d m=%d sets=%d window=%d causal=%d\n", (int)s.b, (int)s.t,
                      (int)s.h, (int)s.d, (int)s.m, (int)s.n_sets, (int)s.window, s.causal);
        check(i % 2 ? SRF_F64 : SRF_F32, 1 + i % 3, s);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference_gradient),
        cmocka_unit_test(test_reference_f64),
        cmocka_unit_test(test_reference_f32),
        cmocka_unit_test(test_random_shapes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
