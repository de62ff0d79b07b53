/* Pure SRF attention with warpgroup products: the states before segments, and the forward. The
 * method is told in srf_attn_pure.cu, what is different here in srf_attn_pure_wgmma.h.
 *
 * Floor: as there. The products need 20 us of tensor cores at b h t = 393,216 (m = d = 64), their
 * exponentials 14 us.
 */
#include "kernels/cuda/srf_attn_pure_wgmma.h"

struct walk {
    const bf16 *w;
    const float *bias;
    bf16 *o;
    float *stat;   /* (b, h, t), or NULL */
    float *states; /* (b h, n_seg, pure_state_count); NULL: one segment */
    bf16 *entry;   /* for the backward: S before chunks, or NULL */
    float *marks;  /* and their marks */
    int64_t ld_o;
    int t, h, m, n_sets;
    int n_seg, seg_chunks;
    struct key_scales by;
};
struct walk_maps {
    CUtensorMap q, k, v;
};

#if HAVE_WGMMA
/* log2(e) bias of a feature, -infinity for one that is not there. */
static __device__ __forceinline__ float bias_of(const struct walk &p, int64_t set, int f)
{
    return f < p.m ? SRF__LOG2E * p.bias[set * p.m + f] : -INFINITY;
}
#endif

/* ---- the states of segments ------------------------------------------------------------------ */

#define STATE_STAGES 3
struct state_smem {
    static constexpr int v = STATE_STAGES * TILE, w = v + STATE_STAGES * TILE;
    static constexpr int half = w + TILE, bar = half + CHUNK * 4;
    static constexpr int bytes = bar + STATE_STAGES * 8;
};

/* Chunks are taken last to first: a sum takes any order, and what was read last, the first chunks,
 * is what the walk that follows reads first, while it still lies in L2. */
static __global__ WALK_BOUNDS(3) void pure_states_kernel(const __grid_constant__ struct walk p,
                                                         const __grid_constant__ struct walk_maps m)
{
#if HAVE_WGMMA
    using at = state_smem;
    extern __shared__ char raw[];
    char *smem = raw + (-smem_addr(raw) & 1023u);
    const uint32_t base = smem_addr(smem);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
    const int f0 = 16 * warp + g;
    const int64_t head_i = blockIdx.x / (p.n_seg - 1);
    const int seg = blockIdx.x % (p.n_seg - 1), first = seg * p.seg_chunks;
    const int seq = (int)(head_i / p.h), head = (int)(head_i % p.h);
    const int64_t set = p.n_sets == 1 ? 0 : head;
    float *half = (float *)(smem + at::half);
    chain_next();
    auto fill = [&](int i) {
        const int s = i % STATE_STAGES, t0 = (first + p.seg_chunks - 1 - i) * CHUNK;
        const uint32_t full = base + at::bar + 8 * s;
        barrier_expect(full, 2 * TILE);
        bulk_tile(base + s * TILE, &m.k, head * 64, t0, seq, full);
        bulk_tile(base + at::v + s * TILE, &m.v, head * 64, t0, seq, full);
    };
    load_tile<64, 128>(base + at::w, p.w + set * p.m * 64, 64, 64, p.m, tid);
    cp_async_commit();
    if (tid == 0) {
        for (int s = 0; s < STATE_STAGES; s++) barrier_init(base + at::bar + 8 * s, 1);
        barrier_init_done();
        for (int i = 0; i < min(STATE_STAGES - 1, p.seg_chunks); i++) fill(i);
    }
    const float bias[2] = {bias_of(p, set, f0), bias_of(p, set, f0 + 8)};
    struct pure_state<64> st;
    pure_state_start(&st, false, 1, NULL, f0, pair);
    cp_async_wait<0>();
    async_fence();
    __syncthreads();

    for (int i = 0; i < p.seg_chunks; i++) {
        const int s = i % STATE_STAGES;
        const uint32_t k_tile = base + s * TILE, v_tile = base + at::v + s * TILE;
        float a[8][4], sum[4];
        uint32_t kf[4][4];
        struct chunk_keys keys;
        barrier_wait(base + at::bar + 8 * s, i / STATE_STAGES & 1);
        if (diagonal_norms(k_tile, half, p.by, 0, CHUNK, warp, lane)) async_fence();
        __syncthreads();
        if (tid == 0 && i + STATE_STAGES - 1 < p.seg_chunks) fill(i + STATE_STAGES - 1);
        begin_scores(a, base + at::w, k_tile);
        warpgroup_wait<0>();
        wgmma_hold(&a[0][0]);
        key_exponents(a, half, p.by.to_log2, pair);
        key_tops(&keys, st.top, a, bias);
        chunk_weights(kf, &keys, a);
        if (keys_rise(&keys)) scale_state(&st, &keys);
        begin_mix(st.s, kf, v_tile, true);
        add_ones(sum, kf, false, lane);
        st.z[0] += sum[0];
        st.z[1] += sum[2];
        warpgroup_wait<0>();
        wgmma_hold(&st.s[0][0]);
        /* All have read the tiles and the norms. */
        __syncthreads();
    }
    pure_state_end(&st, 1, p.states + (head_i * p.n_seg + seg) * pure_state_count(64, 1), f0, pair);
#endif
}

