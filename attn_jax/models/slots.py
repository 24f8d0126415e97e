"""Slot-based reconstruction and prediction of video: patches, slots that read them, patches that read the slots.

    tokens = patches W + position           (P tokens a frame, then `token_layers` blocks of the mechanism)
    slots, masks = encoder(tokens)          K vectors a frame, and how they share each patch
    frame = decoder(slots)                  a learned query for each patch reads the slots

All of a frame that reaches the decoder are its K slots, so how well slots read decides how well frames are
reconstructed: this is the family in which dual key-value attention was proposed (Wang and Guo, "From Pairwise to
k-Wise in Practice", with its code), and a mechanism stands wherever something is read: within the frame's tokens,
and, if it takes a `context`, also where slots read tokens and patches read slots (`standard` does it otherwise).

Two ways for slots to compete. `competition="tokens"` is that source: softmax over the tokens, so each slot picks
its tokens whatever the others do, and the slots only share patches in the masks. `competition="slots"` is Slot
Attention (Locatello et al. 2020, algorithm 1): softmax over the slots, so that a token goes to one of them.

Two ways through time. A model that is not recurrent treats each frame alone (the source, whose "autoregressive"
rollout is dead code). A recurrent one is a filter (SAVi, Kipf et al. 2022): a predictor turns the slots of the
past into the initial slots of the next frame, which the encoder corrects by reading it; without a next frame the
prediction is decoded instead, and predicts on.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from attn_jax import ops
from attn_jax.aux import AuxLoss, AuxMetric, pop_aux, record
from attn_jax.mechanisms.base import logical_axes
from attn_jax.models.transformer import TransformerBlock
from attn_jax.positions import rotary, sinusoidal_positions_2d
from attn_jax.registry import MECHANISMS
from attn_jax.types import Array, Dtype, check_shape

Competition = Literal["tokens", "slots"]
Initial = Literal["fixed", "learned", "sampled"]
TokenSpan = Literal["frame", "video"]

_PROTOTYPE_SEED = 42  # the source's


class Prototype(nnx.Variable):
    """Initial slots that are not trained."""


class SlotVideoOutput(NamedTuple):
    """What `SlotBasedVideoModel` makes of `T` frames.

    Attributes:
      frames: `(B, T, height, width, 3)`, the reconstruction.
      slots: `(B, T, K, D)`.
      masks: `(B, T, K, P)`, float32: how the slots share each patch; the sum over the slots is 1.
      predicted: `(B, T, K, D)`, the slots that the predictor expects of the next frames; None if not recurrent.
    """

    frames: Array
    slots: Array
    masks: Array
    predicted: Array | None


class SlotAttention(nnx.Module):
    """One iteration of Slot Attention: slots compete for the tokens (Locatello et al. 2020, algorithm 1).

    a = softmax_slots(q k^T / sqrt(D))      q of the slots, k of the tokens, both normalised
    u = (a / sum_tokens a) v                each slot's weighted mean
    slots <- GRU(slots, u);  slots <- slots + MLP(LN(slots))
    """

    epsilon = 1e-8  # added to each slot's total weight

    def __init__(self, dim: int, *, dtype: Dtype | None = None, param_dtype: Dtype = jnp.float32, rngs: nnx.Rngs):
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.token_norm, self.slot_norm, self.mlp_norm = (nnx.LayerNorm(dim, **types) for _ in range(3))
        self.query, self.key, self.value = (
            _linear(dim, dim, ("embed", "heads"), use_bias=False, **types) for _ in range(3)
        )
        self.gru = nnx.GRUCell(dim, dim, **types)
        self.mlp_in = _linear(dim, 2 * dim, ("embed", "mlp"), **types)
        self.mlp_out = _linear(2 * dim, dim, ("mlp", "embed"), **types)

    def __call__(self, slots: Array, tokens: Array) -> tuple[Array, Array]:
        """`slots` `(B, K, D)` and `tokens` `(B, P, D)` to new slots and float32 `a` `(B, K, P)`."""
        tokens = self.token_norm(tokens)
        q, k, v = self.query(self.slot_norm(slots)), self.key(tokens), self.value(tokens)
        masks = jax.nn.softmax(_logits(q, k), axis=1)
        weights = masks / (masks.sum(-1, keepdims=True) + self.epsilon)
        updates = jnp.einsum("bkp,bpd->bkd", weights.astype(v.dtype), v)
        slots, _ = self.gru(slots.astype(updates.dtype), updates)
        return slots + self.mlp_out(nnx.relu(self.mlp_in(self.mlp_norm(slots)))), masks


def _logits(slots: Array, tokens: Array) -> Array:
    """`slots . tokens / sqrt(D)`: `(B, K, D)` and `(B, P, D)` to float32 `(B, K, P)`."""
    product = jnp.einsum("bkd,bpd->bkp", slots, tokens, preferred_element_type=jnp.float32)
    return product * slots.shape[-1] ** -0.5


class SlotEncoder(nnx.Module):
    """`K` slots read the tokens of a frame.

    With `competition="tokens"`, `num_layers` blocks of the mechanism in which slots attend to tokens, and then, as
    in the source, `masks = softmax_slots(slots . tokens / sqrt(D))` and `slots = LN(slots + MLP(LN(logits)))`.
    With `competition="slots"`, `num_iterations` of `SlotAttention`, which share their parameters.

    Args:
      dim, num_heads: width `D` and heads `H`.
      num_slots, num_patches: `K`, and the tokens `P` of a frame.
      initial: the slots to begin with: "fixed" (standard normal and the same in every model: the source),
        "learned", or "sampled" for each example from a learned Gaussian, which makes the slots exchangeable.
      noise: scale of the Gaussian noise on the slots in training mode; only with `competition="tokens"`.
      **block: arguments of `TransformerBlock`, such as `mechanism` and `options`.

    Raises:
      ValueError: unknown `competition` or `initial`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_slots: int,
        num_patches: int,
        num_layers: int,
        competition: Competition = "tokens",
        num_iterations: int = 3,
        initial: Initial = "fixed",
        noise: float = 0.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
        **block: Any,
    ):
        for name, value, known in (("competition", competition, Competition), ("initial", initial, Initial)):
            if value not in get_args(known):
                choices = " or ".join(map(repr, get_args(known)))
                raise ValueError(f"SlotEncoder: `{name}` must be {choices}, got {value!r}")
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.num_slots, self.num_iterations, self.noise = num_slots, num_iterations, noise
        self.deterministic = False  # `train()` and `eval()` set it
        self.attention = SlotAttention(dim, **types) if competition == "slots" else None
        self.blocks = nnx.List()
        if competition == "tokens":
            self.blocks.extend(_reader(dim, num_heads, **types, **block) for _ in range(num_layers))
            self.logit_norm = nnx.LayerNorm(num_patches, **types)
            self.mlp_in = _linear(num_patches, dim, (None, "mlp"), **types)
            self.mlp_out = _linear(dim, dim, ("mlp", "embed"), **types)
            self.norm = nnx.LayerNorm(dim, use_bias=False, use_scale=False, **types)
        xavier = nnx.initializers.xavier_uniform()

        def trained(rows: int) -> nnx.Param:
            return nnx.Param(xavier(rngs.params(), (rows, dim), param_dtype), weight_decay=False)

        fixed = jax.random.normal(jax.random.key(_PROTOTYPE_SEED), (num_slots, dim), param_dtype)
        makers = {"fixed": lambda: Prototype(fixed), "learned": lambda: trained(num_slots)}
        self.prototypes = makers[initial]() if initial in makers else None
        self.mean, self.log_scale = (trained(1) if initial == "sampled" else None for _ in range(2))
        self.random = rngs.slots.fork() if initial == "sampled" or noise else None

    def initial_slots(self, batch: int) -> Array:
        """`(batch, K, D)`."""
        if self.prototypes is not None:
            return jnp.broadcast_to(self.prototypes[...], (batch, *self.prototypes.shape))
        assert self.random is not None and self.mean is not None and self.log_scale is not None
        mean, scale = self.mean[...], jnp.exp(self.log_scale[...])
        return mean + scale * jax.random.normal(self.random(), (batch, self.num_slots, mean.shape[-1]), mean.dtype)

    def __call__(self, tokens: Array, slots: Array) -> tuple[Array, Array]:
        """Let `slots` `(B, K, D)` read `tokens` `(B, P, D)`; returns new slots and float32 masks `(B, K, P)`."""
        if self.attention is not None:
            slots, masks = self.attention(slots, tokens)
            for _ in range(self.num_iterations - 1):
                slots, masks = self.attention(slots, tokens)
            return slots, masks
        for block in self.blocks:
            slots = block(slots, context=tokens)
        logits = _logits(slots, tokens)
        slots = self.norm(slots + self.mlp_out(nnx.silu(self.mlp_in(self.logit_norm(logits)))))
        if self.random is not None and self.noise and not self.deterministic:
            slots += self.noise * jax.random.normal(self.random(), slots.shape, slots.dtype)
        return slots, jax.nn.softmax(logits, axis=1)


