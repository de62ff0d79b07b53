#include "cli/prompts.h"
#include "kernels/grow.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Bytes; a longer line is no prompt, but a file of another kind. */
enum { FIRST_BUFFER = 1 << 16, MAX_LINE = 64 << 20 };

void cli_prompt_free(struct cli_prompt *p)
{
    json_decref(p->id);
    json_decref(p->stop);
    srf_ids_free(&p->tokens);
    *p = (struct cli_prompt){0};
}

/* ---- lines ----------------------------------------------------------------------------------- */

srf_status cli_prompts_open(const char *path, struct cli_prompts *in)
{
    struct stat info;
    *in = (struct cli_prompts){.path = path, .fd = STDIN_FILENO};
    if (strcmp(path, "-") == 0)
        in->path = "standard input";
    else
        in->fd = open(path, O_RDONLY | O_CLOEXEC);
    SRF_FAIL_IF(in->fd < 0 || fstat(in->fd, &info) != 0, SRF_IO, "%s: %s", path, strerror(errno));
    in->cap = FIRST_BUFFER;
    if (S_ISREG(info.st_mode)) in->size = info.st_size;
    return SRF_ALLOC(in->buffer, in->cap);
}

void cli_prompts_close(struct cli_prompts *in)
{
    if (in->fd > STDIN_FILENO) close(in->fd);
    srf__free(in->buffer);
    *in = (struct cli_prompts){0};
}

/* More bytes behind those in the buffer. */
static srf_status read_more(struct cli_prompts *in)
{
    ssize_t got;
    memmove(in->buffer, in->buffer + in->from, in->to - in->from);
    in->to -= in->from;
    in->from = 0;
    if (in->to == in->cap) {
        SRF_FAIL_IF(in->cap >= MAX_LINE, SRF_IO, "%s: line %lld is longer than %d MB", in->path,
                    (long long)in->line + 1, MAX_LINE >> 20);
        SRF_TRY(SRF_GROW(in->buffer, in->cap, in->to + 1));
    }
    while ((got = read(in->fd, in->buffer + in->to, in->cap - in->to)) < 0) {
        if ((errno != EINTR && errno != EAGAIN) || cli_interrupted()) break;
        if (errno == EAGAIN) cli_ready(in->fd, POLLIN, true);
    }
    if (got < 0 && cli_interrupted()) got = 0;
    SRF_FAIL_IF(got < 0, SRF_IO, "%s: %s", in->path, strerror(errno));
    in->to += (size_t)got;
    in->ended = got == 0;
    return SRF_OK;
}

static bool blank(const char *text, size_t n)
{
    while (n > 0 && strchr(" \t\r\n", text[n - 1]) && text[n - 1]) n--;
    return n == 0;
}

srf_status cli_prompts_line(struct cli_prompts *in, bool wait, const char **text, size_t *n)
{
    size_t seen = 0; /* bytes without a newline */
    *text = NULL;
    for (;;) {
        const char *start = in->buffer + in->from;
        const char *end = memchr(start + seen, '\n', in->to - in->from - seen);
        if (!end) {
            seen = in->to - in->from;
            if (!in->ended) {
                if (!wait && !cli_ready(in->fd, POLLIN, false)) return SRF_OK;
                SRF_TRY(read_more(in));
                continue;
            }
            /* The last line may lack its newline. */
            if (seen == 0 || cli_interrupted()) return SRF_OK;
            end = start + seen;
        }
        size_t length = (size_t)(end - start);
        in->from += length < in->to - in->from ? length + 1 : length;
        in->line++;
        seen = 0;
        /* What some editors put before the first line. */
        if (in->line == 1 && length >= 3 && memcmp(start, "\xEF\xBB\xBF", 3) == 0) {
            start += 3;
            length -= 3;
        }
        if (blank(start, length)) continue;
        *text = start;
        *n = length;
        return SRF_OK;
    }
}

/* ---- prompts --------------------------------------------------------------------------------- */

/* A key's whole number in a range; `out` stays as it is without the key. */
static srf_status get_int(const json_t *object, const char *key, int64_t min, int64_t max,
                          int64_t *out)
{
    const json_t *v = json_object_get(object, key);
    if (!v) return SRF_OK;
    SRF_FAIL_IF(!json_is_integer(v), SRF_FORMAT, "\"%s\": expected a whole number", key);
    SRF_FAIL_IF(json_integer_value(v) < min || json_integer_value(v) > max, SRF_FORMAT,
                "\"%s\": %lld is outside %lld to %lld", key, (long long)json_integer_value(v),
                (long long)min, (long long)max);
    *out = json_integer_value(v);
    return SRF_OK;
}

/* A tokenizer beside a model's other files may have more tokens than the model. */
static srf_status check_token(int64_t id, int64_t vocab)
{
    SRF_FAIL_IF(id < 0 || id >= vocab, SRF_MISMATCH,
                "token id %lld: the model's vocabulary has %lld", (long long)id, (long long)vocab);
    return SRF_OK;
}

