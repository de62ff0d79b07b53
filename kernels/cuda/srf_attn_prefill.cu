/* Prefill of SRF attention on Hopper's tensor cores, bf16, d = 64: the pure form, and the launches
 * of both. Of the window hybrid (srf_attn_prefill_window.cu) what is said here of blocks,
 * segments and states is true as well.
 *
 * The forms are those of srf_attn_pure.cu: chunks of 64 tokens, S, z, M before them, everything in
 * log2 units, M_i an integer. A block of threads, one a multiprocessor, has a head of one sequence,
 * or a part of it, and four warpgroups that work on different chunks:
 *     keys     a = W K^T, kf = 2^(a - M); z; gives kf, z, M to the others through shared memory,
 *              two buffers for each warpgroup of queries
 *     sums     loads k, v; gives S (bf16) to the queries; S += kf V, in registers
 *     queries  two, every other chunk: loads q; a = Q W^T, qf = 2^(a + M - r); P = qf kf^T below
 *              the diagonal; o = (qf S + P V) / (qf z + sum P)
 * As in training (srf_attn_pure_wgmma.h) M is put above the exponents and stays, and r is one
 * number for a chunk, while no weights are too large or too small. W's products with a chunk are
 * begun at the end of the one before. |k|^2 is made by the queries, who wait most, at the end of
 * their chunk, for the one four on.
 * All products are wgmma: a warpgroup reads B once for 64 rows. Only keys and sums have to go in
 * order, and a chunk is with each of them no longer than it must.
 *
 * The keys know before a chunk is given out whether some token of it might see next to nothing: a
 * feature's M after the chunk is more than SPREAD above both its M before and its exponent of the
 * chunk's first key. (Else z of the state or of that key is at least 2^-(SPREAD + 1) in every
 * feature, and so are all denominators.) Such a chunk is given out in pieces of half the size; a
 * token alone always sees itself. So what is in registers never has to go back.
 *
 * Sequences of several lengths: a block finds its rows in `offsets`, and where there are none it
 * ends. Few heads: segments, their keys' own sums by a first launch, the states before each by a
 * second. More heads than multiprocessors: turns (plan_turns). A block takes a turn of a head, then
 * of another; what a head's turn leaves, registers as they are, the next one waits for, which comes
 * later in the order that all blocks go by: so none waits for one that has not begun.
 *
 * More than 64 features: launches for 64 at a time, which keep (num, den, r) of each token in the
 * workspace.
 *
 * What is seldom done takes as little code on a chunk's way as can be, a piece of a chunk goes the
 * way of a whole one: behind a jump over some 50 instructions the next ones are not there yet, and
 * a warpgroup, one warp on each scheduler, has nobody to work meanwhile.
 *
 * Floor: q, k, v read and o written once, 8 bytes a value: 192 heads x 1024 tokens 101 MB, 0.034 ms
 * on an H100 (3 TB/s).
 */
#include "kernels/cuda/srf_attn_prefill_tiles.h"

/* What the keys give out to a warpgroup of queries, beside tiles: two of it, in turns. */
struct prefill_given {
    /* z as a sum of two: rows of 64 bf16, a piece apart from what banks repeat by. */
    uint16_t z[2][2][72];
    float top[2][64];  /* bias + M - level */
    float step[2][64]; /* 2^(M before - M), for the sums */
    float level[2];    /* what r is relative to */
    int piece[2];      /* rows lo + 256 hi of a chunk */
    /* All of it is there; weights alone are; nobody needs it any more. */
    uint64_t full[2], weights[2], empty[2];
};
/* A chunk's queries: the first row, the head, how many (0: there are no more). */
struct __align__(16) prefill_rows
{
    int row, head, n, unused;
};
/* Behind the tiles. */
struct prefill_small {
    struct prefill_given given[2];
    /* Of chunks c % 16: those of the first two may be read long after they were given. */
    struct prefill_rows rows[16];
    uint32_t none[4];    /* zeros */
    float half[4][64];   /* log2(e) |y|^2 / 2 of the keys of chunks c % 4 */
    float piece[64];     /* the same of a piece of a chunk, infinite outside it */
    float level[4];      /* of chunks c % 4 */
    uint64_t loads[5];   /* keys number i % 5 have come */
    uint64_t values[4];  /* values number i % 4 have */
    uint64_t keys[4];    /* keys, and their norms, are as they are used */
    uint64_t queries[2]; /* a warpgroup's queries of the next chunk have come */
    uint64_t begun;      /* rows of the first five chunks are known */
};

/* Shared memory, from a multiple of 1024. V of chunks that queries may still want (three behind the
 * sums' own), and of four ahead; K of five: three with the keys, two on their way. */
