/* SRF attention token by token, forward and prefill: see srf_attn_scan.h for the form.
 *
 * Pure, causal: tiles in which keys go in and queries read. Not causal: all keys, then all queries.
 * Hybrid: tiles inside a block of `window` tokens; their queries see the block before and their own
 * exactly, older ones through the state, which takes block j - 1 when block j is complete.
 * One block of threads a sequence and head.
 *
 * Floor: each token and head costs 6 m d flops on the state and 4 m d on the exponents in fp32
 * without tensor cores, and the state of a head (fp32) comes from L2 and goes back once a tile.
 */
#include "kernels/cuda/srf_attn_scan.h"

#define FWD_PARTS 2 /* x and y */

struct scan_fwd_params {
    struct srf_attn_shape s;
    float scale;
    const void *q, *k, *v;
    int64_t ld, ld_o;
    const float *w_t, *bias;
    void *o;
    float *stat;
    float *state;         /* of the first head, or NULL: a fresh one in scratch */
    int64_t state_stride; /* from head to head */
    /* With a state, (b): tokens seen before; the first row, or NULL: s.t each; the number of the
     * state, or NULL: that of the sequence. */
    const int32_t *pos, *offsets, *slots;
    float *scratch;
    int64_t scratch_stride;
};

/* What a block keeps in the workspace, in floats: exponents, window scores, its own state. */
static int64_t scratch_floats(const struct srf_attn_shape *s, bool own_state)
{
    int64_t n = 2 * SCAN_TILE * s->m + SCAN_TILE * 2 * s->window;
    if (own_state) n += s->m * (s->d + 2);
    return div_up(n, 32) * 32;
}

template <typename T> struct fwd_head {
    scan_rows<T> q, k, v;
    T *o;
    int64_t ld_o;
    float *stat;
    float *s, *z, *top;
    float *p; /* (2 window, TT) */
};

/* The n queries at position pos read the state; in the pure causal form their keys go in
 * first. */
template <typename T, enum scan_form form>
__device__ void fwd_tile(const struct scan &h, const fwd_head<T> &f, int64_t window, float shift,
                         int64_t pos, int n)
{
    constexpr int TT = SCAN_TILE;
    constexpr bool keys = form == FORM_PURE, hybrid = form == FORM_HYBRID;
    float vt[TT][SCAN_COLUMNS], acc[TT][SCAN_COLUMNS] = {{0}};
    int64_t lo = hybrid ? window_first(pos, window) : pos, n_keys = pos + n - lo;
    __syncthreads();
    bool far = !hybrid || f.z[0] != 0.0f;
    load_x<T, TT>(h, 0, f.q, pos, 1, n);
    if (keys) load_x<T, TT>(h, 1, f.k, pos, 1, n);
    if (threadIdx.x < TT) {
        h.r[threadIdx.x] = SCAN_UNSET;
        h.den[threadIdx.x] = 0.0f;
    }
    if (far) exponents<TT>(h, 0, keys ? 2 : 1, hybrid, shift);
    if (hybrid) window_scores<T, TT>(h, f.k, lo, pos, n, f.p);
    if (far) tile_stabilisers<TT, keys>(h, f.z, f.top, n);
    if (hybrid) {
        window_weights<TT>(h, n_keys, f.p);
        window_sum<T, TT, false>(h, f.v, lo, n_keys, f.p, acc);
    }
    if (keys) own_columns<T, TT>(h, f.v, pos, 1, n, vt);
    for (int i0 = 0; far && i0 < h.m; i0 += SCAN_FEATURES) {
        int n_features = min(SCAN_FEATURES, h.m - i0);
        tile_coefficients<TT, keys, true, true, true>(h, f.z, f.top, n, i0, n_features);
        walk_columns<TT, keys, true>(h, f.s, i0, n_features, vt, acc);
        __syncthreads();
    }
    share_columns<TT>(h, acc);
    int64_t row = pos - f.q.first;
    for (int i = threadIdx.x; i < n * h.d; i += blockDim.x) {
        int t = i / h.d, j = i - t * h.d;
        f.o[(row + t) * f.ld_o + j] = from_float<T>(column_sum<TT>(h, t, j) / h.den[t]);
    }
    if (f.stat && threadIdx.x < n)
        f.stat[row + threadIdx.x] = h.r[threadIdx.x] + log2f(h.den[threadIdx.x]);
}

