/* linear_fwd, linear_bwd, act_fwd, norm_linear_fwd on the GPU: bias, residual, activation, both
 * layouts of W, odd sizes, rows that a norm finds hard. */
#include "kernels/slope.h"
#include "tests/ref/dense.h"
#include "tests/ref/gpu.h"

#include <string.h>

static const int64_t shapes[][3] = {
    {1, 1, 1},        {1, 7, 5},       {3, 1, 2},       {5, 17, 13},    {33, 64, 65},
    {0, 16, 16},      {37, 41, 97},    {128, 64, 192},  {64, 384, 128}, {257, 128, 512},
    {200, 96, 288},   {130, 512, 130}, {64, 100, 1001}, {512, 256, 64}, {1, 768, 768},
    {300, 200, 392},                   /* tiles of the products with a slope */
    {3001, 8, 2056},                   /* bias gradients: more rows than blocks take at once */
    {8200, 40, 72},                    /* and rows from which on dx's product makes them */
    {1000, 200, 392}, {500, 192, 384}, /* slopes as the products have them */
};
#define N_SHAPES ((int)(sizeof shapes / sizeof *shapes))

struct linear_case {
    enum srf_dtype dtype;
    int64_t n, in, out;
    bool transposed, bias, exact_rows;
    enum { NO_RESIDUAL, OTHER, ITSELF } residual;
    bool act, keep_pre, keep_slope;     /* forward */
    bool activated, sloped, accumulate; /* backward: x was an activation, dx += */
    bool want_dx, want_dw, want_db;
    bool light;
};

/* Slopes (n, c), in the reference; on the device, what linear_fwd keeps. */
static struct twin slopes_room(struct twins *s, int64_t n, int64_t c)
{
    int64_t size = (int64_t)srf_dtype_bytes(s->ctx->dtype);
    int64_t count = (srf_slope_bytes(s->ctx->dtype, n, c) + size - 1) / size;
    return twin_fill(s, count > n * c ? count : n * c, NAN);
}

/* What linear_fwd kept of slopes (n, c), by way of a layer whose dx they are. */
static struct twin slopes_seen(struct twins *s, struct twin slope, int64_t n, int64_t c)
{
    struct twin ones = twin_fill(s, n > c ? n : c, 1), dx = twin_fill(s, n * c, NAN);
    twin_run(s, linear_bwd, .n = n, .in = c, .out = 1, .w = ones.dev, .dy = ones.dev,
             .x_slope = slope.dev, .dx = dx.dev);
    memcpy(dx.ref, slope.ref, (size_t)(n * c) * sizeof *dx.ref);
    return dx;
}

static void test_fwd(void **state)
{
    const struct linear_case *k = *state;
    struct twins s = twins_new_on(gpu_device(), k->dtype);
    int64_t n = k->n, in = k->in, out = k->out;
    struct twin x = twin_normal(&s, n * in, 1), w = twin_normal(&s, in * out, 1);
    struct twin b = twin_normal(&s, out, 1), pre = twin_fill(&s, n * out, NAN);
    struct twin slope = slopes_room(&s, n, out);
    bool itself = k->residual == ITSELF;
    struct twin y = itself ? twin_normal(&s, n * out, 1) : twin_fill(&s, n * out, NAN);
    struct twin r = itself ? y : twin_normal(&s, n * out, 1);
    s.ctx->exact_rows = k->exact_rows;
#define ARGS(side)                                                                                 \
    .n = n, .in = in, .out = out, .x = x.side, .w = w.side, .w_transposed = k->transposed,         \
    .b = k->bias ? b.side : NULL, .residual = k->residual ? r.side : NULL,                         \
    .act = k->act ? SRF_ACT_GELU_TANH : SRF_ACT_NONE, .pre = k->keep_pre ? pre.side : NULL,        \
    .slope = k->keep_slope ? slope.side : NULL, .y = y.side
    twin_run(&s, linear_fwd, ARGS(dev));
    ref_linear_fwd(&(struct srf_linear_fwd_args){ARGS(ref)});
#undef ARGS
    twin_close(&s, "y", y, twin_tol(&s, in), sqrt((double)in));
    twin_close(&s, "pre", pre, twin_tol(&s, in), sqrt((double)in));
    if (k->keep_slope)
        twin_close(&s, "slope", slopes_seen(&s, slope, n, out), twin_tol(&s, in), sqrt((double)in));
    twins_free(&s);
}

