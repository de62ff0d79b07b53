#!/usr/bin/env python3
"""SRF attention on PyTorch tensors: libsrf's public attention op (srf/attention.h) through ctypes.

    attention = Attention(n_heads=12, head_size=64, device="cuda", dtype=torch.bfloat16)
    o = attention(q, k, v)             # (b, t, heads, head size); o.backward() gives dq, dk, dv
    o = attention.packed(qkv)          # the same of one tensor (b, t, 3, heads, head size)
    attention.redraw()                 # other features: once an optimizer step
    state = attention.new_state(b)     # inference: a state in, a state out
    o = attention.prefill(q, k, v, state)
    o = attention.step(q1, k1, v1, state, pos)

q, k, v may be slices of one packed tensor (anything whose last two dimensions are dense). Where
they are, packed() is faster: PyTorch puts three gradients of slices together by copies. CUDA calls
go to PyTorch's current stream and return at once. Trained features: attention(q, k, v, w=w) with w
(sets, m, head size) gives w.grad too.

Run as a program it checks itself or measures:
    srf_attention.py --library L.so --check tests/attention_reference.json [--device cuda]
    srf_attention.py --library L.so --bench [--srf build/srf] [--json]
"""
import argparse
import ctypes
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time

try:
    import torch
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(f"srf_attention.py: needs {missing.name}: pip install {missing.name}")

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
KINDS = {"iid": 0, "orthogonal": 1, "simplex": 2, "simplex+": 3}
MODES = {"parallel": 0, "chunkwise": 1, "recurrent": 2}


class Options(ctypes.Structure):
    _fields_ = [("device", ctypes.c_char_p), ("dtype", ctypes.c_int), ("threads", ctypes.c_int),
                ("n_heads", ctypes.c_int64), ("head_size", ctypes.c_int64), ("m", ctypes.c_int64),
                ("window", ctypes.c_int64), ("causal", ctypes.c_bool),
                ("share_heads", ctypes.c_bool), ("features", ctypes.c_int),
                ("rotation", ctypes.c_int), ("normalize_rows", ctypes.c_bool),
                ("oprf_a", ctypes.c_double), ("seed", ctypes.c_uint64), ("draw", ctypes.c_uint64)]


class Tensors(ctypes.Structure):
    _fields_ = [("b", ctypes.c_int64), ("t", ctypes.c_int64), ("q", ctypes.c_void_p),
                ("k", ctypes.c_void_p), ("v", ctypes.c_void_p), ("ld", ctypes.c_int64),
                ("o", ctypes.c_void_p), ("ld_o", ctypes.c_int64)]


class PrefillArgs(ctypes.Structure):
    _fields_ = [("mode", ctypes.c_int), ("chunk", ctypes.c_int64), ("state", ctypes.c_void_p),
                ("pos", ctypes.c_void_p), ("lens", ctypes.c_void_p), ("slots", ctypes.c_void_p)]


