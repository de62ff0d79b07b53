/* SRF attention token by token, backward: see srf_attn_scan.h for the form, and the CPU's
 * srf_attn_bwd.c for the formulas.
 *
 * With g_t = d_o_t / den_t and delta_t = -(d_o_t.o_t) / den_t,
 *     dphi(x_t) = S_t g_t + z_t delta_t
 *     dphi(y_s) = R_s v_s + u_s,   dv_s = R_s^T phi(y_s)
 *     R_s = sum_{t>=s} phi(x_t) g_t^T,   u_s = sum_{t>=s} phi(x_t) delta_t
 *     da = phi dphi,   dx = W^T da - (sum_i da_i) x,   dW_i += sum da_i x   (y likewise)
 * and the window's exact weights as in softmax attention.
 *
 * A walk forward carries S and gives dq; it leaves r, 1 / den and delta of each token, and M at the
 * start of each tile (hybrid: of each block). A walk backward carries R, u in the scale of the M
 * reached, which only falls on that way: steps are at most 1, and phi(x_t) 2^(M_s - r_t) is in
 * range. S g and R v are sums over columns, R^T phi one over features: S is kept transposed, R both
 * ways. Where keys and queries do not meet in a tile (not causal, and the hybrid's far part), the
 * walk backward takes tiles of queries, then tiles of keys. dW: a partial sum for each block of
 * threads, then one sum in a fixed order. Forward's stat is not needed.
 *
 * Floor: 22 m d flops a token and head in fp32 without tensor cores, 4 m d more with dW.
 */
#include "kernels/cuda/srf_attn_scan.h"

#define BWD_PARTS    4 /* x, y, v, d_o */
#define PART_V       2
#define PART_D_O     3
#define ROW_SUMS     (SCAN_THREADS * SCAN_TILE)
#define DA_LD        (SCAN_TILE + 4)
#define MAX_SEGMENTS 16

struct scan_bwd_params {
    struct srf_attn_shape s;
    float scale;
    const void *q, *k, *v, *w, *o, *d_o;
    int64_t ld, ld_o;
    const float *w_t, *bias;
    void *dq, *dk, *dv;
    float *scratch, *dw; /* dw: (b h, m, d) partial sums, or NULL */
    int64_t scratch_stride;
    int features; /* of a pass */
};

/* What a block keeps in the workspace, in floats from its start. */
struct bwd_layout {
    int64_t p, ds;            /* (2 window, TT) each, behind the exponents */
    int64_t r, inv, delta;    /* (t) each */
    int64_t s_t, z, top;      /* (d, m), (m), (m): S transposed, z, M */
    int64_t R, R_t, u, scale; /* (m, d), (d, m), (m), (m): R, u and the M in whose scale they are */
    int64_t tops;             /* (tiles or blocks, m) */
    int64_t floats;
};

static SCAN_BOTH int64_t take(int64_t *used, int64_t n)
{
    int64_t at = *used;
    *used += (n + 31) / 32 * 32;
    return at;
}

static SCAN_BOTH struct bwd_layout bwd_layout_of(const struct srf_attn_shape &s)
{
    int64_t m = s.m, md = m * s.d, used = 0;
    int64_t len = s.window ? s.window : SCAN_TILE, stops = s.causal ? (s.t + len - 1) / len : 0;
    struct bwd_layout l;
    take(&used, 2 * SCAN_TILE * m);
    l.p = take(&used, 2 * s.window * SCAN_TILE);
    l.ds = take(&used, 2 * s.window * SCAN_TILE);
    l.r = take(&used, s.t);
    l.inv = take(&used, s.t);
    l.delta = take(&used, s.t);
    l.s_t = take(&used, md);
    l.z = take(&used, m);
    l.top = take(&used, m);
    l.R = take(&used, md);
    l.R_t = take(&used, md);
    l.u = take(&used, m);
    l.scale = take(&used, m);
    l.tops = take(&used, stops * m);
    l.floats = used;
    return l;
}

