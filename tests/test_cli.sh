#!/usr/bin/env bash
# The command line as a whole: help, mistakes, Ctrl-C. What a command computes is tested elsewhere.
source "$(dirname "$0")/shell.sh"

# help COMMAND OPTION...: --help succeeds, prints to stdout only, and mentions each option.
help() {
    local command="$1" option
    shift
    run "$SRF" "$command" --help
    [ $status -eq 0 ] || fail "srf $command --help: exit $status"
    [ ! -s stderr ] || fail "srf $command --help writes to stderr"
    grep -q "^usage: srf $command" stdout || fail "srf $command --help: no usage line"
    awk 'length > 100' stdout | grep . && fail "srf $command --help: lines over 100 columns"
    for option in "$@"; do
        grep -qE -- "(^|[ ,])$option( |$)" stdout || fail "srf $command --help: no $option"
    done
}

# Too little address space for OpenBLAS: a line, not a wait for ever. (A sanitizer needs far more;
# CUDA's libraries do, too: with less than they take the loader says so and exits with 127.)
if ! nm "$SRF" 2>/dev/null | grep __asan_ >/dev/null; then
    for limit in 200000 250000 1000000; do
        run bash -c "ulimit -v $limit; exec timeout 60 '$SRF' --version"
        [ $status -eq 0 ] || { [ $status -eq 1 ] && grep -q "ulimit -v" stderr; } ||
            { [ $status -eq 127 ] && grep -q "loading shared libraries" stderr; } ||
            fail "ulimit -v $limit: exit $status: $(cat stderr)"
    done
fi

common=(--device --threads)
attention=(--attention --m --window --features --rotation)
recipe=(--steps --batch --lr --redraw-every --freeze-at --kl --mse --seed --save-every --resume)
help import --help
help export --format
help tokenize --tokenizer --out
help info
help train --model --init --data --out "${recipe[@]}" "${attention[@]}" "${common[@]}"
help retrofit --recipe --model --data --out "${recipe[@]}" "${attention[@]}" "${common[@]}"
help eval --model --data --mode --json --per-token --logits "${attention[@]}" "${common[@]}"
help validate --model --data --out --json "${common[@]}"
help generate --model --prompt --temperature --top-k --top-p --seed --batch --json "${common[@]}"
help bench --json

run "$SRF" --help
[ $status -eq 0 ] || fail "srf --help: exit $status"
for command in import export tokenize info train retrofit eval validate generate bench; do
    grep -qw $command stdout || fail "srf --help: no $command"
done
run "$SRF" help retrofit
[ $status -eq 0 ] && grep -q '^usage: srf retrofit' stdout || fail "srf help retrofit: exit $status"
run "$SRF" --version
[ $status -eq 0 ] || fail "srf --version: exit $status"

# Mistakes of the command line: exit 2.
make_tiny_model
touch stdout stderr before
for command in import export tokenize info train retrofit eval validate generate bench; do
    refuse 2 '' "$SRF" $command --no-such-option
done
run "$SRF"
[ $status -eq 2 ] || fail "srf alone: expected exit 2, found $status"
grep -q retrofit stderr || fail "srf alone: no list of commands"
refuse 2 '' "$SRF" no-such-command
refuse 2 '' "$SRF" --no-such-option

# Mistyped: what may have been meant, or nothing.
# meant WORDS ARGUMENT...
meant() {
    local words="$1"
    shift
    refuse 2 '' "$SRF" "$@"
    grep -qF -- "$words" stderr || fail "srf $*: expected '$words' in: $(cat stderr)"
}
meant 'did you mean retrofit?' retrofti
meant 'did you mean --model?' eval --modle x
meant 'did you mean --max-tokens?' eval --max
meant 'did you mean --steps?' retrofit -steps 3
meant 'takes no value' eval --json=3
for word in --q --xyzzy "--$(printf 'a%.0s' {1..5000})"; do
    refuse 2 '' "$SRF" eval "$word"
    ! grep -q 'did you mean' stderr || fail "srf eval ${word:0:20}: $(cat stderr)"
done
for command in import export tokenize info train retrofit eval validate generate; do
    refuse 2 '' "$SRF" $command
