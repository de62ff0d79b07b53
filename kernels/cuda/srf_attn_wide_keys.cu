/* SRF attention with more than 128 features, backward: the kernel of dk and dv. See
 * srf_attn_wide_bwd.cu.
 *
 * A block walks the pieces of its head backward. Two warpgroups own features, 128 each: of a
 * piece's queries they make psi, and publish it with R and u of the queries after the piece, whose
 * sums they keep. Of the other two, which own tokens, one makes dv, one dk, and of the next piece
 * the other; each makes kf for itself: both sums do not fit the registers of one.
 */
#include "kernels/cuda/srf_attn_wide_bwd.h"

/* Shared memory: tiles, then rows of floats. Buffers of pieces, [2]: the even and the odd turns. */
struct dk_at {
    enum {
        W = 0,
        PSI = 4 * TILE,     /* [2], (features, tokens) */
        R = PSI + 8 * TILE, /* [2], (features, d) */
        DO = R + 8 * TILE,  /* [2], as K, V */
        K = DO + 2 * TILE,
        V = K + 2 * TILE,
        Q = V + 2 * TILE,
        LSE = Q + TILE,
        DELTA = LSE + CHUNK * 4,         /* [2] */
        HALF = DELTA + 2 * CHUNK * 4,    /* [2] */
        TOP = HALF + 2 * CHUNK * 4,      /* [2]: bias - M */
        U = TOP + 2 * WIDE_FEATURES * 4, /* [2] */
        BIAS = U + 2 * WIDE_FEATURES * 4,
        M = BIAS + WIDE_FEATURES * 4,   /* after the piece */
        BELOW = M + WIDE_FEATURES * 4,  /* M before it */
        US = BELOW + WIDE_FEATURES * 4, /* u */
        FULL = US + WIDE_FEATURES * 4,
        EMPTY = FULL + 16,
        Q_FULL = EMPTY + 16,
        IN_FULL = Q_FULL + 8, /* dO, K, V */
        PLACE = IN_FULL + 8,
        BYTES = PLACE + 24,
    };
};

#if HAVE_WGMMA
__device__ __forceinline__ const uint8_t *sizes_of(const struct wide_bwd &p)
{
    return p.sizes + (int64_t)blockIdx.x * ((p.t + CHUNK - 1) / CHUNK);
}
/* The last piece of chunk c; c = -1: there is none. */
__device__ __forceinline__ struct wide_piece last_piece(const struct wide_bwd &p, int c)
{
    if (c < 0) return {-1, 0, CHUNK};
    const int size = sizes_of(p)[c];
    return {c, (chunk_tokens(p.t, c) - 1) & -size, size};
}
__device__ __forceinline__ struct wide_piece piece_before(const struct wide_bwd &p,
                                                          const struct wide_piece &at)
{
    if (at.lo > 0) return {at.c, at.lo - at.size, at.size};
    return last_piece(p, at.c - 1);
}

/* M of feature f before a piece: that after the chunk before, and the chunk's keys before the
 * piece, which are rare. Not above M after the piece. Rounding is that of other sums: where it may
 * be more than an exponent can take, a bound does. */
__device__ __forceinline__ float top_before(const struct wide_bwd &p, uint32_t base, int f,
                                            const struct wide_piece &at)
{
    using At = dk_at;
    const int64_t chunk = (int64_t)blockIdx.x * ((p.t + CHUNK - 1) / CHUNK) + at.c;
    const float top = at.c > 0 ? p.tops[(chunk - 1) * WIDE_FEATURES + f] : SRF__UNSET;
    if (at.lo == 0) return top;
    const bf16 *k = p.k + load_i64(base + At::PLACE) + (int64_t)at.c * CHUNK * p.ld;
    float most = -INFINITY;
    for (int s = 0; s < at.lo; s++) {
        float dot = 0, square = 0;
        for (int piece = 0; piece < 8; piece++) {
            const uint4 x = clamp_16(*(const uint4 *)(k + s * p.ld + 8 * piece), p.limit);
            const uint4 w =
                load_shared_16(base + At::W + (f >> 6) * TILE + tile_at<D>(f & 63, piece));
            const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ws[4] = {w.x, w.y, w.z, w.w};
            for (int i = 0; i < 4; i++) {
                const float2 y = unpack_bf16(xs[i]), z = unpack_bf16(ws[i]);
                dot += y.x * z.x + y.y * z.y;
                square += y.x * y.x + y.y * y.y;
            }
        }
        square = fminf(square * (0.5f * SRF__LOG2E * p.scale * p.scale), SRF__HALF_LIMIT);
        most = fmaxf(most, fmaf(dot, SRF__LOG2E * p.scale, -square));
    }
    most += load_float(base + At::BIAS + 4 * f);
    if (fabsf(most) > 1e7f) most += 1e-6f * fabsf(most);
    return fminf(fmaxf(top, ceilf(most)), load_float(base + At::M + 4 * f));
}

