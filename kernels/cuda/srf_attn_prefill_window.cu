/* Prefill of the window hybrid with blocks of 64 tokens: see srf_attn_prefill.cu, and for the forms
 * srf_attn_hybrid.cu. Chunks are the blocks: the queries of block c see blocks c - 1 and c exactly,
 * older ones through the state. Keys and sums are one warpgroup here: it gives out the state of the
 * blocks up to c - 2 with the tiles of block c, and then takes block c - 1 in if block c is
 * complete, as the recurrent form does. Denominators have exact terms: no block has to be cut.
 *
 * The exact terms go with the first 64 features. Rows of positions before the call come from the
 * ring; the last 128 rows go there in the end.
 *
 * Floor: as the pure form's.
 */
#include "kernels/cuda/srf_attn_prefill_parts.h"

/* Shared memory, from a multiple of 1024. Tiles of blocks that queries may still want, the one
 * before each of them, the keys' own, and two that are on their way. */
struct window_form {
    static constexpr int groups = 3; /* keys, two of queries */
    static constexpr int tiles = 8;
    static constexpr int k = 0, v = k + tiles * TILE;
    static constexpr int w = v + tiles * TILE, q = w + 2 * TILE; /* of queries: (2), (2, 2) */
    static constexpr int s = q + 4 * TILE;                       /* to queries: (2, 2) */
    static constexpr int small = s + 4 * TILE;

    template <bool totals>
    static __device__ void run(const struct prefill &p, const struct prefill_maps &m, int64_t items,
                               uint32_t base, struct prefill_small *sm, int group);
};
#define RING (2 * CHUNK)

/* 8 values, from column 8 piece on, of a row of the ring of keys (part 0) or values (1). */
static __device__ __forceinline__ char *ring_piece(const struct prefill &p, int64_t slot, int part,
                                                   int row, int piece)
{
    char *ring = (char *)(state_z(p, slot, 0) + 2 * p.m);
    return ring + ((part * RING + row) * D + 8 * piece) * (p.state_bf16 ? 2 : 4);
}

/* The last tokens' k, v as they are into the ring; thread tid of n. */
static __device__ __forceinline__ void write_ring(const struct prefill &p, const struct work &w,
                                                  int tid, int n)
{
    const int from = max(w.pos, w.stop - RING);
    for (int i = tid; i < (w.stop - from) * 16; i += n) {
        const int piece = i % 8, part = i / 8 % 2, at = from + i / 16;
        const bf16 *rows = part ? p.v : p.k;
        const uint4 x = *(const uint4 *)(rows + (w.first + at) * p.ld + w.head * D + 8 * piece);
        char *to = ring_piece(p, w.slot, part, at % RING, piece);
        if (p.state_bf16) {
            *(uint4 *)to = x;
        } else {
            float2 a = unpack_bf16(x.x), b = unpack_bf16(x.y), c = unpack_bf16(x.z),
                   d = unpack_bf16(x.w);
            ((float4 *)to)[0] = make_float4(a.x, a.y, b.x, b.y);
            ((float4 *)to)[1] = make_float4(c.x, c.y, d.x, d.y);
        }
    }
}

#if HAVE_WGMMA
/* 16 bytes of bf16 from the ring. */
static __device__ __forceinline__ uint4 read_ring(const struct prefill &p, const char *from)
{
    if (p.state_bf16) return *(const uint4 *)from;
    const float4 a = ((const float4 *)from)[0], b = ((const float4 *)from)[1];
    return make_uint4(pack_bf16(a.x, a.y), pack_bf16(a.z, a.w), pack_bf16(b.x, b.y),
                      pack_bf16(b.z, b.w));
}
/* Keys and values of a block of which rows are older than the call: those from the ring. */
static __device__ __forceinline__ void load_older(const struct prefill &p, uint32_t k_tile,
                                                  uint32_t v_tile, const struct place &at,
                                                  uint64_t *barrier, int tid)
{
    const int piece = tid % 8;
    for (int i = 0; i < CHUNK / 8; i++) {
        const int part = i & 1, r = tid / 8 + 8 * (i & ~1), t = at.c * CHUNK + r;
        const uint32_t to = (part ? v_tile : k_tile) + tile_at<D>(r, piece);
        uint4 x = make_uint4(0, 0, 0, 0);
        if (t < at.pos)
            x = read_ring(p, ring_piece(p, at.slot, part, t % RING, piece));
        else if (t < at.stop)
            x = *(const uint4 *)((part ? p.v : p.k) + (at.row + t) * p.ld + at.head * D +
                                 8 * piece);
        asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(x.x), "r"(x.y),
                     "r"(x.z), "r"(x.w)
                     : "memory");
    }
    barrier_arrive(smem_addr(barrier));
}

