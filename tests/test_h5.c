/* The HDF5 layer: round trips, what it refuses in files from strangers, full disks. */
#include "checkpoints/source.h"
#include "checkpoints/writers.h"
#include "data/checksum.h"
#include "data/file.h"
#include "data/h5.h"
#include "tests/h5_seal.h"
#include "tests/scratch.h"

#include <fcntl.h>
#include <hdf5.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/resource.h>

static const int64_t shape[4] = {2, 3, 1, 2};
static const float floats[12] = {1, -2, 3, 4, 5, 6, 7, 8, 9, 10, 0.1f, 1e-40f};

static void write_sample(struct srf_h5 *f)
{
    static const double doubles[2] = {0.1, -1e300};
    static const int32_t ints[3] = {1, -2, INT32_MAX};
    test_ok(srf_h5_put_str(f, "/", "format", "srf"));
    test_ok(srf_h5_put_i64(f, "/", "big", INT64_MIN));
    test_ok(srf_h5_put_text(f, "/config", "{\"a\": 1}"));
    test_ok(srf_h5_put_text(f, "/none", ""));
    test_ok(srf_h5_put(f, "/z/deep/floats", SRF_F32, 4, shape, floats));
    test_ok(srf_h5_put(f, "/z/doubles", SRF_F64, 1, (int64_t[]){2}, doubles));
    test_ok(srf_h5_put(f, "/a.b.c", SRF_I32, 1, (int64_t[]){3}, ints));
    test_ok(srf_h5_put(f, "/z/empty", SRF_F32, 2, (int64_t[]){0, 5}, floats));
    test_ok(srf_h5_put(f, "/z/scalar", SRF_F32, 0, NULL, floats + 1));
    test_ok(srf_h5_put_str(f, "/new/group", "text", ""));
}

static srf_status collect(void *user, const char *path)
{
    strcat(strcat(user, path), " ");
    return SRF_OK;
}

static srf_status refuse(void *user, const char *path)
{
    (void)path;
    ++*(int *)user;
    SRF_FAIL(SRF_MISMATCH, "enough");
}

/* In place of the C library's: what is told to the disk, and in which order. f, d: a file or a
 * directory is synced, r: a file is renamed. */
static char order[16];

static void note(char what)
{
    size_t n = strlen(order);
    if (n + 1 < sizeof order) order[n] = what, order[n + 1] = '\0';
}

int fsync(int fd)
{
    struct stat info;
    assert_int_equal(fstat(fd, &info), 0);
    note(S_ISDIR(info.st_mode) ? 'd' : 'f');
    return 0;
}

int rename(const char *from, const char *to)
{
    note('r');
    return renameat(AT_FDCWD, from, AT_FDCWD, to);
}

/* A file's contents are on the disk before it takes the place of another, its name after that. */
static void durable(void **state)
{
    (void)state;
    struct srf_tensor_out t = {"a", 1, {2}, floats};
    char path[128];
    for (int kind = 0; kind < 4; kind++) {
        struct srf_h5 *f;
        order[0] = '\0';
        test_at(path, "durable");
        if (kind == 0) {
            test_ok(srf_h5_create(path, &f));
            test_ok(srf_h5_commit(f));
        } else if (kind == 1) {
            test_ok(srf_safetensors_write(path, &t, 1, SRF_F32));
        } else if (kind == 2) {
            test_ok(srf_write_file_atomic(path, "text", 4));
            assert_int_equal(unlink(path), 0);
        } else {
            test_ok(srf_hf_write(path, "{}", NULL, &t, 1, SRF_F32));
        }
        /* of a folder: its two files, then its own name */
        assert_string_equal(order, kind < 3 ? "frd" : "frdfrdrd");
    }
    char command[160];
    sprintf(command, "rm -r '%s'", path);
    assert_int_equal(system(command), 0);
}

