/* The tokenizer's tables: built from checked parts, looked up, hashed, decoded. */
#include "data/bpe_internal.h"
#include "kernels/grow.h"

#include <stdlib.h>
#include <string.h>

/* The tokenizers library's GPT-2 pattern. White space is spelt out as Unicode's White_Space: the \s
 * of PCRE2 differs from it (U+180E). Letters and numbers are those of PCRE2's Unicode version: a
 * character that was assigned later is neither here (10.42 has Unicode 14). */
#define SPACE                                                                                      \
    "\\t-\\r "                                                                                     \
    "\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
static const char gpt2_pattern[] = "'(?:[stmd]|re|ve|ll)"
                                   "| ?\\p{L}+"
                                   "| ?\\p{N}+"
                                   "| ?[^" SPACE "\\p{L}\\p{N}]+"
                                   "|[" SPACE "]+(?![^" SPACE "])"
                                   "|[" SPACE "]+";
#undef SPACE

static uint64_t fnv1a(uint64_t h, const void *data, size_t n)
{
    const unsigned char *p = data;
    for (size_t i = 0; i < n; i++) h = (h ^ p[i]) * 0x100000001b3u;
    return h;
}
static const uint64_t fnv1a_start = 0xcbf29ce484222325u;

static void *pcre_alloc(size_t n, void *user)
{
    (void)user;
    return srf__alloc(n, 1);
}

static void pcre_free(void *p, void *user)
{
    (void)user;
    srf__free(p);
}

/* ---- GPT-2's alphabet: every byte has a printable code point of its own, below 512 ----------- */

