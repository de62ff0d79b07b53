/* What the kernels of the window hybrid share, first part: arguments, where a walk is. Forms and
 * names are explained in srf_attn_hybrid.cu.
 */
#pragma once
#include "kernels/cuda/srf_attn.h"

#define LAZY          6 /* a row's stabiliser may be this much below its maximum */
#define WARP_FEATURES 16
#define CTA_FEATURES  64
#define MAX_SEGMENTS  32

struct hybrid {
    const bf16 *q, *k, *v, *w; /* (b, t, h, d) by ld; (n_sets, m, d) */
    const float *bias;         /* (n_sets, m) */
    bf16 *o;                   /* (b, t, h, d) by ld_o */
    const bf16 *d_o;
    bf16 *dq, *dk, *dv;
    float *stat, *delta; /* (b h, t) */
    int64_t ld, ld_o;
    int64_t w_step, bias_step; /* from one head's feature set to the next: 0 if shared */
    int t, heads, m, window;
    int n_chunks;         /* of query or key rows in a sequence */
    int n_slots;          /* blocks that are read through the state */
    int n_seg, seg_slots; /* segments of a walk, slots in each */
    bf16 *s, *r;          /* (b h, n_slots, m, d): S, R */
    float *top, *z, *u;   /* (b h, n_slots, m): M, z, u */
    float *sum_s, *sum_z; /* (b h, n_seg, m, d), (b h, n_seg, m): a segment's own S or R, z or u */
    float *sum_top;       /* (b h, n_seg, m) */
    bool fused;           /* walks that keep states in registers; dW reads them */
    bool wgmma;           /* these by warpgroup products */
    bool given;           /* by srf__state_sums, in teams of so many segments: */
    int team;
    float *entry;            /* (b h, n_seg, SRF__STATES_COUNT) */
    float *after;            /* (b h, n_seg, m 65): R, u after segments */
    float *parked;           /* (b h, n_seg, 64, 64): R of a walk, out of the registers */
    float *dw_part;          /* (2, b h, n_seg, m, d) */
    float scale, half_scale; /* d^(-1/4), log2(e) d^(-1/2) / 2 */
    float limit, log2_m;     /* components of q, k; log2(m) */
};

/* Shared memory that a block of any of the kernels has, at most: tiles of c rows (of the walks that
 * fuse, which heads of up to 64 have, two more), vectors. */
static constexpr int hybrid_smem_most(int d, int c)
{
    return (d <= 64 ? 8 : 6) * 2 * c * (d + 8) + 11 * 4 * c;
}
/* Shapes, leading dimensions and addresses (all of them or-ed) that the kernels take. */
bool srf__hybrid_takes(const struct srf_ctx *ctx, const struct srf_attn_shape *s, int64_t ld,
                       int64_t ld_o, uintptr_t pointers);
/* Sets sizes and pointers into the workspace at base; NULL only counts. Returns its bytes. */
size_t srf__hybrid_carve(const struct srf_ctx *ctx, const struct srf_attn_shape *s, bool backward,
                         bool dw, void *base, struct hybrid *p);

#ifdef __CUDACC__
/* What a CTA walks through. */
struct walker {
    int64_t bh, set, in, out; /* head; element offsets of the head's token 0 by ld, ld_o */
    int seg, begin, end;      /* blocks [begin, end) */
    int n_blocks, feature;    /* the warp's first feature */
};
template <int D> __device__ __forceinline__ struct walker walker_of(const struct hybrid *p)
{
    struct walker w;
    unsigned head = blockIdx.x / (unsigned)p->n_seg;
    int64_t seq = head / (unsigned)p->heads;
    w.bh = head;
    w.set = head % (unsigned)p->heads;
    w.in = seq * p->t * p->ld + w.set * D;
    w.out = seq * p->t * p->ld_o + w.set * D;
    w.seg = (int)(blockIdx.x - head * (unsigned)p->n_seg);
    w.n_blocks = (p->t + 63) / 64;
    /* The segments before hold the blocks before lo: what block lo + 1 reads. */
    int lo = w.seg * p->seg_slots;
    w.begin = w.seg ? lo + 1 : 0;
    w.end = w.seg + 1 < p->n_seg ? lo + p->seg_slots + 1 : w.n_blocks;
    w.feature = (threadIdx.x >> 5) * WARP_FEATURES;
    return w;
}

/* c (16, D) as bf16 into rows to + row ld; rows from n on are not there. Neighbours exchange halves
 * so that a quad writes whole sectors. */
template <int D>
__device__ __forceinline__ void store_rows(bf16 *to, int64_t ld, int n, const float (&c)[D / 8][4])
{
    int lane = threadIdx.x & 31, g = lane >> 2, p = lane & 3, odd = p & 1;
    int col = odd ? 8 + 2 * (p - 1) : 2 * p;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = g + 8 * half;
        bf16 *at = to + row * ld + col;
#pragma unroll
        for (int i = 0; i < D / 8; i += 2) {
            uint32_t left = pack_bf16(c[i][2 * half], c[i][2 * half + 1]);
            uint32_t right = pack_bf16(c[i + 1][2 * half], c[i + 1][2 * half + 1]);
            uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? left : right, 1);
            uint2 out = odd ? make_uint2(got, right) : make_uint2(left, got);
            if (row < n) *(uint2 *)(at + i * 8) = out;
        }
    }
}

/* 2^e for a weight that is below 2 but for rounding, where exponents are huge. NaN stays. */
__device__ __forceinline__ float far_weight(float e)
{
    asm("min.NaN.f32 %0, %0, 0f3F800000;" : "+f"(e));
    return exp2_fast(e);
}
#endif
