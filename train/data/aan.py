"""Pairs of documents: does one cite the other (ACL Anthology Network), or are two news articles of one topic?

Documents are bytes, as in `train.data.text`. A data set of pairs holds the two documents of pair `i` as its
sequences `2 i` and `2 i + 1`, each with the label of the pair; `batches.PairedSequences` makes batches of it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from train.data import SPLITS, DataError, SequenceDataset, realdata, split_of, warn_left_out
from train.data.text import encode

NUM_CLASSES = 2

_FILES = {"train": "train", "val": "eval", "test": "test"}
_FIRST_BYTES = 10_000  # of a text, before it is cut to the model's length: as published
_LABELS = {b"0.0": 0, b"1.0": 1, b"0": 0, b"1": 1}


def read(directory: str | os.PathLike, max_length: int) -> dict[str, SequenceDataset]:
    """Reads the published `new_aan_pairs.{train,eval,test}.tsv` from `directory` or its folder `tsv_data`.

    A line is a label, two ids and two texts, between tabs, without quoting and without a header. Pairs of which a
    text is empty are left out.

    Raises:
      DataError: a missing folder or file, a malformed line (by its number), a last line without an end, no pairs.
    """
    root = Path(directory).expanduser()
    if (root / "tsv_data").is_dir():
        root = root / "tsv_data"
    return {split: _read_file(root / f"new_aan_pairs.{name}.tsv", max_length) for split, name in _FILES.items()}


def _read_file(path: Path, max_length: int) -> SequenceDataset:
    documents, labels, num_empty = [], [], 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                fields = line.rstrip(b"\r\n").split(b"\t")
                if len(fields) != 5 or fields[0] not in _LABELS:
                    raise DataError(
                        f"{path}:{number}: expected label 0.0 or 1.0, two ids and two texts between tabs, got"
                        f" {len(fields)} fields and {fields[0][:20]!r}; is the file cut off?"
                    )
                if not line.endswith(b"\n"):  # five fields may be there all the same, the last one shortened
                    raise DataError(
                        f"{path}:{number}: the last line has no end: the file is cut off; if it is complete, add a"
                        " line break"
                    )
                if not (fields[3].strip() and fields[4].strip()):
                    num_empty += 1
                    continue
                documents += [encode(text[:_FIRST_BYTES], max_length) for text in fields[3:]]
                labels += [_LABELS[fields[0]]] * 2
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}; download lra_release.gz of Long Range Arena, unpack"
            " it, and give the folder of new_aan_pairs.train.tsv as task.source"
        ) from error
    warn_left_out(path, num_empty, "pairs with an empty text")
    if not labels:
        raise DataError(f"{path} holds no pairs")
    return SequenceDataset.pack(documents, labels)


def news(sizes: dict[str, int], max_length: int, seed: int = 0) -> dict[str, SequenceDataset]:
    """Pairs of news articles of `realdata`, of one topic (class 1) or of two (class 0), as many of each.

    Articles are split before they are paired, so that no split has an article of another one.

    Args:
      sizes: pairs of each split.
      max_length: bytes of an article.
      seed: equal seeds give equal pairs.

    Raises:
      DataError: the package is not installed.
    """
    articles: dict[str, list[realdata.Article]] = {split: [] for split in SPLITS}
    for article in realdata.distinct_articles():
        articles[split_of(article.name)].append(article)
    return {
        split: _paired(articles[split], sizes[split], max_length, np.random.PCG64((seed, number)))
        for number, split in enumerate(SPLITS)
    }


def _paired(
    articles: list[realdata.Article], number: int, max_length: int, bits: np.random.BitGenerator
) -> SequenceDataset:
    texts = [encode(article.text, max_length) for article in articles]
    topics = np.array([realdata.TOPICS.index(article.topic) for article in articles])
    documents, labels = [], []
    for pair in range(number):
        first, second = (int(raw) for raw in bits.random_raw(2))
        first %= len(articles)
        same = topics == topics[first]
        same[first] = False  # no article is paired with itself
        label = pair % 2
        others = np.flatnonzero(same if label else topics != topics[first])
        documents += [texts[first], texts[others[second % len(others)]]]
        labels += [label] * 2
    return SequenceDataset.pack(documents, labels)
