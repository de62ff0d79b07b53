/* What the tests share: seeded random data and a comparator that fails closed. */
#pragma once
#include "kernels/features.h"

/* clang-format off: cmocka needs these before itself */
#include <stdarg.h>
#include <setjmp.h>
#include <cmocka.h>
/* clang-format on */

/* Seed of this run: SRF_TEST_SEED from the environment, else a fixed one. Printed by every failing
 * comparison. */
uint64_t test_seed(void);
/* n numbers from N(0, scale^2); `stream` tells calls apart. */
void test_normal(double *x, int64_t n, double scale, uint32_t stream);
/* n elements of the context's T (f32 or f64) on the CPU, allocated; from doubles / back to doubles.
 * srf__free. */
void *test_real(const struct srf_ctx *ctx, const double *x, int64_t n);
void test_to_double(const struct srf_ctx *ctx, const void *real, double *x, int64_t n);

/* Norm-wise relative error |got - want| / |want| (absolute if want is 0) must be <= tol; positions
 * of non-finite values must agree. Prints name, error, the worst index with both values, the seed.
 * Fails the test otherwise; test_is_close only says so. */
bool test_is_close(const char *name, const double *got, const double *want, int64_t n, double tol);
void test_close(const char *name, const double *got, const double *want, int64_t n, double tol);
/* The error itself; infinity where non-finite positions differ. */
double test_error(const double *got, const double *want, int64_t n);
/* The call must succeed, else the test fails with the library's message. */
#define test_ok(call)                                                                              \
    do {                                                                                           \
        srf_status st_ = (call);                                                                   \
        if (st_ != SRF_OK) {                                                                       \
            print_error("%s: %s (%s)\n", #call, srf_error_message(), srf_error_trace());           \
            fail();                                                                                \
        }                                                                                          \
    } while (0)
