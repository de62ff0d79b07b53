/* Pure SRF attention with warpgroup products: the states before segments, and the forward. The
 * method is told in srf_attn_pure.cu, what is different here in srf_attn_pure_wgmma.h.
 *
 * Floor: as there. The products need 20 us of tensor cores at b h t = 393,216 (m = d = 64), their
 * exponentials 14 us.
 */
#include "kernels/cuda/srf_attn_pure_wgmma.h"

struct walk {
    const bf16 *w;
    const float *bias;
    bf16 *o;
    float *stat;   /* (b, h, t), or NULL */
    float *states; /* (b h, n_seg, pure_state_count); NULL: one segment */
    bf16 *entry;   /* for the backward: S before chunks, or NULL */
    float *marks;  /* and their marks */
    int64_t ld_o;
    int t, h, m, n_sets;
    int n_seg, seg_chunks;
    float scale;
    uint32_t limit;
};
struct walk_maps {
    CUtensorMap q, k, v;
};

/* ---- the states of segments ------------------------------------------------------------------ */

#define STATE_STAGES 3
struct state_smem {
    static constexpr int v = STATE_STAGES * TILE, w = v + STATE_STAGES * TILE;
    static constexpr int half = w + TILE, bias = half + CHUNK * 4, bar = bias + CHUNK * 4;
    static constexpr int bytes = bar + STATE_STAGES * 8;
};

/* Chunks are taken last to first: a sum takes any order, and what was read last, the first chunks,
 * is what the walk that follows reads first, while it still lies in L2. */
static __global__ WALK_BOUNDS(3) void pure_states_kernel(const __grid_constant__ struct walk p,
                                                         const __grid_constant__ struct walk_maps m)
{
#if HAVE_WGMMA
    using at = state_smem;
    extern __shared__ char raw[];
    char *smem = raw + (-smem_addr(raw) & 1023u);
    const uint32_t base = smem_addr(smem);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
    const int f0 = 16 * warp + g;
    const int64_t head_i = blockIdx.x / (p.n_seg - 1);
    const int seg = blockIdx.x % (p.n_seg - 1), first = seg * p.seg_chunks;
    const int seq = (int)(head_i / p.h), head = (int)(head_i % p.h);
    const int64_t set = p.n_sets == 1 ? 0 : head;
    const float to_log2 = SRF__LOG2E * p.scale;
    float *half = (float *)(smem + at::half), *bias = (float *)(smem + at::bias);
    chain_next();
    auto fill = [&](int i) {
        const int s = i % STATE_STAGES, t0 = (first + p.seg_chunks - 1 - i) * CHUNK;
        const uint32_t full = base + at::bar + 8 * s;
        barrier_expect(full, 2 * TILE);
        bulk_tile(base + s * TILE, &m.k, head * 64, t0, seq, full);
        bulk_tile(base + at::v + s * TILE, &m.v, head * 64, t0, seq, full);
    };
    load_tile<64, 128>(base + at::w, p.w + set * p.m * 64, 64, 64, p.m, tid);
    cp_async_commit();
    if (tid == 0) {
        for (int s = 0; s < STATE_STAGES; s++) barrier_init(base + at::bar + 8 * s, 1);
        barrier_init_done();
        for (int i = 0; i < min(STATE_STAGES - 1, p.seg_chunks); i++) fill(i);
    }
    if (tid < 64) bias[tid] = tid < p.m ? SRF__LOG2E * p.bias[set * p.m + tid] : -INFINITY;
    struct pure_state<64> st;
    pure_state_start(&st, false, 1, NULL, f0, pair);
    cp_async_wait<0>();
    async_fence();
    __syncthreads();

    for (int i = 0; i < p.seg_chunks; i++) {
        const int s = i % STATE_STAGES;
        const uint32_t k_tile = base + s * TILE, v_tile = base + at::v + s * TILE;
        float a[8][4];
        struct pure_keys keys;
        barrier_wait(base + at::bar + 8 * s, i / STATE_STAGES & 1);
        key_norms<64, 1>(k_tile, half, p.scale, p.limit, 0, CHUNK, tid);
        async_fence();
        __syncthreads();
        if (tid == 0 && i + STATE_STAGES - 1 < p.seg_chunks) fill(i + STATE_STAGES - 1);
        warpgroup_fence();
        wgmma_tile_scores(&a[0][0], base + at::w, k_tile);
        warpgroup_commit();
        warpgroup_wait<0>();
        wgmma_hold(&a[0][0]);
        key_weights<64>(&keys, &st, a, half, bias[f0], bias[f0 + 8], to_log2, pair);
        pure_state_step<64>(&st, &keys);
        uint32_t kf[4][4];
#pragma unroll
        for (int kk = 0; kk < 4; kk++) key_operand(kf[kk], &keys, kk);
        add_keys(&st, kf, v_tile);
        warpgroup_wait<0>();
        wgmma_hold(&st.s[0][0]);
        /* All have read the tiles and the norms. */
        __syncthreads();
    }
    pure_state_end(&st, 1, p.states + (head_i * p.n_seg + seg) * pure_state_count(64, 1), f0, pair);
#endif
}

