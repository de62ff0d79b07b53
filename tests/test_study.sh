#!/usr/bin/env bash
# scripts/study.py: rows, seeds, the table, and that nothing is run twice.
source "$(dirname "$0")/shell.sh"

command -v python3 >/dev/null || { finished=1; exit 77; }
make_tiny_model
cat >grid.json <<'END'
{"model": "model.h5", "data": "text.txt", "val": "text.txt", "seeds": [1, 2],
 "reference": "control",
 "options": {"steps": 2, "batch": 2, "seq-len": 32, "m": 8, "window": 8, "threads": 1},
 "rows": [{"name": "retrofit", "kl": [0, 1]},
          {"name": "control", "command": "train", "attention": "softmax", "m": null,
           "window": null}]}
END
study=(python3 "$SOURCE/scripts/study.py" grid.json --srf "$SRF" --out study)
run "${study[@]}"
[ $status -eq 0 ] || die "study: exit $status: $(cat stdout stderr)"
[ "$(wc -l <study/results.jsonl)" -eq 6 ] || fail "not 6 results: $(cat study/results.jsonl)"
grep -qE '^\| retrofit-kl1 \| [0-9.]+ \| [0-9.]+ \| [0-9.]+ \| 2 \|' study/table.md || fail "$(cat study/table.md)"
grep -qE '^\| recipe \| perplexity \| spread \| over control \|' study/table.md || fail "no reference"
grep -qE '^\| control \| [0-9.]+ \| [0-9.]+ \| 1.0000 \|' study/table.md || fail "$(cat study/table.md)"
grep -qF '`srf train --attention softmax`' study/table.md || fail "$(cat study/table.md)"
cp study/table.md before.md

# A study that was stopped goes on: one result is gone, and one line is half a line.
sed -i 2d study/results.jsonl
truncate -s -9 study/results.jsonl
run "${study[@]}"
grep -q '4 runs done before, 2 to go' stdout || fail "resumed: $(cat stdout)"
diff <(cut -d'|' -f1-6,8- before.md) <(cut -d'|' -f1-6,8- study/table.md) || fail "another table"

# A row that fails is named, and the others run.
sed -i 's/"kl": \[0, 1\]/"kl": [-1, 0]/' grid.json
run "${study[@]}"
[ $status -eq 1 ] || fail "a failed row: exit $status"
grep -q 'retrofit-kl-1 seed 1: srf: error: --kl' stdout || fail "a failed row: $(cat stdout)"
[ ! -e study/retrofit-kl0/1/model.h5 ] || fail "models are kept"

# A grid that is none: one line, before any run.
refuse() {
    run python3 "$SOURCE/scripts/study.py" "$1" --srf "$SRF" --out refused
    [ $status -eq 1 ] && [ "$(wc -l <stderr)" -eq 1 ] && grep -qF -- "$2" stderr ||
        fail "$1: exit $status: $(cat stderr)"
    [ ! -e refused ] || fail "$1: leaves files"
}
refuse no-such-file.json 'No such file'
echo '{"model"' >bad.json
refuse bad.json 'bad.json: '
sed 's/"reference": "control"/"reference": "nobody"/' grid.json >bad.json
refuse bad.json '"nobody": expected a perplexity, or the name of a row: retrofit-kl-1'
sed 's/"reference": "control"/"reference": -3/' grid.json >bad.json
refuse bad.json '-3: expected a perplexity'
sed 's/"reference"/"referense"/' grid.json >bad.json
refuse bad.json 'unknown key "referense"'
sed 's/"val": "text.txt", //' grid.json >bad.json
refuse bad.json '"val": expected a text, found nothing'
sed 's/"name": "control", //' grid.json >bad.json
refuse bad.json 'row 1: expected an object with a name'
finish
