/* llm.c's model files: 256 int32 of header, then the tensors in a fixed order, each over all
 * layers. Linear weights are stored (out, in); the vocabulary is padded to a multiple of 128. */
#include "checkpoints/source_internal.h"
#include "checkpoints/writers.h"
#include "kernels/numeric.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEADER = 256, VERSION_F32 = 3, VERSION_BF16 = 5, VOCAB_MULTIPLE = 128 };

/* The header's fields, in its order. */
struct dims {
    int64_t positions, vocab, layers, heads, c, padded_vocab;
};

/* One row per tensor in the file's order. Sizes of the stored shape are multiples of c, or: */
enum { NONE = 0, PADDED_VOCAB = -1, POSITIONS = -2 };
static const struct row {
    const char *name; /* transformers'; in a layer: after "transformer.h.<layer>." */
    bool layered;
    int rows, cols; /* cols NONE: one dimension */
    bool transposed;
} rows[] = {
    {"wte.weight", false, PADDED_VOCAB, 1, false}, {"wpe.weight", false, POSITIONS, 1, false},
    {"ln_1.weight", true, 1, NONE, false},         {"ln_1.bias", true, 1, NONE, false},
    {"attn.c_attn.weight", true, 3, 1, true},      {"attn.c_attn.bias", true, 3, NONE, false},
    {"attn.c_proj.weight", true, 1, 1, true},      {"attn.c_proj.bias", true, 1, NONE, false},
    {"ln_2.weight", true, 1, NONE, false},         {"ln_2.bias", true, 1, NONE, false},
    {"mlp.c_fc.weight", true, 4, 1, true},         {"mlp.c_fc.bias", true, 4, NONE, false},
    {"mlp.c_proj.weight", true, 1, 4, true},       {"mlp.c_proj.bias", true, 1, NONE, false},
    {"ln_f.weight", false, 1, NONE, false},        {"ln_f.bias", false, 1, NONE, false},
};
enum { N_ROWS = sizeof rows / sizeof *rows };

static void row_name(const struct row *r, int64_t layer, char *buf, size_t size)
{
    if (r->layered)
        snprintf(buf, size, "transformer.h.%lld.%s", (long long)layer, r->name);
    else
        snprintf(buf, size, "transformer.%s", r->name);
}

static int64_t extent(int code, const struct dims *d)
{
    return code == PADDED_VOCAB ? d->padded_vocab : code == POSITIONS ? d->positions : code * d->c;
}

/* Elements stored of one layer's tensor. Dims are at most 2^31: no overflow. */
static int64_t stored_count(const struct row *r, const struct dims *d)
{
    return extent(r->rows, d) * (r->cols == NONE ? 1 : extent(r->cols, d));
}

/* ---- reading --------------------------------------------------------------------------------- */

/* Bytes that a file of these dims must have, or -1 if that is more than 2^62. */
static int64_t file_bytes(const struct dims *d, int64_t width)
{
    __int128 total = 0;
    for (int i = 0; i < N_ROWS; i++)
        total += (__int128)stored_count(&rows[i], d) * (rows[i].layered ? d->layers : 1);
    total = total * width + HEADER * 4;
    return total > (__int128)1 << 62 ? -1 : (int64_t)total;
}

static srf_status make_config(const struct dims *d, char **out)
{
    json_t *config =
        json_pack("{s:s, s:[s], s:s, s:I, s:I, s:I, s:I, s:I, s:f, s:b}", "model_type", "gpt2",
                  "architectures", "GPT2LMHeadModel", "activation_function", "gelu_new",
                  "vocab_size", (json_int_t)d->vocab, "n_positions", (json_int_t)d->positions,
                  "n_embd", (json_int_t)d->c, "n_layer", (json_int_t)d->layers, "n_head",
                  (json_int_t)d->heads, "layer_norm_epsilon", 1e-5, "tie_word_embeddings", 1);
    /* llm.c's models are GPT-2's; with its vocabulary, so are the special tokens. */
    if (config && d->vocab == 50257) {
        json_object_set_new(config, "bos_token_id", json_integer(50256));
        json_object_set_new(config, "eos_token_id", json_integer(50256));
    }
    char *text = config ? json_dumps(config, JSON_INDENT(2)) : NULL;
    json_decref(config);
    *out = text ? srf__strdup(text) : NULL;
    free(text);
    SRF_FAIL_IF(!*out, SRF_NOMEM, "out of memory");
    return SRF_OK;
}

