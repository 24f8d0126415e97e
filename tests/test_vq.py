"""Attention over codewords: the operation, and the codebooks that follow the data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import attn_jax
from attn_jax.mechanisms.vq import Codebook, CodebookState
from attn_jax.models.transformer import Transformer
from attn_jax.ops import vq_attention
from tests import oracles

# float32 sums of some dozen terms in another order, values around 1.
FLOAT32 = 1e-5
# The same through projections of width 16.
MODULE = 5e-5
# float64 against complex-step derivatives.
FLOAT64 = 1e-11

BATCH, LENGTH, KEYS, HEADS, WIDTH = 2, 11, 7, 2, 4
CODES_Q, CODES_K = 5, 6
DIM = HEADS * WIDTH


def attention(q, k, v, codebook_q, codebook_k, mask=None, causal=False, implementation="xla"):
    """In float32, with blocks that are shorter than the sequence; compiled once for most of the tests."""
    arrays = [np.float32(x) for x in (q, k, v, codebook_q, codebook_k)]
    mask = np.ones(k.shape[:2], bool) if mask is None else mask
    return compiled(*arrays, mask=mask, causal=causal, block_length=4, implementation=implementation)


compiled = jax.jit(vq_attention, static_argnames=("causal", "block_length", "implementation"))


def close(actual, expected, tolerance=FLOAT32):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def operands(seed, keys=LENGTH):
    """`q, k, v` and codebooks, and a mask."""
    draw = np.random.default_rng(seed)
    shapes = [(BATCH, LENGTH, HEADS), (BATCH, keys, HEADS), (HEADS, CODES_Q), (HEADS, CODES_K)]
    q, k, codebook_q, codebook_k = (draw.normal(size=(*shape, WIDTH)) for shape in shapes)
    v = draw.normal(size=(BATCH, keys, HEADS, 3))
    return (q, k, v, codebook_q, codebook_k), draw.random((BATCH, keys)) < 0.7


def nearest(x, codebook):
    """Codes `(B, L, H)`; NumPy's argmin takes the lowest index of equals."""
    return ((x[..., None, :] - codebook) ** 2).sum(-1).argmin(-1)


def quantised(x, codebook):
    return codebook[np.arange(len(codebook)), nearest(x, codebook)]


def definition(q, k, v, codebook_q, codebook_k, mask=None, causal=False):
    q, k = quantised(q, codebook_q), quantised(k, codebook_k)
    return oracles.softmax_attention(q, [oracles.Stream(k, v, mask)], causal=causal)[0]


@pytest.mark.parametrize("implementation", ["dense", "xla"])
@pytest.mark.parametrize("causal,keys", [(False, LENGTH), (False, KEYS), (True, LENGTH)])
@settings(max_examples=5)
@given(seed=st.integers(0, 2**16))
def test_equals_the_definition(implementation, causal, keys, seed):
    """Causal or not, and for keys of another length."""
    arrays, mask = operands(seed, keys)
    actual = attention(*arrays, mask, causal=causal, implementation=implementation)
    close(actual, definition(*arrays, mask, causal))


@jax.jit(static_argnames=("causal", "implementation", "block_length"))
def pulled_back(arrays, mask, g, causal, implementation="xla", block_length=3):
    """The output and the cotangents of all arrays."""
    options = {"causal": causal, "implementation": implementation, "block_length": block_length}
    out, pull = jax.vjp(lambda *arrays: vq_attention(*arrays, mask=mask, **options), *arrays)
    return out, pull(g)


