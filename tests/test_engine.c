/* The batch engine: a sequence does not notice what runs beside it, bit for bit. */
#include "tests/support.h"
#include "infer/engine.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { V = 37, N_POS = 96, STOP = 5, MOST = 24 };

static const char config_json[] =
    "{\"model_type\": \"gpt2\", \"n_layer\": 2, \"n_head\": 3, \"n_embd\": 36, \"n_positions\": 96,"
    " \"vocab_size\": 37, \"activation_function\": \"gelu_new\"}";

static struct srf_checkpoint *checkpoint(int64_t window)
{
    struct srf_checkpoint *ck;
    test_ok(srf_checkpoint_init(config_json, 11, &ck));
    for (int64_t i = 0; i < ck->table.total; i++) ck->params[i] *= 6;
    ck->attention.kind = SRF_ATTN_SRF;
    ck->attention.m = 10;
    ck->attention.window = window;
    return ck;
}

/* Products with exact_rows: right, and each row what it is alone. */
static void rows_alone(void **state)
{
    (void)state;
    const int64_t shapes[][3] = {{1, 1, 1},   {7, 5, 3},    {13, 40, 37}, {8, 300, 17},
                                 {23, 4, 64}, {5, 600, 48}, {3, 33, 1100}};
    const enum srf_dtype types[] = {SRF_F32, SRF_F64};
    for (size_t k = 0; k < 4 * sizeof shapes / sizeof *shapes; k++) {
        int64_t n = shapes[k / 4][0], in = shapes[k / 4][1], out = shapes[k / 4][2];
        bool transposed = k & 1;
        double *x = malloc((size_t)(n * in) * 8), *w = malloc((size_t)(in * out) * 8);
        double *want = malloc((size_t)(n * out) * 8), *got = malloc((size_t)(n * out) * 8), b[1100];
        test_normal(x, n * in, 1, 50);
        test_normal(w, in * out, 1, 51);
        test_normal(b, out, 1, 52);
        test_normal(want, n * out, 1, 53);
        struct srf_ctx *ctx;
        test_ok(srf_ctx_create("cpu", types[k / 2 % 2], 1, &ctx));
        ctx->exact_rows = true;
        size_t size = srf_dtype_bytes(ctx->dtype);
        void *xs = test_real(ctx, x, n * in), *ws = test_real(ctx, w, in * out);
        void *bs = test_real(ctx, b, out), *y = test_real(ctx, want, n * out);
        test_to_double(ctx, xs, x, n * in);
        test_to_double(ctx, ws, w, in * out);
        for (int64_t i = 0; i < n * out; i++) {
            want[i] = b[i % out];
            for (int64_t l = 0; l < in; l++)
                want[i] +=
                    x[i / out * in + l] * (transposed ? w[i % out * in + l] : w[l * out + i % out]);
        }
        test_ok(SRF_RUN(ctx, linear_fwd, .n = n, .in = in, .out = out, .x = xs, .w = ws,
                        .w_transposed = transposed, .b = bs, .y = y));
        test_to_double(ctx, y, got, n * out);
        test_close("exact rows", got, want, n * out, size == 4 ? 1e-6 : 1e-14);
        ctx->n_threads = 3;
        for (int64_t i = 0; i < n; i++) {
            char *row = malloc((size_t)out * size);
            test_ok(SRF_RUN(ctx, linear_fwd, .n = 1, .in = in, .out = out,
                            .x = (char *)xs + (size_t)(i * in) * size, .w = ws,
                            .w_transposed = transposed, .b = bs, .y = row));
            assert_memory_equal(row, (char *)y + (size_t)(i * out) * size, (size_t)out * size);
            free(row);
        }
        void *real[] = {xs, ws, bs, y};
        for (int i = 0; i < 4; i++) srf__free(real[i]);
        free(x);
        free(w);
        free(want);
        free(got);
        srf_ctx_free(ctx);
    }
}

struct job {
    int32_t prompt[N_POS], text[MOST];
    int64_t n_prompt, max_new, n;
};

