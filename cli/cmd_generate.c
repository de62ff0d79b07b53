/* srf generate: text at constant memory. */
#include "cli/generate.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

struct run {
    struct generate_model m;
    struct srf_engine *engine;
    struct srf_ids prompt;
    char *prompt_text;            /* of --prompt-file */
    int32_t *tokens;              /* (batch, n) */
    int64_t steps;                /* tokens of each that are asked for at once */
    int32_t *next;                /* (steps, batch) */
    int64_t *made;                /* (batch): tokens before the end of the sequence */
    struct srf_states *states;    /* of --state-in, or NULL */
    struct srf_state_info *infos; /* (batch): where each text starts, and then ends */
    char held[4];                 /* streaming: bytes of a character that is not whole yet */
    size_t n_held;
    double prefill_s, decode_s;
};

static void free_run(struct run *r)
{
    srf_engine_free(r->engine);
    generate_close(&r->m);
    srf_ids_free(&r->prompt);
    srf__free(r->prompt_text);
    srf__free(r->tokens);
    srf__free(r->next);
    srf__free(r->made);
    srf_states_close(r->states);
    srf__free(r->infos);
}

static const char *prompt_text(const struct generate_options *in, const struct run *r)
{
    return r->prompt_text ? r->prompt_text : in->prompt ? in->prompt : "";
}

/* Without its last line's end, which editors and echo add: a text goes on from its last word. */
static srf_status read_prompt(const char *path, char **text)
{
    SRF_TRY(cli_read_text(path, text));
    size_t n = strlen(*text);
    if (n == 0 || (*text)[n - 1] != '\n') return SRF_OK;
    (*text)[--n] = 0;
    if (n > 0 && (*text)[n - 1] == '\r') (*text)[n - 1] = 0;
    return SRF_OK;
}

static srf_status open_run(struct generate_options *in, struct run *r)
{
    SRF_TRY(generate_open(in, &r->m));
    SRF_FAIL_IF(!r->m.bpe, SRF_INVALID,
                "the model holds no tokenizer: attach one by 'srf import MODEL OUT.h5 --tokenizer "
                "T', or give ids by --input");
    if (in->state_out) SRF_TRY(cli_check_output(in->state_out));
    if (in->state_out) SRF_TRY(cli_check_apart(in->model, in->state_out));
    if (in->prompt_file) SRF_TRY(read_prompt(in->prompt_file, &r->prompt_text));
    const char *text = prompt_text(in, r);
    SRF_TRY(srf_bpe_encode(r->m.bpe, text, strlen(text), true, &r->prompt));
    if (in->state_in) SRF_TRY(srf_states_open(in->state_in, r->m.ck, &r->states));
    if (in->batch == CLI_NONE) in->batch = r->states ? srf_states_count(r->states) : 1;
    if (r->prompt.n == 0 && !r->states) SRF_TRY(generate_start(&r->m, &r->prompt));
    struct srf_engine_config config = generate_config(in, &r->m);
    config.slots = in->batch;
    int64_t rows = in->batch * (r->prompt.n + 1); /* memory for no more than there is to feed */
    if (rows < config.prefill_rows) config.prefill_rows = rows;
    SRF_TRY(srf_engine_create(r->m.ctx, r->m.ck, &config, &r->engine));
    SRF_TRY(srf_engine_reset(r->engine)); /* states that are gone on from without a prompt */
    SRF_TRY(SRF_CALLOC(r->infos, in->batch));
    for (int64_t i = 0; i < in->batch; i++) r->infos[i].pending = -1;
    if (r->states) SRF_TRY(generate_read_states(r->states, r->engine, in->batch, r->infos));
    int64_t longest = r->prompt.n;
    for (int64_t i = 0; i < in->batch; i++) {
        int64_t n = r->infos[i].position + (r->infos[i].pending >= 0) + r->prompt.n;
        longest = n > longest ? n : longest;
    }
    SRF_TRY(generate_room(&r->m, longest, &in->n));
    SRF_TRY(SRF_ALLOC(r->tokens, in->batch * (in->n + 1)));
    r->steps = generate_steps(&r->m);
    SRF_TRY(SRF_ALLOC(r->next, r->steps * in->batch));
    return SRF_CALLOC(r->made, in->batch);
}

