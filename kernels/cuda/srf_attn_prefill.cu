/* Prefill of SRF attention on Hopper's tensor cores, bf16, d = 64: the pure form, and the launches
 * of both. Of the window hybrid (srf_attn_prefill_window.cu) what is said here of blocks,
 * segments and states is true as well.
 *
 * The forms are those of srf_attn_pure.cu: chunks of 64 tokens, S, z, M before them, everything in
 * log2 units, M_i an integer. A block of threads, one a multiprocessor, has a head of one sequence,
 * or a part of it, and four warpgroups that work on different chunks:
 *     keys     a = W K^T, the maxima M, kf = 2^(a - M); z; gives kf, z, M to the others through
 *              shared memory, two buffers for each warpgroup of queries
 *     sums     loads k, v and makes |k|^2 for the keys; gives S (bf16) to the queries; S += kf V,
 *              in registers
 *     queries  two, every other chunk: a = Q W^T, r = max_i (a_i + M_i), qf = 2^(a + M - r);
 *              P = qf kf^T below the diagonal; o = (qf S + P V) / (qf z + sum P)
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
    float top[2][64];  /* bias + M */
    float step[2][64]; /* 2^(M before - M), for the sums */
    bf16 z[2][2][64];  /* z as a sum of two */
    int piece[2];      /* rows lo + 256 hi of a chunk */
    /* All of it is there; weights alone are; nobody needs it any more. */
    uint64_t full[2], weights[2], empty[2];
};
/* Behind the tiles. */
struct prefill_small {
    float half[4][64]; /* log2(e) |y|^2 / 2 of the keys of chunks c % 4 */
    float piece[64];   /* the same of a piece of a chunk, infinite outside it */
    struct prefill_given given[2];
    uint64_t loads[4]; /* keys and values number i % 4 have come */
    uint64_t keys[4];  /* keys, and their norms, are as they are used */
};

/* Shared memory, from a multiple of 1024. V of chunks that queries may still want (three behind the
 * sums' own), and of four ahead: two with the keys, two on their way. */
template <bool parts> struct pure_form {
    using small_parts = struct prefill_small;
    static constexpr int groups = 4, key_groups = 2; /* keys, sums, two of queries */
    static constexpr int k_tiles = 4, v_tiles = 8;
    static constexpr int k = 0, v = k + k_tiles * TILE;
    static constexpr int w = v + v_tiles * TILE, q = w + 2 * TILE; /* of queries: (2), (2, 2) */
    static constexpr int kf = q + 4 * TILE, s = kf + 4 * TILE;     /* to queries: (2, 2) */
    static constexpr int small = s + 4 * TILE;

    template <bool totals>
    static __device__ void run(const struct prefill &p, const struct prefill_maps &m, int64_t items,
                               uint32_t base, struct prefill_small *sm, int group);
};

#if HAVE_WGMMA
static __device__ __forceinline__ bool group_any(int id, bool x)
{
    uint32_t any;
    asm volatile("{\n"
                 ".reg .pred p, q;\n"
                 "setp.ne.b32 p, %1, 0;\n"
                 "bar.red.or.pred q, %2, %3, p;\n"
                 "selp.u32 %0, 1, 0, q;\n"
                 "}\n"
                 : "=r"(any)
                 : "r"((uint32_t)x), "r"(id), "n"(GROUP)
                 : "memory");
    return any;
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
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4; i++) {
            struct prefill_given *given = &sm->given[i >> 1];
            barrier_init(smem_addr(&given->full[i & 1]), full * GROUP);
            barrier_init(smem_addr(&given->weights[i & 1]), GROUP);
            barrier_init(smem_addr(&given->empty[i & 1]), empty * GROUP);
            barrier_init(smem_addr(&sm->loads[i]), GROUP);
            barrier_init(smem_addr(&sm->keys[i]), GROUP);
        }
        barrier_init_done();
    }
    __syncthreads();
}
/* c (64, 64) += P B: P a tile of 64 rows, B another's 64 rows. */
static __device__ __forceinline__ void mix_tiles(float c[32], uint32_t p, uint32_t tile)
{
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
        wgmma_64_tiles<false, true>(c, tile_on_by(p, 2 * kk), tile_on_by(tile, 128 * kk), true);
}

