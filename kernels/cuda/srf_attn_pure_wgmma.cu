/* Pure SRF attention with warpgroup products: the states before segments, and the forward. The
 * method is told in srf_attn_pure.cu, what is different here in srf_attn_pure_wgmma.h.
 *
 * Floor: as there. The products need 20 us of tensor cores at b h t = 393,216 (m = d = 64), their
 * exponentials 14 us.
 */
#include "kernels/cuda/srf_attn_pure_queries.h"

struct walk {
    const bf16 *w;
    const float *bias;
    bf16 *o;
    float *stat;   /* (b, h, t), or NULL */
    float *states; /* (b h, n_seg, pure_state_count); NULL: one segment */
    char *records; /* for the backward, or NULL */
    int64_t ld_o;
    int t, h, m, n_sets;
    int64_t heads; /* b h */
    int n_seg, seg_chunks;
    int team; /* segments of a block of the states kernel */
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

#define STATE_STAGES 4
#define TEAM         3 /* segments of a block, where there are many */
#if defined(__CUDA_ARCH__) && !HAVE_WGMMA
#define STATE_BOUNDS(n) __launch_bounds__(512)
#else
#define STATE_BOUNDS(n) __launch_bounds__(128 * (n), (n) > 1 ? 1 : 3)
#endif
/* What a warpgroup has, then what it shares with the others of its block. */
struct state_smem {
    static constexpr int v = STATE_STAGES * TILE, own = 2 * STATE_STAGES * TILE;
    static constexpr int half = 0, bar = 2 * CHUNK * 4, small = bar + STATE_STAGES * 8;
    static constexpr int bytes(int team)
    {
        return TILE + team * (own + small);
    }
};

#if HAVE_WGMMA
/* With weights kf after M has risen; the largest before are 1 / step times smaller then. */
static __device__ __forceinline__ void rise(uint32_t largest[2], const uint32_t kf[4][4],
                                            const float step[2])
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float2 before = unpack_bf16(largest[i]);
        largest[i] = pack_bf16(before.x * step[i], before.y * step[i]);
#pragma unroll
        for (int j = 0; j < 8; j++)
            largest[i] = larger_of_halves(largest[i], kf[j >> 1][2 * (j & 1) + i]);
    }
}
/* M as low as the largest weights, which become about 1, allow. */
static __device__ __forceinline__ void lower_tops(struct pure_state<64> *st,
                                                  const uint32_t largest[2])
{
    struct chunk_keys keys;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t most = max(largest[i] & 0xffff, largest[i] >> 16); /* positive bf16 */
        most = max(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = max(most, __shfl_xor_sync(0xffffffffu, most, 2));
        /* Its exponent, rounded up; a feature without weights stays. */
        const float by = most ? (float)((int)(most + 127 >> 7) - 127) : 0;
        keys.top[i] = st->top[i] + by;
        keys.step[i] = exp2_fast(-by);
    }
    scale_state(st, &keys);
}
#endif

/* Chunks are taken last to first: a sum takes any order, and what was read last, the first chunks,
 * is what the walk that follows reads first, while it still lies in L2.
 *
 * A block has N segments of a head, one a warpgroup, and gives out, after each, the sum of those of
 * its own up to it: who wants the state before a segment adds up less (add_sums). LOW: M is the
 * lowest that does, else about HEADROOM above, where a walk that does so would have it. */
