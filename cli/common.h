/* What several commands share: the device, a model's tokenizer and data, attention options,
 * SIGINT. */
#pragma once
#include "cli/cli.h"
#include "data/tokenset.h"
#include "model/checkpoint.h"
#include <math.h>
#include <sys/types.h>

/* --device, --threads, --dtype */
struct cli_device {
    const char *device, *dtype;
    int64_t threads;
};
#define CLI_DEVICE_DEFAULT ((struct cli_device){.device = "auto", .dtype = "auto"})
/* clang-format off */
#define CLI_DEVICE_OPTIONS(d)                                                                      \
    {"device", 0, CLI_STRING, &(d).device, "NAME", "auto, cpu or cuda (auto)", 0, 0},              \
    {"threads", 0, CLI_INT, &(d).threads, "N", "CPU threads (OMP_NUM_THREADS, else all cores)",    \
     0, 4096},                                                                                     \
    {"dtype", 0, CLI_STRING, &(d).dtype, "T",                                                      \
     "bf16 (CUDA), f32, f64 (CPU); auto: the first of them (auto)", 0, 0}
/* clang-format on */
srf_status cli_open_device(const struct cli_device *d, struct srf_ctx **out);
/* How many tokens to run at once where nothing else is said: on the CPU few, for the caches. */
int64_t cli_tokens_at_once(const struct srf_ctx *ctx, int64_t on_cpu);

/* --attention and what belongs to it. Values that were not given keep those of the model. */
struct cli_attention {
    const char *kind, *features, *rotation;
    int64_t m, window, sinks;
    double oprf_a;
    bool share_heads, normalize_rows;
    const char *far, *windows, *layer_m;
    uint64_t seed, draw;
};
#define CLI_NONE INT64_MIN
#define CLI_ATTENTION_DEFAULT                                                                      \
    ((struct cli_attention){.m = CLI_NONE,                                                         \
                            .window = CLI_NONE,                                                    \
                            .sinks = CLI_NONE,                                                     \
                            .oprf_a = NAN,                                                         \
                            .seed = UINT64_MAX,                                                    \
                            .draw = UINT64_MAX})
#define CLI_ATTENTION_KINDS "softmax or srf; for comparisons: window, hedgehog, t2r"
/* clang-format off */
#define CLI_ATTENTION_OPTIONS(a)                                                                   \
    {"attention", 0, CLI_STRING, &(a).kind, "KIND", CLI_ATTENTION_KINDS " (the model's own)",      \
     0, 0},                                                                                        \
    {"sinks", 0, CLI_INT, &(a).sinks, "N",                                                         \
     "--attention window: the first N tokens are seen as well (0)", 0, 65536},                     \
    {"m", 'm', CLI_INT, &(a).m, "N", "random features per head (64)", 1, 65536},                   \
    {"window", 'W', CLI_INT, &(a).window, "N",                                                     \
     "block of N tokens attended exactly, with the one before it; 0 = pure SRF", 0, 65536},        \
    {"layer-windows", 0, CLI_STRING, &(a).windows, "W,W,...",                                      \
     "that of each layer, first to last, in place of one for all", 0, 0},                          \
    {"layer-m", 0, CLI_STRING, &(a).layer_m, "M,M,...",                                     \
     "random features of each layer, in place of --m", 0, 0},                                      \
    {"features", 0, CLI_STRING, &(a).features, "KIND",                                             \
     "iid, orthogonal, simplex or simplex+ (simplex)", 0, 0},                                      \
    {"rotation", 0, CLI_STRING, &(a).rotation, "KIND", "haar, or hd: the fast draw (haar)",        \
     0, 0},                                                                                        \
    {"share-heads", 0, CLI_FLAG, &(a).share_heads, NULL, "one draw per layer, not per head",       \
     0, 0},                                                                                        \
    {"normalize-rows", 0, CLI_FLAG, &(a).normalize_rows, NULL,                                     \
     "unit-norm projections: biased, for comparisons", 0, 0},                                      \
    {"oprf-a", 0, CLI_DOUBLE, &(a).oprf_a, "A", "OPRF parameter, <= 0 (0)", -1e6, 0},              \
    {"far", 0, CLI_STRING, &(a).far, "WHAT",                                                       \
     "beyond the window: srf, or none, for comparisons (srf)", 0, 0},                              \
    {"draw", 0, CLI_U64, &(a).draw, "N", "index of the draw (the model's own)", 0, 0},             \
    {"features-seed", 0, CLI_U64, &(a).seed, "N", "seed of the draws (the model's own)",           \
     0, 0}
/* clang-format on */
/* Apply to the model's own settings; SRF_INVALID names a wrong one, or one of no use to the
 * kind. */