done
refuse 2 '' "$SRF" eval --model model.h5
refuse 2 '' "$SRF" eval --model model.h5 --data
refuse 2 '' "$SRF" eval --model model.h5 --data text.txt --batch x
refuse 2 '' "$SRF" eval --model model.h5 --data text.txt --batch 12x
refuse 2 '' "$SRF" eval --model model.h5 --data text.txt --batch 0
refuse 2 '' "$SRF" eval --model model.h5 --data text.txt --seq-len 1e3
refuse 2 '' "$SRF" eval --model model.h5 --data text.txt --json=yes
refuse 2 '' "$SRF" eval --model model.h5 --data text.txt stray
refuse 2 '' "$SRF" import model.h5
refuse 2 '' "$SRF" eval --model model.h5 --data text.txt --attention srf --oprf-a 0.5
refuse 2 '' "$SRF" eval --model model.h5 --data text.txt --attention srf --oprf-a nan
refuse 2 '' "$SRF" export model.h5 out --format docx
refuse 2 '' "$SRF" generate --model model.h5 --temperature hot
refuse 2 '' "$SRF" generate --model model.h5 --temperature nan
refuse 2 '' "$SRF" generate --model model.h5 -n -3
refuse 2 '' "$SRF" retrofit --model model.h5 --data text.txt --out run --lr ''
refuse 2 '' "$SRF" retrofit --model model.h5 --data text.txt --out run --seed -1
refuse 2 '' "$SRF" train --model model.h5 --init config.json --data text.txt --out run
refuse 2 '' "$SRF" train --resume --model model.h5 --data text.txt --out run

# What only the files can tell: exit 1.
refuse 1 '' "$SRF" eval --model no-such-file --data text.txt
refuse 1 '' "$SRF" eval --model model.h5 --data no-such-file
refuse 1 '' "$SRF" eval --model text.txt --data text.txt
refuse 1 '' "$SRF" info text.txt
refuse 1 '' "$SRF" import no-such-folder out.h5
refuse 1 '' "$SRF" export no-such-file out --format hf
refuse 1 '' "$SRF" export model.h5 out.h5 --format recurrent # softmax has no fixed-size state
for option in '--m 8' '--window 8' '--features iid' '--rotation hd' '--oprf-a 0' '--draw 0' \
    '--features-seed 0' --share-heads --normalize-rows; do
    for command in eval generate 'train --out run'; do
        case $command in generate) data= ;; *) data='--data text.txt' ;; esac
        refuse 1 '' "$SRF" $command --model model.h5 $data $option
        grep -q 'add --attention srf' stderr || fail "$command $option: $(cat stderr)"
    done
done

# Results that cannot be printed are a failure.
"$SRF" info model.h5 >/dev/full 2>stderr && fail "a full disk is no error"
grep -q 'standard output' stderr || fail "info to a full disk: $(cat stderr)"

# Past the learned positions: refused, or by a stated policy, whose price is shown.
length=$("$SRF" info model.h5 | sed -n 's/^positions *//p')
refuse 1 '' "$SRF" eval --model model.h5 --data text.txt --seq-len $((length + 1))
grep -q -- --positions stderr || fail "no way past the positions: $(cat stderr)"
refuse 1 '' "$SRF" eval --model model.h5 --data text.txt --positions round
refuse 1 '' "$SRF" eval --model model.h5 --data text.txt --positions interpolate
refuse 1 '' "$SRF" eval --model model.h5 --data text.txt --positions wrap --max-positions 999
refuse 1 '' "$SRF" eval --model model.h5 --data text.txt --positions interpolate --max-positions 2
for mode in parallel recurrent; do
    for policy in wrap clamp "interpolate --max-positions $((2 * length))"; do
        run "$SRF" eval --model model.h5 --data text.txt --attention srf --mode $mode --quiet \
            --seq-len $((2 * length)) --max-tokens $((6 * length)) --positions $policy
        grep -q "at the learned positions, up to $length" stdout ||
            fail "$policy: what it costs is not shown: $(cat stdout)"
        sed -n 's/^perplexity \([0-9]*\.[0-9]\).*/\1/p' stdout >"cost.$mode.${policy%% *}"
    done
done
for policy in wrap clamp interpolate; do
    cmp -s cost.parallel.$policy cost.recurrent.$policy || fail "$policy: the forms differ"
done
cmp -s cost.parallel.wrap cost.parallel.clamp && fail "wrap and clamp are the same"

# Other draws: the ones that --draw names, after the model's own; the mean and the spread of them.
refuse 1 '' "$SRF" eval --model model.h5 --data text.txt --draws 2
grep -q 'add --attention srf' stderr || fail "--draws with softmax: $(cat stderr)"
eval_srf=("$SRF" eval --model model.h5 --data text.txt --attention srf -m 8 --max-tokens 500 -q --json)
for draw in 0 1; do
    run "${eval_srf[@]}" --draw $draw
    grep -o '"ppl": [0-9.]*' stdout | cut -c8-
