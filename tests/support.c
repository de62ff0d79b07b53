#include "tests/support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

uint64_t test_seed(void)
{
    const char *text = getenv("SRF_TEST_SEED");
    return text ? strtoull(text, NULL, 0) : 20240229;
}

void test_normal(double *x, int64_t n, double scale, uint32_t stream)
{
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 0, stream, 0);
    for (int64_t i = 0; i < n; i++) x[i] = scale * srf_rng_normal(&r);
}

void *test_real(const struct srf_ctx *ctx, const double *x, int64_t n)
{
    void *p = srf__alloc((size_t)n, srf_dtype_bytes(ctx->dtype));
    assert_non_null(p);
    for (int64_t i = 0; i < n; i++)
        if (ctx->dtype == SRF_F64)
            ((double *)p)[i] = x[i];
        else
            ((float *)p)[i] = (float)x[i];
    return p;
}

void test_to_double(const struct srf_ctx *ctx, const void *real, double *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = ctx->dtype == SRF_F64 ? ((const double *)real)[i] : (double)((const float *)real)[i];
}

static int64_t worst_index(const double *got, const double *want, int64_t n)
{
    int64_t worst = 0;
    double worst_err = -1;
    for (int64_t i = 0; i < n; i++) {
        double e = fabs(got[i] - want[i]);
        if (isnan(e)) return i;
        if (e > worst_err) worst_err = e, worst = i;
    }
    return worst;
}

double test_error(const double *got, const double *want, int64_t n)
{
    double diff = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(got[i]) || !isfinite(want[i])) {
            bool same = (isnan(got[i]) && isnan(want[i])) || got[i] == want[i];
            if (!same) return INFINITY;
            continue;
        }
        diff += (got[i] - want[i]) * (got[i] - want[i]);
        norm += want[i] * want[i];
    }
    return norm > 0 ? sqrt(diff / norm) : sqrt(diff);
}

bool test_is_close(const char *name, const double *got, const double *want, int64_t n, double tol)
{
    double err = test_error(got, want, n);
    if (err <= tol) return true;
    int64_t i = n ? worst_index(got, want, n) : 0;
    print_error("%s: relative error %.3g > %.3g; worst at %lld of %lld: got %.9g, want %.9g "
                "(SRF_TEST_SEED=%llu)\n",
                name, err, tol, (long long)i, (long long)n, n ? got[i] : 0.0, n ? want[i] : 0.0,
                (unsigned long long)test_seed());
    return false;
}

void test_close(const char *name, const double *got, const double *want, int64_t n, double tol)
{
    if (!test_is_close(name, got, want, n, tol)) fail();
}
