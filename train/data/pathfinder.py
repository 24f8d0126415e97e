"""Pathfinder of Long Range Arena: are two dots the ends of one dashed path? Images as sequences of grey pixels.

`read` reads the published images (Linsley et al. 2018, Tay et al. 2021). `load` makes images of the same task: two
long dashed paths that keep apart, a few short ones, and two dots. In every image two ends of different paths lie
about as far apart as the two ends of the first path; which of these pairs gets the dots is a fair coin. So neither
the ink nor the distance of the dots tells the label.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from train.data import SPLITS, DataError, SequenceDataset, cache, split_of

VOCAB_SIZE = 256
NUM_CLASSES = 2

_VERSION = 1  # in the cache's file name: raise it with any change of what a seed generates
_BATCH = 8_192  # drawn at once; part of what a seed generates
_STEP = 0.9  # pixels from point to point, so that neighbouring points fall on neighbouring pixels
_DOWNLOAD = (
    "download lra_release.gz of Long Range Arena, unpack it, and give its folder pathfinder{size} as task.source"
)


@dataclass(frozen=True)
class Pathfinder:
    """What determines a generated data set.

    Attributes:
      size: pixels of a side, at least 32.
      num_train, num_val, num_test: images of each split.
      distractors: short paths that are tried; one that finds no room is left out.
      seed: non-negative.
    """

    size: int = 32
    num_train: int = 10_000
    num_val: int = 1_000
    num_test: int = 2_000
    distractors: int = 3
    seed: int = 0

    def __post_init__(self):
        for name, least in (("size", 32), ("num_train", 1), ("num_val", 1), ("num_test", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"Pathfinder: {name} must be at least {least}, got {getattr(self, name)}")
        for name in ("distractors", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"Pathfinder: {name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class Drawing:
    """Generated images and what they show.

    Attributes:
      pixels: `(N, size, size)` uint8.
      labels: `(N,)`, 1 where the dots are the ends of one path.
      dots: `(N, 2, 2)` their rows and columns.
      closed: bool `(N, size, size)`, the paths without their gaps and without the dots.
    """

    pixels: np.ndarray
    labels: np.ndarray
    dots: np.ndarray
    closed: np.ndarray


def load(spec: Pathfinder, cache_dir: str | os.PathLike | None = None) -> dict[str, SequenceDataset]:
    """The splits `train`, `val`, `test` of `spec`: read from the cache, or generated once and stored there.

    Raises:
      DataError: the folder of the cache cannot be written.
    """
    sizes = (spec.num_train, spec.num_val, spec.num_test)
    name = (
        f"pathfinder-v{_VERSION}-{spec.size}px-{'-'.join(map(str, sizes))}-distractors{spec.distractors}"
        f"-seed{spec.seed}.npz"
    )

    def make(path: Path) -> dict[str, np.ndarray]:
        made = draw(spec, sum(sizes))
        return {"pixels": made.pixels, "labels": made.labels}

    arrays = cache.load(name, make, cache_dir)
    whole = _dataset(arrays["pixels"], arrays["labels"])
    ends = np.cumsum(sizes).tolist()
    return {split: whole.slice(end - size, end) for split, size, end in zip(SPLITS, sizes, ends, strict=True)}


def draw(spec: Pathfinder, number: int) -> Drawing:
    """`number` images; a longer list begins with a shorter one."""
    bits, found, count = np.random.PCG64(spec.seed), [], 0
    with tqdm(total=number, desc="Pathfinder", unit=" images", disable=None) as progress:
        while count < number:
            found.append(_draw_batch(bits, spec))
            progress.update(min(len(found[-1].labels), number - count))
            count += len(found[-1].labels)
    names = ("pixels", "labels", "dots", "closed")
    return Drawing(*(np.concatenate([getattr(part, name) for part in found])[:number] for name in names))


def _draw_batch(bits: np.random.BitGenerator, spec: Pathfinder) -> Drawing:
    size, margin = spec.size, 3.5 + spec.size / 64
    long, short = round(0.75 * size / _STEP), round(0.2 * size / _STEP)
    paths = _paths(bits, _BATCH, long, size)
    paths = paths[_inside(paths, size)]
    paths = paths[_simple(paths, margin)]
    first, second = paths[: len(paths) // 2], paths[len(paths) // 2 : len(paths) // 2 * 2]
    distance = np.linalg.norm(first[:, -1] - first[:, 0], axis=1)
    across = np.linalg.norm(first[:, [0, 0, -1, -1]] - second[:, [0, -1, 0, -1]], axis=2)
    nearest = np.abs(across - distance[:, None]).argmin(axis=1)
    # The same images for both labels: those in which the coin has two pairs to choose from.
    kept = np.flatnonzero(np.abs(across[np.arange(len(first)), nearest] - distance) < 0.05 * size)
    kept = kept[_apart(first[kept], second[kept], margin)]
    first, second, nearest = first[kept], second[kept], nearest[kept]
    labels = (bits.random_raw(len(kept)) >> np.uint64(63)).astype(np.int32)

    same = np.stack([first[:, 0], first[:, -1]], axis=1)
    ends = np.stack([first[:, [0, 0, -1, -1]], second[:, [0, -1, 0, -1]]], axis=2)
    dots = np.where(labels[:, None, None] == 1, same, ends[np.arange(len(kept)), nearest])
    drawn = [first, second]
    for _ in range(spec.distractors):
        path = _paths(bits, len(kept), short, size)
        room = _inside(path, size)
        for other in drawn:
            room &= _apart(path, other, margin)
        # What finds no room lies outside of every image, and near nothing.
        path = np.where(room[:, None, None], path, -10.0 * size)
        drawn.append(path)

    closed = np.zeros((len(kept), size, size), bool)
    dashed = closed.copy()
    dash = max(2, size // 14)
    for path in drawn:
        solid = np.arange(path.shape[1]) % (2 * dash - 1) < dash
        _mark(closed, path)
        _mark(dashed, path[:, solid])
    pixels = np.where(dashed, np.uint8(255), np.uint8(0))
    radius = max(1, size // 32)
    centres = np.rint(dots).astype(int)
    grid = np.arange(size)
    for dot in range(2):
        down, right = (np.abs(grid - centres[:, dot, axis, None]) <= radius for axis in (0, 1))
        pixels[down[:, :, None] & right[:, None, :]] = 255
    return Drawing(pixels, labels, centres, closed)


def _uniform(bits: np.random.BitGenerator, *shape: int) -> np.ndarray:
    """In [0, 1). NumPy promises the raw stream of a bit generator across versions, and no more."""
    raw = bits.random_raw(int(np.prod(shape))) >> np.uint64(11)
    return (raw * 2.0**-53).reshape(shape)


def _paths(bits: np.random.BitGenerator, number: int, points: int, size: int) -> np.ndarray:
    """`(number, points, 2)` smooth walks: the heading turns at a rate that is a path's own, and wavers."""
    start = _uniform(bits, number, 1, 2) * size
    heading, bend = _uniform(bits, number, 1) * 2 * np.pi, (_uniform(bits, number, 1) - 0.5) * 6 / size
    waver = np.cumsum((_uniform(bits, number, points) - 0.5) * 3 / size, axis=1)
    angle = heading + np.cumsum(bend + waver * 4 / size, axis=1)
    return start + np.cumsum(_STEP * np.stack([np.sin(angle), np.cos(angle)], axis=2), axis=1)


