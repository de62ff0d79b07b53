/* Softmax attention in plain fp32 arithmetic, for either dtype and any head size up to 512: the
 * mode for checks, and the shapes that the tensor-core kernels do not take.
 *
 * A warp has R rows (queries; keys for dK and dV), its lanes 32 columns at a time: a lane makes the
 * scores of one column, then holds d / 32 elements of each row's result while the columns' weights
 * go round by shuffles. Rows and columns lie in shared memory as fp32.
 *
 * Backward runs twice over the pairs, as the tensor-core kernels do, with one kernel for both:
 *     rows (q, d_o), columns (k, v):    dq += ds k
 *     rows (k, v), columns (q, d_o):    dk += ds q, dv += p d_o
 *
 * Floor: the fp32 rate, 67 Tflop/s on a H100; shared-memory reads keep this form to about a
 * quarter of it.
 */
#include "kernels/cuda/attn_any.h"
#include "kernels/cuda/softmax_attn.h"

template <typename T, int NJ, int R>
static __global__ __launch_bounds__(THREADS) void any_fwd_kernel(const struct attn a, bool causal)
{
    constexpr int ROWS = WARPS * R;
    extern __shared__ __align__(16) float any_smem[];
    int n = row_floats(a.d), lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    float *rows = any_smem, *cols = rows + ROWS * n; /* keys, then values */
    int tile, head;
    block_of(&a, (a.t + ROWS - 1) / ROWS, true, &tile, &head);
    int64_t in = head_at(&a, head, a.ld);
    int t0 = tile * ROWS, w0 = t0 + warp * R, keys = causal ? min(t0 + ROWS, a.t) : a.t;
    load_rows(rows, (const T *)a.q + in + t0 * a.ld, a.ld, ROWS, a.t - t0, a.d);
    float top[R], sum[R], out[R][NJ], p[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        top[r] = -INFINITY;
        sum[r] = 0.0f;
#pragma unroll
        for (int i = 0; i < NJ; i++) out[r][i] = 0.0f;
    }
    int from = window_from(&a, t0, COLS);
    for (int s0 = a.sinks ? 0 : from; s0 < keys; s0 = next_tile(&a, from, s0, COLS)) {
        int key = s0 + lane;
        __syncthreads();
        load_rows(cols, (const T *)a.k + in + s0 * a.ld, a.ld, COLS, a.t - s0, a.d);
        __syncthreads();
        scores<R>(p, rows + warp * R * n, cols, a.d);
#pragma unroll
        for (int r = 0; r < R; r++) {
            bool seen = key < a.t && !(causal && (key > w0 + r || !in_window(&a, w0 + r, key)));
            float s = seen ? p[r] * a.scale : UNSEEN, m = fmaxf(top[r], warp_max(s));
            float by = expf(top[r] - m);
            p[r] = expf(s - m);
            sum[r] = sum[r] * by + p[r];
            top[r] = m;
#pragma unroll
            for (int i = 0; i < NJ; i++) out[r][i] *= by;
        }
        __syncthreads();
        load_rows(cols, (const T *)a.v + in + s0 * a.ld, a.ld, COLS, a.t - s0, a.d);
        __syncthreads();
        mix<NJ, R>(out, p, cols, a.d);
    }
    float by[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        float total = warp_sum(sum[r]);
        by[r] = 1.0f / total;
        if (a.lse && lane == 0 && w0 + r < a.t)
            a.lse[(int64_t)head * a.t + w0 + r] = top[r] + logf(total);
    }
    store_rows<T, NJ, R>((T *)a.out + head_at(&a, head, a.ld_o) + w0 * a.ld_o, a.ld_o, out, by,
                         a.t - w0, a.d);
}

