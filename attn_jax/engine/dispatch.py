"""Which implementation runs, said once in the log; and where it runs when a mesh is set."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
from flax.core.spmd import get_logical_axis_rules
from jax.sharding import AxisType

IMPLEMENTATIONS = ("dense", "xla", "mosaic", "mosaic_interpret")

_log = logging.getLogger("attn_jax")


def resolve(operation: str, implementation: str | None) -> str:
    """Return the implementation that runs `operation`; an explicit choice that cannot be honoured raises.

    Raises:
      ValueError: `implementation` is not one of `IMPLEMENTATIONS`.
      NotImplementedError: it is one, but `operation` has none of that kind.
    """
    if implementation is None:
        _log_once(f"{operation}: implementation 'xla' (the tiled portable path; no fused kernel is available)")
        return "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{operation}: unknown implementation {implementation!r}; supported: None, 'dense', 'xla' "
            "(and, where a fused kernel exists, 'mosaic', 'mosaic_interpret')"
        )
    if implementation.startswith("mosaic"):
        raise NotImplementedError(
            f"{operation}: implementation={implementation!r} has no fused GPU kernel in this version; "
            "use None, 'xla' or 'dense'"
        )
    return implementation


@functools.cache
def _log_once(message: str) -> None:
    _log.info(message)


def over_rows(function: Callable[..., Any], *rows: Any) -> Any:
    """Apply `function` to every leading index of `rows` (batch times heads).

    One row after the other on a CPU, where plain 2-D products run at full speed and batched ones at a third of
    it; all rows at once elsewhere. On a CPU half-precision operands are widened first: its float32 products are
    the faster ones.
    """

    def one_by_one(*rows: Any) -> Any:
        return jax.lax.map(lambda row: function(*_widen(row)), rows)

    def at_once(*rows: Any) -> Any:
        return jax.vmap(function)(*rows)

    return jax.lax.platform_dependent(*rows, cpu=one_by_one, default=at_once)


def _widen(row: Any) -> Any:
    half = (jax.numpy.bfloat16, jax.numpy.float16)
    return jax.tree.map(lambda x: x.astype(jax.numpy.float32) if x.dtype in half else x, row)


def mesh_axes(logical: str, size: int) -> tuple[str, ...] | None:
    """The mesh axes over which the current logical-axis rules split a `logical` dimension of `size`.

    The engines run their loops inside `shard_map` over these: left to itself, the partitioner gathers every
    operand of a loop over rows on every device. None without a mesh, without a rule, inside a manual region, or
    where `size` does not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    rule = dict(get_logical_axis_rules()).get(logical) or ()
    automatic = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto}
    axes = tuple(a for a in ((rule,) if isinstance(rule, str) else rule) if a in automatic and mesh.shape[a] > 1)
    parts = 1
    for axis in axes:
        parts *= mesh.shape[axis]
    return axes if axes and size % parts == 0 else None
