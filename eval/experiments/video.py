"""Dual key-value attention in slot-based video: the source's grid of capacities, and its claims.

The grid is that of the source ("From Pairwise to k-Wise in Practice", G1 to G5: heads x layers), standard
attention against dual-KV attention in each of its forms, every cell with several seeds. As in the source there is
no attention among the tokens of a frame: the mechanism is how slots read tokens, and how patches read slots. The
size is one at which the grid takes less than two hours on two CPU cores.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval.experiments import grid
from eval.experiments.grid import Cell, Experiment, result
from eval.experiments.statistics import (
    RULE,
    Interval,
    interval,
    mean_and_deviation,
    relative_differences,
    verdict,
)
from eval.measure import table
from train.workdir import read_json

CONFIG = "configs/video_slots.py"
SETTINGS = (
    "task.num_frames=2",  # frames are independent, so few of each clip: more clips for the same time
    "task.predict_frames=1",
    "task.sprites.num_train=8000",
    "task.sprites.num_test=400",
    "model.token_layers=0",
    "batch_size=8",
    "steps=1000",
    "eval_every=500",
    "log_every=100",
)
STEP_TIME_ROUNDS = 40


class Group(NamedTuple):
    """A capacity, and what the source says of it: the change of its test MSE by dual-KV attention."""

    heads: int
    layers: int
    claim: float


GROUPS = {
    "G1": Group(1, 1, -0.276),
    "G2": Group(4, 1, -0.237),
    "G3": Group(8, 1, -0.222),
    "G4": Group(8, 4, -0.085),
    "G5": Group(8, 6, -0.097),
}
CLAIMED_OVERHEAD = 0.80

FORMS: dict[str, tuple[str, ...]] = {
    "standard": (),
    "full": ("mechanism.param_mode=full",),
    "grouped": ("mechanism.param_mode=grouped",),
    "lowrank": ("mechanism.param_mode=lowrank",),
    "feature": ("mechanism.merge=feature",),
}
DUAL = tuple(FORMS)[1:]


def forms_of(group: str) -> Iterator[str]:
    """The forms that there are at a capacity: streams of grouped heads need two heads."""
    return (form for form in FORMS if not (form == "grouped" and GROUPS[group].heads == 1))


def cell(group: str, form: str, seed: int) -> Cell:
    """One run of the grid."""
    size = (f"model.num_heads={GROUPS[group].heads}", f"model.num_layers={GROUPS[group].layers}")
    mechanism = "standard" if form == "standard" else "dual_kv"
    overrides = (*SETTINGS, *size, *FORMS[form], f"seed={seed}")
    return Cell(f"{group}-{form}-s{seed}", f"{CONFIG}:{mechanism}", overrides)


def cells(seeds: Sequence[int]) -> list[Cell]:
    """The grid, seed by seed, so that an early stop leaves whole comparisons; within one the longest first."""
    return [cell(g, form, seed) for seed in seeds for g in reversed(GROUPS) for form in forms_of(g)]


def measure(out: Path) -> None:
    """Times the training steps of all forms, capacity by capacity."""
    from eval.experiments import step_time  # it takes seconds

    made = {g: {form: cell(g, form, 0).load() for form in forms_of(g)} for g in GROUPS}
    step_time.measure(out, made, STEP_TIME_ROUNDS)


# The report.


class Measured(NamedTuple):
    """What the runs of a form at a capacity found, seed by seed.

    Attributes:
      results: what `result.json` holds.
      mse: `(seeds, examples)` of the test clips.
    """

    results: list[dict[str, Any]]
    mse: np.ndarray

    def test(self, metric: str) -> str:
        """Mean and deviation over seeds."""
        digits = 4 if metric == "mse" else 3
        found = mean_and_deviation(np.array([r["test"][metric] for r in self.results]))
        return " ± ".join(f"{x:.{digits}f}" for x in found if not np.isnan(x))


def read(out: Path, group: str, form: str, seeds: Sequence[int]) -> Measured | None:
    """The runs of a form at a capacity, None while one of `seeds` is not finished."""
    made = [cell(group, form, seed) for seed in seeds]
    results = [result(out, c) for c in made]
    if any(r is None for r in results):
        return None
    examples = [read_json(out / c.name / "test_examples.json", "delete the folder")["mse"] for c in made]
    return Measured(results, np.array(examples))  # pyright: ignore[reportArgumentType]


class Comparison(NamedTuple):
    """A dual form against standard attention, at one capacity."""

    mse: Interval
    draws: np.ndarray


def report(out: Path, seeds: Sequence[int]) -> str:
    """The grid as tables, beside the source's claims; cells that are not finished are left out."""
    from eval.experiments import step_time

    runs = {(g, form): read(out, g, form, seeds) for g in GROUPS for form in forms_of(g)}
    times = step_time.relative(out, "standard")
    comparisons = {}
    for (group, form), found in runs.items():
        standard = runs[group, "standard"]
        if form != "standard" and found is not None and standard is not None:
            value, draws = relative_differences(standard.mse, found.mse)
            comparisons[group, form] = Comparison(interval(value, draws), draws)
    finished = [found for found in runs.values() if found is not None]
    missing = len(runs) - len(finished)
    conditions = _conditions(finished, seeds, step_time.machine(out))
    parts = ["# Dual key-value attention in slot-based video", conditions]
    if missing:
        parts.append(f"**{missing} of {len(runs)} cells are not finished.**")
    parts += ["## The grid", table(list(_rows(runs, comparisons, times)))]
    parts += ["## The source's claims", f"{RULE} {_FORMS}", table(list(_claims(comparisons, times)))]
    return "\n\n".join(parts) + "\n"


