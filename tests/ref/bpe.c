#include "tests/ref/bpe.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- encoding --- */

/* One pre-tokenizer piece: bytes are the first tokens; then, as long as any pair merges, the one of
 * lowest rank, leftmost. */
static int merge_piece(const struct ref_bpe *bpe, const char *piece, int n, int32_t *ids)
{
    for (int i = 0; i < n; i++) {
        ids[i] = -1;
        for (int t = 0; t < bpe->n_tokens; t++)
            if (!bpe->tokens[t].added && bpe->tokens[t].n == 1 &&
                bpe->tokens[t].bytes[0] == piece[i])
                ids[i] = t;
    }
    for (;;) {
        int best = bpe->n_merges, at = 0;
        for (int i = 0; i + 1 < n; i++)
            for (int m = 0; m < best; m++)
                if (bpe->merges[m].left == ids[i] && bpe->merges[m].right == ids[i + 1])
                    best = m, at = i;
        if (best == bpe->n_merges) return n;
        ids[at] = bpe->merges[best].result;
        n--;
        for (int i = at + 1; i < n; i++) ids[i] = ids[i + 1];
    }
}

/* The characters of ref_text and those that its broken ones can join to. */
static char class_of(long c)
{
    static const long numbers[] = {0xb2, 0xb3, 0xb9, 0xbc, 0xbd, 0xbe, 0x663, 0x2080, 0x2167};
    static const long spaces[] = {0x20, 0x85, 0xa0, 0x1680, 0x2028, 0x2029, 0x202f, 0x205f, 0x3000};
    static const long letters[] = {0xaa, 0xb5, 0xba, 0x3b1, 0x4e00, 0x4e2d, 0x1d400};
    if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) return 'L';
    if (c >= 0xc0 && c <= 0xff && c != 0xd7 && c != 0xf7) return 'L';
    if (c >= '0' && c <= '9') return 'N';
    if ((c >= 9 && c <= 13) || (c >= 0x2000 && c <= 0x200a)) return 'S';
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (c == numbers[i]) return 'N';
    for (size_t i = 0; i < sizeof spaces / sizeof *spaces; i++)
        if (c == spaces[i]) return 'S';
    for (size_t i = 0; i < sizeof letters / sizeof *letters; i++)
        if (c == letters[i]) return 'L';
    return 'O';
}

/* Write a code point as UTF-8. */
static int put_utf8(long c, char *to)
{
    if (c < 0x80) return to[0] = (char)c, 1;
    int n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (int i = n - 1; i > 0; i--, c >>= 6) to[i] = (char)(0x80 | (c & 63));
    to[0] = (char)((0xf00 >> n & 0xff) | c);
    return n;
}

/* The character at text[0..n): its class and length. Decoded leniently, it is valid if encoding it
 * again gives the same bytes; else the byte alone is a character outside every class. */
