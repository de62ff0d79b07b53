#include "tests/ref/attn_case.h"

#include <string.h>

/* Values between rows. Kernels for tensor cores want rows of bf16 at multiples of 16 bytes, and
 * leave others to the kernels that take every shape. */
static int64_t padding(enum srf_dtype dtype)
{
    return dtype == SRF_BF16 ? 8 : 5;
}

static struct attn_case new_case(struct twins s, struct srf_attn_shape shape, double scale,
                                 int64_t pad)
{
    struct attn_case c = {.s = s, .shape = shape};
    int64_t rows = shape.b * shape.t, width = shape.h * shape.d, sets = shape.n_sets;
    int32_t *pos = srf__calloc((size_t)shape.b + 1, sizeof *pos);
    assert_non_null(pos);
    c.ld = 3 * width + pad;
    c.ld_o = width + pad;
    c.qkv = twin_normal(&c.s, rows * c.ld, 1);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < 2 * width; j++)
            attn_case_set(&c, i * c.ld + j, scale * c.qkv.ref[i * c.ld + j]);
    c.w = twin_normal(&c.s, sets * shape.m * shape.d, 1);
    c.bias = twin_acc_normal(&c.s, sets * shape.m, 0.3);
    c.d_o = twin_normal(&c.s, rows * c.ld_o, 1);
    c.o = twin_fill(&c.s, rows * c.ld_o, 3);
    c.dqkv = twin_fill(&c.s, rows * c.ld, 7);
    c.dw = twin_acc_fill(&c.s, sets * shape.m * shape.d, 1);
    c.lse = twin_acc_fill(&c.s, rows * shape.h, 0);
    c.stat = twin_acc_fill(&c.s, rows * shape.h, 0);
    c.carry = twin_acc_fill(&c.s, (int64_t)srf_attn_carry_bytes(s.ctx, &shape) / 4, 0);
    c.state = twin_acc_fill(
        &c.s, shape.b * shape.h * srf_attn_state_count(shape.m, shape.d, shape.window), 0);
    c.piece = twin_fill(&c.s, rows * c.ld, 0);
    c.piece_o = twin_fill(&c.s, rows * c.ld_o, 0);
    c.pos = twin_raw_of(&c.s, pos, (size_t)shape.b * sizeof *pos);
    c.offsets = twin_raw_of(&c.s, pos, (size_t)(shape.b + 1) * sizeof *pos);
    c.slots = twin_raw_of(&c.s, pos, (size_t)shape.b * sizeof *pos);
    srf__free(pos);
    int64_t maps = shape.n_sets == shape.h ? sets * shape.m * (shape.d + 1) : 0;
    c.map_w = twin_normal(&c.s, maps, 0.25);
    c.d_map_w = twin_acc_fill(&c.s, maps, 1);
    return c;
}

struct attn_case attn_case_new(enum srf_dtype dtype, int threads, struct srf_attn_shape shape,
                               double scale)
{
    return new_case(twins_new(dtype, threads), shape, scale, padding(dtype));
}

struct attn_case attn_case_new_like(const struct attn_case *other, enum srf_dtype dtype,
                                    int threads)
{
    return new_case(twins_new(dtype, threads), other->shape, 1,
                    other->ld_o - other->shape.h * other->shape.d);
}

struct attn_case attn_case_new_on(const char *device, enum srf_dtype dtype,
                                  struct srf_attn_shape shape, double scale)
{
    return new_case(twins_new_on(device, dtype), shape, scale, padding(dtype));
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
    c->qkv.ref[i] = value;
    c->qkv_set = true;
}

