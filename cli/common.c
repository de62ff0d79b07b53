#include "cli/common.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

srf_status cli_open_device(const struct cli_device *d, struct srf_ctx **out)
{
    enum srf_dtype dtype = SRF_F32;
    if (strcmp(d->dtype, "f64") == 0)
        dtype = SRF_F64;
    else if (strcmp(d->dtype, "bf16") == 0)
        dtype = SRF_BF16;
    else
        SRF_FAIL_IF(strcmp(d->dtype, "f32") != 0, SRF_INVALID,
                    "--dtype %s: expected f32, f64 or bf16", d->dtype);
    return srf_ctx_create(d->device, dtype, (int)d->threads, out);
}

srf_status cli_set_attention(const struct cli_attention *a, int64_t head_size,
                             struct srf_attention_config *attention)
{
    if (a->kind) {
        SRF_FAIL_IF(strcmp(a->kind, "softmax") != 0 && strcmp(a->kind, "srf") != 0, SRF_INVALID,
                    "--attention %s: expected softmax or srf", a->kind);
        attention->kind = strcmp(a->kind, "srf") == 0 ? SRF_ATTN_SRF : SRF_ATTN_SOFTMAX;
    }
    if (a->features) SRF_TRY(srf_feature_kind_parse(a->features, &attention->features));
    if (a->rotation) SRF_TRY(srf_rotation_parse(a->rotation, &attention->rotation));
    if (a->m != CLI_NONE) attention->m = a->m;
    if (a->window != CLI_NONE) attention->window = a->window;
    if (a->oprf_a <= 0) attention->oprf_a = a->oprf_a;
    if (a->share_heads) attention->per_head = false;
    if (a->normalize_rows) attention->normalize_rows = true;
    if (a->seed != UINT64_MAX) attention->seed = a->seed;
    if (a->draw != UINT64_MAX) attention->draw = a->draw;
    return srf_attention_check(attention, head_size);
}

srf_status cli_tokenizer(const struct srf_checkpoint *ck, const char *needed_for,
                         struct srf_bpe **out)
{
    SRF_FAIL_IF(!ck->tokenizer_json, SRF_INVALID,
                "the model holds no tokenizer, which %s needs: import it from a directory with one",
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

srf_status cli_read_text(const char *path, char **text)
{
    *text = NULL;
    FILE *f = fopen(path, "rb");
    SRF_FAIL_IF(!f, SRF_IO, "%s: %s", path, strerror(errno));
    srf_status st = SRF_OK;
    size_t cap = 1 << 16, n = 0;
    char *p = srf__alloc(cap, 1);
    SRF_FAIL_GO_IF(!p, SRF_NOMEM, "%s: out of memory", path);
    for (;;) {
        n += fread(p + n, 1, cap - 1 - n, f);
        SRF_FAIL_GO_IF(ferror(f), SRF_IO, "%s: %s", path, strerror(errno));
        if (n < cap - 1) break;
        SRF_FAIL_GO_IF(cap > 1 << 26, SRF_FORMAT, "%s: larger than 64 MB: not a config", path);
        char *q = srf__realloc(p, n, 2 * cap, 1);
        SRF_FAIL_GO_IF(!q, SRF_NOMEM, "%s: out of memory", path);
        p = q;
        cap *= 2;
    }
    p[n] = '\0';
    SRF_FAIL_GO_IF(strlen(p) != n, SRF_FORMAT, "%s: holds a zero byte: not a text file", path);
    *text = p;
    p = NULL;
cleanup:
    srf__free(p);
    fclose(f);
    return st;
}

/* The flag of the signal handler: the one thing a handler may write. */
static volatile sig_atomic_t interrupted;

static void on_signal(int sig)
{
    (void)sig;
    interrupted = 1;
}

void cli_catch_signals(void)
{
    /* SA_RESETHAND: the second Ctrl-C is not to be argued with. */
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = (int)SA_RESETHAND};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

bool cli_interrupted(void)
{
    return interrupted;
}

void cli_json_string(FILE *to, const char *text, size_t n)
{
    fputc('"', to);
    for (size_t i = 0; i < n; i++) {
        unsigned char ch = (unsigned char)text[i];
        if (ch == '"' || ch == '\\')
            fprintf(to, "\\%c", ch);
        else if (ch == '\n')
            fputs("\\n", to);
        else if (ch < 32 || ch == 127)
            fprintf(to, "\\u%04x", ch);
        else
            fputc(ch, to);
    }
    fputc('"', to);
}
