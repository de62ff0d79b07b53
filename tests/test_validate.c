/* What srf validate measures of attention on a tiny random model, against loops in double. */
#include "tests/validate_case.h"
#include "train/validate_weights.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* q, k, v of every layer, (L, B * T, 3C). */
static double *model_qkv(const struct setting *s)
{
    struct srf_attention_config softmax = srf_attention_default();
    struct planned p =
        model_new(s, &softmax, (struct srf_model_plan){.b = B, .t = T, .keep_qkv = true});
    struct srf_batch batch = {.b = B, .t = T, .tokens = s->tokens};
    test_ok(srf_model_forward(p.m, &batch));
    double *qkv = srf__alloc(L * B * T * 3 * C, sizeof *qkv);
    assert_non_null(qkv);
    for (int l = 0; l < L; l++)
        test_to_double(s->ctx, srf_model_qkv(p.m, l), qkv + l * B * T * 3 * C, B * T * 3 * C);
    model_done(&p);
    return qkv;
}

static double v_sq(const double *q, const double *k)
{
    double sum = 0;
    for (int j = 0; j < D; j++) sum += (q[j] + k[j]) * (q[j] + k[j]);
    return sum / sqrt(D);
}

/* One head's outputs (B, T, D): softmax without w, else with the kernel that the m features make
 * and exact scores for the blocks of `window` tokens that hold t and come before it. */
static void outputs(const double *qkv, const double *w, const double *bias, int m, int window,
                    double *o)
{
    double scale = pow(D, -0.25);
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++) {
            double den = 0, num[D] = {0};
            for (int s = 0; s <= t; s++) {
                const double *q = qkv + (b * T + t) * 3 * C, *k = qkv + (b * T + s) * 3 * C + C;
                double score = 0, x_sq = 0, y_sq = 0, p = 0;
                for (int j = 0; j < D; j++) {
                    score += scale * q[j] * scale * k[j];
                    x_sq += scale * q[j] * scale * q[j];
                    y_sq += scale * k[j] * scale * k[j];
                }
                bool near = window && t / window - s / window <= 1;
                if (!w || near)
                    p = exp(score);
                else
                    for (int i = 0; i < m; i++) {
                        double a = 2 * bias[i] - (x_sq + y_sq) / 2;
                        for (int j = 0; j < D; j++) a += w[i * D + j] * scale * (q[j] + k[j]);
                        p += exp(a) / m;
                    }
                den += p;
                for (int j = 0; j < D; j++) num[j] += p * k[C + j];
            }
            for (int j = 0; j < D; j++) o[(b * T + t) * D + j] = num[j] / den;
        }
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void check_norms(const double *qkv, const struct srf_validate_config *c,
                        const struct srf_validate_result *r)
{
    enum { PAIRS = B * T * (T + 1) / 2 };
    double *pairs;
    test_ok(SRF_ALLOC(pairs, PAIRS));
    for (int l = 0; l < L; l++)
        for (int h = 0; h < H; h++) {
            double sum = 0;
            int n = 0;
            for (int b = 0; b < B; b++)
                for (int t = 0; t < T; t++)
                    for (int s = 0; s <= t; s++) {
                        const double *rows = qkv + l * B * T * 3 * C + h * D;
                        pairs[n] = v_sq(rows + (b * T + t) * 3 * C, rows + (b * T + s) * 3 * C + C);
                        sum += pairs[n++];
                    }
            qsort(pairs, PAIRS, sizeof *pairs, compare);
            /* Every pair is in the bin that its value lies in, and there is no other. */
            const double *part = r->v_part + (l * H + h) * SRF_VALIDATE_BINS;
            double all = 0, cumulated = 0;
            for (int i = 0; i < SRF_VALIDATE_BINS; i++) {
                int below = 0;
                cumulated += part[i];
                for (int j = 0; j < PAIRS; j++) below += pairs[j] < srf_validate_bin(i + 1);
                if (i == SRF_VALIDATE_BINS - 1) below = PAIRS;
                assert_true(fabs(cumulated - (double)below / PAIRS) < 1.5 / PAIRS);
                all += part[i];
            }
            assert_true(fabs(all - 1) < 1e-9);
            int past = 0;
            for (int j = 0; j < PAIRS; j++) past += pairs[j] > log1p((double)c->main_m);
            assert_true(fabs(r->v_past[l * H + h] - (double)past / PAIRS) < 1.5 / PAIRS);
            double want = sum / PAIRS;
            test_close("mean |q+k|^2", &r->v_mean[l * H + h], &want, 1, 1e-5);
            for (int i = 0; i < SRF_VALIDATE_QUANTILES; i++) {
                want = pairs[(int)(srf_validate_quantile[i] * (PAIRS - 1))];
                test_close("quantile", &r->v_quantile[(l * H + h) * SRF_VALIDATE_QUANTILES + i],
                           &want, 1, 1e-5);
            }
        }
    srf__free(pairs);
}

