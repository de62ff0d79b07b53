/* SRF attention on tensor cores, forward: pure (window = 0), causal, bf16.
 *
 * One block per sequence, head and segment of tokens walks chunks of 64 tokens in order, carrying
 * the state S (m, d), z, M of the keys before. Everything is in log2 units; M_i is an integer at
 * least as large as every key exponent so far, and S, z are scaled by 2^-M_i. In a chunk
 *     kf_si = 2^(ak_si - M_i),   qf_ti = 2^(aq_ti + M_i - r_t),   r_t = max_i (aq_ti + M_i)
 *     P_ts = qf_t.kf_s for s <= t,   num_t = sum_s P_ts v_s + qf_t S,   den_t = sum_s P_ts + qf_t.z
 * with kf, qf, P, S rounded to bf16 for the products and the same rounded values summed in den (z
 * as a sum of two bf16 values). S, z, num, den are fp32 sums. A chunk in which some den_t is tiny
 * (a later key of the chunk is much larger than all that t sees) is taken again in pieces of half
 * the size; the den of a single token is at least 1/2.
 *
 * Warp w of 4 has two parts. As owner of features 16 w .. 16 w + 15 it makes kf with features as
 * rows: its maxima over tokens stay inside quads, and kf is, packed, the A operand of S += kf^T V,
 * whose sums it keeps in registers. As owner of tokens 16 w .. it makes qf, P and o. kf, S, z, M go
 * from one part to the other through shared memory: three barriers a chunk. With more than 64
 * features a block has 8 warps, 4 for each 64 features, whose num and den are merged as (r, num,
 * den) triples; with more than 128, launches follow each other that keep the triples in the
 * workspace. Where sequences and heads do not fill the card, tokens are cut into segments: a first
 * launch makes the state that each segment adds, a second their prefixes, the main one starts from
 * these.
 *
 * Floor: q, k, v read and o written once, 8 b t h d bytes: 201 MB, 0.067 ms on an H100 (3 TB/s) at
 * b = 32, t = 1024, h = 12, d = 64. About 10 t m d + 128 t d flops of mma.sync, less than half of
 * that time at m = 64.
 */
#include "kernels/cuda/srf_attn_pure.h"
#include "kernels/cuda/srf_attn_pure_wgmma.h"

struct fwd_params {
    const bf16 *q, *k, *v, *w;
    const float *bias;
    bf16 *o;
    float *stat;   /* (b, h, t), or NULL */
    float *states; /* (b h, n_seg, pure_state_count): segments' states; NULL: one segment */
    float *num;    /* (b h, t, d): of the features before these; NULL: all are done at once */
    float *den;    /* (b h, t, 2): den, r of the same */
    int64_t ld, ld_o;
    int t, h, m, n_sets;
    int first, count;      /* features [first, first + count) */
    int n_seg, seg_chunks; /* segments, chunks in each */
    float scale;           /* d^(-1/4) */
    uint32_t limit;        /* the clamp of q and k, twice bf16 */
};

template <int D, int NF, bool state_only> struct fwd_smem {
    static constexpr int tile = CHUNK * D * 2, tiles = state_only ? 2 : 3;
    static constexpr int w = 2 * tiles * tile;
    static constexpr int kf = w + NF * 64 * D * 2;
    static constexpr int s = kf + (state_only ? 0 : NF * 64 * CHUNK * 2);
    static constexpr int half = s + (state_only ? 0 : NF * 64 * D * 2);
    static constexpr int bias = half + CHUNK * 4;
    static constexpr int top = bias + NF * 64 * 4; /* bias + M */
    static constexpr int z = top + NF * 64 * 4;    /* (NF, 2, 64): z as two bf16 values */
    static constexpr int merge = z + NF * 64 * 4;  /* (64, 2): den, r of features 64 .. 127 */
    static constexpr int bytes = merge + (NF > 1 ? CHUNK * 8 : 0);
};

/* Blocks of a multiprocessor: what shared memory allows, and registers are cut to. */
template <int D, int NF> constexpr int fwd_blocks_per_sm()
{
    return NF == 1 ? (D <= 64 ? 3 : D <= 96 ? 2 : 1) : D <= 64 ? 2 : 1;
}

