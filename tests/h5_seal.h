/* Checksums of HDF5's metadata made right again after a patch, so that the patch is looked at. */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint32_t rot(uint32_t x, int k)
{
    return x << k | x >> (32 - k);
}

/* Jenkins' lookup3 (hashlittle, start value 0) byte by byte, as HDF5's format uses it. */
static inline uint32_t lookup3(const uint8_t *k, size_t n)
{
    uint32_t a = 0xdeadbeef + (uint32_t)n, b = a, c = a;
    for (; n > 0;) {
        size_t m = n < 12 ? n : 12;
        uint32_t w[3] = {0};
        for (size_t i = 0; i < m; i++) w[i / 4] |= (uint32_t)k[i] << (8 * (i % 4));
        a += w[0], b += w[1], c += w[2];
        k += m;
        n -= m;
        if (n == 0) break;
        a -= c, a ^= rot(c, 4), c += b;
        b -= a, b ^= rot(a, 6), a += c;
        c -= b, c ^= rot(b, 8), b += a;
        a -= c, a ^= rot(c, 16), c += b;
        b -= a, b ^= rot(a, 19), a += c;
        c -= b, c ^= rot(b, 4), b += a;
    }
    c ^= b, c -= rot(b, 14);
    a ^= c, a -= rot(c, 11);
    b ^= a, b -= rot(a, 25);
    c ^= b, c -= rot(b, 16);
    a ^= c, a -= rot(c, 4);
    b ^= a, b -= rot(a, 14);
    c ^= b, c -= rot(b, 24);
    return c;
}

static inline void seal(uint8_t *p, size_t n)
{
    uint32_t sum = lookup3(p, n);
    memcpy(p + n, &sum, 4);
}

/* Superblock and object headers (version 2) of `file`, a patched copy of the n bytes at `good`: the
 * headers are found there, so that patches cannot hide one. Returns how many. */
static inline int h5_seal(uint8_t *file, const uint8_t *good, size_t n)
{
    int found = 0;
    seal(file, 44); /* the superblock */
    for (size_t i = 48; i + 8 < n; i++) {
        const uint8_t *p = good + i;
        if (memcmp(p, "OHDR", 4) != 0) continue;
        size_t at = 6 + (p[5] & 32 ? 16 : 0) + (p[5] & 16 ? 4 : 0), bytes = 0;
        for (int k = 0; k < 1 << (p[5] & 3); k++) bytes |= (size_t)p[at++] << (8 * k);
        if (i + at + bytes + 4 > n) continue;
        seal(file + i, at + bytes);
        found++;
    }
    return found;
}
