/* The tokenizer's files: tokenizer.json in and out, vocab.json with merges.txt. What a file asks
 * for and bpe_encode.c does not do is refused here, by its key. */
#include "data/bpe_internal.h"
#include "data/file.h"

#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { MAX_FILE = 512 << 20 };

/* What a JSON value is, in words for an error. */
static const char *kind(const json_t *v)
{
    if (!v) return "nothing";
    switch (json_typeof(v)) {
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "an array";
    case JSON_STRING:
        return "a string";
    case JSON_INTEGER:
        return "a whole number";
    case JSON_REAL:
        return "a number";
    case JSON_TRUE:
        return "true";
    case JSON_FALSE:
        return "false";
    case JSON_NULL:
        return "null";
    }
    return "?";
}

/* Type named by a {"type": ...} object, or what else stands there. */
static const char *type_of(const json_t *v)
{
    const char *type = json_string_value(json_object_get(v, "type"));
    return type ? type : kind(v);
}

/* Absent, null, false, "", [] and {} ask for nothing. */
static bool asks_nothing(const json_t *v)
{
    if (!v || json_is_null(v) || json_is_false(v)) return true;
    if (json_is_string(v)) return json_string_length(v) == 0;
    return (json_is_array(v) && !json_array_size(v)) || (json_is_object(v) && !json_object_size(v));
}

/* Every key of object is in the list (names ended by NULL) or asks for nothing. */
static srf_status only_keys(json_t *object, const char *where, const char *const *names)
{
    const char *key;
    json_t *value;
    json_object_foreach(object, key, value)
    {
        bool known = asks_nothing(value);
        for (const char *const *n = names; *n && !known; n++) known = strcmp(*n, key) == 0;
        SRF_FAIL_IF(!known, SRF_UNSUPPORTED, "%s%.60s: expected it absent or null, found %s", where,
                    key, kind(value));
    }
    return SRF_OK;
}

/* ---- the parts of tokenizer.json ------------------------------------------------------------- */

static srf_status read_vocab(json_t *vocab, struct srf__bpe_parts *parts)
{
    SRF_FAIL_IF(!json_is_object(vocab), SRF_FORMAT, "vocab: expected an object, found %s",
                kind(vocab));
    SRF_TRY(SRF_ALLOC(parts->vocab, json_object_size(vocab)));
    const char *key;
    json_t *value;
    json_object_foreach(vocab, key, value)
    {
        SRF_FAIL_IF(!json_is_integer(value), SRF_FORMAT,
                    "vocab: id of '%.60s': expected a whole number, found %s", key, kind(value));
        parts->vocab[parts->n_vocab++] = (struct srf__bpe_part_token){
            .key = key, .n = strlen(key), .id = json_integer_value(value)};
    }
    return SRF_OK;
}

/* "left right": exactly one space, not at an end. */
static srf_status split_merge(const char *text, size_t n, size_t i, struct srf__bpe_part_merge *m)
{
    const char *space = memchr(text, ' ', n);
    size_t left = space ? (size_t)(space - text) : 0;
    SRF_FAIL_IF(!space || left == 0 || left + 1 == n || memchr(space + 1, ' ', n - left - 1),
                SRF_FORMAT, "merges: merge %zu: expected 'left right', found '%.*s'", i,
                (int)(n < 60 ? n : 60), text);
    *m = (struct srf__bpe_part_merge){
        .left = text, .n_left = left, .right = space + 1, .n_right = n - left - 1};
    return SRF_OK;
}

