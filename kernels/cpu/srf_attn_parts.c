/* The shared parts of SRF attention: features, the state, one chunk, one window. */
#include "kernels/cpu/srf_attn.h"

srf_status srf__attn_check(const struct srf_attn_shape *s, int64_t ld, int64_t ld_o)
{
    SRF_FAIL_IF(
        s->b < 0 || s->t < 0 || s->h < 1 || s->d < 2 || s->m < 1, SRF_INVALID,
        "srf attention of b=%lld t=%lld h=%lld d=%lld m=%lld: expected b, t >= 0, h, m >= 1 "
        "and d >= 2",
        (long long)s->b, (long long)s->t, (long long)s->h, (long long)s->d, (long long)s->m);
    SRF_FAIL_IF(
        s->n_sets != 1 && s->n_sets != s->h, SRF_INVALID,
        "srf attention with %lld feature sets: expected 1 or one for each of the %lld heads",
        (long long)s->n_sets, (long long)s->h);
    SRF_FAIL_IF(s->window < 0 || (s->window > 0 && !s->causal), SRF_INVALID,
                "srf attention with window %lld: expected 0, or more in causal attention",
                (long long)s->window);
    SRF_FAIL_IF(ld < s->h * s->d || ld_o < s->h * s->d, SRF_INVALID,
                "srf attention with leading dimensions %lld and %lld: expected at least %lld",
                (long long)ld, (long long)ld_o, (long long)(s->h * s->d));
    return SRF_OK;
}

struct attn_chunk srf__attn_carve_chunk(struct attn_bump *b, int64_t m)
{
    return (struct attn_chunk){.top = attn_reals(b, m),
                               .step = attn_reals(b, m),
                               .zs = attn_reals(b, m),
                               .qf = attn_reals(b, ATTN_CHUNK * m),
                               .kf = attn_reals(b, ATTN_CHUNK * m),
                               .p = attn_reals(b, ATTN_CHUNK * ATTN_CHUNK),
                               .den = attn_reals(b, ATTN_CHUNK)};
}

void srf__attn_load(const struct attn_head *h, const real *src, int64_t ld, int64_t n, real *x,
                    real *half)
{
    for (int64_t t = 0; t < n; t++) {
        const real *from = src + t * ld;
        real *to = x + t * h->d;
        if (t + ATTN_AHEAD < n) attn_prefetch(from + ATTN_AHEAD * ld, h->d);
#pragma omp simd
        for (int64_t j = 0; j < h->d; j++) {
            real c = from[j] * h->scale;
            c = c > ATTN_LIMIT ? ATTN_LIMIT : c;
            c = c < -ATTN_LIMIT ? -ATTN_LIMIT : c;
            to[j] = c;
        }
        if (half) half[t] = (real)0.5 * REAL_LOG2E * srf__dot(to, to, h->d);
    }
}

void srf__attn_features(const struct attn_head *h, const real *x, const real *half, real shift,
                        int64_t n, real *a)
{
    int64_t m = h->m;
    if (n == 0) return;
    srf__gemm(h->ctx, false, true, n, m, h->d, REAL_LOG2E, x, h->d, h->w, h->d, 0, a, m);
    for (int64_t t = 0; t < n; t++) {
        real sub = (half ? half[t] : 0) + shift, *row = a + t * m;
#pragma omp simd
        for (int64_t i = 0; i < m; i++) {
            real e = row[i] + (h->bias[i] * REAL_LOG2E - sub);
            row[i] = e < ATTN_LOW ? ATTN_LOW : e;
        }
    }
}

/* top = max(M of the state, round(ak)); step = 2^(M - top), 0 for an empty state. */
static void key_top(const struct attn_head *h, const struct attn_state *st, const real *ak,
                    int64_t n, real *top, real *step)
{
    int64_t m = h->m;
    bool empty = attn_is_empty(st);
    for (int64_t i = 0; i < m; i++) top[i] = empty ? ATTN_UNSET : st->top[i];
    for (int64_t s = 0; s < n; s++) {
        const real *row = ak + s * m;
#pragma omp simd
        for (int64_t i = 0; i < m; i++) {
            real e = srf__round(row[i]);
            top[i] = e > top[i] ? e : top[i];
        }
    }
    if (empty)
        memset(step, 0, (size_t)m * sizeof(real));
    else
        for (int64_t i = 0; i < m; i++) step[i] = srf__pow2(st->top[i] - top[i]);
}

void srf__attn_keys(const struct attn_head *h, const real *ak, const real *top, int64_t n, real *kf)
{
    int64_t m = h->m;
    for (int64_t s = 0; s < n; s++) {
        const real *row = ak + s * m;
        real *out = kf + s * m;
#pragma omp simd
        for (int64_t i = 0; i < m; i++) {
            real e = srf__round(row[i]);
            out[i] = srf__exp2_parts(row[i] - e, e - top[i]);
        }
    }
}

