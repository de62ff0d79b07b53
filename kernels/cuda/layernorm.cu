/* Layer norm over the last dimension.
 *
 *     forward    xhat = (x - mean) rstd,  y = xhat gamma + beta,  rstd = 1 / sqrt(var + eps)
 *     backward   g = dy gamma;  dx += rstd (g - mean(g) - xhat mean(g xhat))
 *                dgamma += sum_n dy xhat,  dbeta += sum_n dy,  dx_sum += sum_n dx
 *
 * A row is held in the registers of a warp (up to 1024 bf16) or of a block of 128 threads (up to
 * 4096), 16 bytes a load; the variance is the mean of (x - mean)^2, from registers, so a large mean
 * costs no precision. Warps and blocks stay and go from row to row: gamma and beta are loaded once,
 * the next row is on its way while they work on this one, and backward keeps the sums over rows in
 * registers. Each block leaves its sums in the workspace, and those are added in order. The last
 * rows come first: they are what the product before has left in the L2 cache, and the product
 * behind begins with the first. Rows that are longer, or not in 16-byte pieces, go through kernels
 * that read a row several times.
 * Floor: memory; forward reads x and writes y, backward reads x and dy and updates dx, and writes y
 * where that is wanted. */
#include "kernels/cuda/chain.h"
#include "kernels/cuda/dense.h"

#define THREADS  128
#define MAX_PACK 4 /* packs of a row that a thread holds */

/* Blocks of a multiprocessor, all resident, as far as rows of np packs a thread leave registers. */
static constexpr int fwd_blocks(int np)
{
    return np < 3 ? 6 : np < 4 ? 5 : 3;
}
static constexpr int bwd_blocks(int np)
{
    return np < 3 ? 4 : np < 4 ? 3 : 2;
}

/* ---- rows in registers ---------------------------------------------------------------------- */

/* Thread `lane` of the LANES that share a row of `packs` packs holds packs lane + LANES i, i < NP;
 * zeros past the end. */
template <typename T, int LANES, int NP>
static __device__ __forceinline__ void load_row(pack<T, PACK(T)> to[NP], const T *row, int lane,
                                                int packs)
{
#pragma unroll
    for (int i = 0; i < NP; i++) {
        int at = lane + LANES * i;
        to[i] = at < packs ? load_pack<T, PACK(T)>(row + at * PACK(T)) : zero_pack<T, PACK(T)>();
    }
}

/* The same for later: a thread's packs are on their way to its own places in shared memory. */
template <typename T, int LANES, int NP>
static __device__ __forceinline__ void send_for(pack<T, PACK(T)> *to, const T *row, int lane,
                                                int packs)
{
#pragma unroll
    for (int i = 0; i < NP; i++) {
        int at = lane + LANES * i;
        bool there = at < packs;
        cp_async_16(smem_addr(to + i * THREADS + threadIdx.x), row + (there ? at : 0) * PACK(T),
                    there);
    }
}

/* The last of rows row, row + step, ... below n; row itself where it is not below n. */
static __device__ __forceinline__ int64_t last_row(int64_t row, int64_t step, int64_t n)
{
    return row < n ? row + (n - 1 - row) / step * step : row;
}

/* Sum over the LANES threads that share a row, for each of them. */
template <int LANES> static __device__ __forceinline__ float row_sum(float x, float *scratch)
{
    return LANES == 32 ? warp_sum(x) : block_sum(x, scratch);
}

