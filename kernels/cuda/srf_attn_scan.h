/* SRF attention token by token, for every shape and both dtypes: what its forward, backward and
 * step share. The other paths (tensor cores, bf16) serve the shapes they were made for.
 *
 * Exponents are in log2 units, a_i(x) = log2(e) (w_i.x + bias_i - |x|^2/2), and split in an integer
 * and a fraction before an integer stabiliser is subtracted, as on the CPU: the state S, z, M of a
 * head (sums scaled by 2^-M_i, M_i the largest rounded exponent so far, z = 0: no key yet) is the
 * same on both.
 *
 * A block has one head of one sequence and goes through its tokens in tiles of TT. In a tile the
 * exponents come first (a small matrix product), then, a thread for each feature, the running
 * maxima and with them three coefficients for each token and feature: the state becomes
 * step * state + in * vector, and is read with the weight out. Then every thread takes its own
 * elements of the (m, d) state through all tokens of the tile in a register. So a tile costs one
 * read and write of the state and a few barriers, and each token still sees the exact recurrence:
 * no chunk has one stabiliser for many tokens, and no range is too wide.
 *
 * "Rows" below are tokens in a (rows, d) array, "columns" the d components, "groups" the sets of
 * threads that share the features of a column sum.
 */
#pragma once
#include "kernels/cuda/cuda.h"

#define SCAN_THREADS  512
#define SCAN_TILE     16
#define SCAN_FEATURES 256 /* features whose coefficients are in shared memory at a time */
#define SCAN_COLUMNS  2   /* a thread's columns */
#define SCAN_GROUPS   64  /* at most */
#define SCAN_MAX_D    512 /* so that there are at least two groups, and shared memory does */

/* srf_attn_scan.cu, srf_attn_scan_bwd.cu, srf_attn_step.cu */
/* Whether the card can take the shape in a block of smem_bytes of shared memory. */
srf_status srf__scan_check(const struct srf_ctx *ctx, const struct srf_attn_shape *s,
                           size_t smem_bytes);
size_t srf__scan_fwd_workspace(const struct srf_ctx *ctx, const struct srf_attn_shape *s,
                               bool own_state);
srf_status srf__scan_fwd(struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a);
srf_status srf__scan_prefill(struct srf_ctx *ctx, const struct srf_srf_attn_prefill_args *a);
srf_status srf__scan_step(struct srf_ctx *ctx, const struct srf_srf_attn_step_args *a);
size_t srf__scan_bwd_workspace(const struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a);
srf_status srf__scan_bwd(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a);

/* w_t F32 (n_sets, d, m) from w T (n_sets, m, d). */
srf_status srf__scan_transpose(struct srf_ctx *ctx, const struct srf_attn_shape *s, const void *w,
                               float *w_t);

#ifdef __CUDACC__
#define SCAN_BOTH __host__ __device__
#else
#define SCAN_BOTH
#endif
/* Shared memory of a block, in floats. `parts` arrays of x (queries, keys, in the backward v and
 * d_o too); `features` of a pass; `sums` more for the row sums of the backward. */
static inline SCAN_BOTH int scan_x_ld(int64_t d)
{
    /* 16-byte loads of tokens; 4 more to spread the banks where there is room */
    return d > 256 ? SCAN_TILE : SCAN_TILE + 4;
}
static inline SCAN_BOTH int64_t scan_front_floats(int features, int sums)
{
    int64_t coef = SCAN_TILE * features * 4 + sums;
    int64_t columns = SCAN_TILE * SCAN_COLUMNS * SCAN_THREADS;
    return coef > columns ? coef : columns;
}
static inline size_t scan_smem_bytes(int64_t d, int parts, int features, int sums)
{
    int64_t x = parts * d * scan_x_ld(d), rows = (2 + 5 + 32) * SCAN_TILE;
    return (size_t)(scan_front_floats(features, sums) + x + rows) * sizeof(float);
}

enum scan_form { FORM_PURE, FORM_NONCAUSAL, FORM_HYBRID };

