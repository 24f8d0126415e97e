"""The figures of a comparison, each an SVG element for an HTML page: real text, nothing that is elsewhere.

Each is about as wide as a telephone, so that text has the size of a caption wherever it is shown.
"""

import io
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from eval.compare.comparison import Section, Setting
from eval.compare.maps import Map
from eval.growth_report import COLOURS, MARKERS
from eval.measure import number

WIDTH = 3.5  # inches
_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "attn_jax",  # equal figures get equal names
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}
_DASHES = ("-", "--", ":", "-.")
_LABEL_WIDTH = 24  # characters of a line of a label
_RADAR_TITLE = 22


def key(section: Section) -> str:
    """What the line of each setting looks like in the curves."""
    from matplotlib.lines import Line2D

    labels = [_wrapped(setting.label, 44) for setting in section.settings]
    lines = sum(label.count("\n") + 1 for label in labels)

    def draw(figure: Any) -> None:
        handles = [Line2D([], [], **_style(n), label=label) for n, label in enumerate(labels)]
        figure.legend(handles=handles, loc="upper left", borderaxespad=0.2, handlelength=4)

    return _svg(draw, height=0.18 * lines + 0.15)


def curve(section: Section, split: str, metric: str) -> str | None:
    """A metric against the step, the mean over seeds; None where no run recorded it twice."""
    curves = [setting.curve(split, metric) for setting in section.settings]
    if max(map(len, curves)) < 2:
        return None
    title = f"{'training' if split == 'train' else 'validation'} {metric}"

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for n, points in enumerate(curves):
            if points:
                axes.plot(*zip(*points), **_style(n), markevery=max(1, len(points) // 6), lw=1.3)
        axes.set(title=title, xlabel="step")
        axes.ticklabel_format(axis="x", style="plain")
        axes.locator_params(axis="x", nbins=5, integer=True)

    return _svg(draw, height=2.3)


def bars(title: str, values: Mapping[str, float], others: Mapping[str, float], errors: Mapping[str, Any]) -> str:
    """Horizontal bars of `values` by label, those of `others` hatched; `errors` are `(low, high)` by label."""
    labels = [_wrapped(label).split("\n") for label in (*values, *others)]
    lengths = [*values.values(), *others.values()]
    ends = [max(length, *errors.get(label, (0,))) for label, length in zip((*values, *others), lengths)]
    room = max(*ends, 1e-300)
    sizes = np.array([len(lines) + 1 for lines in labels])  # in lines of text
    places = np.cumsum(sizes) - sizes / 2

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.set(title=title, xlim=(0, 1.22 * room), ylim=(sizes.sum(), 0), yticks=[])
        axes.locator_params(axis="x", nbins=4)
        for n, place in enumerate(places):
            look = {"color": COLOURS[0]} if n < len(values) else {"color": "#ffffff", "hatch": "////"}
            axes.barh(place, lengths[n], 1.2, edgecolor="#333333", lw=0.6, **look)
            axes.text(ends[n] + 0.02 * room, place, number(lengths[n]), va="center", fontsize=7)
            for line, text in enumerate(labels[n]):  # one by one: a browser's font aligns them in its own way
                at = place + line - (len(labels[n]) - 1) / 2
                where = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
                axes.annotate(text, (0, at), xytext=(-4, 0), ha="right", va="center", **where)
        for place, label in zip(places, values):
            if label in errors:
                axes.plot(errors[label], [place, place], "|-", color="#000000", ms=5, lw=1)

    return _svg(draw, height=0.5 + 0.14 * sizes.sum())


def radar(
    title: str, axes_of: Mapping[str, float], reference: Mapping[str, float] | None, title_lines: int = 1
) -> str:
    """Values from 0 to 1 around a circle, those of `reference` dashed, below room for `title_lines` of title."""
    names = list(axes_of)
    angles = np.linspace(0, 2 * math.pi, len(names), endpoint=False)

    def closed(values: Mapping[str, float]) -> tuple[list[float], list[float]]:
        points = [values[name] for name in names]
        return [*angles, angles[0]], [*points, points[0]]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot(projection="polar")
        if reference is not None:
            axes.plot(*closed(reference), "--", color="#666666", lw=1)
        axes.plot(*closed(axes_of), "o-", color=COLOURS[0], ms=3, lw=1.5)
        axes.fill(*closed(axes_of), color=COLOURS[0], alpha=0.15)
        axes.set(ylim=(0, 1), yticks=[0.25, 0.5, 0.75, 1], yticklabels=[], xticks=angles, xticklabels=[])
        axes.set_theta_zero_location("N")
        for place, (angle, name) in enumerate(zip(angles, names)):
            axes.text(angle, 1.14, name, rotation=90 * (place % 2), ha="center", va="center", fontsize=7)
        axes.set_title(lines, loc="center", fontsize=8, pad=15)

    lines = _wrapped(title, _RADAR_TITLE)
    lines = "\n" * (title_lines - 1 - lines.count("\n")) + lines
    return _svg(draw, width=1.75, height=2.0 + 0.13 * lines.count("\n"))


def radar_title_lines(title: str) -> int:
    """The lines that `title` takes above a radar chart."""
    return 1 + _wrapped(title, _RADAR_TITLE).count("\n")


def attention(label: str, shown: Map) -> str:
    """Weights as shades, from white for 0 to the darkest for the largest."""
    queries, keys = ([_clipped(name) for name in names] for names in (shown.queries, shown.keys))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        high = max(float(shown.weights.max(initial=0)), 1e-9)
        image = axes.imshow(shown.weights, cmap="Blues", vmin=0, vmax=high, interpolation="nearest")
        upright = {"rotation": 90, "rotation_mode": "anchor", "ha": "right", "va": "center"}
        axes.set_xticks(range(len(keys)), keys, fontsize=6.5, **upright)
        axes.set_yticks(range(len(queries)), queries, fontsize=6.5)
        axes.set(title=f"{_wrapped(label, 40)}\n{shown.module}", xlabel="key", ylabel="query")
        axes.title.set_fontsize(8)
        axes.grid(False)
        axes.tick_params(length=0, pad=2)
        bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=30, pad=0.02, ticks=[0, high])
        bar.ax.set_yticklabels(["0", number(high)], fontsize=6.5)
        bar.outline.set_visible(False)

    tall = 0.13 * _wrapped(label, 40).count("\n")
    return _svg(draw, height=tall + 1.2 + 2.4 * len(queries) / max(len(keys), 1))


def scores(section: Section) -> dict[str, dict[str, float]]:
    """By label the four axes of the radar chart, each from 0 to 1 = the best setting of the section."""

    def relative(value: Callable[[Setting], float], better: str) -> list[float]:
        values = [value(setting) for setting in section.settings]
        best = max(values) if better == "higher" else min(values)
        ratios = [(v, best) if better == "higher" else (best, v) for v in values]
        return [float(np.clip(a / b, 0, 1)) if b else 1.0 for a, b in ratios]

    columns = {
        section.primary: relative(lambda s: s.primary.mean, section.better),
        "speed": relative(lambda s: s.seconds_per_step, "lower"),
        "memory": relative(lambda s: s.peak_memory, "lower"),
        "convergence": relative(lambda s: s.epochs_to_90, "lower"),
    }
    rows = zip(*columns.values())
    return {setting.label: dict(zip(columns, row)) for setting, row in zip(section.settings, rows)}


def _style(n: int) -> dict[str, Any]:
    return {
        "color": COLOURS[n % len(COLOURS)],
        "linestyle": _DASHES[(n + n // len(MARKERS)) % len(_DASHES)],  # else like that of n - len(MARKERS)
        "marker": MARKERS[n % len(MARKERS)],
        "markersize": 4,
    }


def _wrapped(label: str, width: int = _LABEL_WIDTH) -> str:
    """`label` in lines that end at a space or an underscore."""
    lines = [""]
    for part in re.findall(r"[^ _]+[ _]?|[ _]", label):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def _clipped(name: str) -> str:
    return name if len(name) <= 8 else f"{name[:7]}…"


def _svg(draw: Callable[[Any], None], *, height: float, width: float = WIDTH) -> str:
    """What `draw` puts on a figure of inches, as an element that stands in an HTML page."""
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        figure.savefig(
            buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return _for_page(buffer.getvalue(), width)


def _for_page(svg: str, width: float) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows them
    head, rest = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None
    rest = re.sub(r"font-family: [^;]*, sans-serif", "font-family: sans-serif", rest)
    return f'<svg {view[0]} style="width: {width * 96:.0f}px" role="img">{rest}'.strip()


def numbered(svg: str, number: int) -> str:
    """`svg` with names of its own, so that several may stand in one page."""
    svg = re.sub(r'\bid="', f'id="f{number}-', svg)
    svg = svg.replace("url(#", f"url(#f{number}-")
    return svg.replace('href="#', f'href="#f{number}-')