static void round_trip(void **state)
{
    (void)state;
    char path[128], all[512] = "";
    struct srf_h5 *f;
    test_ok(srf_h5_create(test_at(path, "a.h5"), &f));
    write_sample(f);
    assert_int_equal(access(path, F_OK), -1); /* not before the commit */
    test_ok(srf_h5_commit(f));
    assert_int_equal(test_entries(test_root), 1);

    test_ok(srf_h5_open(path, &f));
    char *text;
    int64_t i, dims[4];
    double two[2];
    float back[12];
    int32_t ints[3];
    int ndim, calls = 0;
    test_ok(srf_h5_get_str(f, "/", "format", &text));
    assert_string_equal(text, "srf");
    srf__free(text);
    test_ok(srf_h5_get_str(f, "/new/group", "text", &text));
    assert_string_equal(text, "");
    srf__free(text);
    test_ok(srf_h5_get_text(f, "/config", &text));
    assert_string_equal(text, "{\"a\": 1}");
    srf__free(text);
    test_ok(srf_h5_get_text(f, "/none", &text));
    assert_string_equal(text, "");
    srf__free(text);
    test_ok(srf_h5_get_i64(f, "/", "big", &i));
    assert_true(i == INT64_MIN);
    test_ok(srf_h5_get(f, "/z/deep/floats", SRF_F32, 4, shape, back));
    assert_memory_equal(back, floats, sizeof floats);
    test_ok(srf_h5_get(f, "/z/doubles", SRF_F64, 1, (int64_t[]){2}, two));
    assert_true(two[0] == 0.1 && two[1] == -1e300);
    test_ok(srf_h5_get(f, "/a.b.c", SRF_I32, 1, (int64_t[]){3}, ints));
    assert_true(ints[1] == -2 && ints[2] == INT32_MAX);
    test_ok(srf_h5_get(f, "/z/scalar", SRF_F64, 0, NULL, two)); /* another width */
    assert_true(two[0] == -2);
    test_ok(srf_h5_get(f, "/z/empty", SRF_F32, 2, (int64_t[]){0, 5}, back));
    test_ok(srf_h5_shape(f, "/z/deep/floats", &ndim, dims));
    assert_int_equal(ndim, 4);
    assert_memory_equal(dims, shape, sizeof shape);
    test_ok(srf_h5_each(f, "/z", collect, all)); /* in the order written */
    assert_string_equal(all, "/z/deep/floats /z/doubles /z/empty /z/scalar ");
    test_fails(srf_h5_each(f, "/z", refuse, &calls), SRF_MISMATCH, "enough");
    assert_int_equal(calls, 1);
    assert_true(srf_h5_has(f, "/z/deep") && srf_h5_has(f, "/") && !srf_h5_has(f, "/z/shallow"));
    assert_true(srf_h5_has_attr(f, "/", "format") && !srf_h5_has_attr(f, "/", "x"));
    assert_false(srf_h5_has_attr(f, "/none/such", "x"));

    /* The wrong question. */
    test_fails(srf_h5_get(f, "/z/doubles", SRF_F64, 1, (int64_t[]){3}, two), SRF_FORMAT,
               "expected shape (3), found (2)");
    test_fails(srf_h5_get(f, "/z/doubles", SRF_F64, 2, (int64_t[]){2, 1}, two), SRF_FORMAT,
               "expected shape (2, 1), found (2)");
    test_fails(srf_h5_get(f, "/z/doubles", SRF_F64, 1, (int64_t[]){1}, two), SRF_FORMAT,
               "expected shape (1), found (2)");
    test_fails(srf_h5_get(f, "/z/deep/floats", SRF_F32, 3, shape, back), SRF_FORMAT,
               "expected shape (2, 3, 1), found (2, 3, 1, 2)");
    test_fails(srf_h5_get(f, "/z/doubles", SRF_I32, 1, (int64_t[]){2}, ints), SRF_FORMAT,
               "expected integers");
    test_fails(srf_h5_get(f, "/a.b.c", SRF_F32, 1, (int64_t[]){3}, back), SRF_FORMAT,
               "expected floats");
    test_fails(srf_h5_get(f, "/config", SRF_F32, 0, NULL, back), SRF_FORMAT, "expected floats");
    test_fails(srf_h5_get(f, "/z", SRF_F32, 0, NULL, back), SRF_FORMAT, "/z");
    test_fails(srf_h5_get(f, "/z/a", SRF_F32, 0, NULL, back), SRF_FORMAT, "/z/a is missing");
    test_fails(srf_h5_get(f, "/z/doubles", SRF_BF16, 0, NULL, back), SRF_INVALID, "f32");
    test_fails(srf_h5_get_text(f, "/z/doubles", &text), SRF_FORMAT, "expected a text");
    assert_null(text);
    test_fails(srf_h5_get_i64(f, "/", "format", &i), SRF_FORMAT, "expected a whole number");
    test_fails(srf_h5_get_i64(f, "/", "nothing", &i), SRF_FORMAT, "nothing of / is missing");
    test_fails(srf_h5_get_str(f, "/", "big", &text), SRF_FORMAT, "expected a string");
    test_fails(srf_h5_get_i64(f, "/no", "nothing", &i), SRF_FORMAT, "/no is missing");
    srf_h5_close(f);
    srf_h5_close(NULL);

    /* A file that is given up leaves the old one whole. */
    size_t n, m;
    unsigned char *before = test_slurp(path, &n);
    test_ok(srf_h5_create(path, &f));
    test_ok(srf_h5_put_text(f, "/config", "other"));
    test_fails(srf_h5_put_text(f, "/config", "twice"), SRF_IO, "/config");
    test_fails(srf_h5_put(f, "relative", SRF_F32, 0, NULL, floats), SRF_INVALID, "bad path");
    srf_h5_close(f);
    unsigned char *after = test_slurp(path, &m);
    assert_int_equal(n, m);
    assert_memory_equal(before, after, n);
    assert_int_equal(test_entries(test_root), 1);
    free(before);
    free(after);
    unlink(path);
    test_fails(srf_h5_create("no/such/dir/a.h5", &f), SRF_IO, "No such file");
    test_fails(srf_h5_create("", &f), SRF_INVALID, "empty");
}

