/* Philox4x32-10 and the streams made of it. The table in features.h is what this file computes. */
#include "kernels/rng.h"

#include <math.h>

/* Tells stream keys from stream words: no stream has it as its c with a as its call index but by
 * chance, and then under another key. */
#define KEY_DERIVATION 0x53524631u

void srf_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4])
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

struct srf_rng srf_rng_at(uint64_t seed, enum srf_rng_purpose purpose, uint64_t a, uint32_t b,
                          uint32_t c)
{
    uint32_t seed_key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)}, word[4];
    uint32_t what[4] = {(uint32_t)a, (uint32_t)(a >> 32), (uint32_t)purpose, KEY_DERIVATION};
    srf_philox4x32(what, seed_key, word);
    return (struct srf_rng){.key = {word[0], word[1]}, .counter = {0, 0, b, c}};
}

uint32_t srf_rng_u32(struct srf_rng *r)
{
    if (r->left == 0) {
        srf_philox4x32(r->counter, r->key, r->buf);
        if (++r->counter[0] == 0) r->counter[1]++;
        r->left = 4;
    }
    return r->buf[4 - r->left--];
}

/* The centres of 2^52 equal cells of (0, 1): neither end is a value, and all are exact. */
static double uniform_of(uint32_t lo, uint32_t hi)
{
    uint64_t bits = ((uint64_t)hi << 32 | lo) >> 12;
    return ((double)bits + 0.5) * 0x1p-52;
}

static void box_muller(double u0, double u1, double z[2])
{
    double radius = sqrt(-2 * log(u0)), angle = 2 * M_PI * u1;
    z[0] = radius * cos(angle);
    z[1] = radius * sin(angle);
}

double srf_rng_uniform(struct srf_rng *r)
{
    uint32_t lo = srf_rng_u32(r), hi = srf_rng_u32(r);
    return uniform_of(lo, hi);
}

double srf_rng_normal(struct srf_rng *r)
{
    if (r->has_spare) {
        r->has_spare = false;
        return r->spare;
    }
    double u0 = srf_rng_uniform(r), u1 = srf_rng_uniform(r), z[2];
    box_muller(u0, u1, z);
    r->spare = z[1];
    r->has_spare = true;
    return z[0];
}

uint64_t srf_rng_below(struct srf_rng *r, uint64_t n)
{
    /* Throw away the last, incomplete run of n among the 2^64 values. */
    uint64_t incomplete = (UINT64_MAX % n + 1) % n, x;
    do {
        uint64_t lo = srf_rng_u32(r), hi = srf_rng_u32(r);
        x = hi << 32 | lo;
    } while (x > UINT64_MAX - incomplete);
    return x % n;
}

void srf__rng_call(const struct srf_rng *r, uint64_t n, uint32_t word[4])
{
    uint32_t counter[4] = {(uint32_t)n, (uint32_t)(n >> 32), r->counter[2], r->counter[3]};
    srf_philox4x32(counter, r->key, word);
}

void srf__rng_uniforms(const struct srf_rng *r, uint64_t n, double u[2])
{
    uint32_t word[4];
    srf__rng_call(r, n, word);
    u[0] = uniform_of(word[0], word[1]);
    u[1] = uniform_of(word[2], word[3]);
}

void srf__rng_normals(const struct srf_rng *r, uint64_t n, double z[2])
{
    double u[2];
    srf__rng_uniforms(r, n, u);
    box_muller(u[0], u[1], z);
}
