/* Pure SRF attention with warpgroup products (wgmma.h): at most 64 features, heads of 64. The forms
 * are those of srf_attn_pure.cu and srf_attn_pure_bwd.cu, a block being one warpgroup: 64 tokens of
 * a chunk, or 64 features, are the rows of a product, whose other operand is read once for all of
 * them. Warp w owns tokens 16 w .. and features 16 w ...
 *
 * The forward differs in when a chunk is taken in pieces: its keys alone say so, before anything is
 * given out. A feature's M after the chunk is then more than SPREAD above both its M before and its
 * exponent of the first key. (Else z of the state or of that key is at least 2^-(SPREAD + 1) in
 * every feature, and so are all denominators.) Nor are maxima looked for where old ones do: M is
 * put HEADROOM above the exponents that it must not be below, and stays while weights are at most
 * 1; r_t is one number for all tokens of a chunk, while the largest weights of each are in a range.
 *
 * With segments, a first kernel leaves what each adds to the state (put_sum; teams of segments are
 * summed where they are made), and who begins with a segment adds up those before it (add_sums): a
 * kernel that made prefixes of them would take longer.
 *
 * The kernels of an op are a chain (chain.h). The first waits before it lets the next one begin:
 * once another of them runs, all that came before the op is complete, and inputs may be read before
 * chain_wait.
 */
#pragma once
#include "kernels/cuda/chain.h"
#include "kernels/cuda/srf_attn_pure_bwd.h"
#include "kernels/cuda/wgmma.h"

#define TILE (CHUNK * 64 * 2) /* bytes */

/* True: the device has warpgroup products, this build code for them, and they take the shape. */
bool srf__pure_wgmma_takes(const struct srf_ctx *ctx, const struct srf_attn_shape *s);
/* What is known of each chunk before it, in the order of chunks, head by head, is a record: S,
 * bf16, as the tile that products want, then MARKS numbers, rows of 64 features and four bytes, one
 * for each 16 features. */
enum {
    MARK_Z = 0,       /* z before it */
    MARK_BEFORE = 64, /* M before it */
    MARK_AFTER = 128, /* M after it */
    MARK_STAY = 192,  /* not 0: S and z of these are in the scale of M before, else of M after */
    MARKS = 200,      /* records begin at multiples of 32 bytes */
};
#define RECORD   (TILE + MARKS * 4) /* bytes */
#define MARK_FAR 40.0f              /* S stays when some M of its 16 rises by more */
size_t srf__pure_wgmma_record_bytes(const struct srf_attn_shape *s);
static inline __host__ __device__ const float *marks_of(const char *records, int64_t chunk)
{
    return (const float *)(records + chunk * RECORD + TILE);
}

/* states: room for those of plan->n_seg segments a head, if more than one. */
srf_status srf__pure_wgmma_fwd(struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a,
                               const struct pure_plan *plan, float *states);
/* What segments add to the state, for add_sums with teams of one. */
srf_status srf__pure_wgmma_states(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a,
                                  const struct pure_plan *plan, float *states);

/* Fills the scratch pointers and how segments are cut into units; returns the bytes. */
size_t srf__pure_wgmma_plan_bwd(const struct srf_ctx *ctx, const struct srf_attn_shape *s, bool dw,
                                const struct pure_plan *plan, struct bwd_params *p);
/* dq, dk, dv, and the blocks' parts of dw (two a unit) if there is one. */
srf_status srf__pure_wgmma_bwd(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a,
                               const struct pure_plan *plan, struct bwd_params *p);

/* What keys are scaled by. */
struct key_scales {
    float to_log2; /* of w.k */
    float to_half; /* of |k|^2 */
    float most;    /* |k|^2 from which on some component may have to be clamped */
    uint32_t limit;
};

