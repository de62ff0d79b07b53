/* What the kernels of the window hybrid share, second part: a state on its walk through the blocks
 * of a head, the rows of a CTA, and launches. Forms and names are explained in srf_attn_hybrid.cu.
 */
#pragma once
#include "kernels/cuda/srf_attn_hybrid_tiles.h"

/* srf_attn_hybrid_walk.cu, for one head size d. The sums of keys or queries in each segment, where
 * there are several; every slot's state, S of keys or R of queries. */
srf_status srf__hybrid_totals(struct srf_ctx *ctx, const struct hybrid *p, int64_t d, int64_t n_bh,
                              bool queries);
srf_status srf__hybrid_walk(struct srf_ctx *ctx, const struct hybrid *p, int64_t d, int64_t n_bh,
                            bool queries);

#ifdef __CUDACC__
#define LAUNCH(kernel, grid, threads, smem, ...)                                                   \
    do {                                                                                           \
        CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,         \
                                      (int)(smem)));                                               \
        CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,      \
                                      cudaSharedmemCarveoutMaxShared));                            \
        (kernel)<<<(unsigned)(grid), (threads), (smem), stream_of(ctx)>>>(__VA_ARGS__);            \
    } while (0)

/* The kernels of a head size, for either tile: blocks are a number of them. */
#define CASE(D, window, op, ...)                                                                   \
    case D:                                                                                        \
        return (window) % 64 ? op<D, 32>(__VA_ARGS__) : op<D, 64>(__VA_ARGS__)
#define FOR_HEAD_SIZE(d, window, op, ...)                                                          \
    switch (d) {                                                                                   \
        CASE(32, window, op, __VA_ARGS__);                                                         \
        CASE(64, window, op, __VA_ARGS__);                                                         \
        CASE(80, window, op, __VA_ARGS__);                                                         \
        CASE(96, window, op, __VA_ARGS__);                                                         \
    default:                                                                                       \
        return (window) % 64 ? op<128, 32>(__VA_ARGS__) : op<128, 64>(__VA_ARGS__);                \
    }

/* ---- walks --------------------------------------------------------------------------------------
 * Transposed products, 16 features a warp by C tokens: the weights of a tile are the A operand of
 * the sum they go into. Shared memory: WALK_STAGES x (tokens, values,
 * |tokens|^2 / 2, stat, delta). */

template <int D, int C> struct walk_smem {
    bf16 pair[WALK_STAGES][2][C * (D + 8)];
    float half[WALK_STAGES][C], stat[WALK_STAGES][C], delta[WALK_STAGES][C];
};

/* Tile i of a walk over slots [lo, hi): where its tokens start, and whose slot it belongs to. */
template <int C, bool QUERIES>
__device__ __forceinline__ int walk_token(const struct hybrid *p, int lo, int hi, int i, int *slot)
{
    int per_block = p->window / C, block = i / per_block, part = i - block * per_block;
    *slot = QUERIES ? hi - 1 - block : lo + block;
    return (*slot + (QUERIES ? 2 : 0)) * p->window + part * C;
}

template <int D, int C, bool QUERIES>
__device__ __forceinline__ void load_walk(struct walk_smem<D, C> *sm, int stage,
                                          const struct hybrid *p, int64_t bh, int token)
{
    int64_t seq = bh / p->heads, head = bh % p->heads;
    int n = min(C, p->t - token);
    int64_t in = (seq * p->t + token) * p->ld + head * D;
    load_rows<D, C, WALK_THREADS>(sm->pair[stage][0], (QUERIES ? p->q : p->k) + in, p->ld, n);
    if (QUERIES) {
        int64_t out = (seq * p->t + token) * p->ld_o + head * D;
        load_rows<D, C, WALK_THREADS>(sm->pair[stage][1], p->d_o + out, p->ld_o, n);
        load_stats<C>(sm->stat[stage], sm->delta[stage], p, bh * p->t + token, n);
    } else {
        load_rows<D, C, WALK_THREADS>(sm->pair[stage][1], p->v + in, p->ld, n);
    }
}

/* W and biases of a warp's features. */
template <int D, bool QUERIES>
__device__ __forceinline__ void load_features(uint32_t (&w)[D / 16][4], float (&bias)[2],
                                              const struct hybrid *p, int64_t bh, int feature)
{
    int g = (threadIdx.x & 31) >> 2;
    int64_t set = bh % p->heads;
    load_a_global<D>(w, p->w + set * p->w_step + (int64_t)feature * D);
    for (int j = 0; j < 2; j++)
        bias[j] = SRF__LOG2E * p->bias[set * p->bias_step + feature + g + 8 * j] -
                  (QUERIES ? p->log2_m : 0);
}

