/* SRF attention with more than 128 features on Hopper's warpgroup products, forward: pure, causal,
 * bf16, d = 64 (sm_90a). Forms and names are those of srf_attn_pure.cu.
 *
 * One block per sequence, head and segment of tokens walks chunks of 64 tokens, 256 features at a
 * time. Its four warpgroups have two parts, so that products, exponentials and shared memory are
 * busy with different things at the same time:
 *     owners of features (two, 128 each; srf_attn_wide_walk.h)
 *         ak = W y^T, features as rows: maxima over tokens stay in quads; kf^T, and S as it was
 *         before the chunk, in the scale of the new M, to one of two buffers in shared memory;
 *         S += kf^T v, whose sums stay in registers
 *     owners of tokens (two, that take chunks in turn and each their own buffer)
 *         for 32 features after the other: aq = x W^T, qf;  P += qf kf,  (num, den) += qf (S, z)
 *         num += P v,  den += sum P,  o = num / den
 * A token has all features in one thread's quad, so that nothing is merged between warpgroups: r_t
 * grows from feature to feature as in an online softmax, and is left alone (LAZY) while that is
 * safe. The second operands of num have 8 columns more: z as the sum of two bf16 values, or ones.
 * Barriers in shared memory say that half of a buffer, 128 features, is full or empty. K, V, Q come
 * by the copy engine.
 *
 * A chunk in which some den is tiny must be taken in pieces, but S has gone on by then: the block
 * finishes its pass, and walks again with that chunk in halves, until no den is tiny.
 * With more than 256 features, launches follow each other that keep (r, num, den) in the workspace.
 *
 * Floor: 8 b t h d bytes as ever, but from m = 128 on arithmetic counts: b t h (10 m + 128) d
 * flops, 2 m exponentials a token and head: at b = 32, t = 1024, h = 12, m = 256
 * 68 GFLOP and 201M, 0.07 and 0.054 ms on an H100.
 */
#include "kernels/cuda/srf_attn_wide_walk.h"

struct wide_fwd {
    const bf16 *w;
    const float *bias;
    bf16 *o;
    float *stat;    /* (b, h, t), or NULL */
    float *states;  /* states before the segments, 128 features at a time; NULL: one segment */
    float *num;     /* (b h, t, d): of the features before these; NULL: all are done at once */
    float *den;     /* (b h, t, 2): den, r of the same */
    uint8_t *sizes; /* (b h, n_seg, seg_chunks): of pieces */
    int64_t ld_o, state_group; /* floats from the states of 128 features to the next */
    int t, h, m, n_sets;
    int first, count;      /* features [first, first + count) */
    int n_seg, seg_chunks; /* segments, chunks in each */
    float scale;           /* d^(-1/4) */
    uint32_t limit;        /* the clamp of q and k, twice bf16 */
};

struct fwd_maps {
    CUtensorMap q, k, v;
};

/* r_t may stay behind the maximum by this, as log2, before num and P are brought to another. */
#define LAZY 4.0f

/* Shared memory: see srf_attn_wide_walk.h. */
struct fwd_at {
    enum {
        W = 0,
        KF = 4 * TILE,
        S = KF + 8 * TILE,
        Z = S + 8 * TILE, /* rows of 8 pieces: z of buffer b, group g in piece 4 b + g */
        N_V = 3,
        V = Z + TILE,
        K = V + N_V * TILE,
        Q = K + TILE, /* one for each warpgroup that owns tokens */
        ONES = Q + 2 * TILE,
        HALF = ONES + 2048,
        TOP = HALF + 2 * CHUNK * 4,
        BIAS = TOP + 2 * WIDE_FEATURES * 4,
        M = BIAS + WIDE_FEATURES * 4,
        ZS = M + WIDE_FEATURES * 4, /* z */
        FULL = ZS + WIDE_FEATURES * 4,
        EMPTY = FULL + 32,
        K_FULL = EMPTY + 32,
        V_FULL = K_FULL + 8,
        V_FREE = V_FULL + 8,
        Q_FULL = V_FREE + 8 * N_V, /* one for each Q */
        MEET = Q_FULL + 16,
        PLACE = MEET + 8,   /* first element of the head in o, first token */
        RANGE = PLACE + 16, /* struct wide_range */
        COUNT = RANGE + 24, /* pieces so far */
        AGAIN = COUNT + 4,  /* some pieces were too large */
        BYTES = AGAIN + 4,
    };
};

