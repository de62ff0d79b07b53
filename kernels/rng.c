/* Philox4x32-10 and the streams made of it. The table in features.h is what this file computes. */
#include "kernels/rng.h"
#include "kernels/philox.h"

#include <math.h>

void srf_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4])
{
    srf__philox(counter, key, out);
}

struct srf_rng srf_rng_at(uint64_t seed, enum srf_rng_purpose purpose, uint64_t a, uint32_t b,
                          uint32_t c)
{
    uint32_t word[4];
    srf__stream_key(seed, (uint32_t)purpose, a, word);
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

static void box_muller(double u0, double u1, double z[2])
{
    double radius = sqrt(-2 * log(u0)), angle = 2 * M_PI * u1;
    z[0] = radius * cos(angle);
    z[1] = radius * sin(angle);
}

double srf_rng_uniform(struct srf_rng *r)
{
    uint32_t lo = srf_rng_u32(r), hi = srf_rng_u32(r);
    return srf__uniform_of(lo, hi);
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
    u[0] = srf__uniform_of(word[0], word[1]);
    u[1] = srf__uniform_of(word[2], word[3]);
}

void srf__rng_normals(const struct srf_rng *r, uint64_t n, double z[2])
{
    double u[2];
    srf__rng_uniforms(r, n, u);
    box_muller(u[0], u[1], z);
}
