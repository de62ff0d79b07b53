/* Settings of a model and what follows for its weights: windows and features by layer, features in
 * files, positions stretched. */
#include "tests/model_case.h"
#include "tests/scratch.h"

#include <math.h>
#include <string.h>

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
        cmocka_unit_test(layer_windows),        cmocka_unit_test(layer_features),
        cmocka_unit_test(layer_features_drawn), cmocka_unit_test(layer_features_hostile),
        cmocka_unit_test(stretched_positions),
    };
    return cmocka_run_group_tests(tests, test_make_root, test_remove_root);
}