#if HAVE_WGMMA
/* The owners of tokens: every other piece of the range, from the one that is the block's turn-th or
 * the next. */
__device__ __forceinline__ void walk_queries(const struct wide_fwd &p, const struct fwd_maps &m,
                                             uint32_t base, const volatile struct wide_range &range,
                                             int turn)
{
    using At = fwd_at;
    const float to_log2 = SRF__LOG2E * p.scale;
    struct wide_piece piece = first_piece(range);
    if ((turn & 1) != (wide_here().wg & 1)) {
        piece = next_piece(piece, range, p.t);
        turn++;
    }
    auto load = [&](int c) {
        const struct wide_thread at = wide_here();
        if ((at.tid & 127) != 0) return;
        const uint32_t bar = base + At::Q_FULL + 8 * (at.wg & 1);
        const int head_i = blockIdx.x / p.n_seg;
        barrier_expect(bar, TILE);
        bulk_tile(base + At::Q + (at.wg & 1) * TILE, &m.q, head_i % p.h * D, c * CHUNK,
                  head_i / p.h, bar);
    };
    /* The next of this warpgroup's. */
    auto next_of = [&](const struct wide_piece &at) {
        const struct wide_piece one = next_piece(at, range, p.t);
        return one.c < range.end ? next_piece(one, range, p.t) : one;
    };
    if (piece.c < range.end) load(piece.c);
    for (; piece.c < range.end; turn += 2) {
        const int b = turn & 1; /* always the same */
        const uint32_t q_tile = base + At::Q + b * TILE;
        float num[36], weights[32], aq[16], r[2];
        barrier_wait(base + At::Q_FULL + 8 * b, turn >> 1 & 1);
        {
            const struct wide_thread at = wide_here();
            const uint32_t own = q_tile + tile_at<D>(at.tid >> 3 & 15, at.tid & 7);
#pragma unroll
            for (int i = 0; i < 4; i++) clamp_piece(own + i * (TILE / 4), p.limit);
            async_fence();
            warpgroup_barrier(at.wg);
        }
        warpgroup_fence();
        tiles_32(aq, q_tile, base + At::W);
        warpgroup_commit();
        /* 32 features at a time: registers are short. */
#pragma unroll
        for (int g = 0; g < 8; g++) {
            const uint32_t full = base + At::FULL + 8 * (2 * b + g / 4);
            uint32_t qf[2][4];
            float most[2] = {-3e38f, -3e38f};
            if (g % 4 == 0) barrier_wait(full, turn >> 1 & 1);
            warpgroup_wait<0>();
            wide_hold(aq);
            if (g > 0) {
                wide_hold(num);
                wide_hold(weights);
            }
            if (g == 4) barrier_arrive(full + (At::EMPTY - At::FULL) - 8);
            {
                const struct wide_thread at = wide_here();
                const uint32_t top_row = base + At::TOP + 1024 * b + 128 * g + 8 * at.pair;
                if (g == 7) {
                    warpgroup_barrier(at.wg); /* all are done with Q */
                    const int next = next_of(piece).c;
                    if (next < range.end) load(next);
                }
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float2 shift = load_float2(top_row + 32 * j);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        aq[4 * j + i] = fmaf(aq[4 * j + i], to_log2, i & 1 ? shift.y : shift.x);
                        most[i >> 1] = fmaxf(most[i >> 1], aq[4 * j + i]);
                    }
                }
            }
            if (g == 0) {
                r[0] = quad_max(most[0]);
                r[1] = quad_max(most[1]);
            } else if (__any_sync(0xffffffffu, most[0] > r[0] + LAZY || most[1] > r[1] + LAZY)) {
                float by[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    most[i] = fmaxf(quad_max(most[i]), r[i]);
                    by[i] = exp2_fast(r[i] - most[i]);
                    r[i] = most[i];
                }
#pragma unroll
                for (int i = 0; i < 36; i++) num[i] *= by[i >> 1 & 1];
#pragma unroll
                for (int i = 0; i < 32; i++) weights[i] *= by[i >> 1 & 1];
            }
#pragma unroll
            for (int i = 0; i < 16; i++) aq[i] = exp2_fast(aq[i] - r[i >> 1 & 1]);
            pack_wide(qf, aq);
            warpgroup_fence();
            packed_product<true>(weights, qf, base + At::KF + (8 * b + g) * (TILE / 2), g > 0);
            packed_72<false>(num, qf, base + At::S + (8 * b + g) * (TILE / 2),
                             base + At::Z + 16 * (4 * b + g / 2) + g % 2 * (TILE / 2), g > 0);
            warpgroup_commit();
            if (g < 7) {
                tiles_32(aq, q_tile, base + At::W + (g + 1) * (TILE / 2));
                warpgroup_commit();
            }
        }
        warpgroup_wait<0>();
        wide_hold(num);
        wide_hold(weights);
        barrier_arrive(base + At::EMPTY + 8 * (2 * b + 1));
        {
            const struct wide_thread at = wide_here();
            uint32_t weight[4][4];
            pack_wide(weight, weights);
            keep_earlier(weight, at.warp, at.lane);
            warpgroup_fence();
            packed_72<true>(num, weight, base + At::V + turn % At::N_V * TILE, base + At::ONES,
                            true);
            warpgroup_commit();
            warpgroup_wait<0>();
            wide_hold(num);
        }
        barrier_arrive(base + At::V_FREE + 8 * (turn % At::N_V));

        const struct wide_thread at = wide_here();
        const int hi = piece_end(piece, p.t);
        const int64_t token = load_i64(base + At::PLACE + 8) + piece.c * CHUNK + at.row;
        const bool in[2] = {at.row >= piece.lo && at.row < hi,
                            at.row + 8 >= piece.lo && at.row + 8 < hi};
        const float den_here[2] = {num[32] + num[33], num[34] + num[35]};
        float den[2], mine[2] = {1.0f, 1.0f}, before[2] = {0.0f, 0.0f};
        bool bad = false;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            den[i] = __shfl_sync(0xffffffffu, den_here[i], at.lane & ~3);
            bad = bad || (in[i] && den[i] < SRF__MIN_DEN);
            if (p.first > 0 && in[i]) {
                const float2 part = ((const float2 *)p.den)[token + 8 * i]; /* den, r */
                const float with = fmaxf(r[i], part.y);
                mine[i] = exp2_fast(r[i] - with);
                before[i] = exp2_fast(part.y - with);
                den[i] = fmaf(den[i], mine[i], part.x * before[i]);
                r[i] = with;
            }
        }
        if (bad && piece.size > 1) {
            mark_piece(range, piece);
            store_shared(base + At::AGAIN, 1);
        }
        const bool last = p.first + p.count >= p.m;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (at.pair == 0 && in[i]) {
                if (!last)
                    ((float2 *)p.den)[token + 8 * i] = make_float2(den[i], r[i]);
                else if (p.stat)
                    p.stat[token + 8 * i] = r[i] + __log2f(den[i]);
            }
            if (last) {
                const float once = reciprocal(den[i]);
                mine[i] *= once;
                before[i] *= once;
            }
        }
        float *sums = p.num + token * D + 2 * at.pair;
        float(&out)[32] = *(float(*)[32]) & num[0];
