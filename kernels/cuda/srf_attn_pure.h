/* What the forward and the backward of pure SRF attention on tensor cores share: the plan of a
 * launch, the state that a walk over chunks carries, features of keys and queries. Names and forms
 * are explained in srf_attn_pure.cu.
 */
#pragma once
#include "kernels/cuda/srf_attn.h"

#define CHUNK 64 /* tokens whose mutual weights are formed explicitly */

struct pure_plan {
    int n_seg, seg_chunks; /* segments of the tokens, chunks in each (the last may have less) */
    float scale;           /* d^(-1/4) */
    uint32_t limit;        /* the clamp of q and k, twice bf16 */
};

/* Shared memory that a block of any of the kernels has, forward and backward, at most: six tiles of
 * tokens; W, kf, S of 64 nf features; vectors. */
static constexpr int pure_smem_most(int d, int nf)
{
    return 2 * (6 * CHUNK * d + nf * 64 * (2 * d + CHUNK)) + 768 + nf * 768;
}

/* Shapes that the tensor-core path takes. */
bool srf__pure_shape(const struct srf_ctx *ctx, const struct srf_attn_shape *s);
/* per_sm: blocks of the main kernel that a multiprocessor holds. */
struct pure_plan srf__pure_plan(const struct srf_ctx *ctx, const struct srf_attn_shape *s,
                                int per_sm);
/* The states before each segment, of features [first, first + count). */
srf_status srf__pure_states(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a, int first,
                            int count, const struct pure_plan *plan, float *states);

/* Floats of a segment's state with 64 nf features: S (64 nf, d), z, M, and M before it. */
static inline __host__ __device__ int64_t pure_state_count(int64_t d, int64_t nf)
{
    return 64 * nf * (d + 3);
}

#ifdef __CUDACC__
/* The state of features f0 = 16 warp + lane / 4 and f0 + 8, a quad together: C of 16 x d. */
template <int D> struct pure_state {
    float s[D / 8][4];
    float z[2], top[2]; /* the same in all lanes of a quad */
};
/* A chunk's keys as the feature owner sees them. */
struct pure_keys {
    uint32_t kf[8][2]; /* tokens 8 j + 2 pair, + 1 of features f0, f0 + 8 */
    float top[2];      /* M with these keys */
    float step[2];     /* 2^(M before - M) */
    float z[2];        /* z with these keys */
};

/* The 16 tokens that a warp owns. Later tokens of a chunk see more of it and take longer: warps of
 * one multiprocessor, whose blocks are a hundred or so apart, own different ones. With 8 warps a
 * block it was slower. */
template <int NF> __device__ __forceinline__ int tokens_of(int warp)
{
    return (NF == 1 ? warp + (int)(blockIdx.x >> 7) : warp) & 3;
}
template <int n> __device__ __forceinline__ void clear(float (&c)[n][4])
{
#pragma unroll
    for (int j = 0; j < n; j++) c[j][0] = c[j][1] = c[j][2] = c[j][3] = 0.0f;
}
/* Two C that lie side by side as the A of the next product. */
__device__ __forceinline__ void pack_a(uint32_t a[4], const float left[4], const float right[4])
{
    a[0] = pack_bf16(left[0], left[1]);
    a[1] = pack_bf16(left[2], left[3]);
    a[2] = pack_bf16(right[0], right[1]);
    a[3] = pack_bf16(right[2], right[3]);
}
/* c (16, n) += A (16, 16) B, B's rows 16 kk.. of a (k, n) tile. */
template <int n>
__device__ __forceinline__ void add_bt(float (&c)[n / 8][4], const uint32_t a[4], uint32_t tile,
                                       int kk, int lane)
{
#pragma unroll
    for (int j = 0; j < n / 16; j++) {
        uint32_t b[4];
        load_bt<n>(b, tile, kk, 16 * j, lane);
        mma_bf16(c[2 * j], a, b[0], b[1]);
        mma_bf16(c[2 * j + 1], a, b[2], b[3]);
    }
}
/* c (16, n) += A (16, 16) B, B's columns the rows of an (n, k) tile with rows of ld. */
template <int ld, int n>
__device__ __forceinline__ void add_b(float (&c)[n][4], const uint32_t a[4], uint32_t tile, int kk,
                                      int lane)
{
#pragma unroll
    for (int j = 0; j < n / 2; j++) {
        uint32_t b[4];
        load_b<ld>(b, tile, 16 * j, kk, lane);
        mma_bf16(c[2 * j], a, b[0], b[1]);
        mma_bf16(c[2 * j + 1], a, b[2], b[3]);
    }
}
/* Of a 16 x 16 block on the diagonal: what is above it becomes 0. */
__device__ __forceinline__ void keep_lower(float (&c)[2][4], int g, int pair)
{
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (8 * j + 2 * pair + (i & 1) > g + 8 * (i >> 1)) c[j][i] = 0.0f;
}
/* psi = 2^e of the backward. Where no stabiliser is wrong, e stays below the limit; exponents of
 * 1e10 and more have no bits left for what e is the difference of, and still must give a finite
 * number. NaN stays NaN. */
