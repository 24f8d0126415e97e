"""Retrieval reranking: the order of the documents that BM25 finds for a query."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_jax import metrics
from attn_jax.mechanisms import maw_exploration as exploration
from attn_jax.mechanisms.maw_router import LANDMARKS
from attn_jax.models.reranker import Reranker
from attn_jax.types import NEG_INF
from train.data import batches, beir, bpe, corpora, share
from train.data.pairs import NUM_TYPES, Lengths, RankedLists
from train.data.retrieval import Collection, bm25
from train.tasks import routing
from train.tasks.freezing import freeze
from train.tasks.task import Batch, Metrics, Task
from train.workdir import read_config

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NEVER_FROZEN = ("attention", "head_in", "head_out", "critic")

CORPORA = {"docstrings": corpora.docstrings, "news": corpora.news}


class Rerank(Task):
    """Listwise softmax over a relevant document and hard negatives; nDCG@10 of BM25's candidates reordered."""

    primary = "ndcg@10"
    better = "higher"

    def prepare(self) -> None:
        task = self.config.task
        routing.check(self.config.mechanism.name, task.router.method, task.router.reward)
        lengths = Lengths(task.max_query_length, task.max_length, tuple(task.buckets))
        collections = dict(self.load())
        for split in ("val", "test"):
            collections[split] = _sample(collections[split], task[f"num_{split}"])
        if task.frozen and self.pretrained is None:
            raise ValueError("task.frozen keeps what task.pretrained brings; give the work directory of a run")
        tokenizer = self._tokenizer(collections)
        self.vocab_size = task.vocab_size
        self.collections = collections
        self.lists = {
            split: RankedLists(
                collection,
                bm25(collection, task.num_candidates),
                tokenizer,
                lengths,
                task.train_candidates if split == "train" else None,
                task.hard_candidates if split == "train" else None,
                self.config.seed,
            )
            for split, collection in collections.items()
        }

    def load(self) -> Mapping[str, Collection]:
        """The splits `train`, `val` and `test`."""
        task = self.config.task
        if task.source in CORPORA:
            return CORPORA[task.source]()
        if not Path(task.source).expanduser().is_dir():
            raise ValueError(
                f"task.source `{task.source}` is neither one of {', '.join(CORPORA)} nor a folder in BEIR's layout"
                " (corpus.jsonl, queries.jsonl, qrels/); download and unzip one, such as fiqa.zip, and give its"
                " path"
            )
        return beir.read(task.source, task.train_dir or None)

    def _tokenizer(self, collections: Mapping[str, Collection]) -> Tokenizer:
        """Of the training documents; or of those of the run that came first, whose embeddings are taken over."""
        first = self.config
        while folder := first.task.get("pretrained", ""):
            first = read_config(Path(folder).expanduser())
            if first.task.name != self.config.task.name:
                raise ValueError(f"task.pretrained: the run in {folder} is of task `{first.task.name}`")
        size = first.task.vocab_size
        if size != self.config.task.vocab_size:
            raise ValueError(f"task.vocab_size must be that of the run in task.pretrained, {size}")
        if first is not self.config:
            collections = Rerank(first).load()
        return bpe.train(list(collections["train"].documents.values()), size)

    @property
    def pretrained(self) -> Path | None:
        folder = self.config.task.pretrained
        return Path(folder).expanduser() if folder else None

    @property
    def steps_per_epoch(self) -> int:
        return batches.num_batches(len(self.lists["train"].examples), self.config.batch_size)

    def model(self, rngs: nnx.Rngs) -> nnx.Module:
        arguments = self.model_arguments()
        if self.method != "straight_through":
            arguments["options"] |= {"straight_through": False}
        if self.method == "actor_critic":
            arguments["critic_dim"] = self.config.model.num_heads * LANDMARKS**2
        model = Reranker(vocab_size=self.vocab_size, num_types=NUM_TYPES, rngs=rngs, **arguments)
        if self.config.task.frozen:
            freeze(model, _NEVER_FROZEN)
        return model

    @property
    def method(self) -> routing.Method:
        """How the routers of `maw` are taught."""
        return self.config.task.router.method

    def train_iterator(self, seed: int) -> grain.DatasetIterator:
        return batches.plan_iterator(self.lists["train"], batch_size=self.config.batch_size, seed=seed)

    def eval_batches(self, split: str) -> Iterable[Batch]:
        return batches.plan_batches(self.lists[split], batch_size=self.config.eval_batch_size)

    def loss(self, model: nnx.Module, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        scores, weight = score(model, batch), batch["example_mask"].astype(jnp.float32)
        losses = listwise_loss(scores, batch["grades"] > 0, batch["candidate_mask"])
        first = (scores.argmax(axis=1) == 0).astype(jnp.float32)
        count = weight.sum()
        loss, found = (losses * weight).sum() / count, {"first": (first * weight).sum() / count}
        if self.method == "straight_through":
            return loss, found
        more, said = self._router_loss(model, batch)
        return loss + self.config.task.router.weight * more, found | said

    def _router_loss(self, model: nnx.Module, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        assert isinstance(model, Reranker)
        router = self.config.task.router
        critic = model.critic

        def likelihood(scores: jax.Array, grades: jax.Array, mask: jax.Array) -> jax.Array:
            return -listwise_loss(scores, grades > 0, mask)

        def ndcg(scores: jax.Array, grades: jax.Array, mask: jax.Array) -> jax.Array:
            # A list of training holds all its query's relevant documents that count.
            return metrics.ranking(scores, grades, -jnp.sort(-grades, axis=1), mask)["ndcg@10"]

        return routing.router_loss(
            model,
            lambda model: score(model, batch),
            batch["grades"],
            batch["candidate_mask"],
            {"likelihood": likelihood, "ndcg": ndcg}[router.reward],
            key=exploration.layers(model)[0].router.noise(),
            method=self.method,
            group=router.group,
            temperature=router.temperature,
            entropy_weight=router.entropy_weight,
            alignment_weight=router.alignment_weight,
            critic=None if critic is None else lambda state: critic(state)[:, 0],
        )

    def metrics(self, model: nnx.Module, batch: Batch) -> Metrics:
        weight = batch["example_mask"].astype(jnp.float32)
        with routing.watched(model) as seen:
            scores = score(model, batch)
        found = (batch["grades"] > 0).any(axis=1)
        losses = listwise_loss(scores, batch["grades"] > 0, batch["candidate_mask"])
        made = {"loss": (jnp.where(found, losses, 0), weight)}
        for prefix, ranked_by in (("", scores), ("bm25/", batch["first_stage"])):
            values = metrics.ranking(ranked_by, batch["grades"], batch["ideal"], batch["candidate_mask"])
            made |= {prefix + name: (value, weight) for name, value in values.items()}
        for layer, read in enumerate(seen()):
            made |= self._depths(model, layer, read, batch)
        return made

    def _depths(self, model: nnx.Module, layer: int, read: tuple[jax.Array, jax.Array], batch: Batch) -> Metrics:
        """The share of each depth among the pairs of each query."""
        real = batch["candidate_mask"]
        count = real.sum(axis=1, keepdims=True)
        depths = routing.decisions(exploration.layers(model)[layer], *read).reshape(*real.shape, -1)
        shares = jnp.sum(jnp.where(real[..., None], depths, 0), axis=1) / jnp.maximum(count, 1)
        counted = (count[:, 0] > 0).astype(jnp.float32)
        return {f"layer {layer}/depth {depth}": (shares[:, depth], counted) for depth in range(shares.shape[1])}

    def baselines(self, split: str) -> dict[str, float]:
        """BM25, the order that is reranked; and the best and the average order of its candidates."""
        lists = self.lists[split]
        random, ranking = np.random.default_rng(0), jax.jit(metrics.ranking)
        values: dict[str, list[np.ndarray]] = {}
        for batch in self.eval_batches(split):
            real = batch["example_mask"]
            orders = {
                "bm25": batch["first_stage"],
                "perfect order of its candidates": batch["grades"].astype(np.float32),
                "random order of them": random.random(batch["grades"].shape, np.float32),
            }
            for name, scores in orders.items():
                found = ranking(scores, batch["grades"], batch["ideal"], batch["candidate_mask"])
                values.setdefault(name, []).append(np.asarray(found[self.primary])[real])
        assert sum(map(len, values["bm25"])) == len(lists.examples)
        return {name: float(np.concatenate(found).mean()) for name, found in values.items()}


def score(model: Any, batch: Batch) -> jax.Array:
    """The scores `(B, C)` that a `Reranker` gives to the pairs of a batch."""
    return model(batch["tokens"], mask=batch["mask"], types=batch["types"])


def listwise_loss(scores: jax.Array, relevant: jax.Array, mask: jax.Array) -> jax.Array:
    """`-log softmax` of the relevant candidates, `(B,)`, together as one; large where there is none.

    Args:
      scores: `(B, C)`.
      relevant: bool `(B, C)`.
      mask: bool `(B, C)`, True = a candidate.
    """
    every = jax.nn.logsumexp(jnp.where(mask, scores, NEG_INF), axis=1)
    return every - jax.nn.logsumexp(jnp.where(mask & relevant, scores, NEG_INF), axis=1)


def _sample(collection: Collection, number: int) -> Collection:
    """At most `number` of its queries, 0 for all, by a hash of their ids."""
    if not 0 < number < len(collection.queries):
        return collection
    return collection.only(sorted(collection.queries, key=share)[:number])
