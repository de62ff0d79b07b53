/* Attention with trained feature maps, bf16 on tensor cores (mma.sync): heads of 64, 64 or 128
 * features, windows of whole tiles, so that a tile of 64 keys is near or far for all rows of a warp
 * at once. The forms of softmax_attn_mma.cu with two kinds of tiles:
 *
 *     forward     far tiles first: weights f.g as they are, summed; then the row is brought to log
 *                 scale, and near tiles go on as online softmax
 *     dq kernel   far: df += (d_o.v - D) g / den;      near: dS = P (d_o.v - D), dq += dS k
 *                 it also makes a.rows
 *     dkv kernel  far: dv += P d_o, dg += (d_o.v - D) f / den;    near: dv += P d_o, dk += dS q
 *
 * No sum crosses blocks. As fast as softmax attention on mma.sync, which is enough for comparisons.
 */
#include "kernels/cuda/map_attn.h"
#include "kernels/cuda/tile.h"

#define D        64
#define THREADS  128
#define WARPS    (THREADS / 32)
#define COLS     64                             /* of a tile */
#define ROWS     (16 * WARPS)                   /* of a block of backward */
#define STEP     32                             /* columns multiplied at a time there */
#define TILE     (COLS * D * (int)sizeof(bf16)) /* 64 rows of q, k, v, o */
#define FTILE    (COLS * M * (int)sizeof(bf16)) /* of features */
#define FWD_MT   2
#define FWD_ROWS (16 * FWD_MT * WARPS)
/* Own rows, and two stages of x, features, y. */
template <int M> constexpr size_t fwd_smem()
{
    return (size_t)FWD_ROWS * (D + M) * sizeof(bf16) + 2 * (2 * TILE + FTILE);
}
template <int M> constexpr size_t bwd_smem()
{
    return (size_t)3 * (2 * TILE + FTILE) + 2 * COLS * sizeof(float2);
}

/* First key of the near tiles of query t; without a window there are none. */
static __device__ __forceinline__ int near_from(const struct map_attn *a, int t)
{
    return a->window ? map_near(a, t) : INT32_MAX;
}
static __device__ __forceinline__ void block_of(const struct map_attn *a, int rows, bool backwards,
                                                int *r0, int *head)
{
    int tiles = (a->t + rows - 1) / rows, tile = (int)blockIdx.x / a->heads;
    *head = (int)blockIdx.x % a->heads;
    *r0 = (backwards ? tiles - 1 - tile : tile) * rows;
}
template <int N> static __device__ __forceinline__ void clear(float (*c)[4])
{
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) c[i][e] = 0.0f;
}
/* Accumulators of 16 rows, `valid` of them there, as floats to rows of M. */
template <int M>
static __device__ __forceinline__ void store_floats(float *to, const float c[M / 8][4], int valid)
{
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int r = 8 * half + (lane >> 2);
        if (r >= valid) continue;
#pragma unroll
        for (int nt = 0; nt < M / 8; nt++)
            *(float2 *)(to + r * M + 8 * nt + 2 * (lane & 3)) =
                make_float2(c[nt][2 * half], c[nt][2 * half + 1]);
    }
}

