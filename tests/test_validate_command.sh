#!/usr/bin/env bash
# srf validate as a command: its two files, what --json prints, and what it refuses.
source "$(dirname "$0")/shell.sh"
make_tiny_model

# has FILE TEXT...: the file holds each text.
has() {
    local file="$1" text
    shift
    for text in "$@"; do
        grep -qF -- "$text" "$file" || fail "$file lacks $text"
    done
}

validate=("$SRF" validate --model model.h5 --data text.txt --kernel-draws 4)

run "${validate[@]}" --out one -q
[ $status -eq 0 ] || die "srf validate: exit $status: $(cat stderr)"
[ ! -s stderr ] || fail "--quiet: something on stderr: $(cat stderr)"
has stdout 'kernel error' 'median head' 'one/validate.html'
[ "$(echo one/*)" = 'one/validate.html one/validate.json' ] || fail "files of a run: $(ls one)"
has one/validate.json '"kernel_chance":' '"kernel":[{' '"kind":"simplex+"' \
    '"closed_form":' '"v2":[[' '"output_error":[[' '"output_error_by_m":[{' '"positions":[{' '"kl":' \
    '"output_error_by_features":{"m":[16,' '"iid":[' '"v2_histogram":{"edges":[' '"by_draw":{' \
    '"texts":[{"prompt":' '"teacher":null' '"oprf":[' '"weights_kl":[[' '"step_error":[' \
    '"heads":2' '"head_size":16' '"kl_se":' '"nll_difference_se":' '"by_layer":[{"layer":0,' \
    '"kl_of_rounding":' '"swaps":[{"window":0,"m":16,"state_bytes":'
[ "$(grep -o '"swaps":.*' one/validate.json | grep -o '"state_bytes"' | wc -l)" -eq 15 ] ||
    fail "not all swaps"
[ "$(grep -c '^layer [01] alone: KL [0-9.]* ± [0-9.e-]*$' stdout)" -eq 2 ] &&
    grep -qE '^perplexity .* \([-+][0-9.]+ % ± [0-9.]+\), KL [0-9.]+ ± ' stdout ||
    fail "no layers, or no standard errors: $(cat stdout)"
[ "$(grep -o '"closed_form":null' one/validate.json | wc -l)" -eq 18 ] ||
    fail "simplex+ alone has no closed form"
has one/validate.html '<!DOCTYPE html>' '</html>' 'Recurrent against parallel' 'Which layer' \
    'What a swap costs'
[ "$(grep -c '<svg.*role=' one/validate.html)" -eq 11 ] || fail "a picture is missing"
[ "$(grep -o '<svg' one/validate.html | wc -l)" -eq "$(grep -o '</svg>' one/validate.html | wc -l)" ] ||
    fail "an svg element is not closed"
! command -v python3 >/dev/null || python3 "$SOURCE/tests/check_pages.py" one stdout ||
    fail "the report's numbers are not made of each other"
# What a model writes may hold anything.
! sed '/What they write/,/How hard each head/d' one/validate.html |
    grep -qE '(src|href)=|https?:|@import|nan|inf[ "<]' ||
    fail "the page needs something else, or shows no number"

# --json prints what the file holds; the same command gives the same numbers.
run "${validate[@]}" --out two -q --json
[ $status -eq 0 ] || fail "--json: exit $status"
cmp -s stdout <(cat two/validate.json; echo) || fail "--json prints something else than the file"
for file in one two; do sed 's/"seconds":[0-9.e-]*//' $file/validate.json >$file.json; done
cmp -s one.json two.json || fail "two runs differ"

# A retrofitted model beside the one it was: its own draw comes first, with the perplexity of the
# page.
"$SRF" retrofit --model model.h5 --data text.txt --out student --steps 2 --batch 2 --seq-len 32 \
    --window 8 -m 8 -q >/dev/null || die "srf retrofit"
run "$SRF" validate --model student/model.h5 --teacher model.h5 --data text.txt --out taught -q \
    --kernel-draws 4 --draws 3
[ $status -eq 0 ] || fail "--teacher: exit $status: $(cat stderr)"
has taught/validate.json '"teacher":"model.h5"' '"window":8'
has taught/validate.html 'the teacher' 'What they write'
# Positions stretched since: what is written ends where those of the teacher do.
succeed "$SRF" import student/model.h5 longer.h5 --max-positions 128
succeed "$SRF" validate --model longer.h5 --teacher model.h5 --data text.txt --out longer -q \
    --seq-len 64 --draws 2 --kernel-draws 4
