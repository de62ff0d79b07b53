/* What the libFuzzer targets of files share: the input as a file without a disk, and reading a
 * source to its end. */
#pragma once
#include "checkpoints/source.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A file of these bytes; path names it while fd is open. */
static inline int fuzz_file(const void *data, size_t size, char path[64])
{
    int fd = memfd_create("input", MFD_CLOEXEC);
    if (fd < 0 || write(fd, data, size) != (ssize_t)size) abort();
    snprintf(path, 64, "/proc/self/fd/%d", fd);
    return fd;
}

/* Opens path and reads every tensor; whatever it says, it must not crash, hang or leak. */
static inline void fuzz_source(const char *path)
{
    struct srf_source *s;
    if (srf_source_open(path, &s) != SRF_OK) return;
    for (int64_t i = 0; i < srf_source_count(s); i++) {
        const struct srf_tensor_info *t = srf_source_info(s, i);
        if (srf_source_find(s, t->name) != i) abort();
        float *x = srf__alloc((size_t)t->count, sizeof *x);
        if (x) (void)srf_source_read_f32(s, i, x);
        srf__free(x);
    }
    srf_source_close(s);
}