def load_library(path=None):
    """libsrf.so at `path`, $SRF_LIBRARY, or where the loader finds it."""
    lib = ctypes.CDLL(path or os.environ.get("SRF_LIBRARY") or "libsrf.so")
    p, i64, u64 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64
    signatures = {
        "srf_attn_defaults": (None, [ctypes.POINTER(Options), i64, i64]),
        "srf_attn_create": (ctypes.c_int, [ctypes.POINTER(Options), ctypes.POINTER(p)]),
        "srf_attn_free": (None, [p]),
        "srf_attn_draw": (ctypes.c_int, [p, p, u64]),
        "srf_attn_redraw": (ctypes.c_int, [p, p]),
        "srf_attn_set_features": (ctypes.c_int, [p, p, p, p]),
        "srf_attn_forward": (ctypes.c_int, [p, p, ctypes.POINTER(Tensors), p]),
        "srf_attn_backward": (ctypes.c_int, [p, p, ctypes.POINTER(Tensors), p, p, p, p, p, p]),
        "srf_attn_state_values": (i64, [p]),
        "srf_attn_prefill": (ctypes.c_int, [p, p, ctypes.POINTER(Tensors),
                                            ctypes.POINTER(PrefillArgs)]),
        "srf_attn_step": (ctypes.c_int, [p, p, ctypes.POINTER(Tensors), p, p]),
        "srf_attn_reserve": (ctypes.c_int, [p, i64, i64, ctypes.c_bool]),
        "srf_error_message": (ctypes.c_char_p, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class Attention:
    """A handle: features, a workspace, and the settings of one layer's attention."""

    def __init__(self, n_heads, head_size, m=64, window=0, causal=True, share_heads=False,
                 features="simplex", seed=0, draw=0, device="cpu", dtype=torch.float32,
                 library=None):
        self.lib = library if library is not None else load_library()
        self.handle = ctypes.c_void_p()
        self.n_heads, self.head_size, self.m, self.dtype = n_heads, head_size, m, dtype
        self.n_sets, self.window = 1 if share_heads else n_heads, window
        self.device = torch.device(device)
        self.acc = torch.float64 if dtype == torch.float64 else torch.float32
        options = Options()
        self.lib.srf_attn_defaults(ctypes.byref(options), n_heads, head_size)
        options.device, options.dtype = self.device.type.encode(), DTYPES[dtype]
        options.m, options.window, options.causal = m, window, causal
        options.share_heads, options.features = share_heads, KINDS[features]
        options.seed, options.draw = seed, draw
        self._ok(self.lib.srf_attn_create(ctypes.byref(options), ctypes.byref(self.handle)))

    def __del__(self):
        if getattr(self, "handle", None):
            self.lib.srf_attn_free(self.handle)

    def _ok(self, status):
        if status != 0:
            raise RuntimeError(self.lib.srf_error_message().decode())

    def _stream(self):
        if self.device.type != "cuda":
            return None
        return torch.cuda.current_stream(self.device).cuda_stream

    def _rows(self, *tensors):
        """The tensors with dense heads and one distance between all their tokens, and that."""
        b, t = tensors[0].shape[:2]
        shape = (b, t, self.n_heads, self.head_size)
        ld = tensors[0].stride(1) if t > 1 or b > 1 else self.n_heads * self.head_size
        if t == 1 and b > 1:
            ld = tensors[0].stride(0)
        want = (t * ld, ld, self.head_size, 1)
        for x in tensors:
            if x.shape != shape or x.dtype != self.dtype or x.device.type != self.device.type:
                raise ValueError(f"expected {shape} of {self.dtype} on {self.device}, found "
                                 f"{tuple(x.shape)} of {x.dtype} on {x.device}")
        if ld < want[2] * self.n_heads or any(
                size > 1 and have != need for x in tensors
                for size, have, need in zip(shape, x.stride(), want)):
            tensors = [x.contiguous() for x in tensors]
            ld = self.n_heads * self.head_size
        return tensors, ld

    def _tensors(self, q, k, v, o, ld):
        b, t = q.shape[:2]
        return Tensors(b, t, q.data_ptr(), k.data_ptr(), v.data_ptr(), ld, o.data_ptr(), 0)

    def _packed(self, qkv):
        """Addresses of q, k, v in a dense packed tensor; views would cost more than the call."""
        width = self.n_heads * self.head_size * qkv.element_size()
        first = qkv.data_ptr()
        return first, first + width, first + 2 * width

    def _check_packed(self, qkv):
        if (qkv.dim() != 5 or qkv.shape[2:] != (3, self.n_heads, self.head_size) or
                qkv.dtype != self.dtype or qkv.device.type != self.device.type):
            raise ValueError(f"expected (b, t, 3, {self.n_heads}, {self.head_size}) of "
                             f"{self.dtype} on {self.device}, found {tuple(qkv.shape)} of "
                             f"{qkv.dtype} on {qkv.device}")

    def draw(self, number):
        self._ok(self.lib.srf_attn_draw(self.handle, self._stream(), number))

    def redraw(self):
        self._ok(self.lib.srf_attn_redraw(self.handle, self._stream()))

    def _check(self, what, x, shape):
        """libsrf sees an address: what is behind it must be all there."""
        if tuple(x.shape) != shape or x.device.type != self.device.type:
            raise ValueError(f"{what}: expected {shape} on {self.device}, found {tuple(x.shape)} "
                             f"on {x.device}")

    def set_features(self, w, bias=None):
        """w (sets, m, head size), bias (sets, m) or None: zeros."""
        self._check("w", w, (self.n_sets, self.m, self.head_size))
        if bias is not None:
            self._check("bias", bias, (self.n_sets, self.m))
        w = w.detach().to(self.dtype).contiguous()
        bias = None if bias is None else bias.detach().to(self.acc).contiguous()
        self._ok(self.lib.srf_attn_set_features(self.handle, self._stream(), w.data_ptr(),
                                                None if bias is None else bias.data_ptr()))

    def reserve(self, b, t, backward=True):
        self._ok(self.lib.srf_attn_reserve(self.handle, b, t, backward))

    def _forward(self, b, t, qkv, ld, device, with_stat):
        """o, and what backward wants of each row; qkv: addresses."""
        o = torch.empty((b, t, self.n_heads, self.head_size), dtype=self.dtype, device=device)
        stat = None
        if with_stat:
            stat = torch.empty((b, self.n_heads, t), dtype=self.acc, device=device)
        x = Tensors(b, t, *qkv, ld, o.data_ptr(), 0)
        self._ok(self.lib.srf_attn_forward(self.handle, self._stream(), ctypes.byref(x),
                                           stat.data_ptr() if with_stat else None))
        return o, stat

    def _backward(self, qkv, o, ld, d_o, stat, grads, w):
        """Into grads, laid out as q, k, v, all by their addresses; returns dw if w is not None."""
        dw = None
        if w is not None:
            dw = torch.zeros(self.n_sets, self.m, self.head_size, dtype=self.acc, device=o.device)
        b, t = o.shape[:2]
        x = Tensors(b, t, *qkv, ld, o.data_ptr(), 0)
        self._ok(self.lib.srf_attn_backward(
            self.handle, self._stream(), ctypes.byref(x), d_o.data_ptr(), stat.data_ptr(),
            *grads, None if dw is None else dw.data_ptr()))
        return None if dw is None else dw.to(w.dtype)

    def __call__(self, q, k, v, w=None):
        if w is not None:
            self.set_features(w)
        if torch.is_grad_enabled():
            return _Function.apply(self, q, k, v, w)
        qkv, ld = self._rows(q, k, v)
        return self._forward(*q.shape[:2], _addresses(qkv), ld, q.device, False)[0]

    def packed(self, qkv, w=None):
        if w is not None:
            self.set_features(w)
        if torch.is_grad_enabled():
            return _Packed.apply(self, qkv, w)
        return self._forward_packed(qkv, False)[1]

    def _forward_packed(self, qkv, with_stat):
        """The dense packed tensor, o, and what backward wants."""
        self._check_packed(qkv)
        qkv = qkv.contiguous()
        ld = 3 * self.n_heads * self.head_size
        return qkv, *self._forward(*qkv.shape[:2], self._packed(qkv), ld, qkv.device, with_stat)

    def _state_shape(self, b):
        return b, self.n_heads, self.lib.srf_attn_state_values(self.handle) // self.n_heads

    def new_state(self, b):
        return torch.zeros(self._state_shape(b), dtype=self.acc, device=self.device)

    def _positions(self, b, state, pos):
        """pos for C; refuses a state or positions that are not those of b sequences."""
        self._check("state", state, self._state_shape(b))
        if state.dtype != self.acc or not state.is_contiguous():
            raise ValueError(f"state: expected dense {self.acc}, as new_state() makes it")
        if pos is not None and len(pos) != b:
            raise ValueError(f"{len(pos)} positions for {b} sequences")
        return None if pos is None else (ctypes.c_int32 * b)(*pos)

    def prefill(self, q, k, v, state, pos=None, mode="parallel", chunk=256):
        """o of more tokens of every sequence; state goes on. pos: tokens seen before, a list."""
        (q, k, v), ld = self._rows(q, k, v)
        o = torch.empty(q.shape, dtype=self.dtype, device=q.device)
        seen = self._positions(len(q), state, pos)
        args = PrefillArgs(MODES[mode], chunk, state.data_ptr(), None if seen is None else
                           ctypes.cast(seen, ctypes.c_void_p), None, None)
        x = self._tensors(q, k, v, o, ld)
        self._ok(self.lib.srf_attn_prefill(self.handle, self._stream(), ctypes.byref(x),
                                           ctypes.byref(args)))
        return o

    def step(self, q, k, v, state, pos=None):
        """o of one more token of every sequence: (b, 1, heads, head size)."""
        (q, k, v), ld = self._rows(q, k, v)
        o = torch.empty(q.shape, dtype=self.dtype, device=q.device)
        seen = self._positions(len(q), state, pos)
        x = self._tensors(q, k, v, o, ld)
        self._ok(self.lib.srf_attn_step(self.handle, self._stream(), ctypes.byref(x),
                                        state.data_ptr(), seen))
        return o


def _addresses(tensors):
    return [x.data_ptr() for x in tensors]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attention, q, k, v, w):
        a = attention
        (q, k, v), ld = a._rows(q, k, v)
        o, stat = a._forward(*q.shape[:2], _addresses((q, k, v)), ld, q.device, True)
        ctx.save_for_backward(q, k, v, o, stat)
        ctx.attention, ctx.w = a, w
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_o):
        """With the features that are in force now: draw anew after it, not before."""
        a = ctx.attention
        q, k, v, o, stat = ctx.saved_tensors
        (q, k, v), ld = a._rows(q, k, v)
        # laid out as q, k, v: rows of ld
        b, t = q.shape[:2]
        size, heads = a.head_size, a.n_heads
        if ld == heads * size:
            grads = [torch.empty_like(o) for _ in range(3)]
        elif ld >= 3 * heads * size:  # packed, as q, k, v most likely are
            room = torch.empty(b * t * ld, dtype=a.dtype, device=q.device)
            grads = [room.as_strided(q.shape, (t * ld, ld, size, 1), i * heads * size)
                     for i in range(3)]
        else:
            grads = [torch.empty(b * t * ld, dtype=a.dtype, device=q.device)
                     .as_strided(q.shape, (t * ld, ld, size, 1)) for _ in range(3)]
        w = ctx.w if ctx.needs_input_grad[4] else None
        dw = a._backward(_addresses((q, k, v)), o, ld, d_o.contiguous(), stat, _addresses(grads), w)
        return None, *grads, dw


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attention, qkv, w):
        qkv, o, stat = attention._forward_packed(qkv, True)
        ctx.save_for_backward(qkv, o, stat)
        ctx.attention, ctx.w = attention, w
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_o):
        a = ctx.attention
        qkv, o, stat = ctx.saved_tensors
        grad = torch.empty_like(qkv)
        w = ctx.w if ctx.needs_input_grad[2] else None
        ld = 3 * a.n_heads * a.head_size
        dw = a._backward(a._packed(qkv), o, ld, d_o.contiguous(), stat, a._packed(grad), w)
        return None, grad, dw


