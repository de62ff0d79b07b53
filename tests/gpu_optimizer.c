/* sumsq, adamw and features_draw on the GPU. */
#include "tests/ref/dense.h"
#include "tests/ref/gpu.h"

struct optimizer_case {
    enum srf_dtype dtype;
    int64_t n;
    int64_t at;   /* sumsq: an element that is not finite, or -1 */
    double value; /* what it is */
    struct srf_features_draw_args draw;
    bool oprf;
};

static void test_sumsq(void **state)
{
    const struct optimizer_case *k = *state;
    struct twins s = twins_new_on(gpu_device(), k->dtype);
    struct twin x = twin_acc_normal(&s, k->n, 3), sum = twin_acc_fill(&s, 1, 1.25);
    if (k->at >= 0) {
        x.ref[k->at] = k->value;
        twin_send(&s, x);
    }
    twin_run(&s, sumsq, .n = k->n, .x = x.dev, .sum = sum.dev);
    ref_sumsq(&(struct srf_sumsq_args){.n = k->n, .x = x.ref, .sum = sum.ref});
    twin_close(&s, "sum", sum, twin_acc_tol(&s, 16), 0);
    twins_free(&s);
}

/* Many steps beside the reference, with gradients below and above the clipping norm, and steps
 * whose norm is not finite, which must change nothing but the count. */
static void test_adamw(void **state)
{
    enum { STEPS = 25 };
    const struct optimizer_case *k = *state;
    struct twins s = twins_new_on(gpu_device(), k->dtype);
    int64_t n = k->n, pieces = (n + 63) / 64;
    bool bf16 = k->dtype == SRF_BF16;
    struct twin p = twin_normal(&s, n, 0.1), g = twin_acc_normal(&s, n, 1);
    struct twin m = twin_acc_fill(&s, n, 0), v = twin_acc_fill(&s, n, 0);
    struct twin sum = twin_acc_fill(&s, 1, 0), master = twin_acc_of(&s, p.ref, n);
    uint8_t *flags = srf__alloc((size_t)pieces, 1);
    double *noise = srf__alloc((size_t)n, sizeof *noise);
    assert_true(flags && noise);
    for (int64_t i = 0; i < pieces; i++) flags[i] = i % 3 == 1 ? (uint8_t)(1 + i % 200) : 0;
    struct twin_raw no_decay = twin_raw_of(&s, flags, (size_t)pieces);
    struct twin_raw skips = twin_raw_of(&s, (int32_t[2]){5, 2}, 2 * sizeof(int32_t));
    for (int step = 1; step <= STEPS; step++) {
        test_normal(noise, n, step % 3 == 0 ? 30 : 0.02, 100 + (uint32_t)step);
        twin_set(&s, &g, noise);
        double sumsq = step == 13 ? NAN : step == 14 || step == 17 ? INFINITY : 0;
        if (sumsq == 0) sumsq = test_dot(g.ref, g.ref, n);
        twin_set(&s, &sum, &sumsq);
        bool clipped = step % 4 != 1 || step == 13 || step == 17;
        bool counted = step % 2 || step == 14;
#define ARGS(side, param_of, master_of)                                                            \
    .n = n, .step = step, .lr = 0.01 / step, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,             \
    .weight_decay = 0.1, .grad_scale = 0.25, .max_norm = 1.5,                                      \
    .clip_sumsq = clipped ? sum.side : NULL, .skips = counted ? skips.side : NULL,                 \
    .no_decay = step % 5 ? no_decay.side : NULL, .grad = g.side, .param = param_of,                \
    .master = master_of, .m = m.side, .v = v.side
        twin_run(&s, adamw, ARGS(dev, p.dev, bf16 ? master.dev : NULL));
        ref_adamw(&(struct srf_adamw_args){ARGS(ref, master.ref, NULL)});
#undef ARGS
        int32_t count[2];
        twin_raw_values(&s, skips, count);
        assert_memory_equal(count, skips.ref, sizeof count);
    }
    twin_close(&s, "m", m, twin_acc_tol(&s, STEPS), 0);
    twin_close(&s, "v", v, twin_acc_tol(&s, STEPS), 0);
    if (bf16) {
        twin_close(&s, "master", master, 4 * twin_acc_tol(&s, STEPS), 0);
        /* The parameters are the master copy, rounded: not one of them moves by itself. */
        double *rounded = twin_values(&s, master);
        twin_set(&s, &g, rounded);
        struct twin want = twin_of(&s, g.ref, n);
        double *got = twin_values(&s, p);
        if (!test_is_close("param = rounded master", got, want.ref, n, 0)) s.failures++;
        srf__free(rounded), srf__free(got);
    } else {
        for (int64_t i = 0; i < n; i++) p.ref[i] = master.ref[i];
        twin_close(&s, "param", p, 4 * twin_acc_tol(&s, STEPS), 0);
    }
    srf__free(flags), srf__free(noise);
    twins_free(&s);
}