static srf_status read_merges(json_t *merges, struct srf__bpe_parts *parts)
{
    SRF_FAIL_IF(!json_is_array(merges), SRF_FORMAT, "model.merges: expected an array, found %s",
                kind(merges));
    SRF_TRY(SRF_ALLOC(parts->merges, json_array_size(merges)));
    size_t i;
    json_t *merge;
    json_array_foreach(merges, i, merge)
    {
        struct srf__bpe_part_merge *m = &parts->merges[i];
        if (json_is_string(merge)) {
            SRF_TRY(split_merge(json_string_value(merge), json_string_length(merge), i, m));
        } else {
            json_t *left = json_array_get(merge, 0), *right = json_array_get(merge, 1);
            SRF_FAIL_IF(json_array_size(merge) != 2 || !json_is_string(left) ||
                            !json_is_string(right),
                        SRF_FORMAT, "model.merges: merge %zu: expected two strings, found %s", i,
                        kind(merge));
            *m = (struct srf__bpe_part_merge){.left = json_string_value(left),
                                              .n_left = json_string_length(left),
                                              .right = json_string_value(right),
                                              .n_right = json_string_length(right)};
        }
        parts->n_merges++;
    }
    return SRF_OK;
}

static srf_status read_added(json_t *added, struct srf__bpe_parts *parts)
{
    static const char *const known[] = {"id",     "content",    "single_word", "lstrip",
                                        "rstrip", "normalized", "special",     NULL};
    if (!added || json_is_null(added)) return SRF_OK;
    SRF_FAIL_IF(!json_is_array(added), SRF_FORMAT, "added_tokens: expected an array, found %s",
                kind(added));
    SRF_TRY(SRF_ALLOC(parts->added, json_array_size(added)));
    size_t i;
    json_t *token;
    json_array_foreach(added, i, token)
    {
        json_t *id = json_object_get(token, "id"), *content = json_object_get(token, "content");
        SRF_FAIL_IF(!json_is_integer(id) || !json_is_string(content), SRF_FORMAT,
                    "added_tokens: entry %zu: expected an id and a content, found %s and %s", i,
                    kind(id), kind(content));
        SRF_TRY(only_keys(token, "added_tokens: ", known));
        static const char *const refused[] = {"single_word", "lstrip", "rstrip"};
        for (int k = 0; k < 3; k++)
            SRF_FAIL_IF(!asks_nothing(json_object_get(token, refused[k])), SRF_UNSUPPORTED,
                        "added_tokens: %s of '%.60s': expected false, found %s", refused[k],
                        json_string_value(content), kind(json_object_get(token, refused[k])));
        parts->added[parts->n_added++] = (struct srf__bpe_part_added){
            .key = json_string_value(content),
            .n = json_string_length(content),
            .id = json_integer_value(id),
            .normalized = json_is_true(json_object_get(token, "normalized")),
            .special = json_is_true(json_object_get(token, "special"))};
    }
    return SRF_OK;
}

static srf_status check_model(json_t *model, struct srf__bpe_parts *parts)
{
    static const char *const known[] = {"type", "vocab", "merges", "unk_token", "fuse_unk", NULL};
    SRF_FAIL_IF(!json_is_object(model), SRF_FORMAT, "model: expected an object, found %s",
                kind(model));
    json_t *type = json_object_get(model, "type"); /* files of before 2020 have none */
    SRF_FAIL_IF(type && (!json_is_string(type) || strcmp(json_string_value(type), "BPE") != 0),
                SRF_UNSUPPORTED, "model.type: expected BPE, found %.60s",
                json_is_string(type) ? json_string_value(type) : kind(type));
    SRF_TRY(only_keys(model, "model.", known));
    parts->has_unk = !asks_nothing(json_object_get(model, "unk_token"));
    SRF_TRY(read_vocab(json_object_get(model, "vocab"), parts));
    return read_merges(json_object_get(model, "merges"), parts);
}

