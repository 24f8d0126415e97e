"""Multi-attention-weight ("5-D") attention: several attentions per layer, of which a router picks one per example.

    A^d = softmax_j(Q^d K^d^T / sqrt(E)),   Q^d = x W_d, K^d alike        for depths d < depth
    o   = A^{d*} V,                         d* = argmax_d z_d             z: logits of the router, see `maw_router`

V is shared by the depths; their kernels are

    "lowrank"    W_d = W + alpha A_d B_d        A_d (D, rank), B_d (rank, D), N(0, 1 / fan in)
    "full"       W_d                            2 (depth - 1) D^2 more parameters than standard attention
    "tied"       W_d = W                        the source's pseudocode

The kernel is selected first, then each example is projected once and attends once: time `O(L^2 D)`, memory
`O(L D)` and `O(D^2)` for the example's kernels. Router and selection cost `O(depth D^2)`: what grows with the
depth does not grow with the length. The five-dimensional tensor exists in `depth_weights` only.

Source: the "Multi-Attention-Weight Transformers" research code (Askin). Deviations:

- Its pseudocode copies Q and K to every depth: all depths attend alike and no route changes anything ("tied").
- Its later code gives a depth one scalar per head and token and normalises over *depths*: rows do not sum to 1
  over keys, and a masked key gets weight 1 / depth. Nothing of that is attention; it is not offered.
- It computes all depths and then selects, `O(depth L^2 D)`.
- Its argmax of a sampled route has no gradient. Here the route is straight-through (Bengio et al. 2013): a
  one-hot `w` with the gradient of `p = softmax(z / T)`, in training with Gumbel noise on `z`. What `w` weighs are
  the *projections*, `Q = sum_d w_d Q^d` and `K` alike, so with `<,>` summed over the example

      dL/dw_d = <dL/dQ, Q^d> + <dL/dK, K^d>              dL/dz = (diag(p) - p p^T) dL/dw / T

  To first order `dL/dw_d - dL/dw_d*` is what the loss would change by if depth `d` were taken, so the router moves
  towards depths that lower it, in evaluation mode as in training. Weighing the *attentions* instead costs
  `depth` attentions: `selection="soft"`. The factors of a depth that no example takes learn from the router alone,
  which reads them.

A route depends on all tokens of its example, so there is no causal form: output `i` would depend on later inputs.
A route for each prefix would need the keys of every depth at every token, `depth` attentions again.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.core import Tracer

from attn_jax.aux import AuxLoss, AuxMetric, record
from attn_jax.engine.dispatch import IMPLEMENTATIONS
from attn_jax.engine.plan import accumulation
from attn_jax.engine.streaming import Stream, attend, dense_weights
from attn_jax.mechanisms.base import Attention, logical_axes, zero_masked
from attn_jax.mechanisms.maw_router import DepthRouter, Route, entropy, landmarks
from attn_jax.registry import register
from attn_jax.types import (
    Array,
    Dtype,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_positive,
    check_shape,
)

Projections = Literal["lowrank", "full", "tied"]
Selection = Literal["hard", "soft"]


class AssignedDepth(nnx.Variable):
    """The depth int `(B,)` that a module takes instead of its router's; see `maw_exploration`."""


class Revealed(nnx.Variable):
    """What a router says in a call, for an objective of its own; see `maw_exploration`."""


