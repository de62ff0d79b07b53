/* SRF attention with an exact window, on tensor cores: bf16 operands, fp32 sums.
 *
 * Blocks of `window` tokens; the queries of block j see blocks j - 1 and j exactly and the older
 * ones through the far state: S (m, d), z (m), M (m) over blocks 0 .. j - 2, scaled by 2^-M. All in
 * log2 units, with L = log2(e), x = q d^(-1/4), y = k d^(-1/4):
 *     exact   e_ts = L x_t.y_s                                                value v_s, weight 1
 *     far     e_ti = L (w_i.x_t + bias_i - |x_t|^2 / 2) - log2(m) + M_i      value S_i, weight z_i
 *     o_t = sum 2^(e - r_t) value / sum 2^(e - r_t) weight,   stat_t = r_t + log2(denominator)
 * So 64 features are one more tile of an attention kernel: W stands for K, S for V. The states do
 * not depend on queries, and a feature's row of a state on no other feature:
 *     1. walk      a CTA takes 64 features of a head (16 a warp) through its blocks, S in
 *                  accumulator registers, and stores every block's state (S as bf16) in a slot.
 *                  Slot i, after block i, is what block i + 2 reads. Few heads and a long sequence:
 *                  the sequence is cut into segments whose sums a first walk makes.
 *     2. forward   a CTA takes 64 (odd multiples of 32: 32) queries, 16 a warp, over two blocks of
 *                  keys and the features, one row stabiliser r_t raised as it goes.
 * Backward, with P = 2^(e - stat), delta_t = -d_o_t.o_t, dP = d_o.value + delta weight, da = P dP:
 *     1. walk as above
 *     2. dq        as forward: dq = d^(-1/4) (da [Y; W] - (sum over features of da) x)
 *     3. walk      backwards over queries: R = sum P_ti d_o_t, u = sum P_ti delta_t of the queries
 *                  that see a block through the state, in the scale of that block's slot: M never
 *                  falls, so that going back multiplies by 2^(M' - M) <= 1
 *     4. dk, dv    as dq with keys for queries; R stands for d_o, u for delta
 *     5. dW, if asked: each head's and segment's sum of da^T [x; y], then all in a fixed order
 * Window 64, m <= 64 and d <= 64: steps 1 and 2 are one walk, and so are 3 and 4, without slots,
 * each tensor read once. On Hopper, if d = 64, these walks are made of warpgroup products
 * (srf_attn_hybrid_wgmma*.cu); the sums of keys in segments are then those that pure SRF attention
 * makes (srf__state_sums), and the forward hands them to the backward (`carry`).
 * Components of q, k are clamped so that those of x, y stay within 1e17 and |x|^2 in range.
 *
 * Floor: forward q, k, v, o once, backward 8 of these tensors; B = 32, H = 12, T = 1024, d = 64:
 * 201 and 403 MB. Two kernels instead of one walk move another 350 MB forward.
 * kernels/lab/srf_attn_hybrid_cuda.md has the steps and times.
 */
#include "kernels/cuda/srf_attn_hybrid_walk.h"
#include "kernels/cuda/srf_attn_hybrid_wgmma.h"

/* ---- forward --------------------------------------------------------------------------------- */

template <int D, int C> struct fwd_smem {
    bf16 q[C * (D + 8)], pair[2][2][C * (D + 8)];
    float half[C], bias[2][C], top[2][C], z[2][C];
};

template <int D, int C>
__device__ __forceinline__ void load_fwd(struct fwd_smem<D, C> *sm, int stage,
                                         const struct hybrid *p, const struct chunk *c, int i,
                                         int n_exact)
{
    bf16 *pair[2] = {sm->pair[stage][0], sm->pair[stage][1]};
    if (i < n_exact) {
        int token = c->row - (n_exact - 1 - i) * C, n = p->t - token;
        int64_t at = c->in + token * p->ld;
        load_rows<D, C, 2 * C>(pair[0], p->k + at, p->ld, n);
        load_rows<D, C, 2 * C>(pair[1], p->v + at, p->ld, n);
    } else {
        load_far<D, C>(pair, sm->bias[stage], sm->top[stage], sm->z[stage], p, c, c->block - 2,
                       p->s, p->z, (i - n_exact) * C);
    }
}

/* Sums of 16 rows so far, in the scale 2^-most. */
template <int D> struct row_sums {
    float o[D / 8][4], most[2];
    float den[4]; /* of rows g, g + 8 in 0, 2: shares of a sum over the quad */
};
template <int D> __device__ __forceinline__ void start_sums(struct row_sums<D> *r)
{
    zero(r->o);
    r->den[0] = r->den[1] = r->den[2] = r->den[3] = 0;
    r->most[0] = r->most[1] = -INFINITY;
}

