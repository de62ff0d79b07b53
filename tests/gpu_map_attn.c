/* map_attn_fwd, map_attn_bwd on the GPU. */
#include "tests/ref/attn_case.h"
#include "tests/ref/gpu.h"

struct map_case {
    enum srf_dtype dtype;
    enum srf_map_kind map;
    struct srf_attn_shape shape;
    double scale; /* of q and k */
};

#define SHAPE(b_, t_, h_, d_, m_, window_)                                                         \
    {                                                                                              \
        .b = b_, .t = t_, .h = h_, .d = d_, .m = m_, .n_sets = h_, .window = window_,              \
        .causal = true                                                                             \
    }
static const struct srf_attn_shape shapes[] = {
    SHAPE(2, 5, 3, 7, 4, 0),      SHAPE(2, 5, 3, 7, 4, 1),       SHAPE(1, 64, 2, 16, 16, 16),
    SHAPE(1, 3, 1, 64, 64, 0),    SHAPE(1, 65, 2, 80, 64, 16),   SHAPE(1, 131, 1, 128, 256, 48),
    SHAPE(1, 577, 2, 32, 34, 7),  SHAPE(1, 300, 1, 40, 130, 0),  SHAPE(0, 10, 2, 64, 64, 0),
    SHAPE(2, 0, 2, 64, 64, 64),   SHAPE(2, 130, 1, 64, 64, 0),   SHAPE(2, 512, 2, 64, 64, 64),
    SHAPE(1, 577, 2, 64, 64, 64), SHAPE(1, 577, 1, 64, 64, 128), SHAPE(1, 449, 2, 64, 128, 64),
    SHAPE(1, 449, 2, 64, 128, 0), SHAPE(1, 300, 1, 64, 64, 32),  SHAPE(3, 64, 2, 64, 64, 64),
};
#define N_SHAPES ((int)(sizeof shapes / sizeof *shapes))

static void test_map(void **state)
{
    const struct map_case *k = *state;
    struct attn_case c = attn_case_new_on(gpu_device(), k->dtype, k->shape, k->scale);
    bool bf16 = k->dtype == SRF_BF16;
    double tol = 32 * 0x1p-24 * (1 + k->scale * k->scale);
    attn_case_map_fwd(&c, k->map);
    attn_case_ref_map_fwd(&c, k->map);
    attn_case_close(&c, "o", c.o, c.ld_o, 0, 1, bf16 ? 0x1p-6 : tol);
    twin_close(&c.s, "stat", c.stat, bf16 ? 0x1p-8 : tol, 0);
    attn_case_map_bwd(&c, k->map);
    attn_case_ref_map_bwd(&c, k->map);
    for (int part = 0; part < 3; part++)
        attn_case_close(&c,
                        part == 0   ? "dq"
                        : part == 1 ? "dk"
                                    : "dv",
                        c.dqkv, c.ld, part, 3, bf16 ? 0x1p-5 : 4 * tol);
    twin_close(&c.s, "dw", c.d_map_w, bf16 ? 0x1p-5 : 8 * tol, 0);
    attn_case_free(&c);
}

/* Later tokens, however large, leave earlier outputs as they were. */
static void test_causal(void **state)
{
    const struct map_case *k = *state;
    struct attn_case c = attn_case_new_on(gpu_device(), k->dtype, k->shape, k->scale);
    attn_case_map_fwd(&c, k->map);
    double *before = twin_values(&c.s, c.o);
    for (int64_t from = k->shape.t - 1; from > 0; from -= 37) {
        for (int64_t i = from * c.ld; i < c.qkv.n; i++) attn_case_set(&c, i, 5 * c.qkv.ref[i]);
        attn_case_map_fwd(&c, k->map);
        double *after = twin_values(&c.s, c.o);
        assert_memory_equal(before, after, (size_t)(from * c.ld_o) * sizeof *after);
        assert_true(before[from * c.ld_o] != after[from * c.ld_o]);
        srf__free(after);
    }
    srf__free(before);
    attn_case_free(&c);
}

/* Finite however large the scores are, and where no feature of T2R is above 0. */
static void test_range(void **state)
{
    const struct map_case *k = *state;
    struct attn_case c = attn_case_new_on(gpu_device(), k->dtype, k->shape, k->scale);
    double *w = srf__alloc((size_t)c.map_w.n, sizeof *w);
    assert_non_null(w);
    for (int64_t j = 0; j < c.map_w.n; j++)
        w[j] = k->map != SRF_MAP_T2R ? c.map_w.ref[j] : j % (k->shape.d + 1) == k->shape.d ? -1 : 0;
    twin_set(&c.s, &c.map_w, w);
    attn_case_map_fwd(&c, k->map);
    attn_case_map_bwd(&c, k->map);
    double *o = twin_values(&c.s, c.o), *d = twin_values(&c.s, c.dqkv);
    double *dw = twin_values(&c.s, c.d_map_w);
    for (int64_t j = 0; j < c.o.n; j++) assert_true(isfinite(o[j]));
    for (int64_t j = 0; j < c.dqkv.n; j++) assert_true(isfinite(d[j]));
    for (int64_t j = 0; j < c.map_w.n; j++) assert_true(isfinite(dw[j]));
    srf__free(w);
    srf__free(o);
    srf__free(d);
    srf__free(dw);
    attn_case_free(&c);
}

int main(int argc, char **argv)
{
    static const char *const names[] = {"hedgehog", "t2r"};
    static struct gpu_suite suite;
    for (int type = 0; type < gpu_n_dtypes(); type++) {
        struct map_case k = {.dtype = gpu_dtype(type)};
        const char *dtype = srf_dtype_name(k.dtype);
        for (int i = 0; i < 4 * N_SHAPES; i++) {
            k.shape = shapes[i / 4];
            k.map = (enum srf_map_kind)(i & 1);
            /* With sharp weights, a gradient is a small difference of numbers that bf16 has
             * rounded. */
            k.scale = i & 2 ? (k.dtype == SRF_BF16 ? 1.5 : 4) : 1;
            if (i & 2 && k.shape.t < 16) continue;
            struct srf_attn_shape s = k.shape;
            gpu_add(&suite, test_map, &k, sizeof k, (double)(s.b * s.h * s.t * s.t * s.d) * 3,
                    "map_attn %s %s b=%d t=%d h=%d d=%d m=%d window=%d scale=%g", dtype,
                    names[k.map], (int)s.b, (int)s.t, (int)s.h, (int)s.d, (int)s.m, (int)s.window,
                    k.scale);
        }
        for (int i = 0; i < 4; i++) {
            struct srf_attn_shape s = SHAPE(1, 300, 1, 64, 64, i / 2 * 64);
            k.shape = s;
            k.map = (enum srf_map_kind)(i & 1);
            k.scale = 1;
            gpu_add(&suite, test_causal, &k, sizeof k, 1e7, "map_attn %s %s later tokens window=%d",
                    dtype, names[k.map], (int)s.window);
            k.scale = 30;
            gpu_add(&suite, test_range, &k, sizeof k, GPU_LIGHT, "map_attn %s %s range window=%d",
                    dtype, names[k.map], (int)s.window);
        }
    }
    return gpu_run(&suite, argc > 1 ? argv[1] : NULL);
}
