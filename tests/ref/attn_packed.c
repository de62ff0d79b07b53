#include "tests/ref/attn_packed.h"

#include <stdio.h>

static size_t row_bytes(const struct twin *t, int64_t ld)
{
    return (size_t)ld * srf_dtype_bytes(t->type);
}

static void copy_rows(struct attn_case *c, struct twin to, int64_t to_row, struct twin from,
                      int64_t from_row, int64_t ld, int64_t n)
{
    size_t row = row_bytes(&to, ld);
    test_ok(c->s.ctx->be->copy(c->s.ctx, (char *)to.dev + (size_t)to_row * row,
                               (char *)from.dev + (size_t)from_row * row, (size_t)n * row));
}

void attn_packed_go_on(struct attn_case *c, const int64_t *from, const int64_t *lens,
                       const int32_t *slots)
{
    struct srf_attn_shape s = c->shape;
    int64_t width = s.h * s.d, rows = 0, longest = 0;
    int32_t *positions = c->pos.ref, *offsets = c->offsets.ref;
    size_t size = srf_dtype_bytes(c->piece.type);
    if (c->qkv_set) twin_send(&c->s, c->qkv);
    c->qkv_set = false;
    for (int64_t b = 0; b < s.b; b++) {
        attn_case_forget(c, c->o, c->ld_o, 1, b, from[b], lens[b]);
        copy_rows(c, c->piece, rows, c->qkv, b * s.t + from[b], c->ld, lens[b]);
        copy_rows(c, c->piece_o, rows, c->o, b * s.t + from[b], c->ld_o, lens[b]);
        positions[b] = (int32_t)from[b];
        rows += lens[b];
        offsets[b + 1] = (int32_t)rows;
        longest = lens[b] > longest ? lens[b] : longest;
    }
    test_ok(c->s.ctx->be->upload(c->s.ctx, c->pos.dev, positions, c->pos.bytes));
    test_ok(c->s.ctx->be->upload(c->s.ctx, c->offsets.dev, offsets, c->offsets.bytes));
    test_ok(c->s.ctx->be->upload(c->s.ctx, c->slots.dev, slots, c->slots.bytes));
    s.t = longest ? longest : 1; /* at least; there may be no rows at all */
    const char *q = c->piece.dev;
    twin_run(&c->s, srf_attn_prefill, .s = s, .q = q, .k = q + (size_t)width * size,
             .v = q + (size_t)(2 * width) * size, .ld = c->ld, .w = c->w.dev, .bias = c->bias.dev,
             .o = c->piece_o.dev, .ld_o = c->ld_o, .state = c->state.dev, .pos = c->pos.dev,
             .offsets = c->offsets.dev, .rows = rows, .slots = c->slots.dev,
             .state_bf16 = c->state_bf16);
    rows = 0;
    for (int64_t b = 0; b < s.b; rows += lens[b++])
        copy_rows(c, c->o, b * c->shape.t + from[b], c->piece_o, rows, c->ld_o, lens[b]);
}

void attn_packed_run(struct attn_case *c, struct srf_rng *rng, int64_t most, const int32_t *slots)
{
    int64_t b = c->shape.b, left = b * c->shape.t;
    int64_t *from = srf__calloc((size_t)b, sizeof *from), *lens = srf__calloc((size_t)b, 8);
    assert_true(from && lens);
    test_ok(c->s.ctx->be->zero(c->s.ctx, c->state.dev, row_bytes(&c->state, c->state.n)));
    attn_packed_go_on(c, from, lens, slots);
    while (left > 0) {
        for (int64_t i = 0; i < b; i++) {
            int64_t n = (int64_t)srf_rng_below(rng, (uint64_t)most + 1);
            lens[i] = n < c->shape.t - from[i] ? n : c->shape.t - from[i];
        }
        attn_packed_go_on(c, from, lens, slots);
        for (int64_t i = 0; i < b; i++) from[i] += lens[i], left -= lens[i];
    }
    srf__free(from);
    srf__free(lens);
}

static double value(const struct attn_case *c, int part, int64_t b, int64_t t, int64_t h, int64_t j)
{
    return c->qkv.ref[attn_case_at(c, part, b, t, h, j)];
}

/* The definition: mean (m, d) = sum_s phi_i(y_s) v_s / sum_s phi_i(y_s), log_z (m) the log2 of the
 * latter, over the first n tokens. */
