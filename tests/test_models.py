"""The transformer block, its stack and the classifier."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attn_jax
from attn_jax import registry
from attn_jax.models.transformer import (
    Transformer,
    TransformerBlock,
    TransformerClassifier,
    first_real,
    masked_mean,
)
from attn_jax.positions import sinusoidal_positions

# The readable implementation: it compiles fastest, and the mechanisms have their own tests.
DENSE = {"implementation": "dense"}

# float32 through two blocks of width 8, values around 1; layer norms divide by what may be small.
FLOAT32 = 1e-4

BATCH, LENGTH, DIM, HEADS = 2, 7, 8, 2

called = nnx.jit(lambda module, x, mask=None: module(x, mask=mask))


def call(module, *arguments):
    """As a NumPy array, with which nothing more is compiled."""
    return jax.device_get(called(module, *arguments))


def close(actual, expected, tolerance=FLOAT32):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def inputs(seed=0, length=LENGTH):
    return np.random.default_rng(seed).normal(size=(BATCH, length, DIM)).astype(np.float32)


def shake(module, seed=0):
    """Random values in every parameter, so that biases and norms do something."""
    normal = np.random.default_rng(seed).normal
    params = nnx.state(module, nnx.Param)
    nnx.update(module, jax.tree.map(lambda p: np.asarray(p) + 0.3 * normal(size=p.shape).astype(p.dtype), params))
    module.eval()
    return module


# Pooling.


def test_first_real():
    """The first token that is not masked."""
    x = inputs()
    np.testing.assert_array_equal(first_real(x, None), x[:, 0])
    np.testing.assert_array_equal(first_real(x, np.arange(LENGTH) >= np.array([[0], [3]])), [x[0, 0], x[1, 3]])


def test_masked_mean():
    """Over real tokens, whatever the others hold; 0 without any; summed in float32."""
    x = inputs()
    mask = np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 3 > 0
    bad = np.where(mask[..., None], x, np.nan)
    np.testing.assert_allclose(masked_mean(bad, mask), [x[b, mask[b]].mean(0) for b in range(BATCH)], rtol=1e-5)
    np.testing.assert_array_equal(masked_mean(bad, np.zeros_like(mask)), 0)
    # A bfloat16 sum of ones stops at 256.
    assert masked_mean(jnp.ones((1, 4096, 1), jnp.bfloat16), None) == 1


# Blocks.


def parts(block):
    """The two functions that a block adds to its input."""
    return (
        (block.attention_norm, block.attention),
        (block.mlp_norm, lambda x: block.mlp_out(nnx.gelu(block.mlp_in(x)))),
    )


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_each_part_of_a_block_has_one_residual(norm):
    block, x = shake(TransformerBlock(DIM, HEADS, norm=norm, options=DENSE, rngs=nnx.Rngs(0))), inputs()

    @nnx.jit
    def by_hand(block, x):
        for norm_of_part, part in parts(block):
            x = x + part(norm_of_part(x)) if norm == "pre" else norm_of_part(x + part(x))
        return x

    close(call(block, x), by_hand(block, x))


def test_a_gated_mlp():
    block = shake(TransformerBlock(DIM, HEADS, activation="swiglu", options=DENSE, rngs=nnx.Rngs(0)))

    @nnx.jit
    def by_hand(block, x):
        x = x + block.attention(block.attention_norm(x))
        h = block.mlp_norm(x)
        return x + block.mlp_out(jax.nn.silu(block.mlp_gate(h)) * block.mlp_in(h))

    close(call(block, inputs()), by_hand(block, inputs()))


def test_drop_path_skips_a_part_for_a_whole_example_and_keeps_the_mean():
    rate, x = 0.25, np.broadcast_to(inputs()[:1], (400, LENGTH, DIM))
    block = shake(TransformerBlock(DIM, HEADS, drop_path=rate, options=DENSE, rngs=nnx.Rngs(0)))
    nnx.update(block.mlp_out, jax.tree.map(np.zeros_like, nnx.state(block.mlp_out)))  # one part is left
    block.eval()
    added = call(block, x[:1]) - x[:1]
    block.train()
    y = call(block, x) - x
    kept = np.abs(y).max((1, 2)) > 0
    assert abs(kept.mean() - (1 - rate)) < 0.1  # 4.6 standard deviations of 400 draws
    close(y[kept], np.broadcast_to(added / (1 - rate), y[kept].shape))


def test_without_output_projections_a_pre_norm_block_is_the_identity():
    block = shake(TransformerBlock(DIM, HEADS, options=DENSE, rngs=nnx.Rngs(0)))
    for layer in (block.attention.out, block.mlp_out):
        nnx.update(layer, jax.tree.map(np.zeros_like, nnx.state(layer)))
    x = inputs()
    np.testing.assert_array_equal(call(block, x), x)


def test_a_block_reads_a_context():
    block, x, memory = shake(TransformerBlock(DIM, HEADS, options=DENSE, rngs=nnx.Rngs(0))), inputs(), inputs(1, 4)
    memory_mask = np.array([[1, 1, 0, 1], [0, 1, 1, 1]], bool)

    @nnx.jit
    def by_hand(block):
        y = x + block.attention(block.attention_norm(x), context=memory, context_mask=memory_mask)
        (_, _), (norm, mlp) = parts(block)
        return y + mlp(norm(y))

    read = nnx.jit(lambda block: block(x, context=memory, context_mask=memory_mask))
    close(read(block), by_hand(block))
    with pytest.raises(ValueError, match="`context_mask` was given without `context`"):
        block(x, context_mask=memory_mask)


def test_a_block_takes_a_mechanism_and_its_options():
    block = TransformerBlock(
        DIM, HEADS, mechanism="local", options={"window": 2}, causal=True, mlp_dim=5, rngs=nnx.Rngs(0)
    )
    assert isinstance(block.attention, attn_jax.MECHANISMS["local"].module)
    assert block.attention.window == (2, 2) and block.attention.causal
    assert block.mlp_in.kernel.shape == (DIM, 5)


def test_a_mechanism_of_ones_own_works_in_a_model(monkeypatch):
    """`register` is all that it takes."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))

    @attn_jax.register("running_mean", causal=True, bidirectional=False, time="L", memory="L")
    class RunningMean(nnx.Module):
        def __init__(self, dim, num_heads, *, causal, dtype, param_dtype, rngs, gain=1.0):
            self.gain = gain

        def __call__(self, x, *, mask=None):
            return self.gain * jnp.cumsum(x, axis=1) / jnp.arange(1, x.shape[1] + 1)[:, None]

    model = Transformer(
        DIM, HEADS, num_layers=1, mechanism="running_mean", options={"gain": 2.0}, causal=True, rngs=nnx.Rngs(0)
    )
    assert call(model, inputs()).shape == (BATCH, LENGTH, DIM)
    with pytest.raises(ValueError, match="running_mean: unknown option 'gian'; its options: gain"):
        TransformerBlock(DIM, HEADS, mechanism="running_mean", options={"gian": 1}, causal=True, rngs=nnx.Rngs(0))


