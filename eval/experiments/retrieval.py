"""Multi-attention-weight attention in retrieval reranking: what a routed depth is worth, and the source's claims.

The source ("Multi-Attention-Weight Transformers") reports what a supervised router and one taught by reinforcement
gain over standard attention. Here: the same two, taught as its text says and its code does not
(`train/tasks/routing.py`), beside the same module without an objective of the router's own
(`straight-through`) and three other mechanisms. All have the same number of parameters within 2 %, and every
setting several seeds. The size is one at which the grid takes about an hour of one CPU core; it was chosen by the
runs of standard attention alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from eval.measure import number, table
from train.workdir import read_json

CONFIG = "configs/retrieval_rerank.py"
PARAMETERS = 470_000
SETTINGS = (
    "task.max_length=96",
    "task.buckets=(96,)",
    "task.num_candidates=20",
    "task.train_candidates=4",
    f"parameter_budget={PARAMETERS}",
    "batch_size=8",
    "eval_batch_size=8",
    "steps=400",
    "eval_every=200",
    "log_every=50",
)
TIMING_ROUNDS = 20
TRAINING, SAME_WIDTH, SCORING = "training", "same width", "scoring"  # groups of timed calls

FORMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "standard": ("standard", ()),
    "maw supervised": ("maw", ("task.router.method=supervised",)),
    "maw grpo": ("maw", ("task.router.method=grpo", "task.router.entropy_weight=0.1")),
    "maw straight-through": ("maw", ()),
    "gravitational": ("gravitational", ()),
    "performer": ("performer", ()),
    "mamba": ("mamba", ()),
}
"""By name of a setting, its mechanism and what is set beside it."""

BASELINE = "standard"
METRICS = {"hit@1": "Hit@1", "mrr@10": "MRR@10", "ndcg@10": "nDCG@10"}
CLAIMS = {
    "maw supervised": {"hit@1": 0.31, "mrr@10": 0.21},
    "maw grpo": {"hit@1": 0.36, "mrr@10": 0.25},
}


def cell(form: str, seed: int, *more: str) -> Cell:
    """One run of the grid; `more` settings make it another one."""
    mechanism, own = FORMS[form]
    settings = (*SETTINGS, *own, f"seed={seed}", *more)
    return Cell(f"{form.replace(' ', '-')}-s{seed}", f"{CONFIG}:{mechanism}", settings)


def cells(seeds: Sequence[int]) -> list[Cell]:
    """The grid, seed by seed, so that an early stop leaves whole comparisons."""
    return [cell(form, seed) for seed in seeds for form in FORMS]


def measure(out: Path) -> None:
    """Times in turn what all settings do: a training step, and the scoring of a batch of test queries."""
    from eval.experiments import step_time  # it takes seconds

    made = {form: cell(form, 0).load() for form in FORMS}
    routed = "maw straight-through"  # what a depth costs, apart from what its router's objective does
    wide = {form: cell(form, 0, "parameter_budget=0").load() for form in (BASELINE, routed)}
    step_time.measure(out, {TRAINING: made, SAME_WIDTH: wide}, TIMING_ROUNDS)
    step_time.measure(out, {SCORING: made}, TIMING_ROUNDS, step_time.scoring_call)


# The report.


class Found(NamedTuple):
    """What the runs of a setting found, seed by seed.

    Attributes:
      results: what `result.json` holds.
      examples: by metric, `(seeds, queries)`.
    """

    results: list[dict[str, Any]]
    examples: Mapping[str, np.ndarray]

    def test(self, metric: str) -> str:
        """Mean and deviation over seeds."""
        found = mean_and_deviation(np.array([r["test"][metric] for r in self.results]))
        return " ± ".join(f"{x:.3f}" for x in found if not np.isnan(x))

    def mean(self, chosen: Callable[[str], bool]) -> float | None:
        """Over seeds and the test metrics whose names are `chosen`; None where there is none."""
        values = [value for r in self.results for name, value in r["test"].items() if chosen(name)]
        return float(np.mean(values)) if values else None


def read(out: Path, form: str, seeds: Sequence[int]) -> Found | None:
    """The runs of a setting, None while one of `seeds` is not finished."""
    made = [cell(form, seed) for seed in seeds]
    results = [result(out, c) for c in made]
    if any(r is None for r in results):
        return None
    files = [read_json(out / c.name / "test_examples.json", "delete the folder") for c in made]
    examples = {metric: np.array([file[metric] for file in files]) for metric in METRICS}
    return Found(results, examples)  # pyright: ignore[reportArgumentType]


def change(baseline: Found, found: Found, metric: str) -> Interval:
    """Of a metric against the baseline, relative, over seeds and queries in pairs."""
    return interval(*relative_differences(baseline.examples[metric], found.examples[metric]))


def report(out: Path, seeds: Sequence[int]) -> str:
    """The grid as tables, beside the source's claims; settings that are not finished are left out."""
    from eval.experiments import step_time

    runs = {form: found for form in FORMS if (found := read(out, form, seeds)) is not None}
    parts = ["# Multi-attention-weight attention in retrieval reranking", _conditions(seeds)]
    if runs:
        results = [r for found in runs.values() for r in found.results]
        parts.append(f"{grid.conditions(results)} {step_time.machine(out)}".strip())
    if missing := len(FORMS) - len(runs):
        parts.append(f"**{missing} of {len(FORMS)} settings are not finished.**")
    parts += ["## Quality", table(list(_quality(runs)))] if runs else []
    parts += ["## Cost", table(list(_cost(runs, out)))] if runs else []
    if routed := list(_routes(runs)):
        parts += ["## Routes", _ROUTES, table(routed)]
    parts += ["## The source's claims", RULE, table(list(_claims(runs)))]
    return "\n\n".join(parts) + "\n"


