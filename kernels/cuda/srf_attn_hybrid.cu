/* SRF attention with an exact window, on tensor cores: bf16 operands, fp32 sums.
 *
 * Blocks of `window` tokens; the queries of block j see blocks j - 1 and j exactly and the older
 * ones through the far state: S (m, d), z (m), M (m) over blocks 0 .. j - 2, scaled by 2^-M. All in
 * log2 units, with L = log2(e), x = q d^(-1/4), y = k d^(-1/4):
 *     exact   e_ts = L x_t.y_s                                                value v_s, weight 1
 *     far     e_ti = L (w_i.x_t + bias_i - |x_t|^2 / 2) - log2(m) + M_i      value S_i, weight z_i
 *     o_t = sum 2^(e - r_t) value / sum 2^(e - r_t) weight,   stat_t = r_t + log2(denominator)
 * So 64 features are one more tile of an attention kernel: W stands for K, S for V. The states do
 * not depend on queries, and a feature's row of a state on no other feature:
 *     1. walk      a CTA takes 64 features of a head (16 a warp) through its blocks, S in
 *                  accumulator registers, and stores every block's state (S as bf16) in a slot.
 *                  Slot i, after block i, is what block i + 2 reads. Few heads and a long sequence:
 *                  the sequence is cut into segments whose sums a first walk makes.
 *     2. forward   a CTA takes 64 (window 32: 32) queries, 16 a warp, over two blocks of keys and
 *                  the features, one row stabiliser r_t raised as it goes.
 * Backward, with P = 2^(e - stat), delta_t = -d_o_t.o_t, dP = d_o.value + delta weight, da = P dP:
 *     1. walk as above
 *     2. dq        as forward: dq = d^(-1/4) (da [Y; W] - (sum over features of da) x)
 *     3. walk      backwards over queries: R = sum P_ti d_o_t, u = sum P_ti delta_t of the queries
 *                  that see a block through the state, in the scale of that block's slot: M never
 *                  falls, so that going back multiplies by 2^(M' - M) <= 1
 *     4. dk, dv    as dq with keys for queries; R stands for d_o, u for delta
 *     5. dW, if asked: each head's and segment's sum of da^T [x; y], then all in a fixed order
 * Window 64, m <= 64 and d <= 64: steps 1 and 2 are one walk, without slots, each tensor read once.
 * Components of q, k are clamped so that those of x, y stay within 1e17 and |x|^2 in range.
 *
 * Floor (H100, 3.35 TB/s): forward q, k, v, o once; B = 32, H = 12, T = 1024, d = 64: 201 MB,
 * 60 us (measured 132); backward 8 of these tensors, 120 us (419). Two kernels instead of one walk
 * move another 350 MB forward. kernels/lab/srf_attn_hybrid_cuda.md has the steps.
 */
#include "kernels/cuda/srf_attn.h"

#define LAZY          6 /* a row's stabiliser may be this much below its maximum */
#define WARP_FEATURES 16
#define CTA_FEATURES  64
#define WALK_THREADS  128
#define WALK_STAGES   3
#define SUB           32 /* columns of a tile taken at once in backward: registers */
#define MAX_SEGMENTS  32

struct hybrid {
    const bf16 *q, *k, *v, *w; /* (b, t, h, d) by ld; (n_sets, m, d) */
    const float *bias;         /* (n_sets, m) */
    bf16 *o;                   /* (b, t, h, d) by ld_o */
    const bf16 *d_o;
    bf16 *dq, *dk, *dv;
    float *stat, *delta; /* (b h, t) */
    int64_t ld, ld_o;
    int64_t w_step, bias_step; /* from one head's feature set to the next: 0 if shared */
    int t, heads, m, window;
    int n_chunks;         /* of query or key rows in a sequence */
    int n_slots;          /* blocks that are read through the state */
    int n_seg, seg_slots; /* segments of a walk, slots in each */
    bf16 *s, *r;          /* (b h, n_slots, m, d): S, R */
    float *top, *z, *u;   /* (b h, n_slots, m): M, z, u */
    float *sum_s, *sum_z; /* (b h, n_seg, m, d), (b h, n_seg, m): a segment's own S or R, z or u */
    float *sum_top;       /* (b h, n_seg, m) */
    float *dw_part;       /* (2, b h, n_seg, m, d) */
    float scale, half_scale; /* d^(-1/4), log2(e) d^(-1/2) / 2 */
    float limit, log2_m;     /* components of q, k; log2(m) */
};

/* ---- tiles in shared memory: rows of D + 8 elements, so that eight rows' pieces of 16 bytes lie
 * in different banks -------------------------------------------------------------------------- */

__device__ __forceinline__ void cp_async_4(float *dst, const float *src)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem_addr(dst)), "l"(src)
                 : "memory");
}

/* Threads that share a row: neighbours take neighbouring pieces. */
template <int D> __device__ constexpr int row_threads()
{
    return D % 64 == 0 ? 8 : D % 32 == 0 ? 4 : 2;
}

/* The larger magnitude, of both halves; NaN is the largest. */
__device__ __forceinline__ uint32_t max_abs_bf16(uint32_t most, uint32_t x)
{
    asm("{ .reg .b32 t; abs.bf16x2 t, %1; max.NaN.bf16x2 %0, %0, t; }" : "+r"(most) : "r"(x));
    return most;
}

/* C rows of D; those from n on are 0, and their addresses are not read. */
template <int D, int C, int THREADS>
__device__ __forceinline__ void load_rows(bf16 *to, const bf16 *from, int64_t ld, int n)
{
    constexpr int T = row_threads<D>();
    int row = threadIdx.x / T, piece = threadIdx.x % T;
    const bf16 *src = from + row * ld + piece * 8;
    uint32_t dst = smem_addr(to + row * (D + 8) + piece * 8);
#pragma unroll
    for (int r = 0; r < C; r += THREADS / T) {
        if (THREADS / T > C && row >= C) break;
#pragma unroll
        for (int i = 0; i < D / 8; i += T)
            cp_async_16(dst + (r * (D + 8) + i * 8) * 2, src + i * 8, row + r < n);
        src += ld * (THREADS / T);
    }
}

/* C floats, of which n (a multiple of 4) are there, at a multiple of 16 bytes; the others are 0. */
template <int C> __device__ __forceinline__ void load_features(float *to, const float *from, int n)
{
    int i = threadIdx.x * 4;
    if (i < C) cp_async_16(smem_addr(to + i), from + (i < n ? i : 0), i < n);
}

/* stat and delta of C queries, of which n are there: the others get no weight (2^-inf). */
template <int C>
__device__ __forceinline__ void load_stats(float *stat, float *delta, const struct hybrid *p,
                                           int64_t from, int n)
{
    int i = threadIdx.x;
    if (i < n && i < C) {
        cp_async_4(stat + i, p->stat + from + i);
        cp_async_4(delta + i, p->delta + from + i);
    } else if (i < C) {
        stat[i] = INFINITY;
        delta[i] = 0;
    }
}

/* Clamps the pieces that this thread loaded (NaN stays), which have arrived. That is rarely needed:
 * a look at the largest first. half, with NORM, is half_scale |row|^2. */
template <int D, int C, int THREADS, bool NORM>
__device__ __forceinline__ void clean_rows(bf16 *rows, const struct hybrid *p, float *half)
{
    constexpr int T = row_threads<D>();
    int row = threadIdx.x / T, piece = threadIdx.x % T;
    if (THREADS / T > C && row >= C) return;
    bf16 *mine = rows + row * (D + 8) + piece * 8;
    uint32_t limit = pack_bf16(p->limit, p->limit), most = 0;
#pragma unroll
    for (int r = 0; r < C; r += THREADS / T) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < D / 8; i += T) {
            uint4 all = *(const uint4 *)(mine + r * (D + 8) + i * 8);
            uint32_t x[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                most = max_abs_bf16(most, x[j]);
                if (NORM) {
                    float2 f = unpack_bf16(x[j]);
                    sum = fmaf(f.x, f.x, sum);
                    sum = fmaf(f.y, f.y, sum);
                }
            }
        }
        if (NORM) {
#pragma unroll
            for (int o = T / 2; o; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
            sum *= p->half_scale;
            /* Not fminf: NaN stays. */
            if (piece == 0) half[row + r] = sum > SRF__HALF_LIMIT ? SRF__HALF_LIMIT : sum;
        }
    }
    if ((most & 0xffffu) <= (limit & 0xffffu) && most >> 16 <= limit >> 16) return;
    for (int r = 0; r < C; r += THREADS / T)
        for (int i = 0; i < D / 8; i += T) {
            uint32_t *x = (uint32_t *)(mine + r * (D + 8) + i * 8);
            for (int j = 0; j < 4; j++) x[j] = clamp_bf16(x[j], limit);
        }
}

/* ---- products of a warp: 16 rows in fragments ------------------------------------------------ */

/* A fragment of k columns 16 kk .. of 16 rows in shared memory. */
template <int D> __device__ __forceinline__ void load_a(uint32_t a[4], const bf16 *rows, int kk)
{
    int lane = threadIdx.x & 31;
    ldmatrix_x4(a, smem_addr(rows + (lane & 15) * (D + 8) + kk * 16 + (lane >> 4) * 8));
}
/* The same from 16 rows of D elements in global memory. */
template <int D>
__device__ __forceinline__ void load_a_global(uint32_t (&a)[D / 16][4], const bf16 *rows)
{
    int lane = threadIdx.x & 31;
    const bf16 *at = rows + (lane >> 2) * D + (lane & 3) * 2;
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) {
        a[kk][0] = *(const uint32_t *)(at + kk * 16);
        a[kk][1] = *(const uint32_t *)(at + kk * 16 + 8 * D);
        a[kk][2] = *(const uint32_t *)(at + kk * 16 + 8);
        a[kk][3] = *(const uint32_t *)(at + kk * 16 + 8 * D + 8);
    }
}

