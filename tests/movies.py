"""Small videos whose every frame is known, as files that were not written by the code under test."""

import io

import av
import numpy as np

LENGTH, SIDE = 12, 8


def movie(seed: int, length: int = LENGTH, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """`(length, height, width, 3)` uint8 of noise: no two frames are alike."""
    return np.random.default_rng(seed).integers(0, 256, (length, height, width, 3), np.uint8)


def encoded(frames: np.ndarray, format: str = "matroska", codec: str = "ffv1", pixels: str = "bgr0") -> bytes:
    """`frames` as a video file; by default without loss."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def write(folder, names=("a", "b", "c"), **options) -> list[np.ndarray]:
    """Writes a movie for each name as `folder/name.mkv`; returns their frames."""
    movies = [movie(seed, **options) for seed in range(len(names))]
    for name, frames in zip(names, movies):
        path = folder / f"{name}.mkv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(frames))
    return movies
