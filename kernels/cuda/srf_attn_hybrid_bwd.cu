/* The window hybrid's backward. Forms, names and floors are explained in srf_attn_hybrid.cu. */
#include "kernels/cuda/srf_attn_hybrid_walk.h"
#include "kernels/cuda/srf_attn_hybrid_wgmma.h"

/* ---- backward -----------------------------------------------------------------------------------
 * One kernel for rows of queries (dq) and rows of keys (dk, dv). */

template <int D, int C> struct bwd_smem {
    bf16 rows[2][C * (D + 8)]; /* q, d_o or k, v */
    bf16 pair[2][2][C * (D + 8)];
    float half[C], bias[2][C], top[2][C], sum[2][C], stat[2][C], delta[2][C];
};

/* Tile i: keys and values before queries, queries and d_o after keys, then features. */
template <int D, int C, bool KEYS>
__device__ __forceinline__ void load_bwd(struct bwd_smem<D, C> *sm, int stage,
                                         const struct hybrid *p, const struct chunk *c, int i,
                                         int n_exact)
{
    bf16 *pair[2] = {sm->pair[stage][0], sm->pair[stage][1]};
    if (i >= n_exact) {
        load_far<D, C>(pair, sm->bias[stage], sm->top[stage], sm->sum[stage], p, c,
                       KEYS ? c->block : c->block - 2, KEYS ? p->r : p->s, KEYS ? p->u : p->z,
                       (i - n_exact) * C);
        return;
    }
    int token = KEYS ? c->row + i * C : c->row - (n_exact - 1 - i) * C, n = p->t - token;
    int64_t at = c->in + token * p->ld;
    load_rows<D, C, 2 * C>(pair[0], (KEYS ? p->q : p->k) + at, p->ld, n);
    if (KEYS) {
        load_rows<D, C, 2 * C>(pair[1], p->d_o + c->out + token * p->ld_o, p->ld_o, n);
        load_stats<C>(sm->stat[stage], sm->delta[stage], p, c->bh * p->t + token, n);
    } else {
        load_rows<D, C, 2 * C>(pair[1], p->v + at, p->ld, n);
    }
}

/* delta = -d_o.o of C rows, whose pieces this thread loaded itself. */
template <int D, int C, int THREADS>
__device__ __forceinline__ void row_deltas(const bf16 *d_o, const bf16 *o, float *delta)
{
    constexpr int T = row_threads<D>();
    int row = threadIdx.x / T, piece = threadIdx.x % T;
#pragma unroll
    for (int r = 0; r < C; r += THREADS / T) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < D / 8; i += T) {
            int at = (row + r) * (D + 8) + (piece + i) * 8;
            const uint32_t *x = (const uint32_t *)(d_o + at), *y = (const uint32_t *)(o + at);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float2 a = unpack_bf16(x[j]), b = unpack_bf16(y[j]);
                sum = fmaf(a.x, b.x, sum);
                sum = fmaf(a.y, b.y, sum);
            }
        }
#pragma unroll
        for (int k = T / 2; k; k >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, k);
        if (piece == 0) delta[row + r] = -sum;
    }
}

/* Sums of 16 rows: dq, or dk and dv, before their last factors; the sum of da over features. */
template <int D, bool KEYS> struct grad_sums {
    float x[D / 8][4], v[KEYS ? D / 8 : 1][4], sum[2];
};
template <int D, bool KEYS>
__device__ __forceinline__ void start_grads(struct grad_sums<D, KEYS> *r)
{
    zero(r->x);
    zero(r->v);
    r->sum[0] = r->sum[1] = 0;
}
struct row_values { /* of rows g, g + 8: |x|^2 / 2; of queries stat, delta */
    float half[2], stat[2], delta[2];
};
struct col_values { /* of a tile's columns: queries' stat, delta; features' bias, M, z or u */
    const float *stat, *delta, *bias, *top, *sum;
};

/* A tile's part of the gradients of a warp's rows (x, y: q, d_o or k, v). causal: the tile of the
 * rows' own tokens. left: how many features a tile of them has. */
