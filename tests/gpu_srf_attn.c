/* srf_attn_fwd, srf_attn_bwd on the GPU against the quadratic reference, and what they must keep:
 * causality, linearity in v, accumulation of dw, the padding between heads. */
#include "tests/ref/attn_case.h"
#include "tests/ref/gpu.h"
#include "kernels/attention.h"

struct srf_case {
    enum srf_dtype dtype;
    struct srf_attn_shape shape;
};

static const struct srf_attn_shape shapes[] = {
    {.b = 1, .t = 1, .h = 1, .d = 32, .m = 16, .n_sets = 1},
    {.b = 3, .t = 2, .h = 1, .d = 64, .m = 16, .n_sets = 1},
    {.b = 2, .t = 63, .h = 1, .d = 32, .m = 16, .n_sets = 1},
    {.b = 1, .t = 64, .h = 2, .d = 64, .m = 64, .n_sets = 2},
    {.b = 2, .t = 65, .h = 3, .d = 64, .m = 63, .n_sets = 3},
    {.b = 1, .t = 90, .h = 2, .d = 16, .m = 20, .n_sets = 1},
    {.b = 1, .t = 33, .h = 1, .d = 64, .m = 8, .n_sets = 1},
    {.b = 1, .t = 129, .h = 2, .d = 80, .m = 100, .n_sets = 1},
    {.b = 1, .t = 130, .h = 1, .d = 96, .m = 128, .n_sets = 1},
    {.b = 1, .t = 150, .h = 1, .d = 128, .m = 512, .n_sets = 1},
    {.b = 1, .t = 200, .h = 2, .d = 64, .m = 256, .n_sets = 1},
    {.b = 2, .t = 70, .h = 2, .d = 64, .m = 80, .n_sets = 2},
    {.b = 1, .t = 600, .h = 1, .d = 64, .m = 128, .n_sets = 1},
    {.b = 1, .t = 129, .h = 2, .d = 64, .m = 192, .n_sets = 2},
    {.b = 2, .t = 300, .h = 1, .d = 64, .m = 512, .n_sets = 1},
    {.b = 2, .t = 447, .h = 1, .d = 64, .m = 256, .n_sets = 1},
    {.b = 1, .t = 600, .h = 2, .d = 64, .m = 320, .n_sets = 2},
    {.b = 2, .t = 256, .h = 2, .d = 64, .m = 64, .n_sets = 1},
    {.b = 1, .t = 577, .h = 1, .d = 32, .m = 32, .n_sets = 1},
    {.b = 1, .t = 600, .h = 1, .d = 64, .m = 48, .n_sets = 1},
    {.b = 1, .t = 1100, .h = 2, .d = 64, .m = 64, .n_sets = 2},
    {.b = 1, .t = 2500, .h = 2, .d = 64, .m = 64, .n_sets = 1},
    /* Heads for a whole card, and for most of one: for the pure kernels alone. */
    {.b = 70, .t = 130, .h = 4, .d = 64, .m = 16, .n_sets = 4},
    {.b = 25, .t = 300, .h = 8, .d = 64, .m = 16, .n_sets = 1},
    /* Segments, of which the last is cut into units of the backward. */
    {.b = 23, .t = 560, .h = 6, .d = 64, .m = 32, .n_sets = 1},
    {.b = 0, .t = 64, .h = 2, .d = 64, .m = 64, .n_sets = 1},
    {.b = 2, .t = 0, .h = 2, .d = 64, .m = 64, .n_sets = 1},
};
#define N_SHAPES ((int)(sizeof shapes / sizeof *shapes))
/* -1: not causal */
static const int64_t windows[] = {0, 64, -1, 32, 128, 1, 7, 100};
#define N_WINDOWS ((int)(sizeof windows / sizeof *windows))

static double tol_of(enum srf_dtype dtype)
{
    return dtype == SRF_BF16 ? 1e-2 : 1e-5;
}

