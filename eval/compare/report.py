"""A comparison as the blocks of a report."""

import math
from collections.abc import Iterator, Sequence

from eval.compare import figures, published
from eval.compare.comparison import BASELINE, Comparison, Estimate, Section, Setting
from eval.compare.document import Block, Figure, Figures, Heading, Items, Table, Text
from eval.compare.maps import WINDOW, Maps
from eval.experiments.statistics import Interval
from eval.measure import number

TITLE = "Comparison of runs"


def blocks(comparison: Comparison, maps: Sequence[Maps] | None) -> Iterator[Block]:
    """The report; `maps` are those of each section, None where none were asked for."""
    yield Text(_READING)
    for place, section in enumerate(comparison.sections):
        yield from _section(section, None if maps is None else maps[place])
    yield from _left_out(comparison)


def summary(comparison: Comparison) -> Iterator[Block]:
    """The tables alone."""
    for section in comparison.sections:
        yield Heading(2, section.title)
        yield from tables(section)
    yield from _left_out(comparison)


def _left_out(comparison: Comparison) -> Iterator[Block]:
    if comparison.left_out:
        yield Heading(2, "Left out")
        yield Items(comparison.left_out)


_READING = """\
Each row of a table is a setting, its seeds together. A value is the mean over seeds ± the standard deviation, of \
the best validation's checkpoint on the test split; an interval in brackets is the 95 % bootstrap interval over \
seeds and test examples. The improvement is relative to `standard`, on the same seeds and examples (paired), and \
positive where the setting is better."""


def tables(section: Section) -> Iterator[Block]:
    """What a section found, without figures."""
    rows = list(_results(section))
    filled = {name for row in rows for name, cell in row.items() if cell}
    yield Table([{name: cell for name, cell in row.items() if name in filled} for row in rows])
    yield Items([*_comparability(section), *section.remarks])
    if any(len(setting.metrics) > 1 for setting in section.settings):
        yield Heading(3, "All test metrics")
        yield Table([_metrics(setting) for setting in section.settings])
    yield Heading(3, "Cost")
    yield Table([_cost(setting) for setting in section.settings])
    yield Text(
        "Epochs to 90 %: until a validation first reached 90 % of the best one. Times without compilation; memory"
        " at the peak, of the fullest accelerator, or of the whole process on a CPU."
    )
    if section.published:
        yield Heading(3, "Published numbers")
        yield Table([{"model": model, section.primary: f"{v:.4f}"} for model, v in section.published.items()])
        yield Text(f"Source: {published.SOURCE}.")


def _section(section: Section, maps: Maps | None) -> Iterator[Block]:
    yield Heading(2, section.title)
    yield from tables(section)
    yield Heading(3, "Charts")
    yield Figures(list(_bars(section)))
    yield Text("Hatched: trivial baselines. Black bars: 95 % intervals, where there are several seeds.")
    if len(section.settings) > 1:
        yield Figures(list(_radars(section)))
        yield Text(_radar_reading(section))
    if curves := list(_curves(section)):
        labels = ", ".join(setting.label for setting in section.settings)
        yield Heading(3, "Learning curves")
        yield Text("Means over seeds, at the steps that all of a setting's seeds recorded.")
        yield Figures([Figure(figures.key(section), f"Key of the learning curves: {labels}")])
        yield Figures(curves)
    if maps is not None:
        yield Heading(3, "Attention maps")
        yield from _maps(maps)
    yield Heading(3, "Runs and settings")
    yield Table(list(_runs(section)))


def _results(section: Section) -> Iterator[dict[str, str]]:
    name, arrow = section.primary, "higher" if section.better == "higher" else "lower"
    column = f"test {name} ({arrow} is better)"
    for setting in section.settings:
        row = {
            "setting": setting.label,
            "seeds": ", ".join(map(str, setting.seeds)),
            column: _mean_and_deviation(setting.primary),
            "95 % interval": _bounds(setting.primary.interval, setting.primary.mean),
            "improvement": "" if setting.improvement is None else f"{setting.improvement:+.1%}",
            "its 95 % interval": _percents(setting.improvement_interval),
        }
        if section.published:
            row["published"] = "" if setting.published is None else f"{setting.published:.4f}"
            row["comparable"] = "yes" if setting.comparable else "no"
        yield row
    for name, value in section.baselines.items():
        yield {"setting": f"baseline: {name}", column: f"{value:.{_decimals(value)}f}"}


def _metrics(setting: Setting) -> dict[str, str]:
    found = {name: _mean_and_deviation(value) for name, value in setting.metrics.items()}
    return {"setting": setting.label, **found}


def _comparability(section: Section) -> Iterator[str]:
    said: dict[tuple[bool, str], list[str]] = {}
    for setting in section.settings:
        said.setdefault((setting.comparable, setting.comparability), []).append(f"`{setting.label}`")
    for (comparable, reason), labels in said.items():
        who = "" if len(said) == 1 else f"{', '.join(labels)}: "
        verdict = "comparable" if comparable else "not comparable"
        line = f"{who}{verdict} with published numbers" + (f": {reason}." if reason else ".")
        yield line[0].upper() + line[1:]