/* ---- the walk -------------------------------------------------------------------------------- */

struct walk_smem {
    static constexpr int v = 2 * TILE, q = v + 2 * TILE, w = q + 2 * TILE;
    static constexpr int kf = w + TILE, s = kf + TILE, half = s + TILE;
    static constexpr int top = half + CHUNK * 4; /* bias + M */
    /* z as a sum of two: rows of 64 bf16, a piece apart from what banks repeat by; a zero piece. */
    static constexpr int z = top + 64 * 4, z_row = 64 * 2 + 16;
    static constexpr int far = z + 2 * z_row + 16; /* (4) warps' M rise far */
    static constexpr int level = far + 16;         /* of exponents of queries in the next chunk */
    static constexpr int bar = level + 16, bytes = bar + 2 * 8;
};

#if HAVE_WGMMA
static __device__ __forceinline__ float quad_max_nan(float x)
{
    x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return max_nan(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
/* To the last bit but one. */
static __device__ __forceinline__ float reciprocal(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
static __device__ __forceinline__ float log2_fast(float x)
{
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
static __device__ __forceinline__ void query_shifts(float2 shift[8], const float *top, int pair)
{
#pragma unroll
    for (int j = 0; j < 8; j++) shift[j] = *(const float2 *)(top + 8 * j + 2 * pair);
}
/* a = exponents of this warp's queries, products with features before; r, their maxima. */
static __device__ __forceinline__ void query_tops(float r[2], float (&a)[8][4],
                                                  const float2 shift[8], float to_log2)
{
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            a[j][e] = fmaf(a[j][e], to_log2, e & 1 ? shift[j].y : shift[j].x);
            r[e >> 1] = j == 0 && e % 2 == 0 ? a[j][e] : max_nan(r[e >> 1], a[j][e]);
        }
    r[0] = quad_max_nan(r[0]);
    r[1] = quad_max_nan(r[1]);
}
/* What queries' exponents are taken relative to: M of some feature a chunk before, and some more,
 * since weights had better be small than large beside huge values. */
static __device__ __forceinline__ float level_of(float top)
{
    return fabsf(top) < 1024 ? top + 24 : 0;
}
/* The largest weights of this warp's queries are neither small nor large: they need not be 1, and
 * to find their exponents first would take as many instructions as the weights. No NaN. */
static __device__ __forceinline__ bool on_level(const uint32_t x[4][4])
{
    const uint32_t least = (127 - 40) << 7, most = (127 + 4) << 7; /* bf16, positive */
    uint32_t high[2], seen = 0x11111111;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        high[i] = x[0][i];
#pragma unroll
        for (int j = 1; j < 8; j++) high[i] = larger_of_halves(high[i], x[j >> 1][(j & 1) * 2 + i]);
        high[i] = max(high[i] & 0xffff, high[i] >> 16);
        uint32_t good = __ballot_sync(0xffffffffu, high[i] >= least);
        good |= good >> 1;
        seen &= good | good >> 2;
    }
    return seen == 0x11111111 && !__any_sync(0xffffffffu, max(high[0], high[1]) > most);
}
/* What warp `warp` keeps of the weights that its 16 tokens give a chunk's keys: those not behind
 * them. */
template <int warp>
static __device__ __forceinline__ void causal(uint32_t x[4][4], const float (&a)[8][4],
                                              uint32_t diagonal)
{
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int at = 2 * warp + i;
            const uint32_t y = j <= at ? pack_bf16(a[j][2 * i], a[j][2 * i + 1]) : 0;
            x[j >> 1][(j & 1) * 2 + i] = j == at ? y & diagonal : y;
        }
}
#endif

/* ENTRIES: they are kept for the backward.
 *
 * Two barriers a chunk: |k|^2 is there; kf, S, z, M are. What is seldom done takes little code on a
 * chunk's way: instructions behind a jump have to be fetched first. */
template <bool ENTRIES>
static __global__ WALK_BOUNDS(3) void pure_walk_kernel(const __grid_constant__ struct walk p,
                                                       const __grid_constant__ struct walk_maps m)
{
#if HAVE_WGMMA
    using at = walk_smem;
    extern __shared__ char raw[];
    char *smem = raw + (-smem_addr(raw) & 1023u);
    const uint32_t base = smem_addr(smem);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
    const int f0 = 16 * warp + g, row = f0; /* its features, and its tokens of a chunk */
    const int64_t head_i = blockIdx.x / p.n_seg;
    const int seg = blockIdx.x % p.n_seg, n_chunks = (p.t + CHUNK - 1) / CHUNK;
    const int first = seg * p.seg_chunks, c_end = min(first + p.seg_chunks, n_chunks);
    const int seq = (int)(head_i / p.h), head = (int)(head_i % p.h);
    const int64_t set = p.n_sets == 1 ? 0 : head;
    const uint32_t diagonal = lower_mask(g, pair);
    float *half = (float *)(smem + at::half), *top = (float *)(smem + at::top);
    const uint32_t z_lane =
        base + at::z + ((lane & 7) < 2 ? (lane & 7) * at::z_row + (lane >> 3) * 16 : 2 * at::z_row);
    auto fill = [&](int c) {
        const int s = (c - first) & 1;
        const uint32_t full = base + at::bar + 8 * s;
        barrier_expect(full, 3 * TILE);
        bulk_tile(base + s * TILE, &m.k, head * 64, c * CHUNK, seq, full);
        bulk_tile(base + at::q + s * TILE, &m.q, head * 64, c * CHUNK, seq, full);
        bulk_tile(base + at::v + s * TILE, &m.v, head * 64, c * CHUNK, seq, full);
    };
    load_tile<64, 128>(base + at::w, p.w + set * p.m * 64, 64, 64, p.m, tid);
    cp_async_commit();
    if (tid == 0) {
        for (int s = 0; s < 2; s++) barrier_init(base + at::bar + 8 * s, 1);
        barrier_init_done();
        fill(first);
        if (first + 1 < c_end) fill(first + 1);
    }
    if (tid < 4) store_shared(base + at::z + 2 * at::z_row + 4 * tid, 0);
    const float bias[2] = {bias_of(p, set, f0), bias_of(p, set, f0 + 8)};
    /* Of chunk c: this thread's first 16 bytes of o (in order of stores). */
    bf16 *out = p.o + ((int64_t)seq * p.t + first * CHUNK + 16 * warp + (lane >> 3)) * p.ld_o +
                head * 64 + (lane & 7) * 8;
    chain_wait();
    struct pure_state<64> st;
    pure_state_start(&st, seg > 0, 1, p.states + (head_i * p.n_seg + seg) * pure_state_count(64, 1),
                     f0, pair);
    float less[2] = {st.top[0] - bias[0], st.top[1] - bias[1]}; /* M - bias */
    float level = 0, *next_level = (float *)(smem + at::level);
    if (tid == 0) *next_level = level_of(st.top[0]);
    cp_async_wait<0>();
    async_fence();
    __syncthreads();
    level = *next_level;

    int c = first, lo = 0, size = CHUNK;
    while (c < c_end) {
        const int n = min(CHUNK, p.t - c * CHUNK), hi = min(lo + size, n), s = (c - first) & 1;
        const uint32_t k_tile = base + s * TILE, v_tile = base + at::v + s * TILE;
        const uint32_t q_tile = base + at::q + s * TILE;
        const bool whole = size == CHUNK;
        barrier_wait(base + at::bar + 8 * s, (c - first) >> 1 & 1);
        float a[8][4], aq[8][4], late[2][4];
        uint32_t x[4][4];
        struct chunk_keys keys;
        pack_rows(x, st.s);
        if (diagonal_norms(k_tile, half, p.by, lo, hi, warp, lane)) async_fence();
        if (ENTRIES && tid == 0) bulk_sent(); /* S, before it is written again */
        __syncthreads();
        begin_scores(a, base + at::w, k_tile);
        begin_scores(aq, q_tile, base + at::w);
        put_rows(base + at::s, x, warp, lane);
        float2 sub[8];
        key_halves(sub, half, pair);
        warpgroup_wait<1>();
        wgmma_hold(&a[0][0]);
        const float z_was[2] = {st.z[0], st.z[1]}, top_was[2] = {st.top[0], st.top[1]};
        bool fits = true, far = false;
        keys.top[0] = st.top[0], keys.top[1] = st.top[1];
        keys.step[0] = keys.step[1] = 1;
        if (UNLIKELY(!standing_weights(x, a, sub, less, p.by.to_log2) || !whole)) {
            float own_first[2] = {a[0][0], a[0][2]};
            if (!whole) take_piece(own_first, a, half, lo, pair);
            key_exponents(a, sub, p.by.to_log2);
            key_tops(&keys, st.top, a, bias, HEADROOM);
            fits = keys_fit(&keys, st.top, own_first, half, p.by.to_log2, bias, lo, lane);
            if (ENTRIES && whole) {
                const float none[2] = {1, 1};
                far = __any_sync(0xffffffffu, key_tops_far(st.top, keys.top));
                if (far)
                    put_entry(p.entry + (head_i * n_chunks + c) * (CHUNK * 64), &st, none, f0,
                              pair);
            }
            /* Where another warp's features do not fit, M of these stays above what it must be. */
            if (__all_sync(0xffffffffu, fits)) {
                scale_state(&st, &keys);
                less[0] = keys.less[0], less[1] = keys.less[1];
                pack_rows(x, st.s);
                put_rows(base + at::s, x, warp, lane);
            }
            chunk_weights(x, &keys, a);
        }
        put_rows(base + at::kf, x, warp, lane);
        add_ones(late, x, false, lane);
        if (pair == 0) {
            uint16_t *z = (uint16_t *)(smem + at::z) + f0;
            const uint32_t most = pack_bf16(st.z[0], st.z[1]);
            const float2 z_most = unpack_bf16(most);
            const uint32_t rest = pack_bf16(st.z[0] - z_most.x, st.z[1] - z_most.y);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                top[f0 + 8 * i] = bias[i] + (st.top[i] - level);
                z[8 * i] = (uint16_t)(most >> 16 * i);
                z[at::z_row / 2 + 8 * i] = (uint16_t)(rest >> 16 * i);
            }
        }
        if (tid == 0) *next_level = level_of(st.top[0]);
        if (ENTRIES && lane == 0) ((int *)(smem + at::far))[warp] = far;
        async_fence();
        warpgroup_wait<0>();
        wgmma_hold(&aq[0][0]);
        const bool cut = __syncthreads_or(!fits && size > 1);
        /* What lay there has been read by all. */
        if (tid == 0 && whole && c > first && c + 1 < c_end) fill(c + 1);
        if (ENTRIES && whole) {
            const int64_t chunk = head_i * n_chunks + c;
            const int4 any = *(const int4 *)(smem + at::far);
            const bool stay = any.x | any.y | any.z | any.w;
            put_marks(p.marks + chunk * MARKS, z_was, top_was, keys.top, keys.step, bias, stay, f0,
                      pair);
            if (tid == 0 && !stay) {
                bulk_send(p.entry + chunk * (CHUNK * 64), base + at::s, TILE);
                bulk_commit();
            }
            if (UNLIKELY(stay && !far)) {
                const float up[2] = {exp2_fast(st.top[0] - top_was[0]),
                                     exp2_fast(st.top[1] - top_was[1])};
                put_entry(p.entry + chunk * (CHUNK * 64), &st, up, f0, pair);
            }
        }
        if (UNLIKELY(cut)) {
            size >>= 1;
            continue;
        }

        float2 shift[8];
        uint32_t z[8];
        query_shifts(shift, top, pair);
        const float following = *next_level;
        /* Columns 0 and 1 of a product are the two parts of z, others 0. */
        ldmatrix_x4(z, z_lane);
        ldmatrix_x4(z + 4, z_lane + ((lane & 7) < 2 ? 64 : 0));
        begin_sums(st.s, base + at::kf, v_tile);
        st.z[0] += late[0][0] + late[1][0];
        st.z[1] += late[0][2] + late[1][2];
        /* Query features, r_t being the level; o and den of this warp's tokens. */
        float r[2] = {0, 0};
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                x[j >> 1][(j & 1) * 2 + i] =
                    pack_bf16(exp2_fast(fmaf(aq[j][2 * i], p.by.to_log2, shift[j].x)),
                              exp2_fast(fmaf(aq[j][2 * i + 1], p.by.to_log2, shift[j].y)));
        if (UNLIKELY(!on_level(x))) {
            query_tops(r, aq, shift, p.by.to_log2);
            const bool fine = fabsf(r[0]) < SRF__X_LIMIT && fabsf(r[1]) < SRF__X_LIMIT;
            if (__any_sync(0xffffffffu, !fine)) {
                token_products<64>(aq, forget(q_tile), forget(base) + at::w, p.by.limit, warp, 0,
                                   forget(lane));
                query_tops(r, aq, shift, p.by.to_log2);
            }
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    x[j >> 1][(j & 1) * 2 + i] = pack_bf16(exp2_fast(aq[j][2 * i] - r[i]),
                                                           exp2_fast(aq[j][2 * i + 1] - r[i]));
        }
        float o[8][4], den[2][4];
#pragma unroll
        for (int kk = 0; kk < 4; kk++)
            mma_add(den[kk & 1], x[kk], z[2 * kk], z[2 * kk + 1], kk > 1);
        begin_mix(a, x, base + at::kf, false);
        begin_mix(o, x, base + at::s, false);
        warpgroup_wait<1>();
        wgmma_hold(&st.s[0][0]);
        wgmma_hold(&a[0][0]);
        if (warp == 0)
            causal<0>(x, a, diagonal);
        else if (warp == 1)
            causal<1>(x, a, diagonal);
        else if (warp == 2)
            causal<2>(x, a, diagonal);
        else
            causal<3>(x, a, diagonal);
        add_ones(den, x, true, lane);
        begin_mix(o, x, v_tile, true);
        const float den_row[2] = {
            __shfl_sync(0xffffffffu, den[0][0] + den[0][1] + (den[1][0] + den[1][1]), lane & ~3),
            __shfl_sync(0xffffffffu, den[0][2] + den[0][3] + (den[1][2] + den[1][3]), lane & ~3)};
        if (p.stat && pair == 0) {
            float *stat = p.stat + head_i * p.t + c * CHUNK + row;
            if (row >= lo && row < hi) stat[0] = r[0] + level + log2_fast(den_row[0]);
            if (row + 8 >= lo && row + 8 < hi) stat[8] = r[1] + level + log2_fast(den_row[1]);
        }
        const float by[2] = {reciprocal(den_row[0]), reciprocal(den_row[1])};
        warpgroup_wait<0>();
        wgmma_hold(&o[0][0]);
        scale_rows(o, by[0], by[1]);
        pack_rows(x, o);
        if (UNLIKELY(hi - lo < CHUNK)) {
            bf16 *to = p.o + ((int64_t)seq * p.t + c * CHUNK + row) * p.ld_o + head * 64 + 2 * pair;
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 8; j++)
                    if (row + 8 * i >= lo && row + 8 * i < hi)
                        *(uint32_t *)(to + 8 * i * p.ld_o + 8 * j) = x[j >> 1][(j & 1) * 2 + i];
        } else {
            put_rows(q_tile, x, warp, lane);
            __syncwarp();
            const uint32_t from = q_tile + warp * 2048 + tile_at<64>(lane >> 3, lane & 7);
            bf16 *to = out;
#pragma unroll
            for (int i = 0; i < 4; i++, to += 4 * p.ld_o) {
                uint4 y;
                asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                             : "=r"(y.x), "=r"(y.y), "=r"(y.z), "=r"(y.w)
                             : "r"((from ^ (i & 1) * 64) + i * 512)
                             : "memory");
                *(uint4 *)to = y;
            }
        }
        level = following;
        lo += size;
        size = lo & -lo;
        if (lo >= n) {
            c++;
            lo = 0;
            size = CHUNK;
            out += CHUNK * p.ld_o;
        }
    }
    if (ENTRIES && tid == 0) bulk_done();
