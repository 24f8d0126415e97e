"""Batches of token sequences, grouped by length and padded to a few fixed lengths, and batches of video clips.

Training and evaluation get batches of one form, so that one compiled function serves all batches of a length:

    tokens        (B, L) int32   0 where padded
    mask          (B, L) bool    True = a real token (never derived from the token ids)
    label         (B,)   int32
    example_mask  (B,)   bool    True = a real example; a dummy has no real token and label 0

or, of clips:

    frames        (B, T, H, W, 3) uint8
    masks         (B, T, H, W)    uint8   only where the clips have them
    example_mask  (B,)            bool    True = a real example; a dummy is zero

The real examples of a batch come before its dummies. Which examples make up a batch of training is a function of
`(seed, step)` alone. The state of an iterator is therefore one number, and a resumed run sees exactly the batches
that the interrupted one would have seen.

Evaluation takes the examples in a fixed order, whatever the batch size: bucket by bucket, the shortest first, and
within a bucket, as clips altogether, in the order of the data set. So what is computed for each example with a
true `example_mask`, batch after batch, lines up between any two models.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import NotRequired, Protocol, TypedDict

import grain
import numpy as np

from train.data import Clips


class Sequences(Protocol):
    """A data set of token sequences, such as `train.data.SequenceDataset`."""

    @property
    def lengths(self) -> np.ndarray:
        """`(N,)` tokens of each sequence."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        """`{"tokens": (length,), "label": ()}`, both of integers."""
        ...


class Batch(TypedDict):
    """`B` examples padded to `L` tokens; see the module's docstring."""

    tokens: np.ndarray
    mask: np.ndarray
    label: np.ndarray
    example_mask: np.ndarray


class ClipBatch(TypedDict):
    """`B` clips; see the module's docstring."""

    frames: np.ndarray
    masks: NotRequired[np.ndarray]
    example_mask: np.ndarray


