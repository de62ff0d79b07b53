#!/usr/bin/env bash
# scripts/make_recall.py and srf eval --recall: what train and eval read, distances as asked for.
source "$(dirname "$0")/shell.sh"

command -v python3 >/dev/null || { finished=1; exit 77; }
for task in recall copy; do
    run python3 "$SOURCE/scripts/make_recall.py" $task --task $task --tokens 20000 --heldout 6000 \
        --distance 32 128 --live 4 --context 256 --width 64
    [ $status -eq 0 ] || die "make_recall.py: $(cat stderr)"
    from="$(grep -oE 'recall-from [0-9]+' stdout | grep -oE '[0-9]+')"
    "$SRF" train --init $task/config.json --data $task/train.npy --out run-$task --steps 2 \
        --batch 2 --seq-len 64 --threads 1 --quiet >/dev/null || die "train on $task failed"
    run "$SRF" eval --model run-$task/model.h5 --data $task/heldout.npy --recall \
        --recall-from "$from" --json --quiet --threads 1
    [ $status -eq 0 ] || die "eval --recall: $(cat stderr)"
    python3 - <<'END' || fail "$task: $(cat stdout)"
import json
rows = json.load(open("stdout"))["recall"]
n = {row["from"]: row["n"] for row in rows}
far = n.get(32, 0) + n.get(64, 0) + n.get(128, 0)  # an event may have to wait for another
assert far > 100 and far > 0.9 * sum(n.values()), n
assert all(row["ppl"] > 1 and 0 <= row["known"] <= 1 for row in rows), rows
END
done
run "$SRF" eval --model run-copy/model.h5 --data copy/heldout.npy --recall --quiet --threads 1
grep -qE '^ +64 to 127 back: [0-9]+, perplexity' stdout || fail "$(cat stdout)"
run "$SRF" eval --model run-copy/model.h5 --data copy/heldout.npy --recall-from 3
[ $status -eq 2 ] || fail "--recall-from alone: exit $status"
run python3 "$SOURCE/scripts/make_recall.py" none --tokens -5
{ [ $status -eq 2 ] && [ ! -e none ]; } || fail "make_recall.py of -5 tokens: exit $status"
finish
