/* The native token set. Root attributes format "srf", version 1, kind "tokens", tokenizer_hash,
 * vocab_size, max_id, creator; /tokens: u16 (vocabularies up to 65536) or u32, little endian, no
 * filters; /documents: i64, the token at which each document starts; /checksums: i64, of each 2^18
 * tokens' bytes (files of older versions have none).
 *
 * Ids are read by pread at the addresses HDF5 gives, not through it: a random window costs one
 * system call, and threads may read at once. */
#include "data/checksum.h"
#include "data/h5_internal.h"
#include "data/tokenset_internal.h"
#include "kernels/grow.h"

#include <string.h>

enum { U16_VOCAB = 1 << 16 };

/* ---- reading --------------------------------------------------------------------------------- */

static srf_status add_chunks(struct srf_tokenset *ts, const char *path, hid_t set, hid_t dcpl,
                             int64_t n)
{
    int width = srf__id_bytes(ts->type);
    hsize_t chunk;
    const struct srf__file *f = &ts->files[ts->n_files - 1];
    SRF_FAIL_IF(H5Pget_chunk(dcpl, 1, &chunk) != 1 || chunk == 0, SRF_FORMAT,
                "%s: /tokens: bad chunks", path);
    /* Before the loop below: all chunks that the length asks for can be in the file. */
    int64_t n_chunks = n / (int64_t)chunk + (n % (int64_t)chunk != 0), bytes;
    SRF_FAIL_IF(
        chunk > INT64_MAX / 8 || __builtin_mul_overflow((int64_t)chunk * width, n_chunks, &bytes) ||
            bytes > f->size,
        SRF_FORMAT, "%s: /tokens: %lld tokens do not fit into the file", path, (long long)n);
    for (int64_t i = 0; i < n_chunks; i++) {
        hsize_t at = (hsize_t)i * chunk, size;
        unsigned mask;
        haddr_t address;
        int64_t some = n - (int64_t)at < (int64_t)chunk ? n - (int64_t)at : (int64_t)chunk;
        SRF_FAIL_IF(H5Dget_chunk_info_by_coord(set, &at, &mask, &address, &size) < 0 ||
                        address == HADDR_UNDEF || address > INT64_MAX ||
                        size != chunk * (hsize_t)width,
                    SRF_FORMAT, "%s: /tokens: token %lld and what follows is not in the file", path,
                    (long long)at);
        SRF_TRY(srf__tokenset_add_run(ts, some, (int64_t)address));
    }
    return SRF_OK;
}

/* Length of a one-dimensional dataset without filters and external files. */
static srf_status plain_length(hid_t set, hid_t dcpl, const char *path, const char *name,
                               int64_t *n)
{
    hsize_t dims[1];
    hid_t space = H5Dget_space(set);
    int rank = space < 0 ? -1 : H5Sget_simple_extent_ndims(space);
    if (rank == 1) H5Sget_simple_extent_dims(space, dims, NULL);
    if (space >= 0) H5Sclose(space);
    SRF_FAIL_IF(rank != 1 || dims[0] > INT64_MAX, SRF_FORMAT,
                "%s: %s: expected 1 dimension, found %d", path, name, rank);
    SRF_FAIL_IF(H5Pget_nfilters(dcpl) != 0, SRF_UNSUPPORTED,
                "%s: %s: expected it uncompressed, found filters", path, name);
    SRF_FAIL_IF(H5Pget_external_count(dcpl) != 0, SRF_UNSUPPORTED, "%s: %s: is in another file",
                path, name);
    *n = (int64_t)dims[0];
    return SRF_OK;
}