/* Row i of (r, num, den) takes another's: features of the same token. */
template <int D>
__device__ __forceinline__ void merge_row(float (&o)[D / 8][4], int i, float *den, float *r,
                                          const float2 *other, float2 other_den)
{
    const float top = fmaxf(*r, other_den.y);
    const float mine = exp2_fast(*r - top), with = exp2_fast(other_den.y - top);
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
        o[j][2 * i] = o[j][2 * i] * mine + other[j].x * with;
        o[j][2 * i + 1] = o[j][2 * i + 1] * mine + other[j].y * with;
    }
    *den = *den * mine + other_den.x * with;
    *r = top;
}

template <int D, int NF, bool state_only>
__global__
    __launch_bounds__(128 * NF,
                      (fwd_blocks_per_sm<D, NF>())) void pure_fwd_kernel(const struct fwd_params p)
{
    using at = fwd_smem<D, NF, state_only>;
    constexpr int threads = 128 * NF;
    extern __shared__ __align__(128) char smem[];
    const uint32_t base = smem_addr(smem);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
    const int rg = tokens_of<NF>(warp),
              fg = NF > 1 ? warp >> 2 : 0; /* its 16 tokens, its 64 features as token owner */
    const int f0 = 16 * warp + g;          /* its features as feature owner: f0, f0 + 8 */
    const int n_segs = state_only ? p.n_seg - 1 : p.n_seg;
    const int64_t head_i = blockIdx.x / n_segs;
    const int seg = blockIdx.x % n_segs, n_chunks = (p.t + CHUNK - 1) / CHUNK;
    const int c_end = min((seg + 1) * p.seg_chunks, n_chunks);
    const int64_t seq = head_i / p.h, head = head_i % p.h;
    const int64_t in = seq * p.t * p.ld + head * D;
    const int64_t set = p.n_sets == 1 ? 0 : head;
    const float to_log2 = SRF__LOG2E * p.scale;
    float *half = (float *)(smem + at::half), *bias = (float *)(smem + at::bias);
    float *top = (float *)(smem + at::top);

    auto load_chunk = [&](int c, int stage) {
        const int64_t t0 = (int64_t)c * CHUNK;
        const int n = min(CHUNK, p.t - c * CHUNK);
        const uint32_t to = base + stage * at::tiles * at::tile;
        load_tile<D, threads>(to, p.k + in + t0 * p.ld, p.ld, CHUNK, n, tid);
        load_tile<D, threads>(to + at::tile, p.v + in + t0 * p.ld, p.ld, CHUNK, n, tid);
        if (!state_only)
            load_tile<D, threads>(to + 2 * at::tile, p.q + in + t0 * p.ld, p.ld, CHUNK, n, tid);
        cp_async_commit();
    };
    load_tile<D, threads>(base + at::w, p.w + (set * p.m + p.first) * D, D, NF * 64, p.count, tid);
    load_chunk(seg * p.seg_chunks, 0);
    if (tid < NF * 64)
        bias[tid] = tid < p.count ? SRF__LOG2E * p.bias[set * p.m + p.first + tid] : -INFINITY;

    struct pure_state<D> st;
    pure_state_start(&st, !state_only && seg > 0, NF,
                     p.states + (head_i * p.n_seg + seg) * pure_state_count(D, NF), f0, pair);
    cp_async_wait<0>();
    __syncthreads();

    int c = seg * p.seg_chunks, stage = 0, lo = 0, size = CHUNK;
    while (c < c_end) {
        const int n = min(CHUNK, p.t - c * CHUNK), hi = min(lo + size, n);
        const uint32_t k_tile = base + stage * at::tiles * at::tile, v_tile = k_tile + at::tile;
        const uint32_t q_tile = k_tile + 2 * at::tile;
        key_norms<D, NF>(k_tile, half, p.scale, p.limit, lo, hi, tid);
        __syncthreads();
        if (lo == 0 && size == CHUNK && c + 1 < c_end) load_chunk(c + 1, stage ^ 1);

        struct pure_keys keys;
        key_features<D>(&keys, &st, base + at::w, k_tile, half, bias, to_log2, f0, warp, lane);
        if (state_only) {
            pure_state_add<D>(&st, &keys, v_tile, lane);
            cp_async_wait<0>();
            __syncthreads();
            c++;
            stage ^= 1;
            continue;
        }
        pure_publish<D>(&st, &keys, base + at::kf, base + at::s, f0, lane);
        if (pair == 0) {
            bf16 *z = (bf16 *)(smem + at::z) + fg * 128 + (f0 & 63);
            float z0 = st.z[0] * keys.step[0], z1 = st.z[1] * keys.step[1];
            top[f0] = bias[f0] + keys.top[0];
            top[f0 + 8] = bias[f0 + 8] + keys.top[1];
            z[0] = __float2bfloat16_rn(z0);
            z[8] = __float2bfloat16_rn(z1);
            z[64] = __float2bfloat16_rn(z0 - __bfloat162float(z[0]));
            z[72] = __float2bfloat16_rn(z1 - __bfloat162float(z[8]));
        }
        float a[8][4];
        token_products<D>(a, q_tile, base + at::w, p.limit, rg, fg, lane);
        __syncthreads();

        /* Query features; o and den of this warp's tokens over its 64 features. */
        float r[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float2 shift = *(const float2 *)(top + fg * 64 + 8 * j + 2 * pair);
            a[j][0] = fmaf(a[j][0], to_log2, shift.x);
            a[j][1] = fmaf(a[j][1], to_log2, shift.y);
            a[j][2] = fmaf(a[j][2], to_log2, shift.x);
            a[j][3] = fmaf(a[j][3], to_log2, shift.y);
            r[0] = fmaxf(r[0], fmaxf(a[j][0], a[j][1]));
            r[1] = fmaxf(r[1], fmaxf(a[j][2], a[j][3]));
        }
        r[0] = quad_max(r[0]);
        r[1] = quad_max(r[1]);
        uint32_t qf[4][4];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            qf[j >> 1][(j & 1) * 2] =
                pack_bf16(exp2_fast(a[j][0] - r[0]), exp2_fast(a[j][1] - r[0]));
            qf[j >> 1][(j & 1) * 2 + 1] =
                pack_bf16(exp2_fast(a[j][2] - r[1]), exp2_fast(a[j][3] - r[1]));
        }
        float o[D / 8][4], den[4] = {0, 0, 0, 0};
        clear(o);
        const uint32_t z_row = base + at::z + fg * 256 + (g & 1) * 128 + pair * 4;
#pragma unroll
        for (int kk = 0; kk < 4; kk++) {
            /* Columns 0 and 1 of this product are the two parts of z, others 0. */
            uint32_t z0 = load_shared(z_row + kk * 32), z1 = load_shared(z_row + kk * 32 + 16);
            mma_bf16(den, qf[kk], g < 2 ? z0 : 0, g < 2 ? z1 : 0);
            add_bt<D>(o, qf[kk], base + at::s + fg * 64 * D * 2, kk, lane);
        }
        const uint32_t ones = g == 0 ? 0x3f803f80u : 0;
        for (int kb = 0; kb <= rg; kb++) {
            float w[2][4];
            uint32_t b[4], weight[4];
            clear(w);
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
                load_bt<CHUNK>(b, base + at::kf + fg * 64 * CHUNK * 2, kk, 16 * kb, lane);
                mma_bf16(w[0], qf[kk], b[0], b[1]);
                mma_bf16(w[1], qf[kk], b[2], b[3]);
            }
            if (kb == rg) keep_lower(w, g, pair);
            pack_a(weight, w[0], w[1]);
            mma_bf16(den, weight, ones, ones);
            add_bt<D>(o, weight, v_tile + kb * 32 * D, 0, lane);
        }
        float den_row[2] = {__shfl_sync(0xffffffffu, den[0] + den[1], lane & ~3),
                            __shfl_sync(0xffffffffu, den[2] + den[3], lane & ~3)};
        const int row = 16 * rg + g;
        const bool in0 = row >= lo && row < hi, in1 = row + 8 >= lo && row + 8 < hi;
        bool bad = (in0 && den_row[0] < SRF__MIN_DEN) || (in1 && den_row[1] < SRF__MIN_DEN);
        cp_async_wait<0>();
        if (__syncthreads_or(bad && size > 1)) {
            size >>= 1;
            continue;
        }
        pure_state_add<D>(&st, &keys, v_tile, lane);

        /* S in shared memory has been read by all: it takes the other features' o. */
        float2 *other_o = (float2 *)(smem + at::s) + rg * 32 + lane;
        float2 *other_den = (float2 *)(smem + at::merge) + row;
        if (NF > 1) {
            if (fg == 1) {
#pragma unroll
                for (int j = 0; j < D / 8; j++) {
                    other_o[2 * j * 128] = make_float2(o[j][0], o[j][1]);
                    other_o[(2 * j + 1) * 128] = make_float2(o[j][2], o[j][3]);
                }
                if (pair == 0) {
                    other_den[0] = make_float2(den_row[0], r[0]);
                    other_den[8] = make_float2(den_row[1], r[1]);
                }
            }
            __syncthreads();
        }
        if (fg == 0) {
            const int64_t t0 = head_i * p.t + c * CHUNK + row;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float2 *num = (float2 *)p.num + ((t0 + 8 * i) * D >> 1) + pair;
                float2 *num_den = (float2 *)p.den + t0 + 8 * i, with[D / 8];
                const bool in_i = i ? in1 : in0;
                if (NF > 1) {
#pragma unroll
                    for (int j = 0; j < D / 8; j++) with[j] = other_o[(2 * j + i) * 128];
                    merge_row<D>(o, i, &den_row[i], &r[i], with, other_den[8 * i]);
                }
                if (p.first > 0 && in_i) {
#pragma unroll
                    for (int j = 0; j < D / 8; j++) with[j] = num[4 * j];
                    merge_row<D>(o, i, &den_row[i], &r[i], with, *num_den);
                }
                __syncwarp();
                if (p.first + p.count < p.m && in_i) {
#pragma unroll
                    for (int j = 0; j < D / 8; j++)
                        num[4 * j] = make_float2(o[j][2 * i], o[j][2 * i + 1]);
                    if (pair == 0) *num_den = make_float2(den_row[i], r[i]);
                }
            }
            if (p.first + p.count == p.m) {
                if (p.stat && pair == 0) {
                    if (in0) p.stat[t0] = r[0] + log2f(den_row[0]);
                    if (in1) p.stat[t0 + 8] = r[1] + log2f(den_row[1]);
                }
                scale_rows(o, 1.0f / den_row[0], 1.0f / den_row[1]);
                store_rows<D>(p.o + (seq * p.t + (int64_t)c * CHUNK) * p.ld_o + head * D, p.ld_o, o,
                              q_tile, rg, lo, hi, lane);
            }
        }
        lo += size;
        size = lo & -lo;
        if (lo >= n) {
            c++;
            stage ^= 1;
            lo = 0;
            size = CHUNK;
        }
    }
    if (state_only)
        pure_state_end(&st, NF, p.states + (head_i * p.n_seg + seg) * pure_state_count(D, NF), f0,
                       pair);
}

