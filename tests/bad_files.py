"""Writes a good tiny GPT-2 in each format and many broken copies of it, for test_bad_files.sh.

Every broken file is named after what is wrong with it. Only the standard library is used.
"""
import json
import os
import random
import struct
import sys

C, HEADS, LAYERS, POSITIONS, VOCAB = 8, 2, 1, 8, 260
random.seed(1)

CONFIG = {
    "model_type": "gpt2", "n_embd": C, "n_head": HEADS, "n_layer": LAYERS, "n_positions": POSITIONS,
    "vocab_size": VOCAB, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "n_inner": None, "tie_word_embeddings": True,
}


def numbers(n):
    return [random.uniform(-1, 1) for _ in range(n)]


def model():
    """Name -> (shape, values), transformers' layout."""
    shapes = {"wte.weight": (VOCAB, C), "wpe.weight": (POSITIONS, C)}
    for layer in range(LAYERS):
        block = {
            "ln_1.weight": (C,), "ln_1.bias": (C,),
            "attn.c_attn.weight": (C, 3 * C), "attn.c_attn.bias": (3 * C,),
            "attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,),
            "ln_2.weight": (C,), "ln_2.bias": (C,),
            "mlp.c_fc.weight": (C, 4 * C), "mlp.c_fc.bias": (4 * C,),
            "mlp.c_proj.weight": (4 * C, C), "mlp.c_proj.bias": (C,),
        }
        shapes.update({f"h.{layer}.{name}": shape for name, shape in block.items()})
    shapes.update({"ln_f.weight": (C,), "ln_f.bias": (C,)})
    out = {}
    for name, shape in shapes.items():
        n = 1
        for size in shape:
            n *= size
        out["transformer." + name] = (shape, numbers(n))
    return out


GOOD = model()


def write(path, data):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as f:
        f.write(data)


def entries(tensors):
    """The header of a safetensors file as a dict, and its data."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (shape, values) in tensors.items():
        raw = struct.pack(f"<{len(values)}f", *values)
        header[name] = {"dtype": "F32", "shape": list(shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return header, data


def framed(text, data, length=None):
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def safetensors(tensors):
    header, data = entries(tensors)
    return framed(json.dumps(header).encode(), data)


def directory(name, weights, config=CONFIG):
    """A transformers directory; config: a dict, raw bytes, or None for none."""
    write(f"{name}/model.safetensors", weights)
    if config is not None:
        raw = config if isinstance(config, bytes) else json.dumps(config).encode()
        write(f"{name}/config.json", raw)


def changed(name, **fields):
    """A copy of the model with fields of its first tensor's header entry changed or removed."""
    header, data = entries(GOOD)
    entry = header["transformer.wte.weight"]
    for key, value in fields.items():
        if value is None:
            del entry[key]
        else:
            entry[key] = value
    directory(name, framed(json.dumps(header).encode(), data))


