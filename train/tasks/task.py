"""What the training loop and the evaluation ask of a task."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import grain
from flax import nnx

from attn_jax.types import Array
from train.config import Config

Batch = Mapping[str, Any]
"""Arrays whose first axis is the batch, by name."""

Metrics = dict[str, tuple[Array, Array]]
"""A sum over examples and the number of examples it is over, by name."""


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
        """The untrained model."""

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

    def loss(self, model: nnx.Module, batch: Batch) -> tuple[Array, dict[str, Array]]:
        """The scalar that training minimises, and the means to log beside it."""
        means = {name: total / count for name, (total, count) in self.metrics(model, batch).items()}
        return means.pop("loss"), means
