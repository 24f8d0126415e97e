"""The fused kernels of vector-quantised attention against float64; see tests/kernels.py for where they run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.engine.dispatch import Choice
from attn_jax.mechanisms import vq as mechanism
from attn_jax.types import NEG_INF
from pallas_kernels import instructions, vq
from pallas_kernels.hardware import Hardware
from tests.kernels import ON_GPU, dense_attention, hardware_of, only_interpreted, reports_race

both_instructions = pytest.mark.parametrize("hardware", ["mma", "wgmma"], indirect=True)

# Relative to the largest entry of an array. float32: sums of some hundred terms in another order. bfloat16 has 8
# bits and float16 11: means, cotangents and weights are rounded to them once, and then enter products.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 1.5e-3}
DTYPE = "bfloat16" if ON_GPU else "float32"  # of values: the interpreter alone multiplies float32

jitted_nearest = jax.jit(vq.nearest, static_argnums=0)


@pytest.fixture
def hardware(request):
    return hardware_of(request.param)


def rounded(x, dtype):
    """What kernels that compute in `dtype` get to see."""
    return np.asarray(jnp.asarray(x, dtype), np.float64)


def close(actual, expected, dtype=DTYPE):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape and np.isfinite(actual).all()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[dtype] * abs(expected).max())


# Assignment.


def closeness(x, codebook):
    """`x . c - |c|^2 / 2` in float64, `(B, L, H, S)`."""
    x, codebook = np.float64(x), np.float64(codebook)
    return np.einsum("blhe,hse->blhs", x, codebook) - 0.5 * (codebook**2).sum(-1)


@pytest.mark.parametrize(
    "hardware,tokens,codes,width",
    [("mma", 70, 33, 24), ("wgmma", 3, 1, 64), ("mma", 64, 65, 128), ("wgmma", 64, 65, 128)],
    indirect=["hardware"],
)
def test_the_nearest_codeword(hardware, tokens, codes, width):
    """Of ragged sequences and codebooks; margins between codewords are far above rounding."""
    rng = np.random.default_rng(tokens)
    x, codebook = (
        np.float32(rng.normal(size=(2, tokens, 1, width))),
        np.float32(rng.normal(size=(1, codes, width))),
    )
    found = jitted_nearest(hardware, x, codebook)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, closeness(x, codebook).argmax(-1))


TOKENS, CODES, WIDTH = 512, 150, 64  # of the next two tests, which share a program


@both_instructions
def test_decisions_are_those_of_float32(hardware):
    """Tokens between two codewords, nearer to one by 2^-22 of a squared length: 4 units in the last place of
    float32, and too little for bfloat16, or for two parts of it."""
    rng = np.random.default_rng(0)
    codes = 32
    codebook = rng.normal(size=(1, codes, WIDTH))
    codebook = np.float32(codebook / np.linalg.norm(codebook, axis=-1, keepdims=True))
    a = rng.integers(0, codes, TOKENS)
    b = (a + rng.integers(1, codes, TOKENS)) % codes
    near, far = np.float64(codebook[0, a]), np.float64(codebook[0, b])
    x = np.float32(0.5 * (near + far) + 2**-23 * (near - far))[None, :, None]
    codebook = np.concatenate([codebook * n for n in range(1, 6)], axis=1)[:, :CODES]  # the others are farther
    np.testing.assert_array_equal(closeness(x, codebook).argmax(-1)[0, :, 0], a)
    np.testing.assert_array_equal(np.asarray(jitted_nearest(hardware, x, codebook))[0, :, 0], a)


@both_instructions
def test_ties_go_to_the_lowest_code(hardware):
    """Within a tile and between tiles, for equal codewords and opposite ones. Sums of integers are exact."""
    rng = np.random.default_rng(1)
    near, other, short = sorted(rng.integers(-5, 6, size=(3, WIDTH)), key=np.linalg.norm, reverse=True)
    codebook = np.float32(rng.integers(-500, 501, size=(1, CODES, WIDTH)))
    codebook[0, [9, 30, 70, 149]] = near
    codebook[0, [80, 81]] = other
    codebook[0, 100], codebook[0, 140] = short, -short
    x = np.float32(np.resize([near, other, 0 * short], (1, TOKENS, 1, WIDTH)))
    found = np.asarray(jitted_nearest(hardware, x, codebook))[0, :, 0]
    np.testing.assert_array_equal(found, np.resize([9, 80, 100], TOKENS))


# Pooling.

pool = jax.jit(vq.pool, static_argnums=(0, 2), static_argnames=("order", "block"))


def pooled(codes, number, weight, v, scalar, seen):
    """Of the tokens where `seen` `(L,)`, in float64: `Pooled` for one block."""
    hit = np.where(codes[..., None] == np.arange(number), weight[..., None], -np.inf)  # (B, L, H, S)
    hit = np.where(seen[:, None, None], hit, -np.inf)
    some = np.isfinite(hit).any(1)
    top = np.where(some, hit.max(1), 0)
    p = np.exp(hit - top[:, None])
    total = np.where(some, p.sum(1), 1)
    mean = np.einsum("blhs,blhv->bshv", p, v) / total.swapaxes(1, 2)[..., None]
    mean_scalar = np.einsum("blhs,blh->bsh", p, scalar) / total.swapaxes(1, 2)
    return mean, np.where(some, top + np.log(total), NEG_INF).swapaxes(1, 2), mean_scalar


@pytest.mark.parametrize(
    "hardware,order,block",
    [("mma", "all", None), ("wgmma", "before", 128), ("mma", "after", 64)],
    indirect=["hardware"],
)
def test_pooling(hardware, order, block):
    """Ragged; codes without tokens, tokens that do not count, and weights that lie e^60 apart."""
    rng = np.random.default_rng(2)
    batch, tokens, heads, number, width = 2, 200, 1, 70, 40
    codes = rng.integers(0, 66, (batch, tokens, heads))
    weight = rng.uniform(-30, 30, size=codes.shape)
    weight[rng.random(codes.shape) < 0.2] = NEG_INF
    v, scalar = rounded(rng.normal(size=(*codes.shape, width)), DTYPE), np.float32(rng.normal(size=codes.shape))
    arrays = codes.astype(np.int32), number, np.float32(weight), jnp.asarray(v, DTYPE), scalar
    actual = pool(hardware, *arrays, order=order, block=block)
    weight = np.where(weight > NEG_INF, np.float64(np.float32(weight)), -np.inf)
    t, size = np.arange(tokens), block or tokens
    blocks = [
        {"all": t >= 0, "before": t < b * size, "after": t >= (b + 1) * size}[order]
        for b in range(-(-tokens // size))
    ]
    expected = [pooled(codes, number, weight, v, scalar, seen) for seen in blocks]
    for got, *wanted in zip(actual, *expected):
        wanted = np.stack(wanted, axis=1).reshape(got.shape)
        nothing = wanted == NEG_INF
        np.testing.assert_array_equal(got == np.float32(NEG_INF), nothing)
        close(np.where(nothing, 0, got), np.where(nothing, 0, wanted))


# Attention.


def operands(seed, length, keys, codes_q, codes_k, width=16, value_width=24, batch=2, heads=1):
    rng = np.random.default_rng(seed)
    q, k = (rng.normal(size=(batch, n, heads, width)) for n in (length, keys))
    v, g = (rng.normal(size=(batch, n, heads, value_width)) for n in (keys, length))
    codebook_q, codebook_k = (rng.normal(size=(heads, n, width)) * width**-0.25 for n in (codes_q, codes_k))
    mask = rng.random((batch, keys)) < 0.7
    mask[:, :2] = False  # causal: queries that read nothing
    return [q, k, v, codebook_q, codebook_k], mask, g


def expected(arrays, codes, mask, g, causal):
    """Output and gradients of dense attention on codewords, which those of `q` and `k` pass by, in float64."""
    _, _, v, *codebooks = arrays
    q, k = (codebook[np.arange(len(codebook)), c] for c, codebook in zip(codes, codebooks))
    order = np.tri(q.shape[1], k.shape[1], dtype=bool) if causal else True
    inputs = {"q": q, "query_features": (), "streams": [{"keys": k, "values": v}]}
    (out, *_), d = dense_attention(inputs, [mask[:, None, None] & order], (g, np.zeros(g.shape[:3])))
    return out, d["q"], d["streams"][0]["keys"], d["streams"][0]["values"]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def fused(hardware, causal, dtype, arrays, codes, mask, g):
    """The same by the kernels, through the derivative rule of the operation, which find `codes` unless these
    are given."""
    plan = mechanism._Plan(causal, 128, Choice(hardware=hardware), dtype)
    q, k, v, *codebooks = (jnp.float32(x) for x in arrays)
    k, v = (jnp.where(mask[..., None, None], x, 0) for x in (k, v))

    def run(q, k, v):
        if codes is None:
            return mechanism._linear(plan, q, k, v, *codebooks, mask)[0]
        return mechanism._read(plan, q, k, v, mechanism.Quantised(*codes, *codebooks, mask))

    out, pull = jax.vjp(run, q, k, v)
    return out, *pull(jnp.float32(g))


CASES = {  # length, keys, codes of queries and of keys
    "whole": (70, 130, 10, 70),
    "causal": (150, 150, 10, 20),
}


def check(seed, hardware, case, dtype, assigned=False):
    """`assigned`: whether the kernels are told the codes, and need not be compiled to find them."""
    arrays, mask, g = operands(seed, *CASES[case])
    arrays, g, causal = (
        [*arrays[:2], *(rounded(x, dtype) for x in arrays[2:])],
        rounded(g, dtype),
        case == "causal",
    )
    codes = [np.int32(closeness(x, codebook).argmax(-1)) for x, codebook in zip(arrays, arrays[3:])]
    actual = fused(hardware, causal, jnp.dtype(dtype), arrays, codes if assigned else None, mask, g)
    for got, want in zip(actual, expected(arrays, codes, mask, g, causal), strict=True):
        close(got, want, dtype)


@pytest.mark.parametrize(
    "hardware,case", [("mma", "whole"), ("wgmma", "causal")], ids=CASES, indirect=["hardware"]
)
def test_attention_and_its_gradients(hardware, case):
    """Ragged, masked, with queries that read nothing, and the causal one in several blocks."""
    check(3, hardware, case, DTYPE)


@pytest.mark.parametrize("dtype,case", [("bfloat16", "whole"), ("float16", "causal")])
def test_half_precision(dtype, case):
    """Of values: codes are decided in float32 whatever these are."""
    check(4, hardware_of("mma"), case, dtype, assigned=True)


@pytest.mark.parametrize(
    "dtype,q_dtype,width,reason",
    [
        ("float32", "float32", 64, "values are float32"),
        ("bfloat16", "float64", 64, "decided in float64"),
        ("bfloat16", "float32", 129, "width 129"),
        ("float16", "float32", 128, None),
    ],
)
def test_what_is_not_fused_is_said(dtype, q_dtype, width, reason):
    q, v = (jax.ShapeDtypeStruct((1, 8, 2, width), jnp.dtype(x)) for x in (q_dtype, dtype))
    said = vq.unsupported(Hardware(), q, v)
    assert said is None if reason is None else reason in said


# What the interpreter is for.


@only_interpreted
@pytest.mark.parametrize("forgotten", ["commit_smem", "release"])
def test_the_interpreter_sees_races(monkeypatch, capsys, forgotten):
    """Parts that are read before they are visible, and a slot that is filled before it was read."""
    if forgotten == "commit_smem":
        monkeypatch.setattr(vq.plgpu, "commit_smem", lambda: None)
    else:
        monkeypatch.setattr(instructions.Tiles, "release", lambda self, read: None)
    x, codebook = np.ones((1, 64, 1, 32), np.float32), np.ones((1, 300, 32), np.float32)
    hardware = hardware_of("wgmma")
    nearest = jax.jit(lambda x, codebook: vq.nearest(hardware, x, codebook))  # a new function, traced anew
    assert reports_race(lambda: nearest(x, codebook), capsys)
