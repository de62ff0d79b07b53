#include "model/config.h"
#include "model/arch.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct srf_attention_config srf_attention_default(void)
{
    return (struct srf_attention_config){
        .kind = SRF_ATTN_SOFTMAX, .m = 64, .features = SRF_SIMPLEX, .per_head = true};
}

bool srf_attention_has_map(const struct srf_attention_config *a)
{
    return a->kind == SRF_ATTN_HEDGEHOG || a->kind == SRF_ATTN_T2R;
}

bool srf_attention_has_features(const struct srf_attention_config *a)
{
    return a->kind == SRF_ATTN_SRF || srf_attention_has_map(a);
}

int64_t srf_attention_columns(const struct srf_attention_config *a, int64_t d)
{
    return srf_attention_has_map(a) ? d + 1 : d;
}

static const char *const kind_names[SRF_ATTN_KINDS] = {"softmax", "srf", "window", "hedgehog",
                                                       "t2r"};

const char *srf_attention_kind_name(enum srf_attention_kind kind)
{
    return kind_names[kind];
}

srf_status srf_attention_kind_parse(const char *text, enum srf_attention_kind *out)
{
    for (int i = 0; i < SRF_ATTN_KINDS; i++)
        if (strcmp(text, kind_names[i]) == 0) {
            *out = (enum srf_attention_kind)i;
            return SRF_OK;
        }
    SRF_FAIL(SRF_INVALID, "'%s': expected softmax, srf, window, hedgehog or t2r", text);
}

/* What is asked of the rivals beyond what is asked of SRF attention. */
static srf_status check_rival(const struct srf_attention_config *a)
{
    SRF_FAIL_IF((a->n_windows || a->n_layer_m) && a->kind != SRF_ATTN_SRF, SRF_INVALID,
                "attention: only srf has windows or features by layer");
    SRF_FAIL_IF(a->kind == SRF_ATTN_WINDOW && a->window == 0, SRF_INVALID,
                "attention: a window alone needs a window of at least 1 token");
    SRF_FAIL_IF(a->sinks < 0 || a->sinks > 65536, SRF_INVALID,
                "attention: %lld sinks: expected 0 to 65536", (long long)a->sinks);
    SRF_FAIL_IF(srf_attention_has_map(a) && !a->per_head, SRF_INVALID,
                "attention: each head has a trained map of its own");
    SRF_FAIL_IF(srf_attention_has_map(a) && a->far_none, SRF_INVALID,
                "attention: a trained map is the far part, which cannot be none");
    SRF_FAIL_IF(a->kind == SRF_ATTN_HEDGEHOG && a->m % 2, SRF_INVALID,
                "attention: Hedgehog features come in pairs: m = %lld is odd", (long long)a->m);
    return SRF_OK;
}

srf_status srf_attention_check(const struct srf_attention_config *a, int64_t d)
{
    if (a->kind == SRF_ATTN_SOFTMAX) return SRF_OK;
    SRF_TRY(check_rival(a));
    SRF_FAIL_IF(a->m < 1 || a->m > 65536, SRF_INVALID,
                "attention: %lld features: expected 1 to 65536", (long long)a->m);
    SRF_FAIL_IF(a->window < 0 || a->window > SRF_WINDOW_MAX, SRF_INVALID,
                "attention: window %lld: expected 0 (pure SRF) to %d", (long long)a->window,
                SRF_WINDOW_MAX);
    for (int64_t i = 0; i < a->n_windows; i++)
        SRF_FAIL_IF(a->windows[i] < 0 || a->windows[i] > a->window, SRF_INVALID,
                    "attention: layer %lld has a window of %d: expected 0 to %lld", (long long)i,
                    a->windows[i], (long long)a->window);
    for (int64_t i = 0; i < a->n_layer_m; i++)
        SRF_FAIL_IF(a->layer_m[i] < 1 || a->layer_m[i] > a->m, SRF_INVALID,
                    "attention: layer %lld has %d features: expected 1 to %lld", (long long)i,
                    a->layer_m[i], (long long)a->m);
    SRF_FAIL_IF(d < 2, SRF_INVALID, "attention: heads of %lld: random features need at least 2",
                (long long)d);
    SRF_FAIL_IF(a->rotation == SRF_ROT_HD && (d & (d - 1)) != 0, SRF_INVALID,
                "attention: rotation hd needs a head size that is a power of two, found %lld",
                (long long)d);
    for (int64_t i = 0; i < (a->n_windows ? a->n_windows : 1); i++)
        SRF_FAIL_IF(a->far_none && srf_attention_window(a, i) == 0, SRF_INVALID,
                    "attention: without a far part there must be a window");
    SRF_FAIL_IF(!(a->oprf_a <= 0 && a->oprf_a > -1e6), SRF_INVALID,
                "attention: OPRF parameter A = %g: expected <= 0", a->oprf_a);
    return SRF_OK;
}