@pytest.mark.parametrize("spread", [0, 30])
@pytest.mark.parametrize("causal,keys", [(False, KEYS), (True, LENGTH)])
def test_gradients_are_exactly_straight_through(causal, keys, spread):
    """In float64 those of softmax attention on the codewords, for any block length, and 0 for the codebooks.

    With a spread, the logits of different query codes lie a thousand apart, and those of one code no farther than
    before: what one code has read would vanish beside another's.
    """
    (q, k, v, codebook_q, codebook_k), mask = operands(1, keys)
    mask[0, :2] = False  # causal: queries that read nothing
    if spread:
        for x, level in ((codebook_q, np.arange(CODES_Q)[::-1]), (codebook_k, 1), (k, 1)):
            x[..., 0] = spread * level
        q[..., 0] = spread * np.random.default_rng(2).integers(0, CODES_Q, q.shape[:3])
    arrays, g = (q, k, v, codebook_q, codebook_k), normal(2, BATCH, LENGTH, HEADS, 3)
    exact = [quantised(q, codebook_q), quantised(k, codebook_k), v]

    def loss(q, k, v):
        return (g * oracles.softmax_attention(q, [oracles.Stream(k, v, mask)], causal=causal)[0]).sum()

    expected = []
    for n, x in enumerate(exact):
        along = normal(n, *x.shape)
        expected.append((along, oracles.derivative(lambda x, n=n: loss(*exact[:n], x, *exact[n + 1 :]), x, along)))
    assert min(abs(derivative) for _, derivative in expected) > 1e-3
    with jax.enable_x64(True):
        for options in (["dense"], [], *([["xla", 64]] if causal else [])):
            out, gradients = pulled_back(arrays, mask, g, causal, *options)
            close(out, definition(*arrays, mask, causal), FLOAT64)
            for (along, derivative), gradient in zip(expected, gradients):
                close((gradient * along).sum(), derivative, FLOAT64 * (1 + spread**2))
            assert not any(np.asarray(x)[~mask].any() for x in gradients[1:3])
            assert not any(np.asarray(x).any() for x in gradients[3:])


def test_is_exact_attention_where_all_tokens_are_codewords():
    (_, _, v, *codebooks), _ = operands(3)
    codes = np.random.default_rng(3).integers(0, CODES_Q, (2, BATCH, LENGTH, HEADS))
    q, k = (x[np.arange(HEADS), own] for x, own in zip(codebooks, codes))
    expected = oracles.softmax_attention(q, [oracles.Stream(k, v)], causal=True)[0]
    close(attention(q, k, v, *codebooks, causal=True), expected)


@pytest.mark.parametrize("causal,codes", [(False, 1), (True, CODES_K)])
def test_one_key_code_gives_the_mean_of_the_values(causal, codes):
    """Or several that are equal."""
    (q, k, v, codebook_q, codebook_k), mask = operands(4)
    codebook_k = np.repeat(codebook_k[:, :1], codes, axis=1)
    seen = mask[:, None, :] * (np.tri(LENGTH) if causal else np.ones((LENGTH, LENGTH)))
    share = seen / np.maximum(seen.sum(-1, keepdims=True), 1)
    out = attention(q, k, v, codebook_q, codebook_k, mask, causal=causal)
    close(out, np.einsum("blm,bmhv->blhv", share, v))


def test_tokens_that_share_a_query_code_share_their_output():
    """Bit by bit, where there is no order; and there are such tokens."""
    arrays, mask = operands(5)
    out = np.asarray(attention(*arrays, mask))
    codes = nearest(arrays[0], arrays[3])
    shared = 0
    for b, h in np.ndindex(BATCH, HEADS):
        for code in set(codes[b, :, h]):
            same = out[b, codes[b, :, h] == code, h]
            assert (same == same[0]).all()
            shared += len(same) > 1
    assert shared


def test_the_future_is_not_seen():
    """Nor in the rounding: a changed suffix leaves the prefix as it was, to the bit."""
    (*tokens, codebook_q, codebook_k), _ = operands(6)
    out = np.asarray(attention(*tokens, codebook_q, codebook_k, causal=True))
    for cut in range(1, LENGTH):
        changed = [np.concatenate([x[:, :cut], 9 * x[:, cut:] + 1], axis=1) for x in tokens]
        other = np.asarray(attention(*changed, codebook_q, codebook_k, causal=True))
        np.testing.assert_array_equal(other[:, :cut], out[:, :cut])
        assert (other[:, cut:] != out[:, cut:]).any(-1).all()