template <bool parts> struct pure_form {
    using small_parts = struct prefill_small;
    static constexpr int groups = 4, key_groups = 2; /* keys, sums, two of queries */
    static constexpr int k_tiles = 5, v_tiles = 8;
    static constexpr int k = 0, v = k + k_tiles * TILE, q = v + v_tiles * TILE;
    static constexpr int w = q + 2 * TILE, out = w + 2 * TILE;   /* q, w, out: of queries, (2) */
    static constexpr int kf = out + 2 * TILE, s = kf + 4 * TILE; /* to queries: (2, 2) */
    static constexpr int small = s + 4 * TILE;

    template <bool totals>
    static __device__ void run(const struct prefill &p, const struct prefill_maps &m, int64_t items,
                               uint32_t base, struct prefill_small *sm, int group);
};

#if HAVE_WGMMA
static __device__ __forceinline__ bool group_any(int id, bool x)
{
    return __any_sync(0xffffffffu, meet_or(id, GROUP, x));
}
/* This thread of a warpgroup has filled, or emptied, what is given out as number i. All arrive: a
 * checker of races does not see what a warp's barrier orders. */
static __device__ __forceinline__ void arrive(uint64_t barrier[2], int i)
{
    barrier_arrive(smem_addr(&barrier[i & 1]));
}
static __device__ __forceinline__ void wait_for(uint64_t barrier[2], int i)
{
    barrier_wait(smem_addr(&barrier[i & 1]), i >> 1 & 1);
}
/* Before number i is filled: what was there two before has been emptied. */
static __device__ __forceinline__ void wait_empty(struct prefill_given *given, int i)
{
    if (i >= 2) barrier_wait(smem_addr(&given->empty[i & 1]), (i >> 1 & 1) ^ 1);
}
/* Barriers, by all threads of the block; arrivals of warpgroups. */
static __device__ __forceinline__ void start_barriers(struct prefill_small *sm, int full, int empty)
{
    if (threadIdx.x < 4) sm->none[threadIdx.x] = 0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4; i++) {
            struct prefill_given *given = &sm->given[i >> 1];
            barrier_init(smem_addr(&given->full[i & 1]), full * GROUP);
            barrier_init(smem_addr(&given->weights[i & 1]), GROUP);
            barrier_init(smem_addr(&given->empty[i & 1]), empty * GROUP);
            barrier_init(smem_addr(&sm->values[i]), GROUP);
            barrier_init(smem_addr(&sm->keys[i]), GROUP);
        }
        for (int i = 0; i < 5; i++) barrier_init(smem_addr(&sm->loads[i]), GROUP);
        for (int i = 0; i < 2; i++) barrier_init(smem_addr(&sm->queries[i]), 1);
        barrier_init(smem_addr(&sm->begun), GROUP);
        barrier_init_done();
    }
    __syncthreads();
}
/* a = X Y^T, X packed, Y a tile's rows: of its own, as begin_scores. */
static __device__ __forceinline__ void begin_products(float (&a)[8][4], const uint32_t x[4][4],
                                                      uint32_t tile)
{
    warpgroup_fence();
#pragma unroll
    for (int kk = 0; kk < 4; kk++) wgmma_64<false>(&a[0][0], x[kk], tile_by(tile, 2 * kk), kk > 0);
    warpgroup_commit();
}

/* The warpgroup of keys. A chunk's product with W is begun while what comes of the chunk before is
 * given out; what a turn's last chunk so begins is not used. */
