"""The linear recurrence engine: prefix sums for linear attention, and the selective scan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.engine.prefix import LinearState
from attn_jax.engine.prefix import linear_attention as linear
from attn_jax.ops import selective_scan
from tests import oracles

# Both sides in float64: only the order of some hundred additions and the chain of exponentials differ.
EXACT = 1e-10

LENGTHS = (1, 7, 13, 40)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


# Selective scan.


def scan_inputs(seed, length, batch=2, channels=6, states=3):
    keys = np.random.default_rng(seed)
    return {
        "u": keys.normal(size=(batch, length, channels)),
        "delta": np.abs(keys.normal(size=(batch, length, channels))),
        "a": -np.exp(keys.normal(size=(channels, states))),
        "b": keys.normal(size=(batch, length, states)),
        "c": keys.normal(size=(batch, length, states)),
        "d": keys.normal(size=channels),
        "initial_state": keys.normal(size=(batch, channels, states)),
    }


def oracle_scan(u, delta, a, b, c, d, initial_state, mask=None):
    """The recurrence, one step at a time; a masked step keeps the state and gives 0."""
    h, ys = initial_state, []
    for t in range(u.shape[1]):
        decay = np.exp(delta[:, t, :, None] * a)
        after = decay * h + (delta * u)[:, t, :, None] * b[:, t, None, :]
        y = (after * c[:, t, None, :]).sum(-1) + d * u[:, t]
        real = np.ones(len(u), bool) if mask is None else mask[:, t]
        h = np.where(real[:, None, None], after, h)
        ys.append(np.where(real[:, None], y, 0))
    return np.stack(ys, 1), h


def scan_anew(inputs, **options):
    return selective_scan(
        *(inputs[n] for n in "u delta a b c d".split()), initial_state=inputs["initial_state"], **options
    )


scan = jax.jit(scan_anew, static_argnames=("chunk", "implementation"))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("implementation", ["dense", "xla"])
def test_scan_is_the_recurrence(length, implementation):
    with jax.enable_x64(True):
        inputs = scan_inputs(length, length)
        mask = None if length == 13 else np.random.default_rng(0).random((2, length)) < 0.7
        y, final = scan(inputs, mask=mask, chunk=5, implementation=implementation)
        expected, expected_final = oracle_scan(**inputs, mask=mask)
        np.testing.assert_allclose(y, expected, atol=EXACT)
        np.testing.assert_allclose(final, expected_final, atol=EXACT)


@functools.partial(jax.jit, static_argnames=("chunk", "implementation"))
def scan_gradients(inputs, mask, wy, wh, **options):
    def loss(inputs):
        y, final = scan_anew(inputs, mask=mask, **options)
        return jnp.sum(y * wy) + jnp.sum(final * wh)

    return jax.grad(loss)(inputs)


@pytest.mark.parametrize("chunk", [1, 5, 128])
def test_scan_gradients_are_those_of_the_recurrence(chunk):
    """Every argument's, with cotangents on outputs and on the final state; "dense" is plain autodiff."""
    with jax.enable_x64(True):
        inputs, mask = scan_inputs(1, 40), np.random.default_rng(1).random((2, 40)) < 0.7
        cotangents = normal(2, 2, 40, 6), normal(3, 2, 6, 3)
        expected = scan_gradients(inputs, mask, *cotangents, implementation="dense")
        actual = scan_gradients(inputs, mask, *cotangents, implementation="xla", chunk=chunk)
        for name in inputs:
            np.testing.assert_allclose(actual[name], expected[name], atol=1e-9, err_msg=name)


@pytest.mark.parametrize("length", [13, 40])
def test_the_chunked_form_for_accelerators_equals_the_stepped_one(length, monkeypatch):
    """Here it runs on a CPU, in the place of the form that a CPU would take."""
    with jax.enable_x64(True):
        inputs = scan_inputs(4, length)
        wy, wh = normal(5, 2, length, 6), normal(6, 2, 6, 3)

        def loss(inputs):
            y, final = scan_anew(inputs, chunk=16)
            return jnp.sum(y * wy) + jnp.sum(final * wh)

        stepped = jax.jit(jax.value_and_grad(loss))(inputs)
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
        chunked = jax.jit(jax.value_and_grad(lambda inputs: loss(inputs)))(inputs)  # traced anew
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), chunked, stepped)


