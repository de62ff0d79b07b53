/* Draws of W: geometry of each kind, marginals, addressing, and the op against the host's draw. */
#include "kernels/rng.h"
#include "tests/support.h"

#include <math.h>
#include <string.h>

static struct srf_features_draw_args args_of(enum srf_feature_kind kind, int64_t m, int64_t d,
                                             uint64_t draw)
{
    return (struct srf_features_draw_args){
        .kind = kind, .seed = test_seed(), .draw = draw, .m = m, .d = d};
}

static double dot(const double *a, const double *b, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
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

/* Largest |cosine(row i, row j) - want| over pairs of one block of n rows. */
static double worst_cosine(const double *w, int64_t n, int64_t d, double want)
{
    double worst = 0;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < i; j++) {
            const double *a = w + i * d, *b = w + j * d;
            double off = fabs(dot(a, b, d) / sqrt(dot(a, a, d) * dot(b, b, d)) - want);
            if (!(off <= worst)) worst = off;
        }
    return worst;
}

static const int64_t dims[] = {2, 3, 5, 16, 17, 64, 128, 256};
enum { N_DIMS = sizeof dims / sizeof *dims };

static void rotations_are_orthogonal(void **state)
{
    (void)state;
    for (int i = 0; i < N_DIMS; i++) {
        int64_t d = dims[i];
        double *q, *scratch;
        test_ok(SRF_ALLOC(q, d * d));
        test_ok(SRF_ALLOC(scratch, 2 * d));
        struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 0, 1, (uint32_t)d);
        for (int hd = 0; hd < 2; hd++) {
            if (hd && (d & (d - 1))) continue;
            if (hd)
                srf__hd_rotation(&r, d, q);
            else
                srf__haar_rotation(&r, d, q, scratch);
            double worst = 0;
            for (int64_t a = 0; a < d; a++)
                for (int64_t b = 0; b <= a; b++) {
                    double off = fabs(dot(q + a * d, q + b * d, d) - (a == b));
                    if (!(off <= worst)) worst = off;
                }
            if (!(worst <= 1e-13)) {
                print_error("%s d=%lld: |Q Q^T - I| = %.3g\n", hd ? "hd" : "haar", (long long)d,
                            worst);
                fail();
            }
        }
        srf__free(scratch);
        srf__free(q);
    }
}

/* Haar on O(d): entries, traces and determinants have the moments that every other orthogonal
 * matrix only has without the sign fix's bias: E tr = 0, E tr^2 = 1, E det = 0, E q_ij^2 = 1/d,
 * E q_ij^4 = 3/(d (d+2)), E q_11 q_12 q_21 q_22 = -1/((d-1) d (d+2)). */
static void haar_moments(void **state)
{
    (void)state;
    enum { D = 3, N = 60000 };
    double q[D * D], scratch[2 * D], trace = 0, trace_sq = 0, det = 0, mixed = 0;
    double first[D * D] = {0}, second[D * D] = {0}, fourth[D * D] = {0};
    for (uint32_t n = 0; n < N; n++) {
        struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 1, n, 0);
        srf__haar_rotation(&r, D, q, scratch);
        double t = q[0] + q[4] + q[8];
        trace += t;
        trace_sq += t * t;
        det += q[0] * (q[4] * q[8] - q[5] * q[7]) - q[1] * (q[3] * q[8] - q[5] * q[6]) +
               q[2] * (q[3] * q[7] - q[4] * q[6]);
        mixed += q[0] * q[1] * q[3] * q[4];
        for (int i = 0; i < D * D; i++) {
            first[i] += q[i];
            second[i] += q[i] * q[i];
            fourth[i] += pow(q[i], 4);
        }
    }
    check_mean("tr Q", trace, N, 0, 1);
    check_mean("(tr Q)^2", trace_sq, N, 1, 1.7); /* sd of N(0,1)^2 is 1.41; small d has more */
    check_mean("det Q", det, N, 0, 1);
    check_mean("q11 q12 q21 q22", mixed, N, -1.0 / (2 * 3 * 5), 0.15);
    for (int i = 0; i < D * D; i++) {
        check_mean("q_ij", first[i], N, 0, sqrt(1.0 / 3));
        check_mean("q_ij^2", second[i], N, 1.0 / 3, 0.3);
        check_mean("q_ij^4", fourth[i], N, 3.0 / 15, 0.27);
    }
}

