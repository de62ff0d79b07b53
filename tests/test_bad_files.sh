#!/usr/bin/env bash
# Broken files and command lines of import, export and info: each gives exit 1 (files) or 2 (usage),
# one line of error that says what is wrong, nothing on stdout, and leaves nothing behind.
source "$(dirname "$0")/shell.sh"
command -v python3 >/dev/null || { finished=1; exit 77; }

rows=0

# reject EXIT WORDS ARGUMENT...: srf with these arguments fails in this way.
reject() {
    rows=$((rows + 1))
    refuse "$1" "$2" timeout 20 "$SRF" "${@:3}"
}

# bad NAME WORDS: import of this broken source.
bad() {
    reject 1 "$2" import "$1" out.h5
}

# In the sanitizer build: HDF5 1.10 forgets to free an object header whose checksum is wrong.
echo leak:libhdf5 >lsan
export LSAN_OPTIONS="suppressions=$PWD/lsan:print_suppressions=0:${LSAN_OPTIONS:-}"

mkdir files
cd files || exit 1
python3 "$SOURCE/tests/bad_files.py" || die "cannot make the files"

# What the broken ones are copies of is good.
for good in good good-vocab good-shards good-head good.bin good/model.safetensors; do
    run "$SRF" import "$good" good.h5
    [ $status -eq 0 ] || fail "import $good: $(cat stderr)"
    cp good.h5 "imported-$(basename "$good").h5"
    run "$SRF" info "$good"
    [ $status -eq 0 ] || fail "info $good: $(cat stderr)"
done
cmp imported-good.h5 imported-good-shards.h5 || fail "shards give another model"
cmp imported-good.h5 imported-good-head.h5 || fail "a tied head gives another model"
cmp imported-good.h5 imported-model.safetensors.h5 || fail "the bare file gives another model"
cmp imported-good.h5 imported-good.bin.h5 || fail "llm.c gives another model"
mv imported-good-vocab.h5 good.h5
python3 "$SOURCE/tests/bad_files.py" good.h5 || die "cannot break the HDF5 file"

# safetensors
bad st-empty "0 bytes are no safetensors file"
bad st-7-bytes "7 bytes are no safetensors file"
bad st-length-2^63 "expected a header of 9223372036854775808 bytes"
bad st-length-past-end "expected a header of"
bad st-length-too-short "bad JSON"
bad st-length-0 "bad JSON"
bad st-header-truncated "expected a header of"
bad st-header-too-long "a header of 67108864 bytes"
bad st-data-truncated "the file is truncated"
bad st-no-data "the file is truncated"
bad st-trailing-byte "bytes of data, found"
bad st-bad-json "bad JSON in line 1"
bad st-deep-json "bad JSON in line 1"
bad st-not-utf8 "bad JSON"
bad st-duplicate-key "bad JSON"
bad st-array "expected a header object"
bad st-no-object "transformer.wte.weight: expected an object"
bad st-no-dtype "transformer.wte.weight: expected dtype, shape and data_offsets"
bad st-no-shape "transformer.wte.weight: expected dtype, shape and data_offsets"
bad st-unknown-dtype "transformer.wte.weight: expected dtype F32, F16 or BF16, found F4_X"
bad st-int-dtype "transformer.wte.weight: expected dtype F32, F16 or BF16, found I32"
bad st-wrong-dtype-size "transformer.wte.weight: expected 4160 bytes"
bad st-negative-shape "expected a shape of whole numbers"
bad st-fraction-shape "expected a shape of whole numbers"
bad st-shape-overflow "its shape is too large"
bad st-shape-too-big "bad JSON"
bad st-5-dimensions "expected at most 4 dimensions, found 5"
bad st-shape-mismatch "expected 8352 bytes"
bad st-one-offset "bad data_offsets"
bad st-offsets-reversed "bad data_offsets"
bad st-offsets-past-end "the file is truncated"
bad st-gap-first "transformer.wte.weight: expected its data at byte 0, found 4 (a gap)"
bad st-overlap "transformer.wpe.weight: expected its data at byte 8320, found 8316 (tensors overlap)"
bad st-gap "transformer.wpe.weight: expected its data at byte 8320, found 8324 (a gap)"
bad st-transposed "expected shape (260, 8), found (8, 260)"
bad text.safetensors "neither HDF5 nor safetensors nor an llm.c model"

