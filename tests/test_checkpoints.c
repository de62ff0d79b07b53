/* Readers and writers of checkpoints/: what is written comes back, by the format's definition and
 * not only by our own reader; nothing half-written is left; no allocation failure leaks. */
#include "checkpoints/source.h"
#include "checkpoints/writers.h"
#include "data/h5.h"
#include "kernels/numeric.h"
#include "tests/scratch.h"

#include <math.h>

/* ---- a small GPT-2 -------------------------------------------------------------------------- */

enum { C = 24, HEADS = 3, LAYERS = 2, POSITIONS = 7, VOCAB = 131, N_TENSORS = 4 + 12 * LAYERS };

static const char config_json[] =
    "{\"model_type\": \"gpt2\", \"n_embd\": 24, \"n_head\": 3, \"n_layer\": 2, \"n_inner\": null,"
    " \"n_positions\": 7, \"vocab_size\": 131, \"layer_norm_epsilon\": 1e-05}";

struct model {
    struct srf_tensor_out t[N_TENSORS];
    char names[N_TENSORS][64];
    float *data[N_TENSORS];
    int n;
};

static void add(struct model *m, const char *name, int layer, int64_t rows, int64_t cols)
{
    int i = m->n++;
    if (layer < 0)
        sprintf(m->names[i], "transformer.%s", name);
    else
        sprintf(m->names[i], "transformer.h.%d.%s", layer, name);
    int64_t count = cols ? rows * cols : rows;
    double *x = malloc((size_t)count * sizeof *x);
    m->data[i] = malloc((size_t)count * sizeof(float));
    test_normal(x, count, 0.5, (uint32_t)i);
    for (int64_t k = 0; k < count; k++) m->data[i][k] = (float)x[k];
    free(x);
    m->t[i] = (struct srf_tensor_out){m->names[i], cols ? 2 : 1, {rows, cols}, m->data[i]};
}

static void make_model(struct model *m)
{
    m->n = 0;
    add(m, "wte.weight", -1, VOCAB, C);
    add(m, "wpe.weight", -1, POSITIONS, C);
    for (int l = 0; l < LAYERS; l++) {
        add(m, "ln_1.weight", l, C, 0);
        add(m, "ln_1.bias", l, C, 0);
        add(m, "attn.c_attn.weight", l, C, 3 * C);
        add(m, "attn.c_attn.bias", l, 3 * C, 0);
        add(m, "attn.c_proj.weight", l, C, C);
        add(m, "attn.c_proj.bias", l, C, 0);
        add(m, "ln_2.weight", l, C, 0);
        add(m, "ln_2.bias", l, C, 0);
        add(m, "mlp.c_fc.weight", l, C, 4 * C);
        add(m, "mlp.c_fc.bias", l, 4 * C, 0);
        add(m, "mlp.c_proj.weight", l, 4 * C, C);
        add(m, "mlp.c_proj.bias", l, C, 0);
    }
    add(m, "ln_f.weight", -1, C, 0);
    add(m, "ln_f.bias", -1, C, 0);
    assert_int_equal(m->n, N_TENSORS);
}

static void free_model(struct model *m)
{
    for (int i = 0; i < m->n; i++) free(m->data[i]);
}

static float rounded(float x, enum srf_dtype dtype)
{
    return dtype == SRF_F16    ? srf_f16_to_f32(srf_f32_to_f16(x))
           : dtype == SRF_BF16 ? srf_bf16_to_f32(srf_f32_to_bf16(x))
                               : x;
}

/* A source must hold exactly these tensors, each value rounded to dtype and no further. */
static void check_source(const char *path, const struct srf_tensor_out *t, int64_t n,
                         enum srf_dtype dtype, enum srf_source_kind kind)
{
    struct srf_source *s;
    test_ok(srf_source_open(path, &s));
    assert_int_equal(srf_source_kind(s), kind);
    assert_int_equal(srf_source_count(s), n);
    for (int64_t i = 0; i < n; i++) {
        int64_t k = srf_source_find(s, t[i].name);
        assert_true(k >= 0);
        const struct srf_tensor_info *info = srf_source_info(s, k);
        assert_int_equal(info->ndim, t[i].ndim);
        int64_t count = 1;
        for (int d = 0; d < info->ndim; d++) {
            assert_int_equal(info->shape[d], t[i].shape[d]);
            count *= t[i].shape[d];
        }
        assert_int_equal(info->count, count);
        float *x = malloc((size_t)count * sizeof *x + 1);
        test_ok(srf_source_read_f32(s, k, x));
        for (int64_t j = 0; j < count; j++)
            assert_true(x[j] == rounded(t[i].data[j], dtype)); /* NaN fails */
        free(x);
    }
    srf_source_close(s);
}

