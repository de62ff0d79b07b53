"""Measure srf on one GPU beside its peers in PyTorch, all in one call, and draw the result.

    bench_gpu.py --srf build/srf [--json OUT.json] [--parts ops,flat,steps,peer-ops,...]
    bench_gpu.py --plot OUT.json PICTURE.png           time against length; needs matplotlib

ops, flat, steps: `srf bench op --filter attn_`, `srf bench op --flat`, and training steps of GPT-2
124M. The others are bench_peers.py's: peer-ops, PyTorch's flash and cuDNN attention; peer-steps, a
GPT-2 under torch.compile; peer-fla, fla's chunk_linear_attn behind random features where that
package is installed (it tries many forms of its kernels first: minutes). Heads of 64, 12 of them,
32768 tokens, bf16; medians.

Results go to stdout and, a row at a time, to OUT.json: a run that is cut off leaves what it has
measured, and one with other --parts adds to it. Progress goes to stderr. Each peer is a process of
its own with a limit; one that fails or hangs is named in OUT.json's left_out with its reason, and
the others go on.
"""

import argparse
import functools
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import time

PARTS = ["ops", "flat", "steps", "peer-ops", "peer-steps", "peer-fla"]
ATTENTION = {"peer-ops": ["flash", "cudnn"], "peer-fla": ["fla"]}
GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}
GPT2 |= {"vocab_size": 50257, "layer_norm_epsilon": 1e-5, "bos_token_id": None}
GPT2 |= {"eos_token_id": None}
STEPS = [  # attention, window, batch, length
    ("srf", 0, 32, 1024),
    ("srf", 64, 32, 1024),
    ("softmax", 0, 32, 1024),
    ("srf", 0, 8, 4096),
]
PEER_STEPS = [(32, 1024), (8, 4096)]


def parse():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--srf", default="build/srf", help="the program (build/srf)")
    p.add_argument("--json", metavar="FILE", help="what was measured; what is there is kept")
    p.add_argument("--parts", default=",".join(PARTS), help="what to measure (all)")
    p.add_argument("--steps", type=int, default=20, help="timed steps of a training step's row")
    p.add_argument("--limit", type=float, default=300, help="seconds for a peer (300)")
    p.add_argument("--plot", nargs=2, metavar=("FILE", "PICTURE"), help="draw what was measured")
    args = p.parse_args()
    args.parts = args.parts.split(",")
    if wrong := [part for part in args.parts if part not in PARTS]:
        p.error(f"--parts {wrong[0]}: expected some of {', '.join(PARTS)}")
    if args.json and not pathlib.Path(args.json).absolute().parent.is_dir():
        p.error(f"--json {args.json}: there is no such folder")
    return args


class Result:
    """What was measured; each change is in the file before the next measurement begins."""

    def __init__(self, path):
        self.path = path and pathlib.Path(path)
        self.all = {}
        if self.path and self.path.exists():
            self.all = json.loads(self.path.read_text())

    def put(self, key, value):
        self.all[key] = value
        if self.path:
            new = self.path.with_name(self.path.name + ".new")
            new.write_text(json.dumps(self.all))
            os.replace(new, self.path)

    def add(self, key, row, same):
        """A row of a list, in place of one that has the same values there."""
        rows = [r for r in self.all.get(key, []) if any(r[k] != row[k] for k in same)]
        self.put(key, [*rows, row])

    def left_out(self, name, why):
        """why: None for what is there after all."""
        known = {k: v for k, v in self.all.get("left_out", {}).items() if k != name}
        self.put("left_out", known | ({name: why} if why else {}))


