/* SRF attention on tensor cores, backward: pure (window = 0), causal, bf16.
 *
 * The forward keeps lse_t = r_t + log2 den_t, so that the weights of a row, normalised, are
 * psi_t.kf_s with psi_ti = 2^(aq_ti + M_i - lse_t). With delta_t = -do_t.o_t,
 *     dP_ts = do_t.v_s + delta_t for s <= t
 *     queries   dphi = dP kf + do S^T + delta z,    da = psi dphi,   dq = d^(-1/4) da W
 *     keys      dkf = dP^T psi + v R^T + u,         da = kf dkf
 *               dk = d^(-1/4) (da W - (sum_i da_i) y),   dv = P^T do + kf R
 *     R_i = sum of psi_ti do_t, u_i = sum of psi_ti delta_t over the queries after the chunk
 * Two kernels of the forward's shape (tokens and features owned by warps, 64 tokens a chunk):
 *   queries  walks forward with S, z, M; writes dq, delta, M after every chunk and, as a bit mask,
 *            where a chunk had to be cut into pieces: where some psi would be above 2^66.
 *   keys     walks backward with R, u in the scale 2^M. M never falls with time, so that stepping
 *            back multiplies by 2^(M before - M after) <= 1.
 * In both, what the token owner reads of the whole chunk comes through shared memory as bf16: kf
 * and S, psi and R. Several 64s of features and segments of the tokens are taken as in the forward;
 * here sums over features are plain sums.
 *
 * Floor: q, k, v, o, do read, dq written, and q, k, v, do read, dk, dv written: 24 b t h d bytes,
 * 0.20 ms on an H100 (3 TB/s) at b = 32, t = 1024, h = 12, d = 64.
 */
#include "kernels/cuda/srf_attn_pure_wgmma.h"

/* dw += by times the sum of the blocks' parts, `group` heads of a sequence to one dw. */
static __global__ void dw_kernel(float *dw, const float *part, int64_t n, int64_t part_stride,
                                 int64_t dw_stride, int b, int n_sets, int group, int n_seg,
                                 float by)
{
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n * n_sets) return;
    const int64_t set = i / n, j = i % n;
    float sum = 0;
    for (int64_t seq = 0; seq < b; seq++) {
        const float *from = part + (seq * n_sets + set) * group * n_seg * part_stride + j;
#pragma unroll 8
        for (int k = 0; k < group * n_seg; k++) sum += from[k * part_stride];
    }
    dw[set * dw_stride + j] += by * sum;
}

/* ---- the op ------------------------------------------------------------------------------- */

static bool aligned(const void *p)
{
    return (uintptr_t)p % 16 == 0;
}

bool srf__pure_takes_bwd(const struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a)
{
    return srf__pure_shape(ctx, &a->s) && a->ld % 8 == 0 && a->ld_o % 8 == 0 && aligned(a->q) &&
           aligned(a->k) && aligned(a->v) && aligned(a->w) && aligned(a->o) && aligned(a->d_o) &&
           aligned(a->dq) && aligned(a->dk) && aligned(a->dv);
}

/* Fills the scratch pointers and the plan; returns the bytes. */
static size_t plan_bwd(const struct srf_ctx *ctx, const struct srf_attn_shape *s, bool dw,
                       struct pure_plan *plan, struct bwd_params *p)
{
    struct cuda_bump bump = {(char *)ctx->workspace, 0};
    int64_t heads = s->b * s->h, nf = s->m > 64 ? 2 : 1, chunks = div_up(s->t, CHUNK);
    int per_sm = nf == 1 && s->d <= 64 ? 3 : nf == 1 && s->d <= 96 ? 2 : 1;
    *plan = srf__pure_plan(ctx, s, per_sm);
    p->n_seg = plan->n_seg;
    p->seg_chunks = plan->seg_chunks;
    if (srf__pure_wgmma_takes(ctx, s)) return srf__pure_wgmma_plan_bwd(ctx, s, dw, plan, p);
    p->cuts = (uint64_t *)bump_bytes(&bump, (size_t)(heads * chunks) * sizeof(uint64_t));
    p->tops = (float *)bump_bytes(&bump, (size_t)(heads * chunks * nf * 64) * sizeof(float));
    p->delta = (float *)bump_bytes(&bump, (size_t)(heads * s->t) * sizeof(float));
    if (plan->n_seg > 1) {
        size_t states = (size_t)(heads * plan->n_seg * pure_state_count(s->d, nf));
        p->states = (float *)bump_bytes(&bump, states * sizeof(float));
        p->r = (float *)bump_bytes(&bump, states * sizeof(float));
    }
    if (dw)
        p->dw = (float *)bump_bytes(&bump,
                                    (size_t)(heads * plan->n_seg * nf * 64 * s->d) * sizeof(float));
    if (s->m > 128)
        for (int i = 0; i < 3; i++)
            p->sum[i] = (float *)bump_bytes(&bump, (size_t)(heads * s->t * s->d) * sizeof(float));
    return bump.used;
}

