/* Prefill of SRF attention on Hopper's tensor cores, bf16, d = 64: the pure form, and the launches
 * of both. Of the window hybrid (srf_attn_prefill_window.cu) what is said here of blocks,
 * segments and states is true as well.
 *
 * The forms are those of srf_attn_pure.cu: chunks of 64 tokens, S, z, M before them, everything in
 * log2 units, M_i an integer. A block of threads has a head of one sequence, or a segment of it,
 * and two warpgroups that work on different chunks:
 *     keys     a = W K^T, the maxima M, kf = 2^(a - M); gives kf, S (bf16), z, M to the other
 *              through shared memory, two buffers; S += kf V, sums in registers
 *     queries  a = Q W^T, r = max_i (a_i + M_i), qf = 2^(a + M - r); P = qf kf^T below the
 *              diagonal; o = (qf S + P V) / (qf z + sum P)
 * All products are wgmma: a warpgroup reads B once for 64 rows.
 *
 * The keys know before a chunk is given out whether some token of it might see next to nothing: a
 * feature's M after the chunk is more than SPREAD above both its M before and its exponent of the
 * chunk's first key. (Else z of the state or of that key is at least 2^-(SPREAD + 1) in every
 * feature, and so are all denominators.) Such a chunk is given out in pieces of half the size; a
 * token alone always sees itself. So what is in registers never has to go back.
 *
 * Sequences of several lengths: a block finds its rows in `offsets`, and where there are none it
 * ends. Few heads: segments, their keys' own sums by a first launch, the states before each by a
 * second.
 *
 * More than 64 features: launches for 64 at a time, which keep (num, den, r) of each token in the
 * workspace.
 *
 * Floor: q, k, v read and o written once, 8 bytes a value: 192 heads x 1024 tokens 101 MB, 0.034 ms
 * on an H100 (3 TB/s).
 */
#include "kernels/cuda/srf_attn_prefill_parts.h"

#define V_TILES 3 /* the keys are at most one chunk ahead, and load the next */

/* Shared memory, from a multiple of 1024. */
enum {
    AT_W = 0,
    AT_K = AT_W + TILE,           /* 2 */
    AT_V = AT_K + 2 * TILE,       /* V_TILES */
    AT_Q = AT_V + V_TILES * TILE, /* 2 */
    AT_KF = AT_Q + 2 * TILE,      /* 2 */
    AT_S = AT_KF + 2 * TILE,      /* 2 */
    AT_SMALL = AT_S + 2 * TILE
};

#if HAVE_WGMMA
/* The first warpgroup. */
template <bool totals>
static __device__ __forceinline__ void keys_role(const struct prefill &p, const struct work &w,
                                                 uint32_t base, struct prefill_small *sm)
{
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, pair = lane & 3;
    const int f0 = 16 * warp + (lane >> 2);
    const float to_log2 = SRF__LOG2E * p.scale;
    const int64_t in = w.first * p.ld + w.head * D;
    auto load_chunk = [&](int c) {
        const int64_t at = in + (int64_t)c * CHUNK * p.ld;
        const int n = min(CHUNK, w.stop - c * CHUNK);
        load_tile<D, GROUP>(base + AT_K + (c & 1) * TILE, p.k + at, p.ld, CHUNK, n, tid);
        load_tile<D, GROUP>(base + AT_V + c % V_TILES * TILE, p.v + at, p.ld, CHUNK, n, tid);
        cp_async_commit();
    };
    load_chunk(w.begin);
    struct pure_state<D> st;
    if (totals)
        pure_state_start(&st, false, 1, NULL, f0, pair);
    else
        read_state(&st, p, w, f0, pair);
    const float bias[2] = {sm->bias[f0], sm->bias[f0 + 8]};

    int item = 0;
    for (int c = w.begin; c < w.end; c++) {
        const int n = min(CHUNK, w.stop - c * CHUNK);
        const uint32_t k_tile = base + AT_K + (c & 1) * TILE;
        const uint32_t v_tile = base + AT_V + c % V_TILES * TILE;
        float *half = sm->half[c & 3];
        cp_async_wait<0>();
        own_norms(k_tile, half, p, n, tid);
        async_fence();
        group_barrier<1>();
        if (!totals) wait_empty(sm, item);
        if (c + 1 < w.end) load_chunk(c + 1);
        for (int lo = 0, size = CHUNK; lo < n;) {
            struct pure_keys keys;
            float a[32];
            key_exponents(a, base + AT_W, k_tile, half, bias, to_log2, lo, lo + size);
            const bool fits = key_tops(&keys, &st, a, lo, pair);
            if (!totals && group_any<1>(!fits) && size > 1) {
                size >>= 1;
                continue;
            }
            key_weights(&keys, &st, a);
            if (!totals) {
                const int buffer = item & 1;
                const float top[2] = {bias[0] + keys.top[0], bias[1] + keys.top[1]};
                const uint32_t kf = base + AT_KF + buffer * TILE + tile_at<CHUNK>(f0, 0) + 4 * pair;
                wait_empty(sm, item);
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        store_shared(tile_on<CHUNK>(kf, j) + i * 16 * CHUNK, keys.kf[j][i]);
                publish_state(&st, keys.step, top, base + AT_S + buffer * TILE, sm, buffer, f0,
                              pair);
                if (tid == 0) sm->piece[buffer] = lo + 256 * min(lo + size, n);
                async_fence();
                arrive(sm->full, item++);
            }
            state_add(&st, &keys, v_tile);
            lo += size;
            size = lo < CHUNK ? lo & -lo : size;
        }
    }
    if (totals)
        pure_state_end(&st, 1, segment_state(p, w), f0, pair);
    else if (w.last)
        write_state(&st, p, w, f0, pair);
}

