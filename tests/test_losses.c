/* xent, head_loss and mse. */
#include "tests/ref/dense.h"
#include "tests/ref/twin.h"

#include <string.h>

static const int64_t shapes[][2] = {{1, 1},    {1, 2},    {5, 17}, {3, 512}, {3, 513},
                                    {2, 2048}, {3, 4099}, {0, 9},  {64, 300}};
#define N_SHAPES ((int)(sizeof shapes / sizeof *shapes))
enum { MAX_ROWS = 64 };

static void random_targets(int32_t *targets, int64_t n, int64_t v)
{
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 2, (uint32_t)n, (uint32_t)v);
    for (int64_t i = 0; i < n; i++)
        targets[i] = i % 5 == 3 ? -1 : (int32_t)srf_rng_below(&r, (uint64_t)v);
}

/* --- reference against central differences ---------------------------------------------------- */

static double loss(void *p)
{
    struct srf_xent_args a = *(struct srf_xent_args *)p;
    const double *nll = a.nll, *kl = a.kl;
    a.dlogits = NULL;
    ref_xent(&a);
    double sum = 0;
    for (int64_t i = 0; i < a.n; i++) sum += a.scale * (a.ce_weight * nll[i] + a.kl_weight * kl[i]);
    return sum;
}

static void test_reference_gradient(void **state)
{
    (void)state;
    enum { N = 4, V = 6 };
    double logits[N * V], teacher[N * V], nll[N], kl[N], d[N * V];
    const int32_t targets[N] = {2, -1, 5, 0};
    test_normal(logits, N * V, 1.5, 1);
    test_normal(teacher, N * V, 1.5, 2);
    struct srf_xent_args a = {.n = N,
                              .v = V,
                              .logits = logits,
                              .targets = targets,
                              .teacher = teacher,
                              .scale = 0.3,
                              .ce_weight = 0.7,
                              .kl_weight = 1.9,
                              .nll = nll,
                              .kl = kl,
                              .dlogits = d};
    ref_xent(&a);
    test_gradient("ref dlogits", loss, &a, logits, d, N * V, 1e-8);
}

/* --- backend against reference ---------------------------------------------------------------- */

enum { TEACHER = 1, GRADIENT = 2, IN_PLACE = 4, KL_OUT = 8, KL_ONLY = 16 };

static void check(struct twins *s, int64_t n, int64_t v, double scale, double offset, int what)
{
    int32_t targets[MAX_ROWS];
    random_targets(targets, n, v);
    struct twin logits = twin_normal(s, n * v, scale), teacher = twin_normal(s, n * v, scale);
    double *x = twin_values(s, logits), *t = twin_values(s, teacher);
    for (int64_t i = 0; i < n * v; i++) x[i] += offset, t[i] += 1.5 * offset;
    twin_set(s, &logits, x);
    twin_set(s, &teacher, t);
    srf__free(x), srf__free(t);
    struct twin nll = twin_fill(s, n, NAN), kl = twin_fill(s, n, NAN);
    struct twin d = twin_fill(s, n * v, NAN);
    bool in_place = what & IN_PLACE;
#define ARGS(side)                                                                                 \
    .n = n, .v = v, .logits = logits.side, .targets = targets,                                     \
    .teacher = what & TEACHER ? teacher.side : NULL, .scale = 0.37,                                \
    .ce_weight = what & KL_ONLY ? 0 : 0.8, .kl_weight = 2.5, .nll = nll.side,                      \
    .kl = what & KL_OUT ? kl.side : NULL,                                                          \
    .dlogits = in_place ? logits.side : (what & GRADIENT ? d.side : NULL)
    struct twin kept = twin_of(s, logits.ref, n * v);
    twin_run(s, xent, ARGS(dev));
    ref_xent(&(struct srf_xent_args){ARGS(ref)});
#undef ARGS
    /* a logit is off by offset eps before we begin: so are nll (absolutely) and p (relatively) */
    double eps = twin_tol(s, 1), tol = eps * (4 + scale + sqrt((double)v) / 4);
    twin_close(s, "nll", nll, tol, 1 + scale);
    if (what & TEACHER) twin_close(s, "kl", kl, 2 * tol, 1 + scale);
    twin_close(s, in_place ? "dlogits in place" : "dlogits", in_place ? logits : d, 2 * tol, 0);
    if (!in_place) {
        memcpy(logits.ref, kept.ref, (size_t)(n * v) * sizeof *kept.ref);
        twin_close(s, "logits kept", logits, 0, 0);
    }
}

