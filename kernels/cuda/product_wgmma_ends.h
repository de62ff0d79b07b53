/* The tiles of product_wgmma.cu: their sizes, what a launch is told, how a finished tile leaves.
 *
 * A tile goes in pieces of 64 columns through shared memory, where a warpgroup has BUFFERS of them,
 * and from there by bulk copy. A residual comes to a buffer by bulk copy while the tile's products
 * run; the result takes its place. Slopes go and come past shared memory, which the products keep
 * busy, in the order in which threads have them.
 *
 * The warps of a warpgroup do so each for itself, strips of 16 rows that no other warp has to wait
 * for: an end must not last longer than the other warpgroup's products, and those keep shared
 * memory so busy that each wait for it costs. */
#pragma once
#include "kernels/cuda/gelu.h"
#include "kernels/cuda/product.h"
#include "kernels/cuda/product_wgmma.h"
#include "kernels/cuda/slope.h"
#include "kernels/cuda/tile.h"

#define ROWS         PRODUCT_ROWS /* of a tile */
#define COLS         PRODUCT_COLS
#define DEPTH        64 /* of a stage */
#define STAGES       4
#define PIECE_COLS   64 /* of a piece of a tile, that leaves at once */
#define PIECES       (COLS / PIECE_COLS)
#define BUFFERS      2             /* of a warpgroup, for pieces */
#define HALF_BUFFERS (2 * BUFFERS) /* the same, for halves of pieces: 64 rows */
#define THREADS      384
#define GROUP        128 /* threads */
#define GROUP_WARPS  4
#define SUMMERS      (ROWS / PRODUCT_SUMS) /* warps that add up A's columns */
#define BLOCKS       2                     /* of a cluster */

#define A_BYTES     (ROWS * DEPTH * (int)sizeof(bf16))
#define B_BYTES     (COLS * DEPTH * (int)sizeof(bf16))
#define STAGE_BYTES (A_BYTES + B_BYTES)
#define PIECE_BYTES (ROWS * PIECE_COLS * (int)sizeof(bf16))
#define HALF_BYTES  (PIECE_BYTES / 2)
#define STRIP       (ROWS / 2 / GROUP_WARPS) /* rows of half a piece that a warp has */
#define STRIP_BYTES (HALF_BYTES / GROUP_WARPS)
#define CAME        (GROUP_WARPS * HALF_BUFFERS) /* barriers of a warpgroup */
#define BARRIERS    (2 * STAGES + 2 + 2 * CAME)
#define PIECES_AT   (STAGES * STAGE_BYTES)
#define EXTRA_AT    (PIECES_AT + 2 * BUFFERS * PIECE_BYTES)
#define EXTRA_BYTES (COLS * (int)sizeof(float)) /* of a warpgroup */
#define BARRIERS_AT (EXTRA_AT + 2 * EXTRA_BYTES)
#define SMEM        (1024 + BARRIERS_AT + BARRIERS * 8)

struct operands {
    CUtensorMap a, b, y, residual;
};

struct work {
    int m, n, k, v;
    int pairs, columns; /* tiles of y: pairs of rows, columns */
    bool rows_first;    /* tiles go down a column first */
    const float *shift;
    const bf16 *bias;
    float *sums;
    float2 *moments;
    uint8_t *slopes;
    const float2 *row_norms;    /* wgmma_product's `rows` */
    const float4 *column_norms; /* and `columns` */
};

#if SRF__SLOPE_ROWS != ROWS || SRF__SLOPE_COLS != COLS
#error "slopes lie in other tiles"
#endif

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
    uint32_t pieces;  /* BUFFERS in shared memory */
    float *sums;      /* SLOPE: (GROUP_WARPS - 1, PIECE_COLS), EXTRA_BYTES in shared memory */
    uint32_t bias;    /* GELU, ADD: bf16 (COLS), in the same place */
    uint32_t columns; /* NORM: t of the columns, fp32 (COLS), in the same place */
    uint32_t came;    /* ADD: a warp's barrier for each half of a buffer */
    int id;           /* of the warpgroup's barrier */
    int parity;       /* bit i: of came[i]'s phase that is waited for next */
};

