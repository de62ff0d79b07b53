#!/usr/bin/env bash
# Checkpoints through the program: every way out and in again gives the same model; info on each
# kind of file.
source "$(dirname "$0")/shell.sh"

# ok COMMAND...: succeeds, says nothing on stderr.
ok() {
    succeed "$@"
    [ ! -s stderr ] || fail "$* writes to stderr: $(cat stderr)"
}

# info FILE FACT...: each fact is in the JSON of the file, and its JSON is valid.
info() {
    local file="$1" fact
    shift
    ok "$SRF" info "$file" --json
    python3 -m json.tool stdout >/dev/null || fail "info $file: no JSON"
    for fact in "$@"; do
        grep -qF -- "$fact" stdout || fail "info $file: no $fact in $(cat stdout)"
    done
    ok "$SRF" info "$file"
    [ "$(wc -l <stdout)" -gt 1 ] || fail "info $file: $(cat stdout)"
}

command -v python3 >/dev/null || { finished=1; exit 77; }
make_tiny_model
same() {
    cmp "$1" "$2" || fail "$3"
}

# transformers
ok "$SRF" export model.h5 hf --format hf
[ "$(ls hf | tr '\n' ' ')" = "config.json model.safetensors tokenizer.json " ] ||
    fail "hf: $(ls hf)"
ok "$SRF" import hf back.h5
grep -q "tokenizer of 2048 tokens" stdout || fail "import says: $(cat stdout)"
same model.h5 back.h5 "hf f32 and back: another model"
ok "$SRF" import hf/model.safetensors back.h5
same model.h5 back.h5 "safetensors and back: another model"
cp hf/model.safetensors bare.safetensors
ok "$SRF" import bare.safetensors back.h5 --config hf/config.json --json
grep -q '"tokenizer": false' stdout || fail "a bare file has a tokenizer: $(cat stdout)"
for dtype in f16 bf16; do
    ok "$SRF" export model.h5 hf-$dtype --format hf --dtype $dtype
    ok "$SRF" import hf-$dtype $dtype.h5
    ! cmp -s model.h5 $dtype.h5 || fail "$dtype loses nothing"
    ok "$SRF" export $dtype.h5 hf-$dtype-2 --format hf --dtype $dtype
    same hf-$dtype/model.safetensors hf-$dtype-2/model.safetensors "$dtype twice: other weights"
done
mkdir empty
ok "$SRF" export hf empty/ --format hf
same hf/model.safetensors empty/model.safetensors "hf to hf: other weights"

# llm.c
ok "$SRF" export model.h5 model.bin --format llmc
grep -q "the tokenizer is left out" stdout || fail "llmc: no word on the tokenizer: $(cat stdout)"
# 93056 parameters; a vocabulary of 16 * 128 needs no padding.
[ "$(stat -c %s model.bin)" -eq $((1024 + 4 * 93056)) ] || fail "llmc: $(wc -c <model.bin) bytes"
ok "$SRF" import model.bin llmc.h5
ok "$SRF" export llmc.h5 hf-llmc --format hf --json
for part in '"source": "llmc.h5"' '"format": "transformers directory"' '"dtype": "f32"' \
    '"attention": "softmax"' '"tokenizer": false' '"out": "hf-llmc"'; do
    grep -qF "$part" stdout || fail "export --json: no $part in $(cat stdout)"
done
same hf/model.safetensors hf-llmc/model.safetensors "llm.c and back: other weights"
T="$SOURCE/checkpoints/tiny-gpt2/tokenizer.json"
for tokenizer in "$T" "$(dirname "$T")" hf model.h5; do # the format has no place for one: it is attached
    ok "$SRF" import model.bin attached.h5 --tokenizer "$tokenizer"
    grep -q "tokenizer of 2048 tokens" stdout || fail "--tokenizer $tokenizer: $(cat stdout)"
    ok "$SRF" eval --model attached.h5 --data text.txt --max-tokens 64 --quiet
