"""The layout of BEIR (Thakur et al. 2021), in which MS MARCO, TREC DL, NQ, SciDocs, FiQA and others are published.

    corpus.jsonl      {"_id": "d1", "title": "...", "text": "..."} a line
    queries.jsonl     {"_id": "q1", "text": "..."} a line
    qrels/test.tsv    query-id <tab> corpus-id <tab> score, with that head; train.tsv and dev.tsv where there are

Lines may end as on Windows. An id may stand twice if it says the same; judgements of documents that are not in the
corpus are kept, with a warning.
"""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train.data import DataError, share
from train.data.retrieval import Collection

logger = logging.getLogger(__name__)

_HELD_OUT = 0.1  # of the training queries, for validation where there is no dev.tsv
_WHERE = "BEIR's data sets are linked at github.com/beir-cellar/beir; unzip one there"


def read(
    folder: str | os.PathLike, train_folder: str | os.PathLike | None = None, seed: int = 0
) -> dict[str, Collection]:
    """The splits `train`, `val` and `test` of the data set in `folder`.

    Test is `qrels/test.tsv`, validation `dev.tsv`, or else a tenth of the training queries by a hash of their ids.

    Args:
      folder: of the data set.
      train_folder: another one to take training and validation from, for data sets that have only a test split.
      seed: of the hash.

    Raises:
      DataError: a file that is missing or malformed, named with its line and what to do.
    """
    folder = Path(folder).expanduser()
    other = folder if not train_folder else Path(train_folder).expanduser()
    if not (other / "qrels" / "train.tsv").is_file():
        raise DataError(
            f"{other} has no qrels/train.tsv to train on; give a folder that has, as task.train_dir ({_WHERE})"
        )
    documents = _documents(folder)
    train_documents = documents if other == folder else _documents(other)
    train = _judged(other, "train", train_documents)
    if (other / "qrels" / "dev.tsv").is_file():
        val = _judged(other, "dev", train_documents)
    else:
        held_out = sorted(train.queries, key=lambda query: share(query, seed))
        number = max(1, round(_HELD_OUT * len(held_out)))
        if number == len(held_out):
            raise DataError(f"{other / 'qrels' / 'train.tsv'} judges one query, too few to train and validate on")
        train, val = train.only(held_out[number:]), train.only(held_out[:number])
    return {"train": train, "val": val, "test": _judged(folder, "test", documents)}


def _documents(folder: Path) -> dict[str, str]:
    documents: dict[str, str] = {}
    for line, record in _records(folder / "corpus.jsonl"):
        title, text = record.get("title") or "", record.get("text") or ""
        _add(documents, str(record["_id"]), f"{title}\n{text}".strip(), line)
    return documents


def _judged(folder: Path, split: str, documents: Mapping[str, str]) -> Collection:
    path = folder / "qrels" / f"{split}.tsv"
    relevance = _relevance(path)
    queries: dict[str, str] = {}
    for line, record in _records(folder / "queries.jsonl"):
        if str(record["_id"]) in relevance:
            _add(queries, str(record["_id"]), str(record.get("text") or ""), line)
    if unknown := [query for query in relevance if query not in queries]:
        raise DataError(
            f"{path}: query {unknown[0]} and {len(unknown) - 1} more are not in {folder}/queries.jsonl"
        )
    missing = {document for grades in relevance.values() for document in grades} - documents.keys()
    if missing:
        logger.warning(
            "%s judges %d documents that are not in the corpus, such as %s", path, len(missing), min(missing)
        )
    relevant = {query: text for query, text in queries.items() if max(relevance[query].values()) > 0}
    if not relevant:
        raise DataError(f"{path} judges no document as relevant")
    return Collection(documents, relevant, relevance)


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and content of every line of a JSONL file."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{where} is not JSON, as if cut off; download the file again") from error
                if not isinstance(record, dict) or "_id" not in record:
                    raise DataError(f"{where} has no `_id`")
                yield where, record
    except FileNotFoundError as error:
        raise DataError(f"no {path}; {_WHERE}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8; download the file again") from error


def _relevance(path: Path) -> dict[str, dict[str, int]]:
    relevance: dict[str, dict[str, int]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
                if not row or (number == 1 and row[0] == "query-id"):
                    continue
                try:
                    query, document, grade = row
                    relevance.setdefault(query, {})[document] = int(grade)
                except ValueError as error:
                    raise DataError(
                        f"{path}, line {number}: expected query-id, corpus-id and an integer score between tabs,"
                        f" got {row}; download the file again"
                    ) from error
    except FileNotFoundError as error:
        raise DataError(f"no {path}; {_WHERE}") from error
    return relevance


def _add(texts: dict[str, str], name: str, text: str, where: str) -> None:
    if texts.setdefault(name, text) != text:
        raise DataError(f"{where}: the id {name} is there before, with another text")
