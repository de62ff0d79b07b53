"""Time the same training step in PyTorch, and beside srf in the same run.

    bench_peers.py --model DIR                         PyTorch alone
    bench_peers.py --model DIR --srf build/srf         both, and the ratio of tokens/s

The model is transformers' GPT2LMHeadModel made from DIR/config.json (weights do not matter for
time) without dropout, which srf has not; AdamW with weight decay, gradients clipped to norm 1,
fp32, random tokens, the same batch, length and number of threads. With --srf, rounds of the two
alternate, so that both see the same machine; each side's best round counts.

Needs torch and transformers.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

import torch
import transformers


def parse():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", required=True, help="a transformers directory, or a config.json")
    p.add_argument("--srf", help="the srf program: time `srf bench step` too")
    p.add_argument("--attention", default="softmax", help="srf's attention (softmax)")
    p.add_argument("--window", type=int, help="srf's window")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--seq-len", type=int, default=512)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--steps", type=int, default=5, help="timed steps of a round")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p.parse_args()


def config_path(model):
    path = pathlib.Path(model)
    return path / "config.json" if path.is_dir() else path


class Peer:
    """The step in PyTorch."""

    def __init__(self, args):
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        config = transformers.GPT2Config.from_json_file(config_path(args.model))
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        config.use_cache = False
        self.model = transformers.GPT2LMHeadModel(config).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1
        )
        self.shape = (args.batch, args.seq_len)
        self.vocab = config.vocab_size
        self.step()  # first touch of all memory

    def step(self):
        ids = torch.randint(self.vocab, self.shape)
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return time.perf_counter() - start

    def round(self, steps):
        return statistics.median(self.step() for _ in range(steps))


def srf_round(args):
    """`srf bench step --json`, its median step in seconds and all of its report."""
    command = [args.srf, "bench", "step", "--json", "--attention", args.attention]
    command += ["--batch", str(args.batch), "--seq-len", str(args.seq_len)]
    command += ["--threads", str(args.threads), "--steps", str(args.steps)]
    if args.window is not None:
        command += ["--window", str(args.window)]
    is_directory = pathlib.Path(args.model).is_dir()
    command += ["--model" if is_directory else "--init", args.model]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    report = json.loads(done.stdout)
    return report["step_ms"] / 1e3, report


def main():
    args = parse()
    tokens = args.batch * args.seq_len
    peer = Peer(args)
    theirs, ours, reports = [], [], []
    for _ in range(args.rounds):
        theirs.append(peer.round(args.steps))
        if args.srf:
            seconds, report = srf_round(args)
            ours.append(seconds)
            reports.append(report)
    result = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "batch": args.batch,
        "seq_len": args.seq_len,
        "threads": args.threads,
        "torch_step_ms": 1e3 * min(theirs),
        "torch_tokens_per_s": tokens / min(theirs),
    }
    if ours:
        best = reports[ours.index(min(ours))]
        result |= {
            "cpu": best["cpu"],
            "attention": best["attention"],
            "srf_step_ms": 1e3 * min(ours),
            "srf_tokens_per_s": tokens / min(ours),
            "blas_share": best["blas_share"],
            "blas_of_sgemm": best["blas_of_sgemm"],
            "ratio": min(theirs) / min(ours),
        }
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{args.threads} threads, {args.batch} x {args.seq_len} tokens"
    )
    print(f"PyTorch {result['torch_step_ms']:.1f} ms, {result['torch_tokens_per_s']:.0f} tokens/s")
    if ours:
        print(f"srf     {result['srf_step_ms']:.1f} ms, {result['srf_tokens_per_s']:.0f} tokens/s")
        print(f"ratio of tokens/s, srf / PyTorch: {result['ratio']:.3f}")


if __name__ == "__main__":
    main()
