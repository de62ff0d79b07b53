/* Pure SRF attention with warpgroup products, backward: what the sums over keys are before each
 * chunk, for the kernel of the gradients (srf_attn_pure_wgmma_bwd.cu tells).
 *
 * Floor: k, v read, records written for every chunk of 64 tokens: 6.2 b t h d bytes.
 */
#include "kernels/cuda/srf_attn_pure_wgmma_bwd.h"

#define ENTRY_STAGES 2
struct entry_smem {
    static constexpr int v = ENTRY_STAGES * TILE, w = v + ENTRY_STAGES * TILE;
    static constexpr int record = w + TILE, record_by = (RECORD + 127) / 128 * 128;  /* two */
    static constexpr int half = record + 2 * record_by, bias = half + 2 * CHUNK * 4; /* two */
    static constexpr int bar = bias + 64 * 4, bytes = bar + ENTRY_STAGES * 8;
};

#if HAVE_WGMMA
static __device__ __forceinline__ void clear_tickets(const struct bwd_params &p, int tid)
{
    for (int i = blockIdx.x * 128 + tid; i < p.n_tickets; i += gridDim.x * 128) p.tickets[i] = 0;
}
#endif

/* One barrier a chunk, when its |k|^2 and the record of the chunk before it are there, which is
 * sent then. M as in the walk of the forward. */
static __global__
    WALK_BOUNDS(3) void pure_entries_kernel(const __grid_constant__ struct bwd_params p,
                                            const __grid_constant__ struct bwd_maps m)
{
#if HAVE_WGMMA
    using at = entry_smem;
    extern __shared__ char raw[];
    char *smem = raw + (-smem_addr(raw) & 1023u);
    const uint32_t base = smem_addr(smem);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
    const int f0 = 16 * warp + g;
    const unsigned heads = gridDim.x / p.n_seg;
    const struct place here = place_of(p, blockIdx.x % heads, (int)(blockIdx.x / heads), 64);
    const int n_chunks = (p.t + CHUNK - 1) / CHUNK, first = here.seg * p.seg_chunks;
    const int count = min(p.seg_chunks, n_chunks - first);
    const int seq = (int)(here.head_i / p.h), col = (int)(here.head_i % p.h) * 64;
    const struct key_scales by = key_scales_of(p.scale, p.limit);
    float *bias = (float *)(smem + at::bias);
    char *to = p.records + (here.head_i * n_chunks + first) * RECORD; /* what is sent next */
    auto send = [&](int i) {
        bulk_send(to, base + at::record + (i & 1) * at::record_by, RECORD);
        bulk_commit();
        to += RECORD;
    };
    auto fill = [&](int i) {
        const int s = i % ENTRY_STAGES, t0 = (first + i) * CHUNK;
        const uint32_t full = base + at::bar + 8 * s;
        barrier_expect(full, 2 * TILE);
        bulk_tile(base + s * TILE, &m.k, col, t0, seq, full);
        bulk_tile(base + at::v + s * TILE, &m.v, col, t0, seq, full);
    };
    chain_wait();
    chain_next();
    if (tid == 0) {
        init_barriers(base + at::bar, ENTRY_STAGES);
        for (int i = 0; i < min(ENTRY_STAGES - 1, count); i++) fill(i);
    }
    load_features(p, here.set, base + at::w, bias, tid);
    if (p.n_seg == 1) clear_tickets(p, tid);
    for (int i = 0; i < 2; i++) start_record(base + at::record + i * at::record_by, tid);
    struct pure_state<64> st;
    add_sums(&st, p.states + here.head_i * p.n_seg * pure_state_count(64, 1), here.seg, 1, tid);
    __syncthreads();
    const float own_bias[2] = {bias[f0], bias[f0 + 8]};
    float less[2] = {st.top[0] - own_bias[0], st.top[1] - own_bias[1]}; /* M - bias */

    for (int i = 0; i < count; i++) {
        const int s = i % ENTRY_STAGES, end = min(CHUNK, p.t - (first + i) * CHUNK);
        const uint32_t k_tile = base + s * TILE, v_tile = base + at::v + s * TILE;
        const uint32_t record = base + at::record + (i & 1) * at::record_by;
        float *half = (float *)(smem + at::half) + (i & 1) * CHUNK;
        float a[8][4], sum[4];
        uint32_t x[4][4], most[2];
        struct chunk_keys keys;
        barrier_wait(base + at::bar + 8 * s, i / ENTRY_STAGES & 1);
        pack_rows(x, st.s);
        if (diagonal_norms(k_tile, half, by, 0, end, warp, lane)) async_fence();
        if (tid == 0) bulk_sent(); /* the record before the last one, whose place this one gets */
        /* All have read the tiles of the chunk before, and the norms of that before it. */
        __syncthreads();
        if (tid == 0) {
            if (i > 0) send(i - 1);
            if (i + ENTRY_STAGES - 1 < count) fill(i + ENTRY_STAGES - 1);
        }
        begin_scores(a, base + at::w, k_tile);
        put_rows(record, x, warp, lane);
        float2 sub[8];
        key_halves(sub, half, pair);
        warpgroup_wait<0>();
        wgmma_hold(&a[0][0]);
        const float z_was[2] = {st.z[0], st.z[1]}, top_was[2] = {st.top[0], st.top[1]};
        bool far = false;
        if (UNLIKELY(!standing_weights(x, most, a, sub, less, by.to_log2))) {
            key_exponents(a, sub, by.to_log2);
            key_tops(&keys, st.top, a, own_bias, HEADROOM);
            far = __any_sync(0xffffffffu, key_tops_far(st.top, keys.top));
            scale_state(&st, &keys);
            less[0] = keys.less[0], less[1] = keys.less[1];
            if (!far) {
                pack_rows(x, st.s);
                put_rows(record, x, warp, lane);
            }
            chunk_weights(x, &keys, a);
        }
        const float z[2] = {far ? z_was[0] : st.z[0], far ? z_was[1] : st.z[1]};
        put_marks(record, z, top_was, st.top, far, f0, lane);
        async_fence();
        add_ones(sum, x, false, lane);
        begin_mix(st.s, x, v_tile, true);
        st.z[0] += sum[0];
        st.z[1] += sum[2];
        warpgroup_wait<0>();
        wgmma_hold(&st.s[0][0]);
    }
    __syncthreads();
    if (tid == 0 && count > 0) {
        send(count - 1);
        bulk_done();
    }
#endif
}

