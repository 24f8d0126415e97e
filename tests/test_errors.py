"""Mistakes that people make: each is refused in one line with the argument, what came and what is expected.

Nothing is computed before: arrays here are shapes and types without values, and so are the modules' parameters.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attn_jax
from attn_jax import ops, registry
from attn_jax.mechanisms.base import Attention, ProjectedAttention
from attn_jax.positions import rotary
from train import cli

B, L, H, E, D, T = 2, 6, 2, 4, 8, 3


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def of(array, dtype):
    return jax.ShapeDtypeStruct(array.shape, dtype)


x, context = array(B, L, D), array(B, 3, D)
mask = array(B, L, dtype=bool)
q = k = v = array(B, L, H, E)
timescales = array(B, L, T, H, E)
log_mass, log_gamma = array(B, L, H), array(T)
codebook, projection = array(H, 5, E), array(7, E)
scanned = {
    "u": array(B, L, 5),
    "delta": array(B, L, 5),
    "a": array(5, 3),
    "b": array(B, L, 3),
    "c": array(B, L, 3),
}
KEY = {"block_size": 2, "num_samples": 2, "min_length": 0, "key": jax.random.key(0)}


def build(name="standard", **options):
    return attn_jax.build(name, **{"dim": D, "num_heads": H, "rngs": nnx.Rngs(0)} | options)


@functools.cache
def module(name="standard", **options):
    return nnx.eval_shape(lambda: build(name, **options))


def full_cache(name, length):
    """The cache for `length` tokens, with all of them."""
    return module(name, causal=True).init_cache(1, length)._replace(length=np.int32(length))


def step(name="standard", cache=None, token=(1, 1, D), causal=True):
    return module(name, causal=causal).step(array(*token), cache)


def scan(**changes):
    return ops.selective_scan(**{**scanned, "d": array(5)} | changes)


def gravity(**changes):
    return ops.gravitational_attention(
        **{"q": q, "k": k, "v": v, "log_mass": log_mass, "power": 2.0, "softening": 1.0} | changes
    )


def vq(*codebooks, **options):
    return ops.vq_attention(q, k, v, *codebooks, **options)


def register(decorated=None, name="mine", **arguments):
    class Mine(Attention):
        mechanism = "mine"

        def attend(self, x, mask, context, context_mask):
            return x

    arguments = {"causal": False, "time": "L", "memory": "L"} | arguments
    return attn_jax.register(name, **arguments)(Mine if decorated is None else decorated)


class Bare:
    pass


class Unwritten(Attention):
    mechanism = "mine"


class HalfDecoder(Unwritten):
    def attend(self, x, mask, context, context_mask):
        return x

    def init_cache(self, batch, max_length, dtype=jnp.float32):
        return ()


class Unmixed(ProjectedAttention):
    mechanism = "mine"


class Weightless(Unmixed):
    def mix(self, q, k, v, mask):
        return v


class OtherConstructor(nnx.Module):
    def __init__(self, width, *, rngs):
        pass


class NoMask(nnx.Module):
    def __init__(self, dim, num_heads, **options):
        pass

    def __call__(self, x):
        return x


class PositionalOption(NoMask):
    def __init__(self, dim, num_heads, window, **options):
        pass

    def __call__(self, x, *, mask=None):
        return x


# In words, the call, and what its message must hold.
MISTAKES = {
    # build
    "a near miss": (lambda: build("dualkv"), ["unknown mechanism 'dualkv'", "did you mean 'dual_kv'?", "maw"]),
    "a capital": (lambda: build("Standard"), ["'Standard'", "did you mean 'standard'?"]),
    "nothing like it": (lambda: build("nope"), ["unknown mechanism 'nope'; registered: cross_memory, dual_kv"]),
    "a name in a list": (lambda: build(["maw"]), ["unknown mechanism ['maw']", "registered"]),
    "no width": (lambda: build(dim=0), ["`dim`", "a positive integer", "got 0"]),
    "a negative width": (lambda: build(dim=-8), ["`dim`", "a positive integer", "got -8"]),
    "a float width": (lambda: build(dim=8.0), ["`dim`", "a positive integer", "got 8.0"]),
    "a string for a width": (lambda: build(dim="8"), ["`dim`", "a positive integer", "got '8'"]),
    "a boolean width": (lambda: build(dim=True, num_heads=1), ["`dim`", "a positive integer", "got True"]),
    "no heads": (lambda: build(num_heads=0), ["`num_heads`", "a positive integer", "got 0"]),
    "heads of a float": (lambda: build(num_heads=2.0), ["`num_heads`", "got 2.0"]),
    "heads that do not divide": (
        lambda: build(num_heads=3),
        ["`dim`", "a multiple of `num_heads`", "got 8 and 3"],
    ),
    "heads by another name": (
        lambda: attn_jax.build("standard", dim=8, heads=2, rngs=nnx.Rngs(0)),  # type: ignore[call-arg]
        ["missing 1 required keyword-only argument: 'num_heads'"],
    ),
    "an unknown option": (lambda: build("local", windows=3), ["unknown option 'windows'", "rope_base, window"]),
    "another's option": (
        lambda: build(window=3),
        ["standard: unknown option 'window'", "its options: implementation"],
    ),
    "causal in words": (lambda: build(causal="no"), ["`causal`", "True or False", "got 'no'"]),
    "causal where it cannot be": (lambda: build("maw", causal=True), ["maw: causal=True is not supported"]),
    "a type that is none": (lambda: build(dtype="float33"), ["`dtype`", "a floating-point type", "got 'float33'"]),
    "an integer type": (lambda: build(dtype="int32"), ["`dtype`", "a floating-point type", "got 'int32'"]),
    "no parameter type": (lambda: build(param_dtype=None), ["`param_dtype`", "a floating-point type", "got None"]),
    "a seed for rngs": (lambda: build(rngs=0), ["`rngs`", "nnx.Rngs(0)", "got int"]),
    "a key for rngs": (lambda: build(rngs=jax.random.key(0)), ["`rngs`", "nnx.Rngs(0)", "got PRNGKeyArray"]),
    "rngs without params": (
        lambda: build(rngs=nnx.Rngs(dropout=0)),
        ["`rngs`", "a stream `params`", "got streams dropout"],
    ),
    "no rngs": (lambda: attn_jax.build("standard", dim=8, num_heads=2), ["argument: 'rngs'"]),  # type: ignore[call-arg]
    # options
    "a vendor": (lambda: build(implementation="cuda"), ["`implementation`", "None, 'dense', 'xla'", "got 'cuda'"]),
    "a negative window": (lambda: build("local", window=-1), ["`window`", "an integer >= 0 or a pair", "got -1"]),
    "half a token": (lambda: build("local", window=1.5), ["`window`", "an integer >= 0 or a pair", "got 1.5"]),
    "a window of three": (lambda: build("local", window=(1, 2, 3)), ["`window`", "a pair", "got (1, 2, 3)"]),
    "a boolean window": (lambda: build("local", window=True), ["`window`", "an integer >= 0", "got True"]),
    "no stride": (lambda: build("strided", stride=0), ["`stride`", "a positive integer", "got 0"]),
    "a pattern that is none": (
        lambda: build("strided", pattern="fix"),
        ["`pattern`", "dilated, phase", "got 'fix'"],
    ),
    "an unhashable choice": (
        lambda: build("maw", selection=["soft"]),
        ["`selection`", "hard, soft", "got ['soft']"],
    ),
    "no block": (lambda: build("vq", block_length=0), ["vq: `block_length`", "a positive integer", "got 0"]),
    "a decay in words": (
        lambda: build("vq", decay="slow"),
        ["`decay`", "at least 0 and less than 1", "got 'slow'"],
    ),
    "a flag in words": (lambda: build("vq", gate="no"), ["`gate`", "True or False", "got 'no'"]),
    "a bias in words": (
        lambda: build("dual_kv", stream_bias="no"),
        ["`stream_bias`", "True or False", "got 'no'"],
    ),
    "too many hashes": (lambda: build("hyper", num_hashes=40), ["`num_hashes`", "at most 30", "got 40"]),
    "no chunk": (lambda: build("performer", chunk=0), ["`chunk`", "a positive integer", "got 0"]),
    "a rate above 1": (lambda: build("maw", router_dropout=2), ["`router_dropout`", "less than 1", "got 2"]),
    "a ratio above 1": (lambda: build("cross_memory", fusion_ratio=2), ["`fusion_ratio`", "from 0 to 1", "got 2"]),
    "a power in words": (lambda: build("gravitational", power="2"), ["`power`", "a positive number", "got '2'"]),
    "a negative base": (lambda: build(rope_base=-1.0), ["`rope_base`", "a positive number", "got -1.0"]),
    "turning an odd width": (
        lambda: build(rope_base=9.0, dim=6),
        ["`rope_base`", "even head width", "dim=6, num_heads=2"],
    ),
    # the modules' calls
    "a list": (lambda: module()([[[0.0] * D]]), ["`x`", "(B, L, D) = (any, any, 8)", "type list"]),
    "integer inputs": (lambda: module()(of(x, int)), ["`x`", "a floating-point array", "got dtype int64"]),
    "one sequence": (lambda: module()(array(L, D)), ["`x`", "(B, L, D)", "got shape (6, 8)"]),
    "another width": (lambda: module()(array(B, L, 9)), ["`x`", "(any, any, 8)", "got shape (2, 6, 9)"]),
    "time before batch": (
        lambda: module()(array(L, B, D), mask=mask),
        ["`mask`", "(B, L) = (6, 2)", "got shape (2, 6)"],
    ),
    "an integer mask": (lambda: module()(x, mask=of(mask, int)), ["`mask`", "boolean", "got dtype int64"]),
    "another's mask": (lambda: module()(x, key_mask=mask), ["unexpected keyword argument 'key_mask'"]),
    "a mask by position": (lambda: module()(x, mask), ["takes 2 positional arguments but 3 were given"]),
    "context where none is taken": (lambda: module("local")(x, context=x), ["local: `context` is not supported"]),
    "context of another batch": (
        lambda: module()(x, context=array(3, 3, D)),
        ["`context`", "(2, any, 8)", "(3, 3, 8)"],
    ),
    "context_mask alone": (lambda: module()(x, context_mask=mask), ["`context_mask` was given without `context`"]),
    "context_mask of x": (
        lambda: module()(x, context=context, context_mask=mask),
        ["`context_mask`", "(B, M) = (2, 3)", "got shape (2, 6)"],
    ),
    "causal context": (lambda: module(causal=True)(x, context=x), ["`context` is not supported with causal=True"]),
    "turned context": (lambda: module(rope_base=9.0)(x, context=x), ["`context`", "`rope_base`"]),
    "a depth that is not there": (
        lambda: build("maw")(np.zeros((B, L, D), np.float32), depth=np.array([0, 8])),
        ["`depth`", "in 0..7", "got [0 8]"],
    ),
    # decoding
    "decoding both ways": (lambda: step(causal=False), ["`step` needs causal=True", "got causal=False"]),
    "a cache for both ways": (lambda: module().init_cache(1, 4), ["`init_cache` needs causal=True"]),
    "what cannot decode": (lambda: module("maw").init_cache(1, 4), ["maw: `init_cache` is not supported"]),
    "no cache": (lambda: step(), ["`cache`", "the KeyValueCache of this module's `init_cache`", "got a NoneType"]),
    "another's cache": (
        lambda: step("mamba", full_cache("standard", 4)),
        ["`cache`", "the MambaCache of this module's `init_cache`", "got a KeyValueCache"],
    ),
    "a cache of other heads": (
        lambda: step("standard", module(causal=True, num_heads=4).init_cache(1, 4)),
        ["`cache.keys`", "(1, 4, 2, 4)", "got shape (1, 4, 4, 2)"],
    ),
    "a cache for no token": (
        lambda: module(causal=True).init_cache(1, 0),
        ["`max_length`", "a positive integer", "got 0"],
    ),
    "a cache of half a token": (lambda: module(causal=True).init_cache(1, 1.5), ["`max_length`", "got 1.5"]),
    "a cache of integers": (
        lambda: module(causal=True).init_cache(1, 4, int),
        ["`dtype`", "a floating-point type"],
    ),
    "past the end": (
        lambda: step("standard", full_cache("standard", 4)),
        ["`cache` is full", "4 tokens", "made it for 4"],
    ),
    "past the end of a short ring": (lambda: step("local", full_cache("local", 4)), ["local: `cache` is full"]),
    "two tokens at once": (
        lambda: step("standard", module(causal=True).init_cache(1, 4), (1, 2, D)),
        ["`x`", "(B, 1, D) = (1, 1, 8)", "got shape (1, 2, 8)"],
    ),
    "tokens of another batch": (
        lambda: step("standard", module(causal=True).init_cache(1, 4), (2, 1, D)),
        ["`x`", "(1, 1, 8)", "got shape (2, 1, 8)"],
    ),
    # operations
    "heads first": (
        lambda: ops.standard_attention(*[array(B, H, L, E)] * 3, mask=mask),
        ["standard_attention: `mask`", "(B, M) = (2, 2)", "got shape (2, 6)"],
    ),
    "heads not split": (lambda: ops.standard_attention(x, x, x), ["`q`", "(B, L, H, E)", "got shape (2, 6, 8)"]),
    "a list for queries": (
        lambda: ops.local_attention([0.0], k, v, window=1),
        ["`q`", "(B, L, H, E)", "type list"],
    ),
    "no keys": (lambda: ops.standard_attention(q, None, v), ["`k`", "(B, M, H, E)", "type NoneType"]),
    "integer queries": (
        lambda: ops.standard_attention(of(q, int), k, v),
        ["`q`", "floating-point", "dtype int64"],
    ),
    "complex values": (
        lambda: ops.standard_attention(q, k, of(v, complex)),
        ["`v`", "floating-point", "dtype complex128"],
    ),
    "heads that do not group": (
        lambda: ops.standard_attention(q, array(B, L, 3, E), v),
        ["`k`", "3 heads", "the 2 of `q`"],
    ),
    "values of other heads": (
        lambda: ops.standard_attention(q, k, array(B, L, 1, E)),
        ["`v`", "(2, 6, 2, any)", "(2, 6, 1, 4)"],
    ),
    "values of another length": (
        lambda: ops.standard_attention(q, k, array(B, 7, H, E)),
        ["`v`", "(2, 6, 2, any)", "(2, 7, 2, 4)"],
    ),
    "keys of another width": (
        lambda: ops.standard_attention(q, array(B, L, H, 5), v),
        ["`k`", "(2, any, any, 4)", "(2, 6, 2, 5)"],
    ),
    **{
        f"a mask of shape {shape}": (
            lambda shape=shape: ops.standard_attention(q, k, v, mask=array(*shape, dtype=bool)),
            ["`mask`", "(B, M) = (2, 6)", f"got shape {shape}"],
        )
        for shape in [(L,), (B, L, 1), (B, 1, L), (B, L, L), (B, 1, 1, L), (B, L + 1)]
    },
    "a float mask": (lambda: ops.standard_attention(q, k, v, mask=x), ["`mask`", "(2, 6)", "(2, 6, 8)"]),
    "a mask of ones": (
        lambda: ops.standard_attention(q, k, v, mask=of(mask, jnp.float32)),
        ["`mask`", "boolean", "float32"],
    ),
    "a mask in words": (lambda: ops.standard_attention(q, k, v, mask="causal"), ["`mask`", "(B, M)", "type str"]),
    "a bias that does not broadcast": (
        lambda: ops.standard_attention(q, k, v, bias=array(3, 1, L, L)),
        ["`bias`", "broadcastable to (B, H, L, M) = (2, 2, 6, 6)", "got shape (3, 1, 6, 6)"],
    ),
    "a mask as a bias": (
        lambda: ops.standard_attention(q, k, v, bias=array(L, L, dtype=bool)),
        ["`bias`", "key masks go to `mask`", "bool"],
    ),
    "a bias by name": (
        lambda: ops.standard_attention(q, k, v, bias="alibi"),
        ["`bias`", "(B, H, L, M)", "type str"],
    ),
    "a scale in words": (
        lambda: ops.standard_attention(q, k, v, scale="auto"),
        ["`scale`", "a number or None", "got 'auto'"],
    ),
    "a scale for each feature": (
        lambda: ops.standard_attention(q, k, v, scale=array(E)),
        ["`scale`", "a number", "(4,)"],
    ),
    "an operation that is causal in words": (
        lambda: ops.standard_attention(q, k, v, causal="no"),
        ["`causal`", "True or False", "got 'no'"],
    ),
    "an unknown implementation": (
        lambda: ops.selective_scan(**scanned, d=array(5), implementation="cuda"),
        ["`implementation`", "'dense', 'xla'", "got 'cuda'"],
    ),
    "one mask for two streams": (
        lambda: ops.dual_kv_attention(q, k, v, k, v, mask=mask),
        ["unexpected keyword argument 'mask'"],
    ),
    "integer keys of the second": (
        lambda: ops.dual_kv_attention(q, k, v, of(k, int), v),
        ["`k2`", "floating-point", "int64"],
    ),
    "a bias for each head": (
        lambda: ops.dual_kv_attention(q, k, v, k, v, stream_bias=array(H, 1)),
        ["`stream_bias`", "(2, H) = (2, 2)", "got shape (2, 1)"],
    ),
    "globals of another batch": (
        lambda: ops.local_global_attention(np.zeros((B, L, H, E)), k, v, *[np.zeros((3, 1, H, E))] * 2, window=1),
        ["`k_global`", "(2, any, any, 4)", "got shape (3, 1, 2, 4)"],
    ),
    "no window": (lambda: ops.local_attention(q, k, v), ["required keyword-only argument: 'window'"]),  # type: ignore[call-arg]
    "a float stride": (
        lambda: ops.strided_attention(q, k, v, stride=2.0),
        ["`stride`", "a positive integer", "got 2.0"],
    ),
    "one mass for all heads": (lambda: gravity(log_mass=array(B, L, 1)), ["`log_mass`", "(2, 6, 2)", "(2, 6, 1)"]),
    "a power for three heads": (
        lambda: gravity(power=array(3)),
        ["`power`", "() or (H,) = (2,)", "got shape (3,)"],
    ),
    "a scalar vacuum": (
        lambda: gravity(
            **{n: np.zeros(a.shape) for n, a in {"q": q, "k": k, "v": v, "log_mass": log_mass}.items()}, vacuum=0.0
        ),
        ["`vacuum`", "(B, L, H) = (2, 6, 2)", "type float"],
    ),
    "no timescales": (
        lambda: ops.multi_timescale_attention(q, k, v, log_gamma),
        ["`q`", "(B, L, T, H, E)", "(2, 6, 2, 4)"],
    ),
    "a rate for two of three": (
        lambda: ops.multi_timescale_attention(*[timescales] * 3, array(2)),
        ["`log_gamma`", "(T,) or (T, H) = (3,)", "got shape (2,)"],
    ),
    "masses without timescales": (
        lambda: ops.gravitational_multi_timescale_attention(q, k, v, log_mass, log_gamma, power=2, softening=1),
        ["`log_mass`", "(B, L, T, H)", "got shape (2, 6, 2)"],
    ),
    "a codebook for no head": (
        lambda: vq(array(5, E), codebook),
        ["`codebook_q`", "(H, S, E) = (2, any, 4)", "(5, 4)"],
    ),
    "a codebook of another width": (
        lambda: vq(codebook, array(H, 5, 3)),
        ["`codebook_k`", "(2, any, 4)", "(2, 5, 3)"],
    ),
    "an empty codebook": (
        lambda: vq(codebook, array(H, 0, E)),
        ["`codebook_k`", "at least one code", "(2, 0, 4)"],
    ),
    "blocks of nothing": (
        lambda: vq(codebook, codebook, block_length=0),
        ["`block_length`", "a positive integer", "got 0"],
    ),
    "a seed for a key": (
        lambda: ops.hyper_attention(q, k, v, **KEY | {"key": 0}),
        ["`key`", "a key of jax.random", "type int"],
    ),
    "a projection of another width": (
        lambda: ops.favor_attention(q, k, v, array(7, 5)),
        ["`projection`", "(any, 4)", "(7, 5)"],
    ),
    "no projection": (
        lambda: ops.favor_attention(q, k, v, None),
        ["`projection`", "(F, E) or (H, F, E)", "type NoneType"],
    ),
    "an unknown feature": (
        lambda: ops.favor_attention(q, k, v, projection, feature="favor+"),  # type: ignore[arg-type]
        ["`feature`", "softmax, softmax_hyp", "got 'favor+'"],
    ),
    "rates transposed": (lambda: scan(a=array(3, 5)), ["`a`", "(E, N) = (5, any)", "got shape (3, 5)"]),
    "a skip of one number": (lambda: scan(d=1.0), ["`d`", "(E,) = (5,)", "type float"]),
    "a state transposed": (
        lambda: scan(initial_state=array(B, 3, 5)),
        ["`initial_state`", "(2, 5, 3)", "(2, 3, 5)"],
    ),
    "steps of nothing": (lambda: scan(chunk=0), ["`chunk`", "a positive integer", "got 0"]),
    "positions of another length": (lambda: rotary(q, array(7)), ["`positions`", "(L,) or (B, L) = (6,)", "(7,)"]),
    # register
    "a name that is taken": (
        lambda: register(name="standard"),
        ["`name` 'standard' is taken by", "StandardAttention"],
    ),
    "a name that is no name": (lambda: register(name="a,b"), ["`name`", "an identifier", "got 'a,b'"]),
    "no module": (lambda: register(Bare), ["'mine'", "a subclass of nnx.Module", "Bare"]),
    "another constructor": (
        lambda: register(OtherConstructor),
        ["'mine'", "(dim, num_heads, *, causal", "its own: "],
    ),
    "a call without mask": (
        lambda: register(NoMask),
        ["'mine'", "(x, *, mask", "unexpected keyword argument 'mask'"],
    ),
    "an option by position": (
        lambda: register(PositionalOption),
        ["'mine'", "options by keyword only", "got `window`"],
    ),
    "decoding without order": (lambda: register(decode=True), ["'mine'", "causal to decode", "'causal': False"]),
    "decoding that refuses": (
        lambda: register(causal=True, decode=True),
        ["'mine'", "the methods of what it supports", "no `init_cache` of its own"],
    ),
    "half a decoder": (
        lambda: register(HalfDecoder, causal=True, decode=True),
        ["'mine'", "no `step` of its own"],
    ),
    "no attention": (lambda: register(Unwritten), ["'mine'", "no `attend` of its own"]),
    "no attention of projections": (lambda: register(Unmixed), ["'mine'", "no `mix` of its own"]),
    "weights of nothing": (lambda: register(weights=True), ["'mine'", "no `weights` of its own"]),
    "weights of no projections": (
        lambda: register(Weightless, weights=True),
        ["'mine'", "no `mix_weights` of its own"],
    ),
    "a context that is refused": (lambda: register(cross=True), ["'mine'", "must set `cross = True`"]),
    "implementations of no option": (
        lambda: register(implementations=("xla",)),
        ["'mine'", "must take the option `implementation`", "('xla',)"],
    ),
    "neither way": (
        lambda: register(bidirectional=False),
        ["'mine'", "causal or bidirectional", "'bidirectional': False"],
    ),
    "one implementation": (
        lambda: register(implementations="xla"),
        ["`implementations`", "a tuple of names", "got 'xla'"],
    ),
}


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_is_wrong(mistake):
    call, pieces = MISTAKES[mistake]
    with pytest.raises((ValueError, TypeError, NotImplementedError)) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    assert [piece for piece in pieces if piece not in message] == [], message


def test_a_kernel_that_cannot_be_had_says_why():
    zeros = np.zeros((B, L, H, E), jnp.bfloat16)
    with pytest.raises(NotImplementedError) as error:
        ops.standard_attention(zeros, zeros, zeros, implementation="mosaic")
    message = str(error.value)
    assert "implementation='mosaic'" in message and "use None, 'xla' or 'dense'" in message


COMMANDS = {
    "train": ("train.__main__", ["--config", "tests/toy.py", "--workdir"], "FILE", "FILE: it is a file"),
    "train below a file": (
        "train.__main__",
        ["--config", "tests/toy.py", "--workdir"],
        "FILE/run",
        "Not a directory",
    ),
    **{
        f"train {setting}": (
            "train.__main__",
            ["--config", "tests/toy.py", f"--config.{setting}", "--workdir"],
            "run",
            words,
        )
        for setting, words in {
            "steps=0": "--config.steps must be at least 1, got 0",
            "batch_size=-8": "--config.batch_size must be at least 1, got -8",
            "seed=-1": "--config.seed must be at least 0, got -1",
            "eval_every=0": "--config.eval_every must be at least 1, got 0",
            "optimizer.learning_rate=-1": "--config.optimizer.learning_rate must be at least 0, got -1.0",
            "optimizer.learning_rate=nan": "--config.optimizer.learning_rate must be at least 0, got nan",
            "dtype=float33": "`dtype` must be a floating-point type such as 'bfloat16', got 'float33'",
            "steps=1.5": "--config.steps=1.5: invalid literal for int",
            "Seed=1": "`config` has no `Seed`; it has",
        }.items()
    },
    "eval of nothing": ("eval.__main__", ["--workdir"], "none", "no config.json in"),
    "eval of a file": ("eval.__main__", ["--workdir"], "FILE", "cannot read"),
    "eval abbreviated": ("eval.__main__", ["--work"], "run", "arguments are required: --workdir"),
    "benchmark of a near miss": (
        "eval.benchmark",
        ["--mechanisms"],
        "dualkv",
        "unknown mechanism 'dualkv'; registered",
    ),
    "benchmark of a length in words": (
        "eval.benchmark",
        ["--lengths"],
        "1k",
        "positive integers such as 1024,4096, got '1k'",
    ),
    "benchmark of heads": ("eval.benchmark", ["--heads"], "3", "a multiple of `num_heads`, got 512 and 3"),
    "benchmark into a file": (
        "eval.benchmark",
        ["--mechanisms", "standard", "--out"],
        "FILE",
        "FILE: it is a file",
    ),
    "experiment of another name": (
        "eval.experiments.__main__",
        [],
        "videos",
        "invalid choice: 'videos' (choose from",
    ),
    "experiment into a file": ("eval.experiments.__main__", ["video", "--out"], "FILE", "FILE: it is a file"),
    "experiment seeds": (
        "eval.experiments.__main__",
        ["video", "--seeds"],
        "a",
        "non-negative integers such as 0,1,2, got 'a'",
    ),
    "targets": ("eval.targets", ["--targets"], "h10", "unknown: 'h10'; there are a100, l4"),
}


@pytest.mark.parametrize("mistake", COMMANDS)
def test_a_wrong_command_is_one_line_and_exit_code_2(mistake, capsys, tmp_path):
    name, arguments, last, words = COMMANDS[mistake]
    (tmp_path / "FILE").touch()
    last = str(tmp_path / last) if last.isupper() or "/" in last or last in ("run", "none") else last
    with pytest.raises(SystemExit) as stop:
        cli.run(importlib.import_module(name).main, [*arguments, last])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name",
    ["train.__main__", "eval.__main__", "eval.benchmark", "eval.experiments.__main__", "eval.targets", "eval.gpu"],
)
def test_help_names_every_option_and_how_it_is_called(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(importlib.import_module(name).main, ["--help"])
    out, error = capsys.readouterr()
    assert stop.value.code == 0 and not error
    assert f"usage: python -m {name.removesuffix('.__main__')}" in out
    source = importlib.util.find_spec(name).loader.get_source(name)
    options = {text.partition('"')[0] for text in source.split('add("')[1:] + source.split('add_argument("')[1:]}
    assert options and [option for option in options if option not in out] == []


# What looks like a mistake and is none.


@pytest.mark.parametrize("shape", [(0, L, D), (B, 0, D)], ids=["no sequence", "no token"])
@pytest.mark.parametrize("name", sorted(attn_jax.MECHANISMS))
def test_there_may_be_nothing_to_compute(name, shape):
    def call():
        empty = jnp.zeros(shape)
        return build(name)(empty, mask=jnp.zeros(shape[:2], bool))

    assert nnx.eval_shape(call).shape == shape


def test_a_sequence_without_keys_gives_zeros():
    nothing = np.zeros((B, 0, H, E), np.float32)
    assert not np.any(ops.standard_attention(np.ones((B, L, H, E), np.float32), nothing, nothing))


def test_a_float64_array_of_numpy_becomes_the_default_type():
    ones = np.ones((1, 2, H, E))
    assert ops.standard_attention(ones, ones, ones).dtype == jnp.float32
    assert nnx.eval_shape(lambda: build()(np.ones((1, 2, D)))).dtype == jnp.float32


def test_numpy_integers_are_integers():
    assert module(dim=np.int64(8), num_heads=np.int32(2)).head_dim == 4
