/* srf info: what a file holds. Facts are gathered as one JSON object, printed so or as lines. */
#include "cli/common.h"
#include "data/file.h"
#include "model/arch.h"
#include "train/policy.h"

#include <ctype.h>
#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { MAX_JSON = 256 << 20 }; /* bytes of a tokenizer.json or config.json */

/* ---- facts ----------------------------------------------------------------------------------- */

static srf_status put(json_t *facts, const char *key, json_t *value)
{
    SRF_FAIL_IF(json_object_set_new(facts, key, value) != 0, SRF_NOMEM, "out of memory");
    return SRF_OK;
}

static srf_status put_int(json_t *facts, const char *key, int64_t value)
{
    return put(facts, key, json_integer(value));
}

/* Text of a stranger's file may be no UTF-8: then it is shown as such. */
static srf_status put_str(json_t *facts, const char *key, const char *text)
{
    json_t *value = json_string(text);
    return put(facts, key, value ? value : json_string("(not UTF-8)"));
}

static srf_status put_bpe(json_t *facts, const struct srf_bpe *bpe)
{
    char hash[17];
    srf_bpe_hash(bpe, hash);
    SRF_TRY(put_int(facts, "tokenizer_tokens", srf_bpe_vocab_size(bpe)));
    return put_str(facts, "tokenizer_hash", hash);
}

static srf_status put_tokenizer(json_t *facts, const char *text, size_t n)
{
    struct srf_bpe *bpe;
    SRF_TRY(srf_bpe_from_json(text, n, &bpe));
    srf_status st = put_bpe(facts, bpe);
    srf_bpe_free(bpe);
    return st;
}

static srf_status put_config(json_t *facts, const char *text, struct srf_model_config *c)
{
    struct srf_tensor_table table;
    int64_t parameters = 0;
    SRF_TRY(srf_model_config_from_json(text, c));
    SRF_TRY(srf_tensor_table_create(c, &table));
    for (int64_t i = 0; i < table.n; i++) parameters += table.rows[i].count;
    srf_tensor_table_free(&table);
    SRF_TRY(put_str(facts, "model_type", c->arch->name));
    SRF_TRY(put_int(facts, "parameters", parameters));
    SRF_TRY(put_int(facts, "layers", c->n_layers));
    SRF_TRY(put_int(facts, "heads", c->n_heads));
    SRF_TRY(put_int(facts, "head_size", c->c / c->n_heads));
    SRF_TRY(put_int(facts, "width", c->c));
    SRF_TRY(put_int(facts, "mlp_width", c->d_ff));
    SRF_TRY(put_int(facts, "positions", c->n_pos));
    return put_int(facts, "vocab", c->vocab);
}

/* The element types of the tensors, each once: "F16" or "F32, U8". */
static srf_status put_tensors(json_t *facts, const struct srf_source *s)
{
    char types[128] = "", word[20];
    int64_t elements = 0;
    for (int64_t i = 0; i < srf_source_count(s); i++) {
        const struct srf_tensor_info *t = srf_source_info(s, i);
        snprintf(word, sizeof word, ", %s,", t->type); /* types: ", F32, U8," */
        size_t n = strlen(types);
        if (!strstr(types, word)) snprintf(types + n, sizeof types - n, "%s", word + (n > 0));
        elements += t->count;
    }
    size_t n = strlen(types);
    if (n) types[n - 1] = '\0';
    SRF_TRY(put_int(facts, "tensors", srf_source_count(s)));
    SRF_TRY(put_int(facts, "elements", elements));
    return put_str(facts, "types", n ? types + 2 : "");
}

/* What a run's settings say that it trains. */
static srf_status put_trained(json_t *facts, const char *settings)
{
    struct srf_train_config c;
    char words[80] = "all";
    SRF_TRY(srf_train_config_from_json(settings, &c));
    if (c.lora)
        snprintf(words, sizeof words, "additions of rank %lld to attention's matrices",
                 (long long)c.lora);
    else if (srf_policy_trained(&c) == SRF_TRAINED_ATTENTION)
        snprintf(words, sizeof words, "attention");
    return put_str(facts, "trained", words);
}

