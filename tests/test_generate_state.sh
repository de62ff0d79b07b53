#!/usr/bin/env bash
# srf generate: states kept in files and gone on from, a prefix fed once.
source "$(dirname "$0")/shell.sh"
command -v python3 >/dev/null || { finished=1; exit 77; }
make_tiny_model
generate=("$SRF" generate --model model.h5 --attention srf --window 8 --threads 1 --quiet)

# ok ARGUMENT..., bad EXIT WORDS ARGUMENT...: succeeds, is refused.
ok() {
    succeed "${generate[@]}" "$@"
}
bad() {
    refuse "$1" "$2" "${generate[@]}" "${@:3}"
}

# texts FILE: of a JSON result, one a line.
texts() {
    python3 -c 'import json, sys
print("\n".join(json.dumps(t) for t in json.load(open(sys.argv[1]))["texts"]))' "$1"
}

# In two or three parts as in one; greedy and sampled; alone and several.
for options in '--temperature 0' '--seed 4' '--seed 4 --batch 3'; do
    ok --prompt 'the king and the river' -n 24 --ignore-eos --json $options
    cp stdout whole
    ok --prompt 'the king and the river' -n 9 --ignore-eos --json $options --state-out a.h5
    cp stdout first
    ok --state-in a.h5 -n 1 --ignore-eos --json ${options/--batch 3/} --state-out b.h5
    cp stdout second
    ok --state-in b.h5 -n 14 --ignore-eos --json ${options/--batch 3/}
    paste -d '' <(texts first) <(texts second) <(texts stdout) | sed 's/""//g' >parts
    texts whole | cmp - parts || fail "$options: the parts make $(cat parts)"
done
# After the prompt alone, and what is said next.
ok --prompt 'the king and' -n 0 --state-out p.h5
ok --state-in p.h5 -n 12 --seed 3 --json
cp stdout after
ok --prompt 'the king and' -n 12 --seed 3 --json
cmp <(texts after) <(texts stdout) || fail "a state after the prompt goes on otherwise"
ok --state-in p.h5 --prompt ' the river' -n 12 --seed 3 --json
cp stdout after
ok --prompt 'the king and the river' -n 12 --seed 3 --json
cmp <(texts after) <(texts stdout) || fail "a state and more prompt go on otherwise"
# One state for a batch is that many alone.
ok --state-in p.h5 -n 12 --seed 3 --batch 4 --json
cp stdout four
ok --prompt 'the king and' -n 12 --seed 3 --batch 4 --json
cmp <(texts four) <(texts stdout) || fail "a forked state goes on otherwise"
run "$SRF" info b.h5
grep -q 'states of sequences' stdout && grep -Eq 'states +3' stdout || fail "info: $(cat stdout)"
ok --prompt '' -n 0 --state-out empty.h5
ok --state-in empty.h5 -n 5 --seed 1 --json
cp stdout after
ok -n 5 --seed 1 --json
cmp <(texts after) <(texts stdout) || fail "the state of an empty prompt goes on otherwise"

# A prompt of a file that goes on from a text in its middle draws what the text itself would.
ok --prompt 'the king' -n 6 --seed 3 --ignore-eos --state-out made.h5
ok --state-in made.h5 --prompt ' river' -n 8 --seed 3 --ignore-eos --json
texts stdout >one
echo '{"prompt": " river", "n": 8, "seed": 3}' >river.jsonl
ok --input river.jsonl --output river.out --state-in made.h5 --ignore-eos
python3 -c 'import json; print(json.dumps(json.load(open("river.out"))["text"]))' | cmp - one ||
    fail "a prompt of a file goes on otherwise: $(cat river.out), not $(cat one)"

# A prefix of all prompts: as if it were written before each.
prefix='the king and of a river house went saw came to unto'
for ((i = 0; i < 40; i++)); do
    prompt=" the$(printf ' hand of the king%.0s' $(seq $((i % 4))))"
    [ $i = 7 ] && prompt=
    echo "{\"id\": $i, \"prompt\": \"$prompt\"}" >>short.jsonl
    echo "{\"id\": $i, \"prompt\": \"$prefix$prompt\"}" >>long.jsonl
done
ok --input long.jsonl --output long.out -n 12
printf '%s' "$prefix" >prefix.txt
ok --input short.jsonl --output short.out --prefix "$prefix" --batch 6 -n 12
ok --input short.jsonl --output short2.out --prefix @prefix.txt --batch 2 -n 12
ok --prompt "$prefix" -n 0 --state-out prefix.h5
ok --input short.jsonl --output short3.out --state-in prefix.h5 --batch 5 -n 12
ok --prompt 'the king and of a river house' -n 0 --state-out half.h5
ok --input short.jsonl --output short4.out --state-in half.h5 --prefix ' went saw came to unto' \
    -n 12
sed 's/"prompt_tokens": [0-9]*, //' long.out >expected
for out in short short2 short3 short4; do
    sed 's/"prompt_tokens": [0-9]*, //' $out.out | cmp expected - || fail "$out: another result"
done
head -20 short.out >part.out
cp short.out.settings.json part.out.settings.json
bad 1 'made with goes_on_from' --input short.jsonl --output part.out --prefix "$prefix." \
    --batch 6 -n 12 --resume
head -2 short.jsonl >two.jsonl
ok --input two.jsonl --output two.out --prefix 'the king and' -n 2
bad 1 'made with goes_on_from' --input two.jsonl --output two.out --prefix 'the king the' -n 2 \
    --resume
ok --input short.jsonl --output part.out --prefix "$prefix" --batch 3 -n 12 --resume
cmp part.out short.out || fail "resumed with a prefix"

# Refused: other models, draws and windows; broken files; what makes no sense.
bad 1 'expected srf' --state-in p.h5 -n 3 --draw 2
bad 1 'expected srf' --state-in p.h5 -n 3 --window 16
"$SRF" train --model model.h5 --data text.txt --out other --steps 1 --batch 1 --seq-len 8 \
    --quiet >/dev/null || die "other"
run "$SRF" generate --model other/model.h5 --attention srf --window 8 --state-in p.h5 -n 3
[ $status -eq 1 ] && grep -q 'a state of another model: expected' stderr || fail "$(cat stderr)"
head -c 1000 p.h5 >cut.h5
bad 1 'cut.h5' --state-in cut.h5 -n 3
bad 1 "expected attribute kind states, found weights" --state-in model.h5 -n 3 --attention srf
bad 1 'No such file' --state-in nowhere.h5 -n 3
bad 1 'holds 3 states, expected one or as many' --state-in b.h5 -n 3 --batch 2
bad 1 'holds 3 states, expected one for all' --state-in b.h5 --input short.jsonl --output x.out
bad 1 'positions end at 64' --state-in p.h5 -n 63
bad 1 'No such file' --prompt x -n 3 --state-out nowhere/s.h5
bad 1 'is the output, too' --prompt x -n 3 --state-out model.h5
bad 2 'belongs to --state-out' --prompt x -n 0
bad 2 'belongs to --prompt' --input short.jsonl --output x.out --state-out s.h5
bad 2 'belong to --input' --prompt x --prefix y
bad 1 'No such file' --input short.jsonl --output x.out --prefix @nowhere.txt
[ ! -e x.out ] && [ ! -e s.h5 ] || fail "a refused run leaves files"
[ -z "$(find . -name '*.tmp.*')" ] || fail "temporary files are left"
finish
