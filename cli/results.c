#include "cli/results.h"
#include "data/file.h"
#include "kernels/grow.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SYNC_EVERY_S 5.0 /* what a power cut may cost */

/* ---- what is there --------------------------------------------------------------------------- */

/* FNV-1a 32 of the id as JSON, never 0. */
static srf_status id_hash(const json_t *id, uint32_t *hash)
{
    uint32_t h = 0x811c9dc5u;
    char *text = id ? json_dumps(id, JSON_ENCODE_ANY | JSON_COMPACT | JSON_SORT_KEYS) : NULL;
    SRF_FAIL_IF(id && !text, SRF_NOMEM, "out of memory");
    for (const char *s = text; s && *s; s++) h = (h ^ (unsigned char)*s) * 0x01000193u;
    free(text);
    *hash = h ? h : 1;
    return SRF_OK;
}

static srf_status mark(struct cli_results *r, int64_t line, uint32_t hash)
{
    if (line >= r->n_done) {
        size_t cap = (size_t)r->n_done, before = cap;
        SRF_TRY(SRF_GROW(r->done, cap, line + 1));
        memset(r->done + before, 0, (cap - before) * sizeof *r->done);
        r->n_done = (int64_t)cap;
    }
    SRF_FAIL_IF(r->done[line], SRF_FORMAT, "%s: answers line %lld twice", r->path, (long long)line);
    r->done[line] = hash;
    r->resumed++;
    return SRF_OK;
}

/* Whether a whole line is a record of ours; which line it answers, and the hash of its id. */
static srf_status read_record(const char *text, size_t n, bool *whole, int64_t *line,
                              uint32_t *hash)
{
    *whole = false;
    if (n == 0 || text[n - 1] != '\n') return SRF_OK;
    json_t *object = json_loadb(text, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, NULL);
    *line = json_integer_value(json_object_get(object, "line"));
    *whole = *line > 0 && *line < INT64_MAX / 8;
    srf_status st = *whole ? id_hash(json_object_get(object, "id"), hash) : SRF_OK;
    json_decref(object);
    return st;
}

/* Reads the records of an earlier run, and cuts off what is torn at the end. */
static srf_status read_done(struct cli_results *r)
{
    FILE *f = fopen(r->path, "rb");
    SRF_FAIL_IF(!f, SRF_IO, "%s: %s", r->path, strerror(errno));
    char *text = NULL;
    size_t cap = 0;
    srf_status st = SRF_OK;
    int64_t bad = 0, number = 0, line;
    for (ssize_t n; (n = getline(&text, &cap, f)) > 0;) {
        bool whole;
        uint32_t hash = 0;
        number++;
        SRF_TRY_GO(read_record(text, (size_t)n, &whole, &line, &hash));
        if (!whole) {
            if (!bad) bad = number;
            continue;
        }
        /* A crash leaves whole records first. */
        SRF_FAIL_GO_IF(bad, SRF_FORMAT, "%s: line %lld is no record of srf generate", r->path,
                       (long long)bad);
        SRF_TRY_GO(mark(r, line, hash));
        r->size += n;
    }
    SRF_FAIL_GO_IF(ferror(f), SRF_IO, "%s: %s", r->path, strerror(errno));
    SRF_FAIL_GO_IF(ftruncate(r->fd, r->size) != 0, SRF_IO, "%s: %s", r->path, strerror(errno));
cleanup:
    free(text);
    fclose(f);
    return st;
}

/* ---- settings -------------------------------------------------------------------------------- */

static srf_status check_settings(const char *path, json_t *expected)
{
    json_error_t error;
    char *text;
    SRF_TRY(srf__file_text(path, 1 << 26, &text, NULL));
    json_t *found = json_loads(text, 0, &error);
    srf_status st = SRF_OK;
    const char *key;
    json_t *value;
    srf__free(text);
    SRF_FAIL_GO_IF(!json_is_object(found), SRF_FORMAT, "%s: expected a JSON object", path);
    json_object_foreach(expected, key, value)
    {
        const json_t *other = json_object_get(found, key);
        if (other && json_equal(value, other)) continue;
        char *now = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT);
        char *then = other ? json_dumps(other, JSON_ENCODE_ANY | JSON_COMPACT) : NULL;
        st =
            srf__fail(__FILE__, __LINE__, SRF_MISMATCH,
                      "%s: the output was made with %s %.200s, this is %.200s: go on with the same "
                      "settings, or write another output",
                      path, key, then ? then : "unset", now ? now : "?");
        free(now);
        free(then);
        break;
    }
cleanup:
    json_decref(found);
    return st;
}

static srf_status write_settings(const char *path, json_t *settings)
{
    char *text = json_dumps(settings, JSON_INDENT(2));
    SRF_FAIL_IF(!text, SRF_NOMEM, "out of memory");
    srf_status st = srf_write_file_atomic(path, text, strlen(text));
    free(text);
    return st;
}

/* ---- opening --------------------------------------------------------------------------------- */

