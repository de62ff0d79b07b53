/* Token sets of others: .npy arrays and llm.c shards. Only headers are read here. */
#include "data/tokenset_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- .npy: magic, version, length of the header, then a Python dict as text ---
 * {'descr': '<u2', 'fortran_order': False, 'shape': (1024,), } */

enum { MAX_NPY_HEADER = 1 << 16 };

struct npy {
    char descr[8];
    bool has_order, fortran, has_shape;
    int n_dims;
    int64_t dims[2];
};

static void skip_space(const char **s)
{
    while (**s == ' ' || **s == '\t' || **s == '\n' || **s == '\r') (*s)++;
}

static bool accept(const char **s, const char *word)
{
    skip_space(s);
    size_t n = strlen(word);
    if (strncmp(*s, word, n) != 0) return false;
    *s += n;
    return true;
}

/* 'text' or "text", without escapes; text has room for size bytes with its NUL. */
static bool quoted(const char **s, char *text, size_t size)
{
    skip_space(s);
    char quote = **s;
    if (quote != '\'' && quote != '"') return false;
    const char *start = *s + 1, *end = strchr(start, quote);
    if (!end || (size_t)(end - start) >= size) return false;
    memcpy(text, start, (size_t)(end - start));
    text[end - start] = '\0';
    *s = end + 1;
    return true;
}

/* A tuple of one or two whole numbers: (5,) or (2, 3). */
static bool shape(const char **s, struct npy *a)
{
    if (!accept(s, "(")) return false;
    a->n_dims = 0;
    while (!accept(s, ")")) {
        skip_space(s);
        if (a->n_dims == 2 || **s < '0' || **s > '9') return false;
        int64_t dim = 0;
        for (; **s >= '0' && **s <= '9'; (*s)++)
            if (__builtin_mul_overflow(dim, (int64_t)10, &dim) ||
                __builtin_add_overflow(dim, (int64_t)(**s - '0'), &dim))
                return false;
        accept(s, "L"); /* of Python 2 */
        a->dims[a->n_dims++] = dim;
        if (accept(s, ",")) continue;
        if (!accept(s, ")")) return false;
        break;
    }
    a->has_shape = true;
    return a->n_dims > 0;
}

static bool parse_header(const char *s, struct npy *a)
{
    if (!accept(&s, "{")) return false;
    while (!accept(&s, "}")) {
        char key[16];
        if (!quoted(&s, key, sizeof key) || !accept(&s, ":")) return false;
        if (strcmp(key, "descr") == 0) {
            if (!quoted(&s, a->descr, sizeof a->descr)) return false;
        } else if (strcmp(key, "fortran_order") == 0) {
            a->has_order = true;
            a->fortran = accept(&s, "True");
            if (!a->fortran && !accept(&s, "False")) return false;
        } else if (strcmp(key, "shape") != 0 || !shape(&s, a)) {
            return false;
        }
        if (accept(&s, ",")) continue;
        if (!accept(&s, "}")) return false;
        break;
    }
    skip_space(&s);
    return *s == '\0' && a->descr[0] && a->has_order && a->has_shape;
}