/* What only native checkpoints have. */
static srf_status put_native(json_t *facts, struct srf_h5 *f, const struct srf_model_config *c)
{
    srf_status st = SRF_OK;
    struct srf_attention_config a = srf_attention_default();
    char *text = NULL, words[200], why[100] = "";
    SRF_TRY(srf_h5_get_str(f, "/", "kind", &text));
    SRF_TRY_GO(put_str(facts, "kind", text));
    if (srf_h5_has_attr(f, "/", "creator")) {
        srf__free(text);
        SRF_TRY_GO(srf_h5_get_str(f, "/", "creator", &text));
        SRF_TRY_GO(put_str(facts, "creator", text));
    }
    if (srf_h5_has_attr(f, "/attention", "settings")) {
        srf__free(text);
        SRF_TRY_GO(srf_h5_get_str(f, "/attention", "settings", &text));
        SRF_TRY_GO(srf_attention_from_json(text, &a));
    }
    srf_attention_describe(&a, words, sizeof words);
    SRF_TRY_GO(put_str(facts, "attention", words));
    if (a.kind == SRF_ATTN_SRF) {
        int64_t d = c->c / c->n_heads, count = 0;
        SRF_TRY_GO(srf_attention_check_layers(&a, c->n_layers));
        for (int64_t l = 0; l < c->n_layers; l++)
            count += c->n_heads *
                     srf_attn_state_count(srf_attention_m(&a, l), d, srf_attention_window(&a, l));
        SRF_TRY_GO(put(facts, "features_stored", json_boolean(srf_h5_has(f, "/attention/w"))));
        SRF_TRY_GO(put_int(facts, "state_bytes_per_sequence", count * 4));
        bool slow = cli_slow_prefill(&a, c, why, sizeof why);
        snprintf(words, sizeof words, "token by token: %s", why);
        SRF_TRY_GO(put_str(facts, "prefill_on_cuda", slow ? words : "by chunks"));
    }
    if (srf_h5_has_attr(f, "/trainer", "step")) {
        int64_t step;
        SRF_TRY_GO(srf_h5_get_i64(f, "/trainer", "step", &step));
        SRF_TRY_GO(put_int(facts, "step", step));
        srf__free(text);
        SRF_TRY_GO(srf_h5_get_str(f, "/trainer", "settings", &text));
        SRF_TRY_GO(put_trained(facts, text));
    }
cleanup:
    srf__free(text);
    return st;
}

/* ---- kinds of files -------------------------------------------------------------------------- */

static srf_status checkpoint(json_t *facts, const char *path)
{
    struct srf_source *s;
    struct srf_h5 *f = NULL;
    struct srf_model_config c = {0};
    srf_status st = SRF_OK;
    SRF_TRY(srf_source_open(path, &s));
    SRF_TRY_GO(put_str(facts, "format", srf_source_kind_name(srf_source_kind(s))));
    if (srf_source_config(s)) SRF_TRY_GO(put_config(facts, srf_source_config(s), &c));
    SRF_TRY_GO(put_tensors(facts, s));
    if (srf_source_kind(s) == SRF_SOURCE_NATIVE) {
        SRF_TRY_GO(srf_h5_open(path, &f));
        SRF_TRY_GO(put_native(facts, f, &c));
    }
    const char *tokenizer = srf_source_tokenizer(s);
    SRF_TRY_GO(put(facts, "tokenizer", json_boolean(tokenizer != NULL)));
    if (tokenizer) SRF_TRY_GO(put_tokenizer(facts, tokenizer, strlen(tokenizer)));
cleanup:
    srf_h5_close(f);
    srf_source_close(s);
    return st;
}