template <int M>
static __global__ __launch_bounds__(THREADS, 2) void mma_fwd_kernel(const struct map_attn a)
{
    extern __shared__ __align__(128) char smem[];
    int t0, head, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    block_of(&a, FWD_ROWS, true, &t0, &head);
    int64_t in = map_head_at(&a, head, a.ld), at = (int64_t)head * a.t * M;
    const bf16 *k = (const bf16 *)a.k + in, *v = (const bf16 *)a.v + in;
    const bf16 *fk = (const bf16 *)a.fk + at;
    int w0 = t0 + warp * 16 * FWD_MT, keys = min(t0 + FWD_ROWS, a.t), near = near_from(&a, w0);
    int first_near = near_from(&a, t0), last_near = near_from(&a, keys - 1);
    uint32_t qs = smem_addr(smem), fqs = qs + FWD_ROWS * D * (int)sizeof(bf16);
    uint32_t ks = fqs + FWD_ROWS * M * (int)sizeof(bf16), fks = ks + 2 * TILE;
    uint32_t vs = fks + 2 * FTILE;
    auto load = [&](int s0, int stage) {
        int64_t row = (int64_t)s0 * a.ld;
        if (s0 >= first_near)
            tile_load<D, COLS, THREADS>(ks + stage * TILE, k + row, a.ld, a.t - s0);
        if (s0 < last_near)
            tile_load<M, COLS, THREADS>(fks + stage * FTILE, fk + (int64_t)s0 * M, M, a.t - s0);
        tile_load<D, COLS, THREADS>(vs + stage * TILE, v + row, a.ld, a.t - s0);
        cp_async_commit();
    };
    tile_load<D, FWD_ROWS, THREADS>(qs, (const bf16 *)a.q + in + t0 * a.ld, a.ld, a.t - t0);
    tile_load<M, FWD_ROWS, THREADS>(fqs, (const bf16 *)a.fq + at + (int64_t)t0 * M, M, a.t - t0);
    load(0, 0);
    float out[FWD_MT][D / 8][4], top[FWD_MT][2], sum[FWD_MT][2], by[FWD_MT][2];
#pragma unroll
    for (int mt = 0; mt < FWD_MT; mt++) {
        clear<D / 8>(out[mt]);
        top[mt][0] = top[mt][1] = -INFINITY;
        sum[mt][0] = sum[mt][1] = 0.0f;
    }
    for (int s0 = 0, stage = 0; s0 < keys; s0 += COLS, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads(); /* this stage is here, and everyone is done with the other */
        if (s0 + COLS < keys) load(s0 + COLS, stage ^ 1);
        if (s0 > w0 + 16 * FWD_MT - 1) continue;
        float s[FWD_MT][COLS / 8][4];
        bool far = s0 < near, whole = s0 + COLS - 1 <= w0;
        if (far)
            tile_scores<M, FWD_MT, COLS>(s, fqs, w0 - t0, fks + stage * FTILE, 0);
        else
            tile_scores<D, FWD_MT, COLS>(s, qs, w0 - t0, ks + stage * TILE, 0);
        if (!whole) {
#pragma unroll
            for (int mt = 0; mt < FWD_MT; mt++)
#pragma unroll
                for (int nt = 0; nt < COLS / 8; nt++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int key = s0 + 8 * nt + 2 * (lane & 3) + (e & 1);
                        int query = w0 + 16 * mt + 8 * (e >> 1) + (lane >> 2);
                        if (key > query) s[mt][nt][e] = far ? 0.0f : -INFINITY;
                    }
        }
        if (far) {
#pragma unroll
            for (int mt = 0; mt < FWD_MT; mt++)
#pragma unroll
                for (int nt = 0; nt < COLS / 8; nt++)
#pragma unroll
                    for (int e = 0; e < 4; e++) sum[mt][e >> 1] += s[mt][nt][e];
        } else {
            if (s0 == near) {
                /* What is far has the weight e^(top scale) from here on. */
#pragma unroll
                for (int mt = 0; mt < FWD_MT; mt++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        float f = quad_sum(sum[mt][half]);
                        by[mt][half] = f > 0.0f ? 1.0f / f : 0.0f;
                        top[mt][half] = f > 0.0f ? logf(f) / a.scale : -INFINITY;
                        sum[mt][half] *= by[mt][half];
                    }
                tile_scale<D, FWD_MT>(out, by);
            }
            tile_softmax<FWD_MT, COLS>(s, top, sum, by, a.scale * LOG2E);
            tile_scale<D, FWD_MT>(out, by);
        }
        uint32_t p[FWD_MT][COLS / 16][4];
        tile_pack<FWD_MT, COLS>(p, s);
        tile_mix<D, FWD_MT, COLS>(out, p, vs + stage * TILE, 0);
    }
#pragma unroll
    for (int mt = 0; mt < FWD_MT; mt++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = quad_sum(sum[mt][half]) + (a.window ? 0.0f : MAP_EPS);
            int query = w0 + 16 * mt + 8 * half + (lane >> 2);
            by[mt][half] = 1.0f / total;
            if (a.stat && (lane & 3) == 0 && query < a.t)
                a.stat[(int64_t)head * a.t + query] =
                    (a.window ? top[mt][half] * a.scale : 0.0f) + logf(total);
        }
    __syncwarp(); /* the rows held queries that all lanes read */
    tile_put<D, FWD_MT>(smem, w0 - t0, out, by);
    __syncwarp();
    tile_store<D>(smem, w0 - t0, 16 * FWD_MT,
                  (bf16 *)a.out + map_head_at(&a, head, a.ld_o) + w0 * a.ld_o, a.ld_o, a.t - w0,
                  lane, 32);
}

/* ---- backward ------------------------------------------------------------------------------- */