class SlotDecoder(nnx.Module):
    """Patches read the slots: a learned query for each, `num_layers` blocks of the mechanism, then pixels.

    Args:
      dim, num_heads: width `D` and heads `H`.
      grid: rows and columns of patches; `P` is their product.
      patch_size: pixels of a patch's side.
      **block: arguments of `TransformerBlock`, such as `mechanism` and `options`.
    """

    initial_scale = 0.75  # of the learned scalar on the output, the source's

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        grid: tuple[int, int],
        patch_size: int,
        num_layers: int,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
        **block: Any,
    ):
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.grid, self.patch_size = grid, patch_size
        queries = nnx.initializers.xavier_uniform()(rngs.params(), (math.prod(grid), dim), param_dtype)
        self.queries = nnx.Param(queries, weight_decay=False)
        self.blocks = nnx.List(_reader(dim, num_heads, **types, **block) for _ in range(num_layers))
        self.pixels = _linear(dim, 3 * patch_size**2, ("embed", None), **types)
        self.scale = nnx.Param(jnp.asarray(self.initial_scale, param_dtype))

    def __call__(self, slots: Array) -> Array:
        """`slots` `(B, K, D)` to frames `(B, height, width, 3)`."""
        x = self._queries(slots)
        for block in self.blocks:
            x = block(x, context=slots)
        patches = self.pixels(x) * self.scale[...].astype(x.dtype)
        rows, columns = self.grid
        return rearrange(
            patches,
            "b (r c) (y x rgb) -> b (r y) (c x) rgb",
            r=rows,
            c=columns,
            y=self.patch_size,
            x=self.patch_size,
        )

    def stream_shares(self, slots: Array) -> Array:
        """How much of each patch's reading comes from each stream of a dual-KV mechanism, in the last block.

        Args:
          slots: `(B, K, D)`.

        Returns:
          `(B, P, H, 2)`, float32.

        Raises:
          ValueError: the mechanism has no streams.
        """
        if not (self.blocks and hasattr(self.blocks[-1].attention, "stream_shares")):
            raise ValueError("SlotDecoder: `stream_shares` needs a mechanism with streams, such as dual_kv")
        x = self._queries(slots)
        for block in self.blocks[:-1]:
            x = block(x, context=slots)
        return self.blocks[-1].attention.stream_shares(x, context=slots)

    def _queries(self, slots: Array) -> Array:
        dim = slots.shape[-1]
        position = sinusoidal_positions_2d(*self.grid, dim).reshape(-1, dim)
        return jnp.broadcast_to((self.queries[...] + position).astype(slots.dtype), (len(slots), *position.shape))


