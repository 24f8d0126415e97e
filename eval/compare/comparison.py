"""What many runs found, setting beside setting: computed from their work directories, not yet written down."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attn_jax import MECHANISMS
from eval.compare import published
from eval.compare.runs import Curve, Run, read_all
from eval.experiments.statistics import (
    Interval,
    interval,
    mean_and_deviation,
    relative_differences,
    resampled_means,
)
from eval.measure import finite
from train.cli import UsageError
from train.config import differing_keys, flatten

BASELINE = "standard"
"""The mechanism that all others are compared with."""

PARAMETER_TOLERANCE = 0.02
"""How much parameter counts may differ, relative to the smallest, before the report warns."""


class Estimate(NamedTuple):
    """A quantity over the runs of a setting.

    Attributes:
      mean: over seeds.
      deviation: the sample standard deviation over seeds; None for one seed.
      interval: 95 % bootstrap interval over seeds and examples; None for one seed or without examples.
    """

    mean: float
    deviation: float | None
    interval: Interval | None = None


@dataclass(frozen=True)
class Setting:
    """The runs that differ only in their seed.

    Attributes:
      label: unique in its section: the mechanism, and the other settings in which it differs from the reference.
      runs: by seed.
      primary: the primary metric on the test split.
      metrics: all metrics on the test split by name, those of single layers left out.
      reference: the label of the setting that it is compared with: of `standard`, the one that differs least in
        all but the mechanism; None where there is none, and for a reference itself.
      improvement: relative change of `primary` against the reference over the seeds that both have, positive
        where it is better; None where they have no seed in common.
      improvement_interval: its paired 95 % bootstrap interval; None for fewer than two common seeds.
      epochs_to_90, seconds_per_step, peak_memory, parameters: means over seeds; memory in bytes.
      published: the accuracy published for this mechanism, None if there is none.
    """

    label: str
    runs: Sequence[Run]
    primary: Estimate
    metrics: Mapping[str, Estimate]
    reference: str | None
    improvement: float | None
    improvement_interval: Interval | None
    epochs_to_90: float
    seconds_per_step: float
    peak_memory: float
    parameters: float
    published: float | None

    @property
    def mechanism(self) -> str:
        return self.runs[0].result["mechanism"]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def comparable(self) -> bool:
        """Whether its result may be set beside published numbers, as its runs themselves say."""
        return self.runs[0].result["comparable"]

    @property
    def comparability(self) -> str:
        return self.runs[0].result["comparability"]

    def curve(self, split: str, metric: str) -> Curve:
        """The mean over seeds at the steps that all of them recorded."""
        curves = [dict(run.curves.get((split, metric), ())) for run in self.runs]
        steps = sorted(set.intersection(*map(set, curves)))
        return [(step, float(np.mean([curve[step] for curve in curves]))) for step in steps]


@dataclass(frozen=True)
class Section:
    """Settings measured on the same test data.

    Attributes:
      title: the config's name and preset, and what else tells sections apart.
      name, primary, better: of the task, as in `result.json`.
      baselines: what trivial predictors reach in `primary`.
      settings: the baseline mechanism first, then in the order of the registry.
      published: by model, the published value of `primary`.
      remarks: what a reader must know to read the numbers right, a line each.
    """

    title: str
    name: str
    primary: str
    better: str
    baselines: Mapping[str, float]
    settings: Sequence[Setting]
    published: Mapping[str, float]
    remarks: Sequence[str]

    @property
    def differing(self) -> dict[str, list[Any]]:
        """By key, the value in every setting, of the settings that are not the same in all; None where absent."""
        flat = [flatten(setting.runs[0].config) for setting in self.settings]
        first, *others = (setting.runs[0].config for setting in self.settings)
        keys = dict.fromkeys(key for other in others for key in differing_keys(first, other) if key != "seed")
        return {key: [config.get(key) for config in flat] for key in keys}


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
      sections: one for each task.
      left_out: for each folder that does not count a line that says why.
    """

    sections: Sequence[Section]
    left_out: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """All numbers, as JSON."""
        return {"sections": [_section_json(s) for s in self.sections], "left_out": list(self.left_out)}


def compare(folders: Iterable[Path]) -> Comparison:
    """Compares the finished runs in `folders`: one section for each task, in it the seeds of a setting together.

    Two runs are of the same task if their config's name and preset are the same and trivial baselines reach the
    same on their test data.

    Raises:
      UsageError: there is no finished run in any of `folders`.
    """
    runs, left_out = read_all(folders)
    if not runs:
        raise UsageError(f"there is no finished run to compare: {'; '.join(left_out) or 'no folder was given'}")
    tasks: dict[Any, list[Run]] = {}
    for run in runs:
        tasks.setdefault(_task_of(run), []).append(run)
    return Comparison([_section(key, own, tasks) for key, own in tasks.items()], left_out)


