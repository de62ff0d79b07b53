/* xent, head_loss and mse on the GPU. */
#include "tests/ref/dense.h"
#include "tests/ref/gpu.h"

#include <string.h>

struct loss_case {
    enum srf_dtype dtype;
    int64_t n, v, ld;
    double scale, offset; /* logits = offset + scale N(0, 1); the teacher's, 1.5 offset + ... */
    bool teacher, gradient, in_place, kl_out, kl_only, light;
};

/* Padding between rows is NaN: it is not read, and 0 in dlogits. */
static void test_xent(void **state)
{
    const struct loss_case *k = *state;
    struct twins s = twins_new_on(gpu_device(), k->dtype);
    int64_t n = k->n, v = k->v, ld = k->ld ? k->ld : v;
    struct twin logits = twin_normal(&s, n * ld, k->scale);
    struct twin teacher = twin_normal(&s, n * ld, k->scale);
    for (int64_t i = 0; i < n * ld; i++) {
        bool pad = i % ld >= v; /* not read */
        logits.ref[i] = pad ? NAN : logits.ref[i] + k->offset;
        teacher.ref[i] = pad ? NAN : teacher.ref[i] + 1.5 * k->offset;
    }
    twin_send(&s, logits);
    twin_send(&s, teacher);
    int32_t *ids = srf__alloc((size_t)n, sizeof *ids);
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 2, (uint32_t)n, (uint32_t)v);
    for (int64_t i = 0; i < n; i++)
        ids[i] = i % 5 == 3 ? -1 - (int32_t)(i % 2) * 99 : (int32_t)srf_rng_below(&r, (uint64_t)v);
    struct twin_raw targets = twin_raw_of(&s, ids, (size_t)n * sizeof *ids);
    srf__free(ids);
    struct twin nll = twin_acc_fill(&s, n, NAN), kl = twin_acc_fill(&s, n, NAN);
    struct twin d = twin_fill(&s, n * ld, NAN), kept = twin_of(&s, logits.ref, n * ld);
#define ARGS(side)                                                                                 \
    .n = n, .v = v, .ld = k->ld, .logits = logits.side, .targets = targets.side,                   \
    .teacher = k->teacher ? teacher.side : NULL, .scale = 0.37, .ce_weight = k->kl_only ? 0 : 0.8, \
    .kl_weight = 2.5, .nll = nll.side, .kl = k->kl_out ? kl.side : NULL,                           \
    .dlogits = k->in_place ? logits.side : (k->gradient ? d.side : NULL)
    twin_run(&s, xent, ARGS(dev));
    ref_xent(&(struct srf_xent_args){ARGS(ref)});
#undef ARGS
    double grow = 4 + k->scale + sqrt((double)v) / 4, tol = twin_acc_tol(&s, 1) * grow;
    twin_close(&s, "nll", nll, tol, 1 + k->scale);
    if (k->teacher) twin_close(&s, "kl", kl, 2 * tol, 1 + k->scale);
    twin_close(&s, k->in_place ? "dlogits in place" : "dlogits", k->in_place ? logits : d,
               2 * tol + twin_tol(&s, 1), 0);
    if (!k->in_place) {
        memcpy(logits.ref, kept.ref, (size_t)(n * ld) * sizeof *kept.ref);
        twin_close(&s, "logits kept", logits, 0, 0);
    }
    twins_free(&s);
}

