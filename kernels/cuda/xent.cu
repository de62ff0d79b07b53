/* Softmax cross entropy, KL to a teacher, and their gradient. A block for each row.
 *
 * With l' = l - max l and Z = sum exp(l'), and the same with subscript t for the teacher,
 *     nll = log Z - l'[target]
 *     kl  = sum exp(t') (t' - l') / Z_t - (log Z_t - log Z)
 *     dl  = a exp(l') - b exp(t') - c onehot,  a = scale (ce + kl) / Z,  b = scale kl / Z_t
 * in two sweeps. The first adds up: a thread keeps the largest logit that it has seen and sums
 * relative to it; a larger one rescales them,
 *     Z <- Z exp(max - max'),
 *     K <- exp(max_t - max_t') (K + Z_t ((max_t - max_t') - (max - max')))
 * (K is the first sum of kl), and so are the threads' sums brought together. The second sweep makes
 * the gradient, with exponentials computed anew, which is cheaper than to keep them. On its way to
 * the first sweep the row stops in shared memory as far as that is large enough (50257 bf16 logits
 * are 100 KB: two blocks a multiprocessor), all of it under way at once; what has no place is read
 * again, from L2. Differences of shifted logits keep their precision when a common offset is large.
 * Arithmetic is fp32, the last logarithms fp64.
 * The last rows come first: they are what the product before has left in L2, and the product behind
 * begins with the first.
 * Rows of an odd vocabulary begin anywhere: the elements before the first 16-byte boundary and
 * after the last are loose, a thread takes one of them at most.
 *
 * Floor: memory; logits (and teacher) are read once, dlogits written once: 8192 rows of 50257 move
 * 1.65 GB, 0.5 ms at 3.35 TB/s. */
#include "kernels/cuda/mma.h"
#include "kernels/cuda/pack.h"

#include <float.h>

enum { STAGES = 4 }; /* batches of packs on their way to shared memory */

struct xent_row_args {
    struct srf_xent_args a;
    int64_t ld;
    int held, held_t; /* batches of logits, of teacher that are kept in shared memory, */
    int place_t;      /* the latter from this pack on */
};

__device__ __forceinline__ float exp_of(float x, float)
{
    return expf(x);
}
__device__ __forceinline__ float exp_of(float x, bf16)
{
    return exp2_fast(x * 1.44269504088896f);
}

/* ---- rows ------------------------------------------------------------------------------------ */

/* Where a row's elements are: n_packs packs of N from element `lead` on, the others loose. */
struct row_shape {
    int lead, n_packs, n_loose;
};

template <int N> __device__ __forceinline__ struct row_shape shape_of(int64_t at, int v)
{
    struct row_shape s;
    s.lead = (int)((N - at % N) % N);
    if (s.lead > v) s.lead = v;
    s.n_packs = (v - s.lead) / N;
    s.n_loose = v - s.n_packs * N;
    return s;
}

/* Index of the i-th loose element. */
template <int N> __device__ __forceinline__ int loose_at(const struct row_shape &s, int i)
{
    return i < s.lead ? i : i + s.n_packs * N;
}

/* The packs of a row go to the threads in batches: B x blockDim, neighbours to neighbours. */
template <int B> __device__ __forceinline__ int pack_of(int batch, int b)
{
    return (batch * B + b) * blockDim.x + threadIdx.x;
}

template <typename T, int N> struct xent_row {
    const T *packs;
    bits<T, N> *place; /* in shared memory, */
    int held;          /* for the packs of that many batches */
};

/* A thread sends for the packs that it will use itself: no barriers are needed. */
template <typename T, int N, int B>
__device__ __forceinline__ void send_for(const struct xent_row<T, N> &r, int n_packs, int batch)
{
    if constexpr (N * sizeof(T) == 16) {
        if (batch >= r.held) return;
#pragma unroll
        for (int b = 0; b < B; b++) {
            int i = pack_of<B>(batch, b);
            if (i < n_packs) cp_async_16(smem_addr(r.place + i), r.packs + (int64_t)i * N, true);
        }
    }
}