static void check_errors(const double *qkv, const struct srf_validate_config *c,
                         const struct srf_validate_result *r)
{
    enum { N = B * T * D, M_MAX = 21 };
    static double exact[N], o[N];
    double w[M_MAX * D], bias[M_MAX];
    for (int l = 0; l < L; l++)
        for (int h = 0; h < H; h++) {
            const double *head = qkv + l * B * T * 3 * C + h * D;
            outputs(head, NULL, NULL, 0, 0, exact);
            for (int i = 0; i < N_M; i++) {
                double e[DRAWS], mean = 0, squares = 0;
                for (int n = 0; n < DRAWS; n++) {
                    struct srf_features_draw_args a = {.kind = c->attention.features,
                                                       .seed = c->attention.seed,
                                                       .draw = c->attention.draw + (uint64_t)n,
                                                       .m = c->m[i],
                                                       .d = D};
                    test_ok(srf_features_draw_one(&a, l, c->attention.per_head ? h : 0,
                                                  c->attention.oprf_a, w, bias));
                    outputs(head, w, bias, (int)c->m[i], (int)c->attention.window, o);
                    e[n] = test_error(o, exact, N);
                    mean += e[n] / DRAWS;
                }
                for (int n = 0; n < DRAWS; n++) squares += (e[n] - mean) * (e[n] - mean);
                double sd = sqrt(squares / (DRAWS - 1));
                int64_t at = (i * L + l) * H + h;
                assert_true(mean > 0.01); /* there is something to compare */
                test_close("output error", &r->error[at], &mean, 1, 1e-4);
                assert_true(fabs(r->error_sd[at] - sd) < 1e-4 * mean);
            }
        }
}

/* Mean over t of KL(softmax's weights || the features'), first window, in double. */
static double weights_kl(const double *qkv, const double *w, const double *bias, int m, int window)
{
    double kl = 0, scale = pow(D, -0.25);
    for (int t = 0; t < T; t++) {
        double p[T], r[T], of_p = 0, of_r = 0;
        for (int s = 0; s <= t; s++) {
            const double *q = qkv + t * 3 * C, *k = qkv + s * 3 * C + C;
            double score = 0, sq = 0;
            for (int j = 0; j < D; j++) {
                score += scale * q[j] * scale * k[j];
                sq += scale * q[j] * scale * q[j] + scale * k[j] * scale * k[j];
            }
            p[s] = r[s] = exp(score);
            if (!window || t / window - s / window > 1) {
                r[s] = 0;
                for (int i = 0; i < m; i++) {
                    double a = 2 * bias[i] - sq / 2;
                    for (int j = 0; j < D; j++) a += w[i * D + j] * scale * (q[j] + k[j]);
                    r[s] += exp(a) / m;
                }
            }
            of_p += p[s];
            of_r += r[s];
        }
        for (int s = 0; s <= t; s++) kl += p[s] / of_p * log(p[s] / of_p / (r[s] / of_r)) / T;
    }
    return kl;
}

static void check_weights(const double *qkv, const struct srf_validate_config *c,
                          const struct srf_validate_result *r)
{
    enum { M_MAX = 21 };
    double w[M_MAX * D], bias[M_MAX];
    for (int l = 0; l < L; l++)
        for (int h = 0; h < H; h++)
            for (int i = 0; i < N_M; i++) {
                struct srf_features_draw_args a = {.kind = c->attention.features,
                                                   .seed = c->attention.seed,
                                                   .draw = c->attention.draw,
                                                   .m = c->m[i],
                                                   .d = D};
                test_ok(srf_features_draw_one(&a, l, c->attention.per_head ? h : 0,
                                              c->attention.oprf_a, w, bias));
                double want = weights_kl(qkv + l * B * T * 3 * C + h * D, w, bias, (int)c->m[i],
                                         (int)c->attention.window);
                assert_true(want > 1e-3); /* there is something to compare */
                test_close("KL of the weights", &r->weights_kl[(i * L + l) * H + h], &want, 1,
                           1e-4);
            }
}