/* 1 / denominator from its logarithm in log2 units; one below e^-80 counts as that. */
static __device__ __forceinline__ float over(float stat)
{
    return exp2_fast(stat < -80.0f * LOG2E ? 80.0f * LOG2E : -stat);
}

template <int M>
static __global__ __launch_bounds__(THREADS, 2) void mma_dq_kernel(const struct map_attn a)
{
    extern __shared__ __align__(128) char smem[];
    int t0, head, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    block_of(&a, ROWS, true, &t0, &head);
    int64_t in = map_head_at(&a, head, a.ld), at = (int64_t)head * a.t * M;
    const bf16 *k = (const bf16 *)a.k + in, *v = (const bf16 *)a.v + in;
    const bf16 *fk = (const bf16 *)a.fk + at;
    int r0 = warp * 16, w0 = t0 + r0, keys = min(t0 + ROWS, a.t), near = near_from(&a, t0);
    int64_t at_o = map_head_at(&a, head, a.ld_o) + t0 * a.ld_o;
    uint32_t qs = smem_addr(smem), dos = qs + TILE;
    uint32_t ks = dos + TILE, fks = ks + 2 * TILE, vs = fks + 2 * FTILE;
    auto load = [&](int s0, int stage) {
        int64_t row = (int64_t)s0 * a.ld;
        if (s0 >= near)
            tile_load<D, COLS, THREADS>(ks + stage * TILE, k + row, a.ld, a.t - s0);
        else
            tile_load<M, COLS, THREADS>(fks + stage * FTILE, fk + (int64_t)s0 * M, M, a.t - s0);
        tile_load<D, COLS, THREADS>(vs + stage * TILE, v + row, a.ld, a.t - s0);
        cp_async_commit();
    };
    tile_load<D, ROWS, THREADS>(qs, (const bf16 *)a.q + in + t0 * a.ld, a.ld, a.t - t0);
    tile_load<D, ROWS, THREADS>(dos, (const bf16 *)a.d_o + at_o, a.ld_o, a.t - t0);
    load(0, 0);
    cp_async_wait<0>();
    __syncthreads();
    float stat[2], dot[2], den[2]; /* of the thread's two rows */
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int r = r0 + 8 * half + (lane >> 2), t = t0 + r;
        float x = 0.0f;
        if (t < a.t) {
            /* A quad has a row; its threads take every fourth chunk. */
            const bf16 *o = (const bf16 *)a.o + at_o + r * a.ld_o;
#pragma unroll
            for (int c = lane & 3; c < D / 8; c += 4) {
                uint4 u = *(const uint4 *)(o + c * 8);
                uint4 w = *(const uint4 *)(smem + TILE + tile_at<D>(r, c));
                const uint32_t *us = (const uint32_t *)&u, *ws = (const uint32_t *)&w;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float2 f = unpack_bf16(us[i]), g = unpack_bf16(ws[i]);
                    x = fmaf(f.x, g.x, fmaf(f.y, g.y, x));
                }
            }
        }
        dot[half] = quad_sum(x);
        stat[half] = t < a.t ? a.stat[(int64_t)head * a.t + t] * LOG2E : 0.0f;
        den[half] = over(stat[half]);
        if ((lane & 3) == 0 && t < a.t)
            a.rows[(int64_t)head * a.row_stride + t] = make_float2(stat[half], dot[half]);
    }
    float dq[1][D / 8][4], df[1][M / 8][4];
    clear<D / 8>(dq[0]);
    clear<M / 8>(df[0]);
    for (int s0 = 0, stage = 0; s0 < keys; s0 += COLS, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads(); /* this stage is here, and everyone is done with the other */
        if (s0 + COLS < keys) load(s0 + COLS, stage ^ 1);
#pragma unroll 1
        for (int u = 0; u < COLS; u += STEP) {
            int s1 = s0 + u;
            if (s1 > w0 + 15) break;
            float p[1][STEP / 8][4], ds[1][STEP / 8][4];
            uint32_t packed[1][STEP / 16][4];
            bool far = s0 < near;
            if (!far) tile_scores<D, 1, STEP>(p, qs, r0, ks + stage * TILE, u);
            tile_scores<D, 1, STEP>(ds, dos, r0, vs + stage * TILE, u);
#pragma unroll
            for (int nt = 0; nt < STEP / 8; nt++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int key = s1 + 8 * nt + 2 * (lane & 3) + (e & 1);
                    bool seen = key <= w0 + 8 * (e >> 1) + (lane >> 2);
                    float pe =
                        far ? den[e >> 1] : tile_prob(p[0][nt][e], a.scale * LOG2E, stat[e >> 1]);
                    ds[0][nt][e] = seen ? pe * (ds[0][nt][e] - dot[e >> 1]) : 0.0f;
                }
            tile_pack<1, STEP>(packed, ds);
            if (far)
                tile_mix<M, 1, STEP>(df, packed, fks + stage * FTILE, u);
            else
                tile_mix<D, 1, STEP>(dq, packed, ks + stage * TILE, u);
        }
    }
    float by[1][2] = {{a.scale, a.scale}};
    store_floats<M>(a.dfq + at + (int64_t)w0 * M, df[0], a.t - w0);
    __syncwarp();
    tile_put<D, 1>(smem, r0, dq, by);
    __syncwarp();
    tile_store<D>(smem, r0, 16, (bf16 *)a.dq + in + w0 * a.ld, a.ld, a.t - w0, lane, 32);
}