/* exact_rows, fp32: a row is the same whatever the number of rows. */
static void test_exact(void **state)
{
    const struct linear_case *k = *state;
    static const int64_t some[] = {1, 2, 5, 8, 9, 31, 33, 64, 256, 300, 1200, 8190};
    struct twins s = twins_new_on(gpu_device(), k->dtype);
    int64_t n = k->n, in = k->in, out = k->out;
    struct twin x = twin_normal(&s, n * in, 1), w = twin_normal(&s, in * out, 1);
    struct twin b = twin_normal(&s, out, 1), r = twin_normal(&s, n * out, 1);
    struct twin y = twin_fill(&s, n * out, NAN), part = twin_fill(&s, n * out, NAN);
    s.ctx->exact_rows = true;
    s.twice = false;
#define ARGS(rows, side)                                                                           \
    .n = rows, .in = in, .out = out, .x = x.side, .w = w.side, .w_transposed = k->transposed,      \
    .b = k->bias ? b.side : NULL, .residual = k->residual ? r.side : NULL,                         \
    .act = k->act ? SRF_ACT_GELU_TANH : SRF_ACT_NONE
    twin_run(&s, linear_fwd, ARGS(n, dev), .y = y.dev);
    double *all = twin_values(&s, y);
    for (size_t i = 0; i < sizeof some / sizeof *some && some[i] <= n; i++) {
        twin_run(&s, linear_fwd, ARGS(some[i], dev), .y = part.dev);
        double *got = twin_values(&s, part);
        int64_t other = 0;
        for (int64_t j = 0; j < some[i] * out; j++) other += !(got[j] == all[j]);
        if (other) {
            print_error("%d rows of %d: %d elements have other bits\n", (int)some[i], (int)n,
                        (int)other);
            s.failures++;
        }
        srf__free(got);
    }
#undef ARGS
    srf__free(all);
    twins_free(&s);
}

static void test_bwd(void **state)
{
    const struct linear_case *k = *state;
    struct twins s = twins_new_on(gpu_device(), k->dtype);
    int64_t n = k->n, in = k->in, out = k->out;
    struct twin x = twin_normal(&s, n * in, 1), w = twin_normal(&s, in * out, 1);
    struct twin dy = twin_normal(&s, n * out, 1), pre = twin_normal(&s, n * in, 2);
    struct twin dx = k->accumulate ? twin_normal(&s, n * in, 1) : twin_fill(&s, n * in, NAN);
    struct twin dw = twin_acc_normal(&s, in * out, 1), db = twin_acc_normal(&s, out, 1);
    struct twin dx_sum = twin_acc_normal(&s, in, 1), slope = pre;
    if (k->sloped) { /* by a layer that has a product of its own, or has not */
        int64_t behind = k->want_dw ? 8 : 7;
        struct twin u = twin_normal(&s, n * behind, 1), v = twin_normal(&s, behind * in, 0.5);
        struct twin y = twin_fill(&s, n * in, NAN);
        slope = slopes_room(&s, n, in);
#define ARGS(side)                                                                                 \
    .n = n, .in = behind, .out = in, .x = u.side, .w = v.side, .act = SRF_ACT_GELU_TANH,           \
    .slope = slope.side, .y = y.side
        twin_run(&s, linear_fwd, ARGS(dev));
        ref_linear_fwd(&(struct srf_linear_fwd_args){ARGS(ref)});
#undef ARGS
    }
#define ARGS(side)                                                                                 \
    .n = n, .in = in, .out = out, .x = x.side, .w = w.side, .dy = dy.side,                         \
    .w_transposed = k->transposed, .x_pre = k->activated ? pre.side : NULL,                        \
    .x_act = k->activated ? SRF_ACT_GELU_TANH : SRF_ACT_NONE, .dx_accumulate = k->accumulate,      \
    .x_slope = k->sloped ? slope.side : NULL, .dx_sum = k->want_db ? dx_sum.side : NULL,           \
    .dx = k->want_dx ? dx.side : NULL, .dw = k->want_dw ? dw.side : NULL,                          \
    .db = k->want_db ? db.side : NULL
    twin_run(&s, linear_bwd, ARGS(dev));
    ref_linear_bwd(&(struct srf_linear_bwd_args){ARGS(ref)});
#undef ARGS
    twin_close(&s, "dx", dx, twin_tol(&s, out), sqrt((double)out));
    twin_close(&s, "dw", dw, twin_acc_tol(&s, n), sqrt((double)n));
    twin_close(&s, "db", db, twin_acc_tol(&s, n), sqrt((double)n));
    /* of dx as it was rounded */
    twin_close(&s, "dx_sum", dx_sum, twin_tol(&s, out), sqrt((double)out * (double)n));
    twins_free(&s);
}