# ---- checks and measurements ---------------------------------------------------------------------


def close(what, got, want, tolerance):
    error = ((got.double().cpu() - want.double().cpu()).norm() / want.double().norm().cpu()).item()
    print(f"{what:<44} relative error {error:.1e} of {tolerance:.0e}")
    if not error <= tolerance:
        sys.exit(f"FAILED: {what}")


def check_recorded(library, path, device):
    """The results that tests/ref computed in double, for inputs that are formulas."""
    with open(path) as f:
        cases = json.load(f)
    for case in cases:
        b, t, heads, d, m = (case[name] for name in ("b", "t", "heads", "d", "m"))
        shape = (b, t, heads, d)
        i = torch.arange(math.prod(shape), dtype=torch.float64)
        inputs = [1.5 * torch.sin(0.7 * i), 1.2 * torch.cos(1.3 * i + 0.2), torch.sin(2.1 * i + 1)]
        d_o = torch.cos(0.9 * i)
        types = [(torch.float32, 1e-5)]
        types += [(torch.float64, 2e-7)] if device == "cpu" else [(torch.bfloat16, 2e-2)]
        for dtype, tolerance in types:
            name = f"{device} {str(dtype)[6:]} window {case['window']}: "
            a = Attention(heads, d, m, case["window"], seed=case["seed"], device=device,
                          dtype=dtype, library=library)
            packed = torch.stack([x.view(b, t, heads * d) for x in inputs], 2)
            packed = packed.to(device, dtype).requires_grad_()
            q, k, v = packed.view(b, t, 3, heads, d).unbind(2)
            o = a(q, k, v)
            o.backward(d_o.view(shape).to(device, dtype))
            want = {x: torch.tensor(case[x], dtype=torch.float64).view(shape)
                    for x in ("o", "dq", "dk", "dv")}
            close(name + "o", o.detach(), want["o"], tolerance)
            grad, packed.grad = packed.grad, None
            for part, x in enumerate(("dq", "dk", "dv")):
                close(name + x, grad.view(b, t, 3, heads, d)[:, :, part], want[x], tolerance)
            whole = a.packed(packed.view(b, t, 3, heads, d))
            whole.backward(d_o.view(shape).to(device, dtype))
            if not torch.equal(whole, o) or not torch.equal(packed.grad, grad):
                sys.exit(f"FAILED: {name}packed")
            for mode in MODES:
                state = a.new_state(b)
                with torch.no_grad():
                    first = a.prefill(q[:, :9], k[:, :9], v[:, :9], state, None, mode, 4)
                    rest = [a.step(q[:, s:s + 1], k[:, s:s + 1], v[:, s:s + 1], state, [s] * b)
                            for s in range(9, t)]
                close(name + mode + " prefill, steps", torch.cat([first] + rest, 1), want["o"],
                      tolerance)