/* ---- the op ------------------------------------------------------------------------------- */

/* One thread a feature and column of S or z, over the segments of one sequence and head. */
static __global__ void prefix_kernel(float *states, int64_t n, int n_seg, int d, int rows)
{
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, per_head = rows * (d + 1);
    if (i >= n) return;
    const int64_t head_i = i / per_head, j = i % per_head, count = rows * (d + 3);
    const int f = (int)(j < rows * d ? j / d : j - rows * d);
    float sum = 0, top = SRF__UNSET;
    for (int seg = 0; seg < n_seg; seg++) {
        float *st = states + (head_i * n_seg + seg) * count;
        float add = 0, add_top = SRF__UNSET;
        if (seg < n_seg - 1) {
            add = st[j];
            add_top = st[rows * (d + 1) + f];
        }
        st[j] = sum;
        if (j >= rows * d) st[rows * (d + 2) + f] = top;
        float with = fmaxf(top, add_top);
        sum = sum * exp2_fast(top - with) + add * exp2_fast(add_top - with);
        top = with;
    }
}

bool srf__pure_shape(const struct srf_ctx *ctx, const struct srf_attn_shape *s)
{
    bool d_ok = s->d == 32 || s->d == 64 || s->d == 80 || s->d == 96 || s->d == 128;
    return ctx->dtype == SRF_BF16 && s->causal && s->window == 0 && d_ok && s->m >= 16 &&
           s->m <= 512 && s->m % 16 == 0 && s->t <= 1 << 30 && s->b * s->h <= 1 << 20 &&
           (size_t)pure_smem_most((int)s->d, s->m > 64 ? 2 : 1) <= cuda_of(ctx)->smem_max;
}

