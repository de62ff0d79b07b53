/* What the forward and the backward of pure SRF attention with many features share: warpgroup
 * products beyond those of wgmma.h, and a warpgroup's C (64, 64) on its way to shared memory. Names
 * and forms are explained in srf_attn_wide.cu.
 *
 * Of a C, thread `lane` of warp w (of 4) holds rows 16 w + lane / 4 and 8 more, columns
 * 8 j + 2 (lane % 4) and the next: c[4 j + 2 half + {0, 1}]. A tile is 64 x 64 of bf16, its address
 * a multiple of 1024.
 */
#pragma once
#include "kernels/cuda/srf_attn_pure.h"
#include "kernels/cuda/wgmma.h"

#define D             64
#define TILE          (64 * 64 * (int)sizeof(bf16))
#define WIDE_GROUPS   4   /* warpgroups of a block */
#define WIDE_FEATURES 256 /* of a launch */
#define WIDE_THREADS  (128 * WIDE_GROUPS)

/* The launcher asks for this bound to learn whether a kernel was compiled for its device. */
#if defined(__CUDA_ARCH__) && !HAVE_WGMMA
#define WIDE_BOUNDS __launch_bounds__(2 * WIDE_THREADS)
#else
#define WIDE_BOUNDS __launch_bounds__(WIDE_THREADS, 1)
#endif

#if defined(__CUDACC__) && HAVE_WGMMA
/* The threads of a warpgroup meet. */
__device__ __forceinline__ void warpgroup_barrier(int wg)
{
    asm volatile("bar.sync %0, 128;" ::"r"(1 + wg) : "memory");
}

#define WIDE_C32                                                                                   \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "  \
    "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
/* Where a thread is. Registers are short, so it is asked for again rather than kept. */
struct wide_thread {
    int tid, lane, wg, warp, pair;
    int row; /* its feature or token, of its warpgroup's 64; and row + 8 */
};
__device__ __forceinline__ struct wide_thread wide_here()
{
    struct wide_thread at;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(at.tid));
    at.lane = at.tid & 31;
    at.wg = at.tid >> 7;
    at.warp = at.tid >> 5 & 3;
    at.pair = at.lane & 3;
    at.row = 16 * at.warp + (at.lane >> 2);
    return at;
}
/* For the same reason numbers of a block are kept in shared memory. */
__device__ __forceinline__ int64_t load_i64(uint32_t addr)
{
    int64_t x;
    asm volatile("ld.shared.b64 %0, [%1];" : "=l"(x) : "r"(addr) : "memory");
    return x;
}
__device__ __forceinline__ void store_i64(uint32_t addr, int64_t x)
{
    asm volatile("st.shared.b64 [%0], %1;" ::"r"(addr), "l"(x) : "memory");
}
#define WIDE_IO4(c, i) "+f"((c)[i]), "+f"((c)[i + 1]), "+f"((c)[i + 2]), "+f"((c)[i + 3])
#define WIDE_IO32(c)                                                                               \
    WIDE_IO4(c, 0), WIDE_IO4(c, 4), WIDE_IO4(c, 8), WIDE_IO4(c, 12), WIDE_IO4(c, 16),              \
        WIDE_IO4(c, 20), WIDE_IO4(c, 24), WIDE_IO4(c, 28)

/* The low word of where a tile is for products (wgmma_tile): its parts are 16-byte units further
 * on, 2 for the next 16 columns, 128 for the next 16 rows, which takes one addition each. */
__device__ __forceinline__ uint32_t tile_word(uint32_t addr)
{
    return addr >> 4 | 64u << 16;
}
__device__ __forceinline__ uint64_t tile_of(uint32_t word)
{
    return (uint64_t)(64u | 1u << 30) << 32 | word;
}
/* c (64, 64) = A B (!add) or c += A B, A (64, 16) and B (16, 64) from tiles. A_COLS: A's rows are
 * the tile's columns; B_COLS: k runs along the tile's rows. */
