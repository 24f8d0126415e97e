"""Every config takes every mechanism: the training step of each pair, traced and not run, on made-up data."""

import copy
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import attn_jax
from train import config as configs
from train import loop, sharding, tasks
from train.data import SPLITS, Clips, SequenceDataset
from train.data.retrieval import Collection

OURS = sorted(n for n, m in attn_jax.MECHANISMS.items() if m.module.__module__.startswith("attn_jax."))
FILES = sorted(str(path) for path in Path("configs").glob("*.py"))


def settings(file):
    """Overrides: a second layer is traced as the first, and attention of one shape is traced once for all tasks.

    The shape is of four sequences (two pairs), long enough for every mechanism to do what it is for.
    """
    shape = {}
    if "lra_" in file:
        batch_size = 2 if "lra_retrieval" in file else 4
        shape = {"batch_size": batch_size, "model.dim": 16, "model.mlp_dim": 32, "task.buckets": (4096,)}
    return [f"--config.{key}={value}" for key, value in {"mesh.data": 1, "model.num_layers": 1, **shape}.items()]


def sequences(task):
    """As many documents as two batches of pairs need, each as long as the shortest bucket."""
    number, length = 4 * task.config.batch_size, min(task.config.task.buckets)
    tokens = np.random.default_rng(0).integers(1, task.vocab_size, (number, length)).astype(np.uint16)
    return SequenceDataset.pack(list(tokens), [place // 2 % task.num_classes for place in range(number)])


def clips(task):
    number, size = 2 * task.config.batch_size, task.config.task
    frames = np.zeros((number, size.num_frames, size.height, size.width, 3), np.uint8)
    return Clips(frames, frames[..., 0], tuple(map(str, range(number))))


def collection(task):
    words = [f"{place * 7919 % 100_003:x}" for place in range(4_000)]  # enough for the vocabulary
    documents = {str(place): " ".join(words[100 * place :][:100]) for place in range(40)}
    queries = {name: text[:20] for name, text in documents.items()}
    return Collection(documents, queries, {name: {name: 1} for name in documents})


MADE_UP = {"video": clips, "rerank": collection}


@functools.cache
def prepared(file):
    """A task of `file` with made-up data, and its first training batch."""
    config = configs.load(f"{file}:smoke", settings(file))
    task: Any = tasks.TASKS[config.task.name](config)
    made = MADE_UP.get(config.task.name, sequences)(task)
    task.load = lambda: dict.fromkeys(SPLITS, made)
    task.prepare()
    return task, next(task.train_iterator(0))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("mechanism", OURS)
def test_every_config_takes_every_mechanism(file, mechanism):
    source, batch = prepared(file)
    task = copy.copy(source)
    task.config = configs.load(f"{file}:{mechanism},smoke", settings(file))
    with sharding.activate(task.config) as mesh:
        program = loop.Program.of(task.config, task, mesh)
        after, metrics = jax.eval_shape(program.train_step, program.abstract, batch)
    shapes = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
    assert shapes(after) == shapes(program.abstract)
    assert {"loss", "gradient_norm", "finite"} <= metrics.keys()