def num_batches(num_examples: int, batch_size: int) -> int:
    """Batches that hold `num_examples` once: the steps of an epoch."""
    return -(-num_examples // batch_size)


def train_iterator(
    dataset: Sequences,
    *,
    batch_size: int,
    buckets: Sequence[int],
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Endless batches; every `num_batches(len(dataset), batch_size)` of them hold every example exactly once.

    Each epoch has its own shuffle: of the examples, which meet others of their own length bucket, and then of
    the batches. `get_state()` gives the position, ready for JSON, and `set_state()` goes there.

    Args:
      dataset: the examples.
      batch_size: examples of the batch over all processes.
      buckets: the lengths `L` to pad to; a batch gets the smallest that holds its longest sequence.
      seed: non-negative seed of the shuffles.
      process_index: which of `process_count` equal parts of each batch (by rows) this process gets.
      process_count: number of processes that share a batch.

    Raises:
      ValueError: no examples, a sequence longer than the longest bucket, a batch that processes cannot share,
        a negative seed.
    """
    plan = _Plan(_PaddedSequences(dataset, buckets), batch_size, seed, process_index, process_count)
    return iter(_read(plan, num_steps=sys.maxsize))


def eval_batches(
    dataset: Sequences,
    *,
    batch_size: int,
    buckets: Sequence[int],
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset[Batch]:
    """`num_batches(len(dataset), batch_size)` batches that hold every example exactly once, short ones first.

    Every pass over the result gives the same batches; the module's docstring tells the order of the examples.
    Arguments and errors as in `train_iterator`.
    """
    plan = _Plan(_PaddedSequences(dataset, buckets), batch_size, None, process_index, process_count)
    return _read(plan, num_steps=plan.num_batches)


def clip_train_iterator(
    clips: Clips, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator[ClipBatch]:
    """Endless batches of clips; epochs, position, arguments and errors as in `train_iterator`, without buckets."""
    return iter(_read(_Plan(_Stacked(clips), batch_size, seed, process_index, process_count), sys.maxsize))


def clip_eval_batches(
    clips: Clips, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> grain.IterDataset[ClipBatch]:
    """`num_batches(len(clips), batch_size)` batches that hold every clip exactly once, in order.

    Every pass over the result gives the same batches. Arguments and errors as in `clip_train_iterator`.
    """
    plan = _Plan(_Stacked(clips), batch_size, None, process_index, process_count)
    return _read(plan, num_steps=plan.num_batches)


def plan_iterator[T](examples: Examples[T], *, batch_size: int, seed: int) -> grain.DatasetIterator[T]:
    """Endless batches of any examples that know how to become one; epochs and position as in `train_iterator`."""
    return iter(_read(_Plan(examples, batch_size, seed, 0, 1), sys.maxsize))


def plan_batches[T](examples: Examples[T], *, batch_size: int) -> grain.IterDataset[T]:
    """Batches that hold every example exactly once, in order."""
    plan = _Plan(examples, batch_size, None, 0, 1)
    return _read(plan, num_steps=plan.num_batches)


def _read[T](plan: _Plan[T], num_steps: int) -> grain.IterDataset[T]:
    # One thread assembles the next batches while the current one trains.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return grain.MapDataset.range(num_steps).map(plan.batch).to_iter_dataset(options)


class Examples[T](Protocol):
    """What a plan asks of examples.

    Attributes:
      groups: `(N,)` integers; examples of a group share batches, and lower groups come first in evaluation.
    """

    groups: np.ndarray

    def collate(self, examples: np.ndarray, batch: np.ndarray, num_rows: int, step: int) -> T:
        """`num_rows` rows, first `examples` (indices), then dummies, of a `batch` that other processes share.

        `step` is that of the batch, for what is drawn anew every time.
        """
        ...


class _PaddedSequences:
    """Sequences, grouped by the bucket that they are padded to."""

    def __init__(self, dataset: Sequences, buckets: Sequence[int]):
        longest = dataset.lengths.max(initial=0)
        if not len(buckets) or longest > max(buckets):
            raise ValueError(f"buckets must reach the longest sequence, of {longest} tokens, got {tuple(buckets)}")
        self.dataset = dataset
        self.buckets = np.unique(buckets)
        self.groups = np.searchsorted(self.buckets, dataset.lengths)

    def collate(self, examples: np.ndarray, batch: np.ndarray, num_rows: int, step: int) -> Batch:
        # Of the whole batch, so that every process pads to the same length.
        length = self.buckets[self.groups[batch].max()]
        tokens = np.zeros((num_rows, length), np.int32)
        mask = np.zeros((num_rows, length), bool)
        label = np.zeros(num_rows, np.int32)
        for row, example in enumerate(examples.tolist()):
            record = self.dataset[example]
            size = len(record["tokens"])
            tokens[row, :size] = record["tokens"]
            mask[row, :size] = True
            label[row] = record["label"]
        return Batch(tokens=tokens, mask=mask, label=label, example_mask=np.arange(num_rows) < len(examples))


class PairedSequences:
    """Pairs of sequences, `2 i` and `2 i + 1` of a data set that labels both alike, by the bucket of the longer.

    A batch is that of sequences, with `(B, 2, L)` tokens and mask.
    """

    def __init__(self, dataset: Sequences, buckets: Sequence[int]):
        self.sequences = _PaddedSequences(dataset, buckets)
        self.groups = self.sequences.groups.reshape(-1, 2).max(axis=1)

    def collate(self, examples: np.ndarray, batch: np.ndarray, num_rows: int, step: int) -> Batch:
        both, all_of_both = (np.stack([2 * pairs, 2 * pairs + 1], axis=1).ravel() for pairs in (examples, batch))
        made = self.sequences.collate(both, all_of_both, 2 * num_rows, step)
        tokens, mask = (array.reshape(num_rows, 2, -1) for array in (made["tokens"], made["mask"]))
        return Batch(tokens=tokens, mask=mask, label=made["label"][::2], example_mask=made["example_mask"][::2])


class _Stacked:
    """Clips, all of one group."""

    def __init__(self, clips: Clips):
        self.clips = clips
        self.groups = np.zeros(len(clips), np.int64)

    def collate(self, examples: np.ndarray, batch: np.ndarray, num_rows: int, step: int) -> ClipBatch:
        def rows(array: np.ndarray) -> np.ndarray:
            stacked = np.zeros((num_rows, *array.shape[1:]), array.dtype)
            stacked[: len(examples)] = array[examples]
            return stacked

        example_mask = np.arange(num_rows) < len(examples)
        if self.clips.masks is None:
            return ClipBatch(frames=rows(self.clips.frames), example_mask=example_mask)
        return ClipBatch(frames=rows(self.clips.frames), masks=rows(self.clips.masks), example_mask=example_mask)


class _Plan[T]:
    """Which examples make up the batch of each step, and the batch itself; `seed=None` does not shuffle."""

    def __init__(
        self, examples: Examples[T], batch_size: int, seed: int | None, process_index: int, process_count: int
    ):
        if not len(examples.groups):
            raise ValueError("cannot make batches of a data set without examples")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index must be in [0, {process_count}), got {process_index}")
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(
                f"batch_size must be a positive multiple of process_count {process_count}, got {batch_size}"
            )
        if seed is not None and seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.examples = examples
        self.num_batches = num_batches(len(examples.groups), batch_size)
        self.seed = seed
        self.num_rows = batch_size // process_count
        self.first_row = process_index * self.num_rows
        # Two: the thread that reads ahead enters the next epoch first.
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        """The example indices of each batch of one epoch."""
        groups = self.examples.groups
        order, turn = np.arange(len(groups)), np.arange(self.num_batches)
        if self.seed is not None:
            # Sorted raw words: what `Generator.shuffle` makes of a seed may change with NumPy's version.
            bits = np.random.PCG64((self.seed, epoch))
            order, turn = (np.argsort(bits.random_raw(len(items)), kind="stable") for items in (order, turn))
        order = order[np.argsort(groups[order], kind="stable")]
        # Equal shares instead of one small remainder, whose gradient would weigh as much as a full batch's.
        batches = np.array_split(order, self.num_batches)
        return [batches[i] for i in turn]

    def batch(self, step: int) -> T:
        """The rows of this process in the batch of `step`, counted from 0 over all epochs."""
        epoch, index = divmod(step, self.num_batches)
        chosen = self.epoch(epoch)[index]
        own = chosen[self.first_row : self.first_row + self.num_rows]
        return self.examples.collate(own, chosen, self.num_rows, step)