template <typename T> struct bwd_head {
    scan_rows<T> q, k, v, o, d_o;
    T *dq, *dk, *dv;
    int64_t ld;
    const T *w; /* (m, d) */
    float *dw;  /* (m, d) or NULL */
    float *p, *ds, *r, *inv, *delta, *s_t, *z, *top, *R, *R_t, *u, *scale, *tops;
    int64_t window;
    float shift; /* of query exponents: log2 m in the hybrid */
    int features;
};

/* How the threads share a pass of n features in sums over columns: feature, and a segment of the
 * columns. */
struct segment {
    int f, index, count, from, to;
};
__device__ __forceinline__ struct segment own_segment(const struct scan &h, int n_features)
{
    struct segment g;
    int most = min((int)blockDim.x / n_features, min(MAX_SEGMENTS, (h.d + 1) / 2));
    int len = ((h.d + most - 1) / most + 1) & ~1;
    g.f = threadIdx.x % n_features;
    g.index = threadIdx.x / n_features;
    g.count = (h.d + len - 1) / len;
    g.from = g.index < g.count ? g.index * len : h.d;
    g.to = min(g.from + len, h.d);
    return g;
}

/* state (d, m) of features [i0, i0 + n_features) through the tile: step * state + in * x of part
 * `in` where `write`; h.sums (segment, TT, feature) = sums over columns of state * x of part `out`
 * where `read`. The caller puts barriers around. */
template <int TT, bool write, bool read>
__device__ void walk_rows(const struct scan &h, float *state, int i0, int n_features, int in,
                          int out)
{
    struct segment g = own_segment(h, n_features);
    if (g.index >= g.count) return;
    float step[TT], into[TT], dot[TT] = {0};
#pragma unroll
    for (int t = 0; t < TT; t++) {
        float4 c = h.coef[t * n_features + g.f];
        step[t] = c.x;
        into[t] = c.y;
    }
    float *at = state + i0 + g.f;
    const float *x_in = h.x + in * h.d * h.x_ld, *x_out = h.x + out * h.d * h.x_ld;
    for (int j = g.from; j < g.to; j += 2) {
        bool two = j + 1 < g.to;
        int j1 = two ? j + 1 : j; /* the second column may be the first again: not stored then */
        float s0 = at[(int64_t)j * h.m], s1 = at[(int64_t)j1 * h.m];
#pragma unroll
        for (int t = 0; t < TT; t += 4) {
            float a0[4], a1[4], b0[4], b1[4];
            if (write) load_vec<4>(a0, x_in + j * h.x_ld + t);
            if (write) load_vec<4>(a1, x_in + j1 * h.x_ld + t);
            if (read) load_vec<4>(b0, x_out + j * h.x_ld + t);
            if (read) load_vec<4>(b1, x_out + j1 * h.x_ld + t);
#pragma unroll
            for (int l = 0; l < 4; l++) {
                if (write) {
                    s0 = step[t + l] * s0 + into[t + l] * a0[l];
                    s1 = step[t + l] * s1 + into[t + l] * a1[l];
                }
                if (read) dot[t + l] += s0 * b0[l] + (two ? s1 * b1[l] : 0.0f);
            }
        }
        if (write) at[(int64_t)j * h.m] = s0;
        if (write && two) at[(int64_t)j1 * h.m] = s1;
    }
    if (read)
#pragma unroll
        for (int t = 0; t < TT; t++) h.sums[(g.index * TT + t) * n_features + g.f] = dot[t];
}

/* da (feature, DA_LD) = out (inv dphi + delta z), the sums over columns having been made; it takes
 * their place. inv, delta NULL: 1. h.da_1 += its sums over features. Barriers at both ends. */
