/* The native token set: written and read back from any window, by HDF5 too; another tokenizer, a
 * vocabulary too small, damage, and files that are not what they should be are refused. */
#include "tests/tokenset_case.h"

#include <hdf5.h>

/* Small and large vocabularies, lengths around the size of a chunk (2^18), appended in odd pieces.
 */
static void native(void **state)
{
    (void)state;
    static const int64_t lengths[] = {1, 1000, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, 700000};
    int32_t *ids = malloc(700000 * sizeof *ids);
    char path[128];
    for (int wide = 0; wide < 2; wide++) {
        struct srf_bpe *bpe = make_bpe(1, wide ? 100000 : 1 << 16);
        char hash[17];
        srf_bpe_hash(bpe, hash);
        for (size_t k = 0; k < sizeof lengths / sizeof *lengths; k++) {
            struct srf_tokenset_writer *w;
            struct srf_tokenset *ts;
            int64_t n = lengths[k], documents = 0;
            random_ids((uint32_t)k, ids, n, wide ? 100000 : 1 << 16);
            test_ok(srf_tokenset_writer_create(test_at(path, "native.h5"), bpe, &w));
            for (int64_t at = 0; at < n; documents++) {
                int64_t some = n - at < 12345 ? n - at : 12345;
                test_ok(srf_tokenset_writer_document(w));
                test_ok(srf_tokenset_writer_document(w)); /* twice is once */
                test_ok(srf_tokenset_writer_append(w, ids + at, some / 2));
                test_ok(srf_tokenset_writer_append(w, ids + at + some / 2, some - some / 2));
                at += some;
            }
            test_ok(srf_tokenset_writer_document(w)); /* nothing follows: no document */
            test_ok(srf_tokenset_writer_finish(w));
            assert_int_equal(test_entries(test_root), 1);
            test_ok(srf_tokenset_open(path, bpe, wide ? 100000 : 1 << 16, &ts));
            assert_string_equal(srf_tokenset_format(ts), "hdf5");
            assert_string_equal(srf_tokenset_tokenizer_hash(ts), hash);
            assert_int_equal(srf_tokenset_documents(ts), documents);
            expect_windows(ts, ids, n);
            srf_tokenset_close(ts);
        }
        srf_bpe_free(bpe);
    }
    unlink(path);
    free(ids);
}

/* Ids of two bytes end at 65,535: with one token more there are four. */
static void widths(void **state)
{
    (void)state;
    for (int vocab = 1 << 16; vocab <= (1 << 16) + 1; vocab++) {
        const int32_t ids[] = {0, 1, 65534, 65535, vocab - 1};
        struct srf_bpe *bpe = make_bpe(1, vocab);
        struct srf_tokenset_writer *w;
        struct srf_tokenset *ts;
        char path[128];
        test_ok(srf_tokenset_writer_create(test_at(path, "native.h5"), bpe, &w));
        test_ok(srf_tokenset_writer_append(w, ids, 5));
        test_fails(srf_tokenset_writer_append(w, &vocab, 1), SRF_INVALID, "expected 0 to");
        test_ok(srf_tokenset_writer_finish(w));
        test_ok(srf_tokenset_open(path, bpe, vocab, &ts));
        expect_windows(ts, ids, 5);
        srf_tokenset_close(ts);
        hid_t f = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
        hid_t set = H5Dopen2(f, "/tokens", H5P_DEFAULT), type = H5Dget_type(set);
        assert_int_equal(H5Tget_size(type), vocab > 1 << 16 ? 4 : 2);
        H5Tclose(type);
        H5Dclose(set);
        H5Fclose(f);
        srf_bpe_free(bpe);
        unlink(path);
    }
}

