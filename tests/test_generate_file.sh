#!/usr/bin/env bash
# srf generate --input: a file of prompts, its results, and going on after a kill -9, Ctrl-C, a torn
# line. SRF_KILL_TESTS: how many runs are killed (3).
source "$(dirname "$0")/shell.sh"
command -v python3 >/dev/null || { finished=1; exit 77; }
times="${SRF_KILL_TESTS:-3}"
RANDOM="${SRF_TEST_SEED:-17}"
make_tiny_model
generate=("$SRF" generate --model model.h5 --attention srf --threads 1 --quiet)

# ok ARGUMENT..., bad EXIT WORDS ARGUMENT...: succeeds, fails, perhaps with some results.
ok() {
    succeed "${generate[@]}" "$@"
}
bad() {
    complain "$1" "$2" "${generate[@]}" "${@:3}"
}

python3 - <<'END'
import json, random
random.seed(7)
words = "the king and of a river house went saw came to unto".split()
def text(most):
    return " ".join(random.choice(words) for _ in range(random.randint(0, most)))
with open("prompts.jsonl", "w") as f:
    for i in range(400):
        prompt = {"prompt": text(20), "n": random.randint(1, 30)}
        if i % 3 == 0:
            prompt["id"] = {"number": i}
        if i % 5 == 0:
            prompt["seed"] = i
        if i % 7 == 0:
            prompt["stop"] = ["e", "in"]
        if i % 11 == 0:
            f.write("  \n")
        f.write(json.dumps(prompt) + ("" if i == 399 else "\n")) # the last line without its end
END

# Every line once, in order, the same whatever runs beside it, and what a single prompt gets.
for batch in 1 3 16; do
    ok --input prompts.jsonl --output out$batch.jsonl --batch $batch
done
cmp out1.jsonl out3.jsonl || fail "a batch of 3 gives other results"
cmp out1.jsonl out16.jsonl || fail "a batch of 16 gives other results"
ok --input prompts.jsonl --output done.jsonl --batch 16 --order 'done'
cmp <(sort out1.jsonl) <(sort done.jsonl) || fail "--order done gives other results"
cmp -s out1.jsonl done.jsonl && fail "--order done waits for earlier ones"
"${generate[@]}" --input - --output - --batch 16 <prompts.jsonl >stdout
cmp out1.jsonl stdout || fail "standard input and output give other results"
python3 - "${generate[@]}" <<'END' || fail "the results are not those of the prompts"
import json, subprocess, sys
lines = open("prompts.jsonl").read().split("\n")
prompts = [(i + 1, json.loads(l)) for i, l in enumerate(lines) if l.strip()]
records = [json.loads(l) for l in open("out3.jsonl")]
assert [r["line"] for r in records] == [i for i, p in prompts]
stopped = 0
for (line, p), r in zip(prompts, records):
    assert p.get("id") == r.get("id"), (p, r)
    assert r["finish"] == "stop" or r["tokens"] == p["n"], (p, r)
    if "stop" in p and r["finish"] == "stop":
        stopped += 1
        assert not any(s in r["text"] for s in p["stop"])
assert stopped > 20, stopped
for (line, p), r in list(zip(prompts, records))[5:400:80]: # with seeds of their own
    assert "seed" in p
    alone = subprocess.run(sys.argv[1:] + ["--prompt", p["prompt"], "--seed", str(p["seed"]), "-n",
                           str(p["n"]), "--json"], capture_output=True, check=True)
    text = json.loads(alone.stdout)["texts"][0]
    assert r["text"] == text or "stop" in p and text.startswith(r["text"]), (r, text)
END

# A first prompt that takes longer than as many others as wait for their place in the order.
python3 - >slow.jsonl <<'END'
import json
print(json.dumps({"tokens": [5], "n": 60}))
for i in range(1500):
    print(json.dumps({"tokens": [5 + i % 50], "n": 1}))