/* The owners of features. */
__device__ __forceinline__ void walk_features(const struct wide_bwd &p, const struct bwd_maps &m,
                                              uint32_t base)
{
    using At = dk_at;
    const float to_log2 = SRF__LOG2E * p.scale;
    float r[2][32];
#pragma unroll
    for (int i = 0; i < 32; i++) r[0][i] = r[1][i] = 0.0f;
    auto load_q = [&](int c) {
        if (wide_here().tid != 0) return;
        barrier_expect(base + At::Q_FULL, TILE);
        load_chunk(p, &m.q, base + At::Q, c, base + At::Q_FULL);
    };
    struct wide_piece piece = last_piece(p, (p.t + CHUNK - 1) / CHUNK - 1);
    {
        const int tid = wide_here().tid;
        store_float(base + At::US + 4 * tid, 0.0f);
        store_float(
            base + At::M + 4 * tid,
            p.tops[((int64_t)blockIdx.x * ((p.t + CHUNK - 1) / CHUNK) + piece.c) * WIDE_FEATURES +
                   tid]);
    }
    load_q(piece.c);
    for (int turn = 0; piece.c >= 0; turn++) {
        const int b = turn & 1;
        const uint32_t do_tile = base + At::DO + b * TILE;
        const struct wide_piece next = piece_before(p, piece);
        barrier_wait(base + At::EMPTY + 8 * b, (turn >> 1 & 1) ^ 1);
        {
            const int tid = wide_here().tid;
            if (tid == 0) {
                const uint32_t bar = base + At::IN_FULL;
                barrier_expect(bar, 3 * TILE);
                load_chunk(p, &m.d_o, do_tile, piece.c, bar);
                load_chunk(p, &m.k, base + At::K + b * TILE, piece.c, bar);
                load_chunk(p, &m.v, base + At::V + b * TILE, piece.c, bar);
            }
            /* Tokens outside the piece have psi = 0. */
            if (tid < CHUNK) {
                const bool is = tid >= piece.lo && tid < piece_end(piece, p.t);
                const int64_t from = load_i64(base + At::PLACE + 16) + piece.c * CHUNK + tid;
                store_float(base + At::LSE + 4 * tid, is ? p.stat[from] : INFINITY);
                store_float(base + At::DELTA + 4 * (CHUNK * b + tid), is ? p.delta[from] : 0.0f);
            }
            store_float(base + At::BELOW + 4 * tid, top_before(p, base, tid, piece));
            barrier_wait(base + At::Q_FULL, turn & 1);
            const uint32_t own = base + At::Q + tile_at<D>(tid >> 3, tid & 7);
            clamp_piece(own, p.limit);
            clamp_piece(own + TILE / 2, p.limit);
            async_fence();
            owners_barrier();
        }
#pragma unroll
        for (int g = 0; g < 2; g++) {
            const struct wide_thread at = wide_here();
            const int group = 2 * at.wg + g;
            const uint32_t row = base + 4 * (64 * group + at.row);
            float a[32], shift[2], sum[2] = {0, 0};
            uint32_t psi[8][2];
            warpgroup_fence();
            tiles_product<false, false>(a, base + At::W + group * TILE, base + At::Q, false);
            warpgroup_commit();
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float bias = load_float(row + At::BIAS + 32 * i);
                const float top = load_float(row + At::M + 32 * i);
                shift[i] = bias + top;
                if (at.pair == 0) {
                    store_float(row + At::TOP + 1024 * b + 32 * i, bias - top);
                    store_float(row + At::U + 1024 * b + 32 * i, load_float(row + At::US + 32 * i));
                }
            }
            warpgroup_wait<0>();
            wide_hold(a);
            if (g == 1) {
                owners_barrier(); /* all are done with Q */
                if (next.c >= 0) load_q(next.c);
            }
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const uint32_t token = base + 4 * (8 * j + 2 * at.pair);
                const float2 sub = load_float2(token + At::LSE);
                const float2 by = load_float2(token + At::DELTA + 4 * CHUNK * b);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float *x = a + 4 * j + 2 * i;
                    psi[j][i] = pack_bf16(exp2_psi(fmaf(x[0], to_log2, shift[i]) - sub.x),
                                          exp2_psi(fmaf(x[1], to_log2, shift[i]) - sub.y));
                    const float2 rounded = unpack_bf16(psi[j][i]);
                    sum[i] = fmaf(rounded.x, by.x, fmaf(rounded.y, by.y, sum[i]));
                }
            }
            put_tile(base + At::PSI + (4 * b + group) * TILE, psi, at.warp, at.lane);
            put_scaled(base + At::R + (4 * b + group) * TILE, r[g], 1.0f, 1.0f, at.warp, at.lane);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                sum[i] = quad_sum(sum[i]);
                if (at.pair == 0)
                    store_float(row + At::US + 32 * i, load_float(row + At::US + 32 * i) + sum[i]);
            }
        }
        barrier_wait(base + At::IN_FULL, turn & 1);
        {
            const int tid = wide_here().tid;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int key = (tid >> 3) + 32 * i;
                const float half =
                    clamp_key(base + At::K + b * TILE + tile_at<D>(key, tid & 7), p.scale, p.limit);
                const bool is = key >= piece.lo && key < piece_end(piece, p.t);
                if ((tid & 7) == 0)
                    store_float(base + At::HALF + 4 * (CHUNK * b + key), is ? half : -INFINITY);
            }
        }
        async_fence();
        owners_barrier();
        barrier_arrive(base + At::FULL + 8 * b);
        /* The piece's queries go into R and u, which then step back. */
        warpgroup_fence();
