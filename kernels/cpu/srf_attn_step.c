/* SRF attention, one token at a time: O(m d) a token whatever the position, and at most 2 window
 * exact scores. The features of all sequences and heads are made by one gemm (one for each head
 * where heads have their own W); the rest is matrix-vector work on each state. In the hybrid a
 * block's last token puts the whole block before it into the state: constant work per token on
 * average.
 */
#include "kernels/cpu/srf_attn.h"

/* Shared: queries, and in the pure form keys, of every head and sequence. Row (head, i, sequence)
 * is query (i = 0) or key (1). */
struct step_rows {
    int64_t parts;      /* 1: queries only; 2: keys too */
    real *x, *half, *a; /* (h, parts, b, d), (h, parts, b), (h, parts, b, m) */
};

/* A thread's own. */
struct step_scratch {
    real *weight; /* (m) */
    real *p;      /* (2 window) */
    real *y;      /* (ATTN_CHUNK, d) */
    real *half;   /* (ATTN_CHUNK) */
    real *ak;     /* (ATTN_CHUNK, m) */
    struct attn_chunk ch;
};

static struct step_rows carve_rows(struct attn_bump *b, const struct srf_attn_shape *s)
{
    int64_t parts = s->window ? 1 : 2, n = s->h * parts * s->b;
    return (struct step_rows){parts, attn_reals(b, n * s->d), attn_reals(b, n),
                              attn_reals(b, n * s->m)};
}

static struct step_scratch carve(struct attn_bump *b, const struct srf_attn_shape *s)
{
    struct step_scratch f = {.weight = attn_reals(b, s->m)};
    if (s->window == 0) return f;
    f.p = attn_reals(b, 2 * s->window);
    f.y = attn_reals(b, ATTN_CHUNK * s->d);
    f.half = attn_reals(b, ATTN_CHUNK);
    f.ak = attn_reals(b, ATTN_CHUNK * s->m);
    f.ch = srf__attn_carve_chunk(b, s->m);
    return f;
}

/* o (d) += sum_i weight_i rows_i, rows (n, d) */
static void add_rows(const real *weight, const real *rows, int64_t n, int64_t d, real *o)
{
    int64_t j = 0;
    for (; j + 4 * SRF__LANES <= d; j += 4 * SRF__LANES) {
        srf__lanes *to = (srf__lanes *)(o + j), a = to[0], b = to[1], c = to[2], e = to[3];
        for (int64_t i = 0; i < n; i++) {
            const srf__lanes *row = (const srf__lanes *)(rows + i * d + j);
            a += weight[i] * row[0];
            b += weight[i] * row[1];
            c += weight[i] * row[2];
            e += weight[i] * row[3];
        }
        to[0] = a;
        to[1] = b;
        to[2] = c;
        to[3] = e;
    }
    for (int64_t i = 0; i < n; i++)
#pragma omp simd
        for (int64_t l = j; l < d; l++) o[l] += weight[i] * rows[i * d + l];
}

static void scale_by(real *o, real by, int64_t d)
{
    for (int64_t j = 0; j < d; j++) o[j] *= by;
}

/* One key, with exponents ak, into the state. */
static void absorb(const struct attn_head *h, struct attn_state *st, const real *ak, const real *v)
{
    int64_t d = h->d;
    bool empty = attn_is_empty(st);
    for (int64_t i = 0; i < h->m; i++) {
        real n = srf__round(ak[i]), old = empty ? ATTN_UNSET : st->top[i];
        real top = n > old ? n : old, step = empty ? 0 : srf__pow2(old - top);
        real weight = srf__exp2_parts(ak[i] - n, n - top), *row = st->s + i * d;
        st->top[i] = top;
        st->z[i] = step * st->z[i] + weight;
#pragma omp simd
        for (int64_t j = 0; j < d; j++) row[j] = step * row[j] + weight * v[j];
    }
}

static void pure_step(const struct attn_head *h, const struct step_scratch *f,
                      struct attn_state *st, const real *aq, const real *ak, const real *v, real *o)
{
    real r = ATTN_UNSET;
    absorb(h, st, ak, v);
    srf__attn_queries(h, aq, st->top, 1, &r, f->weight);
    add_rows(f->weight, st->s, h->m, h->d, o);
    scale_by(o, 1 / srf__dot(f->weight, st->z, h->m), h->d);
}

/* Block j of the ring (its half j mod 2) into the state. */
static void fold(const struct attn_head *h, const struct step_scratch *f, struct attn_state *st,
                 const real *ring, int64_t window, int64_t block)
{
    int64_t d = h->d;
    const real *k = ring + (block & 1) * window * d, *v = k + 2 * window * d;
    for (int64_t s = 0; s < window; s += ATTN_CHUNK) {
        int64_t n = attn_min(ATTN_CHUNK, window - s);
        srf__attn_load(h, k + s * d, d, n, f->y, f->half);
        srf__attn_features(h, f->y, f->half, 0, n, f->ak);
        srf__attn_absorb(h, st, f->ak, v + s * d, d, n, &f->ch);
    }
}

