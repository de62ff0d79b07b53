/* Token sets: which format a file has, and reading ids from it. */
#include "data/checksum.h"
#include "data/tokenset_internal.h"
#include "kernels/grow.h"

#include <errno.h>
#include <glob.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

enum { BLOCK_IDS = 1 << 14, SNIFF_BYTES = 1 << 16 };

int srf__id_bytes(enum srf__id_type type)
{
    switch (type) {
    case SRF__ID_U16:
        return 2;
    case SRF__ID_U32:
    case SRF__ID_I32:
        return 4;
    case SRF__ID_I64:
        return 8;
    }
    return 0;
}

/* ---- runs in files --------------------------------------------------------------------------- */

srf_status srf__tokenset_add_file(struct srf_tokenset *ts, const char *path,
                                  struct srf__file **file)
{
    SRF_TRY(SRF_GROW(ts->files, ts->cap_files, ts->n_files + 1));
    SRF_TRY(srf__file_open(path, &ts->files[ts->n_files]));
    *file = &ts->files[ts->n_files++];
    return SRF_OK;
}

srf_status srf__tokenset_add_run(struct srf_tokenset *ts, int64_t n, int64_t offset)
{
    const struct srf__file *f = &ts->files[ts->n_files - 1];
    int width = srf__id_bytes(ts->type);
    SRF_FAIL_IF(n < 0 || offset < 0 || offset > f->size || n > (f->size - offset) / width,
                SRF_FORMAT, "%s: %lld tokens of %d bytes from byte %lld: the file has %lld bytes",
                f->path, (long long)n, width, (long long)offset, (long long)f->size);
    if (n == 0) return SRF_OK;
    SRF_TRY(SRF_GROW(ts->runs, ts->cap_runs, ts->n_runs + 1));
    ts->runs[ts->n_runs++] = (struct srf__run){
        .first = ts->count, .n = n, .offset = offset, .file = (int32_t)(ts->n_files - 1)};
    ts->count += n;
    return SRF_OK;
}

