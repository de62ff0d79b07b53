/* Softmax attention, bf16 on tensor cores (mma.sync), head sizes 32, 64, 80, 96, 128.
 *
 * Forward: a block has 128 queries, a warp 32 of them; keys and values come in tiles, the next on
 * its way while the current one is worked on; online softmax (arXiv 2307.08691). Probabilities
 * never leave registers: the accumulators of Q K^T are the operand of P V.
 *
 * Backward: no sum crosses blocks, so results do not depend on timing. With p.rows = (lse, D) of
 * each query, lse in log2 units and D_t = d_o_t.o_t,
 *     dq kernel   a block has queries, loops over keys:    dS = P (dO V^T - D),   dQ = dS K scale;
 *                 it also makes p.rows
 *     dkv kernel  a block has keys, loops over queries:    dV = P^T dO,   dK = dS^T Q scale
 * P is made twice: 7 products instead of 5. The other way, adding to dQ across blocks in order,
 * writes and reads fp32 dQ once per tile of keys: at 128 keys 8 bytes for 10 * 128 flops, which is
 * more time in L2 than two products take.
 *
 * Work of the floor: 4 d flops per pair forward, 10 d backward (14 d done here). At B = 32, H = 12,
 * T = 1024, d = 64, causal, a H100 needs 52 us and 130 us for them at its peak, of which mma.sync
 * reaches some 60 %; bytes are 60 and 120 us, exponentials 56 us.
 */
#include "kernels/cuda/softmax_attn.h"
#include "kernels/cuda/tile.h"

#define THREADS 128
#define WARPS   (THREADS / 32)

/* ---- forward -------------------------------------------------------------------------------- */

#define FWD_MT   2 /* a warp has 16 FWD_MT queries */
#define FWD_ROWS (16 * FWD_MT * WARPS)
/* Keys in a tile: as many as registers allow. */
__host__ __device__ constexpr int fwd_keys(int d)
{
    return d <= 64 ? 64 : 32;
}
/* Q, and two stages of K and V. */
template <int D> constexpr size_t fwd_smem()
{
    return (size_t)(FWD_ROWS + 4 * fwd_keys(D)) * D * sizeof(bf16);
}