#ifdef __CUDACC__
#define SCAN_LOG2E 1.4426950408889634f
#define SCAN_LIMIT 1e17f    /* components of x, y are clamped to this: |x|^2 stays in range */
#define SCAN_LOW   (-1e30f) /* exponents are clamped to this */
#define SCAN_UNSET (-1e32f) /* the maximum over no keys */

/* Rows of the tile at pos, of those before `end`. */
__device__ __forceinline__ int tile_rows(int64_t pos, int64_t end)
{
    return (int)min((int64_t)SCAN_TILE, end - pos);
}

/* One row: of a caller's array, or of the ring (fp32) where f is not NULL. */
template <typename T> struct scan_row {
    const T *t;
    const float *f;
};
template <typename T> __device__ __forceinline__ float row_get(const scan_row<T> &r, int j)
{
    return r.f ? r.f[j] : to_float(r.t[j]);
}

/* Rows [first, ...) of a sequence are the caller's; those before are in the ring, if there is one:
 * position p in row p % ring_rows. */
template <typename T> struct scan_rows {
    const T *t;
    int64_t ld, first;
    const float *ring;
    int64_t ring_rows;
    int d;
};
template <typename T>
__device__ __forceinline__ scan_row<T> row_at(const scan_rows<T> &r, int64_t pos)
{
    /* positions are i32, and 64-bit remainders slow */
    if (pos < r.first)
        return {nullptr, r.ring + (int64_t)((uint32_t)pos % (uint32_t)r.ring_rows) * r.d};
    return {r.t + (pos - r.first) * r.ld, nullptr};
}

/* What a block works with. */
struct scan {
    int m, d;
    float scale;             /* d^(-1/4) */
    const float *w_t, *bias; /* (d, m), (m) */
    int columns, groups;     /* columns: of the first half; a thread has col, col + columns */
    int col, group;          /* this thread's; it has none where group >= groups */
    float *a;                /* (2, TT, m): exponents of queries, keys */
    /* shared memory */
    float4 *coef; /* (TT, features of the pass): step, in, out, and z (or u) of the state */
    float *sums;  /* behind the coefficients: backward's row sums */
    float *red;   /* the same memory as coef, sums: (groups, TT, 2 columns) */
    float *x;     /* (parts, d, x_ld): queries x, keys y, v, d_o; tokens lie next to each other */
    int x_ld;
    float *half;                         /* (2, TT): log2(e) |x|^2 / 2 */
    float *r, *den, *inv, *delta, *da_1; /* (TT): rows' stabilisers, denominators, their inverse,
                                          * -(d_o.o) / den, sums of da */
    float *warps;                        /* (TT, 32) */
};

__device__ __forceinline__ struct scan scan_begin(const struct srf_attn_shape &s, float scale,
                                                  const float *w_t, const float *bias, int head,
                                                  float *smem, int parts, int features, int sums)
{
    struct scan h;
    int64_t set = s.n_sets == 1 ? 0 : head;
    h.m = (int)s.m;
    h.d = (int)s.d;
    h.scale = scale;
    h.w_t = w_t + set * s.m * s.d;
    h.bias = bias + set * s.m;
    h.columns = (h.d + 1) / 2;
    h.groups = min((int)blockDim.x / h.columns, SCAN_GROUPS);
    h.col = (int)threadIdx.x % h.columns;
    h.group = (int)threadIdx.x / h.columns;
    h.coef = (float4 *)smem;
    h.sums = smem + SCAN_TILE * features * 4;
    h.red = smem;
    h.x = smem + scan_front_floats(features, sums);
    h.x_ld = scan_x_ld(h.d);
    h.half = h.x + parts * h.d * h.x_ld;
    h.r = h.half + 2 * SCAN_TILE;
    h.den = h.r + SCAN_TILE;
    h.inv = h.den + SCAN_TILE;
    h.delta = h.inv + SCAN_TILE;
    h.da_1 = h.delta + SCAN_TILE;
    h.warps = h.da_1 + SCAN_TILE;
    return h;
}