def _inside(paths: np.ndarray, size: int) -> np.ndarray:
    border = 2 + size / 32
    return ((paths > border) & (paths < size - 1 - border)).all(axis=(1, 2))


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`(N, P, Q)` of points `(N, P, 2)` and `(N, Q, 2)`."""
    return ((a[:, :, None] - b[:, None]) ** 2).sum(axis=3)


def _apart(a: np.ndarray, b: np.ndarray, margin: float) -> np.ndarray:
    return (_squared(a, b) > margin**2).all(axis=(1, 2))


def _simple(paths: np.ndarray, margin: float) -> np.ndarray:
    """Whether points that are not neighbours keep apart, so that a path does not come back to itself."""
    place = np.arange(paths.shape[1])
    near = np.abs(place[:, None] - place) * _STEP < 2 * margin
    return ((_squared(paths, paths) > margin**2) | near).all(axis=(1, 2))


def _mark(images: np.ndarray, paths: np.ndarray) -> None:
    size = images.shape[1]
    places = np.rint(paths).astype(int)
    image, point = np.nonzero(((places >= 0) & (places < size)).all(axis=2))
    row, column = places[image, point].T
    images[image, row, column] = True


def _dataset(pixels: np.ndarray, labels: np.ndarray) -> SequenceDataset:
    return SequenceDataset.pack(list(pixels.reshape(len(pixels), -1)), labels.tolist())


# The reader.


def read(directory: str | os.PathLike, size: int) -> dict[str, SequenceDataset]:
    """Reads the published images from `pathfinder32` or `pathfinder128`, or their `curv_contour_length_14`.

    The files `metadata/*.npy` are text, in spite of their name: a line holds an image's folder, its file, a
    number, its label and more, between spaces. Empty images, which the published folders have some of, are left
    out. Split 80/10/10 by a hash of the names.

    Raises:
      DataError: a folder or image is missing, a line or image is malformed, or a split is empty.
    """
    root = Path(directory).expanduser()
    if (root / "curv_contour_length_14").is_dir():
        root = root / "curv_contour_length_14"
    files = sorted((root / "metadata").glob("*.npy"))
    if not files:
        raise DataError(f"no metadata/*.npy in {root}; {_DOWNLOAD.format(size=size)}")
    found: dict[str, tuple[list[np.ndarray], list[int]]] = {split: ([], []) for split in SPLITS}
    for file in tqdm(files, desc="Pathfinder", unit=" files", disable=None):
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            fields = line.split()
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                raise DataError(
                    f"{file}:{number}: expected folder, file, number and label 0 or 1, got {line[:60]!r}"
                )
            name = f"{fields[0]}/{fields[1]}"
            if (pixels := _decode(root / name, size)) is not None:
                images, labels = found[split_of(name)]
                images.append(pixels)
                labels.append(int(fields[3]))
    for split, (images, _) in found.items():
        if not images:
            raise DataError(f"{root}: the split {split} has no images; is the folder complete?")
    return {split: SequenceDataset.pack(images, labels) for split, (images, labels) in found.items()}


def _decode(path: Path, size: int) -> np.ndarray | None:
    """`(size * size,)` grey pixels, None of an empty file."""
    from PIL import Image, UnidentifiedImageError

    try:
        if path.stat().st_size == 0:
            return None
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
    except FileNotFoundError as error:
        raise DataError(f"no image {path}, which the metadata names") from error
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if pixels.shape != (size, size):
        raise DataError(f"{path} has {pixels.shape[1]} x {pixels.shape[0]} pixels, task.generator.size is {size}")
    return pixels.ravel()