static void shapes_body(enum srf_dtype dtype, int threads)
{
    for (int k = 0; k < N_SHAPES; k++)
        for (int what = 0; what < 32; what++) {
            if ((what & (GRADIENT | IN_PLACE)) == (GRADIENT | IN_PLACE)) continue;
            if ((what & (KL_OUT | KL_ONLY)) && !(what & TEACHER)) continue;
            struct twins s = twins_new(dtype, threads);
            check(&s, shapes[k][0], shapes[k][1], 2, 0, what);
            twins_free(&s);
        }
}

static void test_shapes(void **state)
{
    (void)state;
    twin_each(shapes_body);
}

/* Wide ranges and common offsets, up to logits that overflow if squared or exponentiated. */
static void ranges_body(enum srf_dtype dtype, int threads)
{
    const double cases[][2] = {{10, 0}, {1, 64}, {1, -1024}, {300, 0}, {1e4, 1e5}, {1e30, 0}};
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        struct twins s = twins_new(dtype, threads);
        check(&s, 6, 700, cases[k][0], cases[k][1], TEACHER | GRADIENT | KL_OUT);
        twins_free(&s);
    }
}

static void test_ranges(void **state)
{
    (void)state;
    twin_each(ranges_body);
}

/* A student equal to its teacher: KL is 0 to rounding, whatever the offset of the logits. */
static void equal_body(enum srf_dtype dtype, int threads)
{
    enum { N = 3, V = 1000 };
    struct twins s = twins_new(dtype, threads);
    const int32_t targets[N] = {0, 1, 2};
    struct twin x = twin_normal(&s, N * V, 3), nll = twin_fill(&s, N, NAN);
    struct twin kl = twin_fill(&s, N, NAN), d = twin_fill(&s, N * V, NAN);
    double *t = twin_values(&s, x);
    for (int i = 0; i < N * V; i++) t[i] = 4096 + round(t[i] * 64) / 64; /* exact in fp32 */
    struct twin teacher = twin_of(&s, t, N * V);
    for (int i = 0; i < N * V; i++) t[i] -= 4096;
    twin_set(&s, &x, t);
    srf__free(t);
    twin_run(&s, xent, .n = N, .v = V, .logits = x.dev, .targets = targets, .teacher = teacher.dev,
             .scale = 1, .kl_weight = 1, .nll = nll.dev, .kl = kl.dev, .dlogits = d.dev);
    memset(kl.ref, 0, N * sizeof *kl.ref);
    memset(d.ref, 0, N * V * sizeof *d.ref);
    twin_close(&s, "kl", kl, twin_tol(&s, 1), 0);
    twin_close(&s, "dlogits", d, twin_tol(&s, 1), 0);
    twins_free(&s);
}

static void test_equal(void **state)
{
    (void)state;
    twin_each(equal_body);
}

