/* Windows by layer: the choice against all there are, and what a plan makes of a model. */
#include "tests/support.h"
#include "train/calibrate.h"
#include "train/plan_internal.h"
#include "train/validate.h"

#include <math.h>
#include <stdlib.h>

enum { B = 2, T = 40, V = 31, L = 3, W = 4 };

static const char config_json[] =
    "{\"model_type\": \"gpt2\", \"n_layer\": 3, \"n_head\": 2, \"n_embd\": 16, \"n_positions\": 40,"
    " \"vocab_size\": 31, \"activation_function\": \"gelu_new\"}";

/* Least error of all choices of n layers that have the room; infinite if none has. */
static double least(const double *error, const int64_t *cost, int n_choices, int n, int64_t room)
{
    double best = INFINITY;
    int all = 1;
    for (int l = 0; l < n; l++) all *= n_choices;
    for (int i = 0; i < all; i++) {
        double sum = 0;
        int64_t used = 0;
        for (int l = 0, rest = i; l < n; l++, rest /= n_choices) {
            sum += error[rest % n_choices * n + l];
            used += cost[rest % n_choices];
        }
        if (used <= room && sum < best) best = sum;
    }
    return best;
}

static void the_best_choice(void **state)
{
    (void)state;
    static const int64_t cost[] = {1, 2, 4, 7};
    for (int trial = 0; trial < 120; trial++) {
        int n = 1 + trial % 6, choice[6], n_choices = 2 + trial % 3;
        double error[24], sum = 0;
        int64_t used = 0, room = n - 1 + trial / 6;
        test_normal(error, n_choices * n, 1, (uint32_t)trial);
        for (int i = 0; i < n_choices * n; i++) error[i] = trial % 7 == 6 ? 0.5 : exp(error[i]);
        srf_status st = srf_plan_windows_choose(error, cost, n_choices, n, room, choice);
        assert_int_equal(st, room < n ? SRF_INVALID : SRF_OK);
        if (st != SRF_OK) continue;
        for (int l = 0; l < n; l++) {
            assert_in_range(choice[l], 0, n_choices - 1);
            sum += error[choice[l] * n + l];
            used += cost[choice[l]];
        }
        assert_true(used <= room);
        assert_true(fabs(sum - least(error, cost, n_choices, n, room)) < 1e-12 * sum);
    }
}

static struct srf_checkpoint *make_model(void)
{
    struct srf_checkpoint *ck;
    test_ok(srf_checkpoint_init(config_json, 7, &ck));
    for (int64_t i = 0; i < ck->table.total; i++) ck->params[i] *= 8;
    ck->attention.kind = SRF_ATTN_SRF;
    ck->attention.m = 6;
    ck->attention.window = W;
    return ck;
}

/* KL of ck's predictions from softmax's with a window and m features in one layer alone, calibrated
 * and fitted, summed over the layers. */
static double measured(struct srf_ctx *ctx, const int32_t *tokens, int64_t window, int64_t m)
{
    struct srf_checkpoint *ck = make_model();
    ck->attention.m = m;
    struct srf_calibrate_config c = {
        .windows = B, .seq_len = T, .balance = true, .fit = true, .best_of = 1};
    struct srf_calibrate_result result;
    double sum = 0;
    test_ok(srf_calibrate(ctx, ck, tokens, &c, &result));
    for (int l = 0; l < L; l++) {
        struct srf_attention_config a = ck->attention;
        struct srf_validate_place places[SRF_VALIDATE_PLACES];
        struct srf_validate_distance all;
        a.n_windows = L;
        a.window = T;
        for (int j = 0; j < L; j++) a.windows[j] = j == l ? (int32_t)window : T;
        struct srf_validate_pair pair = {ck, ck, &a, tokens, B, T};
        test_ok(srf_validate_positions(ctx, &pair, places, &all));
        for (int i = 0; i < SRF_VALIDATE_PLACES; i++)
            sum += places[i].kl * (double)places[i].n / (B * (T - 1));
    }
    srf_checkpoint_free(ck);
    return sum;
}

static int64_t sum_of_windows(const struct srf_attention_config *a)
{
    int64_t sum = 0, largest = 0;
    for (int64_t l = 0; l < L; l++) {
        int64_t w = srf_attention_window(a, l);
        assert_true(w >= W / 2 && w <= 7 * W / 2 && w % (W / 2) == 0);
        sum += w;
        largest = w > largest ? w : largest;
    }
    assert_int_equal(a->window, largest);
    test_ok(srf_attention_check(a, 8));
    test_ok(srf_attention_check_layers(a, L));
    return sum;
}

