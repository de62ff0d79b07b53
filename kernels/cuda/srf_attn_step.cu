/* SRF attention, one token of every sequence: O(m d) whatever the position, and in the hybrid at
 * most 2 window exact scores. One block of threads a sequence and head; units as in
 * srf_attn_scan.h.
 *
 * The products with W are made 8 lanes a row; then a thread for each feature moves M and z along
 * and finds the coefficients of the state, which is streamed once, 16 bytes at a time: read and
 * written in the pure form, only read in the hybrid. There a block's last token puts the whole
 * block before it into the state, FOLD keys at a time.
 *
 * Floor: the bytes of the state, m (d + 2) fp32 numbers read and written (hybrid: read, and up to
 * 4 window d of the ring), at the card's memory bandwidth. W comes from L2.
 */
#include "kernels/cuda/chain.h"
#include "kernels/cuda/srf_attn_step.h"

#define STEP_THREADS  256
#define LANES         8 /* that share a row of W, or of the ring */
#define FOLD          8 /* keys that go into the state at a time: a warp for each one's |y|^2 */
#define FOLD_FEATURES 256
#define AHEAD         4    /* rows of the state that a thread has on their way */
#define EARLY         8192 /* floats of the state that are asked for before W is read */

/* Shared memory, in floats from its start. */
struct step_layout {
    int64_t x, v;             /* (2, d): x, y; (d) */
    int64_t dot;              /* (2, m): products with W, then the weights out and in */
    int64_t step;             /* (m) */
    int64_t red;              /* (groups, d) */
    int64_t scratch;          /* (40) of reductions */
    int64_t p;                /* hybrid: (2 window) */
    int64_t fold_y, fold_v;   /* hybrid: (FOLD, d) each */
    int64_t fold_in, fold_by; /* hybrid: (FOLD, FOLD_FEATURES), (FOLD_FEATURES) */
    int64_t floats;
};

static SCAN_BOTH int64_t take(int64_t *used, int64_t n)
{
    int64_t at = *used;
    *used += (n + 3) / 4 * 4;
    return at;
}

static SCAN_BOTH struct step_layout step_layout_of(const struct srf_attn_shape &s, int vec)
{
    struct step_layout l = {};
    int64_t used = 0;
    l.x = take(&used, 2 * s.d);
    l.v = take(&used, s.d);
    l.dot = take(&used, 2 * s.m);
    l.step = take(&used, s.m);
    l.red = take(&used, (int64_t)STEP_THREADS * vec > s.d ? (int64_t)STEP_THREADS * vec : s.d);
    l.scratch = take(&used, 40);
    if (s.window) {
        l.p = take(&used, 2 * s.window);
        l.fold_y = take(&used, FOLD * s.d);
        l.fold_v = take(&used, FOLD * s.d);
        l.fold_in = take(&used, FOLD * FOLD_FEATURES);
        l.fold_by = take(&used, FOLD_FEATURES);
    }
    l.floats = used;
    return l;
}

/* These rows are wanted soon: into L2. */
template <typename E> __device__ __forceinline__ void ask_for(const E *rows, int64_t n, int d)
{
#if __CUDA_ARCH__ >= 900
    int64_t bytes = n * d * (int64_t)sizeof(E);
    if (bytes > 0 && bytes % 16 == 0 && ((uintptr_t)rows & 15) == 0)
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(rows), "r"((int)bytes)
                     : "memory");
#endif
}

/* out (count, ld) = products of rows [0, n) of a (n, d) array with the `count` vectors x (count, d)
 * in shared memory. scale > 0: rows are k, and become y. */