/* The warpgroup of keys. */
template <bool totals>
static __device__ __forceinline__ void keys_role(const struct prefill &p, int64_t items,
                                                 uint32_t base, struct prefill_small *sm)
{
    using at = pure_form<false>;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, pair = lane & 3;
    const int f0 = 16 * warp + (lane >> 2), segs = p.n_seg - totals;
    const float to_log2 = SRF__LOG2E * p.scale;
    struct place now = {};
    now.item = blockIdx.x;
    int i = 0, item[2] = {0, 0}; /* chunks before this one; of what has been given out */
    for (; find_place(p, &now, items, segs); now.item += gridDim.x) {
        int turn;
        const struct work w = turn_of(p, now.item, items, segs, &turn);
        struct key_features f;
        struct pure_state<D> st;
        read_features(&f, p, w, f0, pair);
        float late[4] = {0, 0, 0, 0}; /* to z, of the piece before: no need to wait for it */
        begin_turn<TOPS, totals>(&st, p, w, turn, 2, f0, tid, 1);
        for (; now.c < now.end; now.c++, i++) {
            const int n = min(CHUNK, now.stop - now.c * CHUNK), to = i & 1;
            const uint32_t k_tile = base + at::k + i % at::k_tiles * TILE;
            struct prefill_given *given = &sm->given[to];
            barrier_wait(smem_addr(&sm->keys[i & 3]), i >> 2 & 1);
            for (int lo = 0, size = CHUNK; lo < n;) {
                struct pure_keys keys;
                uint32_t kf[4][4];
                float a[32];
                const float *half = sm->half[i & 3];
                if (UNLIKELY(size < CHUNK)) {
                    group_barrier(1); /* all are done with the piece before */
                    if (tid < CHUNK)
                        sm->piece[tid] = tid >= lo && tid < lo + size ? half[tid] : INFINITY;
                    group_barrier(1);
                    half = sm->piece;
                }
                products(a, f.w, k_tile);
                key_exponents(a, half, to_log2);
                const bool fits = key_tops(&keys, &st, a, f.bias, lo, pair);
                if (!totals && UNLIKELY(group_any(1, !fits) && size > 1)) {
                    size >>= 1;
                    continue;
                }
                key_weights(kf, &keys, a, f.bias);
                const int number = to ? item[1]++ : item[0]++, buffer = number & 1;
                wait_empty(given, number);
                publish_weights(kf, base + at::kf + (2 * to + buffer) * TILE, f0, pair);
                st.z[0] += late[0], st.z[1] += late[2];
                scale_tops(&st, &keys);
                publish_tops(&st, 0, f.bias, given->top[buffer], given->z[buffer], f0, pair);
                if (pair == 0) {
                    given->step[buffer][f0] = keys.step[0];
                    given->step[buffer][f0 + 8] = keys.step[1];
                }
                if (tid == 0) given->piece[buffer] = lo + 256 * min(lo + size, n);
                async_fence();
                arrive(given->weights, number);
                if (!totals) arrive(given->full, number);
                for (int e = 0; e < 4; e++) late[e] = 0.0f;
                add_ones(late, kf, lane);
                lo += size;
                size = lo < CHUNK ? lo & -lo : size;
            }
        }
        st.z[0] += late[0], st.z[1] += late[2];
        end_turn<TOPS, totals>(&st, p, w, now.end == w.end, f0, tid, 1);
    }
}

