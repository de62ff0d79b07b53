/* Pure SRF attention's backward, second kernel: dk, dv. The method is told in srf_attn_pure_bwd.cu.
 *
 * Floor: q, k, v, do read, dk, dv written: 12 b t h d bytes.
 */
#include "kernels/cuda/srf_attn_pure.h"
#include "kernels/cuda/srf_attn_pure_bwd.h"

template <int D, int NF> struct key_smem {
    static constexpr int tile = CHUNK * D * 2;
    static constexpr int d_o = 2 * tile; /* Q twice, dO, K, V once */
    static constexpr int k = d_o + tile, v = k + tile;
    static constexpr int w = v + tile;
    static constexpr int psi = w + NF * 64 * D * 2;
    /* Both psi and R take one gradient's sums over 64 features from warps to others. */
    static constexpr int r = psi + (NF > 1 && D > 64 ? CHUNK * D * 4 : NF * 64 * CHUNK * 2);
    static constexpr int lse = r + NF * 64 * D * 2;
    static constexpr int delta = lse + CHUNK * 4;
    static constexpr int half = delta + CHUNK * 4;
    static constexpr int bias = half + CHUNK * 4;
    static constexpr int top = bias + NF * 64 * 4; /* bias - M */
    static constexpr int u = top + NF * 64 * 4;
    static constexpr int bytes = u + NF * 64 * 4;
};

/* Values of a tile that are too large are clamped in place. */
template <int D, int threads>
static __device__ __forceinline__ void clamp_tile(uint32_t tile, uint32_t limit, int tid)
{
#pragma unroll
    for (int i = tid; i < CHUNK * D / 8; i += threads) {
        uint32_t x[4], c[4], addr = tile + tile_at<D>(i / (D / 8), i % (D / 8));
        load_shared_words(x, addr);
#pragma unroll
        for (int j = 0; j < 4; j++) c[j] = clamp_bf16(x[j], limit);
        if (c[0] != x[0] || c[1] != x[1] || c[2] != x[2] || c[3] != x[3]) {
#pragma unroll
            for (int j = 0; j < 4; j++) store_shared(addr + 4 * j, c[j]);
        }
    }
}
/* Of a 16 x 16 block on the diagonal, keys by queries: what is below it becomes 0. */
static __device__ __forceinline__ void keep_upper(float (&c)[2][4], int g, int pair)
{
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (8 * j + 2 * pair + (i & 1) < g + 8 * (i >> 1)) c[j][i] = 0.0f;
}