def _cost(setting: Setting) -> dict[str, str]:
    return {
        "setting": setting.label,
        "epochs to 90 %": number(setting.epochs_to_90),
        "s / step": number(setting.seconds_per_step),
        "peak memory (GiB)": number(setting.peak_memory / 2**30),
        "parameters": f"{setting.parameters:,.0f}",
    }


def _runs(section: Section) -> Iterator[dict[str, str]]:
    differing = section.differing
    for place, setting in enumerate(section.settings):
        changes = [
            f"{key}={values[place]}" for key, values in differing.items() if place and values[place] != values[0]
        ]
        for run in setting.runs:
            yield {
                "run": run.folder.name,
                "setting": setting.label,
                "seed": str(run.seed),
                section.primary: f"{run.primary:.{_decimals(run.primary)}f}",
                "best step": f"{run.result['best_step']:,} of {run.result['steps']:,}",
                f"differs from {section.settings[0].label} in": ", ".join(changes) or "nothing",
            }


def _bars(section: Section) -> Iterator[Figure]:
    accuracies = {s.label: s.primary.mean for s in section.settings}
    errors = {s.label: s.primary.interval[1:] for s in section.settings if s.primary.interval is not None}
    title = f"test {section.primary} ({section.better} is better)"
    yield _chart(title, accuracies, section.baselines, errors)
    for title, get in (
        ("seconds per step", lambda s: s.seconds_per_step),
        ("peak memory (GiB)", lambda s: s.peak_memory / 2**30),
        ("epochs to 90 % of the best", lambda s: s.epochs_to_90),
    ):
        yield _chart(title, {s.label: get(s) for s in section.settings}, {}, {})


def _chart(title, values, others, errors) -> Figure:
    said = ", ".join(f"{label} {value:.3g}" for label, value in {**values, **others}.items())
    return Figure(figures.bars(title, values, others, errors), f"Bar chart, {title}: {said}")


def _radars(section: Section) -> Iterator[Figure]:
    scores = figures.scores(section)
    lines = max(map(figures.radar_title_lines, scores))
    for setting in section.settings:
        own, reference = scores[setting.label], scores.get(setting.reference or "")
        said = ", ".join(f"{name} {value:.2f}" for name, value in own.items())
        svg = figures.radar(setting.label, own, reference, lines)
        yield Figure(svg, f"Radar chart of {setting.label}: {said}")


def _radar_reading(section: Section) -> str:
    dashed = f"; dashed: `{BASELINE}`" if any(setting.reference for setting in section.settings) else ""
    return (
        "Round charts: each axis from 0 at the centre to 1, the best setting of this section; a value is its ratio"
        f" to the best ({section.primary}, speed = 1 / seconds per step, memory = 1 / peak memory, convergence ="
        f" 1 / epochs to 90 % of the best){dashed}."
    )


def _curves(section: Section) -> Iterator[Figure]:
    for metric in dict.fromkeys(("loss", section.primary)):
        for split, title in (("train", "training"), ("val", "validation")):
            if (svg := figures.curve(section, split, metric)) is not None:
                curves = [(setting.label, setting.curve(split, metric)) for setting in section.settings]
                said = ", ".join(f"{label} ends at {points[-1][1]:.3g}" for label, points in curves if points)
                yield Figure(svg, f"Learning curves, {title} {metric} by step: {said}")


def _maps(maps: Maps) -> Iterator[Block]:
    if maps.of:
        yield Text(
            "The best model of each setting's first seed on the first test example"
            + (f", which begins `{maps.example}`" if maps.example else ", in positions")
            + ". Of each model the first and the last module, mean over heads, the first"
            f" {WINDOW} queries and keys; weights on other keys are not shown. Each map has a scale of its own."
        )
        yield Figures(
            [
                Figure(figures.attention(label, shown), f"Attention map of {label}, module {shown.module}")
                for label, made in maps.of.items()
                for shown in made
            ]
        )
    if maps.without:
        yield Items([f"No map of `{label}`: {why}." for label, why in maps.without.items()])


def _mean_and_deviation(found: Estimate) -> str:
    digits = _decimals(found.mean)
    return f"{found.mean:.{digits}f}" + ("" if found.deviation is None else f" ± {found.deviation:.{digits}f}")


def _bounds(found: Interval | None, value: float) -> str:
    digits = _decimals(value)
    return "" if found is None else f"[{found.low:.{digits}f}, {found.high:.{digits}f}]"


def _percents(found: Interval | None) -> str:
    return "" if found is None else f"[{found.low:+.1%}, {found.high:+.1%}]"


def _decimals(value: float) -> int:
    """Three significant digits."""
    return 3 if not value else min(max(2 - math.floor(math.log10(abs(value))), 1), 6)