static srf_status check_header(const int32_t *h, int64_t size, struct dims *d,
                               enum srf_dtype *dtype)
{
    SRF_FAIL_IF(h[0] != SRF__LLMC_MAGIC, SRF_FORMAT, "expected magic %d, found %d", SRF__LLMC_MAGIC,
                h[0]);
    SRF_FAIL_IF(h[1] != VERSION_F32 && h[1] != VERSION_BF16, SRF_UNSUPPORTED,
                "expected llm.c version %d (fp32) or %d (bf16), found %d", VERSION_F32,
                VERSION_BF16, h[1]);
    *dtype = h[1] == VERSION_F32 ? SRF_F32 : SRF_BF16;
    *d = (struct dims){h[2], h[3], h[4], h[5], h[6], h[7]};
    static const char *const names[] = {"max_seq_len", "vocab_size", "num_layers",
                                        "num_heads",   "channels",   "padded_vocab_size"};
    for (int i = 0; i < 6; i++)
        SRF_FAIL_IF(h[2 + i] < 1, SRF_FORMAT, "header: %s is %d", names[i], h[2 + i]);
    SRF_FAIL_IF(d->c > 1 << 24, SRF_FORMAT, "header: channels is %lld", (long long)d->c);
    SRF_FAIL_IF(d->c % d->heads != 0, SRF_FORMAT, "header: %lld channels for %lld heads",
                (long long)d->c, (long long)d->heads);
    SRF_FAIL_IF(d->padded_vocab < d->vocab, SRF_FORMAT,
                "header: padded_vocab_size %lld < vocab_size %lld", (long long)d->padded_vocab,
                (long long)d->vocab);
    int64_t bytes = file_bytes(d, (int64_t)srf_dtype_bytes(*dtype));
    SRF_FAIL_IF(bytes != size, SRF_FORMAT, "expected %lld bytes by its header, found %lld",
                (long long)bytes, (long long)size);
    return SRF_OK;
}

static srf_status read_model(struct srf_source *s, int index)
{
    const struct srf__file f = s->files[index];
    int32_t header[HEADER];
    struct dims d = {0};
    enum srf_dtype dtype = SRF_F32;
    SRF_FAIL_IF(f.size < (int64_t)sizeof header, SRF_FORMAT, "%lld bytes hold no llm.c header",
                (long long)f.size);
    SRF_TRY(srf__file_read(&f, 0, header, sizeof header));
    SRF_TRY(check_header(header, f.size, &d, &dtype));
    SRF_TRY(make_config(&d, &s->config));
    int64_t offset = sizeof header, width = (int64_t)srf_dtype_bytes(dtype);
    for (int i = 0; i < N_ROWS; i++) {
        const struct row *r = &rows[i];
        for (int64_t layer = 0; layer < (r->layered ? d.layers : 1); layer++) {
            char name[80];
            row_name(r, layer, name, sizeof name);
            struct srf__source_tensor t = {.name = name, .file = index, .offset = offset};
            t.type = (char *)(dtype == SRF_F32 ? "F32" : "BF16");
            t.info.readable = true;
            t.info.dtype = dtype;
            t.info.ndim = r->cols == NONE ? 1 : 2;
            t.transposed = r->transposed;
            int64_t a = r->rows == PADDED_VOCAB ? d.vocab : extent(r->rows, &d);
            t.info.shape[0] = r->transposed ? extent(r->cols, &d) : a;
            t.info.shape[1] = r->transposed ? a : extent(r->cols, &d);
            SRF_TRY(srf__source_add(s, &t));
            offset += stored_count(r, &d) * width;
        }
    }
    return SRF_OK;
}

srf_status srf__llmc_read(struct srf_source *s, const char *path)
{
    int index;
    SRF_TRY(srf__source_add_file(s, path, &index));
    srf_status st = read_model(s, index);
    if (st != SRF_OK) srf__error_prefix("%s", path);
    return st;
}

/* ---- writing --------------------------------------------------------------------------------- */

static srf_status get_int(const json_t *config, const char *key, int64_t *out)
{
    const json_t *v = json_object_get(config, key);
    SRF_FAIL_IF(!json_is_integer(v) || json_integer_value(v) < 1 ||
                    json_integer_value(v) > INT32_MAX,
                SRF_FORMAT, "config: expected a number from 1 in %s", key);
    *out = json_integer_value(v);
    return SRF_OK;
}

/* Dims of a config that llm.c can hold. */
static srf_status read_config(const json_t *config, struct dims *d)
{
    SRF_TRY(get_int(config, "n_positions", &d->positions));
    SRF_TRY(get_int(config, "vocab_size", &d->vocab));
    SRF_TRY(get_int(config, "n_layer", &d->layers));
    SRF_TRY(get_int(config, "n_head", &d->heads));
    SRF_TRY(get_int(config, "n_embd", &d->c));
    SRF_FAIL_IF(d->c > 1 << 24 || d->vocab > INT32_MAX - VOCAB_MULTIPLE, SRF_UNSUPPORTED,
                "config: too large for llm.c");
    d->padded_vocab = (d->vocab + VOCAB_MULTIPLE - 1) / VOCAB_MULTIPLE * VOCAB_MULTIPLE;
    const char *type = json_string_value(json_object_get(config, "model_type"));
    SRF_FAIL_IF(!type || strcmp(type, "gpt2") != 0, SRF_UNSUPPORTED,
                "llm.c holds models of type gpt2 only, found %s", type ? type : "none");
    const json_t *inner = json_object_get(config, "n_inner");
    SRF_FAIL_IF(json_is_integer(inner) && json_integer_value(inner) != 4 * d->c, SRF_UNSUPPORTED,
                "llm.c needs n_inner = 4 n_embd = %lld, found %lld", (long long)(4 * d->c),
                (long long)json_integer_value(inner));
    const json_t *eps = json_object_get(config, "layer_norm_epsilon");
    double value = json_number_value(eps);
    SRF_FAIL_IF(eps && !(value > 0.999e-5 && value < 1.001e-5), SRF_UNSUPPORTED,
                "llm.c needs layer_norm_epsilon = 1e-05, found %g", value);
    SRF_FAIL_IF(json_is_false(json_object_get(config, "tie_word_embeddings")), SRF_UNSUPPORTED,
                "llm.c needs tie_word_embeddings");
    return SRF_OK;
}