template <int D, int C, bool KEYS, bool FAR, int SUB = COLUMNS>
__device__ __forceinline__ void
add_gradients(struct grad_sums<D, KEYS> *r, struct a_rows<D> *x, struct a_rows<D> *y,
              const bf16 *tile, const bf16 *values, const struct col_values *col_of,
              const struct row_values *row_of, const struct hybrid *p, bool causal, int left)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, quad = lane & 3;
#pragma unroll 1
    for (int first = 0; first < C; first += SUB) {
        /* Nothing to see in a piece all before or all after this warp's rows. */
        if (causal && (KEYS ? first + SUB <= warp * 16 : first > warp * 16 + 15)) continue;
        float e[SUB / 8][4], da[SUB / 8][4];
        zero(e);
        zero(da);
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++)
            mma_rows<D, SUB / 8>(e, x->get(kk), tile + first * (D + 8), kk);
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++)
            mma_rows<D, SUB / 8>(da, y->get(kk), values + first * (D + 8), kk);
#pragma unroll
        for (int n = 0; n < SUB / 8; n++) {
            int col = first + n * 8 + quad * 2;
            float2 a = {0, 0}, b = {0, 0}, c = {0, 0};
            if (FAR) {
                a = *(const float2 *)(col_of->bias + col);
                b = *(const float2 *)(col_of->top + col);
                c = *(const float2 *)(col_of->sum + col);
            } else if (KEYS) {
                b = *(const float2 *)(col_of->stat + col);
                c = *(const float2 *)(col_of->delta + col);
            }
            bool in = !FAR || n * 8 + first + quad * 2 < left;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float top = j & 1 ? b.y : b.x, add = j & 1 ? c.y : c.x;
                float stat = row_of->stat[j >> 1], delta = row_of->delta[j >> 1];
                float half = row_of->half[j >> 1];
                if (FAR) {
                    float bias = SRF__LOG2E * (j & 1 ? a.y : a.x);
                    float more = KEYS ? bias - half : bias - p->log2_m + top - half;
                    e[n][j] = fmaf(e[n][j], SRF__LOG2E * p->scale, more) - (KEYS ? top : stat);
                    e[n][j] = in ? far_weight(e[n][j]) : 0;
                    da[n][j] = e[n][j] * (da[n][j] + (KEYS ? add : add * delta));
                } else {
                    /* Rounded as in forward: no weight may be above 1 there. */
                    e[n][j] = __fmul_rn(e[n][j], 2 * p->half_scale) - (KEYS ? top : stat);
                    e[n][j] = exp2_fast(e[n][j]);
                    da[n][j] = e[n][j] * (da[n][j] + (KEYS ? add : delta));
                }
            }
        }
        if (causal) {
            int row = warp * 16 + g - quad * 2 - first;
#pragma unroll
            for (int n = 0; n < SUB / 8; n++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    int off = n * 8 + (j & 1) - (j >> 1) * 8;
                    if (KEYS ? off < row : off > row) e[n][j] = da[n][j] = 0;
                }
        }
#pragma unroll
        for (int n = 0; n < SUB / 8; n += 2) {
            uint32_t a[4];
            pack_a(a, da[n], da[n + 1]);
            if (FAR)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float2 f = unpack_bf16(a[j]);
                    r->sum[j & 1] += f.x + f.y;
                }
            mma_cols<D>(r->x, a, tile + (first + n * 8) * (D + 8));
            if constexpr (KEYS) {
                pack_a(a, e[n], e[n + 1]);
                mma_cols<D>(r->v, a, values + (first + n * 8) * (D + 8));
            }
        }
    }
}

/* The last factors: da W - sum x, and d^(-1/4) of x. rows: the warp's q or k. */
template <int D, bool KEYS>
__device__ __forceinline__ void finish_grads(struct grad_sums<D, KEYS> *r, struct a_rows<D> *x,
                                             const struct hybrid *p)
{
#pragma unroll
    for (int j = 0; j < 2; j++) {
        float by = p->scale * quad_sum(r->sum[j]);
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                /* An A fragment holds what a C fragment does of the same 16 columns. */
                float2 f = unpack_bf16(x->get(kk)[2 * i + j]);
                float *at = r->x[2 * kk + i] + 2 * j;
                at[0] = p->scale * (at[0] - by * f.x);
                at[1] = p->scale * (at[1] - by * f.y);
            }
    }
}

