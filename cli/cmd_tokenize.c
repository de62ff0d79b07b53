/* srf tokenize: texts to a token set, and a token set back to text (--decode). */
#include "cli/common.h"
#include "cli/prompts.h"
#include "kernels/grow.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct inputs {
    const char **texts;
    int n_texts;
    const char *tokenizer, *jsonl, *out, *holdout_out;
    int64_t holdout_every;
    bool decode, json, quiet;
};

/* One output of the run. */
struct part {
    struct srf_tokenset_writer *writer;
    int64_t tokens, documents;
};

struct run {
    const struct inputs *in;
    struct srf_bpe *bpe;
    struct part kept, held;         /* held: every holdout_every-th document */
    struct part *now;               /* of the document being written, NULL between documents */
    int32_t end;                    /* id of <|endoftext|>, -1 = none */
    int64_t read, file_read, total; /* bytes: of earlier files, of this one; of all */
    int64_t text_bytes;
    struct cli_progress progress;
};

/* ---- texts to a token set -------------------------------------------------------------------- */

static void start_document(struct run *r)
{
    int64_t k = r->kept.documents + r->held.documents;
    bool held = r->in->holdout_every && k % r->in->holdout_every == r->in->holdout_every - 1;
    r->now = held ? &r->held : &r->kept;
    r->now->documents++;
    srf_tokenset_writer_document(r->now->writer);
}

/* Takes ids of a text as they come. */
static srf_status on_ids(void *user, const int32_t *ids, int64_t n)
{
    struct run *r = user;
    SRF_FAIL_IF(cli_interrupted(), SRF_INTERRUPTED, "interrupted");
    for (int64_t i = 0, start = 0; i < n; i++) {
        if (!r->now) start_document(r);
        bool ends = ids[i] == r->end;
        if (!ends && i + 1 < n) continue;
        SRF_TRY(srf_tokenset_writer_append(r->now->writer, ids + start, i + 1 - start));
        r->now->tokens += i + 1 - start;
        start = i + 1;
        if (ends) r->now = NULL;
    }
    char note[64];
    snprintf(note, sizeof note, "%.1f MB/s",
             1e-6 * (double)(r->read + r->file_read) / (cli_now() - r->progress.start));
    cli_progress_update(&r->progress, (double)(r->read + r->file_read), (double)r->total, note);
    return SRF_OK;
}

/* Standard input may wait for more for ever: look out for Ctrl-C meanwhile, even for one that came
 * just before the waiting began. */
static ssize_t read_standard(void *cookie, char *to, size_t n)
{
    (void)cookie;
    struct pollfd in = {.fd = STDIN_FILENO, .events = POLLIN};
    for (;;) {
        int ready = poll(&in, 1, 200);
        if (cli_interrupted()) errno = EINTR;
        if (cli_interrupted() || (ready < 0 && errno != EINTR)) return -1;
        if (ready > 0) return read(STDIN_FILENO, to, n);
    }
}

/* A text as it is, from where the stream stands. */
static srf_status tokenize_stream(struct run *r, FILE *f)
{
    r->now = NULL;
    srf_status st = srf_bpe_encode_stream(r->bpe, f, true, on_ids, r, &r->file_read);
    r->text_bytes += r->file_read;
    return st;
}

static srf_status tokenize_text(struct run *r, const char *path)
{
    enum { SNIFF = 1 << 16 };
    bool standard = strcmp(path, "-") == 0;
    FILE *f = standard ? fopencookie(NULL, "rb", (cookie_io_functions_t){.read = read_standard})
                       : fopen(path, "rb");
    char *head = NULL;
    srf_status st = SRF_OK;
    SRF_FAIL_IF(!f, SRF_IO, "%s: %s", path, strerror(errno));
    if (!standard && ftell(f) == 0) { /* not a pipe, whose bytes are read once */
        SRF_TRY_GO(SRF_ALLOC(head, SNIFF));
        const char *found = srf_tokenset_not_text(path, head, fread(head, 1, SNIFF, f));
        SRF_FAIL_GO_IF(found, SRF_FORMAT, "%s: expected a text, found %s", path, found);
        SRF_FAIL_GO_IF(fseek(f, 0, SEEK_SET) != 0, SRF_IO, "%s: %s", path, strerror(errno));
    }
    st = tokenize_stream(r, f);
    if (st != SRF_OK) srf__error_prefix("%s", standard ? "standard input" : path);
cleanup:
    srf__free(head);
    fclose(f);
    return st;
}