#endif
}

/* ---- the op ------------------------------------------------------------------------------- */

/* One thread a feature and column of S or z, over the segments of one sequence and head: what each
 * adds becomes the sum before it. */
static __global__ void prefix_kernel(float *states, int64_t n, int n_seg)
{
    constexpr int ahead = 8; /* segments whose loads are on their way at once */
    constexpr int count = 64 * (64 + 3), columns = 64 * 65;
    chain_next();
    chain_wait();
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int j = (int)(i % columns), f = j < 64 * 64 ? j / 64 : j - 64 * 64;
    float *st = states + i / columns * n_seg * count;
    float sum = 0, top = SRF__UNSET;
    for (int first = 0; first < n_seg; first += ahead) {
        float add[ahead], add_top[ahead];
#pragma unroll
        for (int k = 0; k < ahead; k++) {
            const bool there = first + k < n_seg - 1;
            const float *from = st + (int64_t)(first + (there ? k : 0)) * count;
            add[k] = there ? from[j] : 0.0f;
            add_top[k] = there ? from[columns + f] : SRF__UNSET;
        }
#pragma unroll
        for (int k = 0; k < ahead; k++) {
            if (first + k >= n_seg) break;
            float *to = st + (int64_t)(first + k) * count;
            to[j] = sum;
            if (j >= 64 * 64) to[columns + 64 + f] = top;
            const float with = fmaxf(top, add_top[k]);
            sum = sum * exp2_fast(top - with) + add[k] * exp2_fast(add_top[k] - with);
            top = with;
        }
    }
}

