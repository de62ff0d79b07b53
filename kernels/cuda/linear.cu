/* Linear layers: y = act(x W + b), by cuBLASLt.
 *
 *     forward    u = x W + b,  y = act(u)
 *     backward   dx = (dy W^T) act'(x_pre),  dw += x^T dy,  db += sum_n dy,  dx_sum += sum_n dx
 *
 * Row-major arrays are read as the column-major transposes that BLAS knows: y^T = W^T x^T and so
 * on, no copies. Products of bf16 are summed in fp32; fp32 is computed in fp32, without TF32. dw is
 * fp32 and the product is added to it. What can ride in the product's epilogue does: bias, residual
 * (as beta C), GELU and its derivative. Where it cannot (GELU in fp32 mode, a derivative that is to
 * be added to dx, arrays not aligned to 16 bytes) the product goes to the workspace in fp32, some
 * rows at a time, and a kernel of ours does the rest.
 * Products of our own (product.h) do what no epilogue does as well: act and its slope of one tanh,
 * where that is kept; dx times a slope, with dx's column sums; of many rows, dx and with it db,
 * sums of the dy that it reads. Where they cannot, a kernel reads dy once for db. Partial sums are
 * left in the workspace and added in order. Forward of a few rows, as in decoding, has a kernel of
 * its own (linear_few.cu), and so has fp32 with exact_rows (linear_exact.cu).
 *
 * What cuBLASLt answers to a question (which algorithm for these shapes, types, alignments) is kept
 * in ctx->impl->plans: a training step asks only the first time.
 * Floor: tensor cores; 2 n in out flops forward, twice that backward: 990 Tflop/s on an H100. */
#include "kernels/cuda/gelu.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/product.h"
#include "kernels/cuda/slope.h"

#include <string.h>

#define BLAS_BYTES  ((size_t)32 << 20) /* of the workspace: cuBLASLt's */
#define PIECE_BYTES ((size_t)16 << 20) /* of the workspace: products that we finish */
#define THREADS     256
#define WARPS       (THREADS / 32)
#define CANDIDATES  8    /* algorithms that cuBLASLt is asked for */
#define SUM_BLOCKS  6    /* of a multiprocessor, for db */
#define LIKE_ROWS   256  /* one algorithm for so many numbers of rows */
#define MANY_ROWS   8192 /* from here on dx with db may be a product of our own */

/* ---- products ------------------------------------------------------------------------------- */

/* D = op(A) op(B), or += with add; then the epilogue. Column-major, dense: D (m, n), op(A) (m, k),
 * op(B) (k, n). A and B are of type T. */
struct product {
    int64_t m, n, k;
    bool a_trans, b_trans;
    const void *a, *b;
    const void *c; /* D = ... + C; may be d, or NULL */
    void *d;
    bool d_f32; /* C and D are fp32 whatever T is */
    cublasLtEpilogue_t epilogue;
    const void *bias; /* T (m) */
    const void *aux;  /* T (m, n): out (GELU_AUX) or in (DGELU) */
    int64_t like;     /* the algorithm is that of so many columns, for any n; 0: of n */
};

/* Everything that the choice of an algorithm depends on. No padding: compared as bytes. */
struct plan_key {
    int64_t m, n, k, any_n;
    int32_t a_trans, b_trans, type_ab, type_d, has_c, epilogue;
    int32_t align[4]; /* of a, b, c, d in bytes */
};

struct plan {
    bool used;
    struct plan_key key;
    cublasStatus_t status; /* of the search; an algorithm was found if it is SUCCESS */
    cublasLtMatmulDescOpaque_t desc;
    cublasLtMatrixLayoutOpaque_t a, b, d; /* C is laid out as D */
    cublasLtMatmulAlgo_t algo;
};

/* A hash table; where a row of PLAN_PROBES slots is full the first is given up, so that prompts of
 * ever new lengths do not fill the memory. */
#define N_PLANS     512
#define PLAN_PROBES 8
struct plans {
    struct plan slot[N_PLANS + PLAN_PROBES];
};

void srf__cuda_free_plans(struct srf__cuda *cuda)
{
    srf__free(cuda->plans);
    cuda->plans = NULL;
}

/* Tensors begin at multiples of 128 bytes, or of an element: more detail would only make more
 * plans. */
static int32_t alignment(const void *p)
{
    uintptr_t low = (uintptr_t)p & (~(uintptr_t)p + 1);
    return low == 0 || low >= 128 ? 128 : low >= 16 ? 16 : (int32_t)low;
}