/* Forward and backward, all forms of it. */
static void check_reference(struct attn_case c, enum srf_dtype dtype, double grad_tol)
{
    attn_case_fwd(&c);
    attn_case_ref_fwd(&c);
    attn_case_close(&c, "o", c.o, c.ld_o, 0, 1, tol_of(dtype));
    attn_case_bwd(&c);
    attn_case_ref_bwd(&c);
    for (int part = 0; part < 3; part++)
        attn_case_close(&c,
                        part == 0   ? "dq"
                        : part == 1 ? "dk"
                                    : "dv",
                        c.dqkv, c.ld, part, 3, grad_tol);
    twin_close(&c.s, "dw", c.dw, grad_tol, 1);
    /* Other kernels may do it when features are not trained; what forward left may be missing. */
    c.no_dw = true;
    for (int i = 0; i < (c.carry.n > 0 ? 2 : 1); i++) {
        c.no_carry = i > 0;
        attn_case_bwd(&c);
        for (int part = 0; part < 3; part++) {
            static const char *const names[][3] = {
                {"dq without dw", "dk without dw", "dv without dw"},
                {"dq without carry", "dk without carry", "dv without carry"}};
            attn_case_close(&c, names[i][part], c.dqkv, c.ld, part, 3, grad_tol);
        }
    }
    /* Sums do not depend on what runs when. */
    double *once = twin_values(&c.s, c.dqkv);
    attn_case_bwd(&c);
    double *again = twin_values(&c.s, c.dqkv);
    twin_check(&c.s, "once more", again, once, c.dqkv.n, 0);
    srf__free(once), srf__free(again);
    attn_case_free(&c);
}

static void test_reference(void **state)
{
    const struct srf_case *k = *state;
    /* Of one or two tokens, a gradient may be a small difference of numbers that bf16 has
     * rounded. */
    double grad_tol = k->dtype == SRF_BF16 ? (k->shape.t < 16 ? 0x1p-5 : 0x1p-6) : 1e-5;
    check_reference(attn_case_new_on(gpu_device(), k->dtype, k->shape, 1), k->dtype, grad_tol);
}

/* The last keys of the second chunk are along features, which they outweigh all keys before them in
 * by more than 2^40, and then by so much that the forward takes the chunk in pieces: queries of the
 * chunk before them, and keys before it, have their gradients as if they had not come. */
static void test_rise(void **state)
{
    const struct srf_case *k = *state;
    const int64_t d = k->shape.d, first = 112, n = 16;
    static const double sizes[][2] = {{0.6, 1.5}, {1, 2}}; /* of these keys, of the others */
    for (int size = 0; size < 2; size++) {
        struct attn_case c = attn_case_new_on(gpu_device(), k->dtype, k->shape, 1);
        for (int64_t t = 0; t < k->shape.t; t++)
            for (int64_t j = 0; j < d; j++) {
                int64_t i = attn_case_at(&c, 1, 0, t, 0, j);
                double x = sizes[size][1] * c.qkv.ref[i];
                if (t >= first && t < first + n)
                    x = sizes[size][0] * pow((double)d, 0.25) * c.w.ref[(t - first) * d + j];
                attn_case_set(&c, i, x);
            }
        check_reference(c, k->dtype, 0x1p-5);
    }
}

/* Other tokens from `from` on, of ordinary or of huge size, leave every output before it as it was,
 * to rounding, and change the one at it. */
