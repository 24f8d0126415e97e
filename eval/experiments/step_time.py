"""Seconds of a training step of several configs, measured alternately in one process."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from train import sharding, state, tasks
from train.config import Config
from train.loop import Program

_WARM_UP = 2


def step_times(configs: Mapping[str, Config], rounds: int) -> dict[str, list[float]]:
    """By name, the seconds of `rounds` training steps of each config, in turn: A B C A B C ...

    The steps train real models on one real batch each; what they share with `python -m train` is everything but
    the loading of batches.
    """
    steps = {name: _stepper(config) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    for number in range(_WARM_UP + rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number >= _WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _stepper(config: Config) -> Callable[[], Any]:
    """Builds and compiles what `config` trains; every call takes one step and waits for it."""
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


def ratios(seconds: Mapping[str, list[float]], name: str, reference: str) -> np.ndarray:
    """Time of `name` over that of `reference`, of neighbouring steps."""
    return np.asarray(seconds[name]) / np.asarray(seconds[reference])
