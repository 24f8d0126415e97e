"""Retrieval reranking: the order of the documents that BM25 finds for a query."""

from collections.abc import Iterable, Mapping
from pathlib import Path

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
from train.data.pairs import Lengths, RankedLists
from train.data.retrieval import Collection, bm25
from train.tasks import routing
from train.tasks.task import Batch, Metrics, Task

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
        tokenizer = bpe.train(list(collections["train"].documents.values()), task.vocab_size)
        self.vocab_size = task.vocab_size
        self.collections = collections
        self.lists = {
            split: RankedLists(
                collection,
                bm25(collection, task.num_candidates),
                tokenizer,
                lengths,
                task.train_candidates if split == "train" else None,
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

    @property
    def steps_per_epoch(self) -> int:
        return batches.num_batches(len(self.lists["train"].examples), self.config.batch_size)

    def model(self, rngs: nnx.Rngs) -> nnx.Module:
        arguments = self.model_arguments()
        if self.method != "straight_through":
            arguments["options"] |= {"straight_through": False}
        if self.method == "actor_critic":
            arguments["critic_dim"] = self.config.model.num_heads * LANDMARKS**2
        return Reranker(vocab_size=self.vocab_size, rngs=rngs, **arguments)

    @property
    def method(self) -> routing.Method:
        """How the routers of `maw` are taught."""
        return self.config.task.router.method

    def train_iterator(self, seed: int) -> grain.DatasetIterator:
        return batches.plan_iterator(self.lists["train"], batch_size=self.config.batch_size, seed=seed)

    def eval_batches(self, split: str) -> Iterable[Batch]:
        return batches.plan_batches(self.lists[split], batch_size=self.config.eval_batch_size)

    def loss(self, model: nnx.Module, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        scores, weight = model(batch["tokens"], mask=batch["mask"]), batch["example_mask"].astype(jnp.float32)
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
            lambda model: model(batch["tokens"], mask=batch["mask"]),
            batch["grades"],
            batch["candidate_mask"],
            {"likelihood": likelihood, "ndcg": ndcg}[router.reward],
            key=exploration.layers(model)[0].router.noise(),
            method=self.method,
            group=router.group,
            temperature=router.temperature,
            critic=None if critic is None else lambda state: critic(state)[:, 0],
        )

    def metrics(self, model: nnx.Module, batch: Batch) -> Metrics:
        scores, weight = model(batch["tokens"], mask=batch["mask"]), batch["example_mask"].astype(jnp.float32)
        found = (batch["grades"] > 0).any(axis=1)
        losses = listwise_loss(scores, batch["grades"] > 0, batch["candidate_mask"])
        made = {"loss": (jnp.where(found, losses, 0), weight)}
        for prefix, ranked_by in (("", scores), ("bm25/", batch["first_stage"])):
            values = metrics.ranking(ranked_by, batch["grades"], batch["ideal"], batch["candidate_mask"])
            made |= {prefix + name: (value, weight) for name, value in values.items()}
        return made

    def baselines(self, split: str) -> dict[str, float]:
        """BM25, the order that is reranked; and the best and the average order of its candidates."""
        lists = self.lists[split]
        random = np.random.default_rng(0)
        values: dict[str, list[np.ndarray]] = {}
        for batch in self.eval_batches(split):
            real = batch["example_mask"]
            orders = {
                "bm25": batch["first_stage"],
                "perfect order of its candidates": batch["grades"].astype(np.float32),
                "random order of them": random.random(batch["grades"].shape, np.float32),
            }
            for name, scores in orders.items():
                found = metrics.ranking(scores, batch["grades"], batch["ideal"], batch["candidate_mask"])
                values.setdefault(name, []).append(np.asarray(found[self.primary])[real])
        assert sum(map(len, values["bm25"])) == len(lists.examples)
        return {name: float(np.concatenate(found).mean()) for name, found in values.items()}


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