template <bool totals>
static __device__ __forceinline__ void keys_role(const struct prefill &p, int64_t items,
                                                 uint32_t base, struct prefill_small *sm)
{
    using at = pure_form<false>;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, pair = lane & 3;
    const int f0 = 16 * warp + (lane >> 2), segs = p.n_seg - totals;
    const float to_log2 = SRF__LOG2E * p.scale;
    struct prefill_place now = {};
    now.item = blockIdx.x;
    auto k_tile = [&](int i) { return base + at::k + i % at::k_tiles * TILE; };
    auto wait_keys = [&](int i) { barrier_wait(smem_addr(&sm->keys[i & 3]), i >> 2 & 1); };
    int i = 0, item[2] = {0, 0}; /* chunks before this one; of what has been given out */
    for (; find_place(p, &now, items, segs); now.item += gridDim.x) {
        int turn;
        const struct work w = turn_of(p, now.item, items, segs, &turn);
        struct key_features f;
        struct pure_state<D> st;
        float a[8][4];
        read_features(&f, p, w, f0, pair);
        float late[2][4] = {}; /* to z, of the piece before: no need to wait for it */
        begin_turn<TOPS, totals>(&st, p, w, turn, 2, f0, tid, 1);
        float less[2] = {st.top[0] - f.bias[0], st.top[1] - f.bias[1]}; /* M - bias */
        if (!totals) {
            if (tid == 0) sm->level[i & 3] = sm->level[(i + 1) & 3] = level_of(st.top[0]);
            group_barrier(1);
        }
        wait_keys(i);
        products(&a[0][0], f.w, k_tile(i));
        for (; now.c < now.end; now.c++, i++) {
            const int n = min(CHUNK, now.stop - now.c * CHUNK), to = i & 1;
            struct prefill_given *given = &sm->given[to];
            for (int lo = 0, size = CHUNK; lo < n;) {
                struct chunk_keys keys = {{st.top[0], st.top[1]}, {1.0f, 1.0f}, {less[0], less[1]}};
                uint32_t kf[4][4], most[2];
                float2 sub[8];
                const float *half = sm->half[i & 3];
                if (UNLIKELY(size < CHUNK)) {
                    group_barrier(1); /* all are done with the piece before */
                    if (tid < CHUNK)
                        sm->piece[tid] = tid >= lo && tid < lo + size ? half[tid] : INFINITY;
                    group_barrier(1);
                    half = sm->piece;
                    products(&a[0][0], f.w, k_tile(i));
                }
                key_halves(sub, half, pair);
                /* Of what was known two chunks before, so that all threads know. */
                const float level = totals ? 0.0f : sm->level[i & 3];
#pragma unroll
                for (int e = 0; e < 2; e++) st.z[e] += late[0][2 * e] + late[1][2 * e];
                bool fits = true;
                if (UNLIKELY(!standing_weights(kf, most, a, sub, less, to_log2) || size < CHUNK)) {
                    float first[2] = {a[0][0], a[0][2]};
                    if (size < CHUNK) take_piece(first, a, half, lo, pair);
                    key_exponents(a, sub, to_log2);
                    key_tops(&keys, st.top, a, f.bias, HEADROOM);
                    fits = keys_fit(&keys, st.top, first, half, to_log2, f.bias, lo, lane);
                    chunk_weights(kf, &keys, a);
                }
                add_ones(late, kf, false, lane);
                if (!totals && UNLIKELY(group_any(1, !fits && size > 1))) {
                    size >>= 1;
                    late[0][0] = late[1][0] = late[0][2] = late[1][2] = 0;
                    continue;
                }
                const int number = to ? item[1]++ : item[0]++, buffer = number & 1;
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    st.z[e] *= keys.step[e];
                    st.top[e] = keys.top[e];
                    less[e] = keys.less[e];
                }
                if (now.c + 1 < now.end && lo + size >= n) wait_keys(i + 1);
                begin_products(a, f.w, k_tile(i + 1));
                wait_empty(given, number);
                put_rows(base + at::kf + (2 * to + buffer) * TILE, kf, warp, lane);
                if (pair == 0) {
                    const uint32_t z = pack_bf16(st.z[0], st.z[1]);
                    const float2 z_most = unpack_bf16(z);
                    const uint32_t rest = pack_bf16(st.z[0] - z_most.x, st.z[1] - z_most.y);
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        given->step[buffer][f0 + 8 * e] = keys.step[e];
                        if (totals) continue;
                        given->top[buffer][f0 + 8 * e] = f.bias[e] + (st.top[e] - level);
                        given->z[buffer][0][f0 + 8 * e] = (uint16_t)(z >> 16 * e);
                        given->z[buffer][1][f0 + 8 * e] = (uint16_t)(rest >> 16 * e);
                    }
                    if (tid == 0) {
                        given->piece[buffer] = lo + 256 * min(lo + size, n);
                        given->level[buffer] = level;
                        sm->level[(i + 2) & 3] = level_of(st.top[0]);
                    }
                }
                async_fence();
                arrive(given->weights, number);
                if (!totals) arrive(given->full, number);
                warpgroup_wait<0>();
                wgmma_hold(&a[0][0]);
                lo += size;
                size = lo < CHUNK ? lo & -lo : size;
            }
        }
        st.z[0] += late[0][0] + late[1][0], st.z[1] += late[0][2] + late[1][2];
        end_turn<TOPS, totals>(&st, p, w, now.end == w.end, f0, tid, 1);
    }
}

/* Zeros in those of a warp's 16 rows that are row n or behind it (clear_rows). */
static __device__ __forceinline__ void clear_tile(uint32_t tile, int n, int warp, int lane)
{
    for (int row = max(n, 16 * warp) * 32 + lane; row < (16 * warp + 16) * 32; row += 32)
        store_shared(tile + 4 * row, 0);
    __syncwarp();
}

