/* Token sets: every format gives its ids back from any window; what does not fit its file, its
 * vocabulary or its tokenizer is refused. */
#include "data/tokenset.h"
#include "tests/ref/bpe.h"
#include "tests/scratch.h"

#include <hdf5.h>

/* Bytes have shuffled ids, <|endoftext|> is the last. */
static struct srf_bpe *make_bpe(uint32_t stream, int vocab)
{
    struct ref_bpe *ref = malloc(sizeof *ref);
    struct srf_rng rng = srf_rng_at(test_seed(), SRF_RNG_TEST, 2, stream, 0);
    ref_bpe_random(&rng, 40, ref);
    while (ref->tokens[ref->n_tokens - 1].added) ref->n_tokens--;
    ref->tokens[ref->n_tokens++] = (struct ref_token){SRF_END_OF_TEXT, .n = 13, .added = true};
    char *json = ref_bpe_json(ref, true), large[64], *more = NULL;
    size_t n;
    if (vocab) { /* a hole up to one more added token */
        snprintf(large, sizeof large, "\"added_tokens\": [{\"id\": %d, \"content\": \"<last>\"}, ",
                 vocab - 1);
        char *at = strstr(json, "\"added_tokens\": [");
        FILE *f = open_memstream(&more, &n);
        fprintf(f, "%.*s%s%s", (int)(at - json), json, large, at + strlen("\"added_tokens\": ["));
        fclose(f);
        free(json);
        json = more;
    }
    struct srf_bpe *bpe;
    test_ok(srf_bpe_from_json(json, strlen(json), &bpe));
    free(json);
    free(ref);
    return bpe;
}

static void random_ids(uint32_t stream, int32_t *ids, int64_t n, int64_t vocab)
{
    struct srf_rng rng = srf_rng_at(test_seed(), SRF_RNG_TEST, 3, stream, 0);
    for (int64_t i = 0; i < n; i++) ids[i] = (int32_t)srf_rng_below(&rng, (uint64_t)vocab);
}

static void expect_windows(struct srf_tokenset *ts, const int32_t *want, int64_t n)
{
    struct srf_rng rng = srf_rng_at(test_seed(), SRF_RNG_TEST, 4, 0, 0);
    int32_t *got = malloc((size_t)(n + 1) * sizeof *got);
    assert_int_equal(srf_tokenset_count(ts), n);
    test_ok(srf_tokenset_read(ts, 0, n, got));
    assert_memory_equal(got, want, (size_t)n * sizeof *got);
    for (int k = 0; k < 100; k++) {
        int64_t start = (int64_t)srf_rng_below(&rng, (uint64_t)n + 1);
        int64_t some = (int64_t)srf_rng_below(&rng, (uint64_t)(n - start) + 1);
        if (k % 2 && some > 600) some = 600;
        got[some] = -7;
        test_ok(srf_tokenset_read(ts, start, some, got));
        assert_memory_equal(got, want + start, (size_t)some * sizeof *got);
        assert_int_equal(got[some], -7);
    }
    test_fails(srf_tokenset_read(ts, n, 1, got), SRF_INVALID, "asked for");
    test_fails(srf_tokenset_read(ts, -1, 1, got), SRF_INVALID, "asked for");
    test_fails(srf_tokenset_read(ts, 0, -1, got), SRF_INVALID, "asked for");
    test_fails(srf_tokenset_read(ts, 1, INT64_MAX, got), SRF_INVALID, "asked for");
    free(got);
}

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

/* --- files of others --- */

static size_t put_le(unsigned char *to, uint64_t x, int bytes)
{
    for (int b = 0; b < bytes; b++) to[b] = (unsigned char)(x >> 8 * b);
    return (size_t)bytes;
}

/* A .npy of the version; returns its size. dict may have %d for n. */
static size_t make_npy(unsigned char *to, int version, const char *dict, const int32_t *ids, int n,
                       int width)
{
    char header[300];
    int len = snprintf(header, sizeof header, "%s\n", dict);
    memcpy(to, "\x93NUMPY", 6);
    to[6] = (unsigned char)version;
    to[7] = 0;
    size_t at = 8;
    at += put_le(to + at, (uint64_t)len, version == 1 ? 2 : 4);
    memcpy(to + at, header, (size_t)len);
    at += (size_t)len;
    for (int i = 0; i < n; i++) at += put_le(to + at, (uint64_t)(int64_t)ids[i], width);
    return at;
}

