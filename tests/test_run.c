/* The loop of a run: its folder, saves, evaluations, interruptions and kills. */
#include "tests/training_case.h"

#include <string.h>
#include <unistd.h>

static bool exists(const char *dir, const char *name)
{
    char path[160];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return access(path, F_OK) == 0;
}

static bool stop_at_once(void *user)
{
    return ++*(int *)user == 5;
}

static bool stop_at_the_last(void *user)
{
    return ++*(int *)user == 12;
}

/* The loop: files of a run, an interruption, going on; the metrics are those of an unbroken run. */
static void run_and_interrupt(void **state)
{
    (void)state;
    struct setup s;
    struct srf_trainer *t;
    double ppl, want;
    char path[128], last[96];
    open_setup(&s, 4, true);
    s.config.save_every = 2;
    s.config.redraw_every = 1;
    char whole_dir[96], dir[96];
    snprintf(whole_dir, sizeof whole_dir, "%s/a/whole", s.dir);
    snprintf(dir, sizeof dir, "%s/b", s.dir);
    snprintf(last, sizeof last, "%s/b/last.h5", s.dir);
    struct srf_run_hooks none = {0};
    test_ok(srf_trainer_create(s.ctx, s.ck, NULL, &s.config, s.train, s.held, &t));
    test_ok(srf_trainer_run(t, whole_dir, &none, &want));
    srf_trainer_free(t);
    /* of a finished run there is the result once more, and the model where a kill left none */
    snprintf(path, sizeof path, "%s/model.h5", whole_dir);
    assert_int_equal(unlink(path), 0);
    snprintf(path, sizeof path, "%s/last.h5", whole_dir);
    test_ok(srf_trainer_resume(s.ctx, path, s.train, s.held, &t));
    test_ok(srf_trainer_run(t, whole_dir, &none, &ppl));
    srf_trainer_free(t);
    assert_true(ppl == want && exists(whole_dir, "model.h5"));
    /* and a stop in the last step interrupts nothing */
    int steps = 0;
    struct srf_run_hooks late = {.user = &steps, .stop = stop_at_the_last};
    snprintf(path, sizeof path, "%s/late", s.dir);
    test_ok(srf_trainer_create(s.ctx, s.ck, NULL, &s.config, s.train, s.held, &t));
    test_ok(srf_trainer_run(t, path, &late, &ppl));
    srf_trainer_free(t);
    assert_true(ppl == want && exists(path, "model.h5"));

    int calls = 0;
    struct srf_run_hooks hooks = {.user = &calls, .stop = stop_at_once};
    test_ok(srf_trainer_create(s.ctx, s.ck, NULL, &s.config, s.train, s.held, &t));
    assert_int_equal(srf_trainer_run(t, dir, &hooks, &ppl), SRF_INTERRUPTED);
    srf_trainer_free(t);
    /* as if it had gone on for two steps after the save, and half of a third */
    snprintf(path, sizeof path, "%s/metrics.jsonl", dir);
    FILE *f = fopen(path, "a");
    fprintf(f, "{\"step\": 6, \"loss\": 99}\n{\"step\": 7, \"loss\": 99}\n{\"st");
    fclose(f);
    test_ok(srf_trainer_resume(s.ctx, last, s.train, s.held, &t));
    assert_int_equal(srf_trainer_steps_done(t), 5);
    test_ok(srf_trainer_run(t, dir, &none, &ppl));
    srf_trainer_free(t);
    assert_true(ppl == want && ppl > 1);
    f = fopen(path, "r");
    int lines = 0, bad = 0;
    char line[512];
    while (fgets(line, sizeof line, f)) {
        int step = 0;
        assert_int_equal(sscanf(line, "{\"step\": %d", &step), 1);
        bad += step != ++lines || strstr(line, "99}") != NULL;
    }
    fclose(f);
    assert_int_equal(lines, 12);
    assert_int_equal(bad, 0);
    /* what it leaves is a model that evaluates to the same perplexity */
    struct srf_checkpoint *ck;
    snprintf(path, sizeof path, "%s/model.h5", dir);
    test_ok(srf_checkpoint_load(path, NULL, &ck));
    assert_int_equal(ck->kind, SRF_CKPT_WEIGHTS);
    assert_int_equal(ck->attention.draw, 11);
    test_ok(srf_trainer_create(s.ctx, ck, NULL, &s.config, s.train, s.held, &t));
    double again;
    test_ok(srf_trainer_evaluate(t, NULL, &again));
    assert_true(again == want);
    srf_trainer_free(t);
    srf_checkpoint_free(ck);
    close_setup(&s);
}

/* Copies a run's folder after its sixth step, as a kill at that moment would leave it. */
static void copy_at_six(void *user, const struct srf_train_metrics *m, double val_ppl)
{
    const struct setup *s = user;
    char command[256];
    (void)val_ppl;
    if (m->step != 6) return;
    snprintf(command, sizeof command, "cp -r '%s/whole' '%s/killed'", s->dir, s->dir);
    assert_int_equal(system(command), 0);
}

