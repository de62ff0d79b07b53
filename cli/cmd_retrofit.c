#include "cli/training.h"

#include <string.h>

/* The value of the last --recipe, which says where all other options begin. */
static const char *recipe_of(int argc, char **argv, const char *standard)
{
    const char *name = standard, *option = "--recipe";
    size_t n = strlen(option);
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], option) == 0 && i + 1 < argc) name = argv[i + 1];
        if (strncmp(argv[i], option, n) == 0 && argv[i][n] == '=') name = argv[i] + n + 1;
    }
    return name;
}

int cmd_retrofit(int argc, char **argv)
{
    int64_t n;
    const struct srf_recipe *all = srf_recipes(&n);
    const char *name = recipe_of(argc, argv, all->name);
    const struct srf_recipe *recipe = srf_recipe_find(name);
    char about[1200], names[200] = "";
    int length = snprintf(about, sizeof about, "%s",
                          "Swap softmax attention for SRF attention and fine-tune: the main job, "
                          "taught\nby the softmax model it came from. Writes DIR/metrics.jsonl, "
                          "DIR/last.h5 (to\nresume from), DIR/model.h5 and DIR/training.html (its "
                          "curves).\nRecipes, which other options change:\n");
    for (int64_t i = 0; i < n; i++) {
        length += snprintf(about + length, sizeof about - (size_t)length, "\n  %-10s%s",
                           all[i].name, all[i].about);
        snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", i ? ", " : "",
                 all[i].name);
    }
    if (!recipe) return cli_usage_error("--recipe %s: expected one of %s", name, names);
    struct cli_training defaults = {
        .name = "retrofit",
        .usage = "srf retrofit --model M.h5 --data D.h5 --out DIR [options]",
        .about = about,
        .config = srf_train_defaults(),
        .recipe = recipe,
        .attention = srf_attention_default(),
    };
    srf_recipe_apply(recipe, &defaults.config, &defaults.attention);
    return cli_training(argc, argv, &defaults);
}
