/* The whole model: gradients in double against central differences, micro-batches, forms that
 * agree. */
#include "tests/support.h"
#include "model/model.h"
#include "tests/scratch.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const char config_json[] =
    "{\"model_type\": \"gpt2\", \"n_layer\": 2, \"n_head\": 2, \"n_embd\": 12, \"n_positions\": 40,"
    " \"vocab_size\": 29, \"layer_norm_epsilon\": 1e-5, \"activation_function\": \"gelu_new\"}";

struct fixture {
    struct srf_ctx *ctx;
    struct srf_arena *arena, *teacher_arena;
    struct srf_checkpoint *ck;
    struct srf_model *model, *teacher;
    struct srf_batch batch;
    int32_t tokens[64], targets[64];
    double ce, kl, mse;
};

/* window < 0: one a layer; -2: features by layer as well */
static struct srf_attention_config attention(enum srf_attention_kind kind, int64_t window)
{
    struct srf_attention_config a = srf_attention_default();
    a.kind = kind;
    a.m = 7;
    a.window = window;
    a.seed = 5;
    if (window < 0) test_ok(srf_attention_set_windows(&a, "5,2"));
    if (window == -2) test_ok(srf_attention_set_layer_m(&a, "3,7"));
    return a;
}

/* Parameters large enough that every part of the model matters. */
static void randomize(struct srf_checkpoint *ck, double scale)
{
    for (int64_t i = 0; i < ck->table.n; i++) {
        const struct srf_tensor *row = &ck->table.rows[i];
        struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 1, (uint32_t)i, 0);
        for (int64_t k = 0; k < row->count; k++)
            ck->params[row->offset + k] =
                (float)(scale * srf_rng_normal(&r) + (row->init_std < 0 ? 1 : 0));
    }
}

static void open_fixture_with(struct fixture *f, enum srf_dtype dtype,
                              struct srf_attention_config a, int64_t b, int64_t t,
                              bool train_features, enum srf_recompute recompute,
                              enum srf_trained trained)
{
    memset(f, 0, sizeof *f);
    test_ok(srf_ctx_create("cpu", dtype, 2, &f->ctx));
    test_ok(srf_checkpoint_init(config_json, 1, &f->ck));
    randomize(f->ck, 0.3);
    test_ok(srf_arena_create(f->ctx, &f->arena));
    test_ok(srf_model_create(f->ctx, &f->ck->config, &a, &f->model));
    struct srf_model_plan plan = {.b = b,
                                  .t = t,
                                  .train = true,
                                  .trained = trained,
                                  .train_features = train_features,
                                  .teacher = true,
                                  .logit_rows = 16,
                                  .recompute = recompute};
    test_ok(srf_model_plan(f->model, f->arena, &plan));
    test_ok(srf_arena_commit(f->arena));
    test_ok(srf_model_upload(f->model, f->ck));
    f->model->features_trained = train_features;
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 2, 0, 0);
    for (int i = 0; i < 64; i++) {
        f->tokens[i] = (int32_t)srf_rng_below(&r, 29);
        f->targets[i] = i % 11 == 3 ? -1 : (int32_t)srf_rng_below(&r, 29);
    }
    f->batch = (struct srf_batch){.b = b, .t = t, .tokens = f->tokens};
    f->ce = 1;
}

static void open_fixture(struct fixture *f, enum srf_dtype dtype, struct srf_attention_config a,
                         int64_t b, int64_t t, bool train_features)
{
    open_fixture_with(f, dtype, a, b, t, train_features, SRF_RECOMPUTE_NONE, SRF_TRAINED_ALL);
}

/* A teacher of other weights with softmax. */
static void add_teacher(struct fixture *f)
{
    struct srf_attention_config a = attention(SRF_ATTN_SOFTMAX, 0);
    randomize(f->ck, 0.4);
    test_ok(srf_arena_create(f->ctx, &f->teacher_arena));
    test_ok(srf_model_create(f->ctx, &f->ck->config, &a, &f->teacher));
    struct srf_model_plan plan = {.b = f->batch.b, .t = f->batch.t, .keep_attention = true};
    test_ok(srf_model_plan(f->teacher, f->teacher_arena, &plan));
    test_ok(srf_arena_commit(f->teacher_arena));
    test_ok(srf_model_upload(f->teacher, f->ck));
    randomize(f->ck, 0.3);
    f->kl = 0.7;
    f->mse = 0.9;
}

static void close_fixture(struct fixture *f)
{
    test_ok(srf_arena_check(f->arena));
    srf_model_free(f->model);
    srf_model_free(f->teacher);
    srf_arena_free(f->arena);
    srf_arena_free(f->teacher_arena);
    srf_checkpoint_free(f->ck);
    srf_ctx_free(f->ctx);
}