static void hybrid_step(const struct attn_head *h, const struct step_scratch *f,
                        struct attn_state *st, real *ring, int64_t window, int64_t pos,
                        const real *x, const real *aq, const real *k, const real *v, real *o)
{
    int64_t d = h->d, block = pos / window, row = pos % (2 * window);
    memcpy(ring + row * d, k, (size_t)d * sizeof(real));
    memcpy(ring + (2 * window + row) * d, v, (size_t)d * sizeof(real));
    /* The block itself, as far as the token, then the block before. */
    int64_t own = pos % window + 1, seen = block ? own + window : own;
    const real *keys[2] = {ring + (block & 1) * window * d, ring + (~block & 1) * window * d};
    real most = ATTN_UNSET;
    for (int64_t s = 0; s < seen; s++) {
        const real *key = s < own ? keys[0] + s * d : keys[1] + (s - own) * d;
        srf__attn_load(h, key, d, 1, f->y, NULL);
        f->p[s] = REAL_LOG2E * srf__dot(x, f->y, d);
        most = s == 0 || f->p[s] > most ? f->p[s] : most;
    }
    real r = srf__round(most), den = 0;
    if (!attn_is_empty(st)) {
        srf__attn_queries(h, aq, st->top, 1, &r, f->weight);
        add_rows(f->weight, st->s, h->m, d, o);
        den = srf__dot(f->weight, st->z, h->m);
    }
#pragma omp simd
    for (int64_t s = 0; s < seen; s++) {
        real n = srf__round(f->p[s]);
        f->p[s] = srf__exp2_parts(f->p[s] - n, n - r);
    }
    add_rows(f->p, keys[0] + 2 * window * d, own, d, o);
    add_rows(f->p + own, keys[1] + 2 * window * d, seen - own, d, o);
    scale_by(o, 1 / (den + srf__sum(f->p, seen)), d);
    if (own == window && block > 0) fold(h, f, st, ring, window, block - 1);
}

static size_t rows_bytes(const struct srf_attn_shape *s)
{
    struct attn_bump b = {0};
    carve_rows(&b, s);
    return b.used;
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
    return rows_bytes(&a->s) + (size_t)ctx->n_threads * thread_bytes(&a->s);
}

static void all_features(struct srf_ctx *ctx, const struct srf_srf_attn_step_args *a,
                         const struct step_rows *rows)
{
    const struct srf_attn_shape *s = &a->s;
    struct attn_head h = attn_head_of(ctx, s, a->w, a->bias, 0);
    for (int64_t i = 0; i < s->h; i++) {
        int64_t first = i * rows->parts * s->b;
        for (int64_t part = 0; part < rows->parts; part++, first += s->b)
            srf__attn_load(&h, (const real *)(part ? a->k : a->q) + i * s->d, a->ld, s->b,
                           rows->x + first * s->d, rows->half + first);
        /* |x|^2 / 2 of a query cancels in the pure form. */
        if (rows->parts == 2) memset(rows->half + first - 2 * s->b, 0, (size_t)s->b * sizeof(real));
    }
    int64_t n = s->h * rows->parts * s->b / s->n_sets;
    for (int64_t set = 0; set < s->n_sets; set++) {
        h = attn_head_of(ctx, s, a->w, a->bias, set);
        srf__attn_features(&h, rows->x + set * n * s->d, rows->half + set * n,
                           s->window ? (real)log2((double)s->m) : 0, n, rows->a + set * n * s->m);
    }
}

srf_status SRF_CPU(srf_attn_step)(struct srf_ctx *ctx, const struct srf_srf_attn_step_args *a)
{
    const struct srf_attn_shape *s = &a->s;
    SRF_TRY(srf__attn_check(s, a->ld, a->ld_o));
    SRF_FAIL_IF(!s->causal || s->t != 1, SRF_INVALID,
                "a step of srf attention: expected causal and 1 token, found %s and %lld",
                s->causal ? "causal" : "not causal", (long long)s->t);
    SRF_FAIL_IF(a->state_bf16, SRF_UNSUPPORTED, "the CPU keeps no states in bf16");
    struct attn_bump shared = {ctx->workspace, 0};
    struct step_rows rows = carve_rows(&shared, s);
    size_t bytes = thread_bytes(s);
    int64_t count = srf_attn_state_count(s->m, s->d, s->window);
    const int32_t *pos = a->pos;
    all_features(ctx, a, &rows);
    /* Waking the other threads costs more than a small step. */
    bool wide = s->b * s->h * (s->m + s->window) * s->d > 1 << 17;
    srf__blas_serial_begin(ctx);
#pragma omp parallel for schedule(static) num_threads(ctx->n_threads) if (wide)
    for (int64_t i = 0; i < s->b * s->h; i++) {
        struct attn_bump bump = {
            (char *)ctx->workspace + shared.used + (size_t)omp_get_thread_num() * bytes, 0};
        struct step_scratch f = carve(&bump, s);
        int64_t seq = i / s->h, head = i % s->h, row = head * rows.parts * s->b + seq;
        struct attn_head h = attn_head_of(ctx, s, a->w, a->bias, head);
        struct attn_state st = attn_state_at((real *)a->state + i * count, s->m, s->d);
        int64_t in = seq * a->ld + head * s->d;
        const real *k = (const real *)a->k + in, *v = (const real *)a->v + in;
        real *o = (real *)a->o + seq * a->ld_o + head * s->d;
        memset(o, 0, (size_t)s->d * sizeof(real));
        if (pos[seq] < 0) continue;
        if (s->window)
            hybrid_step(&h, &f, &st, st.top + s->m, s->window, pos[seq], rows.x + row * s->d,
                        rows.a + row * s->m, k, v, o);
        else
            pure_step(&h, &f, &st, rows.a + row * s->m, rows.a + (row + s->b) * s->m, v, o);
    }
    srf__blas_serial_end(ctx);
    return SRF_OK;
}
