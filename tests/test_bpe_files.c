/* The tokenizer's files: every form gives the same tokenizer; what is malformed or asks for more is
 * refused with the place named; no allocation failure leaks (the sanitizer build looks). */
#include "data/bpe_internal.h"
#include "tests/ref/bpe.h"
#include "tests/scratch.h"

static struct srf_rng rng_at(uint32_t stream)
{
    return srf_rng_at(test_seed(), SRF_RNG_TEST, 1, stream, 0);
}

/* Same ids for the same texts. */
static void expect_same(const struct srf_bpe *a, const struct srf_bpe *b, const struct ref_bpe *ref)
{
    char text[512];
    struct srf_rng rng = rng_at(99);
    for (int i = 0; i < 50; i++) {
        struct srf_ids x = {0}, y = {0};
        int n = ref_text(&rng, ref, 200, text);
        test_ok(srf_bpe_encode(a, text, (size_t)n, true, &x));
        test_ok(srf_bpe_encode(b, text, (size_t)n, true, &y));
        assert_int_equal(x.n, y.n);
        assert_memory_equal(x.ids, y.ids, (size_t)x.n * sizeof *x.ids);
        srf_ids_free(&x);
        srf_ids_free(&y);
    }
}

static void forms_agree(void **state)
{
    (void)state;
    struct ref_bpe *ref = malloc(sizeof *ref);
    struct srf_rng rng = rng_at(1);
    for (int k = 0; k < 10; k++) {
        struct srf_bpe *a, *b, *c;
        char *json, *again, h[3][17];
        ref_bpe_random(&rng, 200, ref);
        json = ref_bpe_json(ref, k % 2);
        test_ok(srf_bpe_from_json(json, strlen(json), &a));
        free(json);
        json = ref_bpe_json(ref, !(k % 2));
        test_ok(srf_bpe_from_json(json, strlen(json), &b));
        free(json);
        test_ok(srf_bpe_to_json(a, &again));
        test_ok(srf_bpe_from_json(again, strlen(again), &c));
        srf_bpe_hash(a, h[0]);
        srf_bpe_hash(b, h[1]);
        srf_bpe_hash(c, h[2]);
        assert_string_equal(h[0], h[1]);
        assert_string_equal(h[0], h[2]);
        expect_same(a, b, ref);
        expect_same(a, c, ref);
        char *twice;
        test_ok(srf_bpe_to_json(c, &twice));
        assert_string_equal(again, twice);
        srf__free(twice);
        srf__free(again);
        srf_bpe_free(a);
        srf_bpe_free(b);
        srf_bpe_free(c);
    }
    free(ref);
}

/* The hash sees ids, contents, what is added, and the order of merges. */
static void hash_differs(void **state)
{
    (void)state;
    enum { VARIANTS = 6 };
    struct ref_bpe *ref = malloc(sizeof *ref), *changed = malloc(sizeof *changed);
    struct srf_rng rng = rng_at(2);
    char hashes[VARIANTS][17];
    ref_bpe_random(&rng, 50, ref);
    int apart[2], n_apart = 0; /* bytes that no merge joins to others */
    for (int t = 0; n_apart < 2; t++) {
        bool joined = false;
        for (int i = 0; i < ref->n_merges; i++)
            joined |= ref->merges[i].left == t || ref->merges[i].right == t;
        if (!joined) apart[n_apart++] = t;
    }
    for (int k = 0; k < VARIANTS; k++) {
        *changed = *ref;
        struct ref_token *t = changed->tokens;
        if (k == 1) t[apart[0]] = ref->tokens[apart[1]], t[apart[1]] = ref->tokens[apart[0]];
        if (k == 2) changed->n_merges--;
        if (k == 3) t[changed->n_tokens++] = (struct ref_token){"QQ", .n = 2, .added = true};
        if (k == 4) t[changed->n_tokens++] = (struct ref_token){"QR", .n = 2, .added = true};
        if (k == 5) changed->merges[0] = ref->merges[1], changed->merges[1] = ref->merges[0];
        char *json = ref_bpe_json(changed, true);
        struct srf_bpe *bpe;
        test_ok(srf_bpe_from_json(json, strlen(json), &bpe));
        srf_bpe_hash(bpe, hashes[k]);
        assert_int_equal(strlen(hashes[k]), 16);
        for (int i = 0; i < k; i++) assert_string_not_equal(hashes[i], hashes[k]);
        srf_bpe_free(bpe);
        free(json);
    }
    free(changed);
    free(ref);
}