template <int D, bool CAUSAL>
static __global__ __launch_bounds__(THREADS, 2) void fwd_kernel(const struct attn a)
{
    constexpr int KEYS = fwd_keys(D), TILE = KEYS * D * (int)sizeof(bf16);
    extern __shared__ __align__(128) char smem[];
    int tile, head, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    block_of(&a, (a.t + FWD_ROWS - 1) / FWD_ROWS, true, &tile, &head);
    int64_t in = head_at(&a, head, a.ld);
    const bf16 *k = (const bf16 *)a.k + in, *v = (const bf16 *)a.v + in;
    int t0 = tile * FWD_ROWS, w0 = t0 + warp * 16 * FWD_MT; /* first query: block's, warp's */
    int keys = CAUSAL ? min(t0 + FWD_ROWS, a.t) : a.t;
    int from = CAUSAL ? window_from(&a, t0, KEYS) : 0, first = a.sinks ? 0 : from;
    uint32_t qs = smem_addr(smem), ks = qs + FWD_ROWS * D * (int)sizeof(bf16), vs = ks + 2 * TILE;

    tile_load<D, FWD_ROWS, THREADS>(qs, (const bf16 *)a.q + in + t0 * a.ld, a.ld, a.t - t0);
    tile_load<D, KEYS, THREADS>(ks, k + first * a.ld, a.ld, a.t - first);
    tile_load<D, KEYS, THREADS>(vs, v + first * a.ld, a.ld, a.t - first);
    cp_async_commit();
    float out[FWD_MT][D / 8][4], top[FWD_MT][2], sum[FWD_MT][2], by[FWD_MT][2];
#pragma unroll
    for (int mt = 0; mt < FWD_MT; mt++) {
#pragma unroll
        for (int nt = 0; nt < D / 8; nt++)
#pragma unroll
            for (int e = 0; e < 4; e++) out[mt][nt][e] = 0.0f;
        top[mt][0] = top[mt][1] = -INFINITY;
        sum[mt][0] = sum[mt][1] = 0.0f;
    }
    for (int s0 = first, next, stage = 0; s0 < keys; s0 = next, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads(); /* this stage is here, and everyone is done with the other */
        next = CAUSAL ? next_tile(&a, from, s0, KEYS) : s0 + KEYS;
        if (next < keys) {
            int64_t at = (int64_t)next * a.ld;
            uint32_t to = (uint32_t)((stage ^ 1) * TILE);
            tile_load<D, KEYS, THREADS>(ks + to, k + at, a.ld, a.t - next);
            tile_load<D, KEYS, THREADS>(vs + to, v + at, a.ld, a.t - next);
            cp_async_commit();
        }
        if (CAUSAL && s0 > w0 + 16 * FWD_MT - 1) continue;
        float s[FWD_MT][KEYS / 8][4];
        tile_scores<D, FWD_MT, KEYS>(s, qs, w0 - t0, ks + stage * TILE, 0);
        bool whole = !CAUSAL || (s0 + KEYS - 1 <= w0 && w0 + 16 * FWD_MT - 1 - s0 < a.window);
        if (s0 + KEYS > a.t || !whole) {
#pragma unroll
            for (int mt = 0; mt < FWD_MT; mt++)
#pragma unroll
                for (int nt = 0; nt < KEYS / 8; nt++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int key = s0 + 8 * nt + 2 * (lane & 3) + (e & 1);
                        int query = w0 + 16 * mt + 8 * (e >> 1) + (lane >> 2);
                        bool seen = key < a.t;
                        if (CAUSAL) seen = seen && key <= query && in_window(&a, query, key);
                        if (!seen) s[mt][nt][e] = UNSEEN;
                    }
        }
        tile_softmax<FWD_MT, KEYS>(s, top, sum, by, a.scale * LOG2E);
        tile_scale<D, FWD_MT>(out, by);
        uint32_t p[FWD_MT][KEYS / 16][4];
        tile_pack<FWD_MT, KEYS>(p, s);
        tile_mix<D, FWD_MT, KEYS>(out, p, vs + stage * TILE, 0);
    }

#pragma unroll
    for (int mt = 0; mt < FWD_MT; mt++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = quad_sum(sum[mt][half]);
            int query = w0 + 16 * mt + 8 * half + (lane >> 2);
            by[mt][half] = 1.0f / total;
            if (a.lse && (lane & 3) == 0 && query < a.t)
                a.lse[(int64_t)head * a.t + query] = top[mt][half] * a.scale + logf(total);
        }
    __syncwarp(); /* the rows held queries that all lanes read */
    tile_put<D, FWD_MT>(smem, w0 - t0, out, by);
    __syncwarp();
    tile_store<D>(smem, w0 - t0, 16 * FWD_MT,
                  (bf16 *)a.out + head_at(&a, head, a.ld_o) + w0 * a.ld_o, a.ld_o, a.t - w0, lane,
                  32);
}

/* ---- backward ------------------------------------------------------------------------------- */

/* A warp has 16 mt rows: as many as registers allow, most of them for dK and dV. */
__host__ __device__ constexpr int bwd_mt(int d)
{
    return d <= 64 ? 2 : 1;
}
__host__ __device__ constexpr int bwd_rows(int d)
{
    return 16 * WARPS * bwd_mt(d);
}
/* Columns: in a tile, and multiplied at a time. */
__host__ __device__ constexpr int bwd_cols(int d)
{
    return d <= 64 ? 64 : 32;
}
#define STEP 32
/* Two tiles of rows, two stages of two tiles of columns, (lse, D) of the queries. */
template <int D> constexpr size_t bwd_smem()
{
    return (size_t)(2 * bwd_rows(D) + 4 * bwd_cols(D)) * D * sizeof(bf16) +
           (size_t)max(bwd_rows(D), 2 * bwd_cols(D)) * sizeof(float2);
}