/* r_only: R, u of a segment's own queries, from nothing; else dk, dv. */
template <int D, int NF, bool r_only>
__global__
    __launch_bounds__(128 * NF,
                      (bwd_blocks_per_sm<D, NF>())) void pure_keys_kernel(const struct bwd_params p)
{
    using at = key_smem<D, NF>;
    constexpr int threads = 128 * NF;
    extern __shared__ __align__(128) char smem[];
    const uint32_t base = smem_addr(smem);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
    const int rg = tokens_of<NF>(warp), fg = NF > 1 ? warp >> 2 : 0, f0 = 16 * warp + g;
    const int n_segs = r_only ? p.n_seg - 1 : p.n_seg;
    const struct place here =
        place_of(p, blockIdx.x / n_segs, (int)(blockIdx.x % n_segs) + (r_only ? 1 : 0), D);
    const int n_chunks = (p.t + CHUNK - 1) / CHUNK, c_first = here.seg * p.seg_chunks;
    const float to_log2 = SRF__LOG2E * p.scale;
    const uint32_t do_tile = base + at::d_o, k_tile = base + at::k, v_tile = base + at::v;
    float *lse = (float *)(smem + at::lse), *delta = (float *)(smem + at::delta);
    float *half = (float *)(smem + at::half), *bias = (float *)(smem + at::bias);
    float *top = (float *)(smem + at::top), *u_row = (float *)(smem + at::u);
    float *segment_r = p.r + (here.head_i * p.n_seg + here.seg) * NF * 64 * (D + 1);

    auto load_queries = [&](int c, int stage) {
        const int64_t t0 = (int64_t)c * CHUNK;
        load_tile<D, threads>(base + stage * at::tile, p.q + here.in + t0 * p.ld, p.ld, CHUNK,
                              min(CHUNK, p.t - c * CHUNK), tid);
        cp_async_commit();
    };
    int c = min((here.seg + 1) * p.seg_chunks, n_chunks) - 1, stage = 0, hi = 0;
    load_tile<D, threads>(base + at::w, p.w + (here.set * p.m + p.first) * D, D, NF * 64, p.count,
                          tid);
    load_queries(c, 0);
    if (tid < NF * 64)
        bias[tid] = tid < p.count ? SRF__LOG2E * p.bias[here.set * p.m + p.first + tid] : -INFINITY;
    float r[D / 8][4], u[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const bool given = !r_only && p.n_seg > 1;
        const int f = f0 + 8 * i;
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            float2 x = make_float2(0.0f, 0.0f);
            if (given) x = *(const float2 *)(segment_r + f * D + 8 * j + 2 * pair);
            r[j][2 * i] = x.x;
            r[j][2 * i + 1] = x.y;
        }
        u[i] = given ? segment_r[NF * 64 * D + f] : 0.0f;
    }

    uint64_t cuts = 0; /* pieces of the chunk that are left */
    while (c >= c_first) {
        const int n = min(CHUNK, p.t - c * CHUNK);
        const int64_t t0 = (int64_t)c * CHUNK, token = here.head_i * p.t + t0;
        const float *tops = p.tops + (here.head_i * n_chunks + c) * NF * 64;
        const bool fresh = cuts == 0;
        const uint32_t q_tile = base + stage * at::tile;
        if (fresh) {
            hi = n;
            cuts = p.cuts[here.head_i * n_chunks + c];
            load_tile<D, threads>(do_tile, p.d_o + here.out + t0 * p.ld_o, p.ld_o, CHUNK, n, tid);
            if (!r_only || cuts != 1)
                load_tile<D, threads>(k_tile, p.k + here.in + t0 * p.ld, p.ld, CHUNK, n, tid);
            if (!r_only)
                load_tile<D, threads>(v_tile, p.v + here.in + t0 * p.ld, p.ld, CHUNK, n, tid);
            cp_async_commit();
            if (c > c_first) load_queries(c - 1, stage ^ 1);
        }
        const int lo = 63 - __clzll((long long)cuts);
        /* M after the piece and before it. */
        float m_hi[2], m_lo[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            m_hi[i] = tops[f0 + 8 * i];
            m_lo[i] = c > 0 ? tops[f0 + 8 * i - NF * 64] : SRF__UNSET;
        }
        if (lo > 0 || hi < n) {
            struct pure_state<D> st;
            struct pure_keys keys;
            cp_async_wait<0>();
            __syncthreads();
            st.top[0] = m_lo[0];
            st.top[1] = m_lo[1];
            st.z[0] = st.z[1] = 0.0f;
            for (int end = hi;; end = lo) {
                if (end > 0) {
                    key_norms<D, NF>(k_tile, half, p.scale, p.limit, 0, end, tid);
                    __syncthreads();
                    key_features<D>(&keys, &st, base + at::w, k_tile, half, bias, to_log2, f0, warp,
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
        if (tid < CHUNK) {
            const bool in = tid >= lo && tid < hi;
            lse[tid] = in ? p.stat[token + tid] : INFINITY;
            delta[tid] = in ? p.delta[token + tid] : 0.0f;
        }
        /* Q has come; on the way are dO, K, V and the next Q. */
        if (!fresh)
            cp_async_wait<0>();
        else if (c > c_first)
            cp_async_wait<2>();
        else
            cp_async_wait<1>();
        __syncthreads();
        if (fresh) {
            clamp_tile<D, threads>(q_tile, p.limit, tid);
            __syncthreads();
        }

        /* psi of this warp's features, u with the piece; R and u as they are to shared memory. */
        {
            float a[8][4], sum[2] = {0, 0};
            clear(a);
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++) {
                uint32_t w[4];
                load_a<D>(w, base + at::w + warp * 32 * D, kk, lane);
                add_b<D>(a, w, q_tile, kk, lane);
            }
            const uint32_t psi_to = base + at::psi + tile_at<CHUNK>(f0, 0) + 4 * pair;
            const uint32_t r_to = base + at::r + tile_at<D>(f0, 0) + 4 * pair;
            const float shift[2] = {bias[f0] + m_hi[0], bias[f0 + 8] + m_hi[1]};
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float2 sub = *(const float2 *)(lse + 8 * j + 2 * pair);
                float2 by = *(const float2 *)(delta + 8 * j + 2 * pair);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    uint32_t x =
                        pack_bf16(exp2_psi(fmaf(a[j][2 * i], to_log2, shift[i]) - sub.x),
                                  exp2_psi(fmaf(a[j][2 * i + 1], to_log2, shift[i]) - sub.y));
                    float2 rounded = unpack_bf16(x);
                    store_shared(tile_on<CHUNK>(psi_to, j) + i * 16 * CHUNK, x);
                    sum[i] += rounded.x * by.x + rounded.y * by.y;
                }
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (!r_only) {
#pragma unroll
                    for (int j = 0; j < D / 8; j++)
                        store_shared(tile_on<D>(r_to, j) + i * 16 * D,
                                     pack_bf16(r[j][2 * i], r[j][2 * i + 1]));
                    if (pair == 0) {
                        top[f0 + 8 * i] = bias[f0 + 8 * i] - m_hi[i];
                        u_row[f0 + 8 * i] = u[i];
                    }
                }
                u[i] += quad_sum(sum[i]);
            }
        }
        if (fresh && c > c_first)
            cp_async_wait<1>();
        else
            cp_async_wait<0>();
        __syncthreads();

        float dk[D / 8][4], dv[D / 8][4];
        uint32_t da[4][4];
        if (!r_only) {
            /* kf of this warp's tokens; keys outside the piece have weight 0. */
            const int row = 16 * rg + g;
            float a[8][4], norm[2] = {0, 0};
            clear(a);
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++) {
                uint32_t y[4];
                load_a<D>(y, k_tile + rg * 32 * D, kk, lane);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    y[i] = clamp_bf16(y[i], p.limit);
                    norm[i & 1] += sum_squares(y[i]);
                }
                add_b<D>(a, y, base + at::w + fg * 128 * D, kk, lane);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                norm[i] = quad_sum(norm[i]) * (0.5f * SRF__LOG2E * p.scale * p.scale);
                if (norm[i] > SRF__HALF_LIMIT) norm[i] = SRF__HALF_LIMIT;
                if (row + 8 * i < lo || row + 8 * i >= hi) norm[i] = INFINITY;
            }
            uint32_t kf[4][4], v[D / 16][4];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float2 shift = *(const float2 *)(top + fg * 64 + 8 * j + 2 * pair);
#pragma unroll
                for (int i = 0; i < 2; i++)
                    /* |y|^2 / 2 first: where it is huge, a has no bits left beside it. */
                    kf[j >> 1][(j & 1) * 2 + i] =
                        pack_bf16(exp2_fast(fmaf(a[j][2 * i], to_log2, -norm[i]) + shift.x),
                                  exp2_fast(fmaf(a[j][2 * i + 1], to_log2, -norm[i]) + shift.y));
            }
            float dkf[8][4];
            clear(dv);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float2 uj = *(const float2 *)(u_row + fg * 64 + 8 * j + 2 * pair);
                dkf[j][0] = dkf[j][2] = uj.x;
                dkf[j][1] = dkf[j][3] = uj.y;
            }