/* p.rows = (lse, d_o.o), a warp a query and head */
template <typename T> static __global__ __launch_bounds__(THREADS) void rows_kernel(struct attn a)
{
    int64_t i = (int64_t)blockIdx.x * WARPS + (threadIdx.x >> 5);
    if (i >= (int64_t)a.heads * a.t) return;
    int64_t at = head_at(&a, (int)(i / a.t), a.ld_o) + i % a.t * a.ld_o;
    const T *o = (const T *)a.o + at, *d_o = (const T *)a.d_o + at;
    float x = 0.0f;
    for (int j = threadIdx.x & 31; j < a.d; j += 32) x = fmaf(to_float(o[j]), to_float(d_o[j]), x);
    x = warp_sum(x);
    if ((threadIdx.x & 31) == 0)
        a.rows[i / a.t * a.row_stride + i % a.t] = make_float2(a.lse[i], x);
}

/* KEYS: rows are keys, else queries. */
template <typename T, int NJ, int R, bool KEYS>
static __global__ __launch_bounds__(THREADS) void any_bwd_kernel(const struct attn a, bool causal)
{
    constexpr int ROWS = WARPS * R;
    extern __shared__ __align__(16) float any_smem[];
    int n = row_floats(a.d), lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    float *row_x = any_smem, *row_y = row_x + ROWS * n; /* q, d_o or k, v */
    float *col_x = row_y + ROWS * n, *col_y = col_x + COLS * n;
    int tile, head;
    block_of(&a, (a.t + ROWS - 1) / ROWS, !KEYS, &tile, &head);
    int64_t in = head_at(&a, head, a.ld), at_o = head_at(&a, head, a.ld_o);
    int64_t ld_row_y = KEYS ? a.ld : a.ld_o, ld_col_y = KEYS ? a.ld_o : a.ld;
    const T *from_row_x = (const T *)(KEYS ? a.k : a.q) + in;
    const T *from_col_x = (const T *)(KEYS ? a.q : a.k) + in;
    const T *from_row_y = KEYS ? (const T *)a.v + in : (const T *)a.d_o + at_o;
    const T *from_col_y = KEYS ? (const T *)a.d_o + at_o : (const T *)a.v + in;
    const float2 *rows = a.rows + (int64_t)head * a.row_stride;
    int r0 = tile * ROWS, w0 = r0 + warp * R;
    int from = KEYS ? 0 : window_from(&a, r0, COLS);
    int first = KEYS && causal ? r0 / COLS * COLS : a.sinks ? 0 : from;
    int last = KEYS ? window_end(&a, r0, ROWS) : causal ? min(r0 + ROWS, a.t) : a.t;
    load_rows(row_x, from_row_x + r0 * a.ld, a.ld, ROWS, a.t - r0, a.d);
    load_rows(row_y, from_row_y + r0 * ld_row_y, ld_row_y, ROWS, a.t - r0, a.d);
    float acc_x[R][NJ], acc_y[R][NJ]; /* acc_y: of dv */
    float2 x[R];                      /* of the queries: rows, or each lane its column */
#pragma unroll
    for (int r = 0; r < R; r++) {
        bool there = !KEYS && w0 + r < a.t;
        x[r] = there ? rows[w0 + r] : make_float2(0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < NJ; i++) acc_x[r][i] = acc_y[r][i] = 0.0f;
    }
    for (int c0 = first; c0 < last; c0 = KEYS ? c0 + COLS : next_tile(&a, from, c0, COLS)) {
        int col = c0 + lane;
        __syncthreads();
        load_rows(col_x, from_col_x + c0 * a.ld, a.ld, COLS, a.t - c0, a.d);
        load_rows(col_y, from_col_y + c0 * ld_col_y, ld_col_y, COLS, a.t - c0, a.d);
        __syncthreads();
        float p[R], ds[R];
        scores<R>(p, row_x + warp * R * n, col_x, a.d);
        scores<R>(ds, row_y + warp * R * n, col_y, a.d);
        float2 of_col = make_float2(0.0f, 0.0f);
        if (KEYS && col < a.t) of_col = rows[col];
#pragma unroll
        for (int r = 0; r < R; r++) {
            int query = KEYS ? col : w0 + r, key = KEYS ? w0 + r : col;
            float2 y = KEYS ? of_col : x[r];
            float z = p[r] * a.scale - y.x;
            /* Never above 1, whatever rounding does to huge scores; a NaN stays. */
            bool seen = col < a.t && !(causal && (key > query || !in_window(&a, query, key)));
            p[r] = !seen ? 0.0f : z > 0.0f ? 1.0f : expf(z);
            ds[r] = seen ? p[r] * (ds[r] - y.y) : 0.0f;
        }
        mix<NJ, R>(acc_x, ds, col_x, a.d);
        if (KEYS) mix<NJ, R>(acc_y, p, col_y, a.d);
    }
    float by[R];
#pragma unroll
    for (int r = 0; r < R; r++) by[r] = a.scale;
    store_rows<T, NJ, R>((T *)(KEYS ? a.dk : a.dq) + in + w0 * a.ld, a.ld, acc_x, by, a.t - w0,
                         a.d);
    if (KEYS) {
#pragma unroll
        for (int r = 0; r < R; r++) by[r] = 1.0f;
        store_rows<T, NJ, R>((T *)a.dv + in + w0 * a.ld, a.ld, acc_y, by, a.t - w0, a.d);
    }
}

