/* The window hybrid with warpgroup products: dk, dv, and the sums of queries that segments begin
 * with. Tiles and products as srf_attn_hybrid_wgmma.cu tells, walks backward.
 *
 * Floor: q, k, v, do read, dk, dv written: 12 b t h d bytes; q, do once more where sequences are
 * cut into segments, 4.
 */
#include "kernels/cuda/srf_attn_hybrid_wgmma_walk.h"

/* ---- dk, dv ---------------------------------------------------------------------------------- */

/* K, V of one block; Q, dO of two. */
struct keys_tiles {
    static constexpr int v = TILE, q = 2 * TILE, d_o = 4 * TILE, w = 6 * TILE, r = 7 * TILE;
    static constexpr int half = 8 * TILE; /* of two blocks' queries, of keys */
    static constexpr int stat = half + 768, delta = stat + 512; /* two blocks' */
    static constexpr int shift = delta + 512;                   /* bias - M */
    static constexpr int u = shift + 256, bar = u + 256, bytes = bar + 3 * 8;
};

#if HAVE_WGMMA
/* P and da (times d^(-1/4)) of this thread's two keys and a block of queries, packed. */
template <bool CAUSAL>
__device__ __forceinline__ void exact_key_grads(uint32_t (&x)[4][4], uint32_t (&y)[4][4],
                                                const float (&a)[8][4], const float (&d)[8][4],
                                                uint32_t stat, uint32_t delta,
                                                const struct hybrid &p, int row, int pair)
{
    const int off = row - 2 * pair;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float2 lse = load_float2(stat + 32 * j + 8 * pair);
        const float2 add = load_float2(delta + 32 * j + 8 * pair);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float weight[2], da[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                weight[e] =
                    exp2_fast(__fmul_rn(a[j][2 * i + e], 2 * p.half_scale) - (e ? lse.y : lse.x));
                if (CAUSAL && 8 * j + e - 8 * i < off) weight[e] = 0.0f;
                da[e] = weight[e] * (p.scale * (d[j][2 * i + e] + (e ? add.y : add.x)));
            }
            x[j >> 1][(j & 1) * 2 + i] = pack_bf16(weight[0], weight[1]);
            y[j >> 1][(j & 1) * 2 + i] = pack_bf16(da[0], da[1]);
        }
    }
}
/* R of a thread out of the way of the products, and back. */
__device__ __forceinline__ void park(float *to, const float (&r)[8][4], int tid)
{
#pragma unroll
    for (int j = 0; j < 8; j++)
        __stcg((float4 *)to + j * 128 + tid, make_float4(r[j][0], r[j][1], r[j][2], r[j][3]));
}
__device__ __forceinline__ void unpark(float (&r)[8][4], const float *from, int tid)
{
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float4 x = __ldcg((const float4 *)from + j * 128 + tid);
        r[j][0] = x.x, r[j][1] = x.y, r[j][2] = x.z, r[j][3] = x.w;
    }
}
#endif

/* Backward over a segment's blocks. Before block c a tile has R of the queries from block c + 2 on;
 * when the block is done, those of block c + 1, which are still there, go into R. */