static srf_status open_plain(struct srf_h5 *f, const char *name, hid_t *set, hid_t *dcpl,
                             hid_t *type, int64_t *n)
{
    *set = *dcpl = *type = H5I_INVALID_HID;
    SRF_FAIL_IF(!srf__h5_exists(f, name), SRF_FORMAT, "%s: %s is missing", f->path, name);
    *set = H5Dopen2(f->file, name, H5P_DEFAULT);
    SRF_FAIL_IF(*set < 0, SRF_FORMAT, "%s: %s: %s", f->path, name, srf__h5_why().text);
    *dcpl = H5Dget_create_plist(*set);
    *type = H5Dget_type(*set);
    SRF_FAIL_IF(*dcpl < 0 || *type < 0, SRF_FORMAT, "%s: %s: %s", f->path, name,
                srf__h5_why().text);
    return plain_length(*set, *dcpl, f->path, name, n);
}

static void close_plain(hid_t set, hid_t dcpl, hid_t type)
{
    if (type >= 0) H5Tclose(type);
    if (dcpl >= 0) H5Pclose(dcpl);
    if (set >= 0) H5Dclose(set);
}

static srf_status find_tokens(struct srf_h5 *f, struct srf_tokenset *ts)
{
    hid_t set, dcpl, type;
    int64_t n;
    srf_status st = SRF_OK;
    SRF_TRY_GO(open_plain(f, "/tokens", &set, &dcpl, &type, &n));
    bool narrow = H5Tequal(type, H5T_STD_U16LE) > 0, wide = H5Tequal(type, H5T_STD_U32LE) > 0;
    SRF_FAIL_GO_IF(!narrow && !wide, SRF_FORMAT,
                   "%s: /tokens: expected u16 or u32, little endian, found another type", f->path);
    ts->type = narrow ? SRF__ID_U16 : SRF__ID_U32;
    if (n == 0) goto cleanup;
    switch (H5Pget_layout(dcpl)) {
    case H5D_CONTIGUOUS: {
        haddr_t at = H5Dget_offset(set);
        SRF_FAIL_GO_IF(at == HADDR_UNDEF || at > INT64_MAX, SRF_FORMAT,
                       "%s: /tokens: the tokens are not in the file", f->path);
        SRF_TRY_GO(srf__tokenset_add_run(ts, n, (int64_t)at));
        break;
    }
    case H5D_CHUNKED:
        SRF_TRY_GO(add_chunks(ts, f->path, set, dcpl, n));
        break;
    default:
        SRF_FAIL_GO(SRF_UNSUPPORTED, "%s: /tokens: expected it contiguous or chunked", f->path);
    }
cleanup:
    close_plain(set, dcpl, type);
    return st;
}

/* All of a dataset of at most `most` whole numbers; srf__free. */
static srf_status read_plain(struct srf_h5 *f, const char *name, int64_t most, int64_t **values,
                             int64_t *n)
{
    hid_t set, dcpl, type;
    int64_t *all = NULL;
    srf_status st = SRF_OK;
    SRF_TRY_GO(open_plain(f, name, &set, &dcpl, &type, n));
    SRF_FAIL_GO_IF(*n > most, SRF_FORMAT, "%s: %s: %lld of them, expected at most %lld", f->path,
                   name, (long long)*n, (long long)most);
    SRF_FAIL_GO_IF(H5Dget_storage_size(set) > (hsize_t)f->size, SRF_FORMAT,
                   "%s: %s: does not fit into the file", f->path, name);
    SRF_TRY_GO(SRF_ALLOC(all, *n));
    SRF_FAIL_GO_IF(
        H5Tget_class(type) != H5T_INTEGER ||
            (*n && H5Dread(set, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, all) < 0),
        SRF_FORMAT, "%s: %s: expected whole numbers", f->path, name);
    SRF_TRY_GO(srf__h5_check_checksum(f, name, all, (size_t)*n * sizeof *all));
    *values = all;
    all = NULL;
cleanup:
    srf__free(all);
    close_plain(set, dcpl, type);
    return st;
}