/* Every slot's prompt, what is pending there before it. */
static srf_status admit(const struct generate_options *in, struct run *r)
{
    int64_t width = r->prompt.n + 1;
    struct srf_engine_prompt *prompts = NULL;
    int32_t *tokens = NULL;
    srf_status st = SRF_OK;
    SRF_TRY_GO(SRF_CALLOC(prompts, in->batch));
    SRF_TRY_GO(SRF_ALLOC(tokens, r->states ? in->batch * width : width));
    for (int64_t i = 0; i < in->batch; i++) {
        int32_t *own = r->states ? tokens + i * width : tokens;
        int64_t n = 0;
        if (r->infos[i].pending >= 0) own[n++] = r->infos[i].pending;
        if (r->prompt.n) memcpy(own + n, r->prompt.ids, (size_t)r->prompt.n * sizeof *own);
        n += r->prompt.n;
        SRF_FAIL_GO_IF(n == 0, SRF_INVALID, "%s: nothing is pending: give a prompt", in->state_in);
        prompts[i] = (struct srf_engine_prompt){.slot = i,
                                                .tokens = own,
                                                .n_tokens = n,
                                                .resume = r->states != NULL,
                                                .max_new = in->n,
                                                .seed = in->seed,
                                                .sequence = (uint64_t)i,
                                                .first = r->infos[i].made};
    }
    st = srf_engine_admit(r->engine, in->batch, prompts);
cleanup:
    srf__free(prompts);
    srf__free(tokens);
    return st;
}

static srf_status prefill(const struct generate_options *in, struct run *r)
{
    double start = cli_now();
    if (in->n > 0) SRF_TRY(admit(in, r));
    for (int64_t i = 0; in->n == 0 && i < in->batch; i++)
        SRF_TRY(generate_feed(r->engine, i, &r->prompt, &r->infos[i]));
    r->prefill_s = cli_now() - start;
    return SRF_OK;
}

/* One text is printed as it comes, a few wait for each other. */
static bool streams(const struct generate_options *in)
{
    return in->batch == 1 && !in->json;
}

/* Past stdio: a Ctrl-C while a reader keeps us waiting must not lose a part. */
static srf_status print_now(const char *text, size_t n)
{
    while (n > 0) {
        ssize_t done = cli_write(STDOUT_FILENO, text, n);
        SRF_FAIL_IF(done < 0, SRF_IO, "standard output: %s", strerror(errno));
        text += done, n -= (size_t)done;
    }
    return SRF_OK;
}

/* A token's bytes, whole characters at a time: a token may end inside one. */
static srf_status stream_token(struct run *r, int32_t token)
{
    char *text, *joined = NULL;
    size_t n;
    SRF_TRY(srf_bpe_decode(r->m.bpe, &token, 1, CLI_UNKNOWN, &text, &n));
    srf_status st = SRF_OK;
    SRF_TRY_GO(SRF_ALLOC(joined, r->n_held + n));
    memcpy(joined, r->held, r->n_held);
    memcpy(joined + r->n_held, text, n);
    n += r->n_held;
    size_t whole = 0;
    for (int length; whole < n && (length = cli_utf8(joined + whole, n - whole)) >= 0;)
        whole += length ? (size_t)length : 1;
    r->n_held = n - whole;
    memcpy(r->held, joined + whole, r->n_held);
    st = print_now(joined, whole);
cleanup:
    srf__free(text);
    srf__free(joined);
    return st;
}

/* A token of text i; -1: it has ended before. */
static srf_status take(const struct generate_options *in, struct run *r, int64_t i, int32_t token)
{
    if (token < 0) return SRF_OK;
    r->infos[i].pending = token;
    r->infos[i].made++;
    if (!in->ignore_eos && token == r->m.ck->config.eos) return SRF_OK;
    r->tokens[i * in->n + r->made[i]++] = token;
    return streams(in) ? stream_token(r, token) : SRF_OK;
}