srf_status srf__pure_wgmma_entries(struct srf_ctx *ctx, const struct bwd_params *p,
                                   const struct bwd_maps *m, int64_t heads)
{
    return launch(ctx, pure_entries_kernel, heads * p->n_seg, 128, entry_smem::bytes, p, m);
}

/* ---- what queries add to R, u ---------------------------------------------------------------- */

#define ADD_STAGES 3
struct add_smem {
    static constexpr int d_o = ADD_STAGES * TILE, w = d_o + ADD_STAGES * TILE;
    static constexpr int lse = w + TILE, delta = lse + CHUNK * 4; /* its parts: (2, 64) bf16 */
    static constexpr int bias = delta + CHUNK * 4, bar = bias + 64 * 4;
    static constexpr int bytes = bar + ADD_STAGES * 8;
};

#if HAVE_WGMMA
static __device__ __forceinline__ float add_dot(float sum, uint4 x, uint4 y)
{
    const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 f = unpack_bf16(a[i]), g = unpack_bf16(b[i]);
        sum += f.x * g.x + f.y * g.y;
    }
    return sum;
}
/* delta of piece i of a head's first segment; two threads a row. */
static __device__ __forceinline__ void first_deltas(const struct bwd_params &p, unsigned head,
                                                    int i, int n_chunks, int tid)
{
    const struct place here = place_of(p, head, 0, 64);
    const int first = i * p.piece_chunks;
    const int end = min(first + p.piece_chunks, p.seg_chunks);
#pragma unroll 2
    for (int c = first; c < end; c++) {
        const int64_t at = here.out + (c * CHUNK + (tid >> 1)) * p.ld_o + 32 * (tid & 1);
        uint4 x[4], y[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            x[j] = __ldcs((const uint4 *)(p.o + at + 8 * j));
            y[j] = *(const uint4 *)(p.d_o + at + 8 * j);
        }
        float sum = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) sum = add_dot(sum, x[j], y[j]);
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        if ((tid & 1) == 0) p.deltas[(here.head_i * n_chunks + c) * CHUNK + (tid >> 1)] = -sum;
    }
}
#endif

/* The sums of a piece's queries t, 2^(aq + bias - lse_t - N) (do_t, delta_t), in the form of the
 * states of segments: N, the largest exponent so far, in the place of M, lse in that of |y|^2 / 2.
 * It needs nothing of the keys. */
