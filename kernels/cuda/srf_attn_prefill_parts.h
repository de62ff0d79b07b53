/* What the prefill kernels of pure SRF attention and of the window hybrid share: what a block of
 * threads works on, states as they are stored, keys. Forms are explained in srf_attn_prefill.cu.
 */
#pragma once
#include "kernels/cuda/srf_attn_prefill.h"
#include "kernels/cuda/srf_attn_pure.h"
#include "kernels/cuda/wgmma.h"

#define D      64
#define GROUP  128 /* threads of a warpgroup */
#define SPREAD 60  /* log2: what a feature's weights in a chunk may differ by */
#define TILE   (CHUNK * D * 2)

struct prefill {
    const bf16 *q, *k, *v, *w;
    const float *bias;
    bf16 *o;
    char *state;
    int64_t state_bytes; /* of a head */
    bool state_bf16;
    const int32_t *pos, *offsets, *slots; /* as in the op's arguments */
    float *sums; /* (b h, n_seg, pure_state_count): segments' states; NULL: one segment */
    /* (heads, TURN_FLOATS), (heads): what one turn leaves to the next of the same head, and how
     * many have; NULL: one turn. */
    float *turns;
    int *turns_done;
    /* (rows, h, D), (rows, h): numerators; denominators and r. Of the features before these; NULL:
     * all are done at once. */
    float2 *num, *den;
    int64_t ld, ld_o, heads; /* heads of all sequences */
    int t, h, m, n_sets, window;
    int first, count;         /* features [first, first + count) */
    int n_seg, seg_chunks;    /* segments, chunks in each */
    int n_turns, turn_chunks; /* turns of a segment, chunks in each */
    float scale;              /* d^(-1/4) */
    uint32_t limit;           /* the clamp of q and k, twice bf16 */
};

/* k and v as the copy engine sees them: all rows as one sequence. */
struct prefill_maps {
    CUtensorMap k, v;
};

/* srf_attn_prefill_window.cu: blocks of segments; keys of the caller's into the rings, where they
 * are in segments. */
srf_status srf__prefill_window(struct srf_ctx *ctx, const struct prefill *p,
                               const struct prefill_maps *m);
srf_status srf__prefill_window_totals(struct srf_ctx *ctx, const struct prefill *p,
                                      const struct prefill_maps *m);

#ifdef __CUDACC__
#define UNLIKELY(x) __builtin_expect((x) != 0, 0)
/* The launcher asks for this bound to learn whether a kernel was compiled for its device. */
#if defined(__CUDA_ARCH__) && !HAVE_WGMMA
#define BOUNDS(threads, blocks) __launch_bounds__(4 * GROUP)
#else
#define BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#endif

/* What a block works on. Positions count from `pos` in the pure form; in the hybrid they are the
 * caller's but for a multiple of the ring's length. Chunks are numbered by position / CHUNK. */
struct work {
    int64_t first, head_i, slot; /* row of position 0; sequence and head; number of its state */
    int seq, head, seg;
    int pos, stop;                /* positions [pos, stop) */
    int begin, end, from, n_segs; /* chunks [begin, end); the sequence's first; its segments */
    bool last;                    /* the segment is the sequence's last */
};
static __device__ __forceinline__ struct work work_of(const struct prefill &p, int64_t head_i,
                                                      int seg)
{
    struct work w;
    w.head_i = head_i;
    w.seg = seg;
    w.seq = (int)head_i / p.h;
    w.head = (int)head_i % p.h;
    int first = p.offsets ? p.offsets[w.seq] : w.seq * p.t;
    int rows = p.offsets ? p.offsets[w.seq + 1] - first : p.t;
    w.pos = p.window ? p.pos[w.seq] : 0;
    const int ring = 2 * p.window;
    if (ring > 0 && w.pos >= 2 * ring) w.pos = ring + w.pos % ring;
    w.first = (int64_t)first - w.pos;
    w.stop = w.pos + rows;
    w.slot = (int64_t)(p.slots ? p.slots[w.seq] : w.seq) * p.h + w.head;
    w.from = w.pos / CHUNK;
    const int n = rows > 0 ? (w.stop + CHUNK - 1) / CHUNK - w.from : 0;
    w.n_segs = (n + p.seg_chunks - 1) / p.seg_chunks;
    w.begin = w.from + seg * p.seg_chunks;
    w.end = min(w.begin + p.seg_chunks, w.from + n);
    w.last = seg == w.n_segs - 1;
    return w;
}