def check_features(library, device):
    """Trained features: the gradient against a difference."""
    torch.manual_seed(1)
    dtype = torch.float64 if device == "cpu" else torch.float32
    a = Attention(2, 8, 16, device=device, dtype=dtype, library=library)
    q, k, v = (torch.randn(2, 30, 2, 8, dtype=dtype, device=device) for _ in range(3))
    w = torch.randn(2, 16, 8, dtype=dtype, device=device, requires_grad=True)
    d_o, dw = torch.randn_like(q), torch.randn_like(w)
    (a(q, k, v, w) * d_o).sum().backward()
    h = 1e-5 if device == "cpu" else 1e-2
    with torch.no_grad():
        up, down = ((a(q, k, v, w + s * h * dw) * d_o).sum().double() for s in (1, -1))
    close(f"{device} dw along a direction", (w.grad * dw).sum(), (up - down) / (2 * h),
          1e-7 if device == "cpu" else 1e-2)
    if device == "cpu":
        q, k, v = (x[:1, :5].clone().requires_grad_() for x in (q, k, v))
        torch.autograd.gradcheck(lambda *x: a(*x), (q, k, v), eps=1e-5, atol=1e-7)
        print("gradcheck of q, k, v                         passed")


def check_refusals(library, device):
    """What would let libsrf read or write past the end of a tensor."""
    a = Attention(2, 8, 16, 4, device=device, library=library)
    x, state = torch.zeros(3, 1, 2, 8, device=device), a.new_state(3)
    wrong = [(a.new_state(2), [0] * 3), (state[:, :, 1:], [0] * 3), (state.double(), [0] * 3),
             (state[:, :1].expand(3, 2, -1), [0] * 3), (state, [0, 0])]
    calls = [functools.partial(call, x, x, x, *some) for some in wrong
             for call in (a.prefill, a.step)]
    calls += [functools.partial(a.set_features, torch.zeros(2, 15, 8, device=device)),
              functools.partial(a.set_features, torch.zeros(2, 16, 8, device=device),
                                torch.zeros(16, device=device))]
    for call in calls:
        try:
            call()
        except ValueError:
            continue
        sys.exit(f"FAILED: not refused: {call}")
    print(f"{len(calls)} calls with too little memory refused")


