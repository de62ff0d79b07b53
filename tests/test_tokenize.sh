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
finish
