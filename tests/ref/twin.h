/* Tensors held twice, for tests of an op against its reference: as doubles, and in the context's T
 * on the device (inputs are rounded to T first, so both sides see the same numbers). */
#pragma once
#include "tests/support.h"

#include <math.h>

struct twin {
    double *ref; /* (n) */
    void *dev;   /* T (n), then a guard band */
    int64_t n;
};

/* What one test owns. */
struct twins {
    struct srf_ctx *ctx;
    struct twin all[24];
    int n_all;
    uint32_t stream; /* of the next random tensor */
};

/* A CPU context of a dtype and number of threads; fails the test if it cannot be had. */
struct twins twins_new(enum srf_dtype dtype, int threads);
/* Check every guard band, free everything. */
void twins_free(struct twins *s);

struct twin twin_normal(struct twins *s, int64_t n, double scale);
struct twin twin_fill(struct twins *s, int64_t n, double value);
/* Copies of doubles. */
struct twin twin_of(struct twins *s, const double *x, int64_t n);
/* Refill both sides. */
void twin_set(struct twins *s, struct twin *t, const double *x);
/* Device values as doubles; caller srf__free()s. */
double *twin_values(const struct twins *s, struct twin t);
/* The device must agree with the reference: |got - want| <= tol max(|want|, sqrt(n) natural), in
 * norm. natural: the size of the terms an element is made of, where they may cancel; 0 if not. */
void twin_close(const struct twins *s, const char *name, struct twin t, double tol, double natural);

/* Rounding error allowed where `length` terms are summed: c eps(T) sqrt(length). */
double twin_tol(const struct twins *s, int64_t length);

/* Plan the op, give it a workspace of exactly what it asked for, filled with NaN, and run it. */
#define twin_run(s, op, ...)                                                                       \
    do {                                                                                           \
        const struct srf_##op##_args run_args_ = {__VA_ARGS__};                                    \
        (s)->ctx->plan = true;                                                                     \
        (s)->ctx->plan_workspace = 0;                                                              \
        test_ok(srf_run_##op((s)->ctx, &run_args_));                                               \
        (s)->ctx->plan = false;                                                                    \
        twins_workspace(s);                                                                        \
        test_ok(srf_run_##op((s)->ctx, &run_args_));                                               \
    } while (0)
void twins_workspace(struct twins *s);

/* Central differences: grad[i] must be d loss / d x[i] for every i, to `tol` in norm. */
void test_gradient(const char *name, double (*loss)(void *env), void *env, double *x,
                   const double *grad, int64_t n, double tol);
/* sum_i a_i b_i */
double test_dot(const double *a, const double *b, int64_t n);

/* Run a test body for both dtypes and 1, 2 and 3 threads. */
void twin_each(void (*body)(enum srf_dtype dtype, int threads));