/* ---- safetensors ---------------------------------------------------------------------------- */

static void safetensors_round_trip(void **state)
{
    (void)state;
    float data[60];
    for (int i = 0; i < 60; i++) data[i] = (float)(i - 30) * 1.2345f;
    data[7] = 0x1p-24f; /* the smallest half */
    data[8] = -65504;   /* the largest */
    struct srf_tensor_out t[] = {
        {"scalar", 0, {0}, data},          {"empty", 2, {0, 5}, data},
        {"vector", 1, {3}, data + 1},      {"quote\"back\\slash", 2, {3, 5}, data + 2},
        {"three", 3, {2, 3, 4}, data + 5}, {"four", 4, {5, 1, 4, 3}, data}};
    const enum srf_dtype types[] = {SRF_F32, SRF_F16, SRF_BF16};
    char path[128];
    test_at(path, "a.safetensors");
    for (int k = 0; k < 3; k++) {
        test_ok(srf_safetensors_write(path, t, 6, types[k]));
        check_source(path, t, 6, types[k], SRF_SOURCE_SAFETENSORS);
        size_t n;
        unsigned char *raw = test_slurp(path, &n);
        uint64_t header = raw[0] | (uint64_t)raw[1] << 8;
        assert_int_equal(header % 8, 0);
        assert_int_equal(n, 8 + header + (1 + 0 + 3 + 15 + 24 + 60) * (k ? 2 : 4));
        assert_int_equal(raw[8], '{');
        assert_non_null(strstr((char *)raw + 8, "{\"format\":\"pt\"}"));
        if (k == 0) assert_memory_equal(raw + 8 + header + 4, data + 1, 12); /* after the scalar */
        free(raw);
    }
    assert_int_equal(unlink(path), 0);
    assert_int_equal(test_entries(test_root), 0);
}

static void safetensors_refuses_what_does_not_fit(void **state)
{
    (void)state;
    float big[2] = {1, 7e4f}, bad[2] = {1, NAN};
    struct srf_tensor_out t = {"x", 1, {2}, big}, u = {"x", 1, {2}, bad};
    struct srf_tensor_out twice[] = {t, t};
    char path[128];
    test_at(path, "a.safetensors");
    test_fails(srf_safetensors_write(path, &t, 1, SRF_F16), SRF_NONFINITE, "tensor x: element 1");
    test_fails(srf_safetensors_write(path, &u, 1, SRF_F32), SRF_NONFINITE, "tensor x: element 1");
    test_fails(srf_safetensors_write(path, twice, 2, SRF_F32), SRF_INVALID, "twice");
    test_fails(srf_safetensors_write(path, &t, 1, SRF_F64), SRF_INVALID, "f32, f16 or bf16");
    test_fails(srf_safetensors_write("", &t, 1, SRF_F32), SRF_INVALID, "empty");
    test_fails(srf_safetensors_write("no/such/dir/a", &t, 1, SRF_F32), SRF_IO, "No such file");
    assert_int_equal(test_entries(test_root), 0);
}

