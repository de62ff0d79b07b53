/* What the forms of srf generate share: one prompt (cmd_generate.c), a file of them
 * (generate_file.c). */
#pragma once
#include "cli/common.h"
#include "infer/state_file.h"

struct generate_options {
    const char *model, *prompt, *prompt_file, *input, *output, *order, *on_error, *state_in,
        *state_out, *prefix;
    int64_t n, batch, rows;
    uint64_t seed;
    bool json, quiet, ignore_eos, resume, ids, state_bf16;
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
/* The states of a file into slots 0 .. batch - 1: as many as there are, or one into all. */
srf_status generate_read_states(struct srf_states *s, struct srf_engine *e, int64_t batch,
                                struct srf_state_info *infos);
/* Feeds what is pending and ids, all but the last, which is pending then. The slot's own state and
 * position before are those of info (zeros for a fresh slot, with pending -1). */
srf_status generate_feed(struct srf_engine *e, int64_t slot, const struct srf_ids *ids,
                         struct srf_state_info *info);
/* What all prompts of --input go on from, by --state-in and --prefix, into a slot. The prefix's
 * last token waits in info, to go before each prompt: an empty one has something to be fed, too. */
srf_status generate_fill_shared(const struct generate_options *in, const struct generate_model *m,
                                struct srf_engine *e, int64_t slot, struct srf_state_info *info);
/* 16 hex digits and NUL that tell a slot's state, and what is pending there, from others. */
srf_status generate_shared_hash(const struct srf_engine *e, int64_t slot,
                                const struct srf_state_info *info, char hex[17]);
/* The engine's settings but for its slots. */
struct srf_engine_config generate_config(const struct generate_options *in,
                                         const struct generate_model *m);
/* Tokens to ask the engine for at once: a GPU has the next step begun before its last is seen. */
int64_t generate_steps(const struct generate_model *m);

/* For --help. */
#define GENERATE_STATE_HELP                                                                        \
    "--state-out keeps where the texts end (-n 0: after the prompt); --state-in goes on from\n"    \
    "there, by the same model, with --prompt as what is said next; one state serves a whole "      \
    "batch,\n"                                                                                     \
    "and all prompts of --input. --prefix is fed once and goes before every prompt of --input.\n"
#define GENERATE_FILE_HELP                                                                         \
    "--input: a JSON object a line, with \"prompt\" (text) or \"tokens\" (ids) and, if wanted,\n"  \
    "\"id\" (any JSON, copied), \"n\", \"seed\", \"stop\" (a text or several). --output: a line "  \
    "a\n"                                                                                          \
    "prompt, synced to the disk every few seconds, with OUT.settings.json beside it. After a\n"    \
    "Ctrl-C or a crash the same command with --resume answers what is missing, nothing twice.\n"
/* srf generate --input: its exit code. */
int generate_file(const struct generate_options *in);