static void make_jobs(struct job *jobs, int64_t n)
{
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 40, 0, 0);
    for (int64_t i = 0; i < n; i++) {
        jobs[i] = (struct job){.n_prompt = 1 + (int64_t)srf_rng_below(&r, N_POS - MOST),
                               .max_new = 1 + (int64_t)srf_rng_below(&r, MOST)};
        for (int64_t k = 0; k < jobs[i].n_prompt; k++)
            jobs[i].prompt[k] = (int32_t)srf_rng_below(&r, V);
    }
}

static struct srf_engine_config config_of(int64_t slots)
{
    return (struct srf_engine_config){.slots = slots,
                                      .prefill_rows = 40,
                                      .sampler = {.temperature = 0.9, .top_k = 20, .top_p = 0.95},
                                      .stop = STOP};
}

/* All jobs through an engine of so many slots, `steps` tokens at a time; whoever leaves makes room
 * for the next one. */
static void serve(struct srf_ctx *ctx, const struct srf_checkpoint *ck, struct job *jobs, int64_t n,
                  int64_t slots, int64_t steps)
{
    struct srf_engine *e;
    struct srf_engine_config config = config_of(slots);
    struct srf_engine_prompt prompts[64];
    int64_t in_slot[64], next = 0, left = n;
    int32_t tokens[64 * 8];
    assert_true(slots <= 64 && steps <= 8);
    test_ok(srf_engine_create(ctx, ck, &config, &e));
    for (int64_t i = 0; i < slots; i++) in_slot[i] = -1;
    while (left > 0) {
        int64_t count = 0;
        for (int64_t i = 0; i < slots && next < n; i++) {
            if (in_slot[i] >= 0) continue;
            prompts[count++] = (struct srf_engine_prompt){.slot = i,
                                                          .tokens = jobs[next].prompt,
                                                          .n_tokens = jobs[next].n_prompt,
                                                          .max_new = jobs[next].max_new,
                                                          .seed = 3,
                                                          .sequence = (uint64_t)next};
            jobs[next].n = 0;
            in_slot[i] = next++;
        }
        test_ok(srf_engine_admit(e, count, prompts));
        test_ok(srf_engine_decode(e, steps, tokens));
        for (int64_t i = 0; i < slots; i++) {
            if (in_slot[i] < 0) continue;
            struct job *j = &jobs[in_slot[i]];
            for (int64_t t = 0; t < steps && tokens[t * slots + i] >= 0; t++)
                j->text[j->n++] = tokens[t * slots + i];
            if (srf_engine_running(e, i)) continue;
            assert_true(j->n > 0 && j->n <= j->max_new);
            assert_true(j->n == j->max_new || j->text[j->n - 1] == STOP);
            assert_int_equal(srf_engine_position(e, i), j->n_prompt + j->n - 1);
            srf_engine_release(e, i);
            in_slot[i] = -1;
            left--;
        }
    }
    srf_engine_free(e);
}

static void any_company(void **state)
{
    (void)state;
    enum { JOBS = 60 };
    struct job *alone = calloc(JOBS, sizeof *alone), *jobs = calloc(JOBS, sizeof *jobs);
    make_jobs(alone, JOBS);
    memcpy(jobs, alone, JOBS * sizeof *jobs);
    const struct {
        int64_t slots, steps;
        int threads;
        enum srf_dtype type;
    } cases[] = {{2, 1, 1, SRF_F32},  {7, 3, 2, SRF_F32},  {16, 8, 1, SRF_F32},
                 {64, 5, 2, SRF_F32}, {33, 4, 1, SRF_F64}, {5, 4, 2, SRF_F64}};
    const int64_t windows[] = {0, 4};
    for (int w = 0; w < 2; w++) {
        struct srf_checkpoint *ck = checkpoint(windows[w]);
        int64_t stopped = 0;
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            struct srf_ctx *ctx;
            test_ok(srf_ctx_create("cpu", cases[i].type, 1, &ctx));
            if (i == 0 || cases[i].type != cases[i - 1].type) serve(ctx, ck, alone, JOBS, 1, 1);
            srf_ctx_free(ctx);
            test_ok(srf_ctx_create("cpu", cases[i].type, cases[i].threads, &ctx));
            serve(ctx, ck, jobs, JOBS, cases[i].slots, cases[i].steps);
            for (int k = 0; k < JOBS; k++) {
                stopped += jobs[k].n < jobs[k].max_new;
                assert_int_equal(jobs[k].n, alone[k].n);
                assert_memory_equal(jobs[k].text, alone[k].text, (size_t)alone[k].n * 4);
            }
            srf_ctx_free(ctx);
        }
        assert_true(stopped > 0);
        srf_checkpoint_free(ck);
    }
    free(alone);
    free(jobs);
}

