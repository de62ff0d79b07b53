#include "cli/training.h"
#include "cli/training_page.h"
#include "train/calibrate.h"
#include "train/plan_windows.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* What windows are planned on where a budget is all that is said. */
#define PLAN_TOKENS 16384
/* Most windows that its text is long. */
#define PLAN_LENGTH 8
/* Low-rank additions want more than weights (train/RECIPES.md). */
#define LORA_LR 3e-3

struct inputs {
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

/* Everything a run holds, freed in one place. */
struct run {
    struct srf_ctx *ctx;
    struct srf_checkpoint *ck, *teacher;
    struct srf_bpe *bpe, *val_bpe;
    struct srf_tokenset *data, *val;
    struct srf_trainer *trainer;
};

static void free_run(struct run *r)
{
    srf_trainer_free(r->trainer);
    srf_tokenset_close(r->data);
    srf_tokenset_close(r->val);
    srf_bpe_free(r->bpe);
    srf_bpe_free(r->val_bpe);
    srf_checkpoint_free(r->ck);
    srf_checkpoint_free(r->teacher);
    srf_ctx_free(r->ctx);
}

/* A fresh model of a config.json, with the tokenizer it is to be used with. */
static srf_status init_model(const struct inputs *in, struct srf_checkpoint **out)
{
    char *config = NULL;
    struct srf_bpe *bpe = NULL;
    srf_status st = SRF_OK;
    SRF_TRY_GO(cli_read_text(in->init, &config));
    SRF_TRY_GO(srf_checkpoint_init(config, in->config.seed, out));
    if (!in->tokenizer) goto cleanup;
    SRF_TRY_GO(cli_load_tokenizer(in->tokenizer, &bpe));
    SRF_FAIL_GO_IF(srf_bpe_vocab_size(bpe) > (*out)->config.vocab, SRF_MISMATCH,
                   "the tokenizer has %lld tokens, the model's vocabulary %lld",
                   (long long)srf_bpe_vocab_size(bpe), (long long)(*out)->config.vocab);
    SRF_TRY_GO(srf_bpe_to_json(bpe, &(*out)->tokenizer_json));
cleanup:
    srf__free(config);
    srf_bpe_free(bpe);
    return st;
}

static srf_status open_start(const struct cli_training *defaults, struct inputs *in, struct run *r)
{
    if (in->init)
        SRF_TRY(init_model(in, &r->ck));
    else
        SRF_TRY(srf_checkpoint_load(in->model, NULL, &r->ck));
    struct srf_attention_config before = r->ck->attention;
    if (defaults->recipe && before.kind == SRF_ATTN_SOFTMAX) {
        r->ck->attention = defaults->attention;
        r->ck->attention.seed = in->config.seed;
    }
    SRF_TRY(cli_change_attention(&in->attention, r->ck));
    /* A recipe's calibration is for what softmax attention was trained with, and one draw a
     * head. */
    const struct srf_attention_config *a = &r->ck->attention;
    if (!in->calibrate_given &&
        (before.kind != SRF_ATTN_SOFTMAX || a->kind != SRF_ATTN_SRF || !a->per_head))
        in->calibrate = 0;
    /* Its plan is for one window that all layers have, and whose half is one that kernels on CUDA
     * are fast with. */
    if (!in->plan_given && (before.kind != SRF_ATTN_SOFTMAX || a->kind != SRF_ATTN_SRF ||
                            a->n_windows || a->n_layer_m || a->window == 0 || a->window % 64))
        in->plan_windows = 0;
    /* Its trained features are those of SRF attention that keeps a draw; maps always are. */
    struct srf_train_config *c = &in->config;
    if (!in->features_given && (a->kind != SRF_ATTN_SRF || a->far_none || c->redraw_every))
        c->train_features = false;
    if (!c->train_features && !in->features_lr_given) c->features_lr = 0;
    if (srf_attention_has_map(a)) c->train_features = true;
    if (!srf_policy_needs_teacher(&in->config)) return SRF_OK;
    /* The teacher: named, or the model itself as it came, with softmax. Weights that were fitted to
     * SRF attention are no good under softmax. */
    SRF_FAIL_IF(before.kind != SRF_ATTN_SOFTMAX && !in->teacher, SRF_INVALID,
                "%s already has %s attention and cannot teach itself: name its softmax original "
                "(--teacher), or train without one (--kl 0 --mse 0)",
                in->model,
                before.kind == SRF_ATTN_SRF ? "SRF" : srf_attention_kind_name(before.kind));
    const char *path = in->teacher ? in->teacher : in->model;
    SRF_FAIL_IF(!path, SRF_INVALID, "distillation from scratch needs --teacher");
    SRF_TRY(srf_checkpoint_load(path, NULL, &r->teacher));
    if (!in->teacher) r->teacher->attention.kind = SRF_ATTN_SOFTMAX;
    /* now, not after minutes of preparations */
    return srf_trainer_check_teacher(r->ck, r->teacher);
}

/* About n tokens of the training text, in windows of len spread over it; caller srf__free()s. */
static srf_status sample_text(const struct inputs *in, struct run *r, int64_t n, int64_t len,
                              int64_t *windows, int32_t **tokens)
{
    int64_t total = srf_tokenset_count(r->data), count = n / len;
    *tokens = NULL;
    if (count < 1) count = 1;
    if (count > total / len) count = total / len;
    SRF_FAIL_IF(count < 1, SRF_INVALID, "%s: %lld tokens are less than a sequence of %lld",
                in->data, (long long)total, (long long)len);
    SRF_TRY(SRF_ALLOC(*tokens, count * len));
    for (int64_t i = 0; i < count; i++)
        SRF_TRY(srf_tokenset_read(r->data, i * (total / count), len, *tokens + i * len));
    *windows = count;
    return SRF_OK;
}

static void on_preparation(void *user, int64_t done, int64_t total)
{
    cli_progress_update(user, (double)done, (double)total, "");
}

/* What is made of the model before training, from its training text. */
static srf_status calibrate(const struct inputs *in, struct run *r)
{
    struct cli_progress progress;
    struct srf_calibrate_config c = {.seq_len = in->config.seq_len,
                                     .balance = true,
                                     .fit = in->fit,
                                     .best_of = in->best_of,
                                     .progress = on_preparation,
                                     .user = &progress};
    struct srf_calibrate_result result;
    int32_t *tokens;
    srf_status st = SRF_OK;
    SRF_TRY_GO(sample_text(in, r, in->calibrate, c.seq_len, &c.windows, &tokens));
    cli_progress_start(&progress, "calibrate", in->quiet);
    st = srf_calibrate(r->ctx, r->ck, tokens, &c, &result);
    cli_progress_end(&progress);
    SRF_TRY_GO(st);
    if (!in->quiet)
        fprintf(stderr, "calibrated on %lld tokens: mean |q+k|^2/sqrt(d) from %.1f to %.1f\n",
                (long long)(c.windows * c.seq_len), result.v_before, result.v_after);
    if (!in->quiet && in->best_of > 1)
        fprintf(stderr, "best of %lld draws a head: error of attention from %.3f to %.3f\n",
                (long long)in->best_of, result.error_first, result.error_chosen);
cleanup:
    srf__free(tokens);
    return st;
}

static srf_status plan_windows(const struct inputs *in, struct run *r)
{
    struct cli_progress progress;
    struct srf_plan_windows_config c = {.seq_len = in->config.seq_len,
                                        .state_budget = in->state_budget,
                                        .features = true,
                                        .train_steps = in->config.train_features ? 60 : 0,
                                        .progress = on_preparation,
                                        .user = &progress};
    struct srf_plan_windows_result result;
    int32_t *tokens;
    srf_status st = SRF_OK;
    /* Much longer than the windows: a plan's short training tells too little of features that have
     * all that to remember. */
    int64_t most = PLAN_LENGTH * r->ck->attention.window;
    if (most > 0 && c.seq_len > most) c.seq_len = most;
    SRF_TRY_GO(sample_text(in, r, in->plan_windows, c.seq_len, &c.windows, &tokens));
    cli_progress_start(&progress, "windows and features by layer", in->quiet);
    st = srf_plan_windows(r->ctx, r->ck, tokens, &c, &result);
    cli_progress_end(&progress);
    SRF_TRY_GO(st);
    if (!in->quiet && result.measured)
        fprintf(stderr,
                "windows and features by layer, on %lld tokens: KL to softmax, layer by layer, "
                "from %.4f to %.4f; state %lld bytes a sequence\n",
                (long long)(c.windows * c.seq_len), result.before, result.after,
                (long long)result.state_bytes);
    else if (!in->quiet)
        fprintf(
            stderr,
            "windows and features by layer: nothing to choose in sequences of %lld tokens; state "
            "%lld bytes a sequence\n",
            (long long)c.seq_len, (long long)result.state_bytes);
cleanup:
    srf__free(tokens);
    return st;
}

/* The largest one below `above`, at least 1, that divides the batch. */
static int64_t smaller_micro_batch(const struct srf_train_config *c, int64_t above)
{
    int64_t n = above - 1 < 1 ? 1 : above - 1;
    while (c->batch % n) n--;
    return n;
}

/* A run goes on in the dtype it was begun in, unless another is asked for (and refused). */
static srf_status open_resumed_device(const char *last, const struct cli_device *given,
                                      struct srf_ctx **out)
{
    struct cli_device device = *given;
    char *dtype = NULL;
    const char *standard = CLI_DEVICE_DEFAULT.dtype;
    if (strcmp(device.dtype, standard) == 0 && srf_trainer_file_dtype(last, &dtype) == SRF_OK)
        device.dtype = dtype;
    srf_status st = cli_open_device(&device, out);
    srf__free(dtype);
    return st;
}

static srf_status open_run(const struct cli_training *defaults, struct inputs *in, struct run *r)
{
    char last[4096];
    if (in->resume) {
        snprintf(last, sizeof last, "%s/last.h5", in->out);
        SRF_TRY(srf_checkpoint_load(last, NULL, &r->ck));
        SRF_TRY(open_resumed_device(last, &in->device, &r->ctx));
    } else {
        SRF_TRY(srf_run_check_new(in->out));
        SRF_TRY(cli_check_output_dir(in->out));
        SRF_TRY(cli_open_device(&in->device, &r->ctx));
        SRF_TRY(open_start(defaults, in, r));
    }
    SRF_TRY(cli_open_data(in->data, r->ck, &r->bpe, &r->data));
    if (in->val) SRF_TRY(cli_open_data(in->val, r->ck, &r->val_bpe, &r->val));
    if (in->resume) return srf_trainer_resume(r->ctx, last, r->data, r->val, &r->trainer);
    struct srf_train_config *c = &in->config;
    if (in->seq_len != CLI_NONE)
        c->seq_len = in->seq_len;
    else
        c->seq_len = r->ck->config.n_pos < 1024 ? r->ck->config.n_pos : 1024;
    if (in->plan_windows) SRF_TRY(plan_windows(in, r));
    if (in->calibrate) SRF_TRY(calibrate(in, r));
    if (in->micro_batch != CLI_NONE) {
        c->micro_batch = in->micro_batch;
    } else {
        /* About 2048 tokens on the CPU: large enough for the matrix products, small enough for the
         * caches. */
        c->micro_batch = cli_tokens_at_once(r->ctx, 2048) / c->seq_len;
        c->micro_batch = c->micro_batch > c->batch ? c->batch : c->micro_batch;
        c->micro_batch = smaller_micro_batch(c, c->micro_batch + 1);
    }
    c->warmup = in->warmup;
    if (in->warmup == CLI_NONE) c->warmup = c->steps < 500 ? c->steps / 10 : 50;
    c->min_lr = isnan(in->min_lr) ? c->lr / 10 : in->min_lr;
    srf_status st;
    while ((st = srf_trainer_create(r->ctx, r->ck, r->teacher, c, r->data, r->val, &r->trainer)) ==
               SRF_NOMEM &&
           in->micro_batch == CLI_NONE && c->micro_batch > 1)
        c->micro_batch = smaller_micro_batch(c, c->micro_batch);
    return st;
}

/* ---- progress ------------------------------------------------------------------------------ */

struct report {
    struct cli_progress progress, evaluation;
    const struct srf_train_config *config;
    double loss;                    /* smoothed */
    double grad_norm, tokens_per_s; /* newest known */
    int64_t first_step;
};

static void on_step(void *user, const struct srf_train_metrics *m, double val_ppl)
{
    struct report *p = user;
    if (m->known) {
        if (isfinite(m->loss)) p->loss = p->loss > 0 ? 0.9 * p->loss + 0.1 * m->loss : m->loss;
        p->grad_norm = m->grad_norm;
        p->tokens_per_s = m->tokens_per_s;
    }
    char note[160];
    snprintf(note, sizeof note, "step %lld/%lld  loss %.4f  grad %.2f  %.0f tokens/s",
             (long long)m->step, (long long)p->config->steps, p->loss, p->grad_norm,
             p->tokens_per_s);
    cli_progress_update(&p->progress, (double)(m->step - p->first_step),
                        (double)(p->config->steps - p->first_step), note);
    if (m->n_skipped > 0 && !p->progress.quiet) {
        cli_progress_end(&p->progress);
        fprintf(stderr,
                "srf: up to step %lld: %lld step%s with a loss or gradient that was not "
                "finite: nothing updated in %s\n",
                (long long)m->step, (long long)m->n_skipped, m->n_skipped > 1 ? "s" : "",
                m->n_skipped > 1 ? "them" : "it");
    }
    if (val_ppl > 0 && !p->progress.quiet) {
        cli_progress_end(&p->progress);
        fprintf(stderr, "step %lld: loss %.4f, validation perplexity %.3f\n", (long long)m->step,
                p->loss, val_ppl);
    }
}

static void on_evaluating(void *user, int64_t done, int64_t total)
{
    struct report *p = user;
    if (total == 0) cli_progress_start(&p->evaluation, "evaluate", p->progress.quiet);
    cli_progress_update(&p->evaluation, (double)done, (double)total, "");
}

static bool on_stop(void *user)
{
    (void)user;
    return cli_interrupted();
}

static void print_start(const struct cli_training *d, const struct inputs *in, struct run *r)
{
    const struct srf_train_config *c = srf_trainer_config(r->trainer);
    struct srf_model *m = srf_trainer_model(r->trainer);
    char attention[200], memory[400];
    srf_attention_describe(&m->attention, attention, sizeof attention);
    srf_trainer_describe_memory(r->trainer, memory, sizeof memory);
    fprintf(stderr, "%s: %.1fM parameters, attention %s\n", d->name, (double)m->table.count * 1e-6,
            attention);
    if (srf_policy_trained(c) != SRF_TRAINED_ALL)
        fprintf(stderr, "trained: %s, %.2fM numbers\n",
                c->lora ? "low-rank additions to attention" : "attention",
                (double)srf_trainer_trained(r->trainer) * 1e-6);
    fprintf(stderr, "%lld steps of %lld x %lld tokens (%lld at once) on %s, %d threads, %s; %s\n",
            (long long)c->steps, (long long)c->batch, (long long)c->seq_len,
            (long long)c->micro_batch, r->ctx->be->name, r->ctx->n_threads,
            srf_dtype_name(r->ctx->dtype), memory);
    int64_t done = srf_trainer_steps_done(r->trainer);
    if (in->resume)
        fprintf(stderr, "resumed after step %lld from %s/last.h5; ", (long long)done, in->out);
    fprintf(stderr, "%lld tokens to go\n", (long long)((c->steps - done) * c->batch * c->seq_len));
}

/* What a user should know even where progress is not wanted. */
static void print_warnings(struct run *r)
{
    const struct srf_attention_config *a = &srf_trainer_model(r->trainer)->attention;
    int64_t len = srf_trainer_config(r->trainer)->seq_len;
    int64_t threads = srf_trainer_resumed_threads(r->trainer);
    int64_t window = a->window;
    for (int64_t i = 0; i < a->n_windows; i++)
        if (a->windows[i] < window) window = a->windows[i];
    if (srf_attention_has_features(a) && window > 0 && 2 * window >= len)
        fprintf(
            stderr,
            "srf: warning: window %lld attends exactly to all of a sequence of %lld tokens: the "
            "features are not trained for; try --window %lld\n",
            (long long)window, (long long)len, (long long)len / 8);
    char why[100];
    if (a->kind == SRF_ATTN_SRF && strcmp(r->ctx->be->name, "cuda") == 0 &&
        cli_slow_prefill(a, &srf_trainer_model(r->trainer)->config, why, sizeof why))
        fprintf(stderr, "srf: note: prefill of this model will go token by token on CUDA: %s\n",
                why);
    if (threads && threads != r->ctx->n_threads)
        fprintf(stderr,
                "srf: note: resumed on %d threads, begun on %lld: equal up to rounding, not "
                "bit for bit\n",
                r->ctx->n_threads, (long long)threads);
}

/* For a shell: as it is, or in single quotes. */
static void print_word(FILE *to, const char *text)
{
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
                                "_-./,:@%+=";
    if (text[0] && strspn(text, plain) == strlen(text)) {
        fputs(text, to);
        return;
    }
    fputc('\'', to);
    for (const char *s = text; *s; s++)
        if (*s == '\'')
            fputs("'\\''", to);
        else
            fputc(*s, to);
    fputc('\'', to);
}

/* The command that goes on with this run, on the same device. */
static void print_resume(const struct cli_training *defaults, const struct inputs *in)
{
    char threads[24] = "";
    if (in->device.threads > 0)
        snprintf(threads, sizeof threads, "%lld", (long long)in->device.threads);
    const struct cli_device standard = CLI_DEVICE_DEFAULT;
    const struct {
        const char *option, *value;
    } words[] = {
        {"--data", in->data},
        {"--val", in->val},
        {"--out", in->out},
        {"--threads", threads[0] ? threads : NULL},
        {"--dtype", strcmp(in->device.dtype, standard.dtype) ? in->device.dtype : NULL},
        {"--device", strcmp(in->device.device, standard.device) ? in->device.device : NULL},
    };
    fprintf(stderr, "srf: go on with: srf %s --resume", defaults->name);
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        if (!words[i].value) continue;
        fprintf(stderr, " %s ", words[i].option);
        print_word(stderr, words[i].value);
    }
    fputc('\n', stderr);
}