/* 2^n for integers n; 0 from -127 down, the largest power above 127. */
__device__ __forceinline__ float scan_pow2(float n)
{
    return __int_as_float(((int)fminf(fmaxf(n, -127.0f), 127.0f) + 127) << 23);
}
/* 2^(f + n) for |f| <= 1/2 and integers n */
__device__ __forceinline__ float scan_exp2(float f, float n)
{
    return exp2f(f) * scan_pow2(n);
}
__device__ __forceinline__ float scan_clamp(float x)
{
    x = x > SCAN_LIMIT ? SCAN_LIMIT : x;
    return x < -SCAN_LIMIT ? -SCAN_LIMIT : x;
}
/* TT values from shared or global memory, 16 bytes at a time. */
template <int n> __device__ __forceinline__ void load_vec(float *to, const float *from)
{
    if constexpr (n % 4 == 0) {
#pragma unroll
        for (int i = 0; i < n; i += 4) {
            float4 v = *(const float4 *)(from + i);
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < n; i++) to[i] = from[i];
    }
}
template <int n> __device__ __forceinline__ void store_vec(float *to, const float *from)
{
    if constexpr (n % 4 == 0) {
#pragma unroll
        for (int i = 0; i < n; i += 4)
            *(float4 *)(to + i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
    } else {
#pragma unroll
        for (int i = 0; i < n; i++) to[i] = from[i];
    }
}

/* out (TT) = max(out, part) or out + part over all threads' parts. Ends with a barrier. */
template <int TT, bool max>
__device__ __forceinline__ void block_rows(const struct scan &h, const float part[TT], float *out)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = blockDim.x >> 5;
#pragma unroll
    for (int t = 0; t < TT; t++) {
        float x = max ? warp_max(part[t]) : warp_sum(part[t]);
        if (lane == 0) h.warps[t * 32 + warp] = x;
    }
    __syncthreads();
    if (threadIdx.x < TT) {
        float all = out[threadIdx.x];
        for (int w = 0; w < n_warps; w++) {
            float x = h.warps[threadIdx.x * 32 + w];
            all = max ? fmaxf(all, x) : all + x;
        }
        out[threadIdx.x] = all;
    }
    __syncthreads();
}

/* Part `part` of h.x = rows pos, pos + dir, ... (n of them, zeros up to TT), scaled and clamped for
 * x and y. The caller must be past a barrier. */
template <typename T, int TT, bool scaled>
__device__ void load_part(const struct scan &h, int part, const scan_rows<T> &rows, int64_t pos,
                          int dir, int n)
{
    float *x = h.x + part * h.d * h.x_ld;
    for (int i = threadIdx.x; i < TT * h.d; i += blockDim.x) {
        int t = i / h.d, j = i - t * h.d;
        float e = t < n ? row_get(row_at(rows, pos + dir * t), j) : 0.0f;
        x[j * h.x_ld + t] = scaled ? scan_clamp(e * h.scale) : e;
    }
}

/* The same for queries (part 0) or keys (1), with half. Ends with a barrier. */
template <typename T, int TT>
__device__ void load_x(const struct scan &h, int part, const scan_rows<T> &rows, int64_t pos,
                       int dir, int n)
{
    const float *x = h.x + part * h.d * h.x_ld;
    load_part<T, TT, true>(h, part, rows, pos, dir, n);
    __syncthreads();
    for (int t = threadIdx.x >> 5; t < TT; t += blockDim.x >> 5) {
        float sum = 0;
        for (int j = threadIdx.x & 31; j < h.d; j += 32)
            sum += x[j * h.x_ld + t] * x[j * h.x_ld + t];
        sum = warp_sum(sum);
        if ((threadIdx.x & 31) == 0) h.half[part * SCAN_TILE + t] = 0.5f * SCAN_LOG2E * sum;
    }
    __syncthreads();
}

/* a = log2(e) (x W^T + bias) - half - shift of parts [from, to); pure queries (halves = false for
 * part 0) leave |x|^2/2 out, where it cancels. Ends with a barrier. */
