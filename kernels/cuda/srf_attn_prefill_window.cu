/* Prefill of the window hybrid with blocks of 64 tokens: see srf_attn_prefill.cu, and for the forms
 * srf_attn_hybrid.cu. Chunks are the blocks: the queries of block c see blocks c - 1 and c exactly,
 * older ones through the state. The keys' warpgroup gives out the state of the blocks up to c - 2
 * with the tiles of block c, and then takes block c - 1 in if block c is complete, as the
 * recurrent form does. Denominators have exact terms: no block has to be cut.
 *
 * The exact terms go with the first 64 features. Rows of positions before the call come from the
 * ring; the last 128 rows go there in the end.
 *
 * Floor: as the pure form's.
 */
#include "kernels/cuda/srf_attn_prefill_parts.h"

/* Shared memory: tiles of blocks c - 2 to c + 1, the queries being at most one behind. */
enum {
    AT_W = 0,
    AT_K = AT_W + TILE,     /* 4 */
    AT_V = AT_K + 4 * TILE, /* 4 */
    AT_Q = AT_V + 4 * TILE, /* 2 */
    AT_S = AT_Q + 2 * TILE, /* 2 */
    AT_SMALL = AT_S + 2 * TILE,
    SMEM = AT_SMALL + 4096
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
/* As load_tile: rows of block c, from the ring where they are older than the call, zeros behind its
 * end. */
static __device__ __forceinline__ void load_keys(uint32_t tile, const bf16 *rows, int part,
                                                 const struct prefill &p, const struct work &w,
                                                 int c, int tid)
{
    const int piece = tid % 8;
    const bf16 *src = rows + (w.first + c * CHUNK) * p.ld + w.head * D + 8 * piece;
#pragma unroll
    for (int i = 0; i < CHUNK / 16; i++) {
        const int row = tid / 8 + 16 * i, at = c * CHUNK + row;
        const uint32_t to = tile + tile_at<D>(row, piece);
        if (at >= w.pos) {
            cp_async_16(to, src + row * p.ld, at < w.stop);
            continue;
        }
        const char *from = ring_piece(p, w.slot, part, at % RING, piece);
        uint4 x;
        if (p.state_bf16) {
            x = *(const uint4 *)from;
        } else {
            const float4 a = ((const float4 *)from)[0], b = ((const float4 *)from)[1];
            x = make_uint4(pack_bf16(a.x, a.y), pack_bf16(a.z, a.w), pack_bf16(b.x, b.y),
                           pack_bf16(b.z, b.w));
        }
        asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(x.x), "r"(x.y),
                     "r"(x.z), "r"(x.w)
                     : "memory");
    }
}