/* What the run came to. A resumed one that had nothing left to do has no loss. */
static void print_result(const struct cli_training *defaults, const struct inputs *in,
                         const struct report *p, double val_ppl, double seconds)
{
    int64_t steps = p->config->steps;
    bool idle = p->first_step == steps;
    if (in->json) {
        char path[4200];
        int n = snprintf(path, sizeof path, "%s/model.h5", in->out);
        printf("{\"model\": ");
        cli_json_string(stdout, path, (size_t)n);
        printf(", \"steps\": %lld, \"loss\": ", (long long)steps);
        cli_json_number(stdout, p->loss > 0 ? p->loss : NAN);
        printf(", \"val_ppl\": ");
        cli_json_number(stdout, val_ppl > 0 ? val_ppl : NAN);
        printf(", \"seconds\": %.3f}\n", seconds);
        return;
    }
    if (idle)
        printf("%s: all %lld steps were done before", defaults->name, (long long)steps);
    else
        printf("%s: %lld step%s in %.1f s, loss %.4f", defaults->name,
               (long long)(steps - p->first_step), steps - p->first_step == 1 ? "" : "s", seconds,
               p->loss);
    if (val_ppl > 0) printf(", validation perplexity %.3f", val_ppl);
    printf("; model in %s/model.h5, curves in %s/training.html\n", in->out, in->out);
}