static struct plan_key key_of(const struct srf_ctx *ctx, const struct product *p)
{
    struct plan_key key;
    memset(&key, 0, sizeof key);
    key.m = p->m, key.n = p->like ? p->like : p->n, key.k = p->k, key.any_n = p->like != 0;
    key.a_trans = p->a_trans, key.b_trans = p->b_trans;
    key.type_ab = ctx->dtype == SRF_BF16 ? CUDA_R_16BF : CUDA_R_32F;
    key.type_d = p->d_f32 ? CUDA_R_32F : key.type_ab;
    key.has_c = p->c != NULL;
    key.epilogue = p->epilogue;
    key.align[0] = alignment(p->a), key.align[1] = alignment(p->b);
    key.align[2] = alignment(p->c ? p->c : p->d), key.align[3] = alignment(p->d);
    return key;
}

#define BLAS_TRY(call)                                                                             \
    do {                                                                                           \
        cublasStatus_t blas_ = (call);                                                             \
        SRF_FAIL_IF(blas_ != CUBLAS_STATUS_SUCCESS, SRF_DEVICE, "cuBLASLt: %s: %s", #call,         \
                    cublasGetStatusString(blas_));                                                 \
    } while (0)

static srf_status set_desc(struct plan *plan, cublasLtMatmulDescAttributes_t attribute,
                           const void *value, size_t bytes)
{
    BLAS_TRY(cublasLtMatmulDescSetAttribute(&plan->desc, attribute, value, bytes));
    return SRF_OK;
}

static srf_status set_pref(cublasLtMatmulPreference_t pref,
                           cublasLtMatmulPreferenceAttributes_t attribute, const void *value,
                           size_t bytes)
{
    BLAS_TRY(cublasLtMatmulPreferenceSetAttribute(pref, attribute, value, bytes));
    return SRF_OK;
}

/* The pointers that belong to the call, not to the plan. */
static srf_status set_pointers(struct plan *plan, const struct product *p)
{
    if (p->bias)
        SRF_TRY(set_desc(plan, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p->bias, sizeof p->bias));
    if (p->aux)
        SRF_TRY(set_desc(plan, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &p->aux, sizeof p->aux));
    return SRF_OK;
}

/* The layouts that have to do with the number of columns, for n of them. */
static srf_status set_columns(struct plan *plan, const struct product *p, int64_t n)
{
    cudaDataType_t ab = (cudaDataType_t)plan->key.type_ab, d = (cudaDataType_t)plan->key.type_d;
    int64_t rows_b = p->b_trans ? n : p->k, cols_b = p->b_trans ? p->k : n;
    BLAS_TRY(cublasLtMatrixLayoutInit(&plan->b, ab, (uint64_t)rows_b, (uint64_t)cols_b, rows_b));
    BLAS_TRY(cublasLtMatrixLayoutInit(&plan->d, d, (uint64_t)p->m, (uint64_t)n, p->m));
    return SRF_OK;
}

