/* The tiles of product_wgmma.cu: their sizes, what a launch is told, how a finished tile leaves.
 *
 * A tile goes in pieces of 64 columns through shared memory, where a warpgroup has BUFFERS of them,
 * and from there by bulk copy. A slope that y is multiplied with comes to a buffer by bulk copy
 * while the tile's products run; the result takes its place. */
#pragma once
#include "kernels/cuda/gelu.h"
#include "kernels/cuda/product.h"
#include "kernels/cuda/product_wgmma.h"
#include "kernels/cuda/tile.h"

#define ROWS        PRODUCT_ROWS /* of a tile */
#define COLS        PRODUCT_COLS
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
#define BARRIERS    (2 * STAGES + 2 + 2 * BUFFERS)
#define PIECES_AT   (STAGES * STAGE_BYTES)
#define EXTRA_AT    (PIECES_AT + 2 * BUFFERS * PIECE_BYTES)
#define EXTRA_BYTES ((GROUP_WARPS - 1) * PIECE_COLS * (int)sizeof(float)) /* of a warpgroup */
#define BARRIERS_AT (EXTRA_AT + 2 * EXTRA_BYTES)
#define SMEM        (1024 + BARRIERS_AT + BARRIERS * 8)

struct operands {
    CUtensorMap a, b, y, slope;
};

struct work {
    int m, n, k, v;
    int pairs, columns; /* tiles of y: pairs of rows, columns */
    bool rows_first;    /* tiles go down a column first */
    const float *shift;
    const bf16 *bias;
    float *sums;
};

#if HAVE_WGMMA
struct place {
    int row, col; /* of y: the tile's first */
};
__device__ __forceinline__ struct place place_of(const struct work *w, int item, int rank)
{
    int pair = w->rows_first ? item % w->pairs : item / w->columns;
    int column = w->rows_first ? item / w->pairs : item % w->columns;
    struct place p = {(pair * BLOCKS + rank) * ROWS, column * COLS};
    return p;
}

/* What a warpgroup keeps for its tiles' ends. */
struct finish {
    const struct work *w;
    const struct operands *m;
    uint32_t pieces; /* BUFFERS in shared memory */
    float *sums;     /* SLOPE: (GROUP_WARPS - 1, PIECE_COLS), in shared memory */
    uint32_t bias;   /* GELU: bf16 (COLS), in the same place */
    uint32_t came;   /* SLOPE: a barrier for each buffer */
    int id;          /* of the warpgroup's barrier */
    int next;        /* buffer that is filled next */
    int parity;      /* bit i: of came[i]'s phase that is waited for next */
};

/* Rows of a thread in a tile: j = 0 .. 3. */
__device__ __forceinline__ int row_at(int j)
{
    int thread = threadIdx.x % GROUP, lane = thread & 31, warp = thread >> 5;
    return (j >> 1) * 64 + (j & 1) * 8 + 16 * warp + (lane >> 2);
}
/* Address of the words of a piece that a thread has for columns 8 nt .. 8 nt + 7: two in row j. */
__device__ __forceinline__ uint32_t word_at(uint32_t piece, int nt, int j)
{
    int thread = threadIdx.x % GROUP, lane = thread & 31, warp = thread >> 5;
    uint32_t base = piece + tile_at<PIECE_COLS>(16 * warp + (lane >> 2), 0) + (lane & 3) * 4;
    return (base ^ (nt * 16)) + ((j >> 1) * 64 + (j & 1) * 8) * (PIECE_COLS * 2);
}
/* Its products there. */
__device__ __forceinline__ float2 products_at(const float c[2][COLS / 2], int piece, int nt, int j)
{
    const float *u = &c[j >> 1][4 * (nt + piece * (PIECE_COLS / 8)) + 2 * (j & 1)];
    return make_float2(u[0], u[1]);
}

/* ---- exp ------------------------------------------------------------------------------------- */

__device__ __forceinline__ void put_exp(struct finish *f, float c[2][COLS / 2], struct place p)
{
    int thread = threadIdx.x % GROUP, lane = thread & 31;
    float sum[4] = {}, shift[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        int row = p.row + row_at(j);
        shift[j] = row < f->w->m ? __ldg(f->w->shift + row) : 0.0f;
    }
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
#pragma unroll
        for (int nt = 0; nt < PIECE_COLS / 8; nt++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float2 u = products_at(c, i, nt, j);
                u.x = exp2_fast(fmaf(u.x, LOG2E, -shift[j]));
                u.y = exp2_fast(fmaf(u.y, LOG2E, -shift[j]));
                sum[j] += u.x + u.y;
                store_shared(word_at(piece, nt, j), pack_bf16(u.x, u.y));
            }
        bulk_fence();
        group_sync(f->id, GROUP);
        if (thread == 0) bulk_store(&f->m->y, p.col + i * PIECE_COLS, p.row, piece);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float all = quad_sum(sum[j]);
        int row = p.row + row_at(j);
        if ((lane & 3) == 0 && row < f->w->m)
            f->w->sums[(int64_t)(p.col / COLS) * f->w->m + row] = all;
    }
}

/* ---- gelu and its slope ---------------------------------------------------------------------- */

/* The tile's part of the bias to shared memory, before its products. */
__device__ __forceinline__ void take_bias(const struct finish *f, struct place p)
{
    int thread = threadIdx.x % GROUP, col = p.col + 2 * thread;
    if (thread >= COLS / 2) return;
    bool there = f->w->bias && col < f->w->n;
    store_shared(f->bias + 4 * thread, there ? *(const uint32_t *)(f->w->bias + col) : 0);
}

