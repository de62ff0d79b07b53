/* Attention with trained feature maps in plain fp32 arithmetic, for either dtype: softmax_attn_any
 * with two kinds of columns. A warp has R rows (queries; keys for dK, dV and the keys' features),
 * its lanes 32 columns at a time. Far columns of a query have weights f.g, near ones exp(q.k / sqrt
 * (d)); beside exact weights the far ones go through their logarithm, so that one online softmax
 * takes both. It only has to be right: for comparisons.
 */
#include "kernels/cuda/attn_any.h"
#include "kernels/cuda/map_attn.h"

/* Weight 0 in log scale: -inf would make NaN of a row that has seen nothing yet. What it leaves is
 * wiped when a row sees a key; beside a window each sees itself. */
#define UNSEEN -3e38f

/* Which rows of which head a block has: the most work first. */
static __device__ __forceinline__ void block_of(const struct map_attn *a, int rows, bool backwards,
                                                int *r0, int *head)
{
    int tiles = (a->t + rows - 1) / rows, tile = (int)blockIdx.x / a->heads;
    *head = (int)blockIdx.x % a->heads;
    *r0 = (backwards ? tiles - 1 - tile : tile) * rows;
}

template <typename T, int NJ, int R>
static __global__ __launch_bounds__(THREADS) void map_fwd_kernel(const struct map_attn a)
{
    constexpr int ROWS = WARPS * R;
    extern __shared__ __align__(16) float map_smem[];
    int n = row_floats(a.d), nf = row_floats(a.m), lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    float *rows = map_smem, *rows_f = rows + ROWS * n, *cols = rows_f + ROWS * nf;
    float *cols_f = cols + COLS * n, *values = cols_f + COLS * nf;
    int r0, head;
    block_of(&a, ROWS, true, &r0, &head);
    int w0 = r0 + warp * R, end = min(r0 + ROWS, a.t);
    int64_t in = map_head_at(&a, head, a.ld), at = (int64_t)head * a.t * a.m;
    load_rows(rows, (const T *)a.q + in + r0 * a.ld, a.ld, ROWS, a.t - r0, a.d);
    load_rows(rows_f, (const T *)a.fq + at + (int64_t)r0 * a.m, a.m, ROWS, a.t - r0, a.m);
    float top[R], sum[R], out[R][NJ], p[R], far[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        top[r] = a.window ? -INFINITY : 0.0f;
        sum[r] = 0.0f;
#pragma unroll
        for (int i = 0; i < NJ; i++) out[r][i] = 0.0f;
    }
    for (int c0 = 0; c0 < end; c0 += COLS) {
        int key = c0 + lane;
        bool has_far = c0<map_near(&a, end - 1), has_near = c0 + COLS> map_near(&a, r0);
        __syncthreads();
        if (has_near) load_rows(cols, (const T *)a.k + in + c0 * a.ld, a.ld, COLS, a.t - c0, a.d);
        if (has_far)
            load_rows(cols_f, (const T *)a.fk + at + (int64_t)c0 * a.m, a.m, COLS, a.t - c0, a.m);
        load_rows(values, (const T *)a.v + in + c0 * a.ld, a.ld, COLS, a.t - c0, a.d);
        __syncthreads();
        if (has_near) scores<R>(p, rows + warp * R * n, cols, a.d);
        if (has_far) scores<R>(far, rows_f + warp * R * nf, cols_f, a.m);
#pragma unroll
        for (int r = 0; r < R; r++) {
            int near = map_near(&a, w0 + r);
            bool seen = key <= w0 + r && key < a.t;
            if (a.window == 0) {
                p[r] = seen ? far[r] : 0.0f;
                sum[r] += p[r];
                continue;
            }
            float s = UNSEEN;
            if (seen && key >= near) s = p[r] * a.scale;
            if (seen && key < near && far[r] != 0.0f) s = logf(far[r]);
            float m = fmaxf(top[r], warp_max(s)), by = expf(top[r] - m);
            p[r] = expf(s - m);
            sum[r] = sum[r] * by + p[r];
            top[r] = m;
#pragma unroll
            for (int i = 0; i < NJ; i++) out[r][i] *= by;
        }
        mix<NJ, R>(out, p, values, a.d);
    }
    float by[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        float total = warp_sum(sum[r]) + (a.window ? 0.0f : MAP_EPS);
        by[r] = 1.0f / total;
        if (a.stat && lane == 0 && w0 + r < a.t)
            a.stat[(int64_t)head * a.t + w0 + r] = top[r] + logf(total);
    }
    store_rows<T, NJ, R>((T *)a.out + map_head_at(&a, head, a.ld_o) + w0 * a.ld_o, a.ld_o, out, by,
                         a.t - w0, a.d);
}