template <typename T, int LANES, int NP>
static __global__ __launch_bounds__(THREADS, fwd_blocks(NP)) void fwd_kernel(
    int64_t n, int c, float eps, const T *__restrict__ x, const T *__restrict__ gamma,
    const T *__restrict__ beta, T *__restrict__ y, float *__restrict__ mean,
    float *__restrict__ rstd)
{
    constexpr int N = PACK(T), ROWS = THREADS / LANES;
    __shared__ float scratch[33];
    int lane = threadIdx.x % LANES, packs = c / N;
    int64_t step = (int64_t)gridDim.x * ROWS;
    int64_t row = last_row((int64_t)blockIdx.x * ROWS + threadIdx.x / LANES, step, n);
    pack<T, N> ga[NP], be[NP], next[NP];
    chain_next();
    load_row<T, LANES, NP>(ga, gamma, lane, packs);
    load_row<T, LANES, NP>(be, beta, lane, packs);
    chain_wait();
    if (row >= n) return;
    load_row<T, LANES, NP>(next, x + row * c, lane, packs);
    for (; row >= 0; row -= step) {
        pack<T, N> in[NP];
        float sum = 0.0f, sq = 0.0f;
#pragma unroll
        for (int i = 0; i < NP; i++) in[i] = next[i];
        if (row >= step) load_row<T, LANES, NP>(next, x + (row - step) * c, lane, packs);
#pragma unroll
        for (int i = 0; i < NP; i++)
#pragma unroll
            for (int j = 0; j < N; j++) sum += element(in[i], j);
        float mu = row_sum<LANES>(sum, scratch) / (float)c;
#pragma unroll
        for (int i = 0; i < NP; i++) {
            if (lane + LANES * i >= packs) continue;
#pragma unroll
            for (int j = 0; j < N; j++) {
                float d = element(in[i], j) - mu;
                sq = fmaf(d, d, sq);
            }
        }
        float rs = 1.0f / sqrtf(row_sum<LANES>(sq, scratch) / (float)c + eps);
#pragma unroll
        for (int i = 0; i < NP; i++) {
            int at = lane + LANES * i;
            if (at >= packs) continue;
            float out[N];
#pragma unroll
            for (int j = 0; j < N; j++)
                out[j] = fmaf((element(in[i], j) - mu) * rs, element(ga[i], j), element(be[i], j));
            round_to(&in[i], out);
            store_pack<T, N>(y + row * c + at * N, in[i]);
        }
        if (lane == 0) {
            mean[row] = mu;
            rstd[row] = rs;
        }
    }
}

/* parts (gridDim.x, n_sums c): each block's sums for dgamma, dbeta and, with n_sums 3, dx_sum. beta
 * and y: both or neither; y is computed as in forward, to the same bits. */