static srf_status generate(const struct generate_options *in, struct run *r)
{
    struct cli_progress progress;
    SRF_TRY(prefill(in, r));
    cli_progress_start(&progress, "generate", in->quiet || streams(in));
    cli_catch_signals(NULL);
    if (streams(in)) SRF_TRY(print_now(prompt_text(in, r), strlen(prompt_text(in, r))));
    double start = cli_now();
    srf_status st = SRF_OK;
    bool any = in->n > 0;
    for (int64_t t = 0; any && !cli_interrupted(); t += r->steps) {
        SRF_TRY_GO(srf_engine_decode(r->engine, r->steps, r->next));
        for (int64_t k = 0; k < r->steps * in->batch; k++)
            SRF_TRY_GO(take(in, r, k % in->batch, r->next[k]));
        any = false;
        for (int64_t i = 0; i < in->batch; i++) any |= srf_engine_running(r->engine, i);
        double done = (double)(t + r->steps), all = (double)in->n;
        cli_progress_update(&progress, done < all ? done : all, all, "");
    }
cleanup:
    cli_progress_end(&progress);
    r->decode_s = cli_now() - start;
    return st;
}

static srf_status print_texts(const struct generate_options *in, const struct run *r)
{
    if (in->json) printf("{\"texts\": [");
    for (int64_t i = 0; i < in->batch; i++) {
        char *text;
        size_t n;
        SRF_TRY(
            srf_bpe_decode(r->m.bpe, r->tokens + i * in->n, r->made[i], CLI_UNKNOWN, &text, &n));
        if (in->json) {
            if (i) printf(", ");
            cli_json_string(stdout, text, n);
        } else {
            printf("--- %lld ---\n%s", (long long)i + 1, prompt_text(in, r));
            fwrite(text, 1, n, stdout);
            putchar('\n');
        }
        srf__free(text);
    }
    return SRF_OK;
}

static srf_status print_results(const struct generate_options *in, const struct run *r)
{
    int64_t total = 0, stepped = 0, state = srf_engine_state_bytes(r->engine);
    /* A KV cache would hold what was fed. */
    int64_t positions = 0;
    for (int64_t i = 0; i < in->batch; i++)
        if (srf_engine_position(r->engine, i) > positions)
            positions = srf_engine_position(r->engine, i);
    int64_t kv = srf_engine_kv_bytes(r->engine, positions);
    /* The first token of a text comes out of its prefill: no step makes it. */
    for (int64_t i = 0; i < in->batch; i++) {
        total += r->made[i];
        stepped += r->made[i] > 1 ? r->made[i] - 1 : 0;
    }
    double rate = stepped > 0 && r->decode_s > 0 ? (double)stepped / r->decode_s : 0;
    char speed[40] = "";
    if (rate > 0) snprintf(speed, sizeof speed, ", %.0f tokens/s", rate);
    if (streams(in)) {
        SRF_TRY(print_now(r->held, r->n_held));
        SRF_TRY(print_now("\n", 1));
    } else {
        SRF_TRY(print_texts(in, r));
    }
    if (in->json)
        printf("], \"prompt_tokens\": %lld, \"tokens\": %lld, \"state_bytes\": %lld, "
               "\"kv_bytes\": %lld, \"kv_positions\": %lld, \"prefill_s\": %.6f, "
               "\"decode_s\": %.6f, \"tokens_per_s\": %.1f}\n",
               (long long)r->prompt.n, (long long)total, (long long)state, (long long)kv,
               (long long)positions, r->prefill_s, r->decode_s, rate);
    else if (!in->quiet)
        fprintf(stderr,
                "%lld token%s%s; state %.1f KiB a sequence at any length (KV cache: %.1f KiB at "
                "%lld tokens, %.1f KiB at %lld)\n",
                (long long)total, total == 1 ? "" : "s", speed, (double)state / 1024,
                (double)kv / 1024, (long long)positions,
                (double)srf_engine_kv_bytes(r->engine, r->m.ck->config.n_pos) / 1024,
                (long long)r->m.ck->config.n_pos);
    return SRF_OK;
}

