/* srf generate --input: a file of prompts through the engine. */
#include "cli/generate.h"
#include "cli/prompts.h"
#include "cli/results.h"
#include "infer/serve.h"
#include "kernels/grow.h"

#include <stdlib.h>
#include <string.h>

/* A prompt that runs. */
struct job {
    struct job *before, *behind; /* all that run, a ring around run.jobs */
    struct cli_prompt prompt;
    int64_t number; /* among the records of this run */
    int64_t n_prompt, max_new;
    struct srf_ids made;
    char *text; /* (cap_text): what was made, only where stop strings are looked for */
    size_t n_text, cap_text;
};

struct run {
    const struct generate_options *in;
    struct generate_model m;
    struct srf_engine *engine;
    struct cli_prompts prompts;
    struct cli_results results;
    struct cli_progress progress;
    struct job jobs;              /* only its links count */
    char bad_line[512];           /* the error that ends the run; what runs is finished first */
    struct srf_state_info shared; /* what every prompt goes on from, in the last slot */
    json_t *stop;                 /* of --stop: array, or NULL */
    int64_t n_records, n_done, n_bad, n_tokens;
    int64_t bytes_done, bytes_skipped; /* of the input */
    double start;
};

static void free_job(struct job *j)
{
    j->before->behind = j->behind;
    j->behind->before = j->before;
    cli_prompt_free(&j->prompt);
    srf_ids_free(&j->made);
    srf__free(j->text);
    srf__free(j);
}

/* ---- records --------------------------------------------------------------------------------- */

/* {"line": 7, "id": ..., opened; the text is the caller's, by srf__free, after end_record. */
static FILE *begin_record(const struct cli_prompt *p, char **text, size_t *n)
{
    FILE *f = open_memstream(text, n);
    if (!f) return NULL;
    fprintf(f, "{\"line\": %lld", (long long)p->line);
    if (p->id) {
        fputs(", \"id\": ", f);
        json_dumpf(p->id, f, JSON_ENCODE_ANY);
    }
    return f;
}

static srf_status end_record(struct run *r, FILE *f, int64_t number, int64_t bytes, char **text,
                             size_t *n)
{
    char *copy = NULL;
    fputc('}', f);
    bool failed = ferror(f);
    failed |= fclose(f) != 0;
    srf_status st = failed ? srf__fail(__FILE__, __LINE__, SRF_NOMEM, "out of memory: a record")
                           : SRF_ALLOC(copy, *n + 1);
    if (st == SRF_OK) {
        memcpy(copy, *text, *n + 1);
        st = cli_results_put(&r->results, number, copy, *n);
    }
    free(*text);
    r->bytes_done += bytes;
    return st;
}

static srf_status put_error(struct run *r, const struct cli_prompt *p, int64_t number)
{
    char *text;
    size_t n;
    FILE *f = begin_record(p, &text, &n);
    SRF_FAIL_IF(!f, SRF_NOMEM, "out of memory: a record");
    fputs(", \"error\": ", f);
    cli_json_string(f, srf_error_message(), strlen(srf_error_message()));
    srf_error_clear();
    r->n_bad++;
    return end_record(r, f, number, p->bytes, &text, &n);
}

static srf_status put_job(struct run *r, struct job *j, const char *finish)
{
    char *record, *text = j->text, *decoded = NULL;
    size_t n, n_text = j->n_text;
    if (!text && r->m.bpe) {
        SRF_TRY(srf_bpe_decode(r->m.bpe, j->made.ids, j->made.n, CLI_UNKNOWN, &decoded, &n_text));
        text = decoded;
    }
    srf_status st = SRF_OK;
    FILE *f = begin_record(&j->prompt, &record, &n);
    SRF_FAIL_GO_IF(!f, SRF_NOMEM, "out of memory: a record");
    fprintf(f, ", \"prompt_tokens\": %lld, \"tokens\": %lld, \"finish\": \"%s\"",
            (long long)j->n_prompt, (long long)j->made.n, finish);
    if (r->m.bpe) {
        fputs(", \"text\": ", f);
        cli_json_string(f, text, n_text);
    }
    if (r->in->ids || !r->m.bpe) {
        fputs(", \"ids\": [", f);
        for (int64_t i = 0; i < j->made.n; i++)
            fprintf(f, "%s%d", i ? ", " : "", (int)j->made.ids[i]);
        fputc(']', f);
    }
    r->n_done++;
    st = end_record(r, f, j->number, j->prompt.bytes, &record, &n);
cleanup:
    srf__free(decoded);
    return st;
}

