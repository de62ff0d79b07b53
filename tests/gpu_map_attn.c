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

static struct attn_case case_of(const struct map_case *k)
{
    struct attn_case c = attn_case_new_on(gpu_device(), k->dtype, k->shape, k->scale);
    c.map = k->map;
    return c;
}

static void test_map(void **state)
{
    const struct map_case *k = *state;
    struct attn_case c = case_of(k);
    double tol = 32 * 0x1p-24 * (1 + k->scale * k->scale);
    struct attn_tol f32 = {tol, tol, 4 * tol, 8 * tol, true};
    struct attn_tol bf16 = {0x1p-6, 0x1p-8, 0x1p-5, 0x1p-5, true};
    attn_case_check(&c, &attn_map, k->dtype == SRF_BF16 ? bf16 : f32);
    attn_case_free(&c);
}

static void test_causal(void **state)
{
    struct attn_case c = case_of(*state);
    attn_case_check_causal(&c, &attn_map, 5);
    attn_case_free(&c);
}

static void test_range(void **state)
{
    struct attn_case c = case_of(*state);
    attn_case_check_map_range(&c);
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
