/* Scratch files of a test program: a directory of its own below TMPDIR or /tmp, and what tests of
 * readers and writers say about files. */
#pragma once
#include "tests/support.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char test_root[64]; /* a directory of this run */

static inline const char *test_at(char *buf, const char *name)
{
    sprintf(buf, "%s/%s", test_root, name);
    return buf;
}

/* To where files that a crash leaves behind are no litter. */
static inline int test_enter_tmp(void)
{
    const char *tmp = getenv("TMPDIR");
    return chdir(tmp && tmp[0] ? tmp : "/tmp");
}

static inline int test_make_root(void **state)
{
    (void)state;
    if (test_enter_tmp() != 0) return -1;
    strcpy(test_root, "checkpoints.XXXXXX");
    return mkdtemp(test_root) ? 0 : -1;
}

static inline int test_remove_root(void **state)
{
    (void)state;
    char command[96];
    sprintf(command, "rm -rf %s", test_root);
    return system(command);
}

static inline int test_entries(const char *dir)
{
    DIR *d = opendir(dir);
    assert_non_null(d);
    int n = 0;
    for (const struct dirent *e; (e = readdir(d)) != NULL;)
        n += strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0;
    closedir(d);
    return n;
}

static inline unsigned char *test_slurp(const char *path, size_t *n)
{
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    fseek(f, 0, SEEK_END);
    *n = (size_t)ftell(f);
    rewind(f);
    unsigned char *p = malloc(*n + 1);
    assert_int_equal(fread(p, 1, *n, f), *n);
    p[*n] = 0;
    fclose(f);
    return p;
}

static inline void test_spit(const char *path, const void *data, size_t n)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

static inline void test_fails(srf_status got, srf_status want, const char *words)
{
    if (got == want && strstr(srf_error_message(), words)) return;
    print_error("expected status %d with '%s', found %d with '%s'\n", want, words, got,
                srf_error_message());
    fail();
}
