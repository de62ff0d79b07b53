/* SRF attention with more than 128 features, backward: the kernel of dk and dv. See
 * srf_attn_wide_bwd.cu. */
#include "kernels/cuda/srf_attn_wide_bwd.h"

/* Shared memory: tiles, then rows of floats. */
enum {
    K_Q = 0, /* Q, dO, K, V twice */
    K_DO = 2 * TILE,
    K_K = 4 * TILE,
    K_V = 6 * TILE,
    K_W = 8 * TILE,
    K_PSI = K_W + NW * TILE, /* (features, tokens) and, behind it, R (features, d) */
    K_SENT = K_PSI + 2 * NW * TILE,
    K_HALF = K_SENT + (NW - 1) * 2 * TILE,
    K_LSE = K_HALF + 2 * CHUNK * 4,
    K_DELTA = K_LSE + 2 * CHUNK * 4,
    K_TOP = K_DELTA + 2 * CHUNK * 4, /* bias - M */
    K_BIAS = K_TOP + NW * 256,
    K_U = K_BIAS + NW * 256,
    K_DA = K_U + NW * 256, /* (NW, tokens): sum of da over features */
    K_PLACE = K_DA + NW * 256,
    K_BYTES = K_PLACE + 24 + 1024,
};

static __global__ WIDE_BOUNDS void wide_keys_kernel(const __grid_constant__ struct wide_bwd p)
{
#if HAVE_WGMMA
    extern __shared__ char raw[];
    const uint32_t base = smem_addr(raw) + (-smem_addr(raw) & 1023u);
    const float to_log2 = SRF__LOG2E * p.scale;
    const uint32_t place = base + K_PLACE;
    const int n_chunks = (p.t + CHUNK - 1) / CHUNK;

    auto load_chunk = [&](int c) {
        const struct wide_thread at = wide_here();
        const int64_t in = load_i64(place) + (int64_t)c * CHUNK * p.ld;
        const int64_t out = load_i64(place + 8) + (int64_t)c * CHUNK * p.ld_o;
        const int n = min(CHUNK, p.t - c * CHUNK);
        const uint32_t to = base + (c & 1) * TILE;
        load_tile<D, WIDE_THREADS>(to + K_Q, p.q + in, p.ld, CHUNK, n, at.tid);
        load_tile<D, WIDE_THREADS>(to + K_DO, p.d_o + out, p.ld_o, CHUNK, n, at.tid);
        load_tile<D, WIDE_THREADS>(to + K_K, p.k + in, p.ld, CHUNK, n, at.tid);
        load_tile<D, WIDE_THREADS>(to + K_V, p.v + in, p.ld, CHUNK, n, at.tid);
        cp_async_commit();
    };
    auto prepare = [&](int c, int lo, int hi) {
        const struct wide_thread at = wide_here();
        const int token = at.tid >> 3;
        const uint32_t own = base + (c & 1) * TILE + tile_at<D>(token, at.tid & 7);
        const uint32_t to = base + 4 * ((c & 1) * CHUNK + token);
        const int64_t from = load_i64(place + 16) + c * CHUNK + token;
        const bool in = token >= lo && token < hi;
        const float half = clamp_key(own + K_K, p.scale, p.limit);
        clamp_piece(own + K_Q, p.limit);
        if ((at.tid & 7) == 0) {
            store_f32(to + K_HALF, in ? half : -INFINITY);
            store_f32(to + K_LSE, in ? p.stat[from] : INFINITY);
            store_f32(to + K_DELTA, in ? p.delta[from] : 0.0f);
        }
        fence_products();
    };
    auto cuts_of = [&](int c) { return p.cuts[(int64_t)blockIdx.x * n_chunks + c]; };
    auto lo_of = [](uint64_t cuts) { return 63 - __clzll((long long)cuts); };
    auto top_after = [&](int c, int i) {
        const struct wide_thread at = wide_here();
        const int64_t f = ((int64_t)blockIdx.x * n_chunks + c) * (64 * NW) + 64 * at.wg + at.row;
        return c >= 0 ? p.tops[f + 8 * i] : SRF__UNSET;
    };

    int c = n_chunks - 1, hi = p.t - c * CHUNK;
    uint64_t cuts = cuts_of(c); /* pieces of the chunk that are left */
    {
        const struct wide_thread at = wide_here();
        const int64_t set = p.n_sets == 1 ? 0 : blockIdx.x % p.h;
        if (at.tid == 0) {
            put_place(p, place);
        }
        __syncthreads();
        load_tile<D, WIDE_THREADS>(base + K_W, p.w + (set * p.m + p.first) * D, D, NW * 64, p.count,
                                   at.tid);
        load_chunk(c);
        put_bias(p, at, base + K_BIAS + 256 * at.wg);
    }
    float r[32], u[2] = {0, 0}, m_hi[2] = {top_after(c, 0), top_after(c, 1)};
#pragma unroll
    for (int i = 0; i < 32; i++) r[i] = 0.0f;
    cp_async_wait<0>();
    prepare(c, lo_of(cuts), hi);
    __syncthreads();

    while (c >= 0) {
        const int lo = lo_of(cuts);
        const uint32_t stage = base + (c & 1) * TILE, rows = base + 4 * (c & 1) * CHUNK;
        const bool fresh = hi == min(CHUNK, p.t - c * CHUNK);
        const uint64_t next_cuts = fresh && c > 0 ? cuts_of(c - 1) : 0;
        float m_lo[2] = {top_after(c - 1, 0), top_after(c - 1, 1)};
        if (lo > 0) {
            /* M before a piece that is not the chunk's first. */
            const struct wide_thread at = wide_here();
            float ak[32], top_now[2];
            prepare(c, 0, lo);
            __syncthreads();
            warpgroup_fence();
            tiles_product<false, false>(ak, base + K_W + at.wg * TILE, stage + K_K, false);
            warpgroup_commit();
            warpgroup_wait<0>();
            wide_hold(ak);
            key_exponents(ak, top_now, m_lo, to_log2, rows + K_HALF, base + K_BIAS + 256 * at.wg,
                          at.row, at.pair);
            m_lo[0] = top_now[0];
            m_lo[1] = top_now[1];
            __syncthreads();
            prepare(c, lo, hi);
            __syncthreads();
        }
        /* psi of this warpgroup's features; psi and R, as it is, to shared memory. */
        {
            const struct wide_thread at = wide_here();
            float a[32], sum[2] = {0, 0}, shift[2];
            uint32_t psi[8][2];
            warpgroup_fence();
            tiles_product<false, false>(a, base + K_W + at.wg * TILE, stage + K_Q, false);
            warpgroup_commit();
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float bias = load_f32(base + K_BIAS + 256 * at.wg + 4 * (at.row + 8 * i));
                shift[i] = bias + m_hi[i];
                if (at.pair == 0) {
                    store_f32(base + K_TOP + 256 * at.wg + 4 * (at.row + 8 * i), bias - m_hi[i]);
                    store_f32(base + K_U + 256 * at.wg + 4 * (at.row + 8 * i), u[i]);
                }
            }
            warpgroup_wait<0>();
            wide_hold(a);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float2 sub = load_shared_8(rows + K_LSE + 4 * (8 * j + 2 * at.pair));
                const float2 by = load_shared_8(rows + K_DELTA + 4 * (8 * j + 2 * at.pair));
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float *x = a + 4 * j + 2 * i;
                    psi[j][i] = pack_bf16(exp2_psi(fmaf(x[0], to_log2, shift[i]) - sub.x),
                                          exp2_psi(fmaf(x[1], to_log2, shift[i]) - sub.y));
                    const float2 rounded = unpack_bf16(psi[j][i]);
                    sum[i] = fmaf(rounded.x, by.x, fmaf(rounded.y, by.y, sum[i]));
                }
            }
            put_tile(base + K_PSI + at.wg * 2 * TILE, psi, at.warp, at.lane);
            if (fresh && c > 0) load_chunk(c - 1);
            put_scaled(base + K_PSI + at.wg * 2 * TILE + TILE, r, 1.0f, 1.0f, at.warp, at.lane);
            u[0] += quad_sum(sum[0]);
            u[1] += quad_sum(sum[1]);
        }
        fence_products();
        warpgroup_barrier(wide_here().wg);

        /* kf of the chunk's keys; those outside the piece have weight 0. */
        uint32_t kf[4][4], x[4][4];
        {
            const struct wide_thread at = wide_here();
            float a[32], d[32];
            warpgroup_fence();
            tiles_product<false, false>(a, stage + K_K, base + K_W + at.wg * TILE, false);
            warpgroup_commit();
            const float half0 = load_f32(rows + K_HALF + 4 * at.row);
            const float half1 = load_f32(rows + K_HALF + 4 * at.row + 32);
            warpgroup_wait<0>();
            wide_hold(a);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float2 shift =
                    load_shared_8(base + K_TOP + 256 * at.wg + 4 * (8 * j + 2 * at.pair));
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    /* |y|^2 / 2 first: where it is huge, a has no bits left beside it. */
                    const float e = fmaf(a[4 * j + i], to_log2, i & 2 ? half1 : half0);
                    a[4 * j + i] = exp2_fast(e + (i & 1 ? shift.y : shift.x));
                }
            }
            pack_wide(kf, a);
            warpgroup_fence();
            tiles_product<false, false>(d, stage + K_V, stage + K_DO, false);
            warpgroup_commit();
            warpgroup_wait<0>();
            wide_hold(d);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float2 by = load_shared_8(rows + K_DELTA + 4 * (8 * j + 2 * at.pair));
