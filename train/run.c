/* The loop around the steps: metrics log, evaluations, checkpoints. */
#include "data/file.h"
#include "train/trainer_internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define PATH_SIZE 4096

/* ---- the directory of a run ------------------------------------------------------------------ */

struct paths {
    char metrics[PATH_SIZE], last[PATH_SIZE], model[PATH_SIZE];
};

static srf_status set_paths(const char *dir, struct paths *p)
{
    SRF_FAIL_IF(dir[0] == '\0', SRF_INVALID, "the run's directory has an empty name");
    SRF_FAIL_IF(strlen(dir) >= PATH_SIZE - 64, SRF_INVALID, "%s: path too long", dir);
    snprintf(p->metrics, PATH_SIZE, "%s/metrics.jsonl", dir);
    snprintf(p->last, PATH_SIZE, "%s/last.h5", dir);
    snprintf(p->model, PATH_SIZE, "%s/model.h5", dir);
    return SRF_OK;
}

srf_status srf_run_check_new(const char *dir)
{
    struct paths p;
    struct stat info;
    SRF_TRY(set_paths(dir, &p));
    SRF_FAIL_IF(stat(dir, &info) == 0 && !S_ISDIR(info.st_mode), SRF_IO,
                "%s: expected a directory to write the run into", dir);
    const char *found = lstat(p.last, &info) == 0 ? p.last : p.model;
    SRF_FAIL_IF(lstat(found, &info) == 0, SRF_INVALID,
                "%s is there, of an earlier run: go on with --resume, or name another directory",
                found);
    return SRF_OK;
}

/* Whether a name is one that an unfinished file of a run has: see srf__temp_name. */
static bool is_unfinished(const char *name)
{
    static const char *const starts[] = {"last.h5.tmp.", "model.h5.tmp.", "training.html.tmp."};
    for (int i = 0; i < 3; i++) {
        size_t n = strlen(starts[i]), digits = 0;
        if (strncmp(name, starts[i], n) != 0) continue;
        digits = strspn(name + n, "0123456789");
        return digits > 0 && name[n + digits] == '\0';
    }
    return false;
}

/* A killed run may have left half a file. Failing to remove it harms nobody. */
static void remove_unfinished(const char *dir)
{
    DIR *d = opendir(dir);
    if (!d) return;
    for (const struct dirent *e; (e = readdir(d)) != NULL;)
        if (is_unfinished(e->d_name)) unlinkat(dirfd(d), e->d_name, 0);
    closedir(d);
}

/* ---- metrics.jsonl --------------------------------------------------------------------------- */

/* Drops the lines of steps after `step` (of a run that was killed). *waits: the last one is that of
 * `step` itself, and has no perplexity yet. */
static srf_status keep_metrics(FILE *f, const char *path, int64_t step, bool *waits)
{
    char line[4096];
    long keep = 0;
    while (fgets(line, sizeof line, f)) {
        json_t *row = json_loads(line, 0, NULL);
        const json_t *at = json_object_get(row, "step");
        bool good = strchr(line, '\n') && json_is_integer(at) && json_integer_value(at) <= step;
        if (good) *waits = json_integer_value(at) == step && !json_object_get(row, "val_ppl");
        json_decref(row);
        if (!good) break;
        keep = ftell(f);
    }
    SRF_FAIL_IF(ferror(f) || ftruncate(fileno(f), keep) != 0 || fseek(f, keep, SEEK_SET) != 0,
                SRF_IO, "%s: cannot be continued: %s", path, strerror(errno));
    return SRF_OK;
}

/* Its lock is the folder's: two runs at once would remove each other's unfinished files. Changes
 * nothing yet. */
static srf_status open_metrics(const char *path, FILE **out)
{
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    *out = fd >= 0 ? fdopen(fd, "r+") : NULL;
    if (!*out && fd >= 0) close(fd);
    SRF_FAIL_IF(!*out, SRF_IO, "%s: cannot write: %s", path, strerror(errno));
    srf_status st = srf__file_lock(fd, path);
    if (st == SRF_OK) return SRF_OK;
    fclose(*out);
    *out = NULL;
    return st;
}

/* JSON has no NaN: a non-finite number is logged as null. */
static void put_number(FILE *f, const char *key, double x)
{
    if (isfinite(x))
        fprintf(f, ", \"%s\": %.9g", key, x);
    else
        fprintf(f, ", \"%s\": null", key);
}

