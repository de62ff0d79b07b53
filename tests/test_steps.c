/* What a step of training does, beside references: the optimizer by hand, the gradient of all
 * losses together, where sequences begin. */
#include "tests/ref/twin.h"
#include "tests/training_case.h"

#include <math.h>
#include <string.h>

/* AdamW by its definition on n parameters; m, v begin as 0. */
static void adamw_by_hand(const struct srf_train_config *c, int64_t step, double lr, double decay,
                          double clip, const double *g, double *p, double *m, double *v, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        double x = clip * g[i];
        m[i] = c->beta1 * m[i] + (1 - c->beta1) * x;
        v[i] = c->beta2 * v[i] + (1 - c->beta2) * x * x;
        double mean = m[i] / (1 - pow(c->beta1, (double)step));
        double root = sqrt(v[i] / (1 - pow(c->beta2, (double)step)));
        p[i] -= lr * (mean / (root + c->eps) + decay * p[i]);
    }
}

/* Copies of a model's parameters and, behind them, its features. */
static double *values_of(const struct srf_model *m, int64_t *n)
{
    int64_t n_params = m->table.total, n_features;
    const double *w = srf_model_features(m, &n_features);
    double *out = srf__alloc((size_t)(n_params + n_features), sizeof *out);
    assert_non_null(out);
    memcpy(out, srf_model_param(m, 0), (size_t)n_params * sizeof *out);
    memcpy(out + n_params, w, (size_t)n_features * sizeof *out);
    *n = n_params + n_features;
    return out;
}

/* Every parameter moves as AdamW says, by the gradient that the step has left: rates of their own,
 * decay of matrices alone, clipping by the norm of all that is trained, or none. */
static void steps_by_hand(void **state)
{
    (void)state;
    for (int clip = 0; clip < 2; clip++) {
        struct setup s;
        struct srf_trainer *t;
        struct srf_train_metrics metrics;
        int64_t n;
        open_setup_in(&s, SRF_F64, 4, true);
        s.config.clip = clip ? 0.25 : 0;
        s.config.weight_decay = 0.5;
        s.config.rest_lr = 0.5;
        s.config.train_features = true;
        s.config.features_lr = 0.02;
        s.ck->attention.draw = 7;
        test_ok(srf_trainer_create(s.ctx, s.ck, NULL, &s.config, s.train, NULL, &t));
        struct srf_model *model = srf_trainer_model(t);
        const struct srf_tensor_table *table = &model->table;
        double *want = values_of(model, &n);
        double *m = srf__calloc((size_t)n, sizeof *m), *v = srf__calloc((size_t)n, sizeof *v);
        assert_true(m && v);
        for (int64_t step = 1; step <= 5; step++) {
            test_ok(srf_trainer_step(t, &metrics));
            const double *dw = srf_model_features_grad(model);
            double lr = srf_policy_lr(&s.config, step - 1);
            double squares = test_dot(dw, dw, n - table->total);
            for (int64_t r = 0; r < table->n; r++) {
                const double *g = srf_model_grad(model, r);
                squares += test_dot(g, g, table->rows[r].count);
            }
            double norm = sqrt(squares), by = clip && norm > 0.25 ? 0.25 / norm : 1;
            assert_true(!clip || by < 1);
            assert_true(fabs(metrics.grad_norm - norm) < 1e-6 * norm);
            assert_int_equal(metrics.draw, 7);
            for (int64_t r = 0; r < table->n; r++) {
                const struct srf_tensor *row = &table->rows[r];
                bool attention = strstr(row->name, ".attn.") || strstr(row->name, ".ln_1.");
                int64_t at = row->offset;
                adamw_by_hand(&s.config, step, attention ? lr : 0.5 * lr, row->ndim == 2 ? 0.5 : 0,
                              by, srf_model_grad(model, r), want + at, m + at, v + at, row->count);
            }
            int64_t at = table->total;
            adamw_by_hand(&s.config, step, lr * 0.02 / s.config.lr, 0, by, dw, want + at, m + at,
                          v + at, n - at);
            double *got = values_of(model, &n);
            for (int64_t r = 0; r < table->n; r++)
                test_close(table->rows[r].name, got + table->rows[r].offset,
                           want + table->rows[r].offset, table->rows[r].count, 1e-12);
            test_close("features", got + at, want + at, n - at, 1e-12);
            srf__free(got);
        }
        srf__free(want);
        srf__free(m);
        srf__free(v);
        srf_trainer_free(t);
        close_setup(&s);
    }
}

/* What a step descends: the weighted sum of the means that it reports. */
static double total_loss(struct srf_trainer *t)
{
    const struct srf_train_config *c = &t->config;
    double nll, kl, mse;
    test_ok(srf_model_zero_grads(t->model));
    for (int64_t i = 0; i < c->batch; i += c->micro_batch) test_ok(srf__micro_batch(t, i));
    int64_t rows = c->batch * c->seq_len;
    test_ok(srf_model_losses(t->model, srf__loss_row(c), rows, NULL, &nll, &kl));
    test_ok(srf_model_attention_mse(t->model, &mse));
    double values = (double)(rows * t->model->config.n_layers * t->model->config.c);
    return (c->ce_weight * nll + c->kl_weight * kl) / (double)rows + c->mse_weight * mse / values;
}