struct pure_plan srf__pure_plan(const struct srf_ctx *ctx, const struct srf_attn_shape *s,
                                int per_sm)
{
    /* A segment's first pass costs about half of what it saves: worth it when half the card or
     * more would be idle, and for segments of some length. Blocks of warpgroups are nearly as fast
     * when there are two on a multiprocessor as when there are three, each by itself faster. */
    int64_t heads = s->b * s->h > 0 ? s->b * s->h : 1, chunks = div_up(s->t, CHUNK);
    int64_t slots = (int64_t)per_sm * cuda_of(ctx)->n_sm, n_seg = slots / heads;
    if (n_seg == 2 && srf__pure_wgmma_takes(ctx, s)) n_seg = 1;
    if (n_seg > chunks / 4) n_seg = chunks / 4;
    if (n_seg < 2) n_seg = 1;
    struct pure_plan p;
    p.seg_chunks = (int)div_up(chunks > 0 ? chunks : 1, n_seg);
    p.n_seg = (int)div_up(chunks > 0 ? chunks : 1, p.seg_chunks);
    p.scale = (float)pow((double)s->d, -0.25);
    uint32_t limit = __bfloat16_as_ushort(__float2bfloat16_rn(SRF__X_LIMIT / p.scale));
    p.limit = limit << 16 | limit;
    return p;
}

