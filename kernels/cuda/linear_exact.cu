/* Linear layers in fp32 whose rows do not notice each other: y = act(x W + b), each row with the
 * bits that it gets alone, so that no sequence's text depends on the batch (ctx->exact_rows).
 *
 * The sum over `in` is one order of additions for any number of rows: it is cut into PIECES equal
 * parts, a part is a chain of fused multiply-adds, and the parts are added from first to last. What
 * zeros are filled in at the end changes nothing. Three kernels keep to it:
 *     some rows (8)    W (in, out): a block of a cluster has a piece and 32 columns of W, all of
 *                      which is on its way at once; a warp adds up one row of x
 *     some rows (8)    W^T (out, in): a block has 32 rows of W^T, each of its warps a piece of them
 *     any number       tiles of 16 R rows by 16 C columns; where there are few tiles the blocks of
 *                      a cluster have a piece each, otherwise a block has them all
 * What is read of W first is on its way before the kernel in front is done (chain.h).
 * Floor: a few rows: memory, W is read once. Many: 2 n in out flops in fp32, without tensor cores,
 * 67 Tflop/s on an H100. */
#include "kernels/cuda/chain.h"
#include "kernels/cuda/linear.h"

#define THREADS   256
#define PIECES    8   /* as many as a cluster has blocks, and a block warps */
#define STEP      16  /* of k in a tile of any number of rows: pieces are multiples of it */
#define SOME_ROWS 8   /* a warp for each, in the kernels of some rows */
#define STRIP     32  /* columns of theirs */
#define PART      384 /* of k at once in shared memory, W (in, out) */
#define PART_T    96  /* W^T */
#define STAGES    3   /* of its way through shared memory */

static_assert(THREADS / 32 == PIECES && THREADS / 32 == SOME_ROWS, "a warp for each");

/* Of k in a piece. */
static __host__ __device__ __forceinline__ int64_t piece_of(int64_t in)
{
    return ((in + PIECES - 1) / PIECES + STEP - 1) / STEP * STEP;
}

static __device__ __forceinline__ void cp_async_4(uint32_t dst, const void *src, bool valid)
{
    int bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src), "r"(bytes)
                 : "memory");
}

/* `rows` rows of COLS floats, ld apart, into rows of PITCH: asynchronously, by the threads first,
 * first + step, ...; zeros beyond the first rows_there and cols_there. V floats at once. */
template <int V, int COLS, int PITCH>
static __device__ __forceinline__ void fetch(float *to, const float *from, int64_t ld, int rows,
                                             int64_t rows_there, int64_t cols_there, int first,
                                             int step)
{
    constexpr int PACKS = COLS / V;
    for (int i = first; i < rows * PACKS; i += step) {
        int r = i / PACKS, c = i % PACKS * V;
        bool there = r < rows_there && c < cols_there;
        uint32_t dst = smem_addr(to + r * PITCH + c);
        const float *src = there ? from + r * ld + c : from;
        if (V == 4)
            cp_async_16(dst, src, there);
        else
            cp_async_4(dst, src, there);
    }
}

/* ---- some rows ------------------------------------------------------------------------------ */

/* W (in, out). A cluster's blocks are along y. */
template <int V>
static __global__ __launch_bounds__(THREADS) void some_kernel(const struct linear_rows<float> a)
{
    extern __shared__ float4 shared[];
    __shared__ float sums[SOME_ROWS][STRIP];
    float *w = (float *)shared, *x = w + PART * STRIP;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int64_t column = (int64_t)blockIdx.x * STRIP, piece = piece_of(a.in);
    int64_t begin = blockIdx.y * piece, end = min(begin + piece, a.in);
    float sum = 0.0f;
    chain_next();
    for (int64_t k = begin; k < end; k += PART) {
        int n = (int)min((int64_t)PART, end - k);
        if (k > begin) __syncthreads(); /* all are done with the part before */
        fetch<V, STRIP, STRIP>(w, a.w + k * a.out + column, a.out, (n + 3) / 4 * 4, n,
                               a.out - column, threadIdx.x, THREADS);
        if (k == begin) chain_wait();
        fetch<V, PART, PART>(x, a.x + k, a.in, (int)a.n, a.n, n, threadIdx.x, THREADS);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        const float *row = x + warp * PART, *strip = w + lane;
        if (warp < a.n)
#pragma unroll 4
            for (int i = 0; i < n; i += 4) {
                float4 f = *(const float4 *)(row + i);
                sum = fmaf(f.x, strip[i * STRIP], sum);
                sum = fmaf(f.y, strip[(i + 1) * STRIP], sum);
                sum = fmaf(f.z, strip[(i + 2) * STRIP], sum);
                sum = fmaf(f.w, strip[(i + 3) * STRIP], sum);
            }
    }
    if (begin >= end) chain_wait();
    sums[warp][lane] = sum;
    cluster_sync();
    if (blockIdx.y == 0 && warp < a.n && column + lane < a.out) {
        float u = sum;
#pragma unroll
        for (int p = 1; p < PIECES; p++) u += cluster_load(&sums[warp][lane], p);
        linear_finish(&a, warp, column + lane, u);
    }
    cluster_sync(); /* the others stay until they are read */
}

