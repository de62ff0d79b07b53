#!/usr/bin/env bash
# srf bench: each part runs, its JSON holds what the README quotes, mistakes are usage errors.
set -eu
srf=$1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

fail() {
    echo "FAILED: $*" >&2
    exit 1
}
# Every one of these keys must be in file $1.
has() {
    local file=$1 key
    shift
    for key in "$@"; do grep -q "\"$key\": " "$file" || fail "no $key in $(cat "$file")"; done
}

OMP_NUM_THREADS=3 "$srf" bench op --filter sumsq --json >"$dir/op" || fail "bench op"
has "$dir/op" bench machine name sgemm_gflops copy_gb_s us us_worst gflops gb_s of_floor
grep -q "\"threads\": 3\b" "$dir/op" || fail "OMP_NUM_THREADS is not heard: $(cat "$dir/op")"
[ "$(wc -l <"$dir/op")" = 1 ] || fail "more than one line of JSON"
"$srf" bench --filter step >"$dir/step-ops" || fail "bench (op by default)"
# A step costs the same at every position. 10: on a busy machine; a cost that grows with the
# position would give thousands.
sed -n 's/.*recurrent step at position 100000 over 10: //p' "$dir/step-ops" |
    awk '$1 > 0 && $1 <= 10 { good = 1 } END { exit !good }' || fail "ratio: $(cat "$dir/step-ops")"

"$srf" bench op --flat --filter srf --json >"$dir/flat" || fail "bench op --flat"
has "$dir/flat" series points seq_len fwd_ms fwd_bwd_ms most_over_least

cat >"$dir/config.json" <<'JSON'
{"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 32,
 "vocab_size": 97, "layer_norm_epsilon": 1e-5}
JSON
for attention in softmax srf; do
    "$srf" bench step --init "$dir/config.json" --batch 2 --seq-len 16 --steps 2 --json \
        --attention $attention >"$dir/step" || fail "bench step $attention"
    has "$dir/step" step_ms tokens_per_s blas_share blas_of_sgemm ops
    grep -q "\"op\": \"${attention}_attn_bwd\"" "$dir/step" || fail "no $attention in the table"
done
"$srf" bench decode --init "$dir/config.json" --batch 2 -n 8 --json >"$dir/decode" ||
    fail "bench decode"
has "$dir/decode" tokens_per_s late_tokens_per_s share_of_floor state_bytes kv_bytes ops

"$srf" bench prefill --init "$dir/config.json" --batch 2 -n 50 --rows 40 --steps 2 --json \
    >"$dir/prefill" || fail "bench prefill"
has "$dir/prefill" tokens_per_s tflops share_of_floor ops

expect() { # exit status, then arguments
    local want=$1 got=0
    shift
    "$srf" "$@" >"$dir/out" 2>"$dir/err" || got=$?
    [ "$got" = "$want" ] || fail "exit $got, expected $want: srf $*"
    [ ! -s "$dir/out" ] || fail "output of a failed command: srf $*"
    [ "$(wc -l <"$dir/err")" = 1 ] || fail "expected one line of error: srf $*"
}
expect 2 bench nothing
expect 2 bench step
expect 2 bench prefill
expect 2 bench op --filter
expect 1 bench decode --init "$dir/config.json" --device cpu --state-bf16
expect 1 bench decode --init "$dir/config.json" --attention softmax
expect 1 bench step --init "$dir/config.json" --seq-len 64
expect 1 bench step --model "$dir/missing"