#pragma unroll
            for (int kk = 0; kk < 4; kk++)
                add_bt<D>(dv, kf[kk], base + at::r + fg * 64 * D * 2, kk, lane);
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++) {
                load_a<D>(v[kk], v_tile + rg * 32 * D, kk, lane);
                add_b<D>(dkf, v[kk], base + at::r + fg * 128 * D, kk, lane);
            }
            for (int tb = rg; tb < 4; tb++) {
                float w[2][4];
                uint32_t x[4];
                clear(w);
#pragma unroll
                for (int kk = 0; kk < 4; kk++) {
                    uint32_t b[4];
                    load_bt<CHUNK>(b, base + at::psi + fg * 64 * CHUNK * 2, kk, 16 * tb, lane);
                    mma_bf16(w[0], kf[kk], b[0], b[1]);
                    mma_bf16(w[1], kf[kk], b[2], b[3]);
                }
                if (tb == rg) keep_upper(w, g, pair);
                pack_a(x, w[0], w[1]);
                add_bt<D>(dv, x, do_tile + tb * 32 * D, 0, lane);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float2 by = *(const float2 *)(delta + 16 * tb + 8 * j + 2 * pair);
                    w[j][0] = w[j][2] = by.x;
                    w[j][1] = w[j][3] = by.y;
                }