def srf(args, *options):
    """The report of `srf bench`."""
    command = [args.srf, "bench", *options, "--device", "cuda", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def config_file(folder, positions):
    path = pathlib.Path(folder) / f"gpt2-{positions}.json"
    path.write_text(json.dumps(GPT2 | {"n_positions": positions}))
    return str(path)


def steps(args, folder, result):
    for attention, window, batch, length in STEPS:
        options = ["--init", config_file(folder, length), "--attention", attention]
        options += ["--window", str(window)] if window else []
        options += ["--batch", str(batch), "--seq-len", str(length), "--steps", str(args.steps)]
        report = srf(args, "step", *options)
        keys = ["batch", "seq_len", "step_ms", "step_ms_best", "tokens_per_s", "memory_bytes"]
        row = {"attention": attention, "window": window} | {key: report[key] for key in keys}
        same = ["attention", "window", "batch", "seq_len"]
        result.add("steps", row | {"ops": report["ops"]}, same)
        print(
            f"step {attention} W={window:<3} {batch:3} x {length:<5} {row['step_ms']:8.2f} ms "
            f"(best {row['step_ms_best']:.2f})  {row['tokens_per_s']:.0f} tokens/s  "
            f"{row['memory_bytes'] * 1e-9:.2f} GB",
            flush=True,
        )


def peer_step(args, folder, batch, length):
    """The row of a training step in PyTorch."""
    import bench_peers
    import torch

    peer = bench_peers.Peer(
        argparse.Namespace(
            model=config_file(folder, length), threads=2, device="cuda", batch=batch, seq_len=length
        )
    )
    ms = 1e3 * peer.round(args.steps)
    row = {"batch": batch, "seq_len": length, "step_ms": ms}
    yield row | {"memory_bytes": torch.cuda.max_memory_allocated()}


def child(rows, sender):
    import bench_peers

    try:
        for row in rows():
            sender.send(row)
        sender.send(None)
    except BaseException as error:  # whatever it is, the parent is to hear of it
        sender.send(bench_peers.reason(error))
    sender.close()


def peer(name, rows, take, args, result):
    """rows, a generator, in a process of its own; take gets each row as it comes."""
    import bench_peers  # PyTorch is loaded once, here; a child is a copy of this process

    bench_peers.say(f"{name}: starts")
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(rows, sender))
    process.start()
    sender.close()
    end, why = time.monotonic() + args.limit, None
    try:
        while why is None:
            if not receiver.poll(max(0, end - time.monotonic())):
                why = f"not ready after {args.limit:g} s"
                break
            got = receiver.recv()
            if got is None:
                break
            if isinstance(got, str):
                why = got
            else:
                take(got)
    except EOFError:  # the process died: a crash
        process.join()
        why = f"ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()
    result.left_out(name, why)
    bench_peers.say(f"{name} is left out: {why}" if why else f"{name}: done")


def peers(args, folder, result):
    import bench_peers

    bench_peers.say("PyTorch is there")
    shape = argparse.Namespace(heads=12, head_size=64, tokens=32768, device="cuda")

    def take_op(row):
        result.add("peer_ops", row, ["backend", "seq_len"])
        print(bench_peers.attention_line(row), flush=True)

    def take_step(row):
        result.add("peer_steps", row, ["batch", "seq_len"])
        print(
            "PyTorch step  {batch:3} x {seq_len:<5} {step_ms:8.2f} ms".format(**row),
            f" {row['batch'] * row['seq_len'] / row['step_ms'] * 1e3:.0f} tokens/s "
            f" {row['memory_bytes'] * 1e-9:.2f} GB",
            flush=True,
        )

    for part in args.parts:
        for name in ATTENTION.get(part, []):
            rows = functools.partial(bench_peers.ATTENTION_PEERS[name], shape, name)
            peer(name, rows, take_op, args, result)
        for batch, length in PEER_STEPS if part == "peer-steps" else []:
            rows = functools.partial(peer_step, args, folder, batch, length)
            peer(f"step {batch} x {length}", rows, take_step, args, result)