template <int TT>
__device__ void tile_da(const struct scan &h, int n_features, const float *inv, const float *delta)
{
    constexpr int items = SCAN_TILE * SCAN_FEATURES / SCAN_THREADS;
    struct segment g = own_segment(h, n_features);
    float da[items], *to = h.sums;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < items; k++) {
        int i = threadIdx.x + k * SCAN_THREADS, t = i / n_features, f = i - t * n_features;
        if (i >= TT * n_features) continue;
        float4 c = h.coef[i];
        float dphi = 0;
        for (int s = 0; s < g.count; s++) dphi += h.sums[(s * TT + t) * n_features + f];
        da[k] = c.z * ((inv ? inv[t] : 1.0f) * dphi + (delta ? delta[t] : 1.0f) * c.w);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < items; k++) {
        int i = threadIdx.x + k * SCAN_THREADS, t = i / n_features, f = i - t * n_features;
        if (i < TT * n_features) to[f * DA_LD + t] = da[k];
    }
    __syncthreads();
    for (int t = threadIdx.x >> 5; t < TT; t += blockDim.x >> 5) {
        float sum = 0;
        for (int f = threadIdx.x & 31; f < n_features; f += 32) sum += to[f * DA_LD + t];
        sum = warp_sum(sum);
        if ((threadIdx.x & 31) == 0) h.da_1[t] += sum;
    }
    __syncthreads();
}

/* acc += da W in this thread's columns; dW += da^T x of `part`. */
template <typename T, int TT>
__device__ void tile_inputs(const struct scan &h, const bwd_head<T> &f, int part, int i0,
                            int n_features, float acc[TT][SCAN_COLUMNS])
{
    if (h.group >= h.groups) return;
    bool two = h.col + h.columns < h.d;
    for (int i = h.group; i < n_features; i += h.groups) {
        const T *w = f.w + (int64_t)(i0 + i) * h.d + h.col;
        float w0 = to_float(w[0]), w1 = two ? to_float(w[h.columns]) : 0.0f, da[TT];
        load_vec<TT>(da, h.sums + i * DA_LD);
#pragma unroll
        for (int t = 0; t < TT; t++) {
            acc[t][0] += da[t] * w0;
            acc[t][1] += da[t] * w1;
        }
    }
    if (!f.dw) return;
    for (int c = 0; c < (two ? 2 : 1); c++) {
        int col = h.col + c * h.columns;
        float x[TT];
        load_vec<TT>(x, h.x + (part * h.d + col) * h.x_ld);
        for (int i = h.group; i < n_features; i += h.groups) {
            float *to = f.dw + (int64_t)(i0 + i) * h.d + col, sum = *to, da[TT];
            load_vec<TT>(da, h.sums + i * DA_LD);
#pragma unroll
            for (int t = 0; t < TT; t++) sum += da[t] * x[t];
            *to = sum;
        }
    }
}

/* to rows = scale (the shared sums of acc - da_1 x): row pos + dir t for t < n. */
template <typename T, int TT>
__device__ void store_dx(const struct scan &h, const float acc[TT][SCAN_COLUMNS], int part,
                         bool minus_x, T *to, int64_t ld, int64_t pos, int dir, int n)
{
    share_columns<TT>(h, acc);
    for (int i = threadIdx.x; i < n * h.d; i += blockDim.x) {
        int t = i / h.d, j = i - t * h.d;
        float dx = column_sum<TT>(h, t, j);
        if (minus_x) dx -= h.da_1[t] * h.x[(part * h.d + j) * h.x_ld + t];
        to[(pos + dir * t) * ld + j] = from_float<T>(h.scale * dx);
    }
    __syncthreads();
}

/* ---- forward: dq ----------------------------------------------------------------------------- */

/* ds (keys, TT) from p, the weights: p (d_o_t.v_s / den_t + delta_t), for the thread's own keys. */
template <typename T, int TT>
__device__ void query_scores(const struct scan &h, const scan_rows<T> &v, int64_t lo,
                             int64_t n_keys, const float *p, float *ds)
{
    for (int64_t s = threadIdx.x; s < n_keys; s += blockDim.x) {
        scan_row<T> row = row_at(v, lo + s);
        float dot[TT] = {0}, w[TT];
        for (int j = 0; j < h.d; j++) {
            float v_j = row_get(row, j), d_o[TT];
            load_vec<TT>(d_o, h.x + (PART_D_O * h.d + j) * h.x_ld);
#pragma unroll
            for (int t = 0; t < TT; t++) dot[t] += v_j * d_o[t];
        }
        load_vec<TT>(w, p + s * TT);
#pragma unroll
        for (int t = 0; t < TT; t++) w[t] *= h.inv[t] * dot[t] + h.delta[t];
        store_vec<TT>(ds + s * TT, w);
    }
    __syncthreads();
}

