/* Windows by layer: the choice against all there are, and what a plan makes of a model. */
#include "tests/support.h"
#include "train/plan_windows.h"
#include "train/validate.h"

#include <math.h>
#include <stdlib.h>

enum { B = 2, T = 40, V = 31, L = 3, W = 4 };

static const char config_json[] =
    "{\"model_type\": \"gpt2\", \"n_layer\": 3, \"n_head\": 2, \"n_embd\": 16, \"n_positions\": 40,"
    " \"vocab_size\": 31, \"activation_function\": \"gelu_new\"}";

static const int64_t halves[] = {1, 2, 4};

/* Least error of all choices of n layers that have the room. */
static double least(const double *error, int n)
{
    double best = INFINITY;
    int all = 1;
    for (int l = 0; l < n; l++) all *= 3;
    for (int i = 0; i < all; i++) {
        double sum = 0;
        int64_t used = 0;
        for (int l = 0, rest = i; l < n; l++, rest /= 3) {
            sum += error[rest % 3 * n + l];
            used += halves[rest % 3];
        }
        if (used <= 2 * n && sum < best) best = sum;
    }
    return best;
}

static void the_best_choice(void **state)
{
    (void)state;
    for (int trial = 0; trial < 60; trial++) {
        int n = 1 + trial % 6, choice[6];
        double error[18], sum = 0;
        int64_t used = 0;
        test_normal(error, 3 * n, 1, (uint32_t)trial);
        for (int i = 0; i < 3 * n; i++) error[i] = trial % 7 == 6 ? 0.5 : exp(error[i]);
        test_ok(srf_plan_windows_choose(error, n, choice));
        for (int l = 0; l < n; l++) {
            assert_in_range(choice[l], 0, 2);
            sum += error[choice[l] * n + l];
            used += halves[choice[l]];
        }
        assert_true(used <= 2 * n);
        assert_true(fabs(sum - least(error, n)) < 1e-12 * sum);
    }
}

/* Mean over heads of the squared error of ck's attention as it is. */
static double measured(struct srf_ctx *ctx, const struct srf_checkpoint *ck, const int32_t *tokens)
{
    struct srf_validate_result r;
    const struct srf_validate_config c = {.attention = ck->attention,
                                          .m = &ck->attention.m,
                                          .n_m = 1,
                                          .main_m = ck->attention.m,
                                          .windows = B,
                                          .seq_len = T,
                                          .n_draws = 2,
                                          .errors_only = true};
    test_ok(srf_validate_attention(ctx, ck, tokens, &c, &r));
    double sum = 0;
    for (int64_t i = 0; i < r.n_layers * r.n_heads; i++) sum += r.error[i] * r.error[i];
    sum /= (double)(r.n_layers * r.n_heads);
    srf_validate_result_free(&r);
    return sum;
}

static void a_plan(void **state)
{
    (void)state;
    struct srf_ctx *ctx;
    struct srf_checkpoint *ck;
    struct srf_plan_windows_result result;
    int32_t tokens[B * T];
    test_ok(srf_ctx_create("cpu", SRF_F64, 1, &ctx));
    test_ok(srf_checkpoint_init(config_json, 7, &ck));
    for (int64_t i = 0; i < ck->table.total; i++) ck->params[i] *= 8;
    ck->attention.kind = SRF_ATTN_SRF;
    ck->attention.m = 6;
    ck->attention.window = W;
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 61, 0, 0);
    for (int i = 0; i < B * T; i++) tokens[i] = (int32_t)srf_rng_below(&r, V);
    double before = measured(ctx, ck, tokens);
    test_ok(srf_plan_windows(ctx, ck, tokens, B, T, &result));
    const struct srf_attention_config *a = &ck->attention;
    int64_t sum = 0, largest = 0;
    for (int64_t l = 0; l < L; l++) {
        int64_t w = srf_attention_window(a, l);
        assert_true(w == W / 2 || w == W || w == 2 * W);
        sum += w;
        largest = w > largest ? w : largest;
    }
    assert_true(sum <= L * W);
    assert_int_equal(a->window, largest);
    test_ok(srf_attention_check(a, 8));
    test_ok(srf_attention_check_layers(a, L));
    assert_true(fabs(result.before / before - 1) < 1e-9);
    assert_true(fabs(result.after / measured(ctx, ck, tokens) - 1) < 1e-9);
    assert_true(result.after <= result.before);
    if (a->n_windows)
        assert_int_equal(srf_plan_windows(ctx, ck, tokens, B, T, &result), SRF_INVALID);
    ck->attention.n_windows = 0;
    ck->attention.window = 0;
    assert_int_equal(srf_plan_windows(ctx, ck, tokens, B, T, &result), SRF_INVALID);
    srf_checkpoint_free(ck);
    srf_ctx_free(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(the_best_choice), cmocka_unit_test(a_plan)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