/* Starts of documents: ascending, inside the set, the first at 0. */
static srf_status check_documents(struct srf_h5 *f, struct srf_tokenset *ts)
{
    int64_t n, *starts;
    srf_status st = SRF_OK;
    if (!srf__h5_exists(f, "/documents")) return SRF_OK;
    SRF_TRY(read_plain(f, "/documents", ts->count, &starts, &n));
    for (int64_t i = 0; i < n; i++)
        SRF_FAIL_GO_IF(i == 0 ? starts[i] != 0
                              : starts[i] <= starts[i - 1] || starts[i] >= ts->count,
                       SRF_FORMAT, "%s: /documents: document %lld starts at token %lld of %lld",
                       f->path, (long long)i, (long long)starts[i], (long long)ts->count);
    ts->documents = n;
cleanup:
    srf__free(starts);
    return st;
}

static srf_status read_sums(struct srf_h5 *f, struct srf_tokenset *ts)
{
    int64_t n, expected = (ts->count + SRF__CHUNK - 1) / SRF__CHUNK;
    if (!srf__h5_exists(f, "/checksums")) return SRF_OK;
    SRF_TRY(read_plain(f, "/checksums", expected, &ts->sums, &n));
    SRF_FAIL_IF(n != expected, SRF_FORMAT, "%s: /checksums: %lld of %lld tokens, expected %lld",
                f->path, (long long)n, (long long)ts->count, (long long)expected);
    return SRF_CALLOC(ts->checked, n);
}

static srf_status read_attributes(struct srf_h5 *f, const struct srf_bpe *bpe,
                                  struct srf_tokenset *ts)
{
    int64_t max_id;
    char *hash = NULL, model[17] = "";
    srf_status st = SRF_OK;
    SRF_TRY(srf_h5_check_header(f, "tokens"));
    SRF_TRY(srf_h5_get_str(f, "/", "tokenizer_hash", &hash));
    SRF_FAIL_GO_IF(strlen(hash) != 16 && strlen(hash) != 0, SRF_FORMAT,
                   "%s: tokenizer_hash: expected 16 digits, found %.60s", f->path, hash);
    memcpy(ts->hash, hash, strlen(hash) + 1);
    if (bpe) srf_bpe_hash(bpe, model);
    SRF_FAIL_GO_IF(bpe && hash[0] && strcmp(hash, model) != 0, SRF_MISMATCH,
                   "%s: made with tokenizer %s, but the model's is %s", f->path, hash, model);
    SRF_TRY_GO(srf_h5_get_i64(f, "/", "max_id", &max_id));
    SRF_FAIL_GO_IF(ts->vocab_size && max_id >= ts->vocab_size, SRF_MISMATCH,
                   "%s: holds id %lld, expected 0 to %lld", f->path, (long long)max_id,
                   (long long)ts->vocab_size - 1);
cleanup:
    srf__free(hash);
    return st;
}

srf_status srf__tokenset_open_h5(const char *path, const struct srf_bpe *bpe,
                                 struct srf_tokenset *ts)
{
    struct srf_h5 *f;
    struct srf__file *raw;
    SRF_TRY(srf_h5_open(path, &f));
    struct srf__hush hush = srf__hush();
    srf_status st = SRF_OK;
    ts->format = "hdf5";
    SRF_TRY_GO(srf__tokenset_add_file(ts, path, &raw));
    SRF_TRY_GO(read_attributes(f, bpe, ts));
    SRF_TRY_GO(find_tokens(f, ts));
    SRF_TRY_GO(check_documents(f, ts));
    SRF_TRY_GO(read_sums(f, ts));
cleanup:
    srf__unhush(hush, st);
    srf_h5_close(f);
    return st;
}

/* ---- writing --------------------------------------------------------------------------------- */

struct srf_tokenset_writer {
    struct srf_h5 *file;
    hid_t set; /* /tokens once it has more than a chunk */
    enum srf__id_type type;
    int64_t count, max_id, vocab_size;
    char hash[17];
    unsigned char *chunk; /* (SRF__CHUNK ids) not written yet */
    int64_t n_chunk;
    int64_t *documents; /* (n_documents) */
    int64_t n_documents;
    int64_t *sums; /* (n_sums) of what is written */
    int64_t n_sums;
    size_t cap_documents, cap_sums;
    bool starts; /* the next token starts a document */
};