static __global__ WALK_BOUNDS(3) void pure_adds_kernel(const __grid_constant__ struct bwd_params p,
                                                       const __grid_constant__ struct bwd_maps m)
{
#if HAVE_WGMMA
    using at = add_smem;
    extern __shared__ char raw[];
    char *smem = raw + (-smem_addr(raw) & 1023u);
    const uint32_t base = smem_addr(smem);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
    const int f0 = 16 * warp + g;
    const int n_chunks = (p.t + CHUNK - 1) / CHUNK;
    chain_wait();
    chain_next();
    /* Of the first segment nobody asks but for delta. */
    const unsigned heads = gridDim.x / (p.n_piece + (p.deltas ? p.seg_pieces : 0));
    if (blockIdx.x >= heads * p.n_piece) {
        first_deltas(p, blockIdx.x % heads, (int)(blockIdx.x / heads) - p.n_piece, n_chunks, tid);
        clear_tickets(p, tid);
        return;
    }
    const int piece = (int)(blockIdx.x / heads), seg = piece / p.seg_pieces + 1;
    const struct place here = place_of(p, blockIdx.x % heads, seg, 64);
    const int first = seg * p.seg_chunks + piece % p.seg_pieces * p.piece_chunks;
    const int count = min(min(p.piece_chunks, (seg + 1) * p.seg_chunks - first), n_chunks - first);
    const int seq = (int)(here.head_i / p.h), col = (int)(here.head_i % p.h) * 64;
    const float to_log2 = SRF__LOG2E * p.scale;
    float *lse = (float *)(smem + at::lse), *bias = (float *)(smem + at::bias);
    auto fill = [&](int i) {
        const int s = i % ADD_STAGES, t0 = (first + i) * CHUNK;
        const uint32_t full = base + at::bar + 8 * s;
        barrier_expect(full, 2 * TILE);
        bulk_tile(base + s * TILE, &m.q, col, t0, seq, full);
        bulk_tile(base + at::d_o + s * TILE, &m.d_o, col, t0, seq, full);
    };
    /* Two threads a row: its o, 32 numbers each, and one of them its lse. */
    auto load_row = [&](uint4(&o)[4], float *x, int i) {
        const int64_t t = (int64_t)(first + i) * CHUNK + (tid >> 1);
        const bool in = i < count && t < p.t;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint4 *from =
                (const uint4 *)(p.o + here.out + t * p.ld_o + 32 * (tid & 1) + 8 * j);
            o[j] = make_uint4(0, 0, 0, 0);
            /* With delta there, nobody reads it again; the others had better stay in L2. */
            if (in) o[j] = p.deltas ? __ldcs(from) : *from;
        }
        *x = in ? p.stat[here.head_i * p.t + t] : INFINITY;
    };
    if (tid == 0) {
        init_barriers(base + at::bar, ADD_STAGES);
        for (int i = 0; i < min(ADD_STAGES - 1, count); i++) fill(i);
    }
    load_features(p, here.set, base + at::w, bias, tid);
    struct pure_state<64> st;
    pure_state_start(&st, false, 1, NULL, f0, pair);
    float u[2] = {0, 0}, row_lse;
    uint4 o[4];
    load_row(o, &row_lse, 0);
    clear_tickets(p, tid);
    __syncthreads();
    const float own_bias[2] = {bias[f0], bias[f0 + 8]};

    for (int i = 0; i < count; i++) {
        const int s = i % ADD_STAGES;
        const uint32_t q_tile = base + s * TILE, do_tile = base + at::d_o + s * TILE;
        float a[8][4], delta = 0;
        uint32_t kf[4][4];
        struct chunk_keys keys;
        barrier_wait(base + at::bar + 8 * s, i / ADD_STAGES & 1);
        clamp_large(q_tile, p.limit, tid);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint4 y = load_shared_16(do_tile + tile_at<64>(tid >> 1, 4 * (tid & 1) + j));
            delta = add_dot(delta, o[j], y);
        }
        delta = -(delta + __shfl_xor_sync(0xffffffffu, delta, 1));
        if ((tid & 1) == 0) {
            bf16 *parts = (bf16 *)(smem + at::delta) + (tid >> 1);
            parts[0] = __float2bfloat16_rn(delta);
            parts[64] = __float2bfloat16_rn(delta - __bfloat162float(parts[0]));
            lse[tid >> 1] = row_lse;
            if (p.deltas)
                p.deltas[(here.head_i * n_chunks + first + i) * CHUNK + (tid >> 1)] = delta;
        }
        async_fence();
        __syncthreads();
        if (tid == 0 && i + ADD_STAGES - 1 < count) fill(i + ADD_STAGES - 1);
        load_row(o, &row_lse, i + 1);
        begin_scores(a, base + at::w, q_tile);
        warpgroup_wait<0>();
        wgmma_hold(&a[0][0]);
        key_exponents(a, lse, to_log2, pair);
        key_tops(&keys, st.top, a, own_bias);
        chunk_weights(kf, &keys, a);
        if (keys_rise(&keys)) scale_state(&st, &keys);
        begin_mix(st.s, kf, do_tile, true);
        float add[4] = {0, 0, 0, 0};
        const uint32_t part = base + at::delta + (g & 1) * 128 + pair * 4;