#pragma unroll
                for (int kk = 0; kk < D / 16; kk++)
                    add_b<D>(w, v[kk], do_tile + tb * 32 * D, kk, lane);
                if (tb == rg) keep_upper(w, g, pair);
                pack_a(x, w[0], w[1]);
                add_b<CHUNK>(dkf, x, base + at::psi + fg * 128 * CHUNK, tb, lane);
            }
            float sum[2] = {0, 0};
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float2 weight = unpack_bf16(kf[j >> 1][(j & 1) * 2 + i]);
                    uint32_t x = pack_bf16(weight.x * dkf[j][2 * i], weight.y * dkf[j][2 * i + 1]);
                    /* The sum of the rounded values: w_i - y of one feature may be small. */
                    float2 rounded = unpack_bf16(x);
                    sum[i] += rounded.x + rounded.y;
                    da[j >> 1][(j & 1) * 2 + i] = x;
                }
            clear(dk);
#pragma unroll
            for (int kk = 0; kk < 4; kk++)
                add_bt<D>(dk, da[kk], base + at::w + fg * 64 * D * 2, kk, lane);
            sum[0] = quad_sum(sum[0]) * p.scale;
            sum[1] = quad_sum(sum[1]) * p.scale;
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++) {
                uint32_t k[4];
                load_a<D>(k, k_tile + rg * 32 * D, kk, lane);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float2 y = unpack_bf16(clamp_bf16(k[i], p.limit));
                    float *to = &dk[2 * kk + (i >> 1)][2 * (i & 1)];
                    to[0] = p.scale * (to[0] - sum[i & 1] * y.x);
                    to[1] = p.scale * (to[1] - sum[i & 1] * y.y);
                }
            }
        }
        /* The piece's queries go into R, which then steps back. */
        const float back[2] = {exp2_fast(m_lo[0] - m_hi[0]), exp2_fast(m_lo[1] - m_hi[1])};
        u[0] *= back[0];
        u[1] *= back[1];
#pragma unroll
        for (int kk = 0; kk < 4; kk++) {
            uint32_t x[4];
            load_a<CHUNK>(x, base + at::psi + warp * 32 * CHUNK, kk, lane);
            add_bt<D>(r, x, do_tile, kk, lane);
        }
        if (__any_sync(0xffffffffu, back[0] != 1.0f || back[1] != 1.0f))
            scale_rows(r, back[0], back[1]);

        if (!r_only) {
            if (p.dw) {
                const uint32_t da_tile = base + at::psi + fg * 64 * CHUNK * 2;
                __syncthreads();
                store_da(da_tile, da, rg, lane);
                __syncthreads();
                add_dw<D>(p.dw + (blockIdx.x * NF + fg) * (int64_t)(64 * D), da_tile, k_tile,
                          p.limit, rg, lane, false);
                __syncthreads();
            }
            if (NF > 1) {
                float2 *for_dk = (float2 *)(smem + at::r) + rg * 32 + lane;
                float2 *for_dv = (float2 *)(smem + at::psi) + rg * 32 + lane;
                __syncthreads();
                if (fg == 0)
                    send_rows<D>(for_dk, dk);
                else
                    send_rows<D>(for_dv, dv);
                __syncthreads();
                if (fg == 0)
                    add_sent<D>(dv, for_dv);
                else
                    add_sent<D>(dk, for_dk);
            }
            if (NF == 1 || fg == 0)
                finish_rows<D>(p, dv, p.sum[2], token, p.dv + here.in + t0 * p.ld, v_tile, rg, lo,
                               hi, lane);
            if (NF == 1 || fg == 1)
                finish_rows<D>(p, dk, p.sum[1], token, p.dk + here.in + t0 * p.ld, k_tile, rg, lo,
                               hi, lane);
        }
        __syncthreads();
        cuts ^= (uint64_t)1 << lo;
        hi = lo;
        if (cuts == 0) {
            c--;
            stage ^= 1;
        }
    }
    if (r_only) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int f = f0 + 8 * i;
