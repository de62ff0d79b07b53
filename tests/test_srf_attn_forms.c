/* The forms of SRF attention agree (chunked, step by step, prefill split anywhere then steps), and
 * what every form must keep: causality, linearity in v, determinism, accumulation of dw. */
#include "tests/ref/attn_packed.h"

#include <string.h>

static const struct srf_attn_shape shapes[] = {
    {.b = 2, .t = 1, .h = 1, .d = 2, .m = 1, .n_sets = 1, .causal = true},
    {.b = 1, .t = 63, .h = 3, .d = 16, .m = 20, .n_sets = 1, .causal = true},
    {.b = 2, .t = 131, .h = 2, .d = 64, .m = 64, .n_sets = 2, .causal = true},
    {.b = 1, .t = 200, .h = 1, .d = 80, .m = 100, .n_sets = 1, .causal = true},
    {.b = 1, .t = 170, .h = 1, .d = 16, .m = 256, .n_sets = 1, .causal = true},
};
#define N_SHAPES ((int)(sizeof shapes / sizeof *shapes))
static const int64_t windows[] = {0, 1, 7, 16, 64, 250};
#define N_WINDOWS ((int)(sizeof windows / sizeof *windows))

/* Every shape with every window, the dtypes in turn. */
static void each(void (*body)(enum srf_dtype dtype, struct srf_attn_shape shape))
{
    for (int i = 0; i < N_SHAPES * N_WINDOWS; i++) {
        struct srf_attn_shape s = shapes[i / N_WINDOWS];
        s.window = windows[i % N_WINDOWS];
        body((i + i / N_WINDOWS) % 2 ? SRF_F64 : SRF_F32, s);
    }
}

static double tol_of(enum srf_dtype dtype)
{
    return dtype == SRF_F64 ? 1e-13 : 1e-5;
}

/* --- forms ------------------------------------------------------------------------------------ */

static void check_forms(enum srf_dtype dtype, struct srf_attn_shape shape)
{
    struct attn_case c = attn_case_new(dtype, 2, shape, 1);
    int64_t lens[400], n = shape.t;
    attn_case_ref_fwd(&c);
    attn_case_fwd(&c);
    twin_close(&c.s, "chunked", c.o, tol_of(dtype), 0);
    for (int64_t i = 0; i < n; i++) lens[i] = 1;
    attn_case_recurrent(&c, lens, (int)n);
    twin_close(&c.s, "step by step", c.o, tol_of(dtype), 0);
    struct srf_rng rng = srf_rng_at(test_seed(), SRF_RNG_TEST, 0, 77, (uint32_t)shape.window);
    for (int round = 0; round < 4; round++) {
        int count = 0;
        int64_t left = n;
        while (left > 0) {
            int64_t most = round < 2 ? left : round < 3 ? 40 : 3;
            int64_t len = 1 + (int64_t)srf_rng_below(&rng, (uint64_t)most);
            lens[count] = len < left ? len : left;
            left -= lens[count++];
        }
        attn_case_recurrent(&c, lens, count);
        twin_close(&c.s, "split prefill and steps", c.o, tol_of(dtype), 0);
    }
    /* One prefill, then steps only, and an empty prefill between. */
    lens[0] = n / 2;
    lens[1] = 0;
    for (int64_t i = 0; i < n - n / 2; i++) lens[2 + i] = 1;
    attn_case_recurrent(&c, lens, (int)(2 + n - n / 2));
    twin_close(&c.s, "prefill then steps", c.o, tol_of(dtype), 0);
    attn_case_free(&c);
}

static void test_forms(void **state)
{
    (void)state;
    each(check_forms);
}

/* Every form leaves the state that its definition says: the parallel one (a prefill of all),
 * chunkwise-recurrent, recurrent, and sequences packed with different lengths, whose states lie in
 * another order. */
static void check_states(enum srf_dtype dtype, struct srf_attn_shape shape)
{
    shape.b += 2;
    struct attn_case c = attn_case_new(dtype, 2, shape, 1);
    int64_t lens[400], n = shape.t;
    int32_t order[4];
    for (int64_t i = 0; i < shape.b; i++) order[i] = (int32_t)(shape.b - 1 - (i + 1) % shape.b);
    attn_case_ref_fwd(&c);
    attn_case_recurrent(&c, &n, 1);
    twin_close(&c.s, "one prefill", c.o, tol_of(dtype), 0);
    attn_packed_check_state(&c, "one prefill", NULL, tol_of(dtype));
    for (int64_t i = 0; i < n; i++) lens[i] = 1;
    attn_case_recurrent(&c, lens, (int)n);
    attn_packed_check_state(&c, "step by step", NULL, tol_of(dtype));
    struct srf_rng rng = srf_rng_at(test_seed(), SRF_RNG_TEST, 0, 78, (uint32_t)shape.window);
    for (int64_t most = 1; most <= 2 * n; most *= 5) {
        attn_packed_run(&c, &rng, most, order);
        twin_close(&c.s, "packed", c.o, tol_of(dtype), 0);
        attn_packed_check_state(&c, "packed", order, tol_of(dtype));
    }
    attn_case_free(&c);
}