/* use_regex: whether this ByteLevel is to split by GPT-2's pattern (the default) or must not. */
static srf_status check_byte_level(json_t *p, const char *where, bool use_regex)
{
    static const char *const known[] = {"type", "add_prefix_space", "trim_offsets", "use_regex",
                                        NULL};
    const char *type = type_of(p);
    SRF_FAIL_IF(strcmp(type, "ByteLevel") != 0, SRF_UNSUPPORTED,
                "%s: expected ByteLevel, found %.60s", where, type);
    SRF_TRY(only_keys(p, "pre_tokenizer.", known));
    json_t *prefix = json_object_get(p, "add_prefix_space");
    SRF_FAIL_IF(!json_is_false(prefix), SRF_UNSUPPORTED,
                "%s.add_prefix_space: expected false, found %s", where, kind(prefix));
    json_t *regex = json_object_get(p, "use_regex");
    bool is = regex ? json_is_true(regex) : true;
    SRF_FAIL_IF(is != use_regex, SRF_UNSUPPORTED, "%s.use_regex: expected %s, found %s", where,
                use_regex ? "true" : "false", regex ? kind(regex) : "true (the default)");
    return SRF_OK;
}

/* {"type": "Split", "pattern": {"Regex": GPT-2's}, "behavior": "Isolated", "invert": false} */
static srf_status check_split(json_t *p, const char *where)
{
    static const char *const known[] = {"type", "pattern", "behavior", "invert", NULL};
    static const char *const gpt2[] = {
        "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
        "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
        "(?:'s|'t|'re|'ve|'m|'ll|'d)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
    };
    const char *type = type_of(p);
    SRF_FAIL_IF(strcmp(type, "Split") != 0, SRF_UNSUPPORTED, "%s: expected Split, found %.60s",
                where, type);
    SRF_TRY(only_keys(p, "pre_tokenizer.", known));
    const char *regex = json_string_value(json_object_get(json_object_get(p, "pattern"), "Regex"));
    bool same = false;
    for (size_t i = 0; regex && i < sizeof gpt2 / sizeof *gpt2; i++)
        same |= strcmp(regex, gpt2[i]) == 0;
    SRF_FAIL_IF(!same, SRF_UNSUPPORTED, "%s.pattern: expected GPT-2's, found %.100s", where,
                regex ? regex : "no Regex");
    const char *behavior = json_string_value(json_object_get(p, "behavior"));
    SRF_FAIL_IF(!behavior || strcmp(behavior, "Isolated") != 0, SRF_UNSUPPORTED,
                "%s.behavior: expected Isolated, found %.60s", where,
                behavior ? behavior : "nothing");
    SRF_FAIL_IF(!asks_nothing(json_object_get(p, "invert")), SRF_UNSUPPORTED,
                "%s.invert: expected false", where);
    return SRF_OK;
}

/* ByteLevel with its pattern, alone or in a Sequence, or a Split by the same pattern before it. */
static srf_status check_pre_tokenizer(json_t *p)
{
    if (strcmp(type_of(p), "Sequence") != 0) return check_byte_level(p, "pre_tokenizer", true);
    json_t *steps = json_object_get(p, "pretokenizers");
    size_t n = json_array_size(steps);
    SRF_FAIL_IF(n != 1 && n != 2, SRF_UNSUPPORTED,
                "pre_tokenizer: expected a Sequence of 1 or 2 steps, found %zu", n);
    if (n == 2) SRF_TRY(check_split(json_array_get(steps, 0), "pre_tokenizer[0]"));
    return check_byte_level(json_array_get(steps, n - 1),
                            n == 2 ? "pre_tokenizer[1]" : "pre_tokenizer[0]", n == 1);
}

/* A template without tokens of its own, which transformers writes for GPT-2: the text as it is. */
static srf_status check_template(json_t *stage)
{
    json_t *single = json_object_get(stage, "single"), *part;
    size_t i;
    json_array_foreach(single, i, part)
    {
        json_t *token = json_object_get(json_object_get(part, "SpecialToken"), "id");
        SRF_FAIL_IF(token, SRF_UNSUPPORTED,
                    "post_processor: expected no token beside the text, found %.60s",
                    json_is_string(token) ? json_string_value(token) : kind(token));
    }
    SRF_FAIL_IF(json_array_size(single) != 1 ||
                    !json_object_get(json_array_get(single, 0), "Sequence"),
                SRF_UNSUPPORTED, "post_processor: expected a template of one text");
    return SRF_OK;
}

