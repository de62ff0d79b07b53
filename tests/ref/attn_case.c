#include "tests/ref/attn_case.h"

#include <string.h>

enum { PAD = 5 };

struct attn_case attn_case_new(enum srf_dtype dtype, int threads, struct srf_attn_shape shape,
                               double scale)
{
    struct attn_case c = {.s = twins_new(dtype, threads), .shape = shape};
    int64_t rows = shape.b * shape.t, width = shape.h * shape.d, sets = shape.n_sets;
    c.ld = 3 * width + PAD;
    c.ld_o = width + PAD;
    c.qkv = twin_normal(&c.s, rows * c.ld, 1);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < 2 * width; j++)
            attn_case_set(&c, i * c.ld + j, scale * c.qkv.ref[i * c.ld + j]);
    c.w = twin_normal(&c.s, sets * shape.m * shape.d, 1);
    c.bias = twin_normal(&c.s, sets * shape.m, 0.3);
    c.d_o = twin_normal(&c.s, rows * c.ld_o, 1);
    c.o = twin_fill(&c.s, rows * c.ld_o, 3);
    c.dqkv = twin_fill(&c.s, rows * c.ld, 7);
    c.dw = twin_fill(&c.s, sets * shape.m * shape.d, 1);
    c.lse = twin_fill(&c.s, rows * shape.h, 0);
    return c;
}

void attn_case_free(struct attn_case *c)
{
    twins_free(&c->s);
}

int64_t attn_case_at(const struct attn_case *c, int part, int64_t b, int64_t t, int64_t h,
                     int64_t j)
{
    return (b * c->shape.t + t) * c->ld + (part * c->shape.h + h) * c->shape.d + j;
}

void attn_case_set(struct attn_case *c, int64_t i, double value)
{
    if (c->s.ctx->dtype == SRF_F64) {
        ((double *)c->qkv.dev)[i] = value;
        c->qkv.ref[i] = value;
    } else {
        ((float *)c->qkv.dev)[i] = (float)value;
        c->qkv.ref[i] = (float)value;
    }
}

/* Slice `part` of a packed tensor, from row `row` on. */
static void *dev(const struct attn_case *c, struct twin t, int part, int64_t row, int64_t ld)
{
    int64_t i = row * ld + part * c->shape.h * c->shape.d;
    return (char *)t.dev + (size_t)i * srf_dtype_bytes(c->s.ctx->dtype);
}

static double *ref(const struct attn_case *c, struct twin t, int part)
{
    return t.ref + part * c->shape.h * c->shape.d;
}

void attn_case_fwd(struct attn_case *c)
{
    twin_run(&c->s, srf_attn_fwd, .s = c->shape, .q = dev(c, c->qkv, 0, 0, 0),
             .k = dev(c, c->qkv, 1, 0, 0), .v = dev(c, c->qkv, 2, 0, 0), .ld = c->ld, .w = c->w.dev,
             .bias = c->bias.dev, .o = c->o.dev, .ld_o = c->ld_o);
}

void attn_case_ref_fwd(struct attn_case *c)
{
    ref_srf_attn_fwd(&(struct srf_srf_attn_fwd_args){.s = c->shape,
                                                     .q = ref(c, c->qkv, 0),
                                                     .k = ref(c, c->qkv, 1),
                                                     .v = ref(c, c->qkv, 2),
                                                     .ld = c->ld,
                                                     .w = c->w.ref,
                                                     .bias = c->bias.ref,
                                                     .o = c->o.ref,
                                                     .ld_o = c->ld_o});
}

void attn_case_bwd(struct attn_case *c)
{
    twin_run(&c->s, srf_attn_bwd, .s = c->shape, .q = dev(c, c->qkv, 0, 0, 0),
             .k = dev(c, c->qkv, 1, 0, 0), .v = dev(c, c->qkv, 2, 0, 0), .ld = c->ld, .w = c->w.dev,
             .bias = c->bias.dev, .o = c->o.dev, .d_o = c->d_o.dev, .ld_o = c->ld_o,
             .dq = dev(c, c->dqkv, 0, 0, 0), .dk = dev(c, c->dqkv, 1, 0, 0),
             .dv = dev(c, c->dqkv, 2, 0, 0), .dw = c->no_dw ? NULL : c->dw.dev);
}

void attn_case_ref_bwd(struct attn_case *c)
{
    ref_srf_attn_bwd(&(struct srf_srf_attn_bwd_args){.s = c->shape,
                                                     .q = ref(c, c->qkv, 0),
                                                     .k = ref(c, c->qkv, 1),
                                                     .v = ref(c, c->qkv, 2),
                                                     .ld = c->ld,
                                                     .w = c->w.ref,
                                                     .bias = c->bias.ref,
                                                     .d_o = c->d_o.ref,
                                                     .ld_o = c->ld_o,
                                                     .dq = ref(c, c->dqkv, 0),
                                                     .dk = ref(c, c->dqkv, 1),
                                                     .dv = ref(c, c->dqkv, 2),
                                                     .dw = c->dw.ref});
}

