/* Low-rank additions: their gradient, what they learn and what they leave alone. */
#include "tests/training_case.h"

#include <math.h>
#include <string.h>

/* A step with low-rank factors, and the gradient of its loss in them. */
static double lora_loss(struct srf_trainer *t)
{
    double sum;
    test_ok(srf__lora_apply(t));
    test_ok(srf_model_zero_grads(t->model));
    for (int64_t i = 0; i < t->config.batch; i += t->config.micro_batch)
        test_ok(srf__micro_batch(t, i));
    int64_t rows = t->config.batch * t->config.seq_len;
    test_ok(srf_model_losses(t->model, srf__loss_row(&t->config), rows, NULL, &sum, NULL));
    return sum / (double)rows;
}

static void lora_gradients(void **state)
{
    (void)state;
    struct setup s;
    struct srf_trainer *t;
    open_setup_in(&s, SRF_F64, 4, true);
    s.config.lora = 3;
    test_ok(srf_trainer_create(s.ctx, s.ck, NULL, &s.config, s.train, NULL, &t));
    int64_t n = t->lora.n;
    double *factors = srf__lora_factors(t), *saved = srf__alloc((size_t)n, sizeof *saved);
    double *direction = srf__alloc((size_t)n, sizeof *direction);
    const double *grad = srf_arena_ptr(t->arena, t->lora.slot_grads);
    assert_int_equal(n, 2 * (64 + 3 * 64 + 64 + 64)); /* (16, 3), (3, 48), (16, 3), (3, 16) */
    /* not where B is 0: dA would be */
    test_normal(saved, n, 0.2, 300);
    for (int64_t i = 0; i < n; i++) factors[i] += saved[i];
    memcpy(saved, factors, (size_t)n * sizeof *saved);
    lora_loss(t);
    test_ok(srf__lora_gradients(t));
    for (uint32_t k = 0; k < 4; k++) {
        const double steps[4] = {1e-3, -1e-3, 2e-3, -2e-3};
        double got = 0, sums[4], size = 0;
        test_normal(direction, n, 1 / sqrt((double)n), 301 + k);
        for (int64_t i = 0; i < n; i++) {
            got += grad[i] * direction[i];
            size += grad[i] * grad[i];
        }
        for (int j = 0; j < 4; j++) {
            for (int64_t i = 0; i < n; i++) factors[i] = saved[i] + steps[j] * direction[i];
            sums[j] = lora_loss(t);
        }
        double want = (8 * (sums[0] - sums[1]) - (sums[2] - sums[3])) / 12e-3;
        double error = fabs(got - want) / sqrt(size / (double)n);
        print_message("gradient %.9g, difference %.9g, relative %.2g\n", got, want, error);
        assert_true(size > 0 && error < 1e-6);
    }
    srf__free(saved);
    srf__free(direction);
    srf_trainer_free(t);
    close_setup(&s);
}

/* A begins with variance 1 / in, in no row with numbers that a new model's weights begin with, B as
 * 0; without a gradient, factors do nothing but decay. */
static void lora_begins(void **state)
{
    (void)state;
    struct setup s;
    struct srf_trainer *t;
    struct srf_train_metrics m;
    open_setup_in(&s, SRF_F64, 0, false);
    s.config.lora = 8;
    s.config.ce_weight = 0;
    s.config.weight_decay = 0.5;
    test_ok(srf_trainer_create(s.ctx, s.ck, NULL, &s.config, s.train, NULL, &t));
    /* (16, 8), (8, 48), (16, 8), (8, 16) in each of two layers */
    enum { A1 = 128, B1 = A1 + 384, A2 = B1 + 128, LAYER = A2 + 128 };
    assert_int_equal(t->lora.n, 2 * LAYER);
    double *factors = srf__lora_factors(t), want[2 * LAYER], squares[4] = {0};
    for (int i = 0; i < 2 * LAYER; i++) {
        int at = i % LAYER;
        squares[at < A1 ? 0 : at < B1 ? 1 : at < A2 ? 2 : 3] += factors[i] * factors[i] / 256;
        want[i] = factors[i] * (1 - 0.5 * srf_policy_lr(&s.config, 0));
    }
    for (uint32_t row = 0; row < (uint32_t)t->model->table.n; row++) {
        struct srf_rng weights = srf_rng_at(s.config.seed, SRF_RNG_INIT, 0, row, 0);
        double x = srf_rng_normal(&weights) / 4;
        for (int at = 0; at < 2 * LAYER; at += at % LAYER ? LAYER - B1 : B1)
            assert_true(fabs(factors[at] - x) > 1e-6);
    }
    assert_true(squares[1] == 0 && squares[3] == 0);
    assert_true(fabs(16 * squares[0] - 1) < 0.3 && fabs(16 * squares[2] - 1) < 0.3);
    test_ok(srf_trainer_step(t, &m));
    test_close("factors", factors, want, 2 * LAYER, 1e-14);
    srf_trainer_free(t);
    close_setup(&s);
}

