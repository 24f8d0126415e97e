"""The fused selective scan against the recurrence in float64; see tests/kernels.py for where it runs."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.engine import scan as engine
from attn_jax.ops import selective_scan
from pallas_kernels import scan as kernels
from pallas_kernels.hardware import INTERPRETER, SHARED_MEMORY, Hardware
from tests.kernels import IMPLEMENTATION, ON_GPU, only_interpreted, reports_race
from tests.test_recurrence import oracle_scan, scan_inputs

# Relative to the largest entry of each array. float32: chains of some hundred products and sums, on a GPU of
# exponentials that are wrong by 2 units in the last place. Results are rounded to the 8 bits of bfloat16 or the 11
# of float16, by half a unit in the last place; what goes in is the same on both sides.
FLOAT32 = 1e-5 if ON_GPU else 2e-6
HALF = {"bfloat16": 2**-8 + FLOAT32, "float16": 2**-11 + FLOAT32}


def cotangents(inputs):
    """Of the output and the final state, exact in all dtypes."""
    rng = np.random.default_rng(99)
    return [rng.integers(-8, 8, inputs[name].shape) / 4 for name in ("u", "initial_state")]


def differentiated(inputs, mask):
    """Output, final state, and every gradient under random cotangents of both."""

    @jax.jit
    def run(inputs, mask, g, h):
        # A short chunk, so that there are several.
        scan = functools.partial(selective_scan, mask=mask, chunk=20, implementation=IMPLEMENTATION)
        (y, final), pull = jax.vjp(lambda inputs: scan(**inputs), inputs)
        return (y, final), pull((g.astype(y.dtype), h.astype(final.dtype)))[0]

    return run(inputs, mask, *cotangents(inputs))


def oracle_gradients(u, delta, a, b, c, d, initial_state, mask=None):
    """In float64 under the same cotangents: the recurrence, and its adjoint from the end."""
    dy, g = cotangents({"u": u, "initial_state": initial_state})
    real = np.ones(u.shape[:2]) if mask is None else np.float64(mask)
    u, delta, b, c, dy = (x * real[..., None] for x in (u, delta, b, c, dy))
    decay, dose = np.exp(delta[..., None] * a), (delta * u)[..., None]
    states = [initial_state]
    for t in range(u.shape[1]):
        states.append(decay[:, t] * states[-1] + dose[:, t] * b[:, t, None])
    du, ddelta, db, dc = map(np.zeros_like, (u, delta, b, c))
    da = np.zeros_like(a)
    for t in reversed(range(u.shape[1])):
        g = g + c[:, t, None] * dy[:, t, :, None]
        gb, gr = (g * b[:, t, None]).sum(-1), g * decay[:, t] * states[t]
        du[:, t] = delta[:, t] * gb + d * dy[:, t]
        ddelta[:, t] = ((gr * a).sum(-1) + u[:, t] * gb) * real[:, t, None]
        db[:, t], dc[:, t] = (g * dose[:, t]).sum(1), (states[t + 1] * dy[:, t, :, None]).sum(1)
        da += (gr * delta[:, t, :, None]).sum(0)
        g = decay[:, t] * g
    dd = (dy * u).sum((0, 1))
    db, dc = db * real[..., None], dc * real[..., None]
    return {"u": du, "delta": ddelta, "a": da, "b": db, "c": dc, "d": dd, "initial_state": g}


def assert_close(actual, expected, tolerance):
    for (path, want), got in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual)):
        want, got = np.asarray(want, np.float64), np.asarray(got, np.float64)
        assert want.shape == got.shape
        error = np.abs(got - want).max() / np.abs(want).max()
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"


def rounded(inputs, dtypes=None):
    """What the kernels get to see: float32 unless said otherwise."""
    return {name: jnp.asarray(x, (dtypes or {}).get(name, "float32")) for name, x in inputs.items()}


def widened(inputs):
    return {name: np.asarray(x, np.float64) for name, x in inputs.items()}


def check(inputs, mask=None, tolerance=FLOAT32):
    """The kernels agree with the recurrence, and their gradients with its own."""
    wide = widened(inputs)
    actual = differentiated(inputs, mask)
    assert {n: x.dtype for n, x in actual[1].items()} == {n: x.dtype for n, x in inputs.items()}
    assert_close(actual, (oracle_scan(**wide, mask=mask), oracle_gradients(**wide, mask=mask)), tolerance)


@pytest.mark.parametrize("length,batch,channels,states", [(1, 2, 5, 1), (7, 1, 130, 4), (34, 1, 6, 16)])
def test_the_kernels_are_the_recurrence(length, batch, channels, states):
    """Ragged lengths and channels, more than one interval and block of channels, one state and as many as a thread
    holds."""
    check(rounded(scan_inputs(length, length, batch, channels, states)))


def test_more_states_than_a_thread_holds_and_masked_tokens():
    """Three blocks of states, the last one padded."""
    check(rounded(scan_inputs(0, 9, 1, 3, 35)), mask=np.random.default_rng(0).random((1, 9)) < 0.7)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_inputs(dtype):
    dtypes = {"u": dtype, "delta": dtype}
    check(rounded(scan_inputs(1, 20, 1, 6, 4), dtypes), tolerance=HALF[dtype])


@only_interpreted
def test_a_missing_commit_is_a_race(monkeypatch, capsys):
    """Reads of tokens must be over before the next copy overwrites them."""
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    inputs = rounded(scan_inputs(2, 70, 1, 2, 2))
    scan = jax.jit(lambda inputs: selective_scan(**inputs, implementation="mosaic_interpret"))
    assert reports_race(lambda: scan(inputs), capsys)


def in_order(arrays):
    """As `engine._scan` takes its arguments."""
    u, delta, a, b, c, d, start = arrays.values()
    return u, delta, a.T, b, c, d, start.swapaxes(1, 2)


@only_interpreted
@pytest.mark.parametrize("chunk", [5, 128])
@pytest.mark.parametrize("by_chunk", [False, True])
def test_a_program_for_a_gpu_runs_elsewhere(chunk, by_chunk, monkeypatch):
    """In the portable forms, which then keep the states that the kernels would keep."""
    if by_chunk:
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *xs, cpu, cuda, default: default(*xs))
    hardware = Hardware.of_capability("9.0")
    inputs = rounded(scan_inputs(3, 40, 2, 6, 3))
    g, h = map(np.float32, cotangents(inputs))

    def run(*arguments):
        results, pull = jax.vjp(lambda *xs: engine._scan(chunk, hardware, *xs), *arguments)
        return results, pull((g, h.swapaxes(1, 2)))

    (y, final), gradients = jax.jit(run)(*in_order(inputs))
    assert_close((y, final.swapaxes(1, 2)), oracle_scan(**widened(inputs)), FLOAT32)
    assert_close(gradients, in_order(oracle_gradients(**widened(inputs))), FLOAT32)
    half = rounded(inputs, {"u": "bfloat16"})
    assert jax.eval_shape(run, *in_order(half))[1][0].dtype == jnp.bfloat16


@only_interpreted
def test_all_forms_keep_the_same_states():
    interval = kernels.interval(3, INTERPRETER)
    cut = engine._Cut.of(40, 128, interval)
    inputs = in_order(rounded(scan_inputs(3, 40, 2, 6, 3)))

    @jax.jit
    def run(u, delta, a, b, c, d, start):
        arrays = a, d, *map(cut.intervals, (u, delta, b, c)), start
        return kernels.forward(*arrays, hardware=INTERPRETER), engine._forward_by_step(*arrays)

    actual, expected = run(*inputs)
    assert expected[1].shape[1] == -(-40 // interval)
    assert_close(actual, expected, FLOAT32)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("states", [1, 16, 64])
def test_an_interval_fits_in_shared_memory(capability, states):
    """And takes the larger share of what is there, so that few states are kept."""
    hardware = Hardware.of_capability(capability)
    interval = kernels.interval(states, hardware)
    assert kernels._Plan.of(states, interval).shared_memory() <= hardware.shared_memory
    assert interval == 16 or kernels._Plan.of(states, 16).shared_memory() > hardware.shared_memory


def test_float64_is_for_the_portable_path():
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
        selective_scan(**scan_inputs(4, 3), implementation="mosaic_interpret")
