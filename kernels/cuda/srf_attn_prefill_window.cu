/* Prefill of the window hybrid, windows of 32 n up to 256: see srf_attn_prefill.cu, and for the
 * forms srf_attn_hybrid.cu. Chunks of 64 tokens go to two warpgroups of queries in turns; keys and
 * sums are one warpgroup, which gives out the state that a chunk's queries see.
 *
 *     window 64   chunks are blocks: the queries of chunk c see chunks c - 1 and c exactly, older
 *                 ones through the state. Then the state takes chunk c - 1 in if chunk c is
 *                 complete, as the recurrent form does.
 *     window 128  two chunks a block (192: three, 256: four): exact are chunk c and the two or
 *                 three before it; at the end of a complete block the state takes in the two chunks
 *                 of the block before.
 *     window 96   (160, 224) every other block ends in the middle of a chunk. The second half of
 *                 such a chunk's queries sees a state that has a block more, half a chunk and whole
 *                 ones: given out by itself, after the chunk's first one. Each warp has rows of one
 *                 half only, so takes M and z of its own; of the products with S, one for each
 *                 state, its weights in the other are zeros. Older blocks begin with half a chunk
 *                 too: keys are masked by what a half's block sees.
 *     window 32   two blocks a chunk, which would want two states. Both take the state of chunks up
 *                 to c - 2. Of chunk c - 1 the first block sees the first half, the second block
 *                 all of it, through features: qf kf^T, as the pure form's chunks see themselves.
 *                 M counts that chunk: all its keys are older than the queries, and one that makes
 *                 others' weights vanish is seen exactly, or vanishes nowhere.
 *
 * Denominators have exact terms: no chunk has to be cut. The exact terms go with the first 64
 * features. Rows of positions before the call come from the ring; the last 2 window rows go there
 * in the end.
 *
 * Floor: as the pure form's.
 */
#include "kernels/cuda/srf_attn_prefill_tiles.h"

/* Behind the tiles. What is given out for chunk i is in slot i % slots, all chunks of a block's way
 * counted, also those that are there for their keys only. */
template <int slots, int states, int norms> struct window_small {
    float half[norms][64];  /* log2(e) |y|^2 / 2 of the keys of chunks i % norms */
    float top[states][64];  /* bias + M */
    bf16 z[states][2][64];  /* z as a sum of two */
    uint64_t loads[4];      /* keys and values of chunk i % 4 have come */
    uint64_t keys[8];       /* they, and norms, are as they are used */
    uint64_t full[states];  /* all is there for the queries */
    uint64_t empty[states]; /* they need it no more */
    int second[slots]; /* number of the second state of the chunk's queries; -1: they have one */
};

/* Shared memory, from a multiple of 1024. `back` chunks before its own may be wanted for a chunk.
 * The keys are at most `slots` chunks ahead of the queries, and have `ahead` more on their way. */
template <int window_, int slots_, int ahead_ = 2> struct window_form {
    static constexpr int window = window_, slots = slots_, ahead = ahead_;
    static constexpr int n_queries = 2, groups = 1 + n_queries, key_groups = 1;
    static constexpr int of_block = window > CHUNK ? window / CHUNK : 1; /* whole chunks */
    /* Blocks may end in the middle of a chunk: in chunks `of_block` behind multiples of `back`. */
    static constexpr bool odd = window % CHUNK != 0 && window > CHUNK;
    static constexpr int back = odd ? window / (CHUNK / 2) : 2 * of_block - 1;
    static constexpr int tiles = slots + back + 1 + ahead;
    static constexpr int states = slots + odd; /* the last one: of second states */
    /* The product with W goes beside that of the exact weights with V; else it would spill. */
    static constexpr bool together = back == 1;
    static constexpr int norms = back + 2 > 8 ? 16 : 8;
    static constexpr int k = 0, v = k + tiles * TILE;
    static constexpr int w = v + tiles * TILE, q = w + n_queries * TILE;   /* of queries */
    static constexpr int s = q + n_queries * TILE, kf = s + states * TILE; /* to queries */
    static constexpr int small = kf + (window < CHUNK ? slots * TILE : 0);
    using small_parts = struct window_small<slots, states, norms>;

    /* A chunk's queries see something through features. */
    static __device__ __forceinline__ bool far(int c)
    {
        return window < CHUNK ? c > 0 : c >= 2 * window / CHUNK;
    }
    template <bool totals>
    static __device__ void run(const struct prefill &p, const struct prefill_maps &m, int64_t items,
                               uint32_t base, small_parts *sm, int group);
};

