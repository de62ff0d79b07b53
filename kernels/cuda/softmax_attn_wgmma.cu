/* Softmax attention, bf16, head size 64, on Hopper's warpgroup products (sm_90a).
 *
 * The forms are those of softmax_attn_mma.cu: forward, dq kernel (which makes p.rows), dkv kernel.
 * A block has two warpgroups of 64 rows each (queries; keys in the dkv kernel). Columns come in
 * tiles of 64 through STAGES stages by the copy engine, one thread asking for a tile AHEAD of its
 * use; each stage has a barrier `full` that the bytes complete and a barrier `empty` that every
 * warp arrives at, so the warpgroups need not keep step: while one takes exponentials the other has
 * the tensor cores. The own rows are held in registers as operands, probabilities never leave them.
 * Products of the last tile that only add to results run on beside the next tile's first products.
 *
 * Floors as in softmax_attn_mma.cu, with the tensor cores at their full rate.
 */
#include "kernels/cuda/softmax_attn.h"
#include "kernels/cuda/tile.h"
#include "kernels/cuda/wgmma.h"

#define D       64
#define THREADS 256
#define ROWS    128 /* of a block */
#define COLS    64  /* of a tile */
#define STAGES  4
#define AHEAD   2
#define TILE    (COLS * D * (int)sizeof(bf16))
/* Own rows: two tiles for each of x, y (q; q, d_o; k, v). */
#define FWD_SMEM (1024 + (2 + 2 * STAGES) * TILE + (1 + 2 * STAGES) * 8)
#define BWD_SMEM (1024 + (4 + 2 * STAGES) * TILE + (1 + 2 * STAGES) * 8 + STAGES * COLS * 8)

/* Rows of 64 columns of one head as the copy engine sees them. */
struct maps {
    CUtensorMap q, k, v, d_o;
};

/* The launcher asks for this bound to learn whether a kernel was compiled for its device. */
#if defined(__CUDA_ARCH__) && !HAVE_WGMMA
#define BOUNDS(blocks) __launch_bounds__(2 * THREADS)
#else
#define BOUNDS(blocks) __launch_bounds__(THREADS, blocks)
#endif

/* What a query sees: every key; those up to its own; of these a window and the sinks. */
enum mask { ALL, CAUSAL, WINDOW };

#if HAVE_WGMMA
/* What all three kernels keep: stages, barriers, position. */
struct pipe {
    uint32_t x, y;        /* shared memory: STAGES tiles each */
    uint32_t full, empty; /* STAGES barriers each */
    int n;                /* tiles in all */
};
/* First stage of set-up; bar: 1 + 2 STAGES barriers, the first for the own rows. */
__device__ __forceinline__ void pipe_init(uint32_t bar)
{
    if (threadIdx.x == 0) {
        for (int i = 0; i < 1 + STAGES; i++) barrier_init(bar + 8 * i, 1);
        for (int i = 0; i < STAGES; i++) barrier_init(bar + 8 * (1 + STAGES + i), THREADS / 32);
        barrier_init_done();
    }
    __syncthreads();
}
/* Before tile i is filled (by one thread): its stage is free again. */
__device__ __forceinline__ void pipe_free(const struct pipe *p, int i)
{
    if (i >= STAGES) barrier_wait(p->empty + 8 * (i % STAGES), (i / STAGES - 1) & 1);
}
__device__ __forceinline__ void pipe_wait(const struct pipe *p, int i)
{
    barrier_wait(p->full + 8 * (i % STAGES), i / STAGES & 1);
}
/* This warp is done with tile i. */
__device__ __forceinline__ void pipe_release(const struct pipe *p, int i)
{
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(p->empty + 8 * (i % STAGES));
}
/* Rows of a warp from a tile in shared memory as operands. */
__device__ __forceinline__ void own_rows(uint32_t a[D / 16][4], uint32_t tile, int r0)
{
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) tile_a<D>(a[kk], tile, r0, kk);
}
__device__ __forceinline__ void clear(float c[D / 2])
{
#pragma unroll
    for (int i = 0; i < D / 2; i++) c[i] = 0.0f;
}
/* Tiles of keys that a block of queries passes over: those between the sinks and column *from. */
template <enum mask MASK>
__device__ __forceinline__ int gap_of(const struct attn *a, int t0, int *from)
{
    *from = MASK == WINDOW ? window_from(a, t0, COLS) : 0;
    return max(*from / COLS - (a->sinks + COLS - 1) / COLS, 0);
}
/* First key of the block's tile i. */
template <enum mask MASK> __device__ __forceinline__ int column(int i, int from, int gap)
{
    return MASK == WINDOW && (i + gap) * COLS >= from ? (i + gap) * COLS : i * COLS;
}
#endif

