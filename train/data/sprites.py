"""Moving sprites: procedural video of which every pixel's object is known.

A video shows a few textured sprites (disc, square, triangle, ring or cross; plain, striped, chequered or a
gradient of two colours) before a muted background (gradient, stripes or smooth noise). Each moves with constant
velocity, bounces at the frame's border, and hides what is farther away. The camera drifts slowly over the
background, carrying the frame's border along. In the manner of moving MNIST (Srivastava et al. 2015) and of the
multi-object data sets on which slot-based models are compared (Kabra et al. 2019), but made here, so that it
needs no download.

A pixel has the colour of the nearest sprite that covers its centre, without anti-aliasing, so that masks are
exact. A video depends on the seed, its split and its index alone: other sizes of the splits only add or drop
videos. Everything is computed by operations that IEEE 754 rounds exactly, so equal specifications give equal
bytes.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from train.data import SPLITS, Clips, cache

logger = logging.getLogger(__name__)

# The order is part of the data.
SHAPES = ("disc", "square", "triangle", "ring", "cross")
TEXTURES = ("plain", "stripes", "checker", "gradient")
BACKGROUNDS = ("gradient", "stripes", "noise")

_VERSION = 1  # in the cache's file name: raise it with any change of what a seed generates
_CHUNK = 32  # videos rendered at once, so that the arrays stay in the processor's cache; no part of the data

# Lengths are in units of the frame's shorter side, speeds in these units per frame.
_RADIUS = (0.13, 0.22)  # of the circle around a sprite
_CANDIDATES = 4  # places for each sprite to start, of which the one farthest from the others is taken
_SPEED = (0.03, 0.1)
_DRIFT = 0.015  # the camera's greatest speed along each axis
_PATTERN = (0.8, 1.2)  # period of a sprite's texture in units of its radius
_GRADIENT = (2.0, 4.0)  # period of a background that rises or falls once
_STRIPES = (0.25, 0.6)
_LATTICE = 8  # random values along each axis of the noise, which repeats after that many
_NOISE = 0.25  # distance of these values


@dataclass(frozen=True)
class Sprites:
    """What determines a data set of moving sprites.

    Attributes:
      num_train, num_val, num_test: videos of each split, one clip each.
      num_frames: frames of each clip.
      height, width: size of a frame in pixels.
      min_objects, max_objects: inclusive bounds of the number of sprites, which is uniform.
      seed: non-negative; equal specifications give equal bytes on every machine.
    """

    num_train: int = 5_000
    num_val: int = 250
    num_test: int = 250
    num_frames: int = 6
    height: int = 32
    width: int = 32
    min_objects: int = 2
    max_objects: int = 5
    seed: int = 0

    def __post_init__(self):
        least = dict(num_train=1, num_val=0, num_test=0, num_frames=1, height=8, width=8, min_objects=1)
        least |= dict(max_objects=self.min_objects, seed=0)
        for name, low in least.items():
            value, high = getattr(self, name), 64 if name == "max_objects" else math.inf
            if not low <= value <= high:
                raise ValueError(f"Sprites: {name} must be between {low} and {high}, got {value}")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Videos of the splits, in the order of `SPLITS`."""
        return self.num_train, self.num_val, self.num_test

    @property
    def cache_name(self) -> str:
        """File name that spells out everything the data depends on."""
        return (
            f"sprites-v{_VERSION}-{'-'.join(map(str, self.sizes))}-{self.num_frames}x{self.height}x{self.width}"
            f"-objects{self.min_objects}-{self.max_objects}-seed{self.seed}.npz"
        )


def load(spec: Sprites, cache_dir: str | os.PathLike | None = None) -> dict[str, Clips]:
    """The splits `train`, `val`, `test` of `spec`: read from the cache, or generated once and stored there.

    Args:
      spec: the data set.
      cache_dir: folder of the cache; by default `$ATTN_JAX_CACHE` or `~/.cache/attn_jax`.

    Raises:
      DataError: the folder cannot be written.
    """

    def make(path: Path) -> dict[str, np.ndarray]:
        logger.info("generating %d videos of sprites, once, into %s", sum(spec.sizes), path)
        return _generate(spec)

    return _split(spec, **cache.load(spec.cache_name, make, cache_dir))


def generate(spec: Sprites) -> dict[str, Clips]:
    """The splits `train`, `val`, `test` of `spec`, generated in memory."""
    return _split(spec, **_generate(spec))


