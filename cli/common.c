#include "cli/common.h"
#include "data/file.h"
#include "kernels/attn_fast.h"
#include "kernels/grow.h"

#include <errno.h>
#include <limits.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

srf_status cli_open_device(const struct cli_device *d, struct srf_ctx **out)
{
    static const enum srf_dtype dtypes[] = {SRF_BF16, SRF_F32, SRF_F64};
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (strcmp(d->dtype, srf_dtype_name(dtypes[i])) == 0)
            return srf_ctx_create(d->device, dtypes[i], (int)d->threads, out);
    SRF_FAIL_IF(strcmp(d->dtype, "auto") != 0, SRF_INVALID,
                "--dtype %s: expected auto, bf16, f32 or f64", d->dtype);
    bool any = strcmp(d->device, "auto") == 0;
    if (!any && strcmp(d->device, "cuda") != 0)
        return srf_ctx_create(d->device, SRF_F32, (int)d->threads, out);
    srf_status st = srf_ctx_create("cuda", SRF_BF16, (int)d->threads, out);
    if (!any || st != SRF_UNSUPPORTED) return st;
    srf_error_clear();
    return srf_ctx_create("cpu", SRF_F32, (int)d->threads, out);
}

int64_t cli_tokens_at_once(const struct srf_ctx *ctx, int64_t on_cpu)
{
    return strcmp(ctx->be->name, "cpu") == 0 ? on_cpu : 32768;
}

srf_status cli_set_positions(const struct cli_positions *p, struct srf_checkpoint *ck,
                             enum srf_positions *out)
{
    static const char *const names[] = {
        [SRF_POS_ERROR] = "error", [SRF_POS_WRAP] = "wrap", [SRF_POS_CLAMP] = "clamp"};
    bool stretched = strcmp(p->policy, "interpolate") == 0;
    SRF_FAIL_IF(stretched != (p->max != CLI_NONE), SRF_INVALID,
                "--positions interpolate and --max-positions N belong together");
    *out = SRF_POS_ERROR;
    if (stretched) return srf_checkpoint_stretch_positions(ck, p->max);
    for (int i = 0; i < 3; i++) {
        *out = (enum srf_positions)i;
        if (strcmp(p->policy, names[i]) == 0) return SRF_OK;
    }
    SRF_FAIL_IF(true, SRF_INVALID, "--positions %s: expected error, wrap, clamp or interpolate",
                p->policy);
}

/* The first option given that attention of this kind has no use for, or NULL. */
static const char *useless_setting(const struct cli_attention *a, enum srf_attention_kind kind)
{
    enum {
        SRF = 1 << SRF_ATTN_SRF,
        MAPS = 1 << SRF_ATTN_HEDGEHOG | 1 << SRF_ATTN_T2R,
        WINDOW = 1 << SRF_ATTN_WINDOW
    };
    const struct {
        const char *name;
        bool given;
        int kinds;
    } options[] = {{"m", a->m != CLI_NONE, SRF | MAPS},
                   {"window", a->window != CLI_NONE, SRF | MAPS | WINDOW},
                   {"layer-windows", a->windows != NULL, SRF},
                   {"layer-m", a->layer_m != NULL, SRF},
                   {"sinks", a->sinks != CLI_NONE, WINDOW},
                   {"features", a->features != NULL, SRF},
                   {"rotation", a->rotation != NULL, SRF},
                   {"share-heads", a->share_heads, SRF},
                   {"normalize-rows", a->normalize_rows, SRF},
                   {"oprf-a", !isnan(a->oprf_a), SRF},
                   {"far", a->far != NULL, SRF},
                   {"draw", a->draw != UINT64_MAX, SRF},
                   {"features-seed", a->seed != UINT64_MAX, SRF | MAPS}};
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        if (options[i].given && !(options[i].kinds >> kind & 1)) return options[i].name;
    return NULL;
}

/* Only SRF attention has windows and features by layer: for a model that has them, the one for all
 * layers must be given. */
