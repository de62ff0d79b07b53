/* A checksum of data in our files, against damage, not against an adversary. */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* Of n bytes, 8 at a time as the machine has them: files are little endian, and so are machines
 * that this runs on. Every step is one to one in the word and in the sum before, so that a change
 * of one word always shows; four sums run side by side, at the speed of memory. */
uint64_t srf__checksum(const void *data, size_t n);