/* ---- the walk -------------------------------------------------------------------------------- */

struct walk_smem {
    static constexpr int v = 2 * TILE, q = v + 2 * TILE, w = q + 2 * TILE;
    static constexpr int kf = w + TILE, s = kf + TILE, half = s + TILE;
    static constexpr int bias = half + CHUNK * 4, top = bias + 64 * 4; /* bias + M */
    static constexpr int z = top + 64 * 4;                             /* (2, 64) bf16: its parts */
    static constexpr int bar = z + 64 * 4, bytes = bar + 2 * 8;
};

/* ENTRIES: they are kept for the backward. */
template <bool ENTRIES>
static __global__ WALK_BOUNDS(3) void pure_walk_kernel(const __grid_constant__ struct walk p,
                                                       const __grid_constant__ struct walk_maps m)
{
#if HAVE_WGMMA
    using at = walk_smem;
    extern __shared__ char raw[];
    char *smem = raw + (-smem_addr(raw) & 1023u);
    const uint32_t base = smem_addr(smem);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
    const int f0 = 16 * warp + g, row = f0; /* its features, and its tokens of a chunk */
    const int64_t head_i = blockIdx.x / p.n_seg;
    const int seg = blockIdx.x % p.n_seg, n_chunks = (p.t + CHUNK - 1) / CHUNK;
    const int first = seg * p.seg_chunks, c_end = min(first + p.seg_chunks, n_chunks);
    const int seq = (int)(head_i / p.h), head = (int)(head_i % p.h);
    const int64_t set = p.n_sets == 1 ? 0 : head;
    const float to_log2 = SRF__LOG2E * p.scale;
    const uint32_t diagonal = lower_mask(g, pair);
    float *half = (float *)(smem + at::half), *bias = (float *)(smem + at::bias);
    float *top = (float *)(smem + at::top);
    auto fill = [&](int c) {
        const int s = (c - first) & 1;
        const uint32_t full = base + at::bar + 8 * s;
        barrier_expect(full, 3 * TILE);
        bulk_tile(base + s * TILE, &m.k, head * 64, c * CHUNK, seq, full);
        bulk_tile(base + at::q + s * TILE, &m.q, head * 64, c * CHUNK, seq, full);
        bulk_tile(base + at::v + s * TILE, &m.v, head * 64, c * CHUNK, seq, full);
    };
    load_tile<64, 128>(base + at::w, p.w + set * p.m * 64, 64, 64, p.m, tid);
    cp_async_commit();
    if (tid == 0) {
        for (int s = 0; s < 2; s++) barrier_init(base + at::bar + 8 * s, 1);
        barrier_init_done();
        fill(first);
    }
    if (tid < 64) bias[tid] = tid < p.m ? SRF__LOG2E * p.bias[set * p.m + tid] : -INFINITY;
    chain_wait();
    struct pure_state<64> st;
    pure_state_start(&st, seg > 0, 1, p.states + (head_i * p.n_seg + seg) * pure_state_count(64, 1),
                     f0, pair);
    cp_async_wait<0>();
    async_fence();
    __syncthreads();

    int c = first, lo = 0, size = CHUNK;
    while (c < c_end) {
        const int n = min(CHUNK, p.t - c * CHUNK), hi = min(lo + size, n), s = (c - first) & 1;
        const uint32_t k_tile = base + s * TILE, v_tile = base + at::v + s * TILE;
        const uint32_t q_tile = base + at::q + s * TILE;
        barrier_wait(base + at::bar + 8 * s, (c - first) >> 1 & 1);
        key_norms<64, 1>(k_tile, half, p.scale, p.limit, lo, hi, tid);
        async_fence();
        if (ENTRIES && tid == 0) bulk_sent(); /* S, before it is written again */
        __syncthreads();
        if (tid == 0 && lo == 0 && size == CHUNK && c + 1 < c_end) fill(c + 1);

        float a[8][4], aq[8][4];
        uint32_t x[4][4], q[4][4];
        struct pure_keys keys;
        own_rows(q, q_tile, p.limit, warp, lane);
        warpgroup_fence();
        wgmma_tile_scores(&a[0][0], base + at::w, k_tile);
        warpgroup_commit();
        wgmma_scores(&aq[0][0], q, base + at::w);
        warpgroup_commit();
        warpgroup_wait<1>();
        wgmma_hold(&a[0][0]);
        key_weights<64>(&keys, &st, a, half, bias[f0], bias[f0 + 8], to_log2, pair);
        pure_publish<64>(&st, &keys, base + at::kf, base + at::s, f0, lane);
        if (pair == 0) {
            bf16 *z = (bf16 *)(smem + at::z) + f0;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float zi = st.z[i] * keys.step[i];
                top[f0 + 8 * i] = bias[f0 + 8 * i] + keys.top[i];
                z[8 * i] = __float2bfloat16_rn(zi);
                z[64 + 8 * i] = __float2bfloat16_rn(zi - __bfloat162float(z[8 * i]));
            }
        }
        async_fence();
        warpgroup_wait<0>();
        wgmma_hold(&aq[0][0]);
        if (ENTRIES && lo == 0 && size == CHUNK) {
            const int64_t chunk = head_i * n_chunks + c;
            const bool stay = __syncthreads_or(key_tops_far(&st, &keys));
            put_marks(p.marks + chunk * MARKS, &st, &keys, bias, stay, f0, pair);
            if (tid == 0 && !stay) {
                bulk_send(p.entry + chunk * (CHUNK * 64), base + at::s, TILE);
                bulk_commit();
            }
            if (stay) put_entry(p.entry + chunk * (CHUNK * 64), &st, f0, pair);
        } else {
            __syncthreads();
        }

        /* Query features; o and den of this warp's tokens. */
        float r[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float2 shift = *(const float2 *)(top + 8 * j + 2 * pair);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                aq[j][i] = fmaf(aq[j][i], to_log2, i & 1 ? shift.y : shift.x);
                r[i >> 1] = fmaxf(r[i >> 1], aq[j][i]);
            }
        }
        r[0] = quad_max(r[0]);
        r[1] = quad_max(r[1]);
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) aq[j][i] = exp2_fast(aq[j][i] - r[i >> 1]);
        pack_rows(q, aq);
        float o[8][4], den[4] = {0, 0, 0, 0};
        warpgroup_fence();
        wgmma_mix(&a[0][0], q, base + at::kf, false);
        warpgroup_commit();
        wgmma_mix(&o[0][0], q, base + at::s, false);
        warpgroup_commit();
        const uint32_t z_row = base + at::z + (g & 1) * 128 + pair * 4;
