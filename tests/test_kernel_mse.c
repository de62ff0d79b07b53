/* Closed forms of the kernel's error: against independent series, against numbers from a Monte
 * Carlo study made elsewhere, and against the draws themselves. The estimator is unbiased. */
#include "kernels/rng.h"
#include "tests/support.h"
#include "train/validate.h"

#include <math.h>
#include <omp.h>

/* rho as a series over k and, alternating, over p (field notes on arXiv 2301.13856): pairs with
 * cosine c, norms chi_d. Long double, for moderate k only. */
static long double rho_series(int d, long double v_sq, long double c)
{
    long double sum = 0;
    for (int k = 0; k < 120; k++) {
        long double inner = 0;
        for (int p = 0; p <= k; p++) {
            if (c == 0 && p > 0) break;
            long double log_size = lgammal(k + 1) - lgammal(p + 1) - lgammal(k - p + 1) +
                                   2 * lgammal(0.5L * (d + p)) - lgammal(d + p) -
                                   2 * lgammal(0.5L * d) + lgammal(d);
            if (p) log_size += p * logl(2 * fabsl(c));
            inner += (c < 0 && p % 2 ? -1 : 1) * expl(log_size);
        }
        long double log_outer = lgammal(0.5L * d) + k * logl(v_sq / 4) - lgammal(k + 1) -
                                lgammal(k + 0.5L * d) + k * logl(2) + lgammal(d + k) - lgammal(d);
        sum += expl(log_outer) * inner;
    }
    return sum;
}

static double mse_at(enum srf_feature_kind kind, int64_t m, int64_t d, double v_sq)
{
    /* x = y = v / 2 */
    double mse;
    test_ok(srf_kernel_mse(kind, m, d, v_sq / 4, v_sq / 4, v_sq / 4, &mse));
    return mse;
}

static void against_the_series(void **state)
{
    (void)state;
    static const int dims[] = {3, 8, 16, 64, 128};
    static const double v_sqs[] = {0.01, 0.5, 1, 2, 8};
    for (int i = 0; i < 5; i++)
        for (int j = 0; j < 5; j++)
            for (int kind = SRF_IID; kind <= SRF_SIMPLEX; kind++) {
                int d = dims[i];
                long double v = v_sqs[j], e = expl(v), rho = e;
                if (kind == SRF_ORTHOGONAL) rho = rho_series(d, v, 0);
                if (kind == SRF_SIMPLEX) rho = rho_series(d, v, -1.0L / (d - 1));
                /* |x|^2, |y|^2 only enter through the factor in front. */
                long double x_sq = 0.7L * v, y_sq = 0.4L * v, dot = -0.05L * v;
                for (int m = d; m <= 3 * d; m += d) {
                    long double front = expl(-x_sq - y_sq) / m;
                    double want = (double)(front * (e * e - e + (d - 1) * (rho - e))), got;
                    test_ok(srf_kernel_mse((enum srf_feature_kind)kind, m, d, (double)dot,
                                           (double)x_sq, (double)y_sq, &got));
                    test_close(srf_feature_kind_name((enum srf_feature_kind)kind), &got, &want, 1,
                               1e-9);
                }
            }
}

/* Partial blocks: the average number of partners in a row's block. */
static void partial_blocks(void **state)
{
    (void)state;
    for (int kind = SRF_ORTHOGONAL; kind <= SRF_SIMPLEX; kind++) {
        enum srf_feature_kind k = (enum srf_feature_kind)kind;
        double one = mse_at(k, 1, 16, 1), full = 16 * mse_at(k, 16, 16, 1);
        assert_true(fabs(one / mse_at(SRF_IID, 1, 16, 1) - 1) < 1e-14);
        /* m MSE = A + partners B, from 0 and 15 partners; 36 rows have (32*15 + 4*3)/36. */
        double b = (full - one) / 15, want = one + (32 * 15 + 4 * 3) / 36.0 * b;
        double got = 36 * mse_at(k, 36, 16, 1);
        test_close("36 rows of 16", &got, &want, 1, 1e-12);
    }
}

