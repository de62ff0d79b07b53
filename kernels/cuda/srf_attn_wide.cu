/* SRF attention with more than 128 features on Hopper's warpgroup products, forward: pure, causal,
 * bf16, d = 64 (sm_90a). Forms and names are those of srf_attn_pure.cu.
 *
 * One block per sequence, head and segment of tokens; a warpgroup per 64 features, four of them,
 * which does for its features all that there is to do, M, S, z in its registers: of a chunk of 64
 * tokens
 *     ak = W y^T, features as rows: maxima over tokens stay in quads, kf^T goes to shared memory
 *     S to shared memory as it was before the chunk, in the scale of the new M
 *     aq = x W^T, tokens as rows: r_t is the maximum over the warpgroup's own features, qf stays
 *     P = qf kf,   (num, den) = qf (S, z) + P (v, 1),   (S, z) += kf^T (v, 1)
 * The second operands of the last line have 8 columns more, the first two of which are z as the sum
 * of two bf16 values, or 1 and 0. Then (r, num, den) of all warpgroups are merged through shared
 * memory, each finishing 16 columns. One barrier of the block a chunk; with it goes the vote
 * whether the chunk must be taken again in pieces of half the size. 128 registers a thread hold S
 * and what half of num takes, therefore num comes in two halves.
 * With more than 256 features, launches follow each other that keep the triples in the workspace.
 *
 * Floor: 8 b t h d bytes as ever, but from m = 128 on arithmetic counts: b t h (12 m + 256) d
 * flops, 2 m exponentials a token and head: at b = 32, t = 1024, h = 12, m = 256
 * 84 GFLOP and 201M, 0.11 and 0.054 ms on an H100.
 */
#include "kernels/cuda/srf_attn_wide.h"

#define D    64
#define NW   WIDE_GROUPS
#define TILE WIDE_TILE

struct wide_fwd {
    const bf16 *q, *k, *v, *w;
    const float *bias;
    bf16 *o;
    float *stat;   /* (b, h, t), or NULL */
    float *states; /* states before the segments, 128 features at a time; NULL: one segment */
    float *num;    /* (b h, t, d): of the features before these; NULL: all are done at once */
    float *den;    /* (b h, t, 2): den, r of the same */
    int64_t ld, ld_o, state_group; /* floats from the states of 128 features to the next */
    int t, h, m, n_sets;
    int first, count;      /* features [first, first + count) */
    int n_seg, seg_chunks; /* segments, chunks in each */
    float scale;           /* d^(-1/4) */
    uint32_t limit;        /* the clamp of q and k, twice bf16 */
};

/* Shared memory: tiles, then rows of floats. */
enum {
    AT_K = 0, /* K, V, Q twice */
    AT_V = 2 * TILE,
    AT_Q = 4 * TILE,
    AT_W = 6 * TILE,
    AT_KF = AT_W + NW * TILE, /* (features, tokens) */
    AT_S = AT_KF + NW * TILE, /* (features, d) */
    AT_Z = AT_S + NW * TILE,  /* rows of 8 pieces: z of warpgroup i in piece i, ones in piece 4 */
    AT_SENT = AT_Z + TILE,    /* what warpgroups send each other */
    AT_HALF = AT_SENT + (NW - 1) * 2 * TILE, /* (2, tokens) */
    AT_TOP = AT_HALF + 2 * CHUNK * 4,        /* bias + M */
    AT_BIAS = AT_TOP + NW * 256,
    AT_DEN = AT_BIAS + NW * 256, /* (NW, tokens, 2): den, r */
    AT_TAKEN = AT_DEN + NW * 512,
    AT_PLACE = AT_TAKEN + 8, /* first elements of the head in q and o, first token */
    AT_BYTES = AT_PLACE + 24 + 1024,
};

