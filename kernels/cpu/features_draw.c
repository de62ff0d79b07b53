/* Feature draws on the CPU: the blocks of features.h in double, rounded. Each block of each layer
 * and set has its own stream, so threads take whole blocks and their number changes nothing. */
#include "kernels/cpu/cpu.h"
#include "kernels/rng.h"

/* One thread's doubles: a block, its bias, and what making it takes. */
static size_t thread_doubles(int64_t d)
{
    return (size_t)(d * d + d) + srf__features_scratch(d);
}

size_t SRF_CPU(features_draw_workspace)(const struct srf_ctx *ctx,
                                        const struct srf_features_draw_args *a)
{
    return (size_t)ctx->n_threads * thread_doubles(a->d) * sizeof(double);
}

srf_status SRF_CPU(features_draw)(struct srf_ctx *ctx, const struct srf_features_draw_args *a)
{
    int64_t m = a->m, d = a->d, n_draws = a->n_layers * a->n_sets;
    if (n_draws == 0) return SRF_OK;
    SRF_TRY(srf__features_check(a));
    for (int64_t i = 0; i < n_draws; i++)
        SRF_TRY(
            srf__features_check_place(i / a->n_sets, i % a->n_sets, a->oprf_a ? a->oprf_a[i] : 0));
    int64_t n_blocks = (m + d - 1) / d;
#pragma omp parallel for num_threads(ctx->n_threads) schedule(static)
    for (int64_t i = 0; i < n_draws * n_blocks; i++) {
        double *w = (double *)ctx->workspace + (size_t)omp_get_thread_num() * thread_doubles(d);
        double *bias = w + d * d, *scratch = bias + d;
        int64_t draw = i / n_blocks, block = i % n_blocks, first = block * d;
        int64_t rows = m - first < d ? m - first : d;
        srf__features_block(a, draw / a->n_sets, draw % a->n_sets, block,
                            a->oprf_a ? a->oprf_a[draw] : 0, w, bias, scratch);
        real *out = (real *)a->w + (draw * m + first) * d;
        real *out_bias = (real *)a->bias + draw * m + first;
        for (int64_t j = 0; j < rows * d; j++) out[j] = (real)w[j];
        for (int64_t j = 0; j < rows; j++) out_bias[j] = (real)bias[j];
    }
    return SRF_OK;
}
