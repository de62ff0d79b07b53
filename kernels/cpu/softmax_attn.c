/* Softmax attention: o_t = sum_s P_ts v_s, P_ts = exp(q_t.k_s / sqrt(d) - lse_t), s <= t if causal.
 * With a window, only the latest tokens and the first few: tiles that no query of a tile sees are
 * left out.
 *
 * Tiles of TILE_Q queries by TILE_K keys, so that the score matrix is never whole; rows are merged
 * over tiles by the running maximum. Backward recomputes P from lse:
 *     dv_s = sum_t P_ts d_o_t,   ds_ts = P_ts (d_o_t.v_s - d_o_t.o_t) / sqrt(d)
 *     dq_t = sum_s ds_ts k_s,    dk_s = sum_t ds_ts q_t
 * Scores are in log2 units inside. Parallel over sequences and heads.
 */
#include "kernels/cpu/cpu.h"

#define TILE_Q 64
#define TILE_K 512 /* a multiple of TILE_Q: a row of a tile always sees a key of it */

static srf_status check(int64_t b, int64_t t, int64_t h, int64_t d, int64_t ld, int64_t ld_o)
{
    SRF_FAIL_IF(
        b < 0 || t < 0 || h < 1 || d < 1, SRF_INVALID,
        "softmax attention of b=%lld t=%lld h=%lld d=%lld: expected b, t >= 0 and h, d >= 1",
        (long long)b, (long long)t, (long long)h, (long long)d);
    SRF_FAIL_IF(ld < h * d || ld_o < h * d, SRF_INVALID,
                "softmax attention with leading dimensions %lld and %lld: expected at least %lld",
                (long long)ld, (long long)ld_o, (long long)(h * d));
    return SRF_OK;
}

static int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* What a tile of queries sees: all of the keys [0, sinks), and some of [from, keys). */
struct seen {
    bool causal;
    int64_t window, sinks; /* of the op; no window: one longer than the sequence */
    int64_t first, from, keys;
};

static struct seen seen_of(bool causal, int64_t window, int64_t sinks, int64_t t_len, int64_t t0,
                           int64_t n)
{
    int64_t from = window ? (t0 + 1 - window) / TILE_Q * TILE_Q : 0;
    struct seen s = {.causal = causal,
                     .window = window ? window : t_len + 1,
                     .sinks = min64(sinks, t_len),
                     .from = from > 0 ? from : 0,
                     .keys = causal ? t0 + n : t_len};
    if (s.from <= s.sinks) s.from = 0; /* one piece */
    s.first = s.from && !s.sinks ? s.from : 0;
    return s;
}

/* The next tile of keys from s0 on, or 0 of them: [s0, s0 + count). */
static int64_t tile_of(const struct seen *s, int64_t *s0)
{
    if (*s0 < s->from && *s0 >= s->sinks) *s0 = s->from;
    return min64(TILE_K, (*s0 < s->from ? s->sinks : s->keys) - *s0);
}

/* Of c keys from s0 on, token t sees [0, sinks) and [from, end). */
static void row_of(const struct seen *s, int64_t t, int64_t s0, int64_t c, int64_t *sinks,
                   int64_t *from, int64_t *end)
{
    *end = s->causal ? min64(c, t + 1 - s0) : c;
    *from = min64(t + 1 - s->window - s0, *end);
    *sinks = min64(s->sinks - s0, *end);
    *sinks = *sinks > 0 ? *sinks : 0;
    *from = s->causal && *from > *sinks ? *from : *sinks;
}

size_t SRF_CPU(softmax_attn_fwd_workspace)(const struct srf_ctx *ctx,
                                           const struct srf_softmax_attn_fwd_args *a)
{
    (void)a;
    return (size_t)ctx->n_threads * TILE_Q * (TILE_K + 2) * sizeof(real);
}

