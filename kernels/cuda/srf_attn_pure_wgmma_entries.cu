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

#define ADD_STAGES 3 /* of Q and dO; o is done with sooner */
struct add_smem {
    static constexpr int d_o = ADD_STAGES * TILE, o = 2 * ADD_STAGES * TILE;
    static constexpr int w = o + (ADD_STAGES - 1) * TILE;
    static constexpr int lse = w + TILE;              /* of two chunks, as delta */
    static constexpr int delta = lse + 2 * CHUNK * 4; /* its parts: (2, 64) bf16 */
    static constexpr int bar = delta + 2 * CHUNK * 4, bytes = bar + ADD_STAGES * 8;
};

#if HAVE_WGMMA
/* bulk_tile of what is not read again while L2 has it: better let go of this than of what was
 * written and not yet sent to memory. */
static __device__ __forceinline__ void bulk_tile_once(uint32_t tile, const CUtensorMap *map, int x,
                                                      int y, int z, uint32_t bar)
{
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(tile),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(bar), "l"(policy)
                 : "memory");
}
/* -dO.o of a warp's 16 tokens, the diagonal of dO o^T: of rows lane / 4 and 8 more, right where
 * lane % 4 is lane / 8. */
static __device__ __forceinline__ void diagonal_deltas(float delta[2], uint32_t do_rows,
                                                       uint32_t o_rows, int lane)
{
    float low[2][4] = {}, high[2][4] = {};
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
        uint32_t x[4], y[4];
        load_a<64>(x, do_rows, kk, lane);
        load_a<64>(y, o_rows, kk, lane);
        mma_half(low[0], x, y[0]);
        mma_half(high[0], x, y[1]);
        mma_half(low[1], x + 2, y[2]);
        mma_half(high[1], x + 2, y[3]);
    }
    const int e = lane >> 2 & 1;
    delta[0] = -(e ? low[0][1] + low[1][1] : low[0][0] + low[1][0]);
    delta[1] = -(e ? high[0][3] + high[1][3] : high[0][2] + high[1][2]);
}
#endif