void attn_case_close(struct attn_case *c, const char *name, struct twin t, int64_t ld, int part,
                     int n_parts, double tol)
{
    int64_t width = c->shape.h * c->shape.d, rows = c->shape.b * c->shape.t, worst = 0;
    double *all = twin_values(&c->s, t), norm = 0, most = 0;
    double *got = srf__alloc((size_t)(rows * width), sizeof *got);
    double *want = srf__alloc((size_t)(rows * width), sizeof *want);
    assert_true(got && want);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t j = 0; j < width; j++) {
            got[r * width + j] = all[r * ld + part * width + j];
            want[r * width + j] = t.ref[r * ld + part * width + j];
            norm += want[r * width + j] * want[r * width + j] / (double)rows;
        }
        for (int64_t j = n_parts * width; j < ld; j++)
            if (all[r * ld + j] != t.ref[r * ld + j])
                fail_msg("%s: padding of row %lld is %g, was %g", name, (long long)r,
                         all[r * ld + j], t.ref[r * ld + j]);
    }
    twin_check(&c->s, name, got, want, rows * width, tol);
    for (int64_t r = 0; r < rows; r++) {
        double own = 0, diff = 0;
        for (int64_t j = r * width; j < (r + 1) * width; j++) {
            own += want[j] * want[j];
            diff += (got[j] - want[j]) * (got[j] - want[j]);
        }
        double err = sqrt(diff / fmax(own, norm));
        if (isfinite(own) && !(err <= most)) most = err, worst = r;
    }
    if (rows * width > 0 && norm > 0 && !(most <= 4 * tol)) {
        print_error("%s: row %lld (token %lld) is off by %.2e of %.2e\n", name, (long long)worst,
                    (long long)(worst % c->shape.t), most, 4 * tol);
        c->s.failures++;
    }
    srf__free(all);
    srf__free(got);
    srf__free(want);
}

static void send(struct attn_case *c)
{
    if (c->qkv_set) twin_send(&c->s, c->qkv);
    c->qkv_set = false;
}

/* Slice `part` of a packed tensor. */
static void *dev(const struct attn_case *c, struct twin t, int part)
{
    int64_t i = part * c->shape.h * c->shape.d;
    return (char *)t.dev + (size_t)i * srf_dtype_bytes(t.type);
}

static double *ref(const struct attn_case *c, struct twin t, int part)
{
    return t.ref + part * c->shape.h * c->shape.d;
}

/* What all ops take; side: dev or ref. */
#define QKV(side)                                                                                  \
    .q = side(c, c->qkv, 0), .k = side(c, c->qkv, 1), .v = side(c, c->qkv, 2), .ld = c->ld
#define D_QKV(side) .dq = side(c, c->dqkv, 0), .dk = side(c, c->dqkv, 1), .dv = side(c, c->dqkv, 2)

void attn_case_forget(const struct attn_case *c, struct twin t, int64_t ld, int n_parts, int64_t b,
                      int64_t from, int64_t len)
{
    const struct srf_backend *be = c->s.ctx->be;
    size_t size = srf_dtype_bytes(t.type), row = (size_t)ld * size, bytes = (size_t)len * row;
    size_t own = (size_t)(n_parts * c->shape.h * c->shape.d) * size;
    char *dev = (char *)t.dev + (size_t)(b * c->shape.t + from) * row;
    char *rows = srf__alloc(bytes, 1);
    assert_non_null(rows);
    test_ok(be->download(c->s.ctx, rows, dev, bytes));
    for (int64_t i = 0; i < len; i++) memset(rows + (size_t)i * row, 0xff, own);
    test_ok(be->upload(c->s.ctx, dev, rows, bytes));
    srf__free(rows);
}

/* Before a forward, or a backward. */
static void forget_outputs(const struct attn_case *c, bool backward)
{
    for (int64_t b = 0; b < c->shape.b; b++)
        if (backward)
            attn_case_forget(c, c->dqkv, c->ld, 3, b, 0, c->shape.t);
        else
            attn_case_forget(c, c->o, c->ld_o, 1, b, 0, c->shape.t);
}

void attn_case_fwd(struct attn_case *c)
{
    send(c);
    forget_outputs(c, false);
    twin_run(&c->s, srf_attn_fwd, .s = c->shape, QKV(dev), .w = c->w.dev, .bias = c->bias.dev,
             .o = c->o.dev, .ld_o = c->ld_o, .stat = c->stat.dev, .carry = c->carry.dev);
}

