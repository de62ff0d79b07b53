/* Philox4x32-10 against its published vectors, the streams' layout, and their distributions. */
#include "kernels/rng.h"
#include "tests/support.h"

#include <math.h>
#include <string.h>

/* tests/kat_vectors of Random123 (Salmon et al.), rows "philox4x32 10". */
static void published_vectors(void **state)
{
    (void)state;
    static const struct {
        uint32_t counter[4], key[2], want[4];
    } rows[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        uint32_t out[4];
        srf_philox4x32(rows[i].counter, rows[i].key, out);
        assert_memory_equal(out, rows[i].want, sizeof out);
    }
}

/* The table in features.h, spelled out for one stream. */
static void stream_layout(void **state)
{
    (void)state;
    uint64_t seed = 0x0123456789abcdef, a = 0xfedcba9876543210;
    uint32_t b = 7, c = 3 << 16 | 5;
    uint32_t key_counter[4] = {0x76543210, 0xfedcba98, SRF_RNG_SAMPLE, 0x53524631}, key[4];
    srf_philox4x32(key_counter, (uint32_t[2]){0x89abcdef, 0x01234567}, key);
    struct srf_rng r = srf_rng_at(seed, SRF_RNG_SAMPLE, a, b, c), start = r;
    for (uint32_t call = 0; call < 3; call++) {
        uint32_t want[4], got[4];
        srf_philox4x32((uint32_t[4]){call, 0, b, c}, key, want);
        for (int i = 0; i < 4; i++) assert_int_equal(srf_rng_u32(&r), want[i]);
        srf__rng_call(&start, call, got);
        assert_memory_equal(got, want, sizeof got);
    }
    /* The high half of the call index. */
    uint32_t want[4], got[4];
    srf_philox4x32((uint32_t[4]){9, 1, b, c}, key, want);
    srf__rng_call(&start, (uint64_t)1 << 32 | 9, got);
    assert_memory_equal(got, want, sizeof got);
    r = start;
    r.counter[0] = 0xffffffff;
    for (int i = 0; i < 4; i++) srf_rng_u32(&r);
    srf_philox4x32((uint32_t[4]){0, 1, b, c}, key, want);
    assert_int_equal(srf_rng_u32(&r), want[0]);

    /* Uniforms and normals in order and by index are the same numbers. */
    struct srf_rng uniforms = start, normals = start;
    for (uint64_t call = 0; call < 5; call++) {
        uint32_t w[4];
        double u[2], z[2];
        srf__rng_call(&start, call, w);
        srf__rng_uniforms(&start, call, u);
        srf__rng_normals(&start, call, z);
        for (int i = 0; i < 2; i++) {
            uint64_t bits = ((uint64_t)w[2 * i + 1] << 32 | w[2 * i]) >> 12;
            assert_true(u[i] == ldexp((double)(2 * bits + 1), -53));
            assert_true(srf_rng_uniform(&uniforms) == u[i]);
            assert_true(srf_rng_normal(&normals) == z[i]);
        }
        assert_true(fabs(z[0] - sqrt(-2 * log(u[0])) * cos(2 * M_PI * u[1])) < 1e-14);
        assert_true(fabs(z[1] - sqrt(-2 * log(u[0])) * sin(2 * M_PI * u[1])) < 1e-14);
    }
}

/* Any one coordinate of the address makes another stream. */
static void streams_differ(void **state)
{
    (void)state;
    struct srf_rng r[] = {
        srf_rng_at(1, SRF_RNG_TEST, 2, 3, 4),
        srf_rng_at(2, SRF_RNG_TEST, 2, 3, 4),
        srf_rng_at(1ull << 32 | 1, SRF_RNG_TEST, 2, 3, 4),
        srf_rng_at(1, SRF_RNG_DATA, 2, 3, 4),
        srf_rng_at(1, SRF_RNG_TEST, 3, 3, 4),
        srf_rng_at(1, SRF_RNG_TEST, 1ull << 32 | 2, 3, 4),
        srf_rng_at(1, SRF_RNG_TEST, 2, 2, 4),
        srf_rng_at(1, SRF_RNG_TEST, 2, 3, 5),
        srf_rng_at(1, SRF_RNG_TEST, 2, 4, 3),
    };
    enum { N = sizeof r / sizeof *r };
    uint64_t first[N];
    for (int i = 0; i < N; i++) {
        first[i] = (uint64_t)srf_rng_u32(&r[i]) << 32;
        first[i] |= srf_rng_u32(&r[i]);
        for (int j = 0; j < i; j++) assert_true(first[i] != first[j]);
    }
}