static void test_causal(void **state)
{
    const struct srf_case *k = *state;
    struct attn_case c = attn_case_new_on(gpu_device(), k->dtype, k->shape, 1);
    attn_case_fwd(&c);
    double *before = twin_values(&c.s, c.o), *x = twin_values(&c.s, c.qkv);
    int64_t width = k->shape.h * k->shape.d;
    for (int64_t from = k->shape.t - 1; from > 0; from -= 1 + from / 5)
        for (int huge = 0; huge < 2; huge++) {
            for (int64_t i = 0; i < c.qkv.n; i++) {
                double other = 0.1 - (huge ? 60 : 1.3) * x[i];
                attn_case_set(&c, i, i / c.ld >= from ? other : x[i]);
            }
            attn_case_fwd(&c);
            double *after = twin_values(&c.s, c.o), worst = 0, change = 0;
            for (int64_t t = 0; t <= from; t++) {
                double *was = before + t * c.ld_o, *is = after + t * c.ld_o, err;
                err = test_error(is, was, width);
                if (t < from && !(err <= worst)) worst = err;
                if (t == from) change = err;
            }
            if (!(worst <= tol_of(k->dtype)) || !(change > tol_of(k->dtype)))
                fail_msg("tokens from %lld on, %s: earlier ones change by %g, it by %g",
                         (long long)from, huge ? "huge" : "others", worst, change);
            srf__free(after);
        }
    srf__free(before);
    srf__free(x);
    attn_case_free(&c);
}

/* A NaN shows at its token; one of q or k does not show before it. */
static void test_nan(void **state)
{
    const struct srf_case *k = *state;
    for (int part = 0; part < 3; part++) {
        struct attn_case c = attn_case_new_on(gpu_device(), k->dtype, k->shape, 1);
        int64_t at = k->shape.t / 2;
        attn_case_fwd(&c);
        double *before = twin_values(&c.s, c.o);
        attn_case_set(&c, attn_case_at(&c, part, 0, at, 0, 1), NAN);
        attn_case_fwd(&c);
        double *after = twin_values(&c.s, c.o);
        if (part < 2)
            twin_check(&c.s, part ? "before a NaN key" : "before a NaN query", after, before,
                       at * c.ld_o, tol_of(k->dtype));
        if (!isnan(after[at * c.ld_o + 1]))
            fail_msg("NaN of part %d does not show at its token: %g", part, after[at * c.ld_o + 1]);
        srf__free(before);
        srf__free(after);
        attn_case_free(&c);
    }
}

/* A constant v comes back; o is linear in v, up to the largest v there may be. */
static void test_values(void **state)
{
    const struct srf_case *k = *state;
    struct attn_case c = attn_case_new_on(gpu_device(), k->dtype, k->shape, 1);
    int64_t width = k->shape.h * k->shape.d, rows = k->shape.b * k->shape.t;
    attn_case_fwd(&c);
    double *o = twin_values(&c.s, c.o), *x = twin_values(&c.s, c.qkv);
    for (int what = 0; what < 3; what++) {
        double scale = what == 0 ? 0 : what == 1 ? -3 : 0x1p97, more = what == 2 ? 0 : 2.25;
        for (int64_t t = 0; t < rows; t++)
            for (int64_t j = 0; j < width; j++) {
                double v = x[t * c.ld + 2 * width + j];
                attn_case_set(&c, t * c.ld + 2 * width + j, more + scale * v);
                c.o.ref[t * c.ld_o + j] = more + scale * o[t * c.ld_o + j];
            }
        attn_case_fwd(&c);
        attn_case_close(&c,
                        what == 0   ? "constant v"
                        : what == 1 ? "linear in v"
                                    : "huge v",
                        c.o, c.ld_o, 0, 1, tol_of(k->dtype));
    }
    srf__free(o);
    srf__free(x);
    attn_case_free(&c);
}

/* Gradients know the future only: d_o that is 0 up to a token leaves dq 0 up to it, and d_o that
 * is 0 from a token on leaves dk, dv 0 from it on. No d_o at all: zeros, and nothing for dw, which
 * takes a second run on top of the first and may be left out. */
