/* SRF attention with more than 128 features on Hopper's warpgroup products, backward: pure, causal,
 * bf16, d = 64 (sm_90a). Forms and names are those of srf_attn_pure_bwd.cu, blocks and what
 * warpgroups send each other those of srf_attn_wide.cu: a warpgroup does for its 64 features all
 * that there is to do, and finishes 16 columns of the sums over all features. Two kernels:
 *   queries  walks forward with S, z, M; writes dq, delta, M after every chunk, and where a chunk
 *            was cut into pieces.
 *   keys     walks backward with R, u; writes dk, dv.
 * Not here: trained features (dw), and heads so few that tokens are cut into segments.
 *
 * Floor: 24 b t h d bytes as ever; from m = 64 on arithmetic: b t h (30 m + 512) d flops in
 * products of 64: 202 GFLOP at b = 32, t = 1024, h = 12, m = 256, 0.27 ms on an H100.
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
        EMPTY = FULL + 16,
        V_FREE = EMPTY + 16,
        PLACE = V_FREE + 16,
        RANGE = PLACE + 24,
        COUNT = RANGE + 24,
        AGAIN = COUNT + 4,
        BYTES = AGAIN + 4,
    };
};

#if HAVE_WGMMA
/* The owners of tokens, dq: see walk_queries of srf_attn_wide.cu. */
__device__ __forceinline__ void walk_dq(const struct wide_bwd &p, uint32_t base,
                                        const volatile struct wide_range &range, int turn)
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
        const uint32_t to = base + (at.wg & 1) * TILE;
        load_tile<D, 128>(to + At::Q, p.q + load_i64(base + At::PLACE) + (int64_t)c * CHUNK * p.ld,
                          p.ld, CHUNK, chunk_tokens(p.t, c), at.tid & 127);
        load_tile<D, 128>(to + At::DO,
                          p.d_o + load_i64(base + At::PLACE + 8) + (int64_t)c * CHUNK * p.ld_o,
                          p.ld_o, CHUNK, chunk_tokens(p.t, c), at.tid & 127);
        cp_async_commit();
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
            cp_async_wait<0>();
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
                    store_f32(base + At::DELTA + 4 * (CHUNK * b + row + 16 * i), sum);
                    if (row + 16 * i < n) p.delta[token + row + 16 * i] = sum;
                }
            }
            fence_products();
            warpgroup_barrier(at.wg);
            delta[0] = load_f32(base + At::DELTA + 4 * (CHUNK * b + at.row));
            delta[1] = load_f32(base + At::DELTA + 4 * (CHUNK * b + at.row + 8));
        }
        barrier_wait(base + At::FULL + 8 * b, turn >> 1 & 1);
        {
            const struct wide_thread at = wide_here();
            float dp[32];
            warpgroup_fence();
            tiles_product<false, false>(dp, do_tile, base + At::V + turn % At::N_V * TILE, false);
            warpgroup_commit();
            warpgroup_wait<0>();
            wide_hold(dp);
            barrier_arrive(base + At::V_FREE + 8 * b);
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
            const uint32_t rows = base + 1024 * b + 128 * g + 8 * wide_here().pair;
            const uint32_t w_rows = base + At::W + g * (TILE / 2);
            float aq[16], dphi[16];
            uint32_t da[2][4];
            warpgroup_fence();
            tiles_32(aq, q_tile, w_rows);
            tiles_32(dphi, do_tile, base + At::S + (8 * b + g) * (TILE / 2));
#pragma unroll
            for (int kk = 0; kk < 4; kk++)
                wgmma_32<false>(dphi, x[kk],
                                tile_word(base + At::KF + (8 * b + g) * (TILE / 2)) + 2 * kk, true);
            warpgroup_commit();
            warpgroup_wait<0>();
            wide_hold(aq);
            wide_hold(dphi);
            wide_hold(dq);
            /* da = psi dphi; rows outside the piece have psi = 0. */
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 shift = load_shared_8(rows + At::TOP + 32 * j);
                const float2 z = load_shared_8(rows + At::Z + 32 * j);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float e =
                        fmaf(aq[4 * j + i], to_log2, i & 1 ? shift.y : shift.x) - lse[i >> 1];
                    most = fmaxf(most, e);
                    aq[4 * j + i] =
                        exp2_psi(e) * fmaf(delta[i >> 1], i & 1 ? z.y : z.x, dphi[4 * j + i]);
                }
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
        barrier_arrive(base + At::EMPTY + 8 * b); /* products with W are left */
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

