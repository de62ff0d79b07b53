/* The public attention op: its calls against the references, what it refuses, and that it allocates
 * nothing where room was made.
 *     test_attention --record FILE.json    writes what scripts/srf_attention.py is checked
 *                                          against */
#include "tests/ref/attn.h"
#include "tests/support.h"
#include "kernels/attention.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { B = 2, T = 21, H = 2, D = 8, M = 24, WIDTH = H * D, N = B * T * WIDTH };

struct problem {
    struct srf_attn *a;
    double q[N], k[N], v[N], d_o[N], o[N], stat[B * T * H], dq[N], dk[N], dv[N], dw[H * M * D];
    double *state; /* (B + 1 slots) */
    struct srf_attn_tensors x;
    struct {
        double o[N], dq[N], dk[N], dv[N], dw[H * M * D];
    } want;
};

static void open_problem(struct problem *p, int64_t window)
{
    struct srf_attn_options options;
    memset(p, 0, sizeof *p);
    for (int i = 0; i < N; i++) {
        p->q[i] = 1.5 * sin(0.7 * i), p->k[i] = 1.2 * cos(1.3 * i + 0.2);
        p->v[i] = sin(2.1 * i + 1), p->d_o[i] = cos(0.9 * i);
    }
    srf_attn_defaults(&options, H, D);
    options.device = "cpu";
    options.dtype = SRF_F64;
    options.threads = 2;
    options.m = M;
    options.window = window;
    options.seed = 3;
    test_ok(srf_attn_create(&options, &p->a));
    test_ok(srf_attn_reserve(p->a, B, T, true));
    p->state = srf__calloc(B + 1, srf_attn_state_bytes(p->a));
    assert_non_null(p->state);
    p->x = (struct srf_attn_tensors){.b = B, .t = T, .q = p->q, .k = p->k, .v = p->v, .o = p->o};
    const void *w, *bias;
    srf_attn_features(p->a, &w, &bias);
    struct srf_attn_shape s = {
        .b = B, .t = T, .h = H, .d = D, .m = M, .n_sets = H, .window = window, .causal = true};
    ref_srf_attn_fwd(&(struct srf_srf_attn_fwd_args){.s = s,
                                                     .q = p->q,
                                                     .k = p->k,
                                                     .v = p->v,
                                                     .ld = WIDTH,
                                                     .w = w,
                                                     .bias = bias,
                                                     .o = p->want.o,
                                                     .ld_o = WIDTH});
    ref_srf_attn_bwd(&(struct srf_srf_attn_bwd_args){.s = s,
                                                     .q = p->q,
                                                     .k = p->k,
                                                     .v = p->v,
                                                     .ld = WIDTH,
                                                     .w = w,
                                                     .bias = bias,
                                                     .d_o = p->d_o,
                                                     .ld_o = WIDTH,
                                                     .dq = p->want.dq,
                                                     .dk = p->want.dk,
                                                     .dv = p->want.dv,
                                                     .dw = p->want.dw});
}

static void close_problem(struct problem *p)
{
    srf__free(p->state);
    srf_attn_free(p->a);
}

static void training(void **state)
{
    (void)state;
    static struct problem p;
    for (int64_t window = 0; window <= 4; window += 4) {
        open_problem(&p, window);
        srf__fail_alloc_after(0); /* there is room for all of it */
        test_ok(srf_attn_forward(p.a, NULL, &p.x, p.stat));
        test_ok(srf_attn_backward(p.a, NULL, &p.x, p.d_o, p.stat, p.dq, p.dk, p.dv, p.dw));
        srf__fail_alloc_after(-1);
        test_close("o", p.o, p.want.o, N, 1e-12);
        test_close("dq", p.dq, p.want.dq, N, 1e-11);
        test_close("dk", p.dk, p.want.dk, N, 1e-11);
        test_close("dv", p.dv, p.want.dv, N, 1e-11);
        test_close("dw", p.dw, p.want.dw, H * M * D, 1e-11);
        close_problem(&p);
    }
}

