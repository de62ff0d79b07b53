/* layernorm_fwd, layernorm_bwd on the GPU. */
#include "tests/ref/dense.h"
#include "tests/ref/gpu.h"

struct layernorm_case {
    enum srf_dtype dtype;
    int64_t n, c;
    double scale, offset; /* x = offset + scale N(0, 1) */
};

static const struct layernorm_case cases[] = {
    {.n = 1, .c = 1, .scale = 1},
    {.n = 1, .c = 13, .scale = 1},
    {.n = 7, .c = 1, .scale = 1},
    {.n = 5, .c = 64, .scale = 1},
    {.n = 3, .c = 65, .scale = 1},
    {.n = 41, .c = 97, .scale = 1},
    {.n = 0, .c = 8, .scale = 1},
    {.n = 130, .c = 384, .scale = 1},
    {.n = 517, .c = 192, .scale = 1},
    {.n = 33, .c = 768, .scale = 1},
    {.n = 9, .c = 1000, .scale = 1},
    {.n = 6, .c = 1600, .scale = 1},
    {.n = 3, .c = 4099, .scale = 1},
    {.n = 1100, .c = 128, .scale = 1},
    /* more rows than there are warps or blocks for */
    {.n = 6007, .c = 64, .scale = 1},
    {.n = 5003, .c = 768, .scale = 1},
    {.n = 2003, .c = 2056, .scale = 1},
    {.n = 9, .c = 64, .scale = 1e-3},
    {.n = 9, .c = 64, .scale = 1e4},
    {.n = 9, .c = 96, .scale = 1e12},
    {.n = 9, .c = 64, .scale = 1, .offset = -300},
    {.n = 9, .c = 64, .scale = 1, .offset = 1000},
};
#define N_CASES ((int)(sizeof cases / sizeof *cases))

/* Backward gets the device's mean and rstd on both sides: it is tested by itself, and its y is to
 * be forward's. */
static void test_layernorm(void **state)
{
    const struct layernorm_case *k = *state;
    struct twins s = twins_new_on(gpu_device(), k->dtype);
    int64_t n = k->n, c = k->c;
    struct twin x = twin_normal(&s, n * c, k->scale);
    for (int64_t i = 0; i < n * c; i++) x.ref[i] += k->offset;
    twin_send(&s, x);
    struct twin gamma = twin_normal(&s, c, 1), beta = twin_normal(&s, c, 1);
    struct twin y = twin_fill(&s, n * c, NAN), mean = twin_acc_fill(&s, n, NAN);
    struct twin rstd = twin_acc_fill(&s, n, NAN);
#define ARGS(side)                                                                                 \
    .n = n, .c = c, .eps = 1e-5, .x = x.side, .gamma = gamma.side, .beta = beta.side, .y = y.side, \
    .mean = mean.side, .rstd = rstd.side
    twin_run(&s, layernorm_fwd, ARGS(dev));
    ref_layernorm_fwd(&(struct srf_layernorm_fwd_args){ARGS(ref)});
#undef ARGS
    /* An offset is taken off x: what is left has lost offset / scale of its precision. */
    double lost = twin_acc_tol(&s, c) * fabs(k->offset) / k->scale;
    twin_close(&s, "y", y, twin_tol(&s, c) + lost, 1);
    twin_close(&s, "mean", mean, twin_acc_tol(&s, c), k->scale);
    twin_close(&s, "rstd", rstd, twin_acc_tol(&s, c) + lost, 0);

    struct twin dy = twin_normal(&s, n * c, 1), dx = twin_normal(&s, n * c, 1);
    struct twin dgamma = twin_acc_normal(&s, c, 1), dbeta = twin_acc_normal(&s, c, 1);
    struct twin dx_sum = twin_acc_normal(&s, c, 1), again = twin_fill(&s, n * c, NAN);
    double *m = twin_values(&s, mean), *r = twin_values(&s, rstd);
    twin_set(&s, &mean, m);
    twin_set(&s, &rstd, r);
    srf__free(m), srf__free(r);
    double largest = 0;
    for (int64_t i = 0; i < n; i++) largest = fmax(largest, rstd.ref[i]);
#define ARGS(side)                                                                                 \
    .n = n, .c = c, .x = x.side, .gamma = gamma.side, .dy = dy.side, .mean = mean.side,            \
    .rstd = rstd.side, .dx = dx.side, .dgamma = dgamma.side, .dbeta = dbeta.side,                  \
    .dx_sum = dx_sum.side, .beta = beta.side, .y = again.side
    twin_run(&s, layernorm_bwd, ARGS(dev));
    ref_layernorm_bwd(&(struct srf_layernorm_bwd_args){ARGS(ref)});
#undef ARGS
    twin_close(&s, "dx", dx, twin_tol(&s, c), largest);
    twin_close(&s, "dgamma", dgamma, twin_acc_tol(&s, n) + lost, sqrt((double)n));
    twin_close(&s, "dbeta", dbeta, twin_acc_tol(&s, n), sqrt((double)n));
    twin_close(&s, "dx_sum", dx_sum, twin_tol(&s, n + c), (1 + largest) * sqrt((double)n));
    double *first = twin_values(&s, y), *second = twin_values(&s, again);
    twin_check(&s, "y again", second, first, n * c, 0);
    srf__free(first), srf__free(second);
    twins_free(&s);
}

/* A constant row has no variance: y is beta exactly, and nothing is infinite. A NaN stays in its
 * row. */
static void test_special(void **state)
{
    const struct layernorm_case *k = *state;
    enum { N = 6, C = 333, NAN_ROW = 4 };
    struct twins s = twins_new_on(gpu_device(), k->dtype);
    struct twin x = twin_fill(&s, N * C, 0.5), gamma = twin_normal(&s, C, 1);
    struct twin beta = twin_normal(&s, C, 1), y = twin_fill(&s, N * C, 7);
    struct twin mean = twin_acc_fill(&s, N, 7), rstd = twin_acc_fill(&s, N, 7);
    x.ref[NAN_ROW * C + 200] = NAN;
    twin_send(&s, x);
    twin_run(&s, layernorm_fwd, .n = N, .c = C, .eps = 1e-5, .x = x.dev, .gamma = gamma.dev,
             .beta = beta.dev, .y = y.dev, .mean = mean.dev, .rstd = rstd.dev);
    for (int i = 0; i < N * C; i++) y.ref[i] = i / C == NAN_ROW ? NAN : beta.ref[i % C];
    twin_close(&s, "y", y, 0, 0);
    twins_free(&s);
}

int main(int argc, char **argv)
{
    static struct gpu_suite suite;
    for (int type = 0; type < gpu_n_dtypes(); type++)
        for (int i = 0; i <= N_CASES; i++) {
            struct layernorm_case k = cases[i % N_CASES];
            k.dtype = gpu_dtype(type);
            if (i == N_CASES)
                gpu_add(&suite, test_special, &k, sizeof k, 0, "layernorm %s constant, NaN",
                        srf_dtype_name(k.dtype));
            else
                gpu_add(&suite, test_layernorm, &k, sizeof k,
                        (double)k.n * (double)k.c * (double)k.c,
                        "layernorm %s n=%d c=%d scale=%g offset=%g", srf_dtype_name(k.dtype),
                        (int)k.n, (int)k.c, k.scale, k.offset);
        }
    return gpu_run(&suite, argc > 1 ? argv[1] : NULL);
}
