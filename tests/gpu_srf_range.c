/* SRF attention on the GPU on inputs of any size: outputs and gradients are finite for all finite
 * q, k, and right wherever the numbers say so. */
#include "tests/ref/attn_kinds.h"
#include "tests/ref/gpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <math.h>

struct range_case {
    enum srf_dtype dtype;
    struct srf_attn_shape shape;
    const struct attn_kind *kind;
};

static void all_finite(struct attn_case *c, const char *what, struct twin t)
{
    double *x = twin_values(&c->s, t);
    for (int64_t i = 0; i < t.n; i++)
        if (!isfinite(x[i])) {
            print_error("%s: element %lld of %lld is %g\n", what, (long long)i, (long long)t.n,
                        x[i]);
            c->s.failures++;
            break;
        }
    srf__free(x);
}

/* Whatever its scores, token 0 has no other key than its own. */
static void sees_itself(struct attn_case *c, const char *what, double tol)
{
    char name[40];
    double *o = twin_values(&c->s, c->o);
    snprintf(name, sizeof name, "%s, token 0", what);
    twin_check(&c->s, name, o, c->qkv.ref + 2 * c->shape.d, c->shape.d, tol);
    srf__free(o);
}

static void test_range(void **state)
{
    static const char *const forms[] = {"o", "o by pieces", "o by steps"};
    const struct range_case *k = *state;
    struct attn_case c = attn_case_new_on(gpu_device(), k->dtype, k->shape, 1);
    int64_t t = k->shape.t, lens[3][600] = {{0}, {70, 1, t - 71}};
    bool bf16 = k->dtype == SRF_BF16;
    /* Exponents grow with d^(1/2). The sums of bf16 products round as those of f32, and weights
     * and values once more. */
    double grow = sqrt((double)k->shape.d / 16) * 0x1p-24;
    double tol = k->kind->eps * grow * (bf16 ? 4 : 1) + (bf16 ? 1e-2 : 0);
    for (int64_t i = 0; i < t; i++) lens[2][i] = 1;
    k->kind->fill(&c);
    attn_case_ref_fwd(&c);
    /* Steps take their time. */
    int n_forms = !k->shape.causal ? 1 : k->shape.d > 32 || gpu_small() ? 2 : 3;
    bool twice = c.s.twice;
    for (int form = 0; form < n_forms; form++) {
        c.s.twice = twice && form < 2;
        if (form == 0)
            attn_case_fwd(&c);
        else
            attn_case_recurrent(&c, lens[form], form == 1 ? 3 : (int)t);
        all_finite(&c, forms[form], c.o);
        if (k->kind->eps > 0) attn_case_close(&c, forms[form], c.o, c.ld_o, 0, 1, tol);
        if (k->shape.causal) sees_itself(&c, forms[form], bf16 ? 1e-2 : 1e-5);
    }
    c.s.twice = twice;
    attn_case_fwd(&c);
    /* Other kernels may do it when features are not trained. */
    for (int no_dw = 0; no_dw < 2; no_dw++) {
        c.no_dw = no_dw;
        attn_case_bwd(&c);
        all_finite(&c, "dq, dk, dv", c.dqkv);
        all_finite(&c, "dw", c.dw);
        /* In bf16 a gradient of sharp weights is a small difference of rounded numbers. */
        if (k->kind->eps == 0 || (bf16 && k->kind->grad_eps > 10)) continue;
        if (!no_dw) attn_case_ref_bwd(&c);
        twin_close(&c.s, "dq, dk, dv", c.dqkv, bf16 ? 0x1p-6 : k->kind->grad_eps * grow, 0);
    }
    attn_case_free(&c);
}

/* Whatever the scores, what comes later changes nothing: tokens from `cut` on are others, outputs
 * before it are what they were, to the rounding of weights. */
static void test_later(void **state)
{
    const struct range_case *k = *state;
    struct attn_case c = attn_case_new_on(gpu_device(), k->dtype, k->shape, 1);
    double tol = k->dtype == SRF_BF16 ? 2e-2 : 1e-4;
    k->kind->fill(&c);
    attn_case_fwd(&c);
    double *before = twin_values(&c.s, c.o);
    const int64_t cuts[] = {k->shape.t - 3, k->shape.t / 2 + 1, 40};
    for (int i = 0; i < 3; i++) {
        double worst = 0;
        int64_t at = -1;
        for (int64_t t = cuts[i]; t < k->shape.t; t++)
            for (int part = 0; part < 3; part++)
                for (int64_t j = 0; j < k->shape.d; j++) {
                    int64_t e = attn_case_at(&c, part, 0, t, 0, j);
                    attn_case_set(&c, e, (part == 2 ? -3 : -0.7) * c.qkv.ref[e]);
                }
        attn_case_fwd(&c);
        double *after = twin_values(&c.s, c.o);
        for (int64_t t = 0; t < cuts[i]; t++)
            for (int64_t j = 0; j < k->shape.d; j++) {
                double e = fabs(after[t * c.ld_o + j] - before[t * c.ld_o + j]);
                if (!(e <= worst)) worst = e, at = t;
            }
        srf__free(after);
        if (!(worst <= tol)) {
            print_error("tokens from %lld on changed the output of token %lld by %.3g\n",
                        (long long)cuts[i], (long long)at, worst);
            c.s.failures++;
        }
    }
    srf__free(before);
    attn_case_free(&c);
}