static srf_status one_for_all_layers(struct srf_attention_config *a)
{
    const char *kind = srf_attention_kind_name(a->kind);
    if (a->kind == SRF_ATTN_SOFTMAX || a->kind == SRF_ATTN_SRF) return SRF_OK;
    if (!srf_attention_has_features(a)) a->n_layer_m = 0;
    SRF_FAIL_IF(a->n_windows && a->n_layer_m, SRF_INVALID,
                "--attention %s: the model has windows and features by layer, %s attention one of "
                "each for all: add --window N --m N",
                kind, kind);
    SRF_FAIL_IF(a->n_windows, SRF_INVALID,
                "--attention %s: the model has windows by layer, %s attention one for all: add "
                "--window N",
                kind, kind);
    SRF_FAIL_IF(a->n_layer_m, SRF_INVALID,
                "--attention %s: the model has features by layer, %s attention one number for all: "
                "add --m N",
                kind, kind);
    return SRF_OK;
}

srf_status cli_set_attention(const struct cli_attention *a, int64_t head_size,
                             struct srf_attention_config *attention)
{
    SRF_FAIL_IF(a->kind && srf_attention_kind_parse(a->kind, &attention->kind) != SRF_OK,
                SRF_INVALID, "--attention %s: expected " CLI_ATTENTION_KINDS, a->kind);
    const char *useless = useless_setting(a, attention->kind);
    SRF_FAIL_IF(useless, SRF_INVALID, "--%s: the attention is %s: add --attention %s", useless,
                srf_attention_kind_name(attention->kind),
                strcmp(useless, "sinks") == 0 ? "window" : "srf");
    if (a->sinks != CLI_NONE) attention->sinks = a->sinks;
    if (a->features) SRF_TRY(srf_feature_kind_parse(a->features, &attention->features));
    if (a->rotation) SRF_TRY(srf_rotation_parse(a->rotation, &attention->rotation));
    SRF_FAIL_IF(a->layer_m && a->m != CLI_NONE, SRF_INVALID, "--m or --layer-m, not both");
    if (a->m != CLI_NONE) attention->m = a->m, attention->n_layer_m = 0;
    if (a->layer_m) SRF_TRY(srf_attention_set_layer_m(attention, a->layer_m));
    SRF_FAIL_IF(a->windows && a->window != CLI_NONE, SRF_INVALID,
                "--window or --layer-windows, not both");
    if (a->window != CLI_NONE) attention->window = a->window, attention->n_windows = 0;
    if (a->windows) SRF_TRY(srf_attention_set_windows(attention, a->windows));
    if (!isnan(a->oprf_a)) attention->oprf_a = a->oprf_a;
    if (a->share_heads) attention->per_head = false;
    if (a->normalize_rows) attention->normalize_rows = true;
    if (a->far) {
        attention->far_none = strcmp(a->far, "none") == 0;
        SRF_FAIL_IF(!attention->far_none && strcmp(a->far, "srf") != 0, SRF_INVALID,
                    "--far %s: expected srf or none", a->far);
    }
    if (a->seed != UINT64_MAX) attention->seed = a->seed;
    if (a->draw != UINT64_MAX) attention->draw = a->draw;
    SRF_TRY(one_for_all_layers(attention));
    return srf_attention_check(attention, head_size);
}

bool cli_slow_prefill(const struct srf_attention_config *a, const struct srf_model_config *c,
                      char *why, size_t size)
{
    int64_t d = c->c / c->n_heads;
    for (int64_t l = 0; l < c->n_layers; l++) {
        int64_t window = srf_attention_window(a, l), m = srf_attention_m(a, l);
        if (srf_attn_prefill_fast(d, m, window)) continue;
        if (srf_attn_prefill_fast(d, m, 0))
            snprintf(why, size, "window %lld: multiples of 32 up to 256 are taken by chunks",
                     (long long)window);
        else
            snprintf(why, size, "heads of %lld with %lld features", (long long)d, (long long)m);
        return true;
    }
    return false;
}