static bool aligned(const void *p)
{
    return (uintptr_t)p % 16 == 0;
}

bool srf__pure_takes_fwd(const struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a)
{
    return srf__pure_shape(ctx, &a->s) && a->ld % 8 == 0 && a->ld_o % 8 == 0 && aligned(a->q) &&
           aligned(a->k) && aligned(a->v) && aligned(a->w) && aligned(a->o);
}

struct fwd_plan {
    struct pure_plan plan;
    float *states, *num, *den;
    size_t bytes;
};

static struct fwd_plan plan_fwd(const struct srf_ctx *ctx, const struct srf_attn_shape *s)
{
    struct fwd_plan f;
    struct cuda_bump bump = {(char *)ctx->workspace, 0};
    int64_t heads = s->b * s->h, nf = s->m > 64 ? 2 : 1;
    int per_sm = nf == 1 ? (s->d <= 64 ? 3 : s->d <= 96 ? 2 : 1) : s->d <= 64 ? 2 : 1;
    f.plan = srf__pure_plan(ctx, s, per_sm);
    f.states = NULL;
    f.num = f.den = NULL;
    if (f.plan.n_seg > 1)
        f.states = (float *)bump_bytes(
            &bump, (size_t)(heads * f.plan.n_seg * pure_state_count(s->d, nf)) * sizeof(float));
    if (s->m > 128) {
        f.num = (float *)bump_bytes(&bump, (size_t)(heads * s->t * s->d) * sizeof(float));
        f.den = (float *)bump_bytes(&bump, (size_t)(heads * s->t * 2) * sizeof(float));
    }
    f.bytes = bump.used;
    return f;
}

size_t srf__pure_carry_bytes(const struct srf_ctx *ctx, const struct srf_attn_shape *s)
{
    if (!srf__pure_shape(ctx, s) || !srf__pure_wgmma_takes(ctx, s)) return 0;
    /* A pass over k, v that costs less than the memory where heads alone fill the card. */
    int64_t heads = s->b * s->h, slots = 3 * (int64_t)cuda_of(ctx)->n_sm;
    return 2 * heads <= slots && s->t > 7 * CHUNK ? srf__pure_wgmma_record_bytes(s) : 0;
}

size_t srf__pure_fwd_workspace(const struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a)
{
    if (srf__wide_takes(ctx, &a->s)) return srf__wide_fwd_workspace(ctx, &a->s);
    return plan_fwd(ctx, &a->s).bytes;
}

