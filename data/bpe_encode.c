/* Text to ids: added tokens, then GPT-2's pre-tokenizer pattern, then merging; whole or streamed.
 *
 * Text is cut at added tokens into segments that do not see each other, a segment by the pattern
 * into pieces. A stream is encoded block by block; what more text could still change stays in the
 * buffer:
 *  - an added token may begin in the last (longest added token - 1) bytes; for the second class,
 *    which loses against the first, that much again before them;
 *  - the pattern decides a piece by at most two characters behind its end (white space that is
 *    followed by white space or not), or three behind an apostrophe: LOOKAHEAD bytes.
 * A piece longer than the buffer makes the buffer grow: merging must see all of it. */
#include "data/bpe_internal.h"
#include "kernels/grow.h"

#include <errno.h>
#include <string.h>

enum { LOOKAHEAD = 8 };
/* Texts from this length on repeat enough words for a cache of them. */
enum { CACHE_FROM_BYTES = 4096 };

struct encoder {
    const struct srf_bpe *bpe;
    struct srf_ids *ids;
    struct srf__bpe_scratch scratch;
    pcre2_match_data *match;
    char *shadow; /* see valid_utf8_shadow */
    size_t cap_shadow;
    bool added;
};

static srf_status encoder_start(struct encoder *e, const struct srf_bpe *bpe, bool added,
                                struct srf_ids *ids)
{
    *e = (struct encoder){.bpe = bpe, .ids = ids, .added = added};
    e->match = pcre2_match_data_create(1, bpe->pcre_memory);
    SRF_FAIL_IF(!e->match, SRF_NOMEM, "out of memory: PCRE2 match data");
    return SRF_OK;
}

static void encoder_end(struct encoder *e)
{
    pcre2_match_data_free(e->match);
    srf__free(e->shadow);
    srf__bpe_scratch_free(&e->scratch);
}

/* Length of the valid UTF-8 character at s[0..n), 0 if there is none (RFC 3629: no surrogates, no
 * overlong forms, at most U+10FFFF). */
static size_t utf8_char(const unsigned char *s, size_t n)
{
    unsigned char c = s[0];
    if (c < 0x80) return 1;
    size_t len = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : 2;
    if (c < 0xc2 || c > 0xf4 || len > n) return 0;
    unsigned char low = 0x80, high = 0xbf; /* of the second byte */
    if (c == 0xe0) low = 0xa0;
    if (c == 0xed) high = 0x9f;
    if (c == 0xf0) low = 0x90;
    if (c == 0xf4) high = 0x8f;
    if (s[1] < low || s[1] > high) return 0;
    for (size_t i = 2; i < len; i++)
        if (s[i] < 0x80 || s[i] > 0xbf) return 0;
    return len;
}

/* Where the first invalid byte of s[from..n) is, n if nowhere. */
static size_t invalid_at(const char *s, size_t from, size_t n)
{
    size_t i = from;
    while (i < n) {
        uint64_t eight;
        if (i + 8 <= n) {
            memcpy(&eight, s + i, 8);
            if (!(eight & 0x8080808080808080u)) {
                i += 8;
                continue;
            }
        }
        size_t len = utf8_char((const unsigned char *)s + i, n - i);
        if (!len) return i;
        i += len;
    }
    return n;
}

/* What PCRE2 looks at in place of text[0..n): the same, or a copy in which each invalid byte is
 * U+0001, a character outside every class of the pattern. Offsets agree. */
static srf_status valid_utf8_shadow(struct encoder *e, const char *text, size_t n,
                                    const char **shadow)
{
    size_t bad = invalid_at(text, 0, n);
    *shadow = text;
    if (bad == n) return SRF_OK;
    if (n > e->cap_shadow) {
        srf__free(e->shadow);
        e->shadow = NULL;
        e->cap_shadow = 0;
        SRF_TRY(SRF_ALLOC(e->shadow, n));
        e->cap_shadow = n;
    }
    memcpy(e->shadow, text, n);
    for (; bad < n; bad = invalid_at(text, bad + 1, n)) e->shadow[bad] = 1;
    *shadow = e->shadow;
    return SRF_OK;
}

/* Encode the pieces of a segment text[0..n); if it is open (more text may follow), only those that
 * more text cannot change. *done: bytes encoded. */
static srf_status encode_segment(struct encoder *e, const char *text, size_t n, bool open,
                                 size_t *done)
{
    const char *shadow;
    *done = 0;
    SRF_TRY(valid_utf8_shadow(e, text, n, &shadow));
    while (*done < n) {
        size_t at = *done;
        int rc = pcre2_match(e->bpe->pattern, (PCRE2_SPTR)shadow, n, at, PCRE2_NO_UTF_CHECK,
                             e->match, NULL);
        size_t end = rc >= 0 ? pcre2_get_ovector_pointer(e->match)[1] : 0;
        SRF_FAIL_IF(rc == PCRE2_ERROR_NOMEMORY || rc == PCRE2_ERROR_HEAPLIMIT, SRF_NOMEM,
                    "out of memory: pre-tokenizer");
        SRF_FAIL_IF(end <= at, SRF_INVALID, "pre-tokenizer: PCRE2 error %d", rc);
        if (open && end + LOOKAHEAD > n) break;
        SRF_TRY(srf__bpe_word(e->bpe, &e->scratch, text + at, end - at, e->ids));
        *done = end;
    }
    return SRF_OK;
}

/* The first added token of the class that begins in text[from..starts) and ends by `end`, the
 * longest where several begin: its place, or `starts` if there is none. */
