/* The recurrent form of SRF attention on the GPU: any split into prefills and steps gives what the
 * chunked form gives, and a state moves between the CPU and the GPU. */
#include "tests/ref/attn_kinds.h"
#include "tests/ref/attn_packed.h"
#include "tests/ref/gpu.h"

enum { MAX_T = 400 };

#include <stdio.h>

struct recurrent_case {
    enum srf_dtype dtype;
    struct srf_attn_shape shape;
    int kind; /* of attn_kinds */
};

static const struct srf_attn_shape shapes[] = {
    {.b = 2, .t = 1, .h = 1, .d = 32, .m = 16, .n_sets = 1, .causal = true},
    {.b = 1, .t = 63, .h = 3, .d = 32, .m = 20, .n_sets = 1, .causal = true},
    {.b = 2, .t = 131, .h = 2, .d = 64, .m = 64, .n_sets = 2, .causal = true},
    {.b = 1, .t = 140, .h = 1, .d = 80, .m = 100, .n_sets = 1, .causal = true},
    {.b = 3, .t = 110, .h = 1, .d = 96, .m = 128, .n_sets = 1, .causal = true},
    {.b = 1, .t = 290, .h = 2, .d = 64, .m = 256, .n_sets = 1, .causal = true},
    {.b = 1, .t = 90, .h = 1, .d = 128, .m = 512, .n_sets = 1, .causal = true},
    {.b = 5, .t = 40, .h = 2, .d = 16, .m = 8, .n_sets = 1, .causal = true},
    {.b = 2, .t = 200, .h = 1, .d = 64, .m = 20, .n_sets = 1, .causal = true},
};
#define N_SHAPES ((int)(sizeof shapes / sizeof *shapes))
/* The first ones are those of prefill on tensor cores, for heads of 64. */
static const int64_t windows[] = {0, 64, 32, 128, 192, 96, 160, 224, 256, 7, 1, 250};
enum { N_FAST = 9, N_WINDOWS = sizeof windows / sizeof *windows };

/* The same for a window: at least `blocks` blocks of it and a little, so that something is far. */
static struct srf_attn_shape with_blocks(struct srf_attn_shape s, int64_t window, int64_t blocks)
{
    if (s.t < window * blocks + 30) s.t = window * blocks + 30;
    return s;
}

static double tol_of(enum srf_dtype dtype)
{
    return dtype == SRF_BF16 ? 1e-2 : 1e-5;
}

/* Split n tokens into pieces of 1 to `most`; returns how many. */
static int split(struct srf_rng *rng, int64_t n, int64_t most, int64_t *lens)
{
    int count = 0;
    for (; n > 0; n -= lens[count++]) {
        int64_t len = 1 + (int64_t)srf_rng_below(rng, (uint64_t)most);
        lens[count] = len < n ? len : n;
    }
    return count;
}

static void close_o(struct attn_case *c, const char *name)
{
    attn_case_close(c, name, c->o, c->ld_o, 0, 1, tol_of(c->s.ctx->dtype));
}

static void test_forms(void **state)
{
    const struct recurrent_case *k = *state;
    struct attn_case c = attn_case_new_on(gpu_device(), k->dtype, k->shape, 1);
    struct srf_rng rng = srf_rng_at(test_seed(), SRF_RNG_TEST, 0, 77, (uint32_t)k->shape.window);
    int64_t lens[MAX_T + 2], n = k->shape.t;
    attn_case_ref_fwd(&c);
    attn_case_fwd(&c);
    close_o(&c, "chunked");
    attn_case_recurrent(&c, &n, 1);
    close_o(&c, "one prefill");
    for (int round = 0; round < (gpu_small() ? 1 : 3); round++) {
        int count = split(&rng, n, round == 0 ? n : round == 1 ? 40 : 5, lens);
        attn_case_recurrent(&c, lens, count);
        close_o(&c, "prefills and steps");
    }
    /* Hundreds of steps; that one leaves the same bits again was seen above. */
    c.s.twice = false;
    for (int64_t i = 0; i < n; i++) lens[i] = 1;
    if (n < 200 && !gpu_small()) { /* for more, the steps after a prefill below are enough */
        attn_case_recurrent(&c, lens, (int)n);
        close_o(&c, "step by step");
    }
    /* One prefill, then steps only, and an empty prefill between. */
    int64_t steps = gpu_small() ? 3 : n - n / 2;
    lens[0] = n - steps;
    lens[1] = 0;
    for (int64_t i = 0; i < steps; i++) lens[2 + i] = 1;
    attn_case_recurrent(&c, lens, (int)(2 + steps));
    close_o(&c, "prefill then steps");
    attn_case_free(&c);
}