/* ---- launches ------------------------------------------------------------------------------- */

typedef void kernel(const struct attn, bool);

/* in_shared: how many rows shared memory holds */
static srf_status launch(struct srf_ctx *ctx, const struct attn *a, kernel *f, int rows,
                         int in_shared, bool causal)
{
    size_t smem = (size_t)in_shared * row_floats(a->d) * sizeof(float);
    SRF_FAIL_IF(smem > cuda_of(ctx)->smem_max, SRF_UNSUPPORTED,
                "softmax attention: head size %d needs %zu bytes of shared memory, this device has "
                "%zu",
                a->d, smem, cuda_of(ctx)->smem_max);
    CUDA_TRY(cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
    f<<<(unsigned)(div_up(a->t, rows) * a->heads), THREADS, smem, stream_of(ctx)>>>(*a, causal);
    return srf__cuda_launched("softmax_attn");
}

template <typename T, int NJ, int R>
static srf_status fwd(struct srf_ctx *ctx, const struct attn *a, bool causal)
{
    return launch(ctx, a, any_fwd_kernel<T, NJ, R>, WARPS * R, WARPS * R + COLS, causal);
}
template <typename T, int NJ, int R>
static srf_status bwd(struct srf_ctx *ctx, const struct attn *a, bool causal)
{
    constexpr int rows = WARPS * R, in_shared = 2 * (rows + COLS);
    int64_t blocks = div_up((int64_t)a->heads * a->t, WARPS);
    rows_kernel<T><<<(unsigned)blocks, THREADS, 0, stream_of(ctx)>>>(*a);
    SRF_TRY(srf__cuda_launched("softmax_attn_bwd"));
    SRF_TRY(launch(ctx, a, any_bwd_kernel<T, NJ, R, false>, rows, in_shared, causal));
    return launch(ctx, a, any_bwd_kernel<T, NJ, R, true>, rows, in_shared, causal);
}
/* Rows per warp: as many as registers and shared memory allow. */
template <typename T>
static srf_status fwd_any_d(struct srf_ctx *ctx, const struct attn *a, bool causal)
{
    if (a->d <= 64) return fwd<T, 2, 4>(ctx, a, causal);
    if (a->d <= 128) return fwd<T, 4, 4>(ctx, a, causal);
    return fwd<T, 16, 2>(ctx, a, causal);
}
template <typename T>
static srf_status bwd_any_d(struct srf_ctx *ctx, const struct attn *a, bool causal)
{
    if (a->d <= 64) return bwd<T, 2, 4>(ctx, a, causal);
    if (a->d <= 128) return bwd<T, 4, 4>(ctx, a, causal);
    return bwd<T, 16, 2>(ctx, a, causal);
}

srf_status srf__attn_any_fwd(struct srf_ctx *ctx, const struct attn *a, bool causal)
{
    return ctx->dtype == SRF_BF16 ? fwd_any_d<bf16>(ctx, a, causal)
                                  : fwd_any_d<float>(ctx, a, causal);
}
srf_status srf__attn_any_bwd(struct srf_ctx *ctx, const struct attn *a, bool causal)
{
    return ctx->dtype == SRF_BF16 ? bwd_any_d<bf16>(ctx, a, causal)
                                  : bwd_any_d<float>(ctx, a, causal);
}
