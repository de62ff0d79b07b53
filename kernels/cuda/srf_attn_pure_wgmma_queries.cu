/* Pure SRF attention with warpgroup products, backward: the kernel of dq, of which
 * srf_attn_pure_wgmma_bwd.cu tells. */
#include "kernels/cuda/srf_attn_pure_wgmma_bwd.h"

/* With segments, what the queries add to R is summed as well; then V and dO have one place. */
template <bool SEGMENTS> struct query_smem {
    static constexpr int places = SEGMENTS ? 1 : 2;
    static constexpr int q = TILE, v = q + TILE, d_o = v + places * TILE; /* K, Q once */
    static constexpr int w = d_o + places * TILE, kf = w + TILE, s = kf + TILE;
    static constexpr int r = s + TILE; /* (32, 128): each thread's part */
    static constexpr int half = r + (SEGMENTS ? 2 * TILE : 0);
    static constexpr int bias = half + CHUNK * 4, top = bias + 64 * 4; /* bias + M */
    static constexpr int z = top + 64 * 4;
    static constexpr int delta = z + 64 * 4;                        /* (2, 64) bf16: its parts */
    static constexpr int r_top = delta + 64 * 4;                    /* M before the segment */
    static constexpr int bar = r_top + 64 * 4, bytes = bar + 3 * 8; /* K and Q; V and dO */
};

