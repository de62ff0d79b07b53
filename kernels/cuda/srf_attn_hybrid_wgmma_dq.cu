/* The window hybrid with warpgroup products: dq, and what dk, dv want of queries and states (delta,
 * M after each block). A walk as the forward's, of which srf_attn_hybrid_wgmma.cu tells.
 *
 * Floor: q, k, v, o, do read, dq written: 12 b t h d bytes.
 */
#include "kernels/cuda/srf_attn_hybrid_wgmma_walk.h"

struct dq_tiles {
    static constexpr int v = 2 * TILE, q = 4 * TILE, d_o = 6 * TILE, w = 7 * TILE, s = 8 * TILE;
    static constexpr int half = 9 * TILE, top = half + 3 * 64 * 4;
    static constexpr int z = top + 64 * 4; /* in fp32 */
    static constexpr int bar = z + 64 * 4, bytes = bar + 3 * 8;
};

#if HAVE_WGMMA
/* da of exact keys, packed, times d^(-1/4): they are of x and y / d^(1/4), features' of x. a, d:
 * the products with keys, values. CAUSAL: the block's own keys, for row `row`, columns 2 pair. */
template <bool CAUSAL>
__device__ __forceinline__ void
exact_grads(uint32_t (&x)[4][4], float (&a)[8][4], const float (&d)[8][4], const float lse[2],
            const float delta[2], const struct hybrid &p, int row, int pair)
{
    const int off = row - 2 * pair;
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            /* Rounded as in forward. */
            const float weight = exp2_fast(__fmul_rn(a[j][i], 2 * p.half_scale) - lse[i >> 1]);
            a[j][i] = weight * (p.scale * (d[j][i] + delta[i >> 1]));
            if (CAUSAL && 8 * j + (i & 1) - 8 * (i >> 1) > off) a[j][i] = 0.0f;
        }
    pack_rows(x, a);
}
#endif

