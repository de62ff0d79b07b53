/* What the SRF attention kernels share: the pure and the hybrid path's entry points, and tiles of
 * bf16 in shared memory as the tensor cores want them.
 *
 * A tile is row-major, `ld` bf16 values a row (a multiple of 16), without padding. Its 16-byte
 * pieces are permuted inside each row (tile_at) such that the 8 rows that one ldmatrix tile reads
 * lie in 8 different groups of banks. Products C (16, 8) += A (16, 16) B (16, 8) take their
 * operands from tiles by the loads below; kk counts steps of 16 along the summed dimension:
 *     load_a   A from rows of a (row, k) tile
 *     load_b   B for two neighbouring C from a (column, k) tile: r[0], r[1] and r[2], r[3]
 *     load_bt  the same from a (k, column) tile
 */
#pragma once
#include "kernels/cuda/mma.h"

/* Exponents are in log2 units: a = log2(e) (w.x + bias - |x|^2 / 2). */
#define SRF__LOG2E 1.4426950408889634f
/* Components of x = q d^(-1/4) and y are clamped to this, |y|^2 / 2 to the other. */
#define SRF__X_LIMIT    1e17f
#define SRF__HALF_LIMIT 1e30f
/* The maximum over no keys: far below every exponent, and finite. */
#define SRF__UNSET (-1e32f)
/* A smaller denominator has lost too much to underflow: its chunk must be halved. As log2. */
#define SRF__MIN_DEN      1e-20f
#define SRF__MIN_DEN_LOG2 (-66.0f)

/* ---- srf_attn_pure.cu, srf_attn_pure_bwd.cu: causal, window = 0, bf16 ------------------------ */

/* True: the tensor-core path takes the shape and these leading dimensions and pointers. The
 * workspace functions answer for shapes alone (0 where no pointers would do). */
bool srf__pure_takes_fwd(const struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a);
size_t srf__pure_fwd_workspace(const struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a);
srf_status srf__pure_fwd(struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a);
bool srf__pure_takes_bwd(const struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a);
size_t srf__pure_bwd_workspace(const struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a);
srf_status srf__pure_bwd(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a);
/* What segments of seg_chunks chunks of 64 tokens add to the state, for heads of 64 with up to 64
 * features, on Hopper: for all but the last, at states + (head_i n_seg + segment)
 * SRF__STATES_COUNT, as add_sums (srf_attn_pure_wgmma.h) wants it, by teams of so many segments.
 * The first kernel of a chain (chain.h); one that follows in the chain waits. */
bool srf__states_take(const struct srf_ctx *ctx, const struct srf_attn_shape *s);
int srf__state_team(const struct srf_ctx *ctx, const struct srf_attn_shape *s, int n_seg);
srf_status srf__state_sums(struct srf_ctx *ctx, const struct srf_attn_shape *s, const void *k,
                           const void *v, int64_t ld, const void *w, const void *bias, int n_seg,
                           int seg_chunks, int team, float *states);
#define SRF__STATES_COUNT (64 * (64 + 3))
/* What forward and backward share as `carry`: the states before chunks. */
size_t srf__pure_carry_bytes(const struct srf_ctx *ctx, const struct srf_attn_shape *s);

/* ---- srf_attn_wide.cu, srf_attn_wide_bwd.cu: of the same d = 64 and m > 128, on Hopper ------- */

bool srf__wide_takes(const struct srf_ctx *ctx, const struct srf_attn_shape *s);
size_t srf__wide_fwd_workspace(const struct srf_ctx *ctx, const struct srf_attn_shape *s);
srf_status srf__wide_fwd(struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a);
bool srf__wide_takes_bwd(const struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a);
size_t srf__wide_bwd_workspace(const struct srf_ctx *ctx, const struct srf_attn_shape *s);
srf_status srf__wide_bwd(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a);

/* ---- srf_attn_hybrid.cu: windows that are multiples of 32, bf16; as above -------------------- */