/* The first tiles of a walk are sent for. */
template <int D, int C, bool QUERIES>
__device__ __forceinline__ void begin_tiles(struct walk_smem<D, C> *sm, const struct hybrid *p,
                                            int64_t bh, int lo, int hi, int n_tiles)
{
    int slot;
    for (int i = 0; i < WALK_STAGES - 1; i++) {
        int token = walk_token<C, QUERIES>(p, lo, hi, i, &slot);
        if (i < n_tiles) load_walk<D, C, QUERIES>(sm, i, p, bh, token);
        cp_async_commit();
    }
}

/* 16 features of a state in a warp: S; z of rows g, g + 8 in 0, 2, shares of a sum over the quad;
 * R, u of queries likewise. */
template <int D> struct state_sums {
    float s[D / 8][4], z[4], top[2];
};
template <int D> __device__ __forceinline__ void start_state(struct state_sums<D> *st)
{
    zero(st->s);
    st->z[0] = st->z[1] = st->z[2] = st->z[3] = 0;
    st->top[0] = st->top[1] = SRF__UNSET;
}

/* The segments before this one (after it, for queries), in their order. */
template <int D, bool QUERIES>
__device__ __forceinline__ void add_segments(struct state_sums<D> *st, const struct hybrid *p,
                                             int64_t bh, int seg, int feature)
{
    int lane = threadIdx.x & 31, g = lane >> 2, quad = lane & 3;
    int n_before = QUERIES ? p->n_seg - 1 - seg : seg;
    for (int i = 0; i < n_before; i++) {
        int other = QUERIES ? p->n_seg - 1 - i : i;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int64_t row = (bh * p->n_seg + other) * p->m + feature + g + 8 * j;
            int64_t slot_row =
                (bh * p->n_slots + other * p->seg_slots) * p->m + feature + g + 8 * j;
            float to = QUERIES ? p->top[slot_row] : p->sum_top[row];
            float next = QUERIES ? to : fmaxf(st->top[j], to);
            float step = st->top[j] == SRF__UNSET ? 0 : exp2_fast(-fabsf(next - st->top[j]));
            float by = exp2_fast(to - next);
            st->z[2 * j] = st->z[2 * j] * step + (quad == 0 ? by * p->sum_z[row] : 0);
            st->top[j] = next;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                float2 x = *(const float2 *)(p->sum_s + row * D + n * 8 + quad * 2);
                st->s[n][2 * j] = st->s[n][2 * j] * step + by * x.x;
                st->s[n][2 * j + 1] = st->s[n][2 * j + 1] * step + by * x.y;
            }
        }
    }
}

/* Exponents of 16 features (W in w) for C tokens. */
template <int D, int C>
__device__ __forceinline__ void
feature_exponents(float (&e)[C / 8][4], const uint32_t (&w)[D / 16][4], const float bias[2],
                  const bf16 *tokens, const float *half, const struct hybrid *p)
{
    int quad = threadIdx.x & 3;
    zero(e);
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) mma_rows<D, C / 8>(e, w[kk], tokens, kk);
#pragma unroll
    for (int n = 0; n < C / 8; n++) {
        float2 sub = *(const float2 *)(half + n * 8 + quad * 2);
#pragma unroll
        for (int j = 0; j < 4; j++)
            e[n][j] = fmaf(e[n][j], SRF__LOG2E * p->scale, bias[j >> 1] - (j & 1 ? sub.y : sub.x));
    }
}

template <int D>
__device__ __forceinline__ void rescale_state(struct state_sums<D> *st, float upper, float lower)
{
    st->z[0] *= upper;
    st->z[2] *= lower;
    if (__any_sync(0xffffffffu, upper != 1 || lower != 1)) scale_rows(st->s, upper, lower);
}

