/* SRF attention on inputs of any size: outputs and gradients are finite for all finite q, k, and
 * right wherever the numbers say so; chunks whose keys differ too much for one stabiliser take the
 * slow path, seen in the profile. */
#include "tests/ref/attn_case.h"

#include <stdio.h>

enum { T = 150, D = 16, M = 32 };

static const struct srf_attn_shape base = {
    .b = 1, .t = T, .h = 1, .d = D, .m = M, .n_sets = 1, .causal = true};

struct kind {
    const char *name;
    void (*fill)(struct attn_case *c);
    /* Relative errors of o and gradients allowed, in eps of the type; 0: finite is enough (the
     * reference does not clamp). */
    double eps, grad_eps;
    enum { FAST, SLOW, MAY_BE } path; /* in f32 the pure form must meet slow chunks, or must not */
};

static void fill_scaled(struct attn_case *c, double scale)
{
    for (int64_t t = 0; t < T; t++)
        for (int part = 0; part < 2; part++)
            for (int64_t j = 0; j < D; j++) {
                int64_t i = attn_case_at(c, part, 0, t, 0, j);
                attn_case_set(c, i, scale * c->qkv.ref[i]);
            }
}

static void fill_10(struct attn_case *c)
{
    fill_scaled(c, 10);
}

static void fill_100(struct attn_case *c)
{
    fill_scaled(c, 100);
}

static void fill_1e4(struct attn_case *c)
{
    fill_scaled(c, 1e4);
}

static void fill_1e20(struct attn_case *c)
{
    fill_scaled(c, 1e20);
}

static void fill_max(struct attn_case *c)
{
    for (int64_t t = 0; t < T; t++)
        for (int part = 0; part < 2; part++)
            for (int64_t j = 0; j < D; j++) {
                int64_t i = attn_case_at(c, part, 0, t, 0, j);
                attn_case_set(c, i, c->qkv.ref[i] > 0 ? 3e38 : -3e38);
            }
}

static void fill_zero(struct attn_case *c)
{
    fill_scaled(c, 0);
}

/* Large keys, whose |y|^2 / 2 makes all their features small; but the last of the second chunk is
 * w_0 and outweighs them by far. Queries before it must not notice. */
static void fill_huge_key(struct attn_case *c)
{
    double by = pow(D, 0.25);
    for (int64_t j = 0; j < D; j++) {
        for (int64_t t = 0; t < T; t++) {
            int64_t q = attn_case_at(c, 0, 0, t, 0, j), k = attn_case_at(c, 1, 0, t, 0, j);
            attn_case_set(c, k, 25 * c->qkv.ref[k]);
            attn_case_set(c, q, 3 * c->qkv.ref[q]);
        }
        attn_case_set(c, attn_case_at(c, 1, 0, 127, 0, j), by * c->w.ref[j]);
    }
}

/* One huge key that outweighs nothing: |y|^2 / 2 wins over w.y. */
static void fill_far_key(struct attn_case *c)
{
    for (int64_t j = 0; j < D; j++) attn_case_set(c, attn_case_at(c, 1, 0, 127, 0, j), 1e6);
}

static void fill_equal(struct attn_case *c)
{
    for (int64_t t = 1; t < T; t++)
        for (int64_t j = 0; j < D; j++)
            attn_case_set(c, attn_case_at(c, 1, 0, t, 0, j),
                          c->qkv.ref[attn_case_at(c, 1, 0, 0, 0, j)]);
}

static void fill_one_hot(struct attn_case *c)
{
    for (int64_t t = 0; t < T; t++)
        for (int part = 0; part < 2; part++)
            for (int64_t j = 0; j < D; j++)
                attn_case_set(c, attn_case_at(c, part, 0, t, 0, j), (t + part) % D == j ? 30 : 0);
}

/* Keys that shrink towards the end of each chunk: each outweighs all before it. */
static void fill_rising(struct attn_case *c)
{
    for (int64_t t = 0; t < T; t++)
        for (int64_t j = 0; j < D; j++) {
            int64_t i = attn_case_at(c, 1, 0, t, 0, j);
            attn_case_set(c, i, (double)(64 - t % 64) * c->qkv.ref[i]);
        }
}

/* An exponent is rounded to eps of its size, about 3 scale^2 here, and so are weights; a key of 1e6
 * takes part in dq and dw with its size, times a weight that ought to be 0. */
static const struct kind kinds[] = {
    {"ten times", fill_10, 300, 1e3, MAY_BE},    {"a hundred times", fill_100, 3e4, 1e5, SLOW},
    {"1e4 times", fill_1e4, 3e8, 1e9, SLOW},     {"1e20 times", fill_1e20, 0, 0, FAST},
    {"largest", fill_max, 0, 0, FAST},           {"zero", fill_zero, 10, 10, FAST},
    {"huge key", fill_huge_key, 2e3, 8e3, SLOW}, {"far key", fill_far_key, 20, 1e6, FAST},
    {"equal keys", fill_equal, 10, 10, FAST},    {"one-hot", fill_one_hot, 400, 1e3, MAY_BE},
    {"rising", fill_rising, 1e4, 4e4, SLOW},
};
#define N_KINDS ((int)(sizeof kinds / sizeof *kinds))

static void all_finite(const struct attn_case *c, const char *what, const char *kind, struct twin t)
{
    double *x = twin_values(&c->s, t);
    for (int64_t i = 0; i < t.n; i++)
        if (!isfinite(x[i])) fail_msg("%s, %s: element %lld is %g", kind, what, (long long)i, x[i]);
    srf__free(x);
}

static void check(enum srf_dtype dtype, const struct kind *kind, struct srf_attn_shape shape)
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
    for (int i = 0; i < N_KINDS; i++) {
        struct srf_attn_shape s = base;
        for (int dtype = 0; dtype < 2; dtype++) {
            s.causal = true;
            s.window = 0;
            check(dtype ? SRF_F64 : SRF_F32, &kinds[i], s);
            s.window = 16;
            check(dtype ? SRF_F64 : SRF_F32, &kinds[i], s);
            s.window = 0;
            s.causal = false;
            check(dtype ? SRF_F64 : SRF_F32, &kinds[i], s);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_range)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
