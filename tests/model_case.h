/* A small model with random weights, a batch for it and, if asked for, a teacher. */
#pragma once
#include "model/model.h"
#include "tests/support.h"

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
static inline struct srf_attention_config attention(enum srf_attention_kind kind, int64_t window)
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
static inline void randomize(struct srf_checkpoint *ck, double scale)
{
    for (int64_t i = 0; i < ck->table.n; i++) {
        const struct srf_tensor *row = &ck->table.rows[i];
        struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 1, (uint32_t)i, 0);
        for (int64_t k = 0; k < row->count; k++)
            ck->params[row->offset + k] =
                (float)(scale * srf_rng_normal(&r) + (row->init_std < 0 ? 1 : 0));
    }
}

static inline void open_fixture_with(struct fixture *f, enum srf_dtype dtype,
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

static inline void open_fixture(struct fixture *f, enum srf_dtype dtype,
                                struct srf_attention_config a, int64_t b, int64_t t,
                                bool train_features)
{
    open_fixture_with(f, dtype, a, b, t, train_features, SRF_RECOMPUTE_NONE, SRF_TRAINED_ALL);
}

/* A teacher of other weights with softmax. */
static inline void add_teacher(struct fixture *f)
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

static inline void close_fixture(struct fixture *f)
{
    test_ok(srf_arena_check(f->arena));
    srf_model_free(f->model);
    srf_model_free(f->teacher);
    srf_arena_free(f->arena);
    srf_arena_free(f->teacher_arena);
    srf_checkpoint_free(f->ck);
    srf_ctx_free(f->ctx);
}