static void head_fwd(struct srf_ctx *ctx, const struct srf_softmax_attn_fwd_args *a, int64_t i,
                     real *scores)
{
    int64_t d = a->d, t_len = a->t, ld = a->ld, ld_o = a->ld_o;
    int64_t in = i / a->h * t_len * ld + i % a->h * d;
    const real *q = (const real *)a->q + in, *k = (const real *)a->k + in;
    const real *v = (const real *)a->v + in;
    real *o = (real *)a->o + i / a->h * t_len * ld_o + i % a->h * d;
    real *most = scores + TILE_Q * TILE_K, *sum = most + TILE_Q;
    real scale = REAL_LOG2E / (real)sqrt((double)d);
    for (int64_t t0 = 0; t0 < t_len; t0 += TILE_Q) {
        int64_t n = min64(TILE_Q, t_len - t0), c;
        struct seen seen = seen_of(a->causal, a->window, a->sinks, t_len, t0, n);
        for (int64_t s0 = seen.first; (c = tile_of(&seen, &s0)) > 0; s0 += c) {
            bool first = s0 == seen.first;
            srf__gemm(ctx, false, true, n, c, d, scale, q + t0 * ld, ld, k + s0 * ld, ld, 0, scores,
                      c);
            for (int64_t t = 0; t < n; t++) {
                int64_t sinks, from, end;
                row_of(&seen, t0 + t, s0, c, &sinks, &from, &end);
                real *p = scores + t * c, *out = o + (t0 + t) * ld_o;
                real old = first ? p[sinks ? 0 : from] : most[t], top = old, total = 0;
#pragma omp simd reduction(max : top)
                for (int64_t s = 0; s < sinks; s++) top = p[s] > top ? p[s] : top;
#pragma omp simd reduction(max : top)
                for (int64_t s = from; s < end; s++) top = p[s] > top ? p[s] : top;
#pragma omp simd reduction(+ : total)
                for (int64_t s = 0; s < sinks; s++) {
                    p[s] = srf__exp2(p[s] - top);
                    total += p[s];
                }
                for (int64_t s = sinks; s < from; s++) p[s] = 0;
#pragma omp simd reduction(+ : total)
                for (int64_t s = from; s < end; s++) {
                    p[s] = srf__exp2(p[s] - top);
                    total += p[s];
                }
                for (int64_t s = end; s < c; s++) p[s] = 0;
                most[t] = top;
                if (first) {
                    sum[t] = total;
                    continue;
                }
                real by = srf__exp2(old - top);
                sum[t] = sum[t] * by + total;
                for (int64_t j = 0; j < d; j++) out[j] *= by;
            }
            srf__gemm(ctx, false, false, n, d, c, 1, scores, c, v + s0 * ld, ld, !first,
                      o + t0 * ld_o, ld_o);
        }
        for (int64_t t = 0; t < n; t++) {
            real by = 1 / sum[t], *out = o + (t0 + t) * ld_o;
            for (int64_t j = 0; j < d; j++) out[j] *= by;
            if (a->lse)
                ((real *)a->lse)[i * t_len + t0 + t] =
                    REAL_LN2 * most[t] + (real)log((double)sum[t]);
        }
    }
}

srf_status SRF_CPU(softmax_attn_fwd)(struct srf_ctx *ctx, const struct srf_softmax_attn_fwd_args *a)
{
    SRF_TRY(check(a->b, a->t, a->h, a->d, a->ld, a->ld_o));
    SRF_TRY(srf__window_check(a->causal, a->window, a->sinks));
    srf__blas_serial_begin(ctx);
#pragma omp parallel for schedule(static) num_threads(ctx->n_threads)
    for (int64_t i = 0; i < a->b * a->h; i++)
        head_fwd(ctx, a, i,
                 (real *)ctx->workspace + (int64_t)omp_get_thread_num() * TILE_Q * (TILE_K + 2));
    srf__blas_serial_end(ctx);
    return SRF_OK;
}

size_t SRF_CPU(softmax_attn_bwd_workspace)(const struct srf_ctx *ctx,
                                           const struct srf_softmax_attn_bwd_args *a)
{
    (void)a;
    return (size_t)ctx->n_threads * TILE_Q * (2 * TILE_K + 1) * sizeof(real);
}

