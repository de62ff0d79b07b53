#!/usr/bin/env bash
# srf tokenize end to end: texts in and out, held-out documents, pipes, Ctrl-C.
source "$(dirname "$0")/shell.sh"
T="$SOURCE/checkpoints/tiny-gpt2/tokenizer.json"
[ -f "$T" ] || die "no $T"

# json KEY: a number out of the one JSON object in stdout.
json() {
    sed -n "s/.*\"$1\": \([0-9.]*\).*/\1/p" stdout
}

# A text of ten documents with everything in it, bytes that are no UTF-8 included.
for i in 0 1 2 3 4 5 6 7 8 9; do
    printf 'Document %d: it'\''s  odd.\r\n\n\tcaf\303\251 \377\300 \342\202\n' "$i"
    [ $i = 9 ] || printf '<|endoftext|>'
done >ten.txt
printf 'One more.' >one.txt

succeed "$SRF" tokenize ten.txt one.txt --tokenizer "$T" --out all.h5 --json
[ "$(json documents)" = 11 ] || fail "11 documents: $(cat stdout)"
[ "$(json bytes)" = "$(cat ten.txt one.txt | wc -c)" ] || fail "bytes: $(cat stdout)"
tokens="$(json tokens)"
succeed "$SRF" tokenize --decode all.h5 --tokenizer "$T"
cat ten.txt one.txt | cmp -s - stdout || fail "decoding does not give the texts back"

# The same through a pipe, and in a directory form of the tokenizer.
mkdir directory
cp "$T" directory/
"$SRF" tokenize - one.txt --tokenizer directory --out piped.h5 <ten.txt >/dev/null 2>stderr ||
    fail "standard input: $(cat stderr)"
cmp -s all.h5 piped.h5 || fail "standard input gives another token set than the file"

# Every third document apart: none lost, none twice, the same each time.
for i in 1 2; do
    succeed "$SRF" tokenize ten.txt --tokenizer "$T" --out kept$i.h5 --holdout-every 3 \
        --holdout-out held$i.h5 --json
done
[ "$(json documents) $(json holdout_documents)" = "7 3" ] || fail "7 and 3: $(cat stdout)"
"$SRF" tokenize one.txt --tokenizer "$T" --out one.h5 --json >one.json
one="$(sed 's/.*"tokens": \([0-9]*\).*/\1/;q' one.json)"
[ $(($(json tokens) + $(json holdout_tokens) + one)) = "$tokens" ] ||
    fail "tokens are lost: $(cat stdout) $tokens"
cmp -s kept1.h5 kept2.h5 && cmp -s held1.h5 held2.h5 || fail "two runs differ"
succeed "$SRF" tokenize --decode held1.h5 --tokenizer "$T"
[ "$(grep -aoE 'Document [0-9]' stdout | tr -d '\n')" = "Document 2Document 5Document 8" ] ||
    fail "held out: $(grep -aoE 'Document [0-9]' stdout)"

# Plain output says what there is to say.
succeed "$SRF" tokenize ten.txt --tokenizer "$T" --out again.h5
grep -qE '^again.h5: [0-9]+ tokens in 10 documents$' stdout || fail "report: $(cat stdout)"
grep -qE '^[0-9.]+ bytes/token, [0-9.]+ MB/s' stdout || fail "report: $(cat stdout)"

# The tokenizer inside a checkpoint.
make_tiny_model
succeed "$SRF" tokenize ten.txt one.txt --tokenizer model.h5 --out inside.h5
cmp -s all.h5 inside.h5 || fail "the checkpoint's tokenizer gives another token set"

# JSON lines: each a document that ends as one, by its text or by its ids.
cat >lines.jsonl <<'end'
{"text": "In the beginning", "id": 1}
{"text": ""}

{"id": 2, "text": "God caf\u00e9.<|endoftext|>"}
end
printf 'In the beginning<|endoftext|>God caf\303\251.<|endoftext|>' >lines.txt
succeed "$SRF" tokenize lines.jsonl --jsonl text --tokenizer "$T" --out lines.h5 --json
[ "$(json documents) $(json bytes)" = "2 $(($(wc -c <lines.txt) - 13))" ] ||
    fail "JSON lines: $(cat stdout)"
succeed "$SRF" tokenize lines.txt --tokenizer "$T" --out plain.h5
cmp -s lines.h5 plain.h5 || fail "JSON lines give another token set than their text"
"$SRF" tokenize - --jsonl text --tokenizer "$T" --out piped.h5 <lines.jsonl >/dev/null 2>stderr ||
    fail "JSON lines on standard input: $(cat stderr)"