/* normalizer, post_processor, decoder: nothing (null, an empty Sequence), or for the last two
 * ByteLevel, which touches offsets only or is what decoding does anyhow. */
static srf_status check_stage(json_t *root, const char *name, const char *list, bool byte_level)
{
    json_t *stage = json_object_get(root, name);
    bool post = strcmp(name, "post_processor") == 0;
    if (asks_nothing(stage)) return SRF_OK;
    const char *type = type_of(stage);
    if (byte_level && strcmp(type, "ByteLevel") == 0) return SRF_OK;
    if (post && strcmp(type, "TemplateProcessing") == 0) return check_template(stage);
    if (strcmp(type, "Sequence") == 0) {
        json_t *steps = json_object_get(stage, list), *step;
        size_t i;
        bool nothing = json_is_array(steps);
        json_array_foreach(steps, i, step)
        {
            if (post && strcmp(type_of(step), "TemplateProcessing") == 0)
                SRF_TRY(check_template(step));
            else
                nothing &= byte_level && strcmp(type_of(step), "ByteLevel") == 0;
        }
        if (nothing) return SRF_OK;
    }
    SRF_FAIL(SRF_UNSUPPORTED, "%s: expected null%s, found %.60s", name,
             byte_level ? " or ByteLevel" : "", type);
}

static void parts_free(struct srf__bpe_parts *parts)
{
    srf__free(parts->vocab);
    srf__free(parts->merges);
    srf__free(parts->added);
}

static srf_status from_root(json_t *root, struct srf_bpe **out)
{
    /* truncation and padding are for batches of the one who saved it: a text's ids are the same */
    static const char *const known[] = {
        "version", "added_tokens",   "normalizer", "pre_tokenizer", "truncation",
        "padding", "post_processor", "decoder",    "model",         NULL};
    struct srf__bpe_parts parts = {.next_ids = true};
    srf_status st = SRF_OK;
    SRF_FAIL_IF(!json_is_object(root), SRF_FORMAT, "expected an object, found %s", kind(root));
    bool config = json_object_get(root, "model_type") || json_object_get(root, "tokenizer_class");
    SRF_FAIL_IF(config && !json_object_get(root, "model"), SRF_FORMAT,
                "expected a tokenizer.json, found a %s",
                json_object_get(root, "model_type") ? "config.json" : "tokenizer_config.json");
    json_t *version = json_object_get(root, "version");
    SRF_FAIL_IF(version && (!json_is_string(version) || strcmp(json_string_value(version), "1.0")),
                SRF_UNSUPPORTED, "version: expected 1.0, found %.60s",
                json_is_string(version) ? json_string_value(version) : kind(version));
    SRF_TRY_GO(only_keys(root, "", known));
    SRF_TRY_GO(check_stage(root, "normalizer", "normalizers", false));
    SRF_TRY_GO(check_stage(root, "post_processor", "processors", true));
    SRF_TRY_GO(check_stage(root, "decoder", "decoders", true));
    SRF_TRY_GO(check_model(json_object_get(root, "model"), &parts));
    SRF_TRY_GO(check_pre_tokenizer(json_object_get(root, "pre_tokenizer")));
    SRF_TRY_GO(read_added(json_object_get(root, "added_tokens"), &parts));
    SRF_TRY_GO(srf__bpe_build(&parts, out));
cleanup:
    parts_free(&parts);
    return st;
}

static srf_status parse(const char *text, size_t n, json_t **root)
{
    json_error_t error;
    *root = json_loadb(text, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &error);
    SRF_FAIL_IF(!*root, SRF_FORMAT, "not JSON: %s at line %d, column %d", error.text, error.line,
                error.column);
    return SRF_OK;
}

