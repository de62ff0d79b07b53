#!/usr/bin/env bash
# Makes the bundled checkpoint again, checkpoints/tiny-gpt2/: a small GPT-2 with softmax attention,
# trained from scratch by `srf train` on the text of scripts/setup.sh. Takes about a quarter of an
# hour on two cores; the result is the same again on the same machine and thread count.
#
#   scripts/make_tiny_gpt2.sh [SRF-TRAIN-OPTION...]   options replace the ones below
source "$(dirname "$0")/lib.sh"

work="$ROOT/out/tiny-gpt2"
bundled="$ROOT/checkpoints/tiny-gpt2"

scripts/setup.sh tokenizer
scripts/build.sh
rm -rf "$work"
mkdir -p "$work"

say "Tokenizer: byte-level BPE with 2048 tokens, from the training text"
[ -x out/venv/bin/python ] || "$PYTHON" -m venv out/venv
out/venv/bin/pip install --quiet 'tokenizers==0.23.*'
out/venv/bin/python scripts/make_tokenizer.py out/text/train.txt "$work/tokenizer.json"

say "Token sets"
for part in train heldout; do
    build/srf tokenize "out/text/$part.txt" --tokenizer "$work/tokenizer.json" \
        --out "$work/$part.h5"
done

cat >"$work/config.json" <<'END'
{
  "model_type": "gpt2",
  "architectures": ["GPT2LMHeadModel"],
  "activation_function": "gelu_new",
  "n_layer": 4,
  "n_head": 3,
  "n_embd": 192,
  "n_positions": 256,
  "vocab_size": 2048,
  "layer_norm_epsilon": 1e-5,
  "bos_token_id": 0,
  "eos_token_id": 0
}
END

say "Training with softmax attention"
build/srf train --init "$work/config.json" --tokenizer "$work/tokenizer.json" \
    --data "$work/train.h5" --val "$work/heldout.h5" --out "$work/run" \
    --steps 900 --batch 32 --seq-len 256 --lr 3e-3 --warmup 100 --weight-decay 0.1 \
    --eval-every 150 --seed 1 "$@"

say "Export, in half precision"
build/srf export "$work/run/model.h5" "$work/hf" --format hf --dtype f16
build/srf eval --model "$work/hf" --data "$work/heldout.h5"
mkdir -p "$bundled"
cp "$work/hf/"* "$bundled/"
ls -l "$bundled"
