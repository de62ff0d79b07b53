/* The window hybrid with warpgroup products, forward. Forms and names are explained in
 * srf_attn_hybrid.cu; tiles, products and the state of features are those of pure attention
 * (srf_attn_pure_wgmma.h).
 *
 * A CTA is one warpgroup that walks through the blocks of a head's segment: 64 queries are the rows
 * of products with the keys before them, their own keys, and the features. Before block c it holds
 * S of the blocks up to c - 2 in registers; a copy in a tile serves the queries, then the keys of
 * block c - 1, which are still there, go into S. Warp w owns queries 16 w .. and features 16 w ...
 *
 * Accumulators in flight must not pass the end of a branch: the compiler then serializes every
 * product of the kernel (C7512).
 *
 * Floor: each tensor once. The products, 8 of 64 x 64 x 64 for 64 tokens, need 24 us of tensor
 * cores at b h t = 393,216.
 */
#include "kernels/cuda/srf_attn_hybrid_wgmma_walk.h"

/* Tiles: K, V of two blocks; of queries what fits beside them. */
struct fwd_tiles {
    static constexpr int v = 2 * TILE, q = 4 * TILE, w = 6 * TILE, s = 7 * TILE; /* S twice */
    static constexpr int half = 9 * TILE;         /* of two blocks' keys, of queries */
    static constexpr int top = half + 3 * 64 * 4; /* bias + M - log2(m), twice */
    static constexpr int z = top + 2 * 64 * 4;    /* (2, 64) bf16: its parts; twice */
    static constexpr int bar = z + 2 * 64 * 4, bytes = bar + 2 * 8;
};

#if HAVE_WGMMA
/* Exponents of two rows against features: a, products with W on entry. */
__device__ __forceinline__ void far_exponents(float (&a)[8][4], const float *top,
                                              const float norm[2], float to_log2, int pair)
{
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float2 shift = *(const float2 *)(top + 8 * j + 2 * pair);
#pragma unroll
        for (int i = 0; i < 4; i++)
            a[j][i] = fmaf(a[j][i], to_log2, (i & 1 ? shift.y : shift.x) - norm[i >> 1]);
    }
}
/* Exponents against keys: no weight may be above 1 for what rounding does to huge ones. */
__device__ __forceinline__ void exact_exponents(float (&a)[8][4], float exact)
{
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) a[j][i] = __fmul_rn(a[j][i], exact);
}
/* Rows of queries in the scale 2^-most; den: columns 0, 1 of a product, in the lanes of pair 0. */
struct row_scale {
    float most[2], den[4];
};
/* Weights 2^(e - most), packed. `fresh`: there is no o yet; else o, den follow the scale. */
__device__ __forceinline__ void row_weights(uint32_t (&x)[4][4], float (&e)[8][4],
                                            struct row_scale *r, float (&o)[8][4], bool fresh)
{
    float next[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) next[i >> 1] = fmaxf(next[i >> 1], e[j][i]);
    next[0] = quad_max(next[0]);
    next[1] = quad_max(next[1]);
    if (fresh) {
        r->most[0] = next[0];
        r->most[1] = next[1];
    } else {
        /* A stabiliser near the maximum does as well, and most tiles need no rescaling. */
        const bool grows[2] = {next[0] > r->most[0] + LAZY, next[1] > r->most[1] + LAZY};
        if (__any_sync(0xffffffffu, grows[0] || grows[1])) {
            float step[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                step[i] = grows[i] ? exp2_fast(r->most[i] - next[i]) : 1.0f;
                r->most[i] = grows[i] ? next[i] : r->most[i];
                r->den[2 * i] *= step[i];
                r->den[2 * i + 1] *= step[i];
            }
            scale_rows(o, step[0], step[1]);
        }
    }
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            x[j >> 1][(j & 1) * 2 + i] = pack_bf16(exp2_fast(e[j][2 * i] - r->most[i]),
                                                   exp2_fast(e[j][2 * i + 1] - r->most[i]));
}
/* What is causal of a block's own keys: the others get no weight. */
__device__ __forceinline__ void causal_exponents(float (&a)[8][4], int row, int pair)
{
    const int off = row - 2 * pair;
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (8 * j + (i & 1) - 8 * (i >> 1) > off) a[j][i] = -INFINITY;
}
#endif

