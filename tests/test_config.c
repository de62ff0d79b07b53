/* What describes a model: config.json, attention settings and the draws that they name, initial
 * weights, the hash; what is refused. */
#include "model/checkpoint.h"
#include "model/model.h"
#include "tests/scratch.h"

#include <math.h>

static const char config_json[] =
    "{\"model_type\": \"gpt2\", \"n_layer\": 2, \"n_head\": 2, \"n_embd\": 64, \"n_positions\": 40,"
    " \"vocab_size\": 70, \"n_inner\": 96, \"layer_norm_epsilon\": 1e-3, \"bos_token_id\": 3,"
    " \"eos_token_id\": 5, \"activation_function\": \"gelu_new\"}";

/* The least that one has, for other keys behind it. */
#define SIZES                                                                                      \
    "{\"model_type\": \"gpt2\", \"n_layer\": 1, \"n_head\": 1, \"n_embd\": 8,"                     \
    " \"n_positions\": 4, \"vocab_size\": 9"

static void config_round_trip(void **state)
{
    (void)state;
    struct srf_model_config a, b;
    char *text;
    test_ok(srf_model_config_from_json(config_json, &a));
    assert_true(a.n_layers == 2 && a.n_heads == 2 && a.c == 64 && a.d_ff == 96 && a.n_pos == 40);
    assert_true(a.vocab == 70 && a.ln_eps == 1e-3 && a.bos == 3 && a.eos == 5);
    test_ok(srf_model_config_to_json(&a, &text));
    test_ok(srf_model_config_from_json(text, &b));
    srf__free(text);
    assert_true(b.arch == a.arch && b.n_layers == 2 && b.n_heads == 2 && b.c == 64 && b.d_ff == 96);
    assert_true(b.n_pos == 40 && b.vocab == 70 && b.ln_eps == 1e-3 && b.bos == 3 && b.eos == 5);
    a.d_ff = 4 * a.c, a.bos = a.eos = -1; /* what is left out */
    test_ok(srf_model_config_to_json(&a, &text));
    test_ok(srf_model_config_from_json(text, &b));
    srf__free(text);
    assert_true(b.d_ff == 256 && b.bos == -1 && b.eos == -1);
    /* ids are compared with tokens, of 32 bits */
    test_ok(srf_model_config_from_json(SIZES ", \"eos_token_id\": 2147483647}", &a));
    assert_true(a.bos == -1 && a.eos == INT32_MAX);
    test_ok(srf_model_config_from_json(SIZES ", \"eos_token_id\": [5], \"bos_token_id\": -7}", &a));
    assert_true(a.bos == -1 && a.eos == -1);
    test_fails(srf_model_config_from_json(SIZES ", \"eos_token_id\": 4294967301}", &a), SRF_FORMAT,
               "'eos_token_id' is 4294967301");
    test_fails(srf_model_config_from_json(SIZES ", \"bos_token_id\": 2147483648}", &a), SRF_FORMAT,
               "'bos_token_id' is 2147483648");
}

/* 0.02; positions half of it; what is added to the residual stream over sqrt(2 layers). */
static void initial_weights(void **state)
{
    (void)state;
    struct srf_checkpoint *ck;
    test_ok(srf_checkpoint_init(config_json, 1, &ck));
    for (int64_t r = 0; r < ck->table.n; r++) {
        const struct srf_tensor *row = &ck->table.rows[r];
        const float *w = ck->params + row->offset;
        bool residual = strstr(row->name, "c_proj.weight"), norm = strstr(row->name, "ln_");
        double std = strstr(row->name, "wpe") ? 0.01 : residual ? 0.01 : 0.02, squares = 0;
        for (int64_t i = 0; i < row->count && row->ndim == 1; i++)
            assert_true(w[i] == (norm && strstr(row->name, "weight") ? 1 : 0));
        if (row->ndim == 1) continue;
        for (int64_t i = 0; i < row->count; i++) squares += (double)w[i] * (double)w[i];
        double is = sqrt(squares / (double)row->count);
        if (!(fabs(is / std - 1) < 0.08)) fail_msg("%s: %g, expected %g", row->name, is, std);
    }
    srf_checkpoint_free(ck);
}

static struct srf_attention_config srf_attention(void)
{
    struct srf_attention_config a = srf_attention_default();
    a.kind = SRF_ATTN_SRF;
    a.m = 40; /* of heads of 32: a whole block and a piece */
    return a;
}

/* Each setting that W depends on makes other features, and no setting is lost on the way to W,
 * neither by the op nor on the host. */