/* The warpgroup of sums, which loads keys and values too. */
template <bool totals>
static __device__ __forceinline__ void sums_role(const struct prefill &p,
                                                 const struct prefill_maps &m, int64_t items,
                                                 uint32_t base, struct prefill_small *sm)
{
    using at = pure_form<false>;
    const int tid = threadIdx.x - GROUP, lane = tid & 31, warp = tid >> 5, pair = lane & 3;
    const int f0 = 16 * warp + (lane >> 2), segs = p.n_seg - totals;
    struct place now = {}, ahead;
    now.item = blockIdx.x;
    ahead = now;
    bool more = find_place(p, &ahead, items, segs);
    int loads = 0, normed = 0, n[2] = {0, 0}; /* n: rows of the chunks on their way */
    auto load_next = [&] {
        if (!more) return;
        n[1] = min(CHUNK, ahead.stop - ahead.c * CHUNK);
        load_keys(m, base + at::k + loads % at::k_tiles * TILE,
                  base + at::v + loads % at::v_tiles * TILE, ahead, &sm->loads[loads & 3], tid);
        more = next_place(p, &ahead, items, segs);
        loads++;
    };
    /* The older of two chunks on their way goes to the keys. */
    auto give_keys = [&] {
        if (normed >= loads) return;
        const uint32_t k_tile = base + at::k + normed % at::k_tiles * TILE;
        barrier_wait(smem_addr(&sm->loads[normed & 3]), normed >> 2 & 1);
        const bool tail = n[0] < CHUNK;
        if (UNLIKELY(tail))
            clear_rows(k_tile, base + at::v + normed % at::v_tiles * TILE, n[0], warp, lane);
        if (diagonal_norms(k_tile, sm->half[normed & 3], p, n[0], warp, lane) || tail)
            async_fence();
        barrier_arrive(smem_addr(&sm->keys[normed++ & 3]));
    };
#pragma unroll 1
    for (int i = 0; i < 4; i++) {
        n[0] = n[1];
        load_next();
        if (i == 1 || i == 2) give_keys();
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
            for (int hi = 0; hi < rows;) {
                const int number = to ? item[1]++ : item[0]++, buffer = number & 1;
                const int tile = (2 * to + buffer) * TILE;
                wait_for(given->weights, number);
                hi = given->piece[buffer] >> 8;
                const float step[2] = {given->step[buffer][f0], given->step[buffer][f0 + 8]};
                scale_sums(&st, step);
                if (!totals) {
                    publish_sums(&st, base + at::s + tile, f0, pair);
                    async_fence();
                    arrive(given->full, number);
                }
                warpgroup_fence();
                mix_tiles(&st.s[0][0], base + at::kf + tile, v_tile);
                warpgroup_commit();
                warpgroup_wait<0>();
                wgmma_hold(&st.s[0][0]);
                arrive(given->empty, number);
            }
            /* The keys are done with this chunk's tile; queries are at most three behind. */
            n[0] = n[1];
            load_next();
        }
        end_turn<SUMS, totals>(&st, p, w, now.end == w.end, f0, tid, 4);
    }
}

/* qf of this warp's 16 tokens, r_t taken out. */
static __device__ __forceinline__ void query_weights(uint32_t qf[4][4], float r[2], float a[32],
                                                     const float *top, float to_log2, int pair)
{
    r[0] = r[1] = -INFINITY;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float2 shift = *(const float2 *)(top + 8 * j + 2 * pair);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            a[4 * j + e] = fmaf(a[4 * j + e], to_log2, e & 1 ? shift.y : shift.x);
            r[e >> 1] = fmaxf(r[e >> 1], a[4 * j + e]);
        }
    }
    r[0] = quad_max(r[0]);
    r[1] = quad_max(r[1]);
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            qf[j >> 1][(j & 1) * 2 + i] = pack_bf16(exp2_fast(a[4 * j + 2 * i] - r[i]),
                                                    exp2_fast(a[4 * j + 2 * i + 1] - r[i]));
}

/* What warp `warp` keeps of the weights that its 16 tokens give a chunk's keys: those not behind
 * them. edge: of the thread's pairs on the diagonal. */
template <int warp>
static __device__ __forceinline__ void causal(uint32_t weight[4][4], const float seen[32],
                                              uint32_t edge)
{
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int at = 2 * warp + i;
            const uint32_t x =
                j <= at ? pack_bf16(seen[4 * j + 2 * i], seen[4 * j + 2 * i + 1]) : 0;
            weight[j >> 1][(j & 1) * 2 + i] = j == at ? x & edge : x;
        }
}