static inline __host__ __device__ struct key_scales key_scales_of(float scale, uint32_t limit)
{
    const float most = SRF__X_LIMIT / scale;
    return {SRF__LOG2E * scale, 0.5f * SRF__LOG2E * scale * scale, most * most, limit};
}

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
__device__ __forceinline__ uint32_t larger_of_halves(uint32_t x, uint32_t y)
{
    uint32_t r;
    asm("max.u16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y));
    return r;
}
/* Some M of this thread's features rises so far with the chunk that S would be lost by it. */
__device__ __forceinline__ bool key_tops_far(const float top[2], const float with[2])
{
    return (top[0] > SRF__UNSET && with[0] - top[0] > MARK_FAR) ||
           (top[1] > SRF__UNSET && with[1] - top[1] > MARK_FAR);
}
/* A record in shared memory has its end, which nobody writes, be 0. */
__device__ __forceinline__ void start_record(uint32_t record, int tid)
{
    if (tid < MARKS - MARK_STAY) store_shared(record + TILE + (MARK_STAY + tid) * 4, 0);
}
/* A warp's part of a record in shared memory but for S; top and with: M before and after. */
__device__ __forceinline__ void put_marks(uint32_t record, const float z[2], const float top[2],
                                          const float with[2], bool stay, int f0, int lane)
{
    const uint32_t marks = record + TILE;
    if (lane == 0)
        asm volatile("st.shared.b8 [%0], %1;" ::"r"(marks + MARK_STAY * 4 + f0 / 16),
                     "r"((uint32_t)stay)
                     : "memory");
    if (lane % 4 != 0) return;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t to = marks + (f0 + 8 * i) * 4;
        store_float(to + MARK_Z * 4, z[i]);
        store_float(to + MARK_BEFORE * 4, top[i]);
        store_float(to + MARK_AFTER * 4, with[i]);
    }
}
/* Its S to a record in global memory. */
__device__ __forceinline__ void put_entry(char *record, const struct pure_state<64> *st, int f0,
                                          int pair)
{
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
            *(uint32_t *)(record + tile_at<64>(f0 + 8 * i, j) + 4 * pair) =
                pack_bf16(st->s[j][2 * i], st->s[j][2 * i + 1]);
}
/* By one thread, which commits: a record, but for S of the warps that have put it there. */
__device__ __forceinline__ void send_record(char *to, uint32_t record, uint32_t put)
{
    if (!__builtin_expect(put != 0, 0)) {
        bulk_send(to, record, RECORD);
        return;
    }
    for (int w = 0; w < 4; w++)
        if (!(put >> 8 * w & 1)) bulk_send(to + 2048 * w, record + 2048 * w, 2048);
    bulk_send(to + TILE, record + TILE, MARKS * 4);
}

/* ---- chunks whose keys decide alone into what pieces they are cut ---------------------------- */

#define UNLIKELY(x) __builtin_expect((x) != 0, 0)
#define SPREAD      60    /* log2: what a feature's weights in a chunk may differ by */
#define HEADROOM    10.0f /* log2: how far above all exponents M is put */

/* What wgmma_tile says of a tile's address with `pieces` of 16 bytes more. The lower half of one
 * tile's descriptors is one number and a constant, so that they cost an addition each. */