/* What the file looks like to others: HDF5's own reading gives the ids and the starts. */
static void native_by_hdf5(void **state)
{
    (void)state;
    enum { N = 300000 };
    struct srf_bpe *bpe = make_bpe(1, 0);
    struct srf_tokenset_writer *w;
    int32_t *ids = malloc(N * sizeof *ids), *got = malloc(N * sizeof *got);
    char path[128];
    random_ids(7, ids, N, srf_bpe_vocab_size(bpe));
    test_ok(srf_tokenset_writer_create(test_at(path, "native.h5"), bpe, &w));
    test_ok(srf_tokenset_writer_append(w, ids, 10));
    test_ok(srf_tokenset_writer_document(w));
    test_ok(srf_tokenset_writer_append(w, ids + 10, N - 10));
    test_fails(srf_tokenset_writer_append(w, (int32_t[]){-1}, 1), SRF_INVALID, "id -1");
    test_fails(srf_tokenset_writer_append(w, (int32_t[]){1000}, 1), SRF_INVALID, "id 1000");
    test_ok(srf_tokenset_writer_finish(w));
    hid_t f = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT), set = H5Dopen2(f, "/tokens", H5P_DEFAULT);
    hid_t type = H5Dget_type(set);
    assert_true(H5Tequal(type, H5T_STD_U16LE) > 0);
    assert_true(H5Dread(set, H5T_NATIVE_INT32, H5S_ALL, H5S_ALL, H5P_DEFAULT, got) >= 0);
    assert_memory_equal(got, ids, N * sizeof *ids);
    H5Tclose(type);
    H5Dclose(set);
    int64_t starts[2] = {-1, -1};
    set = H5Dopen2(f, "/documents", H5P_DEFAULT);
    assert_true(H5Dread(set, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, starts) >= 0);
    assert_int_equal(starts[0], 0);
    assert_int_equal(starts[1], 10);
    H5Dclose(set);
    H5Fclose(f);
    unlink(path);
    free(ids);
    free(got);
    srf_bpe_free(bpe);
}

/* Another tokenizer, or too small a vocabulary, is an error when the set is opened. */
static void mismatches(void **state)
{
    (void)state;
    struct srf_bpe *bpe = make_bpe(1, 0), *other = make_bpe(2, 0);
    struct srf_tokenset_writer *w;
    struct srf_tokenset *ts;
    char path[128];
    test_ok(srf_tokenset_writer_create(test_at(path, "native.h5"), bpe, &w));
    test_ok(srf_tokenset_writer_append(w, (int32_t[]){3, 200, 4}, 3));
    test_ok(srf_tokenset_writer_finish(w));
    test_fails(srf_tokenset_open(path, other, 0, &ts), SRF_MISMATCH, "made with tokenizer");
    assert_null(ts);
    test_fails(srf_tokenset_open(path, bpe, 200, &ts), SRF_MISMATCH, "holds id 200");
    test_ok(srf_tokenset_open(path, bpe, 201, &ts));
    srf_tokenset_close(ts);
    test_ok(srf_tokenset_open(path, NULL, 0, &ts));
    srf_tokenset_close(ts);
    srf_tokenset_close(NULL);
    unlink(path);
    srf_bpe_free(bpe);
    srf_bpe_free(other);
}

/* The place in a file of n bytes that occur in it once. */
static size_t find_once(const unsigned char *raw, size_t size, const void *bytes, size_t n)
{
    const unsigned char *at = memmem(raw, size, bytes, n);
    assert_non_null(at);
    assert_null(memmem(at + 1, size - (size_t)(at + 1 - raw), bytes, n));
    return (size_t)(at - raw);
}

/* One bit of a token, of a document's start or of a checksum: said when that is read, and not
 * before. A file without checksums, of an older version, is read as it is. */
