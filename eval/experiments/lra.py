"""Gravity and timescales on Long Range Arena, beside standard attention and every other mechanism.

The source ("Attention Mechanism Comparison") promises a comparison of four mechanisms on ListOps and text, and
leaves its results open. Here it is with the source's settings: width 128, 4 heads, 2 layers, MLP 512, 3
timescales, dropout 0.1, batches of 32, learning rate 1e-4, weight decay 1e-5, early stopping after 10 epochs
without improvement. Two things differ. The data is what two CPU cores can do: lists of at most 64 tokens, 20
epochs as in the source; the first 128 bytes of a text, 10 epochs. And the width of the MLP makes all models
equally large: `multi_timescale` has projections for each timescale and is larger than the others with MLPs of
any width, so the budget is one that it can keep to.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import attn_jax
from eval.experiments.grid import Cell, Experiment, result, unfinished
from eval.measure import number, table

PARAMETERS = 600_000
COMMON = (
    "model.dim=128",
    "model.num_heads=4",
    "model.num_layers=2",
    "model.mlp_dim=512",
    "model.dropout=0.1",
    f"parameter_budget={PARAMETERS}",
    "batch_size=32",
    "optimizer.learning_rate=1e-4",
    "optimizer.schedule=constant",
    "optimizer.warmup_steps=0",
    "optimizer.weight_decay=1e-5",
    "optimizer.clip_norm=1.0",
    "patience=10",
    "log_every=47",
)


def _epochs(number: int, steps: int) -> tuple[str, str]:
    """At most so many epochs of so many steps, each with a validation."""
    return f"steps={number * steps}", f"eval_every={steps}"


TASKS: dict[str, tuple[str, ...]] = {
    "listops": (
        "task.generator.num_train=1504",
        "task.generator.num_val=500",
        "task.generator.num_test=1000",
        "task.generator.min_length=10",
        "task.generator.max_length=64",
        "task.buckets=(64,)",
        *_epochs(20, 47),
    ),
    "text": ("task.buckets=(128,)", *_epochs(10, 52)),  # of 1,651 articles
}
"""By task, what is set beside `COMMON`."""

SOURCE = ("standard", "gravitational", "multi_timescale", "gravitational_multi_timescale")
TIMING_ROUNDS = 20


def mechanisms() -> list[str]:
    """The four of the source first, then the other ones of the library."""
    return [*SOURCE, *(name for name, known in attn_jax.MECHANISMS.items() if name not in SOURCE and known.mask)]


def cell(task: str, mechanism: str, seed: int) -> Cell:
    """One run of the grid."""
    settings = (*COMMON, *TASKS[task], f"seed={seed}")
    return Cell(f"{task}-{mechanism}-s{seed}", f"configs/lra_{task}.py:{mechanism}", settings)


def cells(seeds: Sequence[int]) -> list[Cell]:
    """The source's four with every seed, the others with the first; an early stop leaves whole comparisons."""
    first = [cell(task, name, seeds[0]) for name in mechanisms() for task in TASKS]
    more = [cell(task, name, seed) for seed in seeds[1:] for name in SOURCE for task in TASKS]
    four = len(SOURCE) * len(TASKS)
    return [*first[:four], *more, *first[four:]]


def measure(out: Path) -> None:
    """Times the training steps of all mechanisms, task by task."""
    from eval.experiments import step_time  # it takes seconds

    made = {task: {name: cell(task, name, 0).load() for name in mechanisms()} for task in TASKS}
    step_time.measure(out, made, TIMING_ROUNDS)


def report(out: Path, seeds: Sequence[int]) -> str:
    """The comparison of the finished runs, what a step costs, and what the four learnt."""
    from eval.compare import document
    from eval.compare import report as comparison_report
    from eval.compare.comparison import compare
    from eval.experiments import step_time

    grid = cells(seeds)
    missing = unfinished(out, grid)
    done = [made for made in grid if made not in missing]
    title = "Gravity and timescales on Long Range Arena"
    parts = []
    if missing:
        parts.append(f"**{len(missing)} of {len(grid)} runs are not finished.**")
    if done:
        settings = ", ".join(f"`{setting}`" for setting in COMMON)
        found = compare([out / made.name for made in done])
        parts += [
            f"Command: `python -m eval.experiments lra --seeds {','.join(map(str, seeds))}`. Every run is `python"
            f" -m train --config configs/lra_TASK.py:MECHANISM` with {settings}, and of its task"
            + "".join(f"; {task}: {', '.join(f'`{s}`' for s in own)}" for task, own in TASKS.items())
            + ". As a page with figures: `python -m eval.compare` with the folders of the runs.",
            document.markdown(title, list(comparison_report.summary(found))).partition("\n")[2].strip(),
        ]
        if learnt := list(_learnt(out, done)):
            parts += ["## What the layers learnt", "Means over seeds, of the best validation.", table(learnt)]
    times = step_time.relative(out, "standard")
    if times:
        rows = [{"task": t, "mechanism": name, "step time": ratio.times()} for (t, name), ratio in times.items()]
        parts += ["## Step time against standard attention", step_time.machine(out), table(rows)]
    return "\n\n".join([f"# {title}", *parts]) + "\n"


def _learnt(out: Path, done: Sequence[Cell]) -> Iterator[dict[str, str]]:
    """A row for each diagnostic of each task and mechanism."""
    values: dict[tuple[str, str, str], list[float]] = {}
    for made in done:
        task, mechanism = made.name.rsplit("-", 1)[0].split("-", 1)
        for name, value in (result(out, made) or {})["test"].items():
            if mechanism in SOURCE and "/" in name:
                values.setdefault((task, mechanism, name), []).append(value)
    for (task, mechanism, name), found in values.items():
        yield {"task": task, "mechanism": mechanism, "diagnostic": name, "mean": number(float(np.mean(found)))}


EXPERIMENT = Experiment(cells, measure, report)