/* NaN and +inf logits show; -inf means probability 0; rows without a target count nothing. */
static void test_nonfinite(void **state)
{
    const struct loss_case *k = *state;
    enum { N = 6, V = 300 };
    struct twins s = twins_new_on(gpu_device(), k->dtype);
    const int32_t ids[N] = {1, 1, 1, -1, 1, 1};
    double x[N * V], t[N * V];
    test_normal(x, N * V, 1, 7);
    test_normal(t, N * V, 1, 8);
    x[0 * V + 230] = NAN;
    x[1 * V + 0] = INFINITY;
    x[2 * V + 0] = -INFINITY;
    x[3 * V + 5] = NAN;
    x[4 * V + 1] = -INFINITY;
    t[5 * V + 7] = -INFINITY; /* 0 log 0 = 0 */
    struct twin logits = twin_of(&s, x, N * V), teacher = twin_of(&s, t, N * V);
    struct twin nll = twin_acc_fill(&s, N, 0), kl = twin_acc_fill(&s, N, 0);
    struct twin d = twin_fill(&s, N * V, 0);
    struct twin_raw targets = twin_raw_of(&s, ids, sizeof ids);
    twin_run(&s, xent, .n = N, .v = V, .logits = logits.dev, .targets = targets.dev,
             .teacher = teacher.dev, .scale = 1, .ce_weight = 1, .kl_weight = 1, .nll = nll.dev,
             .kl = kl.dev, .dlogits = d.dev);
    double *l = twin_values(&s, nll), *m = twin_values(&s, kl), *g = twin_values(&s, d);
    for (int i = 0; i < N; i++) print_message("    row %d: nll %g, kl %g\n", i, l[i], m[i]);
    assert_true(isnan(l[0]) && isnan(l[1]) && isfinite(l[2]) && l[3] == 0);
    assert_true(l[4] == INFINITY && isfinite(l[5]));
    assert_true(isnan(m[0]) && isnan(m[1]) && m[2] == INFINITY && m[3] == 0 && isfinite(m[5]));
    assert_true(isnan(g[0]) && isnan(g[V + 3]));
    for (int j = 0; j < V; j++)
        assert_true(isfinite(g[2 * V + j]) && g[3 * V + j] == 0 && isfinite(g[5 * V + j]));
    srf__free(l), srf__free(m), srf__free(g);
    twins_free(&s);
}

struct head_case {
    enum srf_dtype dtype;
    int64_t n, c, v, ld;
    double scale; /* of the logits */
    double far; /* every seventh row has a logit of about this for a word that is not its target */
    bool light;
};

/* Rows of w from v on are there and do not count. */
static void test_head(void **state)
{
    const struct head_case *k = *state;
    struct twins s = twins_new_on(gpu_device(), k->dtype);
    int64_t n = k->n, c = k->c, v = k->v, ld = k->ld;
    struct twin x = twin_normal(&s, n * c, 1);
    struct twin w = twin_normal(&s, ld * c, k->scale / sqrt((double)c));
    int32_t *ids = srf__alloc((size_t)n, sizeof *ids);
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 3, (uint32_t)n, (uint32_t)v);
    for (int64_t i = 0; i < n; i++) {
        ids[i] = i % 5 == 3 ? -1 : (int32_t)srf_rng_below(&r, (uint64_t)v);
        int64_t other = (ids[i] + 1) % v;
        for (int64_t j = 0; j < c && k->far != 0 && i % 7 == 0; j++)
            x.ref[i * c + j] = k->far / (k->scale * k->scale) * w.ref[other * c + j];
    }
    twin_send(&s, x);
    struct twin_raw targets = twin_raw_of(&s, ids, (size_t)n * sizeof *ids);
    srf__free(ids);
    struct twin logits = twin_fill(&s, n * ld, NAN), nll = twin_acc_fill(&s, n, NAN);
    struct twin dx = twin_fill(&s, n * c, NAN), dw = twin_acc_normal(&s, ld * c, 0.01);
#define ARGS(side)                                                                                 \
    .n = n, .c = c, .v = v, .ld = ld, .x = x.side, .w = w.side, .targets = targets.side,           \
    .scale = 0.37, .ce_weight = 0.8, .logits = logits.side, .nll = nll.side, .dx = dx.side,        \
    .dw = dw.side
    twin_run(&s, head_loss, ARGS(dev));
    ref_head_loss(&(struct srf_head_loss_args){ARGS(ref)});
#undef ARGS
    double largest = k->scale * 4 + fabs(k->far), tol = 4 * twin_tol(&s, 1);
    /* a logit is off by so much, absolutely: nll too, and gradients relatively */
    double off = twin_tol(&s, 1) * largest;
    twin_close(&s, "nll", nll, twin_tol(&s, 1), largest);
    twin_close(&s, "dx", dx, tol + off, 0);
    twin_close(&s, "dw", dw, tol + off, 0);
    twins_free(&s);
}