def test_the_error_of_a_logit_is_bounded():
    """`|q.k - q^.k^| <= |q - q^| |k| + |q^| |k - k^|`, logits being known up to a constant from the weights."""
    (q, k, _, codebook_q, codebook_k), _ = operands(7)
    unit = np.broadcast_to(np.eye(LENGTH, 12)[None, :, None], (BATCH, LENGTH, HEADS, 12))
    weights = [attention(q, k, unit[..., n : n + 3], codebook_q, codebook_k) for n in range(0, 12, 3)]
    found = np.log(np.concatenate(weights, axis=-1)[..., :LENGTH].transpose(0, 2, 1, 3))
    exact = np.einsum("blhe,bmhe->bhlm", q, k)

    def length(x):
        return np.linalg.norm(x, axis=-1).transpose(0, 2, 1)

    q_hat, k_hat = quantised(q, codebook_q), quantised(k, codebook_k)
    bound = length(q - q_hat)[..., None] * length(k)[:, :, None]
    bound += length(q_hat)[..., None] * length(k - k_hat)[:, :, None]
    error = found - exact
    error = np.abs(error - error[..., :1])
    assert (error <= bound + bound[..., :1] + FLOAT32).all()
    assert error.max() > 0.1


def test_ties_go_to_the_lowest_code():
    """Zero is as near to a codeword as to its negative, and to equal ones."""
    (_, _, v, _, _), _ = operands(8)
    code = normal(0, WIDTH)
    codebook_q, codebook_k = (np.multiply.outer([3, 1, -1, 1, -1, 2][:n], code) for n in (CODES_Q, CODES_K))
    sign = np.where(np.arange(LENGTH) % 3, 1, -1)[None, :, None, None]
    k = np.broadcast_to(sign * code, (BATCH, LENGTH, HEADS, WIDTH))
    codebooks = (np.broadcast_to(x, (HEADS, *x.shape)) for x in (codebook_q, codebook_k))
    out = attention(np.zeros_like(k), k, v, *codebooks)
    expected = oracles.softmax_attention(np.broadcast_to(code, k.shape), [oracles.Stream(k, v)])[0]
    close(out, expected)


@pytest.mark.parametrize("causal,keys", [(False, KEYS), (True, LENGTH)])
def test_what_is_not_a_number_stays_where_it_is(causal, keys):
    """In a masked key it is not seen; in a query it is its own row's output, and in no other's gradient."""
    arrays, mask = operands(8, keys)
    mask[:, 0] = True
    g = normal(0, BATCH, LENGTH, HEADS, 3)
    g[0, 3] = 0  # what the row of NaN is multiplied with afterwards is not for the operation to know
    dirty = tuple(x.copy() for x in arrays)
    dirty[0][0, 3, 0, 1] = np.nan
    for x in dirty[1:3]:
        x[~mask] = np.nan
    unseen = tuple(x.copy() for x in arrays)
    unseen[1][0, 0, 0, 0] = np.inf  # a real key
    with jax.enable_x64(True):
        expected, expected_gradients = pulled_back(arrays, mask, g, causal)
        out, gradients = pulled_back(dirty, mask, g, causal)
        assert np.isnan(pulled_back(unseen, mask, g, causal)[0][0, :, 0]).all()
    bad = np.zeros(out.shape, bool)
    bad[0, 3, 0] = True
    np.testing.assert_array_equal(out, np.where(bad, np.nan, expected))
    for actual, wanted in zip(gradients, expected_gradients):
        np.testing.assert_array_equal(actual, wanted)


def test_half_precision_is_computed_in_single():
    arrays, mask = operands(9)
    q, k, v, *codebooks = (jnp.asarray(x, jnp.bfloat16) for x in arrays)
    out = jax.jit(functools.partial(vq_attention, causal=True, block_length=4))(q, k, v, *codebooks, mask=mask)
    assert out.dtype == jnp.bfloat16
    expected = definition(*(np.asarray(x, np.float64) for x in (q, k, v, *codebooks)), mask, True)
    close(np.asarray(out, np.float64), expected, 2**-8)  # the rounding of the result