/* Rows of a thread in a tile: j = 0 .. 3. */
__device__ __forceinline__ int row_at(int j)
{
    int thread = threadIdx.x % GROUP, lane = thread & 31, warp = thread >> 5;
    return (j >> 1) * 64 + (j & 1) * 8 + 16 * warp + (lane >> 2);
}
/* Address that a thread gives for four 8 x 8 tiles at once (mma.h): 16 rows of its warp, columns
 * 8 nt .. 8 nt + 15, nt even; from row 0 or 64 of the piece on. Its words then are those of columns
 * nt in rows 0 and 1 (j of row_at), nt + 1 in rows 0 and 1. */
__device__ __forceinline__ uint32_t tiles_at(uint32_t piece)
{
    int thread = threadIdx.x % GROUP, lane = thread & 31, warp = thread >> 5;
    return piece + tile_at<PIECE_COLS>(16 * warp + (lane & 15), lane >> 4);
}
/* Its products there. */
__device__ __forceinline__ float2 products_at(const float c[2][COLS / 2], int piece, int nt, int j)
{
    const float *u = &c[j >> 1][4 * (nt + piece * (PIECE_COLS / 8)) + 2 * (j & 1)];
    return make_float2(u[0], u[1]);
}

/* ---- strips: this warp's 16 rows of half a piece -------------------------------------------- */

/* One of the residual comes, to where y will be; by one thread of each warp. */
__device__ __forceinline__ void ask_strip(const struct finish *f, struct place p, int i, int half,
                                          int buffer)
{
    int warp = threadIdx.x % GROUP / 32;
    uint32_t bar = f->came + 8 * (warp * HALF_BUFFERS + buffer);
    barrier_expect(bar, STRIP_BYTES);
    bulk_load(f->pieces + buffer * HALF_BYTES + warp * STRIP_BYTES, &f->m->residual,
              p.col + i * PIECE_COLS, p.row + half * (ROWS / 2) + warp * STRIP, bar);
}
/* One of y leaves; by the same thread. */
__device__ __forceinline__ void put_strip(const struct finish *f, struct place p, int i, int half,
                                          int buffer)
{
    int warp = threadIdx.x % GROUP / 32;
    bulk_store(&f->m->y, p.col + i * PIECE_COLS, p.row + half * (ROWS / 2) + warp * STRIP,
               f->pieces + buffer * HALF_BYTES + warp * STRIP_BYTES);
}
/* Before a warp writes its strip h of a tile: what left by the same buffer has been read. */
__device__ __forceinline__ void await_buffer(int h)
{
    int lane = threadIdx.x & 31;
    if (lane == 0 && h == 0) bulk_store_wait<0>();
    if (lane == 0 && h >= HALF_BUFFERS) bulk_store_wait<HALF_BUFFERS - 1>();
    __syncwarp();
}
/* The strip that a warp has written leaves. */
__device__ __forceinline__ void send_strip(const struct finish *f, struct place p, int i, int half,
                                           int buffer)
{
    bulk_fence();
    __syncwarp();
    if ((threadIdx.x & 31) == 0) put_strip(f, p, i, half, buffer);
}
__device__ __forceinline__ void wait_strip(struct finish *f, int buffer)
{
    int warp = threadIdx.x % GROUP / 32;
    barrier_wait(f->came + 8 * (warp * HALF_BUFFERS + buffer), f->parity >> buffer & 1);
    f->parity ^= 1 << buffer;
}

/* Eight numbers are ready at the same time. Else the compiler, short of registers, would take one
 * after the other through a special function, which takes its time. */
__device__ __forceinline__ void hold(float x[8])
{
#pragma unroll
    for (int i = 0; i < 8; i++) asm volatile("" : "+f"(x[i]));
}

/* ---- as it is -------------------------------------------------------------------------------- */

