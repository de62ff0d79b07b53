#include "kernels/status.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <sys/mman.h>

/* The newest failure of each thread: the one piece of state outside a context, as errno is. */
static _Thread_local char message[1024];
static _Thread_local char trace[1024];

static const char *const status_texts[] = {
#define SRF_STATUS_ROW(name, text) text,
    SRF_STATUS_LIST(SRF_STATUS_ROW)
#undef SRF_STATUS_ROW
};

const char *srf_status_text(srf_status st)
{
    return (unsigned)st < SRF_STATUS_COUNT ? status_texts[st] : "unknown status";
}

const char *srf_error_message(void)
{
    return message;
}

const char *srf_error_trace(void)
{
    return trace;
}

void srf_error_clear(void)
{
    message[0] = trace[0] = '\0';
}

/* A message is one line: whatever a hostile file put into it, control characters become '?'. */
static void one_line(char *s)
{
    for (; *s; s++)
        if ((unsigned char)*s < 32 || *s == 127) *s = '?';
}

srf_status srf__fail(const char *file, int line, srf_status st, const char *fmt, ...)
{
    /* Through a second buffer, since an argument may be the present message itself. */
    char text[sizeof message];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    one_line(text);
    memcpy(message, text, sizeof message);
    trace[0] = '\0';
    srf__trace(file, line);
    return st;
}

void srf__error_prefix(const char *fmt, ...)
{
    char prefix[512], text[sizeof message];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(prefix, sizeof prefix, fmt, ap);
    va_end(ap);
    one_line(prefix);
    /* Once is enough where two layers name the same file. */
    size_t n = strlen(prefix);
    if (strncmp(message, prefix, n) == 0 && message[n] == ':') return;
    if (snprintf(text, sizeof text, "%s: %s", prefix, message) < 0) return;
    memcpy(message, text, sizeof message);
}

void srf__trace(const char *file, int line)
{
    size_t n = strlen(trace);
    snprintf(trace + n, sizeof trace - n, "%s%s:%d", n ? " < " : "", file, line);
}

double srf__now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

/* Allocations left until one fails on purpose; negative = never. */
static atomic_llong fail_after = -1;

void srf__fail_alloc_after(int64_t n)
{
    atomic_store(&fail_after, n);
}

static int must_fail(void)
{
    if (atomic_load(&fail_after) < 0) return 0;
    return atomic_fetch_sub(&fail_after, 1) == 0;
}

#define HUGE_PAGE ((size_t)2 << 20)

void *srf__alloc(size_t n, size_t size)
{
    size_t bytes;
    if (__builtin_mul_overflow(n, size, &bytes) || bytes > SIZE_MAX - 64) return NULL;
    if (must_fail()) return NULL;
    if (bytes < HUGE_PAGE) {
        bytes = (bytes + 63) / 64 * 64;
        return aligned_alloc(64, bytes ? bytes : 64);
    }
    /* Rows of large tensors lie a page apart: huge pages spare most of the address translation. */
    if (bytes > SIZE_MAX - HUGE_PAGE) return NULL;
    bytes = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    void *p = aligned_alloc(HUGE_PAGE, bytes);
    if (p) (void)madvise(p, bytes, MADV_HUGEPAGE);
    return p;
}

void *srf__calloc(size_t n, size_t size)
{
    void *p = srf__alloc(n, size);
    if (p) memset(p, 0, n * size);
    return p;
}

void *srf__realloc(void *p, size_t old_n, size_t n, size_t size)
{
    void *q = srf__alloc(n, size);
    if (!q) return NULL;
    if (p) memcpy(q, p, (old_n < n ? old_n : n) * size);
    srf__free(p);
    return q;
}

void srf__free(void *p)
{
    free(p);
}

char *srf__strdup(const char *s)
{
    size_t n = strlen(s) + 1;
    char *p = srf__alloc(n, 1);
    if (p) memcpy(p, s, n);
    return p;
}