/* A warp's 16 rows as A operand: in registers where there are enough, else read again each time. */
template <int D> struct a_rows {
    static constexpr bool KEEP = D <= 64;
    uint32_t a[KEEP ? D / 16 : 1][4];
    const bf16 *rows;

    __device__ __forceinline__ void init(const bf16 *from)
    {
        rows = from;
        if (KEEP)
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++) load_a<D>(a[KEEP ? kk : 0], from, kk);
    }
    __device__ __forceinline__ const uint32_t *get(int kk)
    {
        if (!KEEP) load_a<D>(a[0], rows, kk);
        return a[KEEP ? kk : 0];
    }
};

/* c (16, 8 N) += a (16, 16) tile^T: tile (8 N, D) rows, its k columns 16 kk .. */
template <int D, int N>
__device__ __forceinline__ void mma_rows(float (&c)[N][4], const uint32_t a[4], const bf16 *tile,
                                         int kk)
{
    int lane = threadIdx.x & 31;
    const bf16 *at =
        tile + ((lane & 7) + ((lane >> 4) << 3)) * (D + 8) + kk * 16 + ((lane >> 3) & 1) * 8;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, smem_addr(at + n * 8 * (D + 8)));
        mma_bf16(c[n], a, b[0], b[1]);
        mma_bf16(c[n + 1], a, b[2], b[3]);
    }
}

/* c (16, D) += a (16, 16) tile: 16 rows (16, D) of a tile. */
template <int D>
__device__ __forceinline__ void mma_cols(float (&c)[D / 8][4], const uint32_t a[4],
                                         const bf16 *tile)
{
    int lane = threadIdx.x & 31;
    const bf16 *at = tile + ((lane & 7) + ((lane >> 3) & 1) * 8) * (D + 8) + (lane >> 4) * 8;
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, smem_addr(at + n * 8));
        mma_bf16(c[n], a, b[0], b[1]);
        mma_bf16(c[n + 1], a, b[2], b[3]);
    }
}

/* Columns 16 k .. 16 k + 15 of a product, as the A of the next. */
__device__ __forceinline__ void pack_a(uint32_t a[4], const float left[4], const float right[4])
{
    a[0] = pack_bf16(left[0], left[1]);
    a[1] = pack_bf16(left[2], left[3]);
    a[2] = pack_bf16(right[0], right[1]);
    a[3] = pack_bf16(right[2], right[3]);
}

template <int N> __device__ __forceinline__ void zero(float (&c)[N][4])
{
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) c[n][j] = 0;
}

template <int N>
__device__ __forceinline__ void scale_rows(float (&c)[N][4], float upper, float lower)
{
#pragma unroll
    for (int n = 0; n < N; n++) {
        c[n][0] *= upper;
        c[n][1] *= upper;
        c[n][2] *= lower;
        c[n][3] *= lower;
    }
}

/* c (16, D) as bf16 into rows to + row ld; rows from n on are not there. Neighbours exchange halves
 * so that a quad writes whole sectors. */
template <int D>
__device__ __forceinline__ void store_rows(bf16 *to, int64_t ld, int n, const float (&c)[D / 8][4])
{
    int lane = threadIdx.x & 31, g = lane >> 2, p = lane & 3, odd = p & 1;
    int col = odd ? 8 + 2 * (p - 1) : 2 * p;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = g + 8 * half;
        bf16 *at = to + row * ld + col;
#pragma unroll
        for (int i = 0; i < D / 8; i += 2) {
            uint32_t left = pack_bf16(c[i][2 * half], c[i][2 * half + 1]);
            uint32_t right = pack_bf16(c[i + 1][2 * half], c[i + 1][2 * half + 1]);
            uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? left : right, 1);
            uint2 out = odd ? make_uint2(got, right) : make_uint2(left, got);
            if (row < n) *(uint2 *)(at + i * 8) = out;
        }
    }
}

/* 2^e for a weight that is below 2 but for rounding, where exponents are huge. NaN stays. */
__device__ __forceinline__ float far_weight(float e)
{
    asm("min.NaN.f32 %0, %0, 0f3F800000;" : "+f"(e));
    return exp2_fast(e);
}

/* ---- walks --------------------------------------------------------------------------------------
 * Transposed products, 16 features a warp by C tokens: the weights of a tile are the A operand of
 * the sum they go into. Shared memory: WALK_STAGES x (tokens, values,
 * |tokens|^2 / 2, stat, delta). */

template <int D, int C> struct walk_smem {
    bf16 pair[WALK_STAGES][2][C * (D + 8)];
    float half[WALK_STAGES][C], stat[WALK_STAGES][C], delta[WALK_STAGES][C];
};

/* Tile i of a walk over slots [lo, hi): where its tokens start, and whose slot it belongs to. */
template <int C, bool QUERIES>
__device__ __forceinline__ int walk_token(const struct hybrid *p, int lo, int hi, int i, int *slot)
{
    int per_block = p->window / C, block = i / per_block, part = i - block * per_block;
    *slot = QUERIES ? hi - 1 - block : lo + block;
    return (*slot + (QUERIES ? 2 : 0)) * p->window + part * C;
}

template <int D, int C, bool QUERIES>
__device__ __forceinline__ void load_walk(struct walk_smem<D, C> *sm, int stage,
                                          const struct hybrid *p, int64_t bh, int token)
{
    int64_t seq = bh / p->heads, head = bh % p->heads;
    int n = min(C, p->t - token);
    int64_t in = (seq * p->t + token) * p->ld + head * D;
    load_rows<D, C, WALK_THREADS>(sm->pair[stage][0], (QUERIES ? p->q : p->k) + in, p->ld, n);
    if (QUERIES) {
        int64_t out = (seq * p->t + token) * p->ld_o + head * D;
        load_rows<D, C, WALK_THREADS>(sm->pair[stage][1], p->d_o + out, p->ld_o, n);
        load_stats<C>(sm->stat[stage], sm->delta[stage], p, bh * p->t + token, n);
    } else {
        load_rows<D, C, WALK_THREADS>(sm->pair[stage][1], p->v + in, p->ld, n);
    }
}

/* 16 features of a state in a warp: S; z of rows g, g + 8 in 0, 2, shares of a sum over the quad;
 * R, u of queries likewise. */
template <int D> struct state_sums {
    float s[D / 8][4], z[4], top[2];
};
template <int D> __device__ __forceinline__ void start_state(struct state_sums<D> *st)
{
    zero(st->s);
    st->z[0] = st->z[1] = st->z[2] = st->z[3] = 0;
    st->top[0] = st->top[1] = SRF__UNSET;
}

/* The segments before this one (after it, for queries), in their order. */
template <int D, bool QUERIES>
__device__ __forceinline__ void add_segments(struct state_sums<D> *st, const struct hybrid *p,
                                             int64_t bh, int seg, int feature)
{
    int lane = threadIdx.x & 31, g = lane >> 2, quad = lane & 3;
    int n_before = QUERIES ? p->n_seg - 1 - seg : seg;
    for (int i = 0; i < n_before; i++) {
        int other = QUERIES ? p->n_seg - 1 - i : i;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int64_t row = (bh * p->n_seg + other) * p->m + feature + g + 8 * j;
            int64_t slot_row =
                (bh * p->n_slots + other * p->seg_slots) * p->m + feature + g + 8 * j;
            float to = QUERIES ? p->top[slot_row] : p->sum_top[row];
            float next = QUERIES ? to : fmaxf(st->top[j], to);
            float step = st->top[j] == SRF__UNSET ? 0 : exp2_fast(-fabsf(next - st->top[j]));
            float by = exp2_fast(to - next);
            st->z[2 * j] = st->z[2 * j] * step + (quad == 0 ? by * p->sum_z[row] : 0);
            st->top[j] = next;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                float2 x = *(const float2 *)(p->sum_s + row * D + n * 8 + quad * 2);
                st->s[n][2 * j] = st->s[n][2 * j] * step + by * x.x;
                st->s[n][2 * j + 1] = st->s[n][2 * j + 1] * step + by * x.y;
            }
        }
    }
}

/* Exponents of 16 features (W in w) for C tokens. */
template <int D, int C>
__device__ __forceinline__ void
feature_exponents(float (&e)[C / 8][4], const uint32_t (&w)[D / 16][4], const float bias[2],
                  const bf16 *tokens, const float *half, const struct hybrid *p)
{
    int quad = threadIdx.x & 3;
    zero(e);
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) mma_rows<D, C / 8>(e, w[kk], tokens, kk);
#pragma unroll
    for (int n = 0; n < C / 8; n++) {
        float2 sub = *(const float2 *)(half + n * 8 + quad * 2);
#pragma unroll
        for (int j = 0; j < 4; j++)
            e[n][j] = fmaf(e[n][j], SRF__LOG2E * p->scale, bias[j >> 1] - (j & 1 ? sub.y : sub.x));
    }
}

template <int D>
__device__ __forceinline__ void rescale_state(struct state_sums<D> *st, float upper, float lower)
{
    st->z[0] *= upper;
    st->z[2] *= lower;
    if (__any_sync(0xffffffffu, upper != 1 || lower != 1)) scale_rows(st->s, upper, lower);
}

