#!/usr/bin/env bash
# Pack programs of a build with the shared libraries they need, for a machine that has neither the
# libraries' headers nor the network:
#     scripts/pack.sh BUILD_DIR OUT.tar.xz [MORE_FILES...]
# There:  mkdir p && tar xf OUT.tar.xz -C p && LD_LIBRARY_PATH=p/lib p/bin/srf ...
# PROGRAMS names others than `srf tests/test_*`. More files go to p/more, those with a relative name
# under that name. Left out: libc's own libraries and the driver's and toolkit's of CUDA, which
# belong to the machine.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: scripts/pack.sh BUILD_DIR OUT.tar.xz [MORE_FILES...]" >&2; exit 2; }
build=$1 out=$2
shift 2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir -p "$folder/bin" "$folder/lib" "$folder/more" "$(dirname "$out")"
for program in $(cd "$build" && echo ${PROGRAMS:-srf tests/test_*}); do
    program="$build/$program"
    [ -e "$program" ] || [ -z "${PROGRAMS:-}" ] ||
        { echo "pack.sh: no program $program" >&2; exit 1; }
    [ -f "$program" ] && [ -x "$program" ] || continue
    strip -o "$folder/bin/$(basename "$program")" "$program"
    ldd "$program" | awk '$3 ~ /^\// {print $3}' |
        { grep -vE '/(libc|libm|libdl|libpthread|librt|ld-linux[^/]*|libcuda|libcudart|libcublas|libcublasLt|libcurand)\.so' || true; } |
        while read -r lib; do cp -Lu "$lib" "$folder/lib/"; done
done
[ -n "$(ls "$folder/bin")" ] || { echo "pack.sh: no programs in $build" >&2; exit 1; }
# Programs ask for libsrf.so.MAJOR.MINOR, scripts/srf_attention.py for the name without.
for lib in "$folder"/lib/libsrf.so.*; do
    [ -f "$lib" ] || continue
    strip --strip-unneeded "$lib"
    ln -s "$(basename "$lib")" "$folder/lib/libsrf.so"
done
for file in "$@"; do
    case "$file" in
    /*) cp "$file" "$folder/more/" ;;
    *) cp --parents "$file" "$folder/more/" ;;
    esac
done
tar -C "$folder" -c bin lib more | xz -T0 -6 >"$out"
printf '%s %s\n' "$out" "$(du -h "$out" | cut -f1)"