/* The op against the host's draw in double. */
static void test_features(void **state)
{
    const struct optimizer_case *k = *state;
    struct twins s = twins_new_on(gpu_device(), k->dtype);
    struct srf_features_draw_args a = k->draw;
    int64_t sets = a.n_layers * a.n_sets, count = a.m * a.d;
    double *oprf = srf__alloc((size_t)sets, sizeof *oprf);
    assert_non_null(oprf);
    for (int64_t i = 0; i < sets; i++) oprf[i] = k->oprf ? -0.02 * (double)(1 + i % 4) : 0;
    struct twin w = twin_fill(&s, sets * count, NAN), bias = twin_acc_fill(&s, sets * a.m, NAN);
    a.oprf_a = k->oprf ? oprf : NULL;
    twin_run(&s, features_draw, .kind = a.kind, .rotation = a.rotation,
             .normalize_rows = a.normalize_rows, .seed = a.seed, .draw = a.draw,
             .n_layers = a.n_layers, .n_sets = a.n_sets, .m = a.m, .d = a.d, .oprf_a = a.oprf_a,
             .w = w.dev, .bias = bias.dev);
    for (int64_t i = 0; i < sets; i++)
        test_ok(srf_features_draw_one(&a, i / a.n_sets, i % a.n_sets, oprf[i], w.ref + i * count,
                                      bias.ref + i * a.m));
    twin_close(&s, "w", w, k->dtype == SRF_BF16 ? twin_tol(&s, 1) : 1e-5, 0);
    twin_close(&s, "bias", bias, 1e-5, 0);
    srf__free(oprf);
    twins_free(&s);
}

static void add_draws(struct gpu_suite *suite, enum srf_dtype dtype)
{
    static const int64_t shapes[][4] = {
        /* layers, sets, m, d */
        {1, 1, 1, 2},    {2, 1, 64, 64},   {3, 2, 100, 32}, {1, 3, 256, 64}, {2, 1, 33, 80},
        {1, 1, 128, 96}, {1, 2, 512, 128}, {6, 1, 256, 64}, {2, 2, 7, 7},    {1, 1, 40, 16},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int kind = SRF_IID; kind <= SRF_SIMPLEX_PLUS; kind++)
            for (int rotation = SRF_ROT_HAAR; rotation <= SRF_ROT_HD; rotation++) {
                int64_t d = shapes[i][3];
                if (rotation == SRF_ROT_HD && d & (d - 1)) continue;
                struct optimizer_case k = {.dtype = dtype,
                                           .draw = {.kind = (enum srf_feature_kind)kind,
                                                    .rotation = (enum srf_rotation)rotation,
                                                    .normalize_rows = (i + (size_t)kind) % 7 == 4,
                                                    .seed = test_seed() ^ 0x9e3779b97f4a7c15,
                                                    .draw = ((uint64_t)i << 32) + 3,
                                                    .n_layers = shapes[i][0],
                                                    .n_sets = shapes[i][1],
                                                    .m = shapes[i][2],
                                                    .d = d},
                                           .oprf = (i + (size_t)kind) % 3 == 1};
                gpu_add(suite, test_features, &k, sizeof k,
                        (double)(shapes[i][0] * shapes[i][1] * shapes[i][2] * d * d) / 8,
                        "features_draw %s %s %s layers=%d sets=%d m=%d d=%d%s%s",
                        srf_dtype_name(dtype), srf_feature_kind_name(k.draw.kind),
                        srf_rotation_name(k.draw.rotation), (int)shapes[i][0], (int)shapes[i][1],
                        (int)shapes[i][2], (int)d, k.oprf ? " oprf" : "",
                        k.draw.normalize_rows ? " unit rows" : "");
            }
}

int main(int argc, char **argv)
{
    static const int64_t lengths[] = {1, 5, 1023, 32768, 32769, 200003, 1000001, 0};
    static const int64_t adamw_lengths[] = {1, 63, 64, 65, 5003, 20011};
    static struct gpu_suite suite;
    for (int type = 0; type < gpu_n_dtypes(); type++) {
        struct optimizer_case k = {.dtype = gpu_dtype(type), .at = -1};
        const char *dtype = srf_dtype_name(k.dtype);
        for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
            k.n = lengths[i];
            gpu_add(&suite, test_sumsq, &k, sizeof k, (double)k.n, "sumsq %s n=%d", dtype,
                    (int)k.n);
        }
        k.n = 70000;
        for (int i = 0; i < 6; i++) {
            k.at = i / 2 * (k.n - 1) / 2;
            k.value = i % 2 ? INFINITY : NAN;
            gpu_add(&suite, test_sumsq, &k, sizeof k, (double)k.n, "sumsq %s n=%d, %g at %d", dtype,
                    (int)k.n, k.value, (int)k.at);
        }
        for (size_t i = 0; i < sizeof adamw_lengths / sizeof *adamw_lengths; i++) {
            k.n = adamw_lengths[i];
            gpu_add(&suite, test_adamw, &k, sizeof k, 25 * (double)k.n, "adamw %s n=%d", dtype,
                    (int)k.n);
        }
        add_draws(&suite, k.dtype);
    }
    return gpu_run(&suite, argc > 1 ? argv[1] : NULL);
}