/* dq of the n queries at pos. */
template <typename T, enum scan_form form>
__device__ void dq_tile(const struct scan &h, const bwd_head<T> &f, int64_t pos, int n)
{
    constexpr int TT = SCAN_TILE;
    constexpr bool keys = form == FORM_PURE, hybrid = form == FORM_HYBRID;
    int64_t lo = hybrid ? window_first(pos, f.window) : pos, n_keys = pos + n - lo;
    __syncthreads();
    bool far = !hybrid || f.z[0] != 0.0f;
    if (threadIdx.x < TT) {
        h.r[threadIdx.x] = SCAN_UNSET;
        h.den[threadIdx.x] = 0.0f;
        h.da_1[threadIdx.x] = 0.0f;
    }
    load_x<T, TT>(h, 0, f.q, pos, 1, n);
    if (keys) {
        load_x<T, TT>(h, 1, f.k, pos, 1, n);
        load_part<T, TT, false>(h, PART_V, f.v, pos, 1, n);
    }
    load_part<T, TT, false>(h, PART_D_O, f.d_o, pos, 1, n);
    if (far) exponents<TT>(h, 0, keys ? 2 : 1, hybrid, f.shift);
    if (hybrid) window_scores<T, TT>(h, f.k, lo, pos, n, f.p);
    if (far) tile_stabilisers<TT, keys>(h, f.z, f.top, n);
    if (hybrid) window_weights<TT>(h, n_keys, f.p);
    for (int i0 = 0; far && i0 < h.m; i0 += f.features)
        tile_coefficients<TT, keys, true, true, false>(h, f.z, f.top, n, i0,
                                                       min(f.features, h.m - i0));
    /* d_o is in place: every path above had a barrier. */
    for (int t = threadIdx.x >> 5; t < TT; t += blockDim.x >> 5) {
        float sum = 0, inv = 1.0f / h.den[t];
        for (int j = threadIdx.x & 31; t < n && j < h.d; j += 32)
            sum += h.x[(PART_D_O * h.d + j) * h.x_ld + t] * row_get(row_at(f.o, pos + t), j);
        sum = -warp_sum(sum) * inv;
        if ((threadIdx.x & 31) != 0) continue;
        h.inv[t] = inv;
        h.delta[t] = sum;
        if (t >= n) continue;
        f.inv[pos + t] = inv;
        f.delta[pos + t] = sum;
        f.r[pos + t] = h.r[t];
    }
    if (form == FORM_PURE)
        for (int i = threadIdx.x; i < h.m; i += blockDim.x)
            f.tops[pos / TT * h.m + i] = f.z[i] == 0.0f ? SCAN_UNSET : f.top[i];
    __syncthreads();
    float acc[TT][SCAN_COLUMNS] = {{0}};
    if (hybrid) {
        query_scores<T, TT>(h, f.v, lo, n_keys, f.p, f.ds);
        window_sum<T, TT, true>(h, f.k, lo, n_keys, f.ds, acc);
    }
    for (int i0 = 0; far && i0 < h.m; i0 += f.features) {
        int n_features = min(f.features, h.m - i0);
        tile_coefficients<TT, keys, true, false, true>(h, f.z, f.top, n, i0, n_features);
        walk_rows<TT, keys, true>(h, f.s_t, i0, n_features, PART_V, PART_D_O);
        tile_da<TT>(h, n_features, h.inv, h.delta);
        tile_inputs<T, TT>(h, f, 0, i0, n_features, acc);
        __syncthreads();
    }
    store_dx<T, TT>(h, acc, 0, hybrid && far, f.dq, f.ld, pos, 1, n);
}