/* Exponents of a warp's rows against a tile of keys; causal: the tile of the rows themselves. */
template <int D, int C>
__device__ __forceinline__ void exact_exponents(float (&e)[C / 8][4],
                                                const uint32_t (&q)[D / 16][4], const bf16 *tile,
                                                const struct hybrid *p, bool causal)
{
    int lane = threadIdx.x & 31, row = (threadIdx.x >> 5) * 16 + (lane >> 2) - (lane & 3) * 2;
    zero(e);
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) mma_rows<D, C / 8>(e, q[kk], tile, kk);
#pragma unroll
    for (int n = 0; n < C / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) e[n][j] *= 2 * p->half_scale;
    if (!causal) return;
#pragma unroll
    for (int n = 0; n < C / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (n * 8 + (j & 1) - (j >> 1) * 8 > row) e[n][j] = -INFINITY;
}

/* The same against C features, `left` of which there are: W in tile, their biases and M. */
template <int D, int C>
__device__ __forceinline__ void far_exponents(float (&e)[C / 8][4], const uint32_t (&q)[D / 16][4],
                                              const bf16 *tile, const float *bias, const float *top,
                                              const float half[2], const struct hybrid *p, int left)
{
    int quad = threadIdx.x & 3;
    zero(e);
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) mma_rows<D, C / 8>(e, q[kk], tile, kk);
#pragma unroll
    for (int n = 0; n < C / 8; n++) {
        float2 b = *(const float2 *)(bias + n * 8 + quad * 2);
        float2 m = *(const float2 *)(top + n * 8 + quad * 2);
        b.x = fmaf(SRF__LOG2E, b.x, -p->log2_m) + m.x;
        b.y = fmaf(SRF__LOG2E, b.y, -p->log2_m) + m.y;
        if (n * 8 + quad * 2 >= left) b.x = b.y = -INFINITY;
#pragma unroll
        for (int j = 0; j < 4; j++)
            e[n][j] = fmaf(e[n][j], SRF__LOG2E * p->scale, (j & 1 ? b.y : b.x) - half[j >> 1]);
    }
}

/* Adds the weights 2^e of a tile: times its values, and times z or, where z is NULL, 1. */
template <int D, int C>
__device__ __forceinline__ void add_tile(struct row_sums<D> *r, float (&e)[C / 8][4],
                                         const bf16 *values, const float *z)
{
    int lane = threadIdx.x & 31, g = lane >> 2, quad = lane & 3;
    uint32_t ones = g == 0 ? 0x3f803f80u : 0; /* a column of ones: sums of rows as a product */
    float next[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < C / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) next[j >> 1] = fmaxf(next[j >> 1], e[n][j]);
    /* A stabiliser near the maximum does as well, and most tiles need no rescaling. */
    bool grows[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        next[j] = quad_max(next[j]);
        grows[j] = next[j] > r->most[j] + LAZY;
    }
    if (__any_sync(0xffffffffu, grows[0] || grows[1])) {
        float step[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            step[j] = grows[j] ? exp2_fast(r->most[j] - next[j]) : 1;
            r->most[j] = grows[j] ? next[j] : r->most[j];
            r->den[2 * j] *= step[j];
        }
        scale_rows(r->o, step[0], step[1]);
    }
#pragma unroll
    for (int n = 0; n < C / 8; n += 2) {
        uint32_t a[4];
#pragma unroll
        for (int j = 0; j < 8; j++)
            e[n + (j >> 2)][j & 3] = exp2_fast(e[n + (j >> 2)][j & 3] - r->most[(j >> 1) & 1]);
        pack_a(a, e[n], e[n + 1]);
        /* The rounded weights are summed: numerator and denominator use the same. */
        if (!z)
            mma_bf16(r->den, a, ones, ones);
        else
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float2 f = unpack_bf16(a[j]);
                float2 by = *(const float2 *)(z + (n + (j >> 1)) * 8 + quad * 2);
                r->den[2 * (j & 1)] += f.x * by.x + f.y * by.y;
            }
        mma_cols<D>(r->o, a, values + n * 8 * (D + 8));
    }
}