__device__ __forceinline__ uint64_t tile_by(uint32_t tile, int pieces)
{
    return (uint64_t)(1u << 30 | 64) << 32 | ((tile >> 4 | 64 << 16) + (uint32_t)pieces);
}
/* c (64, 64) = X Y^T: tiles of 64 rows. Of its own: warpgroup_wait, then wgmma_hold(c). */
__device__ __forceinline__ void begin_scores(float (&c)[8][4], uint32_t x, uint32_t y)
{
    warpgroup_fence();
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
        wgmma_64_tiles<false, false>(&c[0][0], tile_by(x, 2 * kk), tile_by(y, 2 * kk), kk > 0);
    warpgroup_commit();
}
/* c (64, 64) += X Y, likewise. */
__device__ __forceinline__ void begin_sums(float (&c)[8][4], uint32_t x, uint32_t y)
{
    warpgroup_fence();
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
        wgmma_64_tiles<false, true>(&c[0][0], tile_by(x, 2 * kk), tile_by(y, 128 * kk), true);
    warpgroup_commit();
}
/* c (64, 64) = X Y, or c += X Y; X packed. */
__device__ __forceinline__ void begin_mix(float (&c)[8][4], const uint32_t x[4][4], uint32_t y,
                                          bool add)
{
    warpgroup_fence();
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
        wgmma_64<true>(&c[0][0], x[kk], tile_by(y, 128 * kk), add || kk > 0);
    warpgroup_commit();
}
/* A warp's rows of a tile, an A operand as registers have it. */
__device__ __forceinline__ void put_rows(uint32_t tile, const uint32_t a[4][4], int warp, int lane)
{
    const uint32_t to = tile + warp * 2048 + tile_at<64>(lane & 15, lane >> 4);
#pragma unroll
    for (int kk = 0; kk < 4; kk++) stmatrix_x4(tile_on<64>(to, 2 * kk), a[kk]);
}
/* mma_bf16, or (!add) the same on zeros, which need no registers. */
__device__ __forceinline__ void mma_add(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1,
                                        bool add)
{
    const float from[4] = {add ? c[0] : 0, add ? c[1] : 0, add ? c[2] : 0, add ? c[3] : 0};
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(from[0]),
                   "f"(from[1]), "f"(from[2]), "f"(from[3]));
}
/* Half of it: c += A (16, 8) B (8, 8). B, one register, need not lie beside another. */
__device__ __forceinline__ void mma_half(float c[4], const uint32_t a[2], uint32_t b)
{
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b));
}
/* c += (!add: =) sums of rows, a product with a column of ones: where pair is 0, of c[0], c[2]. */
__device__ __forceinline__ void add_ones(float c[4], const uint32_t a[4][4], bool add, int lane)
{
    const uint32_t ones = lane < 4 ? 0x3f803f80u : 0;
#pragma unroll
    for (int kk = 0; kk < 4; kk++) mma_add(c, a[kk], ones, ones, add || kk > 0);
}
/* The same to two parts of a sum. Such a product waits for the one before it. */
__device__ __forceinline__ void add_ones(float c[2][4], const uint32_t a[4][4], bool add, int lane)
{
    const uint32_t ones = lane < 4 ? 0x3f803f80u : 0;
#pragma unroll
    for (int kk = 0; kk < 4; kk++) mma_add(c[kk & 1], a[kk], ones, ones, add || kk > 1);
}

/* Maximum that keeps a NaN. */
__device__ __forceinline__ float max_nan(float x, float y)
{
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
    return r;
}

/* x = a warp's 16 keys as the A operand (its registers are B's for the same rows), and |k|^2, the
 * diagonal of K K^T: of rows lane / 4 and 8 more, right where lane % 4 is lane / 8. True: keys were
 * clamped in place. */
__device__ __forceinline__ bool own_squares(uint32_t (&x)[4][4], float square[2], uint32_t rows,
                                            const struct key_scales &by, int lane)
{
    const int g = lane >> 2;
    const bool mine = (lane & 3) == g >> 1;
    bool clamped = false;
    for (;; clamped = true) {
        float low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};
#pragma unroll
        for (int kk = 0; kk < 4; kk++) {
            load_a<64>(x[kk], rows, kk, lane);
            mma_half(low, x[kk], x[kk][0]);
            mma_half(high, x[kk], x[kk][1]);
            mma_half(low, x[kk] + 2, x[kk][2]);
            mma_half(high, x[kk] + 2, x[kk][3]);
        }
        square[0] = g & 1 ? low[1] : low[0];
        square[1] = g & 1 ? high[3] : high[2];
        const bool wide = mine && fmaxf(square[0], square[1]) > by.most;
        if (!UNLIKELY(__any_sync(0xffffffffu, wide && !clamped))) break;
        __syncwarp();
#pragma unroll 1
        for (int i = 0; i < 16; i++) {
            const uint32_t addr = rows + 4 * (32 * i + lane);
            store_shared(addr, clamp_bf16(load_shared(addr), by.limit));
        }
        __syncwarp();
    }
    return clamped;
}
/* half of a warp's 16 keys: log2(e) |y|^2 / 2, infinite (weight 0) for rows outside [lo, hi). True:
 * keys were clamped in place. */
__device__ __forceinline__ bool diagonal_norms(uint32_t k_tile, float *half,
                                               const struct key_scales &by, int lo, int hi,
                                               int warp, int lane)
{
    const int g = lane >> 2, row = 16 * warp + g;
    const bool mine = (lane & 3) == g >> 1;
    uint32_t x[4][4];
    float sum[2];
    const bool clamped = own_squares(x, sum, k_tile + warp * 2048, by, lane);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] *= by.to_half;
        if (sum[i] > SRF__HALF_LIMIT) sum[i] = SRF__HALF_LIMIT;
        if (mine) half[row + 8 * i] = row + 8 * i >= lo && row + 8 * i < hi ? sum[i] : INFINITY;
    }
    return clamped;
}