/* |k|^2 of chunk number i of the block's way, for the keys; by a warpgroup. */
static __device__ __forceinline__ void make_norms(const struct prefill &p, uint32_t base,
                                                  struct prefill_small *sm, int i, int warp,
                                                  int lane)
{
    using at = pure_form<false>;
    const struct key_scales by = key_scales_of(p.scale, p.limit);
    const int slot = i % at::k_tiles;
    const uint32_t k_tile = base + at::k + slot * TILE;
    barrier_wait(smem_addr(&sm->loads[slot]), i / at::k_tiles & 1);
    const int n = sm->rows[i & 15].n;
    const bool tail = n < CHUNK;
    if (UNLIKELY(tail)) clear_tile(k_tile, n, warp, lane);
    if (UNLIKELY(diagonal_norms(k_tile, sm->half[i & 3], by, 0, n, warp, lane) || tail))
        async_fence();
    barrier_arrive(smem_addr(&sm->keys[i & 3]));
}

/* The warpgroup of sums, which loads keys and values too. */
template <bool totals>
static __device__ __forceinline__ void sums_role(const struct prefill &p,
                                                 const struct prefill_maps &m, int64_t items,
                                                 uint32_t base, struct prefill_small *sm)
{
    using at = pure_form<false>;
    const int tid = threadIdx.x - GROUP, lane = tid & 31, warp = tid >> 5;
    const int f0 = 16 * warp + (lane >> 2), segs = p.n_seg - totals;
    struct prefill_place now = {}, ahead;
    now.item = blockIdx.x;
    ahead = now;
    bool more = find_place(p, &ahead, items, segs);
    int loads = 0, normed = 0;
    struct prefill_rows next = {}; /* of the chunk whose values come next */
    /* Of the chunk number i of the block's way keys, of the one before values. Each call of the
     * copy engine costs its thread some 300 cycles: they are of different warps. */
    auto load_next = [&](int i) {
        if (next.n > 0) {
            const uint32_t bar = smem_addr(&sm->values[(i - 1) & 3]);
            if (tid == 32) {
                barrier_expect(bar, TILE);
                bulk_tile(base + at::v + (i - 1) % at::v_tiles * TILE, &m.v, next.head * D,
                          next.row, 0, bar);
            } else {
                barrier_arrive(bar);
            }
        }
        next = {};
        if (more) {
            const uint32_t bar = smem_addr(&sm->loads[i % at::k_tiles]);
            next = {(int)ahead.row + ahead.c * CHUNK, ahead.head,
                    min(CHUNK, ahead.stop - ahead.c * CHUNK), 0};
            if (tid == 0) {
                barrier_expect(bar, TILE);
                bulk_tile(base + at::k + i % at::k_tiles * TILE, &m.k, next.head * D, next.row, 0,
                          bar);
            } else {
                if (tid == 64) sm->rows[i & 15] = next;
                barrier_arrive(bar);
            }
            more = next_place(p, &ahead, items, segs);
            loads++;
        } else if (tid == 64) {
            sm->rows[i & 15].n = 0;
        }
    };
    auto give_keys = [&] {
        if (totals && normed < loads) make_norms(p, base, sm, normed++, warp, lane);
    };
#pragma unroll 1
    for (int i = 0; i < 5; i++) {
        load_next(i);
        if (i == 4) barrier_arrive(smem_addr(&sm->begun));
        if (i >= 3) give_keys();
    }

    int i = 0, item[2] = {0, 0};
    for (; find_place(p, &now, items, segs); now.item += gridDim.x) {
        int turn;
        const struct work w = turn_of(p, now.item, items, segs, &turn);
        struct pure_state<D> st;
        begin_turn<SUMS, totals>(&st, p, w, turn, 2, f0, tid, 4);
        for (; now.c < now.end; now.c++, i++) {
            const int rows = min(CHUNK, now.stop - now.c * CHUNK), to = i & 1;
            const uint32_t v_tile = base + at::v + i % at::v_tiles * TILE;
            struct prefill_given *given = &sm->given[to];
            give_keys();
            barrier_wait(smem_addr(&sm->values[i & 3]), i >> 2 & 1);
            if (UNLIKELY(rows < CHUNK)) {
                clear_tile(v_tile, rows, warp, lane);
                async_fence();
                group_barrier(4);
            }
            for (int hi = 0; hi < rows;) {
                const int number = to ? item[1]++ : item[0]++, buffer = number & 1;
                const int tile = (2 * to + buffer) * TILE;
                wait_for(given->weights, number);
                hi = given->piece[buffer] >> 8;
                const float step[2] = {given->step[buffer][f0], given->step[buffer][f0 + 8]};
                scale_sums(&st, step);
                if (!totals) {
                    uint32_t x[4][4];
                    pack_rows(x, st.s);
                    put_rows(base + at::s + tile, x, warp, lane);
                    async_fence();
                    arrive(given->full, number);
                }
                begin_sums(st.s, base + at::kf + tile, v_tile);
                /* The keys are done with this chunk's tile; queries are at most three behind. */
                if (hi >= rows) load_next(i + 5);
                warpgroup_wait<0>();
                wgmma_hold(&st.s[0][0]);
                arrive(given->empty, number);
            }
        }
        end_turn<SUMS, totals>(&st, p, w, now.end == w.end, f0, tid, 4);
    }
}