/* Every warp for itself, 16 rows at a time. */
__device__ __forceinline__ void put_plain(const struct finish *f, const float c[2][COLS / 2],
                                          struct place p)
{
#pragma unroll
    for (int h = 0; h < 2 * PIECES; h++) {
        int buffer = h % HALF_BUFFERS, i = h / 2, half = h % 2;
        uint32_t tiles = tiles_at(f->pieces + buffer * HALF_BYTES);
        asm volatile("" : "+r"(tiles)); /* no room to keep addresses made of it */
        await_buffer(h);
#pragma unroll
        for (int nt = 0; nt < PIECE_COLS / 8; nt += 2) {
            uint32_t y[4];
#pragma unroll
            for (int q = 0; q < 4; q++) {
                float2 u = products_at(c, i, nt + q / 2, 2 * half + q % 2);
                y[q] = pack_bf16(u.x, u.y);
            }
            stmatrix_x4(tiles ^ nt * 16, y);
        }
        send_strip(f, p, i, half, buffer);
    }
}

/* ---- exp ------------------------------------------------------------------------------------- */

__device__ __forceinline__ void put_exp(struct finish *f, float c[2][COLS / 2], struct place p)
{
    int lane = threadIdx.x & 31;
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
    for (int h = 0; h < 2 * PIECES; h++) {
        int buffer = h % HALF_BUFFERS, i = h / 2, half = h % 2;
        uint32_t tiles = tiles_at(f->pieces + buffer * HALF_BYTES);
        asm volatile("" : "+r"(tiles)); /* no room to keep addresses made of it */
        await_buffer(h);
#pragma unroll
        for (int nt = 0; nt < PIECE_COLS / 8; nt += 2) {
            uint32_t y[4];
            float e[8];
#pragma unroll
            for (int q = 0; q < 4; q++) {
                float2 u = products_at(c, i, nt + q / 2, 2 * half + q % 2);
                e[2 * q] = fmaf(u.x, LOG2E, -shift[2 * half + q % 2]);
                e[2 * q + 1] = fmaf(u.y, LOG2E, -shift[2 * half + q % 2]);
            }
            hold(e);
#pragma unroll
            for (int k = 0; k < 8; k++) e[k] = exp2_fast(e[k]);
            hold(e);
#pragma unroll
            for (int q = 0; q < 4; q++) {
                sum[2 * half + q % 2] += e[2 * q] + e[2 * q + 1];
                y[q] = pack_bf16(e[2 * q], e[2 * q + 1]);
            }
            stmatrix_x4(tiles ^ nt * 16, y);
        }
        send_strip(f, p, i, half, buffer);
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

/* u becomes gelu(u), slope gelu'(u), with one tanh, to 2^-11 of 1: what follows rounds to more. As
 * gelu.h has them, s by way of tanh. */
__device__ __forceinline__ void gelu_and_slope(float u[8], float slope[8])
{
    float t[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float u2 = fminf(u[i] * u[i], 1e4f); /* beyond, tanh is 1 and no slope is left of it */
        t[i] = u[i] * fmaf(0.5f * GELU_SCALE * GELU_CUBIC, u2, 0.5f * GELU_SCALE);
        slope[i] = u[i] * fmaf(3.0f * GELU_SCALE * GELU_CUBIC, u2, GELU_SCALE);
    }
    hold(t);
#pragma unroll
    for (int i = 0; i < 8; i++) t[i] = tanh_fast(t[i]);
    hold(t);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float s = fmaf(0.5f, t[i], 0.5f);
        slope[i] = fmaf(s, fmaf(-slope[i], s, slope[i]), s);
        u[i] *= s;
    }
}

/* Where this thread's slopes of a tile are, 32 pieces from one to the next. */
__device__ __forceinline__ uint4 *slopes_at(const struct work *w, struct place p)
{
    int thread = threadIdx.x % GROUP;
    int64_t tile = (int64_t)(p.row / ROWS) * w->columns + p.col / COLS;
    return (uint4 *)(w->slopes + tile * SLOPE_TILE) + (thread & ~31) * SLOPE_VECTORS +
           (thread & 31);
}
__device__ __forceinline__ uint32_t slope_word(const float s[4])
{
    uint32_t low = __byte_perm(slope_code(s[0]), slope_code(s[1]), 0x0040);
    uint32_t high = __byte_perm(slope_code(s[2]), slope_code(s[3]), 0x0040);
    return __byte_perm(low, high, 0x5410);
}

/* Every warp for itself, 16 rows at a time; slopes go straight from registers. */
__device__ __forceinline__ void put_gelu(struct finish *f, const float c[2][COLS / 2],
                                         struct place p)
{
    int lane = threadIdx.x & 31;
    uint4 *slopes = slopes_at(f->w, p);
#pragma unroll
    for (int h = 0; h < 2 * PIECES; h++) {
        int buffer = h % HALF_BUFFERS, i = h / 2, half = h % 2;
        uint32_t tiles = tiles_at(f->pieces + buffer * HALF_BYTES), codes[4];
        uint32_t bias_at = f->bias + i * PIECE_COLS * 2 + (lane & 3) * 4;
        asm volatile("" : "+r"(tiles), "+r"(bias_at)); /* no room to keep addresses made of them */
        await_buffer(h);
        uint32_t b[2][2] = {{load_shared(bias_at), load_shared(bias_at + 16)}}; /* and the next */
#pragma unroll
        for (int nt = 0; nt < PIECE_COLS / 8; nt += 2) {
            int now = nt / 2 & 1, then = now ^ 1, next = nt + 2;
            uint32_t y[4];
            float u[8], s[8];
            if (next < PIECE_COLS / 8) {
                b[then][0] = load_shared(bias_at + 16 * next);
                b[then][1] = load_shared(bias_at + 16 * next + 16);
            }
#pragma unroll
            for (int q = 0; q < 4; q++) {
                float2 x = products_at(c, i, nt + q / 2, 2 * half + q % 2);
                float2 bias = unpack_bf16(b[now][q / 2]);
                u[2 * q] = x.x + bias.x, u[2 * q + 1] = x.y + bias.y;
            }
            gelu_and_slope(u, s);
#pragma unroll
            for (int q = 0; q < 4; q++) y[q] = pack_bf16(u[2 * q], u[2 * q + 1]);
            stmatrix_x4(tiles ^ nt * 16, y);
            codes[2 * now] = slope_word(s), codes[2 * now + 1] = slope_word(s + 4);
            if (now)
                __stcs(slopes, make_uint4(codes[0], codes[1], codes[2], codes[3])), slopes += 32;
        }
        send_strip(f, p, i, half, buffer);
    }
}

/* ---- times a slope --------------------------------------------------------------------------- */

/* The next of a thread's slopes, on their way. */
struct slope_row {
    const uint4 *from;
    uint4 ahead[2];
};
/* Before a tile's products: the first come, all of the warp's are asked into L2. */
__device__ __forceinline__ struct slope_row take_slopes(const struct work *w, struct place p)
{
    struct slope_row r;
    r.from = slopes_at(w, p);
    if (threadIdx.x % 32 == 0)
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(r.from),
                     "n"(SLOPE_VECTORS * 32 * 16)
                     : "memory");
    for (int i = 0; i < 2; i++) r.ahead[i] = __ldcs(r.from + 32 * i);
    r.from += 64;
    return r;
}