/* The same features by number, by their values, and none of them by another number. */
static void features(void **state)
{
    (void)state;
    static struct problem p;
    static double kept[H * M * D], zeros[H * M];
    open_problem(&p, 0);
    const void *w, *bias;
    srf_attn_features(p.a, &w, &bias);
    memcpy(kept, w, sizeof kept);
    test_ok(srf_attn_redraw(p.a, NULL));
    assert_int_equal(srf_attn_draw_number(p.a), 1);
    assert_memory_not_equal(kept, w, sizeof kept);
    test_ok(srf_attn_forward(p.a, NULL, &p.x, NULL));
    assert_memory_not_equal(p.o, p.want.o, sizeof p.o);
    test_ok(srf_attn_set_features(p.a, NULL, kept, NULL));
    assert_memory_equal(bias, zeros, sizeof zeros);
    test_ok(srf_attn_forward(p.a, NULL, &p.x, NULL));
    test_close("o of given features", p.o, p.want.o, N, 1e-12);
    test_ok(srf_attn_draw(p.a, NULL, 0));
    assert_memory_equal(kept, w, sizeof kept);
    close_problem(&p);
}

static void empty(struct problem *p)
{
    memset(p->state, 0, (B + 1) * srf_attn_state_bytes(p->a));
    memset(p->o, 0, sizeof p->o);
}

static void prefill_modes(void **state)
{
    (void)state;
    static struct problem p;
    const int32_t slots[B] = {2, 0}, pos[B] = {0, 0};
    for (int64_t window = 0; window <= 4; window += 4) {
        open_problem(&p, window);
        srf__fail_alloc_after(0);
        for (int mode = SRF_PREFILL_PARALLEL; mode <= SRF_PREFILL_RECURRENT; mode++)
            for (int64_t chunk = 1; chunk <= T + 1; chunk += 5) {
                struct srf_attn_prefill_args how = {.mode = (enum srf_attn_prefill_mode)mode,
                                                    .chunk = chunk,
                                                    .state = p.state,
                                                    .pos = chunk > 1 ? pos : NULL};
                if (mode != SRF_PREFILL_RECURRENT && chunk > 6) how.slots = slots;
                empty(&p);
                test_ok(srf_attn_prefill(p.a, NULL, &p.x, &how));
                test_close("prefill", p.o, p.want.o, N, 1e-12);
            }
        srf__fail_alloc_after(-1);
        close_problem(&p);
    }
}

/* Both sequences' tokens packed, 13 and 5 of them, then the others by steps and a last prefill. */
static void packed(void **state)
{
    (void)state;
    static struct problem p;
    static double q[N], k[N], v[N], o[N];
    for (int64_t window = 0; window <= 4; window += 4) {
        int32_t pos[B] = {0, 0}, slots[B] = {1, 2};
        const int32_t lens[3][B] = {{13, 5}, {0, 15}, {8, 1}};
        open_problem(&p, window);
        empty(&p);
        for (int round = 0; round < 3; round++) {
            const int32_t *len = lens[round];
            int64_t rows = 0, longest = len[0] > len[1] ? len[0] : len[1];
            for (int b = 0; b < B; rows += len[b++]) {
                size_t bytes = (size_t)len[b] * WIDTH * sizeof *q;
                int64_t from = (b * T + pos[b]) * WIDTH;
                memcpy(q + rows * WIDTH, p.q + from, bytes);
                memcpy(k + rows * WIDTH, p.k + from, bytes);
                memcpy(v + rows * WIDTH, p.v + from, bytes);
            }
            struct srf_attn_tensors x = {.b = B, .t = longest, .q = q, .k = k, .v = v, .o = o};
            struct srf_attn_prefill_args how = {
                .state = p.state, .pos = pos, .lens = len, .slots = slots};
            test_ok(srf_attn_prefill(p.a, NULL, &x, &how));
            for (int b = 0, row = 0; b < B; row += len[b++]) {
                memcpy(p.o + (b * T + pos[b]) * WIDTH, o + row * WIDTH,
                       (size_t)len[b] * WIDTH * sizeof *o);
                pos[b] += len[b];
            }
        }
        test_close("packed", p.o, p.want.o, N, 1e-12);
        close_problem(&p);
    }
}