/* a = this warp's queries, n of a chunk's from row `first` on, times W: once more, with all that is
 * large clamped. tile: of one warpgroup. */
static __device__ __forceinline__ void own_products(float (&a)[8][4], const struct prefill &p,
                                                    const struct prefill_rows &rows, uint32_t tile,
                                                    uint32_t w_tile, int warp, int lane)
{
    const bf16 *from = p.q + rows.row * p.ld + rows.head * D + (lane & 7) * 8;
    for (int r = 16 * warp + (lane >> 3); r < 16 * warp + 16; r += 4) {
        uint4 x = make_uint4(0, 0, 0, 0);
        if (r < rows.n) x = *(const uint4 *)(from + r * p.ld);
        asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(tile + tile_at<D>(r, lane & 7)),
                     "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                     : "memory");
    }
    __syncwarp();
    token_products<D>(a, tile, w_tile, p.limit, warp, 0, lane);
    __syncwarp();
}

/* One of two warpgroups of queries, for every other chunk. parts: these are not all features.
 * Queries are multiplied with W at the end of the chunk before. */
template <bool parts>
static __device__ __forceinline__ void queries_role(const struct prefill &p,
                                                    const struct prefill_maps &m, uint32_t base,
                                                    struct prefill_small *sm, int group)
{
    using at = pure_form<false>;
    const int tid = threadIdx.x & (GROUP - 1), lane = tid & 31, warp = tid >> 5, pair = lane & 3;
    const int id = 2 + group, row = 16 * warp + (lane >> 2);
    const uint32_t diagonal = lower_mask(lane >> 2, pair);
    const float to_log2 = SRF__LOG2E * p.scale;
    const uint32_t w_tile = base + at::w + group * TILE, out_tile = base + at::out + group * TILE;
    const uint32_t q_tile = base + at::q + group * TILE, loaded = smem_addr(&sm->queries[group]);
    struct prefill_given *given = &sm->given[group];
    struct prefill_rows rows;
    float aq[8][4];
    int features = -1;
    /* Of this warpgroup's chunk number i, of whose rows is known: four of all chunks ahead of the
     * one that is given out. All are done with what was there. */
    auto load_queries = [&](int i) {
        const struct prefill_rows *next = &sm->rows[(2 * i + group) & 15];
        if (tid == 0 && next->n > 0) {
            barrier_expect(loaded, TILE);
            bulk_tile(q_tile, &m.q, next->head * D, next->row, 0, loaded);
        }
    };
    /* The next chunk's rows; queries are there then, as is W. */
    auto next_rows = [&](int i) {
        rows = sm->rows[(2 * i + group) & 15];
        if (rows.n > 0) {
            barrier_wait(loaded, i & 1);
            if (UNLIKELY((int)features_of(p, rows.head) != features)) {
                features = (int)features_of(p, rows.head);
                group_barrier(id); /* all are done with the old ones */
                load_tile<D, GROUP>(w_tile, p.w + (int64_t)features * D, D, 64, p.count, tid);
                cp_async_commit();
                cp_async_wait<0>();
                async_fence();
                group_barrier(id);
            }
        }
    };
    auto give_keys = [&](int i) {
        if (sm->rows[i & 15].n > 0) make_norms(p, base, sm, i, warp, lane);
    };
    barrier_wait(smem_addr(&sm->begun), 0);
    load_queries(0);
    give_keys(group);
    give_keys(group + 2);
    next_rows(0);
    begin_scores(aq, q_tile, w_tile);
    warpgroup_wait<0>();
    wgmma_hold(&aq[0][0]);
    group_barrier(id);
    load_queries(1);
    for (int i = 0, item = 0; rows.n > 0; i++) {
        const struct prefill_rows now = rows;
        const uint32_t v_tile = base + at::v + (2 * i + group) % at::v_tiles * TILE;
        if (UNLIKELY(now.n < CHUNK)) { /* whatever lies behind a sequence */
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (row + 8 * (e >> 1) >= now.n) aq[j][e] = 0;
        }
        for (int hi = 0; hi < now.n; item++) {
            const int buffer = item & 1;
            const uint32_t tile = (2 * group + buffer) * TILE;
            float a[8][4], num[8][4], den[2][4], r[2] = {0, 0};
            uint32_t x[4][4], z[8];
            float2 shift[8];
            const bool again = hi > 0; /* aq is no longer what it was */
            wait_for(given->full, item);
            query_shifts(shift, given->top[buffer], pair);
            const int lo = given->piece[buffer] & 255;
            hi = given->piece[buffer] >> 8;
            const bool two = (lane & 7) < 2;
            /* Columns 0 and 1 of a product are the two parts of z, others 0. */
            const uint32_t z_lane =
                smem_addr(two ? (void *)&given->z[buffer][lane & 1][(lane >> 3) * 8] : sm->none);
            ldmatrix_x4(z, z_lane);
            ldmatrix_x4(z + 4, z_lane + (two ? 64 : 0));
            level_weights(x, aq, shift, to_log2);
            if (UNLIKELY(again || !on_level(x))) {
                query_tops(r, aq, shift, to_log2);
                const bool fine = fabsf(r[0]) < SRF__X_LIMIT && fabsf(r[1]) < SRF__X_LIMIT;
                if (again || __any_sync(0xffffffffu, !fine)) {
                    own_products(aq, p, now, out_tile, w_tile, warp, lane);
                    query_tops(r, aq, shift, to_log2);
                }
                query_weights(x, aq, r);
            }
#pragma unroll
            for (int kk = 0; kk < 4; kk++)
                mma_add(den[kk & 1], x[kk], z[2 * kk], z[2 * kk + 1], kk > 1);
            begin_mix(a, x, base + at::kf + tile, false);
            begin_mix(num, x, base + at::s + tile, false);
            warpgroup_wait<1>();
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
            begin_mix(num, x, v_tile, true);
            const bool last = hi >= now.n;
            if (last) next_rows(i + 1);
            begin_scores(aq, q_tile, w_tile);
            float sums[4] = {den[0][0] + den[1][0], den[0][1] + den[1][1], den[0][2] + den[1][2],
                             den[0][3] + den[1][3]};
            const float den_row[2] = {__shfl_sync(0xffffffffu, sums[0] + sums[1], lane & ~3),
                                      __shfl_sync(0xffffffffu, sums[2] + sums[3], lane & ~3)};
            const float by[2] = {reciprocal(den_row[0]), reciprocal(den_row[1])};
            if (parts) r[0] += given->level[buffer], r[1] += given->level[buffer];
            warpgroup_wait<1>();
            wgmma_hold(&num[0][0]);
            arrive(given->empty, item);
            if (parts) {
                give_rows<true>(p, now.row, now.head, num, sums, r, out_tile, warp, lo, hi, lane);
            } else {
                bf16 *to = p.o + (int64_t)(now.row + 16 * warp) * p.ld_o + now.head * D;
                scale_rows(num, by[0], by[1]);
                pack_rows(x, num);
                if (UNLIKELY(hi - lo < CHUNK)) {
                    to += (lane >> 2) * p.ld_o + 2 * pair;
#pragma unroll
                    for (int e = 0; e < 2; e++)
#pragma unroll
                        for (int j = 0; j < 8; j++)
                            if (row + 8 * e >= lo && row + 8 * e < hi)
                                *(uint32_t *)(to + 8 * e * p.ld_o + 8 * j) =
                                    x[j >> 1][(j & 1) * 2 + e];
                } else {
                    const uint32_t from = out_tile + warp * 2048 + tile_at<D>(lane >> 3, lane & 7);
                    to += (lane >> 3) * p.ld_o + (lane & 7) * 8;
                    put_rows(out_tile, x, warp, lane);
                    __syncwarp();
#pragma unroll
                    for (int e = 0; e < 4; e++, to += 4 * p.ld_o) {
                        const uint4 y = load_shared_16((from ^ (e & 1) * 64) + e * 512);
                        /* As store_global_16: that call would change the schedule. */
                        asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(y.x),
                                     "r"(y.y), "r"(y.z), "r"(y.w)
                                     : "memory");
                    }
                    __syncwarp();
                }
            }
            warpgroup_wait<0>();
            wgmma_hold(&aq[0][0]);
            if (last) {
                group_barrier(id);
                load_queries(i + 2);
                give_keys(2 * i + group + 4);
            }
        }
    }
}

