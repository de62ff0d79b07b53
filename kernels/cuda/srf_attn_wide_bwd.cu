/* SRF attention with more than 128 features on Hopper's warpgroup products, backward: pure, causal,
 * bf16, d = 64 (sm_90a). Forms and names are those of srf_attn_pure_bwd.cu, the parts of a block
 * and its passes those of srf_attn_wide.cu. Two kernels:
 *   queries  walks forward with S, z, M; writes dq, delta, M after every chunk, and how chunks were
 *            cut into pieces
 *   keys     walks backward with R, u; writes dk, dv (srf_attn_wide_keys.cu)
 * Not here: trained features (dw), and heads so few that tokens are cut into segments.
 *
 * Floor: 24 b t h d bytes as ever; from m = 64 on arithmetic: b t h (30 m + 384) d flops and 5 m
 * exponentials a token and head (keys makes kf twice, for want of registers): at b = 32, t = 1024,
 * h = 12, m = 256 203 GFLOP and 503M, 0.21 and 0.14 ms on an H100.
 */
#include "kernels/cuda/srf_attn_wide_bwd.h"

/* Shared memory: see srf_attn_wide_walk.h. */
struct dq_at {
    enum {
        W = 0,
        KF = 4 * TILE,
        S = KF + 8 * TILE,
        N_V = 2,
        V = S + 8 * TILE,
        K = V + N_V * TILE,
        Q = K + TILE, /* one for each warpgroup that owns tokens, as dO */
        DO = Q + 2 * TILE,
        HALF = DO + 2 * TILE,
        TOP = HALF + 2 * CHUNK * 4,
        Z = TOP + 2 * WIDE_FEATURES * 4, /* z before the piece of buffer b */
        BIAS = Z + 2 * WIDE_FEATURES * 4,
        M = BIAS + WIDE_FEATURES * 4,
        ZS = M + WIDE_FEATURES * 4,
        DELTA = ZS + WIDE_FEATURES * 4,
        FULL = DELTA + 2 * CHUNK * 4,
        EMPTY = FULL + 32,
        K_FULL = EMPTY + 32,
        V_FULL = K_FULL + 8,
        V_FREE = V_FULL + 8,
        Q_FULL = V_FREE + 8 * N_V, /* one for each Q, with dO */
        MEET = Q_FULL + 16,
        PLACE = MEET + 8,
        RANGE = PLACE + 24,
        COUNT = RANGE + 24,
        AGAIN = COUNT + 4,
        BYTES = AGAIN + 4,
    };
};

