/* SRF attention, one token of every sequence, pure form: states through shared memory by bulk
 * copies (sm_90), for head sizes 64 and 128 and up to 256 features.
 *
 * A block of threads has one sequence and head. W's first rows are on their way before the kernel
 * in front is done, the state from then on: z and M on one barrier, S in PIECES on others, so that
 * the first of it goes back to memory while the last still comes. Meanwhile the products with W are
 * made, d / 8 lanes a row, a lane's pieces of x and y in registers, and each thread keeps the two
 * exponents of one feature. With M it finds the coefficients (the state becomes step * state +
 * in * v and is read with the weight out) and the block its stabiliser; then S goes through
 * registers once, 16 bytes at a time, and back to memory. Blocks that are resident together keep
 * more bytes under way than the memory needs, so no block has a pipeline of its own.
 *
 * Floor: memory, m (d + 2) numbers read and written a head, in bf16 m d bf16 and 2 m fp32: for B =
 * 256, H = 12, D = 64, m = 64 on an H100 104 MB, 33 us, and 53 MB, 17 us. W comes from L2. */
#include "kernels/cuda/chain.h"
#include "kernels/cuda/pack.h"
#include "kernels/cuda/srf_attn_step.h"
#include "kernels/cuda/wgmma.h"

#define ROWS_AHEAD 4 /* of W, of a thread */
#define PIECES     4 /* of S */

/* Shared memory of a block, in bytes from its start: S, then z, M as they are in the state; then */
struct bulk_layout {
    int coef; /* (m) float4: step, in, out of a feature */
    int red;  /* (warps, d) */
    int most; /* (2, warps) */
    int bars; /* 1 + PIECES barriers */
    int bytes;
};

static SCAN_BOTH struct bulk_layout bulk_layout_of(int m, int d, int threads, int element)
{
    struct bulk_layout l;
    l.coef = (m * (d * element + 8) + 15) / 16 * 16;
    l.red = l.coef + m * 16;
    l.most = l.red + threads / 32 * d * 4;
    l.bars = l.most + threads / 32 * 8;
    l.bytes = l.bars + 8 * (1 + PIECES);
    return l;
}

/* 8 neighbours, as they are and as numbers */
template <typename T> struct eight {
    uint4 x[sizeof(T) / 2];
};
template <typename T> __device__ __forceinline__ eight<T> eight_of(const T *from)
{
    eight<T> e;
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; i++) e.x[i] = ((const uint4 *)from)[i];
    return e;
}
__device__ __forceinline__ void unpack_8(float to[8], const uint4 &u)
{
    const uint32_t x[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
        to[2 * k] = __uint_as_float(x[k] << 16);
        to[2 * k + 1] = __uint_as_float(x[k] & 0xffff0000u);
    }
}
__device__ __forceinline__ void numbers(float to[8], const eight<bf16> &e)
{
    unpack_8(to, e.x[0]);
}
__device__ __forceinline__ void numbers(float to[8], const eight<float> &e)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        to[4 * i] = __uint_as_float(e.x[i].x), to[4 * i + 1] = __uint_as_float(e.x[i].y);
        to[4 * i + 2] = __uint_as_float(e.x[i].z), to[4 * i + 3] = __uint_as_float(e.x[i].w);
    }
}
template <typename T> __device__ __forceinline__ void load_8(float to[8], const T *from)
{
    numbers(to, eight_of(from));
}

/* 16 bytes of a state */
__device__ __forceinline__ void load_16(float to[4], const float *from)
{
    load_vec<4>(to, from);
}
__device__ __forceinline__ void load_16(float to[8], const bf16 *from)
{
    load_8(to, from);
}
__device__ __forceinline__ void store_16(float *s, int at, const float row[4], uint32_t)
{
    __stcs((float4 *)(s + at), make_float4(row[0], row[1], row[2], row[3]));
}
__device__ __forceinline__ void store_16(bf16 *s, int at, const float row[8], uint32_t seed)
{
    uint32_t n = (uint32_t)at >> 1;
    __stcs((uint4 *)(s + at), make_uint4(step_round_pair(row[0], row[1], seed, n),
                                         step_round_pair(row[2], row[3], seed, n + 1),
                                         step_round_pair(row[4], row[5], seed, n + 2),
                                         step_round_pair(row[6], row[7], seed, n + 3)));
}