END
ok --input slow.jsonl --output slow.out --batch 40 --ignore-eos
python3 - <<'END' || fail "results behind a slow one"
import json
lines = [json.loads(line)["line"] for line in open("slow.out")]
assert lines == list(range(1, 1502)), len(lines)
END

# Ids in and out.
echo '{"tokens": [5, 6, 7], "n": 4}' >ids.jsonl
ok --input ids.jsonl --output ids.out --ids
grep -q '"tokens": 4, .*"ids": \[[0-9]*, [0-9]*, [0-9]*, [0-9]*\]' ids.out || fail "$(cat ids.out)"

# A stop string that comes in pieces, and one of the command line.
ok --input ids.jsonl --output stop.out --stop nowhere
python3 -c 'import json; t = json.load(open("ids.out"))["text"]
print(json.dumps({"tokens": [5, 6, 7], "n": 4, "stop": t[2:-2]}))' >stop.jsonl
ok --input stop.jsonl --output stop2.out
python3 - <<'END' || fail "a stop string over several tokens: $(cat stop2.out)"
import json
whole, cut = json.load(open("ids.out")), json.load(open("stop2.out"))
assert cut["text"] == whole["text"][:2] and cut["finish"] == "stop", cut
assert json.load(open("stop.out"))["text"] == whole["text"]
END

# Both at once, of texts that end together: the one that begins first.
later="$(python3 -c 'import json; print(json.load(open("ids.out"))["text"][3:-2], end=".")')"
ok --input stop.jsonl --output stop3.out --stop "${later%.}"
python3 - <<'END' || fail "two stop strings that overlap: $(cat stop3.out)"
import json
whole, cut = json.load(open("ids.out")), json.load(open("stop3.out"))
assert cut["text"] == whole["text"][:2] and cut["finish"] == "stop", cut
END

# Killed, killed again, interrupted, torn: resumed, each prompt is answered once and the same.
for ((i = 1; i <= times; i++)); do
    rm -f out.jsonl*
    [ $((i % 2)) = 1 ] && order=input || order='done'
    options=(--input prompts.jsonl --output out.jsonl --batch 5 --order "$order")
    for signal in KILL KILL INT; do
        "${generate[@]}" "${options[@]}" --resume >/dev/null 2>stderr &
        pid=$!
        for ((k = 0; k < 500; k++)); do # until something is there
            [ -s out.jsonl ] || ! kill -0 $pid 2>/dev/null && break
            sleep 0.01
        done
        sleep 0.0$((RANDOM % 9))
        kill -$signal $pid 2>/dev/null
        wait $pid 2>/dev/null
        status=$?
        if [ $signal = INT ] && [ $status -ne 0 ]; then
            [ $status -eq 1 ] && grep -q 'interrupted: --resume goes on' stderr ||
                fail "Ctrl-C: exit $status: $(cat stderr)"
        elif [ $signal = INT ]; then # it came too late
            [ "$(wc -l <out.jsonl)" -eq 400 ] || fail "Ctrl-C: exit 0 with prompts left"
        fi
        python3 -c 'import json
for l in open("out.jsonl"): l.endswith("\n") and json.loads(l)' ||
            fail "run $i: not all lines are whole"
        [ "$(wc -l <out.jsonl)" -lt 400 ] && # what a power cut could leave
            printf '{"line": 399, "te' >>out.jsonl
    done
    "${generate[@]}" "${options[@]}" --resume || fail "run $i: resume"
    cmp <(sort out1.jsonl) <(sort out.jsonl) || fail "run $i ($order): other results"
    [ "$order" = 'done' ] || cmp out1.jsonl out.jsonl || fail "run $i: another order"
done
ok --input prompts.jsonl --output out.jsonl --batch 5 --order $order --resume --json # all is there
grep -q '"prompts": 0, "errors": 0, "earlier": 400,' stdout || fail "$(cat stdout)"

