"""ListOps of Long Range Arena: the benchmark's generator, its vocabulary, and the reader of its files.

An expression is a digit or an operator over two to ten expressions, such as `[MAX 2 [MIN 4 7 ] 0 ]`; its
value, a digit, is the label (Nangia and Bowman 2018). Grammar and lengths are those of the benchmark's own
generator (Tay et al. 2021), whose unseeded draws nobody can repeat: the data are equal in distribution.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from train.data import SPLITS, DataError, SequenceDataset, cache

logger = logging.getLogger(__name__)

# The order is part of the data. LRA took it from a Python set: its ids changed from process to process.
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
CLOSE = "X"  # LRA's name for "]" once its tokeniser has removed the brackets
VOCABULARY = (*OPERATORS, CLOSE, *"0123456789")
PAD_ID = 0  # the id of a word is its place in VOCABULARY, counted from 1
OOV_ID = len(VOCABULARY) + 1
VOCAB_SIZE = OOV_ID + 1
NUM_CLASSES = 10

_ID = {word: index for index, word in enumerate(VOCABULARY, start=1)}
_OPERATOR_ID, _DIGIT_ID = _ID[OPERATORS[0]], _ID["0"]  # the first of each kind; the others follow

_VERSION = 1  # in the cache's file name: raise it with any change of what a seed generates
_TREES_PER_BATCH = 8192  # part of what a seed generates; the arrays of a level stay in the processor's cache
_MAX_STALLED_BATCHES = 64


@dataclass(frozen=True)
class ListOps:
    """What determines a generated data set; the defaults are the published benchmark.

    Attributes:
      num_train, num_val, num_test: examples of each split.
      min_length, max_length: exclusive bounds on an expression's tokens (parentheses not counted).
      max_depth: depth at which every node is a digit; the root has depth 1.
      max_args: most arguments of an operator; the number is uniform from 2.
      operator_p: chance that a node above `max_depth` is an operator (LRA calls it `VALUE_P`).
      seed: non-negative; equal specifications give equal bytes on every machine.
    """

    num_train: int = 96_000
    num_val: int = 2_000
    num_test: int = 2_000
    min_length: int = 500
    max_length: int = 2_000
    max_depth: int = 10
    max_args: int = 10
    operator_p: float = 0.25
    seed: int = 0

    def __post_init__(self):
        least = dict(num_train=1, num_val=0, num_test=0, min_length=0, max_depth=1, max_args=2, seed=0)
        least |= dict(max_length=self.min_length + 2, operator_p=0)
        most = dict(max_args=255, operator_p=1)
        for name, low in least.items():
            value, high = getattr(self, name), most.get(name, math.inf)
            if not low <= value <= high:
                raise ValueError(f"ListOps: {name} must be between {low} and {high}, got {value}")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Examples of the splits, in the order of `SPLITS`."""
        return self.num_train, self.num_val, self.num_test

    @property
    def cache_name(self) -> str:
        """File name that spells out everything the data depends on."""
        return (
            f"listops-v{_VERSION}-{'-'.join(map(str, self.sizes))}-length{self.min_length}-{self.max_length}"
            f"-depth{self.max_depth}-args{self.max_args}-p{self.operator_p}-seed{self.seed}.npz"
        )


def load(spec: ListOps, cache_dir: str | os.PathLike | None = None) -> dict[str, SequenceDataset]:
    """The splits `train`, `val`, `test` of `spec`: read from the cache, or generated once and stored there.

    Args:
      spec: the data set.
      cache_dir: folder of the cache; by default `$ATTN_JAX_CACHE` or `~/.cache/attn_jax`.

    Raises:
      DataError: the folder cannot be written.
    """

    def make(path: Path) -> dict[str, np.ndarray]:
        logger.info("generating %d ListOps examples, once, into %s", sum(spec.sizes), path)
        data = _generate(spec)
        return {"tokens": data.tokens, "offsets": data.offsets, "labels": data.labels}

    arrays = cache.load(spec.cache_name, make, cache_dir)
    return _split(SequenceDataset(**arrays), spec)


def generate(spec: ListOps) -> dict[str, SequenceDataset]:
    """The splits `train`, `val`, `test` of `spec`, generated in memory; no expression occurs twice.

    Raises:
      ValueError: the grammar has too few distinct expressions within the length bounds.
    """
    return _split(_generate(spec), spec)


def sample_batch(spec: ListOps, bits: np.random.BitGenerator, num_trees: int) -> SequenceDataset:
    """Draws `num_trees` random trees and returns those with `min_length < length < max_length`."""
    arities, lengths = _draw_shapes(spec, bits, num_trees)
    return _fill(bits, arities, lengths)


