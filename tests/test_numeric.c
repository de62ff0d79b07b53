/* Conversions between float types, and subnormal numbers that count as 0. */
#include "kernels/numeric.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "tests/support.h"

/* Every half, subnormal ones too, and every bfloat16 that is normal in fp32 survives fp32. */
static void test_round_trip(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        float x = srf_f16_to_f32((uint16_t)h);
        if (!isnan(x)) assert_int_equal(srf_f32_to_f16(x), h);
        bool subnormal = (h & 0x7f80) == 0 && (h & 0x7f) != 0;
        x = srf_bf16_to_f32((uint16_t)h);
        if (!isnan(x) && !subnormal) assert_int_equal(srf_f32_to_bf16(x), h);
    }
}

/* A NaN stays one, also where all that says so is below a bfloat16's last bit. */
static void test_nan(void **state)
{
    (void)state;
    const uint32_t nans[] = {0x7f800001, 0xff800001, 0x7fc00000, 0xffffffff, 0x7f80ffff};
    for (size_t i = 0; i < sizeof nans / sizeof *nans; i++) {
        float x;
        memcpy(&x, &nans[i], sizeof x);
        assert_true(isnan(srf_bf16_to_f32(srf_f32_to_bf16(x))));
        assert_true(isnan(srf_f16_to_f32(srf_f32_to_f16(x))));
    }
}

/* Made when it is asked for, not by the compiler. */
static float half_of(float x)
{
    volatile float now = x;
    return now * 0.5f;
}

static void test_flush(void **state)
{
    assert_true(half_of(FLT_MIN) > 0); /* what is to be changed is there */
    srf_flush_subnormals();
#if defined(__SSE2__) || defined(__aarch64__)
    int nonzero = 0, threads = 0;
#pragma omp parallel num_threads(3) reduction(+ : nonzero, threads)
    {
        float x = half_of(FLT_MIN);
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits); /* a comparison would see 0 in any case */
        nonzero += bits != 0;
        threads++;
    }
    assert_true(threads >= 1);
    assert_int_equal(nonzero, 0);
#endif
    assert_true(half_of(4 * FLT_MIN) == 2 * FLT_MIN);
    test_round_trip(state);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_nan),
        cmocka_unit_test(test_flush),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