/* ---- what the server asks -------------------------------------------------------------------- */

static srf_status put_first(struct srf_ids *ids, int32_t id)
{
    SRF_TRY(srf_ids_append(ids, &id, 1)); /* room for it */
    memmove(ids->ids + 1, ids->ids, (size_t)(ids->n - 1) * sizeof id);
    ids->ids[0] = id;
    return SRF_OK;
}

/* The job of a line, checked against the model. */
static srf_status fill_job(struct run *r, const char *text, size_t n, struct job *j)
{
    SRF_TRY(cli_prompt_parse(&r->prompts, text, n, r->m.bpe, r->m.ck->config.vocab, &j->prompt));
    j->n_prompt = j->prompt.tokens.n;
    if (r->shared.pending >= 0) SRF_TRY(put_first(&j->prompt.tokens, r->shared.pending));
    if (j->prompt.tokens.n == 0) {
        SRF_FAIL_IF(r->shared.position > 0, SRF_INVALID,
                    "an empty prompt, and nothing is pending in the state");
        SRF_TRY(generate_start(&r->m, &j->prompt.tokens));
        j->n_prompt = 1;
    }
    j->max_new = j->prompt.n != CLI_NONE ? j->prompt.n : r->in->n;
    SRF_TRY(generate_room(&r->m, r->shared.position + j->prompt.tokens.n, &j->max_new));
    SRF_FAIL_IF(j->prompt.stop && !r->m.bpe, SRF_MISMATCH,
                "\"stop\": the model holds no tokenizer");
    return SRF_OK;
}

/* A line as a job; NULL for a bad one that is answered by its error. */
static srf_status read_job(struct run *r, const char *text, size_t n, struct job **out)
{
    struct job *j;
    *out = NULL;
    SRF_TRY(SRF_CALLOC(j, 1));
    j->before = &r->jobs;
    j->behind = r->jobs.behind;
    j->before->behind = j->behind->before = j;
    j->number = r->n_records++;
    srf_status st = fill_job(r, text, n, j);
    if (st == SRF_OK) {
        *out = j;
        return SRF_OK;
    }
    srf__error_prefix("%s: line %lld", r->prompts.path, (long long)r->prompts.line);
    bool of_the_line = st == SRF_FORMAT || st == SRF_MISMATCH || st == SRF_INVALID;
    if (of_the_line && strcmp(r->in->on_error, "record") == 0) {
        st = put_error(r, &j->prompt, j->number);
    } else if (of_the_line) {
        snprintf(r->bad_line, sizeof r->bad_line, "%s", srf_error_message());
        st = SRF_OK;
    }
    free_job(j);
    return st;
}

/* A line that an earlier run has answered. */
static srf_status skip(struct run *r, const char *text, size_t n)
{
    json_t *id = cli_prompt_id(text, n);
    srf_status st = cli_results_check(&r->results, r->prompts.line, id);
    json_decref(id);
    r->bytes_skipped += (int64_t)n + 1;
    return st;
}

/* A line if there is one by now; where nothing runs, it is waited for. */
static srf_status next_line(struct run *r, const char **text, size_t *n)
{
    SRF_TRY(cli_prompts_line(&r->prompts, false, text, n));
    if (*text || r->prompts.ended || r->jobs.behind != &r->jobs) return SRF_OK;
    /* Who writes the next prompt may be waiting for what is done. */
    SRF_TRY(cli_results_flush(&r->results, false));
    return cli_prompts_line(&r->prompts, true, text, n);
}

