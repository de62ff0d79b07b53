#!/usr/bin/env bash
# Installs what the build, the tests and the demo need (Debian 12, Ubuntu 24.04) and writes the
# English text they use. Safe to run again: it installs only what is missing.
#
#   scripts/setup.sh [GROUP...]   groups beyond the usual: fuzz (clang and libFuzzer),
#                                 tokenizer (what scripts/make_tiny_gpt2.sh needs)
source "$(dirname "$0")/lib.sh"

packages=(
    gcc libc6-dev cmake ninja-build pkgconf  # compiler and build
    libhdf5-dev                              # checkpoints, token sets
    libopenblas-openmp-dev                   # matrix products, on the thread pool of OpenMP
    libpcre2-dev                             # the pre-tokenizer's Unicode pattern
    libjansson-dev                           # JSON
    libcmocka-dev                            # tests
    bible-kjv                                # an English text to train on
    python3 python3-numpy python3-matplotlib # the demo's report
)
for group in "$@"; do
    case "$group" in
    fuzz) packages+=(clang libclang-rt-dev libomp-dev) ;;
    tokenizer) packages+=(python3-venv) ;;
    *) die "unknown group '$group': expected fuzz or tokenizer" ;;
    esac
done

is_installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

install_packages() {
    local as_root=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || die "needs root or sudo to install: $*"
        as_root=(sudo)
    fi
    local apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q
        -o DPkg::Lock::Timeout=300)
    say "Package lists: apt-get update"
    "${apt[@]}" update || {
        note "failed; trying once more"
        sleep 5
        "${apt[@]}" update
    }
    say "Installing: $*"
    "${apt[@]}" install -y --no-install-recommends "$@"
}

command -v apt-get >/dev/null ||
    die "no apt-get here; install by hand what Debian calls: ${packages[*]}"
missing=()
for package in "${packages[@]}"; do
    is_installed "$package" || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    install_packages "${missing[@]}"
else
    say "Packages: nothing is missing"
fi

say "English text: the King James Bible, out of the package bible-kjv"
bible -f gen1:1-rev22:21 | "$PYTHON" scripts/make_text.py out/text
