"""The selective scan as two fused kernels: the recurrence and the gradients of `attn_jax.engine.scan`.

    h_t = exp(delta_t a) h_{t-1} + delta_t u_t b_t          y_t = c_t . h_t + d u_t

The state never leaves the registers (Gu & Dao 2023, "Mamba", section 3.3.2). A block owns 128 channels of one
sequence, one thread a channel with its states, and walks over time; the tokens come ahead of it through a pipeline
into shared memory, an interval at a time:

                 time ->   interval 0       interval 1       interval 2
                        +----------------+----------------+----------------+
      128 channels  h0  | u, delta, b, c | u, delta, b, c | u, delta, b, c |  -> final state
                        +----------------+----------------+----------------+
                        ^ kept           ^ kept           ^ kept

Kept are the states at the starts of the intervals, `N / interval` numbers per token and channel. The backward
kernel walks over the intervals from the last. In each it goes forward once and notes in shared memory the state at
the start of every group of a few steps; then it takes the groups from the last, computes their states and decays
again, holds them in registers, and walks back with

    g_t       = c_t dy_t + exp(delta_{t+1} a) g_{t+1}       r_t = exp(delta_t a) h_{t-1}
    du_t      = delta_t (g_t . b_t) + d dy_t                 ddelta_t = sum_N g_t r_t a + u_t (g_t . b_t)
    da        = sum_t g_t r_t delta_t                        dd       = sum_t dy_t u_t
    db_t      = sum_E g_t delta_t u_t                        dc_t     = sum_E h_t dy_t

`db` and `dc` are sums over threads. A group's products are written to shared memory as rows of 128 channels, one
for each step and state, and summed there by row:

      threads = channels ->
    +----------------------+
    | row (t, n): products |  - - sum by 8 threads - - ->  db or dc of (t, n), of these 128 channels
    | ...                  |
    +----------------------+

XLA adds what the blocks of channels found. More than 16 states are cut in blocks of states, each with its own
threads, and XLA adds their `y`, `du` and `ddelta`: registers hold no more than 16 states and their gradients.

On an H100 one step of the forward kernel is bound by the unit for exponentials, `N` of them per channel.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from attn_jax.types import Array
from pallas_kernels.hardware import Hardware
from pallas_kernels.instructions import Ref, Value, store
from pallas_kernels.launch import Cost, launch
from pallas_kernels.layout import round_up

_CHANNELS = 128  # of a block, one for each thread
_STATES = 16  # at most so many to a thread
_INTERVALS = (16, 8)  # steps between two kept states: the first for which shared memory suffices
_FORWARD_GROUP = 8  # steps whose results are written together
_GROUP = 4  # steps of a group in the backward kernel: registers hold their states and decays
_ROWS = _GROUP * _STATES  # of products
_REDUCTION = 2048  # bytes that the compiler takes for sums over threads
_STAGES = 2  # intervals in shared memory at once: one being read, one on its way

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2)

# One thread for each of 128 rows, which holds the row: (channels, states), (channels, steps).
_PER_CHANNEL = plgpu.Layout.TCGEN05_TMEM_NATIVE(1)

# Eight threads side by side on a row, with 4 numbers each: together all banks of shared memory, once.
_ACROSS = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 32), (4, 32), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)


class _Plan(NamedTuple):
    """How the states are cut and what a block of the kernel keeps where.

    Attributes:
      interval: steps between two kept states.
      blocks: of states.
      width: states of a block.
      columns: of a row with the `b` and `c` of a token and a block of states.
    """

    interval: int
    blocks: int
    width: int
    columns: int

    @classmethod
    def of(cls, states: int, interval: int) -> "_Plan":
        blocks = math.ceil(states / _STATES)
        width = round_up(math.ceil(states / blocks), 2)  # the compiler has no tiles of one number
        # Rows of 16 bytes for TMA, tiles of 128 numbers for cp.async.
        columns = round_up(2 * width, max(4, 128 // interval))
        return cls(interval, blocks, width, columns)

    def shared_memory(self) -> int:
        """Bytes of the backward kernel, which needs more, with float32 tokens."""
        tokens = self.interval * (3 * _CHANNELS + self.columns)
        return 4 * (_STAGES * tokens + math.prod(self.starts) + _ROWS * _CHANNELS) + _REDUCTION

    @property
    def starts(self) -> tuple[int, int, int]:
        """States at the starts of all groups of an interval but the first, whose is kept."""
        return self.interval // _GROUP - 1, self.width, _CHANNELS


def interval(states: int, hardware: Hardware) -> int:
    """Steps between two kept states: as many as fit in shared memory."""
    return _intervals(states, hardware)[0]


def unsupported(dtype: Any, states: int, hardware: Hardware) -> str | None:
    """Why the kernels cannot compute in `dtype` with so many states; None if they can. All other sizes will do."""
    if dtype != jnp.float32:
        return f"the scan kernel computes in float32, not {jnp.dtype(dtype).name}"
    if not _intervals(states, hardware):
        return f"the scan kernel needs more shared memory than {hardware.shared_memory} bytes"
    return None


def _intervals(states: int, hardware: Hardware) -> list[int]:
    return [n for n in _INTERVALS if _Plan.of(states, n).shared_memory() <= hardware.shared_memory]


def forward(
    a: Array, d: Array, u: Array, delta: Array, b: Array, c: Array, start: Array, *, hardware: Hardware
) -> tuple[Array, Array, Array]:
    """The scan over a whole number of intervals.

    Args:
      a: `(N, E)`; float32 like all but `u` and `delta`.
      d: `(E,)`.
      u: `(B, intervals, steps, E)`, float32, bfloat16 or float16; `steps` is `interval(N, hardware)`.
      delta: the same.
      b: `(B, intervals, steps, N)`.
      c: the same.
      start: the initial states `(B, N, E)`.

    Returns:
      `y` of the shape of `u`, the states at the starts of the intervals `(B, intervals, N, E)` and the final
      states `(B, N, E)`, float32.
    """
    sizes = _Sizes.of(a, u)
    y, kept, final = launch(
        functools.partial(_forward_kernel, sizes.plan, hardware),
        *sizes.operands(a, d, u, delta, b, c),
        sizes.pad_state(start),
        name="selective_scan_fwd",
        out=(sizes.token, _float32(sizes.batch, sizes.intervals, *sizes.state.shape[1:]), sizes.state),
        grid=sizes.grid,
        scratch=(),
        hardware=hardware,
        cost=sizes.cost(flops=6, exponentials=1, streams=3),
    )
    return sizes.tokens(y), sizes.crop_state(kept), sizes.crop_state(final)


def backward(
    a: Array,
    d: Array,
    u: Array,
    delta: Array,
    b: Array,
    c: Array,
    dy: Array,
    kept: Array,
    g_final: Array,
    *,
    hardware: Hardware,
) -> tuple[Array, ...]:
    """Gradients from the cotangents `dy` of `y` and `g_final` of the final states; `kept` as `forward` gave it.

    Returns:
      `du, ddelta, db, dc` of the shapes of `u, delta, b, c`, then `da, dd` and the cotangent of the initial
      states, all float32.
    """
    sizes = _Sizes.of(a, u)
    plan = sizes.plan
    groups = sizes.intervals * plan.interval // _GROUP
    sums = _float32(sizes.strips, plan.blocks, sizes.batch, groups, _ROWS)
    per_channel = _float32(plan.blocks, sizes.batch, sizes.strips * _CHANNELS)
    du, ddelta, db, dc, da, dd, g = launch(
        functools.partial(_backward_kernel, plan, hardware),
        *sizes.operands(a, d, u, delta, b, c),
        sizes.flat(dy),
        sizes.pad_state(kept),
        sizes.pad_state(g_final),
        name="selective_scan_bwd",
        out=(sizes.token, sizes.token, sums, sums, sizes.state, per_channel, sizes.state),
        grid=sizes.grid,
        scratch=(plgpu.SMEM(plan.starts, jnp.float32), plgpu.SMEM((_ROWS, _CHANNELS), jnp.float32)),
        hardware=hardware,
        cost=sizes.cost(flops=20, exponentials=2, streams=5),
    )
    return (
        sizes.tokens(du),
        sizes.tokens(ddelta),
        sizes.per_state(db),
        sizes.per_state(dc),
        sizes.crop_state(da.sum(0)),
        dd[0].sum(0)[: sizes.channels],
        sizes.crop_state(g),
    )


class _Sizes(NamedTuple):
    """The sizes of a call, and the way from its arrays to those of the kernels and back.

    Kernels see whole blocks of channels and states, padded with zeros, which change nothing.
    """

    plan: _Plan
    batch: int
    intervals: int
    channels: int
    states: int

    @classmethod
    def of(cls, a: Array, u: Array) -> "_Sizes":
        batch, intervals, steps, channels = u.shape
        return cls(_Plan.of(a.shape[0], steps), batch, intervals, channels, a.shape[0])

    @property
    def strips(self) -> int:
        """Blocks of channels."""
        return math.ceil(self.channels / _CHANNELS)

    @property
    def grid(self) -> dict[str, int]:
        return {"channels": self.strips, "states": self.plan.blocks, "batch": self.batch}

    @property
    def token(self) -> jax.ShapeDtypeStruct:
        """What blocks of states find of each token and channel."""
        return _float32(self.plan.blocks, self.batch, self.intervals * self.plan.interval, self.strips * _CHANNELS)

    @property
    def state(self) -> jax.ShapeDtypeStruct:
        return _float32(self.batch, self.plan.blocks * self.plan.width, self.strips * _CHANNELS)

    def operands(self, a: Array, d: Array, u: Array, delta: Array, b: Array, c: Array) -> tuple[Array, ...]:
        """`u` and `delta` `(B, L, E)`; `a` `(N, E)`, for powers of 2; `bc` `(blocks, B, L, columns)`;
        `d` `(blocks, E)`.

        A row of `bc` is the `b` and then the `c` of a token and a block of states. `d` is 0 but in the first
        block, since the `y` of all are added.
        """
        plan = self.plan

        def by_block(x: Array) -> Array:
            x = _pad(x, 3, plan.blocks * plan.width)
            x = x.reshape(self.batch, self.intervals * plan.interval, plan.blocks, plan.width)
            return jnp.moveaxis(x, 2, 0)

        bc = _pad(jnp.concatenate([by_block(b), by_block(c)], axis=3), 3, plan.columns)
        d = _pad(_pad(d[None], 1, self.strips * _CHANNELS), 0, plan.blocks)
        return self.flat(u), self.flat(delta), self.pad_state(a * _LOG2_E), bc, d

    def flat(self, x: Array) -> Array:
        """`(B, intervals, interval, E)` to `(B, L, E)`."""
        x = x.reshape(self.batch, self.intervals * self.plan.interval, self.channels)
        return _pad(x, 2, self.strips * _CHANNELS)

    def tokens(self, x: Array) -> Array:
        """`(blocks, B, L, E)` back to `(B, intervals, interval, E)`, summed."""
        x = x[..., : self.channels].sum(0)
        return x.reshape(self.batch, self.intervals, self.plan.interval, self.channels)

    def per_state(self, x: Array) -> Array:
        """`(strips, blocks, B, groups, rows)` to `(B, intervals, interval, N)`, summed."""
        plan = self.plan
        x = x.sum(0)[..., : _GROUP * plan.width].reshape(plan.blocks, self.batch, -1, plan.width)
        x = jnp.moveaxis(x, 0, 2).reshape(self.batch, self.intervals, plan.interval, plan.blocks * plan.width)
        return x[..., : self.states]

    def pad_state(self, x: Array) -> Array:
        """`(..., N, E)` to whole blocks."""
        x = _pad(x, x.ndim - 2, self.plan.blocks * self.plan.width)
        return _pad(x, x.ndim - 1, self.strips * _CHANNELS)

    def crop_state(self, x: Array) -> Array:
        return x[..., : self.states, : self.channels]

    def cost(self, flops: int, exponentials: int, streams: int) -> Cost:
        """From what one step, channel and state takes, and how many arrays like `u` go in and out."""
        tokens, states = math.prod(self.token.shape[1:]), self.plan.blocks * self.plan.width
        kept = tokens * states // self.plan.interval
        return Cost(flops * tokens * states, exponentials * tokens * states, 4 * (streams * tokens + kept))


# Kernels. Within a block, values are (channels, states) or (channels, steps), one thread for each channel.


class _Block(NamedTuple):
    """Which channels, states and sequence a block owns."""

    channels: Any
    states: Any
    batch: Any

    @classmethod
    def here(cls) -> "_Block":
        return cls(*(lax.axis_index(name) for name in cls._fields))

    @property
    def strip(self) -> Any:
        return pl.ds(self.channels * _CHANNELS, _CHANNELS)

    def state(self, plan: _Plan) -> tuple[Any, Any]:
        """The block's part of an array `(N, E)`."""
        return pl.ds(self.states * plan.width, plan.width), self.strip