def _generate(spec: Sprites) -> dict[str, np.ndarray]:
    shape = (sum(spec.sizes), spec.num_frames, spec.height, spec.width)
    frames, masks = np.empty((*shape, 3), np.uint8), np.empty(shape, np.uint8)
    start = 0
    with tqdm(total=shape[0], desc="sprites", unit=" videos", disable=None) as progress:
        for split, size in zip(SPLITS, spec.sizes):
            for first in range(0, size, _CHUNK):
                scenes = draw(spec, split, range(first, min(first + _CHUNK, size)))
                stop = start + len(scenes.num_objects)
                frames[start:stop], masks[start:stop] = render(scenes, spec.height, spec.width)
                progress.update(stop - start)
                start = stop
    return {"frames": frames, "masks": masks}


def _split(spec: Sprites, frames: np.ndarray, masks: np.ndarray) -> dict[str, Clips]:
    names = tuple(f"sprites/{split}/{i}" for split, size in zip(SPLITS, spec.sizes) for i in range(size))
    clips = Clips(frames, masks, names)
    ends = np.cumsum(spec.sizes).tolist()
    return {name: clips.slice(end - size, end) for name, size, end in zip(SPLITS, spec.sizes, ends)}


# Drawing. NumPy promises the raw stream of a bit generator across versions, but not what `Generator` makes of it.


@dataclass(frozen=True, eq=False)
class Scenes:
    """`N` videos of `T` frames with room for `K` sprites, as what is drawn of them. Lengths are in pixels.

    Sprite `k` has the id `k + 1` in masks; of two sprites the one with the larger id is nearer.

    Attributes:
      num_objects: `(N,)` sprites that are there, the first of the `K`.
      shape, texture: `(N, K)` indices into `SHAPES`, `TEXTURES`.
      radius: `(N, K)` radius of the circle around a sprite.
      axis: `(N, K, 2)` unit vector `(x, y)` to which a sprite is turned.
      period: `(N, K)` of its texture, in units of its radius.
      colours: `(N, K, 2, 3)` its two colours in [0, 1].
      centre: `(N, T, K, 2)` its centre `(x, y)` in the frame.
      camera: `(N, T, 2)` `(x, y)` of the frame's corner over the background.
      background: `(N,)` index into `BACKGROUNDS`.
      background_axis: `(N, 2)` unit vector along which gradient and stripes vary.
      background_period: `(N,)` of gradient and stripes.
      background_colours: `(N, 2, 3)` in [0, 1].
      lattice: `(N, _LATTICE, _LATTICE)` in [0, 1], what the noise interpolates.
      cell: distance of the lattice's values.
    """

    num_objects: np.ndarray
    shape: np.ndarray
    texture: np.ndarray
    radius: np.ndarray
    axis: np.ndarray
    period: np.ndarray
    colours: np.ndarray
    centre: np.ndarray
    camera: np.ndarray
    background: np.ndarray
    background_axis: np.ndarray
    background_period: np.ndarray
    background_colours: np.ndarray
    lattice: np.ndarray
    cell: float