/* A tensor of a type nobody reads is listed, and refused only when it is asked for. */
static void safetensors_foreign_types(void **state)
{
    (void)state;
    const char header[] =
        "{\"mask\":{\"dtype\":\"BOOL\",\"shape\":[1,1,2,2],\"data_offsets\":[0,4]},"
        "\"w\":{\"dtype\":\"F64\",\"shape\":[2],\"data_offsets\":[4,20]},"
        "\"n\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[20,28]}}";
    unsigned char raw[8 + sizeof header - 1 + 28] = {sizeof header - 1};
    double w[2] = {0.5, -3};
    float n[2] = {2, INFINITY}, x[4];
    memcpy(raw + 8, header, sizeof header - 1);
    memcpy(raw + 8 + sizeof header - 1 + 4, w, 16);
    memcpy(raw + 8 + sizeof header - 1 + 20, n, 8);
    char path[128];
    test_spit(test_at(path, "a.safetensors"), raw, sizeof raw);
    struct srf_source *s;
    test_ok(srf_source_open(path, &s));
    int64_t mask = srf_source_find(s, "mask");
    assert_false(srf_source_info(s, mask)->readable);
    assert_string_equal(srf_source_info(s, mask)->type, "BOOL");
    test_fails(srf_source_read_f32(s, mask, x), SRF_UNSUPPORTED, "mask: expected dtype");
    test_ok(srf_source_read_f32(s, srf_source_find(s, "transformer.w"), x));
    assert_true(x[0] == 0.5f && x[1] == -3);
    test_fails(srf_source_read_f32(s, srf_source_find(s, "n"), x), SRF_NONFINITE, "element 1");
    assert_int_equal(srf_source_find(s, "m"), -1);
    assert_null(srf_source_config(s));
    srf_source_close(s);
    unlink(path);
}

/* ---- transformers directories --------------------------------------------------------------- */

static void hf_round_trip(void **state)
{
    (void)state;
    struct model m;
    make_model(&m);
    char dir[128], path[160];
    test_at(dir, "hf/");
    test_ok(srf_hf_write(dir, config_json, "{\"tok\": 1}", m.t, m.n, SRF_BF16));
    check_source(dir, m.t, m.n, SRF_BF16, SRF_SOURCE_HF);
    struct srf_source *s;
    test_ok(srf_source_open(dir, &s));
    assert_string_equal(srf_source_config(s), config_json);
    assert_string_equal(srf_source_tokenizer(s), "{\"tok\": 1}");
    srf_source_close(s);
    assert_int_equal(test_entries(dir), 3);
    assert_int_equal(test_entries(test_root), 1);
    test_fails(srf_hf_write(dir, config_json, NULL, m.t, m.n, SRF_F32), SRF_IO, "not empty");
    check_source(dir, m.t, m.n, SRF_BF16, SRF_SOURCE_HF);
    /* An empty directory is taken; a failure leaves it as it was. */
    assert_int_equal(mkdir(test_at(path, "empty"), 0755), 0);
    m.data[3][2] = INFINITY;
    test_fails(srf_hf_write(path, config_json, "", m.t, m.n, SRF_F32), SRF_NONFINITE, m.names[3]);
    assert_int_equal(test_entries(path), 0);
    m.data[3][2] = 1;
    test_ok(srf_hf_write(path, config_json, NULL, m.t, m.n, SRF_F32));
    check_source(path, m.t, m.n, SRF_F32, SRF_SOURCE_HF);
    assert_int_equal(test_entries(path), 2);
    assert_int_equal(test_entries(test_root), 2);
    free_model(&m);
}

