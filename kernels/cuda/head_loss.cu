/* The output head and its loss without logits.
 *
 * With l = x w^T, t = l[target], E = exp(l - t), Z = sum E,
 *     nll = log Z,  d = scale ce_weight / Z (E - Z onehot)
 * A kernel makes t, a dot product a row. The product (product.h) leaves E where logits
 * would be, and row sums of its tiles; another kernel adds these up in order, for Z, and puts E - Z
 * where the target is. What is then missing of d is a factor of the row: x is multiplied with it
 * before dw += d^T x, dx = d w after. So logits are neither written nor read, and no pass over them
 * makes E.
 *
 * E overflows where another word's logit is far above the target's: rows whose Z is beyond FAR_SUM
 * are made once more, shifted by their maximum, slowly. NaN stays NaN.
 * Elsewhere (fp32, other cards, rows that are not in 16-byte pieces) the ops that it stands for do
 * it one after the other.
 * Floor: tensor cores; 6 n c ld flops. */
#include "kernels/cuda/product.h"
#include "kernels/cuda/tile.h"
#include "kernels/head_loss.h"

#define THREADS   256
#define WARPS     (THREADS / 32)
#define NORM_ROWS 8     /* of a block of norm_kernel */
#define FAR_SUM   1e20f /* beyond it the row's factor would run out of exponents */

/* ---- rows ------------------------------------------------------------------------------------ */

/* By a warp; every lane gets it. c is a multiple of 8. */
static __device__ __forceinline__ float dot(const bf16 *a, const bf16 *b, int c)
{
    float sum = 0.0f;
    for (int j = (threadIdx.x & 31) * 8; j < c; j += 256) {
        pack<bf16, 8> p = load_pack<bf16, 8>(a + j), q = load_pack<bf16, 8>(b + j);
#pragma unroll
        for (int k = 0; k < 8; k++) sum = fmaf(element(p, k), element(q, k), sum);
    }
    return warp_sum(sum);
}

/* to = from times a factor; by a warp. from may be to. A factor of 0 leaves 0 even of NaN. */
static __device__ __forceinline__ void scale_row(bf16 *to, const bf16 *from, int c, float factor)
{
    for (int j = (threadIdx.x & 31) * 8; j < c; j += 256) {
        pack<bf16, 8> p = load_pack<bf16, 8>(from + j);
        float out[8];
#pragma unroll
        for (int k = 0; k < 8; k++) out[k] = factor == 0 ? 0.0f : element(p, k) * factor;
        round_to(&p, out);
        store_pack<bf16, 8>(to + j, p);
    }
}

/* shift = the target's logit, in log2 units; +inf, for an E of 0, where there is no target. */
static __global__ __launch_bounds__(THREADS) void target_kernel(int64_t n, int c,
                                                                const bf16 *__restrict__ x,
                                                                const bf16 *__restrict__ w,
                                                                const int32_t *__restrict__ targets,
                                                                float *__restrict__ shift)
{
    int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= n) return;
    int target = targets[row];
    float t = target < 0 ? INFINITY : dot(x + row * c, w + (int64_t)target * c, c) * LOG2E;
    if ((threadIdx.x & 31) == 0) shift[row] = t;
}

struct norm_args {
    int64_t n, ld, n_parts;
    int c, v;
    float scale;
    const float *parts; /* (n_parts, n) */
    const bf16 *x, *w;
    const int32_t *targets;
    float *nll, *factor; /* factor: d / E */
    bf16 *e, *scaled;    /* scaled = x factor */
};

/* A row shifted by its maximum instead, by the block: E, nll. Returns Z. */
static __device__ float far_row(const struct norm_args *a, int64_t row, int target)
{
    __shared__ float scratch[33];
    const bf16 *x = a->x + row * a->c;
    bf16 *e = a->e + row * a->ld;
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    float max = -INFINITY, sum = 0.0f;
    for (int j = warp; j < a->v; j += WARPS)
        max = fmaxf(max, dot(x, a->w + (int64_t)j * a->c, a->c)); /* NaN shows below */
    if (lane == 0) scratch[warp] = max;
    __syncthreads();
    for (int k = 0; k < WARPS; k++) max = fmaxf(max, scratch[k]);
    __syncthreads();
    for (int j = warp; j < a->v; j += WARPS) {
        float p = exp2_fast((dot(x, a->w + (int64_t)j * a->c, a->c) - max) * LOG2E);
        sum += p;
        if (lane == 0) e[j] = from_float<bf16>(p);
    }
    float z = block_sum(lane == 0 ? sum : 0.0f, scratch);
    float below = max - dot(x, a->w + (int64_t)target * a->c, a->c);
    if (threadIdx.x == 0) {
        e[target] = from_float<bf16>(exp2_fast(-below * LOG2E) - z);
        a->nll[row] = logf(z) + below;
    }
    return z;
}

