/* Progress, warnings and results of a run of training, as text and as JSON. */
#include "cli/training_internal.h"

#include <math.h>
#include <string.h>

/* ", validation perplexity 38.4 (teacher 38.1: +0.8 %)" */
static void print_ppl(FILE *to, double ppl, double teacher)
{
    fprintf(to, ", validation perplexity %.3f", ppl);
    if (teacher > 0) fprintf(to, " (teacher %.3f: %+.1f %%)", teacher, 100 * (ppl / teacher - 1));
}

void training_on_step(void *user, const struct srf_train_metrics *m, double val_ppl)
{
    struct training_report *p = user;
    p->stepped = true;
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
        fprintf(stderr, "step %lld: loss %.4f", (long long)m->step, p->loss);
        print_ppl(stderr, val_ppl, srf_trainer_teacher_ppl(p->trainer));
        fputc('\n', stderr);
    }
}

void training_on_evaluating(void *user, int64_t done, int64_t total)
{
    struct training_report *p = user;
    if (!p->stepped) p->progress.start = cli_now(); /* the teacher's: no part of the steps' time */
    if (total == 0) cli_progress_start(&p->evaluation, "evaluate", p->progress.quiet);
    cli_progress_update(&p->evaluation, (double)done, (double)total, "");
}

void training_print_start(const struct cli_training *d, const struct training_inputs *in,
                          struct training_run *r)
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

void training_print_warnings(struct training_run *r)
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

void training_print_resume(const struct cli_training *defaults, const struct training_inputs *in)
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

/* A run that ended, but with a model worse than none. */
static void warn_if_diverged(const struct training_report *p, double val_ppl)
{
    int64_t vocab = srf_trainer_model(p->trainer)->config.vocab;
    if (val_ppl <= (double)vocab) return; /* 0: no text for it */
    fprintf(stderr,
            "srf: warning: the run diverged: validation perplexity %.4g, and guessing among the "
            "%lld tokens has %lld: try a lower --lr, or --clip 1\n",
            val_ppl, (long long)vocab, (long long)vocab);
}

void training_print_result(const struct cli_training *defaults, const struct training_inputs *in,
                           const struct training_report *p, double val_ppl, double seconds)
{
    int64_t steps = p->config->steps;
    bool idle = p->first_step == steps;
    double teacher = srf_trainer_teacher_ppl(p->trainer);
    warn_if_diverged(p, val_ppl);
    if (in->json) {
        char path[4200];
        int n = snprintf(path, sizeof path, "%s/model.h5", in->out);
        printf("{\"model\": ");
        cli_json_string(stdout, path, (size_t)n);
        printf(", \"steps\": %lld, \"loss\": ", (long long)steps);
        cli_json_number(stdout, p->loss > 0 ? p->loss : NAN);
        printf(", \"val_ppl\": ");
        cli_json_number(stdout, val_ppl > 0 ? val_ppl : NAN);
        printf(", \"teacher_val_ppl\": ");
        cli_json_number(stdout, teacher > 0 ? teacher : NAN);
        printf(", \"seconds\": %.3f}\n", seconds);
        return;
    }
    if (idle)
        printf("%s: all %lld steps were done before", defaults->name, (long long)steps);
    else
        printf("%s: %lld step%s in %.1f s, loss %.4f", defaults->name,
               (long long)(steps - p->first_step), steps - p->first_step == 1 ? "" : "s", seconds,
               p->loss);
    if (val_ppl > 0) print_ppl(stdout, val_ppl, teacher);
    printf("; model in %s/model.h5, curves in %s/training.html\n", in->out, in->out);
}

void training_print_next(const struct training_inputs *in, const struct training_run *r)
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