__device__ __forceinline__ float exp2_psi(float e)
{
    float x;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(e), "f"(-SRF__MIN_DEN_LOG2));
    return exp2_fast(x);
}
__device__ __forceinline__ float sum_squares(uint32_t x)
{
    float2 f = unpack_bf16(x);
    return f.x * f.x + f.y * f.y;
}

/* half[s] = log2(e) |y_s|^2 / 2 of the chunk's keys, infinite (weight 0) for those outside
 * [lo, hi). Keys are clamped in place. */
template <int D, int NF>
__device__ __forceinline__ void key_norms(uint32_t k_tile, float *half, float scale, uint32_t limit,
                                          int lo, int hi, int tid)
{
    constexpr int per = 2 * NF; /* threads of a key */
    const int row = tid / per, sub = tid % per;
    const float most = SRF__X_LIMIT / scale;
    const uint32_t first = k_tile + tile_at<D>(row, sub);
    float sum = 0;
    for (int clamped = 0;; clamped = 1) {
        sum = 0;
#pragma unroll
        for (int i = 0; i < (D / 8 + per - 1) / per; i++) {
            if (D / 8 % per != 0 && sub + i * per >= D / 8) break;
            uint32_t x[4], addr = tile_on<D>(first, i * per);
            load_shared_words(x, addr);
            if (clamped) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    x[j] = clamp_bf16(x[j], limit);
                    store_shared(addr + 4 * j, x[j]);
                }
            }
            sum += sum_squares(x[0]) + sum_squares(x[1]) + sum_squares(x[2]) + sum_squares(x[3]);
        }
        if (clamped || !__any_sync(0xffffffffu, sum > most * most)) break;
    }
#pragma unroll
    for (int o = 1; o < per; o <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    sum *= 0.5f * SRF__LOG2E * scale * scale;
    if (sum > SRF__HALF_LIMIT) sum = SRF__HALF_LIMIT;
    if (sub == 0) half[row] = row >= lo && row < hi ? sum : INFINITY;
}

/* Exponents of the chunk's keys, a = W K^T on entry; the maxima that now hold, and weights for this
 * warp's features. */
template <int D>
__device__ __forceinline__ void key_weights(struct pure_keys *keys, const struct pure_state<D> *st,
                                            float (&a)[8][4], const float *half, float b0, float b1,
                                            float to_log2, int pair)
{
    float most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float2 sub = *(const float2 *)(half + 8 * j + 2 * pair);
        a[j][0] = fmaf(a[j][0], to_log2, b0 - sub.x);
        a[j][1] = fmaf(a[j][1], to_log2, b0 - sub.y);
        a[j][2] = fmaf(a[j][2], to_log2, b1 - sub.x);
        a[j][3] = fmaf(a[j][3], to_log2, b1 - sub.y);
        most[0] = fmaxf(most[0], fmaxf(a[j][0], a[j][1]));
        most[1] = fmaxf(most[1], fmaxf(a[j][2], a[j][3]));
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        keys->top[i] = fmaxf(st->top[i], ceilf(quad_max(most[i])));
        keys->step[i] = exp2_fast(st->top[i] - keys->top[i]);
    }
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t kf = pack_bf16(exp2_fast(a[j][2 * i] - keys->top[i]),
                                    exp2_fast(a[j][2 * i + 1] - keys->top[i]));
            float2 rounded = unpack_bf16(kf);
            keys->kf[j][i] = kf;
            sum[i] += rounded.x + rounded.y;
        }