template <typename T, enum scan_form form>
__global__ void __launch_bounds__(SCAN_THREADS) scan_fwd_kernel(const struct scan_fwd_params a)
{
    extern __shared__ float4 smem[];
    constexpr int TT = SCAN_TILE;
    const struct srf_attn_shape &sh = a.s;
    int64_t block = blockIdx.x, seq = block / sh.h, head = block - seq * sh.h, window = sh.window;
    struct scan h = scan_begin(sh, a.scale, a.w_t, a.bias, (int)head, (float *)smem, FWD_PARTS,
                               SCAN_FEATURES, 0);
    int64_t first = a.offsets ? a.offsets[seq] : seq * sh.t;
    int64_t rows = a.offsets ? a.offsets[seq + 1] - first : sh.t;
    int64_t in = first * a.ld + head * sh.d, count = sh.m * (sh.d + 2);
    int64_t pos = a.state ? a.pos[seq] : 0, slot = a.slots ? a.slots[seq] : seq;
    float *scratch = a.scratch + block * a.scratch_stride;
    h.a = scratch;
    fwd_head<T> f;
    f.p = scratch + 2 * TT * sh.m;
    f.s = a.state ? a.state + (slot * sh.h + head) * a.state_stride : f.p + TT * 2 * window;
    f.z = f.s + sh.m * sh.d;
    f.top = f.z + sh.m;
    float *ring = f.s + count;
    f.q = {(const T *)a.q + in, a.ld, pos, ring, 2 * window, h.d};
    f.k = f.q, f.k.t = (const T *)a.k + in;
    f.v = f.q, f.v.t = (const T *)a.v + in, f.v.ring = ring + 2 * window * sh.d;
    f.o = (T *)a.o + first * a.ld_o + head * sh.d;
    f.ld_o = a.ld_o;
    f.stat = a.stat ? a.stat + block * sh.t : nullptr;
    if (!a.state)
        for (int64_t i = threadIdx.x; i < count; i += blockDim.x) f.s[i] = 0.0f;

    int64_t end = pos + rows;
    if (form == FORM_NONCAUSAL)
        for (int64_t p = pos; p < end; p += TT)
            absorb_keys<T, TT>(h, f.s, f.z, f.top, f.k, f.v, p, tile_rows(p, end));
    if (form != FORM_HYBRID) {
        for (int64_t p = pos; p < end; p += TT)
            fwd_tile<T, form>(h, f, 0, 0.0f, p, tile_rows(p, end));
        return;
    }
    float log2_m = log2f((float)h.m);
    for (int64_t j = pos / window; j * window < end; j++) {
        int64_t from = j * window, to = min(from + window, end);
        for (int64_t p = max(from, pos); p < to; p += TT)
            fwd_tile<T, form>(h, f, window, log2_m, p, tile_rows(p, to));
        if (to < from + window || j == 0) continue;
        for (int64_t p = from - window; p < from; p += TT)
            absorb_keys<T, TT>(h, f.s, f.z, f.top, f.k, f.v, p, tile_rows(p, from));
    }
    if (!a.state) return;
    __syncthreads();
    /* The last tokens' raw k, v into the ring. */
    int64_t old = max(pos, end - 2 * window);
    for (int64_t i = threadIdx.x; i < (end - old) * sh.d; i += blockDim.x) {
        int64_t p = old + i / sh.d, j = i % sh.d, to = p % (2 * window) * sh.d + j;
        ring[to] = to_float(f.k.t[(p - pos) * a.ld + j]);
        ring[2 * window * sh.d + to] = to_float(f.v.t[(p - pos) * a.ld + j]);
    }
}

template <typename T>
__global__ void transpose_kernel(const T *__restrict__ w, float *__restrict__ w_t, int64_t m,
                                 int64_t d, int64_t n)
{
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x) {
        int64_t set = i / (m * d), j = i / m % d, f = i % m;
        w_t[i] = to_float(w[(set * m + f) * d + j]);
    }
}

srf_status srf__scan_transpose(struct srf_ctx *ctx, const struct srf_attn_shape *s, const void *w,
                               float *w_t)
{
    int64_t n = s->n_sets * s->m * s->d;
    unsigned grid = grid_for(ctx, n, 256, 8);
    if (ctx->dtype == SRF_BF16)
        transpose_kernel<bf16>
            <<<grid, 256, 0, stream_of(ctx)>>>((const bf16 *)w, w_t, s->m, s->d, n);
    else
        transpose_kernel<float>
            <<<grid, 256, 0, stream_of(ctx)>>>((const float *)w, w_t, s->m, s->d, n);
    return srf__cuda_launched("srf_attn: transpose of w");
}