/* Sums over the warp's rows, which lanes of the same lane % 4 hold: x[nt] are a thread's own, of
 * columns 8 nt + 2 (lane % 4) and the next; what it gets is of columns 2 lane and the next. */
__device__ __forceinline__ float2 column_sums(const float2 x[8])
{
    int lane = threadIdx.x & 31;
    float2 y[8];
#pragma unroll
    for (int nt = 0; nt < 8; nt++) y[nt] = x[nt];
#pragma unroll
    for (int n = 4; n; n >>= 1) {
        bool upper = lane & 4 * n;
#pragma unroll
        for (int nt = 0; nt < n; nt++) {
            float2 own = upper ? y[nt + n] : y[nt], other = upper ? y[nt] : y[nt + n];
            y[nt].x = own.x + __shfl_xor_sync(0xffffffffu, other.x, 4 * n);
            y[nt].y = own.y + __shfl_xor_sync(0xffffffffu, other.y, 4 * n);
        }
    }
    return y[0];
}
/* The tile's column sums from those of its warps, of each piece. Rows past the end are zeros. */
__device__ __forceinline__ void put_sums(const struct finish *f, struct place p,
                                         const float2 own[PIECES])
{
    int thread = threadIdx.x % GROUP, lane = thread & 31, warp = thread >> 5;
    float2 *others = (float2 *)f->sums + lane;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        if (warp > 0) others[(warp - 1) * (PIECE_COLS / 2)] = own[i];
        group_sync(f->id, GROUP);
        int col = p.col + i * PIECE_COLS + 2 * lane;
        if (warp == 0 && p.row < f->w->m && col < f->w->n) {
            float2 sum = own[i];
            for (int j = 0; j < GROUP_WARPS - 1; j++) {
                float2 more = others[j * (PIECE_COLS / 2)];
                sum.x += more.x, sum.y += more.y;
            }
            *(float2 *)(f->w->sums + (int64_t)(p.row / ROWS) * f->w->n + col) = sum;
        }
        group_sync(f->id, GROUP); /* read: the next piece's sums may come */
    }
}