void attn_case_ref_fwd(struct attn_case *c)
{
    send(c);
    ref_srf_attn_fwd(&(struct srf_srf_attn_fwd_args){.s = c->shape,
                                                     QKV(ref),
                                                     .w = c->w.ref,
                                                     .bias = c->bias.ref,
                                                     .o = c->o.ref,
                                                     .ld_o = c->ld_o});
}

void attn_case_bwd(struct attn_case *c)
{
    send(c);
    forget_outputs(c, true);
    twin_run(&c->s, srf_attn_bwd, .s = c->shape, QKV(dev), .w = c->w.dev, .bias = c->bias.dev,
             .o = c->o.dev, .d_o = c->d_o.dev, .ld_o = c->ld_o, .stat = c->stat.dev, D_QKV(dev),
             .dw = c->no_dw ? NULL : c->dw.dev, .carry = c->no_carry ? NULL : c->carry.dev);
}

void attn_case_ref_bwd(struct attn_case *c)
{
    send(c);
    ref_srf_attn_bwd(&(struct srf_srf_attn_bwd_args){.s = c->shape,
                                                     QKV(ref),
                                                     .w = c->w.ref,
                                                     .bias = c->bias.ref,
                                                     .d_o = c->d_o.ref,
                                                     .ld_o = c->ld_o,
                                                     D_QKV(ref),
                                                     .dw = c->dw.ref});
}

/* Rows [pos, pos + len) of a packed tensor (b, t, ld) as a tensor (b, len, ld), and back. */
static void copy_rows(const struct attn_case *c, struct twin packed, struct twin piece, int64_t ld,
                      int64_t pos, int64_t len, bool back)
{
    size_t row = (size_t)ld * srf_dtype_bytes(packed.type);
    for (int64_t b = 0; b < c->shape.b; b++) {
        char *whole = (char *)packed.dev + (size_t)(b * c->shape.t + pos) * row;
        char *part = (char *)piece.dev + (size_t)(b * len) * row;
        test_ok(c->s.ctx->be->copy(c->s.ctx, back ? whole : part, back ? part : whole,
                                   (size_t)len * row));
    }
}

int64_t attn_case_go_on(struct attn_case *c, int64_t from, const int64_t *lens, int n_lens)
{
    struct srf_attn_shape s = c->shape;
    const char *q = c->piece.dev, *k = dev(c, c->piece, 1), *v = dev(c, c->piece, 2);
    int64_t len = 0;
    send(c);
    for (int i = 0; i < n_lens; i++) len += lens[i];
    for (int64_t b = 0; b < s.b; b++) attn_case_forget(c, c->o, c->ld_o, 1, b, from, len);
    for (int i = 0; i < n_lens; i++) {
        int32_t *positions = c->pos.ref;
        s.t = lens[i];
        for (int64_t b = 0; b < s.b; b++) positions[b] = (int32_t)(from + (i ? c->pos_shift : 0));
        test_ok(c->s.ctx->be->upload(c->s.ctx, c->pos.dev, positions, c->pos.bytes));
        copy_rows(c, c->qkv, c->piece, c->ld, from, s.t, false);
        copy_rows(c, c->o, c->piece_o, c->ld_o, from, s.t, false);
        if (s.t == 1)
            twin_run(&c->s, srf_attn_step, .s = s, .q = q, .k = k, .v = v, .ld = c->ld,
                     .w = c->w.dev, .bias = c->bias.dev, .o = c->piece_o.dev, .ld_o = c->ld_o,
                     .state = c->state.dev, .pos = c->pos.dev, .state_bf16 = c->state_bf16);
        else
            twin_run(&c->s, srf_attn_prefill, .s = s, .q = q, .k = k, .v = v, .ld = c->ld,
                     .w = c->w.dev, .bias = c->bias.dev, .o = c->piece_o.dev, .ld_o = c->ld_o,
                     .state = c->state.dev, .pos = c->pos.dev, .state_bf16 = c->state_bf16);
        copy_rows(c, c->o, c->piece_o, c->ld_o, from, s.t, true);
        from += s.t;
    }
    return from;
}

