/* layernorm_fwd, layernorm_bwd. */
#include "tests/ref/dense.h"
#include "tests/ref/twin.h"

static const int64_t shapes[][2] = {{1, 1},  {1, 13},  {7, 1}, {5, 64},
                                    {3, 65}, {41, 97}, {0, 8}, {130, 384}};
#define N_SHAPES ((int)(sizeof shapes / sizeof *shapes))

struct env {
    struct srf_layernorm_fwd_args fwd;
    const double *dy;
};

static double loss(void *p)
{
    struct env *e = p;
    ref_layernorm_fwd(&e->fwd);
    return test_dot(e->fwd.y, e->dy, e->fwd.n * e->fwd.c);
}

static void test_reference_gradient(void **state)
{
    (void)state;
    enum { N = 3, C = 7 };
    double x[N * C], gamma[C], beta[C], y[N * C], mean[N], rstd[N], dy[N * C];
    test_normal(x, N * C, 2, 1);
    test_normal(gamma, C, 1, 2);
    test_normal(beta, C, 1, 3);
    test_normal(dy, N * C, 1, 4);
    struct env e = {.fwd = {.n = N,
                            .c = C,
                            .eps = 1e-5,
                            .x = x,
                            .gamma = gamma,
                            .beta = beta,
                            .y = y,
                            .mean = mean,
                            .rstd = rstd},
                    .dy = dy};
    loss(&e);
    double dx[N * C] = {0}, dgamma[C] = {0}, dbeta[C] = {0};
    ref_layernorm_bwd(&(struct srf_layernorm_bwd_args){.n = N,
                                                       .c = C,
                                                       .x = x,
                                                       .gamma = gamma,
                                                       .dy = dy,
                                                       .mean = mean,
                                                       .rstd = rstd,
                                                       .dx = dx,
                                                       .dgamma = dgamma,
                                                       .dbeta = dbeta});
    test_gradient("ref dx", loss, &e, x, dx, N * C, 1e-8);
    test_gradient("ref dgamma", loss, &e, gamma, dgamma, C, 1e-8);
    test_gradient("ref dbeta", loss, &e, beta, dbeta, C, 1e-8);
}

/* Forward and backward on x = offset + scale N(0, 1). */
static void check(struct twins *s, int64_t n, int64_t c, double scale, double offset)
{
    struct twin x = twin_normal(s, n * c, scale);
    double *values = twin_values(s, x);
    for (int64_t i = 0; i < n * c; i++) values[i] += offset;
    twin_set(s, &x, values);
    srf__free(values);
    struct twin gamma = twin_normal(s, c, 1), beta = twin_normal(s, c, 1);
    struct twin y = twin_fill(s, n * c, NAN), mean = twin_fill(s, n, NAN);
    struct twin rstd = twin_fill(s, n, NAN);
#define ARGS(side)                                                                                 \
    .n = n, .c = c, .eps = 1e-5, .x = x.side, .gamma = gamma.side, .beta = beta.side, .y = y.side, \
    .mean = mean.side, .rstd = rstd.side
    twin_run(s, layernorm_fwd, ARGS(dev));
    ref_layernorm_fwd(&(struct srf_layernorm_fwd_args){ARGS(ref)});
#undef ARGS
    /* an offset is taken off x: what is left has lost offset / scale of its precision */
    double tol = twin_tol(s, c) * (1 + fabs(offset) / scale);
    twin_close(s, "y", y, tol, 1);
    twin_close(s, "mean", mean, tol, scale);
    twin_close(s, "rstd", rstd, tol, 0);

    struct twin dy = twin_normal(s, n * c, 1), dx = twin_normal(s, n * c, 1);
    struct twin dgamma = twin_normal(s, c, 1), dbeta = twin_normal(s, c, 1);
    struct twin dx_sum = twin_normal(s, c, 1), again = twin_fill(s, n * c, NAN);
    /* both sides from the same mean and rstd: backward is tested by itself */
    double *m = twin_values(s, mean), *r = twin_values(s, rstd);
    twin_set(s, &mean, m);
    twin_set(s, &rstd, r);
    double largest = 0;
    for (int64_t i = 0; i < n; i++) largest = fmax(largest, r[i]);
    srf__free(m), srf__free(r);
#define ARGS(side)                                                                                 \
    .n = n, .c = c, .x = x.side, .gamma = gamma.side, .dy = dy.side, .mean = mean.side,            \
    .rstd = rstd.side, .dx = dx.side, .dgamma = dgamma.side, .dbeta = dbeta.side,                  \
    .dx_sum = dx_sum.side, .beta = beta.side, .y = again.side
    twin_run(s, layernorm_bwd, ARGS(dev));
    ref_layernorm_bwd(&(struct srf_layernorm_bwd_args){ARGS(ref)});
#undef ARGS
    twin_close(s, "dx", dx, twin_tol(s, c), largest);
    twin_close(s, "dgamma", dgamma, twin_tol(s, n), sqrt((double)n));
    twin_close(s, "dbeta", dbeta, twin_tol(s, n), sqrt((double)n));
    twin_close(s, "dx_sum", dx_sum, twin_tol(s, n + c), (1 + largest) * sqrt((double)n));
    double *first = twin_values(s, y), *second = twin_values(s, again);
    assert_memory_equal(second, first, (size_t)(n * c) * sizeof *first);
    srf__free(first), srf__free(second);
}

static void shapes_body(enum srf_dtype dtype, int threads)
{
    for (int k = 0; k < N_SHAPES; k++) {
        struct twins s = twins_new(dtype, threads);
        check(&s, shapes[k][0], shapes[k][1], 1, 0);
        twins_free(&s);
    }
}

static void test_shapes(void **state)
{
    (void)state;
    twin_each(shapes_body);
}

static void ranges_body(enum srf_dtype dtype, int threads)
{
    const double cases[][2] = {{1, 1000}, {1e-3, 0}, {1e4, 0}, {1e12, 0}, {1, -300}};
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        struct twins s = twins_new(dtype, threads);
        check(&s, 9, 64, cases[k][0], cases[k][1]);
        twins_free(&s);
    }
}

static void test_ranges(void **state)
{
    (void)state;
    twin_each(ranges_body);
}

/* A constant row has no variance: y is beta exactly, and nothing is infinite. */
static void constant_body(enum srf_dtype dtype, int threads)
{
    enum { N = 4, C = 33 };
    struct twins s = twins_new(dtype, threads);
    struct twin x = twin_fill(&s, N * C, 0.5), gamma = twin_normal(&s, C, 1);
    struct twin beta = twin_normal(&s, C, 1), y = twin_fill(&s, N * C, NAN);
    struct twin mean = twin_fill(&s, N, NAN), rstd = twin_fill(&s, N, NAN);
    twin_run(&s, layernorm_fwd, .n = N, .c = C, .eps = 1e-5, .x = x.dev, .gamma = gamma.dev,
             .beta = beta.dev, .y = y.dev, .mean = mean.dev, .rstd = rstd.dev);
    for (int i = 0; i < N * C; i++) y.ref[i] = beta.ref[i % C];
    twin_close(&s, "y", y, 0, 0);
    twins_free(&s);
}

static void test_constant(void **state)
{
    (void)state;
    twin_each(constant_body);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference_gradient),
        cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_ranges),
        cmocka_unit_test(test_constant),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