/* The training loss as the trainer defines it; gradients too if asked. */
static double loss(struct fixture *f, bool backward)
{
    struct srf_model *m = f->model;
    double scale = 1.0 / (double)(f->batch.b * f->batch.t);
    if (f->teacher) test_ok(srf_model_forward(f->teacher, &f->batch));
    test_ok(srf_model_forward(m, &f->batch));
    struct srf_loss_args args = {.n = f->batch.b * f->batch.t,
                                 .targets = f->targets,
                                 .scale = scale,
                                 .ce_weight = f->ce,
                                 .kl_weight = f->kl,
                                 .teacher = f->teacher,
                                 .backward = backward};
    test_ok(srf_model_loss(m, &args));
    double total = scale * (f->ce * args.nll_sum + f->kl * args.kl_sum);
    if (f->teacher) {
        int64_t n = f->batch.b * f->batch.t * m->config.c;
        for (int64_t l = 0; l < m->config.n_layers; l++) {
            const double *o = srf_model_attention_out(m, l);
            const double *want = srf_model_attention_out(f->teacher, l);
            for (int64_t i = 0; i < n; i++)
                total += f->mse * scale * (o[i] - want[i]) * (o[i] - want[i]);
        }
        m->attention_teacher = f->teacher;
        m->attention_scale = f->mse * scale;
    }
    if (backward) test_ok(srf_model_backward(m, &f->batch));
    return total;
}

static double directional_difference(struct fixture *f, double *values, const double *direction,
                                     int64_t n, double h)
{
    double sums[4];
    const double steps[4] = {h, -h, 2 * h, -2 * h};
    double *saved = srf__alloc((size_t)n, sizeof *saved);
    memcpy(saved, values, (size_t)n * sizeof *saved);
    for (int k = 0; k < 4; k++) {
        for (int64_t i = 0; i < n; i++) values[i] = saved[i] + steps[k] * direction[i];
        sums[k] = loss(f, false);
    }
    memcpy(values, saved, (size_t)n * sizeof *saved);
    srf__free(saved);
    /* fourth-order central difference */
    return (8 * (sums[0] - sums[1]) - (sums[2] - sums[3])) / (12 * h);
}

static void check_piece(struct fixture *f, const char *name, double *values, const double *grad,
                        int64_t n, double *worst)
{
    double *direction = srf__alloc((size_t)n, sizeof *direction);
    for (uint32_t k = 0; k < 2; k++) {
        test_normal(direction, n, 1 / sqrt((double)n), 100 + k);
        double want = directional_difference(f, values, direction, n, 1e-3), got = 0, size = 0;
        for (int64_t i = 0; i < n; i++) {
            got += grad[i] * direction[i];
            size += grad[i] * grad[i];
        }
        /* relative to the gradient's size along a random direction */
        double err = fabs(got - want) / (sqrt(size / (double)n) + 1e-6);
        if (!(err <= 1e-6)) {
            print_error("%s: gradient %.12g, difference %.12g, relative %.3g\n", name, got, want,
                        err);
            fail();
        }
        if (err > *worst) *worst = err;
    }
    srf__free(direction);
}

static void check_gradients(struct srf_attention_config a, bool train_features, bool distil)
{
    struct fixture f;
    double worst = 0;
    open_fixture(&f, SRF_F64, a, 2, 13, train_features);
    if (distil) add_teacher(&f);
    test_ok(srf_model_zero_grads(f.model));
    loss(&f, true);
    for (int64_t i = 0; i < f.model->table.n; i++)
        check_piece(&f, f.model->table.rows[i].name, srf_model_param(f.model, i),
                    srf_model_grad(f.model, i), f.model->table.rows[i].count, &worst);
    if (train_features) {
        int64_t n;
        double *w = srf_model_features(f.model, &n);
        check_piece(&f, "features", w, srf_model_features_grad(f.model), n, &worst);
    }
    print_message("worst relative error %.2g\n", worst);
    close_fixture(&f);
}

static void gradients_softmax(void **state)
{
    (void)state;
    check_gradients(attention(SRF_ATTN_SOFTMAX, 0), false, false);
}

static void gradients_srf(void **state)
{
    (void)state;
    check_gradients(attention(SRF_ATTN_SRF, 0), false, false);
    check_gradients(attention(SRF_ATTN_SRF, 0), true, false);
}

static void gradients_hybrid(void **state)
{
    (void)state;
    check_gradients(attention(SRF_ATTN_SRF, 3), false, false);
    check_gradients(attention(SRF_ATTN_SRF, 3), true, false);
    check_gradients(attention(SRF_ATTN_SRF, -1), false, false);
    check_gradients(attention(SRF_ATTN_SRF, -2), true, false);
    struct srf_attention_config shared = attention(SRF_ATTN_SRF, 4);
    shared.per_head = false;
    shared.oprf_a = -0.05;
    check_gradients(shared, true, false);
}