done >each.draw
run "${eval_srf[@]}" --draws 2
grep -o '"ppl": \[[^]]*' stdout | cut -c9- | tr -d ' ' | tr ',' '\n' >all.draws
cmp -s each.draw all.draws || fail "--draws 2: $(cat stdout), not $(xargs <each.draw)"
[ "$(uniq all.draws | wc -l)" -eq 2 ] || fail "--draws 2: both are the same"
grep -q 'seed 0 draw 0"' stdout || fail "--draws 2: not of the model's own draw: $(cat stdout)"
grep -q '"mean": [0-9.]*, "sd": [0-9.]*, "ppl"' stdout || fail "--draws 2: no spread: $(cat stdout)"

# Features that a model holds are none of the draws whose mean and spread are told.
succeed "$SRF" retrofit --model model.h5 --data text.txt --out held --recipe pure -m 8 --steps 1 -q
eval_held=("$SRF" eval --model held/model.h5 --data text.txt --max-tokens 500 -q)
succeed "${eval_held[@]}" --draws 3 --json
python3 - stdout <<'END' || fail "--draws 3 of held features: $(cat stdout)"
import json, math, sys
draws = json.load(open(sys.argv[1]))["draws"]
own, one, two = draws["ppl"]
assert len({own, one, two}) == 3 and abs(own - (one + two) / 2) > 1e-3
assert abs(draws["mean"] - (one + two) / 2) < 1e-3
assert abs(draws["sd"] - abs(one - two) / math.sqrt(2)) < 1e-3
END
succeed "${eval_held[@]}" --draws 3
grep -q "^2 draws in place of the model's features: perplexity [0-9.]* on average" stdout ||
    fail "--draws 3 of held features: $(cat stdout)"
succeed "${eval_held[@]}" --draws 2 --json
grep -q '"sd": null' stdout || fail "one other draw has a spread: $(cat stdout)"

# So many tokens: three windows of 32, and one of what is left.
run "${eval_srf[@]}" --max-tokens 100 --seq-len 32
grep -q '"tokens": 96,' stdout || fail "--max-tokens 100: $(cat stdout)"
run "${eval_srf[@]}" --max-tokens 66 --seq-len 64 # two are left: one prediction
grep -q '"tokens": 64,' stdout || fail "--max-tokens 66: $(cat stdout)"
# 64 learned positions: the 65th prediction is made past them.
for len in 65 66; do
    run "${eval_srf[@]}" --max-tokens 660 --seq-len $len --positions wrap
    [ "$(grep -c '"ppl_past_learned": [1-9]' stdout)" -eq $((len - 65)) ] ||
        fail "past the learned positions, --seq-len $len: $(cat stdout)"
done

# Per token: as many as there are whole windows of, in their places whatever runs at once.
for batch in 1 3; do
    run "${eval_srf[@]}" --max-tokens 230 --seq-len 32 --batch $batch --logits \
        --per-token batch$batch.h5
    [ $status -eq 0 ] || fail "--per-token, batch $batch: $(cat stderr)"
done
cmp batch1.h5 batch3.h5 || fail "--per-token: other numbers in batches of 3"
size=$(stat -c %s batch1.h5) numbers=$((7 * 31 + 7 * 32 * 2048))
[ "$size" -gt $((4 * numbers)) ] && [ "$size" -lt $((4 * numbers + 20000)) ] ||
    fail "--per-token: $size bytes for $numbers numbers"
rm batch1.h5 batch3.h5

# Each setting reaches the features: none has the perplexity of another.
for option in '' '--features iid' '--rotation hd' --share-heads --normalize-rows '--oprf-a -0.1' \
    '--features-seed 1' '--draw 1' '--window 4' '--window 4 --far none' '--layer-windows 4,0'; do
    run "${eval_srf[@]}" $option
    grep -o '"ppl": [0-9.]*' stdout >>settings.ppl || fail "eval $option: $(cat stderr)"
done
[ "$(sort -u settings.ppl | wc -l)" -eq 11 ] || fail "settings without an effect: $(cat settings.ppl)"

# Outputs that would replace an input, or cannot be written: said before the work begins.
cp model.h5 precious.h5
refuse 1 '' "$SRF" eval --model model.h5 --data text.txt --per-token ./model.h5
refuse 1 '' "$SRF" eval --model model.h5 --data text.txt --per-token text.txt
refuse 1 '' "$SRF" eval --model no-such-file --data text.txt --per-token no/such/place.h5
grep -q 'no/such/place.h5' stderr || fail "eval looks at its output late: $(cat stderr)"
refuse 1 '' "$SRF" eval --model no-such-file --data text.txt --per-token .
grep -q 'Is a directory' stderr || fail "eval looks at its output late: $(cat stderr)"
refuse 1 '' "$SRF" import model.h5 ./model.h5
refuse 1 '' "$SRF" export model.h5 model.h5 --format recurrent
refuse 1 '' "$SRF" export model.h5 model.h5 --format llmc
refuse 1 '' "$SRF" import no-such-file no/such/place.h5
grep -q 'no/such/place.h5' stderr || fail "import looks at its output late: $(cat stderr)"
refuse 1 '' "$SRF" tokenize text.txt --tokenizer model.h5 --out ./model.h5
refuse 1 '' "$SRF" tokenize text.txt --tokenizer model.h5 --out out.h5 --holdout-every 2 \
    --holdout-out model.h5