template <typename T, int LANES, int NP>
static __global__ __launch_bounds__(THREADS, bwd_blocks(NP)) void bwd_kernel(
    int64_t n, int c, const T *__restrict__ x, const T *__restrict__ gamma,
    const T *__restrict__ beta, const T *__restrict__ dy, const float *__restrict__ mean,
    const float *__restrict__ rstd, T *__restrict__ dx, T *__restrict__ y,
    float *__restrict__ parts, int n_sums)
{
    constexpr int N = PACK(T), ROWS = THREADS / LANES;
    __shared__ float scratch[33];
    __shared__ float sums[3][LANES == 32 ? LANES * NP * N : 1];
    __shared__ pack<T, N> ring[2][2][NP * THREADS]; /* x and dy of this row and of the next */
    int lane = threadIdx.x % LANES, packs = c / N, group = threadIdx.x / LANES;
    int64_t step = (int64_t)gridDim.x * ROWS;
    int64_t row = last_row((int64_t)blockIdx.x * ROWS + group, step, n);
    float dga[NP][N] = {}, dbe[NP][N] = {}, dxs[NP][N] = {}, next_mu = 0.0f, next_rs = 0.0f;
    pack<T, N> ga[NP];
    int slot = 0;
    load_row<T, LANES, NP>(ga, gamma, lane, packs);
    if (row < n) {
        send_for<T, LANES, NP>(ring[0][0], x + row * c, lane, packs);
        send_for<T, LANES, NP>(ring[0][1], dy + row * c, lane, packs);
        next_mu = mean[row], next_rs = rstd[row];
    }
    cp_async_commit();
    for (; row >= 0 && row < n; row -= step, slot ^= 1) {
        pack<T, N> d_in[NP];
        const pack<T, N> *in = ring[slot][0] + threadIdx.x, *d_out = ring[slot][1] + threadIdx.x;
        float mu = next_mu, rs = next_rs, sum_g = 0.0f, sum_gx = 0.0f;
        load_row<T, LANES, NP>(d_in, dx + row * c, lane, packs);
        if (row >= step) {
            send_for<T, LANES, NP>(ring[slot ^ 1][0], x + (row - step) * c, lane, packs);
            send_for<T, LANES, NP>(ring[slot ^ 1][1], dy + (row - step) * c, lane, packs);
            next_mu = mean[row - step], next_rs = rstd[row - step];
        }
        cp_async_commit();
        cp_async_wait<1>();
#pragma unroll
        for (int i = 0; i < NP; i++) {
            pack<T, N> px = in[i * THREADS], pd = d_out[i * THREADS];
#pragma unroll
            for (int j = 0; j < N; j++) {
                float xhat = (element(px, j) - mu) * rs, d = element(pd, j);
                float g = d * element(ga[i], j);
                sum_g += g;
                sum_gx = fmaf(g, xhat, sum_gx);
                dga[i][j] = fmaf(d, xhat, dga[i][j]);
                dbe[i][j] += d;
            }
        }
        float mean_g = row_sum<LANES>(sum_g, scratch) / (float)c;
        float mean_gx = row_sum<LANES>(sum_gx, scratch) / (float)c;
        asm volatile("" ::: "memory"); /* the row again: there is no room to keep it */
#pragma unroll
        for (int i = 0; i < NP; i++) {
            int at = lane + LANES * i;
            if (at >= packs) continue;
            pack<T, N> px = in[i * THREADS], pd = d_out[i * THREADS];
            float sum[N];
#pragma unroll
            for (int j = 0; j < N; j++) {
                float xhat = (element(px, j) - mu) * rs;
                float g = element(pd, j) * element(ga[i], j);
                float d = g - mean_g - xhat * mean_gx;
                sum[j] = fmaf(rs, d, element(d_in[i], j));
            }
            round_to(&d_in[i], sum);
            store_pack<T, N>(dx + row * c + at * N, d_in[i]);
#pragma unroll
            for (int j = 0; j < N; j++) dxs[i][j] += element(d_in[i], j);
            if (!y) continue;
            pack<T, N> be = load_pack<T, N>(beta + at * N); /* from L1: no registers to keep it */
#pragma unroll
            for (int j = 0; j < N; j++)
                sum[j] = fmaf((element(px, j) - mu) * rs, element(ga[i], j), element(be, j));
            round_to(&px, sum);
            store_pack<T, N>(y + row * c + at * N, px);
        }
    }
    /* the block's warps add their sums one after the other */
    float *to = parts + (int64_t)blockIdx.x * n_sums * c;
    for (int turn = 0; turn < ROWS; turn++) {
        if (turn == group) {
#pragma unroll
            for (int i = 0; i < NP; i++) {
                int at = lane + LANES * i;
                if (at >= packs) continue;
#pragma unroll
                for (int j = 0; j < N; j++) {
                    int k = at * N + j;
                    if (LANES == 32 && turn > 0) {
                        dga[i][j] += sums[0][k];
                        dbe[i][j] += sums[1][k];
                        dxs[i][j] += sums[2][k];
                    }
                    if (turn + 1 < ROWS) {
                        sums[0][k] = dga[i][j];
                        sums[1][k] = dbe[i][j];
                        sums[2][k] = dxs[i][j];
                    } else {
                        to[k] = dga[i][j];
                        to[c + k] = dbe[i][j];
                        if (n_sums > 2) to[2 * c + k] = dxs[i][j];
                    }
                }
            }
        }
        __syncthreads();
    }
}

/* ---- rows of any length, element by element -------------------------------------------------- */

template <typename T>
static __global__
__launch_bounds__(THREADS) void any_fwd_kernel(int64_t n, int64_t c, float eps,
                                               const T *__restrict__ x, const T *__restrict__ gamma,
                                               const T *__restrict__ beta, T *__restrict__ y,
                                               float *__restrict__ mean, float *__restrict__ rstd)
{
    __shared__ float scratch[33];
    for (int64_t row = blockIdx.x; row < n; row += gridDim.x) {
        const T *in = x + row * c;
        float sum = 0.0f, sq = 0.0f;
        for (int64_t j = threadIdx.x; j < c; j += THREADS) sum += to_float(in[j]);
        float mu = block_sum(sum, scratch) / (float)c;
        for (int64_t j = threadIdx.x; j < c; j += THREADS) {
            float d = to_float(in[j]) - mu;
            sq = fmaf(d, d, sq);
        }
        float rs = 1.0f / sqrtf(block_sum(sq, scratch) / (float)c + eps);
        for (int64_t j = threadIdx.x; j < c; j += THREADS)
            y[row * c + j] = from_float<T>(
                fmaf((to_float(in[j]) - mu) * rs, to_float(gamma[j]), to_float(beta[j])));
        if (threadIdx.x == 0) {
            mean[row] = mu;
            rstd[row] = rs;
        }
    }
}