/* One of two warpgroups of queries, for every other chunk. parts: these are not all features. */
template <bool parts>
static __device__ __forceinline__ void queries_role(const struct prefill &p, int64_t items,
                                                    uint32_t base, struct prefill_small *sm,
                                                    int group)
{
    using at = pure_form<false>;
    const int tid = threadIdx.x & (GROUP - 1), lane = tid & 31, warp = tid >> 5, pair = lane & 3;
    const int id = 2 + group, ahead_of = (lane >> 2) - 2 * pair;
    const uint32_t edge = ahead_of > 0 ? 0xffffffffu : ahead_of == 0 ? 0xffffu : 0;
    const float to_log2 = SRF__LOG2E * p.scale;
    const uint32_t w_tile = base + at::w + group * TILE;
    struct prefill_given *given = &sm->given[group];
    struct place ahead = {};
    ahead.item = blockIdx.x;
    bool more = find_place(p, &ahead, items, p.n_seg);
    if (more && group) more = next_place(p, &ahead, items, p.n_seg);
    int loads = 0, first[2] = {0, 0}, head[2] = {0, 0}, n[2]; /* of this chunk and of the next */
    auto load_next = [&] {
        n[1] = 0;
        if (!more) return;
        first[1] = (int)ahead.row + ahead.c * CHUNK;
        head[1] = ahead.head;
        n[1] = min(CHUNK, ahead.stop - ahead.c * CHUNK);
        load_tile<D, GROUP>(base + at::q + (2 * group + (loads & 1)) * TILE,
                            p.q + first[1] * p.ld + head[1] * D, p.ld, CHUNK, n[1], tid);
        cp_async_commit();
        more = next_place(p, &ahead, items, p.n_seg, 2);
        loads++;
    };
    load_next();
    int features = -1;
    for (int i = 0, item = 0; n[1] > 0; i++) {
        first[0] = first[1], head[0] = head[1], n[0] = n[1];
        const uint32_t q_tile = base + at::q + (2 * group + (i & 1)) * TILE;
        const uint32_t v_tile = base + at::v + (2 * i + group) % at::v_tiles * TILE;
        if (UNLIKELY((int)features_of(p, head[0]) != features)) {
            features = (int)features_of(p, head[0]);
            group_barrier(id); /* all are done with the old ones */
            load_tile<D, GROUP>(w_tile, p.w + (int64_t)features * D, D, 64, p.count, tid);
            cp_async_commit();
            cp_async_wait<0>();
            async_fence();
        }
        cp_async_wait<0>();
        group_barrier(id);
        load_next();
        for (int hi = 0; hi < n[0]; item++) {
            const int buffer = item & 1;
            const uint32_t tile = (2 * group + buffer) * TILE;
            /* with qf kf^T in a as well the compiler would wait for each product */
            float a[32], seen[32], num[D / 8][4], den[4] = {0, 0, 0, 0}, r[2];
            uint32_t x[4][4], qf[4][4], weight[4][4];
            query_rows(x, q_tile, p.limit, warp, lane);
            products(a, x, w_tile);
            wait_for(given->full, item);
            const int lo = given->piece[buffer] & 255;
            hi = given->piece[buffer] >> 8;
            query_weights(qf, r, a, given->top[buffer], to_log2, pair);
            warpgroup_fence();
            mix(seen, qf, base + at::kf + tile, false);
            warpgroup_commit();
            mix(&num[0][0], qf, base + at::s + tile, false);
            warpgroup_commit();
            add_z(den, qf, given->z[buffer], lane);
            warpgroup_wait<1>();
            wgmma_hold(seen);
            if (warp == 0)
                causal<0>(weight, seen, edge);
            else if (warp == 1)
                causal<1>(weight, seen, edge);
            else if (warp == 2)
                causal<2>(weight, seen, edge);
            else
                causal<3>(weight, seen, edge);
            warpgroup_wait<0>();
            wgmma_hold(&num[0][0]);
            warpgroup_fence();
            mix(&num[0][0], weight, v_tile, true);
            warpgroup_commit();
            add_ones(den, weight, lane);
            warpgroup_wait<0>();
            wgmma_hold(&num[0][0]);
            arrive(given->empty, item);
            give_rows<parts>(p, first[0], head[0], num, den, r, q_tile, warp, lo, hi, lane);
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
    if (group == 0) {
        if (!totals) asm volatile("setmaxnreg.inc.sync.aligned.u32 144;");
        keys_role<totals>(p, items, base, sm);
    } else if (totals || group == 1) {
        if (!totals) asm volatile("setmaxnreg.dec.sync.aligned.u32 80;");
        sums_role<totals>(p, m, items, base, sm);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 144;");
        queries_role<parts>(p, items, base, sm, group - 2);
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
