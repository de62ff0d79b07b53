/* Errors of the whole library, and the host allocator behind it.
 *
 * Every function that can fail returns srf_status and gives its results through out-pointers.
 * The first failure writes one line for a person (what was expected, what was found, what to do)
 * into a buffer of the calling thread; SRF_TRY adds file:line to that thread's trace while the
 * status travels up. Only cli/ prints either of them. Nothing in the library prints, exits or
 * aborts.
 */
/* Installed in two folders, which `#pragma once` takes for two headers. */
#ifndef SRF_STATUS_H
#define SRF_STATUS_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* X(name, what it means, in words for a person) */
#define SRF_STATUS_LIST(X)                                                                         \
    X(OK, "ok")                                                                                    \
    X(INVALID, "invalid argument")                                                                 \
    X(FORMAT, "malformed file")                                                                    \
    X(MISMATCH, "things that do not belong together")                                              \
    X(UNSUPPORTED, "unsupported feature")                                                          \
    X(IO, "input/output error")                                                                    \
    X(NOMEM, "out of memory")                                                                      \
    X(DEVICE, "device error")                                                                      \
    X(NONFINITE, "non-finite number")                                                              \
    X(INTERRUPTED, "interrupted")

#define SRF_STATUS_ENUM(name, text) SRF_##name,
typedef enum srf_status { SRF_STATUS_LIST(SRF_STATUS_ENUM) SRF_STATUS_COUNT } srf_status;
#undef SRF_STATUS_ENUM

/* "ok", "malformed file", ...; never NULL. */
const char *srf_status_text(srf_status st);

/* The line written by the newest failure on this thread ("" if none). Valid until the next one. */
const char *srf_error_message(void);
/* "file:line < file:line < ..." of the newest failure on this thread, innermost first. */
const char *srf_error_trace(void);
/* Forget both. */
void srf_error_clear(void);

/* Record a failure: replaces the message, starts a new trace, returns `st`. Use the macros. */
srf_status srf__fail(const char *file, int line, srf_status st, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
/* Put "context: " before the present message (to name the file or tensor it is about), unless it
 * starts with that already. */
void srf__error_prefix(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* Add a place to the trace. */
void srf__trace(const char *file, int line);

/* Return from the function with an error / if cond holds / if the call e failed. */
#define SRF_FAIL(code, ...) return srf__fail(__FILE__, __LINE__, (code), __VA_ARGS__)
#define SRF_FAIL_IF(cond, code, ...)                                                               \
    do {                                                                                           \
        if (cond) SRF_FAIL(code, __VA_ARGS__);                                                     \
    } while (0)
#define SRF_TRY(e)                                                                                 \
    do {                                                                                           \
        srf_status srf_st_ = (e);                                                                  \
        if (srf_st_ != SRF_OK) {                                                                   \
            srf__trace(__FILE__, __LINE__);                                                        \
            return srf_st_;                                                                        \
        }                                                                                          \
    } while (0)
/* The same for functions that own things: set the local `st`, go to the local label `cleanup`. */
#define SRF_FAIL_GO(code, ...)                                                                     \
    do {                                                                                           \
        st = srf__fail(__FILE__, __LINE__, (code), __VA_ARGS__);                                   \
        goto cleanup;                                                                              \
    } while (0)
#define SRF_FAIL_GO_IF(cond, code, ...)                                                            \
    do {                                                                                           \
        if (cond) SRF_FAIL_GO(code, __VA_ARGS__);                                                  \
    } while (0)
#define SRF_TRY_GO(e)                                                                              \
    do {                                                                                           \
        st = (e);                                                                                  \
        if (st != SRF_OK) {                                                                        \
            srf__trace(__FILE__, __LINE__);                                                        \
            goto cleanup;                                                                          \
        }                                                                                          \
    } while (0)

/* Seconds of a clock that never goes back. */
double srf__now(void);

/* --- host memory ------------------------------------------------------------------------------
 * All host memory of the library comes from here. 64-byte aligned. NULL on failure or overflow
 * (n * size is checked); a request of 0 bytes gives a valid pointer. */
void *srf__alloc(size_t n, size_t size);
void *srf__calloc(size_t n, size_t size);
/* Grows or shrinks to n * size bytes, keeps min(old, new) contents; old_n * size is the old size.
 * On failure returns NULL and leaves p as it was. */
void *srf__realloc(void *p, size_t old_n, size_t n, size_t size);
void srf__free(void *p); /* NULL is fine */
char *srf__strdup(const char *s);

/* Tests only: let the n-th allocation from now on fail (0 = the next one); < 0 switches it off. */
void srf__fail_alloc_after(int64_t n);

/* Same, as a status with a message: SRF_ALLOC(ptr, n) allocates n elements of *ptr. */
#define SRF_ALLOC(ptr, n)                                                                          \
    ((((ptr) = srf__alloc((size_t)(n), sizeof *(ptr))) != NULL)                                    \
         ? SRF_OK                                                                                  \
         : srf__fail(__FILE__, __LINE__, SRF_NOMEM, "out of memory: %zu elements of %zu bytes",    \
                     (size_t)(n), sizeof *(ptr)))
#define SRF_CALLOC(ptr, n)                                                                         \
    ((((ptr) = srf__calloc((size_t)(n), sizeof *(ptr))) != NULL)                                   \
         ? SRF_OK                                                                                  \
         : srf__fail(__FILE__, __LINE__, SRF_NOMEM, "out of memory: %zu elements of %zu bytes",    \
                     (size_t)(n), sizeof *(ptr)))

#ifdef __cplusplus
}
#endif

#endif /* SRF_STATUS_H */
