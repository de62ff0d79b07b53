#!/usr/bin/env python3
"""Runs a grid of training recipes over several seeds and writes one table of what they came to.

    scripts/study.py GRID.json --srf build/srf --out DIR [--jobs N] [--budget SECONDS]

GRID.json (paths are relative to the current folder):

    {"model": "gpt2/", "data": "corpus.h5", "val": "heldout.h5", "seeds": [1, 2, 3],
     "options": {"steps": 1200, "lr": 1e-3},              # of every row; an option's name
     "rows": [{"name": "pure", "window": 0, "kl": [1, 3]},  # a list: one row for each value
              {"name": "control", "command": "train", "attention": "softmax"}]}

A value of true gives an option without a value, null takes one of "options" away. "model" may be
given by a row. A run is a folder DIR/<row>/<seed>; its result is a line of DIR/results.jsonl, and
what has one is not run again (the command and the options being the same), so that a study that was
stopped goes on and a grid may grow. All rows run with the first seed before any with the second.
With --budget, nothing is begun that would probably end later. DIR/table.md: mean, spread (standard
deviation over the seeds), the mean over "reference" if the grid has one (a perplexity, or the name
of a row, "control": its mean), what was run.
"""

import argparse
import concurrent.futures
import itertools
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

NOT_OPTIONS = {"name", "command", "model"}


def read_grid(path):
    """The grid; exits with one line that says what is wrong with it."""
    try:
        grid = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"study: {path}: {error}")
    if not isinstance(grid, dict):
        sys.exit(f"study: {path}: expected an object with the keys of --help")
    kinds = {"model": str, "data": str, "val": str, "seeds": list, "rows": list}
    for key, kind in kinds.items():
        if not isinstance(grid.get(key), kind) or not grid[key]:
            found = json.dumps(grid[key]) if key in grid else "nothing"
            what = "a text" if kind is str else "a list"
            sys.exit(f'study: {path}: "{key}": expected {what}, found {found}')
    known = {*kinds, "options", "reference"}
    for key in grid:
        if key not in known:
            sys.exit(f'study: {path}: unknown key "{key}": expected {", ".join(sorted(known))}')
    for i, row in enumerate(grid["rows"]):
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            sys.exit(f"study: {path}: row {i}: expected an object with a name")
    return grid


def check_reference(grid, rows):
    base, names = grid.get("reference"), [row["name"] for row in rows]
    is_number = isinstance(base, (int, float)) and not isinstance(base, bool) and base > 0
    if base is not None and not is_number and base not in names:
        sys.exit(f'study: "reference": {json.dumps(base)}: expected a perplexity, or the name of '
                 f"a row: {', '.join(names)}")


def expand(grid):
    """The rows of the grid, each with one value for every option."""
    rows = []
    for row in grid["rows"]:
        lists = [k for k, v in row.items() if isinstance(v, list)]
        for values in itertools.product(*(row[k] for k in lists)):
            one = dict(row, **dict(zip(lists, values)))
            given = {k: v for k, v in one.items() if k not in NOT_OPTIONS}
            options = {**grid.get("options", {}), **given}
            name = "-".join([row["name"]] + [f"{k}{v}" for k, v in zip(lists, values)])
            rows.append({"name": name, "command": one.get("command", "retrofit"),
                         "model": one.get("model", grid["model"]), "options": options,
                         "given": given})
    names = [r["name"] for r in rows]
    for name in names:
        if names.count(name) > 1 or "/" in name:
            sys.exit(f"study: the row name '{name}' is not unique, or no name of a folder")
    return rows


def words(options):
    out = []
    for key, value in options.items():
        if value is None or value is False:
            continue
        out.append(f"--{key}")
        if value is not True:
            out.append(str(value))
    return out


def key_of(row, seed):
    """What a run is known by."""
    return " ".join([row["command"], row["model"], *words(row["options"]), "seed", str(seed)])


