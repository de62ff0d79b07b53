/* Linear attention with trained feature maps (kernels/ops.h): rivals, for comparisons. Quadratic in
 * the length, as softmax attention is; it has to say how good such models get, not how fast.
 *
 * Forward: the features f, g of all tokens into the workspace, in T; then attention over them
 * (map_attn_mma.cu, map_attn_any.cu). Backward: features again, attention's dQ, dK, dV and the
 * features' gradients, then through the maps, which adds to dQ and dK what came through the
 * features; the gradients of W come from sums over pieces of the tokens, which are added in order:
 * results do not depend on timing.
 *
 * What a map makes of u = W x, and backward of df: a row of m floats of the workspace becomes
 *     T2R       du_i
 *     HEDGEHOG  du_i (m / 2), dc_i (m / 2)
 *
 * Floor: as SRF attention; attention itself is at the floor of softmax attention, twice that
 * beside a window where both kinds of scores are made.
 */
#include "kernels/cuda/map_attn.h"

#define THREADS 256
#define ROWS    64 /* tokens of a block, and rows of W at a time */
#define CHUNK   32 /* tokens staged at a time for dW */
#define PIECES  32 /* pieces of the tokens for dW, at most */
#define MAX_D   128
#define MAX_M   256

/* Floats of a row in shared memory: an odd multiple of 4, against bank conflicts. */
__host__ __device__ __forceinline__ int row_floats(int d)
{
    int n = (d + 3) / 4 * 4;
    return n % 8 ? n : n + 4;
}
/* Rows of W that a side (0 queries, 1 keys) has, and the first of them. */
__host__ __device__ __forceinline__ int side_rows(const struct map_attn *a)
{
    return a->t2r ? a->m : a->m / 2;
}
template <typename T>
static __device__ __forceinline__ const T *side_w(const struct map_attn *a, int head, int side)
{
    int first = head % a->h * a->m + (a->t2r ? 0 : side * (a->m / 2));
    return (const T *)a->w + (int64_t)first * (a->d + 1);
}

/* Up to ROWS rows from src as floats, `valid` of them there, the rest zeros. */
template <typename T>
static __device__ void load_rows(float *to, const T *src, int64_t ld, int valid, int d)
{
    int n = row_floats(d);
    for (int i = threadIdx.x; i < ROWS * n; i += THREADS) {
        int r = i / n, j = i % n;
        to[i] = r < valid && j < d ? to_float(src[r * ld + j]) : 0.0f;
    }
}

/* u (ROWS, r) = x W^T. Thread (y, x) has tokens y + 16 i, rows of W x + 16 j. */
template <typename T>
static __device__ void make_u(const struct map_attn *a, const T *w, const float *xs, float *ws,
                              float *u)
{
    int n = row_floats(a->d), nu = row_floats(a->m), r = side_rows(a);
    int tx = threadIdx.x & 15, ty = threadIdx.x >> 4;
    for (int f0 = 0; f0 < r; f0 += ROWS) {
        __syncthreads();
        load_rows(ws, w + (int64_t)f0 * (a->d + 1), a->d + 1, r - f0, a->d);
        __syncthreads();
        float acc[4][4] = {};
        for (int j = 0; j < a->d; j += 4) {
            float4 x[4], y[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                x[i] = *(const float4 *)(xs + (ty + 16 * i) * n + j);
                if (16 * i < r - f0) y[i] = *(const float4 *)(ws + (tx + 16 * i) * n + j);
            }
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int i = 0; i < 4 && 16 * k < r - f0; i++)
                    acc[i][k] = fmaf(x[i].x, y[k].x,
                                     fmaf(x[i].y, y[k].y,
                                          fmaf(x[i].z, y[k].z, fmaf(x[i].w, y[k].w, acc[i][k]))));
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int f = f0 + tx + 16 * k;
                if (f < r) u[(ty + 16 * i) * nu + f] = acc[i][k];
            }
    }
    __syncthreads();
}