/* After a retrofit: what to look at, and what to make of it. */
static void print_next(const struct inputs *in, const struct run *r)
{
    if (in->json || in->quiet || srf_trainer_model(r->trainer)->attention.kind != SRF_ATTN_SRF)
        return;
    const char *teacher = in->teacher ? in->teacher : in->model;
    fputs("srf: where it differs from softmax: srf validate --model ", stderr);
    print_word(stderr, in->out);
    fputs("/model.h5", stderr);
    if (teacher) {
        fputs(" --teacher ", stderr);
        print_word(stderr, teacher);
    }
    fputs(" --data ", stderr);
    print_word(stderr, in->val ? in->val : in->data);
    fputs(" --out DIR\nsrf: to write with it: srf export ", stderr);
    print_word(stderr, in->out);
    fputs("/model.h5 OUT.h5 --format recurrent && srf generate --model OUT.h5\n", stderr);
}

static int run(const struct cli_training *defaults, struct inputs *in)
{
    struct run r = {0};
    srf_status st = open_run(defaults, in, &r);
    if (st != SRF_OK) {
        free_run(&r);
        return cli_fail();
    }
    if (!in->quiet) print_start(defaults, in, &r);
    print_warnings(&r);
    struct report report = {.config = srf_trainer_config(r.trainer),
                            .first_step = srf_trainer_steps_done(r.trainer)};
    cli_progress_start(&report.progress, defaults->name, in->quiet);
    cli_catch_signals("\nsrf: finishing the step, then saving; again: stops at once\n");
    double start = cli_now(), val_ppl = 0;
    struct srf_run_hooks hooks = {
        .user = &report, .step = on_step, .evaluating = on_evaluating, .stop = on_stop};
    st = srf_trainer_run(r.trainer, in->out, &hooks, &val_ppl);
    cli_progress_end(&report.progress);
    int code = EXIT_OK;
    if (st == SRF_INTERRUPTED) {
        fprintf(stderr, "srf: %s\n", srf_error_message());
        print_resume(defaults, in);
        code = EXIT_FAILED;
    } else if (st != SRF_OK) {
        code = cli_fail();
    } else {
        print_result(defaults, in, &report, val_ppl, cli_now() - start);
        if (defaults->recipe) print_next(in, &r);
    }
    /* The model is what counts: a page that cannot be written fails nothing. */
    bool draw = st == SRF_OK || st == SRF_INTERRUPTED;
    if (draw && training_page(defaults->name, in->out) != SRF_OK)
        fprintf(stderr, "srf: warning: %s\n", srf_error_message());
    free_run(&r);
    return code;
}