/* Every warp for itself, 16 rows at a time. */
__device__ __forceinline__ void put_times_slope(struct finish *f, const float c[2][COLS / 2],
                                                struct place p, struct slope_row *slopes)
{
    float2 sums[PIECE_COLS / 8], own[PIECES];
#pragma unroll
    for (int h = 0; h < 2 * PIECES; h++) {
        int buffer = h % HALF_BUFFERS, i = h / 2, half = h % 2;
        uint32_t tiles = tiles_at(f->pieces + buffer * HALF_BYTES);
        asm volatile("" : "+r"(tiles)); /* no room to keep addresses made of it */
        await_buffer(h);
#pragma unroll
        for (int nt = 0; nt < PIECE_COLS / 8; nt += 2) {
            int vector = 2 * h + nt / 4;
            uint4 *ahead = &slopes->ahead[vector % 2];
            uint32_t y[4], now[2] = {nt & 2 ? ahead->z : ahead->x, nt & 2 ? ahead->w : ahead->y};
            float2 u[4];
            if ((nt & 2) && vector + 2 < SLOPE_VECTORS)
                *ahead = __ldcs(slopes->from), slopes->from += 32;
#pragma unroll
            for (int q = 0; q < 4; q++) {
                u[q] = products_at(c, i, nt + q / 2, 2 * half + q % 2);
                u[q].x *= slope_of(now[q / 2], q % 2 * 2);
                u[q].y *= slope_of(now[q / 2], q % 2 * 2 + 1);
                y[q] = pack_bf16(u[q].x, u[q].y);
            }
            stmatrix_x4(tiles ^ nt * 16, y);
#pragma unroll
            for (int q = 0; q < 4; q += 2) {
                float2 *sum = &sums[nt + q / 2];
                float2 both = make_float2(u[q].x + u[q + 1].x, u[q].y + u[q + 1].y);
                sum->x = half ? sum->x + both.x : both.x, sum->y = half ? sum->y + both.y : both.y;
            }
        }
        send_strip(f, p, i, half, buffer);
        if (half) own[i] = column_sums(sums);
    }
    if (f->w->sums) put_sums(f, p, own);
}

/* ---- plus a residual ------------------------------------------------------------------------- */

/* A thread's columns of a row, about the first of them: it is one of them, so what cancels below is
 * at most as many times what is left. */
struct row_sums {
    float first, sum, sq;
};
__device__ __forceinline__ void row_add(struct row_sums *r, float2 x, bool begin)
{
    if (begin) r->first = x.x;
    float d = x.x - r->first, e = x.y - r->first;
    r->sum += d + e;
    r->sq = fmaf(d, d, fmaf(e, e, r->sq));
}

/* The tile's mean and squares about it in two of a thread's rows, j and j + 1. */
__device__ __forceinline__ void put_moments(const struct finish *f, struct place p, int j,
                                            const struct row_sums r[2])
{
    int lane = threadIdx.x & 31, parts = (f->w->n + COLS - 1) / COLS;
    float own = (float)(min(COLS, f->w->n - p.col) / 4); /* columns; widths are multiples of 8 */
    float share = 1.0f / own;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        float by = r[k].sum * share, mean = quad_sum(r[k].first + by) * 0.25f;
        float d = r[k].first + by - mean;
        float sq = quad_sum(fmaf(-by, r[k].sum, r[k].sq) + own * d * d);
        int row = p.row + row_at(j + k);
        if ((lane & 3) == 0 && row < f->w->m)
            f->w->moments[(int64_t)row * parts + p.col / COLS] = make_float2(mean, sq);
    }
}

