#!/usr/bin/env bash
# Tests everything that needs a GPU, on a machine that has one: each op against double references,
# training and evaluation against the CPU, and light cases under compute-sanitizer (memory errors,
# races). One line a program; at the end 'N passed, N failed'. The exit status is 0 only if
# something ran and nothing failed; without a GPU it is a failure.
#
#   scripts/gpu_check.sh                      builds in build/, then tests
#   scripts/gpu_check.sh --pack FILE.tar.xz   builds, then packs all that the tests need, for a
#                                             machine with a GPU but without our libraries' headers;
#                                             the CPU's side of the comparisons is computed here
#   there:  mkdir p && tar xf FILE.tar.xz -C p && p/more/scripts/gpu_check.sh --packed p
#
# Several GPUs (all, or those of CUDA_VISIBLE_DEVICES) share the programs.
# SRF_GPU_LOGS: a folder that keeps the programs' output. SRF_GPU_BUILD: the build's folder (build,
# or build-pack).
start=$SECONDS
here="$(pwd)"
source "$(dirname "$0")/lib.sh"
build="${SRF_GPU_BUILD:-build}" # of a run here

usage() {
    sed -n '2,/^start=/s/^# \{0,1\}//p' "$0"
    exit "$1"
}

make_text() {
    [ -f out/text/train.txt ] || scripts/setup.sh
}

pack() {
    local out="$1" recorded=gpu_reference
    # For any x86-64 of the last ten years, not for this machine's processor.
    scripts/build.sh "$build" -DSRF_CUDA=ON -DSRF_NATIVE=OFF -DCMAKE_C_FLAGS=-march=x86-64-v3
    make_text
    say "The CPU's side of the comparisons"
    rm -rf "$recorded"
    bash tests/gpu_train.sh --record "$ROOT/$build/srf" "$ROOT" "$recorded"
    say "Packing"
    PROGRAMS='srf tests/gpu_*' scripts/pack.sh "$build" "$out" scripts/gpu_check.sh scripts/lib.sh \
        tests/shell.sh tests/gpu_*.sh checkpoints/tiny-gpt2/* "$recorded"/*
    rm -rf "$recorded"
}

absolute() {
    case "$1" in
    /*) echo "$1" ;;
    *) echo "$here/$1" ;;
    esac
}

reference=""
case "${1:-}" in
"")
    scripts/build.sh "$build" -DSRF_CUDA=ON
    make_text
    bin="$ROOT/$build/tests" srf="$ROOT/$build/srf"
    ;;
--pack)
    [ $# -eq 2 ] || usage 2
    build="${SRF_GPU_BUILD:-build-pack}"
    pack "$(absolute "$2")"
    exit
    ;;
--packed)
    [ $# -eq 2 ] || usage 2
    package="$(absolute "$2")"
    bin="$package/bin" srf="$package/bin/srf" reference="$ROOT/gpu_reference"
    export LD_LIBRARY_PATH="$package/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    ;;
-h | --help) usage 0 ;;
*) usage 2 ;;
esac

logs="${SRF_GPU_LOGS:-$(mktemp -d "${TMPDIR:-/tmp}/srf-gpu.XXXXXX")}"
mkdir -p "$logs"
note "output of the programs: $logs"
programs=()
for program in "$bin"/gpu_*; do
    [ ! -x "$program" ] || programs+=("$(basename "$program")")
done
[ ${#programs[@]} -gt 0 ] || die "no gpu_* programs in $bin"
"$bin/${programs[0]}" 'no such case' >"$logs/device" 2>&1 || {
    sed 's/^/    /' "$logs/device"
    echo "0 passed, 1 failed"
    exit 1
}
sanitizer="$(command -v compute-sanitizer ||
    ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)"

# job NAME LIMIT COMMAND...: in the background on the next GPU, output to a log; its exit status to
# NAME.status and its nanoseconds to NAME.ns. At most `parallel` at once.
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    IFS=, read -ra cards <<<"$CUDA_VISIBLE_DEVICES"
else
    mapfile -t cards < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true)
    [ ${#cards[@]} -gt 0 ] || cards=(0)
fi
parallel=$((JOBS > 16 ? 16 : JOBS))
names=()
passed=0 failed=0
job() {
    local name="$1" limit="$2" card="${cards[${#names[@]} % ${#cards[@]}]}"
    shift 2
    names+=("$name")
    rm -f "$logs/$name".{status,ns}
    while [ "$(jobs -rp | wc -l)" -ge "$parallel" ]; do wait -n || true; done
    (
        began=$(date +%s%N)
        status=0
        CUDA_VISIBLE_DEVICES=$card timeout -k 5 "$limit" "$@" >"$logs/$name.log" 2>&1 </dev/null &
        pid=$!
        trap 'kill "$pid"; exit 143' TERM # timeout passes it on
        wait "$pid" || status=$?
        echo "$(($(date +%s%N) - began))" >"$logs/$name.ns"
        echo $status >"$logs/$name.status"
        result "$name"
    ) &
}

# result NAME: what became of a job that has ended; one write, since several may end at once.
result() {
    local name="$1" status words text
    status="$(cat "$logs/$name.status")"
    words="$(sed -n 's/^\[  \(PASSED\|FAILED\)  \] \([0-9]* test(s)\).*/\2 \1/p' \
        "$logs/$name.log" | tr 'A-Z\n' 'a-z ')"
    words="$words$(grep -ahE 'ERROR SUMMARY|RACECHECK SUMMARY|^[0-9]+ failures$' \
        "$logs/$name.log" | sed 's/^=* *//' | tail -1 || true)"
    text="$(printf '%-4s %-28s %6.1f s  %s' "$([ "$status" = 0 ] && echo ok || echo FAIL)" "$name" \
        "$(awk '{print $1 / 1e9}' "$logs/$name.ns")" \
        "$([ "$status" != 124 ] && [ "$status" != 137 ] || echo "out of time; ")$words")"
    [ "$status" = 0 ] ||
        text="$text$(grep -aE '^\[  FAILED  \]|^FAILED|relative error|off by|other bits|rror:' \
            "$logs/$name.log" | head -20 | sed 's/^/         /; 1s/^/\n/' || true)"
    printf '%s\n' "$text"
}

