/* What warpgroups of the prefill kernels do with tiles: products, features of keys and what is
 * given out of them, rows of queries. See srf_attn_prefill.cu. */
#pragma once
#include "kernels/cuda/srf_attn_prefill_parts.h"
#include "kernels/cuda/srf_attn_pure_queries.h"

#if defined(__CUDACC__) && HAVE_WGMMA
/* What wgmma_tile says of a tile's address, with `pieces` of 16 bytes more: the lower half of one
 * tile's descriptors is one number and a constant, so that they cost an addition each. */
static __device__ __forceinline__ uint64_t tile_on_by(uint32_t tile, int pieces)
{
    return (uint64_t)(1u << 30 | 64) << 32 | ((tile >> 4 | 64 << 16) + (uint32_t)pieces);
}
/* a = x tile^T */
static __device__ __forceinline__ void products(float a[32], const uint32_t x[4][4], uint32_t tile)
{
    warpgroup_fence();
#pragma unroll
    for (int kk = 0; kk < 4; kk++) wgmma_64<false>(a, x[kk], tile_on_by(tile, 2 * kk), kk > 0);
    warpgroup_commit();
    warpgroup_wait<0>();
    wgmma_hold(a);
}

/* c (64, 64) = P B (!add) or c += P B: P packed, B the tile's 64 rows. */
static __device__ __forceinline__ void mix(float c[32], const uint32_t p[4][4], uint32_t tile,
                                           bool add)
{
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
        wgmma_64<true>(c, p[kk], tile_on_by(tile, 128 * kk), add || kk > 0);
}
/* ---- keys ------------------------------------------------------------------------------------ */

/* Keys and values of the chunk where `at` is, by the copy engine: loads of a thread's own would
 * have to come before each of its fences is passed. Rows of other sequences behind the end come
 * too. */
static __device__ __forceinline__ void load_keys(const struct prefill_maps &m, uint32_t k_tile,
                                                 uint32_t v_tile, const struct prefill_place &at,
                                                 uint64_t *barrier, int tid)
{
    const uint32_t bar = smem_addr(barrier);
    if (tid == 0) {
        const int row = (int)(at.row + at.c * CHUNK);
        barrier_expect(bar, 2 * TILE);
        bulk_tile(k_tile, &m.k, at.head * D, row, 0, bar);
        bulk_tile(v_tile, &m.v, at.head * D, row, 0, bar);
    } else {
        barrier_arrive(bar);
    }
}
/* Zeros in those of a warp's 16 rows that are row n of the chunk or behind it: no weight makes a
 * number of what is none. The warp may then read them. */
static __device__ __forceinline__ void clear_rows(uint32_t k_tile, uint32_t v_tile, int n, int warp,
                                                  int lane)
{
    for (int row = 16 * warp + lane / 8; row < 16 * warp + 16; row += 4)
        if (row >= n) {
            const uint32_t at = tile_at<D>(row, lane % 8);
            asm volatile("st.shared.v4.b32 [%0], {%2,%2,%2,%2};\n"
                         "st.shared.v4.b32 [%1], {%2,%2,%2,%2};" ::"r"(k_tile + at),
                         "r"(v_tile + at), "r"(0)
                         : "memory");
        }
    __syncwarp();
}
/* half of a warp's 16 rows of keys, |k|^2 being the diagonal of K K^T; infinite, weight 0, from row
 * n on. They are clamped in place: true where it wrote to the tile. The registers of A are those of
 * B for the same rows. */
static __device__ __forceinline__ bool
diagonal_norms(uint32_t k_tile, float *half, const struct prefill &p, int n, int warp, int lane)
{
    const int g = lane >> 2, row = 16 * warp + g;
    const uint32_t rows = k_tile + warp * 32 * D;
    const float most = SRF__X_LIMIT / p.scale;
    const bool mine = (lane & 3) == g >> 1;
    float sum[2];
    bool clamped = false;
    for (;; clamped = true) {
        float low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};
#pragma unroll
        for (int kk = 0; kk < 4; kk++) {
            uint32_t x[4];
            load_a<D>(x, rows, kk, lane);
            mma_bf16(low, x, x[0], x[2]);
            mma_bf16(high, x, x[1], x[3]);
        }
        sum[0] = g & 1 ? low[1] : low[0];
        sum[1] = g & 1 ? high[3] : high[2];
        const bool wide = mine && (sum[0] > most * most || sum[1] > most * most);
        if (!UNLIKELY(__any_sync(0xffffffffu, wide && !clamped))) break;
        __syncwarp();
        for (int i = 0; i < 16 * D / 2 / 32; i++) {
            const uint32_t addr = rows + 4 * (32 * i + lane);
            store_shared(addr, clamp_bf16(load_shared(addr), p.limit));
        }
        __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] *= 0.5f * SRF__LOG2E * p.scale * p.scale;
        if (sum[i] > SRF__HALF_LIMIT) sum[i] = SRF__HALF_LIMIT;
        if (mine) half[row + 8 * i] = row + 8 * i < n ? sum[i] : INFINITY;
    }
    return clamped;
}