/* C keys into a state. */
template <int D, int C>
__device__ __forceinline__ void add_keys(struct state_sums<D> *st, const uint32_t (&w)[D / 16][4],
                                         const float bias[2], const bf16 *keys, const bf16 *values,
                                         const float *half, const struct hybrid *p)
{
    uint32_t ones = (threadIdx.x & 31) < 4 ? 0x3f803f80u : 0; /* a column: sums of rows */
    float e[C / 8][4], most[2] = {st->top[0], st->top[1]};
    feature_exponents<D, C>(e, w, bias, keys, half, p);
#pragma unroll
    for (int n = 0; n < C / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) most[j >> 1] = fmaxf(most[j >> 1], e[n][j]);
#pragma unroll
    for (int j = 0; j < 2; j++) most[j] = rintf(quad_max(most[j]));
    rescale_state(st, exp2_fast(st->top[0] - most[0]), exp2_fast(st->top[1] - most[1]));
    st->top[0] = most[0];
    st->top[1] = most[1];
#pragma unroll
    for (int n = 0; n < C / 8; n += 2) {
        uint32_t a[4];
#pragma unroll
        for (int j = 0; j < 8; j++)
            e[n + (j >> 2)][j & 3] = exp2_fast(e[n + (j >> 2)][j & 3] - most[(j >> 1) & 1]);
        pack_a(a, e[n], e[n + 1]);
        /* z sums the rounded weights, as S does. */
        mma_bf16(st->z, a, ones, ones);
        mma_cols<D>(st->s, a, values + n * 8 * (D + 8));
    }
}

/* C queries into R, u, in the scale of M = top. */
template <int D, int C>
__device__ __forceinline__ void
add_queries(struct state_sums<D> *st, const uint32_t (&w)[D / 16][4], const float bias[2],
            const bf16 *queries, const bf16 *d_o, const float *half, const float *stat,
            const float *delta, const float top[2], const struct hybrid *p)
{
    int quad = threadIdx.x & 3;
    float e[C / 8][4], step[2];
    feature_exponents<D, C>(e, w, bias, queries, half, p);
#pragma unroll
    for (int j = 0; j < 2; j++) {
        step[j] = st->top[j] == SRF__UNSET ? 0 : exp2_fast(top[j] - st->top[j]);
        st->top[j] = top[j];
    }
    rescale_state(st, step[0], step[1]);
#pragma unroll
    for (int n = 0; n < C / 8; n += 2) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float2 by = *(const float2 *)(stat + (n + i) * 8 + quad * 2);
#pragma unroll
            for (int j = 0; j < 4; j++)
                e[n + i][j] = far_weight(e[n + i][j] + (top[j >> 1] - (j & 1 ? by.y : by.x)));
        }
        pack_a(a, e[n], e[n + 1]);
        /* a[j]: row g + 8 (j & 1), columns 8 (n + j / 2) + 2 quad .. */
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 f = unpack_bf16(a[j]);
            float2 by = *(const float2 *)(delta + (n + (j >> 1)) * 8 + quad * 2);
            st->z[2 * (j & 1)] += f.x * by.x + f.y * by.y;
        }
        mma_cols<D>(st->s, a, d_o + n * 8 * (D + 8));
    }
}

/* The slots of one head, 64 features and one segment; with `totals` only the segment's own sums. */
template <int D, int C, bool QUERIES>
__global__ void __launch_bounds__(WALK_THREADS)
    walk_kernel(const __grid_constant__ struct hybrid p, bool totals)
{
    extern __shared__ __align__(16) char smem[];
    struct walk_smem<D, C> *sm = (struct walk_smem<D, C> *)smem;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, quad = lane & 3;
    int groups = (p.m + CTA_FEATURES - 1) / CTA_FEATURES;
    int seg = blockIdx.x % p.n_seg, group = blockIdx.x / p.n_seg % groups;
    int64_t bh = blockIdx.x / p.n_seg / groups;
    int feature = group * CTA_FEATURES + warp * WARP_FEATURES;
    bool active = feature < p.m; /* m is a multiple of 16 */
    int lo = seg * p.seg_slots, hi = min(lo + p.seg_slots, p.n_slots);
    int n_tiles = (hi - lo) * (p.window / C), slot;
    float *sums = QUERIES ? p.u : p.z;
    bf16 *states = QUERIES ? p.r : p.s;
    if (totals && seg == (QUERIES ? 0 : p.n_seg - 1)) return; /* nothing starts after it */

    for (int i = 0; i < WALK_STAGES - 1; i++) {
        int token = walk_token<C, QUERIES>(&p, lo, hi, i, &slot);
        if (i < n_tiles) load_walk<D, C, QUERIES>(sm, i, &p, bh, token);
        cp_async_commit();
    }
    uint32_t w[D / 16][4] = {};
    float bias[2] = {0, 0};
    struct state_sums<D> st;
    start_state(&st);
    if (active) {
        int64_t set = bh % p.heads;
        load_a_global<D>(w, p.w + set * p.w_step + (int64_t)feature * D);
        for (int j = 0; j < 2; j++)
            bias[j] = SRF__LOG2E * p.bias[set * p.bias_step + feature + g + 8 * j] -
                      (QUERIES ? p.log2_m : 0);
        if (!totals) add_segments<D, QUERIES>(&st, &p, bh, seg, feature);
    }

    for (int i = 0; i < n_tiles; i++) {
        int stage = i % WALK_STAGES, ahead = i + WALK_STAGES - 1;
        if (ahead < n_tiles) {
            int token = walk_token<C, QUERIES>(&p, lo, hi, ahead, &slot);
            load_walk<D, C, QUERIES>(sm, ahead % WALK_STAGES, &p, bh, token);
        }
        cp_async_commit();
        cp_async_wait<WALK_STAGES - 1>();
        clean_rows<D, C, WALK_THREADS, true>(sm->pair[stage][0], &p, sm->half[stage]);
        __syncthreads();
        walk_token<C, QUERIES>(&p, lo, hi, i, &slot);
        if (active) {
            const bf16 *tokens = sm->pair[stage][0], *values = sm->pair[stage][1];
            if (QUERIES) {
                int64_t row = (bh * p.n_slots + slot) * p.m + feature + g;
                float top[2] = {p.top[row], p.top[row + 8]};
                add_queries<D, C>(&st, w, bias, tokens, values, sm->half[stage], sm->stat[stage],
                                  sm->delta[stage], top, &p);
            } else {
                add_keys<D, C>(&st, w, bias, tokens, values, sm->half[stage], &p);
            }
            if (!totals && (i + 1) % (p.window / C) == 0) {
                int64_t row = (bh * p.n_slots + slot) * p.m + feature;
                store_rows<D>(states + row * D, D, WARP_FEATURES, st.s);
                for (int j = 0; j < 2; j++) {
                    float sum = quad_sum(st.z[2 * j]);
                    if (quad) continue;
                    sums[row + g + 8 * j] = sum;
                    if (!QUERIES) p.top[row + g + 8 * j] = st.top[j];
                }
            }
        }
        __syncthreads();
    }
    if (!totals || !active) return;
    for (int j = 0; j < 2; j++) {
        int64_t row = (bh * p.n_seg + seg) * p.m + feature + g + 8 * j;
        float sum = quad_sum(st.z[2 * j]);
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *(float2 *)(p.sum_s + row * D + n * 8 + quad * 2) =
                make_float2(st.s[n][2 * j], st.s[n][2 * j + 1]);
        if (quad) continue;
        p.sum_z[row] = sum;
        if (!QUERIES) p.sum_top[row] = st.top[j];
    }
}

/* ---- forward --------------------------------------------------------------------------------- */

template <int D, int C> struct fwd_smem {
    bf16 q[C * (D + 8)], pair[2][2][C * (D + 8)];
    float half[C], bias[2][C], top[2][C], z[2][C];
};

/* The rows a CTA works on. */
struct chunk {
    int64_t bh, in, out; /* head; element offsets of the head's token 0 by ld, ld_o */
    int64_t set;
    int row, block; /* first token, its block */
};
template <int D, int C> __device__ __forceinline__ struct chunk chunk_of(const struct hybrid *p)
{
    struct chunk c;
    unsigned bh = blockIdx.x / (unsigned)p->n_chunks;
    c.bh = bh;
    c.row = (int)(blockIdx.x - bh * (unsigned)p->n_chunks) * C;
    c.block = (int)((unsigned)c.row / (unsigned)p->window);
    int64_t seq = bh / (unsigned)p->heads;
    c.set = bh % (unsigned)p->heads;
    c.in = seq * p->t * p->ld + c.set * D;
    c.out = seq * p->t * p->ld_o + c.set * D;
    return c;
}

/* C features from `first` on: W, a slot's rows of S or R, and three vectors. */
template <int D, int C>
__device__ __forceinline__ void load_far(bf16 *pair[2], float *bias, float *top, float *sum,
                                         const struct hybrid *p, const struct chunk *c, int slot,
                                         const bf16 *states, const float *sums, int first)
{
    int n = p->m - first;
    int64_t row = (c->bh * p->n_slots + slot) * p->m + first;
    load_rows<D, C, 2 * C>(pair[0], p->w + c->set * p->w_step + (int64_t)first * D, D, n);
    load_rows<D, C, 2 * C>(pair[1], states + row * D, D, n);
    load_features<C>(bias, p->bias + c->set * p->bias_step + first, n);
    load_features<C>(top, p->top + row, n);
    load_features<C>(sum, sums + row, n);
}

template <int D, int C>
__device__ __forceinline__ void load_fwd(struct fwd_smem<D, C> *sm, int stage,
                                         const struct hybrid *p, const struct chunk *c, int i,
                                         int n_exact)
{
    bf16 *pair[2] = {sm->pair[stage][0], sm->pair[stage][1]};
    if (i < n_exact) {
        int token = c->row - (n_exact - 1 - i) * C, n = p->t - token;
        int64_t at = c->in + token * p->ld;
        load_rows<D, C, 2 * C>(pair[0], p->k + at, p->ld, n);
        load_rows<D, C, 2 * C>(pair[1], p->v + at, p->ld, n);
    } else {
        load_far<D, C>(pair, sm->bias[stage], sm->top[stage], sm->z[stage], p, c, c->block - 2,
                       p->s, p->z, (i - n_exact) * C);
    }
}

