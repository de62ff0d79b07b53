#!/usr/bin/env bash
# The whole path on a real text, from a bare Debian 12: install, build, import the bundled
# checkpoint, swap its softmax attention for simplex random features, retrofit, evaluate, export
# the recurrent model, validate, generate, report.
#
#   scripts/demo.sh     writes out/demo/: report.html, summary.json, and what they are made of
source "$(dirname "$0")/lib.sh"
export CUDA_VISIBLE_DEVICES= # on the CPU and in fp32, whatever the machine has

out="$ROOT/out/demo"
features=64 # m: random features per head
window=32   # the hybrid: this block of tokens and the one before it are attended to exactly

pure_steps="${SRF_DEMO_PURE_STEPS:-300}"
hybrid_steps="${SRF_DEMO_HYBRID_STEPS:-60}"

scripts/setup.sh
scripts/build.sh

rm -rf "$out"
mkdir -p "$out"
srf="$ROOT/build/srf"
demo_start=$(date +%s.%N)

# section TITLE COMMAND...: says what it does, runs it, says how long it took.
section() {
    local title="$1" start seconds
    shift
    say "$title"
    start=$(date +%s.%N)
    "$@"
    seconds=$(awk -v a="$start" -v b="$(date +%s.%N)" 'BEGIN { printf "%.1f", b - a }')
    note "took $seconds s"
    printf '%s\t%s\n' "$title" "$seconds" >>"$out/timings.tsv"
}

# evaluate NAME SRF-EVAL-OPTION...: the held-out perplexity, into eval_NAME.json.
evaluate() {
    local name="$1"
    shift
    "$srf" eval --data "$out/heldout.h5" --json --quiet "$@" >"$out/eval_$name.json"
    note "perplexity: $("$PYTHON" scripts/report.py --perplexity "$out/eval_$name.json")"
}

tokenize() {
    local part
    for part in train heldout; do
        "$srf" tokenize "out/text/$part.txt" --tokenizer checkpoints/tiny-gpt2/tokenizer.json \
            --out "$out/$part.h5"
    done
}

# One frozen draw: a run this short ends closer so than with a redraw at each step.
retrofit() {
    "$srf" retrofit --model "$out/base.h5" --data "$out/train.h5" --m "$features" --batch 8 \
        --redraw-every 0 "$@"
}

# A paragraph each for the report, to the end of the model's context, and the bytes of its state.
generate() {
    local name
    printf 'And it came to pass' >"$out/prompt.txt"
    for name in pure hybrid; do
        "$srf" generate --model "$out/$name.recurrent.h5" --prompt-file "$out/prompt.txt" -n 251 \
            --temperature 0.8 --top-p 0.9 --seed 7 --json >"$out/generate_$name.json"
    done
}

section "Import the bundled checkpoint (a small GPT-2, softmax attention)" \
    "$srf" import checkpoints/tiny-gpt2 "$out/base.h5"
section "Tokenize the text; the held-out chapters stay apart" tokenize
section "Perplexity of the untouched model, softmax attention" \
    evaluate softmax --model "$out/base.h5"
section "The same on a part of the training text, for the loss curves" \
    evaluate softmax_train --model "$out/base.h5" --data "$out/train.h5" --max-tokens 65536
section "Perplexity right after the swap to random features, m = $features" \
    evaluate swapped --model "$out/base.h5" --attention srf --m "$features" \
    --window 0
section "Perplexity right after the swap with exact attention in a window of $window" \
    evaluate swapped_hybrid --model "$out/base.h5" --attention srf --m "$features" \
    --window "$window"
section "Retrofit: pure random features, m = $features" \
    retrofit --window 0 --steps "$pure_steps" --warmup 20 --lr 1e-3 --kl 3 \
    --out "$out/pure"
section "Perplexity of the pure retrofit" evaluate pure --model "$out/pure/model.h5"
section "Retrofit: the hybrid with a window of $window" \
    retrofit --window "$window" --steps "$hybrid_steps" --warmup 10 --lr 3e-4 --kl 1 \
    --out "$out/hybrid"
section "Perplexity of the hybrid retrofit" evaluate hybrid --model "$out/hybrid/model.h5"
section "Export the pure retrofit as a recurrent model" \
    "$srf" export "$out/pure/model.h5" "$out/pure.recurrent.h5" --format recurrent
section "Export the hybrid as a recurrent model" \
    "$srf" export "$out/hybrid/model.h5" "$out/hybrid.recurrent.h5" --format recurrent
section "Perplexity of the recurrent pure model, one token at a time" \
    evaluate recurrent --model "$out/pure.recurrent.h5" --mode recurrent \
    --batch 64
section "Perplexity of the recurrent hybrid, one token at a time" \
    evaluate recurrent_hybrid --model "$out/hybrid.recurrent.h5" --mode recurrent \
    --batch 64
section "Measure the error of the approximation" \
    "$srf" validate --model "$out/base.h5" --data "$out/heldout.h5" --m "$features" \
    --window 0 --out "$out/validate"
section "Compare the hybrid with the untouched model" \
    "$srf" validate --model "$out/hybrid/model.h5" --teacher "$out/base.h5" \
    --data "$out/heldout.h5" --kernel-draws 4 --draws 4 --out "$out/validate-hybrid"
section "Generate a paragraph with each recurrent model" generate

seconds=$(awk -v a="$demo_start" -v b="$(date +%s.%N)" 'BEGIN { printf "%.1f", b - a }')
say "Report"
"$PYTHON" scripts/report.py --seconds "$seconds" "$out"
