/* The CPU backend's exponentials: accuracy over their range, limits, exact scaling by powers of
 * two. */
#include "kernels/cpu/cpu.h"
#include "tests/support.h"

/* Distance from the right value, in units of the last place of a float of its size. */
static double ulps(float got, double want)
{
    int e;
    frexp(want, &e);
    return fabs((double)got - want) / ldexp(1, e - 24);
}

static void test_accuracy(void **state)
{
    (void)state;
    double worst2 = 0, worst = 0;
    for (int64_t i = 0; i <= 2000000; i++) {
        float x = (float)(-125.9 + 253.8 * (double)i / 2000000),
              y = (float)(-87.33 * (double)i / 2000000);
        worst2 = fmax(worst2, ulps(srf__exp2(x), exp2((double)x)));
        worst = fmax(worst, ulps(srf__exp_neg(y), exp((double)y)));
    }
    for (int64_t i = 0; i <= 200000; i++) {
        float x = (float)(-1 + 2 * (double)i / 200000);
        worst2 = fmax(worst2, ulps(srf__exp2(x), exp2((double)x)));
        worst = fmax(worst, ulps(srf__exp_neg(-fabsf(x)), exp(-fabs((double)x))));
    }
    print_message("exp2: %.2f ulp, exp: %.2f ulp\n", worst2, worst);
    assert_true(worst2 <= 1.5);
    assert_true(worst <= 1.5);
}

static void test_limits(void **state)
{
    (void)state;
    assert_true(srf__exp2(0) == 1 && srf__exp_neg(0) == 1);
    assert_true(srf__exp2(127) == 0x1p127f && srf__exp2(-126) == 0x1p-126f);
    assert_true(srf__exp2(-126.5f) == 0 && srf__exp2(-1e30f) == 0 && srf__exp2(-INFINITY) == 0);
    assert_true(isinf(srf__exp2(128.5f)) && isinf(srf__exp2(1e30f)) && isinf(srf__exp2(INFINITY)));
    assert_true(isnan(srf__exp2(NAN)) && isnan(srf__exp_neg(NAN)));
    assert_true(srf__exp_neg(-87.3f) > 0 && srf__exp_neg(-87.34f) == 0 && srf__exp_neg(-88) == 0);
    assert_true(srf__exp_neg(-1e30f) == 0 && srf__exp_neg(-INFINITY) == 0);
    assert_true(srf__pow2(-127) == 0 && srf__pow2(-1e32f) == 0 && srf__pow2(0) == 1);
    assert_true(srf__pow2(NAN) == 0);
}

static void test_scaling(void **state)
{
    (void)state;
    for (int i = -500; i <= 500; i++)
        for (int n = -120; n <= 120; n++) {
            float f = (float)i / 1000;
            assert_true(srf__exp2_parts(f, (float)n) == ldexpf(srf__exp2_parts(f, 0), n));
        }
    assert_true(isnan(srf__exp2_parts(NAN, 0)));
    assert_true(srf__exp2_parts(0.25f, -1e32f) == 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_accuracy),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_scaling),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