/* What each segment's keys add to a state, then the states before each segment. */
template <int D, int NF>
static srf_status launch_states(struct srf_ctx *ctx, const struct fwd_params *p, int64_t heads)
{
    constexpr int bytes = fwd_smem<D, NF, true>::bytes;
    static_assert(bytes <= pure_smem_most(D, NF), "srf__pure_shape asks for less");
    const int64_t n = heads * 64 * NF * (D + 1);
    CUDA_TRY(cudaFuncSetAttribute(pure_fwd_kernel<D, NF, true>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    pure_fwd_kernel<D, NF, true>
        <<<(unsigned)(heads * (p->n_seg - 1)), 128 * NF, bytes, stream_of(ctx)>>>(*p);
    prefix_kernel<<<(unsigned)div_up(n, 128), 128, 0, stream_of(ctx)>>>(p->states, n, p->n_seg, D,
                                                                        64 * NF);
    return srf__cuda_launched("srf_attn");
}

template <int D, int NF>
static srf_status launch_fwd(struct srf_ctx *ctx, const struct fwd_params *p, int64_t heads)
{
    constexpr int bytes = fwd_smem<D, NF, false>::bytes;
    static_assert(bytes <= pure_smem_most(D, NF), "srf__pure_shape asks for less");
    if (p->n_seg > 1) SRF_TRY((launch_states<D, NF>(ctx, p, heads)));
    CUDA_TRY(cudaFuncSetAttribute(pure_fwd_kernel<D, NF, false>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    pure_fwd_kernel<D, NF, false>
        <<<(unsigned)(heads * p->n_seg), 128 * NF, bytes, stream_of(ctx)>>>(*p);
    return srf__cuda_launched("srf_attn_fwd");
}

template <int D>
static srf_status launch_groups(struct srf_ctx *ctx, struct fwd_params *p, int64_t heads)
{
    int width = p->m > 64 ? 128 : 64;
    for (p->first = 0; p->first < p->m; p->first += width) {
        p->count = p->m - p->first < width ? p->m - p->first : width;
        if (p->count <= 64)
            SRF_TRY((launch_fwd<D, 1>(ctx, p, heads)));
        else
            SRF_TRY((launch_fwd<D, 2>(ctx, p, heads)));
    }
    return SRF_OK;
}

static struct fwd_params params_of(const struct srf_attn_shape *s, const void *k, const void *v,
                                   int64_t ld, const void *w, const void *bias,
                                   const struct pure_plan *plan)
{
    struct fwd_params p = {};
    p.k = (const bf16 *)k;
    p.v = (const bf16 *)v;
    p.w = (const bf16 *)w;
    p.bias = (const float *)bias;
    p.ld = ld;
    p.t = (int)s->t;
    p.h = (int)s->h;
    p.m = (int)s->m;
    p.n_sets = (int)s->n_sets;
    p.n_seg = plan->n_seg;
    p.seg_chunks = plan->seg_chunks;
    p.scale = plan->scale;
    p.limit = plan->limit;
    return p;
}

template <int D>
static srf_status states_of(struct srf_ctx *ctx, const struct fwd_params *p, int64_t heads)
{
    return p->count <= 64 ? launch_states<D, 1>(ctx, p, heads) : launch_states<D, 2>(ctx, p, heads);
}

srf_status srf__pure_states(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a, int first,
                            int count, const struct pure_plan *plan, float *states)
{
    struct fwd_params p = params_of(&a->s, a->k, a->v, a->ld, a->w, a->bias, plan);
    int64_t heads = a->s.b * a->s.h;
    p.first = first;
    p.count = count;
    p.states = states;
    switch (a->s.d) {
    case 32:
        return states_of<32>(ctx, &p, heads);
    case 64:
        return states_of<64>(ctx, &p, heads);
    case 80:
        return states_of<80>(ctx, &p, heads);
    case 96:
        return states_of<96>(ctx, &p, heads);
    default:
        return states_of<128>(ctx, &p, heads);
    }
}

srf_status srf__pure_fwd(struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    if (s->b * s->t == 0) return SRF_OK;
    if (srf__wide_takes(ctx, s)) return srf__wide_fwd(ctx, a);
    struct fwd_plan f = plan_fwd(ctx, s);
    if (srf__pure_wgmma_takes(ctx, s)) return srf__pure_wgmma_fwd(ctx, a, &f.plan, f.states);
    struct fwd_params p = params_of(s, a->k, a->v, a->ld, a->w, a->bias, &f.plan);
    p.q = (const bf16 *)a->q;
    p.o = (bf16 *)a->o;
    p.stat = (float *)a->stat;
    p.states = f.states;
    p.num = f.num;
    p.den = f.den;
    p.ld_o = a->ld_o;
    int64_t heads = s->b * s->h;
    switch (s->d) {
    case 32:
        return launch_groups<32>(ctx, &p, heads);
    case 64:
        return launch_groups<64>(ctx, &p, heads);
    case 80:
        return launch_groups<80>(ctx, &p, heads);
    case 96:
        return launch_groups<96>(ctx, &p, heads);
    default:
        return launch_groups<128>(ctx, &p, heads);
    }
}
