/* The command line of srf train and srf retrofit. */
#include "cli/training_internal.h"

#include <math.h>
#include <string.h>

/* What windows are planned on where a budget is all that is said. */
#define PLAN_TOKENS 16384
/* Low-rank additions want more than weights (train/RECIPES.md). */
#define LORA_LR 3e-3

enum { MAX_OPTIONS = 80, HELP_SIZE = 160 };

/* Settings say their default in --help: the value that they have before the command line is
 * read. */
static void say_defaults(struct cli_option *options, const struct training_inputs *in,
                         char help[MAX_OPTIONS][HELP_SIZE])
{
    uintptr_t first = (uintptr_t)&in->config, end = first + sizeof in->config;
    for (struct cli_option *o = options; o->name; o++, help++) {
        uintptr_t at = (uintptr_t)o->dest;
        if (at < first || at >= end || o->type == CLI_FLAG) continue;
        double value = o->type == CLI_DOUBLE ? *(double *)o->dest
                       : o->type == CLI_INT  ? (double)*(int64_t *)o->dest
                                             : (double)*(uint64_t *)o->dest;
        snprintf(*help, HELP_SIZE, "%s (%.12g)", o->help, value);
        o->help = *help;
    }
}

/* What a recipe puts in, where the options speak of it. */
static void say_recipe(struct cli_option *options, const struct srf_recipe *r,
                       char help[MAX_OPTIONS][HELP_SIZE])
{
    for (struct cli_option *o = options; o->name; o++, help++) {
        if (strcmp(o->name, "attention") == 0)
            snprintf(*help, HELP_SIZE, "%s (srf)", CLI_ATTENTION_KINDS);
        else if (strcmp(o->name, "m") == 0)
            snprintf(*help, HELP_SIZE, "random features per head (%lld)", (long long)r->m);
        else if (strcmp(o->name, "window") == 0)
            snprintf(*help, HELP_SIZE, "%s (%lld)", o->help, (long long)r->window);
        else if (strcmp(o->name, "far") == 0 && r->far_none)
            snprintf(*help, HELP_SIZE, "beyond the window: srf, or none, for comparisons (none)");
        else if (strcmp(o->name, "calibrate") == 0)
            snprintf(*help, HELP_SIZE, "%s (%lld)", o->help, (long long)r->calibrate);
        else if (strcmp(o->name, "plan") == 0)
            snprintf(*help, HELP_SIZE, "%s (%lld)", o->help, (long long)r->plan_windows);
        else if (strcmp(o->name, "fit-features") == 0 && r->fit)
            snprintf(*help, HELP_SIZE, "%s (on)", o->help);
        else if (strcmp(o->name, "train-features") == 0 && r->features_lr > 0)
            snprintf(*help, HELP_SIZE, "%s (on)", o->help);
        else if (strcmp(o->name, "best-of") == 0)
            snprintf(*help, HELP_SIZE, "%s (%lld)", o->help, (long long)r->best_of);
        else
            continue;
        o->help = *help;
    }
}

/* A resumed run has its settings: what may be said again is where things are and how to run.
 * Returns the first other option given, or NULL. */
static const char *not_for_resume(const struct cli_option *options, const bool *set)
{
    static const char *const fine[] = {"data",    "val",   "out",   "resume", "device",
                                       "threads", "dtype", "quiet", "json"};
    for (const struct cli_option *o = options; o->name; o++) {
        bool ok = !set[o - options];
        for (size_t i = 0; i < sizeof fine / sizeof *fine && !ok; i++)
            ok = strcmp(o->name, fine[i]) == 0;
        if (!ok) return o->name;
    }
    return NULL;
}

/* -1: no such setting */
static int recompute_of(const char *name)
{
    static const char *const names[] = {"none", "cheap", "block"};
    for (int i = 0; i < 3; i++)
        if (strcmp(name, names[i]) == 0) return i;
    return -1;
}

static bool was_given(const struct cli_option *options, const bool *set, const char *name)
{
    for (const struct cli_option *o = options; o->name; o++)
        if (strcmp(o->name, name) == 0) return set[o - options];
    return false;
}

