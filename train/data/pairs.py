"""Batches of queries with candidate documents, each pair as one sequence for a cross-encoder.

    tokens        (B, C, L) int32   [CLS] query [SEP] document [SEP], 0 where padded
    mask          (B, C, L) bool    True = a real token
    types         (B, C, L) int32   0 special or padded; of the query 1, of the document 3; where the token is in
                                    both, one more
    grades        (B, C)    int32   of the candidates, 0 where not judged
    candidate_mask (B, C)   bool    True = a candidate
    first_stage   (B, C)    float32 BM25's scores, 0 without one
    ideal         (B, I)    int32   the query's highest grades, in descending order, whether found or not
    example_mask  (B,)      bool    True = a real query; a dummy has no candidates

In training the candidates are a relevant document, the first, and others that nobody judged relevant: some that
BM25 ranks high for the query, and for the rest any that it found for some query. They are drawn anew for every
step as a function of `(seed, step, query)`. With hard ones alone there is a shortcut: documents of many common
words are then mostly wrong and others mostly right, whatever the query. In evaluation the candidates are all that
BM25 found, later ids first: a stable sort by score then leaves ties as trec_eval does.

The types tell a model from the start what a pretrained one knows: which text a token is of, and which tokens the
texts share. Models of a few thousand queries do not learn to compare tokens by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from train.data import bpe
from train.data.retrieval import Collection, FirstStage

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IDEAL = 10  # the deepest cut-off of the metrics
NUM_TYPES = 5


class PairBatch(TypedDict):
    """`B` queries with `C` candidates each; see the module's documentation."""

    tokens: np.ndarray
    mask: np.ndarray
    types: np.ndarray
    grades: np.ndarray
    candidate_mask: np.ndarray
    first_stage: np.ndarray
    ideal: np.ndarray
    example_mask: np.ndarray


@dataclass(frozen=True)
class Lengths:
    """Tokens of a query, and of a pair with its three special tokens, at most; and the lengths to pad to."""

    query: int
    pair: int
    buckets: tuple[int, ...]

    def __post_init__(self):
        if not 1 <= self.query <= self.pair - 4:
            raise ValueError(f"a pair of {self.pair} tokens has no room for a query of {self.query}")
        if max(self.buckets, default=0) < self.pair:
            raise ValueError(f"task.buckets must reach task.max_length {self.pair}, got {self.buckets}")