template <bool LOW, int N>
static __global__
STATE_BOUNDS(N) void pure_states_kernel(const __grid_constant__ struct walk p,
                                        const __grid_constant__ struct walk_maps m)
{
#if HAVE_WGMMA
    using at = state_smem;
    extern __shared__ char raw[];
    char *smem = raw + (-smem_addr(raw) & 1023u);
    const int wg = N > 1 ? threadIdx.x / 128 : 0, tid = threadIdx.x - 128 * wg;
    const int lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
    const int f0 = 16 * warp + g;
    const uint32_t w_tile = smem_addr(smem), base = w_tile + TILE + wg * at::own;
    char *small = smem + TILE + N * at::own + wg * at::small;
    const uint32_t bar = smem_addr(small) + at::bar;
    const int64_t head_i = blockIdx.x % p.heads;
    const int seg = (int)(blockIdx.x / p.heads) * N + wg;
    const int first = seg * p.seg_chunks, n = seg < p.n_seg - 1 ? p.seg_chunks : 0;
    const int seq = (int)(head_i / p.h), head = (int)(head_i % p.h);
    const int64_t set = p.n_sets == 1 ? 0 : head;
    float *halves = (float *)(small + at::half);
    chain_wait();
    chain_next();
    auto fill = [&](int i) {
        const int s = i % STATE_STAGES, t0 = (first + n - 1 - i) * CHUNK;
        const uint32_t full = bar + 8 * s;
        barrier_expect(full, 2 * TILE);
        bulk_tile(base + s * TILE, &m.k, head * 64, t0, seq, full);
        bulk_tile(base + at::v + s * TILE, &m.v, head * 64, t0, seq, full);
    };
    if (tid == 0) {
        for (int s = 0; s < STATE_STAGES; s++) barrier_init(bar + 8 * s, 1);
        barrier_init_done();
        for (int i = 0; i < min(STATE_STAGES - 1, n); i++) fill(i);
    }
    if (wg == 0) load_tile<64, 128>(w_tile, p.w + set * p.m * 64, 64, 64, p.m, tid);
    cp_async_commit();
    const float bias[2] = {bias_of(p, set, f0), bias_of(p, set, f0 + 8)};
    struct pure_state<64> st;
    pure_state_start(&st, false, 1, NULL, f0, pair);
    float less[2] = {st.top[0] - bias[0], st.top[1] - bias[1]}; /* M - bias */
    uint32_t largest[2] = {0, 0}; /* weights so far, of even and odd keys */
    cp_async_wait<0>();
    async_fence();
    __syncthreads();

    for (int i = 0; i < n; i++) {
        const int s = i % STATE_STAGES;
        const uint32_t k_tile = base + s * TILE, v_tile = base + at::v + s * TILE;
        float *half = halves + (i & 1) * CHUNK;
        float a[8][4], sum[4];
        uint32_t kf[4][4], most[2];
        struct chunk_keys keys;
        barrier_wait(bar + 8 * s, i / STATE_STAGES & 1);
        if (diagonal_norms(k_tile, half, p.by, 0, CHUNK, warp, lane)) async_fence();
        /* All have read the tiles of the chunk before, and the norms of that before it. */
        meet(1 + wg, 128);
        if (tid == 0 && i + STATE_STAGES - 1 < n) fill(i + STATE_STAGES - 1);
        begin_scores(a, w_tile, k_tile);
        float2 sub[8];
        key_halves(sub, half, pair);
        warpgroup_wait<0>();
        wgmma_hold(&a[0][0]);
        if (UNLIKELY(!standing_weights(kf, most, a, sub, less, p.by.to_log2))) {
            key_exponents(a, sub, p.by.to_log2);
            key_tops(&keys, st.top, a, bias, HEADROOM);
            scale_state(&st, &keys);
            less[0] = keys.less[0], less[1] = keys.less[1];
            chunk_weights(kf, &keys, a);
            if (LOW) rise(largest, kf, keys.step);
        } else if (LOW) {
            largest[0] = larger_of_halves(largest[0], most[0]);
            largest[1] = larger_of_halves(largest[1], most[1]);
        }
        add_ones(sum, kf, false, lane);
        begin_mix(st.s, kf, v_tile, true);
        st.z[0] += sum[0];
        st.z[1] += sum[2];
        warpgroup_wait<0>();
        wgmma_hold(&st.s[0][0]);
    }
    if (LOW) lower_tops(&st, largest);
    if (N > 1) {
        /* The tiles have been read. */
        float4 *sums = (float4 *)(smem + TILE);
        __syncthreads();
        if (wg < N - 1) put_sum(sums + wg * 9 * 128, st, tid);
        __syncthreads();
        for (int k = 0; k < wg; k++) {
            float4 x[9];
#pragma unroll
            for (int j = 0; j < 8; j++) x[j] = sums[(k * 9 + j) * 128 + tid];
            x[8] = sums[(k * 9 + 8) * 128 + tid / 4];
            add_sum(&st, x);
        }
    }
    if (n == 0) return;
    put_sum((float4 *)(p.states + (head_i * p.n_seg + seg) * pure_state_count(64, 1)), st, tid);
#endif
}