void cli_note_other_features(const struct srf_checkpoint *ck, const struct srf_attention_config *a)
{
    if (!ck->features_w || !srf_attention_has_features(a)) return;
    if (srf_attention_same_features(&ck->attention, a)) return;
    fputs("srf: note: the attention options ask for other features than those stored with the "
          "model: drawn anew\n",
          stderr);
}

srf_status cli_change_attention(const struct cli_attention *a, struct srf_checkpoint *ck)
{
    struct srf_attention_config changed = ck->attention;
    SRF_TRY(cli_set_attention(a, ck->config.c / ck->config.n_heads, &changed));
    cli_note_other_features(ck, &changed);
    srf_checkpoint_set_attention(ck, &changed);
    return SRF_OK;
}

srf_status cli_tokenizer(const struct srf_checkpoint *ck, const char *needed_for,
                         struct srf_bpe **out)
{
    SRF_FAIL_IF(
        !ck->tokenizer_json, SRF_INVALID,
        "the model holds no tokenizer, which %s needs: attach one by 'srf import MODEL OUT.h5 "
        "--tokenizer T'",
        needed_for);
    return srf_bpe_from_json(ck->tokenizer_json, strlen(ck->tokenizer_json), out);
}

srf_status cli_open_data(const char *path, const struct srf_checkpoint *ck, struct srf_bpe **bpe,
                         struct srf_tokenset **out)
{
    *bpe = NULL;
    if (ck->tokenizer_json) SRF_TRY(cli_tokenizer(ck, "text", bpe));
    srf_status st = srf_tokenset_open(path, *bpe, ck->config.vocab, out);
    if (st == SRF_OK) return st;
    srf_bpe_free(*bpe);
    *bpe = NULL;
    return st;
}

srf_status cli_check_output(const char *path)
{
    struct stat info;
    char *target, *dir;
    SRF_FAIL_IF(strcmp(path, "-") == 0, SRF_INVALID,
                "-: expected a file's path: this is no output for the standard output");
    SRF_TRY(srf__out_target(path, &target));
    srf_status st = srf__path_dir(target, &dir);
    srf__free(target);
    SRF_TRY(st);
    int error = stat(dir, &info) != 0      ? errno
                : !S_ISDIR(info.st_mode)   ? ENOTDIR
                : access(dir, W_OK | X_OK) ? errno
                                           : 0;
    srf__free(dir);
    SRF_FAIL_IF(error, SRF_IO, "%s: %s", path, strerror(error));
    return SRF_OK;
}

srf_status cli_check_output_dir(const char *path)
{
    struct stat info;
    char *at = srf__strdup(path), *parent;
    SRF_FAIL_IF(!at, SRF_NOMEM, "out of memory");
    while (stat(at, &info) != 0 && errno == ENOENT) {
        srf_status st = srf__path_dir(at, &parent);
        bool top = st != SRF_OK || strcmp(parent, at) == 0;
        srf__free(at);
        SRF_TRY(st);
        at = parent;
        if (top) break;
    }
    int error = stat(at, &info) != 0      ? errno
                : !S_ISDIR(info.st_mode)  ? ENOTDIR
                : access(at, W_OK | X_OK) ? errno
                                          : 0;
    srf__free(at);
    SRF_FAIL_IF(error, SRF_IO, "%s: %s", path, strerror(error));
    return SRF_OK;
}

