/* Named sets of a retrofit's settings: where its options begin. RECIPES.md has what was
 * measured. */
#pragma once
#include "train/policy.h"

struct srf_recipe {
    const char *name, *about;
    int64_t m, window;
    bool far_none;        /* a rival, for comparisons */
    int64_t redraw_every; /* as in struct srf_train_config */
    double freeze_at, ce_weight, kl_weight;
    double lr;
    double features_lr;   /* 0 = they are not trained */
    int64_t plan_windows; /* tokens, 0 = off: train/plan_windows.h */
    int64_t calibrate;    /* tokens, 0 = off; fit, best_of: train/calibrate.h */
    bool fit;
    int64_t best_of;
};

/* The table, the default first. */
const struct srf_recipe *srf_recipes(int64_t *n);
/* NULL: there is none of that name. */
const struct srf_recipe *srf_recipe_find(const char *name);
/* Its part of both settings; the rest stays. */
void srf_recipe_apply(const struct srf_recipe *r, struct srf_train_config *config,
                      struct srf_attention_config *attention);
