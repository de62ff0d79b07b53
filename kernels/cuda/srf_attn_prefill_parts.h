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
    /* (rows, h, D), (rows, h): numerators; denominators and r. Of the features before these; NULL:
     * all are done at once. */
    float2 *num, *den;
    int64_t ld, ld_o;
    int t, h, m, n_sets, window;
    int first, count;      /* features [first, first + count) */
    int n_seg, seg_chunks; /* segments, chunks in each */
    float scale;           /* d^(-1/4) */
    uint32_t limit;        /* the clamp of q and k, twice bf16 */
};

/* srf_attn_prefill_window.cu: blocks of segments; keys of the caller's into the rings, where they
 * are in segments. */
srf_status srf__prefill_window(struct srf_ctx *ctx, const struct prefill *p, int64_t heads);
srf_status srf__prefill_window_totals(struct srf_ctx *ctx, const struct prefill *p, int64_t heads);

#ifdef __CUDACC__
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
    if (w.pos >= 4 * CHUNK) w.pos = 2 * CHUNK + w.pos % (2 * CHUNK);
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

/* The state before the first chunk: the caller's, or what the prefixes left. */
static __device__ __forceinline__ void read_state(struct pure_state<D> *st, const struct prefill &p,
                                                  const struct work &w, int f0, int pair)
{
    if (p.sums) {
        pure_state_start(st, true, 1, segment_state(p, w), f0, pair);
        return;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const bool there = f0 + 8 * i < p.count;
        const int f = p.first + (there ? f0 + 8 * i : 0);
        const char *s = state_row(p, w.slot, f);
        const float *z = state_z(p, w.slot, f);
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            float2 x = make_float2(0, 0);
            if (there)
                x = p.state_bf16 ? unpack_bf16(((const uint32_t *)s)[4 * j + pair])
                                 : ((const float2 *)s)[4 * j + pair];
            st->s[j][2 * i] = x.x;
            st->s[j][2 * i + 1] = x.y;
        }
        st->z[i] = there ? z[0] : 0.0f;
        st->top[i] = st->z[i] != 0.0f ? z[p.m] : SRF__UNSET;
    }
}
/* In the pure form no feature of a sequence with tokens is unset; in the hybrid z = 0 says so. */
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
        for (int j = 0; j < D / 8; j++) {
            float x = st->s[j][2 * i], y = st->s[j][2 * i + 1];
            if (p.state_bf16)
                ((uint32_t *)s)[4 * j + pair] = pack_bf16(x, y);
            else
                ((float2 *)s)[4 * j + pair] = make_float2(x, y);
        }
        if (pair == 0) {
            z[0] = st->z[i];
            z[p.m] = st->z[i] != 0.0f ? st->top[i] : 0.0f;
        }
    }
}

#if HAVE_WGMMA
/* ---- shared memory --------------------------------------------------------------------------- */

/* Behind the tiles. Two of what is given out, in turns. */
struct prefill_small {
    float half[4][64]; /* log2(e) |y|^2 / 2 of the keys of chunks c % 4 */
    float bias[64];    /* log2(e) times the caller's */
    float top[2][64];  /* bias + M */
    bf16 z[2][2][64];  /* z as a sum of two */
    int piece[2];      /* rows lo + 256 hi of a chunk */
    uint64_t full[2], empty[2];
};

template <int id> static __device__ __forceinline__ void group_barrier()
{
    asm volatile("bar.sync %0, %1;" ::"n"(id), "n"(GROUP) : "memory");
}
template <int id> static __device__ __forceinline__ bool group_any(bool x)
{
    uint32_t any;
    asm volatile("{\n"
                 ".reg .pred p, q;\n"
                 "setp.ne.b32 p, %1, 0;\n"
                 "bar.red.or.pred q, %2, %3, p;\n"
                 "selp.u32 %0, 1, 0, q;\n"
                 "}\n"
                 : "=r"(any)
                 : "r"((uint32_t)x), "n"(id), "n"(GROUP)
                 : "memory");
    return any;
}
/* This thread of a warpgroup has filled, or emptied, what is given out as number i. All arrive: a
 * checker of races does not see what a warp's barrier orders. */
static __device__ __forceinline__ void arrive(uint64_t barrier[2], int i)
{
    barrier_arrive(smem_addr(&barrier[i & 1]));
}
static __device__ __forceinline__ void wait_full(struct prefill_small *sm, int i)
{
    barrier_wait(smem_addr(&sm->full[i & 1]), i >> 1 & 1);
}
/* Before number i is filled: what was there two before has been emptied. */
static __device__ __forceinline__ void wait_empty(struct prefill_small *sm, int i)
{
    if (i >= 2) barrier_wait(smem_addr(&sm->empty[i & 1]), (i >> 1 & 1) ^ 1);
}

