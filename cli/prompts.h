/* The input of srf generate --input: one prompt a line, a JSON object each, read as they are
 * needed. */
#pragma once
#include "cli/common.h"
#include <jansson.h>

struct cli_prompt {
    int64_t line;  /* from 1 */
    int64_t bytes; /* of the line */
    json_t *id;    /* NULL without */
    struct srf_ids tokens;
    int64_t n; /* CLI_NONE without */
    bool has_seed;
    uint64_t seed;
    json_t *stop; /* array of strings, none of them empty; NULL without */
};
void cli_prompt_free(struct cli_prompt *p); /* zeroed is fine */

struct cli_prompts {
    const char *path;
    int fd;
    int64_t size;         /* bytes; 0: not known */
    int64_t line;         /* lines read */
    char *buffer;         /* (cap) */
    size_t cap, from, to; /* what is read and not used yet */
    bool ended;
};

/* "-": standard input. */
srf_status cli_prompts_open(const char *path, struct cli_prompts *in);
void cli_prompts_close(struct cli_prompts *in); /* zeroed is fine */

/* The next line that is not blank, as it is: text without the newline, in the reader's memory until
 * the next call. NULL at the end and, unless it may wait, where a pipe does not have it yet:
 * `ended` tells which. */
srf_status cli_prompts_line(struct cli_prompts *in, bool wait, const char **text, size_t *n);
/* What a line says. SRF_FORMAT or SRF_MISMATCH for one that is no prompt for this vocabulary: the
 * message names the line; p has the line's number, and its id if that could be read. Free p. bpe
 * may be NULL: no texts then. */
srf_status cli_prompt_parse(const struct cli_prompts *in, const char *text, size_t n,
                            const struct srf_bpe *bpe, int64_t vocab, struct cli_prompt *p);
/* Only the id of a line; NULL where there is none. json_decref. */
json_t *cli_prompt_id(const char *text, size_t n);
