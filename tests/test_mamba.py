"""The Mamba layer: its oracle, its initialisation, and what masks do to it."""

import jax
import numpy as np
import pytest
from flax import nnx

import attn_jax
from attn_jax.mechanisms.mamba import causal_convolution

# float32 against float64, through three projections and the scan.
ROUNDING = 2e-5


def build(causal=True, **options):
    return attn_jax.build("mamba", dim=16, num_heads=2, causal=causal, rngs=nnx.Rngs(0), **options)


call = jax.jit(lambda module, x, mask=None: module(x, mask=mask))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def silu(x):
    return x / (1 + np.exp(-x))


def oracle(module, x):
    """Algorithm 2 of the paper, one token at a time, in float64."""
    p = {
        ".".join(map(str, path)): np.asarray(v[...], np.float64)
        for path, v in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }
    ssm = "directions.0."
    inner, gate = np.split(x @ p["into.kernel"], 2, axis=-1)
    kernel, bias = p[ssm + "conv_kernel"], p[ssm + "conv_bias"]
    taps = len(kernel)
    padded = np.concatenate([np.zeros((x.shape[0], taps - 1, inner.shape[-1])), inner], 1)
    u = silu(bias + sum(padded[:, t : t + x.shape[1]] * kernel[t] for t in range(taps)))
    rank = len(p[ssm + "delta_kernel"])
    size = p[ssm + "a_log"].shape[1]
    low, b, c = np.split(u @ p[ssm + "select.kernel"], [rank, rank + size], axis=-1)
    delta = np.log1p(np.exp(low @ p[ssm + "delta_kernel"] + p[ssm + "delta_bias"]))
    a = -np.exp(p[ssm + "a_log"])
    h, ys = np.zeros((x.shape[0], *a.shape)), []
    for t in range(x.shape[1]):
        h = np.exp(delta[:, t, :, None] * a) * h + (delta * u)[:, t, :, None] * b[:, t, None]
        ys.append((h * c[:, t, None]).sum(-1) + p[ssm + "skip"] * u[:, t])
    return (np.stack(ys, 1) * silu(gate)) @ p["out.kernel"]


def test_the_layer_is_algorithm_2():
    module, x = build(), normal(0, 2, 13, 16)
    np.testing.assert_allclose(call(module, x.astype(np.float32)), oracle(module, x), atol=ROUNDING)


def test_bidirectional_is_both_directions():
    """Reading the reversed sequence with the two directions swapped gives the reversed output."""
    module, x = build(causal=False), normal(1, 2, 13, 16).astype(np.float32)
    y = call(module, x)
    first, second = module.directions
    module.directions = nnx.List([second, first])
    np.testing.assert_allclose(call(module, x[:, ::-1])[:, ::-1], y, atol=ROUNDING)
    assert len(build(causal=False, bidirectional=False).directions) == 1


def test_the_initial_state_space_is_stable_and_slow():
    """A = -(1..N), so |exp(Delta A)| < 1, with Delta starting in [0.001, 0.1]; D = 1; none of them decays."""
    ssm = build().directions[0]
    np.testing.assert_allclose(-np.exp(ssm.a_log[...])[0], -np.arange(1, 17), rtol=1e-6)
    delta = np.log1p(np.exp(np.asarray(ssm.delta_bias[...], np.float64)))
    assert (delta > 0.99e-3).all() and (delta < 0.101).all() and delta.std() > 0.01
    assert (np.asarray(ssm.skip[...]) == 1).all()
    for parameter in (ssm.a_log, ssm.skip, ssm.delta_bias):
        assert parameter.get_metadata()["weight_decay"] is False


def test_a_long_sequence_stays_finite():
    """The source's flipped sign overflows after 55 steps."""
    y = jax.jit(build())(10 * normal(2, 1, 3000, 16).astype(np.float32))
    assert np.isfinite(y).all()


def test_a_masked_token_freezes_the_state():
    """Padding between the state and what comes later changes nothing but the convolution's reach."""
    module = build(conv_width=1)  # without the convolution, masked tokens are absent
    x = normal(3, 1, 13, 16).astype(np.float32)
    mask = np.ones((1, 13), bool)
    mask[0, [0, 5, 6]] = False
    np.testing.assert_allclose(call(module, x, mask)[mask], call(module, x[mask][None])[0], atol=ROUNDING)


def test_the_convolution_is_causal_and_depthwise():
    x, kernel, bias = normal(4, 2, 9, 3), normal(5, 4, 3), normal(6, 3)
    actual = jax.jit(causal_convolution)(x, kernel, bias, np.zeros((2, 3, 3)))
    for e in range(3):
        expected = np.stack([np.convolve(row, kernel[::-1, e])[:9] for row in x[..., e]]) + bias[e]
        np.testing.assert_allclose(actual[..., e], expected, atol=1e-5)


def test_wrong_options_raise():
    with pytest.raises(ValueError, match="bidirectional"):
        build(bidirectional=True)
    for option in ("expand", "state_size", "conv_width"):
        with pytest.raises(ValueError, match=option):
            build(**{option: 0})
