"""Metrics of a model on a split, each example counted once."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

import attn_jax
from attn_jax.types import Array
from train import checkpoints, sharding, tasks
from train.config import Config
from train.state import ModelDef, ModelState, define, num_parameters
from train.tasks import Batch, Task

EvalStep = Callable[[ModelState, Batch], Mapping[str, tuple[Array, Array]]]


def make_eval_step(task: Task, model: ModelDef) -> EvalStep:
    """A compiled function from a model and a batch to sums and counts by metric."""

    def eval_step(state: ModelState, batch: Batch) -> Mapping[str, tuple[Array, Array]]:
        module = nnx.merge(model.eval, state.params, state.rest)
        metrics = task.metrics(module, batch)
        _, diagnostics = attn_jax.pop_aux(module)
        _, count = metrics["loss"]
        return metrics | {name: (jnp.mean(value) * count, count) for name, value in diagnostics.items()}

    return jax.jit(eval_step)


def evaluate(eval_step: EvalStep, state: ModelState, batches: Iterable[Batch], mesh: Mesh) -> dict[str, float]:
    """Mean of every metric over all examples of `batches`; on a terminal with a progress bar."""
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for batch in tqdm(batches, desc="evaluating", unit="batch", leave=False, disable=None):
        # Fetched batch by batch: sums on the host are exact, and no two programs with collectives run at once.
        for name, (total, count) in jax.device_get(eval_step(state, sharding.put_batch(batch, mesh))).items():
            sums[name] = sums.get(name, 0.0) + float(total)
            counts[name] = counts.get(name, 0.0) + float(count)
    return {name: sums[name] / max(counts[name], 1) for name in sums}


def evaluate_best(config: Config, workdir: Path, split: str) -> dict[str, Any]:
    """Restores the best model of the run in `workdir` and measures it on `split`.

    Returns:
      What `eval_<split>.json` holds: `metrics`, `baselines`, and what was measured.

    Raises:
      UsageError: there is no model to restore, or the task's data cannot be had.
    """
    task = tasks.prepare(config)
    with sharding.activate(config) as mesh:
        model = define(task, mesh)
        state = checkpoints.restore_best(workdir, model.abstract)
        metrics = evaluate(make_eval_step(task, model), state, task.eval_batches(split), mesh)
    return {
        "name": config.name,
        "preset": config.preset,
        "mechanism": config.mechanism.name,
        "seed": config.seed,
        "split": split,
        "step": int(state.step),
        "parameters": num_parameters(model),
        "primary": task.primary,
        "metrics": metrics,
        "baselines": task.baselines(split),
    }