/* GELU and its slope by themselves, through a layer of 1 x 1 with W = 1: over [-12, 12], and where
 * exponentials overflow. */
static void test_gelu(void **state)
{
    const struct linear_case *k = *state;
    enum { GRID = 4801, EXTREMES = 8, N = GRID + EXTREMES };
    static const double extremes[EXTREMES] = {1e4, -1e4, 100, -100, 40, -40, 1e30, -1e30};
    struct twins s = twins_new_on(gpu_device(), k->dtype);
    double u[N];
    for (int i = 0; i < GRID; i++) u[i] = (i - GRID / 2) * 0.005;
    for (int i = 0; i < EXTREMES; i++) u[GRID + i] = extremes[i];
    struct twin x = twin_of(&s, u, N), one = twin_fill(&s, 1, 1), y = twin_fill(&s, N, NAN);
    struct twin dy = twin_fill(&s, N, 1), dx = twin_fill(&s, N, NAN);
    struct twin alone = twin_fill(&s, N, NAN), none = twin_fill(&s, N, NAN);
    twin_run(&s, linear_fwd, .n = N, .in = 1, .out = 1, .x = x.dev, .w = one.dev,
             .act = SRF_ACT_GELU_TANH, .y = y.dev);
    twin_run(&s, act_fwd, .n = N, .act = SRF_ACT_GELU_TANH, .x = x.dev, .y = alone.dev);
    twin_run(&s, act_fwd, .n = N, .act = SRF_ACT_NONE, .x = x.dev, .y = none.dev);
    twin_run(&s, linear_bwd, .n = N, .in = 1, .out = 1, .x = y.dev, .w = one.dev, .dy = dy.dev,
             .x_pre = x.dev, .x_act = SRF_ACT_GELU_TANH, .dx = dx.dev);
    double *got = twin_values(&s, y), *slope = twin_values(&s, dx);
    for (int i = 0; i < N; i++) alone.ref[i] = got[i], none.ref[i] = x.ref[i];
    twin_close(&s, "act_fwd", alone, twin_tol(&s, 1), 0);
    twin_close(&s, "act_fwd, none", none, 0, 0);
    double tol = twin_tol(&s, 1), worst = 0, worst_slope = 0;
    for (int i = 0; i < N; i++) {
        double v = x.ref[i], r = 2 * sqrt(2 / M_PI) * (v + 0.044715 * v * v * v);
        double sig = 1 / (1 + exp(-r)), want = v * sig;
        double want_slope = sig, tail = want / (1 + exp(r));
        if (tail != 0) want_slope += tail * 2 * sqrt(2 / M_PI) * (1 + 3 * 0.044715 * v * v);
        /* Absolute for |v| <= 1: the tails of the left may lose their relative precision. */
        double err = fabs(got[i] - want) / fmax(1, fabs(v)),
               err_slope = fabs(slope[i] - want_slope);
        if (!(err <= tol)) fail_msg("gelu(%g) = %.9g, want %.9g", v, got[i], want);
        if (!(err_slope <= tol)) fail_msg("gelu'(%g) = %.9g, want %.9g", v, slope[i], want_slope);
        worst = fmax(worst, err);
        worst_slope = fmax(worst_slope, err_slope);
    }
    print_message("    gelu error %.2e, slope %.2e of %.2e\n", worst, worst_slope, tol);
    srf__free(got), srf__free(slope);
    twins_free(&s);
}