template <typename T, typename E, int D, int THREADS>
static __global__ void __launch_bounds__(THREADS, THREADS == 128 ? 8 : 3)
    step_bulk_kernel(const struct step_params a)
{
#if __CUDA_ARCH__ >= 900
    constexpr int LANES = D / 8, GROUPS = THREADS / LANES;                        /* of W's rows */
    constexpr int VEC = 16 / sizeof(E), COLS = D / VEC, STREAMS = THREADS / COLS; /* of S */
    constexpr int WARPS = THREADS / 32;
    extern __shared__ __align__(128) char smem[];
    const struct srf_attn_shape &sh = a.s;
    const int m = (int)sh.m, tid = threadIdx.x;
    const struct bulk_layout l = bulk_layout_of(m, D, THREADS, sizeof(E));
    int64_t block = blockIdx.x, seq = block / sh.h, head = block - seq * sh.h;
    const int lane = tid % LANES, group = tid / LANES;
    const int i = group + lane * GROUPS; /* this thread's feature */
    const int64_t set = sh.n_sets == 1 ? 0 : head;
    const T *w = (const T *)a.w + set * m * D + lane * 8;
    const uint32_t base = (uint32_t)__cvta_generic_to_shared(smem), bars = base + l.bars;
    eight<T> rows[ROWS_AHEAD];
    chain_next();
    /* The features are nothing that kernels of a chain write. */
#pragma unroll
    for (int r = 0; r < ROWS_AHEAD; r++) rows[r] = eight_of(w + min(group + r * GROUPS, m - 1) * D);
    const float bias = i < m ? a.bias[set * m + i] * SCAN_LOG2E : 0.0f;
    chain_wait();
    int32_t pos = a.pos ? a.pos[seq] : 0;
    T *o = (T *)a.o + seq * a.ld_o + head * D;
    if (pos < 0) { /* idle */
        if (tid < D) o[tid] = from_float<T>(0.0f);
        return;
    }
    E *state = (E *)(a.state + block * a.state_bytes);
    const int piece = (m + PIECES * STREAMS - 1) / (PIECES * STREAMS) * STREAMS; /* features */
    if (tid == 0) {
        for (int b = 0; b < 1 + PIECES; b++) barrier_init(bars + 8 * b, 1);
        barrier_init_done();
        int row = D * (int)sizeof(E);
        barrier_expect(bars, 8 * m);
        bulk_bytes(base + m * row, state + m * D, 8 * m, bars);
        for (int b = 0; b < PIECES; b++) {
            int bytes = min(piece, m - b * piece) * row;
            if (bytes <= 0) break;
            barrier_expect(bars + 8 + 8 * b, bytes);
            bulk_bytes(base + b * piece * row, state + b * piece * D, bytes, bars + 8 + 8 * b);
        }
    }

    /* Exponents: feature group + r GROUPS in turn r, which lane r keeps. */
    const int64_t in_row = seq * a.ld + head * D + lane * 8;
    float x[8], y[8], half = 0;
    load_8(x, (const T *)a.q + in_row);
    load_8(y, (const T *)a.k + in_row);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        x[j] = scan_clamp(x[j] * a.scale);
        y[j] = scan_clamp(y[j] * a.scale);
        half += y[j] * y[j];
    }
#pragma unroll
    for (int b = LANES / 2; b; b >>= 1) half += __shfl_xor_sync(0xffffffffu, half, b);
    half *= 0.5f * SCAN_LOG2E;
    float aq = 0, ak = 0;
    for (int r0 = 0; r0 * GROUPS < m; r0 += ROWS_AHEAD) {
        if (r0 > 0)
#pragma unroll
            for (int r = 0; r < ROWS_AHEAD; r++)
                rows[r] = eight_of(w + min(group + (r0 + r) * GROUPS, m - 1) * D);
#pragma unroll
        for (int r = 0; r < ROWS_AHEAD; r++) {
            float dq = 0, dk = 0, row[8];
            numbers(row, rows[r]);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                dq += row[j] * x[j];
                dk += row[j] * y[j];
            }
#pragma unroll
            for (int b = LANES / 2; b; b >>= 1) {
                dq += __shfl_xor_sync(0xffffffffu, dq, b);
                dk += __shfl_xor_sync(0xffffffffu, dk, b);
            }
            aq = lane == r0 + r ? dq : aq;
            ak = lane == r0 + r ? dk : ak;
        }
    }
    const int col = tid % COLS * VEC, stream = tid / COLS;
    float vc[VEC];
    const T *v = (const T *)a.v + seq * a.ld + head * D + col;