static __global__ WIDE_BOUNDS void wide_fwd_kernel(const __grid_constant__ struct wide_fwd p)
{
#if HAVE_WGMMA
    extern __shared__ char raw[];
    const uint32_t base = smem_addr(raw) + (-smem_addr(raw) & 1023u);
    const float to_log2 = SRF__LOG2E * p.scale;
    const uint32_t taken = base + AT_TAKEN;
    const int head_i = blockIdx.x / p.n_seg, seg = blockIdx.x % p.n_seg;
    const int c_end = min((seg + 1) * p.seg_chunks, (p.t + CHUNK - 1) / CHUNK);
    int c = seg * p.seg_chunks;

    auto load_chunk = [&](int c) {
        const int tid = wide_here().tid;
        const int64_t from = load_i64(base + AT_PLACE) + (int64_t)c * CHUNK * p.ld;
        const int n = min(CHUNK, p.t - c * CHUNK);
        const uint32_t to = base + (c & 1) * TILE;
        load_tile<D, WIDE_THREADS>(to + AT_K, p.k + from, p.ld, CHUNK, n, tid);
        load_tile<D, WIDE_THREADS>(to + AT_V, p.v + from, p.ld, CHUNK, n, tid);
        load_tile<D, WIDE_THREADS>(to + AT_Q, p.q + from, p.ld, CHUNK, n, tid);
        cp_async_commit();
    };
    /* This thread's pieces of K and Q have come: clamp them. Keys outside [lo, hi) get weight 0. */
    auto prepare = [&](int c, int lo, int hi) {
        const int tid = wide_here().tid, stage = c & 1, key = tid >> 3;
        const uint32_t own = base + stage * TILE + tile_at<D>(key, tid & 7);
        const float half = clamp_key(own + AT_K, p.scale, p.limit);
        clamp_piece(own + AT_Q, p.limit);
        if ((tid & 7) == 0)
            store_shared(base + AT_HALF + 4 * (stage * CHUNK + key),
                         __float_as_uint(key >= lo && key < hi ? half : -INFINITY));
        fence_products();
    };

    float s[36], top[2];
    {
        const struct wide_thread at = wide_here();
        const int seq = head_i / p.h, head = head_i % p.h, set = p.n_sets == 1 ? 0 : head;
        if (at.tid == 0) {
            barrier_init(taken, WIDE_THREADS);
            barrier_init_done();
            store_i64(base + AT_PLACE, (int64_t)seq * p.t * p.ld + head * D);
            store_i64(base + AT_PLACE + 8, (int64_t)seq * p.t * p.ld_o + head * D);
            store_i64(base + AT_PLACE + 16, (int64_t)head_i * p.t);
        }
        __syncthreads();
        load_tile<D, WIDE_THREADS>(base + AT_W, p.w + ((int64_t)set * p.m + p.first) * D, D,
                                   NW * 64, p.count, at.tid);
        load_chunk(c);
        {
            const int r = at.tid >> 3, piece = (at.tid & 7) ^ (r & 7);
            store_shared_16(base + AT_Z + 16 * at.tid,
                            make_uint4(piece == 4 ? 0x3f80 : 0, 0, 0, 0));
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int f = 64 * at.wg + at.row + 8 * i;
            const int nf = min(128, p.count - (at.wg >> 1) * 128) > 64 ? 2 : 1;
            const bool given = seg > 0 && f < p.count;
            /* States are made of 128 features at a time. */
            const float *from = p.states + (at.wg >> 1) * p.state_group +
                                (int64_t)(head_i * p.n_seg + seg) * pure_state_count(D, nf);
            const float bias =
                f < p.count ? SRF__LOG2E * p.bias[(int64_t)set * p.m + p.first + f] : -INFINITY;
            if (at.pair == 0)
                store_shared(base + AT_BIAS + 256 * at.wg + 4 * (at.row + 8 * i),
                             __float_as_uint(bias));
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float2 x = make_float2(0.0f, 0.0f);
                if (given) x = *(const float2 *)(from + (f & 127) * D + 8 * j + 2 * at.pair);
                s[4 * j + 2 * i] = x.x;
                s[4 * j + 2 * i + 1] = x.y;
            }
            s[32 + 2 * i] = given && at.pair == 0 ? from[64 * nf * D + (f & 127)] : 0.0f;
            s[33 + 2 * i] = 0.0f;
            top[i] = given ? from[64 * nf * (D + 2) + (f & 127)] : SRF__UNSET;
        }
    }
    cp_async_wait<0>();
    prepare(c, 0, min(CHUNK, p.t - c * CHUNK));
    __syncthreads();

    int lo = 0, size = CHUNK, turn = 1;
    while (c < c_end) {
        const int n = min(CHUNK, p.t - c * CHUNK), hi = min(lo + size, n), stage = c & 1;
        const uint32_t k_tile = base + stage * TILE;
        const uint32_t v_tile = k_tile + AT_V, q_tile = k_tile + AT_Q;
        float top_now[2], aq[32];
        {
            const struct wide_thread at = wide_here();
            float ak[32];
            uint32_t kf[8][2];
            warpgroup_fence();
            tiles_product<false, false>(ak, base + AT_W + at.wg * TILE, k_tile, false);
            warpgroup_commit();
            warpgroup_wait<0>();
            wide_hold(ak);
            key_exponents(ak, top_now, top, to_log2, base + AT_HALF + 4 * stage * CHUNK,
                          base + AT_BIAS + 256 * at.wg, at.row, at.pair);
            key_weights(kf, ak, top_now, base + AT_BIAS + 256 * at.wg, base + AT_TOP + 256 * at.wg,
                        at.row, at.pair);
            /* All have taken what was sent in the last turn, and left its tiles. */
            barrier_wait(taken, turn);
            turn ^= 1;
            put_tile(base + AT_KF + at.wg * TILE, kf, at.warp, at.lane);
            warpgroup_fence();
            tiles_product<false, false>(aq, q_tile, base + AT_W + at.wg * TILE, false);
            warpgroup_commit();
        }
        if (lo == 0 && size == CHUNK && c + 1 < c_end) load_chunk(c + 1);
        {
            const struct wide_thread at = wide_here();
            const float step[2] = {exp2_fast(top[0] - top_now[0]), exp2_fast(top[1] - top_now[1])};
            put_scaled(base + AT_S + at.wg * TILE, s, step[0], step[1], at.warp, at.lane);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float z = s[32 + 2 * i] * step[i];
                const float rest = z - __bfloat162float(__float2bfloat16_rn(z));
                if (at.pair == 0)
                    store_shared(base + AT_Z + tile_at<D>(at.row + 8 * i, at.wg),
                                 pack_bf16(z, rest));
            }
        }
        fence_products();
        warpgroup_barrier(wide_here().wg);

        /* Queries: qf, then num and den over this warpgroup's features. */
        float r[2] = {-3e38f, -3e38f};
        uint32_t qf[4][4], weight[4][4];
        warpgroup_wait<0>();
        wide_hold(aq);
        {
            const struct wide_thread at = wide_here();
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float2 shift =
                    load_shared_8(base + AT_TOP + 256 * at.wg + 4 * (8 * j + 2 * at.pair));
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    aq[4 * j + i] = fmaf(aq[4 * j + i], to_log2, i & 1 ? shift.y : shift.x);
                    r[i >> 1] = fmaxf(r[i >> 1], aq[4 * j + i]);
                }
            }
        }
        r[0] = quad_max(r[0]);
        r[1] = quad_max(r[1]);
