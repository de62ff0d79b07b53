/* Inside the library: Philox4x32-10 (Salmon et al., SC 2011) and what streams make of it, to the
 * same bits on the host and the device. features.h has the table that this computes. */
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define SRF__BOTH static __host__ __device__ __forceinline__
#else
#define SRF__BOTH static inline
#endif

/* Tells stream keys from stream words: no stream has it as its c with a as its call index but by
 * chance, and then under another key. */
#define SRF__KEY_DERIVATION 0x53524631u

SRF__BOTH void srf__philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4])
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

/* Words 0, 1 are the key of the stream that `purpose` (enum srf_rng_purpose) and a have. */
SRF__BOTH void srf__stream_key(uint64_t seed, uint32_t purpose, uint64_t a, uint32_t word[4])
{
    const uint32_t seed_key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    const uint32_t what[4] = {(uint32_t)a, (uint32_t)(a >> 32), purpose, SRF__KEY_DERIVATION};
    srf__philox(what, seed_key, word);
}

/* The centres of 2^52 equal cells of (0, 1): neither end is a value, and all are exact. */
SRF__BOTH double srf__uniform_of(uint32_t lo, uint32_t hi)
{
    uint64_t bits = ((uint64_t)hi << 32 | lo) >> 12;
    return ((double)bits + 0.5) * 0x1p-52;
}
