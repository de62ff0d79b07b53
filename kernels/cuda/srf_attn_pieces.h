/* The states before pieces of a sequence, made by the very launch that needs them: decoupled
 * look-back.
 *
 * A block takes a piece of a head's tokens. It first sums what the piece's keys add to the state,
 * and publishes that; then it adds up what the pieces before it have published, and goes through
 * its piece from that state. Blocks take pieces in the order of
 * tickets, the first pieces of all heads first: what a block waits for belongs to a block that runs
 * already, and at last to one that waits for nobody. Of every `group` pieces the last publishes the
 * state behind it, of all keys before included, the others their own sums alone. So a state is a
 * sum in an order that no timing changes, and no chain of waiting is longer than there are groups.
 *
 * Warps, 4 a block, own features 16 warp .. and wait for the same warp of other blocks only.
 */
#pragma once
#include "kernels/cuda/chain.h"
#include "kernels/cuda/srf_attn.h"

#define PIECE_CHUNKS 16 /* of 64 tokens, at most, in a piece */
#define PIECE_GROUP  4  /* pieces */

struct pieces {
    float4 *sums; /* (heads, n, D / 8 + 1, 128): what threads have published: S; z, M */
    int *ready;   /* (heads, n, 4): by warps, not 0 once it is there; behind it the ticket */
    int heads, n; /* heads of all sequences, pieces of each */
    int group;
};

/* Its part of the workspace. */
void srf__pieces_carve(struct cuda_bump *bump, int64_t heads, int64_t n, int64_t d,
                       struct pieces *p);
/* Before the launch, which is a chain's (chain.h) and calls chain_wait before it takes a ticket;
 * this launch is one as any, and begins the chain. */
srf_status srf__pieces_reset(struct srf_ctx *ctx, const struct pieces *p);

#ifdef __CUDACC__
/* The state of features f0 = 16 warp + lane / 4 and f0 + 8, a quad together: C of 16 x d. */
template <int D> struct pure_state {
    float s[D / 8][4];
    float z[2], top[2]; /* shares or copies of a quad; the same M in all its lanes */
};

/* By one thread of a block. */
__device__ __forceinline__ int take_ticket(const struct pieces &p)
{
    return atomicAdd(p.ready + (int64_t)p.heads * p.n * 4, 1);
}

template <int D> __device__ __forceinline__ void empty_state(struct pure_state<D> *st)
{
#pragma unroll
    for (int j = 0; j < D / 8; j++) st->s[j][0] = st->s[j][1] = st->s[j][2] = st->s[j][3] = 0.0f;
    st->z[0] = st->z[1] = 0.0f;
    st->top[0] = st->top[1] = SRF__UNSET;
}
/* sum, which may be one of them, = a and then b, of keys that follow. */
template <int D>
__device__ __forceinline__ void add_states(struct pure_state<D> *sum, const struct pure_state<D> *a,
                                           const struct pure_state<D> *b)
{
    float mine[2], with[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float top = fmaxf(a->top[i], b->top[i]);
        mine[i] = exp2_fast(a->top[i] - top);
        with[i] = exp2_fast(b->top[i] - top);
        sum->z[i] = a->z[i] * mine[i] + b->z[i] * with[i];
        sum->top[i] = top;
    }
#pragma unroll
    for (int j = 0; j < D / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            sum->s[j][e] = a->s[j][e] * mine[e >> 1] + b->s[j][e] * with[e >> 1];
}
/* Past L1, where there may be older things. */
template <int D>
__device__ __forceinline__ void read_sum(struct pure_state<D> *st, const float4 *from)
{
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
        const float4 x = __ldcg(from + 128 * j);
        st->s[j][0] = x.x, st->s[j][1] = x.y, st->s[j][2] = x.z, st->s[j][3] = x.w;
    }
    const float4 x = __ldcg(from + 16 * D);
    st->z[0] = x.x, st->z[1] = x.y, st->top[0] = x.z, st->top[1] = x.w;
}
template <int D>
__device__ __forceinline__ void publish_sum(float4 *to, int *ready, const struct pure_state<D> *st,
                                            int lane)
{
#pragma unroll
    for (int j = 0; j < D / 8; j++)
        to[128 * j] = make_float4(st->s[j][0], st->s[j][1], st->s[j][2], st->s[j][3]);
    to[16 * D] = make_float4(st->z[0], st->z[1], st->top[0], st->top[1]);
    __syncwarp();
    if (lane == 0) {
        __threadfence();
        asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(ready), "r"(1) : "memory");
    }
}
/* Until n pieces, one a lane, are there. */
__device__ __forceinline__ void wait_ready(const int *ready, int n, int lane)
{
    int there = 1;
    do {
        if (lane < n)
            asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                         : "=r"(there)
                         : "l"(ready + 4 * lane)
                         : "memory");
    } while (!__all_sync(0xffffffffu, there));
    __syncwarp();
}
/* st: what the keys of piece i add; of a head's last piece nothing is wanted. It becomes the state
 * before the piece. */
template <int D>
__device__ __forceinline__ void look_back(struct pure_state<D> *st, const struct pieces &p,
                                          int64_t head_i, int i, int tid)
{
    constexpr int size = 128 * (D / 8 + 1);
    const int lane = tid & 31, warp = tid >> 5, in_group = i % p.group;
    const bool last = i + 1 == p.n, closes = in_group == p.group - 1 && !last;
    float4 *sums = p.sums + (head_i * p.n + i) * size + tid;
    int *ready = p.ready + (head_i * p.n + i) * 4 + warp;
    struct pure_state<D> before, x;
    if (!last && !closes) publish_sum<D>(sums, ready, st, lane);
    empty_state<D>(&before);
    empty_state<D>(&x);
    if (in_group > 0) wait_ready(ready - 4 * in_group, in_group, lane);
    for (int j = in_group; j > 0; j--) {
        read_sum<D>(&x, sums - j * size);
        add_states<D>(&before, &before, &x);
    }
    if (closes) add_states<D>(st, &before, st);
    if (i > in_group) {
        wait_ready(ready - 4 * (in_group + 1), 1, lane);
        read_sum<D>(&x, sums - (in_group + 1) * size);
    } else {
        empty_state<D>(&x);
    }
    if (closes) {
        add_states<D>(st, &x, st);
        publish_sum<D>(sums, ready, st, lane);
    }
    add_states<D>(st, &x, &before);
}
#endif