#pragma unroll
        for (int kk = 0; kk < 4; kk++) {
            /* Columns 0 and 1 of this product are the two parts of delta, others 0. */
            uint32_t d0 = load_shared(part + kk * 32), d1 = load_shared(part + kk * 32 + 16);
            mma_bf16(add, kf[kk], g < 2 ? d0 : 0, g < 2 ? d1 : 0);
        }
        u[0] = fmaf(u[0], keys.step[0], add[0] + add[1]);
        u[1] = fmaf(u[1], keys.step[1], add[2] + add[3]);
        warpgroup_wait<0>();
        wgmma_hold(&st.s[0][0]);
        /* All have read the tiles and the rows' numbers. */
        __syncthreads();
    }
    float *to = p.adds + (here.head_i * p.n_piece + piece) * 64 * 66;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int f = f0 + 8 * i;
#pragma unroll
        for (int j = 0; j < 8; j++)
            *(float2 *)(to + f * 64 + 8 * j + 2 * pair) =
                make_float2(st.s[j][2 * i], st.s[j][2 * i + 1]);
        if (pair == 0) {
            to[64 * 64 + f] = u[i];
            to[64 * 65 + f] = st.top[i];
        }
    }
#endif
}

/* R, u after each segment but the last, of all later queries, in the scale of M at its end. A
 * thread two columns of R, or u of two features; n threads. */
static __global__ void suffix_kernel(const __grid_constant__ struct bwd_params p, int64_t n)
{
    constexpr int ahead = 12; /* pieces whose loads are on their way at once */
    constexpr int count = 64 * 65, add_count = 64 * 66;
    const int n_chunks = (p.t + CHUNK - 1) / CHUNK;
    chain_next();
    chain_wait();
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int j = 2 * (int)(i % (count / 2)), of_u = j >= 64 * 64;
    const int f = of_u ? j - 64 * 64 : j / 64;
    const int64_t head = i / (count / 2);
    const char *records = p.records + head * n_chunks * RECORD;
    const float *adds = p.adds + head * p.n_piece * add_count;
    float *to = p.seg_r + head * p.n_seg * count + j;
    float sum[2] = {0, 0}, top[2] = {SRF__UNSET, SRF__UNSET};
    /* The segment that has been summed once `left` more pieces are. */
    int seg = p.n_seg - 1, left = p.n_piece - (p.n_seg - 2) * p.seg_pieces;
    for (int last = p.n_piece - 1; last >= 0; last -= ahead) {
        float add[ahead][2], add_top[ahead][2], end[ahead][2];
        int s = seg, more = left;
#pragma unroll
        for (int k = 0; k < ahead; k++) {
            if (k > last) break;
            const float *from = adds + (int64_t)(last - k) * add_count;
            const float2 x = *(const float2 *)(from + j);
            add[k][0] = x.x, add[k][1] = x.y;
            add_top[k][0] = from[64 * 65 + f], add_top[k][1] = from[64 * 65 + f + of_u];
            if (--more > 0) continue;
            const float *at = marks_of(records, s * p.seg_chunks - 1) + MARK_AFTER + f;
            end[k][0] = at[0], end[k][1] = at[of_u];
            more = p.seg_pieces;
            s--;
        }
#pragma unroll
        for (int k = 0; k < ahead; k++) {
            if (k > last) break;
            float r[2];
            const bool done = --left == 0;
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float with = fmaxf(top[e], add_top[k][e]);
                sum[e] =
                    sum[e] * exp2_fast(top[e] - with) + add[k][e] * exp2_fast(add_top[k][e] - with);
                top[e] = with;
                /* Exponents that huge numbers leave no bits for: wrong, but finite. */
                if (done) r[e] = sum[e] * exp2_fast(fminf(with + end[k][e], -SRF__MIN_DEN_LOG2));
            }
            if (!done) continue;
            left = p.seg_pieces;
            seg--;
            *(float2 *)(to + (int64_t)seg * count) = make_float2(r[0], r[1]);
        }
    }
}

srf_status srf__pure_wgmma_adds(struct srf_ctx *ctx, const struct bwd_params *p,
                                const struct bwd_maps *m, int64_t heads)
{
    const int blocks = p->n_piece + (p->deltas ? p->seg_pieces : 0);
    return launch(ctx, pure_adds_kernel, heads * blocks, 128, add_smem::bytes, p, m);
}
srf_status srf__pure_wgmma_suffix(struct srf_ctx *ctx, const struct bwd_params *p, int64_t heads)
{
    const int64_t n = heads * 64 * 65 / 2;
    struct chain_shape shape = {dim3((unsigned)div_up(n, 128)), 128, 0, 1};
    chain_launch(ctx, shape, suffix_kernel, *p, n);
    return srf__cuda_launched("srf_attn_bwd");
}