#pragma unroll
        for (int kk = 0; kk < 4; kk++) {
            /* Columns 0 and 1 of this product are the two parts of z, others 0. */
            uint32_t z0 = load_shared(z_row + kk * 32), z1 = load_shared(z_row + kk * 32 + 16);
            mma_bf16(den, q[kk], g < 2 ? z0 : 0, g < 2 ? z1 : 0);
        }
        warpgroup_wait<1>();
        wgmma_hold(&a[0][0]);
        pack_rows(x, a);
        keep_side<true>(x, diagonal, warp);
        warpgroup_fence();
        wgmma_mix(&o[0][0], x, v_tile, true);
        warpgroup_commit();
        const uint32_t ones = g == 0 ? 0x3f803f80u : 0;
#pragma unroll
        for (int kk = 0; kk < 4; kk++) mma_bf16(den, x[kk], ones, ones);
        const float den_row[2] = {__shfl_sync(0xffffffffu, den[0] + den[1], lane & ~3),
                                  __shfl_sync(0xffffffffu, den[2] + den[3], lane & ~3)};
        const bool in0 = row >= lo && row < hi, in1 = row + 8 >= lo && row + 8 < hi;
        const bool bad = (in0 && den_row[0] < SRF__MIN_DEN) || (in1 && den_row[1] < SRF__MIN_DEN);
        warpgroup_wait<0>();
        wgmma_hold(&o[0][0]);
        if (__syncthreads_or(bad && size > 1)) {
            size >>= 1;
            continue;
        }
        pure_state_step<64>(&st, &keys);
        own_rows(x, base + at::kf, warp, lane); /* kf: fewer registers than to keep it */
        add_keys(&st, x, v_tile);
        if (p.stat && pair == 0) {
            float *to = p.stat + head_i * p.t + c * CHUNK + row;
            if (in0) to[0] = r[0] + log2f(den_row[0]);
            if (in1) to[8] = r[1] + log2f(den_row[1]);
        }
        scale_rows(o, 1.0f / den_row[0], 1.0f / den_row[1]);
        store_rows<64>(p.o + ((int64_t)seq * p.t + c * CHUNK) * p.ld_o + head * 64, p.ld_o, o,
                       q_tile, warp, lo, hi, lane);
        warpgroup_wait<0>();
        wgmma_hold(&st.s[0][0]);
        lo += size;
        size = lo & -lo;
        if (lo >= n) {
            c++;
            lo = 0;
            size = CHUNK;
        }
    }
    if (ENTRIES && tid == 0) bulk_done();