template <bool DW, bool SEGMENTS>
static __global__
    WALK_BOUNDS(3) void pure_queries_kernel(const __grid_constant__ struct bwd_params p,
                                            const __grid_constant__ struct bwd_maps m)
{
#if HAVE_WGMMA
    using at = query_smem<SEGMENTS>;
    extern __shared__ char raw[];
    char *smem = raw + (-smem_addr(raw) & 1023u);
    uint32_t base = smem_addr(smem);
    int tid = threadIdx.x;
    const int own_f = 16 * (tid >> 5) + (tid >> 2 & 7), own_pair = tid & 3;
    const struct place here = place_of(p, blockIdx.x / p.n_seg, blockIdx.x % p.n_seg, 64);
    const int n_chunks = (p.t + CHUNK - 1) / CHUNK, first = here.seg * p.seg_chunks;
    const int c_end = min(first + p.seg_chunks, n_chunks);
    const int seq = (int)(here.head_i / p.h), col = (int)(here.head_i % p.h) * 64;
    const float to_log2 = SRF__LOG2E * p.scale;
    const uint32_t bar = base + at::bar;
    float *half = (float *)(smem + at::half), *bias = (float *)(smem + at::bias);
    float *top = (float *)(smem + at::top), *z = (float *)(smem + at::z);
    auto fill_kq = [&](int c) {
        barrier_expect(bar, 2 * TILE);
        bulk_tile(base, &m.k, col, c * CHUNK, seq, bar);
        bulk_tile(base + at::q, &m.q, col, c * CHUNK, seq, bar);
    };
    auto fill_vd = [&](int c) {
        const int s = (c - first) % at::places;
        const uint32_t full = bar + 8 + 8 * s;
        barrier_expect(full, 2 * TILE);
        bulk_tile(base + at::d_o + s * TILE, &m.d_o, col, c * CHUNK, seq, full);
        bulk_tile(base + at::v + s * TILE, &m.v, col, c * CHUNK, seq, full);
    };
    if (tid == 0) {
        init_barriers(bar, 3);
        fill_kq(first);
        fill_vd(first);
    }
    load_features(p, here.set, base + at::w, bias, tid);
    chain_next();
    chain_wait();
    struct pure_state<64> st;
    pure_state_start(&st, here.seg > 0, 1,
                     p.states + (here.head_i * p.n_seg + here.seg) * pure_state_count(64, 1), own_f,
                     own_pair);
    /* R in the scale of M before the segment. */
    float u[2] = {0, 0};
    if (SEGMENTS) {
        if (own_pair == 0) {
            ((float *)(smem + at::r_top))[own_f] = st.top[0];
            ((float *)(smem + at::r_top))[own_f + 8] = st.top[1];
        }
#pragma unroll
        for (int i = 0; i < 32; i++) ((float *)(smem + at::r))[i * 128 + tid] = 0.0f;
    }
    __syncthreads();

    uint64_t cuts = 0;
    int c = first, lo = 0, size = CHUNK;
    int asked = c, turn = 0; /* chunk whose K, Q were asked for last, and how many before that */
    while (c < c_end) {
        opaque(tid);
        const int lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
        const int f0 = 16 * warp + g, row = f0; /* its features, and its tokens of a chunk */
        const uint32_t diagonal = lower_mask(g, pair);
        const int n = min(CHUNK, p.t - c * CHUNK), hi = min(lo + size, n);
        const int s = (c - first) % at::places;
        const int64_t t0 = (int64_t)c * CHUNK;
        opaque(base);
        const uint32_t k_tile = base, q_tile = base + at::q, kf_tile = base + at::kf;
        const bool whole = lo == 0 && size == CHUNK, last = c + 1 == c_end;
        const bool in0 = row >= lo && row < hi, in1 = row + 8 >= lo && row + 8 < hi;
        const uint32_t v_tile = base + at::v + s * TILE, do_tile = base + at::d_o + s * TILE;
        const float *stat = p.stat + here.head_i * p.t + t0 + row;
        const float lse[2] = {in0 ? stat[0] : INFINITY, in1 ? stat[8] : INFINITY};
        barrier_wait(bar, turn & 1);
        if (asked != c) { /* after a chunk in pieces: these are the next ones, or past ones */
            __syncthreads();
            if (tid == 0) fill_kq(c);
            asked = c;
            turn++;
            barrier_wait(bar, turn & 1);
        }
        key_norms<64, 1>(k_tile, half, p.scale, p.limit, lo, hi, tid);
        async_fence();
        __syncthreads();
        /* A chunk is first taken whole: this comes once. */
        if (!SEGMENTS && tid == 0 && whole && !last) fill_vd(c + 1);

        float a[8][4], aq[8][4];
        uint32_t x[4][4];
        struct pure_keys keys;
        warpgroup_fence();
        wgmma_tile_scores(&a[0][0], base + at::w, k_tile);
        warpgroup_commit();
        warpgroup_wait<0>();
        wgmma_hold(&a[0][0]);
        key_weights<64>(&keys, &st, a, half, bias[f0], bias[f0 + 8], to_log2, pair);
        uint4 o[2][2]; /* pieces pair, pair + 4 of this thread's two rows */
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const bf16 *from = p.o + here.out + (t0 + row + 8 * i) * p.ld_o + 8 * pair;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                o[i][j] = make_uint4(0, 0, 0, 0);
                if (i ? in1 : in0) o[i][j] = *(const uint4 *)(from + 32 * j);
            }
        }
        pure_publish<64>(&st, &keys, kf_tile, base + at::s, f0, lane);
        if (pair == 0) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                top[f0 + 8 * i] = bias[f0 + 8 * i] + keys.top[i];
                z[f0 + 8 * i] = st.z[i] * keys.step[i];
            }
        }
        own_rows(x, q_tile, p.limit, warp, lane);
        warpgroup_fence();
        wgmma_scores(&aq[0][0], x, base + at::w);
        warpgroup_commit();
        barrier_wait(bar + 8 + 8 * s, (c - first) / at::places & 1);
        float delta[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint32_t with[4] = {o[i][j].x, o[i][j].y, o[i][j].z, o[i][j].w};
                uint32_t y[4];
                asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                             : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
                             : "r"(do_tile + tile_at<64>(row + 8 * i, pair + 4 * j))
                             : "memory");
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float2 f = unpack_bf16(y[e]), h = unpack_bf16(with[e]);
                    delta[i] -= f.x * h.x + f.y * h.y;
                }
            }
            delta[i] = quad_sum(delta[i]);
            if (SEGMENTS && pair == 0) {
                bf16 *to = (bf16 *)(smem + at::delta) + row + 8 * i;
                to[0] = __float2bfloat16_rn(delta[i]);
                to[64] = __float2bfloat16_rn(delta[i] - __bfloat162float(to[0]));
            }
        }
        async_fence();
        warpgroup_wait<0>();
        wgmma_hold(&aq[0][0]);
        __syncthreads();
        if (whole && !last && !DW) {
            if (tid == 0) fill_kq(c + 1);
            asked = c + 1;
            turn++;
        }

        float dphi[8][4], most = -INFINITY;
        uint32_t psi[4][4]; /* of rows outside the piece 0 */
        warpgroup_fence();
        wgmma_tile_scores(&a[0][0], do_tile, v_tile);
        warpgroup_commit();
        wgmma_tile_scores(&dphi[0][0], do_tile, base + at::s);
        warpgroup_commit();
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float2 shift = *(const float2 *)(top + 8 * j + 2 * pair);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                aq[j][i] = fmaf(aq[j][i], to_log2, i & 1 ? shift.y : shift.x) - lse[i >> 1];
                most = fmaxf(most, aq[j][i]);
                aq[j][i] = exp2_psi(aq[j][i]);
            }
        }
        pack_rows(psi, aq);
        warpgroup_wait<1>();
        wgmma_hold(&a[0][0]);
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) a[j][i] += delta[i >> 1];
        pack_rows(x, a);
        keep_side<true>(x, diagonal, forget(warp));
        warpgroup_fence();
        wgmma_scores(&dphi[0][0], x, kf_tile, true);
        warpgroup_commit();
        warpgroup_wait<0>();
        wgmma_hold(&dphi[0][0]);
        uint32_t da[4][4];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float2 zj = *(const float2 *)(z + 8 * j + 2 * pair);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float2 by = unpack_bf16(psi[j >> 1][(j & 1) * 2 + i]);
                da[j >> 1][(j & 1) * 2 + i] =
                    pack_bf16(by.x * fmaf(delta[i], zj.x, dphi[j][2 * i]),
                              by.y * fmaf(delta[i], zj.y, dphi[j][2 * i + 1]));
            }
        }
        warpgroup_fence();
        wgmma_mix(&a[0][0], da, base + at::w, false);
        warpgroup_commit();
        warpgroup_wait<0>();
        wgmma_hold(&a[0][0]);
        if (__syncthreads_or(most > -SRF__MIN_DEN_LOG2 && size > 1)) {
            size >>= 1;
            continue;
        }
        pure_state_step<64>(&st, &keys);
        own_rows(x, kf_tile, warp, lane); /* kf: fewer registers than to keep it */
        add_keys(&st, x, v_tile);
        if (DW) {
            warpgroup_wait<0>();
            wgmma_hold(&st.s[0][0]);
            __syncwarp();
            store_da(kf_tile, da, warp, lane);
            __syncthreads();
            add_dw<64>(p.dw + blockIdx.x * (int64_t)(64 * 64), kf_tile, q_tile, p.limit, warp, lane,
                       c == first && lo == 0);
            __syncthreads();
        }
        scale_rows(a, p.scale, p.scale);
        store_rows<64>(p.dq + here.in + t0 * p.ld, p.ld, a, forget(base) + at::s, forget(warp), lo,
                       hi, forget(lane));
        if (pair == 0) {
            float *to = p.delta + here.head_i * p.t + t0 + row;
            if (in0) to[0] = delta[0];
            if (in1) to[8] = delta[1];
            to = p.tops + (here.head_i * n_chunks + c) * 64;
            to[f0] = keys.top[0];
            to[f0 + 8] = keys.top[1];
        }
        if (SEGMENTS && here.seg > 0) {
            /* psi of the tokens, all features; then this warp's features of all tokens. */
            const uint32_t psi_tile = forget(base) + at::s;
            store_da(psi_tile, psi, forget(warp), forget(lane));
            async_fence();
            __syncthreads();
            warpgroup_fence();
#pragma unroll
            for (int kk = 0; kk < 4; kk++)
                wgmma_64_tiles<true, true>(&a[0][0], wgmma_tile(psi_tile + 2048 * kk),
                                           wgmma_tile(do_tile + 2048 * kk), kk > 0);
            warpgroup_commit();
            float add[4] = {0, 0, 0, 0};
            const uint32_t part = base + at::delta + (g & 1) * 128 + pair * 4;
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
                /* Columns 0 and 1 of this product are the two parts of delta, others 0. */
                const int token = 16 * kk + (lane & 7) + ((lane >> 4) << 3);
                uint32_t y[4], d0 = load_shared(part + kk * 32);
                uint32_t d1 = load_shared(part + kk * 32 + 16);
                ldmatrix_x4_trans(y, psi_tile + tile_at<64>(token, 2 * warp + ((lane >> 3) & 1)));
                mma_bf16(add, y, g < 2 ? d0 : 0, g < 2 ? d1 : 0);
            }
            const float *r_top = (const float *)(smem + at::r_top) + f0;
            const float by0 = exp2_fast(r_top[0] - keys.top[0]);
            const float by1 = exp2_fast(r_top[8] - keys.top[1]);
            u[0] += by0 * (add[0] + add[1]);
            u[1] += by1 * (add[2] + add[3]);
            warpgroup_wait<0>();
            wgmma_hold(&a[0][0]);
            wgmma_hold(&st.s[0][0]);
            float *r = (float *)(smem + at::r) + tid;
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) r[(4 * j + i) * 128] += a[j][i] * (i < 2 ? by0 : by1);
        }
        warpgroup_wait<0>();
        wgmma_hold(&st.s[0][0]);
        if (SEGMENTS) {
            __syncthreads();
            if (tid == 0 && hi == n && !last) fill_vd(c + 1);
        }
        cuts |= (uint64_t)1 << lo;
        lo += size;
        size = lo & -lo;
        if (lo >= n) {
            if (tid == 0) p.cuts[here.head_i * n_chunks + c] = cuts;
            c++;
            lo = 0;
            size = CHUNK;
            cuts = 0;
        }
    }
    if (SEGMENTS && here.seg > 0) {
        const float *r = (const float *)(smem + at::r) + tid;
        float *to = p.r + (here.head_i * p.n_seg + here.seg) * 64 * 65;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int f = own_f + 8 * i;
#pragma unroll
            for (int j = 0; j < 8; j++)
                *(float2 *)(to + f * 64 + 8 * j + 2 * own_pair) =
                    make_float2(r[(4 * j + 2 * i) * 128], r[(4 * j + 2 * i + 1) * 128]);
            if (own_pair == 0) to[64 * 64 + f] = u[i];
        }
    }
#endif
}

srf_status srf__pure_wgmma_queries(struct srf_ctx *ctx, const struct bwd_params *p,
                                   const struct bwd_maps *m, int64_t heads)
{
    if (p->n_seg > 1)
        return launch(ctx,
                      p->dw ? pure_queries_kernel<true, true> : pure_queries_kernel<false, true>,
                      heads * p->n_seg, query_smem<true>::bytes, p, m, p->carried);
    return launch(ctx, p->dw ? pure_queries_kernel<true, false> : pure_queries_kernel<false, false>,
                  heads, query_smem<false>::bytes, p, m, true);
}