template <int TT>
__device__ void exponents(const struct scan &h, int from, int to, bool query_half, float shift)
{
    constexpr int own = 8, pieces = TT / own;
    for (int i = from * pieces * h.m + threadIdx.x; i < to * pieces * h.m; i += blockDim.x) {
        int piece = i / h.m, f = i - piece * h.m, part = piece / pieces, t0 = piece % pieces * own;
        const float *x = h.x + part * h.d * h.x_ld + t0;
        float sum[own] = {0};
#pragma unroll 4
        for (int j = 0; j < h.d; j++) {
            float w = h.w_t[(int64_t)j * h.m + f], xt[own];
            load_vec<own>(xt, x + j * h.x_ld);
#pragma unroll
            for (int t = 0; t < own; t++) sum[t] += w * xt[t];
        }
        float bias = h.bias[f] * SCAN_LOG2E;
#pragma unroll
        for (int t = 0; t < own; t++) {
            float half = part || query_half ? h.half[part * SCAN_TILE + t0 + t] : 0.0f;
            float e = SCAN_LOG2E * sum[t] + (bias - (half + (part ? 0.0f : shift)));
            h.a[(int64_t)(part * TT + t0 + t) * h.m + f] = e < SCAN_LOW ? SCAN_LOW : e;
        }
    }
    __syncthreads();
}

/* A thread's columns of rows pos, pos + dir, ..., zeros from n up to TT. */
template <typename T, int TT>
__device__ __forceinline__ void own_columns(const struct scan &h, const scan_rows<T> &rows,
                                            int64_t pos, int dir, int n, float v[TT][SCAN_COLUMNS])
{
    bool first = h.group < h.groups, second = first && h.col + h.columns < h.d;
#pragma unroll
    for (int t = 0; t < TT; t++) {
        v[t][0] = v[t][1] = 0.0f;
        if (t >= n) continue;
        scan_row<T> row = row_at(rows, pos + dir * t);
        if (first) v[t][0] = row_get(row, h.col);
        if (second) v[t][1] = row_get(row, h.col + h.columns);
    }
}

/* The coefficients of `n_features` features from i0 on take this thread's elements of state (m, d)
 * through the tile: state = step * state + in * v where `write`, acc += out * state if `read`. */
template <int TT, bool write, bool read>
__device__ __forceinline__ void walk_columns(const struct scan &h, float *state, int i0,
                                             int n_features, const float v[TT][SCAN_COLUMNS],
                                             float acc[TT][SCAN_COLUMNS])
{
    if (h.group >= h.groups) return;
    bool two = h.col + h.columns < h.d;
    float *at = state + (int64_t)i0 * h.d + h.col, next0 = 0, next1 = 0;
    if (h.group < n_features) {
        next0 = at[(int64_t)h.group * h.d];
        if (two) next1 = at[(int64_t)h.group * h.d + h.columns];
    }
    for (int i = h.group; i < n_features; i += h.groups) {
        float s0 = next0, s1 = next1;
        if (i + h.groups < n_features) { /* on its way while this feature is worked on */
            next0 = at[(int64_t)(i + h.groups) * h.d];
            if (two) next1 = at[(int64_t)(i + h.groups) * h.d + h.columns];
        }
#pragma unroll
        for (int t = 0; t < TT; t++) {
            float4 c = h.coef[t * n_features + i];
            if (write) {
                s0 = c.x * s0 + c.y * v[t][0];
                s1 = c.x * s1 + c.y * v[t][1];
            }
            if (read) {
                acc[t][0] += c.z * s0;
                acc[t][1] += c.z * s1;
            }
        }
        if (write) {
            at[(int64_t)i * h.d] = s0;
            if (two) at[(int64_t)i * h.d + h.columns] = s1;
        }
    }
}