/* n keys at pos into S. */
template <typename T>
__device__ void absorb_transposed(const struct scan &h, const bwd_head<T> &f, int64_t pos, int n)
{
    constexpr int TT = SCAN_TILE;
    __syncthreads();
    load_x<T, TT>(h, 1, f.k, pos, 1, n);
    load_part<T, TT, false>(h, PART_V, f.v, pos, 1, n);
    exponents<TT>(h, 1, 2, false, 0.0f);
    for (int i0 = 0; i0 < h.m; i0 += f.features) {
        int n_features = min(f.features, h.m - i0);
        tile_coefficients<TT, true, false, false, true>(h, f.z, f.top, n, i0, n_features);
        walk_rows<TT, true, false>(h, f.s_t, i0, n_features, PART_V, PART_V);
        __syncthreads();
    }
}

/* ---- backward: dk, dv ------------------------------------------------------------------------ */

/* Coefficients for R, rows last to first: queries come in with 2^(aq + M - r) / den and move u
 * along, keys read with 2^(ak - M). M: `top`, or, where keys and queries meet in the tile, the
 * running maximum from `top` on. Ends with a barrier; there must be one before. */
template <int TT, bool queries, bool keys>
__device__ void reverse_coefficients(const struct scan &h, const float *top, float *u, float *scale,
                                     int n, int i0, int n_features)
{
    const float *aq = h.a + i0, *ak = h.a + (int64_t)TT * h.m + i0;
    for (int i = threadIdx.x; i < n_features; i += blockDim.x) {
        float m_t[TT], m_i = top[i0 + i], u_i = u[i0 + i], in_scale = scale[i0 + i];
#pragma unroll
        for (int t = TT - 1; t >= 0; t--) {
            if (queries && keys && t < n) m_i = fmaxf(m_i, rintf(ak[(int64_t)t * h.m + i]));
            m_t[t] = m_i;
        }
#pragma unroll
        for (int t = 0; t < TT; t++) {
            float4 c = make_float4(1, 0, 0, 0);
            if (queries && t < n) {
                float a = aq[(int64_t)t * h.m + i], e = rintf(a);
                c.x = scan_pow2(m_t[t] - in_scale);
                float weight = scan_exp2(a - e, (e + m_t[t]) - h.r[t]);
                c.y = weight * h.inv[t];
                u_i = c.x * u_i + weight * h.delta[t]; /* delta has its 1 / den */
                in_scale = m_t[t];
            }
            if (keys && t < n) {
                float a = ak[(int64_t)t * h.m + i], e = rintf(a);
                c.z = scan_exp2(a - e, e - m_t[t]);
            }
            c.w = u_i;
            h.coef[t * n_features + i] = c;
        }
        if (queries) {
            u[i0 + i] = u_i;
            scale[i0 + i] = in_scale;
        }
    }
    __syncthreads();
}

/* The exact part of dk, dv of the n keys in row order last to first, the first row at pos: p, ds
 * (queries, TT) over the queries that see one of them, which are [lo, hi). */
template <typename T, int TT>
__device__ void key_scores(const struct scan &h, const bwd_head<T> &f, int64_t pos, int64_t lo,
                           int64_t hi)
{
    for (int64_t s = threadIdx.x; lo + s < hi; s += blockDim.x) {
        int64_t q = lo + s;
        scan_row<T> x_row = row_at(f.q, q), g_row = row_at(f.d_o, q);
        float score[TT] = {0}, dot[TT] = {0};
        for (int j = 0; j < h.d; j++) {
            float x = scan_clamp(row_get(x_row, j) * h.scale), g = row_get(g_row, j);
            float y[TT], v[TT];
            load_vec<TT>(y, h.x + (h.d + j) * h.x_ld);
            load_vec<TT>(v, h.x + (PART_V * h.d + j) * h.x_ld);
#pragma unroll
            for (int t = 0; t < TT; t++) {
                score[t] += x * y[t];
                dot[t] += g * v[t];
            }
        }
        float r = f.r[q], inv = f.inv[q], delta = f.delta[q];
#pragma unroll
        for (int t = 0; t < TT; t++) {
            float a = SCAN_LOG2E * score[t];
            a = a < SCAN_LOW ? SCAN_LOW : a; /* as in window_scores */
            float e = rintf(a);
            float w = pos - t <= q ? scan_exp2(a - e, e - r) : 0.0f;
            score[t] = w * inv;
            dot[t] = w * (inv * dot[t] + delta);
        }
        store_vec<TT>(f.p + s * TT, score);
        store_vec<TT>(f.ds + s * TT, dot);
    }
    __syncthreads();
}

