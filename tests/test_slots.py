"""The slot video model: what does not depend on what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attn_jax
from attn_jax.models import SlotBasedVideoModel, SlotEncoder
from attn_jax.models.slots import SlotPredictor

BATCH, TIME, SIDE, PATCH, DIM, HEADS, SLOTS = 2, 4, 8, 2, 8, 2, 3
PATCHES = (SIDE // PATCH) ** 2
# float32 through a few layers of width 8, values around 1; softmax and norms in another order of summation.
ROUNDING = 2e-5


def shake(module, seed=1):
    """Random values in every parameter, so that biases, norms and scalars do something."""
    normal = np.random.default_rng(seed).normal
    params = nnx.state(module, nnx.Param)
    nnx.update(module, jax.tree.map(lambda p: np.asarray(p) + 0.3 * normal(size=p.shape).astype(p.dtype), params))
    return module


def unshaken(**options):
    sizes = {"height": SIDE, "width": SIDE, "patch_size": PATCH, "dim": DIM, "num_heads": HEADS}
    return SlotBasedVideoModel(**sizes | {"num_slots": SLOTS, "num_layers": 1} | options, rngs=nnx.Rngs(0))


def model(**options):
    made = unshaken(**options)
    shake(made).eval()
    return made


def encoder(**options):
    sizes = {"num_slots": SLOTS, "num_patches": PATCHES, "num_layers": 1, "num_iterations": 2}
    made = SlotEncoder(DIM, HEADS, **sizes, rngs=nnx.Rngs(0), **options)
    shake(made).eval()
    return made


def arrays(seed=0):
    draw = np.random.default_rng(seed)
    return (draw.normal(size=(BATCH, n, DIM)).astype(np.float32) for n in (PATCHES, SLOTS))


def video(seed=0):
    return np.random.default_rng(seed).random((BATCH, TIME, SIDE, SIDE, 3), np.float32)


called = nnx.jit(lambda module, *args: module(*args))
slots_of = nnx.jit(lambda module, frames: module(frames).slots)  # without the decoder, a smaller program


def call(module, *arguments):
    """In NumPy arrays, with which nothing more is compiled."""
    return jax.device_get(called(module, *arguments))


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=ROUNDING, atol=ROUNDING)


# The encoder.


@pytest.mark.parametrize("competition", ["tokens", "slots"])
def test_slots_are_exchangeable_and_share_every_patch(competition):
    made, (tokens, slots) = encoder(competition=competition), arrays()
    order = np.array([2, 0, 1])
    out, masks = call(made, tokens, slots)
    swapped, swapped_masks = call(made, tokens, slots[:, order])
    close(swapped, out[:, order])
    close(swapped_masks, masks[:, order])
    close(masks.sum(axis=1), 1)


@pytest.mark.parametrize("competition", ["tokens", "slots"])
def test_the_order_of_tokens_does_not_matter(competition):
    made, (tokens, slots) = encoder(competition=competition), arrays()
    if competition == "tokens":  # the source adds where a slot looks, which does depend on the order
        nnx.update(made.mlp_out, jax.tree.map(np.zeros_like, nnx.state(made.mlp_out)))
    order = np.random.default_rng(1).permutation(PATCHES)
    out, masks = call(made, tokens, slots)
    shuffled, shuffled_masks = call(made, tokens[:, order], slots)
    close(shuffled, out)
    close(shuffled_masks, masks[:, :, order])


def test_slot_attention_is_the_published_algorithm():
    made, (tokens, slots) = encoder(competition="slots"), arrays()
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(made.attention, nnx.Param)))

    def linear(layer, x):
        return x @ layer["kernel"] + layer.get("bias", 0)

    def norm(layer, x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * layer["scale"] + layer["bias"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def gru(h, x):
        (ir, iz, i), (hr, hz, hn) = (
            np.split(linear(p["gru"][f"dense_{s}"], a), 3, -1) for s, a in (("i", x), ("h", h))
        )
        z = sigmoid(iz + hz)
        return (1 - z) * np.tanh(i + sigmoid(ir + hr) * hn) + z * h

    s, x = slots.astype(np.float64), norm(p["token_norm"], tokens.astype(np.float64))
    for _ in range(2):
        logits = linear(p["query"], norm(p["slot_norm"], s)) @ linear(p["key"], x).mT / np.sqrt(DIM)
        a = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        w = a / a.sum(2, keepdims=True)
        s = gru(s, w @ linear(p["value"], x))
        s = s + linear(p["mlp_out"], np.maximum(linear(p["mlp_in"], norm(p["mlp_norm"], s)), 0))
    out, masks = call(made, tokens, slots)
    close(masks, a)
    close(out, s)


def test_noise_is_for_training_and_new_for_every_frame():
    made = model(noise=1.0, recurrent=True, num_layers=0)
    frames = np.broadcast_to(video()[:, :1], (BATCH, TIME, SIDE, SIDE, 3))
    quiet = np.asarray(slots_of(made, frames))
    np.testing.assert_array_equal(slots_of(made, frames), quiet)
    made.train()
    noise = np.asarray(slots_of(made, frames))[:, 0] - quiet[:, 0]
    assert np.abs(noise).min() > 0 and 0.5 < noise.std() < 1.5  # 48 draws from the standard normal
    other = np.asarray(slots_of(made, frames))
    assert np.abs(other[:, 0] - quiet[:, 0] - noise).min() > 0
    assert np.abs(other[:, 1] - other[:, 0]).min() > 0


def test_sampled_slots_differ_between_slots_and_examples_and_learned_ones_are_learned():
    sampled = encoder(competition="slots", initial="sampled").initial_slots(2).reshape(2 * SLOTS, DIM)
    assert len(np.unique(sampled[:, 0])) == 2 * SLOTS
    for initial, trained in (("fixed", 0), ("learned", 1)):
        made = encoder(initial=initial)
        one, other = made.initial_slots(2)
        np.testing.assert_array_equal(one, other)
        assert (
            sum(path[-1] == "prototypes" for path, _ in nnx.to_flat_state(nnx.state(made, nnx.Param))) == trained
        )


# Through time.


def test_a_model_that_is_not_recurrent_sees_each_frame_alone():
    made, frames = model(), video()
    together = call(made, frames)
    for t in range(TIME):
        alone = call(made, np.repeat(frames[:, t : t + 1], TIME, axis=1))  # as long, for the same program
        close(together.frames[:, t], alone.frames[:, 0])
        close(together.masks[:, t], alone.masks[:, 0])
    assert jax.eval_shape(made, frames[:, :1]).frames.shape == (BATCH, 1, SIDE, SIDE, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"history": 2, "time_rope": True},
        {"competition": "slots", "num_iterations": 1, "token_layers": 1, "token_span": "video"},
    ],
    ids=["tokens", "slots"],
)
def test_a_recurrent_model_does_not_see_the_future(options):
    made, frames = model(recurrent=True, **options), video()
    changed = np.concatenate([frames[:, :2], video(1)[:, 2:]], axis=1)
    before, after = call(made, frames), call(made, changed)
    for one, other in zip(before, after):
        np.testing.assert_array_equal(one[:, :2], other[:, :2])
        assert np.abs(one[:, 2:] - other[:, 2:]).max() > 0.01  # the present it does
    # And the past it does, through the slots alone.
    late = np.concatenate([video(1)[:, :2], frames[:, 2:]], axis=1)
    assert np.abs(call(made, late).slots[:, 2:] - before.slots[:, 2:]).max() > 1e-4


def test_a_prediction_is_the_predictor_repeated():
    """And what a model sees is the same however many frames follow: `predict` is given three of four."""
    made, frames = model(recurrent=True, history=2, time_rope=True), video()
    seen = call(made, frames)
    predicted = nnx.jit(lambda made, frames: made.predict(frames, 3))(made, frames[:, :3])
    close(predicted[:, 0], seen.predicted[:, 2])

    slots, history = seen.slots[:, 0], made.predictor.no_history(seen.slots[:, 0])
    for t in range(1, 4):
        following, history = call(made.predictor, history, slots)
        close(following, seen.predicted[:, t - 1])
        slots = seen.slots[:, t]
    for t in range(3):
        close(following, predicted[:, t])
        following, history = call(made.predictor, history, following)


def test_the_predictor_remembers_what_its_history_holds():
    made = [
        shake(SlotPredictor(DIM, HEADS, history=history, time_rope=rope, rngs=nnx.Rngs(0)))
        for history, rope in ((1, False), (1, True), (3, False), (3, True))
    ]
    _, first = arrays()
    _, second = arrays(1)

    def follow(predictor, *frames):
        history = predictor.no_history(frames[0])
        for slots in frames:
            predicted, history = call(predictor, history, slots)
        return np.asarray(predicted)

    alone = follow(made[0], second)
    for predictor in made:  # nothing is remembered of what was not there, and no distance is none
        close(follow(predictor, second), alone)
    plain, _, longer, turned = (follow(predictor, first, second) for predictor in made)
    close(plain, alone)
    assert min(np.abs(longer - alone).max(), np.abs(turned - longer).max()) > 1e-3
    # Four frames later, of three that are remembered, nothing is left.
    close(follow(made[3], first, second, second, second), follow(made[3], second, second, second))


# Space.


def test_a_pixel_belongs_to_its_patch_on_the_way_in_and_out():
    made, frames = model(), video()
    changed = frames.copy()
    changed[0, 1, 5, 2] += 1
    row, column = 5 // PATCH, 2 // PATCH
    tokens = nnx.jit(lambda made, frames: made.tokens(frames))
    difference = np.abs(tokens(made, changed) - tokens(made, frames)).max(-1)
    expected = np.zeros_like(difference)
    expected[0, 1, row * (SIDE // PATCH) + column] = 1
    np.testing.assert_array_equal(difference > 0, expected > 0)

    queries = np.asarray(made.decoder.queries[...])
    one = np.arange(PATCHES)[:, None] == row * (SIDE // PATCH) + column
    made.decoder.queries[...] = queries + one.astype(np.float32)
    _, slots = arrays()
    moved = call(made.decoder, slots)
    made.decoder.queries[...] = queries
    touched = np.abs(moved - call(made.decoder, slots)).max((0, 3)) > 0
    expected = np.zeros((SIDE, SIDE), bool)
    expected[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = True
    np.testing.assert_array_equal(touched, expected)


def test_the_decoder_does_not_know_which_slot_is_which():
    made = model(mechanism="dual_kv")
    _, slots = arrays()

    @nnx.jit
    def decode(decoder, slots):
        return decoder(slots), decoder.stream_shares(slots[:BATCH])

    frames, shares = decode(made.decoder, np.concatenate([slots, slots[:, ::-1]]))
    close(frames[:BATCH], frames[BATCH:])
    assert shares.shape == (BATCH, PATCHES, HEADS, 2)
    close(shares.sum(-1), 1)


@pytest.mark.parametrize("mechanism", sorted(attn_jax.MECHANISMS))
def test_every_mechanism_has_its_place(mechanism):
    def output(frames):
        return unshaken(token_layers=1, mechanism=mechanism)(frames).frames

    assert jax.eval_shape(output, video()).shape == (BATCH, TIME, SIDE, SIDE, 3)


def test_no_parameter_is_dead_where_all_parts_are_used():
    kind = {"mechanism": "dual_kv", "options": {"implementation": "dense"}}
    made = model(**kind, token_layers=1, token_span="video", initial="learned", recurrent=True)

    def loss(made):
        return jnp.sum(made.decode(made(video()[:, :2]).predicted) ** 2)

    gradient = jax.device_get(nnx.jit(nnx.grad(loss))(made))
    for path, leaf in nnx.to_flat_state(gradient):
        assert np.abs(leaf[...]).max() > 0, path


def test_what_a_mechanism_records_and_learns_without_gradients_survives_the_loop_over_frames():
    def measure(state, graph):
        made = nnx.merge(graph, state)
        made.train()
        made(video())
        aux = attn_jax.pop_aux(made)
        return aux, nnx.as_pure(nnx.state(made.encoder, nnx.Not(nnx.Param)))

    options = {"mechanism": "vq", "options": {"num_codes": 4, "implementation": "dense"}}
    graph, state = nnx.split(model(recurrent=True, **options))
    before = nnx.as_pure(nnx.state(nnx.merge(graph, state).encoder, nnx.Not(nnx.Param)))
    alone_graph, alone_state = nnx.split(nnx.eval_shape(lambda: unshaken(**options)))
    for recurrent, alone in zip(
        jax.eval_shape(lambda state: measure(state, graph), state)[0],
        jax.eval_shape(lambda state: measure(state, alone_graph), alone_state)[0],
    ):
        assert recurrent.keys() == alone.keys() and any(name.startswith("encoder/") for name in recurrent)
    after = jax.jit(lambda state: measure(state, graph)[1])(state)  # without the decoder, a smaller program
    leaves = zip(jax.tree.leaves(before), jax.tree.leaves(after))
    assert any(np.any(np.asarray(a) != b) for a, b in leaves if jnp.issubdtype(a.dtype, jnp.floating))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"patch_size": 3}, "`patch_size` 3"),
        ({"mechanism": "mamba"}, "mamba takes no context"),
        ({"mechanism": "nope"}, "nope"),
        ({"competition": "both"}, "`competition`"),
        ({"initial": "zero"}, "`initial`"),
        ({"token_span": "world"}, "`token_span`"),
        ({"history": 2}, "recurrent=True"),
        ({"recurrent": True, "history": 0}, "`history`"),
    ],
)
def test_what_does_not_fit_is_said(options, expected):
    with pytest.raises(ValueError, match=expected):
        unshaken(**options)


def test_wrong_calls_are_said():
    made, frames, (_, slots) = model(), video(), arrays()
    for wrong, expected in (
        (frames[0], "frames"),
        (frames[:, :, :6], "frames"),
        ((255 * frames).astype(np.uint8), "floating"),
    ):
        with pytest.raises(ValueError, match=expected):
            made(wrong)
    with pytest.raises(ValueError, match="recurrent"):
        made.predict(frames, 2)
    with pytest.raises(ValueError, match="streams"):
        made.decoder.stream_shares(slots)
