/* srf tokenize: texts to a token set, and a token set back to text (--decode). */
#include "cli/common.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct inputs {
    const char **texts;
    int n_texts;
    const char *tokenizer, *out, *holdout_out;
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
    struct part kept, held; /* held: every holdout_every-th document */
    struct part *now;       /* of the document being written, NULL between documents */
    int32_t end;            /* id of <|endoftext|>, -1 = none */
    int64_t bytes, file_bytes, total_bytes; /* read of earlier texts, of this one; to be read */
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
             1e-6 * (double)(r->bytes + r->file_bytes) / (cli_now() - r->progress.start));
    cli_progress_update(&r->progress, (double)(r->bytes + r->file_bytes), (double)r->total_bytes,
                        note);
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

static srf_status tokenize_one(struct run *r, const char *path)
{
    bool standard = strcmp(path, "-") == 0;
    FILE *f = standard ? fopencookie(NULL, "rb", (cookie_io_functions_t){.read = read_standard})
                       : fopen(path, "rb");
    SRF_FAIL_IF(!f, SRF_IO, "%s: %s", path, strerror(errno));
    r->now = NULL;
    r->file_bytes = 0;
    srf_status st = srf_bpe_encode_stream(r->bpe, f, true, on_ids, r, &r->file_bytes);
    r->bytes += r->file_bytes;
    r->file_bytes = 0;
    fclose(f);
    if (st != SRF_OK) srf__error_prefix("%s", standard ? "standard input" : path);
    return st;
}

/* An output that is one of the inputs would replace it. */
static srf_status check_inputs(struct run *r)
{
    const char *outs[] = {r->in->out, r->in->holdout_out};
    for (int k = 0; k < 2; k++)
        if (outs[k]) SRF_TRY(cli_check_apart(r->in->tokenizer, outs[k]));
    for (int i = 0; i < r->in->n_texts; i++) {
        struct stat text;
        const char *path = r->in->texts[i];
        if (strcmp(path, "-") == 0) continue;
        SRF_FAIL_IF(stat(path, &text) != 0, SRF_IO, "%s: %s", path, strerror(errno));
        SRF_FAIL_IF(S_ISDIR(text.st_mode), SRF_IO, "%s: expected a text, found a directory", path);
        r->total_bytes += text.st_size;
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

static void report(const struct run *r)
{
    double seconds = cli_now() - r->progress.start;
    double mb_per_s = seconds > 0 ? 1e-6 * (double)r->bytes / seconds : 0;
    int64_t tokens = r->kept.tokens + r->held.tokens;
    double bytes_per_token = (double)r->bytes / (double)tokens;
    char hash[17];
    srf_bpe_hash(r->bpe, hash);
    if (r->in->json) {
        printf("{\"tokens\": %lld, \"documents\": %lld, \"holdout_tokens\": %lld, "
               "\"holdout_documents\": %lld, \"bytes\": %lld, \"bytes_per_token\": %.4f, "
               "\"mb_per_s\": %.2f, \"seconds\": %.3f, \"tokenizer_hash\": \"%s\"}\n",
               (long long)r->kept.tokens, (long long)r->kept.documents, (long long)r->held.tokens,
               (long long)r->held.documents, (long long)r->bytes, bytes_per_token, mb_per_s,
               seconds, hash);
        return;
    }
    printf("%s: %lld tokens in %lld documents\n", r->in->out, (long long)r->kept.tokens,
           (long long)r->kept.documents);
    if (r->in->holdout_out)
        printf("%s: %lld tokens in %lld documents\n", r->in->holdout_out, (long long)r->held.tokens,
               (long long)r->held.documents);
    printf("%.3f bytes/token, %.1f MB/s, tokenizer %s\n", bytes_per_token, mb_per_s, hash);
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
        SRF_TRY(srf_bpe_decode(bpe, ids, n, &text, &n_text));
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
        if (in->out || in->holdout_out || in->holdout_every)
            return cli_usage_error("--decode prints: --out and --holdout belong to tokenizing");
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
                  "and each\n" SRF_END_OF_TEXT " in one ends a document.",
                  options, in.texts, 1, argc, &in.n_texts, NULL, &code)) {
        code = check(&in);
        if (code == EXIT_OK) code = in.decode ? run_decode(&in) : run_tokenize(&in);
    }
    free(in.texts);
    return code;
}
