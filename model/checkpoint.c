#include "model/checkpoint.h"
#include "checkpoints/writers.h"
#include "model/arch.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const char *const kind_names[] = {"weights", "training", "recurrent"};

int64_t srf_checkpoint_bias_count(const struct srf_checkpoint *ck)
{
    return (ck->attention.per_head ? ck->config.n_heads : 1) *
           srf_attention_m_before(&ck->attention, ck->config.n_layers);
}

int64_t srf_checkpoint_features_count(const struct srf_checkpoint *ck)
{
    return srf_checkpoint_bias_count(ck) *
           srf_attention_columns(&ck->attention, ck->config.c / ck->config.n_heads);
}

void srf_checkpoint_set_attention(struct srf_checkpoint *ck, const struct srf_attention_config *a)
{
    if (!srf_attention_same_features(&ck->attention, a)) {
        srf__free(ck->features_w);
        srf__free(ck->features_bias);
        ck->features_w = ck->features_bias = NULL;
    }
    ck->attention = *a;
}

void srf_checkpoint_free(struct srf_checkpoint *ck)
{
    if (!ck) return;
    srf_tensor_table_free(&ck->table);
    srf__free(ck->params);
    srf__free(ck->tokenizer_json);
    srf__free(ck->features_w);
    srf__free(ck->features_bias);
    srf__free(ck);
}

/* An empty checkpoint of this config: table made, parameters allocated, zero. */
static srf_status create(const char *config_json, struct srf_checkpoint **out)
{
    *out = NULL;
    struct srf_checkpoint *ck;
    srf_status st = SRF_OK;
    SRF_TRY(SRF_CALLOC(ck, 1));
    ck->attention = srf_attention_default();
    SRF_TRY_GO(srf_model_config_from_json(config_json, &ck->config));
    SRF_TRY_GO(srf_tensor_table_create(&ck->config, &ck->table));
    *out = ck;
cleanup:
    if (st != SRF_OK) srf_checkpoint_free(ck);
    return st;
}

/* ---- reading --------------------------------------------------------------------------------- */

static srf_status read_tensor(struct srf_source *src, const struct srf_tensor *row, float *out)
{
    int64_t i = srf_source_find(src, row->name);
    SRF_FAIL_IF(i < 0, SRF_FORMAT, "tensor %s is missing", row->name);
    const struct srf_tensor_info *info = srf_source_info(src, i);
    bool same = info->ndim == row->ndim;
    for (int k = 0; same && k < row->ndim; k++) same = info->shape[k] == row->shape[k];
    if (!same) {
        char want[64], found[96];
        srf__shape_text(row->ndim, row->shape, want, sizeof want);
        srf__shape_text(info->ndim, info->shape, found, sizeof found);
        SRF_FAIL(SRF_FORMAT, "tensor %s: expected shape %s, found %s", row->name, want, found);
    }
    return srf_source_read_f32(src, i, out);
}

/* A tensor that nothing here reads would be silently lost. */
static srf_status refuse_unknown(const struct srf_source *src, const struct srf_checkpoint *ck)
{
    for (int64_t i = 0; i < srf_source_count(src); i++) {
        const char *name = srf_source_info(src, i)->name;
        const char *tied = ck->config.arch->tied_head;
        if (ck->config.arch->ignores(name) || (tied && strcmp(name, tied) == 0)) continue;
        bool known = false;
        for (int64_t k = 0; k < ck->table.n && !known; k++)
            known = srf_source_find(src, ck->table.rows[k].name) == i;
        SRF_FAIL_IF(!known, SRF_FORMAT, "tensor %s is not one of a %s model", name,
                    ck->config.arch->name);
    }
    return SRF_OK;
}

/* An output head that was trained on its own would be silently lost. Up to the rounding of another
 * type (a bfloat16's is 2^-9) it must be the tensor that it is tied to. */
static srf_status check_tied_head(struct srf_source *src, const struct srf_checkpoint *ck)
{
    const struct srf_arch *arch = ck->config.arch;
    if (!arch->tied_head || srf_source_find(src, arch->tied_head) < 0) return SRF_OK;
    const struct srf_tensor *row = &ck->table.rows[arch->head_row(&ck->config)];
    const float *want = ck->params + row->offset;
    struct srf_tensor head = *row;
    double norm = 0, apart = 0;
    float *found;
    srf_status st = SRF_OK;
    snprintf(head.name, sizeof head.name, "%s", arch->tied_head);
    SRF_TRY(SRF_ALLOC(found, row->count));
    SRF_TRY_GO(read_tensor(src, &head, found));
    for (int64_t i = 0; i < row->count; i++) {
        double d = (double)found[i] - (double)want[i];
        norm += (double)want[i] * (double)want[i];
        apart += d * d;
    }
    SRF_FAIL_GO_IF(!(apart <= 1e-4 * norm), SRF_UNSUPPORTED,
                   "tensor %s is not %s again: an output head of its own is not supported",
                   arch->tied_head, row->name);
cleanup:
    srf__free(found);
    return st;
}