__device__ __forceinline__ float tanh_fast(float x)
{
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* x = gelu(u), *slope = gelu'(u), with one tanh, to 2^-11 of 1: what follows rounds to bf16. */
__device__ __forceinline__ float gelu_and_slope(float u, float *slope)
{
    float u2 = fminf(u * u, 1e4f), h = 0.5f * u; /* beyond, tanh is 1 and no slope is left of it */
    float t = tanh_fast(u * fmaf(0.5f * GELU_SCALE * GELU_CUBIC, u2, 0.5f * GELU_SCALE));
    float dz = fmaf(1.5f * GELU_SCALE * GELU_CUBIC, u2, 0.5f * GELU_SCALE);
    *slope = fmaf(h * dz, fmaf(-t, t, 1.0f), fmaf(0.5f, t, 0.5f));
    return fmaf(h, t, h);
}

/* A buffer each for y and the slope. */
__device__ __forceinline__ void put_gelu(struct finish *f, float c[2][COLS / 2], struct place p)
{
    int thread = threadIdx.x % GROUP, lane = thread & 31;
    uint32_t y = f->pieces, slope = f->pieces + PIECE_BYTES;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        if (thread == 0) bulk_store_wait<0>();
        group_sync(f->id, GROUP); /* and, the first time, the bias has come */
#pragma unroll
        for (int nt = 0; nt < PIECE_COLS / 8; nt++) {
            float2 b =
                unpack_bf16(load_shared(f->bias + (i * PIECE_COLS + 8 * nt) * 2 + (lane & 3) * 4));
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float2 u = products_at(c, i, nt, j), s;
                u.x = gelu_and_slope(u.x + b.x, &s.x);
                u.y = gelu_and_slope(u.y + b.y, &s.y);
                store_shared(word_at(y, nt, j), pack_bf16(u.x, u.y));
                store_shared(word_at(slope, nt, j), pack_bf16(s.x, s.y));
            }
        }
        bulk_fence();
        group_sync(f->id, GROUP);
        if (thread == 0) {
            bulk_store(&f->m->y, p.col + i * PIECE_COLS, p.row, y);
            bulk_store(&f->m->slope, p.col + i * PIECE_COLS, p.row, slope);
        }
    }
}

/* ---- times a slope --------------------------------------------------------------------------- */

/* Piece i of the slope; by one thread. */
__device__ __forceinline__ void ask_slope(const struct finish *f, struct place p, int i)
{
    uint32_t bar = f->came + 8 * (i % BUFFERS);
    barrier_expect(bar, PIECE_BYTES);
    bulk_load(f->pieces + i % BUFFERS * PIECE_BYTES, &f->m->slope, p.col + i * PIECE_COLS, p.row,
              bar);
}

/* Column sums of piece i as it was rounded: a warp takes a quarter of its rows, a lane two
 * columns. Rows past the end are zeros. */
__device__ __forceinline__ void put_sums(const struct finish *f, struct place p, int i)
{
    int thread = threadIdx.x % GROUP, lane = thread & 31, warp = thread >> 5;
    uint32_t piece = f->pieces + i % BUFFERS * PIECE_BYTES;
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 8
    for (int r = 0; r < ROWS / GROUP_WARPS; r++) {
        int row = warp * (ROWS / GROUP_WARPS) + r;
        float2 x =
            unpack_bf16(load_shared(piece + tile_at<PIECE_COLS>(row, lane >> 2) + (lane & 3) * 4));
        sum.x += x.x, sum.y += x.y;
    }
    float2 *others = (float2 *)f->sums + lane;
    if (warp > 0) others[(warp - 1) * (PIECE_COLS / 2)] = sum;
    group_sync(f->id, GROUP);
    int col = p.col + i * PIECE_COLS + 2 * lane;
    if (warp == 0 && p.row < f->w->m && col < f->w->n) {
        for (int j = 0; j < GROUP_WARPS - 1; j++) {
            float2 more = others[j * (PIECE_COLS / 2)];
            sum.x += more.x, sum.y += more.y;
        }
        *(float2 *)(f->w->sums + (int64_t)(p.row / ROWS) * f->w->n + col) = sum;
    }
    group_sync(f->id, GROUP); /* read: the next piece's sums may come */
}

__device__ __forceinline__ void put_times_slope(struct finish *f, float c[2][COLS / 2],
                                                struct place p)
{
    int thread = threadIdx.x % GROUP;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int buffer = i % BUFFERS;
        uint32_t piece = f->pieces + buffer * PIECE_BYTES;
        barrier_wait(f->came + 8 * buffer, f->parity >> buffer & 1);
        f->parity ^= 1 << buffer;
#pragma unroll
        for (int nt = 0; nt < PIECE_COLS / 8; nt++) {
            float2 slope[4]; /* under way at once */
#pragma unroll
            for (int j = 0; j < 4; j++) slope[j] = unpack_bf16(load_shared(word_at(piece, nt, j)));
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float2 u = products_at(c, i, nt, j);
                store_shared(word_at(piece, nt, j), pack_bf16(u.x * slope[j].x, u.y * slope[j].y));
            }
        }
        bulk_fence();
        group_sync(f->id, GROUP);
        if (thread == 0) bulk_store(&f->m->y, p.col + i * PIECE_COLS, p.row, piece);
        /* into the buffer of the piece before, which its copy has had the time to read */
        if (thread == 0 && i > 0 && i - 1 + BUFFERS < PIECES) {
            bulk_store_wait<1>();
            ask_slope(f, p, i - 1 + BUFFERS);
        }
        if (f->w->sums) put_sums(f, p, i);
    }
}
#endif