static srf_status next(void *user, struct srf_request *request, bool *got)
{
    struct run *r = user;
    struct job *j = NULL;
    *got = false;
    while (!j) {
        const char *text;
        size_t n;
        if (cli_interrupted() || r->bad_line[0] || !cli_results_room(&r->results, r->n_records))
            return SRF_OK;
        SRF_TRY(next_line(r, &text, &n));
        if (!text) return SRF_OK;
        if (cli_results_have(&r->results, r->prompts.line))
            SRF_TRY(skip(r, text, n));
        else
            SRF_TRY(read_job(r, text, n, &j));
    }
    /* Without a seed of its own a prompt has a stream of its own: that of its line. */
    *request =
        (struct srf_request){.tokens = j->prompt.tokens.ids,
                             .n_tokens = j->prompt.tokens.n,
                             .max_new = j->max_new,
                             .seed = j->prompt.has_seed ? j->prompt.seed : r->in->seed,
                             .sequence = j->prompt.has_seed ? 0 : (uint64_t)(j->prompt.line - 1),
                             .first = r->shared.made,
                             .user = j};
    *got = true;
    return SRF_OK;
}

/* Where in the text the first of the strings begins that end behind `from`, at most `first`. */
static size_t first_stop(const struct job *j, const json_t *stop, size_t from, size_t first)
{
    for (size_t i = 0; i < json_array_size(stop); i++) {
        const json_t *s = json_array_get(stop, i);
        size_t n = json_string_length(s), at = from >= n ? from - n + 1 : 0;
        const char *found = memmem(j->text + at, j->n_text - at, json_string_value(s), n);
        if (found && (size_t)(found - j->text) < first) first = (size_t)(found - j->text);
    }
    return first;
}

/* A token's bytes behind the text. */
static srf_status add_text(struct run *r, struct job *j, int32_t token)
{
    char *piece;
    size_t n;
    SRF_TRY(srf_bpe_decode(r->m.bpe, &token, 1, CLI_UNKNOWN, &piece, &n));
    srf_status st = SRF_GROW(j->text, j->cap_text, j->n_text + n + 1);
    if (st == SRF_OK) {
        memcpy(j->text + j->n_text, piece, n);
        j->n_text += n;
    }
    srf__free(piece);
    return st;
}

static srf_status token(void *user, const struct srf_request *request, int32_t id, bool *stop)
{
    struct run *r = user;
    struct job *j = request->user;
    SRF_TRY(srf_ids_append(&j->made, &id, 1));
    r->n_tokens++;
    if (!r->stop && !j->prompt.stop) return SRF_OK;
    size_t from = j->n_text;
    SRF_TRY(add_text(r, j, id));
    /* Both lists on the whole text: what one cuts off may begin what the other is to find. */
    size_t first = first_stop(j, r->stop, from, j->n_text);
    first = first_stop(j, j->prompt.stop, from, first);
    *stop = first < j->n_text;
    j->n_text = first;
    return SRF_OK;
}

static srf_status done(void *user, const struct srf_request *request, enum srf_finish how)
{
    struct run *r = user;
    struct job *j = request->user;
    srf_status st = put_job(r, j, how == SRF_FINISH_LENGTH ? "length" : "stop");
    free_job(j);
    return st;
}

static srf_status each_round(void *user, bool *stop)
{
    struct run *r = user;
    char note[96];
    double seconds = cli_now() - r->start;
    SRF_TRY(cli_results_flush(&r->results, false));
    snprintf(note, sizeof note, "%lld prompts, %.0f tokens/s", (long long)r->n_done,
             (double)r->n_tokens / seconds);
    cli_progress_update(&r->progress, (double)r->bytes_done,
                        (double)(r->prompts.size - r->bytes_skipped), note);
    *stop = cli_interrupted();
    return SRF_OK;
}

/* ---- the run --------------------------------------------------------------------------------- */

/* Whether prompts go on from something. */
static bool shares(const struct generate_options *in)
{
    return in->state_in || in->prefix;
}