static void pairwise_cosines(void **state)
{
    (void)state;
    double *w, *bias;
    test_ok(SRF_ALLOC(w, 256 * 256 * 2));
    test_ok(SRF_ALLOC(bias, 512));
    for (int i = 0; i < N_DIMS; i++)
        for (int hd = 0; hd < 2; hd++)
            for (int kind = SRF_ORTHOGONAL; kind <= SRF_SIMPLEX; kind++) {
                int64_t d = dims[i], m = d + d / 2; /* one full block, one partial */
                if (hd && (d & (d - 1))) continue;
                struct srf_features_draw_args a = args_of((enum srf_feature_kind)kind, m, d, 0);
                a.rotation = hd ? SRF_ROT_HD : SRF_ROT_HAAR;
                test_ok(srf_features_draw_one(&a, 1, 2, 0, w, bias));
                double want = kind == SRF_SIMPLEX ? -1.0 / (double)(d - 1) : 0;
                assert_true(worst_cosine(w, d, d, want) <= 1e-12);
                assert_true(worst_cosine(w + d * d, m - d, d, want) <= 1e-12);
                for (int64_t j = 0; j < m; j++) assert_true(bias[j] == 0);
            }
    srf__free(bias);
    srf__free(w);
}

/* Each entry N(0, 1), each squared norm chi^2_d, rows of different blocks independent. */
static void marginals(void **state)
{
    (void)state;
    enum { D = 16, M = 24, N = 2000 };
    double w[M * D], bias[M];
    for (int kind = SRF_IID; kind <= SRF_SIMPLEX_PLUS; kind++)
        for (int hd = 0; hd <= (kind != SRF_IID); hd++) {
            double z[5] = {0}, norm = 0, norm_sq = 0, between = 0, entry[2] = {0}, last[2] = {0};
            for (uint64_t n = 0; n < N; n++) {
                struct srf_features_draw_args a = args_of((enum srf_feature_kind)kind, M, D, n);
                a.rotation = hd ? SRF_ROT_HD : SRF_ROT_HAAR;
                test_ok(srf_features_draw_one(&a, 0, 0, 0, w, bias));
                for (int i = 0; i < M * D; i++)
                    for (int k = 1; k <= 4; k++) z[k] += pow(w[i], k);
                for (int i = 0; i < M; i++) {
                    double s = dot(w + i * D, w + i * D, D);
                    norm += s;
                    norm_sq += (s - D) * (s - D);
                }
                between += dot(w, w + D * D, D);
                for (int k = 0; k < 2; k++) {
                    entry[k] += pow(w[0], k + 1);
                    last[k] += pow(w[M * D - 1], k + 1);
                }
            }
            /* Rows of a block are dependent: the standard errors take M rows for one. */
            double rows = (double)N, entries = rows * M * D;
            check_mean("w", z[1] / M / D, rows, 0, 1);
            check_mean("w^2", z[2] * rows / entries, rows, 1, 0.2);
            check_mean("w^3", z[3] * rows / entries, rows, 0, sqrt(15));
            /* Entries of an hd rotation take few values, so only about Gaussian. */
            if (!hd) check_mean("w^4", z[4] * rows / entries, rows, 3, 1);
            check_mean("|w|^2", norm, rows * M, D, sqrt(2.0 * D));
            check_mean("(|w|^2-d)^2", norm_sq, rows * M, 2 * D, sqrt(8.0 * D * D + 48 * D));
            check_mean("w.w' of two blocks", between, rows, 0, sqrt((double)D));
            check_mean("first entry", entry[0], rows, 0, 1);
            check_mean("first entry^2", entry[1], rows, 1, sqrt(2));
            check_mean("last entry", last[0], rows, 0, 1);
            check_mean("last entry^2", last[1], rows, 1, sqrt(2));
        }
}

/* The fixed point of Eq. 17 balances: every row points against the sum of the others. Five sweeps
 * come close, much closer than the simplex itself with these norms. */
static void simplex_plus_balances(void **state)
{
    (void)state;
    enum { D = 64 };
    double *w, sum_norm[2], bias[D];
    test_ok(SRF_ALLOC(w, D * D));
    for (int plus = 0; plus < 2; plus++) {
        struct srf_features_draw_args a = args_of(plus ? SRF_SIMPLEX_PLUS : SRF_SIMPLEX, D, D, 3);
        test_ok(srf_features_draw_one(&a, 0, 0, 0, w, bias));
        double sum[D] = {0};
        for (int i = 0; i < D * D; i++) sum[i % D] += w[i];
        sum_norm[plus] = sqrt(dot(sum, sum, D));
    }
    assert_true(sum_norm[0] > 1);
    assert_true(sum_norm[1] < 1e-3 * sum_norm[0]);
    srf__free(w);
}

