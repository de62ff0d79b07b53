/* Shared by the parts of the HDF5 layer. */
#pragma once
#include "data/h5.h"

#include <hdf5.h>

/* The file below an HDF5 file being written. */
struct srf__h5_out {
    int fd;
    int error; /* errno of the first write that failed, or 0 */
};

struct srf_h5 {
    hid_t file;
    char *path, *temp; /* temp: NULL for a file being read */
    struct srf__h5_out out;
    hid_t driver; /* of a file being written */
    int64_t size; /* of the file being read */
};

/* Makes the file of `fapl` be written through out, which must outlive it. H5FDunregister the result
 * (negative on failure) once the file is closed: closing it gives its own hold on the driver up
 * before it calls the driver for the last time (HDF5 1.10.8). */
hid_t srf__h5_driver(hid_t fapl, struct srf__h5_out *out);
/* SRF_IO with the system's reason if a write of f has failed. */
srf_status srf__h5_check(struct srf_h5 *f);

/* Every public function: switch HDF5's printing off, do the work, restore it. */
struct srf__hush {
    H5E_auto2_t func;
    void *data;
};
struct srf__hush srf__hush(void);
srf_status srf__unhush(struct srf__hush h, srf_status st);

/* Why the last HDF5 call failed, in the system's words or HDF5's. */
struct srf__reason {
    char text[128];
};
struct srf__reason srf__h5_why(void);

/* Whether every step of the path is a hard link to something: soft and external links could lead
 * out of the file. */
bool srf__h5_exists(struct srf_h5 *f, const char *path);
/* Makes the groups on the way to path, and path itself if `whole`. */
srf_status srf__h5_make_groups(struct srf_h5 *f, const char *path, bool whole);
/* The checksum of a dataset, whose n bytes are `data` as they are stored, and whether it is that.
 * Files of older versions and of other programs have none: fine. */
srf_status srf__h5_put_checksum(struct srf_h5 *f, const char *path, const void *data, size_t n);
srf_status srf__h5_check_checksum(struct srf_h5 *f, const char *path, const void *data, size_t n);
/* A fixed-length string type of `size` bytes; H5Tclose. */
hid_t srf__h5_string_type(size_t size);
