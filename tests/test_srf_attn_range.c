/* SRF attention on inputs of any size: outputs and gradients are finite for all finite q, k, and
 * right wherever the numbers say so; chunks whose keys differ too much for one stabiliser take the
 * slow path, seen in the profile. */
#include "tests/ref/attn_kinds.h"

#include <stdio.h>

enum { T = 150, D = 16, M = 32, LARGE_EPS = 12 };

static const struct srf_attn_shape base = {
    .b = 1, .t = T, .h = 1, .d = D, .m = M, .n_sets = 1, .causal = true};

static void all_finite(const struct attn_case *c, const char *what, const char *kind, struct twin t)
{
    double *x = twin_values(&c->s, t);
    for (int64_t i = 0; i < t.n; i++)
        if (!isfinite(x[i])) fail_msg("%s, %s: element %lld is %g", kind, what, (long long)i, x[i]);
    srf__free(x);
}

static void check(enum srf_dtype dtype, const struct attn_kind *kind, struct srf_attn_shape shape)
{
    struct attn_case c = attn_case_new(dtype, 1, shape, 1);
    struct srf_profile profile = {.gemm_flops = 0};
    double eps = dtype == SRF_F64 ? 0x1p-53 : 0x1p-24;
    int64_t lens[T], pieces[3] = {70, 1, T - 71};
    char name[100];
    for (int i = 0; i < T; i++) lens[i] = 1;
    kind->fill(&c);
    if (kind->eps > 0) {
        attn_case_ref_fwd(&c);
        attn_case_ref_bwd(&c);
    }
    for (int form = 0; form < (shape.causal ? 3 : 1); form++) {
        static const char *const forms[] = {"o", "o by steps", "o by pieces"};
        c.s.ctx->profile = form == 0 ? &profile : NULL;
        if (form == 0) attn_case_fwd(&c);
        if (form == 1) attn_case_recurrent(&c, lens, T);
        if (form == 2) attn_case_recurrent(&c, pieces, 3);
        snprintf(name, sizeof name, "%s, window %d: %s", kind->name, (int)shape.window,
                 forms[form]);
        all_finite(&c, forms[form], kind->name, c.o);
        if (kind->eps > 0) twin_close(&c.s, name, c.o, kind->eps * eps, 0);
    }
    c.s.ctx->profile = NULL;
    if (shape.causal) assert_true(profile.srf_chunks > 0);
    bool slow = profile.srf_slow_chunks > 0;
    if (shape.window ? slow
                     : shape.causal && dtype == SRF_F32 && kind->path == (slow ? FAST : SLOW))
        fail_msg("%s: %lld of %lld chunks slow", kind->name, (long long)profile.srf_slow_chunks,
                 (long long)profile.srf_chunks);
    attn_case_fwd(&c);
    attn_case_bwd(&c);
    all_finite(&c, "gradient", kind->name, c.dqkv);
    all_finite(&c, "dw", kind->name, c.dw);
    snprintf(name, sizeof name, "%s, window %d: gradient", kind->name, (int)shape.window);
    if (kind->eps > 0) twin_close(&c.s, name, c.dqkv, kind->grad_eps * eps, 0);
    attn_case_free(&c);
}

static void test_range(void **state)
{
    (void)state;
    for (int i = 0; i < ATTN_N_KINDS; i++) {
        struct srf_attn_shape s = base;
        for (int dtype = 0; dtype < 2; dtype++) {
            s.causal = true;
            s.window = 0;
            check(dtype ? SRF_F64 : SRF_F32, &attn_kinds[i], s);
            s.window = 16;
            check(dtype ? SRF_F64 : SRF_F32, &attn_kinds[i], s);
            s.window = 0;
            s.causal = false;
            check(dtype ? SRF_F64 : SRF_F32, &attn_kinds[i], s);
        }
    }
}

/* Where nothing is exact |x|^2 / 2 of a query cancels: large queries cost no more precision than
 * w.x has. */
static void test_large_queries(void **state)
{
    (void)state;
    struct attn_case c = attn_case_new(SRF_F32, 1, base, 1);
    int64_t lens[T];
    for (int64_t t = 0; t < T; t++) {
        lens[t] = 1;
        for (int64_t j = 0; j < D; j++) {
            int64_t i = attn_case_at(&c, 0, 0, t, 0, j);
            attn_case_set(&c, i, 100 * c.qkv.ref[i]);
        }
    }
    attn_case_ref_fwd(&c);
    attn_case_fwd(&c);
    twin_close(&c.s, "o", c.o, LARGE_EPS * 0x1p-24, 0);
    attn_case_recurrent(&c, lens, T);
    twin_close(&c.s, "o by steps", c.o, LARGE_EPS * 0x1p-24, 0);
    attn_case_free(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_range),
        cmocka_unit_test(test_large_queries),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
