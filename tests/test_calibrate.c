/* Calibration: softmax attention does not notice it, |q + k|^2 falls, features come nearer. And
 * attention without a far part, which is the rival that retrofits are compared with. */
#include "tests/support.h"
#include "train/calibrate.h"

#include <math.h>
#include <string.h>

enum { L = 2, H = 2, D = 8, C = H * D, B = 3, T = 40, V = 23 };

static const char config_json[] =
    "{\"model_type\": \"gpt2\", \"n_layer\": 2, \"n_head\": 2, \"n_embd\": 16, \"n_positions\": 48,"
    " \"vocab_size\": 23, \"activation_function\": \"gelu_new\"}";

/* Weights with a shape, and biases, so that q and k have means. */
static struct srf_checkpoint *checkpoint(void)
{
    struct srf_checkpoint *ck;
    test_ok(srf_checkpoint_init(config_json, 7, &ck));
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 12, 0, 0);
    for (int64_t i = 0; i < ck->table.n; i++) {
        const struct srf_tensor *row = &ck->table.rows[i];
        bool zeros = row->init_std == 0;
        for (int64_t k = 0; k < row->count; k++) {
            float *p = &ck->params[row->offset + k];
            *p = zeros ? (float)(0.5 * srf_rng_normal(&r)) : 6 * *p;
        }
    }
    ck->attention.kind = SRF_ATTN_SRF;
    ck->attention.m = 16;
    return ck;
}

static void random_tokens(int32_t *tokens)
{
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 11, 0, 0);
    for (int i = 0; i < B * T; i++) tokens[i] = (int32_t)srf_rng_below(&r, V);
}

static void model_logits(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                         const struct srf_attention_config *attention, const int32_t *tokens,
                         double *out)
{
    struct srf_model *m;
    struct srf_arena *arena;
    static float logits[B * T * V];
    int32_t targets[B * T] = {0};
    test_ok(srf_model_create(ctx, &ck->config, attention, &m));
    test_ok(srf_arena_create(ctx, &arena));
    struct srf_model_plan plan = {.b = B, .t = T};
    test_ok(srf_model_plan(m, arena, &plan));
    test_ok(srf_arena_commit(arena));
    test_ok(srf_model_upload(m, ck));
    struct srf_batch batch = {.b = B, .t = T, .tokens = tokens};
    test_ok(srf_model_forward(m, &batch));
    struct srf_loss_args loss = {.n = B * T, .targets = targets, .logits = logits};
    test_ok(srf_model_loss(m, &loss));
    for (int i = 0; i < B * T * V; i++) out[i] = (double)logits[i];
    srf_model_free(m);
    srf_arena_free(arena);
}

static struct srf_ctx *context(void)
{
    struct srf_ctx *ctx;
    test_ok(srf_ctx_create("cpu", SRF_F64, 1, &ctx));
    return ctx;
}

static void test_softmax_does_not_notice(void **state)
{
    (void)state;
    struct srf_ctx *ctx = context();
    struct srf_checkpoint *ck = checkpoint();
    struct srf_attention_config softmax = srf_attention_default();
    struct srf_calibrate_config config = {
        .windows = B, .seq_len = T, .balance = true, .best_of = 1};
    struct srf_calibrate_result result;
    static double before[B * T * V], after[B * T * V];
    int32_t tokens[B * T];
    random_tokens(tokens);
    model_logits(ctx, ck, &softmax, tokens, before);
    test_ok(srf_calibrate(ctx, ck, tokens, &config, &result));
    model_logits(ctx, ck, &softmax, tokens, after);
    test_close("logits", after, before, B * T * V, 1e-5); /* the weights are fp32 */
    assert_true(result.v_after < 0.9 * result.v_before);
    assert_null(ck->features_w);

    /* What it was to come to, it has come to; and there is nothing left to gain. */
    double expected = result.v_after;
    test_ok(srf_calibrate(ctx, ck, tokens, &config, &result));
    assert_true(fabs(result.v_before / expected - 1) < 0.02); /* the ridge */
    assert_true(fabs(result.v_after / expected - 1) < 0.02);
    srf_checkpoint_free(ck);
    srf_ctx_free(ctx);
}