# Not over what is there, not with other settings, another model, another input.
head -50 out1.jsonl >part.jsonl
cp part.jsonl before
cp out1.jsonl.settings.json part.jsonl.settings.json
part=(--input prompts.jsonl --output part.jsonl --resume)
bad 1 'holds something already' --input prompts.jsonl --output part.jsonl
bad 1 'made with temperature 1.0, this is 0.5' "${part[@]}" --temperature 0.5
bad 1 'made with top_k 0, this is 5' "${part[@]}" --top-k 5
bad 1 'made with positions "error", this is "wrap"' "${part[@]}" --positions wrap
bad 1 'made with order "input", this is "done"' "${part[@]}" --order 'done'
bad 1 'made with stop null, this is ["x"]' "${part[@]}" --stop x
bad 1 'made with attention {"kind":"srf","m":64,' "${part[@]}" --draw 3
"$SRF" train --model model.h5 --data text.txt --out other --steps 1 --batch 1 --seq-len 8 \
    --quiet >/dev/null || die "other"
run "$SRF" generate --model other/model.h5 --attention srf --threads 1 --quiet "${part[@]}"
[ $status -eq 1 ] && grep -q 'made with model' stderr || fail "another model: $(cat stderr)"
sed 's/"number": 0/"number": 1/' prompts.jsonl >other.jsonl
bad 1 'line 2 with another id' --input other.jsonl --output part.jsonl --resume
sed 's/{"line": 30,/{"lime": 30,/' before >part.jsonl
cp part.jsonl before2
bad 1 'is no record of srf generate' "${part[@]}"
cmp -s before2 part.jsonl || fail "a foreign file was changed"
sed '3p' before >part.jsonl
bad 1 'answers line' "${part[@]}"
grep -q 'twice' stderr || fail "a line answered twice: $(cat stderr)"
rm part.jsonl.settings.json
bad 1 'No such file' "${part[@]}"

# Bad lines: one error that names the line, or a record.
printf '%s\n' '{"prompt": "the king", "n": 2}' '{"prompt": 3, "id": 7}' '{"prompt": "x"' '[1]' \
    '{"prompt": "x", "tokens": [1]}' '{"id": 1}' '{"tokens": [2048]}' '{"tokens": []}' \
    '{"prompt": "x", "n": 0}' '{"prompt": "x", "n": 65}' '{"prompt": "x", "sede": 1}' \
    '{"prompt": "x", "stop": [""]}' '{"prompt": "x", "seed": -1}' '{"prompt": "x", "prompt": "y"}' \
    '{"prompt": "\ud800"}' $'{"prompt": "\xff"}' '{"prompt": "the house", "n": 2}' >bad.jsonl
bad 1 'bad.jsonl: line 2: "prompt": expected a string' --input bad.jsonl --output bad.out
[ "$(wc -l <bad.out)" -eq 1 ] || fail "what came before the bad line is not there"
ok --input bad.jsonl --output bad.out --resume --on-error record --batch 3
python3 - <<'END' || fail "bad lines: $(cat bad.out)"
import json
records = [json.loads(l) for l in open("bad.out")]
assert [r["line"] for r in records] == list(range(1, 18))
assert all(f"line {r['line']}: " in r["error"] for r in records[1:16]), records
assert "text" in records[0] and "text" in records[16] and records[1]["id"] == 7
for i, words in {4: "object", 5: "both", 6: "neither", 7: "2048", 10: "positions end at 64",
                 11: '"sede"', 14: "uplicate"}.items():
    assert words in records[i - 1]["error"], (i, records[i - 1])
END
printf '\357\273\277{"prompt": "the king"}\r\n\r\n' >bom.jsonl
printf '{"prompt": "the king"}' >plain.jsonl
for name in bom plain; do
    "${generate[@]}" --input $name.jsonl --output $name.out || fail "$name: exit $?"