static srf_status open_file(struct cli_results *r, json_t *settings, bool resume)
{
    struct stat info;
    char beside[4096];
    int n = snprintf(beside, sizeof beside, "%s.settings.json", r->path);
    SRF_FAIL_IF(n < 0 || (size_t)n >= sizeof beside, SRF_IO, "%s: path too long", r->path);
    r->fd = open(r->path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    SRF_FAIL_IF(r->fd < 0 || fstat(r->fd, &info) != 0, SRF_IO, "%s: %s", r->path, strerror(errno));
    r->file = S_ISREG(info.st_mode);
    if (!r->file) {
        SRF_FAIL_IF(resume, SRF_INVALID, "%s: --resume needs a regular file", r->path);
        return SRF_OK;
    }
    SRF_TRY(srf__file_lock(r->fd, r->path));
    SRF_FAIL_IF(info.st_size > 0 && !resume, SRF_INVALID,
                "%s: holds something already: --resume goes on with it, or choose another path",
                r->path);
    if (info.st_size > 0) {
        SRF_TRY(check_settings(beside, settings));
        return read_done(r);
    }
    SRF_TRY(write_settings(beside, settings));
    return srf__sync_dir_of(r->path);
}

srf_status cli_results_open(const char *path, json_t *settings, bool resume, int64_t window,
                            struct cli_results *r)
{
    bool standard = strcmp(path, "-") == 0;
    *r = (struct cli_results){.path = standard ? "standard output" : path,
                              .fd = STDOUT_FILENO,
                              .window = window,
                              .synced_at = cli_now()};
    SRF_FAIL_IF(standard && resume, SRF_INVALID, "--resume needs an --output that is a file");
    if (!standard) SRF_TRY(open_file(r, settings, resume));
    return window ? SRF_CALLOC(r->ring, window) : SRF_OK;
}

void cli_results_close(struct cli_results *r)
{
    if (r->fd > STDOUT_FILENO) close(r->fd);
    for (int64_t i = 0; r->ring && i < r->window; i++) srf__free(r->ring[i].text);
    srf__free(r->ring);
    srf__free(r->pending);
    srf__free(r->done);
    *r = (struct cli_results){0};
}

bool cli_results_have(const struct cli_results *r, int64_t line)
{
    return line < r->n_done && r->done[line];
}

srf_status cli_results_check(const struct cli_results *r, int64_t line, const json_t *id)
{
    uint32_t hash = 0;
    SRF_TRY(id_hash(id, &hash));
    SRF_FAIL_IF(hash != r->done[line], SRF_MISMATCH,
                "%s: answers a line %lld with another id: it belongs to another input", r->path,
                (long long)line);
    return SRF_OK;
}

/* ---- writing --------------------------------------------------------------------------------- */

static srf_status append(struct cli_results *r, const char *text, size_t n)
{
    SRF_TRY(SRF_GROW(r->pending, r->cap_pending, r->n_pending + n + 1));
    memcpy(r->pending + r->n_pending, text, n);
    r->n_pending += n;
    r->pending[r->n_pending++] = '\n';
    return SRF_OK;
}

bool cli_results_room(const struct cli_results *r, int64_t number)
{
    return r->window == 0 || number - r->next < r->window;
}

srf_status cli_results_put(struct cli_results *r, int64_t number, char *text, size_t n)
{
    srf_status st = SRF_OK;
    if (r->window == 0) {
        st = append(r, text, n);
        srf__free(text);
        return st;
    }
    r->ring[number % r->window] = (struct cli_record){text, n};
    for (;;) {
        struct cli_record *first = &r->ring[r->next % r->window];
        if (!first->text) return SRF_OK;
        st = append(r, first->text, first->n);
        srf__free(first->text);
        *first = (struct cli_record){0};
        r->next++;
        SRF_TRY(st);
    }
}

/* Past stdio: a signal or a full disk must not leave half a line, nor lose one. */
static srf_status write_pending(struct cli_results *r)
{
    for (size_t done = 0; done < r->n_pending;) {
        ssize_t n = cli_write(r->fd, r->pending + done, r->n_pending - done);
        if (n < 0) {
            int error = errno;
            /* Back to whole lines; if that fails too, resume will do it. */
            if (r->file && ftruncate(r->fd, r->size) != 0) error = errno;
            SRF_FAIL(SRF_IO, "%s: %s", r->path, strerror(error));
        }
        done += (size_t)n;
    }
    r->size += (int64_t)r->n_pending;
    r->dirty |= r->n_pending > 0;
    r->n_pending = 0;
    return SRF_OK;
}

srf_status cli_results_flush(struct cli_results *r, bool now)
{
    SRF_TRY(write_pending(r));
    double t = cli_now();
    if (!r->file || !r->dirty || (!now && t - r->synced_at < SYNC_EVERY_S)) return SRF_OK;
    SRF_FAIL_IF(fsync(r->fd) != 0, SRF_IO, "%s: %s", r->path, strerror(errno));
    r->synced_at = t;
    r->dirty = false;
    return SRF_OK;
}