srf_status srf_attention_check_layers(const struct srf_attention_config *a, int64_t n_layers)
{
    SRF_FAIL_IF(a->n_windows && a->n_windows != n_layers, SRF_MISMATCH,
                "attention: windows of %lld layers: the model has %lld", (long long)a->n_windows,
                (long long)n_layers);
    SRF_FAIL_IF(a->n_layer_m && a->n_layer_m != n_layers, SRF_MISMATCH,
                "attention: features of %lld layers: the model has %lld", (long long)a->n_layer_m,
                (long long)n_layers);
    return SRF_OK;
}

int64_t srf_attention_window(const struct srf_attention_config *a, int64_t layer)
{
    return a->n_windows ? a->windows[layer] : a->window;
}

int64_t srf_attention_m(const struct srf_attention_config *a, int64_t layer)
{
    return a->n_layer_m ? a->layer_m[layer] : a->m;
}

int64_t srf_attention_m_before(const struct srf_attention_config *a, int64_t layer)
{
    int64_t sum = a->n_layer_m ? 0 : layer * a->m;
    for (int64_t l = 0; l < layer && a->n_layer_m; l++) sum += a->layer_m[l];
    return sum;
}

/* "32,32,64", numbers from `least` to 65536: own (n) and the largest. n = 0: all the same. */
static srf_status parse_layers(const char *text, const char *what, long least, int32_t *own,
                               int64_t *n, int64_t *largest)
{
    const char *s = text;
    int64_t count = 0, most = 0;
    bool same = true;
    for (;; s++) {
        char *end;
        errno = 0;
        long value = strtol(s, &end, 10);
        SRF_FAIL_IF(end == s || *s < '0' || *s > '9' || errno || value < least || value > 65536 ||
                        count == SRF_LAYERS_MAX || (*end && *end != ','),
                    SRF_INVALID,
                    "%s '%s': expected at most %d numbers from %ld to 65536 with commas between",
                    what, text, SRF_LAYERS_MAX, least);
        own[count++] = (int32_t)value;
        most = value > most ? value : most;
        same = same && value == own[0];
        s = end;
        if (!*s) break;
    }
    *n = same && count > 1 ? 0 : count;
    *largest = most;
    return SRF_OK;
}

srf_status srf_attention_set_windows(struct srf_attention_config *a, const char *text)
{
    return parse_layers(text, "windows", 0, a->windows, &a->n_windows, &a->window);
}

srf_status srf_attention_set_layer_m(struct srf_attention_config *a, const char *text)
{
    return parse_layers(text, "features", 1, a->layer_m, &a->n_layer_m, &a->m);
}

/* The longest such text, its end included. */
enum { LAYERS_TEXT = SRF_LAYERS_MAX * 6 + 1 };

static void print_layers(const int32_t *own, int64_t n, char buf[LAYERS_TEXT])
{
    buf[0] = '\0';
    for (int64_t i = 0, at = 0; i < n && at < LAYERS_TEXT; i++)
        at += snprintf(buf + at, (size_t)(LAYERS_TEXT - at), "%s%d", i ? "," : "", own[i]);
}

/* Of features that stand for nothing: their weight is 0 beside any exact one. */
#define FAR_NONE_BIAS (-1e4f)

