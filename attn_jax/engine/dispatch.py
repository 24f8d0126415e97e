"""Which implementation runs, said once in the log; and where it runs when a mesh is set."""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax.core.spmd import get_logical_axis_rules
from jax.sharding import AxisType

from pallas_kernels.hardware import INTERPRETER, Hardware, detect

IMPLEMENTATIONS = ("dense", "xla", "mosaic", "mosaic_interpret")

_log = logging.getLogger("attn_jax")


class Choice(NamedTuple):
    """What runs an operation.

    Attributes:
      dense: whether the readable version does.
      hardware: what the fused kernel is compiled for, None for the portable path.
    """

    dense: bool = False
    hardware: Hardware | None = None

    def run(self, fused: Callable[..., Any], portable: Callable[..., Any], *arrays: Any) -> Any:
        """`fused(hardware, *arrays)` if that was chosen and the program is for a GPU, else `portable(*arrays)`."""
        if self.hardware is None:
            return portable(*arrays)
        kernel = functools.partial(fused, self.hardware)
        if self.hardware.interpret:
            return kernel(*arrays)
        return jax.lax.platform_dependent(*arrays, cuda=kernel, default=portable)


def check_name(operation: str, implementation: str | None) -> str | None:
    """`implementation`; a `ValueError` if it is neither None nor one of `IMPLEMENTATIONS`."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        supported = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"{operation}: `implementation` must be None, {supported}, got {implementation!r}")
    return implementation


def choose(
    operation: str, implementation: str | None, unsupported: Callable[[Hardware], str | None] | None = None
) -> Choice:
    """What runs `operation`; the automatic choice (None) is said once in the log, with its reason.

    Args:
      unsupported: why the fused kernel cannot run this call on a `Hardware`, None where it can. None: there is no
        fused kernel.

    Raises:
      ValueError: `implementation` is not one of `IMPLEMENTATIONS`.
      NotImplementedError: it is, but cannot be honoured.
    """
    check_name(operation, implementation)
    if implementation in ("dense", "xla"):
        return Choice(dense=implementation == "dense")
    try:
        hardware = _hardware(implementation == "mosaic_interpret", unsupported)
    except NotImplementedError as reason:
        if implementation is not None:
            raise NotImplementedError(
                f"{operation}: implementation={implementation!r} has no fused GPU kernel here: {reason}; "
                "use None, 'xla' or 'dense'"
            ) from None
        _log_once(f"{operation}: implementation 'xla' (the tiled portable path): {reason}")
        return Choice()
    if implementation is None:
        _log_once(f"{operation}: implementation 'mosaic' (the fused GPU kernel, by {hardware.instruction})")
    return Choice(hardware=hardware)


def _hardware(interpret: bool, unsupported: Callable[[Hardware], str | None] | None) -> Hardware:
    """What the kernel is compiled for; a `NotImplementedError` says why there is none."""
    if unsupported is None:
        raise NotImplementedError("none is written for this operation")
    hardware = INTERPRETER if interpret else detect()
    reason = unsupported(hardware)
    if reason is not None:
        raise NotImplementedError(reason)
    return hardware


@functools.cache
def _log_once(message: str) -> None:
    _log.info(message)


def over_rows(function: Callable[..., Any], *rows: Any) -> Any:
    """Apply `function` to every leading index of `rows` (batch times heads).

    One row after the other on a CPU, where plain 2-D products run at full speed and batched ones at a third of
    it; all rows at once elsewhere. On a CPU half-precision operands are widened first: its float32 products are
    the faster ones.
    """

    function = jax.jit(function, inline=True)  # traced once for both forms

    def one_by_one(*rows: Any) -> Any:
        if 0 in jax.tree.leaves(rows)[0].shape[:1]:
            return at_once(*rows)  # there is no first row to loop from
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