/* A block's way through its turns: segments (or what a turn has of one) of all heads, the first
 * turns of all before the second of any. What else is to be known of one, turn_of says. */
struct place {
    int64_t item; /* turn * segments of all heads + segment */
    int64_t row;  /* of position 0 */
    int64_t slot;
    int head, pos, stop; /* all as in struct work */
    int c, end;          /* this chunk, the turn's end */
    int before;          /* hybrid: chunks from this one on that are there for their keys only */
};
static __device__ __forceinline__ struct work turn_of(const struct prefill &p, int64_t item,
                                                      int64_t items, int segs, int *turn)
{
    const uint32_t all = (uint32_t)items / (uint32_t)p.n_turns, i = (uint32_t)item % all;
    *turn = (int)((uint32_t)item / all);
    return work_of(p, i / (uint32_t)segs, (int)(i % (uint32_t)segs));
}
/* Hybrid: the first chunk of which queries of chunk c see keys one by one, or their state has not
 * all. */
static __device__ __forceinline__ int first_seen(const struct prefill &p, int c)
{
    return max(0, (c * CHUNK / p.window - 1) * p.window) / CHUNK;
}
/* The first chunk of place->item or of the block's next turn that has any; false: none is left.
 * segs: of a head. */
static __device__ __forceinline__ bool find_place(const struct prefill &p, struct place *at,
                                                  int64_t items, int segs)
{
    for (; at->item < items; at->item += gridDim.x) {
        int turn;
        const struct work w = turn_of(p, at->item, items, segs, &turn);
        at->row = w.first;
        at->head = w.head;
        at->slot = w.slot;
        at->pos = w.pos;
        at->stop = w.stop;
        at->c = w.begin + turn * p.turn_chunks;
        at->end = min(w.end, at->c + p.turn_chunks);
        if (at->c >= at->end) continue;
        at->before = p.window ? at->c - first_seen(p, at->c) : 0;
        at->c -= at->before;
        return true;
    }
    return false;
}
static __device__ __forceinline__ bool next_place(const struct prefill &p, struct place *at,
                                                  int64_t items, int segs, int step = 1)
{
    at->before = max(0, at->before - step);
    at->c += step;
    while (UNLIKELY(at->c >= at->end)) {
        const int over = at->c - at->end;
        at->item += gridDim.x;
        if (!find_place(p, at, items, segs)) return false;
        at->c += over;
        at->before = max(0, at->before - over);
    }
    return true;
}

/* ---- states as they are stored --------------------------------------------------------------- */

/* S of feature f. */
static __device__ __forceinline__ char *state_row(const struct prefill &p, int64_t slot, int f)
{
    return p.state + slot * p.state_bytes + (int64_t)f * D * (p.state_bf16 ? 2 : 4);
}
/* z of feature f; M is m floats on. */
static __device__ __forceinline__ float *state_z(const struct prefill &p, int64_t slot, int f)
{
    return (float *)state_row(p, slot, p.m) + f;
}
/* A segment's state in the workspace. */
static __device__ __forceinline__ float *segment_state(const struct prefill &p,
                                                       const struct work &w)
{
    return p.sums + (w.head_i * p.n_seg + w.seg) * pure_state_count(D, 1);
}

/* What of a state is meant: z and M, S. */
enum { TOPS = 1, SUMS = 2 };

/* The state before the first chunk: the caller's, or what the prefixes left. */
template <int what>
static __device__ __forceinline__ void read_state(struct pure_state<D> *st, const struct prefill &p,
                                                  const struct work &w, int f0, int pair)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const bool there = f0 + 8 * i < p.count;
        const int f = p.first + (there ? f0 + 8 * i : 0);
        const float *seg = p.sums ? segment_state(p, w) + (f0 + 8 * i) * D : NULL;
        const char *s = state_row(p, w.slot, f);
        const float *z = state_z(p, w.slot, f);