static srf_status describe(struct plan *plan, const struct product *p)
{
    const struct plan_key *key = &plan->key;
    cudaDataType_t ab = (cudaDataType_t)key->type_ab;
    int32_t op_a = p->a_trans ? CUBLAS_OP_T : CUBLAS_OP_N;
    int32_t op_b = p->b_trans ? CUBLAS_OP_T : CUBLAS_OP_N;
    uint32_t epilogue = p->epilogue;
    BLAS_TRY(cublasLtMatmulDescInit(&plan->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    SRF_TRY(set_desc(plan, CUBLASLT_MATMUL_DESC_TRANSA, &op_a, sizeof op_a));
    SRF_TRY(set_desc(plan, CUBLASLT_MATMUL_DESC_TRANSB, &op_b, sizeof op_b));
    SRF_TRY(set_desc(plan, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
    if (p->aux) SRF_TRY(set_desc(plan, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &p->m, sizeof p->m));
    SRF_TRY(set_pointers(plan, p));
    int64_t rows_a = p->a_trans ? p->k : p->m, cols_a = p->a_trans ? p->m : p->k;
    BLAS_TRY(cublasLtMatrixLayoutInit(&plan->a, ab, (uint64_t)rows_a, (uint64_t)cols_a, rows_a));
    return SRF_OK;
}

/* -1: not known */
static int32_t split_k(const cublasLtMatmulHeuristicResult_t *r)
{
    int32_t n;
    size_t written;
    cublasStatus_t st = cublasLtMatmulAlgoConfigGetAttribute(
        &r->algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &n, sizeof n, &written);
    return st == CUBLAS_STATUS_SUCCESS ? n : -1;
}

/* cuBLASLt's first candidate is the best where k is long. Where it is short against the bytes that
 * go in and out at the end of a tile, the smallest tiles are faster, 2 to 14 % on an H100: see
 * kernels/lab/dense_cuda.md. Only candidates that split k as the first does: they add in the same
 * order. */
static int choose(const struct srf_ctx *ctx, const struct plan_key *key,
                  const cublasLtMatmulHeuristicResult_t *r, int n)
{
    int64_t tiles = div_up(key->m, 128) * div_up(key->n, 128);
    int64_t bytes = (key->type_d == CUDA_R_32F ? 4 : 2) * (key->has_c ? 2 : 1);
    bool aux = key->epilogue == CUBLASLT_EPILOGUE_GELU_AUX ||
               key->epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS ||
               key->epilogue == CUBLASLT_EPILOGUE_DGELU;
    if (aux) bytes += 2;
    int best = 0;
    if (cuda_of(ctx)->cc != 90 || key->type_ab != CUDA_R_16BF || key->m % 8 || key->k % 8 ||
        tiles < 4 * cuda_of(ctx)->n_sm || key->k > 512 * bytes)
        return best;
    for (int i = 1; i < n; i++)
        if (r[i].state == CUBLAS_STATUS_SUCCESS && r[i].wavesCount > r[best].wavesCount &&
            split_k(&r[i]) == split_k(&r[0]))
            best = i;
    return best;
}

/* Ask for the algorithm. That there is none is an answer too. */
static srf_status search(struct srf_ctx *ctx, struct plan *plan)
{
    static const cublasLtMatmulPreferenceAttributes_t align[4] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    cublasLtMatmulPreferenceOpaque_t pref;
    size_t workspace = BLAS_BYTES;
    /* parts of a split k must not be rounded to bf16 before they are added */
    uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    BLAS_TRY(cublasLtMatmulPreferenceInit(&pref));
    SRF_TRY(
        set_pref(&pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace));
    SRF_TRY(set_pref(&pref, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes));
    for (int i = 0; i < 4; i++) {
        uint32_t bytes = (uint32_t)plan->key.align[i];
        SRF_TRY(set_pref(&pref, align[i], &bytes, sizeof bytes));
    }
    cublasLtMatmulHeuristicResult_t results[CANDIDATES];
    int found = 0;
    plan->status =
        cublasLtMatmulAlgoGetHeuristic(cuda_of(ctx)->lt, &plan->desc, &plan->a, &plan->b, &plan->d,
                                       &plan->d, &pref, CANDIDATES, results, &found);
    if (plan->status == CUBLAS_STATUS_SUCCESS && found < 1)
        plan->status = CUBLAS_STATUS_NOT_SUPPORTED;
    if (plan->status != CUBLAS_STATUS_SUCCESS) return SRF_OK;
    int best = choose(ctx, &plan->key, results, found);
    plan->status = results[best].state;
    plan->algo = results[best].algo;
    return SRF_OK;
}

static srf_status plan_for(struct srf_ctx *ctx, const struct product *p, struct plan **out)
{
    struct srf__cuda *cuda = cuda_of(ctx);
    if (!cuda->plans) {
        cuda->plans = srf__calloc(1, sizeof(struct plans));
        SRF_FAIL_IF(!cuda->plans, SRF_NOMEM, "out of memory: cuBLASLt plans");
    }
    struct plan_key key = key_of(ctx, p);
    uint64_t hash = 14695981039346656037u; /* FNV-1a */
    for (size_t i = 0; i < sizeof key; i++)
        hash = (hash ^ ((const unsigned char *)&key)[i]) * 1099511628211u;
    struct plan *row = ((struct plans *)cuda->plans)->slot + hash % N_PLANS, *plan = row;
    for (int i = 0; i < PLAN_PROBES; i++) {
        if (row[i].used && memcmp(&row[i].key, &key, sizeof key) == 0) {
            *out = &row[i];
            return set_pointers(*out, p);
        }
        if (!row[i].used) {
            plan = &row[i];
            break;
        }
    }
    memset(plan, 0, sizeof *plan);
    plan->key = key;
    SRF_TRY(describe(plan, p));
    SRF_TRY(set_columns(plan, p, key.n));
    SRF_TRY(search(ctx, plan));
    plan->used = true;
    *out = plan;
    return SRF_OK;
}

/* Launch. Without an algorithm: *done is false and nothing has happened, or, where done is NULL, an
 * error. */
static srf_status multiply(struct srf_ctx *ctx, const struct product *p, bool *done)
{
    struct plan *plan = NULL;
    SRF_TRY(plan_for(ctx, p, &plan));
    bool found = plan->status == CUBLAS_STATUS_SUCCESS;
    if (done) *done = found;
    SRF_FAIL_IF(!found && !done, SRF_UNSUPPORTED,
                "cuBLASLt has no algorithm for a product of (%lld, %lld) with (%lld, %lld): %s",
                (long long)p->m, (long long)p->k, (long long)p->k, (long long)p->n,
                cublasGetStatusString(plan->status));
    if (!found) return SRF_OK;
    float alpha = 1.0f, beta = p->c ? 1.0f : 0.0f;
    if (p->like) SRF_TRY(set_columns(plan, p, p->n));
    cublasStatus_t st =
        cublasLtMatmul(cuda_of(ctx)->lt, &plan->desc, &alpha, p->a, &plan->a, p->b, &plan->b, &beta,
                       p->c ? p->c : p->d, &plan->d, p->d, &plan->d, &plan->algo, ctx->workspace,
                       BLAS_BYTES, stream_of(ctx));
    if (p->like && st != CUBLAS_STATUS_SUCCESS) { /* not for this n, after all */
        struct product own = *p;
        own.like = 0;
        return multiply(ctx, &own, done);
    }
    BLAS_TRY(st);
    return SRF_OK;
}

/* ---- what no epilogue does ------------------------------------------------------------------- */

/* Slopes of a layer from row `first` on, as kernels/slope.h has them; all = NULL: none. */
struct slopes {
    void *all;
    int64_t first, width;
};
static __device__ __forceinline__ void put_slope(const struct slopes *s, int64_t i, int64_t j,
                                                 float slope, bf16)
{
    ((uint8_t *)s->all)[slope_place(s->first + i, j, s->width)] = (uint8_t)slope_code(slope);
}
static __device__ __forceinline__ void put_slope(const struct slopes *s, int64_t i, int64_t j,
                                                 float slope, float)
{
    ((float *)s->all)[(s->first + i) * s->width + j] = slope;
}
static __device__ __forceinline__ float get_slope(const struct slopes *s, int64_t i, int64_t j,
                                                  bf16)
{
    return slope_of(((const uint8_t *)s->all)[slope_place(s->first + i, j, s->width)], 0);
}
static __device__ __forceinline__ float get_slope(const struct slopes *s, int64_t i, int64_t j,
                                                  float)
{
    return ((const float *)s->all)[(s->first + i) * s->width + j];
}

/* y = act(u), pre = u, slope = act'(u), u = sums + b + residual. b, residual, pre may be NULL,
 * residual may be y. */
template <typename T>
static __global__ __launch_bounds__(THREADS) void finish_fwd_kernel(
    int64_t rows, int64_t out, const float *__restrict__ sums, const T *__restrict__ b,
    const T *residual, bool act, T *__restrict__ pre, const struct slopes slopes, T *y)
{
    for (int64_t i = blockIdx.x; i < rows; i += gridDim.x)
        for (int64_t j = threadIdx.x; j < out; j += THREADS) {
            int64_t at = i * out + j;
            float u = sums[at];
            if (b) u += to_float(b[j]);
            if (residual) u += to_float(residual[at]);
            if (pre) pre[at] = from_float<T>(u);
            if (slopes.all) put_slope(&slopes, i, j, gelu_derivative(u), T());
            y[at] = from_float<T>(act ? gelu(u) : u);
        }
}

/* dx = or += sums gelu'(pre), or sums slope */
template <typename T>
static __global__ __launch_bounds__(THREADS) void finish_dx_kernel(int64_t count,
                                                                   const float *__restrict__ sums,
                                                                   const T *__restrict__ pre,
                                                                   const struct slopes slopes,
                                                                   bool add, T *__restrict__ dx)
{
    int64_t step = (int64_t)gridDim.x * THREADS;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += step) {
        float d =
            sums[i] * (slopes.all ? get_slope(&slopes, i / slopes.width, i % slopes.width, T())
                                  : gelu_derivative(to_float(pre[i])));
        dx[i] = from_float<T>(add ? to_float(dx[i]) + d : d);
    }
}

/* parts[blockIdx.y] = column sums of the rows that this block takes. A lane has N columns, a warp
 * every (WARPS gridDim.y)-th row, the last first: the product before has left them in L2. */
template <typename T, int N>
static __global__ __launch_bounds__(THREADS,
                                    SUM_BLOCKS) void column_sums_kernel(int64_t n, int64_t out,
                                                                        const T *__restrict__ dy,
                                                                        float *__restrict__ parts)
{
    __shared__ float sums[WARPS][32 * N];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int64_t first = (int64_t)blockIdx.x * 32 * N, j = first + lane * N;
    float sum[N] = {};
    if (j < out) {
        int64_t step = (int64_t)gridDim.y * WARPS;
        int64_t i = n - 1 - ((int64_t)blockIdx.y * WARPS + warp);
        for (; i >= 3 * step; i -= 4 * step) {
            pack<T, N> p[4]; /* under way at once */
#pragma unroll
            for (int r = 0; r < 4; r++) p[r] = load_pack<T, N>(dy + (i - r * step) * out + j);
#pragma unroll
            for (int r = 0; r < 4; r++)
#pragma unroll
                for (int k = 0; k < N; k++) sum[k] += element(p[r], k);
        }
        for (; i >= 0; i -= step) {
            pack<T, N> p = load_pack<T, N>(dy + i * out + j);
#pragma unroll
            for (int k = 0; k < N; k++) sum[k] += element(p, k);
        }
    }
#pragma unroll
    for (int k = 0; k < N; k++) sums[warp][lane * N + k] = sum[k];
    __syncthreads();
    int column = threadIdx.x;
    if (column >= 32 * N || first + column >= out) return;
    float all = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) all += sums[w][column];
    parts[blockIdx.y * out + first + column] = all;
}

/* ---- the ops --------------------------------------------------------------------------------- */

static srf_status check_shape(const char *op, int64_t n, int64_t in, int64_t out)
{
    SRF_FAIL_IF(n > INT32_MAX || in > INT32_MAX || out > INT32_MAX, SRF_INVALID,
                "%s: shape (%lld, %lld, %lld): BLAS takes at most %d in each dimension", op,
                (long long)n, (long long)in, (long long)out, INT32_MAX);
    return SRF_OK;
}

/* Rows of `width` fp32 sums that fit into a piece: a multiple of 64, which keeps alignment. */
static int64_t piece_rows(int64_t n, int64_t width)
{
    int64_t rows = (int64_t)(PIECE_BYTES / sizeof(float)) / width / 64 * 64;
    rows = rows > 64 ? rows : 64;
    return rows < n ? rows : n;
}

static void *after_blas(const struct srf_ctx *ctx)
{
    return (char *)ctx->workspace + BLAS_BYTES;
}

/* Row `row` of a T (n, width), or NULL. */
static char *row_of(const struct srf_ctx *ctx, const void *p, int64_t row, int64_t width)
{
    size_t bytes = (size_t)row * (size_t)width * srf_dtype_bytes(ctx->dtype);
    return p ? (char *)(uintptr_t)p + bytes : NULL;
}

/* y^T (out, n) = W^T (out, in) x^T (in, n), of `rows` rows from `begin` on. */
static struct product forward_product(const struct srf_ctx *ctx,
                                      const struct srf_linear_fwd_args *a, int64_t begin,
                                      int64_t rows)
{
    struct product p = {};
    p.m = a->out, p.n = rows, p.k = a->in;
    p.a = a->w, p.a_trans = a->w_transposed;
    p.b = row_of(ctx, a->x, begin, a->in);
    p.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    /* Prompts are packed into ever new numbers of rows: no new question for each. */
    if (ctx->exact_rows && rows > LIKE_ROWS) p.like = div_up(rows, LIKE_ROWS) * LIKE_ROWS;
    return p;
}

/* Whether an epilogue may be asked for: what cuBLASLt wants of bias and kept activation. */
static bool takes_epilogue(const struct srf_ctx *ctx, const void *bias, const void *aux,
                           int64_t width)
{
    return is_aligned(bias, 16) && is_aligned(aux, 16) &&
           width * (int64_t)srf_dtype_bytes(ctx->dtype) % 16 == 0;
}

static srf_status forward_fused(struct srf_ctx *ctx, const struct srf_linear_fwd_args *a,
                                bool *done)
{
    struct product p = forward_product(ctx, a, 0, a->n);
    p.c = a->residual, p.d = a->y;
    p.bias = a->b;
    if (a->act == SRF_ACT_NONE && a->b)
        p.epilogue = CUBLASLT_EPILOGUE_BIAS;
    else if (a->act != SRF_ACT_NONE && a->pre)
        p.epilogue = a->b ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
    else if (a->act != SRF_ACT_NONE)
        p.epilogue = a->b ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
    if (a->act != SRF_ACT_NONE) p.aux = a->pre;
    return multiply(ctx, &p, done);
}

static srf_status forward_pieces(struct srf_ctx *ctx, const struct srf_linear_fwd_args *a)
{
    int64_t step = piece_rows(a->n, a->out);
    const float *sums = (const float *)after_blas(ctx);
    bool act = a->act != SRF_ACT_NONE;
    for (int64_t begin = 0; begin < a->n; begin += step) {
        int64_t rows = a->n - begin < step ? a->n - begin : step;
        struct product p = forward_product(ctx, a, begin, rows);
        p.d = after_blas(ctx), p.d_f32 = true;
        SRF_TRY(multiply(ctx, &p, NULL));
        void *residual = row_of(ctx, a->residual, begin, a->out);
        void *pre = act ? row_of(ctx, a->pre, begin, a->out) : NULL;
        struct slopes slopes = {act ? a->slope : NULL, begin, a->out};
        void *y = row_of(ctx, a->y, begin, a->out);
        unsigned grid = grid_for(ctx, rows, 1, 8);
        if (ctx->dtype == SRF_BF16)
            finish_fwd_kernel<bf16><<<grid, THREADS, 0, stream_of(ctx)>>>(
                rows, a->out, sums, (const bf16 *)a->b, (const bf16 *)residual, act, (bf16 *)pre,
                slopes, (bf16 *)y);
        else
            finish_fwd_kernel<float><<<grid, THREADS, 0, stream_of(ctx)>>>(
                rows, a->out, sums, (const float *)a->b, (const float *)residual, act, (float *)pre,
                slopes, (float *)y);
    }
    return srf__cuda_launched("linear_fwd");
}

/* The activation and its slope in the product's end; *done: it was launched. */
static srf_status forward_slope(struct srf_ctx *ctx, const struct srf_linear_fwd_args *a,
                                bool *done)
{
    struct wgmma_product p = {};
    p.end = PRODUCT_GELU;
    p.m = a->n, p.n = a->out, p.k = a->in;
    p.a = a->x, p.b = a->w, p.y = a->y;
    p.bias = a->b, p.slopes = (uint8_t *)a->slope;
    *done = !a->w_transposed && !a->pre && srf__product_takes(ctx, &p);
    return *done ? srf__product(ctx, &p) : SRF_OK;
}

/* Bias, residual and moments in the product's end; *done: it was launched. */
static srf_status forward_sum(struct srf_ctx *ctx, const struct srf_linear_fwd_args *a, bool *done)
{
    struct wgmma_product p = {};
    p.end = PRODUCT_ADD;
    p.m = a->n, p.n = a->out, p.k = a->in;
    p.a = a->x, p.b = a->w, p.y = a->y;
    p.bias = a->b, p.residual = a->residual;
    p.moments = (float *)a->moments;
    *done = !a->w_transposed && a->residual && srf__product_takes(ctx, &p);
    return *done ? srf__product(ctx, &p) : SRF_OK;
}

static srf_status forward(struct srf_ctx *ctx, const struct srf_linear_fwd_args *a)
{
    bool act = a->act != SRF_ACT_NONE, done = false;
    if (act && a->slope) {
        SRF_TRY(forward_slope(ctx, a, &done));
        return done ? SRF_OK : forward_pieces(ctx, a);
    }
    if (ctx->exact_rows && ctx->dtype == SRF_F32) return srf__linear_exact_fwd(ctx, a);
    if (a->n <= LINEAR_FEW_ROWS && srf__linear_few_fwd(ctx, a))
        return srf__cuda_launched("linear_fwd");
    if (!a->b && !act) return forward_fused(ctx, a, NULL);
    if (!(act && ctx->dtype == SRF_F32) && takes_epilogue(ctx, a->b, act ? a->pre : NULL, a->out))
        SRF_TRY(forward_fused(ctx, a, &done));
    return done ? SRF_OK : forward_pieces(ctx, a);
}

extern "C" srf_status cuda_linear_fwd(struct srf_ctx *ctx, const struct srf_linear_fwd_args *a)
{
    if (a->n == 0 || a->in == 0 || a->out == 0) return SRF_OK;
    SRF_TRY(check_shape("linear_fwd", a->n, a->in, a->out));
    SRF_FAIL_IF((a->residual || a->moments) && a->act != SRF_ACT_NONE, SRF_INVALID,
                "linear_fwd: residual and moments go with no activation");
    bool moments = a->moments && srf__moments_count(ctx, a->n, a->out) > 0, done = false;
    if (moments) SRF_TRY(forward_sum(ctx, a, &done));
    if (done) return SRF_OK;
    SRF_TRY(forward(ctx, a));
    return moments ? srf__moments(ctx, a->n, a->out, a->y, a->moments) : SRF_OK;
}

extern "C" size_t cuda_linear_fwd_workspace(const struct srf_ctx *,
                                            const struct srf_linear_fwd_args *a)
{
    if (a->n == 0 || a->in == 0 || a->out == 0) return 0;
    bool pieces = a->b || a->act != SRF_ACT_NONE;
    int64_t floats = pieces ? piece_rows(a->n, a->out) * a->out : 0;
    return BLAS_BYTES + (size_t)floats * sizeof(float);
}

/* dx^T (in, n) = W (in, out) dy^T (out, n), of `rows` rows from `begin` on. */
static struct product input_product(const struct srf_ctx *ctx, const struct srf_linear_bwd_args *a,
                                    int64_t begin, int64_t rows)
{
    struct product p = {};
    p.m = a->in, p.n = rows, p.k = a->out;
    p.a = a->w, p.a_trans = !a->w_transposed;
    p.b = row_of(ctx, a->dy, begin, a->out);
    p.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    return p;
}

static srf_status input_gradient_pieces(struct srf_ctx *ctx, const struct srf_linear_bwd_args *a)
{
    int64_t step = piece_rows(a->n, a->in);
    const float *sums = (const float *)after_blas(ctx);
    for (int64_t begin = 0; begin < a->n; begin += step) {
        int64_t rows = a->n - begin < step ? a->n - begin : step;
        struct product p = input_product(ctx, a, begin, rows);
        p.d = after_blas(ctx), p.d_f32 = true;
        SRF_TRY(multiply(ctx, &p, NULL));
        const void *pre = row_of(ctx, a->x_pre, begin, a->in);
        struct slopes slopes = {(void *)(uintptr_t)a->x_slope, begin, a->in};
        void *dx = row_of(ctx, a->dx, begin, a->in);
        int64_t count = rows * a->in;
        unsigned grid = grid_for(ctx, count, THREADS, 8);
        if (ctx->dtype == SRF_BF16)
            finish_dx_kernel<bf16><<<grid, THREADS, 0, stream_of(ctx)>>>(
                count, sums, (const bf16 *)pre, slopes, a->dx_accumulate, (bf16 *)dx);
        else
            finish_dx_kernel<float><<<grid, THREADS, 0, stream_of(ctx)>>>(
                count, sums, (const float *)pre, slopes, a->dx_accumulate, (float *)dx);
    }
    return srf__cuda_launched("linear_bwd");
}

/* dx = (dy W^T) slope, and its column sums, in the product's end; *done: it was launched. */
static srf_status gradient_slope(struct srf_ctx *ctx, const struct srf_linear_bwd_args *a,
                                 bool *done)
{
    struct wgmma_product p = {};
    p.end = PRODUCT_SLOPE;
    p.m = a->n, p.n = a->in, p.k = a->out;
    p.a = a->dy, p.b = a->w, p.y = a->dx;
    p.slopes = (uint8_t *)(uintptr_t)a->x_slope;
    p.sums = a->dx_sum ? (float *)ctx->workspace : NULL;
    *done = !a->w_transposed && !a->dx_accumulate && srf__product_takes(ctx, &p);
    if (!*done) return SRF_OK;
    SRF_TRY(srf__product(ctx, &p));
    if (a->dx_sum)
        srf__cuda_add_parts(ctx, p.sums, div_up(a->n, PRODUCT_ROWS), a->in, (float *)a->dx_sum,
                            NULL);
    return srf__cuda_launched("linear_bwd");
}

/* dx = dy W^T in a product of our own, which sees all of dy, and db with it; *done: both are. */
static srf_status gradient_sums(struct srf_ctx *ctx, const struct srf_linear_bwd_args *a,
                                bool *done)
{
    struct wgmma_product p = {};
    p.end = PRODUCT_PLAIN;
    p.m = a->n, p.n = a->in, p.k = a->out;
    p.a = a->dy, p.b = a->w, p.y = a->dx;
    p.sums = (float *)ctx->workspace;
    bool plain = !a->w_transposed && !a->dx_accumulate && !a->x_slope && a->x_act == SRF_ACT_NONE;
    *done = plain && a->n >= MANY_ROWS && srf__product_takes(ctx, &p);
    if (!*done) return SRF_OK;
    SRF_TRY(srf__product(ctx, &p));
    srf__cuda_add_parts(ctx, p.sums, div_up(a->n, PRODUCT_SUMS), a->out, (float *)a->db, NULL,
                        NULL);
    return srf__cuda_launched("linear_bwd");
}

static srf_status input_gradient(struct srf_ctx *ctx, const struct srf_linear_bwd_args *a)
{
    if (a->x_slope) return input_gradient_pieces(ctx, a);
    struct product p = input_product(ctx, a, 0, a->n);
    p.d = a->dx;
    if (a->x_act == SRF_ACT_NONE) {
        p.c = a->dx_accumulate ? a->dx : NULL;
        return multiply(ctx, &p, NULL);
    }
    bool done = false;
    if (ctx->dtype == SRF_BF16 && !a->dx_accumulate && takes_epilogue(ctx, NULL, a->x_pre, a->in)) {
        p.epilogue = CUBLASLT_EPILOGUE_DGELU;
        p.aux = a->x_pre;
        SRF_TRY(multiply(ctx, &p, &done));
    }
    return done ? SRF_OK : input_gradient_pieces(ctx, a);
}

/* dw^T (out, in) += dy^T (out, n) x (n, in); or dw (out, in) as (in, out) += x^T (in, n) dy. */
static srf_status weight_gradient(struct srf_ctx *ctx, const struct srf_linear_bwd_args *a)
{
    struct product p = {};
    p.m = a->w_transposed ? a->in : a->out, p.n = a->w_transposed ? a->out : a->in, p.k = a->n;
    p.a = a->w_transposed ? a->x : a->dy, p.b = a->w_transposed ? a->dy : a->x;
    p.b_trans = true;
    p.c = a->dw, p.d = a->dw, p.d_f32 = true;
    p.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    return multiply(ctx, &p, NULL);
}

/* Blocks of column_sums_kernel with packs of `width`: columns times parts. */
static dim3 sum_grid(const struct srf_ctx *ctx, int64_t n, int64_t out, int width)
{
    int64_t columns = div_up(out, 32 * width), rows = div_up(n, 4 * WARPS);
    int64_t parts = (int64_t)cuda_of(ctx)->n_sm * SUM_BLOCKS / columns;
    parts = parts < rows ? parts : rows;
    return dim3((unsigned)columns, (unsigned)(parts > 1 ? parts : 1));
}

template <typename T>
static srf_status add_columns(struct srf_ctx *ctx, int64_t n, int64_t out, const T *dy, float *db)
{
    float *parts = (float *)ctx->workspace;
    bool packs = is_aligned(dy, 16) && out % PACK(T) == 0;
    dim3 grid = sum_grid(ctx, n, out, packs ? PACK(T) : 1);
    if (packs)
        column_sums_kernel<T, PACK(T)><<<grid, THREADS, 0, stream_of(ctx)>>>(n, out, dy, parts);
    else
        column_sums_kernel<T, 1><<<grid, THREADS, 0, stream_of(ctx)>>>(n, out, dy, parts);
    srf__cuda_add_parts(ctx, parts, grid.y, out, db, NULL);
    return srf__cuda_launched("linear_bwd");
}

/* db += column sums of dy (n, out) */
static srf_status column_sums(struct srf_ctx *ctx, int64_t n, int64_t out, const void *dy, void *db)
{
    if (ctx->dtype == SRF_BF16) return add_columns(ctx, n, out, (const bf16 *)dy, (float *)db);
    return add_columns(ctx, n, out, (const float *)dy, (float *)db);
}

extern "C" srf_status cuda_linear_bwd(struct srf_ctx *ctx, const struct srf_linear_bwd_args *a)
{
    if (a->n == 0 || a->in == 0 || a->out == 0) return SRF_OK;
    SRF_TRY(check_shape("linear_bwd", a->n, a->in, a->out));
    SRF_FAIL_IF((a->x_act != SRF_ACT_NONE) != (a->x_pre != NULL), SRF_INVALID,
                "linear_bwd: x_act and x_pre go together");
    SRF_FAIL_IF(a->x_pre && a->x_slope, SRF_INVALID, "linear_bwd: x_pre or x_slope, not both");
    bool done = false, summed = false;
    if (a->dx && a->x_slope) SRF_TRY(gradient_slope(ctx, a, &done));
    if (a->dx && a->db && !done) SRF_TRY(gradient_sums(ctx, a, &summed));
    if (a->dx && !done && !summed) SRF_TRY(input_gradient(ctx, a));
    if (a->dx && a->dx_sum && !done) SRF_TRY(column_sums(ctx, a->n, a->in, a->dx, a->dx_sum));
    if (a->dw) SRF_TRY(weight_gradient(ctx, a));
    if (a->db && !summed) SRF_TRY(column_sums(ctx, a->n, a->out, a->dy, a->db));
    return SRF_OK;
}

extern "C" size_t cuda_linear_bwd_workspace(const struct srf_ctx *ctx,
                                            const struct srf_linear_bwd_args *a)
{
    if (a->n == 0 || a->in == 0 || a->out == 0) return 0;
    bool pieces = a->dx && (a->x_act != SRF_ACT_NONE || a->x_slope);
    int64_t floats = pieces ? piece_rows(a->n, a->in) * a->in : 0;
    size_t bytes = BLAS_BYTES + (size_t)floats * sizeof(float), sums = 0;
    int width = (int)(16 / srf_dtype_bytes(ctx->dtype)); /* the widest packs make the most parts */
    if (a->db) sums = sum_grid(ctx, a->n, a->out, width).y * (size_t)a->out;
    if (a->db && a->dx) {
        size_t pieces = (size_t)div_up(a->n, PRODUCT_SUMS) * (size_t)a->out;
        sums = pieces > sums ? pieces : sums;
    }
    if (a->dx && a->dx_sum) {
        size_t tiles = (size_t)div_up(a->n, PRODUCT_ROWS) * (size_t)a->in;
        size_t parts = sum_grid(ctx, a->n, a->in, width).y * (size_t)a->in;
        sums = tiles > sums ? tiles : sums;
        sums = parts > sums ? parts : sums;
    }
    return bytes > sums * sizeof(float) ? bytes : sums * sizeof(float);
}