static void gradients_rivals(void **state)
{
    (void)state;
    struct srf_attention_config a = attention(SRF_ATTN_WINDOW, 4);
    a.sinks = 2;
    check_gradients(a, false, false);
    for (int i = 0; i < 4; i++) {
        a = attention(i & 1 ? SRF_ATTN_T2R : SRF_ATTN_HEDGEHOG, i / 2 * 3);
        a.m = 8;
        check_gradients(a, true, i & 1);
    }
}

static void gradients_distillation(void **state)
{
    (void)state;
    check_gradients(attention(SRF_ATTN_SRF, 3), true, true);
    check_gradients(attention(SRF_ATTN_SRF, 0), false, true);
}

/* All gradients of one batch, parameters first, then features; srf__free. */
static char *gradients(enum srf_dtype dtype, struct srf_attention_config a,
                       enum srf_recompute recompute, size_t *bytes)
{
    struct fixture f;
    bool srf = a.kind == SRF_ATTN_SRF;
    size_t size = srf_dtype_bytes(dtype);
    open_fixture_with(&f, dtype, a, 2, 13, srf, recompute, SRF_TRAINED_ALL);
    f.kl = 0.7;
    f.mse = 0.9;
    if (dtype == SRF_F64) add_teacher(&f); /* loss() reads its outputs as doubles */
    test_ok(srf_model_zero_grads(f.model));
    struct srf_loss_args args = {.n = 26,
                                 .targets = f.targets,
                                 .scale = 1.0 / 26,
                                 .ce_weight = 1,
                                 .kl_weight = f.teacher ? f.kl : 0,
                                 .teacher = f.teacher,
                                 .backward = true};
    if (f.teacher) test_ok(srf_model_forward(f.teacher, &f.batch));
    test_ok(srf_model_forward(f.model, &f.batch));
    test_ok(srf_model_loss(f.model, &args));
    f.model->attention_teacher = f.teacher;
    f.model->attention_scale = f.mse / 26;
    test_ok(srf_model_backward(f.model, &f.batch));
    int64_t n_features = 0;
    if (srf) srf_model_features(f.model, &n_features);
    size_t params = (size_t)f.model->table.total * size, features = (size_t)n_features * size;
    char *all = srf__alloc(params + features, 1);
    memcpy(all, srf_model_grad(f.model, 0), params);
    if (srf) memcpy(all + params, srf_model_features_grad(f.model), features);
    *bytes = params + features;
    close_fixture(&f);
    return all;
}

/* What backward makes again is what forward made: the same bits. */
static void recomputation(void **state)
{
    (void)state;
    const enum srf_dtype dtypes[] = {SRF_F32, SRF_F64};
    const struct srf_attention_config kinds[] = {
        attention(SRF_ATTN_SOFTMAX, 0), attention(SRF_ATTN_SRF, 0), attention(SRF_ATTN_SRF, 3)};
    for (size_t k = 0; k < 6; k++) {
        size_t bytes, again;
        char *want = gradients(dtypes[k % 2], kinds[k / 2], SRF_RECOMPUTE_NONE, &bytes);
        for (int r = SRF_RECOMPUTE_CHEAP; r <= SRF_RECOMPUTE_BLOCK; r++) {
            char *got = gradients(dtypes[k % 2], kinds[k / 2], (enum srf_recompute)r, &again);
            assert_int_equal(again, bytes);
            assert_memory_equal(got, want, bytes);
            srf__free(got);
        }
        srf__free(want);
    }
}

/* Training a part of the parameters: that part's gradients are what they are in training all, bit
 * for bit, and the rest has none. */
static void parts_of_training(void **state)
{
    (void)state;
    for (int k = 0; k < 12; k++) {
        enum srf_trained trained = k % 2 ? SRF_TRAINED_ATTENTION : SRF_TRAINED_PROJECTIONS;
        enum srf_recompute recompute = (enum srf_recompute)(k / 2 % 3);
        struct srf_attention_config a = attention(SRF_ATTN_SRF, 3);
        struct fixture all, part;
        open_fixture_with(&all, SRF_F64, a, 2, 13, true, recompute, SRF_TRAINED_ALL);
        open_fixture_with(&part, SRF_F64, a, 2, 13, true, recompute, trained);
        if (k / 6) {
            add_teacher(&all);
            add_teacher(&part);
        }
        for (int twice = 0; twice < 2; twice++) { /* places nobody reads are written again */
            test_ok(srf_model_zero_grads(all.model));
            test_ok(srf_model_zero_grads(part.model));
            assert_true(loss(&all, true) == loss(&part, true));
        }
        int64_t count = 0, n;
        for (int64_t i = 0; i < all.model->table.n; i++) {
            const struct srf_tensor *row = &all.model->table.rows[i];
            bool wanted = strstr(row->name, ".attn.") || strstr(row->name, ".ln_1.");
            if (trained == SRF_TRAINED_PROJECTIONS)
                wanted = strstr(row->name, ".attn.") && strstr(row->name, "weight");
            const double *grad = srf_model_grad(part.model, i);
            assert_int_equal(grad != NULL, wanted);
            if (!wanted) continue;
            assert_memory_equal(grad, srf_model_grad(all.model, i), (size_t)row->count * 8);
            count += row->count;
        }
        assert_true(count > 0 && count <= part.model->n_trained);
        srf_model_features(all.model, &n);
        assert_memory_equal(srf_model_features_grad(part.model), srf_model_features_grad(all.model),
                            (size_t)n * 8);
        int64_t rows = 0;
        for (int64_t i = 0, end; srf_model_trained_rows(part.model, &i, &end); i = end)
            rows += end - i;
        assert_int_equal(rows, 2 * (trained == SRF_TRAINED_PROJECTIONS ? 2 : 6));
        close_fixture(&all);
        close_fixture(&part);
    }
}