static size_t find_added(const struct srf_bpe *bpe, int class, const char *text, size_t from,
                         size_t starts, size_t end, int32_t *id)
{
    const int32_t *first = bpe->added_first[class];
    if (!bpe->added_longest[class]) return starts;
    for (size_t at = from; at < starts; at++) {
        unsigned char c = (unsigned char)text[at];
        for (int32_t i = first[c]; i < first[c + 1]; i++) {
            const struct srf__bpe_token *t = &bpe->tokens[bpe->added[i]];
            if (t->n_bytes > end - at || memcmp(text + at, t->bytes, t->n_bytes) != 0) continue;
            *id = bpe->added[i];
            return at;
        }
    }
    return starts;
}

/* Bytes at an open end in which an added token of the class may begin without being seen whole. */
static size_t hazard(const struct srf_bpe *bpe, int class)
{
    return bpe->added_longest[class] ? bpe->added_longest[class] - 1 : 0;
}

static size_t less(size_t a, size_t b)
{
    return a > b ? a - b : 0;
}

/* text[0..n) holds no token of the first class (where open, none begins here): cut it at those of
 * the second. */
static srf_status encode_between(struct encoder *e, const char *text, size_t n, bool open,
                                 size_t *done)
{
    size_t known = open ? less(n, hazard(e->bpe, SRF__ADDED_NORMALIZED)) : n;
    *done = 0;
    for (;;) {
        int32_t id = -1;
        size_t at = find_added(e->bpe, SRF__ADDED_NORMALIZED, text, *done, known, n, &id), some;
        if (at < *done) return SRF_OK; /* the last token reaches into the unknown end */
        SRF_TRY(encode_segment(e, text + *done, at - *done, id < 0 && open, &some));
        *done += some;
        if (id < 0) return SRF_OK;
        SRF_TRY(srf__ids_reserve(e->ids, 1));
        e->ids->ids[e->ids->n++] = id;
        *done += e->bpe->tokens[id].n_bytes;
    }
}

/* Encode text[0..n); if open, only what more text cannot change. *done: bytes encoded. */
static srf_status encode_block(struct encoder *e, const char *text, size_t n, bool open,
                               size_t *done)
{
    if (!e->added) return encode_segment(e, text, n, open, done);
    size_t known = open ? less(n, hazard(e->bpe, SRF__ADDED_RAW)) : n;
    *done = 0;
    for (;;) {
        int32_t id = -1;
        size_t at = find_added(e->bpe, SRF__ADDED_RAW, text, *done, known, n, &id), some;
        if (at < *done) return SRF_OK;
        SRF_TRY(encode_between(e, text + *done, at - *done, id < 0 && open, &some));
        *done += some;
        if (id < 0) return SRF_OK;
        SRF_TRY(srf__ids_reserve(e->ids, 1));
        e->ids->ids[e->ids->n++] = id;
        *done += e->bpe->tokens[id].n_bytes;
    }
}

srf_status srf_bpe_encode(const struct srf_bpe *bpe, const char *text, size_t n, bool added,
                          struct srf_ids *ids)
{
    struct encoder e;
    size_t done;
    int64_t before = ids->n;
    SRF_TRY(encoder_start(&e, bpe, added, ids));
    srf_status st = SRF_OK;
    if (n >= CACHE_FROM_BYTES) SRF_TRY_GO(srf__bpe_scratch_cache(&e.scratch));
    SRF_TRY_GO(encode_block(&e, text, n, false, &done));
cleanup:
    encoder_end(&e);
    if (st != SRF_OK) ids->n = before;
    return st;
}

srf_status srf_bpe_encode_stream(const struct srf_bpe *bpe, FILE *in, bool added,
                                 srf_status (*sink)(void *user, const int32_t *ids, int64_t n),
                                 void *user, int64_t *total_read)
{
    return srf__bpe_encode_stream(bpe, in, added, SRF__BPE_STREAM_BYTES, sink, user, total_read);
}

srf_status srf__bpe_encode_stream(const struct srf_bpe *bpe, FILE *in, bool added,
                                  size_t buffer_bytes,
                                  srf_status (*sink)(void *user, const int32_t *ids, int64_t n),
                                  void *user, int64_t *total_read)
{
    struct encoder e;
    struct srf_ids ids = {0};
    size_t n = 0, cap = buffer_bytes ? buffer_bytes : 1;
    char *buffer = NULL;
    SRF_TRY(encoder_start(&e, bpe, added, &ids));
    srf_status st = SRF_OK;
    if (cap >= CACHE_FROM_BYTES) SRF_TRY_GO(srf__bpe_scratch_cache(&e.scratch));
    SRF_TRY_GO(SRF_ALLOC(buffer, cap));
    for (bool open = true; open;) {
        SRF_TRY_GO(SRF_GROW(buffer, cap, n + 1)); /* full: a word longer than it */
        size_t got = fread(buffer + n, 1, cap - n, in), done;
        open = got == cap - n;
        SRF_FAIL_GO_IF(!open && ferror(in), SRF_IO, "text: %s", strerror(errno));
        n += got;
        if (total_read) *total_read += (int64_t)got;
        SRF_TRY_GO(encode_block(&e, buffer, n, open, &done));
        if (ids.n) SRF_TRY_GO(sink(user, ids.ids, ids.n));
        ids.n = 0;
        memmove(buffer, buffer + done, n - done);
        n -= done;
    }
cleanup:
    encoder_end(&e);
    srf_ids_free(&ids);
    srf__free(buffer);
    return st;
}
