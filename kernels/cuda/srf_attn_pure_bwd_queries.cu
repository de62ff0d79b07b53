/* Pure SRF attention's backward, first kernel: dq, and what the second wants. The method is told in
 * srf_attn_pure_bwd.cu.
 *
 * Floor: q, k, v, o, do read, dq written: 12 b t h d bytes.
 */
#include "kernels/cuda/srf_attn_pure.h"
#include "kernels/cuda/srf_attn_pure_bwd.h"

template <int D, int NF> struct query_smem {
    static constexpr int tile = CHUNK * D * 2;
    static constexpr int v = 2 * tile; /* K twice, V, Q, dO, O once */
    static constexpr int q = v + tile, d_o = q + tile, o = d_o + tile;
    static constexpr int w = o + tile;
    static constexpr int kf = w + NF * 64 * D * 2;
    static constexpr int s = kf + NF * 64 * CHUNK * 2;
    static constexpr int half = s + NF * 64 * D * 2;
    static constexpr int bias = half + CHUNK * 4;
    static constexpr int top = bias + NF * 64 * 4; /* bias + M */
    static constexpr int z = top + NF * 64 * 4;
    static constexpr int bytes = z + NF * 64 * 4;
};

template <int D, int NF>
__global__ __launch_bounds__(128 * NF, (bwd_blocks_per_sm<D, NF>())) void pure_queries_kernel(
    const struct bwd_params p)
{
    using at = query_smem<D, NF>;
    constexpr int threads = 128 * NF;
    extern __shared__ __align__(128) char smem[];
    const uint32_t base = smem_addr(smem);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
    const int rg = tokens_of<NF>(warp), fg = NF > 1 ? warp >> 2 : 0, f0 = 16 * warp + g;
    const struct place here = place_of(p, blockIdx.x / p.n_seg, blockIdx.x % p.n_seg, D);
    const int n_chunks = (p.t + CHUNK - 1) / CHUNK;
    const int c_end = min((here.seg + 1) * p.seg_chunks, n_chunks);
    const float to_log2 = SRF__LOG2E * p.scale;
    float *half = (float *)(smem + at::half), *bias = (float *)(smem + at::bias);
    float *top = (float *)(smem + at::top), *z = (float *)(smem + at::z);

    auto load_keys = [&](int c, int stage) {
        const int64_t t0 = (int64_t)c * CHUNK;
        const int n = min(CHUNK, p.t - c * CHUNK);
        load_tile<D, threads>(base + stage * at::tile, p.k + here.in + t0 * p.ld, p.ld, CHUNK, n,
                              tid);
        cp_async_commit();
    };
    load_tile<D, threads>(base + at::w, p.w + (here.set * p.m + p.first) * D, D, NF * 64, p.count,
                          tid);
    int c = here.seg * p.seg_chunks, stage = 0, lo = 0, size = CHUNK;
    load_keys(c, 0);
    if (tid < NF * 64)
        bias[tid] = tid < p.count ? SRF__LOG2E * p.bias[here.set * p.m + p.first + tid] : -INFINITY;
    struct pure_state<D> st;
    pure_state_start(&st, here.seg > 0, NF,
                     p.states + (here.head_i * p.n_seg + here.seg) * pure_state_count(D, NF), f0,
                     pair);
    uint64_t cuts = 0;
    cp_async_wait<0>();
    __syncthreads();

    while (c < c_end) {
        const int n = min(CHUNK, p.t - c * CHUNK), hi = min(lo + size, n);
        const int64_t t0 = (int64_t)c * CHUNK;
        const uint32_t k_tile = base + stage * at::tile, v_tile = base + at::v;
        const bool fresh = lo == 0 && size == CHUNK;
        const int row = 16 * rg + g;
        const bool in0 = row >= lo && row < hi, in1 = row + 8 >= lo && row + 8 < hi;
        const float *stat = p.stat + here.head_i * p.t + t0 + row;
        const float lse0 = in0 ? stat[0] : INFINITY, lse1 = in1 ? stat[8] : INFINITY;
        key_norms<D, NF>(k_tile, half, p.scale, p.limit, lo, hi, tid);
        __syncthreads();
        if (fresh) {
            load_tile<D, threads>(v_tile, p.v + here.in + t0 * p.ld, p.ld, CHUNK, n, tid);
            load_tile<D, threads>(base + at::q, p.q + here.in + t0 * p.ld, p.ld, CHUNK, n, tid);
            load_tile<D, threads>(base + at::d_o, p.d_o + here.out + t0 * p.ld_o, p.ld_o, CHUNK, n,
                                  tid);
            load_tile<D, threads>(base + at::o, p.o + here.out + t0 * p.ld_o, p.ld_o, CHUNK, n,
                                  tid);
            cp_async_commit();
            if (c + 1 < c_end) load_keys(c + 1, stage ^ 1);
        }
        struct pure_keys keys;
        key_features<D>(&keys, &st, base + at::w, k_tile, half, bias, to_log2, f0, warp, lane);
        pure_publish<D>(&st, &keys, base + at::kf, base + at::s, f0, lane);
        if (pair == 0) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                top[f0 + 8 * i] = bias[f0 + 8 * i] + keys.top[i];
                z[f0 + 8 * i] = st.z[i] * keys.step[i];
            }
        }
        if (fresh && c + 1 < c_end)
            cp_async_wait<1>();
        else
            cp_async_wait<0>();
        __syncthreads();

        uint32_t d_o[D / 16][4];
        float delta[2] = {0, 0}, dphi[8][4];
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++) {
            uint32_t o[4];
            load_a<D>(d_o[kk], base + at::d_o + rg * 32 * D, kk, lane);
            load_a<D>(o, base + at::o + rg * 32 * D, kk, lane);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float2 x = unpack_bf16(d_o[kk][i]), y = unpack_bf16(o[i]);
                delta[i & 1] -= x.x * y.x + x.y * y.y;
            }
        }
        delta[0] = quad_sum(delta[0]);
        delta[1] = quad_sum(delta[1]);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float2 zj = *(const float2 *)(z + fg * 64 + 8 * j + 2 * pair);
            dphi[j][0] = delta[0] * zj.x;
            dphi[j][1] = delta[0] * zj.y;
            dphi[j][2] = delta[1] * zj.x;
            dphi[j][3] = delta[1] * zj.y;
        }
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++)
            add_b<D>(dphi, d_o[kk], base + at::s + fg * 128 * D, kk, lane);
        for (int kb = 0; kb <= rg; kb++) {
            float dp[2][4];
            uint32_t a[4];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                dp[j][0] = dp[j][1] = delta[0];
                dp[j][2] = dp[j][3] = delta[1];
            }
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++)
                add_b<D>(dp, d_o[kk], v_tile + kb * 32 * D, kk, lane);
            if (kb == rg) keep_lower(dp, g, pair);
            pack_a(a, dp[0], dp[1]);
            add_b<CHUNK>(dphi, a, base + at::kf + fg * 128 * CHUNK, kb, lane);
        }
        /* da = psi dphi; rows outside the piece have psi = 0. */
        float a[8][4], most = -INFINITY;
        token_products<D>(a, base + at::q, base + at::w, p.limit, rg, fg, lane);
        uint32_t da[4][4];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float2 shift = *(const float2 *)(top + fg * 64 + 8 * j + 2 * pair);
            float e[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                e[i] = fmaf(a[j][i], to_log2, i & 1 ? shift.y : shift.x) - (i & 2 ? lse1 : lse0);
                most = fmaxf(most, e[i]);
                e[i] = exp2_psi(e[i]) * dphi[j][i];
            }
            da[j >> 1][(j & 1) * 2] = pack_bf16(e[0], e[1]);
            da[j >> 1][(j & 1) * 2 + 1] = pack_bf16(e[2], e[3]);
        }
        float dq[D / 8][4];
        clear(dq);