/* The warpgroup of keys, and of sums. */
template <bool totals>
static __device__ __forceinline__ void keys_role(const struct prefill &p,
                                                 const struct prefill_maps &m, int64_t items,
                                                 uint32_t base, struct prefill_small *sm)
{
    using at = window_form;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, pair = lane & 3;
    const int f0 = 16 * warp + (lane >> 2), segs = p.n_seg - totals;
    const float to_log2 = SRF__LOG2E * p.scale, log2_m = log2f((float)p.m);
    struct place now = {}, ahead;
    now.item = blockIdx.x;
    if (!find_place(p, &now, items, segs)) return;
    ahead = now;
    bool more = true;
    int loads = 0;
    auto load_next = [&] {
        if (!more) return;
        const uint32_t k_tile = base + at::k + loads % at::tiles * TILE;
        const uint32_t v_tile = base + at::v + loads % at::tiles * TILE;
        if (ahead.c * CHUNK >= ahead.pos)
            load_keys(m, k_tile, v_tile, ahead, &sm->loads[loads & 3], tid);
        else
            load_older(p, k_tile, v_tile, ahead, &sm->loads[loads & 3], tid);
        more = next_place(p, &ahead, items, segs);
        loads++;
    };
    /* Block number `block`, where `now` is, has come. */
    auto start = [&](int block) {
        const uint32_t k_tile = base + at::k + block % at::tiles * TILE;
        const int n = now.stop - now.c * CHUNK;
        barrier_wait(smem_addr(&sm->loads[block & 3]), block >> 2 & 1);
        clear_tail(k_tile, base + at::v + block % at::tiles * TILE, n, tid);
        own_norms(k_tile, sm->half[block & 3], p, n, tid);
        async_fence();
        group_barrier(1);
        load_next();
    };
    struct key_features f;
    struct pure_state<D> st;
    int i = 0, item[2] = {0, 0}; /* blocks before this one; of what has been given out */
    load_next();
    load_next();

    for (bool any = true; any;) {
        const int64_t own = now.item;
        const int end = now.end;
        int turn;
        const struct work w = turn_of(p, own, items, segs, &turn);
        read_features(&f, p, w, f0, pair);
        begin_turn<TOPS | SUMS, totals>(&st, p, w, turn, 1, f0, tid, 1);
        start(i);
        if (now.before) {
            /* Queries of this number there are none: what they had last must be done, or they
             * would be more than four blocks behind. */
            if (!totals) wait_empty(&sm->given[i & 1], (i & 1 ? item[1] : item[0]) + 1);
            i++;
            next_place(p, &now, items, segs);
            start(i);
        }
        bool same = true;
        auto go_on = [&] {
            any = next_place(p, &now, items, segs);
            same = any && now.item == own;
            if (same) start(i + 1);
        };
        for (; same; i++) {
            const int c = now.c, to = i & 1;
            const bool full = c > 0 && (c + 1) * CHUNK <= now.stop;
            const int tile = (i - 1) % at::tiles * TILE; /* of the block before */
            float a[32];
            if (!totals) {
                const int number = to ? item[1]++ : item[0]++, buffer = number & 1;
                struct prefill_given *given = &sm->given[to];
                wait_empty(given, number);
                publish_tops(&st, log2_m, f.bias, given, buffer, f0, pair);
                publish_sums(&st, base + at::s + (2 * to + buffer) * TILE, f0, pair);
                async_fence();
                arrive(given->full, number);
            }
            if (full) {
                struct pure_keys keys;
                uint32_t kf[4][4];
                products(a, f.w, base + at::k + tile);
                key_exponents(a, sm->half[(i - 1) & 3], to_log2);
                key_tops(&keys, &st, a, f.bias, 0, pair);
                key_weights(kf, &keys, a, f.bias);
                scale_sums(&st, keys.step);
                warpgroup_fence();
                wgmma_mix(&st.s[0][0], kf, base + at::v + tile, true);
                warpgroup_commit();
                scale_tops(&st, &keys);
                add_tops(&st, kf, lane);
                go_on();
                warpgroup_wait<0>();
                wgmma_hold(&st.s[0][0]);
            } else {
                go_on();
            }
        }
        end_turn<TOPS | SUMS, totals>(&st, p, w, end == w.end, f0, tid, 1);
        /* Else another segment, or the next features, may still have to read it. */
        if (!totals && end == w.end && w.last && !p.sums && p.first + p.count == p.m)
            write_ring(p, w, tid, GROUP);
    }
}

