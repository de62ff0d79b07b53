/* .safetensors: u64 length of the header (little endian), header (JSON: name -> dtype, shape,
 * data_offsets from the end of the header), data. The tensors cover the data without gap or
 * overlap, as the reference implementation demands too. */
#include "checkpoints/source_internal.h"
#include "checkpoints/writers.h"
#include "kernels/numeric.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_HEADER = 32 << 20, /* bytes; the largest models' have about one million */
    MAX_NAME = 255
};

static const struct {
    const char *name;
    int bytes;
    bool readable;
    enum srf_dtype dtype;
} types[] = {
    {"F32", 4, true, SRF_F32}, {"F16", 2, true, SRF_F16}, {"BF16", 2, true, SRF_BF16},
    {"F64", 8, true, SRF_F64}, {"BOOL", 1, false, 0},     {"U8", 1, false, 0},
    {"I8", 1, false, 0},       {"F8_E4M3", 1, false, 0},  {"F8_E5M2", 1, false, 0},
    {"I16", 2, false, 0},      {"U16", 2, false, 0},      {"I32", 4, false, 0},
    {"U32", 4, false, 0},      {"I64", 8, false, 0},      {"U64", 8, false, 0},
};

/* ---- reading --------------------------------------------------------------------------------- */

static bool as_int64(const json_t *v, int64_t *out)
{
    if (!json_is_integer(v) || json_integer_value(v) < 0) return false;
    *out = json_integer_value(v);
    return true;
}

/* One entry of the header; data_bytes: what follows the header, `base` its place in the file. */
static srf_status parse_entry(const char *name, const json_t *entry, int64_t data_bytes,
                              int64_t base, struct srf__source_tensor *t)
{
    SRF_FAIL_IF(!json_is_object(entry), SRF_FORMAT, "tensor %s: expected an object", name);
    const char *dtype = json_string_value(json_object_get(entry, "dtype"));
    const json_t *shape = json_object_get(entry, "shape");
    const json_t *offsets = json_object_get(entry, "data_offsets");
    SRF_FAIL_IF(!dtype || !json_is_array(shape) || !json_is_array(offsets), SRF_FORMAT,
                "tensor %s: expected dtype, shape and data_offsets", name);
    SRF_FAIL_IF(strlen(name) > MAX_NAME || !name[0], SRF_FORMAT,
                "tensor %.40s: expected a name of 1 to %d bytes, found %zu", name, MAX_NAME,
                strlen(name));
    size_t k = 0;
    while (k < sizeof types / sizeof *types && strcmp(types[k].name, dtype) != 0) k++;
    SRF_FAIL_IF(k == sizeof types / sizeof *types, SRF_UNSUPPORTED,
                "tensor %s: expected dtype F32, F16 or BF16, found %.20s", name, dtype);
    size_t ndim = json_array_size(shape);
    SRF_FAIL_IF(ndim > 4, SRF_FORMAT, "tensor %s: expected at most 4 dimensions, found %zu", name,
                ndim);
    int64_t bytes = types[k].bytes, begin, end;
    for (size_t i = 0; i < ndim; i++) {
        SRF_FAIL_IF(!as_int64(json_array_get(shape, i), &t->info.shape[i]), SRF_FORMAT,
                    "tensor %s: expected a shape of whole numbers", name);
        SRF_FAIL_IF(__builtin_mul_overflow(bytes, t->info.shape[i], &bytes), SRF_FORMAT,
                    "tensor %s: its shape is too large", name);
    }
    SRF_FAIL_IF(json_array_size(offsets) != 2 || !as_int64(json_array_get(offsets, 0), &begin) ||
                    !as_int64(json_array_get(offsets, 1), &end) || begin > end,
                SRF_FORMAT, "tensor %s: bad data_offsets", name);
    SRF_FAIL_IF(
        end - begin != bytes, SRF_FORMAT,
        "tensor %s: expected %lld bytes for its shape and dtype, found data_offsets of %lld", name,
        (long long)bytes, (long long)(end - begin));
    SRF_FAIL_IF(end > data_bytes, SRF_FORMAT,
                "tensor %s: ends at byte %lld of %lld: the file is truncated", name, (long long)end,
                (long long)data_bytes);
    t->name = (char *)name;
    t->type = (char *)dtype;
    t->info.readable = types[k].readable;
    t->info.dtype = types[k].dtype;
    t->info.ndim = (int)ndim;
    t->offset = base + begin;
    return SRF_OK;
}