#pragma unroll
    for (int i = 0; i < 2; i++) keys->z[i] = fmaf(st->z[i], keys->step[i], quad_sum(sum[i]));
}
/* The same with the product, from tiles. */
template <int D>
__device__ __forceinline__ void key_features(struct pure_keys *keys, const struct pure_state<D> *st,
                                             uint32_t w_tile, uint32_t k_tile, const float *half,
                                             const float *bias, float to_log2, int f0, int warp,
                                             int lane)
{
    float a[8][4];
    clear(a);
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) {
        uint32_t w[4];
        load_a<D>(w, w_tile + warp * 32 * D, kk, lane);
        add_b<D>(a, w, k_tile, kk, lane);
    }
    key_weights<D>(keys, st, a, half, bias[f0], bias[f0 + 8], to_log2, lane & 3);
}
/* kf (features, tokens) and the state before the chunk, in the scale of its M, to shared memory. */
template <int D>
__device__ __forceinline__ void pure_publish(const struct pure_state<D> *st,
                                             const struct pure_keys *keys, uint32_t kf_tile,
                                             uint32_t s_tile, int f0, int lane)
{
    const int pair = lane & 3;
    const uint32_t kf = kf_tile + tile_at<CHUNK>(f0, 0) + 4 * pair;
    const uint32_t s = s_tile + tile_at<D>(f0, 0) + 4 * pair;
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 0; j < 8; j++)
            store_shared(tile_on<CHUNK>(kf, j) + i * 16 * CHUNK, keys->kf[j][i]);
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            store_shared(
                tile_on<D>(s, j) + i * 16 * D,
                pack_bf16(st->s[j][2 * i] * keys->step[i], st->s[j][2 * i + 1] * keys->step[i]));
    }
}
template <int n> __device__ __forceinline__ void scale_rows(float (&c)[n][4], float by0, float by1)
{
#pragma unroll
    for (int j = 0; j < n; j++) {
        c[j][0] *= by0;
        c[j][1] *= by0;
        c[j][2] *= by1;
        c[j][3] *= by1;
    }
}
/* The chunk's keys go into the state: z, M and the scale of S, to which the caller adds kf^T V. */
template <int D>
__device__ __forceinline__ void pure_state_step(struct pure_state<D> *st,
                                                const struct pure_keys *keys)
{
    /* M soon stands still. */
    if (__any_sync(0xffffffffu, keys->step[0] != 1.0f || keys->step[1] != 1.0f))
        scale_rows(st->s, keys->step[0], keys->step[1]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        st->z[i] = keys->z[i];
        st->top[i] = keys->top[i];
    }
}
/* kf, as the A operand of a step over 16 tokens. */
__device__ __forceinline__ void key_operand(uint32_t a[4], const struct pure_keys *keys, int kk)
{
    a[0] = keys->kf[2 * kk][0];
    a[1] = keys->kf[2 * kk][1];
    a[2] = keys->kf[2 * kk + 1][0];
    a[3] = keys->kf[2 * kk + 1][1];
}
template <int D>
__device__ __forceinline__ void
pure_state_add(struct pure_state<D> *st, const struct pure_keys *keys, uint32_t v_tile, int lane)
{
    pure_state_step<D>(st, keys);
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
        uint32_t a[4];
        key_operand(a, keys, kk);
        add_bt<D>(st->s, a, v_tile, kk, lane);
    }
}
/* Empty, or (`given`) as the prefixes left it. */
template <int D>
__device__ __forceinline__ void pure_state_start(struct pure_state<D> *st, bool given, int nf,
                                                 const float *from, int f0, int pair)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int f = f0 + 8 * i;
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            float2 s = make_float2(0.0f, 0.0f);
            if (given) s = *(const float2 *)(from + f * D + 8 * j + 2 * pair);
            st->s[j][2 * i] = s.x;
            st->s[j][2 * i + 1] = s.y;
        }
        st->z[i] = given ? from[64 * nf * D + f] : 0.0f;
        st->top[i] = given ? from[64 * nf * (D + 2) + f] : SRF__UNSET;
    }
}
template <int D>
__device__ __forceinline__ void pure_state_end(const struct pure_state<D> *st, int nf, float *to,
                                               int f0, int pair)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int f = f0 + 8 * i;
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            *(float2 *)(to + f * D + 8 * j + 2 * pair) =
                make_float2(st->s[j][2 * i], st->s[j][2 * i + 1]);
        if (pair == 0) {
            to[64 * nf * D + f] = st->z[i];
            to[64 * nf * (D + 1) + f] = st->top[i];
        }
    }
}
/* a (16, 64) = rows 16 rg.. of an input tile (clamped) times features 64 fg.. of W. */
template <int D>
__device__ __forceinline__ void token_products(float (&a)[8][4], uint32_t x_tile, uint32_t w_tile,
                                               uint32_t limit, int rg, int fg, int lane)
{
    clear(a);
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) {
        uint32_t x[4];
        load_a<D>(x, x_tile + rg * 32 * D, kk, lane);
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = clamp_bf16(x[i], limit);
        add_b<D>(a, x, w_tile + fg * 128 * D, kk, lane);
    }
}
/* Rows 16 rg.. of c that are in [lo, hi), to global memory in whole 16-byte pieces through the same
 * rows of a tile that only this warp uses. dst is the chunk's row 0. */
template <int D>
__device__ __forceinline__ void store_rows(bf16 *dst, int64_t ld, const float (&c)[D / 8][4],
                                           uint32_t tile, int rg, int lo, int hi, int lane)
{
    const int row = 16 * rg + (lane >> 2);
    const uint32_t to = tile + tile_at<D>(row, 0) + 4 * (lane & 3);
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (row + 8 * i >= lo && row + 8 * i < hi) {
#pragma unroll
            for (int j = 0; j < D / 8; j++)
                store_shared(tile_on<D>(to, j) + i * 16 * D,
                             pack_bf16(c[j][2 * i], c[j][2 * i + 1]));
        }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const int at = 32 * i + lane, r = 16 * rg + at / (D / 8), piece = at % (D / 8);
        if (r < lo || r >= hi) continue;
        const uint4 x = load_shared_16(tile + tile_at<D>(r, piece));
        *(uint4 *)(dst + r * ld + piece * 8) = x;
    }
    __syncwarp();
}
#endif