/* Fewer features are the first rows of more; draw, layer, set and seed give other numbers. */
static void addressing(void **state)
{
    (void)state;
    enum { D = 16, M = 40 };
    double w[M * D], other[M * D], bias[M];
    for (int kind = SRF_IID; kind <= SRF_SIMPLEX_PLUS; kind++) {
        struct srf_features_draw_args a = args_of((enum srf_feature_kind)kind, M, D, 5);
        test_ok(srf_features_draw_one(&a, 3, 2, 0, w, bias));
        test_ok(srf_features_draw_one(&a, 3, 2, 0, other, bias));
        assert_memory_equal(w, other, sizeof w);
        for (int64_t m = 1; m < M; m++) {
            a.m = m;
            test_ok(srf_features_draw_one(&a, 3, 2, 0, other, bias));
            assert_memory_equal(w, other, (size_t)m * D * sizeof *w);
        }
        for (int change = 0; change < 5; change++) {
            a = args_of((enum srf_feature_kind)kind, M, D, change == 0 ? 6 : 5);
            if (change == 1) a.seed++;
            if (change == 2) a.draw += 1ull << 32;
            test_ok(srf_features_draw_one(&a, change == 3 ? 2 : 3, change == 4 ? 3 : 2, 0, other,
                                          bias));
            for (int i = 0; i < M * D; i++) assert_true(w[i] != other[i]);
        }
        /* Two blocks of one draw. */
        for (int i = 0; i < D * D; i++) assert_true(w[i] != w[(D + i) % (M * D)] || i >= M * D);
        assert_true(memcmp(w, w + D * D, D * D * sizeof *w) != 0);
    }
}

/* The stream is a promise to saved runs and to other devices: numbers made by another program from
 * the table in features.h. Rows are first of the first block, last of it, first and second of the
 * next; columns 0, 1, d - 1, 0. */
static void published_layout(void **state)
{
    (void)state;
    static const struct {
        enum srf_feature_kind kind;
        enum srf_rotation rotation;
        int64_t d;
        double want[4];
    } rows[] = {
        {SRF_IID,
         SRF_ROT_HAAR,
         5,
         {1.170020904983, 0.161298086085, -1.291928746794, 0.062030996481}},
        {SRF_ORTHOGONAL,
         SRF_ROT_HAAR,
         5,
         {0.624015041579, 1.036288590819, -0.037387515516, 0.601737636548}},
        {SRF_SIMPLEX,
         SRF_ROT_HAAR,
         5,
         {0.543318508437, 1.546900993468, 0.085046197059, 0.425005491294}},
        {SRF_SIMPLEX_PLUS,
         SRF_ROT_HAAR,
         5,
         {0.630411609680, 1.547215774189, 0.877858932291, 0.429343891390}},
        {SRF_SIMPLEX,
         SRF_ROT_HD,
         4,
         {0.435259100003, -1.431218964876, 0.446253091366, -1.844539288428}},
        {SRF_ORTHOGONAL,
         SRF_ROT_HAAR,
         4,
         {0.198907247886, 0.666979890910, 0.283589820421, -0.851407749007}},
    };
    double w[7 * 5], bias[7];
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        int64_t d = rows[i].d;
        struct srf_features_draw_args a = {.kind = rows[i].kind,
                                           .rotation = rows[i].rotation,
                                           .seed = 0x0123456789abcdef,
                                           .draw = 0x100000007,
                                           .m = d + 2,
                                           .d = d};
        test_ok(srf_features_draw_one(&a, 3, 2, 0, w, bias));
        double got[4] = {w[0], w[(d - 1) * d + 1], w[d * d + d - 1], w[(d + 1) * d]};
        test_close(srf_feature_kind_name(a.kind), got, rows[i].want, 4, 1e-11);
    }
}