/* A NaN in q, k or v of a token is in the output of that token, in all forms: no maximum, clamp or
 * weight of 0 makes a number of it. */
static void test_nan(void **state)
{
    const struct range_case *k = *state;
    const int64_t t = k->shape.t, tokens[] = {0, 37, 64, t - 1}, lens[3] = {70, 1, t - 71};
    for (int i = 0; i < 12; i++) {
        struct attn_case c = attn_case_new_on(gpu_device(), k->dtype, k->shape, 1);
        int64_t token = tokens[i / 3], element = attn_case_at(&c, i % 3, 0, token, 0, 5);
        attn_case_set(&c, element, NAN);
        for (int form = 0; form < 2; form++) {
            if (form == 0)
                attn_case_fwd(&c);
            else
                attn_case_recurrent(&c, lens, 3);
            double *o = twin_values(&c.s, c.o);
            if (!isnan(o[token * c.ld_o + 5])) {
                print_error("%s: a NaN in %c of token %lld gives %g\n", form ? "pieces" : "whole",
                            "qkv"[i % 3], (long long)token, o[token * c.ld_o + 5]);
                c.s.failures++;
            }
            srf__free(o);
        }
        attn_case_free(&c);
    }
}

int main(int argc, char **argv)
{
    static const struct srf_attn_shape shapes[] = {
        {.b = 1, .t = 150, .h = 1, .d = 64, .m = 64, .n_sets = 1},
        {.b = 1, .t = 150, .h = 1, .d = 32, .m = 32, .n_sets = 1},
        {.b = 1, .t = 193, .h = 1, .d = 128, .m = 96, .n_sets = 1},
        {.b = 1, .t = 150, .h = 1, .d = 64, .m = 256, .n_sets = 1},
        {.b = 1, .t = 530, .h = 1, .d = 64, .m = 64, .n_sets = 1}, /* segments */
    };
    static const int64_t windows[] = {0, 32, 64, -1}; /* -1: not causal */
    static struct gpu_suite suite;
    for (int type = 0; type < gpu_n_dtypes(); type++)
        for (int i = 0; i < 5; i++)
            for (int kind = 0; kind < ATTN_N_KINDS; kind++)
                for (int w = 0; w < 4; w++) {
                    struct range_case k = {
                        .dtype = gpu_dtype(type), .shape = shapes[i], .kind = &attn_kinds[kind]};
                    if ((i > 0 && w > 1) || (i == 4 && w > 0)) continue;
                    k.shape.causal = windows[w] >= 0;
                    k.shape.window = windows[w] > 0 ? windows[w] : 0;
                    /* Chunks that are cut into pieces, in every form. */
                    double eps = k.kind->eps;
                    bool light = i == 1 && (eps == 3e4 || (eps == 1e4 && w == 0));
                    if (light && gpu_small()) k.shape.t = 80; /* pieces of 70, 1 and 9 */
                    gpu_add(&suite, test_range, &k, sizeof k, light ? GPU_LIGHT : 1e7,
                            "srf_attn %s t=%d d=%d m=%d window=%d%s: %s", srf_dtype_name(k.dtype),
                            (int)k.shape.t, (int)k.shape.d, (int)k.shape.m, (int)k.shape.window,
                            k.shape.causal ? "" : " not causal", k.kind->name);
                }
    static const int64_t later[] = {0, 32, 64, 96, 128, 192};
    for (int type = 0; type < gpu_n_dtypes(); type++)
        for (int i = 0; i < 5; i++)
            for (int kind = 0; kind < ATTN_N_KINDS; kind++)
                for (int w = 0; w < 6; w++) {
                    struct range_case k = {
                        .dtype = gpu_dtype(type), .shape = shapes[i], .kind = &attn_kinds[kind]};
                    k.shape.causal = true;
                    k.shape.window = later[w];
                    if (i > 0 && i < 4 && w > 2) continue;
                    gpu_add(&suite, test_later, &k, sizeof k, 1e7,
                            "srf_attn %s t=%d d=%d m=%d window=%d: %s, later tokens",
                            srf_dtype_name(k.dtype), (int)k.shape.t, (int)k.shape.d, (int)k.shape.m,
                            (int)k.shape.window, k.kind->name);
                    if (kind > 0) continue;
                    gpu_add(&suite, test_nan, &k, sizeof k, 1e7,
                            "srf_attn %s t=%d d=%d m=%d window=%d: NaN", srf_dtype_name(k.dtype),
                            (int)k.shape.t, (int)k.shape.d, (int)k.shape.m, (int)k.shape.window);
                }
    return gpu_run(&suite, argc > 1 ? argv[1] : NULL);
}
