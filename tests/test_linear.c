/* linear_fwd, linear_bwd: bias, accumulation, tanh-GELU and its derivative. */
#include "tests/ref/dense.h"
#include "tests/ref/twin.h"

static const int64_t shapes[][3] = {
    {1, 1, 1},   {1, 7, 5},   {3, 1, 2},    {2, 3, 1},    {5, 17, 13}, {33, 64, 65},
    {1, 96, 40}, {0, 16, 16}, {37, 41, 97}, {600, 31, 53} /* more rows than a step of dx */
};
#define N_SHAPES ((int)(sizeof shapes / sizeof *shapes))

/* --- the reference against central differences: y = act_out(gelu(pre) W + b) ------------------ */

struct env {
    struct srf_linear_fwd_args fwd;
    const double *pre, *dy; /* (n, in), (n, out) */
    double *x, *y;
};

static double loss(void *p)
{
    struct env *e = p;
    for (int64_t i = 0; e->pre && i < e->fwd.n * e->fwd.in; i++) e->x[i] = ref_gelu(e->pre[i]);
    ref_linear_fwd(&e->fwd);
    return test_dot(e->y, e->dy, e->fwd.n * e->fwd.out);
}

static void check_reference_gradient(bool transposed, bool activated)
{
    enum { N = 3, IN = 5, OUT = 4 };
    double pre[N * IN], x[N * IN], w[IN * OUT], b[OUT], y[N * OUT], dy[N * OUT];
    test_normal(pre, N * IN, 1.5, 1);
    test_normal(x, N * IN, 1, 2);
    test_normal(w, IN * OUT, 1, 3);
    test_normal(b, OUT, 1, 4);
    test_normal(dy, N * OUT, 1, 5);
    struct env e = {.fwd = {.n = N,
                            .in = IN,
                            .out = OUT,
                            .x = x,
                            .w = w,
                            .b = b,
                            .y = y,
                            .w_transposed = transposed},
                    .pre = activated ? pre : NULL,
                    .dy = dy,
                    .x = x,
                    .y = y};
    loss(&e);
    double dx[N * IN], dw[IN * OUT] = {0}, db[OUT] = {0};
    ref_linear_bwd(
        &(struct srf_linear_bwd_args){.n = N,
                                      .in = IN,
                                      .out = OUT,
                                      .x = x,
                                      .w = w,
                                      .dy = dy,
                                      .w_transposed = transposed,
                                      .x_pre = e.pre,
                                      .x_act = activated ? SRF_ACT_GELU_TANH : SRF_ACT_NONE,
                                      .dx = dx,
                                      .dw = dw,
                                      .db = db});
    test_gradient("ref dx", loss, &e, activated ? pre : x, dx, N * IN, 1e-8);
    test_gradient("ref dw", loss, &e, w, dw, IN * OUT, 1e-8);
    test_gradient("ref db", loss, &e, b, db, OUT, 1e-8);
}

static void test_reference_gradient(void **state)
{
    (void)state;
    for (int k = 0; k < 4; k++) check_reference_gradient(k & 1, k & 2);
}

/* --- forward ---------------------------------------------------------------------------------- */