done
cp -r hf own
# Longer: what eval's interpolation computes with, for training to go on from.
ok "$SRF" import hf long.h5 --max-positions 96
run "$SRF" eval --model long.h5 --data "$WORK/text.txt" --seq-len 96 --json --quiet
stretched="$(grep -o '"ppl": [0-9.]*' stdout)"
run "$SRF" eval --model hf --data "$WORK/text.txt" --seq-len 96 --json --quiet \
    --positions interpolate --max-positions 96
[ -n "$stretched" ] && grep -qF "$stretched" stdout || fail "stretched: $stretched, $(cat stdout)"
run "$SRF" import hf short.h5 --max-positions 8
[ $status -eq 1 ] && [ ! -e short.h5 ] || fail "positions are cut off: exit $status"

run "$SRF" import own own/model.safetensors
[ $status -eq 1 ] && cmp -s hf/model.safetensors own/model.safetensors ||
    fail "import replaces the weights that it reads: exit $status"
ok "$SRF" import own own/model.h5
cp model.h5 start/model.h5
run "$SRF" info start
[ $status -eq 1 ] && grep -q 'start/model.h5' stderr || fail "info of a run: $(cat stderr)"
run "$SRF" eval --model llmc.h5 --data text.txt
[ $status -eq 1 ] && grep -q -- '--tokenizer' stderr || fail "no word on --tokenizer: $(cat stderr)"
ok "$SRF" export llmc.h5 again.bin --format llmc
same model.bin again.bin "llm.c twice: another file"
ok "$SRF" export model.h5 model16.bin --format llmc --dtype bf16
ok "$SRF" import model16.bin llmc16.h5
ok "$SRF" export llmc16.h5 hf-llmc16 --format hf --dtype bf16
same hf-bf16/model.safetensors hf-llmc16/model.safetensors "llm.c bf16: other weights"

# recurrent
ok "$SRF" retrofit --model model.h5 --data text.txt --out run --steps 2 --batch 2 --seq-len 32 \
    --m 8 --window 8 --threads 1 --quiet
ok "$SRF" export run/model.h5 recurrent.h5 --format recurrent
grep -q "m=8" stdout || fail "recurrent: no word on attention: $(cat stdout)"
ok "$SRF" import recurrent.h5 back.h5
same recurrent.h5 back.h5 "the recurrent kind and back: another file"
ok "$SRF" export run/last.h5 last.h5 --format recurrent --json
grep -q '"attention": "srf .*m=8,.*"tokenizer": true' stdout || fail "export --json: $(cat stdout)"
same recurrent.h5 last.h5 "recurrent from the training checkpoint: another file"
ok "$SRF" export run/model.h5 hf-srf --format hf
grep -q "readers will use softmax" stdout || fail "hf: no word on the lost attention: $(cat stdout)"
ok "$SRF" retrofit --model model.h5 --data text.txt --out by-layer --steps 2 --batch 2 \
    --seq-len 32 --m 8 --layer-windows 8,2 --threads 1 --quiet
ok "$SRF" export by-layer/model.h5 by-layer.h5 --format recurrent
ok "$SRF" retrofit --model model.h5 --data text.txt --out features --steps 2 --batch 2 \
    --seq-len 32 --layer-m 4,12 --layer-windows 8,2 --threads 1 --quiet
ok "$SRF" export features/model.h5 features.h5 --format recurrent
grep -q "m=4,12, " stdout || fail "features by layer: no word of them: $(cat stdout)"
ok "$SRF" export features/model.h5 features-hf --format hf
for model in recurrent by-layer features; do
    for mode in parallel recurrent; do
        ok "$SRF" eval --model $model.h5 --data text.txt --mode $mode --max-tokens 512 \
            --seq-len 64 --threads 1 --quiet --json
        sed 's/.*"ppl": \([0-9.]*\).*/\1/' stdout >$mode
    done
    awk '{ p = $1; getline <"parallel"; d = p / $1 - 1; exit !(d < 1e-4 && d > -1e-4) }' \
        recurrent ||
        fail "$model: perplexity parallel $(cat parallel), recurrent $(cat recurrent)"