#if HAVE_WGMMA
/* The owners of tokens, dq: see walk_queries of srf_attn_wide.cu. */
__device__ __forceinline__ void walk_dq(const struct wide_bwd &p, const struct bwd_maps &m,
                                        uint32_t base, const volatile struct wide_range &range,
                                        int turn)
{
    using At = dq_at;
    const float to_log2 = SRF__LOG2E * p.scale;
    struct wide_piece piece = first_piece(range);
    if ((turn & 1) != (wide_here().wg & 1)) {
        piece = next_piece(piece, range, p.t);
        turn++;
    }
    auto next_of = [&](const struct wide_piece &at) {
        const struct wide_piece one = next_piece(at, range, p.t);
        return one.c < range.end ? next_piece(one, range, p.t) : one;
    };
    auto load = [&](int c) {
        const struct wide_thread at = wide_here();
        if ((at.tid & 127) != 0) return;
        const uint32_t bar = base + At::Q_FULL + 8 * (at.wg & 1), to = base + (at.wg & 1) * TILE;
        barrier_expect(bar, 2 * TILE);
        load_chunk(p, &m.q, to + At::Q, c, bar);
        load_chunk(p, &m.d_o, to + At::DO, c, bar);
    };
    if (piece.c < range.end) load(piece.c);
    for (; piece.c < range.end; turn += 2) {
        const int b = turn & 1; /* always the same */
        const uint32_t q_tile = base + At::Q + b * TILE, do_tile = base + At::DO + b * TILE;
        const int hi = piece_end(piece, p.t);
        float dq[32], delta[2], lse[2], most = -INFINITY;
        uint32_t x[4][4];
        {
            const struct wide_thread at = wide_here();
            const int row = at.tid >> 3 & 15, n = chunk_tokens(p.t, piece.c);
            const int64_t token = load_i64(base + At::PLACE + 16) + piece.c * CHUNK;
            const uint32_t own = tile_at<D>(row, at.tid & 7);
            const bf16 *o = p.o + load_i64(base + At::PLACE + 8) +
                            (int64_t)(piece.c * CHUNK + row) * p.ld_o + 8 * (at.tid & 7);
            uint4 y[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                y[i] = make_uint4(0, 0, 0, 0);
                if (row + 16 * i < n) y[i] = *(const uint4 *)(o + 16 * i * p.ld_o);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int t = at.row + 8 * i;
                lse[i] = t >= piece.lo && t < hi ? p.stat[token + t] : INFINITY;
            }
            barrier_wait(base + At::Q_FULL + 8 * b, turn >> 1 & 1);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                clamp_piece(q_tile + own + i * (TILE / 4), p.limit);
                const uint4 g = load_shared_16(do_tile + own + i * (TILE / 4));
                const uint32_t gs[4] = {g.x, g.y, g.z, g.w};
                const uint32_t ys[4] = {y[i].x, y[i].y, y[i].z, y[i].w};
                float sum = 0;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float2 f = unpack_bf16(gs[j]), h = unpack_bf16(ys[j]);
                    sum -= f.x * h.x + f.y * h.y;
                }
#pragma unroll
                for (int lanes = 1; lanes < 8; lanes <<= 1)
                    sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
                if ((at.tid & 7) == 0) {
                    store_float(base + At::DELTA + 4 * (CHUNK * b + row + 16 * i), sum);
                    if (row + 16 * i < n) p.delta[token + row + 16 * i] = sum;
                }
            }
            async_fence();
            warpgroup_barrier(at.wg);
            delta[0] = load_float(base + At::DELTA + 4 * (CHUNK * b + at.row));
            delta[1] = load_float(base + At::DELTA + 4 * (CHUNK * b + at.row + 8));
        }
        barrier_wait(base + At::FULL + 16 * b, turn >> 1 & 1);
        {
            const struct wide_thread at = wide_here();
            float dp[32];
            warpgroup_fence();
            tiles_product<false, false>(dp, do_tile, base + At::V + turn % At::N_V * TILE, false);
            warpgroup_commit();
            warpgroup_wait<0>();
            wide_hold(dp);
            barrier_arrive(base + At::V_FREE + 8 * (turn % At::N_V));
#pragma unroll
            for (int i = 0; i < 32; i++) dp[i] += delta[i >> 1 & 1];
            pack_wide(x, dp);
            keep_earlier(x, at.warp, at.lane);
        }
#pragma unroll
        for (int i = 0; i < 32; i++) dq[i] = 0.0f;
            /* 32 features at a time: registers are short. */
#pragma unroll 1
        for (int g = 0; g < 8; g++) {
            if (g == 4) {
                barrier_arrive(base + At::EMPTY + 16 * b); /* products with W are left */
                barrier_wait(base + At::FULL + 16 * b + 8, turn >> 1 & 1);
            }
            const uint32_t rows = base + 1024 * b + 128 * g + 8 * wide_here().pair;
            const uint32_t w_rows = base + At::W + g * (TILE / 2);
            float aq[16], dphi[16];
            uint32_t da[2][4];
            warpgroup_fence();
            tiles_32(aq, q_tile, w_rows);
            warpgroup_commit();
            tiles_32(dphi, do_tile, base + At::S + (8 * b + g) * (TILE / 2));
#pragma unroll
            for (int kk = 0; kk < 4; kk++)
                wgmma_32<false>(dphi, x[kk],
                                tile_word(base + At::KF + (8 * b + g) * (TILE / 2)) + 2 * kk, true);
            warpgroup_commit();
            warpgroup_wait<1>();
            wide_hold(aq);
            wide_hold(dq);
            /* psi; of rows outside the piece 0. */
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 shift = load_float2(rows + At::TOP + 32 * j);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float e =
                        fmaf(aq[4 * j + i], to_log2, i & 1 ? shift.y : shift.x) - lse[i >> 1];
                    most = fmaxf(most, e);
                    aq[4 * j + i] = exp2_psi(e);
                }
            }
            warpgroup_wait<0>();
            wide_hold(dphi);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 z = load_float2(rows + At::Z + 32 * j);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    aq[4 * j + i] *= fmaf(delta[i >> 1], i & 1 ? z.y : z.x, dphi[4 * j + i]);
            }