#pragma unroll
        for (int i = 0; i < 32; i++) aq[i] = exp2_fast(aq[i] - r[i >> 1 & 1]);
        pack_wide(qf, aq);
        {
            const struct wide_thread at = wide_here();
            float w[32];
            warpgroup_fence();
            packed_product<true>(w, qf, base + AT_KF + at.wg * TILE, false);
            warpgroup_commit();
            warpgroup_wait<0>();
            wide_hold(w);
            pack_wide(weight, w);
            keep_earlier(weight, at.warp, at.lane);
        }
        float sums[4], own[8];
#pragma unroll
        for (int left = 0; left < D; left += 32) {
            const struct wide_thread at = wide_here();
            float num[16];
            const uint32_t s_word = tile_word(base + AT_S + at.wg * TILE + 2 * left);
            const uint32_t v_word = tile_word(v_tile + 2 * left);
            const uint32_t z_word = tile_word(base + AT_Z + 16 * at.wg);
            warpgroup_fence();
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
                wgmma_32(num, qf[kk], s_word + 128 * kk, kk > 0);
                if (left == 0) wgmma_8(sums, qf[kk], z_word + 128 * kk, kk > 0);
            }
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
                wgmma_32(num, weight[kk], v_word + 128 * kk, true);
                if (left == 0) wgmma_8(sums, weight[kk], tile_word(base + AT_Z + 64), true);
            }
            warpgroup_commit();
            warpgroup_wait<0>();
            wide_hold(num);
            if (left == 0) wide_hold(sums);
            send_columns(base + AT_SENT + 16 * (at.tid & 127) + at.wg * (NW - 1) * 4096, num, own,
                         left, at.wg);
        }
        float den[2];
        bool bad = false;
        {
            const struct wide_thread at = wide_here();
            den[0] = __shfl_sync(0xffffffffu, sums[0] + sums[1], at.lane & ~3);
            den[1] = __shfl_sync(0xffffffffu, sums[2] + sums[3], at.lane & ~3);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int token = at.row + 8 * i;
                if (at.pair == 0)
                    store_shared_8(base + AT_DEN + 8 * (64 * at.wg + token),
                                   make_float2(den[i], r[i]));
                if (token >= lo && token < hi && 64 * at.wg < p.count)
                    bad = bad || den[i] < SRF__MIN_DEN;
            }
        }
        cp_async_wait<0>();
        if (c + 1 < c_end) prepare(c + 1, 0, min(CHUNK, p.t - (c + 1) * CHUNK));
        if (__syncthreads_or(bad && size > 1)) {
            barrier_arrive(taken);
            size >>= 1;
            prepare(c, lo, min(lo + size, n));
            __syncthreads();
            continue;
        }

        const struct wide_thread at = wide_here();
        /* The keys go into the state, while num is merged. */
        if (__any_sync(0xffffffffu, top[0] != top_now[0] || top[1] != top_now[1])) {
            const float step[2] = {exp2_fast(top[0] - top_now[0]), exp2_fast(top[1] - top_now[1])};
#pragma unroll
            for (int i = 0; i < 36; i++) s[i] *= step[i >> 1 & 1];
        }
        top[0] = top_now[0];
        top[1] = top_now[1];
        warpgroup_fence();
        product_72(s, base + AT_KF + at.wg * TILE, v_tile, base + AT_Z + 64);
        warpgroup_commit();

        const int64_t token = load_i64(base + AT_PLACE + 16) + c * CHUNK + at.row;
        const bool in0 = at.row >= lo && at.row < hi, in1 = at.row + 8 >= lo && at.row + 8 < hi;
        float by[NW + 1][2]; /* of the warpgroup i on, and of the features before these */
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float2 part[NW + 1]; /* den, r */
            part[0] = make_float2(den[i], r[i]);