void attn_case_recurrent(struct attn_case *c, const int64_t *lens, int n_lens)
{
    size_t bytes = (size_t)c->state.n * srf_dtype_bytes(c->state.type);
    test_ok(c->s.ctx->be->zero(c->s.ctx, c->state.dev, bytes));
    assert_int_equal(attn_case_go_on(c, 0, lens, n_lens), c->shape.t);
}

#define SOFTMAX_SHAPE                                                                              \
    .b = c->shape.b, .t = c->shape.t, .h = c->shape.h, .d = c->shape.d, .causal = c->shape.causal, \
    .window = c->shape.window, .sinks = c->sinks

static void softmax_fwd(struct attn_case *c)
{
    send(c);
    forget_outputs(c, false);
    twin_run(&c->s, softmax_attn_fwd, SOFTMAX_SHAPE, QKV(dev), .o = c->o.dev, .ld_o = c->ld_o,
             .lse = c->lse.dev);
}

static void softmax_bwd(struct attn_case *c)
{
    send(c);
    forget_outputs(c, true);
    twin_run(&c->s, softmax_attn_bwd, SOFTMAX_SHAPE, QKV(dev), .o = c->o.dev, .d_o = c->d_o.dev,
             .ld_o = c->ld_o, .lse = c->lse.dev, D_QKV(dev));
}

static void reference_softmax_fwd(struct attn_case *c)
{
    send(c);
    ref_softmax_attn_fwd(&(struct srf_softmax_attn_fwd_args){SOFTMAX_SHAPE, QKV(ref), .o = c->o.ref,
                                                             .ld_o = c->ld_o, .lse = c->lse.ref});
}

static void reference_softmax_bwd(struct attn_case *c)
{
    send(c);
    ref_softmax_attn_bwd(&(struct srf_softmax_attn_bwd_args){
        SOFTMAX_SHAPE, QKV(ref), .d_o = c->d_o.ref, .ld_o = c->ld_o, D_QKV(ref)});
}

static void map_fwd(struct attn_case *c)
{
    send(c);
    forget_outputs(c, false);
    twin_run(&c->s, map_attn_fwd, .s = c->shape, .map = c->map, QKV(dev), .w = c->map_w.dev,
             .o = c->o.dev, .ld_o = c->ld_o, .stat = c->stat.dev);
}

static void map_bwd(struct attn_case *c)
{
    send(c);
    forget_outputs(c, true);
    twin_run(&c->s, map_attn_bwd, .s = c->shape, .map = c->map, QKV(dev), .w = c->map_w.dev,
             .o = c->o.dev, .d_o = c->d_o.dev, .ld_o = c->ld_o, .stat = c->stat.dev, D_QKV(dev),
             .dw = c->no_dw ? NULL : c->d_map_w.dev);
}

static void reference_map_fwd(struct attn_case *c)
{
    send(c);
    ref_map_attn_fwd(&(struct srf_map_attn_fwd_args){.s = c->shape,
                                                     .map = c->map,
                                                     QKV(ref),
                                                     .w = c->map_w.ref,
                                                     .o = c->o.ref,
                                                     .ld_o = c->ld_o,
                                                     .stat = c->stat.ref});
}

static void reference_map_bwd(struct attn_case *c)
{
    send(c);
    ref_map_attn_bwd(&(struct srf_map_attn_bwd_args){.s = c->shape,
                                                     .map = c->map,
                                                     QKV(ref),
                                                     .w = c->map_w.ref,
                                                     .d_o = c->d_o.ref,
                                                     .ld_o = c->ld_o,
                                                     D_QKV(ref),
                                                     .dw = c->d_map_w.ref});
}