#pragma unroll
            for (int j = 0; j < D / 8; j++)
                *(float2 *)(segment_r + f * D + 8 * j + 2 * pair) =
                    make_float2(r[j][2 * i], r[j][2 * i + 1]);
            if (pair == 0) segment_r[NF * 64 * D + f] = u[i];
        }
    }
}

/* What each segment's queries add to R, u becomes R, u after the segment: of all later queries, in
 * the scale of M at its end. One thread a feature and column of R or u. */
static __global__ void suffix_kernel(float *r, const float *tops, int64_t n, int n_seg,
                                     int seg_chunks, int n_chunks, int d, int rows)
{
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, count = rows * (d + 1);
    if (i >= n) return;
    const int64_t head_i = i / count, j = i % count;
    const float *top = tops + head_i * n_chunks * rows + (j < rows * d ? j / d : j - rows * d);
    float sum = 0;
    for (int seg = n_seg - 1; seg >= 0; seg--) {
        float *at = r + (head_i * n_seg + seg) * count + j, own = seg > 0 ? *at : 0.0f;
        *at = sum;
        if (seg == 0) break;
        int64_t end = min((seg + 1) * seg_chunks, n_chunks) - 1, start = seg * seg_chunks - 1;
        sum = own + sum * exp2_fast(top[start * rows] - top[end * rows]);
    }
}

template <int D, int NF>
static srf_status launch(struct srf_ctx *ctx, const struct bwd_params *p, int64_t heads)
{
    constexpr int bytes = key_smem<D, NF>::bytes, threads = 128 * NF;
    static_assert(bytes <= pure_smem_most(D, NF), "srf__pure_shape asks for less");
    cudaStream_t stream = stream_of(ctx);
    if (p->n_seg > 1) {
        const int64_t n = heads * 64 * NF * (D + 1);
        CUDA_TRY(cudaFuncSetAttribute(pure_keys_kernel<D, NF, true>,
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
        pure_keys_kernel<D, NF, true>
            <<<(unsigned)(heads * (p->n_seg - 1)), threads, bytes, stream>>>(*p);
        suffix_kernel<<<(unsigned)div_up(n, 128), 128, 0, stream>>>(
            p->r, p->tops, n, p->n_seg, p->seg_chunks, (p->t + CHUNK - 1) / CHUNK, D, 64 * NF);
    }
    CUDA_TRY(cudaFuncSetAttribute(pure_keys_kernel<D, NF, false>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    pure_keys_kernel<D, NF, false><<<(unsigned)(heads * p->n_seg), threads, bytes, stream>>>(*p);
    return srf__cuda_launched("srf_attn_bwd");
}
template <int D>
static srf_status keys(struct srf_ctx *ctx, const struct bwd_params *p, int64_t heads)
{
    return p->count <= 64 ? launch<D, 1>(ctx, p, heads) : launch<D, 2>(ctx, p, heads);
}

srf_status srf__pure_bwd_keys(struct srf_ctx *ctx, const struct bwd_params *p, int64_t heads,
                              int64_t d)
{
    FOR_HEAD_SIZE(d, keys, ctx, p, heads)
}