/* Monte Carlo of 40,000 draws in another program (agreement there: 0.3 to 3 %); m = d, and K =
 * e^{x.y} was 1.0915, 1.0077, 0.8787. The numbers are relative to |x|^2 + |y|^2 = v^2 - 2 log K. */
static void known_values(void **state)
{
    (void)state;
    static const struct {
        int d;
        double v_sq, k, want[3], tol;
    } rows[] = {
        {16, 0.895, 1.0915, {0.1078, 0.0852, 0.02623}, 5e-3},
        {64, 0.515, 1.0077, {0.01070, 0.00872, 7.15e-4}, 5e-3},
        {64, 1.741, 0.8787, {0.0568, 0.0403, 0.0207}, 5e-3},
    };
    for (int i = 0; i < 3; i++)
        for (int kind = SRF_IID; kind <= SRF_SIMPLEX; kind++) {
            double got, dot = log(rows[i].k), squares = rows[i].v_sq - 2 * dot;
            test_ok(srf_kernel_mse((enum srf_feature_kind)kind, rows[i].d, rows[i].d, dot,
                                   squares / 2, squares / 2, &got));
            test_close(srf_feature_kind_name((enum srf_feature_kind)kind), &got,
                       &rows[i].want[kind], 1, rows[i].tol);
        }
}

static void bad_arguments(void **state)
{
    (void)state;
    double mse;
    assert_int_equal(srf_kernel_mse(SRF_SIMPLEX_PLUS, 64, 64, 0, 1, 1, &mse), SRF_UNSUPPORTED);
    assert_int_equal(srf_kernel_mse(SRF_SIMPLEX, 0, 64, 0, 1, 1, &mse), SRF_INVALID);
    assert_int_equal(srf_kernel_mse(SRF_SIMPLEX, 64, 1, 0, 1, 1, &mse), SRF_INVALID);
    assert_int_equal(srf_kernel_mse(SRF_SIMPLEX, 64, 64, -2, 1, 1, &mse), SRF_INVALID);
    assert_int_equal(srf_kernel_mse(SRF_SIMPLEX, 64, 64, 0, NAN, 1, &mse), SRF_INVALID);
    assert_int_equal(srf_kernel_mse(SRF_SIMPLEX, 64, 64, 0, 500, 1, &mse), SRF_INVALID);
    test_ok(srf_kernel_mse(SRF_SIMPLEX, 64, 64, 0, 150, 150, &mse));
    assert_true(isfinite(mse) && mse > 0);
    /* d = 2: opposite rows; large heads. */
    assert_true(mse_at(SRF_SIMPLEX, 2, 2, 1) < mse_at(SRF_ORTHOGONAL, 2, 2, 1));
    double large = mse_at(SRF_SIMPLEX, 4096, 4096, 1), none = mse_at(SRF_IID, 4096, 4096, 1);
    assert_true(large > 0 && large < none);
}

/* The sanitizers look for what needs no statistics: a part of the draws there, too few for standard
 * errors to mean much, and bounds that hold for any of them. */
#ifdef SRF_GUARD_BANDS
enum { SHARE = 16, NOISE = 100 };
#else
enum { SHARE = 1, NOISE = 1 };
#endif

/* --- the draws ------------------------------------------------------------------------------- */

struct measured {
    double mean, mean_se, mse, mse_se; /* of Khat, relative to K */
};

/* Draws of W, each seen by DIRECTIONS vectors v of the given length (the error depends on |v| only,
 * as W is rotation invariant): Khat / K = (1/m) sum_i exp(w_i.v + bias_i) e^{-v^2/2}. */