static void normalized_rows_and_oprf(void **state)
{
    (void)state;
    enum { D = 8, M = 20 };
    double w[M * D], unit[M * D], oprf[M * D], bias[M], oprf_bias[M], a_value = -0.125;
    for (int kind = SRF_IID; kind <= SRF_SIMPLEX_PLUS; kind++) {
        struct srf_features_draw_args a = args_of((enum srf_feature_kind)kind, M, D, 0);
        test_ok(srf_features_draw_one(&a, 0, 0, 0, w, bias));
        test_ok(srf_features_draw_one(&a, 0, 0, a_value, oprf, oprf_bias));
        a.normalize_rows = true;
        test_ok(srf_features_draw_one(&a, 0, 0, 0, unit, bias));
        for (int i = 0; i < M; i++) {
            const double *row = w + i * D;
            double norm_sq = dot(row, row, D);
            assert_true(fabs(dot(unit + i * D, unit + i * D, D) - 1) < 1e-14);
            double want_bias = a_value * norm_sq + D / 4.0 * log(1 - 4 * a_value);
            assert_true(fabs(oprf_bias[i] - want_bias) < 1e-12 * norm_sq);
            for (int j = 0; j < D; j++) {
                assert_true(fabs(unit[i * D + j] - row[j] / sqrt(norm_sq)) < 1e-14);
                assert_true(fabs(oprf[i * D + j] - sqrt(1 - 4 * a_value) * row[j]) < 1e-13);
            }
        }
    }
}

static void oprf_parameter(void **state)
{
    (void)state;
    assert_true(srf_oprf_a(0, 64) == 0);
    assert_true(srf_oprf_a(-1, 64) == 0);
    assert_true(srf_oprf_a(NAN, 64) == 0);
    static const long double lambdas[] = {1e-3L, 0.1L, 1, 7.5L, 100};
    for (int i = 0; i < 5; i++)
        for (int64_t d = 2; d <= 128; d *= 8) {
            long double l = lambdas[i], n = (long double)d;
            long double rho = (sqrtl((2 * l + n) * (2 * l + n) + 8 * n * l) - 2 * l - n) / (4 * l);
            double want = (double)((1 - 1 / rho) / 8), got = srf_oprf_a((double)l, d);
            test_close("A", &got, &want, 1, 1e-10);
            assert_true(got < 0);
        }
}

/* The op rounds what the host draws, whatever the number of threads. */
static void op_is_the_host_draw(void **state)
{
    (void)state;
    enum { L = 3, H = 2 };
    static const struct {
        int64_t m, d;
    } shapes[] = {{1, 2}, {40, 16}, {7, 5}, {64, 64}, {100, 32}};
    for (int type = 0; type < 2; type++)
        for (int threads = 1; threads <= 3; threads += 2)
            for (int s = 0; s < 5; s++)
                for (int kind = SRF_IID; kind <= SRF_SIMPLEX_PLUS; kind++) {
                    struct srf_ctx *ctx;
                    test_ok(srf_ctx_create("cpu", type ? SRF_F64 : SRF_F32, threads, &ctx));
                    int64_t m = shapes[s].m, d = shapes[s].d, n = L * H * m;
                    double oprf_a[L * H] = {0, -0.1, -0.2, 0, -0.3, -0.4};
                    struct srf_features_draw_args a = args_of((enum srf_feature_kind)kind, m, d, 9);
                    a.n_layers = L;
                    a.n_sets = H;
                    a.oprf_a = s % 2 ? oprf_a : NULL;
                    double *want, *want_bias, *got;
                    test_ok(SRF_ALLOC(want, n * d));
                    test_ok(SRF_ALLOC(want_bias, n));
                    test_ok(SRF_ALLOC(got, n * d));
                    for (int i = 0; i < L * H; i++)
                        test_ok(srf_features_draw_one(&a, i / H, i % H, s % 2 ? oprf_a[i] : 0,
                                                      want + i * m * d, want_bias + i * m));
                    a.w = srf__calloc((size_t)(n * d), 8);
                    a.bias = srf__calloc((size_t)n, 8);
                    test_ok(
                        srf_ctx_reserve_workspace(ctx, ctx->be->features_draw_workspace(ctx, &a)));
                    test_ok(srf_run_features_draw(ctx, &a));
                    test_to_double(ctx, a.w, got, n * d);
                    test_close("w", got, want, n * d, type ? 0 : 1e-7);
                    test_to_double(ctx, a.bias, got, n);
                    test_close("bias", got, want_bias, n, type ? 0 : 1e-7);
                    srf__free(a.w);
                    srf__free(a.bias);
                    srf__free(got);
                    srf__free(want_bias);
                    srf__free(want);
                    srf_ctx_free(ctx);
                }
}