/* o and stat of a warp's rows, which start at token `row`. */
template <int D>
__device__ __forceinline__ void store_sums(struct row_sums<D> *r, const struct hybrid *p,
                                           int64_t bh, int64_t out, int row)
{
    int lane = threadIdx.x & 31, g = lane >> 2;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        r->den[2 * j] = quad_sum(r->den[2 * j]);
        if (p->stat && (lane & 3) == 0 && row + g + 8 * j < p->t)
            p->stat[bh * p->t + row + g + 8 * j] = r->most[j] + log2f(r->den[2 * j]);
    }
    scale_rows(r->o, 1 / r->den[0], 1 / r->den[2]);
    store_rows<D>(p->o + out + row * p->ld_o, p->ld_o, p->t - row, r->o);
}

template <int D, int C>
__global__ void __launch_bounds__(2 * C) fwd_kernel(const __grid_constant__ struct hybrid p)
{
    extern __shared__ __align__(16) char smem[];
    struct fwd_smem<D, C> *sm = (struct fwd_smem<D, C> *)smem;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2;
    struct chunk c = chunk_of<D, C>(&p);
    int n_exact = (c.row - max(c.block - 1, 0) * p.window) / C + 1;
    int n_tiles = n_exact + (c.block < 2 ? 0 : (p.m + C - 1) / C);

    load_rows<D, C, 2 * C>(sm->q, p.q + c.in + c.row * p.ld, p.ld, p.t - c.row);
    cp_async_commit();
    load_fwd(sm, 0, &p, &c, 0, n_exact);
    cp_async_commit();
    cp_async_wait<1>();
    clean_rows<D, C, 2 * C, true>(sm->q, &p, sm->half);
    __syncthreads();
    uint32_t q[D / 16][4];
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) load_a<D>(q[kk], sm->q + warp * 16 * (D + 8), kk);
    float half[2] = {sm->half[warp * 16 + g], sm->half[warp * 16 + g + 8]};
    struct row_sums<D> sums;
    start_sums(&sums);

    for (int i = 0; i < n_tiles; i++) {
        int stage = i & 1;
        if (i + 1 < n_tiles) load_fwd(sm, stage ^ 1, &p, &c, i + 1, n_exact);
        cp_async_commit();
        cp_async_wait<1>();
        if (i < n_exact) clean_rows<D, C, 2 * C, false>(sm->pair[stage][0], &p, NULL);
        __syncthreads();
        const bf16 *tile = sm->pair[stage][0], *values = sm->pair[stage][1];
        float e[C / 8][4];
        if (i < n_exact) {
            exact_exponents<D, C>(e, q, tile, &p, i == n_exact - 1);
            add_tile<D, C>(&sums, e, values, NULL);
        } else {
            far_exponents<D, C>(e, q, tile, sm->bias[stage], sm->top[stage], half, &p,
                                p.m - (i - n_exact) * C);
            add_tile<D, C>(&sums, e, values, sm->z[stage]);
        }
        __syncthreads();
    }
    store_sums<D>(&sums, &p, c.bh, c.out, c.row + warp * 16);
}

/* ---- forward in one walk: window 64, m <= 64, d <= 64 ---------------------------------------- */

template <int D>
__global__ void __launch_bounds__(128, 3) fused_fwd_kernel(const __grid_constant__ struct hybrid p)
{
    extern __shared__ __align__(16) char smem[];
    struct fused_smem<D> *sm = (struct fused_smem<D> *)smem;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2;
    struct walker w = walker_of<D>(&p);
    struct state_sums<D> state;
    float bias[2];
    start_walk<D>(sm, &state, bias, &p, &w);
    cp_async_commit();

    for (int block = w.begin; block < w.end; block++) {
        int now = block & 1, before = now ^ 1;
        arrive<D>(sm, &p, block, block == w.begin);
        uint32_t q[D / 16][4];
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++) load_a<D>(q[kk], sm->q + warp * 16 * (D + 8), kk);
        float half[2] = {sm->half_q[warp * 16 + g], sm->half_q[warp * 16 + g + 8]};
        float e[8][4];
        struct row_sums<D> sums;
        start_sums(&sums);
        if (block >= 2) publish_state<D>(sm, &state, w.feature);
        if (block) {
            exact_exponents<D, 64>(e, q, sm->pair[before][0], &p, false);
            add_tile<D, 64>(&sums, e, sm->pair[before][1], NULL);
            if (w.feature < p.m && block + 1 < w.n_blocks)
                take_block<D>(sm, &state, bias, &p, before, w.feature);
        }
        __syncthreads();
        if (block + 1 < w.end) load_fused<D>(sm, &p, w.in, block + 1, true);
        cp_async_commit();
        exact_exponents<D, 64>(e, q, sm->pair[now][0], &p, true);
        add_tile<D, 64>(&sums, e, sm->pair[now][1], NULL);
        if (block >= 2) {
            far_exponents<D, 64>(e, q, sm->w, sm->bias, sm->top, half, &p, p.m);
            add_tile<D, 64>(&sums, e, sm->s, sm->z);
        }
        store_sums<D>(&sums, &p, w.bh, w.out, block * 64 + warp * 16);
    }
}

