/* Recurrent inference: the engine against the parallel form, evaluation in both, the sampler. */
#include "tests/scratch.h"
#include "infer/engine.h"
#include "infer/evaluate.h"
#include "infer/recall.h"
#include "infer/sampler.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char config_json[] =
    "{\"model_type\": \"gpt2\", \"n_layer\": 2, \"n_head\": 2, \"n_embd\": 16, \"n_positions\": 64,"
    " \"vocab_size\": 23, \"activation_function\": \"gelu_new\"}";

/* window < 0: one a layer; -2: features by layer as well */
static struct srf_checkpoint *checkpoint(int64_t window)
{
    struct srf_checkpoint *ck;
    test_ok(srf_checkpoint_init(config_json, 7, &ck));
    for (int64_t i = 0; i < ck->table.total; i++) ck->params[i] *= 8; /* attention with a shape */
    ck->attention.kind = SRF_ATTN_SRF;
    ck->attention.m = 10;
    ck->attention.window = window;
    if (window < 0) test_ok(srf_attention_set_windows(&ck->attention, "7,2"));
    if (window == -2) test_ok(srf_attention_set_layer_m(&ck->attention, "4,10"));
    return ck;
}

/* Logits of the engine, however the tokens are fed, are those of the parallel forward. */
static void engine_is_the_model(void **state)
{
    (void)state;
    enum { B = 3, T = 41, V = 23 };
    int32_t tokens[B * T];
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 3, 0, 0);
    for (int i = 0; i < B * T; i++) tokens[i] = (int32_t)srf_rng_below(&r, V);
    const int64_t windows[] = {0, 4, -1, -2};
    for (int w = 0; w < 4; w++) {
        struct srf_ctx *ctx;
        struct srf_checkpoint *ck = checkpoint(windows[w]);
        struct srf_arena *arena;
        struct srf_model *m;
        struct srf_engine *e;
        test_ok(srf_ctx_create("cpu", SRF_F32, 2, &ctx));
        test_ok(srf_arena_create(ctx, &arena));
        test_ok(srf_model_create(ctx, &ck->config, &ck->attention, &m));
        struct srf_model_plan plan = {.b = B, .t = T};
        test_ok(srf_model_plan(m, arena, &plan));
        test_ok(srf_arena_commit(arena));
        test_ok(srf_model_upload(m, ck));
        struct srf_batch batch = {.b = B, .t = T, .tokens = tokens};
        float want[B * V], got[B * V];
        double want_d[B * V], got_d[B * V];
        test_ok(srf_model_forward(m, &batch));
        test_ok(srf_model_last_logits(m, &batch, want));
        const int64_t pieces[] = {1, 7, T};
        for (int p = 0; p < 3; p++) {
            struct srf_engine_config config = {
                .slots = B, .prefill_rows = B * 9, .sampler = {.top_p = 1}, .stop = -1};
            test_ok(srf_engine_create(ctx, ck, &config, &e));
            for (int64_t at = 0; at < T; at += pieces[p]) {
                int64_t n = T - at < pieces[p] ? T - at : pieces[p];
                int32_t piece[B * T];
                for (int i = 0; i < B; i++)
                    memcpy(piece + i * n, tokens + i * T + at, (size_t)n * sizeof *piece);
                test_ok(srf_engine_feed(e, piece, n, got));
            }
            assert_int_equal(srf_engine_position(e, B - 1), T);
            for (int i = 0; i < B * V; i++) want_d[i] = (double)want[i], got_d[i] = (double)got[i];
            test_close("engine logits", got_d, want_d, B * V, 2e-5);
            /* from the start again */
            test_ok(srf_engine_reset(e));
            int32_t first[B * T];
            memcpy(first, tokens, sizeof first);
            test_ok(srf_engine_feed(e, first, T, got));
            for (int i = 0; i < B * V; i++) got_d[i] = (double)got[i];
            test_close("engine logits after reset", got_d, want_d, B * V, 2e-5);
            /* positions end: refused, not wrapped */
            int32_t more[B * T] = {0};
            assert_int_equal(srf_engine_feed(e, more, T, NULL), SRF_INVALID);
            srf_engine_free(e);
        }
        srf_model_free(m);
        srf_arena_free(arena);
        srf_checkpoint_free(ck);
        srf_ctx_free(ctx);
    }
    struct srf_ctx *ctx;
    struct srf_engine *e;
    struct srf_checkpoint *ck = checkpoint(0);
    ck->attention.kind = SRF_ATTN_SOFTMAX;
    test_ok(srf_ctx_create("cpu", SRF_F32, 1, &ctx));
    struct srf_engine_config config = {.slots = 1, .prefill_rows = 8, .sampler = {.top_p = 1}};
    assert_int_equal(srf_engine_create(ctx, ck, &config, &e), SRF_INVALID);
    srf_checkpoint_free(ck);
    srf_ctx_free(ctx);
}