static void npy(void **state)
{
    (void)state;
    enum { N = 3000 };
    static const struct {
        const char *dict;
        int version, width;
    } forms[] = {
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (3000,), }     ", 1, 2},
        {"{'descr': '<u4', 'fortran_order': False, 'shape': (30, 100), }", 2, 4},
        {"{\"shape\":(3000,),\"descr\":\"<i4\",\"fortran_order\":True}", 3, 4},
        {"{ 'descr' : '<i8' , 'fortran_order' : False , 'shape' : ( 1 , 3000 ) }", 1, 8},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (3000L,)}", 1, 2},
    };
    int32_t ids[N];
    static unsigned char raw[N * 8 + 400];
    char path[128];
    for (size_t k = 0; k < sizeof forms / sizeof *forms; k++) {
        struct srf_tokenset *ts;
        random_ids((uint32_t)k, ids, N, 1 << 16);
        size_t n = make_npy(raw, forms[k].version, forms[k].dict, ids, N, forms[k].width);
        test_spit(test_at(path, "a.npy"), raw, n);
        test_ok(srf_tokenset_open(path, NULL, 1 << 16, &ts));
        assert_string_equal(srf_tokenset_format(ts), "npy");
        assert_string_equal(srf_tokenset_tokenizer_hash(ts), "");
        expect_windows(ts, ids, N);
        srf_tokenset_close(ts);
        /* One id out of range is found when it is read, not before. */
        ids[1234] = forms[k].width > 2 ? (forms[k].dict[12] == 'i' ? -5 : 70000) : 60000;
        n = make_npy(raw, forms[k].version, forms[k].dict, ids, N, forms[k].width);
        test_spit(path, raw, n);
        test_ok(srf_tokenset_open(path, NULL, 60000, &ts));
        int32_t got[2];
        srf_status st = srf_tokenset_read(ts, 1233, 2, got);
        test_fails(st, SRF_MISMATCH, "token 123");
        srf_tokenset_close(ts);
        for (size_t cut = 0; cut < n; cut += cut < 200 ? 1 : 997) {
            test_spit(path, raw, cut);
            assert_int_not_equal(srf_tokenset_open(path, NULL, 0, &ts), SRF_OK);
        }
        unlink(path);
    }
}

static void bad_npy(void **state)
{
    (void)state;
    static const struct {
        const char *dict, *says;
        int version;
    } rows[] = {
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }", "found <f4", 1},
        {"{'descr': '>u2', 'fortran_order': False, 'shape': (4,), }", "found >u2", 1},
        {"{'descr': '<u2', 'fortran_order': True, 'shape': (2, 2), }", "fortran_order", 1},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (5,), }", "shape (5, 1)", 1},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (3,), }", "shape (3, 1)", 1},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (2, 2, 1), }", "1 or 2 dim", 1},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (), }", "1 or 2 dim", 1},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (-4,), }", "1 or 2 dim", 1},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (9223372036854775807, 2), }", "shape",
         1},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (9223372036854775808,), }", "1 or 2",
         1},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (4611686018427387906,), }", "shape", 1},
        {"{'descr': '<u2', 'fortran_order': False, }", "npy header", 1},
        {"{'descr': '<u2', 'fortran_order': 0, 'shape': (4,), }", "npy header", 1},
        {"{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (4,), }", "npy header", 1},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (4,), } x", "npy header", 1},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (4", "npy header", 1},
        {"{'descr': '<u2", "npy header", 1},
        {"", "npy header", 1},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (4,), }", "version", 4},
    };
    unsigned char raw[512];
    int32_t ids[4] = {1, 2, 3, 4};
    char path[128];
    for (size_t k = 0; k < sizeof rows / sizeof *rows; k++) {
        struct srf_tokenset *ts;
        size_t n = make_npy(raw, rows[k].version, rows[k].dict, ids, 4, 2);
        test_spit(test_at(path, "bad.npy"), raw, n);
        srf_status st = srf_tokenset_open(path, NULL, 0, &ts);
        assert_int_not_equal(st, SRF_OK);
        test_fails(st, st, rows[k].says);
        assert_null(ts);
    }
    unlink(path);
}

static size_t make_llmc(unsigned char *to, uint32_t magic, uint32_t version, uint32_t claimed,
                        const int32_t *ids, int n, int width)
{
    memset(to, 0, 1024);
    put_le(to, magic, 4);
    put_le(to + 4, version, 4);
    put_le(to + 8, claimed, 4);
    size_t at = 1024;
    for (int i = 0; i < n; i++) at += put_le(to + at, (uint64_t)ids[i], width);
    return at;
}