srf_status srf_bpe_from_json(const char *text, size_t n, struct srf_bpe **out)
{
    json_t *root;
    *out = NULL;
    SRF_TRY(parse(text, n, &root));
    srf_status st = from_root(root, out);
    if (st != SRF_OK) srf__error_prefix("tokenizer");
    json_decref(root);
    return st;
}

/* ---- vocab.json + merges.txt ----------------------------------------------------------------- */

static srf_status read_merge_lines(const char *text, size_t n, struct srf__bpe_parts *parts)
{
    size_t lines = 1;
    for (size_t i = 0; i < n; i++) lines += text[i] == '\n';
    SRF_TRY(SRF_ALLOC(parts->merges, lines));
    static const char version[] = "#version";
    for (size_t at = 0; at < n;) {
        const char *line = text + at, *end = memchr(line, '\n', n - at);
        size_t len = end ? (size_t)(end - line) : n - at;
        bool first = at == 0;
        at += len + 1;
        if (len && line[len - 1] == '\r') len--;
        if (len == 0) continue;
        if (first && len >= sizeof version - 1 && memcmp(line, version, sizeof version - 1) == 0)
            continue;
        SRF_TRY(split_merge(line, len, parts->n_merges, &parts->merges[parts->n_merges]));
        parts->n_merges++;
    }
    return SRF_OK;
}

/* added: the object of an added_tokens.json (content -> id) or NULL. <|endoftext|> is an added
 * token wherever the vocabulary has it, as in GPT-2's own encoder. */
static srf_status from_vocab_merges(json_t *vocab, const char *merges, size_t n_merges,
                                    json_t *added, struct srf_bpe **out)
{
    struct srf__bpe_parts parts = {0};
    srf_status st = SRF_OK;
    SRF_FAIL_IF(added && !json_is_object(added), SRF_FORMAT,
                "added_tokens.json: expected an object, found %s", kind(added));
    SRF_TRY_GO(read_vocab(vocab, &parts));
    SRF_TRY_GO(read_merge_lines(merges, n_merges, &parts));
    SRF_TRY_GO(SRF_ALLOC(parts.added, json_object_size(added) + 1));
    json_t *end = json_object_get(vocab, SRF_END_OF_TEXT);
    if (end && !json_object_get(added, SRF_END_OF_TEXT))
        parts.added[parts.n_added++] = (struct srf__bpe_part_added){.key = SRF_END_OF_TEXT,
                                                                    .n = strlen(SRF_END_OF_TEXT),
                                                                    .id = json_integer_value(end),
                                                                    .special = true};
    const char *key;
    json_t *value;
    json_object_foreach(added, key, value)
    {
        SRF_FAIL_GO_IF(!json_is_integer(value), SRF_FORMAT,
                       "added_tokens.json: id of '%.60s': expected a whole number, found %s", key,
                       kind(value));
        parts.added[parts.n_added++] =
            (struct srf__bpe_part_added){.key = key,
                                         .n = strlen(key),
                                         .id = json_integer_value(value),
                                         .special = strcmp(key, SRF_END_OF_TEXT) == 0};
    }
    SRF_TRY_GO(srf__bpe_build(&parts, out));
cleanup:
    parts_free(&parts);
    return st;
}

srf_status srf_bpe_from_vocab_merges(const char *vocab, size_t n_vocab, const char *merges,
                                     size_t n_merges, struct srf_bpe **out)
{
    json_t *root;
    *out = NULL;
    SRF_TRY(parse(vocab, n_vocab, &root));
    srf_status st = from_vocab_merges(root, merges, n_merges, NULL, out);
    json_decref(root);
    return st;
}

/* ---- paths ----------------------------------------------------------------------------------- */

/* Is there a file of this name in the directory? */
static bool beside(const char *dir, const char *name)
{
    char *path;
    struct stat info;
    if (srf__path_join(dir, name, &path) != SRF_OK) return false;
    bool is = stat(path, &info) == 0 && S_ISREG(info.st_mode);
    srf__free(path);
    return is;
}