/* What a thread of the keys keeps of its two features: W's rows as an operand, log2(e) bias. */
struct key_features {
    uint32_t w[4][4];
    float bias[2];
};
static __device__ __forceinline__ void read_features(struct key_features *f,
                                                     const struct prefill &p, const struct work &w,
                                                     int f0, int pair)
{
    const int64_t row = features_of(p, w.head);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const bool there = f0 + 8 * i < p.count;
        const uint32_t *from = (const uint32_t *)(p.w + (row + (there ? f0 + 8 * i : 0)) * D);
#pragma unroll
        for (int j = 0; j < 8; j++) f->w[j >> 1][2 * (j & 1) + i] = there ? from[4 * j + pair] : 0;
        f->bias[i] = there ? SRF__LOG2E * p.bias[row + f0 + 8 * i] : -INFINITY;
    }
}

/* Exponents of a chunk's keys for this thread's two features, but for bias; a = W K^T before. */
static __device__ __forceinline__ void key_exponents(float a[32], const float *half, float to_log2)
{
    const int pair = threadIdx.x & 3;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float2 sub = *(const float2 *)(half + 8 * j + 2 * pair);
#pragma unroll
        for (int e = 0; e < 4; e++)
            a[4 * j + e] = fmaf(a[4 * j + e], to_log2, e & 1 ? -sub.y : -sub.x);
    }
}

/* M with these keys, of rows lo on; false: their weights differ by more than SPREAD. */
static __device__ __forceinline__ bool key_tops(struct pure_keys *keys,
                                                const struct pure_state<D> *st, const float a[32],
                                                const float bias[2], int lo, int pair)
{
    bool fits = true;
    float first[2] = {a[0], a[2]};
    if (UNLIKELY(lo > 0)) {
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (8 * j + 2 * pair + (e & 1) == lo) first[e >> 1] = a[4 * j + e];
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float most = fmaxf(a[2 * i], a[2 * i + 1]);
#pragma unroll
        for (int j = 1; j < 8; j++)
            most = fmaxf(most, fmaxf(a[4 * j + 2 * i], a[4 * j + 2 * i + 1]));
        first[i] = __shfl_sync(0xffffffffu, first[i], (threadIdx.x & 28) | (lo >> 1 & 3));
        keys->top[i] = fmaxf(st->top[i], ceilf(quad_max(most) + bias[i]));
        keys->step[i] = exp2_fast(st->top[i] - keys->top[i]);
        if (fmaxf(st->top[i], first[i] + bias[i]) < keys->top[i] - SPREAD) fits = false;
    }
    return fits;
}

/* Weights, as the operand of products. */
static __device__ __forceinline__ void key_weights(uint32_t kf[4][4], const struct pure_keys *keys,
                                                   const float a[32], const float bias[2])
{
    const float less[2] = {keys->top[0] - bias[0], keys->top[1] - bias[1]};
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            kf[j >> 1][2 * (j & 1) + i] = pack_bf16(exp2_fast(a[4 * j + 2 * i] - less[i]),
                                                    exp2_fast(a[4 * j + 2 * i + 1] - less[i]));
}
/* S in the new M, which is soon the old one. */
static __device__ __forceinline__ void scale_sums(struct pure_state<D> *st, const float step[2])
{
    if (__any_sync(0xffffffffu, step[0] != 1.0f || step[1] != 1.0f))
        scale_rows(st->s, step[0], step[1]);
}
/* den += sums of weights, a product with a column of ones: where pair is 0, of den[0], den[2]. */
static __device__ __forceinline__ void add_ones(float den[4], const uint32_t weight[4][4], int lane)
{
    const uint32_t ones = lane < 4 ? 0x3f803f80u : 0;
#pragma unroll
    for (int kk = 0; kk < 4; kk++) mma_bf16(den, weight[kk], ones, ones);
}