/* The n tokens at `first`, last to first: queries go into R, keys read it (`far`) and get their dk,
 * dv. */
template <typename T, enum scan_form form, bool queries, bool keys>
__device__ void reverse_tile(const struct scan &h, const bwd_head<T> &f, int64_t first, int n,
                             const float *top, bool far, int64_t end)
{
    constexpr int TT = SCAN_TILE;
    constexpr bool hybrid = form == FORM_HYBRID;
    int64_t last = first + n - 1;
    float own[TT][SCAN_COLUMNS], dk[TT][SCAN_COLUMNS] = {{0}}, dv[TT][SCAN_COLUMNS] = {{0}};
    __syncthreads();
    if (threadIdx.x < TT) {
        int64_t pos = last - threadIdx.x;
        bool in = queries && (int)threadIdx.x < n;
        h.r[threadIdx.x] = in ? f.r[pos] : 0.0f;
        h.inv[threadIdx.x] = in ? f.inv[pos] : 0.0f;
        h.delta[threadIdx.x] = in ? f.delta[pos] : 0.0f;
        h.da_1[threadIdx.x] = 0.0f;
    }
    if (queries) {
        load_x<T, TT>(h, 0, f.q, last, -1, n);
        load_part<T, TT, false>(h, PART_D_O, f.d_o, last, -1, n);
    }
    if (keys) {
        load_x<T, TT>(h, 1, f.k, last, -1, n);
        load_part<T, TT, false>(h, PART_V, f.v, last, -1, n);
    }
    __syncthreads();
    if (far) exponents<TT>(h, queries ? 0 : 1, keys ? 2 : 1, hybrid, f.shift);
    if (queries && far) own_columns<T, TT>(h, f.d_o, last, -1, n, own);
    for (int i0 = 0; far && i0 < h.m; i0 += f.features) {
        int n_features = min(f.features, h.m - i0);
        reverse_coefficients<TT, queries, keys>(h, top, f.u, f.scale, n, i0, n_features);
        walk_rows<TT, queries, keys>(h, f.R_t, i0, n_features, PART_D_O, PART_V);
        walk_columns<TT, queries, keys>(h, f.R, i0, n_features, own, dv);
        if (keys) {
            tile_da<TT>(h, n_features, nullptr, nullptr);
            tile_inputs<T, TT>(h, f, 1, i0, n_features, dk);
        }
        __syncthreads();
    }
    if (!keys) return;
    if (hybrid) {
        int64_t hi = min((first / f.window + 2) * f.window, end);
        key_scores<T, TT>(h, f, last, first, hi);
        window_sum<T, TT, true>(h, f.q, first, hi - first, f.ds, dk);
        window_sum<T, TT, false>(h, f.d_o, first, hi - first, f.p, dv);
    }
    store_dx<T, TT>(h, dk, 1, far, f.dk, f.ld, last, -1, n);
    share_columns<TT>(h, dv);
    for (int i = threadIdx.x; i < n * h.d; i += blockDim.x) {
        int t = i / h.d, j = i - t * h.d;
        f.dv[(last - t) * f.ld + j] = from_float<T>(column_sum<TT>(h, t, j));
    }
}