def _task_of(run: Run) -> tuple[Any, ...]:
    result = run.result
    # Baselines are computed from the data; rounded, because another machine may add up in another order.
    data = sorted((name, float(f"{value:.6g}")) for name, value in result["baselines"].items())
    return result["name"], result["preset"], result["primary"], tuple(data)


def _section(key: tuple[Any, ...], runs: Sequence[Run], tasks: Mapping[tuple[Any, ...], Sequence[Run]]) -> Section:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.setting, []).append(run)
    ordered = [sorted(group, key=lambda run: run.seed) for group in groups.values()]
    ordered.sort(key=lambda group: _place(group[0].result["mechanism"]))  # stable: else as given
    labelled = dict(zip(_labels([group[0] for group in ordered]), ordered))
    values = published.accuracies(runs[0].result["name"])
    settings = [_setting(label, labelled, values) for label in labelled]
    result = runs[0].result
    return Section(
        title=_title(key, runs, tasks),
        name=result["name"],
        primary=result["primary"],
        better=result["better"],
        baselines=result["baselines"],
        settings=settings,
        published=values,
        remarks=list(_remarks(settings)),
    )


def _place(mechanism: str) -> int:
    order = [BASELINE, *(name for name in MECHANISMS if name != BASELINE)]
    return order.index(mechanism) if mechanism in order else len(order)


def _labels(runs: Sequence[Run]) -> list[str]:
    """The mechanism, and where several settings have the same one, what tells them apart."""
    labels = [_label(run, runs, known=True) for run in runs]
    # A setting that another version did not know is named only where nothing else tells runs apart.
    return [
        label if labels.count(label) == 1 else _label(run, runs, known=False) for label, run in zip(labels, runs)
    ]


def _label(run: Run, runs: Sequence[Run], known: bool) -> str:
    mechanism = run.result["mechanism"]
    alike = [other.config for other in runs if other.result["mechanism"] == mechanism]
    flat = [flatten(config) for config in alike]
    keys = dict.fromkeys(key for other in alike for key in differing_keys(run.config, other) if key != "seed")
    told = [key for key in keys if not known or all(key in config for config in flat)]
    told.sort(key=lambda key: not key.startswith("mechanism."))
    own = flatten(run.config)
    return " ".join([mechanism, *(f"{key.removeprefix('mechanism.')}={own.get(key, 'absent')}" for key in told)])


def _title(key: tuple[Any, ...], runs: Sequence[Run], tasks: Mapping[tuple[Any, ...], Sequence[Run]]) -> str:
    name, preset, *_ = key
    namesakes = [own[0].config for other, own in tasks.items() if other[:2] == key[:2]]
    keys = dict.fromkeys(k for other in namesakes for k in differing_keys(runs[0].config, other))
    own = flatten(runs[0].config)
    told = [f"{k}={own.get(k, 'absent')}" for k in keys if k.startswith("task.")]
    return f"{name}, preset {preset}" + (f" ({', '.join(told)})" if told else "")


def _reference(label: str, groups: Mapping[str, Sequence[Run]]) -> str | None:
    """Of the settings of the baseline mechanism the one that differs least in all but the mechanism."""

    def distance(other: str) -> int:
        keys = differing_keys(groups[label][0].config, groups[other][0].config)
        return sum(not key.startswith("mechanism.") for key in keys if key != "seed")

    references = [other for other, runs in groups.items() if runs[0].result["mechanism"] == BASELINE]
    return None if label in references else min(references, key=distance, default=None)


def _setting(label: str, groups: Mapping[str, Sequence[Run]], values: Mapping[str, float]) -> Setting:
    runs, reference = groups[label], _reference(label, groups)
    improvement, bounds = (None, None) if reference is None else _improvement(groups[reference], runs)

    def mean(key: str) -> float:
        return float(np.mean([run.result[key] for run in runs]))

    return Setting(
        label=label,
        runs=runs,
        primary=_primary(runs),
        metrics=dict(_metrics(runs)),
        reference=reference,
        improvement=improvement,
        improvement_interval=bounds,
        epochs_to_90=mean("epochs_to_90_percent_of_best"),
        seconds_per_step=mean("seconds_per_step"),
        peak_memory=mean("peak_memory_bytes"),
        parameters=mean("parameters"),
        published=values.get(published.MODEL_OF.get(runs[0].result["mechanism"], "")),
    )


def _metrics(runs: Sequence[Run]) -> Iterable[tuple[str, Estimate]]:
    for name in runs[0].result["test"]:
        values = [run.result["test"].get(name) for run in runs]
        if "/" not in name and all(value is not None and math.isfinite(value) for value in values):
            yield name, _estimate(values)


def _estimate(values: Sequence[float]) -> Estimate:
    mean, deviation = mean_and_deviation(np.array(values))
    return Estimate(mean, finite(deviation))


