"""The model split once into its definition and its arrays, and everything that one training step changes."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from train import sharding
from train.cli import user_errors
from train.tasks import Task


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ModelState:
    """The arrays of a model: what evaluation needs.

    Attributes:
      step: int32 `()`, training steps taken to get here.
      params: what the optimizer changes (`nnx.Param`).
      rest: all other variables: dropout keys and counts, codebooks, projections.
    """

    step: Any
    params: Any
    rest: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a training step reads and writes."""

    model: ModelState
    opt_state: Any


@dataclass(frozen=True)
class ModelDef:
    """What is constant about a model.

    Attributes:
      train, eval: definitions that `nnx.merge` with the same arrays, in training and in evaluation mode.
      abstract: `ModelState` of shapes, types and shardings.
      variables: the abstract `nnx.Param`s, which carry metadata.
    """

    train: nnx.GraphDef
    eval: nnx.GraphDef
    abstract: ModelState
    variables: nnx.State


def define(task: Task, mesh: Mesh) -> ModelDef:
    """Builds the model of `task` without computing anything.

    Raises:
      UsageError: the task's or mechanism's settings are not supported, or do not fit the mesh.
    """
    with user_errors(ValueError, TypeError, NotImplementedError):
        model = nnx.eval_shape(lambda: task.model(nnx.Rngs(0)))
    model.train()
    train_def, params, rest = nnx.split(model, nnx.Param, ...)
    model.eval()
    step = jax.ShapeDtypeStruct((), "int32", sharding=sharding.replicated(mesh))
    abstract = ModelState(step, sharding.abstract(params, mesh), sharding.abstract(rest, mesh))
    return ModelDef(train_def, nnx.graphdef(model), abstract, params)


def abstract_train_state(model: ModelDef, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the whole state; the optimizer's arrays lie where their parameters do."""

    def place(leaf: jax.ShapeDtypeStruct, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    everywhere = sharding.replicated(mesh)
    params = model.abstract.params
    opt_state = optax.tree_map_params(
        optimizer,
        lambda leaf, param: place(leaf, param.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda leaf: place(leaf, everywhere),
    )
    return TrainState(model.abstract, opt_state)


def initial_train_state(
    task: Task, optimizer: optax.GradientTransformation, seed: int, abstract: TrainState
) -> TrainState:
    """The state before the first step, a function of `seed` alone, created where `abstract` says."""

    def create() -> TrainState:
        _, params, rest = nnx.split(task.model(nnx.Rngs(seed)), nnx.Param, ...)
        model = ModelState(jnp.int32(0), nnx.as_pure(params), nnx.as_pure(rest))
        return TrainState(model, optimizer.init(model.params))

    return jax.jit(create, out_shardings=shardings_of(abstract))()


def shardings_of(abstract: Any) -> Any:
    """The sharding of each leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def num_parameters(model: ModelDef) -> int:
    """Number of trained scalars."""
    return sum(leaf.size for leaf in jax.tree.leaves(model.abstract.params))