static void test_states(void **state)
{
    (void)state;
    each(check_states);
}

/* Nothing but the window's phase depends on the position: the last positions there are give the
 * bits of the first. */
static void test_late_positions(void **state)
{
    (void)state;
    const int64_t lens[] = {70, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 33, 1, 50};
    for (int64_t window = 0; window <= 8; window += 8) {
        struct srf_attn_shape shape = {.b = 2,
                                       .t = 172,
                                       .h = 2,
                                       .d = 16,
                                       .m = 20,
                                       .n_sets = 1,
                                       .window = window,
                                       .causal = true};
        struct attn_case c = attn_case_new(SRF_F32, 1, shape, 1);
        int n = (int)(sizeof lens / sizeof *lens);
        attn_case_recurrent(&c, lens, n);
        double *first = twin_values(&c.s, c.o);
        c.pos_shift = (INT32_MAX - 172) / 16 * 16;
        attn_case_recurrent(&c, lens, n);
        double *late = twin_values(&c.s, c.o);
        assert_memory_equal(first, late, (size_t)c.o.n * sizeof *first);
        srf__free(first);
        srf__free(late);
        attn_case_free(&c);
    }
}

/* Thousands of tokens: the sums' errors do not build up, and prefill's scratch does not grow. */
static void test_long(void **state)
{
    (void)state;
    int64_t lens[3] = {1300, 1, 2000 - 1301};
    for (int64_t window = 0; window <= 16; window += 16) {
        struct srf_attn_shape shape = {.b = 1,
                                       .t = 2000,
                                       .h = 1,
                                       .d = 8,
                                       .m = 6,
                                       .n_sets = 1,
                                       .window = window,
                                       .causal = true};
        struct attn_case c = attn_case_new(SRF_F32, 1, shape, 1);
        attn_case_ref_fwd(&c);
        attn_case_fwd(&c);
        twin_close(&c.s, "long", c.o, 1e-5, 0);
        attn_case_recurrent(&c, lens, 3);
        twin_close(&c.s, "long prefill", c.o, 1e-5, 0);
        attn_case_ref_bwd(&c);
        attn_case_bwd(&c);
        twin_close(&c.s, "long gradient", c.dqkv, 1e-5, 0);
        size_t bytes[2];
        for (int i = 0; i < 2; i++) {
            struct srf_srf_attn_prefill_args a = {.s = shape};
            a.s.t = i ? 1 << 30 : 2000;
            bytes[i] = c.s.ctx->be->srf_attn_prefill_workspace(c.s.ctx, &a);
        }
        assert_int_equal(bytes[0], bytes[1]);
        attn_case_free(&c);
    }
}

/* --- causality -------------------------------------------------------------------------------- */

/* Other tokens from `from` on leave every output before it as it was, to the bit. */
static void check_causal(enum srf_dtype dtype, struct srf_attn_shape shape)
{
    if (shape.b > 1) return;
    struct attn_case c = attn_case_new(dtype, 1, shape, 1);
    attn_case_fwd(&c);
    double *before = twin_values(&c.s, c.o);
    for (int64_t from = shape.t - 1; from > 0; from -= 1 + from / 3) {
        for (int64_t i = from * c.ld; i < c.qkv.n; i++)
            attn_case_set(&c, i, 0.1 - 1.3 * c.qkv.ref[i]);
        attn_case_fwd(&c);
        double *after = twin_values(&c.s, c.o);
        size_t row = (size_t)c.ld_o * sizeof *after;
        assert_memory_equal(before, after, (size_t)from * row);
        assert_memory_not_equal(before + from * c.ld_o, after + from * c.ld_o, row);
        srf__free(after);
    }
    srf__free(before);
    attn_case_free(&c);
}