/* Keys and queries so large that products of exponentials are nothing: the logarithms are kept. */
static void weights_of_large_heads(void **state)
{
    (void)state;
    enum { N = 12, M = 16 };
    float q[N * 3 * C], w[M * D], bias[M] = {0}, *scratch;
    double qkv[N * 3 * C], wide[M * D], sum = 0;
    struct srf_rng rng = srf_rng_at(test_seed(), SRF_RNG_TEST, 12, 0, 0);
    for (int i = 0; i < N * 3 * C; i++) q[i] = (float)(qkv[i] = 40 * (srf_rng_uniform(&rng) - 0.5));
    for (int i = 0; i < M * D; i++) w[i] = (float)(wide[i] = 4 * (srf_rng_uniform(&rng) - 0.5));
    test_ok(SRF_ALLOC(scratch, srf_weights_scratch(N, M)));
    struct srf_weights_args a = {.t = N,
                                 .d = D,
                                 .m = M,
                                 .q = q,
                                 .k = q + C,
                                 .ld = 3 * C,
                                 .w = w,
                                 .bias = bias,
                                 .scratch = scratch};
    for (int t = 0; t < N; t++) { /* the reference, by logarithms */
        double p[N], r[N], top_p = -INFINITY, top_r = -INFINITY, of_p = 0, of_r = 0;
        double scale = pow(D, -0.25);
        for (int s = 0; s <= t; s++) {
            const double *x = qkv + t * 3 * C, *y = qkv + s * 3 * C + C;
            double sq = 0, each[M], top = -INFINITY, all = 0;
            p[s] = 0;
            for (int j = 0; j < D; j++) {
                p[s] += scale * x[j] * scale * y[j];
                sq += scale * scale * (x[j] * x[j] + y[j] * y[j]);
            }
            for (int i = 0; i < M; i++) {
                each[i] = -sq / 2;
                for (int j = 0; j < D; j++) each[i] += wide[i * D + j] * scale * (x[j] + y[j]);
                top = fmax(top, each[i]);
            }
            for (int i = 0; i < M; i++) all += exp(each[i] - top);
            r[s] = top + log(all);
            top_p = fmax(top_p, p[s]);
            top_r = fmax(top_r, r[s]);
        }
        for (int s = 0; s <= t; s++) {
            of_p += exp(p[s] - top_p);
            of_r += exp(r[s] - top_r);
        }
        for (int s = 0; s <= t; s++)
            sum += exp(p[s] - top_p) / of_p *
                   (p[s] - top_p - log(of_p) - (r[s] - top_r - log(of_r))) / N;
    }
    double got = srf_weights_kl(&a);
    assert_true(sum > 10); /* far from what fp32 products can hold */
    test_close("KL of large heads", &got, &sum, 1, 1e-4);
    srf__free(scratch);
}

static void measurements(void **state)
{
    (void)state;
    for (int type = 0; type < 2; type++)
        for (int hybrid = 0; hybrid < 2; hybrid++) {
            struct setting s;
            setting_new(&s, type ? SRF_F64 : SRF_F32);
            double *qkv = model_qkv(&s);
            struct srf_validate_config c = config_of(hybrid ? 8 : 0, !hybrid, ms);
            struct srf_validate_result r;
            test_ok(srf_validate_attention(s.ctx, s.ck, s.tokens, &c, &r));
            assert_int_equal(r.n_layers, L);
            assert_int_equal(r.n_heads, H);
            assert_int_equal(r.n_m, N_M);
            check_norms(qkv, &c, &r);
            check_errors(qkv, &c, &r);
            check_weights(qkv, &c, &r);
            for (int l = 0; l < L; l++) {
                assert_true(r.step[l] <= 1e-5 && r.prefill[l] <= 1e-5);
                if (!type) assert_true(r.step[l] > 0); /* other roundings: they were compared */
            }
            srf_validate_result_free(&r);
            srf__free(qkv);
            setting_free(&s);
        }
}

