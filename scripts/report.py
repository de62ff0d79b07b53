"""Make the demo's summary.json, pictures and report.html from what scripts/demo.sh left.

    report.py [--seconds S] out/demo     summary, pictures, report; fails if a promise is broken
    report.py --perplexity eval.json     print one number

Needs numpy and matplotlib. The page is one file: its pictures are inside it (and beside it). It
links to the pages that srf itself makes.
"""

import argparse
import base64
import html
import json
import math
import os
import pathlib
import platform
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker

# What the demo promises: share of the log-perplexity gap that a retrofit closes, and how far the
# recurrent form may be from the parallel one.
CLOSED_PURE = 0.75
CLOSED_HYBRID = 0.95
RECURRENT_RELATIVE = 1e-4

COLOURS = {
    "softmax": "#4d4d4d",
    "swapped": "#c44536",
    "pure": "#2a6fbb",
    "hybrid": "#2e8b57",
}
KIND_COLOURS = {
    "iid": "#c44536",
    "orthogonal": "#d99a2b",
    "simplex": "#2a6fbb",
    "simplex+": "#2e8b57",
}

plt.rcParams.update(
    {
        "figure.figsize": (4.8, 3.4),  # a phone's width: text stays readable when scaled to it
        "figure.dpi": 200,
        "font.size": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e3e3e3",
        "axes.axisbelow": True,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
    }
)


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_metrics(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def closed(after, softmax, swapped):
    """Share of the log-perplexity gap between swapped and softmax that is gone."""
    return 1 - math.log(after / softmax) / math.log(swapped / softmax)


# --- summary ------------------------------------------------------------------------------------


def summarize(out, seconds):
    names = ["softmax", "swapped", "swapped_hybrid", "pure", "hybrid"]
    names += ["recurrent", "recurrent_hybrid"]
    ppl = {name: read_json(out / f"eval_{name}.json")["ppl"] for name in names}
    generated = {name: read_json(out / f"generate_{name}.json") for name in ("pure", "hybrid")}
    summary = {f"ppl_{name}": value for name, value in ppl.items()}
    summary["closed_pure"] = closed(ppl["pure"], ppl["softmax"], ppl["swapped"])
    summary["closed_hybrid"] = closed(ppl["hybrid"], ppl["softmax"], ppl["swapped"])
    summary["state_bytes"] = generated["pure"]["state_bytes"]
    summary["state_bytes_hybrid"] = generated["hybrid"]["state_bytes"]
    summary["kv_bytes"] = generated["pure"]["kv_bytes"]  # at kv_tokens of context
    summary["kv_tokens"] = generated["pure"]["kv_positions"]
    summary["seconds"] = seconds
    return summary


def broken_promises(summary):
    broken = []

    def promise(what, holds):
        print(f"    {'ok    ' if holds else 'MISSED'} {what}")
        if not holds:
            broken.append(what)

    for name, least in (("pure", CLOSED_PURE), ("hybrid", CLOSED_HYBRID)):
        share = summary[f"closed_{name}"]
        promise(f"{name}: {share:.1%} of the gap closed, at least {least:.0%}", share >= least)
    for recurrent, parallel in (("recurrent", "pure"), ("recurrent_hybrid", "hybrid")):
        a, b = summary[f"ppl_{recurrent}"], summary[f"ppl_{parallel}"]
        promise(
            f"{parallel}: perplexity {a:.4f} recurrent, {b:.4f} in parallel, to 4 digits",
            abs(a / b - 1) <= RECURRENT_RELATIVE,
        )
    return broken


# --- pictures -----------------------------------------------------------------------------------


def save(figure, out, name):
    path = out / f"{name}.png"
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
    return path


def running_mean(values, width):
    """Mean of the last `width` values at each place."""
    sums = np.cumsum(np.insert(np.asarray(values, float), 0, 0.0))
    low = np.maximum(np.arange(1, len(sums)) - width, 0)
    return (sums[1:] - sums[low]) / (np.arange(1, len(sums)) - low)


def draw_loss(out):
    figure, axes = plt.subplots()
    top = []
    for name in ("pure", "hybrid"):
        rows = [r for r in read_metrics(out / name / "metrics.jsonl") if r.get("loss") is not None]
        steps = [r["step"] for r in rows]
        loss = [r["loss"] for r in rows]
        smooth = running_mean(loss, max(1, len(loss) // 25))
        axes.plot(steps, loss, color=COLOURS[name], alpha=0.2, linewidth=0.8)
        axes.plot(steps, smooth, color=COLOURS[name], linewidth=1.8, label=f"{name} retrofit")
        top.append(max(smooth))
    axes.axhline(
        read_json(out / "eval_softmax_train.json")["nll"],
        color=COLOURS["softmax"],
        linestyle="--",
        linewidth=1.2,
        label="untouched model",
    )
    axes.set_ylim(top=max(top) * 1.03)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats a token)")
    legend_above(axes, 3)
    return save(figure, out, "loss")


def legend_above(axes, columns, **options):
    """Where it hides nothing."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, handlelength=1.4,
                columnspacing=1.2, **options)


def draw_perplexities(out, summary):
    bars = [
        ("softmax\n(untouched)", "softmax", "softmax"),
        ("pure,\nafter swap", "swapped", "swapped"),
        ("pure,\nretrofitted", "pure", "pure"),
        ("pure,\nrecurrent", "recurrent", "pure"),
        ("hybrid,\nafter swap", "swapped_hybrid", "swapped"),
        ("hybrid,\nretrofitted", "hybrid", "hybrid"),
        ("hybrid,\nrecurrent", "recurrent_hybrid", "hybrid"),
    ]
    values = [summary[f"ppl_{key}"] for _, key, _ in bars]
    figure, axes = plt.subplots(figsize=(4.8, 3.8))
    places = np.arange(len(bars))[::-1]
    axes.barh(places, values, color=[COLOURS[colour] for _, _, colour in bars], height=0.68)
    for place, value in zip(places, values):
        axes.annotate(
            f"{value:.4g}",
            (value, place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
        )
    axes.set_yticks(places, [label for label, _, _ in bars], fontsize=8.5)
    axes.set_xlim(0, max(values) * 1.15)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("perplexity on held-out text (lower is better)")
    return save(figure, out, "perplexity")


def draw_kernel_error(out, validation, v2):
    """Measured error of the kernel estimate beside its closed form, one colour a coupling."""
    figure, axes = plt.subplots()
    rows = [row for row in validation["kernel"] if row["v2"] == v2]
    for kind, colour in KIND_COLOURS.items():
        mine = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["m"])
        if not mine:
            continue
        m = [row["m"] for row in mine]
        hollow = kind == "simplex+"  # lies on simplex without hiding it
        axes.plot(m, [row["mse"] for row in mine], "o", color=colour, markersize=8 if hollow else 4,
                  markerfacecolor="none" if hollow else colour, label=kind)
        if mine[0]["closed_form"] is not None:
            axes.plot(m, [row["closed_form"] for row in mine], color=colour, linewidth=1.2)
    features_axis(axes, sorted({row["m"] for row in rows}))
    axes.set_ylabel("relative squared error of a weight")
    legend_above(axes, 4, title="dots: measured, lines: theory", title_fontsize=9)
    return save(figure, out, "kernel_error")


def draw_error_of_m(out, validation):
    """Error of the heads' outputs against the number of features: mean, best and worst head."""
    rows = sorted(validation["output_error_by_m"], key=lambda row: row["m"])
    m = [row["m"] for row in rows]
    heads = [np.ravel(row["heads"]) for row in rows]
    figure, axes = plt.subplots()
    axes.fill_between(
        m,
        [h.min() for h in heads],
        [h.max() for h in heads],
        color=COLOURS["pure"],
        alpha=0.15,
        linewidth=0,
        label="best to worst head",
    )
    axes.plot(m, [h.mean() for h in heads], "o-", color=COLOURS["pure"], label="mean over heads")
    features_axis(axes, m)
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=[1, 2, 5]))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.set_ylabel("relative error of the output")
    legend_above(axes, 2)
    return save(figure, out, "error_of_m")