/* NaN and +inf logits show; -inf means probability 0; rows without a target hide nothing else. */
static void nonfinite_body(enum srf_dtype dtype, int threads)
{
    enum { N = 6, V = 40 };
    struct twins s = twins_new(dtype, threads);
    const int32_t targets[N] = {1, 1, 1, -1, 1, 1};
    double x[N * V];
    test_normal(x, N * V, 1, 7);
    x[0 * V + 30] = NAN;
    x[1 * V + 0] = INFINITY;
    x[2 * V + 0] = -INFINITY;
    x[3 * V + 5] = NAN;
    x[4 * V + 1] = -INFINITY;
    struct twin logits = twin_of(&s, x, N * V), nll = twin_fill(&s, N, 0);
    struct twin kl = twin_fill(&s, N, 0), d = twin_fill(&s, N * V, 0);
    double t[N * V];
    test_normal(t, N * V, 1, 8);
    t[5 * V + 7] = -INFINITY; /* 0 log 0 = 0 */
    struct twin teacher = twin_of(&s, t, N * V);
    twin_run(&s, xent, .n = N, .v = V, .logits = logits.dev, .targets = targets,
             .teacher = teacher.dev, .scale = 1, .ce_weight = 1, .kl_weight = 1, .nll = nll.dev,
             .kl = kl.dev, .dlogits = d.dev);
    double *got = twin_values(&s, nll), *got_kl = twin_values(&s, kl), *got_d = twin_values(&s, d);
    assert_true(isnan(got[0]) && isnan(got[1]) && isfinite(got[2]) && got[3] == 0);
    assert_true(isnan(got_kl[0]) && isnan(got_kl[1]) && got_kl[2] == INFINITY && got_kl[3] == 0);
    assert_true(got[4] == INFINITY && isfinite(got[5]) && isfinite(got_kl[5]));
    assert_true(isnan(got_d[0]) && isnan(got_d[V + 3]) && isfinite(got_d[5 * V]));
    for (int j = 0; j < V; j++) assert_true(got_d[3 * V + j] == 0 && isfinite(got_d[2 * V + j]));
    srf__free(got), srf__free(got_kl), srf__free(got_d);
    twins_free(&s);
}

static void test_nonfinite(void **state)
{
    (void)state;
    twin_each(nonfinite_body);
}

/* The gradient of a row sums to 0, for any weights. */
static void sums_body(enum srf_dtype dtype, int threads)
{
    enum { N = 5, V = 777 };
    struct twins s = twins_new(dtype, threads);
    const int32_t targets[N] = {3, 776, 0, 5, 5};
    struct twin x = twin_normal(&s, N * V, 4), t = twin_normal(&s, N * V, 4);
    struct twin nll = twin_fill(&s, N, NAN), d = twin_fill(&s, N * V, NAN);
    twin_run(&s, xent, .n = N, .v = V, .logits = x.dev, .targets = targets, .teacher = t.dev,
             .scale = 1, .ce_weight = 1, .kl_weight = 3, .nll = nll.dev, .dlogits = d.dev);
    double *got = twin_values(&s, d);
    for (int i = 0; i < N; i++) {
        double sum = 0;
        for (int j = 0; j < V; j++) sum += got[i * V + j];
        assert_true(fabs(sum) <= twin_tol(&s, V));
    }
    srf__free(got);
    twins_free(&s);
}

static void test_sums(void **state)
{
    (void)state;
    twin_each(sums_body);
}

/* --- mse -------------------------------------------------------------------------------------- */

static void mse_body(enum srf_dtype dtype, int threads)
{
    const int64_t lengths[] = {1, 31, 1000, 70001, 0};
    for (int k = 0; k < 10; k++) {
        int64_t n = lengths[k / 2];
        struct twins s = twins_new(dtype, threads);
        struct twin x = twin_normal(&s, n, 1), y = twin_normal(&s, n, 1);
        struct twin dx = twin_normal(&s, n, 1), sum = twin_fill(&s, 1, 2.5);
        bool wanted = k % 2;
#define ARGS(side)                                                                                 \
    .n = n, .x = x.side, .y = y.side, .scale = 0.7, .dx = wanted ? dx.side : NULL, .sum = sum.side
        twin_run(&s, mse, ARGS(dev));
        ref_mse(&(struct srf_mse_args){ARGS(ref)});
#undef ARGS
        twin_close(&s, "sum", sum, twin_tol(&s, dtype == SRF_F64 ? n : 1), 0);
        twin_close(&s, "dx", dx, twin_tol(&s, 1), 1);
        twins_free(&s);
    }
}

static void test_mse(void **state)
{
    (void)state;
    twin_each(mse_body);
}

static double mse_loss(void *p)
{
    struct srf_mse_args a = *(struct srf_mse_args *)p;
    a.dx = NULL;
    *(double *)a.sum = 0;
    ref_mse(&a);
    return a.scale * *(double *)a.sum;
}