template <int D, int C, bool KEYS>
__global__ void __launch_bounds__(2 * C) bwd_kernel(const __grid_constant__ struct hybrid p)
{
    extern __shared__ __align__(16) char smem[];
    struct bwd_smem<D, C> *sm = (struct bwd_smem<D, C> *)smem;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, quad = lane & 3;
    struct chunk c = chunk_of<D, C>(&p);
    int n_exact = KEYS ? (min(p.t, (c.block + 2) * p.window) - c.row + C - 1) / C
                       : (c.row - max(c.block - 1, 0) * p.window) / C + 1;
    int causal = KEYS ? 0 : n_exact - 1; /* the tile of the rows' own tokens */
    bool far = KEYS ? c.block < p.n_slots : c.block >= 2;
    int n_tiles = n_exact + (far ? (p.m + C - 1) / C : 0);
    int n_rows = p.t - c.row;
    int64_t in = c.in + c.row * p.ld, out = c.out + c.row * p.ld_o;

    load_rows<D, C, 2 * C>(sm->rows[0], (KEYS ? p.k : p.q) + in, p.ld, n_rows);
    if (KEYS) {
        load_rows<D, C, 2 * C>(sm->rows[1], p.v + in, p.ld, n_rows);
    } else {
        load_rows<D, C, 2 * C>(sm->rows[1], p.d_o + out, p.ld_o, n_rows);
        load_rows<D, C, 2 * C>(sm->pair[1][0], p.o + out, p.ld_o, n_rows);
    }
    cp_async_commit();
    load_bwd<D, C, KEYS>(sm, 0, &p, &c, 0, n_exact);
    cp_async_commit();
    cp_async_wait<1>();
    clean_rows<D, C, 2 * C, true>(sm->rows[0], &p, sm->half);
    if (!KEYS) {
        row_deltas<D, C, 2 * C>(sm->rows[1], sm->pair[1][0], sm->delta[0]);
    }
    __syncthreads();
    struct a_rows<D> x, y;
    x.init(sm->rows[0] + warp * 16 * (D + 8));
    y.init(sm->rows[1] + warp * 16 * (D + 8));
    struct row_values rows = {};
    for (int j = 0; j < 2; j++) {
        int row = warp * 16 + g + 8 * j;
        rows.half[j] = sm->half[row];
        if (KEYS) continue;
        rows.stat[j] = row < n_rows ? p.stat[c.bh * p.t + c.row + row] : INFINITY;
        rows.delta[j] = sm->delta[0][row];
        if (quad == 0 && row < n_rows) p.delta[c.bh * p.t + c.row + row] = rows.delta[j];
    }
    struct grad_sums<D, KEYS> grads;
    start_grads(&grads);

    for (int i = 0; i < n_tiles; i++) {
        int stage = i & 1;
        if (i + 1 < n_tiles) load_bwd<D, C, KEYS>(sm, stage ^ 1, &p, &c, i + 1, n_exact);
        cp_async_commit();
        cp_async_wait<1>();
        if (i < n_exact) clean_rows<D, C, 2 * C, false>(sm->pair[stage][0], &p, NULL);
        __syncthreads();
        const bf16 *tile = sm->pair[stage][0], *values = sm->pair[stage][1];
        struct col_values cols = {sm->stat[stage], sm->delta[stage], sm->bias[stage],
                                  sm->top[stage], sm->sum[stage]};
        if (i < n_exact)
            add_gradients<D, C, KEYS, false>(&grads, &x, &y, tile, values, &cols, &rows, &p,
                                             i == causal, 0);
        else
            add_gradients<D, C, KEYS, true>(&grads, &x, &y, tile, values, &cols, &rows, &p, false,
                                            p.m - (i - n_exact) * C);
        /* Scores are of x and y / d^(1/4) here, features' inputs of x: one factor for both. */
        if (i == n_exact - 1) scale_rows(grads.x, p.scale, p.scale);
        __syncthreads();
    }
    finish_grads(&grads, &x, &p);
    int64_t at = in + warp * 16 * p.ld;
    store_rows<D>((KEYS ? p.dk : p.dq) + at, p.ld, n_rows - warp * 16, grads.x);
    if constexpr (KEYS) store_rows<D>(p.dv + at, p.ld, n_rows - warp * 16, grads.v);
}