static struct measured measure(const struct srf_features_draw_args *base, int64_t n_draws,
                               double v_sq, double oprf_a)
{
    enum { DIRECTIONS = 64 };
    int64_t m = base->m, d = base->d;
    n_draws /= SHARE;
    double sums[4] = {0}; /* of a draw's mean and mean square error, and of their squares */
    int failures = 0;
#pragma omp parallel reduction(+ : failures)
    {
        double *w = srf__alloc((size_t)(m * d), sizeof *w), *bias = srf__alloc((size_t)m, 8);
        double *v = srf__alloc((size_t)d * DIRECTIONS, sizeof *v), mine[4] = {0};
#pragma omp for schedule(static)
        for (int64_t n = 0; n < n_draws; n++) {
            struct srf_features_draw_args a = *base;
            a.draw = (uint64_t)n;
            failures += srf_features_draw_one(&a, 0, 0, oprf_a, w, bias) != SRF_OK;
            /* v (d, DIRECTIONS): one direction a column. */
            struct srf_rng r = srf_rng_at(a.seed, SRF_RNG_TEST, a.draw, 77, 0);
            double norm_sq[DIRECTIONS] = {0}, khat[DIRECTIONS] = {0};
            for (int64_t i = 0; i < d * DIRECTIONS; i++) {
                v[i] = srf_rng_normal(&r);
                norm_sq[i % DIRECTIONS] += v[i] * v[i];
            }
            for (int64_t i = 0; i < d * DIRECTIONS; i++)
                v[i] *= sqrt(v_sq / norm_sq[i % DIRECTIONS]);
            for (int64_t i = 0; i < m; i++) {
                double score[DIRECTIONS];
                for (int k = 0; k < DIRECTIONS; k++)
                    score[k] = 2 * bias[i] - v_sq / 2; /* once for x, once for y */
                for (int64_t j = 0; j < d; j++)
                    for (int k = 0; k < DIRECTIONS; k++)
                        score[k] += w[i * d + j] * v[j * DIRECTIONS + k];
                for (int k = 0; k < DIRECTIONS; k++) khat[k] += exp(score[k]) / (double)m;
            }
            double mean = 0, mse = 0;
            for (int k = 0; k < DIRECTIONS; k++) {
                mean += khat[k] / DIRECTIONS;
                mse += (khat[k] - 1) * (khat[k] - 1) / DIRECTIONS;
            }
            double of[4] = {mean, mse, mean * mean, mse * mse};
            for (int k = 0; k < 4; k++) mine[k] += of[k];
        }
#pragma omp critical
        for (int k = 0; k < 4; k++) sums[k] += mine[k];
        srf__free(v);
        srf__free(bias);
        srf__free(w);
    }
    assert_int_equal(failures, 0);
    double n = (double)n_draws, mean = sums[0] / n, mse = sums[1] / n;
    return (struct measured){.mean = mean,
                             .mean_se = sqrt((sums[2] / n - mean * mean) / n),
                             .mse = mse,
                             .mse_se = sqrt((sums[3] / n - mse * mse) / n)};
}

static void unbiased(const char *name, const struct measured *got)
{
    if (fabs(got->mean - 1) < 4 * NOISE * got->mean_se) return;
    print_error("%s: mean of Khat / K %.6f +- %.6f (SRF_TEST_SEED=%llu)\n", name, got->mean,
                got->mean_se, (unsigned long long)test_seed());
    fail();
}