/* Two shards and an index; names with and without "transformer.". */
static void sharded(void **state)
{
    (void)state;
    float x[6] = {1, 2, 3, 4, 5, 6};
    struct srf_tensor_out t[] = {
        {"h.0.a", 1, {2}, x}, {"wte.weight", 2, {2, 2}, x + 1}, {"ln_f.bias", 1, {6}, x}};
    char dir[128], path[256];
    assert_int_equal(mkdir(test_at(dir, "sharded"), 0755), 0);
    sprintf(path, "%s/one.safetensors", dir);
    test_ok(srf_safetensors_write(path, t, 2, SRF_F32));
    sprintf(path, "%s/two.safetensors", dir);
    test_ok(srf_safetensors_write(path, t + 2, 1, SRF_F32));
    sprintf(path, "%s/model.safetensors.index.json", dir);
    static const struct {
        const char *map, *error; /* error NULL: good */
    } cases[] = {
        {"\"h.0.a\":\"one.safetensors\",\"wte.weight\":\"one.safetensors\","
         "\"ln_f.bias\":\"two.safetensors\"",
         NULL},
        {"\"h.0.a\":\"one.safetensors\",\"ln_f.bias\":\"two.safetensors\"",
         "tensor wte.weight: expected in no shard, found in one.safetensors"},
        {"\"h.0.a\":\"one.safetensors\",\"wte.weight\":\"two.safetensors\","
         "\"ln_f.bias\":\"two.safetensors\"",
         "tensor wte.weight: expected in two.safetensors, found in one.safetensors"},
        {"\"h.0.a\":\"one.safetensors\",\"wte.weight\":\"one.safetensors\","
         "\"ln_f.bias\":\"two.safetensors\",\"x\":\"two.safetensors\"",
         "tensor x is missing in its shard two.safetensors"},
        {"\"h.0.a\":\"three.safetensors\"", "three.safetensors: No such file"},
        {"\"h.0.a\":\"../one.safetensors\"", "'../one.safetensors' is no file name"},
        {"\"h.0.a\":\"\"", "'' is no file name"},
        {"\"h.0.a\":7", "expected the name of a shard"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char index[512];
        sprintf(index, "{\"weight_map\": {%s}}", cases[i].map);
        test_spit(path, index, strlen(index));
        if (!cases[i].error) {
            check_source(dir, t, 3, SRF_F32, SRF_SOURCE_HF);
            continue;
        }
        struct srf_source *s;
        srf_status st = srf_source_open(dir, &s);
        test_fails(st, strstr(cases[i].error, "No such") ? SRF_IO : SRF_FORMAT, cases[i].error);
        assert_null(s);
    }
}

/* ---- llm.c ---------------------------------------------------------------------------------- */

static double raw_value(const unsigned char **p, int version)
{
    if (version == 3) {
        float x;
        memcpy(&x, *p, 4);
        *p += 4;
        return (double)x;
    }
    uint32_t bits = (uint32_t)(*p)[0] << 16 | (uint32_t)(*p)[1] << 24;
    float x;
    memcpy(&x, &bits, 4);
    *p += 2;
    return (double)x;
}

/* The next tensor of the file is the model's `name`: over all layers, transposed where it is a
 * linear weight, zeros from row `rows_of_ours` up to `rows`. */
static void expect(const unsigned char **p, int version, const struct model *m, const char *name,
                   bool layered, int rows, int cols, int rows_of_ours, bool transposed)
{
    for (int l = 0; l < (layered ? LAYERS : 1); l++) {
        char full[80];
        if (layered)
            sprintf(full, "transformer.h.%d.%s", l, name);
        else
            sprintf(full, "transformer.%s", name);
        const float *x = NULL;
        for (int i = 0; i < m->n; i++)
            if (strcmp(m->names[i], full) == 0) x = m->data[i];
        assert_non_null(x);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < cols; j++) {
                float want = i >= rows_of_ours ? 0 : transposed ? x[j * rows + i] : x[i * cols + j];
                double got = raw_value(p, version);
                assert_true(got == (double)rounded(want, version == 3 ? SRF_F32 : SRF_BF16));
            }
    }
}

/* Against the layout as llm.c's train_gpt2 defines it, written out here a second time. */
static void llmc_layout(void **state)
{
    (void)state;
    struct model m;
    make_model(&m);
    char path[128];
    test_at(path, "model.bin");
    for (int version = 3; version <= 5; version += 2) {
        enum srf_dtype dtype = version == 3 ? SRF_F32 : SRF_BF16;
        test_ok(srf_llmc_write(path, config_json, m.t, m.n, dtype));
        size_t n;
        unsigned char *raw = test_slurp(path, &n);
        int32_t h[256] = {0}, want[256] = {20240326, version, 7, 131, 2, 3, 24, 256};
        memcpy(h, raw, 1024);
        assert_memory_equal(h, want, 1024);
        const unsigned char *p = raw + 1024;
        expect(&p, version, &m, "wte.weight", false, 256, C, VOCAB, false);
        expect(&p, version, &m, "wpe.weight", false, POSITIONS, C, POSITIONS, false);
        expect(&p, version, &m, "ln_1.weight", true, 1, C, 1, false);
        expect(&p, version, &m, "ln_1.bias", true, 1, C, 1, false);
        expect(&p, version, &m, "attn.c_attn.weight", true, 3 * C, C, 3 * C, true);
        expect(&p, version, &m, "attn.c_attn.bias", true, 1, 3 * C, 1, false);
        expect(&p, version, &m, "attn.c_proj.weight", true, C, C, C, true);
        expect(&p, version, &m, "attn.c_proj.bias", true, 1, C, 1, false);
        expect(&p, version, &m, "ln_2.weight", true, 1, C, 1, false);
        expect(&p, version, &m, "ln_2.bias", true, 1, C, 1, false);
        expect(&p, version, &m, "mlp.c_fc.weight", true, 4 * C, C, 4 * C, true);
        expect(&p, version, &m, "mlp.c_fc.bias", true, 1, 4 * C, 1, false);
        expect(&p, version, &m, "mlp.c_proj.weight", true, C, 4 * C, C, true);
        expect(&p, version, &m, "mlp.c_proj.bias", true, 1, C, 1, false);
        expect(&p, version, &m, "ln_f.weight", false, 1, C, 1, false);
        expect(&p, version, &m, "ln_f.bias", false, 1, C, 1, false);
        assert_ptr_equal(p, raw + n);
        free(raw);
        check_source(path, m.t, m.n, dtype, SRF_SOURCE_LLMC);
    }
    struct srf_source *s;
    test_ok(srf_source_open(path, &s));
    assert_non_null(strstr(srf_source_config(s), "\"n_embd\": 24"));
    assert_non_null(strstr(srf_source_config(s), "\"vocab_size\": 131"));
    srf_source_close(s);
    unlink(path);
    free_model(&m);
}