template <bool parts>
template <bool totals>
__device__ __forceinline__ void
pure_form<parts>::run(const struct prefill &p, const struct prefill_maps &m, int64_t items,
                      uint32_t base, struct prefill_small *sm, int group)
{
    start_barriers(sm, 2, totals ? 1 : 2);
    group = __shfl_sync(0xffffffffu, group, 0); /* known to be uniform */
    if (group == 0) {
        keys_role<totals>(p, items, base, sm);
    } else if (totals || group == 1) {
        if (!totals) asm volatile("setmaxnreg.dec.sync.aligned.u32 96;");
        sums_role<totals>(p, m, items, base, sm);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 144;");
        queries_role<parts>(p, m, base, sm, group - 2);
    }
}
#endif

/* The states before each segment: the caller's, and the segments before. One thread a feature and
 * column of S or z. */
static __global__ void prefix_kernel(const __grid_constant__ struct prefill p, int64_t n)
{
    constexpr int per_head = 64 * (D + 1), count = 64 * (D + 3), at_once = 8;
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int j = (int)(i % per_head), f = j < 64 * D ? j / D : j - 64 * D;
    const struct work w = work_of(p, i / per_head, 0);
    float *sums = segment_state(p, w), sum = 0, top = SRF__UNSET;
    const float *z = state_z(p, w.slot, p.first + (f < p.count ? f : 0));
    if (f < p.count && *z != 0.0f) {
        const char *s = state_row(p, w.slot, p.first + f);
        top = z[p.m];
        sum = j >= 64 * D    ? *z
              : p.state_bf16 ? to_float(((const bf16 *)s)[j % D])
                             : ((const float *)s)[j % D];
    }
    for (int from = 0; from < w.n_segs; from += at_once) {
        /* Loads first. */
        float add[at_once], add_top[at_once];
#pragma unroll
        for (int k = 0; k < at_once; k++) {
            const bool there = from + k < w.n_segs - 1;
            const float *st = sums + (there ? from + k : 0) * count;
            add[k] = there ? st[j] : 0.0f;
            add_top[k] = there ? st[64 * (D + 1) + f] : SRF__UNSET;
        }
#pragma unroll
        for (int k = 0; k < at_once; k++) {
            if (from + k >= w.n_segs) break;
            float *st = sums + (from + k) * count, with = fmaxf(top, add_top[k]);
            st[j] = sum;
            if (j >= 64 * D) st[64 * (D + 2) + f] = top;
            sum = sum * exp2_fast(top - with) + add[k] * exp2_fast(add_top[k] - with);
            top = with;
        }
    }
}

