# What the shell tests share: source it with the test's own arguments (SRF PROGRAM, SOURCE FOLDER).
# Changes to a fresh folder that goes away at the end; the test passes if it ends with `finish`.
# No `| grep -q`: grep ends at the first match, and a command that is still writing then fails the
# pipe.
set -uo pipefail
SRF="$1" SOURCE="$2"
WORK="$(mktemp -d "${TMPDIR:-/tmp}/srf-test.XXXXXX")"
failures=0 # of expect
finished=0
cd "$WORK" || exit 1

cleanup() {
    local status=$?
    rm -rf "$WORK"
    [ $finished = 1 ] || echo "the test ended early, status $status"
}
trap cleanup EXIT

# fail WHAT: note a failure and go on.
fail() {
    failures=$((failures + 1))
    echo "FAILED: $*"
}

# die WHAT: what follows makes no sense without it.
die() {
    echo "FAILED: $*"
    finished=1
    exit 1
}

finish() {
    finished=1
    echo "$failures failures"
    [ "$failures" -eq 0 ]
    exit
}

# run COMMAND...: sets status, and leaves stdout and stderr in files of those names.
run() {
    "$@" >stdout 2>stderr </dev/null
    status=$?
}

# succeed COMMAND...: nothing that follows makes sense unless it does.
succeed() {
    run "$@"
    [ $status -eq 0 ] || die "$*: exit $status: $(cat stderr)"
}

# Every path here, with size and time for files.
snapshot() {
    find . -type d -print -o ! -name stdout ! -name stderr -printf '%p %s %T@\n' | sort
}

# complain EXIT WORDS COMMAND...: exits so, with one line of error that holds the words, and prints
# nothing.
complain() {
    local expected="$1" words="$2"
    shift 2
    run "$@"
    [ $status -eq "$expected" ] || fail "$*: expected exit $expected, found $status: $(cat stderr)"
    [ "$(wc -l <stderr)" -eq 1 ] || fail "$*: expected one line of error: $(head -c 2000 stderr)"
    grep -q '^srf: error: ' stderr || fail "$*: no 'srf: error:' in: $(head -c 2000 stderr)"
    grep -qF -- "$words" stderr || fail "$*: expected '$words' in: $(head -c 2000 stderr)"
    [ ! -s stdout ] || fail "$*: prints $(head -c 100 stdout)"
}

# refuse EXIT WORDS COMMAND...: the same, and all files stay as they were.
refuse() {
    local before after
    before=$(snapshot)
    complain "$@"
    shift 2
    after=$(snapshot)
    [ "$after" = "$before" ] || fail "$*: changes files: $(diff <(echo "$before") <(echo "$after"))"
}

# A tiny GPT-2 with the bundled tokenizer (model.h5), and a text of its own to train on (text.txt).
make_tiny_model() {
    cat >config.json <<'END'
{"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64,
 "vocab_size": 2048, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
 "bos_token_id": 0, "eos_token_id": 0}
END
    awk 'BEGIN {
        split("the king and of a river house went saw came to unto stone hand day night", word, " ")
        x = 1
        for (i = 0; i < 4000; i++) {
            x = (x * 16807) % 2147483647
            printf "%s%s", word[x % 16 + 1], i % 12 == 11 ? ".\n" : " "
        }
    }' >text.txt
    "$SRF" train --init config.json --tokenizer "$SOURCE/checkpoints/tiny-gpt2/tokenizer.json" \
        --data text.txt --out start --steps 2 --batch 4 --seq-len 32 --quiet >/dev/null ||
        die "cannot make the tiny model"
    mv start/model.h5 model.h5
}
