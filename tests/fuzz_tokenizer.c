/* The input is parts that end at a NUL byte, after a first byte that says what they are:
 *   '{'  a tokenizer.json (the byte belongs to it)
 *   'v'  a vocab.json, a merges.txt
 *   'b'  nothing: a tokenizer of all bytes and some merges
 *   else the vocab, merges and added_tokens of a tokenizer.json
 * and then a text to encode. What loads must give every text back, whole and streamed, and survive
 * being written and read. */
#include "data/bpe_internal.h"
#include "tests/fuzz.h"

#include <string.h>

/* The next part of the input, NUL-terminated; free(). */
static char *part(const uint8_t **data, size_t *size, size_t *n)
{
    const uint8_t *end = *size ? memchr(*data, 0, *size) : NULL;
    *n = end ? (size_t)(end - *data) : *size;
    char *text = malloc(*n + 1);
    if (!text) abort();
    if (*n) memcpy(text, *data, *n);
    text[*n] = '\0';
    size_t used = *n + (end != NULL);
    *data += used;
    *size -= used;
    return text;
}

static srf_status load_bytes(struct srf_bpe **bpe)
{
    static const char more[] = "\"ab\": 256, \"abc\": 257, \"bc\": 258, \"\xc4\xa0t\": 259, "
                               "\"\xc4\xa0the\": 260, \"he\": 261, \"''\": 262, \"aa\": 263}";
    static const char merges[] = "a b\nab c\nb c\n\xc4\xa0 t\nh e\n\xc4\xa0t he\na bc\n' '\na a\n";
    char *vocab;
    size_t n;
    FILE *f = open_memstream(&vocab, &n);
    if (!f) abort();
    for (int b = 0; b < 256; b++) {
        char symbol[2];
        int len = srf__bpe_symbol_of_byte((unsigned char)b, symbol);
        fprintf(f, "%s\"%s%.*s\": %d", b ? ", " : "{", b == '"' || b == '\\' ? "\\" : "", len,
                symbol, b);
    }
    fprintf(f, ", %s", more);
    fclose(f);
    srf_status st = srf_bpe_from_vocab_merges(vocab, n, merges, sizeof merges - 1, bpe);
    if (st != SRF_OK) abort();
    free(vocab);
    return st;
}

static srf_status load(const uint8_t **data, size_t *size, struct srf_bpe **bpe)
{
    uint8_t kind = **data;
    char *a, *b = NULL, *c = NULL;
    size_t n_a, n_b, n_c;
    srf_status st;
    if (kind != '{') ++*data, --*size;
    if (kind == 'b') return load_bytes(bpe);
    a = part(data, size, &n_a);
    if (kind == '{') {
        st = srf_bpe_from_json(a, n_a, bpe);
    } else if (kind == 'v') {
        b = part(data, size, &n_b);
        st = srf_bpe_from_vocab_merges(a, n_a, b, n_b, bpe);
    } else {
        b = part(data, size, &n_b);
        c = part(data, size, &n_c);
        char *json;
        size_t n;
        FILE *f = open_memstream(&json, &n);
        if (!f) abort();
        fprintf(f,
                "{\"model\": {\"vocab\": {%s}, \"merges\": [%s]}, \"added_tokens\": [%s], "
                "\"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false}}",
                a, b, c);
        fclose(f);
        st = srf_bpe_from_json(json, n, bpe);
        free(json);
    }
    free(a);
    free(b);
    free(c);
    return st;
}

static void same_ids(const struct srf_ids *a, const struct srf_ids *b)
{
    if (a->n != b->n || (a->n && memcmp(a->ids, b->ids, (size_t)a->n * sizeof *a->ids) != 0))
        abort();
}

static void check_text(const struct srf_bpe *bpe, const char *text, size_t n, bool added)
{
    struct srf_ids whole = {0}, pieces = {0};
    if (srf_bpe_encode(bpe, text, n, added, &whole) == SRF_OK) { /* else a byte has no token */
        char *back;
        size_t n_back;
        if (srf_bpe_decode(bpe, whole.ids, whole.n, NULL, &back, &n_back) != SRF_OK) abort();
        if (n_back != n || (n && memcmp(back, text, n) != 0)) abort();
        srf__free(back);
        FILE *f = n ? fmemopen((char *)(uintptr_t)text, n, "rb") : fopen("/dev/null", "rb");
        if (!f || srf__bpe_encode_stream(bpe, f, added, 5, srf_ids_append, &pieces, NULL) != SRF_OK)
            abort();
        fclose(f);
        same_ids(&whole, &pieces);
    }
    srf_ids_free(&whole);
    srf_ids_free(&pieces);
}

static void check_json(const struct srf_bpe *bpe)
{
    char *json, hash[2][17];
    struct srf_bpe *again;
    if (srf_bpe_to_json(bpe, &json) != SRF_OK) abort();
    if (srf_bpe_from_json(json, strlen(json), &again) != SRF_OK) abort();
    srf_bpe_hash(bpe, hash[0]);
    srf_bpe_hash(again, hash[1]);
    if (strcmp(hash[0], hash[1]) != 0) abort();
    srf_bpe_free(again);
    srf__free(json);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct srf_bpe *bpe;
    if (size == 0 || load(&data, &size, &bpe) != SRF_OK) return 0;
    check_text(bpe, (const char *)data, size, true);
    check_text(bpe, (const char *)data, size, false);
    check_json(bpe);
    srf_bpe_free(bpe);
    return 0;
}
