/* The half of a block that walks over keys, the same in the forward and in the backward's kernel of
 * dq. See srf_attn_wide.cu.
 *
 * A block has four warpgroups: two own features, 128 each, and make of every piece of tokens what
 * the other two, which own tokens and take pieces in turn, wait for: kf, S, z and M, in one of two
 * buffers. A piece is a chunk of 64 tokens or, in a pass that must be careful, an aligned part of
 * it. Layout `At` says where things lie in shared memory:
 *     W (4 tiles), KF, S (2 x 4 tiles), V (N_V tiles), K (a tile), and rows
 *     HALF (2 x 64 floats), TOP (2 x 256: bias + M), BIAS, M, ZS (256), and barriers
 *     K_FULL, V_FULL: the copy engine has brought them; V_FREE (N_V): a V is done with;
 *     FULL, EMPTY (2 x 2): a half of the features of a buffer
 */
#pragma once
#include "kernels/cuda/srf_attn_wide.h"

#define WIDE_OWNERS (WIDE_THREADS / 2) /* threads that own features; and tokens */

#if HAVE_WGMMA
/* Tokens [lo, lo + size) of chunk c, or what there is of them. */
struct wide_piece {
    int c, lo, size;
};
/* The chunks [begin, end) of a block, and how it takes them: in shared memory, registers are short.
 */
struct wide_range {
    uint8_t *sizes; /* of chunk `begin` on: tokens of its pieces; bit 7: they are too many */
    int begin, end;
    int careful; /* else all chunks are taken whole */
};
__device__ __forceinline__ int chunk_tokens(int t, int c)
{
    return min(CHUNK, t - c * CHUNK);
}
__device__ __forceinline__ int piece_end(const struct wide_piece &at, int t)
{
    return min(at.lo + at.size, chunk_tokens(t, at.c));
}
__device__ __forceinline__ int piece_size(const volatile struct wide_range &range, int c)
{
    if (!range.careful || c >= range.end) return CHUNK;
    return *(const volatile uint8_t *)(range.sizes + (c - range.begin)) & 127;
}
__device__ __forceinline__ struct wide_piece first_piece(const volatile struct wide_range &range)
{
    const int c = range.begin;
    return {c, 0, piece_size(range, c)};
}
__device__ __forceinline__ struct wide_piece
next_piece(const struct wide_piece &at, const volatile struct wide_range &range, int t)
{
    if (at.lo + at.size < chunk_tokens(t, at.c)) return {at.c, at.lo + at.size, at.size};
    return {at.c + 1, 0, piece_size(range, at.c + 1)};
}
/* The pieces of this chunk are too large; the next pass is a careful one. */
__device__ __forceinline__ void mark_piece(const volatile struct wide_range &range,
                                           const struct wide_piece &at)
{
    range.sizes[at.c - range.begin] = (uint8_t)(at.size | 128);
}
/* All threads of the block meet, each part in its own place of the code: by a barrier in shared
 * memory, since racecheck sees nothing between what is before a bar.sync of one place and what is
 * behind one of the other. */
__device__ __forceinline__ void all_meet(uint32_t bar)
{
    uint64_t phase;
    uint32_t done;
    asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];" : "=l"(phase) : "r"(bar) : "memory");
    do {
        asm volatile("{\n"
                     ".reg .pred p;\n"
                     "mbarrier.try_wait.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n"
                     "}\n"
                     : "=r"(done)
                     : "r"(bar), "l"(phase)
                     : "memory");
    } while (!done);
}
/* A pass is over. True: some pieces were too large, and there must be another; *turn becomes what
 * it is for the owners of features. */
template <class At>
__device__ __forceinline__ bool pass_again(uint32_t base, volatile struct wide_range &range,
                                           int *turn)
{
    const int tid = wide_here().tid;
    if (tid == 0) store_shared(base + At::COUNT, (uint32_t)*turn);
    all_meet(base + At::MEET);
    if (!load_shared(base + At::AGAIN)) return false;
    *turn = (int)load_shared(base + At::COUNT);
    for (int i = tid; i < range.end - range.begin; i += WIDE_THREADS) {
        const int size = range.sizes[i];
        if (size & 128) range.sizes[i] = (uint8_t)((size & 127) >> 1);
    }
    all_meet(base + At::MEET);
    if (tid == 0) {
        range.careful = 1;
        store_shared(base + At::AGAIN, 0);
    }
    all_meet(base + At::MEET);
    return true;
}
/* The owners of features meet. */
__device__ __forceinline__ void owners_barrier()
{
    asm volatile("bar.sync 5, %0;" ::"n"(WIDE_OWNERS) : "memory");
}

template <class At> __device__ __forceinline__ void init_barriers(uint32_t base)
{
    for (int i = 0; i < 4; i++) {
        barrier_init(base + At::FULL + 8 * i, 128);
        barrier_init(base + At::EMPTY + 8 * i, 128);
    }
    for (int i = 0; i < At::N_V; i++) barrier_init(base + At::V_FREE + 8 * i, 128);
    barrier_init(base + At::K_FULL, 1);
    barrier_init(base + At::V_FULL, 1);
    barrier_init(base + At::MEET, WIDE_THREADS);
}
/* ones (16 rows of 8 columns) for sums: a first column of ones. */
__device__ __forceinline__ void put_ones(uint32_t ones, int tid)
{
    if (tid < 16 * 8)
        store_shared_16(ones + 16 * tid,
                        make_uint4((tid & 7) == (tid >> 3 & 7) ? 0x3f80 : 0, 0, 0, 0));
}

