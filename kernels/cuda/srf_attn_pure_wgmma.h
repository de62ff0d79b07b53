/* Pure SRF attention with warpgroup products (wgmma.h): at most 64 features, heads of 64. The forms
 * are those of srf_attn_pure.cu and srf_attn_pure_bwd.cu, a block being one warpgroup: 64 tokens of
 * a chunk, or 64 features, are the rows of a product, whose other operand is read once for all of
 * them. Warp w owns tokens 16 w .. and features 16 w ...
 *
 * The kernels of an op are a chain (chain.h) whose first is launched as any: once one of them runs,
 * all before that first one are complete, and inputs may be read before chain_wait.
 */
#pragma once
#include "kernels/cuda/chain.h"
#include "kernels/cuda/srf_attn_pure_bwd.h"
#include "kernels/cuda/wgmma.h"

#define TILE (CHUNK * 64 * 2) /* bytes */

/* True: the device has warpgroup products, this build code for them, and they take the shape. */
bool srf__pure_wgmma_takes(const struct srf_ctx *ctx, const struct srf_attn_shape *s);
/* What is known of each chunk before it, in the order of chunks, head by head: S, bf16, as the tile
 * that products want, then MARKS numbers each, rows of 64 features and one more. */
enum {
    MARK_Z = 0,       /* z before it */
    MARK_BEFORE = 64, /* M before it */
    MARK_AFTER = 128, /* M after it */
    MARK_PSI = 192,   /* bias + M after */
    MARK_KF = 256,    /* bias - M after */
    MARK_STAY = 320,  /* not 0: S and z are in the scale of M before, else of M after */
    MARKS = 324,      /* a multiple of 16 bytes */
};
#define MARK_FAR 40.0f /* S stays when some M rises by more */
size_t srf__pure_wgmma_entry_bytes(const struct srf_attn_shape *s);

/* states: room for those of plan->n_seg segments a head, if more than one. */
srf_status srf__pure_wgmma_fwd(struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a,
                               const struct pure_plan *plan, float *states);
/* The states before each segment: S, z, M of all keys before it. */
srf_status srf__pure_wgmma_states(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a,
                                  const struct pure_plan *plan, float *states);

/* Fills the scratch pointers and how segments are cut into units; returns the bytes. */
size_t srf__pure_wgmma_plan_bwd(const struct srf_ctx *ctx, const struct srf_attn_shape *s, bool dw,
                                const struct pure_plan *plan, struct bwd_params *p);
/* dq, dk, dv, and the blocks' parts of dw (two a unit) if there is one. */
srf_status srf__pure_wgmma_bwd(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a,
                               const struct pure_plan *plan, struct bwd_params *p);

/* The launcher asks for this bound to learn whether a kernel was compiled for its device. */
#if defined(__CUDA_ARCH__) && !HAVE_WGMMA
#define WALK_BOUNDS(blocks) __launch_bounds__(256)
#else
#define WALK_BOUNDS(blocks) __launch_bounds__(128, blocks)
#endif

#if HAVE_WGMMA
/* The compiler no longer knows that x is what it was. It else keeps dozens of addresses that derive
 * from x in registers that the products need. */
template <typename T> __device__ __forceinline__ void opaque(T &x)
{
    asm volatile("" : "+r"(x));
}
template <typename T> __device__ __forceinline__ T forget(T x)
{
    opaque(x);
    return x;
}
/* Rows 16 warp .. of a tile of inputs, clamped, as the A operand. */
__device__ __forceinline__ void own_rows(uint32_t a[4][4], uint32_t tile, uint32_t limit, int warp,
                                         int lane)
{
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
        load_a<64>(a[kk], tile + warp * 2048, kk, lane);
#pragma unroll
        for (int i = 0; i < 4; i++) a[kk][i] = clamp_bf16(a[kk][i], limit);
    }
}
__device__ __forceinline__ void own_rows(uint32_t a[4][4], uint32_t tile, int warp, int lane)
{
#pragma unroll
    for (int kk = 0; kk < 4; kk++) load_a<64>(a[kk], tile + warp * 2048, kk, lane);
}
/* Sums as the A operand. */
__device__ __forceinline__ void pack_rows(uint32_t a[4][4], const float (&c)[8][4])
{
#pragma unroll
    for (int kk = 0; kk < 4; kk++) pack_a(a[kk], c[2 * kk], c[2 * kk + 1]);
}
/* What of two neighbours (row g, columns 2 pair, 2 pair + 1 of an 8 x 8 piece on the diagonal) is
 * on or below it. */
__device__ __forceinline__ uint32_t lower_mask(int g, int pair)
{
    return 2 * pair + 1 <= g ? 0xffffffffu : 2 * pair == g ? 0xffffu : 0;
}
/* The same, on or above. */
__device__ __forceinline__ uint32_t upper_mask(int g, int pair)
{
    return 2 * pair >= g ? 0xffffffffu : 2 * pair + 1 == g ? 0xffff0000u : 0;
}
/* A (64, 64), packed: what lies above the diagonal (LOWER), or below it, becomes 0. */
template <bool LOWER>
__device__ __forceinline__ void keep_side(uint32_t a[4][4], uint32_t diagonal, int warp)
{
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            /* Groups of 8 columns and of 8 rows. */
            const int ahead = 2 * kk + (i >> 1) - (2 * warp + (i & 1));
            a[kk][i] &= ahead == 0 ? diagonal : (LOWER ? ahead < 0 : ahead > 0) ? 0xffffffffu : 0;
        }
}
/* The chunk's keys go into S, on their own: warpgroup_wait, then wgmma_hold(S). kf: A operand. */
__device__ __forceinline__ void add_keys(struct pure_state<64> *st, const uint32_t kf[4][4],
                                         uint32_t v_tile)
{
    warpgroup_fence();
    wgmma_mix(&st->s[0][0], kf, v_tile, true);
    warpgroup_commit();
}
/* Some M of this thread's features rises so far with the chunk that S would be lost by it. */
__device__ __forceinline__ bool key_tops_far(const struct pure_state<64> *st,
                                             const struct pure_keys *keys)
{
    return (st->top[0] > SRF__UNSET && keys->top[0] - st->top[0] > MARK_FAR) ||
           (st->top[1] > SRF__UNSET && keys->top[1] - st->top[1] > MARK_FAR);
}
__device__ __forceinline__ void put_marks(float *marks, const struct pure_state<64> *st,
                                          const struct pure_keys *keys, const float *bias,
                                          bool stay, int f0, int pair)
{
    if (f0 == 0 && pair == 0) marks[MARK_STAY] = stay;
    if (pair != 0) return;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int f = f0 + 8 * i;
        marks[MARK_Z + f] = stay ? st->z[i] : st->z[i] * keys->step[i];
        marks[MARK_BEFORE + f] = st->top[i];
        marks[MARK_AFTER + f] = keys->top[i];
        marks[MARK_PSI + f] = bias[f] + keys->top[i];
        marks[MARK_KF + f] = bias[f] - keys->top[i];
    }
}
/* S in the scale of M before, in the order of a tile. */
__device__ __forceinline__ void put_entry(bf16 *entry, const struct pure_state<64> *st, int f0,
                                          int pair)
{
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
            *(uint32_t *)((char *)entry + tile_at<64>(f0 + 8 * i, j) + 4 * pair) =
                pack_bf16(st->s[j][2 * i], st->s[j][2 * i + 1]);
}
#endif