static bool same_file(const struct stat *a, const struct stat *b)
{
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

srf_status cli_check_apart(const char *in, const char *out)
{
    struct stat input, output, parent;
    if (stat(in, &input) != 0 || stat(out, &output) != 0) return SRF_OK;
    bool clash = same_file(&input, &output);
    if (S_ISDIR(input.st_mode) && S_ISREG(output.st_mode)) {
        /* Ours beside a model's own files is fine, one of those files is not. */
        char *dir;
        size_t n = strlen(out);
        SRF_TRY(srf__path_dir(out, &dir));
        clash = stat(dir, &parent) == 0 && same_file(&input, &parent) &&
                (n < 3 || strcmp(out + n - 3, ".h5") != 0);
        srf__free(dir);
    }
    SRF_FAIL_IF(clash, SRF_INVALID, "%s: is the output, too: choose another path", in);
    return SRF_OK;
}

srf_status cli_load_tokenizer(const char *path, struct srf_bpe **out)
{
    struct srf_h5 *f;
    char *json = NULL, head[8] = "";
    struct stat info;
    FILE *file = stat(path, &info) == 0 && S_ISREG(info.st_mode) ? fopen(path, "rb") : NULL;
    if (file) {
        size_t n = fread(head, 1, sizeof head, file);
        (void)n; /* a shorter file is no HDF5 file, and head says so */
        fclose(file);
    }
    if (memcmp(head, "\x89HDF\r\n\x1a\n", sizeof head) != 0) return srf_bpe_load(path, out);
    srf_status st = SRF_OK;
    SRF_TRY(srf_h5_open(path, &f));
    SRF_FAIL_GO_IF(!srf_h5_has(f, "/tokenizer"), SRF_INVALID,
                   "%s: holds no tokenizer (expected /tokenizer)", path);
    SRF_TRY_GO(srf_h5_get_text(f, "/tokenizer", &json));
    st = srf_bpe_from_json(json, strlen(json), out);
    if (st != SRF_OK) srf__error_prefix("%s", path);
cleanup:
    srf__free(json);
    srf_h5_close(f);
    return st;
}

srf_status cli_read_text(const char *path, char **text)
{
    *text = NULL;
    bool standard = strcmp(path, "-") == 0;
    FILE *f = standard ? stdin : fopen(path, "rb");
    SRF_FAIL_IF(!f, SRF_IO, "%s: %s", path, strerror(errno));
    if (standard) path = "standard input";
    srf_status st = SRF_OK;
    size_t cap = 0, n = 0;
    char *p = NULL;
    for (;;) {
        SRF_TRY_GO(SRF_GROW(p, cap, n + (1 << 16)));
        n += fread(p + n, 1, cap - 1 - n, f);
        SRF_FAIL_GO_IF(ferror(f), SRF_IO, "%s: %s", path, strerror(errno));
        if (n < cap - 1) break;
        SRF_FAIL_GO_IF(cap > 1 << 26, SRF_FORMAT, "%s: larger than 64 MB", path);
    }
    p[n] = '\0';
    SRF_FAIL_GO_IF(strlen(p) != n, SRF_FORMAT, "%s: holds a zero byte: not a text file", path);
    *text = p;
    p = NULL;
cleanup:
    srf__free(p);
    if (!standard) fclose(f);
    return st;
}

/* What the signal handler writes, the flag, and what it says: nothing else is there for it. */
static volatile sig_atomic_t interrupted;
static const char *interrupted_words;

static void on_signal(int sig)
{
    (void)sig;
    interrupted = 1;
    if (!interrupted_words) return;
    ssize_t n = write(STDERR_FILENO, interrupted_words, strlen(interrupted_words));
    (void)n; /* the work counts, not the word of it */
}

void cli_catch_signals(const char *words)
{
    /* SA_RESETHAND: the second Ctrl-C is not to be argued with. */
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = (int)SA_RESETHAND};
    interrupted_words = words;
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

bool cli_interrupted(void)
{
    return interrupted;
}

bool cli_ready(int fd, short events, bool wait)
{
    struct pollfd p = {.fd = fd, .events = events};
    return poll(&p, 1, wait ? -1 : 0) > 0;
}

ssize_t cli_write(int fd, const char *from, size_t n)
{
    ssize_t done;
    while ((done = write(fd, from, n)) < 0 && (errno == EINTR || errno == EAGAIN))
        if (errno == EAGAIN) cli_ready(fd, POLLOUT, true);
    return done;
}

static char leftovers[8][PATH_MAX];
static volatile sig_atomic_t n_leftovers;

/* Ends the process by the signal itself once it returns: SA_RESETHAND. */
static void on_end(int sig)
{
    for (int i = 0; i < n_leftovers; i++)
        if (unlink(leftovers[i]) != 0) rmdir(leftovers[i]);
    raise(sig);
}

srf_status cli_remove_on_signals(const char *name)
{
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP};
    const struct sigaction action = {.sa_handler = on_end, .sa_flags = (int)SA_RESETHAND};
    SRF_FAIL_IF(strlen(name) >= sizeof *leftovers, SRF_IO, "%s: path too long", name);
    SRF_FAIL_IF(n_leftovers == sizeof leftovers / sizeof *leftovers, SRF_INVALID,
                "%s: one name too many to remove", name);
    snprintf(leftovers[n_leftovers], sizeof *leftovers, "%s", name);
    n_leftovers++;
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) {
        struct sigaction now; /* a job in the background ignores Ctrl-C, and goes on doing so */
        if (sigaction(signals[i], NULL, &now) != 0 || now.sa_handler == SIG_IGN) continue;
        sigaction(signals[i], &action, NULL);
    }
    return SRF_OK;
}