/* Dimensions of W in a file, and without the last one of its bias: (layers, sets, m, columns), or
 * (rows, columns) where layers have numbers of features of their own. */
static int features_shape(const struct srf_checkpoint *ck, int64_t shape[4])
{
    const struct srf_attention_config *a = &ck->attention;
    int64_t columns = srf_attention_columns(a, ck->config.c / ck->config.n_heads);
    if (a->n_layer_m) {
        shape[0] = srf_checkpoint_bias_count(ck);
        shape[1] = columns;
        return 2;
    }
    shape[0] = ck->config.n_layers;
    shape[1] = a->per_head ? ck->config.n_heads : 1;
    shape[2] = a->m;
    shape[3] = columns;
    return 4;
}

/* What only a native file has: kind, attention settings, the features in force. */
static srf_status read_native(const char *path, struct srf_checkpoint *ck)
{
    struct srf_h5 *f;
    char *text = NULL;
    SRF_TRY(srf_h5_open(path, &f));
    srf_status st = SRF_OK;
    SRF_TRY_GO(srf_h5_get_str(f, "/", "kind", &text));
    int kind = -1;
    for (int i = 0; i < 3; i++)
        if (strcmp(kind_names[i], text) == 0) kind = i;
    SRF_FAIL_GO_IF(kind < 0, SRF_FORMAT, "kind '%s': expected weights, training or recurrent",
                   text);
    ck->kind = (enum srf_checkpoint_kind)kind;
    srf__free(text);
    text = NULL;
    if (!srf_h5_has(f, "/attention")) goto cleanup;
    SRF_TRY_GO(srf_h5_get_str(f, "/attention", "settings", &text));
    SRF_TRY_GO(srf_attention_from_json(text, &ck->attention));
    SRF_TRY_GO(srf_attention_check(&ck->attention, ck->config.c / ck->config.n_heads));
    SRF_TRY_GO(srf_attention_check_layers(&ck->attention, ck->config.n_layers));
    if (!srf_h5_has(f, "/attention/w")) goto cleanup;
    int64_t shape[4];
    int ndim = features_shape(ck, shape);
    SRF_TRY_GO(SRF_ALLOC(ck->features_w, srf_checkpoint_features_count(ck)));
    SRF_TRY_GO(SRF_ALLOC(ck->features_bias, srf_checkpoint_bias_count(ck)));
    SRF_TRY_GO(srf_h5_get(f, "/attention/w", SRF_F32, ndim, shape, ck->features_w));
    SRF_TRY_GO(srf_h5_get(f, "/attention/bias", SRF_F32, ndim - 1, shape, ck->features_bias));
    for (int64_t i = 0; i < srf_checkpoint_features_count(ck); i++)
        SRF_FAIL_GO_IF(!isfinite(ck->features_w[i]), SRF_NONFINITE,
                       "/attention/w: element %lld is not finite", (long long)i);
    for (int64_t i = 0; i < srf_checkpoint_bias_count(ck); i++)
        SRF_FAIL_GO_IF(!isfinite(ck->features_bias[i]), SRF_NONFINITE,
                       "/attention/bias: element %lld is not finite", (long long)i);
cleanup:
    srf__free(text);
    srf_h5_close(f);
    return st;
}

static srf_status load(const char *path, const char *config_json, struct srf_source *src,
                       struct srf_checkpoint **out)
{
    if (!config_json) config_json = srf_source_config(src);
    SRF_FAIL_IF(!config_json, SRF_FORMAT, "there is no config.json beside it: give one (--config)");
    struct srf_checkpoint *ck;
    SRF_TRY(create(config_json, &ck));
    srf_status st = SRF_OK;
    if (srf_source_tokenizer(src)) {
        ck->tokenizer_json = srf__strdup(srf_source_tokenizer(src));
        SRF_FAIL_GO_IF(!ck->tokenizer_json, SRF_NOMEM, "out of memory: tokenizer");
    }
    /* Names and shapes first: nothing is allocated for a file that is not what it says. */
    SRF_TRY_GO(refuse_unknown(src, ck));
    bool shard = srf_source_kind(src) == SRF_SOURCE_SAFETENSORS && strstr(path, "-of-");
    for (int64_t i = 0; i < ck->table.n; i++)
        SRF_FAIL_GO_IF(srf_source_find(src, ck->table.rows[i].name) < 0, SRF_FORMAT,
                       "tensor %s is missing%s", ck->table.rows[i].name,
                       shard ? " (in one of several shards? name their directory)" : "");
    SRF_TRY_GO(SRF_CALLOC(ck->params, ck->table.total));
    for (int64_t i = 0; i < ck->table.n; i++)
        SRF_TRY_GO(read_tensor(src, &ck->table.rows[i], ck->params + ck->table.rows[i].offset));
    SRF_TRY_GO(check_tied_head(src, ck));
    if (srf_source_kind(src) == SRF_SOURCE_NATIVE) SRF_TRY_GO(read_native(path, ck));
    *out = ck;
cleanup:
    if (st != SRF_OK) srf_checkpoint_free(ck);
    return st;
}

