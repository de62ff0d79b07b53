/* HDF5 is too far from random bytes: the input is a list of patches to a good file, and the
 * checksums of its metadata are made right again, so that the patches are looked at. */
#include "checkpoints/h5.h"
#include "tests/fuzz.h"

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

/* ---- checksums ------------------------------------------------------------------------------ */

static uint32_t rot(uint32_t x, int k)
{
    return x << k | x >> (32 - k);
}

/* Jenkins' lookup3 (hashlittle, start value 0) byte by byte, as HDF5's format uses it. */
static uint32_t lookup3(const uint8_t *k, size_t n)
{
    uint32_t a = 0xdeadbeef + (uint32_t)n, b = a, c = a;
    for (; n > 0;) {
        size_t m = n < 12 ? n : 12;
        uint32_t w[3] = {0};
        for (size_t i = 0; i < m; i++) w[i / 4] |= (uint32_t)k[i] << (8 * (i % 4));
        a += w[0], b += w[1], c += w[2];
        k += m;
        n -= m;
        if (n == 0) break;
        a -= c, a ^= rot(c, 4), c += b;
        b -= a, b ^= rot(a, 6), a += c;
        c -= b, c ^= rot(b, 8), b += a;
        a -= c, a ^= rot(c, 16), c += b;
        b -= a, b ^= rot(a, 19), a += c;
        c -= b, c ^= rot(b, 4), b += a;
    }
    c ^= b, c -= rot(b, 14);
    a ^= c, a -= rot(c, 11);
    b ^= a, b -= rot(a, 25);
    c ^= b, c -= rot(b, 16);
    a ^= c, a -= rot(c, 4);
    b ^= a, b -= rot(a, 14);
    c ^= b, c -= rot(b, 24);
    return c;
}

static void seal(uint8_t *p, size_t n)
{
    uint32_t sum = lookup3(p, n);
    memcpy(p + n, &sum, 4);
}

/* Object headers (version 2) are found in the good file b, so that patches cannot hide one. Returns
 * how many. */
static int fix_checksums(uint8_t *file, const struct base *b)
{
    int found = 0;
    seal(file, 44); /* the superblock */
    for (size_t i = 48; i + 8 < b->n; i++) {
        const uint8_t *p = b->bytes + i;
        if (memcmp(p, "OHDR", 4) != 0) continue;
        size_t at = 6 + (p[5] & 32 ? 16 : 0) + (p[5] & 16 ? 4 : 0), bytes = 0;
        for (int k = 0; k < 1 << (p[5] & 3); k++) bytes |= (size_t)p[at++] << (8 * k);
        if (i + at + bytes + 4 > b->n) continue;
        seal(file + i, at + bytes);
        found++;
    }
    return found;
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
        check(fix_checksums(copy, &b) >= 5 && memcmp(copy, b.bytes, b.n) == 0);
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
    if (data[0] & 1) fix_checksums(file, &b);
    int fd = fuzz_file(file, n, path);
    fuzz_source(path);
    close(fd);
    free(file);
    return 0;
}