template <int count, int vec, typename E>
__device__ __forceinline__ void dot_rows(const E *__restrict__ rows, int64_t n, int d, float scale,
                                         const float *__restrict__ x, float *__restrict__ out,
                                         int64_t ld)
{
    int lane = threadIdx.x % LANES;
#pragma unroll 2
    for (int64_t i0 = 0; i0 < n; i0 += STEP_THREADS / LANES) {
        int64_t i = i0 + threadIdx.x / LANES;
        float sum[count] = {0};
        if (i < n)
#pragma unroll 4
            for (int j = lane * vec; j < d; j += LANES * vec) {
                float e[vec];
                load_row<vec>(e, rows + i * d + j);
#pragma unroll
                for (int l = 0; l < vec; l++)
                    if (scale > 0) e[l] = scan_clamp(e[l] * scale);
#pragma unroll
                for (int c = 0; c < count; c++) {
                    float xs[vec];
                    load_vec<vec>(xs, x + c * d + j);
#pragma unroll
                    for (int l = 0; l < vec; l++) sum[c] += e[l] * xs[l];
                }
            }
#pragma unroll
        for (int c = 0; c < count; c++) {
#pragma unroll
            for (int o = LANES / 2; o; o >>= 1) sum[c] += __shfl_xor_sync(0xffffffffu, sum[c], o);
            if (i < n && lane == 0) out[c * ld + i] = sum[c];
        }
    }
}

/* The largest of all threads' x; scratch: 33 floats, free again after the call. */
__device__ __forceinline__ float block_max(float x, float *scratch)
{
    x = warp_max(x);
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = x;
    __syncthreads();
    x = scratch[0];
    for (int w = 1; w < STEP_THREADS / 32; w++) x = fmaxf(x, scratch[w]);
    __syncthreads();
    return x;
}

__device__ __forceinline__ float exponent(float dot, float bias, float sub)
{
    float e = SCAN_LOG2E * dot + (bias * SCAN_LOG2E - sub);
    return e < SCAN_LOW ? SCAN_LOW : e;
}

/* Of an exact score; never below SCAN_LOW, which is above the maximum of nothing. */
__device__ __forceinline__ float window_exponent(float dot)
{
    float e = SCAN_LOG2E * dot;
    return e < SCAN_LOW ? SCAN_LOW : e;
}

/* acc += sum_i weight_i rows_i over (n, d) rows, in columns [c, c + vec) and this thread's group of
 * rows; where `write`, they become step_i row_i + in_i v first. */
template <int vec, bool write, typename E>
__device__ __forceinline__ void stream_rows(E *rows, int64_t n, int d, int c, int group, int groups,
                                            const float *weight, const float *step, const float *in,
                                            const float *v, uint32_t seed, float acc[vec])
{
    float vc[vec];
    if (write) load_vec<vec>(vc, v + c);
    for (int64_t i0 = group; i0 < n; i0 += AHEAD * groups) {
        float row[AHEAD][vec];
#pragma unroll
        for (int a = 0; a < AHEAD; a++)
            if (i0 + a * groups < n) load_row<vec>(row[a], rows + (i0 + a * groups) * d + c);
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            int64_t i = i0 + a * groups;
            if (i >= n) continue;
            float w = weight[i], by = write ? step[i] : 1.0f, add = write ? in[i] : 0.0f;
#pragma unroll
            for (int l = 0; l < vec; l++) {
                if (write) row[a][l] = by * row[a][l] + add * vc[l];
                acc[l] += w * row[a][l];
            }
            if (write) store_state<vec>(rows, i * d + c, row[a], seed);
        }
    }
}

/* The window keys of the ring's half that starts at k (v: window rows and more behind) go into the
 * state. */