srf_status srf_checkpoint_load(const char *path, const char *config_json,
                               struct srf_checkpoint **out)
{
    *out = NULL;
    struct srf_source *src;
    SRF_TRY(srf_source_open(path, &src));
    srf_status st = load(path, config_json, src, out);
    srf_source_close(src);
    if (st != SRF_OK) srf__error_prefix("%s", path);
    return st;
}

srf_status srf_checkpoint_init(const char *config_json, uint64_t seed, struct srf_checkpoint **out)
{
    struct srf_checkpoint *ck;
    SRF_TRY(create(config_json, &ck));
    srf_status st = SRF_OK;
    SRF_TRY_GO(SRF_CALLOC(ck->params, ck->table.total));
    for (int64_t i = 0; i < ck->table.n; i++) {
        const struct srf_tensor *row = &ck->table.rows[i];
        struct srf_rng rng = srf_rng_at(seed, SRF_RNG_INIT, 0, (uint32_t)i, 0);
        float *p = ck->params + row->offset;
        for (int64_t k = 0; k < row->count; k++)
            p[k] = row->init_std < 0 ? 1.0f : (float)(row->init_std * srf_rng_normal(&rng));
    }
    *out = ck;
cleanup:
    if (st != SRF_OK) srf_checkpoint_free(ck);
    return st;
}

/* FNV-1a over words of 8 bytes, with a rotation that takes high bits down. */
static uint64_t hash_bytes(uint64_t h, const void *data, size_t n)
{
    for (size_t i = 0; i < n; i += 8) {
        uint64_t word = 0;
        memcpy(&word, (const char *)data + i, n - i < 8 ? n - i : 8);
        h = (h ^ word) * 0x100000001b3u;
        h = h << 29 | h >> 35;
    }
    return (h ^ n) * 0x100000001b3u;
}

srf_status srf_checkpoint_hash(const struct srf_checkpoint *ck, char hex[17])
{
    char *config;
    SRF_TRY(srf_model_config_to_json(&ck->config, &config));
    uint64_t h = hash_bytes(0xcbf29ce484222325u, config, strlen(config));
    srf__free(config);
    h = hash_bytes(h, ck->params, (size_t)ck->table.total * sizeof *ck->params);
    if (ck->features_w) {
        h = hash_bytes(h, ck->features_w,
                       (size_t)srf_checkpoint_features_count(ck) * sizeof *ck->features_w);
        h = hash_bytes(h, ck->features_bias,
                       (size_t)srf_checkpoint_bias_count(ck) * sizeof *ck->features_bias);
    }
    snprintf(hex, 17, "%016llx", (unsigned long long)h);
    return SRF_OK;
}

/* to (n, c) = from (old, c), row i taken at i (old - 1) / (n - 1). */
static void stretch(const float *from, int64_t old, float *to, int64_t n, int64_t c)
{
    for (int64_t i = 0; i < n; i++) {
        double at = (double)(i * (old - 1)) / (double)(n - 1);
        int64_t low = (int64_t)at, high = low + 1 < old ? low + 1 : low;
        double share = at - (double)low;
        for (int64_t j = 0; j < c; j++)
            to[i * c + j] = (float)((1 - share) * (double)from[low * c + j] +
                                    share * (double)from[high * c + j]);
    }
}