static void head_bwd(struct srf_ctx *ctx, const struct srf_softmax_attn_bwd_args *a, int64_t i,
                     real *p)
{
    int64_t d = a->d, t_len = a->t, ld = a->ld, ld_o = a->ld_o;
    int64_t in = i / a->h * t_len * ld + i % a->h * d;
    int64_t at = i / a->h * t_len * ld_o + i % a->h * d;
    const real *q = (const real *)a->q + in, *k = (const real *)a->k + in;
    const real *v = (const real *)a->v + in, *o = (const real *)a->o + at;
    const real *d_o = (const real *)a->d_o + at, *lse = (const real *)a->lse + i * t_len;
    real *dq = (real *)a->dq + in, *dk = (real *)a->dk + in, *dv = (real *)a->dv + in;
    real *ds = p + TILE_Q * TILE_K, *delta = ds + TILE_Q * TILE_K;
    real scale = 1 / (real)sqrt((double)d);
    for (int64_t t = 0; t < t_len; t++) {
        memset(dk + t * ld, 0, (size_t)d * sizeof(real));
        memset(dv + t * ld, 0, (size_t)d * sizeof(real));
    }
    for (int64_t t0 = 0; t0 < t_len; t0 += TILE_Q) {
        int64_t n = min64(TILE_Q, t_len - t0), c;
        struct seen seen = seen_of(a->causal, a->window, a->sinks, t_len, t0, n);
        for (int64_t t = 0; t < n; t++)
            delta[t] = srf__dot(o + (t0 + t) * ld_o, d_o + (t0 + t) * ld_o, d);
        for (int64_t s0 = seen.first; (c = tile_of(&seen, &s0)) > 0; s0 += c) {
            bool first = s0 == seen.first;
            const real *vs = v + s0 * ld, *ks = k + s0 * ld, *qs = q + t0 * ld;
            const real *d_os = d_o + t0 * ld_o;
            srf__gemm(ctx, false, true, n, c, d, scale * REAL_LOG2E, qs, ld, ks, ld, 0, p, c);
            srf__gemm(ctx, false, true, n, c, d, 1, d_os, ld_o, vs, ld, 0, ds, c);
            for (int64_t t = 0; t < n; t++) {
                real *row = p + t * c, *drow = ds + t * c, shift = lse[t0 + t] * REAL_LOG2E;
                int64_t sinks, from, end;
                row_of(&seen, t0 + t, s0, c, &sinks, &from, &end);
#pragma omp simd
                for (int64_t s = 0; s < end; s++) {
                    row[s] = srf__exp2(row[s] - shift);
                    drow[s] = scale * row[s] * (drow[s] - delta[t]);
                }
                for (int64_t s = sinks; s < from; s++) row[s] = drow[s] = 0;
                for (int64_t s = end; s < c; s++) row[s] = drow[s] = 0;
            }
            srf__gemm(ctx, false, false, n, d, c, 1, ds, c, ks, ld, !first, dq + t0 * ld, ld);
            srf__gemm(ctx, true, false, c, d, n, 1, ds, c, qs, ld, 1, dk + s0 * ld, ld);
            srf__gemm(ctx, true, false, c, d, n, 1, p, c, d_os, ld_o, 1, dv + s0 * ld, ld);
        }
    }
}

srf_status SRF_CPU(softmax_attn_bwd)(struct srf_ctx *ctx, const struct srf_softmax_attn_bwd_args *a)
{
    SRF_TRY(check(a->b, a->t, a->h, a->d, a->ld, a->ld_o));
    SRF_TRY(srf__window_check(a->causal, a->window, a->sinks));
    srf__blas_serial_begin(ctx);
#pragma omp parallel for schedule(static) num_threads(ctx->n_threads)
    for (int64_t i = 0; i < a->b * a->h; i++)
        head_bwd(ctx, a, i,
                 (real *)ctx->workspace +
                     (int64_t)omp_get_thread_num() * TILE_Q * (2 * TILE_K + 1));
    srf__blas_serial_end(ctx);
    return SRF_OK;
}