template <typename T, enum scan_form form>
__global__ void __launch_bounds__(SCAN_THREADS) scan_bwd_kernel(const struct scan_bwd_params a)
{
    extern __shared__ float4 smem[];
    constexpr int TT = SCAN_TILE;
    const struct srf_attn_shape &sh = a.s;
    int64_t block = blockIdx.x, seq = block / sh.h, head = block - seq * sh.h, window = sh.window;
    struct scan h = scan_begin(sh, a.scale, a.w_t, a.bias, (int)head, (float *)smem, BWD_PARTS,
                               a.features, ROW_SUMS);
    struct bwd_layout l = bwd_layout_of(sh);
    float *base = a.scratch + block * a.scratch_stride;
    int64_t in = seq * sh.t * a.ld + head * sh.d, out = seq * sh.t * a.ld_o + head * sh.d;
    int64_t set = sh.n_sets == 1 ? 0 : head, md = sh.m * sh.d, end = sh.t;
    h.a = base;
    bwd_head<T> f;
    f.q = {(const T *)a.q + in, a.ld, 0, nullptr, 1, h.d};
    f.k = f.q, f.k.t = (const T *)a.k + in;
    f.v = f.q, f.v.t = (const T *)a.v + in;
    f.o = {(const T *)a.o + out, a.ld_o, 0, nullptr, 1, h.d};
    f.d_o = f.o, f.d_o.t = (const T *)a.d_o + out;
    f.dq = (T *)a.dq + in, f.dk = (T *)a.dk + in, f.dv = (T *)a.dv + in;
    f.ld = a.ld;
    f.w = (const T *)a.w + set * md;
    f.dw = a.dw ? a.dw + block * md : nullptr;
    f.p = base + l.p, f.ds = base + l.ds;
    f.r = base + l.r, f.inv = base + l.inv, f.delta = base + l.delta;
    f.s_t = base + l.s_t, f.z = base + l.z, f.top = base + l.top;
    f.R = base + l.R, f.R_t = base + l.R_t, f.u = base + l.u, f.scale = base + l.scale;
    f.tops = base + l.tops;
    f.window = window;
    f.shift = form == FORM_HYBRID ? log2f((float)h.m) : 0.0f;
    f.features = a.features;
    for (int64_t i = threadIdx.x; i < md; i += blockDim.x) {
        f.s_t[i] = f.R[i] = f.R_t[i] = 0.0f;
        if (f.dw) f.dw[i] = 0.0f;
    }
    for (int64_t i = threadIdx.x; i < sh.m; i += blockDim.x) {
        f.z[i] = f.top[i] = f.u[i] = 0.0f;
        f.scale[i] = -SCAN_UNSET; /* R = 0 in any scale: the first step is 0 */
    }

    if (form == FORM_NONCAUSAL) {
        for (int64_t p = 0; p < end; p += TT) absorb_transposed<T>(h, f, p, tile_rows(p, end));
        for (int64_t p = 0; p < end; p += TT) dq_tile<T, form>(h, f, p, tile_rows(p, end));
        for (int64_t p = 0; p < end; p += TT)
            reverse_tile<T, form, true, false>(h, f, p, tile_rows(p, end), f.top, true, end);
        for (int64_t p = 0; p < end; p += TT)
            reverse_tile<T, form, false, true>(h, f, p, tile_rows(p, end), f.top, true, end);
        return;
    }
    if (form == FORM_PURE) {
        for (int64_t p = 0; p < end; p += TT) dq_tile<T, form>(h, f, p, tile_rows(p, end));
        for (int64_t p = (end - 1) / TT * TT; p >= 0; p -= TT)
            reverse_tile<T, form, true, true>(h, f, p, tile_rows(p, end), f.tops + p / TT * sh.m,
                                              true, end);
        return;
    }
    int64_t blocks = (end + window - 1) / window;
    for (int64_t j = 0; j < blocks; j++) {
        int64_t first = j * window, to = min(first + window, end);
        for (int64_t i = threadIdx.x; i < sh.m; i += blockDim.x) f.tops[j * sh.m + i] = f.top[i];
        for (int64_t p = first; p < to; p += TT) dq_tile<T, form>(h, f, p, tile_rows(p, to));
        if (j == 0 || j + 1 >= blocks) continue;
        for (int64_t p = first - window; p < first; p += TT)
            absorb_transposed<T>(h, f, p, tile_rows(p, first));
    }
    for (int64_t j = blocks - 1; j >= 0; j--) {
        int64_t first = j * window, next = first + 2 * window;
        bool far = next < end;
        /* what the queries of block j + 2 have read */
        const float *top = far ? f.tops + (j + 2) * sh.m : nullptr;
        for (int64_t p = next, to = min(next + window, end); p < to; p += TT)
            reverse_tile<T, form, true, false>(h, f, p, tile_rows(p, to), top, true, end);
        for (int64_t p = first, to = min(first + window, end); p < to; p += TT)
            reverse_tile<T, form, false, true>(h, f, p, tile_rows(p, to), top, far, end);
    }
}