/* The sums of a piece's queries t, 2^(aq + bias - lse_t - N) (do_t, delta_t), in the form of the
 * states of segments: N in the place of M, about HEADROOM above the largest exponent so far, lse in
 * that of |y|^2 / 2. It needs nothing of the keys. Of a first segment nobody asks but for delta:
 * blocks of their own do that, or, without lead_pieces, that of a head's last piece.
 *
 * One barrier a chunk: delta and lse, and what was clamped, are there. */
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
    const unsigned heads = gridDim.x / (p.n_piece + p.lead_pieces);
    const int piece = (int)(blockIdx.x / heads);
    const bool sums = piece < p.n_piece;
    const int seg = sums ? piece / p.seg_pieces + 1 : 0;
    const struct place here = place_of(p, blockIdx.x % heads, seg, 64);
    /* Chunks of sums, then more of delta alone. */
    int first = 0, count = 0, lead = 0, n = 0;
    if (sums) {
        const int of_seg = piece - (seg - 1) * p.seg_pieces;
        const int parts = seg < p.n_seg - 1 ? p.seg_pieces : p.last_pieces;
        const int begin = seg * p.seg_chunks, size = min(p.seg_chunks, n_chunks - begin);
        first = begin + size * of_seg / parts;
        n = count = begin + size * (of_seg + 1) / parts - first;
        if (p.deltas && p.lead_pieces == 0 && piece == p.n_piece - 1) n += p.seg_chunks;
    } else {
        const int of_lead = piece - p.n_piece;
        lead = p.seg_chunks * of_lead / p.lead_pieces;
        n = p.seg_chunks * (of_lead + 1) / p.lead_pieces - lead;
    }
    const int seq = (int)(here.head_i / p.h), col = (int)(here.head_i % p.h) * 64;
    const float to_log2 = SRF__LOG2E * p.scale;
    const float *stat = p.stat + here.head_i * p.t;
    auto chunk_of = [&](int i) { return i < count ? first + i : lead + i - count; };
    auto fill = [&](int i) {
        const int s = i % ADD_STAGES, t0 = chunk_of(i) * CHUNK;
        const uint32_t full = base + at::bar + 8 * s;
        barrier_expect(full, (i < count ? 3 : 2) * TILE);
        bulk_tile_once(base + at::d_o + s * TILE, &m.d_o, col, t0, seq, full);
        bulk_tile_once(base + at::o + i % (ADD_STAGES - 1) * TILE, &m.o, col, t0, seq, full);
        if (i < count) bulk_tile_once(base + s * TILE, &m.q, col, t0, seq, full);
    };
    auto load_lse = [&](int i) {
        const int64_t t = (int64_t)(first + i) * CHUNK + tid;
        return tid < CHUNK && i < count && t < p.t ? stat[t] : INFINITY;
    };
    chain_wait();
    chain_next();
    if (tid == 0) {
        init_barriers(base + at::bar, ADD_STAGES);
        for (int i = 0; i < min(ADD_STAGES - 1, n); i++) fill(i);
    }
    float row_lse = load_lse(0);
    if (sums) load_tile<64, 128>(base + at::w, p.w + here.set * p.m * 64, 64, 64, p.m, tid);
    cp_async_commit();
    clear_tickets(p, tid);
    float bias[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
        bias[i] = f0 + 8 * i < p.m ? SRF__LOG2E * p.bias[here.set * p.m + f0 + 8 * i] : -INFINITY;
    cp_async_wait<0>();
    async_fence();
    __syncthreads();

    float delta[2];
    /* Of a chunk whose tiles are here. */
    auto make_deltas = [&](int i) {
        const uint32_t rows = base + warp * 2048;
        diagonal_deltas(delta, rows + at::d_o + i % ADD_STAGES * TILE,
                        rows + at::o + i % (ADD_STAGES - 1) * TILE, lane);
        if (p.deltas && pair == g >> 1) {
            float *to = p.deltas + (here.head_i * n_chunks + chunk_of(i)) * CHUNK + f0;
            to[0] = delta[0];
            to[8] = delta[1];
        }
    };
    struct pure_state<64> st; /* R, u, N */
    pure_state_start(&st, false, 1, NULL, f0, pair);
    float less[2] = {st.top[0] - bias[0], st.top[1] - bias[1]}; /* N - bias */
    for (int i = 0; i < count; i++) {
        const int s = i % ADD_STAGES;
        const uint32_t q_tile = base + s * TILE, do_tile = base + at::d_o + s * TILE;
        char *parts = smem + at::delta + (i & 1) * (CHUNK * 4);
        float *lse = (float *)(smem + at::lse) + (i & 1) * CHUNK;
        float a[8][4], add[4] = {0, 0, 0, 0};
        uint32_t x[4][4], most[2];
        struct chunk_keys keys;
        barrier_wait(base + at::bar + 8 * s, i / ADD_STAGES & 1);
        make_deltas(i);
        if (pair == g >> 1) {
            bf16 *to = (bf16 *)parts + f0;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const bf16 high = __float2bfloat16_rn(delta[j]);
                to[8 * j] = high;
                to[8 * j + 64] = __float2bfloat16_rn(delta[j] - __bfloat162float(high));
            }
        }
        if (tid < CHUNK) lse[tid] = row_lse;
        clamp_large(q_tile, p.limit, tid);
        async_fence();
        /* All have read the tiles of the chunk before, and this one's o. */
        __syncthreads();
        if (tid == 0 && i + ADD_STAGES - 1 < n) fill(i + ADD_STAGES - 1);
        begin_scores(a, base + at::w, q_tile);
        row_lse = load_lse(i + 1);
        float2 sub[8];
        key_halves(sub, lse, pair);
        warpgroup_wait<0>();
        wgmma_hold(&a[0][0]);
        if (UNLIKELY(!standing_weights(x, most, a, sub, less, to_log2))) {
            key_exponents(a, sub, to_log2);
            key_tops(&keys, st.top, a, bias, HEADROOM);
            scale_state(&st, &keys);
            less[0] = keys.less[0], less[1] = keys.less[1];
            chunk_weights(x, &keys, a);
        }
        const uint32_t part = smem_addr(parts) + (g & 1) * 128 + pair * 4;
#pragma unroll
        for (int kk = 0; kk < 4; kk++) {
            /* Columns 0 and 1 of this product are the two parts of delta, others 0. */
            uint32_t d0 = load_shared(part + kk * 32), d1 = load_shared(part + kk * 32 + 16);
            mma_bf16(add, x[kk], g < 2 ? d0 : 0, g < 2 ? d1 : 0);
        }
        begin_mix(st.s, x, do_tile, true);
        st.z[0] += add[0] + add[1];
        st.z[1] += add[2] + add[3];
        warpgroup_wait<0>();
        wgmma_hold(&st.s[0][0]);
    }
    if (sums) {
        float *to = p.adds + (here.head_i * p.n_piece + piece) * 64 * 66;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int f = f0 + 8 * i;
#pragma unroll
            for (int j = 0; j < 8; j++)
                *(float2 *)(to + f * 64 + 8 * j + 2 * pair) =
                    make_float2(st.s[j][2 * i], st.s[j][2 * i + 1]);
            if (pair == 0) {
                to[64 * 64 + f] = st.z[i];
                to[64 * 65 + f] = st.top[i];
            }
        }
    }
    for (int i = count; i < n; i++) {
        barrier_wait(base + at::bar + 8 * (i % ADD_STAGES), i / ADD_STAGES & 1);
        make_deltas(i);
        __syncthreads();
        if (tid == 0 && i + ADD_STAGES - 1 < n) fill(i + ADD_STAGES - 1);
    }