/* What the recipe asks for, or the command line. Features are trained where either option says
 * so. */
static void settle_recipe(struct training_inputs *in, const struct cli_option *options,
                          const bool *set)
{
    in->plan_given = was_given(options, set, "plan") || in->state_budget;
    if (in->state_budget && !was_given(options, set, "plan")) in->plan_windows = PLAN_TOKENS;
    if (in->config.lora && !was_given(options, set, "lr")) in->config.lr = LORA_LR;
    in->features_lr_given = was_given(options, set, "features-lr");
    in->features_given = was_given(options, set, "train-features") || in->features_lr_given;
    if (in->features_lr_given && !was_given(options, set, "train-features"))
        in->config.train_features = in->config.features_lr > 0;
}

/* A recipe's features of its own give way to redraws, and to no calibration, if asked for. */
static void settle_calibration(struct training_inputs *in, const struct cli_option *options,
                               const bool *set)
{
    in->calibrate_given = was_given(options, set, "calibrate");
    if (in->calibrate && !in->config.redraw_every) return;
    in->fit &= was_given(options, set, "fit-features");
    if (!was_given(options, set, "best-of")) in->best_of = 1;
}

/* 0, or the exit code of a usage error. */
static int check_usage(const struct cli_training *defaults, const struct training_inputs *in,
                       const struct cli_option *options, const bool *set)
{
    if (!in->data || !in->out) return cli_usage_error("%s needs --data and --out", defaults->name);
    if (!in->out[0]) return cli_usage_error("--out: expected a directory, found an empty name");
    const char *other = in->resume ? not_for_resume(options, set) : NULL;
    if (other)
        return cli_usage_error("--%s: a resumed run goes on as it began; start another in a new "
                               "--out to change it",
                               other);
    if (!in->resume && !in->model == !in->init)
        return cli_usage_error("%s needs one of --model, --init and --resume", defaults->name);
    if (in->tokenizer && !in->init) return cli_usage_error("--tokenizer belongs to --init");
    if (in->recompute && recompute_of(in->recompute) < 0)
        return cli_usage_error("--recompute %s: expected none, cheap or block", in->recompute);
    if ((in->fit || in->best_of > 1) && (!in->calibrate || in->config.redraw_every))
        return cli_usage_error("--fit-features and --best-of need --calibrate N, and keep their "
                               "features: --redraw-every 0");
    if (in->state_budget && !in->plan_windows)
        return cli_usage_error("--state-budget is for --plan N to spend");
    bool lists = was_given(options, set, "layer-windows") || was_given(options, set, "layer-m");
    if (lists && in->plan_given && in->plan_windows)
        return cli_usage_error("--layer-windows and --layer-m say what --plan and --state-budget "
                               "would choose: give either");
    if (in->config.lora && was_given(options, set, "rest-lr"))
        return cli_usage_error("--lora trains nothing but attention: --rest-lr means nothing");
    if (in->teacher && !srf_policy_needs_teacher(&in->config))
        return cli_usage_error("--teacher teaches nothing without --kl or --mse above 0");
    return EXIT_OK;
}

static void drop_option(struct cli_option *options, const char *name)
{
    struct cli_option *o = options;
    while (strcmp(o->name, name) != 0) o++;
    do {
        *o = o[1];
    } while ((++o)->name);
}