template <enum mask MASK>
static __global__ BOUNDS(2) void fwd_kernel(const __grid_constant__ struct attn a,
                                            const __grid_constant__ struct maps m)
{
#if HAVE_WGMMA
    extern __shared__ char raw[];
    char *smem = raw + (-smem_addr(raw) & 1023u);
    int tile, head, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    block_of(&a, (a.t + ROWS - 1) / ROWS, true, &tile, &head);
    int col = head % a.h * D, seq = head / a.h;
    int t0 = tile * ROWS, w0 = t0 + (warp >> 2) * 64; /* first query: block's, warpgroup's */
    int r0 = warp * 16;                               /* warp's, in the block */
    int keys = MASK ? min(t0 + ROWS, a.t) : a.t, from, gap = gap_of<MASK>(&a, t0, &from);
    uint32_t qs = smem_addr(smem), bar = qs + (2 + 2 * STAGES) * TILE;
    struct pipe pipe = {.x = qs + 2 * TILE,
                        .y = qs + (2 + STAGES) * TILE,
                        .full = bar + 8,
                        .empty = bar + 8 * (1 + STAGES),
                        .n = (keys + COLS - 1) / COLS - gap};
    auto fill = [&](int i) {
        pipe_free(&pipe, i);
        int s = i % STAGES, s0 = column<MASK>(i, from, gap);
        barrier_expect(pipe.full + 8 * s, 2 * TILE);
        bulk_tile(pipe.x + s * TILE, &m.k, col, s0, seq, pipe.full + 8 * s);
        bulk_tile(pipe.y + s * TILE, &m.v, col, s0, seq, pipe.full + 8 * s);
    };
    pipe_init(bar);
    if (threadIdx.x == 0) {
        barrier_expect(bar, 2 * TILE);
        bulk_tile(qs, &m.q, col, t0, seq, bar);
        bulk_tile(qs + TILE, &m.q, col, t0 + 64, seq, bar);
        for (int i = 0; i < min(AHEAD, pipe.n); i++) fill(i);
    }
    float out[1][D / 8][4], top[1][2], sum[1][2], by[1][2];
    clear(&out[0][0][0]);
    top[0][0] = top[0][1] = -INFINITY;
    sum[0][0] = sum[0][1] = 0.0f;
    uint32_t q[D / 16][4], p[1][COLS / 16][4];
    barrier_wait(bar, 0);
    own_rows(q, qs, r0);
    /* The warpgroup's tiles. The second may have one more: no tile replaces that. */
    int n = MASK ? min((w0 + 64) / COLS - gap, pipe.n) : pipe.n;
    auto step = [&](int i, bool first) __attribute__((always_inline))
    {
        int s0 = column<MASK>(i, from, gap), at = i % STAGES * TILE,
            before = (i + STAGES - 1) % STAGES * TILE;
        if (threadIdx.x == 0 && i + AHEAD < pipe.n) fill(i + AHEAD);
        __syncwarp();
        float s[1][COLS / 8][4];
        pipe_wait(&pipe, i);
        warpgroup_fence();
        wgmma_scores(&s[0][0][0], q, pipe.x + at);
        warpgroup_commit();
        if (!first) {
            wgmma_mix(&out[0][0][0], p[0], pipe.y + before, true);
            warpgroup_commit();
            warpgroup_wait<1>();
        } else {
            warpgroup_wait<0>();
        }
        wgmma_hold(&s[0][0][0]);
        bool whole = s0 + COLS <= a.t;
        if (MASK) whole = whole && s0 + COLS - 1 <= w0;
        if (MASK == WINDOW) whole = whole && w0 + 63 - s0 < a.window;
        if (!whole) {
#pragma unroll
            for (int nt = 0; nt < COLS / 8; nt++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int key = s0 + 8 * nt + 2 * (lane & 3) + (e & 1);
                    int query = t0 + r0 + 8 * (e >> 1) + (lane >> 2);
                    bool seen = key < a.t;
                    if (MASK) seen = seen && key <= query;
                    if (MASK == WINDOW) seen = seen && in_window(&a, query, key);
                    if (!seen) s[0][nt][e] = MASK == WINDOW ? UNSEEN : -INFINITY;
                }
        }
        tile_softmax<1, COLS>(s, top, sum, by, a.scale * LOG2E);
        if (!first) {
            warpgroup_wait<0>();
            wgmma_hold(&out[0][0][0]);
            pipe_release(&pipe, i - 1);
            tile_scale<D, 1>(out, by);
        }
        tile_pack<1, COLS>(p, s);
    };
    step(0, true);
    for (int i = 1; i < n; i++) step(i, false);
    warpgroup_fence();
    wgmma_mix(&out[0][0][0], p[0], pipe.y + (n - 1) % STAGES * TILE, true);
    warpgroup_commit();
    warpgroup_wait<0>();
    wgmma_hold(&out[0][0][0]);

#pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = quad_sum(sum[0][half]);
        int query = t0 + r0 + 8 * half + (lane >> 2);
        by[0][half] = 1.0f / total;
        if (a.lse && (lane & 3) == 0 && query < a.t)
            a.lse[(int64_t)head * a.t + query] = top[0][half] * a.scale + logf(total);
    }
    tile_put<D, 1>(smem, r0, out, by);
    __syncwarp();
    tile_store<D>(smem, r0, 16, (bf16 *)a.out + head_at(&a, head, a.ld_o) + (t0 + r0) * a.ld_o,
                  a.ld_o, a.t - t0 - r0, lane, 32);
