/* Pure SRF attention with warpgroup products, backward: the kernel of dk and dv, of which
 * srf_attn_pure_wgmma_bwd.cu tells. */
#include "kernels/cuda/srf_attn_pure_wgmma_bwd.h"

struct key_smem {
    static constexpr int v = TILE, k = v + TILE, d_o = k + 2 * TILE; /* Q, V once, K, dO twice */
    static constexpr int w = d_o + 2 * TILE, psi = w + TILE, r = psi + TILE;
    static constexpr int row = r + TILE; /* lse, delta of tokens */
    static constexpr int half = row + 2 * CHUNK * 4, bias = half + CHUNK * 4;
    static constexpr int top = bias + 64 * 4, u = top + 64 * 4; /* bias - M */
    static constexpr int bar = u + 64 * 4;                      /* Q; V; K and dO twice */
    static constexpr int bytes = bar + 4 * 8;
};

template <bool DW>
static __global__ WALK_BOUNDS(3) void pure_keys_kernel(const __grid_constant__ struct bwd_params p,
                                                       const __grid_constant__ struct bwd_maps m)
{
#if HAVE_WGMMA
    using at = key_smem;
    extern __shared__ char raw[];
    char *smem = raw + (-smem_addr(raw) & 1023u);
    uint32_t base = smem_addr(smem);
    const uint32_t bar = base + at::bar;
    int tid = threadIdx.x;
    const int own_f = 16 * (tid >> 5) + (tid >> 2 & 7), own_pair = tid & 3;
    const struct place here = place_of(p, blockIdx.x / p.n_seg, blockIdx.x % p.n_seg, 64);
    const int n_chunks = (p.t + CHUNK - 1) / CHUNK, c_first = here.seg * p.seg_chunks;
    const int c_last = min(c_first + p.seg_chunks, n_chunks) - 1;
    const int seq = (int)(here.head_i / p.h), col = (int)(here.head_i % p.h) * 64;
    const float to_log2 = SRF__LOG2E * p.scale;
    float *rows = (float *)(smem + at::row), *half = (float *)(smem + at::half);
    float *bias = (float *)(smem + at::bias), *top = (float *)(smem + at::top);
    float *u_row = (float *)(smem + at::u);
    const float *segment_r = p.r + (here.head_i * p.n_seg + here.seg) * 64 * 65;
    const float *tops = p.tops + here.head_i * n_chunks * 64;
    const uint64_t *all_cuts = p.cuts + here.head_i * n_chunks;
    auto fill_q = [&](int c) {
        barrier_expect(bar, TILE);
        bulk_tile(base, &m.q, col, c * CHUNK, seq, bar);
    };
    auto fill_v = [&](int c) {
        barrier_expect(bar + 8, TILE);
        bulk_tile(base + at::v, &m.v, col, c * CHUNK, seq, bar + 8);
    };
    auto fill_kd = [&](int c) {
        const int s = (c_last - c) & 1;
        const uint32_t full = bar + 16 + 8 * s;
        barrier_expect(full, 2 * TILE);
        bulk_tile(base + at::k + s * TILE, &m.k, col, c * CHUNK, seq, full);
        bulk_tile(base + at::d_o + s * TILE, &m.d_o, col, c * CHUNK, seq, full);
    };
    auto row_of = [&](int c) { /* of token `tid % 64`: lse, or delta */
                               const int64_t t =
                                   min((int64_t)c * CHUNK + (tid & 63), (int64_t)p.t - 1);
                               return (tid < 64 ? p.stat : p.delta)[here.head_i * p.t + t];
    };
    if (tid == 0) {
        init_barriers(bar, 4);
        fill_q(c_last);
        fill_kd(c_last);
        fill_v(c_last);
    }
    load_features(p, here.set, base + at::w, bias, tid);
    chain_wait();
    float r[8][4], u[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int f = own_f + 8 * i;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float2 x = make_float2(0.0f, 0.0f);
            if (p.n_seg > 1) x = *(const float2 *)(segment_r + f * 64 + 8 * j + 2 * own_pair);
            r[j][2 * i] = x.x;
            r[j][2 * i + 1] = x.y;
        }
        u[i] = p.n_seg > 1 ? segment_r[64 * 64 + f] : 0.0f;
    }
    __syncthreads();

    /* Of the chunk: pieces that are left, M after it and before it, its rows' numbers. */
    uint64_t cuts = 0, next_cuts = all_cuts[c_last];
    float after[2], before[2] = {tops[c_last * 64 + own_f], tops[c_last * 64 + own_f + 8]};
    float own_row = 0, next_row = row_of(c_last);
    int c = c_last, hi = 0;
    while (c >= c_first) {
        opaque(tid);
        const int lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
        const int f0 = 16 * warp + g, row = f0; /* its features, and its tokens of a chunk */
        const uint32_t diagonal = upper_mask(g, pair);
        const int n = min(CHUNK, p.t - c * CHUNK), s = (c_last - c) & 1, turn = (c_last - c) & 1;
        const int64_t t0 = (int64_t)c * CHUNK;
        const bool fresh = cuts == 0;
        opaque(base);
        const uint32_t q_tile = base, v_tile = base + at::v, psi_tile = base + at::psi;
        const uint32_t r_tile = base + at::r, w_tile = base + at::w;
        const uint32_t k_tile = base + at::k + s * TILE, do_tile = base + at::d_o + s * TILE;
        const uint32_t kd_bar = bar + 16 + 8 * s, kd_turn = (c_last - c) >> 1 & 1;
        if (fresh) {
            hi = n;
            cuts = next_cuts;
            own_row = next_row;
            if (c > c_first) {
                next_cuts = all_cuts[c - 1];
                next_row = row_of(c - 1);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                after[i] = before[i];
                before[i] = c > 0 ? tops[(c - 1) * 64 + f0 + 8 * i] : SRF__UNSET;
            }
        }
        const int lo = 63 - __clzll((long long)cuts);
        /* M after the piece and before it. */
        float m_hi[2] = {after[0], after[1]}, m_lo[2] = {before[0], before[1]};
        if (lo > 0 || hi < n) {
            struct pure_state<64> st;
            struct pure_keys keys;
            barrier_wait(kd_bar, kd_turn);
            __syncthreads();
            st.top[0] = m_lo[0];
            st.top[1] = m_lo[1];
            st.z[0] = st.z[1] = 0.0f;
            for (int end = hi;; end = lo) {
                if (end > 0) {
                    key_norms<64, 1>(k_tile, half, p.scale, p.limit, 0, end, tid);
                    __syncthreads();
                    key_features<64>(&keys, &st, w_tile, k_tile, half, bias, to_log2, f0, warp,
                                     lane);
                    __syncthreads();
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float with = end > 0 ? keys.top[i] : st.top[i];
                    if (end == lo)
                        m_lo[i] = with;
                    else
                        m_hi[i] = with;
                }
                if (end == lo) break;
            }
        }
        {
            const bool in = (tid & 63) >= lo && (tid & 63) < hi;
            rows[tid] = in ? own_row : tid < 64 ? INFINITY : 0.0f;
        }
        barrier_wait(bar, turn);
        if (fresh) clamp_large(q_tile, p.limit, tid);
        async_fence();
        __syncthreads();
        if (tid == 0 && fresh && c > c_first) fill_kd(c - 1);

        float a[8][4], ak[8][4], norm[2] = {0, 0};
        uint32_t x[4][4], v[4][4];
        warpgroup_fence();
        wgmma_tile_scores(&a[0][0], w_tile, q_tile);
        warpgroup_commit();
        warpgroup_wait<0>();
        wgmma_hold(&a[0][0]);
        /* psi of this warp's features, u with the piece; R and u as they are to shared memory. */
        {
            float sum[2] = {0, 0};
            const uint32_t psi_to = psi_tile + tile_at<64>(f0, 0) + 4 * pair;
            const uint32_t r_to = r_tile + tile_at<64>(f0, 0) + 4 * pair;
            const float shift[2] = {bias[f0] + m_hi[0], bias[f0 + 8] + m_hi[1]};
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float2 sub = *(const float2 *)(rows + 8 * j + 2 * pair);
                float2 by = *(const float2 *)(rows + CHUNK + 8 * j + 2 * pair);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    uint32_t psi =
                        pack_bf16(exp2_psi(fmaf(a[j][2 * i], to_log2, shift[i]) - sub.x),
                                  exp2_psi(fmaf(a[j][2 * i + 1], to_log2, shift[i]) - sub.y));
                    float2 rounded = unpack_bf16(psi);
                    store_shared(tile_on<64>(psi_to, j) + i * 16 * 64, psi);
                    store_shared(tile_on<64>(r_to, j) + i * 16 * 64,
                                 pack_bf16(r[j][2 * i], r[j][2 * i + 1]));
                    sum[i] += rounded.x * by.x + rounded.y * by.y;
                }
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (pair == 0) {
                    top[f0 + 8 * i] = bias[f0 + 8 * i] - m_hi[i];
                    u_row[f0 + 8 * i] = u[i];
                }
                u[i] += quad_sum(sum[i]);
            }
        }
        barrier_wait(kd_bar, kd_turn);
        own_rows(x, k_tile, p.limit, warp, lane);
        warpgroup_fence();
        wgmma_scores(&ak[0][0], x, w_tile);
        warpgroup_commit();