/* Low-rank factors learn, nothing but attention's matrices moves, by a change of their rank, and
 * the model that is written is the one that was trained. */
static void lora_learns(void **state)
{
    (void)state;
    struct setup s;
    struct srf_trainer *t;
    struct srf_train_metrics m;
    struct srf_checkpoint *ck;
    double before, after, again;
    char path[96];
    open_setup(&s, 4, true);
    s.config.lora = 17;
    assert_int_equal(srf_trainer_create(s.ctx, s.ck, NULL, &s.config, s.train, NULL, &t),
                     SRF_INVALID);
    assert_non_null(strstr(srf_error_message(), "rank 16 at most"));
    s.config.lora = 1;
    s.config.rest_lr = 0;
    assert_int_equal(srf_trainer_create(s.ctx, s.ck, NULL, &s.config, s.train, NULL, &t),
                     SRF_INVALID);
    s.config.rest_lr = 1;
    s.config.steps = 150;
    s.config.lr = 3e-2;
    test_ok(srf_trainer_create(s.ctx, s.ck, NULL, &s.config, s.train, s.held, &t));
    const float *params = srf_model_param(t->model, 0);
    assert_memory_equal(params, s.ck->params, (size_t)s.ck->table.total * sizeof *params);
    test_ok(srf_trainer_evaluate(t, NULL, &before));
    for (int i = 0; i < 150; i++) test_ok(srf_trainer_step(t, &m));
    test_ok(srf_trainer_evaluate(t, NULL, &after));
    print_message("perplexity %.2f -> %.2f\n", before, after);
    assert_true(after < before - 0.3); /* beside embeddings that stay random */
    snprintf(path, sizeof path, "%s/model.h5", s.dir);
    test_ok(srf_trainer_save_model(t, path));
    test_ok(srf_checkpoint_load(path, NULL, &ck));
    assert_memory_equal(params, ck->params, (size_t)ck->table.total * sizeof *params);
    int64_t moved = 0;
    for (int64_t r = 0; r < ck->table.n; r++) {
        const struct srf_tensor *row = &ck->table.rows[r];
        const float *old = s.ck->params + row->offset, *now = params + row->offset;
        bool adapted = strstr(row->name, ".attn.") && row->ndim == 2;
        assert_int_equal(memcmp(old, now, (size_t)row->count * sizeof *now) != 0, adapted);
        int64_t out = row->shape[1];
        for (int64_t i = 0; adapted && i + out + 1 < row->count; i++) {
            if ((i + 1) % out == 0) continue; /* 2 x 2 minors of a matrix of rank 1 */
            double a = now[i] - old[i], b = now[i + 1] - old[i + 1];
            double c = now[i + out] - old[i + out], d = now[i + out + 1] - old[i + out + 1];
            assert_true(fabs(a * d - b * c) < 1e-6 * (1 + fabs(a * d) + fabs(b * c)));
            moved += fabs(a) > 1e-3;
        }
    }
    assert_true(moved > 100);
    srf_trainer_free(t);
    s.config.lora = 0;
    test_ok(srf_trainer_create(s.ctx, ck, NULL, &s.config, s.train, s.held, &t));
    test_ok(srf_trainer_evaluate(t, NULL, &again));
    assert_true(again == after);
    srf_trainer_free(t);
    srf_checkpoint_free(ck);
    close_setup(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lora_gradients),
        cmocka_unit_test(lora_begins),
        cmocka_unit_test(lora_learns),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