/* Of a row of u: the largest of sign u and the sum of e^(sign u - it). */
static __device__ __forceinline__ float2 softmax_of(const float *u, float sign, int r)
{
    int lane = threadIdx.x & 31;
    float most = -INFINITY, sum = 0.0f;
    for (int i = lane; i < r; i += 32) most = fmaxf(most, sign * u[i]);
    most = warp_max(most);
    for (int i = lane; i < r; i += 32) sum += expf(sign * u[i] - most);
    return make_float2(most, warp_sum(sum));
}

/* Shared memory: x, rows of W, u. */
static int features_floats(const struct map_attn *a)
{
    return ROWS * (2 * row_floats(a->d) + row_floats(a->m));
}

template <typename T>
static __global__ __launch_bounds__(THREADS) void features_kernel(const struct map_attn a)
{
    extern __shared__ __align__(16) float smem[];
    int n = row_floats(a.d), nu = row_floats(a.m), r = side_rows(&a), lane = threadIdx.x & 31;
    float *xs = smem, *ws = xs + ROWS * n, *u = ws + ROWS * n;
    int t0 = (int)blockIdx.x * ROWS, head = (int)blockIdx.y, side = (int)blockIdx.z;
    const T *w = side_w<T>(&a, head, side);
    const T *x = (const T *)(side ? a.k : a.q) + map_head_at(&a, head, a.ld) + t0 * a.ld;
    T *f = (T *)(side ? a.fk : a.fq) + ((int64_t)head * a.t + t0) * a.m;
    load_rows(xs, x, a.ld, a.t - t0, a.d);
    make_u(&a, w, xs, ws, u);
    for (int t = threadIdx.x >> 5; t < min(ROWS, a.t - t0); t += THREADS / 32) {
        const float *own = u + t * nu;
        T *to = f + (int64_t)t * a.m;
        if (a.t2r) {
            for (int i = lane; i < r; i += 32) {
                float y = own[i] + to_float(w[(int64_t)i * (a.d + 1) + a.d]);
                to[i] = from_float<T>(y < 0.0f ? 0.0f : y);
            }
            continue;
        }
        float2 plus = softmax_of(own, 1.0f, r), minus = softmax_of(own, -1.0f, r);
        for (int i = lane; i < r; i += 32) {
            float c = expf(to_float(w[(int64_t)i * (a.d + 1) + a.d]));
            to[i] = from_float<T>(c * expf(own[i] - plus.x) / plus.y);
            to[r + i] = from_float<T>(c * expf(-own[i] - minus.x) / minus.y);
        }
    }
}

__device__ __forceinline__ void add4(float acc[4], float x, float4 y)
{
    acc[0] = fmaf(x, y.x, acc[0]);
    acc[1] = fmaf(x, y.y, acc[1]);
    acc[2] = fmaf(x, y.z, acc[2]);
    acc[3] = fmaf(x, y.w, acc[3]);
}