static void llmc_refusals(void **state)
{
    (void)state;
    struct model m;
    make_model(&m);
    static const char base[] = "{\"model_type\":\"gpt2\",\"n_embd\":24,\"n_head\":3,\"n_layer\":2,"
                               "\"n_positions\":7,\"vocab_size\":131";
    static const struct {
        const char *more;
        srf_status st;
        const char *words;
    } cases[] = {
        {",\"n_inner\":100}", SRF_UNSUPPORTED, "n_inner"},
        {",\"layer_norm_epsilon\":1e-6}", SRF_UNSUPPORTED, "layer_norm_epsilon"},
        {",\"tie_word_embeddings\":false}", SRF_UNSUPPORTED, "tie_word_embeddings"},
        {"", SRF_FORMAT, "JSON"},
    };
    char path[128], config[300];
    test_at(path, "model.bin");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        sprintf(config, "%s%s", base, cases[i].more);
        test_fails(srf_llmc_write(path, config, m.t, m.n, SRF_F32), cases[i].st, cases[i].words);
    }
    test_fails(srf_llmc_write(path, config_json, m.t, m.n, SRF_F16), SRF_UNSUPPORTED, "f16");
    test_fails(srf_llmc_write(path, config_json, m.t, m.n - 1, SRF_F32), SRF_UNSUPPORTED, "28");
    strcpy(m.names[5], "transformer.h.0.other");
    test_fails(srf_llmc_write(path, config_json, m.t, m.n, SRF_F32), SRF_INVALID, "is missing");
    assert_int_equal(access(path, F_OK), -1);
    free_model(&m);
}

/* ---- native files --------------------------------------------------------------------------- */

/* Files of the HDF5 layer that are no checkpoints, each wrong in one thing. */
static void native_refusals(void **state)
{
    (void)state;
    static const struct {
        const char *format;
        int64_t version;
        const char *config, *text, *words;
        bool ints, nan;
    } cases[] = {
        {.words = "no attribute format"},
        {"other", 1, .words = "expected attribute format srf, found other"},
        {"srf", 2, .words = "expected version 1, found 2"},
        {"srf", 1, .words = "/config is missing"},
        {"srf", 1, "{}", .text = "/weights/text", .words = "/weights/text: expected floats"},
        {"srf", 1, "{}", .words = "/weights/a: expected floats", .ints = true},
        {"srf", 1, "{}", .words = "tensor a: element 2 is nan", .nan = true},
    };
    char path[128];
    test_at(path, "native.h5");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const int64_t three = 3;
        const int32_t ints[3] = {1, 2, 3};
        const float floats[3] = {1, 2, cases[i].nan ? NAN : 3};
        float x[3];
        struct srf_h5 *f;
        test_ok(srf_h5_create(path, &f));
        if (cases[i].format) test_ok(srf_h5_put_str(f, "/", "format", cases[i].format));
        if (cases[i].format) test_ok(srf_h5_put_i64(f, "/", "version", cases[i].version));
        if (cases[i].config) test_ok(srf_h5_put_text(f, "/config", cases[i].config));
        if (cases[i].text) test_ok(srf_h5_put_text(f, cases[i].text, "abc"));
        test_ok(srf_h5_put(f, "/weights/a", cases[i].ints ? SRF_I32 : SRF_F32, 1, &three,
                           cases[i].ints ? (const void *)ints : floats));
        test_ok(srf_h5_commit(f));
        struct srf_source *s;
        srf_status st = srf_source_open(path, &s);
        for (int64_t k = 0; st == SRF_OK && k < srf_source_count(s); k++)
            st = srf_source_read_f32(s, srf_source_count(s) - 1 - k, x);
        assert_int_not_equal(st, SRF_OK);
        test_fails(st, st, cases[i].words);
        srf_source_close(s);
    }
    unlink(path);
}

