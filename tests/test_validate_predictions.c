/* What srf validate measures of predictions on a tiny random model: by position, with
 * other forms of attention, over draws, and continuations. */
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

/* Means over all predictions are those of the places; the standard error is that of blocks, from
 * the losses of rows with SRF and with softmax. */
static void expect_distance(const struct srf_validate_place *p,
                            const struct srf_validate_distance *all, const float *srf,
                            const float *softmax)
{
    double nll = 0, kl = 0, squares = 0, n = B * (T - 1);
    int blocks = 0;
    for (int i = 0; p[i].n; i++) {
        nll += (double)p[i].n * (p[i].nll - p[i].nll_softmax) / n;
        kl += (double)p[i].n * p[i].kl / n;
    }
    test_close("mean loss", &all->nll, &nll, 1, 1e-9);
    test_close("mean KL", &all->kl, &kl, 1, 1e-9);
    for (int t = 0; t < B * T; blocks++) {
        double off = 0;
        do off += (double)srf[t] - (double)softmax[t] - nll;
        while (++t % T % SRF_VALIDATE_BLOCK && t % T < T - 1);
        squares += off * off;
        if (t % T == T - 1) t++;
    }
    assert_int_equal(blocks, 2 * B);
    double se = sqrt(squares * blocks / (blocks - 1)) / n;
    test_close("standard error", &all->nll_se, &se, 1, 1e-5);
    assert_true(all->kl_se > 0 && all->kl_se < all->kl);
}

/* A window that holds everything is softmax; places hold each prediction once, with the losses of
 * softmax and SRF by row that the model has. */
static void positions(void **state)
{
    (void)state;
    int32_t targets[B * T];
    float nll[B * T], exact[B * T];
    struct setting s;
    setting_new(&s, SRF_F64);
    for (int i = 0; i < B * T; i++) targets[i] = (i + 1) % T ? s.tokens[i + 1] : -1;
    struct srf_attention_config a = config_of(T, true, ms).attention;
    a.kind = SRF_ATTN_SRF;
    struct srf_validate_place p[SRF_VALIDATE_PLACES];
    struct srf_validate_distance all;
    struct srf_validate_pair pair = pair_of(&s, &a);
    test_ok(srf_validate_positions(s.ctx, &pair, p, &all));
    assert_true(fabs(all.nll) < 1e-9 && fabs(all.kl) < 1e-9 && all.nll_se < 1e-9);
    for (int i = 0; p[i].n; i++)
        assert_true(fabs(p[i].nll - p[i].nll_softmax) < 1e-9 && fabs(p[i].kl) < 1e-9);
    a.window = 4;
    test_ok(srf_validate_positions(s.ctx, &pair, p, &all));
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
    struct srf_attention_config softmax = srf_attention_default();
    struct planned one = model_new(&s, &softmax, (struct srf_model_plan){.b = B, .t = T});
    loss.nll = exact;
    test_ok(srf_model_forward(one.m, &batch));
    test_ok(srf_model_loss(one.m, &loss));
    expect_distance(p, &all, nll, exact);
    model_done(&own);
    model_done(&one);
    setting_free(&s);
}

static void count_progress(void *user, double done)
{
    assert_true(done > 0 && done <= 1);
    ++*(int *)user;
}

/* Forms of attention, one layer after another: a layer alone is a model with all others exact; none
 * is softmax. A single block has no standard error. */
static void forms(void **state)
{
    (void)state;
    struct setting s;
    setting_new(&s, SRF_F64);
    struct srf_attention_config a = config_of(4, true, ms).attention, one, form[L + 2];
    struct srf_validate_pair pair = pair_of(&s, &a);
    struct srf_validate_distance got[L + 2], want;
    struct srf_validate_place p[SRF_VALIDATE_PLACES];
    int calls = 0;
    a.kind = SRF_ATTN_SRF;
    one = a;
    for (int l = -1; l < L; l++) test_ok(srf_validate_only_layer(&pair, l, &form[1 + l]));
    form[L + 1] = a;
    test_ok(srf_validate_forms(s.ctx, &pair, form, L + 2, count_progress, &calls, got));
    assert_int_equal(calls, L + 2);
    one.n_windows = L;
    one.window = T;
    struct srf_validate_pair alone = pair_of(&s, &one);
    for (int l = 0; l < L; l++) {
        for (int j = 0; j < L; j++) one.windows[j] = j == l ? 4 : T;
        test_ok(srf_validate_positions(s.ctx, &alone, p, &want));
        test_close("one layer", &got[1 + l].kl, &want.kl, 1, 1e-9);
        test_close("its standard error", &got[1 + l].kl_se, &want.kl_se, 1, 1e-7);
        test_close("its loss", &got[1 + l].nll, &want.nll, 1, 1e-7);
        assert_true(got[1 + l].kl > 1e-4 && got[1 + l].kl_se > 0);
    }
    assert_true(fabs(got[1].kl - got[2].kl) > 1e-3 * got[1].kl);
    assert_true(fabs(got[0].kl) < 1e-9 && fabs(got[0].nll) < 1e-9);
    test_ok(srf_validate_positions(s.ctx, &pair, p, &want));
    test_close("all layers", &got[L + 1].kl, &want.kl, 1, 1e-9);
    /* (m, d + 1) and the maxima, and k, v of two windows */
    assert_int_equal(got[L + 1].state_bytes, 8 * L * H * (a.m * (D + 2) + 2 * 4 * 2 * D));
    /* by layer already, one of them wider than the text */
    a.n_windows = L;
    a.windows[0] = 2 * T, a.windows[1] = 4, a.window = 2 * T;
    for (int l = 0; l < L; l++) test_ok(srf_validate_only_layer(&pair, l, &form[l]));
    pair.windows = 1;
    pair.seq_len = 20;
    test_ok(srf_validate_forms(s.ctx, &pair, form, L, NULL, NULL, got));
    assert_true(fabs(got[0].kl) < 1e-9 && got[1].kl > 0);
    assert_true(isnan(got[1].kl_se) && isnan(got[1].nll_se));
    pair.seq_len = SRF_WINDOW_MAX + 1;
    assert_int_equal(srf_validate_only_layer(&pair, 0, &one), SRF_UNSUPPORTED);
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
        struct srf_validate_distance all;
        test_ok(srf_validate_positions(s.ctx, &pair, p, &all));
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
        cmocka_unit_test(forms),
        cmocka_unit_test(draws),
        cmocka_unit_test(continuations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