#pragma unroll
        for (int g = 0; g < 2; g++)
            tiles_product<false, true>(
                r[g], base + At::PSI + (4 * b + 2 * wide_here().wg + g) * TILE, do_tile, true);
        warpgroup_commit();
        warpgroup_wait<0>();
        wide_hold(r[0]);
        wide_hold(r[1]);
#pragma unroll
        for (int g = 0; g < 2; g++) {
            const struct wide_thread at = wide_here();
            const uint32_t row = base + 4 * (64 * (2 * at.wg + g) + at.row);
            float back[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float below = load_float(row + At::BELOW + 32 * i);
                back[i] = exp2_fast(below - load_float(row + At::M + 32 * i));
            }
            __syncwarp();
            if (__any_sync(0xffffffffu, back[0] != 1.0f || back[1] != 1.0f)) {
#pragma unroll
                for (int i = 0; i < 32; i++) r[g][i] *= back[i >> 1 & 1];
#pragma unroll
                for (int i = 0; i < 2; i++)
                    if (at.pair == 0) {
                        store_float(row + At::M + 32 * i, load_float(row + At::BELOW + 32 * i));
                        store_float(row + At::US + 32 * i,
                                    back[i] * load_float(row + At::US + 32 * i));
                    }
            }
            __syncwarp();
        }
        owners_barrier(); /* rows of features and tokens are free */
        piece = next;
    }
}

/* kf (keys, features) of exponents without half and bias - M: row, of this thread's first. */
template <int n>
__device__ __forceinline__ void keys_of(float (&a)[n], float to_log2, const float (&half)[2],
                                        uint32_t top_row)
{
#pragma unroll
    for (int j = 0; j < n / 4; j++) {
        const float2 shift = load_float2(top_row + 32 * j);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            /* |y|^2 / 2 first: where it is huge, a has no bits left beside it. */
            const float e = fmaf(a[4 * j + i], to_log2, half[i >> 1]);
            a[4 * j + i] = exp2_fast(e + (i & 1 ? shift.y : shift.x));
        }
    }
}

