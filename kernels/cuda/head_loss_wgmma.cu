/* The product of the loss's head on Hopper's warpgroup products (sm_90a), bf16: what leaves are not
 * logits but exp(logit - shift of the row), and each tile's row sums of them.
 *
 * x (n, c) and w (ld, c) row-major. A block stays, and takes tiles (128, 192) of e in turns: one
 * warpgroup asks for operands, two others have a tile each, so that one finishes its tile while the
 * other's products run. Two blocks are a cluster: their tiles lie one below the other, each loads
 * half of w's rows for both.
 *
 * Barriers of a block:
 *     full[s]    stage s has its bytes, x's and w's
 *     empty[s]   the warps that used stage s, of both blocks, are done with it
 *     turn[g]    warpgroup g may start on its next tile: the other has seen all its stages full.
 *                Without it a warpgroup could wait for a stage's phase while the one before has not
 *                ended, and take the end of the last but one, of the same parity, for it.
 *
 * Floor: tensor cores, 2 n ld c flops at 990 Tflop/s. */
#include "kernels/cuda/head_loss.h"
#include "kernels/cuda/head_loss_wgmma.h"
#include "kernels/cuda/tile.h"

#define ROWS        128 /* of a tile */
#define COLS        HEAD_COLS
#define DEPTH       64 /* of a stage */
#define STAGES      4
#define PIECE_COLS  64 /* of a piece of a tile, that leaves at once */
#define PIECES      (COLS / PIECE_COLS)
#define BUFFERS     2 /* of a warpgroup, for pieces */
#define THREADS     384
#define GROUP       128 /* threads */
#define GROUP_WARPS 4
#define BLOCKS      2 /* of a cluster */

#define A_BYTES     (ROWS * DEPTH * (int)sizeof(bf16))
#define B_BYTES     (COLS * DEPTH * (int)sizeof(bf16))
#define STAGE_BYTES (A_BYTES + B_BYTES)
#define PIECE_BYTES (ROWS * PIECE_COLS * (int)sizeof(bf16))
#define BARRIERS    (2 * STAGES + 2)
#define PIECES_AT   (STAGES * STAGE_BYTES)
#define BARRIERS_AT (PIECES_AT + 2 * BUFFERS * PIECE_BYTES)
#define SMEM        (1024 + BARRIERS_AT + BARRIERS * 8)

/* The launcher asks for this bound to learn whether a kernel was compiled for its device. */
#if defined(__CUDA_ARCH__) && !HAVE_WGMMA
#define BOUNDS __launch_bounds__(2 * THREADS)
#else
#define BOUNDS __launch_bounds__(THREADS, 1)
#endif

struct operands {
    CUtensorMap x, w, e;
};

struct work {
    int n, c, v;
    int pairs, columns; /* tiles of e: pairs of rows, columns */
    const float *shift;
    float *parts;
};

#if HAVE_WGMMA
struct place {
    int row, col; /* of e: the tile's first */
};
/* Down a column first: w is read once. */
__device__ __forceinline__ struct place place_of(const struct work *w, int item, int rank)
{
    struct place p = {(item % w->pairs * BLOCKS + rank) * ROWS, item / w->pairs * COLS};
    return p;
}

/* Stage of the i-th use, counted over all tiles of a block, and the parity of its phase. */
struct stage {
    int at, parity;
};
__device__ __forceinline__ struct stage stage_of(int i)
{
    struct stage s = {i % STAGES, i / STAGES & 1};
    return s;
}
__device__ __forceinline__ void stage_next(struct stage *s)
{
    if (++s->at == STAGES) s->at = 0, s->parity ^= 1;
}

__device__ __forceinline__ void load_operands(const struct work *w, const struct operands *m,
                                              uint32_t smem, uint32_t full, uint32_t empty)
{
    int rank = cluster_rank(), clusters = gridDim.x / BLOCKS, depth = (w->c + DEPTH - 1) / DEPTH;
    int half = rank * (COLS / BLOCKS);
    struct stage s = {0, 0};
    for (int item = blockIdx.x / BLOCKS; item < w->pairs * w->columns; item += clusters) {
        struct place p = place_of(w, item, rank);
        for (int i = 0; i < depth; i++, stage_next(&s)) {
            uint32_t a = smem + s.at * STAGE_BYTES, b = a + A_BYTES, bar = full + 8 * s.at;
            barrier_wait(empty + 8 * s.at, s.parity ^ 1); /* the first round: free */
            barrier_expect(bar, STAGE_BYTES);
            bulk_load(a, &m->x, i * DEPTH, p.row, bar);
            bulk_load_to(b + half * 128, &m->w, i * DEPTH, p.col + half, bar, (1 << BLOCKS) - 1);
        }
    }
}