/* The groups' sums to shared memory, over the coefficients; between barriers. */
template <int TT>
__device__ __forceinline__ void share_columns(const struct scan &h,
                                              const float acc[TT][SCAN_COLUMNS])
{
    __syncthreads();
    if (h.group < h.groups) {
#pragma unroll
        for (int t = 0; t < TT; t++) {
            float *to = h.red + (h.group * TT + t) * 2 * h.columns + h.col;
            to[0] = acc[t][0];
            to[h.columns] = acc[t][1];
        }
    }
    __syncthreads();
}
template <int TT> __device__ __forceinline__ float column_sum(const struct scan &h, int t, int j)
{
    float sum = 0;
    for (int g = 0; g < h.groups; g++) sum += h.red[(g * TT + t) * 2 * h.columns + j];
    return sum;
}

/* ---- a tile's stabilisers and coefficients --------------------------------------------------- */

/* h.r = max(h.r, max_i (round(aq_i) + M_i)), M moving along with the tile's n keys if `keys`. */
template <int TT, bool keys>
__device__ void tile_stabilisers(const struct scan &h, const float *z, const float *top, int n)
{
    const float *aq = h.a, *ak = h.a + (int64_t)TT * h.m;
    float most[TT];
#pragma unroll
    for (int t = 0; t < TT; t++) most[t] = SCAN_UNSET;
    for (int i = threadIdx.x; i < h.m; i += blockDim.x) {
        float m_i = z[i] == 0.0f ? SCAN_UNSET : top[i];
#pragma unroll
        for (int t = 0; t < TT; t++) {
            if (keys && t < n) m_i = fmaxf(m_i, rintf(ak[(int64_t)t * h.m + i]));
            most[t] = fmaxf(most[t], rintf(aq[(int64_t)t * h.m + i]) + m_i);
        }
    }
    block_rows<TT, true>(h, most, h.r);
}

/* Coefficients of features [i0, i0 + n_features): keys move M and z along, in = 2^(ak - M); queries
 * have out = 2^(aq + M - r), and h.den += out * z where `sum`. Without `keep` that is all.
 * Ends with a barrier; there must be one before. */
template <int TT, bool keys, bool queries, bool sum, bool keep>
__device__ void tile_coefficients(const struct scan &h, float *z, float *top, int n, int i0,
                                  int n_features)
{
    const float *aq = h.a + i0, *ak = h.a + (int64_t)TT * h.m + i0;
    float den[TT] = {0};
    for (int i = threadIdx.x; i < n_features; i += blockDim.x) {
        float z_i = z[i0 + i], m_i = z_i == 0.0f ? SCAN_UNSET : top[i0 + i];
#pragma unroll
        for (int t = 0; t < TT; t++) {
            float4 c = make_float4(1, 0, 0, 0);
            if (keys && t < n) {
                float a = ak[(int64_t)t * h.m + i], e = rintf(a), to = fmaxf(m_i, e);
                c.x = scan_pow2(m_i - to);
                c.y = scan_exp2(a - e, e - to);
                z_i = c.x * z_i + c.y;
                m_i = to;
            }
            if (queries) {
                float a = aq[(int64_t)t * h.m + i], e = rintf(a);
                c.z = scan_exp2(a - e, (e + m_i) - h.r[t]);
                if (sum) den[t] += c.z * z_i;
            }
            c.w = z_i;
            if (keep) h.coef[t * n_features + i] = c;
        }
        if (keys && keep) {
            z[i0 + i] = z_i;
            top[i0 + i] = m_i;
        }
    }
    if (sum)
        block_rows<TT, false>(h, den, h.den);
    else
        __syncthreads();
}

/* ---- the window's exact scores --------------------------------------------------------------- */

/* First position of the keys that the token at pos sees exactly. */
__device__ __forceinline__ int64_t window_first(int64_t pos, int64_t window)
{
    int64_t block = pos / window;
    return block > 0 ? (block - 1) * window : 0;
}

/* p (keys, TT) = log2(e) x_t.y_s of the tile's queries, the first at position pos, and keys from
 * position lo to that of the last query; keys later than a query are SCAN_UNSET. h.r = max(h.r,
 * the row's rounded maximum). Key s is this thread's in window_weights too. */