def read_tsv(directory: str | os.PathLike, *, max_length: int = 2_000) -> dict[str, SequenceDataset]:
    """Reads the published `basic_{train,val,test}.tsv` from `directory` or its folder `listops-1000`.

    Tokens as in LRA: parentheses are deleted, `]` becomes `X`, words are split at white space, unknown words
    become `OOV_ID`, and sequences are cut after `max_length` tokens.

    Raises:
      DataError: a missing folder or file, a wrong header, a malformed line (by its number), no examples.
    """
    folder = Path(directory).expanduser()
    if (folder / "listops-1000").is_dir():
        folder = folder / "listops-1000"
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; it should hold basic_train.tsv, basic_val.tsv, basic_test.tsv")
    return {split: _read_split(folder / f"basic_{split}.tsv", max_length) for split in SPLITS}


def write_tsv(directory: str | os.PathLike, splits: dict[str, SequenceDataset]) -> None:
    """Writes `splits` as `basic_{split}.tsv` in the published format, which LRA's own code reads."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    for split, data in splits.items():
        with cache.atomic_write(folder / f"basic_{split}.tsv") as file:
            file.write(b"Source\tTarget\r\n")
            for i in range(len(data)):
                file.write(f"{to_text(data[i]['tokens'])}\t{data.labels[i]}\r\n".encode())


def to_text(tokens: np.ndarray) -> str:
    """The published text of one expression: a left-nested binary tree, `( ( ( [MAX 2 ) 0 ) ] )`."""
    open_lists: list[str] = []
    for token in tokens.tolist():
        item = VOCABULARY[token - 1]
        if item in OPERATORS:
            open_lists.append(item)
            continue
        if item == CLOSE:
            item = f"( {open_lists.pop()} ] )"
        if not open_lists:
            return item
        open_lists[-1] = f"( {open_lists[-1]} {item} )"
    raise ValueError(f"ListOps: unbalanced expression of {len(tokens)} tokens")


def majority_accuracy(train_labels: np.ndarray, test_labels: np.ndarray) -> float:
    """Accuracy of always predicting the most frequent training label."""
    return float(np.mean(test_labels == np.bincount(train_labels).argmax()))


def root_operator_accuracy(train: SequenceDataset, test: SequenceDataset) -> float:
    """Accuracy of predicting the most frequent training label of the sequence's first token.

    This uses no more than the outermost operator: a model at this level has learnt nothing about nesting.
    """
    counts = np.zeros((VOCAB_SIZE, NUM_CLASSES), int)
    np.add.at(counts, (train.tokens[train.offsets[:-1]], train.labels), 1)
    unseen = ~counts.any(axis=1)
    counts[unseen] = counts.sum(axis=0)
    return float(np.mean(test.labels == counts.argmax(axis=1)[test.tokens[test.offsets[:-1]]]))


def _split(data: SequenceDataset, spec: ListOps) -> dict[str, SequenceDataset]:
    ends = np.cumsum(spec.sizes).tolist()
    return {name: data.slice(end - size, end) for name, size, end in zip(SPLITS, spec.sizes, ends, strict=True)}


# Generation. NumPy promises the raw stream of a bit generator across versions, but not what `Generator` makes
# of it, so the few draws needed are made here.


def _words(bits: np.random.BitGenerator, size: int) -> np.ndarray:
    """`(size,)` uniform 32-bit words, as uint64 so that they can be scaled."""
    raw = bits.random_raw((size + 1) // 2)
    return raw.astype("<u8", copy=False).view("<u4")[:size].astype(np.uint64)


def _integers(bits: np.random.BitGenerator, size: int, bound: int) -> np.ndarray:
    """`(size,)` integers below `bound`, uniform up to `bound / 2**32`."""
    return ((_words(bits, size) * np.uint64(bound)) >> np.uint64(32)).astype(np.uint8)


def _generate(spec: ListOps) -> SequenceDataset:
    bits = np.random.PCG64(spec.seed)
    total = sum(spec.sizes)
    label_of: dict[bytes, int] = {}  # a dictionary keeps the order and drops repeated expressions
    stalled = 0
    with tqdm(total=total, desc="ListOps", unit=" examples", disable=None) as progress:
        while len(label_of) < total:
            before = len(label_of)
            batch = sample_batch(spec, bits, _TREES_PER_BATCH)
            expressions = (batch[i]["tokens"].tobytes() for i in range(len(batch)))
            label_of.update(zip(expressions, batch.labels.tolist(), strict=True))
            progress.update(min(len(label_of), total) - before)
            stalled = stalled + 1 if len(label_of) == before else 0
            if stalled == _MAX_STALLED_BATCHES:
                raise ValueError(
                    f"ListOps: {stalled * _TREES_PER_BATCH:,} trees in a row gave no new expression with "
                    f"{spec.min_length} < length < {spec.max_length}; found {before:,} of {total:,}"
                )
    return SequenceDataset.from_bytes(list(label_of)[:total], list(label_of.values())[:total])


def _draw_shapes(
    spec: ListOps, bits: np.random.BitGenerator, num_trees: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Draws trees level by level, giving up each as soon as it is too long, and keeps those of right length.

    Returns the number of arguments of every node (0 for a digit), one array per level with siblings adjacent
    and trees in order, and the length of every tree.
    """
    threshold = round(spec.operator_p * 2**32)
    length = np.ones(num_trees, np.int64)  # so far: every node is a token, an operator's `]` one more
    tree = np.arange(num_trees)  # the tree of each node of the level
    levels = []
    for depth in range(1, spec.max_depth + 1):
        arity = np.zeros(tree.size, np.uint8)
        levels.append((tree, arity))
        if depth == spec.max_depth:
            break
        operators = np.flatnonzero(_words(bits, tree.size) < threshold)
        arity[operators] = args = 2 + _integers(bits, operators.size, spec.max_args - 1)
        length += np.bincount(tree[operators], weights=args + 1.0, minlength=num_trees).astype(np.int64)
        tree = np.repeat(tree[operators], args)
        tree = tree[length[tree] < spec.max_length]
    kept = (spec.min_length < length) & (length < spec.max_length)
    return [arity[kept[tree]] for tree, arity in levels], length[kept]