/* Sums of 16 rows so far, in the scale 2^-most. */
template <int D> struct row_sums {
    float o[D / 8][4], most[2];
    float den[4]; /* of rows g, g + 8 in 0, 2: shares of a sum over the quad */
};
template <int D> __device__ __forceinline__ void start_sums(struct row_sums<D> *r)
{
    zero(r->o);
    r->den[0] = r->den[1] = r->den[2] = r->den[3] = 0;
    r->most[0] = r->most[1] = -INFINITY;
}

/* Exponents of a warp's rows against a tile of keys; causal: the tile of the rows themselves. */
template <int D, int C>
__device__ __forceinline__ void exact_exponents(float (&e)[C / 8][4],
                                                const uint32_t (&q)[D / 16][4], const bf16 *tile,
                                                const struct hybrid *p, bool causal)
{
    int lane = threadIdx.x & 31, row = (threadIdx.x >> 5) * 16 + (lane >> 2) - (lane & 3) * 2;
    zero(e);
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) mma_rows<D, C / 8>(e, q[kk], tile, kk);
#pragma unroll
    for (int n = 0; n < C / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) e[n][j] *= 2 * p->half_scale;
    if (!causal) return;
#pragma unroll
    for (int n = 0; n < C / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (n * 8 + (j & 1) - (j >> 1) * 8 > row) e[n][j] = -INFINITY;
}

/* The same against C features, `left` of which there are: W in tile, their biases and M. */
template <int D, int C>
__device__ __forceinline__ void far_exponents(float (&e)[C / 8][4], const uint32_t (&q)[D / 16][4],
                                              const bf16 *tile, const float *bias, const float *top,
                                              const float half[2], const struct hybrid *p, int left)
{
    int quad = threadIdx.x & 3;
    zero(e);
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) mma_rows<D, C / 8>(e, q[kk], tile, kk);
#pragma unroll
    for (int n = 0; n < C / 8; n++) {
        float2 b = *(const float2 *)(bias + n * 8 + quad * 2);
        float2 m = *(const float2 *)(top + n * 8 + quad * 2);
        b.x = fmaf(SRF__LOG2E, b.x, -p->log2_m) + m.x;
        b.y = fmaf(SRF__LOG2E, b.y, -p->log2_m) + m.y;
        if (n * 8 + quad * 2 >= left) b.x = b.y = -INFINITY;
#pragma unroll
        for (int j = 0; j < 4; j++)
            e[n][j] = fmaf(e[n][j], SRF__LOG2E * p->scale, (j & 1 ? b.y : b.x) - half[j >> 1]);
    }
}

/* Adds the weights 2^e of a tile: times its values, and times z or, where z is NULL, 1. */
template <int D, int C>
__device__ __forceinline__ void add_tile(struct row_sums<D> *r, float (&e)[C / 8][4],
                                         const bf16 *values, const float *z)
{
    int lane = threadIdx.x & 31, g = lane >> 2, quad = lane & 3;
    uint32_t ones = g == 0 ? 0x3f803f80u : 0; /* a column of ones: sums of rows as a product */
    float next[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < C / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) next[j >> 1] = fmaxf(next[j >> 1], e[n][j]);
    /* A stabiliser near the maximum does as well, and most tiles need no rescaling. */
    bool grows[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        next[j] = quad_max(next[j]);
        grows[j] = next[j] > r->most[j] + LAZY;
    }
    if (__any_sync(0xffffffffu, grows[0] || grows[1])) {
        float step[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            step[j] = grows[j] ? exp2_fast(r->most[j] - next[j]) : 1;
            r->most[j] = grows[j] ? next[j] : r->most[j];
            r->den[2 * j] *= step[j];
        }
        scale_rows(r->o, step[0], step[1]);
    }
#pragma unroll
    for (int n = 0; n < C / 8; n += 2) {
        uint32_t a[4];
#pragma unroll
        for (int j = 0; j < 8; j++)
            e[n + (j >> 2)][j & 3] = exp2_fast(e[n + (j >> 2)][j & 3] - r->most[(j >> 1) & 1]);
        pack_a(a, e[n], e[n + 1]);
        /* The rounded weights are summed: numerator and denominator use the same. */
        if (!z)
            mma_bf16(r->den, a, ones, ones);
        else
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float2 f = unpack_bf16(a[j]);
                float2 by = *(const float2 *)(z + (n + (j >> 1)) * 8 + quad * 2);
                r->den[2 * (j & 1)] += f.x * by.x + f.y * by.y;
            }
        mma_cols<D>(r->o, a, values + n * 8 * (D + 8));
    }
}

/* o and stat of a warp's rows, which start at token `row`. */
template <int D>
__device__ __forceinline__ void store_sums(struct row_sums<D> *r, const struct hybrid *p,
                                           int64_t bh, int64_t out, int row)
{
    int lane = threadIdx.x & 31, g = lane >> 2;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        r->den[2 * j] = quad_sum(r->den[2 * j]);
        if (p->stat && (lane & 3) == 0 && row + g + 8 * j < p->t)
            p->stat[bh * p->t + row + g + 8 * j] = r->most[j] + log2f(r->den[2 * j]);
    }
    scale_rows(r->o, 1 / r->den[0], 1 / r->den[2]);
    store_rows<D>(p->o + out + row * p->ld_o, p->ld_o, p->t - row, r->o);
}

template <int D, int C>
__global__ void __launch_bounds__(2 * C) fwd_kernel(const __grid_constant__ struct hybrid p)
{
    extern __shared__ __align__(16) char smem[];
    struct fwd_smem<D, C> *sm = (struct fwd_smem<D, C> *)smem;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2;
    struct chunk c = chunk_of<D, C>(&p);
    int n_exact = (c.row - max(c.block - 1, 0) * p.window) / C + 1;
    int n_tiles = n_exact + (c.block < 2 ? 0 : (p.m + C - 1) / C);

    load_rows<D, C, 2 * C>(sm->q, p.q + c.in + c.row * p.ld, p.ld, p.t - c.row);
    cp_async_commit();
    load_fwd(sm, 0, &p, &c, 0, n_exact);
    cp_async_commit();
    cp_async_wait<1>();
    clean_rows<D, C, 2 * C, true>(sm->q, &p, sm->half);
    __syncthreads();
    uint32_t q[D / 16][4];
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) load_a<D>(q[kk], sm->q + warp * 16 * (D + 8), kk);
    float half[2] = {sm->half[warp * 16 + g], sm->half[warp * 16 + g + 8]};
    struct row_sums<D> sums;
    start_sums(&sums);

    for (int i = 0; i < n_tiles; i++) {
        int stage = i & 1;
        if (i + 1 < n_tiles) load_fwd(sm, stage ^ 1, &p, &c, i + 1, n_exact);
        cp_async_commit();
        cp_async_wait<1>();
        if (i < n_exact) clean_rows<D, C, 2 * C, false>(sm->pair[stage][0], &p, NULL);
        __syncthreads();
        const bf16 *tile = sm->pair[stage][0], *values = sm->pair[stage][1];
        float e[C / 8][4];
        if (i < n_exact) {
            exact_exponents<D, C>(e, q, tile, &p, i == n_exact - 1);
            add_tile<D, C>(&sums, e, values, NULL);
        } else {
            far_exponents<D, C>(e, q, tile, sm->bias[stage], sm->top[stage], half, &p,
                                p.m - (i - n_exact) * C);
            add_tile<D, C>(&sums, e, values, sm->z[stage]);
        }
        __syncthreads();
    }
    store_sums<D>(&sums, &p, c.bh, c.out, c.row + warp * 16);
}

/* ---- forward in one walk: window 64, m <= 64, d <= 64 -------------------------------------------
 * Each tensor passes once. A CTA takes a head's segment block by block: its warps are 16 rows of
 * queries each and 16 features of the state each. Before block j they hold S of the blocks up to
 * j - 2; they put it into shared memory for the queries, then take in block j - 1, whose k, v are
 * still there as the queries' block before. */

template <int D> struct fused_smem {
    bf16 q[64 * (D + 8)], pair[2][2][64 * (D + 8)]; /* k, v of even and odd blocks */
    bf16 w[64 * (D + 8)], s[64 * (D + 8)];
    float half_q[64], half_k[2][64], bias[64], top[64], z[64];
};

template <int D>
__device__ __forceinline__ void load_fused(struct fused_smem<D> *sm, const struct hybrid *p,
                                           int64_t in, int block, bool queries)
{
    int row = block * 64, n = p->t - row;
    int64_t at = in + row * p->ld;
    load_rows<D, 64, 128>(sm->pair[block & 1][0], p->k + at, p->ld, n);
    load_rows<D, 64, 128>(sm->pair[block & 1][1], p->v + at, p->ld, n);
    if (queries) load_rows<D, 64, 128>(sm->q, p->q + at, p->ld, n);
}

/* What a CTA walks through. */
struct walker {
    int64_t bh, set, in, out; /* head; element offsets of the head's token 0 by ld, ld_o */
    int seg, begin, end;      /* blocks [begin, end) */
    int n_blocks, feature;    /* the warp's first feature */
};
template <int D> __device__ __forceinline__ struct walker walker_of(const struct hybrid *p)
{
    struct walker w;
    unsigned head = blockIdx.x / (unsigned)p->n_seg;
    int64_t seq = head / (unsigned)p->heads;
    w.bh = head;
    w.set = head % (unsigned)p->heads;
    w.in = seq * p->t * p->ld + w.set * D;
    w.out = seq * p->t * p->ld_o + w.set * D;
    w.seg = (int)(blockIdx.x - head * (unsigned)p->n_seg);
    w.n_blocks = (p->t + 63) / 64;
    /* The segments before hold the blocks before lo: what block lo + 1 reads. */
    int lo = w.seg * p->seg_slots;
    w.begin = w.seg ? lo + 1 : 0;
    w.end = w.seg + 1 < p->n_seg ? lo + p->seg_slots + 1 : w.n_blocks;
    w.feature = (threadIdx.x >> 5) * WARP_FEATURES;
    return w;
}

