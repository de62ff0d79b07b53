/* The first byte of the input says what the rest is:
 *   'n'  a .npy after its magic
 *   's'  an llm.c shard of u16, 'w' of u32: version and number of tokens, then the ids
 *   else a whole file. */
#include "data/tokenset.h"
#include "tests/fuzz.h"

#include <string.h>

static void check_set(const char *path)
{
    struct srf_tokenset *ts;
    if (srf_tokenset_open(path, NULL, 50257, &ts) != SRF_OK) return;
    int64_t n = srf_tokenset_count(ts), some = n < 100000 ? n : 100000;
    int32_t *ids = srf__alloc((size_t)some, sizeof *ids);
    if (!ids) abort();
    if (srf_tokenset_read(ts, n - some, some, ids) == SRF_OK)
        for (int64_t i = 0; i < some; i++)
            if (ids[i] < 0 || ids[i] >= 50257) abort();
    if (srf_tokenset_read(ts, n, 1, ids) == SRF_OK) abort();
    srf__free(ids);
    srf_tokenset_close(ts);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    enum { LLMC_HEADER = 1024, FIELDS = 8, ROOM = LLMC_HEADER + 16 };
    if (size == 0) return 0;
    uint8_t kind = *data++, *file = calloc(1, ROOM + --size);
    size_t n = 0;
    char path[64];
    if (!file) abort();
    if (kind == 'n') {
        memcpy(file, "\x93NUMPY", 6);
        n = 6;
    } else if (kind == 's' || kind == 'w') {
        int32_t magic = kind == 's' ? 20240520 : 20240801;
        size_t fields = size < FIELDS ? size : FIELDS;
        memcpy(file, &magic, 4);
        memcpy(file + 4, data, fields);
        data += fields;
        size -= fields;
        n = LLMC_HEADER;
    }
    if (size) memcpy(file + n, data, size);
    int fd = fuzz_file(file, n + size, path);
    check_set(path);
    close(fd);
    free(file);
    return 0;
}
