/* Byte-pair merging of one word: the pair of lowest rank first, the leftmost among equals.
 *
 * Symbols form a linked list in an array (a symbol stays at the index of its first byte); a binary
 * heap holds (rank, index) of every pair that merges. A merge changes at most two pairs, so a word
 * of n bytes takes O(n log n). Entries whose pair has changed meanwhile stay in the heap and are
 * known by their rank: a symbol remembers the rank of the pair that it now begins. */
#include "data/bpe_internal.h"
#include "kernels/grow.h"

#include <string.h>

struct srf__bpe_symbol {
    int32_t id, rank; /* rank of the pair (this, next), SRF__BPE_NO_RANK = none */
    int32_t prev, next;
};

enum { WORD_BYTES = 30, WORD_IDS = 8, CACHE_WORDS = 1 << 13 };

/* One cache line: a word, its length (0: free) and its ids. */
struct srf__bpe_word {
    char bytes[WORD_BYTES];
    uint8_t n_bytes, n_ids;
    int32_t ids[WORD_IDS];
};
_Static_assert(sizeof(struct srf__bpe_word) == 64, "a cached word fills a cache line");

void srf__bpe_scratch_free(struct srf__bpe_scratch *s)
{
    srf__free(s->symbols);
    srf__free(s->heap);
    srf__free(s->words);
    *s = (struct srf__bpe_scratch){0};
}

srf_status srf__bpe_scratch_cache(struct srf__bpe_scratch *s)
{
    return s->words ? SRF_OK : SRF_CALLOC(s->words, CACHE_WORDS);
}

static int32_t pair_rank(const struct srf_bpe *bpe, int32_t left, int32_t right)
{
    uint64_t pair = (uint64_t)left << 32 | (uint32_t)right;
    for (uint64_t i = srf__bpe_pair_hash(pair);; i++) {
        const struct srf__bpe_slot *slot = &bpe->by_pair[i & bpe->by_pair_mask];
        if (slot->rank == SRF__BPE_NO_RANK || slot->pair == pair) return slot->rank;
    }
}

static void heap_push(uint64_t *heap, size_t *n, uint64_t key)
{
    size_t i = (*n)++;
    for (; i && heap[(i - 1) / 2] > key; i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = key;
}

static uint64_t heap_pop(uint64_t *heap, size_t *n)
{
    uint64_t top = heap[0], last = heap[--*n];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= *n) break;
        if (child + 1 < *n && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= last) break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = last;
    return top;
}

/* Look the pair that begins at symbol i up again. */
static void update_pair(const struct srf_bpe *bpe, struct srf__bpe_scratch *s, int32_t i,
                        size_t *n_heap)
{
    struct srf__bpe_symbol *a = &s->symbols[i];
    a->rank = a->next < 0 ? SRF__BPE_NO_RANK : pair_rank(bpe, a->id, s->symbols[a->next].id);
    if (a->rank != SRF__BPE_NO_RANK)
        heap_push(s->heap, n_heap, (uint64_t)a->rank << 32 | (uint32_t)i);
}

static srf_status merge_word(const struct srf_bpe *bpe, struct srf__bpe_scratch *s,
                             const char *word, size_t n, struct srf_ids *ids)
{
    SRF_FAIL_IF(n > INT32_MAX / 4, SRF_UNSUPPORTED,
                "a single word of %zu bytes, expected at most %d", n, INT32_MAX / 4);
    SRF_TRY(SRF_GROW(s->symbols, s->cap_symbols, n));
    /* n - 1 pairs at first, at most 2 more for each of at most n - 1 merges. */
    SRF_TRY(SRF_GROW(s->heap, s->cap_heap, 3 * n));
    SRF_TRY(srf__ids_reserve(ids, (int64_t)n));
    struct srf__bpe_symbol *symbols = s->symbols;
    size_t n_heap = 0;
    for (size_t i = 0; i < n; i++) {
        int32_t id = bpe->byte_id[(unsigned char)word[i]];
        SRF_FAIL_IF(id < 0, SRF_INVALID, "encode: byte 0x%02x has no token in this tokenizer",
                    (unsigned char)word[i]);
        symbols[i] = (struct srf__bpe_symbol){
            .id = id, .prev = (int32_t)i - 1, .next = i + 1 < n ? (int32_t)i + 1 : -1};
    }
    for (size_t i = 0; i < n; i++) update_pair(bpe, s, (int32_t)i, &n_heap);
    while (n_heap) {
        uint64_t top = heap_pop(s->heap, &n_heap);
        int32_t rank = (int32_t)(top >> 32), i = (int32_t)(uint32_t)top;
        struct srf__bpe_symbol *a = &symbols[i];
        if (a->rank != rank) continue;
        struct srf__bpe_symbol *b = &symbols[a->next];
        b->rank = SRF__BPE_NO_RANK; /* no longer a symbol: its entries are stale */
        a->id = bpe->merges[rank].result;
        a->next = b->next;
        if (a->next >= 0) symbols[a->next].prev = i;
        update_pair(bpe, s, i, &n_heap);
        if (a->prev >= 0) update_pair(bpe, s, a->prev, &n_heap);
    }
    for (int32_t i = 0; i >= 0; i = symbols[i].next) ids->ids[ids->n++] = symbols[i].id;
    return SRF_OK;
}

/* Slot of a word of at most WORD_BYTES bytes. */
static struct srf__bpe_word *cached(struct srf__bpe_scratch *s, const char *word, size_t n)
{
    uint64_t h = n;
    for (size_t i = 0; i < n; i += 8) {
        uint64_t x = 0;
        memcpy(&x, word + i, n - i < 8 ? n - i : 8);
        h = (h ^ x) * 0x9e3779b97f4a7c15u;
        h ^= h >> 29;
    }
    return &s->words[h & (CACHE_WORDS - 1)];
}

srf_status srf__bpe_word(const struct srf_bpe *bpe, struct srf__bpe_scratch *s, const char *word,
                         size_t n, struct srf_ids *ids)
{
    if (!s->words || n > WORD_BYTES) return merge_word(bpe, s, word, n, ids);
    struct srf__bpe_word *slot = cached(s, word, n);
    if (slot->n_bytes == n && memcmp(slot->bytes, word, n) == 0) {
        SRF_TRY(srf__ids_reserve(ids, WORD_IDS));
        memcpy(ids->ids + ids->n, slot->ids, sizeof slot->ids);
        ids->n += slot->n_ids;
        return SRF_OK;
    }
    int64_t before = ids->n;
    SRF_TRY(merge_word(bpe, s, word, n, ids));
    if (ids->n - before > WORD_IDS) return SRF_OK;
    slot->n_bytes = (uint8_t)n;
    slot->n_ids = (uint8_t)(ids->n - before);
    memcpy(slot->bytes, word, n);
    memcpy(slot->ids, ids->ids + before, (size_t)(ids->n - before) * sizeof *slot->ids);
    return SRF_OK;
}
