import hashlib
import math
import os
from dataclasses import fields, replace

import numpy as np
import pytest

from train.data import SPLITS, Clips, DataError, sprites
from train.data.sprites import SHAPES, TEXTURES, Sprites

SMALL = Sprites(num_train=40, num_val=8, num_test=6)
NUM_VIDEOS = 200


def digest(splits: dict[str, Clips]) -> str:
    parts = [array.tobytes() for clips in splits.values() for array in (clips.frames, clips.masks)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def to_bytes(colour: np.ndarray) -> list[int]:
    return [math.floor(255 * value + 0.5) for value in colour]


def area(polygon: list[tuple[float, float]], x: float, y: float) -> bool:
    """Whether a convex polygon, counted round in either direction, holds a point."""
    sides = [
        (bx - ax) * (y - ay) - (by - ay) * (x - ax)
        for (ax, ay), (bx, by) in zip(polygon, polygon[1:] + polygon[:1], strict=True)
    ]
    return min(sides) > 0 or max(sides) < 0


def holds(shape: str, u: float, v: float) -> bool:
    """A sprite's shape, as geometry, in its own frame."""
    distance = math.hypot(u, v)
    square = [(1, 1), (-1, 1), (-1, -1), (1, -1)]
    corners = [(math.cos(angle), math.sin(angle)) for angle in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    bars = [[(0.9 * a, 0.3 * b) for a, b in square], [(0.3 * a, 0.9 * b) for a, b in square]]
    return {
        "disc": distance < 0.85,
        "square": area([(0.7 * a, 0.7 * b) for a, b in square], u, v),
        "triangle": area(corners, u, v),
        "ring": 0.45 < distance < 0.95,
        "cross": any(area(bar, u, v) for bar in bars),
    }[shape]


def paint(texture: str, u: float, v: float, period: float) -> float:
    """The weight of a sprite's second colour, in its own frame."""
    odd = [math.floor(w / (period / 2)) % 2 for w in (u, v)]
    return {"plain": 0, "stripes": odd[0], "checker": odd[0] != odd[1], "gradient": min(max((u + 1) / 2, 0), 1)}[
        texture
    ]


@pytest.fixture(scope="module")
def scenes() -> sprites.Scenes:
    return sprites.draw(SMALL, "train", range(NUM_VIDEOS))


@pytest.fixture(scope="module")
def rendered(scenes) -> tuple[np.ndarray, np.ndarray]:
    return sprites.render(scenes, SMALL.height, SMALL.width)


def without(scenes: sprites.Scenes, num_objects: np.ndarray | int) -> sprites.Scenes:
    return replace(scenes, num_objects=np.broadcast_to(num_objects, scenes.num_objects.shape))


# What is seen


def test_a_pixel_belongs_to_the_nearest_sprite_that_covers_it_and_has_its_paint(scenes, rendered):
    """Pixel by pixel, by angles and polygons."""
    frames, masks = rendered
    shapes, textures = set(), set()
    for video in range(0, NUM_VIDEOS, 20):
        count, time = scenes.num_objects[video], video // 20 % SMALL.num_frames
        for row in range(SMALL.height):
            for column in range(SMALL.width):
                nearest, weight = 0, 0
                for k in range(count):
                    shape, texture = SHAPES[scenes.shape[video, k]], TEXTURES[scenes.texture[video, k]]
                    x, y = np.array([column + 0.5, row + 0.5]) - scenes.centre[video, time, k]
                    angle = math.atan2(y, x) - math.atan2(*scenes.axis[video, k, ::-1])
                    distance = math.hypot(x, y) / scenes.radius[video, k]
                    u, v = distance * math.cos(angle), distance * math.sin(angle)
                    if holds(shape, u, v):
                        nearest, weight = k + 1, paint(texture, u, v, scenes.period[video, k])
                        shapes.add(shape)
                        textures.add(texture)
                assert masks[video, time, row, column] == nearest
                if nearest:
                    first, second = scenes.colours[video, nearest - 1]
                    colour = (1 - weight) * first + weight * second
                    assert frames[video, time, row, column].tolist() == to_bytes(colour)
    assert (shapes, textures) == (set(SHAPES), set(TEXTURES))


def test_a_plain_sprite_has_one_colour_and_the_others_lie_between_two(scenes, rendered):
    frames, masks = rendered
    for video in range(NUM_VIDEOS):
        for k in range(scenes.num_objects[video]):
            pixels = frames[video][masks[video] == k + 1]
            first, second = (to_bytes(colour) for colour in scenes.colours[video, k])
            colours = np.unique(pixels, axis=0).tolist()
            match TEXTURES[scenes.texture[video, k]]:
                case "plain":
                    assert colours in ([], [first])
                case "gradient":
                    low, high = np.minimum(first, second), np.maximum(first, second)
                    assert ((low <= pixels) & (pixels <= high)).all()
                case _:
                    assert all(colour in (first, second) for colour in colours)


def test_what_a_sprite_hides_is_what_would_be_seen_without_it(scenes, rendered):
    """The nearest sprite is the last: taking it away changes its own pixels, and shows a farther one there."""
    frames, masks = rendered
    fewer_frames, fewer_masks = sprites.render(without(scenes, scenes.num_objects - 1), SMALL.height, SMALL.width)
    nearest = masks == scenes.num_objects[:, None, None, None]
    np.testing.assert_array_equal(fewer_masks[~nearest], masks[~nearest])
    np.testing.assert_array_equal(fewer_frames[~nearest], frames[~nearest])
    assert (fewer_masks < masks)[nearest].all()
    occluding = ((fewer_masks > 0) & nearest).any(axis=(1, 2, 3))
    assert occluding.mean() > 0.5  # occlusion is what the videos are about


def test_sprites_move_in_straight_lines_and_bounce_at_the_border(scenes):
    """Along each axis every step has one length, if the way to the border and back is counted where it bounces."""
    low = scenes.radius[:, None, :, None]
    high = np.array([SMALL.width, SMALL.height]) - low
    before, after = scenes.centre[:, :-1], scenes.centre[:, 1:]
    step = after - before
    length = np.abs(step).max(axis=1, keepdims=True)
    straight = np.isclose(np.abs(step), length)
    way = [np.abs(before - border) + np.abs(after - border) for border in (low, high)]
    assert (straight | np.isclose(way[0], length) | np.isclose(way[1], length)).all()
    assert 0.05 < 1 - straight.mean() < 0.2
    turned = (np.sign(step[:, 1:]) != np.sign(step[:, :-1])) & straight[:, 1:] & straight[:, :-1]
    assert turned.mean() < 0.01  # only where it bounces during neither step, but between the two
    moved = np.linalg.norm(scenes.centre[:, -1] - scenes.centre[:, 0], axis=-1)
    assert np.median(moved) > SMALL.width / 5  # in a clip


def test_the_camera_moves_the_background():
    """Without sprites, and with a camera that goes one pixel a frame, every frame is the one before, shifted."""
    scenes = sprites.draw(SMALL, "train", range(NUM_VIDEOS))
    camera = np.arange(SMALL.num_frames)[:, None] * np.array([1.0, -2.0])
    scenes = replace(without(scenes, 0), camera=np.broadcast_to(camera, scenes.camera.shape))
    frames, masks = sprites.render(scenes, SMALL.height, SMALL.width)
    assert not masks.any()
    before, after = frames[:, :-1].astype(int), frames[:, 1:].astype(int)
    assert np.abs(before[:, :, :-2, 1:] - after[:, :, 2:, :-1]).max() <= 1  # rounding to 8 bits
    assert (np.ptp(before, axis=(2, 3)).max(axis=(1, 2)) > 8).mean() > 0.9


def test_backgrounds_are_smooth(scenes):
    """Stripes rise over half a period of at least 8 pixels; the smoothest step over 8 has a slope of 1.5 / 8."""
    slope = max(2 / 8, 1.5 / 8)
    frames, _ = sprites.render(without(scenes, 0), SMALL.height, SMALL.width)
    contrast = 255 * np.abs(np.diff(scenes.background_colours, axis=1))[:, :, None, None]
    for axis in (2, 3):
        steps = np.abs(np.diff(frames.astype(int), axis=axis))
        assert (steps <= slope * contrast + 1).all()  # rounding to 8 bits


def test_sprites_stand_out_from_the_background(rendered):
    frames, masks = rendered
    saturation = np.ptp(frames.astype(int), axis=-1)
    value = frames.max(axis=-1)
    assert np.median(saturation[masks > 0]) > 3 * np.median(saturation[masks == 0])
    assert np.percentile(value[masks > 0], 1) > np.percentile(value[masks == 0], 99)


# The data set


def test_number_of_sprites_is_uniform_and_all_are_seen(scenes, rendered):
    _, masks = rendered
    counts = np.bincount(scenes.num_objects, minlength=SMALL.max_objects + 1)
    assert not counts[: SMALL.min_objects].any()
    expected = NUM_VIDEOS / (SMALL.max_objects - SMALL.min_objects + 1)
    assert np.abs(counts[SMALL.min_objects :] - expected).max() < 4 * math.sqrt(expected)  # seeded: never flickers
    visible = [len(np.unique(video[video > 0])) for video in masks]
    assert np.mean(visible == scenes.num_objects) > 0.99


@pytest.mark.parametrize("change", [{"num_train": 3}, {"num_train": 70, "num_val": 0}, {"num_test": 4}])
def test_a_video_does_not_depend_on_the_sizes_of_the_splits(change):
    data, other = sprites.generate(SMALL), sprites.generate(replace(SMALL, **change))
    for split in SPLITS:
        both = min(len(data[split]), len(other[split]))
        assert [len(data[split]), len(other[split])] == [
            getattr(spec, f"num_{split}") for spec in (SMALL, replace(SMALL, **change))
        ]
        np.testing.assert_array_equal(data[split].frames[:both], other[split].frames[:both])
        np.testing.assert_array_equal(data[split].masks[:both], other[split].masks[:both])
        assert data[split].videos[:both] == other[split].videos[:both]


def test_no_two_videos_are_equal():
    data = sprites.generate(SMALL)
    assert len({frames.tobytes() for clips in data.values() for frames in clips.frames}) == sum(SMALL.sizes)
    assert len({name for clips in data.values() for name in clips.videos}) == sum(SMALL.sizes)


def test_data_depend_on_the_seed_and_on_nothing_else():
    """A fixed digest: other machines and other NumPy versions generate the same bytes."""
    assert digest(sprites.generate(SMALL)) == "be79b8494343ceab87d990da734122893eaed51385160b40bcf26d7eeadaae63"
    assert digest(sprites.generate(replace(SMALL, seed=1))) != digest(sprites.generate(SMALL))


def test_frames_need_not_be_square():
    spec = Sprites(
        num_train=2, num_val=1, num_test=0, num_frames=3, height=24, width=40, min_objects=1, max_objects=1
    )
    data = sprites.generate(spec)
    assert data["train"].frames.shape == (2, 3, 24, 40, 3)
    assert data["val"].masks.shape == (1, 3, 24, 40)
    assert len(data["test"]) == 0
    assert data["train"].masks.any(axis=(2, 3)).all()


@pytest.mark.parametrize(
    "change",
    [{"num_train": 0}, {"num_val": -1}, {"num_frames": 0}, {"height": 4}, {"min_objects": 0}, {"max_objects": 1}],
)
def test_bad_specifications_name_the_argument(change):
    with pytest.raises(ValueError, match=f"Sprites: {next(iter(change))} must be between"):
        Sprites(**change)


# The cache; tests/test_listops.py covers the rest of what both share.


def test_cache_is_written_once_and_read_afterwards(tmp_path, monkeypatch):
    expected = digest(sprites.generate(SMALL))
    assert digest(sprites.load(SMALL, tmp_path)) == expected
    assert os.listdir(tmp_path) == [SMALL.cache_name]
    with monkeypatch.context() as patched:
        patched.setattr(sprites, "_generate", None)
        again = sprites.load(SMALL, tmp_path)
    assert digest(again) == expected
    assert again["val"].videos == ("sprites/val/0", *(f"sprites/val/{i}" for i in range(1, SMALL.num_val)))

    path = tmp_path / SMALL.cache_name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert digest(sprites.load(SMALL, tmp_path)) == expected


def test_every_argument_names_another_cache_file():
    specs = [SMALL, *(replace(SMALL, **{f.name: getattr(SMALL, f.name) + 1}) for f in fields(SMALL))]
    assert len({spec.cache_name for spec in specs}) == 1 + len(fields(SMALL))


def test_cache_folder_that_cannot_be_written_fails_before_generating(tmp_path, monkeypatch):
    monkeypatch.setattr(sprites, "_generate", None)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*; set ATTN_JAX_CACHE to another folder"):
        sprites.load(SMALL, tmp_path / "file")


# Clips


FRAMES = np.zeros((2, 3, 4, 5, 3), np.uint8)
MASKS = np.zeros((2, 3, 4, 5), np.uint8)


@pytest.mark.parametrize(
    "frames, masks, videos, message",
    [
        (FRAMES[0], None, ("a", "b"), r"frames must have 5 axes of uint8, got uint8\(3, 4, 5, 3\)"),
        (FRAMES.astype(np.float32), None, ("a", "b"), r"frames must have 5 axes of uint8, got float32"),
        (FRAMES[..., :1], None, ("a", "b"), r"frames must be \(N, T, H, W, 3\)"),
        (FRAMES, MASKS[:, :2], ("a", "b"), r"masks \(2, 2, 4, 5\) do not fit frames \(2, 3, 4, 5, 3\)"),
        (FRAMES, MASKS.astype(bool), ("a", "b"), "masks must have 4 axes of uint8, got bool"),
        (FRAMES, MASKS, ("a",), "2 clips but 1 names"),
    ],
)
def test_malformed_clips_are_refused(frames, masks, videos, message):
    with pytest.raises(ValueError, match=message):
        Clips(frames, masks, videos)
