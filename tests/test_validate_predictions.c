/* What srf validate measures of predictions on a tiny random model: by position, over draws, and
 * continuations. */
#include "tests/validate_case.h"

#include <math.h>
#include <string.h>

/* The setting's model beside itself, with SRF attention `a`. */
static struct srf_validate_pair pair_of(const struct setting *s,
                                        const struct srf_attention_config *a)
{
    return (struct srf_validate_pair){.teacher = s->ck,
                                      .student = s->ck,
                                      .attention = a,
                                      .tokens = s->tokens,
                                      .windows = B,
                                      .seq_len = T};
}

/* A window that holds everything is softmax; places hold each prediction once, with the losses of
 * softmax and SRF by row that the model has. */
static void positions(void **state)
{
    (void)state;
    int32_t targets[B * T];
    float nll[B * T];
    struct setting s;
    setting_new(&s, SRF_F64);
    for (int i = 0; i < B * T; i++) targets[i] = (i + 1) % T ? s.tokens[i + 1] : -1;
    struct srf_attention_config a = config_of(T, true, ms).attention;
    a.kind = SRF_ATTN_SRF;
    struct srf_validate_place p[SRF_VALIDATE_PLACES];
    struct srf_validate_pair pair = pair_of(&s, &a);
    test_ok(srf_validate_positions(s.ctx, &pair, p));
    for (int i = 0; p[i].n; i++)
        assert_true(fabs(p[i].nll - p[i].nll_softmax) < 1e-9 && fabs(p[i].kl) < 1e-9);
    a.window = 4;
    test_ok(srf_validate_positions(s.ctx, &pair, p));
    struct planned own = model_new(&s, &a, (struct srf_model_plan){.b = B, .t = T});
    struct srf_batch batch = {.b = B, .t = T, .tokens = s.tokens};
    struct srf_loss_args loss = {.n = B * T, .targets = targets, .nll = nll};
    test_ok(srf_model_forward(own.m, &batch));
    test_ok(srf_model_loss(own.m, &loss));
    int64_t n = 0;
    for (int i = 0; p[i].n; i++) {
        double sum = 0;
        int count = 0;
        for (int t = 0; t < B * T; t++) {
            int before = t % T + 1; /* tokens */
            if (before == T || before < 1 << i || before >= 2 << i) continue;
            sum += (double)nll[t];
            count++;
        }
        assert_int_equal(p[i].n, count);
        assert_true(fabs(p[i].nll - sum / count) < 1e-5);
        assert_true(i < 3 ? fabs(p[i].kl) < 1e-9 : p[i].kl > 1e-4); /* 4 to 8 are exact */
        n += p[i].n;
    }
    assert_int_equal(n, B * (T - 1));
    model_done(&own);
    setting_free(&s);
}

/* Draw i is what the model with that draw has, and the perplexity is that of the predictions. */
static void draws(void **state)
{
    (void)state;
    struct setting s;
    setting_new(&s, SRF_F64);
    struct srf_attention_config a = config_of(4, true, ms).attention;
    a.kind = SRF_ATTN_SRF;
    struct srf_validate_pair pair = pair_of(&s, &a);
    double ppl[DRAWS];
    test_ok(srf_validate_draws(s.ctx, &pair, DRAWS, ppl));
    for (int i = 0; i < DRAWS; i++, a.draw++) {
        struct srf_validate_place p[SRF_VALIDATE_PLACES];
        test_ok(srf_validate_positions(s.ctx, &pair, p));
        double nll = 0;
        for (int k = 0; p[k].n; k++) nll += (double)p[k].n * p[k].nll;
        double want = exp(nll / (B * (T - 1)));
        test_close("perplexity of a draw", &ppl[i], &want, 1, 1e-9);
        if (i) assert_true(fabs(ppl[i] - ppl[i - 1]) > 1e-6 * ppl[i]);
    }
    setting_free(&s);
}

/* With a window that holds everything both write the same; with a small one they part; and the
 * tokens are sampled from the logits that the teacher has behind the prompt and what came of it. */
static void continuations(void **state)
{
    (void)state;
    enum { PROMPT = 9, NEW = 20 };
    int32_t teacher[B * NEW], student[B * NEW], next;
    struct setting s;
    setting_new(&s, SRF_F64);
    struct srf_attention_config a = config_of(T, true, ms).attention;
    a.kind = SRF_ATTN_SRF;
    struct srf_sampler_config sampler = {.temperature = 0.8, .top_p = 0.9};
    struct srf_validate_pair pair = pair_of(&s, &a);
    test_ok(srf_validate_continue(s.ctx, &pair, PROMPT, NEW, &sampler, 3, teacher, student));
    assert_memory_equal(teacher, student, sizeof teacher);
    a.window = 2;
    test_ok(srf_validate_continue(s.ctx, &pair, PROMPT, NEW, &sampler, 3, teacher, student));
    assert_memory_not_equal(teacher, student, sizeof teacher);
    struct srf_attention_config softmax = srf_attention_default();
    struct planned own =
        model_new(&s, &softmax, (struct srf_model_plan){.b = 1, .t = PROMPT + NEW});
    int32_t text[PROMPT + NEW];
    float logits[V];
    for (int k = 0; k < B * NEW; k++) { /* each token behind its own prompt and text */
        int i = k / NEW, n = k % NEW;
        memcpy(text, s.tokens + i * T, PROMPT * sizeof *text);
        memcpy(text + PROMPT, teacher + i * NEW, (size_t)n * sizeof *text);
        struct srf_batch batch = {.b = 1, .t = PROMPT + n, .tokens = text};
        test_ok(srf_model_forward(own.m, &batch));
        test_ok(srf_model_last_logits(own.m, &batch, logits));
        test_ok(srf_sample(&sampler, 3, (uint64_t)i, n, logits, V, &next));
        assert_int_equal(next, teacher[k]);
    }
    assert_int_equal(srf_validate_continue(s.ctx, &pair, 0, NEW, &sampler, 3, teacher, student),
                     SRF_INVALID);
    assert_int_equal(srf_validate_continue(s.ctx, &pair, PROMPT, 48, &sampler, 3, teacher, student),
                     SRF_MISMATCH);
    model_done(&own);
    setting_free(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(positions),
        cmocka_unit_test(draws),
        cmocka_unit_test(continuations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