template <typename T, int vec, typename E>
__device__ void fold(const struct step_params &a, const struct step_layout &l, float *smem,
                     const T *w, const float *bias, E *s, float *z, float *top, const E *k,
                     const E *v, uint32_t seed)
{
    int m = (int)a.s.m, d = (int)a.s.d, nv = d / vec, cols = min(nv, STEP_THREADS);
    int groups = STEP_THREADS / cols, group = threadIdx.x / cols, col = threadIdx.x % cols;
    float *y = smem + l.fold_y, *vs = smem + l.fold_v, *in = smem + l.fold_in;
    float *by = smem + l.fold_by, *half = smem + l.scratch;
    for (int64_t s0 = 0; s0 < a.s.window; s0 += FOLD) {
        int n = (int)min((int64_t)FOLD, a.s.window - s0);
        __syncthreads();
        for (int i = threadIdx.x; i < FOLD * d; i += STEP_THREADS) {
            bool valid = i < n * d;
            y[i] = valid ? scan_clamp(to_float(k[s0 * d + i]) * a.scale) : 0.0f;
            vs[i] = valid ? to_float(v[s0 * d + i]) : 0.0f;
        }
        __syncthreads();
        int t = threadIdx.x >> 5;
        float sum = 0;
        for (int j = threadIdx.x & 31; j < d; j += 32) sum += y[t * d + j] * y[t * d + j];
        sum = warp_sum(sum);
        if ((threadIdx.x & 31) == 0) half[t] = 0.5f * SCAN_LOG2E * sum;
        for (int i0 = 0; i0 < m; i0 += FOLD_FEATURES) {
            int n_features = min(FOLD_FEATURES, m - i0);
            dot_rows<FOLD, vec>(w + (int64_t)i0 * d, n_features, d, 0.0f, y, in, FOLD_FEATURES);
            __syncthreads();
            for (int i = threadIdx.x; i < n_features; i += STEP_THREADS) {
                float ak[FOLD], z_i = z[i0 + i], old = z_i == 0.0f ? SCAN_UNSET : top[i0 + i];
                float to = old;
#pragma unroll
                for (int c = 0; c < FOLD; c++) {
                    ak[c] = exponent(in[c * FOLD_FEATURES + i], bias[i0 + i], half[c]);
                    if (c < n) to = fmaxf(to, rintf(ak[c]));
                }
                by[i] = scan_pow2(old - to);
                z_i *= by[i];
#pragma unroll
                for (int c = 0; c < FOLD; c++) {
                    float e = rintf(ak[c]), weight = c < n ? scan_exp2(ak[c] - e, e - to) : 0.0f;
                    in[c * FOLD_FEATURES + i] = weight;
                    z_i += weight;
                }
                z[i0 + i] = z_i;
                top[i0 + i] = to;
            }
            __syncthreads();
            for (int c = col * vec; group < groups && c < d; c += cols * vec)
                for (int i = group; i < n_features; i += groups) {
                    int64_t at = (int64_t)(i0 + i) * d + c;
                    float row[vec];
                    load_row<vec>(row, s + at);
#pragma unroll
                    for (int e = 0; e < vec; e++) row[e] *= by[i];
#pragma unroll
                    for (int q = 0; q < FOLD; q++) {
                        float weight = in[q * FOLD_FEATURES + i], vq[vec];
                        load_vec<vec>(vq, vs + q * d + c);
#pragma unroll
                        for (int e = 0; e < vec; e++) row[e] += weight * vq[e];
                    }
                    store_state<vec>(s, at, row, seed + (uint32_t)s0);
                }
            __syncthreads();
        }
    }
}