/* The upper halves come first: their products' registers are free for the lower ones. */
__device__ __forceinline__ void ask_residual(const struct finish *f, struct place p, int h)
{
    ask_strip(f, p, h % PIECES, h / PIECES, h % HALF_BUFFERS);
}

/* Every warp for itself, 16 rows at a time: none waits for another's. */
__device__ __forceinline__ void put_sum(struct finish *f, const float c[2][COLS / 2],
                                        struct place p)
{
    int lane = threadIdx.x & 31;
    struct row_sums sums[2] = {};
#pragma unroll
    for (int h = 0; h < 2 * PIECES; h++) {
        int buffer = h % HALF_BUFFERS, i = h % PIECES, half = h / PIECES;
        uint32_t tiles = tiles_at(f->pieces + buffer * HALF_BYTES);
        uint32_t bias_at = f->bias + i * PIECE_COLS * 2 + (lane & 3) * 4;
        asm volatile("" : "+r"(tiles), "+r"(bias_at)); /* no room to keep addresses made of them */
        wait_strip(f, buffer);
        uint32_t r[2][4], b[2][2]; /* of these columns and of the next */
        ldmatrix_x4(r[0], tiles);
        b[0][0] = load_shared(bias_at), b[0][1] = load_shared(bias_at + 16);
#pragma unroll
        for (int nt = 0; nt < PIECE_COLS / 8; nt += 2) {
            int now = nt / 2 & 1, then = now ^ 1, next = nt + 2;
            uint32_t y[4];
            if (next < PIECE_COLS / 8) {
                ldmatrix_x4(r[then], tiles ^ next * 16);
                b[then][0] = load_shared(bias_at + 16 * next);
                b[then][1] = load_shared(bias_at + 16 * next + 16);
            }
#pragma unroll
            for (int q = 0; q < 4; q++) {
                float2 u = products_at(c, i, nt + q / 2, 2 * half + q % 2);
                float2 bias = unpack_bf16(b[now][q / 2]), more = unpack_bf16(r[now][q]);
                y[q] = pack_bf16(u.x + bias.x + more.x, u.y + bias.y + more.y);
            }
            stmatrix_x4(tiles ^ nt * 16, y);
#pragma unroll
            for (int q = 0; q < 4; q++)
                if (p.col + i * PIECE_COLS + 8 * (nt + q / 2) < f->w->n)
                    row_add(&sums[q % 2], unpack_bf16(y[q]), i == 0 && nt + q / 2 == 0);
        }
        bulk_fence();
        __syncwarp();
        if (lane == 0) {
            put_strip(f, p, i, half, buffer);
            if (h > 0 && h - 1 + HALF_BUFFERS < 2 * PIECES) {
                bulk_store_wait<1>(); /* the one before has been read */
                ask_residual(f, p, h - 1 + HALF_BUFFERS);
            }
        }
        if (i < PIECES - 1) continue;
        if (f->w->moments) put_moments(f, p, 2 * half, sums);
        for (int k = 0; k < 2; k++) sums[k].sum = sums[k].sq = 0.0f;
    }
}

/* ---- of rows that a norm should have made ---------------------------------------------------- */

/* Where -mean rstd (by halves of NORM_GELU) is no more than this, what it is multiplied with, the
 * rest of rounding that W' columns sum up to (norm_linear.cu), is below that rounding's noise. */
#define NEAR_MEAN 1.0f

