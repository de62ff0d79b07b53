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

/* Shared memory: tiles, then rows of floats. */
enum {
    Q_K = 0, /* K, V, Q, dO twice */
    Q_V = 2 * TILE,
    Q_Q = 4 * TILE,
    Q_DO = 6 * TILE,
    Q_O = 8 * TILE,
    Q_W = 9 * TILE,
    Q_KF = Q_W + NW * TILE,
    Q_S = Q_KF + NW * TILE,
    Q_SENT = Q_S + NW * TILE,
    Q_ONES = Q_SENT + (NW - 1) * 2 * TILE,
    Q_HALF = Q_ONES + 2048,
    Q_LSE = Q_HALF + 2 * CHUNK * 4,
    Q_DELTA = Q_LSE + 2 * CHUNK * 4,
    Q_TOP = Q_DELTA + 2 * CHUNK * 4, /* bias + M */
    Q_BIAS = Q_TOP + NW * 256,
    Q_Z = Q_BIAS + NW * 256,
    Q_TAKEN = Q_Z + NW * 256,
    Q_PLACE = Q_TAKEN + 8,
    Q_BYTES = Q_PLACE + 24 + 1024,
};
static __global__ WIDE_BOUNDS void wide_queries_kernel(const __grid_constant__ struct wide_bwd p)
{
#if HAVE_WGMMA
    extern __shared__ char raw[];
    const uint32_t base = smem_addr(raw) + (-smem_addr(raw) & 1023u);
    const float to_log2 = SRF__LOG2E * p.scale;
    const uint32_t taken = base + Q_TAKEN, place = base + Q_PLACE;
    const int n_chunks = (p.t + CHUNK - 1) / CHUNK;

    auto load_chunk = [&](int c) {
        const struct wide_thread at = wide_here();
        const int64_t in = load_i64(place) + (int64_t)c * CHUNK * p.ld;
        const int64_t out = load_i64(place + 8) + (int64_t)c * CHUNK * p.ld_o;
        const int n = min(CHUNK, p.t - c * CHUNK);
        const uint32_t to = base + (c & 1) * TILE;
        load_tile<D, WIDE_THREADS>(to + Q_K, p.k + in, p.ld, CHUNK, n, at.tid);
        load_tile<D, WIDE_THREADS>(to + Q_V, p.v + in, p.ld, CHUNK, n, at.tid);
        load_tile<D, WIDE_THREADS>(to + Q_Q, p.q + in, p.ld, CHUNK, n, at.tid);
        load_tile<D, WIDE_THREADS>(to + Q_DO, p.d_o + out, p.ld_o, CHUNK, n, at.tid);
        load_tile<D, WIDE_THREADS>(base + Q_O, p.o + out, p.ld_o, CHUNK, n, at.tid);
        cp_async_commit();
    };
    /* This thread's pieces of the tiles have come, O's is read by it alone: clamp K and Q, fill the
     * rows of the tokens; those outside [lo, hi) have weight 0. */
    auto prepare = [&](int c, int lo, int hi, bool fresh) {
        const struct wide_thread at = wide_here();
        const int token = at.tid >> 3;
        const uint32_t own = base + (c & 1) * TILE + tile_at<D>(token, at.tid & 7);
        const uint32_t to = base + 4 * ((c & 1) * CHUNK + token);
        const bool in = token >= lo && token < hi;
        const float half = clamp_key(own + Q_K, p.scale, p.limit);
        clamp_piece(own + Q_Q, p.limit);
        if (fresh) {
            const uint4 x = load_shared_16(own + Q_DO);
            const uint4 y = load_shared_16(base + Q_O + tile_at<D>(token, at.tid & 7));
            const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
            float delta = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 f = unpack_bf16(xs[i]), g = unpack_bf16(ys[i]);
                delta -= f.x * g.x + f.y * g.y;
            }
#pragma unroll
            for (int o = 1; o < 8; o <<= 1) delta += __shfl_xor_sync(0xffffffffu, delta, o);
            if ((at.tid & 7) == 0) {
                store_f32(to + Q_DELTA, delta);
                if (in) p.delta[load_i64(place + 16) + c * CHUNK + token] = delta;
            }
        }
        if ((at.tid & 7) == 0) {
            store_f32(to + Q_HALF, in ? half : -INFINITY);
            store_f32(to + Q_LSE, in ? p.stat[load_i64(place + 16) + c * CHUNK + token] : INFINITY);
        }
        fence_products();
    };

    {
        const struct wide_thread at = wide_here();
        const int64_t set = p.n_sets == 1 ? 0 : blockIdx.x % p.h;
        if (at.tid == 0) {
            barrier_init(taken, WIDE_THREADS);
            barrier_init_done();
            put_place(p, place);
        }
        __syncthreads();
        load_tile<D, WIDE_THREADS>(base + Q_W, p.w + (set * p.m + p.first) * D, D, NW * 64, p.count,
                                   at.tid);
        load_chunk(0);
        if (at.tid < 16 * 8)
            store_shared_16(base + Q_ONES + 16 * at.tid,
                            make_uint4((at.tid & 7) == (at.tid >> 3 & 7) ? 0x3f80 : 0, 0, 0, 0));
        put_bias(p, at, base + Q_BIAS + 256 * at.wg);
    }
    float s[36], top[2] = {SRF__UNSET, SRF__UNSET};