class History(NamedTuple):
    """The slots of the last frames: `slots` `(B, frames, K, D)`, the newest last, and int32 how many are real."""

    slots: Array
    length: Array


class SlotPredictor(nnx.Module):
    """The slots of the next frame from those of the last `history` frames: one transformer block (SAVi's for 1).

    The newest slots are the queries; with `time_rope` queries and keys are turned by the number of their frame
    (`attn_jax.positions.rotary`), so that products see how long ago something was.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        history: int = 1,
        time_rope: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if history < 1 or dim % num_heads:
            raise ValueError(
                "SlotPredictor: `history` must be positive and `num_heads` divide `dim`,"
                f" got {history}, {num_heads} and {dim}"
            )
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.num_heads, self.history, self.time_rope = num_heads, history, time_rope
        self.query, self.key, self.value = (
            _linear(dim, dim, ("embed", "heads"), use_bias=False, **types) for _ in range(3)
        )
        self.out = _linear(dim, dim, ("heads", "embed"), use_bias=False, **types)
        self.mlp_in = _linear(dim, 2 * dim, ("embed", "mlp"), **types)
        self.mlp_out = _linear(2 * dim, dim, ("mlp", "embed"), **types)
        self.attention_norm, self.mlp_norm = (nnx.LayerNorm(dim, **types) for _ in range(2))

    def no_history(self, slots: Array) -> History:
        """Before the first frame; `slots` `(B, K, D)` tells the shape and type."""
        return History(jnp.zeros((len(slots), self.history, *slots.shape[1:]), slots.dtype), jnp.int32(0))

    def __call__(self, history: History, slots: Array) -> tuple[Array, History]:
        """What follows `slots` `(B, K, D)` of the newest frame: the next frame's, and the history with these."""
        kept = jnp.concatenate([history.slots[:, 1:], slots[:, None]], axis=1)
        history = History(kept, jnp.minimum(history.length + 1, self.history))
        frame = jnp.arange(self.history)
        q, k, v = (
            rearrange(layer(x), "b f k (h e) -> b (f k) h e", h=self.num_heads)
            for layer, x in ((self.query, kept[:, -1:]), (self.key, kept), (self.value, kept))
        )
        if self.time_rope:
            positions = jnp.repeat(frame, slots.shape[1])
            q, k = rotary(q, positions[-slots.shape[1] :]), rotary(k, positions)
        real = jnp.repeat(frame >= self.history - history.length, slots.shape[1])
        o = ops.standard_attention(q, k, v, mask=jnp.broadcast_to(real, k.shape[:2]))
        x = self.attention_norm(slots + self.out(o.reshape(slots.shape)))
        return self.mlp_norm(x + self.mlp_out(nnx.gelu(self.mlp_in(x)))), history