/* ---- dq in one walk: window 64, m <= 64, d <= 64 ------------------------------------------------
 * As the forward in one walk. Of the states only M is stored, for the walk over queries. */

template <int D> struct fused_dq_smem {
    bf16 d_o[64 * (D + 8)];
    struct fused_smem<D> fwd;
};

template <int D>
__global__ void __launch_bounds__(128, 3) fused_dq_kernel(const __grid_constant__ struct hybrid p)
{
    extern __shared__ __align__(16) char smem[];
    struct fused_smem<D> *sm = &((struct fused_dq_smem<D> *)smem)->fwd;
    bf16 *d_o = ((struct fused_dq_smem<D> *)smem)->d_o;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, quad = lane & 3;
    struct walker w = walker_of<D>(&p);
    bool active = w.feature < p.m;

    struct state_sums<D> state;
    float bias[2];
    start_walk<D>(sm, &state, bias, &p, &w);
    load_rows<D, 64, 128>(d_o, p.d_o + w.out + w.begin * 64 * p.ld_o, p.ld_o, p.t - w.begin * 64);
    cp_async_commit();

    for (int block = w.begin; block < w.end; block++) {
        int now = block & 1, before = now ^ 1, row0 = block * 64 + warp * 16;
        arrive<D>(sm, &p, block, block == w.begin);
        struct a_rows<D> x, y;
        x.init(sm->q + warp * 16 * (D + 8));
        y.init(d_o + warp * 16 * (D + 8));
        struct row_values rows;
        for (int j = 0; j < 2; j++) {
            int row = row0 + g + 8 * j;
            const bf16 *o = p.o + w.out + (row < p.t ? row : 0) * p.ld_o + quad * 2;
            float sum = 0;
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float2 a = unpack_bf16(y.get(kk)[2 * i + j]);
                    float2 b = unpack_bf16(*(const uint32_t *)(o + kk * 16 + i * 8));
                    sum = fmaf(a.x, b.x, sum);
                    sum = fmaf(a.y, b.y, sum);
                }
            rows.delta[j] = -quad_sum(sum);
            rows.half[j] = sm->half_q[warp * 16 + g + 8 * j];
            rows.stat[j] = row < p.t ? p.stat[w.bh * p.t + row] : INFINITY;
            if (quad == 0 && row < p.t) p.delta[w.bh * p.t + row] = rows.delta[j];
        }
        struct grad_sums<D, false> grads;
        start_grads(&grads);
        struct col_values cols = {NULL, NULL, sm->bias, sm->top, sm->z};
        if (block >= 2) {
            publish_state<D>(sm, &state, w.feature);
            for (int j = 0; j < 2; j++)
                if (active && quad == 0)
                    p.top[(w.bh * p.n_slots + block - 2) * p.m + w.feature + g + 8 * j] =
                        state.top[j];
        }
        if (block) {
            add_gradients<D, 64, false, false>(&grads, &x, &y, sm->pair[before][0],
                                               sm->pair[before][1], &cols, &rows, &p, false, 0);
            if (active && block + 1 < w.n_blocks)
                take_block<D>(sm, &state, bias, &p, before, w.feature);
        }
        __syncthreads();
        if (block + 1 < w.end) {
            int next = (block + 1) * 64;
            load_fused<D>(sm, &p, w.in, block + 1, true);
            load_rows<D, 64, 128>(d_o, p.d_o + w.out + next * p.ld_o, p.ld_o, p.t - next);
        }
        cp_async_commit();
        add_gradients<D, 64, false, false>(&grads, &x, &y, sm->pair[now][0], sm->pair[now][1],
                                           &cols, &rows, &p, true, 0);
        scale_rows(grads.x, p.scale, p.scale);
        if (block >= 2)
            add_gradients<D, 64, false, true>(&grads, &x, &y, sm->w, sm->s, &cols, &rows, &p, false,
                                              p.m);
        finish_grads(&grads, &x, &p);
        store_rows<D>(p.dq + w.in + row0 * p.ld, p.ld, p.t - row0, grads.x);
    }
}

