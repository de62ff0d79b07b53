/* Pure SRF attention with warpgroup products, backward. The method is told in srf_attn_pure_bwd.cu,
 * what is different here in srf_attn_pure_wgmma.h.
 *
 * Tiles are asked for again as soon as the block has read them. Those that feed the first products
 * of a chunk (K and Q, or Q and V) have one place, the others two. What a segment's queries add to
 * R is summed in the scale of M before the segment: no pieces, and no M in between.
 *
 * Floor: as there.
 */
#include "kernels/cuda/srf_attn_pure_wgmma.h"

struct bwd_maps {
    CUtensorMap q, k, v, d_o;
};

#if HAVE_WGMMA
/* W and the bias of a head to shared memory; a barrier follows. */
__device__ __forceinline__ void load_features(const struct bwd_params &p, int64_t set, uint32_t w,
                                              float *bias, int tid)
{
    load_tile<64, 128>(w, p.w + set * p.m * 64, 64, 64, p.m, tid);
    cp_async_commit();
    if (tid < 64) bias[tid] = tid < p.m ? SRF__LOG2E * p.bias[set * p.m + tid] : -INFINITY;
    cp_async_wait<0>();
    async_fence();
}
__device__ __forceinline__ void init_barriers(uint32_t bar, int n)
{
    for (int i = 0; i < n; i++) barrier_init(bar + 8 * i, 1);
    barrier_init_done();
}
/* The compiler no longer knows that x is what it was. It else keeps dozens of addresses that derive
 * from x in registers that the products need. */
template <typename T> __device__ __forceinline__ void opaque(T &x)
{
    asm volatile("" : "+r"(x));
}
__device__ __forceinline__ uint32_t larger_of_halves(uint32_t x, uint32_t y)
{
    uint32_t r;
    asm("max.u16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y));
    return r;
}
/* Values of a tile that are too large are clamped in place. */
__device__ __forceinline__ void clamp_large(uint32_t tile, uint32_t limit, int tid)
{
    uint32_t x[4][4], most = 0;
    const uint32_t at = tile + tid * 16;
#pragma unroll
    for (int i = 0; i < 4; i++)
        asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[i][0]), "=r"(x[i][1]), "=r"(x[i][2]), "=r"(x[i][3])
                     : "r"(at + 2048 * i)
                     : "memory");
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) most = larger_of_halves(most, x[i][j] & 0x7fff7fffu);
    /* Magnitudes of bf16 are ordered as their bits; NaN is above all. */
    if ((most & 0xffffu) <= (limit & 0xffffu) && most >> 16 <= limit >> 16) return;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) store_shared(at + 2048 * i + 4 * j, clamp_bf16(x[i][j], limit));
}
#endif

/* ---- queries --------------------------------------------------------------------------------- */

struct query_smem {
    static constexpr int q = TILE, v = q + TILE, d_o = v + 2 * TILE; /* K, Q once, V, dO twice */
    static constexpr int w = d_o + 2 * TILE, kf = w + TILE, s = kf + TILE, half = s + TILE;
    static constexpr int bias = half + CHUNK * 4, top = bias + 64 * 4; /* bias + M */
    static constexpr int z = top + 64 * 4, bar = z + 64 * 4;           /* K and Q; V and dO twice */
    static constexpr int bytes = bar + 3 * 8;
};

