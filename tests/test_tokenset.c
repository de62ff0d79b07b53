/* Token sets of others: .npy, llm.c shards, plain text. Ids come back from any window; what does
 * not fit its file or the vocabulary is refused. */
#include "tests/tokenset_case.h"

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
    /* the last story goes on to the end of the file */
    test_spit(path, text, sizeof text - sizeof SRF_END_OF_TEXT);
    test_ok(srf_tokenset_open(path, bpe, srf_bpe_vocab_size(bpe), &ts));
    assert_int_equal(srf_tokenset_documents(ts), 2);
    srf_tokenset_close(ts);
    test_spit(path, text, sizeof text - 1);
    test_fails(srf_tokenset_open(path, NULL, 0, &ts), SRF_INVALID, "no tokenizer");
    test_fails(srf_tokenset_open(path, bpe, srf_bpe_vocab_size(bpe) - 1, &ts), SRF_MISMATCH,
               "the tokenizer gives id");
    test_spit(path, "a\0b", 3);
    test_fails(srf_tokenset_open(path, bpe, 0, &ts), SRF_FORMAT, "found no text");
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(npy),
        cmocka_unit_test(bad_npy),
        cmocka_unit_test(llmc),
        cmocka_unit_test(plain_text),
    };
    return cmocka_run_group_tests(tests, test_make_root, test_remove_root);
}