/* ---- options ------------------------------------------------------------------------------- */

enum { MAX_OPTIONS = 80, HELP_SIZE = 160 };

/* Settings say their default in --help: the value that they have before the command line is
 * read. */
static void say_defaults(struct cli_option *options, const struct inputs *in,
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
            snprintf(*help, HELP_SIZE, "random features a head (%lld)", (long long)r->m);
        else if (strcmp(o->name, "window") == 0)
            snprintf(*help, HELP_SIZE, "%s (%lld)", o->help, (long long)r->window);
        else if (strcmp(o->name, "far") == 0 && r->far_none)
            snprintf(*help, HELP_SIZE, "beyond the window: srf, or none, for comparisons (none)");
        else if (strcmp(o->name, "calibrate") == 0)
            snprintf(*help, HELP_SIZE, "%s (%lld)", o->help, (long long)r->calibrate);
        else if (strcmp(o->name, "plan-windows") == 0)
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
static void settle_recipe(struct inputs *in, const struct cli_option *options, const bool *set)
{
    in->plan_given = was_given(options, set, "plan-windows") || in->state_budget;
    if (in->state_budget && !was_given(options, set, "plan-windows"))
        in->plan_windows = PLAN_TOKENS;
    if (in->config.lora && !was_given(options, set, "lr")) in->config.lr = LORA_LR;
    in->features_lr_given = was_given(options, set, "features-lr");
    in->features_given = was_given(options, set, "train-features") || in->features_lr_given;
    if (in->features_lr_given && !was_given(options, set, "train-features"))
        in->config.train_features = in->config.features_lr > 0;
}

/* A recipe's features of its own give way to redraws, and to no calibration, if asked for. */
static void settle_calibration(struct inputs *in, const struct cli_option *options, const bool *set)
{
    in->calibrate_given = was_given(options, set, "calibrate");
    if (in->calibrate && !in->config.redraw_every) return;
    in->fit &= was_given(options, set, "fit-features");
    if (!was_given(options, set, "best-of")) in->best_of = 1;
}

/* 0, or the exit code of a usage error. */
static int check_usage(const struct cli_training *defaults, const struct inputs *in,
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
        return cli_usage_error("--state-budget is for --plan-windows N to spend");
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
    struct inputs in = {.device = CLI_DEVICE_DEFAULT,
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
        {"batch", 0, CLI_INT, &c->batch, "N", "sequences a step", 1, 1e6},
        {"micro-batch", 0, CLI_INT, &in.micro_batch, "N",
         "sequences at once; sets the memory (2048 tokens on the CPU, else 32768)", 1, 1e6},
        {"recompute", 0, CLI_STRING, &in.recompute, "WHAT",
         "made again in backward, to save memory: none, cheap (GELU), block (none)", 0, 0},
        {"seq-len", 0, CLI_INT, &in.seq_len, "N", "tokens a sequence (the model's, up to 1024)", 1,
         1 << 24},
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
        {"plan-windows", 0, CLI_INT, &in.plan_windows, "N",
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
         "one JSON object: model, steps, loss, val_ppl (null without --val), seconds", 0, 0},
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
    return run(defaults, &in);
}