/* a.rows = (stat, d_o.o), a warp a query and head */
template <typename T>
static __global__ __launch_bounds__(THREADS) void map_rows_kernel(struct map_attn a)
{
    int64_t i = (int64_t)blockIdx.x * WARPS + (threadIdx.x >> 5);
    if (i >= (int64_t)a.heads * a.t) return;
    int64_t at = map_head_at(&a, (int)(i / a.t), a.ld_o) + i % a.t * a.ld_o;
    const T *o = (const T *)a.o + at, *d_o = (const T *)a.d_o + at;
    float x = 0.0f;
    for (int j = threadIdx.x & 31; j < a.d; j += 32) x = fmaf(to_float(o[j]), to_float(d_o[j]), x);
    x = warp_sum(x);
    if ((threadIdx.x & 31) == 0)
        a.rows[i / a.t * a.row_stride + i % a.t] = make_float2(a.stat[i], x);
}

/* KEYS: rows are keys, else queries. */
template <typename T, int NJ, int MJ, int R, bool KEYS>
static __global__ __launch_bounds__(THREADS) void map_bwd_kernel(const struct map_attn a)
{
    constexpr int ROWS = WARPS * R;
    extern __shared__ __align__(16) float map_smem[];
    int n = row_floats(a.d), nf = row_floats(a.m), lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    float *row_x = map_smem, *row_f = row_x + ROWS * n, *row_y = row_f + ROWS * nf;
    float *col_x = row_y + ROWS * n, *col_f = col_x + COLS * n, *col_y = col_f + COLS * nf;
    int r0, head;
    block_of(&a, ROWS, !KEYS, &r0, &head);
    int64_t in = map_head_at(&a, head, a.ld), at_o = map_head_at(&a, head, a.ld_o);
    int64_t at = (int64_t)head * a.t * a.m, ld_row = KEYS ? a.ld : a.ld_o;
    int64_t ld_col = KEYS ? a.ld_o : a.ld;
    const T *x_rows = (const T *)(KEYS ? a.k : a.q) + in, *f_rows = (const T *)(KEYS ? a.fk : a.fq);
    const T *x_cols = (const T *)(KEYS ? a.q : a.k) + in, *f_cols = (const T *)(KEYS ? a.fq : a.fk);
    const T *y_rows = KEYS ? (const T *)a.v + in : (const T *)a.d_o + at_o;
    const T *y_cols = KEYS ? (const T *)a.d_o + at_o : (const T *)a.v + in;
    const float2 *rows = a.rows + (int64_t)head * a.row_stride;
    int w0 = r0 + warp * R, row_end = min(r0 + ROWS, a.t);
    int first = KEYS ? r0 / COLS * COLS : 0, last = KEYS ? a.t : row_end;
    load_rows(row_x, x_rows + r0 * a.ld, a.ld, ROWS, a.t - r0, a.d);
    load_rows(row_f, f_rows + at + (int64_t)r0 * a.m, a.m, ROWS, a.t - r0, a.m);
    load_rows(row_y, y_rows + r0 * ld_row, ld_row, ROWS, a.t - r0, a.d);
    float acc_x[R][NJ], acc_f[R][MJ], acc_y[R][NJ]; /* acc_y: of dv */
    float2 own[R];                                  /* of the queries: rows */
#pragma unroll
    for (int r = 0; r < R; r++) {
        own[r] = !KEYS && w0 + r < a.t ? rows[w0 + r] : make_float2(0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < NJ; i++) acc_x[r][i] = acc_y[r][i] = 0.0f;
#pragma unroll
        for (int i = 0; i < MJ; i++) acc_f[r][i] = 0.0f;
    }
    for (int c0 = first; c0 < last; c0 += COLS) {
        int col = c0 + lane, col_end = min(c0 + COLS, a.t);
        /* The first and last queries and keys of the tile decide what is in it. */
        int q0 = KEYS ? c0 : r0, q1 = KEYS ? col_end : row_end, k0 = KEYS ? r0 : c0;
        int k1 = KEYS ? row_end : col_end;
        bool has_far = k0<map_near(&a, q1 - 1), has_near = k1> map_near(&a, q0);
        __syncthreads();
        if (has_near) load_rows(col_x, x_cols + c0 * a.ld, a.ld, COLS, a.t - c0, a.d);
        if (has_far) load_rows(col_f, f_cols + at + (int64_t)c0 * a.m, a.m, COLS, a.t - c0, a.m);
        load_rows(col_y, y_cols + c0 * ld_col, ld_col, COLS, a.t - c0, a.d);
        __syncthreads();
        float p[R], far[R], ds[R], ds_far[R];
        if (has_near) scores<R>(p, row_x + warp * R * n, col_x, a.d);
        if (has_far) scores<R>(far, row_f + warp * R * nf, col_f, a.m);
        scores<R>(ds, row_y + warp * R * n, col_y, a.d);
        float2 of_col = make_float2(0.0f, 0.0f);
        if (KEYS && col < a.t) of_col = rows[col];
#pragma unroll
        for (int r = 0; r < R; r++) {
            int query = KEYS ? col : w0 + r, key = KEYS ? w0 + r : col;
            float2 y = KEYS ? of_col : own[r];
            bool seen = col < a.t && key <= query, near = key >= map_near(&a, query);
            float e = ds[r] - y.y, by = map_over(y.x);
            float z = p[r] * a.scale - y.x;
            /* Never above 1, whatever rounding does to huge scores; a NaN stays. */
            if (near)
                p[r] = !seen ? 0.0f : z > 0.0f ? 1.0f : expf(z);
            else
                p[r] = seen ? far[r] * by : 0.0f;
            ds[r] = seen && near ? p[r] * e : 0.0f;
            ds_far[r] = seen && !near ? e * by : 0.0f;
        }
        if (has_near) mix<NJ, R>(acc_x, ds, col_x, a.d);
        if (has_far) mix<MJ, R>(acc_f, ds_far, col_f, a.m);
        if (KEYS) mix<NJ, R>(acc_y, p, col_y, a.d);
    }
    float by[R];
#pragma unroll
    for (int r = 0; r < R; r++) by[r] = a.scale;
    store_rows<T, NJ, R>((T *)(KEYS ? a.dk : a.dq) + in + w0 * a.ld, a.ld, acc_x, by, a.t - w0,
                         a.d);
#pragma unroll
    for (int r = 0; r < R; r++) by[r] = 1.0f;
    store_rows<float, MJ, R>((KEYS ? a.dfk : a.dfq) + at + (int64_t)w0 * a.m, a.m, acc_f, by,
                             a.t - w0, a.m);
    if (KEYS) store_rows<T, NJ, R>((T *)a.dv + in + w0 * a.ld, a.ld, acc_y, by, a.t - w0, a.d);
}