static int code_of_byte(unsigned char byte)
{
    int b = byte;
    if ((b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174) return b;
    if (b <= 32) return 256 + b;
    if (b <= 160) return 256 + 33 + (b - 127);
    return 256 + 67; /* 173, the soft hyphen */
}

int srf__bpe_symbol_of_byte(unsigned char byte, char utf8[2])
{
    int c = code_of_byte(byte);
    if (c < 128) {
        utf8[0] = (char)c;
        return 1;
    }
    utf8[0] = (char)(0xc0 | c >> 6);
    utf8[1] = (char)(0x80 | (c & 63));
    return 2;
}

static void byte_of_code_table(int16_t table[512])
{
    for (int c = 0; c < 512; c++) table[c] = -1;
    for (int b = 0; b < 256; b++) table[code_of_byte((unsigned char)b)] = (int16_t)b;
}

/* Bytes that a vocabulary key stands for, written to out (n at most); a key with a character
 * outside the alphabet stands for itself. */
static size_t bytes_of_key(const int16_t table[512], const char *key, size_t n, char *out)
{
    size_t k = 0;
    for (size_t i = 0; i < n; k++) {
        unsigned char c = (unsigned char)key[i];
        int code = -1;
        if (c < 128)
            code = c, i += 1;
        else if (c >= 0xc2 && c < 0xc8 && i + 1 < n)
            code = (c & 31) << 6 | ((unsigned char)key[i + 1] & 63), i += 2;
        if (code < 0 || table[code] < 0) {
            memcpy(out, key, n);
            return n;
        }
        out[k] = (char)table[code];
    }
    return k;
}

/* ---- lookups --------------------------------------------------------------------------------- */

static int32_t find_key(const struct srf_bpe *bpe, const char *key, size_t n)
{
    for (uint64_t i = fnv1a(fnv1a_start, key, n);; i++) {
        int32_t id = bpe->by_key[i & bpe->by_key_mask];
        if (id < 0) return -1;
        const struct srf__bpe_token *t = &bpe->tokens[id];
        if (t->n_key == n && memcmp(t->key, key, n) == 0) return id;
    }
}

static void insert_key(struct srf_bpe *bpe, int32_t id)
{
    const struct srf__bpe_token *t = &bpe->tokens[id];
    uint64_t i = fnv1a(fnv1a_start, t->key, t->n_key);
    while (bpe->by_key[i & bpe->by_key_mask] >= 0) i++;
    bpe->by_key[i & bpe->by_key_mask] = id;
}

int64_t srf_bpe_vocab_size(const struct srf_bpe *bpe)
{
    return bpe->n_tokens;
}

int32_t srf_bpe_token_id(const struct srf_bpe *bpe, const char *content)
{
    return find_key(bpe, content, strlen(content));
}

/* ---- building -------------------------------------------------------------------------------- */

static uint64_t table_size(size_t n)
{
    uint64_t size = 16;
    while (size < 2 * (uint64_t)n) size *= 2;
    return size;
}

static srf_status check_key(const char *what, const char *key, size_t n, int64_t id)
{
    SRF_FAIL_IF(n == 0, SRF_FORMAT, "%s: token %lld is empty", what, (long long)id);
    SRF_FAIL_IF(n > 1 << 20, SRF_FORMAT, "%s: token %lld is %zu bytes long, expected at most %d",
                what, (long long)id, n, 1 << 20);
    SRF_FAIL_IF(id < 0 || id >= SRF__BPE_MAX_VOCAB, SRF_FORMAT,
                "%s: id %lld of token '%.60s' is outside 0 to %d", what, (long long)id, key,
                SRF__BPE_MAX_VOCAB - 1);
    return SRF_OK;
}

/* Sizes: ids and bytes of strings (each key and the bytes it stands for). */
static srf_status measure(const struct srf__bpe_parts *parts, int64_t *n_tokens, size_t *n_bytes)
{
    *n_tokens = 0;
    *n_bytes = 0;
    for (size_t i = 0; i < parts->n_vocab; i++) {
        const struct srf__bpe_part_token *v = &parts->vocab[i];
        SRF_TRY(check_key("vocab", v->key, v->n, v->id));
        if (v->id >= *n_tokens) *n_tokens = v->id + 1;
        *n_bytes += 2 * v->n + 1;
    }
    for (size_t i = 0; i < parts->n_added; i++) {
        const struct srf__bpe_part_added *a = &parts->added[i];
        SRF_TRY(check_key("added_tokens", a->key, a->n, a->id));
        if (a->id >= *n_tokens) *n_tokens = a->id + 1;
        *n_bytes += a->n + 1;
    }
    SRF_FAIL_IF(*n_tokens == 0, SRF_FORMAT, "vocab: no tokens");
    return SRF_OK;
}

/* A NUL-terminated copy in the room for strings. */
static const char *take(char **room, const char *s, size_t n)
{
    char *copy = *room;
    memcpy(copy, s, n);
    copy[n] = '\0';
    *room += n + 1;
    return copy;
}

static srf_status add_vocab(struct srf_bpe *bpe, const struct srf__bpe_parts *parts, char **room)
{
    int16_t table[512];
    byte_of_code_table(table);
    for (size_t i = 0; i < parts->n_vocab; i++) {
        const struct srf__bpe_part_token *v = &parts->vocab[i];
        struct srf__bpe_token *t = &bpe->tokens[v->id];
        SRF_FAIL_IF(t->key, SRF_FORMAT, "vocab: id %lld belongs to '%.60s' and to '%.60s'",
                    (long long)v->id, t->key, v->key);
        SRF_FAIL_IF(find_key(bpe, v->key, v->n) >= 0, SRF_FORMAT,
                    "vocab: token '%.60s' occurs twice", v->key);
        t->key = take(room, v->key, v->n);
        t->n_key = (uint32_t)v->n;
        t->bytes = *room;
        t->n_bytes = (uint32_t)bytes_of_key(table, v->key, v->n, *room);
        *room += t->n_bytes;
        t->in_vocab = true;
        insert_key(bpe, (int32_t)v->id);
    }
    for (int b = 0; b < 256; b++) {
        char symbol[2];
        int n = srf__bpe_symbol_of_byte((unsigned char)b, symbol);
        bpe->byte_id[b] = find_key(bpe, symbol, (size_t)n);
        SRF_FAIL_IF(bpe->byte_id[b] < 0 && parts->has_unk, SRF_UNSUPPORTED,
                    "model.unk_token: expected null (or a vocabulary with all 256 bytes), "
                    "found one while byte 0x%02x has no token",
                    b);
    }
    return SRF_OK;
}

static srf_status add_merges(struct srf_bpe *bpe, const struct srf__bpe_parts *parts)
{
    SRF_FAIL_IF(parts->n_merges >= SRF__BPE_MAX_VOCAB, SRF_FORMAT,
                "merges: %zu of them, expected fewer than %d", parts->n_merges, SRF__BPE_MAX_VOCAB);
    char *joined = NULL;
    size_t cap = 0;
    srf_status st = SRF_OK;
    for (size_t i = 0; i < parts->n_merges; i++) {
        const struct srf__bpe_part_merge *m = &parts->merges[i];
        size_t n = m->n_left + m->n_right;
        if (n > cap) {
            srf__free(joined);
            SRF_TRY_GO(SRF_ALLOC(joined, 2 * n));
            cap = 2 * n;
        }
        memcpy(joined, m->left, m->n_left);
        memcpy(joined + m->n_left, m->right, m->n_right);
        struct srf__bpe_merge *merge = &bpe->merges[i];
        merge->left = find_key(bpe, m->left, m->n_left);
        merge->right = find_key(bpe, m->right, m->n_right);
        merge->result = find_key(bpe, joined, n);
        SRF_FAIL_GO_IF(merge->left < 0 || merge->right < 0 || merge->result < 0, SRF_FORMAT,
                       "merges: merge %zu, '%.*s' with '%.*s': %s is not in the vocabulary", i,
                       (int)(m->n_left < 60 ? m->n_left : 60), m->left,
                       (int)(m->n_right < 60 ? m->n_right : 60), m->right,
                       merge->left < 0    ? "the left part"
                       : merge->right < 0 ? "the right part"
                                          : "the result");
        uint64_t pair = (uint64_t)merge->left << 32 | (uint32_t)merge->right;
        uint64_t slot = srf__bpe_pair_hash(pair);
        for (; bpe->by_pair[slot & bpe->by_pair_mask].rank != SRF__BPE_NO_RANK; slot++)
            SRF_FAIL_GO_IF(bpe->by_pair[slot & bpe->by_pair_mask].pair == pair, SRF_FORMAT,
                           "merges: merge %zu repeats merge %d", i,
                           (int)bpe->by_pair[slot & bpe->by_pair_mask].rank);
        bpe->by_pair[slot & bpe->by_pair_mask] =
            (struct srf__bpe_slot){.pair = pair, .rank = (int32_t)i};
        bpe->n_merges++;
    }
cleanup:
    srf__free(joined);
    return st;
}

static srf_status add_added(struct srf_bpe *bpe, const struct srf__bpe_parts *parts, char **room)
{
    int64_t next = (int64_t)parts->n_vocab;
    for (size_t i = 0; i < parts->n_added; i++) {
        const struct srf__bpe_part_added *a = &parts->added[i];
        struct srf__bpe_token *t = &bpe->tokens[a->id];
        int32_t known = find_key(bpe, a->key, a->n);
        SRF_FAIL_IF(known >= 0 && known != a->id, SRF_FORMAT,
                    "added_tokens: '%.60s' has id %lld, but %d elsewhere in the file", a->key,
                    (long long)a->id, known);
        SRF_FAIL_IF(known < 0 && t->key, SRF_FORMAT,
                    "added_tokens: id %lld of '%.60s' belongs to another token", (long long)a->id,
                    a->key);
        SRF_FAIL_IF(t->added, SRF_FORMAT, "added_tokens: '%.60s' occurs twice", a->key);
        SRF_FAIL_IF(parts->next_ids && known < 0 && a->id != next, SRF_UNSUPPORTED,
                    "added_tokens: id of '%.60s': expected %lld, as the tokenizers library counts "
                    "(or the token in model.vocab, too), found %lld",
                    a->key, (long long)next, (long long)a->id);
        if (known < 0) {
            next++;
            t->key = t->bytes = take(room, a->key, a->n);
            t->n_key = t->n_bytes = (uint32_t)a->n;
            insert_key(bpe, (int32_t)a->id);
        }
        /* Two texts would become this id; it could give back only one of them. */
        SRF_FAIL_IF(t->n_bytes != a->n || memcmp(t->bytes, a->key, a->n) != 0, SRF_UNSUPPORTED,
                    "added_tokens: '%.60s' stands for other bytes in the vocabulary", a->key);
        t->added = true;
        t->normalized = a->normalized;
        t->special = a->special;
        bpe->added[bpe->n_added++] = (int32_t)a->id;
    }
    return SRF_OK;
}

/* Order of srf_bpe.added. */
static int compare_added(const void *a, const void *b, void *tokens)
{
    const struct srf__bpe_token *x = (const struct srf__bpe_token *)tokens + *(const int32_t *)a,
                                *y = (const struct srf__bpe_token *)tokens + *(const int32_t *)b;
    if (x->normalized != y->normalized) return x->normalized - y->normalized;
    if (x->bytes[0] != y->bytes[0]) return (unsigned char)x->bytes[0] - (unsigned char)y->bytes[0];
    return x->n_bytes > y->n_bytes ? -1 : x->n_bytes < y->n_bytes;
}

static void index_added(struct srf_bpe *bpe)
{
    if (bpe->n_added)
        qsort_r(bpe->added, (size_t)bpe->n_added, sizeof *bpe->added, compare_added, bpe->tokens);
    int64_t i = 0;
    for (int class = 0; class < SRF__ADDED_CLASSES; class ++) {
        for (int b = 0; b < 256; b++) {
            bpe->added_first[class][b] = (int32_t)i;
            for (; i < bpe->n_added; i++) {
                const struct srf__bpe_token *t = &bpe->tokens[bpe->added[i]];
                if (t->normalized != class || (unsigned char)t->bytes[0] != b) break;
                if (t->n_bytes > bpe->added_longest[class]) bpe->added_longest[class] = t->n_bytes;
            }
        }
        bpe->added_first[class][256] = (int32_t)i;
    }
}

static srf_status compile_pattern(struct srf_bpe *bpe)
{
    int error = 0;
    PCRE2_SIZE at = 0;
    bpe->pcre_memory = pcre2_general_context_create(pcre_alloc, pcre_free, NULL);
    SRF_FAIL_IF(!bpe->pcre_memory, SRF_NOMEM, "out of memory: PCRE2 context");
    pcre2_compile_context *context = pcre2_compile_context_create(bpe->pcre_memory);
    SRF_FAIL_IF(!context, SRF_NOMEM, "out of memory: PCRE2 context");
    bpe->pattern = pcre2_compile((PCRE2_SPTR)gpt2_pattern, sizeof gpt2_pattern - 1,
                                 PCRE2_UTF | PCRE2_ANCHORED, &error, &at, context);
    pcre2_compile_context_free(context);
    if (!bpe->pattern) {
        char text[128] = "";
        SRF_FAIL_IF(error == PCRE2_ERROR_HEAP_FAILED, SRF_NOMEM, "out of memory: PCRE2 pattern");
        pcre2_get_error_message(error, (PCRE2_UCHAR *)text, sizeof text);
        SRF_FAIL(SRF_UNSUPPORTED, "PCRE2 cannot compile the GPT-2 pattern: %s", text);
    }
    /* Where the system forbids generated code, PCRE2 interprets: slower, the same pieces. */
    (void)pcre2_jit_compile(bpe->pattern, PCRE2_JIT_COMPLETE);
    return SRF_OK;
}

srf_status srf__bpe_build(const struct srf__bpe_parts *parts, struct srf_bpe **out)
{
    struct srf_bpe *bpe = NULL;
    size_t n_strings;
    int64_t n_tokens;
    srf_status st = SRF_OK;
    *out = NULL;
    SRF_TRY(measure(parts, &n_tokens, &n_strings));
    SRF_TRY(SRF_CALLOC(bpe, 1));
    bpe->n_tokens = n_tokens;
    SRF_TRY_GO(SRF_CALLOC(bpe->tokens, n_tokens));
    SRF_TRY_GO(SRF_ALLOC(bpe->strings, n_strings));
    uint64_t n_keys = table_size(parts->n_vocab + parts->n_added);
    SRF_TRY_GO(SRF_ALLOC(bpe->by_key, n_keys));
    for (uint64_t i = 0; i < n_keys; i++) bpe->by_key[i] = -1;
    bpe->by_key_mask = n_keys - 1;
    SRF_TRY_GO(SRF_CALLOC(bpe->merges, parts->n_merges));
    uint64_t n_pairs = table_size(parts->n_merges);
    SRF_TRY_GO(SRF_CALLOC(bpe->by_pair, n_pairs));
    for (uint64_t i = 0; i < n_pairs; i++) bpe->by_pair[i].rank = SRF__BPE_NO_RANK;
    bpe->by_pair_mask = n_pairs - 1;
    SRF_TRY_GO(SRF_CALLOC(bpe->added, parts->n_added));

    char *room = bpe->strings;
    SRF_TRY_GO(add_vocab(bpe, parts, &room));
    SRF_TRY_GO(add_merges(bpe, parts));
    SRF_TRY_GO(add_added(bpe, parts, &room));
    index_added(bpe);
    SRF_TRY_GO(compile_pattern(bpe));
    *out = bpe;
    return SRF_OK;
cleanup:
    srf_bpe_free(bpe);
    return st;
}

void srf_bpe_free(struct srf_bpe *bpe)
{
    if (!bpe) return;
    pcre2_code_free(bpe->pattern);
    pcre2_general_context_free(bpe->pcre_memory);
    srf__free(bpe->tokens);
    srf__free(bpe->strings);
    srf__free(bpe->by_key);
    srf__free(bpe->merges);
    srf__free(bpe->by_pair);
    srf__free(bpe->added);
    srf__free(bpe);
}

/* ---- hash, decode ---------------------------------------------------------------------------- */

static uint64_t hash_u32(uint64_t h, uint32_t x)
{
    unsigned char le[4] = {(unsigned char)x, (unsigned char)(x >> 8), (unsigned char)(x >> 16),
                           (unsigned char)(x >> 24)};
    return fnv1a(h, le, 4);
}

/* FNV-1a 64 over: number of ids; per token (ascending ids) id, whether added, length, key; number
 * of merges; per merge (by rank) the two ids. Numbers as u32 little endian. Not in it: whether an
 * added token is listed in the vocabulary too, is special or normalized: files differ in that for
 * the same tokenizer. */
void srf_bpe_hash(const struct srf_bpe *bpe, char hex[17])
{
    uint64_t h = hash_u32(fnv1a_start, (uint32_t)bpe->n_tokens);
    for (int64_t id = 0; id < bpe->n_tokens; id++) {
        const struct srf__bpe_token *t = &bpe->tokens[id];
        if (!t->key) continue;
        h = hash_u32(h, (uint32_t)id);
        h = hash_u32(h, t->added);
        h = hash_u32(h, t->n_key);
        h = fnv1a(h, t->key, t->n_key);
    }
    h = hash_u32(h, (uint32_t)bpe->n_merges);
    for (int64_t i = 0; i < bpe->n_merges; i++) {
        h = hash_u32(h, (uint32_t)bpe->merges[i].left);
        h = hash_u32(h, (uint32_t)bpe->merges[i].right);
    }
    snprintf(hex, 17, "%016llx", (unsigned long long)h);
}

/* NULL: the id has no token. */
static const struct srf__bpe_token *token_of(const struct srf_bpe *bpe, int32_t id)
{
    return id >= 0 && id < bpe->n_tokens && bpe->tokens[id].key ? &bpe->tokens[id] : NULL;
}

srf_status srf_bpe_decode(const struct srf_bpe *bpe, const int32_t *ids, int64_t n,
                          const char *unknown, char **text, size_t *n_out)
{
    size_t total = 0, n_unknown = unknown ? strlen(unknown) : 0;
    *text = NULL;
    if (n_out) *n_out = 0;
    for (int64_t i = 0; i < n; i++) {
        const struct srf__bpe_token *t = token_of(bpe, ids[i]);
        SRF_FAIL_IF(!t && !unknown, SRF_INVALID,
                    "decode: id %d at %lld is no token of this tokenizer (%lld ids)", (int)ids[i],
                    (long long)i, (long long)bpe->n_tokens);
        total += t ? t->n_bytes : n_unknown;
    }
    SRF_TRY(SRF_ALLOC(*text, total + 1));
    char *p = *text;
    for (int64_t i = 0; i < n; i++) {
        const struct srf__bpe_token *t = token_of(bpe, ids[i]);
        size_t size = t ? t->n_bytes : n_unknown;
        memcpy(p, t ? t->bytes : unknown, size);
        p += size;
    }
    *p = '\0';
    if (n_out) *n_out = total;
    return SRF_OK;
}

void srf_ids_free(struct srf_ids *ids)
{
    srf__free(ids->ids);
    *ids = (struct srf_ids){0};
}

srf_status srf_ids_append(void *ids, const int32_t *more, int64_t n)
{
    struct srf_ids *all = ids;
    SRF_TRY(srf__ids_reserve(all, n));
    if (n) memcpy(all->ids + all->n, more, (size_t)n * sizeof *more);
    all->n += n;
    return SRF_OK;
}

srf_status srf__ids_reserve(struct srf_ids *ids, int64_t more)
{
    return SRF_GROW(ids->ids, ids->cap, ids->n + more);
}