static const struct srf_tensor_out *find(const struct srf_tensor_out *tensors, int64_t n,
                                         const char *name)
{
    for (int64_t i = 0; i < n; i++)
        if (srf__tensor_name_cmp(tensors[i].name, name) == 0) return &tensors[i];
    return NULL;
}

/* One tensor of one layer, in the file's layout. */
static srf_status write_tensor(struct srf__out *o, const struct row *r, int64_t layer,
                               const struct dims *d, const struct srf_tensor_out *tensors,
                               int64_t n, enum srf_dtype dtype)
{
    srf_status st = SRF_OK;
    char name[80];
    row_name(r, layer, name, sizeof name);
    const struct srf_tensor_out *t = find(tensors, n, name);
    SRF_FAIL_IF(!t, SRF_INVALID, "tensor %s is missing", name);
    int64_t a = r->rows == PADDED_VOCAB ? d->vocab : extent(r->rows, d), b = extent(r->cols, d);
    bool ok = t->ndim == (r->cols == NONE ? 1 : 2) && t->shape[0] == (r->transposed ? b : a) &&
              (t->ndim == 1 || t->shape[1] == (r->transposed ? a : b));
    SRF_FAIL_IF(!ok, SRF_INVALID, "tensor %s: its shape is not that of the config", name);
    int64_t count = stored_count(r, d);
    if (!r->transposed) {
        int64_t have = a * (r->cols == NONE ? 1 : b);
        SRF_TRY(srf__out_floats(o, name, t->data, have, dtype));
        if (have == count) return SRF_OK;
        float *zeros;
        SRF_TRY(SRF_CALLOC(zeros, count - have));
        st = srf__out_floats(o, name, zeros, count - have, dtype);
        srf__free(zeros);
        return st;
    }
    float *stored;
    SRF_TRY(SRF_ALLOC(stored, count));
    srf__transpose(stored, t->data, a, b);
    st = srf__out_floats(o, name, stored, count, dtype);
    srf__free(stored);
    return st;
}

static srf_status write_model(const char *path, const struct dims *d,
                              const struct srf_tensor_out *tensors, int64_t n, enum srf_dtype dtype)
{
    int64_t expected = 0;
    for (int i = 0; i < N_ROWS; i++) expected += rows[i].layered ? d->layers : 1;
    SRF_FAIL_IF(n != expected, SRF_UNSUPPORTED,
                "llm.c holds %lld tensors for %lld layers, found %lld", (long long)expected,
                (long long)d->layers, (long long)n);
    srf_status st = SRF_OK;
    struct srf__out o;
    int32_t header[HEADER] = {SRF__LLMC_MAGIC,       dtype == SRF_F32 ? VERSION_F32 : VERSION_BF16,
                              (int32_t)d->positions, (int32_t)d->vocab,
                              (int32_t)d->layers,    (int32_t)d->heads,
                              (int32_t)d->c,         (int32_t)d->padded_vocab};
    SRF_TRY(srf__out_open(path, &o));
    SRF_TRY_GO(srf__out_write(&o, header, sizeof header));
    for (int i = 0; i < N_ROWS; i++)
        for (int64_t layer = 0; layer < (rows[i].layered ? d->layers : 1); layer++)
            SRF_TRY_GO(write_tensor(&o, &rows[i], layer, d, tensors, n, dtype));
    SRF_TRY_GO(srf__out_commit(&o));
cleanup:
    srf__out_abort(&o);
    return st;
}

srf_status srf_llmc_write(const char *path, const char *config_json,
                          const struct srf_tensor_out *tensors, int64_t n, enum srf_dtype dtype)
{
    SRF_FAIL_IF(dtype != SRF_F32 && dtype != SRF_BF16, SRF_UNSUPPORTED,
                "llm.c files are f32 or bf16, not %s", srf_dtype_name(dtype));
    json_t *config = NULL;
    struct dims d = {0};
    SRF_TRY(srf__json_parse("config", config_json, strlen(config_json), &config));
    srf_status st = read_config(config, &d);
    json_decref(config);
    SRF_TRY(st);
    return write_model(path, &d, tensors, n, dtype);
}