#pragma unroll
        for (int j = 0; j < D / 8 && (what & SUMS); j++) {
            float2 x = make_float2(0, 0);
            if (seg)
                x = ((const float2 *)seg)[4 * j + pair];
            else if (there)
                x = p.state_bf16 ? unpack_bf16(((const uint32_t *)s)[4 * j + pair])
                                 : ((const float2 *)s)[4 * j + pair];
            st->s[j][2 * i] = x.x;
            st->s[j][2 * i + 1] = x.y;
        }
        if (!(what & TOPS)) continue;
        if (seg) {
            const float *tops = segment_state(p, w) + 64 * D + f0 + 8 * i;
            st->z[i] = tops[0];
            st->top[i] = tops[128];
        } else {
            st->z[i] = there ? z[0] : 0.0f;
            st->top[i] = st->z[i] != 0.0f ? z[p.m] : SRF__UNSET;
        }
    }
}
/* In the pure form no feature of a sequence with tokens is unset; in the hybrid z = 0 says so. */
template <int what>
static __device__ __forceinline__ void write_state(const struct pure_state<D> *st,
                                                   const struct prefill &p, const struct work &w,
                                                   int f0, int pair)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int f = p.first + f0 + 8 * i;
        if (f0 + 8 * i >= p.count) continue;
        char *s = state_row(p, w.slot, f);
        float *z = state_z(p, w.slot, f);
#pragma unroll
        for (int j = 0; j < D / 8 && (what & SUMS); j++) {
            float x = st->s[j][2 * i], y = st->s[j][2 * i + 1];
            if (p.state_bf16)
                ((uint32_t *)s)[4 * j + pair] = pack_bf16(x, y);
            else
                ((float2 *)s)[4 * j + pair] = make_float2(x, y);
        }
        if ((what & TOPS) && pair == 0) {
            z[0] = st->z[i];
            z[p.m] = st->z[i] != 0.0f ? st->top[i] : 0.0f;
        }
    }
}
/* What a segment's own keys make, to the workspace. */
template <int what>
static __device__ __forceinline__ void write_segment(const struct pure_state<D> *st,
                                                     const struct prefill &p, const struct work &w,
                                                     int f0, int pair)
{
    float *to = segment_state(p, w);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int f = f0 + 8 * i;
#pragma unroll
        for (int j = 0; j < D / 8 && (what & SUMS); j++)
            ((float2 *)(to + f * D))[4 * j + pair] =
                make_float2(st->s[j][2 * i], st->s[j][2 * i + 1]);
        if ((what & TOPS) && pair == 0) {
            to[64 * D + f] = st->z[i];
            to[64 * (D + 1) + f] = st->top[i];
        }
    }
}

/* From one turn to the next: all registers of all threads as they are. */
#define TURN_FLOATS ((D / 2 + 4) * GROUP)
template <int what>
static __device__ __forceinline__ void give_turn(const struct prefill &p, int64_t head_i,
                                                 const struct pure_state<D> *st, int tid)
{
    float4 *to = (float4 *)(p.turns + head_i * TURN_FLOATS) + tid;
#pragma unroll
    for (int j = 0; j < D / 8 && (what & SUMS); j++)
        to[j * GROUP] = make_float4(st->s[j][0], st->s[j][1], st->s[j][2], st->s[j][3]);
    if (what & TOPS) to[D / 8 * GROUP] = make_float4(st->z[0], st->z[1], st->top[0], st->top[1]);
    __threadfence();
}
template <int what>
static __device__ __forceinline__ void take_turn(const struct prefill &p, int64_t head_i,
                                                 struct pure_state<D> *st, int tid)
{
    const float4 *from = (const float4 *)(p.turns + head_i * TURN_FLOATS) + tid;
#pragma unroll
    for (int j = 0; j < D / 8 && (what & SUMS); j++) {
        const float4 x = __ldcg(from + j * GROUP);
        st->s[j][0] = x.x, st->s[j][1] = x.y, st->s[j][2] = x.z, st->s[j][3] = x.w;
    }
    if (!(what & TOPS)) return;
    const float4 x = __ldcg(from + D / 8 * GROUP);
    st->z[0] = x.x, st->z[1] = x.y, st->top[0] = x.z, st->top[1] = x.w;
}
static __device__ __forceinline__ void wait_turn(const int *done, int turn)
{
    int now;
    do {
        asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(now) : "l"(done) : "memory");
    } while (now < turn);
}
static __device__ __forceinline__ void turn_done(int *done)
{
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(done) : "memory");
}