/* ---- dk, dv in one walk: as dq, backward ------------------------------------------------------
 * Before block j a CTA holds R of the queries from block j + 2 on; it puts it into shared memory
 * for the keys, then takes in the queries of block j + 1, which are still there. */

/* pair: q, d_o of even and odd blocks. */
template <int D> struct fused_keys_smem {
    bf16 k[64 * (D + 8)], v[64 * (D + 8)], pair[2][2][64 * (D + 8)];
    bf16 w[64 * (D + 8)], r[64 * (D + 8)];
    float half_k[64], half_q[2][64], stat[2][64], delta[2][64], bias[64], top[64], u[64];
};

template <int D>
__device__ __forceinline__ void load_queries(struct fused_keys_smem<D> *sm, const struct hybrid *p,
                                             const struct walker *w, int block)
{
    const int row = block * 64, n = p->t - row, s = block & 1;
    load_rows<D, 64, 128>(sm->pair[s][0], p->q + w->in + row * p->ld, p->ld, n);
    load_rows<D, 64, 128>(sm->pair[s][1], p->d_o + w->out + row * p->ld_o, p->ld_o, n);
    load_stats<64>(sm->stat[s], sm->delta[s], p, w->bh * p->t + row, n);
}
template <int D>
__device__ __forceinline__ void load_keys(struct fused_keys_smem<D> *sm, const struct hybrid *p,
                                          const struct walker *w, int block)
{
    const int row = block * 64, n = p->t - row;
    load_rows<D, 64, 128>(sm->k, p->k + w->in + row * p->ld, p->ld, n);
    load_rows<D, 64, 128>(sm->v, p->v + w->in + row * p->ld, p->ld, n);
}

template <int D>
__global__ void __launch_bounds__(128, 3) fused_keys_kernel(const __grid_constant__ struct hybrid p)
{
    extern __shared__ __align__(16) char smem[];
    struct fused_keys_smem<D> *sm = (struct fused_keys_smem<D> *)smem;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2;
    struct walker w = walker_of<D>(&p);
    bool active = w.feature < p.m;
    int own = w.feature + g;

    struct state_sums<D> state;
    float bias[2] = {0, 0};
    load_rows<D, 64, 128>(sm->w, p.w + w.set * p.w_step, D, p.m);
    load_features<64>(sm->bias, p.bias + w.set * p.bias_step, p.m);
    if (w.end < w.n_blocks) load_queries(sm, &p, &w, w.end);
    load_queries(sm, &p, &w, w.end - 1);
    load_keys(sm, &p, &w, w.end - 1);
    cp_async_commit();
    start_state(&state);
    if (active) {
        for (int j = 0; j < 2; j++)
            bias[j] = SRF__LOG2E * p.bias[w.set * p.bias_step + own + 8 * j] - p.log2_m;
        add_segments<D, true>(&state, &p, w.bh, w.seg, w.feature);
    }

    for (int block = w.end - 1; block >= w.begin; block--) {
        int now = block & 1, after = now ^ 1, row0 = block * 64 + warp * 16;
        bool is_first = block == w.end - 1, is_last_block = block + 1 == w.n_blocks;
        float top[2] = {0,
                        0}; /* of the scale that R comes into with the queries after this block */
        if (active && block > 0 && !is_last_block)
            for (int j = 0; j < 2; j++)
                top[j] = p.top[(w.bh * p.n_slots + block - 1) * p.m + own + 8 * j];
        cp_async_wait<0>();
        clean_rows<D, 64, 128, true>(sm->k, &p, sm->half_k);
        clean_rows<D, 64, 128, true>(sm->pair[now][0], &p, sm->half_q[now]);
        if (is_first && !is_last_block)
            clean_rows<D, 64, 128, true>(sm->pair[after][0], &p, sm->half_q[after]);
        __syncthreads();
        struct a_rows<D> x, y;
        x.init(sm->k + warp * 16 * (D + 8));
        y.init(sm->v + warp * 16 * (D + 8));
        struct row_values rows = {};
        for (int j = 0; j < 2; j++) rows.half[j] = sm->half_k[warp * 16 + g + 8 * j];
        if (block < p.n_slots) put_state<D>(sm->r, sm->u, sm->top, &state, w.feature);
        if (active && block > 0 && !is_last_block) {
            uint32_t a[D / 16][4];
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++) load_a<D>(a[kk], sm->w + w.feature * (D + 8), kk);
            add_queries<D, 64>(&state, a, bias, sm->pair[after][0], sm->pair[after][1],
                               sm->half_q[after], sm->stat[after], sm->delta[after], top, &p);
        }
        struct grad_sums<D, true> grads;
        start_grads(&grads);
        struct col_values cols = {sm->stat[after], sm->delta[after], sm->bias, sm->top, sm->u};
        if (!is_last_block)
            add_gradients<D, 64, true, false, 16>(&grads, &x, &y, sm->pair[after][0],
                                                  sm->pair[after][1], &cols, &rows, &p, false, 0);
        __syncthreads();
        if (block > w.begin) {
            load_queries(sm, &p, &w, block - 1);
            load_keys(sm, &p, &w, block - 1);
        }
        cp_async_commit();
        cols.stat = sm->stat[now];
        cols.delta = sm->delta[now];
        add_gradients<D, 64, true, false, 16>(&grads, &x, &y, sm->pair[now][0], sm->pair[now][1],
                                              &cols, &rows, &p, true, 0);
        scale_rows(grads.x, p.scale, p.scale);
        if (block < p.n_slots)
            add_gradients<D, 64, true, true, 16>(&grads, &x, &y, sm->w, sm->r, &cols, &rows, &p,
                                                 false, p.m);
        finish_grads(&grads, &x, &p);
        store_rows<D>(p.dk + w.in + row0 * p.ld, p.ld, p.t - row0, grads.x);
        store_rows<D>(p.dv + w.in + row0 * p.ld, p.ld, p.t - row0, grads.v);
    }
}