/* With weights, or with a tokenizer alone. */
static srf_status directory(json_t *facts, const char *path)
{
    if (checkpoint(facts, path) == SRF_OK) return SRF_OK;
    char why[512];
    struct srf_bpe *bpe;
    snprintf(why, sizeof why, "%s", srf_error_message());
    if (json_object_size(facts) > 0 || srf_bpe_load(path, &bpe) != SRF_OK)
        SRF_FAIL(SRF_FORMAT, "%s", why);
    srf_status st = put_str(facts, "format", "tokenizer directory");
    if (st == SRF_OK) st = put_bpe(facts, bpe);
    srf_bpe_free(bpe);
    return st;
}

static srf_status token_set(json_t *facts, const char *path)
{
    static const char *const formats[][2] = {
        {"hdf5", "token set"}, {"llmc", "llm.c tokens"}, {"npy", "NumPy array of tokens"}};
    struct srf_tokenset *ts;
    srf_status st = SRF_OK;
    SRF_TRY(srf_tokenset_open(path, NULL, 0, &ts));
    for (int i = 0; i < 3; i++)
        if (strcmp(formats[i][0], srf_tokenset_format(ts)) == 0)
            SRF_TRY_GO(put_str(facts, "format", formats[i][1]));
    SRF_TRY_GO(put_int(facts, "tokens", srf_tokenset_count(ts)));
    if (srf_tokenset_documents(ts))
        SRF_TRY_GO(put_int(facts, "documents", srf_tokenset_documents(ts)));
    if (srf_tokenset_tokenizer_hash(ts)[0])
        SRF_TRY_GO(put_str(facts, "tokenizer_hash", srf_tokenset_tokenizer_hash(ts)));
cleanup:
    srf_tokenset_close(ts);
    return st;
}

/* What srf generate --state-out writes. */
static srf_status states(json_t *facts, const char *path)
{
    static const char *const texts[] = {"creator", "model", "positions", "dtype"};
    struct srf_h5 *f;
    struct srf_attention_config a;
    char *text = NULL, words[200];
    int64_t count;
    SRF_TRY(srf_h5_open(path, &f));
    srf_status st = SRF_OK;
    SRF_TRY_GO(put_str(facts, "format", "states of sequences"));
    for (int i = 0; i < 4; i++) {
        if (i == 3 && !srf_h5_has_attr(f, "/", texts[i])) continue; /* an older file */
        SRF_TRY_GO(srf_h5_get_str(f, "/", texts[i], &text));
        SRF_TRY_GO(put_str(facts, texts[i], text));
        srf__free(text);
        text = NULL;
    }
    SRF_TRY_GO(srf_h5_get_str(f, "/", "attention", &text));
    SRF_TRY_GO(srf_attention_from_json(text, &a));
    srf_attention_describe(&a, words, sizeof words);
    SRF_TRY_GO(put_str(facts, "attention", words));
    SRF_TRY_GO(srf_h5_get_i64(f, "/", "count", &count));
    st = put_int(facts, "states", count);
cleanup:
    srf__free(text);
    srf_h5_close(f);
    return st;
}

/* An HDF5 file: its attribute kind says which. */
static srf_status hdf5(json_t *facts, const char *path)
{
    struct srf_h5 *f;
    char *kind = NULL;
    SRF_TRY(srf_h5_open(path, &f));
    srf_status st = SRF_OK;
    if (srf_h5_has_attr(f, "/", "kind")) st = srf_h5_get_str(f, "/", "kind", &kind);
    srf_h5_close(f);
    bool tokens = kind && strcmp(kind, "tokens") == 0, saved = kind && strcmp(kind, "states") == 0;
    srf__free(kind);
    SRF_TRY(st);
    if (saved) return states(facts, path);
    return tokens ? token_set(facts, path) : checkpoint(facts, path);
}