static __global__
    WALK_BOUNDS(3) void hybrid_keys_kernel(const __grid_constant__ struct hybrid p,
                                           const __grid_constant__ struct hybrid_maps m)
{
#if HAVE_WGMMA
    using at = keys_tiles;
    extern __shared__ char raw[];
    uint32_t base = smem_addr(raw + (-smem_addr(raw) & 1023u));
    int tid = threadIdx.x, bh, c, begin, c_kv, c_q;
    const int n_blocks = (p.t + 63) / 64;
    {
        const struct walker w = walker_of<64>(&p);
        bh = (int)w.bh, c = c_kv = w.end - 1, begin = w.begin;
        c_q = min(w.end, n_blocks - 1); /* whose queries come first */
    }
    auto fill_kv = [&](int c) {
        const int col = bh % p.heads * 64, seq = bh / p.heads;
        barrier_expect(base + at::bar, 2 * TILE);
        bulk_tile(base, &m.k, col, c * CHUNK, seq, base + at::bar);
        bulk_tile(base + at::v, &m.v, col, c * CHUNK, seq, base + at::bar);
    };
    auto fill_q = [&](int c) {
        const int s = (c_q - c) & 1, col = bh % p.heads * 64, seq = bh / p.heads;
        const uint32_t full = base + at::bar + 8 + 8 * s;
        barrier_expect(full, 2 * TILE);
        bulk_tile(base + at::q + s * TILE, &m.q, col, c * CHUNK, seq, full);
        bulk_tile(base + at::d_o + s * TILE, &m.d_o, col, c * CHUNK, seq, full);
    };
    /* stat and delta of a block's queries: those that are not there get no weight (2^-inf). */
    auto load_rows = [&](int c) {
        const int row = c * CHUNK + (tid & 63);
        const uint32_t to =
            base + (tid < 64 ? at::stat : at::delta) + 256 * ((c_q - c) & 1) + 4 * (tid & 63);
        const float *from = (tid < 64 ? p.stat : p.delta) + (int64_t)bh * p.t + row;
        if (row < p.t)
            asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from)
                         : "memory");
        else
            store_float(to, tid < 64 ? INFINITY : 0.0f);
        cp_async_commit();
    };
    auto take_queries = [&](int c) { /* their norms; clamped */
                                     const int s = (c_q - c) & 1;
                                     barrier_wait(base + at::bar + 8 + 8 * s, (c_q - c) >> 1 & 1);
                                     diagonal_norms(base + at::q + s * TILE,
                                                    floats_at(base + at::half + 256 * s), m.by, 0,
                                                    CHUNK, tid >> 5, tid & 31);
    };
    float bias[2], top[2], u[2] = {0, 0};
    auto publish = [&](const float(&r)[8][4]) {
        const int pair = tid & 3, f0 = 16 * (tid >> 5) + (tid >> 2 & 7);
        uint32_t x[4][4];
        pack_rows(x, r);
        put_rows(base + at::r, x, tid >> 5, tid & 31);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float sum = quad_sum(u[i]);
            if (pair != 0) continue;
            store_float(base + at::shift + 4 * (f0 + 8 * i), bias[i] - top[i]);
            store_float(base + at::u + 4 * (f0 + 8 * i), sum);
        }
    };
    float *const parked = p.parked + (int64_t)blockIdx.x * (64 * 64);
    load_tile<64, 128>(base + at::w, p.w + bh % p.heads * p.w_step, 64, 64, p.m, tid);
    load_rows(c_q);
    if (c_q > c) load_rows(c);
    if (tid == 0) {
        init_barriers(base + at::bar, 3);
        fill_q(c_q);
        if (c_q > c) fill_q(c);
        fill_kv(c);
    }
    chain_wait();
    {
        const int pair = tid & 3, f0 = 16 * (tid >> 5) + (tid >> 2 & 7);
        const bool given = (int)blockIdx.x % p.n_seg < p.n_seg - 1;
        const float *after = p.after + (int64_t)blockIdx.x * p.m * 65;
        float r[8][4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int f = f0 + 8 * i;
            const bool there = given && f < p.m;
            bias[i] = bias_of(p, bh % p.heads, f);
            top[i] = there ? p.top[((int64_t)bh * p.n_slots + c) * p.m + f] : SRF__UNSET;
            u[i] = there && pair == 0 ? after[p.m * 64 + f] : 0.0f;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float2 x = make_float2(0.0f, 0.0f);
                if (there) x = *(const float2 *)(after + f * 64 + 8 * j + 2 * pair);
                r[j][2 * i] = x.x;
                r[j][2 * i + 1] = x.y;
            }
        }
        publish(r);
        park(parked, r, tid);
    }
    cp_async_wait<0>();
    __syncthreads();
    if (c_q > c) take_queries(c_q);
    async_fence();
    __syncthreads();

    for (; c >= begin; c--) {
        float a[8][4], d[8][4], dk[8][4], dv[8][4], sum[2] = {0, 0};
        uint32_t x[4][4], y[4][4];
        const bool next = c + 1 < n_blocks;
        opaque(tid);
        opaque(bh);
        barrier_wait(base + at::bar, (c_kv - c) & 1);
        diagonal_norms(base, floats_at(base + at::half + 512), m.by, 0, CHUNK, tid >> 5, tid & 31);
        async_fence();
        __syncthreads();
        if (c < p.n_slots) {
            const int pair = tid & 3;
            const uint32_t half = base + at::half + 512 + 4 * (16 * (tid >> 5) + (tid >> 2 & 7));
            const float norm[2] = {load_float(half), load_float(half + 32)};
            begin_scores(a, base, base + at::w);
            begin_scores(d, base + at::v, base + at::r);
            warpgroup_wait<0>();
            wgmma_hold(&a[0][0]);
            wgmma_hold(&d[0][0]);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float2 shift = load_float2(base + at::shift + 32 * j + 8 * pair);
                const float2 uj = load_float2(base + at::u + 32 * j + 8 * pair);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    /* |y|^2 / 2 first: where it is huge, the product has no bits left beside it. */
                    const float kf0 =
                        far_weight(fmaf(a[j][2 * i], m.by.to_log2, -norm[i]) + shift.x);
                    const float kf1 =
                        far_weight(fmaf(a[j][2 * i + 1], m.by.to_log2, -norm[i]) + shift.y);
                    uint32_t *to = &y[j >> 1][(j & 1) * 2 + i];
                    x[j >> 1][(j & 1) * 2 + i] = pack_bf16(kf0, kf1);
                    *to = pack_bf16(kf0 * (d[j][2 * i] + uj.x), kf1 * (d[j][2 * i + 1] + uj.y));
                }
            }
            begin_mix(dv, x, base + at::r, false);
            begin_mix(dk, y, base + at::w, false);
            /* The sum of the rounded values: w_i - y of one feature may be small. */
            float ones[4];
            add_ones(ones, y, false, tid & 31);
            sum[0] = p.scale * __shfl_sync(0xffffffffu, ones[0], tid & 28);
            sum[1] = p.scale * __shfl_sync(0xffffffffu, ones[2], tid & 28);
            warpgroup_wait<0>();
            wgmma_hold(&dv[0][0]);
            wgmma_hold(&dk[0][0]);
        } else {
            clear(dv);
            clear(dk);
        }
        if (next) {
            opaque(tid);
            const int s = (c_q - c - 1) & 1;
            begin_scores(a, base, base + at::q + s * TILE);
            begin_scores(d, base + at::v, base + at::d_o + s * TILE);
            warpgroup_wait<0>();
            wgmma_hold(&a[0][0]);
            wgmma_hold(&d[0][0]);
            exact_key_grads<false>(x, y, a, d, base + at::stat + 256 * s,
                                   base + at::delta + 256 * s, p, 0, tid & 3);
            begin_mix(dv, x, base + at::d_o + s * TILE, true);
            begin_mix(dk, y, base + at::q + s * TILE, true);
            warpgroup_wait<0>();
            wgmma_hold(&dv[0][0]);
            wgmma_hold(&dk[0][0]);
        }
        opaque(tid);
        opaque(bh);
        take_queries(c);
        cp_async_wait<0>();
        async_fence();
        __syncthreads();
        {
            const int s = (c_q - c) & 1, warp = tid >> 5, n = min(CHUNK, p.t - c * CHUNK);
            begin_scores(a, base, base + at::q + s * TILE);
            begin_scores(d, base + at::v, base + at::d_o + s * TILE);
            warpgroup_wait<0>();
            wgmma_hold(&a[0][0]);
            wgmma_hold(&d[0][0]);
            exact_key_grads<true>(x, y, a, d, base + at::stat + 256 * s, base + at::delta + 256 * s,
                                  p, 16 * warp + (tid >> 2 & 7), tid & 3);
            begin_mix(dv, x, base + at::d_o + s * TILE, true);
            begin_mix(dk, y, base + at::q + s * TILE, true);
            warpgroup_wait<0>();
            wgmma_hold(&dv[0][0]);
            wgmma_hold(&dk[0][0]);
            own_rows(x, base, warp, tid & 31);
            async_fence();
            __syncthreads(); /* all have done with K and V */
            if (tid == 0 && c > begin) fill_kv(c - 1);
#pragma unroll
            for (int kk = 0; kk < 4; kk++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float2 f = unpack_bf16(x[kk][i]);
                    float *to = &dk[2 * kk + (i >> 1)][2 * (i & 1)];
                    to[0] = p.scale * (to[0] - sum[i & 1] * f.x);
                    to[1] = p.scale * (to[1] - sum[i & 1] * f.y);
                }
            const int64_t to =
                ((int64_t)(bh / p.heads) * p.t + c * CHUNK + 16 * warp) * p.ld + bh % p.heads * 64;
            store_rows<64>(p.dk + to, p.ld, n - 16 * warp, dk);
            store_rows<64>(p.dv + to, p.ld, n - 16 * warp, dv);
        }
        if (c == begin) break;
        if (next) {
            /* The queries of the block after go into R, in the scale of M of the block before. */
            opaque(tid);
            opaque(bh);
            const int s = (c_q - c - 1) & 1, pair = tid & 3;
            const int f0 = 16 * (tid >> 5) + (tid >> 2 & 7);
            float r[8][4], step[2];
            begin_scores(a, base + at::w, base + at::q + s * TILE);
            unpark(r, parked, tid);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int f = f0 + 8 * i;
                const float to =
                    f < p.m ? p.top[((int64_t)bh * p.n_slots + c - 1) * p.m + f] : SRF__UNSET;
                step[i] = exp2_fast(to - top[i]);
                if (top[i] == SRF__UNSET) step[i] = 0.0f;
                top[i] = to;
                u[i] *= step[i];
            }
            scale_rows(r, step[0], step[1]);
            warpgroup_wait<0>();
            wgmma_hold(&a[0][0]);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const uint32_t col = 256 * s + 32 * j + 8 * pair;
                const float2 half = load_float2(base + at::half + col);
                const float2 lse = load_float2(base + at::stat + col);
                const float2 delta = load_float2(base + at::delta + col);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float add = bias[i] - p.log2_m;
                    const float e0 = fmaf(a[j][2 * i], m.by.to_log2, add - half.x);
                    const float e1 = fmaf(a[j][2 * i + 1], m.by.to_log2, add - half.y);
                    const uint32_t psi = pack_bf16(far_weight(e0 + (top[i] - lse.x)),
                                                   far_weight(e1 + (top[i] - lse.y)));
                    const float2 rounded = unpack_bf16(psi);
                    x[j >> 1][(j & 1) * 2 + i] = psi;
                    u[i] += rounded.x * delta.x + rounded.y * delta.y;
                }
            }
            begin_mix(r, x, base + at::d_o + s * TILE, true);
            warpgroup_wait<0>();
            wgmma_hold(&r[0][0]);
            publish(r);
            park(parked, r, tid);
        }
        async_fence();
        __syncthreads();
        if (tid == 0) fill_q(c - 1);
        load_rows(c - 1);
    }