template <int D, bool CAUSAL>
static __global__ __launch_bounds__(THREADS, 2) void dq_kernel(const struct attn a)
{
    constexpr int MT = bwd_mt(D), ROWS = bwd_rows(D), KEYS = bwd_cols(D);
    constexpr int TILE = KEYS * D * (int)sizeof(bf16), OWN = ROWS * D * (int)sizeof(bf16);
    extern __shared__ __align__(128) char smem[];
    float2 *rows = (float2 *)(smem + 2 * OWN + 4 * TILE);
    int tile, head, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    block_of(&a, (a.t + ROWS - 1) / ROWS, true, &tile, &head);
    int64_t in = head_at(&a, head, a.ld);
    const bf16 *k = (const bf16 *)a.k + in, *v = (const bf16 *)a.v + in;
    int t0 = tile * ROWS, w0 = t0 + warp * 16 * MT;
    int keys = CAUSAL ? min(t0 + ROWS, a.t) : a.t;
    int from = CAUSAL ? window_from(&a, t0, KEYS) : 0, first = a.sinks ? 0 : from;
    int64_t at_o = head_at(&a, head, a.ld_o) + t0 * a.ld_o;
    uint32_t qs = smem_addr(smem), dos = qs + OWN, ks = dos + OWN, vs = ks + 2 * TILE;

    tile_load<D, ROWS, THREADS>(qs, (const bf16 *)a.q + in + t0 * a.ld, a.ld, a.t - t0);
    tile_load<D, ROWS, THREADS>(dos, (const bf16 *)a.d_o + at_o, a.ld_o, a.t - t0);
    cp_async_commit();
    tile_load<D, KEYS, THREADS>(ks, k + first * a.ld, a.ld, a.t - first);
    tile_load<D, KEYS, THREADS>(vs, v + first * a.ld, a.ld, a.t - first);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    for (int r = threadIdx.x; r < ROWS; r += THREADS) {
        float2 x = make_float2(0.0f, 0.0f); /* of rows past the end: harmless */
        if (t0 + r < a.t) {
            const bf16 *o = (const bf16 *)a.o + at_o + r * a.ld_o;
            int64_t row = (int64_t)head * a.t + t0 + r;
#pragma unroll
            for (int c = 0; c < D / 8; c++) {
                uint4 u = *(const uint4 *)(o + c * 8);
                uint4 w = *(const uint4 *)(smem + OWN + tile_at<D>(r, c));
                const uint32_t *us = (const uint32_t *)&u, *ws = (const uint32_t *)&w;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float2 f = unpack_bf16(us[i]), g = unpack_bf16(ws[i]);
                    x.y = fmaf(f.x, g.x, fmaf(f.y, g.y, x.y));
                }
            }
            x.x = a.lse[row] * LOG2E;
            a.rows[(int64_t)head * a.row_stride + t0 + r] = x;
        }
        rows[r] = x;
    }

    float dq[MT][D / 8][4], by[MT][2];
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
#pragma unroll
        for (int nt = 0; nt < D / 8; nt++)
#pragma unroll
            for (int e = 0; e < 4; e++) dq[mt][nt][e] = 0.0f;
        by[mt][0] = by[mt][1] = a.scale;
    }
    for (int s0 = first, next, stage = 0; s0 < keys; s0 = next, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads(); /* this stage is here, and everyone is done with the other */
        next = CAUSAL ? next_tile(&a, from, s0, KEYS) : s0 + KEYS;
        if (next < keys) {
            int64_t at = (int64_t)next * a.ld;
            uint32_t to = (uint32_t)((stage ^ 1) * TILE);
            tile_load<D, KEYS, THREADS>(ks + to, k + at, a.ld, a.t - next);
            tile_load<D, KEYS, THREADS>(vs + to, v + at, a.ld, a.t - next);
            cp_async_commit();
        }
#pragma unroll 1
        for (int u = 0; u < KEYS; u += STEP) {
            int s1 = s0 + u;
            if (s1 >= keys || (CAUSAL && s1 > w0 + 16 * MT - 1)) break;
            float p[MT][STEP / 8][4], ds[MT][STEP / 8][4];
            tile_scores<D, MT, STEP>(p, qs, w0 - t0, ks + stage * TILE, u);
            tile_scores<D, MT, STEP>(ds, dos, w0 - t0, vs + stage * TILE, u);
            bool whole = !CAUSAL || (s1 + STEP - 1 <= w0 && w0 + 16 * MT - 1 - s1 < a.window);
#pragma unroll
            for (int mt = 0; mt < MT; mt++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int r = w0 - t0 + 16 * mt + 8 * half + (lane >> 2);
                    float2 x = rows[r];
#pragma unroll
                    for (int nt = 0; nt < STEP / 8; nt++)
#pragma unroll
                        for (int e = 2 * half; e < 2 * half + 2; e++) {
                            int key = s1 + 8 * nt + 2 * (lane & 3) + (e & 1);
                            float pe = tile_prob(p[mt][nt][e], a.scale * LOG2E, x.x);
                            bool seen = whole || (key <= t0 + r && in_window(&a, t0 + r, key));
                            ds[mt][nt][e] = seen ? pe * (ds[mt][nt][e] - x.y) : 0.0f;
                        }
                }
            uint32_t packed[MT][STEP / 16][4];
            tile_pack<MT, STEP>(packed, ds);
            tile_mix<D, MT, STEP>(dq, packed, ks + stage * TILE, u);
        }
    }
    __syncwarp();
    tile_put<D, MT>(smem, w0 - t0, dq, by);
    __syncwarp();
    tile_store<D>(smem, w0 - t0, 16 * MT, (bf16 *)a.dq + in + w0 * a.ld, a.ld, a.t - w0, lane, 32);
}