struct rows {
    float nll[200];
    int64_t windows;
};

static srf_status take(void *user, int64_t first, int64_t n, int64_t len, const int32_t *tokens,
                       const float *nll, const float *logits)
{
    struct rows *r = user;
    assert_null(logits);
    int64_t t = first * 20; /* of the set below; the short window is the last */
    for (int64_t i = 0; i < n * len; i++, t++) assert_int_equal(tokens[i], (t * t + 3 * t) % 23);
    if (len == 20) memcpy(r->nll + first * 19, nll, (size_t)(n * 19) * sizeof *nll);
    r->windows += n;
    return SRF_OK;
}

/* Parallel and recurrent evaluation agree token by token; a last short window counts. */
static void evaluation(void **state)
{
    (void)state;
    assert_int_equal(test_enter_tmp(), 0);
    char path[] = "eval_XXXXXX";
    int fd = mkstemp(path);
    FILE *f = fdopen(fd, "wb");
    fwrite("\x93NUMPY\x01\x00\x76\x00", 1, 10, f);
    fprintf(f, "%-117s\n", "{'descr': '<u2', 'fortran_order': False, 'shape': (107,), }");
    for (int i = 0; i < 107; i++) {
        uint16_t t = (uint16_t)((i * i + 3 * i) % 23);
        fwrite(&t, 2, 1, f);
    }
    fclose(f);
    struct srf_tokenset *data;
    test_ok(srf_tokenset_open(path, NULL, 23, &data));
    struct srf_ctx *ctx;
    struct srf_arena *arena;
    struct srf_model *m;
    struct srf_checkpoint *ck = checkpoint(4);
    test_ok(srf_ctx_create("cpu", SRF_F32, 2, &ctx));
    test_ok(srf_arena_create(ctx, &arena));
    test_ok(srf_model_create(ctx, &ck->config, &ck->attention, &m));
    struct srf_model_plan plan = {.b = 2, .t = 20};
    test_ok(srf_model_plan(m, arena, &plan));
    test_ok(srf_arena_commit(arena));
    test_ok(srf_model_upload(m, ck));
    struct rows rows[2] = {0};
    struct srf_eval_result results[2];
    for (int mode = 0; mode < 2; mode++) {
        struct srf_eval_config c = {
            .seq_len = 20, .batch = 2, .recurrent = mode, .rows = take, .user = &rows[mode]};
        test_ok(srf_evaluate(m, data, &c, &results[mode]));
        assert_int_equal(results[mode].tokens, 5 * 19 + 6);
        assert_int_equal(rows[mode].windows, 6);
    }
    assert_true(fabs(results[0].nll - results[1].nll) < 1e-5 * results[0].nll);
    for (int i = 0; i < 95; i++)
        assert_true(fabsf(rows[0].nll[i] - rows[1].nll[i]) < 1e-4f * (1 + rows[0].nll[i]));
    srf_tokenset_close(data);
    srf_model_free(m);
    srf_arena_free(arena);
    srf_checkpoint_free(ck);
    srf_ctx_free(ctx);
    unlink(path);
}

