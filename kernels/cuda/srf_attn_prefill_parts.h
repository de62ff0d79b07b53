/* What the prefill kernels of pure SRF attention and of the window hybrid share: what a block of
 * threads works on, states as they are stored, the launch. Forms are explained in
 * srf_attn_prefill.cu.
 */
#pragma once
#include "kernels/cuda/srf_attn_prefill.h"
#include "kernels/cuda/srf_attn_pure_wgmma.h"

#define D     64
#define GROUP 128 /* threads of a warpgroup */

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

/* As the copy engine sees them: all rows as one sequence. */
struct prefill_maps {
    CUtensorMap k, v, q;
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
struct prefill_place {
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
static __device__ __forceinline__ bool find_place(const struct prefill &p, struct prefill_place *at,
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
static __device__ __forceinline__ bool next_place(const struct prefill &p, struct prefill_place *at,
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

#if HAVE_WGMMA
static __device__ __forceinline__ void group_barrier(int id)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(GROUP) : "memory");
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

/* The first of a head's features among all rows of W. */
static __device__ __forceinline__ int64_t features_of(const struct prefill &p, int head)
{
    return (p.n_sets == 1 ? 0 : (int64_t)head * p.m) + p.first;
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
