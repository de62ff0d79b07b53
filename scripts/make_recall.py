#!/usr/bin/env python3
"""Makes token sets in which attention to far tokens is all that helps: recall and copy.

    scripts/make_recall.py OUT [--task recall|copy] [--distance LOW HIGH] [--tokens N]

writes OUT/train.npy and OUT/heldout.npy (token ids) and OUT/config.json, a small GPT-2 to begin
with:

    srf train --init OUT/config.json --data OUT/train.npy --out softmax ...
    srf retrofit --model softmax/model.h5 --data OUT/train.npy --out hybrid ...
    srf eval --model hybrid/model.h5 --data OUT/heldout.npy --recall --recall-from ID

with the ID that it prints (train/RECIPES.md, "Far recall": how many steps suffice). Both are filler
(16 ids in turn, learned at once) with events in it, each event a repeat of an earlier one at a
distance uniform in its logarithm from LOW to HIGH:

    recall   a key and its value; some keys are in use at a time (--live), each for about 8 events.
             A value's id names its key too: one look at the right earlier token answers, and all
             that a model needs is to hold one of 16 values for each key in use
    copy     a run of 8 tokens, said again once. A token's id names its run and its place there,
             and which of 16 it is was drawn at random: to go on with a run, a model must look
             where that run's next place stood last

`srf eval --recall` gives perplexity, and the part known, by distance. What a window holds is easy;
all else must have passed through the state.
"""

import argparse
import array
import heapq
import json
import math
import pathlib
import random

FILLER, VALUES, RUN, ASKS = 16, 16, 8, 8


def events(rng, task, args):
    """Yields (tokens of the event, repeats to come): what to say for the first time."""
    keys = 2 * args.live  # one that is dropped stays away until the others were used
    next_key = 0
    while True:
        if task == "copy":
            at = FILLER + next_key * RUN * VALUES
            yield [at + i * VALUES + rng.randrange(VALUES) for i in range(RUN)], 1
        else:
            value = FILLER + keys + next_key * VALUES + rng.randrange(VALUES)
            repeats = int(rng.expovariate(1 / ASKS)) + 1
            yield [FILLER + next_key, value], repeats
        next_key = (next_key + 1) % keys


def stream(seed, count, args):
    rng = random.Random(seed)
    low, high = (math.log(x) for x in args.distance)
    new = events(rng, args.task, args)
    out = array.array("H")
    due = [(rng.randrange(int(math.exp(high))), i, *next(new)) for i in range(args.live)]
    number = args.live  # tells events of the same time apart
    heapq.heapify(due)
    while len(out) < count:
        at, _, tokens, repeats = heapq.heappop(due)
        if at > len(out):
            out.extend(i % FILLER for i in range(at - len(out)))
        start = len(out)
        out.extend(tokens)
        if repeats == 0:
            tokens, repeats = next(new)
        else:
            repeats -= 1
        number += 1
        again = start + int(math.exp(rng.uniform(low, high)))
        heapq.heappush(due, (again, number, tokens, repeats))
    return out[:count]


def write_npy(path, ids):
    header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({len(ids)},), }}"
    header = header.ljust(117) + "\n"
    if array.array("H", [1]).tobytes() != b"\x01\x00":
        ids.byteswap()
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
                     + ids.tobytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--task", choices=("recall", "copy"), default="recall")
    parser.add_argument("--distance", type=int, nargs=2, default=(128, 4096))
    parser.add_argument("--live", type=int, default=32, help="keys, or runs, in use at a time")
    parser.add_argument("--tokens", type=int, default=8 << 20)
    parser.add_argument("--heldout", type=int, default=1 << 18)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=256, help="64 a head")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (1 < args.distance[0] <= args.distance[1]) or args.live < 1 or args.width % 64:
        parser.error("expected 1 < LOW <= HIGH, --live of at least 1, --width a multiple of 64")
    for name in ("tokens", "heldout", "context", "layers", "width"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1")
    answers = FILLER + (2 * args.live if args.task == "recall" else 0)
    values = VALUES * 2 * args.live * (RUN if args.task == "copy" else 1)
    vocabulary = answers + values
    if vocabulary > 1 << 16:
        parser.error("--live: the vocabulary would not fit 16 bits")
    args.out.mkdir(parents=True, exist_ok=True)
    write_npy(args.out / "train.npy", stream(2 * args.seed, args.tokens, args))
    write_npy(args.out / "heldout.npy", stream(2 * args.seed + 1, args.heldout, args))
    config = {"model_type": "gpt2", "n_layer": args.layers, "n_head": args.width // 64,
              "n_embd": args.width, "n_positions": args.context, "vocab_size": vocabulary,
              "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}
    (args.out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    print(f"{args.out}: {args.tokens} and {args.heldout} tokens of {vocabulary} ids; "
          f"answers: --recall-from {answers}")


if __name__ == "__main__":
    main()