/* A layer with a window of its own is measured as if all had it. */
static void windows_by_layer(void **state)
{
    (void)state;
    static const int windows[L] = {8, 4};
    struct setting s;
    struct srf_validate_result one, own;
    setting_new(&s, SRF_F64);
    struct srf_validate_config c = config_of(8, true, ms);
    c.attention.n_windows = L;
    for (int l = 0; l < L; l++) c.attention.windows[l] = windows[l];
    test_ok(srf_validate_attention(s.ctx, s.ck, s.tokens, &c, &own));
    for (int l = 0; l < L; l++) {
        c = config_of(windows[l], true, ms);
        test_ok(srf_validate_attention(s.ctx, s.ck, s.tokens, &c, &one));
        for (int i = 0; i < N_M; i++)
            for (int h = l * H; h < (l + 1) * H; h++) {
                assert_true(own.error[i * L * H + h] == one.error[i * L * H + h]);
                assert_true(own.weights_kl[i * L * H + h] == one.weights_kl[i * L * H + h]);
            }
        assert_true(own.step[l] == one.step[l] && own.prefill[l] == one.prefill[l]);
        srf_validate_result_free(&one);
    }
    srf_validate_result_free(&own);
    setting_free(&s);
}

/* Features of a layer's own number are measured as if all layers had as many. */
static void features_by_layer(void **state)
{
    (void)state;
    static const int64_t own_m[L] = {3, 21};
    struct setting s;
    struct srf_validate_result one, own;
    setting_new(&s, SRF_F32);
    struct srf_validate_config c = config_of(8, true, ms);
    test_ok(srf_attention_set_layer_m(&c.attention, "3,21"));
    assert_int_equal(srf_validate_attention(s.ctx, s.ck, s.tokens, &c, &own), SRF_INVALID);
    c.main_m = 21;
    test_ok(srf_validate_attention(s.ctx, s.ck, s.tokens, &c, &own));
    for (int l = 0; l < L; l++) {
        c = config_of(8, true, ms);
        c.main_m = own_m[l];
        test_ok(srf_validate_attention(s.ctx, s.ck, s.tokens, &c, &one));
        for (int h = l * H; h < (l + 1) * H; h++) {
            assert_true(one.error_own[h] > 0);
            test_close("own error", &own.error_own[h], &one.error_own[h], 1, 1e-5);
        }
        for (int i = 0; i < N_M * L * H; i++) assert_true(own.error[i] == one.error[i]);
        assert_true(own.step[l] <= 1e-5 && own.prefill[l] <= 1e-5 && own.step[l] > 0);
        srf_validate_result_free(&one);
    }
    srf_validate_result_free(&own);
    setting_free(&s);
}

/* Features that a checkpoint holds are used as they are, for the model's own numbers alone. */
static void stored_features(void **state)
{
    (void)state;
    struct setting s;
    setting_new(&s, SRF_F64);
    struct srf_validate_config c = config_of(0, true, ms);
    struct srf_validate_result drawn, held;
    test_ok(srf_validate_attention(s.ctx, s.ck, s.tokens, &c, &drawn));
    enum { M = 8, ROWS = L * H * M };
    s.ck->attention = c.attention;
    s.ck->attention.kind = SRF_ATTN_SRF;
    s.ck->attention.m = M;
    test_ok(SRF_ALLOC(s.ck->features_w, ROWS * D));
    test_ok(SRF_ALLOC(s.ck->features_bias, ROWS));
    double w[M * D], bias[M];
    for (int l = 0; l < L; l++) /* every head has the first one's */
        for (int h = 0; h < H; h++) {
            struct srf_features_draw_args a = {.kind = c.attention.features,
                                               .seed = c.attention.seed,
                                               .draw = c.attention.draw,
                                               .m = M,
                                               .d = D};
            test_ok(srf_features_draw_one(&a, l, 0, c.attention.oprf_a, w, bias));
            for (int i = 0; i < M * D; i++) s.ck->features_w[(l * H + h) * M * D + i] = (float)w[i];
            for (int i = 0; i < M; i++) s.ck->features_bias[(l * H + h) * M + i] = (float)bias[i];
        }
    test_ok(srf_validate_attention(s.ctx, s.ck, s.tokens, &c, &held));
    for (int i = 0; i < N_M * L * H; i++) {
        assert_true(fabs(drawn.error[i] - held.error[i]) < 1e-6);
        assert_true(fabs(drawn.error_sd[i] - held.error_sd[i]) < 1e-6 && drawn.error_sd[i] > 0);
    }
    for (int h = 0; h < L * H; h++) { /* the first heads have what they would draw */
        double off = fabs(drawn.error_own[h] - held.error_own[h]);
        assert_true(h % H ? off > 1e-3 : off < 1e-6);
    }
    /* Kinds of draws are compared by draws alone. */
    c.errors_only = true;
    srf_validate_result_free(&held);
    test_ok(srf_validate_attention(s.ctx, s.ck, s.tokens, &c, &held));
    for (int i = 0; i < N_M * L * H; i++) {
        assert_true(fabs(drawn.error[i] - held.error[i]) < 1e-6);
        assert_true(fabs(drawn.error_sd[i] - held.error_sd[i]) < 1e-6);
        assert_true(fabs(drawn.weights_kl[i] - held.weights_kl[i]) < 1e-5);
    }
    srf_validate_result_free(&drawn);
    srf_validate_result_free(&held);
    setting_free(&s);
}