/* As xent: what is not finite shows in its own row, and a row without a target counts nothing. */
static void test_head_nonfinite(void **state)
{
    const struct head_case *k = *state;
    enum { N = 140, C = 64, V = 200 };
    struct twins s = twins_new_on(gpu_device(), k->dtype);
    int32_t ids[N];
    for (int i = 0; i < N; i++) ids[i] = i % 9 == 4 ? -1 : i;
    struct twin x = twin_normal(&s, N * C, 1), w = twin_normal(&s, V * C, 0.1);
    x.ref[2 * C + 5] = NAN, x.ref[4 * C + 1] = NAN, x.ref[131 * C + 63] = INFINITY;
    twin_send(&s, x);
    struct twin logits = twin_fill(&s, N * V, NAN), nll = twin_acc_fill(&s, N, -1);
    struct twin dx = twin_fill(&s, N * C, -1), dw = twin_acc_fill(&s, V * C, 0);
    struct twin_raw targets = twin_raw_of(&s, ids, sizeof ids);
    twin_run(&s, head_loss, .n = N, .c = C, .v = V, .ld = V, .x = x.dev, .w = w.dev,
             .targets = targets.dev, .scale = 1, .ce_weight = 1, .logits = logits.dev,
             .nll = nll.dev, .dx = dx.dev, .dw = dw.dev);
    double *l = twin_values(&s, nll), *d = twin_values(&s, dx), *g = twin_values(&s, dw);
    for (int i = 0; i < N; i++) {
        bool bad = i == 2 || i == 131, none = ids[i] < 0;
        assert_true(bad ? !isfinite(l[i]) : none ? l[i] == 0 : isfinite(l[i]));
        for (int j = 0; j < C; j++)
            assert_true(bad    ? !isfinite(d[i * C + j])
                        : none ? d[i * C + j] == 0
                               : isfinite(d[i * C + j]));
    }
    assert_true(!isfinite(g[5]) && !isfinite(g[(V - 1) * C + 5]));
    srf__free(l), srf__free(d), srf__free(g);
    twins_free(&s);
}

static void test_mse(void **state)
{
    const struct loss_case *k = *state;
    struct twins s = twins_new_on(gpu_device(), k->dtype);
    struct twin x = twin_normal(&s, k->n, 1), y = twin_normal(&s, k->n, 1);
    struct twin dx = twin_normal(&s, k->n, 1), sum = twin_acc_fill(&s, 1, 2.5);
#define ARGS(side)                                                                                 \
    .n = k->n, .x = x.side, .y = y.side, .scale = 0.7, .dx = k->gradient ? dx.side : NULL,         \
    .sum = sum.side
    twin_run(&s, mse, ARGS(dev));
    ref_mse(&(struct srf_mse_args){ARGS(ref)});
#undef ARGS
    twin_close(&s, "sum", sum, twin_acc_tol(&s, 16), 0);
    twin_close(&s, "dx", dx, twin_tol(&s, 1), 1);
    twins_free(&s);
}

static void add_xent(struct gpu_suite *suite, const struct loss_case *k)
{
    double work = k->light ? GPU_LIGHT : (double)k->n * (double)k->v * 4;
    gpu_add(suite, test_xent, k, sizeof *k, work,
            "xent %s n=%d v=%d ld=%d scale=%g offset=%g%s%s%s%s", srf_dtype_name(k->dtype),
            (int)k->n, (int)k->v, (int)k->ld, k->scale, k->offset,
            k->in_place   ? " in place"
            : k->gradient ? " gradient"
                          : "",
            k->teacher ? " teacher" : "", k->kl_out ? " kl" : "", k->kl_only ? " kl only" : "");
}

static void add_head(struct gpu_suite *suite, const struct head_case *k)
{
    double work = k->light ? GPU_LIGHT : (double)k->n * (double)k->v * (double)k->c * 3;
    gpu_add(suite, test_head, k, sizeof *k, work,
            "head_loss %s n=%d c=%d v=%d ld=%d scale=%g far=%g", srf_dtype_name(k->dtype),
            (int)k->n, (int)k->c, (int)k->v, (int)k->ld, k->scale, k->far);
}

