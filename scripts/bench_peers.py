"""Time the same training step in PyTorch, and beside srf in the same run.

    bench_peers.py --model DIR                         PyTorch alone
    bench_peers.py --model DIR --srf build/srf         both, and the ratio of tokens/s
    bench_peers.py --model DIR --device cuda ...       on the GPU: bf16 autocast, torch.compile
    bench_peers.py --model DIR --srf build/srf --decode --batch 1    one token after the other
    bench_peers.py --attention-ops --device cuda       attention alone: flash, cuDNN, fla
    bench_peers.py --prefill --model DIR --device cuda --batch 16 --seq-len 16384
    bench_peers.py --decode-cuda --model DIR           a decode step over a full KV cache

The model is made from DIR/config.json (weights do not matter for time) without dropout, which srf
has not; AdamW with weight decay, gradients clipped to norm 1, random tokens, the same batch, length
and number of threads. On the CPU it is transformers' GPT2LMHeadModel in fp32. On the GPU it is the
same model written plainly, under bf16 autocast with bf16 between the layers, its layers and its
loss under torch.compile, the vocabulary padded to a multiple of 64: transformers' own gives
scaled_dot_product_attention a mask there before PyTorch 2.14, which flash attention does not take.
With --srf, rounds of the two alternate, so that both see the same machine; each side's best round
counts.

--decode times generation: transformers with its KV cache, without sampling, at the model's last
positions, where the cache is longest, and `srf bench decode`, greedy; fp32 on the CPU, bf16 on the
GPU. Both make --steps tokens of each sequence a round.

--attention-ops times causal attention, forward and forward + backward, at the same number of tokens
for every length, with inputs rotated past the L2 cache; medians, bf16 on the GPU. flash and cudnn:
scaled_dot_product_attention on slices of one packed (B, T, 3C) activation. fla: chunk_linear_attn
of flash-linear-attention, where it can be imported, behind 64 random features by torch.compile.
--backend picks some of them; one that fails is named with its reason, and the others go on.

--prefill times what `srf bench prefill` does, with softmax: prompts into keys and values that are
kept, positions wrapped, the last position's logits; scaled_dot_product_attention, on the GPU bf16
and each block compiled; as many sequences at once as 32768 tokens hold.

--decode-cuda decodes with a static KV cache of --seq-len tokens in bf16, all of them attended to
(scaled_dot_product_attention), the likeliest token fed back; the whole step is one CUDA graph, its
blocks compiled with --compile. --batch takes several numbers: 1,1024.

What it is doing goes to stderr: loading PyTorch and compiling take longer than measuring. Needs
torch and, for the step on the CPU and --decode, transformers.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

SAID_FROM = time.monotonic()  # before PyTorch, which may take its time

try:
    import torch  # noqa: E402
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(f"bench_peers.py: needs {missing.name}: pip install {missing.name}")

# The lengths of the table first, then the rest of the picture.
ATTENTION_LENGTHS = [1024, 4096, 16384, 256, 512, 2048, 8192, 32768]
FLA_LENGTHS = ATTENTION_LENGTHS[:3]


def say(text):
    """Progress, on stderr."""
    print(f"[{time.monotonic() - SAID_FROM:6.1f} s] {text}", file=sys.stderr, flush=True)


def parse():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", help="a transformers directory, or a config.json")
    p.add_argument("--attention-ops", action="store_true", help="time attention alone")
    p.add_argument(
        "--backend", default="flash,cudnn,fla", help="of --attention-ops: some of flash,cudnn,fla"
    )
    p.add_argument("--tokens", type=int, default=32768, help="of --attention-ops, in all")
    p.add_argument("--prefill", action="store_true", help="time prefill in PyTorch")
    p.add_argument("--decode-cuda", action="store_true", help="time a decode step on the GPU")
    p.add_argument("--compile", action="store_true", help="of --decode-cuda: torch.compile")
    p.add_argument("--decode", action="store_true", help="time one token after the other")
    p.add_argument("--heads", type=int, default=12, help="of --attention-ops")
    p.add_argument("--head-size", type=int, default=64, help="of --attention-ops")
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--srf", help="the srf program: time `srf bench step` too")
    p.add_argument("--attention", default="softmax", help="srf's attention (softmax)")
    p.add_argument("--window", type=int, help="srf's window")
    p.add_argument("--batch", default="8")
    p.add_argument("--seq-len", type=int, default=512)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--steps", type=int, default=5, help="timed steps of a round")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--json", action="store_true", help="print one JSON object")
    args = p.parse_args()
    if bool(args.model) == args.attention_ops:
        p.error("give --model, or --attention-ops")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: PyTorch finds no GPU that it can use")
    if args.decode_cuda and args.device != "cuda":
        p.error("--decode-cuda: give --device cuda")
    args.backends = args.backend.split(",")
    if wrong := [name for name in args.backends if name not in ATTENTION_PEERS]:
        p.error(f"--backend {wrong[0]}: expected some of {', '.join(ATTENTION_PEERS)}")
    try:
        args.batches = [int(b) for b in args.batch.split(",")]
    except ValueError:
        p.error(f"--batch {args.batch}: expected a number, or some with commas between")
    args.batch = args.batches[0]
    for name, value in (("--batch", min(args.batches)), ("--seq-len", args.seq_len),
                        ("--tokens", args.tokens), ("--threads", args.threads),
                        ("--steps", args.steps), ("--rounds", args.rounds)):
        if value < 1:
            p.error(f"{name} {value}: expected at least 1")
    on_gpu = args.device == "cuda" and not args.decode  # there, positions are made to fit
    if args.model and not (args.prefill or args.decode_cuda or on_gpu):
        most = json.loads(config_path(args.model).read_text())["n_positions"]
        if args.decode and args.steps >= most:
            p.error(f"--steps {args.steps}: expected less than the model's {most} positions")
        if not args.decode and args.seq_len > most:
            p.error(f"--seq-len {args.seq_len}: expected at most the model's {most} positions")
    return args


def config_path(model):
    path = pathlib.Path(model)
    return path / "config.json" if path.is_dir() else path


def blocks(config, **options):
    """GPT-2's blocks: norm, q k v, out, norm, up, down."""
    width = config["n_embd"]
    linear, norm = torch.nn.Linear, torch.nn.LayerNorm
    return torch.nn.ModuleList(
        torch.nn.ModuleList([
            norm(width, **options), linear(width, 3 * width, **options),
            linear(width, width, **options), norm(width, **options),
            linear(width, 4 * width, **options), linear(4 * width, width, **options)
        ])
        for _ in range(config["n_layer"])
    )