/* qf of this warp's 16 tokens, r_t taken out. */
static __device__ __forceinline__ void query_weights(uint32_t qf[4][4], float r[2], float a[32],
                                                     const float *top, float to_log2, int pair)
{
    r[0] = r[1] = -INFINITY;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float2 shift = *(const float2 *)(top + 8 * j + 2 * pair);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            a[4 * j + e] = fmaf(a[4 * j + e], to_log2, e & 1 ? shift.y : shift.x);
            r[e >> 1] = fmaxf(r[e >> 1], a[4 * j + e]);
        }
    }
    r[0] = quad_max(r[0]);
    r[1] = quad_max(r[1]);
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            qf[j >> 1][(j & 1) * 2 + i] = pack_bf16(exp2_fast(a[4 * j + 2 * i] - r[i]),
                                                    exp2_fast(a[4 * j + 2 * i + 1] - r[i]));
}

/* The second warpgroup. */
static __device__ __forceinline__ void queries_role(const struct prefill &p, const struct work &w,
                                                    uint32_t base, struct prefill_small *sm)
{
    const int tid = threadIdx.x - GROUP, lane = tid & 31, warp = tid >> 5, pair = lane & 3;
    const int row = 16 * warp + (lane >> 2);
    const float to_log2 = SRF__LOG2E * p.scale;
    const bf16 *q = p.q + w.first * p.ld + w.head * D;
    auto load_chunk = [&](int c) {
        load_tile<D, GROUP>(base + AT_Q + (c & 1) * TILE, q + (int64_t)c * CHUNK * p.ld, p.ld,
                            CHUNK, min(CHUNK, w.stop - c * CHUNK), tid);
        cp_async_commit();
    };
    load_chunk(w.begin);
    int item = 0;
    for (int c = w.begin; c < w.end; c++) {
        const int n = min(CHUNK, w.stop - c * CHUNK);
        const uint32_t q_tile = base + AT_Q + (c & 1) * TILE;
        const uint32_t v_tile = base + AT_V + c % V_TILES * TILE;
        cp_async_wait<0>();
        group_barrier<2>();
        if (c + 1 < w.end) load_chunk(c + 1);
        for (int hi = 0; hi < n; item++) {
            const int buffer = item & 1;
            float a[32], num[D / 8][4], den[4] = {0, 0, 0, 0}, r[2];
            uint32_t x[4][4], qf[4][4], weight[4][4];
            query_rows(x, q_tile, p.limit, warp, lane);
            products(a, x, base + AT_W);
            wait_full(sm, item);
            const int lo = sm->piece[buffer] & 255;
            hi = sm->piece[buffer] >> 8;
            query_weights(qf, r, a, sm->top[buffer], to_log2, pair);
            warpgroup_fence();
            wgmma_mix(a, qf, base + AT_KF + buffer * TILE, false);
            warpgroup_commit();
            wgmma_mix(&num[0][0], qf, base + AT_S + buffer * TILE, false);
            warpgroup_commit();
            add_z(den, qf, sm->z[buffer], lane);
            warpgroup_wait<1>();
            wgmma_hold(a);
#pragma unroll
            for (int j = 0; j < 8; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (8 * j + 2 * pair + (e & 1) > row + 8 * (e >> 1)) a[4 * j + e] = 0.0f;
                weight[j >> 1][(j & 1) * 2] = pack_bf16(a[4 * j], a[4 * j + 1]);
                weight[j >> 1][(j & 1) * 2 + 1] = pack_bf16(a[4 * j + 2], a[4 * j + 3]);
            }
            warpgroup_wait<0>();
            wgmma_hold(&num[0][0]);
            warpgroup_fence();
            wgmma_mix(&num[0][0], weight, v_tile, true);
            warpgroup_commit();
            add_ones(den, weight, lane);
            warpgroup_wait<0>();
            wgmma_hold(&num[0][0]);
            arrive(sm->empty, item);
            give_rows(p, w, c, num, den, r, q_tile, warp, lo, hi, lane);
        }
    }
}
#endif