/* Distances of what was said before, by hand. */
static void recall(void **state)
{
    (void)state;
    /*                       2 5 again after 4; 5 9 after 3; 7 7 after 1 (overlapping) */
    const int32_t tokens[] = {2, 5, 9, 1, 2, 5, 9, 7, 7, 7, 2, 5};
    enum { T = sizeof tokens / sizeof *tokens };
    float nll[T - 1];
    for (int i = 0; i < T - 1; i++) nll[i] = i % 2 ? 0.5f : 0.75f;
    struct srf_recall r = {0};
    srf_recall_add(&r, tokens, T, nll);
    /* token 5 and 6: 4 back; 9: 1 back; 11: 6 back */
    const int64_t n[4] = {1, 0, 3, 0}, known[4] = {0, 0, 1, 0};
    const double sum[4] = {0.75, 0, 0.75 + 0.5 + 0.75, 0};
    for (int i = 0; i < 4; i++) {
        assert_int_equal(r.n[i], n[i]);
        assert_int_equal(r.known[i], known[i]);
        assert_true(fabs(r.nll[i] - sum[i]) < 1e-6);
    }
    r = (struct srf_recall){.from = 7};
    srf_recall_add(&r, tokens, T, nll);
    assert_int_equal(r.n[0] + r.n[2], 2); /* of 9 and of 7 */
    r = (struct srf_recall){0};
    srf_recall_add(&r, tokens, 1, nll);
    for (int i = 0; i < SRF_RECALL_PLACES; i++) assert_int_equal(r.n[i], 0);
}

static void sampler(void **state)
{
    (void)state;
    enum { V = 6, N = 20000 };
    const float logits[V] = {1, 3, 2, 3, -1, 0};
    int32_t out;
    struct srf_sampler_config c = {.temperature = 0, .top_p = 1};
    test_ok(srf_sample(&c, 1, 0, 0, logits, V, &out));
    assert_int_equal(out, 1); /* the lower id of a tie */
    const struct {
        double temperature, top_p;
        int64_t top_k;
        int kept[V];
    } cases[] = {
        {1, 1, 0, {1, 1, 1, 1, 1, 1}},    {0.5, 1, 0, {1, 1, 1, 1, 1, 1}},
        {1, 1, 3, {0, 1, 1, 1, 0, 0}},    {2, 1, 1, {0, 1, 0, 0, 0, 0}},
        {1, 0.6, 0, {0, 1, 0, 1, 0, 0}}, /* 0.39 + 0.39 passes 0.6 */
        {1, 1e-9, 0, {0, 1, 0, 0, 0, 0}}, {1, 0.9, 4, {0, 1, 1, 1, 0, 0}},
    };
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        c = (struct srf_sampler_config){cases[k].temperature, cases[k].top_k, cases[k].top_p};
        test_ok(srf_sampler_check(&c));
        double p[V], sum = 0;
        int counts[V] = {0};
        for (int i = 0; i < V; i++) {
            p[i] = cases[k].kept[i] ? exp((double)logits[i] / c.temperature) : 0;
            sum += p[i];
        }
        for (int n = 0; n < N; n++) {
            test_ok(srf_sample(&c, 42, 5, n, logits, V, &out));
            counts[out]++;
        }
        for (int i = 0; i < V; i++) {
            double want = p[i] / sum, sd = sqrt(want * (1 - want) / N);
            assert_true(fabs(counts[i] / (double)N - want) <= 4.5 * sd + 1e-12);
        }
    }
    /* a function of (seed, sequence, n) alone */
    c = (struct srf_sampler_config){1, 0, 1};
    int differs = 0;
    for (int n = 0; n < 50; n++) {
        int32_t a, b, other;
        test_ok(srf_sample(&c, 1, 2, n, logits, V, &a));
        test_ok(srf_sample(&c, 1, 2, n, logits, V, &b));
        test_ok(srf_sample(&c, 1, 3, n, logits, V, &other));
        assert_int_equal(a, b);
        differs += a != other;
    }
    assert_true(differs > 10);
    float bad[V] = {1, NAN, 0, 0, 0, 0};
    assert_int_equal(srf_sample(&c, 1, 0, 0, bad, V, &out), SRF_NONFINITE);
    c.top_p = 0;
    assert_int_equal(srf_sampler_check(&c), SRF_INVALID);
    c = (struct srf_sampler_config){-1, 0, 1};
    assert_int_equal(srf_sampler_check(&c), SRF_INVALID);
    c = (struct srf_sampler_config){1, -1, 1};
    assert_int_equal(srf_sampler_check(&c), SRF_INVALID);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(engine_is_the_model),
        cmocka_unit_test(evaluation),
        cmocka_unit_test(recall),
        cmocka_unit_test(sampler),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
