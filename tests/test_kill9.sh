#!/usr/bin/env bash
# kill -9 at a random moment of `srf retrofit`: there is always a whole checkpoint, and a resumed
# run ends bit for bit where an undisturbed one does. SRF_KILL_TESTS: how many times (3).
source "$(dirname "$0")/shell.sh"

times="${SRF_KILL_TESTS:-3}"
RANDOM="${SRF_TEST_SEED:-17}"
steps=120
save_every=5

# Features are redrawn, then frozen and trained; two teachers' signals: all that a resume restores.
retrofit=("$SRF" retrofit --model model.h5 --data text.txt --steps $steps --batch 4
    --micro-batch 2 --seq-len 32 --m 8 --window 8 --redraw-every 3 --freeze-at 0.5
    --train-features --kl 1 --mse 1 --save-every $save_every --threads 2 --quiet)
resume=("$SRF" retrofit --resume --data text.txt --threads 2 --quiet)

# All of the log but the speed.
metrics() {
    sed 's/, "tokens_per_s": [^,}]*//' "$1/metrics.jsonl"
}

now_ms() {
    date +%s%3N
}

# start_and_kill MS COMMAND...: kills it MS milliseconds after its start, if it still runs.
start_and_kill() {
    local ms="$1" pid
    shift
    "$@" >/dev/null 2>&1 &
    pid=$!
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
    at=$((length * (RANDOM % 100) / 100))
    start_and_kill $at "${retrofit[@]}" --out $run
    # A second kill while it resumes.
    if [ -f $run/last.h5 ]; then
        start_and_kill $((length * (RANDOM % 100) / 100)) "${resume[@]}" --out $run
    fi
    [ -f $run/model.h5 ] || killed=$((killed + 1))
    if [ -f $run/last.h5 ]; then
        "$SRF" info $run/last.h5 >/dev/null || fail "run $i, killed after $at ms: no whole checkpoint"
        "${resume[@]}" --out $run >/dev/null || fail "run $i, killed after $at ms: resume failed"
    else
        # Killed before the first save was due: nothing to resume from, and nothing lost.
        lines=$(cat $run/metrics.jsonl 2>/dev/null | wc -l)
        [ "$lines" -le $save_every ] || fail "run $i: $lines steps done and no checkpoint"
        "${retrofit[@]}" --out $run >/dev/null || fail "run $i: the new start failed"
    fi
    cmp <(metrics whole) <(metrics $run) || fail "run $i, killed after $at ms: other metrics"
    cmp whole/model.h5 $run/model.h5 || fail "run $i, killed after $at ms: other weights"
    cmp whole/last.h5 $run/last.h5 || fail "run $i, killed after $at ms: another state"
    rm -rf $run
done
echo "$killed of $times runs were interrupted before their end; an undisturbed one takes $length ms"
finish
