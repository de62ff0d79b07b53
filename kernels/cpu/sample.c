/* The next token from logits, a thread a row: kernels/sample.c does the work. Floor: memory; a row
 * is read from two times up (greedy: once), from the cache after the first. */
#include "kernels/cpu/cpu.h"
#include "kernels/sample.h"

/* A row of fp32 a thread, for logits that are not. */
static size_t row_bytes(const struct srf_sample_args *a)
{
    return sizeof(real) == sizeof(float) ? 0 : ((size_t)a->v * sizeof(float) + 63) / 64 * 64;
}

size_t SRF_CPU(sample_workspace)(const struct srf_ctx *ctx, const struct srf_sample_args *a)
{
    return row_bytes(a) * (size_t)ctx->n_threads;
}

static const float *as_float(const real *x, int64_t n, void *scratch)
{
    if (sizeof(real) == sizeof(float)) return (const void *)x;
    float *to = scratch;
    for (int64_t j = 0; j < n; j++) to[j] = (float)x[j];
    return to;
}

srf_status SRF_CPU(sample)(struct srf_ctx *ctx, const struct srf_sample_args *a)
{
    SRF_TRY(srf__sample_check(a));
    const real *logits = a->logits;
    const uint64_t *streams = a->streams;
    const int32_t *pos = a->pos;
    int32_t *tokens = a->tokens;
    int64_t ld = a->ld ? a->ld : a->v;
#pragma omp parallel for schedule(static) num_threads(ctx->n_threads) if (a->n > 1)
    for (int64_t i = 0; i < a->n; i++) {
        if (pos && pos[i] < 0) continue;
        char *scratch = (char *)ctx->workspace + row_bytes(a) * (size_t)omp_get_thread_num();
        const float *row = as_float(logits + i * ld, a->v, scratch);
        tokens[i] = srf__sample_row(a, row, streams + 3 * i);
    }
    return SRF_OK;
}
