"""Clips of one size out of videos of any size, and their assignment to the splits.

A video is read as a stream; only the frames that a clip needs are kept, scaled until they just cover the clip's
frame, and cut at the centre. A clip is `num_frames` frames, `stride` apart. The clips of a video do not overlap
and are spread over it evenly.

Splits hold whole videos: which one a video belongs to is decided by a hash of its name and the seed, so that
adding videos to a large collection moves none from one split to another. What cannot be read or is too short is
named in a warning and left out.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from train.data import SPLITS, Clips, DataError, share

logger = logging.getLogger(__name__)

Read = Callable[[], np.ndarray]
"""Reads the clips (n, T, H, W, 3) of a video; raises ValueError if it is too short, and more if it is damaged."""

_MAX_NAMED = 10


@dataclass(frozen=True)
class ClipSpec:
    """How clips are taken from videos.

    Attributes:
      num_frames: frames of a clip.
      height, width: size of a frame in pixels.
      stride: distance of a clip's frames in frames of the video.
      max_clips_per_video: most clips of one video.
      fractions: shares of the videos in `train`, `val` and `test`; every split gets one video at least.
      seed: of the assignment of videos to splits.
    """

    num_frames: int = 6
    height: int = 64
    width: int = 64
    stride: int = 1
    max_clips_per_video: int = 4
    fractions: Sequence[float] = (0.9, 0.05, 0.05)
    seed: int = 0

    def __post_init__(self):
        for name in ("num_frames", "height", "width", "stride", "max_clips_per_video"):
            if getattr(self, name) < 1:
                raise ValueError(f"ClipSpec: {name} must be positive, got {getattr(self, name)}")
        if len(self.fractions) != 3 or min(self.fractions) < 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(
                f"ClipSpec: fractions must be three shares (train, val, test) of sum 1, got {self.fractions}"
            )

    @property
    def span(self) -> int:
        """Frames of the video from a clip's first to its last."""
        return (self.num_frames - 1) * self.stride + 1


def collect(videos: Iterable[tuple[str, Read]], spec: ClipSpec, *, where: str) -> dict[str, Clips]:
    """The splits `train`, `val`, `test` of videos given by name; those of equal name count as one.

    Raises:
      DataError: fewer than three videos can be used.
    """
    clips: dict[str, list[np.ndarray]] = {}
    skipped = []
    for name, read in tqdm(videos, desc="video", unit=" videos", disable=None):
        try:
            frames = read()
        except Exception as error:  # what a damaged video can raise has no common type
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            skipped.append(f"{name}: {reason}")
        else:
            clips.setdefault(name, []).append(frames)
    for line in skipped[:_MAX_NAMED]:
        logger.warning("skipped %s", line)
    if skipped:
        used = sum(map(len, clips.values()))
        logger.warning("skipped %d of the %d videos of %s", len(skipped), len(skipped) + used, where)
    if len(clips) < len(SPLITS):
        left_out = f" ({len(skipped)} skipped, the first: {skipped[0]})" if skipped else ""
        raise DataError(f"{where}: train, val and test need a video each, but {len(clips)} can be used{left_out}")
    splits = {
        split: Clips(
            np.concatenate([frames for name in names for frames in clips[name]]),
            None,
            tuple(name for name in names for frames in clips[name] for _ in frames),
        )
        for split, names in _assign(list(clips), spec).items()
    }
    sizes = (f"{split} {len(c)} ({len(set(c.videos))})" for split, c in splits.items())
    logger.info("clips (videos) of %s: %s", where, ", ".join(sizes))
    return splits


def _assign(names: list[str], spec: ClipSpec) -> dict[str, list[str]]:
    """The names of each split, in the order given."""
    place = {name: share(name, spec.seed) for name in names}
    ranked = sorted(names, key=lambda name: (place[name], name))
    _, val, test = spec.fractions
    # By thresholds, so that a video's split does not depend on the others, but where a split would be empty.
    num_test = min(max(sum(place[name] < test for name in names), 1), len(names) - 2)
    num_held_out = min(max(sum(place[name] < test + val for name in names), num_test + 1), len(names) - 1)
    split_of = dict.fromkeys(ranked, "train")
    split_of |= dict.fromkeys(ranked[:num_held_out], "val") | dict.fromkeys(ranked[:num_test], "test")
    return {split: [name for name in names if split_of[name] == split] for split in SPLITS}


def _chosen(length: int, spec: ClipSpec) -> list[int]:
    """The frames of all clips of a video of `length` frames, in order."""
    num_clips = min(spec.max_clips_per_video, length // spec.span)
    if not num_clips:
        raise ValueError(f"{length} frames, too short for a clip over {spec.span}")
    room = length - spec.span
    starts = [room * i // (num_clips - 1) for i in range(num_clips)] if num_clips > 1 else [room // 2]
    return [start + i * spec.stride for start in starts for i in range(spec.num_frames)]


def _fit(image: Image.Image, spec: ClipSpec) -> np.ndarray:
    """`(height, width, 3)` uint8: scaled, smoothly, until it just covers the frame, and cut at the centre."""
    # Pillow widens the filter by the factor that it scales down, which prevents aliasing.
    return np.asarray(ImageOps.fit(image.convert("RGB"), (spec.width, spec.height), Image.Resampling.BILINEAR))


def _stack(frames: list[np.ndarray], spec: ClipSpec) -> np.ndarray:
    return np.stack(frames).reshape(-1, spec.num_frames, spec.height, spec.width, 3)


def from_images(length: int, image: Callable[[int], Image.Image], spec: ClipSpec) -> np.ndarray:
    """`(n, T, H, W, 3)`: the clips of a video of `length` frames, each of which `image` gives.

    Raises:
      ValueError: it is too short.
    """
    return _stack([_fit(image(index), spec) for index in _chosen(length, spec)], spec)


def decode(source: Callable[[], str | io.BytesIO], spec: ClipSpec) -> np.ndarray:
    """`(n, T, H, W, 3)`: the clips of an encoded video; `source` gives its path or contents anew for each pass.

    Raises:
      ValueError: it is too short, or no video.
      av.FFmpegError: it is damaged.
    """
    import av

    with av.open(source(), mode="r") as container:
        if not container.streams.video:
            raise ValueError("holds no video")
        length = sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))
    while True:
        chosen = _chosen(length, spec)
        frames, num_decoded = _decode_frames(source(), set(chosen), spec)
        if len(frames) == len(chosen):
            return _stack(frames, spec)
        length = num_decoded  # some packets show nothing: hidden reference frames, or a damaged end


def _decode_frames(source: str | io.BytesIO, chosen: set[int], spec: ClipSpec) -> tuple[list[np.ndarray], int]:
    """The chosen frames, as far as there are any, and how many frames were decoded until the last of them."""
    import av

    frames, num_decoded, last = [], 0, max(chosen)
    with av.open(source, mode="r") as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for index, frame in enumerate(container.decode(stream)):
            num_decoded = index + 1
            if index in chosen:
                frames.append(_fit(frame.to_image(), spec))
            if index == last:
                break
    return frames, num_decoded


def require_av() -> None:
    """Raises DataError where PyAV, which `decode` needs, is not installed."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise DataError("encoded video is read by PyAV: pip install -e '.[video]'") from error
