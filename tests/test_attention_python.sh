# scripts/srf_attention.py, the example of srf/attention.h in Python, against recorded results. Needs
# a Python with torch ($PYTHON, else python3) and a library that it can load.
python="${PYTHON:-python3}" library="$(dirname "$1")/libsrf.so"
"$python" -c 'import torch' 2>/dev/null || { echo "no torch here: skipped"; exit 77; }
ldd "$library" | grep libasan >/dev/null && { echo "no sanitizers inside Python: skipped"; exit 77; }
OMP_NUM_THREADS=2 "$python" "$2/scripts/srf_attention.py" --library "$library" \
    --check "$2/tests/attention_reference.json"