class _Uniform:
    """Draws for several videos at once, each from its own stream."""

    def __init__(self, seed: int, split: str, indices: range):
        self.streams = [np.random.PCG64((seed, SPLITS.index(split), index)) for index in indices]

    def __call__(self, *shape: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """`(N, *shape)` numbers uniform in [low, high)."""
        size = math.prod(shape)
        words = np.stack([bits.random_raw(size) for bits in self.streams]).reshape(-1, *shape)
        return low + (high - low) * ((words >> np.uint64(11)) * 2.0**-53)

    def integers(self, *shape: int, high: int) -> np.ndarray:
        """`(N, *shape)` integers uniform in [0, high)."""
        return (self(*shape) * high).astype(np.int64)


def draw(spec: Sprites, split: str, indices: range) -> Scenes:
    """The scenes of the videos `indices` of a split."""
    uniform = _Uniform(spec.seed, split, indices)
    num, sprites, side = len(indices), spec.max_objects, min(spec.height, spec.width)
    num_objects = spec.min_objects + uniform.integers(high=spec.max_objects - spec.min_objects + 1)
    radius = side * uniform(sprites, low=_RADIUS[0], high=_RADIUS[1])

    time = np.arange(spec.num_frames)[:, None, None]
    drift = side * uniform(2, low=-_DRIFT, high=_DRIFT)
    speed = side * uniform(sprites, low=_SPEED[0], high=_SPEED[1])
    velocity = speed[..., None] * _unit(uniform(sprites))
    # Within these bounds a sprite touches the border of the frame, which moves with the camera.
    low = radius[:, None, :, None]
    high = np.array([spec.width, spec.height]) - low
    start = low[:, 0] + (high - low)[:, 0] * _apart(uniform(sprites, _CANDIDATES, 2))
    centre = _bounce(start[:, None] + (velocity - drift[:, None])[:, None] * time, low, high)

    hue = uniform()[:, None] + (uniform(sprites).argsort(axis=1) + 0.5 * uniform(sprites)) / sprites
    first = _rgb(hue, uniform(sprites, low=0.75), uniform(sprites, low=0.8))
    second = _rgb(hue + uniform(sprites, low=0.0, high=0.15), uniform(sprites, low=0.15, high=0.45), np.ones(()))

    background = uniform.integers(high=len(BACKGROUNDS))
    gradient, stripes = (uniform(low=low, high=high) for low, high in (_GRADIENT, _STRIPES))
    muted = _rgb(uniform(2), uniform(2, high=0.4), np.sort(uniform(2, low=0.15, high=0.55)))
    return Scenes(
        num_objects=num_objects,
        shape=uniform.integers(sprites, high=len(SHAPES)),
        texture=uniform.integers(sprites, high=len(TEXTURES)),
        radius=radius,
        axis=_unit(uniform(sprites)),
        period=uniform(sprites, low=_PATTERN[0], high=_PATTERN[1]),
        colours=np.stack([first, second], axis=2),
        centre=centre,
        camera=(drift[:, None] * time[:, 0]).reshape(num, spec.num_frames, 2),
        background=background,
        background_axis=_unit(uniform()),
        background_period=side * np.where(background == BACKGROUNDS.index("stripes"), stripes, gradient),
        background_colours=muted,
        lattice=uniform(_LATTICE, _LATTICE),
        cell=side * _NOISE,
    )


def _unit(turn: np.ndarray) -> np.ndarray:
    """`(..., 2)` unit vectors whose direction goes once around while `turn` goes from 0 to 1.

    Rational, because sines differ between machines; the angle is within 0.6 degrees of `360 turn`.
    """
    quadrant, t = np.divmod(4 * turn, 1)
    t = t * (16 + 5 * t * t) / 21  # within 0.006 of tan(pi t / 4), the tangent of half the angle
    x, y = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    pairs = [(x, y), (-y, x), (-x, -y), (y, -x)]
    return np.stack([np.choose(quadrant.astype(np.int64) % 4, part) for part in zip(*pairs)], axis=-1)


def _apart(candidates: np.ndarray) -> np.ndarray:
    """`(N, K, 2)`: one by one, the candidate (N, K, C, 2) of each sprite that is farthest from those chosen."""
    chosen = candidates[:, :1, 0]
    video = np.arange(len(candidates))
    for places in np.moveaxis(candidates, 1, 0)[1:]:
        x, y = np.moveaxis(places[:, :, None] - chosen[:, None], -1, 0)
        best = (x * x + y * y).min(axis=-1).argmax(axis=-1)
        chosen = np.concatenate([chosen, places[video, best][:, None]], axis=1)
    return chosen


def _bounce(position: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Where a point is that moves to `position` but is reflected at `low` and `high`."""
    return high - np.abs((position - low) % (2 * (high - low)) - (high - low))


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """`(..., 3)` colours in [0, 1]; the hue has period 1."""
    sixths = 6 * hue[..., None] + np.array([5.0, 3.0, 1.0])
    part = np.clip(np.minimum(sixths % 6, 4 - sixths % 6), 0, 1)
    return value[..., None] * (1 - saturation[..., None] * part)


# Rendering.


def render(scenes: Scenes, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames `(N, T, height, width, 3)` and masks `(N, T, height, width)` of `scenes`, both uint8."""
    mask = _visible(scenes, height, width)
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    camera = scenes.camera[:, :, None, None]
    colour = _background(scenes, x + camera[..., 0], y + camera[..., 1])
    video, time, row, column = np.nonzero(mask)
    sprite = mask[video, time, row, column].astype(np.int64) - 1
    offset = np.stack([column + 0.5, row + 0.5], axis=-1) - scenes.centre[video, time, sprite]
    axis, radius = scenes.axis[video, sprite], scenes.radius[video, sprite]
    u, v = _turned(offset[:, 0], offset[:, 1], axis, radius)
    weight = _texture(scenes.texture[video, sprite], u, v, scenes.period[video, sprite])
    colour[video, time, row, column] = _mix(scenes.colours[video, sprite], weight)
    return np.floor(255 * colour + 0.5).astype(np.uint8), mask


def _visible(scenes: Scenes, height: int, width: int) -> np.ndarray:
    """`(N, T, H, W)` uint8: the id of the nearest sprite that covers the centre of each pixel, or 0."""
    num, frames, sprites, _ = scenes.centre.shape
    mask = np.zeros((num, frames, height, width), np.uint8)
    for sprite in range(sprites):  # nearer ones over farther ones
        present = sprite < scenes.num_objects
        for index, name in enumerate(SHAPES):
            (chosen,) = np.nonzero(present & (scenes.shape[:, sprite] == index))
            centre = scenes.centre[chosen, :, sprite, :, None, None]
            x = np.arange(width) + 0.5 - centre[:, :, 0]
            y = np.arange(height)[:, None] + 0.5 - centre[:, :, 1]
            axis = scenes.axis[chosen, sprite].reshape(-1, 1, 1, 1, 2)
            u, v = _turned(x, y, axis, scenes.radius[chosen, sprite].reshape(-1, 1, 1, 1))
            mask[chosen] = np.where(_covers(name, u, v), np.uint8(sprite + 1), mask[chosen])
    return mask


def _turned(x: np.ndarray, y: np.ndarray, axis: np.ndarray, radius: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in a sprite's own frame, in which it lies within the unit circle."""
    cos, sin = axis[..., 0] / radius, axis[..., 1] / radius
    return x * cos + y * sin, y * cos - x * sin


def _covers(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether a sprite of a shape covers points of its own frame."""
    match shape:
        case "disc":
            return u * u + v * v < 0.85**2
        case "square":
            return np.maximum(np.abs(u), np.abs(v)) < 0.7
        case "triangle":  # equilateral, a corner at (1, 0)
            return (u > -0.5) & (u + math.sqrt(3) * np.abs(v) < 1)
        case "ring":
            square = u * u + v * v
            return (square > 0.45**2) & (square < 0.95**2)
        case "cross":
            u, v = np.abs(u), np.abs(v)
            return (np.minimum(u, v) < 0.3) & (np.maximum(u, v) < 0.9)
    raise ValueError(f"no shape {shape}")


def _texture(texture: np.ndarray, u: np.ndarray, v: np.ndarray, period: np.ndarray) -> np.ndarray:
    """Weights in [0, 1] of the second colour at points `(M,)` of the sprites' own frames."""
    across, along = (np.floor(2 * w / period) % 2 for w in (u, v))
    return np.choose(texture, [np.zeros_like(u), across, (across + along) % 2, np.clip(0.5 + 0.5 * u, 0, 1)])


def _background(scenes: Scenes, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`(N, T, H, W, 3)` colours of points x `(N, T, 1, W)`, y `(N, T, H, 1)` of the background."""
    weight = np.empty(np.broadcast_shapes(x.shape, y.shape))
    noisy = scenes.background == BACKGROUNDS.index("noise")
    weight[noisy] = _noise(scenes.lattice[noisy], x[noisy] / scenes.cell, y[noisy] / scenes.cell)
    even = ~noisy
    axis = scenes.background_axis[even] / scenes.background_period[even, None]
    axis = axis.reshape(-1, 1, 1, 1, 2)
    weight[even] = np.abs(2 * ((x[even] * axis[..., 0] + y[even] * axis[..., 1]) % 1) - 1)
    return _mix(scenes.background_colours[:, None, None, None], weight)


def _noise(lattice: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`(N, T, H, W)` in [0, 1]: interpolates `lattice` (N, L, L), one apart, at x (N, T, 1, W), y (N, T, H, 1)."""
    size = lattice.shape[-1]
    video = np.arange(len(lattice)).reshape(-1, 1, 1, 1)
    (left, s), (above, t) = np.divmod(x, 1), np.divmod(y, 1)
    left, above = left.astype(np.int64), above.astype(np.int64)
    s, t = (w * w * (3 - 2 * w) for w in (s, t))  # smooth at the lattice's lines
    upper, lower = (
        (1 - s) * lattice[video, row % size, left % size] + s * lattice[video, row % size, (left + 1) % size]
        for row in (above, above + 1)
    )
    return (1 - t) * upper + t * lower


def _mix(colours: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """`(..., 3)` between the two of `colours` (..., 2, 3)."""
    first, second = colours[..., 0, :], colours[..., 1, :]
    return first + weight[..., None] * (second - first)