#pragma unroll
    for (int i = 0; i < 36; i++) s[i] = 0.0f;
    cp_async_wait<0>();
    prepare(0, 0, min(CHUNK, p.t), true);
    __syncthreads();

    int c = 0, lo = 0, size = CHUNK, turn = 1;
    uint64_t cuts = 0;
    while (c < n_chunks) {
        const int n = min(CHUNK, p.t - c * CHUNK), hi = min(lo + size, n);
        const uint32_t stage = base + (c & 1) * TILE, rows = base + 4 * (c & 1) * CHUNK;
        float top_now[2], delta[2], own[8], most = -INFINITY;
        uint32_t a[4][4];
        {
            const struct wide_thread at = wide_here();
            float ak[32], dp[32];
            warpgroup_fence();
            tiles_product<false, false>(ak, base + Q_W + at.wg * TILE, stage + Q_K, false);
            warpgroup_commit();
            warpgroup_wait<0>();
            wide_hold(ak);
            key_exponents(ak, top_now, top, to_log2, rows + Q_HALF, base + Q_BIAS + 256 * at.wg,
                          at.row, at.pair);
            uint32_t kf[8][2];
            key_weights(kf, ak, top_now, base + Q_BIAS + 256 * at.wg, base + Q_TOP + 256 * at.wg,
                        at.row, at.pair);
            /* All have taken what was sent in the last turn, and left its tiles. */
            barrier_wait(taken, turn);
            turn ^= 1;
            put_tile(base + Q_KF + at.wg * TILE, kf, at.warp, at.lane);
            warpgroup_fence();
            tiles_product<false, false>(dp, stage + Q_DO, stage + Q_V, false);
            warpgroup_commit();
            if (lo == 0 && size == CHUNK && c + 1 < n_chunks) load_chunk(c + 1);
            const float step[2] = {exp2_fast(top[0] - top_now[0]), exp2_fast(top[1] - top_now[1])};
            put_scaled(base + Q_S + at.wg * TILE, s, step[0], step[1], at.warp, at.lane);
            if (at.pair == 0) {
                store_f32(base + Q_Z + 256 * at.wg + 4 * at.row, s[32] * step[0]);
                store_f32(base + Q_Z + 256 * at.wg + 4 * at.row + 32, s[34] * step[1]);
            }
            warpgroup_wait<0>();
            wide_hold(dp);
            delta[0] = load_f32(rows + Q_DELTA + 4 * at.row);
            delta[1] = load_f32(rows + Q_DELTA + 4 * at.row + 32);
#pragma unroll
            for (int i = 0; i < 32; i++) dp[i] += delta[i >> 1 & 1];
            pack_wide(a, dp);
            keep_earlier(a, at.warp, at.lane);
        }
        fence_products();
        warpgroup_barrier(wide_here().wg);
        {
            const struct wide_thread at = wide_here();
            float dphi[32];
            warpgroup_fence();
            tiles_product<false, false>(dphi, stage + Q_DO, base + Q_S + at.wg * TILE, false);
            packed_product<false>(dphi, a, base + Q_KF + at.wg * TILE, true);
            warpgroup_commit();
            warpgroup_wait<0>();
            wide_hold(dphi);
            {
                /* da = psi dphi; rows outside the piece have psi = 0. */
                float aq[32];
                warpgroup_fence();
                tiles_product<false, false>(aq, stage + Q_Q, base + Q_W + at.wg * TILE, false);
                warpgroup_commit();
                const float lse0 = load_f32(rows + Q_LSE + 4 * at.row);
                const float lse1 = load_f32(rows + Q_LSE + 4 * at.row + 32);
                warpgroup_wait<0>();
                wide_hold(aq);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float2 shift =
                        load_shared_8(base + Q_TOP + 256 * at.wg + 4 * (8 * j + 2 * at.pair));
                    const float2 z =
                        load_shared_8(base + Q_Z + 256 * at.wg + 4 * (8 * j + 2 * at.pair));
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float e = fmaf(aq[4 * j + i], to_log2, i & 1 ? shift.y : shift.x) -
                                        (i & 2 ? lse1 : lse0);
                        most = fmaxf(most, e);
                        aq[4 * j + i] =
                            exp2_psi(e) * fmaf(delta[i >> 1], i & 1 ? z.y : z.x, dphi[4 * j + i]);
                    }
                }
                pack_wide(a, aq);
            }
        }
