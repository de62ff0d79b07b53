#include "train/recipe.h"

#include <string.h>

static const struct srf_recipe recipes[] = {
    {.name = "planned",
     .about =
         "a window exact, trained features beyond, each layer's own as it needs: hybrid's bytes",
     .m = 64,
     .window = 64,
     .freeze_at = 1,
     .ce_weight = 1,
     .kl_weight = 3,
     .lr = 3e-4,
     .features_lr = 0.03,
     .plan_windows = 16384,
     .best_of = 1},
    {.name = "hybrid",
     .about = "the same with a window of 64 in every layer",
     .m = 64,
     .window = 64,
     .freeze_at = 1,
     .ce_weight = 1,
     .kl_weight = 3,
     .lr = 3e-4,
     .features_lr = 0.03,
     .best_of = 1},
    {.name = "pure",
     .about = "features alone, calibrated, fitted and trained",
     .m = 64,
     .freeze_at = 1,
     .ce_weight = 1,
     .kl_weight = 10,
     .lr = 1e-3,
     .features_lr = 0.03,
     .calibrate = 16384,
     .fit = true,
     .best_of = 16},
    {.name = "faithful",
     .about = "features alone, drawn anew at every step, frozen for the last quarter",
     .m = 64,
     .redraw_every = 1,
     .freeze_at = 0.75,
     .ce_weight = 1,
     .kl_weight = 3,
     .lr = 1e-3,
     .best_of = 1},
    {.name = "window",
     .about = "a rival, for comparisons: the window of 64 and nothing beyond it",
     .m = 64,
     .window = 64,
     .far_none = true,
     .freeze_at = 1,
     .ce_weight = 1,
     .kl_weight = 3,
     .lr = 3e-4,
     .best_of = 1},
};

const struct srf_recipe *srf_recipes(int64_t *n)
{
    *n = sizeof recipes / sizeof *recipes;
    return recipes;
}

const struct srf_recipe *srf_recipe_find(const char *name)
{
    for (size_t i = 0; i < sizeof recipes / sizeof *recipes; i++)
        if (strcmp(recipes[i].name, name) == 0) return &recipes[i];
    return NULL;
}

void srf_recipe_apply(const struct srf_recipe *r, struct srf_train_config *config,
                      struct srf_attention_config *attention)
{
    attention->kind = SRF_ATTN_SRF;
    attention->m = r->m;
    attention->window = r->window;
    attention->far_none = r->far_none;
    config->redraw_every = r->redraw_every;
    config->freeze_at = r->freeze_at;
    config->ce_weight = r->ce_weight;
    config->kl_weight = r->kl_weight;
    config->lr = r->lr;
    config->features_lr = r->features_lr;
    config->train_features = r->features_lr > 0;
}