done
cmp bom.out plain.out || fail "a byte order mark changes the text"
# The seed 0 is one, too; names of tokens are those tokens.
cat >named.jsonl <<'END'
{"prompt": "<|endoftext|>", "n": 8, "seed": 0}
{"tokens": [0], "n": 8, "seed": 0}
END
"${generate[@]}" --input named.jsonl --output named.out --seed 5
python3 - <<'END' || fail "seed 0, or a token's name: $(cat named.out)"
import json
texts = [json.loads(line)["text"] for line in open("named.out")]
assert texts[0] == texts[1]
END
head -c 67200000 /dev/zero | tr '\0' x >long.jsonl
bad 1 'line 1 is longer than 64 MB' --input long.jsonl --output long.out
rm long.jsonl

# Memory: said before it starts, refused where it does not fit.
run "$SRF" generate --model model.h5 --attention srf --threads 1 --input ids.jsonl --output - \
    --batch 7
grep -q '^7 slots take .* MiB, one more .* KiB; [0-9]* fit into' stderr || fail "$(cat stderr)"
bad 1 'are free: at most' --m 65536 --batch 1000000 --input ids.jsonl --output wide.out
[ ! -e wide.out ] || fail "a refused run leaves an output"

# What is printed does not go into the results where the error stream is closed.
"$SRF" generate --model model.h5 --attention srf --threads 1 --input - --output closed.out \
    <ids.jsonl 2>&- || fail "2>&-: exit $?"
[ "$(grep -c '^{"line": ' closed.out)" -eq "$(wc -l <closed.out)" ] ||
    fail "2>&-: $(tail -1 closed.out)"

# Tokens of the model that the tokenizer lacks, and of the tokenizer that the model lacks.
sed 's/"vocab_size": 2048/"vocab_size": 3000/' config.json >padded.json
"$SRF" train --init padded.json --tokenizer "$SOURCE/checkpoints/tiny-gpt2/tokenizer.json" \
    --data text.txt --out padded --steps 1 --batch 1 --seq-len 8 --quiet >/dev/null || die "padded"
padded=("$SRF" generate --model padded/model.h5 --attention srf --threads 1 --quiet)
echo '{"tokens": [5, 2999], "n": 60}' >padded.jsonl
succeed "${padded[@]}" --input padded.jsonl --output padded.out --ids --ignore-eos
succeed "${padded[@]}" --input padded.jsonl --output stopped.out --ids --ignore-eos --stop nowhere
succeed "${padded[@]}" --prompt 'the king' --ignore-eos --json -n 40
cp stdout padded.text
succeed "${padded[@]}" --prompt 'the king' --ignore-eos -n 40
python3 - <<'END' || fail "tokens that the tokenizer lacks: $(cat padded.out padded.text)"
import json
whole, stopped = json.load(open("padded.out")), json.load(open("stopped.out"))
assert max(whole["ids"]) >= 2048 and whole["text"] == stopped["text"]
assert whole["text"].count("\ufffd") >= sum(i >= 2048 for i in whole["ids"])
text = json.load(open("padded.text"))["texts"][0]
assert "\ufffd" in text
printed = open("stdout", "rb").read().decode(errors="replace")
assert printed == "the king" + text + "\n", printed
END
head -c 2000 text.txt >short.txt
succeed "$SRF" validate --model padded/model.h5 --attention srf --teacher padded/model.h5 \
    --data short.txt --out errors --seq-len 32 --draws 2 --kernel-draws 2 --threads 1