/* Every option is in the features, or in what is made of them. */
static void options_reach(void **state)
{
    (void)state;
    static struct problem p;
    static double w[M * D], bias[M], other_w[H * M * D], other_bias[H * M];
    open_problem(&p, 0);
    for (int k = 0; k < 10; k++) {
        struct srf_attn_options o;
        struct srf_attn *a;
        const void *got_w, *got_bias;
        srf_attn_defaults(&o, H, D);
        o.device = "cpu";
        o.dtype = SRF_F64;
        o.m = M;
        if (k == 1) o.features = SRF_IID;
        if (k == 2) o.rotation = SRF_ROT_HD;
        if (k == 3) o.normalize_rows = true;
        if (k == 4) o.oprf_a = -0.2;
        if (k == 5) o.seed = 9;
        if (k == 6) o.draw = 4;
        if (k == 7) o.share_heads = true;
        if (k == 8) o.causal = false;
        if (k == 9) o.window = 4;
        test_ok(srf_attn_create(&o, &a));
        srf_attn_features(a, &got_w, &got_bias);
        int sets = o.share_heads ? 1 : H;
        const struct srf_features_draw_args args = {.kind = o.features,
                                                    .rotation = o.rotation,
                                                    .normalize_rows = o.normalize_rows,
                                                    .seed = o.seed,
                                                    .draw = o.draw,
                                                    .m = M,
                                                    .d = D};
        for (int i = 0; i < sets; i++) {
            test_ok(srf_features_draw_one(&args, 0, i, o.oprf_a, w, bias));
            assert_memory_equal((const double *)got_w + i * M * D, w, sizeof w);
            assert_memory_equal((const double *)got_bias + i * M, bias, sizeof bias);
        }
        struct srf_attn_shape s = {.b = B,
                                   .t = T,
                                   .h = H,
                                   .d = D,
                                   .m = M,
                                   .n_sets = sets,
                                   .window = o.window,
                                   .causal = o.causal};
        ref_srf_attn_fwd(&(struct srf_srf_attn_fwd_args){.s = s,
                                                         .q = p.q,
                                                         .k = p.k,
                                                         .v = p.v,
                                                         .ld = WIDTH,
                                                         .w = got_w,
                                                         .bias = got_bias,
                                                         .o = p.want.o,
                                                         .ld_o = WIDTH});
        test_ok(srf_attn_forward(a, NULL, &p.x, NULL));
        test_close("o", p.o, p.want.o, N, 1e-12);
        /* others, with no word of their biases, which are 0 */
        for (int i = 0; i < sets * M * D; i++) other_w[i] = sin(i);
        test_ok(srf_attn_set_features(a, NULL, other_w, NULL));
        assert_memory_equal(got_w, other_w, (size_t)(sets * M * D) * sizeof *other_w);
        assert_memory_equal(got_bias, other_bias, (size_t)(sets * M) * sizeof *other_bias);
        srf_attn_free(a);
    }
    close_problem(&p);
}

/* Sequences at positions of their own, their states in any slots, outputs in wider rows. */
static void prefill_goes_on(void **state)
{
    (void)state;
    enum { REST = 13, WIDE = WIDTH + 3 };
    static struct problem p;
    static double q[B * REST * WIDTH], k[B * REST * WIDTH], v[B * REST * WIDTH], o[B * REST * WIDE];
    const int32_t pos[B] = {6, 3}, slots[B] = {2, 0};
    for (int mode = 0; mode < 2; mode++) {
        open_problem(&p, 4);
        for (int i = 0; i < B; i++) {
            struct srf_attn_tensors x = {.b = 1,
                                         .t = pos[i],
                                         .q = p.q + i * T * WIDTH,
                                         .k = p.k + i * T * WIDTH,
                                         .v = p.v + i * T * WIDTH,
                                         .o = p.o};
            struct srf_attn_prefill_args first = {.state = p.state, .slots = &slots[i]};
            test_ok(srf_attn_prefill(p.a, NULL, &x, &first));
            size_t bytes = REST * WIDTH * sizeof *q, from = (size_t)((i * T + pos[i]) * WIDTH);
            memcpy(q + i * REST * WIDTH, p.q + from, bytes);
            memcpy(k + i * REST * WIDTH, p.k + from, bytes);
            memcpy(v + i * REST * WIDTH, p.v + from, bytes);
        }
        for (int i = 0; i < B * REST * WIDE; i++) o[i] = 7;
        struct srf_attn_tensors x = {
            .b = B, .t = REST, .q = q, .k = k, .v = v, .o = o, .ld_o = WIDE};
        struct srf_attn_prefill_args rest = {.mode = mode ? SRF_PREFILL_CHUNKWISE
                                                          : SRF_PREFILL_PARALLEL,
                                             .chunk = 5,
                                             .state = p.state,
                                             .pos = pos,
                                             .slots = slots};
        test_ok(srf_attn_prefill(p.a, NULL, &x, &rest));
        for (int r = 0; r < B * REST; r++) {
            int i = r / REST, at = (i * T + pos[i] + r % REST) * WIDTH;
            test_close("o", o + r * WIDE, p.want.o + at, WIDTH, 1e-11);
            for (int j = WIDTH; j < WIDE; j++) assert_true(o[r * WIDE + j] == 7);
        }
        close_problem(&p);
    }
}