static herr_t my_handler(hid_t stack, void *data)
{
    (void)stack;
    ++*(int *)data;
    return 0;
}

/* HDF5's error handler is what it was, and was not called. */
static void error_printing(void **state)
{
    (void)state;
    int calls = 0;
    H5E_auto2_t handler;
    void *data;
    char path[128];
    struct srf_h5 *f;
    H5Eset_auto2(H5E_DEFAULT, my_handler, &calls);
    test_spit(test_at(path, "bad.h5"), "\x89HDF\r\n\x1a\n\2nonsense", 17);
    test_fails(srf_h5_open(path, &f), SRF_FORMAT, "broken HDF5 file");
    test_ok(srf_h5_create(path, &f));
    test_ok(srf_h5_put_i64(f, "/a", "x", 1));
    test_fails(srf_h5_put_i64(f, "/a", "x", 1), SRF_IO, "attribute x of /a");
    srf_h5_close(f);
    H5Eget_auto2(H5E_DEFAULT, &handler, &data);
    assert_true(handler == my_handler && data == &calls);
    assert_int_equal(calls, 0);
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    unlink(path);
}

/* ---- files from strangers ------------------------------------------------------------------- */

static hid_t dataset(hid_t file, const char *name, hid_t type, int n_dims, hsize_t n, hid_t dcpl)
{
    hsize_t dims[8];
    for (int i = 0; i < 8; i++) dims[i] = n;
    hid_t space = H5Screate_simple(n_dims, dims, NULL);
    hid_t set = H5Dcreate2(file, name, type, space, H5P_DEFAULT, dcpl, H5P_DEFAULT);
    assert_true(set >= 0);
    H5Sclose(space);
    H5Dclose(set);
    return set;
}