static void test_features(void **state)
{
    (void)state;
    struct srf_ctx *ctx = context();
    struct srf_checkpoint *ck = checkpoint();
    struct srf_calibrate_config config = {
        .windows = B, .seq_len = T, .balance = true, .fit = true, .best_of = 8};
    struct srf_calibrate_result result, second;
    static double exact[B * T * V], fitted[B * T * V], plain[B * T * V];
    int32_t tokens[B * T];
    struct srf_attention_config softmax = srf_attention_default();
    random_tokens(tokens);
    model_logits(ctx, ck, &softmax, tokens, exact);
    model_logits(ctx, ck, &ck->attention, tokens, plain);
    test_ok(srf_calibrate(ctx, ck, tokens, &config, &result));
    assert_non_null(ck->features_w);
    assert_true(result.error_chosen < result.error_first);
    model_logits(ctx, ck, &ck->attention, tokens, fitted);
    double error = test_error(fitted, exact, B * T * V),
           without = test_error(plain, exact, B * T * V);
    print_message("logits' error: %.3f, calibrated %.3f\n", without, error);
    assert_true(error < 0.8 * without);

    /* More draws to choose from are never worse; refused: what has no meaning. */
    struct srf_checkpoint *other = checkpoint();
    config.best_of = 16;
    test_ok(srf_calibrate(ctx, other, tokens, &config, &second));
    assert_true(second.error_chosen <= result.error_chosen);
    config.balance = false;
    assert_int_equal(srf_calibrate(ctx, other, tokens, &config, &second), SRF_INVALID);
    config.balance = true;
    other->attention.per_head = false;
    assert_int_equal(srf_calibrate(ctx, other, tokens, &config, &second), SRF_INVALID);
    srf_checkpoint_free(other);
    srf_checkpoint_free(ck);
    srf_ctx_free(ctx);
}

/* Fitted features are those of the draw, each direction j stretched by some sqrt(1 - 4 A_j), and
 * their biases make up for it, as OPRF's do: sum_j A_j w_j^2 + log(1 - 4 A_j) / 4. */
static void test_fitted_biases(void **state)
{
    (void)state;
    struct srf_ctx *ctx = context();
    struct srf_calibrate_config config = {
        .windows = B, .seq_len = T, .balance = true, .fit = true, .best_of = 1};
    struct srf_calibrate_result result;
    int32_t tokens[B * T];
    random_tokens(tokens);
    for (int unit = 0; unit < 2; unit++) {
        struct srf_checkpoint *ck = checkpoint();
        float w[L * H * 16 * D], bias[L * H * 16];
        ck->attention.normalize_rows = unit;
        test_ok(srf_attention_draw(&ck->attention, L, H, D, NULL, w, bias));
        test_ok(srf_calibrate(ctx, ck, tokens, &config, &result));
        for (int i = 0; i < L * H * 16; i++) {
            double want = (double)bias[i];
            for (int j = 0; j < D; j++) {
                double old = (double)w[i * D + j], by = (double)ck->features_w[i * D + j] / old;
                double first =
                    (double)ck->features_w[i / 16 * 16 * D + j] / (double)w[i / 16 * 16 * D + j];
                assert_true(by >= 1 && fabs(by / first - 1) < 1e-5);
                want += (1 - by * by) / 4 * old * old + log(by * by) / 4;
            }
            assert_true(fabs((double)ck->features_bias[i] - want) < 1e-4 * (1 + fabs(want)));
        }
        srf_checkpoint_free(ck);
    }
    srf_ctx_free(ctx);
}