/* ---- JSON lines ------------------------------------------------------------------------------ */

/* The keys that an object has instead, as far as there is room. */
static srf_status no_key(const char *key, json_t *object)
{
    char found[200] = "";
    const char *other;
    json_t *value;
    json_object_foreach(object, other, value)
    {
        size_t n = strlen(found);
        snprintf(found + n, sizeof found - n, "%s%.60s", n ? ", " : "", other);
    }
    SRF_FAIL(SRF_FORMAT, "no \"%s\" (--jsonl): found %s", key, found[0] ? found : "no keys");
}

static srf_status append_ids(const json_t *list, int64_t vocab, struct srf_ids *ids)
{
    size_t n = json_array_size(list);
    SRF_TRY(SRF_GROW(ids->ids, ids->cap, (int64_t)n));
    for (size_t i = 0; i < n; i++) {
        const json_t *v = json_array_get(list, i);
        SRF_FAIL_IF(
            !json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) >= vocab,
            SRF_MISMATCH, "item %zu: expected a token's id, 0 to %lld", i, (long long)vocab - 1);
        ids->ids[ids->n++] = (int32_t)json_integer_value(v);
    }
    return SRF_OK;
}

/* The ids of a line's text, or those that it lists. */
static srf_status line_ids(struct run *r, const char *line, size_t n, struct srf_ids *ids)
{
    json_error_t error;
    json_t *object = json_loadb(line, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &error);
    srf_status st = SRF_OK;
    ids->n = 0;
    SRF_FAIL_GO_IF(!object, SRF_FORMAT, "column %d: %s", error.column, error.text);
    SRF_FAIL_GO_IF(!json_is_object(object), SRF_FORMAT, "expected a JSON object");
    const json_t *value = json_object_get(object, r->in->jsonl);
    if (!value) {
        st = no_key(r->in->jsonl, object);
    } else if (json_is_string(value)) {
        r->text_bytes += (int64_t)json_string_length(value);
        st = srf_bpe_encode(r->bpe, json_string_value(value), json_string_length(value), true, ids);
    } else {
        SRF_FAIL_GO_IF(!json_is_array(value), SRF_FORMAT,
                       "\"%s\": expected a text or a list of token ids", r->in->jsonl);
        st = append_ids(value, srf_bpe_vocab_size(r->bpe), ids);
        if (st != SRF_OK) srf__error_prefix("\"%s\"", r->in->jsonl);
    }
cleanup:
    json_decref(object);
    return st;
}

/* Each line is a document, and ends as one: its text does not say so. */
static srf_status tokenize_lines(struct run *r, const char *path)
{
    struct cli_prompts in;
    struct srf_ids ids = {0};
    srf_status st = cli_prompts_open(path, &in);
    while (st == SRF_OK) {
        const char *line;
        size_t n;
        SRF_TRY_GO(cli_prompts_line(&in, true, &line, &n));
        if (!line) break;
        r->file_read += (int64_t)n + 1;
        r->now = NULL;
        st = line_ids(r, line, n, &ids);
        if (st != SRF_OK) srf__error_prefix("%s: line %lld", in.path, (long long)in.line);
        if (st != SRF_OK || ids.n == 0) continue;
        if (r->end >= 0 && ids.ids[ids.n - 1] != r->end) {
            SRF_TRY_GO(SRF_GROW(ids.ids, ids.cap, ids.n + 1));
            ids.ids[ids.n++] = r->end;
        }
        st = on_ids(r, ids.ids, ids.n);
    }
cleanup:
    srf_ids_free(&ids);
    cli_prompts_close(&in);
    return st;
}

/* ---- the outputs ----------------------------------------------------------------------------- */

static srf_status tokenize_one(struct run *r, const char *path)
{
    r->file_read = 0;
    srf_status st = r->in->jsonl ? tokenize_lines(r, path) : tokenize_text(r, path);
    r->read += r->file_read;
    r->file_read = 0;
    return st;
}

/* An output that is one of the inputs would replace it. */
static srf_status check_inputs(struct run *r)
{
    const char *outs[] = {r->in->out, r->in->holdout_out};
    for (int k = 0; k < 2; k++)
        if (outs[k]) SRF_TRY(cli_check_apart(r->in->tokenizer, outs[k]));
    for (int k = 0; k < 2; k++)
        if (outs[k]) SRF_TRY(cli_check_output(outs[k]));
    for (int i = 0; i < r->in->n_texts; i++) {
        struct stat text;
        const char *path = r->in->texts[i];
        if (strcmp(path, "-") == 0) continue;
        SRF_FAIL_IF(stat(path, &text) != 0, SRF_IO, "%s: %s", path, strerror(errno));
        SRF_FAIL_IF(S_ISDIR(text.st_mode), SRF_IO, "%s: expected a text, found a directory", path);
        r->total += text.st_size;
        for (int k = 0; k < 2; k++)
            if (outs[k]) SRF_TRY(cli_check_apart(path, outs[k]));
    }
    return SRF_OK;
}