/* Packs that are not there come as the last one. */
template <typename T, int N, int B>
__device__ __forceinline__ void fetch(const struct xent_row<T, N> &r, int n_packs, int batch,
                                      bits<T, N> out[B])
{
    bool held = batch < r.held;
#pragma unroll
    for (int b = 0; b < B; b++) {
        int i = pack_of<B>(batch, b);
        if (held && i < n_packs)
            out[b] = r.place[i];
        else /* place[n_packs - 1] is another thread's, and may not be there yet */
            out[b] = load_bits<N>(r.packs + (int64_t)min(i, n_packs - 1) * N);
    }
}

/* ---- sums relative to a maximum -------------------------------------------------------------- */

/* -FLT_MAX is the maximum of nothing: its difference to -inf is no NaN. */
struct tally {
    float max, z, max_t, z_t, excess;
};

template <typename T, bool teacher>
__device__ __forceinline__ void rescale(struct tally &s, float max, float max_t)
{
    float shift = s.max - max;
    s.z *= exp_of(shift, T());
    s.max = max;
    if (!teacher) return;
    float shift_t = s.max_t - max_t, r = exp_of(shift_t, T());
    /* r = 0 or z_t = 0 leaves nothing, however far apart the maxima; NaN is not 0 */
    s.excess = r == 0 || s.z_t == 0 ? 0 : r * (s.excess + s.z_t * (shift_t - shift));
    s.z_t *= r;
    s.max_t = max_t;
}

/* NaN is passed over in the maximum, and shows in the sum. */
template <typename T, int N, bool teacher>
__device__ __forceinline__ void tally_pack(struct tally &s, const pack<T, N> &x,
                                           const pack<T, N> &t)
{
    float max = s.max, max_t = s.max_t;
#pragma unroll
    for (int u = 0; u < N; u++) {
        max = fmaxf(max, to_float(x.x[u]));
        if (teacher) max_t = fmaxf(max_t, to_float(t.x[u]));
    }
    if (max > s.max || (teacher && max_t > s.max_t)) rescale<T, teacher>(s, max, max_t);
    float z = 0, z_t = 0, excess = 0; /* short sums first: they round less */
#pragma unroll
    for (int u = 0; u < N; u++) {
        float d = to_float(x.x[u]) - max;
        z += exp_of(d, T());
        if (teacher) {
            float d_t = to_float(t.x[u]) - max_t, e = exp_of(d_t, T());
            z_t += e;
            excess += e == 0 ? 0 : e * (d_t - d);
        }
    }
    s.z += z;
    s.z_t += z_t;
    s.excess += excess;
}

__device__ __forceinline__ float block_max(float x, float *scratch)
{
    int lane = threadIdx.x & 31, n_warps = blockDim.x >> 5;
    x = warp_max(x);
    if (lane == 0) scratch[threadIdx.x >> 5] = x;
    __syncthreads();
    x = warp_max(lane < n_warps ? scratch[lane] : -FLT_MAX);
    __syncthreads();
    return x;
}

