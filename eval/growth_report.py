"""The growth benchmark as Markdown tables and as a log-log plot."""

import io
from typing import Any

from attn_jax import MECHANISMS
from eval.measure import PASSES, conditions, exponent, number, table

Result = dict[str, Any]

# Okabe & Ito's colours for all kinds of colour vision, without the yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X<>hpd8"


def markdown(result: Result) -> str:
    """The tables: growth, measurements, errors of approximation."""
    sections = [conditions(result), _growth(result), _measurements(result)]
    if result["approximation"]:
        sections.append(_approximation(result))
    return "\n\n".join(["# Benchmark", *sections, "![log-log plot](growth.svg)"]) + "\n"


def cell(record: Result) -> str:
    """A measurement, or why there is none."""
    if record["status"] != "ok":
        return record["status"]
    wall, cpu, memory = number(1e3 * record["wall"]), number(1e3 * record["cpu"]), record["temp_bytes"] / 2**20
    return f"{wall} ms ({cpu}), {number(memory)} MiB"


def curve(result: Result, mechanism: str, pass_name: str, quantity: str) -> dict[int, float]:
    """The measured `quantity` of a mechanism by length."""
    return {
        r["length"]: r[quantity]
        for r in result["growth"]
        if (r["mechanism"], r["pass"], r["status"]) == (mechanism, pass_name, "ok")
    }


def _quantities(result: Result) -> tuple[tuple[str, str], tuple[str, str]]:
    # Processor time, where a processor does the work: it does not count what others do on the machine.
    return ("time", "cpu" if result["platform"] == "cpu" else "wall"), ("memory", "temp_bytes")


def _growth(result: Result) -> str:
    rows = []
    for name, checked in result["checks"].items():
        row = {"mechanism": name}
        for title, quantity in _quantities(result):
            row[f"{title}: claim"] = getattr(MECHANISMS[name], title)
            for pass_name in PASSES:
                points = curve(result, name, pass_name, quantity)
                fits = [exponent(points), exponent(dict(sorted(points.items())[-2:]))]
                row[f"{title}: {pass_name}"] = "" if fits[0] is None else "{:.2f} ({:.2f})".format(*fits)
        error = checked["difference"]
        rows.append(row | {"check": checked["status"] + ("" if error is None else f", {error:.0e}")})
    return (
        "Growth: p in value ~ length^p over all lengths (between the two longest). Check: difference of values\n"
        f"and gradients from the dense version in float64, root mean squares, of the worst array.\n\n{table(rows)}"
    )


def _measurements(result: Result) -> str:
    rows: dict[tuple[str, int], dict[str, str]] = {}
    for r in result["growth"]:
        row = rows.setdefault(
            (r["mechanism"], r["length"]), {"mechanism": r["mechanism"], "length": f"{r['length']:,}"}
        )
        row[r["pass"]] = cell(r)
    return (
        "Wall time of a call (processor time of all its threads), and temporary memory at its peak.\n\n"
        + table(list(rows.values()))
    )


def _approximation(result: Result) -> str:
    rows: dict[tuple[str, int], dict[str, str]] = {}
    for r in result["approximation"]:
        row = rows.setdefault(
            (r["mechanism"], r["length"]), {"mechanism": r["mechanism"], "length": f"{r['length']:,}"}
        )
        row[f"q, k ~ N(0, {r['scale']:g}²)"] = number(r["relative_rms_error"])
    return (
        "Relative RMS error against exact standard attention, for independent values ~ N(0, 1), the hardest:\n"
        f"the exact result is itself small, an average of noise.\n\n{table(list(rows.values()))}"
    )


def plot(result: Result, suffix: str) -> bytes:
    """Time and memory against length for both passes; the legend has the fitted exponents beside the claims."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(15, 9), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for (left, right), (title, quantity) in zip(panels, _quantities(result)):
        unit, size = ("ms", 1e-3) if title == "time" else ("MiB", 2**20)
        for axes, pass_name in ((left, PASSES[0]), (right, PASSES[1])):
            for n, name in enumerate(result["checks"]):
                points = {x: y / size for x, y in curve(result, name, pass_name, quantity).items() if y > 0}
                fit, claim = exponent(points), getattr(MECHANISMS[name], title)
                label = f"{name}  {'' if fit is None else f'{fit:.2f}'} ({claim})"
                style = ("-", "--")[n // len(COLOURS) % 2] + MARKERS[n % len(MARKERS)]
                if points:
                    axes.plot(*zip(*points.items()), style, color=COLOURS[n % len(COLOURS)], ms=5, label=label)
            axes.set_title(f"{title}, {pass_name} ({unit})", loc="left", fontsize=11)
            axes.grid(alpha=0.3, lw=0.5)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelleft=True, labelbottom=True, labelsize=9)
            slowest_first = sorted(axes.lines, key=lambda line: -line.get_ydata()[-1])
            axes.legend(
                handles=slowest_first,
                title="fitted exponent (claim)",
                loc="center left",
                bbox_to_anchor=(1.02, 0.5),
                frameon=False,
                fontsize=9,
                alignment="left",
            )
        left.set(xscale="log", yscale="log")
        left.xaxis.set(major_locator=FixedLocator(result["flags"]["lengths"]), minor_locator=NullLocator())
        left.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
        for axis in (left.xaxis, left.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    for axes in panels[1]:
        axes.set_xlabel("length (tokens)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, dpi=120)
    return buffer.getvalue()