static void check_fwd(struct twins *s, const int64_t *shape, bool transposed, bool bias,
                      int residual, enum srf_act act, bool keep_pre)
{
    int64_t n = shape[0], in = shape[1], out = shape[2];
    struct twin x = twin_normal(s, n * in, 1), w = twin_normal(s, in * out, 1);
    struct twin b = twin_normal(s, out, 1), pre = twin_fill(s, n * out, NAN);
    struct twin slope = twin_fill(s, n * out, NAN);
    bool keep_slope = act != SRF_ACT_NONE && in % 2;
    /* residual: 0 = none, 1 = another tensor, 2 = y itself */
    struct twin y = residual == 2 ? twin_normal(s, n * out, 1) : twin_fill(s, n * out, NAN);
    struct twin r = residual == 2 ? y : twin_normal(s, n * out, 1);
    twin_run(s, linear_fwd, .n = n, .in = in, .out = out, .x = x.dev, .w = w.dev,
             .w_transposed = transposed, .b = bias ? b.dev : NULL,
             .residual = residual ? r.dev : NULL, .act = act, .pre = keep_pre ? pre.dev : NULL,
             .slope = keep_slope ? slope.dev : NULL, .y = y.dev);
    ref_linear_fwd(&(struct srf_linear_fwd_args){.n = n,
                                                 .in = in,
                                                 .out = out,
                                                 .x = x.ref,
                                                 .w = w.ref,
                                                 .w_transposed = transposed,
                                                 .b = bias ? b.ref : NULL,
                                                 .residual = residual ? r.ref : NULL,
                                                 .act = act,
                                                 .pre = keep_pre ? pre.ref : NULL,
                                                 .slope = keep_slope ? slope.ref : NULL,
                                                 .y = y.ref});
    twin_close(s, "y", y, twin_tol(s, in), sqrt((double)in));
    twin_close(s, "pre", pre, twin_tol(s, in), sqrt((double)in));
    twin_close(s, "slope", slope, twin_tol(s, in), sqrt((double)in));
}

static void fwd(enum srf_dtype dtype, int threads)
{
    for (int k = 0; k < N_SHAPES; k++)
        for (int bits = 0; bits < 16; bits++) {
            bool act = bits & 8;
            struct twins s = twins_new(dtype, threads);
            check_fwd(&s, shapes[k], bits & 1, bits & 2, !act && (bits & 4) ? 1 + k % 2 : 0,
                      act ? SRF_ACT_GELU_TANH : SRF_ACT_NONE, act && (bits & 4));
            twins_free(&s);
        }
}

static void test_fwd(void **state)
{
    (void)state;
    twin_each(fwd);
}

/* Behind a norm: more rows than the backends take at once. */
static void norm(enum srf_dtype dtype, int threads)
{
    const int64_t sizes[][3] = {{0, 3, 2}, {1, 7, 5}, {33, 40, 24}, {4100, 16, 8}};
    for (int k = 0; k < 8; k++) {
        const int64_t n = sizes[k / 2][0], in = sizes[k / 2][1], out = sizes[k / 2][2];
        struct twins s = twins_new(dtype, threads);
        struct twin x = twin_normal(&s, n * in, 1), w = twin_normal(&s, in * out, 1);
        struct twin gamma = twin_normal(&s, in, 1), beta = twin_normal(&s, in, 1);
        struct twin b = twin_normal(&s, out, 1), y = twin_fill(&s, n * out, NAN);
#define ARGS(side)                                                                                 \
    .n = n, .in = in, .out = out, .eps = 1e-5, .x = x.side, .gamma = gamma.side,                   \
    .beta = beta.side, .w = w.side, .b = k & 1 ? b.side : NULL,                                    \
    .act = k & 1 ? SRF_ACT_NONE : SRF_ACT_GELU_TANH, .y = y.side
        twin_run(&s, norm_linear_fwd, ARGS(dev));
        ref_norm_linear_fwd(&(struct srf_norm_linear_fwd_args){ARGS(ref)});
#undef ARGS
        twin_close(&s, "y", y, twin_tol(&s, in), sqrt((double)in));
        twins_free(&s);
    }
}

static void test_norm(void **state)
{
    (void)state;
    twin_each(norm);
}

/* The activation alone. */
static void act(enum srf_dtype dtype, int threads)
{
    const int64_t lengths[] = {0, 1, 7, 64, 1000, 40003};
    for (size_t k = 0; k < sizeof lengths / sizeof *lengths; k++) {
        int64_t n = lengths[k];
        struct twins s = twins_new(dtype, threads);
        struct twin x = twin_normal(&s, n, 3), y = twin_fill(&s, n, NAN), z = twin_fill(&s, n, NAN);
        twin_run(&s, act_fwd, .n = n, .act = SRF_ACT_GELU_TANH, .x = x.dev, .y = y.dev);
        twin_run(&s, act_fwd, .n = n, .act = SRF_ACT_NONE, .x = x.dev, .y = z.dev);
        for (int64_t i = 0; i < n; i++) y.ref[i] = ref_gelu(x.ref[i]), z.ref[i] = x.ref[i];
        twin_close(&s, "gelu", y, twin_tol(&s, 1), 0);
        twin_close(&s, "no activation", z, 0, 0);
        twins_free(&s);
    }
}

