/* y = A B on Hopper's warpgroup products, bf16, with what is done to y on its way out:
 * product_wgmma.cu. */
#pragma once
#include "kernels/cuda/dense.h"

#define PRODUCT_ROWS 128 /* of a tile of y */
#define PRODUCT_COLS 192
#define PRODUCT_SUMS 64 /* rows of A that PLAIN adds up at a time */

enum product_end {
    PRODUCT_EXP,       /* y = exp(A B - shift of the row), columns from v on 0; and row sums */
    PRODUCT_GELU,      /* y = gelu(u), slopes = gelu'(u), u = A B + bias */
    PRODUCT_SLOPE,     /* y = (A B) slopes; and column sums */
    PRODUCT_ADD,       /* y = A B + bias + residual; and moments of its rows */
    PRODUCT_NORM,      /* y = rstd (A B - mean s) + t: rows' mean and rstd, columns' s and t */
    PRODUCT_NORM_GELU, /* y = gelu(2 h), h that */
    PRODUCT_PLAIN      /* y = A B; and column sums of A */
};

struct wgmma_product {
    enum product_end end;
    int64_t m, n, k;
    const void *a; /* bf16 (m, k) */
    const void *b; /* bf16 (n, k) of EXP, SLOPE and PLAIN, else (k, n) */
    void *y;       /* out bf16 (m, n) */
    int64_t ld;    /* of y, NORM; 0: n */
    int64_t v;
    const float *shift;   /* (m), in log2 units */
    const void *bias;     /* bf16 (n), or NULL */
    const void *residual; /* bf16 (m, n), ADD */
    uint8_t *slopes;      /* srf_slope_bytes(m, n), out of GELU, in of SLOPE */
    /* out: EXP, (n / PRODUCT_COLS rounded up, m), a tile's sums along its rows; SLOPE, (m /
     * PRODUCT_ROWS rounded up, n), along its columns, or NULL; PLAIN, (m / PRODUCT_SUMS rounded up,
     * k), of A's */
    float *sums;
    /* ADD: out (m, n / PRODUCT_COLS rounded up, 2), mean and sum of squares about it of each
     * PRODUCT_COLS columns; or NULL */
    float *moments;
    const float *rows; /* NORM: (m, 2), rstd and -mean rstd */
    /* NORM: (n / 2, 4), s of two columns, t of both; s are small, and left out where they do not
     * count: row_norms in product_wgmma_ends.h */
    const float *columns;
};

/* Whether the card and the build have the kernel. */
bool srf__product_here(const struct srf_ctx *ctx, enum product_end end);
/* Whether the card and the build have the kernel, and the product's shape and addresses suit it. */
bool srf__product_takes(const struct srf_ctx *ctx, const struct wgmma_product *p);
srf_status srf__product(struct srf_ctx *ctx, const struct wgmma_product *p);