enum { SMEM = AT_SMALL + 4096 }; /* and what a base that is no multiple of 1024 wants */

/* totals: the sums of each segment's own keys, by the first warpgroup alone. */
template <bool totals>
static __global__ BOUNDS(totals ? GROUP : 2 * GROUP,
                         2) void prefill_kernel(const __grid_constant__ struct prefill p)
{
#if HAVE_WGMMA
    static_assert(sizeof(struct prefill_small) + 1024 <= SMEM - AT_SMALL, "room behind the tiles");
    extern __shared__ char raw[];
    char *smem = raw + (-smem_addr(raw) & 1023u);
    struct prefill_small *sm = (struct prefill_small *)(smem + AT_SMALL);
    const int n_segs = totals ? p.n_seg - 1 : p.n_seg;
    const struct work w = work_of(p, blockIdx.x / n_segs, blockIdx.x % n_segs);
    if (w.begin >= w.end) return;
    start_block<totals ? GROUP : 2 * GROUP>(p, w, sm, smem_addr(smem) + AT_W);
    if (totals || threadIdx.x < GROUP)
        keys_role<totals>(p, w, smem_addr(smem), sm);
    else
        queries_role(p, w, smem_addr(smem), sm);
#endif
}

/* The states before each segment: the caller's, and the segments before. One thread a feature and
 * column of S or z. */
static __global__ void prefix_kernel(const __grid_constant__ struct prefill p, int64_t n)
{
    constexpr int per_head = 64 * (D + 1), count = 64 * (D + 3), at_once = 8;
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int j = (int)(i % per_head), f = j < 64 * D ? j / D : j - 64 * D;
    const struct work w = work_of(p, i / per_head, 0);
    float *sums = segment_state(p, w), sum = 0, top = SRF__UNSET;
    const float *z = state_z(p, w.slot, p.first + (f < p.count ? f : 0));
    if (f < p.count && *z != 0.0f) {
        const char *s = state_row(p, w.slot, p.first + f);
        top = z[p.m];
        sum = j >= 64 * D    ? *z
              : p.state_bf16 ? to_float(((const bf16 *)s)[j % D])
                             : ((const float *)s)[j % D];
    }
    for (int from = 0; from < w.n_segs; from += at_once) {
        /* Loads first. */
        float add[at_once], add_top[at_once];
#pragma unroll
        for (int k = 0; k < at_once; k++) {
            const bool there = from + k < w.n_segs - 1;
            const float *st = sums + (there ? from + k : 0) * count;
            add[k] = there ? st[j] : 0.0f;
            add_top[k] = there ? st[64 * (D + 1) + f] : SRF__UNSET;
        }
#pragma unroll
        for (int k = 0; k < at_once; k++) {
            if (from + k >= w.n_segs) break;
            float *st = sums + (from + k) * count, with = fmaxf(top, add_top[k]);
            st[j] = sum;
            if (j >= 64 * D) st[64 * (D + 2) + f] = top;
            sum = sum * exp2_fast(top - with) + add[k] * exp2_fast(add_top[k] - with);
            top = with;
        }
    }
}

/* ---- launches -------------------------------------------------------------------------------- */

static bool compiled(void)
{
    struct cudaFuncAttributes f;
    return cudaFuncGetAttributes(&f, (const void *)prefill_kernel<false>) == cudaSuccess &&
           f.maxThreadsPerBlock == 2 * GROUP;
}

bool srf__prefill_takes(const struct srf_ctx *ctx, const struct srf_srf_attn_prefill_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    uintptr_t pointers = (uintptr_t)a->q | (uintptr_t)a->k | (uintptr_t)a->v | (uintptr_t)a->w |
                         (uintptr_t)a->o | (uintptr_t)a->state;
    bool shape = s->d == D && s->m >= 2 && s->m <= 512 && s->m % 2 == 0 &&
                 (s->window == 0 || s->window == CHUNK);
    bool small = s->b * s->t <= 1 << 30 && s->b * s->h <= 1 << 20;
    return ctx->dtype == SRF_BF16 && shape && small && a->ld % 8 == 0 && a->ld_o % 8 == 0 &&
           pointers % 16 == 0 && cuda_of(ctx)->cc == 90 && compiled();
}