/* By plain sampling of W and v: measured MSE is the closed form, simplex is best. */
static void draws_have_the_closed_error(void **state)
{
    (void)state;
    static const double v_sqs[] = {0.5, 1, 2};
    static const int64_t draws[] = {400, 600, 1500};
    for (int size = 0; size < 2; size++)
        for (int i = 0; i < 3; i++) {
            double measured_mse[3];
            for (int kind = SRF_IID; kind <= SRF_SIMPLEX; kind++) {
                int64_t m = size ? 256 : 64;
                struct srf_features_draw_args a = {
                    .kind = (enum srf_feature_kind)kind, .seed = test_seed(), .m = m, .d = 64};
                struct measured got = measure(&a, draws[i] / (size ? 4 : 1), v_sqs[i], 0);
                double want;
                test_ok(srf_kernel_error_closed(a.kind, m, 64, v_sqs[i], &want));
                print_message("%-10s m=%3d v^2=%.1f: MSE %.5g = %.3f x closed form, +- %.3f\n",
                              srf_feature_kind_name(a.kind), (int)m, v_sqs[i], got.mse,
                              got.mse / want, got.mse_se / want);
                unbiased(srf_feature_kind_name(a.kind), &got);
                assert_true(fabs(got.mse - want) < 4 * NOISE * got.mse_se);
                assert_true(got.mse_se < 0.1 * NOISE * want);
                measured_mse[kind] = got.mse;
            }
            assert_true(measured_mse[SRF_SIMPLEX] < NOISE * measured_mse[SRF_ORTHOGONAL]);
            assert_true(measured_mse[SRF_ORTHOGONAL] < NOISE * measured_mse[SRF_IID]);
        }
}

/* The project's promise, with the average over directions of v taken exactly (validate.h): within
 * 5 % of the closed form, and with four standard errors, for any m; simplex best. */
static void measured_error_is_the_closed_error(void **state)
{
    (void)state;
    static const double v_sqs[] = {0.5, 1, 2};
    static const int64_t ms[] = {16, 64, 100, 256};
    struct srf_kernel_error got[3][4][3];
    for (int kind = SRF_IID; kind <= SRF_SIMPLEX; kind++) {
        struct srf_features_draw_args a = {
            .kind = (enum srf_feature_kind)kind, .seed = test_seed(), .draw = 1 << 20, .d = 64};
        test_ok(srf_kernel_error_measure(&a, 200 / SHARE, ms, 4, v_sqs, 3, got[kind][0], NULL));
        for (int i = 0; i < 4; i++)
            for (int v = 0; v < 3; v++) {
                double want;
                test_ok(srf_kernel_error_closed(a.kind, ms[i], 64, v_sqs[v], &want));
                print_message("%-10s m=%3d v^2=%.1f: MSE %.5g = %.4f x closed form, +- %.4f\n",
                              srf_feature_kind_name(a.kind), (int)ms[i], v_sqs[v],
                              got[kind][i][v].mse, got[kind][i][v].mse / want,
                              got[kind][i][v].se / want);
                assert_true(got[kind][i][v].se < 0.025 * NOISE * want);
                test_close("measured MSE", &got[kind][i][v].mse, &want, 1, 0.05 * NOISE);
                assert_true(fabs(got[kind][i][v].mse - want) < 4 * NOISE * got[kind][i][v].se);
            }
    }
    for (int i = 1; i < 4; i++)
        for (int v = 0; v < 3; v++) {
            assert_true(got[SRF_SIMPLEX][i][v].mse < NOISE * got[SRF_ORTHOGONAL][i][v].mse);
            assert_true(got[SRF_ORTHOGONAL][i][v].mse < NOISE * got[SRF_IID][i][v].mse);
        }
    struct srf_features_draw_args a = {.kind = SRF_SIMPLEX, .d = 64};
    assert_int_equal(srf_kernel_error_measure(&a, 1, ms, 4, v_sqs, 3, got[0][0], NULL),
                     SRF_INVALID);
    assert_int_equal(
        srf_kernel_error_measure(&a, 9, (int64_t[]){64, 16}, 2, v_sqs, 3, got[0][0], NULL),
        SRF_INVALID);
}

/* What chance does to right numbers, and that wrong ones are told from them: closed forms of
 * another head size, or 15 % off. */