/* C keys into a state. */
template <int D, int C>
__device__ __forceinline__ void add_keys(struct state_sums<D> *st, const uint32_t (&w)[D / 16][4],
                                         const float bias[2], const bf16 *keys, const bf16 *values,
                                         const float *half, const struct hybrid *p)
{
    uint32_t ones = (threadIdx.x & 31) < 4 ? 0x3f803f80u : 0; /* a column: sums of rows */
    float e[C / 8][4], most[2] = {st->top[0], st->top[1]};
    feature_exponents<D, C>(e, w, bias, keys, half, p);
#pragma unroll
    for (int n = 0; n < C / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) most[j >> 1] = fmaxf(most[j >> 1], e[n][j]);
#pragma unroll
    for (int j = 0; j < 2; j++) most[j] = rintf(quad_max(most[j]));
    rescale_state(st, exp2_fast(st->top[0] - most[0]), exp2_fast(st->top[1] - most[1]));
    st->top[0] = most[0];
    st->top[1] = most[1];
#pragma unroll
    for (int n = 0; n < C / 8; n += 2) {
        uint32_t a[4];
#pragma unroll
        for (int j = 0; j < 8; j++)
            e[n + (j >> 2)][j & 3] = exp2_fast(e[n + (j >> 2)][j & 3] - most[(j >> 1) & 1]);
        pack_a(a, e[n], e[n + 1]);
        /* z sums the rounded weights, as S does. */
        mma_bf16(st->z, a, ones, ones);
        mma_cols<D>(st->s, a, values + n * 8 * (D + 8));
    }
}

/* C queries into R, u, in the scale of M = top. */
template <int D, int C>
__device__ __forceinline__ void
add_queries(struct state_sums<D> *st, const uint32_t (&w)[D / 16][4], const float bias[2],
            const bf16 *queries, const bf16 *d_o, const float *half, const float *stat,
            const float *delta, const float top[2], const struct hybrid *p)
{
    int quad = threadIdx.x & 3;
    float e[C / 8][4], step[2];
    feature_exponents<D, C>(e, w, bias, queries, half, p);
#pragma unroll
    for (int j = 0; j < 2; j++) {
        step[j] = st->top[j] == SRF__UNSET ? 0 : exp2_fast(top[j] - st->top[j]);
        st->top[j] = top[j];
    }
    rescale_state(st, step[0], step[1]);
#pragma unroll
    for (int n = 0; n < C / 8; n += 2) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float2 by = *(const float2 *)(stat + (n + i) * 8 + quad * 2);
#pragma unroll
            for (int j = 0; j < 4; j++)
                e[n + i][j] = far_weight(e[n + i][j] + (top[j >> 1] - (j & 1 ? by.y : by.x)));
        }
        pack_a(a, e[n], e[n + 1]);
        /* a[j]: row g + 8 (j & 1), columns 8 (n + j / 2) + 2 quad .. */
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 f = unpack_bf16(a[j]);
            float2 by = *(const float2 *)(delta + (n + (j >> 1)) * 8 + quad * 2);
            st->z[2 * (j & 1)] += f.x * by.x + f.y * by.y;
        }
        mma_cols<D>(st->s, a, d_o + n * 8 * (D + 8));
    }
}

/* The slots of one head, 64 features and one segment; with `totals` only the segment's own sums. */
/* The rows a CTA works on. */
struct chunk {
    int64_t bh, in, out; /* head; element offsets of the head's token 0 by ld, ld_o */
    int64_t set;
    int row, block; /* first token, its block */
};
template <int D, int C> __device__ __forceinline__ struct chunk chunk_of(const struct hybrid *p)
{
    struct chunk c;
    unsigned bh = blockIdx.x / (unsigned)p->n_chunks;
    c.bh = bh;
    c.row = (int)(blockIdx.x - bh * (unsigned)p->n_chunks) * C;
    c.block = (int)((unsigned)c.row / (unsigned)p->window);
    int64_t seq = bh / (unsigned)p->heads;
    c.set = bh % (unsigned)p->heads;
    c.in = seq * p->t * p->ld + c.set * D;
    c.out = seq * p->t * p->ld_o + c.set * D;
    return c;
}

/* C features from `first` on: W, a slot's rows of S or R, and three vectors. */
template <int D, int C>
__device__ __forceinline__ void load_far(bf16 *pair[2], float *bias, float *top, float *sum,
                                         const struct hybrid *p, const struct chunk *c, int slot,
                                         const bf16 *states, const float *sums, int first)
{
    int n = p->m - first;
    int64_t row = (c->bh * p->n_slots + slot) * p->m + first;
    load_rows<D, C, 2 * C>(pair[0], p->w + c->set * p->w_step + (int64_t)first * D, D, n);
    load_rows<D, C, 2 * C>(pair[1], states + row * D, D, n);
    load_features<C>(bias, p->bias + c->set * p->bias_step + first, n);
    load_features<C>(top, p->top + row, n);
    load_features<C>(sum, sums + row, n);
}