static void features_follow_settings(void **state)
{
    (void)state;
    enum { L = 2, H = 2, M = 40, D = 32, N = L * H * M * D };
    const struct srf_attention_config plain = srf_attention();
    struct srf_ctx *ctx;
    struct srf_checkpoint *ck;
    test_ok(srf_ctx_create("cpu", SRF_F32, 1, &ctx));
    test_ok(srf_checkpoint_init(config_json, 1, &ck));
    float *first = srf__calloc(N, sizeof *first), *w = srf__calloc(N, sizeof *w), bias[L * H * M];
    assert_true(first && w);
    test_ok(srf_attention_draw(&plain, L, H, D, NULL, first, bias));
    for (int k = 0; k < 10; k++) {
        struct srf_attention_config a = plain;
        struct srf_arena *arena;
        struct srf_model *m;
        if (k == 1) a.features = SRF_IID;
        if (k == 2) a.rotation = SRF_ROT_HD;
        if (k == 3) a.normalize_rows = true;
        if (k == 4) a.seed = 1;
        if (k == 5) a.draw = 1;
        if (k == 6) a.oprf_a = -0.1;
        if (k == 7) a.per_head = false;
        if (k == 8) a.window = 4, a.far_none = true;
        if (k == 9) a.normalize_rows = true, a.oprf_a = -0.1;
        assert_int_equal(srf_attention_same_features(&plain, &a), k == 0);
        int64_t sets = a.per_head ? H : 1, n = L * sets * M;
        test_ok(srf_attention_draw(&a, L, sets, D, NULL, w, bias));
        if (k > 0 && k < 7) assert_true(k == 6 ? bias[0] != 0 : memcmp(w, first, 4 * D) != 0);
        if (k == 7) assert_memory_not_equal(w + M * D, first + M * D, 4 * D);
        if (k == 8) assert_true(bias[0] <= -1e3f);
        for (int64_t i = 1; i < n && k == 9; i++) /* A |w|^2 of rows alike */
            assert_true(bias[i] != 0 && fabs((double)(bias[i] - bias[0])) < 1e-6);
        for (int64_t i = 0; i < n && k == 3; i++) {
            double norm = 0;
            for (int j = 0; j < D; j++) norm += (double)w[i * D + j] * (double)w[i * D + j];
            assert_true(fabs(norm - 1) < 1e-5);
        }
        if (k == 8) a.far_none = false; /* the model adds it to its own bias */
        test_ok(srf_arena_create(ctx, &arena));
        test_ok(srf_model_create(ctx, &ck->config, &a, &m));
        test_ok(srf_model_plan(m, arena, &(struct srf_model_plan){.b = 1, .t = 4}));
        test_ok(srf_arena_commit(arena));
        test_ok(srf_model_upload(m, ck));
        assert_memory_equal(srf_arena_ptr(arena, m->slot_w), w, (size_t)(n * D) * sizeof *w);
        if (k != 8)
            assert_memory_equal(srf_arena_ptr(arena, m->slot_bias), bias, (size_t)n * sizeof *bias);
        srf_model_free(m);
        srf_arena_free(arena);
    }
    srf__free(first);
    srf__free(w);
    srf_checkpoint_free(ck);
    srf_ctx_free(ctx);
}

static void attention_refusals(void **state)
{
    (void)state;
    struct srf_attention_config a = srf_attention();
    test_ok(srf_attention_check(&a, 12));
    a.rotation = SRF_ROT_HD;
    test_ok(srf_attention_check(&a, 16));
    assert_int_equal(srf_attention_check(&a, 12), SRF_INVALID); /* even, and no power of two */
    a = srf_attention();
    test_ok(srf_attention_set_windows(&a, "5,2"));
    test_ok(srf_attention_check(&a, 12));
    a.windows[1] = 6; /* more than what is planned for */
    assert_int_equal(srf_attention_check(&a, 12), SRF_INVALID);
    a = srf_attention();
    test_ok(srf_attention_set_layer_m(&a, "5,2"));
    a.layer_m[1] = 6;
    assert_int_equal(srf_attention_check(&a, 12), SRF_INVALID);
    a = srf_attention();
    a.far_none = true;
    assert_int_equal(srf_attention_check(&a, 12), SRF_INVALID);
}

static void hash(const struct srf_checkpoint *ck, char hex[17])
{
    test_ok(srf_checkpoint_hash(ck, hex));
}

/* Whatever a state depends on has part in the model's hash. */
static void hash_of_everything(void **state)
{
    (void)state;
    struct srf_checkpoint *ck;
    char all[12][17];
    int n = 0;
    test_ok(srf_checkpoint_init(config_json, 1, &ck));
    hash(ck, all[n++]);
    float *p = ck->params;
    const int64_t last = ck->table.rows[ck->table.n - 1].offset;
    p[0] = -p[0];
    hash(ck, all[n++]);
    p[2] = -p[2]; /* two signs, one above the other in words of 8 bytes, do not cancel */
    hash(ck, all[n++]);
    p[last]++;
    hash(ck, all[n++]);
    ck->config.ln_eps = 1e-5;
    hash(ck, all[n++]);
    struct srf_attention_config a = srf_attention();
    ck->attention = a;
    int64_t n_w = srf_checkpoint_features_count(ck), n_bias = srf_checkpoint_bias_count(ck);
    ck->features_w = srf__calloc((size_t)n_w, sizeof(float));
    ck->features_bias = srf__calloc((size_t)n_bias, sizeof(float));
    assert_true(ck->features_w && ck->features_bias);
    hash(ck, all[n++]);
    ck->features_w[n_w - 1] = 1;
    hash(ck, all[n++]);
    ck->features_bias[n_bias - 1] = 1;
    hash(ck, all[n++]);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < i; j++) assert_string_not_equal(all[i], all[j]);
    srf_checkpoint_free(ck);
}