template <typename T, int TT>
__device__ void window_scores(const struct scan &h, const scan_rows<T> &k, int64_t lo, int64_t pos,
                              int n, float *p)
{
    float most[TT];
#pragma unroll
    for (int t = 0; t < TT; t++) most[t] = SCAN_UNSET;
    for (int64_t s = threadIdx.x; lo + s < pos + n; s += blockDim.x) {
        scan_row<T> row = row_at(k, lo + s);
        float sum[TT] = {0};
#pragma unroll 4
        for (int j = 0; j < h.d; j++) {
            float y = scan_clamp(row_get(row, j) * h.scale), x[TT];
            load_vec<TT>(x, h.x + j * h.x_ld);
#pragma unroll
            for (int t = 0; t < TT; t++) sum[t] += y * x[t];
        }
#pragma unroll
        for (int t = 0; t < TT; t++) {
            float e = SCAN_LOG2E * sum[t]; /* clamped: above SCAN_UNSET, and NaN stays */
            sum[t] = lo + s > pos + t ? SCAN_UNSET : e < SCAN_LOW ? SCAN_LOW : e;
            most[t] = fmaxf(most[t], rintf(sum[t]));
        }
        store_vec<TT>(p + s * TT, sum);
    }
    block_rows<TT, true>(h, most, h.r);
}

/* p = 2^(p - r), h.den += its sums. Ends with a barrier. */
template <int TT> __device__ void window_weights(const struct scan &h, int64_t n_keys, float *p)
{
    float den[TT] = {0};
    for (int64_t s = threadIdx.x; s < n_keys; s += blockDim.x) {
        float w[TT];
        load_vec<TT>(w, p + s * TT);
#pragma unroll
        for (int t = 0; t < TT; t++) {
            float e = rintf(w[t]);
            w[t] = scan_exp2(w[t] - e, e - h.r[t]);
            den[t] += w[t];
        }
        store_vec<TT>(p + s * TT, w);
    }
    block_rows<TT, false>(h, den, h.den);
}

/* acc += sum_s p_s rows_s over n rows from position lo on, in this thread's columns; of x or y if
 * `scaled`. */
template <typename T, int TT, bool scaled>
__device__ void window_sum(const struct scan &h, const scan_rows<T> &rows, int64_t lo, int64_t n,
                           const float *p, float acc[TT][SCAN_COLUMNS])
{
    if (h.group >= h.groups) return;
    bool two = h.col + h.columns < h.d;
    for (int64_t s = h.group; s < n; s += h.groups) {
        scan_row<T> row = row_at(rows, lo + s);
        float v0 = row_get(row, h.col), v1 = two ? row_get(row, h.col + h.columns) : 0.0f, w[TT];
        if (scaled) {
            v0 = scan_clamp(v0 * h.scale);
            v1 = scan_clamp(v1 * h.scale);
        }
        load_vec<TT>(w, p + s * TT);
#pragma unroll
        for (int t = 0; t < TT; t++) {
            acc[t][0] += w[t] * v0;
            acc[t][1] += w[t] * v1;
        }
    }
}

/* ---- keys alone ------------------------------------------------------------------------------ */

/* Rows [pos, pos + n) of k, v go into the state. */
template <typename T, int TT>
__device__ void absorb_keys(const struct scan &h, float *s, float *z, float *top,
                            const scan_rows<T> &k, const scan_rows<T> &v, int64_t pos, int n)
{
    float vt[TT][SCAN_COLUMNS];
    __syncthreads();
    load_x<T, TT>(h, 1, k, pos, 1, n);
    exponents<TT>(h, 1, 2, false, 0.0f);
    own_columns<T, TT>(h, v, pos, 1, n, vt);
    for (int i0 = 0; i0 < h.m; i0 += SCAN_FEATURES) {
        int n_features = min(SCAN_FEATURES, h.m - i0);
        tile_coefficients<TT, true, false, false, true>(h, z, top, n, i0, n_features);
        walk_columns<TT, true, false>(h, s, i0, n_features, vt, vt);
        __syncthreads();
    }
}
#endif