bool srf__pure_wgmma_takes(const struct srf_ctx *ctx, const struct srf_attn_shape *s)
{
    struct cudaFuncAttributes f;
    return s->d == 64 && s->m <= 64 && cuda_of(ctx)->cc == 90 &&
           cudaFuncGetAttributes(&f, (const void *)pure_walk_kernel<false>) == cudaSuccess &&
           f.maxThreadsPerBlock == 128;
}

size_t srf__pure_wgmma_entry_bytes(const struct srf_attn_shape *s)
{
    return (size_t)(s->b * s->h * div_up(s->t, CHUNK)) * (TILE + MARKS * sizeof(float));
}

static struct walk walk_of(const struct srf_attn_shape *s, const void *w, const void *bias,
                           const struct pure_plan *plan, float *states)
{
    struct walk p = {};
    p.w = (const bf16 *)w;
    p.bias = (const float *)bias;
    p.states = states;
    p.t = (int)s->t;
    p.h = (int)s->h;
    p.m = (int)s->m;
    p.n_sets = (int)s->n_sets;
    p.n_seg = plan->n_seg;
    p.seg_chunks = plan->seg_chunks;
    p.by = key_scales_of(plan->scale, plan->limit);
    return p;
}

static srf_status launch_states(struct srf_ctx *ctx, const struct walk *p,
                                const struct walk_maps *m, int64_t heads)
{
    constexpr int bytes = 1024 + state_smem::bytes;
    const int64_t n = heads * 64 * 65;
    CUDA_TRY(cudaFuncSetAttribute(pure_states_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  bytes));
    pure_states_kernel<<<(unsigned)(heads * (p->n_seg - 1)), 128, bytes, stream_of(ctx)>>>(*p, *m);
    struct chain_shape shape = {dim3((unsigned)div_up(n, 128)), 128, 0, 1};
    chain_launch(ctx, shape, prefix_kernel, p->states, n, p->n_seg);
    return srf__cuda_launched("srf_attn");
}