static void bad_arguments(void **state)
{
    (void)state;
    double w[64], bias[16];
    static const struct {
        int kind, rotation;
        int64_t m, d, layer, set;
        double oprf_a;
        const char *says;
    } rows[] = {
        {SRF_SIMPLEX, SRF_ROT_HD, 3, 3, 0, 0, 0, "power of two, not 3"},
        {SRF_SIMPLEX, SRF_ROT_HAAR, 3, 1, 0, 0, 0, "dimension 1"},
        {SRF_SIMPLEX, SRF_ROT_HAAR, 0, 4, 0, 0, 0, "0 features"},
        {SRF_SIMPLEX, SRF_ROT_HAAR, -1, 4, 0, 0, 0, "-1 features"},
        {SRF_IID, SRF_ROT_HAAR, 65536 * 4 + 1, 4, 0, 0, 0, "expected 1 to 262144"},
        {4, SRF_ROT_HAAR, 4, 4, 0, 0, 0, "unknown kind"},
        {SRF_SIMPLEX, 2, 4, 4, 0, 0, 0, "unknown rotation"},
        {SRF_SIMPLEX, SRF_ROT_HAAR, 4, 4, -1, 0, 0, "layer -1"},
        {SRF_SIMPLEX, SRF_ROT_HAAR, 4, 4, 0, 65536, 0, "set 65536"},
        {SRF_SIMPLEX, SRF_ROT_HAAR, 4, 4, 0, 0, 0.01, "A = 0.01"},
        {SRF_SIMPLEX, SRF_ROT_HAAR, 4, 4, 0, 0, NAN, "A = "},
        {SRF_SIMPLEX, SRF_ROT_HAAR, 4, 4, 0, 0, -INFINITY, "A = -inf"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct srf_features_draw_args a =
            args_of((enum srf_feature_kind)rows[i].kind, rows[i].m, rows[i].d, 0);
        a.rotation = (enum srf_rotation)rows[i].rotation;
        srf_status st =
            srf_features_draw_one(&a, rows[i].layer, rows[i].set, rows[i].oprf_a, w, bias);
        assert_int_equal(st, SRF_INVALID);
        if (!strstr(srf_error_message(), rows[i].says)) {
            print_error("row %zu: '%s' lacks '%s'\n", i, srf_error_message(), rows[i].says);
            fail();
        }
    }
    struct srf_features_draw_args a = args_of(SRF_SIMPLEX, 4, 4, 0);
    srf__fail_alloc_after(0);
    assert_int_equal(srf_features_draw_one(&a, 0, 0, 0, w, bias), SRF_NOMEM);
    srf__fail_alloc_after(-1);
}

static void names(void **state)
{
    (void)state;
    for (int i = SRF_IID; i <= SRF_SIMPLEX_PLUS; i++) {
        enum srf_feature_kind kind;
        test_ok(srf_feature_kind_parse(srf_feature_kind_name((enum srf_feature_kind)i), &kind));
        assert_int_equal(kind, i);
    }
    for (int i = SRF_ROT_HAAR; i <= SRF_ROT_HD; i++) {
        enum srf_rotation rotation;
        test_ok(srf_rotation_parse(srf_rotation_name((enum srf_rotation)i), &rotation));
        assert_int_equal(rotation, i);
    }
    enum srf_feature_kind kind;
    enum srf_rotation rotation;
    assert_int_equal(srf_feature_kind_parse("Simplex", &kind), SRF_INVALID);
    assert_non_null(strstr(srf_error_message(), "iid, orthogonal, simplex or simplex+"));
    assert_int_equal(srf_rotation_parse("", &rotation), SRF_INVALID);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rotations_are_orthogonal),
        cmocka_unit_test(haar_moments),
        cmocka_unit_test(pairwise_cosines),
        cmocka_unit_test(marginals),
        cmocka_unit_test(simplex_plus_balances),
        cmocka_unit_test(addressing),
        cmocka_unit_test(normalized_rows_and_oprf),
        cmocka_unit_test(oprf_parameter),
        cmocka_unit_test(op_is_the_host_draw),
        cmocka_unit_test(bad_arguments),
        cmocka_unit_test(names),
        cmocka_unit_test(published_layout),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
