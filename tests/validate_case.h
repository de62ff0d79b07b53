/* A tiny random model and a text, for tests of what srf validate measures. */
#pragma once
#include "tests/support.h"
#include "train/validate.h"

enum { L = 2, H = 2, D = 8, C = H * D, B = 2, T = 37, V = 23, N_M = 3, DRAWS = 3 };

static const char config_json[] =
    "{\"model_type\": \"gpt2\", \"n_layer\": 2, \"n_head\": 2, \"n_embd\": 16, \"n_positions\": 48,"
    " \"vocab_size\": 23, \"activation_function\": \"gelu_new\"}";

static const int64_t ms[N_M] = {3, 8, 21};

/* What every test begins with: a model, some text, a context. */
struct setting {
    struct srf_checkpoint *ck;
    struct srf_ctx *ctx;
    int32_t tokens[B * T];
};

static inline void setting_new(struct setting *s, enum srf_dtype dtype)
{
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 11, 0, 0);
    for (int i = 0; i < B * T; i++) s->tokens[i] = (int32_t)srf_rng_below(&r, V);
    test_ok(srf_checkpoint_init(config_json, 7, &s->ck));
    for (int64_t i = 0; i < s->ck->table.total; i++)
        s->ck->params[i] *= 6; /* attention with a shape */
    test_ok(srf_ctx_create("cpu", dtype, 2, &s->ctx));
}

static inline void setting_free(struct setting *s)
{
    srf_checkpoint_free(s->ck);
    srf_ctx_free(s->ctx);
}

struct planned {
    struct srf_model *m;
    struct srf_arena *arena;
};

static inline struct planned
model_new(const struct setting *s, const struct srf_attention_config *a, struct srf_model_plan plan)
{
    struct planned p;
    test_ok(srf_model_create(s->ctx, &s->ck->config, a, &p.m));
    test_ok(srf_arena_create(s->ctx, &p.arena));
    test_ok(srf_model_plan(p.m, p.arena, &plan));
    test_ok(srf_arena_commit(p.arena));
    test_ok(srf_model_upload(p.m, s->ck));
    return p;
}

static inline void model_done(struct planned *p)
{
    srf_model_free(p->m);
    srf_arena_free(p->arena);
}

static inline struct srf_validate_config config_of(int window, bool per_head, const int64_t *m)
{
    struct srf_attention_config a = srf_attention_default();
    a.window = window;
    a.per_head = per_head;
    a.seed = test_seed();
    a.draw = 4;
    a.oprf_a = -0.02;
    return (struct srf_validate_config){.attention = a,
                                        .m = m,
                                        .n_m = N_M,
                                        .main_m = m[1],
                                        .windows = B,
                                        .seq_len = T,
                                        .n_draws = DRAWS};
}