def _fill(bits: np.random.BitGenerator, arities: list[np.ndarray], lengths: np.ndarray) -> SequenceDataset:
    """Draws the operators and digits of trees of given shapes, evaluates them and lays out their tokens."""
    symbols, families = [], []
    for arity in arities:
        parents = np.flatnonzero(arity)
        args = arity[parents].astype(np.int64)
        families.append((parents, args, np.cumsum(args) - args))  # the last: first child, in the next level
        symbol = _DIGIT_ID + _integers(bits, arity.size, 10)
        symbol[parents] = _OPERATOR_ID + _integers(bits, parents.size, len(OPERATORS))
        symbols.append(symbol)

    sizes = []  # tokens of every node's expression, deepest level first, after a level of no nodes below it
    size, value = np.zeros(0, np.int64), np.zeros(0, np.uint8)
    for symbol, (parents, args, first) in zip(reversed(symbols), reversed(families), strict=True):
        sizes.append(size)
        value_of_parents = _evaluate(symbol[parents], value, first, args)
        size_of_parents = 2 + np.add.reduceat(size, first)
        size, value = np.ones(symbol.size, np.int64), symbol - np.uint8(_DIGIT_ID)
        size[parents], value[parents] = size_of_parents, value_of_parents

    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.full(offsets[-1], _ID[CLOSE], np.uint8)  # what no node overwrites is a closing bracket
    position = offsets[:-1]
    for symbol, (parents, args, first), child_size in zip(symbols, families, reversed(sizes), strict=True):
        tokens[position] = symbol
        before = np.cumsum(child_size) - child_size  # tokens of the nodes before each child in its level
        position = before + np.repeat(position[parents] + 1 - before[first], args)
    return SequenceDataset(tokens, offsets, value.astype(np.int32))


def _evaluate(operator: np.ndarray, digits: np.ndarray, first: np.ndarray, args: np.ndarray) -> np.ndarray:
    """Values of operators (ids) whose arguments are `digits[first : first + args]`, back to back."""
    value = np.minimum.reduceat(digits, first)
    value = np.where(operator == _ID["[MAX"], np.maximum.reduceat(digits, first), value)
    value = np.where(operator == _ID["[SM"], np.add.reduceat(digits, first) % 10, value)
    (median,) = np.nonzero(operator == _ID["[MED"])
    column = np.arange(args.max(initial=0))
    inside = column < args[median, None]
    ordered = np.where(inside, digits[np.where(inside, first[median, None] + column, 0)], 255)
    ordered.sort(axis=1)
    row = np.arange(median.size)
    lower, upper = ordered[row, (args[median] - 1) // 2], ordered[row, args[median] // 2]
    value[median] = (lower + upper) // 2  # LRA truncates a median between two digits
    return value


# The reader.


class _Ids(dict[bytes, int]):
    def __missing__(self, word: bytes) -> int:
        return OOV_ID


def _read_split(path: Path, max_length: int) -> SequenceDataset:
    ids = _Ids((word.encode(), index) for word, index in _ID.items())
    rename = bytes.maketrans(b"]", CLOSE.encode())
    sequences, labels = [], []
    try:
        with path.open("rb") as file:
            if (header := file.readline().rstrip(b"\r\n")) != b"Source\tTarget":
                raise DataError(f"{path}:1: the header should be b'Source\\tTarget', got {header[:40]!r}")
            for number, line in enumerate(file, start=2):
                source, tab, label = line.rstrip(b"\r\n").partition(b"\t")
                words = source.translate(rename, b"()").split()
                if not words or not tab:
                    raise DataError(f"{path}:{number}: not an expression, tab and label; is the file cut off?")
                if len(label) != 1 or not label.isdigit():
                    raise DataError(f"{path}:{number}: the label should be a digit, got {label[:40]!r}")
                sequences.append(bytes(map(ids.__getitem__, words[:max_length])))
                labels.append(int(label))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if not labels:
        raise DataError(f"{path}: no examples after the header")
    return SequenceDataset.from_bytes(sequences, labels)