template <int M>
static __global__ __launch_bounds__(THREADS, 2) void mma_dkv_kernel(const struct map_attn a)
{
    extern __shared__ __align__(128) char smem[];
    const float2 *cols = (const float2 *)(smem + 3 * (2 * TILE + FTILE));
    int s0, head, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    block_of(&a, ROWS, false, &s0, &head);
    int64_t in = map_head_at(&a, head, a.ld), at = (int64_t)head * a.t * M;
    const bf16 *q = (const bf16 *)a.q + in, *fq = (const bf16 *)a.fq + at;
    const bf16 *d_o = (const bf16 *)a.d_o + map_head_at(&a, head, a.ld_o);
    const float2 *rows = a.rows + (int64_t)head * a.row_stride;
    int r0 = warp * 16, w0 = s0 + r0;
    uint32_t ks = smem_addr(smem), fks = ks + TILE, vs = fks + FTILE;
    uint32_t qs = vs + TILE, fqs = qs + 2 * TILE, dos = fqs + 2 * FTILE, xs = dos + 2 * TILE;
    auto load = [&](int t0, int stage) {
        int t = t0 + (int)threadIdx.x;
        if (s0 >= near_from(&a, t0))
            tile_load<D, COLS, THREADS>(qs + stage * TILE, q + t0 * a.ld, a.ld, a.t - t0);
        else
            tile_load<M, COLS, THREADS>(fqs + stage * FTILE, fq + (int64_t)t0 * M, M, a.t - t0);
        tile_load<D, COLS, THREADS>(dos + stage * TILE, d_o + t0 * a.ld_o, a.ld_o, a.t - t0);
        if (threadIdx.x < COLS)
            cp_async_8(xs + (stage * COLS + threadIdx.x) * 8, rows + (t < a.t ? t : 0), t < a.t);
        cp_async_commit();
    };
    tile_load<D, ROWS, THREADS>(ks, (const bf16 *)a.k + in + s0 * a.ld, a.ld, a.t - s0);
    tile_load<M, ROWS, THREADS>(fks, (const bf16 *)a.fk + at + (int64_t)s0 * M, M, a.t - s0);
    tile_load<D, ROWS, THREADS>(vs, (const bf16 *)a.v + in + s0 * a.ld, a.ld, a.t - s0);
    load(s0, 0);
    float dk[1][D / 8][4], df[1][M / 8][4], dv[1][D / 8][4];
    clear<D / 8>(dk[0]);
    clear<M / 8>(df[0]);
    clear<D / 8>(dv[0]);
    for (int t0 = s0, stage = 0; t0 < a.t; t0 += COLS, stage ^= 1) {
        bool far = s0 < near_from(&a, t0);
        cp_async_wait<0>();
        __syncthreads(); /* this stage is here, and everyone is done with the other */
        if (t0 + COLS < a.t) load(t0 + COLS, stage ^ 1);
#pragma unroll 1
        for (int u = 0; u < COLS; u += STEP) {
            int t1 = t0 + u;
            if (t1 >= a.t) break;
            if (t1 + STEP - 1 < w0) continue;
            float p[1][STEP / 8][4], ds[1][STEP / 8][4];
            uint32_t packed[1][STEP / 16][4];
            if (far)
                tile_scores<M, 1, STEP>(p, fks, r0, fqs + stage * FTILE, u);
            else
                tile_scores<D, 1, STEP>(p, ks, r0, qs + stage * TILE, u);
            tile_scores<D, 1, STEP>(ds, vs, r0, dos + stage * TILE, u);
#pragma unroll
            for (int nt = 0; nt < STEP / 8; nt++) {
                int c = 8 * nt + 2 * (lane & 3);
                float4 x = *(const float4 *)&cols[stage * COLS + u + c]; /* of two queries */
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float stat = e & 1 ? x.z : x.x, dot = e & 1 ? x.w : x.y;
                    bool seen = w0 + 8 * (e >> 1) + (lane >> 2) <= t1 + c + (e & 1);
                    float den = far ? over(stat) : 0.0f;
                    float pe =
                        far ? p[0][nt][e] * den : tile_prob(p[0][nt][e], a.scale * LOG2E, stat);
                    p[0][nt][e] = seen ? pe : 0.0f;
                    ds[0][nt][e] = seen ? (far ? den : pe) * (ds[0][nt][e] - dot) : 0.0f;
                }
            }
            tile_pack<1, STEP>(packed, p);
            tile_mix<D, 1, STEP>(dv, packed, dos + stage * TILE, u);
            tile_pack<1, STEP>(packed, ds);
            if (far)
                tile_mix<M, 1, STEP>(df, packed, fqs + stage * FTILE, u);
            else
                tile_mix<D, 1, STEP>(dk, packed, qs + stage * TILE, u);
        }
    }
    float by_k[1][2] = {{a.scale, a.scale}}, by_v[1][2] = {{1.0f, 1.0f}};
    char *to_v = smem + TILE + FTILE;
    store_floats<M>(a.dfk + at + (int64_t)w0 * M, df[0], a.t - w0);
    __syncwarp();
    tile_put<D, 1>(smem, r0, dk, by_k);
    tile_put<D, 1>(to_v, r0, dv, by_v);
    __syncwarp();
    tile_store<D>(smem, r0, 16, (bf16 *)a.dk + in + w0 * a.ld, a.ld, a.t - w0, lane, 32);
    tile_store<D>(to_v, r0, 16, (bf16 *)a.dv + in + w0 * a.ld, a.ld, a.t - w0, lane, 32);
}