class SlotBasedVideoModel(nnx.Module):
    """Frames to slots to frames; see the file's documentation.

    Args:
      height, width, patch_size: pixels of a frame and of a patch's side, which divides both.
      dim, num_heads: width `D` and heads `H` of all parts.
      num_slots: `K`.
      num_layers: blocks of the decoder and, with `competition="tokens"`, of the encoder.
      token_layers: blocks of the mechanism over the tokens before the slots read them.
      token_span: what such a block sees, the tokens of one "frame" or of the whole "video"; then in a recurrent
        model causally, token by token.
      mechanism, options: as in `TransformerBlock`.
      competition, num_iterations, initial, noise: as in `SlotEncoder`.
      recurrent: predict and correct from frame to frame.
      history, time_rope: as in `SlotPredictor`, of a recurrent model.
      drop_path: as in `TransformerBlock`.
      dtype, param_dtype, rngs: as in `attn_jax.build`.

    Raises:
      ValueError: sizes that do not fit, unknown settings, a mechanism that would stand nowhere.
    """

    def __init__(
        self,
        *,
        height: int,
        width: int,
        patch_size: int,
        dim: int,
        num_heads: int,
        num_slots: int,
        num_layers: int,
        token_layers: int = 0,
        token_span: TokenSpan = "frame",
        mechanism: str = "standard",
        options: Mapping[str, Any] | None = None,
        competition: Competition = "tokens",
        num_iterations: int = 3,
        initial: Initial = "fixed",
        noise: float = 0.0,
        recurrent: bool = False,
        history: int = 1,
        time_rope: bool = False,
        drop_path: float = 0.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        where = "SlotBasedVideoModel"
        if height % patch_size or width % patch_size:
            raise ValueError(f"{where}: `patch_size` {patch_size} must divide height {height} and width {width}")
        if token_span not in get_args(TokenSpan):
            raise ValueError(f"{where}: `token_span` must be 'frame' or 'video', got {token_span!r}")
        if not token_layers and mechanism in MECHANISMS and not MECHANISMS[mechanism].cross:
            raise ValueError(
                f"{where}: {mechanism} takes no context, so it can neither read tokens into slots nor slots into"
                " patches; give it `token_layers` of at least 1"
            )
        if not recurrent and (history, time_rope) != (1, False):
            raise ValueError(f"{where}: `history` and `time_rope` belong to recurrent=True")
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        block = {"mechanism": mechanism, "options": options or {}, "drop_path": drop_path, **types}
        self.patch_size, self.grid = patch_size, (height // patch_size, width // patch_size)
        self.token_span = token_span
        self.embed = _linear(3 * patch_size**2, dim, (None, "embed"), **types)
        causal = recurrent and token_span == "video"
        self.blocks = nnx.List(
            TransformerBlock(dim, num_heads, activation="swiglu", norm="post", causal=causal, **block)
            for _ in range(token_layers)
        )
        self.encoder = SlotEncoder(
            dim,
            num_heads,
            num_slots=num_slots,
            num_patches=math.prod(self.grid),
            num_layers=num_layers,
            competition=competition,
            num_iterations=num_iterations,
            initial=initial,
            noise=noise,
            **block,
        )
        self.decoder = SlotDecoder(
            dim, num_heads, grid=self.grid, patch_size=patch_size, num_layers=num_layers, **block
        )
        self.predictor = (
            SlotPredictor(dim, num_heads, history=history, time_rope=time_rope, **types) if recurrent else None
        )

    def __call__(self, frames: Array) -> SlotVideoOutput:
        """Reconstruct `frames`, floating point `(B, T, height, width, 3)`, such as pixels from 0 to 1."""
        tokens = self.tokens(frames)
        if self.predictor is None:
            flat = rearrange(tokens, "b t p d -> (b t) p d")
            slots, masks = self.encoder(flat, self.encoder.initial_slots(len(flat)))
            slots, masks = (rearrange(x, "(b t) ... -> b t ...", t=tokens.shape[1]) for x in (slots, masks))
            return SlotVideoOutput(self.decode(slots), slots, masks, None)
        slots, masks, predicted, _ = self._filter(tokens)
        return SlotVideoOutput(self.decode(slots), slots, masks, predicted)

    def predict(self, frames: Array, num_frames: int) -> Array:
        """Slots `(B, num_frames, K, D)` of the frames that follow `frames`, none of which is seen.

        Raises:
          ValueError: the model is not recurrent.
        """
        if self.predictor is None:
            raise ValueError("SlotBasedVideoModel: `predict` needs recurrent=True")
        *_, predicted, history = self._filter(self.tokens(frames))
        slots, rest = predicted[:, -1], []
        for _ in range(num_frames):
            rest.append(slots)
            slots, history = self.predictor(history, slots)
        return jnp.stack(rest, axis=1)

    def decode(self, slots: Array) -> Array:
        """Frames `(B, T, height, width, 3)` of slots `(B, T, K, D)`."""
        frames = self.decoder(rearrange(slots, "b t k d -> (b t) k d"))
        return rearrange(frames, "(b t) ... -> b t ...", t=slots.shape[1])

    def tokens(self, frames: Array) -> Array:
        """Tokens `(B, T, P, D)` of `frames`."""
        rows, columns = self.grid
        size = self.patch_size
        expected = (None, None, rows * size, columns * size, 3)
        check_shape("SlotBasedVideoModel", "frames", frames, "(B, T, height, width, 3)", expected)
        if not jnp.issubdtype(frames.dtype, jnp.floating):
            raise ValueError(f"SlotBasedVideoModel: `frames` must be floating point, got {frames.dtype}")
        patches = rearrange(frames, "b t (r y) (c x) rgb -> b t (r c) (y x rgb)", y=size, x=size)
        x = self.embed(patches)
        x += sinusoidal_positions_2d(rows, columns, x.shape[-1], x.dtype).reshape(x.shape[2:])
        batch, time, _, _ = x.shape
        flat, whole = ("b t p d -> (b t) p d", "(b t) p d -> b t p d")
        if self.token_span == "video":
            flat, whole = ("b t p d -> b (t p) d", "b (t p) d -> b t p d")
        x = rearrange(x, flat)
        for block in self.blocks:
            x = block(x)
        return rearrange(x, whole, b=batch, t=time)

    def _filter(self, tokens: Array) -> tuple[Array, Array, Array, History]:
        """Corrected slots, masks and predicted slots `(B, T, ...)` of each frame, and the last history."""

        def frame(
            model: tuple[SlotEncoder, SlotPredictor], carry: tuple[Array, History], tokens: Array
        ) -> tuple[tuple[Array, History], tuple[Array, Array, Array], Any]:
            encoder, predictor = model
            slots, history = carry
            slots, masks = encoder(tokens, slots)
            predicted, history = predictor(history, slots)
            return (predicted, history), (slots, masks, predicted), pop_aux(encoder)

        assert self.predictor is not None
        first = self.encoder.initial_slots(len(tokens)).astype(tokens.dtype)
        carry = (first, self.predictor.no_history(first))
        over_time = nnx.scan(
            frame,
            in_axes=(nnx.StateAxes({nnx.Param: None, ...: nnx.Carry}), nnx.Carry, 1),
            out_axes=(nnx.Carry, 1, 0),
        )
        (_, history), (slots, masks, predicted), aux = over_time((self.encoder, self.predictor), carry, tokens)
        for kind, recorded in zip((AuxLoss, AuxMetric), aux):
            for name, values in recorded.items():
                record(self, kind, f"encoder/{name}", values.mean(axis=0))
        return slots, masks, predicted, history


def _linear(
    in_dim: int, out_dim: int, axes: tuple[str | None, str | None], *, rngs: nnx.Rngs, **options: Any
) -> nnx.Linear:
    """A Xavier-uniform projection, its kernel tagged with logical axes."""
    xavier = nnx.initializers.xavier_uniform()
    return nnx.Linear(
        in_dim, out_dim, kernel_init=xavier, kernel_metadata=logical_axes(*axes), rngs=rngs, **options
    )


def _reader(
    dim: int,
    num_heads: int,
    *,
    mechanism: str = "standard",
    options: Mapping[str, Any] | None = None,
    **block: Any,
) -> TransformerBlock:
    """A block that reads a `context`: of `mechanism` if it can, of `standard` otherwise."""
    if mechanism in MECHANISMS and not MECHANISMS[mechanism].cross:
        mechanism, options = "standard", None
    return TransformerBlock(
        dim, num_heads, mechanism=mechanism, options=options, activation="swiglu", norm="post", **block
    )