static __global__ WALK_BOUNDS(3) void hybrid_dq_kernel(const __grid_constant__ struct hybrid p,
                                                       const __grid_constant__ struct hybrid_maps m)
{
#if HAVE_WGMMA
    using at = dq_tiles;
    extern __shared__ char raw[];
    uint32_t base = smem_addr(raw + (-smem_addr(raw) & 1023u));
    int tid = threadIdx.x, bh, c, end;
    {
        const struct walker w = walker_of<64>(&p);
        bh = (int)w.bh, c = w.begin, end = w.end;
    }
    const int c0 = max(c - 1, 0), c1 = c;
    auto fill = [&](int c) {
        const int s = (c - c0) & 1, col = bh % p.heads * 64, seq = bh / p.heads;
        const uint32_t full = base + at::bar + 8 * s;
        barrier_expect(full, c < c1 ? 2 * TILE : 3 * TILE);
        bulk_tile(base + s * TILE, &m.k, col, c * CHUNK, seq, full);
        bulk_tile(base + at::v + s * TILE, &m.v, col, c * CHUNK, seq, full);
        if (c >= c1) bulk_tile(base + at::q + s * TILE, &m.q, col, c * CHUNK, seq, full);
    };
    auto fill_do = [&](int c) {
        barrier_expect(base + at::bar + 16, TILE);
        bulk_tile(base + at::d_o, &m.d_o, bh % p.heads * 64, c * CHUNK, bh / p.heads,
                  base + at::bar + 16);
    };
    load_tile<64, 128>(base + at::w, p.w + bh % p.heads * p.w_step, 64, 64, p.m, tid);
    cp_async_commit();
    if (tid == 0) {
        init_barriers(base + at::bar, 3);
        fill(c0);
        if (c1 > c0) fill(c1);
        fill_do(c1);
    }
    chain_wait();
    struct pure_state<64> st;
    float bias[2];
    {
        const int f0 = 16 * (tid >> 5) + (tid >> 2 & 7);
        bias[0] = bias_of(p, bh % p.heads, f0);
        bias[1] = bias_of(p, bh % p.heads, f0 + 8);
        add_sums(&st, p.entry + (int64_t)bh * p.n_seg * SRF__STATES_COUNT,
                 (int)blockIdx.x % p.n_seg, p.team, tid);
    }
    cp_async_wait<0>();
    async_fence();
    __syncthreads();
    if (c1 > c0) {
        barrier_wait(base + at::bar, 0);
        diagonal_norms(base, floats_at(base + at::half), m.by, 0, CHUNK, tid >> 5, tid & 31);
    }

    for (; c < end; c++) {
        uint32_t x[4][4];
        float a[8][4], d[8][4], dq[8][4], lse[2], delta[2];
        /* What is not a sum is made again when it is needed: registers. */
        opaque(tid);
        opaque(bh);
        {
            const int lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
            const int f0 = 16 * warp + g, row = f0, s = (c - c0) & 1;
            const int n = min(CHUNK, p.t - c * CHUNK);
            const int64_t token = (int64_t)bh * p.t + c * CHUNK;
            uint4 o[2][2];
            load_o(o,
                   p.o + ((int64_t)(bh / p.heads) * p.t + c * CHUNK) * p.ld_o + bh % p.heads * 64,
                   p.ld_o, row, pair, row < n, row + 8 < n);
#pragma unroll
            for (int i = 0; i < 2; i++)
                lse[i] = row + 8 * i < n ? p.stat[token + row + 8 * i] : INFINITY;
            barrier_wait(base + at::bar + 8 * s, (c - c0) >> 1 & 1);
            diagonal_norms(base + s * TILE, floats_at(base + at::half + 256 * s), m.by, 0, CHUNK,
                           warp, lane);
            diagonal_norms(base + at::q + s * TILE, floats_at(base + at::half + 512), m.by, 0,
                           CHUNK, warp, lane);
            if (c >= 2) {
                pack_rows(x, st.s);
                put_rows(base + at::s, x, warp, lane);
                if (pair == 0) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int f = f0 + 8 * i;
                        store_float(base + at::top + 4 * f, bias[i] + st.top[i] - p.log2_m);
                        store_float(base + at::z + 4 * f, st.z[i]);
                        if (f < p.m) p.top[((int64_t)bh * p.n_slots + c - 2) * p.m + f] = st.top[i];
                    }
                }
            }
            barrier_wait(base + at::bar + 16, (c - c1) & 1);
            row_deltas(delta, o, base + at::d_o, row, pair);
            if (pair == 0) {
#pragma unroll
                for (int i = 0; i < 2; i++)
                    if (row + 8 * i < n) p.delta[token + row + 8 * i] = delta[i];
            }
            async_fence();
            __syncthreads();
        }
        if (c > 0) {
            const uint32_t before = ((c - c0) & 1 ^ 1) * TILE;
            begin_scores(a, base + at::w, base + before);
            warpgroup_wait<0>();
            wgmma_hold(&a[0][0]);
            take_keys(&st, x, a, floats_at(base + at::half + before / 32), base + at::v + before,
                      bias, m.by.to_log2, tid & 31);
            begin_scores(a, base + at::q + TILE - before, base + before);
            warpgroup_wait<1>();
            wgmma_hold(&st.s[0][0]);
            begin_scores(d, base + at::d_o, base + at::v + before);
            warpgroup_wait<0>();
            wgmma_hold(&a[0][0]);
            wgmma_hold(&d[0][0]);
            exact_grads<false>(x, a, d, lse, delta, p, 0, 0);
            begin_mix(dq, x, base + before, false);
            warpgroup_wait<0>();
            wgmma_hold(&dq[0][0]);
        } else {
            clear(dq);
        }
        opaque(tid);
        {
            const uint32_t own = ((c - c0) & 1) * TILE;
            begin_scores(a, base + at::q + own, base + own);
            begin_scores(d, base + at::d_o, base + at::v + own);
            __syncthreads(); /* all have done with the keys before */
            if (tid == 0 && c + 1 < end) fill(c + 1);
            warpgroup_wait<0>();
            wgmma_hold(&a[0][0]);
            wgmma_hold(&d[0][0]);
            exact_grads<true>(x, a, d, lse, delta, p, 16 * (tid >> 5) + (tid >> 2 & 7), tid & 3);
            begin_mix(dq, x, base + own, true);
        }
        float sum[2] = {0, 0};
        if (c >= 2) {
            begin_scores(a, base + at::q + ((c - c0) & 1) * TILE, base + at::w);
            warpgroup_wait<1>();
            wgmma_hold(&dq[0][0]);
            begin_scores(d, base + at::d_o, base + at::s);
            warpgroup_wait<0>();
            wgmma_hold(&a[0][0]);
            wgmma_hold(&d[0][0]);
            opaque(tid);
            const int pair = tid & 3;
            const uint32_t half = base + at::half + 512 + 4 * (16 * (tid >> 5) + (tid >> 2 & 7));
            const float norm[2] = {load_float(half), load_float(half + 32)};
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float2 shift = load_float2(base + at::top + 32 * j + 8 * pair);
                const float2 zj = load_float2(base + at::z + 32 * j + 8 * pair);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    uint32_t *to = &x[j >> 1][(j & 1) * 2 + i];
                    const float e0 = fmaf(a[j][2 * i], m.by.to_log2, shift.x - norm[i]) - lse[i];
                    const float e1 =
                        fmaf(a[j][2 * i + 1], m.by.to_log2, shift.y - norm[i]) - lse[i];
                    *to = pack_bf16(far_weight(e0) * fmaf(delta[i], zj.x, d[j][2 * i]),
                                    far_weight(e1) * fmaf(delta[i], zj.y, d[j][2 * i + 1]));
                }
            }
            begin_mix(dq, x, base + at::w, true);
            /* The sum of the rounded values: w_i - x of one feature may be small. */
            float ones[4];
            add_ones(ones, x, false, tid & 31);
            sum[0] = p.scale * __shfl_sync(0xffffffffu, ones[0], tid & 28);
            sum[1] = p.scale * __shfl_sync(0xffffffffu, ones[2], tid & 28);
            warpgroup_wait<0>();
            wgmma_hold(&dq[0][0]);
        } else {
            warpgroup_wait<0>();
            wgmma_hold(&dq[0][0]);
        }
        __syncthreads(); /* dO has been read by all */
        opaque(tid);
        opaque(bh);
        if (tid == 0 && c + 1 < end) fill_do(c + 1);
        {
            const int warp = tid >> 5, n = min(CHUNK, p.t - c * CHUNK);
            own_rows(x, base + at::q + ((c - c0) & 1) * TILE, warp, tid & 31);
#pragma unroll
            for (int kk = 0; kk < 4; kk++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float2 f = unpack_bf16(x[kk][i]);
                    float *to = &dq[2 * kk + (i >> 1)][2 * (i & 1)];
                    to[0] = p.scale * (to[0] - sum[i & 1] * f.x);
                    to[1] = p.scale * (to[1] - sum[i & 1] * f.y);
                }
            store_rows<64>(p.dq + ((int64_t)(bh / p.heads) * p.t + c * CHUNK + 16 * warp) * p.ld +
                               bh % p.heads * 64,
                           p.ld, n - 16 * warp, dq);
        }
    }
#endif
}

srf_status srf__hybrid_wgmma_dq(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a,
                                const struct hybrid *p)
{
    const struct srf_attn_shape *s = &a->s;
    struct hybrid_maps m;
    SRF_TRY(maps_of(&m, s, a->q, a->k, a->v, a->ld, p));
    SRF_TRY(srf__tile_map(&m.d_o, a->d_o, s->b, s->t, s->h, a->ld_o, CHUNK));
    return launch_walk(ctx, hybrid_dq_kernel, s->b * s->h, dq_tiles::bytes, p, &m,
                       p->given && !a->carry);
}
