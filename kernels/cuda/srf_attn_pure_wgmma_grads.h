/* What the kernel of the gradients is made of (srf_attn_pure_wgmma_grads.cu): its places in shared
 * memory, and what it does to rows, tiles and R. */
#pragma once
#include "kernels/cuda/srf_attn_pure_wgmma_bwd.h"

/* Meetings: of all, of the owners of queries or of keys, of those who arrive and those who wait. */
enum { ALL_A = 1, ALL_B, PSI_FREE, KF_FREE, OWN, OWN_TOO, R_FREE };

/* Where a block is, kept in shared memory: there are no registers for it in the products' way. */
struct unit {
    int64_t in, token, chunk; /* of the head: in q, k, v, among tokens, among chunks */
    int64_t segment, order;   /* among all segments; among all units, segment by segment */
    int seq, col, is_first, is_last, c_first, c_last;
    int edge, has_later; /* the last chunk that M begins anew with; segments follow its own */
};

/* Where a walk is, in one register, or others would be spilled: the end of a piece in its chunk,
 * its length, what was done and what follows. */
enum {
    LENGTH = 8,      /* bits before it */
    ODD = 1 << 16,   /* pieces that are done */
    BEGUN = 1 << 17, /* some piece is done */
    MORE = 1 << 18,  /* chunks follow */
    OPEN = 1 << 19,  /* queries: the piece before is not closed */
    ASKED = 1 << 19, /* keys: for K, dO of the next chunk */
    STAGE = 20,      /* bits before the number of chunks that are done, modulo 4 */
    FIRST_PIECE = CHUNK | CHUNK << LENGTH,
};

struct grad_smem {
    static constexpr int v = TILE, s = 2 * TILE, k = 3 * TILE, d_o = 5 * TILE; /* K, dO twice */
    static constexpr int w = 7 * TILE, psi = w + TILE, kf = psi + TILE, r = kf + TILE;
    static constexpr int dp = r + TILE, out = dp + TILE;
    static constexpr int marks = out + TILE;            /* of two chunks, of a piece */
    static constexpr int shift = marks + 3 * MARKS * 4; /* (8, 64): bias and M, of each warp */
    static constexpr int bias = shift + 8 * 64 * 4, half = bias + 64 * 4;
    static constexpr int u = half + CHUNK * 4;   /* of two pieces */
    static constexpr int delta = u + 2 * 64 * 4; /* of two pieces: (2, 64) bf16, its parts; fp32 */
    static constexpr int given = delta + 2 * 2 * 64 * 4; /* of two chunks: delta as it came */
    static constexpr int bar = given + 2 * CHUNK * 4;    /* Q; V, S; K, dO, marks twice */
    static constexpr int unit = bar + 4 * 8, bytes = unit + sizeof(struct unit);
};

#if HAVE_WGMMA
__device__ __forceinline__ int64_t shared_i64(uint32_t addr)
{
    int64_t x;
    asm volatile("ld.shared.b64 %0, [%1];" : "=l"(x) : "r"(addr));
    return x;
}
#define UNIT_I64(field) shared_i64(base + at::unit + (int)offsetof(struct unit, field))
#define UNIT_INT(field) (int)load_shared(base + at::unit + (int)offsetof(struct unit, field))
__device__ __forceinline__ int piece_end(int at)
{
    return at & 127;
}
__device__ __forceinline__ int piece_size(int at)
{
    return at >> LENGTH & 127;
}
__device__ __forceinline__ int half_of_piece(int at)
{
    return at - (piece_size(at) << (LENGTH - 1));
}
/* The place of a chunk's K, dO, and the parity of its being filled. */
__device__ __forceinline__ int stage_of(int at)
{
    return at >> STAGE & 1;
}
__device__ __forceinline__ int stage_parity(int at)
{
    return at >> (STAGE + 1) & 1;
}
/* The piece that ends where one begins, at row lo > 0 of the chunk. */
__device__ __forceinline__ int next_piece(int at, int lo)
{
    return (lo | (lo & -lo) << LENGTH) | ((at & ~0xffff) ^ ODD) | BEGUN;
}
__device__ __forceinline__ int next_chunk(int at, bool more)
{
    const int done = ((at >> STAGE) + 1) & 3;
    return FIRST_PIECE | ((at & ODD) ^ ODD) | BEGUN | (more ? MORE : 0) | done << STAGE;
}
/* What a step back over the chunk multiplies sums of feature f by. `ended`, if not NULL: the marks
 * of the chunk before, where a walk ended; M of the walk that made the chunk's may be another. */