def test_a_scan_is_continued_from_its_final_state():
    inputs = scan_inputs(7, 40)
    first = {n: x[:, :20] if n in ("u", "delta", "b", "c") else x for n, x in inputs.items()}
    second = {n: x[:, 20:] if n in ("u", "delta", "b", "c") else x for n, x in inputs.items()}
    y1, state = scan(first)
    y2, final = scan(second | {"initial_state": state})
    y, whole = scan(inputs)
    np.testing.assert_allclose(np.concatenate([y1, y2], 1), y, atol=1e-5)  # float32
    np.testing.assert_allclose(final, whole, atol=1e-5)


def test_constant_coefficients_are_a_convolution():
    """y = u * K with K_t = C exp(delta A)^t delta B."""
    with jax.enable_x64(True):
        inputs = scan_inputs(8, 13) | {"d": np.zeros(6), "initial_state": np.zeros((2, 6, 3))}
        for n in ("delta", "b", "c"):
            inputs[n] = np.broadcast_to(inputs[n][:1, :1], inputs[n].shape)
        delta, a, b, c = inputs["delta"][0, 0], inputs["a"], inputs["b"][0, 0], inputs["c"][0, 0]
        powers = np.exp(delta[:, None] * a)[None] ** np.arange(13)[:, None, None]
        kernel = (powers * (delta[:, None] * b) * c).sum(-1)
        expected = np.stack([np.convolve(inputs["u"][0, :, e], kernel[:, e])[:13] for e in range(6)], -1)
        np.testing.assert_allclose(scan(inputs)[0][0], expected, atol=EXACT)


def test_scan_memory_grows_with_length_and_not_with_its_states():
    """Twice the length: about twice the temporary memory, far below all the states of the sequence."""

    def temporary(length):
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), scan_inputs(0, length, 1, 64, 16)
        )
        gradient = jax.jit(jax.grad(lambda x: scan(x)[0].sum()))
        return gradient.lower(shapes).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(2048), temporary(4096)
    assert long < 2.5 * short and long < 0.5 * 4096 * 64 * 16 * 4


@pytest.mark.parametrize(
    "change,words",
    [
        ({"b": np.zeros((2, 13, 4))}, "`b`"),
        ({"a": np.zeros((5, 3))}, "`a`"),
        ({"delta": np.zeros((2, 12, 6))}, "`delta`"),
        ({"d": np.zeros(6, int)}, "`d`"),
        ({"initial_state": np.zeros((2, 3, 6))}, "`initial_state`"),
    ],
)
def test_scan_arguments_that_do_not_fit(change, words):
    with pytest.raises(ValueError, match=words):
        scan(scan_inputs(0, 13) | change)


def test_scan_options_that_do_not_exist():
    with pytest.raises(ValueError, match="chunk"):
        scan(scan_inputs(0, 3), chunk=0)
    with pytest.raises(ValueError, match="implementation"):
        scan(scan_inputs(0, 3), implementation="nope")
    with pytest.raises(NotImplementedError, match="mosaic"):
        scan(scan_inputs(0, 3), implementation="mosaic")


# Linear attention.


def feature(x, w):
    """Positive features with a log-scale of their own: exp(log_scale) features = exp(w x)."""
    z = w @ x.T
    top = jax.lax.stop_gradient(z.max(0))
    return top, jnp.exp(z - top)


def oracle_linear(w, q, k, v, mask=True, causal=False):
    """The quadratic form with explicit features."""
    phi_q, phi_k = (np.exp(np.einsum("hfe,blhe->blhf", w, x)) for x in (q, k))
    seen = np.broadcast_to(mask, k.shape[:2])[:, None, None, :] * (np.tri(q.shape[1]) if causal else 1)
    weights = np.einsum("blhf,bmhf->bhlm", phi_q, phi_k) * seen
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhlm,bmhv->blhv", weights / np.where(total != 0, total, 1), v)


