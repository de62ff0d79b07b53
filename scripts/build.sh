#!/usr/bin/env bash
# Builds the library, the program `srf` and the tests: build/srf.
#
#   scripts/build.sh [FOLDER [CMAKE OPTION...]]   default: build -DSRF_CUDA=AUTO
source "$(dirname "$0")/lib.sh"

folder="${1:-build}"
[ $# -eq 0 ] || shift
# -U: what an earlier call asked of CUDA code does not stick.
options=(-U SRF_CUDA_ARCH -U SRF_CUDA_QUICK -DSRF_CUDA=AUTO "$@")
# A folder keeps the generator it was first configured with.
if [ ! -f "$folder/CMakeCache.txt" ] && command -v ninja >/dev/null; then
    options+=(-G Ninja)
fi
say "Building in $folder (${options[*]}) on $JOBS cores"
log="$(cmake -S . -B "$folder" "${options[@]}" 2>&1)" || {
    printf '%s\n' "$log" >&2
    die "cmake failed; have you run scripts/setup.sh?"
}
grep -E '^-- (CUDA backend|The C compiler)' <<<"$log" || true
cmake --build "$folder" -j "$JOBS"