__device__ __forceinline__ float mark_back(uint32_t marks, int f, const float *ended)
{
    const float before = ended ? ended[MARK_AFTER + f] : load_float(marks + (MARK_BEFORE + f) * 4);
    return exp2_fast(before - load_float(marks + (MARK_AFTER + f) * 4));
}
/* A warp's bias + M (KEYS: - M) after the chunk, at `to`. */
template <bool KEYS>
__device__ __forceinline__ void put_shifts(uint32_t to, uint32_t marks, uint32_t bias, int lane)
{
    const float2 m = load_float2(marks + (MARK_AFTER + 2 * lane) * 4);
    const float2 b = load_float2(bias + 8 * lane);
    store_float2(to + 8 * lane, KEYS ? b.x - m.x : b.x + m.x, KEYS ? b.y - m.y : b.y + m.y);
    __syncwarp();
}
/* The forward's numbers of a chunk towards this multiprocessor. */
__device__ __forceinline__ void prefetch_stat(const struct bwd_params &p, int64_t token, int64_t t0,
                                              int tid)
{
    if (tid == 0 || tid == 32)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(p.stat + token + t0 + tid));
}
/* delta as it is, and as two bf16 parts, for all queries' owners. */
__device__ __forceinline__ void put_deltas(uint32_t parts, const float delta[2], int row)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const bf16 high = __float2bfloat16_rn(delta[i]);
        const bf16 low = __float2bfloat16_rn(delta[i] - __bfloat162float(high));
        const uint32_t to = parts + 2 * row + 16 * i;
        asm volatile("st.shared.b16 [%0], %1;\n"
                     "st.shared.b16 [%0 + 128], %2;" ::"r"(to),
                     "h"(__bfloat16_as_ushort(high)), "h"(__bfloat16_as_ushort(low))
                     : "memory");
        store_float(parts + 256 + 4 * row + 32 * i, delta[i]);
    }
}
/* The products of wgmma.h, with descriptors that cost an addition each. */
__device__ __forceinline__ void row_scores(float c[32], const uint32_t a[4][4], uint32_t tile)
{
#pragma unroll
    for (int kk = 0; kk < 4; kk++) wgmma_64<false>(c, a[kk], tile_by(tile, 2 * kk), kk > 0);
}
__device__ __forceinline__ void tile_scores(float c[32], uint32_t x, uint32_t y)
{
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
        wgmma_64_tiles<false, false>(c, tile_by(x, 2 * kk), tile_by(y, 2 * kk), kk > 0);
}
__device__ __forceinline__ void mix_rows(float c[32], const uint32_t a[4][4], uint32_t tile,
                                         bool add)
{
#pragma unroll
    for (int kk = 0; kk < 4; kk++) wgmma_64<true>(c, a[kk], tile_by(tile, 128 * kk), add || kk > 0);
}
/* This warp's keys as the A operand, and log2(e) |y|^2 / 2 of this thread's two, as diagonal_norms
 * makes it: M of the forward is not below what follows from it. Clamped in place. */
__device__ __forceinline__ void own_keys(uint32_t (&x)[4][4], float norm[2], uint32_t k_tile,
                                         const struct key_scales &by, int warp, int lane)
{
    own_squares(x, norm, k_tile + warp * 2048, by, lane);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        norm[i] = __shfl_sync(0xffffffffu, norm[i], (lane & 28) | lane >> 3) * by.to_half;
        if (norm[i] > SRF__HALF_LIMIT) norm[i] = SRF__HALF_LIMIT; /* NaN stays */
    }
}
/* A warp's rows in [lo, hi) of c, to global memory in whole pieces, through its rows of a tile.
 * dst: the chunk's row 0. */
