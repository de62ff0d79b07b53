/* srf train and srf retrofit are one command with two sets of defaults. */
#pragma once
#include "cli/common.h"
#include "train/recipe.h"
#include "train/trainer.h"

struct cli_training {
    const char *name, *usage, *about;
    struct srf_train_config config;
    const struct srf_recipe *recipe; /* retrofit: its defaults are from it; train: NULL */
    struct srf_attention_config attention;
};

int cli_training(int argc, char **argv, const struct cli_training *defaults);