#endif
}

template <enum mask MASK>
static __global__ BOUNDS(1) void dq_kernel(const __grid_constant__ struct attn a,
                                           const __grid_constant__ struct maps m)
{
#if HAVE_WGMMA
    extern __shared__ char raw[];
    char *smem = raw + (-smem_addr(raw) & 1023u);
    int tile, head, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    block_of(&a, (a.t + ROWS - 1) / ROWS, true, &tile, &head);
    int col = head % a.h * D, seq = head / a.h;
    int t0 = tile * ROWS, w0 = t0 + (warp >> 2) * 64; /* first query: block's, warpgroup's */
    int r0 = warp * 16;                               /* warp's, in the block */
    int keys = MASK ? min(t0 + ROWS, a.t) : a.t, from, gap = gap_of<MASK>(&a, t0, &from);
    uint32_t qs = smem_addr(smem), dos = qs + 2 * TILE, bar = qs + (4 + 2 * STAGES) * TILE;
    struct pipe pipe = {.x = qs + 4 * TILE,
                        .y = qs + (4 + STAGES) * TILE,
                        .full = bar + 8,
                        .empty = bar + 8 * (1 + STAGES),
                        .n = (keys + COLS - 1) / COLS - gap};
    auto fill = [&](int i) {
        pipe_free(&pipe, i);
        int s = i % STAGES, s0 = column<MASK>(i, from, gap);
        barrier_expect(pipe.full + 8 * s, 2 * TILE);
        bulk_tile(pipe.x + s * TILE, &m.k, col, s0, seq, pipe.full + 8 * s);
        bulk_tile(pipe.y + s * TILE, &m.v, col, s0, seq, pipe.full + 8 * s);
    };
    pipe_init(bar);
    if (threadIdx.x == 0) {
        barrier_expect(bar, 4 * TILE);
        for (int w = 0; w < 2; w++) {
            bulk_tile(qs + w * TILE, &m.q, col, t0 + 64 * w, seq, bar);
            bulk_tile(dos + w * TILE, &m.d_o, col, t0 + 64 * w, seq, bar);
        }
        for (int i = 0; i < min(AHEAD, pipe.n); i++) fill(i);
    }
    uint32_t q[D / 16][4], d_o[D / 16][4];
    barrier_wait(bar, 0);
    own_rows(q, qs, r0);
    own_rows(d_o, dos, r0);
    float lse[2], dot[2]; /* of the thread's two rows */
    float *rows = (float *)(a.rows + (int64_t)head * a.row_stride);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int r = r0 + 8 * half + (lane >> 2), t = t0 + r;
        float x = 0.0f;
        if (t < a.t) {
            /* A quad has a row; its threads take every fourth chunk. */
            const bf16 *o = (const bf16 *)a.o + head_at(&a, head, a.ld_o) + t * a.ld_o;
#pragma unroll
            for (int c = lane & 3; c < D / 8; c += 4) {
                uint4 u = *(const uint4 *)(o + c * 8);
                uint4 w = *(const uint4 *)(smem + 2 * TILE + tile_at<D>(r, c));
                const uint32_t *us = (const uint32_t *)&u, *ws = (const uint32_t *)&w;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float2 f = unpack_bf16(us[j]), g = unpack_bf16(ws[j]);
                    x = fmaf(f.x, g.x, fmaf(f.y, g.y, x));
                }
            }
        }
        dot[half] = quad_sum(x);
        /* Rows past the end have zeros: they add nothing to dK and dV. */
        lse[half] = t < a.t ? a.lse[(int64_t)head * a.t + t] * LOG2E : 0.0f;
        if ((lane & 3) == 0) *(float2 *)(rows + 2 * t) = make_float2(lse[half], dot[half]);
    }
    float dq[1][D / 8][4];
    uint32_t packed[1][COLS / 16][4]; /* dS */
    clear(&dq[0][0][0]);
    /* The warpgroup's tiles. The second may have one more: no tile replaces that. */
    int n = MASK ? min((w0 + 64) / COLS - gap, pipe.n) : pipe.n;
    auto step = [&](int i, bool first) __attribute__((always_inline))
    {
        int s0 = column<MASK>(i, from, gap), at = i % STAGES * TILE,
            before = (i + STAGES - 1) % STAGES * TILE;
        if (threadIdx.x == 0 && i + AHEAD < pipe.n) fill(i + AHEAD);
        __syncwarp();
        float p[1][COLS / 8][4], ds[1][COLS / 8][4];
        pipe_wait(&pipe, i);
        warpgroup_fence();
        wgmma_scores(&p[0][0][0], q, pipe.x + at);
        warpgroup_commit();
        wgmma_scores(&ds[0][0][0], d_o, pipe.y + at);
        warpgroup_commit();
        if (!first) {
            wgmma_mix(&dq[0][0][0], packed[0], pipe.x + before, true);
            warpgroup_commit();
            warpgroup_wait<2>();
        } else {
            warpgroup_wait<1>();
        }
        wgmma_hold(&p[0][0][0]);
#pragma unroll
        for (int nt = 0; nt < COLS / 8; nt++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                p[0][nt][e] = tile_prob(p[0][nt][e], a.scale * LOG2E, lse[e >> 1]);
        warpgroup_wait<0>();
        wgmma_hold(&ds[0][0][0]);
        wgmma_hold(&dq[0][0][0]);
        if (!first) pipe_release(&pipe, i - 1);
        bool whole = !MASK || s0 + COLS - 1 <= w0;
        if (MASK == WINDOW) whole = whole && w0 + 63 - s0 < a.window;
#pragma unroll
        for (int nt = 0; nt < COLS / 8; nt++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int key = s0 + 8 * nt + 2 * (lane & 3) + (e & 1);
                int query = t0 + r0 + 8 * (e >> 1) + (lane >> 2);
                bool seen = whole || key <= query;
                if (MASK == WINDOW) seen = whole || (key <= query && in_window(&a, query, key));
                ds[0][nt][e] = seen ? p[0][nt][e] * (ds[0][nt][e] - dot[e >> 1]) : 0.0f;
            }
        tile_pack<1, COLS>(packed, ds);
    };
    step(0, true);
    for (int i = 1; i < n; i++) step(i, false);
    warpgroup_fence();
    wgmma_mix(&dq[0][0][0], packed[0], pipe.x + (n - 1) % STAGES * TILE, true);
    warpgroup_commit();
    warpgroup_wait<0>();
    wgmma_hold(&dq[0][0][0]);
    float by[1][2] = {{a.scale, a.scale}};
    tile_put<D, 1>(smem, r0, dq, by);
    __syncwarp();
    tile_store<D>(smem, r0, 16, (bf16 *)a.dq + head_at(&a, head, a.ld) + (t0 + r0) * a.ld, a.ld,
                  a.t - t0 - r0, lane, 32);
#endif
}