/* W, biases, barriers; by all threads of the block. */
template <int threads>
static __device__ __forceinline__ void start_block(const struct prefill &p, const struct work &w,
                                                   struct prefill_small *sm, uint32_t w_tile)
{
    const int64_t row = (p.n_sets == 1 ? 0 : (int64_t)w.head * p.m) + p.first;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            barrier_init(smem_addr(&sm->full[i]), GROUP);
            barrier_init(smem_addr(&sm->empty[i]), GROUP);
        }
        barrier_init_done();
    }
    load_tile<D, threads>(w_tile, p.w + row * D, D, 64, p.count, threadIdx.x);
    cp_async_commit();
    for (int f = threadIdx.x; f < 64; f += threads)
        sm->bias[f] = f < p.count ? SRF__LOG2E * p.bias[row + f] : -INFINITY;
    cp_async_wait<0>();
    async_fence();
    __syncthreads();
}

/* a = x tile^T */
static __device__ __forceinline__ void products(float a[32], const uint32_t x[4][4], uint32_t tile)
{
    warpgroup_fence();
    wgmma_scores(a, x, tile);
    warpgroup_commit();
    warpgroup_wait<0>();
    wgmma_hold(a);
}

/* ---- keys ------------------------------------------------------------------------------------ */

/* half of the rows whose pieces this thread has loaded (load_tile), which have arrived; infinite,
 * weight 0, from row n on. They are clamped in place. */
static __device__ __forceinline__ void own_norms(uint32_t k_tile, float *half,
                                                 const struct prefill &p, int n, int tid)
{
    const int row = tid / 8, piece = tid % 8;
    const uint32_t first = k_tile + tile_at<D>(row, piece);
    const float most = SRF__X_LIMIT / p.scale;
#pragma unroll
    for (int i = 0; i < CHUNK / 16; i++) {
        const uint32_t addr = first + i * 16 * D * 2;
        uint32_t x[4];
        asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(addr)
                     : "memory");
        float sum = sum_squares(x[0]) + sum_squares(x[1]) + sum_squares(x[2]) + sum_squares(x[3]);
        if (sum > most * most) {
            sum = 0;
            for (int j = 0; j < 4; j++) {
                x[j] = clamp_bf16(x[j], p.limit);
                store_shared(addr + 4 * j, x[j]);
                sum += sum_squares(x[j]);
            }
        }
        __syncwarp();
#pragma unroll
        for (int o = 1; o < 8; o <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
        sum *= 0.5f * SRF__LOG2E * p.scale * p.scale;
        if (sum > SRF__HALF_LIMIT) sum = SRF__HALF_LIMIT;
        if (piece == 0) half[row + 16 * i] = row + 16 * i < n ? sum : INFINITY;
    }
}

/* Exponents of a chunk's keys for this thread's two features: a. Rows outside [lo, hi) have no
 * weight. */
static __device__ __forceinline__ void key_exponents(float a[32], uint32_t w_tile, uint32_t k_tile,
                                                     const float *half, const float bias[2],
                                                     float to_log2, int lo, int hi)
{
    const int lane = threadIdx.x & 31, pair = lane & 3;
    uint32_t w[4][4];
#pragma unroll
    for (int kk = 0; kk < 4; kk++) load_a<D>(w[kk], w_tile + (threadIdx.x >> 5) * 32 * D, kk, lane);
    products(a, w, k_tile);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float2 sub = *(const float2 *)(half + 8 * j + 2 * pair);
#pragma unroll
        for (int e = 0; e < 4; e++)
            a[4 * j + e] = fmaf(a[4 * j + e], to_log2, bias[e >> 1] - (e & 1 ? sub.y : sub.x));
    }
    if (hi - lo == CHUNK) return;
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int token = 8 * j + 2 * pair + (e & 1);
            if (token < lo || token >= hi) a[4 * j + e] = -INFINITY;
        }
}

/* M with these keys, of rows lo on; false: their weights differ by more than SPREAD. */
static __device__ __forceinline__ bool key_tops(struct pure_keys *keys,
                                                const struct pure_state<D> *st, const float a[32],
                                                int lo, int pair)
{
    bool fits = true;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float most = -INFINITY, first = a[2 * i];
#pragma unroll
        for (int j = 0; j < 8; j++)
            most = fmaxf(most, fmaxf(a[4 * j + 2 * i], a[4 * j + 2 * i + 1]));
        if (lo > 0) {
            first = -INFINITY;
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (8 * j + 2 * pair + e == lo) first = a[4 * j + 2 * i + e];
        }
        first = __shfl_sync(0xffffffffu, first, (threadIdx.x & 28) | (lo >> 1 & 3));
        keys->top[i] = fmaxf(st->top[i], ceilf(quad_max(most)));
        keys->step[i] = exp2_fast(st->top[i] - keys->top[i]);
        if (fmaxf(st->top[i], first) < keys->top[i] - SPREAD) fits = false;
    }
    return fits;
}