/* The logits themselves, not only what is sampled from them. */
static void logits_alone(void **state)
{
    (void)state;
    enum { B = 9, T = 21 };
    int32_t tokens[B * T];
    float together[B * V], alone[V];
    struct srf_rng r = srf_rng_at(test_seed(), SRF_RNG_TEST, 41, 0, 0);
    for (int i = 0; i < B * T; i++) tokens[i] = (int32_t)srf_rng_below(&r, V);
    struct srf_checkpoint *ck = checkpoint(4);
    struct srf_ctx *ctx;
    struct srf_engine *one, *many;
    test_ok(srf_ctx_create("cpu", SRF_F32, 2, &ctx));
    struct srf_engine_config config = config_of(1);
    config.prefill_rows = T;
    test_ok(srf_engine_create(ctx, ck, &config, &one));
    config.slots = B;
    config.prefill_rows = B * T;
    test_ok(srf_engine_create(ctx, ck, &config, &many));
    test_ok(srf_engine_feed(many, tokens, T, together));
    for (int step = 0; step < 3; step++) {
        for (int i = 0; i < B; i++) {
            test_ok(srf_engine_reset(one));
            test_ok(srf_engine_feed(one, tokens + i * T, T, alone));
            for (int k = 0; k < step; k++)
                test_ok(srf_engine_feed(one, tokens + k * B + i, 1, alone));
            assert_memory_equal(alone, together + i * V, sizeof alone);
        }
        test_ok(srf_engine_feed(many, tokens + step * B, 1, together));
    }
    srf_engine_free(one);
    srf_engine_free(many);
    srf_checkpoint_free(ck);
    srf_ctx_free(ctx);
}

/* A state that goes over the host, or to another slot, has the same future. */
static void states(void **state)
{
    (void)state;
    struct job job;
    make_jobs(&job, 1);
    struct srf_checkpoint *ck = checkpoint(4);
    struct srf_ctx *ctx;
    struct srf_engine *e, *other;
    test_ok(srf_ctx_create("cpu", SRF_F32, 1, &ctx));
    struct srf_engine_config config = config_of(4);
    config.stop = -1;
    test_ok(srf_engine_create(ctx, ck, &config, &e));
    test_ok(srf_engine_create(ctx, ck, &config, &other));
    char *values = malloc((size_t)srf_engine_value_bytes(e));
    struct srf_engine_prompt prefix = {.slot = 2, .tokens = job.prompt, .n_tokens = 30};
    test_ok(srf_engine_admit(e, 1, &prefix));
    assert_false(srf_engine_running(e, 2));
    assert_int_equal(srf_engine_position(e, 2), 30);
    test_ok(srf_engine_fork(e, 2, 0, 2));
    test_ok(srf_engine_fork(e, 2, 3, 1));
    test_ok(srf_engine_state_get(e, 2, values));
    test_ok(srf_engine_state_set(other, 1, values, 30));
    const int32_t rest[] = {1, 2, 3};
    struct srf_engine_prompt go = {.tokens = rest, .n_tokens = 3, .resume = true, .max_new = 10};
    struct srf_engine_prompt both[2] = {go, go};
    both[0].slot = 0;
    both[1].slot = 3;
    test_ok(srf_engine_admit(e, 2, both));
    go.slot = 1;
    test_ok(srf_engine_admit(other, 1, &go));
    int32_t a[10 * 4], b[10 * 4];
    test_ok(srf_engine_decode(e, 6, a));
    assert_int_equal(srf_engine_move(e, 0, 3), SRF_INVALID); /* running */
    test_ok(srf_engine_move(e, 3, 1));                       /* in the middle of its text */
    assert_false(srf_engine_running(e, 3));
    assert_int_equal(srf_engine_position(e, 1), srf_engine_position(e, 0));
    srf_engine_narrow(e, true);
    test_ok(srf_engine_decode(e, 4, a + 6 * 4));
    test_ok(srf_engine_decode(other, 10, b));
    for (int t = 0; t < 10; t++) {
        assert_true(a[t * 4] >= 0);
        assert_int_equal(a[t * 4], a[t * 4 + (t < 6 ? 3 : 1)]);
        assert_int_equal(a[t * 4], b[t * 4 + 1]);
        assert_int_equal(a[t * 4 + 2], -1); /* the prefix stays what it is */
    }
    char *after = malloc((size_t)srf_engine_value_bytes(e));
    test_ok(srf_engine_state_get(e, 2, after));
    assert_memory_equal(values, after, (size_t)srf_engine_state_bytes(e));
    free(values);
    free(after);
    srf_engine_free(e);
    srf_engine_free(other);
    srf_checkpoint_free(ck);
    srf_ctx_free(ctx);
}

