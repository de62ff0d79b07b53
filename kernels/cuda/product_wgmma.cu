/* Products on Hopper's warpgroup products (sm_90a), bf16, with what training and prefill hang on to
 * some of them done at a tile's end, beside the next tile's products: product.h has the list.
 *
 * A block stays, and takes tiles (128, 192) of y in turns: one warpgroup asks for operands, two
 * others have a tile each, so that one finishes its tile while the other's products run. Two blocks
 * are a cluster: their tiles lie one below the other, each loads half of B for both. Column sums
 * of A are made of its stages by warps that have nothing else to do, each stage by the blocks of
 * one of the tiles that it goes into.
 *
 * Barriers of a block:
 *     full[s]    stage s has its bytes, A's and B's
 *     empty[s]   the warps that used stage s, of both blocks, are done with it; and this block's
 *                summing warps
 *     turn[g]    warpgroup g may start on its next tile: the other has seen all its stages full.
 *                Without it a warpgroup could wait for a stage's phase while the one before has not
 *                ended, and take the end of the last but one, of the same parity, for it.
 *     came[g]    the residual that warpgroup g's warps add: product_wgmma_ends.h
 *
 * Floor: tensor cores, 2 m n k flops at 990 Tflop/s; and the bytes of A, B, y, slope, once. */
#include "kernels/cuda/product_wgmma_ends.h"

/* The launcher asks for this bound to learn whether a kernel was compiled for its device. */
#if defined(__CUDA_ARCH__) && !HAVE_WGMMA
#define BOUNDS __launch_bounds__(2 * THREADS)
#else
#define BOUNDS __launch_bounds__(THREADS, 1)
#endif

#if HAVE_WGMMA
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

