/* What the kernels of one token share: arguments, and states that are stored in bf16. */
#pragma once
#include "kernels/cuda/srf_attn_scan.h"

struct step_params {
    struct srf_attn_shape s;
    float scale;
    const void *q, *k, *v, *w;
    int64_t ld, ld_o;
    const float *bias;
    void *o;
    char *state;
    int64_t state_bytes; /* of a head */
    const int32_t *pos;
};

/* srf_attn_step_bulk.cu: false, and nothing has happened, where it does not take the shape. */
bool srf__step_bulk(struct srf_ctx *ctx, const struct step_params *p, bool state_bf16,
                    srf_status *status);

#ifdef __CUDACC__
/* 32 bits that look random: of a seed (place, time) and a number. */
__device__ __forceinline__ uint32_t step_hash(uint32_t seed, uint32_t n)
{
    uint32_t h = seed + n * 0x9E3779B9u;
    h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
    h = (h ^ (h >> 13)) * 0xC2B2AE35u;
    return h ^ (h >> 16);
}
/* Not of the sequence's place: what it gets does not depend on its slot. */
__device__ __forceinline__ uint32_t step_seed(int64_t head, int32_t pos)
{
    return step_hash((uint32_t)head * 0x632BE5ABu, (uint32_t)pos);
}
/* bf16 bits of x, up with the probability of what is cut off; random: 16 bits. */
__device__ __forceinline__ uint32_t step_round(float x, uint32_t random)
{
    uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7fffu : (bits + random) >> 16;
}
/* Two neighbours, the even one low. n: the number of the pair. */
__device__ __forceinline__ uint32_t step_round_pair(float x, float y, uint32_t seed, uint32_t n)
{
    uint32_t h = step_hash(seed, n);
    return step_round(x, h & 0xffffu) | step_round(y, h >> 16) << 16;
}

/* vec neighbours, as floats */
template <int vec> __device__ __forceinline__ void load_row(float to[vec], const float *from)
{
    load_vec<vec>(to, from);
}
template <int vec> __device__ __forceinline__ void load_row(float to[vec], const bf16 *from)
{
    if constexpr (vec == 4) {
        uint2 u = *(const uint2 *)from;
        to[0] = __uint_as_float(u.x << 16), to[1] = __uint_as_float(u.x & 0xffff0000u);
        to[2] = __uint_as_float(u.y << 16), to[3] = __uint_as_float(u.y & 0xffff0000u);
    } else {
        to[0] = to_float(from[0]);
    }
}
/* Into a state: element `at` of s and its neighbours. */
template <int vec>
__device__ __forceinline__ void store_state(float *s, int64_t at, const float row[vec], uint32_t)
{
    store_vec<vec>(s + at, row);
}
template <int vec>
__device__ __forceinline__ void store_state(bf16 *s, int64_t at, const float row[vec],
                                            uint32_t seed)
{
    if constexpr (vec == 4) {
        *(uint2 *)(s + at) =
            make_uint2(step_round_pair(row[0], row[1], seed, (uint32_t)(at >> 1)),
                       step_round_pair(row[2], row[3], seed, (uint32_t)(at >> 1) + 1));
    } else {
        uint32_t random = step_hash(seed, (uint32_t)(at >> 1)) >> (at & 1 ? 16 : 0);
        s[at] = __ushort_as_bfloat16((unsigned short)step_round(row[0], random & 0xffffu));
    }
}
#endif