srf_status cli_set_attention(const struct cli_attention *a, int64_t head_size,
                             struct srf_attention_config *attention);
/* The same to a checkpoint's, its stored features included; notes on stderr that they are not used
 * where the options ask for others. */
srf_status cli_change_attention(const struct cli_attention *a, struct srf_checkpoint *ck);
void cli_note_other_features(const struct srf_checkpoint *ck, const struct srf_attention_config *a);
/* Whether SRF attention's prefill on CUDA takes a layer token by token, and why. */
bool cli_slow_prefill(const struct srf_attention_config *a, const struct srf_model_config *c,
                      char *why, size_t size);

/* --positions and --max-positions: what stands for positions past the learned ones. */
struct cli_positions {
    const char *policy;
    int64_t max;
};
#define CLI_POSITIONS_DEFAULT ((struct cli_positions){.policy = "error", .max = CLI_NONE})
/* clang-format off */
#define CLI_POSITIONS_OPTIONS(p)                                                                   \
    {"positions", 0, CLI_STRING, &(p).policy, "POLICY",                                            \
     "past the learned positions: error, wrap, clamp, interpolate (error)", 0, 0},                 \
    {"max-positions", 0, CLI_INT, &(p).max, "N", "interpolate: to how many positions", 2,          \
     1 << 24}
/* clang-format on */
/* For --help. */
#define CLI_POSITIONS_HELP                                                                         \
    "A model with learned positions (GPT-2) has seen none past its last. --positions says what\n"  \
    "to do there: error refuses; wrap starts over at the first (position p is p mod n); clamp\n"   \
    "stays at the last; interpolate stretches the table at load to --max-positions rows, which\n"  \
    "moves every position, the early ones too. srf eval --seq-len shows what each one costs."
/* The policy; interpolate stretches the checkpoint's table. SRF_INVALID names a wrong one. */
srf_status cli_set_positions(const struct cli_positions *p, struct srf_checkpoint *ck,
                             enum srf_positions *out);

/* The tokenizer inside a checkpoint; SRF_INVALID if it has none (needed: what for). */
srf_status cli_tokenizer(const struct srf_checkpoint *ck, const char *needed_for,
                         struct srf_bpe **out);
/* --data for a model: token set, llm.c shards, .npy, or text with the model's tokenizer. The
 * tokenizer, if there is one, is left in *bpe for the caller to free after the set. */
srf_status cli_open_data(const char *path, const struct srf_checkpoint *ck, struct srf_bpe **bpe,
                         struct srf_tokenset **out);

/* A tokenizer's own files (as srf_bpe_load), or the one inside a native checkpoint. */
srf_status cli_load_tokenizer(const char *path, struct srf_bpe **out);

/* Before long work: whether a file can be written at `path`. */
srf_status cli_check_output(const char *path);
/* The same of a directory that is made if need be, with those above it. */
srf_status cli_check_output_dir(const char *path);
/* SRF_INVALID if writing `out` would replace `in`, or a file of the directory `in`. */
srf_status cli_check_apart(const char *in, const char *out);

/* A whole text file (a config.json, a prompt), or standard input (-); srf__free. */
srf_status cli_read_text(const char *path, char **text);

/* SIGINT and SIGTERM set a flag instead of ending the process; the second one ends it. words: what
 * the first one says at once, where finishing may take a while, or NULL. */
void cli_catch_signals(const char *words);
bool cli_interrupted(void);

/* Of a command that does not catch signals: the name (a file, or a directory that is empty by then)
 * is removed before one ends it. */
srf_status cli_remove_on_signals(const char *name);
/* The same of what is written of the output `path` under its temporary name. files: a directory
 * with these files in it, ended by NULL; or NULL. */
srf_status cli_unfinished_on_signals(const char *path, const char *const *files);

/* Whether a file can be read (POLLIN) or written (POLLOUT) without waiting; wait: once it can, or a
 * signal came. */
bool cli_ready(int fd, short events, bool wait);
/* As write(2), but goes on after a signal and waits for a file that does not block. */
ssize_t cli_write(int fd, const char *from, size_t n);
/* Length of the UTF-8 character that text[0..n) starts with; 0 if it starts with none, -1 if more
 * bytes could make it one. */
int cli_utf8(const char *text, size_t n);
/* U+FFFD: what stands for an id that a model made and its tokenizer lacks, since vocabularies may
 * be padded (srf_bpe_decode). */
#define CLI_UNKNOWN "\xEF\xBF\xBD"
/* Print a string as a JSON string literal, quotes included. A byte that is no UTF-8 becomes
 * U+FFFD. */
void cli_json_string(FILE *to, const char *text, size_t n);
/* Print a number as JSON: null where it is not finite. */
void cli_json_number(FILE *to, double x);