/* Over the row; every thread gets the result. */
template <typename T, int N, int B, bool teacher>
__device__ struct tally tally_row(const struct srf_xent_args &a, int64_t at,
                                  const struct xent_row<T, N> &x, const struct xent_row<T, N> &t,
                                  const struct row_shape &shape, float *scratch)
{
    struct tally s = {-FLT_MAX, 0, -FLT_MAX, 0, 0};
    int n_packs = shape.n_packs, n_batches = (n_packs + B * blockDim.x - 1) / (B * blockDim.x);
    for (int batch = 0; batch < n_batches + STAGES - 1; batch++) {
        send_for<T, N, B>(x, n_packs, batch);
        if (teacher) send_for<T, N, B>(t, n_packs, batch);
        cp_async_commit();
        int ready = batch - (STAGES - 1);
        if (ready < 0) continue;
        cp_async_wait<STAGES - 1>();
        bits<T, N> bx[B], bt[B];
        fetch<T, N, B>(x, n_packs, ready, bx);
        if (teacher) fetch<T, N, B>(t, n_packs, ready, bt);
#pragma unroll
        for (int b = 0; b < B; b++)
            if (pack_of<B>(ready, b) < n_packs)
                tally_pack<T, N, teacher>(s, unpack<T, N>(bx[b]),
                                          unpack<T, N>(teacher ? bt[b] : bx[b]));
    }
    if (threadIdx.x < shape.n_loose) {
        int64_t j = at + loose_at<N>(shape, threadIdx.x);
        pack<T, 1> px = {((const T *)a.logits)[j]}, pt = px;
        if (teacher) pt.x[0] = ((const T *)a.teacher)[j];
        tally_pack<T, 1, teacher>(s, px, pt);
    }
    float max = block_max(s.max, scratch), max_t = teacher ? block_max(s.max_t, scratch) : 0;
    rescale<T, teacher>(s, max, max_t);
    s.z = block_sum(s.z, scratch);
    if (teacher) {
        s.z_t = block_sum(s.z_t, scratch);
        s.excess = block_sum(s.excess, scratch);
    }
    return s;
}

/* dl but for the onehot = scale_x exp(x - max) - scale_t exp(t - max_t). */
struct slope {
    float max, max_t, scale, scale_t;
};

template <typename T, int N, bool teacher>
__device__ __forceinline__ void gradient(const struct slope &s, const pack<T, N> &x,
                                         const pack<T, N> &t, float g[N])
{
#pragma unroll
    for (int u = 0; u < N; u++) {
        g[u] = s.scale * exp_of(to_float(x.x[u]) - s.max, T());
        if (teacher) g[u] -= s.scale_t * exp_of(to_float(t.x[u]) - s.max_t, T());
    }
}

/* ---- the kernel ------------------------------------------------------------------------------ */

template <typename T, int N, int B, bool teacher>
static __global__ void __launch_bounds__(1024) xent_kernel(const __grid_constant__ xent_row_args p)
{
    extern __shared__ __align__(16) char shared[];
    __shared__ float scratch[33];
    const struct srf_xent_args &a = p.a;
    unsigned row = gridDim.x - 1 - blockIdx.x;
    int64_t at = (int64_t)row * p.ld;
    int v = (int)a.v, target = ((const int32_t *)a.targets)[row];
    T *out = a.dlogits ? (T *)a.dlogits + at : NULL;
    float *nll = (float *)a.nll + row;
    float *kl = a.teacher && a.kl ? (float *)a.kl + row : NULL;
    if (target < 0) {
        if (threadIdx.x == 0) {
            *nll = 0;
            if (kl) *kl = 0;
        }
        if (out)
            for (int64_t j = threadIdx.x; j < p.ld; j += blockDim.x) out[j] = from_float<T>(0);
        return;
    }
    const struct row_shape shape = shape_of<N>(at, v);
    int n_packs = shape.n_packs, n_batches = (n_packs + B * blockDim.x - 1) / (B * blockDim.x);
    bits<T, N> *place = (bits<T, N> *)shared;
    const T *packs = (const T *)a.logits + at + shape.lead;
    const T *packs_t = (const T *)a.teacher + at + shape.lead;
    struct xent_row<T, N> x = {packs, place, p.held}, t = {
        packs_t, place + p.place_t, p.held_t
    };
    float x_target = to_float(((const T *)a.logits)[at + target]); /* dlogits may be logits */
    struct tally s = tally_row<T, N, B, teacher>(a, at, x, t, shape, scratch);
    if (threadIdx.x == 0) {
        double log_z = log((double)s.z);
        *nll = (float)(log_z + ((double)s.max - (double)x_target));
        if (kl) *kl = (float)((double)s.excess / s.z_t - (log((double)s.z_t) - log_z));
    }
    if (!out) return;

    double kl_weight = a.teacher ? a.kl_weight : 0;
    struct slope c = {s.max, s.max_t, (float)(a.scale * (a.ce_weight + kl_weight)) / s.z, 0};
    bool both = teacher && kl_weight != 0; /* a NaN of the teacher with no weight is no matter */
    if (both) c.scale_t = (float)(a.scale * kl_weight) / s.z_t;
    float onehot = (float)(a.scale * a.ce_weight);
    for (int batch = 0; batch < n_batches; batch++) {
        bits<T, N> bx[B], bt[B];
        fetch<T, N, B>(x, n_packs, batch, bx);
        if (both) fetch<T, N, B>(t, n_packs, batch, bt);
#pragma unroll
        for (int b = 0; b < B; b++) {
            int i = pack_of<B>(batch, b), j = shape.lead + i * N;
            if (i >= n_packs) continue;
            float g[N];
            if (both)
                gradient<T, N, true>(c, unpack<T, N>(bx[b]), unpack<T, N>(bt[b]), g);
            else
                gradient<T, N, false>(c, unpack<T, N>(bx[b]), unpack<T, N>(bx[b]), g);
            unsigned hit = (unsigned)(target - j);
            pack<T, N> o;
#pragma unroll
            for (unsigned u = 0; u < N; u++)
                o.x[u] = from_float<T>(hit == u ? g[u] - onehot : g[u]);
            store_pack_streaming(out + j, o);
        }
    }
    if (threadIdx.x < shape.n_loose) {
        int j = loose_at<N>(shape, threadIdx.x);
        pack<T, 1> px = {((const T *)a.logits)[at + j]}, pt = px;
        if (both) pt.x[0] = ((const T *)a.teacher)[at + j];
        float g[1];
        if (both)
            gradient<T, 1, true>(c, px, pt, g);
        else
            gradient<T, 1, false>(c, px, pt, g);
        out[j] = from_float<T>(j == target ? g[0] - onehot : g[0]);
    }
    for (int64_t j = v + threadIdx.x; j < p.ld; j += blockDim.x) out[j] = from_float<T>(0);
}