/* The first loads, not committed yet, and the state before the segment. */
template <int D>
__device__ __forceinline__ void start_walk(struct fused_smem<D> *sm, struct state_sums<D> *state,
                                           float bias[2], const struct hybrid *p,
                                           const struct walker *w)
{
    int g = (threadIdx.x & 31) >> 2;
    load_rows<D, 64, 128>(sm->w, p->w + w->set * p->w_step, D, p->m);
    load_features<64>(sm->bias, p->bias + w->set * p->bias_step, p->m);
    if (w->begin) load_fused<D>(sm, p, w->in, w->begin - 1, false);
    load_fused<D>(sm, p, w->in, w->begin, true);
    start_state(state);
    bias[0] = bias[1] = 0;
    if (w->feature >= p->m) return;
    for (int j = 0; j < 2; j++)
        bias[j] = SRF__LOG2E * p->bias[w->set * p->bias_step + w->feature + g + 8 * j];
    add_segments<D, false>(state, p, w->bh, w->seg, w->feature);
}

/* Waits for a block's loads (the first time for two blocks'). */
template <int D>
__device__ __forceinline__ void arrive(struct fused_smem<D> *sm, const struct hybrid *p, int block,
                                       bool first)
{
    int now = block & 1;
    cp_async_wait<0>();
    clean_rows<D, 64, 128, true>(sm->q, p, sm->half_q);
    clean_rows<D, 64, 128, true>(sm->pair[now][0], p, sm->half_k[now]);
    if (block && first) clean_rows<D, 64, 128, true>(sm->pair[now ^ 1][0], p, sm->half_k[now ^ 1]);
    __syncthreads();
}

/* S, z, M of a warp's features for all queries; seen after the next barrier. */
template <int D>
__device__ __forceinline__ void publish_state(struct fused_smem<D> *sm,
                                              const struct state_sums<D> *state, int feature)
{
    int lane = threadIdx.x & 31, g = lane >> 2, quad = lane & 3;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        int row = feature + g + 8 * j;
        uint32_t *s = (uint32_t *)(sm->s + row * (D + 8) + quad * 2);
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            s[n * 4] = pack_bf16(state->s[n][2 * j], state->s[n][2 * j + 1]);
        float z = quad_sum(state->z[2 * j]);
        if (quad) continue;
        sm->z[row] = z;
        sm->top[row] = state->top[j];
    }
}

/* The keys of a block in shared memory into a warp's part of the state. */
template <int D>
__device__ __forceinline__ void take_block(struct fused_smem<D> *sm, struct state_sums<D> *state,
                                           const float bias[2], const struct hybrid *p, int stage,
                                           int feature)
{
    uint32_t w[D / 16][4];
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) load_a<D>(w[kk], sm->w + feature * (D + 8), kk);
    add_keys<D, 64>(state, w, bias, sm->pair[stage][0], sm->pair[stage][1], sm->half_k[stage], p);
}

template <int D>
__global__ void __launch_bounds__(128, 3) fused_fwd_kernel(const __grid_constant__ struct hybrid p)
{
    extern __shared__ __align__(16) char smem[];
    struct fused_smem<D> *sm = (struct fused_smem<D> *)smem;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2;
    struct walker w = walker_of<D>(&p);
    struct state_sums<D> state;
    float bias[2];
    start_walk<D>(sm, &state, bias, &p, &w);
    cp_async_commit();

    for (int block = w.begin; block < w.end; block++) {
        int now = block & 1, before = now ^ 1;
        arrive<D>(sm, &p, block, block == w.begin);
        uint32_t q[D / 16][4];
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++) load_a<D>(q[kk], sm->q + warp * 16 * (D + 8), kk);
        float half[2] = {sm->half_q[warp * 16 + g], sm->half_q[warp * 16 + g + 8]};
        float e[8][4];
        struct row_sums<D> sums;
        start_sums(&sums);
        if (block >= 2) publish_state<D>(sm, &state, w.feature);
        if (block) {
            exact_exponents<D, 64>(e, q, sm->pair[before][0], &p, false);
            add_tile<D, 64>(&sums, e, sm->pair[before][1], NULL);
            if (w.feature < p.m && block + 1 < w.n_blocks)
                take_block<D>(sm, &state, bias, &p, before, w.feature);
        }
        __syncthreads();
        if (block + 1 < w.end) load_fused<D>(sm, &p, w.in, block + 1, true);
        cp_async_commit();
        exact_exponents<D, 64>(e, q, sm->pair[now][0], &p, true);
        add_tile<D, 64>(&sums, e, sm->pair[now][1], NULL);
        if (block >= 2) {
            far_exponents<D, 64>(e, q, sm->w, sm->bias, sm->top, half, &p, p.m);
            add_tile<D, 64>(&sums, e, sm->s, sm->z);
        }
        store_sums<D>(&sums, &p, w.bh, w.out, block * 64 + warp * 16);
    }
}

/* ---- backward -----------------------------------------------------------------------------------
 * One kernel for rows of queries (dq) and rows of keys (dk, dv). */

template <int D, int C> struct bwd_smem {
    bf16 rows[2][C * (D + 8)]; /* q, d_o or k, v */
    bf16 pair[2][2][C * (D + 8)];
    float half[C], bias[2][C], top[2][C], sum[2][C], stat[2][C], delta[2][C];
};

/* Tile i: keys and values before queries, queries and d_o after keys, then features. */
template <int D, int C, bool KEYS>
__device__ __forceinline__ void load_bwd(struct bwd_smem<D, C> *sm, int stage,
                                         const struct hybrid *p, const struct chunk *c, int i,
                                         int n_exact)
{
    bf16 *pair[2] = {sm->pair[stage][0], sm->pair[stage][1]};
    if (i >= n_exact) {
        load_far<D, C>(pair, sm->bias[stage], sm->top[stage], sm->sum[stage], p, c,
                       KEYS ? c->block : c->block - 2, KEYS ? p->r : p->s, KEYS ? p->u : p->z,
                       (i - n_exact) * C);
        return;
    }
    int token = KEYS ? c->row + i * C : c->row - (n_exact - 1 - i) * C, n = p->t - token;
    int64_t at = c->in + token * p->ld;
    load_rows<D, C, 2 * C>(pair[0], (KEYS ? p->q : p->k) + at, p->ld, n);
    if (KEYS) {
        load_rows<D, C, 2 * C>(pair[1], p->d_o + c->out + token * p->ld_o, p->ld_o, n);
        load_stats<C>(sm->stat[stage], sm->delta[stage], p, c->bh * p->t + token, n);
    } else {
        load_rows<D, C, 2 * C>(pair[1], p->v + at, p->ld, n);
    }
}

/* delta = -d_o.o of C rows, whose pieces this thread loaded itself. */
template <int D, int C, int THREADS>
__device__ __forceinline__ void row_deltas(const bf16 *d_o, const bf16 *o, float *delta)
{
    constexpr int T = row_threads<D>();
    int row = threadIdx.x / T, piece = threadIdx.x % T;
#pragma unroll
    for (int r = 0; r < C; r += THREADS / T) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < D / 8; i += T) {
            int at = (row + r) * (D + 8) + (piece + i) * 8;
            const uint32_t *x = (const uint32_t *)(d_o + at), *y = (const uint32_t *)(o + at);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float2 a = unpack_bf16(x[j]), b = unpack_bf16(y[j]);
                sum = fmaf(a.x, b.x, sum);
                sum = fmaf(a.y, b.y, sum);
            }
        }
#pragma unroll
        for (int k = T / 2; k; k >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, k);
        if (piece == 0) delta[row + r] = -sum;
    }
}

/* Sums of 16 rows: dq, or dk and dv, before their last factors; the sum of da over features. */
template <int D, bool KEYS> struct grad_sums {
    float x[D / 8][4], v[KEYS ? D / 8 : 1][4], sum[2];
};
template <int D, bool KEYS>
__device__ __forceinline__ void start_grads(struct grad_sums<D, KEYS> *r)
{
    zero(r->x);
    zero(r->v);
    r->sum[0] = r->sum[1] = 0;
}
struct row_values { /* of rows g, g + 8: |x|^2 / 2; of queries stat, delta */
    float half[2], stat[2], delta[2];
};
struct col_values { /* of a tile's columns: queries' stat, delta; features' bias, M, z or u */
    const float *stat, *delta, *bias, *top, *sum;
};

/* A tile's part of the gradients of a warp's rows (x, y: q, d_o or k, v). causal: the tile of the
 * rows' own tokens. left: how many features a tile of them has. */
template <int D, int C, bool KEYS, bool FAR>
__device__ __forceinline__ void
add_gradients(struct grad_sums<D, KEYS> *r, struct a_rows<D> *x, struct a_rows<D> *y,
              const bf16 *tile, const bf16 *values, const struct col_values *col_of,
              const struct row_values *row_of, const struct hybrid *p, bool causal, int left)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, quad = lane & 3;
#pragma unroll 1
    for (int first = 0; first < C; first += SUB) {
        /* Nothing to see in a piece all before or all after this warp's rows. */
        if (causal && (KEYS ? first + SUB <= warp * 16 : first > warp * 16 + 15)) continue;
        float e[SUB / 8][4], da[SUB / 8][4];
        zero(e);
        zero(da);
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++)
            mma_rows<D, SUB / 8>(e, x->get(kk), tile + first * (D + 8), kk);
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++)
            mma_rows<D, SUB / 8>(da, y->get(kk), values + first * (D + 8), kk);