/* A tokenizer of one's own: bytes (id = byte) and what the test adds. */
static char *small_json(const char *more_vocab, const char *merges, const char *added,
                        const char *model, const char *root, const char *pre_tokenizer)
{
    struct ref_bpe *ref = calloc(1, sizeof *ref);
    char *vocab, *unused, *text;
    size_t n;
    for (int b = 0; b < 256; b++) ref->tokens[b] = (struct ref_token){.bytes = {(char)b}, .n = 1};
    ref->n_tokens = 256;
    ref_bpe_vocab_merges(ref, &vocab, &unused);
    vocab[strlen(vocab) - 1] = '\0'; /* the closing brace */
    FILE *f = open_memstream(&text, &n);
    fprintf(f,
            "{\"version\": \"1.0\", \"added_tokens\": [%s], \"pre_tokenizer\": %s, %s "
            "\"model\": {\"type\": \"BPE\", %s \"vocab\": %s%s}, \"merges\": [%s]}}",
            added, pre_tokenizer, root, model, vocab, more_vocab, merges);
    fclose(f);
    free(vocab);
    free(unused);
    free(ref);
    return text;
}

#define BYTE_LEVEL "{\"type\": \"ByteLevel\", \"add_prefix_space\": false}"

/* What transformers writes for a GPT-2. */
#define TEMPLATE                                                                                   \
    "{\"type\": \"TemplateProcessing\", \"single\": [{\"Sequence\": {\"id\": \"A\", "              \
    "\"type_id\": 0}}], \"pair\": [], \"special_tokens\": {}}"

/* What amounts to GPT-2's tokenizer is taken however it is said. */
static void equivalent_files(void **state)
{
    (void)state;
    static const char *const pre_tokenizers[] = {
        BYTE_LEVEL, "{\"type\": \"Sequence\", \"pretokenizers\": [" BYTE_LEVEL "]}",
        "{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Split\", \"pattern\": "
        "{\"Regex\": "
        "\"'s|'t|'re|'ve|'m|'ll|'d| ?\\\\p{L}+| ?\\\\p{N}+| "
        "?[^\\\\s\\\\p{L}\\\\p{N}]+|\\\\s+(?!\\\\S)|"
        "\\\\s+\"}, \"behavior\": \"Isolated\", \"invert\": false}, {\"type\": \"ByteLevel\", "
        "\"add_prefix_space\": false, \"use_regex\": false}]}"};
    static const char *const roots[] = {
        "\"truncation\": null, \"padding\": null, \"normalizer\": null, \"post_processor\": "
        "{\"type\": \"ByteLevel\", \"trim_offsets\": false},",
        "\"truncation\": {\"max_length\": 20}, \"padding\": {\"pad_id\": 0}, "
        "\"post_processor\": " TEMPLATE ",",
        "\"normalizer\": {\"type\": \"Sequence\", \"normalizers\": []}, \"post_processor\": "
        "{\"type\": \"Sequence\", \"processors\": [{\"type\": \"ByteLevel\"}, " TEMPLATE
        "]}, \"decoder\": {\"type\": \"ByteLevel\"},"};
    static const char *const models[] = {
        "", "\"dropout\": null, \"unk_token\": null, \"fuse_unk\": false,",
        "\"unk_token\": \"a\", \"continuing_subword_prefix\": \"\", \"byte_fallback\": false,"};
    char hash[17], first[17] = "";
    for (int k = 0; k < 3; k++)
        for (int i = 0; i < 3; i++) {
            struct srf_bpe *bpe;
            char *json = small_json(", \"ab\": 256", "\"a b\"", "", models[i], roots[k],
                                    pre_tokenizers[(i + k) % 3]);
            test_ok(srf_bpe_from_json(json, strlen(json), &bpe));
            srf_bpe_hash(bpe, hash);
            if (!first[0]) strcpy(first, hash);
            assert_string_equal(hash, first);
            srf_bpe_free(bpe);
            free(json);
        }
}