/* Little-endian ids to the host's. */
static int64_t id_at(enum srf__id_type type, const unsigned char *p)
{
    uint32_t low = (uint32_t)p[0] | (uint32_t)p[1] << 8;
    if (type == SRF__ID_U16) return low;
    low |= (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
    if (type == SRF__ID_U32) return low;
    if (type == SRF__ID_I32) return (int32_t)low;
    uint32_t high =
        (uint32_t)p[4] | (uint32_t)p[5] << 8 | (uint32_t)p[6] << 16 | (uint32_t)p[7] << 24;
    return (int64_t)((uint64_t)high << 32 | low);
}

/* The run that holds a token. */
static const struct srf__run *run_of(const struct srf_tokenset *ts, int64_t token)
{
    int64_t low = 0, high = ts->n_runs - 1;
    while (low < high) {
        int64_t mid = (low + high + 1) / 2;
        if (ts->runs[mid].first <= token)
            low = mid;
        else
            high = mid - 1;
    }
    return &ts->runs[low];
}

/* Ids as they are stored. */
static srf_status read_stored(const struct srf_tokenset *ts, int64_t start, int64_t n,
                              unsigned char *bytes)
{
    int width = srf__id_bytes(ts->type);
    for (const struct srf__run *run = run_of(ts, start); n > 0; run++) {
        int64_t at = start - run->first, some = run->n - at < n ? run->n - at : n;
        SRF_TRY(
            srf__file_read(&ts->files[run->file], run->offset + at * width, bytes, some * width));
        start += some;
        n -= some;
        bytes += some * width;
    }
    return SRF_OK;
}

/* That the i-th SRF__CHUNK tokens are what was written. */
static srf_status check_sum(struct srf_tokenset *ts, int64_t i)
{
    int64_t first = i * SRF__CHUNK, n = ts->count - first;
    unsigned char *bytes;
    if (atomic_load_explicit(&ts->checked[i], memory_order_relaxed)) return SRF_OK;
    if (n > SRF__CHUNK) n = SRF__CHUNK;
    int64_t size = n * srf__id_bytes(ts->type);
    SRF_TRY(SRF_ALLOC(bytes, size));
    srf_status st = SRF_OK;
    SRF_TRY_GO(read_stored(ts, first, n, bytes));
    SRF_FAIL_GO_IF(srf__checksum(bytes, (size_t)size) != (uint64_t)ts->sums[i], SRF_FORMAT,
                   "%s: tokens %lld to %lld are not what was written, by their checksum: the file "
                   "is damaged (or was edited: then delete /checksums of it)",
                   ts->files[0].path, (long long)first, (long long)(first + n - 1));
    atomic_store_explicit(&ts->checked[i], true, memory_order_relaxed);
cleanup:
    srf__free(bytes);
    return st;
}

srf_status srf_tokenset_read(struct srf_tokenset *ts, int64_t start, int64_t n, int32_t *ids)
{
    unsigned char block[8 * 1024];
    int64_t limit = ts->vocab_size ? ts->vocab_size : INT32_MAX;
    SRF_FAIL_IF(start < 0 || n < 0 || start > ts->count || n > ts->count - start, SRF_INVALID,
                "tokens %lld and %lld more asked for, the set has %lld", (long long)start,
                (long long)n, (long long)ts->count);
    if (n == 0) return SRF_OK;
    if (ts->n_runs == 0) {
        memcpy(ids, ts->text.ids + start, (size_t)n * sizeof *ids);
        return SRF_OK;
    }
    for (int64_t i = start / SRF__CHUNK; ts->sums && i <= (start + n - 1) / SRF__CHUNK; i++)
        SRF_TRY(check_sum(ts, i));
    int width = srf__id_bytes(ts->type);
    for (int64_t done = 0; done < n;) {
        int64_t at = start + done, some = (int64_t)sizeof block / width;
        if (some > n - done) some = n - done;
        SRF_TRY(read_stored(ts, at, some, block));
        for (int64_t i = 0; i < some; i++) {
            int64_t id = id_at(ts->type, block + i * width);
            SRF_FAIL_IF(id < 0 || id >= limit, SRF_MISMATCH,
                        "%s: token %lld has id %lld, expected 0 to %lld",
                        ts->files[run_of(ts, at + i)->file].path, (long long)(at + i),
                        (long long)id, (long long)limit - 1);
            ids[done + i] = (int32_t)id;
        }
        done += some;
    }
    return SRF_OK;
}

/* ---- plain text ------------------------------------------------------------------------------ */

static bool ends_in(const char *path, const char *end)
{
    size_t n = strlen(path), k = strlen(end);
    return n > k && strcmp(path + n - k, end) == 0;
}

const char *srf_tokenset_not_text(const char *path, const char *head, size_t n)
{
    static const char packed[] = "a compressed file: unpack it, or pipe its text to srf tokenize -";
    static const char table[] =
        "a table (Parquet or Arrow): write it as JSON lines for srf tokenize --jsonl KEY";
    static const char lines[] = "JSON lines: srf tokenize --jsonl KEY takes the texts under KEY";
    static const char zip[] = "a zip archive (of .npz: save each array with np.save)";
    static const char raw[] =
        "no text (ids without a header, as nanoGPT's: save them as .npy by np.save)";
    static const char ids[] = "ids: give them to --data as they are";
    static const struct {
        const char *bytes;
        size_t n;
        const char *what;
    } starts[] = {{"\x1f\x8b", 2, packed},
                  {"\xfd\x37zXZ", 5, packed},
                  {"\x28\xb5\x2f\xfd", 4, packed},
                  {"BZh", 3, packed},
                  {"PAR1", 4, table},
                  {"ARROW1", 6, table},
                  {"\xff\xff\xff\xff", 4, table}, /* Arrow's stream */
                  {"PK\3\4", 4, zip},
                  {"\x93NUMPY", 6, ids},
                  {"\x89HDF\r\n\x1a\n", 8, "HDF5: give a token set to --data as it is"}};
    static const char *const binary[] = {".npy", ".npz", ".h5", ".hdf5", ".safetensors",
                                         ".pt",  ".gz",  ".xz", ".zst",  ".zip"};
    int64_t magic = n >= 4 ? id_at(SRF__ID_U32, (const unsigned char *)head) : 0;
    if (magic == SRF__LLMC_MAGIC_U16 || magic == SRF__LLMC_MAGIC_U32) return ids;
    for (size_t i = 0; i < sizeof starts / sizeof *starts; i++)
        if (n >= starts[i].n && memcmp(head, starts[i].bytes, starts[i].n) == 0)
            return starts[i].what;
    if (ends_in(path, ".jsonl") || ends_in(path, ".ndjson")) return lines;
    if (ends_in(path, ".parquet") || ends_in(path, ".arrow")) return table;
    if (ends_in(path, ".bin")) return raw;
    for (size_t i = 0; i < sizeof binary / sizeof *binary; i++)
        if (ends_in(path, binary[i])) return "something else";
    return memchr(head, '\0', n) ? raw : NULL;
}

static srf_status open_text(const char *path, const struct srf_bpe *bpe, struct srf_tokenset *ts)
{
    SRF_FAIL_IF(
        !bpe, SRF_INVALID,
        "%s: plain text, and the model holds no tokenizer: srf import --tokenizer attaches one",
        path);
    FILE *f = fopen(path, "rb");
    SRF_FAIL_IF(!f, SRF_IO, "%s: %s", path, strerror(errno));
    ts->format = "text";
    srf_bpe_hash(bpe, ts->hash);
    srf_status st = srf_bpe_encode_stream(bpe, f, true, srf_ids_append, &ts->text, NULL);
    fclose(f);
    if (st != SRF_OK) srf__error_prefix("%s", path);
    SRF_TRY(st);
    ts->count = ts->text.n;
    int32_t end = srf_bpe_token_id(bpe, SRF_END_OF_TEXT);
    for (int64_t i = 0; i < ts->count; i++) ts->documents += i == 0 || ts->text.ids[i - 1] == end;
    /* Ids need no check when the tokenizer is the model's; it may still be too large for it. */
    for (int64_t i = 0; i < ts->count; i++)
        SRF_FAIL_IF(ts->vocab_size && ts->text.ids[i] >= ts->vocab_size, SRF_MISMATCH,
                    "%s: the tokenizer gives id %d, expected 0 to %lld", path, (int)ts->text.ids[i],
                    (long long)ts->vocab_size - 1);
    return SRF_OK;
}

/* ---- opening --------------------------------------------------------------------------------- */

static srf_status open_one(const char *path, const struct srf_bpe *bpe, struct srf_tokenset *ts)
{
    struct srf__file f;
    SRF_TRY(srf__file_open(path, &f));
    srf_status st = SRF_OK;
    char *head = NULL;
    int64_t n = f.size < SNIFF_BYTES ? f.size : SNIFF_BYTES;
    SRF_TRY_GO(SRF_ALLOC(head, n + 8));
    memset(head, 0, 8);
    SRF_TRY_GO(srf__file_read(&f, 0, head, n));
    int64_t magic = id_at(SRF__ID_U32, (const unsigned char *)head);
    if (memcmp(head, "\x89HDF\r\n\x1a\n", 8) == 0)
        SRF_TRY_GO(srf__tokenset_open_h5(path, bpe, ts));
    else if (memcmp(head, "\x93NUMPY", 6) == 0)
        SRF_TRY_GO(srf__tokenset_open_npy(path, ts));
    else if (n >= 4 && (magic == SRF__LLMC_MAGIC_U16 || magic == SRF__LLMC_MAGIC_U32))
        SRF_TRY_GO(srf__tokenset_add_llmc(path, ts));
    else {
        const char *found = srf_tokenset_not_text(path, head, (size_t)n);
        SRF_FAIL_GO_IF(found, SRF_FORMAT,
                       "%s: expected a token set of srf, llm.c tokens, a .npy or plain text, found "
                       "%s",
                       path, found);
        SRF_TRY_GO(open_text(path, bpe, ts));
    }
cleanup:
    srf__free(head);
    srf__file_close(&f);
    return st;
}

/* A pattern such as shard_*.bin, where no file has that very name: llm.c shards in order. */
static srf_status open_shards(const char *pattern, struct srf_tokenset *ts)
{
    glob_t found = {0};
    int rc = glob(pattern, GLOB_ERR, NULL, &found);
    srf_status st = SRF_OK;
    SRF_FAIL_GO_IF(rc == GLOB_NOMATCH, SRF_IO, "%s: no such file", pattern);
    SRF_FAIL_GO_IF(rc != 0, SRF_IO, "%s: cannot be searched for", pattern);
    for (size_t i = 0; i < found.gl_pathc; i++)
        SRF_TRY_GO(srf__tokenset_add_llmc(found.gl_pathv[i], ts));
cleanup:
    globfree(&found);
    return st;
}

srf_status srf_tokenset_open(const char *path, const struct srf_bpe *bpe, int64_t vocab_size,
                             struct srf_tokenset **out)
{
    struct srf_tokenset *ts;
    struct stat info;
    srf_status st = SRF_OK;
    *out = NULL;
    SRF_TRY(SRF_CALLOC(ts, 1));
    ts->vocab_size = vocab_size;
    if (stat(path, &info) != 0 && errno == ENOENT && strpbrk(path, "*?["))
        SRF_TRY_GO(open_shards(path, ts));
    else
        SRF_TRY_GO(open_one(path, bpe, ts));
    *out = ts;
    return SRF_OK;
cleanup:
    srf_tokenset_close(ts);
    return st;
}

void srf_tokenset_close(struct srf_tokenset *ts)
{
    if (!ts) return;
    for (int64_t i = 0; i < ts->n_files; i++) srf__file_close(&ts->files[i]);
    srf__free(ts->files);
    srf__free(ts->runs);
    srf__free(ts->sums);
    srf__free(ts->checked);
    srf_ids_free(&ts->text);
    srf__free(ts);
}

int64_t srf_tokenset_count(const struct srf_tokenset *ts)
{
    return ts->count;
}

const char *srf_tokenset_tokenizer_hash(const struct srf_tokenset *ts)
{
    return ts->hash;
}

const char *srf_tokenset_format(const struct srf_tokenset *ts)
{
    return ts->format;
}

int64_t srf_tokenset_documents(const struct srf_tokenset *ts)
{
    return ts->documents;
}