struct norm_case {
    enum srf_dtype dtype;
    int64_t n, in, out;
    bool bias, act, chained; /* x comes of a layer, with moments */
    enum { PLAIN, FAR_MEAN, ONE_CHANNEL, ONE_NAN } rows;
    int64_t more; /* columns of the layer beside these */
    bool light;
};

/* Of x or, where that comes of a layer, of the layer's residual. */
static struct twin norm_rows(struct twins *s, const struct norm_case *k)
{
    struct twin x = twin_normal(s, k->n * k->in, 1);
    for (int64_t i = 0; i < k->n * k->in; i++) {
        if (k->rows == FAR_MEAN) x.ref[i] += i / k->in % 2 ? 100 : -60;
        if (k->rows == ONE_CHANNEL && i % k->in == k->in / 3) x.ref[i] = 3000 + 100 * x.ref[i];
    }
    if (k->rows == ONE_NAN) x.ref[k->n / 2 * k->in + 3] = NAN;
    twin_send(s, x);
    return x;
}

static void test_norm(void **state)
{
    const struct norm_case *k = *state;
    enum { BEHIND = 72 };
    struct twins s = twins_new_on(gpu_device(), k->dtype);
    int64_t n = k->n, in = k->in, out = k->out;
    int64_t ld = out + k->more;
    struct twin x = norm_rows(&s, k), w = twin_normal(&s, in * ld, 1);
    struct twin gamma = twin_normal(&s, in, 1), beta = twin_normal(&s, in, 1);
    struct twin b = twin_normal(&s, out, 1), y = twin_fill(&s, n * ld, k->more ? 7 : NAN);
    struct twin moments = twin_acc_fill(&s, srf_moments_count(s.ctx, n, in), NAN);
    if (k->chained) {
        struct twin u = twin_normal(&s, n * BEHIND, 1), v = twin_normal(&s, BEHIND * in, 0.1);
        struct twin c = twin_normal(&s, in, 1), sum = twin_fill(&s, n * in, NAN);
#define ARGS(side)                                                                                 \
    .n = n, .in = BEHIND, .out = in, .x = u.side, .w = v.side, .b = k->bias ? c.side : NULL,       \
    .residual = x.side, .y = sum.side
        twin_run(&s, linear_fwd, ARGS(dev), .moments = moments.dev);
        ref_linear_fwd(&(struct srf_linear_fwd_args){ARGS(ref)});
#undef ARGS
        if (k->rows != ONE_NAN) twin_close(&s, "x", sum, twin_tol(&s, BEHIND), 1);
        x = sum;
        double *rounded = twin_values(&s, x);
        memcpy(x.ref, rounded, (size_t)(n * in) * sizeof *rounded);
        srf__free(rounded);
    }
#define ARGS(side)                                                                                 \
    .n = n, .in = in, .out = out, .eps = 1e-5, .x = x.side, .gamma = gamma.side,                   \
    .beta = beta.side, .w = w.side, .b = k->bias ? b.side : NULL,                                  \
    .act = k->act ? SRF_ACT_GELU_TANH : SRF_ACT_NONE, .y = y.side, .ld = k->more ? ld : 0
    twin_run(&s, norm_linear_fwd, ARGS(dev), .moments = k->chained ? moments.dev : NULL);
    ref_norm_linear_fwd(&(struct srf_norm_linear_fwd_args){ARGS(ref)});
#undef ARGS
    if (k->rows == ONE_NAN) { /* that row alone */
        double *got = twin_values(&s, y);
        int64_t other = 0;
        for (int64_t i = 0; i < n * out; i++) other += isnan(got[i]) != (i / out == n / 2);
        if (other) fail_msg("%d elements are NaN that should not be, or are not", (int)other);
        srf__free(got);
    } else {
        /* in fp32 a mean of 100 takes its share of the digits */
        double far = k->rows == FAR_MEAN && k->dtype == SRF_F32 ? 100 : 1;
        twin_close(&s, "y", y, twin_tol(&s, in), far * sqrt((double)in));
    }
    twins_free(&s);
}