static srf_status settings(const struct run *r, json_t **out)
{
    const struct generate_options *in = r->in;
    char hash[17], tokenizer[17] = "", *text;
    SRF_TRY(srf_checkpoint_hash(r->m.ck, hash));
    if (r->m.bpe) srf_bpe_hash(r->m.bpe, tokenizer);
    SRF_TRY(srf_attention_to_json(&r->m.ck->attention, &text));
    json_t *attention = json_loads(text, 0, NULL);
    srf__free(text);
    *out = json_pack("{s:s, s:s, s:s, s:o, s:s, s:s, s:s}", "creator", "srf " SRF_VERSION, "model",
                     hash, "tokenizer", tokenizer, "attention", attention, "device",
                     r->m.ctx->be->name, "dtype", srf_dtype_name(r->m.ctx->dtype), "positions",
                     in->positions.policy);
    /* "chunk" is --rows: files keep the name that they began with */
    json_t *sampling = json_pack(
        "{s:f, s:I, s:f, s:I, s:I, s:I, s:b, s:b, s:O?, s:b, s:s}", "temperature",
        in->sampler.temperature, "top_k", (json_int_t)in->sampler.top_k, "top_p", in->sampler.top_p,
        "seed", (json_int_t)in->seed, "n", (json_int_t)(in->n == CLI_NONE ? 0 : in->n), "chunk",
        (json_int_t)generate_config(in, &r->m).prefill_rows, "state_bf16", in->state_bf16,
        "ignore_eos", in->ignore_eos, "stop", r->stop, "ids", in->ids, "order", in->order);
    bool failed = !*out || !sampling || json_object_update(*out, sampling) != 0;
    json_decref(sampling);
    SRF_FAIL_IF(failed, SRF_NOMEM, "out of memory");
    char shared[17] = "";
    if (shares(in)) SRF_TRY(generate_shared_hash(r->engine, in->batch, &r->shared, shared));
    SRF_FAIL_IF(json_object_set_new(*out, "goes_on_from", json_string(shared)) != 0, SRF_NOMEM,
                "out of memory");
    return SRF_OK;
}

/* Bytes that the engine may take; 0: not known. */
static srf_status memory(struct srf_ctx *ctx, int64_t *bytes)
{
    size_t free_bytes, total;
    SRF_TRY(ctx->be->memory(ctx, &free_bytes, &total));
    *bytes = (int64_t)free_bytes;
    if (total) return SRF_OK;
    FILE *f = fopen("/proc/meminfo", "r");
    char line[128];
    long long kib;
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "MemAvailable: %lld kB", &kib) == 1) *bytes = kib * 1024;
    if (f) fclose(f);
    return SRF_OK;
}

/* What a slot costs and how many fit, before anything large is allocated. */
static srf_status check_memory(const struct run *r)
{
    struct srf_engine_config c = generate_config(r->in, &r->m);
    int64_t bytes, most, batch, taken, ours;
    const int64_t limit = 1 << 24;
    SRF_TRY(memory(r->m.ctx, &bytes));
    SRF_TRY(srf_engine_fits(r->m.ctx, r->m.ck, &c, INT64_MAX, r->in->batch, &batch, &ours));
    if (bytes == 0) return SRF_OK;
    SRF_TRY(srf_engine_fits(r->m.ctx, r->m.ck, &c, bytes, limit, &most, &taken));
    SRF_FAIL_IF(most < r->in->batch, SRF_NOMEM,
                "--batch %lld takes %.1f MiB, %.1f MiB are free: at most %lld fit",
                (long long)r->in->batch, (double)ours / (1 << 20), (double)bytes / (1 << 20),
                (long long)most);
    if (r->in->quiet) return SRF_OK;
    double slot = most > 1 ? (double)(taken - ours) / (double)(most - batch) : (double)ours;
    fprintf(stderr,
            "%lld slots take %.1f MiB, one more %.1f KiB; %lld fit into the %.1f MiB free\n",
            (long long)batch, (double)ours / (1 << 20), slot / 1024, (long long)most,
            (double)bytes / (1 << 20));
    return SRF_OK;
}