/* ---- dW -----------------------------------------------------------------------------------------
 * A CTA has a walk's features and segment, and makes its sum of da^T x (queries) or da^T y (keys).
 */

template <int D, int C, bool QUERIES>
__global__ void __launch_bounds__(WALK_THREADS) dw_kernel(const __grid_constant__ struct hybrid p)
{
    extern __shared__ __align__(16) char smem[];
    struct walk_smem<D, C> *sm = (struct walk_smem<D, C> *)smem;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, quad = lane & 3;
    int groups = (p.m + CTA_FEATURES - 1) / CTA_FEATURES;
    int seg = blockIdx.x % p.n_seg, group = blockIdx.x / p.n_seg % groups;
    int64_t bh = blockIdx.x / p.n_seg / groups, n_bh = gridDim.x / p.n_seg / groups;
    int feature = group * CTA_FEATURES + warp * WARP_FEATURES;
    bool active = feature < p.m;
    int lo = seg * p.seg_slots, hi = min(lo + p.seg_slots, p.n_slots);
    int n_tiles = (hi - lo) * (p.window / C), slot;

    begin_tiles<D, C, QUERIES>(sm, &p, bh, lo, hi, n_tiles);
    uint32_t w[D / 16][4] = {}, state[D / 16][4] = {};
    float bias[2] = {0, 0}, top[2] = {0, 0}, weight[2] = {0, 0}, acc[D / 8][4];
    zero(acc);
    if (active) {
        load_features<D, QUERIES>(w, bias, &p, bh, feature);
    }
    for (int i = 0; i < n_tiles; i++) {
        int stage = i % WALK_STAGES, ahead = i + WALK_STAGES - 1;
        if (ahead < n_tiles) {
            int token = walk_token<C, QUERIES>(&p, lo, hi, ahead, &slot);
            load_walk<D, C, QUERIES>(sm, ahead % WALK_STAGES, &p, bh, token);
        }
        cp_async_commit();
        cp_async_wait<WALK_STAGES - 1>();
        clean_rows<D, C, WALK_THREADS, true>(sm->pair[stage][0], &p, sm->half[stage]);
        __syncthreads();
        walk_token<C, QUERIES>(&p, lo, hi, i, &slot);
        if (active) {
            int64_t row = (bh * p.n_slots + slot) * p.m + feature;
            load_a_global<D>(state, (QUERIES ? p.s : p.r) + row * D);
            for (int j = 0; j < 2; j++) {
                top[j] = p.top[row + g + 8 * j];
                weight[j] = (QUERIES ? p.z : p.u)[row + g + 8 * j];
            }
#pragma unroll 1
            for (int first = 0; first < C; first += COLUMNS) {
                const bf16 *tokens = sm->pair[stage][0] + first * (D + 8);
                const bf16 *values = sm->pair[stage][1] + first * (D + 8);
                float e[COLUMNS / 8][4], da[COLUMNS / 8][4];
                zero(e);
                zero(da);
#pragma unroll
                for (int kk = 0; kk < D / 16; kk++) {
                    mma_rows<D, COLUMNS / 8>(e, w[kk], tokens, kk);
                    mma_rows<D, COLUMNS / 8>(da, state[kk], values, kk);
                }
#pragma unroll
                for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        int col = first + n * 8 + quad * 2 + (j & 1), r = j >> 1;
                        float to = QUERIES ? top[r] - sm->stat[stage][col] : -top[r];
                        float dp =
                            da[n][j] + (QUERIES ? weight[r] * sm->delta[stage][col] : weight[r]);
                        float add = bias[r] - sm->half[stage][col];
                        da[n][j] = far_weight(fmaf(e[n][j], SRF__LOG2E * p.scale, add) + to) * dp;
                    }
#pragma unroll
                for (int n = 0; n < COLUMNS / 8; n += 2) {
                    uint32_t a[4];
                    pack_a(a, da[n], da[n + 1]);
                    mma_cols<D>(acc, a, tokens + n * 8 * (D + 8));
                }
            }
        }
        __syncthreads();
    }
    if (!active) return;
    int64_t part = ((QUERIES ? 0 : n_bh) + bh) * p.n_seg + seg;
    for (int j = 0; j < 2; j++) {
        float *to = p.dw_part + (part * p.m + feature + g + 8 * j) * D + quad * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *(float2 *)(to + n * 8) =
                make_float2(p.scale * acc[n][2 * j], p.scale * acc[n][2 * j + 1]);
    }
}