def test_arguments_that_do_not_fit_raise():
    (q, k, v, codebook_q, codebook_k), mask = operands(10, KEYS)
    call = functools.partial(vq_attention, q, k, v)
    wrong = {
        r"`k` must have shape \(B, L, H, E\)": lambda: call(codebook_q, codebook_k, causal=True),
        "`codebook_q` must have shape": lambda: call(codebook_q[0], codebook_k),
        "`codebook_k` must have shape": lambda: call(codebook_q, codebook_k[..., 1:]),
        "`codebook_k` must have at least one code": lambda: call(codebook_q, codebook_k[:, :0]),
        "`codebook_k` must be a floating-point": lambda: call(codebook_q, codebook_k.astype(int)),
        "`mask` must be boolean": lambda: call(codebook_q, codebook_k, mask=mask.astype(int)),
        "`block_length` must be a positive integer": lambda: call(codebook_q, codebook_k, block_length=0),
        "`implementation` must be None": lambda: call(codebook_q, codebook_k, implementation="fast"),
    }
    for words, attempt in wrong.items():
        with pytest.raises(ValueError, match=f"^vq_attention: .*{words}"):
            attempt()
    with pytest.raises(NotImplementedError, match=r"^vq_attention: .*mosaic"):
        call(codebook_q, codebook_k, implementation="mosaic")


# The module: causal, and with the same sizes in most tests, which then share what is compiled.

CODES, SEQUENCES = 6, 16
COMMITMENT = 0.5


def build(**options):
    options = {"num_codes": CODES, "block_length": 4, "causal": True, "commitment": COMMITMENT} | options
    return attn_jax.build("vq", dim=DIM, num_heads=HEADS, rngs=nnx.Rngs(0), **options)


def tokens(seed=0, batch=SEQUENCES):
    return normal(seed, batch, LENGTH, DIM).astype(np.float32)


def call(module, x, mask=None):
    """The output, and losses and metrics."""
    return called(module, x, np.ones(x.shape[:2], bool) if mask is None else mask)


called = nnx.jit(lambda module, x, mask: (module(x, mask=mask), attn_jax.pop_aux(module)))


def heads_of(module, projection, x):
    """A projection per head, float64."""
    kernel = np.float64(getattr(module, projection).kernel[...])
    return (x @ kernel).reshape(*x.shape[:2], HEADS, WIDTH)


def normalised(module, projection, x):
    """Queries or keys as they are quantised."""
    y = heads_of(module, projection, x)
    return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) / WIDTH**0.25


def codewords(module, side):
    return np.float64(getattr(module, side).codewords[...])


def silu(x):
    return x / (1 + np.exp(-x))


SIDES = (("queries", "query"), ("keys", "key"))
"""Codebooks and their projections."""


@pytest.mark.parametrize("gate", [False, True])
def test_the_module_is_its_formula(gate):
    """Normalised queries and keys, whose products are those of standard attention, and the gate where asked."""
    module, x = build(gate=gate), tokens()
    q, k = normalised(module, "query", x), normalised(module, "key", x)
    close((q**2).sum(-1), np.sqrt(WIDTH), 1e-3)  # up to the epsilon of the normalisation
    v = heads_of(module, "value", x)
    v = silu(v) if gate else v
    o = definition(q, k, v, codewords(module, "queries"), codewords(module, "keys"), causal=True).reshape(x.shape)
    o = o * silu(x @ np.float64(module.gate.kernel[...])) if gate else o
    close(call(module, x)[0], o @ np.float64(module.out.kernel[...]), MODULE)
    # That was the first batch: the codes are now tokens, of that very length.
    for side, name in SIDES:
        real = normalised(module, name, x).reshape(-1, HEADS, 1, WIDTH)
        close(np.linalg.norm(real - codewords(module, side), axis=-1).min(0), 0)
    assert sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param))) == (5 if gate else 4) * DIM**2