bool srf__hybrid_takes_fwd(const struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a);
size_t srf__hybrid_fwd_workspace(const struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a);
srf_status srf__hybrid_fwd(struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a);
bool srf__hybrid_takes_bwd(const struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a);
size_t srf__hybrid_bwd_workspace(const struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a);
srf_status srf__hybrid_bwd(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a);
/* What forward and backward share as `carry`: the states before segments. */
size_t srf__hybrid_carry_bytes(const struct srf_ctx *ctx, const struct srf_attn_shape *s);

#ifdef __CUDACC__
/* Byte offset of 16-byte piece `piece` of row `row`. */
template <int ld> __device__ __forceinline__ uint32_t tile_at(int row, int piece)
{
    static_assert(ld % 16 == 0, "rows of a multiple of 32 bytes");
    int swizzle = ld % 64 == 0 ? row & 7 : ld % 32 == 0 ? (row >> 1) & 3 : (row >> 2) & 1;
    return (uint32_t)(row * ld * 2 + ((piece ^ swizzle) << 4));
}
/* The address `piece` pieces on from `addr`, an address in a tile (itself a multiple of 128) of a
 * piece p that has no bit of `piece` set below 8: the permutation is an exclusive or of low bits
 * of the piece, which lie inside 128, 64 or 32 bytes that never carry. 8 rows on are 16 ld bytes
 * on. So of the addresses that a thread needs all but a few are these plus constants. */
template <int ld> __device__ __forceinline__ uint32_t tile_on(uint32_t addr, int piece)
{
    constexpr int group = ld % 64 == 0 ? 8 : ld % 32 == 0 ? 4 : 2;
    return (addr ^ (uint32_t)((piece & (group - 1)) << 4)) +
           (uint32_t)((piece & ~(group - 1)) << 4);
}
/* `tile` in the three below: the address of a row that is a multiple of 8. */
template <int ld>
__device__ __forceinline__ void load_a(uint32_t r[4], uint32_t tile, int kk, int lane)
{
    ldmatrix_x4(r, tile_on<ld>(tile + tile_at<ld>(lane & 15, lane >> 4), 2 * kk));
}
/* Columns col .. col + 15, a constant. */
template <int ld>
__device__ __forceinline__ void load_b(uint32_t r[4], uint32_t tile, int col, int kk, int lane)
{
    const uint32_t at = tile_at<ld>((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
    ldmatrix_x4(r, tile_on<ld>(tile + at, 2 * kk) + col * ld * 2);
}
template <int ld>
__device__ __forceinline__ void load_bt(uint32_t r[4], uint32_t tile, int kk, int col, int lane)
{
    const uint32_t at = tile_at<ld>(lane & 15, lane >> 4);
    ldmatrix_x4_trans(r, tile_on<ld>(tile + at, col >> 3) + kk * 32 * ld);
}
/* Rows [0, rows) of a tile from global memory, asynchronously; zeros from row `valid` on. */
template <int ld, int threads>
__device__ __forceinline__ void load_tile(uint32_t tile, const bf16 *src, int64_t src_ld, int rows,
                                          int valid, int tid)
{
    constexpr int pieces = ld / 8, step = threads / pieces;
    if (threads % pieces == 0 && step % 8 == 0) {
        const int row = tid / pieces, piece = tid % pieces;
        const uint32_t to = tile + tile_at<ld>(row, piece);
        const bf16 *from = src + row * src_ld + piece * 8;
#pragma unroll
        for (int i = 0; i < rows / step; i++, from += step * src_ld)
            cp_async_16(to + i * step * ld * 2, from, row + i * step < valid);
    } else {
#pragma unroll 4
        for (int i = tid; i < rows * pieces; i += threads) {
            int row = i / pieces, piece = i - row * pieces;
            cp_async_16(tile + tile_at<ld>(row, piece), src + row * src_ld + piece * 8,
                        row < valid);
        }
    }
}
/* Two bf16 values clamped to +-limit (of both halves); NaN stays NaN. */
__device__ __forceinline__ uint32_t clamp_bf16(uint32_t x, uint32_t limit)
{
    uint32_t r;
    asm("{ .reg .b32 t; min.NaN.bf16x2 t, %1, %2; max.NaN.bf16x2 %0, t, %3; }"
        : "=r"(r)
        : "r"(x), "r"(limit), "r"(limit ^ 0x80008000u));
    return r;
}
__device__ __forceinline__ float quad_sum(float x)
{
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
#endif