#pragma unroll
        for (int kk = 0; kk < 4; kk++)
            add_bt<D>(dq, da[kk], base + at::w + fg * 64 * D * 2, kk, lane);
        cp_async_wait<0>();
        if (__syncthreads_or(most > -SRF__MIN_DEN_LOG2 && size > 1)) {
            size >>= 1;
            continue;
        }
        pure_state_add<D>(&st, &keys, v_tile, lane);
        if (p.dw) {
            const uint32_t da_tile = base + at::kf + fg * 64 * CHUNK * 2;
            store_da(da_tile, da, rg, lane);
            __syncthreads();
            add_dw<D>(p.dw + (blockIdx.x * NF + fg) * (int64_t)(64 * D), da_tile, base + at::q,
                      p.limit, rg, lane, c == here.seg * p.seg_chunks && lo == 0);
            __syncthreads();
        }
        if (NF > 1) {
            float2 *other = (float2 *)(smem + at::s) + rg * 32 + lane;
            if (fg == 1) send_rows<D>(other, dq);
            __syncthreads();
            if (fg == 0) add_sent<D>(dq, other);
        }
        if (fg == 0) {
            scale_rows(dq, p.scale, p.scale);
            finish_rows<D>(p, dq, p.sum[0], here.head_i * p.t + t0, p.dq + here.in + t0 * p.ld,
                           base + at::q, rg, lo, hi, lane);
            if (pair == 0) {
                float *to = p.delta + here.head_i * p.t + t0 + row;
                if (in0) to[0] = delta[0];
                if (in1) to[8] = delta[1];
            }
        }
        if (pair == 0) {
            float *to = p.tops + (here.head_i * n_chunks + c) * NF * 64;
            to[f0] = keys.top[0];
            to[f0 + 8] = keys.top[1];
        }
        cuts |= (uint64_t)1 << lo;
        lo += size;
        size = lo & -lo;
        if (lo >= n) {
            if (tid == 0) p.cuts[here.head_i * n_chunks + c] = cuts;
            c++;
            stage ^= 1;
            lo = 0;
            size = CHUNK;
            cuts = 0;
        }
    }
}

template <int D, int NF>
static srf_status launch(struct srf_ctx *ctx, const struct bwd_params *p, int64_t heads)
{
    constexpr int bytes = query_smem<D, NF>::bytes;
    static_assert(bytes <= pure_smem_most(D, NF), "srf__pure_shape asks for less");
    CUDA_TRY(cudaFuncSetAttribute(pure_queries_kernel<D, NF>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    pure_queries_kernel<D, NF>
        <<<(unsigned)(heads * p->n_seg), 128 * NF, bytes, stream_of(ctx)>>>(*p);
    return srf__cuda_launched("srf_attn_bwd");
}
template <int D>
static srf_status queries(struct srf_ctx *ctx, const struct bwd_params *p, int64_t heads)
{
    return p->count <= 64 ? launch<D, 1>(ctx, p, heads) : launch<D, 2>(ctx, p, heads);
}

srf_status srf__pure_bwd_queries(struct srf_ctx *ctx, const struct bwd_params *p, int64_t heads,
                                 int64_t d)
{
    FOR_HEAD_SIZE(d, queries, ctx, p, heads)
}
