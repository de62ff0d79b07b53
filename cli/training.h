/* srf train and srf retrofit are one command with two sets of defaults. */
#pragma once
#include "cli/common.h"
#include "train/trainer.h"

struct cli_training {
    const char *name, *usage, *about;
    struct srf_train_config config;
    bool swap;                             /* retrofit: attention is srf unless said otherwise */
    struct srf_attention_config attention; /* retrofit's own defaults */
};

int cli_training(int argc, char **argv, const struct cli_training *defaults);