static void test_gradients(void **state)
{
    const struct srf_case *k = *state;
    struct attn_case c = attn_case_new_on(gpu_device(), k->dtype, k->shape, 1);
    int64_t width = k->shape.h * k->shape.d, cut = k->shape.t / 2;
    attn_case_fwd(&c);
    attn_case_bwd(&c);
    double *first = twin_values(&c.s, c.dqkv), *dw = twin_values(&c.s, c.dw);
    attn_case_bwd(&c);
    for (int64_t i = 0; i < c.dw.n; i++) c.dw.ref[i] = 2 * dw[i] - 1;
    twin_close(&c.s, "dw twice", c.dw, 1e-5, 0);
    c.no_dw = true;
    attn_case_bwd(&c);
    double *again = twin_values(&c.s, c.dqkv);
    twin_check(&c.s, "without dw", again, first, c.dqkv.n, k->dtype == SRF_BF16 ? 0x1p-6 : 1e-5);
    c.no_dw = false;
    double *d_o = twin_values(&c.s, c.d_o), *x = srf__alloc((size_t)c.d_o.n, sizeof *x);
    assert_non_null(x);
    for (int which = 0; which < 3; which++) { /* early, late, none */
        for (int64_t i = 0; i < c.d_o.n; i++)
            x[i] = which < 2 && (i / c.ld_o % k->shape.t >= cut) == which ? d_o[i] : 0;
        twin_set(&c.s, &c.d_o, x);
        double *before = twin_values(&c.s, c.dw);
        attn_case_bwd(&c);
        double *g = twin_values(&c.s, c.dqkv), *after = twin_values(&c.s, c.dw);
        for (int64_t i = 0; i < c.dqkv.n; i++) {
            int64_t t = i / c.ld % k->shape.t, j = i % c.ld;
            bool zero = which == 2   ? j < 3 * width
                        : which == 1 ? t < cut && j < width
                                     : t >= cut && j < 3 * width;
            if (zero && g[i] != 0)
                fail_msg("d_o %s: gradient %g at token %lld, column %lld",
                         which == 0   ? "early"
                         : which == 1 ? "late"
                                      : "nowhere",
                         g[i], (long long)t, (long long)j);
        }
        if (which == 2) twin_check(&c.s, "dw of no d_o", after, before, c.dw.n, 0);
        srf__free(before), srf__free(g), srf__free(after);
    }
    srf__free(first), srf__free(dw), srf__free(again), srf__free(d_o), srf__free(x);
    attn_case_free(&c);
}

/* Many heads on the card are cut otherwise than few: a sequence is what it is alone, to rounding,
 * and gradients do not depend on whether the forward's states are handed on. */
static void test_alone(void **state)
{
    const struct srf_case *k = *state;
    struct srf_attn_shape one = k->shape;
    one.b = 1;
    struct attn_case all = attn_case_new_on(gpu_device(), k->dtype, k->shape, 1);
    attn_case_fwd(&all);
    double *o = twin_values(&all.s, all.o);
    for (int frozen = 0; frozen < 2; frozen++) {
        all.no_dw = frozen;
        all.no_carry = false;
        attn_case_bwd(&all);
        double *carried = twin_values(&all.s, all.dqkv);
        all.no_carry = true;
        attn_case_bwd(&all);
        double *again = twin_values(&all.s, all.dqkv);
        twin_check(&all.s, "gradients without carry", again, carried, all.dqkv.n, 0x1p-6);
        for (int64_t b = 0; b < k->shape.b; b += k->shape.b - 1) {
            struct attn_case c = attn_case_new_on(gpu_device(), k->dtype, one, 1);
            c.no_dw = frozen;
            twin_set(&c.s, &c.qkv, all.qkv.ref + b * one.t * all.ld);
            twin_set(&c.s, &c.w, all.w.ref);
            twin_set(&c.s, &c.bias, all.bias.ref);
            twin_set(&c.s, &c.d_o, all.d_o.ref + b * one.t * all.ld_o);
            attn_case_fwd(&c);
            attn_case_bwd(&c);
            double *alone = twin_values(&c.s, c.o), *grads = twin_values(&c.s, c.dqkv);
            twin_check(&c.s, b ? "the last one alone" : "the first one alone",
                       o + b * one.t * all.ld_o, alone, c.o.n, tol_of(k->dtype));
            twin_check(&c.s, b ? "gradients of the last one alone" : "gradients of the first alone",
                       carried + b * one.t * all.ld, grads, c.dqkv.n, 0x1p-6);
            srf__free(alone), srf__free(grads);
            attn_case_free(&c);
        }
        srf__free(carried), srf__free(again);
    }
    srf__free(o);
    attn_case_free(&all);
}