# count: into passed and failed, with what has not ended among the failed.
count() {
    local name
    for name in "${names[@]}"; do
        if [ "$(cat "$logs/$name.status" 2>/dev/null)" = 0 ]; then
            passed=$((passed + 1))
        else
            failed=$((failed + 1))
        fi
    done
    names=()
}

# Nothing goes on running when this is stopped, and what was seen is said.
stopped() {
    local name
    trap '' INT TERM
    # shellcheck disable=SC2046 # a word a process
    kill $(jobs -rp) 2>/dev/null || true
    for name in "${names[@]}"; do
        [ -e "$logs/$name.status" ] || echo "FAIL $name: stopped before its end"
    done
    count
    echo "$passed passed, $failed failed: stopped after $((SECONDS - start)) s"
    exit 130
}
trap 'kill $(jobs -rp) 2>/dev/null || true' EXIT
trap stopped INT TERM

# References in double take most of the programs' time: threads that wait leave the cores to
# others.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}" OMP_WAIT_POLICY=passive
# The checkers' long kernels come after the programs: all share the GPU by turns.
say "Programs"
job gpu_train 300 bash tests/gpu_train.sh "$srf" "$ROOT" $reference
while read -r program; do
    # Minutes of references, one case after the other: several processes, each its share of cases.
    case "$program" in
    gpu_srf_recurrent) parts=6 ;;
    gpu_linear | gpu_srf_attn | gpu_srf_range | gpu_softmax_attn) parts=3 ;;
    *) parts=1 ;;
    esac
    for ((i = 0; i < parts; i++)); do
        job "$program$([ $parts = 1 ] || echo ".$i")" 400 env SRF_GPU_PART=$i/$parts "$bin/$program"
    done
done < <(printf '%s\n' "${programs[@]}" | sort -r) # SRF attention's, the longest, first
wait
count

# Programs on one GPU take turns of milliseconds, and the more there are the longer one of many small
# launches waits: a few at once. All kernels are looked into: with --kernel-name for ours alone
# racecheck failed inside cuBLAS's ("failed to handle a hardware exception", CUDA 13.0).
parallel=$((parallel < 6 * ${#cards[@]} ? parallel : 6 * ${#cards[@]}))
say "Light cases under compute-sanitizer"
if [ -n "$sanitizer" ]; then
    for tool in racecheck memcheck; do
        while read -r program; do
            job "$program.$tool" 240 env SRF_GPU_SMALL=1 "$sanitizer" --tool $tool \
                --error-exitcode 9 "$bin/$program"
        done < <(printf '%s\n' "${programs[@]}" | sort -r)
    done
else
    note "no compute-sanitizer here: memory errors and races are not looked for"
    failed=$((failed + 1))
fi
wait
count

say "All in $((SECONDS - start)) s"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