/* A prompt that begins anew leaves the state alone of one that goes on in the slot behind it. */
static void anew_beside_going_on(void **state)
{
    (void)state;
    struct job job;
    make_jobs(&job, 1);
    struct srf_checkpoint *ck = checkpoint(4);
    struct srf_ctx *ctx;
    struct srf_engine_config config = config_of(3);
    int32_t tokens[2][10 * 3];
    config.stop = -1;
    test_ok(srf_ctx_create("cpu", SRF_F32, 1, &ctx));
    for (int together = 0; together < 2; together++) {
        struct srf_engine *e;
        test_ok(srf_engine_create(ctx, ck, &config, &e));
        struct srf_engine_prompt prompts[3];
        for (int64_t i = 0; i < 3; i++)
            prompts[i] = (struct srf_engine_prompt){
                .slot = i, .tokens = job.prompt, .n_tokens = 20 + i, .sequence = (uint64_t)i};
        test_ok(srf_engine_admit(e, 3, prompts));
        for (int i = 0; i < 3; i++) {
            prompts[i].n_tokens = 5;
            prompts[i].max_new = 10;
            prompts[i].resume = i == 1;
        }
        if (together) test_ok(srf_engine_admit(e, 3, prompts));
        for (int i = 0; i < 3 && !together; i++) test_ok(srf_engine_admit(e, 1, &prompts[i]));
        for (int64_t i = 0; i < 3; i++)
            assert_int_equal(srf_engine_position(e, i), i == 1 ? 21 + 5 : 5);
        test_ok(srf_engine_decode(e, 10, tokens[together]));
        srf_engine_free(e);
    }
    assert_memory_equal(tokens[0], tokens[1], sizeof tokens[0]);
    srf_checkpoint_free(ck);
    srf_ctx_free(ctx);
}

/* Logits that are not numbers give no token: of a prompt, and in the middle of a text. */
static void not_finite(void **state)
{
    (void)state;
    enum { AT = 40 };
    struct srf_checkpoint *ck = checkpoint(4);
    struct srf_ctx *ctx;
    struct srf_engine *e;
    int32_t prompt[AT + 1] = {0}, tokens[8 * 2];
    struct srf_engine_config config = config_of(2);
    config.stop = -1;
    for (int64_t r = 0; r < ck->table.n; r++)
        if (strstr(ck->table.rows[r].name, "wpe"))
            ck->params[ck->table.rows[r].offset + AT * 36] = NAN;
    test_ok(srf_ctx_create("cpu", SRF_F32, 1, &ctx));
    test_ok(srf_engine_create(ctx, ck, &config, &e));
    struct srf_engine_prompt p = {.slot = 1, .tokens = prompt, .n_tokens = AT + 1, .max_new = MOST};
    assert_int_equal(srf_engine_admit(e, 1, &p), SRF_NONFINITE);
    assert_non_null(strstr(srf_error_message(), "slot 1"));
    srf_engine_free(e);
    test_ok(srf_engine_create(ctx, ck, &config, &e));
    p.n_tokens = AT - 10;
    test_ok(srf_engine_admit(e, 1, &p));
    test_ok(srf_engine_decode(e, 8, tokens));
    for (int t = 0; t < 8; t++) assert_true(tokens[2 * t + 1] >= 0);
    assert_int_equal(srf_engine_decode(e, 8, tokens), SRF_NONFINITE);
    assert_non_null(strstr(srf_error_message(), "slot 1"));
    srf_engine_free(e);
    srf_checkpoint_free(ck);
    srf_ctx_free(ctx);
}