/* ---- launches ------------------------------------------------------------------------------- */

typedef void kernel(const struct map_attn);

/* Rows in shared memory: of d, and of m. */
static srf_status launch(struct srf_ctx *ctx, const struct map_attn *a, kernel *f, int rows,
                         int of_d, int of_m)
{
    size_t floats = (size_t)of_d * row_floats(a->d) + (size_t)of_m * row_floats(a->m);
    size_t smem = floats * sizeof(float);
    SRF_FAIL_IF(smem > cuda_of(ctx)->smem_max, SRF_UNSUPPORTED,
                "attention with trained maps: head size %d and %d features need %zu bytes of "
                "shared memory, this device has %zu",
                a->d, a->m, smem, cuda_of(ctx)->smem_max);
    CUDA_TRY(cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
    f<<<(unsigned)(div_up(a->t, rows) * a->heads), THREADS, smem, stream_of(ctx)>>>(*a);
    return srf__cuda_launched("map_attn");
}

template <typename T, int NJ, int R>
static srf_status fwd(struct srf_ctx *ctx, const struct map_attn *a)
{
    constexpr int rows = WARPS * R;
    return launch(ctx, a, map_fwd_kernel<T, NJ, R>, rows, rows + 2 * COLS, rows + COLS);
}
template <typename T, int NJ, int MJ, int R>
static srf_status bwd(struct srf_ctx *ctx, const struct map_attn *a)
{
    constexpr int rows = WARPS * R, of_d = 2 * (rows + COLS), of_m = rows + COLS;
    int64_t blocks = div_up((int64_t)a->heads * a->t, WARPS);
    map_rows_kernel<T><<<(unsigned)blocks, THREADS, 0, stream_of(ctx)>>>(*a);
    SRF_TRY(srf__cuda_launched("map_attn_bwd"));
    SRF_TRY(launch(ctx, a, map_bwd_kernel<T, NJ, MJ, R, false>, rows, of_d, of_m));
    return launch(ctx, a, map_bwd_kernel<T, NJ, MJ, R, true>, rows, of_d, of_m);
}

template <typename T> static srf_status fwd_any(struct srf_ctx *ctx, const struct map_attn *a)
{
    return a->d <= 64 ? fwd<T, 2, 4>(ctx, a) : fwd<T, 4, 4>(ctx, a);
}
template <typename T> static srf_status bwd_any(struct srf_ctx *ctx, const struct map_attn *a)
{
    return a->d <= 64 && a->m <= 64 ? bwd<T, 2, 2, 4>(ctx, a) : bwd<T, 4, 8, 2>(ctx, a);
}

srf_status srf__map_any_fwd(struct srf_ctx *ctx, const struct map_attn *a)
{
    return ctx->dtype == SRF_BF16 ? fwd_any<bf16>(ctx, a) : fwd_any<float>(ctx, a);
}
srf_status srf__map_any_bwd(struct srf_ctx *ctx, const struct map_attn *a)
{
    return ctx->dtype == SRF_BF16 ? bwd_any<bf16>(ctx, a) : bwd_any<float>(ctx, a);
}