/* |mean - want| within 5 standard errors. */
static void check_mean(const char *name, double sum, double n, double want, double sd)
{
    double mean = sum / n, off = fabs(mean - want) / (sd / sqrt(n));
    if (!(off < 5)) {
        print_error("%s: mean %.6g, want %.6g, %.1f standard errors off (SRF_TEST_SEED=%llu)\n",
                    name, mean, want, off, (unsigned long long)test_seed());
        fail();
    }
}

static void uniform_and_normal_moments(void **state)
{
    (void)state;
    enum { N = 400000 };
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 0, 1, 0);
    double u1 = 0, u2 = 0, pairs = 0, last = 0.5;
    for (int i = 0; i < N; i++) {
        double u = srf_rng_uniform(&r);
        assert_true(u > 0 && u < 1);
        u1 += u;
        u2 += u * u;
        pairs += (u - 0.5) * (last - 0.5);
        last = u;
    }
    check_mean("u", u1, N, 0.5, sqrt(1.0 / 12));
    check_mean("u^2", u2, N, 1.0 / 3, sqrt(4.0 / 45));
    check_mean("u u'", pairs, N, 0, 1.0 / 12);
    double z[5] = {0}, tail = 0, lag = 0, last_z = 0;
    for (int i = 0; i < N; i++) {
        double x = srf_rng_normal(&r);
        for (int k = 1; k <= 4; k++) z[k] += pow(x, k);
        tail += fabs(x) > 2;
        lag += x * last_z;
        last_z = x;
    }
    check_mean("z", z[1], N, 0, 1);
    check_mean("z^2", z[2], N, 1, sqrt(2));
    check_mean("z^3", z[3], N, 0, sqrt(15));
    check_mean("z^4", z[4], N, 3, sqrt(96));
    double p = erfc(sqrt(2));
    check_mean("P(|z| > 2)", tail, N, p, sqrt(p * (1 - p)));
    check_mean("z z'", lag, N, 0, 1);
}

static void below_is_uniform(void **state)
{
    (void)state;
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 0, 2, 0);
    enum { N = 70000 };
    int count[7] = {0};
    for (int i = 0; i < N; i++) {
        uint64_t x = srf_rng_below(&r, 7);
        assert_true(x < 7);
        count[x]++;
    }
    for (int i = 0; i < 7; i++)
        check_mean("share of a value", count[i], N, 1.0 / 7, sqrt(6.0 / 49));
    for (int i = 0; i < 100; i++) assert_int_equal(srf_rng_below(&r, 1), 0);
    /* 3 * 2^62: a plain remainder would give values below 2^62 twice as often as the rest. */
    double low = 0;
    for (int i = 0; i < N; i++) low += srf_rng_below(&r, 3ull << 62) < 1ull << 62;
    check_mean("share of the lowest third", low, N, 1.0 / 3, sqrt(2.0 / 9));
}

/* chi_d of d degrees of freedom: mean and variance of its square, for even and odd d. */
static void chi_norms(void **state)
{
    (void)state;
    static const int64_t dims[] = {2, 3, 4, 5, 17, 64, 255, 256};
    enum { N = 20000 };
    double *norm;
    test_ok(SRF_ALLOC(norm, N));
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++) {
        double d = (double)dims[i], sum = 0, sum_sq = 0;
        struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 1, (uint32_t)dims[i], 0);
        srf__chi_norms(&r, dims[i], N, norm);
        for (int j = 0; j < N; j++) {
            sum += norm[j] * norm[j];
            sum_sq += pow(norm[j] * norm[j] - d, 2);
        }
        check_mean("chi^2", sum, N, d, sqrt(2 * d));
        check_mean("(chi^2 - d)^2", sum_sq, N, 2 * d, sqrt(8 * d * d + 48 * d));
    }
    srf__free(norm);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(published_vectors),
        cmocka_unit_test(stream_layout),
        cmocka_unit_test(streams_differ),
        cmocka_unit_test(below_is_uniform),
        cmocka_unit_test(uniform_and_normal_moments),
        cmocka_unit_test(chi_norms),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