# Stacks.


def stack(num_layers=2, **options):
    return shake(Transformer(DIM, HEADS, num_layers=num_layers, options=DENSE, rngs=nnx.Rngs(0), **options))


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_stack_is_its_blocks_in_turn(norm):
    """Pre-norm outputs are normalised once more; masked tokens come out as 0."""
    model, x = stack(norm=norm), inputs()
    mask = np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 4 > 0

    @nnx.jit
    def by_hand(model, x):
        for block in model.blocks:
            x = block(x, mask=mask)
        return x if norm == "post" else model.norm(x)

    out = call(model, x, mask)
    close(out[mask], np.asarray(by_hand(model, x))[mask])
    np.testing.assert_array_equal(out[~mask], 0)
    assert (model.norm is None) == (norm == "post")


@nnx.jit
def loss_and_gradients(model, x, mask):
    def loss(model):
        out = jnp.sin(model(x, mask=mask)).sum()
        return out, attn_jax.pop_aux(model)[1]

    return nnx.value_and_grad(loss, has_aux=True)(model)


def test_remat_changes_no_value_gradient_or_metric():
    mask = np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 4 > 0
    plain, remat = (
        loss_and_gradients(stack(1, mechanism="dual_kv", remat=remat), inputs(), mask) for remat in (False, True)
    )
    jax.tree.map(close, remat, plain)
    (_, metrics), _ = remat
    assert set(metrics) == {"blocks/0/attention/second_stream_share", "blocks/0/attention/stream_entropy"}


def test_remat_keeps_less():
    """Temporary memory of a backward pass: the MLP's hidden layers, all at once or one at a time."""

    def temporary(remat):
        options = {"num_layers": 3, "mlp_dim": 512, "remat": remat, "options": DENSE}
        model = nnx.eval_shape(lambda: Transformer(8, 2, rngs=nnx.Rngs(0), **options))
        gradient = nnx.jit(nnx.grad(lambda x, model: model(x).sum()))
        x = jax.ShapeDtypeStruct((1, 64, 8), jnp.float32)
        return gradient.lower(x, model).compile().memory_analysis().temp_size_in_bytes

    assert temporary(True) < 0.5 * temporary(False)


def test_what_masked_tokens_hold_reaches_no_gradient():
    """Norms come before the attention and after it: NaN in padding must not reach theirs either."""
    model, x = stack(1), inputs()
    mask = np.arange(LENGTH) < np.array([[4], [LENGTH]])
    bad = np.where(mask[..., None], x, np.nan)
    (actual, _), gradients = loss_and_gradients(model, bad, mask)
    (expected, _), wanted = loss_and_gradients(model, np.where(mask[..., None], x, 0), mask)
    np.testing.assert_array_equal(actual, expected)
    jax.tree.map(np.testing.assert_array_equal, gradients, wanted)


def test_a_mask_that_does_not_fit_raises():
    with pytest.raises(ValueError, match=r"^Transformer: `mask` must have shape \(B, L\) = \(2, 7\)"):
        stack()(inputs(), mask=np.ones((BATCH, 1), bool))