static srf_status states_before(struct srf_ctx *ctx, const struct srf_attn_shape *s, const void *k,
                                const void *v, int64_t ld, const void *w, const void *bias,
                                const struct pure_plan *plan, float *states)
{
    struct walk p = walk_of(s, w, bias, plan, states);
    struct walk_maps m;
    SRF_TRY(srf__tile_map(&m.k, k, s->b, s->t, s->h, ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.v, v, s->b, s->t, s->h, ld, CHUNK));
    m.q = m.k; /* not used */
    return launch_states(ctx, &p, &m, s->b * s->h);
}

srf_status srf__pure_wgmma_states(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a,
                                  const struct pure_plan *plan, float *states)
{
    return states_before(ctx, &a->s, a->k, a->v, a->ld, a->w, a->bias, plan, states);
}

bool srf__states_take(const struct srf_ctx *ctx, const struct srf_attn_shape *s)
{
    return srf__pure_wgmma_takes(ctx, s);
}

srf_status srf__states_before(struct srf_ctx *ctx, const struct srf_attn_shape *s, const void *k,
                              const void *v, int64_t ld, const void *w, const void *bias, int n_seg,
                              int seg_chunks, float *states)
{
    struct pure_plan plan = srf__pure_plan(ctx, s, 1);
    plan.n_seg = n_seg;
    plan.seg_chunks = seg_chunks;
    return states_before(ctx, s, k, v, ld, w, bias, &plan, states);
}

