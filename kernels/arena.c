#include "kernels/arena.h"
#include "kernels/grow.h"

#include <stdio.h>
#include <string.h>

#define ALIGN 256
/* Wide enough to catch a tile's worth of overrun. */
#define GUARD_BYTES 256
#define GUARD_BYTE  0xa5

struct slot {
    const char *cls, *name;
    size_t offset, bytes;
};

struct srf_arena {
    struct srf_ctx *ctx;
    struct slot *slots;
    int n;
    size_t cap, total, workspace;
    unsigned char *base;
};

srf_status srf_arena_create(struct srf_ctx *ctx, struct srf_arena **out)
{
    SRF_TRY(SRF_CALLOC(*out, 1));
    (*out)->ctx = ctx;
    return SRF_OK;
}

void srf_arena_free(struct srf_arena *a)
{
    if (!a) return;
    if (a->base) a->ctx->be->free(a->ctx, a->base);
    srf__free(a->slots);
    srf__free(a);
}

srf_status srf_arena_add(struct srf_arena *a, const char *cls, const char *name, int64_t count,
                         enum srf_dtype type, int *slot)
{
    SRF_FAIL_IF(a->base, SRF_INVALID, "arena: '%s' added after the memory was committed", name);
    size_t bytes;
    SRF_FAIL_IF(count < 0 || __builtin_mul_overflow((size_t)count, srf_dtype_bytes(type), &bytes) ||
                    bytes > SIZE_MAX / 4 - a->total,
                SRF_NOMEM, "%s '%s': %lld elements are more than memory can hold", cls, name,
                (long long)count);
    SRF_TRY(SRF_GROW(a->slots, a->cap, a->n + 1));
    a->slots[a->n] = (struct slot){cls, name, a->total, bytes};
    *slot = a->n++;
    size_t guard = 0;
#ifdef SRF_GUARD_BANDS
    guard = GUARD_BYTES;
#endif
    a->total += (bytes + guard + ALIGN - 1) / ALIGN * ALIGN;
    return SRF_OK;
}

srf_status srf_arena_add_rows(struct srf_arena *a, const struct srf_arena_row *rows, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (rows[i].slot)
            SRF_TRY(srf_arena_add(a, rows[i].cls, rows[i].name, rows[i].count, rows[i].type,
                                  rows[i].slot));
    return SRF_OK;
}

void srf_arena_workspace(struct srf_arena *a, size_t bytes)
{
    if (bytes > a->workspace) a->workspace = bytes;
}

void srf_arena_plan_begin(struct srf_arena *a)
{
    a->ctx->plan = true;
    a->ctx->plan_workspace = 0;
    a->ctx->plan_cost = (struct srf_cost){0};
}

void srf_arena_plan_end(struct srf_arena *a)
{
    a->ctx->plan = false;
    srf_arena_workspace(a, a->ctx->plan_workspace);
}

/* free_bytes: 0 = not known */
static srf_status too_large(const struct srf_arena *a, size_t free_bytes)
{
    char text[400], there[64] = "";
    srf_arena_describe(a, text, sizeof text);
    if (free_bytes) snprintf(there, sizeof there, ", %.1f MB are free", (double)free_bytes * 1e-6);
    SRF_FAIL(SRF_NOMEM,
             "out of memory: %.1f MB are needed (%s)%s; a smaller --batch, --seq-len or -m lowers "
             "it, in training also --micro-batch and --recompute",
             (double)srf_arena_bytes(a, NULL) * 1e-6, text, there);
}

/* Both allocations, or neither. */
static srf_status allocate(struct srf_arena *a, void **out)
{
    struct srf_ctx *ctx = a->ctx;
    size_t free_bytes, total, have = ctx->workspace_bytes;
    size_t more = a->workspace > have ? a->workspace - have : 0;
    SRF_TRY(ctx->be->memory(ctx, &free_bytes, &total));
    if (total && a->total + ALIGN + more > free_bytes) return too_large(a, free_bytes);
    srf_status st = srf_ctx_reserve_workspace(ctx, a->workspace);
    /* One ALIGN more: the base itself is aligned only as the allocator pleases. */
    if (st == SRF_OK) st = ctx->be->alloc(ctx, a->total + ALIGN, out);
    return st == SRF_NOMEM ? too_large(a, 0) : st;
}

srf_status srf_arena_commit(struct srf_arena *a)
{
    SRF_FAIL_IF(a->base, SRF_INVALID, "arena: committed twice");
    struct srf_ctx *ctx = a->ctx;
    void *p = NULL;
    SRF_TRY(allocate(a, &p));
    a->base = p;
    SRF_TRY(ctx->be->zero(ctx, p, a->total + ALIGN));
#ifdef SRF_GUARD_BANDS
    unsigned char band[GUARD_BYTES];
    memset(band, GUARD_BYTE, sizeof band);
    for (int i = 0; i < a->n; i++)
        SRF_TRY(ctx->be->upload(ctx, (unsigned char *)srf_arena_ptr(a, i) + a->slots[i].bytes, band,
                                GUARD_BYTES));
#endif
    return SRF_OK;
}

void *srf_arena_ptr(const struct srf_arena *a, int slot)
{
    if (!a->base) return (void *)(uintptr_t)(ALIGN + a->slots[slot].offset);
    size_t skew = (ALIGN - (uintptr_t)a->base % ALIGN) % ALIGN;
    return a->base + skew + a->slots[slot].offset;
}

size_t srf_arena_bytes(const struct srf_arena *a, const char *cls)
{
    if (!cls) return a->total + a->workspace;
    size_t sum = 0;
    for (int i = 0; i < a->n; i++)
        if (strcmp(a->slots[i].cls, cls) == 0) sum += a->slots[i].bytes;
    return sum;
}

void srf_arena_describe(const struct srf_arena *a, char *buf, size_t size)
{
    size_t used = 0;
    buf[0] = '\0';
    for (int i = 0; i < a->n; i++) {
        const char *cls = a->slots[i].cls;
        int first = 1;
        for (int j = 0; j < i; j++)
            if (strcmp(a->slots[j].cls, cls) == 0) first = 0;
        if (!first || used >= size) continue;
        int n = snprintf(buf + used, size - used, "%s%s %.1f MB", used ? ", " : "", cls,
                         (double)srf_arena_bytes(a, cls) * 1e-6);
        used += n > 0 ? (size_t)n : 0;
    }
    if (a->workspace && used < size)
        snprintf(buf + used, size - used, "%sworkspace %.1f MB", used ? ", " : "",
                 (double)a->workspace * 1e-6);
}

srf_status srf_arena_check(const struct srf_arena *a)
{
#ifdef SRF_GUARD_BANDS
    unsigned char band[GUARD_BYTES];
    for (int i = 0; a->base && i < a->n; i++) {
        const unsigned char *end = (unsigned char *)srf_arena_ptr(a, i) + a->slots[i].bytes;
        SRF_TRY(a->ctx->be->download(a->ctx, band, end, GUARD_BYTES));
        for (int j = 0; j < GUARD_BYTES; j++)
            SRF_FAIL_IF(band[j] != GUARD_BYTE, SRF_DEVICE,
                        "%s '%s': something wrote %d bytes past its end", a->slots[i].cls,
                        a->slots[i].name, j + 1);
    }
#else
    (void)a;
#endif
    return SRF_OK;
}
