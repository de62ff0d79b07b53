/* The command line: one table of commands, one table of options each; --help comes from the tables.
 */
#pragma once
#include "kernels/status.h"
#include <stdbool.h>
#include <stdio.h>

enum { EXIT_OK = 0, EXIT_FAILED = 1, EXIT_USAGE = 2 };

/* X(name, summary): srf <name> is int cmd_<name>(int argc, char **argv) in cli/cmd_<name>.c */
#define SRF_COMMAND_LIST(X)                                                                        \
    X(import, "read a pretrained checkpoint into the native format")                               \
    X(export, "write a native checkpoint as transformers, llm.c or recurrent")                     \
    X(tokenize, "turn text into a token set")                                                      \
    X(info, "say what a file holds")                                                               \
    X(train, "train a model, from scratch or from a checkpoint")                                   \
    X(retrofit, "swap softmax for SRF attention and fine-tune: the main job")                      \
    X(eval, "perplexity on a token set")                                                           \
    X(validate, "error of the approximation against softmax, with pictures")                       \
    X(generate, "generate text at constant memory")                                                \
    X(bench, "measure ops, steps and decoding beside their floors")

#define X(name, summary) int cmd_##name(int argc, char **argv);
SRF_COMMAND_LIST(X)
#undef X

enum cli_type {
    CLI_FLAG,
    CLI_INT,
    CLI_DOUBLE,
    CLI_STRING,
    CLI_U64,
    CLI_STRINGS,
    CLI_HEADING /* no option: what --help says before those that follow */
};

/* An option that may be given several times. */
struct cli_strings {
    const char *text[16];
    int n;
};

/* A row of a table: --help's words for the options after it. */
#define CLI_HEADING_ROW(text)                                                                      \
    {                                                                                              \
        "", 0, CLI_HEADING, NULL, NULL, text, 0, 0                                                 \
    }

struct cli_option {
    const char *name; /* without the dashes */
    char short_name;  /* or 0 */
    enum cli_type type;
    void *dest;          /* bool *, int64_t *, double *, const char **, uint64_t *, cli_strings * */
    const char *metavar; /* "N"; NULL for flags */
    const char *help;    /* one line; say the default */
    double min, max;     /* range of numbers, where min < max */
};

/* Parse argv[1..]. options ends with a row whose name is NULL. `positional` takes up to
 * max_positional arguments that are no options; fewer than min_positional, an unknown option or a
 * bad number is a usage error: printed, and *exit_code set to EXIT_USAGE. --help prints usage and
 * sets EXIT_OK. Returns false if the command should return *exit_code now. `set`, if not NULL, gets
 * for each option row whether it was given. */
bool cli_parse(int argc, char **argv, const char *usage, const char *about,
               const struct cli_option *options, const char **positional, int min_positional,
               int max_positional, int *n_positional, bool *set, int *exit_code);

/* The first thing in main: cli/start.c says what it ends. */
void cli_started(void);

/* Print "srf: error: ..." from the library's newest failure (its trace too with SRF_TRACE=1);
 * returns EXIT_FAILED. */
int cli_fail(void);
/* Print "srf: error: ..." for a mistake of the command line; returns EXIT_USAGE. */
int cli_usage_error(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* What a mistyped word may have been meant for, of the names that are offered; name: NULL if none
 * is near. */
struct cli_nearest {
    const char *word, *name;
    size_t n; /* of word, which need not end there */
    int distance;
};
void cli_nearest_start(struct cli_nearest *near, const char *word, size_t n);
void cli_nearest_offer(struct cli_nearest *near, const char *name);

/* A progress line with ETA on stderr: rewritten in place on a terminal, one line every `every_s`
 * seconds elsewhere. */
struct cli_progress {
    const char *what;
    double start, last, every_s;
    bool terminal, quiet;
};
void cli_progress_start(struct cli_progress *p, const char *what, bool quiet);
/* done of total (same unit; total 0: not known); note: what else to show, or NULL. */
void cli_progress_update(struct cli_progress *p, double done, double total, const char *note);
void cli_progress_end(struct cli_progress *p);

double cli_now(void); /* seconds, monotonic */
/* Mean and standard deviation of n > 1 values. */
void cli_spread(const double *x, int64_t n, double *mean, double *sd);
