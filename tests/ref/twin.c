#include "tests/ref/twin.h"

#include "kernels/numeric.h"

#include <stdlib.h>
#include <string.h>

enum {
    GUARD = 64,
    GUARD_BYTE = 0xa5,
    NAN_BYTES = 128 << 10, /* at once: memory that the sanitizers' allocator does not map anew */
};

static struct twins new_on(const char *device, enum srf_dtype dtype, int threads)
{
    struct twins s = {.stream = 1000};
    test_ok(srf_ctx_create(device, dtype, threads, &s.ctx));
    return s;
}

struct twins twins_new(enum srf_dtype dtype, int threads)
{
    return new_on("cpu", dtype, threads);
}

struct twins twins_new_on(const char *device, enum srf_dtype dtype)
{
    struct twins s = new_on(device, dtype, 0);
    s.report = true;
    s.twice = !getenv("SRF_GPU_SMALL");
    return s;
}

static void *bytes_alloc(size_t bytes)
{
    void *p = srf__alloc(bytes, 1);
    assert_non_null(p);
    return p;
}

/* n doubles to a type and back, on the host. */
static void from_double(void *dst, enum srf_dtype type, const double *x, int64_t n)
{
    if (type == SRF_F64) {
        if (n) memcpy(dst, x, (size_t)n * sizeof *x);
        return;
    }
    float *f = bytes_alloc((size_t)n * sizeof *f);
    for (int64_t i = 0; i < n; i++) f[i] = (float)x[i];
    srf_convert_from_f32(dst, type, f, n);
    srf__free(f);
}

static void to_double(double *x, const void *src, enum srf_dtype type, int64_t n)
{
    if (type == SRF_F64) {
        if (n) memcpy(x, src, (size_t)n * sizeof *x);
        return;
    }
    float *f = bytes_alloc((size_t)n * sizeof *f);
    srf_convert_to_f32(f, src, type, n);
    for (int64_t i = 0; i < n; i++) x[i] = (double)f[i];
    srf__free(f);
}

/* Device memory of `bytes`, whose contents are `host`'s, with its guard band; ref is kept. */
static void *own(struct twins *s, void *ref, const void *host, size_t bytes)
{
    assert_true((size_t)s->n_all < sizeof s->all / sizeof *s->all);
    char *guarded = bytes_alloc(bytes + GUARD);
    if (bytes) memcpy(guarded, host, bytes);
    memset(guarded + bytes, GUARD_BYTE, GUARD);
    void *dev;
    test_ok(s->ctx->be->alloc(s->ctx, bytes + GUARD, &dev));
    test_ok(s->ctx->be->upload(s->ctx, dev, guarded, bytes + GUARD));
    srf__free(guarded);
    s->all[s->n_all].ref = ref;
    s->all[s->n_all].dev = dev;
    s->all[s->n_all++].bytes = bytes;
    return dev;
}

void twins_free(struct twins *s)
{
    for (int k = 0; k < s->n_all; k++) {
        unsigned char guard[GUARD];
        size_t bytes = s->all[k].bytes;
        test_ok(s->ctx->be->download(s->ctx, guard, (char *)s->all[k].dev + bytes, GUARD));
        for (int i = 0; i < GUARD; i++)
            if (guard[i] != GUARD_BYTE)
                fail_msg("tensor %d of %zu bytes: written past its end", k, bytes);
        srf__free(s->all[k].ref);
        s->ctx->be->free(s->ctx, s->all[k].dev);
    }
    srf_ctx_free(s->ctx);
    int failures = s->failures;
    *s = (struct twins){0};
    if (failures) fail_msg("%d comparisons failed", failures);
}

static struct twin new_twin(struct twins *s, enum srf_dtype type, const double *x, int64_t n)
{
    size_t bytes = (size_t)n * srf_dtype_bytes(type);
    struct twin t = {.ref = bytes_alloc((size_t)n * sizeof *t.ref), .n = n, .type = type};
    void *host = bytes_alloc(bytes);
    from_double(host, type, x, n);
    to_double(t.ref, host, type, n);
    t.dev = own(s, t.ref, host, bytes);
    srf__free(host);
    return t;
}

static struct twin new_normal(struct twins *s, enum srf_dtype type, int64_t n, double scale)
{
    double *x = bytes_alloc((size_t)n * sizeof *x);
    test_normal(x, n, scale, s->stream++);
    struct twin t = new_twin(s, type, x, n);
    srf__free(x);
    return t;
}

