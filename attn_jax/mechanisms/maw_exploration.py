"""What every depth of a `maw` layer would make of an example: from this its router can be taught.

A model with several such layers is explored one layer at a time, the others at their most probable depth. The
layer's router then is a bandit: its examples and their logits do not depend on what is tried, and the reward of a
depth is that of this choice alone.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import lax

from attn_jax.mechanisms.maw import AssignedDepth, MultiAttentionWeight
from attn_jax.mechanisms.maw_router import Route
from attn_jax.types import Array


def layers(model: nnx.Module) -> list[MultiAttentionWeight]:
    """The `maw` modules of a model."""
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, MultiAttentionWeight)]


def policy[T](model: nnx.Module, call: Callable[[Any], T], layer: int) -> tuple[Route, T]:
    """What one layer's router says in `call(model)`, in evaluation mode, and what the call returns.

    The gradient of the route ends at the router's own parameters. The model itself is not changed.
    """
    copy = _copy(model)
    explored = layers(copy)[layer]
    explored.reveals = True
    returned = call(copy)
    return Route(*(getattr(explored, f"aux_{name}")[...] for name in Route._fields)), returned


def explore(model: nnx.Module, call: Callable[[Any], Any], layer: int, depths: Array) -> Any:
    """`call(model)`, in evaluation mode, for each of `G` choices of one layer's depths; without gradient.

    Args:
      model: is not changed.
      call: from the model to arrays.
      layer: index in `layers(model)`.
      depths: int `(B, G)`, for the examples of that layer.

    Returns:
      What `call` does, with a first axis of `G`.
    """

    def attempt(depths: Array) -> Any:
        copy = _copy(model)
        layers(copy)[layer].assigned = AssignedDepth(depths)
        return call(copy)

    return lax.stop_gradient(lax.map(attempt, depths.T))


def _copy(model: nnx.Module) -> nnx.Module:
    graph, state = nnx.split(model)
    copy = nnx.merge(graph, jax.tree.map(lambda leaf: leaf, state))
    copy.eval()
    return copy
