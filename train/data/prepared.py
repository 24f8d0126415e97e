"""Data sets that tensorflow-datasets has prepared on this machine; reading them needs no TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from train.data import DataError


def records(name: str, otherwise: str) -> dict[str, Iterator[Any]]:
    """The records of the parts `train` and `test` of a data set, in order. Nothing is downloaded.

    Args:
      name: of the data set in the catalogue of tensorflow-datasets; prepared as array_record.
      otherwise: what else the user can do, for the error.

    Raises:
      DataError: it is not prepared.
    """
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder(name, file_format="array_record", try_gcs=False)
    try:
        sources = {part: builder.as_data_source(part) for part in ("train", "test")}
    except Exception as error:  # of several types, one of them its own
        raise DataError(
            f"tensorflow-datasets has no {name} prepared in {builder.data_dir}; prepare it there, or {otherwise}"
        ) from error
    return {part: (source[number] for number in range(len(source))) for part, source in sources.items()}
