"""The laws that every registered mechanism keeps; a new one joins by registering.

Modules are small, `SMALL` makes windows, chunks and blocks smaller than the sequences. Every law runs causal and
bidirectional where the registry says that the mechanism can do both.

Compilation is nearly all of the time that this takes. So most laws share two programs, each with the values and
all gradients of a module: `Compiled.run` for a padded batch and its mask, `transformed` for a batch without one.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import attn_jax
from attn_jax.mechanisms.base import Attention
from train.config import COMMON

DIM, HEADS = 16, 2
# A length of 1, primes, shorter and longer than any block; and what a batch of them is padded to.
LENGTH, ROWS, PADDED = 13, 5, 17
LENGTHS = (LENGTH, LENGTH, 3, 2, 1)

# float32 sums of some dozen terms, in another order: a few units in the last place of values around 1.
ROUNDING = 2e-5
# bfloat16 has 8 bits; projections, mixture and output each round, and errors add up over widths of 16.
BFLOAT16 = 0.06

# Options that make a mechanism's blocks shorter than the test sequences.
SMALL: dict[str, dict[str, Any]] = {
    "hyper": {"block_size": 4, "num_samples": 3, "min_length": 7},
    "local": {"window": 3},
    "local_global": {"window": 3, "num_globals": 2},
    "performer": {"num_features": 24, "chunk": 4},
    "strided": {"stride": 3},
    # Interpreted kernels take blocks of codes in turn.
    "vq": {"num_codes": 40},
    # Of two mechanisms with the same two decoders, each has one.
    "gravitational_multi_timescale": {"decoder": "laplace", "num_lags": 5},
}

# Options that cut the computation and must not change the result: one, a ragged rest, and more than there is.
COMPUTATIONAL = {"chunk": (1, 5, 64), "block_length": (1, 5, 64)}

CASES = [
    (name, causal)
    for name, mechanism in attn_jax.MECHANISMS.items()
    for causal in (False, True)
    if (mechanism.causal if causal else mechanism.bidirectional)
]
every_case = pytest.mark.parametrize(
    "name,causal", CASES, ids=[f"{n}-{'causal' if c else 'full'}" for n, c in CASES]
)
every_mechanism = pytest.mark.parametrize("name", list(attn_jax.MECHANISMS))


def build(name: str, causal: bool, **options: Any) -> Any:
    known = attn_jax.MECHANISMS[name].options()
    options = {k: v for k, v in SMALL.get(name, {}).items() if k in known} | options
    module = attn_jax.build(name, dim=DIM, num_heads=HEADS, causal=causal, rngs=nnx.Rngs(0), **options)
    module.eval()
    return module


@functools.lru_cache(maxsize=4)
def shared(name: str, causal: bool) -> Any:
    """A module and its compiled functions, for all laws: tests come mechanism by mechanism (tests/conftest.py)."""
    return Compiled(build(name, causal), checkpoint=not causal or not attn_jax.MECHANISMS[name].bidirectional)


@functools.partial(jax.jit, static_argnames="checkpoint")
def transformed(module: Any, x: Any, weights: Any, checkpoint: bool) -> Any:
    """The output and all gradients of `module` itself, by jit, vmap over sequences and, if asked, checkpoint."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def loss(params: Any, x: Any) -> Any:
        y = jax.vmap(lambda row: nnx.merge(graph, params, rest)(row[None])[0])(x)
        return jnp.sum(y * weights), y

    loss = jax.checkpoint(loss) if checkpoint else loss
    (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return y, gradients


class Compiled:
    """A module and its programs. Checkpoint, slow to trace, is for one direction of a mechanism."""

    def __init__(self, module: Any, checkpoint: bool = False):
        self.module = module
        self.transformed = functools.partial(transformed, module, checkpoint=checkpoint)
        self.graph, self.params, self.rest = nnx.split(module, nnx.Param, ...)
        self.call = jax.jit(lambda x, mask=None: self.apply(self.params, x, mask))
        self._run = jax.jit(jax.value_and_grad(self.weighted, argnums=(0, 1), has_aux=True))

    def apply(self, params: Any, x: Any, mask: Any = None) -> Any:
        return nnx.merge(self.graph, params, self.rest)(x, mask=mask)

    def weighted(self, params: Any, x: Any, mask: Any, weights: Any) -> Any:
        """A generic loss on real tokens, and the output. (Not a product: 0 x NaN is NaN.)"""
        y = self.apply(params, x, mask)
        return jnp.sum(y * weights if mask is None else jnp.where(mask[:, :, None], y * weights, 0)), y

    def run(self, x: Any, mask: Any, weights: Any) -> Any:
        """The output, and the gradients of parameters and `x`."""
        (_, y), gradients = self._run(self.params, x, mask, weights)
        return jax.tree.map(np.asarray, (y, gradients))

    def values(self, x: Any, mask: Any = None) -> Any:
        """The output alone, of the programs that all laws share."""
        zeros = np.zeros_like(x)
        y, _ = self.transformed(x, zeros) if mask is None else self.run(x, mask, zeros)
        return np.asarray(y)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unmasked(seed: int) -> np.ndarray:
    return normal(seed, 2, LENGTH, DIM)


def padded(seed: int) -> np.ndarray:
    return normal(seed, ROWS, PADDED, DIM)


def prefix_mask(*lengths: int, length: int = PADDED) -> np.ndarray:
    return np.arange(length) < np.array(lengths)[:, None]


def assert_close(actual: Any, expected: Any, tolerance: float = ROUNDING) -> None:
    chex.assert_trees_all_close(actual, expected, atol=tolerance, rtol=tolerance)


@every_case
def test_shape_and_dtype(name, causal):
    y = shared(name, causal).values(unmasked(0))
    chex.assert_shape(y, (2, LENGTH, DIM))
    chex.assert_type(y, jnp.float32)
    chex.assert_tree_all_finite(y)


@every_case
def test_padding_a_batch_changes_nothing(name, causal):
    """Values and gradients of a padded, masked batch are those of its sequences alone, without a mask.

    At every length (semantics 1, 4 and 7); the longest by way of transformations, which change nothing either.
    """
    compiled = shared(name, causal)
    x, weights, mask = padded(1), padded(2), prefix_mask(*LENGTHS)
    x[~mask], weights[3] = np.nan, 0  # a length of 2: values only
    y, (d_params, dx) = compiled.run(x, mask, weights)
    total = jax.tree.map(np.zeros_like, d_params)
    for rows in (slice(0, 2), slice(2, 3), slice(4, 5)):
        alone = rows, slice(0, LENGTHS[rows.start])
        if rows.start == 0:
            value, gradients = compiled.transformed(x[alone], weights[alone])
        else:
            value, gradients = compiled.run(x[alone], None, weights[alone])
        chex.assert_tree_all_finite(value)
        assert_close(y[alone], value)
        assert_close(dx[alone], gradients[1])
        total = jax.tree.map(np.add, total, gradients[0])
    assert_close(y[3:4, :2], compiled.call(x[3:4, :2]))
    assert_close(d_params, total, 5 * ROUNDING)  # sums over several sequences
    assert not dx[~mask].any()


@every_case
@settings(max_examples=10)
@given(seed=st.integers(0, 2**16), bad=st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
def test_masked_tokens_do_not_exist(name, causal, seed, bad):
    """Whatever masked tokens hold, anywhere in the sequence, nothing else changes, to the bit (semantics 1)."""
    compiled = shared(name, causal)
    mask = np.random.default_rng(seed).random((ROWS, PADDED)) < 0.6
    weights, clean, dirty = padded(seed), padded(seed + 1), padded(seed + 1)
    clean[~mask], dirty[~mask] = 0, bad
    y_clean, d_clean = compiled.run(clean, mask, weights)
    y_dirty, d_dirty = compiled.run(dirty, mask, weights)
    chex.assert_trees_all_equal(y_clean[mask], y_dirty[mask])
    chex.assert_trees_all_equal(d_clean, d_dirty)
    chex.assert_tree_all_finite(d_dirty)
    assert not d_dirty[1][~mask].any()


@every_case
def test_a_real_token_matters(name, causal):
    """The counterpart: what is not masked does have influence on others, so that the laws above say something."""
    compiled = shared(name, causal)
    x, mask = padded(3), prefix_mask(LENGTH, 7, 5, 0, 0)
    x[:3, :LENGTH] = normal(3, 3, LENGTH, DIM)  # a draw of which "hyper" samples the token in question
    changed = x.copy()
    changed[:, 2] += 1
    difference = np.abs(compiled.values(changed, mask) - compiled.values(x, mask)).max(-1)
    assert (difference[:3, 3:5] > 1e-4).all()


@every_case
def test_a_sequence_without_real_tokens_gives_zero(name, causal):
    """Exactly 0 with finite gradients (semantics 2)."""
    compiled = shared(name, causal)
    y, gradients = compiled.run(padded(4), prefix_mask(PADDED, 0, 5, 0, 1), padded(5))
    assert not y[[1, 3]].any()
    chex.assert_tree_all_finite((y, gradients))


@pytest.mark.parametrize("name", [n for n, m in attn_jax.MECHANISMS.items() if m.causal])
@pytest.mark.parametrize("masked", [False, True])
def test_causality_by_jacobian(name, masked):
    """dy_i / dx_j is exactly 0 for j > i, and is not for j <= i (semantics 3)."""
    compiled = shared(name, True)
    real = np.arange(PADDED if masked else LENGTH) < LENGTH
    real[[0, 4, 5]] &= not masked
    rows = ROWS if masked else 2  # of the Jacobian at once: batches of sizes for which programs are there
    x, mask = np.tile(normal(6, 1, len(real), DIM), (rows, 1, 1)), np.tile(real, (rows, 1))
    one_token = np.eye(len(real), dtype=np.float32)[:, :, None] * normal(7, DIM)
    dy_dx = []
    for start in range(0, len(real), rows):
        weights = one_token[np.arange(start, start + rows) % len(real)]
        _, (_, dx) = compiled.run(x, mask, weights) if masked else compiled.transformed(x, weights)
        dy_dx.extend(np.abs(dx).max(-1))
    dy_dx = np.stack(dy_dx[: len(real)])
    assert not np.triu(dy_dx, 1).any()
    neighbours = real & np.roll(real, 1)
    neighbours[0] = False
    index = np.flatnonzero(neighbours)
    assert (np.diag(dy_dx)[real] > 0).all() and (dy_dx[index, index - 1] > 0).all()


@pytest.mark.parametrize("name", [n for n, m in attn_jax.MECHANISMS.items() if m.causal])
def test_the_future_cannot_be_seen_at_any_size(name):
    """Stabilisers and normalisers see the future through huge values first: those must change nothing earlier."""
    compiled = shared(name, True)
    x = unmasked(8)
    future = x.copy()
    future[:, 8:] *= 50
    assert_close(compiled.values(future)[:, :8], compiled.values(x)[:, :8], 1e-6)


@every_case
def test_rows_of_a_batch_are_independent(name, causal):
    """Row b is the same whatever the other rows hold (semantics 5)."""
    compiled = shared(name, causal)
    x, mask = padded(9), prefix_mask(LENGTH, 7, 5, 9, 2)
    other, other_mask = padded(10) * 9, prefix_mask(3, 7, 1, PADDED, 4)
    other[1] = x[1]
    assert_close(compiled.values(other, other_mask)[1], compiled.values(x, mask)[1], 1e-6)


@every_case
def test_chunks_change_nothing(name, causal):
    """Options that only cut the computation do not change the result (semantics 5)."""
    known = attn_jax.MECHANISMS[name].options()
    x, mask = padded(11), prefix_mask(*LENGTHS)
    for option, values in COMPUTATIONAL.items():
        for value in values if option in known else ():
            other = Compiled(build(name, causal, **{option: value}))
            assert_close(other.call(x, mask), shared(name, causal).values(x, mask))


@every_case
def test_implementations_agree(name, causal):
    """The readable implementation has the values and gradients of the default, which is "xla" on a CPU."""
    if "dense" in attn_jax.MECHANISMS[name].implementations:
        batch = padded(12), prefix_mask(PADDED, 7, 1, 0, LENGTH), padded(13)
        other = Compiled(build(name, causal, implementation="dense"))
        assert_close(other.run(*batch), shared(name, causal).run(*batch), 1e-4)


@pytest.mark.parametrize("name", [n for n, m in attn_jax.MECHANISMS.items() if "mosaic" in m.implementations])
def test_the_kernel_agrees(name):
    """The fused kernel, interpreted, gives the values and gradients of the portable path."""
    causal = attn_jax.MECHANISMS[name].causal
    x, mask, weights = padded(12), prefix_mask(LENGTH - 3, 7, 1, 0, 9), padded(13)
    weights[1:] = 0  # the gradients are those of the first sequence
    kernel = Compiled(build(name, causal, implementation="mosaic_interpret"))
    y, (d_params, dx) = kernel.run(x[:1], mask[:1], weights[:1])
    expected, (d_expected, dx_expected) = shared(name, causal).run(x, mask, weights)
    assert_close((y, d_params, dx), (expected[:1], d_expected, dx_expected[:1]), 1e-4)


@every_case
def test_every_parameter_is_alive(name, causal):
    """No parameter is without influence on the output."""
    _, (d_params, _) = shared(name, causal).run(padded(16), prefix_mask(LENGTH, 7, 9, 5, 3), padded(17))
    for path, gradient in nnx.to_flat_state(d_params):
        assert np.abs(gradient[...]).max() > 1e-6, f"{name}: parameter {path} has no influence"


@every_case
def test_half_precision(name, causal):
    """bfloat16 computation stays near float32, with the same parameters."""
    half = build(name, causal, dtype=jnp.bfloat16)
    x, mask = padded(18), prefix_mask(*LENGTHS)
    y = jax.jit(lambda x: half(x, mask=mask))(x)
    chex.assert_type(y, jnp.bfloat16)
    reference = shared(name, causal).values(x, mask)
    assert np.abs(np.asarray(y, np.float32) - reference).max() < BFLOAT16 * max(1, np.abs(reference).max())


@every_case
def test_shapes_are_known_without_computing(name, causal):
    """Of the output, and of the parameters of a module that is only described."""
    module, x = shared(name, causal).module, unmasked(19)
    assert jax.eval_shape(module, x) == jax.ShapeDtypeStruct(x.shape, jnp.float32)
    abstract = nnx.eval_shape(lambda: build(name, causal))
    chex.assert_trees_all_equal_shapes_and_dtypes(nnx.state(abstract, nnx.Param), nnx.state(module, nnx.Param))


@pytest.mark.parametrize("name", [n for n, m in attn_jax.MECHANISMS.items() if m.decode and m.causal])
def test_decoding_equals_the_parallel_form(name):
    """Token by token from an empty cache gives the causal output."""
    compiled = shared(name, True)
    x = unmasked(20)
    cache = compiled.module.init_cache(2, LENGTH, jnp.float32)
    step = jax.jit(compiled.module.step)
    outputs = []
    for t in range(LENGTH):
        y, cache = step(x[:, t : t + 1], cache)
        chex.assert_shape(y, (2, 1, DIM))
        outputs.append(y)
    assert_close(np.concatenate(outputs, axis=1), compiled.values(x))


@every_case
def test_attention_weights(name, causal):
    """`(B, H, L, M)`, non-negative, rows of sum 1 over real keys (0 for masked queries), causal where asked.

    Where a mechanism has a sink, which is no token, the rows lack what its `sink_share` says.
    """
    mechanism = attn_jax.MECHANISMS[name]
    compiled = shared(name, causal)
    x, mask = normal(21, 3, LENGTH, DIM), prefix_mask(LENGTH, 7, 0, length=LENGTH)
    sink_share = getattr(compiled.module, "sink_share", lambda x, mask: None)
    weights, taken = jax.jit(
        lambda x: (compiled.module.attention_weights(x, mask=mask), sink_share(x, mask=mask))
    )(x)
    if not mechanism.weights:
        assert weights is None
        return
    chex.assert_shape(weights, (3, HEADS, LENGTH, LENGTH))
    weights = np.asarray(weights)
    assert (weights >= 0).all() and not weights[~np.broadcast_to(mask[:, None, None], weights.shape)].any()
    rows = np.broadcast_to(mask[:, None], (3, HEADS, LENGTH)).astype(np.float32)
    if taken is not None:
        taken = np.asarray(taken)
        assert (taken >= 0).all() and not taken[rows == 0].any()
        rows = rows - taken
    assert_close(weights.sum(-1), rows)
    assert not causal or not np.triu(weights, 1).any()


@pytest.mark.parametrize("name", [n for n, m in attn_jax.MECHANISMS.items() if m.cross and m.bidirectional])
def test_cross_attention(name):
    """`context` of another length is read under its own mask, and only it."""
    compiled = shared(name, False)
    x, context, mask = normal(22, 2, 5, DIM), normal(23, 2, LENGTH, DIM), prefix_mask(LENGTH, 7, length=LENGTH)
    call = jax.jit(lambda context, mask: compiled.module(x, context=context, context_mask=mask))
    short = jax.jit(lambda context: compiled.module(x[1:], context=context))
    dirty = np.where(mask[:, :, None], context, np.nan).astype(np.float32)
    y = call(dirty, mask)
    assert_close(y[0], call(context, np.ones_like(mask))[0])
    assert_close(y[1:], short(context[1:, :7]))
    assert not np.asarray(call(context, np.zeros_like(mask))).any()
    assert np.abs(call(context + 1, mask) - y).max() > 1e-4


@every_case
def test_unsupported_arguments_raise(name, causal):
    """One clear error that names the mechanism and the argument (semantics 6)."""
    mechanism, module = attn_jax.MECHANISMS[name], shared(name, causal).module
    x = normal(24, 2, LENGTH, DIM)
    wrong = [
        ("`mask`", lambda: module(x, mask=np.ones((2, LENGTH), np.float32))),
        ("`mask`", lambda: module(x, mask=np.ones((2, LENGTH + 1), bool))),
        ("`x`", lambda: module(x[..., :-1])),
        ("`x`", lambda: module(x[0])),
        ("`x`", lambda: module(x.astype(np.int32))),
        ("`context_mask`", lambda: module(x, context_mask=np.ones((2, LENGTH), bool))),
        ("nonsense", lambda: build(name, causal, nonsense=1)),
        ("`num_heads`", lambda: attn_jax.build(name, dim=DIM, num_heads=3, causal=causal, rngs=nnx.Rngs(0))),
    ]
    if not mechanism.cross:
        wrong.append(("`context`", lambda: module(x, context=x)))
    if mechanism.implementations:
        wrong.append(("implementation", lambda: build(name, causal, implementation="nonsense")(x)))
    for words, call in wrong:
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert name in str(error.value)


VARIANTS = {
    "dual_kv": [{"param_mode": "lowrank"}, {"param_mode": "grouped"}, {"merge": "feature"}],
    "maw": [{"projections": "full"}],
    "multi_timescale": [{"decoder": "laplace"}],
    "gravitational_multi_timescale": [{"decoder": "laplace"}],
}


@every_mechanism
def test_parameters_can_be_laid_out_on_a_mesh(name):
    """The trainer has a rule for every logical axis, and none splits a parameter twice over one mesh axis."""
    rules = dict(COMMON["sharding_rules"])
    for options in [{}, *VARIANTS.get(name, [])]:
        for path, parameter in nnx.to_flat_state(nnx.state(build(name, False, **options), nnx.Param)):
            axes = [axis for axis in parameter.get_metadata().get("out_sharding") or () if axis is not None]
            assert set(axes) <= set(rules), f"{name}: {path} has an axis without a rule, {axes}"
            mesh_axes = [rules[axis] for axis in axes if rules[axis] is not None]
            assert len(set(mesh_axes)) == len(mesh_axes), f"{name}: {path} is split twice over one of {mesh_axes}"


@every_mechanism
def test_the_registry_tells_the_truth(name):
    """Declared capabilities are those that the class has."""
    mechanism = attn_jax.MECHANISMS[name]
    assert mechanism.name == name and mechanism.time and mechanism.memory
    assert mechanism.causal or mechanism.bidirectional
    own = [
        getattr(mechanism.module, method, None) not in (None, getattr(Attention, method))
        for method in ("init_cache", "step")
    ]
    assert own == 2 * [mechanism.decode], "the base class has both, which say that they are not supported"
    for causal, supported in ((False, mechanism.bidirectional), (True, mechanism.causal)):
        if not supported:
            with pytest.raises(ValueError, match=name):
                build(name, causal)
    if mechanism.implementations:
        with pytest.raises(NotImplementedError, match="mosaic"):
            jax.eval_shape(build(name, mechanism.causal, implementation="mosaic"), normal(0, 1, 3, DIM))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"dual_kv.*standard"):
        attn_jax.build("nope", dim=DIM, num_heads=HEADS, rngs=nnx.Rngs(0))