/* z and M in the scale of these keys. */
static __device__ __forceinline__ void scale_tops(struct pure_state<D> *st,
                                                  const struct pure_keys *keys)
{
#pragma unroll
    for (int k = 0; k < 2; k++) {
        st->z[k] *= keys->step[k];
        st->top[k] = keys->top[k];
    }
}
/* bias + M - less, and z as a sum of two, for the queries. */
static __device__ __forceinline__ void publish_tops(const struct pure_state<D> *st, float less,
                                                    const float bias[2], float *tops,
                                                    bf16 z_of[2][64], int f0, int pair)
{
#pragma unroll
    for (int k = 0; k < 2 && pair == 0; k++) {
        const float z = st->z[k];
        const bf16 most = __float2bfloat16_rn(z);
        tops[f0 + 8 * k] = bias[k] + st->top[k] - less;
        z_of[0][f0 + 8 * k] = most;
        z_of[1][f0 + 8 * k] = __float2bfloat16_rn(z - __bfloat162float(most));
    }
}
/* z with the weights of these keys, where pair is 0. */
static __device__ __forceinline__ void add_tops(struct pure_state<D> *st, const uint32_t kf[4][4],
                                                int lane)
{
    float sum[4] = {0, 0, 0, 0};
    add_ones(sum, kf, lane);
    st->z[0] += sum[0];
    st->z[1] += sum[2];
}

/* Weights of keys, for the queries. */
static __device__ __forceinline__ void publish_weights(const uint32_t kf[4][4], uint32_t kf_tile,
                                                       int f0, int pair)
{
    const uint32_t to = kf_tile + tile_at<CHUNK>(f0, 0) + 4 * pair;
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int j = 0; j < 8; j++)
            store_shared(tile_on<CHUNK>(to, j) + r * 16 * CHUNK, kf[j >> 1][2 * (j & 1) + r]);
}
/* S in bf16, for them. */
static __device__ __forceinline__ void publish_sums(const struct pure_state<D> *st, uint32_t s_tile,
                                                    int f0, int pair)
{
    const uint32_t s = s_tile + tile_at<D>(f0, 0) + 4 * pair;
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            store_shared(tile_on<D>(s, j) + k * 16 * D,
                         pack_bf16(st->s[j][2 * k], st->s[j][2 * k + 1]));
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
/* store_rows, where `to` is for the first 16 bytes that this thread stores. */
static __device__ __forceinline__ void put_rows(bf16 *to, int64_t ld, const float (&c)[D / 8][4],
                                                uint32_t tile, int warp, int lo, int hi, int lane)
{
    const int row = 16 * warp + (lane >> 2), first = 16 * warp + (lane >> 3);
    const uint32_t at = tile + tile_at<D>(row, 0) + 4 * (lane & 3);
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (row + 8 * i >= lo && row + 8 * i < hi) {
#pragma unroll
            for (int j = 0; j < D / 8; j++)
                store_shared(tile_on<D>(at, j) + i * 16 * D,
                             pack_bf16(c[j][2 * i], c[j][2 * i + 1]));
        }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++, to += 4 * ld) {
        const int r = first + 4 * i;
        if (r < lo || r >= hi) continue;
        const uint4 x = load_shared_16(tile + tile_at<D>(r, lane & 7));
        *(uint4 *)to = x;
    }
    __syncwarp();
}
/* parts: where p.num is not NULL, and perhaps where it is.
 * num / sums of rows lo .. hi - 1 of the chunk that begins at row `first` to the output, through
 * the tile they came from; or, with r, to where the next features find them. */
template <bool parts = true>
static __device__ __forceinline__ void
give_rows(const struct prefill &p, int64_t first, int head, float (&num)[D / 8][4],
          const float sums[4], float r[2], uint32_t tile, int warp, int lo, int hi, int lane)
{
    const int row = 16 * warp + (lane >> 2), pair = lane & 3;
    float den[2] = {__shfl_sync(0xffffffffu, sums[0] + sums[1], lane & ~3),
                    __shfl_sync(0xffffffffu, sums[2] + sums[3], lane & ~3)};
    bool last = p.first + p.count == p.m;
    if (!parts) last = true;
    for (int i = 0; i < (parts && p.num ? 2 : 0); i++) {
        const int64_t at = (first + row + 8 * i) * p.h + head;
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
    scale_rows(num, reciprocal(den[0]), reciprocal(den[1]));
    bf16 *to = p.o + (first + 16 * warp + (lane >> 3)) * p.ld_o + head * D + (lane & 7) * 8;
    put_rows(to, p.ld_o, num, tile, warp, lo, hi, lane);
}
#endif