#pragma unroll
                for (int i = 0; i < 4; i++) d[4 * j + i] += i & 1 ? by.y : by.x;
            }
            pack_wide(x, d);
            keep_later(x, at.warp, at.lane);
        }
        float own_k[8], own_v[8];
        {
            const struct wide_thread at = wide_here();
            float dkf[32], sum[2] = {0, 0};
            warpgroup_fence();
            tiles_product<false, false>(dkf, stage + K_V, base + K_PSI + at.wg * 2 * TILE + TILE,
                                        false);
            packed_product<false>(dkf, x, base + K_PSI + at.wg * 2 * TILE, true);
            warpgroup_commit();
            warpgroup_wait<0>();
            wide_hold(dkf);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float2 uj =
                    load_shared_8(base + K_U + 256 * at.wg + 4 * (8 * j + 2 * at.pair));
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float2 weight = unpack_bf16(kf[j >> 1][(j & 1) * 2 + i]);
                    const uint32_t da = pack_bf16(weight.x * (dkf[4 * j + 2 * i] + uj.x),
                                                  weight.y * (dkf[4 * j + 2 * i + 1] + uj.y));
                    /* The sum of the rounded values: w_i - y of one feature may be small. */
                    const float2 rounded = unpack_bf16(da);
                    sum[i] += rounded.x + rounded.y;
                    x[j >> 1][(j & 1) * 2 + i] = da;
                }
            }
            sum[0] = quad_sum(sum[0]);
            sum[1] = quad_sum(sum[1]);
            if (at.pair == 0) {
                store_f32(base + K_DA + 256 * at.wg + 4 * at.row, sum[0]);
                store_f32(base + K_DA + 256 * at.wg + 4 * at.row + 32, sum[1]);
            }
        }