static void test_act(void **state)
{
    (void)state;
    twin_each(act);
}

/* --- backward --------------------------------------------------------------------------------- */

static void check_bwd(struct twins *s, const int64_t *shape, bool transposed, bool activated,
                      bool accumulate, int wanted)
{
    int64_t n = shape[0], in = shape[1], out = shape[2];
    struct twin x = twin_normal(s, n * in, 1), w = twin_normal(s, in * out, 1);
    struct twin dy = twin_normal(s, n * out, 1), pre = twin_normal(s, n * in, 2);
    struct twin dx = accumulate ? twin_normal(s, n * in, 1) : twin_fill(s, n * in, NAN);
    struct twin dw = twin_normal(s, in * out, 1), db = twin_normal(s, out, 1);
    struct twin dx_sum = twin_normal(s, in, 1);
    bool sloped = activated && in % 2;
    if (n == 0) ref_linear_bwd(&(struct srf_linear_bwd_args){0});
#define ARGS(side)                                                                                 \
    .n = n, .in = in, .out = out, .x = x.side, .w = w.side, .dy = dy.side,                         \
    .w_transposed = transposed, .x_pre = activated && !sloped ? pre.side : NULL,                   \
    .x_act = activated && !sloped ? SRF_ACT_GELU_TANH : SRF_ACT_NONE,                              \
    .x_slope = sloped ? pre.side : NULL, .dx_accumulate = accumulate,                              \
    .dx_sum = wanted & 4 ? dx_sum.side : NULL, .dx = wanted & 1 ? dx.side : NULL,                  \
    .dw = wanted & 2 ? dw.side : NULL, .db = wanted & 4 ? db.side : NULL
    twin_run(s, linear_bwd, ARGS(dev));
    ref_linear_bwd(&(struct srf_linear_bwd_args){ARGS(ref)});
#undef ARGS
    twin_close(s, "dx", dx, twin_tol(s, out), sqrt((double)out));
    twin_close(s, "dw", dw, twin_tol(s, n), sqrt((double)n));
    twin_close(s, "db", db, twin_tol(s, n), sqrt((double)n));
    twin_close(s, "dx_sum", dx_sum, twin_tol(s, n * out), sqrt((double)n * (double)out));
}

static void bwd(enum srf_dtype dtype, int threads)
{
    for (int k = 0; k < N_SHAPES; k++)
        for (int bits = 0; bits < 16; bits++) {
            struct twins s = twins_new(dtype, threads);
            check_bwd(&s, shapes[k], bits & 1, bits & 2, bits & 4, bits & 8 ? 7 : bits & 7);
            twins_free(&s);
        }
}

static void test_bwd(void **state)
{
    (void)state;
    twin_each(bwd);
}

/* --- GELU by itself: an identity layer -------------------------------------------------------- */

/* gelu and gelu' at u, elementwise: through a 1 x 1 layer with W = 1. */
static void gelu_at(struct twins *s, const double *u, int64_t n, double **y, double **slope)
{
    struct twin x = twin_of(s, u, n), one = twin_fill(s, 1, 1), out = twin_fill(s, n, NAN);
    struct twin dy = twin_fill(s, n, 1), dx = twin_fill(s, n, NAN);
    twin_run(s, linear_fwd, .n = n, .in = 1, .out = 1, .x = x.dev, .w = one.dev,
             .act = SRF_ACT_GELU_TANH, .y = out.dev);
    twin_run(s, linear_bwd, .n = n, .in = 1, .out = 1, .x = out.dev, .w = one.dev, .dy = dy.dev,
             .x_pre = x.dev, .x_act = SRF_ACT_GELU_TANH, .dx = dx.dev);
    *y = twin_values(s, out);
    *slope = twin_values(s, dx);
}