static struct twin new_fill(struct twins *s, enum srf_dtype type, int64_t n, double value)
{
    double *x = bytes_alloc((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = value;
    struct twin t = new_twin(s, type, x, n);
    srf__free(x);
    return t;
}

struct twin twin_of(struct twins *s, const double *x, int64_t n)
{
    return new_twin(s, s->ctx->dtype, x, n);
}

struct twin twin_normal(struct twins *s, int64_t n, double scale)
{
    return new_normal(s, s->ctx->dtype, n, scale);
}

struct twin twin_fill(struct twins *s, int64_t n, double value)
{
    return new_fill(s, s->ctx->dtype, n, value);
}

struct twin twin_acc_of(struct twins *s, const double *x, int64_t n)
{
    return new_twin(s, srf_ctx_acc(s->ctx), x, n);
}

struct twin twin_acc_normal(struct twins *s, int64_t n, double scale)
{
    return new_normal(s, srf_ctx_acc(s->ctx), n, scale);
}

struct twin twin_acc_fill(struct twins *s, int64_t n, double value)
{
    return new_fill(s, srf_ctx_acc(s->ctx), n, value);
}

struct twin_raw twin_raw_of(struct twins *s, const void *x, size_t bytes)
{
    struct twin_raw t = {.ref = bytes_alloc(bytes), .bytes = bytes};
    if (bytes) memcpy(t.ref, x, bytes);
    t.dev = own(s, t.ref, x, bytes);
    return t;
}

void twin_send(struct twins *s, struct twin t)
{
    size_t bytes = (size_t)t.n * srf_dtype_bytes(t.type);
    void *host = bytes_alloc(bytes);
    from_double(host, t.type, t.ref, t.n);
    to_double(t.ref, host, t.type, t.n);
    test_ok(s->ctx->be->upload(s->ctx, t.dev, host, bytes));
    srf__free(host);
}

void twin_set(struct twins *s, struct twin *t, const double *x)
{
    if (t->n) memmove(t->ref, x, (size_t)t->n * sizeof *x);
    twin_send(s, *t);
}

double *twin_values(const struct twins *s, struct twin t)
{
    size_t bytes = (size_t)t.n * srf_dtype_bytes(t.type);
    double *x = bytes_alloc((size_t)t.n * sizeof *x);
    void *host = bytes_alloc(bytes);
    test_ok(s->ctx->be->download(s->ctx, host, t.dev, bytes));
    to_double(x, host, t.type, t.n);
    srf__free(host);
    return x;
}

void twin_raw_values(const struct twins *s, struct twin_raw t, void *x)
{
    test_ok(s->ctx->be->download(s->ctx, x, t.dev, t.bytes));
}

void twin_check(struct twins *s, const char *name, const double *got, const double *want, int64_t n,
                double tol)
{
    if (!s->report) {
        test_close(name, got, want, n, tol);
        return;
    }
    print_message("    %-24s error %.2e of %.2e\n", name, test_error(got, want, n), tol);
    s->failures += !test_is_close(name, got, want, n, tol);
}

void twin_close(struct twins *s, const char *name, struct twin t, double tol, double natural)
{
    double *x = twin_values(s, t), norm = 0, terms = natural * sqrt((double)t.n);
    for (int64_t i = 0; i < t.n; i++)
        if (isfinite(t.ref[i])) norm = hypot(norm, t.ref[i]);
    /* test_error is absolute where the reference is 0 */
    if (norm == 0 && terms > 0) norm = 1;
    if (terms > norm) tol *= terms / norm;
    twin_check(s, name, x, t.ref, t.n, tol);
    srf__free(x);
}

double twin_acc_tol(const struct twins *s, int64_t length)
{
    double eps = s->ctx->dtype == SRF_F64 ? 0x1p-53 : 0x1p-24;
    return 8 * eps * sqrt((double)(length > 1 ? length : 1));
}

/* Rounding to bf16 is off by 2^-9 at most; twice that leaves room for one more rounding on the
 * way. */
double twin_tol(const struct twins *s, int64_t length)
{
    return twin_acc_tol(s, length) + (s->ctx->dtype == SRF_BF16 ? 0x1p-8 : 0);
}

void twins_workspace(struct twins *s)
{
    size_t bytes = s->ctx->plan_workspace, most = bytes < NAN_BYTES ? bytes : NAN_BYTES;
    if (s->ctx->workspace_bytes != bytes) {
        if (s->ctx->workspace) s->ctx->be->free(s->ctx, s->ctx->workspace);
        s->ctx->workspace = NULL;
        s->ctx->workspace_bytes = 0;
        test_ok(srf_ctx_reserve_workspace(s->ctx, bytes));
    }
    if (bytes == 0) return;
    char *nan = bytes_alloc(most), *workspace = s->ctx->workspace;
    memset(nan, 0xff, most); /* NaN in every float type */
    for (size_t at = 0; at < bytes; at += most)
        test_ok(
            s->ctx->be->upload(s->ctx, workspace + at, nan, bytes - at < most ? bytes - at : most));
    srf__free(nan);
}

void *twins_save(const struct twins *s)
{
    size_t bytes = 0;
    for (int k = 0; k < s->n_all; k++) bytes += s->all[k].bytes;
    char *saved = bytes_alloc(bytes), *p = saved;
    for (int k = 0; k < s->n_all; p += s->all[k++].bytes)
        test_ok(s->ctx->be->download(s->ctx, p, s->all[k].dev, s->all[k].bytes));
    return saved;
}

void twins_restore(struct twins *s, void *saved)
{
    const char *p = saved;
    for (int k = 0; k < s->n_all; p += s->all[k++].bytes)
        test_ok(s->ctx->be->upload(s->ctx, s->all[k].dev, p, s->all[k].bytes));
    srf__free(saved);
}

void twins_same(struct twins *s, const char *op, void *saved)
{
    const char *first = saved;
    char *again = twins_save(s), *p = again;
    for (int k = 0; k < s->n_all; first += s->all[k].bytes, p += s->all[k++].bytes) {
        size_t i = 0, n = s->all[k].bytes;
        while (i < n && first[i] == p[i]) i++;
        if (i == n) continue;
        print_error("%s: run twice, other bits from byte %zu of %zu of tensor %d on "
                    "(SRF_TEST_SEED=%llu)\n",
                    op, i, n, k, (unsigned long long)test_seed());
        s->failures++;
    }
    srf__free(again);
    srf__free(saved);
}

void test_gradient(const char *name, double (*loss)(void *env), void *env, double *x,
                   const double *grad, int64_t n, double tol)
{
    double *numeric = bytes_alloc((size_t)n * sizeof *numeric);
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
