/* AdamW (arXiv 1711.05101) with clipping by the global norm, as ops.h has it.
 *
 * The bias corrections are folded into two factors of the step, on the host in double:
 *     p -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps) + lr weight_decay p
 * The factor of the gradient depends on *clip_sumsq, which is on the device: each thread makes it
 * from there. bf16 parameters are the rounded master copy; they are written, never read.
 * Floor: memory; per element 4 bytes of grad are read, 12 of master, m and v updated, 2 of param
 * written: 30 bytes in all (28 where param is fp32 and its own master). */
#include "kernels/cuda/dense.h"

#define THREADS       256
#define BLOCKS_PER_SM 5
#define VECTOR        4 /* elements a thread takes at once: 16 bytes of fp32 */

struct adamw {
    double grad_scale, max_norm;
    float b1, b2, c1, c2, eps; /* c: 1 - b */
    float rate, root, keep;    /* lr / (1 - b1^t), 1 / sqrt(1 - b2^t), 1 - lr weight_decay */
    const float *clip_sumsq;
    int32_t *skips;
    const uint8_t *no_decay;
};

/* What the gradient is multiplied with; false: this step is to be skipped. */
static __device__ __forceinline__ bool gradient_scale(const struct adamw *a, float *scale)
{
    double factor = a->grad_scale;
    if (a->clip_sumsq) {
        float sumsq = *a->clip_sumsq;
        if (!isfinite(sumsq)) return false;
        double norm = sqrt((double)sumsq) * fabs(factor);
        if (norm > a->max_norm) factor *= a->max_norm / norm;
    }
    *scale = (float)factor;
    return true;
}

/* One element; returns the new parameter. */
static __device__ __forceinline__ float update(const struct adamw *a, float g, float p, float keep,
                                               float *m, float *v)
{
    *m = a->b1 * *m + a->c1 * g;
    *v = a->b2 * *v + a->c2 * g * g;
    return keep * p - a->rate * *m / (sqrtf(*v) * a->root + a->eps);
}

/* param: fp32, in/out; rounded: bf16, out, or NULL. 64 is a multiple of N: a pack decays or not. */
template <int N>
static __global__ __launch_bounds__(THREADS, BLOCKS_PER_SM) void adamw_kernel(
    const struct adamw a, int64_t n, const float *__restrict__ grad, float *__restrict__ param,
    bf16 *__restrict__ rounded, float *__restrict__ m, float *__restrict__ v)
{
    float scale = 0.0f;
    bool skip = !gradient_scale(&a, &scale);
    int64_t start = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (a.skips && start == 0) {
        a.skips[0] += skip;
        a.skips[1] = skip ? a.skips[1] + 1 : 0;
    }
    if (skip) return;
    int64_t step = (int64_t)gridDim.x * THREADS, packs = n / N;
    for (int64_t i = start; i < packs; i += step) {
        int64_t at = i * N;
        pack<float, N> g = load_pack<float, N>(grad + at), p = load_pack<float, N>(param + at);
        pack<float, N> mi = load_pack<float, N>(m + at), vi = load_pack<float, N>(v + at);
        pack<bf16, N> r;
        float keep = a.no_decay && a.no_decay[at / 64] ? 1.0f : a.keep;
#pragma unroll
        for (int j = 0; j < N; j++)
            p.v[j] = update(&a, g.v[j] * scale, p.v[j], keep, &mi.v[j], &vi.v[j]);
        round_to(&r, p.v);
        store_pack<float, N>(m + at, mi);
        store_pack<float, N>(v + at, vi);
        store_pack<float, N>(param + at, p);
        if (rounded) store_pack<bf16, N>(rounded + at, r);
    }
    for (int64_t i = packs * N + start; i < n; i += step) { /* less than a pack is left */
        float keep = a.no_decay && a.no_decay[i / 64] ? 1.0f : a.keep;
        float p = update(&a, grad[i] * scale, param[i], keep, &m[i], &v[i]);
        param[i] = p;
        if (rounded) rounded[i] = from_float<bf16>(p);
    }
}

extern "C" srf_status cuda_adamw(struct srf_ctx *ctx, const struct srf_adamw_args *a)
{
    if (a->n == 0) return SRF_OK;
    bool is_bf16 = ctx->dtype == SRF_BF16;
    SRF_FAIL_IF(a->step < 1, SRF_INVALID, "adamw: step %lld, expected >= 1", (long long)a->step);
    SRF_FAIL_IF(is_bf16 != (a->master != NULL), SRF_INVALID,
                "adamw: bf16 parameters have a master copy, others have none");
    struct adamw p = {};
    p.grad_scale = a->grad_scale, p.max_norm = a->max_norm;
    p.b1 = (float)a->beta1, p.c1 = (float)(1 - a->beta1);
    p.b2 = (float)a->beta2, p.c2 = (float)(1 - a->beta2);
    p.eps = (float)a->eps;
    p.rate = (float)(a->lr / (1 - pow(a->beta1, (double)a->step)));
    p.root = (float)(1 / sqrt(1 - pow(a->beta2, (double)a->step)));
    p.keep = (float)(1 - a->lr * a->weight_decay);
    p.clip_sumsq = (const float *)a->clip_sumsq;
    p.skips = a->clip_sumsq ? (int32_t *)a->skips : NULL;
    p.no_decay = (const uint8_t *)a->no_decay;
    const float *grad = (const float *)a->grad;
    float *param = (float *)(is_bf16 ? a->master : a->param), *m = (float *)a->m,
          *v = (float *)a->v;
    bf16 *rounded = is_bf16 ? (bf16 *)a->param : NULL;
    bool aligned = is_aligned(grad, 16) && is_aligned(param, 16) && is_aligned(m, 16) &&
                   is_aligned(v, 16) && is_aligned(rounded, 8);
    unsigned grid = grid_for(ctx, div_up(a->n, VECTOR), THREADS, BLOCKS_PER_SM);
    if (aligned)
        adamw_kernel<VECTOR>
            <<<grid, THREADS, 0, stream_of(ctx)>>>(p, a->n, grad, param, rounded, m, v);
    else
        adamw_kernel<1><<<grid, THREADS, 0, stream_of(ctx)>>>(p, a->n, grad, param, rounded, m, v);
    return srf__cuda_launched("adamw");
}

extern "C" size_t cuda_adamw_workspace(const struct srf_ctx *, const struct srf_adamw_args *)
{
    return 0;
}
