/* The output of srf generate --input: one JSON object a line, each naming the "line" of the input
 * that it answers. Lines are written whole and synced to the disk every few seconds; after a crash
 * or a power cut at most the last ones are missing or torn, and resume knows which. Beside the
 * output, OUT.settings.json says what it was made with: a resume with something else is refused. */
#pragma once
#include "cli/common.h"
#include <jansson.h>

struct cli_results {
    const char *path;
    int fd;
    bool file;    /* a regular file: can be synced and cut */
    int64_t size; /* bytes of whole lines */
    double synced_at;
    bool dirty;
    char *pending; /* (cap_pending): records not written yet */
    size_t n_pending, cap_pending;
    /* What a resumed run has already: (n_done), by line, a hash of the line's id, 0 for none. */
    uint32_t *done;
    int64_t n_done, resumed;
    /* Records that wait for number `next`, a ring of `window` places, number % window; no places:
     * written as they come. */
    struct cli_record {
        char *text;
        size_t n;
    } * ring;
    int64_t window, next;
};

/* "-": standard output, without settings. `settings` stays the caller's. resume: goes on with what
 * is there, if anything; otherwise an output that holds something is refused. window: how many
 * records may wait for an earlier one, 0: none does. */
srf_status cli_results_open(const char *path, json_t *settings, bool resume, int64_t window,
                            struct cli_results *out);
void cli_results_close(struct cli_results *r); /* zeroed is fine; nothing is written */

/* Whether a line is answered already. */
bool cli_results_have(const struct cli_results *r, int64_t line);
/* SRF_MISMATCH if what is answered there was a line with another id. */
srf_status cli_results_check(const struct cli_results *r, int64_t line, const json_t *id);
/* Record `number` (0, 1, ... in the order of the input): a line without its newline, srf__free'd
 * here; one for which there is room. */
srf_status cli_results_put(struct cli_results *r, int64_t number, char *text, size_t n);
/* Whether record `number` could be put by now. */
bool cli_results_room(const struct cli_results *r, int64_t number);
/* Write what was put; sync it if the last time is long ago, or `now`. */
srf_status cli_results_flush(struct cli_results *r, bool now);