struct span {
    int64_t begin, end, index; /* bytes in the file; tensor */
};

static int by_begin(const void *a, const void *b)
{
    const struct span *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return (x->end > y->end) - (x->end < y->end);
}

/* Tensors first.. of s must cover [base, size) once. */
static srf_status check_cover(const struct srf_source *s, int64_t first, int64_t base, int64_t size)
{
    srf_status st = SRF_OK;
    struct span *spans;
    int64_t n = s->n - first, at = base;
    SRF_TRY(SRF_ALLOC(spans, n));
    for (int64_t i = 0; i < n; i++) {
        const struct srf__source_tensor *t = &s->tensors[first + i];
        int64_t bytes = t->info.count;
        for (size_t k = 0; k < sizeof types / sizeof *types; k++)
            if (strcmp(types[k].name, t->type) == 0) bytes *= types[k].bytes;
        spans[i] = (struct span){t->offset, t->offset + bytes, first + i};
    }
    if (n > 1) qsort(spans, (size_t)n, sizeof *spans, by_begin);
    for (int64_t i = 0; i < n; i++) {
        SRF_FAIL_GO_IF(spans[i].begin != at, SRF_FORMAT,
                       "tensor %s: expected its data at byte %lld, found %lld (%s)",
                       s->tensors[spans[i].index].name, (long long)(at - base),
                       (long long)(spans[i].begin - base),
                       spans[i].begin < at ? "tensors overlap" : "a gap");
        at = spans[i].end;
    }
    SRF_FAIL_GO_IF(at != size, SRF_FORMAT, "expected %lld bytes of data, found %lld",
                   (long long)(at - base), (long long)(size - base));
cleanup:
    srf__free(spans);
    return st;
}

static srf_status read_header(struct srf_source *s, int index)
{
    srf_status st = SRF_OK;
    const struct srf__file f = s->files[index];
    unsigned char head[8];
    uint64_t length = 0;
    char *text = NULL;
    json_t *header = NULL;
    const char *name;
    json_t *entry;
    SRF_FAIL_IF(f.size < 8, SRF_FORMAT, "%lld bytes are no safetensors file", (long long)f.size);
    SRF_TRY(srf__file_read(&f, 0, head, 8));
    for (int i = 7; i >= 0; i--) length = length << 8 | head[i];
    SRF_FAIL_IF(length > (uint64_t)(f.size - 8), SRF_FORMAT,
                "expected a header of %llu bytes, found %lld in the file",
                (unsigned long long)length, (long long)(f.size - 8));
    SRF_FAIL_IF(length > MAX_HEADER, SRF_UNSUPPORTED, "a header of %llu bytes, at most %d",
                (unsigned long long)length, MAX_HEADER);
    SRF_TRY(SRF_ALLOC(text, length + 1));
    SRF_TRY_GO(srf__file_read(&f, 8, text, (int64_t)length));
    SRF_TRY_GO(srf__json_parse("header", text, length, &header));
    SRF_FAIL_GO_IF(!json_is_object(header), SRF_FORMAT, "expected a header object");
    int64_t base = 8 + (int64_t)length, first = s->n;
    json_object_foreach(header, name, entry)
    {
        if (strcmp(name, "__metadata__") == 0) continue;
        struct srf__source_tensor t = {.file = index};
        SRF_TRY_GO(parse_entry(name, entry, f.size - base, base, &t));
        SRF_TRY_GO(srf__source_add(s, &t));
    }
    st = check_cover(s, first, base, f.size);
cleanup:
    json_decref(header);
    srf__free(text);
    return st;
}