/* ---- launches -------------------------------------------------------------------------------- */

static bool compiled(void)
{
    struct cudaFuncAttributes f;
    return cudaFuncGetAttributes(&f, (const void *)prefill_kernel<pure_form<false>, false>) ==
               cudaSuccess &&
           f.maxThreadsPerBlock == pure_form<false>::groups * GROUP;
}

bool srf__prefill_takes(const struct srf_ctx *ctx, const struct srf_srf_attn_prefill_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    uintptr_t pointers = (uintptr_t)a->q | (uintptr_t)a->k | (uintptr_t)a->v | (uintptr_t)a->w |
                         (uintptr_t)a->o | (uintptr_t)a->state;
    bool shape = srf_attn_prefill_fast(s->d, s->m, s->window);
    /* rows, heads and chunks of all heads are counted in 32 bits */
    bool small = s->b * s->t <= 1 << 30 && s->b * s->h <= 1 << 20 &&
                 s->b * s->h * (div_up(s->t, CHUNK) + 1) <= INT32_MAX;
    return ctx->dtype == SRF_BF16 && shape && small && a->ld % 8 == 0 && a->ld_o % 8 == 0 &&
           pointers % 16 == 0 && cuda_of(ctx)->cc == 90 && compiled();
}

/* Turns such that blocks, one a multiprocessor, end at about the same time; a turn begins with what
 * takes as long as two chunks. */
static void plan_turns(struct prefill *p, int64_t blocks)
{
    int64_t chunks = p->seg_chunks, least = 0;
    p->n_turns = 1;
    p->turn_chunks = p->seg_chunks;
    if (p->heads * p->n_seg <= blocks) return;
    for (int64_t size = chunks; size > 1; size--) {
        int64_t turns = div_up(chunks, size), rounds = div_up(p->heads * turns, blocks);
        if (size < chunks && rounds * (size + 2) >= least) continue;
        least = rounds * (size + 2);
        p->n_turns = (int)turns;
        p->turn_chunks = (int)size;
    }
}

