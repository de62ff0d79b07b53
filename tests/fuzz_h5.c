/* HDF5 is too far from random bytes: the input is a list of patches to a good file, ours (its
 * metadata have checksums) or one as h5py writes it (they have none). */
#include "checkpoints/h5.h"
#include "tests/fuzz.h"

#include <hdf5.h>
#include <string.h>

struct base {
    uint8_t *bytes;
    size_t n;
};

static void slurp(const char *path, struct base *b)
{
    FILE *f = fopen(path, "rb");
    if (!f || fseek(f, 0, SEEK_END) != 0) abort();
    b->n = (size_t)ftell(f);
    b->bytes = malloc(b->n);
    rewind(f);
    if (!b->bytes || fread(b->bytes, 1, b->n, f) != b->n) abort();
    fclose(f);
    unlink(path);
}

static void check(bool ok)
{
    if (!ok) abort();
}

static const int64_t shape[2] = {3, 4};
static const float values[12] = {1, 2, 3};

static void make_ours(struct base *b)
{
    char path[64];
    struct srf_h5 *f;
    snprintf(path, sizeof path, "/tmp/fuzz-h5.%ld", (long)getpid());
    check(srf_h5_create(path, &f) == SRF_OK);
    check(srf_h5_put_str(f, "/", "format", "srf") == SRF_OK);
    check(srf_h5_put_i64(f, "/", "version", 1) == SRF_OK);
    check(srf_h5_put_text(f, "/config", "{}") == SRF_OK);
    check(srf_h5_put(f, "/weights/a", SRF_F32, 2, shape, values) == SRF_OK);
    check(srf_h5_put(f, "/weights/b", SRF_F32, 1, shape, values) == SRF_OK);
    check(srf_h5_commit(f) == SRF_OK);
    slurp(path, b);
}

static void make_plain(struct base *b)
{
    char path[64];
    snprintf(path, sizeof path, "/tmp/fuzz-h5.%ld", (long)getpid());
    hid_t f = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    hid_t scalar = H5Screate(H5S_SCALAR), text = H5Tcopy(H5T_C_S1), any = H5Tcopy(H5T_C_S1);
    hid_t space = H5Screate_simple(2, (hsize_t[]){3, 4}, NULL);
    H5Tset_size(text, 3);
    H5Tset_size(any, H5T_VARIABLE);
    const char *format = "srf";
    int64_t version = 1;
    hid_t a = H5Acreate2(f, "format", any, scalar, 0, 0);
    check(H5Awrite(a, any, &format) >= 0);
    H5Aclose(a);
    a = H5Acreate2(f, "version", H5T_NATIVE_INT64, scalar, 0, 0);
    check(H5Awrite(a, H5T_NATIVE_INT64, &version) >= 0);
    H5Aclose(a);
    hid_t d = H5Dcreate2(f, "config", text, scalar, 0, 0, 0);
    check(H5Dwrite(d, text, H5S_ALL, H5S_ALL, 0, "{}") >= 0);
    H5Dclose(d);
    hid_t g = H5Gcreate2(f, "weights", 0, 0, 0);
    d = H5Dcreate2(g, "a", H5T_IEEE_F32LE, space, 0, 0, 0);
    check(H5Dwrite(d, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, 0, values) >= 0);
    H5Dclose(d);
    H5Gclose(g);
    H5Sclose(space);
    H5Sclose(scalar);
    H5Tclose(text);
    H5Tclose(any);
    check(H5Fclose(f) >= 0);
    slurp(path, b);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct base bases[2]; /* made once, kept to the end */
    char path[64];
    if (!bases[0].bytes) {
        make_ours(&bases[0]);
        make_plain(&bases[1]);
    }
    if (size < 2) return 0;
    const struct base *b = &bases[data[0] & 1];
    uint8_t *file = malloc(b->n);
    if (!file) abort();
    memcpy(file, b->bytes, b->n);
    size_t n = data[0] & 2 ? b->n * data[1] / 256 : b->n; /* cut, or whole */
    /* A patch is an offset (2 bytes), a count (3 bits) and up to 8 bytes. */
    for (size_t i = 2; i + 3 < size;) {
        size_t at = (data[i] | (size_t)data[i + 1] << 8) % b->n, k = 1 + (data[i + 2] & 7);
        i += 3;
        for (size_t j = 0; j < k && i < size; j++, i++) file[(at + j) % b->n] = data[i];
    }
    int fd = fuzz_file(file, n, path);
    fuzz_source(path);
    close(fd);
    free(file);
    return 0;
}