/* dw += the partial sums of the sequences, and of the heads where they share W. */
__global__ void sum_dw_kernel(const float *__restrict__ partial, float *__restrict__ dw, int64_t b,
                              int64_t h, int64_t n_sets, int64_t md)
{
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n_sets * md;
         i += (int64_t)gridDim.x * blockDim.x) {
        int64_t set = i / md, heads = n_sets == 1 ? h : 1;
        float sum = 0;
        for (int64_t seq = 0; seq < b; seq++)
            for (int64_t k = 0; k < heads; k++) sum += partial[(seq * h + set + k) * md + i % md];
        dw[i] += sum;
    }
}

static int features_of(const struct srf_ctx *ctx, int64_t d)
{
    bool fits = scan_smem_bytes(d, BWD_PARTS, SCAN_FEATURES, ROW_SUMS) <= cuda_of(ctx)->smem_max;
    return fits ? SCAN_FEATURES : SCAN_FEATURES / 2;
}

static void carve(struct cuda_bump *b, const struct srf_attn_shape *s, bool dw,
                  struct scan_bwd_params *p, float **w_t)
{
    int64_t heads = s->b * s->h, md = s->m * s->d;
    p->scratch_stride = bwd_layout_of(*s).floats;
    *w_t = (float *)bump_bytes(b, (size_t)(s->n_sets * md) * sizeof(float));
    p->scratch = (float *)bump_bytes(b, (size_t)(heads * p->scratch_stride) * sizeof(float));
    p->dw = dw ? (float *)bump_bytes(b, (size_t)(heads * md) * sizeof(float)) : NULL;
}

size_t srf__scan_bwd_workspace(const struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a)
{
    (void)ctx;
    struct cuda_bump b = {NULL, 0};
    struct scan_bwd_params p;
    float *w_t;
    carve(&b, &a->s, a->dw != NULL, &p, &w_t);
    return b.used;
}

template <typename T>
static void (*kernel_of(const struct srf_attn_shape *s))(const struct scan_bwd_params)
{
    if (s->window) return scan_bwd_kernel<T, FORM_HYBRID>;
    return s->causal ? scan_bwd_kernel<T, FORM_PURE> : scan_bwd_kernel<T, FORM_NONCAUSAL>;
}

srf_status srf__scan_bwd(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    struct scan_bwd_params p = {};
    struct cuda_bump b = {(char *)ctx->workspace, 0};
    float *w_t;
    p.s = *s;
    p.scale = (float)pow((double)s->d, -0.25);
    p.q = a->q, p.k = a->k, p.v = a->v, p.w = a->w, p.o = a->o, p.d_o = a->d_o;
    p.ld = a->ld, p.ld_o = a->ld_o;
    p.bias = (const float *)a->bias;
    p.dq = a->dq, p.dk = a->dk, p.dv = a->dv;
    p.features = features_of(ctx, s->d);
    size_t bytes = scan_smem_bytes(s->d, BWD_PARTS, p.features, ROW_SUMS);
    SRF_TRY(srf__scan_check(ctx, s, bytes));
    carve(&b, s, a->dw != NULL, &p, &w_t);
    SRF_TRY(srf__scan_transpose(ctx, s, a->w, w_t));
    p.w_t = w_t;
    auto kernel = ctx->dtype == SRF_BF16 ? kernel_of<bf16>(s) : kernel_of<float>(s);
    CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    kernel<<<(unsigned)(s->b * s->h), SCAN_THREADS, bytes, stream_of(ctx)>>>(p);
    SRF_TRY(srf__cuda_launched("srf_attn_bwd"));
    if (!a->dw) return SRF_OK;
    int64_t md = s->m * s->d;
    sum_dw_kernel<<<grid_for(ctx, s->n_sets * md, 256, 8), 256, 0, stream_of(ctx)>>>(
        p.dw, (float *)a->dw, s->b, s->h, s->n_sets, md);
    return srf__cuda_launched("srf_attn_bwd: sum of dw");
}
