/* What a training run does at each step: learning rate, redraws, distillation. Pure functions. */
#pragma once
#include "model/model.h"

struct srf_train_config {
    int64_t steps;       /* optimizer steps of the whole run */
    int64_t batch;       /* sequences a step */
    int64_t micro_batch; /* sequences at once; divides batch */
    int64_t seq_len;
    uint64_t seed; /* of the data order and, for SRF, of the draws */

    double lr, min_lr; /* peak and final learning rate: linear warm-up, then a cosine */
    int64_t warmup;    /* steps */
    double beta1, beta2, eps, weight_decay;
    double clip; /* global gradient norm; 0 = off */

    int64_t recompute; /* enum srf_recompute: activations that backward recomputes */

    int64_t redraw_every; /* optimizer steps between draws; 0 = never */
    double freeze_at;     /* fraction of the run after which the draw is kept, 0 to 1 */
    bool train_features;  /* once frozen, W is trained as well */
    double rest_lr;       /* learning rate of all but attention, times lr; 0 = not trained */
    int64_t lora;         /* rank of additions to the matrices of attention, the only weights that
                           * are trained then (train/lora.c); 0 = the weights are trained */
    double features_lr;   /* peak learning rate of trained features; 0 = that of the weights */

    double ce_weight;      /* cross entropy with the data */
    double kl_weight;      /* KL(teacher || student) of the next token */
    double kl_from, kl_to; /* fractions of the run in which it applies */
    double mse_weight;     /* mean squared error of every layer's attention output */
    double mse_from, mse_to;

    int64_t log_every, eval_every, save_every; /* steps; 0 = only at the end */
    int64_t eval_tokens;                       /* most tokens of an evaluation; 0 = all */
};

/* Defaults for training from scratch and for a retrofit; seq_len is left at 0. */
struct srf_train_config srf_train_defaults(void);
/* SRF_INVALID naming the setting. */
srf_status srf_train_config_check(const struct srf_train_config *c);
/* JSON object text for files (caller srf__free()s), and back; unknown keys are refused. */
srf_status srf_train_config_to_json(const struct srf_train_config *c, char **text);
srf_status srf_train_config_from_json(const char *text, struct srf_train_config *out);

/* For steps 0 to steps - 1. */
double srf_policy_lr(const struct srf_train_config *c, int64_t step);
/* On the same schedule; 0 if lr is 0. */
double srf_policy_features_lr(const struct srf_train_config *c, int64_t step);
/* Offset from the index of the first draw; constant after the freeze. */
uint64_t srf_policy_draw(const struct srf_train_config *c, int64_t step);
bool srf_policy_frozen(const struct srf_train_config *c, int64_t step);
double srf_policy_kl(const struct srf_train_config *c, int64_t step);
double srf_policy_mse(const struct srf_train_config *c, int64_t step);
enum srf_trained srf_policy_trained(const struct srf_train_config *c);
bool srf_policy_needs_teacher(const struct srf_train_config *c);