int cli_training(int argc, char **argv, const struct cli_training *defaults)
{
    struct training_inputs in = {.device = CLI_DEVICE_DEFAULT,
                                 .attention = CLI_ATTENTION_DEFAULT,
                                 .config = defaults->config,
                                 .min_lr = NAN,
                                 .best_of = 1,
                                 .seq_len = CLI_NONE,
                                 .micro_batch = CLI_NONE,
                                 .warmup = CLI_NONE};
    struct srf_train_config *c = &in.config;
    struct cli_option options[] = {
        CLI_HEADING_ROW("What goes in and out:"),
        {"model", 0, CLI_STRING, &in.model, "PATH", "checkpoint to start from (any format)", 0, 0},
        {"init", 0, CLI_STRING, &in.init, "CONFIG", "config.json of a model from scratch", 0, 0},
        {"tokenizer", 0, CLI_STRING, &in.tokenizer, "PATH",
         "with --init: its tokenizer.json, a directory, vocab.json, or a checkpoint", 0, 0},
        {"data", 0, CLI_STRING, &in.data, "PATH", "token set, llm.c shard, .npy of ids, or text", 0,
         0},
        {"val", 0, CLI_STRING, &in.val, "PATH", "validation data, same forms", 0, 0},
        {"out", 'o', CLI_STRING, &in.out, "DIR", "directory of the run", 0, 0},
        {"resume", 0, CLI_FLAG, &in.resume, NULL, "go on from DIR/last.h5, settings included", 0,
         0},
        {"recipe", 0, CLI_STRING, &in.recipe, "NAME",
         "what the other options begin with: planned, hybrid, pure, faithful or window (planned)",
         0, 0},
        CLI_HEADING_ROW("Steps, memory, AdamW:"),
        {"steps", 0, CLI_INT, &c->steps, "N", "optimizer steps", 1, 1e12},
        {"batch", 0, CLI_INT, &c->batch, "N", "sequences per step", 1, 1e6},
        {"micro-batch", 0, CLI_INT, &in.micro_batch, "N",
         "sequences at once; sets the memory (2048 tokens on the CPU, else 32768)", 1, 1e6},
        {"recompute", 0, CLI_STRING, &in.recompute, "WHAT",
         "made again in backward, to save memory: none, cheap (GELU), block (none)", 0, 0},
        {"seq-len", 0, CLI_INT, &in.seq_len, "N", "tokens per sequence (the model's, up to 1024)",
         1, 1 << 24},
        {"lr", 0, CLI_DOUBLE, &c->lr, "X", "peak learning rate", 0, 10},
        {"min-lr", 0, CLI_DOUBLE, &in.min_lr, "X", "learning rate at the end (lr / 10)", 0, 10},
        {"warmup", 0, CLI_INT, &in.warmup, "N", "steps of linear warm-up (50, at most a tenth)", 0,
         1e12},
        {"weight-decay", 0, CLI_DOUBLE, &c->weight_decay, "X", "decoupled weight decay", 0, 100},
        {"beta1", 0, CLI_DOUBLE, &c->beta1, "X", "AdamW", 0, 0.999999},
        {"beta2", 0, CLI_DOUBLE, &c->beta2, "X", "AdamW", 0, 0.99999999},
        {"clip", 0, CLI_DOUBLE, &c->clip, "X", "largest gradient norm; 0 = off", 0, 1e30},
        CLI_HEADING_ROW("Attention:"),
        CLI_ATTENTION_OPTIONS(in.attention),
        CLI_HEADING_ROW("Features and windows in training:"),
        {"redraw-every", 0, CLI_INT, &c->redraw_every, "N",
         "steps between draws of the features; 0 = never", 0, 1e12},
        {"freeze-at", 0, CLI_DOUBLE, &c->freeze_at, "F",
         "part of the run after which the draw stays", 0, 1},
        {"train-features", 0, CLI_FLAG, &c->train_features, NULL,
         "train the features once they are frozen", 0, 0},
        {"plan", 0, CLI_INT, &in.plan_windows, "N",
         "each layer's own window and features, by their worth on N tokens; 0 = off", 0, 1 << 24},
        {"state-budget", 0, CLI_INT, &in.state_budget, "BYTES",
         "plan them for a state of a sequence of so many bytes in fp32; 0: as without a plan", 0,
         1e15},
        {"rest-lr", 0, CLI_DOUBLE, &c->rest_lr, "X",
         "learning rate of all but attention, times --lr; 0: attention alone is trained", 0, 1e6},
        {"lora", 0, CLI_INT, &c->lora, "RANK",
         "train low-rank additions to attention's matrices, merged at the end (--lr 0.003); 0 = "
         "off",
         0, 65536},
        {"features-lr", 0, CLI_DOUBLE, &c->features_lr, "X",
         "peak learning rate of the features; 0 = not trained (with --train-features: as --lr)", 0,
         10},
        {"calibrate", 0, CLI_INT, &in.calibrate, "N",
         "re-centre and balance q and k on N tokens first, exactly for softmax; 0 = off", 0,
         1 << 24},
        {"fit-features", 0, CLI_FLAG, &in.fit, NULL,
         "with --calibrate: draw features with each direction's own variance", 0, 0},
        {"best-of", 0, CLI_INT, &in.best_of, "N",
         "with --calibrate: for each head the best of N draws", 1, 100000},
        CLI_HEADING_ROW("What is learned from:"),
        {"ce", 0, CLI_DOUBLE, &c->ce_weight, "X", "weight of the cross entropy", 0, 1e9},
        {"kl", 0, CLI_DOUBLE, &c->kl_weight, "X", "weight of KL(teacher || student) of the logits",
         0, 1e9},
        {"kl-from", 0, CLI_DOUBLE, &c->kl_from, "F", "part of the run where KL starts", 0, 1},
        {"kl-to", 0, CLI_DOUBLE, &c->kl_to, "F", "... and ends", 0, 1},
        {"mse", 0, CLI_DOUBLE, &c->mse_weight, "X",
         "weight of the attention outputs' squared error", 0, 1e9},
        {"mse-from", 0, CLI_DOUBLE, &c->mse_from, "F", "part of the run where MSE starts", 0, 1},
        {"mse-to", 0, CLI_DOUBLE, &c->mse_to, "F", "... and ends", 0, 1},
        {"teacher", 0, CLI_STRING, &in.teacher, "PATH", "teacher (the model itself, with softmax)",
         0, 0},
        CLI_HEADING_ROW("The run:"),
        {"seed", 0, CLI_U64, &c->seed, "N", "of the data order and the draws", 0, 0},
        {"log-every", 0, CLI_INT, &c->log_every, "N", "steps between lines of metrics.jsonl", 0,
         1e12},
        {"eval-every", 0, CLI_INT, &c->eval_every, "N", "steps between evaluations; 0 = at the end",
         0, 1e12},
        {"eval-tokens", 0, CLI_INT, &c->eval_tokens, "N", "most tokens of an evaluation; 0 = all",
         0, 1e15},
        {"save-every", 0, CLI_INT, &c->save_every, "N", "steps between saves; 0 = at the end", 0,
         1e12},
        CLI_DEVICE_OPTIONS(in.device),
        {"quiet", 'q', CLI_FLAG, &in.quiet, NULL, "no progress", 0, 0},
        {"json", 0, CLI_FLAG, &in.json, NULL,
         "one JSON object: model, steps, loss (a running mean of metrics.jsonl's), val_ppl and "
         "teacher_val_ppl (null without --val or a teacher), seconds",
         0, 0},
        {0}};
    if (!defaults->recipe) drop_option(options, "recipe");
    _Static_assert(sizeof options / sizeof *options <= MAX_OPTIONS, "raise MAX_OPTIONS");
    char help[MAX_OPTIONS][HELP_SIZE];
    bool set[MAX_OPTIONS] = {false};
    int code;
    say_defaults(options, &in, help);
    if (defaults->recipe) {
        in.calibrate = defaults->recipe->calibrate;
        in.fit = defaults->recipe->fit;
        in.best_of = defaults->recipe->best_of;
        in.plan_windows = defaults->recipe->plan_windows;
        say_recipe(options, defaults->recipe, help);
    }
    if (!cli_parse(argc, argv, defaults->usage, defaults->about, options, NULL, 0, 0, NULL, set,
                   &code))
        return code;
    settle_calibration(&in, options, set);
    settle_recipe(&in, options, set);
    code = check_usage(defaults, &in, options, set);
    if (code != EXIT_OK) return code;
    if (in.recompute) c->recompute = recompute_of(in.recompute);
    return training_run(defaults, &in);
}
