"""Where the models of a comparison attend: the weights of every attention module on one test example."""

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from attn_jax import MECHANISMS
from attn_jax.aux import record
from eval.compare.comparison import Comparison, Section
from eval.compare.runs import Run
from train import cli, evaluation, sharding
from train.config import Config, run_file
from train.tasks import Batch, Task

WINDOW = 24
"""Tokens that a map shows, from the first on."""

_MAX_LENGTH = 4096  # of a sequence whose dense weights are computed: 64 MiB for each head


@dataclass(frozen=True)
class Map:
    """The weights of one attention module, mean over heads.

    Attributes:
      module: its path in the model.
      weights: `(queries, keys)`, at most `WINDOW` of each.
      queries, keys: what they are, in words.
    """

    module: str
    weights: np.ndarray
    queries: Sequence[str]
    keys: Sequence[str]


@dataclass(frozen=True)
class Maps:
    """What a section has to show.

    Attributes:
      example: the first tokens of what the maps were computed on, in words; empty where it is no text.
      of: by the label of a setting its maps, at most the first and the last of its modules.
      without: by the label of a setting why it has none.
    """

    example: str
    of: Mapping[str, Sequence[Map]]
    without: Mapping[str, str]


_run_once = functools.cache(run_file)  # a name cannot be registered twice


class _Weights(nnx.Variable):
    """What `attention_weights` gave in a module's last call."""


def draw(comparison: Comparison) -> list[Maps]:
    """The maps of every section: of each setting the run of its first seed is restored."""
    total = sum(len(section.settings) for section in comparison.sections)
    with tqdm(total=total, desc="attention maps", unit="model", leave=False, disable=None) as bar:
        return [_of_section(section, bar) for section in comparison.sections]


def _of_section(section: Section, bar: Any) -> Maps:
    found: dict[str, Sequence[Map]] = {}
    without: dict[str, str] = {}
    example = ""
    for setting in section.settings:
        try:
            maps, said = of_run(setting.runs[0])
        except cli.UsageError as error:
            without[setting.label] = " ".join(str(error).split())
        else:
            if maps:
                found[setting.label], example = maps, said
            else:
                without[setting.label] = "it gave no attention weights"
        bar.update()
    return Maps(example, found, without)


def of_run(run: Run) -> tuple[list[Map], str]:
    """The maps of a run's best model on the first test example, and that example in words.

    Raises:
      UsageError: the model or its data cannot be restored.
    """
    mechanism = MECHANISMS.get(run.result["mechanism"])
    if mechanism is not None and not mechanism.weights:
        return [], ""
    try:
        config = _on_one_device(run.config)
        if Path(config.file).is_file():
            _run_once(config.file)  # it may register the task or the mechanism
        with evaluation.restored(config, run.folder) as restored:
            batch = _first_example(restored.task)
            text = restored.task.example_text(batch, 0)
            weights = attention_weights(restored.task, restored.module(), batch)
    except cli.UsageError:
        raise
    except Exception as error:  # of a damaged checkpoint or another version's settings, of no common type
        reason = str(error).strip().split("\n")[0][:200]
        raise cli.UsageError(f"its model cannot be restored: {type(error).__name__}: {reason}") from error
    chosen = dict.fromkeys([*list(weights)[:1], *list(weights)[-1:]])
    maps = [_map(module, weights[module], text, batch) for module in chosen]
    words = (text or [])[:WINDOW]
    return maps, (" " if any(len(word) > 1 for word in words) else "").join(words)


def attention_weights(task: Task, model: nnx.Module, batch: Batch) -> dict[str, np.ndarray]:
    """By path of the module, in the order of the model, `(L, M)`: the mean over heads of the first row's weights.

    The weights are those of the inputs that the module gets while `task` measures `model` on `batch`; modules that
    are called several times give those of the last call.
    """

    @nnx.jit
    def look(model: nnx.Module, batch: Batch) -> dict[str, jax.Array]:
        with _recording(model):
            task.metrics(model, batch)
        found = nnx.to_flat_state(nnx.pop(model, _Weights))
        return {".".join(map(str, path[:-1])): variable[...] for path, variable in found}

    found = jax.device_get(look(model, batch))
    order = [".".join(map(str, path)) for path, _ in nnx.iter_modules(model)]
    return {path: np.asarray(found[path], np.float32) for path in sorted(found, key=order.index)}


@contextmanager
def _recording(model: nnx.Module) -> Iterator[None]:
    """Attention modules of `model` record their weights when they are called, for as long as the body runs."""
    kinds = {type(module) for _, module in nnx.iter_modules(model) if hasattr(module, "attention_weights")}
    calls = {kind: kind.__call__ for kind in kinds}
    inherited = {kind for kind in kinds if "__call__" not in vars(kind)}

    def recording(call: Any) -> Any:
        def attend(self: Any, x: jax.Array, **arguments: Any) -> Any:
            if x.shape[1] > _MAX_LENGTH:
                raise ValueError(
                    f"dense weights of {x.shape[1]:,} tokens, more than {_MAX_LENGTH:,}, are too many"
                )
            x_0, arguments_0 = jax.tree.map(lambda array: array[:1], (x, arguments))  # rows are independent
            weights = self.attention_weights(x_0, **arguments_0)
            if weights is not None:
                record(self, _Weights, "weights", weights[0].mean(0))
            return call(self, x, **arguments)

        return attend

    try:
        for kind, call in calls.items():
            kind.__call__ = recording(call)
        yield
    finally:
        for kind, call in calls.items():
            if kind in inherited:
                del kind.__call__
            else:
                kind.__call__ = call


def _on_one_device(config: Mapping[str, Any]) -> Config:
    """The config of a run, for this machine, whatever it was trained on."""
    made = ConfigDict(copy.deepcopy(dict(config)))
    made.mesh = ConfigDict(dict.fromkeys(sharding.AXES, 1))
    return made


def _first_example(task: Task) -> Batch:
    batch = next(iter(task.eval_batches("test")))
    return {name: array[:1] for name, array in batch.items()}


def _map(module: str, weights: np.ndarray, text: Sequence[str] | None, batch: Batch) -> Map:
    queries, keys = (_names(length, text, batch) for length in weights.shape)
    return Map(module, weights[:WINDOW, :WINDOW], queries[:WINDOW], keys[:WINDOW])


def _names(length: int, text: Sequence[str] | None, batch: Batch) -> list[str]:
    """What `length` positions are: the example's tokens where they are those, else their numbers."""
    # A model may put tokens of its own in front.
    front = -1 if text is None else length - batch["tokens"].shape[1]
    if text is None or front < 0:
        return [str(position) for position in range(length)]
    return ["CLS"] * front + list(text) + ["pad"] * (length - front - len(text))