/* ---- shared memory --------------------------------------------------------------------------- */

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

#if HAVE_WGMMA
static __device__ __forceinline__ void group_barrier(int id)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(GROUP) : "memory");
}
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

/* The state as a turn begins and ends; `parts` warpgroups have parts of it. id: of a barrier. */
template <int what, bool totals>
static __device__ __forceinline__ void begin_turn(struct pure_state<D> *st, const struct prefill &p,
                                                  const struct work &w, int turn, int parts, int f0,
                                                  int tid, int id)
{
    if (totals) {
        pure_state_start(st, false, 1, NULL, f0, tid & 3);
    } else if (turn > 0) {
        if (tid == 0) wait_turn(p.turns_done + w.head_i, turn * parts);
        group_barrier(id);
        take_turn<what>(p, w.head_i, st, tid);
    } else {
        read_state<what>(st, p, w, f0, tid & 3);
    }
}
template <int what, bool totals>
static __device__ __forceinline__ void end_turn(const struct pure_state<D> *st,
                                                const struct prefill &p, const struct work &w,
                                                bool last, int f0, int tid, int id)
{
    if (totals) {
        write_segment<what>(st, p, w, f0, tid & 3);
    } else if (!last) {
        give_turn<what>(p, w.head_i, st, tid);
        group_barrier(id);
        if (tid == 0) turn_done(p.turns_done + w.head_i);
    } else if (w.last) {
        write_state<what>(st, p, w, f0, tid & 3);
    }
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
/* The first of a head's features among all rows of W. */
static __device__ __forceinline__ int64_t features_of(const struct prefill &p, int head)
{
    return (p.n_sets == 1 ? 0 : (int64_t)head * p.m) + p.first;
}

/* What wgmma_tile says of a tile's address, with `pieces` of 16 bytes more: the lower half of one
 * tile's descriptors is one number and a constant, so that they cost an addition each. */
static __device__ __forceinline__ uint64_t tile_on_by(uint32_t tile, int pieces)
{
    return (uint64_t)(1u << 30 | 64) << 32 | ((tile >> 4 | 64 << 16) + (uint32_t)pieces);
}
/* a = x tile^T */
static __device__ __forceinline__ void products(float a[32], const uint32_t x[4][4], uint32_t tile)
{
    warpgroup_fence();
#pragma unroll
    for (int kk = 0; kk < 4; kk++) wgmma_64<false>(a, x[kk], tile_on_by(tile, 2 * kk), kk > 0);
    warpgroup_commit();
    warpgroup_wait<0>();
    wgmma_hold(a);
}

/* c (64, 64) = P B (!add) or c += P B: P packed, B the tile's 64 rows. */
static __device__ __forceinline__ void mix(float c[32], const uint32_t p[4][4], uint32_t tile,
                                           bool add)
{
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
        wgmma_64<true>(c, p[kk], tile_on_by(tile, 128 * kk), add || kk > 0);
}
/* c (64, 64) += P B: P a tile of 64 rows, B another's 64 rows. */
static __device__ __forceinline__ void mix_tiles(float c[32], uint32_t p, uint32_t tile)
{
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
        wgmma_64_tiles<false, true>(c, tile_on_by(p, 2 * kk), tile_on_by(tile, 128 * kk), true);
}

/* ---- keys ------------------------------------------------------------------------------------ */

/* Keys and values of the chunk where `at` is, by the copy engine: loads of a thread's own would
 * have to come before each of its fences is passed. Rows of other sequences behind the end come
 * too. */
static __device__ __forceinline__ void load_keys(const struct prefill_maps &m, uint32_t k_tile,
                                                 uint32_t v_tile, const struct place &at,
                                                 uint64_t *barrier, int tid)
{
    const uint32_t bar = smem_addr(barrier);
    if (tid == 0) {
        const int row = (int)(at.row + at.c * CHUNK);
        barrier_expect(bar, 2 * TILE);
        bulk_tile(k_tile, &m.k, at.head * D, row, 0, bar);
        bulk_tile(v_tile, &m.v, at.head * D, row, 0, bar);
    } else {
        barrier_arrive(bar);
    }
}
/* Zeros in those of a warp's 16 rows that are row n of the chunk or behind it: no weight makes a
 * number of what is none. The warp may then read them. */
static __device__ __forceinline__ void clear_rows(uint32_t k_tile, uint32_t v_tile, int n, int warp,
                                                  int lane)
{
    for (int row = 16 * warp + lane / 8; row < 16 * warp + 16; row += 4)
        if (row >= n) {
            const uint32_t at = tile_at<D>(row, lane % 8);
            asm volatile("st.shared.v4.b32 [%0], {%2,%2,%2,%2};\n"
                         "st.shared.v4.b32 [%1], {%2,%2,%2,%2};" ::"r"(k_tile + at),
                         "r"(v_tile + at), "r"(0)
                         : "memory");
        }
    __syncwarp();
}
/* half of a warp's 16 rows of keys, |k|^2 being the diagonal of K K^T; infinite, weight 0, from row
 * n on. They are clamped in place: true where it wrote to the tile. The registers of A are those of
 * B for the same rows. */
static __device__ __forceinline__ bool
diagonal_norms(uint32_t k_tile, float *half, const struct prefill &p, int n, int warp, int lane)
{
    const int g = lane >> 2, row = 16 * warp + g;
    const uint32_t rows = k_tile + warp * 32 * D;
    const float most = SRF__X_LIMIT / p.scale;
    const bool mine = (lane & 3) == g >> 1;
    float sum[2];
    bool clamped = false;
    for (;; clamped = true) {
        float low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};
#pragma unroll
        for (int kk = 0; kk < 4; kk++) {
            uint32_t x[4];
            load_a<D>(x, rows, kk, lane);
            mma_bf16(low, x, x[0], x[2]);
            mma_bf16(high, x, x[1], x[3]);
        }
        sum[0] = g & 1 ? low[1] : low[0];
        sum[1] = g & 1 ? high[3] : high[2];
        const bool wide = mine && (sum[0] > most * most || sum[1] > most * most);
        if (!UNLIKELY(__any_sync(0xffffffffu, wide && !clamped))) break;
        __syncwarp();
        for (int i = 0; i < 16 * D / 2 / 32; i++) {
            const uint32_t addr = rows + 4 * (32 * i + lane);
            store_shared(addr, clamp_bf16(load_shared(addr), p.limit));
        }
        __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] *= 0.5f * SRF__LOG2E * p.scale * p.scale;
        if (sum[i] > SRF__HALF_LIMIT) sum[i] = SRF__HALF_LIMIT;
        if (mine) half[row + 8 * i] = row + 8 * i < n ? sum[i] : INFINITY;
    }
    return clamped;
}

