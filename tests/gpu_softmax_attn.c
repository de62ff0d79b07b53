/* softmax_attn_fwd, softmax_attn_bwd on the GPU. */
#include "tests/ref/attn_case.h"
#include "tests/ref/gpu.h"

struct softmax_case {
    enum srf_dtype dtype;
    struct srf_attn_shape shape;
    int64_t sinks; /* beside the shape's window */
    double scale;  /* of q and k: scores have this to the second power as their deviation */
};

/* m, n_sets are those of SRF attention and mean nothing here. */
#define SHAPE(b_, t_, h_, d_)                                                                      \
    {                                                                                              \
        .b = b_, .t = t_, .h = h_, .d = d_, .m = 1, .n_sets = 1                                    \
    }
static const struct srf_attn_shape shapes[] = {
    SHAPE(1, 1, 1, 32),   SHAPE(2, 5, 3, 64),    SHAPE(1, 63, 2, 16),   SHAPE(2, 64, 1, 64),
    SHAPE(1, 65, 2, 80),  SHAPE(1, 128, 3, 96),  SHAPE(1, 131, 1, 128), SHAPE(1, 512, 1, 64),
    SHAPE(1, 577, 2, 32), SHAPE(1, 1100, 1, 64), SHAPE(0, 10, 2, 64),   SHAPE(2, 0, 2, 64),
    SHAPE(3, 2, 1, 64),   SHAPE(2, 257, 2, 128), SHAPE(1, 100, 1, 40),
};
#define N_SHAPES ((int)(sizeof shapes / sizeof *shapes))
/* Window and sinks: apart, overlapping, of whole tiles or not. */
static const int64_t windows[][2] = {{2, 0},   {3, 2}, {64, 0},  {64, 64},   {65, 4},  {100, 70},
                                     {190, 4}, {5, 0}, {7, 600}, {129, 130}, {2000, 3}};
#define N_WINDOWS ((int)(sizeof windows / sizeof *windows))

static struct attn_case case_of(const struct softmax_case *k)
{
    struct attn_case c = attn_case_new_on(gpu_device(), k->dtype, k->shape, k->scale);
    c.sinks = k->sinks;
    return c;
}

static void test_softmax(void **state)
{
    const struct softmax_case *k = *state;
    struct attn_case c = case_of(k);
    /* Scores grow as scale^2, and so does what rounding makes of them. */
    double tol = 16 * 0x1p-24 * (1 + k->scale * k->scale);
    struct attn_tol f32 = {tol, tol, 2 * tol, 0, true}, bf16 = {0x1p-7, tol, 0x1p-6, 0, true};
    attn_case_check(&c, &attn_softmax, k->dtype == SRF_BF16 ? bf16 : f32);
    attn_case_free(&c);
}

static void test_causal(void **state)
{
    struct attn_case c = case_of(*state);
    attn_case_check_causal(&c, &attn_softmax, 5);
    attn_case_free(&c);
}

int main(int argc, char **argv)
{
    static struct gpu_suite suite;
    for (int type = 0; type < gpu_n_dtypes(); type++) {
        struct softmax_case k = {.dtype = gpu_dtype(type)};
        for (int i = 0; i < 4 * N_SHAPES; i++) {
            k.shape = shapes[i / 4];
            k.shape.causal = i & 1;
            /* With sharp weights, a gradient is a small difference of numbers that bf16 has
             * rounded; with one or two tokens it may be no more than rounding. */
            if (i & 2 && k.shape.t < 16) continue;
            k.scale = i & 2 ? (k.dtype == SRF_BF16 ? 1.5 : 6) : 1;
            struct srf_attn_shape s = k.shape;
            gpu_add(&suite, test_softmax, &k, sizeof k, (double)(s.b * s.h * s.t * s.t * s.d) * 3,
                    "softmax_attn %s b=%d t=%d h=%d d=%d%s scale=%g", srf_dtype_name(k.dtype),
                    (int)s.b, (int)s.t, (int)s.h, (int)s.d, s.causal ? " causal" : "", k.scale);
        }
        k.scale = 1;
        for (int i = 0; i < N_WINDOWS * N_SHAPES; i++) {
            struct srf_attn_shape s = shapes[i % N_SHAPES];
            if (s.t < 2) continue;
            s.causal = true;
            s.window = windows[i / N_SHAPES][0];
            k.shape = s;
            k.sinks = windows[i / N_SHAPES][1];
            gpu_add(&suite, test_softmax, &k, sizeof k, (double)(s.b * s.h * s.t * s.t * s.d) * 3,
                    "softmax_attn %s b=%d t=%d h=%d d=%d window=%d sinks=%d",
                    srf_dtype_name(k.dtype), (int)s.b, (int)s.t, (int)s.h, (int)s.d, (int)s.window,
                    (int)k.sinks);
        }
        for (int window = 0; window < 80; window += 70) {
            k.shape = (struct srf_attn_shape)SHAPE(1, 300, 1, 64);
            k.shape.causal = true;
            k.shape.window = window;
            k.sinks = window / 10;
            gpu_add(&suite, test_causal, &k, sizeof k, 1e7,
                    "softmax_attn %s later tokens window=%d", srf_dtype_name(k.dtype), window);
        }
        k.sinks = 0;
    }
    return gpu_run(&suite, argc > 1 ? argv[1] : NULL);
}