static void damaged(void **state)
{
    (void)state;
    enum { N = (1 << 18) + 1000, LAST = 1 << 18 }; /* two checksums */
    struct srf_bpe *bpe = make_bpe(1, 0);
    int32_t *ids = malloc(N * sizeof *ids), *got = malloc(N * sizeof *got);
    uint16_t stored[16];
    char path[128];
    test_at(path, "native.h5");
    for (int64_t n = 1000; n <= N; n += N - 1000) {
        struct srf_tokenset_writer *w;
        struct srf_tokenset *ts;
        size_t size, at;
        int64_t token = n - 500, first = token / LAST * LAST;
        random_ids(8, ids, n, srf_bpe_vocab_size(bpe));
        test_ok(srf_tokenset_writer_create(path, bpe, &w));
        test_ok(srf_tokenset_writer_append(w, ids, 77));
        test_ok(srf_tokenset_writer_document(w));
        test_ok(srf_tokenset_writer_append(w, ids + 77, n - 77));
        test_ok(srf_tokenset_writer_finish(w));
        unsigned char *raw = test_slurp(path, &size);
        hid_t f = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
        hid_t set = H5Dopen2(f, "/checksums", H5P_DEFAULT);
        int64_t sums[2] = {0};
        assert_true(H5Dread(set, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, sums) >= 0);
        H5Dclose(set);
        H5Fclose(f);

        for (int i = 0; i < 16; i++) stored[i] = (uint16_t)ids[token + i];
        at = find_once(raw, size, stored, sizeof stored);
        raw[at] ^= 1;
        test_spit(path, raw, size);
        char says[128];
        snprintf(says, sizeof says, "tokens %lld to %lld are not what was written",
                 (long long)first, (long long)n - 1);
        test_ok(srf_tokenset_open(path, bpe, 0, &ts));
        test_ok(srf_tokenset_read(ts, 0, first, got)); /* the chunks before it */
        assert_memory_equal(got, ids, (size_t)first * sizeof *got);
        for (int again = 0; again < 2; again++) {
            test_fails(srf_tokenset_read(ts, n - 1, 1, got), SRF_FORMAT, says);
            test_fails(srf_tokenset_read(ts, 0, n, got), SRF_FORMAT, says);
        }
        test_ok(srf_tokenset_read(ts, n, 0, got));
        srf_tokenset_close(ts);
        f = H5Fopen(path, H5F_ACC_RDWR, H5P_DEFAULT);
        H5Ldelete(f, "/checksums", H5P_DEFAULT);
        H5Fclose(f);
        test_ok(srf_tokenset_open(path, bpe, 0, &ts));
        test_ok(srf_tokenset_read(ts, 0, n, got));
        ids[token] ^= 1;
        assert_memory_equal(got, ids, (size_t)n * sizeof *got);
        ids[token] ^= 1;
        srf_tokenset_close(ts);
        raw[at] ^= 1;

        at = find_once(raw, size, (int64_t[]){0, 77}, 16);
        raw[at + 8] ^= 1;
        test_spit(path, raw, size);
        test_fails(srf_tokenset_open(path, bpe, 0, &ts), SRF_FORMAT,
                   "/documents is not what was written");
        raw[at + 8] ^= 1;
        at = find_once(raw, size, sums, n > LAST ? 16 : 8);
        raw[at + 7] ^= 128;
        test_spit(path, raw, size);
        test_fails(srf_tokenset_open(path, bpe, 0, &ts), SRF_FORMAT,
                   "/checksums is not what was written");
        raw[at + 7] ^= 128;
        test_spit(path, raw, size);
        test_ok(srf_tokenset_open(path, bpe, 0, &ts));
        expect_windows(ts, ids, n);
        srf_tokenset_close(ts);
        free(raw);
    }
    unlink(path);
    free(ids);
    free(got);
    srf_bpe_free(bpe);
}

/* An old file survives whatever happens to the new one. */
static void abandoned(void **state)
{
    (void)state;
    struct srf_bpe *bpe = make_bpe(1, 0);
    struct srf_tokenset_writer *w;
    char path[128];
    size_t n;
    test_spit(test_at(path, "native.h5"), "old", 3);
    test_ok(srf_tokenset_writer_create(path, bpe, &w));
    test_ok(srf_tokenset_writer_append(w, (int32_t[]){3}, 1));
    assert_int_equal(test_entries(test_root), 2);
    srf_tokenset_writer_abort(w);
    srf_tokenset_writer_abort(NULL);
    assert_int_equal(test_entries(test_root), 1);
    unsigned char *text = test_slurp(path, &n);
    assert_string_equal((char *)text, "old");
    free(text);
    for (int k = 0, failures = 0;; k++) {
        assert_true(k < 1000);
        srf__fail_alloc_after(k);
        srf_status st = srf_tokenset_writer_create(path, bpe, &w);
        if (st == SRF_OK) {
            st = srf_tokenset_writer_append(w, (int32_t[]){3}, 1);
            if (st == SRF_OK)
                st = srf_tokenset_writer_finish(w);
            else
                srf_tokenset_writer_abort(w);
        }
        struct srf_tokenset *ts = NULL;
        if (st == SRF_OK) st = srf_tokenset_open(path, bpe, 0, &ts);
        srf__fail_alloc_after(-1);
        srf_tokenset_close(ts);
        assert_int_equal(test_entries(test_root), 1);
        failures += st != SRF_OK;
        if (st != SRF_OK) continue;
        assert_true(failures > 10);
        break;
    }
    unlink(path);
    test_fails(srf_tokenset_writer_create("no/such/place.h5", bpe, &w), SRF_IO, "No such file");
    assert_null(w);
    srf_bpe_free(bpe);
}

/* --- HDF5 files that are not what they should be --- */