#pragma unroll
        for (int n = 0; n < SUB / 8; n++) {
            int col = first + n * 8 + quad * 2;
            float2 a = {0, 0}, b = {0, 0}, c = {0, 0};
            if (FAR) {
                a = *(const float2 *)(col_of->bias + col);
                b = *(const float2 *)(col_of->top + col);
                c = *(const float2 *)(col_of->sum + col);
            } else if (KEYS) {
                b = *(const float2 *)(col_of->stat + col);
                c = *(const float2 *)(col_of->delta + col);
            }
            bool in = !FAR || n * 8 + first + quad * 2 < left;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float top = j & 1 ? b.y : b.x, add = j & 1 ? c.y : c.x;
                float stat = row_of->stat[j >> 1], delta = row_of->delta[j >> 1];
                float half = row_of->half[j >> 1];
                if (FAR) {
                    float bias = SRF__LOG2E * (j & 1 ? a.y : a.x);
                    float more = KEYS ? bias - half : bias - p->log2_m + top - half;
                    e[n][j] = fmaf(e[n][j], SRF__LOG2E * p->scale, more) - (KEYS ? top : stat);
                    e[n][j] = in ? far_weight(e[n][j]) : 0;
                    da[n][j] = e[n][j] * (da[n][j] + (KEYS ? add : add * delta));
                } else {
                    /* Rounded as in forward: no weight may be above 1 there. */
                    e[n][j] = __fmul_rn(e[n][j], 2 * p->half_scale) - (KEYS ? top : stat);
                    e[n][j] = exp2_fast(e[n][j]);
                    da[n][j] = e[n][j] * (da[n][j] + (KEYS ? add : delta));
                }
            }
        }
        if (causal) {
            int row = warp * 16 + g - quad * 2 - first;
#pragma unroll
            for (int n = 0; n < SUB / 8; n++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    int off = n * 8 + (j & 1) - (j >> 1) * 8;
                    if (KEYS ? off < row : off > row) e[n][j] = da[n][j] = 0;
                }
        }
#pragma unroll
        for (int n = 0; n < SUB / 8; n += 2) {
            uint32_t a[4];
            pack_a(a, da[n], da[n + 1]);
            if (FAR)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float2 f = unpack_bf16(a[j]);
                    r->sum[j & 1] += f.x + f.y;
                }
            mma_cols<D>(r->x, a, tile + (first + n * 8) * (D + 8));
            if constexpr (KEYS) {
                pack_a(a, e[n], e[n + 1]);
                mma_cols<D>(r->v, a, values + (first + n * 8) * (D + 8));
            }
        }
    }
}

/* The last factors: da W - sum x, and d^(-1/4) of x. rows: the warp's q or k. */
template <int D, bool KEYS>
__device__ __forceinline__ void finish_grads(struct grad_sums<D, KEYS> *r, struct a_rows<D> *x,
                                             const struct hybrid *p)
{
#pragma unroll
    for (int j = 0; j < 2; j++) {
        float by = p->scale * quad_sum(r->sum[j]);
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                /* An A fragment holds what a C fragment does of the same 16 columns. */
                float2 f = unpack_bf16(x->get(kk)[2 * i + j]);
                float *at = r->x[2 * kk + i] + 2 * j;
                at[0] = p->scale * (at[0] - by * f.x);
                at[1] = p->scale * (at[1] - by * f.y);
            }
    }
}

template <int D, int C, bool KEYS>
__global__ void __launch_bounds__(2 * C) bwd_kernel(const __grid_constant__ struct hybrid p)
{
    extern __shared__ __align__(16) char smem[];
    struct bwd_smem<D, C> *sm = (struct bwd_smem<D, C> *)smem;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, quad = lane & 3;
    struct chunk c = chunk_of<D, C>(&p);
    int n_exact = KEYS ? (min(p.t, (c.block + 2) * p.window) - c.row + C - 1) / C
                       : (c.row - max(c.block - 1, 0) * p.window) / C + 1;
    int causal = KEYS ? 0 : n_exact - 1; /* the tile of the rows' own tokens */
    bool far = KEYS ? c.block < p.n_slots : c.block >= 2;
    int n_tiles = n_exact + (far ? (p.m + C - 1) / C : 0);
    int n_rows = p.t - c.row;
    int64_t in = c.in + c.row * p.ld, out = c.out + c.row * p.ld_o;

    load_rows<D, C, 2 * C>(sm->rows[0], (KEYS ? p.k : p.q) + in, p.ld, n_rows);
    if (KEYS) {
        load_rows<D, C, 2 * C>(sm->rows[1], p.v + in, p.ld, n_rows);
    } else {
        load_rows<D, C, 2 * C>(sm->rows[1], p.d_o + out, p.ld_o, n_rows);
        load_rows<D, C, 2 * C>(sm->pair[1][0], p.o + out, p.ld_o, n_rows);
    }
    cp_async_commit();
    load_bwd<D, C, KEYS>(sm, 0, &p, &c, 0, n_exact);
    cp_async_commit();
    cp_async_wait<1>();
    clean_rows<D, C, 2 * C, true>(sm->rows[0], &p, sm->half);
    if (!KEYS) {
        row_deltas<D, C, 2 * C>(sm->rows[1], sm->pair[1][0], sm->delta[0]);
    }
    __syncthreads();
    struct a_rows<D> x, y;
    x.init(sm->rows[0] + warp * 16 * (D + 8));
    y.init(sm->rows[1] + warp * 16 * (D + 8));
    struct row_values rows = {};
    for (int j = 0; j < 2; j++) {
        int row = warp * 16 + g + 8 * j;
        rows.half[j] = sm->half[row];
        if (KEYS) continue;
        rows.stat[j] = row < n_rows ? p.stat[c.bh * p.t + c.row + row] : INFINITY;
        rows.delta[j] = sm->delta[0][row];
        if (quad == 0 && row < n_rows) p.delta[c.bh * p.t + c.row + row] = rows.delta[j];
    }
    struct grad_sums<D, KEYS> grads;
    start_grads(&grads);

    for (int i = 0; i < n_tiles; i++) {
        int stage = i & 1;
        if (i + 1 < n_tiles) load_bwd<D, C, KEYS>(sm, stage ^ 1, &p, &c, i + 1, n_exact);
        cp_async_commit();
        cp_async_wait<1>();
        if (i < n_exact) clean_rows<D, C, 2 * C, false>(sm->pair[stage][0], &p, NULL);
        __syncthreads();
        const bf16 *tile = sm->pair[stage][0], *values = sm->pair[stage][1];
        struct col_values cols = {sm->stat[stage], sm->delta[stage], sm->bias[stage],
                                  sm->top[stage], sm->sum[stage]};
        if (i < n_exact)
            add_gradients<D, C, KEYS, false>(&grads, &x, &y, tile, values, &cols, &rows, &p,
                                             i == causal, 0);
        else
            add_gradients<D, C, KEYS, true>(&grads, &x, &y, tile, values, &cols, &rows, &p, false,
                                            p.m - (i - n_exact) * C);
        /* Scores are of x and y / d^(1/4) here, features' inputs of x: one factor for both. */
        if (i == n_exact - 1) scale_rows(grads.x, p.scale, p.scale);
        __syncthreads();
    }
    finish_grads(&grads, &x, &p);
    int64_t at = in + warp * 16 * p.ld;
    store_rows<D>((KEYS ? p.dk : p.dq) + at, p.ld, n_rows - warp * 16, grads.x);
    if constexpr (KEYS) store_rows<D>(p.dv + at, p.ld, n_rows - warp * 16, grads.v);
}

/* ---- dq in one walk: window 64, m <= 64, d <= 64 ------------------------------------------------
 * As the forward in one walk. Of the states only M is stored, for the walk over queries. */

template <int D> struct fused_dq_smem {
    bf16 d_o[64 * (D + 8)];
    struct fused_smem<D> fwd;
};

template <int D>
__global__ void __launch_bounds__(128, 3) fused_dq_kernel(const __grid_constant__ struct hybrid p)
{
    extern __shared__ __align__(16) char smem[];
    struct fused_smem<D> *sm = &((struct fused_dq_smem<D> *)smem)->fwd;
    bf16 *d_o = ((struct fused_dq_smem<D> *)smem)->d_o;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, quad = lane & 3;
    struct walker w = walker_of<D>(&p);
    bool active = w.feature < p.m;

    struct state_sums<D> state;
    float bias[2];
    start_walk<D>(sm, &state, bias, &p, &w);
    load_rows<D, 64, 128>(d_o, p.d_o + w.out + w.begin * 64 * p.ld_o, p.ld_o, p.t - w.begin * 64);
    cp_async_commit();

    for (int block = w.begin; block < w.end; block++) {
        int now = block & 1, before = now ^ 1, row0 = block * 64 + warp * 16;
        arrive<D>(sm, &p, block, block == w.begin);
        struct a_rows<D> x, y;
        x.init(sm->q + warp * 16 * (D + 8));
        y.init(d_o + warp * 16 * (D + 8));
        struct row_values rows;
        for (int j = 0; j < 2; j++) {
            int row = row0 + g + 8 * j;
            const bf16 *o = p.o + w.out + (row < p.t ? row : 0) * p.ld_o + quad * 2;
            float sum = 0;
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float2 a = unpack_bf16(y.get(kk)[2 * i + j]);
                    float2 b = unpack_bf16(*(const uint32_t *)(o + kk * 16 + i * 8));
                    sum = fmaf(a.x, b.x, sum);
                    sum = fmaf(a.y, b.y, sum);
                }
            rows.delta[j] = -quad_sum(sum);
            rows.half[j] = sm->half_q[warp * 16 + g + 8 * j];
            rows.stat[j] = row < p.t ? p.stat[w.bh * p.t + row] : INFINITY;
            if (quad == 0 && row < p.t) p.delta[w.bh * p.t + row] = rows.delta[j];
        }
        struct grad_sums<D, false> grads;
        start_grads(&grads);
        struct col_values cols = {NULL, NULL, sm->bias, sm->top, sm->z};
        if (block >= 2) {
            publish_state<D>(sm, &state, w.feature);
            for (int j = 0; j < 2; j++)
                if (active && quad == 0)
                    p.top[(w.bh * p.n_slots + block - 2) * p.m + w.feature + g + 8 * j] =
                        state.top[j];
        }
        if (block) {
            add_gradients<D, 64, false, false>(&grads, &x, &y, sm->pair[before][0],
                                               sm->pair[before][1], &cols, &rows, &p, false, 0);
            if (active && block + 1 < w.n_blocks)
                take_block<D>(sm, &state, bias, &p, before, w.feature);
        }
        __syncthreads();
        if (block + 1 < w.end) {
            int next = (block + 1) * 64;
            load_fused<D>(sm, &p, w.in, block + 1, true);
            load_rows<D, 64, 128>(d_o, p.d_o + w.out + next * p.ld_o, p.ld_o, p.t - next);
        }
        cp_async_commit();
        add_gradients<D, 64, false, false>(&grads, &x, &y, sm->pair[now][0], sm->pair[now][1],
                                           &cols, &rows, &p, true, 0);
        scale_rows(grads.x, p.scale, p.scale);
        if (block >= 2)
            add_gradients<D, 64, false, true>(&grads, &x, &y, sm->w, sm->s, &cols, &rows, &p, false,
                                              p.m);
        finish_grads(&grads, &x, &p);
        store_rows<D>(p.dq + w.in + row0 * p.ld, p.ld, p.t - row0, grads.x);
    }
}

