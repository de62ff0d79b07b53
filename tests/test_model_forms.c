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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(forms_agree),
        cmocka_unit_test(packed_prefill),
        cmocka_unit_test(last_only),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
