/* Linear layers of a few rows, as in decoding: y = act(x W + b) for up to 4 rows.
 *
 * The work is to read W; a matrix product in tiles would leave most of the card idle. Each thread
 * multiplies a pack of W, 16 bytes, with the elements of x that belong to it, in fp32.
 *     W (in, out)   a block has a strip of columns, its threads take turns at the rows of W; their
 *                   sums meet by shuffles and in shared memory, in a fixed order. Where strips make
 *                   too few blocks, those of a cluster share the rows, and the first adds up
 *     W^T (out, in) one row only, a product is faster from two on: a warp has four rows of W^T, its
 *                   lanes take turns along them
 * What a thread reads of W first is on its way before the kernel in front is done (chain.h).
 * Floor: memory; W is read once. */
#include "kernels/cuda/chain.h"
#include "kernels/cuda/linear.h"

#define THREADS 256
#define WARPS   (THREADS / 32)
#define UNROLL  6   /* loads of W that a thread has under way */
#define OUTPUTS 4   /* of a warp at once, where W is transposed */
#define ROWS    128 /* of W for a block, at least */

/* Packs of W at rows i, i + step, ... below `end`. */
template <typename T>
static __device__ __forceinline__ void load_rows(pack<T, PACK(T)> w[UNROLL], const T *column,
                                                 int64_t ld, int64_t i, int64_t step, int64_t end)
{
#pragma unroll
    for (int k = 0; k < UNROLL; k++) {
        int64_t at = i + k * step;
        w[k] = at < end ? load_pack<T, PACK(T)>(column + at * ld) : zero_pack<T, PACK(T)>();
    }
}

/* N >= n rows; STRIP lanes lie side by side along a row of W. Blocks of a cluster, one for each y
 * of the grid, have gridDim.y pieces of the rows. */