/* 8 values, from column 8 piece on, of a row of the ring of keys (part 0) or values (1). */
static __device__ __forceinline__ char *ring_piece(const struct prefill &p, int64_t slot, int part,
                                                   int row, int piece)
{
    char *ring = (char *)(state_z(p, slot, 0) + 2 * p.m);
    return ring + ((part * 2 * p.window + row) * D + 8 * piece) * (p.state_bf16 ? 2 : 4);
}

/* The last tokens' k, v as they are into the ring; thread tid of n, a multiple of 16. */
static __device__ __forceinline__ void write_ring(const struct prefill &p, const struct work &w,
                                                  int tid, int n)
{
    const int ring = 2 * p.window;
    const int from = max(w.pos, w.stop - ring);
    constexpr int at_once = 4; /* loads on their way before the first store */
    const int piece = tid % 8, part = tid / 8 % 2;
    const bf16 *rows = (part ? p.v : p.k) + w.first * p.ld + w.head * D + 8 * piece;
    for (int row = from + tid / 16; row < w.stop; row += at_once * n / 16) {
        uint4 x[at_once];
#pragma unroll
        for (int i = 0; i < at_once; i++)
            x[i] = *(const uint4 *)(rows + min(row + i * n / 16, w.stop - 1) * p.ld);
#pragma unroll
        for (int i = 0; i < at_once; i++) {
            const int at = row + i * n / 16;
            if (at >= w.stop) break;
            char *to = ring_piece(p, w.slot, part, at % ring, piece);
            if (p.state_bf16) {
                *(uint4 *)to = x[i];
            } else {
                float2 a = unpack_bf16(x[i].x), b = unpack_bf16(x[i].y), c = unpack_bf16(x[i].z),
                       d = unpack_bf16(x[i].w);
                ((float4 *)to)[0] = make_float4(a.x, a.y, b.x, b.y);
                ((float4 *)to)[1] = make_float4(c.x, c.y, d.x, d.y);
            }
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
                                                  uint32_t v_tile, const struct prefill_place &at,
                                                  uint64_t *barrier, int tid)
{
    const int piece = tid % 8;
    for (int i = 0; i < CHUNK / 8; i++) {
        const int part = i & 1, r = tid / 8 + 8 * (i & ~1), t = at.c * CHUNK + r;
        const uint32_t to = (part ? v_tile : k_tile) + tile_at<D>(r, piece);
        uint4 x = make_uint4(0, 0, 0, 0);
        if (t < at.pos)
            x = read_ring(p, ring_piece(p, at.slot, part, t % (2 * p.window), piece));
        else if (t < at.stop)
            x = *(const uint4 *)((part ? p.v : p.k) + (at.row + t) * p.ld + at.head * D +
                                 8 * piece);
        asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(x.x), "r"(x.y),
                     "r"(x.z), "r"(x.w)
                     : "memory");
    }
    barrier_arrive(smem_addr(barrier));
}

/* The state with the keys of chunk number i of a block's way, but for the half that is not to be
 * taken. */
template <class form>
static __device__ __forceinline__ void
take_chunk(struct pure_state<D> *st, const struct key_features *f, typename form::small_parts *sm,
           uint32_t base, int i, float to_log2, bool not_first, bool not_second)
{
    const int pair = threadIdx.x & 3, lane = threadIdx.x & 31;
    struct pure_keys keys;
    float a[32];
    uint32_t kf[4][4];
    products(a, f->w, base + form::k + i % form::tiles * TILE);
    key_exponents(a, sm->half[i & (form::norms - 1)], to_log2);
#pragma unroll
    for (int e = 0; e < (form::odd ? 32 : 0); e++)
        if (e < 16 ? not_first : not_second) a[e] = -INFINITY;
    key_tops(&keys, st, a, f->bias, 0, pair);
    key_weights(kf, &keys, a, f->bias);
    scale_sums(st, keys.step);
    scale_tops(st, &keys);
    warpgroup_fence();
    mix(&st->s[0][0], kf, base + form::v + i % form::tiles * TILE, true);
    warpgroup_commit();
    add_tops(st, kf, lane);
    warpgroup_wait<0>();
    wgmma_hold(&st->s[0][0]);
}

/* The warpgroup of keys, and of sums. */
template <class form, bool totals>
static __device__ __forceinline__ void keys_role(const struct prefill &p,
                                                 const struct prefill_maps &m, int64_t items,
                                                 uint32_t base, typename form::small_parts *sm)
{
    constexpr int W = form::window;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, pair = lane & 3;
    const int f0 = 16 * warp + (lane >> 2), segs = p.n_seg - totals;
    const float to_log2 = SRF__LOG2E * p.scale, log2_m = log2f((float)p.m);
    struct prefill_place now = {}, ahead;
    now.item = blockIdx.x;
    bool any = find_place(p, &now, items, segs), more = any;
    ahead = now;
    int i = 0, loads = 0, seconds = 0; /* chunks before this one; second states */
    auto k_of = [&](int chunk) { return base + form::k + chunk % form::tiles * TILE; };
    auto v_of = [&](int chunk) { return base + form::v + chunk % form::tiles * TILE; };
    auto load_next = [&] {
        if (!more) return;
        if (UNLIKELY(ahead.c * CHUNK < ahead.pos))
            load_older(p, k_of(loads), v_of(loads), ahead, &sm->loads[loads & 3], tid);
        else
            load_keys(m, k_of(loads), v_of(loads), ahead, &sm->loads[loads & 3], tid);
        more = next_place(p, &ahead, items, segs);
        loads++;
    };
    /* Chunk number `chunk`, where `now` is, becomes what all use; then what else is given out. */
    auto prepare = [&](int chunk) {
        const int n = now.stop - now.c * CHUNK;
        barrier_wait(smem_addr(&sm->loads[chunk & 3]), chunk >> 2 & 1);
        if (UNLIKELY(n < CHUNK)) clear_rows(k_of(chunk), v_of(chunk), n, warp, lane);
        diagonal_norms(k_of(chunk), sm->half[chunk & (form::norms - 1)], p, n, warp, lane);
    };
    auto give_keys = [&](int chunk) {
        if (!totals) barrier_arrive(smem_addr(&sm->keys[chunk & 7]));
        load_next();
    };
#pragma unroll 1
    for (int k = 0; k < form::ahead; k++) load_next();
    if (any) {
        prepare(0);
        async_fence();
        group_barrier(1);
        give_keys(0);
    }

    while (any) {
        const int64_t own = now.item;
        const int end = now.end;
        int turn;
        const struct work w = turn_of(p, own, items, segs, &turn);
        /* Short sequences: the state before is empty, and stays so. */
        const bool empty = !totals && w.stop < 2 * W;
        struct key_features f;
        struct pure_state<D> st;
        read_features(&f, p, w, f0, pair);
        if (empty)
            pure_state_start(&st, false, 1, NULL, f0, pair);
        else
            begin_turn<TOPS | SUMS, totals>(&st, p, w, turn, 1, f0, tid, 1);
        for (bool same = true; same; i++) {
            /* -1: for its keys only */
            const int c = now.before > 0 ? -1 : now.c, left = now.stop - now.c * CHUNK;
            const int pos = now.pos, slot = i % form::slots;
            any = next_place(p, &now, items, segs);
            same = any && now.item == own;
            if (any) prepare(i + 1);
            /* The state takes in the keys of chunks i - j. Window 32: with what is given out; at
             * the sequence's end, and a block's, half of the last chunk as well. */
            int j = 1, to = 1;
            /* Window 96: after a block, of the one before it; of the first or the last chunk half.
             * in_chunk: that block ends in the middle of this chunk. */
            bool in_chunk = false;
            if (W < CHUNK) {
                to = c < 0 || left != CHUNK;
            } else if (form::odd) {
                const int phase = c % form::back, middle = c * CHUNK + CHUNK / 2;
                in_chunk =
                    c >= form::back && phase == form::of_block && pos < middle && left >= CHUNK / 2;
                to = 2;
                if (in_chunk)
                    j = form::back, to = form::of_block + 1;
                else if (phase == form::back - 1 && left >= CHUNK)
                    j = form::back - 1, to = form::of_block;
            } else if (c < form::back || (c + 1) % form::of_block != 0 || left < CHUNK) {
                to = 2;
            } else {
                j = form::back, to = form::of_block;
            }
            const bool twice = form::odd && !totals && in_chunk && left > CHUNK / 2;
            auto publish = [&](int state) {
                publish_tops(&st, log2_m, f.bias, sm->top[state], sm->z[state], f0, pair);
                publish_sums(&st, base + form::s + state * TILE, f0, pair);
            };
            auto give = [&](const uint32_t kf[4][4]) {
                if (!totals) {
                    if (i >= form::slots)
                        barrier_wait(smem_addr(&sm->empty[slot]), (i / form::slots & 1) ^ 1);
                    if (form::far(c)) {
                        publish(slot);
                        if (W < CHUNK) publish_weights(kf, base + form::kf + slot * TILE, f0, pair);
                    }
                    if (form::odd && tid == 0) sm->second[slot] = twice ? seconds : -1;
                }
                async_fence();
                group_barrier(1);
                if (!totals) barrier_arrive(smem_addr(&sm->full[slot]));
                if (any) give_keys(i + 1);
            };
            if (W >= CHUNK) {
                give(NULL);
                for (; j >= to; j--)
                    take_chunk<form>(&st, &f, sm, base, i - j, to_log2, in_chunk && j == form::back,
                                     !in_chunk && j == to);
            }
            for (; W < CHUNK && j >= to; j--) {
                const bool keys_there = j == 0 || c > 0;
                uint32_t kf[4][4];
                if (keys_there) {
                    struct pure_keys keys;
                    float a[32];
                    products(a, f.w, k_of(i - j));
                    key_exponents(a, sm->half[(i - j) & (form::norms - 1)], to_log2);
                    if (UNLIKELY(j == 0 || left < W || c <= pos / CHUNK)) {
                        /* What the caller's state has; what comes later sees one by one. */
                        const int hi = j == 0 || left < W ? W : CHUNK;
                        const int lo = j == 0 || c > pos / CHUNK ? 0 : pos % CHUNK < W ? W : CHUNK;
#pragma unroll
                        for (int e = 0; e < 32; e++) {
                            const int token = e / 4 * 8 + 2 * pair + (e & 1);
                            if (token < lo || token >= hi) a[e] = -INFINITY;
                        }
                    }
                    key_tops(&keys, &st, a, f.bias, 0, pair);
                    key_weights(kf, &keys, a, f.bias);
                    scale_sums(&st, keys.step);
                    scale_tops(&st, &keys);
                }
                if (j == 1) give(kf);
                if (!keys_there) continue;
                warpgroup_fence();
                mix(&st.s[0][0], kf, v_of(i - j), true);
                warpgroup_commit();
                add_tops(&st, kf, lane);
                warpgroup_wait<0>();
                wgmma_hold(&st.s[0][0]);
            }
            if (twice) {
                if (seconds > 0)
                    barrier_wait(smem_addr(&sm->empty[form::states - 1]), (seconds & 1) ^ 1);
                publish(form::states - 1);
                async_fence();
                barrier_arrive(smem_addr(&sm->full[form::states - 1]));
                seconds++;
            }
        }
        if (!empty) end_turn<TOPS | SUMS, totals>(&st, p, w, end == w.end, f0, tid, 1);
        /* Else another segment, or the next features, may still have to read it. */
        if (!totals && end == w.end && w.last && !p.sums && p.first + p.count == p.m)
            write_ring(p, w, tid, GROUP);
    }
}

/* What a warp's rows have so far: numerators; denominators, of rows g, g + 8 in 0, 2, shares of a
 * sum over the quad; both in the scale 2^-most. */
struct row_sums {
    float num[D / 8][4], den[4], most[2];
};

/* Weights 2^(a - most) of n tiles, of the last one's columns from 8 `from` on; sums brought to the
 * new maxima. first: there is nothing to bring. */
template <bool first, int n, int from>
static __device__ __forceinline__ void row_weights(uint32_t weight[n][4][4], const float a[n][32],
                                                   struct row_sums *r)
{
    float step[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float most = first ? a[0][2 * i] : r->most[i];
#pragma unroll
        for (int t = 0; t < n; t++)
#pragma unroll
            for (int j = t < n - 1 ? 0 : from; j < 8; j++)
                most = fmaxf(most, fmaxf(a[t][4 * j + 2 * i], a[t][4 * j + 2 * i + 1]));
        most = quad_max(most);
        step[i] = first ? 1.0f : exp2_fast(r->most[i] - most);
        r->most[i] = most;
        r->den[2 * i] *= step[i];
    }
    if (!first && __any_sync(0xffffffffu, step[0] != 1.0f || step[1] != 1.0f))
        scale_rows(r->num, step[0], step[1]);
#pragma unroll
    for (int t = 0; t < n; t++)
#pragma unroll
        for (int j = t < n - 1 ? 0 : from; j < 8; j++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                weight[t][j >> 1][(j & 1) * 2 + i] =
                    pack_bf16(exp2_fast(a[t][4 * j + 2 * i] - r->most[i]),
                              exp2_fast(a[t][4 * j + 2 * i + 1] - r->most[i]));
}

/* a = x tile^T, on its own. */
static __device__ __forceinline__ void scores(float a[32], const uint32_t x[4][4], uint32_t tile)
{
#pragma unroll
    for (int kk = 0; kk < 4; kk++) wgmma_64<false>(a, x[kk], tile_on_by(tile, 2 * kk), kk > 0);
}

/* Which halves of a tile's keys a warp's queries do not see one by one. */
struct tile_mask {
    bool low, high;
};
/* n tiles of keys, seen one by one: of the first call, the chunk's own, causally, and the one
 * before; of the last tile only rows from 16 `from` on, by the first half of the queries. some:
 * not all of the last tile is seen. last: far = x W^T as well, meanwhile. */
template <bool first, int n, int from, bool some = false, bool last = false>
static __device__ __forceinline__ void
exact_tiles(struct row_sums *r, const uint32_t x[4][4], const uint32_t k[2], const uint32_t v[2],
            float exact, struct tile_mask masked = {}, float *far = NULL, uint32_t w_tile = 0)
{
    const int lane = threadIdx.x & 31, row = (threadIdx.x & (GROUP - 1)) / 32 * 16 + (lane >> 2);
    const int before = row - 2 * (lane & 3);
    const uint32_t ones = lane < 4 ? 0x3f803f80u : 0;
    float a[n][32];
    uint32_t weight[n][4][4];
    warpgroup_fence();
#pragma unroll
    for (int t = 0; t < n; t++) scores(a[t], x, k[t]);
    warpgroup_commit();
    warpgroup_wait<0>();
#pragma unroll
    for (int t = 0; t < n; t++) {
        wgmma_hold(a[t]);
#pragma unroll
        for (int j = t < n - 1 ? 0 : 2 * from; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float *at = &a[t][4 * j + e];
                /* not in one step with a difference: that of huge ones may be anything */
                *at *= exact;
                if (first && t == 0 && 8 * j + (e & 1) - 8 * (e >> 1) > before) *at = -INFINITY;
                if (from > 0 && t == n - 1 && row >= CHUNK / 2) *at = -INFINITY;
                if (some && t == n - 1 && (j < 4 ? masked.low : masked.high)) *at = -INFINITY;
            }
    }
    row_weights<first, n, 2 * from>(weight, a, r);
    warpgroup_fence();
#pragma unroll
    for (int t = 0; t < n; t++)
#pragma unroll
        for (int kk = t < n - 1 ? 0 : from; kk < 4; kk++)
            wgmma_64<true>(&r->num[0][0], weight[t][kk], tile_on_by(v[t], 128 * kk),
                           !first || t > 0 || kk > 0);
    if (last) scores(far, x, w_tile);
    warpgroup_commit();
#pragma unroll
    for (int t = 0; t < n; t++)
#pragma unroll
        for (int kk = t < n - 1 ? 0 : from; kk < 4; kk++)
            mma_bf16(r->den, weight[t][kk], ones, ones);
    warpgroup_wait<0>();
    wgmma_hold(&r->num[0][0]);
    if (last) wgmma_hold(far);
}

/* One of two warpgroups of queries, for every other chunk. */
template <class form>
static __device__ __forceinline__ void queries_role(const struct prefill &p, int64_t items,
                                                    uint32_t base, typename form::small_parts *sm,
                                                    int group)
{
    constexpr int W = form::window, slots = form::slots, tiles = form::tiles;
    constexpr int from = W < CHUNK ? 2 : 0; /* of the chunk before, see exact_tiles */
    const int tid = threadIdx.x & (GROUP - 1), lane = tid & 31, warp = tid >> 5, pair = lane & 3;
    const int id = 2 + group;
    const float to_log2 = SRF__LOG2E * p.scale, exact = to_log2 * p.scale;
    const uint32_t w_tile = base + form::w + group * TILE, q_tile = base + form::q + group * TILE;
    /* Where the next chunk for this warpgroup is, and its number, as the keys count. */
    struct prefill_place next = {};
    next.item = blockIdx.x;
    int number = 0, done = group;
    bool any = find_place(p, &next, items, p.n_seg);
    /* On by so many chunks, and on to one of its own; a warp loads its rows of it, having done
     * with the last ones. */
    auto load_next = [&](int step) {
        do {
            any = any && next_place(p, &next, items, p.n_seg, step);
            number += step;
            step = 2;
        } while (any && next.before > 0);
        if (!any) return;
        const int first = 16 * warp + lane / 8, t0 = next.c * CHUNK + first;
        const bf16 *src = p.q + (next.row + t0) * p.ld + next.head * D + lane % 8 * 8;
#pragma unroll
        for (int i = 0; i < 4; i++, src += 4 * p.ld) {
            const int t = t0 + 4 * i;
            const bool there = t >= next.pos && t < next.stop;
            cp_async_16(q_tile + tile_at<D>(first + 4 * i, lane % 8), there ? src : p.q, there);
        }
        cp_async_commit();
    };
    load_next(group);
    int features = -1;
    for (;; done += 2) {
        /* Chunks that are there for their keys. */
        for (; UNLIKELY(done < number); done += 2) {
            /* The slot's barrier tells this chunk from the one before only behind that one. */
            if (slots == 1) barrier_wait(smem_addr(&sm->keys[done & 7]), done >> 3 & 1);
            barrier_wait(smem_addr(&sm->full[done % slots]), done / slots & 1);
            barrier_arrive(smem_addr(&sm->empty[done % slots]));
        }
        if (!any) break;
        const int c = next.c, head = next.head, slot = done % slots;
        const int lo = max(0, next.pos - c * CHUNK), hi = min(CHUNK, next.stop - c * CHUNK);
        const int rows = (int)next.row + c * CHUNK;
        if (UNLIKELY((int)features_of(p, head) != features)) {
            features = (int)features_of(p, head);
            group_barrier(id); /* all are done with the old ones */
            load_tile<D, GROUP>(w_tile, p.w + (int64_t)features * D, D, 64, p.count, tid);
            cp_async_commit();
            cp_async_wait<0>();
            async_fence();
            group_barrier(id);
        }
        uint32_t x[4][4];
        float a[32];
        struct row_sums r = {};
        r.most[0] = r.most[1] = -INFINITY;
        cp_async_wait<0>();
        __syncwarp();
        query_rows(x, q_tile, p.limit, warp, lane);
        __syncwarp();
        load_next(2);
        barrier_wait(smem_addr(&sm->keys[done & 7]), done >> 3 & 1);
        /* Tiles of chunks c - back, and before. */
        uint32_t k[2], v[2];
        auto of_tiles = [&](int back) {
#pragma unroll
            for (int t = 0; t < 2; t++) {
                const int tile = (done + tiles - back - t) % tiles * TILE;
                k[t] = base + form::k + tile;
                v[t] = base + form::v + tile;
            }
        };
        of_tiles(0);
        if (UNLIKELY(c == 0 && p.first == 0)) {
            exact_tiles<true, 1, 0, false, form::together>(&r, x, k, v, exact, {}, a, w_tile);
        } else if (!UNLIKELY(p.first > 0)) {
            const int phase = c % (form::odd ? form::back : form::of_block);
            /* Window 96: how many chunks the first half's block begins before this one; the block
             * that it sees beside, half a chunk before, or half behind, a whole one. */
            const bool even = form::odd && phase <= form::of_block;
            const int before = min(c, phase + (!form::odd ? form::of_block
                                               : even     ? form::of_block + 1
                                                          : 0));
            exact_tiles<true, 2, from, false, form::together>(&r, x, k, v, exact, {}, a, w_tile);
#pragma unroll 1
            for (int t = 2; t <= form::back; t++) {
                if (t > before) break;
                of_tiles(t);
                struct tile_mask masked;
                masked.high = form::odd && phase == form::of_block && t > phase && warp >= 2;
                masked.low = masked.high || (even && t == phase + form::of_block + 1);
                exact_tiles<false, 1, 0, form::odd>(&r, x, k, v, exact, masked);
            }
        }
        if (!form::together || UNLIKELY(p.first > 0)) products(a, x, w_tile);
        float half[2] = {0, 0};
        uint32_t weight[4][4];
#pragma unroll
        for (int kk = 0; kk < 4; kk++)
#pragma unroll
            for (int i = 0; i < 4; i++) half[i & 1] += sum_squares(x[kk][i]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            half[i] = 0.5f * exact * quad_sum(half[i]);
            if (half[i] > SRF__HALF_LIMIT) half[i] = SRF__HALF_LIMIT;
        }
        barrier_wait(smem_addr(&sm->full[slot]), done / slots & 1);
        int own = slot; /* of the state that this warp's rows see */
        bool two = false;
        if (form::odd) {
            const int second = sm->second[slot];
            two = second >= 0;
            if (UNLIKELY(two)) {
                barrier_wait(smem_addr(&sm->full[form::states - 1]), second & 1);
                if (warp >= 2) own = form::states - 1;
            }
        }
        const uint32_t s_tile = base + form::s + slot * TILE;
        if (!UNLIKELY(!form::far(c))) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float2 shift = *(const float2 *)(sm->top[own] + 8 * j + 2 * pair);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    a[4 * j + e] =
                        fmaf(a[4 * j + e], to_log2, (e & 1 ? shift.y : shift.x) - half[e >> 1]);
            }
            row_weights<false, 1, 0>(&weight, &a, &r);
            if (form::odd && UNLIKELY(two)) {
                uint32_t part[2][4][4];
#pragma unroll
                for (int e = 0; e < 32; e++)
                    part[e / 16][e / 4 % 4][e % 4] =
                        e / 16 == (warp >= 2) ? weight[e / 4 % 4][e % 4] : 0;
                warpgroup_fence();
                mix(&r.num[0][0], part[0], s_tile, true);
                mix(&r.num[0][0], part[1], base + form::s + (form::states - 1) * TILE, true);
            } else {
                warpgroup_fence();
                if (W < CHUNK) {
                    mix(a, weight, base + form::kf + slot * TILE, false);
                    warpgroup_commit();
                }
                mix(&r.num[0][0], weight, s_tile, true);
            }
            warpgroup_commit();
            add_z(r.den, weight, sm->z[own], lane);
            if (W < CHUNK) {
                /* Chunk c - 1 but for what was seen exactly. */
                uint32_t seen[4][4];
                warpgroup_wait<1>();
                wgmma_hold(a);
#pragma unroll
                for (int j = 0; j < 8; j++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        seen[j >> 1][(j & 1) * 2 + i] =
                            j >= 4 && warp < 2 ? 0
                                               : pack_bf16(a[4 * j + 2 * i], a[4 * j + 2 * i + 1]);
                warpgroup_wait<0>();
                wgmma_hold(&r.num[0][0]);
                warpgroup_fence();
                mix(&r.num[0][0], seen, v[1], true);
                warpgroup_commit();
                add_ones(r.den, seen, lane);
            }
            warpgroup_wait<0>();
            wgmma_hold(&r.num[0][0]);
        }
        /* Rows go out through the tile of S, which all are done with. */
        group_barrier(id);
        if (UNLIKELY(p.num != NULL))
            give_rows<true>(p, rows, head, r.num, r.den, r.most, s_tile, warp, lo, hi, lane);
        else
            give_rows<false>(p, rows, head, r.num, r.den, r.most, s_tile, warp, lo, hi, lane);
        barrier_arrive(smem_addr(&sm->empty[slot]));
        if (form::odd && UNLIKELY(two)) barrier_arrive(smem_addr(&sm->empty[form::states - 1]));
    }
}

template <int window_, int slots_, int ahead_>
template <bool totals>
__device__ __forceinline__ void
window_form<window_, slots_, ahead_>::run(const struct prefill &p, const struct prefill_maps &m,
                                          int64_t items, uint32_t base, small_parts *sm, int group)
{
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4; i++) barrier_init(smem_addr(&sm->loads[i]), GROUP);
        for (int i = 0; i < 8; i++) barrier_init(smem_addr(&sm->keys[i]), GROUP);
        for (int i = 0; i < states; i++) {
            barrier_init(smem_addr(&sm->full[i]), GROUP);
            barrier_init(smem_addr(&sm->empty[i]), GROUP);
        }
        barrier_init_done();
    }
    __syncthreads();
    if (totals || group == 0) {
        if (!totals) asm volatile("setmaxnreg.inc.sync.aligned.u32 184;");
        keys_role<window_form, totals>(p, m, items, base, sm);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 160;");
        queries_role<window_form>(p, items, base, sm, group - 1);
    }
}
#endif

