#!/usr/bin/env bash
# srf generate: streaming, JSON, prompts, the end of the positions, Ctrl-C.
source "$(dirname "$0")/shell.sh"
command -v python3 >/dev/null || { finished=1; exit 77; }
make_tiny_model
generate=("$SRF" generate --model model.h5 --attention srf --threads 1)

# ok ARGUMENT..., bad EXIT WORDS ARGUMENT...: succeeds, is refused.
ok() {
    succeed "${generate[@]}" "$@"
}
bad() {
    refuse "$1" "$2" "${generate[@]}" "${@:3}"
}

# The streamed text is that of --json, and of the first of a batch. An untrained model makes tokens
# of all kinds: bytes that are no character, too.
hot=(--temperature 100 -n 60 --seed 5 --ignore-eos)
ok --prompt "Café" "${hot[@]}" --quiet
[ ! -s stderr ] || fail "--quiet: $(cat stderr)"
cp stdout streamed
ok --prompt "Café" "${hot[@]}" --batch 2 --quiet
cp stdout batch
ok --prompt "Café" "${hot[@]}" --json
python3 - <<'END' || fail "the forms of the output differ"
import json
result = json.loads(open("stdout", "rb").read().decode("utf-8"))
streamed = open("streamed", "rb").read()
assert result["tokens"] == 60, result
batch = open("batch", "rb").read()
assert batch.startswith(b"--- 1 ---\n" + streamed + b"--- 2 ---\n")
import re
def whole(text): # a stray byte is one U+FFFD, or part of one
    return re.sub("\ufffd+", "\ufffd", text)
assert whole("Café" + result["texts"][0] + "\n") == whole(streamed.decode("utf-8", "replace"))
assert "\ufffd" in result["texts"][0], "the test wants bytes that are no UTF-8"
END

# Another seed is another text; of the most likely tokens alone there is one, whatever the seed.
ok --prompt "Café" "${hot[@]}" --seed 6 --quiet
cmp -s stdout streamed && fail "--seed 5 and 6 write the same"
ok --prompt "Café" -n 30 --temperature 0 --ignore-eos --quiet
cp stdout greedy
for option in '--top-k 1' '--top-p 1e-9' '--temperature 0 --seed 7'; do
    ok --prompt "Café" -n 30 --seed 6 --ignore-eos --quiet $option
    cmp -s stdout greedy || fail "$option: not the most likely tokens"
done

# The rate is that of the steps: a text's first token comes out of its prefill.
for n in 1 2; do
    ok --prompt 'the king' -n $n --ignore-eos --batch 3 --json
    python3 - $n <<'END' || fail "the rate of $n tokens"
import json, sys
result = json.load(open("stdout"))
steps = int(sys.argv[1]) - 1
assert result["tokens"] == 3 * (steps + 1), result
assert abs(result["tokens_per_s"] * result["decode_s"] - 3 * steps) < 0.3 * steps + 1e-9, result
END
done
ok --prompt 'the king' -n 1 --ignore-eos
grep -q '^1 token; state' stderr || fail "the rate of no step: $(cat stderr)"

# The end token ends a text and is none of it.
ok --prompt 'the king' --temperature 100 -n 62 --seed 1 --batch 99 --json
python3 - <<'END' || fail "the end token: $(head -c 300 stdout)"
import json
result = json.load(open("stdout"))
assert not any("<|endoftext|>" in text for text in result["texts"])
assert result["tokens"] < 99 * 62, "the test wants texts that end"
END

# Prompts: from a file, empty, two of them.
printf 'the king' >prompt.txt
ok --prompt-file prompt.txt -n 3 --quiet
cp stdout file
ok --prompt 'the king' -n 3 --quiet
cmp -s file stdout || fail "--prompt-file gives another text than --prompt"
"${generate[@]}" --prompt-file - -n 3 --quiet <prompt.txt >stdout || fail "--prompt-file -: exit $?"
cmp -s file stdout || fail "--prompt-file - gives another text than --prompt"
for end in '\n' '\r\n'; do
    printf 'the king%b' "$end" | "${generate[@]}" --prompt-file - -n 3 --quiet >stdout
    cmp -s file stdout || fail "--prompt-file: '$end' at the end is part of the prompt"
done
printf 'the king\n\n' | "${generate[@]}" --prompt-file - -n 3 --quiet >stdout
cmp -s file stdout && fail "--prompt-file: an empty line at the end is no part of the prompt"
bad 2 'two prompts' --prompt x --prompt-file prompt.txt
bad 1 'No such file' --prompt-file nowhere.txt
bad 1 'Is a directory' --prompt-file .
ok -n 3 --temperature 0 --quiet
cp stdout empty
ok -n 3 --temperature 0 --quiet --prompt '<|endoftext|>'
[ "<|endoftext|>$(cat empty)" = "$(cat stdout)" ] || fail "an empty prompt starts elsewhere"

# A model that names no start token has its tokenizer's.
cat >bare.json <<'END'
{"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 64,
 "vocab_size": 2048, "layer_norm_epsilon": 1e-5}
END
"$SRF" train --init bare.json --tokenizer "$SOURCE/checkpoints/tiny-gpt2/tokenizer.json" \
    --data text.txt --out bare --steps 2 --batch 4 --seq-len 32 --quiet >/dev/null || die "bare"