/* A tokenizer.json or a config.json. */
static srf_status json_file(json_t *facts, const char *path)
{
    char *text;
    size_t n;
    struct srf_model_config c;
    json_t *root = NULL;
    SRF_TRY(srf__file_text(path, MAX_JSON, &text, &n));
    srf_status st = SRF_OK;
    json_error_t error;
    root = json_loadb(text, n, JSON_REJECT_DUPLICATES, &error);
    SRF_FAIL_GO_IF(!root, SRF_FORMAT, "bad JSON in line %d: %s", error.line, error.text);
    if (json_object_get(root, "model_type")) {
        SRF_TRY_GO(put_str(facts, "format", "config.json"));
        SRF_TRY_GO(put_config(facts, text, &c));
    } else {
        SRF_FAIL_GO_IF(!json_is_object(json_object_get(root, "model")), SRF_FORMAT,
                       "JSON, but neither a config.json nor a tokenizer.json");
        SRF_TRY_GO(put_str(facts, "format", "tokenizer.json"));
        SRF_TRY_GO(put_tokenizer(facts, text, n));
    }
cleanup:
    json_decref(root);
    srf__free(text);
    return st;
}

/* By the first bytes. */
static srf_status gather(json_t *facts, const char *path)
{
    struct stat info;
    struct srf__file f;
    unsigned char head[16] = {0};
    int32_t magic;
    SRF_FAIL_IF(stat(path, &info) != 0, SRF_IO, "%s", strerror(errno));
    if (S_ISDIR(info.st_mode)) return directory(facts, path);
    SRF_TRY(srf__file_open(path, &f));
    int64_t size = f.size;
    srf_status st = srf__file_read(&f, 0, head, size < 16 ? size : 16);
    srf__file_close(&f);
    SRF_TRY(st);
    SRF_FAIL_IF(size == 0, SRF_FORMAT, "the file is empty");
    SRF_TRY(put_int(facts, "bytes", size));
    memcpy(&magic, head, sizeof magic);
    if (memcmp(head, "\x89HDF\r\n\x1a\n", 8) == 0) return hdf5(facts, path);
    if (memcmp(head, "\x93NUMPY", 6) == 0 || magic == 20240520 || magic == 20240801)
        return token_set(facts, path);
    size_t k = 0;
    while (k < sizeof head && isspace(head[k])) k++;
    if (k < sizeof head && head[k] == '{') return json_file(facts, path);
    return checkpoint(facts, path);
}

/* ---- printing -------------------------------------------------------------------------------- */

/* "state_bytes_per_sequence" -> "state bytes per sequence", numbers in groups of three digits. */
static void print_line(const char *key, const json_t *value)
{
    char name[32], digits[32];
    snprintf(name, sizeof name, "%s", key);
    for (char *s = name; *s; s++)
        if (*s == '_') *s = ' ';
    printf("%-25s", name);
    if (json_is_integer(value)) {
        int n = snprintf(digits, sizeof digits, "%lld", (long long)json_integer_value(value));
        for (int i = 0; i < n; i++) printf("%s%c", i && (n - i) % 3 == 0 ? "," : "", digits[i]);
        puts("");
    } else if (json_is_string(value)) {
        for (const char *s = json_string_value(value); *s; s++)
            putchar((unsigned char)*s < 32 || *s == 127 ? '?' : *s);
        puts("");
    } else {
        puts(json_is_true(value) ? "yes" : "no");
    }
}

int cmd_info(int argc, char **argv)
{
    const char *path, *key;
    bool as_json = false;
    json_t *value;
    const struct cli_option options[] = {
        {"json", 0, CLI_FLAG, &as_json, NULL, "print one JSON object", 0, 0}, {0}};
    int code;
    if (!cli_parse(argc, argv, "srf info FILE [--json]",
                   "Say what a file holds: a transformers directory, .safetensors, llm.c model or\n"
                   "tokens, native checkpoint, token set, states of srf generate, .npy,\n"
                   "tokenizer.json or config.json.",
                   options, &path, 1, 1, NULL, NULL, &code))
        return code;
    json_t *facts = json_object();
    srf_status st = gather(facts, path);
    if (st != SRF_OK) {
        srf__error_prefix("%s", path);
        code = cli_fail();
    } else if (as_json) {
        char *text = json_dumps(facts, JSON_PRESERVE_ORDER);
        puts(text ? text : "{}");
        free(text);
    } else {
        json_object_foreach(facts, key, value) print_line(key, value);
    }
    json_decref(facts);
    return code;
}