#pragma unroll
        for (int left = 0; left < D; left += 32) {
            const struct wide_thread at = wide_here();
            float dq[16];
            const uint32_t w_word = tile_word(base + Q_W + at.wg * TILE + 2 * left);
            warpgroup_fence();
#pragma unroll
            for (int kk = 0; kk < 4; kk++) wgmma_32(dq, a[kk], w_word + 128 * kk, kk > 0);
            warpgroup_commit();
            warpgroup_wait<0>();
            wide_hold(dq);
            send_columns(base + Q_SENT + 16 * (at.tid & 127) + at.wg * (NW - 1) * 4096, dq, own,
                         left, at.wg);
        }
        cp_async_wait<0>();
        if (c + 1 < n_chunks) prepare(c + 1, 0, min(CHUNK, p.t - (c + 1) * CHUNK), true);
        if (__syncthreads_or(most > -SRF__MIN_DEN_LOG2 && size > 1)) {
            barrier_arrive(taken);
            size >>= 1;
            prepare(c, lo, min(lo + size, n), false);
            __syncthreads();
            continue;
        }
        const struct wide_thread at = wide_here();
        /* The keys go into the state, while dq is summed. */
        if (__any_sync(0xffffffffu, top[0] != top_now[0] || top[1] != top_now[1])) {
            const float step[2] = {exp2_fast(top[0] - top_now[0]), exp2_fast(top[1] - top_now[1])};
#pragma unroll
            for (int i = 0; i < 36; i++) s[i] *= step[i >> 1 & 1];
        }
        warpgroup_fence();
        product_72(s, base + Q_KF + at.wg * TILE, stage + Q_V, base + Q_ONES);
        warpgroup_commit();
        sum_columns(own, base + Q_SENT + 16 * (at.tid & 127), (NW - 1) * 4096, at.wg);
#pragma unroll
        for (int i = 0; i < 8; i++) own[i] *= p.scale;
        finish_columns(p, place, own, p.sum[0], p.dq, c, lo, hi);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            top[i] = top_now[i];
            if (at.pair == 0)
                p.tops[((int64_t)blockIdx.x * n_chunks + c) * (64 * NW) + 64 * at.wg + at.row +
                       8 * i] = top[i];
        }
        warpgroup_wait<0>();
        wide_hold(s);
        __syncwarp();
        barrier_arrive(taken);
        cuts |= (uint64_t)1 << lo;
        lo += size;
        size = lo & -lo;
        if (lo >= n) {
            if (wide_here().tid == 0) p.cuts[(int64_t)blockIdx.x * n_chunks + c] = cuts;
            c++;
            lo = 0;
            size = CHUNK;
            cuts = 0;
        } else {
            prepare(c, lo, min(lo + size, n), false);
            __syncthreads();
        }
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
                                  Q_BYTES));
    for (p.first = 0; p.first < p.m; p.first += p.count) {
        p.count = p.m - p.first < 64 * NW ? p.m - p.first : 64 * NW;
        wide_queries_kernel<<<heads, WIDE_THREADS, Q_BYTES, stream_of(ctx)>>>(p);
        SRF_TRY(srf__cuda_launched("srf_attn_bwd"));
        SRF_TRY(srf__wide_keys(ctx, &p, heads));
    }
    return SRF_OK;
}