/* How many lines of a run's log have a perplexity; none may have two. */
static int evaluations(const char *dir, int *lines)
{
    char path[160], line[512];
    snprintf(path, sizeof path, "%s/metrics.jsonl", dir);
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    int n = 0;
    *lines = 0;
    while (fgets(line, sizeof line, f)) {
        const char *ppl = strstr(line, "\"val_ppl\": ");
        ++*lines;
        n += ppl != NULL;
        if (ppl) assert_null(strstr(ppl + 2, "val_ppl"));
        assert_non_null(strstr(line, "}\n"));
    }
    fclose(f);
    return n;
}

/* Evaluations are in the log once each, whether their step was the last before a kill or not. */
static void evaluations_of_a_killed_run(void **state)
{
    (void)state;
    for (int every = 2; every <= 4; every++) {
        struct setup s;
        struct srf_trainer *t;
        char whole[96], killed[96], last[128];
        double want, ppl;
        int lines;
        open_setup(&s, 0, false);
        snprintf(whole, sizeof whole, "%s/whole", s.dir);
        snprintf(killed, sizeof killed, "%s/killed", s.dir);
        snprintf(last, sizeof last, "%s/last.h5", killed);
        s.config.save_every = 4;
        s.config.eval_every = every;
        struct srf_run_hooks hooks = {.user = &s, .step = copy_at_six}, none = {0};
        test_ok(srf_trainer_create(s.ctx, s.ck, NULL, &s.config, s.train, s.held, &t));
        test_ok(srf_trainer_run(t, whole, &hooks, &want));
        srf_trainer_free(t);
        test_ok(srf_trainer_resume(s.ctx, last, s.train, s.held, &t));
        assert_int_equal(srf_trainer_steps_done(t), 4);
        test_ok(srf_trainer_run(t, killed, &none, &ppl));
        srf_trainer_free(t);
        assert_true(ppl == want);
        assert_int_equal(evaluations(whole, &lines), 12 / every);
        assert_int_equal(evaluations(killed, &lines), 12 / every);
        assert_int_equal(lines, 12);
        close_setup(&s);
    }
}

static bool stop_after_six(void *user)
{
    return ++*(int *)user == 6;
}

/* A run without validation has no line to put an evaluation in, whoever resumes it. */
static void evaluations_of_a_step_without_a_line(void **state)
{
    (void)state;
    struct setup s;
    struct srf_trainer *t;
    char path[128], line[512];
    double ppl;
    int calls = 0, evaluated = 0;
    struct srf_run_hooks none = {0}, hooks = {.user = &calls, .stop = stop_after_six};
    open_setup(&s, 0, false);
    s.config.log_every = 5;
    s.config.eval_every = 2;
    test_ok(srf_trainer_create(s.ctx, s.ck, NULL, &s.config, s.train, NULL, &t));
    assert_int_equal(srf_trainer_run(t, s.dir, &hooks, &ppl), SRF_INTERRUPTED);
    srf_trainer_free(t);
    snprintf(path, sizeof path, "%s/last.h5", s.dir);
    test_ok(srf_trainer_resume(s.ctx, path, s.train, s.held, &t));
    test_ok(srf_trainer_run(t, s.dir, &none, &ppl));
    srf_trainer_free(t);
    snprintf(path, sizeof path, "%s/metrics.jsonl", s.dir);
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    while (fgets(line, sizeof line, f)) {
        int step = 0;
        assert_int_equal(sscanf(line, "{\"step\": %d", &step), 1);
        assert_int_equal(strstr(line, "val_ppl") != NULL, step > 6 && step % 2 == 0);
        evaluated += strstr(line, "val_ppl") != NULL;
    }
    fclose(f);
    assert_int_equal(evaluated, 3);
    close_setup(&s);
}

static bool stop_after_two(void *user)
{
    return ++*(int *)user == 2;
}

static void touch(const char *dir, const char *name)
{
    char path[160];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fclose(f);
}