/* df -> du, dc in its place; dx += du W. */
template <typename T>
static __global__ __launch_bounds__(THREADS) void features_bwd_kernel(const struct map_attn a)
{
    extern __shared__ __align__(16) float smem[];
    int n = row_floats(a.d), nu = row_floats(a.m), r = side_rows(&a), lane = threadIdx.x & 31;
    float *xs = smem, *ws = xs + ROWS * n, *u = ws + ROWS * n;
    int t0 = (int)blockIdx.x * ROWS, head = (int)blockIdx.y, side = (int)blockIdx.z;
    int valid = min(ROWS, a.t - t0);
    int64_t in = map_head_at(&a, head, a.ld) + t0 * a.ld;
    const T *w = side_w<T>(&a, head, side);
    float *df = (side ? a.dfk : a.dfq) + ((int64_t)head * a.t + t0) * a.m;
    T *dx = (T *)(side ? a.dk : a.dq) + in;
    load_rows(xs, (const T *)(side ? a.k : a.q) + in, a.ld, valid, a.d);
    make_u(&a, w, xs, ws, u);
    for (int t = threadIdx.x >> 5; t < ROWS; t += THREADS / 32) {
        float *own = u + t * nu, *d_own = df + (int64_t)t * a.m;
        int first = t < valid ? r : 0; /* behind them, zeros: rows are multiplied by fours */
        for (int i = first + lane; i < nu; i += 32) own[i] = 0.0f;
        if (t >= valid) continue;
        if (a.t2r) {
            for (int i = lane; i < r; i += 32) {
                float y = own[i] + to_float(w[(int64_t)i * (a.d + 1) + a.d]);
                own[i] = y > 0.0f ? d_own[i] : 0.0f;
                d_own[i] = own[i];
            }
            continue;
        }
        float2 plus = softmax_of(own, 1.0f, r), minus = softmax_of(own, -1.0f, r);
        float sum_plus = 0.0f, sum_minus = 0.0f;
        for (int i = lane; i < r; i += 32) {
            float c = expf(to_float(w[(int64_t)i * (a.d + 1) + a.d]));
            sum_plus += c * expf(own[i] - plus.x) / plus.y * d_own[i];
            sum_minus += c * expf(-own[i] - minus.x) / minus.y * d_own[r + i];
        }
        sum_plus = warp_sum(sum_plus);
        sum_minus = warp_sum(sum_minus);
        for (int i = lane; i < r; i += 32) {
            float c = expf(to_float(w[(int64_t)i * (a.d + 1) + a.d]));
            float p = expf(own[i] - plus.x) / plus.y, q = expf(-own[i] - minus.x) / minus.y;
            float dp = c * p * d_own[i], dq = c * q * d_own[r + i];
            own[i] = dp - p * sum_plus - (dq - q * sum_minus);
            d_own[i] = own[i];
            d_own[r + i] = dp + dq;
        }
    }
    int tx = threadIdx.x & 15, ty = threadIdx.x >> 4;
    for (int c0 = 0; c0 < a.d; c0 += 64) {
        float acc[4][4] = {};
        int c = c0 + 4 * tx;
        for (int f0 = 0; f0 < r; f0 += ROWS) {
            __syncthreads();
            load_rows(ws, w + (int64_t)f0 * (a.d + 1), a.d + 1, r - f0, a.d);
            __syncthreads();
            for (int f = 0; f < min(ROWS, r - f0); f += 4) {
                float4 x[4], y[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    x[i] = *(const float4 *)(u + (ty + 16 * i) * nu + f0 + f);
                    y[i] =
                        c < n ? *(const float4 *)(ws + (f + i) * n + c) : make_float4(0, 0, 0, 0);
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    add4(acc[i], x[i].x, y[0]);
                    add4(acc[i], x[i].y, y[1]);
                    add4(acc[i], x[i].z, y[2]);
                    add4(acc[i], x[i].w, y[3]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int t = ty + 16 * i;
                if (t >= valid || c + k >= a.d) continue;
                T *to = dx + t * a.ld + c + k;
                *to = from_float<T>(to_float(*to) + acc[i][k]);
            }
    }
}

/* A piece's sum of du x^T and dc: 64 rows of W by 64 columns, and with the first of these dc. */
struct dw_args {
    float *sums;   /* (2 sides, pieces, h, m, d + 1) */
    int64_t count; /* b t */
    int pieces;
};
template <typename T>
static __global__ __launch_bounds__(THREADS) void dw_kernel(const struct map_attn a,
                                                            const struct dw_args p)
{
    __shared__ __align__(16) float xs[CHUNK][64 + 4], du[CHUNK][64 + 4], dc[CHUNK][64 + 4];
    int r = side_rows(&a), row_tiles = (r + 63) / 64, col_tiles = (a.d + 63) / 64;
    int head = (int)blockIdx.x / row_tiles, f0 = (int)blockIdx.x % row_tiles * 64;
    int piece = (int)blockIdx.y, side = (int)blockIdx.z / col_tiles;
    int c0 = (int)blockIdx.z % col_tiles * 64, tx = threadIdx.x & 15, ty = threadIdx.x >> 4;
    int64_t each = (p.count + p.pieces - 1) / p.pieces, first = piece * each;
    int64_t last = first + each < p.count ? first + each : p.count;
    const float *df = side ? a.dfk : a.dfq;
    float acc[4][4] = {}, sum = 0.0f;
    for (int64_t n0 = first; n0 < last; n0 += CHUNK) {
        int64_t b0 = n0 / a.t;
        int at0 = (int)(n0 - b0 * a.t), j = threadIdx.x % 64;
        __syncthreads();
        for (int row = threadIdx.x / 64; row < CHUNK; row += THREADS / 64) {
            int64_t b = b0;
            int t = at0 + row;
            for (; t >= a.t; t -= a.t) b++;
            const T *x = (const T *)(side ? a.k : a.q) + (b * a.t + t) * a.ld + head * a.d;
            const float *f = df + ((b * a.h + head) * a.t + t) * a.m;
            bool there = n0 + row < last, has_row = there && f0 + j < r;
            xs[row][j] = there && c0 + j < a.d ? to_float(x[c0 + j]) : 0.0f;
            du[row][j] = has_row ? f[f0 + j] : 0.0f;
            if (c0 == 0) dc[row][j] = has_row ? f[(a.t2r ? 0 : r) + f0 + j] : 0.0f;
        }
        __syncthreads();
        for (int t = 0; t < CHUNK; t++) {
            float4 x = *(const float4 *)&du[t][4 * ty], y = *(const float4 *)&xs[t][4 * tx];
            add4(acc[0], x.x, y);
            add4(acc[1], x.y, y);
            add4(acc[2], x.z, y);
            add4(acc[3], x.w, y);
            if (c0 == 0 && threadIdx.x < 64) sum += dc[t][threadIdx.x];
        }
    }
    int row0 = (a.t2r ? 0 : side * r) + f0;
    float *to = p.sums + ((int64_t)(side * p.pieces + piece) * a.h + head) * a.m * (a.d + 1);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int k = 0; k < 4; k++) {
            int f = 4 * ty + i, c = c0 + 4 * tx + k;
            if (f0 + f < r && c < a.d) to[(int64_t)(row0 + f) * (a.d + 1) + c] = acc[i][k];
        }
    if (c0 == 0 && threadIdx.x < 64 && f0 + (int)threadIdx.x < r)
        to[(int64_t)(row0 + (int)threadIdx.x) * (a.d + 1) + a.d] = sum;
}

/* dw += the pieces, in order. */
static __global__ void dw_sum_kernel(const struct map_attn a, const struct dw_args p, float *dw)
{
    int64_t n = (int64_t)a.h * a.m * (a.d + 1), i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int row = (int)(i / (a.d + 1) % a.m), r = side_rows(&a);
    int from = a.t2r ? 0 : row / r, to = a.t2r ? 2 : from + 1;
    float sum = 0.0f;
    for (int j = from * p.pieces; j < to * p.pieces; j++) sum += p.sums[j * n + i];
    dw[i] += sum;
}

/* ---- arguments and workspace ---------------------------------------------------------------- */

static srf_status check(const struct srf_attn_shape *s, enum srf_map_kind map, int64_t ld,
                        int64_t ld_o)
{
    SRF_TRY(srf__map_attn_check(s, map, ld, ld_o));
    SRF_FAIL_IF(s->d > MAX_D || s->m > MAX_M, SRF_UNSUPPORTED,
                "attention with trained maps on CUDA takes head sizes up to %d and up to %d "
                "features, not %lld and %lld",
                MAX_D, MAX_M, (long long)s->d, (long long)s->m);
    /* A block has at least 8 rows of one head; heads are a grid's second dimension. */
    SRF_FAIL_IF(s->t > INT32_MAX - 1024 || s->b * s->h > 65535 ||
                    s->b * s->h > INT32_MAX / div_up(s->t ? s->t : 1, 8),
                SRF_UNSUPPORTED,
                "attention with trained maps on CUDA: b=%lld t=%lld h=%lld is too large",
                (long long)s->b, (long long)s->t, (long long)s->h);
    return SRF_OK;
}

static struct map_attn args_of(const struct srf_attn_shape *s, enum srf_map_kind map, int64_t ld,
                               int64_t ld_o)
{
    struct map_attn p = {};
    p.ld = ld, p.ld_o = ld_o;
    p.t = (int)s->t, p.h = (int)s->h, p.d = (int)s->d, p.m = (int)s->m;
    p.heads = (int)(s->b * s->h);
    p.window = (int)(s->window < s->t + 1 ? s->window : s->t + 1);
    p.row_stride = (int)(div_up(s->t, MAP_ROW_PAD) * MAP_ROW_PAD);
    p.t2r = map == SRF_MAP_T2R;
    p.scale = (float)(1 / sqrt((double)s->d));
    return p;
}

static int64_t n_features(const struct srf_attn_shape *s)
{
    return s->b * s->h * s->t * s->m;
}

static int pieces_of(const struct srf_attn_shape *s)
{
    int64_t n = div_up(s->b * s->t, 256);
    return (int)(n < 1 ? 1 : n < PIECES ? n : PIECES);
}

/* Where forward's workspace is, and backward's, which begins alike. */
static void carve_features(const struct srf_ctx *ctx, const struct srf_attn_shape *s,
                           struct cuda_bump *b, struct map_attn *p)
{
    size_t bytes = (size_t)n_features(s) * srf_dtype_bytes(ctx->dtype);
    p->fq = bump_bytes(b, bytes);
    p->fk = bump_bytes(b, bytes);
}
static void carve_bwd(const struct srf_ctx *ctx, const struct srf_map_attn_bwd_args *a,
                      struct cuda_bump *b, struct map_attn *p, struct dw_args *dw)
{
    const struct srf_attn_shape *s = &a->s;
    carve_features(ctx, s, b, p);
    p->dfq = (float *)bump_bytes(b, (size_t)n_features(s) * sizeof(float));
    p->dfk = (float *)bump_bytes(b, (size_t)n_features(s) * sizeof(float));
    p->rows = (float2 *)bump_bytes(
        b, (size_t)(s->b * s->h * div_up(s->t, MAP_ROW_PAD) * MAP_ROW_PAD) * sizeof(float2));
    dw->pieces = pieces_of(s);
    dw->count = s->b * s->t;
    dw->sums = NULL;
    if (!a->dw) return;
    int64_t sums = 2 * dw->pieces * s->h * s->m * (s->d + 1);
    dw->sums = (float *)bump_bytes(b, (size_t)sums * sizeof(float));
}

/* ---- launches ------------------------------------------------------------------------------- */

typedef void kernel(const struct map_attn);

static srf_status launch_rows(struct srf_ctx *ctx, const struct map_attn *a, kernel *f)
{
    size_t smem = (size_t)features_floats(a) * sizeof(float);
    SRF_FAIL_IF(smem > cuda_of(ctx)->smem_max, SRF_UNSUPPORTED,
                "attention with trained maps: head size %d and %d features need %zu bytes of "
                "shared memory, this device has %zu",
                a->d, a->m, smem, cuda_of(ctx)->smem_max);
    CUDA_TRY(cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
    dim3 grid((unsigned)div_up(a->t, ROWS), (unsigned)a->heads, 2);
    f<<<grid, THREADS, smem, stream_of(ctx)>>>(*a);
    return srf__cuda_launched("map_attn");
}

static srf_status features(struct srf_ctx *ctx, const struct map_attn *a)
{
    return launch_rows(ctx, a,
                       ctx->dtype == SRF_BF16 ? features_kernel<bf16> : features_kernel<float>);
}

extern "C" size_t cuda_map_attn_fwd_workspace(const struct srf_ctx *ctx,
                                              const struct srf_map_attn_fwd_args *a)
{
    struct cuda_bump b = {};
    struct map_attn p = {};
    carve_features(ctx, &a->s, &b, &p);
    return b.used;
}

extern "C" srf_status cuda_map_attn_fwd(struct srf_ctx *ctx, const struct srf_map_attn_fwd_args *a)
{
    SRF_TRY(check(&a->s, a->map, a->ld, a->ld_o));
    if (a->s.b * a->s.t == 0) return SRF_OK;
    struct map_attn p = args_of(&a->s, a->map, a->ld, a->ld_o);
    struct cuda_bump b = {(char *)ctx->workspace, 0};
    p.q = a->q, p.k = a->k, p.v = a->v, p.w = a->w, p.out = a->o, p.stat = (float *)a->stat;
    carve_features(ctx, &a->s, &b, &p);
    SRF_TRY(features(ctx, &p));
    return srf__map_mma_takes(ctx, &p) ? srf__map_mma_fwd(ctx, &p) : srf__map_any_fwd(ctx, &p);
}

extern "C" size_t cuda_map_attn_bwd_workspace(const struct srf_ctx *ctx,
                                              const struct srf_map_attn_bwd_args *a)
{
    struct cuda_bump b = {};
    struct map_attn p = {};
    struct dw_args dw;
    carve_bwd(ctx, a, &b, &p, &dw);
    return b.used;
}

extern "C" srf_status cuda_map_attn_bwd(struct srf_ctx *ctx, const struct srf_map_attn_bwd_args *a)
{
    SRF_TRY(check(&a->s, a->map, a->ld, a->ld_o));
    if (a->s.b * a->s.t == 0) return SRF_OK;
    struct map_attn p = args_of(&a->s, a->map, a->ld, a->ld_o);
    struct cuda_bump b = {(char *)ctx->workspace, 0};
    struct dw_args dw;
    bool bf = ctx->dtype == SRF_BF16;
    p.q = a->q, p.k = a->k, p.v = a->v, p.w = a->w, p.o = a->o, p.d_o = a->d_o;
    p.stat = (float *)a->stat, p.dq = a->dq, p.dk = a->dk, p.dv = a->dv;
    carve_bwd(ctx, a, &b, &p, &dw);
    SRF_TRY(features(ctx, &p));
    SRF_TRY(srf__map_mma_takes(ctx, &p) ? srf__map_mma_bwd(ctx, &p) : srf__map_any_bwd(ctx, &p));
    SRF_TRY(launch_rows(ctx, &p, bf ? features_bwd_kernel<bf16> : features_bwd_kernel<float>));
    if (!a->dw) return SRF_OK;
    int64_t row_tiles = div_up(side_rows(&p), 64), n = (int64_t)p.h * p.m * (p.d + 1);
    dim3 grid((unsigned)(p.h * row_tiles), (unsigned)dw.pieces, (unsigned)(2 * div_up(p.d, 64)));
    if (bf)
        dw_kernel<bf16><<<grid, THREADS, 0, stream_of(ctx)>>>(p, dw);
    else
        dw_kernel<float><<<grid, THREADS, 0, stream_of(ctx)>>>(p, dw);
    SRF_TRY(srf__cuda_launched("map_attn_bwd"));
    dw_sum_kernel<<<(unsigned)div_up(n, THREADS), THREADS, 0, stream_of(ctx)>>>(p, dw,
                                                                                (float *)a->dw);
    return srf__cuda_launched("map_attn_bwd");
}
