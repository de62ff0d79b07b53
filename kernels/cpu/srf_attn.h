/* Parts that the forward, backward and step of SRF attention share, for one head of one sequence.
 *
 * Everything is in log2 units: a_i(x) = log2(e) (w_i.x + bias_i - |x|^2/2), phi_i(x) = 2^a_i(x).
 * Stabilisers are integers, and an exponent is split as a = n + f with n = round(a) before one is
 * subtracted (srf__exp2_parts), so that a stabiliser that depends on later tokens rescales sums by
 * exact powers of two and cancels to the bit.
 *
 * The state of a head is S (m, d), z (m), M (m): sums of phi_i(y_s) v_s and phi_i(y_s), scaled by
 * 2^-M_i with M_i = max_s round(a_i(y_s)). So z_i >= 2^-1/2 once a key was seen, and M_i never
 * falls: moving to a later stabiliser multiplies by at most 1. z_0 = 0 says that no key was seen.
 */
#pragma once
#include "kernels/cpu/cpu.h"

#ifdef SRF_REAL_F64
#define srf__attn_check       srf__attn_check_f64
#define srf__attn_carve_chunk srf__attn_carve_chunk_f64
#define srf__attn_load        srf__attn_load_f64
#define srf__attn_features    srf__attn_features_f64
#define srf__attn_keys        srf__attn_keys_f64
#define srf__attn_queries     srf__attn_queries_f64
#define srf__attn_add_keys    srf__attn_add_keys_f64
#define srf__attn_absorb      srf__attn_absorb_f64
#define srf__attn_chunk       srf__attn_chunk_f64
#define srf__attn_window      srf__attn_window_f64
#endif

#define ATTN_CHUNK 64            /* tokens whose mutual weights are formed explicitly */
#define ATTN_AHEAD 16            /* rows between asking for one and using it */
#define ATTN_LIMIT ((real)1e17)  /* components of x, y are clamped to this: |x|^2 stays in range */
#define ATTN_LOW   ((real)-1e30) /* exponents are clamped to this */
#define ATTN_UNSET ((real)-1e32) /* the maximum over no keys */

struct attn_head {
    struct srf_ctx *ctx;
    int64_t m, d;
    real scale;           /* d^(-1/4) */
    const real *w, *bias; /* (m, d), (m) */
};

struct attn_state {
    real *s, *z, *top; /* (m, d), (m), (m): S, z, M */
};

/* What one chunk of n <= ATTN_CHUNK tokens makes of a state and its own keys. */
struct attn_chunk {
    real *top;  /* (m): M after the chunk */
    real *step; /* (m): 2^(M before - M after) */
    real *zs;   /* (m): z before, in the scale of M after */
    real *qf;   /* (n, m): phi(x_t) 2^(M after - r_t), r_t the row's stabiliser */
    real *kf;   /* (n, m): phi(y_s) 2^-(M after) */
    real *p;    /* (n, n): qf_t.kf_s for s <= t, else 0 */
    real *den;  /* (n): denominators, scaled by 2^-r_t */
};

/* Bump allocation over the workspace of a thread; a NULL base only counts. */
struct attn_bump {
    char *base;
    size_t used;
};
static inline real *attn_reals(struct attn_bump *b, int64_t n)
{
    real *p = b->base ? (real *)(b->base + b->used) : NULL;
    b->used += ((size_t)n * sizeof(real) + 63) / 64 * 64;
    return p;
}
static inline struct attn_state attn_state_at(real *s, int64_t m, int64_t d)
{
    return (struct attn_state){s, s ? s + m * d : NULL, s ? s + m * (d + 1) : NULL};
}
static inline int64_t attn_min(int64_t a, int64_t b)
{
    return a < b ? a : b;
}
static inline int64_t attn_max(int64_t a, int64_t b)
{
    return a > b ? a : b;
}
/* d values will be needed soon. Heads are narrow slices of long rows, a page or so apart, so that
 * the hardware does not see the next one coming: loops over rows ask for it ATTN_AHEAD rows
 * early. */
