/* The recurrent step over many tokens of sequences that are idle now and then: states in fp32 and
 * in bf16 against sums in double.
 *
 * SRF_STEPS=100000 in the environment: so many (2000). The errors on the way are printed. */
#include "tests/ref/attn_case.h"
#include "tests/ref/gpu.h"

#include <stdlib.h>
#include <string.h>

enum { POOL = 2048 }; /* tokens of a sequence, taken again and again */

struct steps_case {
    enum srf_dtype dtype;
    struct srf_attn_shape shape;
    bool idle;
};

/* One head of one sequence, in double: what is older than the window is in s and z. Rings of 2 W
 * tokens: keys, values, exponents of the keys' features. */
struct head {
    double *s, *z, *y, *v, *a;
};

struct run {
    struct attn_case c;
    struct head *heads; /* (b, h) */
    double *o;          /* (b, h d): of the last step */
    int64_t ring;       /* tokens of one */
};

static double *zeros(int64_t n)
{
    double *p = calloc((size_t)n + 1, sizeof *p);
    assert_non_null(p);
    return p;
}

static struct run run_new(const struct steps_case *k)
{
    struct srf_attn_shape shape = k->shape;
    shape.t = POOL;
    struct run r = {.c = attn_case_new_on(gpu_device(), k->dtype, shape, 0.8)};
    const struct srf_attn_shape *s = &r.c.shape;
    int64_t rows = s->b * s->t, width = s->h * s->d;
    for (int64_t i = 0; i < rows; i++) /* values around a mean, which stays as they are summed */
        for (int64_t j = 2 * width; j < 3 * width; j++)
            attn_case_set(&r.c, i * r.c.ld + j, 0.5 + 0.8 * r.c.qkv.ref[i * r.c.ld + j]);
    twin_send(&r.c.s, r.c.qkv); /* rounds what the reference sees, too */
    r.c.s.twice = false;
    r.c.s.ctx->exact_rows = true;
    r.ring = s->window ? 2 * s->window : 1;
    r.heads = calloc((size_t)(s->b * s->h), sizeof *r.heads);
    assert_non_null(r.heads);
    for (int64_t i = 0; i < s->b * s->h; i++)
        r.heads[i] = (struct head){zeros(s->m * s->d), zeros(s->m), zeros(r.ring * s->d),
                                   zeros(r.ring * s->d), zeros(r.ring * s->m)};
    r.o = zeros(s->b * width);
    return r;
}

static void run_free(struct run *r)
{
    for (int64_t i = 0; i < r->c.shape.b * r->c.shape.h; i++) {
        struct head *h = &r->heads[i];
        free(h->s), free(h->z), free(h->y), free(h->v), free(h->a);
    }
    free(r->heads);
    free(r->o);
    attn_case_free(&r->c);
}

static double dot(const double *a, const double *b, int64_t n)
{
    double sum = 0;
    for (int64_t j = 0; j < n; j++) sum += a[j] * b[j];
    return sum;
}

static void add_to_state(const struct srf_attn_shape *s, struct head *h, const double *a,
                         const double *v)
{
    for (int64_t i = 0; i < s->m; i++) {
        double f = exp(a[i]);
        h->z[i] += f;
        for (int64_t j = 0; j < s->d; j++) h->s[i * s->d + j] += f * v[j];
    }
}

/* Token number `pos` of a sequence; qkv: its row and head. */
static void ref_step(const struct run *r, int64_t head, struct head *h, const double *qkv,
                     int64_t pos, double *o)
{
    const struct srf_attn_shape *s = &r->c.shape;
    int64_t d = s->d, m = s->m, w = s->window, set = s->n_sets == 1 ? 0 : head;
    int64_t at = pos % r->ring, block = w ? pos / w : 0, first = w && block ? (block - 1) * w : 0;
    double scale = pow((double)d, -0.25), x[128], a_q[256], sum = 0;
    double *y = h->y + at * d, *v = h->v + at * d, *a = h->a + at * m;
    if (w && pos % w == 0 && block >= 2) /* the block before the last one is old now */
        for (int64_t i = (block - 2) * w; i < first; i++)
            add_to_state(s, h, h->a + i % r->ring * m, h->v + i % r->ring * d);
    for (int64_t j = 0; j < d; j++) {
        x[j] = scale * qkv[j];
        y[j] = scale * qkv[s->h * d + j];
        v[j] = qkv[2 * s->h * d + j];
        o[j] = 0;
    }
    for (int64_t i = 0; i < m; i++) {
        const double *row = r->c.w.ref + (set * m + i) * d;
        double bias = r->c.bias.ref[set * m + i];
        a_q[i] = dot(row, x, d) + bias - dot(x, x, d) / 2;
        a[i] = dot(row, y, d) + bias - dot(y, y, d) / 2;
    }
    if (!w) add_to_state(s, h, a, v);
    for (int64_t i = 0; i < m; i++) {
        double f = exp(a_q[i]) / (double)m;
        sum += f * h->z[i];
        for (int64_t j = 0; j < d; j++) o[j] += f * h->s[i * d + j];
    }
    for (int64_t i = first; w && i <= pos; i++) {
        double f = exp(dot(x, h->y + i % r->ring * d, d));
        sum += f;
        for (int64_t j = 0; j < d; j++) o[j] += f * h->v[i % r->ring * d + j];
    }
    for (int64_t j = 0; j < d; j++) o[j] /= sum;
}