static void add_norms(struct gpu_suite *suite, enum srf_dtype dtype)
{
    /* From 8192 rows on in one product; the last row of tiles is not full. */
    static const int64_t sizes[][3] = {{33, 40, 24},     {8192, 64, 192},  {8196, 200, 392},
                                       {8447, 768, 200}, {8196, 400, 72},  {8705, 8, 768},
                                       {33000, 64, 584}, {8296, 1600, 64}, {8196, 66, 60}};
    static const char *const rows[] = {"", " far mean", " one channel", " NaN"};
    for (int i = 0; i < (int)(sizeof sizes / sizeof *sizes); i++)
        for (int turn = 0; turn < 8; turn++) {
            bool many = dtype == SRF_BF16 && i > 0 && sizes[i][1] % 8 == 0 && sizes[i][2] % 8 == 0;
            struct norm_case k = {.dtype = dtype,
                                  .n = sizes[i][0],
                                  .in = sizes[i][1],
                                  .out = sizes[i][2],
                                  .bias = turn != 3,
                                  .act = (turn >> 2 ^ turn) & 1,
                                  .chained = turn >= 4,
                                  .rows = turn & 3,
                                  .more = many && turn == 5 ? 64 : 0,
                                  .light = i < 2 && turn % 5 == 0};
            if (i > 3 && k.rows == ONE_NAN) continue;
            double work = k.light ? GPU_LIGHT : (double)k.n * (double)k.in * (double)k.out;
            gpu_add(suite, test_norm, &k, sizeof k, work,
                    "norm_linear_fwd %s n=%d in=%d out=%d%s%s%s%s%s", srf_dtype_name(dtype),
                    (int)k.n, (int)k.in, (int)k.out, k.bias ? " bias" : "", k.act ? " gelu" : "",
                    k.chained ? " moments" : "", rows[k.rows], k.more ? " of a wider layer" : "");
        }
}

static void add(struct gpu_suite *suite, const struct linear_case *k, bool bwd)
{
    double work = k->light ? GPU_LIGHT : (double)k->n * (double)k->in * (double)k->out;
    const char *dtype = srf_dtype_name(k->dtype), *layout = k->transposed ? " transposed" : "";
    if (bwd)
        gpu_add(suite, test_bwd, k, sizeof *k, k->light ? work : 2 * work,
                "linear_bwd %s n=%d in=%d out=%d%s%s%s%s%s%s%s", dtype, (int)k->n, (int)k->in,
                (int)k->out, layout, k->activated ? " activated" : "", k->sloped ? " slope" : "",
                k->accumulate ? " accumulate" : "", k->want_dx ? " dx" : "",
                k->want_dw ? " dw" : "", k->want_db ? " db" : "");
    else
        gpu_add(suite, test_fwd, k, sizeof *k, work,
                "linear_fwd %s n=%d in=%d out=%d%s%s%s%s%s%s%s", dtype, (int)k->n, (int)k->in,
                (int)k->out, layout, k->exact_rows ? " as infer" : "", k->bias ? " bias" : "",
                k->residual == ITSELF  ? " residual=y"
                : k->residual == OTHER ? " residual"
                                       : "",
                k->act ? " gelu" : "", k->keep_pre ? " pre" : "", k->keep_slope ? " slope" : "");
}