template <bool A_COLS, bool B_COLS>
__device__ __forceinline__ void wgmma_tiles(float (&c)[32], uint64_t a, uint64_t b, bool add)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " WIDE_C32
                 ", %32, %33, p, 1, 1, %35, %36;\n"
                 "}\n"
                 : WIDE_IO32(c)
                 : "l"(a), "l"(b), "r"((int)add), "n"(A_COLS), "n"(B_COLS));
}
/* c (64, 64) = A B, or += (add): A from rows of the tile, or (A_COLS) from its columns; B's columns
 * are rows of its tile, or (B_COLS) columns. Sums of 64. */
template <bool A_COLS, bool B_COLS>
__device__ __forceinline__ void tiles_product(float (&c)[32], uint32_t a, uint32_t b, bool add)
{
    a = tile_word(a);
    b = tile_word(b);
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
        wgmma_tiles<A_COLS, B_COLS>(c, tile_of(a + (A_COLS ? 128 : 2) * kk),
                                    tile_of(b + (B_COLS ? 128 : 2) * kk), add || kk > 0);
}

/* The same with A from registers. */
template <bool B_COLS, int n>
__device__ __forceinline__ void packed_product(float (&c)[32], const uint32_t (&a)[n][4],
                                               uint32_t b, bool add)
{
    b = tile_word(b);
#pragma unroll
    for (int kk = 0; kk < n; kk++)
        wgmma_64<B_COLS>(c, a[kk], tile_of(b + (B_COLS ? 128 : 2) * kk), add || kk > 0);
}
/* c (64, 32) or (64, 8) = A B or += A B: B at `word`, its rows being k, or (!B_COLS) its columns.
 */
template <bool B_COLS = true>
__device__ __forceinline__ void wgmma_32(float (&c)[16], const uint32_t a[4], uint32_t word,
                                         bool add)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %21, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, "
                 "%6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                 "{%16, %17, %18, %19}, %20, p, 1, 1, %22;\n"
                 "}\n"
                 : WIDE_IO4(c, 0), WIDE_IO4(c, 4), WIDE_IO4(c, 8), WIDE_IO4(c, 12)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile_of(word)), "r"((int)add),
                   "n"(B_COLS));
}
__device__ __forceinline__ void wgmma_8(float (&c)[4], const uint32_t a[4], uint32_t word, bool add)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %9, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, %8, p, 1, 1, 1;\n"
                 "}\n"
                 : WIDE_IO4(c, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile_of(word)), "r"((int)add));
}
/* c (64, 72) = A B or += A B, A packed. B has as many rows as A columns: 64 columns in a tile, and
 * 8 more in the rows from `more` on (every: in 16 rows there, the same for all). */
template <bool every, int n>
__device__ __forceinline__ void packed_72(float (&c)[36], const uint32_t (&a)[n][4], uint32_t tile,
                                          uint32_t more, bool add)
{
    float(&left)[32] = *(float(*)[32]) & c[0];
    float(&right)[4] = *(float(*)[4]) & c[32];
    tile = tile_word(tile);
    more = tile_word(more);
#pragma unroll
    for (int kk = 0; kk < n; kk++) {
        wgmma_64<true>(left, a[kk], tile_of(tile + 128 * kk), add || kk > 0);
        wgmma_8(right, a[kk], every ? more : more + 128 * kk, add || kk > 0);
    }
}
/* c (64, 32) = A B^T: rows of A's tile, and 32 rows of another from `b` on. */
__device__ __forceinline__ void tiles_32(float (&c)[16], uint32_t a, uint32_t b)
{
    a = tile_word(a);
    b = tile_word(b);
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
        asm volatile("{\n"
                     ".reg .pred p;\n"
                     "setp.ne.b32 p, %18, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, "
                     "%5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                     "%16, %17, p, 1, 1, 0, 0;\n"
                     "}\n"
                     : WIDE_IO4(c, 0), WIDE_IO4(c, 4), WIDE_IO4(c, 8), WIDE_IO4(c, 12)
                     : "l"(tile_of(a + 2 * kk)), "l"(tile_of(b + 2 * kk)), "r"((int)(kk > 0)));
}
template <int n> __device__ __forceinline__ void wide_hold(float (&c)[n])
{
#pragma unroll
    for (int i = 0; i < n; i++) asm volatile("" : "+f"(c[i])::"memory");
}