class DepthProjection(nnx.Module):
    """The projections of all depths, of the queries or of the keys.

    Args:
      depth, projections, rank, alpha, dtype, param_dtype, rngs: of the mechanism.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        *,
        projections: Projections,
        rank: int,
        alpha: float,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.depth, self.alpha, self.dtype, self.tied = depth, alpha, dtype, projections == "tied"
        stack = (depth,) if projections == "full" else ()
        xavier = nnx.initializers.xavier_uniform(batch_axis=tuple(range(len(stack))))
        axes = (*(None for _ in stack), "embed", "heads")
        self.kernel = nnx.Param(xavier(rngs.params(), (*stack, dim, dim), param_dtype), **logical_axes(*axes))

        def factor(shape: tuple[int, ...], *axes: str | None) -> nnx.Param | None:
            if projections != "lowrank":
                return None
            value = shape[1] ** -0.5 * jax.random.normal(rngs.params(), shape, param_dtype)
            return nnx.Param(value, **logical_axes(None, *axes))

        self.down = factor((depth, dim, rank), "embed", None)
        self.up = factor((depth, rank, dim), None, "heads")

    def __call__(self, x: Array, route: Array) -> Array:
        """`sum_d route_d x W_d`, `(B, L, D)`, of `x` `(B, L, D)` and `route` `(B or 1, depth)`, one-hot.

        The kernels are summed, not the projections: each example is projected once.
        """
        kernel = self.kernel[...]
        if not self.tied:
            if self.down is not None and self.up is not None:
                kernel = kernel + self.alpha * (self.down[...] @ self.up[...])
            # A product with a one-hot selects, to the last bit if not rounded, and has the gradient of the sum.
            kernel = jnp.einsum("bd,dij->bij", route, kernel, precision=lax.Precision.HIGHEST)
        dtype = self.dtype or jnp.result_type(x, self.kernel[...])
        return x.astype(dtype) @ kernel.astype(dtype)

    def every(self, x: Array) -> Array:
        """`x W_d` of every depth, `(B, depth, L, D)`, not rounded to the compute type."""
        kernel = self.kernel[...]
        if kernel.ndim == 3:
            return jnp.einsum("bli,dij->bdlj", x, kernel)
        y = jnp.broadcast_to((x @ kernel)[:, None], (x.shape[0], self.depth, *x.shape[1:]))
        if self.down is None or self.up is None:
            return y
        read = jnp.einsum("bli,dir->bdlr", x, self.down[...])
        return y + self.alpha * jnp.einsum("bdlr,drj->bdlj", read, self.up[...])


@register("maw", causal=False, weights=True, time="L^2", memory="L", implementations=IMPLEMENTATIONS)
class MultiAttentionWeight(Attention):
    """Multi-head attention of a routed depth; see the file's documentation.

    A new module is in evaluation mode: the route is the most probable depth. `train()` makes it a sample (Gumbel
    noise from the stream `dropout`) and switches on the router's dropout.

    Records the metrics `chosen_depth`, the mean of the most weighted depth, `router_entropy`, that of the router's
    policy in nats, and `depth_perplexity`, the number of depths in use (1: the router has collapsed); all over
    examples with a real token. With `entropy_weight`, also the loss `routing`.

    Args:
      depth: how many depths (the source: 32).
      projections: "lowrank", "full" or "tied".
      rank, alpha: of "lowrank".
      selection: "hard" (one depth per example, straight-through) or "soft" (the mean of all depths' attentions,
        weighted by the router's probabilities: `depth` attentions).
      temperature: of the softmax behind the route.
      straight_through: pass the gradient of the model's loss on to the router; where False only an objective of
        its own teaches it.
      entropy_weight: weight of minus the policy's entropy as an auxiliary loss, against an early collapse.
      router_dropout: rate, in training mode.
      implementation: of the attention, see `attn_jax.types.Implementation`; None to choose.

    Raises:
      ValueError: an unknown `projections` or `selection`, or a size that is not positive.
    """

    mechanism = "maw"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        depth: int = 8,
        projections: Projections = "lowrank",
        rank: int = 4,
        alpha: float = 1.0,
        selection: Selection = "hard",
        temperature: float = 1.0,
        straight_through: bool = True,
        entropy_weight: float = 0.0,
        router_dropout: float = 0.1,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_heads, causal=causal, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        for name, value, known in (("projections", projections, Projections), ("selection", selection, Selection)):
            check_choice("maw", name, value, known)
        for name, value in (("depth", depth), ("rank", rank)):
            check_integer("maw", name, value)
        check_positive("maw", "temperature", temperature)
        for name, value in (("alpha", alpha), ("entropy_weight", entropy_weight)):
            check_number("maw", name, value, "a finite number", math.isfinite)
        check_number("maw", "router_dropout", router_dropout, "at least 0 and less than 1", lambda p: 0 <= p < 1)
        check_flag("maw", "straight_through", straight_through)
        if not straight_through and (selection == "soft" or entropy_weight):
            raise ValueError("maw: straight_through=False leaves nothing to selection='soft' and `entropy_weight`")
        self.depth, self.selection, self.entropy_weight = depth, selection, entropy_weight
        self.straight_through = straight_through
        self.assigned: AssignedDepth | None = nnx.data(None)
        self.reveals = False
        self.implementation = self.checked(implementation)

        options: dict[str, Any] = {"projections": projections, "rank": rank, "alpha": alpha}
        options |= {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query, self.key = (DepthProjection(dim, depth, **options) for _ in range(2))
        self.value = self.linear(dim, dim, ("embed", "heads"), rngs)
        self.out = self.linear(dim, dim, ("heads", "embed"), rngs)
        self.router = DepthRouter(
            num_heads, depth, dropout=router_dropout, temperature=temperature, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(
        self,
        x: Array,
        *,
        mask: Array | None = None,
        context: Array | None = None,
        context_mask: Array | None = None,
        depth: Array | None = None,
    ) -> Array:
        """Map `x` `(B, L, D)` to `(B, L, D)`.

        Args:
          x: `(B, L, D)`, floating point.
          mask: bool `(B, L)`, True = a real token; outputs at masked tokens are 0.
          context, context_mask: not supported.
          depth: int `(B,)` in `0..depth - 1` (which `jit` cannot check), taken instead of the router's choice,
            which is then not computed.

        Raises:
          ValueError: wrong shapes or types, a `context`, a `depth` out of range.
        """
        x, _, _ = self.prepare(x, mask, context, context_mask)
        v = self.split_heads(self.value(x))
        if self.reveals:
            for name, value in self._route(x, mask, alone=True)._asdict().items():
                record(self, Revealed, name, value)
        if depth is None and self.assigned is not None:
            depth = self.assigned[...]
        if depth is not None:
            o = self._attend(x, self._forced(depth, x.shape[0]), v, mask)
        else:
            logits = self._route(x, mask).logits
            weights = self._choose(logits)
            self._record(logits, weights, mask)
            attend_by = self._attend if self.selection == "hard" else self._attend_all
            o = attend_by(x, weights, v, mask)
        return zero_masked(self.out(o.reshape(x.shape)), mask)

    def route(self, x: Array, *, mask: Array | None = None) -> Route:
        """The router's logits `(B, depth)` and state `(B, 64 H)` for `x` `(B, L, D)`; in training with dropout."""
        x, _, _ = self.prepare(x, mask, None, None)
        return self._route(x, mask)

    def depth_weights(self, x: Array, *, mask: Array | None = None) -> Array:
        """The five-dimensional tensor: dense weights `(B, H, depth, L, L)` of every depth, for analysis."""
        x, _, _ = self.prepare(x, mask, None, None)
        weights = self._depth_weights(x, mask)
        return weights if mask is None else jnp.where(mask[:, None, None, :, None], weights, 0)

    def attention_weights(
        self,
        x: Array,
        *,
        mask: Array | None = None,
        context: Array | None = None,
        context_mask: Array | None = None,
        depth: Array | None = None,
    ) -> Array:
        """Dense weights `(B, H, L, L)` of the routed depth, or of the mean over depths; arguments as in a call."""
        x, _, _ = self.prepare(x, mask, context, context_mask)
        if depth is None:
            mixture = self._choose(self._route(x, mask).logits)
        else:
            mixture = self._forced(depth, x.shape[0])
        if depth is None and self.selection == "soft":
            weights = jnp.einsum("bd,bhdlm->bhlm", mixture, self._depth_weights(x, mask))
        else:
            q, k = self._project(x, mixture)
            weights = dense_weights(q, [Stream(k, k, mask)], scale=self.head_dim**-0.5)
        return weights if mask is None else jnp.where(mask[:, None, :, None], weights, 0)

    def _route(self, x: Array, mask: Array | None, alone: bool = False) -> Route:
        """What the router says; `alone`, its gradient ends at its own parameters."""
        # At least float32 whatever the compute type: half precision must not change which depth is taken.
        tokens = landmarks(x, mask)
        q, k = (p.every(tokens) for p in (self.query, self.key))
        if alone:
            q, k = lax.stop_gradient((q, k))
        heads = (*q.shape[:3], self.num_heads, self.head_dim)
        return self.router(q.reshape(heads), k.reshape(heads))

    def _choose(self, logits: Array) -> Array:
        """The weight of each depth `(B, depth)`."""
        if self.selection == "hard":
            chosen = self.router.choose(logits)
            return chosen if self.straight_through else lax.stop_gradient(chosen)
        return nnx.softmax(logits / self.router.temperature)

    def _forced(self, depth: Array, batch: int) -> Array:
        check_shape("maw", "depth", depth, "(B,)", (batch,))
        if not jnp.issubdtype(depth.dtype, jnp.integer):
            raise ValueError(f"maw: `depth` must be integers, got dtype {depth.dtype}")
        known = not isinstance(depth, Tracer)
        if known and not np.isin(np.asarray(depth), np.arange(self.depth)).all():
            raise ValueError(f"maw: `depth` must lie in 0..{self.depth - 1}, got {depth}")
        return jax.nn.one_hot(depth, self.depth)

    def _project(self, x: Array, route: Array) -> tuple[Array, Array]:
        """Queries and keys `(B, L, H, E)` of the depths in `route` `(B, depth)`, one-hot."""
        return self.split_heads(self.query(x, route)), self.split_heads(self.key(x, route))

    def _attend(self, x: Array, route: Array, v: Array, mask: Array | None) -> Array:
        q, k = self._project(x, route)
        options: dict[str, Any] = {"implementation": self.implementation, "operation": "maw"}
        return attend(q, [Stream(k, v, mask)], scale=self.head_dim**-0.5, **options).out

    def _attend_all(self, x: Array, weights: Array, v: Array, mask: Array | None) -> Array:
        """`sum_d w_d A^d V`, depth by depth; each is computed again in the backward pass, so none is kept."""

        @jax.checkpoint
        def add(total: Array, depth: Array) -> Array:
            o = self._attend(x, jax.nn.one_hot(depth, self.depth)[None], v, mask)
            return total + weights[:, depth, None, None, None] * o

        zeros = jnp.zeros(v.shape, accumulation(v.dtype))
        total, _ = lax.scan(lambda total, d: (add(total, d), None), zeros, jnp.arange(self.depth))
        return total.astype(v.dtype)

    def _depth_weights(self, x: Array, mask: Array | None) -> Array:
        q, k = (p.every(x).reshape(-1, x.shape[1], self.num_heads, self.head_dim) for p in (self.query, self.key))
        every = None if mask is None else jnp.repeat(mask, self.depth, axis=0)
        weights = dense_weights(q, [Stream(k, k, every)], scale=self.head_dim**-0.5)
        return weights.reshape(x.shape[0], self.depth, *weights.shape[1:]).swapaxes(1, 2)

    def _record(self, logits: Array, weights: Array, mask: Array | None) -> None:
        real = jnp.ones(logits.shape[0], bool) if mask is None else mask.any(axis=1)

        def mean(value: Array) -> Array:
            kept = jnp.where(real.reshape(-1, *(1,) * (value.ndim - 1)), value, 0)
            return kept.sum(axis=0) / jnp.maximum(real.sum(), 1)

        uncertainty = mean(entropy(logits))
        if self.entropy_weight:
            record(self, AuxLoss, "routing", -self.entropy_weight * uncertainty)
        logits, weights = lax.stop_gradient((logits, weights))
        use = mean(weights)
        perplexity = jnp.exp(-jnp.sum(use * jnp.log(jnp.maximum(use, jnp.finfo(use.dtype).tiny))))
        record(self, AuxMetric, "chosen_depth", mean(weights.argmax(axis=1).astype(use.dtype)))
        record(self, AuxMetric, "router_entropy", lax.stop_gradient(uncertainty))
        record(self, AuxMetric, "depth_perplexity", perplexity)