static __device__ __forceinline__ void
key_weights(struct pure_keys *keys, const struct pure_state<D> *st, const float a[32])
{
    float sum[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t kf = pack_bf16(exp2_fast(a[4 * j + 2 * i] - keys->top[i]),
                                    exp2_fast(a[4 * j + 2 * i + 1] - keys->top[i]));
            float2 rounded = unpack_bf16(kf);
            keys->kf[j][i] = kf;
            sum[i] += rounded.x + rounded.y;
        }
#pragma unroll
    for (int i = 0; i < 2; i++) keys->z[i] = fmaf(st->z[i], keys->step[i], quad_sum(sum[i]));
}

/* S += kf V; z and M too. */
static __device__ __forceinline__ void state_add(struct pure_state<D> *st,
                                                 const struct pure_keys *keys, uint32_t v_tile)
{
    uint32_t kf[4][4];
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
#pragma unroll
        for (int i = 0; i < 4; i++) kf[kk][i] = keys->kf[2 * kk + (i >> 1)][i & 1];
    /* M soon stands still. */
    if (__any_sync(0xffffffffu, keys->step[0] != 1.0f || keys->step[1] != 1.0f))
        scale_rows(st->s, keys->step[0], keys->step[1]);
    warpgroup_fence();
    wgmma_mix(&st->s[0][0], kf, v_tile, true);
    warpgroup_commit();
    warpgroup_wait<0>();
    wgmma_hold(&st->s[0][0]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        st->z[i] = keys->z[i];
        st->top[i] = keys->top[i];
    }
}

/* S and z times `step`, and top, in buffer i for the queries. */
static __device__ __forceinline__ void publish_state(const struct pure_state<D> *st,
                                                     const float step[2], const float top[2],
                                                     uint32_t s_tile, struct prefill_small *sm,
                                                     int i, int f0, int pair)
{
    const uint32_t s = s_tile + tile_at<D>(f0, 0) + 4 * pair;
#pragma unroll
    for (int k = 0; k < 2; k++) {
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            store_shared(tile_on<D>(s, j) + k * 16 * D,
                         pack_bf16(st->s[j][2 * k] * step[k], st->s[j][2 * k + 1] * step[k]));
        if (pair == 0) {
            const float z = st->z[k] * step[k];
            const bf16 most = __float2bfloat16_rn(z);
            sm->top[i][f0 + 8 * k] = top[k];
            sm->z[i][0][f0 + 8 * k] = most;
            sm->z[i][1][f0 + 8 * k] = __float2bfloat16_rn(z - __bfloat162float(most));
        }
    }
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
/* den += sums of weights, a product with a column of ones. */
static __device__ __forceinline__ void add_ones(float den[4], const uint32_t weight[4][4], int lane)
{
    const uint32_t ones = lane < 4 ? 0x3f803f80u : 0;
#pragma unroll
    for (int kk = 0; kk < 4; kk++) mma_bf16(den, weight[kk], ones, ones);
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
/* num / sums of rows lo .. hi - 1 of chunk c to the output, through the tile they came from; or,
 * with r, to where the next features find them. */
static __device__ __forceinline__ void give_rows(const struct prefill &p, const struct work &w,
                                                 int c, float (&num)[D / 8][4], const float sums[4],
                                                 float r[2], uint32_t tile, int warp, int lo,
                                                 int hi, int lane)
{
    const int row = 16 * warp + (lane >> 2), pair = lane & 3;
    float den[2] = {__shfl_sync(0xffffffffu, sums[0] + sums[1], lane & ~3),
                    __shfl_sync(0xffffffffu, sums[2] + sums[3], lane & ~3)};
    const bool last = p.first + p.count == p.m;
    for (int i = 0; i < 2 && p.num; i++) {
        const int64_t at = (w.first + c * CHUNK + row + 8 * i) * p.h + w.head;
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
    scale_rows(num, 1.0f / den[0], 1.0f / den[1]);
    store_rows<D>(p.o + (w.first + c * CHUNK) * p.ld_o + w.head * D, p.ld_o, num, tile, warp, lo,
                  hi, lane);
}
#endif
#endif