def measure(args):
    result = Result(args.json)
    with tempfile.TemporaryDirectory() as folder:
        if "ops" in args.parts:
            result.put("ops", srf(args, "op", "--filter", "attn_"))
            for row in result.all["ops"]["cases"]:
                print(
                    f"{row['case']:32} {row['us']:9.1f} us  {100 * row['of_floor']:5.1f} % of floor"
                )
        if "flat" in args.parts:
            flat = srf(args, "op", "--flat")
            result.put("flat", flat)
            for line in flat["series"]:
                print(
                    f"{line['attention']:8} forward + backward, longest over shortest time for "
                    f"{flat['tokens']} tokens: {line['most_over_least']:.3f}",
                    flush=True,
                )
        if "steps" in args.parts:
            steps(args, folder, result)
        if any(part.startswith("peer") for part in args.parts):
            print("loading PyTorch", file=sys.stderr, flush=True)
            peers(args, folder, result)


LOOKS = {  # colour, mark; a peer has the colour of what it competes with
    "srf": ("#1668b8", "o"),
    "hybrid": ("#2a9d4e", "o"),
    "softmax": ("#c8441e", "o"),
    "flash": ("#c8441e", "^"),
    "cudnn": ("#c8441e", "s"),
    "fla": ("#1668b8", "s"),
}
PEER_NAMES = {"flash": "PyTorch, flash", "cudnn": "PyTorch, cuDNN", "fla": "fla and features"}


def series_name(line):
    if line["attention"] == "softmax":
        return "srf's softmax"
    window = f", window {line['window']}" if line["window"] else ""
    return f"srf, m = {line['m']}{window}"


def plot(source, picture):
    try:
        import matplotlib
    except ImportError as error:
        sys.exit(f"bench_gpu.py: --plot: {error}")
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    result = json.loads(pathlib.Path(source).read_text())
    if "flat" not in result:
        sys.exit(f"bench_gpu.py: {source} has no part 'flat': measure it with --parts flat")
    flat, others = result["flat"], result.get("peer_ops", [])
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5.4), sharey=True)
    for axis, key, title in zip(axes, ["fwd_ms", "fwd_bwd_ms"], ["forward", "forward + backward"]):
        for line in flat["series"]:
            points = line["points"]
            x, y = [p["seq_len"] for p in points], [p[key] for p in points]
            color, mark = LOOKS[line["attention"]]
            axis.plot(x, y, mark + "-", color=color, ms=4.5, lw=2, label=series_name(line))
            if line["attention"] == "srf":
                axis.axhspan(min(y), 1.15 * min(y), color="0.5", alpha=0.25, lw=0)
                axis.axhline(min(y), color="0.5", lw=1, ls=":", label="flat; the band is 15 % wide")
        for name in PEER_NAMES:
            points = sorted((r["seq_len"], r[key]) for r in others if r["backend"] == name)
            if points:
                color, mark = LOOKS[name]
                style = {"ms": 5, "lw": 1.2, "mfc": "white", "label": PEER_NAMES[name]}
                axis.plot(*zip(*points), mark + "--", color=color, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        lengths = sorted({p["seq_len"] for line in flat["series"] for p in line["points"]})
        axis.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=[1, 2, 5]))
        axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.yaxis.set_minor_locator(ticker.NullLocator())
        axis.yaxis.set_tick_params(labelleft=True)
        axis.set_xlabel("tokens of a sequence")
        axis.set_title(title)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(f"ms for {flat['tokens']:,} tokens, 12 heads of 64")
    names = {}
    for axis in axes:
        names |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
    for last in [name for name in names if name.startswith("flat")]:
        names[last] = names.pop(last)
    figure.legend(names.values(), names, loc="lower center", ncols=4, frameon=False)
    figure.suptitle(f"Causal attention, {flat['machine']}, {flat['dtype']}: time against length")
    figure.tight_layout(rect=(0, 0.11, 1, 1))
    figure.savefig(picture, dpi=120)


def main():
    args = parse()
    if args.plot:
        plot(*args.plot)
        return
    measure(args)


if __name__ == "__main__":
    try:
        main()
    except (OSError, json.JSONDecodeError) as error:
        sys.exit(f"bench_gpu.py: {error}")