#endif
}

/* ---- the op ------------------------------------------------------------------------------- */

/* One thread a feature and column of S or z, over the segments of one sequence and head: what each
 * adds becomes the sum before it. */
static __global__ void prefix_kernel(float *states, int64_t n, int n_seg)
{
    constexpr int ahead = 8; /* segments whose loads are on their way at once */
    constexpr int count = 64 * (64 + 3), columns = 64 * 65;
    chain_next();
    chain_wait();
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int j = (int)(i % columns), f = j < 64 * 64 ? j / 64 : j - 64 * 64;
    float *st = states + i / columns * n_seg * count;
    float sum = 0, top = SRF__UNSET;
    for (int first = 0; first < n_seg; first += ahead) {
        float add[ahead], add_top[ahead];
#pragma unroll
        for (int k = 0; k < ahead; k++) {
            const bool there = first + k < n_seg - 1;
            const float *from = st + (int64_t)(first + (there ? k : 0)) * count;
            add[k] = there ? from[j] : 0.0f;
            add_top[k] = there ? from[columns + f] : SRF__UNSET;
        }
#pragma unroll
        for (int k = 0; k < ahead; k++) {
            if (first + k >= n_seg) break;
            float *to = st + (int64_t)(first + k) * count;
            to[j] = sum;
            if (j >= 64 * 64) to[columns + 64 + f] = top;
            const float with = fmaxf(top, add_top[k]);
            sum = sum * exp2_fast(top - with) + add[k] * exp2_fast(add_top[k] - with);
            top = with;
        }
    }
}

bool srf__pure_wgmma_takes(const struct srf_ctx *ctx, const struct srf_attn_shape *s)
{
    struct cudaFuncAttributes f;
    return s->d == 64 && s->m <= 64 && cuda_of(ctx)->cc == 90 &&
           cudaFuncGetAttributes(&f, (const void *)pure_walk_kernel<false>) == cudaSuccess &&
           f.maxThreadsPerBlock == 128;
}

size_t srf__pure_wgmma_entry_bytes(const struct srf_attn_shape *s)
{
    return (size_t)(s->b * s->h * div_up(s->t, CHUNK)) * (TILE + MARKS * sizeof(float));
}