#pragma unroll
            for (int kk = 0; kk < 2; kk++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    da[kk][i] = pack_bf16(aq[8 * kk + 2 * i], aq[8 * kk + 2 * i + 1]);
            warpgroup_fence();
#pragma unroll
            for (int kk = 0; kk < 2; kk++)
                wgmma_64<true>(dq, da[kk], tile_of(tile_word(w_rows) + 128 * kk), true);
            warpgroup_commit();
        }
        barrier_arrive(base + At::EMPTY + 16 * b + 8);
        warpgroup_wait<0>();
        wide_hold(dq);
        const struct wide_thread at = wide_here();
        warpgroup_barrier(at.wg); /* all are done with Q, dO */
        const struct wide_piece next = next_of(piece);
        if (next.c < range.end) load(next.c);
        if (most > -SRF__MIN_DEN_LOG2 && piece.size > 1) {
            mark_piece(range, piece);
            store_shared(base + At::AGAIN, 1);
        }
#pragma unroll
        for (int i = 0; i < 32; i++) dq[i] *= p.scale;
        finish_rows(p, base + At::PLACE, dq, p.sum[0], p.dq, piece.c, piece.lo, hi);
        piece = next;
    }
}
#endif

static __global__ WIDE_BOUNDS void wide_queries_kernel(const __grid_constant__ struct wide_bwd p,
                                                       const __grid_constant__ struct bwd_maps m)
{
#if HAVE_WGMMA
    using At = dq_at;
    extern __shared__ __align__(1024) char raw[];
    const uint32_t base = smem_addr(raw);
    const int n_chunks = (p.t + CHUNK - 1) / CHUNK;
    volatile struct wide_range &range = *(volatile struct wide_range *)(raw + At::RANGE);
    {
        const int tid = wide_here().tid;
        if (tid == 0) {
            range.sizes = p.sizes + (int64_t)blockIdx.x * n_chunks;
            range.begin = 0;
            range.end = n_chunks;
            range.careful = 0;
            init_barriers<At>(base);
            for (int b = 0; b < 2; b++) barrier_init(base + At::Q_FULL + 8 * b, 1);
            barrier_init_done();
            store_shared(base + At::AGAIN, 0);
        }
        for (int i = tid; i < n_chunks; i += WIDE_THREADS)
            p.sizes[(int64_t)blockIdx.x * n_chunks + i] = CHUNK;
        start_block(p, base + At::W, base + At::BIAS, base + At::PLACE);
    }
    __syncthreads();
    auto start = [&](float(&s)[2][32]) {
        const struct wide_thread at = wide_here();
#pragma unroll
        for (int g = 0; g < 2; g++) {
#pragma unroll
            for (int i = 0; i < 32; i++) s[g][i] = 0.0f;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t to = base + 4 * (128 * at.wg + 64 * g + at.row + 8 * i);
                if (at.pair == 0) {
                    store_float(to + At::ZS, 0.0f);
                    store_float(to + At::M, SRF__UNSET);
                }
            }
        }
        __syncwarp();
    };
    auto put = [&](float z, float top, int b, int f, const struct wide_piece &at) {
        store_float(base + At::Z + 4 * (WIDE_FEATURES * b + f), z);
        p.tops[((int64_t)blockIdx.x * n_chunks + at.c) * WIDE_FEATURES + f] = top;
    };
    auto load = [&](const CUtensorMap *map, uint32_t tile, int c, uint32_t bar) {
        barrier_expect(bar, TILE);
        load_chunk(p, map, tile, c, bar);
    };
    auto load_k = [&](int c) { load(&m.k, base + At::K, c, base + At::K_FULL); };
    auto load_v = [&](int c, uint32_t tile) { load(&m.v, tile, c, base + At::V_FULL); };
    if (wide_here().wg < 2) {
        int turn = 0;
        do turn = walk_keys<At>(p, base, range, turn, start, put, load_k, load_v);
        while (pass_again<At>(base, range, &turn));
    } else {
        int turn = 0;
        do walk_dq(p, m, base, range, turn);
        while (pass_again<At>(base, range, &turn));
    }