/* dw (n_sets, n) += the parts of its heads, (2, n_seq, heads, n_seg, n), one after the other. */
static __global__ void dw_sum_kernel(float *dw, const float *part, int64_t n, int n_sets,
                                     int64_t n_seq, int heads, int n_seg)
{
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n_sets * n) return;
    int64_t set = i / n, at = i - set * n;
    float sum = 0;
    for (int64_t s = 0; s < 2 * n_seq; s++)
        for (int h = n_sets > 1 ? (int)set : 0; h < (n_sets > 1 ? (int)set + 1 : heads); h++)
            for (int seg = 0; seg < n_seg; seg++)
                sum += part[((s * heads + h) * n_seg + seg) * n + at];
    dw[i] += sum;
}

/* ---- launches -------------------------------------------------------------------------------- */

template <int D>
static srf_status fused_bwd(struct srf_ctx *ctx, const struct hybrid *p,
                            const struct srf_srf_attn_bwd_args *a)
{
    const int64_t n_bh = a->s.b * a->s.h, grid = n_bh * p->n_seg;
    if (p->wgmma) {
        SRF_TRY(srf__hybrid_wgmma_dq(ctx, a, p));
        return srf__hybrid_wgmma_keys(ctx, a, p);
    }
    static_assert(sizeof(struct fused_dq_smem<D>) <= hybrid_smem_most(D, 64) &&
                      sizeof(struct fused_keys_smem<D>) <= hybrid_smem_most(D, 64),
                  "srf__hybrid_takes asks for less");
    SRF_TRY(srf__hybrid_totals(ctx, p, D, n_bh, false));
    LAUNCH((fused_dq_kernel<D>), grid, 128, sizeof(struct fused_dq_smem<D>), *p);
    SRF_TRY(srf__hybrid_totals(ctx, p, D, n_bh, true));
    LAUNCH((fused_keys_kernel<D>), grid, 128, sizeof(struct fused_keys_smem<D>), *p);
    return srf__cuda_launched("srf_attn_bwd");
}

