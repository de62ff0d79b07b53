/* Products in an order of their own: C (m, n) = alpha A op(B) + beta C where a row of C depends on
 * that row of A and on B alone, bit for bit: not on the rows beside it, nor on the threads. BLAS
 * promises neither, its kernels for the last few rows differ. Generation in batches needs it: a
 * sequence must not notice who else is there.
 *
 *     op(B) = B      c_ij = fma(a_ik, b_kj, c_ij) for k = 0, 1, ..: one chain an element, so that
 *                    any blocking gives the same bits. Few rows: B is streamed, 4 rows at a time.
 *                    More: a panel of B, 2 vectors wide, is packed, 6 rows of C in registers.
 *     op(B) = B^T    LANES partial sums over k an element, added in one order.
 * Floor: for a few rows B read once, for many BLAS's rate; about half of it is reached. */
#include "kernels/cpu/split.h"

/* A vector register, not srf__lanes: compilers keep those that are wider than a register in memory.
 */
#ifdef __AVX512F__
#define VECTOR_BYTES 64
#else
#define VECTOR_BYTES 32
#endif
typedef real vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
enum {
    LANES = VECTOR_BYTES / sizeof(real),
    WIDE = 2,        /* vectors of a panel's row */
    STREAM_ROWS = 3, /* as many rows as do not pay for packing */
    STREAM_WIDTH = 1024,
    PANEL = 256, /* rows of a packed panel */
    TILE = 6     /* rows of C in registers */
};
#define INLINE static inline __attribute__((always_inline))
/* Without AVX a vector is no register, and GCC warns of how calls would pass it: there are none. */
#pragma GCC diagnostic ignored "-Wpsabi"

/* A vector of the first n values, if there are so many; 0 beyond them. */
INLINE vector load(const real *from, int64_t n)
{
    if (n >= LANES) return *(const vector *)from;
    vector v = {0};
    for (int64_t i = 0; i < n; i++) v[i] = from[i];
    return v;
}

INLINE void store(real *to, int64_t n, vector v)
{
    if (n >= LANES)
        *(vector *)to = v;
    else
        for (int64_t i = 0; i < n; i++) to[i] = v[i];
}

INLINE real lane_sum(vector v)
{
    typedef real half __attribute__((vector_size(VECTOR_BYTES / 2)));
    typedef real quarter __attribute__((vector_size(VECTOR_BYTES / 4)));
    union {
        vector v;
        half h[2];
    } u = {v};
    union {
        half h;
        quarter q[2];
    } w = {u.h[0] + u.h[1]};
    quarter q = w.q[0] + w.q[1];
    real sum = q[0];
    for (int i = 1; i < LANES / 4; i++) sum += q[i];
    return sum;
}

/* c (n) += w[0..count) times as many rows of b */
INLINE void chain(real *c, const real *b, int64_t ldb, int64_t n, const real *w, int count)
{
    for (int64_t j = 0; j < n; j += LANES) {
        vector sum = load(c + j, n - j);
        for (int i = 0; i < count; i++) sum += w[i] * load(b + i * ldb + j, n - j);
        store(c + j, n - j, sum);
    }
}

/* C (m, n) += A B for m small; element (i, k) of A is a[i row + k col]. */
static void stream(int64_t m, int64_t n, int64_t k, const real *a, int64_t row, int64_t col,
                   const real *b, int64_t ldb, real *c, int64_t ldc)
{
    enum { AT_ONCE = 4 };
    for (int64_t j = 0; j < n; j += STREAM_WIDTH) {
        int64_t width = n - j < STREAM_WIDTH ? n - j : STREAM_WIDTH, l = 0;
        for (; l + AT_ONCE <= k; l += AT_ONCE)
            for (int64_t i = 0; i < m; i++) {
                const real *at = a + i * row + l * col;
                real w[AT_ONCE] = {at[0], at[col], at[2 * col], at[3 * col]};
                chain(c + i * ldc + j, b + l * ldb + j, ldb, width, w, AT_ONCE);
            }
        for (; l < k; l++)
            for (int64_t i = 0; i < m; i++)
                chain(c + i * ldc + j, b + l * ldb + j, ldb, width, a + i * row + l * col, 1);
    }
}

/* C (rows, n <= WIDE LANES) += A times a packed panel (k, WIDE LANES) */
INLINE void tile(int rows, int64_t n, int64_t k, const real *a, int64_t row, int64_t col,
                 const vector *panel, real *c, int64_t ldc)
{
    vector sum[TILE][WIDE];
    for (int i = 0; i < rows; i++)
        for (int w = 0; w < WIDE; w++) sum[i][w] = load(c + i * ldc + w * LANES, n - w * LANES);
    for (int64_t l = 0; l < k; l++)
        for (int i = 0; i < rows; i++)
            for (int w = 0; w < WIDE; w++) sum[i][w] += a[i * row + l * col] * panel[l * WIDE + w];
    for (int i = 0; i < rows; i++)
        for (int w = 0; w < WIDE; w++) store(c + i * ldc + w * LANES, n - w * LANES, sum[i][w]);
}