static void far_state(const struct attn_case *c, int64_t b, int64_t h, int64_t n, double *mean,
                      double *log_z)
{
    const struct srf_attn_shape *s = &c->shape;
    double scale = pow((double)s->d, -0.25), *a = srf__calloc((size_t)n + 1, sizeof *a);
    double *y = srf__alloc((size_t)(n * s->d), sizeof *y);
    double *v = srf__alloc((size_t)(n * s->d), sizeof *v);
    assert_true(a && y && v);
    for (int64_t t = 0; t < n; t++)
        for (int64_t j = 0; j < s->d; j++) {
            y[t * s->d + j] = scale * value(c, 1, b, t, h, j);
            v[t * s->d + j] = value(c, 2, b, t, h, j);
        }
    for (int64_t i = 0; i < s->m; i++) {
        int64_t row = (s->n_sets == 1 ? 0 : h) * s->m + i;
        double most = -INFINITY, z = 0;
        for (int64_t t = 0; t < n; t++) {
            a[t] = c->bias.ref[row];
            for (int64_t j = 0; j < s->d; j++) {
                double y_tj = y[t * s->d + j];
                a[t] += c->w.ref[row * s->d + j] * y_tj - y_tj * y_tj / 2;
            }
            most = fmax(most, a[t]);
        }
        for (int64_t j = 0; j < s->d; j++) mean[i * s->d + j] = 0;
        for (int64_t t = 0; t < n; t++) {
            double phi = exp(a[t] - most);
            z += phi;
            for (int64_t j = 0; j < s->d; j++) mean[i * s->d + j] += phi * v[t * s->d + j];
        }
        for (int64_t j = 0; j < s->d && n > 0; j++) mean[i * s->d + j] /= z;
        log_z[i] = n > 0 ? (most + log(z)) / log(2) : 0;
    }
    srf__free(a);
    srf__free(y);
    srf__free(v);
}

/* A stored state in the same terms. */
static void stored_state(const struct srf_attn_shape *s, const double *state, int64_t n,
                         double *mean, double *log_z)
{
    const double *z = state + s->m * s->d, *top = z + s->m;
    for (int64_t i = 0; i < s->m; i++) {
        for (int64_t j = 0; j < s->d; j++)
            mean[i * s->d + j] = n > 0 ? state[i * s->d + j] / z[i] : z[i];
        log_z[i] = n > 0 ? log2(z[i]) + top[i] : z[i];
    }
}

/* The ring's values: what it should hold into `want`, what it holds into `got`; rows without a
 * token are left out. */
static int64_t ring_values(const struct attn_case *c, const double *ring, int64_t b, int64_t h,
                           double *got, double *want)
{
    int64_t w = 2 * c->shape.window, d = c->shape.d, t = c->shape.t, n = 0;
    for (int64_t p = t > w ? t - w : 0; p < t; p++)
        for (int part = 0; part < 2; part++)
            for (int64_t j = 0; j < d; j++, n++) {
                got[n] = ring[(part * w + p % w) * d + j];
                want[n] = value(c, 1 + part, b, p, h, j);
            }
    return n;
}

void attn_packed_check_state(struct attn_case *c, const char *name, const int32_t *slots,
                             double tol)
{
    const struct srf_attn_shape *s = &c->shape;
    int64_t count = srf_attn_state_count(s->m, s->d, s->window), heads = s->b * s->h;
    int64_t far = s->window ? (s->t / s->window - 1) * s->window : s->t, n_ring = 0;
    double *all = twin_values(&c->s, c->state);
    double *got = srf__alloc((size_t)(heads * count), 8),
           *want = srf__alloc((size_t)(heads * count), 8);
    assert_true(got && want);
    if (far < 0) far = 0;
    for (int part = 0; part < 3; part++) { /* means, logs, ring */
        int64_t n = 0;
        for (int64_t b = 0; b < s->b; b++)
            for (int64_t h = 0; h < s->h; h++) {
                double *scratch = srf__alloc((size_t)(2 * s->m * (s->d + 1)), sizeof *scratch);
                double *wanted = scratch + s->m * (s->d + 1), *logs = scratch + s->m * s->d;
                const double *state = all + ((slots ? slots[b] : b) * s->h + h) * count;
                assert_non_null(scratch);
                if (part == 2) {
                    n_ring = ring_values(c, state + s->m * (s->d + 2), b, h, got + n, want + n);
                    n += s->window ? n_ring : 0;
                } else {
                    far_state(c, b, h, far, wanted, wanted + s->m * s->d);
                    stored_state(s, state, far, scratch, logs);
                    int64_t from = part ? s->m * s->d : 0, size = part ? s->m : s->m * s->d;
                    for (int64_t i = 0; i < size; i++, n++)
                        got[n] = scratch[from + i], want[n] = wanted[from + i];
                }
                srf__free(scratch);
            }
        static const char *const parts[] = {"S / z", "log z", "ring"};
        char what[120];
        snprintf(what, sizeof what, "%s: state, %s", name, parts[part]);
        twin_check(&c->s, what, got, want, n, part == 2 ? 0 : tol);
    }
    srf__free(all);
    srf__free(got);
    srf__free(want);
}