/* ---- failures ------------------------------------------------------------------------------- */

/* With the n-th allocation failing, for each n: an error, nothing leaked (the sanitizer build
 * sees), nothing left. */
static void allocation_failures(void **state)
{
    (void)state;
    struct model m;
    make_model(&m);
    char dir[128], bin[128], h5[128], path[128];
    test_ok(srf_hf_write(test_at(dir, "alloc_hf"), config_json, "{}", m.t, m.n, SRF_F16));
    test_ok(srf_llmc_write(test_at(bin, "alloc.bin"), config_json, m.t, m.n, SRF_F32));
    struct srf_h5 *f;
    test_ok(srf_h5_create(test_at(h5, "alloc.h5"), &f));
    test_ok(srf_h5_put_str(f, "/", "format", "srf"));
    test_ok(srf_h5_put_i64(f, "/", "version", 1));
    test_ok(srf_h5_put_text(f, "/config", config_json));
    test_ok(srf_h5_put_text(f, "/tokenizer", "{}"));
    for (int i = 0; i < m.n; i++) {
        char name[96];
        sprintf(name, "/weights/%s", m.names[i]);
        test_ok(srf_h5_put(f, name, SRF_F32, m.t[i].ndim, m.t[i].shape, m.data[i]));
    }
    test_ok(srf_h5_commit(f));
    check_source(h5, m.t, m.n, SRF_F32, SRF_SOURCE_NATIVE);
    int before = test_entries(test_root);
    const char *sources[] = {dir, bin, h5};
    test_at(path, "alloc_out");
    for (int kind = 0; kind < 6; kind++) {
        srf_status st = SRF_NOMEM;
        int n = 0;
        for (; st != SRF_OK && n < 10000; n++) {
            struct srf_source *s = NULL;
            float *x = malloc(sizeof *x * VOCAB * C);
            srf__fail_alloc_after(n);
            if (kind < 3) {
                st = srf_source_open(sources[kind], &s);
                for (int i = 0; st == SRF_OK && i < 2; i++)
                    st = srf_source_read_f32(s, srf_source_find(s, m.names[4 + i]), x);
            } else if (kind == 3) {
                st = srf_hf_write(path, config_json, "{}", m.t, m.n, SRF_F16);
            } else if (kind == 4) {
                st = srf_llmc_write(path, config_json, m.t, m.n, SRF_F32);
            } else {
                st = srf_h5_create(path, &f);
                if (st == SRF_OK) {
                    st = srf_h5_put_text(f, "/config", config_json);
                    if (st == SRF_OK)
                        st = srf_h5_commit(f);
                    else
                        srf_h5_close(f);
                }
            }
            srf__fail_alloc_after(-1);
            srf_source_close(s);
            free(x);
            if (st != SRF_OK) assert_int_equal(test_entries(test_root), before);
        }
        assert_int_equal(st, SRF_OK);
        assert_true(n > 2); /* that many allocations were made to fail */
        if (kind >= 3) {
            char command[200];
            sprintf(command, "rm -r %s", path);
            assert_int_equal(system(command), 0);
        }
    }
    free_model(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(safetensors_round_trip),
        cmocka_unit_test(safetensors_refuses_what_does_not_fit),
        cmocka_unit_test(safetensors_foreign_types),
        cmocka_unit_test(hf_round_trip),
        cmocka_unit_test(sharded),
        cmocka_unit_test(llmc_layout),
        cmocka_unit_test(llmc_refusals),
        cmocka_unit_test(native_refusals),
        cmocka_unit_test(allocation_failures),
    };
    return cmocka_run_group_tests(tests, test_make_root, test_remove_root);
}
