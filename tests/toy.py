"""A task and a model that take milliseconds, with all that training has to carry; also a config file.

The model has dropout, parameters with logical axes, and a variable that is no parameter: a running mean of the
features, as a codebook would be. `TOY_EVENT=kill:13` in the environment makes something happen as batch 13
(counted from 1 in this process) is fetched: `term` sends the signal, `kill` too but up to half a second later,
before or after a checkpoint is written or in the middle; `inf` makes the loss infinite.
"""

import os
import random
import signal
import time

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from train.config import experiment
from train.data import SequenceDataset, batches
from train.tasks import TASKS, Task

VOCAB_SIZE, NUM_CLASSES = 12, 4
BUCKETS = (16,)


class RunningMean(nnx.Variable):
    pass


class ToyModel(nnx.Module):
    def __init__(self, config, rngs: nnx.Rngs):
        dim, hidden = config.dim, config.hidden
        embed = nnx.initializers.normal(1.0)
        dense = nnx.initializers.lecun_normal()
        self.embed = nnx.Embed(
            VOCAB_SIZE, dim, embedding_init=nnx.with_partitioning(embed, (None, "embed")), rngs=rngs
        )
        self.up = nnx.Linear(dim, hidden, kernel_init=nnx.with_partitioning(dense, ("embed", "mlp")), rngs=rngs)
        self.down = nnx.Linear(hidden, dim, kernel_init=nnx.with_partitioning(dense, ("mlp", "embed")), rngs=rngs)
        self.head = nnx.Linear(dim, NUM_CLASSES, rngs=rngs)
        self.gain = nnx.Param(jnp.ones((dim, 1)), weight_decay=False)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.mean = RunningMean(jnp.zeros(dim))

    def __call__(self, tokens, mask):
        x = jnp.where(mask[..., None], self.embed(tokens), 0).sum(1) / jnp.maximum(mask.sum(1, keepdims=True), 1)
        x = x + self.down(self.dropout(nnx.relu(self.up(x))))
        if not self.dropout.deterministic:
            self.mean[...] = 0.9 * self.mean[...] + 0.1 * x.mean(0)
        return self.head((x + self.mean[...]) * self.gain[:, 0])


class Toy(Task):
    primary = "accuracy"
    better = "higher"

    def prepare(self):
        task = self.config.task
        self.data = {split: _data(seed, n) for seed, (split, n) in enumerate(task.sizes.items())}

    @property
    def steps_per_epoch(self):
        return batches.num_batches(len(self.data["train"]), self.config.batch_size)

    def model(self, rngs):
        return ToyModel(self.config.model, rngs)

    def train_iterator(self, seed):
        size = self.config.batch_size
        return Eventful(batches.train_iterator(self.data["train"], batch_size=size, buckets=BUCKETS, seed=seed))

    def eval_batches(self, split):
        return batches.eval_batches(self.data[split], batch_size=self.config.eval_batch_size, buckets=BUCKETS)

    def metrics(self, model, batch):
        logits = model(batch["tokens"], batch["mask"])
        weight = batch["example_mask"].astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        losses *= batch.get("scale", 1.0)
        correct = (logits.argmax(-1) == batch["label"]).astype(jnp.float32)
        return {"loss": (losses, weight), "accuracy": (correct, weight)}

    def baselines(self, split):
        return {"majority": float(np.bincount(self.data[split].labels).max() / len(self.data[split]))}


class Eventful:
    """A data iterator during which the event of `TOY_EVENT` happens."""

    def __init__(self, iterator):
        self.iterator = iterator
        self.get_state, self.set_state = iterator.get_state, iterator.set_state
        self.event, _, at = os.environ.get("TOY_EVENT", ":0").partition(":")
        self.remaining = int(at)

    def __next__(self):
        self.remaining -= 1
        due = self.event if self.remaining == 0 else ""
        if due == "kill":
            time.sleep(random.uniform(0, 0.5))
            os.kill(os.getpid(), signal.SIGKILL)
        if due == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        batch = next(self.iterator)
        return batch | {"scale": np.full(len(batch["label"]), np.inf if due == "inf" else 1.0, np.float32)}


def _data(seed: int, size: int) -> SequenceDataset:
    """The label is the most frequent token modulo the number of classes."""
    draw = np.random.default_rng(seed)
    sequences = [draw.integers(1, VOCAB_SIZE, draw.integers(3, BUCKETS[-1] + 1), np.uint8) for _ in range(size)]
    labels = [int(np.bincount(sequence).argmax()) % NUM_CLASSES for sequence in sequences]
    return SequenceDataset.from_bytes([sequence.tobytes() for sequence in sequences], labels)


TASKS["toy"] = Toy

DEFAULT = {
    "comparability": "a toy",
    "task": {"name": "toy", "sizes": {"train": 100, "val": 24, "test": 26}},
    "model": {"dim": 16, "hidden": 32, "dropout": 0.2},
    "batch_size": 8,
    "eval_batch_size": 8,
    "steps": 24,
    "log_every": 5,
    "eval_every": 8,
    "optimizer": {"warmup_steps": 4, "learning_rate": 0.01},
}


def get_config(variant: str = ""):
    return experiment("toy", variant, default=DEFAULT, smoke={"steps": 8}, paper={"model": {"hidden": 64}})