/* Bytes of training GPT-2 124M on 32 x 1024 tokens in bf16, planned and never allocated. */
static size_t gpt2_bytes(enum srf_recompute recompute, enum srf_trained trained)
{
    static const char gpt2[] =
        "{\"model_type\": \"gpt2\", \"n_layer\": 12, \"n_head\": 12, \"n_embd\": 768,"
        " \"n_positions\": 1024, \"vocab_size\": 50257, \"activation_function\": \"gelu_new\"}";
    struct srf_ctx *ctx;
    struct srf_arena *arena;
    struct srf_model *m;
    struct srf_model_config config;
    struct srf_attention_config a = srf_attention_default();
    a.kind = SRF_ATTN_SRF;
    test_ok(srf_ctx_create("cpu", SRF_F32, 1, &ctx));
    ctx->dtype = SRF_BF16; /* a plan runs no op */
    test_ok(srf_model_config_from_json(gpt2, &config));
    test_ok(srf_arena_create(ctx, &arena));
    test_ok(srf_model_create(ctx, &config, &a, &m));
    struct srf_model_plan plan = {.b = 32,
                                  .t = 1024,
                                  .train = true,
                                  .trained = trained,
                                  .logit_rows = 4736,
                                  .recompute = recompute};
    test_ok(srf_model_plan(m, arena, &plan));
    static const char *const classes[] = {"weights",  "masters",     "gradients",
                                          "features", "activations", "logits"};
    size_t bytes = 2 * (size_t)m->n_trained * sizeof(float); /* moments */
    for (size_t i = 0; i < sizeof classes / sizeof *classes; i++)
        bytes += srf_arena_bytes(arena, classes[i]);
    srf_model_free(m);
    srf_arena_free(arena);
    srf_ctx_free(ctx);
    return bytes;
}

static void memory_of_gpt2(void **state)
{
    (void)state;
    const double limit[] = {11.5e9, 9.3e9, 4.3e9};
    for (int r = SRF_RECOMPUTE_NONE; r <= SRF_RECOMPUTE_BLOCK; r++) {
        double bytes = (double)gpt2_bytes((enum srf_recompute)r, SRF_TRAINED_ALL);
        double part = (double)gpt2_bytes((enum srf_recompute)r, SRF_TRAINED_ATTENTION);
        print_message("recompute %d: %.1f MB, attention alone %.1f\n", r, bytes * 1e-6,
                      part * 1e-6);
        assert_true(bytes < limit[r] && part < bytes - 1.1e9); /* 90M gradients, moments */
    }
}

/* Gradient of a batch in one piece and in micro-batches, single precision. */
static void micro_batches(void **state)
{
    (void)state;
    const int64_t windows[] = {-1, 0, 3};
    for (int w = 0; w < 3; w++) {
        struct srf_attention_config a = attention(windows[w] < 0 ? SRF_ATTN_SOFTMAX : SRF_ATTN_SRF,
                                                  windows[w] < 0 ? 0 : windows[w]);
        struct fixture f;
        open_fixture(&f, SRF_F32, a, 4, 13, false);
        int64_t n = f.model->table.total;
        double *whole = srf__alloc((size_t)n, sizeof *whole);
        double *parts = srf__alloc((size_t)n, sizeof *parts);
        for (int split = 0; split < 2; split++) {
            test_ok(srf_model_zero_grads(f.model));
            for (int64_t at = 0; at < 4; at += split ? 1 : 4) {
                struct srf_batch batch = {
                    .b = split ? 1 : 4, .t = 13, .tokens = f.tokens + at * 13};
                struct srf_loss_args args = {.n = batch.b * 13,
                                             .targets = f.targets + at * 13,
                                             .scale = 1.0 / 52,
                                             .ce_weight = 1,
                                             .backward = true};
                test_ok(srf_model_forward(f.model, &batch));
                test_ok(srf_model_loss(f.model, &args));
                test_ok(srf_model_backward(f.model, &batch));
            }
            test_to_double(f.ctx, srf_model_grad(f.model, 0), split ? parts : whole, n);
        }
        test_close("micro-batch gradient", parts, whole, n, 1e-6);
        srf__free(whole);
        srf__free(parts);
        close_fixture(&f);
    }
}