int main(int argc, char **argv)
{
    static const struct head_case heads[] = {
        {0, 1, 8, 1, 8, 1, 0, false},
        {0, 0, 64, 50, 56, 1, 0, false},
        {0, 3, 16, 5, 8, 1, 0, false},
        {0, 7, 24, 193, 200, 2, 0, false},
        {0, 130, 64, 384, 384, 2, 0, false},
        {0, 129, 72, 385, 392, 2, 60, false},
        {0, 300, 136, 1000, 1008, 1, 0, false},
        {0, 300, 64, 777, 784, 4, 300, false},
        {0, 257, 64, 777, 784, 1, -80, false},
        {0, 40, 768, 3000, 3008, 3, 30, false},
        {0, 700, 64, 12345, 12352, 2, 0, false},
        {0, 5, 30, 77, 77, 1, 0, false},
    };
    static const int64_t shapes[][3] = {
        {1, 1, 0},    {1, 2, 0},       {5, 17, 24},        {3, 512, 0},         {3, 513, 520},
        {2, 2048, 0}, {3, 4099, 4104}, {0, 9, 0},          {64, 300, 0},        {64, 301, 304},
        {7, 8192, 0}, {4, 50257, 0},   {11, 50257, 50304}, {5, 131072, 131072},
    };
    static const double ranges[][2] = {{10, 0}, {1, 64}, {1, -1024}, {300, 0}, {1e4, 1e5}, {1e30}};
    static const int64_t lengths[] = {1, 31, 1000, 70001, 300000, 0};
    static struct gpu_suite suite;
    for (int type = 0; type < gpu_n_dtypes(); type++) {
        struct loss_case k = {.dtype = gpu_dtype(type), .scale = 2};
        const char *dtype = srf_dtype_name(k.dtype);
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
            for (int what = 0; what < 24; what++) {
                if (shapes[i][0] * shapes[i][1] > 20000 && what % 5 != 3 && what != 2) continue;
                k.n = shapes[i][0], k.v = shapes[i][1], k.ld = shapes[i][2];
                k.in_place = what % 3 == 2;
                k.gradient = what % 3 == 1;
                k.teacher = what / 3 % 2;
                k.kl_out = k.teacher && what / 6 % 2;
                k.kl_only = k.teacher && what / 12 % 2;
                k.light = i == 4 || i == 9;
                if (!k.teacher && what / 6) continue;
                add_xent(&suite, &k);
            }
        for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
            struct loss_case range = {.dtype = k.dtype,
                                      .n = 6,
                                      .v = 700,
                                      .scale = ranges[i][0],
                                      .offset = ranges[i][1],
                                      .teacher = true,
                                      .gradient = true,
                                      .kl_out = true};
            add_xent(&suite, &range);
        }
        for (size_t i = 0; i < sizeof heads / sizeof *heads; i++) {
            struct head_case h = heads[i];
            h.dtype = k.dtype;
            h.light = i == 3 || i == 5;
            add_head(&suite, &h);
        }
        struct head_case nonfinite = {.dtype = k.dtype};
        gpu_add(&suite, test_head_nonfinite, &nonfinite, sizeof nonfinite, GPU_LIGHT,
                "head_loss %s NaN, inf", dtype);
        gpu_add(&suite, test_nonfinite, &k, sizeof k, GPU_LIGHT, "xent %s NaN, inf", dtype);
        for (size_t i = 0; i < 2 * sizeof lengths / sizeof *lengths; i++) {
            struct loss_case m = {.dtype = k.dtype, .n = lengths[i / 2], .gradient = i % 2};
            gpu_add(&suite, test_mse, &m, sizeof m, m.n <= 1000 ? GPU_LIGHT : (double)m.n,
                    "mse %s n=%d%s", dtype, (int)m.n, m.gradient ? " gradient" : "");
        }
    }
    return gpu_run(&suite, argc > 1 ? argv[1] : NULL);
}
