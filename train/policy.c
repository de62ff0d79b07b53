#include "train/policy.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

struct srf_train_config srf_train_defaults(void)
{
    return (struct srf_train_config){
        .steps = 1000,
        .batch = 32,
        .micro_batch = 8,
        .lr = 1e-3,
        .min_lr = 1e-4,
        .warmup = 50,
        .beta1 = 0.9,
        .beta2 = 0.95,
        .eps = 1e-8,
        .weight_decay = 0.1,
        .clip = 1,
        .freeze_at = 1,
        .rest_lr = 1,
        .ce_weight = 1,
        .kl_to = 1,
        .mse_to = 1,
        .log_every = 1,
        .eval_every = 0,
        .save_every = 100,
        .eval_tokens = 65536,
    };
}

/* The settings by name: one list for checks, writing and reading. X(key, type letter, min, max) */
#define SETTINGS(X)                                                                                \
    X(steps, i, 1, 1e12)                                                                           \
    X(batch, i, 1, 1e6)                                                                            \
    X(micro_batch, i, 1, 1e6)                                                                      \
    X(seq_len, i, 1, 1 << 24)                                                                      \
    X(lr, f, 0, 10)                                                                                \
    X(min_lr, f, 0, 10)                                                                            \
    X(warmup, i, 0, 1e12)                                                                          \
    X(beta1, f, 0, 0.999999)                                                                       \
    X(beta2, f, 0, 0.99999999)                                                                     \
    X(eps, f, 1e-30, 1)                                                                            \
    X(weight_decay, f, 0, 100)                                                                     \
    X(clip, f, 0, 1e30)                                                                            \
    X(recompute, i, 0, 2)                                                                          \
    X(redraw_every, i, 0, 1e12)                                                                    \
    X(freeze_at, f, 0, 1)                                                                          \
    X(rest_lr, f, 0, 1e6)                                                                          \
    X(lora, i, 0, 65536)                                                                           \
    X(features_lr, f, 0, 10)                                                                       \
    X(ce_weight, f, 0, 1e9)                                                                        \
    X(kl_weight, f, 0, 1e9)                                                                        \
    X(kl_from, f, 0, 1)                                                                            \
    X(kl_to, f, 0, 1)                                                                              \
    X(mse_weight, f, 0, 1e9)                                                                       \
    X(mse_from, f, 0, 1)                                                                           \
    X(mse_to, f, 0, 1)                                                                             \
    X(log_every, i, 0, 1e12)                                                                       \
    X(eval_every, i, 0, 1e12)                                                                      \
    X(save_every, i, 0, 1e12)                                                                      \
    X(eval_tokens, i, 0, 1e15)

srf_status srf_train_config_check(const struct srf_train_config *c)
{
#define X(key, type, min, max)                                                                     \
    SRF_FAIL_IF(!((double)c->key >= (min) && (double)c->key <= (max)), SRF_INVALID,                \
                "training setting " #key " = %g: expected %g to %g", (double)c->key,               \
                (double)(min), (double)(max));
    SETTINGS(X)
#undef X
    SRF_FAIL_IF(c->batch % c->micro_batch != 0, SRF_INVALID,
                "batch %lld is not a multiple of micro-batch %lld", (long long)c->batch,
                (long long)c->micro_batch);
    SRF_FAIL_IF(c->lora && c->rest_lr != 1, SRF_INVALID,
                "lora trains nothing but attention's matrices: a rate of the rest means nothing");
    return SRF_OK;
}

#define JSON_VALUE_i(v) json_integer((json_int_t)(v))
#define JSON_VALUE_f(v) json_real(v)
#define IS_JSON_i       json_is_integer
#define IS_JSON_f       json_is_number
#define FROM_JSON_i     json_integer_value
#define FROM_JSON_f     json_number_value