/* This warp is done with a stage, which both blocks fill. */
__device__ __forceinline__ void release(uint32_t empty, int stage)
{
    __syncwarp();
    int lane = threadIdx.x & 31;
    if (lane < BLOCKS) barrier_arrive_at(empty + 8 * stage, lane);
}

/* c = the tile's products. */
__device__ __forceinline__ void multiply_tile(float c[2][COLS / 2], int depth, struct stage s,
                                              uint32_t smem, uint32_t full, uint32_t empty)
{
    int before = 0;
    for (int i = 0; i < depth; i++) {
        uint32_t a = smem + s.at * STAGE_BYTES, b = a + A_BYTES;
        barrier_wait(full + 8 * s.at, s.parity);
        warpgroup_fence();
#pragma unroll
        for (int kk = 0; kk < DEPTH / 16; kk++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                wgmma_192(c[half], wgmma_tile(a + half * (A_BYTES / 2) + 32 * kk),
                          wgmma_tile(b + 32 * kk), i > 0 || kk > 0);
        warpgroup_commit();
        warpgroup_wait<1>();
        if (i > 0) release(empty, before);
        before = s.at;
        stage_next(&s);
    }
}

/* What a warpgroup keeps for its tiles' ends. */
struct finish {
    const struct work *w;
    const struct operands *m;
    uint32_t pieces; /* BUFFERS in shared memory */
    int id;          /* of the warpgroup's barrier */
    int next;        /* buffer that is filled next */
};

/* Rows of a thread: j = 0 .. 3. */
__device__ __forceinline__ int row_at(int j)
{
    int thread = threadIdx.x % GROUP, lane = thread & 31, warp = thread >> 5;
    return (j >> 1) * 64 + (j & 1) * 8 + 16 * warp + (lane >> 2);
}

/* The tile leaves in pieces through shared memory. */
__device__ __forceinline__ void put_tile(struct finish *f, float c[2][COLS / 2], struct place p,
                                         const float shift[4])
{
    int thread = threadIdx.x % GROUP, lane = thread & 31, warp = thread >> 5;
    float sum[4] = {};
    if (p.col + COLS > f->w->v)
#pragma unroll
        for (int k = 0; k < COLS; k++) { /* no words: as -inf, but NaN where the row has it */
            int col = p.col + 8 * (k % (COLS / 2) / 4) + 2 * (lane & 3) + (k & 1);
            if (col >= f->w->v) c[k / (COLS / 2)][k % (COLS / 2)] = -1e30f;
        }
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        uint32_t piece = f->pieces + f->next * PIECE_BYTES;
        if (thread == 0) bulk_store_wait<BUFFERS - 1>();
        group_sync(f->id, GROUP);
        f->next ^= 1;
        uint32_t base = piece + tile_at<PIECE_COLS>(16 * warp + (lane >> 2), 0) + (lane & 3) * 4;
#pragma unroll
        for (int nt = 0; nt < PIECE_COLS / 8; nt++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float *u = &c[j >> 1][4 * (nt + i * (PIECE_COLS / 8)) + 2 * (j & 1)];
                float a = u[0], b = u[1];
                a = exp2_fast(fmaf(a, LOG2E, -shift[j]));
                b = exp2_fast(fmaf(b, LOG2E, -shift[j]));
                sum[j] += a + b;
                shared_store((base ^ (nt * 16)) + ((j >> 1) * 64 + (j & 1) * 8) * (PIECE_COLS * 2),
                             pack_bf16(a, b));
            }
        }
        bulk_fence();
        group_sync(f->id, GROUP);
        if (thread == 0) bulk_store(&f->m->e, p.col + i * PIECE_COLS, p.row, piece);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float all = quad_sum(sum[j]);
        int row = p.row + row_at(j);
        if ((lane & 3) == 0 && row < f->w->n)
            f->w->parts[(int64_t)(p.col / COLS) * f->w->n + row] = all;
    }
}
#endif

