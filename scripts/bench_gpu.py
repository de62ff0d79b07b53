"""Measure srf on one GPU beside its peers in PyTorch, all in one call, and draw the result.

    bench_gpu.py --srf build/srf [--json OUT.json] [--parts ops,flat,steps,peer-ops,peer-steps]
    bench_gpu.py --plot OUT.json PICTURE.png           time against length; needs matplotlib

ops, flat, steps: `srf bench op --filter attn_`, `srf bench op --flat`, and training steps of GPT-2
124M. peer-ops: PyTorch's flash and cuDNN attention (bench_peers.py), and where the package fla can
be imported its chunk_linear_attn behind random features made by torch.compile. peer-steps: the step
of transformers' GPT-2 under torch.compile. Heads of 64, 12 of them, 32768 tokens, bf16; medians.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

PARTS = ["ops", "flat", "steps", "peer-ops", "peer-steps"]
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
    p.add_argument("--json", metavar="FILE", help="write all that was measured there")
    p.add_argument("--parts", default=",".join(PARTS), help="what to measure (all)")
    p.add_argument("--steps", type=int, default=20, help="timed steps of a training step's row")
    p.add_argument("--plot", nargs=2, metavar=("FILE", "PICTURE"), help="draw what was measured")
    args = p.parse_args()
    args.parts = args.parts.split(",")
    if wrong := [part for part in args.parts if part not in PARTS]:
        p.error(f"--parts {wrong[0]}: expected some of {', '.join(PARTS)}")
    return args


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


def steps(args, folder):
    rows = []
    for attention, window, batch, length in STEPS:
        options = ["--init", config_file(folder, length), "--attention", attention]
        options += ["--window", str(window)] if window else []
        options += ["--batch", str(batch), "--seq-len", str(length), "--steps", str(args.steps)]
        report = srf(args, "step", *options)
        keys = ["batch", "seq_len", "step_ms", "step_ms_best", "tokens_per_s", "memory_bytes"]
        row = {"attention": attention, "window": window} | {key: report[key] for key in keys}
        rows.append(row | {"ops": report["ops"]})
        print(
            f"step {attention} W={window:<3} {batch:3} x {length:<5} {row['step_ms']:8.2f} ms "
            f"(best {row['step_ms_best']:.2f})  {row['tokens_per_s']:.0f} tokens/s  "
            f"{row['memory_bytes'] * 1e-9:.2f} GB",
            flush=True,
        )
    return rows


def fla_rows():
    """chunk_linear_attn of fla on random features of 64, as rows of bench_peers.attention_ops."""
    import bench_peers
    import torch

    try:
        from fla.ops.linear_attn import chunk_linear_attn
    except ImportError as error:
        print(f"fla is left out: {error}")
        return []
    heads, size, m, batch, length = 12, 64, 64, 32, 1024
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    w = torch.randn(heads, size, m, **kind)

    @torch.compile
    def features(x):
        x = x * size**-0.25
        a = torch.einsum("bthd,hdm->bthm", x, w).float()
        a = a - (x.float() ** 2).sum(-1, keepdim=True) / 2
        return torch.exp(a - a.amax((1, 3), keepdim=True)).to(x.dtype)

    tensors = [
        [torch.randn(batch, length, heads, size, **kind) for _ in range(3)] for _ in range(3)
    ]
    d_o = torch.randn(batch, length, heads, size, **kind)

    def forward(i):
        q, k, v = tensors[i % 3]
        return chunk_linear_attn(features(q), features(k), v, scale=1.0, normalize=True)[0]

    def both(i):
        for tensor in tensors[i % 3]:
            tensor.grad = None
        forward(i).backward(d_o)

    with torch.no_grad():
        one = bench_peers.event_median(forward)
    for tensor in sum(tensors, []):
        tensor.requires_grad_(True)
    two = bench_peers.event_median(both)
    row = {"backend": "fla + features", "batch": batch, "seq_len": length, "fwd_ms": one}
    return [row | {"fwd_bwd_ms": two}]


def peer_ops():
    import bench_peers

    rows = []
    for measure_rows in (
        lambda: bench_peers.attention_ops(argparse.Namespace(heads=12, head_size=64)),
        fla_rows,
    ):
        for row in measure_rows():
            rows.append(row)
            print(
                "{backend:16} {batch:3} x {seq_len:<6} {fwd_ms:8.3f} ms, forward + backward "
                "{fwd_bwd_ms:8.3f} ms".format(**row),
                flush=True,
            )
    return rows


def peer_steps(args, folder):
    import bench_peers
    import torch

    rows = []
    for batch, length in PEER_STEPS:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        peer = bench_peers.Peer(
            argparse.Namespace(
                model=config_file(folder, length),
                threads=2,
                device="cuda",
                batch=batch,
                seq_len=length,
            )
        )
        ms = 1e3 * peer.round(args.steps)
        memory = torch.cuda.max_memory_allocated()
        rows.append({"batch": batch, "seq_len": length, "step_ms": ms, "memory_bytes": memory})
        print(
            f"PyTorch step  {batch:3} x {length:<5} {ms:8.2f} ms  {batch * length / ms * 1e3:.0f} "
            f"tokens/s  {memory * 1e-9:.2f} GB",
            flush=True,
        )
        del peer
    return rows


def measure(args):
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        if "ops" in args.parts:
            result["ops"] = srf(args, "op", "--filter", "attn_")
            for row in result["ops"]["cases"]:
                print(
                    f"{row['case']:32} {row['us']:9.1f} us  {100 * row['of_floor']:5.1f} % of floor"
                )
        if "flat" in args.parts:
            result["flat"] = srf(args, "op", "--flat")
            for line in result["flat"]["series"]:
                print(
                    f"{line['attention']:8} forward + backward, longest over shortest time for "
                    f"{result['flat']['tokens']} tokens: {line['most_over_least']:.3f}",
                    flush=True,
                )
        if "steps" in args.parts:
            result["steps"] = steps(args, folder)
        if "peer-ops" in args.parts:
            result["peer_ops"] = peer_ops()
        if "peer-steps" in args.parts:
            result["peer_steps"] = peer_steps(args, folder)
    return result


def plot(source, picture):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    result = json.loads(pathlib.Path(source).read_text())
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axis, key, title in zip(axes, ["fwd_ms", "fwd_bwd_ms"], ["forward", "forward + backward"]):
        for line in result["flat"]["series"]:
            points = line["points"]
            axis.plot(
                [p["seq_len"] for p in points], [p[key] for p in points], "o-", ms=3,
                label=f"srf: {line['attention']}",
            )
        for name in sorted({row["backend"] for row in result.get("peer_ops", [])}):
            points = [row for row in result["peer_ops"] if row["backend"] == name]
            axis.plot(
                [p["seq_len"] for p in points], [p[key] for p in points], "s--", ms=4,
                label=f"PyTorch: {name}",
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("tokens of a sequence")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"ms for {result['flat']['tokens']} tokens, 12 heads of 64")
    axes[0].legend(fontsize=8)
    figure.suptitle(result["flat"]["machine"])
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


def main():
    args = parse()
    if args.plot:
        plot(*args.plot)
        return
    result = measure(args)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