#pragma unroll
            for (int d = 1; d < NW; d++)
                part[d] = load_shared_8(base + AT_DEN +
                                        8 * (64 * ((at.wg + d) & (NW - 1)) + at.row + 8 * i));
            part[NW] = make_float2(0.0f, -INFINITY);
            if (p.first > 0 && (i ? in1 : in0)) part[NW] = ((const float2 *)p.den)[token + 8 * i];
#pragma unroll
            for (int d = 1; d <= NW; d++) r[i] = fmaxf(r[i], part[d].y);
            den[i] = 0;
#pragma unroll
            for (int d = 0; d <= NW; d++) {
                by[d][i] = exp2_fast(part[d].y - r[i]);
                den[i] = fmaf(by[d][i], part[d].x, den[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) own[i] *= by[0][i >> 1 & 1];
#pragma unroll
        for (int d = 1; d < NW; d++)
            merge_columns(own, base + AT_SENT + 16 * (at.tid & 127), (NW - 1) * 4096, at.wg, d,
                          by[d]);
        if (p.first > 0)
            merge_before(own, p.num + token * D + 16 * at.wg + 2 * at.pair, by[NW], in0, in1);
        if (p.first + p.count < p.m) {
            store_sums(p.num + token * D + 16 * at.wg + 2 * at.pair, own, in0, in1);
#pragma unroll
            for (int i = 0; i < 2; i++)
                if ((i ? in1 : in0) && at.wg == 0 && at.pair == 0)
                    ((float2 *)p.den)[token + 8 * i] = make_float2(den[i], r[i]);
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (p.stat && (i ? in1 : in0) && at.wg == 0 && at.pair == 0)
                    p.stat[token + 8 * i] = r[i] + log2f(den[i]);
            const float once[2] = {1.0f / den[0], 1.0f / den[1]};
#pragma unroll
            for (int i = 0; i < 8; i++) own[i] *= once[i >> 1 & 1];
            store_columns(p.o + load_i64(base + AT_PLACE + 8) +
                              (int64_t)(c * CHUNK + at.row) * p.ld_o + 16 * at.wg,
                          p.ld_o, own, in0, in1, at.pair);
        }
        warpgroup_wait<0>();
        wide_hold(s);
        __syncwarp();
        barrier_arrive(taken);
        lo += size;
        size = lo & -lo;
        if (lo >= n) {
            c++;
            lo = 0;
            size = CHUNK;
        } else {
            prepare(c, lo, min(lo + size, n));
            __syncthreads();
        }
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
    p.q = (const bf16 *)a->q;
    p.k = (const bf16 *)a->k;
    p.v = (const bf16 *)a->v;
    p.w = (const bf16 *)a->w;
    p.bias = (const float *)a->bias;
    p.o = (bf16 *)a->o;
    p.stat = (float *)a->stat;
    p.states = f.states;
    p.num = f.num;
    p.den = f.den;
    p.ld = a->ld;
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
                                  AT_BYTES));
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
        wide_fwd_kernel<<<(unsigned)(heads * p.n_seg), WIDE_THREADS, AT_BYTES, stream_of(ctx)>>>(p);
        SRF_TRY(srf__cuda_launched("srf_attn_fwd"));
    }
    return SRF_OK;
}
