#!/usr/bin/env bash
# The library as it is installed: its headers compile as C and as C++, pkg-config finds it, an
# example runs with the shared and with the static one, and nothing but srf_ is exported.
source "$(dirname "$0")/shell.sh"
build="$(dirname "$SRF")"
if ! command -v cmake cc c++ pkg-config nm >/dev/null || [ ! -f "$build/CMakeCache.txt" ] ||
    nm -D "$build/libsrf.so" | grep __asan_ >/dev/null; then
    echo "no tools, or a sanitizer's library, which only the sanitizer's programs can load"
    finished=1
    exit 77
fi

run cmake --install "$build" --prefix "$WORK/to"
[ $status -eq 0 ] || die "cmake --install: $(cat stderr)"
run to/bin/srf --version
grep -q '^srf [0-9]' stdout || fail "the installed srf: $(cat stderr)"

others=$(nm -D --defined-only "$build/libsrf.so" | awk '$3 !~ /^srf_/ { print $3 }')
[ -z "$others" ] || fail "exported besides srf_: $(head -3 <<<"$others" | xargs)"

pc=$(find to -name srf.pc)
PKG_CONFIG_PATH="$WORK/$(dirname "$pc")"
export PKG_CONFIG_PATH
[ -n "$pc" ] && pkg-config --exists srf || die "no srf.pc: $(find to)"
sed 's,"kernels/attention.h",<srf/attention.h>,' "$SOURCE/tests/example_attention.c" >example.c
library="$WORK/$(dirname "$(find to -name libsrf.so)")"
flags=(-Wall -Wextra -Werror -pedantic)

# works NAME COMMAND...: the command builds a program ./NAME, which succeeds.
works() {
    local name="$1"
    shift
    run "$@" -o "$name"
    [ $status -eq 0 ] || fail "$name: $(head -5 stderr)"
    run env LD_LIBRARY_PATH="$library:${LD_LIBRARY_PATH:-}" "./$name"
    [ $status -eq 0 ] || fail "$name: exit $status: $(cat stdout stderr)"
}

# shellcheck disable=SC2046 # words, not one
works shared cc -std=c11 "${flags[@]}" example.c $(pkg-config --cflags --libs srf) -lm
readelf -d shared | grep 'NEEDED.*libsrf' >/dev/null ||
    fail "pkg-config --libs: not the shared library"
# What is linked asks for libsrf.so.MAJOR.MINOR, which is there as a link to the whole version.
soname=$(readelf -d shared | sed -n 's/.*NEEDED.*\[\(libsrf.*\)\]/\1/p')
[[ "$soname" =~ ^libsrf\.so\.[0-9]+\.[0-9]+$ && -L "$library/$soname" ]] ||
    fail "linked against $soname of $(ls "$library")"
mkdir static
mv "$library"/libsrf.so* static
# shellcheck disable=SC2046 # words, not one
works alone cc -std=c11 "${flags[@]}" example.c $(pkg-config --static --cflags --libs srf)
mv static/libsrf.so* "$library"

cat >use.cc <<'END'
#include <srf/attention.h>
int main()
{
    srf_attn_options options;
    srf_attn *a;
    srf_attn_defaults(&options, 2, 8);
    options.device = "cpu";
    if (srf_attn_create(&options, &a) != SRF_OK) return 1;
    bool good = srf_attn_state_bytes(a) > 0 && srf_error_message()[0] == '\0';
    srf_attn_free(a);
    return good ? 0 : 1;
}
END
# shellcheck disable=SC2046 # words, not one
works c++ c++ -std=c++17 "${flags[@]}" use.cc $(pkg-config --cflags --libs srf)

# The op table's headers, as the comment in CMakeLists.txt says, beside the attention op's, which
# has the same two of its own. (gcc takes equal files of one time for one file.)
touch -d tomorrow to/include/srf/*.h
cat >ops.c <<'END'
#include <srf/attention.h>
#include <kernels/features.h>
#include <kernels/ops.h>
int main(void)
{
    struct srf_ctx *ctx;
    if (srf_ctx_create("cpu", SRF_F32, 1, &ctx) != SRF_OK) return 1;
    srf_ctx_free(ctx);
    return 0;
}
END
# shellcheck disable=SC2046 # words, not one
works ops cc -std=gnu11 "${flags[@]}" ops.c "-I$WORK/to/include/srf" \
    $(pkg-config --cflags --libs srf)

# scripts/pack.sh: no package of less than was asked for.
for programs in "" "srf toaster"; do
    run env PROGRAMS="$programs" bash "$SOURCE/scripts/pack.sh" \
        "$([ -z "$programs" ] && echo nowhere || echo "$build")" package.tar.xz
    { [ $status -eq 1 ] && grep -E 'no program(s in nowhere| .*/toaster)$' stderr >/dev/null &&
        [ ! -e package.tar.xz ]; } || fail "pack.sh of '$programs': exit $status: $(cat stderr)"
done

# In a folder of another project: no test and no flag of ours becomes its own.
mkdir parent
cat >parent/CMakeLists.txt <<END
cmake_minimum_required(VERSION 3.25)
project(parent C)
enable_testing()
add_subdirectory("$SOURCE" srf)
add_executable(mine ../example.c)
target_link_libraries(mine PRIVATE srf_shared)
foreach(name COMPILE_OPTIONS COMPILE_DEFINITIONS LINK_OPTIONS)
  get_directory_property(of_folder \${name})
  get_target_property(of_library srf_shared INTERFACE_\${name})
  if(of_folder OR of_library)
    message(FATAL_ERROR "\${name}: \${of_folder} \${of_library}")
  endif()
endforeach()
END
generator=$(sed -n 's/^CMAKE_GENERATOR:INTERNAL=//p' "$build/CMakeCache.txt")
run cmake -S parent -B parent/build -G "$generator" -DSRF_CUDA=OFF -DCMAKE_INSTALL_LIBDIR=/opt/lib \
    -DCMAKE_INSTALL_PREFIX=/usr
[ $status -eq 0 ] || fail "a parent project: $(cat stderr)"
run ctest --test-dir parent/build -N
grep '^Total Tests: 0$' stdout >/dev/null || fail "a parent project has tests: $(tail -2 stdout)"
run env PKG_CONFIG_PATH=parent/build/srf pkg-config --variable libdir srf
[ "$(cat stdout)" = /opt/lib ] || fail "a libdir that is absolute: $(cat stdout stderr)"
run env PKG_CONFIG_PATH=parent/build/srf pkg-config --variable includedir srf
[ "$(cat stdout)" = /usr/include ] || fail "includedir: $(cat stdout stderr)"
finish