static void add(struct gpu_suite *suite, enum srf_dtype dtype, struct srf_attn_shape s,
                int64_t window, const char *what, void (*body)(void **state), double work)
{
    s.causal = window >= 0;
    s.window = window > 0 ? window : 0;
    struct srf_case k = {.dtype = dtype, .shape = s};
    gpu_add(suite, body, &k, sizeof k, work,
            "srf_attn %s b=%d t=%d h=%d d=%d m=%d sets=%d window=%d%s: %s", srf_dtype_name(dtype),
            (int)s.b, (int)s.t, (int)s.h, (int)s.d, (int)s.m, (int)s.n_sets, (int)s.window,
            s.causal ? "" : " not causal", what);
}

/* Every kernel once, over a few chunks, for slow checkers, which take seconds for a launch of the
 * kernels of fp32. */
static void add_light(struct gpu_suite *suite, enum srf_dtype dtype)
{
    static const struct {
        struct srf_attn_shape s;
        int64_t window;
        bool f32, bf16;
    } light[] = {
        {{.b = 1, .t = 66, .h = 1, .d = 32, .m = 16, .n_sets = 1}, 0, true, false},
        {{.b = 1, .t = 66, .h = 1, .d = 32, .m = 16, .n_sets = 1}, 16, true, false},
        {{.b = 1, .t = 66, .h = 1, .d = 32, .m = 32, .n_sets = 1}, -1, true, true},
        {{.b = 1, .t = 131, .h = 1, .d = 64, .m = 64, .n_sets = 1}, 0, false, true},
        {{.b = 1, .t = 520, .h = 1, .d = 64, .m = 64, .n_sets = 1}, 0, false, true},
        {{.b = 1, .t = 2500, .h = 1, .d = 64, .m = 16, .n_sets = 1}, 0, false, true},
        {{.b = 1, .t = 131, .h = 1, .d = 64, .m = 64, .n_sets = 1}, 32, false, true},
        {{.b = 1, .t = 131, .h = 1, .d = 64, .m = 64, .n_sets = 1}, 64, false, true},
        {{.b = 1, .t = 1300, .h = 1, .d = 64, .m = 16, .n_sets = 1}, 64, false, true},
        {{.b = 1, .t = 131, .h = 1, .d = 64, .m = 64, .n_sets = 1}, 128, false, true},
        {{.b = 1, .t = 400, .h = 1, .d = 64, .m = 64, .n_sets = 1}, 192, false, true},
        {{.b = 1, .t = 131, .h = 1, .d = 64, .m = 128, .n_sets = 1}, 0, false, true},
        {{.b = 1, .t = 131, .h = 1, .d = 64, .m = 272, .n_sets = 1}, 0, false, true},
        {{.b = 1, .t = 70, .h = 1, .d = 80, .m = 160, .n_sets = 1}, 0, false, true},
        {{.b = 1, .t = 70, .h = 1, .d = 16, .m = 20, .n_sets = 1}, 7, false, true},
    };
    for (size_t i = 0; i < sizeof light / sizeof *light; i++)
        if (dtype == SRF_BF16 ? light[i].bf16 : light[i].f32)
            add(suite, dtype, light[i].s, light[i].window, "light", test_reference, GPU_LIGHT);
    static const int64_t lengths[] = {150, 530};
    for (int i = 0; i < 2 && dtype == SRF_BF16; i++) {
        struct srf_attn_shape s = {.b = 1, .t = lengths[i], .h = 1, .d = 64, .m = 64, .n_sets = 1};
        add(suite, dtype, s, 0, "M rises far", test_rise, 1e7);
    }
}

