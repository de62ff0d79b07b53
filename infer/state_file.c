#include "infer/state_file.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { MAX_STATES = 1 << 24 };

static const char *const positions_names[] = {
    [SRF_POS_ERROR] = "error", [SRF_POS_WRAP] = "wrap", [SRF_POS_CLAMP] = "clamp"};

static void state_path(char path[48], int64_t i)
{
    snprintf(path, 48, "/states/%lld", (long long)i);
}

/* Shape of a state of this model as srf_engine_state_get gives it; its element type. */
static enum srf_dtype state_shape(const struct srf_engine *e, int64_t shape[3])
{
    const struct srf_model *m = srf_engine_model(e);
    bool alike = !m->attention.n_windows && !m->attention.n_layer_m;
    shape[0] = alike ? m->config.n_layers : 1;
    shape[1] = alike ? m->config.n_heads : 1;
    shape[2] = srf_model_state_count(m) / (shape[0] * shape[1]);
    return srf_ctx_acc(m->ctx);
}

/* ---- writing --------------------------------------------------------------------------------- */

static srf_status put_header(struct srf_h5 *f, const struct srf_checkpoint *ck,
                             const struct srf_engine *e, int64_t n)
{
    char hash[17], *attention;
    SRF_TRY(srf_checkpoint_hash(ck, hash));
    SRF_TRY(srf_attention_to_json(&ck->attention, &attention));
    srf_status st = srf_h5_put_str(f, "/", "attention", attention);
    srf__free(attention);
    SRF_TRY(st);
    SRF_TRY(srf_h5_put_header(f, "states"));
    SRF_TRY(srf_h5_put_str(f, "/", "model", hash));
    SRF_TRY(srf_h5_put_str(f, "/", "dtype", srf_dtype_name(srf_engine_state_dtype(e))));
    SRF_TRY(srf_h5_put_str(f, "/", "positions", positions_names[srf_engine_config(e)->positions]));
    return srf_h5_put_i64(f, "/", "count", n);
}

static srf_status put_state(struct srf_h5 *f, const struct srf_engine *e, int64_t slot,
                            const struct srf_state_info *info, void *values)
{
    int64_t shape[3];
    char path[48];
    enum srf_dtype type = state_shape(e, shape);
    state_path(path, slot);
    SRF_TRY(srf_engine_state_get(e, slot, values));
    SRF_TRY(srf_h5_put(f, path, type, 3, shape, values));
    SRF_TRY(srf_h5_put_i64(f, path, "position", srf_engine_position(e, slot)));
    SRF_TRY(srf_h5_put_i64(f, path, "pending", info->pending));
    return srf_h5_put_i64(f, path, "made", info->made);
}

srf_status srf_states_save(const char *path, const struct srf_checkpoint *ck,
                           const struct srf_engine *e, int64_t n,
                           const struct srf_state_info *infos)
{
    struct srf_h5 *f = NULL;
    char *values = NULL;
    srf_status st = SRF_OK;
    SRF_FAIL_IF(n < 1 || n > srf_engine_config(e)->slots || n > MAX_STATES, SRF_INVALID,
                "%lld states of %lld slots", (long long)n, (long long)srf_engine_config(e)->slots);
    SRF_TRY_GO(SRF_ALLOC(values, srf_engine_value_bytes(e)));
    SRF_TRY_GO(srf_h5_create(path, &f));
    SRF_TRY_GO(put_header(f, ck, e, n));
    for (int64_t i = 0; i < n; i++) SRF_TRY_GO(put_state(f, e, i, &infos[i], values));
    st = srf_h5_commit(f);
    f = NULL;
cleanup:
    srf_h5_close(f);
    srf__free(values);
    return st;
}

/* ---- reading --------------------------------------------------------------------------------- */

struct srf_states {
    struct srf_h5 *file;
    char *path;
    int64_t count;
    enum srf_positions positions;
};

static srf_status check_model(struct srf_h5 *f, const char *path, const struct srf_checkpoint *ck)
{
    char expected[17], *found;
    SRF_TRY(srf_checkpoint_hash(ck, expected));
    SRF_TRY(srf_h5_get_str(f, "/", "model", &found));
    srf_status st = SRF_OK;
    SRF_FAIL_GO_IF(strcmp(found, expected) != 0, SRF_MISMATCH,
                   "%s: a state of another model: expected %s, found %.60s", path, expected, found);
cleanup:
    srf__free(found);
    return st;
}

static srf_status check_attention(struct srf_h5 *f, const char *path,
                                  const struct srf_checkpoint *ck)
{
    struct srf_attention_config found;
    char *text, *expected = NULL, *canonical = NULL, was[200], is[200];
    SRF_TRY(srf_h5_get_str(f, "/", "attention", &text));
    srf_status st = SRF_OK;
    SRF_TRY_GO(srf_attention_from_json(text, &found));
    SRF_TRY_GO(srf_attention_to_json(&found, &canonical));
    SRF_TRY_GO(srf_attention_to_json(&ck->attention, &expected));
    if (strcmp(canonical, expected) == 0) goto cleanup;
    srf_attention_describe(&found, was, sizeof was);
    srf_attention_describe(&ck->attention, is, sizeof is);
    bool told = strcmp(was, is) != 0;
    SRF_FAIL_GO(SRF_MISMATCH, "%s: a state of other attention: expected %s, found %s", path,
                told ? is : expected, told ? was : canonical);
cleanup:
    if (st == SRF_FORMAT || st == SRF_UNSUPPORTED) srf__error_prefix("%s", path);
    srf__free(text);
    srf__free(expected);
    srf__free(canonical);
    return st;
}