def assert_same(f, oracle, *args):
    """In values, and in the derivatives by all arguments, each along a random direction."""

    @jax.jit
    def pulled(w, *args):
        y, pull = jax.vjp(f, *args)
        return y, pull(w)

    expected = oracle(*args)
    w = normal(9, *expected.shape)
    y, gradients = jax.device_get(pulled(w, *args))
    np.testing.assert_allclose(y, expected, atol=EXACT)
    for n, (x, gradient) in enumerate(zip(args, gradients)):
        along = normal(10 + n, *x.shape)
        wanted = oracles.derivative(lambda x, n=n: (oracle(*args[:n], x, *args[n + 1 :]) * w).sum(), x, along)
        np.testing.assert_allclose((gradient * along).sum(), wanted, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length,chunk", [(1, 4), (13, 4), (13, 64), (40, 7)])
def test_linear_attention_is_the_quadratic_form(length, chunk, causal):
    """Values, and gradients of features' parameters, queries, keys and values."""
    with jax.enable_x64(True):
        args = normal(0, 2, 5, 4), *(normal(s, 2, length, 2, 4) for s in (1, 2)), normal(3, 2, length, 2, 3)
        mask = np.random.default_rng(4).random((2, length)) < 0.7
        mask[1, :] = length == 40
        options = {"mask": mask, "causal": causal}
        ours = functools.partial(linear, feature, **options, chunk=chunk)
        assert_same(lambda *args: ours(*args)[0], functools.partial(oracle_linear, **options), *args)


def test_linear_attention_is_continued_from_its_state():
    """Two halves with the state handed over equal the whole, gradients through the state included."""
    with jax.enable_x64(True):
        p, qkv = normal(0, 2, 5, 4), normal(1, 3, 2, 13, 2, 4)

        def halves(q, k, v):
            first, state = linear(feature, p, q[:, :6], k[:, :6], v[:, :6], causal=True, chunk=4)
            second, _ = linear(feature, p, q[:, 6:], k[:, 6:], v[:, 6:], causal=True, chunk=4, initial_state=state)
            return jnp.concatenate([first, second], 1)

        assert_same(halves, functools.partial(oracle_linear, p, causal=True), *qkv)


def test_a_state_stands_for_the_keys_that_it_has_read():
    """Keys handed over as a state are read like the others, and its gradients are theirs."""
    with jax.enable_x64(True):
        p, (q, k, v) = normal(0, 2, 5, 4), normal(1, 3, 2, 13, 2, 4)

        def handed_over(p, k, v):
            _, state = linear(feature, p, q[:, :0], k[:, :6], v[:, :6], chunk=4)
            return linear(feature, p, q, k[:, 6:], v[:, 6:], chunk=4, initial_state=state)[0]

        assert_same(handed_over, lambda p, k, v: oracle_linear(p, q, k, v), p, k, v)


@pytest.mark.parametrize("causal", [False, True])
def test_the_scale_of_a_state_is_free(causal):
    """Moving a factor between the sums and `log_scale` changes nothing; so the derivative that way is 0."""
    with jax.enable_x64(True):
        p, (q, k, v), w = normal(0, 2, 5, 4), normal(1, 3, 2, 7, 2, 4), normal(2, 2, 7, 2, 4)
        state = LinearState(normal(3, 2, 2, 5, 4), np.abs(normal(4, 2, 2, 5)), normal(5, 2, 2))

        def loss(state):
            return jnp.sum(linear(feature, p, q, k, v, causal=causal, chunk=4, initial_state=state)[0] * w)

        moved = LinearState(state.key_value * np.exp(-3), state.key_sum * np.exp(-3), state.log_scale + 3)
        run = jax.jit(jax.value_and_grad(loss))
        value, gradient = run(state)
        np.testing.assert_allclose(run(moved)[0], value, atol=1e-9)
        along = np.sum(gradient.key_value * state.key_value, (2, 3)) + np.sum(gradient.key_sum * state.key_sum, 2)
        np.testing.assert_allclose(gradient.log_scale, along, atol=1e-9)
        assert np.abs(along).max() > 1e-3


def test_huge_keys_neither_overflow_nor_leak():
    """Keys that overflow exp in float32 are finite, and future ones change the past by nothing at all."""
    p, (q, k, v) = normal(0, 2, 5, 4).astype(np.float32), normal(1, 3, 1, 13, 2, 4).astype(np.float32)
    huge = k.copy()
    huge[:, 8:] *= 1000
    run = jax.jit(lambda k: linear(feature, p, q, k, v, causal=True, chunk=4)[0])
    assert np.isfinite(run(huge)).all()
    np.testing.assert_array_equal(run(huge)[:, :8], run(k)[:, :8])


def test_an_empty_state_is_no_state():
    p, (q, k, v) = normal(0, 2, 5, 4), normal(1, 3, 2, 7, 2, 4)
    state = LinearState.empty(2, 2, 5, 4)
    run = jax.jit(lambda state: linear(feature, p, q, k, v, causal=True, initial_state=state)[0])
    np.testing.assert_array_equal(run(state), run(None))
