#!/usr/bin/env bash
# Builds the libFuzzer targets (tests/fuzz_*.c) with clang and the sanitizers, and runs each for a
# while on what it found before (out/fuzz/<target>), starting from tests/seeds/<target>.
#
#   scripts/fuzz.sh [SECONDS [TARGET...]]   default: 60 seconds each, all targets
source "$(dirname "$0")/lib.sh"

seconds="${1:-60}"
[ $# -eq 0 ] || shift
[[ "$seconds" =~ ^[0-9]+$ ]] || die "expected a number of seconds, found '$seconds'"
for target in "$@"; do
    [ -f "tests/$target.c" ] || die "no tests/$target.c: expected one of $(cd tests && echo fuzz_*.c)"
done
command -v clang >/dev/null || scripts/setup.sh fuzz

CC=clang scripts/build.sh build-fuzz -DSRF_FUZZ=ON -DSRF_SANITIZE=ON -DSRF_TESTS=OFF \
    -DSRF_CUDA=OFF
if [ $# -gt 0 ]; then
    targets=("$@")
else
    targets=()
    for file in tests/fuzz_*.c; do
        [ ! -f "$file" ] || targets+=("$(basename "$file" .c)")
    done
fi
[ ${#targets[@]} -gt 0 ] || die "no tests/fuzz_*.c here"

export ASAN_OPTIONS="allocator_may_return_null=1:${ASAN_OPTIONS:-}"
failed=0
for target in "${targets[@]}"; do
    corpus="out/fuzz/$target"
    mkdir -p "$corpus"
    [ ! -d "tests/seeds/$target" ] || cp -n tests/seeds/"$target"/* "$corpus"
    say "$target: $seconds s"
    if ! "build-fuzz/tests/$target" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 \
        -print_final_stats=1 -verbosity=0 -artifact_prefix="$corpus-" "$corpus"; then
        failed=$((failed + 1))
        note "FAILED: the input is beside $corpus"
    fi
done
echo "$((${#targets[@]} - failed)) passed, $failed failed"
[ "$failed" -eq 0 ]