def features_axis(axes, m):
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(m, m)
    axes.minorticks_off()
    axes.set_xlabel("features m")


def draw_heat_map(out, name, values, label, number):
    """Layers down, heads across, the number in each field."""
    values = np.asarray(values, float)
    layers, heads = values.shape
    figure, axes = plt.subplots(figsize=(4.8, 1.3 + 0.42 * layers))
    image = axes.imshow(values, cmap="Blues", aspect="auto", vmin=0)
    middle = values.max() * 0.55
    for layer in range(layers):
        for head in range(heads):
            value = values[layer, head]
            colour = "white" if value > middle else "#222222"
            axes.text(head, layer, number.format(value), ha="center", va="center", color=colour,
                      fontsize=min(10, 60 / heads))
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.grid(False)
    figure.colorbar(image, ax=axes, label=label)
    return save(figure, out, name)


# --- page ---------------------------------------------------------------------------------------

STYLE = """
body { font: 17px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 42rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2rem; }
img { display: block; width: 100%; max-width: 34rem; height: auto; margin: .5rem auto; }
table { border-collapse: collapse; width: 100%; font-size: .94rem; }
th, td { text-align: left; padding: .35rem .3rem; border-bottom: 1px solid #ddd;
         vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; }
blockquote { margin: .5rem 0; padding: .2rem 1rem; border-left: 4px solid #2e8b57;
             background: #f4f8f5; overflow-wrap: anywhere; }
.sides { display: grid; grid-template-columns: repeat(3, 1fr); gap: 0 1rem; font-size: .94rem; }
.sides p { margin: .2rem 0 .8rem; overflow-wrap: anywhere; } .own { color: #b0521a; }
@media (max-width: 36rem) { .sides { grid-template-columns: 1fr; } }
.small { font-size: .88rem; color: #555; }
"""