/* Windows of the layers: as text, in files, and refused where they fit nothing. */
static void layer_windows(void **state)
{
    (void)state;
    struct srf_attention_config a = attention(SRF_ATTN_SRF, 3), b;
    char *text, *again, line[200];
    test_ok(srf_attention_set_windows(&a, "5,0"));
    assert_int_equal(a.n_windows, 2);
    assert_int_equal(a.window, 5);
    assert_int_equal(srf_attention_window(&a, 0), 5);
    assert_int_equal(srf_attention_window(&a, 1), 0);
    srf_attention_describe(&a, line, sizeof line);
    assert_non_null(strstr(line, "windows 5,0 exact"));
    test_ok(srf_attention_to_json(&a, &text));
    test_ok(srf_attention_from_json(text, &b));
    test_ok(srf_attention_to_json(&b, &again));
    assert_string_equal(text, again);
    assert_int_equal(b.n_windows, 2);
    srf__free(text);
    srf__free(again);
    test_ok(srf_attention_check(&a, 6));
    test_ok(srf_attention_check_layers(&a, 2));
    test_fails(srf_attention_check_layers(&a, 3), SRF_MISMATCH, "windows of 2 layers");
    a.far_none = true;
    test_fails(srf_attention_check(&a, 6), SRF_INVALID, "there must be a window");
    test_ok(srf_attention_set_windows(&a, "8,8,8"));
    assert_int_equal(a.n_windows, 0);
    assert_int_equal(a.window, 8);
    const char *bad[] = {"", ",", "4,", ",4", "4,,4", "4 ,4", "-1,4", "4;4", "65537", "1e3", "x"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        test_fails(srf_attention_set_windows(&a, bad[i]), SRF_INVALID, "windows '");
    test_fails(srf_attention_from_json("{\"kind\": \"srf\", \"windows\": [4]}", &a), SRF_FORMAT,
               "must be a string");
    test_fails(srf_attention_from_json("{\"kind\": \"srf\", \"windows\": \"4,\"}", &a), SRF_INVALID,
               "windows '4,'");
}

/* Features of the layers, alike. */
static void layer_features(void **state)
{
    (void)state;
    struct srf_attention_config a = attention(SRF_ATTN_SRF, 3), b;
    char *text, *again, line[200];
    test_ok(srf_attention_set_layer_m(&a, "16,64"));
    assert_true(a.n_layer_m == 2 && a.m == 64);
    assert_true(srf_attention_m(&a, 0) == 16 && srf_attention_m(&a, 1) == 64);
    assert_true(srf_attention_m_before(&a, 0) == 0 && srf_attention_m_before(&a, 2) == 80);
    srf_attention_describe(&a, line, sizeof line);
    assert_non_null(strstr(line, "m=16,64,"));
    test_ok(srf_attention_to_json(&a, &text));
    test_ok(srf_attention_from_json(text, &b));
    test_ok(srf_attention_to_json(&b, &again));
    assert_string_equal(text, again);
    assert_true(srf_attention_same_features(&a, &b));
    b.layer_m[0] = 15;
    assert_false(srf_attention_same_features(&a, &b));
    srf__free(text);
    srf__free(again);
    test_ok(srf_attention_check(&a, 6));
    test_ok(srf_attention_check_layers(&a, 2));
    test_fails(srf_attention_check_layers(&a, 3), SRF_MISMATCH, "features of 2 layers");
    b.layer_m[0] = 65;
    test_fails(srf_attention_check(&b, 6), SRF_INVALID, "layer 0 has 65 features");
    b.kind = SRF_ATTN_T2R;
    test_fails(srf_attention_check(&b, 6), SRF_INVALID, "only srf");
    test_ok(srf_attention_set_layer_m(&a, "8,8,8"));
    assert_true(a.n_layer_m == 0 && a.m == 8 && srf_attention_m_before(&a, 3) == 24);
    const char *bad[] = {"", "0,8", "8,0", "8,", ",8", "8,,8", "-8,8", "65537,8", "8.5", "m"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        test_fails(srf_attention_set_layer_m(&a, bad[i]), SRF_INVALID, "features '");
    test_fails(srf_attention_from_json("{\"kind\": \"srf\", \"layer_m\": 8}", &a), SRF_FORMAT,
               "must be a string");
    test_fails(srf_attention_from_json("{\"kind\": \"srf\", \"layer_m\": \"8,0\"}", &a),
               SRF_INVALID, "features '8,0'");
}

/* A layer's features are the first ones of those that it would have with more of them; a file gives
 * them back, and the same model with the key alone. */
static void layer_features_drawn(void **state)
{
    (void)state;
    enum { D = 6, H = 2, MOST = 7 };
    struct fixture f;
    struct srf_checkpoint *back;
    char path[96];
    const int own[] = {3, MOST};
    double most[2 * H * MOST * D], got[H * (3 + MOST) * D];
    open_fixture(&f, SRF_F64, attention(SRF_ATTN_SRF, 5), 1, 9, false);
    test_to_double(f.ctx, srf_arena_ptr(f.arena, f.model->slot_w), most, 2 * H * MOST * D);
    close_fixture(&f);
    open_fixture(&f, SRF_F64, attention(SRF_ATTN_SRF, -2), 1, 9, false);
    test_to_double(f.ctx, srf_arena_ptr(f.arena, f.model->slot_w), got, H * (3 + MOST) * D);
    const double *at = got;
    for (int l = 0; l < 2; l++)
        for (int h = 0; h < H; h++, at += own[l] * D)
            test_close("features of a layer", at, most + (l * H + h) * MOST * D, own[l] * D, 1e-6);
    test_ok(srf_model_download(f.model, f.ck));
    assert_int_equal(srf_checkpoint_bias_count(f.ck), H * (3 + MOST));
    test_ok(srf_checkpoint_save(f.ck, test_at(path, "own.h5")));
    test_ok(srf_checkpoint_load(path, NULL, &back));
    assert_true(srf_attention_same_features(&back->attention, &f.ck->attention));
    assert_memory_equal(back->features_w, f.ck->features_w,
                        (size_t)srf_checkpoint_features_count(f.ck) * sizeof(float));
    assert_memory_equal(back->features_bias, f.ck->features_bias,
                        (size_t)srf_checkpoint_bias_count(f.ck) * sizeof(float));
    /* Another window leaves them, another draw or number of them does not. */
    struct srf_attention_config other = back->attention;
    other.window = 4;
    srf_checkpoint_set_attention(back, &other);
    assert_non_null(back->features_w);
    other.m = MOST + 1;
    other.n_layer_m = 0;
    srf_checkpoint_set_attention(back, &other);
    assert_null(back->features_w);
    assert_null(back->features_bias);
    srf_checkpoint_free(back);
    test_ok(srf_checkpoint_load(path, NULL, &back));
    /* Another split of as many features is other features. */
    test_ok(srf_attention_set_layer_m(&back->attention, "4,6"));
    test_ok(srf_checkpoint_save(back, path));
    srf_checkpoint_free(back);
    test_ok(srf_checkpoint_load(path, NULL, &back));
    assert_false(srf_attention_same_features(&back->attention, &f.ck->attention));
    srf_checkpoint_free(back);
    close_fixture(&f);
}

/* Files whose W is not of the layers' numbers of features. */
static void layer_features_hostile(void **state)
{
    (void)state;
    static const struct {
        const char *layer_m;
        int ndim;
        int64_t shape[4], rows_of_bias;
        bool nan;
        const char *words; /* NULL: none */
    } cases[] = {
        {"3,7", 2, {20, 6}, 20, false, NULL},
        {"3,7", 2, {19, 6}, 20, false, "/attention/w"},
        {"3,7", 2, {20, 5}, 20, false, "/attention/w"},
        {"3,7", 2, {20, 6}, 19, false, "/attention/bias"},
        {"3,7", 4, {2, 2, 7, 6}, 28, false, "/attention/w"},
        {"7,7", 2, {28, 6}, 28, false, "/attention/w"},
        {"3,7", 2, {20, 6}, 20, true, "/attention/w: element 5 is not finite"},
        {"3,7,3", 2, {26, 6}, 26, false, "features of 3 layers"},
        {"65536,65536", 2, {20, 6}, 20, false, "/attention/w"},
    };
    char path[96];
    test_at(path, "hostile.h5");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct srf_checkpoint *ck;
        struct srf_h5 *f;
        float values[28 * 6] = {0};
        if (cases[i].nan) values[5] = NAN;
        test_ok(srf_checkpoint_init(config_json, 1, &ck));
        ck->attention = attention(SRF_ATTN_SRF, 3);
        test_ok(srf_attention_set_layer_m(&ck->attention, cases[i].layer_m));
        test_ok(srf_h5_create(path, &f));
        test_ok(srf_checkpoint_put(ck, f));
        test_ok(srf_h5_put(f, "/attention/w", SRF_F32, cases[i].ndim, cases[i].shape, values));
        int64_t bias[3] = {cases[i].rows_of_bias};
        if (cases[i].ndim == 4) memcpy(bias, cases[i].shape, sizeof bias);
        test_ok(srf_h5_put(f, "/attention/bias", SRF_F32, cases[i].ndim - 1, bias, values));
        test_ok(srf_h5_commit(f));
        srf_checkpoint_free(ck);
        srf_status st = srf_checkpoint_load(path, NULL, &ck);
        if (!cases[i].words) test_ok(st);
        if (!cases[i].words) srf_checkpoint_free(ck);
        if (!cases[i].words) continue;
        assert_int_not_equal(st, SRF_OK);
        test_fails(st, st, cases[i].words);
    }
}

/* The whole model in its parallel form, by prefill split anywhere, and token by token. */
static void forms_agree(void **state)
{
    (void)state;
    const int64_t windows[] = {0, 3, 8, -1, -2};
    for (int w = 0; w < 5; w++) {
        struct fixture f;
        open_fixture(&f, SRF_F32, attention(SRF_ATTN_SRF, windows[w]), 2, 31, false);
        const int64_t b = 2, t = 31, c = 12;
        double *want = srf__alloc((size_t)(b * t * c), sizeof *want);
        double *got = srf__alloc((size_t)(b * t * c), sizeof *got);
        double *row = srf__alloc((size_t)(b * t * c), sizeof *row);
        float *st = srf__alloc((size_t)(b * srf_model_state_count(f.model)), sizeof *st);
        test_ok(srf_model_forward(f.model, &f.batch));
        test_to_double(f.ctx, srf_arena_ptr(f.arena, f.model->slot_hidden), want, b * t * c);
        const int64_t cuts[3][5] = {{31}, {7, 1, 12, 1, 10}, {1, 1, 17, 11, 1}};
        for (int k = 0; k < 4; k++) {
            memset(st, 0, (size_t)(b * srf_model_state_count(f.model)) * sizeof *st);
            for (int64_t at = 0, i = 0; at < t; i++) {
                int64_t n = k == 3 ? 1 : cuts[k][i];
                int32_t piece[64], pos[2] = {(int32_t)at, (int32_t)at};
                for (int64_t s = 0; s < b; s++)
                    memcpy(piece + s * n, f.tokens + s * t + at, (size_t)n * sizeof *piece);
                struct srf_batch batch = {.b = b,
                                          .t = n,
                                          .tokens = piece,
                                          .mode = n == 1 ? SRF_MODE_STEP : SRF_MODE_PREFILL,
                                          .state = st,
                                          .pos = pos};
                test_ok(srf_model_forward(f.model, &batch));
                test_to_double(f.ctx, srf_arena_ptr(f.arena, f.model->slot_hidden), row, b * n * c);
                for (int64_t s = 0; s < b; s++)
                    memcpy(got + (s * t + at) * c, row + s * n * c, (size_t)(n * c) * sizeof *got);
                at += n;
            }
            test_close("recurrent form of the model", got, want, b * t * c, 1e-5);
        }
        srf__free(want);
        srf__free(got);
        srf__free(row);
        srf__free(st);
        close_fixture(&f);
    }
}

/* Two sequences of different lengths packed into each prefill, their states in any slots, past the
 * end of the learned positions: as the parallel form of each, under each policy. */
static void packed_prefill(void **state)
{
    (void)state;
    enum { T = 60, C = 12 };
    const enum srf_positions policies[] = {SRF_POS_WRAP, SRF_POS_CLAMP};
    double want[2][T * C], got[2][T * C], rows[T * C];
    for (int k = 0; k < 4; k++) {
        struct fixture f;
        open_fixture(&f, SRF_F32, attention(SRF_ATTN_SRF, k < 2 ? 0 : 5), 1, T, false);
        const int32_t lens[2][2] = {{25, 10}, {35, 20}}, slots[2] = {2, 0};
        int32_t pos[2] = {0, 0}, packed[T];
        float *st = srf__calloc((size_t)(3 * srf_model_state_count(f.model)), sizeof *st);
        struct srf_batch batch = {.b = 1, .t = T, .tokens = f.tokens};
        assert_int_equal(srf_model_forward(f.model, &batch), SRF_INVALID);
        f.model->positions = policies[k % 2];
        test_ok(srf_model_forward(f.model, &batch));
        test_to_double(f.ctx, srf_arena_ptr(f.arena, f.model->slot_hidden), want[0], T * C);
        memcpy(want[1], want[0], sizeof want[0]);
        for (int round = 0; round < 2; round++) {
            const int32_t *len = lens[round];
            memcpy(packed, f.tokens + pos[0], (size_t)len[0] * sizeof *packed);
            memcpy(packed + len[0], f.tokens + pos[1], (size_t)len[1] * sizeof *packed);
            batch = (struct srf_batch){.b = 2,
                                       .t = len[0],
                                       .tokens = packed,
                                       .mode = SRF_MODE_PREFILL,
                                       .state = st,
                                       .pos = pos,
                                       .n_slots = 3,
                                       .lens = len,
                                       .slots = slots};
            test_ok(srf_model_forward(f.model, &batch));
            int64_t n = len[0] + len[1];
            test_to_double(f.ctx, srf_arena_ptr(f.arena, f.model->slot_hidden), rows, n * C);
            memcpy(got[0] + pos[0] * C, rows, (size_t)(len[0] * C) * sizeof *rows);
            memcpy(got[1] + pos[1] * C, rows + len[0] * C, (size_t)(len[1] * C) * sizeof *rows);
            for (int i = 0; i < 2; i++) pos[i] += len[i];
        }
        for (int i = 0; i < 2; i++) test_close("packed prefill", got[i], want[i], pos[i] * C, 1e-5);
        const int32_t bad[2] = {3, 0}, none[2] = {5, 0};
        batch.slots = bad;
        assert_int_equal(srf_model_forward(f.model, &batch), SRF_INVALID);
        batch.slots = slots;
        batch.lens = none;
        assert_int_equal(srf_model_forward(f.model, &batch), SRF_INVALID);
        srf__free(st);
        close_fixture(&f);
    }
}

/* A prefill of which only states and last logits are wanted gives the same of both. */
static void last_only(void **state)
{
    (void)state;
    enum { T = 400, SHORT = 200, V = 29 };
    float want[2 * V], got[2 * V];
    int32_t tokens[T + SHORT];
    const int32_t lens[2] = {T, SHORT}, pos[2] = {0, 0};
    struct fixture f;
    open_fixture(&f, SRF_F32, attention(SRF_ATTN_SRF, 5), 2, T, false);
    f.model->positions = SRF_POS_WRAP;
    for (int i = 0; i < T + SHORT; i++) tokens[i] = f.tokens[i % 61];
    int64_t count = 2 * srf_model_state_count(f.model);
    float *all = srf__calloc((size_t)count, sizeof *all), *last = srf__calloc((size_t)count, 4);
    assert_true(all && last);
    struct srf_batch batch = {.b = 2,
                              .t = T,
                              .tokens = tokens,
                              .mode = SRF_MODE_PREFILL,
                              .state = all,
                              .pos = pos,
                              .lens = lens};
    test_ok(srf_model_forward(f.model, &batch));
    assert_int_equal(srf_batch_hidden_rows(&batch), T + SHORT);
    test_ok(srf_model_last_logits(f.model, &batch, want));
    batch.state = last;
    batch.last_only = true;
    assert_int_equal(srf_batch_hidden_rows(&batch), 2);
    test_ok(srf_model_forward(f.model, &batch));
    test_ok(srf_model_last_logits(f.model, &batch, got));
    for (int i = 0; i < 2 * V; i++)
        if (!(fabsf(got[i] - want[i]) <= 1e-5f * (1 + fabsf(want[i]))))
            fail_msg("logit %d is %g, expected %g", i, (double)got[i], (double)want[i]);
    assert_memory_equal(all, last, (size_t)count * sizeof *all);
    srf__free(all);
    srf__free(last);
    close_fixture(&f);
}

/* More positions from the same table: ends stay ends, what lies between is on the line between
 * neighbours, and nothing else changes. */
static void stretched_positions(void **state)
{
    (void)state;
    enum { C = 12, OLD = 40, NEW = 118 }; /* 117 = 3 * 39: every third row is an old one */
    struct srf_checkpoint *ck, *old;
    test_ok(srf_checkpoint_init(config_json, 1, &ck));
    test_ok(srf_checkpoint_init(config_json, 1, &old));
    assert_int_equal(srf_checkpoint_stretch_positions(ck, OLD), SRF_INVALID);
    test_ok(srf_checkpoint_stretch_positions(ck, NEW));
    assert_int_equal(ck->config.n_pos, NEW);
    for (int64_t i = 0; i < ck->table.n; i++) {
        const struct srf_tensor *was = &old->table.rows[i], *is = &ck->table.rows[i];
        const float *a = old->params + was->offset, *b = ck->params + is->offset;
        if (strcmp(is->name, "transformer.wpe.weight") != 0) {
            assert_int_equal(was->count, is->count);
            assert_memory_equal(a, b, (size_t)is->count * sizeof *b);
            continue;
        }
        assert_int_equal(is->shape[0], NEW);
        for (int64_t p = 0; p < NEW; p++)
            for (int64_t j = 0; j < C; j++) {
                float low = a[p / 3 * C + j], high = p % 3 ? a[(p / 3 + 1) * C + j] : low;
                float want = low + (high - low) * (float)(p % 3) / 3;
                assert_true(fabsf(b[p * C + j] - want) <= 1e-6f * (fabsf(low) + fabsf(high)));
            }
    }
    srf_checkpoint_free(ck);
    srf_checkpoint_free(old);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gradients_softmax),
        cmocka_unit_test(gradients_srf),
        cmocka_unit_test(gradients_hybrid),
        cmocka_unit_test(gradients_rivals),
        cmocka_unit_test(gradients_distillation),
        cmocka_unit_test(recomputation),
        cmocka_unit_test(parts_of_training),
        cmocka_unit_test(memory_of_gpt2),
        cmocka_unit_test(micro_batches),
        cmocka_unit_test(layer_windows),
        cmocka_unit_test(forms_agree),
        cmocka_unit_test(packed_prefill),
        cmocka_unit_test(last_only),
        cmocka_unit_test(stretched_positions),
        cmocka_unit_test(layer_features),
        cmocka_unit_test(layer_features_drawn),
        cmocka_unit_test(layer_features_hostile),
    };
    return cmocka_run_group_tests(tests, test_make_root, test_remove_root);
}
