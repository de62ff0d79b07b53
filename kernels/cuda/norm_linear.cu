/* Layer norm and the linear layer behind it, without the norm's output.
 *
 *     y = act(u),  u = ((x - mean) rstd gamma + beta) W + b
 *                    = rstd (x W' - mean s) + t,  s = 1 W',  t = beta W + b,
 *                      W' = gamma W less the mean of each of its columns (x - mean adds up to 0)
 *
 * bf16, many rows: a kernel makes W' (rounded to bf16), s and t, each time anew, since W is small
 * beside the rows; the product (product.h) does the rest at its tiles' ends. s are sums of W' as it
 * was rounded, what rounding has left of 0: only a row whose mean is far from 0 has need of them,
 * and with them its mean drops out whatever it is. What W' loses by rounding, the norm's output
 * would have lost.
 * Rows' means and squares about them come in parts of PRODUCT_COLS columns, each about its own
 * mean, so that no precision is lost where the mean is large: from the product that made x, or by
 * a kernel that reads x once more.
 * Elsewhere the two ops do it one after the other.
 * Floor: tensor cores; 2 n in out flops. */
#include "kernels/cuda/chain.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/product.h"
#include "kernels/norm_linear.h"

#define THREADS    256
#define FOLD_COLS  32                     /* of a block of fold_kernel */
#define FOLD_PACKS (FOLD_COLS / 8)        /* 16 bytes each */
#define FOLD_ROWS  (THREADS / FOLD_PACKS) /* at once */
#define FOLD_HELD  12
#define PART_LANES 8
#define MANY_ROWS  8192 /* from here on W' is small beside them */

/* Eight columns of a row of w: w times the row's gamma, less `off`. */
static __device__ __forceinline__ void scale_row(float x[8], const pack<bf16, 8> *w, float gamma,
                                                 const float off[8])
{
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = fmaf(gamma, element(*w, j), -off[j]);
}
/* The share of gamma w in sum, of beta w in t. */
static __device__ __forceinline__ void add_row(float sum[8], float t[8], const pack<bf16, 8> *w,
                                               float gamma, float beta)
{
    float x[8], zeros[8] = {};
    scale_row(x, w, gamma, zeros);
#pragma unroll
    for (int j = 0; j < 8; j++) sum[j] += x[j], t[j] = fmaf(beta, element(*w, j), t[j]);
}
/* w becomes W'; its share in s. */
static __device__ __forceinline__ void fold_row(pack<bf16, 8> *w, float gamma, const float mean[8],
                                                float s[8])
{
    float x[8];
    scale_row(x, w, gamma, mean);
    round_to(w, x);
#pragma unroll
    for (int j = 0; j < 8; j++) s[j] += element(*w, j);
}

/* folded = W'; columns = s and t (product.h). A thread has 8 columns of every FOLD_ROWS-th row;
 * those of the first FOLD_HELD it makes while the kernel before is still running. */
static __device__ void fold(int in, int out, int64_t ld, float by, const bf16 *__restrict__ w,
                            const bf16 *__restrict__ b, const bf16 *__restrict__ gamma,
                            const bf16 *__restrict__ beta, bf16 *__restrict__ folded,
                            float *__restrict__ columns)
{
    __shared__ float sums[2][FOLD_ROWS][FOLD_COLS + 1], means[FOLD_COLS];
    int at = threadIdx.x % FOLD_PACKS * 8, first = threadIdx.x / FOLD_PACKS;
    int col = blockIdx.x * FOLD_COLS + at, rows = col < out ? in : 0;
    float s[8] = {}, t[8] = {}, mean[8];
    pack<bf16, 8> held[FOLD_HELD];
#pragma unroll
    for (int k = 0; k < FOLD_HELD; k++) {
        int i = first + k * FOLD_ROWS;
        held[k] = i < rows ? load_pack<bf16, 8>(w + i * ld + col) : zero_pack<bf16, 8>();
    }
#pragma unroll
    for (int k = 0; k < FOLD_HELD; k++) {
        int i = first + k * FOLD_ROWS;
        if (i < rows) add_row(s, t, &held[k], to_float(gamma[i]), to_float(beta[i]));
    }
    for (int i = first + FOLD_HELD * FOLD_ROWS; i < rows; i += FOLD_ROWS) {
        pack<bf16, 8> p = load_pack<bf16, 8>(w + i * ld + col);
        add_row(s, t, &p, to_float(gamma[i]), to_float(beta[i]));
    }
#pragma unroll
    for (int j = 0; j < 8; j++) sums[0][first][at + j] = s[j], sums[1][first][at + j] = t[j];
    __syncthreads();
    if (threadIdx.x < FOLD_COLS) {
        float all = 0.0f;
        for (int i = 0; i < FOLD_ROWS; i++) all += sums[0][i][threadIdx.x];
        means[threadIdx.x] = all / (float)in;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 8; j++) mean[j] = means[at + j], s[j] = 0.0f;
#pragma unroll
    for (int k = 0; k < FOLD_HELD; k++) {
        int i = first + k * FOLD_ROWS;
        if (i < rows) fold_row(&held[k], to_float(gamma[i]), mean, s);
    }
    chain_wait();
#pragma unroll
    for (int k = 0; k < FOLD_HELD; k++) {
        int i = first + k * FOLD_ROWS;
        if (i < rows) store_pack<bf16, 8>(folded + (int64_t)i * out + col, held[k]);
    }
    for (int i = first + FOLD_HELD * FOLD_ROWS; i < rows; i += FOLD_ROWS) {
        pack<bf16, 8> p = load_pack<bf16, 8>(w + i * ld + col);
        fold_row(&p, to_float(gamma[i]), mean, s);
        store_pack<bf16, 8>(folded + (int64_t)i * out + col, p);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) sums[0][first][at + j] = s[j];
    __syncthreads();
    if (threadIdx.x >= 2 * FOLD_COLS) return;
    int which = threadIdx.x / FOLD_COLS, own = threadIdx.x % FOLD_COLS;
    col = blockIdx.x * FOLD_COLS + own;
    if (col >= out) return;
    float all = which && b ? to_float(b[col]) : 0.0f;
    for (int i = 0; i < FOLD_ROWS; i++) all += sums[which][i][own];
    columns[(int64_t)(col >> 1) * 4 + 2 * which + (col & 1)] = which ? by * all : all;
}

