#include "checkpoints/source_internal.h"
#include "kernels/grow.h"
#include "kernels/numeric.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

srf_status srf__json_parse(const char *what, const char *text, size_t n, json_t **out)
{
    json_error_t error;
    *out = json_loadb(text, n, JSON_REJECT_DUPLICATES, &error);
    SRF_FAIL_IF(!*out, SRF_FORMAT, "%s: bad JSON in line %d: %s", what, error.line, error.text);
    return SRF_OK;
}

/* ---- tensors --------------------------------------------------------------------------------- */

static const char *bare_name(const char *name)
{
    static const char prefix[] = "transformer.";
    return strncmp(name, prefix, sizeof prefix - 1) == 0 ? name + sizeof prefix - 1 : name;
}

int srf__tensor_name_cmp(const char *a, const char *b)
{
    return strcmp(bare_name(a), bare_name(b));
}

srf_status srf__source_add_file(struct srf_source *s, const char *path, int *index)
{
    SRF_TRY(SRF_GROW(s->files, s->cap_files, s->n_files + 1));
    SRF_TRY(srf__file_open(path, &s->files[s->n_files]));
    *index = s->n_files++;
    return SRF_OK;
}

srf_status srf__source_add(struct srf_source *s, const struct srf__source_tensor *t)
{
    SRF_TRY(SRF_GROW(s->tensors, s->cap_tensors, s->n + 1));
    struct srf__source_tensor *to = &s->tensors[s->n];
    *to = *t;
    to->info.count = 1;
    for (int i = 0; i < t->info.ndim; i++)
        SRF_FAIL_IF(t->info.shape[i] < 0 ||
                        __builtin_mul_overflow(to->info.count, t->info.shape[i], &to->info.count),
                    SRF_FORMAT, "tensor %s: its shape is too large", t->name);
    to->name = srf__strdup(t->name);
    to->type = srf__strdup(t->type);
    s->n++; /* from here on close() frees it */
    SRF_FAIL_IF(!to->name || !to->type, SRF_NOMEM, "out of memory");
    to->info.name = to->name;
    to->info.type = to->type;
    return SRF_OK;
}

static int by_name(const void *a, const void *b)
{
    const struct srf__source_tensor *x = a, *y = b;
    return srf__tensor_name_cmp(x->name, y->name);
}

/* Sorts the tensors; one name twice, or with and without "transformer.", is ambiguous. */
static srf_status sort_tensors(struct srf_source *s)
{
    if (s->n > 1) qsort(s->tensors, (size_t)s->n, sizeof *s->tensors, by_name);
    for (int64_t i = 1; i < s->n; i++)
        SRF_FAIL_IF(by_name(&s->tensors[i - 1], &s->tensors[i]) == 0, SRF_FORMAT,
                    "tensor %s is there twice", s->tensors[i].name);
    return SRF_OK;
}