# Tensors
bad missing-tensor "transformer.h.0.ln_2.bias is missing"
bad unknown-tensor "transformer.h.1.ln_1.bias is not one of a gpt2 model"
bad untied-head "lm_head.weight is not transformer.wte.weight again"
bad padded-head "lm_head.weight: expected shape (260, 8), found (264, 8)"
bad twice-with-prefix "ln_f.bias is there twice"
bad nan "transformer.h.0.mlp.c_fc.weight: element 5 is"
bad infinity "transformer.h.0.mlp.c_fc.weight: element 255 is -inf"
bad wrong-shape "transformer.ln_f.weight: expected shape (8), found (8, 1)"
bad empty-name "expected a name of 1 to 255 bytes"
bad long-name "expected a name of 1 to 255 bytes, found 300"

# Configs
bad config-absent "there is no config.json"
bad config-empty "config: not valid JSON"
bad config-bad-json "config: not valid JSON"
bad config-array "config: expected a JSON object"
bad config-deep "config: not valid JSON"
bad config-duplicate "config: not valid JSON"
bad config-is-directory "expected a file, found a directory"
bad config-llama "model_type 'llama' is not supported"
bad config-no-type "'model_type' is missing"
bad config-no-width "'n_embd' is missing"
bad config-text-width "'n_embd' must be a whole number"
bad config-odd-heads "n_embd 8 is not divisible by n_head 3"
bad config-huge "'n_layer' must be a whole number"
bad config-two-layers "transformer.h.1.ln_1.weight is missing"
bad config-wide "expected shape"
bad config-scale-by-layer "scale_attn_by_inverse_layer_idx"
bad config-no-scale "scale_attn_weights"
bad config-relu "relu"
bad config-untied "tie_word_embeddings"
bad config-cross "add_cross_attention"

# Tokenizers
bad vocab-no-merges "merges"
bad vocab-bad-merges "merges"
bad vocab-bad-json "vocab"
bad vocab-larger-than-model "the tokenizer has 1258 tokens, the model's vocabulary 260"
bad tokenizer-bad-json "JSON"
bad tokenizer-other-type "WordPiece"

# Directories
bad no-such-path "No such file or directory"
bad dir-empty "found neither"
bad dir-pickled "save it again with safe_serialization=True"
bad dir-weights-are-directory "expected a file, found a directory"
bad dir-weights-are-fifo "expected a regular file"
bad shard-missing "two.safetensors: No such file"
bad shard-escapes "'../good/model.safetensors' is no file name of a shard"
bad shard-absolute "'/etc/passwd' is no file name of a shard"
bad shard-number "transformer.wte.weight: expected the name of a shard"
bad shard-elsewhere "transformer.wte.weight: expected in two.safetensors, found in one.safetensors"
bad shard-extra "transformer.x is missing in its shard two.safetensors"
bad index-bad-json "bad JSON"
bad index-no-map "expected an object weight_map"
bad index-map-array "expected an object weight_map"
bad index-empty-map "is missing"
if [ "$(id -u)" -ne 0 ]; then
    chmod 0 imported-good.h5
    bad imported-good.h5 "Permission denied"
fi

# llm.c
bad llmc-header-truncated.bin "600 bytes hold no llm.c header"
bad llmc-truncated.bin "bytes by its header, found"
bad llmc-header-only.bin "found 1024"
bad llmc-too-long.bin "bytes by its header, found"
bad llmc-version-1.bin "expected llm.c version 3 (fp32) or 5 (bf16), found 1"
bad llmc-bf16-size.bin "bytes by its header, found"
bad llmc-negative.bin "num_layers is -1"
bad llmc-no-layers.bin "num_layers is 0"
bad llmc-no-heads.bin "num_heads is 0"
bad llmc-3-heads.bin "8 channels for 3 heads"
bad llmc-padding.bin "padded_vocab_size 256 < vocab_size 260"
bad llmc-huge.bin "channels is 2147483647"
bad llmc-huge-width.bin "bytes by its header, found"
bad llmc-nan.bin "transformer.wte.weight: element 3 is"

