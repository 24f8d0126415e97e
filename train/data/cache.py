"""Generated data, made once: a folder of NumPy archives that are there complete or not at all."""

from __future__ import annotations

import hashlib
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from train.data import DataError


def load(
    name: str, make: Callable[[Path], dict[str, np.ndarray]], cache_dir: str | os.PathLike | None = None
) -> dict[str, np.ndarray]:
    """The arrays of the cache's file `name`; if it is missing or damaged, `make` makes them and they are stored.

    Args:
      name: file name that spells out everything the arrays depend on, ending in `.npz`.
      make: gets the path of the file, to say where the data goes, and returns the arrays by name.
      cache_dir: folder of the cache; by default `$ATTN_JAX_CACHE` or `~/.cache/attn_jax`.

    Raises:
      DataError: the folder cannot be written.
    """
    folder = Path(cache_dir or os.environ.get("ATTN_JAX_CACHE") or "~/.cache/attn_jax").expanduser()
    path = folder / name
    if path.exists():
        try:
            return _read(path)
        except Exception as error:  # what a damaged zip file can raise has no common type
            warnings.warn(f"{path} is damaged ({error}): generating it again", RuntimeWarning, stacklevel=3)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:  # opened first: a folder that cannot be written fails at once
            arrays = make(path)
            np.savez(file, allow_pickle=False, **arrays, sha256=_digest(path.name, arrays))
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}; set ATTN_JAX_CACHE to another folder"
        ) from error
    return arrays


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name complete or not at all, also with several writers."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with unfinished.open("xb") as file:
            yield file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, np.ndarray]:
    # Opened here because `np.load` forgets to close a damaged file.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        arrays = dict(stored)
    stored_digest = str(arrays.pop("sha256", ""))
    if _digest(path.name, arrays) != stored_digest:
        raise ValueError("its checksum does not match")
    return arrays


def _digest(name: str, arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of a cache file's name and contents."""
    digest = hashlib.sha256(name.encode())
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
