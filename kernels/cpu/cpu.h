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

#ifdef SRF_REAL_F64
typedef double real;
#define SRF_CPU(name) cpu_f64_##name
#define srf__gemm     srf__gemm_f64
#define srf__exp2     srf__exp2_f64
#define srf__exp      srf__exp_f64
#define REAL_MIN_DEN  1e-280
#else
typedef float real;
#define SRF_CPU(name) cpu_f32_##name
#define srf__gemm     srf__gemm_f32
#define srf__exp2     srf__exp2_f32
#define srf__exp      srf__exp_f32
#define REAL_MIN_DEN  1e-28f
#endif

/* C (m, n) = alpha op(A) op(B) + beta C, row-major, op = transpose where asked. Inside an OpenMP
 * parallel region it runs on the calling thread alone. Counts itself into ctx->profile. */
void srf__gemm(struct srf_ctx *ctx, bool ta, bool tb, int64_t m, int64_t n, int64_t k, real alpha,
               const real *a, int64_t lda, const real *b, int64_t ldb, real beta, real *c,
               int64_t ldc);

/* Parallel regions of our own that call srf__gemm inside go between these two: an OpenBLAS with
 * threads of its own (not the OpenMP build) must be told to stay on the caller's. */
void srf__blas_serial_begin(const struct srf_ctx *ctx);
void srf__blas_serial_end(const struct srf_ctx *ctx);

/* 2^x and e^x, written so that loops over them vectorise: fp32 to about 2 ulp (Cephes-style
 * polynomial on [-1/2, 1/2]), fp64 by libm. Below the smallest normal number the result is 0; above
 * the largest, infinity. NaN gives NaN. 2^(x+n) is exactly 2^n 2^x for integers n while nothing
 * under- or overflows. */
static inline real srf__exp2(real x)
{
#ifdef SRF_REAL_F64
    return exp2(x);
#else
    float y = x < -127.0f ? -127.0f : x; /* NaN passes through */
    y = y > 129.0f ? 129.0f : y;
    /* round to nearest integer by the magic number 1.5 * 2^23 */
    float magic = 12582912.0f, n = (y + magic) - magic, f = y - n;
    float p = 1.535336188319500e-4f;
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    /* 2^n in two factors, so that n = 128 still gives a number to multiply by */
    union {
        float f;
        int32_t i;
    } half;
    float n2 = n == n ? n : 0.0f;
    int32_t e = (int32_t)n2;
    half.i = (e / 2 + 127) << 23;
    float r = p * half.f;
    half.i = (e - e / 2 + 127) << 23;
    r = r * half.f;
    return x < -126.0f ? 0.0f : r;
#endif
}

static inline real srf__exp(real x)
{
#ifdef SRF_REAL_F64
    return exp(x);
#else
    /* x log2(e) in two pieces keeps the error of large |x| at the ulp level */
    float y = x < -100.0f ? -100.0f : x;
    y = y > 100.0f ? 100.0f : y;
    float magic = 12582912.0f, n = (y * 1.44269504f + magic) - magic;
    float f = (y - n * 0.693145752f) - n * 1.42860677e-6f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    union {
        float f;
        int32_t i;
    } half;
    float n2 = n == n ? n : 0.0f;
    int32_t e = (int32_t)n2;
    half.i = (e / 2 + 127) << 23;
    float r = p * half.f;
    half.i = (e - e / 2 + 127) << 23;
    r = r * half.f;
    return x < -87.3f ? 0.0f : r;
#endif
}
