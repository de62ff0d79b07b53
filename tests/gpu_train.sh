#!/usr/bin/env bash
# Training and evaluation on the GPU against the CPU, on the bundled checkpoint and the text of
# scripts/setup.sh:
#     gpu_train.sh SRF SOURCE [REFERENCE]        compares with what the CPU's runs recorded in
#                                                REFERENCE, or with runs of now
#     gpu_train.sh --record SRF SOURCE REFERENCE records them
record=0
if [ "$1" = --record ]; then
    record=1
    shift
fi
reference="${3:-}"
[ -z "$reference" ] || reference="$(realpath -m "$reference")"
source "$(dirname "$0")/shell.sh"

base=(--data "$WORK/train.h5" --seq-len 128 --batch 4 --quiet)
# Short runs whose losses must agree closely, and a long one whose curve must.
short=(--steps 20 --warmup 5)
long=(--steps 200 --warmup 20 --lr 5e-4 -m 64 -W 32)
retrofit=("$SRF" retrofit --model "$WORK/base.h5" "${base[@]}" --redraw-every 1 --freeze-at 0.25 --kl 1)
evals=(softmax srf hybrid)
# shellcheck disable=SC2034 # read by name
{
    eval_options_softmax="--attention softmax"
    eval_options_srf="--attention srf -m 64 -W 0"
    eval_options_hybrid="--attention srf -m 64 -W 32"
}

losses() {
    sed -n 's/.*"loss": \([^,}]*\).*/\1/p' "$1/metrics.jsonl"
}

# train KIND OPTION...
train() {
    local kind="$1"
    shift
    case "$kind" in
    softmax) run "$SRF" train --model "$WORK/base.h5" "${base[@]}" "${short[@]}" "$@" ;;
    srf) run "${retrofit[@]}" "${short[@]}" -W 0 "$@" ;;
    hybrid) run "${retrofit[@]}" "${short[@]}" -W 32 "$@" ;;
    long) run "${retrofit[@]}" "${long[@]}" "$@" ;;
    esac
    [ $status -eq 0 ] || fail "training $kind $*: $(cat stderr)"
}

# perplexity KIND MODE OPTION...: prints it.
perplexity() {
    local kind="$1" mode="$2" options
    shift 2
    options="eval_options_$kind"
    # shellcheck disable=SC2086 # words
    run "$SRF" eval --model "$WORK/base.h5" --data "$WORK/heldout.h5" --max-tokens 4096 --quiet \
        --json --mode "$mode" ${!options} "$@"
    [ $status -eq 0 ] || fail "eval $kind $mode $*: $(cat stderr)" >&2
    sed -n 's/.*"ppl": \([^,}]*\).*/\1/p' stdout
}

modes_of() {
    if [ "$1" = softmax ]; then echo parallel; else echo parallel recurrent; fi
}

# The CPU's side, into folder $1: data, losses, perplexities.
record_cpu() {
    local to="$1" part kind mode
    mkdir -p "$to"
    for part in train heldout; do
        head -c 1500000 "$SOURCE/out/text/$part.txt" >$part.txt || die "no text: scripts/setup.sh"
        "$SRF" tokenize $part.txt --tokenizer "$SOURCE/checkpoints/tiny-gpt2/tokenizer.json" \
            --out $part.h5 >/dev/null || die "cannot tokenize"
        cp $part.h5 "$to/"
    done
    for kind in softmax srf hybrid long; do
        train $kind --device cpu --out cpu_$kind
        losses cpu_$kind >"$to/losses_$kind"
    done
    for kind in "${evals[@]}"; do
        for mode in $(modes_of $kind); do
            perplexity $kind $mode --device cpu >"$to/ppl_${kind}_$mode"
        done
    done
}

# difference FILE FILE N: mean and largest relative difference of their N numbers; "nan nan" unless
# both hold N numbers.
difference() {
    paste "$1" "$2" | awk -v n="$3" '
        function number(x) { return x ~ /^-?[0-9.]+(e[-+]?[0-9]+)?$/ }
        !number($1) || !number($2) || NF != 2 { bad = 1; next }
        { d = $1 > $2 ? $1 - $2 : $2 - $1; d /= $2 > 0 ? $2 : 1; sum += d; count++
          if (d > most) most = d }
        END { if (bad || count != n) print "nan nan"; else printf "%.3g %.3g\n", sum / n, most }'
}

# within X LIMIT
within() {
    awk -v x="$1" -v limit="$2" 'BEGIN { exit !(x ~ /^[0-9.]+(e[-+]?[0-9]+)?$/ && x + 0 <= limit + 0) }'
}

"$SRF" import "$SOURCE/checkpoints/tiny-gpt2" base.h5 >/dev/null || die "cannot import"
if [ $record = 1 ]; then
    record_cpu "$reference"
    finish