template <enum mask MASK>
static __global__ BOUNDS(1) void dkv_kernel(const __grid_constant__ struct attn a,
                                            const __grid_constant__ struct maps m)
{
#if HAVE_WGMMA
    extern __shared__ char raw[];
    char *smem = raw + (-smem_addr(raw) & 1023u);
    int tile, head, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    block_of(&a, (a.t + ROWS - 1) / ROWS, false, &tile, &head);
    int col = head % a.h * D, seq = head / a.h;
    int s0 = tile * ROWS, w0 = s0 + (warp >> 2) * 64; /* first key: block's, warpgroup's */
    int r0 = warp * 16;                               /* warp's, in the block */
    int first = MASK ? s0 : 0;                        /* query */
    int last = MASK == WINDOW ? window_end(&a, s0, ROWS) : a.t;
    uint32_t ks = smem_addr(smem), vs = ks + 2 * TILE, bar = ks + (4 + 2 * STAGES) * TILE;
    struct pipe pipe = {.x = ks + 4 * TILE,
                        .y = ks + (4 + STAGES) * TILE,
                        .full = bar + 8,
                        .empty = bar + 8 * (1 + STAGES),
                        .n = (last - first + COLS - 1) / COLS};
    const float2 *rows = (const float2 *)(smem + (4 + 2 * STAGES) * TILE);
    bar += STAGES * COLS * 8, pipe.full += STAGES * COLS * 8, pipe.empty += STAGES * COLS * 8;
    auto fill = [&](int i) {
        pipe_free(&pipe, i);
        int s = i % STAGES, t0 = first + i * COLS;
        barrier_expect(pipe.full + 8 * s, 2 * TILE + COLS * 8);
        bulk_tile(pipe.x + s * TILE, &m.q, col, t0, seq, pipe.full + 8 * s);
        bulk_tile(pipe.y + s * TILE, &m.d_o, col, t0, seq, pipe.full + 8 * s);
        bulk_bytes(smem_addr(rows + s * COLS), a.rows + (int64_t)head * a.row_stride + t0, COLS * 8,
                   pipe.full + 8 * s);
    };
    pipe_init(bar);
    if (threadIdx.x == 0) {
        barrier_expect(bar, 4 * TILE);
        for (int w = 0; w < 2; w++) {
            bulk_tile(ks + w * TILE, &m.k, col, s0 + 64 * w, seq, bar);
            bulk_tile(vs + w * TILE, &m.v, col, s0 + 64 * w, seq, bar);
        }
        for (int i = 0; i < min(AHEAD, pipe.n); i++) fill(i);
    }
    uint32_t k[D / 16][4], v[D / 16][4];
    barrier_wait(bar, 0);
    own_rows(k, ks, r0);
    own_rows(v, vs, r0);
    float dk[1][D / 8][4], dv[1][D / 8][4];
    uint32_t packed[1][COLS / 16][4], packed_ds[1][COLS / 16][4];
    clear(&dk[0][0][0]);
    clear(&dv[0][0][0]);
    auto step = [&](int i, bool start) __attribute__((always_inline))
    {
        int t0 = first + i * COLS, at = i % STAGES * TILE;
        int before = (i + STAGES - 1) % STAGES * TILE;
        const float4 *x = (const float4 *)(rows + i % STAGES * COLS);
        if (threadIdx.x == 0 && i + AHEAD < pipe.n) fill(i + AHEAD);
        __syncwarp();
        float p[1][COLS / 8][4], ds[1][COLS / 8][4];
        pipe_wait(&pipe, i);
        warpgroup_fence();
        wgmma_scores(&p[0][0][0], k, pipe.x + at);
        warpgroup_commit();
        wgmma_scores(&ds[0][0][0], v, pipe.y + at);
        warpgroup_commit();
        if (!start) {
            wgmma_mix(&dk[0][0][0], packed_ds[0], pipe.x + before, true);
            warpgroup_commit();
            warpgroup_wait<2>();
        } else {
            warpgroup_wait<1>();
        }
        wgmma_hold(&p[0][0][0]);
        bool whole = !MASK || t0 >= w0 + 63;
        if (MASK == WINDOW) whole = whole && t0 + COLS - 1 - w0 < a.window;
#pragma unroll
        for (int nt = 0; nt < COLS / 8; nt++) {
            float4 y = x[4 * nt + (lane & 3)]; /* (lse, D) of two queries */
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int query = t0 + 8 * nt + 2 * (lane & 3) + (e & 1);
                int key = s0 + r0 + 8 * (e >> 1) + (lane >> 2);
                bool seen = whole || key <= query;
                if (MASK == WINDOW) seen = whole || (key <= query && in_window(&a, query, key));
                float pe = tile_prob(p[0][nt][e], a.scale * LOG2E, e & 1 ? y.z : y.x);
                p[0][nt][e] = seen ? pe : 0.0f;
            }
        }
        tile_pack<1, COLS>(packed, p);
        warpgroup_fence();
        wgmma_mix(&dv[0][0][0], packed[0], pipe.y + at, !start);
        warpgroup_commit();
        if (!start)
            warpgroup_wait<2>();
        else
            warpgroup_wait<1>();
        wgmma_hold(&ds[0][0][0]);
#pragma unroll
        for (int nt = 0; nt < COLS / 8; nt++) {
            float4 y = x[4 * nt + (lane & 3)];
#pragma unroll
            for (int e = 0; e < 4; e++)
                ds[0][nt][e] = p[0][nt][e] * (ds[0][nt][e] - (e & 1 ? y.w : y.y));
        }
        warpgroup_wait<0>();
        wgmma_hold(&dv[0][0][0]);
        if (!start) {
            wgmma_hold(&dk[0][0][0]);
            pipe_release(&pipe, i - 1);
        }
        tile_pack<1, COLS>(packed_ds, ds);
    };
    /* Tiles wholly before the second warpgroup's keys. The first one asks for tiles. */
    int begin = MASK ? (w0 - first) / COLS : 0;
    for (int i = 0; i < begin; i++) {
        pipe_wait(&pipe, i);
        pipe_release(&pipe, i);
    }
    if (begin < pipe.n) {
        step(begin, true);
        for (int i = begin + 1; i < pipe.n; i++) step(i, false);
        warpgroup_fence();
        wgmma_mix(&dk[0][0][0], packed_ds[0], pipe.x + (pipe.n - 1) % STAGES * TILE, true);
        warpgroup_commit();
        warpgroup_wait<0>();
        wgmma_hold(&dk[0][0][0]);
    }
    float by_k[1][2] = {{a.scale, a.scale}}, by_v[1][2] = {{1.0f, 1.0f}};
    tile_put<D, 1>(smem, r0, dk, by_k);
    tile_put<D, 1>(smem + 2 * TILE, r0, dv, by_v);
    __syncwarp();
    int64_t at = head_at(&a, head, a.ld) + (s0 + r0) * a.ld;
    tile_store<D>(smem, r0, 16, (bf16 *)a.dk + at, a.ld, a.t - s0 - r0, lane, 32);
    tile_store<D>(smem + 2 * TILE, r0, 16, (bf16 *)a.dv + at, a.ld, a.t - s0 - r0, lane, 32);
