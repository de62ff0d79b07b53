#include "tests/ref/twin.h"

#include <string.h>

enum { GUARD = 16 };
static const double GUARD_VALUE = -12345;

struct twins twins_new(enum srf_dtype dtype, int threads)
{
    struct twins s = {.stream = 1000};
    test_ok(srf_ctx_create("cpu", dtype, threads, &s.ctx));
    return s;
}

static double get(const struct twins *s, const void *p, int64_t i)
{
    return s->ctx->dtype == SRF_F64 ? ((const double *)p)[i] : (double)((const float *)p)[i];
}

void twins_free(struct twins *s)
{
    for (int k = 0; k < s->n_all; k++) {
        struct twin t = s->all[k];
        for (int64_t i = t.n; i < t.n + GUARD; i++)
            if (get(s, t.dev, i) != GUARD_VALUE)
                fail_msg("tensor %d of %lld elements: written past its end", k, (long long)t.n);
        srf__free(t.ref);
        srf__free(t.dev);
    }
    srf_ctx_free(s->ctx);
    *s = (struct twins){0};
}

void twin_set(struct twins *s, struct twin *t, const double *x)
{
    bool f64 = s->ctx->dtype == SRF_F64;
    for (int64_t i = 0; i < t->n; i++) {
        if (f64)
            ((double *)t->dev)[i] = x[i];
        else
            ((float *)t->dev)[i] = (float)x[i];
        t->ref[i] = get(s, t->dev, i);
    }
}

struct twin twin_of(struct twins *s, const double *x, int64_t n)
{
    assert_true((size_t)s->n_all < sizeof s->all / sizeof *s->all);
    double *padded = srf__alloc((size_t)(n + GUARD), sizeof *padded);
    assert_non_null(padded);
    if (n) memcpy(padded, x, (size_t)n * sizeof *x);
    for (int64_t i = n; i < n + GUARD; i++) padded[i] = GUARD_VALUE;
    struct twin t = {.ref = padded, .dev = test_real(s->ctx, padded, n + GUARD), .n = n};
    for (int64_t i = 0; i < n; i++) t.ref[i] = get(s, t.dev, i);
    s->all[s->n_all++] = t;
    return t;
}

struct twin twin_normal(struct twins *s, int64_t n, double scale)
{
    double *x = srf__alloc((size_t)n, sizeof *x);
    assert_non_null(x);
    test_normal(x, n, scale, s->stream++);
    struct twin t = twin_of(s, x, n);
    srf__free(x);
    return t;
}

struct twin twin_fill(struct twins *s, int64_t n, double value)
{
    double *x = srf__alloc((size_t)n, sizeof *x);
    assert_non_null(x);
    for (int64_t i = 0; i < n; i++) x[i] = value;
    struct twin t = twin_of(s, x, n);
    srf__free(x);
    return t;
}

double *twin_values(const struct twins *s, struct twin t)
{
    double *x = srf__alloc((size_t)t.n, sizeof *x);
    assert_non_null(x);
    test_to_double(s->ctx, t.dev, x, t.n);
    return x;
}

void twin_close(const struct twins *s, const char *name, struct twin t, double tol, double natural)
{
    double *x = twin_values(s, t), norm = 0, terms = natural * sqrt((double)t.n);
    for (int64_t i = 0; i < t.n; i++)
        if (isfinite(t.ref[i])) norm = hypot(norm, t.ref[i]);
    /* test_error is absolute where the reference is 0 */
    if (norm == 0 && terms > 0) norm = 1;
    test_close(name, x, t.ref, t.n, terms > norm ? tol * (terms / norm) : tol);
    srf__free(x);
}

double twin_tol(const struct twins *s, int64_t length)
{
    double eps = s->ctx->dtype == SRF_F64 ? 0x1p-53 : 0x1p-24;
    return 8 * eps * sqrt((double)(length > 1 ? length : 1));
}

void twins_workspace(struct twins *s)
{
    if (s->ctx->workspace) s->ctx->be->free(s->ctx, s->ctx->workspace);
    s->ctx->workspace = NULL;
    s->ctx->workspace_bytes = 0;
    test_ok(srf_ctx_reserve_workspace(s->ctx, s->ctx->plan_workspace));
    if (s->ctx->workspace) memset(s->ctx->workspace, 0xff, s->ctx->workspace_bytes); /* NaN */
}

void test_gradient(const char *name, double (*loss)(void *env), void *env, double *x,
                   const double *grad, int64_t n, double tol)
{
    double *numeric = srf__alloc((size_t)n, sizeof *numeric);
    assert_non_null(numeric);
    for (int64_t i = 0; i < n; i++) {
        double at = x[i], h = 1e-5 * fmax(1, fabs(at));
        x[i] = at + h;
        double up = loss(env);
        x[i] = at - h;
        double down = loss(env);
        x[i] = at;
        numeric[i] = (up - down) / (2 * h);
    }
    test_close(name, grad, numeric, n, tol);
    srf__free(numeric);
}

double test_dot(const double *a, const double *b, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

void twin_each(void (*body)(enum srf_dtype dtype, int threads))
{
    for (int threads = 1; threads <= 3; threads++) {
        body(SRF_F32, threads);
        body(SRF_F64, threads);
    }
}
