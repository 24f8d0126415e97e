"""Data sets as NumPy arrays, and the batches that feed them to a model."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

SPLITS = ("train", "val", "test")

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """Data that is missing or malformed; the message says in one line what and where."""


def share(name: str, seed: int = 0) -> float:
    """A number in [0, 1) for a name, uniform over names: splits that do not move when others are added."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:6]) / 2**48


def split_of(name: str, val: float = 0.1, test: float = 0.1) -> str:
    """The split of a name, by its `share`: `val` and `test` are what each of these gets, on average."""
    place, train = share(name), 1 - val - test
    return "train" if place < train else "val" if place < train + val else "test"


def warn_left_out(where: object, number: int, what: str) -> None:
    """Says how many examples a reader has left out, if any."""
    if number:
        logger.warning("%s: left out %d %s", where, number, what)


@dataclass(frozen=True, eq=False)
class SequenceDataset:
    """Labelled token sequences of varying length, packed end to end.

    Attributes:
      tokens: `(total,)` unsigned token ids of all `N` sequences.
      offsets: `(N + 1,)` int64; sequence `i` is `tokens[offsets[i]:offsets[i + 1]]`.
      labels: `(N,)` int32 classes.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray

    @classmethod
    def from_bytes(cls, sequences: Iterable[bytes], labels: Sequence[int]) -> SequenceDataset:
        """Packs sequences of one-byte token ids."""
        return cls.pack([np.frombuffer(sequence, np.uint8) for sequence in sequences], labels)

    @classmethod
    def pack(cls, sequences: Sequence[np.ndarray], labels: Sequence[int]) -> SequenceDataset:
        """Packs sequences of unsigned ids, each `(length,)`."""
        if len(sequences) != len(labels):
            raise ValueError(f"got {len(sequences)} sequences but {len(labels)} labels")
        offsets = np.zeros(len(sequences) + 1, np.int64)
        np.cumsum([len(s) for s in sequences], out=offsets[1:])
        tokens = np.concatenate([np.zeros(0, np.uint8), *sequences])
        return cls(tokens, offsets, np.asarray(labels, np.int32))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The record `{"tokens": (length,), "label": ()}`."""
        start, stop = self.offsets[index], self.offsets[index + 1]
        return {"tokens": self.tokens[start:stop], "label": self.labels[index]}

    @property
    def lengths(self) -> np.ndarray:
        """`(N,)` number of tokens of each sequence."""
        return np.diff(self.offsets)

    def slice(self, start: int, stop: int) -> SequenceDataset:
        """Examples `start` up to, not including, `stop`, without copying tokens."""
        return SequenceDataset(self.tokens, self.offsets[start : stop + 1], self.labels[start:stop])


@dataclass(frozen=True, eq=False)
class Clips:
    """`N` clips of video of one size.

    Attributes:
      frames: `(N, T, H, W, 3)` uint8, sRGB.
      masks: `(N, T, H, W)` uint8, the object seen at each pixel (0 = the background), or None where unknown.
      videos: `N` names, the source video of each clip.

    Raises:
      ValueError: arrays of other shapes or types, or names of another number.
    """

    frames: np.ndarray
    masks: np.ndarray | None
    videos: tuple[str, ...]

    def __post_init__(self):
        for name, array, ndim in (("frames", self.frames, 5), ("masks", self.masks, 4)):
            if array is not None and (array.ndim != ndim or array.dtype != np.uint8):
                raise ValueError(f"Clips: {name} must have {ndim} axes of uint8, got {array.dtype}{array.shape}")
        if self.frames.shape[-1] != 3:
            raise ValueError(f"Clips: frames must be (N, T, H, W, 3), got {self.frames.shape}")
        if self.masks is not None and self.masks.shape != self.frames.shape[:-1]:
            raise ValueError(f"Clips: masks {self.masks.shape} do not fit frames {self.frames.shape}")
        if len(self.videos) != len(self.frames):
            raise ValueError(f"Clips: {len(self.frames)} clips but {len(self.videos)} names of videos")

    def __len__(self) -> int:
        return len(self.frames)

    def slice(self, start: int, stop: int) -> Clips:
        """Clips `start` up to, not including, `stop`, without copying frames."""
        masks = None if self.masks is None else self.masks[start:stop]
        return Clips(self.frames[start:stop], masks, self.videos[start:stop])