template <bool B_COLS>
__device__ __forceinline__ void load_operands(const struct work *w, const struct operands *m,
                                              uint32_t smem, uint32_t full, uint32_t empty)
{
    int rank = cluster_rank(), clusters = gridDim.x / BLOCKS, depth = (w->k + DEPTH - 1) / DEPTH;
    struct stage s = {0, 0};
    for (int item = blockIdx.x / BLOCKS; item < w->pairs * w->columns; item += clusters) {
        struct place p = place_of(w, item, rank);
        for (int i = 0; i < depth; i++, stage_next(&s)) {
            uint32_t a = smem + s.at * STAGE_BYTES, b = a + A_BYTES, bar = full + 8 * s.at;
            barrier_wait(empty + 8 * s.at, s.parity ^ 1); /* the first round: free */
            barrier_expect(bar, STAGE_BYTES);
            bulk_load(a, &m->a, i * DEPTH, p.row, bar);
            /* this block's half of B for both: of the depth or of the columns */
            if (B_COLS) {
                int half = rank * (DEPTH / BLOCKS);
                for (int j = 0; j < PIECES; j++)
                    bulk_load_to(b + (j * DEPTH + half) * 128, &m->b, p.col + j * PIECE_COLS,
                                 i * DEPTH + half, bar, (1 << BLOCKS) - 1);
            } else {
                int half = rank * (COLS / BLOCKS);
                bulk_load_to(b + half * 128, &m->b, i * DEPTH, p.col + half, bar,
                             (1 << BLOCKS) - 1);
            }
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

/* Column sums of this block's rows of A, by SUMMERS warps, PRODUCT_SUMS rows of a stage each. */
__device__ __forceinline__ void sum_operand(const struct work *w, uint32_t smem, uint32_t full,
                                            uint32_t empty, int warp)
{
    int rank = cluster_rank(), clusters = gridDim.x / BLOCKS, depth = (w->k + DEPTH - 1) / DEPTH;
    int lane = threadIdx.x & 31, group = lane >> 3;
    uint32_t own = smem + (warp * PRODUCT_SUMS + group) * 128 + ((lane & 7) ^ group) * 16;
    struct stage s = {0, 0};
    for (int item = blockIdx.x / BLOCKS; item < w->pairs * w->columns; item += clusters) {
        struct place p = place_of(w, item, rank);
        int row = p.row + warp * PRODUCT_SUMS, next = p.col / COLS;
        for (int i = 0; i < depth; i++, stage_next(&s)) {
            barrier_wait(full + 8 * s.at, s.parity);
            if (i == next) {
                float sum[8] = {};
#pragma unroll 4
                for (int j = 0; j < PRODUCT_SUMS / 4; j++) { /* rows group + 4 j */
                    uint32_t at = (own ^ (j & 1) * 64) + s.at * STAGE_BYTES + j * 512, x[4];
                    load_shared_words(x, at);
#pragma unroll
                    for (int q = 0; q < 4; q++) {
                        float2 y = unpack_bf16(x[q]);
                        sum[2 * q] += y.x, sum[2 * q + 1] += y.y;
                    }
                }
                /* over the groups: each keeps half of the columns, then a quarter */
#pragma unroll
                for (int n = 4; n >= 2; n >>= 1) {
                    bool upper = lane & 4 * n;
#pragma unroll
                    for (int q = 0; q < n; q++) {
                        float kept = upper ? sum[q + n] : sum[q],
                              sent = upper ? sum[q] : sum[q + n];
                        sum[q] = kept + __shfl_xor_sync(0xffffffffu, sent, 4 * n);
                    }
                }
                int col = i * DEPTH + (lane & 7) * 8 + (group & 2) * 2 + (group & 1) * 2;
                if (row < w->m && col < w->k)
                    *(float2 *)(w->sums + (int64_t)(row / PRODUCT_SUMS) * w->k + col) =
                        make_float2(sum[0], sum[1]);
                next += w->columns;
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + 8 * s.at);
        }
    }
}

/* c = the tile's products. */
template <bool B_COLS>
__device__ __forceinline__ void multiply_tile(float c[2][COLS / 2], int depth, struct stage s,
                                              uint32_t smem, uint32_t full, uint32_t empty)
{
    uint32_t a0 = tile_low(smem);
    uint32_t b0 = B_COLS ? tile_cols_low(smem + A_BYTES, DEPTH * 128) : tile_low(smem + A_BYTES);
    int before = 0;
    for (int i = 0; i < depth; i++) {
        uint32_t at = s.at * (STAGE_BYTES / 16), a = a0 + at, b = b0 + at;
        barrier_wait(full + 8 * s.at, s.parity);
        warpgroup_fence();
#pragma unroll
        for (int kk = 0; kk < DEPTH / 16; kk++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                wgmma_192<B_COLS>(c[half], tile_of(a + half * (A_BYTES / 2 / 16) + 2 * kk),
                                  tile_of(b + (B_COLS ? 128 : 2) * kk), i > 0 || kk > 0);
        warpgroup_commit();
        warpgroup_wait<1>();
        if (i > 0) release(empty, before);
        before = s.at;
        stage_next(&s);
    }
}

#endif

template <int END>
static __global__ BOUNDS void product_kernel(const __grid_constant__ struct work w,
                                             const __grid_constant__ struct operands m)
{
#if HAVE_WGMMA
    extern __shared__ char raw[];
    char *base = raw + (-smem_addr(raw) & 1023u);
    uint32_t smem = smem_addr(base), full = smem + BARRIERS_AT, empty = full + 8 * STAGES;
    uint32_t turn = empty + 8 * STAGES, came = turn + 16; /* CAME for each warpgroup */
    constexpr bool PLAIN = END == PRODUCT_PLAIN;
    constexpr bool B_COLS = END != PRODUCT_EXP && END != PRODUCT_SLOPE && !PLAIN;
    constexpr bool NORM = END == PRODUCT_NORM || END == PRODUCT_NORM_GELU;
    constexpr bool BIAS = END == PRODUCT_GELU || END == PRODUCT_ADD;
    /* Of one lane, so that the compiler knows it to be a warp's: stages, tiles and the descriptors
     * made of them are then worked out once for a warp, in uniform registers. */
    int group = __shfl_sync(0xffffffffu, (int)threadIdx.x / GROUP, 0);
    int thread = threadIdx.x % GROUP;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, BLOCKS * GROUP_WARPS + (PLAIN ? SUMMERS : 0));
        }
        for (int i = 0; i < 2; i++) barrier_init(turn + 8 * i, GROUP_WARPS);
        for (int i = 0; i < 2 * CAME; i++) barrier_init(came + 8 * i, 1);
        barrier_init_done();
    }
    cluster_sync();
    if (group == 2) {
        registers_down<PLAIN ? 40 : 24>();
        if (thread == 0) load_operands<B_COLS>(&w, &m, smem, full, empty);
        int warp = __shfl_sync(0xffffffffu, thread / 32, 0);
        if (PLAIN && warp > 0 && warp <= SUMMERS) sum_operand(&w, smem, full, empty, warp - 1);
    } else {
        registers_up<PLAIN ? 232 : 240>();
        int clusters = gridDim.x / BLOCKS, depth = (w.k + DEPTH - 1) / DEPTH;
        int rank = cluster_rank();
        struct finish f = {};
        f.w = &w, f.m = &m;
        f.pieces = smem + PIECES_AT + group * BUFFERS * PIECE_BYTES;
        f.sums = (float *)(base + EXTRA_AT + group * EXTRA_BYTES);
        f.bias = f.columns = smem + EXTRA_AT + group * EXTRA_BYTES;
        f.came = came + 8 * group * CAME;
        f.id = 1 + group;
        int item = blockIdx.x / BLOCKS + group * clusters;
        for (int i = group; item < w.pairs * w.columns; i += 2, item += 2 * clusters) {
            struct place p = place_of(&w, item, rank);
            float c[2][COLS / 2];
            struct row_norms rows = {};
            struct slope_row slopes = {};
            if (END == PRODUCT_SLOPE) slopes = take_slopes(&w, p);
            if (END == PRODUCT_ADD && thread % 32 == 0) {
                bulk_store_wait<0>(); /* while the tile's products run */
                for (int j = 0; j < HALF_BUFFERS; j++) ask_residual(&f, p, j);
            }
            if (NORM) rows = take_norms(&w, p);
            if (BIAS || NORM) {
                group_sync(f.id, GROUP); /* the last tile's bias, or t, has been read */
                if (BIAS) take_bias(&f, p);
                if (NORM) take_columns(&f, p);
                group_sync(f.id, GROUP);
            }
            /* tile i of the block: the (i / 2 + group)-th time that this turn comes */
            if (i > 0) barrier_wait(turn + 8 * group, (i / 2 + group + 1) & 1);
            multiply_tile<B_COLS>(c, depth, stage_of(i * depth), smem, full, empty);
            __syncwarp();
            if ((thread & 31) == 0) barrier_arrive(turn + 8 * (1 - group));
            warpgroup_wait<0>();
#pragma unroll
            for (int j = 0; j < COLS / 2; j += 32) wgmma_hold(c[0] + j), wgmma_hold(c[1] + j);
            release(empty, stage_of(i * depth + depth - 1).at);
            if (END == PRODUCT_EXP) put_exp(&f, c, p);
            if (END == PRODUCT_GELU) put_gelu(&f, c, p);
            if (END == PRODUCT_SLOPE) put_times_slope(&f, c, p, &slopes);
            if (END == PRODUCT_ADD) put_sum(&f, c, p);
            if (NORM) put_normed<END>(&f, c, p, &rows);
            if (PLAIN) put_plain(&f, c, p);
        }
        bulk_store_wait<0>();
    }
    __syncwarp();
    cluster_sync(); /* what the other block sends here has come */
#endif
}

/* ---- launches -------------------------------------------------------------------------------- */

/* A row-major (rows, cols) bf16, leading dimension ld; boxes of box_rows and 64 columns. */
static srf_status make_map(CUtensorMap *map, const void *p, int64_t rows, int64_t cols, int64_t ld,
                           int box_rows)
{
    void *encode = NULL;
    enum cudaDriverEntryPointQueryResult found;
    CUDA_TRY(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000,
                                              cudaEnableDefault, &found));
    SRF_FAIL_IF(!encode, SRF_DEVICE, "CUDA: the driver has no cuTensorMapEncodeTiled");
    cuuint64_t size[2] = {(cuuint64_t)cols, (cuuint64_t)rows};
    cuuint64_t stride[1] = {(cuuint64_t)ld * sizeof(bf16)};
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

typedef void kernel(const struct work, const struct operands);

static kernel *kernel_of(enum product_end end)
{
    switch (end) {
    case PRODUCT_EXP:
        return product_kernel<PRODUCT_EXP>;
    case PRODUCT_GELU:
        return product_kernel<PRODUCT_GELU>;
    case PRODUCT_SLOPE:
        return product_kernel<PRODUCT_SLOPE>;
    case PRODUCT_ADD:
        return product_kernel<PRODUCT_ADD>;
    case PRODUCT_NORM:
        return product_kernel<PRODUCT_NORM>;
    case PRODUCT_NORM_GELU:
        return product_kernel<PRODUCT_NORM_GELU>;
    case PRODUCT_PLAIN:
        return product_kernel<PRODUCT_PLAIN>;
    }
    return NULL;
}

bool srf__product_here(const struct srf_ctx *ctx, enum product_end end)
{
    struct cudaFuncAttributes f;
    return ctx->dtype == SRF_BF16 && cuda_of(ctx)->cc == 90 &&
           (int64_t)cuda_of(ctx)->smem_max >= SMEM &&
           cudaFuncGetAttributes(&f, (const void *)kernel_of(end)) == cudaSuccess &&
           f.maxThreadsPerBlock == THREADS;
}

bool srf__product_takes(const struct srf_ctx *ctx, const struct wgmma_product *p)
{
    int64_t most = INT32_MAX / 2;
    return p->n % 8 == 0 && p->k % 8 == 0 && p->m > 0 && p->n > 0 && p->k > 0 && p->m < most &&
           p->n < most && p->k < most && is_aligned(p->a, 16) && is_aligned(p->b, 16) &&
           is_aligned(p->y, 16) && is_aligned(p->slopes, 16) && is_aligned(p->residual, 16) &&
           is_aligned(p->bias, 4) && is_aligned(p->moments, 8) && is_aligned(p->rows, 8) &&
           is_aligned(p->columns, 16) && srf__product_here(ctx, p->end);
}

srf_status srf__product(struct srf_ctx *ctx, const struct wgmma_product *p)
{
    struct operands m;
    bool b_rows = p->end == PRODUCT_EXP || p->end == PRODUCT_SLOPE || p->end == PRODUCT_PLAIN;
    SRF_TRY(make_map(&m.a, p->a, p->m, p->k, p->k, ROWS));
    if (b_rows)
        SRF_TRY(make_map(&m.b, p->b, p->n, p->k, p->k, COLS / BLOCKS));
    else
        SRF_TRY(make_map(&m.b, p->b, p->k, p->n, p->n, DEPTH / BLOCKS));
    SRF_TRY(make_map(&m.y, p->y, p->m, p->n, p->ld ? p->ld : p->n, STRIP));
    SRF_TRY(make_map(&m.residual, p->residual ? p->residual : p->y, p->m, p->n, p->n, STRIP));
    struct work w = {};
    w.m = (int)p->m, w.n = (int)p->n, w.k = (int)p->k, w.v = (int)p->v;
    w.pairs = (int)div_up(p->m, BLOCKS * ROWS), w.columns = (int)div_up(p->n, COLS);
    w.rows_first = p->n > p->m; /* the larger operand is read once */
    w.shift = p->shift, w.bias = (const bf16 *)p->bias, w.sums = p->sums;
    w.moments = (float2 *)p->moments, w.slopes = p->slopes;
    w.row_norms = (const float2 *)p->rows, w.column_norms = (const float4 *)p->columns;
    int64_t items = (int64_t)w.pairs * w.columns, clusters = cuda_of(ctx)->n_sm / BLOCKS;
    clusters = clusters < items ? clusters : items;
    kernel *f = kernel_of(p->end);
    CUDA_TRY(cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM));
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
    CUDA_TRY(cudaLaunchKernelEx(&config, f, w, m));
    return srf__cuda_launched("product");
}