size_t srf__pure_bwd_workspace(const struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a)
{
    struct pure_plan plan;
    struct bwd_params p = {};
    if (srf__wide_takes_bwd(ctx, a)) return srf__wide_bwd_workspace(ctx, &a->s);
    return plan_bwd(ctx, &a->s, a->dw != NULL, &plan, &p);
}

/* Features [p->first, p->first + p->count). */
static srf_status launch_group(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a,
                               const struct pure_plan *plan, struct bwd_params *p)
{
    const int64_t heads = a->s.b * a->s.h, d = a->s.d;
    if (srf__pure_wgmma_takes(ctx, &a->s)) {
        SRF_TRY(srf__pure_wgmma_bwd(ctx, a, plan, p));
    } else {
        if (p->n_seg > 1) SRF_TRY(srf__pure_states(ctx, a, p->first, p->count, plan, p->states));
        SRF_TRY(srf__pure_bwd_queries(ctx, p, heads, d));
        SRF_TRY(srf__pure_bwd_keys(ctx, p, heads, d));
    }
    if (a->dw) {
        const int64_t n = (int64_t)p->count * d, rows = p->count <= 64 ? 64 : 128;
        dw_kernel<<<(unsigned)div_up(n * p->n_sets, 128), 128, 0, stream_of(ctx)>>>(
            (float *)a->dw + (int64_t)p->first * d, p->dw, n, rows * d, (int64_t)p->m * d,
            (int)a->s.b, p->n_sets, p->n_sets == 1 ? p->h : 1,
            p->head_units ? 2 * p->head_units : p->n_seg, p->scale);
    }
    return srf__cuda_launched("srf_attn_bwd");
}

srf_status srf__pure_bwd(struct srf_ctx *ctx, const struct srf_srf_attn_bwd_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    const int width = s->m > 64 ? 128 : 64;
    if (s->b * s->t == 0) return SRF_OK;
    if (srf__wide_takes_bwd(ctx, a)) return srf__wide_bwd(ctx, a);
    struct pure_plan plan;
    struct bwd_params p = {};
    plan_bwd(ctx, s, a->dw != NULL, &plan, &p);
    p.q = (const bf16 *)a->q;
    p.k = (const bf16 *)a->k;
    p.v = (const bf16 *)a->v;
    p.o = (const bf16 *)a->o;
    p.d_o = (const bf16 *)a->d_o;
    p.w = (const bf16 *)a->w;
    p.bias = (const float *)a->bias;
    p.stat = (const float *)a->stat;
    p.dq = (bf16 *)a->dq;
    p.dk = (bf16 *)a->dk;
    p.dv = (bf16 *)a->dv;
    p.ld = a->ld;
    p.ld_o = a->ld_o;
    p.t = (int)s->t;
    p.h = (int)s->h;
    p.m = (int)s->m;
    p.n_sets = (int)s->n_sets;
    p.scale = plan.scale;
    p.limit = plan.limit;
    for (p.first = 0; p.first < p.m; p.first += width) {
        p.count = p.m - p.first < width ? p.m - p.first : width;
        SRF_TRY(launch_group(ctx, a, &plan, &p));
    }
    return SRF_OK;
}
