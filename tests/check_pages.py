"""That reports show the numbers they are made of: check_pages.py FOLDER (of a run of training), or
FOLDER PRINTED (of srf validate, and what it printed). Curves are read back from their pixels by
the labels of the axes."""
import json
import math
import os
import re
import sys


def near(found, expected, what, relative=1e-3, absolute=0.0):
    ok = abs(found - expected) <= relative * abs(expected) + absolute
    if not ok:
        sys.exit(f"{what}: {found}, expected {expected}")


def texts(svg, anchor):
    pattern = r"<text x='([\d.-]+)' y='([\d.-]+)' text-anchor='%s'(?: class='\w+')?>([^<]*)<"
    return [(float(x), float(y), t) for x, y, t in re.findall(pattern % anchor, svg)]


def axis(labels, log):
    """Pixels to values, by the outermost labels; the ones between must lie on that line, too."""
    value = (lambda v: math.log(v)) if log else (lambda v: v)
    labels = sorted((at, value(float(t))) for at, t in labels)
    (a, u), (b, v) = labels[0], labels[-1]
    scale = (v - u) / (b - a)
    for at, t in labels:
        near(u + (at - a) * scale, t, "a label between", 0, 0.2 * abs(scale))
    back = (lambda at: math.exp(u + (at - a) * scale)) if log else (lambda at: u + (at - a) * scale)
    return back, 0.2 * abs(scale)


def charts(page):
    pattern = r"<svg width='\d+' height='(\d+)' [^>]*role='img'>(.*?)</svg>"
    return re.findall(pattern, page, re.S)


def check_curve(svg, height, look, log, x, y, what):
    down, slack = axis([(at - 4, t) for _, at, t in texts(svg, "end")], log)
    below = [(at, t) for at, low, t in texts(svg, "middle") if low == float(height) - 28]
    along, _ = axis(below, False)
    if float(height) - 46 < max(at - 4 for _, at, _ in texts(svg, "end")) - 0.2:
        sys.exit(f"{what}: a label below the axis")
    path = re.search(r"<path class='%s' d='([^']*)'" % look, svg)
    if not path:
        sys.exit(f"{what}: no curve {look}")
    points = re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path.group(1))
    near(len(points), len(x), what + ", points", 0)
    for (px, py), u, v in zip(points, x, y):
        near(along(float(px)), u, what + ", x", 0.01, 0.1)
        near(down(float(py)), v, what + ", y", slack if log else 0, slack)


def of_training(folder):
    page = open(f"{folder}/training.html", encoding="utf-8").read()
    log = [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]
    found = charts(page)
    near(len(found), 4, "charts", 0)
    keys = ["loss", "kl", "grad_norm", "lr"]
    for (height, svg), key, is_log in zip(found, keys, [False, True, True, False]):
        rows = [r for r in log if r.get(key) is not None]
        x, y = [r["step"] for r in rows], [r[key] for r in rows]
        smooth = key in ("loss", "kl")
        check_curve(svg, height, "l2 faint" if smooth else "l2", is_log, x, y, key)
        if smooth:
            width = 5  # of 11 to 125 lines
            means = [sum(y[max(0, i - width + 1):i + 1]) / min(i + 1, width) for i in range(len(y))]
            check_curve(svg, height, "l2", is_log, x, means, f"mean of {key}")
            if f"mean of {width} lines" not in page or f"At the end: {means[-1]:.4g}." not in page:
                sys.exit(f"{key}: no mean of the last {width}, {means[-1]:.4g}")
    last = [r for r in log if "val_ppl" in r]
    ppl, teacher = last[-1]["val_ppl"], last[-1]["teacher_val_ppl"]
    for text in (f"On the validation text: {math.log(ppl):.4g}, a perplexity of {ppl:.4g}.",
                 f"The teacher there: {math.log(teacher):.4g}, a perplexity of {teacher:.4g}.",
                 f": {log[-1]['step']} steps</p>"):
        if text not in page:
            sys.exit(f"training.html lacks {text}")
    marks = re.findall(r"<title>validation: ([\d.e+-]+) at (\d+)", page)
    expected = [(f"{math.log(r['val_ppl']):.4g}", str(r["step"])) for r in last]
    if marks != expected:
        sys.exit(f"validation: {marks}, expected {expected}")