static void test_mse_reference_gradient(void **state)
{
    (void)state;
    enum { N = 9 };
    double x[N], y[N], dx[N] = {0}, sum = 0;
    test_normal(x, N, 1, 1);
    test_normal(y, N, 1, 2);
    struct srf_mse_args a = {.n = N, .x = x, .y = y, .scale = 0.7, .dx = dx, .sum = &sum};
    ref_mse(&a);
    test_gradient("ref dx", mse_loss, &a, x, dx, N, 1e-8);
}

/* --- the head and its loss -------------------------------------------------------------------- */

struct head_env {
    struct srf_head_loss_args args;
    double dx[64], dw[64];
};

static double head_loss(void *p)
{
    struct head_env *e = p;
    struct srf_head_loss_args a = e->args;
    a.dx = e->dx, a.dw = e->dw;
    ref_head_loss(&a);
    double sum = 0;
    for (int64_t i = 0; i < a.n; i++) sum += a.scale * a.ce_weight * ((double *)a.nll)[i];
    return sum;
}

static void test_head_reference_gradient(void **state)
{
    (void)state;
    enum { N = 4, C = 3, V = 6, LD = 8 };
    double x[N * C], w[LD * C], logits[N * LD], nll[N], dx[N * C], dw[LD * C] = {0};
    const int32_t targets[N] = {2, -1, 5, 0};
    test_normal(x, N * C, 1.5, 1);
    test_normal(w, LD * C, 1, 2);
    struct head_env e = {.args = {.n = N,
                                  .c = C,
                                  .v = V,
                                  .ld = LD,
                                  .x = x,
                                  .w = w,
                                  .targets = targets,
                                  .scale = 0.3,
                                  .ce_weight = 0.7,
                                  .logits = logits,
                                  .nll = nll,
                                  .dx = dx,
                                  .dw = dw}};
    ref_head_loss(&e.args);
    test_gradient("ref dx", head_loss, &e, x, dx, N * C, 1e-8);
    test_gradient("ref dw", head_loss, &e, w, dw, LD * C, 1e-8);
}

static void head_body(enum srf_dtype dtype, int threads)
{
    const int64_t cases[][4] = {
        {1, 1, 1, 1}, {5, 3, 17, 24}, {64, 16, 300, 300}, {33, 48, 513, 520}, {0, 4, 9, 9}};
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        int64_t n = cases[k][0], c = cases[k][1], v = cases[k][2], ld = cases[k][3];
        struct twins s = twins_new(dtype, threads);
        int32_t targets[MAX_ROWS];
        random_targets(targets, n, v);
        struct twin x = twin_normal(&s, n * c, 1), w = twin_normal(&s, ld * c, 1);
        struct twin logits = twin_fill(&s, n * ld, NAN), nll = twin_fill(&s, n, NAN);
        struct twin dx = twin_fill(&s, n * c, NAN), dw = twin_normal(&s, ld * c, 1);
#define ARGS(side)                                                                                 \
    .n = n, .c = c, .v = v, .ld = ld, .x = x.side, .w = w.side, .targets = targets, .scale = 0.37, \
    .ce_weight = 0.8, .logits = logits.side, .nll = nll.side, .dx = dx.side, .dw = dw.side
        twin_run(&s, head_loss, ARGS(dev));
        ref_head_loss(&(struct srf_head_loss_args){ARGS(ref)});
#undef ARGS
        double tol = twin_tol(&s, c) * (4 + sqrt((double)v) / 4);
        twin_close(&s, "nll", nll, tol, 1 + sqrt((double)c));
        twin_close(&s, "dx", dx, 2 * tol, 0);
        twin_close(&s, "dw", dw, 2 * tol, 0);
        twins_free(&s);
    }
}

static void test_head(void **state)
{
    (void)state;
    twin_each(head_body);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference_gradient),
        cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_ranges),
        cmocka_unit_test(test_equal),
        cmocka_unit_test(test_nonfinite),
        cmocka_unit_test(test_sums),
        cmocka_unit_test(test_head_reference_gradient),
        cmocka_unit_test(test_head),
        cmocka_unit_test(test_mse),
        cmocka_unit_test(test_mse_reference_gradient),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