/* W^T (out, in), N >= n rows of x. */
template <int V, int N>
static __global__
__launch_bounds__(THREADS) void some_transposed_kernel(const struct linear_rows<float> a)
{
    constexpr int PITCH = PART_T + 4; /* lanes at the same k meet different banks */
    extern __shared__ float4 shared[];
    __shared__ float sums[PIECES][N][STRIP];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    float *w = (float *)shared + warp * (STRIP + N) * PITCH, *x = w + STRIP * PITCH;
    int64_t first = (int64_t)blockIdx.x * STRIP, piece = piece_of(a.in);
    int64_t begin = warp * piece, end = min(begin + piece, a.in);
    float sum[N] = {};
    chain_next();
    for (int64_t k = begin; k < end; k += PART_T) {
        int n = (int)min((int64_t)PART_T, end - k);
        __syncwarp(); /* all are done with the part before */
        fetch<V, PART_T, PITCH>(w, a.w + first * a.in + k, a.in, STRIP, a.out - first, n, lane, 32);
        if (k == begin) chain_wait();
        fetch<V, PART_T, PITCH>(x, a.x + k, a.in, N, a.n, n, lane, 32);
        cp_async_commit();
        cp_async_wait<0>();
        __syncwarp();
#pragma unroll 4
        for (int i = 0; i < n; i += 4) {
            float4 f = *(const float4 *)(w + lane * PITCH + i);
#pragma unroll
            for (int r = 0; r < N; r++) {
                float4 g = *(const float4 *)(x + r * PITCH + i);
                sum[r] = fmaf(g.x, f.x, sum[r]);
                sum[r] = fmaf(g.y, f.y, sum[r]);
                sum[r] = fmaf(g.z, f.z, sum[r]);
                sum[r] = fmaf(g.w, f.w, sum[r]);
            }
        }
    }
    if (begin >= end) chain_wait();
#pragma unroll
    for (int r = 0; r < N; r++) sums[warp][r][lane] = sum[r];
    __syncthreads();
    if (warp >= a.n || warp >= N || first + lane >= a.out) return;
    float u = sums[0][warp][lane];
#pragma unroll
    for (int p = 1; p < PIECES; p++) u += sums[p][warp][lane];
    linear_finish(&a, warp, first + lane, u);
}

/* ---- any number ----------------------------------------------------------------------------- */

/* Shared memory of a block: stages, each STEP of k of the tile's rows of x and columns of W; later
 * the sums that the blocks of a cluster exchange. */
template <int R, int C, bool TRANS> struct stage {
    float x[16 * R][STEP + 4];
    float w[TRANS ? 16 * C : STEP][TRANS ? STEP + 4 : 16 * C];
};
template <int R, int C, bool TRANS> union room {
    struct stage<R, C, TRANS> stages[STAGES];
    float sums[16 * R][16 * C];
};

template <int V, int C, bool TRANS, typename S>
static __device__ __forceinline__ void fetch_w(S *to, const struct linear_rows<float> *a,
                                               int64_t column, int64_t k, int64_t end)
{
    if (TRANS)
        fetch<V, STEP, STEP + 4>(&to->w[0][0], a->w + column * a->in + k, a->in, 16 * C,
                                 a->out - column, end - k, threadIdx.x, THREADS);
    else
        fetch<V, 16 * C, 16 * C>(&to->w[0][0], a->w + k * a->out + column, a->out, STEP, end - k,
                                 a->out - column, threadIdx.x, THREADS);
}

template <int V, typename S>
static __device__ __forceinline__ void fetch_x(S *to, const struct linear_rows<float> *a,
                                               int64_t row, int rows, int64_t k, int64_t end)
{
    fetch<V, STEP, STEP + 4>(&to->x[0][0], a->x + row * a->in + k, a->in, rows, a->n - row, end - k,
                             threadIdx.x, THREADS);
}

