/* Token and position embedding.
 *
 *     forward    y[n] = wte[tokens[n]] + wpe[pos[n]], or a plain gather without wpe
 *     backward   dwte[tokens[n]] += dy[n],  dwpe[n % t] += dy[n]
 *
 * The backward scatter is cut by columns: tokens repeat, columns do not, so no atomics are needed
 * and every element is a sum in the order of the rows, whatever the number of threads.
 * Floor: memory; forward reads two rows and writes one, backward reads one and updates two. */
#include "kernels/cpu/split.h"

/* The row of the position table that stands for p. */
static int64_t table_row(int64_t p, int64_t n_pos, enum srf_positions positions)
{
    if (p < 0) return 0;
    if (p < n_pos || positions == SRF_POS_ERROR) return p;
    return positions == SRF_POS_WRAP ? p % n_pos : n_pos - 1;
}

srf_status SRF_CPU(embed_fwd)(struct srf_ctx *ctx, const struct srf_embed_fwd_args *a)
{
    if (a->n == 0 || a->c == 0) return SRF_OK;
    int64_t most = a->positions == SRF_POS_ERROR ? a->n_pos : INT32_MAX;
    SRF_FAIL_IF(a->wpe && !a->pos && (a->t < 1 || a->t > most), SRF_INVALID,
                "embed_fwd: t is %lld, expected 1 to %lld (the position table)", (long long)a->t,
                (long long)most);
    const int32_t *tokens = a->tokens, *pos = a->pos;
    const real *wte = a->wte, *wpe = a->wpe;
    int64_t c = a->c;
#pragma omp parallel for schedule(static) num_threads(ctx->n_threads) if (a->n * c > MIN_PARALLEL)
    for (int64_t i = 0; i < a->n; i++) {
        const real *te = wte + tokens[i] * c;
        real *y = (real *)a->y + i * c;
        if (!wpe) {
            memcpy(y, te, (size_t)c * sizeof *y);
            continue;
        }
        const real *pe = wpe + table_row(pos ? pos[i] : i % a->t, a->n_pos, a->positions) * c;
        for (int64_t j = 0; j < c; j++) y[j] = te[j] + pe[j];
    }
    return SRF_OK;
}

size_t SRF_CPU(embed_fwd_workspace)(const struct srf_ctx *ctx, const struct srf_embed_fwd_args *a)
{
    (void)ctx;
    (void)a;
    return 0;
}

srf_status SRF_CPU(embed_bwd)(struct srf_ctx *ctx, const struct srf_embed_bwd_args *a)
{
    if (a->n == 0 || a->c == 0) return SRF_OK;
    SRF_FAIL_IF(a->t < 1 || a->t > a->n_pos, SRF_INVALID,
                "embed_bwd: t is %lld, expected 1 to %lld (the position table)", (long long)a->t,
                (long long)a->n_pos);
    const int32_t *tokens = a->tokens;
    const real *dy = a->dy;
    int64_t c = a->c, parts = ctx->n_threads;
#pragma omp parallel for schedule(static) num_threads(ctx->n_threads) if (a->n * c > MIN_PARALLEL)
    for (int64_t part = 0; part < parts; part++) {
        int64_t begin = srf__split(c, parts, part), end = srf__split(c, parts, part + 1);
        for (int64_t i = 0; i < a->n; i++) {
            const real *d = dy + i * c;
            real *te = (real *)a->dwte + tokens[i] * c, *pe = (real *)a->dwpe + i % a->t * c;
            for (int64_t j = begin; j < end; j++) te[j] += d[j];
            for (int64_t j = begin; j < end; j++) pe[j] += d[j];
        }
    }
    return SRF_OK;
}

size_t SRF_CPU(embed_bwd_workspace)(const struct srf_ctx *ctx, const struct srf_embed_bwd_args *a)
{
    (void)ctx;
    (void)a;
    return 0;
}