srf_status srf_attention_draw(const struct srf_attention_config *a, int64_t n_layers,
                              int64_t n_sets, int64_t d, const double *oprf_a, float *w,
                              float *bias)
{
    int64_t n = n_layers * n_sets, failed = -1;
    double *all;
    SRF_TRY(SRF_ALLOC(all, n * a->m * (d + 1)));
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < n; i++) {
        int64_t layer = i / n_sets, set = i % n_sets, m = srf_attention_m(a, layer);
        int64_t first = n_sets * srf_attention_m_before(a, layer) + set * m;
        double *own = all + i * a->m * (d + 1), *own_bias = own + m * d;
        const struct srf_features_draw_args args = {.kind = a->features,
                                                    .rotation = a->rotation,
                                                    .normalize_rows = a->normalize_rows,
                                                    .seed = a->seed,
                                                    .draw = a->draw,
                                                    .m = m,
                                                    .d = d};
        if (srf_features_draw_one(&args, layer, set, oprf_a ? oprf_a[i] : a->oprf_a, own,
                                  own_bias) != SRF_OK) {
#pragma omp critical
            failed = i;
            continue;
        }
        for (int64_t k = 0; k < m * d; k++) w[first * d + k] = (float)own[k];
        for (int64_t k = 0; k < m; k++)
            bias[first + k] = a->far_none ? FAR_NONE_BIAS : (float)own_bias[k];
    }
    srf__free(all);
    SRF_FAIL_IF(failed >= 0, SRF_INVALID, "features of layer %lld, set %lld cannot be drawn",
                (long long)(failed / n_sets), (long long)(failed % n_sets));
    return SRF_OK;
}

bool srf_attention_same_features(const struct srf_attention_config *a,
                                 const struct srf_attention_config *b)
{
    return a->kind == b->kind && a->m == b->m && a->n_layer_m == b->n_layer_m &&
           memcmp(a->layer_m, b->layer_m, (size_t)a->n_layer_m * sizeof *a->layer_m) == 0 &&
           a->features == b->features && a->rotation == b->rotation && a->per_head == b->per_head &&
           a->normalize_rows == b->normalize_rows && a->oprf_a == b->oprf_a &&
           a->far_none == b->far_none && a->seed == b->seed && a->draw == b->draw;
}

void srf_attention_describe(const struct srf_attention_config *a, char *buf, size_t size)
{
    if (a->kind == SRF_ATTN_SOFTMAX) {
        snprintf(buf, size, "softmax");
        return;
    }
    if (a->kind == SRF_ATTN_WINDOW) {
        snprintf(buf, size, "the latest %lld tokens and the first %lld", (long long)a->window,
                 (long long)a->sinks);
        return;
    }
    if (srf_attention_has_map(a)) {
        int length = snprintf(buf, size, "%s m=%lld, trained", srf_attention_kind_name(a->kind),
                              (long long)a->m);
        if (a->window && length > 0 && (size_t)length < size)
            snprintf(buf + length, size - (size_t)length, ", window %lld exact",
                     (long long)a->window);
        return;
    }
    char windows[LAYERS_TEXT], features[LAYERS_TEXT];
    print_layers(a->windows, a->n_windows, windows);
    print_layers(a->layer_m, a->n_layer_m, features);
    if (!a->n_layer_m) snprintf(features, sizeof features, "%lld", (long long)a->m);
    int n = snprintf(buf, size, "srf %s%s m=%s, %s, seed %llu draw %llu",
                     srf_feature_kind_name(a->features), a->rotation == SRF_ROT_HD ? "/hd" : "",
                     features, a->per_head ? "one draw per head" : "one draw per layer",
                     (unsigned long long)a->seed, (unsigned long long)a->draw);
    if (a->n_windows && n > 0 && (size_t)n < size)
        n += snprintf(buf + n, size - (size_t)n, ", windows %s exact", windows);
    else if (a->window && n > 0 && (size_t)n < size)
        n += snprintf(buf + n, size - (size_t)n, ", window %lld exact", (long long)a->window);
    if (a->oprf_a < 0 && n > 0 && (size_t)n < size)
        n += snprintf(buf + n, size - (size_t)n, ", oprf A=%g", a->oprf_a);
    if (a->far_none && n > 0 && (size_t)n < size)
        snprintf(buf + n, size - (size_t)n, ", nothing older");
}

srf_status srf__json_int(const json_t *root, const char *key, int64_t fallback, int64_t min,
                         int64_t max, int64_t *out)
{
    const json_t *v = json_object_get(root, key);
    if ((!v || json_is_null(v)) && fallback >= 0) {
        *out = fallback;
        return SRF_OK;
    }
    SRF_FAIL_IF(!v, SRF_FORMAT, "config: key '%s' is missing", key);
    SRF_FAIL_IF(!json_is_integer(v) || json_integer_value(v) < min || json_integer_value(v) > max,
                SRF_FORMAT, "config: '%s' must be a whole number from %lld to %lld", key,
                (long long)min, (long long)max);
    *out = json_integer_value(v);
    return SRF_OK;
}