#pragma unroll
        for (int left = 0; left < D; left += 32) {
            const struct wide_thread at = wide_here();
            float dk[16];
            const uint32_t w_word = tile_word(base + K_W + at.wg * TILE + 2 * left);
            warpgroup_fence();
#pragma unroll
            for (int kk = 0; kk < 4; kk++) wgmma_32(dk, x[kk], w_word + 128 * kk, kk > 0);
            warpgroup_commit();
            warpgroup_wait<0>();
            wide_hold(dk);
            send_columns(base + K_SENT + 16 * (at.tid & 127) + at.wg * (NW - 1) * 4096, dk, own_k,
                         left, at.wg);
        }
        {
            const struct wide_thread at = wide_here();
            float w[32];
            warpgroup_fence();
            packed_product<true>(w, kf, base + K_PSI + at.wg * 2 * TILE, false);
            warpgroup_commit();
            warpgroup_wait<0>();
            wide_hold(w);
            pack_wide(x, w);
            keep_later(x, at.warp, at.lane);
        }
        {
            const struct wide_thread at = wide_here();
            /* The piece's queries go into R, which then steps back. */
            const uint32_t r_word = tile_word(base + K_PSI + at.wg * 2 * TILE + TILE);
            const uint32_t do_word = tile_word(stage + K_DO);
            float dv[2][16];
            warpgroup_fence();
            tiles_product<false, true>(r, base + K_PSI + at.wg * 2 * TILE, stage + K_DO, true);
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int kk = 0; kk < 4; kk++)
                    wgmma_32(dv[half], kf[kk], r_word + 4 * half + 128 * kk, kk > 0);