static __global__
    WALK_BOUNDS(3) void hybrid_fwd_kernel(const __grid_constant__ struct hybrid p,
                                          const __grid_constant__ struct hybrid_maps m)
{
#if HAVE_WGMMA
    using at = fwd_tiles;
    extern __shared__ char raw[];
    char *smem = raw + (-smem_addr(raw) & 1023u);
    const uint32_t base = smem_addr(smem);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
    const int f0 = 16 * warp + g, row = f0; /* its features, and its queries of a block */
    const struct walker w = walker_of<64>(&p);
    const int seq = (int)(w.bh / p.heads), col = (int)w.set * 64, c0 = max(w.begin - 1, 0);
    const struct key_scales &by = m.by;
    const float exact = 2 * p.half_scale;
    float *half = (float *)(smem + at::half);
    auto fill = [&](int c) {
        const int s = (c - c0) & 1;
        const uint32_t full = base + at::bar + 8 * s;
        barrier_expect(full, c < w.begin ? 2 * TILE : 3 * TILE);
        bulk_tile(base + s * TILE, &m.k, col, c * CHUNK, seq, full);
        bulk_tile(base + at::v + s * TILE, &m.v, col, c * CHUNK, seq, full);
        if (c >= w.begin) bulk_tile(base + at::q + s * TILE, &m.q, col, c * CHUNK, seq, full);
    };
    load_tile<64, 128>(base + at::w, p.w + w.set * p.w_step, 64, 64, p.m, tid);
    cp_async_commit();
    if (tid == 0) {
        init_barriers(base + at::bar, 2);
        fill(c0);
        if (w.begin > c0) fill(w.begin);
    }
    chain_wait();
    struct pure_state<64> st;
    add_sums(&st, p.entry + w.bh * p.n_seg * SRF__STATES_COUNT, w.seg, p.team, tid);
    const float bias[2] = {bias_of(p, w.set, f0), bias_of(p, w.set, f0 + 8)};
    cp_async_wait<0>();
    async_fence();
    __syncthreads();
    if (w.begin > c0) {
        barrier_wait(base + at::bar, 0);
        diagonal_norms(base, half, by, 0, CHUNK, warp, lane);
    }

    for (int c = w.begin; c < w.end; c++) {
        const int s = (c - c0) & 1, n = min(CHUNK, p.t - c * CHUNK);
        const uint32_t k_tile = base + s * TILE, v_tile = base + at::v + s * TILE;
        const uint32_t k_before = base + (s ^ 1) * TILE, v_before = base + at::v + (s ^ 1) * TILE;
        const uint32_t q_tile = base + at::q + s * TILE, s_tile = base + at::s + s * TILE;
        float *top = (float *)(smem + at::top) + 64 * s;
        float a[8][4], o[8][4];
        uint32_t x[4][4];
        struct row_scale r = {};
        barrier_wait(base + at::bar + 8 * s, (c - c0) >> 1 & 1);
        diagonal_norms(k_tile, half + 64 * s, by, 0, CHUNK, warp, lane);
        diagonal_norms(q_tile, half + 128, by, 0, CHUNK, warp, lane);
        if (c >= 2) {
            pack_rows(x, st.s);
            put_rows(s_tile, x, warp, lane);
            if (pair == 0) {
                bf16 *z = (bf16 *)(smem + at::z) + 128 * s + f0;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const bf16 most = __float2bfloat16_rn(st.z[i]);
                    top[f0 + 8 * i] = bias[i] + st.top[i] - p.log2_m;
                    z[8 * i] = most;
                    z[64 + 8 * i] = __float2bfloat16_rn(st.z[i] - __bfloat162float(most));
                }
            }
        }
        async_fence();
        __syncthreads();

        if (c > 0) {
            begin_scores(a, base + at::w, k_before);
            warpgroup_wait<0>();
            wgmma_hold(&a[0][0]);
            take_keys(&st, x, a, half + 64 * (s ^ 1), v_before, bias, by.to_log2, lane);
            begin_scores(a, q_tile, k_before);
            warpgroup_wait<0>();
            wgmma_hold(&a[0][0]);
            wgmma_hold(&st.s[0][0]);
            exact_exponents(a, exact);
            row_weights(x, a, &r, o, true);
            begin_mix(o, x, v_before, false);
            add_ones(r.den, x, false, lane);
            warpgroup_wait<0>();
            wgmma_hold(&o[0][0]);
        } else {
            clear(o);
        }
        begin_scores(a, q_tile, k_tile);
        const float norm[2] = {half[128 + row], half[128 + row + 8]};
        __syncthreads(); /* all have done with the keys before */
        if (tid == 0 && c + 1 < w.end) fill(c + 1);
        warpgroup_wait<0>();
        wgmma_hold(&a[0][0]);
        exact_exponents(a, exact);
        causal_exponents(a, row, pair);
        row_weights(x, a, &r, o, c == 0);
        begin_mix(o, x, v_tile, true);
        add_ones(r.den, x, true, lane);
        if (c >= 2) {
            begin_scores(a, q_tile, base + at::w);
            warpgroup_wait<0>();
            wgmma_hold(&a[0][0]);
            wgmma_hold(&o[0][0]);
            far_exponents(a, top, norm, by.to_log2, pair);
            row_weights(x, a, &r, o, false);
            begin_mix(o, x, s_tile, true);
            const uint32_t z_row = base + at::z + 256 * s + (g & 1) * 128 + pair * 4;
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
                /* Columns 0 and 1 of this product are the two parts of z, others 0. */
                uint32_t z0 = load_shared(z_row + kk * 32), z1 = load_shared(z_row + kk * 32 + 16);
                mma_bf16(r.den, x[kk], g < 2 ? z0 : 0, g < 2 ? z1 : 0);
            }
        }
        const float den[2] = {__shfl_sync(0xffffffffu, r.den[0] + r.den[1], lane & ~3),
                              __shfl_sync(0xffffffffu, r.den[2] + r.den[3], lane & ~3)};
        if (p.stat && pair == 0) {
            float *to = p.stat + w.bh * p.t + c * CHUNK + row;
            if (row < n) to[0] = r.most[0] + log2f(den[0]);
            if (row + 8 < n) to[8] = r.most[1] + log2f(den[1]);
        }
        warpgroup_wait<0>();
        wgmma_hold(&o[0][0]);
        scale_rows(o, 1.0f / den[0], 1.0f / den[1]);
        store_rows<64>(p.o + w.out + (int64_t)(c * CHUNK + 16 * warp) * p.ld_o, p.ld_o,
                       n - 16 * warp, o);
    }
#endif
}

srf_status srf__hybrid_wgmma_fwd(struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a,
                                 const struct hybrid *p)
{
    struct hybrid_maps m;
    SRF_TRY(maps_of(&m, &a->s, a->q, a->k, a->v, a->ld, p));
    m.d_o = m.q; /* not used */
    return launch_walk(ctx, hybrid_fwd_kernel, a->s.b * a->s.h, fwd_tiles::bytes, p, &m, p->given);
}