has longer/validate.json '"texts":[{"prompt":'
own=$(grep -o '"ppl":[0-9.]*' taught/validate.json | head -1 | cut -c7-16)
has taught/validate.json "\"by_draw\":{\"first\":"
grep -o '"by_draw":{[^}]*}' taught/validate.json | grep -F "\"ppl\":[${own%?}" >/dev/null ||
    fail "draw 0 is not the model's own: $own, $(grep -o '"by_draw":{[^}]*}' taught/validate.json)"

# What is said of draws is the same of a model that holds trained features and of its weights alone.
succeed "$SRF" retrofit --model model.h5 --data text.txt --out holds --steps 9 --batch 2 \
    --seq-len 32 --window 8 -m 16 --plan 0 --features-lr 0.3 -q
succeed "$SRF" export holds/model.h5 alone --format hf
for model in holds/model.h5 alone; do
    succeed "$SRF" validate --model $model --data text.txt -m 16 -W 8 --out of -q --draws 2 \
        --kernel-draws 4
    cp of/validate.json ${model%/*}.json
done
python3 - <<'END' || fail "trained features are taken for a draw"
import json
holds, alone = (json.load(open(f"{name}.json")) for name in ("holds", "alone"))
assert holds["kl"] != alone["kl"] and holds["by_draw"]["ppl"][1] == alone["by_draw"]["ppl"][1]
for key in ("swaps", "output_error_by_features", "weights_kl_by_features"):
    assert holds[key] == alone[key], key
END

# Other settings, a number of features of its own, and names that HTML must escape.
cp text.txt 'a<b>&.txt'
run "$SRF" validate --model model.h5 --data 'a<b>&.txt' --out three -q --kernel-draws 4 \
    --draws 2 --max-tokens 100 --seq-len 48 -m 40 -W 8 --features orthogonal --share-heads
[ $status -eq 0 ] || fail "srf validate with settings: exit $status: $(cat stderr)"
has three/validate.html 'a&lt;b&gt;&amp;.txt' 'orthogonal m=40'
has three/validate.json '"m":40' '"window":8' '"tokens":96' 'a<b>&.txt'

# reject EXIT OPTION...
reject() {
    refuse "$1" '' "$SRF" validate -q "${@:2}" --out bad
}
sed 's/2048/2050/' config.json >other.json
"$SRF" train --init other.json --tokenizer "$SOURCE/checkpoints/tiny-gpt2/tokenizer.json" \
    --data text.txt --out other --steps 1 --batch 1 --seq-len 32 -q >/dev/null || die "srf train"
reject 2 --model model.h5
reject 2 --model model.h5 --data text.txt --draws 1
reject 2 --model model.h5 --data text.txt --max-tokens 0
reject 1 --model model.h5 --data text.txt --max-tokens 31 --seq-len 32
reject 1 --model model.h5 --data text.txt --seq-len 65
reject 1 --model model.h5 --data text.txt --features best
reject 1 --model model.h5 --data text.txt --teacher no-such-file
reject 1 --model model.h5 --data text.txt --teacher other/model.h5
reject 1 --model no-such-file --data text.txt
reject 1 --model model.h5 --data no-such-file
echo 'short' >short.txt
reject 1 --model model.h5 --data short.txt
reject 1 --model model.h5 --data text.txt --attention softmax
run "${validate[@]}" -q --out text.txt
[ $status -eq 1 ] || fail "--out that is a file: exit $status"
run "${validate[@]}" -q --out text.txt/run
[ $status -eq 1 ] || fail "--out below a file: exit $status"
run "${validate[@]}" -q --out new/parents/run --seed 5
[ $status -eq 0 ] && [ -f new/parents/run/validate.json ] || fail "--out of three new folders"
run "${validate[@]}" -q --out same --features-seed 5
cmp -s <(sed 's/"seconds":[0-9.e-]*//' new/parents/run/validate.json) \
    <(sed 's/"seconds":[0-9.e-]*//' same/validate.json) || fail "--seed is not --features-seed"
! cmp -s <(sed 's/"seconds":[0-9.e-]*//' one/validate.json) \
    <(sed 's/"seconds":[0-9.e-]*//' same/validate.json) || fail "--seed changes nothing"
finish