template <typename T, int N, int STRIP>
static __global__ __launch_bounds__(THREADS) void few_kernel(const struct linear_rows<T> a)
{
    constexpr int P = PACK(T), COLUMNS = STRIP * P, GROUPS = 32 / STRIP;
    __shared__ float sums[WARPS][N][COLUMNS];
    __shared__ float all[N][COLUMNS];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int64_t column = (int64_t)blockIdx.x * COLUMNS + lane % STRIP * P;
    int64_t piece = (a.in + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * piece;
    int64_t end = column < a.out ? min(begin + piece, a.in) : 0;
    int64_t i = begin + warp * GROUPS + lane / STRIP, step = WARPS * GROUPS;
    pack<T, P> w[UNROLL];
    float sum[N][P] = {};
    chain_next();
    load_rows<T>(w, a.w + column, a.out, i, step, end);
    chain_wait();
    while (i < end) {
#pragma unroll
        for (int k = 0; k < UNROLL; k++)
#pragma unroll
            for (int r = 0; r < N; r++) {
                int64_t at = i + k * step;
                float x = r < a.n && at < end ? to_float(a.x[r * a.in + at]) : 0.0f;
#pragma unroll
                for (int j = 0; j < P; j++) sum[r][j] = fmaf(x, element(w[k], j), sum[r][j]);
            }
        i += UNROLL * step;
        if (i < end) load_rows<T>(w, a.w + column, a.out, i, step, end);
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
    int k = threadIdx.x, row = k / COLUMNS;
    int64_t at = (int64_t)blockIdx.x * COLUMNS + k % COLUMNS;
    bool mine = k < a.n * COLUMNS && at < a.out;
    float u = 0.0f;
    if (mine)
#pragma unroll
        for (int v = 0; v < WARPS; v++) u += sums[v][row][k % COLUMNS];
    if (gridDim.y > 1) {
        if (mine) all[row][k % COLUMNS] = u;
        cluster_sync();
        if (mine && blockIdx.y == 0)
            for (unsigned rank = 1; rank < gridDim.y; rank++)
                u += cluster_load(&all[row][k % COLUMNS], rank);
        cluster_sync(); /* the others stay until they are read */
    }
    if (mine && blockIdx.y == 0) linear_finish(&a, row, at, u);
}

/* Packs at element i of rows first, first + 1, ... of w (out, in). */
template <typename T>
static __device__ __forceinline__ void load_outputs(pack<T, PACK(T)> to[OUTPUTS], const T *w,
                                                    int64_t out, int64_t in, int64_t first,
                                                    int64_t i)
{
#pragma unroll
    for (int k = 0; k < OUTPUTS; k++)
        to[k] = first + k < out && i < in ? load_pack<T, PACK(T)>(w + (first + k) * in + i)
                                          : zero_pack<T, PACK(T)>();
}

/* One row; w (out, in). */
template <typename T>
static __global__
__launch_bounds__(THREADS) void one_transposed_kernel(const struct linear_rows<T> a)
{
    constexpr int P = PACK(T);
    int lane = threadIdx.x & 31;
    int64_t first = ((int64_t)blockIdx.x * WARPS + (threadIdx.x >> 5)) * OUTPUTS;
    float sum[OUTPUTS] = {};
    pack<T, P> w[OUTPUTS];
    int64_t i = lane * P;
    chain_next();
    load_outputs<T>(w, a.w, a.out, a.in, first, i);
    chain_wait();
    while (i < a.in) {
        pack<T, P> x = load_pack<T, P>(a.x + i), now[OUTPUTS];
#pragma unroll
        for (int k = 0; k < OUTPUTS; k++) now[k] = w[k];
        i += 32 * P;
        load_outputs<T>(w, a.w, a.out, a.in, first, i);
#pragma unroll
        for (int k = 0; k < OUTPUTS; k++)
#pragma unroll
            for (int j = 0; j < P; j++) sum[k] = fmaf(element(x, j), element(now[k], j), sum[k]);
    }
#pragma unroll
    for (int k = 0; k < OUTPUTS; k++) {
        float u = warp_sum(sum[k]);
        if (lane == k && first + k < a.out) linear_finish(&a, 0, first + k, u);
    }
}

/* Blocks of a cluster: enough to fill the card, each with rows enough. */
static unsigned pieces(const struct srf_ctx *ctx, int64_t strips, int64_t in)
{
    unsigned n = 1;
    if (cuda_of(ctx)->cc < 90) return n;
    while (n < 8 && strips * n < cuda_of(ctx)->n_sm && in >= 2 * n * ROWS) n *= 2;
    return n;
}

template <typename T, int N> static void launch(struct srf_ctx *ctx, const struct linear_rows<T> *a)
{
    int64_t packs = a->out / PACK(T);
    bool wide = packs >= 4 * cuda_of(ctx)->n_sm; /* wide strips where they make blocks enough */
    int64_t strips = div_up(packs, wide ? 4 : 2);
    unsigned n = pieces(ctx, strips, a->in);
    const struct chain_shape shape = {dim3((unsigned)strips, n), THREADS, 0, n};
    chain_launch(ctx, shape, wide ? few_kernel<T, N, 4> : few_kernel<T, N, 2>, *a);
}

template <typename T> static bool few_fwd(struct srf_ctx *ctx, const struct srf_linear_fwd_args *a)
{
    bool trans = a->w_transposed;
    int64_t width = trans ? a->in : a->out;
    if (a->n > (trans ? 1 : LINEAR_FEW_ROWS) || width % PACK(T) != 0) return false;
    if (!is_aligned(a->w, 16) || (trans && !is_aligned(a->x, 16))) return false;
    struct linear_rows<T> p = linear_rows_of<T>(a);
    if (trans) {
        unsigned grid = (unsigned)div_up(a->out, WARPS * OUTPUTS);
        chain_launch(ctx, {dim3(grid), THREADS, 0, 1}, one_transposed_kernel<T>, p);
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