srf_status srf_train_config_to_json(const struct srf_train_config *c, char **text)
{
    *text = NULL;
    json_t *root = json_object();
    bool ok = root != NULL;
#define X(key, type, min, max)                                                                     \
    ok = ok && json_object_set_new(root, #key, JSON_VALUE_##type(c->key)) == 0;
    SETTINGS(X)
#undef X
    ok = ok && json_object_set_new(root, "train_features", json_boolean(c->train_features)) == 0 &&
         json_object_set_new(root, "seed", json_integer((json_int_t)c->seed)) == 0;
    char *s = ok ? json_dumps(root, JSON_REAL_PRECISION(17)) : NULL;
    json_decref(root);
    if (s) *text = srf__strdup(s);
    free(s);
    SRF_FAIL_IF(!*text, SRF_NOMEM, "out of memory: training settings");
    return SRF_OK;
}

static srf_status parse(json_t *root, struct srf_train_config *out)
{
    const char *key;
    json_t *value;
    json_object_foreach(root, key, value)
    {
#define X(name, type, min, max)                                                                    \
    if (strcmp(key, #name) == 0 && IS_JSON_##type(value)) {                                        \
        out->name = FROM_JSON_##type(value);                                                       \
        continue;                                                                                  \
    }
        SETTINGS(X)
#undef X
        if (strcmp(key, "train_features") == 0 && json_is_boolean(value)) {
            out->train_features = json_is_true(value);
            continue;
        }
        if (strcmp(key, "seed") == 0 && json_is_integer(value)) {
            out->seed = (uint64_t)json_integer_value(value);
            continue;
        }
        SRF_FAIL(SRF_FORMAT, "training settings: '%s' is unknown or of the wrong type", key);
    }
    return srf_train_config_check(out);
}

srf_status srf_train_config_from_json(const char *text, struct srf_train_config *out)
{
    *out = srf_train_defaults();
    json_error_t err;
    json_t *root = json_loads(text, JSON_REJECT_DUPLICATES, &err);
    SRF_FAIL_IF(!root, SRF_FORMAT, "training settings: not valid JSON: %s", err.text);
    srf_status st = parse(root, out);
    json_decref(root);
    return st;
}

double srf_policy_lr(const struct srf_train_config *c, int64_t step)
{
    if (step < c->warmup) return c->lr * (double)(step + 1) / (double)(c->warmup + 1);
    int64_t span = c->steps - 1 - c->warmup;
    double x = span > 0 ? (double)(step - c->warmup) / (double)span : 1;
    return c->min_lr + (c->lr - c->min_lr) * 0.5 * (1 + cos(3.14159265358979323846 * x));
}

double srf_policy_features_lr(const struct srf_train_config *c, int64_t step)
{
    double lr = srf_policy_lr(c, step);
    return c->features_lr > 0 && c->lr > 0 ? lr * (c->features_lr / c->lr) : lr;
}

/* First step that no longer redraws. */
static int64_t freeze_step(const struct srf_train_config *c)
{
    return (int64_t)floor(c->freeze_at * (double)c->steps);
}

bool srf_policy_frozen(const struct srf_train_config *c, int64_t step)
{
    return c->redraw_every == 0 || step >= freeze_step(c);
}

uint64_t srf_policy_draw(const struct srf_train_config *c, int64_t step)
{
    if (c->redraw_every == 0) return 0;
    int64_t last = freeze_step(c) > 0 ? freeze_step(c) - 1 : 0;
    return (uint64_t)((step < last ? step : last) / c->redraw_every);
}

static bool within(const struct srf_train_config *c, double from, double to, int64_t step)
{
    double x = (double)step / (double)c->steps;
    return x >= from && x < to;
}

double srf_policy_kl(const struct srf_train_config *c, int64_t step)
{
    return within(c, c->kl_from, c->kl_to, step) ? c->kl_weight : 0;
}

double srf_policy_mse(const struct srf_train_config *c, int64_t step)
{
    return within(c, c->mse_from, c->mse_to, step) ? c->mse_weight : 0;
}

enum srf_trained srf_policy_trained(const struct srf_train_config *c)
{
    if (c->lora) return SRF_TRAINED_PROJECTIONS;
    return c->rest_lr == 0 ? SRF_TRAINED_ATTENTION : SRF_TRAINED_ALL;
}

bool srf_policy_needs_teacher(const struct srf_train_config *c)
{
    return c->kl_weight > 0 || c->mse_weight > 0;
}
