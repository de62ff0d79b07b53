/* What a run of training or retrofitting is made of, and the run. */
#include "cli/training_internal.h"
#include "cli/training_page.h"
#include "train/calibrate.h"
#include "train/plan_windows.h"

#include <math.h>
#include <string.h>

/* Most windows that its text is long. */
#define PLAN_LENGTH 8
static void free_run(struct training_run *r)
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
static srf_status init_model(const struct training_inputs *in, struct srf_checkpoint **out)
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

static srf_status open_start(const struct cli_training *defaults, struct training_inputs *in,
                             struct training_run *r)
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
    return SRF_OK;
}

/* About n tokens of the training text, in windows of len spread over it; caller srf__free()s. */
static srf_status sample_text(const struct training_inputs *in, struct training_run *r, int64_t n,
                              int64_t len, int64_t *windows, int32_t **tokens)
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
    struct cli_progress *p = user;
    if (done == 0) p->start = cli_now(); /* what comes before is no measure of what is left */
    cli_progress_update(p, (double)done, (double)total, "");
}

/* What is made of the model before training, from its training text. */
static srf_status calibrate(const struct training_inputs *in, struct training_run *r)
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
        fprintf(stderr, "best of %lld draws per head: error of attention from %.3f to %.3f\n",
                (long long)in->best_of, result.error_first, result.error_chosen);
cleanup:
    srf__free(tokens);
    return st;
}

static srf_status plan_windows(const struct training_inputs *in, struct training_run *r)
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
                "from %.4f to %.4f; state %lld bytes per sequence\n",
                (long long)(c.windows * c.seq_len), result.before, result.after,
                (long long)result.state_bytes);
    else if (!in->quiet)
        fprintf(
            stderr,
            "windows and features by layer: nothing to choose in sequences of %lld tokens; state "
            "%lld bytes per sequence\n",
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

/* What the command line leaves to the model and the machine. All is checked now, not after minutes
 * of preparations. */
static srf_status settle_config(struct training_inputs *in, const struct training_run *r)
{
    struct srf_train_config *c = &in->config;
    int64_t n_pos = r->ck->config.n_pos;
    c->seq_len = in->seq_len != CLI_NONE ? in->seq_len : n_pos < 1024 ? n_pos : 1024;
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
    return srf_trainer_check(r->ck, r->teacher, c, r->data, r->val);
}

static srf_status open_run(const struct cli_training *defaults, struct training_inputs *in,
                           struct training_run *r)
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
    SRF_TRY(settle_config(in, r));
    if (in->plan_windows) SRF_TRY(plan_windows(in, r));
    if (in->calibrate) SRF_TRY(calibrate(in, r));
    struct srf_train_config *c = &in->config;
    srf_status st;
    while ((st = srf_trainer_create(r->ctx, r->ck, r->teacher, c, r->data, r->val, &r->trainer)) ==
               SRF_NOMEM &&
           in->micro_batch == CLI_NONE && c->micro_batch > 1)
        c->micro_batch = smaller_micro_batch(c, c->micro_batch);
    return st;
}

static bool on_stop(void *user)
{
    (void)user;
    return cli_interrupted();
}

int training_run(const struct cli_training *defaults, struct training_inputs *in)
{
    struct training_run r = {0};
    srf_status st = open_run(defaults, in, &r);
    if (st != SRF_OK) {
        free_run(&r);
        return cli_fail();
    }
    if (!in->quiet) training_print_start(defaults, in, &r);
    training_print_warnings(&r);
    struct training_report report = {.trainer = r.trainer,
                                     .config = srf_trainer_config(r.trainer),
                                     .first_step = srf_trainer_steps_done(r.trainer)};
    cli_progress_start(&report.progress, defaults->name, in->quiet);
    cli_catch_signals("\nsrf: finishing the step, then saving; again: stops at once\n");
    double start = cli_now(), val_ppl = 0;
    struct srf_run_hooks hooks = {.user = &report,
                                  .step = training_on_step,
                                  .evaluating = training_on_evaluating,
                                  .stop = on_stop};
    st = srf_trainer_run(r.trainer, in->out, &hooks, &val_ppl);
    cli_progress_end(&report.progress);
    int code = EXIT_OK;
    if (st == SRF_INTERRUPTED) {
        fprintf(stderr, "srf: %s\n", srf_error_message());
        training_print_resume(defaults, in);
        code = EXIT_FAILED;
    } else if (st != SRF_OK) {
        code = cli_fail();
    } else {
        training_print_result(defaults, in, &report, val_ppl, cli_now() - start);
        if (defaults->recipe) training_print_next(in, &r);
    }
    /* The model is what counts: a page that cannot be written fails nothing. */
    bool draw = st == SRF_OK || st == SRF_INTERRUPTED;
    if (draw && training_page(defaults->name, in->out) != SRF_OK)
        fprintf(stderr, "srf: warning: %s\n", srf_error_message());
    free_run(&r);
    return code;
}