def check_large(library):
    """The tensor-core kernels on a stream of their own, against double on the CPU."""
    torch.manual_seed(2)
    b, t, heads, d, m = 2, 700, 3, 64, 64
    for window in (0, 64):
        qkv = torch.randn(b, t, 3, heads, d).bfloat16()
        d_o = torch.randn(b, t, heads, d).bfloat16()
        results = []
        for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
            a = Attention(heads, d, m, window, seed=5, device=device, dtype=dtype,
                          library=library)
            w = torch.randn(heads, m, d, generator=torch.Generator().manual_seed(3)).bfloat16()
            a.set_features(w.to(device, dtype))
            stream = torch.cuda.Stream() if device == "cuda" else None
            with torch.cuda.stream(stream):
                x = qkv.to(device, dtype).requires_grad_()
                o = a(*x.unbind(2))
                o.backward(d_o.to(device, dtype))
                state = a.new_state(b)
                with torch.no_grad():
                    q, k, v = x.unbind(2)
                    cut = 300
                    first = a.prefill(q[:, :cut].contiguous(), k[:, :cut].contiguous(),
                                      v[:, :cut].contiguous(), state)
                    second = a.prefill(q[:, cut:].contiguous(), k[:, cut:].contiguous(),
                                       v[:, cut:].contiguous(), state, [cut] * b)
                results.append((o.detach(), x.grad, torch.cat([first, second], 1)))
            if stream:
                stream.synchronize()
        for what, want, got in zip(("o", "gradients", "prefill"), *results):
            close(f"cuda bf16 b=2 t=700 d=64 m=64 window {window}: {what}", got, want, 1e-2)


