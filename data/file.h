/* Files of the host, under every format: bounded reading, atomic writing. */
#pragma once
#include "kernels/status.h"
#include "kernels/types.h"

/* A regular file open for reading. Read by pread, not mapped: a file that shrinks under us is an
 * error then, not a SIGBUS. */
struct srf__file {
    int fd;
    int64_t size;
    char *path;
};
srf_status srf__file_open(const char *path, struct srf__file *f);
void srf__file_close(struct srf__file *f); /* zeroed or closed is fine */
/* Exactly n bytes from offset. */
srf_status srf__file_read(const struct srf__file *f, int64_t offset, void *buf, int64_t n);
/* A whole file of at most `max` bytes, NUL after the end; srf__free. n may be NULL. */
srf_status srf__file_text(const char *path, int64_t max, char **text, size_t *n);

/* dir + "/" + name; srf__free. */
srf_status srf__path_join(const char *dir, const char *name, char **out);
/* The directory a path lies in ("." for a bare name), slashes at the end ignored; srf__free. */
srf_status srf__path_dir(const char *path, char **out);

/* The file that an output is: path, or what it links to; srf__free. Refuses directories, and
 * devices and pipes, whose names a rename would take. */
srf_status srf__out_target(const char *path, char **out);

/* A file being written: grows under a temporary name beside `path`, takes its name at commit
 * (fsync, rename, fsync of the directory). Both commit (even a failed one) and abort free it. */
struct srf__out {
    int fd;
    char *path, *temp;
};
srf_status srf__out_open(const char *path, struct srf__out *o);
srf_status srf__out_write(struct srf__out *o, const void *data, size_t n);
/* n floats as dtype; name: whose, for the message if one does not fit. */
srf_status srf__out_floats(struct srf__out *o, const char *name, const float *data, int64_t n,
                           enum srf_dtype dtype);
srf_status srf__out_commit(struct srf__out *o);
void srf__out_abort(struct srf__out *o); /* zeroed is fine */

/* A file whose bytes appear under `path` whole or not at all (any text or binary file of ours). */
srf_status srf_write_file_atomic(const char *path, const void *data, size_t n);
/* A directory to write into, with those above it; one that is there is fine. */
srf_status srf_make_dir(const char *path);

/* "<path>.tmp.<pid>", without the slashes at the end of path; srf__free. */
srf_status srf__temp_name(const char *path, char **out);
/* Takes the file for this process until it is closed, or says that another srf has it. Where files
 * cannot be locked (some network file systems) nothing happens. */
srf_status srf__file_lock(int fd, const char *path);
/* fsync of the directory that holds path, so that a rename in it survives a power cut. */
srf_status srf__sync_dir_of(const char *path);
