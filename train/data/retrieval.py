"""Retrieval: queries, documents, and which answers which; a first stage by BM25 that a reranker reorders.

Ids are strings, whatever they look like. Relevance is graded: a document that is not judged counts 0, and a query
takes part in training and evaluation if it has a document of grade 1 or more.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from train.data import DataError, cache

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Collection:
    """A corpus and its judged queries.

    Attributes:
      documents: text of each document by its id, title first.
      queries: text of each judged query by its id.
      relevance: grade by query id and document id; those of 0 and less may be left out. A judged document need
        not be among `documents`: it then cannot be found, but counts in the ideal ranking.

    Raises:
      DataError: no documents, or no query with a relevant document.
    """

    documents: Mapping[str, str]
    queries: Mapping[str, str]
    relevance: Mapping[str, Mapping[str, int]]

    def __post_init__(self):
        if not self.documents:
            raise DataError("a collection needs documents")
        if not self.queries:
            raise DataError("a collection needs a query with a relevant document")
        for query in self.queries:
            if max(self.relevance.get(query, {}).values(), default=0) < 1:
                raise DataError(f"query {query} has no relevant document")

    def only(self, queries: Iterable[str]) -> Collection:
        """The same documents with some of the queries."""
        return replace(self, queries={query: self.queries[query] for query in queries})


class FirstStage(NamedTuple):
    """What BM25 finds for each of `Q` queries, in the order of `Collection.queries`.

    Attributes:
      documents: `(Q, K)` int32 places in `Collection.documents`, best first; -1 where fewer are found.
      scores: `(Q, K)` float32; 0 where there is no document.
    """

    documents: np.ndarray
    scores: np.ndarray


def bm25(collection: Collection, k: int, cache_dir: str | os.PathLike | None = None) -> FirstStage:
    """The best `k` documents of each query by BM25 (k1 = 0.9, b = 0.4, as Anserini's), computed once and cached.

    Documents without a word of the query are not found. Equal scores are ordered as trec_eval does: by document
    id, descending.
    """
    digest = hashlib.sha256(str(k).encode())
    for part in (collection.documents, collection.queries):
        for name, text in part.items():
            digest.update(f"\0{len(name)} {name}{text}".encode())

    def make(path: Path) -> dict[str, np.ndarray]:
        count = f"{len(collection.queries):,} queries and {len(collection.documents):,} documents"
        logger.info("BM25 of %s, once, into %s", count, path)
        return _search(collection, k)._asdict()

    return FirstStage(**cache.load(f"bm25-v1-{digest.hexdigest()[:16]}.npz", make, cache_dir))


def _search(collection: Collection, k: int) -> FirstStage:
    import bm25s  # takes seconds

    logging.getLogger("bm25s").setLevel(logging.WARNING)

    tokenize: dict[str, Any] = {"stopwords": "en", "show_progress": False}
    # Later ids first, so that a stable sort by score leaves ties as trec_eval has them.
    order = sorted(range(len(collection.documents)), key=list(collection.documents).__getitem__, reverse=True)
    texts = list(collection.documents.values())
    index = bm25s.BM25(k1=0.9, b=0.4)
    index.index(bm25s.tokenize([texts[i] for i in order], **tokenize), show_progress=False)
    place = np.array(order, np.int32)
    documents = np.full((len(collection.queries), k), -1, np.int32)
    scores = np.zeros((len(collection.queries), k), np.float32)
    words = cast(
        "list[list[str]]", bm25s.tokenize(list(collection.queries.values()), return_ids=False, **tokenize)
    )
    for row, query in enumerate(words):
        found = index.get_scores(query) if query else np.zeros(len(order), np.float32)
        best = np.argsort(-found, kind="stable")[:k]
        best = best[found[best] > 0]
        documents[row, : len(best)], scores[row, : len(best)] = place[best], found[best]
    return FirstStage(documents, scores)