/* The state of each form is what its definition says; sequences packed with different lengths,
 * their states in another order. */
static void test_packed(void **state)
{
    const struct recurrent_case *k = *state;
    struct srf_attn_shape s = k->shape;
    s.b += 2;
    struct attn_case c = attn_case_new_on(gpu_device(), k->dtype, s, 1);
    struct srf_rng rng = srf_rng_at(test_seed(), SRF_RNG_TEST, 0, 78, (uint32_t)s.window);
    int32_t order[8];
    for (int64_t i = 0; i < s.b; i++) order[i] = (int32_t)(s.b - 1 - (i + 1) % s.b);
    attn_case_ref_fwd(&c);
    attn_case_recurrent(&c, &s.t, 1);
    close_o(&c, "one prefill");
    attn_packed_check_state(&c, "one prefill", NULL, tol_of(k->dtype));
    for (int64_t most = gpu_small() ? 980 : 20; most <= 1000; most *= 7) {
        attn_packed_run(&c, &rng, most, order);
        close_o(&c, "packed");
        attn_packed_check_state(&c, "packed", order, tol_of(k->dtype));
    }
    attn_case_free(&c);
}

/* States stored in bf16: what they hold is rounded once a call. */
static void test_bf16_state(void **state)
{
    const struct recurrent_case *k = *state;
    struct attn_case c = attn_case_new_on(gpu_device(), k->dtype, k->shape, 1);
    struct srf_rng rng = srf_rng_at(test_seed(), SRF_RNG_TEST, 0, 79, (uint32_t)k->shape.window);
    int64_t lens[MAX_T + 2];
    int32_t order[8];
    for (int64_t i = 0; i < k->shape.b; i++) order[i] = (int32_t)(k->shape.b - 1 - i);
    c.state_bf16 = true;
    attn_case_ref_fwd(&c);
    for (int64_t most = 20; most <= 320; most *= 4) {
        attn_case_recurrent(&c, lens, split(&rng, k->shape.t, most, lens));
        attn_case_close(&c, "prefills and steps", c.o, c.ld_o, 0, 1, 2 * tol_of(k->dtype));
        attn_packed_run(&c, &rng, most, order);
        attn_case_close(&c, "packed", c.o, c.ld_o, 0, 1, 2 * tol_of(k->dtype));
    }
    attn_case_free(&c);
}