template <typename T>
static __global__ __launch_bounds__(THREADS) void any_dx_kernel(
    int64_t n, int64_t c, const T *__restrict__ x, const T *__restrict__ gamma,
    const T *__restrict__ beta, const T *__restrict__ dy, const float *__restrict__ mean,
    const float *__restrict__ rstd, T *__restrict__ dx, T *__restrict__ y)
{
    __shared__ float scratch[33];
    for (int64_t row = blockIdx.x; row < n; row += gridDim.x) {
        const T *in = x + row * c, *d_out = dy + row * c;
        T *d_in = dx + row * c;
        float mu = mean[row], rs = rstd[row], sum_g = 0.0f, sum_gx = 0.0f;
        for (int64_t j = threadIdx.x; j < c; j += THREADS) {
            float g = to_float(d_out[j]) * to_float(gamma[j]);
            sum_g += g;
            sum_gx = fmaf(g, (to_float(in[j]) - mu) * rs, sum_gx);
        }
        float mean_g = block_sum(sum_g, scratch) / (float)c;
        float mean_gx = block_sum(sum_gx, scratch) / (float)c;
        for (int64_t j = threadIdx.x; j < c; j += THREADS) {
            float xhat = (to_float(in[j]) - mu) * rs;
            float d = to_float(d_out[j]) * to_float(gamma[j]) - mean_g - xhat * mean_gx;
            d_in[j] = from_float<T>(fmaf(rs, d, to_float(d_in[j])));
            if (y)
                y[row * c + j] = from_float<T>(fmaf(xhat, to_float(gamma[j]), to_float(beta[j])));
        }
    }
}

/* A thread has a column; blockIdx.y tells which rows. Runs after any_dx_kernel, for the new dx. */
template <typename T>
static __global__ __launch_bounds__(THREADS) void any_columns_kernel(
    int64_t n, int64_t c, const T *__restrict__ x, const T *__restrict__ dy,
    const float *__restrict__ mean, const float *__restrict__ rstd, const T *__restrict__ dx,
    float *__restrict__ parts, int n_sums)
{
    int64_t j = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (j >= c) return;
    float dga = 0.0f, dbe = 0.0f, dxs = 0.0f;
    for (int64_t row = blockIdx.y; row < n; row += gridDim.y) {
        float d = to_float(dy[row * c + j]);
        dga = fmaf(d, (to_float(x[row * c + j]) - mean[row]) * rstd[row], dga);
        dbe += d;
        if (n_sums > 2) dxs += to_float(dx[row * c + j]);
    }
    float *to = parts + (int64_t)blockIdx.y * n_sums * c + j;
    to[0] = dga;
    to[c] = dbe;
    if (n_sums > 2) to[2 * c] = dxs;
}

/* ---- launches -------------------------------------------------------------------------------- */

template <typename T, int LANES, int NP>
static void launch_fwd(struct srf_ctx *ctx, const struct srf_layernorm_fwd_args *a)
{
    unsigned grid = grid_for(ctx, a->n, THREADS / LANES, fwd_blocks(NP));
    chain_launch(ctx, {dim3(grid), THREADS, 0, 1}, fwd_kernel<T, LANES, NP>, a->n, (int)a->c,
                 (float)a->eps, (const T *)a->x, (const T *)a->gamma, (const T *)a->beta, (T *)a->y,
                 (float *)a->mean, (float *)a->rstd);
}

template <typename T> static void fwd(struct srf_ctx *ctx, const struct srf_layernorm_fwd_args *a)
{
    int64_t packs = a->c / PACK(T);
    bool aligned = a->c % PACK(T) == 0 && is_aligned(a->x, 16) && is_aligned(a->y, 16) &&
                   is_aligned(a->gamma, 16) && is_aligned(a->beta, 16);
    if (!aligned || packs > THREADS * MAX_PACK) {
        unsigned grid = grid_for(ctx, a->n, 1, 8);
        any_fwd_kernel<T><<<grid, THREADS, 0, stream_of(ctx)>>>(
            a->n, a->c, (float)a->eps, (const T *)a->x, (const T *)a->gamma, (const T *)a->beta,
            (T *)a->y, (float *)a->mean, (float *)a->rstd);
    } else if (packs > 2 * THREADS)
        launch_fwd<T, THREADS, 4>(ctx, a);
    else if (packs > THREADS)
        launch_fwd<T, THREADS, 2>(ctx, a);
    else if (packs > 96)
        launch_fwd<T, 32, 4>(ctx, a);
    else if (packs > 64)
        launch_fwd<T, 32, 3>(ctx, a);
    else if (packs > 32)
        launch_fwd<T, 32, 2>(ctx, a);
    else
        launch_fwd<T, 32, 1>(ctx, a);
}