_FORMS = """\
`feature` is what the source's code computes, `grouped` what its text describes (a doubled
sequence of keys, about as many parameters), `lowrank` the same where there is one head, `full` the most favourable
to it."""


def _conditions(finished: Sequence[Measured], seeds: Sequence[int], machine: str) -> str:
    said = (
        f"Command: `python -m eval.experiments video --seeds {','.join(map(str, seeds))}`. Every cell is"
        f" `python -m train --config {CONFIG}:MECHANISM` with {', '.join(f'`{s}`' for s in SETTINGS)}, and the"
        " heads and layers of its group, once for each seed. MSE: of pixels from 0 to 1 on 400 test clips, at the"
        " best validation, mean ± standard deviation over seeds. Change: of the MSE against standard attention,"
        " with its 95 % bootstrap interval over seeds and clips, paired; with few seeds such intervals are too"
        " narrow. FG-ARI: of the slots' masks in single frames. Step time: against standard attention, training"
        " steps taken in turn in one process."
    )
    if finished:
        said += f"\n\n{grid.conditions([r for found in finished for r in found.results])} {machine}"
    return said


Runs = Mapping[tuple[str, str], Measured | None]
Comparisons = Mapping[tuple[str, str], Comparison]
Times = Mapping[tuple[str, str], Interval]


def _rows(runs: Runs, comparisons: Comparisons, times: Times) -> Iterator[dict[str, str]]:
    for (group, form), found in runs.items():
        if found is None:
            continue
        size = GROUPS[group]
        row = {
            "group": f"{group} ({size.heads}, {size.layers})",
            "form": form,
            "test MSE": found.test("mse"),
            "change of MSE": "",
            "source": "",
            "FG-ARI": found.test("fg_ari"),
            "parameters": f"{found.results[0]['parameters']:,}",
            "step time": "",
        }
        if (group, form) in comparisons:
            row |= {"change of MSE": comparisons[group, form].mse.percent(), "source": f"{size.claim:+.1%}"}
        if (group, form) in times:
            row["step time"] = times[group, form].times()
        yield row


def _claims(comparisons: Comparisons, times: Times) -> Iterator[dict[str, str]]:
    for group, size in GROUPS.items():
        found = {form: comparisons[group, form] for form in DUAL if (group, form) in comparisons}
        yield (
            {"claim": f"{group}: MSE {size.claim:+.1%}"}
            | dict.fromkeys(DUAL, "")
            | {form: f"{verdict(c.mse, size.claim)}: {c.mse.percent()}" for form, c in found.items()}
        )
    # The claim that the gain falls with capacity: the mean change at G1 to G3 less that at G4 and G5.
    low, high = ("G1", "G2", "G3"), ("G4", "G5")
    claimed = np.mean([GROUPS[g].claim for g in low]) - np.mean([GROUPS[g].claim for g in high])
    row = {"claim": f"gain falls from G1-G3 to G4-G5: {claimed:+.1%}"}
    for form in DUAL:
        groups = [[comparisons[g, form] for g in part if (g, form) in comparisons] for part in (low, high)]
        if all(groups):
            value, draws = (
                np.mean([get(c) for c in groups[0]], axis=0) - np.mean([get(c) for c in groups[1]], axis=0)
                for get in (lambda c: c.mse.value, lambda c: c.draws)
            )
            found = interval(float(value), draws)
            row[form] = f"{verdict(found, float(claimed))}: {found.percent()}"
    yield row
    for group in GROUPS:
        yield {"claim": f"{group}: step time {1 + CLAIMED_OVERHEAD:.2f}x"} | {
            form: f"{verdict(Interval(*(x - 1 for x in t)), CLAIMED_OVERHEAD)}: {t.times()}"
            for form in DUAL
            if (t := times.get((group, form))) is not None
        }


EXPERIMENT = Experiment(cells, measure, report)