/* ---- launches -------------------------------------------------------------------------------- */

static size_t entry_bytes(const struct hybrid *p, int64_t n_bh)
{
    return (size_t)(n_bh * p->n_seg * SRF__STATES_COUNT) * sizeof(float);
}

size_t srf__hybrid_carve(const struct srf_ctx *ctx, const struct srf_attn_shape *s, bool backward,
                         bool dw, void *base, struct hybrid *p)
{
    struct cuda_bump bump = {(char *)base, 0};
    int64_t n_bh = s->b * s->h, tile = s->window % 64 ? 32 : 64;
    int64_t n_slots = div_up(s->t, s->window) - 2;
    n_slots = n_slots < 0 ? 0 : n_slots;
    /* Segments only where they save more than their own walk costs. */
    int64_t walks = n_bh * div_up(s->m, CTA_FEATURES), n_seg = 3 * cuda_of(ctx)->n_sm / walks;
    n_seg = n_seg > MAX_SEGMENTS ? MAX_SEGMENTS : n_seg;
    n_seg = n_seg > n_slots / 4 ? n_slots / 4 : n_seg;
    p->wgmma = s->window == 64 && srf__states_take(ctx, s);
    /* By warpgroup products the sums cost less than half of the walk. */
    p->given = p->wgmma && !dw && n_seg > 1;
    n_seg = n_seg < (p->given ? 2 : 3) ? 1 : n_seg;
    p->t = (int)s->t;
    p->heads = (int)s->h;
    p->m = (int)s->m;
    p->window = (int)s->window;
    p->n_chunks = (int)div_up(s->t, tile);
    p->n_slots = (int)n_slots;
    p->seg_slots = (int)(n_slots ? div_up(n_slots, n_seg) : 1);
    p->n_seg = (int)(n_slots ? div_up(n_slots, p->seg_slots) : 1);
    p->team = srf__state_team(ctx, s, p->n_seg);
    p->w_step = s->n_sets > 1 ? s->m * s->d : 0;
    p->bias_step = s->n_sets > 1 ? s->m : 0;
    p->scale = (float)pow((double)s->d, -0.25);
    p->half_scale = (float)(0.5 * 1.4426950408889634 / sqrt((double)s->d));
    p->limit = (float)(SRF__X_LIMIT * pow((double)s->d, 0.25));
    p->log2_m = (float)log2((double)s->m);
    p->fused = s->window == 64 && s->m <= 64 && s->d <= 64 && !(dw && n_slots > 0);
    size_t rows = (size_t)(n_bh * n_slots * s->m), seg_rows = (size_t)(n_bh * p->n_seg * s->m);
    if (p->given) p->entry = (float *)bump_bytes(&bump, entry_bytes(p, n_bh));
    if (p->given && !backward) return bump.used;
    if (!p->fused) {
        p->s = (bf16 *)bump_bytes(&bump, rows * s->d * sizeof(bf16));
        p->z = (float *)bump_bytes(&bump, rows * sizeof(float));
    }
    if (!p->fused || backward) p->top = (float *)bump_bytes(&bump, rows * sizeof(float));
    if (p->n_seg > 1) {
        p->sum_s = (float *)bump_bytes(&bump, seg_rows * s->d * sizeof(float));
        p->sum_z = (float *)bump_bytes(&bump, seg_rows * sizeof(float));
        p->sum_top = (float *)bump_bytes(&bump, seg_rows * sizeof(float));
    }
    if (!backward) return bump.used;
    if (!p->fused) {
        p->r = (bf16 *)bump_bytes(&bump, rows * s->d * sizeof(bf16));
        p->u = (float *)bump_bytes(&bump, rows * sizeof(float));
    }
    if (p->fused && p->wgmma) {
        size_t segments = (size_t)(n_bh * p->n_seg);
        p->after = (float *)bump_bytes(&bump, segments * s->m * 65 * sizeof(float));
        p->parked = (float *)bump_bytes(&bump, segments * 64 * 64 * sizeof(float));
    }
    p->delta = (float *)bump_bytes(&bump, (size_t)(n_bh * s->t) * sizeof(float));
    if (dw && n_slots) p->dw_part = (float *)bump_bytes(&bump, 2 * seg_rows * s->d * sizeof(float));
    return bump.used;
}