/* The first warpgroup. */
template <bool totals>
static __device__ __forceinline__ void keys_role(const struct prefill &p, const struct work &w,
                                                 uint32_t base, struct prefill_small *sm)
{
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, pair = lane & 3;
    const int f0 = 16 * warp + (lane >> 2);
    const float to_log2 = SRF__LOG2E * p.scale, log2_m = log2f((float)p.m), same[2] = {1, 1};
    auto load_block = [&](int c) {
        load_keys(base + AT_K + (c & 3) * TILE, p.k, 0, p, w, c, tid);
        load_keys(base + AT_V + (c & 3) * TILE, p.v, 1, p, w, c, tid);
    };
    auto norms = [&](int c) {
        own_norms(base + AT_K + (c & 3) * TILE, sm->half[c & 3], p, w.stop - c * CHUNK, tid);
    };
    if (w.begin > 0) load_block(w.begin - 1);
    load_block(w.begin);
    cp_async_commit();
    struct pure_state<D> st;
    if (totals)
        pure_state_start(&st, false, 1, NULL, f0, pair);
    else
        read_state(&st, p, w, f0, pair);
    const float bias[2] = {sm->bias[f0], sm->bias[f0 + 8]};

    for (int c = w.begin, item = 0; c < w.end; c++, item++) {
        cp_async_wait<0>();
        norms(c);
        if (c == w.begin && c > 0) norms(c - 1);
        async_fence();
        group_barrier<1>();
        if (!totals) {
            const float top[2] = {bias[0] + st.top[0] - log2_m, bias[1] + st.top[1] - log2_m};
            wait_empty(sm, item);
            publish_state(&st, same, top, base + AT_S + (item & 1) * TILE, sm, item & 1, f0, pair);
            async_fence();
            arrive(sm->full, item);
        }
        if (c + 1 < w.end) load_block(c + 1);
        cp_async_commit();
        if (c > 0 && (c + 1) * CHUNK <= w.stop) {
            struct pure_keys keys;
            float a[32];
            key_exponents(a, base + AT_W, base + AT_K + ((c - 1) & 3) * TILE, sm->half[(c - 1) & 3],
                          bias, to_log2, 0, CHUNK);
            key_tops(&keys, &st, a, 0, pair);
            key_weights(&keys, &st, a);
            state_add(&st, &keys, base + AT_V + ((c - 1) & 3) * TILE);
        }
    }
    if (totals) {
        pure_state_end(&st, 1, segment_state(p, w), f0, pair);
    } else if (w.last) {
        write_state(&st, p, w, f0, pair);
        /* Else another segment, or the next features, may still have to read it. */
        if (!p.sums && p.first + p.count == p.m) write_ring(p, w, tid, GROUP);
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

/* The second warpgroup. */
static __device__ __forceinline__ void queries_role(const struct prefill &p, const struct work &w,
                                                    uint32_t base, struct prefill_small *sm)
{
    const int tid = threadIdx.x - GROUP, lane = tid & 31, warp = tid >> 5, pair = lane & 3;
    const int row = 16 * warp + (lane >> 2);
    const float to_log2 = SRF__LOG2E * p.scale, exact = to_log2 * p.scale;
    const bf16 *q = p.q + w.first * p.ld + w.head * D;
    auto load_block = [&](int c) {
        const bf16 *src = q + (int64_t)c * CHUNK * p.ld + tid % 8 * 8;
#pragma unroll
        for (int i = 0; i < CHUNK / 16; i++) {
            const int r = tid / 8 + 16 * i, at = c * CHUNK + r;
            const bool there = at >= w.pos && at < w.stop;
            cp_async_16(base + AT_Q + (c & 1) * TILE + tile_at<D>(r, tid % 8),
                        there ? src + r * p.ld : p.q, there);
        }
        cp_async_commit();
    };
    load_block(w.begin);
    for (int c = w.begin, item = 0; c < w.end; c++, item++) {
        const uint32_t q_tile = base + AT_Q + (c & 1) * TILE;
        cp_async_wait<0>();
        group_barrier<2>();
        if (c + 1 < w.end) load_block(c + 1);
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
        wait_full(sm, item);
        for (int b = c; b >= max(c - 1, 0) && p.first == 0; b--) {
            products(a, x, base + AT_K + (b & 3) * TILE);
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
            mix(num, weight, base + AT_V + (b & 3) * TILE);
        }
        if (c > 1) {
            products(a, x, base + AT_W);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float2 shift = *(const float2 *)(sm->top[item & 1] + 8 * j + 2 * pair);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    a[4 * j + e] =
                        fmaf(a[4 * j + e], to_log2, (e & 1 ? shift.y : shift.x) - half[e >> 1]);
            }
            row_weights(weight, a, most, num, den);
            add_z(den, weight, sm->z[item & 1], lane);
            mix(num, weight, base + AT_S + (item & 1) * TILE);
        }
        arrive(sm->empty, item);
        give_rows(p, w, c, num, den, most, q_tile, warp, max(0, w.pos - c * CHUNK),
                  min(CHUNK, w.stop - c * CHUNK), lane);
    }
}
#endif

template <bool totals>
static __global__ BOUNDS(totals ? GROUP : 2 * GROUP,
                         2) void window_kernel(const __grid_constant__ struct prefill p)
{
#if HAVE_WGMMA
    static_assert(sizeof(struct prefill_small) + 1024 <= SMEM - AT_SMALL, "room behind the tiles");
    extern __shared__ char raw[];
    char *smem = raw + (-smem_addr(raw) & 1023u);
    struct prefill_small *sm = (struct prefill_small *)(smem + AT_SMALL);
    const int n_segs = totals ? p.n_seg - 1 : p.n_seg;
    const struct work w = work_of(p, blockIdx.x / n_segs, blockIdx.x % n_segs);
    if (w.begin >= w.end) return;
    start_block<totals ? GROUP : 2 * GROUP>(p, w, sm, smem_addr(smem) + AT_W);
    if (totals || threadIdx.x < GROUP)
        keys_role<totals>(p, w, smem_addr(smem), sm);
    else
        queries_role(p, w, smem_addr(smem), sm);
#endif
}

static __global__ void ring_kernel(const __grid_constant__ struct prefill p)
{
    write_ring(p, work_of(p, blockIdx.x, 0), threadIdx.x, blockDim.x);
}

/* ---- launches -------------------------------------------------------------------------------- */

template <bool totals>
static srf_status launch(struct srf_ctx *ctx, const struct prefill *p, int64_t blocks)
{
    CUDA_TRY(cudaFuncSetAttribute(window_kernel<totals>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM));
    window_kernel<totals>
        <<<(unsigned)blocks, totals ? GROUP : 2 * GROUP, SMEM, stream_of(ctx)>>>(*p);
    return srf__cuda_launched("srf_attn_prefill");
}

srf_status srf__prefill_window_totals(struct srf_ctx *ctx, const struct prefill *p, int64_t heads)
{
    return launch<true>(ctx, p, heads * (p->n_seg - 1));
}

srf_status srf__prefill_window(struct srf_ctx *ctx, const struct prefill *p, int64_t heads)
{
    SRF_TRY(launch<false>(ctx, p, heads * p->n_seg));
    if (p->n_seg == 1 || p->first + p->count < p->m) return SRF_OK;
    ring_kernel<<<(unsigned)heads, 256, 0, stream_of(ctx)>>>(*p);
    return srf__cuda_launched("srf_attn_prefill");
}