/* Rows: one thing wrong, and what the message must name. */
static void refused(void **state)
{
    (void)state;
    static const struct {
        const char *vocab, *merges, *added, *model, *root, *pre_tokenizer, *says;
        srf_status status;
    } rows[] = {
        {"", "", "", "", "", "null", "pre_tokenizer: expected ByteLevel, found null",
         SRF_UNSUPPORTED},
        {"", "", "", "", "", "{\"type\": \"Whitespace\"}", "found Whitespace", SRF_UNSUPPORTED},
        {"", "", "", "", "", "{\"type\": \"ByteLevel\", \"add_prefix_space\": true}",
         "add_prefix_space: expected false", SRF_UNSUPPORTED},
        {"", "", "", "", "", "{\"type\": \"ByteLevel\"}", "add_prefix_space: expected false",
         SRF_UNSUPPORTED},
        {"", "", "", "", "",
         "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"use_regex\": false}",
         "use_regex: expected true", SRF_UNSUPPORTED},
        {"", "", "", "", "",
         "{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Split\", \"pattern\": "
         "{\"Regex\": \"x+\"}}, " BYTE_LEVEL "]}",
         "pattern: expected GPT-2's, found x+", SRF_UNSUPPORTED},
        {"", "", "", "", "", "{\"type\": \"Sequence\", \"pretokenizers\": []}",
         "1 or 2 steps, found 0", SRF_UNSUPPORTED},
        {"", "", "", "", "\"normalizer\": {\"type\": \"NFC\"},", BYTE_LEVEL,
         "normalizer: expected null, found NFC", SRF_UNSUPPORTED},
        {"", "", "", "", "\"post_processor\": {\"type\": \"TemplateProcessing\"},", BYTE_LEVEL,
         "post_processor", SRF_UNSUPPORTED},
        {"", "", "", "", "\"decoder\": " TEMPLATE ",", BYTE_LEVEL, "decoder", SRF_UNSUPPORTED},
        {"", "", "", "", "\"decoder\": {\"type\": \"WordPiece\"},", BYTE_LEVEL, "decoder",
         SRF_UNSUPPORTED},
        {"", "", "", "",
         "\"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": [{\"SpecialToken\": "
         "{\"id\": \"<s>\"}}, {\"Sequence\": {\"id\": \"A\"}}]},",
         BYTE_LEVEL, "post_processor: expected no token beside the text, found <s>",
         SRF_UNSUPPORTED},
        {"", "", "", "", "\"new_thing\": 1,", BYTE_LEVEL, "new_thing", SRF_UNSUPPORTED},
        {"", "", "", "\"dropout\": 0.1,", "", BYTE_LEVEL, "model.dropout", SRF_UNSUPPORTED},
        {"", "", "", "\"byte_fallback\": true,", "", BYTE_LEVEL, "model.byte_fallback",
         SRF_UNSUPPORTED},
        {"", "", "", "\"ignore_merges\": true,", "", BYTE_LEVEL, "model.ignore_merges",
         SRF_UNSUPPORTED},
        {"", "", "", "\"end_of_word_suffix\": \"</w>\",", "", BYTE_LEVEL, "end_of_word_suffix",
         SRF_UNSUPPORTED},
        {"", "\"a b\"", "", "", "", BYTE_LEVEL, "the result is not in the vocabulary", SRF_FORMAT},
        {"", "\"a zz\"", "", "", "", BYTE_LEVEL, "the right part is not", SRF_FORMAT},
        {"", "\"zz a\"", "", "", "", BYTE_LEVEL, "the left part is not", SRF_FORMAT},
        {", \"ab\": 256", "\"ab\"", "", "", "", BYTE_LEVEL, "expected 'left right', found 'ab'",
         SRF_FORMAT},
        {", \"ab\": 256", "\"a  b\"", "", "", "", BYTE_LEVEL, "expected 'left right'", SRF_FORMAT},
        {", \"ab\": 256", "[\"a\"]", "", "", "", BYTE_LEVEL, "merge 0: expected two strings",
         SRF_FORMAT},
        {", \"ab\": 256", "7", "", "", "", BYTE_LEVEL, "found a whole number", SRF_FORMAT},
        {", \"ab\": 256", "\"a b\", [\"a\", \"b\"]", "", "", "", BYTE_LEVEL,
         "merge 1 repeats merge 0", SRF_FORMAT},
        {", \"ab\": 97", "", "", "", "", BYTE_LEVEL, "id 97 belongs to", SRF_FORMAT},
        {", \"ab\": -1", "", "", "", "", BYTE_LEVEL, "id -1 of token 'ab'", SRF_FORMAT},
        {", \"ab\": 4294967296", "", "", "", "", BYTE_LEVEL, "id 4294967296", SRF_FORMAT},
        {", \"ab\": 1.5", "", "", "", "", BYTE_LEVEL, "id of 'ab': expected a whole number",
         SRF_FORMAT},
        {", \"\": 256", "", "", "", "", BYTE_LEVEL, "token 256 is empty", SRF_FORMAT},
        {", \"a\": 256", "", "", "", "", BYTE_LEVEL, "duplicate", SRF_FORMAT},
        {", \"a\\u0000\": 256", "", "", "", "", BYTE_LEVEL, "not JSON", SRF_FORMAT},
        {", \"\xff\": 256", "", "", "", "", BYTE_LEVEL, "not JSON", SRF_FORMAT},
        {"", "", "{\"id\": 97, \"content\": \"<x>\"}", "", "", BYTE_LEVEL,
         "id 97 of '<x>' belongs to another token", SRF_FORMAT},
        {"", "", "{\"id\": 256, \"content\": \"a\"}", "", "", BYTE_LEVEL, "'a' has id 256, but",
         SRF_FORMAT},
        {"", "", "{\"id\": 256, \"content\": \"\"}", "", "", BYTE_LEVEL, "is empty", SRF_FORMAT},
        {"", "", "{\"id\": 256}", "", "", BYTE_LEVEL, "entry 0: expected an id and a content",
         SRF_FORMAT},
        {"", "", "{\"id\": 256, \"content\": \"x y\", \"rstrip\": true}", "", "", BYTE_LEVEL,
         "rstrip of 'x y'", SRF_UNSUPPORTED},
        {"", "", "{\"id\": 256, \"content\": \"x\", \"mystery\": true}", "", "", BYTE_LEVEL,
         "mystery", SRF_UNSUPPORTED},
        {"", "", "{\"id\": 256, \"content\": \"xy\"}, {\"id\": 256, \"content\": \"xy\"}", "", "",
         BYTE_LEVEL, "occurs twice", SRF_FORMAT},
        {"", "", "{\"id\": 32, \"content\": \"\xc4\xa0\"}", "", "", BYTE_LEVEL,
         "stands for other bytes", SRF_UNSUPPORTED},
        /* the tokenizers library counts on, whatever ids the file has */
        {"", "", "{\"id\": 300, \"content\": \"<x>\"}", "", "", BYTE_LEVEL,
         "id of '<x>': expected 256, as the tokenizers library counts", SRF_UNSUPPORTED},
        {"", "", "{\"id\": 257, \"content\": \"<x>\"}, {\"id\": 256, \"content\": \"<y>\"}", "", "",
         BYTE_LEVEL, "id of '<x>': expected 256", SRF_UNSUPPORTED},
        {"", "", "{\"id\": 256, \"content\": \"<x>\"}, {\"id\": 258, \"content\": \"<y>\"}", "", "",
         BYTE_LEVEL, "id of '<y>': expected 257", SRF_UNSUPPORTED},
        {", \"ab\": 257", "", "{\"id\": 256, \"content\": \"<x>\"}", "", "", BYTE_LEVEL,
         "id of '<x>': expected 257", SRF_UNSUPPORTED},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct srf_bpe *bpe;
        char *json = small_json(rows[i].vocab, rows[i].merges, rows[i].added, rows[i].model,
                                rows[i].root, rows[i].pre_tokenizer);
        test_fails(srf_bpe_from_json(json, strlen(json), &bpe), rows[i].status, rows[i].says);
        assert_null(bpe);
        free(json);
    }
    static const struct {
        const char *text, *says;
    } roots[] = {
        {"", "not JSON"},
        {"[]", "expected an object, found an array"},
        {"{}", "model: expected an object, found nothing"},
        {"{\"version\": 2}", "version: expected 1.0"},
        {"{\"model\": {\"type\": \"Unigram\"}}", "model.type: expected BPE, found Unigram"},
        {"{\"model\": {}}", "vocab: expected an object"},
        {"{\"model\": {\"vocab\": {}}}", "model.merges: expected an array"},
        {"{\"model\": {\"vocab\": {}, \"merges\": []}, \"pre_tokenizer\": " BYTE_LEVEL "}",
         "no tokens"}};
    for (size_t i = 0; i < sizeof roots / sizeof *roots; i++) {
        struct srf_bpe *bpe;
        srf_status st = srf_bpe_from_json(roots[i].text, strlen(roots[i].text), &bpe);
        assert_int_not_equal(st, SRF_OK);
        test_fails(st, st, roots[i].says);
    }
}

/* A vocabulary without some byte loads; that byte cannot be encoded, everything else can. */
static void missing_byte(void **state)
{
    (void)state;
    static const char json[] = "{\"pre_tokenizer\": " BYTE_LEVEL ", \"model\": {%s \"vocab\": "
                               "{\"a\": 0, \"b\": 5, \"ab\": 3}, \"merges\": [\"a b\"]}}";
    char text[512];
    struct srf_bpe *bpe;
    struct srf_ids ids = {0};
    snprintf(text, sizeof text, json, "");
    test_ok(srf_bpe_from_json(text, strlen(text), &bpe));
    assert_int_equal(srf_bpe_vocab_size(bpe), 6);
    test_ok(srf_bpe_encode(bpe, "abba", 4, true, &ids));
    assert_int_equal(ids.n, 3);
    assert_memory_equal(ids.ids, ((int32_t[]){3, 5, 0}), 12);
    test_fails(srf_bpe_encode(bpe, "aba\n", 4, true, &ids), SRF_INVALID, "byte 0x0a has no token");
    assert_int_equal(ids.n, 3);
    char *out;
    test_fails(srf_bpe_decode(bpe, (int32_t[]){0, 1}, 2, NULL, &out, NULL), SRF_INVALID,
               "id 1 at 1");
    srf_ids_free(&ids);
    srf_bpe_free(bpe);
    snprintf(text, sizeof text, json, "\"unk_token\": \"a\", ");
    test_fails(srf_bpe_from_json(text, strlen(text), &bpe), SRF_UNSUPPORTED, "model.unk_token");
}

static void write_text(const char *dir, const char *name, const char *text)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    test_spit(path, text, strlen(text));
}

static int32_t load_and_find(const char *path, const char *token, char hash[17])
{
    struct srf_bpe *bpe;
    test_ok(srf_bpe_load(path, &bpe));
    int32_t id = srf_bpe_token_id(bpe, token);
    srf_bpe_hash(bpe, hash);
    srf_bpe_free(bpe);
    return id;
}

/* Directories and files under all their names. */
static void paths(void **state)
{
    (void)state;
    char dir[128], path[256], hash[4][17];
    struct ref_bpe *ref = malloc(sizeof *ref);
    struct srf_rng rng = rng_at(3);
    struct srf_bpe *bpe;
    char *vocab, *merges, *json;
    ref_bpe_random(&rng, 60, ref);
    while (ref->tokens[ref->n_tokens - 1].added) ref->n_tokens--;
    ref_bpe_vocab_merges(ref, &vocab, &merges);

    test_ok(srf_bpe_from_vocab_merges(vocab, strlen(vocab), merges, strlen(merges), &bpe));
    srf_bpe_hash(bpe, hash[0]);
    test_ok(srf_bpe_to_json(bpe, &json));
    srf_bpe_free(bpe);

    mkdir(test_at(dir, "t"), 0777);
    test_fails(srf_bpe_load(dir, &bpe), SRF_IO, "no tokenizer: expected tokenizer.json");
    test_fails(srf_bpe_load(test_at(path, "nowhere"), &bpe), SRF_IO, "No such file");
    write_text(dir, "encoder.json", vocab);
    test_fails(srf_bpe_load(dir, &bpe), SRF_IO, "expected merges.txt or vocab.bpe beside it");
    write_text(dir, "vocab.bpe", merges);
    load_and_find(dir, "a", hash[1]);
    assert_string_equal(hash[0], hash[1]);
    load_and_find(test_at(path, "t/encoder.json"), "a", hash[1]);
    assert_string_equal(hash[0], hash[1]);
    write_text(dir, "vocab.json", vocab);
    write_text(dir, "merges.txt", merges);
    write_text(dir, "added_tokens.json", "{\"<pad>\": 2000}");
    assert_int_equal(load_and_find(dir, "<pad>", hash[1]), 2000);
    assert_string_not_equal(hash[0], hash[1]);
    /* Its tokenizer.json has the token in the vocabulary, where the tokenizers library finds it:
     * the library would give one outside the next id. */
    test_ok(srf_bpe_load(dir, &bpe));
    char *holes;
    test_ok(srf_bpe_to_json(bpe, &holes));
    srf_bpe_free(bpe);
    assert_non_null(strstr(strstr(holes, "\"vocab\""), "\"<pad>\": 2000"));
    test_ok(srf_bpe_from_json(holes, strlen(holes), &bpe));
    srf__free(holes);
    srf_bpe_hash(bpe, hash[2]);
    assert_string_equal(hash[1], hash[2]);
    srf_bpe_free(bpe);
    write_text(dir, "added_tokens.json", "{\"<pad>\": \"2000\"}");
    test_fails(srf_bpe_load(dir, &bpe), SRF_FORMAT, "id of '<pad>': expected a whole number");
    write_text(dir, "tokenizer.json", json);
    load_and_find(dir, "a", hash[1]);
    assert_string_equal(hash[0], hash[1]);
    write_text(dir, "merges.txt", "#version: 0.2\na b c\n");
    unlink(test_at(path, "t/added_tokens.json"));
    test_fails(srf_bpe_load(test_at(path, "t/vocab.json"), &bpe), SRF_FORMAT, "found 'a b c'");

    /* Windows line ends, no version line, no end of the last line; <|endoftext|> is an added token
     * where the vocabulary has it. */
    free(vocab);
    free(merges);
    static const char lines[] = "a b\r\nab c";
    char *small =
        small_json(", \"ab\": 256, \"abc\": 257, \"<|endoftext|>\": 258", "", "", "", "", "null");
    char *begin = strstr(small, "\"vocab\": ") + strlen("\"vocab\": ");
    *(strstr(begin, "}, \"merges\"") + 1) = '\0';
    test_ok(srf_bpe_from_vocab_merges(begin, strlen(begin), lines, strlen(lines), &bpe));
    struct srf_ids ids = {0};
    test_ok(srf_bpe_encode(bpe, "abc<|endoftext|>ab", 18, true, &ids));
    assert_int_equal(ids.n, 3);
    assert_memory_equal(ids.ids, ((int32_t[]){257, 258, 256}), 12);
    ids.n = 0;
    test_ok(srf_bpe_encode(bpe, "<|endoftext|>", 13, false, &ids));
    assert_int_equal(ids.n, 13);
    srf_ids_free(&ids);
    srf_bpe_free(bpe);
    free(small);
    srf__free(json);
    free(ref);
}

static srf_status drop(void *user, const int32_t *ids, int64_t n)
{
    (void)user, (void)ids, (void)n;
    return SRF_OK;
}

static srf_status use_everything(const char *json, const char *text, int n)
{
    struct srf_bpe *bpe = NULL;
    struct srf_ids ids = {0};
    char *back = NULL, *again = NULL;
    FILE *f = fmemopen((char *)(uintptr_t)text, (size_t)n, "rb");
    srf_status st = srf_bpe_from_json(json, strlen(json), &bpe);
    if (st == SRF_OK) st = srf_bpe_encode(bpe, text, (size_t)n, true, &ids);
    if (st == SRF_OK) st = srf_bpe_decode(bpe, ids.ids, ids.n, NULL, &back, NULL);
    if (st == SRF_OK) st = srf_bpe_to_json(bpe, &again);
    if (st == SRF_OK) st = srf__bpe_encode_stream(bpe, f, true, 16, drop, NULL, NULL);
    fclose(f);
    srf__free(back);
    srf__free(again);
    srf_ids_free(&ids);
    srf_bpe_free(bpe);
    return st;
}

/* With the n-th allocation failing, for each n: SRF_NOMEM, and nothing leaks. */
static void allocation_failures(void **state)
{
    (void)state;
    struct ref_bpe *ref = malloc(sizeof *ref);
    static char text[8192];
    struct srf_rng rng = rng_at(4);
    ref_bpe_random(&rng, 20, ref);
    char *json = ref_bpe_json(ref, true);
    int len = ref_text(&rng, ref, 6000, text), failures = 0;
    /* PCRE2 interprets where it has no memory for its compiler: success after a failure is no end
     * yet. */
    for (int n = 0, successes = 0; successes < 10; n++) {
        srf__fail_alloc_after(n);
        srf_status st = use_everything(json, text, len);
        srf__fail_alloc_after(-1);
        successes = st == SRF_OK ? successes + 1 : 0;
        failures += st != SRF_OK;
        if (st != SRF_OK) test_fails(st, SRF_NOMEM, "out of memory");
    }
    assert_in_range(failures, 20, 1000);
    free(json);
    free(ref);
}

static srf_status stop(void *user, const int32_t *ids, int64_t n)
{
    (void)user, (void)ids, (void)n;
    SRF_FAIL(SRF_INTERRUPTED, "enough");
}

static void sink_may_stop(void **state)
{
    (void)state;
    struct srf_bpe *bpe;
    char *json = small_json("", "", "", "", "", BYTE_LEVEL), text[] = "some text of some length";
    test_ok(srf_bpe_from_json(json, strlen(json), &bpe));
    FILE *f = fmemopen(text, sizeof text, "rb");
    test_fails(srf__bpe_encode_stream(bpe, f, true, 4, stop, NULL, NULL), SRF_INTERRUPTED,
               "enough");
    fclose(f);
    srf_bpe_free(bpe);
    free(json);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(forms_agree),         cmocka_unit_test(hash_differs),
        cmocka_unit_test(equivalent_files),    cmocka_unit_test(refused),
        cmocka_unit_test(missing_byte),        cmocka_unit_test(paths),
        cmocka_unit_test(allocation_failures), cmocka_unit_test(sink_may_stop),
    };
    return cmocka_run_group_tests(tests, test_make_root, test_remove_root);
}