/* Of a thread's four rows: rstd; and whether some row of the warp is further than NEAR_MEAN. */
struct row_norms {
    float rstd[4];
    bool far;
};
__device__ __forceinline__ float2 row_norm(const struct work *w, struct place p, int j)
{
    return __ldg(w->row_norms + min(p.row + row_at(j), w->m - 1));
}
__device__ __forceinline__ struct row_norms take_norms(const struct work *w, struct place p)
{
    struct row_norms r;
    bool far = false;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float2 norm = row_norm(w, p, j);
        r.rstd[j] = norm.x;
        far |= !(fabsf(norm.y) <= NEAR_MEAN); /* NaN is far */
    }
    r.far = __any_sync(0xffffffffu, far);
    return r;
}
/* The tile's part of t to shared memory, before its products. */
__device__ __forceinline__ void take_columns(const struct finish *f, struct place p)
{
    int thread = threadIdx.x % GROUP;
    if (thread >= COLS / 2) return;
    float4 v = __ldg(f->w->column_norms + p.col / 2 + thread);
    store_float2(f->columns + 8 * thread, v.z, v.w);
}
/* c - mean s */
__device__ __forceinline__ void take_means(const struct finish *f, float c[2][COLS / 2],
                                           struct place p)
{
    const float4 *columns = f->w->column_norms + p.col / 2 + (threadIdx.x & 3);
    float mean[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float2 norm = row_norm(f->w, p, j);
        mean[j] = norm.y / norm.x;
    }
#pragma unroll
    for (int nt = 0; nt < COLS / 8; nt++) {
        float2 s = __ldg((const float2 *)(columns + 4 * nt));
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float *u = &c[j >> 1][4 * nt + 2 * (j & 1)];
            u[0] = fmaf(mean[j], s.x, u[0]), u[1] = fmaf(mean[j], s.y, u[1]);
        }
    }
}

/* h = gelu(2 h): rows and columns of NORM_GELU are given by halves. */
__device__ __forceinline__ void gelu_twice(float h[8])
{
    float z[8];
#pragma unroll
    for (int i = 0; i < 8; i++)
        z[i] = h[i] * fmaf(4.0f * GELU_SCALE * GELU_CUBIC, h[i] * h[i], GELU_SCALE);
    hold(z);
#pragma unroll
    for (int i = 0; i < 8; i++) z[i] = tanh_fast(z[i]);
    hold(z);
#pragma unroll
    for (int i = 0; i < 8; i++) h[i] = fmaf(h[i], z[i], h[i]);
}

/* Every warp for itself, 16 rows at a time. Its third piece takes the place of its first. */
template <int END>
__device__ __forceinline__ void put_normed(struct finish *f, float c[2][COLS / 2], struct place p,
                                           const struct row_norms *r)
{
    int lane = threadIdx.x & 31;
    if (r->far) take_means(f, c, p);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        uint32_t piece = f->pieces + i % BUFFERS * PIECE_BYTES, tiles = tiles_at(piece);
        uint32_t t_at = f->columns + i * PIECE_COLS * (int)sizeof(float) + (lane & 3) * 8;
        asm volatile("" : "+r"(tiles), "+r"(t_at)); /* no room to keep addresses made of them */
        if (lane == 0 && i == 0) bulk_store_wait<0>();
        if (lane == 0 && i >= BUFFERS) bulk_store_wait<2 * (BUFFERS - 1)>();
        __syncwarp();
        float2 t[2][2]; /* of these columns and of the next */
        t[0][0] = load_float2(t_at), t[0][1] = load_float2(t_at + 32);
#pragma unroll
        for (int nt = 0; nt < PIECE_COLS / 8; nt += 2) {
            int now = nt / 2 & 1, then = now ^ 1, next = nt + 2;
            if (next < PIECE_COLS / 8) {
                t[then][0] = load_float2(t_at + 32 * next);
                t[then][1] = load_float2(t_at + 32 * next + 32);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t y[4];
                float h[8];
#pragma unroll
                for (int q = 0; q < 4; q++) {
                    int j = 2 * half + q % 2;
                    float2 u = products_at(c, i, nt + q / 2, j);
                    h[2 * q] = fmaf(r->rstd[j], u.x, t[now][q / 2].x);
                    h[2 * q + 1] = fmaf(r->rstd[j], u.y, t[now][q / 2].y);
                }
                if (END == PRODUCT_NORM_GELU) gelu_twice(h);
#pragma unroll
                for (int q = 0; q < 4; q++) y[q] = pack_bf16(h[2 * q], h[2 * q + 1]);
                stmatrix_x4((tiles ^ nt * 16) + half * HALF_BYTES, y);
            }
        }
        bulk_fence();
        __syncwarp();
        if (lane > 0) continue;
        for (int half = 0; half < 2; half++)
            put_strip(f, p, i, half, i % BUFFERS * (HALF_BUFFERS / BUFFERS) + half);
    }
}
#endif
