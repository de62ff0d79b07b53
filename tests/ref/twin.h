/* Tensors held twice, for tests of an op against its reference: on the host as doubles, and on the
 * device in the element type the op wants (values are rounded to it first, so both sides see the
 * same numbers). Every device tensor is followed by a guard band. */
#pragma once
#include "tests/support.h"

#include <math.h>

struct twin {
    double *ref; /* (n) */
    void *dev;   /* type (n) */
    int64_t n;
    enum srf_dtype type;
};

/* Integers, which need no rounding: i32 indices, u8 flags. */
struct twin_raw {
    void *ref, *dev;
    size_t bytes;
};

/* What one test owns. */
struct twins {
    struct srf_ctx *ctx;
    struct {
        void *ref, *dev;
        size_t bytes; /* of dev, without the guard band */
    } all[40];
    int n_all;
    uint32_t stream; /* of the next random tensor */
    bool twice;      /* every run is made twice and must leave the same bits */
    bool report;     /* comparisons print their errors, and a test goes on after one that failed, */
    int failures;    /* to fail when it frees its twins */
};

/* A CPU context of a dtype and number of threads; fails the test if it cannot be had. */
struct twins twins_new(enum srf_dtype dtype, int threads);
/* A context of any device, which reports; runs are made twice but under SRF_GPU_SMALL. */
struct twins twins_new_on(const char *device, enum srf_dtype dtype);
/* Check every guard band, free everything. */
void twins_free(struct twins *s);

/* Tensors of type T. */
struct twin twin_normal(struct twins *s, int64_t n, double scale);
struct twin twin_fill(struct twins *s, int64_t n, double value);
struct twin twin_of(struct twins *s, const double *x, int64_t n); /* copies of doubles */
/* Tensors of type A: gradients of parameters, biases of features, moments, sums. */
struct twin twin_acc_normal(struct twins *s, int64_t n, double scale);
struct twin twin_acc_fill(struct twins *s, int64_t n, double value);
struct twin twin_acc_of(struct twins *s, const double *x, int64_t n);
/* Copies of integers. */
struct twin_raw twin_raw_of(struct twins *s, const void *x, size_t bytes);

/* Refill both sides. */
void twin_set(struct twins *s, struct twin *t, const double *x);
/* Round ref to the type and send it to the device. */
void twin_send(struct twins *s, struct twin t);
/* Device values as doubles; caller srf__free()s. */
double *twin_values(const struct twins *s, struct twin t);
/* The same of integers: into x, of t.bytes bytes. */
void twin_raw_values(const struct twins *s, struct twin_raw t, void *x);
/* The device must agree with the reference: |got - want| <= tol max(|want|, sqrt(n) natural), in
 * norm. natural: the size of the terms an element is made of, where they may cancel; 0 if not. */
void twin_close(struct twins *s, const char *name, struct twin t, double tol, double natural);
/* test_close, which a test that reports survives. */
void twin_check(struct twins *s, const char *name, const double *got, const double *want, int64_t n,
                double tol);

/* Rounding error allowed where `length` terms are summed in type A: c eps(A) sqrt(length); and
 * where the sum is rounded to T. */
double twin_acc_tol(const struct twins *s, int64_t length);
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
        void *before_ = (s)->twice ? twins_save(s) : NULL;                                         \
        test_ok(srf_run_##op((s)->ctx, &run_args_));                                               \
        if (before_) {                                                                             \
            void *after_ = twins_save(s);                                                          \
            twins_restore(s, before_);                                                             \
            twins_workspace(s);                                                                    \
            test_ok(srf_run_##op((s)->ctx, &run_args_));                                           \
            twins_same(s, #op, after_);                                                            \
        }                                                                                          \
    } while (0)
void twins_workspace(struct twins *s);
/* The bytes of every device tensor; to put them back, or to compare with. Both free them. */
void *twins_save(const struct twins *s);
void twins_restore(struct twins *s, void *saved);
void twins_same(struct twins *s, const char *op, void *saved);

/* Central differences: grad[i] must be d loss / d x[i] for every i, to `tol` in norm. */
void test_gradient(const char *name, double (*loss)(void *env), void *env, double *x,
                   const double *grad, int64_t n, double tol);
/* sum_i a_i b_i */
double test_dot(const double *a, const double *b, int64_t n);

/* Run a test body for both dtypes and 1, 2 and 3 threads. */
void twin_each(void (*body)(enum srf_dtype dtype, int threads));