/* Where the window holds all there is, no draw is better than another. */
static void test_choice_beside_a_window(void **state)
{
    (void)state;
    struct srf_ctx *ctx = context();
    struct srf_calibrate_config config = {
        .windows = B, .seq_len = T, .balance = true, .best_of = 2};
    struct srf_calibrate_result result;
    struct srf_checkpoint *ck = checkpoint();
    int32_t tokens[B * T];
    random_tokens(tokens);
    ck->attention.window = T;
    test_ok(srf_calibrate(ctx, ck, tokens, &config, &result));
    assert_true(result.error_first < 1e-6 && result.error_chosen < 1e-6);
    srf_checkpoint_free(ck);
    srf_ctx_free(ctx);
}

/* Fitted features of a layer that has fewer are the first ones of those that it would have. */
static void test_features_by_layer(void **state)
{
    (void)state;
    struct srf_ctx *ctx = context();
    struct srf_checkpoint *all = checkpoint(), *own = checkpoint();
    struct srf_calibrate_config config = {
        .windows = B, .seq_len = T, .balance = true, .fit = true, .best_of = 1};
    struct srf_calibrate_result result;
    int32_t tokens[B * T];
    random_tokens(tokens);
    test_ok(srf_attention_set_layer_m(&own->attention, "5,16"));
    test_ok(srf_calibrate(ctx, all, tokens, &config, &result));
    test_ok(srf_calibrate(ctx, own, tokens, &config, &result));
    const float *w = own->features_w, *bias = own->features_bias;
    for (int l = 0; l < L; l++)
        for (int h = 0; h < H; h++) {
            int m = l ? 16 : 5, at = (l * H + h) * 16;
            assert_memory_equal(w, all->features_w + at * D, (size_t)(m * D) * sizeof *w);
            assert_memory_equal(bias, all->features_bias + at, (size_t)m * sizeof *bias);
            w += m * D;
            bias += m;
        }
    config.best_of = 4;
    test_ok(srf_calibrate(ctx, own, tokens, &config, &result));
    assert_true(result.error_chosen > 0 && result.error_chosen < result.error_first);
    srf_checkpoint_free(all);
    srf_checkpoint_free(own);
    srf_ctx_free(ctx);
}

/* Two layers of windows of 4 see at most 14 tokens back. */
static void test_without_far(void **state)
{
    (void)state;
    struct srf_ctx *ctx = context();
    struct srf_checkpoint *ck = checkpoint();
    static double first[B * T * V], second[B * T * V];
    int32_t tokens[B * T];
    random_tokens(tokens);
    ck->attention.window = 4;
    for (int far = 0; far < 2; far++) {
        ck->attention.far_none = far == 0;
        model_logits(ctx, ck, &ck->attention, tokens, first);
        tokens[0] = (tokens[0] + 1) % V;
        model_logits(ctx, ck, &ck->attention, tokens, second);
        double near_error = test_error(first, second, 4 * V);
        double far_error = test_error(first + 15 * V, second + 15 * V, (T - 15) * V);
        assert_true(near_error > 1e-3);
        assert_true(far ? far_error > 1e-6 : far_error < 1e-12);
    }
    /* The same from features that a file stores, as an export has them. */
    ck->attention.far_none = true;
    model_logits(ctx, ck, &ck->attention, tokens, first);
    test_ok(SRF_ALLOC(ck->features_w, srf_checkpoint_features_count(ck)));
    test_ok(SRF_ALLOC(ck->features_bias, srf_checkpoint_bias_count(ck)));
    test_ok(srf_attention_draw(&ck->attention, L, H, D, NULL, ck->features_w, ck->features_bias));
    model_logits(ctx, ck, &ck->attention, tokens, second);
    assert_true(test_error(second, first, B * T * V) < 1e-12);
    ck->attention.window = 0;
    ck->attention.far_none = true;
    assert_int_equal(srf_attention_check(&ck->attention, D), SRF_INVALID);
    srf_checkpoint_free(ck);
    srf_ctx_free(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_softmax_does_not_notice),
        cmocka_unit_test(test_features),
        cmocka_unit_test(test_fitted_biases),
        cmocka_unit_test(test_choice_beside_a_window),
        cmocka_unit_test(test_features_by_layer),
        cmocka_unit_test(test_without_far),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