static void refusals(void **state)
{
    (void)state;
    static struct problem p;
    struct srf_attn_options o;
    struct srf_attn *a;
    srf_attn_defaults(&o, H, D);
    o.device = "toaster";
    assert_int_equal(srf_attn_create(&o, &a), SRF_INVALID);
    assert_null(a);
    srf_attn_defaults(&o, H, 1);
    assert_int_equal(srf_attn_create(&o, &a), SRF_INVALID);
    srf_attn_defaults(&o, H, D);
    o.window = 4;
    o.causal = false;
    assert_int_equal(srf_attn_create(&o, &a), SRF_INVALID);
    srf_attn_defaults(&o, H, D);
    o.oprf_a = NAN;
    assert_int_equal(srf_attn_create(&o, &a), SRF_INVALID);
    o.device = "cpu";
    o.oprf_a = -1e100; /* beyond fp32: infinite features, and outputs that are no numbers */
    assert_int_equal(srf_attn_create(&o, &a), SRF_INVALID);
    o.oprf_a = -1e30;
    test_ok(srf_attn_create(&o, &a));
    float few_q[2 * WIDTH], few_o[2 * WIDTH];
    for (int i = 0; i < 2 * WIDTH; i++) few_q[i] = sinf((float)i);
    struct srf_attn_tensors two = {.b = 1, .t = 2, .q = few_q, .k = few_q, .v = few_q, .o = few_o};
    test_ok(srf_attn_forward(a, NULL, &two, NULL));
    for (int i = 0; i < 2 * WIDTH; i++) assert_true(isfinite(few_o[i]));
    srf_attn_free(a);
    srf_attn_defaults(&o, H, D);
    o.device = "cpu";
    o.dtype = SRF_BF16;
    assert_int_equal(srf_attn_create(&o, &a), SRF_UNSUPPORTED);
    o.dtype = (enum srf_dtype)77;
    assert_int_equal(srf_attn_create(&o, &a), SRF_UNSUPPORTED);
    srf_attn_defaults(&o, H, D);
    o.device = NULL;
    assert_int_equal(srf_attn_create(&o, &a), SRF_INVALID);
    /* Sizes whose products would wrap around. */
    int64_t *const sizes[] = {&o.n_heads, &o.head_size, &o.m, &o.window};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        srf_attn_defaults(&o, H, D);
        o.device = "cpu";
        *sizes[i] = (int64_t)1 << 61;
        assert_int_equal(srf_attn_create(&o, &a), SRF_INVALID);
    }
    srf_attn_free(NULL);
    srf_attn_defaults(&o, H, D); /* auto: the CPU here, which is no failure */
    srf_error_clear();
    test_ok(srf_attn_create(&o, &a));
    assert_string_equal(srf_error_message(), "");
    srf_attn_free(a);

    open_problem(&p, 4);
    struct srf_attn_tensors x = p.x;
    x.ld = WIDTH - 1;
    assert_int_equal(srf_attn_forward(p.a, NULL, &x, NULL), SRF_INVALID);
    x = p.x;
    x.b = (int64_t)1 << 62;
    assert_int_equal(srf_attn_forward(p.a, NULL, &x, NULL), SRF_INVALID);
    x = p.x;
    x.t = INT32_MAX;
    x.ld = (int64_t)1 << 40;
    assert_int_equal(srf_attn_forward(p.a, NULL, &x, NULL), SRF_INVALID);
    x = p.x;
    x.o = NULL;
    assert_int_equal(srf_attn_forward(p.a, NULL, &x, NULL), SRF_INVALID);
    assert_int_equal(srf_attn_backward(p.a, NULL, &p.x, p.d_o, NULL, p.dq, p.dk, p.dv, NULL),
                     SRF_INVALID);
    assert_int_equal(srf_attn_step(p.a, NULL, &p.x, p.state, NULL), SRF_INVALID);
    x = p.x;
    x.t = 1;
    assert_int_equal(srf_attn_step(p.a, NULL, &x, p.state, NULL), SRF_INVALID);
    const int32_t few[B] = {3, 3}, many[B] = {3, T + 1}, negative[B] = {0, -1}, none[B] = {0, 0};
    const struct srf_attn_prefill_args good = {.state = p.state};
    struct srf_attn_prefill_args bad[] = {good, good, good, good, good, good, good, good};
    bad[0].state = NULL;
    bad[1].mode = (enum srf_attn_prefill_mode)7;
    bad[2].mode = SRF_PREFILL_CHUNKWISE;
    bad[3].lens = many;
    bad[4].lens = negative;
    bad[5].slots = negative;
    bad[6].pos = negative;
    bad[7].lens = few;
    bad[7].mode = SRF_PREFILL_RECURRENT;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(srf_attn_prefill(p.a, NULL, &p.x, &bad[i]), SRF_INVALID);
    assert_int_equal(srf_attn_set_features(p.a, NULL, NULL, NULL), SRF_INVALID);
    assert_int_equal(srf_attn_reserve(p.a, -1, 3, false), SRF_INVALID);
    assert_int_equal(srf_attn_reserve(p.a, (int64_t)1 << 40, (int64_t)1 << 40, true), SRF_INVALID);
    /* Nothing to do is fine, and so is the handle after all that. */
    x = (struct srf_attn_tensors){.b = B, .t = 0};
    test_ok(srf_attn_prefill(p.a, NULL, &x, &good));
    bad[0] = good;
    bad[0].lens = none;
    test_ok(srf_attn_prefill(p.a, NULL, &p.x, &bad[0]));
    test_ok(srf_attn_forward(p.a, NULL, &p.x, NULL));
    test_close("o", p.o, p.want.o, N, 1e-12);
    close_problem(&p);
}