static srf_status read_header(struct srf_states *s, const struct srf_checkpoint *ck)
{
    struct srf_h5 *f = s->file;
    char *positions;
    SRF_TRY(srf_h5_check_header(f, "states"));
    SRF_TRY(check_attention(f, s->path, ck));
    SRF_TRY(check_model(f, s->path, ck));
    SRF_TRY(srf_h5_get_i64(f, "/", "count", &s->count));
    SRF_FAIL_IF(s->count < 1 || s->count > MAX_STATES, SRF_FORMAT,
                "%s: count: expected 1 to %d, found %lld", s->path, MAX_STATES,
                (long long)s->count);
    SRF_TRY(srf_h5_get_str(f, "/", "positions", &positions));
    int policy = -1;
    for (int i = 0; i < 3; i++)
        if (strcmp(positions, positions_names[i]) == 0) policy = i;
    srf__free(positions);
    SRF_FAIL_IF(policy < 0, SRF_FORMAT, "%s: positions: expected error, wrap or clamp", s->path);
    s->positions = (enum srf_positions)policy;
    return SRF_OK;
}

srf_status srf_states_open(const char *path, const struct srf_checkpoint *ck,
                           struct srf_states **out)
{
    struct srf_states *s;
    srf_status st = SRF_OK;
    *out = NULL;
    SRF_TRY(SRF_CALLOC(s, 1));
    s->path = srf__strdup(path);
    SRF_FAIL_GO_IF(!s->path, SRF_NOMEM, "out of memory");
    SRF_TRY_GO(srf_h5_open(path, &s->file));
    SRF_TRY_GO(read_header(s, ck));
    *out = s;
cleanup:
    if (st != SRF_OK) srf_states_close(s);
    return st;
}

void srf_states_close(struct srf_states *s)
{
    if (!s) return;
    srf_h5_close(s->file);
    srf__free(s->path);
    srf__free(s);
}

int64_t srf_states_count(const struct srf_states *s)
{
    return s->count;
}

/* A whole number that goes with a state. */
static srf_status get_number(struct srf_states *s, const char *path, const char *name, int64_t min,
                             int64_t max, int64_t *value)
{
    SRF_TRY(srf_h5_get_i64(s->file, path, name, value));
    SRF_FAIL_IF(*value < min || *value > max, SRF_FORMAT,
                "%s: %s: %s: expected %lld to %lld, found %lld", s->path, path, name,
                (long long)min, (long long)max, (long long)*value);
    return SRF_OK;
}

static srf_status get_info(struct srf_states *s, const char *path, const struct srf_engine *e,
                           struct srf_state_info *info)
{
    const struct srf_model_config *c = &srf_engine_model(e)->config;
    int64_t pending;
    SRF_TRY(get_number(s, path, "position", 0, INT32_MAX, &info->position));
    SRF_TRY(get_number(s, path, "made", 0, INT64_MAX, &info->made));
    SRF_TRY(get_number(s, path, "pending", -1, c->vocab - 1, &pending));
    info->pending = (int32_t)pending;
    enum srf_positions rule = srf_engine_config(e)->positions;
    SRF_FAIL_IF(info->position > c->n_pos && rule != s->positions, SRF_MISMATCH,
                "%s: %s: at position %lld of %lld by --positions %s, expected %s", s->path, path,
                (long long)info->position, (long long)c->n_pos, positions_names[s->positions],
                positions_names[rule]);
    return SRF_OK;
}

/* What the engine can keep: a file may come from one that keeps more. */
static double largest(enum srf_dtype type)
{
    return type == SRF_F64 ? DBL_MAX : type == SRF_F32 ? (double)FLT_MAX : 0x1.fep127;
}

srf_status srf_states_read(struct srf_states *s, int64_t i, struct srf_engine *e, int64_t slot,
                           struct srf_state_info *info)
{
    int64_t shape[3];
    char path[48];
    void *values = NULL;
    enum srf_dtype type = state_shape(e, shape);
    int64_t n = shape[0] * shape[1] * shape[2];
    double most = largest(srf_engine_state_dtype(e));
    srf_status st = SRF_OK;
    SRF_FAIL_IF(i < 0 || i >= s->count, SRF_INVALID, "%s: state %lld of %lld", s->path,
                (long long)i, (long long)s->count);
    state_path(path, i);
    SRF_TRY(get_info(s, path, e, info));
    values = srf__alloc((size_t)n, srf_dtype_bytes(type));
    SRF_FAIL_IF(!values, SRF_NOMEM, "out of memory: a state");
    SRF_TRY_GO(srf_h5_get(s->file, path, type, 3, shape, values));
    for (int64_t k = 0; k < n; k++) {
        double x =
            type == SRF_F64 ? ((const double *)values)[k] : (double)((const float *)values)[k];
        SRF_FAIL_GO_IF(!(fabs(x) <= most), SRF_NONFINITE,
                       "%s: %s: element %lld is %g: expected at most %g in %s", s->path, path,
                       (long long)k, x, most, srf_dtype_name(srf_engine_state_dtype(e)));
    }
    st = srf_engine_state_set(e, slot, values, info->position);
cleanup:
    srf__free(values);
    return st;
}