/* What a thread of the keys keeps of its two features: W's rows as an operand, log2(e) bias. */
struct key_features {
    uint32_t w[4][4];
    float bias[2];
};
static __device__ __forceinline__ void read_features(struct key_features *f,
                                                     const struct prefill &p, const struct work &w,
                                                     int f0, int pair)
{
    const int64_t row = features_of(p, w.head);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const bool there = f0 + 8 * i < p.count;
        const uint32_t *from = (const uint32_t *)(p.w + (row + (there ? f0 + 8 * i : 0)) * D);
#pragma unroll
        for (int j = 0; j < 8; j++) f->w[j >> 1][2 * (j & 1) + i] = there ? from[4 * j + pair] : 0;
        f->bias[i] = there ? SRF__LOG2E * p.bias[row + f0 + 8 * i] : -INFINITY;
    }
}

/* Exponents of a chunk's keys for this thread's two features, but for bias; a = W K^T before. */
static __device__ __forceinline__ void key_exponents(float a[32], const float *half, float to_log2)
{
    const int pair = threadIdx.x & 3;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float2 sub = *(const float2 *)(half + 8 * j + 2 * pair);
#pragma unroll
        for (int e = 0; e < 4; e++)
            a[4 * j + e] = fmaf(a[4 * j + e], to_log2, e & 1 ? -sub.y : -sub.x);
    }
}