static __global__ WIDE_BOUNDS void wide_queries_kernel(const __grid_constant__ struct wide_bwd p)
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
            for (int b = 0; b < 2; b++) {
                barrier_init(base + At::FULL + 8 * b, WIDE_OWNERS);
                barrier_init(base + At::EMPTY + 8 * b, 128);
                barrier_init(base + At::V_FREE + 8 * b, 128);
            }
            barrier_init_done();
            put_place(p, base + At::PLACE);
            store_shared(base + At::AGAIN, 0);
        }
        const int64_t set = p.n_sets == 1 ? 0 : blockIdx.x % p.h;
        load_tile<D, WIDE_THREADS>(base + At::W, p.w + (set * p.m + p.first) * D, D, WIDE_FEATURES,
                                   p.count, tid);
        cp_async_commit();
        for (int i = tid; i < n_chunks; i += WIDE_THREADS)
            p.sizes[(int64_t)blockIdx.x * n_chunks + i] = CHUNK;
        if (tid < WIDE_FEATURES)
            store_f32(base + At::BIAS + 4 * tid,
                      tid < p.count ? SRF__LOG2E * p.bias[set * p.m + p.first + tid] : -INFINITY);
        cp_async_wait<0>();
        fence_products();
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
                    store_f32(to + At::ZS, 0.0f);
                    store_f32(to + At::M, SRF__UNSET);
                }
            }
        }
        __syncwarp();
    };
    auto put = [&](float z, float top, int b, int f, const struct wide_piece &at) {
        store_f32(base + At::Z + 4 * (WIDE_FEATURES * b + f), z);
        p.tops[((int64_t)blockIdx.x * n_chunks + at.c) * WIDE_FEATURES + f] = top;
    };
    if (wide_here().wg < 2) {
        int turn = 0;
        do turn = walk_keys<At>(p, base, range, turn, start, put);
        while (pass_again<At>(base, range, &turn));
    } else {
        int turn = 0;
        do walk_dq(p, base, range, turn);
        while (pass_again<At>(base, range, &turn));
    }
    for (int c = wide_here().tid; c < n_chunks; c += WIDE_THREADS) {
        uint64_t cuts = 0;
        for (int lo = 0; lo < chunk_tokens(p.t, c); lo += range.sizes[c]) cuts |= (uint64_t)1 << lo;
        p.cuts[(int64_t)blockIdx.x * n_chunks + c] = cuts;
    }
#endif
}

/* ---- the op ------------------------------------------------------------------------------- */

static size_t plan_bwd(const struct srf_ctx *ctx, const struct srf_attn_shape *s,
                       struct wide_bwd *p)
{
    struct cuda_bump bump = {(char *)ctx->workspace, 0};
    const int64_t heads = s->b * s->h, chunks = div_up(s->t, CHUNK);
    p->cuts = (uint64_t *)bump_bytes(&bump, (size_t)(heads * chunks) * sizeof(uint64_t));
    p->tops = (float *)bump_bytes(&bump, (size_t)(heads * chunks * 64 * NW) * sizeof(float));
    p->sizes = (uint8_t *)bump_bytes(&bump, (size_t)(heads * chunks));
    p->delta = (float *)bump_bytes(&bump, (size_t)(heads * s->t) * sizeof(float));
    if (s->m > 64 * NW)
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
    p.q = (const bf16 *)a->q;
    p.k = (const bf16 *)a->k;
    p.v = (const bf16 *)a->v;
    p.o = (const bf16 *)a->o;
    p.d_o = (const bf16 *)a->d_o;
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
    for (p.first = 0; p.first < p.m; p.first += p.count) {
        p.count = p.m - p.first < 64 * NW ? p.m - p.first : 64 * NW;
        wide_queries_kernel<<<heads, WIDE_THREADS, dq_at::BYTES, stream_of(ctx)>>>(p);
        SRF_TRY(srf__cuda_launched("srf_attn_bwd"));
        SRF_TRY(srf__wide_keys(ctx, &p, heads));
    }
    return SRF_OK;
}