static srf_status read_beside(const char *dir, const char *name, char **text, size_t *n)
{
    char *path;
    SRF_TRY(srf__path_join(dir, name, &path));
    srf_status st = srf__file_text(path, MAX_FILE, text, n);
    srf__free(path);
    return st;
}

/* A vocabulary was read from a file in dir: its merges and added tokens are beside it. */
static srf_status load_merges(json_t *vocab, const char *dir, struct srf_bpe **out)
{
    char *merges = NULL, *added_text = NULL;
    size_t n, n_added;
    json_t *added = NULL;
    srf_status st = SRF_OK;
    const char *name = beside(dir, "merges.txt") ? "merges.txt" : "vocab.bpe";
    SRF_FAIL_IF(!beside(dir, name), SRF_IO,
                "a vocabulary without merges: expected merges.txt or vocab.bpe beside it");
    SRF_TRY_GO(read_beside(dir, name, &merges, &n));
    if (beside(dir, "added_tokens.json")) {
        SRF_TRY_GO(read_beside(dir, "added_tokens.json", &added_text, &n_added));
        SRF_TRY_GO(parse(added_text, n_added, &added));
    }
    SRF_TRY_GO(from_vocab_merges(vocab, merges, n, added, out));
cleanup:
    json_decref(added);
    srf__free(added_text);
    srf__free(merges);
    return st;
}

static srf_status load_file(const char *path, struct srf_bpe **out)
{
    char *text = NULL, *dir = NULL;
    size_t n;
    json_t *root = NULL;
    srf_status st = SRF_OK;
    SRF_TRY(srf__file_text(path, MAX_FILE, &text, &n));
    SRF_TRY_GO(srf__path_dir(path, &dir));
    SRF_TRY_GO(parse(text, n, &root));
    /* A vocabulary maps tokens to numbers. A token may be called "model", too. */
    if (json_is_integer(json_object_iter_value(json_object_iter(root))))
        SRF_TRY_GO(load_merges(root, dir, out));
    else
        SRF_TRY_GO(from_root(root, out));
cleanup:
    json_decref(root);
    srf__free(dir);
    srf__free(text);
    if (st != SRF_OK) srf__error_prefix("%s", path);
    return st;
}

srf_status srf_bpe_load(const char *path, struct srf_bpe **out)
{
    static const char *const names[] = {"tokenizer.json", "vocab.json", "encoder.json"};
    struct stat info;
    *out = NULL;
    SRF_FAIL_IF(stat(path, &info) != 0, SRF_IO, "%s: %s", path, strerror(errno));
    if (!S_ISDIR(info.st_mode)) return load_file(path, out);
    for (int i = 0; i < 3; i++) {
        if (!beside(path, names[i])) continue;
        char *file;
        SRF_TRY(srf__path_join(path, names[i], &file));
        srf_status st = load_file(file, out);
        srf__free(file);
        return st;
    }
    SRF_FAIL(SRF_IO,
             "%s: no tokenizer: expected tokenizer.json, or vocab.json with merges.txt, or "
             "encoder.json with vocab.bpe",
             path);
}

/* ---- out ------------------------------------------------------------------------------------- */

static json_t *merge_array(const struct srf_bpe *bpe)
{
    /* "left right" is what every version of the tokenizers library reads, unless a part holds a
     * space. */
    bool pairs = false;
    for (int64_t i = 0; i < bpe->n_merges; i++) {
        const struct srf__bpe_token *l = &bpe->tokens[bpe->merges[i].left],
                                    *r = &bpe->tokens[bpe->merges[i].right];
        pairs |= memchr(l->key, ' ', l->n_key) || memchr(r->key, ' ', r->n_key);
    }
    json_t *array = json_array();
    for (int64_t i = 0; i < bpe->n_merges; i++) {
        const struct srf__bpe_token *l = &bpe->tokens[bpe->merges[i].left],
                                    *r = &bpe->tokens[bpe->merges[i].right];
        json_t *merge =
            pairs ? json_pack("[s%s%]", l->key, (size_t)l->n_key, r->key, (size_t)r->n_key)
                  : json_sprintf("%.*s %.*s", (int)l->n_key, l->key, (int)r->n_key, r->key);
        if (json_array_append_new(array, merge) != 0) {
            json_decref(array);
            return NULL;
        }
    }
    return array;
}