/* Rows [pos, pos + len) of a packed tensor (b, t, ld) as a tensor (b, len, ld), and back. */
static void copy_rows(const struct attn_case *c, void *packed, void *piece, int64_t ld, int64_t pos,
                      int64_t len, bool back)
{
    size_t size = srf_dtype_bytes(c->s.ctx->dtype), row = (size_t)ld * size;
    for (int64_t b = 0; b < c->shape.b; b++) {
        char *whole = (char *)packed + (size_t)(b * c->shape.t + pos) * row;
        char *part = (char *)piece + (size_t)(b * len) * row;
        memcpy(back ? whole : part, back ? part : whole, (size_t)len * row);
    }
}

void attn_case_recurrent(struct attn_case *c, const int64_t *lens, int n_lens)
{
    struct srf_attn_shape s = c->shape;
    size_t size = srf_dtype_bytes(c->s.ctx->dtype);
    int64_t count = srf_attn_state_count(s.m, s.d, s.window), pos = 0;
    void *state = srf__calloc((size_t)(s.b * s.h * count), size);
    void *qkv = srf__alloc((size_t)(s.b * s.t * c->ld), size);
    void *o = srf__alloc((size_t)(s.b * s.t * c->ld_o), size);
    int32_t *positions = srf__alloc((size_t)s.b, sizeof *positions);
    assert_true(state && qkv && o && positions);
    for (int i = 0; i < n_lens; i++) {
        int64_t width = s.h * s.d;
        s.t = lens[i];
        for (int64_t b = 0; b < s.b; b++) positions[b] = (int32_t)(pos + (i ? c->pos_shift : 0));
        copy_rows(c, c->qkv.dev, qkv, c->ld, pos, s.t, false);
        copy_rows(c, c->o.dev, o, c->ld_o, pos, s.t, false);
        const char *k = (char *)qkv + (size_t)width * size, *v = k + (size_t)width * size;
        if (s.t == 1)
            twin_run(&c->s, srf_attn_step, .s = s, .q = qkv, .k = k, .v = v, .ld = c->ld,
                     .w = c->w.dev, .bias = c->bias.dev, .o = o, .ld_o = c->ld_o, .state = state,
                     .pos = positions);
        else
            twin_run(&c->s, srf_attn_prefill, .s = s, .q = qkv, .k = k, .v = v, .ld = c->ld,
                     .w = c->w.dev, .bias = c->bias.dev, .o = o, .ld_o = c->ld_o, .state = state,
                     .pos = positions);
        copy_rows(c, c->o.dev, o, c->ld_o, pos, s.t, true);
        pos += s.t;
    }
    assert_int_equal(pos, c->shape.t);
    srf__free(state);
    srf__free(qkv);
    srf__free(o);
    srf__free(positions);
}

#define SOFTMAX_SHAPE                                                                              \
    .b = c->shape.b, .t = c->shape.t, .h = c->shape.h, .d = c->shape.d, .causal = c->shape.causal

void attn_case_softmax_fwd(struct attn_case *c)
{
    twin_run(&c->s, softmax_attn_fwd, SOFTMAX_SHAPE, .q = dev(c, c->qkv, 0, 0, 0),
             .k = dev(c, c->qkv, 1, 0, 0), .v = dev(c, c->qkv, 2, 0, 0), .ld = c->ld, .o = c->o.dev,
             .ld_o = c->ld_o, .lse = c->lse.dev);
}

void attn_case_softmax_bwd(struct attn_case *c)
{
    twin_run(&c->s, softmax_attn_bwd, SOFTMAX_SHAPE, .q = dev(c, c->qkv, 0, 0, 0),
             .k = dev(c, c->qkv, 1, 0, 0), .v = dev(c, c->qkv, 2, 0, 0), .ld = c->ld, .o = c->o.dev,
             .d_o = c->d_o.dev, .ld_o = c->ld_o, .lse = c->lse.dev, .dq = dev(c, c->dqkv, 0, 0, 0),
             .dk = dev(c, c->dqkv, 1, 0, 0), .dv = dev(c, c->dqkv, 2, 0, 0));
}

void attn_case_ref_softmax_fwd(struct attn_case *c)
{
    ref_softmax_attn_fwd(&(struct srf_softmax_attn_fwd_args){
        SOFTMAX_SHAPE, .q = ref(c, c->qkv, 0), .k = ref(c, c->qkv, 1), .v = ref(c, c->qkv, 2),
        .ld = c->ld, .o = c->o.ref, .ld_o = c->ld_o, .lse = c->lse.ref});
}

void attn_case_ref_softmax_bwd(struct attn_case *c)
{
    ref_softmax_attn_bwd(&(struct srf_softmax_attn_bwd_args){
        SOFTMAX_SHAPE, .q = ref(c, c->qkv, 0), .k = ref(c, c->qkv, 1), .v = ref(c, c->qkv, 2),
        .ld = c->ld, .d_o = c->d_o.ref, .ld_o = c->ld_o, .dq = ref(c, c->dqkv, 0),
        .dk = ref(c, c->dqkv, 1), .dv = ref(c, c->dqkv, 2)});
}