static __device__ __forceinline__ float part_of(const float4 &f, int i)
{
    return i == 0 ? f.x : i == 1 ? f.y : i == 2 ? f.z : f.w;
}

/* Column of the tile that is thread x's number j: fours lie together, with W^T it is every 16th. */
template <bool TRANS> static __device__ __forceinline__ int column_of(int x, int j)
{
    return TRANS ? x + 16 * j : 4 * x + j % 4 + 64 * (j / 4);
}

/* Tiles: columns along x, rows along z; a cluster's blocks, PIECES or 1, along y. A thread has rows
 * y + 16 i of the tile and C columns. */
template <int V, int R, int C, bool TRANS>
static __global__
__launch_bounds__(THREADS, C == 4 ? 2 : 1) void any_kernel(const struct linear_rows<float> a)
{
    extern __shared__ float4 shared[];
    typedef union room<R, C, TRANS> layout;
    layout &room = *(layout *)shared;
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    int64_t column = (int64_t)blockIdx.x * 16 * C, row = (int64_t)blockIdx.z * 16 * R;
    int64_t piece = piece_of(a.in), begin = gridDim.y > 1 ? blockIdx.y * piece : 0;
    int64_t end = gridDim.y > 1 ? min(begin + piece, a.in) : a.in;
    float total[R][C] = {}, sum[R][C] = {};
    chain_next();
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++)
        if (begin + s * STEP < end)
            fetch_w<V, C, TRANS>(&room.stages[s], &a, column, begin + s * STEP, end);
    chain_wait();
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (begin + s * STEP < end)
            fetch_x<V>(&room.stages[s], &a, row, 16 * R, begin + s * STEP, end);
        cp_async_commit(); /* what is of W came with the first, at the latest */
    }
    int now = 0, done = 0; /* done: of the piece */
    for (int64_t k = begin; k < end; k += STEP) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        int64_t next = k + (STAGES - 1) * STEP;
        int slot = now ? now - 1 : STAGES - 1;
        if (next < end) {
            fetch_w<V, C, TRANS>(&room.stages[slot], &a, column, next, end);
            fetch_x<V>(&room.stages[slot], &a, row, 16 * R, next, end);
        }
        cp_async_commit();
        const struct stage<R, C, TRANS> *st = &room.stages[now];
#pragma unroll
        for (int i = 0; i < STEP; i += 4) {
            float4 x[R], w[C]; /* w: four k of a column each; without TRANS one of four columns */
#pragma unroll
            for (int r = 0; r < R; r++) x[r] = *(const float4 *)&st->x[ty + 16 * r][i];
#pragma unroll
            for (int j = 0; j < C && TRANS; j++) w[j] = *(const float4 *)&st->w[tx + 16 * j][i];
#pragma unroll
            for (int e = 0; e < 4; e++) {
#pragma unroll
                for (int j = 0; j < C / 4 && !TRANS; j++)
                    w[j] = *(const float4 *)&st->w[i + e][4 * tx + 64 * j];
#pragma unroll
                for (int r = 0; r < R; r++)
#pragma unroll
                    for (int j = 0; j < C; j++)
                        sum[r][j] =
                            fmaf(part_of(x[r], e),
                                 TRANS ? part_of(w[j], e) : part_of(w[j / 4], j % 4), sum[r][j]);
            }
        }
        now = now + 1 < STAGES ? now + 1 : 0;
        done += STEP;
        if (done < piece && k + STEP < end) continue;
        done = 0;
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int j = 0; j < C; j++) total[r][j] += sum[r][j], sum[r][j] = 0.0f;
    }
    cp_async_wait<0>();
    __syncthreads(); /* the sums lie where the stages were */
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int j = 0; j < C; j++) room.sums[ty + 16 * r][column_of<TRANS>(tx, j)] = total[r][j];
    if (gridDim.y > 1)
        cluster_sync();
    else
        __syncthreads();
    int share = 16 * R * 16 * C / (int)gridDim.y; /* of the tile, for a block to finish */
    for (int i = threadIdx.x; i < share; i += THREADS) {
        int e = (int)blockIdx.y * share + i, r = e / (16 * C), c = e % (16 * C);
        float u = 0.0f;
        if (gridDim.y > 1)
#pragma unroll
            for (int p = 0; p < PIECES; p++) u += cluster_load(&room.sums[r][c], p);
        else
            u = room.sums[r][c];
        if (row + r < a.n && column + c < a.out) linear_finish(&a, row + r, column + c, u);
    }
    if (gridDim.y > 1) cluster_sync(); /* the others stay until they are read */
}