srf_status srf__json_double(const json_t *root, const char *key, double fallback, double *out)
{
    const json_t *v = json_object_get(root, key);
    SRF_FAIL_IF(v && !json_is_number(v), SRF_FORMAT, "config: '%s' must be a number", key);
    *out = v ? json_number_value(v) : fallback;
    return SRF_OK;
}

srf_status srf__json_bool(const json_t *root, const char *key, bool fallback, bool *out)
{
    const json_t *v = json_object_get(root, key);
    SRF_FAIL_IF(v && !json_is_boolean(v), SRF_FORMAT, "config: '%s' must be true or false", key);
    *out = v ? json_is_true(v) : fallback;
    return SRF_OK;
}

/* jansson keeps 64-bit signed integers: seeds and draws above 2^63 travel as their bit pattern. */
srf_status srf_attention_to_json(const struct srf_attention_config *a, char **text)
{
    *text = NULL;
    json_t *root = json_pack(
        "{s:s, s:I, s:I, s:s, s:s, s:b, s:b, s:f, s:b, s:I, s:I}", "kind",
        srf_attention_kind_name(a->kind), "m", (json_int_t)a->m, "window", (json_int_t)a->window,
        "features", srf_feature_kind_name(a->features), "rotation", srf_rotation_name(a->rotation),
        "per_head", (int)a->per_head, "normalize_rows", (int)a->normalize_rows, "oprf_a", a->oprf_a,
        "far_none", (int)a->far_none, "seed", (json_int_t)a->seed, "draw", (json_int_t)a->draw);
    bool ok = root && (!a->sinks ||
                       json_object_set_new(root, "sinks", json_integer((json_int_t)a->sinks)) == 0);
    char own[LAYERS_TEXT];
    print_layers(a->windows, a->n_windows, own);
    ok = ok && (!a->n_windows || json_object_set_new(root, "windows", json_string(own)) == 0);
    print_layers(a->layer_m, a->n_layer_m, own);
    ok = ok && (!a->n_layer_m || json_object_set_new(root, "layer_m", json_string(own)) == 0);
    char *s = ok ? json_dumps(root, JSON_REAL_PRECISION(17)) : NULL;
    json_decref(root);
    if (s) *text = srf__strdup(s);
    free(s);
    SRF_FAIL_IF(!*text, SRF_NOMEM, "out of memory: attention settings");
    return SRF_OK;
}

static srf_status parse_attention(const json_t *root, struct srf_attention_config *a)
{
    static const char *const known[] = {
        "kind",   "m",        "window", "features", "rotation", "per_head", "normalize_rows",
        "oprf_a", "far_none", "seed",   "draw",     "sinks",    "windows",  "layer_m"};
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)root, key, value)
    {
        bool found = false;
        for (size_t i = 0; i < sizeof known / sizeof *known; i++)
            if (strcmp(known[i], key) == 0) found = true;
        SRF_FAIL_IF(!found, SRF_UNSUPPORTED, "attention settings: unknown key '%s'", key);
    }
    const char *kind = json_string_value(json_object_get(root, "kind"));
    SRF_FAIL_IF(!kind || srf_attention_kind_parse(kind, &a->kind) != SRF_OK, SRF_FORMAT,
                "attention settings: 'kind' must be softmax, srf, window, hedgehog or t2r");
    SRF_TRY(srf__json_int(root, "m", a->m, 1, 65536, &a->m));
    SRF_TRY(srf__json_int(root, "window", a->window, 0, 65536, &a->window));
    SRF_TRY(srf__json_int(root, "sinks", a->sinks, 0, 65536, &a->sinks));
    const json_t *windows = json_object_get(root, "windows");
    SRF_FAIL_IF(windows && !json_is_string(windows), SRF_FORMAT,
                "attention settings: 'windows' must be a string");
    if (windows) SRF_TRY(srf_attention_set_windows(a, json_string_value(windows)));
    const json_t *layer_m = json_object_get(root, "layer_m");
    SRF_FAIL_IF(layer_m && !json_is_string(layer_m), SRF_FORMAT,
                "attention settings: 'layer_m' must be a string");
    if (layer_m) SRF_TRY(srf_attention_set_layer_m(a, json_string_value(layer_m)));
    SRF_TRY(srf__json_bool(root, "per_head", a->per_head, &a->per_head));
    SRF_TRY(srf__json_bool(root, "normalize_rows", a->normalize_rows, &a->normalize_rows));
    SRF_TRY(srf__json_double(root, "oprf_a", a->oprf_a, &a->oprf_a));
    SRF_TRY(srf__json_bool(root, "far_none", a->far_none, &a->far_none));
    int64_t seed, draw;
    SRF_TRY(srf__json_int(root, "seed", 0, INT64_MIN, INT64_MAX, &seed));
    SRF_TRY(srf__json_int(root, "draw", 0, INT64_MIN, INT64_MAX, &draw));
    a->seed = (uint64_t)seed;
    a->draw = (uint64_t)draw;
    const char *features = json_string_value(json_object_get(root, "features"));
    const char *rotation = json_string_value(json_object_get(root, "rotation"));
    if (features) SRF_TRY(srf_feature_kind_parse(features, &a->features));
    if (rotation) SRF_TRY(srf_rotation_parse(rotation, &a->rotation));
    return SRF_OK;
}