refuse 1 '' "$SRF" import start/no-such-file out.h5 --tokenizer model.h5
cmp -s model.h5 precious.h5 || fail "the model was replaced"

# What has a name, but is no file: the name stays (a pipe stands for /dev/null here, which must not
# be lost where this fails). A link is followed.
mkfifo pipe
ln -s pipe link-to-pipe
ln -s nowhere link-to-nothing
touch stdout stderr before after
for out in pipe link-to-pipe; do
    words="$out: expected a file or a new name"
    refuse 1 "$words" "$SRF" import model.h5 $out
    refuse 1 "$words" "$SRF" tokenize text.txt --tokenizer model.h5 --out $out
    refuse 1 "$words" "$SRF" export model.h5 $out --format llmc
    refuse 1 "$words" "$SRF" eval --model model.h5 --data text.txt --per-token $out
    refuse 1 "$words" "$SRF" generate --model model.h5 --attention srf -n 0 --state-out $out
done
[ -p pipe ] && [ -L link-to-pipe ] || fail "a pipe was replaced: $(ls -l pipe link-to-pipe)"
refuse 1 'a link to what is not there' "$SRF" import model.h5 link-to-nothing
refuse 1 '-: expected a file' "$SRF" tokenize text.txt --tokenizer model.h5 --out -
refuse 1 'Is a directory' "$SRF" tokenize text.txt --tokenizer no-such-file --out .
mkdir far
cp text.txt far/copy.h5
ln -s far/copy.h5 link.h5
succeed "$SRF" import model.h5 link.h5
[ -L link.h5 ] && cmp far/copy.h5 model.h5 || fail "import to a link: $(ls -l link.h5 far)"
[ "$(ls far)" = copy.h5 ] || fail "import to a link leaves: $(ls far)"
rm -r far link.h5

refuse 1 '' "$SRF" retrofit --model model.h5 --data text.txt --out /dev/null/run --steps 1 \
    --window 0 --quiet
for command in retrofit validate; do
    refuse 1 '' "$SRF" $command --model no-such-file --data text.txt --out text.txt/run
    grep -q 'text.txt/run' stderr || fail "$command looks at its output late: $(cat stderr)"
done
refuse 1 '' "$SRF" retrofit --model model.h5 --data text.txt --val text.txt --eval-tokens 1 \
    --out run --seq-len 16 --window 2 --steps 1 --quiet
refuse 1 '' "$SRF" retrofit --model model.h5 --data text.txt --out run --rotation hd --features none
refuse 1 '' "$SRF" train --init no-such-file --data text.txt --out run
refuse 1 '' "$SRF" train --resume --data text.txt --out no-such-run

# Ctrl-C: the step is finished, the run saved, the way on said; the rest gives the same model as
# without the interruption.
settings=(--model model.h5 --data text.txt --steps 400 --batch 2 --seq-len 32 --m 8 --window 0
    --save-every 1000 --threads 1 --quiet)
"$SRF" retrofit "${settings[@]}" --out whole >/dev/null || die "retrofit failed"
# In the background a script's children ignore SIGINT, unless they ask for it.
"$SRF" retrofit "${settings[@]}" --out cut >stdout 2>stderr &
pid=$!
for ((i = 0; i < 200; i++)); do
    [ ! -s cut/metrics.jsonl ] || break
    sleep 0.02
done
kill -INT $pid
wait $pid
status=$?
[ $status -eq 1 ] || fail "an interrupted run: expected exit 1, found $status"
grep -q '^srf: finishing the step' stderr || fail "no word on what Ctrl-C does: $(cat stderr)"
[ -f cut/last.h5 ] || fail "an interrupted run left no checkpoint"
[ ! -f cut/model.h5 ] || fail "the run ended before it could be interrupted"
command=$(sed -n 's/.*go on with: //p' stderr)
[[ "$command" == "srf retrofit --resume "* ]] || fail "no word on how to resume: $(cat stderr)"
read -ra words <<<"$command"
"$SRF" "${words[@]:1}" --threads 1 --quiet >/dev/null || fail "that command failed: $command"
cmp whole/model.h5 cut/model.h5 || fail "interrupted and resumed: another model"

finish
