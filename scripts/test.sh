#!/usr/bin/env bash
# Everything that guards the project: installs what is missing, checks the style, builds, runs all
# tests, then builds with the address and undefined-behaviour sanitizers and runs the tests again,
# shortened. The last line says 'N passed, N failed' (a test program or a check counts once per
# pass); the exit status is 0 only if something ran and nothing failed.
source "$(dirname "$0")/lib.sh"

passed=0 failed=0 skipped=0
start=$SECONDS

# check NAME COMMAND...: one check, counted.
check() {
    local name="$1"
    shift
    say "Check: $name"
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        note "FAILED: $name"
    fi
}

sources() {
    find kernels data checkpoints model infer train cli tests -type f \
        \( -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' -o -name '*.def' \) "$@"
}

formatted() {
    sources ! -name '*.def' -print0 | xargs -0 clang-format --dry-run -Werror
}

# clang-format breaks code, not comments.
columns() {
    ! sources -print0 | LC_ALL=C.UTF-8 xargs -0 grep -nE '^.{101,}$'
}

# Includes go one way: a folder takes from itself and from those before it in this list; only tests
# take from all. data/ and checkpoints/ know no op: of kernels/ they have what every layer shares.
layers() {
    local layer below="" status=0
    for layer in kernels data checkpoints model infer train cli; do
        below="$below|$layer"
        if grep -rnE '^#include "[a-z]+/' "$layer" | grep -vE ":#include \"(${below#|})/"; then
            status=1
        fi
    done
    if grep -rnE '^#include "kernels/' data checkpoints |
        grep -vE '/(grow|numeric|status|types)\.h"'; then
        status=1
    fi
    return $status
}

scripts_parse() {
    local file status=0
    for file in scripts/*.sh tests/*.sh .ci/run; do
        [ ! -f "$file" ] || bash -n "$file" || status=1
    done
    if command -v shellcheck >/dev/null; then
        shellcheck -x -P SCRIPTDIR -s bash -S warning scripts/*.sh tests/*.sh || status=1
    fi
    "$PYTHON" - scripts/*.py <<'END' || status=1
import sys
for name in sys.argv[1:]:
    compile(open(name, encoding="utf-8").read(), name, "exec")
END
    return $status
}

# build_and_test FOLDER [CMAKE OPTION...]
build_and_test() {
    local folder="$1" before=$SECONDS status=0
    # what ptxas has to say of speed is for a build that is meant to be fast
    if ! scripts/build.sh "$@" 2>&1 | grep --line-buffered -v '^ptxas info'; then
        failed=$((failed + 1))
        note "FAILED: the build in $folder"
        return
    fi
    say "Tests in $folder"
    local report="$ROOT/$folder/tests.xml"
    rm -f "$report"
    # one more than there are cores: some wait for others or for a time to pass
    ctest --test-dir "$folder" -j $((JOBS + 1)) --output-on-failure \
        --output-junit "$report" || status=$?
    if [ ! -f "$report" ]; then
        failed=$((failed + 1))
        note "FAILED: no test ran in $folder"
        return
    fi
    local tests failures skips
    tests=$(sed -n 's/.*\btests="\([0-9]*\)".*/\1/p' "$report" | head -1)
    failures=$(sed -n 's/.*\bfailures="\([0-9]*\)".*/\1/p' "$report" | head -1)
    skips=$(sed -n 's/.*\bskipped="\([0-9]*\)".*/\1/p' "$report" | head -1)
    # it failed outside the tests, or there are none
    { [ $status -eq 0 ] && [ "$tests" -gt 0 ]; } || [ "$failures" -gt 0 ] || failures=1
    passed=$((passed + tests - failures - skips))
    failed=$((failed + failures))
    skipped=$((skipped + skips))
    note "$folder: $tests test programs in $((SECONDS - before)) s, with the build"
}

scripts/setup.sh

# The layout that the project's style was written with; other versions differ in details.
if command -v clang-format >/dev/null && clang-format --version | grep -q 'version 14\.'; then
    check "clang-format" formatted
else
    note "no clang-format 14 here: the layout of the code is not checked"
fi
check "no line beyond 100 columns" columns
check "includes go down the layers" layers
check "the scripts parse" scripts_parse

# CUDA code, if any, for one architecture only and as it compiles fastest: nothing here runs it. So
# this is not the folder whose program people run.
build_and_test build-test -DSRF_CUDA_ARCH=90a-real -DSRF_CUDA_QUICK=ON
export ASAN_OPTIONS="allocator_may_return_null=1:${ASAN_OPTIONS:-}"
export UBSAN_OPTIONS="print_stacktrace=1:${UBSAN_OPTIONS:-}"
SRF_TEST_SHORT=1 SRF_KILL_TESTS=1 build_and_test build-asan -DSRF_SANITIZE=ON -DSRF_CUDA=OFF

say "All in $((SECONDS - start)) s"
if [ "$skipped" -gt 0 ]; then
    echo "$passed passed, $failed failed, $skipped skipped"
else
    echo "$passed passed, $failed failed"
fi
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