cmp -s lines.h5 piped.h5 || fail "standard input gives another token set than the file"
printf '{"ids": [5, 6]}\n{"ids": []}\n{"ids": [7]}' >ids.jsonl
succeed "$SRF" tokenize ids.jsonl --jsonl ids --tokenizer "$T" --out ids.h5 --json
[ "$(json documents) $(json tokens)" = "2 5" ] || fail "lists of ids: $(cat stdout)"
# refuse_line MESSAGE LINE: as the second line, under the key "text".
refuse_line() {
    printf '{"text": "a"}\n%s\n' "$2" >bad.jsonl
    refuse 1 "bad.jsonl: line 2: $1" "$SRF" tokenize bad.jsonl --jsonl text --tokenizer "$T" \
        --out none.h5
}
refuse_line 'no "text" (--jsonl): found id, body' '{"id": 1, "body": "b"}'
refuse_line 'expected a JSON object' '["text"]'
refuse_line 'column ' '{"text": '
refuse_line '"text": expected a text or a list of token ids' '{"text": 5}'
refuse_line "\"text\": item 1: expected a token's id, 0 to 2047" '{"text": [5, 2048]}'
refuse_line "\"text\": item 0: expected a token's id" '{"text": [-1]}'
refuse_line "\"text\": item 0: expected a token's id" '{"text": ["a"]}'
refuse 2 '--jsonl belong' "$SRF" tokenize --decode lines.h5 --jsonl text --tokenizer "$T"

# What is no text is not taken for one; its line says what to do.
# refuse_file FOUND NAME: for tokenize and as data.
refuse_file() {
    refuse 1 "$2: expected a text, found $1" "$SRF" tokenize ten.txt "$2" --tokenizer "$T" \
        --out none.h5
    [ "${3-}" = good ] || refuse 1 "or plain text, found $1" \
        "$SRF" eval --model model.h5 --data "$2" --quiet
}
refuse_file 'JSON lines: srf tokenize --jsonl' lines.jsonl
gzip -c one.txt >packed
refuse_file 'a compressed file: unpack it' packed
printf 'PAR1....' >table
refuse_file 'a table (Parquet or Arrow)' table
printf 'PK\003\004' >archive
refuse_file 'a zip archive' archive
printf '\001\000\002\000' >raw
refuse_file 'no text (ids without a header' raw
cp one.txt one.bin
refuse_file 'no text (ids without a header' one.bin
printf '\210\330\064\001\001\000\000\000' >shard # llm.c's
refuse_file 'ids: give them to --data' shard good
refuse_file 'HDF5: give a token set to --data' lines.h5 good
[ ! -e none.h5 ] || fail "a refused text leaves an output"

# Ctrl-C in the middle of a stream: no output, no temporary file, the old file as it was.
echo old >stopped.h5
mkfifo pipe
exec 3<>pipe # open at both ends: the stream does not end
before="$(ls)"
"$SRF" tokenize - --tokenizer "$T" --out stopped.h5 <pipe >stdout 2>stderr 3<&- &
job=$!
yes 'some text that goes on and on' | head -c 4000000 >&3
compgen -G 'stopped.h5.tmp.*' >/dev/null || fail "no temporary file in the middle of the run"
kill -INT $job
wait $job
status=$?
exec 3<&-
[ $status -eq 1 ] || fail "Ctrl-C: exit $status"
grep -q '^srf: error: interrupted' stderr || fail "Ctrl-C: $(cat stderr)"
[ "$before" = "$(ls)" ] && [ "$(cat stopped.h5)" = old ] || fail "Ctrl-C leaves something: $(ls)"

# Nothing to make a set of; two sets, of which the first cannot take its place: neither is left.
: >empty
refuse 1 'the texts are empty' "$SRF" tokenize empty --tokenizer "$T" --out none.h5
mkdir -p taken.h5/inside
printf 'one<|endoftext|>two<|endoftext|>three' >documents
refuse 1 'taken.h5' "$SRF" tokenize documents --tokenizer "$T" --out taken.h5 --holdout-every 2 \
    --holdout-out held.h5

# A disk that is full.
"$SRF" tokenize --decode all.h5 --tokenizer "$T" >/dev/full 2>stderr &&
    fail "a full disk is no error"
[ "$(wc -l <stderr)" -eq 1 ] || fail "a full disk: $(cat stderr)"

# Not a tokenizer, but what lies beside it.
echo '{"tokenizer_class": "GPT2Tokenizer"}' >tokenizer_config.json
for name in config tokenizer_config; do
    refuse 1 "expected a tokenizer.json, found a $name.json" "$SRF" tokenize text.txt \
        --tokenizer $name.json --out t.h5
done
finish