template <int D, int C>
static srf_status bwd(struct srf_ctx *ctx, const struct hybrid *p,
                      const struct srf_srf_attn_bwd_args *a)
{
    int64_t n_bh = a->s.b * a->s.h, grid = n_bh * p->n_chunks;
    constexpr size_t smem = sizeof(struct bwd_smem<D, C>);
    static_assert(smem <= hybrid_smem_most(D, C), "srf__hybrid_takes asks for less");
    if constexpr (D <= 64 && C == 64)
        if (p->fused) return fused_bwd<D>(ctx, p, a);
    SRF_TRY(srf__hybrid_walk(ctx, p, D, n_bh, false));
    LAUNCH((bwd_kernel<D, C, false>), grid, 2 * C, smem, *p);
    SRF_TRY(srf__hybrid_walk(ctx, p, D, n_bh, true));
    LAUNCH((bwd_kernel<D, C, true>), grid, 2 * C, smem, *p);
    if (p->dw_part) {
        int64_t walks = n_bh * div_up(p->m, CTA_FEATURES) * p->n_seg, n = a->s.m * D;
        size_t bytes = sizeof(struct walk_smem<D, C>);
        LAUNCH((dw_kernel<D, C, true>), walks, WALK_THREADS, bytes, *p);
        LAUNCH((dw_kernel<D, C, false>), walks, WALK_THREADS, bytes, *p);
        dw_sum_kernel<<<(unsigned)div_up(a->s.n_sets * n, 128), 128, 0, stream_of(ctx)>>>(
            (float *)a->dw, p->dw_part, n, (int)a->s.n_sets, a->s.b, p->heads, p->n_seg);
    }
    return srf__cuda_launched("srf_attn_bwd");
}

bool srf__hybrid_takes_bwd(const struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a)
{
    return srf__hybrid_takes(ctx, &a->s, a->ld, a->ld_o,
                             (uintptr_t)a->q | (uintptr_t)a->k | (uintptr_t)a->v | (uintptr_t)a->w |
                                 (uintptr_t)a->bias | (uintptr_t)a->o | (uintptr_t)a->d_o |
                                 (uintptr_t)a->dq | (uintptr_t)a->dk | (uintptr_t)a->dv);
}

size_t srf__hybrid_bwd_workspace(const struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a)
{
    struct hybrid p = {};
    return srf__hybrid_takes(ctx, &a->s, a->ld, a->ld_o, 0)
               ? srf__hybrid_carve(ctx, &a->s, true, a->dw != NULL, NULL, &p)
               : 0;
}

srf_status srf__hybrid_bwd(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a)
{
    struct hybrid p = {};
    if (a->s.b * a->s.t == 0) return SRF_OK;
    srf__hybrid_carve(ctx, &a->s, true, a->dw != NULL, ctx->workspace, &p);
    p.q = (const bf16 *)a->q;
    p.k = (const bf16 *)a->k;
    p.v = (const bf16 *)a->v;
    p.w = (const bf16 *)a->w;
    p.bias = (const float *)a->bias;
    p.o = (bf16 *)a->o; /* read only here */
    p.d_o = (const bf16 *)a->d_o;
    p.stat = (float *)a->stat; /* read only here */
    p.dq = (bf16 *)a->dq;
    p.dk = (bf16 *)a->dk;
    p.dv = (bf16 *)a->dv;
    p.ld = a->ld;
    p.ld_o = a->ld_o;
    if (p.given && a->carry)
        p.entry = (float *)a->carry; /* read only here */
    else if (p.given)
        SRF_TRY(srf__state_sums(ctx, &a->s, a->k, a->v, a->ld, a->w, a->bias, p.n_seg, p.seg_slots,
                                p.team, p.entry));
    FOR_HEAD_SIZE(a->s.d, a->s.window, bwd, ctx, &p, a)
}
