/* What the forms of srf generate share: one prompt (cmd_generate.c), a file of them
 * (generate_file.c). */
#pragma once
#include "cli/common.h"
#include "infer/engine.h"

struct generate_options {
    const char *model, *prompt, *prompt_file, *input, *output, *order, *on_error;
    int64_t n, batch, chunk;
    uint64_t seed;
    bool json, quiet, ignore_eos, resume, ids;
    struct cli_strings stop;
    struct srf_sampler_config sampler;
    struct cli_device device;
    struct cli_attention attention;
    struct cli_positions positions;
};

struct generate_model {
    struct srf_ctx *ctx;
    struct srf_checkpoint *ck;
    struct srf_bpe *bpe; /* NULL where the model has none */
    enum srf_positions positions;
};
/* Opens the device and the model as the options say. */
srf_status generate_open(const struct generate_options *in, struct generate_model *m);
void generate_close(struct generate_model *m); /* zeroed is fine */

/* The ids of a prompt; those of an empty one are its start token. SRF_INVALID if there is none. */
srf_status generate_start(const struct generate_model *m, struct srf_ids *ids);
/* How many tokens can follow a prompt of so many: the last one is never fed. n: those asked for, or
 * CLI_NONE: up to 100. SRF_INVALID if there is no room for them. */
srf_status generate_room(const struct generate_model *m, int64_t n_prompt, int64_t *n);
/* The engine's settings but for its slots. */
struct srf_engine_config generate_config(const struct generate_options *in,
                                         const struct generate_model *m);

/* For --help. */
#define GENERATE_FILE_HELP                                                                         \
    "--input: a JSON object a line, with \"prompt\" (text) or \"tokens\" (ids) and, if wanted,\n"  \
    "\"id\" (any JSON, copied), \"n\", \"seed\", \"stop\" (a text or several). --output: a line "  \
    "a\n"                                                                                          \
    "prompt, synced to the disk every few seconds, with OUT.settings.json beside it. After a\n"    \
    "Ctrl-C or a crash the same command with --resume answers what is missing, nothing twice.\n"
/* srf generate --input: its exit code. */
int generate_file(const struct generate_options *in);