static struct walk walk_of(const struct srf_attn_shape *s, const void *w, const void *bias,
                           const struct pure_plan *plan, float *states)
{
    struct walk p = {};
    p.w = (const bf16 *)w;
    p.bias = (const float *)bias;
    p.states = states;
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

static srf_status launch_states(struct srf_ctx *ctx, const struct walk *p,
                                const struct walk_maps *m, int64_t heads)
{
    constexpr int bytes = 1024 + state_smem::bytes;
    const int64_t n = heads * 64 * 65;
    CUDA_TRY(cudaFuncSetAttribute(pure_states_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  bytes));
    pure_states_kernel<<<(unsigned)(heads * (p->n_seg - 1)), 128, bytes, stream_of(ctx)>>>(*p, *m);
    struct chain_shape shape = {dim3((unsigned)div_up(n, 128)), 128, 0, 1};
    chain_launch(ctx, shape, prefix_kernel, p->states, n, p->n_seg);
    return srf__cuda_launched("srf_attn");
}

static srf_status states_before(struct srf_ctx *ctx, const struct srf_attn_shape *s, const void *k,
                                const void *v, int64_t ld, const void *w, const void *bias,
                                const struct pure_plan *plan, float *states)
{
    struct walk p = walk_of(s, w, bias, plan, states);
    struct walk_maps m;
    SRF_TRY(srf__tile_map(&m.k, k, s->b, s->t, s->h, ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.v, v, s->b, s->t, s->h, ld, CHUNK));
    m.q = m.k; /* not used */
    return launch_states(ctx, &p, &m, s->b * s->h);
}

srf_status srf__pure_wgmma_states(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a,
                                  const struct pure_plan *plan, float *states)
{
    return states_before(ctx, &a->s, a->k, a->v, a->ld, a->w, a->bias, plan, states);
}

bool srf__states_take(const struct srf_ctx *ctx, const struct srf_attn_shape *s)
{
    return srf__pure_wgmma_takes(ctx, s);
}

srf_status srf__states_before(struct srf_ctx *ctx, const struct srf_attn_shape *s, const void *k,
                              const void *v, int64_t ld, const void *w, const void *bias, int n_seg,
                              int seg_chunks, float *states)
{
    struct pure_plan plan = srf__pure_plan(ctx, s, 1);
    plan.n_seg = n_seg;
    plan.seg_chunks = seg_chunks;
    return states_before(ctx, s, k, v, ld, w, bias, &plan, states);
}

srf_status srf__pure_wgmma_fwd(struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a,
                               const struct pure_plan *plan, float *states)
{
    constexpr int bytes = 1024 + walk_smem::bytes;
    const struct srf_attn_shape *s = &a->s;
    const int64_t heads = s->b * s->h;
    struct walk p = walk_of(s, a->w, a->bias, plan, states);
    struct walk_maps m;
    p.o = (bf16 *)a->o;
    p.stat = (float *)a->stat;
    p.entry = srf__pure_carry_bytes(ctx, s) > 0 ? (bf16 *)a->carry : NULL;
    if (p.entry) p.marks = (float *)(p.entry + heads * div_up(s->t, CHUNK) * CHUNK * 64);
    p.ld_o = a->ld_o;
    SRF_TRY(srf__tile_map(&m.q, a->q, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.k, a->k, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.v, a->v, s->b, s->t, s->h, a->ld, CHUNK));
    if (p.n_seg > 1) SRF_TRY(launch_states(ctx, &p, &m, heads));
    void (*kernel)(struct walk, struct walk_maps) =
        p.entry ? pure_walk_kernel<true> : pure_walk_kernel<false>;
    CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    if (p.n_seg > 1) {
        struct chain_shape shape = {dim3((unsigned)(heads * p.n_seg)), 128, bytes, 1};
        chain_launch(ctx, shape, kernel, p, m);
    } else {
        kernel<<<(unsigned)heads, 128, bytes, stream_of(ctx)>>>(p, m);
    }
    return srf__cuda_launched("srf_attn_fwd");
}
