/* srf export: a native checkpoint -> transformers, llm.c, or the recurrent kind. */
#include "cli/common.h"

#include <string.h>

enum format { HF, LLMC, RECURRENT };

static const struct {
    const char *name, *what;
} formats[] = {{"hf", "transformers directory"},
               {"llmc", "llm.c checkpoint"},
               {"recurrent", "recurrent checkpoint"}};

/* What srf_hf_write writes. */
static const char *const hf_files[] = {"config.json", "model.safetensors", "tokenizer.json", NULL};

/* The features in force, drawn from their key where the file does not hold them. */
static srf_status freeze_features(struct srf_checkpoint *ck)
{
    if (ck->features_w) return SRF_OK;
    int64_t d = ck->config.c / ck->config.n_heads;
    SRF_TRY(SRF_ALLOC(ck->features_w, srf_checkpoint_features_count(ck)));
    SRF_TRY(SRF_ALLOC(ck->features_bias, srf_checkpoint_bias_count(ck)));
    return srf_attention_draw(&ck->attention, ck->config.n_layers,
                              ck->attention.per_head ? ck->config.n_heads : 1, d, NULL,
                              ck->features_w, ck->features_bias);
}

static srf_status export_as(struct srf_checkpoint *ck, const char *out, enum format format,
                            enum srf_dtype dtype)
{
    if (format == HF) return srf_checkpoint_export_hf(ck, out, dtype);
    if (format == LLMC) return srf_checkpoint_export_llmc(ck, out, dtype);
    SRF_FAIL_IF(ck->attention.kind != SRF_ATTN_SRF, SRF_INVALID,
                "a recurrent export needs SRF attention; this model has %s: run srf retrofit first",
                srf_attention_kind_name(ck->attention.kind));
    SRF_TRY(freeze_features(ck));
    ck->kind = SRF_CKPT_RECURRENT;
    return srf_checkpoint_save(ck, out);
}

static void report(const struct srf_checkpoint *ck, const char *in, const char *out,
                   enum format format, enum srf_dtype dtype, bool json)
{
    char attention[200];
    bool keeps = format == RECURRENT || ck->attention.kind == SRF_ATTN_SOFTMAX;
    bool tokenizer = ck->tokenizer_json && format != LLMC;
    srf_attention_describe(&ck->attention, attention, sizeof attention);
    if (json) {
        printf("{\"source\": ");
        cli_json_string(stdout, in, strlen(in));
        printf(", \"format\": \"%s\", \"dtype\": \"%s\", \"attention\": \"%s\", "
               "\"tokenizer\": %s, \"out\": ",
               formats[format].what, srf_dtype_name(dtype), keeps ? attention : "softmax",
               tokenizer ? "true" : "false");
        cli_json_string(stdout, out, strlen(out));
        printf("}\n");
        return;
    }
    printf("wrote %s (%s, %s)%s%s%s%s\n", out, formats[format].what, srf_dtype_name(dtype),
           format == RECURRENT ? ": " : "", format == RECURRENT ? attention : "",
           keeps ? ""
                 : "; the format has no place for the attention kind, readers will use softmax: ",
           keeps ? "" : attention);
    if (ck->tokenizer_json && !tokenizer)
        printf("the tokenizer is left out: the format has no place for it\n");
}

static int run(const char *in, const char *out, enum format format, enum srf_dtype dtype, bool json)
{
    struct srf_checkpoint *ck = NULL;
    srf_status st = cli_check_apart(in, out);
    if (st == SRF_OK && format != HF) st = cli_check_output(out);
    if (st == SRF_OK) st = cli_unfinished_on_signals(out, format == HF ? hf_files : NULL);
    if (st == SRF_OK) st = srf_checkpoint_load(in, NULL, &ck);
    if (st != SRF_OK) return cli_fail();
    int code = EXIT_OK;
    if (export_as(ck, out, format, dtype) == SRF_OK)
        report(ck, in, out, format, dtype, json);
    else
        code = cli_fail();
    srf_checkpoint_free(ck);
    return code;
}

int cmd_export(int argc, char **argv)
{
    const char *paths[2], *format_name = NULL, *dtype_name = "f32";
    bool json = false;
    const struct cli_option options[] = {
        {"format", 0, CLI_STRING, &format_name, "FORMAT", "hf, llmc or recurrent", 0, 0},
        {"dtype", 0, CLI_STRING, &dtype_name, "T", "hf: f32, f16, bf16; llmc: f32, bf16 (f32)", 0,
         0},
        {"json", 0, CLI_FLAG, &json, NULL,
         "one JSON object: source, out, format, dtype, attention and tokenizer as readers find "
         "them",
         0, 0},
        {0}};
    int code, format = -1, dtype = -1;
    if (!cli_parse(
            argc, argv, "srf export IN.h5 OUT --format hf|llmc|recurrent [options]",
            "Write a checkpoint as a transformers directory (hf: OUT must be new or empty), an\n"
            "llm.c model, or a recurrent checkpoint: weights, frozen features and tokenizer,\n"
            "all that generation needs. OUT is written as a whole or not at all.",
            options, paths, 2, 2, NULL, NULL, &code))
        return code;
    if (!format_name) return cli_usage_error("export needs --format hf, llmc or recurrent");
    for (int i = 0; i < 3; i++)
        if (strcmp(formats[i].name, format_name) == 0) format = i;
    if (format < 0)
        return cli_usage_error("--format %s: expected hf, llmc or recurrent", format_name);
    static const enum srf_dtype dtypes[] = {SRF_F32, SRF_F16, SRF_BF16};
    for (int i = 0; i < 3; i++)
        if (strcmp(srf_dtype_name(dtypes[i]), dtype_name) == 0) dtype = (int)dtypes[i];
    if (dtype < 0) return cli_usage_error("--dtype %s: expected f32, f16 or bf16", dtype_name);
    if (format == RECURRENT && dtype != SRF_F32)
        return cli_usage_error("--dtype %s: recurrent checkpoints are f32", dtype_name);
    return run(paths[0], paths[1], (enum format)format, (enum srf_dtype)dtype, json);
}