static json_t *added_array(const struct srf_bpe *bpe)
{
    json_t *array = json_array();
    for (int64_t id = 0; id < bpe->n_tokens; id++) {
        const struct srf__bpe_token *t = &bpe->tokens[id];
        if (!t->added) continue;
        json_t *token = json_pack("{s:I,s:s%,s:b,s:b,s:b,s:b,s:b}", "id", (json_int_t)id, "content",
                                  t->key, (size_t)t->n_key, "single_word", 0, "lstrip", 0, "rstrip",
                                  0, "normalized", t->normalized, "special", t->special);
        if (json_array_append_new(array, token) != 0) {
            json_decref(array);
            return NULL;
        }
    }
    return array;
}

/* Whether the added tokens outside the vocabulary have the ids that the tokenizers library gives:
 * those behind its size. */
static bool have_next_ids(const struct srf_bpe *bpe)
{
    int64_t next = 0;
    for (int64_t id = 0; id < bpe->n_tokens; id++) next += bpe->tokens[id].in_vocab;
    for (int64_t id = 0; id < bpe->n_tokens; id++)
        if (bpe->tokens[id].added && !bpe->tokens[id].in_vocab && id != next++) return false;
    return true;
}

static json_t *vocab_object(const struct srf_bpe *bpe)
{
    json_t *object = json_object();
    bool next = have_next_ids(bpe); /* else the vocabulary says which they are */
    for (int64_t id = 0; object && id < bpe->n_tokens; id++) {
        const struct srf__bpe_token *t = &bpe->tokens[id];
        if (!t->in_vocab && (next || !t->added)) continue;
        if (json_object_set_new(object, t->key, json_integer(id)) != 0) {
            json_decref(object);
            return NULL;
        }
    }
    return object;
}

srf_status srf_bpe_to_json(const struct srf_bpe *bpe, char **text)
{
    *text = NULL;
    json_t *root = json_pack(
        "{s:s,s:n,s:n,s:o,s:n,s:{s:s,s:b,s:b,s:b},s:n,s:{s:s,s:b,s:b,s:b},"
        "s:{s:s,s:n,s:n,s:n,s:n,s:b,s:b,s:b,s:o,s:o}}",
        "version", "1.0", "truncation", "padding", "added_tokens", added_array(bpe), "normalizer",
        "pre_tokenizer", "type", "ByteLevel", "add_prefix_space", 0, "trim_offsets", 1, "use_regex",
        1, "post_processor", "decoder", "type", "ByteLevel", "add_prefix_space", 1, "trim_offsets",
        1, "use_regex", 1, "model", "type", "BPE", "dropout", "unk_token",
        "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", 0, "byte_fallback", 0,
        "ignore_merges", 0, "vocab", vocab_object(bpe), "merges", merge_array(bpe));
    SRF_FAIL_IF(!root, SRF_NOMEM, "out of memory: the tokenizer as JSON");
    char *dumped = json_dumps(root, JSON_INDENT(1));
    json_decref(root);
    SRF_FAIL_IF(!dumped, SRF_NOMEM, "out of memory: the tokenizer as JSON");
    *text = srf__strdup(dumped);
    free(dumped);
    SRF_FAIL_IF(!*text, SRF_NOMEM, "out of memory: the tokenizer as JSON");
    return SRF_OK;
}