__device__ __forceinline__ uint4 clamp_16(uint4 x, uint32_t limit)
{
    return make_uint4(clamp_bf16(x.x, limit), clamp_bf16(x.y, limit), clamp_bf16(x.z, limit),
                      clamp_bf16(x.w, limit));
}

/* A warpgroup's C, packed (p[j][half]), to the rows of a tile. */
__device__ __forceinline__ void put_tile(uint32_t tile, const uint32_t (&p)[8][2], int warp,
                                         int lane)
{
    const uint32_t at = tile + tile_at<64>(16 * warp + (lane & 7) + (lane & 8), lane >> 4);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        const uint32_t four[4] = {p[j][0], p[j][1], p[j + 1][0], p[j + 1][1]};
        stmatrix_x4(tile_on<64>(at, j), four);
    }
}
/* A C as the A of the next product. */
template <int n>
__device__ __forceinline__ void pack_wide(uint32_t (&a)[n][4], const float (&c)[8 * n])
{
#pragma unroll
    for (int kk = 0; kk < n; kk++)
#pragma unroll
        for (int i = 0; i < 4; i++) a[kk][i] = pack_bf16(c[8 * kk + 2 * i], c[8 * kk + 2 * i + 1]);
}
/* Of tokens by tokens, packed: what is above the diagonal becomes 0, whatever it was. */
__device__ __forceinline__ void keep_earlier(uint32_t (&a)[4][4], int warp, int lane)
{
    const int d = (lane >> 2) - 2 * (lane & 3); /* row less column, in a block on the diagonal */
    const uint32_t on = d > 0 ? 0xffffffffu : d == 0 ? 0xffffu : 0;
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
        if (kk < warp) continue;
        const bool mine = kk == warp;
        a[kk][0] = mine ? a[kk][0] & on : 0;
        a[kk][1] = mine ? a[kk][1] : 0;
        a[kk][2] = 0;
        a[kk][3] = mine ? a[kk][3] & on : 0;
    }
}
/* Of keys by queries, packed: what is below the diagonal becomes 0. */
__device__ __forceinline__ void keep_later(uint32_t (&a)[4][4], int warp, int lane)
{
    const int d = 2 * (lane & 3) - (lane >> 2); /* column less row, in a block on the diagonal */
    const uint32_t on = d >= 0 ? 0xffffffffu : d == -1 ? 0xffff0000u : 0;
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
        if (kk > warp) continue;
        const bool mine = kk == warp;
        a[kk][0] = mine ? a[kk][0] & on : 0;
        a[kk][1] = 0;
        a[kk][2] = mine ? a[kk][2] : 0;
        a[kk][3] = mine ? a[kk][3] & on : 0;
    }
}