/* A NaN shows at its token; one of q or k does not show before it. */
static void check_nan(enum srf_dtype dtype, struct srf_attn_shape shape)
{
    if (shape.b > 1) return;
    for (int part = 0; part < 3; part++) {
        struct attn_case c = attn_case_new(dtype, 1, shape, 1);
        int64_t at = shape.t / 2;
        attn_case_fwd(&c);
        double *before = twin_values(&c.s, c.o);
        attn_case_set(&c, attn_case_at(&c, part, 0, at, 0, 1), NAN);
        attn_case_fwd(&c);
        double *after = twin_values(&c.s, c.o);
        /* A NaN may send the chunk down the slow path, which rounds otherwise. */
        if (part < 2) test_close("before a NaN", after, before, at * c.ld_o, tol_of(dtype));
        assert_true(isnan(after[at * c.ld_o + 1]));
        srf__free(before);
        srf__free(after);
        attn_case_free(&c);
    }
}

static void test_nan(void **state)
{
    (void)state;
    each(check_nan);
}

static void test_causal(void **state)
{
    (void)state;
    each(check_causal);
}

/* Gradients know the future only: d_o that is 0 up to a token leaves dq 0 up to it, and d_o that
 * is 0 from a token on leaves dk, dv 0 from it on. */
static void check_causal_gradient(enum srf_dtype dtype, struct srf_attn_shape shape)
{
    struct attn_case c = attn_case_new(dtype, 1, shape, 1);
    int64_t width = shape.h * shape.d, cut = shape.t / 2;
    double *d_o = twin_values(&c.s, c.d_o), *x = srf__alloc((size_t)c.d_o.n, sizeof *x);
    attn_case_fwd(&c);
    for (int late = 0; late < 2; late++) {
        for (int64_t i = 0; i < c.d_o.n; i++)
            x[i] = (i / c.ld_o % shape.t >= cut) == late ? d_o[i] : 0;
        twin_set(&c.s, &c.d_o, x);
        attn_case_bwd(&c);
        double *g = twin_values(&c.s, c.dqkv);
        for (int64_t i = 0; i < c.dqkv.n; i++) {
            int64_t t = i / c.ld % shape.t, j = i % c.ld;
            bool zero = late ? t < cut && j < width : t >= cut && j < 3 * width;
            if (zero && g[i] != 0) fail_msg("gradient %g at token %lld", g[i], (long long)t);
        }
        srf__free(g);
    }
    srf__free(d_o);
    srf__free(x);
    attn_case_free(&c);
}

static void test_causal_gradient(void **state)
{
    (void)state;
    each(check_causal_gradient);
}

/* --- v ---------------------------------------------------------------------------------------- */

/* A constant v comes back; o is linear in v. */
static void check_values(enum srf_dtype dtype, struct srf_attn_shape shape)
{
    struct attn_case c = attn_case_new(dtype, 1, shape, 1);
    int64_t width = shape.h * shape.d, rows = shape.b * shape.t;
    attn_case_fwd(&c);
    double *o = twin_values(&c.s, c.o), *v = twin_values(&c.s, c.qkv);
    for (int64_t t = 0; t < rows; t++)
        for (int64_t j = 0; j < width; j++) {
            attn_case_set(&c, t * c.ld + 2 * width + j, 2.25);
            c.o.ref[t * c.ld_o + j] = 2.25;
        }
    attn_case_fwd(&c);
    twin_close(&c.s, "constant v", c.o, tol_of(dtype), 0);
    for (int64_t t = 0; t < rows; t++)
        for (int64_t j = 0; j < width; j++) {
            attn_case_set(&c, t * c.ld + 2 * width + j, 2.25 - 3 * v[t * c.ld + 2 * width + j]);
            c.o.ref[t * c.ld_o + j] = 2.25 - 3 * o[t * c.ld_o + j];
        }
    attn_case_fwd(&c);
    twin_close(&c.s, "linear in v", c.o, tol_of(dtype), 0);
    for (int64_t t = 0; t < rows; t++)
        for (int64_t j = 0; j < width; j++) {
            attn_case_set(&c, t * c.ld + 2 * width + j, 0x1p97 * v[t * c.ld + 2 * width + j]);
            c.o.ref[t * c.ld_o + j] = 0x1p97 * o[t * c.ld_o + j];
        }
    attn_case_fwd(&c);
    twin_close(&c.s, "huge v", c.o, tol_of(dtype), 0);
    srf__free(o);
    srf__free(v);
    attn_case_free(&c);
}

static void test_values(void **state)
{
    (void)state;
    each(check_values);
}