/* M with these keys, of rows lo on; false: their weights differ by more than SPREAD. */
static __device__ __forceinline__ bool key_tops(struct pure_keys *keys,
                                                const struct pure_state<D> *st, const float a[32],
                                                const float bias[2], int lo, int pair)
{
    bool fits = true;
    float first[2] = {a[0], a[2]};
    if (UNLIKELY(lo > 0)) {
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (8 * j + 2 * pair + (e & 1) == lo) first[e >> 1] = a[4 * j + e];
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float most = fmaxf(a[2 * i], a[2 * i + 1]);
#pragma unroll
        for (int j = 1; j < 8; j++)
            most = fmaxf(most, fmaxf(a[4 * j + 2 * i], a[4 * j + 2 * i + 1]));
        first[i] = __shfl_sync(0xffffffffu, first[i], (threadIdx.x & 28) | (lo >> 1 & 3));
        keys->top[i] = fmaxf(st->top[i], ceilf(quad_max(most) + bias[i]));
        keys->step[i] = exp2_fast(st->top[i] - keys->top[i]);
        if (fmaxf(st->top[i], first[i] + bias[i]) < keys->top[i] - SPREAD) fits = false;
    }
    return fits;
}

/* Weights, as the operand of products. */
static __device__ __forceinline__ void key_weights(uint32_t kf[4][4], const struct pure_keys *keys,
                                                   const float a[32], const float bias[2])
{
    const float less[2] = {keys->top[0] - bias[0], keys->top[1] - bias[1]};
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            kf[j >> 1][2 * (j & 1) + i] = pack_bf16(exp2_fast(a[4 * j + 2 * i] - less[i]),
                                                    exp2_fast(a[4 * j + 2 * i + 1] - less[i]));
}
/* S in the new M, which is soon the old one. */
static __device__ __forceinline__ void scale_sums(struct pure_state<D> *st, const float step[2])
{
    if (__any_sync(0xffffffffu, step[0] != 1.0f || step[1] != 1.0f))
        scale_rows(st->s, step[0], step[1]);
}
/* den += sums of weights, a product with a column of ones: where pair is 0, of den[0], den[2]. */
static __device__ __forceinline__ void add_ones(float den[4], const uint32_t weight[4][4], int lane)
{
    const uint32_t ones = lane < 4 ? 0x3f803f80u : 0;
#pragma unroll
    for (int kk = 0; kk < 4; kk++) mma_bf16(den, weight[kk], ones, ones);
}

/* z and M in the scale of these keys. */
static __device__ __forceinline__ void scale_tops(struct pure_state<D> *st,
                                                  const struct pure_keys *keys)
{
#pragma unroll
    for (int k = 0; k < 2; k++) {
        st->z[k] *= keys->step[k];
        st->top[k] = keys->top[k];
    }
}
/* bias + M - less, and z as a sum of two, for the queries. */
static __device__ __forceinline__ void publish_tops(const struct pure_state<D> *st, float less,
                                                    const float bias[2], float *tops,
                                                    bf16 z_of[2][64], int f0, int pair)
{
#pragma unroll
    for (int k = 0; k < 2 && pair == 0; k++) {
        const float z = st->z[k];
        const bf16 most = __float2bfloat16_rn(z);
        tops[f0 + 8 * k] = bias[k] + st->top[k] - less;
        z_of[0][f0 + 8 * k] = most;
        z_of[1][f0 + 8 * k] = __float2bfloat16_rn(z - __bfloat162float(most));
    }
}
/* z with the weights of these keys, where pair is 0. */
static __device__ __forceinline__ void add_tops(struct pure_state<D> *st, const uint32_t kf[4][4],
                                                int lane)
{
    float sum[4] = {0, 0, 0, 0};
    add_ones(sum, kf, lane);
    st->z[0] += sum[0];
    st->z[1] += sum[2];
}