static char next_char(const char *text, int n, int *len)
{
    unsigned char c = (unsigned char)text[0];
    int want = c < 0x80 ? 1 : c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : 2;
    char again[4];
    long code = want == 1 ? c : c & (0xff >> (want + 1));
    *len = 1;
    if (c == 0x80 || want > n) return 'O';
    for (int i = 1; i < want; i++) code = code << 6 | (text[i] & 63);
    if (code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return 'O';
    if (put_utf8(code, again) != want || memcmp(again, text, (size_t)want) != 0) return 'O';
    *len = want;
    return class_of(code);
}

/* Length of the piece that begins text[0..n), by the pattern of GPT-2. */
static int piece_length(const char *text, int n)
{
    static const char *const contractions[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (int i = 0; i < 7; i++) {
        int k = (int)strlen(contractions[i]);
        if (k <= n && memcmp(text, contractions[i], (size_t)k) == 0) return k;
    }
    int len, start = 0;
    char class = next_char(text, n, &len);
    if (text[0] == ' ' && n > 1) { /* one space goes with what follows */
        char after = next_char(text + 1, n - 1, &len);
        if (after != 'S') start = 1, class = after;
    }
    int end = start, last = start; /* last: where the run's last character begins */
    while (end < n && next_char(text + end, n - end, &len) == class) last = end, end += len;
    /* The last white space of a run is left to the word behind it. */
    if (class == 'S' && end < n && last > 0) return last;
    return end;
}

static int encode_segment(const struct ref_bpe *bpe, const char *text, int n, int32_t *ids)
{
    int n_ids = 0;
    for (int at = 0; at < n;) {
        int len = piece_length(text + at, n - at);
        n_ids += merge_piece(bpe, text + at, len, ids + n_ids);
        at += len;
    }
    return n_ids;
}

/* Cut at added tokens of one class, leftmost first, longest among those that begin together. */
static int encode_around(const struct ref_bpe *bpe, const char *text, int n, bool normalized,
                         int32_t *ids)
{
    int n_ids = 0, from = 0;
    for (int at = 0; at <= n; at++) {
        int found = -1;
        for (int t = 0; t < bpe->n_tokens; t++) {
            const struct ref_token *a = &bpe->tokens[t];
            if (a->added && a->normalized == normalized && a->n <= n - at &&
                memcmp(text + at, a->bytes, (size_t)a->n) == 0 &&
                (found < 0 || a->n > bpe->tokens[found].n))
                found = t;
        }
        if (found < 0 && at < n) continue;
        n_ids += normalized ? encode_segment(bpe, text + from, at - from, ids + n_ids)
                            : encode_around(bpe, text + from, at - from, true, ids + n_ids);
        if (found < 0) break;
        ids[n_ids++] = found;
        from = at + bpe->tokens[found].n;
        at = from - 1;
    }
    return n_ids;
}

int ref_encode(const struct ref_bpe *bpe, const char *text, int n, bool added, int32_t *ids)
{
    return added ? encode_around(bpe, text, n, false, ids) : encode_segment(bpe, text, n, ids);
}

/* --- random tokenizers and texts --- */

static const char *const atoms[] = {
    "a",
    "b",
    "e",
    "l",
    "r",
    "s",
    "t",
    "v",
    "d",
    "m",
    "the",
    "and",
    "I",
    "1",
    "2",
    "20",
    "'",
    "'s",
    "'re",
    "'ll",
    "'ve",
    "'d",
    "'m",
    "n't",
    ".",
    ",",
    "!",
    "-",
    "--",
    "<",
    "|",
    ">",
    "<|",
    "|>",
    " ",
    " ",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "\v",
    "\xc3\xa9",
    "\xce\xb1",
    "\xe4\xb8\xad",
    "\xf0\x9d\x90\x80", /* letters: é α 中 bold A */
    "\xc2\xb2",
    "\xc2\xbd",
    "\xd9\xa3",
    "\xe2\x85\xa7", /* numbers: ² ½ ٣ Ⅷ */
    "\xc2\xa0",
    "\xe2\x80\x83",
    "\xe3\x80\x80",
    "\xc2\x85",
    "\xe2\x80\xa8", /* white space */
    "\xe2\x80\x94",
    "\xf0\x9f\x98\x80",
    "\xcc\x81",
    "\xe2\x80\x8b",
    "\xe1\xa0\x8e", /* others */
    "\x80",
    "\xff",
    "\xc0\x80",
    "\xe0\x81\xa1", /* a letter, an overlong one */
    "\xe0\x80\xa0", /* a space */
    "\xf0\x80\x81\xa1",
    "\xc3",
    "\xe2\x80",
    "\xf0\x9f",
    "\xed\xa0\x80",
    "\xf4\x90\x80\x80",
};
enum { N_ATOMS = sizeof atoms / sizeof *atoms };

static int below(struct srf_rng *rng, int n)
{
    return (int)srf_rng_below(rng, (uint64_t)n);
}

static int find(const struct ref_bpe *bpe, const char *bytes, int n)
{
    for (int t = 0; t < bpe->n_tokens; t++)
        if (bpe->tokens[t].n == n && memcmp(bpe->tokens[t].bytes, bytes, (size_t)n) == 0) return t;
    return -1;
}

static int add_token(struct ref_bpe *bpe, const char *bytes, int n)
{
    struct ref_token *t = &bpe->tokens[bpe->n_tokens];
    *t = (struct ref_token){.n = n};
    memcpy(t->bytes, bytes, (size_t)n);
    return bpe->n_tokens++;
}

void ref_bpe_random(struct srf_rng *rng, int n_merges, struct ref_bpe *bpe)
{
    static const char *const added[] = {"<|endoftext|>", "<|end",  "<|",   "ab", "the ",
                                        "\xe4\xb8\xad",  "\n\n\n", "'s t", "b<", "|><|"};
    char text[64], joined[2 * REF_MAX_TOKEN_BYTES];
    int bytes[256];
    memset(bpe, 0, sizeof *bpe);
    for (int b = 0; b < 256; b++) bytes[b] = b;
    for (int b = 255; b > 0; b--) {
        int k = below(rng, b + 1), swap = bytes[b];
        bytes[b] = bytes[k];
        bytes[k] = swap;
    }
    for (int b = 0; b < 256; b++) {
        char byte = (char)bytes[b];
        add_token(bpe, &byte, 1);
    }
    /* Merge two tokens that stand side by side in some text. */
    for (int tries = 0; bpe->n_merges < n_merges && tries < 100 * n_merges; tries++) {
        int32_t ids[256];
        int n = ref_text(rng, bpe, 20, text);
        int k = merge_piece(bpe, text, n, ids);
        if (k < 2) continue;
        int at = below(rng, k - 1), left = ids[at], right = ids[at + 1];
        if (below(rng, 8) == 0 && bpe->n_tokens > 256) /* out of order, and what has a rank */
            left = 256 + below(rng, bpe->n_tokens - 256);
        int total = bpe->tokens[left].n + bpe->tokens[right].n;
        bool repeats = false;
        for (int m = 0; m < bpe->n_merges; m++)
            repeats |= bpe->merges[m].left == left && bpe->merges[m].right == right;
        if (repeats || total > REF_MAX_TOKEN_BYTES) continue;
        memcpy(joined, bpe->tokens[left].bytes, (size_t)bpe->tokens[left].n);
        memcpy(joined + bpe->tokens[left].n, bpe->tokens[right].bytes,
               (size_t)bpe->tokens[right].n);
        int result = find(bpe, joined, total);
        if (result < 0) result = add_token(bpe, joined, total);
        bpe->merges[bpe->n_merges].left = left;
        bpe->merges[bpe->n_merges].right = right;
        bpe->merges[bpe->n_merges++].result = result;
    }
    for (size_t i = 0; i < sizeof added / sizeof *added; i++) {
        int n = (int)strlen(added[i]);
        if (below(rng, 3) == 0 || find(bpe, added[i], n) >= 0) continue;
        struct ref_token *t = &bpe->tokens[add_token(bpe, added[i], n)];
        t->added = true;
        t->normalized = below(rng, 2);
    }
}

int ref_text(struct srf_rng *rng, const struct ref_bpe *bpe, int n, char *text)
{
    int at = 0, kind = 0;
    while (at < n) {
        const char *atom = atoms[below(rng, N_ATOMS)];
        if (below(rng, 4) == 0) kind = below(rng, 3);
        if (kind == 1) atom = atoms[below(rng, 14)];      /* a stretch of plain words */
        if (kind == 2) atom = atoms[34 + below(rng, 10)]; /* or of white space */
        int len = (int)strlen(atom);
        const struct ref_token *t = bpe->n_tokens ? &bpe->tokens[below(rng, bpe->n_tokens)] : NULL;
        if (t && t->added) { /* rare: one, or its beginning */
            atom = t->bytes;
            len = below(rng, 2) ? t->n : 1 + below(rng, t->n);
        }
        memcpy(text + at, atom, (size_t)len);
        at += len;
    }
    return at;
}

/* --- files --- */

/* A vocabulary's name for a byte: itself if printable in Latin-1, else the next unused code point
 * from 256 on. */
static int name_of_byte(int byte, char *to)
{
    int code = 256;
    for (int b = 0; b <= byte; b++) {
        bool printable = (b > 32 && b < 127) || (b > 160 && b != 173);
        if (b == byte) return put_utf8(printable ? b : code, to);
        code += !printable;
    }
    return 0;
}

/* JSON text of a token, quoted; or as merges.txt has it. */
static void put_name(FILE *f, const struct ref_token *t, bool json)
{
    for (int i = 0; i < t->n; i++) {
        char name[4] = "";
        int n = name_of_byte((unsigned char)t->bytes[i], name);
        if (json && (name[0] == '"' || name[0] == '\\')) fputc('\\', f);
        fwrite(name, 1, (size_t)n, f);
    }
}

static void put_content(FILE *f, const struct ref_token *t)
{
    for (int i = 0; i < t->n; i++)
        if (t->bytes[i] == '\n')
            fputs("\\n", f);
        else
            fputc(t->bytes[i], f);
}

static void put_vocab(FILE *f, const struct ref_bpe *bpe)
{
    const char *comma = "";
    fputc('{', f);
    for (int t = 0; t < bpe->n_tokens; t++) {
        if (bpe->tokens[t].added) continue;
        fprintf(f, "%s\"", comma);
        put_name(f, &bpe->tokens[t], true);
        fprintf(f, "\": %d", t);
        comma = ", ";
    }
    fputc('}', f);
}

char *ref_bpe_json(const struct ref_bpe *bpe, bool pairs)
{
    char *text;
    size_t n;
    FILE *f = open_memstream(&text, &n);
    const char *comma = "";
    fputs("{\"version\": \"1.0\", \"truncation\": null, \"added_tokens\": [", f);
    for (int t = 0; t < bpe->n_tokens; t++) {
        if (!bpe->tokens[t].added) continue;
        fprintf(f, "%s{\"id\": %d, \"content\": \"", comma, t);
        put_content(f, &bpe->tokens[t]);
        fprintf(f, "\", \"lstrip\": false, \"normalized\": %s, \"special\": true}",
                bpe->tokens[t].normalized ? "true" : "false");
        comma = ", ";
    }
    fputs(
        "], \"normalizer\": null, \"pre_tokenizer\": {\"type\": \"ByteLevel\", "
        "\"add_prefix_space\": false, \"trim_offsets\": true, \"use_regex\": true}, "
        "\"decoder\": {\"type\": \"ByteLevel\"}, \"model\": {\"type\": \"BPE\", \"dropout\": null, "
        "\"vocab\": ",
        f);
    put_vocab(f, bpe);
    fputs(", \"merges\": [", f);
    for (int m = 0; m < bpe->n_merges; m++) {
        fputs(m ? ", " : "", f);
        fputs(pairs ? "[\"" : "\"", f);
        put_name(f, &bpe->tokens[bpe->merges[m].left], true);
        fputs(pairs ? "\", \"" : " ", f);
        put_name(f, &bpe->tokens[bpe->merges[m].right], true);
        fputs(pairs ? "\"]" : "\"", f);
    }
    fputs("]}}", f);
    fclose(f);
    return text;
}

void ref_bpe_vocab_merges(const struct ref_bpe *bpe, char **vocab, char **merges)
{
    size_t n;
    FILE *f = open_memstream(vocab, &n);
    put_vocab(f, bpe);
    fclose(f);
    f = open_memstream(merges, &n);
    fputs("#version: 0.2\n", f);
    for (int m = 0; m < bpe->n_merges; m++) {
        put_name(f, &bpe->tokens[bpe->merges[m].left], false);
        fputc(' ', f);
        put_name(f, &bpe->tokens[bpe->merges[m].right], false);
        fputc('\n', f);
    }
    fclose(f);
}
