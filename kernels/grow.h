/* Arrays that grow as they fill. */
#pragma once
#include "kernels/status.h"

/* *array, the address of a pointer, has room for *cap elements of `size` bytes: at least n from
 * here on, twice as many as before where it grows. It starts as NULL and 0; srf__free. At a failure
 * both stay as they are. */
srf_status srf__grow(void *array, size_t *cap, size_t n, size_t size);

/* The same for a pointer and a size_t that are named. */
#define SRF_GROW(ptr, cap, n) srf__grow(&(ptr), &(cap), (size_t)(n), sizeof *(ptr))
