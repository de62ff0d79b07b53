/* Linear layers of a few rows, as in decoding: y = act(x W + b) for up to 4 rows.
 *
 * The work is to read W; a matrix product in tiles would leave most of the card idle. Each thread
 * multiplies a pack of W, 16 bytes, with the elements of x that belong to it, in fp32.
 *     W (in, out)   a block has a strip of columns, its threads take turns at the rows of W; their
 *                   sums meet by shuffles and in shared memory, in a fixed order
 *     W^T (out, in) one row only, a product is faster from two on: a warp has four rows of W^T, its
 *                   lanes take turns along them
 * Floor: memory; W is read once. */
#include "kernels/cuda/gelu.h"
#include "kernels/cuda/linear.h"

#define THREADS 256
#define WARPS   (THREADS / 32)
#define UNROLL  4 /* loads of W that a thread has under way */
#define OUTPUTS 4 /* of a warp at once, where W is transposed */

template <typename T> struct few {
    int n;
    int64_t in, out;
    const T *x, *w, *b, *residual;
    bool act;
    T *pre, *y;
};

template <typename T>
static __device__ __forceinline__ void finish(const struct few<T> *a, int row, int64_t column,
                                              float u)
{
    int64_t at = row * a->out + column;
    if (a->b) u += to_float(a->b[column]);
    if (a->residual) u += to_float(a->residual[at]);
    if (a->pre) a->pre[at] = from_float<T>(u);
    a->y[at] = from_float<T>(a->act ? gelu(u) : u);
}

/* N >= n rows; STRIP lanes lie side by side along a row of W. */
template <typename T, int N, int STRIP>
static __global__ __launch_bounds__(THREADS) void few_kernel(const struct few<T> a)
{
    constexpr int P = PACK(T), COLUMNS = STRIP * P, GROUPS = 32 / STRIP;
    __shared__ float sums[WARPS][N][COLUMNS];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int64_t column = (int64_t)blockIdx.x * COLUMNS + lane % STRIP * P;
    float sum[N][P] = {};
    if (column < a.out) {
        int64_t step = WARPS * GROUPS;
        for (int64_t i = warp * GROUPS + lane / STRIP; i < a.in; i += UNROLL * step) {
            pack<T, P> w[UNROLL];
#pragma unroll
            for (int k = 0; k < UNROLL; k++) {
                int64_t at = i + k * step;
                w[k] = at < a.in ? load_pack<T, P>(a.w + at * a.out + column) : zero_pack<T, P>();
            }
#pragma unroll
            for (int k = 0; k < UNROLL; k++)
#pragma unroll
                for (int r = 0; r < N; r++) {
                    int64_t at = i + k * step;
                    float x = r < a.n && at < a.in ? to_float(a.x[r * a.in + at]) : 0.0f;
#pragma unroll
                    for (int j = 0; j < P; j++) sum[r][j] = fmaf(x, element(w[k], j), sum[r][j]);
                }
        }
    }
#pragma unroll
    for (int r = 0; r < N; r++)
#pragma unroll
        for (int j = 0; j < P; j++) {
#pragma unroll
            for (int o = 16; o >= STRIP; o >>= 1)
                sum[r][j] += __shfl_xor_sync(0xffffffffu, sum[r][j], o);
            if (lane < STRIP) sums[warp][r][lane * P + j] = sum[r][j];
        }
    __syncthreads();
    for (int k = threadIdx.x; k < a.n * COLUMNS; k += THREADS) {
        int row = k / COLUMNS;
        int64_t at = (int64_t)blockIdx.x * COLUMNS + k % COLUMNS;
        if (at >= a.out) continue;
        float u = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) u += sums[w][row][k % COLUMNS];
        finish(&a, row, at, u);
    }
}

/* One row; w (out, in). */
template <typename T>
static __global__ __launch_bounds__(THREADS) void one_transposed_kernel(const struct few<T> a)
{
    constexpr int P = PACK(T);
    int lane = threadIdx.x & 31;
    int64_t first = ((int64_t)blockIdx.x * WARPS + (threadIdx.x >> 5)) * OUTPUTS;
    float sum[OUTPUTS] = {};
    for (int64_t i = lane * P; i < a.in; i += 32 * P) {
        pack<T, P> w[OUTPUTS], x = load_pack<T, P>(a.x + i);
#pragma unroll
        for (int k = 0; k < OUTPUTS; k++)
            w[k] = first + k < a.out ? load_pack<T, P>(a.w + (first + k) * a.in + i)
                                     : zero_pack<T, P>();
#pragma unroll
        for (int k = 0; k < OUTPUTS; k++)
#pragma unroll
            for (int j = 0; j < P; j++) sum[k] = fmaf(element(x, j), element(w[k], j), sum[k]);
    }
#pragma unroll
    for (int k = 0; k < OUTPUTS; k++) {
        float u = warp_sum(sum[k]);
        if (lane == k && first + k < a.out) finish(&a, 0, first + k, u);
    }
}

template <typename T, int N> static void launch(struct srf_ctx *ctx, const struct few<T> *a)
{
    int64_t packs = a->out / PACK(T);
    if (packs >= 4 * cuda_of(ctx)->n_sm) /* wide strips where they make blocks enough */
        few_kernel<T, N, 4><<<(unsigned)div_up(packs, 4), THREADS, 0, stream_of(ctx)>>>(*a);
    else
        few_kernel<T, N, 2><<<(unsigned)div_up(packs, 2), THREADS, 0, stream_of(ctx)>>>(*a);
}

template <typename T> static bool few_fwd(struct srf_ctx *ctx, const struct srf_linear_fwd_args *a)
{
    bool trans = a->w_transposed;
    int64_t width = trans ? a->in : a->out;
    if (a->n > (trans ? 1 : LINEAR_FEW_ROWS) || width % PACK(T) != 0) return false;
    if (!is_aligned(a->w, 16) || (trans && !is_aligned(a->x, 16))) return false;
    struct few<T> p = {
    };
    p.n = (int)a->n, p.in = a->in, p.out = a->out;
    p.x = (const T *)a->x, p.w = (const T *)a->w, p.b = (const T *)a->b;
    p.residual = (const T *)a->residual;
    p.act = a->act != SRF_ACT_NONE;
    p.pre = p.act ? (T *)a->pre : NULL, p.y = (T *)a->y;
    if (trans) {
        unsigned grid = (unsigned)div_up(a->out, WARPS * OUTPUTS);
        one_transposed_kernel<T><<<grid, THREADS, 0, stream_of(ctx)>>>(p);
    } else if (a->n == 1)
        launch<T, 1>(ctx, &p);
    else
        launch<T, LINEAR_FEW_ROWS>(ctx, &p);
    return true;
}

bool srf__linear_few_fwd(struct srf_ctx *ctx, const struct srf_linear_fwd_args *a)
{
    return ctx->dtype == SRF_BF16 ? few_fwd<bf16>(ctx, a) : few_fwd<float>(ctx, a);
}