#pragma unroll
        for (int kk = 0; kk < 4; kk++)
#pragma unroll
            for (int i = 0; i < 4; i++) norm[i & 1] += sum_squares(x[kk][i]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            norm[i] = quad_sum(norm[i]) * (0.5f * SRF__LOG2E * p.scale * p.scale);
            if (norm[i] > SRF__HALF_LIMIT) norm[i] = SRF__HALF_LIMIT;
            if (row + 8 * i < lo || row + 8 * i >= hi) norm[i] = INFINITY;
        }
        barrier_wait(bar + 8, turn);
        own_rows(v, v_tile, warp, lane);
        async_fence();
        warpgroup_wait<0>();
        wgmma_hold(&ak[0][0]);
        __syncthreads();
        if (tid == 0 && lo == 0 && c > c_first) {
            fill_q(c - 1);
            fill_v(c - 1);
        }

        float dkf[8][4], dv[8][4];
        uint32_t kf[4][4];
        /* kf of this warp's tokens; keys outside the piece have weight 0. |y|^2 / 2 first: where it
         * is huge, a has no bits left beside it. */
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float2 shift = *(const float2 *)(top + 8 * j + 2 * pair);
#pragma unroll
            for (int i = 0; i < 2; i++)
                kf[j >> 1][(j & 1) * 2 + i] =
                    pack_bf16(exp2_fast(fmaf(ak[j][2 * i], to_log2, -norm[i]) + shift.x),
                              exp2_fast(fmaf(ak[j][2 * i + 1], to_log2, -norm[i]) + shift.y));
        }
        warpgroup_fence();
        wgmma_scores(&a[0][0], v, do_tile);
        warpgroup_commit();
        wgmma_scores(&dkf[0][0], v, r_tile);
        warpgroup_commit();
        warpgroup_wait<1>();
        wgmma_hold(&a[0][0]);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float2 by = *(const float2 *)(rows + CHUNK + 8 * j + 2 * pair);
            a[j][0] += by.x;
            a[j][1] += by.y;
            a[j][2] += by.x;
            a[j][3] += by.y;
        }
        pack_rows(x, a);
        keep_side<false>(x, diagonal, warp);
        warpgroup_fence();
        wgmma_mix(&a[0][0], kf, psi_tile, false);
        warpgroup_commit();
        wgmma_scores(&dkf[0][0], x, psi_tile, true);
        warpgroup_commit();
        warpgroup_wait<0>();
        wgmma_hold(&a[0][0]);
        wgmma_hold(&dkf[0][0]);
        uint32_t weight[4][4];
        pack_rows(weight, a);
        keep_side<false>(weight, diagonal, warp);
        float sum[2] = {0, 0};
        uint32_t da[4][4];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float2 uj = *(const float2 *)(u_row + 8 * j + 2 * pair);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float2 by = unpack_bf16(kf[j >> 1][(j & 1) * 2 + i]);
                uint32_t y =
                    pack_bf16(by.x * (dkf[j][2 * i] + uj.x), by.y * (dkf[j][2 * i + 1] + uj.y));
                /* The sum of the rounded values: w_i - y of one feature may be small. */
                float2 rounded = unpack_bf16(y);
                sum[i] += rounded.x + rounded.y;
                da[j >> 1][(j & 1) * 2 + i] = y;
            }
        }
        warpgroup_fence();
        wgmma_mix(&dv[0][0], kf, r_tile, false);
        wgmma_mix(&dv[0][0], weight, do_tile, true);
        wgmma_mix(&a[0][0], da, w_tile, false); /* dk */
        warpgroup_commit();
        sum[0] = quad_sum(sum[0]) * p.scale;
        sum[1] = quad_sum(sum[1]) * p.scale;
        warpgroup_wait<0>();
        wgmma_hold(&dv[0][0]);
        wgmma_hold(&a[0][0]);
        __syncthreads();
        /* The piece's queries go into R, which then steps back. */
        own_rows(x, psi_tile, warp, lane);
        __syncwarp();
        warpgroup_fence();
        wgmma_mix(&r[0][0], x, do_tile, true);
        warpgroup_commit();
        store_rows<64>(p.dv + here.in + t0 * p.ld, p.ld, dv, r_tile, warp, lo, hi, lane);
        if (DW) {
            warpgroup_wait<0>();
            wgmma_hold(&r[0][0]);
            store_da(psi_tile, da, warp, lane);
            __syncthreads();
            add_dw<64>(p.dw + blockIdx.x * (int64_t)(64 * 64), psi_tile, k_tile, p.limit, warp,
                       lane, false);
            __syncthreads();
        }
        own_rows(x, k_tile, p.limit, warp, lane);
