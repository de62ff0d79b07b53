/* Softmax cross entropy, KL to a teacher, and their gradient. A block for each row.
 *
 * With l' = l - max l and Z = sum exp(l'), and the same with subscript t for the teacher,
 *     nll = log Z - l'[target]
 *     kl  = sum exp(t') (t' - l') / Z_t - (log Z_t - log Z)
 *     dl  = a exp(l') - b exp(t') - c onehot,  a = scale (ce + kl) / Z,  b = scale kl / Z_t
 * in three sweeps: maximum, sums, gradient. The first sweep brings the row into shared memory where
 * it fits (50257 bf16 logits are 100 KB: two blocks a multiprocessor, so that one loads while the
 * other computes), the others read it there and compute exponentials anew, which is cheaper than
 * to keep them. A row that does not fit is read again, from L2. Differences of shifted logits keep
 * their precision when a common offset is large. Arithmetic is fp32, the last logarithms fp64.
 * Rows of an odd vocabulary begin anywhere: packs are counted from the last 16-byte boundary at or
 * before the row, and those that reach over its ends go element by element.
 *
 * Floor: memory; logits (and teacher) are read once, dlogits written once: 8192 rows of 50257 move
 * 1.65 GB, 0.5 ms at 3.35 TB/s. */
#include "kernels/cuda/mma.h"
#include "kernels/cuda/pack.h"

struct xent_row_args {
    struct srf_xent_args a;
    int64_t ld;
    bool hold_logits, hold_teacher; /* rows kept in shared memory */
};

__device__ __forceinline__ float exp_of(float x, float)
{
    return expf(x);
}
__device__ __forceinline__ float exp_of(float x, bf16)
{
    return exp2_fast(x * 1.44269504088896f);
}

/* A row of n elements in packs of N that begin `skip` elements before it; held or in memory. */
template <typename T, int N> struct xent_row {
    const T *from; /* pack 0 */
    int skip, n;   /* elements skip .. skip + n - 1 count */
    pack<T, N> *held;
};

/* Pack i from memory; -inf for what is not of the row. */
template <typename T, int N>
__device__ __forceinline__ pack<T, N> fetch(const struct xent_row<T, N> &r, int i)
{
    int j = i * N;
    if (j >= r.skip && j + N <= r.skip + r.n) return load_pack<N>(r.from + j);
    pack<T, N> p;
#pragma unroll
    for (int u = 0; u < N; u++) {
        bool inside = j + u >= r.skip && j + u < r.skip + r.n;
        p.x[u] = inside ? r.from[j + u] : from_float<T>(-INFINITY);
    }
    return p;
}

template <typename T, int N>
__device__ __forceinline__ pack<T, N> again(const struct xent_row<T, N> &r, int i)
{
    return r.held ? r.held[i] : fetch(r, i);
}

__device__ float block_max(float x, float *scratch)
{
    int lane = threadIdx.x & 31, n_warps = blockDim.x >> 5;
    x = warp_max(x);
    if (lane == 0) scratch[threadIdx.x >> 5] = x;
    __syncthreads();
    x = warp_max(lane < n_warps ? scratch[lane] : -INFINITY);
    __syncthreads();
    return x;
}

/* The maximum of the row, which moves into shared memory if it is to be held. NaN is passed over
 * here, and shows in the sum. The row is complete for the block after the reduction's barrier. */
template <typename T, int N>
__device__ float sweep_max(const struct xent_row<T, N> &r, int n_packs, float *scratch)
{
    enum { BATCH = 4 }; /* loads under way */
    float max = -INFINITY;
    for (int first = threadIdx.x; first < n_packs; first += BATCH * blockDim.x) {
        pack<T, N> p[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int i = first + b * blockDim.x;
            if (i < n_packs) p[b] = fetch(r, i);
        }
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int i = first + b * blockDim.x;
            if (i >= n_packs) continue;
            if (r.held) r.held[i] = p[b];
#pragma unroll
            for (int u = 0; u < N; u++) max = fmaxf(max, to_float(p[b].x[u]));
        }
    }
    return block_max(max, scratch);
}