static void put_str(hid_t f, const char *name, const char *text)
{
    hid_t type = H5Tcopy(H5T_C_S1), space = H5Screate(H5S_SCALAR);
    H5Tset_size(type, strlen(text) + 1);
    hid_t attr = H5Acreate2(f, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    H5Awrite(attr, type, text);
    H5Aclose(attr);
    H5Sclose(space);
    H5Tclose(type);
}

static void put_int(hid_t f, const char *name, int64_t value)
{
    hid_t space = H5Screate(H5S_SCALAR);
    hid_t attr = H5Acreate2(f, name, H5T_STD_I64LE, space, H5P_DEFAULT, H5P_DEFAULT);
    H5Awrite(attr, H5T_NATIVE_INT64, &value);
    H5Aclose(attr);
    H5Sclose(space);
}

static void put_set(hid_t f, const char *name, hid_t type, int rank, const hsize_t *dims,
                    hid_t dcpl, hid_t memory, const void *data)
{
    hid_t space = H5Screate_simple(rank, dims, NULL);
    hid_t set = H5Dcreate2(f, name, type, space, H5P_DEFAULT, dcpl, H5P_DEFAULT);
    assert_true(set >= 0);
    if (data) H5Dwrite(set, memory, H5S_ALL, H5S_ALL, H5P_DEFAULT, data);
    H5Dclose(set);
    H5Sclose(space);
}

enum fault {
    NONE,
    CHUNKED, /* is no fault */
    NO_FORMAT,
    WRONG_FORMAT,
    WRONG_VERSION,
    WRONG_KIND,
    LONG_HASH,
    NO_MAX_ID,
    NO_TOKENS,
    FLOATS,
    BYTES_SWAPPED,
    TWO_DIMENSIONS,
    COMPRESSED,
    NOT_WRITTEN,
    CHUNKS_NOT_WRITTEN,
    HUGE_CHUNKED,
    COMPACT,
    EXTERNAL,
    LINK_OUT,
    TOO_MANY_DOCUMENTS,
    DOCUMENTS_DESCEND,
    DOCUMENT_OUTSIDE,
    FEW_SUMS,
    FLOAT_SUMS,
    FIRST_DOCUMENT_LATE,
    FLOAT_DOCUMENTS,
    N_FAULTS
};

static void make_faulty(const char *path, const char *other, enum fault fault)
{
    static const uint16_t ids[6] = {1, 2, 3, 4, 5, 6};
    int64_t documents[7] = {0, 2, 4, 5, 6, 7, 8};
    double starts[3] = {0, 2, 4};
    hsize_t n = 6, two[2] = {2, 3}, chunk = 4, n_documents = 3, huge = 1ull << 40;
    hid_t fapl = H5Pcreate(H5P_FILE_ACCESS);
    H5Pset_libver_bounds(fapl, H5F_LIBVER_V18, H5F_LIBVER_LATEST);
    hid_t f = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, fapl);
    H5Pclose(fapl);
    hid_t dcpl = H5Pcreate(H5P_DATASET_CREATE);
    if (fault != NO_FORMAT) put_str(f, "format", fault == WRONG_FORMAT ? "else" : "srf");
    put_int(f, "version", fault == WRONG_VERSION ? 2 : 1);
    put_str(f, "kind", fault == WRONG_KIND ? "weights" : "tokens");
    put_str(f, "tokenizer_hash", fault == LONG_HASH ? "0123456789abcdef0" : "");
    if (fault != NO_MAX_ID) put_int(f, "max_id", 6);
    hid_t type = fault == FLOATS          ? H5T_IEEE_F32LE
                 : fault == BYTES_SWAPPED ? H5T_STD_U16BE
                                          : H5T_STD_U16LE;
    if (fault == CHUNKED || fault == COMPRESSED || fault == CHUNKS_NOT_WRITTEN ||
        fault == HUGE_CHUNKED)
        H5Pset_chunk(dcpl, 1, &chunk);
    if (fault == COMPRESSED) H5Pset_shuffle(dcpl);
    if (fault == COMPACT) H5Pset_layout(dcpl, H5D_COMPACT);
    if (fault == EXTERNAL) H5Pset_external(dcpl, other, 0, 12);
    bool written = fault != NOT_WRITTEN && fault != CHUNKS_NOT_WRITTEN && fault != HUGE_CHUNKED;
    if (fault == LINK_OUT)
        H5Lcreate_external(other, "/tokens", f, "/tokens", H5P_DEFAULT, H5P_DEFAULT);
    else if (fault != NO_TOKENS)
        put_set(f, "/tokens", type, fault == TWO_DIMENSIONS ? 2 : 1,
                fault == TWO_DIMENSIONS ? two
                : fault == HUGE_CHUNKED ? &huge
                                        : &n,
                dcpl, H5T_NATIVE_UINT16, written ? ids : NULL);
    if (fault == TOO_MANY_DOCUMENTS) n_documents = 7;
    if (fault == DOCUMENTS_DESCEND) documents[2] = 1;
    if (fault == DOCUMENT_OUTSIDE) documents[2] = 6;
    if (fault == FIRST_DOCUMENT_LATE) documents[0] = 1;
    if (fault == FLOAT_DOCUMENTS)
        put_set(f, "/documents", H5T_IEEE_F64LE, 1, &n_documents, H5P_DEFAULT, H5T_NATIVE_DOUBLE,
                starts);
    else
        put_set(f, "/documents", H5T_STD_I64LE, 1, &n_documents, H5P_DEFAULT, H5T_NATIVE_INT64,
                documents);
    if (fault == FEW_SUMS || fault == FLOAT_SUMS) {
        hsize_t n_sums = fault == FLOAT_SUMS;
        put_set(f, "/checksums", fault == FLOAT_SUMS ? H5T_IEEE_F64LE : H5T_STD_I64LE, 1, &n_sums,
                H5P_DEFAULT, H5T_NATIVE_DOUBLE, n_sums ? starts : NULL);
    }
    H5Pclose(dcpl);
    H5Fclose(f);
}