static int run(struct generate_options *in)
{
    struct run r = {0};
    srf_status st = open_run(in, &r);
    if (st == SRF_OK) st = generate(in, &r);
    if (st == SRF_OK) st = print_results(in, &r);
    /* What Ctrl-C leaves running has fed its last token: it is in no state to be kept. */
    if (st == SRF_OK && in->state_out && !cli_interrupted())
        st = srf_states_save(in->state_out, r.m.ck, r.engine, in->batch, r.infos);
    if (st == SRF_OK && cli_interrupted())
        st = srf__fail(__FILE__, __LINE__, SRF_INTERRUPTED, "interrupted");
    int code = st == SRF_OK ? EXIT_OK : cli_fail();
    free_run(&r);
    return code;
}

static int file_form(struct generate_options *in)
{
    if (in->batch == CLI_NONE) in->batch = 1;
    if (in->state_out) return cli_usage_error("--state-out belongs to --prompt");
    if (in->n == 0) return cli_usage_error("-n 0 belongs to --state-out");
    if (in->prompt || in->prompt_file)
        return cli_usage_error("--input brings the prompts: no --prompt beside it");
    if (!in->output) return cli_usage_error("--input needs --output");
    if (!in->order) in->order = "input";
    if (!in->on_error) in->on_error = "stop";
    if (strcmp(in->order, "input") != 0 && strcmp(in->order, "done") != 0)
        return cli_usage_error("--order %s: expected input or done", in->order);
    if (strcmp(in->on_error, "stop") != 0 && strcmp(in->on_error, "record") != 0)
        return cli_usage_error("--on-error %s: expected stop or record", in->on_error);
    if (in->json && strcmp(in->output, "-") == 0)
        return cli_usage_error("--json and --output - would share the standard output");
    for (int i = 0; i < in->stop.n; i++)
        if (!in->stop.text[i][0]) return cli_usage_error("--stop: the text is empty");
    return generate_file(in);
}

static int text_form(struct generate_options *in)
{
    if (in->output || in->resume || in->order || in->on_error || in->ids || in->stop.n ||
        in->prefix)
        return cli_usage_error("--output, --resume, --order, --on-error, --ids, --stop and "
                               "--prefix belong to --input");
    if (in->n == 0 && !in->state_out) return cli_usage_error("-n 0 belongs to --state-out");
    return run(in);
}

