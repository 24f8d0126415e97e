"""A start from the best model of an earlier run: what the two models share is taken over, the rest is fresh."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train import sharding
from train.checkpoints import best_arrays
from train.cli import UsageError
from train.state import TrainState

logger = logging.getLogger(__name__)

_OF_MECHANISM = "attention"  # the name that a block gives to its mechanism


def start(state: TrainState, workdir: Path) -> TrainState:
    """`state`, before its first step, with the arrays of the best model of the run in `workdir`.

    An array is known by its path. Those of the mechanisms may differ: what is not there, or of another shape,
    stays as it is; with the same mechanism all are taken. Random state stays as it is, too.

    Raises:
      UsageError: there is no model, or the two differ outside of the mechanisms.
    """
    found = {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(best_arrays(workdir))}
    taken, fresh = [], []

    def choose(path: Any, leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        name = _path(path)
        theirs = found.get(name)
        if theirs is not None and theirs.shape == leaf.shape:
            taken.append(name)
            return sharding.put(np.asarray(theirs).astype(leaf.dtype), leaf.sharding)
        if _OF_MECHANISM not in name:
            there = "missing" if theirs is None else f"of shape {theirs.shape}"
            raise UsageError(
                f"the model in {workdir} is another one: {'.'.join(name)} of shape {leaf.shape} is {there} there;"
                " start from a run with the same model settings"
            )
        fresh.append(name)
        return leaf

    model = state.model
    params, rest = (jax.tree_util.tree_map_with_path(choose, tree) for tree in (model.params, model.rest))
    logger.info(
        "%d arrays from the best model in %s; fresh: %s",
        len(taken),
        workdir,
        ", ".join(sorted({".".join(name[name.index(_OF_MECHANISM) :]) for name in fresh})) or "none",
    )
    return replace(state, model=replace(model, params=params, rest=rest))


def _path(keys: Any) -> tuple[str, ...]:
    """The names on the way to a leaf, the same whether it comes from a model or from a file."""
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)