static __global__ void ring_kernel(const __grid_constant__ struct prefill p)
{
    write_ring(p, work_of(p, blockIdx.x, 0), threadIdx.x, blockDim.x);
}

/* ---- launches -------------------------------------------------------------------------------- */

template <bool totals>
static srf_status launch(struct srf_ctx *ctx, const struct prefill *p, const struct prefill_maps *m)
{
    switch (p->window) {
    case 32:
        return prefill_launch<window_form<32, 3>, totals>(ctx, p, m);
    case 64:
        return prefill_launch<window_form<64, 4>, totals>(ctx, p, m);
    case 96:
        return prefill_launch<window_form<96, 3>, totals>(ctx, p, m);
    case 128:
        return prefill_launch<window_form<128, 3>, totals>(ctx, p, m);
    case 160:
        return prefill_launch<window_form<160, 2>, totals>(ctx, p, m);
    case 192:
        return prefill_launch<window_form<192, 2>, totals>(ctx, p, m);
    case 224:
        return prefill_launch<window_form<224, 1, 1>, totals>(ctx, p, m);
    default:
        return prefill_launch<window_form<256, 1>, totals>(ctx, p, m);
    }
}

srf_status srf__prefill_window_totals(struct srf_ctx *ctx, const struct prefill *p,
                                      const struct prefill_maps *m)
{
    return launch<true>(ctx, p, m);
}

srf_status srf__prefill_window(struct srf_ctx *ctx, const struct prefill *p,
                               const struct prefill_maps *m)
{
    SRF_TRY(launch<false>(ctx, p, m));
    if (p->n_seg == 1 || p->first + p->count < p->m) return SRF_OK;
    ring_kernel<<<(unsigned)p->heads, 256, 0, stream_of(ctx)>>>(*p);
    return srf__cuda_launched("srf_attn_prefill");
}