def of_validation(folder, printed):
    page = open(f"{folder}/validate.html", encoding="utf-8").read()
    r = json.load(open(f"{folder}/validate.json", encoding="utf-8"))
    heads = sorted(v for row in r["output_error"] for v in row)
    n = len(heads)
    near(n, r["layers"] * r["heads"], "heads", 0)
    near(r["output_error_mean"], sum(heads) / n, "mean of heads", 1e-6)
    near(r["output_error_median"], (heads[(n - 1) // 2] + heads[n // 2]) / 2, "median", 1e-6)
    near(r["output_error_worst"], heads[-1], "the worst head", 1e-6)
    main = [e for e in r["output_error_by_m"] if e["m"] == r["m"]]
    if main[0]["heads"] != r["output_error"] or main[0]["worst"] != r["output_error_worst"]:
        sys.exit("the errors of m are not those by m")
    places = r["positions"]
    tokens = sum(p["n"] for p in places)
    for key, of in (("ppl", "ppl"), ("ppl_softmax", "ppl_softmax")):
        mean = sum(p["n"] * math.log(p[of]) for p in places) / tokens
        near(math.log(r[key]), mean, key, 1e-6)
    near(r["kl"], sum(p["n"] * p["kl"] for p in places) / tokens, "kl", 1e-6)
    if [p["tokens_before"] for p in places] != [1 << i for i in range(len(places))]:
        sys.exit("positions do not double")
    draws = r["by_draw"]["ppl"]
    mean = sum(draws) / len(draws)
    near(r["by_draw"]["mean"], mean, "mean of draws", 1e-6)
    sd = math.sqrt(sum((p - mean) ** 2 for p in draws) / (len(draws) - 1))
    near(r["by_draw"]["sd"], sd, "their deviation", 1e-4, 1e-8 * mean)
    near(len(draws), r["draws"], "draws", 0)
    near(r["by_draw"]["first"], 0, "the first draw", 0)
    edges = r["v2_histogram"]["edges"]
    for layer, medians in zip(r["v2_histogram"]["heads"], r["v2_quantiles"]["q50"]):
        for head, median in zip(layer, medians):
            near(sum(head), 1, "a histogram", 1e-6)
            below = [sum(head[:i]) for i in range(len(edges))]
            inside = [i for i in range(len(head)) if edges[i] <= median <= edges[i + 1]]
            if not below[inside[0]] - 0.1 <= 0.5 <= below[inside[-1] + 1] + 0.1:
                sys.exit(f"a median of {median} by a histogram of {head}")
    limit, past = math.log1p(r["m"]), [p for row in r["v2_past_limit"] for p in row]
    heads = [head for layer in r["v2_histogram"]["heads"] for head in layer]
    for part, head in zip(past, heads):  # the limit lies inside a bin
        most = sum(p for p, end in zip(head, edges[1:]) if end > limit)
        least = sum(p for p, start in zip(head, edges) if start >= limit)
        if not least - 1e-6 <= part <= most + 1e-6:
            sys.exit(f"{part} of the pairs past {limit} by a histogram of {head}")
    if f"Here {100 * sum(past) / len(past):.3g}&nbsp;% of all pairs lie right of it" not in page:
        sys.exit(f"the page has another part of the pairs past the limit than {past}")
    for key in ("output_error_by_features", "weights_kl_by_features"):
        tried = r[key]
        short = any(len(v) != len(tried["m"]) for v in tried.values())
        if short or tried["iid"] == tried["simplex"]:
            sys.exit(f"{key}: {tried}")
    pattern = r"output error, m = (\d+) .* worst ([\d.]+) \(layer (\d+) head (\d+)\)"
    for line in open(printed, encoding="utf-8"):
        found = re.match(pattern, line)
        if not found:
            continue
        errors = [e["heads"] for e in r["output_error_by_m"] if e["m"] == int(found[1])][0]
        near(float(found[2]), errors[int(found[3])][int(found[4])], "worst, printed", 0, 6e-4)
    for swap in r["swaps"]:  # fp32: S, z and M of the features; keys and values of two windows
        count = swap["m"] * (r["head_size"] + 2) + 4 * swap["window"] * r["head_size"]
        near(swap["state_bytes"], 4 * count * r["layers"] * r["heads"], "state", 0)
    parts = [s["kl_se"] / s["kl"] for s in r["swaps"] if s["kl"] > 1e-6]  # the rest is rounding
    errors = f"Two standard errors of the text are {200 * max(parts, default=0):.0f} %"
    if (errors.split(" are")[0] in page) != bool(parts) or (parts and errors not in page):
        sys.exit(f"validate.html, the swaps: {errors}, of {len(parts)} cells")
    ratio = 100 * (r["ppl"] / r["ppl_softmax"] - 1)
    for text in (f"<b>{r['ppl']:.4g}</b>", f"<b>{r['ppl_softmax']:.4g}</b>", f": {ratio:+.2g} ±",
                 f"KL divergence of {r['kl']:.3g} ±", f"{len(draws)} draws of the features",
                 f"is {mean:.4g} on average"):
        if text not in page:
            sys.exit(f"validate.html lacks {text}")


if __name__ == "__main__":
    if os.path.exists(sys.argv[1] + "/metrics.jsonl"):
        of_training(sys.argv[1])
    else:
        of_validation(sys.argv[1], sys.argv[2])