/* A thread's 16 bytes of a row, clamped. */
__device__ __forceinline__ void clamp_piece(uint32_t addr, uint32_t limit)
{
    const uint4 x = load_shared_16(addr), y = clamp_16(x, limit);
    if (x.x != y.x || x.y != y.y || x.z != y.z || x.w != y.w) store_shared_16(addr, y);
}
/* The same of a key, whose row 8 lanes have together: -log2(e) |y|^2 / 2. */
__device__ __forceinline__ float clamp_key(uint32_t addr, float scale, uint32_t limit)
{
    const float most = SRF__X_LIMIT / scale;
    float sum = 0;
    for (int clamped = 0;; clamped = 1) {
        uint4 x = load_shared_16(addr);
        if (clamped) {
            x = clamp_16(x, limit);
            store_shared_16(addr, x);
        }
        sum = sum_squares(x.x) + sum_squares(x.y) + sum_squares(x.z) + sum_squares(x.w);
        if (clamped || !(sum > most * most)) break;
    }
#pragma unroll
    for (int o = 1; o < 8; o <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    sum *= 0.5f * SRF__LOG2E * scale * scale;
    return sum > SRF__HALF_LIMIT ? -SRF__HALF_LIMIT : -sum;
}

/* Exponents of the chunk's keys (features, tokens), less bias, in place, and the maxima that now
 * hold. half_row: floats of the tokens; bias_row: of this warpgroup's features. */
__device__ __forceinline__ void key_exponents(float (&a)[32], float (&top_now)[2],
                                              const float (&top)[2], float to_log2,
                                              uint32_t half_row, uint32_t bias_row, int row,
                                              int pair)
{
    float most[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float2 sub = load_float2(half_row + 4 * (2 * pair + 8 * j));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            a[4 * j + i] = fmaf(a[4 * j + i], to_log2, i & 1 ? sub.y : sub.x);
            most[i >> 1] = fmaxf(most[i >> 1], a[4 * j + i]);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float bias = __uint_as_float(load_shared(bias_row + 4 * (row + 8 * i)));
        top_now[i] = fmaxf(top[i], ceilf(quad_max(most[i]) + bias));
    }
}
/* kf (features, tokens) of these exponents, packed; and bias + M to its row. */
__device__ __forceinline__ void key_weights(uint32_t (&kf)[8][2], const float (&a)[32],
                                            const float (&top_now)[2], uint32_t bias_row,
                                            uint32_t top_row, int row, int pair)
{
    float shift[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float bias = __uint_as_float(load_shared(bias_row + 4 * (row + 8 * i)));
        shift[i] = bias - top_now[i];
        if (pair == 0)
            store_shared(top_row + 4 * (row + 8 * i), __float_as_uint(bias + top_now[i]));
    }
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            kf[j][i] = pack_bf16(exp2_fast(a[4 * j + 2 * i] + shift[i]),
                                 exp2_fast(a[4 * j + 2 * i + 1] + shift[i]));
}
/* Rows of c, by0 and by1 times, to a tile. */
template <int n>
__device__ __forceinline__ void put_scaled(uint32_t tile, const float (&c)[n], float by0, float by1,
                                           int warp, int lane)
{
    uint32_t packed[8][2];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        packed[j][0] = pack_bf16(c[4 * j] * by0, c[4 * j + 1] * by0);
        packed[j][1] = pack_bf16(c[4 * j + 2] * by1, c[4 * j + 3] * by1);
    }
    put_tile(tile, packed, warp, lane);
}

/* Sums over features in global memory, of rows of 64 floats: `at` is this thread's first of its
 * first row. c += by times them; or they become c. */
__device__ __forceinline__ void merge_before(float (&c)[32], const float *at, const float (&by)[2],
                                             const bool (&in)[2])
{
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (in[i]) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float2 x = *(const float2 *)(at + 8 * i * 64 + 8 * j);
                c[4 * j + 2 * i] = fmaf(x.x, by[i], c[4 * j + 2 * i]);
                c[4 * j + 2 * i + 1] = fmaf(x.y, by[i], c[4 * j + 2 * i + 1]);
            }
        }
}
__device__ __forceinline__ void store_sums(float *at, const float (&c)[32], const bool (&in)[2])
{
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (in[i]) {
#pragma unroll
            for (int j = 0; j < 8; j++)
                *(float2 *)(at + 8 * i * 64 + 8 * j) =
                    make_float2(c[4 * j + 2 * i], c[4 * j + 2 * i + 1]);
        }
}
/* Rows of c, as bf16: two lanes exchange halves, so that a quad writes 32 bytes of a row at once.
 * `to`: row `row`. */
__device__ __forceinline__ void store_64(bf16 *to, int64_t ld, const float (&c)[32],
                                         const bool (&in)[2], int pair)
{
    uint2 x[2][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float *at = c + 8 * k + 2 * i;
            const uint32_t left = pack_bf16(at[0], at[1]), right = pack_bf16(at[4], at[5]);
            const uint32_t got = __shfl_xor_sync(0xffffffffu, pair & 1 ? left : right, 1);
            x[i][k] = pair & 1 ? make_uint2(got, right) : make_uint2(left, got);
        }
    to += 2 * (pair & 2) + 8 * (pair & 1);
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (in[i]) {
#pragma unroll
            for (int k = 0; k < 4; k++) *(uint2 *)(to + 8 * i * ld + 16 * k) = x[i][k];
        }
}
#endif