/* dv of a piece, in buffer b, that has been published. */
__device__ __forceinline__ void piece_dv(const struct wide_bwd &p, uint32_t base, int b,
                                         const struct wide_piece &piece)
{
    using At = dk_at;
    float dv[32], weights[32], half[2];
    half[0] = load_float(base + At::HALF + 4 * (CHUNK * b + wide_here().row));
    half[1] = load_float(base + At::HALF + 4 * (CHUNK * b + wide_here().row + 8));
#pragma unroll
    for (int i = 0; i < 32; i++) dv[i] = weights[i] = 0.0f;
    /* 32 features at a time: registers are short. */
    float a[16];
    warpgroup_fence();
    tiles_32(a, base + At::K + b * TILE, base + At::W);
    warpgroup_commit();
#pragma unroll
    for (int g = 0; g < 8; g++) {
        const uint32_t psi = tile_word(base + At::PSI + (8 * b + g) * (TILE / 2));
        const uint32_t r = tile_word(base + At::R + (8 * b + g) * (TILE / 2));
        uint32_t kf[2][4];
        warpgroup_wait<0>();
        wide_hold(a);
        wide_hold(dv);
        wide_hold(weights);
        keys_of(a, SRF__LOG2E * p.scale, half,
                base + At::TOP + 1024 * b + 128 * g + 8 * wide_here().pair);
        pack_wide(kf, a);
        warpgroup_fence();
#pragma unroll
        for (int kk = 0; kk < 2; kk++)
            wgmma_64<true>(weights, kf[kk], tile_of(psi + 128 * kk), true);
#pragma unroll
        for (int kk = 0; kk < 2; kk++) wgmma_64<true>(dv, kf[kk], tile_of(r + 128 * kk), true);
        warpgroup_commit();
        if (g < 7) {
            tiles_32(a, base + At::K + b * TILE, base + At::W + (g + 1) * (TILE / 2));
            warpgroup_commit();
        }
    }
    warpgroup_wait<0>();
    wide_hold(dv);
    wide_hold(weights);
    {
        const struct wide_thread at = wide_here();
        uint32_t weight[4][4];
        pack_wide(weight, weights);
        keep_later(weight, at.warp, at.lane);
        warpgroup_fence();
        packed_product<true>(dv, weight, base + At::DO + b * TILE, true);
        warpgroup_commit();
        warpgroup_wait<0>();
        wide_hold(dv);
    }
    barrier_arrive(base + At::EMPTY + 8 * b);
    finish_rows(p, base + At::PLACE, dv, p.sum[2], p.dv, piece.c, piece.lo, piece_end(piece, p.t));
}

/* dk of a piece. */
__device__ __forceinline__ void piece_dk(const struct wide_bwd &p, uint32_t base, int b,
                                         const struct wide_piece &piece)
{
    using At = dk_at;
    const uint32_t k_tile = base + At::K + b * TILE, v_tile = base + At::V + b * TILE;
    float dk[32], half[2], sum[2] = {0, 0};
    uint32_t x[4][4];
    half[0] = load_float(base + At::HALF + 4 * (CHUNK * b + wide_here().row));
    half[1] = load_float(base + At::HALF + 4 * (CHUNK * b + wide_here().row + 8));
    {
        const struct wide_thread at = wide_here();
        float d[32];
        warpgroup_fence();
        tiles_product<false, false>(d, v_tile, base + At::DO + b * TILE, false);
        warpgroup_commit();
        warpgroup_wait<0>();
        wide_hold(d);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 by = load_float2(base + At::DELTA + 4 * (CHUNK * b + 8 * j + 2 * at.pair));
#pragma unroll
            for (int i = 0; i < 4; i++) d[4 * j + i] += i & 1 ? by.y : by.x;
        }
        pack_wide(x, d);
        keep_later(x, at.warp, at.lane);
    }
#pragma unroll
    for (int i = 0; i < 32; i++) dk[i] = 0.0f;
        /* 32 features at a time: registers are short. */