static hid_t file_type(const struct srf_tokenset_writer *w)
{
    return w->type == SRF__ID_U16 ? H5T_STD_U16LE : H5T_STD_U32LE;
}

srf_status srf_tokenset_writer_create(const char *path, const struct srf_bpe *bpe,
                                      struct srf_tokenset_writer **out)
{
    struct srf_tokenset_writer *w;
    srf_status st = SRF_OK;
    *out = NULL;
    SRF_TRY(SRF_CALLOC(w, 1));
    w->set = H5I_INVALID_HID;
    w->vocab_size = srf_bpe_vocab_size(bpe);
    w->type = w->vocab_size <= U16_VOCAB ? SRF__ID_U16 : SRF__ID_U32;
    w->max_id = -1;
    w->starts = true;
    srf_bpe_hash(bpe, w->hash);
    SRF_TRY_GO(SRF_ALLOC(w->chunk, SRF__CHUNK * srf__id_bytes(w->type)));
    SRF_TRY_GO(srf_h5_create(path, &w->file));
    *out = w;
    return SRF_OK;
cleanup:
    srf_tokenset_writer_abort(w);
    return st;
}

/* The checksum of what is in the chunk buffer. */
static srf_status add_sum(struct srf_tokenset_writer *w)
{
    if (w->n_chunk == 0) return SRF_OK;
    SRF_TRY(SRF_GROW(w->sums, w->cap_sums, w->n_sums + 1));
    size_t size = (size_t)(w->n_chunk * srf__id_bytes(w->type));
    w->sums[w->n_sums++] = (int64_t)srf__checksum(w->chunk, size);
    return SRF_OK;
}

/* Write the n ids in the chunk buffer behind those written. */
static srf_status flush_chunk(struct srf_tokenset_writer *w)
{
    hsize_t n = (hsize_t)w->n_chunk, size = (hsize_t)w->count, start = size - n,
            unlimited = H5S_UNLIMITED, chunk = SRF__CHUNK;
    bool ok = true;
    SRF_TRY(add_sum(w));
    struct srf__hush hush = srf__hush();
    if (w->set < 0) {
        hsize_t none = 0;
        hid_t space = H5Screate_simple(1, &none, &unlimited);
        hid_t dcpl = H5Pcreate(H5P_DATASET_CREATE);
        H5Pset_obj_track_times(dcpl, false); /* same contents, same bytes */
        ok = H5Pset_chunk(dcpl, 1, &chunk) >= 0;
        w->set = H5Dcreate2(w->file->file, "/tokens", file_type(w), space, H5P_DEFAULT, dcpl,
                            H5P_DEFAULT);
        H5Pclose(dcpl);
        H5Sclose(space);
    }
    ok = ok && w->set >= 0 && H5Dset_extent(w->set, &size) >= 0;
    hid_t memory = H5Screate_simple(1, &n, NULL), space = ok ? H5Dget_space(w->set) : memory;
    ok = ok && H5Sselect_hyperslab(space, H5S_SELECT_SET, &start, NULL, &n, NULL) >= 0 &&
         H5Dwrite(w->set, file_type(w), memory, space, H5P_DEFAULT, w->chunk) >= 0;
    srf_status st = SRF_OK;
    if (!ok)
        st = srf__fail(__FILE__, __LINE__, SRF_IO, "%s: %s", w->file->path, srf__h5_why().text);
    if (space != memory) H5Sclose(space);
    H5Sclose(memory);
    w->n_chunk = 0;
    return srf__unhush(hush, st);
}

static srf_status start_document(struct srf_tokenset_writer *w)
{
    SRF_TRY(SRF_GROW(w->documents, w->cap_documents, w->n_documents + 1));
    w->documents[w->n_documents++] = w->count;
    w->starts = false;
    return SRF_OK;
}

