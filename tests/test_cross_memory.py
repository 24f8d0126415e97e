"""Cross-memory attention: reading a memory and fusing it with the sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attn_jax
from attn_jax.models.transformer import TransformerBlock
from tests import oracles

# float32 through projections of width 8, values around 1.
FLOAT32 = 1e-5

BATCH, LENGTH, MEMORY, HEADS, WIDTH = 2, 5, 7, 2, 4
DIM = HEADS * WIDTH


def close(actual, expected, tolerance=FLOAT32):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def build(name="cross_memory", **options):
    options = {"implementation": "dense"} | options
    return attn_jax.build(name, dim=DIM, num_heads=HEADS, rngs=nnx.Rngs(0), **options)


def tokens(seed, length=LENGTH):
    return np.random.default_rng(seed).normal(size=(BATCH, length, DIM)).astype(np.float32)


@nnx.jit
def call(module, x, context=None, context_mask=None):
    return module(x, context=context, context_mask=context_mask)


def definition(module, x, memory, mask=None):
    """What is read, float64."""

    def project(x, name):
        return np.float64(x) @ np.float64(getattr(module, name).kernel[...])

    q, k, v = (
        project(source, name).reshape(len(source), -1, HEADS, WIDTH)
        for source, name in ((x, "query"), (memory, "key"), (memory, "value"))
    )
    o, _, _ = oracles.softmax_attention(q, [oracles.Stream(k, v, mask)], scale=WIDTH**-0.5)
    return project(o.reshape(x.shape), "out")


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_the_output_is_affine_in_the_ratio(ratio):
    """`r` times what is read plus `1 - r` times x: x for 0, the reading alone for 1."""
    module, x, memory = build(fusion_ratio=ratio), tokens(0), tokens(1, MEMORY)
    mask = np.random.default_rng(0).random((BATCH, MEMORY)) < 0.6
    expected = ratio * definition(module, x, memory, mask) + (1 - ratio) * x
    close(call(module, x, memory, mask), expected)
    if ratio == 0:
        np.testing.assert_array_equal(call(module, x, memory, mask), x)


def test_a_gate_decides_per_token_and_channel():
    """It multiplies the ratio, from one half at the start."""
    module, x, memory = build(fusion_ratio=0.8, gate=True), tokens(0), tokens(1, MEMORY)
    read = definition(module, x, memory)
    close(call(module, x, memory), 0.4 * read + 0.6 * x)
    normal = np.random.default_rng(2).normal
    kernel, bias = normal(size=(DIM, DIM)), normal(size=DIM)
    module.gate.kernel[...], module.gate.bias[...] = jnp.float32(kernel), jnp.float32(bias)
    ratio = 0.8 / (1 + np.exp(-(x @ kernel + bias)))
    close(call(module, x, memory), ratio * read + (1 - ratio) * x)


def test_gradients_are_those_of_the_definition():
    module, x, memory = build(fusion_ratio=0.3, implementation="xla"), tokens(0), tokens(1, MEMORY)
    g, along_x, along_memory = tokens(2), tokens(3), tokens(4, MEMORY)
    dx, d_memory = jax.jit(jax.grad(lambda x, m: jnp.sum(g * module(x, context=m)), (0, 1)))(x, memory)
    step = 1e-6

    def moved(step):
        x_moved = np.float64(x) + step * along_x
        read = definition(module, x_moved, np.float64(memory) + step * along_memory)
        return (g * (0.3 * read + 0.7 * x_moved)).sum()

    # Central differences in float64: errors of step^2 and of 1e-16 / step.
    expected = (moved(step) - moved(-step)) / (2 * step)
    np.testing.assert_allclose(np.vdot(dx, along_x) + np.vdot(d_memory, along_memory), expected, rtol=1e-4)


def test_a_memory_is_a_set():
    """Neither its order nor repeating it matters."""
    module, x, memory = build(), tokens(0), tokens(1, MEMORY)
    mask = np.random.default_rng(0).random((BATCH, MEMORY)) < 0.6
    expected = call(module, x, memory, mask)
    close(call(module, x, memory[:, ::-1], mask[:, ::-1]), expected)
    close(call(module, x, np.tile(memory, (1, 2, 1)), np.tile(mask, (1, 2))), expected)


def test_from_one_slot_its_value_is_read():
    """Whatever the query is."""
    module, x, memory = build(), tokens(0), tokens(1, 1)
    close(call(module, x, memory), np.broadcast_to(module.out(module.value(memory)), x.shape))
    slot = build(num_slots=1)
    close(call(slot, x), np.broadcast_to(slot.out(slot.value(slot.slots[...])), x.shape))


@pytest.mark.parametrize("implementation", ["xla", "dense"])
def test_from_an_empty_memory_nothing_is_read(implementation):
    """Without tokens or without real ones; x passes as the ratio says, with finite gradients."""
    module, x = build(fusion_ratio=0.3, implementation=implementation), tokens(0)
    nothing = np.full((BATCH, MEMORY, DIM), np.nan, np.float32), np.zeros((BATCH, MEMORY), bool)
    for memory, mask in ((tokens(1, 0), None), nothing):
        close(call(module, x, memory, mask), 0.7 * x)

        def loss(x, memory=memory, mask=mask):
            return module(x, context=memory, context_mask=mask).sum()

        close(jax.jit(jax.grad(loss))(x), np.full(x.shape, 0.7))


@pytest.mark.parametrize("causal", [False, True])
def test_without_memory_it_is_standard_attention(causal):
    module, standard, x = build(causal=causal), build("standard", causal=causal), tokens(0)
    close(call(module, x), call(standard, x))
    weights = [jax.jit(m.attention_weights)(x) for m in (module, standard)]
    close(*weights)


@pytest.mark.parametrize("causal", [False, True])
def test_learned_slots_are_the_memory_where_none_is_given(causal):
    """All queries read all of them, causal ones too."""
    module, x = build(num_slots=3, causal=causal), tokens(0)
    slots = np.broadcast_to(module.slots[...], (BATCH, 3, DIM))
    close(call(module, x), definition(module, x, slots))
    weights = jax.jit(module.attention_weights)(x)
    assert weights.shape == (BATCH, HEADS, LENGTH, 3) and (weights > 0).all()
    close(weights.sum(-1), 1)
    if not causal:
        memory = tokens(1, MEMORY)
        close(call(module, x, memory), definition(module, x, memory))


@pytest.mark.parametrize("options", [{}, {"num_slots": 3}, {"fusion_ratio": 0.3, "gate": True}])
def test_every_option_decodes(options):
    module, x = build(causal=True, **options), tokens(0)
    expected, cache, step = call(module, x), module.init_cache(BATCH, LENGTH), jax.jit(module.step)
    for t in range(LENGTH):
        y, cache = step(x[:, t : t + 1], cache)
        close(y, expected[:, t : t + 1])
    assert cache.length == LENGTH


def test_there_is_exactly_one_residual():
    """A block adds x once; the module does where it is asked to."""
    block = TransformerBlock(DIM, HEADS, mechanism="cross_memory", options={"num_slots": 2}, rngs=nnx.Rngs(0))
    for layer in (block.attention.out, block.mlp_out):
        nnx.update(layer, jax.tree.map(jnp.zeros_like, nnx.state(layer)))
    x, memory = tokens(0), tokens(1, MEMORY)
    for context in (None, memory):
        np.testing.assert_array_equal(nnx.jit(lambda block, x, c: block(x, context=c))(block, x, context), x)
    close(call(build(residual=True), x, memory), call(build(), x, memory) + x)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"fusion_ratio": 1.5}, "`fusion_ratio` must be from 0 to 1, got 1.5"),
        ({"num_slots": -1}, "`num_slots` must be an integer >= 0, got -1"),
        ({"residual": True, "gate": True}, "`residual` .* takes fusion_ratio=1 and gate=False"),
        ({"residual": True, "fusion_ratio": 0.5}, "`residual` .* takes fusion_ratio=1 and gate=False"),
    ],
)
def test_options_that_do_not_fit_raise(options, message):
    with pytest.raises(ValueError, match=f"^cross_memory: {message}"):
        build(**options)