/* A tile of weights 2^(a - most) for the rows of a warp, num and den brought to the new maxima. */
static __device__ __forceinline__ void
row_weights(uint32_t weight[4][4], float a[32], float most[2], float (&num)[D / 8][4], float den[4])
{
    float step[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float next = most[i];
#pragma unroll
        for (int j = 0; j < 8; j++)
            next = fmaxf(next, fmaxf(a[4 * j + 2 * i], a[4 * j + 2 * i + 1]));
        next = quad_max(next);
        step[i] = exp2_fast(most[i] - next);
        most[i] = next;
        den[2 * i] *= step[i];
        den[2 * i + 1] *= step[i];
    }
    if (__any_sync(0xffffffffu, step[0] != 1.0f || step[1] != 1.0f))
        scale_rows(num, step[0], step[1]);
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            weight[j >> 1][(j & 1) * 2 + i] = pack_bf16(exp2_fast(a[4 * j + 2 * i] - most[i]),
                                                        exp2_fast(a[4 * j + 2 * i + 1] - most[i]));
}

/* num += weight tile */
static __device__ __forceinline__ void mix(float (&num)[D / 8][4], const uint32_t weight[4][4],
                                           uint32_t tile)
{
    warpgroup_fence();
    wgmma_mix(&num[0][0], weight, tile, true);
    warpgroup_commit();
    warpgroup_wait<0>();
    wgmma_hold(&num[0][0]);
}