/* The folder of a run belongs to it: it takes no second one, and loses what a kill left. */
static void run_directory(void **state)
{
    (void)state;
    struct setup s;
    struct srf_trainer *t;
    char last[96];
    double ppl;
    int calls = 0;
    struct srf_run_hooks none = {0}, hooks = {.user = &calls, .stop = stop_after_two};
    open_setup(&s, 0, false);
    snprintf(last, sizeof last, "%s/last.h5", s.dir);
    touch(s.dir, "last.h5.tmp.1234");
    touch(s.dir, "model.h5.tmp.1");
    touch(s.dir, "last.h5.tmp.mine");
    test_ok(srf_trainer_create(s.ctx, s.ck, NULL, &s.config, s.train, NULL, &t));
    assert_int_equal(srf_trainer_run(t, "", &none, &ppl), SRF_INVALID);
    assert_int_equal(srf_trainer_run(t, s.dir, &hooks, &ppl), SRF_INTERRUPTED);
    srf_trainer_free(t);
    assert_false(exists(s.dir, "last.h5.tmp.1234"));
    assert_false(exists(s.dir, "model.h5.tmp.1"));
    assert_true(exists(s.dir, "last.h5.tmp.mine"));

    test_ok(srf_trainer_create(s.ctx, s.ck, NULL, &s.config, s.train, NULL, &t));
    assert_int_equal(srf_trainer_run(t, s.dir, &none, &ppl), SRF_INVALID);
    assert_non_null(strstr(srf_error_message(), "last.h5"));
    assert_int_equal(srf_trainer_steps_done(t), 0);
    srf_trainer_free(t);
    test_ok(srf_trainer_resume(s.ctx, last, s.train, NULL, &t));
    assert_int_equal(srf_trainer_steps_done(t), 2);
    test_ok(srf_trainer_run(t, s.dir, &none, &ppl));
    srf_trainer_free(t);
    assert_int_equal(unlink(last), 0); /* the model alone is a run, too */
    assert_int_equal(srf_run_check_new(s.dir), SRF_INVALID);
    assert_non_null(strstr(srf_error_message(), "model.h5"));
    close_setup(&s);
}

/* A validation set that cannot be used is refused at the start, or costs nothing but its result. */
static void bad_validation_set(void **state)
{
    (void)state;
    struct setup s;
    struct srf_trainer *t;
    struct srf_tokenset *bad;
    struct srf_run_hooks none = {0};
    char path[96];
    double ppl;
    open_setup(&s, 0, false);
    snprintf(path, sizeof path, "%s/bad.npy", s.dir);
    write_tokens(path, 1, 2);
    test_ok(srf_tokenset_open(path, NULL, 16, &bad));
    assert_int_equal(srf_trainer_create(s.ctx, s.ck, NULL, &s.config, s.train, bad, &t),
                     SRF_INVALID);
    srf_tokenset_close(bad);
    s.config.seq_len = 1;
    assert_int_equal(srf_trainer_create(s.ctx, s.ck, NULL, &s.config, s.train, s.held, &t),
                     SRF_INVALID);
    s.config.seq_len = 24;
    s.config.eval_tokens = 1;
    assert_int_equal(srf_trainer_create(s.ctx, s.ck, NULL, &s.config, s.train, s.held, &t),
                     SRF_INVALID);
    s.config.eval_tokens = 65536;

    /* An id that is none of the model's, in the middle of a long set: found by the evaluation. */
    write_tokens(path, 40000, 2);
    FILE *f = fopen(path, "r+b");
    fseek(f, 128 + 2 * 20000, SEEK_SET);
    fwrite("\x63\x00", 1, 2, f);
    fclose(f);
    test_ok(srf_tokenset_open(path, NULL, 16, &bad));
    test_ok(srf_trainer_create(s.ctx, s.ck, NULL, &s.config, s.train, bad, &t));
    assert_int_equal(srf_trainer_run(t, s.dir, &none, &ppl), SRF_MISMATCH);
    srf_trainer_free(t);
    srf_tokenset_close(bad);
    assert_true(exists(s.dir, "model.h5"));
    snprintf(path, sizeof path, "%s/last.h5", s.dir);
    test_ok(srf_trainer_resume(s.ctx, path, s.train, s.held, &t));
    assert_int_equal(srf_trainer_steps_done(t), 12);
    test_ok(srf_trainer_run(t, s.dir, &none, &ppl));
    assert_true(ppl > 1);
    srf_trainer_free(t);
    close_setup(&s);
}

/* Saved before the first step, so that an early end loses nothing. */
static bool stop_checks_checkpoint(void *user)
{
    const char *dir = user;
    assert_true(exists(dir, "last.h5"));
    return false;
}

static void saved_at_once(void **state)
{
    (void)state;
    struct setup s;
    struct srf_trainer *t;
    double ppl;
    open_setup(&s, 0, false);
    s.config.save_every = 0;
    struct srf_run_hooks hooks = {.user = s.dir, .stop = stop_checks_checkpoint};
    test_ok(srf_trainer_create(s.ctx, s.ck, NULL, &s.config, s.train, NULL, &t));
    test_ok(srf_trainer_run(t, s.dir, &hooks, &ppl));
    srf_trainer_free(t);
    close_setup(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(run_and_interrupt),
        cmocka_unit_test(evaluations_of_a_killed_run),
        cmocka_unit_test(evaluations_of_a_step_without_a_line),
        cmocka_unit_test(run_directory),
        cmocka_unit_test(bad_validation_set),
        cmocka_unit_test(saved_at_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
