"""Compare srf with transformers on a checkpoint that transformers wrote: GPT-2 124M in shape, with
random weights (enough for parity).

    check_gpt2.py --srf build/srf [--device cuda] [--dtype f32|bf16] [--keep DIR]

Writes the checkpoint and random token ids, runs `srf eval --attention softmax --per-token --logits`
on them, and prints |logits - reference| / |reference| over all positions; the reference is
transformers in fp32 on the CPU. Exit status 1 if it is above the bound of the dtype: 1e-4 for f32,
2e-2 for bf16. Needs torch, transformers, h5py.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

try:
    import h5py
    import numpy as np
    import torch
    import transformers
except ModuleNotFoundError as missing:
    sys.exit(f"check_gpt2.py: needs {missing.name}: pip install {missing.name}")

BOUND = {"f32": 1e-4, "bf16": 2e-2}


def parse():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--srf", required=True, help="the srf program")
    p.add_argument("--device", default="auto", help="srf's device (auto)")
    p.add_argument("--dtype", action="append", choices=sorted(BOUND), help="repeatable (f32)")
    p.add_argument("--sequences", type=int, default=2)
    p.add_argument("--length", type=int, default=1024)
    p.add_argument("--keep", help="write the checkpoint and the results here, and keep them")
    return p.parse_args()


def write_reference(folder, sequences, length):
    """The checkpoint, ids.npy, and the reference's logits (sequences, length, vocabulary)."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = transformers.GPT2LMHeadModel(config).eval()
    # Weights as large as trained ones, so that attention and logits are far from uniform.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "wpe" not in name:
                weight.mul_(3.0)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.1)
    model.save_pretrained(folder / "gpt2-random")
    ids = np.random.default_rng(0).integers(config.vocab_size, size=(sequences, length))
    np.save(folder / "ids.npy", ids.astype(np.uint16).reshape(-1))
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def ours(args, folder, dtype):
    out = folder / f"logits-{dtype}.h5"
    command = [args.srf, "eval", "--model", folder / "gpt2-random", "--data", folder / "ids.npy"]
    command += ["--attention", "softmax", "--seq-len", args.length, "--device", args.device]
    command += ["--dtype", dtype, "--batch", args.sequences, "--per-token", out, "--logits"]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"check_gpt2.py: {done.stderr.strip()}")
    with h5py.File(out) as f:
        return f["logits"][:].astype(np.float32)


def main():
    args = parse()
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(args.keep or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        want = write_reference(folder, args.sequences, args.length)
        for dtype in args.dtype or ["f32"]:
            got = ours(args, folder, dtype)
            if got.shape != want.shape:
                sys.exit(f"check_gpt2.py: expected logits of {want.shape}, found {got.shape}")
            error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
            good = error <= BOUND[dtype]  # False for NaN
            failed = failed or not good
            verdict = "ok" if good else "FAILED"
            print(
                f"{dtype}: relative difference {error:.2e}, bound {BOUND[dtype]:.0e}: {verdict}"
            )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