const struct attn_op attn_softmax = {softmax_fwd, softmax_bwd, reference_softmax_fwd,
                                     reference_softmax_bwd};
const struct attn_op attn_map = {map_fwd, map_bwd, reference_map_fwd, reference_map_bwd};

void attn_case_check(struct attn_case *c, const struct attn_op *op, struct attn_tol tol)
{
    static const char *const parts[] = {"dq", "dk", "dv"};
    op->fwd(c);
    op->ref_fwd(c);
    attn_case_close(c, "o", c->o, c->ld_o, 0, 1, tol.o);
    twin_close(&c->s, "lse", c->lse, tol.stat, 0); /* zeros where the op has none */
    twin_close(&c->s, "stat", c->stat, tol.stat, 0);
    op->bwd(c);
    op->ref_bwd(c);
    for (int part = 0; part < 3 && tol.apart; part++)
        attn_case_close(c, parts[part], c->dqkv, c->ld, part, 3, tol.grad);
    twin_close(&c->s, "dq, dk, dv", c->dqkv, tol.grad, 0);
    twin_close(&c->s, "dw", c->d_map_w, tol.dw, 0);
}

void attn_case_check_causal(struct attn_case *c, const struct attn_op *op, double by)
{
    op->fwd(c);
    double *before = twin_values(&c->s, c->o);
    for (int64_t from = c->shape.t - 1; from > 0; from -= 37) {
        for (int64_t i = from * c->ld; i < c->qkv.n; i++) attn_case_set(c, i, by * c->qkv.ref[i]);
        op->fwd(c);
        double *after = twin_values(&c->s, c->o);
        assert_memory_equal(before, after, (size_t)(from * c->ld_o) * sizeof *after);
        assert_true(before[from * c->ld_o] != after[from * c->ld_o]);
        srf__free(after);
    }
    srf__free(before);
}

struct loss_of {
    struct attn_case *c;
    const struct attn_op *op;
};

static double loss(void *p)
{
    const struct loss_of *l = p;
    struct attn_case *c = l->c;
    l->op->ref_fwd(c);
    double sum = 0;
    for (int64_t i = 0; i < c->shape.b * c->shape.t; i++)
        sum += test_dot(c->o.ref + i * c->ld_o, c->d_o.ref + i * c->ld_o, c->shape.h * c->shape.d);
    return sum;
}

void attn_case_check_gradient(struct attn_case *c, const struct attn_op *op, double tol)
{
    struct loss_of l = {c, op};
    for (int64_t i = 0; i < c->dqkv.n; i++) c->dqkv.ref[i] = 0; /* padding has no gradient */
    for (int64_t i = 0; i < c->map_w.n; i++) {
        c->d_map_w.ref[i] = 0;
        c->map_w.ref[i] *= 4;
    }
    op->ref_bwd(c);
    test_gradient("dq, dk, dv", loss, &l, c->qkv.ref, c->dqkv.ref, c->qkv.n, tol);
    test_gradient("dw", loss, &l, c->map_w.ref, c->d_map_w.ref, c->map_w.n, tol);
}

void attn_case_check_map_range(struct attn_case *c)
{
    int64_t row = c->shape.d + 1; /* of a map: its last weight is the bias */
    double *w = srf__alloc((size_t)c->map_w.n, sizeof *w);
    assert_non_null(w);
    for (int64_t i = 0; i < c->map_w.n; i++)
        w[i] = c->map != SRF_MAP_T2R ? c->map_w.ref[i] : i % row == row - 1 ? -1 : 0;
    twin_set(&c->s, &c->map_w, w);
    srf__free(w);
    map_fwd(c);
    map_bwd(c);
    const struct twin all[] = {c->o, c->dqkv, c->d_map_w};
    for (int k = 0; k < 3; k++) {
        double *x = twin_values(&c->s, all[k]);
        for (int64_t i = 0; i < all[k].n; i++) assert_true(isfinite(x[i]));
        srf__free(x);
    }
}