/* Segments only where heads leave half the card idle, and of some length. */
static struct prefill plan(const struct srf_ctx *ctx, const struct srf_attn_shape *s)
{
    struct prefill p = {};
    int64_t heads = s->b * s->h, chunks = div_up(s->t + (s->window ? CHUNK - 1 : 0), CHUNK);
    int64_t n_sm = cuda_of(ctx)->n_sm, n_seg = n_sm / (heads ? heads : 1);
    n_seg = n_seg > chunks / 4 ? chunks / 4 : n_seg;
    n_seg = n_seg < 2 ? 1 : n_seg;
    p.seg_chunks = (int)(chunks > 0 ? div_up(chunks, n_seg) : 1);
    p.n_seg = (int)div_up(chunks, p.seg_chunks);
    p.heads = heads;
    p.t = (int)s->t;
    p.h = (int)s->h;
    p.m = (int)s->m;
    p.n_sets = (int)s->n_sets;
    p.window = (int)s->window;
    p.scale = (float)pow((double)D, -0.25);
    uint32_t limit = __bfloat16_as_ushort(__float2bfloat16_rn(SRF__X_LIMIT / p.scale));
    p.limit = limit << 16 | limit;
    plan_turns(&p, n_sm);
    return p;
}

/* Sets pointers into the workspace at base; NULL only counts. Returns its bytes. */
static size_t carve(const struct srf_srf_attn_prefill_args *a, void *base, struct prefill *p)
{
    struct cuda_bump bump = {(char *)base, 0};
    int64_t heads = a->s.b * a->s.h, rows = (a->offsets ? a->rows : a->s.b * a->s.t) * a->s.h;
    if (p->n_seg > 1)
        p->sums = (float *)bump_bytes(&bump, (size_t)(heads * p->n_seg * pure_state_count(D, 1)) *
                                                 sizeof(float));
    if (p->n_turns > 1) {
        p->turns = (float *)bump_bytes(&bump, (size_t)(heads * TURN_FLOATS) * sizeof(float));
        p->turns_done = (int *)bump_bytes(&bump, (size_t)heads * sizeof(int));
    }
    if (p->m > 64) {
        p->num = (float2 *)bump_bytes(&bump, (size_t)(rows * D / 2) * sizeof(float2));
        p->den = (float2 *)bump_bytes(&bump, (size_t)rows * sizeof(float2));
    }
    return bump.used;
}

size_t srf__prefill_workspace(const struct srf_ctx *ctx, const struct srf_srf_attn_prefill_args *a)
{
    struct prefill p = plan(ctx, &a->s);
    return carve(a, NULL, &p);
}

srf_status srf__prefill(struct srf_ctx *ctx, const struct srf_srf_attn_prefill_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    struct prefill p = plan(ctx, s);
    int64_t heads = s->b * s->h, n = heads * 64 * (D + 1);
    p.q = (const bf16 *)a->q;
    p.k = (const bf16 *)a->k;
    p.v = (const bf16 *)a->v;
    p.w = (const bf16 *)a->w;
    p.bias = (const float *)a->bias;
    p.o = (bf16 *)a->o;
    p.ld = a->ld;
    p.ld_o = a->ld_o;
    p.state = (char *)a->state;
    p.state_bf16 = a->state_bf16;
    p.state_bytes = a->state_bf16
                        ? srf_attn_state_bf16_bytes(s->m, D, s->window)
                        : srf_attn_state_count(s->m, D, s->window) * (int64_t)sizeof(float);
    p.pos = (const int32_t *)a->pos;
    p.offsets = (const int32_t *)a->offsets;
    p.slots = (const int32_t *)a->slots;
    carve(a, ctx->workspace, &p);
    struct prefill_maps m;
    int64_t rows = a->offsets ? a->rows : s->b * s->t;
    SRF_TRY(srf__tile_map(&m.k, a->k, 1, rows, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.v, a->v, 1, rows, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.q, a->q, 1, rows, s->h, a->ld, CHUNK));
    for (p.first = 0; p.first < p.m; p.first += p.count) {
        p.count = p.m - p.first < 64 ? p.m - p.first : 64;
        if (p.n_seg > 1) {
            SRF_TRY((s->window ? srf__prefill_window_totals(ctx, &p, &m)
                               : prefill_launch<pure_form<false>, true>(ctx, &p, &m)));
            prefix_kernel<<<(unsigned)div_up(n, 128), 128, 0, stream_of(ctx)>>>(p, n);
        }
        SRF_TRY((s->window ? srf__prefill_window(ctx, &p, &m)
                 : p.num   ? prefill_launch<pure_form<true>, false>(ctx, &p, &m)
                           : prefill_launch<pure_form<false>, false>(ctx, &p, &m)));
    }
    return SRF_OK;
}
