"""Metrics of a model on a split, each example counted once."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

import attn_jax
from attn_jax.types import Array
from train import checkpoints, sharding, tasks
from train.config import Config
from train.state import ModelDef, ModelState, define, num_parameters
from train.tasks import Batch, Metrics, Task

EvalStep = Callable[[ModelState, Batch], tuple[Metrics, Mapping[str, Array]]]


class Measured(NamedTuple):
    """What was measured on a split.

    Attributes:
      means: of every metric over the examples, and of every diagnostic.
      examples: of every metric the value of each example, in the order of the task's batches; None where it is
        undefined.
    """

    means: dict[str, float]
    examples: dict[str, list[float | None]]


def make_eval_step(task: Task, model: ModelDef) -> EvalStep:
    """A compiled function from a model and a batch to the examples' metrics and the mechanisms' diagnostics."""

    def eval_step(state: ModelState, batch: Batch) -> tuple[Metrics, Mapping[str, Array]]:
        module = nnx.merge(model.eval, state.params, state.rest)
        metrics = task.metrics(module, batch)
        _, diagnostics = attn_jax.pop_aux(module)
        return metrics, jax.tree.map(jnp.mean, diagnostics)

    return jax.jit(eval_step)


def evaluate(eval_step: EvalStep, state: ModelState, batches: Iterable[Batch], mesh: Mesh) -> Measured:
    """Every metric on all examples of `batches`, each counted once; on a terminal with a progress bar."""
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    diagnosed: dict[str, list[tuple[float, float]]] = {}
    kept = []
    for batch in tqdm(batches, desc="evaluating", unit="batch", leave=False, disable=None):
        # Fetched batch by batch: no two programs with collectives run at once.
        metrics, diagnostics = sharding.fetch(eval_step(state, sharding.put_batch(batch, mesh)), mesh)
        _, weights = metrics["loss"]
        kept.append(weights > 0)
        for name, pair in metrics.items():
            found.setdefault(name, []).append(pair)
        for name, value in diagnostics.items():
            diagnosed.setdefault(name, []).append((float(value), float(weights.sum())))
    means, examples = {}, {}
    real = np.concatenate(kept)
    for name, pairs in found.items():
        values, weights = (np.concatenate(arrays).astype(np.float64)[real] for arrays in zip(*pairs))
        means[name] = _mean(values, weights)
        examples[name] = [float(v) if w > 0 and np.isfinite(v) else None for v, w in zip(values, weights)]
    for name, pairs in diagnosed.items():
        means[name] = _mean(*map(np.array, zip(*pairs)))
    return Measured(means, examples)


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    counted = weights > 0
    return float(np.average(values[counted], weights=weights[counted])) if counted.any() else float("nan")


class Restored(NamedTuple):
    """The best model of a run, on the devices, and what it was trained for."""

    config: Config
    task: Task
    mesh: Mesh
    model: ModelDef
    state: ModelState

    def module(self) -> nnx.Module:
        """The model in evaluation mode."""
        return nnx.merge(self.model.eval, self.state.params, self.state.rest)


@contextmanager
def restored(config: Config, workdir: Path) -> Iterator[Restored]:
    """Restores the best model of the run in `workdir`, for as long as the body runs.

    Raises:
      UsageError: there is no model to restore, or the task's data cannot be had.
    """
    task = tasks.prepare(config)
    with sharding.activate(config) as mesh:
        model = define(task, mesh)
        yield Restored(config, task, mesh, model, checkpoints.restore_best(workdir, model.abstract))


def measure(run: Restored, split: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """What `eval_<split>.json` holds (`metrics`, `baselines`, and what was measured), and `Measured.examples`."""
    config, task, mesh, model, state = run
    measured = evaluate(make_eval_step(task, model), state, task.eval_batches(split), mesh)
    result = {
        "name": config.name,
        "preset": config.preset,
        "mechanism": config.mechanism.name,
        "seed": config.seed,
        "split": split,
        "step": int(state.step),
        "parameters": num_parameters(model),
        "primary": task.primary,
        "metrics": measured.means,
        "baselines": task.baselines(split),
    }
    return result, measured.examples
