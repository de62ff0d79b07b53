#include "data/checksum.h"

#include <string.h>

enum { LANES = 4 };

static void add_words(uint64_t lane[LANES], const void *data)
{
    uint64_t word[LANES];
    memcpy(word, data, sizeof word);
    for (int i = 0; i < LANES; i++) {
        lane[i] = (lane[i] ^ word[i]) * 0x9e3779b97f4a7c15u;
        lane[i] = lane[i] << 29 | lane[i] >> 35;
    }
}

uint64_t srf__checksum(const void *data, size_t n)
{
    uint64_t lane[LANES] = {1, 2, 3, 4}, sum = n, last[LANES] = {0};
    const char *bytes = data;
    size_t whole = n - n % sizeof last;
    for (size_t i = 0; i < whole; i += sizeof last) add_words(lane, bytes + i);
    if (whole < n) {
        memcpy(last, bytes + whole, n - whole);
        add_words(lane, last);
    }
    for (int i = 0; i < LANES; i++) {
        sum = (sum ^ lane[i]) * 0x9e3779b97f4a7c15u;
        sum ^= sum >> 32;
    }
    return sum;
}