/* ---- dW -----------------------------------------------------------------------------------------
 * A CTA has a walk's features and segment, and makes its sum of da^T x (queries) or da^T y (keys).
 */

template <int D, int C, bool QUERIES>
__global__ void __launch_bounds__(WALK_THREADS) dw_kernel(const __grid_constant__ struct hybrid p)
{
    extern __shared__ __align__(16) char smem[];
    struct walk_smem<D, C> *sm = (struct walk_smem<D, C> *)smem;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, quad = lane & 3;
    int groups = (p.m + CTA_FEATURES - 1) / CTA_FEATURES;
    int seg = blockIdx.x % p.n_seg, group = blockIdx.x / p.n_seg % groups;
    int64_t bh = blockIdx.x / p.n_seg / groups, n_bh = gridDim.x / p.n_seg / groups;
    int feature = group * CTA_FEATURES + warp * WARP_FEATURES;
    bool active = feature < p.m;
    int lo = seg * p.seg_slots, hi = min(lo + p.seg_slots, p.n_slots);
    int n_tiles = (hi - lo) * (p.window / C), slot;

    for (int i = 0; i < WALK_STAGES - 1; i++) {
        int token = walk_token<C, QUERIES>(&p, lo, hi, i, &slot);
        if (i < n_tiles) load_walk<D, C, QUERIES>(sm, i, &p, bh, token);
        cp_async_commit();
    }
    uint32_t w[D / 16][4] = {}, state[D / 16][4] = {};
    float bias[2] = {0, 0}, top[2] = {0, 0}, weight[2] = {0, 0}, acc[D / 8][4];
    zero(acc);
    if (active) {
        int64_t set = bh % p.heads;
        load_a_global<D>(w, p.w + set * p.w_step + (int64_t)feature * D);
        for (int j = 0; j < 2; j++)
            bias[j] = SRF__LOG2E * p.bias[set * p.bias_step + feature + g + 8 * j] -
                      (QUERIES ? p.log2_m : 0);
    }
    for (int i = 0; i < n_tiles; i++) {
        int stage = i % WALK_STAGES, ahead = i + WALK_STAGES - 1;
        if (ahead < n_tiles) {
            int token = walk_token<C, QUERIES>(&p, lo, hi, ahead, &slot);
            load_walk<D, C, QUERIES>(sm, ahead % WALK_STAGES, &p, bh, token);
        }
        cp_async_commit();
        cp_async_wait<WALK_STAGES - 1>();
        clean_rows<D, C, WALK_THREADS, true>(sm->pair[stage][0], &p, sm->half[stage]);
        __syncthreads();
        walk_token<C, QUERIES>(&p, lo, hi, i, &slot);
        if (active) {
            int64_t row = (bh * p.n_slots + slot) * p.m + feature;
            load_a_global<D>(state, (QUERIES ? p.s : p.r) + row * D);
            for (int j = 0; j < 2; j++) {
                top[j] = p.top[row + g + 8 * j];
                weight[j] = (QUERIES ? p.z : p.u)[row + g + 8 * j];
            }
#pragma unroll 1
            for (int first = 0; first < C; first += SUB) {
                const bf16 *tokens = sm->pair[stage][0] + first * (D + 8);
                const bf16 *values = sm->pair[stage][1] + first * (D + 8);
                float e[SUB / 8][4], da[SUB / 8][4];
                zero(e);
                zero(da);
#pragma unroll
                for (int kk = 0; kk < D / 16; kk++) {
                    mma_rows<D, SUB / 8>(e, w[kk], tokens, kk);
                    mma_rows<D, SUB / 8>(da, state[kk], values, kk);
                }
#pragma unroll
                for (int n = 0; n < SUB / 8; n++)
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        int col = first + n * 8 + quad * 2 + (j & 1), r = j >> 1;
                        float to = QUERIES ? top[r] - sm->stat[stage][col] : -top[r];
                        float dp =
                            da[n][j] + (QUERIES ? weight[r] * sm->delta[stage][col] : weight[r]);
                        float add = bias[r] - sm->half[stage][col];
                        da[n][j] = far_weight(fmaf(e[n][j], SRF__LOG2E * p.scale, add) + to) * dp;
                    }
#pragma unroll
                for (int n = 0; n < SUB / 8; n += 2) {
                    uint32_t a[4];
                    pack_a(a, da[n], da[n + 1]);
                    mma_cols<D>(acc, a, tokens + n * 8 * (D + 8));
                }
            }
        }
        __syncthreads();
    }
    if (!active) return;
    int64_t part = ((QUERIES ? 0 : n_bh) + bh) * p.n_seg + seg;
    for (int j = 0; j < 2; j++) {
        float *to = p.dw_part + (part * p.m + feature + g + 8 * j) * D + quad * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *(float2 *)(to + n * 8) =
                make_float2(p.scale * acc[n][2 * j], p.scale * acc[n][2 * j + 1]);
    }
}

/* dw (n_sets, n) += the parts of its heads, (2, n_seq, heads, n_seg, n), one after the other. */
static __global__ void dw_sum_kernel(float *dw, const float *part, int64_t n, int n_sets,
                                     int64_t n_seq, int heads, int n_seg)
{
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n_sets * n) return;
    int64_t set = i / n, at = i - set * n;
    float sum = 0;
    for (int64_t s = 0; s < 2 * n_seq; s++)
        for (int h = n_sets > 1 ? (int)set : 0; h < (n_sets > 1 ? (int)set + 1 : heads); h++)
            for (int seg = 0; seg < n_seg; seg++)
                sum += part[((s * heads + h) * n_seg + seg) * n + at];
    dw[i] += sum;
}

/* ---- launches -------------------------------------------------------------------------------- */

/* Sets sizes and pointers into the workspace at base; NULL only counts. Returns its bytes. */
static size_t carve(const struct srf_ctx *ctx, const struct srf_attn_shape *s, bool backward,
                    bool dw, void *base, struct hybrid *p)
{
    struct cuda_bump bump = {(char *)base, 0};
    int64_t n_bh = s->b * s->h, tile = s->window < 64 ? 32 : 64;
    int64_t n_slots = div_up(s->t, s->window) - 2;
    n_slots = n_slots < 0 ? 0 : n_slots;
    /* Segments only where they save more than their own walk costs. */
    int64_t walks = n_bh * div_up(s->m, CTA_FEATURES), n_seg = 3 * cuda_of(ctx)->n_sm / walks;
    n_seg = n_seg > MAX_SEGMENTS ? MAX_SEGMENTS : n_seg;
    n_seg = n_seg > n_slots / 4 ? n_slots / 4 : n_seg;
    n_seg = n_seg < 3 ? 1 : n_seg;
    p->t = (int)s->t;
    p->heads = (int)s->h;
    p->m = (int)s->m;
    p->window = (int)s->window;
    p->n_chunks = (int)div_up(s->t, tile);
    p->n_slots = (int)n_slots;
    p->seg_slots = (int)(n_slots ? div_up(n_slots, n_seg) : 1);
    p->n_seg = (int)(n_slots ? div_up(n_slots, p->seg_slots) : 1);
    p->w_step = s->n_sets > 1 ? s->m * s->d : 0;
    p->bias_step = s->n_sets > 1 ? s->m : 0;
    p->scale = (float)pow((double)s->d, -0.25);
    p->half_scale = (float)(0.5 * 1.4426950408889634 / sqrt((double)s->d));
    p->limit = (float)(SRF__X_LIMIT * pow((double)s->d, 0.25));
    p->log2_m = (float)log2((double)s->m);
    size_t rows = (size_t)(n_bh * n_slots * s->m), seg_rows = (size_t)(n_bh * p->n_seg * s->m);
    p->s = (bf16 *)bump_bytes(&bump, rows * s->d * sizeof(bf16));
    p->z = (float *)bump_bytes(&bump, rows * sizeof(float));
    p->top = (float *)bump_bytes(&bump, rows * sizeof(float));
    if (p->n_seg > 1) {
        p->sum_s = (float *)bump_bytes(&bump, seg_rows * s->d * sizeof(float));
        p->sum_z = (float *)bump_bytes(&bump, seg_rows * sizeof(float));
        p->sum_top = (float *)bump_bytes(&bump, seg_rows * sizeof(float));
    }
    if (!backward) return bump.used;
    p->r = (bf16 *)bump_bytes(&bump, rows * s->d * sizeof(bf16));
    p->u = (float *)bump_bytes(&bump, rows * sizeof(float));
    p->delta = (float *)bump_bytes(&bump, (size_t)(n_bh * s->t) * sizeof(float));
    if (dw && n_slots) p->dw_part = (float *)bump_bytes(&bump, 2 * seg_rows * s->d * sizeof(float));
    return bump.used;
}

