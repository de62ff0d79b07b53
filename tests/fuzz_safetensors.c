/* The input is the header's text and, after a zero byte, the data. */
#include "tests/fuzz.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const uint8_t *zero = size ? memchr(data, 0, size) : NULL;
    uint64_t header = zero ? (uint64_t)(zero - data) : size;
    size_t rest = zero ? size - header - 1 : 0;
    uint8_t *file = malloc(8 + size + 1);
    char path[64];
    if (!file) abort();
    for (int i = 0; i < 8; i++) file[i] = (uint8_t)(header >> (8 * i));
    if (header) memcpy(file + 8, data, header);
    if (rest) memcpy(file + 8 + header, zero + 1, rest);
    int fd = fuzz_file(file, 8 + header + rest, path);
    fuzz_source(path);
    close(fd);
    /* And as it is. */
    fd = fuzz_file(data, size, path);
    fuzz_source(path);
    close(fd);
    free(file);
    return 0;
}