static inline void attn_prefetch(const real *p, int64_t d)
{
    for (int64_t j = 0; j < d; j += 64 / (int64_t)sizeof(real)) __builtin_prefetch(p + j);
}
static inline bool attn_is_empty(const struct attn_state *st)
{
    return st->z[0] == 0;
}
/* Rows whose features are made by one gemm: several chunks while they stay in the caches. */
static inline int64_t attn_batch_rows(int64_t m)
{
    return m <= 64 ? 4 * ATTN_CHUNK : m <= 128 ? 2 * ATTN_CHUNK : ATTN_CHUNK;
}
static inline struct attn_head attn_head_of(struct srf_ctx *ctx, const struct srf_attn_shape *s,
                                            const void *w, const void *bias, int64_t head)
{
    int64_t set = s->n_sets == 1 ? 0 : head;
    return (struct attn_head){.ctx = ctx,
                              .m = s->m,
                              .d = s->d,
                              .scale = (real)pow((double)s->d, -0.25),
                              .w = (const real *)w + set * s->m * s->d,
                              .bias = (const real *)bias + set * s->m};
}

srf_status srf__attn_check(const struct srf_attn_shape *s, int64_t ld, int64_t ld_o);
struct attn_chunk srf__attn_carve_chunk(struct attn_bump *b, int64_t m);

/* x (n, d) = src * scale, clamped; half (n) = log2(e) |x|^2 / 2, or NULL. NaN stays
 * NaN. */
void srf__attn_load(const struct attn_head *h, const real *src, int64_t ld, int64_t n, real *x,
                    real *half);
/* a (n, m) = log2(e) (x W^T + bias) - half - shift; half may be NULL (= 0). */
void srf__attn_features(const struct attn_head *h, const real *x, const real *half, real shift,
                        int64_t n, real *a);
/* kf = 2^(ak - top) */
void srf__attn_keys(const struct attn_head *h, const real *ak, const real *top, int64_t n,
                    real *kf);
/* r_t = max(r_t, max_i (round(aq_ti) + top_i)), qf = 2^(aq + top - r). */
void srf__attn_queries(const struct attn_head *h, const real *aq, const real *top, int64_t n,
                       real *r, real *qf);
/* S, z = step * S, z + kf^T [v, 1]; M = top. */
void srf__attn_add_keys(const struct attn_head *h, struct attn_state *st, const real *kf,
                        const real *v, int64_t ld, int64_t n, const real *top, const real *step);
/* All of it: n <= ATTN_CHUNK keys with exponents ak go into the state. ch->top, step, kf are left
 * as they were used. */
void srf__attn_absorb(const struct attn_head *h, struct attn_state *st, const real *ak,
                      const real *v, int64_t ld, int64_t n, const struct attn_chunk *ch);
/* Weights of a causal chunk against the state before it, which stays as it is. False if one
 * stabiliser a feature is not enough for the chunk: some denominator is too small to trust. Then
 * the chunk must be halved; a chunk of 1 always succeeds. */
bool srf__attn_chunk(const struct attn_head *h, const struct attn_state *st, const real *aq,
                     const real *ak, int64_t n, const struct attn_chunk *ch);

/* The two blocks of keys that a query of the window hybrid sees exactly. */
struct attn_block_pair {
    const real *y[2]; /* (n[i], d): the block before, the block itself */
    int64_t n[2];     /* n[0] = 0 in block 0 */
};
/* Weights of rows [row, row + n) of block 1, n <= ATTN_CHUNK: p (n, n[0] + row + n) exact weights
 * with later keys 0, qf (n, m) far weights (if far is not empty), den (n); all in one scale 2^-r_t.
 * x, aq are those rows; aq holds -log2(m). */
void srf__attn_window(const struct attn_head *h, const struct attn_block_pair *pair,
                      const struct attn_state *far, const real *x, const real *aq, int64_t row,
                      int64_t n, real *p, real *qf, real *den);