__device__ __forceinline__ void store_chunk(bf16 *dst, int64_t ld, const float (&c)[8][4],
                                            uint32_t tile, int warp, int lo, int hi, int lane)
{
    uint32_t x[4][4];
    pack_rows(x, c);
    put_rows(tile, x, warp, lane);
    __syncwarp();
    const int row = 16 * warp + (lane >> 3);
    const uint32_t from = tile + warp * 2048 + tile_at<64>(lane >> 3, lane & 7);
    bf16 *to = dst + row * ld + (lane & 7) * 8;
#pragma unroll
    for (int i = 0; i < 4; i++, to += 4 * ld) {
        const uint4 y = load_shared_16((from ^ (i & 1) * 64) + i * 512);
        if (row + 4 * i >= lo && row + 4 * i < hi) store_global_16(to, y);
    }
    __syncwarp();
}
/* What this warp has sent from tiles has left them. */
__device__ __forceinline__ void warp_sent(int lane)
{
    if (lane == 0) bulk_sent();
    __syncwarp();
}
/* A warp's rows of c to rows from y on, through its rows of a tile, by the copy engine, which drops
 * what lies behind a sequence's end. */
__device__ __forceinline__ void send_chunk(const CUtensorMap *map, int x, int y, int z,
                                           const float (&c)[8][4], uint32_t tile, int warp,
                                           int lane)
{
    uint32_t a[4][4];
    pack_rows(a, c);
    put_rows(tile, a, warp, lane);
    async_fence();
    __syncwarp();
    if (lane == 0) {
        asm volatile(
            "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], "
            "[%4];" ::"l"(map),
            "r"(x), "r"(y), "r"(z), "r"(tile + warp * 2048)
            : "memory");
        bulk_commit();
    }
    __syncwarp();
}
/* r += psi^T dO, on its own: warpgroup_wait, then wgmma_hold(r). */
__device__ __forceinline__ void add_queries(float (&r)[8][4], uint32_t psi_tile, uint32_t do_tile)
{
    warpgroup_fence();
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
        wgmma_64_tiles<true, true>(&r[0][0], tile_by(psi_tile, 128 * kk),
                                   tile_by(do_tile, 128 * kk), true);
    warpgroup_commit();
}
/* u += psi^T delta. */
__device__ __forceinline__ void add_deltas(float u[2], uint32_t psi_tile, uint32_t parts, int warp,
                                           int lane)
{
    const int g = lane >> 2, pair = lane & 3;
    const uint32_t part = parts + (g & 1) * 128 + pair * 4;
    float add[4] = {0, 0, 0, 0};
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
        /* Columns 0 and 1 of this product are the two parts of delta, others 0. */
        const int token = 16 * kk + (lane & 7) + ((lane >> 4) << 3);
        uint32_t y[4], d0 = load_shared(part + kk * 32), d1 = load_shared(part + kk * 32 + 16);
        ldmatrix_x4_trans(y, psi_tile + tile_at<64>(token, 2 * warp + ((lane >> 3) & 1)));
        mma_bf16(add, y, g < 2 ? d0 : 0, g < 2 ? d1 : 0);
    }
    /* Lanes of pair 0 have both columns. */
    u[0] += __shfl_sync(0xffffffffu, add[0] + add[1], lane & ~3);
    u[1] += __shfl_sync(0xffffffffu, add[2] + add[3], lane & ~3);
}
/* R, u of features f0, f0 + 8, from or to memory that other blocks write or read. */
__device__ __forceinline__ void load_r(float (&r)[8][4], float u[2], const float *from, int f0,
                                       int pair)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int f = f0 + 8 * i;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float2 x = __ldcg((const float2 *)(from + f * 64 + 8 * j + 2 * pair));
            r[j][2 * i] = x.x;
            r[j][2 * i + 1] = x.y;
        }
        u[i] = __ldcg(from + 64 * 64 + f);
    }
}
__device__ __forceinline__ void store_r(float *to, const float (&r)[8][4], const float u[2], int f0,
                                        int pair)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int f = f0 + 8 * i;
#pragma unroll
        for (int j = 0; j < 8; j++)
            __stcg((float2 *)(to + f * 64 + 8 * j + 2 * pair),
                   make_float2(r[j][2 * i], r[j][2 * i + 1]));
        if (pair == 0) __stcg(to + 64 * 64 + f, u[i]);
    }
}
/* One warpgroup: what it has written is there for whoever sees the flag. */
__device__ __forceinline__ void raise_flag(unsigned *flag, int t)
{
    __threadfence();
    meet(OWN, 128);
    if (t == 0) asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}
__device__ __forceinline__ void await_flag(const unsigned *flag, int t)
{
    if (t == 0) {
        unsigned up;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(up) : "l"(flag) : "memory");
        while (!up);
    }
    meet(OWN, 128);
}
#endif