def bad_safetensors():
    good = safetensors(GOOD)
    header, data = entries(GOOD)
    text = json.dumps(header).encode()
    directory("good", good)
    directory("st-empty", b"")
    directory("st-7-bytes", good[:7])
    directory("st-length-2^63", framed(text, data, 1 << 63))
    directory("st-length-past-end", framed(text, data, len(text) + len(data) + 1))
    directory("st-length-too-short", framed(text, data, len(text) - 9))
    directory("st-length-0", framed(b"", data))
    directory("st-header-truncated", good[:len(text) // 2])
    directory("st-data-truncated", good[:-1])
    directory("st-no-data", framed(text, b""))
    directory("st-trailing-byte", good + b"x")
    directory("st-bad-json", framed(text[:-1] + b",", data))
    directory("st-deep-json", framed(b'{"a":' + b"[" * 100000, data))
    directory("st-not-utf8", framed(text.replace(b"wte", b"w\xffe"), data))
    directory("st-duplicate-key", framed(text[:-1] + b"," + text[1:], data))
    directory("st-array", framed(b"[1]", data))
    header["transformer.wte.weight"] = 7
    directory("st-no-object", framed(json.dumps(header).encode(), data))
    write("st-header-too-long/model.safetensors", framed(b"{", b"", 1 << 26))
    os.truncate("st-header-too-long/model.safetensors", (1 << 26) + 100)
    end = VOCAB * C * 4
    changed("st-no-dtype", dtype=None)
    changed("st-no-shape", shape=None)
    changed("st-unknown-dtype", dtype="F4_X")
    changed("st-int-dtype", dtype="I32")
    changed("st-wrong-dtype-size", dtype="F16")
    changed("st-negative-shape", shape=[-VOCAB, -C])
    changed("st-fraction-shape", shape=[VOCAB, 8.0])
    changed("st-shape-overflow", shape=[1 << 62, 1 << 62])
    changed("st-shape-too-big", shape=[1 << 70, 1])
    changed("st-5-dimensions", shape=[VOCAB, C, 1, 1, 1])
    changed("st-shape-mismatch", shape=[VOCAB + 1, C])
    changed("st-one-offset", data_offsets=[0])
    changed("st-offsets-reversed", data_offsets=[end, 0])
    changed("st-offsets-past-end", data_offsets=[1 << 40, (1 << 40) + end])
    changed("st-gap-first", data_offsets=[4, 4 + end])
    changed("st-transposed", shape=[C, VOCAB])
    for wrong, shift in ("st-gap", 4), ("st-overlap", -4):
        header, data = entries(GOOD)
        for name, entry in header.items():
            if name not in ("__metadata__", "transformer.wte.weight"):
                entry["data_offsets"] = [x + shift for x in entry["data_offsets"]]
        data = data + bytes(4) if shift > 0 else data[:-4]
        directory(wrong, framed(json.dumps(header).encode(), data))


def bad_tensors():
    def copy(name, change):
        tensors = dict(GOOD)
        change(tensors)
        directory(name, safetensors(tensors))

    shape, values = GOOD["transformer.h.0.mlp.c_fc.weight"]
    copy("missing-tensor", lambda t: t.pop("transformer.h.0.ln_2.bias"))
    copy("unknown-tensor", lambda t: t.update({"transformer.h.1.ln_1.bias": ((C,), numbers(C))}))
    head = GOOD["transformer.wte.weight"]
    copy("good-head", lambda t: t.update({"lm_head.weight": head}))
    copy("untied-head", lambda t: t.update({"lm_head.weight": (head[0], numbers(VOCAB * C))}))
    copy("padded-head", lambda t: t.update({"lm_head.weight": ((VOCAB + 4, C),
                                                               numbers((VOCAB + 4) * C))}))
    copy("twice-with-prefix", lambda t: t.update({"ln_f.bias": ((C,), numbers(C))}))
    copy("nan", lambda t: t.update({"transformer.h.0.mlp.c_fc.weight":
                                    (shape, values[:5] + [float("nan")] + values[6:])}))
    copy("infinity", lambda t: t.update({"transformer.h.0.mlp.c_fc.weight":
                                         (shape, values[:-1] + [float("-inf")])}))
    copy("wrong-shape", lambda t: t.update({"transformer.ln_f.weight": ((C, 1), numbers(C))}))
    copy("empty-name", lambda t: t.update({"": ((1,), [1.0])}))
    copy("long-name", lambda t: t.update({"n" * 300: ((1,), [1.0])}))


def bad_configs():
    good = safetensors(GOOD)

    def config(name, **fields):
        merged = {**CONFIG, **fields}
        directory(name, good, {k: v for k, v in merged.items() if v != "absent"})

    directory("config-absent", good, None)
    directory("config-empty", good, b"")
    directory("config-bad-json", good, b'{"model_type": "gpt2",}')
    directory("config-array", good, b"[]")
    directory("config-deep", good, b'{"a":' * 100000)
    directory("config-duplicate", good, json.dumps(CONFIG).encode()[:-1] + b', "n_embd": 16}')
    write("config-is-directory/model.safetensors", good)
    os.makedirs("config-is-directory/config.json")
    config("config-llama", model_type="llama")
    config("config-no-type", model_type="absent")
    config("config-no-width", n_embd="absent")
    config("config-text-width", n_embd="8")
    config("config-odd-heads", n_head=3)
    config("config-huge", n_layer=10**15)
    config("config-two-layers", n_layer=2)
    config("config-wide", n_embd=16)
    config("config-scale-by-layer", scale_attn_by_inverse_layer_idx=True)
    config("config-no-scale", scale_attn_weights=False)
    config("config-relu", activation_function="relu")
    config("config-untied", tie_word_embeddings=False)
    config("config-cross", add_cross_attention=True)


def byte_vocabulary():
    """GPT-2's names of the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    names = {b: chr(b) for b in plain}
    names.update({b: chr(256 + i) for i, b in enumerate(others)})
    return {names[b]: b for b in range(256)}


def bad_tokenizers():
    good = safetensors(GOOD)
    vocab = byte_vocabulary()
    for name in ("good-vocab", "vocab-no-merges", "vocab-bad-merges", "vocab-larger-than-model",
                 "vocab-bad-json", "tokenizer-bad-json", "tokenizer-other-type"):
        directory(name, good)
        extra = 2 if name == "good-vocab" else 1000
        tokens = {**vocab, "<|endoftext|>": 256, "th": 257}
        if name == "vocab-larger-than-model":
            tokens.update({f"t{i}": 258 + i for i in range(extra)})
        text = json.dumps(tokens).encode()
        if name == "vocab-bad-json":
            text = text[:-1]
        if name.startswith("tokenizer"):
            continue
        write(f"{name}/vocab.json", text)
        if name != "vocab-no-merges":
            write(f"{name}/merges.txt",
                  b"#version: 0.2\n" + (b"t h h\n" if name == "vocab-bad-merges" else b"t h\n"))
    write("tokenizer-bad-json/tokenizer.json", b'{"model": ')
    write("tokenizer-other-type/tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": {}}}')


def bad_directories():
    names = list(GOOD)
    half = len(names) // 2
    parts = {"one.safetensors": names[:half], "two.safetensors": names[half:]}

    def shards(name, weight_map=None, raw=None, skip=()):
        for file, members in parts.items():
            if file not in skip:
                write(f"{name}/{file}", safetensors({k: GOOD[k] for k in members}))
        index = {"weight_map": {k: file for file, members in parts.items() for k in members}}
        index["weight_map"].update(weight_map or {})
        write(f"{name}/model.safetensors.index.json",
              json.dumps(index).encode() if raw is None else raw)
        write(f"{name}/config.json", json.dumps(CONFIG).encode())

    shards("good-shards")
    shards("shard-missing", skip=("two.safetensors",))
    shards("shard-escapes", {names[0]: "../good/model.safetensors"})
    shards("shard-absolute", {names[0]: "/etc/passwd"})
    shards("shard-number", {names[0]: 3})
    shards("shard-elsewhere", {names[0]: "two.safetensors"})
    shards("shard-extra", {"transformer.x": "two.safetensors"})
    shards("index-bad-json", raw=b"{")
    shards("index-no-map", raw=b"{}")
    shards("index-map-array", raw=b'{"weight_map": ["one.safetensors"]}')
    shards("index-empty-map", raw=b'{"weight_map": {}}')
    os.makedirs("dir-empty")
    write("dir-pickled/pytorch_model.bin", b"PK")
    os.makedirs("dir-weights-are-directory/model.safetensors")
    os.makedirs("dir-weights-are-fifo")
    os.mkfifo("dir-weights-are-fifo/model.safetensors")
    write("text.safetensors", b"once upon a time there was no header here\n")


def llmc(header=(), values=None, extra=0):
    order = [("wte.weight", 0), ("wpe.weight", 0), ("ln_1.weight", 1), ("ln_1.bias", 1),
             ("attn.c_attn.weight", 2), ("attn.c_attn.bias", 1), ("attn.c_proj.weight", 2),
             ("attn.c_proj.bias", 1), ("ln_2.weight", 1), ("ln_2.bias", 1), ("mlp.c_fc.weight", 2),
             ("mlp.c_fc.bias", 1), ("mlp.c_proj.weight", 2), ("mlp.c_proj.bias", 1),
             ("ln_f.weight", 0), ("ln_f.bias", 0)]
    fields = [20240326, 3, POSITIONS, VOCAB, LAYERS, HEADS, C, 384] + [0] * 248
    for i, value in header:
        fields[i] = value
    data = []
    for name, how in order:
        for layer in range(LAYERS if how else 1):
            shape, x = GOOD["transformer." + (f"h.{layer}." if how else "") + name]
            if how == 2:
                x = [x[j * shape[1] + i] for i in range(shape[1]) for j in range(shape[0])]
            data += x
            if name == "wte.weight":
                data += [0.0] * ((384 - VOCAB) * C)
    for i, value in values or ():
        data[i] = value
    return struct.pack("<256i", *fields) + struct.pack(f"<{len(data)}f", *data) + bytes(extra)


def bad_llmc():
    good = llmc()
    write("good.bin", good)
    write("llmc-header-truncated.bin", good[:600])
    write("llmc-truncated.bin", good[:-4])
    write("llmc-header-only.bin", good[:1024])
    write("llmc-too-long.bin", llmc(extra=4))
    write("llmc-version-1.bin", llmc([(1, 1)]))
    write("llmc-bf16-size.bin", llmc([(1, 5)]))
    write("llmc-negative.bin", llmc([(4, -1)]))
    write("llmc-no-layers.bin", llmc([(4, 0)]))
    write("llmc-no-heads.bin", llmc([(5, 0)]))
    write("llmc-3-heads.bin", llmc([(5, 3)]))
    write("llmc-padding.bin", llmc([(7, 256)]))
    write("llmc-huge.bin", llmc([(i, 2**31 - 1) for i in range(2, 8)]))
    write("llmc-huge-width.bin", llmc([(6, 1 << 24), (4, 2**31 - 1)]))
    write("llmc-nan.bin", llmc(values=[(3, float("nan"))]))


def bad_hdf5(path):
    """Of a good native checkpoint that srf wrote."""
    with open(path, "rb") as f:
        good = f.read()
    for percent in (0, 1, 10, 50, 90, 99):
        write(f"h5-cut-{percent}.h5", good[:max(9, len(good) * percent // 100)])
    write("h5-magic-only.h5", good[:8])
    write("h5-old.h5", good[:8] + b"\0" + good[9:])
    write("h5-superblock.h5", good[:36] + b"\xff" * 8 + good[44:])
    at = good.index(b"OHDR")
    write("h5-header.h5", good[:at + 12] + b"\xff" * 4 + good[at + 16:])
    for what in (b"version", b"weights", b"config"):
        write(f"h5-no-{what.decode()}.h5", good.replace(what, what[:-1] + b"X"))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        bad_hdf5(sys.argv[1])
    else:
        bad_safetensors()
        bad_tensors()
        bad_configs()
        bad_tokenizers()
        bad_directories()
        bad_llmc()