/* One of two warpgroups of queries, for every other block. */
static __device__ __forceinline__ void queries_role(const struct prefill &p, int64_t items,
                                                    uint32_t base, struct prefill_small *sm,
                                                    int group)
{
    using at = window_form;
    const int tid = threadIdx.x & (GROUP - 1), lane = tid & 31, warp = tid >> 5, pair = lane & 3;
    const int row = 16 * warp + (lane >> 2), id = 2 + group;
    const float to_log2 = SRF__LOG2E * p.scale, exact = to_log2 * p.scale;
    const uint32_t w_tile = base + at::w + group * TILE;
    struct prefill_given *given = &sm->given[group];
    /* The next block for this warpgroup; n counts them all, as the keys do. */
    auto next = [&](struct place *x, int *n) {
        bool any;
        do {
            any = next_place(p, x, items, p.n_seg);
            ++*n;
        } while (any && (x->before || (*n & 1) != group));
        return any;
    };
    struct place now = {}, ahead;
    now.item = blockIdx.x;
    int number = 0, number_ahead, loads = 0;
    bool any = find_place(p, &now, items, p.n_seg);
    if (any && (now.before || group)) any = next(&now, &number);
    ahead = now, number_ahead = number;
    bool more = any;
    auto load_next = [&] {
        if (!more) return;
        const bf16 *src = p.q + (ahead.row + ahead.c * CHUNK) * p.ld + ahead.head * D + tid % 8 * 8;
        const uint32_t tile = base + at::q + (2 * group + (loads++ & 1)) * TILE;
#pragma unroll
        for (int r = tid / 8; r < CHUNK; r += 16) {
            const int t = ahead.c * CHUNK + r;
            const bool there = t >= ahead.pos && t < ahead.stop;
            cp_async_16(tile + tile_at<D>(r, tid % 8), there ? src + r * p.ld : p.q, there);
        }
        cp_async_commit();
        more = next(&ahead, &number_ahead);
    };
    load_next();
    int64_t features = -1;
    for (int item = 0; any; item++, any = next(&now, &number)) {
        const int c = now.c;
        const uint32_t q_tile = base + at::q + (2 * group + (item & 1)) * TILE;
        if (features_of(p, now.head) != features) {
            features = features_of(p, now.head);
            group_barrier(id); /* all are done with the old ones */
            load_tile<D, GROUP>(w_tile, p.w + features * D, D, 64, p.count, tid);
            cp_async_commit();
            cp_async_wait<0>();
            async_fence();
        }
        cp_async_wait<0>();
        group_barrier(id);
        load_next();
        uint32_t x[4][4], weight[4][4];
        float a[32], num[D / 8][4], den[4] = {0, 0, 0, 0}, half[2] = {0, 0};
        float most[2] = {-INFINITY, -INFINITY};
        query_rows(x, q_tile, p.limit, warp, lane);
#pragma unroll
        for (int kk = 0; kk < 4; kk++)
#pragma unroll
            for (int i = 0; i < 4; i++) half[i & 1] += sum_squares(x[kk][i]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            half[i] = 0.5f * exact * quad_sum(half[i]);
            if (half[i] > SRF__HALF_LIMIT) half[i] = SRF__HALF_LIMIT;
        }
        clear(num);
        wait_for(given->full, item);
        for (int b = c; b >= max(c - 1, 0) && p.first == 0; b--) {
            const int tile = (number - c + b) % at::tiles * TILE;
            products(a, x, base + at::k + tile);
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    a[4 * j + e] *= exact;
                    if (b == c && 8 * j + 2 * pair + (e & 1) > row + 8 * (e >> 1))
                        a[4 * j + e] = -INFINITY;
                }
            row_weights(weight, a, most, num, den);
            add_ones(den, weight, lane);
            mix(num, weight, base + at::v + tile);
        }
        if (c > 1) {
            products(a, x, w_tile);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float2 shift = *(const float2 *)(given->top[item & 1] + 8 * j + 2 * pair);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    a[4 * j + e] =
                        fmaf(a[4 * j + e], to_log2, (e & 1 ? shift.y : shift.x) - half[e >> 1]);
            }
            row_weights(weight, a, most, num, den);
            add_z(den, weight, given->z[item & 1], lane);
            mix(num, weight, base + at::s + (2 * group + (item & 1)) * TILE);
        }
        arrive(given->empty, item);
        give_rows(p, now.row + c * CHUNK, now.head, num, den, most, q_tile, warp,
                  max(0, now.pos - c * CHUNK), min(CHUNK, now.stop - c * CHUNK), lane);
    }
}

template <bool totals>
__device__ __forceinline__ void window_form::run(const struct prefill &p,
                                                 const struct prefill_maps &m, int64_t items,
                                                 uint32_t base, struct prefill_small *sm, int group)
{
    start_barriers(sm, 1, 1);
    if (totals || group == 0) {
        if (!totals) asm volatile("setmaxnreg.inc.sync.aligned.u32 184;");
        keys_role<totals>(p, m, items, base, sm);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 160;");
        queries_role(p, items, base, sm, group - 1);
    }
}
#endif

static __global__ void ring_kernel(const __grid_constant__ struct prefill p)
{
    write_ring(p, work_of(p, blockIdx.x, 0), threadIdx.x, blockDim.x);
}

/* ---- launches -------------------------------------------------------------------------------- */

srf_status srf__prefill_window_totals(struct srf_ctx *ctx, const struct prefill *p,
                                      const struct prefill_maps *m)
{
    return prefill_launch<window_form, true>(ctx, p, m);
}

srf_status srf__prefill_window(struct srf_ctx *ctx, const struct prefill *p,
                               const struct prefill_maps *m)
{
    SRF_TRY((prefill_launch<window_form, false>(ctx, p, m)));
    if (p->n_seg == 1 || p->first + p->count < p->m) return SRF_OK;
    ring_kernel<<<(unsigned)p->heads, 256, 0, stream_of(ctx)>>>(*p);
    return srf__cuda_launched("srf_attn_prefill");
}