#endif
}

/* ---- launches ------------------------------------------------------------------------------- */

typedef void kernel(const struct attn, const struct maps);

bool srf__attn_wgmma_takes(const struct srf_ctx *ctx, int64_t d)
{
    struct cudaFuncAttributes f;
    return d == D && cuda_of(ctx)->cc == 90 &&
           cudaFuncGetAttributes(&f, (const void *)fwd_kernel<CAUSAL>) == cudaSuccess &&
           f.maxThreadsPerBlock == THREADS;
}

static srf_status make_map(CUtensorMap *map, const void *p, const struct attn *a, int64_t ld)
{
    return srf__tile_map(map, p, a->heads / a->h, a->t, a->h, ld, COLS);
}

static srf_status launch(struct srf_ctx *ctx, const struct attn *a, const struct maps *m, kernel *f,
                         int smem)
{
    CUDA_TRY(cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    f<<<(unsigned)(div_up(a->t, ROWS) * a->heads), THREADS, smem, stream_of(ctx)>>>(*a, *m);
    return srf__cuda_launched("softmax_attn");
}

static enum mask mask_of(const struct attn *a, bool causal)
{
    return !causal ? ALL : a->window < a->t ? WINDOW : CAUSAL;
}

srf_status srf__attn_wgmma_fwd(struct srf_ctx *ctx, const struct attn *a, bool causal)
{
    static kernel *const kernels[] = {fwd_kernel<ALL>, fwd_kernel<CAUSAL>, fwd_kernel<WINDOW>};
    struct maps m;
    SRF_TRY(make_map(&m.q, a->q, a, a->ld));
    SRF_TRY(make_map(&m.k, a->k, a, a->ld));
    SRF_TRY(make_map(&m.v, a->v, a, a->ld));
    m.d_o = m.q; /* not used */
    return launch(ctx, a, &m, kernels[mask_of(a, causal)], FWD_SMEM);
}

srf_status srf__attn_wgmma_bwd(struct srf_ctx *ctx, const struct attn *a, bool causal)
{
    static kernel *const dq[] = {dq_kernel<ALL>, dq_kernel<CAUSAL>, dq_kernel<WINDOW>};
    static kernel *const dkv[] = {dkv_kernel<ALL>, dkv_kernel<CAUSAL>, dkv_kernel<WINDOW>};
    enum mask mask = mask_of(a, causal);
    struct maps m;
    SRF_TRY(make_map(&m.q, a->q, a, a->ld));
    SRF_TRY(make_map(&m.k, a->k, a, a->ld));
    SRF_TRY(make_map(&m.v, a->v, a, a->ld));
    SRF_TRY(make_map(&m.d_o, a->d_o, a, a->ld_o));
    SRF_TRY(launch(ctx, a, &m, dq[mask], BWD_SMEM));
    return launch(ctx, a, &m, dkv[mask], BWD_SMEM);
}