template <typename T, int N>
static srf_status xent_launch(struct srf_ctx *ctx, const struct srf_xent_args *a)
{
    enum { BATCH = 4, BATCH_TEACHER = 2 };
    struct xent_row_args p = {*a, a->ld ? a->ld : a->v, 0, 0, 0};
    int64_t batch = a->teacher ? BATCH_TEACHER : BATCH, rows = a->teacher ? 2 : 1;
    int64_t room = (int64_t)cuda_of(ctx)->smem_max - 1024; /* beside the kernel's own */
    int64_t bytes = N * sizeof(T), packs = div_up(a->v, N);
    /* Two blocks a multiprocessor where two thirds of their rows find a place. Without a gradient
     * nothing is kept, and small blocks wait less for each other. */
    bool two = 4 * rows * packs * bytes <= 3 * room, all = rows * packs * bytes <= room;
    int64_t want = 32 * div_up(packs, batch * 32), most = !a->dlogits ? 256 : all ? 512 : 1024;
    unsigned threads = (unsigned)(want < most ? want : most);
    int64_t held = 0; /* packs */
    if (a->dlogits && bytes == 16) {
        int64_t span = batch * threads, fit = (two ? room / 2 : room) / bytes;
        p.held = (int)(packs <= fit ? div_up(packs, span) : fit / span);
        held = packs <= fit ? packs : p.held * span;
        if (a->teacher) {
            fit -= held;
            p.place_t = (int)held;
            p.held_t = (int)(packs <= fit ? div_up(packs, span) : fit / span);
            held += packs <= fit ? packs : p.held_t * span;
        }
    }
    size_t shared = (size_t)(held * bytes);
    auto kernel =
        a->teacher ? xent_kernel<T, N, BATCH_TEACHER, true> : xent_kernel<T, N, BATCH, false>;
    CUDA_TRY(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    kernel<<<(unsigned)a->n, threads, shared, stream_of(ctx)>>>(p);
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