done

# One --window is for all layers, of a model that has windows by layer, too.
ppl() {
    ok "$SRF" eval --model "$1" --data text.txt --attention srf --max-tokens 512 --seq-len 64 \
        --threads 1 --quiet --json "${@:2}"
    sed 's/.*"ppl": \([0-9.]*\).*/\1/' stdout
}
[ "$(ppl by-layer.h5 --window 2)" = "$(ppl by-layer.h5 --layer-windows 2,2)" ] &&
    [ "$(ppl by-layer.h5 --window 2)" != "$(ppl by-layer.h5)" ] ||
    fail "--window 2 is not a window of 2 in each layer"

# info
info model.h5 '"kind": "weights"' '"layers": 2' '"attention": "softmax"' '"tokenizer_tokens": 2048'
info run/last.h5 '"kind": "training"' '"step": 2' '"features_stored": true'
info recurrent.h5 '"kind": "recurrent"' '"state_bytes_per_sequence": 10496' '"tokenizer": true'
info by-layer.h5 'windows 8,2 exact' '"state_bytes_per_sequence": 7424'
info hf '"format": "transformers directory"' '"types": "F32"' '"parameters": 93056'
info hf-bf16/model.safetensors '"format": "safetensors file"' '"types": "BF16"'
info bare.safetensors '"tensors": 28' '"tokenizer": false'
info model.bin '"format": "llm.c checkpoint"' '"vocab": 2048' '"tokenizer": false'
info hf/config.json '"format": "config.json"' '"positions": 64'
info hf/tokenizer.json '"format": "tokenizer.json"' '"tokenizer_tokens": 2048'
mkdir alone
cp hf/tokenizer.json alone
info alone '"format": "tokenizer directory"'
ok "$SRF" tokenize text.txt --tokenizer hf --out tokens.h5
info tokens.h5 '"format": "token set"' '"tokenizer_hash"' '"documents": 1'
python3 - <<'END'
import struct
ids = range(100)
open("shard.bin", "wb").write(struct.pack("<256i", 20240520, 1, 100, *[0] * 253) +
                              struct.pack("<100H", *ids))
head = b"{'descr': '<u2', 'fortran_order': False, 'shape': (100,), }"
head += b" " * (117 - len(head)) + b"\n"
open("ids.npy", "wb").write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head +
                            struct.pack("<100H", *ids))
END
info shard.bin '"format": "llm.c tokens"' '"tokens": 100'
info ids.npy '"format": "NumPy array of tokens"' '"tokens": 100'


# A signal while a large file is written ends the command, and leaves nothing of it.
# ended FOLDER COMMAND...: until it has come in time.
ended() {
    local folder="$1" pid i try
    shift
    mkdir "$folder"
    for ((try = 0; try < 10; try++)); do
        "$@" >stdout 2>stderr &
        pid=$!
        for ((i = 0; i < 2000; i++)); do
            [ -z "$(ls "$folder")" ] || break
            sleep 0.005
        done
        kill -TERM $pid
        wait $pid 2>/dev/null
        status=$?
        [ $status -eq 0 ] || break
        rm -r "${folder:?}"/*
    done
    [ $status -eq 143 ] || fail "$*: expected an end by SIGTERM, found $status: $(cat stderr)"
    [ -z "$(find "$folder" -mindepth 1)" ] || fail "$*: leaves $(find "$folder")"
}
succeed "$SRF" import model.h5 long.h5 --max-positions 1000000
ended cut-import "$SRF" import long.h5 cut-import/out.h5
ended cut-hf "$SRF" export long.h5 cut-hf/out --format hf
ended cut-llmc "$SRF" export long.h5 cut-llmc/out.bin --format llmc
rm long.h5
finish
