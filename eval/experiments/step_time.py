"""Seconds of a training step, or of another call, of several configs: in turn in one process, kept in a file."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from eval.experiments.statistics import Interval, median_interval
from eval.measure import environment
from train import sharding, state, tasks
from train.config import Config
from train.loop import Program
from train.tasks import rerank
from train.workdir import read_json, write_json

_FILE = "step_times.json"
_WARM_UP = 2


Call = Callable[[], Any]
"""Does something once, and waits for it."""


def measure(
    out: Path,
    groups: Mapping[str, Mapping[str, Config]],
    rounds: int,
    make: Callable[[Config], Call] | None = None,
) -> None:
    """Times what `make` makes of the configs of each group in turn, once, and keeps the seconds below `out`.

    Args:
      out: folder of the experiment.
      groups: by a name of the group and one of the config.
      rounds: calls of each.
      make: by default `training_step`.
    """
    measured = _read(out) or {"groups": {}}
    for group, made in groups.items():
        if group in measured["groups"]:
            continue
        sharding.use_cpu_devices(next(iter(made.values())))
        measured["groups"][group] = step_times(made, rounds, make or training_step)
        measured["environment"] = environment()
        write_json(out / _FILE, measured)


def relative(out: Path, reference: str) -> dict[tuple[str, str], Interval]:
    """By group and name, the time of a step over that of `reference` in its group, as far as measured."""
    measured = (_read(out) or {"groups": {}})["groups"]
    return {
        (group, name): median_interval(ratios(seconds, name, reference))
        for group, seconds in measured.items()
        for name in seconds
        if name != reference
    }


def medians(out: Path) -> dict[tuple[str, str], float]:
    """By group and name, the median seconds of a call, as far as measured."""
    measured = (_read(out) or {"groups": {}})["groups"]
    return {(g, name): float(np.median(times)) for g, made in measured.items() for name, times in made.items()}


def machine(out: Path) -> str:
    """What the times were measured on, in a sentence; empty where nothing was."""
    measured = _read(out)
    if measured is None:
        return ""
    on = measured["environment"]
    return f"Step times on {on['device']}, {on['cores']} cores, load {on['load']} before."


def _read(out: Path) -> dict[str, Any] | None:
    return read_json(out / _FILE, "delete it") if (out / _FILE).exists() else None


def step_times(
    configs: Mapping[str, Config], rounds: int, make: Callable[[Config], Call]
) -> dict[str, list[float]]:
    """By name, the seconds of `rounds` calls of what `make` makes of each config, in turn: A B C A B C ..."""
    steps = {name: make(config) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    for number in range(_WARM_UP + rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number >= _WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def training_step(config: Config) -> Call:
    """Builds and compiles what `config` trains; every call takes one step.

    The steps train a real model on one real batch; what they share with `python -m train` is everything but the
    loading of batches.
    """
    task = tasks.prepare(config)
    with sharding.activate(config) as mesh:
        program = Program.of(config, task, mesh)
        current = state.initial_train_state(task, program.optimizer, config.seed, program.abstract)
        batch = sharding.put_batch(next(task.train_iterator(config.seed)), mesh)
        compiled = program.train_step.lower(current, batch).compile()

    def step() -> None:
        nonlocal current
        current, metrics = compiled(current, batch)
        jax.block_until_ready(metrics)

    return step


def scoring_call(config: Config) -> Call:
    """Builds the reranker of `config`, untrained; every call scores the candidates of a batch of test queries."""
    task = tasks.prepare(config)
    with sharding.activate(config) as mesh:
        model = task.model(nnx.Rngs(config.seed))
        model.eval()
        batch = sharding.put_batch(next(iter(task.eval_batches("test"))), mesh)
        scoring = nnx.jit(rerank.score)
    return lambda: jax.block_until_ready(scoring(model, batch))


def ratios(seconds: Mapping[str, list[float]], name: str, reference: str) -> np.ndarray:
    """Time of `name` over that of `reference`, of neighbouring steps."""
    return np.asarray(seconds[name]) / np.asarray(seconds[reference])