int cmd_generate(int argc, char **argv)
{
    struct generate_options in = {.n = CLI_NONE,
                                  .batch = CLI_NONE,
                                  .rows = CLI_NONE,
                                  .sampler = {.temperature = 1, .top_p = 1},
                                  .device = CLI_DEVICE_DEFAULT,
                                  .attention = CLI_ATTENTION_DEFAULT,
                                  .positions = CLI_POSITIONS_DEFAULT};
    const struct cli_option options[] = {
        CLI_HEADING_ROW("A model and a prompt:"),
        {"model", 0, CLI_STRING, &in.model, "PATH", "a retrofitted model or a recurrent export", 0,
         0},
        {"prompt", 'p', CLI_STRING, &in.prompt, "TEXT", "text to go on from (none)", 0, 0},
        {"prompt-file", 0, CLI_STRING, &in.prompt_file, "PATH",
         "the same, from a file, without its last line's end; - is standard input", 0, 0},
        CLI_HEADING_ROW("A file of prompts:"),
        {"input", 0, CLI_STRING, &in.input, "PATH", "a file of prompts; - is standard input", 0, 0},
        {"output", 0, CLI_STRING, &in.output, "PATH",
         "where their results go; - is standard output", 0, 0},
        {"resume", 0, CLI_FLAG, &in.resume, NULL, "go on with an --output that was interrupted", 0,
         0},
        {"order", 0, CLI_STRING, &in.order, "WHICH",
         "of the results: input, where those behind a slow one wait for it, or done (input)", 0, 0},
        {"on-error", 0, CLI_STRING, &in.on_error, "WHAT",
         "at a line that is no prompt: stop, or record the error and go on (stop)", 0, 0},
        {"ids", 0, CLI_FLAG, &in.ids, NULL, "results hold the token ids, too", 0, 0},
        {"stop", 0, CLI_STRINGS, &in.stop, "TEXT",
         "prompts of --input end before this text; may be given again", 0, 0},
        {"prefix", 0, CLI_STRING, &in.prefix, "TEXT",
         "goes before every prompt of --input; @PATH: a file's text", 0, 0},
        CLI_HEADING_ROW("States:"),
        {"state-in", 0, CLI_STRING, &in.state_in, "PATH", "go on from the states of a file", 0, 0},
        {"state-out", 0, CLI_STRING, &in.state_out, "PATH", "where the states go at the end", 0, 0},
        CLI_HEADING_ROW("Sampling, memory:"),
        {"tokens", 'n', CLI_INT, &in.n, "N", "tokens to generate (up to 100)", 0, 1 << 24},
        {"batch", 0, CLI_INT, &in.batch, "N", "sequences at once (1, or as many as --state-in)", 1,
         1e6},
        {"temperature", 0, CLI_DOUBLE, &in.sampler.temperature, "X",
         "0 = always the most likely token (1)", 0, 100},
        {"top-k", 0, CLI_INT, &in.sampler.top_k, "N", "only the N most likely tokens; 0 = all (0)",
         0, 1 << 24},
        {"top-p", 0, CLI_DOUBLE, &in.sampler.top_p, "P",
         "only the most likely tokens that make up P (1)", 1e-9, 1},
        {"seed", 0, CLI_U64, &in.seed, "N", "of the sampling (0)", 0, 0},
        {"ignore-eos", 0, CLI_FLAG, &in.ignore_eos, NULL, "do not stop at the end token", 0, 0},
        {"rows", 0, CLI_INT, &in.rows, "N",
         "tokens of a prefill launch, of all sequences: sets the memory (256; CUDA 8192)", 1,
         1 << 20},
        {"state-bf16", 0, CLI_FLAG, &in.state_bf16, NULL,
         "states in bf16: half the memory (CUDA, --dtype bf16)", 0, 0},
        CLI_HEADING_ROW("Attention, in place of the model's own:"),
        CLI_ATTENTION_OPTIONS(in.attention),
        CLI_HEADING_ROW("Where and how:"),
        CLI_POSITIONS_OPTIONS(in.positions),
        CLI_DEVICE_OPTIONS(in.device),
        {"quiet", 'q', CLI_FLAG, &in.quiet, NULL, "only the text", 0, 0},
        {"json", 0, CLI_FLAG, &in.json, NULL,
         "one JSON object: texts, prompt_tokens, tokens, state_bytes, kv_bytes, kv_positions, "
         "prefill_s, decode_s, tokens_per_s; with --input: prompts, errors, earlier, tokens, "
         "seconds, tokens_per_s, state_bytes",
         0, 0},
        {0}};
    int code;
    if (!cli_parse(
            argc, argv,
            "srf generate --model R.h5 --prompt TEXT [-n N] [options]\n"
            "       srf generate --model R.h5 --input P.jsonl --output O.jsonl [--batch N] "
            "[options]",
            "Generate text in the recurrent form: the state of a sequence has a fixed size.\n"
            "The text goes to stdout as it is made (several texts, and JSON, at the end); "
            "figures,\n"
            "state beside KV cache, to stderr.\n" GENERATE_FILE_HELP GENERATE_STATE_HELP
                CLI_POSITIONS_HELP,
            options, NULL, 0, 0, NULL, NULL, &code))
        return code;
    if (!in.model) return cli_usage_error("generate needs --model");
    if (in.prompt && in.prompt_file)
        return cli_usage_error("--prompt and --prompt-file are two prompts: give one");
    return in.input ? file_form(&in) : text_form(&in);
}
