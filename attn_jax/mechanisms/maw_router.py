"""The router of `maw`: which depth an example gets, and the objectives that teach it.

    X~     = 8 means of the example's real tokens, in order                        landmarks
    a^d    = 8 softmax(Q^d~ K^d~^T / sqrt(E)) - 1        (H, 8, 8) per depth        0 where attention is uniform
    s      = mean_d a^d                                                             state
    z_d    = clip(f_d(s) + g(a^d), -10, 10)                                         logits, pi = softmax(z)

`f` is the source's network (64 H -> 128 -> 64 -> depth), `g` one network (64 H -> 64 -> 1) for all depths.
Projections are linear, so the landmarks of a depth's queries are the projected landmarks of the tokens: `O(L D)`
and nothing that grows with `L` and the depth at once.

Deviations from the source (the multi-attention-weight research code): it averages the attention over depths
before the router sees it, which hides what is to be chosen (`f` alone; where its slices are normalised over
depths, that mean is a constant and the policy blind), and pools the full attention matrix, padding included.
Here `g` sees every depth, and only real tokens are pooled. Features are centred at uniform attention.

Three ways to teach it, all pure functions of logits: `supervised_loss`; `policy_loss` from rewards, by one of
three estimators; or no objective of its own, by the straight-through gradient of the model's loss (see `maw`).
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from attn_jax.engine.plan import accumulation
from attn_jax.types import Array, Dtype, check_choice, check_mask, check_shape

Estimator = Literal["grpo", "actor_critic", "exact"]

LANDMARKS = 8
LOGIT_BOUND = 10.0


class Route(NamedTuple):
    """What the router says of each example.

    Attributes:
      logits: `(B, depth)`, at least float32, within +-10.
      state: `(B, 64 H)`, what a critic may read.
    """

    logits: Array
    state: Array


def landmarks(x: Array, mask: Array | None = None, number: int = LANDMARKS) -> Array:
    """Means `(B, number, D)` of `x` `(B, L, D)` over `number` parts of its real tokens, at least float32.

    Part `i` of `n` real tokens is `floor(i n / number) .. ceil((i + 1) n / number)`, as in adaptive average
    pooling; where there are fewer tokens than parts these overlap. 0 without any real token.
    """
    real = jnp.ones(x.shape[:2], bool) if mask is None else mask
    part, length = jnp.arange(number), real.sum(axis=1, keepdims=True)
    start, stop = part * length // number, -(-(part + 1) * length // number)
    rank = (jnp.cumsum(real, axis=1) - 1)[:, None, :]
    inside = real[:, None, :] & (start[..., None] <= rank) & (rank < stop[..., None])
    acc = accumulation(x.dtype)
    total = jnp.einsum("bpl,bld->bpd", inside.astype(acc), x.astype(acc))
    return total / jnp.maximum(stop - start, 1)[..., None]


class DepthRouter(nnx.Module):
    """Logits of each depth from the landmarks of its queries and keys; see the file's documentation.

    Starts in evaluation mode: `train()` switches dropout and sampling on. Both draw from the stream `dropout`.

    Args:
      num_heads, depth: of the mechanism.
      dropout: rate, in training mode.
      temperature: of the softmax of `choose`.
    """

    def __init__(
        self,
        num_heads: int,
        depth: int,
        *,
        dropout: float,
        temperature: float,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        width = num_heads * LANDMARKS**2
        init = nnx.initializers.kaiming_normal()
        # A tenth of Kaiming's scale: a policy that is sure from the start never tries the better depths.
        last = nnx.initializers.variance_scaling(0.02, "fan_in", "truncated_normal")
        linear = functools.partial(nnx.Linear, kernel_init=init, param_dtype=param_dtype, rngs=rngs)
        self.state_in, self.state_hidden = linear(width, 128), linear(128, 64)
        self.state_out = linear(64, depth, kernel_init=last)
        # No last bias: it would move the logits of all depths alike, which changes nothing.
        self.depth_in, self.depth_out = linear(width, 64), linear(64, 1, use_bias=False, kernel_init=last)
        self.dropout = nnx.Dropout(dropout, deterministic=True, rngs=rngs)
        self.noise = rngs.dropout.fork()
        self.temperature = temperature
        self.deterministic = True

    def __call__(self, q: Array, k: Array) -> Route:
        """Route from landmarks `q, k` `(B, depth, 8, H, E)`."""
        dots = jnp.einsum("bdihe,bdjhe->bdhij", q, k) * q.shape[-1] ** -0.5
        slices = (LANDMARKS * nnx.softmax(dots) - 1).reshape(*q.shape[:2], self.state_in.in_features)
        state = slices.mean(axis=1)
        hidden = nnx.relu(self.state_hidden(self.dropout(nnx.relu(self.state_in(state)))))
        of_depth = self.depth_out(self.dropout(nnx.relu(self.depth_in(slices))))[..., 0]
        return Route(jnp.clip(self.state_out(hidden) + of_depth, -LOGIT_BOUND, LOGIT_BOUND), state)

    def choose(self, logits: Array) -> Array:
        """`straight_through` of `(B, depth)`: a sample in training mode, else the most probable depth."""
        return straight_through(logits, None if self.deterministic else self.noise(), self.temperature)


def straight_through(logits: Array, key: Array | None = None, temperature: float = 1.0) -> Array:
    """One-hot `(B, depth)` at the largest of `logits` that has the gradient of their softmax at `temperature`.

    With a `key`, Gumbel noise is added first (Jang et al. 2017), so that the choice is a sample of
    `softmax(logits)`.
    """
    if key is not None:
        logits = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
    soft = nnx.softmax(logits / temperature)
    hard = jax.nn.one_hot(logits.argmax(axis=-1), logits.shape[-1], dtype=soft.dtype)
    return hard + (soft - lax.stop_gradient(soft))


def entropy(logits: Array) -> Array:
    """Entropy `(B,)` in nats of the policy `softmax(logits)`."""
    log_pi = nnx.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_pi) * log_pi, axis=-1)


# From rewards. Depths are the arms of a bandit: one choice, one reward, no time.


def sample_depths(key: Array, logits: Array, *, estimator: Estimator, group: int = 8) -> Array:
    """The depths int `(B, G)` whose rewards `policy_loss` wants.

    `group` samples of the policy for "grpo", one for "actor_critic", every depth for "exact".
    """
    _check_estimator(estimator)
    batch, depth = logits.shape
    if estimator == "exact":
        return jnp.broadcast_to(jnp.arange(depth), (batch, depth))
    group = group if estimator == "grpo" else 1
    return jax.random.categorical(key, logits[:, None, :], shape=(batch, group))


def policy_loss(
    logits: Array,
    old_logits: Array,
    reference_logits: Array,
    depths: Array,
    rewards: Array,
    *,
    estimator: Estimator,
    values: Array | None = None,
    **options: Any,
) -> Array:
    """The loss of the estimator by its name: `grpo_loss`, `actor_critic_loss` or `exact_loss`.

    Args:
      logits: `(B, depth)`, of the policy that learns.
      old_logits: `(B, depth)`, of the policy that drew `depths`; "exact" has no use for it.
      reference_logits: `(B, depth)`, of the policy to stay near.
      depths: int `(B, G)`, see `sample_depths`.
      rewards: `(B, G)`, of those depths.
      values: `(B,)`, the critic's predictions, for "actor_critic" only.
      **options: of the estimator's function.

    Raises:
      ValueError: shapes that do not fit, an unknown estimator, `values` missing or of no use.
    """
    _check_estimator(estimator)
    if (values is None) == (estimator == "actor_critic"):
        raise ValueError(f"policy_loss: `values` go with estimator='actor_critic' and no other, got {estimator!r}")
    _check_logits(logits, old_logits, reference_logits, depths, rewards)
    if estimator == "exact":
        return exact_loss(logits, reference_logits, depths, rewards, **options)
    if values is not None:
        return actor_critic_loss(logits, old_logits, reference_logits, depths, rewards, values, **options)
    return grpo_loss(logits, old_logits, reference_logits, depths, rewards, **options)


def grpo_loss(
    logits: Array,
    old_logits: Array,
    reference_logits: Array,
    depths: Array,
    rewards: Array,
    *,
    advantage: Literal["std", "mean"] = "std",
    clip: float = 0.2,
    kl_weight: float = 0.04,
) -> Array:
    """Group relative policy optimisation (Shao et al. 2024, "DeepSeekMath"): a group of samples is its own critic.

        A_g  = (r_g - mean r) / (std r + 1e-6)          rho_g = pi(d_g) / pi_old(d_g)
        loss = mean_g [-min(rho_g A_g, clip(rho_g, 1 - c, 1 + c) A_g) + beta k3_g]
        k3_g = pi_ref(d_g) / pi(d_g) - log(pi_ref(d_g) / pi(d_g)) - 1

    A group's own mean as baseline shrinks the expected policy gradient by `(G - 1) / G` and keeps its direction.

    Args:
      logits, old_logits, reference_logits, depths, rewards: as in `policy_loss`; `G` at least 2.
      advantage: "std" as above; "mean" does not divide, which keeps the scale of the rewards (Liu et al. 2025).
      clip: `c`.
      kl_weight: `beta`.
    """
    if advantage not in ("std", "mean"):
        raise ValueError(f"grpo_loss: `advantage` must be 'std' or 'mean', got {advantage!r}")
    if rewards.shape[1] < 2:
        raise ValueError("grpo_loss: a group needs at least 2 samples, one alone is its own baseline")
    # Relative to one of them first: equal rewards then have advantages of exactly 0, not of rounding over 1e-6.
    relative = rewards - rewards[:, :1]
    gain = relative - relative.mean(axis=1, keepdims=True)
    if advantage == "std":
        gain = gain / (relative.std(axis=1, keepdims=True) + 1e-6)
    log_pi = _log_probability(logits, depths)
    ratio = jnp.exp(log_pi - lax.stop_gradient(_log_probability(old_logits, depths)))
    surrogate = jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - clip, 1 + clip) * gain)
    gap = lax.stop_gradient(_log_probability(reference_logits, depths)) - log_pi
    return jnp.mean(kl_weight * (jnp.expm1(gap) - gap) - surrogate)


def actor_critic_loss(
    logits: Array,
    old_logits: Array,
    reference_logits: Array,
    depths: Array,
    rewards: Array,
    values: Array,
    *,
    detach_values: bool = True,
    value_weight: float = 0.5,
    entropy_weight: float = 0.01,
    kl_weight: float = 0.1,
) -> Array:
    """What the source calls GRPO: one sample, a critic, no group.

        loss = -rho (r - V) + .5 (r - V)^2 - .01 H(pi) + .1 KL(pi | pi_ref)          rho = pi(d) / pi_old(d)

    The source lets the first term train `V` as well, which moves its optimum from `E r` to `E r - 1`:
    `detach_values=False`. It renews the reference policy every five epochs.

    Args:
      logits, old_logits, reference_logits, depths, rewards, values: as in `policy_loss`.
      detach_values: the critic learns from its squared error only.
      value_weight, entropy_weight, kl_weight: as above.
    """
    check_shape("actor_critic_loss", "values", values, "(B,)", logits.shape[:1])
    ratio = jnp.exp(_log_probability(logits, depths) - lax.stop_gradient(_log_probability(old_logits, depths)))
    error = rewards - values[:, None]
    gain = lax.stop_gradient(error) if detach_values else error
    fit = jnp.mean(value_weight * jnp.square(error) - ratio * gain)
    return fit + _regulariser(logits, reference_logits, entropy_weight, kl_weight)


def exact_loss(
    logits: Array,
    reference_logits: Array,
    depths: Array,
    rewards: Array,
    *,
    entropy_weight: float = 0.0,
    kl_weight: float = 0.0,
) -> Array:
    """Minus the expected reward `sum_d pi_d r_d`: with few depths there is nothing to estimate.

    Args:
      logits, reference_logits: as in `policy_loss`.
      depths, rewards: `(B, depth)`, every depth once.
      entropy_weight, kl_weight: of `-H(pi)` and `KL(pi | pi_ref)`.
    """
    check_shape("exact_loss", "rewards", rewards, "(B, depth)", logits.shape)
    # Relative to one of them, so that equal rewards have a gradient of exactly 0.
    relative = rewards - rewards[:, :1]
    expected = rewards[:, 0] + jnp.sum(jnp.exp(_log_probability(logits, depths)) * relative, axis=1)
    return _regulariser(logits, reference_logits, entropy_weight, kl_weight) - jnp.mean(expected)


def _log_probability(logits: Array, depths: Array) -> Array:
    return jnp.take_along_axis(nnx.log_softmax(logits), depths, axis=1)


def _regulariser(logits: Array, reference_logits: Array, entropy_weight: float, kl_weight: float) -> Array:
    log_pi, log_reference = nnx.log_softmax(logits), nnx.log_softmax(lax.stop_gradient(reference_logits))
    kl = jnp.sum(jnp.exp(log_pi) * (log_pi - log_reference), axis=-1)
    return jnp.mean(kl_weight * kl - entropy_weight * entropy(logits))


def _check_estimator(estimator: str) -> None:
    check_choice("policy_loss", "estimator", estimator, Estimator)


def _check_logits(logits: Array, old: Array, reference: Array, depths: Array, rewards: Array) -> None:
    check_shape("policy_loss", "logits", logits, "(B, depth)", (None, None))
    for name, array in (("old_logits", old), ("reference_logits", reference)):
        check_shape("policy_loss", name, array, "(B, depth)", logits.shape)
    check_shape("policy_loss", "depths", depths, "(B, G)", (logits.shape[0], None))
    check_shape("policy_loss", "rewards", rewards, "(B, G)", depths.shape)


# From labels.


def supervised_loss(
    logits: Array,
    targets: Array,
    scores: Array,
    relevant: Array,
    *,
    mask: Array | None = None,
    rank_weight: float = 0.7,
    margin: float = 0.5,
) -> Array:
    """`rank_weight` times `hinge_rank_loss` and the rest of the weight on the cross-entropy to the targets.

    The source detaches the ranking term, which then trains nothing: it reports it. Here it reaches whatever
    `scores` were computed from, the router by the straight-through gradient.

    Args:
      logits: `(B, depth)`.
      targets: int `(B,)` or a distribution `(B, depth)`, see `loss_targets`, `relevant_count_targets`.
      scores, relevant, mask, margin: of `hinge_rank_loss`.
    """
    check_shape("supervised_loss", "logits", logits, "(B, depth)", (None, None))
    if jnp.ndim(targets) == 1:
        targets = jax.nn.one_hot(targets, logits.shape[1], dtype=logits.dtype)
    check_shape("supervised_loss", "targets", targets, "(B,) or (B, depth)", logits.shape)
    cross_entropy = -jnp.mean(jnp.sum(targets * nnx.log_softmax(logits), axis=-1))
    ranking = hinge_rank_loss(scores, relevant, mask=mask, margin=margin)
    return rank_weight * ranking + (1 - rank_weight) * cross_entropy


def hinge_rank_loss(scores: Array, relevant: Array, *, mask: Array | None = None, margin: float = 0.5) -> Array:
    """Mean of `max(0, margin - s_i + s_j)` over relevant documents `i` and others `j` of the same query.

    Args:
      scores: `(B, documents)`, cosines of query and document.
      relevant: bool `(B, documents)`.
      mask: bool `(B, documents)`, True = a real document.
      margin: by how much a relevant document should win.

    Returns:
      A scalar; queries with only one kind of document have no pairs, 0 if there are none at all.
    """
    sizes = jnp.shape(scores)
    check_shape("hinge_rank_loss", "scores", scores, "(B, documents)", (None, None))
    check_mask("hinge_rank_loss", "relevant", relevant, "(B, documents)", sizes)
    check_mask("hinge_rank_loss", "mask", mask, "(B, documents)", sizes)
    real = jnp.ones(sizes, bool) if mask is None else mask
    scores = jnp.where(real, scores, 0)
    pairs = (real & relevant)[:, :, None] & (real & ~relevant)[:, None, :]
    hinge = nnx.relu(margin - scores[:, :, None] + scores[:, None, :])
    return jnp.sum(jnp.where(pairs, hinge, 0)) / jnp.maximum(pairs.sum(), 1)


def loss_targets(losses: Array, temperature: float = 1.0) -> Array:
    """Distribution `(B, depth)` of targets, `softmax(-loss_d / T)` of each depth's loss `(B, depth)`.

    A depth is asked for in so far as it serves the task. The targets have no gradient.
    """
    return nnx.softmax(-lax.stop_gradient(losses) / temperature)


def relevant_count_targets(relevance: Array, depth: int, *, mask: Array | None = None) -> Array:
    """The source's rule, int `(B,)`: depth 0 for at least 3 relevant documents, 1 for 2, 2 for 1, 3 for none.

    Args:
      relevance: `(B, documents)`, positive where relevant. The source counts positive *scores*, continuous ones,
        of which there are always 3: its targets are all 0. Give it judgements.
      depth: how many depths there are, at least 4.
      mask: bool `(B, documents)`, True = a real document.
    """
    if depth < 4:
        raise ValueError(f"relevant_count_targets: the rule needs `depth` of at least 4, got {depth}")
    check_shape("relevant_count_targets", "relevance", relevance, "(B, documents)", (None, None))
    check_mask("relevant_count_targets", "mask", mask, "(B, documents)", jnp.shape(relevance))
    relevant = relevance > 0 if mask is None else (relevance > 0) & mask
    return jnp.maximum(3 - relevant.sum(axis=1), 0)
