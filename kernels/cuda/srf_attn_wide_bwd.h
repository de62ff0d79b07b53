/* What the two kernels of the wide backward share. Names and forms are explained in
 * srf_attn_wide_bwd.cu. */
#pragma once
#include "kernels/cuda/srf_attn_wide_walk.h"

struct wide_bwd {
    const bf16 *k, *o, *w;
    const float *bias, *stat;
    bf16 *dq, *dk, *dv;
    float *delta;   /* (b h, t) */
    float *tops;    /* (b h, chunks, 256): M after each chunk */
    uint8_t *sizes; /* (b h, chunks): of pieces */
    float *sum[3];  /* (b h, t, d) of dq, dk, dv over the features before these; or NULL */
    int64_t ld, ld_o;
    int t, h, m, n_sets;
    int first, count; /* features [first, first + count) */
    float scale;
    uint32_t limit;
};

struct bwd_maps {
    CUtensorMap q, k, v, d_o;
};

/* dk, dv, when the queries are done with. */
srf_status srf__wide_keys(struct srf_ctx *ctx, const struct wide_bwd *p, const struct bwd_maps *m,
                          unsigned heads);

#if HAVE_WGMMA
/* First elements of the head in inputs and outputs, its first token: to shared memory. */
__device__ __forceinline__ void put_place(const struct wide_bwd &p, uint32_t place)
{
    const int64_t seq = blockIdx.x / p.h, head = blockIdx.x % p.h;
    store_i64(place, seq * p.t * p.ld + head * D);
    store_i64(place + 8, seq * p.t * p.ld_o + head * D);
    store_i64(place + 16, (int64_t)blockIdx.x * p.t);
}
/* Chunk c of an activation's head, to a tile; by one thread. */
__device__ __forceinline__ void load_chunk(const struct wide_bwd &p, const CUtensorMap *map,
                                           uint32_t tile, int c, uint32_t bar)
{
    bulk_tile(tile, map, (int)(blockIdx.x % p.h) * D, c * CHUNK, (int)(blockIdx.x / p.h), bar);
}
/* W of the launch's features, their bias, and where the head is; before a block barrier. */
__device__ __forceinline__ void start_block(const struct wide_bwd &p, uint32_t w, uint32_t bias,
                                            uint32_t place)
{
    const int tid = wide_here().tid;
    const int64_t set = p.n_sets == 1 ? 0 : blockIdx.x % p.h;
    if (tid == 0) put_place(p, place);
    load_tile<D, WIDE_THREADS>(w, p.w + (set * p.m + p.first) * D, D, WIDE_FEATURES, p.count, tid);
    cp_async_commit();
    if (tid < WIDE_FEATURES)
        store_float(bias + 4 * tid,
                    tid < p.count ? SRF__LOG2E * p.bias[set * p.m + p.first + tid] : -INFINITY);
    cp_async_wait<0>();
    async_fence();
}
/* A warpgroup's rows of a gradient, of this piece: with the sums over features before these, out as
 * bf16 or, if more features follow, as sums again. */
__device__ __forceinline__ void finish_rows(const struct wide_bwd &p, uint32_t place,
                                            float (&c)[32], float *sums, bf16 *dst, int chunk,
                                            int lo, int hi)
{
    const struct wide_thread at = wide_here();
    const bool in[2] = {at.row >= lo && at.row < hi, at.row + 8 >= lo && at.row + 8 < hi};
    const int token = chunk * CHUNK + at.row;
    const float once[2] = {1.0f, 1.0f};
    float *sum = sums + (load_i64(place + 16) + token) * D + 2 * at.pair;
    if (p.first > 0) merge_before(c, sum, once, in);
    if (p.first + p.count < p.m)
        store_sums(sum, c, in);
    else
        store_64(dst + load_i64(place) + (int64_t)token * p.ld, p.ld, c, in, at.pair);
}
#endif