/* A chunk's (or piece's) keys, of this thread's two features. */
struct chunk_keys {
    float top[2];  /* M with them */
    float step[2]; /* 2^(M before - M) */
    float less[2]; /* M - bias */
};
/* Of a piece's rows [lo, ..), a = W K^T: first, row lo's, in the quad's lane that has it; outside
 * what is no number becomes one. */
__device__ __forceinline__ void take_piece(float first[2], float (&a)[8][4], const float *half,
                                           int lo, int pair)
{
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int row = 8 * j + 2 * pair + (e & 1);
            if (row == lo) first[e >> 1] = a[j][e];
            if (half[row] == INFINITY) a[j][e] = 0;
        }
}
/* half of this thread's keys. */
__device__ __forceinline__ void key_halves(float2 sub[8], const float *half, int pair)
{
#pragma unroll
    for (int j = 0; j < 8; j++) sub[j] = *(const float2 *)(half + 8 * j + 2 * pair);
}
/* Exponents but for the bias; a = W K^T before. */
__device__ __forceinline__ void key_exponents(float (&a)[8][4], const float2 sub[8], float to_log2)
{
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) a[j][e] = fmaf(a[j][e], to_log2, e & 1 ? -sub[j].y : -sub[j].x);
}
__device__ __forceinline__ void key_exponents(float (&a)[8][4], const float *half, float to_log2,
                                              int pair)
{
    float2 sub[8];
    key_halves(sub, half, pair);
    key_exponents(a, sub, to_log2);
}
/* headroom: how far above the exponents M is put, if it has to rise. */
__device__ __forceinline__ void key_tops(struct chunk_keys *keys, const float top[2],
                                         const float (&a)[8][4], const float bias[2],
                                         float headroom = 0)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float most = fmaxf(a[0][2 * i], a[0][2 * i + 1]);
#pragma unroll
        for (int j = 1; j < 8; j++) most = fmaxf(most, fmaxf(a[j][2 * i], a[j][2 * i + 1]));
        most = quad_max(most);
        keys->top[i] = most + bias[i] > top[i] ? ceilf(most + bias[i]) + headroom : top[i];
        keys->step[i] = exp2_fast(top[i] - keys->top[i]);
        /* Of exponents of 1e9 rounding may take more than there is. */
        keys->less[i] = fmaxf(keys->top[i] - bias[i], most);
    }
}
/* No token of rows lo on sees next to nothing: M before, or the exponent of row lo, which all of
 * them see, is near M in every feature. Else the chunk has to be cut. */
__device__ __forceinline__ bool keys_fit(const struct chunk_keys *keys, const float top[2],
                                         const float first[2], const float *half, float to_log2,
                                         const float bias[2], int lo, int lane)
{
    bool fits = true;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float raw = __shfl_sync(0xffffffffu, first[i], (lane & 28) | (lo >> 1 & 3));
        const float e = fmaf(raw, to_log2, -half[lo]) + bias[i];
        if (fmaxf(top[i], e) < keys->top[i] - SPREAD) fits = false;
    }
    return fits;
}
/* Weights, as an A operand (rows are features), a = W K^T: false where one is above 1 or no number,
 * in some thread of the warp. M as it stands, less = M - bias, nearly always does, and to find the
 * largest exponents first would take as many instructions as the weights. most: the largest weights
 * of this thread's two features, of even and odd keys. */