/* ---- launches ------------------------------------------------------------------------------- */

typedef void kernel(const struct map_attn);

static srf_status launch(struct srf_ctx *ctx, const struct map_attn *a, kernel *f, int rows,
                         size_t smem)
{
    CUDA_TRY(cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
    f<<<(unsigned)(div_up(a->t, rows) * a->heads), THREADS, smem, stream_of(ctx)>>>(*a);
    return srf__cuda_launched("map_attn");
}
template <int M> static srf_status bwd(struct srf_ctx *ctx, const struct map_attn *a)
{
    SRF_TRY(launch(ctx, a, mma_dq_kernel<M>, ROWS, bwd_smem<M>()));
    return launch(ctx, a, mma_dkv_kernel<M>, ROWS, bwd_smem<M>());
}

static bool aligned(const void *p, int64_t ld)
{
    return (uintptr_t)p % 16 == 0 && ld % 8 == 0;
}

/* Of forward and backward: one does what the other has begun. */
static size_t smem_most(int m)
{
    size_t fwd = m == 64 ? fwd_smem<64>() : fwd_smem<128>();
    size_t bwd = m == 64 ? bwd_smem<64>() : bwd_smem<128>();
    return fwd > bwd ? fwd : bwd;
}

bool srf__map_mma_takes(const struct srf_ctx *ctx, const struct map_attn *a)
{
    return ctx->dtype == SRF_BF16 && a->d == D && (a->m == 64 || a->m == 128) &&
           smem_most(a->m) <= cuda_of(ctx)->smem_max && a->window % COLS == 0 &&
           aligned(a->q, a->ld) && aligned(a->k, a->ld) && aligned(a->v, a->ld) &&
           aligned(a->o, a->ld_o) && aligned(a->out, a->ld_o) && aligned(a->d_o, a->ld_o) &&
           aligned(a->dq, a->ld) && aligned(a->dk, a->ld) && aligned(a->dv, a->ld);
}
srf_status srf__map_mma_fwd(struct srf_ctx *ctx, const struct map_attn *a)
{
    return a->m == 64 ? launch(ctx, a, mma_fwd_kernel<64>, FWD_ROWS, fwd_smem<64>())
                      : launch(ctx, a, mma_fwd_kernel<128>, FWD_ROWS, fwd_smem<128>());
}
srf_status srf__map_mma_bwd(struct srf_ctx *ctx, const struct map_attn *a)
{
    return a->m == 64 ? bwd<64>(ctx, a) : bwd<128>(ctx, a);
}
