/* The training loop: steps, evaluation, metrics, checkpoints, resume.
 *
 * A run lives in a directory: metrics.jsonl (one object a logged step), last.h5 (kind training: all
 * that a resume needs, replaced atomically), model.h5 (kind weights, written at the end). A resumed
 * run continues bit-exactly on the same machine and thread count, since data order and draws are
 * functions of (seed, step).
 */
#pragma once
#include "data/tokenset.h"
#include "model/model.h"
#include "train/policy.h"

struct srf_trainer; /* opaque */

struct srf_train_metrics {
    int64_t step;   /* 1 = after the first */
    int64_t tokens; /* predictions so far */
    double lr;
    uint64_t draw;
    /* These need the device to finish: they are known for the steps that are logged, evaluated or
     * saved and for the last one, else 0. */
    bool known;
    double loss;    /* mean cross entropy of the step's predictions */
    double kl, mse; /* mean, where distilling; else 0 */
    double grad_norm;
    double tokens_per_s; /* since the last step for which this was known */
    bool skipped;        /* non-finite gradient: nothing was updated */
    int64_t n_skipped;   /* steps skipped since the last step for which this was known */
};

/* Plans and allocates everything. ck: the start, with the attention to train. teacher: for
 * distillation, of the same architecture in every size and with the same tokenizer; required if the
 * config distils, else NULL. The data sets stay the caller's and must outlive the trainer; val may
 * be NULL. */
srf_status srf_trainer_create(struct srf_ctx *ctx, const struct srf_checkpoint *ck,
                              const struct srf_checkpoint *teacher,
                              const struct srf_train_config *config, struct srf_tokenset *data,
                              struct srf_tokenset *val, struct srf_trainer **out);
/* What srf_trainer_create would refuse, but for memory: to be asked before long preparations. */
srf_status srf_trainer_check(const struct srf_checkpoint *ck, const struct srf_checkpoint *teacher,
                             const struct srf_train_config *config, const struct srf_tokenset *data,
                             const struct srf_tokenset *val);
/* From last.h5 of an earlier run, teacher and settings included. SRF_MISMATCH if the training data
 * or the context's dtype are not those of the run. */
srf_status srf_trainer_resume(struct srf_ctx *ctx, const char *path, struct srf_tokenset *data,
                              struct srf_tokenset *val, struct srf_trainer **out);
/* The dtype (srf_dtype_name) of the run whose last.h5 that is; caller srf__free()s. */
srf_status srf_trainer_file_dtype(const char *path, char **dtype);
void srf_trainer_free(struct srf_trainer *t); /* NULL is fine */

/* One optimizer step. SRF_NONFINITE after too many skipped steps in a row, at the next step whose
 * metrics are known. */
srf_status srf_trainer_step(struct srf_trainer *t, struct srf_train_metrics *out);
struct srf_run_hooks; /* below */
/* Perplexity of the present model on the validation set. SRF_INVALID without one. hooks: for
 * `evaluating`, or NULL. */
srf_status srf_trainer_evaluate(struct srf_trainer *t, const struct srf_run_hooks *hooks,
                                double *ppl);
/* The same of the teacher, which does not change: once a run. SRF_INVALID without one. */
srf_status srf_trainer_evaluate_teacher(struct srf_trainer *t, const struct srf_run_hooks *hooks);
/* Its result; 0 before. */
double srf_trainer_teacher_ppl(const struct srf_trainer *t);
/* All that a resume needs. */
srf_status srf_trainer_save(struct srf_trainer *t, const char *path);
/* The model alone, attention and features included. */
srf_status srf_trainer_save_model(struct srf_trainer *t, const char *path);

int64_t srf_trainer_steps_done(const struct srf_trainer *t);
/* How many numbers the optimizer trains: parameters or their low-rank factors, and features. */
int64_t srf_trainer_trained(const struct srf_trainer *t);
/* CPU threads before a resume (another number changes rounding); 0 for a new run. */
int64_t srf_trainer_resumed_threads(const struct srf_trainer *t);
const struct srf_train_config *srf_trainer_config(const struct srf_trainer *t);
struct srf_model *srf_trainer_model(struct srf_trainer *t);
/* "weights 8.8 MB, gradients 8.8 MB, ..." and the sum of it, in bytes. */
void srf_trainer_describe_memory(const struct srf_trainer *t, char *buf, size_t size);
size_t srf_trainer_memory(const struct srf_trainer *t);
/* The minimum of work of a step, without teacher and draw. */
struct srf_cost srf_trainer_step_cost(const struct srf_trainer *t);

/* The loop around it. */
struct srf_run_hooks {
    void *user;
    /* After every step: may be NULL. val_ppl is 0 where the step had no evaluation. */
    void (*step)(void *user, const struct srf_train_metrics *m, double val_ppl);
    /* When an evaluation begins (0 of 0), and in it (tokens). May be NULL. */
    void (*evaluating)(void *user, int64_t done, int64_t total);
    /* Asked after every step: true saves and returns SRF_INTERRUPTED. May be NULL. */
    bool (*stop)(void *user);
};
/* SRF_INVALID if directory dir holds the checkpoints of an earlier run, SRF_IO if it is a file. */
srf_status srf_run_check_new(const char *dir);
/* Run to the end in directory dir (made if need be; one with an earlier run is for a resumed
 * trainer only). Saved before the first step, then as the settings say. With a validation set a
 * teacher is evaluated before the first step. *val_ppl: the last evaluation of the model, 0 without
 * a validation set. */
srf_status srf_trainer_run(struct srf_trainer *t, const char *dir,
                           const struct srf_run_hooks *hooks, double *val_ppl);
