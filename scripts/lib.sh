# What the scripts share: source it. Sets ROOT (the checkout), JOBS, PYTHON; changes to ROOT.
set -euo pipefail
# -h, --help of each of them: the comment that it begins with.
case "${1:-}" in
-h | --help)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
# Threads that wait do not spin: on a busy machine that costs more than it saves.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
JOBS="${JOBS:-$(nproc)}"
# The distribution's python3 sees the distribution's modules (numpy, matplotlib); another one that
# comes first on PATH may not.
PYTHON="${PYTHON:-$([ -x /usr/bin/python3 ] && echo /usr/bin/python3 || echo python3)}"

say() { printf '\n==> %s\n' "$*"; }
note() { printf '    %s\n' "$*"; }
die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}