struct fold_args {
    int64_t n, ld;       /* ld: of w */
    int in, out, strips; /* blocks that fold */
    float eps, by;       /* by: rows and t are multiplied with it */
    const bf16 *w, *b, *gamma, *beta;
    const float2 *moments;
    bf16 *folded;
    float *columns;
    float2 *rows; /* product.h */
};

/* The first blocks fold, the others make a row's rstd and -mean rstd of its parts. */
static __global__ __launch_bounds__(THREADS) void fold_kernel(const struct fold_args a)
{
    chain_next();
    if ((int)blockIdx.x < a.strips) {
        fold(a.in, a.out, a.ld, a.by, a.w, a.b, a.gamma, a.beta, a.folded, a.columns);
        return;
    }
    chain_wait();
    int parts = (a.in + PRODUCT_COLS - 1) / PRODUCT_COLS;
    int64_t row = ((int64_t)blockIdx.x - a.strips) * THREADS + threadIdx.x;
    if (row >= a.n) return;
    const float2 *own = a.moments + row * parts;
    float sum = 0.0f, sq = 0.0f;
    for (int i = 0; i < parts; i++)
        sum = fmaf((float)min(PRODUCT_COLS, a.in - i * PRODUCT_COLS), own[i].x, sum);
    float mean = sum / (float)a.in;
    for (int i = 0; i < parts; i++) {
        float d = own[i].x - mean;
        sq += fmaf((float)min(PRODUCT_COLS, a.in - i * PRODUCT_COLS) * d, d, own[i].y);
    }
    float rstd = 1.0f / sqrtf(sq / (float)a.in + a.eps);
    a.rows[row] = make_float2(a.by * rstd, -mean * (a.by * rstd));
}

/* Over PART_LANES neighbours, for each of them. */
static __device__ __forceinline__ float part_sum(float x)
{
#pragma unroll
    for (int o = PART_LANES / 2; o; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

/* moments of x (n, c): PART_LANES threads for each part of a row. */
static __global__ __launch_bounds__(THREADS) void moments_kernel(int64_t n, int c,
                                                                 const bf16 *__restrict__ x,
                                                                 float2 *__restrict__ moments)
{
    constexpr int PACKS = PRODUCT_COLS / 8 / PART_LANES;
    int parts = (c + PRODUCT_COLS - 1) / PRODUCT_COLS, lane = threadIdx.x % PART_LANES;
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / PART_LANES, row = i / parts;
    if (i >= n * parts) row = 0; /* all of a warp's threads stay for its sums */
    int first = (int)(i % parts) * PRODUCT_COLS, width = min(PRODUCT_COLS, c - first);
    pack<bf16, 8> p[PACKS];
    float sum = 0.0f, sq = 0.0f;
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        int at = 8 * (lane + k * PART_LANES);
        p[k] = at < width ? load_pack<bf16, 8>(x + row * c + first + at) : zero_pack<bf16, 8>();
    }
#pragma unroll
    for (int k = 0; k < PACKS; k++)
#pragma unroll
        for (int j = 0; j < 8; j++) sum += element(p[k], j);
    float mean = part_sum(sum) / (float)width;
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        if (8 * (lane + k * PART_LANES) >= width) continue;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float d = element(p[k], j) - mean;
            sq = fmaf(d, d, sq);
        }
    }
    sq = part_sum(sq);
    if (lane == 0 && i < n * parts) moments[i] = make_float2(mean, sq);
}