#endif
}

/* ---- R before the walk ----------------------------------------------------------------------- */

#define ADD_STAGES 3
struct add_tiles {
    static constexpr int d_o = ADD_STAGES * TILE, w = 2 * ADD_STAGES * TILE;
    static constexpr int half = w + TILE, rows = half + 256; /* stat, delta of each stage */
    static constexpr int bar = rows + ADD_STAGES * 512, bytes = bar + ADD_STAGES * 8;
};

/* What the queries of a segment add to R, u, in the scale of M of its first block. */
static __global__
    WALK_BOUNDS(4) void hybrid_adds_kernel(const __grid_constant__ struct hybrid p,
                                           const __grid_constant__ struct hybrid_maps m)
{
#if HAVE_WGMMA
    using at = add_tiles;
    extern __shared__ char raw[];
    const uint32_t base = smem_addr(raw + (-smem_addr(raw) & 1023u));
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
    const int f0 = 16 * warp + g;
    const int bh = blockIdx.x / p.n_seg, seg = blockIdx.x % p.n_seg;
    /* The queries of slot i are those of block i + 2. */
    const int lo = seg * p.seg_slots, hi = min(lo + p.seg_slots, p.n_slots);
    const int seq = bh / p.heads, col = bh % p.heads * 64, n = hi - lo;
    chain_next();
    if (seg == 0) return; /* of the first segment nobody asks */
    auto fill = [&](int i) {
        const int s = i % ADD_STAGES, t0 = (lo + i + 2) * CHUNK;
        const uint32_t full = base + at::bar + 8 * s;
        barrier_expect(full, 2 * TILE);
        bulk_tile(base + s * TILE, &m.q, col, t0, seq, full);
        bulk_tile(base + at::d_o + s * TILE, &m.d_o, col, t0, seq, full);
    };
    /* Rows that are not there get no weight (2^-inf). */
    auto load_rows = [&](int i) {
        const int row = (lo + i + 2) * CHUNK + (tid & 63);
        const uint32_t to = base + at::rows + 512 * (i % ADD_STAGES) + 4 * tid;
        const float *from = (tid < 64 ? p.stat : p.delta) + (int64_t)bh * p.t + row;
        if (i < n && row < p.t)
            asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from)
                         : "memory");
        else
            store_float(to, tid < 64 ? INFINITY : 0.0f);
        cp_async_commit();
    };
    load_tile<64, 128>(base + at::w, p.w + bh % p.heads * p.w_step, 64, 64, p.m, tid);
    load_rows(0);
    load_rows(1);
    if (tid == 0) {
        init_barriers(base + at::bar, ADD_STAGES);
        for (int i = 0; i < min(ADD_STAGES - 1, n); i++) fill(i);
    }
    float r[8][4], u[2] = {0, 0}, bias[2], top[2];
    clear(r);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int f = f0 + 8 * i;
        bias[i] = bias_of(p, bh % p.heads, f) - p.log2_m;
        top[i] = f < p.m ? p.top[((int64_t)bh * p.n_slots + lo) * p.m + f] : SRF__UNSET;
    }
    cp_async_wait<1>();
    async_fence();
    __syncthreads();

    for (int i = 0; i < n; i++) {
        const int s = i % ADD_STAGES;
        const uint32_t rows = base + at::rows + 512 * s;
        float a[8][4];
        uint32_t x[4][4];
        barrier_wait(base + at::bar + 8 * s, i / ADD_STAGES & 1);
        diagonal_norms(base + s * TILE, floats_at(base + at::half), m.by, 0, CHUNK, warp, lane);
        cp_async_wait<1>();
        async_fence();
        __syncthreads();
        if (tid == 0 && i + ADD_STAGES - 1 < n) fill(i + ADD_STAGES - 1);
        load_rows(i + ADD_STAGES - 1);
        begin_scores(a, base + at::w, base + s * TILE);
        warpgroup_wait<0>();
        wgmma_hold(&a[0][0]);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 half = load_float2(base + at::half + 32 * j + 8 * pair);
            const float2 lse = load_float2(rows + 32 * j + 8 * pair);
            const float2 delta = load_float2(rows + 256 + 32 * j + 8 * pair);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const float e0 = fmaf(a[j][2 * k], m.by.to_log2, bias[k] - half.x);
                const float e1 = fmaf(a[j][2 * k + 1], m.by.to_log2, bias[k] - half.y);
                const uint32_t psi =
                    pack_bf16(far_weight(e0 + (top[k] - lse.x)), far_weight(e1 + (top[k] - lse.y)));
                const float2 rounded = unpack_bf16(psi);
                x[j >> 1][(j & 1) * 2 + k] = psi;
                u[k] += rounded.x * delta.x + rounded.y * delta.y;
            }
        }
        begin_mix(r, x, base + at::d_o + s * TILE, true);
        warpgroup_wait<0>();
        wgmma_hold(&r[0][0]);
        __syncthreads(); /* all have read the tiles and the rows' numbers */
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int f = f0 + 8 * i;
        const float sum = quad_sum(u[i]);
        if (f >= p.m) continue;
        float *to = p.sum_s + ((int64_t)blockIdx.x * p.m + f) * 64 + 2 * pair;