/* Elementwise over [-12, 12]; relative to the exact value, small tails included. */
static void gelu_grid(enum srf_dtype dtype, int threads)
{
    enum { N = 4801 };
    struct twins s = twins_new(dtype, threads);
    double *u = srf__alloc(N, sizeof *u), *y, *slope;
    assert_non_null(u);
    for (int i = 0; i < N; i++) u[i] = (i - N / 2) * 0.005;
    struct twin x = twin_of(&s, u, N);
    gelu_at(&s, u, N, &y, &slope);
    double eps = dtype == SRF_F64 ? 0x1p-52 : 0x1p-23;
    for (int i = 0; i < N; i++) {
        double v = x.ref[i], r = 2 * sqrt(2 / M_PI) * (v + 0.044715 * v * v * v);
        double sig = 1 / (1 + exp(-r)), want = v * sig;
        double want_slope =
            sig + want / (1 + exp(r)) * 2 * sqrt(2 / M_PI) * (1 + 3 * 0.044715 * v * v);
        /* the rounding of r moves e^-r by |r| eps */
        double tol = 4 * eps * (2 + fabs(r)), tiny = dtype == SRF_F64 ? 1e-250 : 1e-35;
        if (!(fabs(y[i] - want) <= tol * fabs(want) + tiny))
            fail_msg("gelu(%g) = %.9g, want %.9g", v, y[i], want);
        if (!(fabs(slope[i] - want_slope) <= 2 * tol * (fabs(want_slope) + sig) + tiny))
            fail_msg("gelu'(%g) = %.9g, want %.9g", v, slope[i], want_slope);
    }
    srf__free(u), srf__free(y), srf__free(slope);
    twins_free(&s);
}

static void test_gelu_grid(void **state)
{
    (void)state;
    twin_each(gelu_grid);
}

static void gelu_extremes(enum srf_dtype dtype, int threads)
{
    const double u[] = {1e4, -1e4, 100, -100, 40, -40, 1e30, -1e30, NAN, 0};
    enum { N = sizeof u / sizeof *u };
    struct twins s = twins_new(dtype, threads);
    double *y, *slope;
    gelu_at(&s, u, N, &y, &slope);
    for (int i = 0; i < N - 2; i++) {
        double want = u[i] > 0 ? u[i] : 0, err = fabs(y[i] - want);
        if (!(err <= 1e-6 * fabs(want) + 1e-6) || !(fabs(slope[i] - (u[i] > 0)) <= 1e-6))
            fail_msg("u = %g: gelu %g, slope %g", u[i], y[i], slope[i]);
    }
    assert_true(isnan(y[N - 2]) && isnan(slope[N - 2]));
    assert_true(y[N - 1] == 0 && slope[N - 1] == 0.5);
    srf__free(y), srf__free(slope);
    twins_free(&s);
}

static void test_gelu_extremes(void **state)
{
    (void)state;
    twin_each(gelu_extremes);
}

static void test_refusals(void **state)
{
    (void)state;
    struct twins s = twins_new(SRF_F32, 1);
    struct twin x = twin_fill(&s, 4, 1);
    srf_status st = SRF_RUN(s.ctx, linear_fwd, .n = 1, .in = 1, .out = 1, .x = x.dev, .w = x.dev,
                            .residual = x.dev, .act = SRF_ACT_GELU_TANH, .y = x.dev);
    assert_int_equal(st, SRF_INVALID);
    st = SRF_RUN(s.ctx, linear_fwd, .n = (int64_t)1 << 40, .in = 1, .out = 1, .x = x.dev,
                 .w = x.dev, .y = x.dev);
    assert_int_equal(st, SRF_INVALID);
    st = SRF_RUN(s.ctx, linear_bwd, .n = 1, .in = 1, .out = 1, .x = x.dev, .w = x.dev, .dy = x.dev,
                 .x_act = SRF_ACT_GELU_TANH, .dx = x.dev);
    assert_int_equal(st, SRF_INVALID);
    twins_free(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference_gradient),
        cmocka_unit_test(test_fwd),
        cmocka_unit_test(test_norm),
        cmocka_unit_test(test_act),
        cmocka_unit_test(test_bwd),
        cmocka_unit_test(test_gelu_grid),
        cmocka_unit_test(test_gelu_extremes),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