static void strangers(void **state)
{
    (void)state;
    char path[128], other[128], secret[160];
    test_at(path, "stranger.h5");
    test_spit(test_at(other, "secret"), "0123456789abcdef", 16);
    hid_t fapl = H5Pcreate(H5P_FILE_ACCESS);
    H5Pset_libver_bounds(fapl, H5F_LIBVER_V18, H5F_LIBVER_LATEST);
    hid_t file = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, fapl);
    H5Pclose(fapl);
    hid_t chunked = H5Pcreate(H5P_DATASET_CREATE), external = H5Pcreate(H5P_DATASET_CREATE);
    hid_t compact = H5Pcreate(H5P_DATASET_CREATE), early = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_chunk(chunked, 1, (hsize_t[]){1 << 20});
    H5Pset_deflate(chunked, 9);
    H5Pset_layout(compact, H5D_COMPACT);
    H5Pset_alloc_time(early, H5D_ALLOC_TIME_EARLY);
    sprintf(secret, "%s", strchr(other, '/') + 1);
    H5Pset_external(external, secret, 0, 16);
    hid_t vlen = H5Tcopy(H5T_C_S1);
    H5Tset_size(vlen, H5T_VARIABLE);
    hid_t huge = H5Tcopy(H5T_C_S1);
    H5Tset_size(huge, 1u << 31);
    dataset(file, "chunked", H5T_NATIVE_FLOAT, 1, 1 << 20, chunked);
    dataset(file, "external", H5T_NATIVE_FLOAT, 1, 4, external);
    dataset(file, "compact", H5T_NATIVE_FLOAT, 1, 4, compact);
    dataset(file, "early", H5T_NATIVE_FLOAT, 1, 4, early);
    dataset(file, "absent", H5T_NATIVE_FLOAT, 1, (hsize_t)1 << 40, H5P_DEFAULT);
    dataset(file, "wide", H5T_NATIVE_FLOAT, 5, 2, compact);
    dataset(file, "vlen", vlen, 1, 1, H5P_DEFAULT);
    hid_t scalar = H5Screate(H5S_SCALAR), null = H5Screate(H5S_NULL);
    H5Dclose(H5Dcreate2(file, "hugetext", huge, scalar, 0, 0, 0));
    H5Dclose(H5Dcreate2(file, "vlentext", vlen, scalar, 0, 0, 0));
    H5Dclose(H5Dcreate2(file, "null", H5T_NATIVE_FLOAT, null, 0, 0, 0));
    hid_t attr = H5Acreate2(file, "vlen", vlen, scalar, 0, 0);
    const char *text = "from h5py";
    H5Awrite(attr, vlen, &text);
    H5Aclose(attr);
    attr = H5Acreate2(file, "two", H5T_NATIVE_INT, H5Screate_simple(1, (hsize_t[]){2}, NULL), 0, 0);
    H5Aclose(attr);
    H5Lcreate_soft("/compact", file, "soft", 0, 0);
    H5Lcreate_external(other, "/", file, "outside", 0, 0);
    hid_t group = H5Gcreate2(file, "links", 0, 0, 0);
    H5Lcreate_external(other, "/", group, "outside", 0, 0);
    H5Gclose(group);
    /* A group inside itself twice: without a limit, a walk of 2^depth. */
    group = H5Gcreate2(file, "loop", 0, 0, 0);
    H5Lcreate_hard(file, "loop", group, "a", 0, 0);
    H5Lcreate_hard(file, "loop", group, "b", 0, 0);
    H5Gclose(group);
    H5Tclose(vlen);
    H5Tclose(huge);
    H5Fclose(file);

    struct srf_h5 *f;
    float x[8];
    char *got, names[64] = "";
    int ndim;
    int64_t i, dims[4];
    test_ok(srf_h5_open(path, &f));
    test_ok(srf_h5_get(f, "/compact", SRF_F32, 1, (int64_t[]){4}, x));
    test_ok(srf_h5_get(f, "/early", SRF_F32, 1, (int64_t[]){4}, x));
    test_ok(srf_h5_get_str(f, "/", "vlen", &got));
    assert_string_equal(got, "from h5py");
    srf__free(got);
    test_fails(srf_h5_get_i64(f, "/", "two", &i), SRF_FORMAT, "one value");
    test_fails(srf_h5_shape(f, "/chunked", &ndim, dims), SRF_FORMAT, "contiguous");
    test_fails(srf_h5_get(f, "/chunked", SRF_F32, 1, (int64_t[]){1 << 20}, x), SRF_FORMAT,
               "contiguous");
    test_fails(srf_h5_get(f, "/external", SRF_F32, 1, (int64_t[]){4}, x), SRF_FORMAT, "outside");
    test_fails(srf_h5_shape(f, "/absent", &ndim, dims), SRF_FORMAT, "not all in the file");
    test_fails(srf_h5_shape(f, "/wide", &ndim, dims), SRF_FORMAT, "at most 4 dimensions");
    test_fails(srf_h5_shape(f, "/null", &ndim, dims), SRF_FORMAT, "/null");
    test_fails(srf_h5_get_text(f, "/vlen", &got), SRF_FORMAT, "/vlen");
    test_fails(srf_h5_get_text(f, "/vlentext", &got), SRF_FORMAT,
               "/vlentext: a text of variable length");
    test_fails(srf_h5_get_text(f, "/hugetext", &got), SRF_FORMAT, "/hugetext");
    test_fails(srf_h5_get(f, "/soft", SRF_F32, 1, (int64_t[]){4}, x), SRF_FORMAT, "is missing");
    assert_false(srf_h5_has(f, "/outside"));
    test_fails(srf_h5_each(f, "/links", collect, names), SRF_FORMAT, "external links");
    test_fails(srf_h5_each(f, "/loop", collect, names), SRF_FORMAT, "too deep");
    srf_h5_close(f);
    unlink(other);

    /* Old metadata, without checksums. */
    file = H5Fcreate(test_at(other, "old.h5"), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    H5Fclose(file);
    test_fails(srf_h5_open(other, &f), SRF_FORMAT, "found superblock 0");
    unlink(other);

    /* Open elsewhere for writing, where HDF5 holds this lock: not broken. */
    int lock = open(path, O_RDONLY);
    assert_int_equal(flock(lock, LOCK_EX), 0);
    test_fails(srf_h5_open(path, &f), SRF_IO, "another program has it open for writing");
    close(lock);
    test_ok(srf_h5_open(path, &f));
    srf_h5_close(f);

    /* Cut anywhere, the file is refused; HDF5 sees that by its superblock. */
    size_t n;
    unsigned char *raw = test_slurp(path, &n);
    for (size_t cut = 0; cut < n; cut += 1 + n / 50) {
        test_spit(path, raw, cut);
        test_fails(srf_h5_open(path, &f), SRF_FORMAT, "HDF5");
    }
    free(raw);
    unlink(path);
    H5Pclose(chunked);
    H5Pclose(external);
    H5Pclose(compact);
    H5Pclose(early);
    H5Sclose(scalar);
    H5Sclose(null);
    test_fails(srf_h5_open(test_root, &f), SRF_IO, "directory");
    test_fails(srf_h5_open("no/such", &f), SRF_IO, "No such file");
}