/* --- gradients' conventions ------------------------------------------------------------------- */

static void check_gradients(enum srf_dtype dtype, struct srf_attn_shape shape)
{
    struct attn_case c = attn_case_new(dtype, 2, shape, 1);
    size_t bytes = (size_t)c.dqkv.n * srf_dtype_bytes(dtype);
    attn_case_fwd(&c);
    attn_case_bwd(&c);
    double *dw = twin_values(&c.s, c.dw);
    void *first = srf__alloc(bytes, 1);
    memcpy(first, c.dqkv.dev, bytes);
    attn_case_bwd(&c);
    /* The same run twice gives the same bits; dw takes the second on top: 1 + 2 (dw - 1). */
    assert_memory_equal(first, c.dqkv.dev, bytes);
    for (int64_t i = 0; i < c.dw.n; i++) c.dw.ref[i] = 2 * dw[i] - 1;
    twin_close(&c.s, "dw twice", c.dw, tol_of(dtype), 0);
    c.no_dw = true;
    attn_case_bwd(&c);
    assert_memory_equal(first, c.dqkv.dev, bytes);
    c.no_dw = false;
    /* No upstream gradient: zeros, and nothing for dw. */
    for (int64_t i = 0; i < c.d_o.n; i++) c.d_o.ref[i] = 0;
    double *zero = c.d_o.ref, *before = twin_values(&c.s, c.dw);
    twin_set(&c.s, &c.d_o, zero);
    attn_case_bwd(&c);
    double *g = twin_values(&c.s, c.dqkv), *after = twin_values(&c.s, c.dw);
    for (int64_t i = 0; i < c.dqkv.n; i++)
        assert_true(g[i] == (i % c.ld < 3 * shape.h * shape.d ? 0 : 7));
    for (int64_t i = 0; i < c.dw.n; i++) assert_true(before[i] == after[i]);
    srf__free(first);
    srf__free(dw);
    srf__free(g);
    srf__free(before);
    srf__free(after);
    attn_case_free(&c);
}

static void test_gradients(void **state)
{
    (void)state;
    each(check_gradients);
    struct srf_attn_shape s = {.b = 2, .t = 90, .h = 2, .d = 8, .m = 16, .n_sets = 1};
    check_gradients(SRF_F32, s);
}

/* --- arguments -------------------------------------------------------------------------------- */

static void test_arguments(void **state)
{
    (void)state;
    struct twins s = twins_new(SRF_F32, 1);
    struct srf_attn_shape good = {
        .b = 1, .t = 4, .h = 2, .d = 4, .m = 4, .n_sets = 1, .causal = true};
    struct srf_attn_shape bad[] = {good, good, good, good, good, good, good};
    bad[0].n_sets = 3;
    bad[1].causal = false;
    bad[1].window = 2;
    bad[2].d = 1;
    bad[3].m = 0;
    bad[4].t = -1;
    bad[5].window = -1;
    test_ok(srf_ctx_reserve_workspace(s.ctx, 1 << 22));
    for (size_t i = 0; i < sizeof bad / sizeof *bad - 1; i++)
        assert_int_equal(SRF_RUN(s.ctx, srf_attn_fwd, .s = bad[i], .ld = 8, .ld_o = 8),
                         SRF_INVALID);
    assert_int_equal(SRF_RUN(s.ctx, srf_attn_fwd, .s = good, .ld = 7, .ld_o = 8), SRF_INVALID);
    assert_int_equal(SRF_RUN(s.ctx, srf_attn_step, .s = good, .ld = 8, .ld_o = 8), SRF_INVALID);
    good.causal = false;
    assert_int_equal(SRF_RUN(s.ctx, srf_attn_prefill, .s = good, .ld = 8, .ld_o = 8), SRF_INVALID);
    /* Nothing to do is fine. */
    good.t = 0;
    test_ok(SRF_RUN(s.ctx, srf_attn_fwd, .s = good, .ld = 8, .ld_o = 8));
    test_ok(SRF_RUN(s.ctx, srf_attn_bwd, .s = good, .ld = 8, .ld_o = 8));
    twins_free(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_forms),           cmocka_unit_test(test_states),
        cmocka_unit_test(test_late_positions),  cmocka_unit_test(test_long),
        cmocka_unit_test(test_causal),          cmocka_unit_test(test_nan),
        cmocka_unit_test(test_causal_gradient), cmocka_unit_test(test_values),
        cmocka_unit_test(test_gradients),       cmocka_unit_test(test_arguments),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
