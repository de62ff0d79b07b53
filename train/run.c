/* The loop around the steps: metrics log, evaluations, checkpoints. */
#include "train/trainer_internal.h"

#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define PATH_SIZE 4096

static srf_status make_dir(const char *dir)
{
    char path[PATH_SIZE];
    SRF_FAIL_IF(strlen(dir) >= sizeof path - 64, SRF_INVALID, "%s: path too long", dir);
    strcpy(path, dir);
    for (char *s = path + 1; *s; s++) {
        if (*s != '/') continue;
        *s = '\0';
        mkdir(path, 0777); /* the last mkdir says what is wrong */
        *s = '/';
    }
    struct stat info;
    SRF_FAIL_IF(mkdir(path, 0777) != 0 && errno != EEXIST, SRF_IO, "%s: cannot make it: %s", dir,
                strerror(errno));
    SRF_FAIL_IF(stat(path, &info) != 0 || !S_ISDIR(info.st_mode), SRF_IO,
                "%s: expected a directory to write the run into", dir);
    return SRF_OK;
}

/* metrics.jsonl for appending, with lines of steps after `step` (of a run that was killed) dropped:
 * *keep is where the next line goes. */
static srf_status keep_metrics(FILE *f, int64_t step, long *keep)
{
    char line[4096];
    *keep = 0;
    rewind(f);
    while (fgets(line, sizeof line, f)) {
        json_t *row = json_loads(line, 0, NULL);
        const json_t *at = json_object_get(row, "step");
        bool good = strchr(line, '\n') && json_is_integer(at) && json_integer_value(at) <= step;
        json_decref(row);
        if (!good) break;
        *keep = ftell(f);
    }
    return SRF_OK;
}

static srf_status open_metrics(const char *path, int64_t step, FILE **out)
{
    *out = fopen(path, step > 0 ? "a+" : "w");
    SRF_FAIL_IF(!*out, SRF_IO, "%s: cannot write: %s", path, strerror(errno));
    if (step == 0) return SRF_OK;
    long keep;
    srf_status st = keep_metrics(*out, step, &keep);
    if (st == SRF_OK && ftruncate(fileno(*out), keep) == 0) return SRF_OK;
    fclose(*out);
    *out = NULL;
    SRF_FAIL(SRF_IO, "%s: cannot be continued: %s", path, strerror(errno));
}

/* JSON has no NaN: a non-finite number is logged as null. */
static void put_number(FILE *f, const char *key, double x)
{
    if (isfinite(x))
        fprintf(f, ", \"%s\": %.9g", key, x);
    else
        fprintf(f, ", \"%s\": null", key);
}

static srf_status log_step(FILE *f, const struct srf_train_metrics *m, double val_ppl,
                           const struct srf_trainer *t)
{
    fprintf(f, "{\"step\": %lld, \"tokens\": %lld", (long long)m->step, (long long)m->tokens);
    put_number(f, "loss", m->loss);
    if (t->teacher) {
        put_number(f, "kl", m->kl);
        put_number(f, "attention_mse", m->mse);
    }
    put_number(f, "lr", m->lr);
    put_number(f, "grad_norm", m->grad_norm);
    put_number(f, "tokens_per_s", m->tokens_per_s);
    if (t->model->attention.kind == SRF_ATTN_SRF)
        fprintf(f, ", \"draw\": %llu", (unsigned long long)m->draw);
    if (val_ppl > 0) put_number(f, "val_ppl", val_ppl);
    if (m->skipped) fprintf(f, ", \"skipped\": true");
    fprintf(f, "}\n");
    SRF_FAIL_IF(fflush(f) != 0, SRF_IO, "metrics.jsonl: cannot write: %s", strerror(errno));
    return SRF_OK;
}

static bool due(int64_t step, int64_t every, int64_t last)
{
    return step == last || (every > 0 && step % every == 0);
}

srf_status srf_trainer_run(struct srf_trainer *t, const char *dir,
                           const struct srf_run_hooks *hooks, double *val_ppl)
{
    const struct srf_train_config *c = &t->config;
    char metrics[PATH_SIZE + 32], last[PATH_SIZE + 32], model[PATH_SIZE + 32];
    *val_ppl = 0;
    SRF_TRY(make_dir(dir));
    snprintf(metrics, sizeof metrics, "%s/metrics.jsonl", dir);
    snprintf(last, sizeof last, "%s/last.h5", dir);
    snprintf(model, sizeof model, "%s/model.h5", dir);
    FILE *log;
    SRF_TRY(open_metrics(metrics, t->step, &log));
    srf_status st = SRF_OK;
    while (t->step < c->steps) {
        struct srf_train_metrics m;
        SRF_TRY_GO(srf_trainer_step(t, &m));
        double ppl = 0;
        if (t->val && due(m.step, c->eval_every, c->steps)) {
            SRF_TRY_GO(srf_trainer_evaluate(t, &ppl));
            *val_ppl = ppl;
        }
        if (due(m.step, c->log_every, c->steps) || ppl > 0 || m.skipped)
            SRF_TRY_GO(log_step(log, &m, ppl, t));
        if (hooks->step) hooks->step(hooks->user, &m, ppl);
        bool stop = hooks->stop && hooks->stop(hooks->user);
        if (stop || due(m.step, c->save_every, c->steps)) SRF_TRY_GO(srf_trainer_save(t, last));
        if (stop && m.step < c->steps)
            SRF_FAIL_GO(SRF_INTERRUPTED, "interrupted after step %lld of %lld; saved in %s",
                        (long long)m.step, (long long)c->steps, last);
    }
    SRF_TRY_GO(srf_trainer_save_model(t, model));
cleanup:
    fclose(log);
    return st;
}