#define LAUNCH(kernel, grid, threads, smem, ...)                                                   \
    do {                                                                                           \
        CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,         \
                                      (int)(smem)));                                               \
        CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,      \
                                      cudaSharedmemCarveoutMaxShared));                            \
        (kernel)<<<(unsigned)(grid), (threads), (smem), stream_of(ctx)>>>(__VA_ARGS__);            \
    } while (0)

/* The sums of keys in each segment, where there are several. */
template <int D, int C>
static srf_status totals(struct srf_ctx *ctx, const struct hybrid *p, int64_t n_bh)
{
    int64_t grid = n_bh * div_up(p->m, CTA_FEATURES) * p->n_seg;
    if (p->n_seg > 1)
        LAUNCH((walk_kernel<D, C, false>), grid, WALK_THREADS, sizeof(struct walk_smem<D, C>), *p,
               true);
    return SRF_OK;
}

template <int D, int C, bool QUERIES>
static srf_status walk(struct srf_ctx *ctx, const struct hybrid *p, int64_t n_bh)
{
    int64_t grid = n_bh * div_up(p->m, CTA_FEATURES) * p->n_seg;
    size_t smem = sizeof(struct walk_smem<D, C>);
    if (p->n_slots == 0) return SRF_OK;
    if (p->n_seg > 1) LAUNCH((walk_kernel<D, C, QUERIES>), grid, WALK_THREADS, smem, *p, true);
    LAUNCH((walk_kernel<D, C, QUERIES>), grid, WALK_THREADS, smem, *p, false);
    return SRF_OK;
}

template <int D, int C>
static srf_status fwd(struct srf_ctx *ctx, const struct hybrid *p, int64_t n_bh)
{
    if constexpr (D <= 64 && C == 64) {
        if (p->window == 64 && p->m <= 64) {
            SRF_TRY((totals<D, C>(ctx, p, n_bh)));
            LAUNCH((fused_fwd_kernel<D>), n_bh * p->n_seg, 128, sizeof(struct fused_smem<D>), *p);
            return srf__cuda_launched("srf_attn_fwd");
        }
    }
    SRF_TRY((walk<D, C, false>(ctx, p, n_bh)));
    LAUNCH((fwd_kernel<D, C>), n_bh * p->n_chunks, 2 * C, sizeof(struct fwd_smem<D, C>), *p);
    return srf__cuda_launched("srf_attn_fwd");
}

template <int D, int C>
static srf_status bwd(struct srf_ctx *ctx, const struct hybrid *p,
                      const struct srf_srf_attn_bwd_args *a)
{
    int64_t n_bh = a->s.b * a->s.h, grid = n_bh * p->n_chunks;
    size_t smem = sizeof(struct bwd_smem<D, C>);
    bool dq_in_one_walk = false;
    if constexpr (D <= 64 && C == 64) {
        dq_in_one_walk = p->window == 64 && p->m <= 64 && !p->dw_part; /* dW reads the states */
        if (dq_in_one_walk) {
            SRF_TRY((totals<D, C>(ctx, p, n_bh)));
            LAUNCH((fused_dq_kernel<D>), n_bh * p->n_seg, 128, sizeof(struct fused_dq_smem<D>), *p);
        }
    }
    if (!dq_in_one_walk) {
        SRF_TRY((walk<D, C, false>(ctx, p, n_bh)));
        LAUNCH((bwd_kernel<D, C, false>), grid, 2 * C, smem, *p);
    }
    SRF_TRY((walk<D, C, true>(ctx, p, n_bh)));
    LAUNCH((bwd_kernel<D, C, true>), grid, 2 * C, smem, *p);
    if (p->dw_part) {
        int64_t walks = n_bh * div_up(p->m, CTA_FEATURES) * p->n_seg, n = a->s.m * D;
        size_t bytes = sizeof(struct walk_smem<D, C>);
        LAUNCH((dw_kernel<D, C, true>), walks, WALK_THREADS, bytes, *p);
        LAUNCH((dw_kernel<D, C, false>), walks, WALK_THREADS, bytes, *p);
        dw_sum_kernel<<<(unsigned)div_up(a->s.n_sets * n, 128), 128, 0, stream_of(ctx)>>>(
            (float *)a->dw, p->dw_part, n, (int)a->s.n_sets, a->s.b, p->heads, p->n_seg);
    }
    return srf__cuda_launched("srf_attn_bwd");
}

static bool takes(const struct srf_ctx *ctx, const struct srf_attn_shape *s, int64_t ld,
                  int64_t ld_o, uintptr_t pointers)
{
    bool any = s->b > 0 && s->t > 0 && s->h > 0 && s->m > 0;
    bool d = s->d == 32 || s->d == 64 || s->d == 80 || s->d == 96 || s->d == 128;
    bool window = s->window == 32 || s->window == 64 || s->window == 128;
    /* Launches count tiles and walks in 31 bits. */
    bool small = s->t < (1 << 30) && s->b * s->h < (1 << 30) / MAX_SEGMENTS / 8 &&
                 s->b * s->h * div_up(s->t, 32) < (1 << 30);
    return any && ctx->dtype == SRF_BF16 && s->causal && window && d && s->m % 16 == 0 &&
           s->m <= 512 && ld % 8 == 0 && ld_o % 8 == 0 && pointers % 16 == 0 && small;
}

bool srf__hybrid_takes_fwd(const struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a)
{
    return takes(ctx, &a->s, a->ld, a->ld_o,
                 (uintptr_t)a->q | (uintptr_t)a->k | (uintptr_t)a->v | (uintptr_t)a->w |
                     (uintptr_t)a->bias | (uintptr_t)a->o);
}

bool srf__hybrid_takes_bwd(const struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a)
{
    return takes(ctx, &a->s, a->ld, a->ld_o,
                 (uintptr_t)a->q | (uintptr_t)a->k | (uintptr_t)a->v | (uintptr_t)a->w |
                     (uintptr_t)a->bias | (uintptr_t)a->o | (uintptr_t)a->d_o | (uintptr_t)a->dq |
                     (uintptr_t)a->dk | (uintptr_t)a->dv);
}

size_t srf__hybrid_fwd_workspace(const struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a)
{
    struct hybrid p = {};
    return takes(ctx, &a->s, a->ld, a->ld_o, 0) ? carve(ctx, &a->s, false, false, NULL, &p) : 0;
}

size_t srf__hybrid_bwd_workspace(const struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a)
{
    struct hybrid p = {};
    return takes(ctx, &a->s, a->ld, a->ld_o, 0) ? carve(ctx, &a->s, true, a->dw != NULL, NULL, &p)
                                                : 0;
}

/* The kernels of a head size, for either tile. */
#define CASE(D, op, ...)                                                                           \
    case D:                                                                                        \
        return a->s.window < 64 ? op<D, 32>(__VA_ARGS__) : op<D, 64>(__VA_ARGS__)
#define FOR_HEAD_SIZE(op, ...)                                                                     \
    switch (a->s.d) {                                                                              \
        CASE(32, op, __VA_ARGS__);                                                                 \
        CASE(64, op, __VA_ARGS__);                                                                 \
        CASE(80, op, __VA_ARGS__);                                                                 \
        CASE(96, op, __VA_ARGS__);                                                                 \
    default:                                                                                       \
        return a->s.window < 64 ? op<128, 32>(__VA_ARGS__) : op<128, 64>(__VA_ARGS__);             \
    }

srf_status srf__hybrid_fwd(struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a)
{
    struct hybrid p = {};
    if (a->s.b * a->s.t == 0) return SRF_OK;
    carve(ctx, &a->s, false, false, ctx->workspace, &p);
    p.q = (const bf16 *)a->q;
    p.k = (const bf16 *)a->k;
    p.v = (const bf16 *)a->v;
    p.w = (const bf16 *)a->w;
    p.bias = (const float *)a->bias;
    p.o = (bf16 *)a->o;
    p.stat = (float *)a->stat;
    p.ld = a->ld;
    p.ld_o = a->ld_o;
    FOR_HEAD_SIZE(fwd, ctx, &p, a->s.b * a->s.h)
}

srf_status srf__hybrid_bwd(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a)
{
    struct hybrid p = {};
    if (a->s.b * a->s.t == 0) return SRF_OK;
    carve(ctx, &a->s, true, a->dw != NULL, ctx->workspace, &p);
    p.q = (const bf16 *)a->q;
    p.k = (const bf16 *)a->k;
    p.v = (const bf16 *)a->v;
    p.w = (const bf16 *)a->w;
    p.bias = (const float *)a->bias;
    p.o = (bf16 *)a->o; /* read only here */
    p.d_o = (const bf16 *)a->d_o;
    p.stat = (float *)a->stat; /* read only here */
    p.dq = (bf16 *)a->dq;
    p.dk = (bf16 *)a->dk;
    p.dv = (bf16 *)a->dv;
    p.ld = a->ld;
    p.ld_o = a->ld_o;
    FOR_HEAD_SIZE(bwd, ctx, &p, a)
}
