/* The model's forms that agree: parallel, prefill split anywhere, packed or of last rows alone, and
 * step by step. */
#include "tests/model_case.h"

#include <math.h>
#include <string.h>

/* The whole model in its parallel form, by prefill split anywhere, and token by token. */
static void forms_agree(void **state)
{
    (void)state;
    const int64_t windows[] = {0, 3, 8, -1, -2};
    for (int w = 0; w < 5; w++) {
        struct fixture f;
        open_fixture(&f, SRF_F32, attention(SRF_ATTN_SRF, windows[w]), 2, 31, false);
        const int64_t b = 2, t = 31, c = 12;
        double *want = srf__alloc((size_t)(b * t * c), sizeof *want);
        double *got = srf__alloc((size_t)(b * t * c), sizeof *got);
        double *row = srf__alloc((size_t)(b * t * c), sizeof *row);
        float *st = srf__alloc((size_t)(b * srf_model_state_count(f.model)), sizeof *st);
        test_ok(srf_model_forward(f.model, &f.batch));
        test_to_double(f.ctx, srf_arena_ptr(f.arena, f.model->slot_hidden), want, b * t * c);
        const int64_t cuts[3][5] = {{31}, {7, 1, 12, 1, 10}, {1, 1, 17, 11, 1}};
        for (int k = 0; k < 4; k++) {
            memset(st, 0, (size_t)(b * srf_model_state_count(f.model)) * sizeof *st);
            for (int64_t at = 0, i = 0; at < t; i++) {
                int64_t n = k == 3 ? 1 : cuts[k][i];
                int32_t piece[64], pos[2] = {(int32_t)at, (int32_t)at};
                for (int64_t s = 0; s < b; s++)
                    memcpy(piece + s * n, f.tokens + s * t + at, (size_t)n * sizeof *piece);
                struct srf_batch batch = {.b = b,
                                          .t = n,
                                          .tokens = piece,
                                          .mode = n == 1 ? SRF_MODE_STEP : SRF_MODE_PREFILL,
                                          .state = st,
                                          .pos = pos};
                test_ok(srf_model_forward(f.model, &batch));
                test_to_double(f.ctx, srf_arena_ptr(f.arena, f.model->slot_hidden), row, b * n * c);
                for (int64_t s = 0; s < b; s++)
                    memcpy(got + (s * t + at) * c, row + s * n * c, (size_t)(n * c) * sizeof *got);
                at += n;
            }
            test_close("recurrent form of the model", got, want, b * t * c, 1e-5);
        }
        srf__free(want);
        srf__free(got);
        srf__free(row);
        srf__free(st);
        close_fixture(&f);
    }
}

/* Two sequences of different lengths packed into each prefill, their states in any slots, past the
 * end of the learned positions: as the parallel form of each, under each policy. */