/* Weights of keys, for the queries. */
static __device__ __forceinline__ void publish_weights(const uint32_t kf[4][4], uint32_t kf_tile,
                                                       int f0, int pair)
{
    const uint32_t to = kf_tile + tile_at<CHUNK>(f0, 0) + 4 * pair;
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int j = 0; j < 8; j++)
            store_shared(tile_on<CHUNK>(to, j) + r * 16 * CHUNK, kf[j >> 1][2 * (j & 1) + r]);
}
/* S in bf16, for them. */
static __device__ __forceinline__ void publish_sums(const struct pure_state<D> *st, uint32_t s_tile,
                                                    int f0, int pair)
{
    const uint32_t s = s_tile + tile_at<D>(f0, 0) + 4 * pair;
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            store_shared(tile_on<D>(s, j) + k * 16 * D,
                         pack_bf16(st->s[j][2 * k], st->s[j][2 * k + 1]));
}

/* ---- queries --------------------------------------------------------------------------------- */

/* A warp's 16 rows of a tile, clamped. */
static __device__ __forceinline__ void query_rows(uint32_t x[4][4], uint32_t q_tile, uint32_t limit,
                                                  int warp, int lane)
{
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
        load_a<D>(x[kk], q_tile + warp * 32 * D, kk, lane);
#pragma unroll
        for (int i = 0; i < 4; i++) x[kk][i] = clamp_bf16(x[kk][i], limit);
    }
}
/* den += weights times z: columns 0 and 1 of this product are the two parts of z, others 0. */
static __device__ __forceinline__ void add_z(float den[4], const uint32_t weight[4][4],
                                             const bf16 z[2][64], int lane)
{
    const int g = lane >> 2;
    const uint32_t row = smem_addr(z[g & 1]) + (lane & 3) * 4;
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
        uint32_t z0 = load_shared(row + kk * 32), z1 = load_shared(row + kk * 32 + 16);
        mma_bf16(den, weight[kk], g < 2 ? z0 : 0, g < 2 ? z1 : 0);
    }
}
/* Row i of a quad's two takes what other features have of the same token. */
static __device__ __forceinline__ void merge_row(float (&num)[D / 8][4], float den[2], float r[2],
                                                 int i, const float2 *other, float2 other_den)
{
    const float top = fmaxf(r[i], other_den.y);
    const float mine = exp2_fast(r[i] - top), with = exp2_fast(other_den.y - top);
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
        const float2 x = other[4 * j];
        num[j][2 * i] = num[j][2 * i] * mine + x.x * with;
        num[j][2 * i + 1] = num[j][2 * i + 1] * mine + x.y * with;
    }
    den[i] = den[i] * mine + other_den.x * with;
    r[i] = top;
}
/* To the last bit but one. */
static __device__ __forceinline__ float reciprocal(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
/* store_rows, where `to` is for the first 16 bytes that this thread stores. */
static __device__ __forceinline__ void put_rows(bf16 *to, int64_t ld, const float (&c)[D / 8][4],
                                                uint32_t tile, int warp, int lo, int hi, int lane)
{
    const int row = 16 * warp + (lane >> 2), first = 16 * warp + (lane >> 3);
    const uint32_t at = tile + tile_at<D>(row, 0) + 4 * (lane & 3);
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (row + 8 * i >= lo && row + 8 * i < hi) {
#pragma unroll
            for (int j = 0; j < D / 8; j++)
                store_shared(tile_on<D>(at, j) + i * 16 * D,
                             pack_bf16(c[j][2 * i], c[j][2 * i + 1]));
        }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++, to += 4 * ld) {
        const int r = first + 4 * i;
        if (r < lo || r >= hi) continue;
        uint4 x;
        asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                     : "r"(tile + tile_at<D>(r, lane & 7))
                     : "memory");
        *(uint4 *)to = x;
    }
    __syncwarp();
}
/* parts: where p.num is not NULL, and perhaps where it is.
 * num / sums of rows lo .. hi - 1 of the chunk that begins at row `first` to the output, through
 * the tile they came from; or, with r, to where the next features find them. */