static void chance_is_told_from_faults(void **state)
{
    (void)state;
    enum { DRAWS = 64, SEEDS = 24, CELLS = 6 };
    static const double v_sqs[] = {0.5, 1, 2};
    static const int64_t ms[] = {16, 64};
    double each[DRAWS * CELLS], closed[3][CELLS], sum = 0;
    int low = 0, found[2] = {0};
    struct srf_kernel_error got[CELLS];
    struct srf_kernel_chance c, again;
    for (int i = 0; i < CELLS; i++) {
        test_ok(srf_kernel_error_closed(SRF_SIMPLEX, ms[i / 3], 32, v_sqs[i % 3], &closed[0][i]));
        test_ok(srf_kernel_error_closed(SRF_SIMPLEX, ms[i / 3], 8, v_sqs[i % 3], &closed[1][i]));
        closed[2][i] = i == 2 ? NAN : 1.15 * closed[0][i];
    }
    for (int seed = 0; seed < SEEDS; seed++) {
        struct srf_features_draw_args a = {
            .kind = SRF_SIMPLEX, .seed = test_seed() + (uint64_t)seed, .draw = 1 << 21, .d = 32};
        test_ok(srf_kernel_error_measure(&a, DRAWS, ms, 2, v_sqs, 3, got, each));
        test_ok(srf_kernel_error_chance(each, DRAWS, CELLS, closed[0], 1, &c));
        test_ok(srf_kernel_error_chance(each, DRAWS, CELLS, closed[0], 1, &again));
        assert_true(c.chance == again.chance && c.distance == again.distance);
        assert_true(c.chance > 0 && c.chance <= 1 && c.part < 0.3);
        low += c.chance < 0.05;
        sum += c.chance / SEEDS;
        for (int wrong = 1; wrong < 3; wrong++) {
            test_ok(srf_kernel_error_chance(each, DRAWS, CELLS, closed[wrong], 1, &again));
            found[wrong - 1] += again.chance < 0.01;
            assert_true(again.chance >= 1.0 / 4001); /* of 4000 resamples and the measured one */
        }
    }
    print_message("right: chance %.2f on average, below 0.05 in %d of %d; wrong: found %d, %d\n",
                  sum, low, SEEDS, found[0], found[1]);
    assert_true(low <= 6 && sum > 0.2 && sum < 0.8);
    assert_true(2 * found[0] > SEEDS && 2 * found[1] > SEEDS);
}

/* Two ways to measure the same draws agree, with OPRF's bias too. */
static void exact_average_over_directions(void **state)
{
    (void)state;
    double oprf_a = -0.05, v_sq = 1;
    int64_t m = 24;
    struct srf_features_draw_args a = {
        .kind = SRF_SIMPLEX_PLUS, .seed = test_seed(), .m = m, .d = 16, .oprf_a = &oprf_a};
    struct measured sampled = measure(&a, 4000, v_sq, oprf_a);
    struct srf_kernel_error exact;
    test_ok(srf_kernel_error_measure(&a, 4000 / SHARE, &m, 1, &v_sq, 1, &exact, NULL));
    assert_true(exact.se < NOISE * sampled.mse_se);
    assert_true(fabs(exact.mse - sampled.mse) < 4 * NOISE * sampled.mse_se);
}

/* Odd d, partial blocks. */
static void partial_blocks_have_the_closed_error(void **state)
{
    (void)state;
    for (int kind = SRF_IID; kind <= SRF_SIMPLEX; kind++) {
        struct srf_features_draw_args a = {
            .kind = (enum srf_feature_kind)kind, .seed = test_seed(), .m = 19, .d = 13};
        struct measured got = measure(&a, 6000, 1, 0);
        double want = mse_at(a.kind, a.m, a.d, 1) / exp(0.5);
        unbiased(srf_feature_kind_name(a.kind), &got);
        test_close("measured MSE, 19 rows of 13", &got.mse, &want, 1, 0.05 * NOISE);
    }
}

/* What has no closed form: simplex+ is unbiased and no worse than simplex; hd is nearly as good as
 * Haar, and nearly unbiased. */