def host_ms(run, calls=10):
    """The host's time to ask for a call, while the GPU is busy with something else."""
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e3 * seconds / calls


def gpu_ms(run, host, reps=20, calls=16):
    """The GPU's time of a call among many that wait for it: as in training, where Python runs
    ahead. host: its time to ask for one, which the GPU sleeps through first."""
    times = []
    for _ in range(reps):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(2e6 * host * calls * 1.5) + 1_000_000)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return statistics.median(times)


def graph_ms(run, reps=20, calls=16):
    """The same calls recorded in a CUDA graph: no host between them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    times = []
    for i in range(reps + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i > 0:
            times.append(begin.elapsed_time(end) / calls)
    return statistics.median(times)


def bench_in_c(srf):
    """`srf bench op` on the same shape: case -> ms."""
    command = [srf, "bench", "op", "--device", "cuda", "--filter", "srf_attn_fwd", "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return {row["case"]: row["us"] * 1e-3 for row in json.loads(done.stdout)["cases"]}


def bench(library, srf, as_json):
    """Forward, and forward and backward, of `srf bench op`'s shape; inputs past the L2 cache."""
    b, t, heads, d, m = 32, 1024, 12, 64, 64
    a = Attention(heads, d, m, device="cuda", dtype=torch.bfloat16, library=library)
    a.reserve(b, t)
    inputs = [torch.randn(b, t, 3, heads, d, device="cuda").bfloat16() for _ in range(3)]
    d_o = torch.randn(b, t, heads, d, device="cuda").bfloat16()
    turn = [0]

    def forward():
        turn[0] += 1
        a._forward_packed(inputs[turn[0] % 3], True)  # with what backward wants, as the C bench

    def both():
        turn[0] += 1
        x = inputs[turn[0] % 3].detach().requires_grad_()
        a.packed(x).backward(d_o)

    in_c = bench_in_c(srf) if srf else {}
    rows = []
    for name, case, run in (("forward", "srf_attn_fwd T=1024", forward),
                            ("forward and backward", "srf_attn_fwd_bwd T=1024", both)):
        for _ in range(3):
            run()
        host = host_ms(run)
        rows.append({"pass": name, "ms": gpu_ms(run, host), "graph_ms": graph_ms(run),
                     "host_ms": host})
        if case in in_c:
            rows[-1].update(c_ms=in_c[case], over_c=rows[-1]["ms"] / in_c[case])
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
              "shape": [b, t, heads, d, m], "rows": rows}
    if as_json:
        print(json.dumps(result))
        return
    print(f"{result['device']}, PyTorch {torch.__version__}, b={b} t={t} h={heads} d={d} m={m}, "
          "bf16")
    for row in rows:
        line = (f"  {row['pass']:<21} {row['ms']:.4f} ms on the GPU, {row['graph_ms']:.4f} in a "
                f"CUDA graph; the host asks for it in {row['host_ms']:.4f}")
        if "c_ms" in row:
            line += f"; srf bench op {row['c_ms']:.4f}: {row['over_c']:.3f} x"
        print(line)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--library", help="libsrf.so")
    parser.add_argument("--check", metavar="FILE.json", help="compare with recorded results")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--bench", action="store_true", help="measure on the GPU")
    parser.add_argument("--srf", metavar="PROGRAM", help="--bench: beside `PROGRAM bench op`")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.check and not args.bench:
        parser.error("expected --check or --bench")
    library = load_library(args.library)
    if args.check:
        check_recorded(library, args.check, args.device)
        check_features(library, args.device)
        check_refusals(library, args.device)
        if args.device == "cuda":
            check_large(library)
    if args.bench:
        bench(library, args.srf, args.json)


if __name__ == "__main__":
    try:
        main()
    except (OSError, RuntimeError) as error:  # no library, no file, no such device
        sys.exit(f"srf_attention.py: {error}")