/* The gradient is that of the loss, with every part of it in; it does not pile up from step to
 * step; and a teacher that is the model itself has nothing to say. */
static void gradient_of_all_losses(void **state)
{
    (void)state;
    struct setup s;
    struct srf_trainer *t;
    struct srf_train_metrics metrics;
    struct srf_checkpoint *teacher;
    open_setup_in(&s, SRF_F64, 4, true);
    test_ok(srf_checkpoint_init(config_json, 4, &teacher));
    s.config.ce_weight = 0.3;
    s.config.kl_weight = 0.7;
    s.config.mse_weight = 40;
    test_ok(srf_trainer_create(s.ctx, s.ck, teacher, &s.config, s.train, NULL, &t));
    int64_t n = t->model->n_trained;
    double *params = srf_model_param(t->model, 0), *saved = srf__alloc((size_t)n, sizeof *saved);
    double *direction = srf__alloc((size_t)n, sizeof *direction);
    const double *grad = srf_arena_ptr(t->arena, t->model->slot_grads);
    assert_true(saved && direction);
    memcpy(saved, params, (size_t)n * sizeof *saved);
    total_loss(t);
    double size = sqrt(test_dot(grad, grad, n) / (double)n), *got = srf__alloc((size_t)n, 8);
    memcpy(got, grad, (size_t)n * sizeof *got);
    for (uint32_t k = 0; k < 3; k++) {
        /* the device has the sum of squares in single precision: no small steps */
        const double steps[4] = {2e-2, -2e-2, 4e-2, -4e-2};
        double sums[4];
        test_normal(direction, n, 1 / sqrt((double)n), 310 + k);
        for (int j = 0; j < 4; j++) {
            for (int64_t i = 0; i < n; i++) params[i] = saved[i] + steps[j] * direction[i];
            sums[j] = total_loss(t);
        }
        double want = (8 * (sums[0] - sums[1]) - (sums[2] - sums[3])) / 24e-2;
        double error = fabs(test_dot(got, direction, n) - want) / size;
        print_message("difference %.9g, relative %.2g\n", want, error);
        assert_true(size > 0 && error < 1e-4);
    }
    memcpy(params, saved, (size_t)n * sizeof *saved);
    double before = total_loss(t);
    test_ok(srf_trainer_step(t, &metrics));
    double sum = 0.3 * metrics.loss + 0.7 * metrics.kl + 40 * metrics.mse;
    assert_true(fabs(sum - before) < 1e-6 * before);
    assert_true(fabs(metrics.grad_norm / sqrt(size * size * (double)n) - 1) < 1e-6);
    srf_trainer_free(t);
    s.config.kl_to = 0.25;
    s.config.mse_to = 0.5;
    test_ok(srf_trainer_create(s.ctx, s.ck, teacher, &s.config, s.train, NULL, &t));
    for (int i = 0; i < 12; i++) {
        test_ok(srf_trainer_step(t, &metrics));
        assert_true((metrics.kl > 0) == (i < 3) && (metrics.mse > 0) == (i < 6));
    }
    srf_trainer_free(t);
    srf_checkpoint_free(teacher);

    test_ok(srf_trainer_create(s.ctx, s.ck, s.ck, &s.config, s.train, NULL, &t));
    test_ok(srf_trainer_step(t, &metrics));
    assert_true(metrics.loss > 1 && fabs(metrics.kl) < 1e-9 && metrics.mse == 0);
    srf_trainer_free(t);
    srf__free(saved);
    srf__free(direction);
    srf__free(got);
    close_setup(&s);
}

/* Sequences may begin wherever one fits, up to the last place. */
static void all_starts(void **state)
{
    (void)state;
    struct setup s;
    struct srf_trainer *t;
    struct srf_tokenset *data;
    char path[128];
    int32_t all[26];
    int n[2] = {0};
    open_setup(&s, 0, false);
    snprintf(path, sizeof path, "%s/short.npy", s.dir);
    write_tokens(path, 26, 6);
    test_ok(srf_tokenset_open(path, NULL, 16, &data));
    test_ok(srf_tokenset_read(data, 0, 26, all));
    test_ok(srf_trainer_create(s.ctx, s.ck, NULL, &s.config, data, NULL, &t));
    for (t->step = 0; t->step < 8; t->step++) {
        test_ok(srf__micro_batch(t, 0));
        for (int64_t i = 0; i < s.config.micro_batch; i++) {
            int start = memcmp(t->tokens + 24 * i, all, 24 * sizeof *all) == 0 ? 0 : 1;
            assert_memory_equal(t->tokens + 24 * i, all + start, 24 * sizeof *all);
            assert_memory_equal(t->targets + 24 * i, all + start + 1, 24 * sizeof *all);
            n[start]++;
        }
    }
    assert_true(n[0] > 4 && n[1] > 4);
    srf_trainer_free(t);
    srf_tokenset_close(data);
    close_setup(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(steps_by_hand),
        cmocka_unit_test(gradient_of_all_losses),
        cmocka_unit_test(all_starts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