def _forward_kernel(
    plan: _Plan,
    hardware: Hardware,
    u_ref: Ref,
    delta_ref: Ref,
    a_ref: Ref,
    bc_ref: Ref,
    d_ref: Ref,
    start_ref: Ref,
    y_ref: Ref,
    kept_ref: Ref,
    final_ref: Ref,
) -> None:
    block = _Block.here()
    state = block.state(plan)
    a = _load(a_ref.at[state])
    d = plgpu.load(d_ref.at[block.states, block.strip], optimized=False)

    def over_interval(index: tuple[Value], u: Ref, delta: Ref, bc: Ref, h: Value) -> Value:
        (i,) = index
        _store(kept_ref.at[block.batch, i, *state], h)

        def over_group(k: Value, h: Value) -> Value:
            ys = []
            for t in _steps(k, _FORWARD_GROUP):
                token = _Token.read(plan, t, u, delta, bc)
                h = token.step(token.decay(a), h)
                ys.append(_over_states(h * token.c) + d * token.u)
            steps = pl.ds(i * plan.interval + k * _FORWARD_GROUP, _FORWARD_GROUP)
            _store(y_ref.at[block.states, block.batch, steps, block.strip], _columns(ys))
            return h

        h = lax.fori_loop(0, plan.interval // _FORWARD_GROUP, over_group, h)
        _release(hardware)
        return h

    h = _walk(plan, block, over_interval, (u_ref, delta_ref), bc_ref, _load(start_ref.at[block.batch, *state]))
    _store(final_ref.at[block.batch, *state], h)


def _backward_kernel(
    plan: _Plan,
    hardware: Hardware,
    u_ref: Ref,
    delta_ref: Ref,
    a_ref: Ref,
    bc_ref: Ref,
    d_ref: Ref,
    dy_ref: Ref,
    kept_ref: Ref,
    g_final_ref: Ref,
    du_ref: Ref,
    ddelta_ref: Ref,
    db_ref: Ref,
    dc_ref: Ref,
    da_ref: Ref,
    dd_ref: Ref,
    g_ref: Ref,
    starts: Ref,
    products: Ref,
) -> None:
    block = _Block.here()
    state = block.state(plan)
    count, groups = u_ref.shape[1] // plan.interval, plan.interval // _GROUP
    a = _load(a_ref.at[state])
    d = plgpu.load(d_ref.at[block.states, block.strip], optimized=False)

    def over_interval(index: tuple[Value], u: Ref, delta: Ref, dy: Ref, bc: Ref, carry: tuple) -> tuple:
        i = count - 1 - index[0]
        kept = kept_ref.at[block.batch, i, *state]

        def advance(k: Value, h: Value) -> Value:
            """To the start of group `k + 1`."""
            for t in _steps(k, _GROUP):
                token = _Token.read(plan, t, u, delta, bc)
                h = token.step(token.decay(a), h)
            _store(starts.at[k], h)
            return h

        def again(k: Value, dd: Value) -> tuple[list[Value], list[Value], Value]:
            """The decays of group `k` and the states before its steps; `dc`, and `dd` so far."""
            h = lax.cond(k > 0, lambda: _load(starts.at[k - 1]), lambda: _load(kept))
            decays, before = [], []
            for row, t in enumerate(_steps(k, _GROUP)):
                token, dy_t = _Token.read(plan, t, u, delta, bc), dy[t].astype(jnp.float32)
                decays.append(token.decay(a))
                before.append(h)
                h = token.step(decays[-1], h)
                _store(_product(plan, products, row), h * _wide(dy_t, h.shape))
                dd = dd + dy_t * token.u
            store(dc_ref.at[block.channels, block.states, block.batch, i * groups + k], _row_sums(products))
            return decays, before, dd

        def over_group(turn: Value, carry: tuple) -> tuple:
            """Back through group `k`."""
            g, da, dd = carry
            k = groups - 1 - turn
            decays, before, dd = again(k, dd)
            du, ddelta = [], []
            for row, t in reversed(list(enumerate(_steps(k, _GROUP)))):
                token, dy_t = _Token.read(plan, t, u, delta, bc), dy[t].astype(jnp.float32)
                g = g + token.c * _wide(dy_t, g.shape)
                _store(_product(plan, products, row), g * _wide(token.dose, g.shape))
                gb = _over_states(g * token.b)
                g = decays[row] * g
                gr = g * before[row]
                du.insert(0, gb * token.delta + d * dy_t)
                ddelta.insert(0, _over_states(gr * a) * _LN_2 + gb * token.u)
                da = da + gr * _wide(token.delta, gr.shape)
            store(db_ref.at[block.channels, block.states, block.batch, i * groups + k], _row_sums(products))
            steps = pl.ds(i * plan.interval + k * _GROUP, _GROUP)
            for ref, values in ((du_ref, du), (ddelta_ref, ddelta)):
                _store(ref.at[block.states, block.batch, steps, block.strip], _columns(values))
            return _pinned(g), _pinned(da), dd

        lax.fori_loop(0, groups - 1, advance, _load(kept))
        carry = lax.fori_loop(0, groups, over_group, carry)
        _release(hardware)
        return carry

    zero = jnp.zeros((_CHANNELS, plan.width), jnp.float32)
    carry = _load(g_final_ref.at[block.batch, *state]), zero, jnp.zeros(_CHANNELS, jnp.float32)
    streams = u_ref, delta_ref, dy_ref
    g, da, dd = _walk(plan, block, over_interval, streams, bc_ref, carry, reverse=True)
    _store(g_ref.at[block.batch, *state], g)
    _store(da_ref.at[block.batch, *state], da)
    store(dd_ref.at[block.states, block.batch, block.strip], dd)


class _Token(NamedTuple):
    """What a step reads: of each channel `u` and `delta`, of each state `b` and `c`."""

    u: Value
    delta: Value
    dose: Value
    b: Value
    c: Value

    @classmethod
    def read(cls, plan: _Plan, t: Value, u: Ref, delta: Ref, bc: Ref) -> "_Token":
        def per_state(first: int) -> Value:
            values = bc[t, pl.ds(first, plan.width)]
            return lax.broadcast_in_dim(values, (_CHANNELS, plan.width), (1,))

        u_t, delta_t = u[t].astype(jnp.float32), delta[t].astype(jnp.float32)
        return cls(u_t, delta_t, delta_t * u_t, per_state(0), per_state(plan.width))

    def decay(self, a: Value) -> Value:
        return jnp.exp2(_wide(self.delta, a.shape) * a)

    def step(self, decay: Value, h: Value) -> Value:
        return _pinned(decay * h + _wide(self.dose, h.shape) * self.b)


def _walk(
    plan: _Plan,
    block: _Block,
    over_interval: Any,
    streams: tuple[Ref, ...],
    bc_ref: Ref,
    carry: Any,
    reverse: bool = False,
) -> Any:
    """`over_interval(index, *tiles of streams, tile of bc, carry)` for every interval, `reverse` from the last."""
    count = bc_ref.shape[2] // plan.interval

    def tile(columns: int, column: Any) -> Any:
        def place(i: Value) -> tuple[Value, Value]:
            return (count - 1 - i if reverse else i), column

        return plgpu.BlockSpec((plan.interval, columns), place)

    pipeline = plgpu.emit_pipeline(
        over_interval,
        grid=(count,),
        in_specs=[*(tile(_CHANNELS, block.channels) for _ in streams), tile(plan.columns, 0)],
        init_carry=carry,
        max_concurrent_steps=_STAGES,
    )
    return pipeline(*(stream.at[block.batch] for stream in streams), bc_ref.at[block.states, block.batch])


def _release(hardware: Hardware) -> None:
    """Before the next copy overwrites what was read."""
    if hardware.tma:
        plgpu.commit_smem()


def _steps(k: Value, group: int) -> list[Value]:
    return [k * group + j for j in range(group)]


def _load(ref: Ref) -> Value:
    """`(states, channels)` in memory to `(channels, states)`."""
    return plgpu.load(ref.transpose((1, 0)), layout=_PER_CHANNEL, optimized=False)


def _store(ref: Ref, value: Value) -> None:
    store(ref.transpose((1, 0)), value)


def _pinned(value: Value) -> Value:
    return plgpu.layout_cast(value, _PER_CHANNEL)


def _wide(per_channel: Value, shape: tuple[int, ...]) -> Value:
    return lax.broadcast_in_dim(per_channel, shape, (0,))


def _over_states(value: Value) -> Value:
    return jnp.sum(value, axis=1)


def _columns(values: list[Value]) -> Value:
    """Values per channel, one for each step, to `(channels, steps)`."""
    return _pinned(lax.concatenate([_wide(value, (_CHANNELS, 1)) for value in values], 1))


def _product(plan: _Plan, products: Ref, step: int) -> Ref:
    """The rows of one step of a group."""
    return products.at[pl.ds(step * plan.width, plan.width)]


def _row_sums(products: Ref) -> Value:
    return jnp.sum(plgpu.load(products, layout=_ACROSS, optimized=False), axis=1)


# Arrays.


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _pad(x: Array, axis: int, size: int) -> Array:
    """Zeros at the end of `axis`, up to `size`."""
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])
