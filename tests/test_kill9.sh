#!/usr/bin/env bash
# kill -9 at a random moment of `srf retrofit`: there is always a whole checkpoint, and a resumed
# run ends bit for bit where an undisturbed one does. SRF_KILL_TESTS: how many times (3).
source "$(dirname "$0")/shell.sh"

times="${SRF_KILL_TESTS:-3}"
RANDOM="${SRF_TEST_SEED:-17}"
steps=120
save_every=5

# Features are redrawn, then frozen and trained; two teachers' signals: all that a resume restores.
retrofit=("$SRF" retrofit --model model.h5 --data text.txt --steps "$steps" --batch 4
    --micro-batch 2 --seq-len 32 --m 8 --window 8 --redraw-every 3 --freeze-at 0.5
    --train-features --kl 1 --mse 1 --save-every "$save_every"
    --val text.txt --eval-every $((4 * save_every)) --eval-tokens 400 --threads 2 --quiet)
resume=("$SRF" retrofit --resume --data text.txt --val text.txt --threads 2 --quiet)

# All of the log but the speed.
metrics() {
    sed 's/, "tokens_per_s": [^,}]*//' "$1/metrics.jsonl"
}

now_ms() {
    date +%s%3N
}

# start_and_kill DIR MS COMMAND...: runs it in DIR; kills it MS milliseconds after the run's first
# checkpoint is there (saved before the first step), if it still runs.
start_and_kill() {
    local dir="$1" ms="$2" pid
    shift 2
    "$@" --out "$dir" >/dev/null 2>&1 &
    pid=$!
    while [ ! -f "$dir/last.h5" ] && kill -0 $pid 2>/dev/null; do sleep 0.01; done
    sleep "$(awk -v ms="$ms" 'BEGIN { print ms / 1000 }')"
    kill -9 $pid 2>/dev/null
    wait $pid 2>/dev/null
}

make_tiny_model
start=$(now_ms)
"${retrofit[@]}" --out whole >/dev/null || die "the undisturbed run failed"
length=$(($(now_ms) - start))
[ "$(metrics whole | wc -l)" -eq $steps ] || fail "expected $steps lines of metrics"

killed=0
for ((i = 1; i <= times; i++)); do
    run=run$i
    mkdir $run
    : >$run/last.h5.tmp.1 # of a run that was killed before
    at=$((length * (RANDOM % 60) / 100))
    start_and_kill $run $at "${retrofit[@]}"
    # A second kill while it resumes.
    start_and_kill $run $((length * (RANDOM % 60) / 100)) "${resume[@]}"
    [ -f $run/model.h5 ] || killed=$((killed + 1))
    "$SRF" info $run/last.h5 >/dev/null || fail "run $i, killed after $at ms: no whole checkpoint"
    "${resume[@]}" --out $run >/dev/null || fail "run $i, killed after $at ms: resume failed"
    [ "$(ls $run | tr '\n' ' ')" = "last.h5 metrics.jsonl model.h5 training.html " ] ||
        fail "run $i, killed after $at ms: left $(ls $run)"
    cmp <(metrics whole) <(metrics $run) || fail "run $i, killed after $at ms: other metrics"
    cmp whole/model.h5 $run/model.h5 || fail "run $i, killed after $at ms: other weights"
    cmp whole/last.h5 $run/last.h5 || fail "run $i, killed after $at ms: another state"
    rm -rf $run
done
echo "$killed of $times runs were interrupted before their end; an undisturbed one takes $length ms"
finish