/* ---- which ---------------------------------------------------------------------------------- */

typedef void exact_kernel(const struct linear_rows<float>);

static srf_status launch(struct srf_ctx *ctx, exact_kernel *kernel, const struct chain_shape &shape,
                         const struct linear_rows<float> &rows)
{
    CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  (int)shape.bytes));
    chain_launch(ctx, shape, kernel, rows);
    return srf__cuda_launched("linear_fwd");
}

/* Dynamic shared memory of the kernels of some rows; they have at most SOME_SUMS beside it. */
#define SOME_SUMS (PIECES * SOME_ROWS * STRIP * sizeof(float))
static size_t some_bytes(int64_t n, bool trans)
{
    if (!trans) return (size_t)PART * (STRIP + SOME_ROWS) * sizeof(float);
    return (size_t)PIECES * (size_t)(STRIP + (n == 1 ? 1 : SOME_ROWS)) * (PART_T + 4) *
           sizeof(float);
}

template <int V>
static srf_status some_rows(struct srf_ctx *ctx, const struct linear_rows<float> &a, bool trans)
{
    unsigned strips = (unsigned)div_up(a.out, STRIP);
    size_t bytes = some_bytes(a.n, trans);
    if (!trans)
        return launch(ctx, some_kernel<V>, {dim3(strips, PIECES), THREADS, bytes, PIECES}, a);
    int n = a.n == 1 ? 1 : SOME_ROWS;
    return launch(ctx, n == 1 ? some_transposed_kernel<V, 1> : some_transposed_kernel<V, SOME_ROWS>,
                  {dim3(strips), THREADS, bytes, 1}, a);
}

/* Tiles of 16 R by 16 C. */
template <int V, int R, int C>
static srf_status tiles(struct srf_ctx *ctx, const struct linear_rows<float> &a, bool trans)
{
    int64_t across = div_up(a.out, 16 * C), down = div_up(a.n, 16 * R);
    bool split = cuda_of(ctx)->cc >= 90 && across * down < 2 * cuda_of(ctx)->n_sm;
    unsigned pieces = split ? PIECES : 1;
    size_t bytes = trans ? sizeof(union room<R, C, true>) : sizeof(union room<R, C, false>);
    return launch(ctx, trans ? any_kernel<V, R, C, true> : any_kernel<V, R, C, false>,
                  {dim3((unsigned)across, pieces, (unsigned)down), THREADS, bytes, pieces}, a);
}

template <int V>
static srf_status any_rows(struct srf_ctx *ctx, const struct linear_rows<float> &a, bool trans)
{
    const int64_t most = 65535ll * 32; /* rows of a grid */
    for (int64_t begin = 0; begin < a.n; begin += most) {
        struct linear_rows<float> some = a;
        some.n = a.n - begin < most ? a.n - begin : most;
        some.x += begin * a.in, some.y += begin * a.out;
        if (a.residual) some.residual += begin * a.out;
        if (a.pre) some.pre += begin * a.out;
        bool large = div_up(a.out, 128) * div_up(some.n, 128) >= 2 * cuda_of(ctx)->n_sm;
        if (some.n <= 32)
            SRF_TRY((tiles<V, 2, 4>(ctx, some, trans)));
        else if (large && V == 4)
            SRF_TRY((tiles<4, 8, 8>(ctx, some, trans)));
        else
            SRF_TRY((tiles<V, 8, 4>(ctx, some, trans)));
    }
    return SRF_OK;
}

template <int V>
static srf_status exact_rows(struct srf_ctx *ctx, const struct linear_rows<float> &a, bool trans)
{
    bool few = a.n <= SOME_ROWS && cuda_of(ctx)->cc >= 90 &&
               some_bytes(a.n, trans) + SOME_SUMS <= cuda_of(ctx)->smem_max;
    return few ? some_rows<V>(ctx, a, trans) : any_rows<V>(ctx, a, trans);
}

srf_status srf__linear_exact_fwd(struct srf_ctx *ctx, const struct srf_linear_fwd_args *args)
{
    const struct linear_rows<float> a = linear_rows_of<float>(args);
    bool trans = args->w_transposed;
    bool packs =
        a.in % 4 == 0 && (trans || a.out % 4 == 0) && is_aligned(a.x, 16) && is_aligned(a.w, 16);
    return packs ? exact_rows<4>(ctx, a, trans) : exact_rows<1>(ctx, a, trans);
}