int64_t srf__moments_count(const struct srf_ctx *ctx, int64_t n, int64_t c)
{
    bool many = ctx->dtype == SRF_BF16 && n >= MANY_ROWS && c % 8 == 0;
    if (!many || !srf__product_here(ctx, PRODUCT_NORM)) return 0;
    return n * div_up(c, PRODUCT_COLS) * 2;
}

srf_status srf__moments(struct srf_ctx *ctx, int64_t n, int64_t c, const void *x, void *moments)
{
    int64_t grid = div_up(n * div_up(c, PRODUCT_COLS) * PART_LANES, THREADS);
    SRF_FAIL_IF(grid > INT32_MAX, SRF_INVALID, "moments of (%lld, %lld): too many", (long long)n,
                (long long)c);
    moments_kernel<<<(unsigned)grid, THREADS, 0, stream_of(ctx)>>>(n, (int)c, (const bf16 *)x,
                                                                   (float2 *)moments);
    return srf__cuda_launched("moments");
}

struct places {
    bf16 *folded;
    float *columns, *moments, *rows;
    size_t bytes; /* of the workspace */
};

static struct places places_in(const struct srf_norm_linear_fwd_args *a, void *workspace)
{
    struct cuda_bump b = {(char *)workspace, 0};
    struct places p;
    int64_t columns = div_up(a->out, PRODUCT_COLS) * PRODUCT_COLS; /* whole tiles read */
    size_t moments = a->moments ? 0 : (size_t)(a->n * div_up(a->in, PRODUCT_COLS)) * sizeof(float2);
    p.folded = (bf16 *)bump_bytes(&b, (size_t)(a->in * a->out) * sizeof(bf16));
    p.columns = (float *)bump_bytes(&b, (size_t)columns * 2 * sizeof(float));
    p.rows = (float *)bump_bytes(&b, (size_t)a->n * sizeof(float2));
    p.moments = (float *)bump_bytes(&b, moments);
    p.bytes = b.used;
    return p;
}

extern "C" srf_status cuda_norm_linear_fwd(struct srf_ctx *ctx,
                                           const struct srf_norm_linear_fwd_args *a)
{
    if (a->n == 0 || a->in == 0 || a->out == 0) return SRF_OK;
    struct places at = places_in(a, ctx->workspace);
    struct wgmma_product p = {};
    p.end = a->act == SRF_ACT_NONE ? PRODUCT_NORM : PRODUCT_NORM_GELU;
    p.m = a->n, p.n = a->out, p.k = a->in;
    p.a = a->x, p.b = at.folded, p.y = a->y;
    p.ld = a->ld ? a->ld : a->out;
    p.rows = at.rows, p.columns = at.columns;
    bool fold = srf__moments_count(ctx, a->n, a->in) > 0 && is_aligned(a->w, 16) && p.ld % 8 == 0;
    if (!fold || !srf__product_takes(ctx, &p)) return srf__norm_linear_one_by_one(ctx, a);
    struct fold_args f = {};
    f.n = a->n, f.ld = p.ld, f.in = (int)a->in, f.out = (int)a->out, f.eps = (float)a->eps;
    f.by = p.end == PRODUCT_NORM_GELU ? 0.5f : 1.0f;
    f.strips = (int)div_up(a->out, FOLD_COLS);
    f.w = (const bf16 *)a->w, f.b = (const bf16 *)a->b;
    f.gamma = (const bf16 *)a->gamma, f.beta = (const bf16 *)a->beta;
    f.moments = (const float2 *)(a->moments ? a->moments : at.moments);
    f.folded = at.folded, f.columns = at.columns, f.rows = (float2 *)at.rows;
    if (!a->moments) SRF_TRY(srf__moments(ctx, a->n, a->in, a->x, at.moments));
    struct chain_shape shape = {dim3((unsigned)(f.strips + div_up(a->n, THREADS))), THREADS, 0, 1};
    chain_launch(ctx, shape, fold_kernel, f);
    return srf__product(ctx, &p);
}

extern "C" size_t cuda_norm_linear_fwd_workspace(const struct srf_ctx *ctx,
                                                 const struct srf_norm_linear_fwd_args *a)
{
    size_t one_by_one = srf__norm_linear_one_by_one_workspace(ctx, a);
    size_t own = srf__moments_count(ctx, a->n, a->in) > 0 ? places_in(a, NULL).bytes : 0;
    return own > one_by_one ? own : one_by_one;
}
