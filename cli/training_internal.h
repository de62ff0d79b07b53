/* What the files of srf train and srf retrofit share: training_options.c reads the command line,
 * training.c makes the run and runs it, training_report.c says what there is to say of it. */
#pragma once
#include "cli/training.h"
#include "data/bpe.h"
#include "data/tokenset.h"

/* The command line. */
struct training_inputs {
    const char *model, *init, *tokenizer, *data, *val, *out, *teacher, *recompute, *recipe;
    bool resume, quiet, json, fit;
    /* on the command line, not by the recipe */
    bool calibrate_given, features_given, features_lr_given, plan_given;
    int64_t calibrate, best_of, plan_windows, state_budget;
    double min_lr;
    int64_t seq_len, micro_batch, warmup; /* CLI_NONE: not given */
    struct cli_device device;
    struct cli_attention attention;
    struct srf_train_config config;
};

/* Everything a run holds. */
struct training_run {
    struct srf_ctx *ctx;
    struct srf_checkpoint *ck, *teacher;
    struct srf_bpe *bpe, *val_bpe;
    struct srf_tokenset *data, *val;
    struct srf_trainer *trainer;
};

/* Its progress, as the hooks of srf_trainer_run know it. */
struct training_report {
    struct cli_progress progress, evaluation;
    struct srf_trainer *trainer;
    const struct srf_train_config *config;
    double loss;                    /* smoothed */
    double grad_norm, tokens_per_s; /* newest known */
    int64_t first_step;
    bool stepped; /* since the start of the run, or its resume */
};

/* The exit code. */
int training_run(const struct cli_training *defaults, struct training_inputs *in);

/* Hooks of srf_trainer_run; user: a struct training_report. */
void training_on_step(void *user, const struct srf_train_metrics *m, double val_ppl);
void training_on_evaluating(void *user, int64_t done, int64_t total);

void training_print_start(const struct cli_training *d, const struct training_inputs *in,
                          struct training_run *r);
/* What a user should know even where progress is not wanted. */
void training_print_warnings(struct training_run *r);
/* The command that goes on with this run, on the same device. */
void training_print_resume(const struct cli_training *defaults, const struct training_inputs *in);
/* What the run came to. A resumed one that had nothing left to do has no loss. */
void training_print_result(const struct cli_training *defaults, const struct training_inputs *in,
                           const struct training_report *p, double val_ppl, double seconds);
/* After a retrofit: what to look at, and what to make of it. */
void training_print_next(const struct training_inputs *in, const struct training_run *r);