/* Where only windows differ features are one number, and the other way round. */
static void choices_as_settings(void **state)
{
    (void)state;
    const struct srf__plan_choices s = {
        .n_windows = 2, .n_m = 2, .n = 4, .window = {8, 32}, .m = {4, 16}};
    static const struct {
        int choice[3];
        int64_t window, m, n_windows, n_layer_m;
    } cases[] = {{{1, 1, 1}, 8, 16, 0, 0},
                 {{0, 2, 0}, 32, 4, 3, 0},
                 {{2, 3, 2}, 32, 16, 0, 3},
                 {{0, 3, 1}, 32, 16, 3, 3}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct srf_attention_config a = srf_attention_default();
        srf__plan_apply(&a, &s, cases[i].choice, 3);
        assert_true(a.window == cases[i].window && a.m == cases[i].m);
        assert_true(a.n_windows == cases[i].n_windows && a.n_layer_m == cases[i].n_layer_m);
        for (int64_t l = 0; l < 3; l++) {
            assert_int_equal(srf_attention_window(&a, l), s.window[cases[i].choice[l] / 2]);
            assert_int_equal(srf_attention_m(&a, l), s.m[cases[i].choice[l] % 2]);
        }
    }
}

/* A budget of so many values that they are counted by the dozen is kept all the same. */
static void rounded_room(void **state)
{
    (void)state;
    enum { LAYERS = 12 };
    struct srf_checkpoint *ck = make_model();
    const struct srf__plan_choices s = {.n = 2, .values = {100003, 200005}};
    int64_t cost[2], room;
    ck->config.n_layers = LAYERS;
    for (int64_t large = 1; large < LAYERS; large++) {
        int64_t values = (LAYERS - large) * s.values[0] + large * s.values[1];
        int64_t budget = srf__plan_state_bytes(ck, values - 1), most = 0;
        test_ok(srf__plan_room(ck, &s, budget, cost, &room));
        while (most < LAYERS && (LAYERS - most - 1) * cost[0] + (most + 1) * cost[1] <= room)
            most++;
        assert_true(most < large && most + 2 >= large);
    }
    ck->config.n_layers = L;
    srf_checkpoint_free(ck);
}

static void a_plan(void **state)
{
    (void)state;
    struct srf_ctx *ctx;
    struct srf_checkpoint *ck = make_model(), *as_it_was = make_model();
    struct srf_plan_windows_config c = {.windows = B, .seq_len = T};
    struct srf_plan_windows_result result;
    int32_t tokens[B * T];
    test_ok(srf_ctx_create("cpu", SRF_F64, 1, &ctx));
    struct srf_attention_config start = ck->attention;
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 61, 0, 0);
    for (int i = 0; i < B * T; i++) tokens[i] = (int32_t)srf_rng_below(&r, V);
    test_ok(srf_plan_windows(ctx, ck, tokens, &c, &result));
    const struct srf_attention_config *a = &ck->attention;
    assert_true(sum_of_windows(a) <= L * W);
    assert_true(result.before > 0 && result.after <= result.before);
    /* The model is as it was. */
    assert_memory_equal(ck->params, as_it_was->params,
                        (size_t)ck->table.total * sizeof *ck->params);
    assert_true(!ck->features_w && !ck->features_bias);
    if (a->n_windows) assert_int_equal(srf_plan_windows(ctx, ck, tokens, &c, &result), SRF_INVALID);
    ck->attention.n_windows = 0;
    ck->attention.window = 0;
    assert_int_equal(srf_plan_windows(ctx, ck, tokens, &c, &result), SRF_INVALID);
    /* Budgets, 2 heads, a ring of 2 W rows of k and v: a byte short of the least; the least; half
     * a window more; all that there is to have, and beyond. */
    int64_t fixed = (int64_t)L * 2 * 4 * (6 * 8 + 2 * 6), token = 2 * 4 * (2 * 2 * 8), last = -1;
    const int64_t sums[] = {L * W / 2 - 1, L * W / 2, L * W / 2 + W / 2, L * W * 7 / 2, L * W * 9};
    for (int i = 0; i < 5; i++) {
        ck->attention = start;
        c.state_budget = fixed + sums[i] * token + (i == 0 ? token - 1 : 0);
        srf_status st = srf_plan_windows(ctx, ck, tokens, &c, &result);
        assert_int_equal(st, i == 0 ? SRF_INVALID : SRF_OK);
        if (st != SRF_OK) continue;
        int64_t sum = sum_of_windows(a);
        assert_true(result.measured == (i < 3) && (result.before > 0) == result.measured);
        assert_true(sum <= sums[i] && sum >= last);
        assert_int_equal(result.state_bytes, fixed + sum * token);
        assert_true(result.state_bytes <= c.state_budget);
        if (i == 1) {
            double kl = measured(ctx, tokens, W / 2, 6);
            assert_true(a->n_windows == 0 && a->window == W / 2);
            assert_true(fabs(result.after / kl - 1) < 1e-9);
            assert_true(result.before < 0.95 * result.after); /* with W, twice the window */
        }
        last = sum;
    }
    assert_int_equal(last, L * W * 7 / 2);
    /* In shorter texts three windows leave nothing beyond them: 6 W is 24. */
    ck->attention = start;
    c.seq_len = 24;
    test_ok(srf_plan_windows(ctx, ck, tokens, &c, &result));
    assert_true(a->window <= 5 * W / 2);
    srf_checkpoint_free(as_it_was);
    srf_checkpoint_free(ck);
    srf_ctx_free(ctx);
}