/* ---- forward in one walk: window 64, m <= 64, d <= 64 -------------------------------------------
 * Each tensor passes once. A CTA takes a head's segment block by block: its warps are 16 rows of
 * queries each and 16 features of the state each. Before block j they hold S of the blocks up to
 * j - 2; they put it into shared memory for the queries, then take in block j - 1, whose k, v are
 * still there as the queries' block before. */

template <int D> struct fused_smem {
    bf16 q[64 * (D + 8)], pair[2][2][64 * (D + 8)]; /* k, v of even and odd blocks */
    bf16 w[64 * (D + 8)], s[64 * (D + 8)];
    float half_q[64], half_k[2][64], bias[64], top[64], z[64];
};

template <int D>
__device__ __forceinline__ void load_fused(struct fused_smem<D> *sm, const struct hybrid *p,
                                           int64_t in, int block, bool queries)
{
    int row = block * 64, n = p->t - row;
    int64_t at = in + row * p->ld;
    load_rows<D, 64, 128>(sm->pair[block & 1][0], p->k + at, p->ld, n);
    load_rows<D, 64, 128>(sm->pair[block & 1][1], p->v + at, p->ld, n);
    if (queries) load_rows<D, 64, 128>(sm->q, p->q + at, p->ld, n);
}

/* The first loads, not committed yet, and the state before the segment. */
template <int D>
__device__ __forceinline__ void start_walk(struct fused_smem<D> *sm, struct state_sums<D> *state,
                                           float bias[2], const struct hybrid *p,
                                           const struct walker *w)
{
    int g = (threadIdx.x & 31) >> 2;
    load_rows<D, 64, 128>(sm->w, p->w + w->set * p->w_step, D, p->m);
    load_features<64>(sm->bias, p->bias + w->set * p->bias_step, p->m);
    if (w->begin) load_fused<D>(sm, p, w->in, w->begin - 1, false);
    load_fused<D>(sm, p, w->in, w->begin, true);
    start_state(state);
    bias[0] = bias[1] = 0;
    if (w->feature >= p->m) return;
    for (int j = 0; j < 2; j++)
        bias[j] = SRF__LOG2E * p->bias[w->set * p->bias_step + w->feature + g + 8 * j];
    add_segments<D, false>(state, p, w->bh, w->seg, w->feature);
}

/* Waits for a block's loads (the first time for two blocks'). */
template <int D>
__device__ __forceinline__ void arrive(struct fused_smem<D> *sm, const struct hybrid *p, int block,
                                       bool first)
{
    int now = block & 1;
    cp_async_wait<0>();
    clean_rows<D, 64, 128, true>(sm->q, p, sm->half_q);
    clean_rows<D, 64, 128, true>(sm->pair[now][0], p, sm->half_k[now]);
    if (block && first) clean_rows<D, 64, 128, true>(sm->pair[now ^ 1][0], p, sm->half_k[now ^ 1]);
    __syncthreads();
}

/* S, z, M of a warp's features (or R, u, M) for all rows; seen after the next barrier. */
template <int D>
__device__ __forceinline__ void put_state(bf16 *states, float *sums, float *top,
                                          const struct state_sums<D> *state, int feature)
{
    int lane = threadIdx.x & 31, g = lane >> 2, quad = lane & 3;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        int row = feature + g + 8 * j;
        uint32_t *s = (uint32_t *)(states + row * (D + 8) + quad * 2);
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            s[n * 4] = pack_bf16(state->s[n][2 * j], state->s[n][2 * j + 1]);
        float z = quad_sum(state->z[2 * j]);
        if (quad) continue;
        sums[row] = z;
        top[row] = state->top[j];
    }
}
template <int D>
__device__ __forceinline__ void publish_state(struct fused_smem<D> *sm,
                                              const struct state_sums<D> *state, int feature)
{
    put_state<D>(sm->s, sm->z, sm->top, state, feature);
}

/* The keys of a block in shared memory into a warp's part of the state. */
template <int D>
__device__ __forceinline__ void take_block(struct fused_smem<D> *sm, struct state_sums<D> *state,
                                           const float bias[2], const struct hybrid *p, int stage,
                                           int feature)
{
    uint32_t w[D / 16][4];
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) load_a<D>(w[kk], sm->w + feature * (D + 8), kk);
    add_keys<D, 64>(state, w, bias, sm->pair[stage][0], sm->pair[stage][1], sm->half_k[stage], p);
}
#endif
