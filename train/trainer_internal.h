/* Inside train/: the trainer's fields, shared by the step (trainer.c, micro_batch.c), its files
 * (trainer_file.c) and the loop (run.c). */
#pragma once
#include "train/trainer.h"

/* What the ops of a micro-batch depend on, but for what is uploaded. */
struct srf__micro_batch_key {
    double kl_weight, mse_weight;
    enum srf_attention_kind attention;
    bool features_trained;
    const void *workspace;
};

/* train/lora.c; rank 0: there is none, and its functions do nothing. Flat arrays hold A (in, rank),
 * then B (rank, out), of each adapted row in the order of the table. */
struct srf__lora {
    int64_t rank, n, n_base; /* n: elements of all factors; n_base: of the adapted rows */
    int slot_ab, slot_master, slot_grads; /* T; A, where T is bf16; A */
    int slot_base;                        /* T: the adapted rows as they were before training */
    float *base;                          /* host: the same, unrounded */
};

struct srf_trainer {
    struct srf_ctx *ctx;
    struct srf_train_config config;
    struct srf_tokenset *data, *val; /* not owned; val may be NULL */
    struct srf_arena *arena;
    struct srf_model *model, *teacher; /* teacher: NULL without distillation */
    double teacher_ppl;                /* on val; 0: not known */
    char *tokenizer_json;              /* or NULL */
    struct srf__lora lora;
    int64_t n_params, n_features; /* elements under the optimizer; n_features 0 = not trained */
    /* moments of parameters, then of features; the gradient's sum of squares; adamw's u8 and i32 */
    int slot_m, slot_v, slot_sumsq, slot_no_decay, slot_skips;
    struct srf_cost update_cost; /* of the optimizer */
    int64_t step;                /* steps done */
    double clock;            /* when the first step since the last known metrics began; 0: none */
    int64_t clock_step;      /* steps done then */
    int64_t skips;           /* steps skipped, as last known; counted from this start */
    bool resumed;            /* made from a run's last.h5 */
    int64_t resumed_threads; /* what that ran on; 0 for a new run */
    char data_id[96];        /* tells training sets apart: length, tokenizer, some ids */
    uint64_t first_draw;     /* draw index of step 0 */
    int32_t *window, *tokens, *targets;
    int64_t loaded_step, loaded_first; /* whose sequences tokens and targets hold; -1: nobody's */
    void *graph;                       /* of the ops of a micro-batch, or NULL */
    struct srf__micro_batch_key graph_key; /* what it was, or is to be, recorded for */
};

/* Forward and backward of the sequences from `first` on, queued: gradients +=. The step's losses
 * are in the device's rows from srf__loss_row on. */
srf_status srf__micro_batch(struct srf_trainer *t, int64_t first);
/* Reads what the next step begins with, while the device works. */
void srf__micro_batch_ahead(struct srf_trainer *t);
void srf__micro_batch_free(struct srf_trainer *t);
/* SRF_INVALID for a rank that a matrix of the table does not have. */
srf_status srf__lora_check(const struct srf_train_config *c, const struct srf_tensor_table *table);
/* Adds its tensors to the arena, once the model has. */
srf_status srf__lora_plan(struct srf_trainer *t);
/* The weights of params (the table's), with factors that leave them as they are. */
srf_status srf__lora_begin(struct srf_trainer *t, const float *params);
/* The same of base and factors as they are. */
srf_status srf__lora_resume(struct srf_trainer *t);
void srf__lora_free(struct srf_trainer *t);
/* Factors of their own precision beside those that ops take. */
bool srf__lora_has_masters(const struct srf_trainer *t);
/* All factors as they are trained: device A (n). */
void *srf__lora_factors(const struct srf_trainer *t);
/* Factors' gradients from those of the matrices. */
srf_status srf__lora_gradients(struct srf_trainer *t);
/* The matrices of the factors as they are now. */
srf_status srf__lora_apply(struct srf_trainer *t);
/* The same, unrounded, into params (the table's) on the host. Between steps: it writes over
 * gradients. */
srf_status srf__lora_merge(struct srf_trainer *t, float *params);
/* The first of the device's rows that keep a step's losses (srf_model_keep_losses). */
int64_t srf__loss_row(const struct srf_train_config *c);
/* 1 / predictions of a step */
double srf__mean_scale(const struct srf_train_config *c);

/* Whether what is done every `every` steps (0 = at the end only) is done after `step` of `last`. */
bool srf__due(int64_t step, int64_t every, int64_t last);