static srf_status log_step(FILE *f, const struct srf_train_metrics *m, const struct srf_trainer *t)
{
    fprintf(f, "{\"step\": %lld, \"tokens\": %lld", (long long)m->step, (long long)m->tokens);
    put_number(f, "loss", m->loss);
    /* Nothing of what no weight asked to measure: 0 would be a result. */
    if (srf_policy_kl(&t->config, m->step - 1) > 0) put_number(f, "kl", m->kl);
    if (srf_policy_mse(&t->config, m->step - 1) > 0) put_number(f, "attention_mse", m->mse);
    put_number(f, "lr", m->lr);
    put_number(f, "grad_norm", m->grad_norm);
    put_number(f, "tokens_per_s", m->tokens_per_s);
    if (t->model->attention.kind == SRF_ATTN_SRF)
        fprintf(f, ", \"draw\": %llu", (unsigned long long)m->draw);
    if (m->skipped) fprintf(f, ", \"skipped\": true");
    if (m->n_skipped > 0) fprintf(f, ", \"steps_skipped\": %lld", (long long)m->n_skipped);
    fprintf(f, "}\n");
    SRF_FAIL_IF(fflush(f) != 0, SRF_IO, "metrics.jsonl: cannot write: %s", strerror(errno));
    return SRF_OK;
}

/* Evaluates, and adds the result to the newest line of the log, over its "}\n", in one write. */
static srf_status evaluate(struct srf_trainer *t, FILE *f, const struct srf_run_hooks *hooks,
                           double *ppl)
{
    SRF_TRY(srf_trainer_evaluate(t, hooks, ppl));
    if (fseek(f, -2, SEEK_END) != 0) return SRF_OK; /* an empty log: of someone who deleted it */
    put_number(f, "val_ppl", *ppl);
    if (t->teacher_ppl > 0) put_number(f, "teacher_val_ppl", t->teacher_ppl);
    fprintf(f, "}\n");
    SRF_FAIL_IF(fflush(f) != 0, SRF_IO, "metrics.jsonl: cannot write: %s", strerror(errno));
    return SRF_OK;
}

/* ---- the loop -------------------------------------------------------------------------------- */

/* One step and what follows it. What was learned is safe before anything else can go wrong: an
 * evaluation comes after the save, and its result is made up for by a resume (see below). */
static srf_status step_and_save(struct srf_trainer *t, const struct paths *p, FILE *log,
                                const struct srf_run_hooks *hooks, double *val_ppl)
{
    const struct srf_train_config *c = &t->config;
    struct srf_train_metrics m;
    double ppl = 0;
    SRF_TRY(srf_trainer_step(t, &m));
    bool evaluates = t->val && srf__due(m.step, c->eval_every, c->steps);
    bool last = m.step == c->steps;
    bool stop = hooks->stop && hooks->stop(hooks->user);
    if (srf__due(m.step, c->log_every, c->steps) || evaluates || m.skipped)
        SRF_TRY(log_step(log, &m, t));
    if (stop || srf__due(m.step, c->save_every, c->steps)) SRF_TRY(srf_trainer_save(t, p->last));
    if (last) SRF_TRY(srf_trainer_save_model(t, p->model));
    if (evaluates && (last || !stop)) SRF_TRY(evaluate(t, log, hooks, &ppl));
    if (ppl > 0) *val_ppl = ppl;
    if (hooks->step) hooks->step(hooks->user, &m, ppl);
    SRF_FAIL_IF(stop && !last, SRF_INTERRUPTED, "interrupted after step %lld of %lld; saved in %s",
                (long long)m.step, (long long)c->steps, p->last);
    return SRF_OK;
}

/* Before the first step: a new run is saved at once, so that there is always something to resume.
 * A resumed one makes up for what the last step had still to do. */
static srf_status start(struct srf_trainer *t, const struct paths *p, FILE *log,
                        const struct srf_run_hooks *hooks, bool waits, double *val_ppl)
{
    const struct srf_train_config *c = &t->config;
    if (!t->resumed) SRF_TRY(srf_trainer_save(t, p->last));
    if (t->val && t->teacher) SRF_TRY(srf_trainer_evaluate_teacher(t, hooks));
    if (!t->resumed) return SRF_OK;
    bool done = t->step == c->steps;
    if (done) SRF_TRY(srf_trainer_save_model(t, p->model));
    if (!t->val || t->step == 0 || !srf__due(t->step, c->eval_every, c->steps)) return SRF_OK;
    if (waits) return evaluate(t, log, hooks, val_ppl);
    return done ? srf_trainer_evaluate(t, hooks, val_ppl) : SRF_OK;
}

srf_status srf_trainer_run(struct srf_trainer *t, const char *dir,
                           const struct srf_run_hooks *hooks, double *val_ppl)
{
    struct paths p;
    FILE *log;
    bool waits = false;
    srf_status st = SRF_OK;
    *val_ppl = 0;
    SRF_TRY(set_paths(dir, &p));
    if (!t->resumed) SRF_TRY(srf_run_check_new(dir));
    SRF_TRY(srf_make_dir(dir));
    SRF_TRY(open_metrics(p.metrics, &log));
    if (!t->resumed) st = srf_run_check_new(dir); /* one that has just ended */
    if (st == SRF_OK) remove_unfinished(dir);
    if (st == SRF_OK) st = keep_metrics(log, p.metrics, t->step, &waits);
    if (st == SRF_OK) st = start(t, &p, log, hooks, waits, val_ppl);
    while (st == SRF_OK && t->step < t->config.steps)
        st = step_and_save(t, &p, log, hooks, val_ppl);
    fclose(log);
    return st;
}