static void bad_native(void **state)
{
    (void)state;
    static const char *const says[N_FAULTS] = {
        [NO_FORMAT] = "not one of srf's (no attribute format)",
        [WRONG_FORMAT] = "expected attribute format srf, found else",
        [WRONG_VERSION] = "expected version 1, found 2",
        [WRONG_KIND] = "expected attribute kind tokens, found weights",
        [LONG_HASH] = "tokenizer_hash: expected 16 digits",
        [NO_MAX_ID] = "attribute max_id of / is missing",
        [NO_TOKENS] = "/tokens is missing",
        [FLOATS] = "/tokens: expected u16 or u32",
        [BYTES_SWAPPED] = "/tokens: expected u16 or u32, little endian",
        [TWO_DIMENSIONS] = "/tokens: expected 1 dimension, found 2",
        [COMPRESSED] = "/tokens: expected it uncompressed",
        [NOT_WRITTEN] = "/tokens: the tokens are not in the file",
        [CHUNKS_NOT_WRITTEN] = "token 0 and what follows is not in the file",
        [HUGE_CHUNKED] = "do not fit into the file",
        [COMPACT] = "/tokens: expected it contiguous or chunked",
        [EXTERNAL] = "/tokens: is in another file",
        [LINK_OUT] = "/tokens is missing",
        [TOO_MANY_DOCUMENTS] = "/documents: 7 of them, expected at most 6",
        [DOCUMENTS_DESCEND] = "document 2 starts at token 1",
        [DOCUMENT_OUTSIDE] = "document 2 starts at token 6 of 6",
        [FEW_SUMS] = "/checksums: 0 of 6 tokens, expected 1",
        [FLOAT_SUMS] = "/checksums: expected whole numbers",
        [FIRST_DOCUMENT_LATE] = "document 0 starts at token 1",
        [FLOAT_DOCUMENTS] = "/documents: expected whole numbers",
    };
    char path[128], other[128];
    make_faulty(test_at(other, "other.h5"), "", NONE);
    test_at(path, "bad.h5");
    for (int fault = 0; fault < N_FAULTS; fault++) {
        struct srf_tokenset *ts;
        make_faulty(path, other, fault);
        srf_status st = srf_tokenset_open(path, NULL, 0, &ts);
        if (says[fault]) {
            assert_int_not_equal(st, SRF_OK);
            test_fails(st, st, says[fault]);
            assert_null(ts);
            continue;
        }
        test_ok(st);
        expect_windows(ts, (int32_t[]){1, 2, 3, 4, 5, 6}, 6);
        assert_int_equal(srf_tokenset_documents(ts), 3);
        srf_tokenset_close(ts);
    }
    /* Cut anywhere: an error. */
    size_t n;
    make_faulty(path, other, CHUNKED);
    unsigned char *raw = test_slurp(path, &n);
    for (size_t i = 0; i < n; i += 1 + n / 600) {
        struct srf_tokenset *ts;
        test_spit(path, raw, i);
        assert_int_not_equal(srf_tokenset_open(path, NULL, 0, &ts), SRF_OK);
        assert_null(ts);
    }
    free(raw);
    unlink(path);
    unlink(other);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(native),     cmocka_unit_test(widths),  cmocka_unit_test(native_by_hdf5),
        cmocka_unit_test(mismatches), cmocka_unit_test(damaged), cmocka_unit_test(abandoned),
        cmocka_unit_test(bad_native),
    };
    return cmocka_run_group_tests(tests, test_make_root, test_remove_root);
}