srf_status srf__scan_check(const struct srf_ctx *ctx, const struct srf_attn_shape *s,
                           size_t smem_bytes)
{
    size_t most = cuda_of(ctx)->smem_max;
    SRF_FAIL_IF(s->d > SCAN_MAX_D || smem_bytes > most, SRF_UNSUPPORTED,
                "srf attention on CUDA with heads of %lld: at most %d, and %zu bytes of shared "
                "memory, of which this card has %zu",
                (long long)s->d, SCAN_MAX_D, smem_bytes, most);
    SRF_FAIL_IF(s->m > INT32_MAX / (2 * SCAN_TILE) || s->b * s->h > INT32_MAX, SRF_UNSUPPORTED,
                "srf attention on CUDA with %lld features and %lld heads in all: too many",
                (long long)s->m, (long long)(s->b * s->h));
    return SRF_OK;
}

static float *carve_w_t(struct cuda_bump *b, const struct srf_attn_shape *s)
{
    return (float *)bump_bytes(b, (size_t)(s->n_sets * s->m * s->d) * sizeof(float));
}
static float *carve_scratch(struct cuda_bump *b, const struct srf_attn_shape *s, bool own_state)
{
    return (float *)bump_bytes(b, (size_t)(s->b * s->h * scratch_floats(s, own_state)) *
                                      sizeof(float));
}

size_t srf__scan_fwd_workspace(const struct srf_ctx *ctx, const struct srf_attn_shape *s,
                               bool own_state)
{
    (void)ctx;
    struct cuda_bump b = {NULL, 0};
    carve_w_t(&b, s);
    carve_scratch(&b, s, own_state);
    return b.used;
}

template <typename T>
static void (*kernel_of(const struct srf_attn_shape *s))(const struct scan_fwd_params)
{
    if (s->window) return scan_fwd_kernel<T, FORM_HYBRID>;
    return s->causal ? scan_fwd_kernel<T, FORM_PURE> : scan_fwd_kernel<T, FORM_NONCAUSAL>;
}

static srf_status launch(struct srf_ctx *ctx, const void *w, struct scan_fwd_params *p,
                         const char *op)
{
    const struct srf_attn_shape *s = &p->s;
    size_t bytes = scan_smem_bytes(s->d, FWD_PARTS, SCAN_FEATURES, 0);
    SRF_TRY(srf__scan_check(ctx, s, bytes));
    if (s->b * s->t == 0) return SRF_OK;
    struct cuda_bump b = {(char *)ctx->workspace, 0};
    float *w_t = carve_w_t(&b, s);
    SRF_TRY(srf__scan_transpose(ctx, s, w, w_t));
    p->w_t = w_t;
    p->scale = (float)pow((double)s->d, -0.25);
    p->scratch = carve_scratch(&b, s, !p->state);
    p->scratch_stride = scratch_floats(s, !p->state);
    p->state_stride = srf_attn_state_count(s->m, s->d, s->window);
    auto kernel = ctx->dtype == SRF_BF16 ? kernel_of<bf16>(s) : kernel_of<float>(s);
    CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    kernel<<<(unsigned)(s->b * s->h), SCAN_THREADS, bytes, stream_of(ctx)>>>(*p);
    return srf__cuda_launched(op);
}

srf_status srf__scan_fwd(struct srf_ctx *ctx, const struct srf_srf_attn_fwd_args *a)
{
    struct scan_fwd_params p = {};
    p.s = a->s;
    p.q = a->q, p.k = a->k, p.v = a->v, p.o = a->o;
    p.ld = a->ld, p.ld_o = a->ld_o;
    p.bias = (const float *)a->bias;
    p.stat = (float *)a->stat;
    return launch(ctx, a->w, &p, "srf_attn_fwd");
}

srf_status srf__scan_prefill(struct srf_ctx *ctx, const struct srf_srf_attn_prefill_args *a)
{
    struct scan_fwd_params p = {};
    p.s = a->s;
    p.q = a->q, p.k = a->k, p.v = a->v, p.o = a->o;
    p.ld = a->ld, p.ld_o = a->ld_o;
    p.bias = (const float *)a->bias;
    p.state = (float *)a->state;
    p.pos = (const int32_t *)a->pos;
    p.offsets = (const int32_t *)a->offsets;
    p.slots = (const int32_t *)a->slots;
    return launch(ctx, a->w, &p, "srf_attn_prefill");
}