static __global__ BOUNDS void product_kernel(const __grid_constant__ struct work w,
                                             const __grid_constant__ struct operands m)
{
#if HAVE_WGMMA
    extern __shared__ char raw[];
    char *base = raw + (-smem_addr(raw) & 1023u);
    uint32_t smem = smem_addr(base), full = smem + BARRIERS_AT, empty = full + 8 * STAGES;
    uint32_t turn = empty + 8 * STAGES;
    int group = threadIdx.x / GROUP, thread = threadIdx.x % GROUP;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, BLOCKS * GROUP_WARPS);
        }
        for (int i = 0; i < 2; i++) barrier_init(turn + 8 * i, GROUP_WARPS);
        barrier_init_done();
    }
    cluster_sync();
    if (group == 2) {
        registers_down<24>();
        if (thread == 0) load_operands(&w, &m, smem, full, empty);
    } else {
        registers_up<240>();
        int clusters = gridDim.x / BLOCKS, depth = (w.c + DEPTH - 1) / DEPTH;
        int rank = cluster_rank();
        struct finish f = {};
        f.w = &w, f.m = &m;
        f.pieces = smem + PIECES_AT + group * BUFFERS * PIECE_BYTES;
        f.id = 1 + group;
        int item = blockIdx.x / BLOCKS + group * clusters;
        for (int i = group; item < w.pairs * w.columns; i += 2, item += 2 * clusters) {
            struct place p = place_of(&w, item, rank);
            float c[2][COLS / 2], shift[4];
            /* tile i of the block: the (i / 2 + group)-th time that this turn comes */
            if (i > 0) barrier_wait(turn + 8 * group, (i / 2 + group + 1) & 1);
            multiply_tile(c, depth, stage_of(i * depth), smem, full, empty);
            __syncwarp();
            if ((thread & 31) == 0) barrier_arrive(turn + 8 * (1 - group));
            warpgroup_wait<0>();
#pragma unroll
            for (int j = 0; j < COLS / 2; j += 32) wgmma_hold(c[0] + j), wgmma_hold(c[1] + j);
            release(empty, stage_of(i * depth + depth - 1).at);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int row = p.row + row_at(j);
                shift[j] = row < w.n ? __ldg(w.shift + row) : 0.0f;
            }
            put_tile(&f, c, p, shift);
        }
        if (thread == 0) bulk_store_wait<0>();
    }
    __syncwarp();
    cluster_sync(); /* what the other block sends here has come */
#endif
}

/* ---- launches -------------------------------------------------------------------------------- */

/* A row-major (rows, cols) bf16; boxes of box_rows and 64 columns. */
static srf_status make_map(CUtensorMap *map, const void *p, int64_t rows, int64_t cols,
                           int box_rows)
{
    void *encode = NULL;
    enum cudaDriverEntryPointQueryResult found;
    CUDA_TRY(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000,
                                              cudaEnableDefault, &found));
    SRF_FAIL_IF(!encode, SRF_DEVICE, "CUDA: the driver has no cuTensorMapEncodeTiled");
    cuuint64_t size[2] = {(cuuint64_t)cols, (cuuint64_t)rows};
    cuuint64_t stride[1] = {(cuuint64_t)cols * sizeof(bf16)};
    cuuint32_t box[2] = {64, (cuuint32_t)box_rows}, step[2] = {1, 1};
    CUresult st = ((decltype(&cuTensorMapEncodeTiled))encode)(
        map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)p, size, stride, box, step,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    SRF_FAIL_IF(st != CUDA_SUCCESS, SRF_DEVICE,
                "CUDA: cuTensorMapEncodeTiled: error %d for (%lld, %lld)", (int)st, (long long)rows,
                (long long)cols);
    return SRF_OK;
}

bool srf__head_product_takes(const struct srf_ctx *ctx, const struct head_product *p)
{
    struct cudaFuncAttributes f;
    return ctx->dtype == SRF_BF16 && cuda_of(ctx)->cc == 90 && p->ld % 8 == 0 && p->c % 8 == 0 &&
           p->n < INT32_MAX / 2 && p->ld < INT32_MAX / 2 && is_aligned(p->x, 16) &&
           is_aligned(p->w, 16) && is_aligned(p->e, 16) &&
           (int64_t)cuda_of(ctx)->smem_max >= SMEM &&
           cudaFuncGetAttributes(&f, (const void *)product_kernel) == cudaSuccess &&
           f.maxThreadsPerBlock == THREADS;
}

srf_status srf__head_product(struct srf_ctx *ctx, const struct head_product *p)
{
    struct operands m;
    SRF_TRY(make_map(&m.x, p->x, p->n, p->c, ROWS));
    SRF_TRY(make_map(&m.w, p->w, p->ld, p->c, COLS / BLOCKS));
    SRF_TRY(make_map(&m.e, p->e, p->n, p->ld, ROWS));
    struct work w = {};
    w.n = (int)p->n, w.c = (int)p->c, w.v = (int)p->v;
    w.pairs = (int)div_up(p->n, BLOCKS * ROWS), w.columns = (int)div_up(p->ld, COLS);
    w.shift = p->shift, w.parts = p->parts;
    int64_t items = (int64_t)w.pairs * w.columns, clusters = cuda_of(ctx)->n_sm / BLOCKS;
    clusters = clusters < items ? clusters : items;
    CUDA_TRY(
        cudaFuncSetAttribute(product_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM));
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = BLOCKS;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)(clusters * BLOCKS));
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = SMEM;
    config.stream = stream_of(ctx);
    config.attrs = &cluster;
    config.numAttrs = 1;
    CUDA_TRY(cudaLaunchKernelEx(&config, product_kernel, w, m));
    return srf__cuda_launched("head_loss");
}
