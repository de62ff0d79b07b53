/* SRF attention, one token at a time: matrix-vector work on the state, O(m d) a token whatever the
 * position, and at most 2 window exact scores. In the hybrid a block's last token puts the whole
 * block before it into the state, so that work is constant per token on average. */
#include "kernels/cpu/srf_attn.h"

struct step_scratch {
    real *x, *y;       /* (d) */
    real *aq, *ak, *f; /* (m): exponents, then weights */
    real *p;           /* (2 window) */
};

static struct step_scratch carve(struct attn_bump *b, const struct srf_attn_shape *s)
{
    return (struct step_scratch){attn_reals(b, s->d), attn_reals(b, s->d),
                                 attn_reals(b, s->m), attn_reals(b, s->m),
                                 attn_reals(b, s->m), attn_reals(b, 2 * s->window)};
}

static real dot(const real *a, const real *b, int64_t n)
{
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += a[j] * b[j];
    return sum;
}

static void add_scaled(real *a, real by, const real *b, int64_t n)
{
#pragma omp simd
    for (int64_t j = 0; j < n; j++) a[j] += by * b[j];
}

/* a (m) = log2(e) (W x + bias) - sub */
static void exponents(const struct attn_head *h, const real *x, real sub, real *a)
{
    for (int64_t i = 0; i < h->m; i++) {
        real e = ATTN_LOG2E * dot(h->w + i * h->d, x, h->d) + (h->bias[i] * ATTN_LOG2E - sub);
        a[i] = e < ATTN_LOW ? ATTN_LOW : e;
    }
}

/* One key into the state. */
static void absorb(const struct attn_head *h, struct attn_state *st, const struct step_scratch *f,
                   const real *k, const real *v)
{
    int64_t d = h->d;
    bool empty = attn_is_empty(st);
    real half;
    srf__attn_load(h, k, d, 1, f->y, &half);
    exponents(h, f->y, half, f->ak);
    for (int64_t i = 0; i < h->m; i++) {
        real n = srf__round(f->ak[i]), old = empty ? ATTN_UNSET : st->top[i];
        real top = n > old ? n : old, step = empty ? 0 : srf__pow2(old - top);
        real weight = srf__exp2_parts(f->ak[i] - n, n - top), *row = st->s + i * d;
        st->top[i] = top;
        st->z[i] = step * st->z[i] + weight;
#pragma omp simd
        for (int64_t j = 0; j < d; j++) row[j] = step * row[j] + weight * v[j];
    }
}

/* o = sum_i f_i S_i / sum_i f_i z_i from here on: adds the state's part of a query whose weights
 * are 2^(aq + M - r). Returns its part of the denominator. */
static real read_state(const struct attn_head *h, const struct attn_state *st, const real *f,
                       real *o)
{
    for (int64_t i = 0; i < h->m; i++) add_scaled(o, f[i], st->s + i * h->d, h->d);
    return dot(f, st->z, h->m);
}

static void pure_step(const struct attn_head *h, const struct step_scratch *f,
                      struct attn_state *st, const real *q, const real *k, const real *v, real *o)
{
    real half, r = ATTN_UNSET;
    absorb(h, st, f, k, v);
    srf__attn_load(h, q, h->d, 1, f->x, &half);
    exponents(h, f->x, 0, f->aq);
    srf__attn_queries(h, f->aq, st->top, 1, &r, f->f);
    real by = 1 / read_state(h, st, f->f, o);
    for (int64_t j = 0; j < h->d; j++) o[j] *= by;
}

static void hybrid_step(const struct attn_head *h, const struct step_scratch *f,
                        struct attn_state *st, real *ring, int64_t window, int64_t pos,
                        const real *q, const real *k, const real *v, real *o)
{
    int64_t d = h->d, block = pos / window, first = attn_max(0, block - 1) * window;
    real *ring_v = ring + 2 * window * d, half, most = 0;
    memcpy(ring + pos % (2 * window) * d, k, (size_t)d * sizeof(real));
    memcpy(ring_v + pos % (2 * window) * d, v, (size_t)d * sizeof(real));
    srf__attn_load(h, q, d, 1, f->x, &half);
    for (int64_t s = first; s <= pos; s++) {
        real ignored, *score = f->p + (s - first);
        srf__attn_load(h, ring + s % (2 * window) * d, d, 1, f->y, &ignored);
        *score = ATTN_LOG2E * dot(f->x, f->y, d);
        most = s == first || *score > most ? *score : most;
    }
    real r = srf__round(most), den = 0;
    if (!attn_is_empty(st)) {
        exponents(h, f->x, half + (real)log2((double)h->m), f->aq);
        srf__attn_queries(h, f->aq, st->top, 1, &r, f->f);
        den = read_state(h, st, f->f, o);
    }
    for (int64_t s = first; s <= pos; s++) {
        real n = srf__round(f->p[s - first]), weight = srf__exp2_parts(f->p[s - first] - n, n - r);
        add_scaled(o, weight, ring_v + s % (2 * window) * d, d);
        den += weight;
    }
    real by = 1 / den;
    for (int64_t j = 0; j < d; j++) o[j] *= by;
    if ((pos + 1) % window || block == 0) return;
    for (int64_t s = first; s < first + window; s++)
        absorb(h, st, f, ring + s % (2 * window) * d, ring_v + s % (2 * window) * d);
}

static size_t thread_bytes(const struct srf_attn_shape *s)
{
    struct attn_bump b = {0};
    carve(&b, s);
    return b.used;
}

size_t SRF_CPU(srf_attn_step_workspace)(const struct srf_ctx *ctx,
                                        const struct srf_srf_attn_step_args *a)
{
    return (size_t)ctx->n_threads * thread_bytes(&a->s);
}

srf_status SRF_CPU(srf_attn_step)(struct srf_ctx *ctx, const struct srf_srf_attn_step_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    SRF_TRY(srf__attn_check(s, a->ld, a->ld_o));
    SRF_FAIL_IF(!s->causal || s->t != 1, SRF_INVALID,
                "a step of srf attention: expected causal and 1 token, found %s and %lld",
                s->causal ? "causal" : "not causal", (long long)s->t);
    size_t bytes = thread_bytes(s);
    int64_t count = srf_attn_state_count(s->m, s->d, s->window);
    /* Waking the other threads costs more than a small step. */
    bool wide = s->b * s->h * (s->m + s->window) * s->d > 1 << 17;
#pragma omp parallel for schedule(static) num_threads(ctx->n_threads) if (wide)
    for (int64_t i = 0; i < s->b * s->h; i++) {
        struct attn_bump bump = {(char *)ctx->workspace + (size_t)omp_get_thread_num() * bytes, 0};
        struct step_scratch f = carve(&bump, s);
        struct attn_head h = attn_head_of(ctx, s, a->w, a->bias, i % s->h);
        struct attn_state st = attn_state_at((real *)a->state + i * count, s->m, s->d);
        int64_t in = i / s->h * a->ld + i % s->h * s->d;
        const real *q = (const real *)a->q + in, *k = (const real *)a->k + in;
        const real *v = (const real *)a->v + in;
        real *o = (real *)a->o + i / s->h * a->ld_o + i % s->h * s->d;
        memset(o, 0, (size_t)s->d * sizeof(real));
        if (s->window)
            hybrid_step(&h, &f, &st, st.top + s->m, s->window, ((const int32_t *)a->pos)[i / s->h],
                        q, k, v, o);
        else
            pure_step(&h, &f, &st, q, k, v, o);
    }
    return SRF_OK;
}