template <int D, bool CAUSAL>
static __global__ __launch_bounds__(THREADS, 2) void dkv_kernel(const struct attn a)
{
    constexpr int MT = bwd_mt(D), ROWS = bwd_rows(D), COLS = bwd_cols(D);
    constexpr int TILE = COLS * D * (int)sizeof(bf16), OWN = ROWS * D * (int)sizeof(bf16);
    extern __shared__ __align__(128) char smem[];
    const float2 *cols = (const float2 *)(smem + 2 * OWN + 4 * TILE);
    int tile, head, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    block_of(&a, (a.t + ROWS - 1) / ROWS, false, &tile, &head);
    int64_t in = head_at(&a, head, a.ld);
    const bf16 *q = (const bf16 *)a.q + in;
    const bf16 *d_o = (const bf16 *)a.d_o + head_at(&a, head, a.ld_o);
    const float2 *rows = a.rows + (int64_t)head * a.row_stride;
    int s0 = tile * ROWS, w0 = s0 + warp * 16 * MT; /* first key: block's, warp's */
    int first = CAUSAL ? s0 / COLS * COLS : 0;      /* query */
    int last = CAUSAL ? window_end(&a, s0, ROWS) : a.t;
    uint32_t ks = smem_addr(smem), vs = ks + OWN, qs = vs + OWN, dos = qs + 2 * TILE;
    uint32_t xs = dos + 2 * TILE;

    tile_load<D, ROWS, THREADS>(ks, (const bf16 *)a.k + in + s0 * a.ld, a.ld, a.t - s0);
    tile_load<D, ROWS, THREADS>(vs, (const bf16 *)a.v + in + s0 * a.ld, a.ld, a.t - s0);
    tile_load<D, COLS, THREADS>(qs, q + first * a.ld, a.ld, a.t - first);
    tile_load<D, COLS, THREADS>(dos, d_o + first * a.ld_o, a.ld_o, a.t - first);
    if (threadIdx.x < COLS) {
        int t = first + (int)threadIdx.x;
        cp_async_8(xs + threadIdx.x * 8, rows + (t < a.t ? t : 0), t < a.t);
    }
    cp_async_commit();
    float dk[MT][D / 8][4], dv[MT][D / 8][4], by_k[MT][2], by_v[MT][2];
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
#pragma unroll
        for (int nt = 0; nt < D / 8; nt++)
#pragma unroll
            for (int e = 0; e < 4; e++) dk[mt][nt][e] = dv[mt][nt][e] = 0.0f;
        by_k[mt][0] = by_k[mt][1] = a.scale;
        by_v[mt][0] = by_v[mt][1] = 1.0f;
    }
    for (int t0 = first, stage = 0; t0 < last; t0 += COLS, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads(); /* this stage is here, and everyone is done with the other */
        if (t0 + COLS < last) {
            int next = t0 + COLS, to = stage ^ 1, t = next + (int)threadIdx.x;
            tile_load<D, COLS, THREADS>(qs + to * TILE, q + next * a.ld, a.ld, a.t - next);
            tile_load<D, COLS, THREADS>(dos + to * TILE, d_o + next * a.ld_o, a.ld_o, a.t - next);
            if (threadIdx.x < COLS)
                cp_async_8(xs + (to * COLS + threadIdx.x) * 8, rows + (t < a.t ? t : 0), t < a.t);
            cp_async_commit();
        }
#pragma unroll 1
        for (int u = 0; u < COLS; u += STEP) {
            int t1 = t0 + u;
            if (t1 >= last) break;
            if (CAUSAL && t1 + STEP - 1 < w0) continue;
            float p[MT][STEP / 8][4], ds[MT][STEP / 8][4];
            uint32_t packed[MT][STEP / 16][4];
            bool whole = !CAUSAL || (t1 >= w0 + 16 * MT - 1 && t1 + STEP - 1 - w0 < a.window);
            tile_scores<D, MT, STEP>(p, ks, w0 - s0, qs + stage * TILE, u);
#pragma unroll
            for (int nt = 0; nt < STEP / 8; nt++) {
                int c = 8 * nt + 2 * (lane & 3);
                float4 x = *(const float4 *)&cols[stage * COLS + u + c];
#pragma unroll
                for (int mt = 0; mt < MT; mt++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int key = w0 + 16 * mt + 8 * (e >> 1) + (lane >> 2);
                        float pe = tile_prob(p[mt][nt][e], a.scale * LOG2E, e & 1 ? x.z : x.x);
                        int query = t1 + c + (e & 1);
                        bool seen = whole || (key <= query && in_window(&a, query, key));
                        p[mt][nt][e] = seen ? pe : 0.0f;
                    }
            }
            tile_pack<MT, STEP>(packed, p);
            tile_mix<D, MT, STEP>(dv, packed, dos + stage * TILE, u);
            tile_scores<D, MT, STEP>(ds, vs, w0 - s0, dos + stage * TILE, u);
#pragma unroll
            for (int nt = 0; nt < STEP / 8; nt++) {
                int c = 8 * nt + 2 * (lane & 3);
                float4 x = *(const float4 *)&cols[stage * COLS + u + c];
#pragma unroll
                for (int mt = 0; mt < MT; mt++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        ds[mt][nt][e] = p[mt][nt][e] * (ds[mt][nt][e] - (e & 1 ? x.w : x.y));
            }
            tile_pack<MT, STEP>(packed, ds);
            tile_mix<D, MT, STEP>(dk, packed, qs + stage * TILE, u);
        }
    }
    __syncwarp();
    tile_put<D, MT>(smem, w0 - s0, dk, by_k);
    tile_put<D, MT>(smem + OWN, w0 - s0, dv, by_v);
    __syncwarp();
    tile_store<D>(smem, w0 - s0, 16 * MT, (bf16 *)a.dk + in + w0 * a.ld, a.ld, a.t - w0, lane, 32);
    tile_store<D>(smem + OWN, w0 - s0, 16 * MT, (bf16 *)a.dv + in + w0 * a.ld, a.ld, a.t - w0, lane,
                  32);
}