#pragma unroll
        for (int j = 0; j < 8; j++)
            *(float2 *)(to + 8 * j) = make_float2(r[j][2 * i], r[j][2 * i + 1]);
        if (pair == 0) p.sum_z[(int64_t)blockIdx.x * p.m + f] = sum;
    }
#endif
}

/* R, u after each segment but the last, of all later queries, in the scale of M of the next
 * segment's first block. One thread a feature and column of R or u. */
static __global__ void suffix_kernel(const __grid_constant__ struct hybrid p, int64_t n)
{
    constexpr int ahead = 8; /* segments whose loads are on their way at once */
    chain_next();
    chain_wait();
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, count = (int64_t)p.m * 65;
    if (i >= n) return;
    const int64_t bh = i / count, j = i % count;
    const int f = (int)(j < p.m * 64 ? j / 64 : j - p.m * 64);
    const float *top = p.top + bh * p.n_slots * p.m + f;
    const int64_t step = j < p.m * 64 ? p.m * 64 : p.m;
    const float *sums = (j < p.m * 64 ? p.sum_s + j : p.sum_z + f) + bh * p.n_seg * step;
    float *after = p.after + bh * p.n_seg * count + j;
    float sum = 0, from = 0;
    for (int last = p.n_seg - 1; last >= 0; last -= ahead) {
        float own[ahead], to[ahead];
#pragma unroll
        for (int k = 0; k < ahead; k++) {
            const int seg = max(last - k, 0);
            own[k] = seg > 0 ? sums[seg * step] : 0.0f;
            to[k] = top[(int64_t)seg * p.seg_slots * p.m];
        }
#pragma unroll
        for (int k = 0; k < ahead; k++) {
            const int seg = last - k;
            if (seg <= 0) break;
            const float by = seg < p.n_seg - 1 ? exp2_fast(fminf(to[k] - from, 0.0f)) : 0.0f;
            sum = own[k] + sum * by;
            from = to[k];
            after[(seg - 1) * count] = sum;
        }
    }
}

srf_status srf__hybrid_wgmma_keys(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a,
                                  const struct hybrid *p)
{
    const struct srf_attn_shape *s = &a->s;
    struct hybrid_maps m;
    SRF_TRY(maps_of(&m, s, a->q, a->k, a->v, a->ld, p));
    SRF_TRY(srf__tile_map(&m.d_o, a->d_o, s->b, s->t, s->h, a->ld_o, CHUNK));
    if (p->n_seg > 1) {
        const int64_t n = s->b * s->h * s->m * 65;
        constexpr int bytes = 1024 + add_tiles::bytes;
        CUDA_TRY(cudaFuncSetAttribute(hybrid_adds_kernel,
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
        hybrid_adds_kernel<<<(unsigned)(s->b * s->h * p->n_seg), 128, bytes, stream_of(ctx)>>>(*p,
                                                                                               m);
        struct chain_shape shape = {dim3((unsigned)div_up(n, 128)), 128, 0, 1};
        chain_launch(ctx, shape, suffix_kernel, *p, n);
    }
    return launch_walk(ctx, hybrid_keys_kernel, s->b * s->h, keys_tiles::bytes, p, &m,
                       p->n_seg > 1);
}