"$SRF" export model.h5 more --format hf >/dev/null || die "more"
python3 - <<'END'
import json
t = json.load(open("more/tokenizer.json"))
t["added_tokens"].append({"id": 2048, "content": "<pad>", "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True})
json.dump(t, open("more/tokenizer.json", "w"))
END
printf '%s\n' '{"prompt": "the", "n": 2}' '{"prompt": "<pad>"}' '{"prompt": "king", "n": 2}' \
    >more.jsonl
more=("$SRF" generate --model more --attention srf --threads 1 --quiet)
succeed "${more[@]}" --input more.jsonl --output more.out --batch 3 --on-error record
grep -q 'line 2: token id 2048: the model.s vocabulary has 2048' more.out &&
    [ "$(wc -l <more.out)" -eq 3 ] || fail "a token that the model lacks: $(cat more.out)"

# The same weights with another tokenizer are another model.
ok --input ids.jsonl --output tokenizer.out
complain 1 'made with tokenizer' "${more[@]}" --input ids.jsonl --output tokenizer.out --resume

# Prompts that come one at a time, each after the last one's answer, bad ones too; and an output
# that cannot take what it is given at once.
timeout 120 python3 - "${generate[@]}" <<'END' || fail "prompts that wait for answers: $?"
import fcntl, json, os, signal, subprocess, sys
server = subprocess.Popen(sys.argv[1:] + ["--input", "-", "--output", "-", "--batch", "4",
                          "--on-error", "record"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
for i, line in enumerate([b'{"prompt": "the king", "n": 3}\n', b'{"promt": 1}\n\n',
                          b'{"tokens": [7], "n": 5}\n']):
    server.stdin.write(line[:6])
    server.stdin.flush()
    server.stdin.write(line[6:])
    server.stdin.flush()
    record = json.loads(server.stdout.readline())
    assert ("error" in record) == (i == 1) and record["line"] == [1, 2, 4][i], record
server.stdin.close()
assert server.stdout.read() == b"" and server.wait() == 0

# Ctrl-C while it waits: what has gone to a pipe is not gone on with.
server = subprocess.Popen(sys.argv[1:] + ["--input", "-", "--output", "-"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
server.stdin.write(b'{"prompt": "the king", "n": 3}\n')
server.stdin.flush()
json.loads(server.stdout.readline())
server.send_signal(signal.SIGINT)
assert server.wait() == 1 and server.stderr.read() == b"srf: error: interrupted\n"

read, write = os.pipe()
fcntl.fcntl(write, fcntl.F_SETFL, os.O_NONBLOCK)
fcntl.fcntl(write, fcntl.F_SETPIPE_SZ if hasattr(fcntl, "F_SETPIPE_SZ") else 1031, 4096)
writer = subprocess.Popen(sys.argv[1:] + ["--input", "prompts.jsonl", "--output", "-", "--batch",
                          "16"], stdout=write)
os.close(write)
try:
    writer.wait(1) # it fills the pipe, and waits
except subprocess.TimeoutExpired:
    pass
assert open(read, "rb").read() == open("out16.jsonl", "rb").read() and writer.wait() == 0
END

# Two at once on one output; the command line.
mkfifo pipe
"${generate[@]}" --input pipe --output busy.out 2>/dev/null &
pid=$!
exec 3>pipe
while [ ! -e busy.out ]; do sleep 0.02; done
bad 1 'another srf writes it' --input ids.jsonl --output busy.out
exec 3>&-
wait $pid || fail "an empty input: exit $?"
bad 1 'No such file' --input nowhere.jsonl --output x.out
bad 1 'No such file' --input ids.jsonl --output nowhere/x.out
bad 1 'No space left' --input ids.jsonl --output /dev/full
bad 1 'needs an --output that is a file' --input ids.jsonl --output - --resume
bad 2 'no --prompt beside it' --input ids.jsonl --output x.out --prompt x
bad 2 'needs --output' --input ids.jsonl
for option in --resume '--order done' '--on-error record'; do
    bad 2 'belong to --input' --prompt x $option
done
bad 1 '--prefix: a prompt of' --input ids.jsonl --output x.out --prefix @text.txt
[ ! -e x.out ] || fail "a prefix that is too long leaves an output"
bad 2 'expected input or done' --input ids.jsonl --output x.out --order random
finish