extern "C" srf_status cuda_layernorm_fwd(struct srf_ctx *ctx,
                                         const struct srf_layernorm_fwd_args *a)
{
    if (a->n == 0 || a->c == 0) return SRF_OK;
    if (ctx->dtype == SRF_BF16)
        fwd<bf16>(ctx, a);
    else
        fwd<float>(ctx, a);
    return srf__cuda_launched("layernorm_fwd");
}

extern "C" size_t cuda_layernorm_fwd_workspace(const struct srf_ctx *,
                                               const struct srf_layernorm_fwd_args *)
{
    return 0;
}

static int n_sums(const struct srf_layernorm_bwd_args *a)
{
    return a->dx_sum ? 3 : 2;
}

/* Returns the number of parts. */
template <typename T, int LANES, int NP>
static unsigned launch_bwd(struct srf_ctx *ctx, const struct srf_layernorm_bwd_args *a)
{
    unsigned grid = grid_for(ctx, a->n, THREADS / LANES, bwd_blocks(NP));
    bwd_kernel<T, LANES, NP><<<grid, THREADS, 0, stream_of(ctx)>>>(
        a->n, (int)a->c, (const T *)a->x, (const T *)a->gamma, (const T *)a->beta, (const T *)a->dy,
        (const float *)a->mean, (const float *)a->rstd, (T *)a->dx, (T *)a->y,
        (float *)ctx->workspace, n_sums(a));
    return grid;
}

template <typename T>
static unsigned launch_any_bwd(struct srf_ctx *ctx, const struct srf_layernorm_bwd_args *a)
{
    const T *x = (const T *)a->x, *dy = (const T *)a->dy;
    const float *mean = (const float *)a->mean, *rstd = (const float *)a->rstd;
    any_dx_kernel<T><<<grid_for(ctx, a->n, 1, 8), THREADS, 0, stream_of(ctx)>>>(
        a->n, a->c, x, (const T *)a->gamma, (const T *)a->beta, dy, mean, rstd, (T *)a->dx,
        (T *)a->y);
    dim3 grid((unsigned)div_up(a->c, THREADS), grid_for(ctx, a->n, 1, bwd_blocks(1)));
    any_columns_kernel<T><<<grid, THREADS, 0, stream_of(ctx)>>>(
        a->n, a->c, x, dy, mean, rstd, (const T *)a->dx, (float *)ctx->workspace, n_sums(a));
    return grid.y;
}

template <typename T>
static unsigned bwd(struct srf_ctx *ctx, const struct srf_layernorm_bwd_args *a)
{
    int64_t packs = a->c / PACK(T);
    bool aligned = a->c % PACK(T) == 0 && is_aligned(a->x, 16) && is_aligned(a->gamma, 16) &&
                   is_aligned(a->dy, 16) && is_aligned(a->dx, 16) && is_aligned(a->beta, 16) &&
                   is_aligned(a->y, 16);
    if (!aligned || packs > THREADS * MAX_PACK) return launch_any_bwd<T>(ctx, a);
    if (packs > 2 * THREADS) return launch_bwd<T, THREADS, 4>(ctx, a);
    if (packs > THREADS) return launch_bwd<T, THREADS, 2>(ctx, a);
    if (packs > 96) return launch_bwd<T, 32, 4>(ctx, a);
    if (packs > 64) return launch_bwd<T, 32, 3>(ctx, a);
    if (packs > 32) return launch_bwd<T, 32, 2>(ctx, a);
    return launch_bwd<T, 32, 1>(ctx, a);
}

extern "C" srf_status cuda_layernorm_bwd(struct srf_ctx *ctx,
                                         const struct srf_layernorm_bwd_args *a)
{
    if (a->n == 0 || a->c == 0) return SRF_OK;
    unsigned parts = ctx->dtype == SRF_BF16 ? bwd<bf16>(ctx, a) : bwd<float>(ctx, a);
    srf__cuda_add_parts(ctx, (const float *)ctx->workspace, parts, a->c, (float *)a->dgamma,
                        (float *)a->dbeta, (float *)a->dx_sum);
    return srf__cuda_launched("layernorm_bwd");
}

extern "C" size_t cuda_layernorm_bwd_workspace(const struct srf_ctx *ctx,
                                               const struct srf_layernorm_bwd_args *a)
{
    return (size_t)grid_for(ctx, a->n, 1, bwd_blocks(1)) * (size_t)(n_sums(a) * a->c) *
           sizeof(float);
}