static void simplex_plus_and_hd(void **state)
{
    (void)state;
    int64_t m = 64;
    double v_sq = 1, simplex;
    test_ok(srf_kernel_error_closed(SRF_SIMPLEX, m, 64, v_sq, &simplex));
    struct srf_features_draw_args a = {
        .kind = SRF_SIMPLEX_PLUS, .seed = test_seed(), .m = m, .d = 64};
    struct measured plus = measure(&a, 600, v_sq, 0);
    unbiased("simplex+", &plus);
    struct srf_kernel_error error;
    test_ok(srf_kernel_error_measure(&a, 600 / SHARE, &m, 1, &v_sq, 1, &error, NULL));
    print_message("simplex+: MSE %.3f of simplex's, +- %.3f\n", error.mse / simplex,
                  error.se / simplex);
    assert_true(error.mse < NOISE * simplex);
    a.kind = SRF_SIMPLEX;
    a.rotation = SRF_ROT_HD;
    struct measured hd = measure(&a, 600, v_sq, 0);
    test_ok(srf_kernel_error_measure(&a, 600 / SHARE, &m, 1, &v_sq, 1, &error, NULL));
    print_message("hd: MSE %.3f of Haar's, +- %.3f; mean %.5f\n", error.mse / simplex,
                  error.se / simplex, hd.mean);
    assert_true(fabs(hd.mean - 1) < 0.01 * NOISE);
    assert_true(fabs(error.mse / simplex - 1) < 0.05 * NOISE);
}

/* normalize_rows is biased, and says so: E exp(w.v) with |w| = 1 is 0F1(; d/2; v^2/4). */
static void normalized_rows_are_biased(void **state)
{
    (void)state;
    struct srf_features_draw_args a = {
        .kind = SRF_SIMPLEX, .seed = test_seed(), .m = 64, .d = 64, .normalize_rows = true};
    struct measured got = measure(&a, 500, 1, 0);
    double want = exp(-0.5) * (1 + 0.25 / 32 + 0.0625 / (2 * 32 * 33));
    assert_true(fabs(got.mean - want) < 4 * got.mean_se + 1e-6);
}

static void oprf_is_unbiased_and_better(void **state)
{
    (void)state;
    for (int kind = SRF_IID; kind <= SRF_SIMPLEX; kind++) {
        struct srf_features_draw_args a = {
            .kind = (enum srf_feature_kind)kind, .seed = test_seed(), .m = 16, .d = 16};
        double v_sq = 2, oprf_a = srf_oprf_a(v_sq, a.d);
        struct measured plain = measure(&a, 3000, v_sq, 0);
        struct measured oprf = measure(&a, 3000, v_sq, oprf_a);
        print_message("%-10s OPRF A=%.4f: MSE %.3f of plain\n", srf_feature_kind_name(a.kind),
                      oprf_a, oprf.mse / plain.mse);
        unbiased("OPRF", &oprf);
        if (kind == SRF_IID) {
            assert_true(oprf.mse < 0.9 * plain.mse);
            /* A minimum: more and less than A are no better (10 % of slack is noise). */
            struct measured less = measure(&a, 3000, v_sq, oprf_a / 3);
            struct measured more = measure(&a, 3000, v_sq, oprf_a * 3);
            assert_true(oprf.mse < less.mse && oprf.mse < more.mse);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(against_the_series),
        cmocka_unit_test(partial_blocks),
        cmocka_unit_test(known_values),
        cmocka_unit_test(bad_arguments),
        cmocka_unit_test(draws_have_the_closed_error),
        cmocka_unit_test(measured_error_is_the_closed_error),
        cmocka_unit_test(chance_is_told_from_faults),
        cmocka_unit_test(exact_average_over_directions),
        cmocka_unit_test(partial_blocks_have_the_closed_error),
        cmocka_unit_test(simplex_plus_and_hd),
        cmocka_unit_test(normalized_rows_are_biased),
        cmocka_unit_test(oprf_is_unbiased_and_better),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