template <typename T, int N, bool teacher>
static __global__ void __launch_bounds__(1024) xent_kernel(const __grid_constant__ xent_row_args p)
{
    extern __shared__ __align__(16) char shared[];
    __shared__ float scratch[33];
    const struct srf_xent_args &a = p.a;
    int64_t at = (int64_t)blockIdx.x * p.ld;
    int v = (int)a.v, target = ((const int32_t *)a.targets)[blockIdx.x];
    int skip = (int)(at % N), n_packs = (skip + v + N - 1) / N;
    int out_packs = (int)((skip + p.ld + N - 1) / N);
    T *out = a.dlogits ? (T *)a.dlogits + at - skip : NULL;
    float *nll = (float *)a.nll + blockIdx.x;
    float *kl = teacher && a.kl ? (float *)a.kl + blockIdx.x : NULL;
    if (target < 0) {
        if (threadIdx.x == 0) {
            *nll = 0;
            if (kl) *kl = 0;
        }
        if (out)
            for (int64_t j = threadIdx.x; j < p.ld; j += blockDim.x)
                out[skip + j] = from_float<T>(0);
        return;
    }
    pack<T, N> *held = (pack<T, N> *)shared;
    struct xent_row<T, N> x = {
        (const T *)a.logits + at - skip, skip, v, p.hold_logits ? held : NULL
    };
    struct xent_row<T, N> t = {
        (const T *)a.teacher + at - skip, skip, v, p.hold_teacher ? held + n_packs : NULL
    };
    float x_target = to_float(x.from[skip + target]); /* before dlogits, which may be logits */

    float max = sweep_max(x, n_packs, scratch), max_t = 0;
    if (teacher) max_t = sweep_max(t, n_packs, scratch);

    float z = 0, z_t = 0, excess = 0;
    for (int i = threadIdx.x; i < n_packs; i += blockDim.x) {
        pack<T, N> px = again(x, i), pt;
        if (teacher) pt = again(t, i);
        float part = 0, part_t = 0, more = 0; /* a short sum first: it rounds less */
#pragma unroll
        for (int u = 0; u < N; u++) {
            float d = to_float(px.x[u]) - max;
            part += exp_of(d, T());
            if (teacher) {
                float d_t = to_float(pt.x[u]) - max_t, e = exp_of(d_t, T());
                part_t += e;
                /* e = 0 adds nothing, however far apart the logits; NaN is not 0 */
                more += e == 0 ? 0 : e * (d_t - d);
            }
        }
        z += part;
        z_t += part_t;
        excess += more;
    }
    z = block_sum(z, scratch);
    if (teacher) {
        z_t = block_sum(z_t, scratch);
        excess = block_sum(excess, scratch);
    }
    if (threadIdx.x == 0) {
        *nll = (float)(log((double)z) + ((double)max - (double)x_target));
        if (kl) *kl = (float)((double)excess / z_t - (log((double)z_t) - log((double)z)));
    }
    if (!out) return;

    double kl_weight = teacher ? a.kl_weight : 0;
    float scale = (float)(a.scale * (a.ce_weight + kl_weight)) / z;
    float scale_t = teacher && kl_weight != 0 ? (float)(a.scale * kl_weight) / z_t : 0;
    float onehot = (float)(a.scale * a.ce_weight);
    for (int i = threadIdx.x; i < out_packs; i += blockDim.x) {
        pack<T, N> o;
        int j = i * N;
        float g[N] = {};
        if (i < n_packs) {
            pack<T, N> px = again(x, i);
#pragma unroll
            for (int u = 0; u < N; u++) g[u] = scale * exp_of(to_float(px.x[u]) - max, T());
            if (teacher && kl_weight != 0) {
                pack<T, N> pt = again(t, i);
#pragma unroll
                for (int u = 0; u < N; u++)
                    g[u] -= scale_t * exp_of(to_float(pt.x[u]) - max_t, T());
            }
            unsigned hit = (unsigned)(skip + target - j);
            if (hit < N) {
#pragma unroll
                for (unsigned u = 0; u < N; u++) g[u] -= u == hit ? onehot : 0;
            }
        }
#pragma unroll
        for (int u = 0; u < N; u++) o.x[u] = from_float<T>(g[u]);
        if (j >= skip && j + N <= skip + v) {
            store_pack(out + j, o);
            continue;
        }
#pragma unroll
        for (int u = 0; u < N; u++) /* an end of the row, or beyond it */
            if (j + u >= skip && j + u < skip + p.ld)
                out[j + u] = j + u < skip + v ? o.x[u] : from_float<T>(0);
    }
}

template <typename T, int N>
static srf_status xent_launch(struct srf_ctx *ctx, const struct srf_xent_args *a)
{
    struct xent_row_args p = {*a, a->ld ? a->ld : a->v, false, false};
    size_t room = cuda_of(ctx)->smem_max - 1024; /* beside what the kernel has of its own */
    size_t row = (size_t)div_up(a->v + N - 1, N) * N * sizeof(T);
    p.hold_logits = row <= room;
    p.hold_teacher = a->teacher && 2 * row <= room;
    size_t held = (p.hold_logits ? row : 0) + (p.hold_teacher ? row : 0);
    /* short rows have few packs to share; half of the threads where two blocks fit */
    int64_t want = 32 * div_up(a->v, 4 * 32 * N), most = 2 * held > room ? 1024 : 512;
    unsigned threads = (unsigned)(want < most ? want : most);
    auto kernel = a->teacher ? xent_kernel<T, N, true> : xent_kernel<T, N, false>;
    CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)held));
    kernel<<<(unsigned)a->n, threads, held, stream_of(ctx)>>>(p);
    return srf__cuda_launched("xent");
}

extern "C" srf_status cuda_xent(struct srf_ctx *ctx, const struct srf_xent_args *a)
{
    if (a->n == 0) return SRF_OK;
    SRF_FAIL_IF(a->v < 1 || a->v > INT32_MAX / 2, SRF_INVALID,
                "xent: vocabulary of %lld, expected 1 to %d", (long long)a->v, INT32_MAX / 2);
    SRF_FAIL_IF(a->ld && (a->ld < a->v || a->ld > INT32_MAX / 2), SRF_INVALID,
                "xent: ld %lld, expected %lld to %d", (long long)a->ld, (long long)a->v,
                INT32_MAX / 2);
    SRF_FAIL_IF(a->n > INT32_MAX, SRF_INVALID, "xent: %lld rows, expected at most %d",
                (long long)a->n, INT32_MAX);
    bool packs =
        aligned_to(a->logits, 16) && aligned_to(a->teacher, 16) && aligned_to(a->dlogits, 16);
    if (ctx->dtype == SRF_BF16)
        return packs ? xent_launch<bf16, 8>(ctx, a) : xent_launch<bf16, 1>(ctx, a);
    return packs ? xent_launch<float, 4>(ctx, a) : xent_launch<float, 1>(ctx, a);
}

extern "C" size_t cuda_xent_workspace(const struct srf_ctx *, const struct srf_xent_args *)
{
    return 0;
}