#endif
}

/* ---- the op ------------------------------------------------------------------------------- */

static size_t plan_bwd(const struct srf_ctx *ctx, const struct srf_attn_shape *s,
                       struct wide_bwd *p)
{
    struct cuda_bump bump = {(char *)ctx->workspace, 0};
    const int64_t heads = s->b * s->h, chunks = div_up(s->t, CHUNK);
    p->tops = (float *)bump_bytes(&bump, (size_t)(heads * chunks * WIDE_FEATURES) * sizeof(float));
    p->sizes = (uint8_t *)bump_bytes(&bump, (size_t)(heads * chunks));
    p->delta = (float *)bump_bytes(&bump, (size_t)(heads * s->t) * sizeof(float));
    if (s->m > WIDE_FEATURES)
        for (int i = 0; i < 3; i++)
            p->sum[i] = (float *)bump_bytes(&bump, (size_t)(heads * s->t * D) * sizeof(float));
    return bump.used;
}

bool srf__wide_takes_bwd(const struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a)
{
    return !a->dw && srf__wide_takes(ctx, &a->s) && srf__pure_plan(ctx, &a->s, 1).n_seg == 1;
}

size_t srf__wide_bwd_workspace(const struct srf_ctx *ctx, const struct srf_attn_shape *s)
{
    struct wide_bwd p = {};
    return plan_bwd(ctx, s, &p);
}

srf_status srf__wide_bwd(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    const struct pure_plan plan = srf__pure_plan(ctx, s, 1);
    const unsigned heads = (unsigned)(s->b * s->h);
    struct wide_bwd p = {};
    plan_bwd(ctx, s, &p);
    p.k = (const bf16 *)a->k;
    p.o = (const bf16 *)a->o;
    p.w = (const bf16 *)a->w;
    p.bias = (const float *)a->bias;
    p.stat = (const float *)a->stat;
    p.dq = (bf16 *)a->dq;
    p.dk = (bf16 *)a->dk;
    p.dv = (bf16 *)a->dv;
    p.ld = a->ld;
    p.ld_o = a->ld_o;
    p.t = (int)s->t;
    p.h = (int)s->h;
    p.m = (int)s->m;
    p.n_sets = (int)s->n_sets;
    p.scale = plan.scale;
    p.limit = plan.limit;
    CUDA_TRY(cudaFuncSetAttribute(wide_queries_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  dq_at::BYTES));
    struct bwd_maps m;
    SRF_TRY(srf__tile_map(&m.q, a->q, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.k, a->k, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.v, a->v, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.d_o, a->d_o, s->b, s->t, s->h, a->ld_o, CHUNK));
    for (p.first = 0; p.first < p.m; p.first += p.count) {
        p.count = p.m - p.first < WIDE_FEATURES ? p.m - p.first : WIDE_FEATURES;
        wide_queries_kernel<<<heads, WIDE_THREADS, dq_at::BYTES, stream_of(ctx)>>>(p, m);
        SRF_TRY(srf__cuda_launched("srf_attn_bwd"));
        SRF_TRY(srf__wide_keys(ctx, &p, &m, heads));
    }
    return SRF_OK;
}