/* Any JSON object of ours or of a stranger, with errors in one line. */
static srf_status load_object(const char *text, const char *what, json_t **root)
{
    json_error_t err;
    *root = json_loads(text, JSON_REJECT_DUPLICATES, &err);
    SRF_FAIL_IF(!*root, SRF_FORMAT, "%s: not valid JSON: line %d: %s", what, err.line, err.text);
    if (json_is_object(*root)) return SRF_OK;
    json_decref(*root);
    *root = NULL;
    SRF_FAIL(SRF_FORMAT, "%s: expected a JSON object", what);
}

srf_status srf_attention_from_json(const char *text, struct srf_attention_config *out)
{
    json_t *root;
    SRF_TRY(load_object(text, "attention settings", &root));
    *out = srf_attention_default();
    srf_status st = parse_attention(root, out);
    json_decref(root);
    return st;
}

srf_status srf_model_config_from_json(const char *text, struct srf_model_config *out)
{
    static const struct srf_arch *const archs[] = {
#define X(name, symbol) &srf_arch_##symbol,
        SRF_ARCH_LIST(X)
#undef X
    };
#define X(name, symbol) " " name
    static const char supported[] = SRF_ARCH_LIST(X);
#undef X
    *out = (struct srf_model_config){0};
    json_t *root;
    SRF_TRY(load_object(text, "config", &root));
    srf_status st = SRF_OK;
    const char *type = json_string_value(json_object_get(root, "model_type"));
    SRF_FAIL_GO_IF(!type, SRF_FORMAT, "config: key 'model_type' is missing");
    for (size_t i = 0; i < sizeof archs / sizeof *archs; i++)
        if (strcmp(archs[i]->name, type) == 0) out->arch = archs[i];
    SRF_FAIL_GO_IF(!out->arch, SRF_UNSUPPORTED,
                   "config: model_type '%s' is not supported (supported:%s)", type, supported);
    SRF_TRY_GO(out->arch->read_config(root, out));
cleanup:
    json_decref(root);
    return st;
}

srf_status srf_model_config_to_json(const struct srf_model_config *cfg, char **text)
{
    *text = NULL;
    srf_status st = SRF_OK;
    char *s = NULL;
    json_t *root = json_object();
    SRF_FAIL_GO_IF(!root, SRF_NOMEM, "out of memory: config");
    SRF_TRY_GO(cfg->arch->write_config(cfg, root));
    SRF_FAIL_GO_IF(json_object_set_new(root, "model_type", json_string(cfg->arch->name)) != 0,
                   SRF_NOMEM, "out of memory: config");
    s = json_dumps(root, JSON_INDENT(2) | JSON_SORT_KEYS);
    if (s) *text = srf__strdup(s);
    SRF_FAIL_GO_IF(!*text, SRF_NOMEM, "out of memory: config");
cleanup:
    free(s);
    json_decref(root);
    return st;
}