/* Wide windows, with something beyond them. */
static void add_wide(struct gpu_suite *suite, enum srf_dtype dtype)
{
    static const struct srf_attn_shape wide[] = {
        {.b = 1, .t = 700, .h = 2, .d = 64, .m = 64, .n_sets = 2, .window = 192},
        {.b = 2, .t = 577, .h = 1, .d = 32, .m = 32, .n_sets = 1, .window = 192},
        {.b = 1, .t = 500, .h = 1, .d = 128, .m = 48, .n_sets = 1, .window = 192},
        {.b = 1, .t = 2100, .h = 1, .d = 64, .m = 64, .n_sets = 1, .window = 192},
        {.b = 1, .t = 900, .h = 1, .d = 64, .m = 128, .n_sets = 1, .window = 256},
        {.b = 1, .t = 400, .h = 1, .d = 64, .m = 64, .n_sets = 1, .window = 512},
        {.b = 1, .t = 460, .h = 2, .d = 64, .m = 64, .n_sets = 2, .window = 96},
        {.b = 1, .t = 2100, .h = 1, .d = 64, .m = 16, .n_sets = 1, .window = 96},
        {.b = 2, .t = 500, .h = 1, .d = 32, .m = 32, .n_sets = 1, .window = 160},
        {.b = 1, .t = 800, .h = 2, .d = 64, .m = 32, .n_sets = 2, .window = 224},
        {.b = 1, .t = 600, .h = 1, .d = 128, .m = 48, .n_sets = 1, .window = 224},
    };
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++) {
        double work = 1.5 * (double)(wide[i].b * wide[i].t * wide[i].t * wide[i].m);
        add(suite, dtype, wide[i], wide[i].window, "wide", test_reference, work);
    }
    struct srf_attn_shape one = wide[0];
    for (int64_t window = 96; window <= 192; window += 96) {
        one.t = 2 * window + 66;
        add(suite, dtype, one, window, "wide: later tokens", test_causal, 1e6);
        add(suite, dtype, one, window, "wide: NaN", test_nan, 1e6);
        add(suite, dtype, one, window, "wide: values", test_values, 1e6);
        add(suite, dtype, one, window, "wide: gradients' conventions", test_gradients, 1e6);
    }
}

/* Where room was made for so many sequences there is room for fewer, whose heads leave parts of a
 * card idle and are cut into segments. */
static void test_room(void **state)
{
    const struct srf_case *k = *state;
    const struct srf_attn_shape *s = &k->shape;
    struct srf_attn_options o;
    struct srf_attn *a;
    struct srf_ctx *ctx;
    void *qkv, *out, *states;
    int64_t width = s->h * s->d, rows = s->b * s->t;
    size_t size = srf_dtype_bytes(k->dtype);
    srf_attn_defaults(&o, s->h, s->d);
    o.device = gpu_device(), o.dtype = k->dtype, o.m = s->m, o.window = s->window;
    test_ok(srf_ctx_create(gpu_device(), k->dtype, 0, &ctx));
    test_ok(srf_attn_create(&o, &a));
    size_t bytes = (size_t)(rows * width) * size, all = (size_t)s->b * srf_attn_state_bytes(a);
    test_ok(ctx->be->alloc(ctx, 3 * bytes, &qkv));
    test_ok(ctx->be->alloc(ctx, bytes, &out));
    test_ok(ctx->be->alloc(ctx, all, &states));
    test_ok(ctx->be->zero(ctx, qkv, 3 * bytes));
    test_ok(srf_attn_reserve(a, s->b, s->t, false));
    size_t room = srf_attn_workspace_bytes(a);
    for (int64_t b = s->b; b > 0; b--) {
        struct srf_attn_tensors x = {.b = b, .t = s->t, .ld = 3 * width, .o = out};
        struct srf_attn_prefill_args how = {.state = states};
        x.q = qkv, x.k = (char *)qkv + (size_t)width * size;
        x.v = (char *)qkv + (size_t)(2 * width) * size;
        test_ok(ctx->be->zero(ctx, states, all));
        test_ok(ctx->be->sync(ctx));
        test_ok(srf_attn_forward(a, NULL, &x, NULL));
        test_ok(srf_attn_prefill(a, NULL, &x, &how));
        assert_int_equal(srf_attn_workspace_bytes(a), room);
    }
    srf_attn_free(a); /* waits */
    ctx->be->free(ctx, qkv);
    ctx->be->free(ctx, out);
    ctx->be->free(ctx, states);
    srf_ctx_free(ctx);
}

