"""Parquet files with a video in each row, as data sets on the Hugging Face hub have them.

What a column holds is told from its Arrow type, because the names differ from one data set to the next:

    list of {"bytes", "path"} or of binary      the frames as encoded images
    lists of lists of lists of lists of integers, or datasets' Array4D      (T, H, W, 3), colours from 0 to 255
    {"bytes", "path"} or binary                 one encoded video
"""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image

from train.data import DataError
from train.data.clips import ClipSpec, Read, decode, from_images, require_av

if TYPE_CHECKING:
    import pyarrow as pa

# The first of these that there is names the video; rows of equal name belong to one video.
NAME_COLUMNS = ("video_id", "video_name", "video", "file_name", "filename", "name", "path", "id", "__key__")
# Where several columns look like a video, it is the only one among these.
VIDEO_COLUMNS = ("video", "frames", "images", "mp4", "clip")

_HUB_TIMEOUT = 2.0  # seconds until the hub counts as out of reach; its own retries take 23


def videos(path_or_hub_id: str | os.PathLike, spec: ClipSpec, column: str | None) -> Iterator[tuple[str, Read]]:
    """Name and reader of the video in each row; arguments and errors as in `train.data.video.read_parquet`."""
    where = str(path_or_hub_id)
    files = _files(path_or_hub_id)

    def load(columns: list[str] | None = None):
        import datasets

        return datasets.load_dataset(
            "parquet", data_files=files, split="train", streaming=True, columns=columns, batch_size=1
        )

    with _errors_of_arrow(where):
        schema: pa.Schema = load().features.arrow_schema  # pyright: ignore[reportOptionalMemberAccess]
    column, form = _video_column(schema, column, where=where)
    if form == "video":
        require_av()
    name_column = next((name for name in NAME_COLUMNS if name != column and _is_name(schema, name)), None)
    with _errors_of_arrow(where):
        rows = load([column] if name_column is None else [name_column, column])
        tables = cast("Iterator[pa.Table]", rows.with_format("arrow").iter(batch_size=1))
        for row, table in enumerate(tables):
            cell = table.column(column).combine_chunks()
            name = table.column(name_column)[0].as_py() if name_column else None
            if form == "video" and name is None and isinstance(value := cell[0].as_py(), dict):
                name = value.get("path")
            yield str(f"row {row}" if name is None else name), lambda cell=cell: _clips(cell, form, spec)


@contextmanager
def _errors_of_arrow(where: str) -> Iterator[None]:
    """What cannot be read as Parquet becomes a DataError; this sees no error of who iterates over `videos`."""
    try:
        yield
    except Exception as error:  # of Arrow, of `datasets`, of the operating system
        reason = next(iter(str(error).splitlines()), "")
        raise DataError(f"cannot read {where} as Parquet: {type(error).__name__}: {reason}") from error


def _files(path_or_hub_id: str | os.PathLike) -> list[str]:
    """Patterns of the files, as `datasets` takes them."""
    path = Path(path_or_hub_id).expanduser()
    if not path.exists() and str(path_or_hub_id).count("/") == 1 and not path.is_absolute():
        path = _download(str(path_or_hub_id))
    if path.is_file():
        return [glob.escape(str(path))]
    files = sorted(glob.escape(str(file)) for file in path.rglob("*.parquet"))
    if not files:
        what = "no Parquet file below" if path.is_dir() else "no file or folder"
        raise DataError(
            f"{what} {path}; give a folder of video files, a Parquet file, a folder of such, or owner/name of the"
            " Hugging Face hub"
        )
    return files