#pragma unroll
        for (int i = 0; i < 32; i++) out[i] *= mine[i >> 1 & 1];
        if (p.first > 0) merge_before(out, sums, before, in);
        if (last)
            store_64(p.o + load_i64(base + At::PLACE) +
                         (int64_t)(piece.c * CHUNK + at.row) * p.ld_o,
                     p.ld_o, out, in, at.pair);
        else
            store_sums(sums, out, in);
        piece = next_of(piece);
    }
}
#endif

static __global__ WIDE_BOUNDS void wide_fwd_kernel(const __grid_constant__ struct wide_fwd p,
                                                   const __grid_constant__ struct fwd_maps m)
{
#if HAVE_WGMMA
    using At = fwd_at;
    extern __shared__ __align__(1024) char raw[];
    const uint32_t base = smem_addr(raw);
    const int head_i = blockIdx.x / p.n_seg, seg = blockIdx.x % p.n_seg;
    const int seq = head_i / p.h, head = head_i % p.h, set = p.n_sets == 1 ? 0 : head;
    volatile struct wide_range &range = *(volatile struct wide_range *)(raw + At::RANGE);
    {
        const int tid = wide_here().tid;
        if (tid == 0) {
            range.sizes = p.sizes + (int64_t)blockIdx.x * p.seg_chunks;
            range.begin = seg * p.seg_chunks;
            range.end = min(seg * p.seg_chunks + p.seg_chunks, (p.t + CHUNK - 1) / CHUNK);
            range.careful = 0;
            init_barriers<At>(base);
            for (int b = 0; b < 2; b++) barrier_init(base + At::Q_FULL + 8 * b, 1);
            barrier_init_done();
            store_i64(base + At::PLACE, (int64_t)seq * p.t * p.ld_o + head * D);
            store_i64(base + At::PLACE + 8, (int64_t)head_i * p.t);
            store_shared(base + At::AGAIN, 0);
        }
        load_tile<D, WIDE_THREADS>(base + At::W, p.w + ((int64_t)set * p.m + p.first) * D, D,
                                   WIDE_FEATURES, p.count, tid);
        cp_async_commit();
        for (int i = tid; i < p.seg_chunks; i += WIDE_THREADS)
            p.sizes[(int64_t)blockIdx.x * p.seg_chunks + i] = CHUNK;
        if (tid < WIDE_FEATURES)
            store_shared(base + At::BIAS + 4 * tid,
                         __float_as_uint(
                             tid < p.count ? SRF__LOG2E * p.bias[(int64_t)set * p.m + p.first + tid]
                                           : -INFINITY));
        store_shared_16(base + At::Z + 16 * tid, make_uint4(0, 0, 0, 0));
        put_ones(base + At::ONES, tid);
        cp_async_wait<0>();
        async_fence();
    }
    __syncthreads();
    /* States before the segment: made of 128 features at a time, which a warpgroup owns. */
    auto start = [&](float(&s)[2][32]) {
        const struct wide_thread at = wide_here();
        const int nf = min(128, p.count - at.wg * 128) > 64 ? 2 : 1;
        const float *from = p.states + at.wg * p.state_group +
                            (int64_t)(head_i * p.n_seg + seg) * pure_state_count(D, nf);
#pragma unroll
        for (int g = 0; g < 2; g++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int f = 64 * g + at.row + 8 * i;
                const uint32_t to = base + 4 * (128 * at.wg + f);
                const bool given = seg > 0 && 128 * at.wg + f < p.count;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    float2 x = make_float2(0.0f, 0.0f);
                    if (given) x = *(const float2 *)(from + f * D + 8 * j + 2 * at.pair);
                    s[g][4 * j + 2 * i] = x.x;
                    s[g][4 * j + 2 * i + 1] = x.y;
                }
                if (at.pair == 0) {
                    store_float(to + At::ZS, given ? from[64 * nf * D + f] : 0.0f);
                    store_float(to + At::M, given ? from[64 * nf * (D + 2) + f] : SRF__UNSET);
                }
            }
        __syncwarp();
    };
    /* z as the sum of two bf16 values. */
    auto put = [&](float z, float, int b, int f, const struct wide_piece &) {
        const float rest = z - __bfloat162float(__float2bfloat16_rn(z));
        store_shared(base + At::Z + tile_at<D>(f & 63, 4 * b + (f >> 6)), pack_bf16(z, rest));
    };
    auto load = [&](uint32_t tile, const CUtensorMap *map, int c, uint32_t bar) {
        barrier_expect(bar, TILE);
        bulk_tile(tile, map, head * D, c * CHUNK, seq, bar);
    };
    auto load_k = [&](int c) { load(base + At::K, &m.k, c, base + At::K_FULL); };
    auto load_v = [&](int c, uint32_t tile) { load(tile, &m.v, c, base + At::V_FULL); };
    if (wide_here().wg < 2) {
        int turn = 0;
        do turn = walk_keys<At>(p, base, range, turn, start, put, load_k, load_v);
        while (pass_again<At>(base, range, &turn));
    } else {
        int turn = 0;
        do walk_queries(p, m, base, range, turn);
        while (pass_again<At>(base, range, &turn));
    }