static void packed_prefill(void **state)
{
    (void)state;
    enum { T = 60, C = 12 };
    const enum srf_positions policies[] = {SRF_POS_WRAP, SRF_POS_CLAMP};
    double want[2][T * C], got[2][T * C], rows[T * C];
    for (int k = 0; k < 4; k++) {
        struct fixture f;
        open_fixture(&f, SRF_F32, attention(SRF_ATTN_SRF, k < 2 ? 0 : 5), 1, T, false);
        const int32_t lens[2][2] = {{25, 10}, {35, 20}}, slots[2] = {2, 0};
        int32_t pos[2] = {0, 0}, packed[T];
        float *st = srf__calloc((size_t)(3 * srf_model_state_count(f.model)), sizeof *st);
        struct srf_batch batch = {.b = 1, .t = T, .tokens = f.tokens};
        assert_int_equal(srf_model_forward(f.model, &batch), SRF_INVALID);
        f.model->positions = policies[k % 2];
        test_ok(srf_model_forward(f.model, &batch));
        test_to_double(f.ctx, srf_arena_ptr(f.arena, f.model->slot_hidden), want[0], T * C);
        memcpy(want[1], want[0], sizeof want[0]);
        for (int round = 0; round < 2; round++) {
            const int32_t *len = lens[round];
            memcpy(packed, f.tokens + pos[0], (size_t)len[0] * sizeof *packed);
            memcpy(packed + len[0], f.tokens + pos[1], (size_t)len[1] * sizeof *packed);
            batch = (struct srf_batch){.b = 2,
                                       .t = len[0],
                                       .tokens = packed,
                                       .mode = SRF_MODE_PREFILL,
                                       .state = st,
                                       .pos = pos,
                                       .n_slots = 3,
                                       .lens = len,
                                       .slots = slots};
            test_ok(srf_model_forward(f.model, &batch));
            int64_t n = len[0] + len[1];
            test_to_double(f.ctx, srf_arena_ptr(f.arena, f.model->slot_hidden), rows, n * C);
            memcpy(got[0] + pos[0] * C, rows, (size_t)(len[0] * C) * sizeof *rows);
            memcpy(got[1] + pos[1] * C, rows + len[0] * C, (size_t)(len[1] * C) * sizeof *rows);
            for (int i = 0; i < 2; i++) pos[i] += len[i];
        }
        for (int i = 0; i < 2; i++) test_close("packed prefill", got[i], want[i], pos[i] * C, 1e-5);
        const int32_t bad[2] = {3, 0}, none[2] = {5, 0};
        batch.slots = bad;
        assert_int_equal(srf_model_forward(f.model, &batch), SRF_INVALID);
        batch.slots = slots;
        batch.lens = none;
        assert_int_equal(srf_model_forward(f.model, &batch), SRF_INVALID);
        srf__free(st);
        close_fixture(&f);
    }
}

/* A prefill of which only states and last logits are wanted gives the same of both. */
static void last_only(void **state)
{
    (void)state;
    enum { T = 400, SHORT = 200, V = 29 };
    float want[2 * V], got[2 * V];
    int32_t tokens[T + SHORT];
    const int32_t lens[2] = {T, SHORT}, pos[2] = {0, 0};
    struct fixture f;
    open_fixture(&f, SRF_F32, attention(SRF_ATTN_SRF, 5), 2, T, false);
    f.model->positions = SRF_POS_WRAP;
    for (int i = 0; i < T + SHORT; i++) tokens[i] = f.tokens[i % 61];
    int64_t count = 2 * srf_model_state_count(f.model);
    float *all = srf__calloc((size_t)count, sizeof *all), *last = srf__calloc((size_t)count, 4);
    assert_true(all && last);
    struct srf_batch batch = {.b = 2,
                              .t = T,
                              .tokens = tokens,
                              .mode = SRF_MODE_PREFILL,
                              .state = all,
                              .pos = pos,
                              .lens = lens};
    test_ok(srf_model_forward(f.model, &batch));
    assert_int_equal(srf_batch_hidden_rows(&batch), T + SHORT);
    test_ok(srf_model_last_logits(f.model, &batch, want));
    batch.state = last;
    batch.last_only = true;
    assert_int_equal(srf_batch_hidden_rows(&batch), 2);
    test_ok(srf_model_forward(f.model, &batch));
    test_ok(srf_model_last_logits(f.model, &batch, got));
    for (int i = 0; i < 2 * V; i++)
        if (!(fabsf(got[i] - want[i]) <= 1e-5f * (1 + fabsf(want[i]))))
            fail_msg("logit %d is %g, expected %g", i, (double)got[i], (double)want[i]);
    assert_memory_equal(all, last, (size_t)count * sizeof *all);
    srf__free(all);
    srf__free(last);
    close_fixture(&f);
}

/* What comes of the logits of 40 rows: of a batch beside a teacher, losses and logits; of 40
 * sequences that go on, last logits and samples. */
struct of_logits {
    float logits[40 * 29], nll[40], last[40 * 29];
    double kl;
    int32_t tokens[40];
};