/* ---- launches ------------------------------------------------------------------------------- */

typedef void kernel(const struct attn);

static srf_status launch(struct srf_ctx *ctx, const struct attn *a, kernel *f, int rows,
                         size_t smem)
{
    CUDA_TRY(cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
    f<<<(unsigned)(div_up(a->t, rows) * a->heads), THREADS, smem, stream_of(ctx)>>>(*a);
    return srf__cuda_launched("softmax_attn");
}

template <int D> static srf_status fwd(struct srf_ctx *ctx, const struct attn *a, bool causal)
{
    return launch(ctx, a, causal ? fwd_kernel<D, true> : fwd_kernel<D, false>, FWD_ROWS,
                  fwd_smem<D>());
}
template <int D> static srf_status bwd(struct srf_ctx *ctx, const struct attn *a, bool causal)
{
    SRF_TRY(launch(ctx, a, causal ? dq_kernel<D, true> : dq_kernel<D, false>, bwd_rows(D),
                   bwd_smem<D>()));
    return launch(ctx, a, causal ? dkv_kernel<D, true> : dkv_kernel<D, false>, bwd_rows(D),
                  bwd_smem<D>());
}

srf_status srf__attn_mma_fwd(struct srf_ctx *ctx, const struct attn *a, bool causal)
{
    switch (a->d) {
    case 32:
        return fwd<32>(ctx, a, causal);
    case 64:
        return fwd<64>(ctx, a, causal);
    case 80:
        return fwd<80>(ctx, a, causal);
    case 96:
        return fwd<96>(ctx, a, causal);
    default:
        return fwd<128>(ctx, a, causal);
    }
}
srf_status srf__attn_mma_bwd(struct srf_ctx *ctx, const struct attn *a, bool causal)
{
    switch (a->d) {
    case 32:
        return bwd<32>(ctx, a, causal);
    case 64:
        return bwd<64>(ctx, a, causal);
    case 80:
        return bwd<80>(ctx, a, causal);
    case 96:
        return bwd<96>(ctx, a, causal);
    default:
        return bwd<128>(ctx, a, causal);
    }
}