#endif
}

/* ---- the op ------------------------------------------------------------------------------- */

bool srf__wide_takes(const struct srf_ctx *ctx, const struct srf_attn_shape *s)
{
    struct cudaFuncAttributes f;
    return s->d == D && s->m > 128 && cuda_of(ctx)->cc == 90 &&
           cudaFuncGetAttributes(&f, (const void *)wide_fwd_kernel) == cudaSuccess &&
           f.maxThreadsPerBlock == WIDE_THREADS;
}

struct fwd_plan {
    struct pure_plan plan;
    float *states, *num, *den;
    uint8_t *sizes;
    int64_t state_group;
    size_t bytes;
};

static struct fwd_plan plan_fwd(const struct srf_ctx *ctx, const struct srf_attn_shape *s)
{
    struct fwd_plan f;
    struct cuda_bump bump = {(char *)ctx->workspace, 0};
    const int64_t heads = s->b * s->h;
    f.plan = srf__pure_plan(ctx, s, 1);
    f.state_group = heads * f.plan.n_seg * pure_state_count(D, 2);
    f.states = f.num = f.den = NULL;
    f.sizes = (uint8_t *)bump_bytes(&bump, (size_t)(heads * f.plan.n_seg * f.plan.seg_chunks));
    if (f.plan.n_seg > 1)
        f.states = (float *)bump_bytes(&bump, (size_t)(f.state_group * 2) * sizeof(float));
    if (s->m > 256) {
        f.num = (float *)bump_bytes(&bump, (size_t)(heads * s->t * D) * sizeof(float));
        f.den = (float *)bump_bytes(&bump, (size_t)(heads * s->t * 2) * sizeof(float));
    }
    f.bytes = bump.used;
    return f;
}

