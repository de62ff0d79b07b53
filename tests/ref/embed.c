#include "tests/ref/dense.h"

void ref_embed_fwd(const struct srf_embed_fwd_args *a)
{
    const int32_t *tokens = a->tokens, *pos = a->pos;
    const double *wte = a->wte, *wpe = a->wpe;
    double *y = a->y;
    for (int64_t i = 0; i < a->n; i++)
        for (int64_t j = 0; j < a->c; j++) {
            int64_t p = pos ? pos[i] < 0 ? 0 : pos[i] : i % a->t;
            if (a->positions == SRF_POS_WRAP) p %= a->n_pos;
            if (a->positions == SRF_POS_CLAMP && p > a->n_pos - 1) p = a->n_pos - 1;
            y[i * a->c + j] = wte[tokens[i] * a->c + j] + wpe[p * a->c + j];
        }
}

void ref_embed_bwd(const struct srf_embed_bwd_args *a)
{
    const int32_t *tokens = a->tokens;
    const double *dy = a->dy;
    double *dwte = a->dwte, *dwpe = a->dwpe;
    for (int64_t i = 0; i < a->n; i++)
        for (int64_t j = 0; j < a->c; j++) {
            dwte[tokens[i] * a->c + j] += dy[i * a->c + j];
            dwpe[(i % a->t) * a->c + j] += dy[i * a->c + j];
        }
}