#pragma unroll 1
    for (int g = 0; g < 8; g++) {
        const uint32_t rows = base + 1024 * b + 128 * g + 8 * wide_here().pair;
        const uint32_t w_rows = base + At::W + g * (TILE / 2);
        float a[16], dkf[16];
        uint32_t da[2][4];
        warpgroup_fence();
        tiles_32(a, k_tile, w_rows);
        warpgroup_commit();
        tiles_32(dkf, v_tile, base + At::R + (8 * b + g) * (TILE / 2));
#pragma unroll
        for (int kk = 0; kk < 4; kk++)
            wgmma_32<false>(dkf, x[kk],
                            tile_word(base + At::PSI + (8 * b + g) * (TILE / 2)) + 2 * kk, true);
        warpgroup_commit();
        warpgroup_wait<1>();
        wide_hold(a);
        wide_hold(dk);
        keys_of(a, SRF__LOG2E * p.scale, half, rows + At::TOP);
        warpgroup_wait<0>();
        wide_hold(dkf);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 u = load_float2(rows + At::U + 32 * j);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t both =
                    pack_bf16(a[4 * j + 2 * i] * (dkf[4 * j + 2 * i] + u.x),
                              a[4 * j + 2 * i + 1] * (dkf[4 * j + 2 * i + 1] + u.y));
                /* The sum of the rounded values: w_i - y of one feature may be small. */
                const float2 rounded = unpack_bf16(both);
                sum[i] += rounded.x + rounded.y;
                da[j >> 1][(j & 1) * 2 + i] = both;
            }
        }
        warpgroup_fence();
#pragma unroll
        for (int kk = 0; kk < 2; kk++)
            wgmma_64<true>(dk, da[kk], tile_of(tile_word(w_rows) + 128 * kk), true);
        warpgroup_commit();
    }
    warpgroup_wait<0>();
    wide_hold(dk);
    const struct wide_thread at = wide_here();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] = quad_sum(sum[i]) * p.scale;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 y =
                unpack_bf16(load_shared(k_tile + tile_at<D>(at.row + 8 * i, j) + 4 * at.pair));
            float *to = dk + 4 * j + 2 * i;
            to[0] = p.scale * (to[0] - sum[i] * y.x);
            to[1] = p.scale * (to[1] - sum[i] * y.y);
        }
    }
    barrier_arrive(base + At::EMPTY + 8 * b);
    finish_rows(p, base + At::PLACE, dk, p.sum[1], p.dk, piece.c, piece.lo, piece_end(piece, p.t));
}

/* The owners of tokens. dk takes longer than dv: they take turns. */
__device__ __forceinline__ void walk_tokens(const struct wide_bwd &p, uint32_t base)
{
    using At = dk_at;
    struct wide_piece piece = last_piece(p, (p.t + CHUNK - 1) / CHUNK - 1);
    for (int turn = 0; piece.c >= 0; turn++) {
        const int b = turn & 1;
        const struct wide_piece next = piece_before(p, piece);
        barrier_wait(base + At::FULL + 8 * b, turn >> 1 & 1);
        if (((turn ^ wide_here().wg) & 1) != 0)
            piece_dk(p, base, b, piece);
        else
            piece_dv(p, base, b, piece);
        piece = next;
    }
}
#endif

static __global__ WIDE_BOUNDS void wide_keys_kernel(const __grid_constant__ struct wide_bwd p,
                                                    const __grid_constant__ struct bwd_maps m)
{
#if HAVE_WGMMA
    using At = dk_at;
    extern __shared__ __align__(1024) char raw[];
    const uint32_t base = smem_addr(raw);
    {
        const int tid = wide_here().tid;
        if (tid == 0) {
            for (int b = 0; b < 2; b++) {
                barrier_init(base + At::FULL + 8 * b, WIDE_OWNERS);
                barrier_init(base + At::EMPTY + 8 * b, WIDE_OWNERS);
            }
            barrier_init(base + At::Q_FULL, 1);
            barrier_init(base + At::IN_FULL, 1);
            barrier_init_done();
        }
        start_block(p, base + At::W, base + At::BIAS, base + At::PLACE);
    }
    __syncthreads();
    if (wide_here().wg < 2)
        walk_features(p, m, base);
    else
        walk_tokens(p, base);
#endif
}

srf_status srf__wide_keys(struct srf_ctx *ctx, const struct wide_bwd *p, const struct bwd_maps *m,
                          unsigned heads)
{
    CUDA_TRY(cudaFuncSetAttribute(wide_keys_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  dk_at::BYTES));
    wide_keys_kernel<<<heads, WIDE_THREADS, dk_at::BYTES, stream_of(ctx)>>>(*p, *m);
    return srf__cuda_launched("srf_attn_bwd");
}