def _download(hub_id: str) -> Path:
    """The folder of a data set's Parquet files: from the hub, or what was downloaded before."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    def snapshot(**options: Any) -> Path:
        folder = huggingface_hub.snapshot_download(
            hub_id, repo_type="dataset", allow_patterns="*.parquet", **options
        )
        return Path(folder)

    try:
        # Asked first because it fails at once where a download tries again and again.
        huggingface_hub.HfApi().dataset_info(hub_id, timeout=_HUB_TIMEOUT)
        return snapshot()
    except (HfHubHTTPError, HFValidationError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise DataError(
            f"no file or folder {hub_id}, nor such a data set on the Hugging Face hub: {reason}"
        ) from error
    except Exception as error:  # of the operating system or of the hub's HTTP client, which changes
        try:
            return snapshot(local_files_only=True)
        except Exception:
            raise DataError(
                f"no file or folder {hub_id}, and the Hugging Face hub cannot be reached: where it can, "
                f"run `hf download {hub_id} --repo-type dataset --local-dir DIR`, and give DIR instead"
            ) from error


def _storage(type: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    return type.storage_type if isinstance(type, pa.BaseExtensionType) else type


def _is_list(type: pa.DataType) -> bool:
    from pyarrow import types

    return types.is_list(type) or types.is_large_list(type) or types.is_fixed_size_list(type)


def _is_encoded(type: pa.DataType) -> bool:
    """Whether values are bytes, or as the features `Image` and `Video` store them: `{"bytes", "path"}`."""
    from pyarrow import types

    if types.is_struct(type):
        names = [field.name for field in type]
        return "bytes" in names and _is_encoded(type.field("bytes").type)
    return types.is_binary(type) or types.is_large_binary(type)


def _form(type: pa.DataType) -> str | None:
    """What a column holds: "images", "colours" (nested lists), "video", or None."""
    from pyarrow import types

    type = _storage(type)
    if _is_encoded(type):
        return "video"
    if _is_list(type) and _is_encoded(type.value_type):
        return "images"
    depth = 0
    while _is_list(type):
        type, depth = type.value_type, depth + 1
    return "colours" if depth == 4 and types.is_integer(type) else None


def _is_name(schema: pa.Schema, name: str) -> bool:
    from pyarrow import types

    if name not in schema.names:
        return False
    type = schema.field(name).type
    return types.is_string(type) or types.is_large_string(type) or types.is_integer(type)


def _video_column(schema: pa.Schema, column: str | None, *, where: str) -> tuple[str, str]:
    """The column of the video, the one given or the one there is, and its form."""
    forms = {field.name: form for field in schema if (form := _form(field.type))}
    usual = [name for name in VIDEO_COLUMNS if name in forms]
    if column is None and 1 in (len(forms), len(usual)):
        (column,) = forms if len(forms) == 1 else usual
    if column is not None and column in forms:
        return column, forms[column]
    if column is not None:
        problem = f"column {column} holds no video"
    elif forms:
        problem = f"any of the columns {', '.join(forms)} may hold the video, so it must be named"
    else:
        problem = "no column holds a video"
    columns = ", ".join(f"{field.name} ({_storage(field.type)})" for field in schema)
    raise DataError(
        f"{where}: {problem}; expected a list of images, a list of encoded images (binary), nested lists "
        f"(T, H, W, 3) of uint8, or an encoded video (binary or struct<bytes, path>); the columns are: {columns}"
    )


def _clips(cell: pa.Array, form: str, spec: ClipSpec) -> np.ndarray:
    """Clips of the video in `cell`, an array of one element."""
    if cell.null_count:
        raise ValueError("empty")
    if form == "colours":
        frames = _colours(cell)
        return from_images(len(frames), lambda index: Image.fromarray(frames[index]), spec)
    value = cell[0].as_py()
    if form == "video":
        content = _content(value)
        return decode(lambda: io.BytesIO(content), spec)
    return from_images(len(value), lambda index: Image.open(io.BytesIO(_content(value[index]))), spec)


def _content(value: bytes | dict[str, Any]) -> bytes:
    content = value["bytes"] if isinstance(value, dict) else value
    if content is None:
        raise ValueError("no bytes stored, only a path" if isinstance(value, dict) else "empty")
    return content


def _colours(cell: pa.Array) -> np.ndarray:
    """`(T, H, W, 3)` uint8 from nested lists."""
    import pyarrow as pa

    values = cell.storage if isinstance(cell, pa.ExtensionArray) else cell
    shape = []
    while _is_list(values.type):
        lengths = np.unique(values.value_lengths())
        if len(lengths) != 1:
            raise ValueError(f"expected (T, H, W, 3), got lists of lengths {lengths.tolist()}")
        shape.append(int(lengths[0]))
        values = values.flatten()
    array = values.to_numpy(zero_copy_only=False).reshape(shape)
    if shape[-1] != 3:
        raise ValueError(f"expected (T, H, W, 3), got {tuple(shape)}")
    if array.min() < 0 or array.max() > 255:
        raise ValueError(f"expected colours from 0 to 255, got {array.min()} to {array.max()}")
    return array.astype(np.uint8)