/* E: the type that states are stored in. */
template <typename T, typename E, int vec, bool hybrid>
__global__ void __launch_bounds__(STEP_THREADS, hybrid ? 3 : 4)
    step_kernel(const struct step_params a)
{
    extern __shared__ float4 shared[];
    float *smem = (float *)shared;
    const struct srf_attn_shape &sh = a.s;
    struct step_layout l = step_layout_of(sh, vec);
    int64_t block = blockIdx.x, seq = block / sh.h, head = block - seq * sh.h, window = sh.window;
    int m = (int)sh.m, d = (int)sh.d, tid = threadIdx.x;
    int64_t set = sh.n_sets == 1 ? 0 : head, in_row = seq * a.ld + head * d;
    const T *w = (const T *)a.w + set * m * d;
    const float *bias = a.bias + set * m;
    E *s = (E *)(a.state + block * a.state_bytes);
    float *z = (float *)(s + (int64_t)m * d), *top = z + m;
    float *x = smem + l.x, *v = smem + l.v, *out = smem + l.dot, *in = out + m;
    float *step = smem + l.step, *red = smem + l.red, *scratch = smem + l.scratch;
    chain_next();
    chain_wait();
    int32_t at_pos = a.pos ? a.pos[seq] : 0;
    T *o = (T *)a.o + seq * a.ld_o + head * d;
    if (at_pos < 0) { /* idle */
        for (int j = tid; j < d; j += STEP_THREADS) o[j] = from_float<T>(0.0f);
        return;
    }
    uint32_t seed = step_seed(head, at_pos);
    const int odd = hybrid ? at_pos / (int)window & 1 : 0,
              ring_row = hybrid ? at_pos % (int)window : 0;
    if (hybrid && tid == 0) { /* all at once: what follows goes from one to the next */
        const E *k = (const E *)(top + m), *v_rows = k + 2 * window * d;
        const int64_t here = odd * window * d, there = (1 - odd) * window * d;
        const int64_t before = at_pos >= window ? window : 0;
        ask_for(k + here, ring_row, d);
        ask_for(k + there, before, d);
        if (at_pos >= 2 * window) ask_for(s, m, d);
        ask_for(v_rows + here, ring_row, d);
        ask_for(v_rows + there, before, d);
    }
    bool far = !hybrid || z[0] != 0.0f;

    if (far &&
        !hybrid) /* wanted soon; more than its start would drive that of other blocks out of L2 */
        for (int64_t i = (int64_t)tid * 32; i < min((int64_t)EARLY, (int64_t)m * d);
             i += STEP_THREADS * 32)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(s + i));

    float q2 = 0, k2 = 0;
    for (int j = tid; j < d; j += STEP_THREADS) {
        x[j] = scan_clamp(to_float(((const T *)a.q)[in_row + j]) * a.scale);
        x[d + j] = scan_clamp(to_float(((const T *)a.k)[in_row + j]) * a.scale);
        v[j] = to_float(((const T *)a.v)[in_row + j]);
        q2 += x[j] * x[j];
        k2 += x[d + j] * x[d + j];
    }
    int nv = d / vec, cols = min(nv, STEP_THREADS), groups = STEP_THREADS / cols;
    int group = tid / cols, col = tid % cols;
    float r = SCAN_UNSET, den = 0;

    /* The exact part: token p of the sequence is in row p % (2 window) of the ring. */
    int64_t pos = hybrid ? at_pos : 0, own = 0, seen = 0;
    E *ring_k[2] = {nullptr, nullptr}; /* own block, the one before */
    float *p = smem + l.p;
    if (hybrid) {
        const int64_t row = ring_row;
        ring_k[0] = (E *)(top + m) + odd * window * d;
        ring_k[1] = (E *)(top + m) + (1 - odd) * window * d;
        for (int j = tid; j < d; j += STEP_THREADS) {
            ring_k[0][row * d + j] = from_float<E>(to_float(((const T *)a.k)[in_row + j]));
            ring_k[0][(2 * window + row) * d + j] = from_float<E>(v[j]);
        }
        own = row + 1;
        seen = pos >= window ? own + window : own;
        __syncthreads();
        dot_rows<1, vec>(ring_k[0], own, d, a.scale, x, p, 0);
        dot_rows<1, vec>(ring_k[1], seen - own, d, a.scale, x, p + own, 0);
        __syncthreads();
        for (int64_t i = tid; i < seen; i += STEP_THREADS) {
            p[i] = window_exponent(p[i]);
            r = fmaxf(r, rintf(p[i]));
        }
    }

    float half_q = 0, half_k = 0, shift = 0;
    if (hybrid) {
        half_q = 0.5f * SCAN_LOG2E * block_sum(q2, scratch);
        shift = log2f((float)m);
    } else {
        half_k = 0.5f * SCAN_LOG2E * block_sum(k2, scratch); /* |x|^2 / 2 cancels */
    }
    if (far) dot_rows<hybrid ? 1 : 2, vec>(w, m, d, 0.0f, x, out, m);
    __syncthreads();
    for (int i = tid; far && i < m; i += STEP_THREADS) {
        float z_i = z[i], m_i = z_i == 0.0f ? SCAN_UNSET : top[i];
        float aq = exponent(out[i], bias[i], half_q + shift);
        if (!hybrid) {
            float ak = exponent(in[i], bias[i], half_k), e = rintf(ak), to = fmaxf(m_i, e);
            step[i] = scan_pow2(m_i - to);
            in[i] = scan_exp2(ak - e, e - to);
            z[i] = step[i] * z_i + in[i];
            top[i] = m_i = to;
        }
        out[i] = aq;
        r = fmaxf(r, rintf(aq) + m_i);
    }
    r = block_max(r, scratch);
    for (int i = tid; far && i < m; i += STEP_THREADS) {
        float e = rintf(out[i]);
        out[i] = scan_exp2(out[i] - e, (e + top[i]) - r);
        den += out[i] * z[i];
    }
    for (int64_t i = tid; i < seen; i += STEP_THREADS) {
        float e = rintf(p[i]);
        p[i] = scan_exp2(p[i] - e, e - r);
        den += p[i];
    }
    den = block_sum(den, scratch); /* and the weights are complete */

    for (int c = col * vec; group < groups && c < d; c += cols * vec) {
        float acc[vec] = {0};
        if (hybrid) {
            int64_t v_rows = 2 * window * d;
            stream_rows<vec, false>(ring_k[0] + v_rows, own, d, c, group, groups, p, nullptr,
                                    nullptr, nullptr, 0, acc);
            stream_rows<vec, false>(ring_k[1] + v_rows, seen - own, d, c, group, groups, p + own,
                                    nullptr, nullptr, nullptr, 0, acc);
        }
        if (far) stream_rows<vec, !hybrid>(s, m, d, c, group, groups, out, step, in, v, seed, acc);
        store_vec<vec>(red + group * d + c, acc);
    }
    __syncthreads();
    for (int j = tid; j < d; j += STEP_THREADS) {
        float sum = 0;
        for (int g = 0; g < groups; g++) sum += red[g * d + j];
        o[j] = from_float<T>(sum / den);
    }
    if (hybrid && own == window && pos >= window)
        fold<T, vec>(a, l, smem, w, bias, s, z, top, ring_k[1], ring_k[1] + 2 * window * d, seed);
}