def run(args, grid, row, seed):
    """One run; returns its line of results.jsonl."""
    out = args.out / row["name"] / str(seed)
    shutil.rmtree(out, ignore_errors=True)  # of a study that was stopped
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [args.srf, row["command"], "--model", row["model"], "--data", grid["data"],
               "--val", grid["val"], "--out", str(out), "--seed", str(seed), "--quiet", "--json",
               "--eval-tokens", "0", "--save-every", "0", *words(row["options"])]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    result = {"key": key_of(row, seed), "name": row["name"], "seed": seed,
              "seconds": round(time.monotonic() - start, 1)}
    if done.returncode:
        result["error"] = (done.stderr.strip().splitlines() or ["killed"])[-1]
    else:
        printed = json.loads(done.stdout)
        result.update(ppl=printed["val_ppl"], loss=printed["loss"],
                      train_seconds=printed["seconds"])
    if not args.keep:
        for name in ("last.h5", "model.h5"):
            (out / name).unlink(missing_ok=True)
    return result


def read_results(path):
    """What is done; a last line that was cut off goes away."""
    if not path.exists():
        return {}
    text = path.read_text()
    path.write_text(text[: text.rfind("\n") + 1])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {r["key"]: r for r in lines if "ppl" in r}


def results_of(grid, row, done):
    return [done[key_of(row, seed)] for seed in grid["seeds"] if key_of(row, seed) in done]


def reference_of(grid, rows, done):
    """The perplexity to divide by, or None, and what the table calls it."""
    base = grid.get("reference")
    if not isinstance(base, str):
        return base, f"over {base}"
    got = [r for row in rows if row["name"] == base for r in results_of(grid, row, done)]
    return (statistics.mean(r["ppl"] for r in got) if got else None), f"over {base}"


def write_table(args, grid, rows, done):
    base, over = reference_of(grid, rows, done)
    head = ["recipe", "perplexity", "spread", *([over] if base else []), "seeds", "s",
            "options"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for row in rows:
        got = results_of(grid, row, done)
        if not got:
            continue
        ppl = [r["ppl"] for r in got]
        mean = statistics.mean(ppl)
        spread = f"{statistics.stdev(ppl):.3f}" if len(ppl) > 1 else ""
        cells = [row["name"], f"{mean:.3f}", spread]
        if base:
            cells.append(f"{mean / base:.4f}")
        seconds = statistics.mean(r["train_seconds"] for r in got)
        cells += [str(len(ppl)), f"{seconds:.1f}",
                  f"`srf {row['command']} {' '.join(words(row['given']))}`"]
        lines.append("| " + " | ".join(cells) + " |")
    common = " ".join(words(grid.get("options", {})))
    text = f"All rows: `{common}`\n\n" + "\n".join(lines) + "\n"
    (args.out / "table.md").write_text(text)
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=pathlib.Path, metavar="GRID.json")
    parser.add_argument("--srf", default="build/srf", help="the program (build/srf)")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR",
                        help="where the runs, results.jsonl and table.md go")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (1)")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS",
                        help="seconds in all (no end)")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    args = parser.parse_args()
    begun = time.monotonic()
    grid = read_grid(args.grid)
    rows = expand(grid)
    check_reference(grid, rows)
    if not shutil.which(args.srf):
        sys.exit(f"study: --srf {args.srf}: there is no such program")
    if args.jobs < 1:
        sys.exit(f"study: --jobs {args.jobs}: expected at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    done = read_results(results)
    todo = [(row, seed) for seed in grid["seeds"] for row in rows if key_of(row, seed) not in done]
    print(f"study: {len(rows)} rows, {len(grid['seeds'])} seeds: {len(done)} runs done before, "
          f"{len(todo)} to go", flush=True)
    longest, failed = 0.0, 0
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        running = set()
        while todo or running:
            while todo and len(running) < args.jobs:
                if time.monotonic() - begun + longest > args.budget:
                    print(f"study: out of time, {len(todo)} runs are left", flush=True)
                    todo.clear()
                    break
                running.add(pool.submit(run, args, grid, *todo.pop(0)))
            ended, running = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in ended:
                result = future.result()
                with results.open("a") as f:
                    f.write(json.dumps(result) + "\n")
                longest = max(longest, result["seconds"])
                failed += "error" in result
                if "ppl" in result:
                    done[result["key"]] = result
                print(f"{time.monotonic() - begun:6.1f} s  {result['name']} seed {result['seed']}: "
                      f"{result.get('error') or round(result['ppl'], 3)} "
                      f"({result['seconds']} s)", flush=True)
    print(write_table(args, grid, rows, done))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