template <int D, int C>
static srf_status fwd(struct srf_ctx *ctx, const struct hybrid *p, int64_t n_bh)
{
    if constexpr (D <= 64 && C == 64) {
        if (p->fused) {
            static_assert(sizeof(struct fused_smem<D>) <= hybrid_smem_most(D, C),
                          "srf__hybrid_takes asks for less");
            SRF_TRY(srf__hybrid_totals(ctx, p, D, n_bh, false));
            LAUNCH((fused_fwd_kernel<D>), n_bh * p->n_seg, 128, sizeof(struct fused_smem<D>), *p);
            return srf__cuda_launched("srf_attn_fwd");
        }
    }
    static_assert(sizeof(struct fwd_smem<D, C>) <= hybrid_smem_most(D, C),
                  "srf__hybrid_takes asks for less");
    SRF_TRY(srf__hybrid_walk(ctx, p, D, n_bh, false));
    LAUNCH((fwd_kernel<D, C>), n_bh * p->n_chunks, 2 * C, sizeof(struct fwd_smem<D, C>), *p);
    return srf__cuda_launched("srf_attn_fwd");
}

bool srf__hybrid_takes(const struct srf_ctx *ctx, const struct srf_attn_shape *s, int64_t ld,
                       int64_t ld_o, uintptr_t pointers)
{
    bool any = s->b > 0 && s->t > 0 && s->h > 0 && s->m > 0;
    bool d = s->d == 32 || s->d == 64 || s->d == 80 || s->d == 96 || s->d == 128;
    bool window = s->window > 0 && s->window % 32 == 0;
    /* Launches count tiles and walks in 31 bits. */
    bool small = s->t < (1 << 30) && s->b * s->h < (1 << 30) / MAX_SEGMENTS / 8 &&
                 s->b * s->h * div_up(s->t, 32) < (1 << 30);
    return any && ctx->dtype == SRF_BF16 && s->causal && window && d && s->m % 16 == 0 &&
           s->m <= 512 && ld % 8 == 0 && ld_o % 8 == 0 && pointers % 16 == 0 && small &&
           (size_t)hybrid_smem_most((int)s->d, s->window % 64 ? 32 : 64) <= cuda_of(ctx)->smem_max;
}

bool srf__hybrid_takes_fwd(const struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a)
{
    return srf__hybrid_takes(ctx, &a->s, a->ld, a->ld_o,
                             (uintptr_t)a->q | (uintptr_t)a->k | (uintptr_t)a->v | (uintptr_t)a->w |
                                 (uintptr_t)a->bias | (uintptr_t)a->o);
}

size_t srf__hybrid_carry_bytes(const struct srf_ctx *ctx, const struct srf_attn_shape *s)
{
    struct hybrid p = {};
    if (!srf__hybrid_takes(ctx, s, 0, 0, 0)) return 0;
    srf__hybrid_carve(ctx, s, false, false, NULL, &p);
    return p.given ? entry_bytes(&p, s->b * s->h) : 0;
}

size_t srf__hybrid_fwd_workspace(const struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a)
{
    struct hybrid p = {};
    return srf__hybrid_takes(ctx, &a->s, a->ld, a->ld_o, 0)
               ? srf__hybrid_carve(ctx, &a->s, false, false, NULL, &p)
               : 0;
}

srf_status srf__hybrid_fwd(struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a)
{
    struct hybrid p = {};
    if (a->s.b * a->s.t == 0) return SRF_OK;
    srf__hybrid_carve(ctx, &a->s, false, false, ctx->workspace, &p);
    p.q = (const bf16 *)a->q;
    p.k = (const bf16 *)a->k;
    p.v = (const bf16 *)a->v;
    p.w = (const bf16 *)a->w;
    p.bias = (const float *)a->bias;
    p.o = (bf16 *)a->o;
    p.stat = (float *)a->stat;
    p.ld = a->ld;
    p.ld_o = a->ld_o;
    if (p.given && a->carry) p.entry = (float *)a->carry;
    if (p.given)
        SRF_TRY(srf__state_sums(ctx, &a->s, a->k, a->v, a->ld, a->w, a->bias, p.n_seg, p.seg_slots,
                                p.team, p.entry));
    if (p.wgmma) return srf__hybrid_wgmma_fwd(ctx, a, &p);
    FOR_HEAD_SIZE(a->s.d, a->s.window, fwd, ctx, &p, a->s.b * a->s.h)
}