srf_status cli_unfinished_on_signals(const char *path, const char *const *files)
{
    char *target = NULL, *temp = NULL, *file = NULL, *part = NULL;
    srf_status st = SRF_OK;
    if (!files) SRF_TRY_GO(srf__out_target(path, &target));
    SRF_TRY_GO(srf__temp_name(target ? target : path, &temp));
    for (; files && *files; files++) {
        SRF_TRY_GO(srf__path_join(temp, *files, &file));
        SRF_TRY_GO(srf__temp_name(file, &part));
        SRF_TRY_GO(cli_remove_on_signals(file));
        SRF_TRY_GO(cli_remove_on_signals(part));
        srf__free(file);
        srf__free(part);
        file = part = NULL;
    }
    st = cli_remove_on_signals(temp);
cleanup:
    srf__free(target);
    srf__free(temp);
    srf__free(file);
    srf__free(part);
    return st;
}

int cli_utf8(const char *text, size_t n)
{
    const unsigned char *s = (const unsigned char *)text;
    if (n == 0) return -1;
    if (s[0] < 0x80) return 1;
    int length = s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : 4;
    if (s[0] < 0xC2 || s[0] > 0xF4) return 0;
    for (int i = 1; i < length; i++) {
        if ((size_t)i == n) return -1;
        /* The second byte excludes overlong forms, surrogates and what lies past U+10FFFF. */
        unsigned char low = 0x80, high = 0xBF;
        if (i == 1 && s[0] == 0xE0) low = 0xA0;
        if (i == 1 && s[0] == 0xED) high = 0x9F;
        if (i == 1 && s[0] == 0xF0) low = 0x90;
        if (i == 1 && s[0] == 0xF4) high = 0x8F;
        if (s[i] < low || s[i] > high) return 0;
    }
    return length;
}

void cli_json_string(FILE *to, const char *text, size_t n)
{
    fputc('"', to);
    for (size_t i = 0; i < n;) {
        unsigned char ch = (unsigned char)text[i];
        int length = cli_utf8(text + i, n - i);
        if (length <= 0)
            fputs("\\ufffd", to);
        else if (ch == '"' || ch == '\\')
            fprintf(to, "\\%c", ch);
        else if (ch == '\n')
            fputs("\\n", to);
        else if (ch < 32 || ch == 127)
            fprintf(to, "\\u%04x", ch);
        else
            fwrite(text + i, 1, (size_t)length, to);
        i += length > 0 ? (size_t)length : 1;
    }
    fputc('"', to);
}

void cli_json_number(FILE *to, double x)
{
    if (isfinite(x))
        fprintf(to, "%.9g", x);
    else
        fputs("null", to);
}
