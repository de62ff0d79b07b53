/* How HDF5 files are written: a file driver for HDF5 whose writes never fail.
 *
 * HDF5 does not survive a failing write: after ENOSPC it cannot close the file any more, and
 * crashes when the program exits (1.10.8 does). So the driver remembers the first error, drops
 * what cannot be written and lets the library carry on; srf__h5_check after each call and the
 * commit report the error, and the file is thrown away. */
#include "data/h5_internal.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>
#if H5_VERSION_GE(1, 13, 0)
#include <H5FDdevelop.h>
#endif

struct driver_file {
    H5FD_t pub; /* HDF5's part, first */
    struct srf__h5_out *out;
    haddr_t eoa, eof; /* end of what HDF5 allotted, of what the file holds */
};

static H5FD_t *open_cb(const char *name, unsigned flags, hid_t fapl, haddr_t maxaddr)
{
    (void)name, (void)flags, (void)maxaddr;
    struct srf__h5_out *const *out = H5Pget_driver_info(fapl);
    struct driver_file *f = out ? srf__calloc(1, sizeof *f) : NULL;
    if (!f) return NULL;
    f->out = *out;
    return &f->pub;
}

static herr_t close_cb(H5FD_t *file)
{
    srf__free(file);
    return 0;
}

static herr_t query_cb(const H5FD_t *file, unsigned long *flags)
{
    (void)file;
    *flags = H5FD_FEAT_AGGREGATE_METADATA | H5FD_FEAT_ACCUMULATE_METADATA | H5FD_FEAT_DATA_SIEVE |
             H5FD_FEAT_AGGREGATE_SMALLDATA | H5FD_FEAT_DEFAULT_VFD_COMPATIBLE;
    return 0;
}

static haddr_t get_eoa_cb(const H5FD_t *file, H5FD_mem_t type)
{
    (void)type;
    return ((const struct driver_file *)file)->eoa;
}

static herr_t set_eoa_cb(H5FD_t *file, H5FD_mem_t type, haddr_t addr)
{
    (void)type;
    ((struct driver_file *)file)->eoa = addr;
    return 0;
}

static haddr_t get_eof_cb(const H5FD_t *file, H5FD_mem_t type)
{
    (void)type;
    return ((const struct driver_file *)file)->eof;
}

/* What is not in the file reads as zeros. */
static herr_t read_cb(H5FD_t *file, H5FD_mem_t type, hid_t dxpl, haddr_t at, size_t n, void *buf)
{
    (void)type, (void)dxpl;
    const struct driver_file *f = (struct driver_file *)file;
    char *to = buf;
    while (n > 0) {
        ssize_t got = pread(f->out->fd, to, n, (off_t)at);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) break;
        to += got, n -= (size_t)got, at += (haddr_t)got;
    }
    memset(to, 0, n);
    return 0;
}

static herr_t write_cb(H5FD_t *file, H5FD_mem_t type, hid_t dxpl, haddr_t at, size_t n,
                       const void *buf)
{
    (void)type, (void)dxpl;
    struct driver_file *f = (struct driver_file *)file;
    const char *from = buf;
    if (at + n > f->eof) f->eof = at + n;
    while (n > 0 && !f->out->error) {
        ssize_t done = pwrite(f->out->fd, from, n, (off_t)at);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) {
            f->out->error = done < 0 ? errno : EIO;
            break;
        }
        from += done, n -= (size_t)done, at += (haddr_t)done;
    }
    return 0;
}

static herr_t truncate_cb(H5FD_t *file, hid_t dxpl, hbool_t closing)
{
    (void)dxpl, (void)closing;
    struct driver_file *f = (struct driver_file *)file;
    if (f->eoa == f->eof) return 0;
    if (!f->out->error && ftruncate(f->out->fd, (off_t)f->eoa) != 0) f->out->error = errno;
    f->eof = f->eoa;
    return 0;
}

static const H5FD_class_t driver = {
#if H5_VERSION_GE(1, 13, 0)
    .version = H5FD_CLASS_VERSION,
    .value = 600, /* of the range for private use */
#endif
    .name = "srf",
    .maxaddr = INT64_MAX,
    .fc_degree = H5F_CLOSE_WEAK,
    .fapl_size = sizeof(struct srf__h5_out *),
    .open = open_cb,
    .close = close_cb,
    .query = query_cb,
    .get_eoa = get_eoa_cb,
    .set_eoa = set_eoa_cb,
    .get_eof = get_eof_cb,
    .read = read_cb,
    .write = write_cb,
    .truncate = truncate_cb,
    .fl_map = H5FD_FLMAP_DICHOTOMY,
};

hid_t srf__h5_driver(hid_t fapl, struct srf__h5_out *out)
{
    hid_t id = H5FDregister(&driver);
    if (id >= 0 && H5Pset_driver(fapl, id, &out) < 0) {
        H5FDunregister(id);
        id = H5I_INVALID_HID;
    }
    return id;
}

srf_status srf__h5_check(struct srf_h5 *f)
{
    SRF_FAIL_IF(f->out.error, SRF_IO, "%s: %s", f->path, strerror(f->out.error));
    return SRF_OK;
}