int64_t srf_source_find(const struct srf_source *s, const char *name)
{
    int64_t lo = 0, hi = s->n;
    while (lo < hi) {
        int64_t mid = lo + (hi - lo) / 2;
        int c = srf__tensor_name_cmp(s->tensors[mid].name, name);
        if (c == 0) return mid;
        if (c < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    return -1;
}

/* In tiles that stay in cache. */
void srf__transpose(float *out, const float *in, int64_t rows, int64_t cols)
{
    enum { TILE = 32 };
    for (int64_t i0 = 0; i0 < rows; i0 += TILE)
        for (int64_t j0 = 0; j0 < cols; j0 += TILE)
            for (int64_t i = i0; i < rows && i < i0 + TILE; i++)
                for (int64_t j = j0; j < cols && j < j0 + TILE; j++)
                    out[i * cols + j] = in[j * rows + i];
}

/* The elements as stored, in f32. */
static srf_status read_stored(struct srf_source *s, const struct srf__source_tensor *t, float *out)
{
    enum { PIECE = 1 << 16 };
    const struct srf__file *f = &s->files[t->file];
    size_t width = srf_dtype_bytes(t->info.dtype);
    srf_status st = SRF_OK;
    char *buf = NULL;
    if (t->info.dtype == SRF_F32)
        return srf__file_read(f, t->offset, out, t->info.count * (int64_t)width);
    SRF_TRY(SRF_ALLOC(buf, PIECE * width));
    for (int64_t i = 0; i < t->info.count; i += PIECE) {
        int64_t n = t->info.count - i < PIECE ? t->info.count - i : PIECE;
        SRF_TRY_GO(srf__file_read(f, t->offset + i * (int64_t)width, buf, n * (int64_t)width));
        srf_convert_to_f32(out + i, buf, t->info.dtype, n);
    }
cleanup:
    srf__free(buf);
    return st;
}

srf_status srf_source_read_f32(struct srf_source *s, int64_t i, float *out)
{
    SRF_FAIL_IF(i < 0 || i >= s->n, SRF_INVALID, "tensor %lld of %lld", (long long)i,
                (long long)s->n);
    struct srf__source_tensor *t = &s->tensors[i];
    SRF_FAIL_IF(!t->info.readable, SRF_UNSUPPORTED,
                "tensor %s: expected dtype F32, F16 or BF16, found %s", t->name, t->type);
    if (t->file < 0) {
        char path[600];
        snprintf(path, sizeof path, "/weights/%s", t->name);
        SRF_TRY(srf_h5_get(s->h5, path, SRF_F32, t->info.ndim, t->info.shape, out));
    } else if (t->transposed) {
        srf_status st = SRF_OK;
        float *stored = NULL;
        SRF_TRY(SRF_ALLOC(stored, t->info.count));
        st = read_stored(s, t, stored);
        if (st == SRF_OK) srf__transpose(out, stored, t->info.shape[0], t->info.shape[1]);
        srf__free(stored);
        SRF_TRY(st);
    } else {
        SRF_TRY(read_stored(s, t, out));
    }
    for (int64_t j = 0; j < t->info.count; j++)
        SRF_FAIL_IF(!isfinite(out[j]), SRF_NONFINITE, "tensor %s: element %lld is %g", t->name,
                    (long long)j, (double)out[j]);
    return SRF_OK;
}

/* ---- native files ---------------------------------------------------------------------------- */

static srf_status add_native(void *user, const char *path)
{
    struct srf_source *s = user;
    struct srf__source_tensor t = {.file = -1, .type = (char *)"F32"};
    t.name = (char *)path + strlen("/weights/");
    t.info.readable = true;
    t.info.dtype = SRF_F32;
    SRF_TRY(srf_h5_shape(s->h5, path, &t.info.ndim, t.info.shape));
    return srf__source_add(s, &t);
}

static srf_status native_read(struct srf_source *s, const char *path)
{
    SRF_TRY(srf_h5_open(path, &s->h5));
    SRF_TRY(srf_h5_check_header(s->h5, NULL));
    SRF_FAIL_IF(!srf_h5_has(s->h5, "/weights"), SRF_FORMAT, "%s: holds no weights", path);
    SRF_TRY(srf_h5_get_text(s->h5, "/config", &s->config));
    if (srf_h5_has(s->h5, "/tokenizer"))
        SRF_TRY(srf_h5_get_text(s->h5, "/tokenizer", &s->tokenizer));
    return srf_h5_each(s->h5, "/weights", add_native, s);
}

/* ---- opening --------------------------------------------------------------------------------- */

/* What else a file of 9 bytes or more may be, and what to do with it then. */
static srf_status refuse_file(const char *path, const unsigned char *head)
{
    size_t n = strlen(path);
    static const char index[] = ".index.json";
    bool pickle = memcmp(head, "PK\3\4", 4) == 0 || (head[0] == 0x80 && head[1] <= 5);
    SRF_FAIL_IF(pickle, SRF_UNSUPPORTED,
                "%s: by its first bytes PyTorch's own format: expected safetensors; save it again "
                "with safe_serialization=True",
                path);
    SRF_FAIL_IF(memcmp(head, "GGUF", 4) == 0, SRF_UNSUPPORTED,
                "%s: GGUF: expected the safetensors that it was made from", path);
    SRF_FAIL_IF(n > strlen(index) && strcmp(path + n - strlen(index), index) == 0, SRF_INVALID,
                "%s: the index of a model in shards: name the directory it is in", path);
    SRF_FAIL(SRF_FORMAT, "%s: neither HDF5 nor safetensors nor an llm.c model (by its first bytes)",
             path);
}

/* By what the first bytes say. */
static srf_status open_by_contents(struct srf_source *s, const char *path)
{
    static const unsigned char h5_magic[8] = {0x89, 'H', 'D', 'F', '\r', '\n', 0x1a, '\n'};
    unsigned char head[9];
    struct srf__file f;
    struct stat info;
    SRF_FAIL_IF(stat(path, &info) != 0, SRF_IO, "%s: %s", path, strerror(errno));
    if (S_ISDIR(info.st_mode)) {
        s->kind = SRF_SOURCE_HF;
        return srf__hf_read(s, path);
    }
    SRF_TRY(srf__file_open(path, &f));
    int64_t size = f.size;
    srf_status st = size < (int64_t)sizeof head ? SRF_OK : srf__file_read(&f, 0, head, sizeof head);
    srf__file_close(&f);
    SRF_TRY(st);
    SRF_FAIL_IF(size < (int64_t)sizeof head, SRF_FORMAT, "%s: %lld bytes are no checkpoint", path,
                (long long)size);
    if (memcmp(head, h5_magic, sizeof h5_magic) == 0) {
        s->kind = SRF_SOURCE_NATIVE;
        return native_read(s, path);
    }
    int32_t magic;
    memcpy(&magic, head, sizeof magic);
    if (magic == SRF__LLMC_MAGIC) {
        s->kind = SRF_SOURCE_LLMC;
        return srf__llmc_read(s, path);
    }
    if (head[8] != '{') return refuse_file(path, head);
    s->kind = SRF_SOURCE_SAFETENSORS;
    SRF_TRY(srf__safetensors_read(s, path));
    char *dir;
    SRF_TRY(srf__path_dir(path, &dir));
    st = srf__hf_read_extras(s, dir);
    srf__free(dir);
    return st;
}

srf_status srf_source_open(const char *path, struct srf_source **out)
{
    struct srf_source *s;
    *out = NULL;
    SRF_TRY(SRF_CALLOC(s, 1));
    srf_status st = open_by_contents(s, path);
    if (st == SRF_OK && (st = sort_tensors(s)) != SRF_OK) srf__error_prefix("%s", path);
    if (st != SRF_OK) {
        srf__trace(__FILE__, __LINE__);
        srf_source_close(s);
        return st;
    }
    *out = s;
    return SRF_OK;
}

void srf_source_close(struct srf_source *s)
{
    if (!s) return;
    for (int64_t i = 0; i < s->n; i++) {
        srf__free(s->tensors[i].name);
        srf__free(s->tensors[i].type);
    }
    for (int i = 0; i < s->n_files; i++) srf__file_close(&s->files[i]);
    srf_h5_close(s->h5);
    srf__free(s->tensors);
    srf__free(s->files);
    srf__free(s->config);
    srf__free(s->tokenizer);
    srf__free(s);
}

enum srf_source_kind srf_source_kind(const struct srf_source *s)
{
    return s->kind;
}

const char *srf_source_kind_name(enum srf_source_kind kind)
{
    switch (kind) {
    case SRF_SOURCE_HF:
        return "transformers directory";
    case SRF_SOURCE_SAFETENSORS:
        return "safetensors file";
    case SRF_SOURCE_LLMC:
        return "llm.c checkpoint";
    case SRF_SOURCE_NATIVE:
        return "native checkpoint";
    }
    return "unknown";
}

const char *srf_source_config(const struct srf_source *s)
{
    return s->config;
}

const char *srf_source_tokenizer(const struct srf_source *s)
{
    return s->tokenizer;
}

int64_t srf_source_count(const struct srf_source *s)
{
    return s->n;
}

const struct srf_tensor_info *srf_source_info(const struct srf_source *s, int64_t i)
{
    return &s->tensors[i].info;
}
