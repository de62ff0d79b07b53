/* The CPU backend is compiled twice from the same files: with real = float (the product) and with
 * real = double (SRF_REAL_F64: the table behind dtype F64, for gradient checks and references of
 * whole models). An op is defined as
 *     srf_status SRF_CPU(linear_fwd)(struct srf_ctx *ctx, const struct srf_linear_fwd_args *a)
 * and everything else in the file is static.
 */
#pragma once
#include "kernels/backends.h"

#include <cblas.h>
#include <math.h>
#include <omp.h>
#include <string.h>

/* REAL_MIN_DEN: a smaller denominator of SRF attention has lost too much to underflow, see
 * srf_attn.c. */
#ifdef SRF_REAL_F64
typedef double real;
#define SRF_CPU(name)  cpu_f64_##name
#define srf__gemm      srf__gemm_f64
#define srf__gemm_rows srf__gemm_rows_f64
#define srf__exp2      srf__exp2_f64
#define srf__exp_neg   srf__exp_neg_f64
#define REAL_MIN_DEN   1e-150
#else
typedef float real;
#define SRF_CPU(name)  cpu_f32_##name
#define srf__gemm      srf__gemm_f32
#define srf__gemm_rows srf__gemm_rows_f32
#define srf__exp2      srf__exp2_f32
#define srf__exp_neg   srf__exp_neg_f32
#define REAL_MIN_DEN   1e-20f
#endif
#define REAL_LOG2E ((real)1.4426950408889634)
#define REAL_LN2   ((real)0.6931471805599453)

/* C (m, n) = alpha op(A) op(B) + beta C, row-major, op = transpose where asked. Inside an OpenMP
 * parallel region it runs on the calling thread alone. Counts itself into ctx->profile. */
void srf__gemm(struct srf_ctx *ctx, bool ta, bool tb, int64_t m, int64_t n, int64_t k, real alpha,
               const real *a, int64_t lda, const real *b, int64_t ldb, real beta, real *c,
               int64_t ldc);

/* The same, a row of C bit for bit what it is alone, with any number of threads; not for both A and
 * B transposed, nor for alpha other than 1 with B as it is. srf__gemm calls it where
 * ctx->exact_rows asks for it. */
void srf__gemm_rows(struct srf_ctx *ctx, bool ta, bool tb, int64_t m, int64_t n, int64_t k,
                    real alpha, const real *a, int64_t lda, const real *b, int64_t ldb, real beta,
                    real *c, int64_t ldc);

/* Parallel regions of our own that call srf__gemm inside go between these two: an OpenBLAS with
 * threads of its own (not the OpenMP build) must be told to stay on the caller's. */
void srf__blas_serial_begin(const struct srf_ctx *ctx);
void srf__blas_serial_end(const struct srf_ctx *ctx);

/* Sums over rows of a few hundred values: compilers end a simd reduction with a lane by lane sum,
 * which costs more than the rest of such a row. */
typedef real srf__lanes __attribute__((vector_size(64), aligned(sizeof(real)), may_alias));
enum { SRF__LANES = 64 / sizeof(real) };

static inline real srf__lane_sum(srf__lanes v)
{
    union {
        srf__lanes v;
        real x[SRF__LANES];
    } u = {v};
    for (int half = SRF__LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) u.x[i] += u.x[i + half];
    return u.x[0];
}

/* sum_i a_i b_i */
static inline real srf__dot(const real *a, const real *b, int64_t n)
{
    srf__lanes sum = {0};
    int64_t whole = n / SRF__LANES * SRF__LANES;
    for (int64_t i = 0; i < whole; i += SRF__LANES)
        sum += *(const srf__lanes *)(a + i) * *(const srf__lanes *)(b + i);
    real rest = 0;
    for (int64_t i = 0; i < n % SRF__LANES; i++) rest += a[whole + i] * b[whole + i];
    return srf__lane_sum(sum) + rest;
}

/* sum_i a_i */
static inline real srf__sum(const real *a, int64_t n)
{
    srf__lanes sum = {0};
    int64_t whole = n / SRF__LANES * SRF__LANES;
    for (int64_t i = 0; i < whole; i += SRF__LANES) sum += *(const srf__lanes *)(a + i);
    real rest = 0;
    for (int64_t i = 0; i < n % SRF__LANES; i++) rest += a[whole + i];
    return srf__lane_sum(sum) + rest;
}

/* 2^x and e^x, written so that loops over them vectorise: fp32 to about 1 ulp (polynomials on
 * [-1/2, 1/2] and the like), fp64 by libm. Below the smallest normal number the result is 0; above
 * the largest, infinity. NaN gives NaN. */
#ifdef SRF_REAL_F64
#define REAL_EXP_BIAS     1023
#define REAL_MANTISSA     52
#define srf__round(x)     rint(x)
#define srf__exp2_frac(f) exp2(f)
typedef int64_t real_bits;
#else
#define REAL_EXP_BIAS 127
#define REAL_MANTISSA 23
#define srf__round(x) rintf(x)
typedef int32_t real_bits;
/* 2^f for |f| <= 1/2 */
static inline float srf__exp2_frac(float f)
{
    float p = 1.535336188319500e-4f;
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    return p * f + 1.0f;
}
#endif

/* 2^n for integers n in [-REAL_EXP_BIAS, REAL_EXP_BIAS]; 0 at and below the lower end (NaN too),
 * the largest power above the upper one. */
static inline real srf__pow2(real n)
{
    real e = n > -REAL_EXP_BIAS ? n : -REAL_EXP_BIAS;
    e = e < REAL_EXP_BIAS ? e : REAL_EXP_BIAS;
    union {
        real_bits i;
        real f;
    } bits = {.i = ((real_bits)e + REAL_EXP_BIAS) * ((real_bits)1 << REAL_MANTISSA)};
    return bits.f;
}

/* 2^(f + n) for |f| <= 1/2 and integers n <= REAL_EXP_BIAS. It is exactly 2^n 2^f while it does not
 * underflow, so a change of n alone (of a stabiliser) rescales the result without rounding. */
static inline real srf__exp2_parts(real f, real n)
{
    return srf__exp2_frac(f) * srf__pow2(n);
}

static inline real srf__exp2(real x)
{
#ifdef SRF_REAL_F64
    return exp2(x);
#else
    float n = rintf(x), half = rintf(0.5f * n);
    /* 2^n in two factors, so that n = 128 still gives a number to multiply by */
    float r = srf__exp2_frac(x - n) * srf__pow2(half) * srf__pow2(n - half);
    r = x > 128.0f ? INFINITY : r;
    return x < -126.0f ? 0.0f : r;
#endif
}

/* e^x for x <= 0 only: there one power of two will do. */
static inline real srf__exp_neg(real x)
{
#ifdef SRF_REAL_F64
    return exp(x);
#else
    /* n ln 2 in two pieces keeps the error of large |x| at the ulp level */
    float n = rintf(x * 1.44269504f);
    float f = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    return x < -87.3365402f ? 0.0f : p * srf__pow2(n);
#endif
}