/* Relative error of the device's rows of the last step; those that are idle must be zeros. */
static double error_of(const struct run *r, struct twin o, const int32_t *pos)
{
    const struct attn_case *c = &r->c;
    int64_t width = c->shape.h * c->shape.d;
    double *x = twin_values(&c->s, o), error = 0, norm = 0;
    for (int64_t i = 0; i < c->shape.b; i++)
        for (int64_t j = 0; j < width; j++) {
            double got = x[i * c->ld_o + j], want = pos[i] < 0 ? 0 : r->o[i * width + j];
            if (pos[i] < 0) assert_true(got == 0);
            error += (got - want) * (got - want), norm += want * want;
        }
    srf__free(x);
    return sqrt(error / norm);
}

static void test_steps(void **state)
{
    const struct steps_case *k = *state;
    const char *text = getenv("SRF_STEPS");
    int64_t steps = gpu_small() ? 10 : text ? atoll(text) : 2000;
    struct run r = run_new(k);
    struct attn_case *c = &r.c;
    struct srf_attn_shape s = c->shape;
    int64_t b = s.b, width = s.h * s.d, size = (int64_t)srf_dtype_bytes(k->dtype);
    int64_t count = b * s.h * srf_attn_state_count(s.m, s.d, s.window);
    int32_t now[8];
    int64_t seen[8] = {0};
    struct twin_raw pos = twin_raw_of(&c->s, now, (size_t)b * sizeof *now);
    double *empty = zeros(b * c->ld_o);
    struct twin o[2], states[2];
    int n = k->dtype == SRF_BF16 ? 2 : 1; /* states in bf16 go with a model in bf16 */
    for (int i = 0; i < n; i++) {
        o[i] = twin_of(&c->s, empty, b * c->ld_o);
        states[i] = twin_acc_fill(&c->s, count, 0);
    }
    free(empty);
    s.t = 1;
    for (int64_t t = 0, next = 100; t < steps; t++) {
        int64_t row = t % POOL * b;
        for (int64_t i = 0; i < b; i++)
            now[i] = k->idle && (t + 2 * i) % 5 < 2 ? -1 : (int32_t)seen[i]++;
        test_ok(c->s.ctx->be->upload(c->s.ctx, pos.dev, now, pos.bytes));
        const char *q = (const char *)c->qkv.dev + row * c->ld * size;
        for (int i = 0; i < n; i++) {
            const struct srf_srf_attn_step_args args = {.s = s,
                                                        .q = q,
                                                        .k = q + width * size,
                                                        .v = q + 2 * width * size,
                                                        .ld = c->ld,
                                                        .w = c->w.dev,
                                                        .bias = c->bias.dev,
                                                        .o = o[i].dev,
                                                        .ld_o = c->ld_o,
                                                        .state = states[i].dev,
                                                        .pos = pos.dev,
                                                        .state_bf16 = i == 1};
            if (t == 0)
                test_ok(srf_ctx_reserve_workspace(
                    c->s.ctx, c->s.ctx->be->srf_attn_step_workspace(c->s.ctx, &args)));
            test_ok(srf_run_srf_attn_step(c->s.ctx, &args));
        }
#pragma omp parallel for
        for (int64_t i = 0; i < b * s.h; i++)
            if (now[i / s.h] >= 0)
                ref_step(&r, i % s.h, &r.heads[i],
                         c->qkv.ref + (row + i / s.h) * c->ld + i % s.h * s.d, now[i / s.h],
                         r.o + i * s.d);
        if (t + 1 < next && t + 1 < steps) continue;
        next *= 10;
        for (int i = 0; i < n; i++) {
            double error = error_of(&r, o[i], now);
            /* Roundings of the sums walk: in fp32 past 1e-5 after some 10,000 steps; in bf16 see
             * kernels/lab/decode_cuda.md. */
            double tol = k->dtype == SRF_F32 ? 1e-5 * fmax(1, sqrt((double)t / 1e4))
                         : i == 0            ? 1e-2
                                             : 5e-2;
            print_message("after %7lld steps, state in %s: %.2e of %.0e\n", (long long)t + 1,
                          i ? "bf16" : "fp32", error, tol);
            if (!(error <= tol)) c->s.failures++;
        }
    }
    run_free(&r);
}

int main(int argc, char **argv)
{
    static const struct srf_attn_shape shapes[] = {
        {.b = 4, .h = 2, .d = 64, .m = 64, .n_sets = 2, .causal = true},
        {.b = 3, .h = 1, .d = 128, .m = 256, .n_sets = 1, .causal = true},
        {.b = 4, .h = 2, .d = 64, .m = 64, .n_sets = 2, .window = 64, .causal = true},
        {.b = 4, .h = 2, .d = 32, .m = 20, .n_sets = 1, .window = 7, .causal = true},
    };
    static struct gpu_suite suite;
    for (int type = 0; type < gpu_n_dtypes(); type++)
        for (int i = 0; i < 4; i++)
            for (int idle = 0; idle < 2; idle++) {
                struct steps_case k = {gpu_dtype(type), shapes[i], idle};
                gpu_add(&suite, test_steps, &k, sizeof k, i == 0 ? GPU_LIGHT : 1e8,
                        "steps %s d=%d m=%d window=%d%s", srf_dtype_name(k.dtype), (int)k.shape.d,
                        (int)k.shape.m, (int)k.shape.window, idle ? ", idle now and then" : "");
            }
    return gpu_run(&suite, argc > 1 ? argv[1] : NULL);
}
