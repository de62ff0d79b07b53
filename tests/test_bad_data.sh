#!/usr/bin/env bash
# Malformed tokenizers, token sets, texts and command lines of srf tokenize: exit 1 (2 for the
# command line), exactly one line of error that names the matter, no output, nothing left behind.
source "$(dirname "$0")/shell.sh"
T="$SOURCE/checkpoints/tiny-gpt2/tokenizer.json"
[ -f "$T" ] || die "no $T"
echo 'Some text.' >text.txt
"$SRF" tokenize text.txt --tokenizer "$T" --out good.h5 >/dev/null || die "cannot make good.h5"
rows=0

# reject EXIT WORDS ARGUMENT...: srf tokenize ARGUMENT... fails in this way.
reject() {
    rows=$((rows + 1))
    refuse "$1" "$2" "$SRF" tokenize "${@:3}"
}

# Command lines.
reject 2 'missing argument' --tokenizer "$T" --out x.h5
reject 2 'needs --tokenizer' text.txt --out x.h5
reject 2 'needs --out' text.txt --tokenizer "$T"
reject 2 'belong together' text.txt --tokenizer "$T" --out x.h5 --holdout-every 2
reject 2 'belong together' text.txt --tokenizer "$T" --out x.h5 --holdout-out y.h5
reject 2 'same file' text.txt --tokenizer "$T" --out x.h5 --holdout-every 2 --holdout-out x.h5
reject 2 'outside' text.txt --tokenizer "$T" --out x.h5 --holdout-every 1 --holdout-out y.h5
reject 2 'one token set' good.h5 good.h5 --decode --tokenizer "$T"
reject 2 '--decode prints' good.h5 --decode --tokenizer "$T" --out x.h5
reject 2 'unknown option' text.txt --tokenizer "$T" --out x.h5 --outt y

# Texts and places.
reject 1 'No such file' nowhere.txt --tokenizer "$T" --out x.h5
reject 1 'found a directory' . --tokenizer "$T" --out x.h5
reject 1 'the texts are empty' /dev/null --tokenizer "$T" --out x.h5
reject 1 'No such file' text.txt --tokenizer nowhere.json --out x.h5
reject 1 'No such file' text.txt --tokenizer "$T" --out no/such/place.h5
reject 1 'is the output' text.txt --tokenizer "$T" --out ./text.txt
reject 1 'only 1 documents' text.txt --tokenizer "$T" --out x.h5 --holdout-every 2 \
    --holdout-out y.h5

# Tokenizers. tests/test_bpe_files.c has a longer table of what may be wrong inside.
# tokenizer TEXT: writes bad.json
tokenizer() {
    printf '%s' "$1" >bad.json
}
printf '\211HDF\r\n\032\nnot really' >fake.h5
mkdir -p empty vocabulary
echo '{"a": 0}' >vocabulary/vocab.json
touch bad.json
reject 1 'no tokenizer' text.txt --tokenizer empty --out x.h5
reject 1 'without merges' text.txt --tokenizer vocabulary --out x.h5
reject 1 'expected HDF5 with checksums' text.txt --tokenizer fake.h5 --out x.h5
reject 1 'holds no tokenizer' text.txt --tokenizer good.h5 --out x.h5
reject 1 'not JSON' text.txt --tokenizer bad.json --out x.h5
tokenizer '[1, 2'
reject 1 'not JSON' text.txt --tokenizer bad.json --out x.h5
tokenizer '{"version": "9.9"}'
reject 1 'version: expected 1.0, found 9.9' text.txt --tokenizer bad.json --out x.h5
tokenizer '{"model": {"type": "WordPiece"}}'
reject 1 'model.type: expected BPE, found WordPiece' text.txt --tokenizer bad.json --out x.h5
head -c 20000 "$T" >bad.json
reject 1 'not JSON' text.txt --tokenizer bad.json --out x.h5
sed 's/"add_prefix_space": *false/"add_prefix_space": true/' "$T" >bad.json
reject 1 'add_prefix_space: expected false' text.txt --tokenizer bad.json --out x.h5
tokenizer '{"model": {"vocab": {"a": 0}, "merges": []}, "pre_tokenizer":
{"type": "ByteLevel", "add_prefix_space": false}}'
reject 1 'text.txt: encode: byte 0x53 has no token' text.txt --tokenizer bad.json --out x.h5
tokenizer '{"model": {"vocab": {"a": 0}, "merges": ["a \n\u001b[31m"]}, "pre_tokenizer":
{"type": "ByteLevel", "add_prefix_space": false}}'
reject 1 'merge 0' text.txt --tokenizer bad.json --out x.h5

# Token sets. tests/test_tokenset_h5.c and test_tokenset.c have more.
decode() {
    reject 1 "$1" "$2" --decode --tokenizer "$T"
}
decode 'No such file' nowhere.h5
decode 'expected HDF5 with checksums' fake.h5
for n in 1 4 8 100 1000; do
    head -c $n good.h5 >cut.h5
    decode '' cut.h5
done
decode 'no such file' 'shard_*.bin'
printf '\223NUMPY\001\000\012\000not a dict' >bad.npy
decode 'expected a .npy header' bad.npy
printf '\223NUMPY\001\000\377\377{   ' >bad.npy
decode 'a .npy header of 65535 bytes' bad.npy
{
    printf '\223NUMPY\001\000\071\000'
    printf "{'descr': '<u2', 'fortran_order': False, 'shape': (1,), }\377\377"
} >bad.npy
decode 'token 0 has id 65535' bad.npy
printf '\030\330\064\001\001\000\000\000\377\377\377\377' >shard.bin
decode 'found no text' shard.bin
printf '\210\330\064\001\001\000\000\000\377\377\377\377' >shard.bin
decode 'ends inside the llm.c header' shard.bin
head -c 1012 /dev/zero >>shard.bin
decode '4294967295 tokens expected' shard.bin
[ $rows -ge 40 ] || fail "only $rows rows"
finish
