"""Texts as bytes, with a class each: news by topic, or film reviews by sentiment.

LRA's tokens (its ByteTextEncoder): the id of a byte is its value + 1, 0 is padding, and a text is cut off at the
right. There is no token for the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from train.data import SPLITS, DataError, SequenceDataset, prepared, realdata, split_of, warn_left_out

VOCAB_SIZE = 257
SENTIMENTS = ("neg", "pos")
_HELD_OUT = 0.1  # of the training reviews, for validation; LRA validates on the test set

_DOWNLOAD = (
    "download aclImdb_v1.tar.gz of the Large Movie Review Dataset (Maas et al. 2011), unpack it, and give the"
    " folder aclImdb as task.source"
)


def encode(text: bytes, max_length: int) -> np.ndarray:
    """`(length,)` uint16 ids of at most `max_length` first bytes."""
    return np.frombuffer(text[:max_length], np.uint8).astype(np.uint16) + 1


def news(max_length: int) -> dict[str, SequenceDataset]:
    """The news articles of `realdata` by topic, split by article, 80/10/10; a text begins with its title.

    Raises:
      DataError: the package is not installed.
    """
    return _datasets(
        (
            (split_of(article.name), article.text, realdata.TOPICS.index(article.topic))
            for article in realdata.distinct_articles()
        ),
        max_length,
    )


def acl_imdb(folder: str | os.PathLike, max_length: int) -> dict[str, SequenceDataset]:
    """Film reviews from the folder `aclImdb`: `{train,test}/{neg,pos}/*.txt`, class 1 = positive.

    As tensorflow-datasets does, without the white space around a review. A tenth of the training reviews, by a
    hash of their text, is for validation: the same ones as `tfds_imdb` has.

    Raises:
      DataError: a folder is missing or holds no texts.
    """
    root = Path(folder).expanduser()

    def texts() -> Iterable[tuple[str, bytes, int]]:
        for part in ("train", "test"):
            for label, sentiment in enumerate(SENTIMENTS):
                files = sorted((root / part / sentiment).glob("*.txt"))
                if not files:
                    raise DataError(f"no texts {root / part / sentiment}/*.txt; {_DOWNLOAD}")
                for file in files:
                    yield part, file.read_bytes(), label

    return _reviews(texts(), max_length)


def tfds_imdb(max_length: int) -> dict[str, SequenceDataset]:
    """Film reviews that tensorflow-datasets has prepared as `imdb_reviews` (array_record); needs no TensorFlow.

    Raises:
      DataError: they are not prepared on this machine; nothing is downloaded.
    """
    parts = prepared.records("imdb_reviews", _DOWNLOAD)

    def texts() -> Iterable[tuple[str, bytes, int]]:
        for part, records in parts.items():
            for record in records:
                text = record["text"]  # its own mock yields strings
                yield part, text if isinstance(text, bytes) else text.encode(), int(record["label"])

    return _reviews(texts(), max_length)


def _reviews(texts: Iterable[tuple[str, bytes, int]], max_length: int) -> dict[str, SequenceDataset]:
    """Of the part `train` or `test`, the text and the class of each."""

    def stripped() -> Iterable[tuple[str, bytes, int]]:
        for part, text, label in texts:
            text = text.strip()
            name = text.decode("latin-1")  # a name of any bytes
            yield part if part == "test" else split_of(name, _HELD_OUT, 0), text, label

    return _datasets(stripped(), max_length)


def _datasets(texts: Iterable[tuple[str, bytes, int]], max_length: int) -> dict[str, SequenceDataset]:
    found: dict[str, list[tuple[np.ndarray, int]]] = {split: [] for split in SPLITS}
    num_empty = 0
    for split, text, label in texts:
        num_empty += not text
        if text:
            found[split].append((encode(text, max_length), label))
    warn_left_out("texts", num_empty, "without a character")
    for split, examples in found.items():
        if not examples:
            raise DataError(f"the split {split} has no texts")
    return {split: SequenceDataset.pack(*map(list, zip(*examples))) for split, examples in found.items()}