_ROUTES = """\
Of each layer, mean over seeds: the entropy of the router's policy in nats (log 8 = 2.08: uniform), and the
share of the test pairs that get each depth, the most frequent of a run first, as the numbers of depths mean
nothing across runs."""


def _conditions(seeds: Sequence[int]) -> str:
    return (
        f"Command: `python -m eval.experiments retrieval --seeds {','.join(map(str, seeds))}`. Every cell is"
        f" `python -m train --config {CONFIG}:MECHANISM` with {', '.join(f'`{s}`' for s in SETTINGS)}, and what is"
        " its own: "
        + "; ".join(f"{form}: {', '.join(f'`{s}`' for s in own)}" for form, (_, own) in FORMS.items() if own)
        + ". Mean ± standard deviation over seeds, at the best validation. Change: relative, against standard"
        " attention, with its 95 % bootstrap interval over seeds and queries, paired; with few seeds such"
        " intervals are too narrow. Step time: of training, against standard attention, steps taken in turn in one"
        " process, once at equal parameters and once with equal MLPs; queries and pairs per second: of scoring in"
        " evaluation mode, likewise."
    )


Runs = Mapping[str, Found]


def _quality(runs: Runs) -> Iterator[dict[str, str]]:
    baseline, first = runs.get(BASELINE), next(iter(runs.values())).results[0]
    bm25 = {title: f"{first['test'][f'bm25/{metric}']:.3f}" for metric, title in METRICS.items()}
    yield {"setting": "BM25, the order that is reranked", **bm25}
    for name in ("perfect order of its candidates", "random order of them"):
        yield {"setting": name, METRICS["ndcg@10"]: f"{first['baselines'][name]:.3f}"}
    for form, found in runs.items():
        row = {"setting": form} | {title: found.test(metric) for metric, title in METRICS.items()}
        if baseline is not None and form != BASELINE:
            for metric, title in METRICS.items():
                row[f"change of {title}"] = change(baseline, found, metric).percent()
        yield row


def _cost(runs: Runs, out: Path) -> Iterator[dict[str, str]]:
    from eval.experiments import step_time

    relative, seconds = step_time.relative(out, BASELINE), step_time.medians(out)
    for form, found in runs.items():
        row = {"setting": form, "parameters": f"{found.results[0]['parameters']:,}"}
        for group, title in ((TRAINING, "step time"), (SAME_WIDTH, "step time, MLPs alike")):
            row[title] = relative[group, form].times() if (group, form) in relative else ""
        if (SCORING, form) in seconds:
            setting = cell(form, 0).load()
            queries = setting.eval_batch_size / seconds[SCORING, form]
            row |= {"queries/s": number(queries), "pairs/s": number(queries * setting.task.num_candidates)}
        yield row


def _routes(runs: Runs) -> Iterator[dict[str, str]]:
    layers = cell(BASELINE, 0).load().model.num_layers
    for form, found in runs.items():
        for layer in range(layers):
            depth = f"layer {layer}/depth "
            shares = [[v for name, v in r["test"].items() if name.startswith(depth)] for r in found.results]
            ending = f"blocks/{layer}/attention/router_entropy"
            entropy = found.mean(lambda name, ending=ending: name.endswith(ending))
            if entropy is None:
                continue
            ranked = np.mean([sorted(run, reverse=True) for run in shares], axis=0)
            used = " ".join(f"{share:.2f}" for share in ranked)
            yield {"setting": form, "layer": str(layer + 1), "entropy": f"{entropy:.2f}", "shares": used}


def _claims(runs: Runs) -> Iterator[dict[str, str]]:
    baseline = runs.get(BASELINE)
    for form, claims in CLAIMS.items():
        for metric, claimed in claims.items():
            row = {"claim": f"{form}: {METRICS[metric]} {claimed:+.0%}", "found": ""}
            if baseline is not None and form in runs:
                found = change(baseline, runs[form], metric)
                row["found"] = f"{verdict(found, claimed)}: {found.percent()}"
            yield row


EXPERIMENT = Experiment(cells, measure, report)