/* Nothing beyond the window: no draw and no number of features matters, and it is not the same as
 * with them. */
static void without_far_part(void **state)
{
    (void)state;
    struct setting s;
    setting_new(&s, SRF_F64);
    struct srf_validate_config c = config_of(8, true, ms);
    struct srf_validate_result with, without;
    double differ = 0;
    test_ok(srf_validate_attention(s.ctx, s.ck, s.tokens, &c, &with));
    c.attention.far_none = true;
    test_ok(srf_validate_attention(s.ctx, s.ck, s.tokens, &c, &without));
    for (int i = 0; i < N_M * L * H; i++) {
        assert_true(fabs(without.error[i] - without.error[i % (L * H)]) < 1e-9);
        assert_true(without.error_sd[i] < 1e-6 && without.error[i] > 0.01);
        differ += fabs(with.error[i] - without.error[i]);
    }
    assert_true(differ > 1e-4);
    srf_validate_result_free(&with);
    srf_validate_result_free(&without);
    setting_free(&s);
}

static void progress(void *user, double done)
{
    double *last = user;
    assert_true(done > *last && done <= 1);
    *last = done;
}

static void bad_arguments_and_progress(void **state)
{
    (void)state;
    static const int64_t descending[N_M] = {3, 2, 8};
    struct setting s;
    setting_new(&s, SRF_F32);
    struct srf_validate_result r;
    struct srf_validate_config good = config_of(0, true, ms), c = good;
    double last = 0;
    c.progress = progress;
    c.user = &last;
    test_ok(srf_validate_attention(s.ctx, s.ck, s.tokens, &c, &r));
    assert_true(last == 1);
    srf_validate_result_free(&r);
    srf_validate_result_free(&r); /* twice is fine */
    c = good, c.m = descending;
    assert_int_equal(srf_validate_attention(s.ctx, s.ck, s.tokens, &c, &r), SRF_INVALID);
    c = good, c.main_m = 64;
    assert_int_equal(srf_validate_attention(s.ctx, s.ck, s.tokens, &c, &r), SRF_INVALID);
    c = good, c.seq_len = 49;
    assert_int_equal(srf_validate_attention(s.ctx, s.ck, s.tokens, &c, &r), SRF_INVALID);
    c = good, c.n_draws = 1;
    assert_int_equal(srf_validate_attention(s.ctx, s.ck, s.tokens, &c, &r), SRF_INVALID);
    s.tokens[5] = V;
    assert_int_equal(srf_validate_attention(s.ctx, s.ck, s.tokens, &good, &r), SRF_MISMATCH);
    assert_null(r.error);
    s.tokens[5] = 0;
    /* Every allocation may fail: no crash, no leak (the sanitizer looks). */
    srf_status st = SRF_NOMEM;
    int n = 0;
    for (; st != SRF_OK && n < 1000; n++) {
        srf__fail_alloc_after(n);
        st = srf_validate_attention(s.ctx, s.ck, s.tokens, &good, &r);
        assert_true(st == SRF_OK || st == SRF_NOMEM);
    }
    srf__fail_alloc_after(-1);
    assert_true(st == SRF_OK && n > 10);
    srf_validate_result_free(&r);
    setting_free(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(measurements),
        cmocka_unit_test(weights_of_large_heads),
        cmocka_unit_test(stored_features),
        cmocka_unit_test(without_far_part),
        cmocka_unit_test(windows_by_layer),
        cmocka_unit_test(features_by_layer),
        cmocka_unit_test(bad_arguments_and_progress),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