def _primary(runs: Sequence[Run]) -> Estimate:
    found, examples = _estimate([run.primary for run in runs]), _stack(runs)
    if len(runs) < 2 or examples is None:
        return found
    return found._replace(interval=interval(found.mean, *resampled_means(examples)))


def _improvement(reference: Sequence[Run], runs: Sequence[Run]) -> tuple[float | None, Interval | None]:
    seeds = sorted({run.seed for run in reference} & {run.seed for run in runs})
    pairs = [[next(run for run in group if run.seed == seed) for seed in seeds] for group in (reference, runs)]
    first, second = (np.mean([run.primary for run in group]) for group in pairs) if seeds else (0.0, 0.0)
    if not first:
        return None, None
    sign = 1 if runs[0].result["better"] == "higher" else -1
    value = sign * float(second / first - 1)
    examples = _stack([*pairs[0], *pairs[1]])
    if len(seeds) < 2 or examples is None:
        return value, None
    _, draws = relative_differences(*np.split(examples, 2))
    return value, interval(value, sign * draws)


def _stack(runs: Sequence[Run]) -> np.ndarray | None:
    """`(runs, examples)` of the test examples whose metric is defined in all runs; None where they do not pair."""
    kept = [run.examples for run in runs if run.examples is not None]
    if len(kept) < len(runs) or len({len(values) for values in kept}) != 1:
        return None
    stacked = np.stack(kept)
    stacked = stacked[:, np.isfinite(stacked).all(axis=0)]
    return stacked if stacked.shape[1] else None


def _remarks(settings: Sequence[Setting]) -> Iterable[str]:
    references = [setting.label for setting in settings if setting.mechanism == BASELINE]
    if not references:
        yield f"There is no run of `{BASELINE}`, so nothing is compared with it."
    if len(references) > 1:
        yield f"Each setting is compared with the one of `{BASELINE}` that differs least in all but the mechanism."
    smallest, *_, largest = sorted([*settings, settings[0]], key=lambda setting: setting.parameters)
    more = largest.parameters / max(smallest.parameters, 1) - 1
    if more > PARAMETER_TOLERANCE:
        yield (
            f"Warning: the models are not equally large. `{largest.label}` has {largest.parameters:,.0f}"
            f" parameters, {more:.0%} more than `{smallest.label}` with {smallest.parameters:,.0f}."
        )
    if single := [s.label for s in settings if len(s.runs) == 1]:
        yield f"One seed only, so no deviation and no interval: {', '.join(f'`{label}`' for label in single)}."
    if few := sorted({len(s.runs) for s in settings if 1 < len(s.runs) < 5}):
        counts = " or ".join(map(str, few))
        yield f"Intervals over {counts} seeds are too narrow: few seeds are resampled in few ways."
    if kept := [s.label for s in settings if len(s.runs) > 1 and s.primary.interval is None]:
        labels = ", ".join(f"`{label}`" for label in kept)
        yield f"No interval, because test_examples.json is missing or of other examples: {labels}."
    if bare := [run.folder.name for setting in settings for run in setting.runs if not run.curves]:
        yield f"No learning curves, because metrics.jsonl is missing or empty: {', '.join(bare)}."
    devices = sorted({run.result["devices"] for setting in settings for run in setting.runs})
    if len(devices) > 1:
        yield f"Warning: times and memory are of different devices: {', '.join(devices)}."
    if len({tuple(setting.seeds) for setting in settings}) > 1:
        yield "The settings do not have the same seeds; an improvement is over the seeds that both have."


def _section_json(section: Section) -> dict[str, Any]:
    return {
        "title": section.title,
        "name": section.name,
        "primary": section.primary,
        "better": section.better,
        "baselines": dict(section.baselines),
        "published": {"source": published.SOURCE, "values": dict(section.published)}
        if section.published
        else None,
        "remarks": list(section.remarks),
        "settings": [_setting_json(setting) for setting in section.settings],
        "differing_settings": section.differing,
    }


def _setting_json(setting: Setting) -> dict[str, Any]:
    def bounds(found: Interval | None) -> list[float] | None:
        return None if found is None else [found.low, found.high]

    return {
        "label": setting.label,
        "mechanism": setting.mechanism,
        "seeds": setting.seeds,
        "folders": [str(run.folder) for run in setting.runs],
        "comparable": setting.comparable,
        "comparability": setting.comparability,
        "mean": setting.primary.mean,
        "deviation": setting.primary.deviation,
        "interval": bounds(setting.primary.interval),
        "test": {name: {"mean": x.mean, "deviation": x.deviation} for name, x in setting.metrics.items()},
        "reference": setting.reference,
        "improvement": setting.improvement,
        "improvement_interval": bounds(setting.improvement_interval),
        "published": setting.published,
        "epochs_to_90_percent_of_best": setting.epochs_to_90,
        "seconds_per_step": setting.seconds_per_step,
        "peak_memory_bytes": setting.peak_memory,
        "parameters": setting.parameters,
    }