srf_status srf__pure_wgmma_fwd(struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a,
                               const struct pure_plan *plan, float *states)
{
    constexpr int bytes = 1024 + walk_smem::bytes;
    const struct srf_attn_shape *s = &a->s;
    const int64_t heads = s->b * s->h;
    struct walk p = walk_of(s, a->w, a->bias, plan, states);
    struct walk_maps m;
    p.o = (bf16 *)a->o;
    p.stat = (float *)a->stat;
    p.entry = srf__pure_carry_bytes(ctx, s) > 0 ? (bf16 *)a->carry : NULL;
    if (p.entry) p.marks = (float *)(p.entry + heads * div_up(s->t, CHUNK) * CHUNK * 64);
    p.ld_o = a->ld_o;
    SRF_TRY(srf__tile_map(&m.q, a->q, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.k, a->k, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.v, a->v, s->b, s->t, s->h, a->ld, CHUNK));
    if (p.n_seg > 1) SRF_TRY(launch_states(ctx, &p, &m, heads));
    void (*kernel)(struct walk, struct walk_maps) =
        p.entry ? pure_walk_kernel<true> : pure_walk_kernel<false>;
    CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    if (p.n_seg > 1) {
        struct chain_shape shape = {dim3((unsigned)(heads * p.n_seg)), 128, bytes, 1};
        chain_launch(ctx, shape, kernel, p, m);
    } else {
        kernel<<<(unsigned)heads, 128, bytes, stream_of(ctx)>>>(p, m);
    }
    return srf__cuda_launched("srf_attn_fwd");
}
