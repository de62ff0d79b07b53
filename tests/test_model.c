/* The whole model in training: gradients in double against central differences, recomputation,
 * training a part, micro-batches, memory. */
#include "tests/model_case.h"

#include <math.h>
#include <string.h>

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
        double want = 0, got = 0, size = 0, err = INFINITY;
        for (int64_t i = 0; i < n; i++) {
            got += grad[i] * direction[i];
            size += grad[i] * grad[i];
        }
        /* T2R has corners, and a smaller step is less likely to go over one. */
        for (double h = 1e-3; h > 5e-6 && !(err <= 1e-6); h /= 10) {
            want = directional_difference(f, values, direction, n, h);
            /* relative to the gradient's size along a random direction */
            err = fabs(got - want) / (sqrt(size / (double)n) + 1e-6);
        }
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gradients_softmax),      cmocka_unit_test(gradients_srf),
        cmocka_unit_test(gradients_hybrid),       cmocka_unit_test(gradients_rivals),
        cmocka_unit_test(gradients_distillation), cmocka_unit_test(recomputation),
        cmocka_unit_test(parts_of_training),      cmocka_unit_test(memory_of_gpt2),
        cmocka_unit_test(micro_batches),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