static srf_status id_type(const char *path, const char *descr, enum srf__id_type *type)
{
    static const struct {
        const char *descr;
        enum srf__id_type type;
    } types[] = {
        {"<u2", SRF__ID_U16}, {"<u4", SRF__ID_U32}, {"<i4", SRF__ID_I32}, {"<i8", SRF__ID_I64}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (strcmp(types[i].descr, descr) == 0) {
            *type = types[i].type;
            return SRF_OK;
        }
    SRF_FAIL(SRF_UNSUPPORTED, "%s: expected ids of type <u2, <u4, <i4 or <i8, found %s", path,
             descr);
}

srf_status srf__tokenset_open_npy(const char *path, struct srf_tokenset *ts)
{
    struct srf__file *f;
    unsigned char head[12];
    char *text = NULL;
    struct npy a = {0};
    srf_status st = SRF_OK;
    SRF_TRY(srf__tokenset_add_file(ts, path, &f));
    SRF_FAIL_IF(f->size < (int64_t)sizeof head, SRF_FORMAT, "%s: ends inside the .npy header",
                path);
    SRF_TRY(srf__file_read(f, 0, head, sizeof head));
    SRF_FAIL_IF(head[6] < 1 || head[6] > 3 || head[7] != 0, SRF_UNSUPPORTED,
                "%s: expected .npy version 1.0, 2.0 or 3.0, found %d.%d", path, head[6], head[7]);
    int64_t n = head[8] | head[9] << 8, start = 10;
    if (head[6] > 1) n |= (int64_t)head[10] << 16 | (int64_t)head[11] << 24, start = 12;
    SRF_FAIL_IF(n > MAX_NPY_HEADER || n > f->size - start, SRF_FORMAT,
                "%s: a .npy header of %lld bytes, expected at most %lld", path, (long long)n,
                (long long)(f->size - start < MAX_NPY_HEADER ? f->size - start : MAX_NPY_HEADER));
    SRF_TRY(SRF_ALLOC(text, n + 1));
    SRF_TRY_GO(srf__file_read(f, start, text, n));
    text[n] = '\0';
    SRF_FAIL_GO_IF(strlen(text) != (size_t)n || !parse_header(text, &a), SRF_FORMAT,
                   "%s: expected a .npy header of descr, fortran_order and a shape of 1 or 2 "
                   "dimensions, found %.100s",
                   path, text);
    SRF_TRY_GO(id_type(path, a.descr, &ts->type));
    SRF_FAIL_GO_IF(a.fortran && a.n_dims == 2, SRF_UNSUPPORTED,
                   "%s: fortran_order: expected False, found True", path);
    int64_t count = a.dims[0], bytes;
    int64_t width = srf__id_bytes(ts->type);
    SRF_FAIL_GO_IF((a.n_dims == 2 && __builtin_mul_overflow(count, a.dims[1], &count)) ||
                       __builtin_mul_overflow(count, width, &bytes) || bytes != f->size - start - n,
                   SRF_FORMAT,
                   "%s: shape (%lld, %lld) of %lld bytes each does not fit the %lld bytes there",
                   path, (long long)a.dims[0], a.n_dims == 2 ? (long long)a.dims[1] : 1,
                   (long long)width, (long long)(f->size - start - n));
    ts->format = "npy";
    SRF_TRY_GO(srf__tokenset_add_run(ts, count, start + n));
cleanup:
    srf__free(text);
    return st;
}

/* ---- llm.c: 256 i32 of header (magic, version, number of tokens), then the ids --------------- */

static uint32_t u32_at(const unsigned char *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

srf_status srf__tokenset_add_llmc(const char *path, struct srf_tokenset *ts)
{
    enum { HEADER = 256 * 4 };
    unsigned char head[12];
    struct srf__file *f;
    SRF_TRY(srf__tokenset_add_file(ts, path, &f));
    SRF_FAIL_IF(f->size < HEADER, SRF_FORMAT, "%s: ends inside the llm.c header", path);
    SRF_TRY(srf__file_read(f, 0, head, sizeof head));
    uint32_t magic = u32_at(head), version = u32_at(head + 4), n = u32_at(head + 8);
    SRF_FAIL_IF(magic != SRF__LLMC_MAGIC_U16 && magic != SRF__LLMC_MAGIC_U32, SRF_FORMAT,
                "%s: expected llm.c tokens (magic %d or %d), found magic %u", path,
                SRF__LLMC_MAGIC_U16, SRF__LLMC_MAGIC_U32, magic);
    bool wide = magic == SRF__LLMC_MAGIC_U32;
    uint32_t known = wide ? 7 : 1;
    SRF_FAIL_IF(version != known, SRF_UNSUPPORTED,
                "%s: llm.c tokens: expected version %u, found %u", path, known, version);
    enum srf__id_type type = wide ? SRF__ID_U32 : SRF__ID_U16;
    SRF_FAIL_IF(ts->n_files > 1 && ts->type != type, SRF_MISMATCH,
                "%s: ids of %d bytes, but the shards before it have %d", path, srf__id_bytes(type),
                srf__id_bytes(ts->type));
    ts->type = type;
    ts->format = "llmc";
    int64_t there = f->size - HEADER, bytes = (int64_t)n * srf__id_bytes(type);
    SRF_FAIL_IF(there != bytes, SRF_FORMAT, "%s: %u tokens expected (%lld bytes), found %lld bytes",
                path, n, (long long)bytes, (long long)there);
    return srf__tokenset_add_run(ts, n, HEADER);
}