/* ---- the walk -------------------------------------------------------------------------------- */

struct walk_smem {
    static constexpr int v = 2 * TILE, q = v + 2 * TILE, w = q + 2 * TILE;
    static constexpr int kf = w + TILE, s = kf + TILE;              /* a record */
    static constexpr int half = s + RECORD, top = half + CHUNK * 4; /* bias + M */
    /* z as a sum of two: rows of 64 bf16, a piece apart from what banks repeat by; a zero piece. */
    static constexpr int z = top + 64 * 4, z_row = 64 * 2 + 16;
    static constexpr int level = z + 2 * z_row + 16; /* of queries' exponents in the next chunk */
    static constexpr int bar = level + 16, bytes = bar + 2 * 8;
};

#if HAVE_WGMMA
static __device__ __forceinline__ float log2_fast(float x)
{
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

/* ENTRIES: records of chunks are kept for the backward. EARLY: tiles are asked for almost a
 * whole chunk ahead, not half of one. Where a multiprocessor has three blocks, memory is what all
 * of them wait for, and it does not help.
 *
 * Two barriers a chunk: |k|^2 is there; kf, S, z, M are. What is seldom done takes little code on a
 * chunk's way: instructions behind a jump have to be fetched first. */
template <bool ENTRIES, bool EARLY>
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
    const int64_t head_i = blockIdx.x % p.heads;
    const int seg = (int)(blockIdx.x / p.heads);
    const int n_chunks = (p.t + CHUNK - 1) / CHUNK, first = seg * p.seg_chunks;
    const int c_end = min(first + p.seg_chunks, n_chunks);
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
    if (p.n_seg == 1) chain_wait();
    load_tile<64, 128>(base + at::w, p.w + set * p.m * 64, 64, 64, p.m, tid);
    cp_async_commit();
    if (tid == 0) {
        for (int s = 0; s < 2; s++) barrier_init(base + at::bar + 8 * s, 1);
        barrier_init_done();
        fill(first);
        if (first + 1 < c_end) fill(first + 1);
    }
    if (tid < 4) store_shared(base + at::z + 2 * at::z_row + 4 * tid, 0);
    if (ENTRIES) start_record(base + at::s, tid);
    const float bias[2] = {bias_of(p, set, f0), bias_of(p, set, f0 + 8)};
    /* Of chunk c: this thread's first 16 bytes of o (in order of stores). */
    bf16 *out = p.o + ((int64_t)seq * p.t + first * CHUNK + 16 * warp + (lane >> 3)) * p.ld_o +
                head * 64 + (lane & 7) * 8;
    /* A first segment needs no states, and may go on beside their kernel. */
    struct pure_state<64> st;
    if (seg > 0) chain_wait();
    add_sums(&st, p.states + head_i * p.n_seg * pure_state_count(64, 1), seg, p.team, tid);
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
        uint32_t x[4][4], most[2];
        struct chunk_keys keys;
        pack_rows(x, st.s);
        if (diagonal_norms(k_tile, half, p.by, lo, hi, warp, lane)) async_fence();
        if (ENTRIES && tid == 0) bulk_sent(); /* S, z, M, before they are written again */
        __syncthreads();
        begin_scores(a, base + at::w, k_tile);
        begin_scores(aq, q_tile, base + at::w);
        put_rows(base + at::s, x, warp, lane);
        float2 sub[8];
        key_halves(sub, half, pair);
        /* Of the chunk before, whose place it is, nothing is read any more. */
        if (EARLY && tid == 0 && whole && c > first && c + 1 < c_end) fill(c + 1);
        warpgroup_wait<1>();
        wgmma_hold(&a[0][0]);
        const float z_was[2] = {st.z[0], st.z[1]}, top_was[2] = {st.top[0], st.top[1]};
        bool fits = true, far = false;
        keys.top[0] = st.top[0], keys.top[1] = st.top[1];
        keys.step[0] = keys.step[1] = 1;
        if (UNLIKELY(!standing_weights(x, most, a, sub, less, p.by.to_log2) || !whole)) {
            float own_first[2] = {a[0][0], a[0][2]};
            if (!whole) take_piece(own_first, a, half, lo, pair);
            key_exponents(a, sub, p.by.to_log2);
            key_tops(&keys, st.top, a, bias, HEADROOM);
            fits = keys_fit(&keys, st.top, own_first, half, p.by.to_log2, bias, lo, lane);
            if (ENTRIES && whole) {
                far = __any_sync(0xffffffffu, key_tops_far(st.top, keys.top));
                if (far) put_entry(p.records + (head_i * n_chunks + c) * RECORD, &st, f0, pair);
            }
            if (ENTRIES && !whole && lo + size >= n) {
                /* The last piece: M after it is what the record says, which the next one goes on
                 * from. Pieces may have put it lower than the whole chunk did. */
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    keys.top[i] = fmaxf(keys.top[i], load_float(base + at::s + TILE +
                                                                (MARK_AFTER + f0 + 8 * i) * 4));
                    keys.less[i] = fmaxf(keys.less[i], keys.top[i] - bias[i]);
                    keys.step[i] = exp2_fast(st.top[i] - keys.top[i]);
                }
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
        if (ENTRIES && whole) {
            const float z[2] = {far ? z_was[0] : st.z[0], far ? z_was[1] : st.z[1]};
            put_marks(base + at::s, z, top_was, keys.top, far, f0, lane);
        }
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
        async_fence();
        warpgroup_wait<0>();
        wgmma_hold(&aq[0][0]);
        const bool cut = __syncthreads_or(!fits && size > 1);
        if (!EARLY && tid == 0 && whole && c > first && c + 1 < c_end) fill(c + 1);
        if (ENTRIES && tid == 0 && whole) {
            send_record(p.records + (head_i * n_chunks + c) * RECORD, base + at::s,
                        load_shared(base + at::s + TILE + MARK_STAY * 4));
            bulk_commit();
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
        level_weights(x, aq, shift, p.by.to_log2);
        if (UNLIKELY(!on_level(x))) {
            query_tops(r, aq, shift, p.by.to_log2);
            const bool fine = fabsf(r[0]) < SRF__X_LIMIT && fabsf(r[1]) < SRF__X_LIMIT;
            if (__any_sync(0xffffffffu, !fine)) {
                token_products<64>(aq, forget(q_tile), forget(base) + at::w, p.by.limit, warp, 0,
                                   forget(lane));
                query_tops(r, aq, shift, p.by.to_log2);
            }
            query_weights(x, aq, r);
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
                const uint4 y = load_shared_16((from ^ (i & 1) * 64) + i * 512);
                store_global_16(to, y);
            }
            if (EARLY) async_fence();
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

bool srf__pure_wgmma_takes(const struct srf_ctx *ctx, const struct srf_attn_shape *s)
{
    struct cudaFuncAttributes f;
    return s->d == 64 && s->m <= 64 && cuda_of(ctx)->cc == 90 &&
           cudaFuncGetAttributes(&f, (const void *)pure_walk_kernel<false, false>) == cudaSuccess &&
           f.maxThreadsPerBlock == 128;
}

size_t srf__pure_wgmma_record_bytes(const struct srf_attn_shape *s)
{
    return (size_t)(s->b * s->h * div_up(s->t, CHUNK)) * RECORD;
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
    p.heads = s->b * s->h;
    p.m = (int)s->m;
    p.n_sets = (int)s->n_sets;
    p.n_seg = plan->n_seg;
    p.seg_chunks = plan->seg_chunks;
    p.by = key_scales_of(plan->scale, plan->limit);
    return p;
}

/* A team is one block, which holds a multiprocessor for itself: not where that takes turns. */
static int team_of(const struct srf_ctx *ctx, int64_t heads, int n_seg)
{
    return n_seg > 4 && heads * div_up(n_seg - 1, TEAM) <= cuda_of(ctx)->n_sm ? TEAM : 1;
}

template <bool LOW, int N>
static srf_status launch_team(struct srf_ctx *ctx, const struct walk *p, const struct walk_maps *m)
{
    constexpr int bytes = 1024 + state_smem::bytes(N);
    const unsigned blocks = (unsigned)(p->heads * div_up(p->n_seg - 1, N));
    CUDA_TRY(cudaFuncSetAttribute(pure_states_kernel<LOW, N>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    const struct chain_shape shape = {dim3(blocks), 128 * N, bytes, 1};
    chain_launch(ctx, shape, pure_states_kernel<LOW, N>, *p, *m);
    return srf__cuda_launched("srf_attn");
}

/* What each segment but the last adds to a state. */
template <bool LOW>
static srf_status launch_states(struct srf_ctx *ctx, const struct walk *p,
                                const struct walk_maps *m)
{
    return p->team > 1 ? launch_team<LOW, TEAM>(ctx, p, m) : launch_team<LOW, 1>(ctx, p, m);
}

srf_status srf__pure_wgmma_states(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a,
                                  const struct pure_plan *plan, float *states)
{
    return srf__state_sums(ctx, &a->s, a->k, a->v, a->ld, a->w, a->bias, plan->n_seg,
                           plan->seg_chunks, 1, states);
}

bool srf__states_take(const struct srf_ctx *ctx, const struct srf_attn_shape *s)
{
    return srf__pure_wgmma_takes(ctx, s);
}

int srf__state_team(const struct srf_ctx *ctx, const struct srf_attn_shape *s, int n_seg)
{
    return team_of(ctx, s->b * s->h, n_seg);
}

srf_status srf__state_sums(struct srf_ctx *ctx, const struct srf_attn_shape *s, const void *k,
                           const void *v, int64_t ld, const void *w, const void *bias, int n_seg,
                           int seg_chunks, int team, float *states)
{
    struct pure_plan plan = srf__pure_plan(ctx, s, 1);
    plan.n_seg = n_seg;
    plan.seg_chunks = seg_chunks;
    struct walk p = walk_of(s, w, bias, &plan, states);
    struct walk_maps m;
    p.team = team;
    SRF_TRY(srf__tile_map(&m.k, k, s->b, s->t, s->h, ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.v, v, s->b, s->t, s->h, ld, CHUNK));
    m.q = m.k; /* not used */
    return launch_states<true>(ctx, &p, &m);
}

template <bool ENTRIES> static void (*walk_kernel(bool few))(struct walk, struct walk_maps)
{
    return few ? pure_walk_kernel<ENTRIES, true> : pure_walk_kernel<ENTRIES, false>;
}

srf_status srf__pure_wgmma_fwd(struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a,
                               const struct pure_plan *plan, float *states)
{
    constexpr int bytes = 1024 + walk_smem::bytes;
    const struct srf_attn_shape *s = &a->s;
    const int64_t heads = s->b * s->h;
    struct walk p = walk_of(s, a->w, a->bias, plan, states);
    struct walk_maps m;
    p.team = team_of(ctx, heads, p.n_seg);
    p.o = (bf16 *)a->o;
    p.stat = (float *)a->stat;
    p.records = srf__pure_carry_bytes(ctx, s) > 0 ? (char *)a->carry : NULL;
    p.ld_o = a->ld_o;
    SRF_TRY(srf__tile_map(&m.q, a->q, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.k, a->k, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.v, a->v, s->b, s->t, s->h, a->ld, CHUNK));
    const bool few = heads * p.n_seg <= 2 * (int64_t)cuda_of(ctx)->n_sm;
    if (p.n_seg > 1) SRF_TRY(launch_states<false>(ctx, &p, &m));
    void (*kernel)(struct walk, struct walk_maps) =
        p.records ? walk_kernel<true>(few) : walk_kernel<false>(few);
    CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    const struct chain_shape shape = {dim3((unsigned)(heads * p.n_seg)), 128, bytes, 1};
    chain_launch(ctx, shape, kernel, p, m);
    return srf__cuda_launched("srf_attn_fwd");
}
