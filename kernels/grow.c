#include "kernels/grow.h"

#include <string.h>

enum { FIRST = 16 };

srf_status srf__grow(void *array, size_t *cap, size_t n, size_t size)
{
    if (n <= *cap) return SRF_OK;
    void *p;
    memcpy(&p, array, sizeof p); /* whatever type it points to */
    size_t want = *cap > SIZE_MAX / 2 ? n : *cap ? 2 * *cap : FIRST;
    if (want < n) want = n;
    p = srf__realloc(p, *cap, want, size);
    SRF_FAIL_IF(!p, SRF_NOMEM, "out of memory: %zu elements of %zu bytes", want, size);
    memcpy(array, &p, sizeof p);
    *cap = want;
    return SRF_OK;
}