/* Every allocation of a handle's life made to fail once: an error, nothing lost. */
static void allocation_failures(void **state)
{
    (void)state;
    struct srf_attn_options o;
    srf_attn_defaults(&o, H, D);
    o.device = "cpu";
    srf_status st = SRF_NOMEM;
    int n = 0;
    for (; st != SRF_OK; n++) {
        struct srf_attn *a;
        srf__fail_alloc_after(n);
        st = srf_attn_create(&o, &a);
        if (st == SRF_OK) st = srf_attn_reserve(a, 5, 7, true);
        srf__fail_alloc_after(-1);
        assert_true(st == SRF_OK || st == SRF_NOMEM);
        srf_attn_free(a);
    }
    assert_true(n > 5);
}

static void put(FILE *f, const char *name, const double *x, int n)
{
    fprintf(f, ",\n \"%s\": [", name);
    for (int i = 0; i < n; i++) fprintf(f, "%s%.7g", i ? i % 10 ? "," : ",\n" : "", x[i]);
    fprintf(f, "]");
}

static int record(const char *path)
{
    static struct problem p;
    FILE *f = fopen(path, "w");
    if (!f) return 1;
    for (int64_t window = 0; window <= 4; window += 4) {
        open_problem(&p, window);
        fprintf(f, "%s{\"b\": %d, \"t\": %d, \"heads\": %d, \"d\": %d, \"m\": %d, \"window\": %d",
                window ? ",\n" : "[", B, T, H, D, M, (int)window);
        fprintf(f, ", \"seed\": 3");
        put(f, "o", p.want.o, N);
        put(f, "dq", p.want.dq, N);
        put(f, "dk", p.want.dk, N);
        put(f, "dv", p.want.dv, N);
        put(f, "dw", p.want.dw, H * M * D);
        fprintf(f, "}");
        close_problem(&p);
    }
    fprintf(f, "]\n");
    return fclose(f) != 0;
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "--record") == 0) return record(argv[2]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(training),      cmocka_unit_test(features),
        cmocka_unit_test(prefill_modes), cmocka_unit_test(packed),
        cmocka_unit_test(options_reach), cmocka_unit_test(prefill_goes_on),
        cmocka_unit_test(refusals),      cmocka_unit_test(allocation_failures),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