# The classifier.

VOCAB, CLASSES = 11, 3


@functools.cache
def classifier(pool="cls", **options):
    return shake(
        TransformerClassifier(
            vocab_size=VOCAB,
            num_classes=CLASSES,
            dim=DIM,
            num_heads=HEADS,
            num_layers=1,
            mlp_dim=16,
            pool=pool,
            options=DENSE,
            rngs=nnx.Rngs(0),
            **options,
        )
    )


def tokens(length=LENGTH):
    return np.random.default_rng(0).integers(0, VOCAB, size=(BATCH, length))


@pytest.mark.parametrize("pool", ["cls", "first", "mean"])
def test_the_classifier_is_its_parts(pool):
    model = classifier(pool)

    @nnx.jit
    def by_hand(model):
        x = model.embed(tokens())
        if pool == "cls":
            x = jnp.concatenate([jnp.broadcast_to(model.cls[...], (BATCH, 1, DIM)), x], axis=1)
        x = model.transformer(x + sinusoidal_positions(x.shape[1], DIM))
        return model.head_out(nnx.relu(model.head_in(x.mean(1) if pool == "mean" else x[:, 0])))

    logits = call(model, tokens())
    assert logits.shape == (BATCH, CLASSES)
    close(logits, by_hand(model))


def test_types_are_added_to_the_embeddings_and_change_no_other_parameter():
    model, plain = classifier(num_types=3), classifier()
    for path, value in nnx.to_flat_state(nnx.state(plain, nnx.Param)):
        np.testing.assert_array_equal(value[...], dict(nnx.to_flat_state(nnx.state(model)))[path][...])
    types = np.arange(tokens().size).reshape(tokens().shape) % 3
    typed = nnx.jit(lambda model: model(tokens(), types=types))
    assert np.abs(typed(model) - call(plain, tokens())).max() > 0.01
    model.type_embed.embedding[...] = 0 * model.type_embed.embedding[...]
    close(typed(model), call(plain, tokens()))
    for wrong, arguments in ((model, {}), (plain, {"types": types})):
        with pytest.raises(ValueError, match="`types` go with `num_types`"):
            wrong(tokens(), **arguments)


@pytest.mark.parametrize("pool", ["cls", "first", "mean"])
def test_padding_changes_no_logit(pool):
    """A padded batch gives what its sequences give alone, whatever ids the padding has."""
    model, ids, length = classifier(pool), tokens(), 3
    mask = np.arange(LENGTH) < np.array([[length], [LENGTH]])
    for padding in (0, VOCAB - 1, -1, VOCAB + 5):
        padded = call(model, np.where(mask, ids, padding), mask)
        close(padded[0], call(model, ids[:1, :length])[0])
        close(padded[1], call(model, ids)[1])


def test_a_sequence_without_tokens_has_finite_logits():
    for pool in ("cls", "mean"):
        assert np.isfinite(call(classifier(pool), tokens(), np.zeros((BATCH, LENGTH), bool))).all()


def test_tokens_that_are_real_matter():
    """To the cls logits only through attention, so this says that attention is there."""
    ids = tokens()
    changed = np.where(np.arange(LENGTH) == 4, (ids + 1) % VOCAB, ids)
    for pool in ("cls", "mean"):
        assert (abs(call(classifier(pool), changed) - call(classifier(pool), ids)) > FLOAT32).any()


def test_half_precision_computes_in_it_and_answers_in_float32():
    model, exact = classifier(dtype=jnp.bfloat16), call(classifier(), tokens())  # the same parameters
    logits = call(model, tokens())
    hidden = nnx.eval_shape(lambda model: model.transformer(model.embed(tokens())), model)
    assert hidden.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model, nnx.Param))} == {np.dtype(np.float32)}
    # 8 bits, some ten layers deep.
    np.testing.assert_allclose(logits, exact, rtol=0, atol=0.05 * np.abs(exact).max())


def test_dropout_is_there_in_training_only():
    model, quiet = classifier(dropout=0.5), call(classifier(), tokens())  # the same parameters
    close(call(model, tokens()), quiet)
    model.train()
    first, second = call(model, tokens()), call(model, tokens())
    model.eval()
    assert (first != second).any() and (first != quiet).any()
    close(call(model, tokens()), quiet)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: classifier("max"), "TransformerClassifier: `pool` must be one of cls, first, mean, got 'max'"),
        (lambda: classifier(norm="mid"), "TransformerBlock: `norm` must be one of pre, post, got 'mid'"),
        (lambda: classifier(mechanism="nope"), "unknown mechanism 'nope'; registered: .*dual_kv, .*standard"),
        (lambda: classifier()(np.ones((2, 3))), "`tokens` must be integers, got dtype float64"),
        (lambda: classifier()(np.ones(3, int)), r"`tokens` must have shape \(B, L\), got shape \(3,\)"),
        (lambda: classifier()(tokens(), mask=np.ones((2, 3), bool)), r"`mask` must have shape .* = \(2, 7\)"),
        (lambda: classifier()(tokens(), mask=tokens()), "`mask` must be boolean"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