class RankedLists:
    """A split as tokens: what `train.data.batches` makes batches of.

    Args:
      collection: the split.
      first_stage: what BM25 finds in it.
      tokenizer: see `train.data.bpe`.
      lengths: of what is kept of the texts.
      num_candidates: `C` of training, None for evaluation.
      num_hard: how many of them BM25 ranks high, at most; None for all but the first.
      seed: of the draws in training.
    """

    def __init__(
        self,
        collection: Collection,
        first_stage: FirstStage,
        tokenizer: Tokenizer,
        lengths: Lengths,
        num_candidates: int | None = None,
        num_hard: int | None = None,
        seed: int = 0,
    ):
        self.collection, self.first_stage, self.lengths = collection, first_stage, lengths
        self.num_candidates, self.num_hard, self.seed = num_candidates, num_hard, seed
        self.document_ids = list(collection.documents)
        place = {name: index for index, name in enumerate(self.document_ids)}
        self.grades = [
            {place[name]: grade for name, grade in collection.relevance[query].items() if name in place}
            for query in collection.queries
        ]
        self.ideal = np.zeros((len(self.grades), IDEAL), np.int32)
        for row, query in enumerate(collection.queries):
            best = sorted((grade for grade in collection.relevance[query].values() if grade > 0), reverse=True)
            self.ideal[row, : len(best[:IDEAL])] = best[:IDEAL]
        self.rank = np.argsort(np.argsort(self.document_ids))  # by id, to order ties
        self.examples = np.arange(len(self.grades))
        if num_candidates is not None:  # what cannot be learnt from: no relevant document in the corpus
            self.examples = np.array(
                [row for row, found in enumerate(self.grades) if max(found.values(), default=0) > 0]
            )
        self.groups = np.zeros(len(self.examples), np.int64)
        self.queries = _encode(tokenizer, list(collection.queries.values()), lengths.query)
        needed = {place for place in first_stage.documents.ravel().tolist() if place >= 0}
        needed |= {place for found in self.grades for place in found}
        if num_candidates is not None and len(needed) < num_candidates:
            needed = set(range(len(self.document_ids)))
        texts = list(collection.documents.values())
        self.needed = np.array(sorted(needed))
        tokens = _encode(tokenizer, [texts[place] for place in self.needed], lengths.pair)
        self.documents = dict(zip(self.needed.tolist(), tokens))

    def candidates(self, query: int, step: int) -> np.ndarray:
        """Places of the documents that `query` is shown with."""
        found = self.first_stage.documents[query]
        found = found[found >= 0]
        if self.num_candidates is None:
            return found[np.argsort(-self.rank[found], kind="stable")]
        random = np.random.default_rng((self.seed, step, query))
        relevant = np.array([place for place, grade in sorted(self.grades[query].items()) if grade > 0])
        wanted = self.num_candidates - 1
        others = np.setdiff1d(found, relevant)
        chosen = random.permutation(others)[: wanted if self.num_hard is None else min(wanted, self.num_hard)]
        if len(chosen) < wanted:
            rest = np.setdiff1d(self.needed, np.concatenate([relevant, chosen]))
            chosen = np.concatenate([chosen, random.permutation(rest)[: wanted - len(chosen)]])
        return np.concatenate([[random.choice(relevant)], chosen])

    def collate(self, examples: np.ndarray, batch: np.ndarray, num_rows: int, step: int) -> PairBatch:
        lists = {int(e): self.candidates(int(self.examples[e]), step) for e in batch}
        width = self.num_candidates or self.first_stage.documents.shape[1]
        special = 3
        longest = max(
            (
                min(len(self.queries[self.examples[e]]) + len(self.documents[d]) + special, self.lengths.pair)
                for e, found in lists.items()
                for d in found.tolist()
            ),
            default=1,
        )
        length = min(bucket for bucket in self.lengths.buckets if bucket >= longest)
        made = PairBatch(
            tokens=np.zeros((num_rows, width, length), np.int32),
            mask=np.zeros((num_rows, width, length), bool),
            types=np.zeros((num_rows, width, length), np.int32),
            grades=np.zeros((num_rows, width), np.int32),
            candidate_mask=np.zeros((num_rows, width), bool),
            first_stage=np.zeros((num_rows, width), np.float32),
            ideal=np.zeros((num_rows, IDEAL), np.int32),
            example_mask=np.arange(num_rows) < len(examples),
        )
        for row, example in enumerate(examples.tolist()):
            query = int(self.examples[example])
            scores = dict(zip(self.first_stage.documents[query].tolist(), self.first_stage.scores[query].tolist()))
            made["ideal"][row] = self.ideal[query]
            for column, document in enumerate(lists[example].tolist()):
                pair = self.pair(query, document)
                made["tokens"][row, column, : len(pair)] = pair
                made["mask"][row, column, : len(pair)] = True
                made["types"][row, column, : len(pair)] = _types(pair)
                made["grades"][row, column] = max(self.grades[query].get(document, 0), 0)
                made["candidate_mask"][row, column] = True
                made["first_stage"][row, column] = scores.get(document, 0.0)
        return made

    def pair(self, query: int, document: int) -> list[int]:
        """`[CLS] query [SEP] document [SEP]`, the document cut so that it fits."""
        head = [bpe.CLS_ID, *self.queries[query], bpe.SEP_ID]
        return [*head, *self.documents[document][: self.lengths.pair - len(head) - 1], bpe.SEP_ID]


def _types(pair: list[int]) -> np.ndarray:
    tokens = np.array(pair)
    middle = pair.index(bpe.SEP_ID)
    second = np.arange(len(pair)) > middle
    both = np.where(second, np.isin(tokens, tokens[1:middle]), np.isin(tokens, tokens[middle + 1 : -1]))
    return np.where(np.isin(tokens, (bpe.CLS_ID, bpe.SEP_ID)), 0, 1 + 2 * second + both)


def _encode(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> list[list[int]]:
    return [encoding.ids[:length] for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