# HDF5
for percent in 0 1 10 50 90 99; do
    bad h5-cut-$percent.h5 "h5-cut-$percent.h5: "
done
bad h5-magic-only.h5 "8 bytes are no checkpoint"
bad h5-old.h5 "found superblock 0"
bad h5-superblock.h5 "broken HDF5 file"
bad h5-header.h5 "broken HDF5 file: incorrect metadata checksum"
for what in version weights config; do
    bad h5-no-$what.h5 "h5-no-$what.h5: broken HDF5 file: incorrect metadata checksum"
done
run "$SRF" tokenize good/config.json --tokenizer good-vocab --out tokens.h5
[ $status -eq 0 ] || fail "tokenize: $(cat stderr)"
bad tokens.h5 "holds no weights"

# info says no as well.
for file in st-overlap st-deep-json config-relu tokenizer-bad-json shard-escapes dir-empty \
    llmc-truncated.bin llmc-huge.bin h5-cut-50.h5 h5-no-weights.h5 text.safetensors no-such-path; do
    reject 1 "$file: " info $file
done
: >empty
reject 1 "empty: the file is empty" info empty

# What people have in place of safetensors.
printf 'PK\003\004 and a zip file' >pytorch_model.bin
reject 1 "safe_serialization=True" import pytorch_model.bin out.h5
printf '\200\002 and a pickle' >old-pickle.bin
reject 1 "expected safetensors" import old-pickle.bin out.h5
printf 'GGUF and numbers' >model.gguf
reject 1 "GGUF: expected the safetensors" import model.gguf out.h5
printf '{"metadata": {}, "weight_map": {}}' >model.safetensors.index.json
reject 1 "name the directory" import model.safetensors.index.json out.h5
reject 1 "expected a regular file" info /dev/zero

# import: command lines, outputs
reject 2 "missing argument" import
reject 2 "missing argument" import good
reject 2 "unexpected argument 'more'" import good out.h5 more
reject 2 "unknown option '--force'" import good out.h5 --force
reject 2 "--config needs a value" import good out.h5 --config
reject 1 "no-such.json: No such file" import good out.h5 --config no-such.json
reject 1 "config: " import good out.h5 --config text.safetensors
reject 1 "config-relu" import good out.h5 --config config-relu
reject 1 "no-such-dir/out.h5: No such file" import good no-such-dir/out.h5
reject 1 "good/config.json/out.h5: Not a directory" import good good/config.json/out.h5
reject 1 "dir-empty: Is a directory" import good dir-empty
reject 1 "the output path is empty" import good ""

# export
reject 2 "missing argument" export good.h5
reject 2 "export needs --format" export good.h5 out
reject 2 "--format onnx: expected hf, llmc or recurrent" export good.h5 out --format onnx
reject 2 "--dtype f64: expected f32, f16 or bf16" export good.h5 out --format hf --dtype f64
reject 2 "recurrent checkpoints are f32" export good.h5 out --format recurrent --dtype bf16
reject 1 "llm.c files are f32 or bf16, not f16" export good.h5 out --format llmc --dtype f16
reject 1 "a recurrent export needs SRF attention" export good.h5 out --format recurrent
reject 1 "good: the directory is not empty" export good.h5 good --format hf
reject 1 "good.bin: Not a directory" export good.h5 good.bin --format hf
reject 1 "dir-empty: Is a directory" export good.h5 dir-empty --format llmc
reject 1 "no-such-dir/out: No such file" export good.h5 no-such-dir/out --format hf
reject 1 "no-such-dir/out: No such file" export good.h5 no-such-dir/out --format llmc
reject 1 "h5-cut-90.h5: " export h5-cut-90.h5 out --format hf
reject 2 "missing argument" info
reject 2 "unknown option '--yaml'" info --yaml good

# A full disk, by a limit on file sizes: the old file stays.
cp good.h5 old.h5
trap '' XFSZ
for format in hf llmc; do
    (
        failures=0
        ulimit -f 4
        reject 1 "File too large" export good.h5 out --format $format
        reject 1 "File too large" import good old.h5
        [ $failures -eq 0 ]
    ) || fail "with a full disk"
done
cmp good.h5 old.h5 || fail "a failed import changed the old file"

echo "$rows rows"
finish