/* Segments only where heads leave half the card idle, and of some length. */
static struct prefill plan(const struct srf_ctx *ctx, const struct srf_attn_shape *s)
{
    struct prefill p = {};
    int64_t heads = s->b * s->h, chunks = div_up(s->t + (s->window ? CHUNK - 1 : 0), CHUNK);
    int64_t n_seg = heads > 0 ? 2 * cuda_of(ctx)->n_sm / heads : 1;
    n_seg = n_seg > chunks / 4 ? chunks / 4 : n_seg;
    n_seg = n_seg < 2 ? 1 : n_seg;
    p.seg_chunks = (int)(chunks > 0 ? div_up(chunks, n_seg) : 1);
    p.n_seg = (int)div_up(chunks, p.seg_chunks);
    p.t = (int)s->t;
    p.h = (int)s->h;
    p.m = (int)s->m;
    p.n_sets = (int)s->n_sets;
    p.window = (int)s->window;
    p.scale = (float)pow((double)D, -0.25);
    uint32_t limit = __bfloat16_as_ushort(__float2bfloat16_rn(SRF__X_LIMIT / p.scale));
    p.limit = limit << 16 | limit;
    return p;
}

/* Sets pointers into the workspace at base; NULL only counts. Returns its bytes. */
static size_t carve(const struct srf_srf_attn_prefill_args *a, void *base, struct prefill *p)
{
    struct cuda_bump bump = {(char *)base, 0};
    int64_t heads = a->s.b * a->s.h, rows = (a->offsets ? a->rows : a->s.b * a->s.t) * a->s.h;
    if (p->n_seg > 1)
        p->sums = (float *)bump_bytes(&bump, (size_t)(heads * p->n_seg * pure_state_count(D, 1)) *
                                                 sizeof(float));
    if (p->m > 64) {
        p->num = (float2 *)bump_bytes(&bump, (size_t)(rows * D / 2) * sizeof(float2));
        p->den = (float2 *)bump_bytes(&bump, (size_t)rows * sizeof(float2));
    }
    return bump.used;
}

size_t srf__prefill_workspace(const struct srf_ctx *ctx, const struct srf_srf_attn_prefill_args *a)
{
    struct prefill p = plan(ctx, &a->s);
    return carve(a, NULL, &p);
}

template <bool totals>
static srf_status launch(struct srf_ctx *ctx, const struct prefill *p, int64_t blocks)
{
    CUDA_TRY(cudaFuncSetAttribute(prefill_kernel<totals>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM));
    prefill_kernel<totals>
        <<<(unsigned)blocks, totals ? GROUP : 2 * GROUP, SMEM, stream_of(ctx)>>>(*p);
    return srf__cuda_launched("srf_attn_prefill");
}

srf_status srf__prefill(struct srf_ctx *ctx, const struct srf_srf_attn_prefill_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    struct prefill p = plan(ctx, s);
    int64_t heads = s->b * s->h, n = heads * 64 * (D + 1);
    p.q = (const bf16 *)a->q;
    p.k = (const bf16 *)a->k;
    p.v = (const bf16 *)a->v;
    p.w = (const bf16 *)a->w;
    p.bias = (const float *)a->bias;
    p.o = (bf16 *)a->o;
    p.ld = a->ld;
    p.ld_o = a->ld_o;
    p.state = (char *)a->state;
    p.state_bf16 = a->state_bf16;
    p.state_bytes = a->state_bf16
                        ? srf_attn_state_bf16_bytes(s->m, D, s->window)
                        : srf_attn_state_count(s->m, D, s->window) * (int64_t)sizeof(float);
    p.pos = (const int32_t *)a->pos;
    p.offsets = (const int32_t *)a->offsets;
    p.slots = (const int32_t *)a->slots;
    carve(a, ctx->workspace, &p);
    for (p.first = 0; p.first < p.m; p.first += p.count) {
        p.count = p.m - p.first < 64 ? p.m - p.first : 64;
        if (p.n_seg > 1) {
            if (s->window)
                SRF_TRY(srf__prefill_window_totals(ctx, &p, heads));
            else
                SRF_TRY((launch<true>(ctx, &p, heads * (p.n_seg - 1))));
            prefix_kernel<<<(unsigned)div_up(n, 128), 128, 0, stream_of(ctx)>>>(p, n);
        }
        SRF_TRY(s->window ? srf__prefill_window(ctx, &p, heads)
                          : launch<false>(ctx, &p, heads * p.n_seg));
    }
    return SRF_OK;
}