run "$SRF" generate --model bare/model.h5 --attention srf -n 3 --quiet
[ $status -eq 0 ] || fail "no start token in the config: $(cat stderr)"

# 64 positions: the last token is made at the last of them and never fed.
ok --prompt '<|endoftext|>' -n 64 --ignore-eos --json
grep -q '"kv_positions": 64,' stdout || fail "positions: $(cat stdout)"
bad 1 'positions end at 64' --prompt '<|endoftext|>' -n 65
bad 1 'positions end at 64' --prompt-file text.txt
ok --prompt '<|endoftext|>' --ignore-eos --json # without -n: as many as there is room for
grep -q '"tokens": 64,' stdout || fail "without -n: $(cat stdout)"

# Past the positions by a policy; up to their end wrap and clamp change nothing.
ok --prompt 'the king' -n 40 --seed 3 --quiet
cp stdout within
for policy in wrap clamp; do
    ok --prompt 'the king' -n 40 --seed 3 --quiet --positions $policy
    cmp -s within stdout || fail "$policy changes what is before the end"
    ok --prompt 'the king' -n 200 --seed 3 --ignore-eos --json --positions $policy
    grep -q '"tokens": 200,' stdout || fail "$policy: $(cat stdout)"
    ok --prompt-file text.txt -n 3 --quiet --positions $policy
done
ok --prompt 'the king' -n 200 --ignore-eos --json --positions interpolate --max-positions 256
grep -q '"tokens": 200,' stdout || fail "interpolate: $(cat stdout)"
bad 1 'positions end at 256' --prompt 'x' -n 257 --positions interpolate --max-positions 256
bad 1 'expected error, wrap, clamp or interpolate' --prompt x --positions ring

# Ctrl-C: what there is stays, one line says why.
cat >long.json <<'END'
{"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 1000000,
 "vocab_size": 2048, "layer_norm_epsilon": 1e-5, "bos_token_id": 0, "eos_token_id": 0}
END
"$SRF" train --init long.json --tokenizer "$SOURCE/checkpoints/tiny-gpt2/tokenizer.json" \
    --data text.txt --out long --steps 1 --batch 1 --seq-len 8 --quiet >/dev/null || die "long"
for form in stream json state; do
    case $form in
    stream) options=() ;;
    json) options=(--json) ;;
    state) options=(--state-out half.h5) ;;
    esac
    "$SRF" generate --model long/model.h5 --attention srf --m 4 --window 0 --threads 1 \
        --ignore-eos --prompt 'the king' -n 900000 "${options[@]}" >stdout 2>stderr &
    pid=$!
    for ((i = 0; i < 3000; i++)); do # a busy machine starts slowly
        # Generation has begun when SIGINT is caught: the second bit of the mask. But not the
        # shell's own copy, which catches it for a moment, and then leaves it ignored for srf.
        [ ! /proc/$pid/exe -ef "$SRF" ] ||
            ! grep -q 'SigCgt:.*[2367abef]$' /proc/$pid/status || break
        kill -0 $pid || die "Ctrl-C ($form): it has ended before: $(cat stderr)"
        sleep 0.02
    done
    sleep 0.2
    kill -INT $pid
    wait $pid
    status=$?
    [ $status -eq 1 ] || fail "Ctrl-C ($form): exit $status"
    grep -q '^srf: error: interrupted' stderr || fail "Ctrl-C ($form): $(cat stderr)"
    if [ $form = json ]; then
        python3 -c 'import json; assert json.load(open("stdout"))["tokens"] > 0' || fail "no JSON"
    else
        [ "$(head -c 8 stdout)" = "the king" ] && [ "$(wc -c <stdout)" -gt 20 ] ||
            fail "Ctrl-C: the text is gone: $(head -c 100 stdout)"
    fi
    [ ! -e half.h5 ] || fail "Ctrl-C: a state of half a text"
done

# A full disk.
"${generate[@]}" -n 3 --quiet >/dev/full 2>stderr && fail "a full disk is no error"
[ "$(wc -l <stderr)" -eq 1 ] || fail "a full disk: $(cat stderr)"
# A model with features of its own: other ones, of any number, are drawn and not read past its.
"$SRF" retrofit --model model.h5 --data text.txt --out own --steps 2 --batch 2 --seq-len 32 --m 8 \
    --window 0 --quiet --threads 1 >/dev/null || die "retrofit failed"
"$SRF" export own/model.h5 own.h5 --format recurrent >/dev/null || die "export failed"
generate=("$SRF" generate --model own.h5 --threads 1 -q -n 3 --state-out state.h5)
ok --prompt 'the king'
[ ! -s stderr ] || fail "its own features: $(cat stderr)"
mv state.h5 own.state.h5
for other in '--m 64' '--m 3' '--draw 5' '--features iid'; do
    ok --prompt 'the king' $other
    grep -q '^srf: note: .*other features' stderr || fail "generate $other: $(cat stderr)"
    ! cmp -s state.h5 own.state.h5 || fail "generate $other: the model's own features still"
    run "$SRF" eval --model own.h5 --data text.txt --max-tokens 200 -q $other
    grep -q '^srf: note: .*other features' stderr || fail "eval $other: $(cat stderr)"
done
ok --prompt 'the king' --draw 0
cmp state.h5 own.state.h5 || fail "the draw that it has: another state"
ok --prompt 'the king' --window 4
[ ! -s stderr ] || fail "its own features with a window: $(cat stderr)"
finish