size_t srf__wide_fwd_workspace(const struct srf_ctx *ctx, const struct srf_attn_shape *s)
{
    return plan_fwd(ctx, s).bytes;
}

srf_status srf__wide_fwd(struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    const int64_t heads = s->b * s->h;
    const struct fwd_plan f = plan_fwd(ctx, s);
    struct wide_fwd p = {};
    p.w = (const bf16 *)a->w;
    p.bias = (const float *)a->bias;
    p.o = (bf16 *)a->o;
    p.stat = (float *)a->stat;
    p.states = f.states;
    p.num = f.num;
    p.den = f.den;
    p.sizes = f.sizes;
    p.ld_o = a->ld_o;
    p.state_group = f.state_group;
    p.t = (int)s->t;
    p.h = (int)s->h;
    p.m = (int)s->m;
    p.n_sets = (int)s->n_sets;
    p.n_seg = f.plan.n_seg;
    p.seg_chunks = f.plan.seg_chunks;
    p.scale = f.plan.scale;
    p.limit = f.plan.limit;
    CUDA_TRY(cudaFuncSetAttribute(wide_fwd_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  fwd_at::BYTES));
    struct fwd_maps m;
    SRF_TRY(srf__tile_map(&m.q, a->q, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.k, a->k, s->b, s->t, s->h, a->ld, CHUNK));
    SRF_TRY(srf__tile_map(&m.v, a->v, s->b, s->t, s->h, a->ld, CHUNK));
    struct srf_srf_attn_bwd_args keys = {};
    keys.s = *s;
    keys.k = a->k;
    keys.v = a->v;
    keys.ld = a->ld;
    keys.w = a->w;
    keys.bias = a->bias;
    for (p.first = 0; p.first < p.m; p.first += p.count) {
        p.count = p.m - p.first < 256 ? p.m - p.first : 256;
        if (p.n_seg > 1)
            for (int i = 0; i < p.count; i += 128)
                SRF_TRY(srf__pure_states(ctx, &keys, p.first + i,
                                         p.count - i < 128 ? p.count - i : 128, &f.plan,
                                         f.states + i / 128 * f.state_group));
        wide_fwd_kernel<<<(unsigned)(heads * p.n_seg), WIDE_THREADS, fwd_at::BYTES,
                          stream_of(ctx)>>>(p, m);
        SRF_TRY(srf__cuda_launched("srf_attn_fwd"));
    }
    return SRF_OK;
}
