/* The input is the 7 header fields after the magic, then the data. */
#include "tests/fuzz.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    enum { HEADER = 1024, FIELDS = 28 };
    int32_t magic = 20240326;
    size_t n = size < FIELDS ? size : FIELDS;
    uint8_t *file = calloc(1, HEADER + size);
    char path[64];
    if (!file) abort();
    memcpy(file, &magic, 4);
    if (n) memcpy(file + 4, data, n);
    if (size > n) memcpy(file + HEADER, data + n, size - n);
    int fd = fuzz_file(file, HEADER + size - n, path);
    fuzz_source(path);
    close(fd);
    free(file);
    return 0;
}