/* Features as well: half of them too, as that is a multiple of 16. */
static void a_plan_of_features(void **state)
{
    (void)state;
    enum { M = 32, HEADS = 2, D = 8 };
    struct srf_ctx *ctx;
    struct srf_checkpoint *ck = make_model();
    struct srf_plan_windows_config c = {.windows = B, .seq_len = T, .features = true};
    struct srf_plan_windows_result result;
    struct srf_attention_config *a = &ck->attention, start;
    int32_t tokens[B * T];
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 61, 0, 0);
    for (int i = 0; i < B * T; i++) tokens[i] = (int32_t)srf_rng_below(&r, V);
    test_ok(srf_ctx_create("cpu", SRF_F64, 1, &ctx));
    a->m = M;
    start = *a;
    int64_t least = HEADS * L * srf_attn_state_count(M / 2, D, W / 2) * 4;
    int64_t most = HEADS * L * srf_attn_state_count(M, D, 7 * W / 2) * 4;
    const int64_t budgets[] = {0,        least - 1, least, least + 999, (least + most) / 2,
                               most - 1, most};
    double before = 0, after = INFINITY;
    for (int i = 0; i < 7; i++) {
        *a = start;
        c.state_budget = budgets[i];
        srf_status st = srf_plan_windows(ctx, ck, tokens, &c, &result);
        assert_int_equal(st, i == 1 ? SRF_INVALID : SRF_OK);
        if (st != SRF_OK) continue;
        int64_t bytes = 0, most_m = 0;
        for (int l = 0; l < L; l++) {
            int64_t m = srf_attention_m(a, l);
            assert_true(m == M / 2 || m == M);
            most_m = m > most_m ? m : most_m;
            bytes += HEADS * srf_attn_state_count(m, D, srf_attention_window(a, l)) * 4;
        }
        sum_of_windows(a);
        assert_int_equal(a->m, most_m);
        assert_int_equal(result.state_bytes, bytes);
        assert_true(bytes <= (i ? budgets[i] : HEADS * L * srf_attn_state_count(M, D, W) * 4));
        assert_true(result.measured == (i < 6));
        if (i == 0) assert_true(result.after <= result.before && result.before > 0);
        if (i == 0) before = result.before;
        if (i == 2) assert_true(bytes == least && !a->n_layer_m && !a->n_windows);
        if (i == 2)
            assert_true(fabs(result.after / measured(ctx, tokens, W / 2, M / 2) - 1) < 1e-9);
        if (i > 1 && i < 6) assert_true(result.before == before && result.after <= after);
        if (i > 1) after = result.after;
    }
    assert_true(a->m == M && a->window == 7 * W / 2 && !a->n_layer_m && !a->n_windows);
    /* Trained features are nearer. */
    *a = start;
    c.state_budget = 0;
    c.train_steps = 160;
    test_ok(srf_plan_windows(ctx, ck, tokens, &c, &result));
    print_message("KL of fitted features %.3g, of trained ones %.3g\n", before, result.before);
    assert_true(result.before < 0.97 * before && result.after <= result.before);
    assert_true(!ck->features_w && !ck->features_bias);
    test_ok(srf_attention_set_layer_m(a, "16,32,32"));
    assert_int_equal(srf_plan_windows(ctx, ck, tokens, &c, &result), SRF_INVALID);
    srf_checkpoint_free(ck);
    srf_ctx_free(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(the_best_choice),
                                       cmocka_unit_test(choices_as_settings),
                                       cmocka_unit_test(rounded_room), cmocka_unit_test(a_plan),
                                       cmocka_unit_test(a_plan_of_features)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