#pragma unroll
    for (int j = 0; j < VEC; j++) vc[j] = to_float(v[j]);

    /* Coefficients of this thread's feature. */
    float4 *coef = (float4 *)(smem + l.coef);
    float *z = (float *)(smem + m * D * (int)sizeof(E)), *top = z + m;
    float *red = (float *)(smem + l.red), *most = (float *)(smem + l.most), *dens = most + WARPS;
    float step = 0, in = 0, z_i = 0, m_i = 0, shift = 0, r = SCAN_UNSET;
    __syncthreads(); /* the barriers are there */
    barrier_wait(bars, 0);
    if (i < m) {
        aq = fmaxf(SCAN_LOG2E * aq + bias, SCAN_LOW); /* |x|^2 / 2 cancels */
        ak = fmaxf(SCAN_LOG2E * ak + (bias - half), SCAN_LOW);
        z_i = z[i];
        m_i = z_i == 0.0f ? SCAN_UNSET : top[i];
        float e = rintf(ak), to = fmaxf(m_i, e);
        step = scan_pow2(m_i - to);
        in = scan_exp2(ak - e, e - to);
        z[i] = z_i = step * z_i + in;
        top[i] = m_i = to;
        shift = rintf(aq);
        r = shift + m_i;
    }
    r = warp_max(r);
    if ((tid & 31) == 0) most[tid >> 5] = r;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < WARPS; k++) r = fmaxf(r, most[k]);
    float out = i < m ? scan_exp2(aq - shift, (shift + m_i) - r) : 0.0f, den = warp_sum(out * z_i);
    if (i < m) coef[i] = make_float4(step, in, out, 0.0f);
    if ((tid & 31) == 0) dens[tid >> 5] = den;
    __syncthreads();
    if (4 * tid < 2 * m) __stcs((float4 *)(state + m * D) + tid, ((float4 *)z)[tid]);

    const uint32_t seed = step_seed(head, pos);
    const E *s = (const E *)smem;
    float acc[VEC] = {};
    for (int b = 0, f = stream; b * piece < m; b++) {
        barrier_wait(bars + 8 + 8 * b, 0);
#pragma unroll 4
        for (; f < min((b + 1) * piece, m); f += STREAMS) {
            float row[VEC];
            float4 by = coef[f];
            int at = f * D + col;
            load_16(row, s + at);
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                row[j] = by.x * row[j] + by.y * vc[j];
                acc[j] += by.z * row[j];
            }
            store_16(state, at, row, seed);
        }
    }
#pragma unroll
    for (int b = COLS; b < 32; b <<= 1)
#pragma unroll
        for (int j = 0; j < VEC; j++) acc[j] += __shfl_xor_sync(0xffffffffu, acc[j], b);
    if ((tid & 31) < COLS)
#pragma unroll
        for (int j = 0; j < VEC; j++) red[(tid >> 5) * D + col + j] = acc[j];
    __syncthreads();
    if (tid < D) {
        float sum = 0;
        den = 0;
#pragma unroll
        for (int k = 0; k < WARPS; k++) sum += red[k * D + tid], den += dens[k];
        o[tid] = from_float<T>(sum / den);
    }
#endif
}

template <typename T, typename E>
static void (*kernel_of(int64_t d, int threads))(const struct step_params)
{
    if (d == 64)
        return threads == 128 ? step_bulk_kernel<T, E, 64, 128> : step_bulk_kernel<T, E, 64, 256>;
    return threads == 128 ? step_bulk_kernel<T, E, 128, 128> : step_bulk_kernel<T, E, 128, 256>;
}

bool srf__step_bulk(struct srf_ctx *ctx, const struct step_params *p, bool state_bf16,
                    srf_status *status)
{
    const struct srf_attn_shape *s = &p->s;
    bool wide = ctx->dtype == SRF_F32;
    int64_t element = state_bf16 ? 2 : 4, row = 16 / (int64_t)srf_dtype_bytes(ctx->dtype);
    if (cuda_of(ctx)->cc / 10 != 9 || s->window || (s->d != 64 && s->d != 128) || s->m > 256 ||
        s->m % 2 || p->ld % row || !aligned_to(p->q, 16) || !aligned_to(p->k, 16) ||
        !aligned_to(p->w, 16) || !aligned_to(p->state, 16))
        return false;
    int threads = s->m > 128 ? 256 : 128;
    int bytes = bulk_layout_of((int)s->m, (int)s->d, threads, (int)element).bytes;
    if (2 * ((size_t)bytes + 1024) > cuda_of(ctx)->smem_max) return false; /* one block a time */
    auto kernel = state_bf16 ? kernel_of<bf16, bf16>(s->d, threads)
                  : wide     ? kernel_of<float, float>(s->d, threads)
                             : kernel_of<bf16, float>(s->d, threads);
    cudaError_t err =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    const struct chain_shape shape = {dim3((unsigned)(s->b * s->h)), threads, (size_t)bytes, 1};
    if (err == cudaSuccess) chain_launch(ctx, shape, kernel, *p);
    *status = srf__cuda_launched("srf_attn_step");
    return true;
}
