#include "data/file.h"
#include "kernels/numeric.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

srf_status srf__file_open(const char *path, struct srf__file *f)
{
    srf_status st = SRF_OK;
    *f = (struct srf__file){.fd = -1};
    /* O_NONBLOCK: a FIFO named by mistake is refused below, not waited for. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    SRF_FAIL_IF(fd < 0, SRF_IO, "%s: %s", path, strerror(errno));
    struct stat info;
    SRF_FAIL_GO_IF(fstat(fd, &info) != 0, SRF_IO, "%s: %s", path, strerror(errno));
    SRF_FAIL_GO_IF(S_ISDIR(info.st_mode), SRF_IO, "%s: expected a file, found a directory", path);
    SRF_FAIL_GO_IF(!S_ISREG(info.st_mode), SRF_IO, "%s: expected a regular file", path);
    f->path = srf__strdup(path);
    SRF_FAIL_GO_IF(!f->path, SRF_NOMEM, "out of memory");
    f->fd = fd;
    f->size = info.st_size;
    return SRF_OK;
cleanup:
    close(fd);
    return st;
}

void srf__file_close(struct srf__file *f)
{
    if (f->path) close(f->fd);
    srf__free(f->path);
    *f = (struct srf__file){.fd = -1};
}

srf_status srf__file_read(const struct srf__file *f, int64_t offset, void *buf, int64_t n)
{
    char *to = buf;
    while (n > 0) {
        ssize_t got = pread(f->fd, to, (size_t)(n < (1 << 30) ? n : 1 << 30), offset);
        if (got < 0 && errno == EINTR) continue;
        SRF_FAIL_IF(got < 0, SRF_IO, "%s: %s", f->path, strerror(errno));
        SRF_FAIL_IF(got == 0, SRF_IO, "%s: ends at byte %lld, %lld more expected", f->path,
                    (long long)offset, (long long)n);
        to += got, offset += got, n -= got;
    }
    return SRF_OK;
}

srf_status srf__file_text(const char *path, int64_t max, char **text, size_t *n)
{
    srf_status st = SRF_OK;
    struct srf__file f;
    char *buf = NULL;
    *text = NULL;
    SRF_TRY(srf__file_open(path, &f));
    SRF_FAIL_GO_IF(f.size > max, SRF_FORMAT, "%s: %lld bytes, at most %lld expected", path,
                   (long long)f.size, (long long)max);
    SRF_TRY_GO(SRF_ALLOC(buf, f.size + 1));
    SRF_TRY_GO(srf__file_read(&f, 0, buf, f.size));
    buf[f.size] = '\0';
    if (n) *n = (size_t)f.size;
    *text = buf;
    buf = NULL;
cleanup:
    srf__free(buf);
    srf__file_close(&f);
    return st;
}

srf_status srf__path_join(const char *dir, const char *name, char **out)
{
    size_t size = strlen(dir) + strlen(name) + 2, n = strlen(dir);
    SRF_TRY(SRF_ALLOC(*out, size));
    snprintf(*out, size, "%s%s%s", dir, n && dir[n - 1] == '/' ? "" : "/", name);
    return SRF_OK;
}

/* Length of a path without the slashes at its end. */
static size_t trimmed(const char *path)
{
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') n--;
    return n;
}

/* Length of the directory part of a path, 0 if it is the working directory. */
static size_t dir_length(const char *path)
{
    size_t n = trimmed(path);
    while (n > 0 && path[n - 1] != '/') n--;
    while (n > 1 && path[n - 1] == '/') n--;
    return n;
}

srf_status srf__path_dir(const char *path, char **out)
{
    size_t n = dir_length(path);
    if (n == 0) path = ".", n = 1;
    SRF_TRY(SRF_ALLOC(*out, n + 1));
    memcpy(*out, path, n);
    (*out)[n] = '\0';
    return SRF_OK;
}

srf_status srf__temp_name(const char *path, char **out)
{
    size_t n = trimmed(path), size = n + 32;
    SRF_TRY(SRF_ALLOC(*out, size));
    snprintf(*out, size, "%.*s.tmp.%ld", (int)n, path, (long)getpid());
    return SRF_OK;
}

srf_status srf__out_target(const char *path, char **out)
{
    struct stat info;
    char real[PATH_MAX];
    SRF_FAIL_IF(path[0] == '\0', SRF_INVALID, "the output path is empty");
    bool there = stat(path, &info) == 0;
    SRF_FAIL_IF(there && S_ISDIR(info.st_mode), SRF_IO, "%s: %s", path, strerror(EISDIR));
    SRF_FAIL_IF(there && !S_ISREG(info.st_mode), SRF_IO,
                "%s: expected a file or a new name, found a device, pipe or socket", path);
    if (lstat(path, &info) == 0 && S_ISLNK(info.st_mode)) {
        SRF_FAIL_IF(!there, SRF_IO, "%s: a link to what is not there", path);
        SRF_FAIL_IF(!realpath(path, real), SRF_IO, "%s: %s", path, strerror(errno));
        path = real;
    }
    *out = srf__strdup(path);
    SRF_FAIL_IF(!*out, SRF_NOMEM, "out of memory");
    return SRF_OK;
}

/* Allocates nothing: it runs after a rename, where only the disk may still fail. */
srf_status srf__sync_dir_of(const char *path)
{
    char dir[PATH_MAX] = ".";
    size_t n = dir_length(path);
    SRF_FAIL_IF(n >= sizeof dir, SRF_IO, "%s: path too long", path);
    if (n) memcpy(dir, path, n), dir[n] = '\0';
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    SRF_FAIL_IF(fd < 0, SRF_IO, "%s: %s", dir, strerror(errno));
    /* EINVAL: a file system that cannot sync directories. */
    int error = fsync(fd) != 0 && errno != EINVAL ? errno : 0;
    close(fd);
    SRF_FAIL_IF(error, SRF_IO, "%s: %s", dir, strerror(error));
    return SRF_OK;
}

srf_status srf__file_lock(int fd, const char *path)
{
    SRF_FAIL_IF(flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK, SRF_IO,
                "%s: another srf writes it", path);
    return SRF_OK;
}

srf_status srf__out_open(const char *path, struct srf__out *o)
{
    *o = (struct srf__out){.fd = -1};
    SRF_TRY(srf__out_target(path, &o->path));
    srf_status named = srf__temp_name(o->path, &o->temp);
    if (named != SRF_OK) srf__out_abort(o);
    SRF_TRY(named);
    unlink(o->temp); /* of a process that had our pid and was killed */
    o->fd = open(o->temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (o->fd < 0) {
        srf_status st = srf__fail(__FILE__, __LINE__, SRF_IO, "%s: %s", path, strerror(errno));
        srf__out_abort(o);
        return st;
    }
    return SRF_OK;
}

srf_status srf__out_write(struct srf__out *o, const void *data, size_t n)
{
    const char *from = data;
    while (n > 0) {
        ssize_t done = write(o->fd, from, n < (1u << 30) ? n : 1u << 30);
        if (done < 0 && errno == EINTR) continue;
        SRF_FAIL_IF(done < 0, SRF_IO, "%s: %s", o->path, strerror(errno));
        from += done, n -= (size_t)done;
    }
    return SRF_OK;
}

srf_status srf__out_floats(struct srf__out *o, const char *name, const float *data, int64_t n,
                           enum srf_dtype dtype)
{
    enum { PIECE = 4096 };
    char raw[PIECE * sizeof(float)];
    float back[PIECE];
    for (int64_t i = 0; i < n; i += PIECE) {
        int64_t k = n - i < PIECE ? n - i : PIECE;
        srf_convert_from_f32(raw, dtype, data + i, k);
        srf_convert_to_f32(back, raw, dtype, k);
        for (int64_t j = 0; j < k; j++)
            SRF_FAIL_IF(!isfinite(back[j]), SRF_NONFINITE,
                        "%s: tensor %s: element %lld is %g in %s", o->path, name,
                        (long long)(i + j), (double)back[j], srf_dtype_name(dtype));
        SRF_TRY(srf__out_write(o, raw, (size_t)k * srf_dtype_bytes(dtype)));
    }
    return SRF_OK;
}

srf_status srf__out_commit(struct srf__out *o)
{
    srf_status st = SRF_OK;
    SRF_FAIL_GO_IF(fsync(o->fd) != 0, SRF_IO, "%s: %s", o->path, strerror(errno));
    int failed = close(o->fd);
    o->fd = -1;
    SRF_FAIL_GO_IF(failed, SRF_IO, "%s: %s", o->path, strerror(errno));
    SRF_FAIL_GO_IF(rename(o->temp, o->path) != 0, SRF_IO, "%s: %s", o->path, strerror(errno));
    st = srf__sync_dir_of(o->path);
cleanup:
    srf__out_abort(o);
    return st;
}

void srf__out_abort(struct srf__out *o)
{
    if (o->temp) {
        if (o->fd >= 0) close(o->fd);
        unlink(o->temp); /* gone already after a rename */
    }
    srf__free(o->path);
    srf__free(o->temp);
    *o = (struct srf__out){.fd = -1};
}

srf_status srf_write_file_atomic(const char *path, const void *data, size_t n)
{
    struct srf__out o;
    SRF_TRY(srf__out_open(path, &o));
    srf_status st = srf__out_write(&o, data, n);
    if (st == SRF_OK) return srf__out_commit(&o);
    srf__out_abort(&o);
    return st;
}

srf_status srf_make_dir(const char *path)
{
    char part[PATH_MAX];
    size_t n = strlen(path);
    SRF_FAIL_IF(n == 0, SRF_INVALID, "the output path is empty");
    SRF_FAIL_IF(n >= sizeof part, SRF_IO, "%s: path too long", path);
    memcpy(part, path, n + 1);
    for (char *s = part + 1; *s; s++) {
        if (*s != '/') continue;
        *s = '\0';
        mkdir(part, 0777); /* the last mkdir says what is wrong */
        *s = '/';
    }
    struct stat info;
    SRF_FAIL_IF(mkdir(part, 0777) != 0 && errno != EEXIST, SRF_IO, "%s: %s", path, strerror(errno));
    SRF_FAIL_IF(stat(part, &info) != 0 || !S_ISDIR(info.st_mode), SRF_IO,
                "%s: expected a directory to write into", path);
    SRF_FAIL_IF(access(part, W_OK | X_OK) != 0, SRF_IO, "%s: %s", path, strerror(errno));
    return SRF_OK;
}