def picture(path, alt):
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def table(head, rows):
    """The first column is text, the others are numbers."""
    cells = lambda tag, row: "".join(
        f"<{tag}{' class=n' if i else ''}>{html.escape(str(cell))}</{tag}>"
        for i, cell in enumerate(row)
    )
    lines = [f"<tr>{cells('th', head)}</tr>"] + [f"<tr>{cells('td', row)}</tr>" for row in rows]
    return "<table>" + "\n".join(lines) + "</table>"


def percent(share):
    return f"{100 * share:.1f} %"


def size(n_bytes):
    for unit, one in (("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= one:
            return f"{n_bytes / one:.3g} {unit}"
    return f"{n_bytes} bytes"


def processor():
    try:
        for line in open("/proc/cpuinfo", encoding="utf-8"):
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def results_section(summary, pictures):
    s = summary
    rows = [
        ("softmax attention (untouched)", f"{s['ppl_softmax']:.2f}", ""),
        ("swapped, not yet trained", f"{s['ppl_swapped']:.2f}", "0 %"),
        ("pure retrofit", f"{s['ppl_pure']:.2f}", percent(s["closed_pure"])),
        ("hybrid retrofit", f"{s['ppl_hybrid']:.2f}", percent(s["closed_hybrid"])),
    ]
    return f"""
<h2>How good is it?</h2>
<p>Perplexity says between how many next tokens (pieces of words) the model hesitates: lower is
better. All numbers are from the same held-out chapters, which no model here was trained on.</p>
{table(("model", "perplexity", "gap closed"), rows)}
<p class="small">Gap closed: how much of the damage done by the swap the training undid, measured in
log-perplexity; the hybrid is measured against the gap of the pure swap, as the pure model is. Right
after its own swap, before any training, the hybrid stands at {s['ppl_swapped_hybrid']:.2f}.</p>
{picture(pictures["perplexity"], "Bars: perplexity of every model")}
<p>The recurrent bars are the exported models, fed one token at a time. They must stand where the
retrofitted ones do: it is the same model, computed another way.</p>
<h2>Training</h2>
{picture(pictures["loss"], "Curves: training loss of the two retrofits")}
<p>Loss of the two retrofits on the training text. Pale: each step. Strong: a running mean. The
dashed line is where the untouched model stands on a part of the same text: the curves should come
down to it. More of each run: <a href="pure/training.html">pure</a>,
<a href="hybrid/training.html">hybrid</a>.</p>"""


def memory_section(out, summary):
    s = summary
    ratio = s["kv_bytes"] / s["state_bytes"]
    quotes = ""
    for name in ("pure", "hybrid"):
        generated = read_json(out / f"generate_{name}.json")
        prompt = (out / "prompt.txt").read_text(encoding="utf-8")
        quotes += (
            f"<p>{name.capitalize()}:</p><blockquote><b>{html.escape(prompt)}</b>"
            f"{html.escape(generated['texts'][0])}</blockquote>"
        )
    return f"""
<h2>What it needs to remember</h2>
<p>While it writes, the pure model keeps <b>{size(s['state_bytes'])}</b> a sequence and the hybrid
{size(s['state_bytes_hybrid'])}, however long the sequence grows. A softmax model keeps the keys and
values of every token: {size(s['kv_bytes'])} for {s['kv_tokens']} tokens, {ratio:.1f} times what the
pure model keeps, and growing with each token.</p>
<h2>What it writes</h2>
<p>The recurrent models go on from the prompt in bold. They are very small: expect the sound of the
text they learned, not sense.</p>
{quotes}
{sides(read_json(out / "validate-hybrid" / "validate.json"))}"""


def sides(validation):
    """What the untouched model and the hybrid make of the same prompts."""
    texts = validation["texts"]
    rows = ""
    for text in texts:
        prompt, original = html.escape(text["prompt"]), html.escape(text["original"])
        theirs, ours = text["teacher"], text["student"]
        same = os.path.commonprefix([theirs, ours])
        rows += (
            f"<p>… <b>{prompt}</b> …</p><div class=sides>"
            f"<div><span class=small>softmax, untouched</span><p>{html.escape(theirs)}</p></div>"
            f"<div><span class=small>hybrid</span><p>{html.escape(same)}"
            f"<span class=own>{html.escape(ours[len(same):])}</span></p></div>"
            f"<div><span class=small>the text itself</span><p>{original}</p></div></div>"
        )
    return f"""
<h2>Beside the model that it was</h2>
<p>The untouched model and the hybrid go on from the same words of a held-out chapter, with the same
random numbers: where their predictions agree they write the same. In colour: from where the hybrid
goes its own way. Its predictions are {validation["kl"]:.2g} nats from the untouched model's, and
should read no worse.</p>
{rows}
<p class="small">By position, draw and head:
<a href="validate-hybrid/validate.html">the hybrid beside the untouched model</a>.</p>"""


def error_section(pictures, validation):
    m = validation["m"]
    return f"""
<h2>How close is the approximation?</h2>
{picture(pictures["kernel_error"], "Error of the kernel estimate against the number of features")}
<p>Random features estimate the weight that softmax gives to a pair of tokens (here for pairs with
|q + k|²/√d = 1). The error falls as there are more features, and faster the better the features are
spread: simplex features are spread best. The dots should lie on the lines.</p>
{picture(pictures["error_of_m"], "Error of the attention output against the number of features")}
<p>The same for what comes out of attention, on the model's own queries, keys and values, before any
training. It should fall; where a head is too hard for the features it hardly does.</p>
{picture(pictures["output_error"], "Heat map: attention output error by layer and head")}
<p>How far each head's output is from softmax attention's with {m} features (0 = the same). Pale
heads hardly notice the swap; dark ones are what the retrofit has to mend.</p>
{picture(pictures["difficulty"], "Heat map: size of q + k by layer and head")}
<p>Why some heads are harder: the larger the queries and keys, |q + k|²/√d, the noisier the
estimate, exponentially so.</p>
<p class="small">All of it, right after the swap and before any training:
<a href="validate/validate.html">predictions, texts, every head, the kernel</a>.</p>"""


def write_page(out, summary, pictures, validation):
    steps = [line.split("\t") for line in (out / "timings.tsv").read_text().splitlines()]
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>From softmax to a fixed-size state</title><style>{STYLE}</style></head><body>
<h1>From softmax attention to a fixed-size state</h1>
<p>A small GPT-2 was trained with softmax attention. This run took its attention out, put simplex
random features in, and trained it a little more, so that it can write with a memory that never
grows. <b>Pure</b> has random features only; <b>hybrid</b> also looks exactly at the latest
tokens.</p>
{results_section(summary, pictures)}
{memory_section(out, summary)}
{error_section(pictures, validation)}
<h2>How long it took</h2>
{table(("step", "seconds"), steps)}
<p class="small">{summary['seconds']:.0f} seconds in all, on {os.cpu_count()} cores of
{html.escape(processor())}.</p>
</body></html>
"""
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def in_short(s):
    """What was seen, for the terminal."""
    cache = f"KV cache {size(s['kv_bytes'])} at {s['kv_tokens']} tokens, growing with each"
    rows = [("softmax attention, untouched", s["ppl_softmax"], cache)]
    rows.append(("swapped to random features, not yet trained", s["ppl_swapped"], ""))
    for name, suffix in ("pure", ""), ("hybrid", "_hybrid"):
        rows.append((f"{name}, retrofitted", s[f"ppl_{name}"],
                     f"{100 * s['closed_' + name]:.1f} % of the gap closed, "
                     f"state {size(s['state_bytes' + suffix])} at any length"))
    return [f"{name:<44} perplexity {ppl:6.2f}  {rest}".rstrip() for name, ppl, rest in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=pathlib.Path)
    parser.add_argument("--perplexity", action="store_true", help="print the ppl of an eval JSON")
    parser.add_argument("--seconds", type=float, default=0.0, help="length of the whole run")
    args = parser.parse_args()
    if args.perplexity:
        print(f"{read_json(args.path)['ppl']:.4f}")
        return

    out = args.path
    summary = summarize(out, args.seconds)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    validation = read_json(out / "validate" / "validate.json")
    pictures = {
        "loss": draw_loss(out),
        "perplexity": draw_perplexities(out, summary),
        "kernel_error": draw_kernel_error(out, validation, v2=1),
        "error_of_m": draw_error_of_m(out, validation),
        "output_error": draw_heat_map(
            out, "output_error", validation["output_error"], "relative error", "{:.2f}"
        ),
        "difficulty": draw_heat_map(
            out, "difficulty", validation["v2"], "|q + k|²/√d", "{:.1f}"
        ),
    }
    page = write_page(out, summary, pictures, validation)
    for line in in_short(summary):
        print(f"    {line}")
    print(f"\n    {out / 'summary.json'}\n    {page}: open it in a browser\n")
    if broken_promises(summary):
        sys.exit(1)


if __name__ == "__main__":
    main()