static srf_status open_run(struct run *r)
{
    const struct generate_options *in = r->in;
    SRF_TRY(generate_open(in, &r->m));
    SRF_FAIL_IF(in->stop.n && !r->m.bpe, SRF_INVALID, "--stop: the model holds no tokenizer");
    if (in->stop.n) r->stop = json_array();
    for (int i = 0; i < in->stop.n; i++)
        SRF_FAIL_IF(json_array_append_new(r->stop, json_string(in->stop.text[i])) != 0, SRF_INVALID,
                    "--stop: expected UTF-8");
    SRF_TRY(check_memory(r));
    SRF_TRY(cli_prompts_open(in->input, &r->prompts));
    struct srf_engine_config config = generate_config(in, &r->m);
    config.slots = in->batch + shares(in);
    SRF_TRY(srf_engine_create(r->m.ctx, r->m.ck, &config, &r->engine));
    SRF_TRY(srf_engine_reset(r->engine)); /* states that are gone on from without a prompt */
    if (shares(in)) SRF_TRY(generate_fill_shared(in, &r->m, r->engine, in->batch, &r->shared));
    /* The output last: nothing is left behind by what is refused before it. */
    json_t *made_with;
    SRF_TRY(settings(r, &made_with));
    int64_t window = strcmp(in->order, "input") == 0 ? 4 * in->batch + 1024 : 0;
    srf_status st = cli_results_open(in->output, made_with, in->resume, window, &r->results);
    json_decref(made_with);
    return st;
}

static void close_run(struct run *r)
{
    while (r->jobs.behind != &r->jobs) free_job(r->jobs.behind);
    srf_engine_free(r->engine);
    cli_prompts_close(&r->prompts);
    cli_results_close(&r->results);
    generate_close(&r->m);
    json_decref(r->stop);
}

static srf_status serve(struct run *r)
{
    struct srf_server server = {.engine = r->engine,
                                .slots = r->in->batch,
                                .shared = shares(r->in) ? r->in->batch : -1,
                                .steps = generate_steps(&r->m),
                                .next = next,
                                .token = token,
                                .done = done,
                                .round = each_round,
                                .user = r};
    cli_catch_signals(NULL);
    cli_progress_start(&r->progress, "generate", r->in->quiet);
    r->start = cli_now();
    srf_status st = srf_serve(&server);
    cli_progress_end(&r->progress);
    /* What is done stays, whatever went wrong. */
    srf_status flushed = cli_results_flush(&r->results, true);
    if (st == SRF_OK) st = flushed;
    SRF_FAIL_IF(st == SRF_OK && r->bad_line[0], SRF_FORMAT, "%s", r->bad_line);
    return st;
}

static void report(const struct run *r)
{
    double seconds = cli_now() - r->start;
    if (r->in->json)
        printf("{\"prompts\": %lld, \"errors\": %lld, \"earlier\": %lld, \"tokens\": %lld, "
               "\"seconds\": %.4f, \"tokens_per_s\": %.1f, \"state_bytes\": %lld}\n",
               (long long)r->n_done, (long long)r->n_bad, (long long)r->results.resumed,
               (long long)r->n_tokens, seconds, (double)r->n_tokens / seconds,
               (long long)srf_engine_state_bytes(r->engine));
    else if (!r->in->quiet)
        fprintf(stderr,
                "%lld prompts (%lld bad lines, %lld answered earlier), %lld tokens, %.0f "
                "tokens/s\n",
                (long long)r->n_done, (long long)r->n_bad, (long long)r->results.resumed,
                (long long)r->n_tokens, (double)r->n_tokens / seconds);
}

int generate_file(const struct generate_options *in)
{
    struct run r = {.in = in, .shared = {.pending = -1}};
    r.jobs.before = r.jobs.behind = &r.jobs;
    srf_status st = open_run(&r);
    if (st == SRF_OK) st = serve(&r);
    if (st == SRF_OK) report(&r);
    if (st == SRF_OK && cli_interrupted())
        st = srf__fail(__FILE__, __LINE__, SRF_INTERRUPTED, "interrupted%s%s",
                       r.results.file ? ": --resume goes on with " : "",
                       r.results.file ? r.results.path : "");
    int code = st == SRF_OK ? EXIT_OK : cli_fail();
    close_run(&r);
    return code;
}