/* A file with one value changed: NaN of a weight, of a feature or of its bias is refused. */
static void not_numbers(void **state)
{
    (void)state;
    char path[96];
    for (int k = 0; k < 4; k++) {
        struct srf_checkpoint *ck, *back;
        test_ok(srf_checkpoint_init(config_json, 1, &ck));
        ck->attention = srf_attention();
        int64_t n = srf_checkpoint_features_count(ck), n_bias = srf_checkpoint_bias_count(ck);
        ck->features_w = srf__calloc((size_t)n, sizeof(float));
        ck->features_bias = srf__calloc((size_t)n_bias, sizeof(float));
        assert_true(ck->features_w && ck->features_bias);
        *(k == 1   ? &ck->params[ck->table.rows[4].offset + 1]
          : k == 2 ? &ck->features_w[n - 1]
                   : &ck->features_bias[n_bias - 1]) = k ? NAN : 1;
        test_ok(srf_checkpoint_save(ck, test_at(path, "values.h5")));
        srf_status st = srf_checkpoint_load(path, NULL, &back);
        assert_int_equal(st, k ? SRF_NONFINITE : SRF_OK);
        if (!k) srf_checkpoint_free(back);
        srf_checkpoint_free(ck);
    }
}

/* A recurrent export without features would be no model. */
static void recurrent_needs_features(void **state)
{
    (void)state;
    struct srf_checkpoint *ck;
    char path[96];
    test_ok(srf_checkpoint_init(config_json, 1, &ck));
    ck->kind = SRF_CKPT_RECURRENT;
    assert_int_equal(srf_checkpoint_save(ck, test_at(path, "none.h5")), SRF_INVALID);
    ck->attention = srf_attention();
    assert_int_equal(srf_checkpoint_save(ck, path), SRF_INVALID);
    assert_int_equal(access(path, F_OK), -1);
    srf_checkpoint_free(ck);
}

/* The last token, length and position that there are, and the first that there are not. */
static void ends_of_ranges(void **state)
{
    (void)state;
    struct srf_ctx *ctx;
    struct srf_checkpoint *ck;
    struct srf_arena *arena;
    struct srf_model *m;
    int32_t tokens[41] = {69}, pos[2] = {0, 36}, lens[2] = {3, 4}, slots[2] = {0, 1};
    test_ok(srf_ctx_create("cpu", SRF_F32, 1, &ctx));
    test_ok(srf_checkpoint_init(config_json, 1, &ck));
    test_ok(srf_arena_create(ctx, &arena));
    struct srf_attention_config a = srf_attention();
    test_ok(srf_model_create(ctx, &ck->config, &a, &m));
    test_ok(srf_model_plan(m, arena, &(struct srf_model_plan){.b = 2, .t = 41}));
    test_ok(srf_arena_commit(arena));
    test_ok(srf_model_upload(m, ck));
    struct srf_batch batch = {.b = 1, .t = 40, .tokens = tokens};
    test_ok(srf_model_forward(m, &batch));
    tokens[0] = 70;
    assert_int_equal(srf_model_forward(m, &batch), SRF_MISMATCH);
    tokens[0] = -1;
    assert_int_equal(srf_model_forward(m, &batch), SRF_MISMATCH);
    tokens[0] = 0;
    batch.t = 41;
    assert_int_equal(srf_model_forward(m, &batch), SRF_INVALID);
    float *st = srf__calloc((size_t)(2 * srf_model_state_count(m)), sizeof *st);
    assert_non_null(st);
    batch = (struct srf_batch){.b = 2,
                               .t = 4,
                               .tokens = tokens,
                               .mode = SRF_MODE_PREFILL,
                               .state = st,
                               .pos = pos,
                               .n_slots = 2,
                               .lens = lens,
                               .slots = slots};
    test_ok(srf_model_forward(m, &batch));
    pos[1] = 37;
    assert_int_equal(srf_model_forward(m, &batch), SRF_INVALID);
    pos[1] = 0;
    lens[0] = 5;
    assert_int_equal(srf_model_forward(m, &batch), SRF_INVALID);
    lens[0] = 0;
    assert_int_equal(srf_model_forward(m, &batch), SRF_INVALID);
    lens[0] = 3;
    slots[1] = 2;
    assert_int_equal(srf_model_forward(m, &batch), SRF_INVALID);
    srf__free(st);
    srf_model_free(m);
    srf_arena_free(arena);
    srf_checkpoint_free(ck);
    srf_ctx_free(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(config_round_trip),  cmocka_unit_test(initial_weights),
        cmocka_unit_test(attention_refusals), cmocka_unit_test(features_follow_settings),
        cmocka_unit_test(hash_of_everything), cmocka_unit_test(not_numbers),
        cmocka_unit_test(ends_of_ranges),     cmocka_unit_test(recurrent_needs_features),
    };
    return cmocka_run_group_tests(tests, test_make_root, test_remove_root);
}