def test_nothing_but_projections_is_trained():
    """Codebooks are no parameters; the commitment pulls on queries and keys alone, metrics on nothing."""
    module, x = build(causal=False), tokens()
    paths = {path[0] for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    assert paths == {"query", "key", "value", "out"}

    @nnx.jit
    def gradients(module):
        def total(module, kind):
            module(x)
            return sum(attn_jax.pop_aux(module)[kind].values())

        return [nnx.grad(functools.partial(total, kind=kind))(module) for kind in (0, 1)]

    of_losses, of_metrics = gradients(module)
    largest = {path[0]: jnp.abs(g[...]).max() for path, g in nnx.to_flat_state(of_losses)}
    assert largest["query"] > 1e-3 and largest["key"] > 1e-3 and largest["value"] == largest["out"] == 0
    assert all((g == 0).all() for g in jax.tree.leaves(of_metrics))

    def losses():
        module = build(commitment=0.0)
        module(x)
        return attn_jax.pop_aux(module)[0]

    assert not nnx.eval_shape(losses)


def test_a_call_reads_the_codebooks_that_it_found():
    """Also the first, which replaces all codes, and also to the bit: otherwise training would see the future."""
    x = tokens()
    training, evaluation = build(), build()
    evaluation.eval()
    changed = np.concatenate([x[:, :5], 9 * x[:, 5:] + 1], axis=1)
    for _ in range(2):
        before = codewords(training, "keys")
        nnx.update(evaluation, nnx.state(training))
        other = nnx.clone(training)
        y = np.asarray(call(training, x)[0])
        np.testing.assert_array_equal(call(evaluation, x)[0], y)
        np.testing.assert_array_equal(call(other, changed)[0][:, :5], y[:, :5])
        assert np.abs(codewords(training, "keys") - before).max() > 1e-3
        assert np.abs(codewords(training, "keys") - codewords(other, "keys")).max() > 1e-3


def test_evaluation_changes_nothing():
    """Not even the random streams; nor does a call of a module that is closed over."""
    module, x = build(), tokens()
    call(module, x)
    for freeze in (module.eval, module.train):
        freeze()
        before = jax.tree.map(np.asarray, nnx.as_pure(nnx.state(module, nnx.Not(nnx.RngKey))))
        if freeze == module.eval:
            call(module, x)
        else:
            jax.eval_shape(lambda x: module(x), x)
        after = jax.tree.map(np.asarray, nnx.as_pure(nnx.state(module, nnx.Not(nnx.RngKey))))
        jax.tree.map(np.testing.assert_array_equal, before, after)


def test_codes_are_used_by_real_tokens():
    """Losses and metrics of a padded call, through both codebooks."""
    module, x = build(), tokens()
    mask = np.arange(LENGTH) < np.resize([LENGTH, 4], (SEQUENCES, 1))
    expected, distance = {}, 0
    for side, name in SIDES:
        y, codebook = normalised(module, name, x)[mask], codewords(module, side)
        codes = nearest(y, codebook)
        share = np.stack([np.bincount(codes[:, h], minlength=CODES) for h in range(HEADS)]) / len(codes)
        entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(-1)
        expected[f"{name}_perplexity"] = np.exp(entropy).mean()
        expected[f"{name}_dead_fraction"] = (share == 0).mean()
        distance += ((y - quantised(y, codebook)) ** 2).sum(-1).mean()
    x[~mask] = np.nan
    _, (losses, metrics) = call(module, x, mask)
    assert metrics.keys() == expected.keys() and losses.keys() == {"commitment"}
    for name, value in expected.items():
        close(metrics[name], value)
    close(losses["commitment"], COMMITMENT * distance, MODULE)


def test_half_precision_takes_the_same_codes():
    """A code is a decision: among seven hundred, rounded queries and keys would take some differently."""
    x = tokens(11)
    (y, (_, metrics)), (half, (_, half_metrics)) = (call(build(dtype=dtype), x) for dtype in (None, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    jax.tree.map(close, half_metrics, metrics)
    close(np.float32(half), y, 4 * 2**-8)  # values, mixture, output and result are each rounded to 8 bits


# The codebook.


DECAY, REVIVE = 0.5, 0.3
"""A code without tokens dies in the second step."""


def codebook(revive=REVIVE):
    return Codebook(HEADS, CODES, WIDTH, decay=DECAY, revive=revive, rngs=nnx.Rngs(0))


observe = nnx.jit(lambda codebook, x, codes, mask: codebook.observe(x, codes, mask))


def learn(book, x, mask=None):
    """Show `x` `(B, L, H, E)` to a codebook."""
    x = np.float32(x)
    codes = nearest(x, np.asarray(book.codewords[...]))
    return observe(book, x, codes, np.ones(x.shape[:2], bool) if mask is None else mask)


def state_of(book):
    return np.float64(book.codewords[...]), np.float64(book.counts[...])


@pytest.mark.parametrize("length", [LENGTH, 3])
def test_the_first_batch_gives_the_codes(length):
    """Every code becomes a real token; none is taken twice unless there are fewer of them than codes."""
    book, x = codebook(), normal(1, BATCH, LENGTH, HEADS, WIDTH).astype(np.float32)
    mask = np.zeros((BATCH, LENGTH), bool)
    mask[:, :length:2] = True
    learn(book, x, mask)
    codewords, counts = state_of(book)
    same = (codewords[:, :, None] == x[mask].swapaxes(0, 1)[:, None]).all(-1)
    assert same.any(-1).all()
    assert (same.any(1).sum(-1) == min(CODES, mask.sum())).all()
    close(counts, mask.sum() / CODES)


def test_codebooks_are_moving_averages():
    """One step by the definition, over real tokens, and none where there are none."""
    book, x = codebook(), normal(1, 2, BATCH, LENGTH, HEADS, WIDTH).astype(np.float32)
    learn(book, x[0])
    x, mask = x[1], np.arange(LENGTH) < np.array([LENGTH, 4])[:, None]
    codewords, counts = state_of(book)
    used = (nearest(x, codewords)[..., None] == np.arange(CODES)) * mask[:, :, None, None]
    new = DECAY * counts + (1 - DECAY) * used.sum((0, 1))
    total = DECAY * counts[..., None] * codewords + (1 - DECAY) * np.einsum("blhs,blhe->hse", used, x)
    x[~mask] = 9
    learn(book, x, mask)
    close(state_of(book)[1], new)
    close(state_of(book)[0], total / new[..., None])
    before = state_of(book)
    learn(book, x, np.zeros_like(mask))
    jax.tree.map(np.testing.assert_array_equal, state_of(book), before)


def test_codebooks_converge_to_the_means_of_clusters():
    book, draw = codebook(), np.random.default_rng(3)
    cluster = np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % CODES
    x = draw.normal(size=(CODES, HEADS, WIDTH))[cluster] + 0.05 * draw.normal(size=(*cluster.shape, HEADS, WIDTH))
    means = np.stack([x[cluster == c].mean(0) for c in range(CODES)], axis=1)
    book.codewords[...] = np.float32(means + 0.1 * draw.normal(size=means.shape))
    book.counts[...] += 1  # this is not the first batch
    for _ in range(20):  # 0.5^20 = 1e-6
        usage = learn(book, x)
    codewords, counts = state_of(book)
    close(codewords, means, MODULE)
    close(counts, np.broadcast_to(np.bincount(cluster.ravel()), counts.shape), MODULE)
    assert usage.dead_fraction == 0 and usage.perplexity > 0.99 * CODES


def test_dead_codes_are_revived():
    """A code without tokens stays until its count is too small; then it becomes a token, with the mean count."""
    mean = BATCH * LENGTH / CODES
    for revive in (REVIVE, 0.0):
        book, x = codebook(revive), normal(4, BATCH, LENGTH, HEADS, WIDTH).astype(np.float32)
        learn(book, x)
        book.codewords[...] = book.codewords[...].at[:, 2].set(100.0)
        learn(book, x)
        codewords, counts = state_of(book)
        close(codewords[:, 2], 100)
        close(counts[:, 2], DECAY * mean)
        learn(book, x)
        codewords, counts = state_of(book)
        if revive:
            assert (codewords[:, 2] == x).all(-1).any((0, 1)).all()
            close(counts[:, 2], mean)
        else:
            close(codewords[:, 2], 100)
            close(counts[:, 2], DECAY**2 * mean)


def test_padding_and_devices_do_not_change_what_is_learnt():
    """Split over devices or padded, a batch gives the same codebook, the draw of new codes included."""
    x = normal(5, BATCH, LENGTH, HEADS, WIDTH).astype(np.float32)
    mask = np.random.default_rng(6).random((BATCH, LENGTH)) < 0.7
    padding = ((0, 0), (0, 5))
    padded = np.pad(x, (*padding, (0, 0), (0, 0)), constant_values=9), np.pad(mask, padding)
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((BATCH,), ("data",), axis_types=axis_types, devices=jax.devices()[:BATCH])
    split, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))

    def learnt(x, mask, sharding=None):
        book = codebook()
        nnx.update(book, jax.device_put(nnx.state(book), sharding))
        for _ in range(3):
            codes = nearest(np.asarray(x), np.asarray(book.codewords[...]))
            observe(book, x, codes % (CODES - 1), mask)  # nothing is left for the last one, which dies
        assert book.codewords[...].sharding.is_fully_replicated
        return state_of(book)

    expected = learnt(x, mask)
    jax.tree.map(close, learnt(*padded), expected)
    jax.tree.map(close, learnt(*jax.device_put((x, mask), split), everywhere), expected)


# In models.


def test_a_training_step_split_over_devices_is_that_of_one():
    """Batch and heads split: losses, gradients and codebooks, from a pure function of parameters and the rest."""
    x = tokens(7, batch=4)
    graph, params, rest = nnx.split(build(causal=False), nnx.Param, ...)

    @jax.jit
    def step(params, rest, x):
        def objective(params):
            module = nnx.merge(graph, params, rest)
            loss = jnp.square(module(x)).mean()
            losses, metrics = attn_jax.pop_aux(module)
            return loss + sum(losses.values()), (metrics, nnx.state(module, CodebookState))

        return jax.value_and_grad(objective, has_aux=True)(params)

    expected = step(params, rest, x)
    axes = ("data", "tensor")
    mesh = jax.make_mesh((2, 2), axes, axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh), nnx.logical_axis_rules((("batch", "data"), ("heads", "tensor"))):
        actual = step(params, rest, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    jax.tree.map(functools.partial(close, tolerance=MODULE), actual, expected)


def test_recomputed_blocks_learn_the_same_codebooks():
    """`jax.checkpoint` over a block neither loses the update of its codebooks nor makes it twice."""
    x, options = tokens(), {"num_codes": CODES, "implementation": "dense"}
    block = {"mechanism": "vq", "options": options, "num_layers": 1, "mlp_dim": 4}
    model, alone = Transformer(DIM, HEADS, remat=True, rngs=nnx.Rngs(0), **block), build()
    attention = model.blocks[0].attention
    nnx.update(alone, nnx.state(attention))
    call(alone, (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True))
    nnx.jit(nnx.grad(lambda model: jnp.square(model(x)).sum()))(model)
    attn_jax.pop_aux(model)
    learnt = [nnx.as_pure(nnx.state(module, (CodebookState, nnx.RngCount))) for module in (alone, attention)]
    jax.tree.map(functools.partial(close, tolerance=MODULE), *learnt)
    assert (learnt[1]["keys"]["counts"] > 0).all()


def test_the_cache_does_not_grow():
    short, long = (jax.eval_shape(lambda n=n: build().init_cache(1, n)) for n in (1, 10**6))
    assert short == long
    with pytest.raises(ValueError, match=r"^vq: `init_cache` needs causal=True"):
        build(causal=False).init_cache(1, 8)


@pytest.mark.parametrize(
    "option,value",
    [("num_codes", 0), ("block_length", 0), ("decay", 1.0), ("revive", -0.1), ("commitment", -1.0)],
)
def test_options_that_do_not_fit_raise(option, value):
    with pytest.raises(ValueError, match=f"^vq: `{option}` must .*got {value}"):
        build(**{option: value})