template <bool DW>
static __global__
    WALK_BOUNDS(3) void pure_queries_kernel(const __grid_constant__ struct bwd_params p,
                                            const __grid_constant__ struct bwd_maps m)
{
#if HAVE_WGMMA
    using at = query_smem;
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
        const int s = (c - first) & 1;
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
    struct pure_state<64> st;
    pure_state_start(&st, here.seg > 0, 1,
                     p.states + (here.head_i * p.n_seg + here.seg) * pure_state_count(64, 1), own_f,
                     own_pair);
    __syncthreads();

    uint64_t cuts = 0;
    int c = first, lo = 0, size = CHUNK;
    int asked = c, turn = 0; /* chunk whose K, Q were asked for last, and how many before that */
    while (c < c_end) {
        opaque(tid);
        const int lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
        const int f0 = 16 * warp + g, row = f0; /* its features, and its tokens of a chunk */
        const uint32_t diagonal = lower_mask(g, pair);
        const int n = min(CHUNK, p.t - c * CHUNK), hi = min(lo + size, n), s = (c - first) & 1;
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
        if (tid == 0 && whole && !last) fill_vd(c + 1);

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
        barrier_wait(bar + 8 + 8 * s, (c - first) >> 1 & 1);
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
        keep_side<true>(x, diagonal, warp);
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
        store_rows<64>(p.dq + here.in + t0 * p.ld, p.ld, a, base + at::s, warp, lo, hi, lane);
        if (pair == 0) {
            float *to = p.delta + here.head_i * p.t + t0 + row;
            if (in0) to[0] = delta[0];
            if (in1) to[8] = delta[1];
            to = p.tops + (here.head_i * n_chunks + c) * 64;
            to[f0] = keys.top[0];
            to[f0 + 8] = keys.top[1];
        }
        warpgroup_wait<0>();
        wgmma_hold(&st.s[0][0]);
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
#endif
}

/* ---- what segments' queries add to R --------------------------------------------------------- */

#define TAIL_STAGES 3
struct tail_smem {
    static constexpr int d_o = TAIL_STAGES * TILE, w = d_o + TAIL_STAGES * TILE;
    static constexpr int bias = w + TILE, row = bias + 64 * 4; /* (lse, delta) of tokens */
    static constexpr int bar = row + 2 * CHUNK * 4, bytes = bar + TAIL_STAGES * 8;
};

/* R, u of the queries of segments 1 .. n_seg - 1, in the scale of M before the segment. */
static __global__ WALK_BOUNDS(3) void pure_tail_kernel(const __grid_constant__ struct bwd_params p,
                                                       const __grid_constant__ struct bwd_maps m)
{
#if HAVE_WGMMA
    using at = tail_smem;
    extern __shared__ char raw[];
    char *smem = raw + (-smem_addr(raw) & 1023u);
    const uint32_t base = smem_addr(smem), bar = base + at::bar;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
    const int f0 = 16 * warp + g;
    const struct place here =
        place_of(p, blockIdx.x / (p.n_seg - 1), (int)(blockIdx.x % (p.n_seg - 1)) + 1, 64);
    const int n_chunks = (p.t + CHUNK - 1) / CHUNK, first = here.seg * p.seg_chunks;
    const int n = min(p.seg_chunks, n_chunks - first);
    const int seq = (int)(here.head_i / p.h), col = (int)(here.head_i % p.h) * 64;
    const float to_log2 = SRF__LOG2E * p.scale;
    float *bias = (float *)(smem + at::bias), *rows = (float *)(smem + at::row);
    auto fill = [&](int i) {
        const int s = i % TAIL_STAGES;
        barrier_expect(bar + 8 * s, 2 * TILE);
        bulk_tile(base + s * TILE, &m.q, col, (first + i) * CHUNK, seq, bar + 8 * s);
        bulk_tile(base + at::d_o + s * TILE, &m.d_o, col, (first + i) * CHUNK, seq, bar + 8 * s);
    };
    /* Of token `tid % 64` of a chunk: lse, or delta. */
    auto row_of = [&](int i) {
        const int t = (first + i) * CHUNK + (tid & 63);
        const float *from = (tid < 64 ? p.stat : p.delta) + here.head_i * p.t;
        return i < n && t < p.t ? from[t] : tid < 64 ? INFINITY : 0.0f;
    };
    if (tid == 0) {
        init_barriers(bar, TAIL_STAGES);
        for (int i = 0; i < min(TAIL_STAGES - 1, n); i++) fill(i);
    }
    load_features(p, here.set, base + at::w, bias, tid);
    const float *tops = p.tops + (here.head_i * n_chunks + first - 1) * 64;
    const float m0 = tops[f0], m1 = tops[f0 + 8];
    float next = row_of(0), r[8][4], u[2] = {0, 0};
    clear(r);
    __syncthreads();
    const float shift[2] = {bias[f0] + m0, bias[f0 + 8] + m1};

    for (int i = 0; i < n; i++) {
        const int s = i % TAIL_STAGES;
        const uint32_t q_tile = base + s * TILE;
        rows[tid] = next;
        next = row_of(i + 1);
        barrier_wait(bar + 8 * s, i / TAIL_STAGES & 1);
        clamp_large(q_tile, p.limit, tid);
        async_fence();
        __syncthreads();
        if (tid == 0 && i + TAIL_STAGES - 1 < n) fill(i + TAIL_STAGES - 1);
        float a[8][4], sum[2] = {0, 0};
        uint32_t x[4][4];
        warpgroup_fence();
        wgmma_tile_scores(&a[0][0], base + at::w, q_tile);
        warpgroup_commit();
        warpgroup_wait<0>();
        wgmma_hold(&a[0][0]);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float2 sub = *(const float2 *)(rows + 8 * j + 2 * pair);
            float2 by = *(const float2 *)(rows + CHUNK + 8 * j + 2 * pair);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                uint32_t psi =
                    pack_bf16(exp2_psi(fmaf(a[j][2 * k], to_log2, shift[k]) - sub.x),
                              exp2_psi(fmaf(a[j][2 * k + 1], to_log2, shift[k]) - sub.y));
                float2 rounded = unpack_bf16(psi);
                x[j >> 1][(j & 1) * 2 + k] = psi;
                sum[k] += rounded.x * by.x + rounded.y * by.y;
            }
        }
        warpgroup_fence();
        wgmma_mix(&r[0][0], x, base + at::d_o + s * TILE, true);
        warpgroup_commit();
        u[0] += quad_sum(sum[0]);
        u[1] += quad_sum(sum[1]);
        warpgroup_wait<0>();
        wgmma_hold(&r[0][0]);
        __syncthreads();
    }
    float *to = p.r + (here.head_i * p.n_seg + here.seg) * 64 * 65;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const int f = f0 + 8 * k;