template <bool parts = true>
static __device__ __forceinline__ void
give_rows(const struct prefill &p, int64_t first, int head, float (&num)[D / 8][4],
          const float sums[4], float r[2], uint32_t tile, int warp, int lo, int hi, int lane)
{
    const int row = 16 * warp + (lane >> 2), pair = lane & 3;
    float den[2] = {__shfl_sync(0xffffffffu, sums[0] + sums[1], lane & ~3),
                    __shfl_sync(0xffffffffu, sums[2] + sums[3], lane & ~3)};
    bool last = p.first + p.count == p.m;
    if (!parts) last = true;
    for (int i = 0; i < (parts && p.num ? 2 : 0); i++) {
        const int64_t at = (first + row + 8 * i) * p.h + head;
        const bool there = row + 8 * i >= lo && row + 8 * i < hi;
        float2 *part = p.num + at * (D / 2) + pair;
        if (p.first > 0 && there) {
            if (i == 0)
                merge_row(num, den, r, 0, part, p.den[at]);
            else
                merge_row(num, den, r, 1, part, p.den[at]);
        }
        __syncwarp();
        if (last || !there) continue;
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            part[4 * j] =
                i == 0 ? make_float2(num[j][0], num[j][1]) : make_float2(num[j][2], num[j][3]);
        if (pair == 0) p.den[at] = make_float2(den[i], r[i]);
    }
    if (!last) return;
    scale_rows(num, reciprocal(den[0]), reciprocal(den[1]));
    bf16 *to = p.o + (first + 16 * warp + (lane >> 3)) * p.ld_o + head * D + (lane & 7) * 8;
    put_rows(to, p.ld_o, num, tile, warp, lo, hi, lane);
}
#endif

/* ---- the kernel ------------------------------------------------------------------------------ */

/* form: the layout of its shared memory, its warpgroups and their roles. totals: the sums of each
 * segment's own keys, without queries. */
template <class form, bool totals>
static __global__ BOUNDS(GROUP *(totals ? form::key_groups : form::groups),
                         1) void prefill_kernel(const __grid_constant__ struct prefill p,
                                                const __grid_constant__ struct prefill_maps m)
{
#if HAVE_WGMMA
    extern __shared__ char raw[];
    const uint32_t skip = -smem_addr(raw) & 1023u, base = smem_addr(raw) + skip;
    auto *sm = (typename form::small_parts *)(raw + skip + form::small);
    const int64_t items = p.heads * (p.n_seg - totals) * p.n_turns; /* of all blocks */
    form::template run<totals>(p, m, items, base, sm, threadIdx.x / GROUP);
#endif
}

template <class form, bool totals>
static srf_status prefill_launch(struct srf_ctx *ctx, const struct prefill *p,
                                 const struct prefill_maps *m)
{
    /* And what a base that is no multiple of 1024 wants. */
    constexpr int bytes = form::small + 1024 + (int)sizeof(typename form::small_parts);
    constexpr int threads = GROUP * (totals ? form::key_groups : form::groups);
    int64_t items = p->heads * (p->n_seg - totals) * p->n_turns, n_sm = cuda_of(ctx)->n_sm;
    int64_t blocks = items < n_sm ? items : n_sm;
    auto kernel = prefill_kernel<form, totals>;
    CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    if (p->n_turns > 1)
        CUDA_TRY(cudaMemsetAsync(p->turns_done, 0, (size_t)p->heads * sizeof(int), stream_of(ctx)));
    kernel<<<(unsigned)blocks, threads, bytes, stream_of(ctx)>>>(*p, *m);
    return srf__cuda_launched("srf_attn_prefill");
}
#endif
