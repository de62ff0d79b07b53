/* Inside head_loss: the product that leaves exponentials where logits would be. */
#pragma once
#include "kernels/cuda/dense.h"

#define HEAD_COLS 192 /* columns of a tile, whose sums come apart */

/* e (n, ld) = exp(x w^T - shift of the row), columns from v on 0. */
struct head_product {
    int64_t n, c, v, ld;
    const void *x;      /* bf16 (n, c) */
    const void *w;      /* bf16 (ld, c) */
    const float *shift; /* (n), in log2 units */
    void *e;            /* out bf16 (n, ld) */
    float *parts;       /* out (ld / HEAD_COLS rounded up, n): row sums of the tiles */
};
/* Whether the card and the build have the kernel, and the product's shape and addresses suit it. */
bool srf__head_product_takes(const struct srf_ctx *ctx, const struct head_product *p);
srf_status srf__head_product(struct srf_ctx *ctx, const struct head_product *p);
