"""What the training loop and the evaluation ask of a task."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import grain
import jax.numpy as jnp
from flax import nnx

from attn_jax.types import Array
from train.config import Config

Batch = Mapping[str, Any]
"""Arrays whose first axis is the batch, by name."""

Metrics = dict[str, tuple[Array, Array]]
"""By name, a value for each example `(B,)` and its weight `(B,)`: 0 for a dummy, or where a value is undefined."""


class Task(ABC):
    """Data, a model, and what is minimised and measured; made from the whole config of a run.

    Attributes:
      primary: the metric that early stopping and reports look at.
      better: whether `primary` is better where it is higher or lower.
    """

    primary: str
    better: Literal["higher", "lower"]

    def __init__(self, config: Config):
        self.config = config

    @abstractmethod
    def prepare(self) -> None:
        """Finds, reads or makes the data; must come before all that follows. May take minutes, says so.

        Raises:
          ValueError: the data is missing or malformed, or the settings for it are.
        """

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Training batches that hold every example once."""

    @abstractmethod
    def model(self, rngs: nnx.Rngs) -> nnx.Module:
        """The untrained model, a function of `config` and of what `prepare` found."""

    @property
    def pretrained(self) -> Path | None:
        """The work directory of a run from whose best model this one starts."""
        return None

    def model_arguments(self) -> dict[str, Any]:
        """What the config says about the model, the mechanism and the types, as arguments of a model."""
        config = self.config
        return {
            "mechanism": config.mechanism.name,
            "options": {key: value for key, value in config.mechanism.items() if key != "name"},
            "dtype": jnp.dtype(config.dtype),
            "param_dtype": jnp.dtype(config.param_dtype),
            **config.model,
        }

    @abstractmethod
    def train_iterator(self, seed: int) -> grain.DatasetIterator:
        """Endless training batches, a function of `seed` and the position in `get_state()`."""

    @abstractmethod
    def eval_batches(self, split: str) -> Iterable[Batch]:
        """Batches that hold every example of the split `val` or `test` once."""

    @abstractmethod
    def metrics(self, model: nnx.Module, batch: Batch) -> Metrics:
        """Everything measured on a batch; `loss` and `primary` are among it."""

    @abstractmethod
    def baselines(self, split: str) -> dict[str, float]:
        """What trivial predictors reach in `primary` on `split`, by name."""

    def example_text(self, batch: Batch, row: int) -> list[str] | None:
        """The tokens of the example `row` in words, for the axes of plots; None where they are no text."""
        return None

    def loss(self, model: nnx.Module, batch: Batch) -> tuple[Array, dict[str, Array]]:
        """The scalar that training minimises, and the means to log beside it."""
        return means_of(self.metrics(model, batch))


def means_of(metrics: Metrics) -> tuple[Array, dict[str, Array]]:
    """The mean loss, and all other means by name."""
    means = {name: _weighted_mean(*pair) for name, pair in metrics.items()}
    return means.pop("loss"), means


def _weighted_mean(values: Array, weights: Array) -> Array:
    """Of `values` `(B,)`; those of weight 0 may be anything."""
    return jnp.sum(jnp.where(weights > 0, values * weights, 0)) / weights.sum()
