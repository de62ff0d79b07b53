/* The CPU backend's tables (one a precision), memory, and BLAS. */
#include "kernels/cpu/cpu.h"

#include <stdlib.h>

int openblas_get_parallel(void);
void openblas_set_num_threads(int n);

#ifndef SRF_REAL_F64
enum { MAX_THREADS = 4096 }; /* beyond what any machine has: a typing error */

static srf_status cpu_alloc(struct srf_ctx *ctx, size_t bytes, void **out)
{
    (void)ctx;
    *out = srf__alloc(bytes, 1);
    SRF_FAIL_IF(!*out, SRF_NOMEM, "out of memory: %zu bytes (%.1f MB) are needed", bytes,
                (double)bytes * 1e-6);
    return SRF_OK;
}

static void cpu_free(struct srf_ctx *ctx, void *p)
{
    (void)ctx;
    srf__free(p);
}

static srf_status cpu_copy(struct srf_ctx *ctx, void *dst, const void *src, size_t bytes)
{
    (void)ctx;
    if (bytes) memmove(dst, src, bytes);
    return SRF_OK;
}

static srf_status cpu_zero(struct srf_ctx *ctx, void *dst, size_t bytes)
{
    (void)ctx;
    if (bytes) memset(dst, 0, bytes);
    return SRF_OK;
}

static srf_status cpu_sync(struct srf_ctx *ctx)
{
    (void)ctx;
    return SRF_OK;
}

static srf_status cpu_memory(struct srf_ctx *ctx, size_t *free_bytes, size_t *total)
{
    (void)ctx;
    *free_bytes = *total = 0;
    return SRF_OK;
}

#define COMMON                                                                                     \
    .name = "cpu", .alloc = cpu_alloc, .free = cpu_free, .upload = cpu_copy, .download = cpu_copy, \
    .copy = cpu_copy, .zero = cpu_zero, .sync = cpu_sync, .memory = cpu_memory

static const struct srf_backend f32_table = {
    COMMON,
#define X(name) .name = cpu_f32_##name, .name##_workspace = cpu_f32_##name##_workspace,
#include "kernels/ops.def"
#undef X
};

static const struct srf_backend f64_table = {
    COMMON,
#define X(name) .name = cpu_f64_##name, .name##_workspace = cpu_f64_##name##_workspace,
#include "kernels/ops.def"
#undef X
};

/* OMP_NUM_THREADS if it says something, else all cores. From the environment each time: OpenMP
 * itself forgets it once a context has set another number. */
static int default_threads(void)
{
    const char *text = getenv("OMP_NUM_THREADS"); /* "4", or "4,2" for nested levels */
    long n = text ? strtol(text, NULL, 10) : 0;
    return n >= 1 && n <= MAX_THREADS ? (int)n : omp_get_num_procs();
}

srf_status srf__cpu_open(struct srf_ctx *ctx, int threads)
{
    SRF_FAIL_IF(ctx->dtype != SRF_F32 && ctx->dtype != SRF_F64, SRF_UNSUPPORTED,
                "the CPU computes in f32 or f64, not in %s", srf_dtype_name(ctx->dtype));
    SRF_FAIL_IF(threads < 0 || threads > MAX_THREADS, SRF_INVALID,
                "%d threads: expected 0 (the default) to %d", threads, MAX_THREADS);
    ctx->be = ctx->dtype == SRF_F64 ? &f64_table : &f32_table;
    ctx->n_threads = threads ? threads : default_threads();
    /* Both settings belong to the process, as OpenMP and OpenBLAS have them. */
    omp_set_num_threads(ctx->n_threads);
    openblas_set_num_threads(ctx->n_threads);
    return SRF_OK;
}

void srf__blas_serial_begin(const struct srf_ctx *ctx)
{
    (void)ctx;
    if (openblas_get_parallel() == 1) openblas_set_num_threads(1);
}

void srf__blas_serial_end(const struct srf_ctx *ctx)
{
    if (openblas_get_parallel() == 1) openblas_set_num_threads(ctx->n_threads);
}
#endif

/* A few rows times a transposed matrix (the output head of a decoding step): a product packs the
 * matrix first, which takes longer than the product; row by row it is read once each. */
#define FEW_ROWS 3

static void product(bool ta, bool tb, blasint m, blasint n, blasint k, real alpha, const real *a,
                    blasint lda, const real *b, blasint ldb, real beta, real *c, blasint ldc)
{
#ifdef SRF_REAL_F64
#define GEMM cblas_dgemm
#define GEMV cblas_dgemv
#else
#define GEMM cblas_sgemm
#define GEMV cblas_sgemv
#endif
    if (!ta && tb && m <= FEW_ROWS && k > 0) {
        for (blasint i = 0; i < m; i++)
            GEMV(CblasRowMajor, CblasNoTrans, n, k, alpha, b, ldb, a + (size_t)i * (size_t)lda, 1,
                 beta, c + (size_t)i * (size_t)ldc, 1);
        return;
    }
    GEMM(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans, m, n, k,
         alpha, a, lda, b, ldb, beta, c, ldc);
}

void srf__gemm(struct srf_ctx *ctx, bool ta, bool tb, int64_t m, int64_t n, int64_t k, real alpha,
               const real *a, int64_t lda, const real *b, int64_t ldb, real beta, real *c,
               int64_t ldc)
{
    double t0 = ctx->profile ? srf__now() : 0;
    if (ctx->exact_rows && !(ta && tb) && (tb || alpha == 1))
        srf__gemm_rows(ctx, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
    else
        product(ta, tb, (blasint)m, (blasint)n, (blasint)k, alpha, a, (blasint)lda, b, (blasint)ldb,
                beta, c, (blasint)ldc);
    if (!ctx->profile) return;
    /* A call inside a parallel region keeps one of n_threads busy. */
    double share = omp_in_parallel() ? 1.0 / ctx->n_threads : 1.0, dt = (srf__now() - t0) * share;
    double flops = 2.0 * (double)m * (double)n * (double)k;
#pragma omp atomic
    ctx->profile->gemm_seconds += dt;
#pragma omp atomic
    ctx->profile->gemm_flops += flops;
}