/* Each byte counts, however many there are. */
static void every_byte(void **state)
{
    (void)state;
    unsigned char bytes[100];
    for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (unsigned char)(37 * i);
    for (size_t n = 0; n <= sizeof bytes; n++) {
        uint64_t sum = srf__checksum(bytes, n);
        assert_true(n == 0 || sum != srf__checksum(bytes, n - 1));
        for (size_t i = 0; i < n; i++) {
            bytes[i] ^= 16;
            assert_true(srf__checksum(bytes, n) != sum);
            bytes[i] ^= 16;
        }
    }
}

/* Any bit of data that is not as it was written is found. */
static void checksums(void **state)
{
    (void)state;
    static const char text[] = "the text of a tokenizer, say";
    char path[128], *got;
    struct srf_h5 *f;
    for (int64_t n = 1; n <= 12; n++) {
        float x[12];
        test_ok(srf_h5_create(test_at(path, "sum.h5"), &f));
        test_ok(srf_h5_put(f, "/x", SRF_F32, 1, &n, floats));
        test_ok(srf_h5_put_text(f, "/text", text));
        test_ok(srf_h5_commit(f));
        size_t size, data = 0, at = 0, bytes = (size_t)n * sizeof *floats;
        unsigned char *file = test_slurp(path, &size);
        while (memcmp(file + data, floats, bytes) != 0) assert_true(++data + bytes <= size);
        while (memcmp(file + at, text, strlen(text)) != 0) assert_true(++at < size);
        for (size_t bit = 0; bit < 8 * bytes; bit++) {
            file[data + bit / 8] ^= (unsigned char)(1 << bit % 8);
            test_spit(path, file, size);
            test_ok(srf_h5_open(path, &f));
            test_fails(srf_h5_get(f, "/x", SRF_F32, 1, &n, x), SRF_FORMAT,
                       "/x is not what was written, by its checksum");
            test_ok(srf_h5_get_text(f, "/text", &got));
            srf__free(got);
            srf_h5_close(f);
            file[data + bit / 8] ^= (unsigned char)(1 << bit % 8);
        }
        file[at] = 'T';
        test_spit(path, file, size);
        test_ok(srf_h5_open(path, &f));
        test_ok(srf_h5_get(f, "/x", SRF_F32, 1, &n, x));
        assert_memory_equal(x, floats, bytes);
        test_fails(srf_h5_get_text(f, "/text", &got), SRF_FORMAT, "by its checksum");
        assert_null(got);
        srf_h5_close(f);
        free(file);
        unlink(path);
    }
}