static srf_status get_tokens(const json_t *list, int64_t vocab, struct srf_ids *ids)
{
    size_t n = json_array_size(list);
    SRF_FAIL_IF(!json_is_array(list) || n == 0, SRF_FORMAT,
                "\"tokens\": expected a list of token ids");
    SRF_TRY(SRF_ALLOC(ids->ids, n));
    ids->cap = n;
    for (size_t i = 0; i < n; i++) {
        const json_t *v = json_array_get(list, i);
        SRF_FAIL_IF(!json_is_integer(v), SRF_FORMAT,
                    "\"tokens\": expected whole numbers, found something else at %zu", i);
        SRF_TRY(check_token(json_integer_value(v), vocab));
        ids->ids[ids->n++] = (int32_t)json_integer_value(v);
    }
    return SRF_OK;
}

/* One string or several, as an array. */
static srf_status get_stop(json_t *object, json_t **out)
{
    json_t *v = json_object_get(object, "stop");
    if (!v) return SRF_OK;
    *out = json_is_string(v) ? json_pack("[O]", v) : json_incref(v);
    SRF_FAIL_IF(!*out, SRF_NOMEM, "out of memory");
    bool good = json_is_array(*out);
    for (size_t i = 0; good && i < json_array_size(*out); i++)
        good = json_string_length(json_array_get(*out, i)) > 0; /* 0 for what is no string */
    SRF_FAIL_IF(!good, SRF_FORMAT, "\"stop\": expected a string or a list of them, none empty");
    return SRF_OK;
}

static srf_status known_keys(json_t *object)
{
    static const char *const keys[] = {"id", "prompt", "tokens", "n", "seed", "stop"};
    const char *key;
    json_t *value;
    json_object_foreach(object, key, value)
    {
        bool known = false;
        for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) known |= strcmp(key, keys[i]) == 0;
        SRF_FAIL_IF(!known, SRF_FORMAT,
                    "unknown key \"%.60s\": expected id, prompt, tokens, n, seed, stop", key);
    }
    return SRF_OK;
}

static srf_status parse(json_t *object, const struct srf_bpe *bpe, int64_t vocab,
                        struct cli_prompt *p)
{
    const json_t *text = json_object_get(object, "prompt");
    const json_t *tokens = json_object_get(object, "tokens");
    int64_t seed = -1;
    p->id = json_incref(json_object_get(object, "id"));
    SRF_TRY(known_keys(object));
    SRF_TRY(get_int(object, "n", 1, 1 << 24, &p->n));
    SRF_TRY(get_int(object, "seed", 0, INT64_MAX, &seed));
    p->has_seed = seed >= 0;
    p->seed = p->has_seed ? (uint64_t)seed : 0;
    SRF_TRY(get_stop(object, &p->stop));
    SRF_FAIL_IF(!text == !tokens, SRF_FORMAT, "expected \"prompt\" or \"tokens\", found %s",
                text ? "both" : "neither");
    if (tokens) return get_tokens(tokens, vocab, &p->tokens);
    SRF_FAIL_IF(!json_is_string(text), SRF_FORMAT, "\"prompt\": expected a string");
    SRF_FAIL_IF(!bpe, SRF_MISMATCH,
                "\"prompt\": the model holds no tokenizer: give \"tokens\", or attach one by "
                "'srf import'");
    SRF_TRY(
        srf_bpe_encode(bpe, json_string_value(text), json_string_length(text), true, &p->tokens));
    for (int64_t i = 0; i < p->tokens.n; i++) SRF_TRY(check_token(p->tokens.ids[i], vocab));
    return SRF_OK;
}

srf_status cli_prompt_parse(const struct cli_prompts *in, const char *text, size_t n,
                            const struct srf_bpe *bpe, int64_t vocab, struct cli_prompt *p)
{
    json_error_t error;
    *p = (struct cli_prompt){.line = in->line, .bytes = (int64_t)n + 1, .n = CLI_NONE};
    json_t *object = json_loadb(text, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &error);
    srf_status st = SRF_OK;
    SRF_FAIL_GO_IF(!object, SRF_FORMAT, "column %d: %s", error.column, error.text);
    SRF_FAIL_GO_IF(!json_is_object(object), SRF_FORMAT, "expected a JSON object");
    st = parse(object, bpe, vocab, p);
cleanup:
    json_decref(object);
    if (st != SRF_OK) srf__error_prefix("%s: line %lld", in->path, (long long)in->line);
    return st;
}

json_t *cli_prompt_id(const char *text, size_t n)
{
    json_t *object = json_loadb(text, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, NULL);
    json_t *id = json_incref(json_object_get(object, "id"));
    json_decref(object);
    return id;
}