/* The owners of features: all pieces of the range, `turn` pieces having gone before. `start` fills
 * S of 128 features, and M and z; `put` publishes z before a piece and M with it; `load_k`,
 * `load_v` fetch K and V of a chunk, by one thread. Returns how many pieces have gone now. */
template <class At, class Params, class Start, class Put, class LoadK, class LoadV>
__device__ __forceinline__ int walk_keys(const Params &p, uint32_t base,
                                         const volatile struct wide_range &range, int turn,
                                         Start start, Put put, LoadK load_k, LoadV load_v)
{
    const float to_log2 = SRF__LOG2E * p.scale;
    float s[2][32];
    start(s);
    struct wide_piece at_piece = first_piece(range);
    if (wide_here().tid == 0) load_k(at_piece.c);
    while (at_piece.c < range.end) {
        const int b = turn & 1;
        const uint32_t v_tile = base + At::V + turn % At::N_V * TILE;
        const uint32_t full = base + At::FULL + 8 * (2 * b + wide_here().wg);
        if (wide_here().tid == 0) {
            barrier_wait(base + At::V_FREE + 8 * (turn % At::N_V), (turn / At::N_V & 1) ^ 1);
            load_v(at_piece.c, v_tile);
        }
        /* Keys outside the piece get weight 0. */
        barrier_wait(base + At::K_FULL, turn & 1);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int tid = wide_here().tid, key = (tid >> 3) + 32 * i;
            const float half = clamp_key(base + At::K + tile_at<D>(key, tid & 7), p.scale, p.limit);
            const bool in = key >= at_piece.lo && key < piece_end(at_piece, p.t);
            if ((tid & 7) == 0)
                store_shared(base + At::HALF + 4 * (b * CHUNK + key),
                             __float_as_uint(in ? half : -INFINITY));
        }
        async_fence();
        owners_barrier();
#pragma unroll
        for (int g = 0; g < 2; g++) {
            const struct wide_thread at = wide_here();
            const int group = 2 * at.wg + g;
            const uint32_t kf_tile = base + At::KF + (4 * b + group) * TILE;
            const uint32_t bias_row = base + At::BIAS + 256 * group;
            const uint32_t m_row = base + At::M + 256 * group + 4 * at.row;
            const uint32_t z_row = m_row + (At::ZS - At::M);
            float ak[32], top[2], top_now[2];
            uint32_t kf[8][2];
            warpgroup_fence();
            tiles_product<false, false>(ak, base + At::W + group * TILE, base + At::K, false);
            warpgroup_commit();
            warpgroup_wait<0>(); /* and for what has gone into S */
            wide_hold(ak);
            wide_hold(s[0]);
            wide_hold(s[1]);
            top[0] = load_float(m_row);
            top[1] = load_float(m_row + 32);
            key_exponents(ak, top_now, top, to_log2, base + At::HALF + 4 * b * CHUNK, bias_row,
                          at.row, at.pair);
            if (g == 0)
                barrier_wait(full + (At::EMPTY - At::FULL), (turn >> 1 & 1) ^ 1);
            else {
                owners_barrier(); /* all are done with K */
                if (at.tid == 0) {
                    const int next = next_piece(at_piece, range, p.t).c;
                    if (next < range.end) load_k(next);
                }
            }
            key_weights(kf, ak, top_now, bias_row, base + At::TOP + 1024 * b + 256 * group, at.row,
                        at.pair);
            put_tile(kf_tile, kf, at.warp, at.lane);
            /* M soon stands still. */
            const float step[2] = {exp2_fast(top[0] - top_now[0]), exp2_fast(top[1] - top_now[1])};
            if (__any_sync(0xffffffffu, step[0] != 1.0f || step[1] != 1.0f)) {
#pragma unroll
                for (int i = 0; i < 32; i++) s[g][i] *= step[i >> 1 & 1];
            }
            put_scaled(base + At::S + (4 * b + group) * TILE, s[g], 1.0f, 1.0f, at.warp, at.lane);
            /* z before this piece goes out, and takes the piece in. */
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float sum = 0;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float2 x = unpack_bf16(kf[j][i]);
                    sum += x.x + x.y;
                }
                sum = quad_sum(sum);
                __syncwarp(); /* all have read M */
                if (at.pair == 0) {
                    const float z = load_float(z_row + 32 * i) * step[i];
                    put(z, top_now[i], b, 64 * group + at.row + 8 * i, at_piece);
                    store_float(z_row + 32 * i, z + sum);
                    store_float(m_row + 32 * i, top_now[i]);
                }
            }
            async_fence();
            warpgroup_barrier(at.wg);
            if (g == 0) barrier_wait(base + At::V_FULL, turn & 1);
            warpgroup_fence();
            tiles_product<false, true>(s[g], kf_tile, v_tile, true);
            warpgroup_commit();
        }
        barrier_arrive(full);
        at_piece = next_piece(at_piece, range, p.t);
        turn++;
    }
    warpgroup_wait<0>();
    wide_hold(s[0]);
    wide_hold(s[1]);
    return turn;
}
#endif