template <typename T, typename E>
static void (*kernel_of(int vec, bool hybrid))(const struct step_params)
{
    if (vec == 4) return hybrid ? step_kernel<T, E, 4, true> : step_kernel<T, E, 4, false>;
    return hybrid ? step_kernel<T, E, 1, true> : step_kernel<T, E, 1, false>;
}

srf_status srf__scan_step(struct srf_ctx *ctx, const struct srf_srf_attn_step_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    bool hybrid = s->window > 0;
    SRF_FAIL_IF(a->state_bf16 && (ctx->dtype != SRF_BF16 || s->m * s->d % 2), SRF_UNSUPPORTED,
                "states in bf16: for bf16 and an even number of features times head size, not %s "
                "and %lld x %lld",
                srf_dtype_name(ctx->dtype), (long long)s->m, (long long)s->d);
    struct step_params p = {};
    p.s = *s;
    p.scale = (float)pow((double)s->d, -0.25);
    p.q = a->q, p.k = a->k, p.v = a->v, p.w = a->w, p.o = a->o;
    p.ld = a->ld, p.ld_o = a->ld_o;
    p.bias = (const float *)a->bias;
    p.state = (char *)a->state;
    p.state_bytes = a->state_bf16
                        ? srf_attn_state_bf16_bytes(s->m, s->d, s->window)
                        : srf_attn_state_count(s->m, s->d, s->window) * (int64_t)sizeof(float);
    p.pos = (const int32_t *)a->pos;
    srf_status status;
    if (srf__step_bulk(ctx, &p, a->state_bf16, &status)) return status;
    bool aligned = s->d % 4 == 0 && p.state_bytes % 16 == 0 && (s->m * 2) % 4 == 0 &&
                   (((uintptr_t)a->state | (uintptr_t)a->w) & 15) == 0;
    int vec = aligned ? 4 : 1;
    size_t bytes = (size_t)step_layout_of(*s, vec).floats * sizeof(float);
    SRF_TRY(srf__scan_check(ctx, s, bytes));
    auto kernel = a->state_bf16            ? kernel_of<bf16, bf16>(vec, hybrid)
                  : ctx->dtype == SRF_BF16 ? kernel_of<bf16, float>(vec, hybrid)
                                           : kernel_of<float, float>(vec, hybrid);
    CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    const struct chain_shape shape = {dim3((unsigned)(s->b * s->h)), STEP_THREADS, bytes, 1};
    chain_launch(ctx, shape, kernel, p);
    return srf__cuda_launched("srf_attn_step");
}
