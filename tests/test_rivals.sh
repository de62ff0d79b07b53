#!/usr/bin/env bash
# The rivals of SRF attention: trained, read back, continued, and refused where they have no form.
source "$(dirname "$0")/shell.sh"

make_tiny_model
data=(--data text.txt --val text.txt)
small=(--batch 2 --seq-len 32 --threads 1 --quiet --json)

ppl() { sed -n 's/.*"val_ppl": \([0-9.]*\).*/\1/p' stdout; }
rival() {
    local name="$1" words="$2"
    shift 2
    succeed "$SRF" retrofit --model model.h5 "${data[@]}" "${small[@]}" --steps 4 --out "$name" "$@"
    local trained
    trained="$(ppl)"
    run "$SRF" eval --model "$name/model.h5" --data text.txt --seq-len 32 --threads 1 --json
    grep -qF "\"attention\": \"$words" stdout || fail "$name: $(cat stdout)"
    python3 - "$trained" "$(sed -n 's/.*"ppl": \([0-9.]*\).*/\1/p' stdout)" <<'END' || fail "$name"
import sys
trained, read = map(float, sys.argv[1:])
sys.exit(abs(trained / read - 1) > 1e-5 and f"{trained} trained, {read} read back")
END
    refuse 1 "a recurrent export needs SRF attention" "$SRF" export "$name/model.h5" out.h5 \
        --format recurrent
    refuse 1 "needs SRF attention" "$SRF" eval --model "$name/model.h5" --data text.txt \
        --mode recurrent
    refuse 1 "has no recurrent form" "$SRF" generate --model "$name/model.h5" --prompt a
}
rival window "the latest 8 tokens and the first 2" --attention window --window 8 --sinks 2
rival hedgehog "hedgehog m=8, trained, window 8 exact" --attention hedgehog --m 8 --window 8
rival hedgehog-alone "hedgehog m=8, trained" --attention hedgehog --m 8 --window 0
rival t2r "t2r m=7, trained, window 8 exact" --attention t2r --m 7 --window 8
rival t2r-alone "t2r m=7, trained" --attention t2r --m 7 --window 0

# Stopped and continued: the same bits.
succeed "$SRF" retrofit --model model.h5 "${data[@]}" "${small[@]}" --steps 4 --out stopped \
    --attention hedgehog --m 8 --window 8 --save-every 2
cmp <("$SRF" info hedgehog/model.h5 --json | grep -v creator) \
    <("$SRF" info stopped/model.h5 --json | grep -v creator) || fail "info differs"

model=("$SRF" retrofit --model model.h5 --data text.txt "${small[@]}" --out none)
refuse 1 "add --attention window" "${model[@]}" --sinks 4
refuse 1 "add --attention srf" "${model[@]}" --attention hedgehog --features iid
refuse 1 "at least 1 token" "${model[@]}" --attention window --window 0
refuse 1 "m = 7 is odd" "${model[@]}" --attention hedgehog --m 7
refuse 1 "never draws them anew" "${model[@]}" --attention t2r --redraw-every 1
refuse 1 "window, hedgehog, t2r" "${model[@]}" --attention linear

# Of a model with windows and features by layer: what must be said, and that it is enough then.
succeed "$SRF" retrofit --model model.h5 --data text.txt "${small[@]}" --steps 1 --out layers \
    --layer-windows 4,8 --layer-m 8,6
layers=("$SRF" eval --model layers/model.h5 --data text.txt --seq-len 32 --threads 1)
refuse 1 "one for all: add --window N" "${layers[@]}" --attention window
refuse 1 "add --window N --m N" "${layers[@]}" --attention hedgehog
refuse 1 "one number for all: add --m N" "${layers[@]}" --attention t2r --window 8
for kind in softmax "window --window 8" "hedgehog --window 8 --m 8" "t2r --window 0 --m 8"; do
    run "${layers[@]}" --attention $kind
    [ $status -eq 0 ] || fail "--attention $kind: $(cat stderr)"
done
[ ! -e none ] || fail "a refused run left a folder"

finish