void srf__attn_queries(const struct attn_head *h, const real *aq, const real *top, int64_t n,
                       real *r, real *qf)
{
    int64_t m = h->m;
    for (int64_t t = 0; t < n; t++) {
        const real *row = aq + t * m;
        real *out = qf + t * m, most = r[t];
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < m; i++) {
            real e = srf__round(row[i]) + top[i];
            most = e > most ? e : most;
        }
#pragma omp simd
        for (int64_t i = 0; i < m; i++) {
            real e = srf__round(row[i]);
            out[i] = srf__exp2_parts(row[i] - e, (e + top[i]) - most);
        }
        r[t] = most;
    }
}

void srf__attn_add_keys(const struct attn_head *h, struct attn_state *st, const real *kf,
                        const real *v, int64_t ld, int64_t n, const real *top, const real *step)
{
    int64_t m = h->m, d = h->d;
    for (int64_t i = 0; i < m; i++) {
        st->top[i] = top[i];
        if (step[i] == 1) continue;
        real *row = st->s + i * d, by = step[i];
        st->z[i] *= by;
#pragma omp simd
        for (int64_t j = 0; j < d; j++) row[j] *= by;
    }
    for (int64_t s = 0; s < n; s++)
#pragma omp simd
        for (int64_t i = 0; i < m; i++) st->z[i] += kf[s * m + i];
    srf__gemm(h->ctx, true, false, m, d, n, 1, kf, m, v, ld, 1, st->s, d);
}

void srf__attn_absorb(const struct attn_head *h, struct attn_state *st, const real *ak,
                      const real *v, int64_t ld, int64_t n, const struct attn_chunk *ch)
{
    key_top(h, st, ak, n, ch->top, ch->step);
    srf__attn_keys(h, ak, ch->top, n, ch->kf);
    srf__attn_add_keys(h, st, ch->kf, v, ld, n, ch->top, ch->step);
}

bool srf__attn_chunk(const struct attn_head *h, const struct attn_state *st, const real *aq,
                     const real *ak, int64_t n, const struct attn_chunk *ch)
{
    int64_t m = h->m;
    bool ok = true;
    key_top(h, st, ak, n, ch->top, ch->step);
    srf__attn_keys(h, ak, ch->top, n, ch->kf);
    for (int64_t t = 0; t < n; t++) ch->den[t] = ATTN_UNSET;
    srf__attn_queries(h, aq, ch->top, n, ch->den, ch->qf);
    for (int64_t i = 0; i < m; i++) ch->zs[i] = st->z[i] * ch->step[i];
    srf__gemm(h->ctx, false, true, n, n, m, 1, ch->qf, m, ch->kf, m, 0, ch->p, n);
    for (int64_t t = 0; t < n; t++) {
        real *p = ch->p + t * n;
        for (int64_t s = t + 1; s < n; s++) p[s] = 0;
        real den = srf__dot(ch->qf + t * m, ch->zs, m) + srf__sum(p, n);
        ch->den[t] = den;
        ok = ok && den >= REAL_MIN_DEN;
    }
    return ok || n == 1;
}

void srf__attn_window(const struct attn_head *h, const struct attn_block_pair *pair,
                      const struct attn_state *far, const real *x, const real *aq, int64_t row,
                      int64_t n, real *p, real *qf, real *den)
{
    int64_t m = h->m, d = h->d, before = pair->n[0], cols = before + row + n;
    if (before)
        srf__gemm(h->ctx, false, true, n, before, d, REAL_LOG2E, x, d, pair->y[0], d, 0, p, cols);
    srf__gemm(h->ctx, false, true, n, row + n, d, REAL_LOG2E, x, d, pair->y[1], d, 0, p + before,
              cols);
    for (int64_t t = 0; t < n; t++) {
        const real *score = p + t * cols;
        int64_t seen = before + row + t + 1;
        real most = score[0];
#pragma omp simd reduction(max : most)
        for (int64_t s = 0; s < seen; s++) most = score[s] > most ? score[s] : most;
        den[t] = srf__round(most);
    }
    bool has_far = !attn_is_empty(far);
    if (has_far) srf__attn_queries(h, aq, far->top, n, den, qf);
    for (int64_t t = 0; t < n; t++) {
        int64_t seen = before + row + t + 1;
        real *weight = p + t * cols, r = den[t];
#pragma omp simd
        for (int64_t s = 0; s < seen; s++) {
            real e = srf__round(weight[s]);
            weight[s] = srf__exp2_parts(weight[s] - e, e - r);
        }
        for (int64_t s = seen; s < cols; s++) weight[s] = 0;
        den[t] = srf__sum(weight, cols) + (has_far ? srf__dot(qf + t * m, far->z, m) : 0);
    }
}