static void use_logits(int64_t logit_rows, struct of_logits *out)
{
    enum { N = 40 };
    struct srf_ctx *ctx;
    struct srf_checkpoint *ck;
    struct srf_arena *arenas[2];
    struct srf_model *models[2];
    int32_t tokens[N], targets[N], pos[N], at[N] = {0};
    uint64_t streams[3 * N];
    test_ok(srf_ctx_create("cpu", SRF_F32, 1, &ctx));
    ctx->exact_rows = true;
    test_ok(srf_checkpoint_init(config_json, 1, &ck));
    for (int k = 0; k < 2; k++) {
        struct srf_attention_config a = attention(k ? SRF_ATTN_SOFTMAX : SRF_ATTN_SRF, 3);
        randomize(ck, k ? 0.4 : 0.3);
        test_ok(srf_arena_create(ctx, &arenas[k]));
        test_ok(srf_model_create(ctx, &ck->config, &a, &models[k]));
        struct srf_model_plan plan = {.b = N, .t = 1, .teacher = true, .logit_rows = logit_rows};
        test_ok(srf_model_plan(models[k], arenas[k], &plan));
        test_ok(srf_arena_commit(arenas[k]));
        test_ok(srf_model_upload(models[k], ck));
    }
    for (int i = 0; i < N; i++) {
        tokens[i] = i % 29;
        targets[i] = (7 * i + 1) % 29;
        out->tokens[i] = -5;
        pos[i] = i % 7 == 5 ? -1 : 0; /* these want no token */
        for (int j = 0; j < 3; j++) streams[3 * i + j] = (uint64_t)(100 * j + i);
    }
    struct srf_batch batch = {.b = 2, .t = N / 2, .tokens = tokens};
    struct srf_loss_args loss = {
        .n = N, .targets = targets, .nll = out->nll, .logits = out->logits, .teacher = models[1]};
    for (int k = 0; k < 2; k++) test_ok(srf_model_forward(models[k], &batch));
    test_ok(srf_model_loss(models[0], &loss));
    out->kl = loss.kl_sum;
    float *st = srf__calloc((size_t)(N * srf_model_state_count(models[0])), sizeof *st);
    assert_non_null(st);
    batch = (struct srf_batch){
        .b = N, .t = 1, .tokens = tokens, .mode = SRF_MODE_STEP, .state = st, .pos = at};
    test_ok(srf_model_forward(models[0], &batch));
    test_ok(srf_model_last_logits(models[0], &batch, out->last));
    struct srf_sample_args sample = {
        .temperature = 2, .top_p = 1, .streams = streams, .pos = pos, .tokens = out->tokens};
    test_ok(srf_model_sample(models[0], &batch, &sample));
    srf__free(st);
    for (int k = 0; k < 2; k++) {
        srf_model_free(models[k]);
        srf_arena_free(arenas[k]);
    }
    srf_checkpoint_free(ck);
    srf_ctx_free(ctx);
}

/* Logits are made some rows at a time: how many changes nothing. */
static void pieces_of_logits(void **state)
{
    (void)state;
    static struct of_logits whole, pieces;
    use_logits(40, &whole);
    use_logits(16, &pieces);
    assert_memory_equal(whole.tokens, pieces.tokens, sizeof whole.tokens);
    assert_memory_equal(whole.last, pieces.last, sizeof whole.last);
    assert_memory_equal(whole.logits, pieces.logits, sizeof whole.logits);
    assert_memory_equal(whole.nll, pieces.nll, sizeof whole.nll);
    assert_true(whole.kl == pieces.kl && whole.kl > 1);
    for (int i = 0; i < 40; i++) {
        const float *row = whole.logits + i * 29;
        double sum = 0;
        for (int j = 0; j < 29; j++) sum += exp((double)row[j]);
        double nll = log(sum) - (double)row[(7 * i + 1) % 29];
        assert_true(fabs(nll - (double)whole.nll[i]) < 1e-4);
        assert_int_equal(whole.tokens[i] == -5, i % 7 == 5);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(forms_agree),
        cmocka_unit_test(packed_prefill),
        cmocka_unit_test(last_only),
        cmocka_unit_test(pieces_of_logits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