fi
if [ -z "$reference" ]; then
    reference="$WORK/reference"
    record_cpu "$reference"
fi
cp "$reference"/{train,heldout}.h5 . || die "no recorded data in $reference"

# fp32: the first 20 losses.
for kind in softmax srf hybrid; do
    train $kind --device cuda --dtype f32 --out f32_$kind
    losses f32_$kind >losses_f32_$kind
    read -r mean most <<<"$(difference losses_f32_$kind "$reference/losses_$kind" 20)"
    echo "fp32, 20 losses of $kind: relative difference $mean, at most $most"
    within "$most" 1e-4 || fail "fp32 losses of $kind: $most > 1e-4"
done

# bf16: the curve.
train long --device cuda --dtype bf16 --out bf16_long
losses bf16_long >losses_bf16_long
read -r mean most <<<"$(difference losses_bf16_long "$reference/losses_long" 200)"
echo "bf16, 200 losses: mean relative difference $mean, at most $most"
within "$mean" 0.01 || fail "bf16 losses: $mean > 0.01"

# Parts of the weights: bf16 beside fp32.
for part in "--rest-lr 0" "--lora 5"; do
    for dtype in f32 bf16; do
        # shellcheck disable=SC2086 # words
        train hybrid --device cuda --dtype $dtype --steps 60 --lr 3e-3 $part --out "part $dtype"
        losses "part $dtype" >losses_$dtype
        rm -r "part $dtype"
    done
    read -r mean most <<<"$(difference losses_bf16 losses_f32 60)"
    echo "bf16, 60 losses with $part: mean relative difference to fp32 $mean, at most $most"
    within "$mean" 0.01 || fail "bf16 losses with $part: $mean > 0.01"
done

# Perplexity in all forms.
for kind in "${evals[@]}"; do
    for mode in $(modes_of $kind); do
        for dtype in f32 bf16; do
            perplexity $kind "$mode" --device cuda --dtype $dtype >ppl
            read -r mean _ <<<"$(difference ppl "$reference/ppl_${kind}_$mode" 1)"
            echo "perplexity of $kind, $mode, $dtype: $(cat ppl), relative difference $mean"
            within "$mean" "$([ $dtype = f32 ] && echo 1e-4 || echo 0.01)" ||
                fail "perplexity of $kind, $mode, $dtype: $(cat ppl), not $(cat "$reference/ppl_${kind}_$mode")"
        done
    done
done

# A run that is killed and resumed ends bit for bit where an undisturbed one does.
for case in "f32" "bf16" "bf16 --rest-lr 0" "bf16 --lora 5"; do
    # shellcheck disable=SC2206 # words
    dtype=($case)
    killed=("$SRF" retrofit --model base.h5 "${base[@]}" --steps 400 --save-every 20 -W 32
        --redraw-every 3 --freeze-at 0.5 --train-features --mse 1 --device cuda
        --dtype "${dtype[@]}")
    run "${killed[@]}" --out whole
    [ $status -eq 0 ] || fail "a run of 400 steps in $case: $(cat stderr)"
    "${killed[@]}" --out killed >/dev/null 2>&1 &
    pid=$!
    for ((i = 0; i < 3000; i++)); do
        [ "$(cat killed/metrics.jsonl 2>/dev/null | wc -l)" -lt 50 ] || break
        kill -0 $pid 2>/dev/null || break
        sleep 0.01
    done
    kill -9 $pid 2>/dev/null
    wait $pid 2>/dev/null
    [ ! -f killed/model.h5 ] || fail "$case: the run to kill was over too soon"
    run "$SRF" retrofit --resume --data train.h5 --out killed --quiet --device cuda
    [ $status -eq 0 ] || fail "resume in $case: $(cat stderr)"
    cmp whole/model.h5 killed/model.h5 || fail "$case: a resumed run has other weights"
    cmp whole/last.h5 killed/last.h5 || fail "$case: a resumed run has another state"
    cmp <(losses whole) <(losses killed) || fail "$case: a resumed run has other losses"
    rm -rf whole killed
done

# Out of memory: said before the run starts, in one line.
run "$SRF" retrofit --model base.h5 --data train.h5 --out huge --seq-len 256 --batch 1000000 \
    --micro-batch 1000000 --device cuda --quiet
[ $status -eq 1 ] && [ "$(wc -l <stderr)" -eq 1 ] && grep -q memory stderr ||
    fail "too large a batch: exit $status: $(cat stderr)"
[ ! -e huge/metrics.jsonl ] || fail "too large a batch: the run started"

# No GPU: said so.
CUDA_VISIBLE_DEVICES='' run "$SRF" eval --model base.h5 --data heldout.h5 --device cuda --quiet
[ $status -eq 1 ] && [ "$(wc -l <stderr)" -eq 1 ] && grep -q 'no CUDA device' stderr ||
    fail "no GPU: exit $status: $(cat stderr)"

finish