/* C (m, n) += A B, panel by panel. */
static void packed(int64_t m, int64_t n, int64_t k, const real *a, int64_t row, int64_t col,
                   const real *b, int64_t ldb, real *c, int64_t ldc)
{
    vector panel[PANEL * WIDE];
    for (int64_t j = 0; j < n; j += WIDE * LANES)
        for (int64_t l = 0; l < k; l += PANEL) {
            int64_t depth = k - l < PANEL ? k - l : PANEL, i = 0;
            for (int64_t p = 0; p < depth; p++)
                for (int w = 0; w < WIDE; w++)
                    panel[p * WIDE + w] =
                        load(b + (l + p) * ldb + j + w * LANES, n - j - w * LANES);
            const real *at = a + l * col;
            real *to = c + j;
            for (; i + TILE <= m; i += TILE)
                tile(TILE, n - j, depth, at + i * row, row, col, panel, to + i * ldc, ldc);
            for (; i + 2 <= m; i += 2)
                tile(2, n - j, depth, at + i * row, row, col, panel, to + i * ldc, ldc);
            if (i < m) tile(1, n - j, depth, at + i * row, row, col, panel, to + i * ldc, ldc);
        }
}

/* sum (rows, cols) += products of n <= LANES values of each row of A and B */
INLINE void multiply(int rows, int cols, int64_t n, const real *a, int64_t lda, const real *b,
                     int64_t ldb, vector sum[2][4])
{
    vector x[2];
    for (int i = 0; i < rows; i++) x[i] = load(a + i * lda, n);
    for (int j = 0; j < cols; j++) {
        vector y = load(b + j * ldb, n);
        for (int i = 0; i < rows; i++) sum[i][j] += x[i] * y;
    }
}

/* C (rows, cols) = alpha A B^T + beta C, both of rows k long. */
INLINE void dots(int rows, int cols, int64_t k, real alpha, const real *a, int64_t lda,
                 const real *b, int64_t ldb, real beta, real *c, int64_t ldc)
{
    vector sum[2][4] = {{{0}}};
    int64_t l = 0;
    for (; l + LANES <= k; l += LANES) multiply(rows, cols, LANES, a + l, lda, b + l, ldb, sum);
    if (l < k) multiply(rows, cols, k - l, a + l, lda, b + l, ldb, sum);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < cols; j++) {
            real *to = c + i * ldc + j, value = alpha * lane_sum(sum[i][j]);
            *to = beta == 0 ? value : value + beta * *to;
        }
}

static void transposed(int64_t m, int64_t n, int64_t k, real alpha, const real *a, int64_t lda,
                       const real *b, int64_t ldb, real beta, real *c, int64_t ldc)
{
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        const real *y = b + j * ldb;
        int64_t i = 0;
        for (; i + 2 <= m; i += 2)
            dots(2, 4, k, alpha, a + i * lda, lda, y, ldb, beta, c + i * ldc + j, ldc);
        if (i < m) dots(1, 4, k, alpha, a + i * lda, lda, y, ldb, beta, c + i * ldc + j, ldc);
    }
    for (; j < n; j++)
        for (int64_t i = 0; i < m; i++)
            dots(1, 1, k, alpha, a + i * lda, lda, b + j * ldb, ldb, beta, c + i * ldc + j, ldc);
}

static void scale_rows(int64_t m, int64_t n, real beta, real *c, int64_t ldc)
{
    for (int64_t i = 0; i < m && beta != 1; i++)
        for (int64_t j = 0; j < n; j++) c[i * ldc + j] = beta == 0 ? 0 : beta * c[i * ldc + j];
}

void srf__gemm_rows(struct srf_ctx *ctx, bool ta, bool tb, int64_t m, int64_t n, int64_t k,
                    real alpha, const real *a, int64_t lda, const real *b, int64_t ldb, real beta,
                    real *c, int64_t ldc)
{
    int64_t row = ta ? 1 : lda, col = ta ? lda : 1, groups = (n + LANES - 1) / LANES;
    int64_t parts = ctx->n_threads;
#pragma omp parallel for schedule(static)                                                          \
    num_threads(ctx->n_threads) if (m * n * k > 1 << 18 && !omp_in_parallel())
    for (int64_t part = 0; part < parts; part++) {
        int64_t from = srf__split(groups, parts, part) * LANES;
        int64_t end = srf__split(groups, parts, part + 1) * LANES;
        int64_t width = (end < n ? end : n) - from;
        if (width <= 0) continue;
        if (tb) {
            transposed(m, width, k, alpha, a, lda, b + from * ldb, ldb, beta, c + from, ldc);
            continue;
        }
        scale_rows(m, width, beta, c + from, ldc);
        if (m <= STREAM_ROWS)
            stream(m, width, k, a, row, col, b + from, ldb, c + from, ldc);
        else
            packed(m, width, k, a, row, col, b + from, ldb, c + from, ldc);
    }
}