__device__ __forceinline__ bool standing_weights(uint32_t kf[4][4], uint32_t most[2],
                                                 const float (&a)[8][4], const float2 sub[8],
                                                 const float less[2], float to_log2)
{
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float x = fmaf(a[j][2 * i], to_log2, -sub[j].x) - less[i];
            const float y = fmaf(a[j][2 * i + 1], to_log2, -sub[j].y) - less[i];
            const uint32_t w = pack_bf16(exp2_fast(x), exp2_fast(y));
            kf[j >> 1][2 * (j & 1) + i] = w;
            most[i] = j == 0 ? w : larger_of_halves(most[i], w);
        }
    const uint32_t high = larger_of_halves(most[0], most[1]);
    const uint32_t one = 0x3f80; /* positive bf16 are ordered as their bits, NaN above all */
    return !__any_sync(0xffffffffu, (high & 0xffff) > one || high >> 16 > one);
}
/* The same after key_exponents, key_tops. */
__device__ __forceinline__ void chunk_weights(uint32_t kf[4][4], const struct chunk_keys *keys,
                                              const float (&a)[8][4])
{
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            kf[j >> 1][2 * (j & 1) + i] = pack_bf16(exp2_fast(a[j][2 * i] - keys->less[i]),
                                                    exp2_fast(a[j][2 * i + 1] - keys->less[i]));
}
__device__ __forceinline__ bool keys_rise(const struct chunk_keys *keys)
{
    return __any_sync(0xffffffffu, keys->step[0] != 1.0f || keys->step[1] != 1.0f);
}
/* S, z, M in the scale of these keys, which soon is the old one. */
__device__ __forceinline__ void scale_state(struct pure_state<64> *st,
                                            const struct chunk_keys *keys)
{
    scale_rows(st->s, keys->step[0], keys->step[1]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        st->z[i] *= keys->step[i];
        st->top[i] = keys->top[i];
    }
}

/* ---- sums of segments ------------------------------------------------------------------------ */

/* All registers of a warpgroup as they are, then, once a quad, z and M. In shared or global
 * memory. */
__device__ __forceinline__ void put_sum(float4 *to, const struct pure_state<64> &st, int t)
{
#pragma unroll
    for (int j = 0; j < 8; j++)
        to[j * 128 + t] = make_float4(st.s[j][0], st.s[j][1], st.s[j][2], st.s[j][3]);
    if (t % 4 == 0) to[8 * 128 + t / 4] = make_float4(st.z[0], st.z[1], st.top[0], st.top[1]);
}
__device__ __forceinline__ void add_sum(struct pure_state<64> *st, const float4 x[9])
{
    const float add_z[2] = {x[8].x, x[8].y}, add_top[2] = {x[8].z, x[8].w};
    float by[2], add_by[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float with = fmaxf(st->top[i], add_top[i]);
        by[i] = exp2_fast(st->top[i] - with);
        add_by[i] = exp2_fast(add_top[i] - with);
        st->z[i] = st->z[i] * by[i] + add_z[i] * add_by[i];
        st->top[i] = with;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        st->s[j][0] = st->s[j][0] * by[0] + x[j].x * add_by[0];
        st->s[j][1] = st->s[j][1] * by[0] + x[j].y * add_by[0];
        st->s[j][2] = st->s[j][2] * by[1] + x[j].z * add_by[1];
        st->s[j][3] = st->s[j][3] * by[1] + x[j].w * add_by[1];
    }
}
/* st = the state before segment `seg` of a head: the sums of the teams before its own, and of what
 * its own has before it. from: what the states kernel left of the head. */
__device__ __forceinline__ void add_sums(struct pure_state<64> *st, const float *from, int seg,
                                         int team, int t)
{
    constexpr int ahead = 3; /* sums whose loads are on their way at once */
    pure_state_start(st, false, 1, NULL, 0, 0);
#pragma unroll 1
    for (int first = 0; first < seg; first += ahead * team) {
        float4 x[ahead][9];
#pragma unroll
        for (int k = 0; k < ahead; k++) {
            const bool there = first + k * team < seg;
            const int last = min(first + k * team + team, seg) - 1;
            const float4 *at = (const float4 *)(from + last * pure_state_count(64, 1));
#pragma unroll
            for (int j = 0; j < 9; j++) {
                x[k][j] = make_float4(0, 0, j < 8 ? 0 : SRF__UNSET, j < 8 ? 0 : SRF__UNSET);
                if (there) x[k][j] = __ldcg(at + j * 128 + (j < 8 ? t : t / 4));
            }
        }
#pragma unroll
        for (int k = 0; k < ahead; k++) add_sum(st, x[k]);
    }
}
#endif
