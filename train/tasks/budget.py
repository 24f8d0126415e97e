"""Models of equal size: the width of the MLPs makes up for what a mechanism has more or less than another."""

import copy
import logging

import jax
from flax import nnx

from train.config import Config
from train.tasks.task import Task

TOLERANCE = 0.02

logger = logging.getLogger(__name__)


def within_budget(task: Task, budget: int) -> Config:
    """The config of `task` with the `model.mlp_dim` that brings its model to `budget` parameters; says which.

    Raises:
      ValueError: its model has no such setting, or no width comes within 2 % of the budget.
    """
    if "mlp_dim" not in task.config.model:
        name = task.config.task.name
        raise ValueError(f"parameter_budget sets model.mlp_dim, which the model of task `{name}` does not have")
    first, second = (num_parameters(task, _with_width(task.config, width)) for width in (1, 2))
    fixed, slope = 2 * first - second, second - first  # linear: every matrix has the width once
    width = max(1, round((budget - fixed) / slope))
    config = _with_width(task.config, width)
    count = num_parameters(task, config)
    if abs(count - budget) > TOLERANCE * budget:
        raise ValueError(
            f"parameter_budget {budget:,} cannot be met within {TOLERANCE:.0%}: with `{config.mechanism.name}`"
            f" and model.mlp_dim {width} there are {count:,} parameters; give at least {first:,}"
        )
    logger.info("model.mlp_dim %d: %s parameters, budget %s", width, f"{count:,}", f"{budget:,}")
    return config


def num_parameters(task: Task, config: Config) -> int:
    """Number of trained scalars in the model of `task` under another config; computes nothing."""
    task = copy.copy(task)
    task.config = config
    model = nnx.eval_shape(lambda: task.model(nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _with_width(config: Config, width: int) -> Config:
    config = copy.deepcopy(config)
    config.model.mlp_dim = width
    return config