srf_status srf__safetensors_read(struct srf_source *s, const char *path)
{
    int index;
    SRF_TRY(srf__source_add_file(s, path, &index));
    srf_status st = read_header(s, index);
    if (st != SRF_OK) srf__error_prefix("%s", path);
    return st;
}

/* ---- writing --------------------------------------------------------------------------------- */

static int64_t count_of(const struct srf_tensor_out *t)
{
    int64_t n = 1;
    for (int i = 0; i < t->ndim; i++) n *= t->shape[i];
    return n;
}

/* The header with its length before it: 8 + a multiple of 8 bytes. srf__free. */
static srf_status make_header(const struct srf_tensor_out *tensors, int64_t n, size_t width,
                              const char *type, char **out, size_t *size)
{
    srf_status st = SRF_OK;
    char *text = NULL;
    int64_t at = 0;
    bool ok = true;
    json_t *header = json_pack("{s:{s:s}}", "__metadata__", "format", "pt");
    for (int64_t i = 0; i < n && ok; i++) {
        SRF_FAIL_GO_IF(json_object_get(header, tensors[i].name), SRF_INVALID,
                       "tensor %s is there twice", tensors[i].name);
        int64_t end = at + count_of(&tensors[i]) * (int64_t)width;
        json_t *shape = json_array();
        for (int k = 0; k < tensors[i].ndim; k++)
            ok = ok && json_array_append_new(shape, json_integer(tensors[i].shape[k])) == 0;
        json_t *entry = json_pack("{s:s, s:o, s:[I, I]}", "dtype", type, "shape", shape,
                                  "data_offsets", (json_int_t)at, (json_int_t)end);
        ok = ok && json_object_set_new(header, tensors[i].name, entry) == 0;
        at = end;
    }
    if (ok) text = json_dumps(header, JSON_COMPACT);
    SRF_FAIL_GO_IF(!text, SRF_NOMEM, "out of memory");
    size_t length = strlen(text), padded = (length + 7) / 8 * 8;
    SRF_TRY_GO(SRF_ALLOC(*out, 8 + padded));
    for (int i = 0; i < 8; i++) (*out)[i] = (char)((uint64_t)padded >> (8 * i));
    memcpy(*out + 8, text, length);
    memset(*out + 8 + length, ' ', padded - length);
    *size = 8 + padded;
cleanup:
    json_decref(header);
    free(text);
    return st;
}

srf_status srf_safetensors_write(const char *path, const struct srf_tensor_out *tensors, int64_t n,
                                 enum srf_dtype dtype)
{
    size_t k = 0;
    while (k < sizeof types / sizeof *types && !(types[k].readable && types[k].dtype == dtype)) k++;
    SRF_FAIL_IF(k == sizeof types / sizeof *types || dtype == SRF_F64, SRF_INVALID,
                "safetensors are written as f32, f16 or bf16");
    srf_status st = SRF_OK;
    struct srf__out o = {.fd = -1};
    char *header = NULL;
    size_t size = 0;
    SRF_TRY(make_header(tensors, n, srf_dtype_bytes(dtype), types[k].name, &header, &size));
    SRF_TRY_GO(srf__out_open(path, &o));
    SRF_TRY_GO(srf__out_write(&o, header, size));
    for (int64_t i = 0; i < n; i++)
        SRF_TRY_GO(
            srf__out_floats(&o, tensors[i].name, tensors[i].data, count_of(&tensors[i]), dtype));
    SRF_TRY_GO(srf__out_commit(&o));
cleanup:
    srf__out_abort(&o);
    srf__free(header);
    return st;
}