/* Inputs of any size, in pieces of several lengths. */
static void test_range(void **state)
{
    const struct recurrent_case *k = *state;
    const struct attn_kind *kind = &attn_kinds[k->kind];
    struct attn_case c = attn_case_new_on(gpu_device(), k->dtype, k->shape, 1);
    struct srf_rng rng = srf_rng_at(test_seed(), SRF_RNG_TEST, 0, 80, (uint32_t)k->kind);
    int32_t order[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    double tol = kind->eps * sqrt((double)k->shape.d / 16) * 0x1p-24 * 4 + 1e-2;
    if (k->dtype == SRF_F32) tol = kind->eps * sqrt((double)k->shape.d / 16) * 0x1p-24;
    kind->fill(&c);
    attn_case_ref_fwd(&c);
    for (int64_t most = 20; most <= 1000; most *= 7) {
        char name[40];
        snprintf(name, sizeof name, "pieces up to %lld", (long long)most);
        attn_packed_run(&c, &rng, most, order);
        double *o = twin_values(&c.s, c.o);
        for (int64_t i = 0; i < c.o.n; i++)
            if (!isfinite(o[i])) fail_msg("%s: element %lld is %g", name, (long long)i, o[i]);
        srf__free(o);
        if (kind->eps > 0) attn_case_close(&c, name, c.o, c.ld_o, 0, 1, tol);
    }
    attn_case_free(&c);
}

/* Give `to` the state of `from`. */
static void move_state(struct attn_case *from, struct attn_case *to)
{
    double *x = twin_values(&from->s, from->state);
    twin_set(&to->s, &to->state, x);
    srf__free(x);
}

/* A third of the tokens on the CPU, a third on the GPU, the rest on the CPU again; and the other
 * way round. Each with prefills and steps. */
static void test_moved_state(void **state)
{
    const struct recurrent_case *k = *state;
    for (int first = 0; first < 2; first++) {
        struct attn_case gpu = attn_case_new_on(gpu_device(), k->dtype, k->shape, 1);
        struct attn_case cpu = attn_case_new_like(&gpu, SRF_F32, 1);
        struct attn_case *sides[2] = {first ? &cpu : &gpu, first ? &gpu : &cpu};
        twin_set(&cpu.s, &cpu.qkv, gpu.qkv.ref);
        twin_set(&cpu.s, &cpu.w, gpu.w.ref);
        twin_set(&cpu.s, &cpu.bias, gpu.bias.ref);
        attn_case_ref_fwd(&gpu);
        int64_t n = k->shape.t, pos = 0;
        double *o = srf__alloc((size_t)gpu.o.n, sizeof *o);
        assert_non_null(o);
        for (int third = 0; third < 3; third++) {
            struct attn_case *now = sides[third % 2];
            int64_t end = n * (third + 1) / 3, from = pos, lens[MAX_T];
            int count = 0;
            if (end - pos > 5) lens[count++] = end - pos - 5;
            for (int64_t left = end - pos > 5 ? 5 : end - pos; left > 0; left--) lens[count++] = 1;
            if (third > 0) move_state(sides[(third + 1) % 2], now);
            pos = attn_case_go_on(now, pos, lens, count);
            double *x = twin_values(&now->s, now->o);
            for (int64_t i = 0; i < now->o.n; i++) {
                int64_t t = i / now->ld_o % n;
                if (t >= from && t < pos) o[i] = x[i];
            }
            srf__free(x);
        }
        twin_check(&gpu.s, first ? "CPU, GPU, CPU" : "GPU, CPU, GPU", o, gpu.o.ref, gpu.o.n,
                   tol_of(k->dtype));
        srf__free(o);
        attn_case_free(&cpu);
        attn_case_free(&gpu);
    }
}

/* The first piece must fill the block that is the one before, later. */
static int64_t late_first(int64_t window)
{
    return window < 64 ? 70 : window + 7;
}
/* Nothing but the window's phase depends on the position. */
static void test_late_positions(void **state)
{
    const struct recurrent_case *k = *state;
    struct attn_case c = attn_case_new_on(gpu_device(), k->dtype, k->shape, 1);
    const int64_t first = late_first(k->shape.window);
    const int64_t lens[] = {first, 1, 1, 1, 1, 1, 1, 1, 1, 33, 1, k->shape.t - first - 42};
    int n = (int)(sizeof lens / sizeof *lens);
    attn_case_ref_fwd(&c);
    int64_t phase = k->shape.window ? 2 * k->shape.window : 1; /* of the ring */
    c.pos_shift = (INT32_MAX - k->shape.t) / phase * phase;
    attn_case_recurrent(&c, lens, n);
    close_o(&c, "late positions");
    attn_case_free(&c);
}

/* One step of sequences first .. first + n - 1 of b, rows of qkv and o being (t, b): o and state go
 * on where pos >= 0. */
struct steps {
    struct attn_case *c;
    char *o, *state;
    const int32_t *pos; /* device (b) */
    size_t state_bytes; /* of a sequence */
    bool state_bf16;
};
static void one_step(const struct steps *r, int64_t t, int64_t first, int64_t n)
{
    struct attn_case *c = r->c;
    struct srf_attn_shape s = c->shape;
    int64_t size = (int64_t)srf_dtype_bytes(c->s.ctx->dtype), row = t * s.b + first;
    const char *q = (const char *)c->qkv.dev + row * c->ld * size;
    int64_t part = s.h * s.d * size;
    s.b = n, s.t = 1;
    twin_run(&c->s, srf_attn_step, .s = s, .q = q, .k = q + part, .v = q + 2 * part, .ld = c->ld,
             .w = c->w.dev, .bias = c->bias.dev, .o = r->o + row * c->ld_o * size, .ld_o = c->ld_o,
             .state = r->state + (size_t)first * r->state_bytes, .pos = r->pos + first,
             .state_bf16 = r->state_bf16);
}

/* Sequences that are idle now and then: each is what it is without the others, bit for bit; and
 * what it is with a state in bf16, to that. */
static void test_idle(void **state)
{
    const struct recurrent_case *k = *state;
    struct attn_case c = attn_case_new_on(gpu_device(), k->dtype, k->shape, 0.5);
    const struct srf_attn_shape *s = &c.shape;
    int64_t b = s->b, steps = gpu_small() ? 6 : s->t, n = c.o.n,
            count = srf_attn_state_count(s->m, s->d, s->window);
    c.s.ctx->exact_rows = true; /* as the engine asks for */
    bool narrow = k->dtype == SRF_BF16;
    double *zeros = srf__calloc((size_t)n, sizeof *zeros);
    struct twin alone = twin_of(&c.s, zeros, n), low = twin_of(&c.s, zeros, n);
    struct twin states[3];
    int32_t *pos = srf__calloc((size_t)b, sizeof *pos), *now = srf__calloc((size_t)b, sizeof *now);
    struct twin_raw at = twin_raw_of(&c.s, now, (size_t)b * sizeof *now);
    for (int i = 0; i < 3; i++) states[i] = twin_acc_fill(&c.s, b * s->h * count, 0);
    twin_set(&c.s, &c.o, zeros);
    size_t wide = (size_t)(s->h * count) * sizeof(float);
    struct steps runs[] = {{&c, c.o.dev, states[0].dev, at.dev, wide, false},
                           {&c, alone.dev, states[1].dev, at.dev, wide, false},
                           {&c, low.dev, states[2].dev, at.dev,
                            (size_t)(s->h * srf_attn_state_bf16_bytes(s->m, s->d, s->window)),
                            true}};
    for (int64_t t = 0; t < steps; t++) {
        for (int64_t i = 0; i < b; i++) now[i] = (t + 2 * i) % 5 < 2 ? -1 : pos[i]++;
        test_ok(c.s.ctx->be->upload(c.s.ctx, at.dev, now, at.bytes));
        one_step(&runs[0], t, 0, b);
        for (int64_t i = 0; i < b; i++)
            if (now[i] >= 0) one_step(&runs[1], t, i, 1);
        if (narrow) one_step(&runs[2], t, 0, b);
    }
    double *x = twin_values(&c.s, c.o), *y = twin_values(&c.s, alone);
    assert_memory_equal(x, y, (size_t)n * sizeof *x); /* idle rows: zeros in both */
    srf__free(y);
    if (narrow) {
        y = twin_values(&c.s, low);
        twin_check(&c.s, "state in bf16", y, x, n, 2e-2);
        srf__free(y);
    }
    srf__free(x);
    x = twin_values(&c.s, states[0]), y = twin_values(&c.s, states[1]);
    assert_memory_equal(x, y, (size_t)states[0].n * sizeof *x);
    srf__free(x);
    srf__free(y);
    srf__free(zeros);
    srf__free(pos);
    srf__free(now);
    attn_case_free(&c);
}

static void add(struct gpu_suite *suite, enum srf_dtype dtype, struct srf_attn_shape s,
                int64_t window, const char *what, void (*body)(void **state), double work)
{
    struct recurrent_case k = {.dtype = dtype, .shape = s};
    k.shape.window = window;
    gpu_add(suite, body, &k, sizeof k, work,
            "srf_attn %s b=%d t=%d h=%d d=%d m=%d sets=%d window=%d: %s", srf_dtype_name(dtype),
            (int)s.b, (int)s.t, (int)s.h, (int)s.d, (int)s.m, (int)s.n_sets, (int)window, what);
}

int main(int argc, char **argv)
{
    /* Of several segments. */
    static const struct srf_attn_shape longer = {
        .b = 1, .t = 520, .h = 1, .d = 64, .m = 48, .n_sets = 1, .causal = true};
    static const struct srf_attn_shape ranges = {
        .b = 1, .t = 150, .h = 1, .d = 64, .m = 64, .n_sets = 1, .causal = true};
    /* Of more heads, with two more sequences, than a card has multiprocessors: in turns. Not longer
     * than it must be for several chunks each: the references take their time. */
    static const struct srf_attn_shape many = {
        .b = 1, .t = 150, .h = 48, .d = 64, .m = 8, .n_sets = 48, .causal = true};
    /* For slow checkers. */
    static const struct srf_attn_shape light[] = {
        {.b = 2, .t = 20, .h = 1, .d = 64, .m = 64, .n_sets = 1, .causal = true},
        {.b = 1, .t = 70, .h = 1, .d = 32, .m = 20, .n_sets = 1, .causal = true},
    };
    static struct gpu_suite suite;
    for (int type = 0; type < gpu_n_dtypes(); type++)
        for (int i = 0; i < 4; i++)
            add(&suite, gpu_dtype(type), light[i / 2], i % 2 ? i / 2 ? 32 : 7 : 0, "light",
                test_forms, GPU_LIGHT);
    static const struct srf_attn_shape idle[] = {
        {.b = 5, .t = 40, .h = 2, .d = 64, .m = 64, .n_sets = 2, .causal = true},
        {.b = 3, .t = 40, .h = 1, .d = 128, .m = 256, .n_sets = 1, .causal = true},
        {.b = 4, .t = 40, .h = 2, .d = 32, .m = 20, .n_sets = 1, .causal = true},
    };
    for (int type = 0; type < gpu_n_dtypes(); type++)
        for (int i = 0; i < 6; i++)
            add(&suite, gpu_dtype(type), idle[i / 2], i % 2 ? 8 : 0, "idle", test_idle,
                i < 2 ? GPU_LIGHT : 1e5);
    for (int type = 0; type < gpu_n_dtypes(); type++)
        for (int w = 0; w < (gpu_dtype(type) == SRF_BF16 ? N_FAST : 2); w++) {
            /* 128, 160 and 256 go the way of others. */
            const int64_t way = windows[w] == 160 ? 0 : windows[w] % 128;
            const bool small = gpu_dtype(type) == SRF_BF16 && (w == 0 || way != 0);
            add(&suite, gpu_dtype(type), with_blocks(longer, windows[w], 4), windows[w], "packed",
                test_packed, small ? GPU_LIGHT : 1e8);
            for (int kind = 0; kind < ATTN_N_KINDS; kind++) {
                struct recurrent_case k = {gpu_dtype(type), with_blocks(ranges, windows[w], 3),
                                           kind};
                k.shape.window = windows[w];
                gpu_add(&suite, test_range, &k, sizeof k, 1e7, "srf_attn %s window=%d: range, %s",
                        srf_dtype_name(k.dtype), (int)windows[w], attn_kinds[kind].name);
            }
        }
    for (int type = 0; type < gpu_n_dtypes(); type++)
        for (int w = 0; w < N_FAST && gpu_dtype(type) == SRF_BF16; w++) {
            struct srf_attn_shape few = with_blocks(longer, windows[w], 3);
            few.m = w % 2 ? 16 : 32;
            add(&suite, SRF_BF16, few, windows[w], "few features", test_packed, 1e8);
            /* More than two blocks for one only: the references take their time. */
            int64_t blocks = windows[w] == 96 ? 2 : 0;
            add(&suite, SRF_BF16, with_blocks(many, windows[w], blocks), windows[w], "turns",
                test_packed, 1e8);
            for (int kind = 1; kind < ATTN_N_KINDS; kind += 5) { /* the references are slow */
                struct recurrent_case k = {SRF_BF16, many, kind};
                k.shape.b = 3;
                k.shape = with_blocks(k.shape, windows[w], blocks);
                k.shape.window = windows[w];
                gpu_add(&suite, test_range, &k, sizeof k, 1e8,
                        "srf_attn window=%d: turns, range, %s", (int)windows[w],
                        attn_kinds[kind].name);
            }
        }
    for (int type = 0; type < gpu_n_dtypes(); type++)
        for (int i = 0; i < N_SHAPES; i++)
            for (int w = 0; w < N_WINDOWS; w++) {
                enum srf_dtype dtype = gpu_dtype(type);
                struct srf_attn_shape s = shapes[i];
                /* Each step is an op of its own, run twice, with all that the tests do around it.
                 */
                double work = (double)(s.t * s.t * s.m * s.h * s.b) + 2e4 * (double)s.t;
                if (w > 1 && (i + w) % 4 != 0 && !(w < N_FAST && s.d == 64)) continue;
                add(&suite, dtype, s, windows[w], "forms", test_forms, work);
                add(&suite, dtype, s, windows[w], "packed", test_packed, work);
                if (dtype == SRF_BF16)
                    add(&suite, dtype, s, windows[w], "bf16 state", test_bf16_state, work);
                if (s.t > 3)
                    add(&suite, dtype, s, windows[w], "state moved", test_moved_state, work);
                if (s.t > late_first(windows[w]) + 45 && windows[w] < 250)
                    add(&suite, dtype, s, windows[w], "late", test_late_positions, work);
            }
    return gpu_run(&suite, argc > 1 ? argv[1] : NULL);
}
