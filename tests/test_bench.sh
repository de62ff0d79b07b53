#!/usr/bin/env bash
# srf bench: each part runs, its JSON holds what the README quotes, mistakes are usage errors.
source "$(dirname "$0")/shell.sh"

# has KEY...: each is in the JSON that was printed last.
has() {
    local key
    for key in "$@"; do grep -q "\"$key\": " stdout || fail "no $key in $(cat stdout)"; done
}

OMP_NUM_THREADS=3 succeed "$SRF" bench op --filter sumsq --json
has bench machine name sgemm_gflops copy_gb_s us us_worst gflops gb_s of_floor
grep -q "\"threads\": 3\b" stdout || fail "OMP_NUM_THREADS is not heard: $(cat stdout)"
[ "$(wc -l <stdout)" = 1 ] || fail "more than one line of JSON"
succeed "$SRF" bench --filter step # op by default
# A step costs the same at every position. 10: on a busy machine; a cost that grows with the
# position would give thousands.
sed -n 's/.*recurrent step at position 100000 over 10: //p' stdout |
    awk '$1 > 0 && $1 <= 10 { good = 1 } END { exit !good }' || fail "ratio: $(cat stdout)"

# A minute under the sanitizers, for ops that other tests run there.
if [ -z "${SRF_TEST_SHORT:-}" ]; then
    succeed "$SRF" bench op --flat --filter srf --json
    has series points seq_len fwd_ms fwd_bwd_ms most_over_least farthest_from_mean
fi

cat >config.json <<'JSON'
{"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 32,
 "vocab_size": 97, "layer_norm_epsilon": 1e-5}
JSON
for attention in softmax srf; do
    succeed "$SRF" bench step --init config.json --batch 2 --seq-len 16 --steps 2 --json \
        --attention $attention
    has step_ms tokens_per_s blas_share blas_of_sgemm ops
    grep -q "\"op\": \"${attention}_attn_bwd\"" stdout || fail "no $attention in the table"
done
succeed "$SRF" bench decode --init config.json --batch 2 -n 8 --json
has tokens_per_s late_tokens_per_s share_of_floor state_bytes kv_bytes ops
succeed "$SRF" bench prefill --init config.json --batch 2 -n 50 --rows 40 --steps 2 --json
has tokens_per_s tflops share_of_floor ops

refuse 2 nothing "$SRF" bench nothing
refuse 2 --init "$SRF" bench step
refuse 2 --init "$SRF" bench prefill
refuse 2 --filter "$SRF" bench op --filter
refuse 1 '--filter xyzzy' "$SRF" bench op --filter xyzzy
refuse 1 '--filter xyzzy' "$SRF" bench op --flat --filter xyzzy
refuse 1 bf16 "$SRF" bench decode --init config.json --device cpu --state-bf16
refuse 1 'running 3 of a batch of 2' "$SRF" bench decode --init config.json --attention srf --batch 2 --running 3
refuse 1 softmax "$SRF" bench decode --init config.json --attention softmax
refuse 1 32 "$SRF" bench step --init config.json --seq-len 64
refuse 1 missing "$SRF" bench step --model missing
finish