def gpt2_layer(x, more, heads, block):
    """A block of GPT-2 on x + more; the same two again, so that their sum is made with the next
    norm."""
    functional = torch.nn.functional
    norm_1, qkv, out, norm_2, up, down = block
    x = x + more
    parts = functional.linear(functional.layer_norm(x, x.shape[-1:], *norm_1), *qkv).chunk(3, -1)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
    o = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + functional.linear(o.transpose(1, 2).flatten(2), *out)
    u = functional.linear(functional.layer_norm(x, x.shape[-1:], *norm_2), *up)
    return x, functional.linear(functional.gelu(u, approximate="tanh"), *down)


def gpt2_loss(x, more, norm, wte, targets):
    x = torch.nn.functional.layer_norm(x + more, x.shape[-1:], *norm)
    return torch.nn.functional.cross_entropy((x @ wte.T).flatten(0, 1), targets.flatten())


class Gpt2(torch.nn.Module):
    """A GPT-2 with its loss, the output tied to the embedding. What is compiled is a layer, once
    for all of them, which takes seconds where the whole takes a minute."""

    def __init__(self, config, compiled):
        super().__init__()
        width, self.heads = config["n_embd"], config["n_head"]
        rows = -(-config["vocab_size"] // 64) * 64
        self.wte = torch.nn.Embedding(rows, width)
        self.wpe = torch.nn.Embedding(config["n_positions"], width)
        self.blocks = blocks(config)
        self.norm = torch.nn.LayerNorm(width)
        for table in (self.wte, self.wpe):
            torch.nn.init.normal_(table.weight, std=0.02)
        self.layer, self.loss = gpt2_layer, gpt2_loss
        if compiled:
            self.layer = torch.compile(gpt2_layer, dynamic=False)
            self.loss = torch.compile(gpt2_loss, dynamic=False)

    def forward(self, ids):
        x, more = self.wte(ids), self.wpe.weight[: ids.shape[1]]
        kind = torch.bfloat16 if x.is_cuda else x.dtype  # what layers pass on, the first one, too
        x, more = x.to(kind), more.to(kind).expand_as(x).contiguous()
        for block in self.blocks:
            weights = [(piece.weight, piece.bias) for piece in block]
            x, more = self.layer(x, more, self.heads, weights)
        norm = (self.norm.weight, self.norm.bias)
        return self.loss(x, more, norm, self.wte.weight, ids.roll(-1, 1))


class Peer:
    """The step in PyTorch."""

    def __init__(self, args):
        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        self.cuda = args.device == "cuda"
        config = json.loads(config_path(args.model).read_text())
        if self.cuda:
            config["n_positions"] = max(config["n_positions"], args.seq_len)
            self.model = self.loss = Gpt2(config, compiled=True).cuda()
        else:
            self.model = transformers_model(args.model)
            self.loss = lambda ids: self.model(input_ids=ids, labels=ids).loss
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=self.cuda
        )
        self.shape = (args.batch, args.seq_len)
        self.vocab = config["vocab_size"]
        for i in range(3 if self.cuda else 1):  # first touch of all memory; compilation
            say(f"step {self.shape[0]} x {self.shape[1]}: warming up, {i}")
            self.step()
        say(f"step {self.shape[0]} x {self.shape[1]}: warm")

    def step(self):
        ids = torch.randint(self.vocab, self.shape, device="cuda" if self.cuda else "cpu")
        self.wait()
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.cuda):
            loss = self.loss(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.wait()
        return time.perf_counter() - start

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def round(self, steps):
        return statistics.median(self.step() for _ in range(steps))


def transformers_model(model):
    say("importing transformers")
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.GPT2Config.from_json_file(config_path(model))
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    config.use_cache = False
    return transformers.GPT2LMHeadModel(config).train()


class CacheDecoder:
    """A token at a time with transformers' own KV cache."""

    def __init__(self, args):
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        config = transformers.GPT2Config.from_json_file(config_path(args.model))
        self.cuda = args.device == "cuda"
        self.model = transformers.GPT2LMHeadModel(config).eval().to(args.device)
        if self.cuda:
            self.model.to(torch.bfloat16)
        self.tokens = torch.randint(
            config.vocab_size, (args.batch, config.n_positions), device=args.device
        )
        self.round(args.steps)  # first touch of all memory

    @torch.inference_mode()
    def round(self, steps):
        """Seconds a step, the last `steps` positions of the model."""
        first = self.tokens.shape[1] - steps
        cache = self.model(input_ids=self.tokens[:, :first], use_cache=True).past_key_values
        self.wait()
        start = time.perf_counter()
        for at in range(first, first + steps):
            out = self.model(
                input_ids=self.tokens[:, at : at + 1], past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
        self.wait()
        return (time.perf_counter() - start) / steps

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()


def timed_attention(make_forward, tensors, d_o):
    """ms of make_forward's forward(i), and of it with its backward pass."""
    forward, leaves = make_forward(tensors), [t for one in tensors for t in one]

    def both(i):
        for tensor in tensors[i % len(tensors)]:
            tensor.grad = None
        forward(i).backward(d_o)

    with torch.no_grad():
        one = median_ms(forward)
    for tensor in leaves:
        tensor.requires_grad_(True)
    return {"fwd_ms": one, "fwd_bwd_ms": median_ms(both)}


def attention_kind(args):
    cuda = args.device == "cuda"
    return {"device": args.device, "dtype": torch.bfloat16 if cuda else torch.float32}


def sdpa_ops(args, name):
    """Rows of scaled_dot_product_attention's backend, a length each, as they come."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    heads, size, kind = args.heads, args.head_size, attention_kind(args)

    def make_forward(tensors):
        def forward(i):
            packed = tensors[i % len(tensors)][0]
            parts = packed.unflatten(-1, (3, heads, size)).unbind(2)
            q, k, v = (part.transpose(1, 2) for part in parts)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return out.transpose(1, 2)

        return forward

    for length in ATTENTION_LENGTHS:
        if length > args.tokens:
            continue
        batch = args.tokens // length
        say(f"{name}: {batch} x {length}")
        tensors = [[torch.randn(batch, length, 3 * heads * size, **kind)] for _ in range(3)]
        d_o = torch.randn(batch, length, heads, size, **kind)
        with sdpa_kernel(kinds[name]):
            ms = timed_attention(make_forward, tensors, d_o)
        yield {"backend": name, "batch": batch, "seq_len": length} | ms


def fla_ops(args, name):
    """Rows of fla's chunk_linear_attn on 64 random features, as they come."""
    say("importing fla")
    from fla.ops.linear_attn import chunk_linear_attn

    heads, size, m, kind = args.heads, args.head_size, 64, attention_kind(args)
    w = torch.randn(heads, size, m, **kind)

    @torch.compile(dynamic=False)
    def features(x):
        x = x * size**-0.25
        a = torch.einsum("bthd,hdm->bthm", x, w).float()
        a = a - (x.float() ** 2).sum(-1, keepdim=True) / 2
        return torch.exp(a - a.amax((1, 3), keepdim=True)).to(x.dtype)

    def make_forward(tensors):
        def forward(i):
            q, k, v = tensors[i % len(tensors)]
            return chunk_linear_attn(features(q), features(k), v, scale=1.0, normalize=True)[0]

        return forward

    for length in FLA_LENGTHS:
        if length > args.tokens:
            continue
        batch = args.tokens // length
        say(f"{name}: {batch} x {length}, which compiles first")
        shape = (batch, length, heads, size)
        tensors = [[torch.randn(shape, **kind) for _ in range(3)] for _ in range(3)]
        ms = timed_attention(make_forward, tensors, torch.randn(shape, **kind))
        yield {"backend": name, "batch": batch, "seq_len": length} | ms


ATTENTION_PEERS = {"flash": sdpa_ops, "cudnn": sdpa_ops, "fla": fla_ops}


def reason(error):
    """An exception in one line."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0][:300]}"


def prefill(args):
    """Median seconds of a prefill of batch x seq_len tokens."""
    functional = torch.nn.functional
    config = json.loads(config_path(args.model).read_text())
    width, heads, layers = config["n_embd"], config["n_head"], config["n_layer"]
    cuda = args.device == "cuda"
    kind = {"device": args.device, "dtype": torch.bfloat16 if cuda else torch.float32}
    torch.manual_seed(0)

    def weight(*shape):
        return torch.randn(*shape, **kind) * 0.02

    def make_block():
        sizes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
        return [(weight(o, i), weight(o)) for i, o in sizes] + [
            (torch.ones(width, **kind), weight(width)) for _ in range(2)
        ]

    def block(x, qkv, out, fc, proj, norm_1, norm_2):
        parts = functional.linear(functional.layer_norm(x, (width,), *norm_1), *qkv)
        q, k, v = (
            t.view(*x.shape[:2], heads, -1).transpose(1, 2) for t in parts.split(width, dim=-1)
        )
        o = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + functional.linear(o.transpose(1, 2).reshape(x.shape), *out)
        u = functional.linear(functional.layer_norm(x, (width,), *norm_2), *fc)
        return x + functional.linear(functional.gelu(u, approximate="tanh"), *proj), k, v

    blocks = [make_block() for _ in range(layers)]
    wte, wpe = weight(config["vocab_size"], width), weight(config["n_positions"], width)
    at_once = max(1, min(args.batch, 32768 // args.seq_len))
    ids = torch.randint(len(wte), (args.batch, args.seq_len), device=args.device)
    positions = torch.arange(args.seq_len, device=args.device) % len(wpe)
    run = torch.compile(block) if cuda else block

    def once():
        kept, logits = [], []
        for piece in ids.split(at_once):
            x = wte[piece] + wpe[positions]
            for weights in blocks:
                x, k, v = run(x, *weights)
                kept.append((k, v))
            logits.append(functional.layer_norm(x[:, -1], (width,)) @ wte.T)
        return torch.cat(logits).sum().item()

    times = []
    with torch.no_grad():
        once()
        for _ in range(args.steps):
            start = time.perf_counter()
            once()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


class Decoder(torch.nn.Module):
    """A GPT-2 whose blocks attend to one more token and all of a static cache."""

    def __init__(self, config, batch, length):
        super().__init__()
        width, self.heads = config["n_embd"], config["n_head"]
        options = {"device": "cuda", "dtype": torch.bfloat16}
        self.wte = torch.nn.Embedding(config["vocab_size"], width, **options)
        self.wpe = torch.nn.Embedding(length, width, **options)
        self.blocks = blocks(config, **options)
        self.norm = torch.nn.LayerNorm(width, **options)
        shape = (config["n_layer"], 2, batch, self.heads, length, width // self.heads)
        self.cache = torch.randn(shape, **options)
        self.at = torch.tensor([length - 1], device="cuda")

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(self.at)
        for block, (keys, values) in zip(self.blocks, self.cache):
            norm_1, qkv, out, norm_2, up, down = block
            q, k, v = qkv(norm_1(x)).view(len(x), 3, self.heads, 1, -1).unbind(1)
            keys.index_copy_(2, self.at, k)
            values.index_copy_(2, self.at, v)
            o = torch.nn.functional.scaled_dot_product_attention(q, keys, values)
            x = x + out(o.reshape(x.shape))
            x = x + down(torch.nn.functional.gelu(up(norm_2(x)), approximate="tanh"))
        return (self.norm(x) @ self.wte.weight.T).argmax(-1)


@torch.no_grad()
def decode_cuda(args):
    """Rows of (batch, length, ms a step)."""
    config = json.loads(config_path(args.model).read_text())
    rows = []
    for batch in args.batches:
        model = Decoder(config, batch, args.seq_len)
        step = torch.compile(model) if args.compile else model
        tokens = torch.zeros(batch, dtype=torch.int64, device="cuda")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                tokens.copy_(step(tokens))
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tokens.copy_(step(tokens))
        ms = median_ms(lambda _, graph=graph: [graph.replay() for _ in range(10)]) / 10
        rows.append({"peer": "torch", "compiled": args.compile, "batch": batch,
                     "cache": args.seq_len, "step_ms": ms, "tokens_per_s": 1e3 * batch / ms,
                     "cache_bytes": model.cache.numel() * 2})
        del graph, step, model
        torch.cuda.empty_cache()
    return rows


def median_ms(call, repeats=20):
    """Median ms of call(i). On a GPU all of them are in its queue before the first has ended, so
    that what Python needs to start one is not in the time of the next."""
    for i in range(3):
        call(i)
    if not torch.cuda.is_initialized():
        marks = [time.perf_counter()]
        for i in range(repeats):
            call(i)
            marks.append(time.perf_counter())
        return 1e3 * statistics.median(b - a for a, b in zip(marks, marks[1:]))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for i in range(repeats):
        call(i)
        marks[i + 1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:]))


def srf_round(args):
    """`srf bench step|decode --json`: seconds a step, and all of its report."""
    command = [args.srf, "bench", "decode" if args.decode else "step", "--json"]
    command += ["--batch", str(args.batch), "--threads", str(args.threads)]
    command += ["--device", args.device]
    if args.decode:
        command += ["-n", str(args.steps), "--steps", "3", "--temperature", "0"]
    else:
        command += ["--attention", args.attention]
        command += ["--seq-len", str(args.seq_len), "--steps", str(args.steps)]
    if args.window is not None:
        command += ["--window", str(args.window)]
    is_directory = pathlib.Path(args.model).is_dir()
    command += ["--model" if is_directory else "--init", args.model]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    report = json.loads(done.stdout)
    if args.decode:
        return args.batch / report["tokens_per_s"], report
    return report["step_ms"] / 1e3, report


def attention_line(row):
    return (
        "{backend:8} {batch:3} x {seq_len:<6} forward {fwd_ms:9.3f} ms, "
        "forward + backward {fwd_bwd_ms:9.3f} ms".format(**row)
    )


def main():
    args = parse()
    say(f"PyTorch {torch.__version__} is there")
    if args.attention_ops:
        failed = 0
        for name in args.backends:
            try:
                for row in ATTENTION_PEERS[name](args, name):
                    print(json.dumps(row) if args.json else attention_line(row), flush=True)
            except Exception as error:  # another's kernels: whatever it is, the others go on
                failed += 1
                say(f"{name} is left out: {reason(error)}")
        sys.exit(1 if failed == len(args.backends) else 0)
    if args.decode_cuda:
        for row in decode_cuda(args):
            print(json.dumps(row) if args.json else
                  "PyTorch KV cache of {cache} tokens, batch {batch}: {step_ms:.4f} ms a step, "
                  "{tokens_per_s:.0f} tokens/s".format(**row))
        return
    tokens = args.batch * (1 if args.decode else args.seq_len)
    if args.prefill:
        seconds = prefill(args)
        result = {"torch": torch.__version__, "batch": args.batch, "seq_len": args.seq_len}
        result |= {"prefill_ms": 1e3 * seconds, "tokens_per_s": tokens / seconds}
        print(
            json.dumps(result)
            if args.json
            else "PyTorch, prefill of {batch} x {seq_len}: {prefill_ms:.1f} ms, "
            "{tokens_per_s:.0f} tokens/s".format(**result)
        )
        return
    peer = CacheDecoder(args) if args.decode else Peer(args)
    theirs, ours, reports = [], [], []
    for _ in range(args.rounds):
        theirs.append(peer.round(args.steps))
        if args.srf:
            seconds, report = srf_round(args)
            ours.append(seconds)
            reports.append(report)
    result = {
        "torch": torch.__version__,
        "batch": args.batch,
        "seq_len": 1 if args.decode else args.seq_len,
        "threads": args.threads,
        "device": args.device,
        "torch_step_ms": 1e3 * min(theirs),
        "torch_tokens_per_s": tokens / min(theirs),
    }
    if ours:
        best = reports[ours.index(min(ours))]
        result |= {
            "attention": best["attention"],
            "srf_step_ms": 1e3 * min(ours),
            "srf_tokens_per_s": tokens / min(ours),
            "srf": best,
            "ratio": min(theirs) / min(ours),
        }
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"torch {torch.__version__}, {args.device}, {args.threads} threads, "
        f"{args.batch} x {1 if args.decode else args.seq_len} tokens a step"
    )
    print(f"PyTorch {result['torch_step_ms']:.1f} ms, {result['torch_tokens_per_s']:.0f} tokens/s")
    if ours:
        print(f"srf     {result['srf_step_ms']:.1f} ms, {result['srf_tokens_per_s']:.0f} tokens/s")
        print(f"ratio of tokens/s, srf / PyTorch: {result['ratio']:.3f}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"bench_peers.py: {error}")