static __global__
__launch_bounds__(THREADS) void norm_kernel(const __grid_constant__ struct norm_args a)
{
    constexpr int GROUPS = THREADS / NORM_ROWS;
    __shared__ float sums[GROUPS][NORM_ROWS], z_of[NORM_ROWS];
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    int own = threadIdx.x % NORM_ROWS, group = threadIdx.x / NORM_ROWS;
    int64_t first = (int64_t)blockIdx.x * NORM_ROWS, row = first + own;
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t k = group; k < a.n_parts && row < a.n; k += GROUPS) sum += a.parts[k * a.n + row];
    sums[group][own] = sum;
    __syncthreads();
    if (group == 0 && row < a.n) {
        int target = a.targets[row];
        float z = 0.0f;
        for (int k = 0; k < GROUPS; k++) z += sums[k][own];
        z_of[own] = z;
        if (target < 0) {
            a.nll[row] = 0.0f;
        } else if (!(z > FAR_SUM)) {
            a.nll[row] = logf(z);
            a.e[row * a.ld + target] = from_float<bf16>(1.0f - z);
        }
    }
    __syncthreads();
    for (int r = 0; r < NORM_ROWS && first + r < a.n; r++) {
        int target = a.targets[first + r];
        float z = z_of[r];
        if (target >= 0 && z > FAR_SUM) {
            z = far_row(&a, first + r, target);
            __syncthreads();
            if (threadIdx.x == 0) z_of[r] = z;
        } else if (target < 0 && z != 0) { /* NaN, which does not count either */
            bf16 *e = a.e + (first + r) * a.ld;
            for (int64_t j = threadIdx.x; j < a.ld; j += THREADS) e[j] = from_float<bf16>(0.0f);
        }
    }
    __syncthreads();
    for (int r = warp; r < NORM_ROWS && first + r < a.n; r += WARPS) {
        int64_t at = first + r;
        float factor = a.targets[at] < 0 ? 0.0f : a.scale / z_of[r];
        if (lane == 0) a.factor[at] = factor;
        scale_row(a.scaled + at * a.c, a.x + at * a.c, a.c, factor);
    }
}

static __global__ __launch_bounds__(THREADS) void scale_kernel(int64_t n, int c,
                                                               const float *__restrict__ factor,
                                                               bf16 *__restrict__ dx)
{
    int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row < n) scale_row(dx + row * c, dx + row * c, c, factor[row]);
}

/* ---- the op ---------------------------------------------------------------------------------- */

/* What the workspace holds behind what linear_bwd wants. */
struct places {
    float *shift, *factor, *parts;
    bf16 *scaled;
    size_t bytes; /* of the workspace */
};

static struct places places_in(const struct srf_ctx *ctx, const struct srf_head_loss_args *a,
                               void *workspace)
{
    struct srf_linear_bwd_args gradients = srf__head_gradients(a);
    struct cuda_bump b = {(char *)workspace, 0};
    struct places p;
    bump_bytes(&b, cuda_linear_bwd_workspace(ctx, &gradients));
    p.shift = (float *)bump_bytes(&b, (size_t)a->n * sizeof(float));
    p.factor = (float *)bump_bytes(&b, (size_t)a->n * sizeof(float));
    p.parts = (float *)bump_bytes(&b, (size_t)(a->n * div_up(a->ld, PRODUCT_COLS)) * sizeof(float));
    p.scaled = (bf16 *)bump_bytes(&b, (size_t)(a->n * a->c) * sizeof(bf16));
    p.bytes = b.used;
    return p;
}

extern "C" srf_status cuda_head_loss(struct srf_ctx *ctx, const struct srf_head_loss_args *a)
{
    if (a->n == 0) return SRF_OK;
    SRF_FAIL_IF(a->v < 1 || a->ld < a->v || a->c < 1, SRF_INVALID,
                "head_loss: %lld words in %lld rows of %lld", (long long)a->v, (long long)a->ld,
                (long long)a->c);
    struct places at = places_in(ctx, a, ctx->workspace);
    struct wgmma_product p = {};
    p.end = PRODUCT_EXP;
    p.m = a->n, p.n = a->ld, p.k = a->c, p.v = a->v;
    p.a = a->x, p.b = a->w, p.y = a->logits;
    p.shift = at.shift, p.sums = at.parts;
    if (!srf__product_takes(ctx, &p) || !is_aligned(a->dx, 16)) return srf__head_one_by_one(ctx, a);
    cudaStream_t stream = stream_of(ctx);
    int c = (int)a->c;
    unsigned rows = (unsigned)div_up(a->n, WARPS);
    target_kernel<<<rows, THREADS, 0, stream>>>(a->n, c, (const bf16 *)a->x, (const bf16 *)a->w,
                                                (const int32_t *)a->targets, at.shift);
    SRF_TRY(srf__product(ctx, &p));
    struct norm_args norm = {};
    norm.n = a->n, norm.ld = a->ld, norm.n_parts = div_up(a->ld, PRODUCT_COLS);
    norm.c = c, norm.v = (int)a->v;
    norm.scale = (float)(a->scale * a->ce_weight);
    norm.parts = at.parts;
    norm.x = (const bf16 *)a->x, norm.w = (const bf16 *)a->w;
    norm.targets = (const int32_t *)a->targets;
    norm.nll = (float *)a->nll, norm.factor = at.factor;
    norm.e = (bf16 *)a->logits, norm.scaled = at.scaled;
    norm_kernel<<<(unsigned)div_up(a->n, NORM_ROWS), THREADS, 0, stream>>>(norm);
    struct srf_linear_bwd_args gradients = srf__head_gradients(a);
    gradients.x = at.scaled;
    SRF_TRY(cuda_linear_bwd(ctx, &gradients));
    scale_kernel<<<rows, THREADS, 0, stream>>>(a->n, c, at.factor, (bf16 *)a->dx);
    return srf__cuda_launched("head_loss");
}

extern "C" size_t cuda_head_loss_workspace(const struct srf_ctx *ctx,
                                           const struct srf_head_loss_args *a)
{
    size_t one_by_one = srf__head_one_by_one_workspace(ctx, a), own = places_in(ctx, a, NULL).bytes;
    return own > one_by_one ? own : one_by_one;
}