#pragma unroll
                for (int kk = 0; kk < 4; kk++)
                    wgmma_32(dv[half], x[kk], do_word + 4 * half + 128 * kk, true);
            }
            warpgroup_commit();
            warpgroup_wait<0>();
            wide_hold(r);
            wide_hold(dv[0]);
            wide_hold(dv[1]);
            warpgroup_barrier(wide_here().wg);
            send_columns(base + K_PSI + 16 * (at.tid & 127) + at.wg * 2 * TILE, dv[0], own_v, 0,
                         at.wg);
            send_columns(base + K_PSI + 16 * (at.tid & 127) + at.wg * 2 * TILE, dv[1], own_v, 32,
                         at.wg);
        }
        const float back[2] = {exp2_fast(m_lo[0] - m_hi[0]), exp2_fast(m_lo[1] - m_hi[1])};
        u[0] *= back[0];
        u[1] *= back[1];
        if (__any_sync(0xffffffffu, back[0] != 1.0f || back[1] != 1.0f)) {
#pragma unroll
            for (int i = 0; i < 32; i++) r[i] *= back[i >> 1 & 1];
        }
        cp_async_wait<0>();
        cuts ^= (uint64_t)1 << lo;
        if (fresh && c > 0) prepare(c - 1, lo_of(next_cuts), CHUNK);
        __syncthreads();

        const struct wide_thread at = wide_here();
        sum_columns(own_v, base + K_PSI + 16 * (at.tid & 127), 2 * TILE, at.wg);
        sum_columns(own_k, base + K_SENT + 16 * (at.tid & 127), (NW - 1) * 4096, at.wg);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < NW; w++)
                sum += load_f32(base + K_DA + 256 * w + 4 * (at.row + 8 * i));
            sum *= p.scale;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float2 y = unpack_bf16(load_shared(
                    stage + K_K + tile_at<D>(at.row + 8 * i, 2 * at.wg + j) + 4 * at.pair));
                float *to = own_k + 4 * j + 2 * i;
                to[0] = p.scale * (to[0] - sum * y.x);
                to[1] = p.scale * (to[1] - sum * y.y);
            }
        }
        finish_columns(p, place, own_k, p.sum[1], p.dk, c, lo, hi);
        finish_columns(p, place, own_v, p.sum[2], p.dv, c, lo, hi);
        hi = lo;
        __syncthreads(); /* what this piece read is free to be written */
        m_hi[0] = m_lo[0];
        m_hi[1] = m_lo[1];
        if (cuts == 0) {
            c--;
            hi = CHUNK;
            cuts = c >= 0 ? cuts_of(c) : 0;
        } else {
            prepare(c, lo_of(cuts), hi);
            __syncthreads();
        }
    }
#endif
}

srf_status srf__wide_keys(struct srf_ctx *ctx, const struct wide_bwd *p, unsigned heads)
{
    CUDA_TRY(cudaFuncSetAttribute(wide_keys_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  K_BYTES));
    wide_keys_kernel<<<heads, WIDE_THREADS, K_BYTES, stream_of(ctx)>>>(*p);
    return srf__cuda_launched("srf_attn_bwd");
}
