/* The window hybrid's walks: one CTA's state of 64 features through the blocks of a head. Forms and
 * names are explained in srf_attn_hybrid.cu.
 *
 * Floor: the tokens and values read once, a slot of every block written: at b = 32, t = 1024, h =
 * 12, d = 64, m = 64, window 64 145 MB, 0.043 ms on an H100 (3.35 TB/s).
 */
#include "kernels/cuda/srf_attn_hybrid_walk.h"

template <int D, int C, bool QUERIES>
__global__ void __launch_bounds__(WALK_THREADS)
    walk_kernel(const __grid_constant__ struct hybrid p, bool totals)
{
    extern __shared__ __align__(16) char smem[];
    struct walk_smem<D, C> *sm = (struct walk_smem<D, C> *)smem;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, quad = lane & 3;
    int groups = (p.m + CTA_FEATURES - 1) / CTA_FEATURES;
    int seg = blockIdx.x % p.n_seg, group = blockIdx.x / p.n_seg % groups;
    int64_t bh = blockIdx.x / p.n_seg / groups;
    int feature = group * CTA_FEATURES + warp * WARP_FEATURES;
    bool active = feature < p.m; /* m is a multiple of 16 */
    int lo = seg * p.seg_slots, hi = min(lo + p.seg_slots, p.n_slots);
    int n_tiles = (hi - lo) * (p.window / C), slot;
    float *sums = QUERIES ? p.u : p.z;
    bf16 *states = QUERIES ? p.r : p.s;
    if (totals && seg == (QUERIES ? 0 : p.n_seg - 1)) return; /* nothing starts after it */

    begin_tiles<D, C, QUERIES>(sm, &p, bh, lo, hi, n_tiles);
    uint32_t w[D / 16][4] = {};
    float bias[2] = {0, 0};
    struct state_sums<D> st;
    start_state(&st);
    if (active) {
        load_features<D, QUERIES>(w, bias, &p, bh, feature);
        if (!totals) add_segments<D, QUERIES>(&st, &p, bh, seg, feature);
    }

    for (int i = 0; i < n_tiles; i++) {
        int stage = i % WALK_STAGES, ahead = i + WALK_STAGES - 1;
        if (ahead < n_tiles) {
            int token = walk_token<C, QUERIES>(&p, lo, hi, ahead, &slot);
            load_walk<D, C, QUERIES>(sm, ahead % WALK_STAGES, &p, bh, token);
        }
        cp_async_commit();
        cp_async_wait<WALK_STAGES - 1>();
        clean_rows<D, C, WALK_THREADS, true>(sm->pair[stage][0], &p, sm->half[stage]);
        __syncthreads();
        walk_token<C, QUERIES>(&p, lo, hi, i, &slot);
        if (active) {
            const bf16 *tokens = sm->pair[stage][0], *values = sm->pair[stage][1];
            if (QUERIES) {
                int64_t row = (bh * p.n_slots + slot) * p.m + feature + g;
                float top[2] = {p.top[row], p.top[row + 8]};
                add_queries<D, C>(&st, w, bias, tokens, values, sm->half[stage], sm->stat[stage],
                                  sm->delta[stage], top, &p);
            } else {
                add_keys<D, C>(&st, w, bias, tokens, values, sm->half[stage], &p);
            }
            if (!totals && (i + 1) % (p.window / C) == 0) {
                int64_t row = (bh * p.n_slots + slot) * p.m + feature;
                store_rows<D>(states + row * D, D, WARP_FEATURES, st.s);
                for (int j = 0; j < 2; j++) {
                    float sum = quad_sum(st.z[2 * j]);
                    if (quad) continue;
                    sums[row + g + 8 * j] = sum;
                    if (!QUERIES) p.top[row + g + 8 * j] = st.top[j];
                }
            }
        }
        __syncthreads();
    }
    if (!totals || !active) return;
    for (int j = 0; j < 2; j++) {
        int64_t row = (bh * p.n_seg + seg) * p.m + feature + g + 8 * j;
        float sum = quad_sum(st.z[2 * j]);
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *(float2 *)(p.sum_s + row * D + n * 8 + quad * 2) =
                make_float2(st.s[n][2 * j], st.s[n][2 * j + 1]);
        if (quad) continue;
        p.sum_z[row] = sum;
        if (!QUERIES) p.sum_top[row] = st.top[j];
    }
}

/* ---- launches -------------------------------------------------------------------------------- */

template <int D, int C>
static srf_status totals(struct srf_ctx *ctx, const struct hybrid *p, int64_t n_bh, bool queries)
{
    int64_t grid = n_bh * div_up(p->m, CTA_FEATURES) * p->n_seg;
    void (*kernel)(struct hybrid, bool) =
        queries ? walk_kernel<D, C, true> : walk_kernel<D, C, false>;
    if (p->n_seg > 1) LAUNCH(kernel, grid, WALK_THREADS, sizeof(struct walk_smem<D, C>), *p, true);
    return SRF_OK;
}

template <int D, int C>
static srf_status walk(struct srf_ctx *ctx, const struct hybrid *p, int64_t n_bh, bool queries)
{
    int64_t grid = n_bh * div_up(p->m, CTA_FEATURES) * p->n_seg;
    constexpr size_t smem = sizeof(struct walk_smem<D, C>);
    static_assert(smem <= hybrid_smem_most(D, C), "srf__hybrid_takes asks for less");
    if (p->n_slots == 0) return SRF_OK;
    void (*kernel)(struct hybrid, bool) =
        queries ? walk_kernel<D, C, true> : walk_kernel<D, C, false>;
    SRF_TRY((totals<D, C>(ctx, p, n_bh, queries)));
    LAUNCH(kernel, grid, WALK_THREADS, smem, *p, false);
    return SRF_OK;
}

srf_status srf__hybrid_totals(struct srf_ctx *ctx, const struct hybrid *p, int64_t d, int64_t n_bh,
                              bool queries){
    FOR_HEAD_SIZE(d, p->window, totals, ctx, p, n_bh, queries)}

srf_status srf__hybrid_walk(struct srf_ctx *ctx, const struct hybrid *p, int64_t d, int64_t n_bh,
                            bool queries)
{
    FOR_HEAD_SIZE(d, p->window, walk, ctx, p, n_bh, queries)
}