int main(int argc, char **argv)
{
    static const struct srf_attn_shape room[] = {
        {.b = 20, .t = 1024, .h = 12, .d = 64, .m = 64},
        {.b = 45, .t = 768, .h = 6, .d = 64, .m = 16},
        {.b = 3, .t = 4096, .h = 8, .d = 80, .m = 64},
    };
    static const struct srf_attn_shape small[] = {
        {.b = 2, .t = 131, .h = 2, .d = 64, .m = 64, .n_sets = 2},
        {.b = 1, .t = 200, .h = 1, .d = 80, .m = 100, .n_sets = 1},
        {.b = 1, .t = 170, .h = 3, .d = 32, .m = 256, .n_sets = 1},
        {.b = 1, .t = 150, .h = 2, .d = 64, .m = 256, .n_sets = 2},
    };
    /* In segments; in segments whose queries are summed in pieces. */
    static const struct srf_attn_shape many[] = {
        {.b = 33, .t = 1100, .h = 6, .d = 64, .m = 16, .n_sets = 6},
        {.b = 16, .t = 1450, .h = 6, .d = 64, .m = 16, .n_sets = 6},
    };
    static struct gpu_suite suite;
    for (int type = 0; type < gpu_n_dtypes(); type++) {
        enum srf_dtype dtype = gpu_dtype(type);
        add_light(&suite, dtype);
        add_wide(&suite, dtype);
        for (size_t i = 0; i < sizeof room / sizeof *room && dtype == SRF_BF16; i++)
            for (int window = 0; window <= 64; window += 64)
                add(&suite, dtype, room[i], window, "room", test_room, 1e8);
        for (int i = 0; i < N_SHAPES; i++)
            for (int w = 0; w < N_WINDOWS; w++) {
                struct srf_attn_shape s = shapes[i];
                double work = 3.0 * (double)(s.b * s.h * s.t * s.t) * (double)s.m;
                /* Pure and hybrid for every shape, the other windows in turn. */
                if (w > 1 && (i + w) % 3 != 0) continue;
                if ((w > 1 && work > 1e7) || (w > 0 && s.b * s.h > 100)) continue;
                add(&suite, dtype, s, windows[w], "o, gradients", test_reference, work / 2);
            }
        for (int window = 0; window <= 64 && dtype == SRF_BF16; window += 64)
            for (int i = 0; i < 2; i++)
                add(&suite, dtype, many[i], window, "alone", test_alone, 1e7);
        for (size_t i = 0; i < sizeof small / sizeof *small; i++)
            for (int w = 0; w < N_WINDOWS; w++) {
                struct srf_attn_shape s = small[i], one = small[i];
                one.b = 1;
                double work = (double)(s.t * s.m * s.d);
                if (w > 1 && ((int)i + w) % 2 != 0) continue;
                add(&suite, dtype, s, windows[w], "values", test_values, work);
                if (windows[w] < 0) continue;
                add(&suite, dtype, one, windows[w], "later tokens", test_causal, work);
                add(&suite, dtype, one, windows[w], "NaN", test_nan, work);
                add(&suite, dtype, s, windows[w], "gradients' conventions", test_gradients, work);
            }
    }
    return gpu_run(&suite, argc > 1 ? argv[1] : NULL);
}
