/* HDF5 is too far from random bytes: the input is a list of patches to a good file, and the
 * checksums of its metadata are made right again, so that the patches are looked at. */
#include "data/h5.h"
#include "tests/fuzz.h"
#include "tests/h5_seal.h"

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

/* HDF5's own leaks on broken files are not ours to find. */
const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void)
{
    return "leak:libhdf5";
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct base b; /* made once, kept to the end */
    char path[64];
    if (!b.bytes) {
        make_ours(&b);
        uint8_t *copy = malloc(b.n);
        check(copy != NULL);
        memcpy(copy, b.bytes, b.n);
        check(h5_seal(copy, b.bytes, b.n) >= 5 && memcmp(copy, b.bytes, b.n) == 0);
        free(copy);
    }
    if (size < 2) return 0;
    uint8_t *file = malloc(b.n);
    if (!file) abort();
    memcpy(file, b.bytes, b.n);
    size_t n = data[0] & 2 ? b.n * data[1] / 256 : b.n; /* cut, or whole */
    /* A patch is an offset (2 bytes), a count (3 bits) and up to 8 bytes. */
    for (size_t i = 2; i + 3 < size;) {
        size_t at = (data[i] | (size_t)data[i + 1] << 8) % b.n, k = 1 + (data[i + 2] & 7);
        i += 3;
        for (size_t j = 0; j < k && i < size; j++, i++) file[(at + j) % b.n] = data[i];
    }
    if (data[0] & 1) h5_seal(file, b.bytes, b.n);
    int fd = fuzz_file(file, n, path);
    fuzz_source(path);
    close(fd);
    free(file);
    return 0;
}