int main(int argc, char **argv)
{
    static struct gpu_suite suite;
    for (int type = 0; type < gpu_n_dtypes(); type++) {
        struct linear_case gelu = {.dtype = gpu_dtype(type)};
        gpu_add(&suite, test_gelu, &gelu, sizeof gelu, GPU_LIGHT, "gelu %s",
                srf_dtype_name(gelu.dtype));
        add_norms(&suite, gpu_dtype(type));
        static const int64_t exact[][2] = {{384, 1152}, {384, 384},  {384, 1536},
                                           {1536, 384}, {384, 2048}, {3333, 129}};
        /* Every kernel of exact rows, for slow checkers too; large tiles: theirs but for size. */
        static const int64_t rows[] = {1, 5, 20, 40, 2048};
        for (int i = 0; i < 20 && gelu.dtype == SRF_F32; i++) {
            int64_t n = rows[i / 4];
            bool large = n > 1000, odd = i & 2;
            struct linear_case k = {.dtype = SRF_F32,
                                    .n = n,
                                    .in = large ? 100
                                          : odd ? 203
                                                : 200,
                                    .out = large ? 2112
                                           : odd ? 67
                                                 : 68,
                                    .transposed = i & 1,
                                    .bias = i % 3 == 0,
                                    .residual = i % 3 == 1 ? ITSELF : NO_RESIDUAL,
                                    .act = i % 3 == 2,
                                    .exact_rows = true};
            if (large && odd) continue;
            gpu_add(&suite, test_fwd, &k, sizeof k, large ? 1e9 : GPU_LIGHT,
                    "linear_fwd f32 n=%d in=%d out=%d%s as infer", (int)k.n, (int)k.in, (int)k.out,
                    k.transposed ? " transposed" : "");
        }
        for (int i = 0; i < 6 && gelu.dtype == SRF_F32; i++)
            for (int turn = 0; turn < 3; turn++) {
                struct linear_case k = {.dtype = SRF_F32,
                                        .n = i == 3             ? 9000
                                             : i == 0 || i == 4 ? 4000
                                                                : 1200,
                                        .in = exact[i][0],
                                        .out = exact[i][1],
                                        .transposed = i == 4 || (i == 5 && turn == 1),
                                        .bias = turn > 0,
                                        .act = turn == 2,
                                        .residual = turn == 1 ? OTHER : NO_RESIDUAL};
                gpu_add(&suite, test_exact, &k, sizeof k, 2e9,
                        "linear_fwd f32 in=%d out=%d%s%s%s: exact", (int)k.in, (int)k.out,
                        k.transposed ? " transposed" : "", k.bias ? " bias" : "",
                        k.act ? " gelu" : "");
            }
        /* As the engine asks for. */
        for (int turn = 0; turn < 6; turn++) {
            struct linear_case k = {.dtype = gpu_dtype(type),
                                    .n = 257 + 111 * turn,
                                    .in = turn % 2 ? 64 : 256,
                                    .out = 192,
                                    .exact_rows = true,
                                    .transposed = turn == 3,
                                    .bias = turn != 3,
                                    .act = turn == 2 || turn == 5,
                                    .residual = turn == 1 ? ITSELF : NO_RESIDUAL};
            add(&suite, &k, false);
        }
        /* Every shape, the options in turn. */
        for (int i = 0; i < N_SHAPES; i++)
            for (int turn = 0; turn < 4; turn++) {
                int bits = i * 5 + turn * 7;
                struct linear_case k = {.dtype = gpu_dtype(type),
                                        .n = shapes[i][0],
                                        .in = shapes[i][1],
                                        .out = shapes[i][2],
                                        .transposed = turn & 1,
                                        .bias = bits & 4,
                                        .act = turn & 2,
                                        .keep_pre = turn & 2 && bits & 8,
                                        .activated = turn & 2,
                                        .accumulate = bits & 8,
                                        .want_dx = true,
                                        .want_dw = true,
                                        .want_db = true};
                k.light = (turn == i % 4 || i == 14) && k.n * k.in * k.out < 600000;
                if (!k.act) k.residual = bits % 3;
                add(&suite, &k, false);
                if (k.dtype == SRF_F32 && k.n <= 300) {
                    struct linear_case as_infer = k;
                    as_infer.exact_rows = true, as_infer.light = false;
                    add(&suite, &as_infer, false);
                }
                if (i % 5 == 4) { /* some of the gradients only */
                    k.want_dx = turn != 1;
                    k.want_dw = turn != 2 && turn != 3;
                    k.want_db = turn != 2;
                }
                add(&suite, &k, true);
            }
        for (int i = 0; i < N_SHAPES; i++)
            for (int turn = 0; turn < 3; turn++) {
                struct linear_case k = {.dtype = gpu_dtype(type),
                                        .n = shapes[i][0],
                                        .in = shapes[i][1],
                                        .out = shapes[i][2],
                                        .transposed = turn == 2 && i % 2,
                                        .bias = turn != 1,
                                        .act = true,
                                        .keep_slope = true,
                                        .keep_pre = turn == 2,
                                        .sloped = true,
                                        .accumulate = turn == 2 && i % 3 == 0,
                                        .want_dx = true,
                                        .want_dw = turn == 0,
                                        .want_db = turn != 1,
                                        .light = turn == 0 && (i == 7 || i == 10 || i == 19)};
                add(&suite, &k, false);
                add(&suite, &k, true);
            }
    }
    return gpu_run(&suite, argc > 1 ? argv[1] : NULL);
}