static void llmc(void **state)
{
    (void)state;
    enum { N = 2000 };
    int32_t ids[3 * N];
    static unsigned char raw[1024 + 4 * N];
    char path[128], name[32];
    for (int wide = 0; wide < 2; wide++) {
        uint32_t magic = wide ? 20240801 : 20240520, version = wide ? 7 : 1;
        int width = wide ? 4 : 2;
        struct srf_tokenset *ts;
        random_ids(10, ids, 3 * N, wide ? 128000 : 50257);
        for (int k = 0; k < 3; k++) {
            size_t n = make_llmc(raw, magic, version, N, ids + k * N, N, width);
            sprintf(name, "s_%06d.bin", k);
            test_spit(test_at(path, name), raw, n);
            test_ok(srf_tokenset_open(path, NULL, 0, &ts));
            assert_string_equal(srf_tokenset_format(ts), "llmc");
            expect_windows(ts, ids + k * N, N);
            srf_tokenset_close(ts);
        }
        test_ok(srf_tokenset_open(test_at(path, "s_*.bin"), NULL, 0, &ts));
        expect_windows(ts, ids, 3 * N);
        srf_tokenset_close(ts);
        test_fails(srf_tokenset_open(test_at(path, "t_*.bin"), NULL, 0, &ts), SRF_IO,
                   "no such file");

        /* One bad shard among good ones. */
        make_llmc(raw, magic, version + 1, N, ids, N, width);
        test_spit(test_at(path, "s_000001.bin"), raw, sizeof raw);
        test_fails(srf_tokenset_open(test_at(path, "s_*.bin"), NULL, 0, &ts), SRF_UNSUPPORTED,
                   "s_000001.bin: llm.c tokens: expected version");
        size_t n = make_llmc(raw, wide ? 20240520 : 20240801, wide ? 1 : 7, N, ids, N, 6 - width);
        test_spit(test_at(path, "s_000001.bin"), raw, n);
        test_fails(srf_tokenset_open(test_at(path, "s_*.bin"), NULL, 0, &ts), SRF_MISMATCH,
                   "the shards before it");
        for (int claimed = -1; claimed < 2; claimed++) {
            n = make_llmc(raw, magic, version, (uint32_t)(N + claimed), ids, N, width);
            test_spit(test_at(path, "s_000001.bin"), raw, n);
            srf_status st = srf_tokenset_open(path, NULL, 0, &ts);
            if (claimed == 0) test_ok(st);
            if (claimed != 0) test_fails(st, SRF_FORMAT, "tokens expected");
            srf_tokenset_close(ts);
        }
        for (int k = 0; k < 3; k++) {
            sprintf(name, "s_%06d.bin", k);
            unlink(test_at(path, name));
        }
    }
}

static void plain_text(void **state)
{
    (void)state;
    static const char text[] =
        "One story.\n" SRF_END_OF_TEXT "Another, with \xff in it" SRF_END_OF_TEXT;
    struct srf_bpe *bpe = make_bpe(1, 0);
    struct srf_tokenset *ts;
    struct srf_ids ids = {0};
    char path[128];
    test_spit(test_at(path, "a.txt"), text, sizeof text - 1);
    test_ok(srf_bpe_encode(bpe, text, sizeof text - 1, true, &ids));
    test_ok(srf_tokenset_open(path, bpe, srf_bpe_vocab_size(bpe), &ts));
    assert_string_equal(srf_tokenset_format(ts), "text");
    assert_int_equal(srf_tokenset_documents(ts), 2);
    expect_windows(ts, ids.ids, ids.n);
    srf_tokenset_close(ts);
    test_fails(srf_tokenset_open(path, NULL, 0, &ts), SRF_INVALID, "no tokenizer");
    test_fails(srf_tokenset_open(path, bpe, srf_bpe_vocab_size(bpe) - 1, &ts), SRF_MISMATCH,
               "the tokenizer gives id");
    test_spit(path, "a\0b", 3);
    test_fails(srf_tokenset_open(path, bpe, 0, &ts), SRF_FORMAT, "found something else");
    unlink(path);
    test_spit(test_at(path, "a.npy"), "not an array", 12);
    test_fails(srf_tokenset_open(path, bpe, 0, &ts), SRF_FORMAT, "found something else");
    test_spit(path, "", 0);
    test_fails(srf_tokenset_open(path, bpe, 0, &ts), SRF_FORMAT, "found something else");
    unlink(path);
    test_fails(srf_tokenset_open(path, bpe, 0, &ts), SRF_IO, "No such file");
    test_fails(srf_tokenset_open(test_root, bpe, 0, &ts), SRF_IO, "directory");
    srf_ids_free(&ids);
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
    H5Pclose(dcpl);
    H5Fclose(f);
}

static void bad_native(void **state)
{
    (void)state;
    static const char *const says[N_FAULTS] = {
        [NO_FORMAT] = "attribute format of / is missing",
        [WRONG_FORMAT] = "format: expected srf, found else",
        [WRONG_VERSION] = "version: expected 1, found 2",
        [WRONG_KIND] = "kind: expected tokens, found weights",
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
        [TOO_MANY_DOCUMENTS] = "/documents: 7 of them in 6 tokens",
        [DOCUMENTS_DESCEND] = "document 2 starts at token 1",
        [DOCUMENT_OUTSIDE] = "document 2 starts at token 6 of 6",
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
        cmocka_unit_test(native),     cmocka_unit_test(native_by_hdf5),
        cmocka_unit_test(mismatches), cmocka_unit_test(abandoned),
        cmocka_unit_test(npy),        cmocka_unit_test(bad_npy),
        cmocka_unit_test(llmc),       cmocka_unit_test(plain_text),
        cmocka_unit_test(bad_native),
    };
    return cmocka_run_group_tests(tests, test_make_root, test_remove_root);
}