static void refuses(void **state)
{
    (void)state;
    struct srf_checkpoint *ck = checkpoint(0);
    struct srf_ctx *ctx;
    struct srf_engine *e;
    int32_t tokens[N_POS + 1] = {0}, out[3 * 2];
    test_ok(srf_ctx_create("cpu", SRF_F32, 1, &ctx));
    struct srf_engine_config config = config_of(2);
    config.prefill_rows = 0;
    assert_int_equal(srf_engine_create(ctx, ck, &config, &e), SRF_INVALID);
    config = config_of(2);
    config.sampler.top_p = 0;
    assert_int_equal(srf_engine_create(ctx, ck, &config, &e), SRF_INVALID);
    config = config_of(2);
    test_ok(srf_engine_create(ctx, ck, &config, &e));
    struct srf_engine_prompt p = {.tokens = tokens, .n_tokens = N_POS, .max_new = 1};
    test_ok(srf_engine_admit(e, 1, &p));
    assert_int_equal(srf_engine_admit(e, 1, &p), SRF_INVALID); /* runs */
    test_ok(srf_engine_decode(e, 3, out));
    assert_true(out[0] >= 0 && out[1] == -1 && out[2] == -1);
    struct srf_engine_prompt bad[] = {
        {.slot = 2, .tokens = tokens, .n_tokens = 1},
        {.slot = -1, .tokens = tokens, .n_tokens = 1},
        {.tokens = tokens, .n_tokens = 0},
        {.tokens = tokens, .n_tokens = N_POS + 1},
        {.tokens = tokens, .n_tokens = N_POS, .max_new = 2},
        {.tokens = tokens, .n_tokens = 1, .max_new = INT64_MAX},
        {.tokens = tokens, .n_tokens = 1, .max_new = -1},
        {.slot = 0, .tokens = tokens, .n_tokens = 1, .resume = true, .max_new = 1}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(srf_engine_admit(e, 1, &bad[i]), SRF_INVALID);
    tokens[0] = V;
    struct srf_engine_prompt id = {.slot = 1, .tokens = tokens, .n_tokens = 1, .max_new = 1};
    assert_int_equal(srf_engine_admit(e, 1, &id), SRF_MISMATCH);
    tokens[0] = 0;
    struct srf_engine_prompt twice[2] = {id, id};
    assert_int_equal(srf_engine_admit(e, 2, twice), SRF_INVALID);
    test_ok(srf_engine_admit(e, 1, &id));
    test_ok(srf_engine_decode(e, 1, out));
    /* what goes on has the positions that are left */
    id.resume = true;
    id.max_new = N_POS;
    assert_int_equal(srf_engine_admit(e, 1, &id), SRF_INVALID);
    id.max_new = N_POS - 1;
    test_ok(srf_engine_admit(e, 1, &id));
    srf_engine_free(e);
    /* positions that do not end */
    config.positions = SRF_POS_WRAP;
    test_ok(srf_engine_create(ctx, ck, &config, &e));
    p.max_new = 20;
    test_ok(srf_engine_admit(e, 1, &p));
    int32_t many[20 * 2];
    test_ok(srf_engine_decode(e, 20, many));
    assert_int_equal(srf_engine_running(e, 0), false);
    /* the largest engine that fits is no larger than that */
    int64_t slots, bytes, more, taken;
    test_ok(srf_engine_fits(ctx, ck, &config, 1 << 20, 1000, &slots, &bytes));
    assert_true(slots >= 1 && slots < 1000 && bytes <= 1 << 20);
    test_ok(srf_engine_fits(ctx, ck, &config, INT64_MAX, slots + 1, &more, &taken));
    assert_int_equal(more, slots + 1);
    assert_true(taken > 1 << 20);
    test_ok(srf_engine_fits(ctx, ck, &config, 1000, 1000, &slots, &bytes));
    assert_int_equal(slots, 0);
    srf_engine_free(e);
    srf_checkpoint_free(ck);
    srf_ctx_free(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_alone),
        cmocka_unit_test(any_company),
        cmocka_unit_test(logits_alone),
        cmocka_unit_test(states),
        cmocka_unit_test(anew_beside_going_on),
        cmocka_unit_test(not_finite),
        cmocka_unit_test(refuses),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
