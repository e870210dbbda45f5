"""What was measured, as a page with tables and plots."""

import itertools
import statistics

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "peers"
import matplotlib.pyplot as plt

HEAD = """# Beside its peers

Written by `scripts/bench/peers`, which installs the peers, runs all of them in turns and draws this. {cpu}, {cores} cores ({units}), {day};
the full model of the default pair, SmolLM2-135M-Instruct; medians of the rounds, with the least and the greatest where there are several.
"""


def median(rows, of):
    """`median (least to greatest)`."""
    values = sorted(of(row) for row in rows)
    middle = statistics.median(values)
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    return f"{middle:,.{digits}f}" if len(values) == 1 else f"{middle:,.{digits}f} ({values[0]:,.{digits}f} to {values[-1]:,.{digits}f})"


def table(columns, rows):
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    yield from ("| " + " | ".join(row) + " |" for row in rows)


def rounds(rows):
    number = len({row["round"] for row in rows})
    return f"{number} rounds" if number > 1 else "one round"


def engines(rows):
    yield f"## Engines\n\nTokens per second on the same GGUF files; decode from 64 tokens of context, 64 tokens. The ratio is to the best of the others; {rounds(rows)}.\n"
    yield from of_vectors([row for row in rows if row["vectors"] == "all"])
    yield "\nKept to AVX2 (`overfill bench engine --vectors avx2`; llama.cpp built for no more):\n"
    yield from of_vectors([row for row in rows if row["vectors"] == "avx2"])


def of_vectors(rows):
    names = list(dict.fromkeys(row["engine"] for row in rows))
    kinds = sorted({(row["file"], row["phase"] == "decode", row["batch"], row["threads"]) for row in rows})
    shown = []
    for file, decode, batch, threads in kinds:
        of = [[r for r in rows if (r["engine"], r["file"], r["phase"] == "decode", r["batch"], r["threads"]) == (name, file, decode, batch, threads)] for name in names]
        if not of[0]:
            continue
        best = max((statistics.median(r["rate"] for r in peer) for peer in of[1:] if peer), default=None)
        ratio = f"{statistics.median(r['rate'] for r in of[0]) / best:.2f}" if best else ""
        what = f"decode, batch {batch}" if decode else "prefill of 512"
        shown.append([file.upper(), what, str(threads), *(median(peer, lambda r: r["rate"]) if peer else "" for peer in of), ratio])
    yield from table(["file", "what", "threads", *names, "ratio"], shown)


def servers(rows):
    names = list(dict.fromkeys(row["server"] for row in rows))
    closed = [row for row in rows if "at_once" in row]
    yield f"## Servers\n\nPrompts of 256 random tokens, answers of 64, the same client (`overfill bench serve`); {rounds(closed)}.\n"
    shown = []
    for at_once, name in itertools.product(sorted({row["at_once"] for row in closed}), names):
        of = [row for row in closed if (row["at_once"], row["server"]) == (at_once, name)]
        if of:
            keys = ("request_throughput", "mean_ttft_ms", "mean_tpot_ms")
            shown.append([str(at_once), name, *(median(of, lambda row, key=key: row[key]) for key in keys)])
    yield from table(["at once", "server", "requests/s", "mean TTFT, ms", "mean TPOT, ms"], shown)
    rated = [row for row in rows if "rate" in row]
    if not rated:
        return
    yield "\nRequests that arrive by themselves, each rate once; goodput is of requests within both bounds.\n"
    bounds = list(rated[0]["goodput"])
    shown = [
        [f"{row['rate']:g}", row["server"], f"{row['mean_ttft_ms']:,.0f}", f"{row['mean_tpot_ms']:,.1f}", *(f"{row['goodput'][bound]:.2f}" for bound in bounds)]
        for row in sorted(rated, key=lambda row: (row["rate"], names.index(row["server"])))
    ]
    yield from table(["requests/s", "server", "mean TTFT, ms", "mean TPOT, ms", *(f"goodput: {bound}" for bound in bounds)], shown)
    yield "\n![Latency and goodput over request rates](peers.svg)"


def plot(rows, target):
    rated = [row for row in rows if "rate" in row]
    names = list(dict.fromkeys(row["server"] for row in rated))
    bounds = list(rated[0]["goodput"])
    figure, panels = plt.subplots(2, 2, figsize=(10, 7))
    latencies = [("mean TTFT, ms", lambda row: row["mean_ttft_ms"]), ("mean TPOT, ms", lambda row: row["mean_tpot_ms"])]
    goods = [(f"requests/s within {bound}", lambda row, bound=bound: row["goodput"][bound]) for bound in bounds]
    for axes, (label, of) in zip(panels.flat, latencies + goods):
        for name in names:
            its = sorted((row for row in rated if row["server"] == name), key=lambda row: row["rate"])
            axes.plot([row["rate"] for row in its], [of(row) for row in its], marker="o", ms=3, label=name)
        axes.set_ylabel(label)
        axes.set_xlabel("requests that arrive a second")
        axes.grid(True, lw=0.3)
        if label.startswith("mean TTFT"):
            axes.set_yscale("log")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


def write(measured, folder):
    machine = measured["machine"]
    page = [HEAD.format(**{**machine, "units": ", ".join(machine["units"])})]
    if "engines" in measured:
        page += [*engines(measured["engines"]), ""]
    if "servers" in measured:
        page += [*servers(measured["servers"]), ""]
        if any("rate" in row for row in measured["servers"]):
            plot(measured["servers"], folder / "peers.svg")
    (folder / "peers.md").write_text("\n".join(page))
    print("\n".join(page))
