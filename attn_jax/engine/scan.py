"""Selective scan: a linear recurrence whose coefficients depend on the token, one state `(E, N)` per sequence.

    h_t = exp(delta_t a) h_{t-1} + delta_t u_t b_t          y_t = c_t . h_t + d u_t

(Gu & Dao 2023, "Mamba", algorithm 2). With `g_t` the cotangent of `h_t`, the backward pass is the same kind of
recurrence, read from the end:

    g_t       = c_t dy_t + exp(delta_{t+1} a) g_{t+1}       r_t = exp(delta_t a) h_{t-1}  (what is retained)
    db_t      = sum_E g_t delta_t u_t                        dc_t = sum_E h_t dy_t
    du_t      = delta_t (g_t . b_t) + d dy_t                 da   = sum_t g_t r_t delta_t
    ddelta_t  = sum_N g_t r_t a + u_t (g_t . b_t)

The forward pass keeps the state at the start of every interval and nothing else; the backward pass computes the
states of one interval again. Time `O(L E N)`, memory `O(L E)` for what goes in and out and
`O(B (L / interval) E N + B chunk E N)` besides.

Three forms of the same sums. A CPU walks over time with the state as `(N, E)`: channels last fill the vector
units, one step is one fused loop, and what bounds it is the exponential. On NVIDIA GPUs a fused kernel walks over
time with the state in registers (`pallas_kernels.scan`). Everything else would wait for `L` tiny steps, so there a
chunk is one associative scan, and only the chunks follow one another. All three keep the same states, so that a
program holds them all and the platform that it is compiled for chooses.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from attn_jax.engine import dispatch
from attn_jax.engine.exponential import exp
from attn_jax.types import Array, check_floating, check_integer, check_mask, check_shape
from pallas_kernels.hardware import Hardware

# Steps between two kept states. The backward pass on a CPU holds the states of one interval and one block of
# channels: these two sizes keep them in the second-level cache (512 KiB with 16 states).
_INTERVAL = 32
_CHANNEL_BLOCK = 128


def selective_scan(
    u: Array,
    delta: Array,
    a: Array,
    b: Array,
    c: Array,
    d: Array,
    *,
    mask: Array | None = None,
    initial_state: Array | None = None,
    chunk: int = 128,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """The selective scan above, differentiable in every array including the initial and final states.

    Args:
      u: inputs `(B, L, E)`.
      delta: step sizes `(B, L, E)`, positive.
      a: `(E, N)`, negative.
      b: `(B, L, N)`.
      c: `(B, L, N)`.
      d: `(E,)`.
      mask: bool `(B, L)`, True = a real token. At the others the state stands still and `y` is 0, whatever they
        hold.
      initial_state: `(B, E, N)`, None for zeros.
      chunk: at most so many steps are computed at once where that is done; no effect on the result.
      implementation: "dense" (one step after the other, differentiated by autodiff), "xla", "mosaic" (the fused
        GPU kernel, which computes in float32), "mosaic_interpret" (the same in an interpreter, on any machine), or
        None: "mosaic" on NVIDIA GPUs where it can be had, else "xla".

    Returns:
      `y` `(B, L, E)` in the dtype of `u`, and the state after the last step `(B, E, N)`, float32. Everything is
      computed in float32 (float64 where an argument has it).

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError: an implementation that cannot be had here, with the reason.
    """
    name = "selective_scan"
    dispatch.check_name(name, implementation)
    check_shape(name, "u", u, "(B, L, E)", (None, None, None))
    check_shape(name, "a", a, "(E, N)", (u.shape[2], None))
    (batch, length, channels), states = u.shape, a.shape[1]
    check_integer(name, "chunk", chunk)
    check_shape(name, "delta", delta, "(B, L, E)", u.shape)
    check_shape(name, "b", b, "(B, L, N)", (batch, length, states))
    check_shape(name, "c", c, "(B, L, N)", (batch, length, states))
    check_shape(name, "d", d, "(E,)", (channels,))
    check_mask(name, "mask", mask, "(B, L)", (batch, length))
    given = {"u": u, "delta": delta, "a": a, "b": b, "c": c, "d": d}
    if initial_state is not None:
        check_shape(name, "initial_state", initial_state, "(B, E, N)", (batch, channels, states))
        given["initial_state"] = initial_state
    for argument, array in given.items():
        check_floating(name, argument, array)

    given = jax.tree.map(jnp.asarray, given)  # NumPy's float64 becomes JAX's default here
    u, delta, a, b, c, d = (given[argument] for argument in ("u", "delta", "a", "b", "c", "d"))
    dtype = jnp.result_type(jnp.float32, *given.values())
    if mask is not None:
        # delta = 0 keeps the state: exp(0) h + 0.
        u, delta, b, c = (jnp.where(mask[:, :, None], x, 0) for x in (u, delta, b, c))
    start = jnp.zeros((batch, channels, states), dtype) if initial_state is None else initial_state
    if not batch * length:  # nothing to compute
        return jnp.zeros_like(u), jnp.asarray(start, dtype)
    choice = dispatch.choose(
        name, implementation, lambda hardware: _kernels().unsupported(dtype, states, hardware)
    )
    inputs = [jnp.asarray(x, dtype) for x in (u, delta, a.T, b, c, d, start.swapaxes(1, 2))]
    if choice.hardware is not None:
        inputs[:2] = u, delta  # the kernel widens them on the chip

    compute = _scan_dense if choice.dense else functools.partial(_scan, chunk, choice.hardware)
    rows, columns = dispatch.mesh_axes("batch", batch), dispatch.mesh_axes("mlp", channels)
    if rows or columns:
        token, shared, state = P(rows, None, columns), P(rows), P(rows, None, columns)
        in_specs = (token, token, P(None, columns), shared, shared, P(columns), state)
        compute = jax.shard_map(compute, in_specs=in_specs, out_specs=(token, state), check_vma=False)
    y, final_state = compute(*inputs)
    if mask is not None:
        y = jnp.where(mask[:, :, None], y, 0)
    return y.astype(given["u"].dtype), final_state.swapaxes(1, 2)


# From here on the state is (B, N, E) and `a` is (N, E): channels last.


def _scan_dense(
    u: Array, delta: Array, a: Array, b: Array, c: Array, d: Array, start: Array
) -> tuple[Array, Array]:
    def step(h: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        u, delta, b, c = token
        h = jnp.exp(delta[:, None, :] * a) * h + (delta * u)[:, None, :] * b[:, :, None]
        return h, jnp.sum(c[:, :, None] * h, axis=1) + d * u

    final, y = lax.scan(step, start, tuple(jnp.moveaxis(x, 1, 0) for x in (u, delta, b, c)))
    return jnp.moveaxis(y, 0, 1), final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(
    chunk: int,
    hardware: Hardware | None,
    u: Array,
    delta: Array,
    a: Array,
    b: Array,
    c: Array,
    d: Array,
    start: Array,
) -> tuple[Array, Array]:
    return _forward(chunk, hardware, u, delta, a, b, c, d, start)[0]


# Jitted, so that layers, values and gradients share one trace.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(
    chunk: int,
    hardware: Hardware | None,
    u: Array,
    delta: Array,
    a: Array,
    b: Array,
    c: Array,
    d: Array,
    start: Array,
) -> tuple[tuple[Array, Array], Any]:
    cut = _Cut.of(u.shape[1], chunk, _interval(a.shape[0], hardware))
    y, kept, final = _on_platform(
        hardware,
        _forward_fused,
        _forward_by_step,
        functools.partial(_forward_by_chunk, cut),
        a,
        d,
        *map(cut.intervals, (u, delta, b, c)),
        start,
    )
    return (cut.join(y), final), (u, delta, a, b, c, d, kept)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(
    chunk: int, hardware: Hardware | None, residuals: Any, cotangents: tuple[Array, Array]
) -> tuple[Array, ...]:
    u, delta, a, b, c, d, kept = residuals
    dy, g = cotangents
    cut = _Cut.of(u.shape[1], chunk, _interval(a.shape[0], hardware))
    du, ddelta, db, dc, da, dd, g = _on_platform(
        hardware,
        _backward_fused,
        _backward_by_step,
        functools.partial(_backward_by_chunk, cut),
        a,
        d,
        *map(cut.intervals, (u, delta, b, c, dy)),
        kept,
        g,
    )
    du, ddelta = cut.join(du).astype(u.dtype), cut.join(ddelta).astype(delta.dtype)
    return du, ddelta, da, cut.join(db), cut.join(dc), dd, g


def _on_platform(
    hardware: Hardware | None,
    fused: Callable[..., Any],
    by_step: Callable[..., Any],
    by_chunk: Callable[..., Any],
    *arrays: Array,
) -> Any:
    """The form for the platform that the program is compiled for; `fused` only for a given `hardware`."""
    if hardware is None:
        return lax.platform_dependent(*arrays, cpu=by_step, default=by_chunk)
    kernel = functools.partial(fused, hardware)
    if hardware.interpret:
        return kernel(*arrays)

    def wide(form: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arrays: form(*(x.astype(jnp.float32) for x in arrays))

    return lax.platform_dependent(*arrays, cpu=wide(by_step), cuda=kernel, default=wide(by_chunk))


_scan.defvjp(_forward, _backward)


class _Cut(NamedTuple):
    """How a sequence is cut: chunks of `parts` intervals of `interval` steps, evenly and with little padding.

    Padding is at the end and all zero, so that it changes neither the state nor its cotangent.
    """

    length: int
    parts: int
    interval: int

    @classmethod
    def of(cls, length: int, chunk: int, interval: int | None = None) -> "_Cut":
        """`interval`: where it is prescribed."""
        steps = math.ceil(length / math.ceil(length / chunk))
        parts = math.ceil(steps / (interval or _INTERVAL))
        return cls(length, parts, interval or math.ceil(steps / parts))

    def intervals(self, x: Array) -> Array:
        """`(B, L, ...)` to `(B, intervals, interval, ...)`."""
        step = self.parts * self.interval
        padding = math.ceil(self.length / step) * step - self.length
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
        return x.reshape(x.shape[0], -1, self.interval, x.shape[2])

    def chunks(self, x: Array) -> Array:
        """`(B, intervals, interval, ...)` to `(chunks, B, chunk, ...)`."""
        return jnp.moveaxis(x.reshape(x.shape[0], -1, self.parts * self.interval, x.shape[3]), 1, 0)

    def unchunk(self, x: Array) -> Array:
        """`(chunks, B, chunk, ...)` back to `(B, intervals, interval, ...)`."""
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, self.interval, x.shape[3])

    def join(self, x: Array) -> Array:
        """`(B, intervals, interval, ...)` back to `(B, L, ...)`."""
        return x.reshape(x.shape[0], -1, x.shape[-1])[:, : self.length]


# In the registers of a GPU. The same arrays as step by step.


def _kernels() -> Any:
    from pallas_kernels import scan  # takes most of a second, for JAX's kernel language

    return scan


def _interval(states: int, hardware: Hardware | None) -> int | None:
    """What the kernels prescribe."""
    return None if hardware is None else _kernels().interval(states, hardware)


def _forward_fused(hardware: Hardware, *arrays: Array) -> tuple[Array, Array, Array]:
    return _kernels().forward(*arrays, hardware=hardware)


def _backward_fused(hardware: Hardware, *arrays: Array) -> tuple[Array, ...]:
    return _kernels().backward(*arrays, hardware=hardware)


# Step by step (CPU), one sequence after the other. u, delta, dy (B, intervals, interval, E); b, c the same with N.


def _forward_by_step(
    a: Array, d: Array, u: Array, delta: Array, b: Array, c: Array, start: Array
) -> tuple[Array, Array, Array]:
    """`y`, the states at the starts of the intervals `(B, intervals, N, E)` and the final states `(B, N, E)`."""

    def step(h: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        u, delta, b, c = token
        h = exp(delta * a) * h + (delta * u) * b[:, None]
        return h, c @ h + d * u

    def interval(carry: tuple[Array, Array], tokens: tuple[Array, ...]) -> tuple[tuple, tuple]:
        (h, final), (row, first, *xs) = carry, tokens
        h = jnp.where(first, start[row], h)
        end, y = lax.scan(step, h, tuple(xs))
        return (end, final.at[row].set(end)), (y, h)

    (_, final), (y, kept) = _over_intervals(interval, (start[0], start), (u, delta, b, c))
    return y, kept, final


def _backward_by_step(
    a: Array, d: Array, u: Array, delta: Array, b: Array, c: Array, dy: Array, kept: Array, g_final: Array
) -> tuple[Array, ...]:
    """`du, ddelta, db, dc` shaped as `u, delta, b, c`, then `da, dd` and the cotangent of the initial state."""
    width = _block_width(a.shape[1])

    def block(a: Array, d: Array, g: Array, da: Array, h: Array, tokens: tuple[Array, ...]) -> tuple[Array, ...]:
        """One interval of one block of channels."""
        u, delta, b, c, dy = tokens
        decay = exp(delta[:, None, :] * a)
        dose = delta * u

        def again(h: Array, token: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
            decay, dose, b, dy = token
            after = decay * h + dose * b[:, None]
            return after, (h, after @ dy)

        _, (before, dc) = lax.scan(again, h, (decay, dose, b, dy))

        def step(carry: tuple[Array, Array], token: tuple[Array, ...]) -> tuple[tuple, tuple]:
            (g, da), (delta, dose, b, c, dy, decay, before) = carry, token
            g = g + c[:, None] * dy
            onward = decay * g
            gr = onward * before
            # Summed over the states in plain sight: XLA turns this, and not `sum`, into one vectorised loop.
            gra = sum(gr[n] * a[n] for n in range(a.shape[0]))
            return (onward, da + gr * delta), (b @ g, gra, g @ dose)

        xs = (delta, dose, b, c, dy, decay, before)
        (g, da), (gb, gra, db) = lax.scan(step, (g, da), xs, reverse=True)
        return g, da, gb * delta + d * dy, gra + gb * u, db, dc

    def interval(carry: tuple[Array, ...], tokens: tuple[Array, ...]) -> tuple[tuple, tuple]:
        (g, da, dd, g_start), (row, last, h, u, delta, b, c, dy) = carry, tokens
        g = jnp.where(last, g_final[row], g)

        def one_block(i: Array, out: tuple[Array, ...]) -> tuple[Array, ...]:
            g, da, du, ddelta, db, dc = out

            def take(x: Array) -> Array:
                return lax.dynamic_slice_in_dim(x, i * width, width, axis=-1)

            def put(x: Array, part: Array) -> Array:
                return lax.dynamic_update_slice_in_dim(x, part, i * width, axis=-1)

            g_i, da_i, du_i, ddelta_i, db_i, dc_i = block(
                take(a), take(d), take(g), take(da), take(h), (take(u), take(delta), b, c, take(dy))
            )
            return put(g, g_i), put(da, da_i), put(du, du_i), put(ddelta, ddelta_i), db + db_i, dc + dc_i

        zeros = tuple(map(jnp.zeros_like, (u, delta, b, c)))
        g, da, *grads = lax.fori_loop(0, a.shape[1] // width, one_block, (g, da, *zeros))
        return (g, da, dd + jnp.sum(dy * u, axis=0), g_start.at[row].set(g)), tuple(grads)

    carry = (g_final[0], jnp.zeros_like(a), jnp.zeros_like(d), g_final)
    (_, da, dd, g_start), grads = _over_intervals(interval, carry, (kept, u, delta, b, c, dy), reverse=True)
    return *grads, da, dd, g_start


def _over_intervals(interval: Any, carry: Any, arrays: tuple[Array, ...], reverse: bool = False) -> Any:
    """`lax.scan` over all intervals of all sequences `(B, intervals, ...)`.

    `interval` is also given the number of its sequence and whether it is the first there to be read. One flat
    loop, because a loop over sequences would copy every sequence in and out of its body.
    """
    batch, count = arrays[0].shape[:2]
    row, position = jnp.divmod(jnp.arange(batch * count), count)
    first = position == (count - 1 if reverse else 0)
    flat = (x.reshape(batch * count, *x.shape[2:]) for x in arrays)
    carry, out = lax.scan(interval, carry, (row, first, *flat), reverse=reverse)
    return carry, tuple(x.reshape(batch, count, *x.shape[1:]) for x in out)


def _block_width(channels: int) -> int:
    """The widest divisor of `channels` up to the block size, or all of them where that would be tiny."""
    width = max(w for w in range(1, _CHANNEL_BLOCK + 1) if channels % w == 0)
    return width if 2 * width > _CHANNEL_BLOCK else channels


# Chunk by chunk (accelerators), all sequences at once. The same arrays, reshaped to (chunks, B, chunk, ...).


def _recur(decay: Array, inputs: Array, reverse: bool = False) -> Array:
    """`h_t = decay_t h_{t-1} + inputs_t` from 0 along axis 1, all `t` at once; `reverse` runs from the end."""

    def combine(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    return lax.associative_scan(combine, (decay, inputs), reverse=reverse, axis=1)[1]


def _states(a: Array, u: Array, delta: Array, b: Array, h: Array) -> tuple[Array, Array, Array]:
    """Of a chunk from `h` on: `exp(delta a)`, the states before and after each step, `(B, chunk, N, E)`."""
    decay = jnp.exp(delta[:, :, None, :] * a)
    inputs = (delta * u)[:, :, None, :] * b[:, :, :, None]
    after = _recur(decay, inputs.at[:, 0].add(decay[:, 0] * h))
    return decay, jnp.concatenate([h[:, None], after[:, :-1]], axis=1), after


def _forward_by_chunk(
    cut: _Cut, a: Array, d: Array, u: Array, delta: Array, b: Array, c: Array, start: Array
) -> tuple[Array, Array, Array]:
    def chunk(h: Array, tokens: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        u, delta, b, c = tokens
        _, before, after = _states(a, u, delta, b, h)
        return after[:, -1], (jnp.einsum("ztn,ztne->zte", c, after) + d * u, before[:, :: cut.interval])

    final, (y, kept) = lax.scan(chunk, start, tuple(map(cut.chunks, (u, delta, b, c))))
    return cut.unchunk(y), jnp.moveaxis(kept, 0, 1).reshape(*u.shape[:2], *start.shape[1:]), final


def _backward_by_chunk(
    cut: _Cut, a: Array, d: Array, u: Array, delta: Array, b: Array, c: Array, dy: Array, kept: Array, g: Array
) -> tuple[Array, ...]:
    def chunk(carry: tuple[Array, Array], tokens: tuple[Array, ...]) -> tuple[tuple, tuple]:
        (g, da), (h, u, delta, b, c, dy) = carry, tokens
        decay, before, after = _states(a, u, delta, b, h)
        next_decay = jnp.concatenate([decay[:, 1:], jnp.ones_like(decay[:, :1])], axis=1)
        g = _recur(next_decay, (c[:, :, :, None] * dy[:, :, None, :]).at[:, -1].add(g), reverse=True)
        gr = g * decay * before
        gb = jnp.einsum("ztn,ztne->zte", b, g)
        ddelta = jnp.einsum("ztne,ne->zte", gr, a) + gb * u
        db, dc = jnp.einsum("ztne,zte->ztn", g, delta * u), jnp.einsum("ztne,zte->ztn", after, dy)
        da = da + jnp.einsum("ztne,zte->ne", gr, delta)
        return (decay[:, 0] * g[:, 0], da), (gb * delta + d * dy, ddelta, db, dc)

    tokens = (jnp.moveaxis(kept[:, :: cut.parts], 1, 0), *map(cut.chunks, (u, delta, b, c, dy)))
    (g, da), grads = lax.scan(chunk, (g, jnp.zeros_like(a)), tokens, reverse=True)
    return *map(cut.unchunk, grads), da, jnp.einsum("zite,zite->e", dy, u), g
