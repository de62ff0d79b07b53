#!/usr/bin/env bash
# srf train and srf retrofit: what they take and refuse, and what a resumed run says.
source "$(dirname "$0")/shell.sh"

make_tiny_model
small=(--steps 20 --batch 2 --seq-len 32 --m 8 --window 8 --threads 1 --quiet)
retrofit=("$SRF" retrofit --model model.h5 --data text.txt "${small[@]}")
resume=("$SRF" retrofit --resume --data text.txt --out run --threads 1)

# One folder, one run.
"${retrofit[@]}" --out run >stdout || die "retrofit failed"
sum=$(cksum run/*)
refuse 1 "run/last.h5 is there" "${retrofit[@]}" --out run
[ "$(cksum run/*)" = "$sum" ] || fail "a refused run changed the files of another"
exec 9<run/metrics.jsonl
flock 9 # as another run that is still at it does
refuse 1 "run/metrics.jsonl: another srf writes it" "${resume[@]}" --quiet
exec 9<&-
[ "$(cksum run/*)" = "$sum" ] || fail "a resume beside a run changed its files"
refuse 2 "--out" "${retrofit[@]}" --out ''
refuse 1 "expected a directory" "$SRF" train --model no-such-file --data text.txt --out text.txt

# The first of 20 steps is one of 2 of warm-up, 1/3 of the peak of 3e-4.
grep -q '^{"step": 1,.*"lr": 0.0001,' run/metrics.jsonl ||
    fail "not the default warm-up: $(head -1 run/metrics.jsonl)"

# The log has what was measured, and no 0 for what was not.
grep -q attention_mse run/metrics.jsonl &&
    fail "an error that nobody measured: $(head -1 run/metrics.jsonl)"
succeed "${retrofit[@]}" --kl-to 0.5 --mse 1 --mse-from 0.25 --out parts
[ "$(grep -n '"kl": [0-9]' parts/metrics.jsonl | cut -d: -f1 | xargs)" = "$(seq -s ' ' 10)" ] &&
    [ "$(grep -n '"attention_mse": [0-9]' parts/metrics.jsonl | cut -d: -f1 | xargs)" = \
        "$(seq -s ' ' 6 20)" ] && ! grep -qE '"(kl|attention_mse)": 0[,}]' parts/metrics.jsonl ||
    fail "not the parts of the run that were measured: $(cat parts/metrics.jsonl)"

# So many sequences at once.
succeed "${retrofit[@]/--quiet/--micro-batch=1}" --batch 2 --steps 1 --out one
grep -q '(1 at once)' stderr || fail "--micro-batch 1: $(cat stderr)"
succeed "${retrofit[@]/--quiet/--micro-batch=2}" --batch 4 --steps 1 --out two
grep -q '(2 at once)' stderr || fail "--micro-batch 2: $(cat stderr)"
# Left to srf: about 2048 tokens, and a part of the batch.
succeed "$SRF" train --model model.h5 --data text.txt --batch 96 --seq-len 32 --steps 1 --out three
grep -q '(48 at once)' stderr || fail "no --micro-batch: $(cat stderr)"

# A run that made the model worse than guessing says so.
succeed "$SRF" train --model model.h5 --data text.txt --val text.txt --steps 5 --batch 2 \
    --seq-len 32 --threads 1 --quiet --lr 10 --warmup 0 --clip 0 --out diverged
grep -q '^srf: warning: the run diverged: validation perplexity' stderr ||
    fail "a diverged run: $(cat stdout stderr)"
succeed "${retrofit[@]}" --val text.txt --steps 2 --out sound
grep -q 'diverged' stderr && fail "a run that has not diverged: $(cat stderr)"

# What is asked of the schedule and of the features is what is done.
few=("$SRF" retrofit --model model.h5 --data text.txt --steps 4 --batch 2 --seq-len 32 --m 8
    --window 0 --threads 1 --calibrate 256)
succeed "${few[@]}" --out rates --quiet --lr 0.01 --warmup 1 --min-lr 0.004
grep -q '^{"step": 1,.*"lr": 0.005,' rates/metrics.jsonl && grep -q '^{"step": 2,.*"lr": 0.01,' \
    rates/metrics.jsonl && grep -q '^{"step": 4,.*"lr": 0.004,' rates/metrics.jsonl ||
    fail "not the rates asked for: $(cat rates/metrics.jsonl)"
for option in '--features-seed 0' --fit-features '--best-of 3' '--fit-features --best-of 3'; do
    rm -rf other
    succeed "${few[@]}" --out other --quiet $option
    grep -o '"loss": [0-9.]*' other/metrics.jsonl | head -1 >>losses
done
[ "$(sort -u losses | wc -l)" -eq 4 ] || fail "--fit-features, --best-of do nothing: $(xargs <losses)"

# The run's curves, as a page of its own; one that cannot be written costs no run.
for text in '<!DOCTYPE html>' '</html>' 'srf retrofit' 'KL(teacher' 'learning rate'; do
    grep -qF "$text" run/training.html || fail "training.html lacks $text"
done
[ "$(grep -c '<svg.*role=' run/training.html)" -eq 4 ] || fail "training.html: a curve is missing"
! grep -qE '(src|href)=|https?:|nan|inf[ "<]' run/training.html ||
    fail "training.html needs something else, or shows no number"
mkdir -p barred/training.html
"${retrofit[@]}" --out barred >stdout 2>stderr || fail "a page that cannot be written: exit $?"
grep -q '^srf: warning: .*training.html' stderr || fail "no word of the page: $(cat stderr)"
[ -f barred/model.h5 ] || fail "a page that cannot be written: no model"

# A resumed run goes on as it began.
refuse 2 "--steps" "${resume[@]}" --steps 50
refuse 2 "--lr" "${resume[@]}" --quiet --lr 5
refuse 2 "--teacher" "${resume[@]}" --teacher model.h5
refuse 2 "--window" "${resume[@]}" -W 4
sed 's/king/queen/' text.txt >other.txt
refuse 1 "training data" "${resume[@]}" --data other.txt
refuse 1 "dtype" "${resume[@]}" --dtype f64

# A teacher whose tokens mean something else.
sed '2093d' "$SOURCE/checkpoints/tiny-gpt2/tokenizer.json" >fewer.json # without the merge "Ġ a"
sed -n 2093p "$SOURCE/checkpoints/tiny-gpt2/tokenizer.json" | grep -q 'Ġ a' || fail "another file"
succeed "$SRF" import model.h5 stranger.h5 --tokenizer fewer.json
refuse 1 "expected the model's tokenizer" "${retrofit[@]}" --out none --teacher stranger.h5

# What came of it stands beside the teacher's: at each evaluation, at the end, on the page.
run "${retrofit[@]/--quiet/--eval-every=10}" --val text.txt --out beside
run "$SRF" eval --model model.h5 --data text.txt --seq-len 32 --max-tokens 65536 --json --quiet
softmax=$(sed -n 's/.*"ppl": \([0-9.]*\).*/\1/p' stdout)
run "${retrofit[@]/--quiet/--eval-every=10}" --val text.txt --out beside-json --json
[ "$(grep -c '^step .*perplexity [0-9.]* (teacher [0-9.]*: [-+][0-9.]* %)$' stderr)" = 2 ] ||
    fail "no teacher beside an evaluation: $(cat stderr)"
teacher=$(sed -n 's/.*"teacher_val_ppl": \([0-9.]*\).*/\1/p' stdout)
awk "BEGIN { d = $teacher / $softmax - 1; exit !(d < 1e-6 && d > -1e-6) }" ||
    fail "the teacher has $teacher, and by itself $softmax"
[ "$(grep -c teacher_val_ppl beside/metrics.jsonl)" = 2 ] || fail "metrics.jsonl: no teacher"
grep -q 'teacher, validation' beside/training.html || fail "training.html: no teacher"
# The loss that is shown is a running mean; the last line compares with the teacher.
mean=$(awk -F'"loss": ' '{ mean = NR > 1 ? 0.9 * mean + 0.1 * $2 : $2 + 0 } END { print mean }' \
    beside-json/metrics.jsonl)
sed 's/.*"loss": \([0-9.]*\), "val_ppl": \([0-9.]*\),.*/\1 \2/' stdout |
    awk "{ exit !(\$1 / $mean - 1 < 1e-4 && 1 - \$1 / $mean < 1e-4) }" ||
    fail "not the running mean, $mean: $(cat stdout)"
sed -n 's/^step 20:.*perplexity \([0-9.]*\) (teacher \([0-9.]*\): \(.*\) %)$/\1 \2 \3/p' stderr |
    awk '{ d = 100 * ($1 / $2 - 1) - $3; good = d < 0.06 && d > -0.06 } END { exit !good }' ||
    fail "not the part over the teacher: $(cat stderr)"
! command -v python3 >/dev/null || python3 "$SOURCE/tests/check_pages.py" beside ||
    fail "training.html shows other numbers than metrics.jsonl"

# Nothing left to do: success, and no loss is made up.
run "${resume[@]}"
grep -q '^resumed after step 20 from run/last.h5; 0 tokens to go' stderr || fail "$(cat stderr)"
run "${resume[@]}" --quiet
[ $status -eq 0 ] || fail "resume of a finished run: exit $status: $(cat stderr)"
grep -q 'all 20 steps were done' stdout || fail "resume of a finished run says: $(cat stdout)"
grep -q loss stdout && fail "resume of a finished run says: $(cat stdout)"
run "${resume[@]}" --quiet --val text.txt
grep -q 'validation perplexity [1-9][0-9.]* (teacher [1-9]' stdout ||
    fail "no validation perplexity: $(cat stdout)"
run "${resume[@]}" --quiet --json
grep -q '"loss": null' stdout || fail "resume of a finished run, --json: $(cat stdout)"
run "$SRF" retrofit --resume --data text.txt --out run --threads 2 --quiet
[ "$(grep -c 'not bit for bit' stderr)" -eq 1 ] || fail "no word about threads: $(cat stderr)"

# Teachers.
refuse 2 "--teacher" "$SRF" train --model model.h5 --data text.txt --out t --teacher model.h5
refuse 2 "--teacher" "${retrofit[@]}" --kl 0 --out t --teacher model.h5
again=("$SRF" retrofit --model run/model.h5 --data text.txt "${small[@]}")
refuse 1 "--teacher" "${again[@]}" --out t
[ ! -e t ] || fail "a refused run left a folder"
"${again[@]}" --out again --kl 0 >/dev/null || fail "retrofit of an SRF model without a teacher"
"${again[@]}" --out taught --teacher model.h5 >/dev/null || fail "retrofit of an SRF model, taught"

# A window that leaves nothing to the features.
run "${retrofit[@]}" --out wide --window 16
[ $status -eq 0 ] && [ "$(grep -c warning stderr)" -eq 1 ] || fail "wide window: $(cat stderr)"
run "${retrofit[@]}" --out narrow --window 15
grep -q warning stderr && fail "narrow window: $(cat stderr)"

refuse 1 "windows of 3 layers" "${retrofit[@]/--window/--threads}" --out t --layer-windows 8,4,8
refuse 1 "a plan of windows" "${retrofit[@]}" --out t --window 0 --plan 512
refuse 1 "not both" "${retrofit[@]}" --out t --layer-windows 8,4
refuse 1 "features of 3 layers" "${retrofit[@]/%--m/--steps}" --out t --layer-m 8,4,8
refuse 1 "features '8,0'" "${retrofit[@]/%--m/--steps}" --out t --layer-m 8,0
refuse 1 "--m or --layer-m" "${retrofit[@]}" --out t --layer-m 8,4

# The command after Ctrl-C can be pasted, whatever the names, and goes on in the same way.
odd="it's a \$run; x"
mkdir "$odd"
cp text.txt "$odd/my text.txt"
"$SRF" retrofit --model model.h5 --data "$odd/my text.txt" --steps 4000 --batch 2 --seq-len 32 \
    --m 8 --window 8 --threads 1 --dtype f64 --quiet --val "$odd/my text.txt" --eval-tokens 64 \
    --out "$odd/run" >stdout 2>stderr &
pid=$!
for ((i = 0; i < 500; i++)); do
    [ ! -s "$odd/run/metrics.jsonl" ] || break
    sleep 0.02
done
kill -INT $pid
wait $pid
command=$(sed -n 's/.*go on with: //p' stderr)
for option in '--threads 1' '--dtype f64' '--val '; do
    [[ "$command" == *" $option"* ]] || fail "the way on: $command"
done
eval "words=($command)"
start=$(wc -l <"$odd/run/metrics.jsonl")
"$SRF" "${words[@]:1}" --quiet >/dev/null 2>stderr &
pid=$!
for ((i = 0; i < 500; i++)); do
    [ "$(wc -l <"$odd/run/metrics.jsonl")" -le "$start" ] || break
    sleep 0.02
done
kill -INT $pid
wait $pid
grep -q "go on with" stderr || fail "that command failed: $command: $(cat stderr)"

# --help says what each command does by default. An option a line, whatever its length:
options_of() {
    "$SRF" "$@" --help | sed -z 's/\n \{31\}/ /g'
}
default() {
    options_of "$1" | sed -n "s/^.* --$2 .*(\([^()]*\))\$/\1/p"
}
[ "$(default retrofit window)" = 64 ] || fail "retrofit --help: window $(default retrofit window)"
[ "$(default retrofit redraw-every)" = 0 ] || fail "retrofit --help: redraw-every"
[ "$(default retrofit lr)" = 0.0003 ] && [ "$(default train lr)" = 0.001 ] || fail "--help: lr"
[ "$(default retrofit kl)" = 3 ] && [ "$(default train kl)" = 0 ] || fail "--help: kl"
[ "$(default train freeze-at)" = 1 ] && [ "$(default train steps)" = 1000 ] || fail "train --help"

# A recipe is where the options begin; what is said on the command line holds.
options_of retrofit --recipe=pure >help
grep -q -- '--kl X .*(10)$' help && grep -q -- '--best-of N .*(16)$' help || fail "$(cat help)"
recipe() {
    local name="$1"
    shift
    run "$SRF" retrofit --model model.h5 --data text.txt --steps 2 --batch 2 --seq-len 32 --m 8 \
        --threads 1 --out "recipe-$name" "$@"
    [ $status -eq 0 ] || fail "--recipe $*: $(cat stderr)"
}
recipe pure --recipe pure
grep -q "best of 16 draws" stderr || fail "--recipe pure: $(cat stderr)"
recipe plain --recipe pure --calibrate 0
! grep -q calibrated stderr || fail "--calibrate 0: $(cat stderr)"
recipe redrawn --recipe pure --redraw-every 1
grep -q calibrated stderr && ! grep -q "best of" stderr || fail "pure, redrawn: $(cat stderr)"
recipe shared --recipe pure --share-heads
for name in pure planned; do
    run "$SRF" retrofit --model model.h5 --data text.txt --steps 2 --batch 2 --seq-len 32 \
        --threads 1 --out softmax-$name --recipe $name --attention softmax
    [ $status -eq 0 ] || fail "--recipe $name --attention softmax: $(cat stderr)"
done
recipe again --recipe pure --model recipe-pure/model.h5 --teacher model.h5
! grep -q calibrated stderr || fail "calibrated again: $(cat stderr)"
# Features are trained by the hybrid recipe, and where either option says so: the second step's loss
# is another.
second_loss() {
    sed -n 's/^{"step": 2,.*"loss": \([0-9.]*\),.*/\1/p' "recipe-$1/metrics.jsonl"
}
recipe trained --window 8
recipe untrained --window 8 --features-lr 0
recipe alone --window 8 --features-lr 0 --train-features
recipe drawn --window 8 --redraw-every 1
recipe redrawn-untrained --window 8 --redraw-every 1 --features-lr 0
[ "$(second_loss trained)" != "$(second_loss untrained)" ] || fail "hybrid: features not trained"
[ "$(second_loss alone)" != "$(second_loss untrained)" ] || fail "--train-features: not trained"
[ "$(second_loss drawn)" = "$(second_loss redrawn-untrained)" ] || fail "redrawn and trained"
for how in '--window 4 --plan 512' '--recipe hybrid --window 4 --plan 512'; do
    recipe "${how// /}" $how
    grep -qE "features by layer, on [0-9]+ tokens" stderr || fail "$how: $(cat stderr)"
done
for how in '' '--recipe planned' '--window 32 --plan 512'; do # 32 is all of a sequence
    recipe "short${how// /}" $how
    grep -q "features by layer: nothing to choose" stderr || fail "$how: $(cat stderr)"
done
for budget in 20000 40000; do
    recipe budget-$budget --window 4 --state-budget $budget
    used=$(sed -n 's/^windows and features by layer.*state \([0-9]*\) bytes.*/\1/p' stderr)
    [ "$used" -le $budget ] || fail "--state-budget $budget: $(cat stderr)"
    "$SRF" info --json recipe-budget-$budget/model.h5 >facts
    grep -q "\"state_bytes_per_sequence\": $used\b" facts || fail "$used bytes? $(cat facts)"
done
refuse 1 "at least" "${retrofit[@]}" --out t --state-budget 100
refuse 2 "--state-budget" "${retrofit[@]}" --out t --state-budget 100 --plan 0
recipe small-window --recipe planned --window 32
! grep -q "features by layer" stderr || fail "a window of 32: $(cat stderr)"
for given in "--layer-windows 8,8 --state-budget 40000" "--layer-m 8,8 --plan 64"; do
    refuse 2 "would choose: give either" "$SRF" retrofit --model model.h5 --data text.txt --out t \
        $given
done
recipe given --recipe planned --layer-windows 4,8
! grep -q "features by layer" stderr || fail "windows given: $(cat stderr)"
run "$SRF" retrofit --model model.h5 --data text.txt --steps 2 --batch 2 --seq-len 32 \
    --threads 1 --out given-features --layer-m 8,16
[ $status -eq 0 ] && ! grep -q "features by layer" stderr || fail "features given: $(cat stderr)"
recipe no-window --recipe planned --window 0
! grep -q "features by layer" stderr || fail "no window: $(cat stderr)"
recipe window --recipe window --window 8
grep -q "nothing older" stderr || fail "--recipe window: $(cat stderr)"
refuse 2 "planned, hybrid, pure, faithful, window" "${retrofit[@]}" --out t --recipe best
refuse 2 "--recipe" "$SRF" train --model model.h5 --data text.txt --out t --recipe pure

# Parts of the weights. What is written is a model like any other; the run's file says what it was.
refuse 2 "--rest-lr" "${retrofit[@]}" --out t --lora 2 --rest-lr 0.5
# What the trainer refuses is said before the preparations, which would say more than a line.
slow=("${retrofit[@]/--quiet/--plan=512}" --out t)
refuse 1 "rank" "${slow[@]}" --lora 60000
refuse 1 "multiple of micro-batch 2" "${slow[@]}" --batch 3 --micro-batch 2
refuse 1 "positions end at 64" "${slow[@]}" --seq-len 65
printf a >short.txt
refuse 1 "a prediction needs 2" "${slow[@]}" --val short.txt
"${retrofit[@]}" --out attention --rest-lr 0 >/dev/null || fail "training attention alone: exit $?"
"${retrofit[@]}" --out lora --lora 2 >/dev/null || fail "low-rank training: exit $?"
for part in "run all" "attention attention" "lora additions of rank 2 to attention's matrices"; do
    "$SRF" info "${part%% *}/last.h5" | grep "^trained  *${part#* }\$" >/dev/null ||
        fail "info does not say $part"
done
grep -q '^{"step": 1,.*"lr": 0.001,' lora/metrics.jsonl || fail "--lora: not its own rate"
for part in attention lora; do
    run "$SRF" eval --model $part/last.h5 --data text.txt --quiet --json
    sed 's/, "seconds.*//' stdout >last
    run "$SRF" eval --model $part/model.h5 --data text.txt --quiet --json
    sed 's/, "seconds.*//' stdout | cmp -s - last || fail "$part: last.h5 and model.h5 differ"
done

finish