#pragma unroll
        for (int j = 0; j < 8; j++)
            *(float2 *)(to + f * 64 + 8 * j + 2 * pair) = make_float2(r[j][2 * k], r[j][2 * k + 1]);
        if (pair == 0) to[64 * 64 + f] = u[k];
    }
#endif
}

/* What each segment's queries add to R, u becomes R, u after the segment: of all later queries, in
 * the scale of M at its end. One thread a feature and column of R or u. */
static __global__ void suffix_kernel(float *r, const float *tops, int64_t n, int n_seg,
                                     int seg_chunks, int n_chunks)
{
    constexpr int ahead = 8; /* segments whose loads are on their way at once */
    constexpr int count = 64 * 65;
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int j = (int)(i % count), f = j < 64 * 64 ? j / 64 : j - 64 * 64;
    const float *top = tops + i / count * n_chunks * 64 + f;
    float *at = r + i / count * n_seg * count + j;
    float sum = 0;
    for (int seg = n_seg - 1; seg >= 0; seg -= ahead) {
        float own[ahead], by[ahead];
#pragma unroll
        for (int k = 0; k < ahead; k++) {
            /* Segment 0 has none before it. */
            const int g = seg - k > 0 ? seg - k : 1;
            const int64_t end = min((g + 1) * seg_chunks, n_chunks) - 1, start = g * seg_chunks - 1;
            own[k] = at[(int64_t)g * count];
            by[k] = top[start * 64] - top[end * 64];
        }
#pragma unroll
        for (int k = 0; k < ahead; k++) {
            if (seg - k < 0) break;
            at[(int64_t)(seg - k) * count] = sum;
            if (seg - k > 0) sum = own[k] + sum * exp2_fast(by[k]);
        }
    }
}

/* ---- keys ------------------------------------------------------------------------------------ */

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

/* ---- the op ---------------------------------------------------------------------------------- */

typedef void kernel(const struct bwd_params, const struct bwd_maps);

static srf_status launch(struct srf_ctx *ctx, kernel *f, int64_t blocks, int bytes,
                         const struct bwd_params *p, const struct bwd_maps *m)
{
    CUDA_TRY(cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, 1024 + bytes));
    f<<<(unsigned)blocks, 128, 1024 + bytes, stream_of(ctx)>>>(*p, *m);
    return srf__cuda_launched("srf_attn_bwd");
}

srf_status srf__pure_wgmma_bwd(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a,
                               const struct pure_plan *plan, const struct bwd_params *p)
{
    const struct srf_attn_shape *s = &a->s;
    const int64_t heads = s->b * s->h, n = heads * 64 * 65;
    struct bwd_maps m;
    SRF_TRY(srf__tile_map(&m.q, a->q, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.k, a->k, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.v, a->v, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.d_o, a->d_o, s->b, s->t, s->h, a->ld_o, CHUNK));
    if (p->n_seg > 1) SRF_TRY(srf__pure_wgmma_states(ctx, a, plan, p->states));
    SRF_TRY(launch(ctx, a->dw ? pure_queries_kernel<true> : pure_queries_kernel<false>,
                   heads * p->n_seg, query_smem::bytes, p, &m));
    if (p->n_seg > 1) {
        SRF_TRY(launch(ctx, pure_tail_kernel, heads * (p->n_seg - 1), tail_smem::bytes, p, &m));
        suffix_kernel<<<(unsigned)div_up(n, 128), 128, 0, stream_of(ctx)>>>(
            p->r, p->tops, n, p->n_seg, p->seg_chunks, (p->t + CHUNK - 1) / CHUNK);
        SRF_TRY(srf__cuda_launched("srf_attn_bwd"));
    }
    return launch(ctx, a->dw ? pure_keys_kernel<true> : pure_keys_kernel<false>, heads * p->n_seg,
                  key_smem::bytes, p, &m);
}