/* Both outputs or none: the second is removed again if the first cannot be written. */
static srf_status finish(struct run *r)
{
    struct srf_tokenset_writer *kept = r->kept.writer, *held = r->held.writer;
    SRF_FAIL_IF(r->kept.tokens == 0, SRF_INVALID, "the texts are empty: no tokens");
    SRF_FAIL_IF(held && r->held.tokens == 0, SRF_INVALID,
                "--holdout-every %lld: the texts have only %lld documents (%s separates them)",
                (long long)r->in->holdout_every, (long long)r->kept.documents, SRF_END_OF_TEXT);
    if (held) {
        r->held.writer = NULL;
        SRF_TRY(srf_tokenset_writer_finish(held));
    }
    r->kept.writer = NULL;
    srf_status st = srf_tokenset_writer_finish(kept);
    if (st != SRF_OK && held) unlink(r->in->holdout_out);
    return st;
}

static srf_status tokenize(struct run *r)
{
    const struct inputs *in = r->in;
    SRF_TRY(check_inputs(r));
    SRF_TRY(cli_load_tokenizer(in->tokenizer, &r->bpe));
    r->end = srf_bpe_token_id(r->bpe, SRF_END_OF_TEXT);
    SRF_TRY(srf_tokenset_writer_create(in->out, r->bpe, &r->kept.writer));
    if (in->holdout_out)
        SRF_TRY(srf_tokenset_writer_create(in->holdout_out, r->bpe, &r->held.writer));
    cli_progress_start(&r->progress, "tokenize", in->quiet);
    srf_status st = SRF_OK;
    for (int i = 0; i < in->n_texts && st == SRF_OK; i++) st = tokenize_one(r, in->texts[i]);
    cli_progress_end(&r->progress);
    SRF_FAIL_IF(cli_interrupted(), SRF_INTERRUPTED, "interrupted: nothing was written");
    SRF_TRY(st);
    return finish(r);
}

static void report_part(const char *path, int64_t tokens, int64_t documents)
{
    printf("%s: %lld tokens in %lld document%s\n", path, (long long)tokens, (long long)documents,
           documents == 1 ? "" : "s");
}

static void report(const struct run *r)
{
    double seconds = cli_now() - r->progress.start;
    double mb_per_s = seconds > 0 ? 1e-6 * (double)r->read / seconds : 0;
    int64_t tokens = r->kept.tokens + r->held.tokens;
    double bytes_per_token = (double)r->text_bytes / (double)tokens;
    char hash[17];
    srf_bpe_hash(r->bpe, hash);
    if (r->in->json) {
        printf("{\"tokens\": %lld, \"documents\": %lld, \"holdout_tokens\": %lld, "
               "\"holdout_documents\": %lld, \"bytes\": %lld, \"bytes_per_token\": %.4f, "
               "\"mb_per_s\": %.2f, \"seconds\": %.3f, \"tokenizer_hash\": \"%s\"}\n",
               (long long)r->kept.tokens, (long long)r->kept.documents, (long long)r->held.tokens,
               (long long)r->held.documents, (long long)r->text_bytes, bytes_per_token, mb_per_s,
               seconds, hash);
        return;
    }
    report_part(r->in->out, r->kept.tokens, r->kept.documents);
    if (r->in->holdout_out) report_part(r->in->holdout_out, r->held.tokens, r->held.documents);
    if (r->text_bytes) printf("%.3f bytes/token, ", bytes_per_token); /* not of lists of ids */
    printf("%.1f MB/s, tokenizer %s\n", mb_per_s, hash);
}

static int run_tokenize(const struct inputs *in)
{
    struct run r = {.in = in};
    cli_catch_signals(NULL);
    srf_status st = tokenize(&r);
    if (st == SRF_OK) report(&r);
    int code = st == SRF_OK ? EXIT_OK : cli_fail();
    srf_tokenset_writer_abort(r.kept.writer);
    srf_tokenset_writer_abort(r.held.writer);
    srf_bpe_free(r.bpe);
    return code;
}