#pragma unroll
        for (int kk = 0; kk < 4; kk++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float2 y = unpack_bf16(x[kk][i]);
                float *to = &a[2 * kk + (i >> 1)][2 * (i & 1)];
                to[0] = p.scale * (to[0] - sum[i & 1] * y.x);
                to[1] = p.scale * (to[1] - sum[i & 1] * y.y);
            }
        store_rows<64>(p.dk + here.in + t0 * p.ld, p.ld, a, psi_tile, warp, lo, hi, lane);
        const float back[2] = {exp2_fast(m_lo[0] - m_hi[0]), exp2_fast(m_lo[1] - m_hi[1])};
        u[0] *= back[0];
        u[1] *= back[1];
        warpgroup_wait<0>();
        wgmma_hold(&r[0][0]);
        if (__any_sync(0xffffffffu, back[0] != 1.0f || back[1] != 1.0f))
            scale_rows(r, back[0], back[1]);
        cuts ^= (uint64_t)1 << lo;
        hi = lo;
        if (cuts == 0) c--;
    }
#endif
}

srf_status srf__pure_wgmma_keys(struct srf_ctx *ctx, const struct bwd_params *p,
                                const struct bwd_maps *m, int64_t heads)
{
    return launch(ctx, p->dw ? pure_keys_kernel<true> : pure_keys_kernel<false>, heads * p->n_seg,
                  key_smem::bytes, p, m, false);
}
