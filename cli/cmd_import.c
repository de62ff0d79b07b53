/* srf import: any checkpoint -> a native one. */
#include "cli/common.h"

#include <string.h>

static int64_t parameters(const struct srf_checkpoint *ck)
{
    int64_t n = 0;
    for (int64_t i = 0; i < ck->table.n; i++) n += ck->table.rows[i].count;
    return n;
}

/* --tokenizer in place of the source's own. */
static srf_status attach_tokenizer(struct srf_checkpoint *ck, const char *path)
{
    struct srf_bpe *bpe;
    SRF_TRY(cli_load_tokenizer(path, &bpe));
    srf__free(ck->tokenizer_json);
    srf_status st = srf_bpe_to_json(bpe, &ck->tokenizer_json);
    srf_bpe_free(bpe);
    return st;
}

/* Tokens of the checkpoint's tokenizer, 0 if it has none. A tokenizer that cannot be read, or has
 * more tokens than the model, would fail later, with the source long gone. */
static srf_status check_tokenizer(const struct srf_checkpoint *ck, int64_t *n)
{
    *n = 0;
    if (!ck->tokenizer_json) return SRF_OK;
    struct srf_bpe *bpe;
    SRF_TRY(cli_tokenizer(ck, "import", &bpe));
    *n = srf_bpe_vocab_size(bpe);
    srf_bpe_free(bpe);
    SRF_FAIL_IF(*n > ck->config.vocab, SRF_MISMATCH,
                "the tokenizer has %lld tokens, the model's vocabulary %lld", (long long)*n,
                (long long)ck->config.vocab);
    return SRF_OK;
}

struct imported {
    struct srf_checkpoint *ck;
    enum srf_source_kind kind;
    int64_t tokens;
};

static srf_status import(const char *src, const char *out, const char *config_path,
                         const char *tokenizer, int64_t max_positions, struct imported *r)
{
    char *config = NULL;
    struct srf_source *source;
    const char *inputs[] = {src, config_path, tokenizer};
    for (int i = 0; i < 3; i++)
        if (inputs[i]) SRF_TRY(cli_check_apart(inputs[i], out));
    SRF_TRY(cli_check_output(out));
    SRF_TRY(cli_unfinished_on_signals(out, NULL));
    if (config_path) SRF_TRY(cli_read_text(config_path, &config));
    srf_status st = srf_source_open(src, &source);
    if (st == SRF_OK) {
        r->kind = srf_source_kind(source);
        srf_source_close(source);
        st = srf_checkpoint_load(src, config, &r->ck);
    }
    srf__free(config);
    SRF_TRY(st);
    if (max_positions != CLI_NONE) SRF_TRY(srf_checkpoint_stretch_positions(r->ck, max_positions));
    if (tokenizer) SRF_TRY(attach_tokenizer(r->ck, tokenizer));
    st = check_tokenizer(r->ck, &r->tokens);
    if (st != SRF_OK) srf__error_prefix("%s", tokenizer ? tokenizer : src);
    SRF_TRY(st);
    /* The optimizer's state of a training checkpoint is not the model's. */
    if (r->ck->kind == SRF_CKPT_TRAINING) r->ck->kind = SRF_CKPT_WEIGHTS;
    return srf_checkpoint_save(r->ck, out);
}

static void report(const struct imported *r, const char *src, const char *out, bool json)
{
    const struct srf_model_config *c = &r->ck->config;
    const char *kind = srf_source_kind_name(r->kind);
    if (json) {
        printf("{\"source\": ");
        cli_json_string(stdout, src, strlen(src));
        printf(", \"format\": \"%s\", \"layers\": %lld, \"heads\": %lld, \"width\": %lld, "
               "\"positions\": %lld, \"vocab\": %lld, \"parameters\": %lld, \"tokenizer\": %s, "
               "\"tokens\": %lld, \"out\": ",
               kind, (long long)c->n_layers, (long long)c->n_heads, (long long)c->c,
               (long long)c->n_pos, (long long)c->vocab, (long long)parameters(r->ck),
               r->tokens ? "true" : "false", (long long)r->tokens);
        cli_json_string(stdout, out, strlen(out));
        printf("}\n");
        return;
    }
    printf("%s (%s): %lld layers, %lld heads of %lld, %lld positions, vocabulary %lld, "
           "%lld parameters; ",
           src, kind, (long long)c->n_layers, (long long)c->n_heads, (long long)(c->c / c->n_heads),
           (long long)c->n_pos, (long long)c->vocab, (long long)parameters(r->ck));
    if (r->tokens)
        printf("tokenizer of %lld tokens\n", (long long)r->tokens);
    else
        printf("no tokenizer\n");
    printf("wrote %s\n", out);
}

int cmd_import(int argc, char **argv)
{
    const char *paths[2], *config = NULL, *tokenizer = NULL;
    int64_t max_positions = CLI_NONE;
    bool json = false;
    const struct cli_option options[] = {
        {"config", 0, CLI_STRING, &config, "C.json",
         "the model's config.json (beside the weights, or in the file)", 0, 0},
        {"tokenizer", 0, CLI_STRING, &tokenizer, "T",
         "tokenizer.json, a directory, vocab.json, or a checkpoint (the source's)", 0, 0},
        {"max-positions", 0, CLI_INT, &max_positions, "N",
         "stretch the learned positions to N, to train on for longer contexts", 2, 1 << 24},
        {"json", 0, CLI_FLAG, &json, NULL,
         "one JSON object: source, out, format, the sizes, tokenizer, tokens (of it)", 0, 0},
        {0}};
    int code;
    if (!cli_parse(
            argc, argv, "srf import SRC OUT.h5 [options]",
            "Read a pretrained model into a native checkpoint, tokenizer included. SRC is a\n"
            "transformers directory, a .safetensors file, an llm.c model (.bin) or a native\n"
            "checkpoint. OUT.h5 is replaced as a whole or left as it was.",
            options, paths, 2, 2, NULL, NULL, &code))
        return code;
    struct imported r = {0};
    if (import(paths[0], paths[1], config, tokenizer, max_positions, &r) == SRF_OK)
        report(&r, paths[0], paths[1], json);
    else
        code = cli_fail();
    srf_checkpoint_free(r.ck);
    return code;
}