/* A dataset whose header, checksum and all, puts it elsewhere. */
static void addresses(void **state)
{
    (void)state;
    char path[128];
    struct srf_h5 *f;
    const int64_t n = 12;
    test_ok(srf_h5_create(test_at(path, "a.h5"), &f));
    test_ok(srf_h5_put(f, "/x", SRF_F32, 1, &n, floats));
    test_ok(srf_h5_commit(f));
    size_t size, at = 0;
    unsigned char *good = test_slurp(path, &size), *bad = malloc(size);
    uint64_t data = 0, where = 0;
    while (memcmp(good + data, floats, sizeof floats) != 0) assert_true(++data < size);
    for (; where != data; at++) memcpy(&where, good + at, 8); /* the address, in x's header */
    at--;
    const uint64_t places[] = {data,     size - 48,  size - 47, size,
                               size + 1, 1ull << 62, -2ull,     -1ull};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        float x[12];
        memcpy(bad, good, size);
        memcpy(bad + at, &places[i], 8);
        assert_true(h5_seal(bad, good, size) >= 2);
        test_spit(path, bad, size);
        test_ok(srf_h5_open(path, &f));
        if (i < 2)
            test_ok(srf_h5_get(f, "/x", SRF_F32, 1, &n, x));
        else
            test_fails(srf_h5_get(f, "/x", SRF_F32, 1, &n, x), SRF_FORMAT, "/x");
        srf_h5_close(f);
    }
    free(good);
    free(bad);
    unlink(path);
}

/* ---- full disks ----------------------------------------------------------------------------- */

static srf_status write_h5(const char *path, int n, float *data)
{
    struct srf_h5 *f;
    int64_t count = n;
    srf_status st = srf_h5_create(path, &f);
    if (st == SRF_OK) st = srf_h5_put_text(f, "/config", "{}");
    if (st == SRF_OK) st = srf_h5_put_str(f, "/attention", "settings", "{}");
    if (st == SRF_OK) st = srf_h5_put(f, "/weights/a", SRF_F32, 1, &count, data);
    if (st == SRF_OK) st = srf_h5_put(f, "/weights/b", SRF_F32, 1, &count, data);
    if (st == SRF_OK) return srf_h5_commit(f);
    char *why = strdup(srf_error_message());
    srf_h5_close(f);
    assert_string_equal(why, srf_error_message()); /* giving up keeps the reason */
    free(why);
    return st;
}

/* A file size limit stands for the full disk: every write may be the one that fails. */
static void full_disk(void **state)
{
    (void)state;
    enum { N = 3000 };
    float data[N] = {1, 2, 3};
    struct srf_tensor_out t = {"a", 1, {N}, data};
    struct rlimit old, limit;
    char path[128];
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    test_spit(test_at(path, "full"), "old", 3);
    for (int kind = 0; kind < 3; kind++) {
        int failures = 0;
        srf_status st = SRF_IO;
        for (rlim_t size = 0; st != SRF_OK; size += size < 2000 ? 41 : 1013) {
            assert_true(size < 100000);
            limit = (struct rlimit){size, old.rlim_max};
            assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
            if (kind == 0)
                st = write_h5(path, N, data);
            else if (kind == 1)
                st = srf_safetensors_write(path, &t, 1, SRF_F32);
            else
                st = srf_write_file_atomic(path, data, sizeof data);
            assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
            assert_int_equal(test_entries(test_root), 1);
            if (st == SRF_OK) break;
            failures++;
            test_fails(st, SRF_IO, "File too large");
            size_t n;
            unsigned char *raw = test_slurp(path, &n);
            assert_true(n == 3 && memcmp(raw, "old", 3) == 0);
            free(raw);
        }
        assert_true(failures > 10);
        test_spit(path, "old", 3);
    }
    unlink(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(durable),   cmocka_unit_test(round_trip), cmocka_unit_test(error_printing),
        cmocka_unit_test(strangers), cmocka_unit_test(every_byte), cmocka_unit_test(checksums),
        cmocka_unit_test(addresses), cmocka_unit_test(full_disk),
    };
    return cmocka_run_group_tests(tests, test_make_root, test_remove_root);
}