#endif
}

/* R, u after each segment but the last, of all later queries, in the scale of M at its end. A
 * thread two columns of R, or u, of one feature; n threads. */
static __global__ void suffix_kernel(const __grid_constant__ struct bwd_params p, int64_t n)
{
    constexpr int ahead = 22; /* pieces whose loads are on their way at once */
    constexpr int each = 64 * 33, count = 64 * 65, add_count = 64 * 66;
    const int n_chunks = (p.t + CHUNK - 1) / CHUNK;
    chain_next();
    chain_wait();
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int64_t head = i / each;
    const int at = (int)(i % each);
    const bool of_u = at >= 64 * 32;
    const int f = of_u ? at - 64 * 32 : at / 32;
    /* u comes with that of a neighbour, which is not used. */
    const int j = of_u ? 64 * 64 + f / 2 * 2 : 2 * at;
    const char *records = p.records + head * n_chunks * RECORD;
    const float *adds = p.adds + head * p.n_piece * add_count;
    float *to = p.seg_r + head * p.n_seg * count;
    float2 sum = make_float2(0, 0);
    float top = SRF__UNSET;
    /* The segment that has been summed once `left` more pieces are. */
    int seg = p.n_seg - 1, left = p.n_piece - (p.n_seg - 2) * p.seg_pieces;
    for (int last = p.n_piece - 1; last >= 0; last -= ahead) {
        float2 add[ahead];
        float add_top[ahead], end[ahead];
        int s = seg, more = left;
#pragma unroll
        for (int k = 0; k < ahead; k++) {
            if (k > last) break;
            const float *from = adds + (int64_t)(last - k) * add_count;
            add[k] = *(const float2 *)(from + j);
            add_top[k] = from[64 * 65 + f];
            if (--more > 0) continue;
            end[k] = marks_of(records, s * p.seg_chunks - 1)[MARK_AFTER + f];
            more = p.seg_pieces;
            s--;
        }
        __syncwarp();
#pragma unroll
        for (int k = 0; k < ahead; k++) {
            if (k > last) break;
            /* A row of R is read by this warp alone. */
            if (!of_u && (at & 31) < 2)
                discard_line(adds + (int64_t)(last - k) * add_count + f * 64 + (at & 31) * 32);
            const float with = fmaxf(top, add_top[k]);
            const float by = exp2_fast(top - with), add_by = exp2_fast(add_top[k] - with);
            sum.x = sum.x * by + add[k].x * add_by;
            sum.y = sum.y * by + add[k].y * add_by;
            top = with;
            if (--left > 0) continue;
            left = p.seg_pieces;
            seg--;
            /* Exponents that huge numbers leave no bits for: wrong, but finite. */
            const float scale = exp2_fast(fminf(with + end[k], -SRF__MIN_DEN_LOG2));
            float *r = to + (int64_t)seg * count;
            if (of_u)
                r[64 * 64 + f] = scale * (f & 1 ? sum.y : sum.x);
            else
                *(float2 *)(r + j) = make_float2(scale * sum.x, scale * sum.y);
        }
    }
}

srf_status srf__pure_wgmma_adds(struct srf_ctx *ctx, const struct bwd_params *p,
                                const struct bwd_maps *m, int64_t heads)
{
    const int64_t blocks = heads * (p->n_piece + p->lead_pieces);
    /* As much shared memory as lets no third block onto a multiprocessor, where others would have
     * but one for it: these come while the forward's last blocks still run. */
    const bool two = blocks <= 2 * (int64_t)cuda_of(ctx)->n_sm;
    const int bytes = two ? 4 * add_smem::bytes / 3 : add_smem::bytes;
    return launch(ctx, pure_adds_kernel, blocks, 128, bytes, p, m);
}
srf_status srf__pure_wgmma_suffix(struct srf_ctx *ctx, const struct bwd_params *p, int64_t heads)
{
    const int64_t n = heads * 64 * 33;
    struct chain_shape shape = {dim3((unsigned)div_up(n, 128)), 128, 0, 1};
    chain_launch(ctx, shape, suffix_kernel, *p, n);
    return srf__cuda_launched("srf_attn_bwd");
}