srf_status srf_tokenset_writer_append(struct srf_tokenset_writer *w, const int32_t *ids, int64_t n)
{
    if (n > 0 && w->starts) SRF_TRY(start_document(w));
    for (int64_t i = 0; i < n; i++) {
        SRF_FAIL_IF(ids[i] < 0 || ids[i] >= w->vocab_size, SRF_INVALID,
                    "token %lld has id %d, expected 0 to %lld", (long long)w->count, (int)ids[i],
                    (long long)w->vocab_size - 1);
        /* Full and more to come: in this order a set of exactly one chunk is not chunked. */
        if (w->n_chunk == SRF__CHUNK) SRF_TRY(flush_chunk(w));
        uint32_t id = (uint32_t)ids[i];
        int width = srf__id_bytes(w->type);
        unsigned char *p = w->chunk + w->n_chunk * width;
        for (int b = 0; b < width; b++) p[b] = (unsigned char)(id >> 8 * b);
        if (ids[i] > w->max_id) w->max_id = ids[i];
        w->n_chunk++;
        w->count++;
    }
    return SRF_OK;
}

srf_status srf_tokenset_writer_document(struct srf_tokenset_writer *w)
{
    w->starts = true;
    return SRF_OK;
}

/* A dataset in one piece. */
static srf_status put_plain(struct srf_tokenset_writer *w, const char *name, hid_t type, int64_t n,
                            const void *data)
{
    hsize_t size = (hsize_t)n;
    struct srf__hush hush = srf__hush();
    hid_t space = H5Screate_simple(1, &size, NULL);
    hid_t dcpl = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_obj_track_times(dcpl, false);
    hid_t set = H5Dcreate2(w->file->file, name, type, space, H5P_DEFAULT, dcpl, H5P_DEFAULT);
    srf_status st = SRF_OK;
    if (set < 0 || (n && H5Dwrite(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) < 0))
        st = srf__fail(__FILE__, __LINE__, SRF_IO, "%s: %s", w->file->path, srf__h5_why().text);
    if (set >= 0) H5Dclose(set);
    H5Pclose(dcpl);
    H5Sclose(space);
    return srf__unhush(hush, st);
}

/* Whole numbers, with their checksum. */
static srf_status put_numbers(struct srf_tokenset_writer *w, const char *name, int64_t n,
                              const int64_t *values)
{
    SRF_TRY(put_plain(w, name, H5T_STD_I64LE, n, values));
    return srf__h5_put_checksum(w->file, name, values, (size_t)n * sizeof *values);
}

static srf_status write_rest(struct srf_tokenset_writer *w)
{
    if (w->set < 0) {
        SRF_TRY(add_sum(w));
        SRF_TRY(put_plain(w, "/tokens", file_type(w), w->n_chunk, w->chunk));
    } else {
        SRF_TRY(flush_chunk(w));
    }
    SRF_TRY(put_numbers(w, "/documents", w->n_documents, w->documents));
    SRF_TRY(put_numbers(w, "/checksums", w->n_sums, w->sums));
    SRF_TRY(srf_h5_put_header(w->file, "tokens"));
    SRF_TRY(srf_h5_put_str(w->file, "/", "tokenizer_hash", w->hash));
    SRF_TRY(srf_h5_put_i64(w->file, "/", "vocab_size", w->vocab_size));
    return srf_h5_put_i64(w->file, "/", "max_id", w->max_id);
}

srf_status srf_tokenset_writer_finish(struct srf_tokenset_writer *w)
{
    srf_status st = write_rest(w);
    if (st == SRF_OK) {
        struct srf_h5 *file = w->file;
        w->file = NULL;
        if (w->set >= 0) H5Dclose(w->set);
        w->set = H5I_INVALID_HID;
        st = srf_h5_commit(file);
    }
    srf_tokenset_writer_abort(w);
    return st;
}

void srf_tokenset_writer_abort(struct srf_tokenset_writer *w)
{
    if (!w) return;
    if (w->set >= 0) H5Dclose(w->set);
    srf_h5_close(w->file);
    srf__free(w->chunk);
    srf__free(w->documents);
    srf__free(w->sums);
    srf__free(w);
}