/* ---- a token set back to text ---------------------------------------------------------------- */

static srf_status decode(struct srf_tokenset *ts, const struct srf_bpe *bpe)
{
    enum { BLOCK = 1 << 14 };
    int32_t ids[BLOCK];
    int64_t count = srf_tokenset_count(ts);
    for (int64_t at = 0; at < count; at += BLOCK) {
        int64_t n = count - at < BLOCK ? count - at : BLOCK;
        char *text;
        size_t n_text;
        SRF_TRY(srf_tokenset_read(ts, at, n, ids));
        SRF_TRY(srf_bpe_decode(bpe, ids, n, NULL, &text, &n_text));
        size_t written = fwrite(text, 1, n_text, stdout);
        srf__free(text);
        SRF_FAIL_IF(written != n_text, SRF_IO, "standard output: %s", strerror(errno));
    }
    SRF_FAIL_IF(fflush(stdout) != 0, SRF_IO, "standard output: %s", strerror(errno));
    return SRF_OK;
}

static int run_decode(const struct inputs *in)
{
    struct srf_bpe *bpe = NULL;
    struct srf_tokenset *ts = NULL;
    srf_status st = cli_load_tokenizer(in->tokenizer, &bpe);
    if (st == SRF_OK) st = srf_tokenset_open(in->texts[0], bpe, srf_bpe_vocab_size(bpe), &ts);
    if (st == SRF_OK) st = decode(ts, bpe);
    srf_tokenset_close(ts);
    srf_bpe_free(bpe);
    if (st == SRF_OK) return EXIT_OK;
    int code = cli_fail();
    clearerr(stdout); /* said already */
    return code;
}

static int check(const struct inputs *in)
{
    if (!in->tokenizer) return cli_usage_error("tokenize needs --tokenizer");
    if (in->decode) {
        if (in->n_texts != 1) return cli_usage_error("--decode takes one token set");
        if (in->out || in->holdout_out || in->holdout_every || in->jsonl)
            return cli_usage_error(
                "--decode prints: --out, --holdout and --jsonl belong to tokenizing");
        return EXIT_OK;
    }
    if (!in->out) return cli_usage_error("tokenize needs --out");
    if (!in->holdout_every != !in->holdout_out)
        return cli_usage_error("--holdout-every and --holdout-out belong together");
    if (in->holdout_out && strcmp(in->out, in->holdout_out) == 0)
        return cli_usage_error("--out and --holdout-out are the same file");
    return EXIT_OK;
}

int cmd_tokenize(int argc, char **argv)
{
    struct inputs in = {0};
    const struct cli_option options[] = {
        {"tokenizer", 0, CLI_STRING, &in.tokenizer, "T",
         "tokenizer.json, a directory, vocab.json, or a checkpoint", 0, 0},
        {"jsonl", 0, CLI_STRING, &in.jsonl, "KEY",
         "TEXT has a JSON object a line; its KEY is a document's text, or its token ids", 0, 0},
        {"out", 'o', CLI_STRING, &in.out, "D.h5", "the token set", 0, 0},
        {"holdout-every", 0, CLI_INT, &in.holdout_every, "N", "keep every N-th document apart ...",
         2, 1e9},
        {"holdout-out", 0, CLI_STRING, &in.holdout_out, "F.h5", "... in this token set", 0, 0},
        {"decode", 0, CLI_FLAG, &in.decode, NULL, "print the token set TEXT as text", 0, 0},
        {"quiet", 'q', CLI_FLAG, &in.quiet, NULL, "no progress", 0, 0},
        {"json", 0, CLI_FLAG, &in.json, NULL,
         "one JSON object: tokens, documents, holdout_tokens, holdout_documents, bytes, "
         "bytes_per_token, mb_per_s, seconds, tokenizer_hash",
         0, 0},
        {0}};
    int code;
    in.texts = calloc((size_t)argc, sizeof *in.texts);
    if (!in.texts) return cli_usage_error("out of memory");
    if (cli_parse(argc, argv, "srf tokenize TEXT... --tokenizer T --out D.h5 [options]",
                  "Turns texts into a token set. - is standard input. Each text starts a document, "
                  "and each\n" SRF_END_OF_TEXT
                  " in one ends a document; --jsonl puts it after each.",
                  options, in.texts, 1, argc, &in.n_texts, NULL, &code)) {
        code = check(&in);
        if (code == EXIT_OK) code = in.decode ? run_decode(&in) : run_tokenize(&in);
    }
    free(in.texts);
    return code;
}