srf_status srf_checkpoint_stretch_positions(struct srf_checkpoint *ck, int64_t n_pos)
{
    SRF_FAIL_IF(n_pos <= ck->config.n_pos, SRF_INVALID,
                "positions stretched to %lld: expected more than the model's own %lld",
                (long long)n_pos, (long long)ck->config.n_pos);
    struct srf_model_config config = ck->config;
    struct srf_tensor_table table;
    float *params;
    config.n_pos = n_pos;
    SRF_TRY(srf_tensor_table_create(&config, &table));
    srf_status st = SRF_CALLOC(params, table.total);
    if (st != SRF_OK) {
        srf_tensor_table_free(&table);
        return st;
    }
    int64_t row = config.arch->position_row(&config);
    for (int64_t i = 0; i < table.n; i++) {
        const struct srf_tensor *from = &ck->table.rows[i], *to = &table.rows[i];
        if (i == row)
            stretch(ck->params + from->offset, ck->config.n_pos, params + to->offset, n_pos,
                    config.c);
        else
            memcpy(params + to->offset, ck->params + from->offset,
                   (size_t)from->count * sizeof *params);
    }
    srf__free(ck->params);
    srf_tensor_table_free(&ck->table);
    ck->params = params;
    ck->table = table;
    ck->config = config;
    return SRF_OK;
}

/* ---- writing --------------------------------------------------------------------------------- */

srf_status srf_checkpoint_put(const struct srf_checkpoint *ck, struct srf_h5 *f)
{
    SRF_TRY(srf_h5_put_header(f, kind_names[ck->kind]));
    char *text;
    SRF_TRY(srf_model_config_to_json(&ck->config, &text));
    srf_status st = srf_h5_put_text(f, "/config", text);
    srf__free(text);
    SRF_TRY(st);
    if (ck->tokenizer_json) SRF_TRY(srf_h5_put_text(f, "/tokenizer", ck->tokenizer_json));
    for (int64_t i = 0; i < ck->table.n; i++) {
        const struct srf_tensor *row = &ck->table.rows[i];
        char path[112];
        snprintf(path, sizeof path, "/weights/%s", row->name);
        SRF_TRY(srf_h5_put(f, path, SRF_F32, row->ndim, row->shape, ck->params + row->offset));
    }
    if (ck->features_w) {
        int64_t shape[4];
        int ndim = features_shape(ck, shape);
        SRF_TRY(srf_h5_put(f, "/attention/w", SRF_F32, ndim, shape, ck->features_w));
        SRF_TRY(srf_h5_put(f, "/attention/bias", SRF_F32, ndim - 1, shape, ck->features_bias));
    }
    SRF_TRY(srf_attention_to_json(&ck->attention, &text));
    st = srf_h5_put_str(f, "/attention", "settings", text);
    srf__free(text);
    return st;
}

srf_status srf_checkpoint_save(const struct srf_checkpoint *ck, const char *path)
{
    SRF_FAIL_IF(ck->kind == SRF_CKPT_RECURRENT &&
                    (ck->attention.kind != SRF_ATTN_SRF || !ck->features_w),
                SRF_INVALID,
                "a recurrent export needs SRF attention with its features: run srf retrofit first");
    struct srf_h5 *f;
    SRF_TRY(srf_h5_create(path, &f));
    srf_status st = srf_checkpoint_put(ck, f);
    if (st == SRF_OK) return srf_h5_commit(f);
    srf_h5_close(f);
    return st;
}

/* The table as the writers want it; caller srf__free()s. */
static srf_status tensors_out(const struct srf_checkpoint *ck, struct srf_tensor_out **out)
{
    SRF_TRY(SRF_CALLOC(*out, ck->table.n));
    for (int64_t i = 0; i < ck->table.n; i++) {
        const struct srf_tensor *row = &ck->table.rows[i];
        (*out)[i] = (struct srf_tensor_out){.name = row->name,
                                            .ndim = row->ndim,
                                            .shape = {row->shape[0], row->shape[1]},
                                            .data = ck->params + row->offset};
    }
    return SRF_OK;
}

srf_status srf_checkpoint_export_hf(const struct srf_checkpoint *ck, const char *dir,
                                    enum srf_dtype dtype)
{
    struct srf_tensor_out *out;
    char *config;
    SRF_TRY(srf_model_config_to_json(&ck->config, &config));
    srf_status st = tensors_out(ck, &out);
    if (st == SRF_OK) st = srf_hf_write(dir, config, ck->tokenizer_json, out, ck->table.n, dtype);
    srf__free(out);
    srf__free(config);
    return st;
}

srf_status srf_checkpoint_export_llmc(const struct srf_checkpoint *ck, const char *path,
                                      enum srf_dtype dtype)
{
    struct srf_tensor_out *out;
    char *config;
    SRF_TRY(srf_model_config_to_json(&ck->config, &config));
    srf_status st = tensors_out(ck, &out);
    if (st == SRF_OK) st = srf_llmc_write(path, config, out, ck->table.n, dtype);
    srf__free(out);
    srf__free(config);
    return st;
}
